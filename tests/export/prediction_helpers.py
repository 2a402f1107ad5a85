"""A source with known predictions, images and lists. Child processes import this module."""

import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from workbench.augmentation import EvalTransform

NAMES = ["ant", "bee", "Kätzchen"]
IN_PHOTOS = [*(f"{i}.png" for i in range(7)), "below/0.png", "below/1.jpg"]


class Colours(nn.Module):
    """A source whose logits are the mean red, green and blue."""

    device = torch.device("cpu")

    def __init__(self, pause: float = 0.0, fingerprint: str = "colours", size: int = 8):
        super().__init__()
        self.classes, self.transform = NAMES, EvalTransform(8, size)
        self.pause, self.fingerprint = pause, fingerprint

    def forward(self, images):
        time.sleep(self.pause)
        assert images.dtype == torch.uint8 and images.shape[1:] == (3, 8, 8)
        return images.double().mean((2, 3)).div(25).float()


class Recording(Colours):
    """Calls `note` with the number of images before each batch."""

    def __init__(self, note):
        super().__init__()
        self.note = note

    def forward(self, images):
        self.note(len(images))
        return super().forward(images)


def save_noise(path: Path, seed: int, size: tuple[int, int] = (20, 16)) -> Path:
    """An image of smooth noise (width x height) that no other seed gives."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


def write_list(path: Path, *rows: str) -> Path:
    """A list file with one row per line."""
    path.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    return path


def make_photos(folder: Path) -> Path:
    """The images of IN_PHOTOS in a folder."""
    (folder / "below").mkdir(parents=True)
    for i in range(7):
        save_noise(folder / f"{i}.png", i, (12 + i, 10))
    save_noise(folder / "below" / "0.png", 10)
    save_noise(folder / "below" / "1.jpg", 11)
    return folder
