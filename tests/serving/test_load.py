"""Two hundred clients at once: every answer is that of its request alone, in bounded memory."""

import asyncio
import json
import os
import random
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.serving.servers import Server, serve, stream_of

pytestmark = pytest.mark.slow

N_CLIENTS = 200
# A minute for each framework: MOOSHAK_LOAD_SECONDS=60 pytest -s.
SECONDS = float(os.environ.get("MOOSHAK_LOAD_SECONDS", "6"))
N_BODIES = 24
MAX_GROWTH = 64 * 2**20


def bodies() -> list[dict[str, Any]]:
    """Return requests of many kinds; each has a seed, so it has one answer."""
    draw, found = random.Random(0), []
    for i in range(N_BODIES):
        prompt = [draw.randrange(3, 500) for _ in range(draw.randrange(1, 50))]
        body: dict[str, Any] = {"prompt": prompt, "max_tokens": draw.randrange(1, 30), "seed": i}
        body |= {"temperature": draw.choice([0, 0.7, 1.3]), "logprobs": 0}
        body |= draw.choice(
            [{}, {"n": 2}, {"top_k": 20, "top_p": 0.9}, {"repetition_penalty": 1.3}]
        )
        body["stream"] = i % 3 == 0
        found.append(body)
    return found


async def ask(client: httpx2.AsyncClient, body: dict[str, Any]) -> str:
    """Return what depends on the request alone: its choices, as JSON."""
    response = await client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    parts = stream_of(response.text) if body["stream"] else [response.json()]
    choices = [choice for part in parts for choice in part["choices"]]
    # Samples of a request stream in any order, each in its own.
    return json.dumps(sorted(choices, key=lambda choice: choice["index"]), ensure_ascii=False)


def resident_bytes(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


async def load(server: Server, alone: list[str]) -> int:
    """Ask from many clients for some seconds; return the number of answers."""
    end, every = time.monotonic() + SECONDS, bodies()
    limits = httpx2.Limits(max_connections=N_CLIENTS, max_keepalive_connections=N_CLIENTS)
    async with httpx2.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client:

        async def one_client(number: int) -> int:
            draw, n = random.Random(number), 0
            while time.monotonic() < end:
                chosen = draw.randrange(N_BODIES)
                assert await ask(client, every[chosen]) == alone[chosen]
                n += 1
            return n

        counts = await asyncio.gather(*map(one_client, range(N_CLIENTS)))
    assert min(counts) > 0
    return sum(counts)


async def one_by_one(server: Server) -> list[str]:
    async with httpx2.AsyncClient(base_url=server.url, timeout=120) as client:
        return [await ask(client, body) for body in bodies()]


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_answers_under_load_are_those_alone(framework: str, checkpoints: dict[str, Path]) -> None:
    with serve(framework, checkpoints["llama"], "--n-slots", "16") as server:
        alone = asyncio.run(one_by_one(server))
        assert len(set(alone)) == N_BODIES
        asyncio.run(load(server, alone))
        before = resident_bytes(server.process.pid)
        count = asyncio.run(load(server, alone))
        growth = resident_bytes(server.process.pid) - before
        print(f"{framework}: {count} requests in {SECONDS:g} s, memory + {growth / 2**20:.1f} MiB")
        assert growth < MAX_GROWTH
        assert server.metric("running") + server.metric("waiting") == 0
        figures = server.get("/metrics")
        assert 'status="200"' in figures and 'status="5' not in figures
