"""PEFT: the ranks a plan gives to matrices, as the patterns of a LoRA configuration.

    config = peft.LoraConfig(task_type="CAUSAL_LM", **json.load(open("ranks.json")))

An adapter made so has for every matrix the rank that the plan found worth its bytes, and alpha equal to
the rank, so that its product counts once. Matrices that the plan leaves whole get no adapter.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

from layerwise.errors import BadOption
from layerwise.export.base import NOTHING, Allowed, Export, Written, names
from layerwise.export.compressed_tensors import module_names
from layerwise.export.source import Source
from layerwise.io import atomic
from layerwise.spec import StackSpec


class PeftRanks(Export):
    """rank_pattern and alpha_pattern."""

    summary: ClassVar[str] = "rank_pattern and alpha_pattern for a LoRA configuration"
    suffix: ClassVar[str] = ".json"

    def write(self, source: Source, output: Path, allowed: Allowed = NOTHING) -> Written:
        """Write the patterns to `output`; layers are numbered as in the result.

        Raises BadOption where no matrix of the model has a rank.
        """
        value = lora_config(source.spec)
        if not value["target_modules"]:
            raise BadOption(f"{source.name}, none of whose matrices has a rank",
                            expected="a plan with low-rank choices",
                            do="make one with layerwise optimize --only rank")
        atomic.write_text(output, json.dumps(value, indent=1) + "\n")
        return Written(output, output.stat().st_size, (f"{len(value['target_modules'])} matrices",))


def lora_config(spec: StackSpec) -> dict[str, Any]:
    """Arguments of `LoraConfig`: the most frequent rank is the default, the others are patterns."""
    modules = module_names(spec)
    ranks = {modules[layer, name]: row.ranks[name] for layer, name, row in names(spec.rows, spec.hidden)
             if name in row.ranks}
    usual = Counter(ranks.values()).most_common(1)[0][0] if ranks else 8
    pattern = {f"^{name}$".replace(".", r"\."): rank for name, rank in ranks.items() if rank != usual}
    return {"r": usual, "lora_alpha": usual, "target_modules": list(ranks), "rank_pattern": pattern,
            "alpha_pattern": dict(pattern)}
