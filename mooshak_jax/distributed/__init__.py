"""Distributed training: the device mesh and the sharding of arrays on it."""

import os

import jax  # noqa: F401

# If libtpu (extra `tpu`, for plans) is installed, JAX loads it. JAX sets this variable when it
# finds no TPU: these settings then keep libtpu from searching for its host, which it logs as an
# error, and from locking out other processes. Every module of this package imports this one before
# it uses a device.
if "TPU_SKIP_MDS_QUERY" in os.environ:
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
