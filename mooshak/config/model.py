"""The section `model`: architecture, sizes, parameter shapes, and its JSON form (config.json)."""

import functools
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, TypeAlias, get_args

from mooshak.config.fields import check_fields, number
from mooshak.config.lora import LoraConfig, adapter_shapes
from mooshak.errors import InputError, did_you_mean, require

Dtype: TypeAlias = Literal["float64", "float32", "bfloat16", "float16"]
Architecture: TypeAlias = Literal["mooshak", "llama"]


@dataclass(frozen=True)
class ModelConfig:
    """Architecture and sizes of the model; the contents of a checkpoint's `config.json`."""

    architecture: Architecture = "mooshak"
    """Block class of the layers."""
    vocab_size: int = number(64128, at_least=1)
    """Rows of the embedding and of the output head: the tokens of the tokenizer, rounded up to a
    multiple of 64."""
    dim: int = number(4096, at_least=1)
    """Width of the residual stream."""
    n_layers: int = number(8, at_least=1)
    """Number of layers."""
    n_heads: int = number(32, at_least=1)
    """Number of query heads."""
    n_kv_heads: int | None = number(None, at_least=1)
    """Number of key/value heads (null: as many as query heads)."""
    head_dim: int | None = number(None, at_least=1)
    """Width of a head (null: dim / n_heads)."""
    hidden_dim: int = number(11008, at_least=1)
    """Hidden width of the MLP."""
    max_seq_len: int = number(2048, at_least=1)
    """Maximum sequence length in tokens, which sizes the RoPE tables."""
    norm_eps: float = number(1e-5, above=0)
    """Epsilon of RMSNorm."""
    rope_theta: float = number(10000.0, above=0)
    """Base of the RoPE frequencies."""
    rope_scaling: dict[str, Any] | None = None
    """llama: rescaling of the RoPE frequencies (null: none), an object with rope_type linear and
    factor, or rope_type llama3 and factor, low_freq_factor, high_freq_factor,
    original_max_position_embeddings."""
    tie_embeddings: bool = False
    """llama: use the embedding as output head."""
    qkv_bias: bool = False
    """llama: bias of the query, key and value projections."""
    wo_bias: bool = False
    """llama: bias of the attention output projection."""
    mlp_bias: bool = False
    """llama: bias of the three MLP projections."""
    qk_norm: bool = False
    """llama: RMSNorm of the queries and keys of each head, before RoPE (as in Qwen3)."""
    sliding_window: int | None = number(None, at_least=1)
    """llama: number of positions that a query attends to, its own included, as in Mistral
    (null: all earlier positions)."""
    lora: LoraConfig | None = None
    """Adapters (null: none); from the section `lora`, and the key `lora` of a config.json."""
    # Layout of the parameters in JAX: the function and the checkpoints are the same.
    scan_layers: bool = field(default=False, compare=False)
    """JAX: stack the parameters of the layers and scan over them; one layer is compiled."""
    fuse_kernels: bool = field(default=False, compare=False)
    """JAX: fuse wq, wk and wv, and w1 and w3, into one matrix product each."""

    def __post_init__(self) -> None:
        require(
            self.architecture in get_args(Architecture),
            f"model.architecture {self.architecture!r} is unknown; known are "
            f"{' and '.join(get_args(Architecture))}",
        )
        check_fields(self, "model")
        if isinstance(self.lora, Mapping):
            object.__setattr__(self, "lora", LoraConfig(**self.lora))
        trained = self.lora.trainable_token_indices if self.lora else []
        require(
            max(trained, default=0) < self.vocab_size,
            f"lora.trainable_token_indices {trained}: model.vocab_size is {self.vocab_size}",
        )
        require(
            self.lora is None or not self.fuse_kernels,
            "an adapter is that of a single matrix; set model.fuse_kernels false",
        )
        if self.head_dim is None:
            require(
                self.dim % self.n_heads == 0,
                f"model.dim {self.dim} is not divisible by model.n_heads {self.n_heads}; "
                "change one of them or set model.head_dim",
            )
            object.__setattr__(self, "head_dim", self.dim // self.n_heads)
        if self.n_kv_heads is None:
            object.__setattr__(self, "n_kv_heads", self.n_heads)
        require(self.K % 2 == 0, f"model.head_dim {self.K} must be even: RoPE rotates pairs")
        require(
            self.n_heads % self.G == 0,
            f"model.n_heads {self.n_heads} is not a multiple of model.n_kv_heads {self.G}",
        )
        if self.rope_scaling is not None:
            _check_rope_scaling(self.rope_scaling)
        if self.architecture == "mooshak":
            # The concatenated heads are added to the residual stream without a projection.
            require(
                self.n_heads * self.K == self.dim,
                f"model.n_heads x model.head_dim = {self.n_heads * self.K} must be model.dim "
                f"{self.dim}: the mooshak architecture has no output projection",
            )
            for name in LLAMA_ONLY:
                require(
                    getattr(self, name) in (None, False),
                    f"the mooshak architecture has no {name}; unset model.{name}, or choose "
                    "model.architecture llama",
                )

    def __hash__(self) -> int:  # The default of a dataclass fails on the dict.
        values = model_description(self) | {
            "rope_scaling": frozenset((self.rope_scaling or {}).items()),
            "lora": str(self.lora),
        }
        return hash(tuple(values.values()))

    @property
    def G(self) -> int:
        """Number of key/value heads."""
        assert self.n_kv_heads is not None
        return self.n_kv_heads

    @property
    def K(self) -> int:
        """Width of a head."""
        assert self.head_dim is not None
        return self.head_dim

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return canonical name -> shape of every parameter, `[out, in]` layout, in model order."""
        shapes: dict[str, tuple[int, ...]] = {}
        llama = self.architecture == "llama"

        def linear(name: str, n_out: int, n_in: int, bias: bool = False) -> None:
            shapes[f"{name}.weight"] = (n_out, n_in)
            if bias:
                shapes[f"{name}.bias"] = (n_out,)

        def norm(name: str, width: int) -> None:
            shapes[f"{name}.weight"] = (width,)

        linear("embeddings", self.vocab_size, self.dim)
        for i in range(self.n_layers):
            layer = f"layers.{i}"
            if llama:
                norm(f"{layer}.attention_norm", self.dim)
            linear(f"{layer}.attention.wq", self.n_heads * self.K, self.dim, self.qkv_bias)
            linear(f"{layer}.attention.wk", self.G * self.K, self.dim, self.qkv_bias)
            linear(f"{layer}.attention.wv", self.G * self.K, self.dim, self.qkv_bias)
            if self.qk_norm:
                norm(f"{layer}.attention.q_norm", self.K)
                norm(f"{layer}.attention.k_norm", self.K)
            if llama:
                linear(f"{layer}.attention.wo", self.dim, self.n_heads * self.K, self.wo_bias)
            norm(f"{layer}.mlp_norm", self.dim)
            linear(f"{layer}.mlp.w1", self.hidden_dim, self.dim, self.mlp_bias)
            linear(f"{layer}.mlp.w2", self.dim, self.hidden_dim, self.mlp_bias)
            linear(f"{layer}.mlp.w3", self.hidden_dim, self.dim, self.mlp_bias)
            if not llama:
                norm(f"{layer}.output_norm", self.dim)
        if llama:
            norm("norm", self.dim)
        if not self.tie_embeddings:
            linear("lm_head", self.vocab_size, self.dim)
        return shapes | (adapter_shapes(shapes, self.lora) if self.lora else {})

    def parameter_count(self) -> int:
        """Return the number of parameters."""
        return sum(_product(shape) for shape in self.parameter_shapes().values())

    def attended(self, sequence_length: int) -> int:
        """Return the positions that a token attends to: the sequence, or the sliding window."""
        return min(sequence_length, self.sliding_window or sequence_length)

    def flops_per_token(self, sequence_length: int) -> int:
        """Return the FLOPs of one token's forward and backward pass: 6 per weight, plus attention.

        Attention is counted over the full sequence, not its causal half, as in PaLM
        (arXiv:2204.02311, appendix B), or over the sliding window. Embedding
        look-ups are not counted.
        """
        matrices = {n: _product(s) for n, s in self.parameter_shapes().items() if len(s) == 2}
        if not self.tie_embeddings:
            del matrices["embeddings.weight"]
        seen = self.attended(sequence_length)
        return 6 * sum(matrices.values()) + 12 * self.n_layers * self.n_heads * self.K * seen


LLAMA_ONLY = (
    "rope_scaling",
    "tie_embeddings",
    "qkv_bias",
    "wo_bias",
    "mlp_bias",
    "qk_norm",
    "sliding_window",
)
"""Keys of the model section that only the llama architecture uses."""

ROPE_SCALINGS = {
    "linear": {"factor"},
    "llama3": {
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    },
}
"""`rope_type` -> its other keys."""


def _check_rope_scaling(scaling: Mapping[str, Any]) -> None:
    require(isinstance(scaling, Mapping), f"model.rope_scaling {scaling!r} is not an object")
    kind = str(scaling.get("rope_type"))
    require(
        kind in ROPE_SCALINGS,
        f"model.rope_scaling: rope_type {kind} is not supported; supported are linear and llama3, "
        "whose frequencies do not depend on the length of the text",
    )
    keys = set(scaling) - {"rope_type"}
    for key in sorted(keys ^ ROPE_SCALINGS[kind]):
        what = "is unknown in" if key in keys else "is missing in"
        raise InputError(f"model.rope_scaling: key {key!r} {what} rope_type {kind}")
    for key in keys:
        value = scaling[key]
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
        require(number, f"model.rope_scaling: {key} must be a positive number, not {value!r}")


def model_description(model: ModelConfig) -> dict[str, Any]:
    """Return the fields that define the model's function: all but the layout options of JAX."""
    result = {f.name: getattr(model, f.name) for f in fields(model) if f.compare}
    return result | {"lora": model.lora and asdict(model.lora)}


def model_to_json(model: ModelConfig) -> str:
    """Return the text of `config.json`; rarely used keys are written only where they are set."""
    rare = {"qkv_bias", "wo_bias", "mlp_bias", "qk_norm", "sliding_window", "lora"}
    written = {
        key: value for key, value in model_description(model).items() if key not in rare or value
    }
    return json.dumps(written, indent=2) + "\n"


def model_from_json(text: str | bytes, where: str) -> ModelConfig:
    """Return the model that a `config.json` describes; errors name the file `where`.

    Raises `InputError` for invalid JSON, unknown or missing keys and invalid values.
    """
    try:
        values = json.loads(text)
    except ValueError as error:
        raise InputError(f"{where} is not JSON: {error}") from error
    if not isinstance(values, Mapping):
        raise InputError(f"{where} is not a JSON object")
    known = {f.name for f in fields(ModelConfig) if f.compare}
    if unknown := sorted(set(values) - known):
        raise InputError(f"{where}: unknown key {unknown[0]!r}{did_you_mean(unknown[0], known)}")
    if missing := sorted({"vocab_size", "dim", "n_layers", "n_heads", "hidden_dim"} - set(values)):
        raise InputError(f"{where}: key {missing[0]!r} is missing; is this a Mooshak checkpoint?")
    try:
        return ModelConfig(**values)
    except (TypeError, InputError) as error:
        raise InputError(f"{where}: {error}") from error


def _product(shape: tuple[int, ...]) -> int:
    return functools.reduce(lambda a, b: a * b, shape, 1)
