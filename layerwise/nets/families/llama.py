"""Llama, and the reader that the families close to it share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from layerwise.nets.families.base import (
    TO_CONFIG,
    Config,
    Family,
    Link,
    read_activation,
    read_dtype,
    read_rope,
    uniform_row,
    write_rope,
)
from layerwise.spec import Attention, FeedForward, LayerSpec, Norm, StackSpec

LAYER_NAMES = {
    "attention.norm.weight": "input_layernorm.weight",
    "attention.body.q": "self_attn.q_proj",
    "attention.body.k": "self_attn.k_proj",
    "attention.body.v": "self_attn.v_proj",
    "attention.body.o": "self_attn.o_proj",
    "attention.body.q_norm.weight": "self_attn.q_norm.weight",
    "attention.body.k_norm.weight": "self_attn.k_norm.weight",
    "feed_forward.norm.weight": "post_attention_layernorm.weight",
    "feed_forward.body.gate": "mlp.gate_proj",
    "feed_forward.body.up": "mlp.up_proj",
    "feed_forward.body.down": "mlp.down_proj",
}


class Llama(Family):
    model_type = "llama"
    architecture = "LlamaForCausalLM"
    names = LAYER_NAMES

    def spec(self, config: Config) -> StackSpec:
        return table(self, config, [self.row(config, layer) for layer in range(config["num_hidden_layers"])])

    def row(self, config: Config, layer: int) -> LayerSpec:
        """One row of the table; families override what differs."""
        return LayerSpec(mixer=self.attention(config, layer), feed_forward=self.feed_forward(config, layer),
                         norm=Norm(eps=config["rms_norm_eps"]))

    def attention(self, config: Config, layer: int) -> Attention:
        heads = config["num_attention_heads"]
        bias = bool(config.get("attention_bias", False))
        return Attention(heads=heads, kv_heads=config.get("num_key_value_heads") or heads,
                         head_dim=config.get("head_dim") or config["hidden_size"] // heads,
                         rope=read_rope(config), qkv_bias=bias, out_bias=bias)

    def feed_forward(self, config: Config, layer: int) -> FeedForward:
        return FeedForward(width=config["intermediate_size"], bias=bool(config.get("mlp_bias", False)),
                           activation=read_activation(config, "hidden_act", "silu"))

    def config(self, spec: StackSpec) -> dict[str, Any]:
        row = uniform_row(spec)
        return common_config(self, spec, row) | {
            "attention_bias": row.mixer.qkv_bias, "mlp_bias": row.feed_forward.bias}  # type: ignore[union-attr]

    def links(self, spec: StackSpec) -> Iterator[Link]:
        yield from outer_links(spec)
        for layer, row in enumerate(spec.rows):
            for ours, theirs in self.tensor_names(row):
                yield Link(f"layers.{layer}.{ours}", f"model.layers.{layer}.{theirs}")

    def tensor_names(self, row: LayerSpec) -> Iterator[tuple[str, str]]:
        """(ours, theirs) for every tensor of one layer."""
        present = set(row_tensors(row))
        for ours, theirs in self.names.items():
            for suffix in ("", ".weight", ".bias"):
                if ours + suffix in present:
                    yield ours + suffix, theirs + suffix


def table(family: Family, config: Config, rows: list[LayerSpec]) -> StackSpec:
    """The stack around `rows`, with everything the layers do not need kept in `extras`."""
    used = {"architectures", "model_type", "num_hidden_layers", "hidden_size", "intermediate_size",
            "torch_dtype", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size",
            "rms_norm_eps", "dtype", "rope_theta", "rope_scaling", "rope_parameters", "tie_word_embeddings",
            "max_position_embeddings", "transformers_version", "attention_bias", "mlp_bias", "hidden_act",
            "layer_types", "sliding_window", "use_sliding_window", "max_window_layers"}
    return StackSpec(
        family=family.model_type, hidden=config["hidden_size"], vocabulary=config["vocab_size"],
        rows=tuple(rows),
        tied=bool(config.get("tie_word_embeddings", False)), dtype=read_dtype(config),
        context=config.get("max_position_embeddings", 2048), final_norm=rows[0].norm if rows else Norm(),
        logit_softcap=config.get("final_logit_softcapping"),
        extras={key: value for key, value in config.items() if key not in used and value is not None})


def common_config(family: Family, spec: StackSpec, row: LayerSpec) -> dict[str, Any]:
    """The entries every Llama-like configuration has."""
    attention, feed_forward = row.mixer, row.feed_forward
    assert isinstance(attention, Attention) and feed_forward is not None
    entries: dict[str, Any] = dict(spec.extras)
    return entries | {
        "architectures": [family.architecture], "model_type": family.model_type, "dtype": spec.dtype,
        "num_hidden_layers": len(spec.rows), "hidden_size": spec.hidden, "vocab_size": spec.vocabulary,
        "intermediate_size": feed_forward.width, "hidden_act": TO_CONFIG[feed_forward.activation],
        "num_attention_heads": attention.heads, "num_key_value_heads": attention.kv_heads,
        "head_dim": attention.head_dim, "rms_norm_eps": row.norm.eps, "tie_word_embeddings": spec.tied,
        "max_position_embeddings": spec.context,
        **({"rope_parameters": write_rope(attention.rope)} if attention.rope else {}),
    }


def outer_links(spec: StackSpec) -> Iterator[Link]:
    """Embedding, final norm, and the head where it is not tied."""
    yield Link("embedding.weight", "model.embed_tokens.weight")
    yield Link("norm.weight", "model.norm.weight")
    if not spec.tied:
        yield Link("head.weight", "lm_head.weight")


def row_tensors(row: LayerSpec) -> Iterator[str]:
    """Our names of the dense tensors of a Llama-like row."""
    attention, feed_forward = row.mixer, row.feed_forward
    if isinstance(attention, Attention):
        yield "attention.norm.weight"
        if row.post_norm:
            yield "attention.post_norm.weight"
        for name in ("q", "k", "v", "o"):
            yield f"attention.body.{name}.weight"
            if attention.out_bias if name == "o" else attention.qkv_bias:
                yield f"attention.body.{name}.bias"
        if attention.qk_norm:
            yield from ("attention.body.q_norm.weight", "attention.body.k_norm.weight")
    if feed_forward is not None:
        yield "feed_forward.norm.weight"
        if row.post_norm:
            yield "feed_forward.post_norm.weight"
        for name in feed_forward.matrices(1):
            yield f"feed_forward.body.{name}.weight"
            if feed_forward.bias:
                yield f"feed_forward.body.{name}.bias"
