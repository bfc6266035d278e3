"""Quantities that must be bit-equal in both frameworks, computed once in NumPy."""
