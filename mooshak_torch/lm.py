"""Python API in PyTorch: `mooshak_torch.load(path)` returns an `LM`.

Mirror: mooshak_jax/lm.py. The methods of `LM` are in mooshak/generation/lm.py, for both frameworks.
Shapes: S token ids of a text, T = S - 1, D model width, N most probable tokens.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from mooshak.checkpoints.base import FULL_SLICE, Checkpoint
from mooshak.config.generate import GenerateConfig
from mooshak.config.model import Dtype
from mooshak.errors import InputError
from mooshak.generation import lm
from mooshak.generation.adjustments import RowAdjustments
from mooshak.tokenizer.base import Tokenizer
from mooshak.tokenizer.load import load_tokenizer
from mooshak_torch.cached_model import CachedModel
from mooshak_torch.checkpoint import load_model
from mooshak_torch.decode import generate_tokens
from mooshak_torch.device import find_device
from mooshak_torch.model import Model
from mooshak_torch.ops.cross_entropy import token_log_probs
from mooshak_torch.params import numpy_dtype, to_numpy
from mooshak_torch.sampling import most_probable
from mooshak_torch.step import set_matmul_precision

SCORE_CHUNK = 2048
"""Number of tokens whose logits are in memory at once when a text is scored."""
TOP_CHUNK = 128
"""The same where their most probable tokens are looked for, in float64."""


class LM(lm.LM):
    """Language model in PyTorch, on one device."""

    def __init__(self, model: Model, tokenizer: Tokenizer | None, compiled: bool = False):
        super().__init__()
        self._model, self.tokenizer, self.compiled = model, tokenizer, compiled
        self.config, self.dtype = model.config, model.dtype

    @property
    def model(self) -> Model:
        """`Model` of this framework: token ids [B, T] -> logits [B, T, V]."""
        return self._model

    def _steps(
        self,
        prompts: list[list[int]],
        samples: list[int],
        settings: GenerateConfig,
        adjusters: list[RowAdjustments],
    ) -> Iterator[lm.Step]:
        return generate_tokens(self._model, prompts, samples, settings, adjusters, self.compiled)

    def _cached_model(
        self, prompts: list[list[int]], new_tokens: int, n_beams: int = 1
    ) -> CachedModel:
        return CachedModel(self._model, prompts, new_tokens, n_beams)

    def _load_draft(self, path: Path) -> "LM":
        model = load_model(path, self._model.dtype)
        return LM(model.to(self._model.head_VD.device), None)

    @torch.no_grad()
    def _token_log_probs(self, ids: list[int]) -> np.ndarray:
        ids_1S = torch.tensor([ids], device=self._model.head_VD.device)
        hidden_1TD = self._model.hidden_states(ids_1S[:, :-1])
        found_1T = token_log_probs(hidden_1TD, self._model.head_VD, ids_1S[:, 1:], SCORE_CHUNK)
        return found_1T[0].double().cpu().numpy()

    @torch.no_grad()
    def _most_probable(self, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
        ids_1T = torch.tensor([ids[:-1]], device=self._model.head_VD.device)
        hidden_1TD = self._model.hidden_states(ids_1T)
        chunks = hidden_1TD.split(TOP_CHUNK, dim=1)
        found = [most_probable(self._model.logits(chunk_1TD)[0]) for chunk_1TD in chunks]
        top_TN, log_prob_TN = (torch.cat(parts).cpu().numpy() for parts in zip(*found, strict=True))
        return top_TN, log_prob_TN

    def _checkpoint(self) -> Checkpoint:
        named = dict(self._model.named_parameters())
        tensors = {n: (numpy_dtype(p.dtype), tuple(p.shape)) for n, p in named.items()}

        def read(key: str, rows: slice = FULL_SLICE) -> np.ndarray:
            return to_numpy(named[key].detach()[rows].cpu())

        files = self._files()
        return Checkpoint(
            Path("(memory)"), "torch", self.config, None, tensors, read, tokenizer_files=files
        )


def load(
    path: str | Path,
    dtype: Dtype = "float32",
    mesh: str | None = None,
    device: str | None = None,
    tokenizer: str | Path | None = None,
    compiled: bool = False,
) -> LM:
    """Load a checkpoint of any format: of either framework, safetensors or Hugging Face.

    `dtype` is the compute dtype. `device` is by default cuda if there is a GPU, else cpu.
    `tokenizer` is the path of a tokenizer, for a checkpoint without one. `compiled` compiles the
    decode step with torch.compile, which pays off for long outputs. Raises `InputError` for a path
    that is not a checkpoint, an unsupported model or dtype, a tokenizer that does not fit the
    model, a device that is not available, and for a mesh: this API runs on one device.
    """
    if mesh:
        raise InputError(f"mesh {mesh}: mooshak_torch.load runs on one device; use mooshak_jax")
    lm.check_dtype(dtype)
    chosen = find_device(device)
    set_matmul_precision()
    model = load_model(path, dtype)
    found = load_tokenizer(Path(path), model.config, tokenizer)
    result = LM(model.to(chosen), found, compiled)
    result._use_settings_of(Path(path))
    return result
