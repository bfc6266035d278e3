"""Documents of text: readers, filters, and the generated tales."""
