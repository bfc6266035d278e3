"""Cross entropy and log-probabilities per token, with the logits of one chunk in memory.

Mirror: mooshak_torch/ops/cross_entropy.py. `cross_entropy` computes its gradients in the forward
pass. The gradients of `token_log_probs` depend on those of its result. Both compute a chunk's
logits twice: for the normalizer of the softmax, and for the gradients.

Chunks split the vocabulary, not the tokens as in torch: a chunk of an output head that is sharded
over `fsdp` is gathered for each use, and its gradient is complete after one chunk and is reduced
into its shards, so that no device ever holds the full head or its full gradient.
Shapes: B batch, T time, D model width, V vocabulary = S shards (`tensor`) x n chunks x C tokens.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from mooshak.data.packing import IGNORE_INDEX
from mooshak_jax.distributed.sharding import constrain, gather, shards
from mooshak_jax.ops.matmul import einsum


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def cross_entropy(x_BTD: Array, w_DV: Array, labels_BT: Array, chunk: int) -> Array:
    """Return the sum of -log p(label) over the tokens, in nats, without the labels `IGNORE_INDEX`.

    `x_BTD` are hidden states in the compute dtype and `w_DV` the output head, whose dtype (at least
    float32) is that of the softmax and of the sum. At most `chunk` x V logits are in memory at
    once. The caller divides by the number of labels.
    """
    return _sum_losses(_Chunks(x_BTD, w_DV, labels_BT, chunk))[0]


def _sum_losses(chunks: "_Chunks") -> tuple[Array, Array]:
    """Return the sum, and the log-sum-exp of every token's logits [B, T]."""
    log_z_BT, label_BT = chunks.log_z()
    # Row by row: XLA would sum all tokens in one chain, with four times the rounding error.
    losses_B = jnp.sum((log_z_BT - label_BT) * chunks.is_label_BT, axis=1)
    return jnp.sum(jax.lax.optimization_barrier(losses_B)), log_z_BT


def _cross_entropy_forward(
    x_BTD: Array, w_DV: Array, labels_BT: Array, chunk: int
) -> tuple[Array, tuple[Array, Array]]:
    chunks = _Chunks(x_BTD, w_DV, labels_BT, chunk)
    total, log_z_BT = _sum_losses(chunks)
    return total, chunks.gradients(log_z_BT, chunks.is_label_BT)


def _cross_entropy_backward(
    chunk: int, residuals: tuple[Array, Array], grad: Array
) -> tuple[Array, Array, None]:
    dx_BTD, dw_DV = residuals
    return (dx_BTD * grad).astype(dx_BTD.dtype), dw_DV * grad, None


cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def token_log_probs(
    x_BTD: Array, w_DV: Array, labels_BT: Array, chunk: int, temperature: float = 1.0
) -> Array:
    """Return log p(label) [B, T] of every token in nats; 0 where the label is `IGNORE_INDEX`.

    p is the softmax of the logits divided by `temperature`. Other arguments and dtype of the result
    are as in `cross_entropy`, whose value is the negated sum at temperature 1.
    Differentiable once, for any gradient [B, T] of the result.
    """
    return _log_probs_forward(x_BTD, w_DV, labels_BT, chunk, temperature)[0]


def _log_probs_forward(
    x_BTD: Array, w_DV: Array, labels_BT: Array, chunk: int, temperature: float
) -> tuple[Array, tuple[Array, ...]]:
    chunks = _Chunks(x_BTD, w_DV, labels_BT, chunk, temperature)
    log_z_BT, label_BT = chunks.log_z()
    log_probs_BT = jnp.where(chunks.is_label_BT, label_BT - log_z_BT, 0)
    return constrain(log_probs_BT, "batch", None), (x_BTD, w_DV, labels_BT, log_z_BT)


def _log_probs_backward(
    chunk: int, temperature: float, residuals: tuple[Array, ...], grad_BT: Array
) -> tuple[Array, Array, None]:
    x_BTD, w_DV, labels_BT, log_z_BT = residuals
    chunks = _Chunks(x_BTD, w_DV, labels_BT, chunk, temperature)
    weights_BT = jnp.where(chunks.is_label_BT, -constrain(grad_BT, "batch", None), 0) / temperature
    return *chunks.gradients(log_z_BT, weights_BT), None


token_log_probs.defvjp(_log_probs_forward, _log_probs_backward)


