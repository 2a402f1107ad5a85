"""What one core gives of training and validation images, beside timm's and torchvision's loaders.

    python benchmarks/input.py [--images FOLDER_OR_TAR] [--rounds 7]

Every loader decodes the same files, transforms them and hands over uint8 batches, in one process
with one thread; they take turns of a second or a pass over all images, and ratios to timm are
taken round by round. timm is its create_loader with the same operations; torchvision is its
reference transforms, v2, on Pillow images and on tensors. From a cache (built before, short side
256) only ours can read; the last table has images of 32 pixels, which the others hold in memory.
Without --images the files are made up: 200 JPEG of 500 x 375 pixels.
Claims, by the median ratio: from JPEG at least 2.2 times timm for the transform of strikes, 1.8
for crop and flip, 1.5 for validation; from a cache at least 12 times timm's from JPEG for strikes
(8 in timm's form, whose bicubic moves cost more), and on small images at least the best of those
in memory that draw for each image. Those from JPEG are missed where Pillow decodes nearly as fast
as libjpeg-turbo alone, which is measured first. Our pixels after crop and resize lie within 1.5 of
255 of Pillow's, on average over any image.
"""

import argparse
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import simplejpeg
import timm.data
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import io
from torchvision.transforms import v2

from workbench import ROOT, data, training
from workbench.data import images, pixel_cache
from workbench.recipe import Recipe

SIZE, BATCH = 224, 50
TURN = 1.0  # seconds at least, in whole passes
CLAIMS = {"strikes": (2.2, 12), "strikes, timm's form": (2.2, 8), "crop and flip": (1.8, None)}
# (recipe file, what is changed of it, the same for timm's create_loader)
RAND = "rand-m7-mstd0.5-inc1"
KINDS = {
    "strikes": ("resnet50_strikes_300e", {}, {"auto_augment": RAND, "interpolation": "bilinear"}),
    # timm's own default draws bilinear or bicubic for the crop; ours is always bicubic there.
    "strikes, timm's form": (
        "resnet50_a2_300e",
        {},
        {"auto_augment": RAND, "interpolation": "random"},
    ),
    "crop and flip": (
        "resnet50_bag_of_tricks_200e",
        {"brightness": 0, "contrast": 0, "saturation": 0, "hue": 0},
        {"interpolation": "bilinear", "color_jitter": None},
    ),
}


# ---- loaders: each a function that makes one pass and returns how many images it gave


def passes(make: Callable[[], Iterable], count: Callable[[Any], int]) -> Callable[[], int]:
    return lambda: sum(count(batch) for batch in make())


def of_timm(frame: pd.DataFrame, training_too: bool, **how: Any) -> Callable[[], int]:
    class Files(torch.utils.data.Dataset):
        """timm's ImageDataset, over a list in the place of a folder."""

        transform = None

        def __len__(self) -> int:
            return len(frame)

        def __getitem__(self, i: int):
            with open(frame.path[i], "rb") as file:
                return self.transform(Image.open(file).convert("RGB")), 0

    loader = timm.data.create_loader(
        Files(), (3, SIZE, SIZE), BATCH, is_training=training_too, num_workers=0,
        device=torch.device("cpu"), persistent_workers=False, crop_pct=SIZE / 256, **how,
    )  # fmt: skip
    # Within its PrefetchLoader lie the uint8 batches; that only normalises them.
    return passes(lambda: loader.loader, lambda batch: len(batch[0]))


class Mapped(torch.utils.data.Dataset):
    """A list and what becomes of each of its items."""

    def __init__(self, items: list, change: Callable):
        self.items, self.change = items, change

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.change(self.items[i])


def of_torchvision(items: list, first: Callable, steps: list, last: list) -> Callable[[], int]:
    chain = v2.Compose([*steps, *last])
    loader = DataLoader(Mapped(items, lambda item: chain(first(item))), BATCH, shuffle=True)
    return passes(lambda: loader, len)


def steps_of_torchvision(kind: str, size: int = SIZE) -> list:
    steps = [v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()]
    return steps + ([v2.RandAugment(2, 7)] if kind.startswith("strikes") else [])


