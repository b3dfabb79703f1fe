"""Timing of operators, modules and whole frames, and the search for launch configs."""