class _Chunks:
    """Logits in n chunks of the vocabulary, one chunk in memory at a time."""

    def __init__(
        self,
        x_BTD: Array,
        w_DV: Array,
        labels_BT: Array,
        chunk: int,
        temperature: float = 1.0,
    ):
        D, V = w_DV.shape
        S = shards("vocab", V)
        n = _count_chunks(V // S, -(-labels_BT.size // chunk))
        w_nDSC = jnp.moveaxis(w_DV.reshape(D, S, n, -1), 2, 0)
        self.scanned = w_nDSC, jnp.arange(V).reshape(S, n, -1).swapaxes(0, 1)
        self.x_BTD = constrain(x_BTD, "batch", None, None)
        self.labels_BT, self.is_label_BT = labels_BT, labels_BT != IGNORE_INDEX
        self.S, self.dtype, self.temperature = S, w_DV.dtype, temperature

    def logits(self, w_DSC: Array, ids_SC: Array) -> tuple[Array, Array, Array]:
        """Return the chunk of the head, its logits, and a mask of the labels among them."""
        narrow_DSC = gather(w_DSC, self.x_BTD.dtype, ("embed", "vocab", None))
        logits_BTSC = einsum("BTD,DSC->BTSC", self.x_BTD, narrow_DSC)
        if self.temperature != 1:
            logits_BTSC /= self.temperature
        return narrow_DSC, logits_BTSC, self.labels_BT[..., None, None] == ids_SC

    def log_z(self) -> tuple[Array, Array]:
        """Return log-sum-exp of every token's logits, and the label's logit, [B, T] each."""

        def add(carry: tuple, scanned: tuple[Array, Array]) -> tuple[tuple, None]:
            """Add a chunk to the sums of exponentials, relative to the maximum so far.

            Online softmax (arXiv:1805.02867).
            """
            max_BTS, sum_BTS, label_BTS = carry
            _, logits_BTSC, is_label_BTSC = self.logits(*scanned)
            new_BTS = jnp.maximum(max_BTS, logits_BTSC.max(-1))
            sum_BTS *= jnp.exp(max_BTS - new_BTS)
            sum_BTS += jnp.exp(logits_BTSC - new_BTS[..., None]).sum(-1)
            # A sum of one logit and zeros: a sharded vocabulary cannot be indexed.
            label_BTS += jnp.where(is_label_BTSC, logits_BTSC, 0).sum(-1)
            return (new_BTS, sum_BTS, label_BTS), None

        zeros_BTS = jnp.zeros((*self.labels_BT.shape, self.S), self.dtype)
        start = (zeros_BTS - jnp.inf, zeros_BTS, zeros_BTS)
        (max_BTS, sum_BTS, label_BTS), _ = jax.lax.scan(add, start, self.scanned)
        log_z_BT = jax.nn.logsumexp(max_BTS + jnp.log(sum_BTS), axis=-1)
        return log_z_BT, label_BTS.sum(-1)

    def gradients(self, log_z_BT: Array, weights_BT: Array) -> tuple[Array, Array]:
        """Return the gradients of x [B, T, D] and w [D, V] of sum(-log p(label) weights)."""
        x_BTD, D = self.x_BTD, self.x_BTD.shape[-1]

        def add(dx_SBTD: Array, scanned: tuple[Array, Array]) -> tuple[Array, Array]:
            narrow_DSC, logits_BTSC, is_label_BTSC = self.logits(*scanned)
            # d -log p(label) / d logits = softmax - one_hot(label).
            d_BTSC = jnp.exp(logits_BTSC - log_z_BT[..., None, None]) - is_label_BTSC
            d_BTSC = (d_BTSC * weights_BT[..., None, None]).astype(x_BTD.dtype)
            dw_DSC = constrain(einsum("BTD,BTSC->DSC", x_BTD, d_BTSC), "embed", "vocab", None)
            dx_SBTD += einsum("BTSC,DSC->SBTD", d_BTSC, narrow_DSC)
            return constrain(dx_SBTD, "vocab", "batch", None, None), dw_DSC

        zeros_SBTD = jnp.zeros((self.S, *x_BTD.shape), self.dtype)
        start_SBTD = constrain(zeros_SBTD, "vocab", "batch", None, None)
        dx_SBTD, dw_nDSC = jax.lax.scan(add, start_SBTD, self.scanned)
        dx_BTD = constrain(dx_SBTD.sum(0), "batch", "sequence", None).astype(x_BTD.dtype)
        dw_DV = jnp.moveaxis(dw_nDSC, 0, 2).reshape(D, -1)
        return dx_BTD, constrain(dw_DV, "embed", "vocab")


def _count_chunks(width: int, wanted: int) -> int:
    """Return the smallest number of chunks of equal size that is at least `wanted`."""
    return next(n for n in range(min(wanted, width), width + 1) if width % n == 0)
