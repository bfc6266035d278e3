"""What both frameworks share; imports neither of them."""

__version__ = "0.1.0"
