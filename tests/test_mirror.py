"""Both packages have the same public names, signatures and order, but for the differences below.

`forward` of a torch module and `__call__` of a Flax module are one method. Names without a leading
underscore are public; the order of constants, annotated fields and properties is not compared.
"""

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAIRS = (
    "__init__",
    "ops/matmul",
    "ops/activations",
    "ops/attention",
    "ops/cross_entropy",
    "kv_cache",
    "rope",
    "lora",
    "model",
    "params",
    "checkpoint",
    "objectives",
    "step",
    "optimizer",
    "device",
    "sampling",
    "decode",
    "cached_model",
    "engine",
    "generate",
    "serve",
    "lm",
    "train",
    "sft",
    "dpo",
    "grpo",
    "rollouts",
    "evaluate",
    "evaluator",
    "exact_match",
    "reference",
    "plan",
    "planner",
    "profile",
    "distributed/mesh",
)
IN_PLACE = "torch changes an existing module in place, JAX returns a tree of sharded arrays"
FUNCTIONAL = "JAX compiles functions of (graph definition, parameters), torch calls a module"
MUTABLE = "torch's optimizer is an object with state, JAX's a function from state to state"
HEAD = "a Flax kernel is the transpose of a torch weight"
ROPE = (
    "torch's tables have full width: on a CPU, rotating halves takes 2 times as long for one token "
    "and 5 times for 4 x 512 tokens. XLA fuses halves; full width would change its last bits"
)
MACHINES = "GPUs with strategies are modelled, TPU slices are compiled for"
ALLOWED: dict[str, dict[str, str]] = {
    "ops/matmul": {
        "MIN_PACKED_TOKENS": "oneDNN's blocked layout; XLA chooses its own",
        "MIN_PACKED_TOKENS_OF_ONE_ROW": "oneDNN's blocked layout; XLA chooses its own",
        "MAX_PACKED_BYTES": "oneDNN's blocked layout; XLA chooses its own",
        "PACKED_FOR_ROWS": "oneDNN's blocked layout; XLA chooses its own",
        "ONEDNN": "PyTorch has two libraries for CPUs, XLA one",
        "PRECISION": "a flag in torch, an argument of every product in JAX",
        "linear": "JAX gathers sharded weights and adds the bias inside its custom gradient",
        "matmul": "torch's products are 2-D; JAX's have several output axes: einsum",
        "einsum": "JAX's counterpart of matmul",
        "pack_weights_for_decode": "oneDNN's blocked layout; XLA chooses its own",
        "onednn_is_faster": "PyTorch has two libraries for CPUs, XLA one",
    },
    "ops/activations": {
        "rotate": ROPE,
        "VECTORS": "loops of PyTorch's on a CPU; XLA compiles a shape to one loop",
        "GRAIN": "loops of PyTorch's on a CPU; XLA compiles a shape to one loop",
        "recompute_in_backward": "autograd saves what XLA recomputes by itself",
    },
    "ops/attention": {
        "QUERY_CHUNK": "SDPA is a kernel; JAX computes in chunks of queries",
        "block_attention": "SDPA's bits do not depend on later blocks of masked keys",
        "attention": "SDPA is causal without a mask; JAX takes first keys for its chunks",
        "needs_document_mask": "torch on a CPU calls SDPA per document; JAX masks in its chunks",
        "document_mask": "torch on a CPU calls SDPA per document; JAX masks in its chunks",
    },
    "ops/cross_entropy": {
        "HEAD_ROWS": "torch adds to a gradient in place, JAX scans over the vocabulary",
        "FusedLinearCrossEntropy": "FSDP gathers the parameters of modules only",
        "cross_entropy": HEAD,
        "token_log_probs": HEAD,
    },
    "device": {
        "find_device": "PyTorch runs on one device, a JAX mesh takes a list",
        "find_devices": "PyTorch runs on one device, a JAX mesh takes a list",
    },
    "kv_cache": {
        "check_index": "torch raises an error for an index out of range, JAX takes another",
        "KVCache.n_blocks": "data of a compiled step; torch has `written` on the host",
        "KVCache.__init__": "JAX's is a dataclass of the same arguments",
    },
    "rope": {
        "Positions.cos_BT1K": ROPE,
        "Positions.sin_BT1K": ROPE,
        "Positions.cos_BT1k": ROPE,
        "Positions.sin_BT1k": ROPE,
        "Rope.cos": "torch's tables are buffers, which move with the module",
        "Rope.sin": "torch's tables are buffers, which move with the module",
    },
    "model": {
        "PRODUCT": "names for jax.checkpoint; torch recomputes by module (apply_ac)",
        "REMAT": "names for jax.checkpoint; torch recomputes by module (apply_ac)",
        "Linear.__init__": "a Flax parameter has logical axes",
        "Linear.bias": "declared for mypy",
        "RMSNorm.recompute": "for recompute_in_backward",
        "Model.__init__": "torch applies activation checkpointing to a model (apply_ac)",
        "Model.head_VD": HEAD,
        "Model.head_DV": HEAD,
    },
    "lora": {
        "disable_adapters": IN_PLACE,
        "Matrix.__init__": "a Flax parameter has logical axes",
    },
    "params": {
        "abstract_params": FUNCTIONAL,
        "without_adapters": FUNCTIONAL,
        "make_graphdef": FUNCTIONAL,
        "merge": FUNCTIONAL,
        "split_trained": FUNCTIONAL,
        "join": FUNCTIONAL,
        "load_params": IN_PLACE,
        "gather_weights": FUNCTIONAL,
        "initialize": IN_PLACE,
        "numpy_dtype": "JAX's arrays have NumPy dtypes",
        "to_numpy": "JAX's arrays have NumPy dtypes",
        "to_torch": "JAX's arrays have NumPy dtypes",
        "local_shard": "JAX's arrays know the shards of each device",
    },
    "checkpoint": {
        "start_saving": "collectives of torch's saves need their own process group",
        "restore": IN_PLACE,
        "load_init_weights": IN_PLACE,
        "load_model": "JAX loads into any sharding and layout; torch loads on one device",
    },
    "objectives": {
        "CausalLM.__init__": "JAX's is a dataclass",
        "CausalLM.graphdef": FUNCTIONAL,
        "CausalLM.chunk": FUNCTIONAL,
        "CausalLM.prepare": "torch sums over processes, JAX sees the global batch",
        "CausalLM.forward": FUNCTIONAL,
        "CausalLM.complete": FUNCTIONAL,
        "PreferenceLM.complete": FUNCTIONAL,
        "CausalLM.measure": "torch sums metrics in the module",
        "PreferenceLM.__init__": "JAX's is a dataclass",
        "PreferenceLM.dpo": FUNCTIONAL,
        "PreferenceLM.prepare": "torch sums over processes, JAX sees the global batch",
        "PreferenceLM.forward": FUNCTIONAL,
        "PreferenceLM.log_probs": "FSDP gathers the parameters for `forward` only",
        "PreferenceLM.measure": "torch sums metrics in the module",
        "PolicyLM.__init__": "JAX's is a dataclass",
        "PolicyLM.grpo": FUNCTIONAL,
        "PolicyLM.forward": FUNCTIONAL,
        "PolicyLM.log_probs": "FSDP gathers the parameters for `forward` only",
        "PolicyLM.measure": "torch sums metrics in the module",
        "compile_forward": FUNCTIONAL,
        "unwrap": "DDP and DeepSpeed wrap the module",
        "model_of": "DDP and DeepSpeed wrap the module",
    },
    "step": {
        "make_state": MUTABLE,
        "make_loss_scale": "float16, which JAX does not train",
        "train_step": MUTABLE,
        "initial_state": MUTABLE,
        "abstract_state": MUTABLE,
        "make_train_step": MUTABLE,
        "abstract_metrics": FUNCTIONAL,
        "make_evaluate": FUNCTIONAL,
        "evaluate": FUNCTIONAL,
        "set_matmul_precision": "JAX has float64 in its x64 mode only",
        "cache_compilations": "JAX compiles every step",
    },
    "reference": {
        "Reference": FUNCTIONAL,
        "make_reference": FUNCTIONAL,
        "add_reference": FUNCTIONAL,
        "make_log_probs": FUNCTIONAL,
        "compute_log_probs": FUNCTIONAL,
    },
    "optimizer": {
        "Optimizer": MUTABLE,
        "make_optimizer": MUTABLE,
        "moments": MUTABLE,
        "set_step": MUTABLE,
        "adamw": MUTABLE,
        "clip_gradients": IN_PLACE,
        "LossScale": "float16, which JAX does not train",
        "first_nonfinite": "JAX checks the state in one compiled function",
    },
    "decode": {
        "generate": FUNCTIONAL,
        "generate_tokens": FUNCTIONAL,
    },
    "cached_model": {
        "CachedModel.__init__": FUNCTIONAL,
    },
    "lm": {
        "LM.__init__": FUNCTIONAL,
        "load": "`compiled`: JAX always compiles",
    },
    "serve": {
        "serve": "JAX serves a mesh over several processes",
    },
    "planner": {
        "plan": MACHINES,
        "sweep": MACHINES,
        "activation_bytes": MACHINES,
    },
    "profile": {
        "prepare_profiler": "JAX's profiler loads libtpu",
    },
    "distributed/mesh": {
        "DEFAULT_MESHES": "of torch's strategies",
        "COLLECTIVES": "for explain_timeouts",
        "WAITING": "for explain_timeouts",
        "LAUNCHER": "torchrun's environment; JAX has options of its own",
        "SHUTDOWN_SECONDS": "of JAX's coordinator; torch has parallel.timeout",
        "check_fsdp": "FSDP2 shards any width, JAX only what the axis divides",
        "Parallel.device": "a torch process has one device",
        "Parallel.strategy": "JAX has one strategy: shardings on the mesh",
        "Parallel.checkpoint_group": "collectives of torch's saves need their own process group",
        "Parallel.dp_rank": "a JAX process may hold several shards of the batch",
        "Parallel.explain_timeouts": "JAX ends processes whose peers fail",
        "Parallel.sum": "JAX sums in the compiled step",
        "Parallel.replicated": "shardings of arrays",
        "Parallel.batch_sharding": "shardings of arrays",
        "Parallel.sharding": "shardings of arrays",
        "Parallel.compiler_options": "XLA's",
        "Parallel.shard_global_batch": "a torch process slices a full batch itself",
        "Parallel.activate": "shardings apply inside compiled functions",
        "make_parallel": "a plan's mesh has devices of an absent machine",
        "make_mesh": "the Python API computes on a mesh in JAX only",
        "join": "`serve` has processes in JAX only",
    },
}
"""File -> name of a class, function, `Class.method` or `Class.attribute` -> reason."""
ONE_SIDED = ("planner",)
"""Files in which a function of one framework only needs no entry of its own: see MACHINES."""


