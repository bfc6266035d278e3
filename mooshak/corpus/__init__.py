"""Text: readers, filters and the generated tales."""
