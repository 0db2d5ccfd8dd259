"""The experiments of *Selective Jacobi Decoding* (arXiv 2505.24791): data, training and, later, its figures."""
