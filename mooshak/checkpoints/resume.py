"""Resume a run: find the checkpoint, check that it fits, and describe the training state."""

from collections.abc import Collection, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mooshak.checkpoints import base
from mooshak.checkpoints.formats import detect_format
from mooshak.checkpoints.manager import complete_steps
from mooshak.config import renamed
from mooshak.config.lora import frozen_parameters
from mooshak.config.model import ModelConfig, model_description
from mooshak.config.sections import Config, OptimizerConfig, ScheduleConfig
from mooshak.errors import InputError
from mooshak.numerics.schedule import learning_rate
from mooshak.tokenizer.base import Tokenizer


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
    validation_loss: float | None,
    processes: int = 1,
    mesh: str = "",
    shards: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the content of `trainer_state.json` after `step` optimizer steps.

    `validation_loss` is that of this step, None if it was not measured. `processes` and `mesh`
    record how the state was written; it can be read with any others. `shards` has the description
    of each source's tokens.
    """
    freeze = {"embeddings": config.train.freeze_embeddings, "layers": config.train.freeze_layers}
    return {
        "format_version": base.FORMAT_VERSION,
        "step": step,
        "seed": config.run.seed,
        "written_by": {"framework": framework, "processes": processes, "mesh": mesh},
        "dtype": config.train.dtype,
        **({"freeze": freeze} if any(freeze.values()) else {}),
        "schedule": asdict(config.schedule),
        "optimizer": asdict(config.optimizer),
        "data": _data(config, tokenizer, shards),
        "normalize_nfc": config.data.normalize_nfc,
        "validation_loss": validation_loss,
        "validation_step": None if validation_loss is None else step,
    }


def n_updates(state: Mapping[str, Any]) -> int:
    """Return the updates of the moments in a training state: steps, without those skipped.

    A float16 run skips a step whose gradients are not finite, and so does any run with
    `train.on_nonfinite` skip. AdamW's bias correction needs this count, also where the run is
    resumed in another dtype or framework.
    """
    skipped = loss_scale_of(state).get("loss_scale", {}).get("skipped", 0)
    return int(state["step"]) - int(skipped) - skipped_steps(state)


def skipped_steps(state: Mapping[str, Any] | None) -> int:
    """Return the steps that `train.on_nonfinite` has left out of a training state."""
    return int((state or {}).get("skipped_steps", 0))


def loss_scale_of(state: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the entry `loss_scale` of a training state, which later states retain; {} if none."""
    return {"loss_scale": state["loss_scale"]} if state and "loss_scale" in state else {}


def check_resume(
    config: Config,
    source: base.Checkpoint,
    tokenizer: str,
    shards: Mapping[str, Any] | None = None,
    allow_data_change: bool = False,
) -> int:
    """Return the number of steps done.

    Raises `InputError` if the model, the data or the seed differ from those of the checkpoint. With
    `allow_data_change`, the text may: sources, cleaning, division.
    """
    path, state = source.path, source.trainer_state
    check_model(path, source.model, config)
    if state is None or not source.has_optimizer:
        raise InputError(f"{path} has only weights; a run resumes from a training state")
    defaults = {"document_mask": False}
    present = {"seed": config.run.seed, **defaults, **_data(config, tokenizer, shards)}
    past = {"seed": state.get("seed"), **defaults, **(state.get("data") or {})}
    for key, value in present.items():
        # Older versions did not record all keys.
        if past.get(key) == value or (key in OF_TEXT and key not in past):
            continue
        may_change = key in OF_TEXT and key != "tokenizer"
        if may_change and allow_data_change:
            continue
        if difference := _difference(key, past.get(key), value):
            how = "; --allow_data_change resumes deliberately" if may_change else ""
            raise InputError(
                f"{path} was written with {difference}; the step is the position in the data only "
                f"if they are equal{how}"
            )
    frozen = frozen_parameters(
        source.model.parameter_shapes(), source.model.lora, **state.get("freeze", {})
    )
    if changed := sorted(frozen ^ config.frozen):
        raise InputError(
            f"{path} was written by a run that {'froze' if changed[0] in frozen else 'trained'} "
            f"{changed[0]}, and this one does not; start a new run with --init.from"
        )
    if state["step"] > config.train.steps:
        raise InputError(
            f"{path} is at step {state['step']}, after train.steps {config.train.steps}"
        )
    return int(state["step"])