@dataclass
class Interface:
    """Public names of a file: functions in order with their parameters, attributes, constants."""

    signatures: dict[str, str] = field(default_factory=dict)
    attributes: set[str] = field(default_factory=set)


def interface(source: str) -> Interface:
    found = Interface()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            found.signatures[node.name] = signature(node)
        if isinstance(node, ast.Assign):
            targets = (inner for target in node.targets for inner in ast.walk(target))
            names = {target.id for target in targets if isinstance(target, ast.Name)}
            found.attributes |= {name for name in names if name.isupper() and name[0] != "_"}
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            found.signatures[node.name] = "class"
            for name, value in members(node):
                if value is None:
                    found.attributes.add(f"{node.name}.{name}")
                else:
                    found.signatures[f"{node.name}.{name}"] = value
    return found


def members(node: ast.ClassDef) -> Iterator[tuple[str, str | None]]:
    """Yield the public methods of a class with their signatures, and its attributes with None."""
    for member in node.body:
        if isinstance(member, ast.AnnAssign) and isinstance(member.target, ast.Name):
            yield member.target.id, None
        elif isinstance(member, ast.FunctionDef):
            name = {"__call__": "forward"}.get(member.name, member.name)
            if name.startswith("_") and name != "__init__":
                continue
            decorators = {ast.unparse(d).rpartition(".")[2] for d in member.decorator_list}
            yield name, None if decorators & {"property", "setter"} else signature(member)


