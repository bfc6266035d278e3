"""Render the page of the accelerator report from its JSON.

python -m parity.accelerator.page DIRECTORY
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mooshak.errors import InputError, command
from mooshak.files import write_atomically
from mooshak.report.html import COLORS, TEMPLATES, svg, themed
from mooshak.training.metrics import losses
from parity.accelerator.parts import PARTS

CURVES = {
    "torch-cpu": ("ink", "-", 4.0, "PyTorch on the CPU"),
    "torch": ("torch", "-", 2.0, "PyTorch"),
    "jax": ("jax", "--", 1.6, "JAX"),
    "torch-to-jax": ("jax", ":", 1.4, "PyTorch, then JAX"),
    "torch-bfloat16": ("torch", "-.", 0.9, "PyTorch, bfloat16"),
    "jax-bfloat16": ("jax", "-.", 0.9, "JAX, bfloat16"),
}
"""Run -> colour, line, width, name."""


def page(directory: Path) -> str:
    """Render the report. Raises `InputError` if there is none in the directory."""
    try:
        report: Mapping[str, Any] = json.loads((directory / "report.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{directory} has no report.json: {error}") from error
    titles = {"packages": "Packages"} | {part.name: part.title for part in PARTS}
    rows = [row for part in report["parts"].values() for row in part]
    return TEMPLATES.get_template("accelerator.html").render(
        report=report,
        titles=titles,
        figure=plot(directory),
        failed=[row for row in rows if row["passed"] is False],
        checked=[row for row in rows if row["passed"] is not None],
        number=number,
    )


def number(value: float | str | None) -> str:
    """Format a figure of any size; None is a figure that is not finite."""
    if value is None:
        return "not finite"
    if isinstance(value, str):
        return value
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def plot(directory: Path) -> str | None:
    """Plot the loss curves as SVG; None before there is one."""
    found = {name: losses(directory / "runs" / name) for name in CURVES}
    found = {name: curve for name, curve in found.items() if curve}
    if not found:
        return None
    with themed(6.0, 3.2) as figure:
        axes = figure.subplots()
        for name, curve in found.items():
            color, line, width, label = CURVES[name]
            alpha = 0.3 if name == "torch-cpu" else 1.0
            axes.plot(
                list(curve),
                list(curve.values()),
                line,
                color=COLORS[color],
                linewidth=width,
                alpha=alpha,
                label=label,
            )
        axes.set_xlabel("step")
        axes.set_ylabel("loss, nats per token")
        axes.legend(frameon=False)
    return svg(figure)


@command
def main() -> None:
    directory = Path(sys.argv[1])
    write_atomically(directory / "report.html", page(directory))


if __name__ == "__main__":
    main()
