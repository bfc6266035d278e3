"""Decode the slots of a fixed shape in PyTorch, for mooshak/serving/scheduler.py.

Mirror: mooshak_jax/engine.py.
Shapes: B slots, C tokens of a chunk, S cache slots, D model width, V vocabulary, N most probable.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mooshak.config.model import Dtype
from mooshak.generation.log_probs import TokenLogProbs
from mooshak.serving import engine
from mooshak.serving.engine import StepInputs
from mooshak_torch.kv_cache import KVCache
from mooshak_torch.lm import LM
from mooshak_torch.model import PARAM_DTYPE, Linear, make_caches
from mooshak_torch.ops.matmul import pack_weights_for_decode
from mooshak_torch.sampling import log_probs, returned_scores, sample


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
        self,
        slot: int,
        tokens: Sequence[int],
        start: int,
        targets: Sequence[int] | None = None,
        top: bool = False,
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
        target_C = torch.from_numpy(self.pad_chunk(targets, 0)[0]).to(self.device)
        found = log_probs(self.model.logits(hidden_1CD)[0], target_C, top)
        return TokenLogProbs(*(values[: last + 1].cpu().numpy() for values in found))

    @torch.no_grad()
    def copy_slot(self, source: int, target: int) -> None:
        for cache in self.caches:
            cache.k_BSGK[target] = cache.k_BSGK[source]
            cache.v_BSGK[target] = cache.v_BSGK[source]

    @torch.no_grad()
    def step(self, inputs: StepInputs) -> tuple[np.ndarray, TokenLogProbs | None]:
        uniform_B = torch.from_numpy(inputs.uniform_B).to(self.device)
        settings = inputs.parameters, inputs.adjustments
        token_B = sample(self.logits_BV, uniform_B, *settings)
        found: list[Tensor] = []
        if inputs.log_probs:
            scores_BV = returned_scores(self.logits_BV, *settings, inputs.processed_B)
            found = log_probs(scores_BV, token_B, inputs.top)
        # An accelerator computes the next step while the host waits for these tokens.
        if inputs.continues:
            for cache in self.caches:
                cache.written = inputs.visible - 1
            positions_B1 = torch.from_numpy(inputs.position_B).to(self.device).unsqueeze(1)
            logits_B1V = self.decoder(token_B.unsqueeze(1), positions_B1, self.caches)
            self.logits_BV = logits_B1V[:, 0]
        result = TokenLogProbs(*(values.cpu().numpy() for values in found)) if found else None
        return token_B.cpu().numpy(), result


def _row(cache: KVCache, slot: int) -> KVCache:
    """Return a view of a row of a cache."""
    k_1SGK, v_1SGK = cache.k_BSGK[slot : slot + 1], cache.v_BSGK[slot : slot + 1]
    return KVCache(k_1SGK, v_1SGK, cache.lengths[slot : slot + 1], block=cache.block)
