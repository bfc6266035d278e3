"""Settings of generation: of the commands, the Python API and both frameworks."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mooshak.errors import InputError, require

MIN_TEMPERATURE, MAX_BIAS = 1e-6, 1e6
"""Bounds within which logits divided by the temperature are finite."""
MAX_TOP_K = 2**31 - 1
MAX_TOP = 20
"""Largest `top_logprobs`."""
CONSTRAINTS = ("regex", "json_schema", "choice", "grammar")
"""Settings of which at most one is given."""

MAX_LENGTH_PENALTY = 10.0
"""Bound within which powers of any number of tokens are finite."""

EarlyStopping = bool | Literal["never"]


@dataclass(frozen=True)
class GenerateConfig:
    """Settings of generation."""

    max_new_tokens: int = 128
    """Maximum number of new tokens."""
    min_new_tokens: int = 0
    """Number of new tokens before an end token may be generated."""
    temperature: float = 0.0
    """Divisor of the logits before sampling; 0 is greedy decoding."""
    top_k: int = 0
    """Sample from the k most probable tokens (0: all)."""
    top_p: float = 1.0
    """Nucleus sampling (arXiv:1904.09751): sample from the smallest set of tokens with total
    probability >= top_p."""
    min_p: float = 0.0
    """Remove tokens less probable than min_p times the most probable one (arXiv:2407.01082)."""
    typical_p: float = 1.0
    """Locally typical sampling (arXiv:2202.00666): total probability of the tokens whose surprise
    is closest to the entropy."""
    repetition_penalty: float = 1.0
    """Divisor of the positive logits, factor of the negative ones, of tokens in prompt or output
    (arXiv:1909.05858)."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens in the output."""
    frequency_penalty: float = 0.0
    """Subtracted from the logits of tokens for each time that they are in the output."""
    no_repeat_ngram_size: int = 0
    """Generate no n-gram of this size a second time, those of the prompt included (0: allow)."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Token id -> number added to its logit."""
    allowed_tokens: tuple[int, ...] = ()
    """Token ids; all others are never generated (empty: all are allowed)."""
    bad_words: tuple[str, ...] = ()
    """Texts that are never generated."""
    regex: str | None = None
    """Regular expression that the text matches, in full."""
    json_schema: Mapping[str, Any] | str | None = None
    """JSON Schema of the text, which is then a JSON value: an object, or its JSON."""
    choice: tuple[str, ...] = ()
    """Texts of which one is generated."""
    grammar: str | None = None
    """Grammar of the text, in llguidance's dialect of Lark."""
    seed: int = 0
    """Seed of the sampling noise."""
    n: int = 1
    """Samples per prompt."""
    stop: tuple[str, ...] = ()
    """Stop texts: generation ends where one appears; it is not part of the result."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end the text, in addition to the end tokens."""
    ignore_eos: bool = False
    """Continue after an end token."""
    logprobs: bool = False
    """Return the log-probability of each token under the model, before any other setting acts."""
    prompt_logprobs: bool = False
    """Return the log-probability of each token of the prompt, too; max_new_tokens may then be 0."""
    top_logprobs: int = 0
    """Number of most probable tokens whose log-probabilities are returned in each place, at most
    20."""
    processed_logprobs: bool = False
    """Return log-probabilities of the distribution that tokens are drawn from: after penalties,
    temperature and filters."""
    num_beams: int = 1
    """Beams of a beam search, which replaces greedy decoding (1: no search)."""
    length_penalty: float = 1.0
    """Beams are ranked by total log-probability / length ** length_penalty: above 0 favours long
    texts, below 0 short ones."""
    early_stopping: EarlyStopping = False
    """End of a beam search, after num_beams texts have ended: true: at once; false: when the best
    beam would not be among them if it ended now; never: when no beam can get among them."""
    num_return_sequences: int = 1
    """Best texts of a beam search that are returned."""
    draft: Any = None
    """Checkpoint of a smaller model with the same vocabulary, in Python also a loaded one, that
    drafts tokens for speculative decoding (arXiv:2211.17192): the text is the same."""
    draft_tokens: int = 4
    """Number of tokens that are drafted, and then verified in one forward pass."""

    def __post_init__(self) -> None:
        for key in ("stop", "bad_words", "choice"):
            if isinstance(value := getattr(self, key), str):
                object.__setattr__(self, key, (value,))
        for key in ("n", "num_beams", "num_return_sequences", "draft_tokens"):
            value = getattr(self, key)
            require(value >= 1, f"generate.{key} {value} must be at least 1")
        least = 0 if self.prompt_logprobs else 1
        require(
            self.max_new_tokens >= least,
            f"generate.max_new_tokens {self.max_new_tokens} must be at least {least}",
        )
        require(
            0 <= self.top_logprobs <= MAX_TOP,
            f"generate.top_logprobs {self.top_logprobs} is not in 0 .. {MAX_TOP}",
        )
        require(
            not self.top_logprobs or self.logprobs or self.prompt_logprobs,
            f"generate.top_logprobs {self.top_logprobs} needs generate.logprobs or "
            "generate.prompt_logprobs",
        )
        require(
            self.logprobs or not self.processed_logprobs,
            "generate.processed_logprobs needs generate.logprobs",
        )
        for key in ("min_new_tokens", "top_k", "no_repeat_ngram_size"):
            value = getattr(self, key)
            require(value >= 0, f"generate.{key} {value} must not be negative")
        require(self.top_k <= MAX_TOP_K, f"generate.top_k {self.top_k} is more than {MAX_TOP_K}")
        require(
            self.min_new_tokens <= self.max_new_tokens,
            f"generate.min_new_tokens {self.min_new_tokens} is more than generate.max_new_tokens "
            f"{self.max_new_tokens}",
        )
        require(
            self.temperature == 0 or MIN_TEMPERATURE <= self.temperature < math.inf,
            f"generate.temperature {self.temperature} must be 0 (greedy) or at least "
            f"{MIN_TEMPERATURE:g}",
        )
        for key in ("top_p", "typical_p"):
            value = getattr(self, key)
            require(0 < value <= 1, f"generate.{key} {value} must be in (0, 1]")
        require(0 <= self.min_p <= 1, f"generate.min_p {self.min_p} must be in [0, 1]")
        require(
            0 < self.repetition_penalty < math.inf,
            f"generate.repetition_penalty {self.repetition_penalty} must be positive",
        )
        for key in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, key)
            require(-2 <= value <= 2, f"generate.{key} {value} must be in [-2, 2]")
        for token, bias in self.logit_bias.items():
            require(
                abs(bias) <= MAX_BIAS,
                f"generate.logit_bias: {bias} of token {token} must be in "
                f"[-{MAX_BIAS:g}, {MAX_BIAS:g}]",
            )
        for key in ("stop", "bad_words", "choice"):
            require(all(getattr(self, key)), f"generate.{key} contains an empty text")
        self._check_constraints()
        self._check_beams()

    def _check_beams(self) -> None:
        """Raise `InputError` for settings of beam search that are wrong, or exclude each other."""
        require(
            abs(self.length_penalty) <= MAX_LENGTH_PENALTY,
            f"generate.length_penalty {self.length_penalty} must be in "
            f"[-{MAX_LENGTH_PENALTY:g}, {MAX_LENGTH_PENALTY:g}]",
        )
        require(
            self.num_return_sequences <= self.num_beams,
            f"generate.num_return_sequences {self.num_return_sequences} is more than "
            f"generate.num_beams {self.num_beams}",
        )
        if self.num_beams == 1:
            return
        beams = f"generate.num_beams {self.num_beams}: a beam search"
        require(self.temperature == 0, f"{beams} does not sample; set generate.temperature to 0")
        require(self.n == 1, f"{beams} has generate.num_return_sequences in place of generate.n")
        require(self.draft is None, f"{beams} has no draft; remove generate.draft")
        require(self.max_new_tokens >= 1, f"{beams} needs generate.max_new_tokens of at least 1")
        for key in ("top_logprobs", "processed_logprobs"):
            require(not getattr(self, key), f"{beams} does not return generate.{key}")

    @property
    def n_results(self) -> int:
        """Number of completions of each prompt."""
        return self.n * self.num_return_sequences

    def _check_constraints(self) -> None:
        """Raise `InputError` for more than one constraint, or one that is no text or JSON."""
        given = [key for key in CONSTRAINTS if getattr(self, key) not in (None, (), [])]
        require(len(given) < 2, f"give generate.{' or generate.'.join(given)}, not both")
        for key in ("regex", "grammar"):
            require(getattr(self, key) != "", f"generate.{key} is an empty text")
        if self.json_schema is not None:
            object.__setattr__(self, "json_schema", _json_text(self.json_schema))

    @property
    def constraint(self) -> tuple[str, str | tuple[str, ...]] | None:
        """The constraint of the text: setting and value; None if there is none."""
        name = next((key for key in CONSTRAINTS if getattr(self, key)), None)
        if name is None:
            return None
        return name, tuple(self.choice) if name == "choice" else getattr(self, name)


def _json_text(schema: Mapping[str, Any] | str) -> str:
    """Return a schema as JSON: equality of texts is also that of the order of properties."""
    try:
        values = json.loads(schema) if isinstance(schema, str) else schema
        text = json.dumps(dict(values) if isinstance(values, Mapping) else values, allow_nan=False)
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"generate.json_schema is not JSON: {error}") from error
    require(isinstance(values, Mapping), "generate.json_schema must be a JSON object")
    return text
