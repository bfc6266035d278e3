"""Check of an export before it gets its name: its own reader computes what the checkpoint does.

Token ids and texts of `samples`, and logits of a few tokens, must be equal; each difference is a
line of text.
"""

import json
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from mooshak.checkpoints.base import FULL_SLICE, Checkpoint
from mooshak.checkpoints.init_from import VOCABULARY
from mooshak.errors import InputError
from mooshak.generation.text import REPLACEMENT
from mooshak.tokenizer.base import Tokenizer
from mooshak.tokenizer.hf_tokenizer import HFTokenizer
from mooshak.tokenizer.sentencepiece_hf import HFSentencePieceTokenizer
from parity.distance import distance

TEXTS = (
    "",
    "एक चालाक चूहा जंगल में रहता था।",
    "the lion became its friend; 12 apples, १२ सेब",
    "ड़ ढ़ ज़रा and \u095c \u095d \u095b\u0930\u093e",
    "ड\u093c \u095c क\u093c\u094d\u0937",
    "क्\u200dष क्\u200cष क्ष श्री र्कि \u200d",
    "two  spaces,   three\ttabs\n\n and lines \n",
    "def f(x):\n    return {x: [x ** 2, 'a']}  # <b>&amp;</b>",
    "👨‍👩‍👧‍👦 🇮🇳 ✌🏽 e\u0301 \u00e9 ﬁ ① ﷺ \u00a0\u3000",
    "https://example.org/?q=1&r=%20 user_name@x.co 3.14e-10",
)
N_JOINED = 400
"""Number of texts of three tokens."""
MAX_LOGITS_DISTANCE = 1e-4
"""Relative; float32's own error of trained models is below 1e-5, a wrong setting is above."""
N_TOKENS = 24
FULL_BYTES, N_ROWS = 1 << 28, 256
"""Larger models are checked by their first layer, and these rows of the vocabulary."""


