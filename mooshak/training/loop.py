"""The training loop of both frameworks: schedule, metrics, validation, saves, signals, resume.

A framework supplies a `Trainer`; the objective defines what a step minimises.
"""

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mooshak.checkpoints.adapters import check_live_reference
from mooshak.checkpoints.base import Checkpoint
from mooshak.checkpoints.formats import Processes, ensure_readable_format
from mooshak.checkpoints.manager import CheckpointManager, complete_steps, newest_checkpoint
from mooshak.checkpoints.resume import check_resume, rate_change, resume_from, trainer_state
from mooshak.checkpoints.together import fail_together
from mooshak.config.sections import Config
from mooshak.data.packing import Batch
from mooshak.data.preference_batches import PreferenceData
from mooshak.data.prompt_batches import PromptData
from mooshak.data.training_data import TrainingData, open_training_data
from mooshak.errors import InputError
from mooshak.evaluation.bits_per_byte import validation_metrics
from mooshak.evaluation.preferences import preference_metrics
from mooshak.numerics.schedule import learning_rate
from mooshak.tokenizer.base import Tokenizer
from mooshak.training.agreement import check_agreement
from mooshak.training.malloc import WARMUP_STEPS, retain_freed_memory
from mooshak.training.metrics import RunLog, stop_request
from mooshak.training.nonfinite import NonFiniteSteps, check_state
from mooshak.training.rollouts import Rollouts
from mooshak.training.run_lock import own_run

PROFILED_STEP = 3
"""The step, counted from where the run starts, that `--profile` traces."""


