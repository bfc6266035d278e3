"""Translate a Hugging Face `config.json` to a `ModelConfig` and back."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mooshak.config.model import ModelConfig
from mooshak.errors import InputError
from mooshak.tokenizer.metadata import HF_CONFIG

KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "head_dim": "head_dim",
    "intermediate_size": "hidden_dim",
    "max_position_embeddings": "max_seq_len",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
}
"""Key of the Hugging Face `config.json` -> key of the section `model`."""

REQUIRED = tuple(
    key
    for key in KEYS
    if key not in ("num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings")
)

ROTARY = ("rope_parameters", "rope_theta", "rope_scaling")

INERT = {
    "architectures",
    "attention_dropout",
    "auto_map",
    "bos_token_id",
    "cross_attention_hidden_size",
    "dtype",
    "eos_token_id",
    "finetuning_task",
    "id2label",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "prefix",
    "problem_type",
    "return_dict",
    "sep_token_id",
    "task_specific_params",
    "tf_legacy_loss",
    "torchscript",
    "use_bfloat16",
    "initializer_range",
    "is_llama_config",
    "layer_types",  # Checked: all layers must have the same type.
    "max_sequence_length",  # Before transformers 4.28, in addition to max_position_embeddings.
    "model_type",
    "pad_token_id",
    "pretraining_tp",
    "tokenizer_class",
    "torch_dtype",
    "transformers.js_config",
    "transformers_version",
    "unk_token_id",
    "unsloth_fixed",
    "unsloth_version",
    "use_cache",
}
"""Keys that do not change the function of the model, or are checked."""

ONLY = {"hidden_act": "silu", "rope_interleaved": False, "use_mrope": False}
"""Keys with only one supported value."""

NEUTRAL: dict[str, Any] = {
    "add_cross_attention": False,
    "attention_bias": False,
    "attn_logit_softcapping": 0.0,
    "chunk_size_feed_forward": 0,
    "embedding_multiplier": 1.0,
    "final_logit_softcapping": 0.0,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "logit_scale": 1.0,
    "logits_scaling": 1.0,
    "mlp_bias": False,
    "num_experts": 0,
    "num_local_experts": 0,
    "num_nextn_predict_layers": 0,
    "partial_rotary_factor": 1.0,
    "pruned_heads": {},
    "residual_multiplier": 1.0,
    "tie_encoder_decoder": False,
    "use_qk_norm": False,
    "use_sliding_window": False,
}
"""Keys of other families -> the value with which they have no effect. Null has none, either."""

OF_GENERATION = {
    "bad_words_ids",
    "begin_suppress_tokens",
    "decoder_start_token_id",
    "diversity_penalty",
    "do_sample",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "length_penalty",
    "max_length",
    "min_length",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_scores",
    "remove_invalid_values",
    "repetition_penalty",
    "return_dict_in_generate",
    "suppress_tokens",
    "temperature",
    "top_k",
    "top_p",
    "typical_p",
}
"""Defaults of generation, which transformers 4 wrote here, too; not of the model's function."""

INTEGERS = (*REQUIRED, "num_key_value_heads", "head_dim", "sliding_window", "max_window_layers")
VALUE_TYPES: dict[str, tuple[Any, tuple[str, ...]]] = {
    "an integer": (int, INTEGERS),
    "a number": ((int, float), ("rms_norm_eps", "rope_theta")),
    "true or false": (
        bool,
        ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window"),
    ),
    "a list": (list, ("layer_types",)),
    "an object": (dict, ("rope_parameters", "rope_scaling")),
}
"""Type of a value -> keys whose values must have it, unless they are null."""


@dataclass(frozen=True)
class Family:
    """A `model_type`: its class, and what it adds to the common keys."""

    head: str
    """Class of the model with its output head, which `architectures` names."""
    keys: tuple[str, ...] = ()
    """Additional keys."""
    defaults: tuple[tuple[str, Any], ...] = ()
    """Defaults of transformers for absent keys, other than null and false."""


