"""Prove that the PyTorch and the JAX model are the same function, on a checkpoint or a fresh model.

python -m parity.check SRC [OTHER]

SRC is a checkpoint of any kind, or a configuration (*.yaml), whose model is then drawn with weights
and gains that let faults show. With OTHER, torch computes with SRC's weights and JAX with OTHER's.
What each line means, and why the bounds are what they are, is in docs/parity.md.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import numpy as np
import torch
from rich.table import Table

from mooshak import config as configuration
from mooshak import interchange
from mooshak.config import (
    Config,
    Dtype,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    ScheduleConfig,
    TrainConfig,
)
from mooshak.errors import InputError, command
from mooshak.files import write_atomically
from mooshak.initial import initial_weight
from mooshak.interchange import Checkpoint
from mooshak.schedule import learning_rate
from mooshak.tables import print_table
from mooshak_torch.model import Model
from parity.convert import convert, open_any

# Allowed differences, all of them. They are never loosened: see docs/parity.md.
FLOAT64 = 1e-12
FLOAT32_LOGITS = 2e-6
FLOAT32_RATIO = 2.0

STEPS = 20


@dataclass(frozen=True)
class Line:
    """One line of the report."""

    name: str
    dtype: str
    measured: float
    allowed: float
    floor: float | None = None
    """The same quantity between torch in this dtype and torch in float64, where that is another."""
    where: str = ""
    """Where the largest difference is."""

    @property
    def passed(self) -> bool:
        return bool(self.measured <= self.allowed)


def check(
    source: Checkpoint, other: Checkpoint, batch: int = 4, time: int = 64, decode: int = 48
) -> Iterator[Line]:
    """All lines of the report, as they are measured.

    Torch computes with the weights of `source`, JAX with those of `other`.
    """
    model = source.model
    if other.model != model:
        raise InputError(f"{other.path} is a checkpoint of another model than {source.path}")
    time = min(time, model.max_seq_len - 1)
    decode = min(decode, model.max_seq_len - 8)
    jax.config.update("jax_enable_x64", True)
    random = np.random.default_rng(0)
    tokens_nBS = random.integers(0, model.vocab_size, (STEPS, batch, time + 1), dtype=np.int32)

    yield from _forward(source, other, tokens_nBS[0])
    yield from _training(source, other, tokens_nBS)
    yield from _decoding(source, other, tokens_nBS[0][:, :8], decode)
    yield from _round_trip(source)


def _forward(source: Checkpoint, other: Checkpoint, tokens_BS: np.ndarray) -> Iterator[Line]:
    """Logits and the output of every layer, in float64 and against float64."""
    inputs_BT = tokens_BS[:, :-1]
    truth, truth_trace = _torch_forward(source, "float64", inputs_BT)
    mirror, mirror_trace = _jax_forward(other, "float64", inputs_BT)
    yield Line("logits", "float64", distance(mirror, truth), FLOAT64)
    for i, (ours, theirs) in enumerate(zip(mirror_trace, truth_trace, strict=True)):
        name = "embeddings" if i == 0 else f"after layer {i - 1}"
        yield Line(f"hidden states {name}", "float64", distance(ours, theirs), FLOAT64)
    torch32 = distance(_torch_forward(source, "float32", inputs_BT)[0], truth)
    jax32 = distance(_jax_forward(other, "float32", inputs_BT)[0], truth)
    yield Line("torch logits from float64", "float32", torch32, FLOAT32_LOGITS, jax32)
    yield Line("JAX logits from float64", "float32", jax32, FLOAT32_LOGITS, torch32)
    # Neither may be worse by more than the factor: a hidden TF32 or bfloat16 product would be.
    ratio = max(torch32, jax32) / max(min(torch32, jax32), float(np.finfo(np.float32).eps) / 16)
    yield Line("ratio of the two distances", "float32", ratio, FLOAT32_RATIO)


def _training(source: Checkpoint, other: Checkpoint, tokens_nBS: np.ndarray) -> Iterator[Line]:
    """Loss and gradients of the first batch, and every parameter after 20 AdamW steps."""
    dtype: Dtype = "float64"
    config = _training_config(source.model, tokens_nBS.shape, dtype)
    torch_loss, torch_grads = _torch_gradients(source, config, tokens_nBS[0])
    jax_loss, jax_grads = _jax_gradients(other, config, tokens_nBS[0])
    yield Line("loss", dtype, abs(jax_loss - torch_loss) / abs(torch_loss), FLOAT64)
    yield _worst("every gradient", dtype, jax_grads, torch_grads)
    torch_params, torch_losses = _torch_steps(source, config, tokens_nBS)
    jax_params, jax_losses = _jax_steps(other, config, tokens_nBS)
    yield _worst(f"every parameter after {STEPS} AdamW steps", dtype, jax_params, torch_params)
    drift = np.abs(np.array(jax_losses) / np.array(torch_losses) - 1)
    step = int(drift.argmax())
    yield Line(f"loss of {STEPS} AdamW steps", dtype, drift[step], FLOAT64, where=f"step {step}")


def _decoding(
    source: Checkpoint, other: Checkpoint, prompts_BT: np.ndarray, new_tokens: int
) -> Iterator[Line]:
    """Tokens that differ: greedy and sampled, and greedy with the cache against without."""
    from mooshak_jax import checkpoint as jax_checkpoint
    from mooshak_jax.generate import generate as jax_generate
    from mooshak_torch.generate import generate as torch_generate

    prompts = prompts_BT.tolist()
    for dtype in ("float64", "float32"):
        torch_model = _torch_model(source, dtype)
        graphdef, params = jax_checkpoint.graph(source.model, dtype), _jax_params(other, dtype)
        for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
            ours = torch_generate(torch_model, prompts, new_tokens, temperature)
            theirs = jax_generate(graphdef, params, prompts, new_tokens, temperature)
            different = float((ours != theirs).sum())
            yield Line(f"{name} tokens that differ, of {ours.size}", dtype, different, 0.0)
            if temperature == 0.0:
                full_BT = torch.from_numpy(np.concatenate([prompts_BT, ours], 1)).long()
                with torch.no_grad():
                    argmax_BT = torch_model(full_BT).argmax(-1).numpy()
                again = argmax_BT[:, prompts_BT.shape[1] - 1 : -1]
                yield Line(
                    "greedy tokens that differ without KV cache",
                    dtype,
                    float((again != ours).sum()),
                    0.0,
                )


def _round_trip(source: Checkpoint) -> Iterator[Line]:
    """Tensors that change bits from torch to JAX to torch to interchange."""
    with tempfile.TemporaryDirectory(prefix="parity-") as directory:
        here = Path(directory)
        interchange.write_checkpoint(here / "start", source)
        path = here / "start"
        for i, kind in enumerate(("torch", "jax", "torch", "safetensors")):
            convert(path, here / f"{i}-{kind}", kind)
            path = here / f"{i}-{kind}"
        end = open_any(path)
        changed = [key for key in source.tensors if not _same_bits(source.read(key), end.read(key))]
        kept = end.trainer_state == source.trainer_state
        name = "round trip torch, JAX, torch: tensors that change"
        where = (changed or [""])[0] if kept else "trainer_state.json"
        yield Line(name, "bits", float(len(changed) + (not kept)), 0.0, where=where)


def _same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def distance(measured: np.ndarray, truth: np.ndarray) -> float:
    """Relative difference by the Frobenius norm, computed in float64."""
    truth = truth.astype(np.float64)
    difference = np.linalg.norm((measured.astype(np.float64) - truth).ravel())
    norm = np.linalg.norm(truth.ravel())
    return float(difference / norm) if norm else float(difference)


def _worst(
    name: str, dtype: str, measured: dict[str, np.ndarray], truth: dict[str, np.ndarray]
) -> Line:
    assert measured.keys() == truth.keys()
    distances = {key: distance(measured[key], truth[key]) for key in truth}
    where = max(distances, key=lambda key: distances[key])
    return Line(name, dtype, distances[where], FLOAT64, where=where)


def _training_config(model: ModelConfig, shape: tuple[int, ...], dtype: Dtype) -> Config:
    """A recipe in which everything acts: clipping, weight decay, schedule, accumulation."""
    _, batch, time = shape
    return Config(
        model=model,
        optimizer=OptimizerConfig(learning_rate=1e-3, weight_decay=0.1, clip_norm=0.5),
        schedule=ScheduleConfig(warmup_steps=5),
        train=TrainConfig(
            steps=STEPS,
            batch_size=batch,
            sequence_length=time - 1,
            accumulation=2 if batch % 2 == 0 else 1,
            dtype=dtype,
            loss_chunk=batch * 24,
        ),
        parallel=ParallelConfig(mesh="data=1"),
    )


def _torch_model(source: Checkpoint, dtype: Dtype) -> Model:
    from mooshak_torch.checkpoint import fill

    model = Model(source.model, dtype)
    fill(dict(model.named_parameters()), source)
    return model


def _jax_params(source: Checkpoint, dtype: Dtype) -> dict:
    from mooshak_jax.checkpoint import abstract_params, fill

    return fill(abstract_params(source.model, dtype), source.read)


def _torch_forward(
    source: Checkpoint, dtype: Dtype, tokens_BT: np.ndarray
) -> tuple[np.ndarray, list[np.ndarray]]:
    trace: list[torch.Tensor] = []
    with torch.no_grad():
        logits = _torch_model(source, dtype)(torch.from_numpy(tokens_BT).long(), trace=trace)
    return logits.numpy(), [x.double().numpy() for x in trace]


def _jax_forward(
    source: Checkpoint, dtype: Dtype, tokens_BT: np.ndarray
) -> tuple[np.ndarray, list[np.ndarray]]:
    from mooshak_jax.checkpoint import graph, join

    @jax.jit
    def forward(params: dict, tokens: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        trace: list[jax.Array] = []
        return join(graph(source.model, dtype), params)(tokens, trace=trace), trace

    logits, trace = forward(_jax_params(source, dtype), tokens_BT)
    return np.asarray(logits), [np.asarray(x) for x in trace]


def _torch_gradients(
    source: Checkpoint, config: Config, batch_BS: np.ndarray
) -> tuple[float, dict[str, np.ndarray]]:
    from mooshak_torch.train import Objective

    model = _torch_model(source, config.train.dtype)
    loss = Objective(model, config.train.loss_chunk)(torch.from_numpy(batch_BS).long())
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(loss, parameters)
    return loss.item(), {name: g.numpy() for name, g in zip(names, grads, strict=True)}


def _jax_gradients(
    source: Checkpoint, config: Config, batch_BS: np.ndarray
) -> tuple[float, dict[str, np.ndarray]]:
    from mooshak_jax.checkpoint import graph
    from mooshak_jax.train import objective

    graphdef = graph(source.model, config.train.dtype)
    function = jax.jit(
        jax.value_and_grad(lambda p, b: objective(graphdef, config.train.loss_chunk, p, b))
    )
    loss, grads = function(_jax_params(source, config.train.dtype), batch_BS)
    return float(loss), _canonical(grads)


def _torch_steps(
    source: Checkpoint, config: Config, tokens_nBS: np.ndarray
) -> tuple[dict[str, np.ndarray], list[float]]:
    from mooshak_torch.optimizer import make_optimizer
    from mooshak_torch.parallel import make_parallel
    from mooshak_torch.train import Objective, train_step

    parallel = make_parallel(config)
    model = _torch_model(source, config.train.dtype)
    optimizer = make_optimizer(model, config.optimizer)
    objective = Objective(model, config.train.loss_chunk)
    losses = []
    for step, batch_BS in enumerate(tokens_nBS):
        rate = learning_rate(config, step)
        batch = torch.from_numpy(batch_BS).long()
        losses.append(train_step(objective, optimizer, batch, rate, config, parallel)[0].item())
    return {name: p.detach().numpy() for name, p in model.named_parameters()}, losses


def _jax_steps(
    source: Checkpoint, config: Config, tokens_nBS: np.ndarray
) -> tuple[dict[str, np.ndarray], list[float]]:
    from mooshak_jax.parallel import make_parallel
    from mooshak_jax.train import initial_state, make_train_step

    parallel = make_parallel(config)
    update = make_train_step(config, parallel)
    state = initial_state(_jax_params(source, config.train.dtype))
    state = jax.device_put(state, parallel.replicated)
    losses = []
    for step, batch_BS in enumerate(tokens_nBS):
        state, loss, _ = update(state, parallel.put(batch_BS), learning_rate(config, step))
        losses.append(float(loss))
    return _canonical(state["params"]), losses


def _canonical(tree: dict) -> dict[str, np.ndarray]:
    from mooshak_jax.checkpoint import canonical_name, to_canonical

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {canonical_name(path): to_canonical(path, np.asarray(leaf)) for path, leaf in leaves}


def drawn(model: ModelConfig, seed: int = 0) -> Checkpoint:
    """A model that never was a checkpoint: initial weights, and gains drawn around one.

    Its matrices have standard deviation 1 / sqrt(width), 0.07 for the demo. At 0.02 and with gains
    of one, removing RoPE or swapping two norms would hide below any tolerance.
    """

    def read(name: str) -> np.ndarray:
        return initial_weight(model, seed, name, dtype=np.float64, gain_std=0.2)

    tensors = {n: (np.dtype(np.float64), s) for n, s in model.parameter_shapes().items()}
    return Checkpoint(Path("(drawn)"), "drawn", model, None, tensors, read)


def write_report(lines: list[Line], directory: Path, title: str) -> None:
    """Write `parity.json` and `parity.md`."""
    directory.mkdir(parents=True, exist_ok=True)
    rows = [asdict(line) | {"passed": line.passed} for line in lines]
    report = {"source": title, "passed": all(line.passed for line in lines), "lines": rows}
    write_atomically(directory / "parity.json", json.dumps(report, indent=2) + "\n")
    head = "| what | dtype | measured | allowed | other | |\n|---|---|---|---|---|---|\n"
    write_atomically(
        directory / "parity.md",
        f"# Parity of {title}\n\n"
        + head
        + "".join(f"| {' | '.join(_cells(line))} |\n" for line in lines),
    )


def _cells(line: Line) -> list[str]:
    return [
        line.name + (f" (largest: {line.where})" if line.where else ""),
        line.dtype,
        f"{line.measured:.2g}",
        f"{line.allowed:.2g}",
        "" if line.floor is None else f"{line.floor:.2g}",
        "pass" if line.passed else "FAIL",
    ]


@command
def main() -> None:
    # JAX is imported by now: the environment variable would be read no more.
    jax.config.update("jax_platforms", "cpu")
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", type=Path, help="a checkpoint of any kind, or a *.yaml")
    parser.add_argument("other", type=Path, nargs="?", help="a checkpoint for JAX to compute with")
    parser.add_argument("--out", type=Path, help="directory for parity.json and parity.md")
    args = parser.parse_args()
    if args.source.suffix in (".yaml", ".yml"):
        source = drawn(configuration.load(args.source).model)
    else:
        source = open_any(args.source)
    other = source if args.other is None else open_any(args.other)
    table = Table(
        "what", "dtype", "measured", "allowed", "other", "", title=f"parity of {args.source}"
    )
    lines = []
    for line in check(source, other):
        lines.append(line)
        table.add_row(*_cells(line), style="" if line.passed else "bold red")
    print_table(table)
    if args.out:
        write_report(lines, args.out, str(args.source))
    if failed := [line.name for line in lines if not line.passed]:
        print(f"{len(failed)} of {len(lines)} lines failed: {failed[0]}")
        sys.exit(1)


if __name__ == "__main__":
    main()
