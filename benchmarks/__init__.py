"""Benchmarks of our code and its peers; not part of the installed package."""
