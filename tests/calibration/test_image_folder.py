"""Calibration images from a folder of pictures."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dsconv_surgery import compress, image_folder
from dsconv_surgery.calibration.image_folder import IMAGENET_MEAN, IMAGENET_STD
from dsconv_surgery.cli.inputs import image_batches


def save(path: Path, value: int, height: int = 9, width: int = 9) -> None:
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(np.full((height, width, 3), value, dtype=np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten grey pictures, the value of each ten times its number, half of them in a folder below."""
    for index in range(10):
        save(tmp_path / ("b" if index >= 5 else "a") / f"{index}.png", 10 * index)
    (tmp_path / "notes.txt").write_text("no picture")
    return tmp_path


def test_pictures_are_scaled_cropped_and_normalised(tmp_path: Path) -> None:
    save(tmp_path / "grey.png", 128, 40, 70)
    (batch,) = image_folder(tmp_path, size=(12, 16), mean=(0.5, 0.4, 0.3), std=[0.1, 0.2, 0.5])
    expected = (128 / 255 - torch.tensor([0.5, 0.4, 0.3])) / torch.tensor([0.1, 0.2, 0.5])
    torch.testing.assert_close(batch, expected.view(1, 3, 1, 1).expand(1, 3, 12, 16))
    (batch,) = image_folder(tmp_path, size=8)
    assert batch.shape == (1, 3, 8, 8)
    assert batch[0, :, 0, 0].tolist() == pytest.approx([(128 / 255 - m) / s for m, s in zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)])


def test_the_middle_of_a_picture_is_used(tmp_path: Path) -> None:
    """Of 8x24 pixels in three colours."""
    pixels = np.zeros((8, 24, 3), dtype=np.uint8)
    pixels[:, 8:16] = 255
    Image.fromarray(pixels).save(tmp_path / "stripes.png")
    (batch,) = image_folder(tmp_path, size=8, mean=0.0, std=1.0)
    assert batch.min() == 1.0


def test_count_spreads_over_all_pictures_and_batch_splits_them(folder: Path) -> None:
    batches = image_folder(str(folder), size=4, mean=0, std=1 / 255, count=5, batch=2)
    assert [len(batch) for batch in batches] == [2, 2, 1]
    assert torch.cat(batches)[:, 0, 0, 0].tolist() == pytest.approx([0, 20, 40, 60, 80])
    assert len(torch.cat(image_folder(folder, size=4))) == 10


def test_grey_images(folder: Path) -> None:
    """With ImageNet's numbers, their means over channels count."""
    (batch,) = image_folder(folder, size=4, channels=1)
    assert batch.shape == (10, 1, 4, 4)
    assert float(batch[0, 0, 0, 0]) == pytest.approx(-sum(IMAGENET_MEAN) / sum(IMAGENET_STD))


def test_the_command_line_reads_the_same(folder: Path) -> None:
    numbers = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    texts = (",".join(map(str, values)) for values in numbers.values())
    batches, others = image_folder(folder, size=(6, 7), count=7, **numbers), image_batches(folder, torch.zeros(1, 3, 6, 7), 7, *texts)
    assert all(torch.equal(batch, other) for batch, other in zip(batches, others, strict=True))


def test_it_calibrates(folder: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3)).eval()
    assert compress(model, torch.rand(1, 3, 8, 8), calibration=image_folder(folder, size=8), schemes="channel").plan.calibrated


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "size=0, channels=3, .* expected 1 or 3 channels and positive whole numbers"),
        ({"size": 4.5}, r"size=4.5"),
        ({"size": (4, 4, 4)}, r"size=\(4, 4, 4\)"),
        ({"channels": 2}, "channels=2"),
        ({"count": 0}, "count=0"),
        ({"std": 0.0}, "std=0.0: expected one positive number, or 3 of them"),
        ({"mean": (0.5, 0.5)}, r"mean=\(0.5, 0.5\): expected one number, or 3 of them"),
        ({"mean": float("nan")}, "mean=nan: expected one number"),
        ({"path": "nowhere"}, "image_folder: nowhere is not a folder"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=message):
        image_folder(**{"path": folder, "size": 4, **arguments})


def test_files_that_are_no_pictures(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no pictures in this folder"):
        image_folder(tmp_path, size=4)
    (tmp_path / "broken.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"broken.png: not a picture that pillow can read"):
        image_folder(tmp_path, size=4)


def test_without_pillow_the_error_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ValueError, match=r"pip install 'dsconv_surgery\[examples\]'"):
        image_folder(folder, size=4)