def ours(
    frame: pd.DataFrame, recipe: Recipe, cached: pixel_cache.Cache | None
) -> Callable[[], int]:
    transform, epoch = training.train_transform(recipe), [0]
    steps = data.steps_per_epoch(len(frame), BATCH)

    def make() -> Iterable[data.Batch]:
        epoch[0] += 1
        span = range(epoch[0] * steps, (epoch[0] + 1) * steps)
        return data.train_loader(
            frame, transform, seed=0, batch_size=BATCH, steps=span, cached=cached
        )

    return passes(make, lambda batch: len(batch.images))


def opened(path: str) -> Image.Image:
    return Image.open(path).convert("RGB")


def read(path: str) -> torch.Tensor:
    return io.decode_image(path, io.ImageReadMode.RGB)


# ---- tables


def race(loaders: dict[str, Callable[[], int]], rounds: int, against: str) -> pd.DataFrame:
    """Images per second, and the ratio to one of them with its range over the rounds."""
    speeds: dict[str, list[float]] = {name: [] for name in loaders}
    for turn in range(rounds + 1):  # the first warms up
        for name, run in loaders.items():
            start, count = time.perf_counter(), 0
            while (spent := time.perf_counter() - start) < TURN:
                count += run()
            if turn:
                speeds[name].append(count / spent)
    rows = {}
    for name, each in speeds.items():
        ratios = [a / b for a, b in zip(each, speeds[against], strict=True)]
        rows[name] = {
            "img/s": round(statistics.median(each)),
            f"of {against}": round(statistics.median(ratios), 2),
            "least": round(min(ratios), 2),
            "most": round(max(ratios), 2),
        }
    return pd.DataFrame(rows).T


def small_images(rounds: int, folder: Path) -> pd.DataFrame:
    """Crop and flip of 2,000 images of 32 pixels."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (2000, 32, 32, 3), dtype=np.uint8)
    paths = []
    for i, image in enumerate(pixels):
        paths.append(folder / f"{i}.png")
        Image.fromarray(image).save(paths[-1], compress_level=1)
    frame = examined(paths)
    recipe = Recipe(image_size=32, crop_scale=[0.08, 1.0], hflip=0.5)
    kept = pixel_cache.Cache(frame, training.train_transform(recipe).resize, folder / "kept")
    pixel_cache.build(kept)
    flip_and_crop = steps_of_torchvision("", 32)
    in_timm = timm.data.create_transform(
        (3, 32, 32), is_training=True, color_jitter=None, interpolation="bilinear",
        use_prefetcher=True,
    )  # fmt: skip
    tensors = list(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    whole = torch.stack(tensors)
    arrays = list(pixels)
    loaders = {
        "timm, arrays in memory": passes(
            lambda: DataLoader(Mapped(arrays, lambda a: in_timm(Image.fromarray(a))), BATCH, True),
            len,
        ),
        "torchvision v2, Pillow images in memory": of_torchvision(
            arrays, Image.fromarray, flip_and_crop, [v2.PILToTensor()]
        ),
        "torchvision v2, tensors in memory": of_torchvision(
            tensors, lambda t: t, flip_and_crop, []
        ),
        "one crop for the whole batch, in memory": passes(
            lambda: (v2.Compose(flip_and_crop)(whole[i : i + BATCH])
                     for i in range(0, len(whole), BATCH)),
            len,
        ),
        "ours, files": ours(frame, recipe, None),
        "ours, cache": ours(frame, recipe, kept),
    }  # fmt: skip
    return race(loaders, rounds, "timm, arrays in memory")


def decoding(paths: list[str], rounds: int) -> str:
    """Milliseconds an image: Pillow, libjpeg-turbo alone, and that at an eighth of the scale.

    The last does hardly more than to read the Huffman codes.
    """
    raws = [Path(path).read_bytes() for path in paths]
    small = {"min_height": 1, "min_width": 1, "min_factor": 8}
    forms = {
        "Pillow": lambda raw: Image.open(BytesIO(raw)).convert("RGB"),
        "libjpeg-turbo": simplejpeg.decode_jpeg,
        "libjpeg-turbo at an eighth": lambda raw: simplejpeg.decode_jpeg(raw, **small),
    }
    spent: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(rounds):
        for name, decode in forms.items():
            start = time.perf_counter()
            for raw in raws:
                decode(raw)
            spent[name].append(1000 * (time.perf_counter() - start) / len(raws))
    each = (f"{name} {statistics.median(times):.2f} ms" for name, times in spent.items())
    return "decoding alone: " + ", ".join(each)


def apart_from_pillow(frame: pd.DataFrame) -> tuple[float, float]:
    """Mean and largest, over images, of the mean difference to Pillow's crop and resize."""
    transform = training.train_transform(
        Recipe(image_size=SIZE, val_resize=256, crop_scale=[0.08, 1.0])
    )
    means = []
    for i, path in enumerate(frame.path):
        image = opened(path)
        for epoch in range(3):
            draw = transform.sample_params(data.rng_for(0, data.DRAW, epoch, i), *image.size)
            left, top = draw["left"], draw["top"]
            box = (left, top, left + draw["width"], top + draw["height"])
            wanted = image.crop(box).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
            seen = transform.apply(images.open(path), draw)
            means.append(np.abs(seen.astype(int) - np.asarray(wanted)).mean())
    return statistics.mean(means), max(means)


