"""Model families: how a family's configuration and tensor names map to a layer table, one file each."""

from layerwise.registry import Registry

FAMILIES = Registry("family", {
    "llama": "layerwise.nets.families.llama:Llama",
    "mistral": "layerwise.nets.families.mistral:Mistral",
    "qwen2": "layerwise.nets.families.qwen2:Qwen2",
    "qwen3": "layerwise.nets.families.qwen3:Qwen3",
    "gemma3_text": "layerwise.nets.families.gemma3:Gemma3",
    "gpt2": "layerwise.nets.families.gpt2:GPT2",
    "mixtral": "layerwise.nets.families.mixtral:Mixtral",
    "qwen3_moe": "layerwise.nets.families.qwen3_moe:Qwen3Moe",
    "mamba2": "layerwise.nets.families.mamba2:Mamba2",
    "bamba": "layerwise.nets.families.bamba:Bamba",
})
"""Keyed by the `model_type` of a Hugging Face configuration."""
