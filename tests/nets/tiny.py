"""Tiny random models of every family, made by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

SHARED: dict[str, Any] = {
    "vocab_size": 131, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
SLIDES = ["sliding_attention", "full_attention", "sliding_attention"]

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": True}),
    "llama-untied": ("llama", {"tie_word_embeddings": False}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-rope-llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama-rope-linear": ("llama", {"rope_parameters": LINEAR}),
    "llama-wide-heads": ("llama", {"head_dim": 16, "num_key_value_heads": 1}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-sliding": ("mistral", {"sliding_window": 5}),
    "qwen2": ("qwen2", {}),
    "qwen2-sliding": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "layer_types": SLIDES}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3-sliding": ("qwen3", {"head_dim": 16, "use_sliding_window": True, "sliding_window": 5,
                                "layer_types": SLIDES, "attention_bias": True}),
    "gemma3": ("gemma3_text", {"head_dim": 16, "sliding_window": 5, "layer_types": SLIDES,
                               "query_pre_attn_scalar": 24}),
    "gemma3-capped": ("gemma3_text", {"head_dim": 16, "sliding_window": 5, "layer_types": SLIDES,
                                      "attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.5}),
    "gpt2": ("gpt2", {"vocab_size": 131, "n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 128}),
    "gpt2-narrow": ("gpt2", {"vocab_size": 131, "n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 128,
                             "n_inner": 40, "activation_function": "relu", "tie_word_embeddings": False}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "mixtral-sliding": ("mixtral", {"num_local_experts": 3, "num_experts_per_tok": 1, "sliding_window": 5}),
    "qwen3-moe": ("qwen3_moe", {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2,
                                "moe_intermediate_size": 24, "norm_topk_prob": True}),
    "qwen3-moe-some-dense": ("qwen3_moe", {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2,
                                           "moe_intermediate_size": 24, "norm_topk_prob": False,
                                           "mlp_only_layers": [1]}),
    "mamba2": ("mamba2", {"num_heads": 12, "head_dim": 8, "state_size": 16, "n_groups": 2}),
    "mamba2-bare": ("mamba2", {"num_heads": 6, "head_dim": 16, "state_size": 8, "n_groups": 1, "conv_kernel": 2,
                               "use_conv_bias": False, "tie_word_embeddings": True}),
    "bamba": ("bamba", {"mamba_n_heads": 12, "mamba_d_state": 16, "mamba_n_groups": 2, "attn_layer_indices": [1]}),
    "bamba-biases": ("bamba", {"mamba_n_heads": 6, "mamba_d_state": 8, "attn_layer_indices": [0, 2],
                               "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
}
"""Name to (model type, configuration on top of SHARED)."""


def tiny(case: str, **changes: Any) -> Any:
    """A random model in float32, its biases and norms random too, so that none of them can be forgotten."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, own = CASES[case]
    config = AutoConfig.for_model(kind, **(own if kind == "gpt2" else SHARED | own) | changes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.dim() == 1 else 0.05))
    return model


def write(model: Any, folder: Path, **kwargs: Any) -> Path:
    """Save `model` in transformers' own way, and return the folder."""
    model.save_pretrained(folder, **kwargs)
    return folder
