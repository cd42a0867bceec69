"""Mixtral: Mistral with routed experts in every layer, stored as one tensor an expert."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from layerwise.nets.families.base import Config, Link, uniform_row
from layerwise.nets.families.llama import common_config
from layerwise.nets.families.mistral import Mistral
from layerwise.spec import FeedForward, StackSpec


class Mixtral(Mistral):
    model_type = "mixtral"
    architecture = "MixtralForCausalLM"

    def feed_forward(self, config: Config, layer: int) -> FeedForward:
        return replace(super().feed_forward(config, layer), experts=config["num_local_experts"],
                       experts_per_token=config["num_experts_per_tok"])

    def config(self, spec: StackSpec) -> dict[str, Any]:
        row = uniform_row(spec)
        experts = row.feed_forward
        assert experts is not None
        return common_config(self, spec, row) | {
            "sliding_window": row.mixer.window,  # type: ignore[union-attr]
            "num_local_experts": experts.experts, "num_experts_per_tok": experts.experts_per_token}

    def links(self, spec: StackSpec) -> Iterator[Link]:
        for link in super().links(spec):
            if ".feed_forward.body." not in link.ours:
                yield link
        yield from expert_links(spec, "block_sparse_moe", {"gate": "w1", "up": "w3", "down": "w2"})


def expert_links(spec: StackSpec, module: str, names: dict[str, str]) -> Iterator[Link]:
    """The router and every expert's matrices: expert e is rows [e * size, (e + 1) * size) of ours."""
    for layer, row in enumerate(spec.rows):
        if row.feed_forward is None or not row.feed_forward.experts:
            continue
        ours, theirs = f"layers.{layer}.feed_forward.body", f"model.layers.{layer}.{module}"
        yield Link(f"{ours}.router.weight", f"{theirs}.gate.weight")
        for name, their_name in names.items():
            size = spec.hidden if name == "down" else row.feed_forward.width
            for expert in range(row.feed_forward.experts):
                yield Link(f"{ours}.{name}.weight", f"{theirs}.experts.{expert}.{their_name}.weight",
                           ours_rows=(expert * size, (expert + 1) * size))
