"""Operations of the model, as functions of tensors; mirrored by mooshak_jax/ops."""
