"""Python API in JAX: `mooshak_jax.load(path)` returns an `LM`.

Mirror: mooshak_torch/lm.py. The methods of `LM` are in mooshak/generation/lm.py, for both
frameworks.
Shapes: S token ids of a text, T = S - 1, D model width, N most probable tokens.
"""

import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from mooshak.checkpoints.base import FULL_SLICE, Checkpoint
from mooshak.config.generate import GenerateConfig
from mooshak.config.model import Dtype, ModelConfig
from mooshak.errors import InputError
from mooshak.generation import lm
from mooshak.generation.adjustments import RowAdjustments
from mooshak.tokenizer.base import Tokenizer
from mooshak.tokenizer.load import load_tokenizer
from mooshak_jax.cached_model import CachedModel
from mooshak_jax.checkpoint import load_model
from mooshak_jax.decode import generate_tokens
from mooshak_jax.device import find_devices
from mooshak_jax.distributed.mesh import Parallel, make_mesh
from mooshak_jax.model import Model
from mooshak_jax.ops.cross_entropy import token_log_probs
from mooshak_jax.param_names import canonical_tensors
from mooshak_jax.params import make_graphdef, merge
from mooshak_jax.sampling import most_probable

SCORE_CHUNK = 2048
"""Number of tokens whose logits are in memory at once when a text is scored."""
TOP_CHUNK = 128
"""The same where their most probable tokens are looked for, in float64."""


class LM(lm.LM):
    """Language model in JAX, on one device or a mesh."""

    def __init__(
        self,
        config: ModelConfig,
        dtype: Dtype,
        params: Any,
        tokenizer: Tokenizer | None,
        parallel: Parallel,
    ):
        super().__init__()
        self.config, self.dtype, self.tokenizer = config, dtype, tokenizer
        self.params, self.graphdef, self.parallel = params, make_graphdef(config, dtype), parallel

    @property
    def model(self) -> Model:
        """`Model` of this framework: token ids [B, T] -> logits [B, T, V]."""
        return merge(self.graphdef, self.params)

    def _steps(
        self,
        prompts: list[list[int]],
        samples: list[int],
        settings: GenerateConfig,
        adjusters: list[RowAdjustments],
    ) -> Iterator[lm.Step]:
        steps = generate_tokens(self.graphdef, self.params, prompts, samples, settings, adjusters)
        while True:
            # Sampling is in float64; the caller's x64 setting is unchanged between two tokens.
            with jax.enable_x64():
                step = next(steps, None)
            if step is None:
                return
            yield step

    def _cached_model(
        self, prompts: list[list[int]], new_tokens: int, n_beams: int = 1
    ) -> CachedModel:
        return CachedModel(self.graphdef, self.params, prompts, new_tokens, n_beams)

    def _load_draft(self, path: Path) -> "LM":
        config, params = load_model(path, self.dtype, self.parallel)
        return LM(config, self.dtype, params, None, self.parallel)

    def _token_log_probs(self, ids: list[int]) -> np.ndarray:
        # Padded to few lengths, for few compilations: later tokens do not change earlier ones.
        length = min(1 << (len(ids) - 1).bit_length(), self.config.max_seq_len + 1)
        ids_1S = np.pad(np.array([ids], np.int32), ((0, 0), (0, max(length - len(ids), 0))))
        found_1T = _score(self.graphdef, self.params, jnp.asarray(ids_1S))
        return np.asarray(found_1T[0, : len(ids) - 1]).astype(np.float64)

    def _most_probable(self, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
        length = -(-(len(ids) - 1) // TOP_CHUNK) * TOP_CHUNK
        ids_1T = np.zeros((1, min(length, self.config.max_seq_len)), np.int32)
        ids_1T[0, : len(ids) - 1] = ids[:-1]
        with jax.enable_x64():
            hidden_1TD = _hidden_states(self.graphdef, self.params, jnp.asarray(ids_1T))
            chunks = [hidden_1TD[:, i : i + TOP_CHUNK] for i in range(0, len(ids) - 1, TOP_CHUNK)]
            found = [_top(self.graphdef, self.params, chunk_1TD) for chunk_1TD in chunks]
            parts = zip(*found, strict=True)
            top_TN, log_prob_TN = (np.concatenate(part)[: len(ids) - 1] for part in parts)
        return top_TN, log_prob_TN

    def _checkpoint(self) -> Checkpoint:
        leaves = {
            tensor.name: (tensor, leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(self.params)
            for tensor in canonical_tensors(path, leaf.shape)
        }
        tensors = {
            name: (np.dtype(leaf.dtype), tensor.shape) for name, (tensor, leaf) in leaves.items()
        }

        def read(key: str, rows: slice = FULL_SLICE) -> np.ndarray:
            tensor, leaf = leaves[key]
            block, here = tensor.block(rows)
            return np.ascontiguousarray(tensor.rows(np.asarray(leaf[block]))[here])

        return Checkpoint(
            Path("(memory)"), "jax", self.config, None, tensors, read, tokenizer_files=self._files()
        )


def load(
    path: str | Path,
    dtype: Dtype = "float32",
    mesh: str | None = None,
    device: str | None = None,
    tokenizer: str | Path | None = None,
) -> LM:
    """Load a checkpoint of any format: of either framework, safetensors or Hugging Face.

    `dtype` is the compute dtype; float64 turns on JAX's x64 mode for the process, with a warning.
    `mesh` shards the parameters, for example fsdp=2,tensor=2. `device` is cpu, cuda or tpu, by
    default the best that JAX finds. `tokenizer` is the path of a tokenizer, for a checkpoint
    without one. Raises `InputError` for a path that is not a checkpoint, an unsupported model or
    dtype, a tokenizer that does not fit the model, and for a mesh or device that is not available.
    """
    lm.check_dtype(dtype)
    devices = find_devices(device)
    if dtype == "float16" and devices[0].platform == "cpu":
        raise InputError(
            "dtype float16: XLA has no such products on a CPU; use bfloat16 or float32"
        )
    jax.config.update("jax_default_matmul_precision", "highest")
    if dtype == "float64" and not jax.config.jax_enable_x64:  # type: ignore[attr-defined]
        jax.config.update("jax_enable_x64", True)
        warnings.warn("dtype float64: JAX's x64 mode is now enabled for this process", stacklevel=2)
    parallel = make_mesh(mesh or "data=1", devices)
    config, params = load_model(path, dtype, parallel)
    result = LM(config, dtype, params, load_tokenizer(Path(path), config, tokenizer), parallel)
    result._use_settings_of(Path(path))
    return result


@partial(jax.jit, static_argnums=0)
def _score(graphdef: nnx.GraphDef, params: Any, ids_1S: Array) -> Array:
    model: Model = merge(graphdef, params)
    hidden_1TD = model.hidden_states(ids_1S[:, :-1])
    return token_log_probs(hidden_1TD, model.head_DV, ids_1S[:, 1:], SCORE_CHUNK)


@partial(jax.jit, static_argnums=0)
def _hidden_states(graphdef: nnx.GraphDef, params: Any, ids_1T: Array) -> Array:
    model: Model = merge(graphdef, params)
    return model.hidden_states(ids_1T)


@partial(jax.jit, static_argnums=0)
def _top(graphdef: nnx.GraphDef, params: Any, hidden_1TD: Array) -> tuple[Array, Array]:
    model: Model = merge(graphdef, params)
    return most_probable(model.logits(hidden_1TD)[0])
