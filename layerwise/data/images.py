"""Images with labels, decoded and normalised batch by batch.

Shapes: N images, B of a batch, C channels, H x W pixels.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from layerwise.data import shapes
from layerwise.data.batch import slices
from layerwise.data.split import SPLITS, Split, check_split
from layerwise.errors import BadData, BadFile, BadOption, MissingExtra

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
Item = Path | bytes | Tensor


@dataclass(frozen=True)
class ImageBatch:
    """`pixels_BCHW` float32, normalised; `labels_B` int64, or None."""

    pixels_BCHW: Tensor
    labels_B: Tensor | None = None


@dataclass(frozen=True)
class ImageData:
    """Images kept as files, encoded bytes or uint8 [C, H, W] tensors, and decoded when a batch is asked for.

    `side` resizes the shorter side and cuts the middle out, so that all images are side x side; None takes
    them as they are. `mean` and `std` are for pixel values from 0 to 1. `labels_N` index into `classes`.
    """

    items: Sequence[Item]
    name: str
    labels_N: Tensor | None = None
    classes: tuple[str, ...] = ()
    side: int | None = None
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        if not len(self.items):
            raise BadData(
                f"{self.name} holds no images",
                expected="at least one image",
                do="check the folder, or take the other split",
            )
        if self.labels_N is not None and len(self.labels_N) != len(self.items):
            raise BadData(
                f"{len(self.items)} images and {len(self.labels_N)} labels",
                expected="one label an image",
                do="check where images and labels come from",
            )

    def __len__(self) -> int:
        return len(self.items)

    def batches(self, size: int = 32) -> Iterator[ImageBatch]:
        """The images in order, `size` at a time. Raises BadData if sizes differ and `side` is None."""
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        for rows in slices(len(self), size):
            pixels = [self._pixels(item) for item in self.items[rows]]
            if len({image.shape for image in pixels}) > 1:
                raise BadData(
                    f"images of different sizes in {self.name}",
                    expected="one size",
                    do="give side=, to which all are brought",
                )
            labels_B = None if self.labels_N is None else self.labels_N[rows]
            yield ImageBatch((torch.stack(pixels).float() / 255 - mean) / std, labels_B)

    def labels(self) -> Tensor:
        """The labels, int64 [N]. Raises BadData where there are none."""
        if self.labels_N is None:
            raise BadData(
                f"{self.name} has no labels",
                expected="labelled images",
                do="use a folder with one subfolder for each class",
            )
        return self.labels_N

    def split(self, split: Split) -> ImageData:
        """The images of one split: a hash of the content decides, so equal images fall on the same side."""
        wanted = SPLITS.index(check_split(split))
        return self._pick([index for index, item in enumerate(self.items) if _side(item) == wanted])

    def take(self, count: int, seed: int | None = None) -> ImageData:
        """The first `count` images, or that many drawn with `seed`, in order."""
        if seed is None:
            return self._pick(list(range(min(count, len(self)))))
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return self._pick(sorted(order[:count].tolist()))

    @classmethod
    def shapes(cls, count: int, *, split: Split = "calibration", seed: int = 0) -> ImageData:
        """`count` drawn pictures of 32 x 32 in four classes (see `shapes.draw`); splits share no picture."""
        wanted, generator = SPLITS.index(check_split(split)), torch.Generator().manual_seed(seed)
        items: list[Tensor] = []
        labels: list[int] = []
        while len(items) < count:
            pixels_NCHW, labels_N = shapes.draw(count, generator)
            drawn = [
                (image, label)
                for image, label in zip(pixels_NCHW, labels_N.tolist(), strict=True)
                if _side(image) == wanted
            ]
            items += [image for image, _ in drawn]
            labels += [label for _, label in drawn]
        return cls(items[:count], "shapes", torch.tensor(labels[:count]), shapes.KINDS)

    @classmethod
    def from_arrays(
        cls, images: Any, labels: Any = None, *, name: str = "images", **options: Any
    ) -> ImageData:
        """From uint8 images [N, H, W], [N, H, W, C] or [N, C, H, W] (C 1 or 3), as tensor or array."""
        pixels = torch.as_tensor(np.asarray(images))
        if pixels.dtype != torch.uint8 or pixels.ndim not in (3, 4):
            raise BadData(
                f"images of type {pixels.dtype} and shape {tuple(pixels.shape)}",
                expected="uint8, [N, H, W], [N, H, W, C] or [N, C, H, W]",
                do="scale them to 0-255 and convert",
            )
        if pixels.ndim == 3:
            pixels = pixels[:, None]
        elif pixels.shape[1] not in (1, 3):
            pixels = pixels.permute(0, 3, 1, 2)
        if pixels.shape[1] == 1:
            pixels = pixels.expand(-1, 3, -1, -1)
        labels_N = None if labels is None else torch.as_tensor(np.asarray(labels)).long()
        return cls(list(pixels), name, labels_N, **options)

    @classmethod
    def from_folder(cls, folder: str | Path, **options: Any) -> ImageData:
        """Image files of a folder in sorted order; if it has subfolders with images, each is a class."""
        root = Path(folder)
        files = sorted(path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        classes = tuple(sorted({path.parent.relative_to(root).as_posix() for path in files}))
        if classes in ((), (".",)):
            return cls(files, str(root), **options)
        labels = [classes.index(path.parent.relative_to(root).as_posix()) for path in files]
        return cls(files, str(root), torch.tensor(labels), classes, **options)

    @classmethod
    def from_npz(cls, path: str | Path, **options: Any) -> ImageData:
        """Encoded images in one file: `jpeg` (their bytes, joined), `offsets` (n + 1), `labels`, `classes`.

        Raises BadFile if the file is damaged or laid out differently.
        """
        try:
            with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
                data, offsets = file["jpeg"].tobytes(), file["offsets"].astype(np.int64)
                labels = file["labels"].astype(np.int64) if "labels" in file else None
                names = [str(name) for key in ("classes", "names") if key in file for name in file[key]]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise BadFile(
                f"{path} is not an image archive ({error})",
                expected="arrays jpeg, offsets and labels",
                do="check the path",
            ) from error
        if len(offsets) < 1 or (np.diff(offsets) <= 0).any() or offsets[0] != 0 or offsets[-1] != len(data):
            raise BadFile(
                f"{path} has offsets that do not divide its {len(data)} bytes",
                expected="n + 1 ascending offsets from 0 to the number of bytes",
                do="write the file anew",
            )
        items = [data[start:end] for start, end in itertools.pairwise(offsets.tolist())]
        labels_N = None if labels is None else torch.from_numpy(labels)
        return cls(items, Path(path).stem, labels_N, tuple(names), **options)

    def _pick(self, indices: list[int]) -> ImageData:
        labels_N = None if self.labels_N is None else self.labels_N[indices]
        return replace(self, items=[self.items[index] for index in indices], labels_N=labels_N)

    def _pixels(self, item: Item) -> Tensor:
        """One image, uint8 [C, H, W]."""
        if isinstance(item, Tensor) and (self.side is None or item.shape[1:] == (self.side, self.side)):
            return item
        image = _open(item)
        if self.side is not None:
            image = _square(image, self.side)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _side(item: Item) -> int:
    """0 or 1, from the content alone."""
    if isinstance(item, Tensor):
        content = item.numpy().tobytes()
    else:
        content = item.read_bytes() if isinstance(item, Path) else item
    return hashlib.sha256(content).digest()[0] % 2


def _open(item: Item) -> Any:
    """A Pillow image in RGB."""
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtra("pillow", "images", "reading images") from error
    if isinstance(item, Tensor):
        return Image.fromarray(item.permute(1, 2, 0).contiguous().numpy())
    try:
        return Image.open(io.BytesIO(item) if isinstance(item, bytes) else item).convert("RGB")
    except OSError as error:
        where = item if isinstance(item, Path) else f"{len(item)} bytes"
        raise BadFile(
            f"{where}: no readable image ({error})",
            expected="a whole PNG, JPEG, WebP or BMP",
            do="replace or remove the file",
        ) from error


def _square(image: Any, side: int) -> Any:
    """Resized so that the shorter side is `side`, then the middle cut out."""
    if side < 1:
        raise BadOption(
            f"side={side}", expected="a positive number of pixels", do="give side=224, for instance"
        )
    scale = side / min(image.size)
    width, height = (max(side, round(length * scale)) for length in image.size)
    left, top = (width - side) // 2, (height - side) // 2
    return image.resize((width, height)).crop((left, top, left + side, top + side))
