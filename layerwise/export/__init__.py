"""Exports: one format or recipe of another tool per file."""

from layerwise.registry import Registry

EXPORTS = Registry("export", {
    "gguf": "layerwise.export.gguf:GGUF",
    "compressed-tensors": "layerwise.export.compressed_tensors:CompressedTensors",
    "mergekit": "layerwise.export.mergekit:Mergekit",
    "torchao-rules": "layerwise.export.torchao_rules:TorchaoRules",
    "llama.cpp-rules": "layerwise.export.llamacpp_rules:LlamaCppRules",
    "peft-ranks": "layerwise.export.peft_ranks:PeftRanks",
})
"""What a model or a plan can be written as for other tools, by the name given to `layerwise export --to`."""
