"""Writes a tiny model of transformers as GGUF, the way llama.cpp's converter does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from layerwise.nets.flow import frequencies
from layerwise.spec import Rope

ARCHITECTURE = {"llama": "llama", "mixtral": "llama", "qwen2": "qwen2", "qwen3": "qwen3",
                "qwen3_moe": "qwen3moe", "gemma3_text": "gemma3", "gpt2": "gpt2"}
NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "mlp.gate": "ffn_gate_inp",
    "block_sparse_moe.gate": "ffn_gate_inp",
    "transformer.wte": "token_embd", "transformer.wpe": "position_embd", "transformer.ln_f": "output_norm",
    "ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
}
GEMMA = NAMES | {"post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
                 "post_feedforward_layernorm": "post_ffw_norm"}
EXPERTS = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps",
           "w1": "ffn_gate_exps", "w3": "ffn_up_exps", "w2": "ffn_down_exps"}


def write_gguf(model: Any, tensors: dict[str, Tensor], path: Path,
               kind: gguf.GGMLQuantizationType | None = None) -> Path:
    """Write `tensors` (as saved by transformers) of `model`; matrices as `kind` where it is given."""
    config = model.config
    writer = gguf.GGUFWriter(str(path), ARCHITECTURE[config.model_type])
    _metadata(writer, config)
    for name, tensor in _renamed(config, tensors).items():
        data = tensor.float().contiguous().numpy()
        if kind is not None and data.ndim > 1:
            writer.add_tensor(name, gguf.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, data.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _metadata(writer: gguf.GGUFWriter, config: Any) -> None:
    gpt2 = config.model_type == "gpt2"
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd if gpt2 else config.intermediate_size)
    _tokenizer(writer, config.vocab_size)
    if gpt2:
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(width)
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if config.model_type in ("llama", "mixtral"):
        writer.add_rope_dimension_count(width)
    if config.model_type == "gemma3_text":
        writer.add_sliding_window(config.sliding_window)
    if config.model_type in ("mixtral", "qwen3_moe"):
        writer.add_expert_count(config.num_local_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if config.model_type == "qwen3_moe":
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)


def _tokenizer(writer: gguf.GGUFWriter, size: int) -> None:
    """A byte-level vocabulary of printable characters and the one merge "a b"."""
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<s>", "</s>", *map(chr, range(33, 127)), "ab", *map(chr, range(161, 300))][:size])
    writer.add_token_types([3, 3] + [1] * (size - 2))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)


def _renamed(config: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    stacks: dict[str, dict[int, Tensor]] = {}
    for name, tensor in tensors.items():
        stem, _, suffix = name.rpartition(".")
        prefix, inner = "", stem
        if ".layers." in name or ".h." in name:
            _, _, layer, inner = stem.split(".", 3)
            prefix = f"blk.{layer}."
        if ".experts." in inner:
            *_, expert, matrix = inner.split(".")
            stacks.setdefault(f"{prefix}{EXPERTS[matrix]}.{suffix}", {})[int(expert)] = tensor
            continue
        names = GEMMA if config.model_type == "gemma3_text" else NAMES
        out[f"{prefix}{names[inner]}.{suffix}"] = _changed(config, inner, tensor)
    out |= {name: torch.stack([parts[i] for i in sorted(parts)]) for name, parts in stacks.items()}
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "llama3":
        width = config.hidden_size // config.num_attention_heads
        scaled = Rope(rope["rope_theta"], "llama3", rope["factor"])
        out["rope_freqs.weight"] = frequencies(Rope(rope["rope_theta"]), width) / frequencies(scaled, width)
    return out


def _changed(config: Any, inner: str, tensor: Tensor) -> Tensor:
    """The value as it is stored: interleaved heads, norms plus one, transposed matrices."""
    if config.model_type in ("llama", "mixtral") and inner in ("self_attn.q_proj", "self_attn.k_proj"):
        heads = config.num_attention_heads if "q_proj" in inner else config.num_key_value_heads
        rows = tensor.shape[0] // heads
        return tensor.reshape(heads, 2, rows // 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
    if config.model_type == "gemma3_text" and inner.endswith("norm"):
        return tensor + 1
    return tensor.T if inner.startswith(("attn.c_", "mlp.c_")) and tensor.dim() == 2 else tensor