def samples(tokenizer: Tokenizer) -> Iterator[str]:
    """Yield the texts whose ids are compared: `TEXTS`, and tokens joined."""
    yield from TEXTS
    texts = [text for text in tokenizer.texts() if text.strip() and REPLACEMENT not in text]
    random, n = np.random.default_rng(0), len(texts)
    # Appended tokens, at the end, are where merges go wrong.
    for start in (0, max(0, n - n // 4)) if n else ():
        for a, b, c in random.integers(start, n, (N_JOINED // 2, 3)):
            yield texts[a] + texts[b].lstrip() + texts[c].lstrip()
            yield f"{texts[a].strip()} {texts[b].strip()}{texts[c].strip()}"
        yield from islice(_overlapping(texts[start:], random), N_JOINED // 2)


def _overlapping(texts: list[str], random: np.random.Generator) -> Iterator[str]:
    """Yield texts in which two tokens share letters: the order of the merges decides."""
    by_start: dict[str, list[str]] = {}
    for text in texts:
        for n in range(1, min(4, len(text))):
            by_start.setdefault(text[:n], []).append(text)
    for i in random.permutation(len(texts)):
        for n in range(1, min(4, len(texts[i]))):
            if following := by_start.get(texts[i][-n:]):
                yield texts[i] + following[random.integers(len(following))][n:]


def added_samples(tokenizer: Tokenizer) -> Iterator[str]:
    """Yield texts with each added token, for tokenizers that recognise them in a text."""
    if not isinstance(tokenizer, HFSentencePieceTokenizer):
        return
    for token in tokenizer.added.values():
        yield from (token.content, f"a{token.content}b", f"चूहा {token.content} था")


def tokenizer_differences(
    ours: Tokenizer,
    texts: Sequence[str],
    encode: Callable[[str], list[int]],
    decode: Callable[[list[int]], str] | None = None,
) -> list[str]:
    """Return how the ids and texts of an exported tokenizer differ from ours: at most one line."""
    wrong: list[str] = []
    unknown = ours.pieces().index(ours.special_texts["unk"]) if "unk" in ours.special_texts else -1
    for text in texts:
        ids = ours.encode(text, bos=True)
        found = encode(text)
        if found != ids:
            wrong.append(f"{text!r} has the ids {_shown(found)}, not {_shown(ids)}")
        elif unknown in ids:  # It has no text.
            continue
        elif decode is not None and (back := decode(ids)) != ours.decode(ids):
            wrong.append(f"the ids of {text!r} have the text {back!r}")
    if not wrong:
        return []
    return [f"{len(wrong)} of {len(texts)} texts have other tokens: {wrong[0]}"]


def _shown(ids: list[int]) -> str:
    return f"[{', '.join(map(str, ids[:8]))}{', ...' if len(ids) > 8 else ''}]"


def hf_differences(directory: Path, source: Checkpoint, tokenizer: Tokenizer | None) -> list[str]:
    """Return how a directory for transformers differs from the checkpoint, as lines of text."""
    found = [] if tokenizer is None else _hf_tokenizer_differences(directory, tokenizer)
    return found + _logits_differences(directory, source)


def _hf_tokenizer_differences(directory: Path, tokenizer: Tokenizer) -> list[str]:
    import transformers

    try:
        with _QuietTransformers():
            theirs = transformers.PreTrainedTokenizerFast.from_pretrained(directory)
    except Exception as error:  # Of any class, for instance of the Rust library.
        return [f"transformers cannot read the tokenizer: {error}"]
    texts = [*samples(tokenizer), *added_samples(tokenizer)]
    if tokenizer.nfc and isinstance(tokenizer, HFTokenizer):  # Copied: the card says so.
        texts = [unicodedata.normalize("NFC", text) for text in texts]

    def decode(ids: list[int]) -> str:
        text = theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)

    return tokenizer_differences(tokenizer, texts, lambda text: theirs(text)["input_ids"], decode)


def _logits_differences(directory: Path, source: Checkpoint) -> list[str]:
    """Compare the logits of transformers' model with ours, in float32."""
    import torch

    from mooshak_torch.model import Model
    from mooshak_torch.params import load_params

    part = first_part(source)
    n_tokens = min(N_TOKENS, part.model.max_seq_len)
    tokens_1T = np.random.default_rng(0).integers(0, part.model.vocab_size, (1, n_tokens))
    with torch.no_grad():
        try:
            with _QuietTransformers():
                theirs = _load_hf(directory, part)
            logits = theirs(torch.from_numpy(tokens_1T)).logits.float().numpy()
        except Exception as error:
            return [f"transformers cannot compute the model: {type(error).__name__}: {error}"]
        del theirs
        ours = Model(part.model, "float32")
        load_params(dict(ours.named_parameters()), part)
        expected = ours(torch.from_numpy(tokens_1T)).numpy()
    if not np.isfinite(expected).all():
        return ["the logits are not finite; the weights are damaged"]
    apart = distance(logits, expected)
    if apart > MAX_LOGITS_DISTANCE:
        return [f"the logits of transformers are {apart:.2g} (relative) away from ours"]
    return []


def first_part(source: Checkpoint) -> Checkpoint:
    """Return the checkpoint, or of a large one a model of its first layer and tokens."""
    model = source.model
    if 4 * model.parameter_count() <= FULL_BYTES:
        return source
    model = replace(model, n_layers=1, vocab_size=min(N_ROWS, model.vocab_size))

    def read(key: str, rows: slice = FULL_SLICE) -> np.ndarray:
        if key in VOCABULARY:
            return source.read(key, slice(0, model.vocab_size))[rows]
        return source.read(key, rows)

    tensors = {
        key: (source.tensors[key][0], shape) for key, shape in model.parameter_shapes().items()
    }
    return replace(source, model=model, tensors=tensors, read=read, checksums={})


def _load_hf(directory: Path, part: Checkpoint) -> Any:
    """Return transformers' model in a directory, of the layers and rows of `part`."""
    import torch
    import transformers
    from safetensors import safe_open

    values = json.loads((directory / "config.json").read_bytes())
    values |= {"num_hidden_layers": part.model.n_layers, "vocab_size": part.model.vocab_size}
    if values.get("layer_types"):
        values["layer_types"] = values["layer_types"][: part.model.n_layers]
    if values["model_type"] == "mooshak":
        from parity.remote_code.configuration_mooshak import MooshakConfig
        from parity.remote_code.modeling_mooshak import MooshakForCausalLM

        config: Any = MooshakConfig(**values)
        model_class: Any = MooshakForCausalLM
    else:
        config = transformers.AutoConfig.for_model(**values)
        model_class = transformers.AutoModelForCausalLM._model_mapping[type(config)]
    config.dtype = torch.float32
    state = {}
    for file in sorted(directory.glob("model*.safetensors")):
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118  (it is no mapping)
                if (layer := name.split(".")[2:3]) and layer[0].isdecimal():
                    if int(layer[0]) >= part.model.n_layers:
                        continue
                    state[name] = stored.get_tensor(name).float()
                elif "embed_tokens" in name or "lm_head" in name:
                    state[name] = stored.get_slice(name)[: part.model.vocab_size].float()
                else:
                    state[name] = stored.get_tensor(name).float()
    return model_class.from_pretrained(None, config=config, state_dict=state).float().eval()


class _QuietTransformers:
    """Context in which transformers writes no progress and no warnings."""

    def __enter__(self) -> None:
        from transformers.utils import logging

        self.level = logging.get_verbosity()
        self.bars = logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()

    def __exit__(self, *error: object) -> None:
        from transformers.utils import logging

        logging.set_verbosity(self.level)
        if self.bars:
            logging.enable_progress_bar()


def refuse(path: Path, differences: list[str], force: bool) -> None:
    """Raise `InputError` for an export that differs, unless it is to be written anyway."""
    if differences and not force:
        raise InputError(
            f"{path} is not written, since it would differ from the checkpoint: "
            f"{'; '.join(differences)}. --force writes it, with a note"
        )
