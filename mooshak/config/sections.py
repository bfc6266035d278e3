"""Sections of the configuration: strict dataclasses, set in YAML or by `--section.key value`.

mooshak/config/parse.py builds the parser of every command from them. Their docstrings are the help
texts. An unknown key is an error that names the most similar known one.
"""

import math
import re
from collections.abc import Set
from dataclasses import dataclass, field, replace
from os.path import abspath
from typing import Literal

from mooshak.config.dpo import DPOConfig
from mooshak.config.fields import check_fields, number, path, usable_path
from mooshak.config.grpo import GRPOConfig
from mooshak.config.lora import LoraConfig, check_frozen, frozen_parameters
from mooshak.config.model import Dtype, ModelConfig
from mooshak.config.sft import SFTConfig
from mooshak.errors import require


@dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer; a SentencePiece model is trained when the file is missing."""

    path: str = path("data/demo/tokenizer.model")
    """SentencePiece model file, or a `tokenizer.json` of Hugging Face."""
    vocab_size: int = number(64128, at_least=1)
    """Tokens to train; model.vocab_size is this number, rounded up to a multiple of 64."""
    character_coverage: float = number(1.0, at_least=0.98, at_most=1)
    """Share of the characters that become tokens; the others are encoded as bytes."""
    training_bytes: int = number(200_000_000, at_least=1, at_most=2**40)
    """Maximum bytes of training text, taken from the sources by weight."""

    def __post_init__(self) -> None:
        check_fields(self, "tokenizer")


@dataclass(frozen=True)
class InitConfig:
    """Initial weights. The key is `from`, which is a keyword of Python."""

    from_: str = path("")
    """Checkpoint of any format, or Hugging Face directory, that supplies the initial weights; keys
    of model that are not given, and the tokenizer, are taken from it (empty: random weights)."""

    def __post_init__(self) -> None:
        check_fields(self, "init")


@dataclass(frozen=True)
class SourceConfig:
    """A stream of documents."""

    name: str
    """Name of the source in reports, and of its directory of token shards."""
    kind: Literal["tales", "tasks", "text", "jsonl", "parquet", "huggingface"] = "tales"
    """tales (built in), tasks (conversations about the tales), text (a document per file), jsonl,
    parquet, or huggingface (`datasets`)."""
    language: str = "en"
    """Language tag (hi, en, ...); validation is reported by language."""
    weight: float = number(1.0, above=0)
    """Weight in the training mixture, relative to the weights of the other sources."""
    path: str = ""
    """Glob of the files, name of the Hugging Face dataset, or names of tasks, separated by commas
    (tasks; empty: questions, translation and continuation)."""
    column: str = "text"
    """Field (jsonl) or column (parquet, huggingface) that holds the text."""
    subset: str | None = None
    """huggingface: configuration (`name=`) or directory (`data_dir=`) of the dataset."""
    split: str = "train"
    """huggingface: split of the dataset."""
    documents: int | None = number(None, at_least=1)
    """Maximum number of documents (null: all; tales and tasks: 1000)."""
    seed: int = number(0, at_least=-(2**63), at_most=2**63 - 1)
    """tales, tasks: seed; sources in two languages with one seed are translations of each other."""

    def __post_init__(self) -> None:
        require(
            bool(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", self.name)),
            f"data.sources name {self.name!r} (a directory) must begin with a letter or digit, "
            "then letters, digits, '_', '-' and '.'",
        )
        check_fields(self, f"data.sources[{self.name}]")
        key = f"data.sources[{self.name}].path"
        object.__setattr__(self, "path", usable_path(key, self.path))
        built_in = self.kind in ("tales", "tasks")
        require(built_in or bool(self.path), f"{key} is empty; kind {self.kind} needs one")


DataFormat = Literal["text", "conversations", "preferences", "prompts"]


@dataclass(frozen=True)
class DataConfig:
    """Text sources, token shards and batches."""

    format: DataFormat = "text"
    """text: documents, for train; conversations: records with messages, a prompt and an answer, or
    an instruction, for sft (docs/finetune.md); preferences: pairs of answers, for dpo; prompts:
    records with a prompt, for grpo (docs/align.md)."""
    dir: str = path("data/demo")
    """Directory of the token shards."""
    sources: list[SourceConfig] = field(
        default_factory=lambda: [
            SourceConfig("tales-hi", language="hi"),
            SourceConfig("tales-en", language="en"),
        ]
    )
    """Text sources, mixed by weight: objects with the keys that --data.sources.help lists."""
    normalize_nfc: bool = True
    """Normalise text to Unicode NFC (ZWJ and ZWNJ are preserved)."""
    drop_empty: bool = True
    """Drop documents without visible characters."""
    deduplicate: bool = True
    """Drop exact duplicates of documents within a source."""
    validation_fraction: float = number(0.02, at_least=0, below=1)
    """Fraction of the documents held out for validation, selected by a hash of their text."""
    max_broken_lines: int = number(100, at_least=0)
    """jsonl: invalid lines that are skipped before preparation fails."""
    shard_tokens: int = number(2**24, at_least=1)
    """Tokens per shard."""
    document_mask: bool = False
    """Restrict attention to the document of a token: positions restart at each document, and labels
    across a document boundary are ignored."""
    workers: int = number(0, at_least=0, at_most=1024)
    """Grain worker processes that prefetch batches (0: threads of the training process)."""

    def __post_init__(self) -> None:
        check_fields(self, "data")
        names = [source.name for source in self.sources]
        require(bool(names), "data.sources is empty; name at least one source")
        require(len(set(names)) == len(names), f"data.sources has a duplicate name: {names}")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (arXiv:1711.05101) and gradient clipping by the global norm."""

    learning_rate: float = number(3e-4, at_least=0)
    """Peak learning rate."""
    beta1: float = number(0.9, at_least=0, below=1)
    """Decay rate of the first moment."""
    beta2: float = number(0.95, at_least=0, below=1)
    """Decay rate of the second moment."""
    eps: float = number(1e-8, at_least=1e-30)
    """Term added to the square root of the second moment."""
    weight_decay: float = number(0.1, at_least=0)
    """Decoupled weight decay; applied to matrices, not to norm gains or biases."""
    max_grad_norm: float | None = number(1.0, at_least=0, at_most=math.inf)
    """Global norm to which larger gradients are scaled down; 0, .inf or null: no clipping."""

    def __post_init__(self) -> None:
        check_fields(self, "optimizer")
        if self.max_grad_norm in (0, math.inf):
            object.__setattr__(self, "max_grad_norm", None)


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate schedule."""

    kind: Literal["cosine", "wsd", "constant"] = "cosine"
    """cosine, wsd (warmup-stable-decay, arXiv:2404.06395) or constant, each after the warmup."""
    warmup_steps: int = number(100, at_least=0)
    """Steps of linear warmup."""
    decay_fraction: float = number(0.2, at_least=0, at_most=1)
    """wsd: fraction of the total steps, at the end, in which the rate decays."""
    min_lr_ratio: float = number(0.1, at_least=0, at_most=1)
    """Final learning rate as a fraction of the peak (cosine, wsd)."""
    total_steps: int | None = number(None, at_least=1)
    """Step at which the schedule ends (null: train.steps)."""

    def __post_init__(self) -> None:
        check_fields(self, "schedule")


@dataclass(frozen=True)
class TrainConfig:
    """Training loop, precision and memory."""

    steps: int = number(1000, at_least=1)
    """Total optimizer steps, including those before a resume."""
    batch_size: int = number(8, at_least=1)
    """Sequences per optimizer step, over all processes and micro-batches."""
    sequence_length: int | None = number(None, at_least=1)
    """Tokens per sequence (null: model.max_seq_len)."""
    gradient_accumulation_steps: int = number(1, at_least=1)
    """Micro-batches per optimizer step; their gradients are summed."""
    dtype: Dtype = "float32"
    """float64, float32, bfloat16 (matrix products in bf16; parameters, norms and loss in fp32), or
    float16 (the same with loss scaling; torch only)."""
    loss_chunk: int = number(2048, at_least=1)
    """Tokens per chunk of the loss: their logits are in memory at once."""
    remat: Literal["none", "dots", "full"] = "none"
    """Activations recomputed in the backward pass: none, all but matrix products (dots), or all
    (full)."""
    compile: bool = False
    """torch: torch.compile each layer. JAX always compiles the full step."""
    log_every: int = number(1, at_least=1)
    """Steps between lines of metrics.jsonl; the last step is always logged."""
    stop_after_step: int | None = number(None, at_least=1)
    """Save and stop after this step; the schedule does not change (null: train.steps)."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A step whose loss or gradients are not finite: end the run (stop), or leave its update out
    and go on (skip)."""

    freeze_embeddings: bool = False
    """Do not train the embedding: it has no gradient and no optimizer state."""
    freeze_layers: int = number(0, at_least=0)
    """Do not train the first layers, this many (0: none)."""

    def __post_init__(self) -> None:
        check_fields(self, "train")


@dataclass(frozen=True)
class ParallelConfig:
    """Devices, processes and sharding."""

    strategy: Literal["auto", "single", "ddp", "fsdp", "hsdp", "deepspeed"] = "auto"
    """torch: single, ddp, fsdp (FSDP2), hsdp (FSDP2 within a machine, replicated across machines),
    deepspeed (ZeRO), or auto: single without torchrun, else fsdp where the mesh has fsdp or tensor,
    else ddp. JAX: no effect, the mesh decides."""
    mesh: str = ""
    """Axes data, fsdp and tensor with their sizes, such as data=2,fsdp=-1 (-1: all remaining
    devices); short: --mesh (empty: that of the strategy; JAX: data=-1)."""
    cpu_devices: int | None = number(None, at_least=1, at_most=4096)
    """JAX on CPU: devices per process (null: as many as the mesh needs)."""
    reshard_after_forward: bool = True
    """torch, fsdp: free the gathered parameters of a layer after its forward pass, and gather them
    again in the backward pass."""
    cpu_offload: bool = False
    """torch, fsdp: store parameters, gradients and optimizer state in host memory."""
    prefetch: int = number(1, at_least=0)
    """torch, fsdp: layers gathered ahead of the layer that computes."""
    zero_stage: Literal[1, 2, 3] = 2
    """torch, deepspeed: shard the optimizer state (1), also gradients (2), also parameters (3)."""
    timeout: int = number(600, at_least=1)
    """torch: seconds after which a collective that waits for another process fails."""
    sequence_parallel: bool = False
    """torch, tensor parallelism: shard hidden states by sequence between the sharded matrices."""
    num_slices: int = number(1, at_least=1)
    """JAX: TPU slices, connected by the data-center network, that the data axis spans."""
    coordinator_address: str | None = None
    """JAX: HOST:PORT of process 0, or auto (TPU pods, Slurm) (null: one process)."""
    num_processes: int | None = number(None, at_least=1)
    """JAX: number of processes, with a coordinator_address HOST:PORT."""
    process_id: int | None = number(None, at_least=0)
    """JAX: index of this process, from 0."""

    def __post_init__(self) -> None:
        check_fields(self, "parallel")
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
    """Checkpoints of a run."""

    every: int = number(500, at_least=0)
    """Steps between checkpoints; the last step is always saved (0: only the last)."""
    keep: int = number(2, at_least=1)
    """Number of newest checkpoints to retain, in addition to the one with the lowest validation
    loss."""

    def __post_init__(self) -> None:
        check_fields(self, "checkpoint")


@dataclass(frozen=True)
class EvaluateConfig:
    """Validation on held-out text."""

    every: int = number(250, at_least=0)
    """Steps between validations (0: never)."""
    sequences: int = number(64, at_least=0)
    """Maximum validation sequences per language, spread evenly over the split (0: all)."""
    batch_size: int = number(8, at_least=1)
    """Sequences per forward pass, over all processes."""

    def __post_init__(self) -> None:
        check_fields(self, "evaluate")


@dataclass(frozen=True)
class RunConfig:
    """Run directory, seed and logging."""

    dir: str = path("runs/default")
    """Run directory: metrics, resolved configuration, checkpoints."""
    seed: int = number(0, at_least=-(2**63), at_most=2**63 - 1)
    """Seed of the initial weights and of the data order."""
    progress: bool = True
    """Show a progress bar."""
    tensorboard: bool = True
    """Write TensorBoard events."""

    def __post_init__(self) -> None:
        check_fields(self, "run")


@dataclass(frozen=True)
class Config:
    """Configuration of a run: all sections."""

    model: ModelConfig = field(default_factory=ModelConfig)
    init: InitConfig = field(default_factory=InitConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    dpo: DPOConfig = field(default_factory=DPOConfig)
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        train, model = self.train, self.model
        if self.lora.rank:
            model = replace(model, lora=self.lora)
            object.__setattr__(self, "model", model)
        elif model.lora is not None:  # Of the checkpoint `init.from`.
            object.__setattr__(self, "lora", model.lora)
        check_frozen(
            model.lora,
            train.freeze_embeddings,
            train.freeze_layers,
            model.n_layers,
            model.scan_layers,
        )
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
            train.batch_size % train.gradient_accumulation_steps == 0,
            f"train.batch_size {train.batch_size} is not divisible by "
            f"train.gradient_accumulation_steps {train.gradient_accumulation_steps}",
        )

    @property
    def frozen(self) -> Set[str]:
        """Canonical names of the parameters that are not trained."""
        train, model = self.train, self.model
        shapes = model.parameter_shapes()
        return frozen_parameters(shapes, model.lora, train.freeze_embeddings, train.freeze_layers)

    @property
    def T(self) -> int:
        """Tokens per training sequence."""
        assert self.train.sequence_length is not None
        return self.train.sequence_length


def with_absolute_paths(config: Config) -> Config:
    """Return the configuration for another working directory: its paths are absolute."""
    sources = [
        source
        if source.kind in ("tales", "tasks", "huggingface")
        else replace(source, path=abspath(source.path))
        for source in config.data.sources
    ]
    return replace(
        config,
        tokenizer=replace(config.tokenizer, path=abspath(config.tokenizer.path)),
        init=replace(config.init, from_=config.init.from_ and abspath(config.init.from_)),
        data=replace(config.data, dir=abspath(config.data.dir), sources=sources),
        run=replace(config.run, dir=abspath(config.run.dir)),
    )


def with_format(config: Config, format: DataFormat) -> Config:
    """Return the configuration of a command whose data have this format."""
    return replace(config, data=replace(config.data, format=format))
