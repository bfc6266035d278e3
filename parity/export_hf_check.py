"""Check of a directory for transformers: it reads the same tokens, and computes the same logits."""

import json
import os
import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import safe_open
from transformers.utils import logging

from mooshak.checkpoints.base import FULL_SLICE, Checkpoint
from mooshak.config.lora import TABLES
from mooshak.tokenizer.base import Tokenizer
from mooshak.tokenizer.hf_tokenizer import HFTokenizer
from mooshak_torch.model import Model
from mooshak_torch.params import load_params
from parity.distance import distance
from parity.export_check import added_samples, samples, tokenizer_differences
from parity.remote_code.configuration_mooshak import MooshakConfig
from parity.remote_code.modeling_mooshak import MooshakForCausalLM

MAX_LOGITS_DISTANCE = 1e-4
"""Relative; float32's own error of trained models is below 1e-5, a wrong setting is above."""
N_TOKENS = 24
FULL_BYTES, N_ROWS = 1 << 28, 256
"""Larger models are checked by their first layer, and these rows of the vocabulary."""


def hf_differences(directory: Path, source: Checkpoint, tokenizer: Tokenizer | None) -> list[str]:
    """Return how a directory for transformers differs from the checkpoint, as lines of text."""
    found = [] if tokenizer is None else _hf_tokenizer_differences(directory, tokenizer)
    return found + _logits_differences(directory, source)


def _hf_tokenizer_differences(directory: Path, tokenizer: Tokenizer) -> list[str]:
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
        if key in TABLES:
            return source.read(key, slice(0, model.vocab_size))[rows]
        return source.read(key, rows)

    tensors = {
        key: (source.tensors[key][0], shape) for key, shape in model.parameter_shapes().items()
    }
    return replace(source, model=model, tensors=tensors, read=read, checksums={})


def _load_hf(directory: Path, part: Checkpoint) -> Any:
    """Return transformers' model in a directory, of the layers and rows of `part`."""
    values = json.loads((directory / "config.json").read_bytes())
    values |= {"num_hidden_layers": part.model.n_layers, "vocab_size": part.model.vocab_size}
    if values.get("layer_types"):
        values["layer_types"] = values["layer_types"][: part.model.n_layers]
    if values["model_type"] == "mooshak":
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
        self.level = logging.get_verbosity()
        self.bars = logging.is_progress_bar_enabled()
        # Otherwise DeepSpeed, which transformers imports, prints that it finds no accelerator.
        self.accelerator = os.environ.get("DS_ACCELERATOR")
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        logging.set_verbosity_error()
        logging.disable_progress_bar()

    def __exit__(self, *error: object) -> None:
        if self.accelerator is None:
            del os.environ["DS_ACCELERATOR"]
        logging.set_verbosity(self.level)
        if self.bars:
            logging.enable_progress_bar()
