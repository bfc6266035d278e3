"""Start the commands of tests in processes that have already imported the frameworks.

An interpreter takes six seconds of processor time to import PyTorch, JAX and what belongs to them.
A server imports them once, before anything uses a device or starts a thread, and forks a process
for each command, which runs it as `python -m MODULE` or `python FILE` would. Commands that these
processes start (the stages of the demo, the ranks of torchrun) are forked too.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import selectors
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PRELOADED = (
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "flax.nnx",
    "grain",
    "orbax.checkpoint",
    "sentencepiece",
    "rich.progress",
)
MAX_MESSAGE = 200_000
"""Bytes of a command and its environment."""
ADDRESS = "MOOSHAK_FORK_SERVER"
"""Environment variable with the path of the server's socket."""
HERE = str(Path(__file__).resolve().parent)


_Popen = subprocess.Popen


class ForkedPopen(_Popen):
    """A `Popen` whose process is forked by the server, where the command allows that."""

    _connection: socket.socket | None = None

    def _execute_child(self, args: Any, *rest: Any) -> None:
        _, _, _, pass_fds, cwd, env, _, _, shell, *_ = rest
        start_new_session = rest[20]
        words = [] if shell else [os.fsdecode(word) for word in args]
        environment = dict(os.environ if env is None else env)
        if pass_fds or not is_forkable(words, cwd, environment):
            super()._execute_child(args, *rest)  # type: ignore[misc]  # not in typeshed
            return
        if ADDRESS not in os.environ:
            start()
            environment |= {ADDRESS: os.environ[ADDRESS]}
        p2cread, _, _, c2pwrite, _, errwrite = rest[9:15]
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._connection.connect(os.environ[ADDRESS])
        message = {"words": words[1:], "environment": environment, "session": start_new_session}
        # The server started in the directory that was the working directory then.
        request = json.dumps(message | {"directory": os.getcwd()}).encode()
        files = [own if fd == -1 else fd for own, fd in enumerate((p2cread, c2pwrite, errwrite))]
        socket.send_fds(self._connection, [request], files)
        self.pid = int(self._connection.recv(64))
        self._child_created = True
        self._close_pipe_fds(*rest[9:15])  # type: ignore[attr-defined]

    def _internal_poll(self, *args: Any, **options: Any) -> int | None:
        if self._connection is None:
            return super()._internal_poll(*args, **options)  # type: ignore[misc]
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._wait(0)
        return self.returncode

    def _wait(self, timeout: float | None) -> int:
        if self._connection is None:
            return super()._wait(timeout)  # type: ignore[misc]
        if self.returncode is None:
            if not select.select([self._connection], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self.returncode = int(self._connection.recv(64) or -9)
            self._connection.close()
        return self.returncode


IMPORTED = (
    "OMP_",
    "MKL_",
    "KMP_",
    "OPENBLAS_",
    "PYTHON",
    "HF_",
    "JAX_",
    "LD_",
    "TF_",
    "TORCH_LOGS",
)
"""Prefixes of variables that are read at import."""
APPLIED = {"JAX_PLATFORMS": str, "JAX_DISABLE_MOST_OPTIMIZATIONS": lambda value: value == "1"}
"""Those that a forked process applies afterwards: to JAX's configuration, by the same names."""


def is_forkable(words: list[str], cwd: Any, environment: dict[str, str]) -> bool:
    """Return whether a forked process would do the same as a new interpreter."""
    # Linux has both; elsewhere commands are started as usual.
    if not (hasattr(os, "pidfd_open") and Path("/proc/self/task").is_dir()):
        return False
    if words[:1] != [sys.executable] or len(words) < 2:
        return False
    first = words[2] if words[1] == "-u" else words[1]
    if not (first == "-m" or first.endswith(".py")):
        return False
    if cwd is not None and Path(cwd).resolve() != Path.cwd():
        return False
    keys = {key for key in {*environment, *os.environ} if key.startswith(IMPORTED)}
    changed = {key for key in keys if environment.get(key) != os.environ.get(key)}
    return changed <= set(APPLIED)


def start() -> None:
    """Start the server; it ends with this process."""
    directory = tempfile.TemporaryDirectory(prefix="fork-server-")
    address = f"{directory.name}/socket"
    program = f"import sys; sys.path.insert(0, {HERE!r}); import fork_server; fork_server.main()"
    server = _Popen(
        [sys.executable, "-c", program, address], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert server.stdout is not None and server.stdout.readline() == b"ready\n"
    os.environ[ADDRESS] = address

    @atexit.register
    def stop() -> None:
        server.communicate()
        directory.cleanup()


def main() -> None:
    """Serve, until the standard input ends; in a forked process, run the command."""
    for module in PRELOADED:
        importlib.import_module(module)
    assert len(os.listdir("/proc/self/task")) == 1, "forking a process with threads"
    gc.freeze()  # A collection in a forked process would copy all of its pages.
    request = serve(sys.argv[1])
    if request is None:
        return
    words, environment = request["words"], request["environment"]
    os.chdir(request["directory"])
    os.environ.clear()
    os.environ.update(environment)
    for key, read in APPLIED.items():
        if key in environment:
            sys.modules["jax"].config.update(key.lower(), read(environment[key]))
    subprocess.Popen = ForkedPopen  # type: ignore[misc]
    if words[0] == "-u":
        words = words[1:]
        sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
    if words[0] == "-m":
        sys.path[0] = os.getcwd()
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(words[0]).parent)
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


def serve(address: str) -> dict[str, Any] | None:
    """Fork a process per request. Returns the request in that process, None in the server."""
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listening.bind(address)
    listening.listen(64)
    waiting = selectors.DefaultSelector()
    waiting.register(sys.stdin, selectors.EVENT_READ)
    waiting.register(listening, selectors.EVENT_READ)
    print("ready", flush=True)
    while True:
        for key, _ in waiting.select():
            if key.fileobj is sys.stdin:
                return None
            if key.fileobj is not listening:
                pid, connection = key.data
                _, status = os.waitpid(pid, 0)
                with contextlib.suppress(OSError):  # The process that asked may have ended.
                    connection.send(str(os.waitstatus_to_exitcode(status)).encode())
                connection.close()
                waiting.unregister(key.fd)
                os.close(key.fd)
                continue
            connection, _ = listening.accept()
            message, files, _, _ = socket.recv_fds(connection, MAX_MESSAGE, 3)
            if (pid := os.fork()) == 0:
                request: dict[str, Any] = json.loads(message)
                if request["session"]:
                    os.setsid()
                for target, file in enumerate(files):
                    os.dup2(file, target)
                # Objects, not numbers: later their destructors would close other files.
                for other in list(waiting.get_map().values()):
                    if other.data is None:
                        continue
                    os.close(other.fd)
                    other.data[1].close()
                for file in files:
                    os.close(file)
                connection.close()
                listening.close()
                waiting.close()
                return request
            for file in files:
                os.close(file)
            connection.send(str(pid).encode())
            waiting.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, connection))