OF_TEXT = ("sources", "validation_fraction", "document_mask", "cleaning", "shards")
"""Entries of `data` in a training state that describe the text and its division."""


def _difference(key: str, past: Any, present: Any) -> str:
    """Return how an entry of `data` differs, in a few words; empty if it does not matter."""
    if key == "shards":
        return _shards_difference(past, present)
    if key == "sources" and isinstance(past, list):
        names = [[source.get("name") for source in sources] for sources in (past, present)]
        if names[0] != names[1]:
            return f"data.sources {', '.join(names[0])}, this run has {', '.join(names[1])}"
        for old, new in zip(past, present, strict=True):
            for name, value in new.items():
                if old.get(name) != value:
                    at = f"{name} of data.sources[{new['name']}]"
                    return f"{at} {old.get(name)}, this run has {value}"
        return ""
    if isinstance(past, Mapping) and isinstance(present, Mapping):
        for name, value in present.items():
            if past.get(name) != value:
                return f"data.{name} {past.get(name)}, this run has {value}"
        return ""
    return f"{key} {past}, this run has {present}"


def _shards_difference(
    past: Mapping[str, Mapping[str, Any]], present: Mapping[str, Mapping[str, Any]]
) -> str:
    for name, new in present.items():
        old = past.get(name, {})
        counts = [
            f"{one.get('documents')} documents ({one.get('tokens')} tokens)" for one in (old, new)
        ]
        if counts[0] != counts[1]:
            return f"{counts[0]} of source {name}, this run has {counts[1]}"
        # Checksums are those of files, whose size is data.shard_tokens.
        if old.get("shard_tokens") == new["shard_tokens"] and old.get("sha256") != new["sha256"]:
            return f"other text of source {name}, whose tokens have another checksum"
    return ""


def rate_change(config: Config, state: Mapping[str, Any] | None) -> str:
    """Return a line that says how the learning rate of the next step has changed, or nothing.

    The schedule ends at `schedule.total_steps`, by default `train.steps`: more steps stretch it.
    """
    if state is None or "schedule" not in state:
        return ""
    sections = renamed.translate({key: state.get(key) or {} for key in ("schedule", "optimizer")})
    try:
        old = replace(
            config,
            schedule=ScheduleConfig(**sections["schedule"]),
            optimizer=OptimizerConfig(**sections["optimizer"]),
        )
    except (TypeError, InputError):  # Of a version with other keys.
        return ""
    step = state["step"]
    rates = [learning_rate(one, step) for one in (old, config)]
    if step >= config.train.steps or rates[0] == rates[1]:
        return ""
    before, now = old.schedule.total_steps, config.schedule.total_steps
    cause = "the schedule or the peak is another"
    if before != now:
        cause = (
            f"schedule.total_steps was {before} and is {now} (--schedule.total_steps {before} "
            "restores it)"
        )
    return f"the learning rate of step {step + 1} is {rates[1]:.3g}, not {rates[0]:.3g}: {cause}"


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


def check_tokenizer(path: Path, tokenizer: Tokenizer) -> None:
    """Raise `InputError` if the checkpoint `path` was trained with another tokenizer.

    A checkpoint without a training state does not say which.
    """
    known = ((base.read_trainer_state(path) or {}).get("data") or {}).get("tokenizer")
    if known is None or known == tokenizer.fingerprint:
        return
    raise InputError(
        f"{path} was trained with another tokenizer than {tokenizer.path}: its fingerprint is "
        f"{known[:12]}, that of the file {tokenizer.fingerprint[:12]}"
    )


def _data(
    config: Config, tokenizer: str, shards: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    data = config.data
    # Only if true: states written before the key existed compare equal.
    mask = {"document_mask": True} if data.document_mask else {}
    cleaning = ("normalize_nfc", "drop_empty", "deduplicate")
    return {
        "sources": [asdict(source) for source in data.sources],
        "batch_size": config.train.batch_size,
        "sequence_length": config.T,
        "validation_fraction": data.validation_fraction,
        "tokenizer": tokenizer,
        "cleaning": {key: getattr(data, key) for key in cleaning},
        **mask,
        **({} if shards is None else {"shards": dict(shards)}),
    }
