"""Operations of the model, as functions of tensors. Mirror: mooshak_jax/ops."""
