"""The Mooshak model for transformers, loaded with `trust_remote_code=True`.

Shape suffixes: B batch, T time, S time of the keys, D model width, H query heads,
G key/value heads, K head width, V vocabulary. The function is that of mooshak_torch/model.py; the
attention itself, its masks and the cache are those of transformers.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward
from transformers.utils import can_return_tuple

from .configuration_mooshak import MooshakConfig


class MooshakRMSNorm(nn.Module):
    """x / rms(x) * gain in at least float32, cast once."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x_BTD: Tensor) -> Tensor:
        wide_BTD = x_BTD.to(torch.promote_types(x_BTD.dtype, torch.float32))
        scale_BT1 = torch.rsqrt(wide_BTD.square().mean(-1, keepdim=True) + self.eps)
        return (wide_BTD * scale_BT1 * self.weight).to(x_BTD.dtype)


def rotary(config: MooshakConfig, positions_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Return cos and sin of the RoPE angles, each float64 [B, 1, T, K / 2]."""
    exponents = torch.arange(0, config.head_dim, 2, device=positions_BT.device).double()
    frequencies = config.rope_theta ** (-exponents / config.head_dim)
    angles_B1Tk = (positions_BT.unsqueeze(-1) * frequencies).unsqueeze(1)
    return angles_B1Tk.cos(), angles_B1Tk.sin()


def rotate(x_BHTK: Tensor, cos_B1Tk: Tensor, sin_B1Tk: Tensor) -> Tensor:
    """Apply RoPE to the halves of each head, in at least float32."""
    wide = torch.promote_types(x_BHTK.dtype, torch.float32)
    cos, sin = cos_B1Tk.to(wide), sin_B1Tk.to(wide)
    a, b = x_BHTK.to(wide).chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x_BHTK.dtype)


class MooshakAttention(nn.Module):
    """Causal self-attention with rotary positions, heads concatenated, no output projection."""

    def __init__(self, config: MooshakConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim, self.scaling = config.head_dim, config.head_dim**-0.5
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.is_causal = True
        keys_GK = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys_GK, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, keys_GK, bias=False)

    def forward(
        self,
        x_BTD: Tensor,
        rotary: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        **kwargs: Any,
    ) -> Tensor:
        q, k, v = (
            linear(x_BTD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, *rotary), rotate(k, *rotary)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend = eager_attention_forward
        if self.config._attn_implementation != "eager":
            attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        out_BTHK, _ = attend(self, q, k, v, attention_mask, scaling=self.scaling, **kwargs)
        return out_BTHK.flatten(2)


class MooshakMLP(nn.Module):
    """SwiGLU: down (silu(gate x) * up x)."""

    def __init__(self, config: MooshakConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))


class MooshakDecoderLayer(GradientCheckpointingLayer):
    """One layer: h = x + Attention(x); y = RMSNorm_output(h + MLP(RMSNorm_mlp(h)))."""

    def __init__(self, config: MooshakConfig, layer_idx: int):
        super().__init__()
        self.self_attn = MooshakAttention(config, layer_idx)
        self.post_attention_layernorm = MooshakRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MooshakMLP(config)
        self.output_layernorm = MooshakRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x_BTD: Tensor, **kwargs: Any) -> Tensor:
        h_BTD = x_BTD + self.self_attn(x_BTD, **kwargs)
        return self.output_layernorm(h_BTD + self.mlp(self.post_attention_layernorm(h_BTD)))


class MooshakPreTrainedModel(PreTrainedModel):
    config: MooshakConfig
    config_class = MooshakConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MooshakDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True


class MooshakModel(MooshakPreTrainedModel):
    """Embedding and layers; the last layer's norm is the model's."""

    def __init__(self, config: MooshakConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            MooshakDecoderLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Return the last layer's hidden states, [B, T, D], of tokens [B, T] or embeddings."""
        x_BTD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            start = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = (torch.arange(x_BTD.shape[1], device=x_BTD.device) + start).unsqueeze(0)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=x_BTD,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        angles = rotary(self.config, position_ids)
        states = [x_BTD]
        for layer in self.layers:
            x_BTD = layer(
                x_BTD,
                rotary=angles,
                attention_mask=mask,
                past_key_values=past_key_values,
                **kwargs,
            )
            states.append(x_BTD)
        return BaseModelOutputWithPast(
            last_hidden_state=x_BTD,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=tuple(states) if output_hidden_states else None,
        )


class MooshakForCausalLM(MooshakPreTrainedModel, GenerationMixin):
    """The language model."""

    def __init__(self, config: MooshakConfig):
        super().__init__(config)
        self.model = MooshakModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits [B, T, V] of the last `logits_to_keep` positions (0: all).

        With labels, also the loss.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            **kwargs,
        )
        where = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_BTV = self.lm_head(outputs.last_hidden_state[:, where])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits_BTV, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits_BTV,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )
