"""The training loop and what surrounds it: metrics, memory allocation."""
