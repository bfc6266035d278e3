"""Operations of the model, as functions of arrays. Mirror: mooshak_torch/ops."""
