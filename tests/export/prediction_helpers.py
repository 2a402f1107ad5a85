"""A source with known predictions, and images. Child processes import this module."""

import time
from collections.abc import Callable
from pathlib import Path

import torch
from helpers import photograph
from torch import nn

from workbench.augmentation import EvalTransform

NAMES = ["ant", "bee", "Kätzchen"]
IN_PHOTOS = [*(f"{i}.png" for i in range(7)), "below/0.png", "below/1.jpg"]


class Colours(nn.Module):
    """A source whose logits are the mean red, green and blue of the upper half.

    Before each batch it sleeps for `pause` seconds and calls `note` with the number of images.
    """

    device = torch.device("cpu")

    def __init__(
        self,
        note: Callable[[int], object] | None = None,
        pause: float = 0.0,
        fingerprint: str = "colours",
        size: int = 8,
    ):
        super().__init__()
        self.classes, self.transform = NAMES, EvalTransform(8, size)
        self.note, self.pause, self.fingerprint = note, pause, fingerprint

    def forward(self, images):
        time.sleep(self.pause)
        if self.note:
            self.note(len(images))
        assert images.dtype == torch.uint8 and images.shape[1:] == (3, 8, 8)
        return images[:, :, :4].double().mean((2, 3)).div(25).float()


def make_photos(folder: Path) -> Path:
    """The images of IN_PHOTOS in a folder."""
    (folder / "below").mkdir(parents=True)
    for i, name in enumerate(IN_PHOTOS):
        photograph(12 + i, 10, seed=i).save(folder / name)
    return folder
