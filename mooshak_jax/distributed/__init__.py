"""Distributed training: the device mesh and the sharding of arrays on it."""

import os

import jax  # noqa: F401

# Where libtpu (extra `tpu`) is installed to plan for TPUs, every start of JAX loads it. JAX sets
# this variable where it finds no TPU: then libtpu need not look for its host, which it reports as
# an error, nor may only one process at a time use it. Every module of this package imports this one
# before a device is touched.
if "TPU_SKIP_MDS_QUERY" in os.environ:
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
