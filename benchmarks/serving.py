"""Workloads of decoding: requests of unequal lengths, tales, a checkpoint with a tokenizer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from benchmarks.case import Size, config, spread
from benchmarks.worker import Repeat, timed
from mooshak.checkpoints.base import FULL_SLICE, Checkpoint
from mooshak.config.generate import GenerateConfig
from mooshak.corpus.tales import tale
from mooshak.generation.lm import LM
from mooshak.numerics.init_weights import initial_weight
from mooshak.serving.engine import Engine
from mooshak.serving.scheduler import Scheduler
from mooshak.tokenizer.sentencepiece import parse_proto


def make_requests(size: Size) -> list[tuple[list[int], int]]:
    """Return prompts of random tokens, and their numbers of new tokens."""
    generator, n = np.random.default_rng(0), size["batch_size"]
    new = generator.permutation(spread(size["new_tokens"], n)).tolist()
    prompts = (generator.integers(0, size["vocab_size"], n) for n in spread(size["prompt"], n))
    return [(ids.tolist(), n_new) for ids, n_new in zip(prompts, new, strict=True)]


def engine_options(size: Size) -> dict[str, Any]:
    """Return the arguments of an engine with a slot for each request."""
    longest = max(len(prompt) + n_new for prompt, n_new in make_requests(size))
    return {"n_slots": size["batch_size"], "max_len": longest, "chunk": size["chunk"]}


def serve(lm: LM, engine: Engine, size: Size) -> Repeat:
    """Time greedy decoding of the requests in an engine."""
    scheduler = Scheduler(lm, engine)
    prompts, new = zip(*make_requests(size), strict=True)
    settings = [GenerateConfig(max_new_tokens=n_new, ignore_eos=True) for n_new in new]

    def work() -> None:
        scheduler.generate(prompts, settings)

    work()
    return lambda: timed(work)


def load_pair(size: Size, load: Callable[[Path], LM], make: Callable[[Size], LM]) -> tuple[LM, LM]:
    """Return a trained model and its draft; if the size names none, a random model as both."""
    if "checkpoint" not in size:
        return (lm := make(size)), lm
    for path in (size["checkpoint"], size["draft"]):
        if not Path(path).exists():
            raise ModuleNotFoundError(f"{path} (docs/generation.md, Speculative decoding)")
    return load(Path(size["checkpoint"])), load(Path(size["draft"]))


def decode_tales(lm: LM, draft: LM | None, size: Size) -> Repeat:
    """Time greedy decoding of beginnings of tales, one after the other, with a draft or without."""
    texts = [tale(2, i).text(("hi", "en")[i % 2]) for i in range(size["texts"])]
    ids = [list(t.encode()) if lm.tokenizer is None else lm.tokenizer.encode(t) for t in texts]

    def work() -> None:
        for one in ids:
            lm.generate(
                one[: size["prompt"]],
                max_new_tokens=size["new_tokens"],
                ignore_eos=True,
                draft=draft,
                draft_tokens=size["draft_tokens"],
            )

    work()
    return lambda: timed(work)


def random_checkpoint(size: Size, directory: Path) -> Checkpoint:
    """Return our model with initial weights, and a tokenizer of its size in a directory."""
    trained = str(directory / "tokenizer")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(tale(0, i).text("en") for i in range(20)),
        model_prefix=trained,
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    file = directory / "tokenizer.model"
    proto = parse_proto(file.read_bytes())
    for i in range(len(proto.pieces), size["vocab_size"]):
        proto.pieces.add(piece=f"<{i}>", score=-float(i))
    file.write_bytes(proto.SerializeToString())
    model = config(size).model

    def read(name: str, rows: slice = FULL_SLICE) -> np.ndarray:
        return initial_weight(model, 0, name, rows)

    tensors = {name: (np.dtype(np.float32), s) for name, s in model.parameter_shapes().items()}
    files = {file.name: file}
    return Checkpoint(directory, "random", model, None, tensors, read, tokenizer_files=files)
