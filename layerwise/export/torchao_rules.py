"""torchao: which configuration each module gets, as the JSON that torchao reads back.

    config = torchao.core.config.config_from_dict(json.load(open("rules.json")))
    torchao.quantization.quantize_(model, config, filter_fn=None)

Rounding is torchao's own: the rules say bits, groups and symmetry, and apply to the original model. Matrices
become integers with scales that any device can multiply with; 8 bits symmetric by rows gets the
configuration that has kernels everywhere.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

from layerwise.export.base import NOTHING, Allowed, Export, Written, check_rows, names, refuse
from layerwise.export.compressed_tensors import module_names
from layerwise.export.source import Source
from layerwise.io import atomic
from layerwise.spec import Format, StackSpec


class TorchaoRules(Export):
    """Module names to torchao configurations."""

    summary: ClassVar[str] = "a torchao configuration by module name"
    suffix: ClassVar[str] = ".json"

    def write(self, source: Source, output: Path, allowed: Allowed = NOTHING) -> Written:
        """Write the rules to `output`.

        Raises BadOption where the plan does more than pack linear layers and `dense` is not allowed.
        """
        spec = source.spec
        check_rows(spec.rows, "torchao")
        if source.layers != tuple(range(len(source.spec.rows))):
            raise refuse("dropped layers", "torchao", "all layers of the original",
                         "drop them with the mergekit recipe, and write rules for that model")
        left_out = _check(spec, allowed)
        rules = module_rules(spec)
        value = {"_type": "FqnToConfig", "_version": 1, "_data": {"fqn_to_config": rules}}
        atomic.write_text(output, json.dumps(value, indent=1) + "\n")
        notes = [f"{len(rules)} modules"] + ([f"{left_out} left unpacked"] if left_out else [])
        return Written(output, output.stat().st_size, tuple(notes))


def module_rules(spec: StackSpec) -> dict[str, Any]:
    """Module name in transformers to a torchao configuration as JSON, for every packed matrix."""
    modules = module_names(spec)
    return {modules[layer, name]: config(row.formats[name]) for layer, name, row in names(spec.rows, spec.hidden)
            if name in row.formats and name not in row.ranks}


def config(format: Format) -> dict[str, Any]:
    """One weight-only configuration."""
    if format.bits == 8 and format.symmetric and not format.group:
        return {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {}}
    grain = {"_type": "PerGroup", "_version": 1, "_data": {"group_size": format.group}} if format.group else \
        {"_type": "PerAxis", "_version": 1, "_data": {"axis": 0}}
    mapping = {"_type": "MappingType", "_data": "SYMMETRIC" if format.symmetric else "ASYMMETRIC"}
    return {"_type": "IntxWeightOnlyConfig", "_version": 2, "_data": {
        "weight_dtype": {"_type": "torch.dtype", "_data": f"int{format.bits}"}, "granularity": grain,
        "mapping_type": mapping}}


def _check(spec: StackSpec, allowed: Allowed) -> int:
    """How many choices are passed over. Raises BadOption for the first where that is not allowed."""
    found = [f"the {name} in {format.words}" for name, format in
             (("embedding", spec.embedding_format), ("head", spec.head_format)) if format]
    for layer, row in enumerate(spec.rows):
        found += [f"the matrix {name!r} of layer {layer} as two factors" for name in row.ranks]
        routed = row.feed_forward is not None and row.feed_forward.experts
        if row.formats and (routed or spec.family == "gpt2"):
            found.append(f"packed experts or fused matrices in layer {layer}")
    if found and not allowed.dense:
        raise refuse(found[0], "torchao's rules", "packed linear layers", "allow --allow-dense to leave it as it is")
    return len(found)
