"""Mooshak's mirror in Flax NNX; imports neither mooshak_torch nor torch."""

import os

import jax  # noqa: F401

# Where libtpu (extra `tpu`) is installed to plan for TPUs, every start of JAX loads it. JAX has set
# this variable where it found no TPU: then libtpu need not look for its host, which it reports as
# an error, nor may only one process at a time have it.
if "TPU_SKIP_MDS_QUERY" in os.environ:
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
