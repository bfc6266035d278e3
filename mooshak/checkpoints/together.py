"""The processes of a run fail together: what one of them cannot do ends all, with its reason."""

from collections.abc import Iterator
from contextlib import contextmanager

from mooshak.checkpoints.formats import Processes
from mooshak.errors import InputError, PeerError, os_error_text


@contextmanager
def fail_together(processes: Processes) -> Iterator[None]:
    """Raise an exception of the block in all processes; all of them call it.

    The block has no collectives: another process would wait there for the one that has failed.
    """
    failure: BaseException | None = None
    try:
        yield
    except Exception as error:
        if processes.world_size == 1:
            raise
        failure = error
    if processes.world_size > 1:
        raise_together(processes, failure)


def raise_together(processes: Processes, failure: BaseException | None) -> None:
    """Raise the failure of any process: the error itself there, `PeerError` in the others.

    All processes call it at the same point of the run, and leave the process group together.
    """
    if not processes.any_process(failure is not None):
        return
    known = failure is not None and not isinstance(failure, PeerError)
    texts = processes.gather(_summary(failure) if known else "")
    causes = [f"rank {rank} failed: {text}" for rank, text in enumerate(texts) if text]
    processes.close()
    if failure is not None and (known or not causes):
        raise failure
    raise PeerError("; ".join(causes)) from failure


def _summary(error: BaseException | None) -> str:
    if isinstance(error, OSError):
        return os_error_text(error)
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else ""
    return text if isinstance(error, InputError) else f"{type(error).__name__}: {text}"
