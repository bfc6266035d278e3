"""Serving of many requests at once: continuous batching, and a server, for both frameworks."""
