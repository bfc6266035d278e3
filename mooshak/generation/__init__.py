"""Text generation: the Python API and the command, shared by both frameworks."""
