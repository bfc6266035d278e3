"""Operations of the model, as functions of arrays; mirrors mooshak_torch/ops."""
