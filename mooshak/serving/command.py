"""Command line of both `serve` commands: options, the socket, signals, and the end."""

import argparse
import asyncio
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.util import find_spec
from ipaddress import ip_address
from typing import Any, TypeVar, get_args
from urllib.parse import urlsplit

from mooshak.command_line import command_parser
from mooshak.config.model import Dtype
from mooshak.errors import InputError, require
from mooshak.generation.command import add_model_options
from mooshak.generation.lm import LM
from mooshak.serving.engine import Engine
from mooshak.serving.protocol import Parser
from mooshak.serving.scheduler import Scheduler
from mooshak.serving.service import Service

API_KEY = "MOOSHAK_API_KEY"
"""Environment variable with the key that clients must send."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
FLUSH_SECONDS = 30
"""Time for the last bytes of responses, after all work is done."""
BACKLOG = 2048
"""Connections that may wait until they are accepted."""
KEEP_ALIVE_SECONDS = 65
"""Time that an unused connection stays open: longer than clients keep one in their pools."""

_LM = TypeVar("_LM", bound=LM)


def serve_parser(module: str, doc: str | None) -> argparse.ArgumentParser:
    """Return the parser of `python -m MODULE CHECKPOINT`; `doc` is its docstring."""
    parser = command_parser(module, doc, "CHECKPOINT [--host ADDRESS] [--port N] [--OPTION VALUE]")

    def add(name: str, text: str, **options: Any) -> None:
        names = dict.fromkeys((f"--{name}", f"--{name.replace('-', '_')}"))
        parser.add_argument(*names, help=text, **options)

    number: dict[str, Any] = {"type": int, "metavar": "N"}
    text = "address to listen on; 0.0.0.0 is every one of this machine"
    add("host", text, default="127.0.0.1", metavar="ADDRESS")
    add("port", "port; 0 takes a free one", default=8000, **number)
    add_model_options(parser)
    add("served-model-name", "name for clients (default: CHECKPOINT)", metavar="NAME")
    add("n-slots", "samples that are generated at once", default=16, **number)
    text = "tokens of a prompt and its continuation (default: the model's maximum)"
    add("max-len", text, **number)
    add("chunk", "tokens of a prompt that are computed at once", default=128, **number)
    text = "dtype of keys and values (default: that of the computation)"
    add("kv-dtype", text, choices=get_args(Dtype))
    add("max-waiting", "samples that may wait for a slot; more get 503", default=1024, **number)
    add("max-body-bytes", "size of a request; longer ones get 413", default=2**22, **number)
    text = "time of a request, with its wait; longer ones end with an error"
    add("timeout", text, default=600.0, type=float, metavar="SECONDS")
    text = "a second server, which the page asks too, such as one of the other framework"
    add("peer", text, metavar="URL")
    return parser


def run_server(
    args: argparse.Namespace,
    framework: str,
    load: Callable[..., LM],
    make_engine: Callable[..., Engine],
) -> None:
    """Load the model and serve it until a signal. Raises `InputError` if that cannot start."""
    for package in ("starlette", "uvicorn"):
        require(find_spec(package) is not None, f"{package} is missing: pip install mooshak[serve]")
    require(args.max_waiting >= 1, f"--max-waiting {args.max_waiting} must be at least 1")
    require(args.max_body_bytes >= 1, f"--max-body-bytes {args.max_body_bytes} must be at least 1")
    require(0 < args.timeout < 1e9, f"--timeout {args.timeout:g} must be positive, in seconds")
    key = os.environ.get(API_KEY)
    require(key != "", f"{API_KEY} is empty; unset it, or set it to a key")
    require(key is None or key.isascii(), f"{API_KEY} must be ASCII")
    peer = _check_peer(args.peer) if args.peer else None
    # Before the model is loaded: a port in use is known at once.
    with bind(args.host, args.port) as listening:
        lm, engine = open_engine(args, load, make_engine)
        engine.warm_up()
        scheduler = Scheduler(lm, engine, args.max_waiting)
        name = args.served_model_name or str(args.checkpoint)
        assert lm.tokenizer is not None
        parser = Parser(lm, lm.tokenizer, name, engine.max_len, args.max_waiting)
        service = Service(
            parser, scheduler, framework, key, args.max_body_bytes, args.timeout, peer
        )
        try:
            listening.listen(BACKLOG)  # Another server may have been as early.
        except OSError as error:
            raise _cannot_listen(args.host, args.port, error) from error
        _serve(service, listening)
    if scheduler.failed:
        sys.exit(1)
    engine.close()


def open_engine(
    args: argparse.Namespace, load: Callable[..., _LM], make_engine: Callable[..., Engine]
) -> tuple[_LM, Engine]:
    """Load the model that the arguments name. Raises `InputError` if it cannot be served."""
    lm = load(args.checkpoint, args.dtype, device=args.device, tokenizer=args.tokenizer)
    if lm.tokenizer is None:
        raise InputError(f"{args.checkpoint} has no tokenizer; name one with --tokenizer")
    return lm, make_engine(lm, args.n_slots, args.max_len, args.chunk, args.kv_dtype)


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to an address but does not listen yet."""
    require(0 <= port <= 65535, f"--port {port} must be in 0 .. 65535")
    require(bool(host), "--host is empty; 0.0.0.0 is every address of this machine")
    try:
        (family, kind, protocol, _, address), *_ = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except (OSError, UnicodeError) as error:
        raise _cannot_listen(host, port, error) from error
    return found