class Trainer(Protocol):
    """The interface of a framework to the loop: training state, steps, checkpoints."""

    framework: str
    """torch or jax."""

    @property
    def processes(self) -> Processes:
        """The processes of the run; each holds its own `Trainer`."""
        ...

    @property
    def world_size(self) -> int:
        """Number of processes."""
        ...

    @property
    def n_devices(self) -> int:
        """Number of devices, over all processes."""
        ...

    @property
    def device(self) -> str:
        """Name of the device, as the driver reports it."""
        ...

    @property
    def layout(self) -> str:
        """The mesh in the notation of `--mesh`."""
        ...

    @property
    def rows(self) -> Sequence[int]:
        """The rows of the global batch that this process reads."""
        ...

    def initialize(self, tokenizer: Tokenizer) -> None:
        """Initialise the state before the first step."""
        ...

    def open_checkpoint(self, path: Path) -> Checkpoint:
        """Open a checkpoint in a format that this framework reads."""
        ...

    def restore(self, source: Checkpoint) -> None:
        """Restore the state of a training checkpoint."""
        ...

    def step(
        self, batch: Batch, rate: float, stop: Callable[[], bool]
    ) -> tuple[dict[str, float], bool]:
        """Take one optimizer step on this process's rows.

        Returns `loss` (mean over the global batch), `grad_norm` (before clipping) and other
        metrics, and whether `stop`, called after the step, is true in any process.
        """
        ...

    def evaluate(self, batch: Batch) -> dict[str, float]:
        """Return sums over a batch that every process has in full: `loss` and the metrics."""
        ...

    def load_reference(self, tokenizer: Tokenizer) -> None:
        """Load the initial weights as a frozen model: the reference of pairs or samples.

        `step` and `evaluate` then compute its log-probabilities; adapters are turned off instead.
        """
        ...

    def reference_log_probs(self, batch: Batch) -> Any:
        """Return the log-probability [B, S] of each segment of a batch of preference pairs.

        That of the reference if it is loaded, else of the model. Every process has the batch in
        full.
        """
        ...

    def token_log_probs(self, batch: Batch) -> Any:
        """Return the log-probability [B, T] of each label of sampled answers.

        Every process has the batch in full.
        """
        ...

    def gather_weights(self) -> Checkpoint:
        """Return the current weights, complete in the first process; a collective."""
        ...

    def start_saving(self, path: Path) -> Callable[[], None]:
        """Start writing a snapshot to `path`; return a function that waits until it is written."""
        ...

    def find_nonfinite(self) -> str:
        """Return a tensor of this process's state that is not finite, or an empty text."""
        ...

    def trainer_state(self) -> dict[str, Any]:
        """Return additional entries of `trainer_state.json`."""
        ...

    def peak_memory(self) -> dict[str, float]:
        """Return `memory_bytes`: the peak memory of the device, or of this process on a CPU."""
        ...

    def profiled(self, directory: Path) -> contextlib.AbstractContextManager[Any]:
        """Profile the block; the trace is written to a directory."""
        ...

    def explain_timeouts(self) -> contextlib.AbstractContextManager[None]:
        """Turn a failed wait for other processes inside the block into a `PeerError`."""
        ...

    def close(self) -> None:
        """Leave the process group."""
        ...


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add --resume and --profile, options of every `train` command."""
    text = "auto (newest complete checkpoint of the run, of either framework), never, or a path"
    parser.add_argument("--resume", default="auto", metavar="WHERE", help=text)
    text = "trace the third step of this process into RUN/profile"
    parser.add_argument("--profile", action="store_true", help=text)
    text = "resume with data other than those of the checkpoint: the order of the data changes"
    parser.add_argument("--allow_data_change", action="store_true", help=text)


def train(
    config: Config,
    trainer: Trainer,
    resume: str = "auto",
    profile: bool = False,
    allow_data_change: bool = False,
) -> None:
    """Train up to `train.steps`, `train.stop_after_step`, or a signal.

    `resume` is auto, never, or the path of a checkpoint; `profile` traces the third step from the
    start into RUN/profile; with `allow_data_change` a run resumes with other data. Raises
    `InputError` if the run cannot start, a save fails or a number is not finite, `PeerError` if
    another process failed.
    """
    with own_run(Path(config.run.dir), trainer.processes):
        with fail_together(trainer.processes):
            data = open_training_data(config)
        check_agreement(trainer.processes, config, data.description)
        if data.summary and trainer.processes.is_main:
            print(data.summary, file=sys.stderr)
        first = start(config, trainer, data.tokenizer, resume, data.description, allow_data_change)
        if isinstance(data, PreferenceData) and config.dpo.has_reference:
            _set_reference(config, trainer, data, first)
        if isinstance(data, PromptData):
            data.sampler = Rollouts(config, trainer, data, first)
            if config.grpo.beta:
                _load_reference(config, trainer, data.tokenizer, first)
        step = _run(config, trainer, data, first, profile)
    if trainer.processes.is_main:
        saved = Path(config.run.dir) / "checkpoints"
        if step < min(config.train.steps, config.train.stop_after_step or config.train.steps):
            print(f"stopped after step {step}, saved; the same command resumes (--resume auto)")
        elif step in complete_steps(saved):
            print(f"step {step} of {config.train.steps} done: {saved / str(step)}")
        else:
            print(
                f"step {step} of {config.train.steps} done: no step was left, and no checkpoint is "
                "saved"
            )


def _set_reference(config: Config, trainer: Trainer, data: PreferenceData, first: int) -> None:
    """Give the pairs their reference: log-probabilities computed once, or a model in memory."""
    is_main = trainer.processes.is_main
    if config.dpo.precompute_reference:
        data.load_reference(is_main, first, trainer.reference_log_probs)
        return
    _load_reference(config, trainer, data.tokenizer, first)
    data.check_reference(is_main, first, trainer.reference_log_probs)


def _load_reference(config: Config, trainer: Trainer, tokenizer: Tokenizer, first: int) -> None:
    """Load the initial weights as the live reference."""
    with fail_together(trainer.processes):
        check_live_reference(config, first)
    trainer.load_reference(tokenizer)


def _validate(
    trainer: Trainer, data: TrainingData, validation: Mapping[str, Batch], token_bytes_V: np.ndarray
) -> dict[str, float]:
    """Return the metrics of the validation rows, or of answers to held-out prompts."""
    if isinstance(data, PromptData):
        return data.sampler.validate()
    if not validation:
        return {}
    if isinstance(data, PreferenceData):
        return preference_metrics(trainer.evaluate, validation)
    return validation_metrics(
        lambda batch: trainer.evaluate(batch)["loss"], validation, token_bytes_V
    )


def _run(config: Config, trainer: Trainer, data: TrainingData, first: int, profile: bool) -> int:
    """Take the steps after step `first`, and save; return the number of steps done."""
    validation, batches = _open_data(config, trainer, data, first)
    token_bytes_V = data.tokenizer.token_bytes()
    step, last = first, min(config.train.steps, config.train.stop_after_step or config.train.steps)
    is_main, stopped = trainer.processes.is_main, False
    nonfinite = NonFiniteSteps(config, is_main)
    # Outermost: when one process has ended, launchers send SIGTERM to those that are closing.
    with (
        stop_request() as stop,
        contextlib.closing(trainer),
        contextlib.closing(RunLog(config, step, is_main, trainer.device, trainer.n_devices)) as log,
        trainer.explain_timeouts(),
        CheckpointManager(config, trainer.processes) as manager,
    ):
        while step < last and not stopped:
            began, rate, batch = time.perf_counter(), learning_rate(config, step), next(batches)
            traced = profile and is_main and step - first == PROFILED_STEP - 1
            trace = trainer.profiled(Path(config.run.dir) / "profile") if traced else None
            with trace or contextlib.nullcontext():
                # The flag is read after the step: a signal during it must not cost another step.
                measured, stopped = trainer.step(
                    batch, rate, lambda: stop.is_set() or manager.failed
                )
            if stopped:
                manager.raise_failure()
            step += 1
            if step - first == WARMUP_STEPS:
                retain_freed_memory()
            metrics = {"loss": measured.pop("loss"), "learning_rate": rate, **measured}
            metrics |= data.metrics if isinstance(data, PromptData) else {}
            metrics |= trainer.peak_memory()
            seconds = time.perf_counter() - began
            if config.evaluate.every and _is_due(step, last, config.evaluate.every):
                metrics |= _validate(trainer, data, validation, token_bytes_V)
            reason = nonfinite.check(step, metrics)
            if reason or _is_due(step, last, config.train.log_every):
                with manager.defer_failure(f"step {step} could not be logged"):
                    log.log(step, seconds, metrics)
            if reason:
                manager.finish()
                raise InputError(f"{reason} ({saved_text(config)})")
            if stopped or _is_due(step, last, config.checkpoint.every):
                check_state(step, trainer.processes.gather(trainer.find_nonfinite()))
                loss = metrics.get("validation_loss")
                state = describe_state(config, trainer, data, step, loss)
                manager.save(state, trainer.start_saving)
                log.flush()
        manager.finish()
    return step


def _open_data(
    config: Config, trainer: Trainer, data: TrainingData, first: int
) -> tuple[dict[str, Batch], Iterator[Batch]]:
    """Return the validation sequences by language, and this process's rows after step `first`."""
    with fail_together(trainer.processes):
        validation = data.validation() if config.evaluate.every else {}
        return validation, data.batches(trainer.rows, first)


