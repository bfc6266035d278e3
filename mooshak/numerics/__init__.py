"""Numbers that both frameworks must agree on, computed once in NumPy."""
