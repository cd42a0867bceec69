"""Bamba: state spaces in most rows, attention that turns half of each head in the others, a gated network in all."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from layerwise.nets.families.base import Config, Link, not_uniform, read_rope, write_rope
from layerwise.nets.families.llama import LAYER_NAMES, Llama, common_config, table
from layerwise.nets.families.mamba2 import check_activation, mixer_links, read_limits, write_limits
from layerwise.spec import Attention, LayerSpec, StackSpec, StateSpace

PART = 0.5
OWN = {"attn_layer_indices", "mamba_n_heads", "mamba_d_head", "mamba_n_groups", "mamba_d_state", "mamba_d_conv",
       "mamba_expand", "mamba_conv_bias", "mamba_proj_bias", "time_step_limit", "partial_rotary_factor"}


class Bamba(Llama):
    model_type = "bamba"
    architecture = "BambaForCausalLM"
    names = LAYER_NAMES | {
        "feed_forward.norm.weight": "pre_ff_layernorm.weight",
        "feed_forward.body.gate": "feed_forward.gate_proj",
        "feed_forward.body.up": "feed_forward.up_proj",
        "feed_forward.body.down": "feed_forward.down_proj",
    }

    def spec(self, config: Config) -> StackSpec:
        check_activation(config)
        spec = table(self, config, [self.row(config, layer) for layer in range(config["num_hidden_layers"])])
        return replace(spec, extras={key: value for key, value in spec.extras.items() if key not in OWN})

    def row(self, config: Config, layer: int) -> LayerSpec:
        row = super().row(config, layer)
        attends = layer in (config.get("attn_layer_indices") or [])
        return row if attends else replace(row, mixer=self.state_space(config))

    def attention(self, config: Config, layer: int) -> Attention:
        given = {key: value for key, value in (config.get("rope_parameters") or {}).items()
                 if key != "partial_rotary_factor"}
        whole = {**config, "rope_parameters": given, "partial_rotary_factor": None}
        return replace(super().attention(whole, layer), rope=replace(read_rope(whole), part=PART))

    def state_space(self, config: Config) -> StateSpace:
        """The mixer of every row without attention."""
        heads, inner = config["mamba_n_heads"], config["mamba_expand"] * config["hidden_size"]
        width = config.get("mamba_d_head", "auto")
        shortest, longest = read_limits(config)
        return StateSpace(
            heads=heads, head_dim=inner // heads if width == "auto" else int(width), state=config["mamba_d_state"],
            groups=config["mamba_n_groups"], conv=config["mamba_d_conv"],
            conv_bias=bool(config.get("mamba_conv_bias", True)), bias=bool(config.get("mamba_proj_bias", False)),
            shortest=shortest, longest=longest)

    def config(self, spec: StackSpec) -> dict[str, Any]:
        attending = [layer for layer, row in enumerate(spec.rows) if isinstance(row.mixer, Attention)]
        spaces = [row.mixer for row in spec.rows if isinstance(row.mixer, StateSpace)]
        if not attending or not spaces or len(attending) + len(spaces) < len(spec.rows) or spec.packed():
            raise not_uniform(spec, "it needs dense rows of attention and of state spaces, and no others")
        row, mixer = spec.rows[attending[0]], spaces[0]
        alike = all(other in (row, replace(row, mixer=mixer)) for other in spec.rows)
        if not alike or mixer.inner % spec.hidden:
            raise not_uniform(spec, "rows of one kind differ")
        attention = row.mixer
        assert isinstance(attention, Attention) and row.feed_forward is not None
        if attention.rope is None or attention.rope.part != PART or attention.shares is not None:
            raise not_uniform(spec, "its attention is another one")
        entries = common_config(self, spec, row)
        return entries | {
            "rope_parameters": write_rope(attention.rope) | {"partial_rotary_factor": PART},
            "attention_bias": attention.qkv_bias, "mlp_bias": row.feed_forward.bias, "attn_layer_indices": attending,
            "mamba_n_heads": mixer.heads, "mamba_d_head": mixer.head_dim, "mamba_n_groups": mixer.groups,
            "mamba_d_state": mixer.state, "mamba_d_conv": mixer.conv, "mamba_expand": mixer.inner // spec.hidden,
            "mamba_conv_bias": mixer.conv_bias, "mamba_proj_bias": mixer.bias,
            "time_step_limit": write_limits(mixer)}

    def links(self, spec: StackSpec) -> Iterator[Link]:
        for link in super().links(spec):
            yield replace(link, theirs="model.final_layernorm.weight") if link.ours == "norm.weight" else link
        for layer, row in enumerate(spec.rows):
            if isinstance(row.mixer, StateSpace):
                yield Link(f"layers.{layer}.attention.norm.weight", f"model.layers.{layer}.input_layernorm.weight")
                yield from mixer_links(row, layer, f"model.layers.{layer}.mamba.")
