"""How many bytes of weights a model's files really hold."""

from __future__ import annotations

from pathlib import Path


def weight_bytes(folder: Path) -> int | None:
    """Bytes of tensors in the safetensors files of `folder`, headers left out; None where there are none."""
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    return sum(_tensor_bytes(path) for path in files) if files else None


def _tensor_bytes(path: Path) -> int:
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    return path.stat().st_size - 8 - header
