"""The experiments: each module measures (`run`), says what it found (`tell`) and draws it (`draw`)."""
