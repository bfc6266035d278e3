"""Signals: the first stops a run after its step, the second at once."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from types import FrameType

import pytest

from mooshak.training.metrics import stop_request

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@pytest.fixture
def received() -> Iterator[list[int]]:
    """The signals that reach the handlers from before the block."""
    numbers: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        numbers.append(number)

    previous = {number: signal.signal(number, receive) for number in SIGNALS}
    yield numbers
    for number, handler in previous.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("first", SIGNALS)
@pytest.mark.parametrize("second", SIGNALS)
def test_second_signal_goes_to_the_handler_before(
    first: signal.Signals, second: signal.Signals, received: list[int]
) -> None:
    with stop_request() as stop:
        assert not stop.is_set()
        signal.raise_signal(first)
        assert stop.is_set() and received == []
        signal.raise_signal(second)
        assert received == [second]
    signal.raise_signal(first)
    assert received == [second, first]


def test_second_interrupt_raises_in_the_step() -> None:
    # A shell starts background commands with this signal ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt), stop_request():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


HANGING = """
import threading
from mooshak.training.metrics import stop_request

with stop_request() as stop:
    print("started", flush=True)
    stop.wait()
    print("stopping", flush=True)
    while True:
        threading.Event().wait(0.01)
"""


@pytest.mark.slow
def test_second_signal_ends_a_process_that_hangs() -> None:
    process = subprocess.Popen([sys.executable, "-c", HANGING], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        for line in ("started\n", "stopping\n"):
            assert process.stdout.readline() == line
            assert process.poll() is None
            process.send_signal(signal.SIGTERM)
        assert process.wait(60) == -signal.SIGTERM
    finally:
        process.kill()