QWEN_WINDOW = ("use_sliding_window", "sliding_window", "max_window_layers")
QWEN_DEFAULTS = (("num_key_value_heads", 32), ("sliding_window", 4096), ("max_window_layers", 28))

FAMILIES = {
    "llama": Family("LlamaForCausalLM", ("attention_bias", "mlp_bias")),
    "mistral": Family(
        "MistralForCausalLM",
        ("sliding_window",),
        (("num_key_value_heads", 8), ("sliding_window", 4096)),
    ),
    "qwen2": Family("Qwen2ForCausalLM", QWEN_WINDOW, QWEN_DEFAULTS),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        ("attention_bias", *QWEN_WINDOW),
        (*QWEN_DEFAULTS, ("head_dim", 128)),
    ),
    "mooshak": Family("MooshakForCausalLM"),
}


def model_from_hf(values: Mapping[str, Any], where: str) -> ModelConfig:
    """Return the model that a `config.json` of transformers 4 or 5 describes.

    Raises `InputError`, naming the file `where`, for an architecture that is not in `FAMILIES`, and
    for an unknown key, which could change the function of the model.
    """
    kind = values.get("model_type")
    if kind not in FAMILIES:
        raise InputError(
            f"{where}: model_type {kind!r} is not supported; known: {', '.join(FAMILIES)}"
        )
    family = FAMILIES[kind]
    heads = values.get("architectures") or [family.head]
    if heads != [family.head]:
        raise InputError(f"{where}: architectures {heads} is not supported; expected {family.head}")
    known = {*KEYS, *ROTARY, *INERT, *ONLY, *OF_GENERATION, *family.keys}
    if unused := sorted(key for key in set(values) - known if not _is_neutral(key, values[key])):
        raise InputError(
            f"{where}: key {unused[0]!r} ({values[unused[0]]!r}) is not supported; "
            "it could change the function of the model"
        )
    if missing := [key for key in REQUIRED if values.get(key) is None]:
        raise InputError(f"{where}: key {missing[0]!r} is missing")
    for what, (types, keys) in VALUE_TYPES.items():
        for key in keys:
            value = values.get(key)
            of_type = isinstance(value, types) and (types is bool or not isinstance(value, bool))
            if value is not None and not of_type:
                raise InputError(f"{where}: {key} {value!r} is not {what}")
    for key, value in ONLY.items():
        if (found := values.get(key, value)) != value:
            raise InputError(f"{where}: {key} {found!r} is not supported, {value!r} is")
    values = {"rms_norm_eps": 1e-6, **dict(family.defaults), **values}
    ours = {our: values[their] for their, our in KEYS.items() if values.get(their) is not None}
    theta, scaling = _rotary(values, where)
    ours |= {"rope_theta": theta, "rope_scaling": scaling}
    if kind != "mooshak":
        biased = bool(values.get("attention_bias", False))
        ours |= {
            "architecture": "llama",
            "qkv_bias": biased or kind == "qwen2",
            "wo_bias": biased,
            "mlp_bias": bool(values.get("mlp_bias", False)),
            "qk_norm": kind == "qwen3",
            "sliding_window": _window(values, where),
        }
    try:
        return ModelConfig(**ours)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _is_neutral(key: str, value: Any) -> bool:
    """Return whether a key that the family does not have leaves the model as it is."""
    is_same = key in NEUTRAL and value == NEUTRAL[key]
    return key.startswith("_") or value is None or is_same


