"""The accelerator report: one command that measures both frameworks on a GPU or a TPU."""
