"""Gemma 3 (text): scaled embeddings, norms around both halves, mostly sliding layers, their own rotation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from layerwise.nets.families.base import Config, read_activation, read_rope, uniform, write_rope
from layerwise.nets.families.llama import LAYER_NAMES, Llama, common_config, table
from layerwise.nets.families.qwen2 import window_config
from layerwise.spec import Attention, FeedForward, LayerSpec, Norm, Rope, StackSpec


class Gemma3(Llama):
    model_type = "gemma3_text"
    architecture = "Gemma3ForCausalLM"
    names = LAYER_NAMES | {
        "attention.post_norm.weight": "post_attention_layernorm.weight",
        "feed_forward.norm.weight": "pre_feedforward_layernorm.weight",
        "feed_forward.post_norm.weight": "post_feedforward_layernorm.weight",
    }

    def spec(self, config: Config) -> StackSpec:
        rows = [self.row(config, layer) for layer in range(config["num_hidden_layers"])]
        spec = table(self, config, rows)
        own = {"query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping",
               "hidden_activation", "rope_local_base_freq", "sliding_window_pattern",
               "_sliding_window_pattern"}
        extras = {key: value for key, value in spec.extras.items() if key not in own}
        return replace(spec, extras=extras, embedding_scale=config["hidden_size"] ** 0.5,
                       tied=bool(config.get("tie_word_embeddings", True)))

    def row(self, config: Config, layer: int) -> LayerSpec:
        return LayerSpec(mixer=self.attention(config, layer), feed_forward=self.feed_forward(config, layer),
                         norm=Norm(eps=config["rms_norm_eps"], offset=1.0), post_norm=True)

    def attention(self, config: Config, layer: int) -> Attention:
        slides = layer_types(config)[layer] == "sliding_attention"
        unrotated = {**config, "rope_parameters": None, "rope_scaling": None}
        return replace(super().attention(unrotated, layer),
                       window=config["sliding_window"] if slides else None, qk_norm=True,
                       scale=config.get("query_pre_attn_scalar", 256) ** -0.5,
                       softcap=config.get("attn_logit_softcapping"), rope=rotation(config, slides))

    def feed_forward(self, config: Config, layer: int) -> FeedForward:
        return FeedForward(width=config["intermediate_size"],
                           activation=read_activation(config, "hidden_activation", "gelu_pytorch_tanh"))

    def config(self, spec: StackSpec) -> dict[str, Any]:
        row = uniform(spec, _without_span)
        attention = row.mixer
        assert isinstance(attention, Attention) and attention.scale is not None
        entries = common_config(self, spec, row) | window_config(spec)
        entries["hidden_activation"] = entries.pop("hidden_act")
        del entries["use_sliding_window"]
        entries["sliding_window"] = entries["sliding_window"] or 512
        return entries | {
            "query_pre_attn_scalar": round(attention.scale**-2), "attn_logit_softcapping": attention.softcap,
            "final_logit_softcapping": spec.logit_softcap, "attention_bias": attention.qkv_bias,
            "rope_parameters": _rope_parameters(spec)}


def layer_types(config: Config) -> list[str]:
    """One entry a layer; older configurations give only the period of the full layers."""
    if config.get("layer_types"):
        return list(config["layer_types"])
    period = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or 6
    return ["sliding_attention" if (layer + 1) % period else "full_attention"
            for layer in range(config["num_hidden_layers"])]


def rotation(config: Config, slides: bool) -> Rope:
    """Sliding layers turn with the local base frequency, full layers with the scaled global one."""
    given = config.get("rope_parameters") or {}
    kind = "sliding_attention" if slides else "full_attention"
    if kind in given:
        return read_rope({"rope_parameters": given[kind]})
    if slides:
        return Rope(theta=config.get("rope_local_base_freq", 10_000.0))
    return read_rope(config, theta=1_000_000.0)


def _rope_parameters(spec: StackSpec) -> dict[str, Any]:
    entries = {"sliding_attention": write_rope(Rope()), "full_attention": write_rope(Rope(theta=1_000_000.0))}
    for row in spec.rows:
        assert isinstance(row.mixer, Attention) and row.mixer.rope is not None
        entries["sliding_attention" if row.mixer.window else "full_attention"] = write_rope(row.mixer.rope)
    return entries


def _without_span(row: LayerSpec) -> LayerSpec:
    assert isinstance(row.mixer, Attention)
    return replace(row, mixer=replace(row.mixer, window=None, rope=None))
