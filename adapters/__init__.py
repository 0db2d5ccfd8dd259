"""One module for each model family; importing one imports that family's own libraries."""
