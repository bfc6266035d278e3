"""Resume a run: which checkpoint, what `trainer_state.json` holds, and whether it fits."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from mooshak.checkpoints import base
from mooshak.checkpoints.formats import detect_format
from mooshak.checkpoints.manager import complete_steps
from mooshak.config.model import ModelConfig, model_description
from mooshak.config.sections import Config
from mooshak.errors import InputError


def resume_from(config: Config, resume: str) -> Path | None:
    """The checkpoint that a run continues from, or None for a start from the beginning.

    `resume` is auto (the newest complete one in the run directory), never, or a path. A run
    directory with later checkpoints than that is refused: they would be mistaken for this run's.
    """
    directory = Path(config.run.dir) / "checkpoints"
    steps = complete_steps(directory)
    if resume == "auto":
        return directory / str(steps[-1]) if steps else None
    path = None if resume == "never" else Path(resume)
    if path is not None:
        detect_format(path)
    state = None if path is None else base.read_trainer_state(path)
    start = 0 if state is None else state["step"]
    if steps and steps[-1] > start:
        raise InputError(
            f"{config.run.dir} holds checkpoints up to step {steps[-1]}; continue them with "
            "--resume auto or choose another --run.dir"
        )
    return path


def trainer_state(
    config: Config,
    step: int,
    framework: str,
    tokenizer: str,
    loss: float | None,
    processes: int = 1,
    mesh: str = "",
) -> dict[str, Any]:
    """What `trainer_state.json` holds: `step` optimizer steps done, `loss` that of validation.

    `processes` and `mesh` say what the state was written by; they bind nobody who reads it.
    """
    return {
        "format_version": base.FORMAT_VERSION,
        "step": step,
        "seed": config.run.seed,
        "written_by": {"framework": framework, "processes": processes, "mesh": mesh},
        "dtype": config.train.dtype,
        "schedule": asdict(config.schedule),
        "optimizer": asdict(config.optimizer),
        "data": _data(config, tokenizer),
        "validation_loss": loss,
    }


def check_resume(
    config: Config, source: base.Checkpoint, tokenizer: str
) -> tuple[int, float | None]:
    """The step to continue at, and the last validation loss if there was one.

    Raises `InputError` where the run would not be the same run.
    """
    path, state = source.path, source.trainer_state
    check_model(path, source.model, config)
    if state is None or not source.has_optimizer:
        raise InputError(f"{path} has only weights; a run continues from a training state")
    unless_said = {"document_mask": False}
    present = {"seed": config.run.seed, **unless_said, **_data(config, tokenizer)}
    past = {"seed": state.get("seed"), **unless_said, **(state.get("data") or {})}
    for key, value in present.items():
        if past.get(key) != value:
            raise InputError(
                f"{path} was made with {key} {past.get(key)}, this run has {value}; the position "
                "in the data is the step only while these stay the same"
            )
    if state["step"] > config.train.steps:
        raise InputError(
            f"{path} is at step {state['step']}, after train.steps {config.train.steps}"
        )
    return state["step"], state.get("validation_loss")


def check_model(path: Path, model: ModelConfig, config: Config) -> None:
    """Raises `InputError` unless the `model` of a checkpoint is the configuration's."""
    there, here = model_description(model), model_description(config.model)
    for key, value in here.items():
        if there[key] != value:
            raise InputError(
                f"{path} is a checkpoint of another model: its {key} is {there[key]}, "
                f"the configuration's is {value}"
            )


def _data(config: Config, tokenizer: str) -> dict[str, Any]:
    # Only where it is true: states written before the key existed stay equal.
    mask = {"document_mask": True} if config.data.document_mask else {}
    return {
        "sources": [asdict(source) for source in config.data.sources],
        "batch_size": config.train.batch_size,
        "sequence_length": config.T,
        "validation_fraction": config.data.validation_fraction,
        "tokenizer": tokenizer,
        **mask,
    }
