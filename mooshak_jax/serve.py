"""Serve the JAX model with the OpenAI API.

python -m mooshak_jax.serve runs/demo/jax/checkpoints/1200
python -m mooshak_jax.serve LLAMA --port 8001 --n-slots 32 --max-len 1024 --mesh tensor=4
python -m mooshak_jax.serve LLAMA --peer http://127.0.0.1:8001
python -m mooshak_jax.serve LLAMA --mesh tensor=8 --parallel.coordinator_address auto

With several processes the first one serves, and the others compute with it.
"""

import argparse
import signal
import socket
from functools import partial
from typing import Any

from mooshak.config.sections import ParallelConfig
from mooshak.device import restrict_to
from mooshak.errors import command
from mooshak.serving.command import STOP_SIGNALS, open_engine, run_server, serve_parser
from mooshak.serving.engine import Engine
from mooshak.serving.processes import follow, lead


@command
def main() -> None:
    parser = serve_parser("mooshak_jax.serve", __doc__)
    text = "mesh over which the parameters are sharded, such as tensor=4"
    parser.add_argument("--mesh", metavar="MESH", help=text)
    text = "HOST:PORT of the first process, or auto (TPU pods, Slurm); by default one process"
    parser.add_argument("--parallel.coordinator_address", dest="coordinator", help=text)
    text = "number of processes, with a HOST:PORT"
    parser.add_argument("--parallel.num_processes", dest="processes", type=int, help=text)
    text = "index of this process, from 0"
    parser.add_argument("--parallel.process_id", dest="process_id", type=int, help=text)
    args = parser.parse_args()
    parallel = ParallelConfig(
        coordinator_address=args.coordinator,
        num_processes=args.processes,
        process_id=args.process_id,
    )
    restrict_to(args.device)
    serve(args, parallel)


def serve(args: argparse.Namespace, parallel: ParallelConfig) -> None:
    """Serve; processes after the first one compute with it until it ends."""
    # Imported after parsing: --help and wrong arguments do not need the framework.
    import jax

    from mooshak_jax import engine
    from mooshak_jax.distributed.mesh import join
    from mooshak_jax.lm import LM, load
    from mooshak_jax.step import cache_compilations

    cache_compilations()
    join(parallel)
    address = parallel.coordinator_address or "auto"
    host = socket.gethostname() if address == "auto" else address.rpartition(":")[0]
    load_on_mesh = partial(load, mesh=args.mesh)
    if jax.process_index():
        for number in STOP_SIGNALS:  # The first process drains, and ends this one.
            signal.signal(number, signal.SIG_IGN)
        lm, own = open_engine(args, load_on_mesh, engine.Engine)
        follow(own, lm.parallel.broadcast)
    else:

        def make_engine(lm: LM, *shape: Any) -> Engine:
            own, followers = engine.Engine(lm, *shape), lm.parallel.world_size - 1
            return lead(own, followers, host, lm.parallel.broadcast) if followers else own

        run_server(args, "jax", load_on_mesh, make_engine)
    if jax.process_count() > 1:
        jax.distributed.shutdown()


if __name__ == "__main__":
    main()
