"""The only package that sees both frameworks: converts between them and proves them equal."""
