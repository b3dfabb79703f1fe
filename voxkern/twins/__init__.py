"""Twins: the computation of a host module on the host's own weights, through kernels."""