def _cannot_listen(host: str, port: int, error: Exception) -> InputError:
    reason = getattr(error, "strerror", None) or error
    return InputError(f"cannot listen on {host} port {port}: {reason}")


def _check_peer(url: str) -> str:
    """Return a base URL without a slash at its end."""
    found = urlsplit(url)
    if found.scheme not in ("http", "https") or not found.netloc:
        raise InputError(f"--peer {url} is not a URL like http://127.0.0.1:8001")
    return url.rstrip("/")


def _serve(service: Service, listening: socket.socket) -> None:
    """Serve until a signal and the end of all requests, or a failure of the engine."""
    import uvicorn

    from mooshak.serving.server import make_app

    scheduler: Scheduler = service.scheduler

    def work(loop: asyncio.AbstractEventLoop) -> None:
        try:
            scheduler.run()
        except Exception:
            traceback.print_exc()
        loop.call_soon_threadsafe(setattr, server, "should_exit", True)

    @asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()
        threading.Thread(target=work, args=(loop,), name="scheduler", daemon=True).start()
        for number in STOP_SIGNALS:
            loop.add_signal_handler(number, _drain, service, loop)
        host, port, *_ = listening.getsockname()
        if not service.api_key and not ip_address(host.partition("%")[0]).is_loopback:
            text = f"warning: who reaches {host} can use the model without a key; set {API_KEY}"
            print(text, file=sys.stderr, flush=True)
        host = f"[{host}]" if ":" in host else host
        slots = f"{scheduler.engine.n_slots} slots of {scheduler.engine.max_len} tokens"
        print(f"serving {service.parser.name} on http://{host}:{port} ({slots})", flush=True)
        yield

    config = uvicorn.Config(
        make_app(service, lifespan),
        log_level="warning",
        ws="none",
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=FLUSH_SECONDS,
    )
    server = uvicorn.Server(config)
    server.run(sockets=[listening])


def _drain(service: Service, loop: asyncio.AbstractEventLoop) -> None:
    """Refuse new requests and finish the others; the next signal ends the process."""
    for number in STOP_SIGNALS:
        loop.remove_signal_handler(number)
        signal.signal(number, signal.SIG_DFL)
    scheduler = service.scheduler
    service.draining = True
    scheduler.close()
    n = scheduler.n_running + scheduler.n_waiting
    print(f"finishing {n} samples; a second signal ends them", file=sys.stderr, flush=True)
