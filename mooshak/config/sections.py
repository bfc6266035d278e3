"""The configuration: strict dataclasses, read from YAML, changed by `--section.key value`.

Every command builds its parser with `parser()` and reads its arguments with `parse()`. Keys that
nobody knows are errors that name the nearest known key, wherever they stand.
"""

import math
import re
from dataclasses import dataclass, field, replace
from typing import Literal

from mooshak.config.model import Dtype, ModelConfig
from mooshak.errors import InputError, require


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
        require(
            bool(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", self.name)),
            f"data.sources name {self.name!r} (a folder) must begin with a letter or digit, "
            "then letters, digits, '_', '-' and '.'",
        )
        require(self.weight > 0, f"weight of source {self.name} must be positive")
        require(self.kind == "tales" or bool(self.path), f"source {self.name} needs a path")


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
    document_mask: bool = False
    """Tokens of packed documents do not see each other; positions restart with each document, and
    labels across a border are ignored."""
    workers: int = 0
    """Grain worker processes that read ahead (0: a thread in the training process)."""

    def __post_init__(self) -> None:
        names = [source.name for source in self.sources]
        require(bool(names), "data.sources is empty; name at least one source")
        require(len(set(names)) == len(names), f"data.sources has a name twice: {names}")
        require(0 <= self.validation_fraction < 1, "data.validation_fraction must be in [0, 1)")


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
    max_grad_norm: float = 1.0
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
    min_lr_ratio: float = 0.1
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
    gradient_accumulation_steps: int = 1
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
    stop_after_step: int | None = None
    """Save and stop after this step, as if interrupted; the schedule is not touched."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "loss_chunk", "log_every"):
            require(getattr(self, name) > 0, f"train.{name} must be positive")


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
    num_slices: int = 1
    """JAX: slices of a TPU pod, joined by the data-center network, that the data axis spans."""
    coordinator_address: str | None = None
    """JAX: HOST:PORT of process 0 of several, or auto: TPU or Slurm know (null: one process)."""
    num_processes: int | None = None
    """JAX: how many processes there are, with a coordinator."""
    process_id: int | None = None
    """JAX: which of the processes this is, from 0."""

    def __post_init__(self) -> None:
        require(self.num_slices > 0, "parallel.num_slices must be positive")
        require(self.timeout > 0, "parallel.timeout must be positive")
        require(self.prefetch >= 0, "parallel.prefetch must not be negative")
        named = self.coordinator_address not in (None, "auto")
        require(
            named == (self.num_processes is not None) == (self.process_id is not None),
            "parallel.coordinator_address HOST:PORT, parallel.num_processes and "
            "parallel.process_id go together; give all three or none",
        )
        if self.num_processes is not None and self.process_id is not None:
            require(
                0 <= self.process_id < self.num_processes,
                f"parallel.process_id {self.process_id} is not in 0 .. {self.num_processes - 1}",
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
        require(self.every >= 0, "evaluate.every must not be negative")
        require(self.sequences >= 0, "evaluate.sequences must not be negative")
        require(self.batch_size > 0, "evaluate.batch_size must be positive")


@dataclass(frozen=True)
class GenerateConfig:
    """How text is generated."""

    max_new_tokens: int = 128
    """Tokens to generate at most."""
    temperature: float = 0.0
    """Divisor of the logits before sampling; 0 is greedy decoding."""
    top_p: float = 1.0
    """Nucleus sampling (arXiv:1904.09751): the smallest set of tokens of this total probability."""
    seed: int = 0
    """Seed of the sampling noise."""
    n: int = 1
    """Samples of each prompt."""
    stop: tuple[str, ...] = ()
    """Texts that end the generation; they are not part of the result."""
    ignore_eos: bool = False
    """Go on after an end-of-text token."""
    logprobs: bool = False
    """Return the log-probability of each token under the model, before temperature and top_p."""

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for key in ("max_new_tokens", "n"):
            value = getattr(self, key)
            require(value >= 1, f"generate.{key} {value} must be at least 1")
        require(
            0 <= self.temperature < math.inf,
            f"generate.temperature {self.temperature} must be 0 (greedy) or positive",
        )
        require(0 < self.top_p <= 1, f"generate.top_p {self.top_p} must be in (0, 1]")
        require(all(self.stop), "generate.stop has an empty text")


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
        require(
            model.max_seq_len >= self.T,
            f"train.sequence_length {self.T} is more than model.max_seq_len {model.max_seq_len}",
        )
        require(
            train.gradient_accumulation_steps > 0
            and train.batch_size % train.gradient_accumulation_steps == 0,
            f"train.batch_size {train.batch_size} is not divisible by "
            f"train.gradient_accumulation_steps {train.gradient_accumulation_steps}",
        )

    @property
    def T(self) -> int:
        """Tokens per training sequence."""
        assert self.train.sequence_length is not None
        return self.train.sequence_length


def check_mesh(config: Config, sizes: dict[str, int]) -> None:
    """Raises `InputError` unless the mesh divides the batch and the model's widths."""
    train, model = config.train, config.model
    n_shards = sizes["data"] * sizes["fsdp"]
    if train.batch_size % (n_shards * train.gradient_accumulation_steps):
        raise InputError(
            f"train.batch_size {train.batch_size} is not divisible by mesh data={sizes['data']} x "
            f"fsdp={sizes['fsdp']} x train.gradient_accumulation_steps "
            f"{train.gradient_accumulation_steps}"
        )
    for key, width in (
        ("n_kv_heads", model.G),
        ("hidden_dim", model.hidden_dim),
        ("vocab_size", model.vocab_size),
    ):
        if width % sizes["tensor"]:
            raise InputError(f"model.{key} {width} is not divisible by tensor={sizes['tensor']}")
    if config.parallel.sequence_parallel and config.T % sizes["tensor"]:
        raise InputError(
            f"parallel.sequence_parallel: {config.T} tokens are not divisible by "
            f"tensor={sizes['tensor']}"
        )
