"""Lets transformers open folders in the layer-table format, whichever of the two packages is imported first.

Nothing of transformers is imported here: the configuration class is registered as soon as transformers'
own table of configurations exists, the model class when such a configuration is made.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

TABLE = "transformers.models.auto.configuration_auto"


def register_when_imported() -> None:
    """Make `AutoConfig` and `AutoModelForCausalLM` know the format, now or once they are imported."""
    if TABLE in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    from transformers.models.auto.configuration_auto import AutoConfig

    from layerwise.io.hf_config import LayerwiseConfig

    AutoConfig.register(LayerwiseConfig.model_type, LayerwiseConfig, exist_ok=True)


class _Finder(MetaPathFinder):
    """Waits for one module, lets the ordinary finders find it, and registers after it has run."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
                  ) -> ModuleSpec | None:
        if fullname != TABLE:
            return None
        sys.meta_path.remove(self)
        for finder in sys.meta_path:
            spec = finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                _after(spec)
                return spec
        return None


def _after(spec: ModuleSpec) -> None:
    loader = spec.loader
    assert loader is not None
    run = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        run(module)
        _register()

    loader.exec_module = exec_module  # type: ignore[method-assign]
