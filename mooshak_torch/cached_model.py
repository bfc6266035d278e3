"""A PyTorch model with the KV caches of a batch, for beam search and speculative decoding.

Mirror: mooshak_jax/cached_model.py. The interface: mooshak/generation/cached_model.py.
Shapes: B rows, T time, N tokens of a call, M of them with logits, D model width, V vocabulary,
P prompts, W beams of each prompt, X = W x V, C candidates.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mooshak.config.generate import GenerateConfig
from mooshak.generation.adjustments import Adjustments
from mooshak.generation.cached_model import Candidates
from mooshak.generation.log_probs import TokenLogProbs
from mooshak.generation.parameters import SamplingParameters
from mooshak.generation.text import pad_prompts
from mooshak_torch.model import Linear, Model, make_caches
from mooshak_torch.ops.matmul import pack_weights_for_decode
from mooshak_torch.sampling import adjust, most_probable, returned_scores, sample, token_log_prob

SPARE = 32
"""Candidates beyond those that are asked for; all are sorted only if these do not decide."""


class CachedModel:
    """A model and its KV caches, on one device."""

    logits_BMV: Tensor
    """Logits of the latest call."""

    @torch.no_grad()
    def __init__(
        self, model: Model, prompts: Sequence[Sequence[int]], new_tokens: int, n_beams: int = 1
    ):
        """Compute the logits after each prompt; `n_beams` rows continue it.

        Raises `InputError` for an empty prompt, or a text that exceeds the model's positions.
        """
        tokens_BT, lengths_B = pad_prompts(prompts, new_tokens, model.config)
        self.model, self.device = model, model.head_VD.device
        self.caches = make_caches(model, len(prompts), tokens_BT.shape[1] + new_tokens)
        positions_BT = np.broadcast_to(np.arange(tokens_BT.shape[1]), tokens_BT.shape)
        self._extend(tokens_BT, positions_BT, lengths_B[:, None] - 1)
        self.truncate(lengths_B.tolist())  # Drop the padding.
        if n_beams > 1:
            self.select(np.repeat(np.arange(len(prompts)), n_beams).tolist())
            self.logits_BMV = self.logits_BMV.repeat_interleave(n_beams, 0)
        matrices = (m.weight for m in model.modules() if isinstance(m, Linear))
        self.model = pack_weights_for_decode(model, matrices, len(prompts) * n_beams, new_tokens)

    @torch.no_grad()
    def extend(self, tokens_BN: np.ndarray, positions_BN: np.ndarray, n_logits: int) -> None:
        n = tokens_BN.shape[1]
        index_BM = np.broadcast_to(np.arange(n - n_logits, n), (len(tokens_BN), n_logits))
        self._extend(tokens_BN, positions_BN, index_BM)

    def _extend(
        self, tokens_BN: np.ndarray, positions_BN: np.ndarray, index_BM: np.ndarray
    ) -> None:
        tokens, positions, index = map(self._tensor, (tokens_BN, positions_BN, index_BM))
        hidden_BND = self.model.hidden_states(tokens, positions, self.caches)
        rows_B1 = torch.arange(len(tokens), device=self.device).unsqueeze(1)
        self.logits_BMV = self.model.logits(hidden_BND[rows_B1, index])

    @torch.no_grad()
    def propose(
        self, tokens_BN: np.ndarray, positions_BN: np.ndarray, last_B: np.ndarray, n: int
    ) -> np.ndarray:
        tokens, positions, last_B1 = map(self._tensor, (tokens_BN, positions_BN, last_B[:, None]))
        drawn_B1: list[Tensor] = []
        for _ in range(n):
            hidden_BND = self.model.hidden_states(tokens, positions, self.caches)
            tokens = self.model.logits(hidden_BND[:, -1:]).argmax(-1)
            positions = last_B1.minimum(positions[:, -1:] + 1)
            drawn_B1.append(tokens)
        return torch.cat(drawn_B1, 1).cpu().numpy()

    @torch.no_grad()
    def select(self, rows: Sequence[int]) -> None:
        for cache in self.caches:
            cache.select(rows)

    @torch.no_grad()
    def truncate(self, lengths: Sequence[int]) -> None:
        for cache in self.caches:
            cache.truncate(lengths)

    @torch.no_grad()
    def sample(
        self,
        uniform_BM: np.ndarray,
        settings: GenerateConfig,
        adjustments: Adjustments | None = None,
    ) -> np.ndarray:
        parameters = SamplingParameters.of([settings] * uniform_BM.size)
        uniform = torch.from_numpy(uniform_BM.ravel()).to(self.device)
        token = sample(self.logits_BMV.flatten(0, 1), uniform, parameters, adjustments)
        return token.cpu().numpy().reshape(uniform_BM.shape)

    @torch.no_grad()
    def log_probs(
        self,
        tokens_BM: np.ndarray,
        settings: GenerateConfig,
        adjustments: Adjustments | None = None,
    ) -> TokenLogProbs:
        parameters = SamplingParameters.of([settings] * tokens_BM.size)
        processed = np.full(tokens_BM.size, settings.processed_logprobs)
        logits = self.logits_BMV.flatten(0, 1)
        scores = returned_scores(logits, parameters, adjustments, processed)
        found = [token_log_prob(scores, self._tensor(tokens_BM).flatten())]
        found += most_probable(scores) if settings.top_logprobs else ()
        return TokenLogProbs(*(values.cpu().numpy() for values in found))

    @torch.no_grad()
    def best(
        self, score_B: np.ndarray, n_beams: int, n: int, adjustments: Adjustments | None = None
    ) -> Candidates:
        log_p_BV = self.logits_BMV[:, -1].double().log_softmax(-1)
        score_B1 = torch.from_numpy(score_B).to(self.device).unsqueeze(1)
        n_prompts, n_tokens = len(score_B) // n_beams, log_p_BV.shape[1]
        score_PX = (score_B1 + adjust(log_p_BV, adjustments)).view(n_prompts, -1)
        index_PC = _largest(score_PX, min(n, score_PX.shape[1]))
        found = (score_PX, log_p_BV.view(n_prompts, -1))
        score_PC, log_prob_PC = (values.gather(1, index_PC).cpu().numpy() for values in found)
        beam_PC, token_PC = np.divmod(index_PC.cpu().numpy(), n_tokens)
        return Candidates(beam_PC, token_PC, score_PC, log_prob_PC)

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array.astype(np.int64)).to(self.device)


def _largest(score_PX: Tensor, n: int) -> Tensor:
    """Return the indices of the n largest numbers of each row, in order, int64 [P, C].

    Equal ones are in the order of their indices. They are found by their float32 values: any number
    whose float32 value is larger than that of the last candidate is among the candidates.
    """
    index_PC = score_PX.float().topk(min(n + SPARE, score_PX.shape[1])).indices.sort(-1).values
    sorted_PC, order_PC = score_PX.gather(1, index_PC).sort(dim=-1, descending=True, stable=True)
    nth_P, last_P = sorted_PC[:, n - 1], sorted_PC[:, -1]
    decided_P = (nth_P.float() > last_P.float()) | (last_P == -torch.inf)
    if index_PC.shape[1] < score_PX.shape[1] and not decided_P.all():
        return score_PX.sort(dim=-1, descending=True, stable=True).indices[:, :n]
    return index_PC.gather(1, order_PC[:, :n])
