"""Images are read, brought to one size, labelled, and split by content."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from layerwise.data import ImageData
from layerwise.errors import BadData, BadFile, BadOption, MissingExtra

RED, BLUE = (200, 0, 0), (0, 0, 200)


def encoded(colour: tuple[int, int, int], size: tuple[int, int] = (20, 10), kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, kind)
    return buffer.getvalue()


def archive(path: Path, images: list[bytes], **extra: np.ndarray) -> Path:
    offsets = np.cumsum([0, *map(len, images)])
    np.savez(path, jpeg=np.frombuffer(b"".join(images), dtype=np.uint8), offsets=offsets, **extra)
    return path


def test_folder_of_classes(tmp_path: Path) -> None:
    for name, colour in (("cats", RED), ("dogs", BLUE)):
        (tmp_path / name).mkdir()
        for number in range(2):
            (tmp_path / name / f"{number}.png").write_bytes(encoded(colour))
    data = ImageData.from_folder(tmp_path, side=8, mean=(0, 0, 0), std=(1, 1, 1))
    assert data.classes == ("cats", "dogs")
    assert data.labels().tolist() == [0, 0, 1, 1]
    [batch] = data.batches()
    assert batch.pixels_BCHW.shape == (4, 3, 8, 8)
    assert batch.pixels_BCHW[0, :, 0, 0].tolist() == pytest.approx([200 / 255, 0, 0])


def test_flat_folder_has_no_labels(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(RED))
    data = ImageData.from_folder(tmp_path)
    [batch] = data.batches()
    assert batch.pixels_BCHW.shape == (1, 3, 10, 20)
    assert batch.labels_B is None
    with pytest.raises(BadData, match="has no labels"):
        data.labels()


def test_archive(tmp_path: Path) -> None:
    path = archive(tmp_path / "test.npz", [encoded(RED, kind="JPEG"), encoded(BLUE, kind="JPEG")],
                   labels=np.array([1, 0]), classes=np.array(["blue", "red"]))
    data = ImageData.from_npz(path)
    first, second = data.batches(1)
    assert [data.classes[int(batch.labels_B)] for batch in (first, second) if batch.labels_B is not None] == [
        "red", "blue"]
    assert int(first.pixels_BCHW[0, :, 5, 5].argmax()) == 0
    assert int(second.pixels_BCHW[0, :, 5, 5].argmax()) == 2


def test_normalisation_and_layouts_of_arrays() -> None:
    images = np.full((2, 4, 6, 3), 255, dtype=np.uint8)
    [batch] = ImageData.from_arrays(images, [0, 1], mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)).batches()
    assert batch.pixels_BCHW.shape == (2, 3, 4, 6)
    assert batch.pixels_BCHW.unique().tolist() == [2.0]
    for shape in ((2, 4, 6), (2, 1, 4, 6), (2, 4, 6, 1)):
        [batch] = ImageData.from_arrays(np.zeros(shape, dtype=np.uint8)).batches()
        assert batch.pixels_BCHW.shape == (2, 3, 4, 6)


def test_middle_is_cut_out_of_a_resized_image() -> None:
    image = np.zeros((1, 10, 30, 3), dtype=np.uint8)
    image[:, :, 10:20] = 255
    [batch] = ImageData.from_arrays(image, side=10, mean=(0, 0, 0), std=(1, 1, 1)).batches()
    assert batch.pixels_BCHW.shape == (1, 3, 10, 10)
    assert batch.pixels_BCHW.min() == 1


def test_equal_images_fall_on_the_same_side() -> None:
    images = np.random.default_rng(0).integers(0, 256, (60, 4, 4, 3), dtype=np.uint8)
    data = ImageData.from_arrays(np.concatenate([images, images]), list(range(60)) * 2)
    halves = [set(data.split(split).labels().tolist()) for split in ("calibration", "verification")]
    assert not halves[0] & halves[1]
    assert halves[0] | halves[1] == set(range(60))
    assert min(map(len, halves)) > 15


def test_take() -> None:
    data = ImageData.from_arrays(np.zeros((9, 2, 2, 3), dtype=np.uint8), range(9))
    assert data.take(3).labels().tolist() == [0, 1, 2]
    drawn = data.take(4, seed=1).labels().tolist()
    assert drawn == sorted(drawn)
    assert drawn == data.take(4, seed=1).labels().tolist()


def test_shapes_are_repeatable_balanced_and_share_nothing_between_splits() -> None:
    calibration, again = ImageData.shapes(200), ImageData.shapes(200)
    verification = ImageData.shapes(200, split="verification")

    def contents(data: ImageData) -> set[bytes]:
        return {item.numpy().tobytes() for item in data.items if isinstance(item, torch.Tensor)}

    assert torch.equal(calibration.labels(), again.labels())
    assert contents(calibration) == contents(again)
    assert len(contents(calibration)) == 200
    assert not contents(calibration) & contents(verification)
    assert calibration.labels().bincount().min() > 25


def test_a_small_network_learns_the_shapes() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 12, 5, 2, 2), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Conv2d(12, 24, 3, 2, 1), nn.BatchNorm2d(24), nn.ReLU(),
        nn.Conv2d(24, 48, 3, 2, 1), nn.BatchNorm2d(48), nn.ReLU(),
        nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(48, 4))
    optimiser = torch.optim.Adam(net.parameters(), 5e-3)
    for batch in ImageData.shapes(150 * 32).batches(32):
        loss = nn.functional.cross_entropy(net(batch.pixels_BCHW), batch.labels_B)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    [test] = ImageData.shapes(200, split="verification").batches(200)
    assert float((net.eval()(test.pixels_BCHW).argmax(1) == test.labels_B).float().mean()) > 0.6


def test_damaged_input(tmp_path: Path) -> None:
    whole = encoded(RED, kind="JPEG")
    with pytest.raises(BadFile, match="no readable image"):
        list(ImageData([whole[:len(whole) // 2]], "half").batches())
    (tmp_path / "a.npz").write_bytes(b"PK\x03\x04 not a zip")
    with pytest.raises(BadFile, match="not an image archive"):
        ImageData.from_npz(tmp_path / "a.npz")
    bad = tmp_path / "b.npz"
    np.savez(bad, jpeg=np.zeros(10, dtype=np.uint8), offsets=np.array([0, 5, 12]))
    with pytest.raises(BadFile, match="do not divide its 10 bytes"):
        ImageData.from_npz(bad)
    with pytest.raises(BadData, match="no images"):
        ImageData.from_folder(tmp_path / "missing")
    with pytest.raises(BadData, match="2 images and 1 labels"):
        ImageData.from_arrays(np.zeros((2, 4, 4, 3), dtype=np.uint8), [0])
    with pytest.raises(BadData, match="uint8"):
        ImageData.from_arrays(np.zeros((2, 4, 4, 3)))
    with pytest.raises(BadData, match="different sizes"):
        list(ImageData([encoded(RED), encoded(BLUE, (5, 5))], "mixed").batches())
    with pytest.raises(BadOption, match="side=0"):
        list(ImageData([encoded(RED)], "one", side=0).batches())


def test_pillow_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert len(ImageData.shapes(2)) == 2
    with pytest.raises(MissingExtra, match=r"layerwise\[images\]"):
        list(ImageData([b""], "one").batches())
