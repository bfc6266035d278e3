"""Names of places in the model: where the first difference is."""

import re

from mooshak.config.model import ModelConfig
from parity.distance import Arrays, distance
from parity.tolerances import FLOAT64


def hidden(model: ModelConfig) -> list[tuple[str, str]]:
    layers = [(f"layers.{i} out", f"hidden states after layer {i}") for i in range(model.n_layers)]
    first = ("embeddings out", "hidden states after the embeddings")
    return [("logits", "logits"), first, *layers]


def place(key: str) -> str:
    """Return `layers.3.attention.wq rope out` as `layer 3 attention, RoPE of q`."""
    path, _, end = key.rpartition(" ")
    match = re.match(r"layers\.(\d+)\.?(.*)", path)
    if not match:
        return key if not path else path if end == "out" else f"input of {path}"
    layer, operation = f"layer {match[1]}", match[2]
    out = {
        "": "output",
        "attention.wq rope": "attention, RoPE of q",
        "attention.wk rope": "attention, RoPE of k",
        "attention": "attention, softmax(q k) v",
        "mlp": "mlp, w2",
    }
    into = {
        "": "input",
        "mlp_norm": ", input of mlp_norm: x + attention",
        "mlp.w2": "mlp, silu(w1 x) * w3 x",
        "attention.wo": "attention, softmax(q k) v",
        "output_norm": ", input of output_norm: h + mlp",
    }
    if end == "out":
        text = out.get(operation, operation.replace(".", ", "))
    else:
        text = into.get(operation, f", input of {operation.replace('.', ', ')}")
    return layer + ("" if text.startswith(",") else " ") + text


def worst_gradient(measured: Arrays, truth: Arrays) -> tuple[float, str]:
    """Return the largest difference of a gradient, and the parameter closest to its cause."""
    distances = {key: distance(measured[key], value) for key, value in truth.items()}
    worst = max(distances, key=lambda key: distances[key])
    # Gradients flow backwards: the last parameter whose gradient is wrong is closest to the fault.
    wrong = [key for key in distances if not distances[key] <= FLOAT64]
    return distances[worst], (wrong or [worst])[-1]
