"""The planners: their predictions against what is held, saved and moved."""

import subprocess
import sys

import pytest

from mooshak.hardware import DEVICES, Roofline, peak_flops


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-80g"),
        ("NVIDIA A100-SXM4-80GB", "a100-80g"),
        ("NVIDIA A10", "a10-24g"),
        ("NVIDIA L40S", "l40s-48g"),
        ("NVIDIA GeForce RTX 4090", "4090-24g"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
    ],
)
def test_peaks_by_the_names_of_the_drivers(kind: str, name: str) -> None:
    assert peak_flops(kind) == DEVICES[name].flops


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA A10G", "NVIDIA L40", "TPU v7"])
def test_no_peak_is_guessed(kind: str) -> None:
    assert peak_flops(kind) is None


def test_a_roofline_is_bound_by_its_longest_time() -> None:
    roofline = Roofline(compute=1.0, memory=0.5, links=2.0)
    assert (roofline.bound, roofline.mfu) == ("links", 0.5)
    assert Roofline(compute=1.0, memory=0.5, links=0.1).mfu == 1.0


def test_two_processes_start_on_a_cpu_beside_libtpu_and_say_nothing() -> None:
    """libtpu, where it is installed, complains of a missing TPU and lets one process have it."""
    code = "import mooshak_jax, jax; print(jax.devices()[0].platform, flush=True); input()"
    command = [sys.executable, "-c", code]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    processes = [subprocess.Popen(command, text=True, **pipes) for _ in range(2)]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "cpu\n"
        # Both stand at input() now: each has its devices while the other does.
        assert [process.communicate("\n", timeout=60)[1] for process in processes] == ["", ""]
    finally:
        for process in processes:
            process.kill()
