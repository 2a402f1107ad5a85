"""Random erasing, Mixup and CutMix of a batch on the device.

Parameters are sampled for a whole step and applied to a part of it, so that they do not depend on
the number of processes.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

_ATTEMPTS = 10  # as timm's RandomErasing


@dataclass(frozen=True)
class RandomErasing:
    """Fills up to `count` boxes of an image, after normalisation.

    Zhong et al., arXiv 1708.04896: a box has 2 to 33 % of the area (divided by the number of
    boxes), its height over width is log-uniform from 0.3 to 1 / 0.3. Mode "pixel" fills every pixel
    from N(0, 1), "rand" every channel with one value, "const" with 0, the mean.
    """

    probability: float = 0.25
    mode: str = "pixel"
    count: int = 1
    area: tuple[float, float] = (0.02, 1 / 3)
    ratio: float = 0.3

    def sample_params(
        self, rng: np.random.Generator, images: int, size: int
    ) -> dict[str, np.ndarray]:
        """`boxes` (images, count, 4) as left, top, right, bottom in pixels, `seeds` (images,).

        A box of zeros is none: the image was not chosen, or no box of ten attempts fits.
        """
        chosen = rng.random(images) < self.probability
        number = rng.integers(1, self.count + 1, images)
        seeds = rng.integers(2**62, size=images)
        u = rng.random((4, images, self.count, _ATTEMPTS))
        area = self.area[0] + (self.area[1] - self.area[0]) * u[0]
        area *= size * size / number[:, None, None]
        aspect = np.exp(math.log(self.ratio) * (1 - 2 * u[1]))
        height = np.rint(np.sqrt(area * aspect)).astype(int)
        width = np.rint(np.sqrt(area / aspect)).astype(int)
        left = (u[2] * (size - width + 1)).astype(int)
        top = (u[3] * (size - height + 1)).astype(int)
        fits = (height < size) & (width < size)
        boxes = np.stack([left, top, left + width, top + height], -1)
        boxes = np.take_along_axis(boxes, fits.argmax(2)[..., None, None], 2)[:, :, 0]
        used = chosen[:, None] & fits.any(2) & (np.arange(self.count) < number[:, None])
        return {"boxes": boxes * used[..., None], "seeds": seeds}

    def apply(self, images: torch.Tensor, boxes: np.ndarray, seeds: np.ndarray) -> torch.Tensor:
        """Erases in place; images are normalised, (n, 3, size, size)."""
        generator = torch.Generator(images.device)
        for i in np.flatnonzero(boxes.any((1, 2))).tolist():
            generator.manual_seed(int(seeds[i]))
            for left, top, right, bottom in boxes[i].tolist():
                shape = (3, bottom - top, right - left) if self.mode == "pixel" else (3, 1, 1)
                patch = images[i, :, top:bottom, left:right]
                if self.mode == "const":
                    patch.zero_()
                elif patch.numel():
                    patch.copy_(torch.randn(shape, generator=generator, device=images.device))
        return images


@dataclass(frozen=True)
class MixupCutmix:
    """Mixup or CutMix of every image with a partner, and of their labels by the same share.

    Zhang et al., arXiv 1710.09412: x = lam * x_i + (1 - lam) * x_j, lam from Beta(alpha, alpha).
    Yun et al., arXiv 1905.04899: a box of x_j whose sides are sqrt(1 - lam) of the image's, its
    centre anywhere, clipped at the border, after which lam is the share of x_i that remains. With
    both alphas above 0, CutMix has the probability `switch_prob`. Parameters are sampled once for
    the step, or for every image with `per_sample`; with probability 1 - `prob` nothing is mixed.

    Partners are neighbours in the step, 2k and 2k + 1. The order of a step is random, so this is as
    good as any pairing, and it is the same for any number of processes.
    """

    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    switch_prob: float = 0.5
    per_sample: bool = False
    prob: float = 1.0

    def sample_params(
        self, rng: np.random.Generator, images: int, size: int
    ) -> dict[str, np.ndarray]:
        """`lam` (images,), the weight of an image itself, and `boxes` (images, 4).

        Boxes are left, top, right, bottom in pixels; all zero for Mixup.
        """
        n = images if self.per_sample else 1
        cut = rng.random(n) < (self.switch_prob if self.mixup_alpha else 1.0)
        cut &= self.cutmix_alpha > 0
        mixed = rng.beta(self.mixup_alpha, self.mixup_alpha, n) if self.mixup_alpha else np.ones(n)
        if self.cutmix_alpha:
            mixed = np.where(cut, rng.beta(self.cutmix_alpha, self.cutmix_alpha, n), mixed)
        side = (size * np.sqrt(1 - mixed)).astype(int)
        centre = rng.integers(size, size=(2, n))
        low = np.clip(centre - side // 2, 0, size)
        high = np.clip(centre + (side + 1) // 2, 0, size)
        boxes = np.stack([*low, *high], 1) * cut[:, None]
        area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        lam = np.where(cut, 1 - area / (size * size), mixed)
        if self.prob < 1:  # sampled last, so that the others do not depend on it
            on = rng.random(n) < self.prob
            lam, boxes = np.where(on, lam, 1.0), boxes * on[:, None]
        repeats = images // n
        return {"lam": lam.repeat(repeats), "boxes": boxes.repeat(repeats, 0)}

    def apply(
        self,
        images: torch.Tensor,
        targets: torch.Tensor,
        positions: np.ndarray,
        lam: np.ndarray,
        boxes: np.ndarray,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mixed images (n, 3, size, size) and soft labels (n, classes) from soft labels.

        `positions` (n,) are those of the images in the step. An image without a partner (the last
        of an odd step, or beside a corrupt image) is unchanged.
        """
        index = {position: i for i, position in enumerate(positions.tolist())}
        partners = np.array([index.get(p ^ 1, i) for p, i in index.items()], np.int64)
        send = lambda array: torch.from_numpy(array).to(images.device, non_blocking=True)
        partner, share = send(partners), send(lam.astype(np.float32))[:, None]
        targets = torch.lerp(targets[partner], targets, share.to(targets.dtype))
        share = share[:, :, None, None]
        if boxes.any():
            left, top, right, bottom = send(boxes).T[..., None, None, None]
            column = torch.arange(images.shape[-1], device=images.device)
            row = column[:, None]
            inside = (row >= top) & (row < bottom) & (column >= left) & (column < right)
            cut = (right > left) & (bottom > top)
            share = torch.where(cut, (~inside).float(), share)
        return torch.lerp(images[partner], images, share.to(images.dtype)), targets
