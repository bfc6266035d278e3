"""Threads that stand for the processes of a run, with the interface of `Parallel`."""

import threading
from collections.abc import Callable

DEADLINE = 240
"""Seconds; most of them are for the start of processes on a busy machine."""


class Peers:
    """Threads that stand for the processes of a run."""

    def __init__(self, count: int):
        self.count, self.texts = count, [""] * count
        self.barrier = threading.Barrier(count, timeout=DEADLINE)

    def exchange(self, rank: int, text: str) -> list[str]:
        self.texts[rank] = text
        self.barrier.wait()
        texts = list(self.texts)
        self.barrier.wait()
        return texts


class Peer:
    """One of them, with the interface of `Parallel`."""

    def __init__(self, peers: Peers, rank: int):
        self.peers, self.rank, self.is_main = peers, rank, rank == 0
        self.world_size = peers.count

    def broadcast(self, text: str) -> str:
        return self.gather(text)[0]

    def barrier(self) -> None:
        self.gather("")

    def any_process(self, flag: bool) -> bool:
        return any(self.gather("set" if flag else ""))

    def gather(self, text: str) -> list[str]:
        return self.peers.exchange(self.rank, text)

    def close(self) -> None:
        self.barrier()


def run_peers(count: int, process: Callable[[Peer], None]) -> dict[int, Exception]:
    """Run `process` for each peer at once; return what they raise, by rank."""
    peers, raised = Peers(count), dict[int, Exception]()

    def run(rank: int) -> None:
        try:
            process(Peer(peers, rank))
        except Exception as error:
            raised[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
    return raised
