"""One engine over several processes: the first schedules, the others repeat its engine's calls.

Every process holds a part of the model and must make the same computations in the same order. The
first one serves; it sends each call with its arguments to the others over a socket.
"""

import secrets
from collections.abc import Callable, Sequence
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

import numpy as np

from mooshak.errors import InputError
from mooshak.generation.log_probs import TokenLogProbs
from mooshak.serving.engine import Engine, StepInputs

Broadcast = Callable[[str], str]
"""Return the first process's text in all processes; a collective."""


class SharedEngine(Engine):
    """The engine of the first process: the followers make every call, too."""

    def __init__(self, engine: Engine, followers: Sequence[Connection]):
        super().__init__(engine.config, engine.n_slots, engine.max_len, engine.chunk)
        self.engine, self.followers = engine, followers

    def prefill(
        self,
        slot: int,
        tokens: Sequence[int],
        start: int,
        targets: Sequence[int] | None = None,
        top: bool = False,
    ) -> TokenLogProbs | None:
        arguments = slot, tokens, start, targets, top
        self._send("prefill", *arguments)
        return self.engine.prefill(*arguments)

    def copy_slot(self, source: int, target: int) -> None:
        self._send("copy_slot", source, target)
        self.engine.copy_slot(source, target)

    def step(self, inputs: StepInputs) -> tuple[np.ndarray, TokenLogProbs | None]:
        self._send("step", inputs)
        return self.engine.step(inputs)

    def close(self) -> None:
        """Let the followers end."""
        self._send("close")

    def _send(self, name: str, *arguments: Any) -> None:
        for follower in self.followers:
            follower.send((name, arguments))


def lead(engine: Engine, n_followers: int, host: str, broadcast: Broadcast) -> SharedEngine:
    """Return the engine of all processes, once the followers have connected to `host`."""
    key = secrets.token_hex(32)
    with Listener((host, 0), authkey=bytes.fromhex(key)) as listener:
        broadcast(f"{host} {listener.address[1]} {key}")
        return SharedEngine(engine, [listener.accept() for _ in range(n_followers)])


def follow(engine: Engine, broadcast: Broadcast) -> None:
    """Make the calls of the first process until it closes. Raises `InputError` if it is lost."""
    host, port, key = broadcast("").split()
    try:
        with Client((host, int(port)), authkey=bytes.fromhex(key)) as leader:
            while (call := leader.recv())[0] != "close":
                name, arguments = call
                getattr(engine, name)(*arguments)
    except (EOFError, OSError, AuthenticationError) as error:
        raise InputError(f"the first process, at {host} port {port}, has ended") from error
