"""The layer table as GGUF metadata: sizes, rotary embedding, windows; per layer where rows differ."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from layerwise.export.base import refuse
from layerwise.spec import Attention, FeedForward, LayerSpec, Rope, StackSpec

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "mixtral": "llama", "qwen2": "qwen2", "qwen3": "qwen3",
                 "qwen3_moe": "qwen3moe", "gemma3_text": "gemma3", "gpt2": "gpt2"}
UNEVEN = "deci"
"""The architecture of llama.cpp whose layers may be of different widths, or without attention; else a Llama."""

EMPTY_WIDTH = 32
"""A layer without its feed-forward half is written with one of this width and zeros: llama.cpp passes over the
attention of a layer that says 0."""

GEMMA_PERIOD = 6
GEMMA_27B_LAYERS = 62


def architecture(spec: StackSpec) -> str:
    """The GGUF architecture for a table. Raises BadOption where there is none."""
    if spec.family not in ARCHITECTURES:
        raise refuse(f"a model of the family {spec.family}", "GGUF", f"one of {', '.join(ARCHITECTURES)}",
                     "keep the model in layerwise's own format")
    name = ARCHITECTURES[spec.family]
    if not _even(spec.rows):
        if name != "llama" or any(_experts(row) for row in spec.rows):
            raise refuse(f"a {spec.family} whose layers differ in width, or lack a half", "GGUF",
                         "equal layers, or a Llama", "make a plan without widths and halves")
        if spec.rows[0].mixer is None:
            raise refuse("a model without attention in its first layer", "llama.cpp",
                         "heads there, whose width it takes for all", "keep the attention of the first layer")
        return UNEVEN
    return name


def metadata(spec: StackSpec, name: str) -> dict[str, Any]:
    """Key to value, architecture included; `name` is the model's."""
    arch = architecture(spec)
    found = {"context_length": spec.context, "embedding_length": spec.hidden, "block_count": len(spec.rows),
             "vocab_size": spec.vocabulary, **_sizes(spec)}
    if arch == "gpt2":
        found["attention.layer_norm_epsilon"] = spec.final_norm.eps
    else:
        found |= {"attention.layer_norm_rms_epsilon": spec.final_norm.eps, **_rope(spec)}
    if arch == "gemma3":
        found |= _gemma(spec)
    windows = [mixer.window for mixer in attentions(spec) if mixer.window is not None]
    if windows and arch != "gemma3":
        raise refuse(f"attention within a window of {windows[0]} tokens", f"GGUF's {arch}", "attention to all tokens",
                     "keep the model in layerwise's own format")
    if spec.logit_softcap is not None and arch != "gemma3":
        raise refuse("a cap on logits", f"GGUF's {arch}", "no cap", "keep the model in layerwise's own format")
    outer = {"general.architecture": arch, "general.name": name, "general.quantization_version": 2}
    return outer | {f"{arch}.{key}": value for key, value in found.items()}


def attentions(spec: StackSpec) -> list[Attention]:
    """The attention of every layer that has one."""
    return [row.mixer for row in spec.rows if isinstance(row.mixer, Attention)]


def _sizes(spec: StackSpec) -> dict[str, Any]:
    def each(value: Callable[[LayerSpec], int]) -> int | list[int]:
        values = [value(row) for row in spec.rows]
        return values[0] if len(set(values)) == 1 else values

    def attention(row: LayerSpec, name: str) -> int:
        return getattr(row.mixer, name) if isinstance(row.mixer, Attention) else 0

    widths = {mixer.head_dim for mixer in attentions(spec)}
    if len(widths) > 1:
        raise refuse(f"heads of {sorted(widths)} dimensions in one model", "GGUF", "one size of heads",
                     "make a plan that keeps it")
    width = widths.pop() if widths else spec.hidden
    found = {"feed_forward_length": each(lambda row: row.feed_forward.width if row.feed_forward else EMPTY_WIDTH),
             "attention.head_count": each(lambda row: attention(row, "heads"))}
    if spec.family == "gpt2":
        return found
    found |= {"attention.head_count_kv": each(lambda row: attention(row, "kv_heads")),
              "attention.key_length": width, "attention.value_length": width}
    experts = spec.rows[0].feed_forward
    if experts is not None and experts.experts:
        found |= {"expert_count": experts.experts, "expert_used_count": experts.experts_per_token}
        if spec.family == "qwen3_moe":
            found["expert_feed_forward_length"] = experts.width
    if spec.family in ("llama", "mistral", "mixtral"):
        found["rope.dimension_count"] = width
    return found


def _rope(spec: StackSpec) -> dict[str, Any]:
    ropes = {mixer.rope for mixer in attentions(spec) if mixer.window is None or spec.family != "gemma3_text"}
    if len(ropes) != 1 or None in ropes:
        raise refuse(f"{len(ropes)} kinds of rotary embedding", "GGUF", "one for all layers",
                     "keep the model in layerwise's own format")
    rope = ropes.pop()
    assert isinstance(rope, Rope)
    found: dict[str, Any] = {"rope.freq_base": rope.theta}
    if rope.kind == "linear":
        found |= {"rope.scaling.type": "linear", "rope.scaling.factor": rope.factor}
    return found


def llama3_rope(spec: StackSpec) -> Rope | None:
    """The rotary embedding that GGUF stores as a table of divisors, if the model has it."""
    ropes = [mixer.rope for mixer in attentions(spec) if mixer.rope is not None and mixer.rope.kind == "llama3"]
    return ropes[0] if ropes else None


def _gemma(spec: StackSpec) -> dict[str, Any]:
    mixers = attentions(spec)
    layers = len(spec.rows)
    divisor = spec.hidden // mixers[0].heads if layers == GEMMA_27B_LAYERS else mixers[0].head_dim
    if any(mixer.scale is not None and round(mixer.scale**-2) != divisor for mixer in mixers):
        raise refuse(f"attention scaled by {mixers[0].scale:.4g} in a Gemma 3 of {layers} layers", "llama.cpp",
                     f"{divisor**-0.5:.4g}, which it takes from the number of layers", "keep all layers")
    windows = [mixer.window for mixer in mixers]
    width = next((window for window in windows if window is not None), None)
    if width is None:
        return {}
    slides = [window is not None for window in windows]
    local = next(mixer.rope for mixer in mixers if mixer.window is not None)
    found: dict[str, Any] = {"attention.sliding_window": width}
    if local is not None and local.theta != 10_000.0:
        found["rope.freq_base_swa"] = local.theta
    if slides != [bool((layer + 1) % GEMMA_PERIOD) for layer in range(layers)]:
        found["attention.sliding_window_pattern"] = slides
    if spec.logit_softcap is not None:
        found["final_logit_softcapping"] = spec.logit_softcap
    return found


def _even(rows: tuple[LayerSpec, ...]) -> bool:
    return len({_widths(row) for row in rows}) <= 1 and all(row.mixer and row.feed_forward for row in rows)


def _widths(row: LayerSpec) -> tuple[int, ...]:
    mixer, feed = row.mixer, row.feed_forward
    heads = (mixer.heads, mixer.kv_heads, mixer.head_dim) if isinstance(mixer, Attention) else ()
    return (*heads, feed.width if isinstance(feed, FeedForward) else 0)


def _experts(row: LayerSpec) -> int:
    return row.feed_forward.experts if row.feed_forward else 0
