"""JAX serves a mesh over two processes: the texts of one device, a drain, a lost leader."""

import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import openai
import pytest

from mooshak.errors import InputError
from mooshak.serving.processes import follow, lead
from mooshak_jax.engine import Engine
from tests.serving.conftest import load
from tests.serving.servers import NAME, Server

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compiled_in_haste")]

PROMPTS = ["एक चूहा", "the lion"]


@contextmanager
def processes(checkpoint: Path, *options: str) -> Iterator[list["subprocess.Popen[str]"]]:
    """Start two processes with one device each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "mooshak_jax.serve", str(checkpoint), "--device", "cpu"]
    command += ["--port", "0", "--served-model-name", NAME, "--n-slots", "4", "--chunk", "16"]
    command += ["--parallel.coordinator_address", coordinator, "--parallel.num_processes", "2"]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    found = [
        subprocess.Popen([*command, *options, "--parallel.process_id", str(i)], **pipes)
        for i in range(2)
    ]
    try:
        yield found
    finally:
        for process in found:
            process.kill()
            process.communicate()


def url_of(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None and process.stderr is not None
    for line in process.stdout:  # Gloo prints its connections first.
        if line.startswith(f"serving {NAME} on http://"):
            return line.split()[3]
    raise AssertionError(process.stderr.read())


def test_two_processes_serve_the_texts_of_one(checkpoints: dict[str, Path]) -> None:
    path = checkpoints["llama"]
    with processes(path, "--mesh", "tensor=2", "--dtype", "float64") as (leader, follower):
        server = Server(url_of(leader), leader)
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
        options: Any = {"model": NAME, "prompt": PROMPTS, "seed": 3, "n": 2, "max_tokens": 12}
        found = client.completions.create(**options, logprobs=2, extra_body={"top_p": 0.9})
        follower.send_signal(signal.SIGTERM)  # The first process decides when to end.
        lm = load("jax", path, "float64")
        expected = lm.generate(PROMPTS, max_new_tokens=12, temperature=1.0, top_p=0.9, seed=3, n=2)
        assert [choice.text for choice in found.choices] == [
            one.text for row in expected for one in row
        ]
        # Penalties, which are arrays as large as the vocabulary, and a shared prefix.
        again = client.completions.create(**options, presence_penalty=1.5)
        settings: Any = {"presence_penalty": 1.5, "temperature": 1.0, "seed": 3, "n": 2}
        expected = lm.generate(PROMPTS, max_new_tokens=12, **settings)
        assert [choice.text for choice in again.choices] == [
            one.text for row in expected for one in row
        ]
        leader.send_signal(signal.SIGTERM)
        errors = [process.communicate(timeout=60)[1] for process in (leader, follower)]
        assert [leader.returncode, follower.returncode] == [0, 0], errors
        assert "Traceback" not in errors[0] + errors[1]


def test_wrong_mesh_of_two_processes_is_one_line(checkpoints: dict[str, Path]) -> None:
    with processes(checkpoints["llama"]) as started:
        for process in started:
            _, errors = process.communicate(timeout=60)
            assert process.returncode == 2
            assert "mesh data=1 has 1 devices, the 2 processes have 2" in errors.splitlines()[-1]


def test_follower_repeats_calls_until_the_leader_is_lost(checkpoints: dict[str, Path]) -> None:
    lm = load("jax", checkpoints["llama"])
    own, other = (Engine(lm, n_slots=2, chunk=16) for _ in range(2))
    texts: queue.Queue[str] = queue.Queue()

    def announce(text: str) -> str:
        texts.put(text)
        return text

    failures: list[Exception] = []

    def work() -> None:
        try:
            follow(other, lambda _: texts.get())
        except InputError as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    shared = lead(own, 1, "127.0.0.1", announce)
    shared.prefill(1, [5, 6, 7], 0)
    shared.copy_slot(1, 0)
    for follower in shared.followers:
        follower.close()
    thread.join(timeout=60)
    assert not thread.is_alive()
    for a, b in zip(jax.tree.leaves(own.state), jax.tree.leaves(other.state), strict=True):
        assert a.any() and (a == b).all()
    (error,) = failures
    assert str(error).startswith("the first process, at 127.0.0.1 port ")
