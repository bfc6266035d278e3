"""Text generation shared by both frameworks."""
