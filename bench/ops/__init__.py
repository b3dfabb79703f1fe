"""The registry of operators, with a file of entries for each file of ``kernels/``."""
