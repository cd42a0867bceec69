"""`layerwise doctor`: whether this environment, and a model, are in order."""

from __future__ import annotations

import shutil
import sys
from typing import Annotated

import typer

from layerwise.cli.options import Json, demo_names
from layerwise.cli.screen import Screen

Given = Annotated[
    str | None,
    typer.Argument(metavar="[MODEL]", help="Check this model's files and weights too.", autocompletion=demo_names),
]
EXTRAS = {"peft": "peft", "datasets": "datasets", "images": "PIL", "serve": "fastapi", "eval": "lm_eval"}


def doctor(model: Given = None, as_json: Json = False) -> None:
    """Check this environment, or a model.

    Shows versions, machine and optional packages. With a MODEL every byte of it is read, its checksums are
    compared, and it runs once.
    """
    screen = Screen(as_json)
    found = environment()
    for name, value in found.items():
        screen.show(f"{name:<20} {_words(value)}")
    result: dict[str, object] = {"environment": found}
    if model is not None:
        result["model"] = _examine(model, screen)
    screen.finish(result)


def environment() -> dict[str, object]:
    """Versions, machine, disk, cache folder, and which optional packages are there."""
    from importlib.util import find_spec

    import torch

    from layerwise.nets.compiled import library, matrix_unit
    from layerwise.nets.dense import SLOW
    from layerwise.places import cache_folder
    from layerwise.report.machine import machine, versions

    cache = cache_folder()
    place = next(parent for parent in (cache, *cache.parents) if parent.exists())
    return {
        **versions(),
        **machine(),
        "fast bfloat16": torch.bfloat16 not in SLOW,
        "compiled kernels": library() is not None,
        "matrix unit": matrix_unit(),
        "interpreter": sys.executable,
        "cache": str(cache),
        "disk_free_bytes": shutil.disk_usage(place).free,
        "extras": {extra: find_spec(package) is not None for extra, package in EXTRAS.items()},
        "torch threads": torch.get_num_threads(),
    }


def _examine(model: str, screen: Screen) -> dict[str, object]:
    import torch

    from layerwise.io import manifest
    from layerwise.report.files import weight_bytes
    from layerwise.report.table import size
    from layerwise.stack.decoder import DecoderStack
    from layerwise.stack.open import open

    screen.tell(f"opening {model}")
    stack = open(model)
    assert isinstance(stack, DecoderStack)
    if stack.folder is not None:
        screen.tell("comparing checksums")
        manifest.verify(stack.folder, largest=sys.maxsize)
    screen.tell("reading every weight")
    stack.finite()
    screen.tell("running one pass")
    generator = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(stack.spec.vocabulary, (1, 16), generator=generator)
    with torch.inference_mode():
        finite = bool(torch.isfinite(stack(tokens_BT)).all())
    on_disk = weight_bytes(stack.folder) if stack.folder else None
    screen.show(f"\n{stack.spec}")
    checks: dict[str, object] = {
        "finite weights": True,
        "finite logits": finite,
        "tokenizer": stack.tokenizer is not None,
        "bytes": stack.spec.bytes(),
        "bytes_on_disk": on_disk,
        "parameters": stack.spec.parameters(),
        "layers": len(stack),
    }
    screen.show(f"\nevery weight is finite; {size(on_disk or stack.spec.bytes())} of weights")
    return checks


def _words(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}: {_words(item)}" for name, item in value.items())
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
