"""Decode the slots of a fixed shape in PyTorch, for mooshak/serving/scheduler.py.

Mirror: mooshak_jax/engine.py.
Shapes: B slots, C tokens of a chunk, S cache slots, D model width, V vocabulary, N most probable.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mooshak.config.model import Dtype
from mooshak.serving import engine
from mooshak.serving.engine import MAX_TOP, StepInputs, TokenLogProbs
from mooshak_torch.kv_cache import KVCache
from mooshak_torch.lm import LM
from mooshak_torch.model import PARAM_DTYPE, Linear, make_caches
from mooshak_torch.ops.matmul import pack_weights_for_decode
from mooshak_torch.sampling import sample


class Engine(engine.Engine):
    """A model in PyTorch with a KV cache of `n_slots` rows."""

    def __init__(
        self,
        lm: LM,
        n_slots: int = 16,
        max_len: int | None = None,
        chunk: int = 128,
        kv_dtype: Dtype | None = None,
    ):
        """Allocate the cache, in `kv_dtype`: by default the compute dtype."""
        super().__init__(lm.config, n_slots, max_len, chunk)
        self.model = lm.model
        self.device = self.model.head_VD.device
        matrices = (m.weight for m in self.model.modules() if isinstance(m, Linear))
        # Many tokens are to come: packing always pays off.
        self.decoder = pack_weights_for_decode(self.model, matrices, n_slots, self.max_len)
        self.caches = make_caches(self.model, n_slots, self.cache_len, kv_dtype, self.block)
        self.rows = [[_row(cache, slot) for cache in self.caches] for slot in range(n_slots)]
        shape = (n_slots, self.config.vocab_size)
        self.logits_BV = torch.zeros(shape, dtype=PARAM_DTYPE[lm.dtype], device=self.device)

    @torch.no_grad()
    def prefill(
        self, slot: int, tokens: Sequence[int], start: int, targets: Sequence[int] | None = None
    ) -> TokenLogProbs | None:
        last = len(tokens) - 1
        tokens_C, positions_C = map(torch.from_numpy, self.pad_chunk(tokens, start))
        tokens_1C = tokens_C.to(self.device).unsqueeze(0)
        positions_1C = positions_C.to(self.device).unsqueeze(0)
        caches = self.rows[slot]
        for cache in caches:
            cache.written = start
        hidden_1CD = self.model.hidden_states(tokens_1C, positions_1C, caches)
        self.logits_BV[slot] = self.model.logits(hidden_1CD[:, last : last + 1])[0, 0]
        if targets is None:
            return None
        logits_CV = self.model.logits(hidden_1CD)[0]
        found = _log_probs(logits_CV, torch.from_numpy(self.pad_chunk(targets, 0)[0]))
        return TokenLogProbs(*(values[: last + 1] for values in found))

    @torch.no_grad()
    def copy_slot(self, source: int, target: int) -> None:
        for cache in self.caches:
            cache.k_BSGK[target] = cache.k_BSGK[source]
            cache.v_BSGK[target] = cache.v_BSGK[source]

    @torch.no_grad()
    def step(self, inputs: StepInputs) -> tuple[np.ndarray, TokenLogProbs | None]:
        uniform_B = torch.from_numpy(inputs.uniform_B).to(self.device)
        token_B = sample(self.logits_BV, uniform_B, inputs.parameters, inputs.adjustments)
        log_probs = _log_probs(self.logits_BV, token_B) if inputs.log_probs else None
        # An accelerator computes the next step while the host waits for these tokens.
        if inputs.continues:
            for cache in self.caches:
                cache.written = inputs.visible - 1
            positions_B1 = torch.from_numpy(inputs.position_B).to(self.device).unsqueeze(1)
            logits_B1V = self.decoder(token_B.unsqueeze(1), positions_B1, self.caches)
            self.logits_BV = logits_B1V[:, 0]
        return token_B.cpu().numpy(), log_probs


def _row(cache: KVCache, slot: int) -> KVCache:
    """Return a view of a row of a cache."""
    k_1SGK, v_1SGK = cache.k_BSGK[slot : slot + 1], cache.v_BSGK[slot : slot + 1]
    return KVCache(k_1SGK, v_1SGK, cache.lengths[slot : slot + 1], block=cache.block)


def _log_probs(logits_BV: Tensor, token_B: Tensor) -> TokenLogProbs:
    """Return log-probabilities of tokens and of the most probable ones, in float64."""
    log_p_BV = torch.log_softmax(logits_BV.double(), dim=-1)
    log_prob_B1 = log_p_BV.gather(1, token_B.to(log_p_BV.device).unsqueeze(1))
    n = min(MAX_TOP, log_p_BV.shape[1])
    # A stable sort of the candidates: equal probabilities in the order of their ids.
    top_BN = log_p_BV.topk(n).indices.sort(-1).values
    order_BN = log_p_BV.gather(1, top_BN).sort(dim=-1, descending=True, stable=True).indices
    top_BN = top_BN.gather(1, order_BN)
    return TokenLogProbs(
        log_prob_B1[:, 0].cpu().numpy(),
        top_BN.cpu().numpy(),
        log_p_BV.gather(1, top_BN).cpu().numpy(),
    )
