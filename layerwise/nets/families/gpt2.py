"""GPT-2: learned positions, layer norms, plain feed-forward, and weights stored transposed and fused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from layerwise.errors import BadModel
from layerwise.nets.families.base import (
    AS_MODULE,
    TO_CONFIG,
    Config,
    Family,
    Link,
    read_activation,
    read_dtype,
    uniform_row,
)
from layerwise.spec import Attention, FeedForward, LayerSpec, Norm, StackSpec

OWN = {"architectures", "model_type", "n_layer", "n_embd", "n_head", "n_inner", "n_positions", "vocab_size",
       "layer_norm_epsilon", "activation_function", "tie_word_embeddings", "dtype", "torch_dtype",
       "transformers_version", "n_ctx"}


class GPT2(Family):
    model_type = "gpt2"
    architecture = "GPT2LMHeadModel"

    def spec(self, config: Config) -> StackSpec:
        if config.get("scale_attn_by_inverse_layer_idx") or not config.get("scale_attn_weights", True):
            raise BadModel("a GPT-2 with attention scaled in its own way", expected="1 / sqrt(head width)",
                           do=AS_MODULE)
        hidden, heads = config["n_embd"], config["n_head"]
        norm = Norm(kind="layer", eps=config.get("layer_norm_epsilon", 1e-5))
        attention = Attention(heads, heads, hidden // heads, rope=None, qkv_bias=True, out_bias=True)
        feed_forward = FeedForward(
            config.get("n_inner") or 4 * hidden, gated=False, bias=True,
            activation=read_activation(config, "activation_function", "gelu_new"))
        return StackSpec(
            family=self.model_type, hidden=hidden, vocabulary=config["vocab_size"],
            rows=(LayerSpec(attention, feed_forward, norm),) * config["n_layer"],
            tied=bool(config.get("tie_word_embeddings", True)), dtype=read_dtype(config),
            context=config["n_positions"], learned_positions=config["n_positions"], final_norm=norm,
            extras={key: value for key, value in config.items() if key not in OWN and value is not None})

    def config(self, spec: StackSpec) -> dict[str, Any]:
        row = uniform_row(spec)
        attention, feed_forward = row.mixer, row.feed_forward
        assert isinstance(attention, Attention) and feed_forward is not None
        name = feed_forward.activation
        activation = "gelu_new" if name == "gelu_tanh" else TO_CONFIG[name]
        return dict(spec.extras) | {
            "architectures": [self.architecture], "model_type": self.model_type, "dtype": spec.dtype,
            "n_layer": len(spec.rows), "n_embd": spec.hidden, "n_head": attention.heads,
            "n_inner": feed_forward.width, "n_positions": spec.learned_positions,
            "vocab_size": spec.vocabulary, "layer_norm_epsilon": row.norm.eps,
            "activation_function": activation, "tie_word_embeddings": spec.tied}

    def links(self, spec: StackSpec) -> Iterator[Link]:
        yield Link("embedding.weight", "transformer.wte.weight")
        yield Link("positions.weight", "transformer.wpe.weight")
        if not spec.tied:
            yield Link("head.weight", "lm_head.weight")
        for kind in ("weight", "bias"):
            yield Link(f"norm.{kind}", f"transformer.ln_f.{kind}")
            for layer in range(len(spec.rows)):
                yield from _layer_links(f"layers.{layer}.", f"transformer.h.{layer}.", kind, spec.hidden)


def _layer_links(ours: str, theirs: str, kind: str, hidden: int) -> Iterator[Link]:
    matrix = kind == "weight"
    yield Link(f"{ours}attention.norm.{kind}", f"{theirs}ln_1.{kind}")
    for index, name in enumerate(("q", "k", "v")):
        rows = (index * hidden, (index + 1) * hidden)
        yield Link(f"{ours}attention.body.{name}.{kind}", f"{theirs}attn.c_attn.{kind}",
                   theirs_rows=rows, transpose=matrix)
    yield Link(f"{ours}attention.body.o.{kind}", f"{theirs}attn.c_proj.{kind}", transpose=matrix)
    yield Link(f"{ours}feed_forward.norm.{kind}", f"{theirs}ln_2.{kind}")
    yield Link(f"{ours}feed_forward.body.up.{kind}", f"{theirs}mlp.c_fc.{kind}", transpose=matrix)
    yield Link(f"{ours}feed_forward.body.down.{kind}", f"{theirs}mlp.c_proj.{kind}", transpose=matrix)
