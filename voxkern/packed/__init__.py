"""Packed weights, and the transformer flow head, for CPUs."""
