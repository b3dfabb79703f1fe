"""Packed weights, and the backbone and the transformer flow head that use them, for CPUs."""
