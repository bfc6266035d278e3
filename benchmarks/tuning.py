"""Fine-tuning and preferences: our trainers, and TRL's on the same model and data.

A repetition is one epoch over conversations of unequal lengths, made of ASCII letters that a
byte-level tokenizer encodes as one token each. Ours packs them, TRL pads each batch.
"""

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from benchmarks.case import Size, config, spread, tuned_tokens
from benchmarks.worker import Repeat, temporary_directory
from mooshak.config.lora import LoraConfig
from mooshak.config.sections import Config, DataConfig, RunConfig, SourceConfig, TokenizerConfig
from mooshak.data.conversation_batches import ConversationData
from mooshak.data.packing import Batch
from mooshak.data.preference_batches import PreferenceData
from mooshak.training import loop
from mooshak.training.malloc import retain_freed_memory, use_single_arena

LORA_ALPHA = 32
SPECIALS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


def torch_trainer(size: Size) -> Repeat:
    """Time an epoch of our trainer in PyTorch."""
    from mooshak_torch.step import Trainer

    return _epochs(size, Trainer)


def jax_trainer(size: Size) -> Repeat:
    """Time an epoch of our trainer in JAX."""
    from mooshak_jax.step import Trainer

    return _epochs(size, Trainer)


def trl_trainer(size: Size) -> Repeat:
    """Time an epoch of TRL's SFTTrainer or DPOTrainer on transformers' Llama, of PEFT with LoRA."""
    from datasets import Dataset
    from peft import LoraConfig as PeftConfig
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    from benchmarks.torch_models import DEVICE, hf_llama

    directory = temporary_directory()
    write_tokenizer(directory)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(directory / "tokenizer.json"), **SPECIALS
    )
    is_dpo = size["format"] == "preferences"
    settings: dict[str, Any] = {
        "output_dir": str(directory),
        "per_device_train_batch_size": size["conversations_per_step"],
        "num_train_epochs": 1,
        "max_length": size["sequence_length"],
        "learning_rate": 1e-5,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": DEVICE.type == "cpu",
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }
    if is_dpo:
        # As ours: no second model computes in the steps.
        settings |= {"precompute_ref_log_probs": True, "beta": 0.1}
    kinds: Any = (DPOTrainer, DPOConfig) if is_dpo else (SFTTrainer, SFTConfig)
    trainer = kinds[0](
        model=hf_llama(size),
        args=kinds[1](**settings),
        train_dataset=Dataset.from_list(records(size)),
        processing_class=tokenizer,
        peft_config=size.get("lora_rank")
        and PeftConfig(
            r=size["lora_rank"],
            lora_alpha=LORA_ALPHA,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
    )

    def repeat() -> float:
        start = time.perf_counter()
        trainer.train()
        return time.perf_counter() - start

    repeat()
    return repeat


def records(size: Size) -> list[dict[str, str]]:
    """Return prompts with completions, or pairs of these, of unequal lengths in a fixed order."""
    random, n = np.random.default_rng(0), size["conversations"]
    fields = {"prompt": "prompt", "completion": "completion"}
    if size["format"] == "preferences":
        fields = {"prompt": "prompt", "chosen": "completion", "rejected": "completion"}
    columns = {
        name: [_letters(random, length) for length in random.permutation(spread(size[of], n))]
        for name, of in fields.items()
    }
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _letters(random: np.random.Generator, length: int) -> str:
    return random.integers(97, 123, length, dtype=np.uint8).tobytes().decode()


def write_tokenizer(directory: Path) -> None:
    """Write a byte-level tokenizer without merges."""
    tokens = [*SPECIALS.values(), *sorted(pre_tokenizers.ByteLevel.alphabet())]
    made = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(list(SPECIALS.values()))
    made.save(str(directory / "tokenizer.json"))
    names = json.dumps(SPECIALS | {"tokenizer_class": "PreTrainedTokenizerFast"})
    (directory / "tokenizer_config.json").write_text(names, "utf-8")


def tuning_config(size: Size, directory: Path) -> Config:
    """Return the configuration of our run, whose data and tokenizer are written to `directory`."""
    write_tokenizer(directory)
    lines = map(json.dumps, records(size))
    (directory / "data.jsonl").write_text("\n".join(lines), "utf-8")
    source = SourceConfig("all", kind="jsonl", path=str(directory / "data.jsonl"))
    return replace(
        config(size),
        tokenizer=TokenizerConfig(path=str(directory / "tokenizer.json")),
        data=DataConfig(format=size["format"], sources=[source], validation_fraction=0.0),
        lora=LoraConfig(rank=size.get("lora_rank", 0), alpha=LORA_ALPHA),
        run=RunConfig(dir=str(directory / "run")),
    )


def _epochs(size: Size, make_trainer: Callable[[Config], loop.Trainer]) -> Repeat:
    """Time our steps on as many rows as an epoch has; the time of an epoch is scaled from it."""
    use_single_arena()  # As the trainer's command does.
    directory = temporary_directory()
    run = tuning_config(size, directory)
    trainer = make_trainer(run)
    is_dpo = size["format"] == "preferences"
    data: Any = PreferenceData(run) if is_dpo else ConversationData(run)
    trainer.initialize(data.tokenizer)
    if is_dpo:
        data.load_reference(True, 0, trainer.reference_log_probs)
    steps = math.ceil(len(data.plan.packed) / run.train.batch_size)
    batches: Iterator[Batch[np.ndarray]] = data.batches(trainer.rows, 0)
    total = tuned_tokens(size)

    def repeat() -> float:
        start, done = time.perf_counter(), 0
        for _ in range(steps):
            batch = next(batches)
            trainer.step(batch, 1e-5, lambda: False)
            # A row has the tokens of a sequence but for its last one.
            done += _real_tokens(batch)
        return (time.perf_counter() - start) * total / done

    repeat()
    retain_freed_memory()
    return repeat


def _real_tokens(batch: Batch[np.ndarray]) -> int:
    assert batch.segments is not None
    return int((batch.segments > 0).sum() + batch.segments.max(axis=1).sum())
