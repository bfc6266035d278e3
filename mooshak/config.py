"""The configuration: strict dataclasses, read from YAML, changed by `--section.key value`.

Every command builds its parser with `parser()` and reads its arguments with `parse()`. Keys that
nobody knows are errors that name the nearest known key, wherever they stand.
"""

import argparse
import difflib
import functools
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_type_hints

import jsonargparse
import yaml

from mooshak.errors import InputError

Dtype: TypeAlias = Literal["float64", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class ModelConfig:
    """The model: what `config.json` holds beside the weights."""

    architecture: Literal["mooshak", "llama"] = "mooshak"
    """Which block the layers are made of."""
    vocab_size: int = 64128
    """Rows of the embedding and of the output head; a multiple of 64."""
    dim: int = 4096
    """Width of the residual stream."""
    n_layers: int = 8
    """Number of layers."""
    n_heads: int = 32
    """Number of query heads."""
    n_kv_heads: int | None = None
    """Number of key/value heads (null: as many as query heads)."""
    head_dim: int | None = None
    """Width of a head (null: dim / n_heads)."""
    hidden_dim: int = 11008
    """Width inside the MLP."""
    max_seq_len: int = 2048
    """Longest sequence, in tokens."""
    norm_eps: float = 1e-5
    """Epsilon of RMSNorm."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    rope_scaling: dict[str, Any] | None = None
    """llama: rescaling of the rotary frequencies; {rope_type: linear, factor} or llama3's keys."""
    tie_embeddings: bool = False
    """llama: use the embedding as output head."""
    qkv_bias: bool = False
    """llama: biases of the query, key and value projections."""
    wo_bias: bool = False
    """llama: a bias of the attention's output projection."""
    mlp_bias: bool = False
    """llama: biases of the MLP's three projections."""
    qk_norm: bool = False
    """llama: RMSNorm over each head's queries and keys, before RoPE (Qwen3)."""
    sliding_window: int | None = None
    """llama: positions that a query sees, its own included (Mistral; null: all before it)."""
    # How a framework lays the same function out; no part of what a checkpoint is compared by.
    scan_layers: bool = field(default=False, compare=False)
    """JAX: keep the layers stacked and compile one, which the step goes through in a loop."""
    fuse_kernels: bool = field(default=False, compare=False)
    """JAX: one matrix product for wq, wk and wv, and one for w1 and w3."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "dim", "n_layers", "n_heads", "hidden_dim", "max_seq_len"):
            _require(getattr(self, name) > 0, f"model.{name} must be positive")
        if self.head_dim is None:
            _require(
                self.dim % self.n_heads == 0,
                f"model.dim {self.dim} is not divisible by model.n_heads {self.n_heads}; "
                "change one of them or set model.head_dim",
            )
            object.__setattr__(self, "head_dim", self.dim // self.n_heads)
        if self.n_kv_heads is None:
            object.__setattr__(self, "n_kv_heads", self.n_heads)
        _require(self.K % 2 == 0, f"model.head_dim {self.K} must be even: RoPE rotates pairs")
        _require(
            self.G > 0 and self.n_heads % self.G == 0,
            f"model.n_heads {self.n_heads} is not a multiple of model.n_kv_heads {self.G}",
        )
        _require(self.norm_eps > 0, "model.norm_eps must be positive")
        if self.rope_scaling is not None:
            _check_rope_scaling(self.rope_scaling)
        _require(
            self.sliding_window is None or self.sliding_window > 0,
            "model.sliding_window must be positive",
        )
        if self.architecture == "mooshak":
            # The concatenated heads are added to the residual stream as they are.
            _require(
                self.n_heads * self.K == self.dim,
                f"model.n_heads x model.head_dim = {self.n_heads * self.K} must be model.dim "
                f"{self.dim}: the mooshak architecture has no output projection",
            )
            for name in LLAMA_ONLY:
                _require(
                    getattr(self, name) in (None, False),
                    f"the mooshak architecture has no {name}; unset model.{name}, or choose "
                    "model.architecture llama",
                )

    def __hash__(self) -> int:  # The one of a dataclass would fail at the dict.
        values = description(self) | {"rope_scaling": frozenset((self.rope_scaling or {}).items())}
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
        """Canonical name -> shape of every parameter, torch `[out, in]` layout, in model order."""
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
        return shapes

    def parameter_count(self) -> int:
        """Number of parameters."""
        return sum(_product(shape) for shape in self.parameter_shapes().values())

    def flops_per_token(self, sequence_length: int) -> int:
        """FLOPs of forward and backward for one token: 6 per weight that multiplies, and attention.

        Attention counts in full, not by its causal half, as in PaLM (arXiv:2204.02311, app. B), or
        by its sliding window.
        """
        matrices = {n: _product(s) for n, s in self.parameter_shapes().items() if len(s) == 2}
        if not self.tie_embeddings:
            del matrices["embeddings.weight"]
        seen = min(sequence_length, self.sliding_window or sequence_length)
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
"""`rope_type` of a rescaling -> the keys that it has besides."""


def _check_rope_scaling(scaling: Mapping[str, Any]) -> None:
    kind = str(scaling.get("rope_type"))
    _require(
        kind in ROPE_SCALINGS,
        f"model.rope_scaling: rope_type {kind} is not supported; linear and llama3 are, whose "
        "frequencies are the same at every length of the text and have no temperature",
    )
    keys = set(scaling) - {"rope_type"}
    for key in sorted(keys ^ ROPE_SCALINGS[kind]):
        what = "is unknown to" if key in keys else "is missing in"
        raise InputError(f"model.rope_scaling: key {key!r} {what} rope_type {kind}")
    for key in keys:
        value = scaling[key]
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
        _require(number, f"model.rope_scaling: {key} must be a positive number, not {value!r}")


@dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer: a SentencePiece model, trained when it is missing."""

    path: str = "data/demo/tokenizer.model"
    """The SentencePiece model file."""
    vocab_size: int = 64128
    """Pieces to train; the model's vocabulary is this, rounded up to a multiple of 64."""
    character_coverage: float = 1.0
    """Share of the characters that get a piece of their own; the rest are bytes."""
    training_bytes: int = 200_000_000
    """Most bytes of text to train on, taken from the sources by weight."""


@dataclass(frozen=True)
class InitConfig:
    """What the weights are before the first step. The key is `from`, a keyword of Python."""

    from_: str = ""
    """A checkpoint of any kind, a Hugging Face directory too, to begin with (empty: drawn weights).
    Keys of model that are left at their default are its, and so is the tokenizer."""


@dataclass(frozen=True)
class SourceConfig:
    """One stream of documents."""

    name: str
    """Name of the source: of its folder of token shards, and in the reports."""
    kind: Literal["tales", "text", "jsonl", "parquet", "huggingface"] = "tales"
    """tales (built in), text (a document a file), jsonl, parquet, or huggingface (`datasets`)."""
    language: str = "en"
    """Language tag (hi, en, ...): validation is reported per language."""
    weight: float = 1.0
    """Share in the training mixture, relative to the other sources' weights."""
    path: str = ""
    """Glob of the files, or the name of the Hugging Face dataset."""
    column: str = "text"
    """Field (jsonl) or column (parquet, huggingface) that holds the text."""
    subset: str | None = None
    """Hugging Face: the configuration (`name=`) or directory (`data_dir=`) of the dataset."""
    split: str = "train"
    """Hugging Face: the split."""
    documents: int | None = None
    """Take at most so many documents; for tales, the number that is written (null: 1000)."""
    seed: int = 0
    """tales: seed of the tales. The same seed in two languages gives the same tales."""

    def __post_init__(self) -> None:
        _require(
            bool(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", self.name)),
            f"data.sources name {self.name!r} (a folder) must begin with a letter or digit, "
            "then letters, digits, '_', '-' and '.'",
        )
        _require(self.weight > 0, f"weight of source {self.name} must be positive")
        _require(self.kind == "tales" or bool(self.path), f"source {self.name} needs a path")


@dataclass(frozen=True)
class DataConfig:
    """The corpus and how it becomes batches."""

    dir: str = "data/demo"
    """Where the token shards are kept."""
    sources: list[SourceConfig] = field(
        default_factory=lambda: [
            SourceConfig("tales-hi", language="hi"),
            SourceConfig("tales-en", language="en"),
        ]
    )
    """The sources, mixed by weight."""
    normalize_nfc: bool = True
    """Bring text to Unicode NFC (ZWJ and ZWNJ are kept)."""
    drop_empty: bool = True
    """Drop documents without a visible character."""
    deduplicate: bool = True
    """Drop exact copies of documents within a source."""
    validation_fraction: float = 0.02
    """Share of the documents held out for validation, chosen by a hash of their text."""
    max_broken_lines: int = 100
    """JSONL: broken lines to skip and count before giving up."""
    shard_tokens: int = 2**24
    """Tokens per shard."""
    workers: int = 0
    """Grain worker processes that read ahead (0: a thread in the training process)."""

    def __post_init__(self) -> None:
        names = [source.name for source in self.sources]
        _require(bool(names), "data.sources is empty; name at least one source")
        _require(len(set(names)) == len(names), f"data.sources has a name twice: {names}")
        _require(0 <= self.validation_fraction < 1, "data.validation_fraction must be in [0, 1)")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (arXiv:1711.05101), with weight decay on matrices, and clipping by the global norm."""

    learning_rate: float = 3e-4
    """Peak learning rate."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay, on matrices only."""
    clip_norm: float = 1.0
    """Largest global norm of the gradient."""


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate as a function of the step."""

    kind: Literal["cosine", "wsd", "constant"] = "cosine"
    """cosine, wsd (warm-up, stable, decay; arXiv:2404.06395) or constant, all after a warm-up."""
    warmup_steps: int = 100
    """Steps of linear warm-up."""
    decay_fraction: float = 0.2
    """wsd: the share of the steps in which the rate decays at the end."""
    final_fraction: float = 0.1
    """Learning rate at the end, as a share of the peak."""
    total_steps: int | None = None
    """Steps that the schedule is laid out for (null: train.steps)."""


@dataclass(frozen=True)
class TrainConfig:
    """The training loop."""

    steps: int = 1000
    """Optimizer steps in all, those before a resume included."""
    batch_size: int = 8
    """Sequences per step, over all processes."""
    sequence_length: int | None = None
    """Tokens per sequence (null: model.max_seq_len)."""
    accumulation: int = 1
    """Micro-batches per step, whose gradients are added up."""
    dtype: Dtype = "float32"
    """float64, float32, bfloat16 (matmuls in bf16; parameters, norms and loss in fp32), or float16
    (the same; torch only: gradients are scaled)."""
    loss_chunk: int = 2048
    """Tokens whose logits are in memory at once."""
    remat: Literal["none", "dots", "full"] = "none"
    """What the backward pass computes again: nothing, all but matrix products, or whole layers."""
    compile: bool = False
    """torch: compile each layer (`torch.compile`); JAX always compiles the whole step."""
    log_every: int = 1
    """Steps between lines of the metrics."""
    stop_at: int | None = None
    """Save and stop after this step, as if interrupted; the schedule is not touched."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "loss_chunk", "log_every"):
            _require(getattr(self, name) > 0, f"train.{name} must be positive")


@dataclass(frozen=True)
class ParallelConfig:
    """How the work is spread over devices."""

    strategy: Literal["auto", "single", "ddp", "fsdp", "hsdp", "deepspeed"] = "auto"
    """torch: single, ddp, or auto (ddp under torchrun)."""
    mesh: str = ""
    """Axes and sizes, like data=2,fsdp=4; --mesh is short for it (empty: all devices on data)."""
    cpu_devices: int | None = None
    """JAX on CPU: how many devices each process has (null: as many as the mesh needs)."""
    reshard_after_forward: bool = True
    """torch, fsdp: free gathered parameters after the forward pass and gather them again."""
    cpu_offload: bool = False
    """torch, fsdp: keep parameters, gradients and optimizer state in the host's memory."""
    prefetch: int = 1
    """torch, fsdp: layers that are gathered ahead of the one that computes."""
    zero_stage: Literal[1, 2, 3] = 2
    """torch, deepspeed: cut the optimizer state (1), gradients too (2), parameters too (3)."""
    timeout: int = 600
    """torch: seconds after which a process that waits for the others gives up and says where."""
    sequence_parallel: bool = False
    """torch, tensor: cut hidden states by sequence where they are not cut by heads or width."""
    slices: int = 1
    """JAX: slices of a TPU pod, joined by the data-center network, that the data axis spans."""
    coordinator: str | None = None
    """JAX: HOST:PORT of process 0 of several, or auto: TPU or Slurm know (null: one process)."""
    processes: int | None = None
    """JAX: how many processes there are, with a coordinator."""
    process: int | None = None
    """JAX: which of the processes this is, from 0."""

    def __post_init__(self) -> None:
        _require(self.slices > 0, "parallel.slices must be positive")
        _require(self.timeout > 0, "parallel.timeout must be positive")
        _require(self.prefetch >= 0, "parallel.prefetch must not be negative")
        named = self.coordinator not in (None, "auto")
        _require(
            named == (self.processes is not None) == (self.process is not None),
            "parallel.coordinator HOST:PORT, parallel.processes and parallel.process go together; "
            "give all three or none",
        )
        if self.processes is not None and self.process is not None:
            _require(
                0 <= self.process < self.processes,
                f"parallel.process {self.process} is not in 0 .. {self.processes - 1}",
            )


@dataclass(frozen=True)
class CheckpointConfig:
    """What is kept of a run."""

    every: int = 500
    """Steps between checkpoints; the last step is always kept (0: only the last)."""
    keep: int = 2
    """How many of the newest checkpoints stay; the best by validation loss stays too."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Validation during training."""

    every: int = 250
    """Steps between validations (0: never)."""
    sequences: int = 64
    """Validation sequences per language, at most, spread evenly over the split (0: all)."""
    batch_size: int = 8
    """Sequences per forward pass."""

    def __post_init__(self) -> None:
        _require(self.every >= 0, "evaluate.every must not be negative")
        _require(self.sequences >= 0, "evaluate.sequences must not be negative")
        _require(self.batch_size > 0, "evaluate.batch_size must be positive")


@dataclass(frozen=True)
class RunConfig:
    """The run and where it lives."""

    dir: str = "runs/default"
    """The run directory: metrics, resolved config, checkpoints."""
    seed: int = 0
    """Seed of the initial weights and of the order of the data."""
    progress: bool = True
    """Show a progress bar."""
    tensorboard: bool = True
    """Write TensorBoard events too."""


@dataclass(frozen=True)
class Config:
    """Everything that decides a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    init: InitConfig = field(default_factory=InitConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        train, model = self.train, self.model
        if train.sequence_length is None:
            train = replace(train, sequence_length=model.max_seq_len)
            object.__setattr__(self, "train", train)
        if self.schedule.total_steps is None:
            object.__setattr__(self, "schedule", replace(self.schedule, total_steps=train.steps))
        _require(
            model.max_seq_len >= self.T,
            f"train.sequence_length {self.T} is more than model.max_seq_len {model.max_seq_len}",
        )
        _require(
            train.accumulation > 0 and train.batch_size % train.accumulation == 0,
            f"train.batch_size {train.batch_size} is not divisible by train.accumulation "
            f"{train.accumulation}",
        )

    @property
    def T(self) -> int:
        """Tokens per training sequence."""
        assert self.train.sequence_length is not None
        return self.train.sequence_length


SECTIONS = tuple(f.name for f in fields(Config))


def parser(description: str) -> jsonargparse.ArgumentParser:
    """A parser of `--config FILE` and every `--section.key`; a command adds its own options."""
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    result = jsonargparse.ArgumentParser(description=description, exit_on_error=False)
    result.add_argument("--config", action="config", help="a YAML file with the sections below")
    # Section by section: defaults come from the signatures, where a derived value is still null.
    for section in fields(Config):
        if section.type is InitConfig:
            text = "a checkpoint of any kind to begin with; the model and the tokenizer are its own"
            result.add_argument("--init.from", default="", help=f"{text} (empty: drawn weights)")
        else:
            result.add_class_arguments(section.type, section.name)
    return result


def parse(
    arguments: jsonargparse.ArgumentParser,
    argv: Sequence[str] | None = None,
    find_config: Callable[[jsonargparse.Namespace], Path] | None = None,
) -> tuple[Config, jsonargparse.Namespace]:
    """The resolved configuration and the command's own options.

    `find_config` gives the file to read where there is no `--config`. Raises `InputError` for a
    file that is not there, an unknown key or a value of another type.
    """
    words = [_long(word) for word in (sys.argv[1:] if argv is None else argv)]
    try:
        namespace = arguments.parse_args(words)
        if find_config is not None and namespace.config is None:
            words = ["--config", str(find_config(namespace)), *words]
            namespace = arguments.parse_args(words)
        values = arguments.instantiate(namespace)
    except (jsonargparse.ArgumentError, ValueError, TypeError) as error:
        message = _explain(str(error))
        if isinstance(error, UnicodeDecodeError) or message.startswith("Problems parsing config"):
            message = f"{_config_file(words)} is not YAML: {message}"
        raise InputError(message) from error
    sections = {name: values[name] for name in SECTIONS}
    sections["init"] = InitConfig(values["init.from"])
    if sections["init"].from_:
        sections |= _begun(**sections)
    return Config(**sections), values


def _begun(
    init: InitConfig, model: ModelConfig, tokenizer: TokenizerConfig, **_: Any
) -> dict[str, Any]:
    """The sections `model` and `tokenizer` of a run that begins with a checkpoint."""
    from mooshak.checkpoints import model_of
    from mooshak.prompts import find_tokenizer

    path, unset = Path(init.from_), ModelConfig()
    there = description(model_of(path))
    given = {key: value for key, value in description(model).items() if value != there.get(key)}
    given = {key: value for key, value in given.items() if value != getattr(unset, key)}
    if tokenizer.path == TokenizerConfig().path:
        tokenizer = replace(tokenizer, path=str(find_tokenizer(path, None)))
    return {"model": replace(model, **there | given), "tokenizer": tokenizer}


def _long(word: str) -> str:
    """`--mesh` is short for `--parallel.mesh`."""
    return re.sub(r"^--mesh(?==|$)", "--parallel.mesh", word)


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration in a YAML file, with `--section.key value` overrides on top."""
    return parse(parser(""), ["--config", str(path), *overrides])[0]


def dump(config: Config) -> str:
    """The configuration as YAML; `load` reads it back as the same configuration."""
    values = asdict(config) | {"init": {"from": config.init.from_}}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def description(model: ModelConfig) -> dict[str, Any]:
    """What says which function a model is: all but how a framework lays it out."""
    return {f.name: getattr(model, f.name) for f in fields(model) if f.compare}


def model_to_json(model: ModelConfig) -> str:
    """The text of `config.json`; what few models have stands there only where one has it."""
    rare = {"qkv_bias", "wo_bias", "mlp_bias", "qk_norm", "sliding_window"}
    kept = {key: value for key, value in description(model).items() if key not in rare or value}
    return json.dumps(kept, indent=2) + "\n"


def model_from_json(text: str | bytes, where: str) -> ModelConfig:
    """The model that a `config.json` describes. Raises `InputError` that names the file `where`."""
    try:
        values = json.loads(text)
    except ValueError as error:
        raise InputError(f"{where} is not JSON: {error}") from error
    if not isinstance(values, Mapping):
        raise InputError(f"{where} is not a JSON object")
    known = {f.name for f in fields(ModelConfig) if f.compare}
    if unknown := sorted(set(values) - known):
        raise InputError(f"{where}: unknown key {unknown[0]!r}{_nearest(unknown[0], known)}")
    if missing := sorted({"vocab_size", "dim", "n_layers", "n_heads", "hidden_dim"} - set(values)):
        raise InputError(f"{where}: key {missing[0]!r} is missing; is this a Mooshak checkpoint?")
    try:
        return ModelConfig(**values)
    except TypeError as error:
        raise InputError(f"{where}: {error}") from error


def _config_file(words: Sequence[str]) -> str | None:
    """What stands behind `--config`, which jsonargparse's messages leave out."""
    option = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    option.add_argument("--config")
    file: str | None = option.parse_known_args(words)[0].config
    return file


def _explain(message: str) -> str:
    """jsonargparse's message, with the nearest known key where a key is unknown."""
    for pattern, prefix in (
        (r"unrecognized arguments: --([\w.\-]+)", "option --"),
        (r"Group '([\w.]+)' does not accept option '([\w.]+)'", "key "),
        (r"Option '([\w.]+)' is not accepted", "key "),
    ):
        if match := re.search(pattern, message):
            key = ".".join(match.groups())
            return f"unknown {prefix}{key}{_nearest(key, _known_keys())}"
    return message


@functools.cache
def _known_keys() -> tuple[str, ...]:
    sections = get_type_hints(Config).items()
    keys = [
        f"{name}.{key.name.rstrip('_')}" for name, section in sections for key in fields(section)
    ]
    return (*SECTIONS, *keys, *(f.name for f in fields(SourceConfig)), "config", "mesh", "resume")


def _nearest(key: str, known: Sequence[str] | set[str]) -> str:
    near = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.0)
    return f"; did you mean {near[0]}?" if near else ""


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise InputError(otherwise)


def _product(shape: tuple[int, ...]) -> int:
    return functools.reduce(lambda a, b: a * b, shape, 1)
