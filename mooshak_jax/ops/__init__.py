"""Operations of the model with their own gradients."""