def examined(paths: list[Path]) -> pd.DataFrame:
    frame = pd.DataFrame({"path": [str(path) for path in paths], "label": 0})
    return data.verify_images(frame, cache=False, progress=False)


def jpegs(source: Path | None, folder: Path) -> list[Path]:
    """The JPEG files of a folder or a tar, unpacked below `folder`; of None 200 made up there."""
    if source is None:
        made_up(source := folder / "made up")
    elif source.is_file():
        with tarfile.open(source) as archive:
            archive.extractall(source := folder / "unpacked", filter="data")
    return [p for p in sorted(source.rglob("*")) if p.suffix.lower() in (".jpg", ".jpeg")]


def made_up(folder: Path) -> None:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(200):
        coarse = Image.fromarray(rng.integers(0, 256, (15, 20, 3), dtype=np.uint8))
        grain = rng.normal(0, 12, (375, 500, 1))
        pixels = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC)) + grain
        image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
        image.save(folder / f"{i}.jpg", quality=90)


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=Path, help="a folder of JPEG files, or a tar of one")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "small").mkdir()
        frame = examined(jpegs(options.images, folder))
        median = frame[["width", "height"]].median()
        print(f"{len(frame)} JPEG files, median {median.width:.0f} x {median.height:.0f} pixels, "
              f"{training.processor()}, one of them used, {options.rounds} rounds")  # fmt: skip
        print(decoding(frame.path.tolist(), options.rounds))
        for kind, (file, changes, theirs) in KINDS.items():
            recipe = Recipe.from_yaml(ROOT / "params" / f"{file}.yaml", train_resize=256, **changes)
            plain = recipe.replace(train_resize=None)
            kept = pixel_cache.Cache(
                frame, training.train_transform(recipe).resize, folder / "kept"
            )
            pixel_cache.build(kept)
            steps = steps_of_torchvision(kind)
            table = race(
                {
                    "timm": of_timm(frame, True, **theirs),
                    "torchvision v2, Pillow": of_torchvision(
                        list(frame.path), opened, steps, [v2.PILToTensor()]
                    ),
                    "torchvision v2, tensors": of_torchvision(list(frame.path), read, steps, []),
                    "ours, files": ours(frame, plain, None),
                    "ours, cache": ours(frame, recipe, kept),
                },
                options.rounds,
                "timm",
            )
            least = [f"at least {x}" for x in CLAIMS[kind] if x]
            print(f"\n{kind}; claim for files and cache: {', '.join(least)}\n{table.to_string()}")
        see = training.eval_transform(recipe)
        kept = pixel_cache.Cache(frame, see, folder / "kept")
        pixel_cache.build(kept)
        table = race(
            {
                "timm": of_timm(frame, False, interpolation="bilinear"),
                **{
                    f"ours, {name}": passes(
                        lambda c=cached: data.eval_loader(frame, see, batch_size=BATCH, cached=c),
                        lambda batch: len(batch.images),
                    )
                    for name, cached in (("files", None), ("cache", kept))
                },
            },
            options.rounds,
            "timm",
        )
        print(f"\nvalidation; claim for files: at least 1.5\n{table.to_string()}")
        mean, most = apart_from_pillow(frame)
        print(f"\ncrop and resize, difference to Pillow's: {mean:.2f} of 255 on average over all, "
              f"{most:.2f} in the worst image; claim: at most 1.5")  # fmt: skip
        print(f"\nimages of 32 pixels; claim for the cache: the best\n"
              f"{small_images(options.rounds, folder / 'small').to_string()}")  # fmt: skip


if __name__ == "__main__":
    main()
