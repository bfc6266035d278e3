"""The section `lora`: low-rank adapters, and which parameters are frozen."""

from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import Any

from mooshak.config.fields import check_fields, number
from mooshak.errors import did_you_mean, require

TARGETS = {
    "wq": "attention",
    "wk": "attention",
    "wv": "attention",
    "wo": "attention",
    "w1": "mlp",
    "w2": "mlp",
    "w3": "mlp",
}
"""Matrix of a layer that can have an adapter -> the module that it is in."""
MODULES_TO_SAVE = ("embeddings", "lm_head", "norms")
"""Parameters that can be trained next to adapters; norms: all gains."""

TABLES = ("embeddings.weight", "lm_head.weight")
"""Parameters with a row per token."""
TOKEN_ROWS = "token_rows"
"""Last name of the rows of a table that are trained, and replace those of the table."""


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (LoRA, arXiv:2106.09685); all other parameters are frozen."""

    rank: int = number(0, at_least=0, at_most=65536)
    """Rank of the adapters (0: no adapters, all parameters are trained)."""
    alpha: float = number(16.0, above=0)
    """Scale of the adapters: their output is multiplied by alpha / rank."""
    targets: list[str] = field(default_factory=list)
    """Matrices with an adapter: wq, wk, wv, wo, w1, w2, w3 (empty: all that the model has)."""
    modules_to_save: list[str] = field(default_factory=list)
    """Parameters that are trained in full: embeddings, lm_head, norms."""
    trainable_token_indices: list[int] = field(default_factory=list)
    """Tokens whose rows of the embedding and of the output head are trained, such as new special
    tokens; the other rows are frozen."""
    rslora: bool = False
    """Multiply by alpha / sqrt(rank) instead (rsLoRA, arXiv:2312.03732)."""
    dora: bool = False
    """Also train the norm of each row of the adapted matrices (DoRA, arXiv:2402.09353)."""

    def __post_init__(self) -> None:
        check_fields(self, "lora")
        for key, known in (("targets", tuple(TARGETS)), ("modules_to_save", MODULES_TO_SAVE)):
            for name in getattr(self, key):
                require(
                    name in known,
                    f"lora.{key} has no {name!r}{did_you_mean(str(name), known)}; known are "
                    f"{', '.join(known)}",
                )
            # In one order: configurations with the same set are equal.
            object.__setattr__(self, key, [name for name in known if name in getattr(self, key)])
        tokens = self.trainable_token_indices
        require(
            all(isinstance(token, int) and token >= 0 for token in tokens),
            f"lora.trainable_token_indices {tokens} must be token ids, integers from 0",
        )
        object.__setattr__(self, "trainable_token_indices", sorted(set(tokens)))
        require(
            not tokens or not {"embeddings", "lm_head"} & set(self.modules_to_save),
            "lora.modules_to_save trains all rows of embeddings or lm_head, "
            "lora.trainable_token_indices some of them; remove one",
        )
        keys = ("targets", "modules_to_save", "trainable_token_indices", "rslora", "dora")
        given = [key for key in keys if getattr(self, key)]
        require(
            self.rank > 0 or not given, f"lora.{''.join(given[:1])} needs adapters; set lora.rank"
        )

    @property
    def scale(self) -> float:
        """Factor of the adapters' output."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


def is_target(lora: LoraConfig | None, module: str) -> bool:
    """Return whether a module, such as wq or layers.0.attention.wq, has an adapter."""
    name = module.rpartition(".")[2]
    return lora is not None and name in (lora.targets or TARGETS)


def adapter_shapes(
    shapes: Mapping[str, tuple[int, ...]], lora: LoraConfig
) -> dict[str, tuple[int, ...]]:
    """Return canonical name -> shape of the adapters of parameters of these shapes.

    For a matrix [out, in]: `lora_a` [rank, in], `lora_b` [out, rank], with DoRA `dora_magnitude`
    [out]; for embedding and head: `token_rows` [trained tokens, dim].
    """
    result: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        module, _, kind = name.rpartition(".")
        if kind == "weight" and is_target(lora, module):
            result[f"{module}.lora_a.weight"] = (lora.rank, shape[1])
            result[f"{module}.lora_b.weight"] = (shape[0], lora.rank)
            if lora.dora:
                result[f"{module}.dora_magnitude"] = shape[:1]
        elif name in TABLES and lora.trainable_token_indices:
            result[f"{module}.{TOKEN_ROWS}"] = (len(lora.trainable_token_indices), shape[1])
    return result


def is_adapter(name: str) -> bool:
    """Return whether a canonical name is that of an adapter's parameter."""
    return name.endswith((".lora_a.weight", ".lora_b.weight", ".dora_magnitude", f".{TOKEN_ROWS}"))


def frozen_parameters(
    shapes: Mapping[str, Any], lora: LoraConfig | None, embeddings: bool = False, layers: int = 0
) -> Set[str]:
    """Return the canonical names of `shapes` that are not trained and have no optimizer state.

    With adapters: all but these and `modules_to_save`. Without: the embedding if `embeddings`, and
    the first `layers` layers.
    """
    if lora is not None:
        saved = tuple(
            "norm.weight" if name == "norms" else f"{name}.weight" for name in lora.modules_to_save
        )
        return {name for name in shapes if not (is_adapter(name) or name.endswith(saved))}
    return {
        name
        for name in shapes
        if (embeddings and name == "embeddings.weight")
        or (name.startswith("layers.") and int(name.split(".")[1]) < layers)
    }


def check_frozen(
    lora: LoraConfig | None, embeddings: bool, layers: int, n_layers: int, scan_layers: bool
) -> None:
    """Raise `InputError` for frozen parameters that the model or its layout does not allow.

    `embeddings` and `layers` are as in `frozen_parameters`.
    """
    require(
        lora is None or not (embeddings or layers),
        "lora.rank freezes all parameters but the adapters; remove train.freeze_embeddings and "
        "train.freeze_layers",
    )
    require(layers < n_layers, f"train.freeze_layers {layers} leaves none of the {n_layers} layers")
    require(
        not (layers and scan_layers),
        "train.freeze_layers needs a parameter for each layer; set model.scan_layers false",
    )
