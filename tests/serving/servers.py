"""Start the serve commands of tests as processes, and applications without a process."""

import json
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from mooshak.serving.protocol import Parser
from mooshak.serving.server import make_app
from mooshak.serving.service import Service
from tests.serving.conftest import load, make_scheduler

SHAPE = {"n_slots": 4, "chunk": 16}
NAME = "tiny"


@dataclass
class Server:
    """A server process."""

    url: str
    process: "subprocess.Popen[str]"

    def get(self, path: str) -> str:
        """Return the body of a response."""
        with urllib.request.urlopen(self.url + path, timeout=30) as response:
            text: str = response.read().decode()
        return text

    def metric(self, name: str) -> float:
        """Return a figure of /metrics; 0 if it is not there yet."""
        lines = self.get("/metrics").splitlines()
        found = [line.split() for line in lines if line.startswith(f"mooshak_{name} ")]
        return float(found[0][1]) if found else 0.0


@contextmanager
def serve(
    framework: str, checkpoint: Path, *options: str, env: dict[str, str] | None = None
) -> Iterator[Server]:
    """Start a server on a free port; kill it at the end if it still runs."""
    command = [sys.executable, "-m", f"mooshak_{framework}.serve", str(checkpoint)]
    command += ["--port", "0", "--device", "cpu", "--served-model-name", NAME]
    command += ["--n-slots", str(SHAPE["n_slots"]), "--chunk", str(SHAPE["chunk"]), *options]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, text=True, env=env, **pipes)
    try:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        assert line.startswith(f"serving {NAME} on http://"), process.stderr.read()
        yield Server(line.split()[3], process)
    finally:
        process.kill()
        process.communicate()


@contextmanager
def application(framework: str, checkpoint: Path, **options: Any) -> Iterator[Service]:
    """A service whose scheduler works in a thread of this process."""
    lm = load(framework, checkpoint)
    assert lm.tokenizer is not None
    scheduler = make_scheduler(framework, lm, **SHAPE)
    parser = Parser(lm, lm.tokenizer, NAME, scheduler.engine.max_len, 64)
    chosen = {"api_key": None, "max_body_bytes": 10_000, "timeout": 60.0, "peer": None} | options
    thread = threading.Thread(target=scheduler.run)
    thread.start()
    try:
        yield Service(parser, scheduler, framework, **chosen)
    finally:
        scheduler.close(drain=False)
        thread.join()


def client_of(service: Service) -> httpx2.AsyncClient:
    """Return a client of the application, without a socket. Streams come as one."""
    transport = httpx2.ASGITransport(make_app(service, None), raise_app_exceptions=False)
    return httpx2.AsyncClient(transport=transport, base_url="http://server", timeout=60)


def stream_of(text: str) -> list[Any]:
    """Return the events of a stream; the last one is the text `[DONE]`."""
    parts = text.split("\n\n")
    assert parts.pop() == "" and all(part.startswith("data: ") for part in parts)
    assert parts.pop() == "data: [DONE]"
    return [json.loads(part.removeprefix("data: ")) for part in parts]