def signature(node: ast.FunctionDef) -> str:
    """Return the parameters with their defaults, without types."""
    arguments = node.args
    for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
        argument.annotation = None
    return ast.unparse(arguments)


def compare(torch: str, jax: str, allowed: Mapping[str, str], one_sided: bool = False) -> list[str]:
    """Return the differences of two files that are not allowed, and stale entries of `allowed`."""
    ours, theirs = interface(torch), interface(jax)
    common = set(ours.signatures) & set(theirs.signatures)
    different = {name for name in common if ours.signatures[name] != theirs.signatures[name]}
    single = set(ours.signatures) ^ set(theirs.signatures) | (ours.attributes ^ theirs.attributes)
    # A class of one framework stands for its members; a plan's functions are its framework's own.
    single = {name for name in single if name.partition(".")[0] not in single - {name}}
    if one_sided:
        single = set()
    found = [f"{name}: {ours.signatures[name]} / {theirs.signatures[name]}" for name in different]
    found = [line for line in found if line.partition(":")[0] not in allowed]
    found += [f"{name}: in one framework only" for name in single - set(allowed)]
    found += [f"{name}: no longer different" for name in set(allowed) - different - single]
    orders = [[n for n in side.signatures if n in common] for side in (ours, theirs)]
    if orders[0] != orders[1]:
        found.append(f"order: {orders[0]} / {orders[1]}")
    return sorted(found)


