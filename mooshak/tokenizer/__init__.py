"""Tokenizers: training, loading, extension and use."""
