"""Typical mistakes, injected into one framework on purpose: each must be found by the check.

A fault replaces a function of the framework, or reads a checkpoint wrongly. Faults are the negative
controls of `parity.check`; `tests/parity/test_faults.py` injects every one.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

import mooshak_jax.decode
import mooshak_jax.objectives
import mooshak_jax.ops.cross_entropy
import mooshak_jax.optimizer
import mooshak_jax.rope
import mooshak_torch.decode
import mooshak_torch.objectives
import mooshak_torch.ops.cross_entropy
import mooshak_torch.optimizer
import mooshak_torch.rope
from mooshak.checkpoints.base import FULL_SLICE, Checkpoint
from parity.faults import model as m
from parity.faults import sft
from parity.faults import training as t
from parity.faults.fault import Fault
from parity.faults.grpo import GRPO
from parity.faults.model import jm, tm
from parity.faults.preferences import PREFERENCES


@contextmanager
def inject_fault(name: str, framework: str) -> Iterator[None]:
    """Inject a fault into `torch` or `JAX`, inside the block."""
    patches = FAULTS[name].torch if framework == "torch" else FAULTS[name].jax
    assert patches is not None, f"{name} is a fault of checkpoints"
    # Functions compiled without the fault, or with it, must not be reused.
    jax.clear_caches()
    try:
        with ExitStack() as stack:
            for target, attribute, value in patches():
                stack.enter_context(mock.patch.object(target, attribute, value))
            yield
    finally:
        jax.clear_caches()


def renamed(names: dict[str, str]) -> Callable[[Checkpoint], Checkpoint]:
    """Read the tensor `names[key]` instead of `key`."""

    def change(source: Checkpoint) -> Checkpoint:
        def read(key: str, rows: slice = FULL_SLICE) -> np.ndarray:
            return source.read(names.get(key, key), rows)

        return replace(source, read=read)

    return change


def changed(key: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[..., Checkpoint]:
    """Read the tensor `key` with a change applied."""

    def changed(source: Checkpoint) -> Checkpoint:
        def read(k: str, rows: slice = FULL_SLICE) -> np.ndarray:
            return change(source.read(k))[rows] if k == key else source.read(k, rows)

        return replace(source, read=read)

    return changed


def swapped(a: str, b: str) -> dict[str, str]:
    return {a: b, b: a}


_LAYER = (
    "attention.wq.weight",
    "attention.wk.weight",
    "attention.wv.weight",
    "mlp_norm.weight",
    "mlp.w1.weight",
    "mlp.w2.weight",
    "mlp.w3.weight",
    "output_norm.weight",
)
_PERMUTED = {
    key: value
    for name in _LAYER
    for key, value in swapped(f"layers.1.{name}", f"layers.2.{name}").items()
}

FAULTS = {
    "RoPE turns neighbours, not halves": Fault(
        "forward",
        "^layer 0 attention, RoPE of q",
        torch=lambda: [(tm.Rope, "forward", m.rotate_pairs_torch)],
        jax=lambda: [(jm.Rope, "__call__", m.rotate_pairs_jax)],
    ),
    "RoPE theta 1 % off": Fault(
        "forward",
        "^layer 0 attention, RoPE of q",
        lambda: m.rope_theta(mooshak_torch.rope),
        lambda: m.rope_theta(mooshak_jax.rope),
    ),
    "wq and wk of layer 1 swapped": Fault(
        "forward",
        "^layer 1 attention, wq$",
        read=renamed(swapped("layers.1.attention.wq.weight", "layers.1.attention.wk.weight")),
    ),
    "square wv of layer 1 transposed": Fault(
        "forward",
        "^layer 1 attention, wv$",
        read=changed("layers.1.attention.wv.weight", np.transpose),
    ),
    "RMSNorm epsilon 1e-6": Fault(
        "forward",
        "^layer 0 mlp_norm$",
        lambda: m.norm_eps(tm.RMSNorm),
        lambda: m.norm_eps(jm.RMSNorm),
    ),
    "RMSNorm mean over time": Fault(
        "forward", "^layer 0 mlp_norm$", lambda: m.norm_torch(axis=1), lambda: m.norm_jax(axis=1)
    ),
    "RMSNorm gain plus one": Fault(
        "forward",
        "^layer 0 mlp_norm$",
        lambda: m.norm_torch(offset=1),
        lambda: m.norm_jax(offset=1),
    ),
    "norm after the MLP": Fault(
        "forward",
        "^layer 0, input of (mlp_norm|mlp)",
        lambda: m.changed_block(tm.MooshakBlock, "forward", norm_after=True, residual=True),
        lambda: m.changed_block(jm.MooshakBlock, "__call__", norm_after=True, residual=True),
    ),
    "residual of the attention missing": Fault(
        "forward",
        "^layer 0, input of mlp_norm",
        lambda: m.changed_block(tm.MooshakBlock, "forward", norm_after=False, residual=False),
        lambda: m.changed_block(jm.MooshakBlock, "__call__", norm_after=False, residual=False),
    ),
    "GELU for SiLU": Fault("forward", "^layer 0 mlp, silu", m.gelu_torch, m.gelu_jax),
    "w1 and w3 of layer 0 swapped": Fault(
        "forward",
        "^layer 0 mlp, w1$",
        read=renamed(swapped("layers.0.mlp.w1.weight", "layers.0.mlp.w3.weight")),
    ),
    "mask one position too late": Fault(
        "forward",
        "^layer 0 attention, softmax",
        lambda: m.changed_attend(tm, m.late_mask_torch),
        lambda: m.changed_attend(jm, m.late_mask_jax),
    ),
    "attention not scaled": Fault(
        "forward",
        "^layer 0 attention, softmax",
        lambda: m.changed_attend(tm, m.unscaled),
        lambda: m.changed_attend(jm, m.unscaled),
    ),
    "softmax in float32 inside float64": Fault(
        "forward",
        "^layer 0 attention, softmax",
        lambda: m.changed_attend(tm, m.softmax32_torch),
        lambda: m.changed_attend(jm, m.softmax32_jax),
    ),
    "bfloat16 products inside float32": Fault(
        "precision",
        "^layer 0 attention, wq$",
        lambda: m.rounded_inputs(tm.Linear, "forward", m.round_torch),
        lambda: m.rounded_inputs(jm.Linear, "__call__", m.round_jax),
    ),
    "embedding times sqrt(width)": Fault(
        "forward",
        "^embeddings$",
        lambda: m.scaled_embedding(tm.Embedding, "forward"),
        lambda: m.scaled_embedding(jm.Embedding, "__call__"),
    ),
    "layers 1 and 2 permuted": Fault("forward", "^layer 1 attention, wq$", read=renamed(_PERMUTED)),
    "rows of lm_head permuted": Fault(
        "forward", "^lm_head$", read=changed("lm_head.weight", lambda w: np.roll(w, 1, 0))
    ),
    "labels not shifted": Fault("loss", "^loss", t.unshifted_torch, t.unshifted_jax),
    "padding counts in the loss": Fault(
        "padding",
        "^loss of labels that are padding",
        lambda: t.count_padding(
            (mooshak_torch.ops.cross_entropy, "cross_entropy"),
            (mooshak_torch.ops.cross_entropy, "token_log_probs"),
        ),
        lambda: t.count_padding(
            (mooshak_jax.objectives, "cross_entropy"),
            (mooshak_jax.ops.cross_entropy, "token_log_probs"),
        ),
    ),
    "clipping after the step": Fault(
        "training",
        "^step 0, clipping",
        t.clip_afterwards_torch,
        lambda: t.clip_jax(lambda grads, norm, max_norm: grads),
    ),
    "1e-6 added to the norm that clips": Fault(
        "training",
        "^step 0, clipping",
        t.clip_epsilon_torch,
        lambda: t.clip_jax(
            lambda grads, norm, max_norm: jax.tree.map(
                lambda g: g * jnp.minimum(max_norm / (norm + 1e-6), 1), grads
            )
        ),
    ),
    "decay on gains": Fault(
        "training",
        "^step 0, weight decay of gains",
        lambda: [(mooshak_torch.optimizer, "has_weight_decay", lambda name: True)],
        lambda: [(mooshak_jax.optimizer, "has_weight_decay", lambda name: True)],
    ),
    "decay missing": Fault(
        "training",
        "^step 0, weight decay of matrices",
        lambda: [(mooshak_torch.optimizer, "has_weight_decay", lambda name: False)],
        lambda: [(mooshak_jax.optimizer, "has_weight_decay", lambda name: False)],
    ),
    "beta1 0.91": Fault(
        "training",
        "^step 0, clipping or beta1",
        lambda: t.optimizer_torch(lambda make, model, c: make(model, replace(c, beta1=0.91))),
        lambda: t.optimizer_jax(lambda adamw, s, g, r, c: adamw(s, g, r, replace(c, beta1=0.91))),
    ),
    "beta2 0.999": Fault(
        "training",
        "^step 0, exp_avg_sq",
        lambda: t.optimizer_torch(lambda make, model, c: make(model, replace(c, beta2=0.999))),
        lambda: t.optimizer_jax(lambda adamw, s, g, r, c: adamw(s, g, r, replace(c, beta2=0.999))),
    ),
    "AdamW epsilon ten times as large": Fault(
        "training",
        "^step 0, bias correction or epsilon",
        lambda: t.optimizer_torch(lambda make, model, c: make(model, replace(c, eps=10 * c.eps))),
        lambda: t.optimizer_jax(
            lambda adamw, s, g, r, c: adamw(s, g, r, replace(c, eps=10 * c.eps))
        ),
    ),
    "bias correction missing": Fault(
        "training",
        "^step 0, bias correction or epsilon",
        lambda: t.optimizer_torch(t.uncorrected_torch),
        lambda: t.optimizer_jax(t.uncorrected_jax),
    ),
    "learning rate of the next step": Fault(
        "training",
        "^step 0, learning rate",
        lambda: t.step_torch(t.next_rate),
        lambda: t.step_jax(t.next_rate),
    ),
    "accumulation by sum": Fault("training", "^step 0, accumulation", t.summed_torch, t.summed_jax),
    "data one batch late": Fault(
        "training",
        "^step 1, data order",
        lambda: t.step_torch(t.late_batch),
        lambda: t.step_jax(t.late_batch),
    ),
    "documents see each other": Fault(
        "document_mask",
        "^row 0, document 2, token 0$",
        lambda: m.joined_documents(tm),
        lambda: m.joined_documents(jm),
    ),
    "documents begin one token late": Fault(
        "packing",
        "^row 0, document 2, token 0$",
        lambda: m.late_documents(tm),
        lambda: m.late_documents(jm),
    ),
    "mask of answers off by one": Fault(
        "sft",
        "^mask of the answers one token late",
        lambda: sft.labels_torch(sft.late_mask),
        lambda: sft.labels_jax(sft.late_mask),
    ),
    "end token without label": Fault(
        "sft",
        "^end tokens have no label",
        lambda: sft.labels_torch(sft.without_ends),
        lambda: sft.labels_jax(sft.without_ends),
    ),
    "prompts and padding counted": Fault(
        "sft",
        "^prompts and padding count",
        lambda: sft.labels_torch(sft.all_labels),
        lambda: sft.labels_jax(sft.all_labels),
    ),
    "denominator per micro-batch": Fault(
        "sft",
        "denominator of micro-batches",
        sft.local_denominator_torch,
        sft.local_denominator_jax,
    ),
    "segments leaking": Fault(
        "sft",
        "^conversations of a row see each other",
        lambda: m.joined_documents(tm),
        lambda: m.joined_documents(jm),
    ),
    "KV cache one position late": Fault("cache", "^KV cache", m.late_cache_torch, m.late_cache_jax),
    "KV cache not truncated": Fault(
        "roll_back",
        "^roll-back of the KV cache",
        lambda: m.untruncated(tm),
        lambda: m.untruncated(jm),
    ),
    "rejected tokens are seen": Fault(
        "roll_back",
        "^roll-back of the KV cache",
        lambda: m.rejected_seen(tm),
        lambda: m.rejected_seen(jm),
    ),
    "noise of the next sample": Fault(
        "decoding",
        "^token",
        lambda: m.noise_of_the_next_sample(mooshak_torch.decode),
        lambda: m.noise_of_the_next_sample(mooshak_jax.decode),
    ),
    "top_p ignored": Fault(
        "decoding",
        "^token",
        lambda: m.without_top_p(mooshak_torch.decode),
        lambda: m.without_top_p(mooshak_jax.decode),
    ),
    "drafted tokens not verified": Fault("engines", "^token", m.unverified, m.unverified),
    "norm after the attention": Fault(
        "forward",
        "^layer 0, input of attention$|^layer 0 attention, wq|^layer 0, input of attention",
        lambda: m.norm_after_attention(tm.LlamaBlock, "forward"),
        lambda: m.norm_after_attention(jm.LlamaBlock, "__call__"),
        architecture="llama",
    ),
    "window one position wider": Fault(
        "forward",
        "^layer 0 attention, softmax",
        lambda: m.wider_window(tm),
        lambda: m.wider_window(jm),
        architecture="llama",
    ),
    "frequencies of RoPE not rescaled": Fault(
        "forward",
        "^layer 0 attention, RoPE of q",
        lambda: m.unscaled_frequencies(mooshak_torch.rope),
        lambda: m.unscaled_frequencies(mooshak_jax.rope),
        architecture="llama",
    ),
    "rows of wo permuted": Fault(
        "forward",
        "^layer 1 attention, wo$",
        read=changed("layers.1.attention.wo.weight", lambda w: np.roll(w, 1, 0)),
        architecture="llama",
    ),
    "bias of wk missing": Fault(
        "forward",
        "^layer 1 attention, wk$",
        read=changed("layers.1.attention.wk.bias", np.zeros_like),
        architecture="llama",
    ),
    "norms of queries and keys swapped": Fault(
        "forward",
        "^layer 2 attention, q_norm$",
        read=renamed(
            swapped("layers.2.attention.q_norm.weight", "layers.2.attention.k_norm.weight")
        ),
        architecture="llama",
    ),
    "gains of the final norm missing": Fault(
        "forward",
        "^norm$",
        read=changed("norm.weight", np.ones_like),
        architecture="llama",
    ),
    **PREFERENCES,
    **GRPO,
}
"""Name -> fault."""