def sources(pair: str) -> tuple[str, str]:
    torch, jax = (
        (ROOT / f"mooshak_{side}" / f"{pair}.py").read_text() for side in ("torch", "jax")
    )
    return torch, jax


@pytest.mark.parametrize("pair", PAIRS)
def test_mirror(pair: str) -> None:
    assert compare(*sources(pair), ALLOWED.get(pair, {}), pair in ONE_SIDED) == []


def test_every_file_of_both_packages_is_a_pair() -> None:
    files = [
        {
            str(path.relative_to(ROOT / f"mooshak_{side}").with_suffix(""))
            for path in (ROOT / f"mooshak_{side}").rglob("*.py")
        }
        for side in ("torch", "jax")
    ]
    assert files[0] & files[1] == {*PAIRS, "ops/__init__", "distributed/__init__"}
    assert set(ALLOWED) <= set(PAIRS)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("def select(self, rows:", "def pick(self, rows:", "KVCache.pick: in one framework only"),
        ("def select(self, rows:", "def select(self, ids:", "KVCache.select: self, rows / self, i"),
        ("def _extra", "def extra", "extra: in one framework only"),
        ("written: bool", "filled: bool", "KVCache.filled: in one framework only"),
        ("k_BTGK: Array, v_BTGK", "v_BTGK: Array, k_BTGK", "KVCache.update: self, k_BTGK, v_BTGK"),
    ],
)
def test_compare_finds_a_difference(old: str, new: str, message: str) -> None:
    torch, jax = sources("kv_cache")
    jax += "\n\ndef _extra() -> None: ...\n"
    assert old in jax
    assert compare(torch, jax, ALLOWED["kv_cache"]) == []
    found = compare(torch, jax.replace(old, new), ALLOWED["kv_cache"])
    assert any(line.startswith(message) for line in found), found


def test_compare_finds_another_order_and_a_stale_entry() -> None:
    first, second = "def a(): ...\n", "def b(): ...\n"
    assert compare(first + second, second + first, {}) == ["order: ['a', 'b'] / ['b', 'a']"]
    assert compare(first, first, {"a": "reason"}) == ["a: no longer different"]