def _is_due(step: int, last: int, every: int) -> bool:
    """Return whether a step is the last one, or one of every so many (0: only the last)."""
    return step == last or (every > 0 and step % every == 0)


def saved_text(config: Config) -> str:
    """Return what to say of the newest checkpoint of a run."""
    path = newest_checkpoint(Path(config.run.dir))
    return "no checkpoint is saved" if path is None else f"the last checkpoint is {path}"


def describe_state(
    config: Config,
    trainer: Trainer,
    data: TrainingData,
    step: int,
    validation_loss: float | None,
) -> dict[str, Any]:
    """Return the contents of `trainer_state.json`."""
    common = trainer_state(
        config,
        step,
        trainer.framework,
        data.tokenizer.fingerprint,
        validation_loss,
        trainer.world_size,
        trainer.layout,
        data.description,
    )
    return common | trainer.trainer_state()


def start(
    config: Config,
    trainer: Trainer,
    tokenizer: Tokenizer,
    resume: str,
    shards: Mapping[str, Any],
    allow_data_change: bool = False,
) -> int:
    """Initialise or restore the trainer; return the number of steps done."""
    path = resume_from(config, resume)
    if path is None:
        trainer.initialize(tokenizer)
        return 0
    with ensure_readable_format(path, trainer.framework, trainer.processes) as readable:
        source = trainer.open_checkpoint(readable)
        step = check_resume(config, source, tokenizer.fingerprint, shards, allow_data_change)
        trainer.restore(source)
    if trainer.processes.is_main and (change := rate_change(config, source.trainer_state)):
        print(change, file=sys.stderr)
    return step
