"""lm-eval's own API models against the server: log-likelihoods, greedy texts, chats."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.serving.conftest import load
from tests.serving.servers import NAME, Server, serve

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compiled_in_haste")]
PAIRS = [("एक चूहा", " जंगल में"), ("the lion", " became its friend"), ("", "a mouse")]


@pytest.fixture(params=["torch", "jax"], scope="module")
def server(request: pytest.FixtureRequest, checkpoints: dict[str, Path]) -> Iterator[Server]:
    with serve(request.param, checkpoints["llama"]) as found:
        yield found


@pytest.mark.parametrize("options", [{}, {"batch_size": 2}, {"num_concurrent": 3}])
def test_log_likelihoods_are_those_of_score(
    options: dict[str, int], server: Server, checkpoints: dict[str, Path]
) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    # The tokenizer is the server's: /tokenizer_info and /tokenize.
    api = LocalCompletionsAPI(
        model=NAME, base_url=server.url + "/v1/completions", max_length=96, **options
    )
    assert api.tokenizer_backend == "remote"
    asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(PAIRS)]
    found = api.loglikelihood(asked, disable_tqdm=True)
    lm = load("torch", checkpoints["llama"])
    assert lm.tokenizer is not None
    for (context, continuation), (log_prob, is_greedy) in zip(PAIRS, found, strict=True):
        before = lm.tokenizer.encode(context) if context else [lm.tokenizer.bos_id]
        ids = lm.tokenizer.encode(context + continuation)
        ids = ids if context else [*before, *ids]
        scores = lm.score(ids)[len(before) - 1 :]
        assert log_prob == pytest.approx(float(np.sum(scores)), abs=1e-3)
        greedy = lm.generate(before, max_new_tokens=len(scores), ignore_eos=True, temperature=0)
        assert is_greedy == (greedy.token_ids == ids[len(before) :])


def test_texts_are_generated_until_a_stop(server: Server, checkpoints: dict[str, Path]) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    api = LocalCompletionsAPI(model=NAME, base_url=server.url + "/v1/completions", max_length=96)
    arguments = ("the lion", {"until": ["zz"], "max_gen_toks": 12})
    (found,) = api.generate_until([Instance("generate_until", {}, arguments, 0)], disable_tqdm=True)
    lm = load("torch", checkpoints["llama"])
    assert lm.tokenizer is not None
    ids = lm.tokenizer.encode("the lion")
    stop = ("zz", "</s>")
    assert found == lm.generate(ids, max_new_tokens=12, temperature=0, stop=stop).text
