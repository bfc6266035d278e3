"""The canonical Mooshak in PyTorch; imports neither mooshak_jax nor JAX."""
