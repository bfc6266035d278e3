"""Worker of llama.cpp, on the GGUF export of our model."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cases import Size, config
from benchmarks.worker import Repeat, timed
from mooshak.checkpoints.base import FULL_SLICE, Checkpoint
from mooshak.corpus.tales import tale
from mooshak.numerics.init_weights import initial_weight
from mooshak.tokenizer.sentencepiece import parse_proto
from parity import export_gguf


def generate(size: Size) -> Repeat:
    """Time greedy decoding of one sequence, prompt included, with two threads."""
    from llama_cpp import Llama  # type: ignore[import-not-found]

    directory = tempfile.TemporaryDirectory()
    path = Path(directory.name) / "model.gguf"
    export_gguf.write_checkpoint(path, _checkpoint(size, Path(directory.name)))
    llama: Any = Llama(
        str(path), n_ctx=size["sequence_length"], n_threads=2, n_threads_batch=2, verbose=False
    )
    shape = (size["batch_size"], size["sequence_length"] + 1)
    tokens_BS = np.random.default_rng(0).integers(0, size["vocab_size"], shape)
    prompt = tokens_BS[0, : size["prompt"]].tolist()

    def work() -> None:
        llama.reset()
        tokens = llama.generate(prompt, top_k=1, temp=0.0, repeat_penalty=1.0)
        for _ in range(size["new_tokens"]):
            next(tokens)

    work()
    directory.cleanup()
    return lambda: timed(work)


def _checkpoint(size: Size, directory: Path) -> Checkpoint:
    """Return our model with initial weights, and a tokenizer of its size, which GGUF needs."""
    import sentencepiece

    trained = str(directory / "tokenizer")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(tale(0, i).text("en") for i in range(20)),
        model_prefix=trained,
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
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
