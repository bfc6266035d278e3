"""The code shared by both frameworks; it imports neither of them."""

__version__ = "0.1.0"
