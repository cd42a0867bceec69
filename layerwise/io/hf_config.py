"""The configuration of a layer-table folder, as transformers sees it."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig


class LayerwiseConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """`layer_table` is a `StackSpec` as JSON; the sizes beside it are what other tools look for."""

    model_type = "layerwise"

    def __init__(self, layer_table: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.layer_table = layer_table
        super().__init__(**kwargs)
        if layer_table is not None:
            _register_model()


def _register_model() -> None:
    from transformers import AutoModelForCausalLM

    from layerwise.io.hf_model import LayerwiseForCausalLM

    AutoModelForCausalLM.register(LayerwiseConfig, LayerwiseForCausalLM, exist_ok=True)
