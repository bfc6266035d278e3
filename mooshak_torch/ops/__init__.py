"""Operations of the model with their own kernels or gradients."""