def _rotary(values: Mapping[str, Any], where: str) -> tuple[float, dict[str, Any] | None]:
    """Return theta and rescaling from both forms of the RoPE settings, which must agree."""
    five, four = values.get("rope_parameters"), values.get("rope_scaling")
    theta, found = values.get("rope_theta"), []
    if five is not None:
        found.append((five.get("rope_theta", theta), _scaling(five, values, where)))
    if theta is not None or four is not None or five is None:
        found.append((theta, _scaling(four or {}, values, where)))
    found = [(10000.0 if theta is None else theta, scaling) for theta, scaling in found]
    if found[0] != found[-1]:
        raise InputError(
            f"{where}: rope_parameters say {found[0]}, rope_theta and rope_scaling {found[1]}"
        )
    theta, scaling = found[0]
    if not isinstance(theta, (int, float)):
        raise InputError(f"{where}: rope_theta {theta!r} is not a number")
    return float(theta), scaling


def _scaling(
    settings: Mapping[str, Any], values: Mapping[str, Any], where: str
) -> dict[str, Any] | None:
    scaling = {
        key: value
        for key, value in settings.items()
        if key not in ("rope_theta", "type") and not _is_neutral(key, value)
    }
    scaling["rope_type"] = settings.get("rope_type", settings.get("type", "default"))
    if scaling["rope_type"] == "default":
        if others := sorted(set(scaling) - {"rope_type"}):
            raise InputError(f"{where}: RoPE of rope_type default does not use {others[0]!r}")
        return None
    if scaling["rope_type"] == "llama3":
        length = values["max_position_embeddings"]
        scaling.setdefault("original_max_position_embeddings", length)
    return scaling


def _window(values: Mapping[str, Any], where: str) -> int | None:
    """Return the sliding window of all layers, or None. Raises `InputError` if layers differ."""
    window, layers = values.get("sliding_window"), values["num_hidden_layers"]
    if window is None or not values.get("use_sliding_window", values["model_type"] == "mistral"):
        return None
    full = min(values.get("max_window_layers") or 0, layers)
    default = ["full_attention"] * full + ["sliding_attention"] * (layers - full)
    kinds = set(values.get("layer_types") or default)
    if len(kinds) > 1:
        raise InputError(f"{where}: layers with and without a sliding window are not supported")
    return window if kinds == {"sliding_attention"} else None


def model_to_hf(model: ModelConfig, original: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the `config.json` of a model for transformers 4 and 5.

    `original` is the one that the model was read from, if any: its family and its inert keys are
    preserved. Raises `InputError` if no family of transformers computes this function.
    """
    theta, scaling = model.rope_theta, model.rope_scaling
    five = {"rope_theta": theta, **(scaling or {"rope_type": "default"})}
    rotary = {"rope_parameters": five, "rope_theta": theta}
    if scaling is not None:
        rotary["rope_scaling"] = scaling
    if original is not None and model_from_hf(original, HF_CONFIG) == model:
        # The original form of the settings: transformers before 4.43 reads `type`.
        as_read = {key: original[key] for key in ROTARY if original.get(key) is not None}
        heads = [FAMILIES[original["model_type"]].head]
        return {**original, **rotary, **as_read, "architectures": heads}
    common = {their: getattr(model, our) for their, our in KEYS.items()} | rotary
    own = {
        "attention_bias": model.wo_bias,
        "mlp_bias": model.mlp_bias,
        "sliding_window": model.sliding_window,
        "use_sliding_window": model.sliding_window is not None,
        "max_window_layers": 0,
    }
    before = {key: value for key, value in (original or {}).items() if key not in ROTARY}
    first = before.get("model_type", "llama")
    ours = {kind for kind in FAMILIES if (kind == "mooshak") == (model.architecture == "mooshak")}
    for kind in (first, *FAMILIES):
        if kind not in ours:
            continue
        family = FAMILIES[kind]
        values = dict(before) if kind == first else {}
        values |= {"model_type": kind, "architectures": [family.head], "hidden_act": "silu"}
        values |= common | {key: own[key] for key in family.keys}
        if model_from_hf(values, HF_CONFIG) == model:
            return values
    raise InputError(
        "no architecture of transformers has this combination of qkv_bias, wo_bias, mlp_bias, "
        "qk_norm and sliding_window"
    )
