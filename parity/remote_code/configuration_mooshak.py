"""The configuration of a Mooshak model for transformers, loaded with `trust_remote_code=True`."""

from typing import Any

from transformers import PretrainedConfig


class MooshakConfig(PretrainedConfig):
    """A decoder without output projection, whose layers end in a norm; keys as Llama's.

    h = x + Attention(x); y = RMSNorm_output(h + MLP(RMSNorm_mlp(h))).
    """

    model_type = "mooshak"
    keys_to_ignore_at_inference = ("past_key_values",)

    def __init__(
        self,
        vocab_size: int = 64128,
        hidden_size: int = 4096,
        intermediate_size: int = 11008,
        num_hidden_layers: int = 8,
        num_attention_heads: int = 32,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        max_position_embeddings: int = 2048,
        rms_norm_eps: float = 1e-5,
        rope_theta: float = 10000.0,
        initializer_range: float = 0.02,
        hidden_act: str = "silu",
        use_cache: bool = True,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        self.rope_theta = rope_theta
        self.initializer_range = initializer_range
        self.hidden_act = hidden_act
        self.use_cache = use_cache
        self.tie_word_embeddings = tie_word_embeddings
        super().__init__(**kwargs)
