"""Operations of the model, without parameters of their own."""
