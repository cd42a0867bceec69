"""A GGUF file seen as a checkpoint of transformers: configuration, tensor names, and changed values undone.

Layers of a `deci` file may differ: it is a Llama with numbers of heads and widths for each layer, no heads meaning
no attention. Writers of GGUF change values for four reasons, all reversed here: Llama-like queries and keys have
the two halves of each head interleaved, Gemma norms hold 1 + weight, GPT-2 matrices are transposed, and the Llama
3.1 rotary scaling is stored as a table of divisors instead of its parameters.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layerwise.errors import BadFile, BadModel
from layerwise.io.checkpoint import Checkpoint, missing
from layerwise.io.gguf import GGUFFile
from layerwise.nets.flow import frequencies
from layerwise.spec import Attention, LayerSpec, Rope, StackSpec

LLAMA = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}
MIXTRAL = LLAMA | {
    "ffn_gate_inp": "block_sparse_moe.gate", "ffn_gate": "block_sparse_moe.experts.{}.w1",
    "ffn_up": "block_sparse_moe.experts.{}.w3", "ffn_down": "block_sparse_moe.experts.{}.w2",
}
QWEN3_MOE = LLAMA | {
    "ffn_gate_inp": "mlp.gate", "ffn_gate": "mlp.experts.{}.gate_proj", "ffn_up": "mlp.experts.{}.up_proj",
    "ffn_down": "mlp.experts.{}.down_proj",
}
GEMMA3 = LLAMA | {
    "post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
GPT2 = {
    "token_embd": "transformer.wte", "position_embd": "transformer.wpe", "output_norm": "transformer.ln_f",
    "output": "lm_head", "attn_norm": "ln_1", "attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2", "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj",
}
NAMES = {"llama": LLAMA, "mixtral": MIXTRAL, "qwen2": LLAMA, "qwen3": LLAMA, "qwen3_moe": QWEN3_MOE,
         "gemma3_text": GEMMA3, "gpt2": GPT2}
"""Model type to {name in GGUF: name in transformers}; {} stands for the expert's number."""

ARCHITECTURES = {"llama": "llama", "deci": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "qwen3moe": "qwen3_moe",
                 "gemma3": "gemma3_text", "gpt2": "gpt2"}
WIDTHS = ("attention.head_count", "attention.head_count_kv", "feed_forward_length")
SIZES = ("hidden_size", "n_embd", "intermediate_size", "n_inner", "num_attention_heads", "n_head",
         "num_key_value_heads", "head_dim", "moe_intermediate_size")
IGNORED = {"rope_freqs"}
TENSOR = re.compile(r"(?:blk\.(?P<layer>\d+)\.)?(?P<name>\w+?)(?P<stack>_exps)?(?:\.(?P<expert>\d+))?"
                    r"\.(?P<kind>weight|bias)")


@dataclass(frozen=True)
class Place:
    """A tensor of transformers in the file: the stored tensor and, of a stack of experts, which one."""

    stored: str
    part: tuple[int, int] | None = None


