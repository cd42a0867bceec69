"""Mamba 2: rows of one half, a state space; no attention and no feed-forward network."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from layerwise.errors import BadModel
from layerwise.nets.families.base import AS_MODULE, Config, Family, Link, not_uniform, read_dtype
from layerwise.spec import LayerSpec, Norm, StackSpec, StateSpace

NO_END = 1 << 20
"""The context of a model that counts no positions and names no limit."""

NO_LIMIT = {"__float__": "Infinity"}
"""How transformers writes infinity, for which JSON has no word."""

OWN = {"architectures", "model_type", "num_heads", "head_dim", "vocab_size", "hidden_size", "state_size",
       "num_hidden_layers", "layer_norm_epsilon", "expand", "conv_kernel", "n_groups", "use_bias", "use_conv_bias",
       "hidden_act", "time_step_limit", "tie_word_embeddings", "dtype", "torch_dtype", "transformers_version"}

MIXER_NAMES = {
    "in_proj.weight": "in_proj.weight", "in_proj.bias": "in_proj.bias",
    "out_proj.weight": "out_proj.weight", "out_proj.bias": "out_proj.bias",
    "conv_weight": "conv1d.weight", "conv_bias": "conv1d.bias",
    "dt_bias": "dt_bias", "A_log": "A_log", "D": "D", "norm_weight": "norm.weight",
}


class Mamba2(Family):
    model_type = "mamba2"
    architecture = "Mamba2ForCausalLM"

    def spec(self, config: Config) -> StackSpec:
        check_activation(config)
        shortest, longest = read_limits(config)
        mixer = StateSpace(
            heads=config["num_heads"], head_dim=config["head_dim"], state=config["state_size"],
            groups=config["n_groups"], conv=config["conv_kernel"], conv_bias=bool(config.get("use_conv_bias", True)),
            bias=bool(config.get("use_bias", False)), shortest=shortest, longest=longest)
        norm = Norm(eps=config["layer_norm_epsilon"])
        return StackSpec(
            family=self.model_type, hidden=config["hidden_size"], vocabulary=config["vocab_size"],
            rows=(LayerSpec(mixer, None, norm),) * config["num_hidden_layers"],
            tied=bool(config.get("tie_word_embeddings", False)), dtype=read_dtype(config), context=NO_END,
            final_norm=norm, extras={key: value for key, value in config.items()
                                     if key not in OWN and value is not None})

    def config(self, spec: StackSpec) -> dict[str, Any]:
        row = spec.rows[0] if spec.rows else None
        if row is None or any(other != row for other in spec.rows) or spec.packed():
            raise not_uniform(spec, "its layers are not equal and dense")
        mixer = row.mixer
        if not isinstance(mixer, StateSpace) or row.feed_forward is not None or mixer.inner % spec.hidden:
            raise not_uniform(spec, "its layers are not one state space each, some times as wide as the stream")
        return dict(spec.extras) | {
            "architectures": [self.architecture], "model_type": self.model_type, "dtype": spec.dtype,
            "num_heads": mixer.heads, "head_dim": mixer.head_dim, "state_size": mixer.state,
            "expand": mixer.inner // spec.hidden, "n_groups": mixer.groups, "conv_kernel": mixer.conv,
            "use_conv_bias": mixer.conv_bias, "use_bias": mixer.bias, "hidden_act": "silu",
            "time_step_limit": write_limits(mixer), "hidden_size": spec.hidden, "vocab_size": spec.vocabulary,
            "num_hidden_layers": len(spec.rows), "layer_norm_epsilon": row.norm.eps,
            "tie_word_embeddings": spec.tied}

    def links(self, spec: StackSpec) -> Iterator[Link]:
        yield Link("embedding.weight", "backbone.embeddings.weight")
        yield Link("norm.weight", "backbone.norm_f.weight")
        if not spec.tied:
            yield Link("head.weight", "lm_head.weight")
        for layer, row in enumerate(spec.rows):
            theirs = f"backbone.layers.{layer}."
            yield Link(f"layers.{layer}.attention.norm.weight", f"{theirs}norm.weight")
            yield from mixer_links(row, layer, f"{theirs}mixer.")


def mixer_links(row: LayerSpec, layer: int, theirs: str) -> Iterator[Link]:
    """The tensors of a row's state space."""
    mixer = row.mixer
    assert isinstance(mixer, StateSpace)
    absent = set() if mixer.bias else {"in_proj.bias", "out_proj.bias"}
    absent |= set() if mixer.conv_bias else {"conv_bias"}
    for ours, name in MIXER_NAMES.items():
        if ours not in absent:
            yield Link(f"layers.{layer}.attention.body.{ours}", theirs + name)


def check_activation(config: Config) -> None:
    """Raises BadModel unless the convolution ends in silu."""
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise BadModel(f"a state space with the activation {config['hidden_act']!r}", expected="silu", do=AS_MODULE)


def read_limits(config: Config) -> tuple[float, float | None]:
    """The shortest and the longest time step; None for no limit."""
    limits: list[Any] = config.get("time_step_limit") or [0.0, NO_LIMIT]
    shortest, longest = limits
    return float(shortest), None if longest in (NO_LIMIT, float("inf")) else float(longest)


def write_limits(mixer: StateSpace) -> list[Any]:
    """The inverse of `read_limits`."""
    return [mixer.shortest, NO_LIMIT if mixer.longest is None else mixer.longest]
