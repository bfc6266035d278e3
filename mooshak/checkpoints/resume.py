"""Resume a run: find the checkpoint, check that it fits, and describe the training state."""

from collections.abc import Collection, Mapping
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
    """Return the checkpoint that a run resumes from, or None for a start from step 0.

    `resume` is auto (the newest complete one in the run directory), never, or a path. Raises
    `InputError` if the run directory has later checkpoints, which would be mixed with those of this
    run.
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
    validated: tuple[int, float] | None,
    processes: int = 1,
    mesh: str = "",
) -> dict[str, Any]:
    """Return the content of `trainer_state.json` after `step` optimizer steps.

    `validated` is the step of the last validation and its loss. `processes` and `mesh` record how
    the state was written; it can be read with any others.
    """
    validation_step, loss = validated or (None, None)
    return {
        "format_version": base.FORMAT_VERSION,
        "step": step,
        "seed": config.run.seed,
        "written_by": {"framework": framework, "processes": processes, "mesh": mesh},
        "dtype": config.train.dtype,
        "schedule": asdict(config.schedule),
        "optimizer": asdict(config.optimizer),
        "data": _data(config, tokenizer),
        "normalize_nfc": config.data.normalize_nfc,
        "validation_loss": loss,
        "validation_step": validation_step,
    }


def n_updates(state: Mapping[str, Any]) -> int:
    """Return the updates of the moments in a training state: steps, without those skipped.

    A float16 run skips a step whose gradients are not finite. AdamW's bias correction needs this
    count, also where the run is resumed in another dtype or framework.
    """
    skipped = loss_scale_of(state).get("loss_scale", {}).get("skipped", 0)
    return int(state["step"]) - int(skipped)


def loss_scale_of(state: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the entry `loss_scale` of a training state, which later states retain; {} if none."""
    return {"loss_scale": state["loss_scale"]} if state and "loss_scale" in state else {}


def check_resume(
    config: Config, source: base.Checkpoint, tokenizer: str
) -> tuple[int, tuple[int, float] | None]:
    """Return the number of steps done; the step of the last validation and its loss, or None.

    Raises `InputError` if the model, the data or the seed differ from those of the checkpoint.
    """
    path, state = source.path, source.trainer_state
    check_model(path, source.model, config)
    if state is None or not source.has_optimizer:
        raise InputError(f"{path} has only weights; a run resumes from a training state")
    defaults = {"document_mask": False}
    present = {"seed": config.run.seed, **defaults, **_data(config, tokenizer)}
    past = {"seed": state.get("seed"), **defaults, **(state.get("data") or {})}
    for key, value in present.items():
        if past.get(key) != value:
            raise InputError(
                f"{path} was written with {key} {past.get(key)}, this run has {value}; the step is "
                "the position in the data only if they are equal"
            )
    if state["step"] > config.train.steps:
        raise InputError(
            f"{path} is at step {state['step']}, after train.steps {config.train.steps}"
        )
    step, loss = state["step"], state.get("validation_loss")
    return step, None if loss is None else (state.get("validation_step", step), loss)


def check_model(
    path: Path, model: ModelConfig, config: Config, ignored: Collection[str] = ()
) -> None:
    """Raise `InputError` unless the `model` of a checkpoint is that of the configuration.

    Keys in `ignored` may differ.
    """
    there, here = model_description(model), model_description(config.model)
    for key, value in here.items():
        if there[key] != value and key not in ignored:
            raise InputError(
                f"{path} is a checkpoint of another model: its {key} is {there[key]}, "
                f"the configuration's is {value}"
            )


def _data(config: Config, tokenizer: str) -> dict[str, Any]:
    # Only if true: states written before the key existed compare equal.
    mask = {"document_mask": True} if config.data.document_mask else {}
    return {
        "sources": [asdict(source) for source in config.data.sources],
        "batch_size": config.train.batch_size,
        "sequence_length": config.T,
        "validation_fraction": config.data.validation_fraction,
        "tokenizer": tokenizer,
        **mask,
    }