class GGUFCheckpoint(Checkpoint):
    """The tensors of a GGUF file by their names in transformers, quantised ones as `dtype`.

    `config` is the configuration as `config.json` would hold it. Raises BadFile where the file is damaged,
    BadModel where its architecture is not one of ours.
    """

    def __init__(self, path: str | Path, dtype: torch.dtype | None = None) -> None:
        self.place = Path(path)
        self.file = GGUFFile(path)
        self.config = read_config(self.file)
        self._dtype = dtype or getattr(torch, self.config["dtype"])
        self._places = dict(_places(self.file, self.config))

    def names(self) -> frozenset[str]:
        return frozenset(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        place = self._place(name)
        shape = self.file.tensors[place.stored].shape
        if place.part is not None:
            return shape[1:]
        return shape[::-1] if self._transposed(name) else shape

    def dtype(self, name: str) -> torch.dtype:
        from layerwise.io.gguf import PLAIN

        return PLAIN.get(self.file.tensors[self._place(name).stored].type, self._dtype)

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {name: self._read(name) for name in names}

    def uneven(self, spec: StackSpec) -> StackSpec:
        """`spec` with the widths of each layer where the file gives them."""
        arch = self.file.metadata["general.architecture"]
        if not any(isinstance(self.file.metadata.get(f"{arch}.{key}"), list) for key in WIDTHS):
            return spec
        columns = [_each(self.file.metadata[f"{arch}.{key}"], len(spec.rows)) for key in WIDTHS]
        rows = (_row(row, *widths) for row, *widths in zip(spec.rows, *columns, strict=True))
        return replace(spec, rows=tuple(rows))

    def storage(self) -> dict[str, int]:
        """How many tensors are stored as each GGML type."""
        types = [self.file.type_name(name) for name in self.file.tensors]
        return {name: types.count(name) for name in sorted(set(types))}

    def _place(self, name: str) -> Place:
        if name not in self._places:
            raise missing(name, self)
        return self._places[name]

    def _read(self, name: str) -> Tensor:
        place = self._place(name)
        tensor = self.file.read(place.stored, self._dtype, place.part)
        family = self.config["model_type"]
        if family in ("llama", "mixtral") and (".q_proj." in name or ".k_proj." in name):
            return _halves(tensor, tensor.shape[0] // self.config["head_dim"])
        if family == "gemma3_text" and name.endswith("norm.weight"):
            return tensor.float() - 1
        return tensor.T if self._transposed(name) else tensor

    def _transposed(self, name: str) -> bool:
        return self.config["model_type"] == "gpt2" and name.startswith("transformer.h.") and \
            len(self.file.tensors[self._place(name).stored].shape) == 2


def _halves(interleaved: Tensor, heads: int) -> Tensor:
    """Rows (x0, y0, x1, y1, ...) of every head as (x0, x1, ..., y0, y1, ...)."""
    half = interleaved.shape[0] // heads // 2
    return interleaved.view(heads, half, 2, *interleaved.shape[1:]).transpose(1, 2).reshape(interleaved.shape)


def _row(row: LayerSpec, heads: int, kv_heads: int, width: int) -> LayerSpec:
    assert isinstance(row.mixer, Attention) and row.feed_forward is not None
    mixer = replace(row.mixer, heads=heads, kv_heads=kv_heads) if heads else None
    return replace(row, mixer=mixer, feed_forward=replace(row.feed_forward, width=width))


def _each(value: int | list[int], layers: int) -> list[int]:
    return value if isinstance(value, list) else [value] * layers


def _largest(value: int | list[int]) -> int:
    return max(value) if isinstance(value, list) else value


def _places(file: GGUFFile, config: dict[str, Any]) -> Iterator[tuple[str, Place]]:
    names = NAMES[config["model_type"]]
    layers = "transformer.h" if config["model_type"] == "gpt2" else "model.layers"
    for stored in file.tensors:
        match = TENSOR.fullmatch(stored)
        if match is None or match["name"] in IGNORED:
            continue
        if match["name"] not in names:
            raise BadModel(f"{file.path} has a tensor {stored}",
                           expected=f"the tensors of {config['model_type']}",
                           do="convert the original checkpoint to a Hugging Face folder and open that")
        prefix = f"{layers}.{match['layer']}." if match["layer"] else ""
        target = f"{prefix}{names[match['name']]}.{match['kind']}"
        if match["stack"]:
            count = file.tensors[stored].shape[0]
            yield from ((target.format(i), Place(stored, (i, count))) for i in range(count))
        else:
            yield target.format(match["expert"]), Place(stored)


def read_config(file: GGUFFile) -> dict[str, Any]:
    """The metadata as a configuration of transformers."""
    architecture = str(file.metadata.get("general.architecture"))
    if architecture not in ARCHITECTURES:
        raise BadModel(f"{file.path} holds a model of architecture {architecture!r}",
                       expected=f"one of {', '.join(ARCHITECTURES)}",
                       do="load it with transformers (gguf_file=...) and pass the module to layerwise.open")
    try:
        config = _gpt2(file) if architecture == "gpt2" else _llama_like(file, architecture)
    except KeyError as error:
        raise BadFile(f"{file.path} lacks the metadata or tensor {error}",
                      expected=f"what {architecture} needs", do="fetch the file again") from error
    for key in SIZES:
        if config.get(key, 1) < 1 and not (key == "intermediate_size" and "num_experts" in config):
            raise BadFile(f"{file.path} says that {key} is {config[key]}", expected="1 or more",
                          do="fetch the file again")
    ids = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    found = {key: file.metadata.get(f"tokenizer.ggml.{name}_token_id") for key, name in ids.items()}
    return config | {key: value for key, value in found.items() if value is not None}


def _common(file: GGUFFile) -> dict[str, Any]:
    matrices = {file.type_name(name) for name, tensor in file.tensors.items() if len(tensor.shape) > 1}
    plain = {"F32": "float32", "F16": "float16"}
    dtype = plain.get(matrices.pop(), "bfloat16") if len(matrices) == 1 else "bfloat16"
    return {"vocab_size": file.tensors["token_embd.weight"].shape[0], "dtype": dtype,
            "tie_word_embeddings": "output.weight" not in file.tensors}


def _gpt2(file: GGUFFile) -> dict[str, Any]:
    data = file.metadata
    return _common(file) | {
        "model_type": "gpt2", "n_layer": data["gpt2.block_count"], "n_embd": data["gpt2.embedding_length"],
        "n_head": data["gpt2.attention.head_count"], "n_positions": data["gpt2.context_length"],
        "n_inner": data["gpt2.feed_forward_length"], "activation_function": "gelu_new",
        "layer_norm_epsilon": _rounded(data["gpt2.attention.layer_norm_epsilon"])}


def _llama_like(file: GGUFFile, architecture: str) -> dict[str, Any]:
    data = {key.removeprefix(f"{architecture}."): value for key, value in file.metadata.items()}
    heads = _largest(data["attention.head_count"])
    width = data.get("attention.key_length") or data["embedding_length"] // max(heads, 1)  # none is refused below
    config = _common(file) | {
        "model_type": ARCHITECTURES[architecture], "num_hidden_layers": data["block_count"],
        "hidden_size": data["embedding_length"], "intermediate_size": _largest(data.get("feed_forward_length", 0)),
        "num_attention_heads": heads, "num_key_value_heads": _largest(data.get("attention.head_count_kv", heads)),
        "head_dim": width, "max_position_embeddings": data["context_length"], "hidden_act": "silu",
        "rms_norm_eps": _rounded(data["attention.layer_norm_rms_epsilon"]),
        "rope_parameters": _rope(file, data, width),
        "attention_bias": any(name.endswith("attn_q.bias") for name in file.tensors),
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
    }
    if data.get("rope.dimension_count", width) != width:
        raise BadModel(f"{file.path} rotates {data['rope.dimension_count']} of {width} dimensions of a head",
                       expected="all of them", do="open it as a module through transformers")
    if architecture == "gemma3":
        return config | _gemma(data, config)
    if data.get("expert_count"):
        width = data.get("expert_feed_forward_length", config["intermediate_size"])
        config |= {"num_experts_per_tok": data["expert_used_count"], "norm_topk_prob": True,
                   "num_experts": data["expert_count"], "num_local_experts": data["expert_count"],
                   "moe_intermediate_size": width}
        if architecture == "llama":
            config["model_type"] = "mixtral"
    return config


def _gemma(data: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    largest = config["num_hidden_layers"] == 62  # only the 27B model scales queries by hidden / heads
    rope = config["rope_parameters"]
    local = {"rope_type": "default", "rope_theta": _rounded(data.get("rope.freq_base_swa", 10_000.0))}
    return {
        "sliding_window": data.get("attention.sliding_window"), "hidden_activation": "gelu_pytorch_tanh",
        **_pattern(data.get("attention.sliding_window_pattern", 6)),
        "query_pre_attn_scalar": config["hidden_size"] // config["num_attention_heads"] if largest
        else config["head_dim"],
        "final_logit_softcapping": data.get("final_logit_softcapping"),
        "rope_parameters": {"full_attention": rope, "sliding_attention": local}}


def _pattern(given: int | list[bool]) -> dict[str, Any]:
    """Which layers slide, by a period or one by one."""
    if isinstance(given, int):
        return {"sliding_window_pattern": given}
    return {"layer_types": ["sliding_attention" if slides else "full_attention" for slides in given]}


def _rope(file: GGUFFile, data: dict[str, Any], width: int) -> dict[str, Any]:
    theta = _rounded(data.get("rope.freq_base", 10_000.0))
    if "rope_freqs.weight" in file.tensors:
        return _llama3(file, theta, width)
    kind = data.get("rope.scaling.type", "none")
    if kind == "none":
        return {"rope_type": "default", "rope_theta": theta}
    return {"rope_type": kind, "rope_theta": theta, "factor": _rounded(data.get("rope.scaling.factor", 1.0))}


def _llama3(file: GGUFFile, theta: float, width: int) -> dict[str, Any]:
    """The published Llama 3.1 parameters whose divisors are those in the file."""
    divisors = file.read("rope_freqs.weight", torch.float32)
    rope = Rope(theta, "llama3", float(divisors.max()))
    expected = frequencies(Rope(theta), width) / frequencies(rope, width)
    if divisors.shape != expected.shape or not torch.allclose(divisors, expected, rtol=1e-3):
        raise BadModel(f"{file.path} scales rotary frequencies by its own table",
                       expected="the Llama 3.1 rule", do="open it as a module through transformers")
    return {"rope_type": "llama3", "rope_theta": theta, "factor": rope.factor,
            "low_freq_factor": rope.low_frequency_factor, "high_freq_factor": rope.high_frequency_factor,
            "original_max_position_embeddings": rope.original_context}


def _rounded(value: float) -> float:
    """The short decimal that a float32 was written from."""
    return float(f"{value:.7g}")
