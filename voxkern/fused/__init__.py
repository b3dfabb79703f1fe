"""Fused modules: each runs a reference module's computation on that module's weights, through kernels."""
