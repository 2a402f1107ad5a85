"""`workbench train` beside timm's own train.py: img/s of the whole, on the same files.

    python benchmarks/end_to_end.py [--timm TRAIN_PY] [--validate VALIDATE_PY] [--images PATH]

TRAIN_PY and VALIDATE_PY are scripts of timm's repository, near the version that is installed;
without them there is nothing to compare with, and that is said. Both train the same network with
the same batch, size, precision, number of loader processes and augmentation
(RandAugment-Increasing on crops), as processes of their own. One of 1 epoch and one of 3 take
turns: the difference is two epochs without the start, and an epoch has its validation and its
checkpoint in it. Ours also with a cache.
validate.py stands beside our evaluation of the same images and network in fp32, by what it
reports of its own loop, with the same resize, filter and crop. PATH is a folder of JPEG files, or a
tar of one; without it, 200 of 500 x 375 pixels are made up. Each file stands in the list of
training fifteen times and in that of evaluation twenty times, under other names. On a CPU set
OMP_NUM_THREADS=1, or the threads of training wait for the loaders' cores.
Claim: where reading is a good part of the work, at least 1.2 times timm's img/s from files and 1.4
from a cache, and of its validate.py 1.1 and 1.5.
"""

import argparse
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from input import jpegs  # the benchmark beside this one

from workbench import data, training
from workbench.data import pixel_cache
from workbench.evaluation import inference
from workbench.recipe import Recipe

COPIES = {"train": 15, "val": 1, "evaluated": 20}


def folders(files: list[Path], folder: Path) -> int:
    """Class folders of links to the images, by COPIES; returns the number of training files."""
    for side, copies in COPIES.items():
        for copy in range(copies):
            for i, path in enumerate(files):
                place = folder / side / f"class{i % 4}" / f"{copy}_{i:04d}.jpg"
                place.parent.mkdir(parents=True, exist_ok=True)
                place.symlink_to(path.resolve())
    return COPIES["train"] * len(files)


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return time.perf_counter() - start


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--timm", type=Path, help="timm's train.py")
    parser.add_argument("--validate", type=Path, help="timm's validate.py")
    parser.add_argument("--images", type=Path, help="a folder of JPEG files, or a tar of one")
    parser.add_argument("--model", default="test_resnet")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    if options.timm is None and options.validate is None:
        print("not measured: name timm's train.py with --timm, its validate.py with --validate")
        return
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        count = folders(jpegs(options.images, root), root / "data")
        workers = data.available_cpus()
        bf16 = training.pick_precision("auto", torch.device(options.device)) == "bf16"
        print(f"{options.model} at {options.size} pixels, batch {options.batch}, "
              f"{'bf16' if bf16 else 'fp32'}, {count} images an epoch, {workers} loaders, "
              f"{training.processor()}, {options.device}")  # fmt: skip

        def timm_trains(epochs: int) -> float:
            out = root / "timm"
            shutil.rmtree(out, ignore_errors=True)
            return seconds([
                sys.executable, str(options.timm), str(root / "data"), "--val-split", "val",
                "--model", options.model, "--num-classes", "4", "--img-size", str(options.size),
                "-b", str(options.batch), "--epochs", str(epochs), "--warmup-epochs", "0",
                "--opt", "sgd", "--lr", "0.01", "--aa", "rand-m7-mstd0.5-inc1",
                "--train-interpolation", "bilinear", "-j", str(workers), "--channels-last",
                "--device", options.device, "--output", str(out), "--log-interval", "1000",
                *(["--amp", "--amp-dtype", "bfloat16"] if bf16 else []),
            ])  # fmt: skip

        recipe_options = {
            "dataset": "files", "data_dir": str(root / "data"), "model": options.model,
            "image_size": options.size, "val_resize": round(options.size * 8 / 7), "lr": 0.01,
            "batch_size": options.batch, "crop_scale": [0.08, 1.0], "hflip": 0.5, "randaug_n": 2,
            "label_smoothing": 0.1, "drop_last": True, "workers": workers,
            "device": options.device, "runs_dir": str(root / "runs"),
        }  # fmt: skip

        def we_train(epochs: int, **changes) -> float:
            shutil.rmtree(root / "runs", ignore_errors=True)
            Recipe(**recipe_options, epochs=epochs, **changes).to_yaml(root / "recipe.yaml")
            return seconds([sys.executable, "-m", "workbench", "train", str(root / "recipe.yaml")])

        cached = {"cache": True, "cache_dir": str(root / "kept"), "train_resize": 256}
        forms = {
            "timm train.py": timm_trains,
            "workbench train, files": we_train,
            "workbench train, cache": lambda epochs: we_train(epochs, **cached),
        }
        if options.timm:
            forms["workbench train, cache"](1)  # builds it
            speeds: dict[str, list[float]] = {name: [] for name in forms}
            for _ in range(options.rounds):
                for name, trains in forms.items():
                    speeds[name].append(2 * count / (trains(3) - trains(1)))
            report(speeds, "timm train.py")
        if options.validate:
            validation(options, root, recipe_options, workers)


def validation(options, root: Path, recipe_options: dict, workers: int) -> None:
    """Images per second of one network over the images, read as validation reads."""
    recipe = Recipe(**recipe_options, val_root=["evaluated"])
    content = data.load_dataset(recipe)
    device = torch.device(options.device)
    model = training.create_model(recipe, 4).to(device, memory_format=torch.channels_last).eval()
    torch.save(model.state_dict(), root / "weights.pth")
    see = training.eval_transform(recipe)
    kept = pixel_cache.Cache(data.verify_images(content.val, cache=False), see, root / "kept")
    pixel_cache.build(kept)
    forms = {"workbench, files": None, "workbench, cache": kept}
    speeds: dict[str, list[float]] = {"timm validate.py": [], **{name: [] for name in forms}}
    for _ in range(options.rounds):
        command = [
            sys.executable, str(options.validate), str(root / "data" / "evaluated"), "--split", "",
            "--interpolation", recipe.interpolation,
            "--crop-pct", str(recipe.image_size / recipe.val_resize),
            "--model", options.model, "--num-classes", "4", "--img-size", str(options.size),
            "-b", str(options.batch), "-j", str(workers), "--channels-last", "--device",
            options.device, "--log-freq", "1", "--checkpoint", str(root / "weights.pth"),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        # "(  0.123s,  406.5/s)" are the averages so far; the last line has them over all.
        found = re.findall(r"\(\s*[\d.]+s,\s*([\d.]+)/s\)", done.stdout + done.stderr)
        if not found:
            sys.exit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
        speeds["timm validate.py"].append(float(found[-1]))
        for name, cached in forms.items():
            start = time.perf_counter()
            batches = data.eval_loader(
                content.val, see, batch_size=options.batch, workers=workers, cached=cached
            )
            inference.predict(model, batches, training.Normalize(recipe, device), device)
            speeds[name].append(len(content.val) / (time.perf_counter() - start))
    report(speeds, "timm validate.py")


def report(speeds: dict[str, list[float]], against: str) -> None:
    print(f"\n{'':26s}{'img/s':>8s}{'ratio':>8s}   (least to most)")
    for name, each in speeds.items():
        ratios = [a / b for a, b in zip(each, speeds[against], strict=True)]
        print(f"{name:26s}{statistics.median(each):8.0f}{statistics.median(ratios):8.2f}"
              f"   ({min(ratios):.2f} to {max(ratios):.2f})")  # fmt: skip


if __name__ == "__main__":
    main()
