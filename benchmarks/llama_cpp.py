"""Worker of llama.cpp, on the GGUF export of our model."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.case import Size
from benchmarks.serving import random_checkpoint
from benchmarks.worker import Repeat, timed
from parity import export_gguf


def generate(size: Size) -> Repeat:
    """Time greedy decoding of one sequence, prompt included, with two threads."""
    from llama_cpp import Llama  # type: ignore[import-not-found]

    directory = tempfile.TemporaryDirectory()
    path = Path(directory.name) / "model.gguf"
    export_gguf.write_checkpoint(path, random_checkpoint(size, Path(directory.name)))
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
