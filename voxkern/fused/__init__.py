"""Fused modules, each of which runs a reference module's computation on that module's weights through kernels."""
