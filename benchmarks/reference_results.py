"""Whether two versions of the code train to the same bits: reference recipes, run by both.

    git worktree add ../old COMMIT
    python benchmarks/reference_results.py ../old [.]

Trains the recipes below, two epochs each in fp32 with one thread, with the code of each tree, and
prints the SHA-256 of metrics.csv (values only, since columns were renamed) and of the weights in
best.safetensors (names, shapes and bytes; the file's header holds names in any order). Exit code 1
where two trees differ. An option that a tree does not know is written under its former name.
"""

import argparse
import csv
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
Options = dict[str, Any]

SMALL = {
    "image_size": 32,
    "val_resize": 32,
    "epochs": 2,
    "train_fraction": 0.5,
    "warmup_epochs": 0.5,
}
RECIPES: dict[str, Options] = {
    "plain": {"nesterov": True, "weight_decay": 5e-4, "crop_scale": [0.6, 1.0]},
    "bag_of_tricks": {
        "model": "resnet18", "deep_stem": True, "avg_down": True, "decay_norm_and_bias": False,
        "weight_decay": 1e-4, "label_smoothing": 0.1, "mixup_alpha": 0.2,
        "warmup_start_factor": 0.1,
        "crop_scale": [0.5, 1.0], "hflip": 0.5, "brightness": 0.4, "contrast": 0.4,
        "saturation": 0.4, "hue": 0.1, "train_fraction": 0.25, "micro_batch_size": 16,
    },
    "strikes": {
        "optimizer": "lamb", "lr": 0.008, "weight_decay": 0.02, "clip_grad_norm": 1.0,
        "loss": "bce", "bce_sum": True, "bce_shift": True, "crop_scale": [0.6, 1.0],
        "randaug_n": 2, "randaug_variant": "timm", "mixup_alpha": 0.1, "cutmix_alpha": 1.0,
        "erase_prob": 0.25, "ema_decay": 0.98, "repeated_aug": 2, "drop_path": 0.1,
        "dropout": 0.1, "augment_on_device": True,
    },
    "distillation": {
        "teacher": "plain", "distill_pairs": ["logits", "layer4 -> layer4"],
        "kd_loss": ["dist", "l2_normalized"], "kd_weight": [1.0, 0.5], "mixup_alpha": 0.2,
        "kd_warmup_epochs": 0.5, "seed": 1,
    },
    "teacher_logit_cache": {
        "teacher": "plain", "kd_loss": ["kl"], "temperature": 4.0, "cache_teacher_logits": True,
        "seed": 1,
    },
    "transfer": {
        "dataset": "letters", "weights": "plain", "optimizer": "adamw", "lr": 0.002,
        "weight_decay": 0.05, "freeze": ["conv1"], "head_only_epochs": 1, "layer_decay": 0.7,
        "randaug_n": 1, "randaug_increasing": False, "eval_every": 2,
    },
    "pixel_cache": {
        "dataset": "files", "data_dir": "images", "cache": True, "train_resize": 40,
        "crop_scale": [0.3, 1.0], "hflip": 0.5, "autoaugment": True, "class_balanced_sampling": 0.5,
        "val_fraction": 0.2, "interpolation": "bicubic", "schedule": "step", "lr_step_epochs": 1,
    },
}  # fmt: skip
TRAIN = """
import sys
from workbench import runs, training
from workbench.recipe import Recipe
recipe = Recipe.{read}(sys.argv[1])
for row in training.fit(recipe, runs.Run(recipe.folder)):
    pass
"""


def write_images(folder: Path) -> None:
    """The digits as JPEG files of many sizes, in class folders."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    rng = np.random.default_rng(0)
    for number in range(400):
        width, height = rng.integers(24, 90, 2)
        noise = rng.integers(0, 80, (8, 8, 3))
        pixels = (digits.images[number][..., None] * 10 + noise).astype(np.uint8)
        path = folder / "train" / str(digits.target[number]) / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).resize((int(width), int(height))).save(path, quality=90)


def train_all(tree: Path, folder: Path, former: dict[str, str]) -> dict[str, tuple[str, str]]:
    """(SHA-256 of metrics.csv, SHA-256 of the weights) by recipe, trained with the tree's code."""
    environment = {
        **os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
        "WORKBENCH_CACHE": str(folder / "cache"),
    }  # fmt: skip

    def python(*arguments: str) -> str:
        command = [sys.executable, *arguments]
        done = subprocess.run(command, env=environment, cwd=tree, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{tree}: {done.stderr[-3000:]}")
        return done.stdout

    ask = "from workbench.recipe import Recipe; print(*Recipe.model_fields)"
    known = python("-c", ask).split()
    read = "from_yaml" if "distill_pairs" in known else "read"
    results = {}
    for name, options in RECIPES.items():
        options = {
            **SMALL, "name": name, "device": "cpu", "precision": "fp32", "workers": 0,
            "runs_dir": str(folder), **options,
        }  # fmt: skip
        for key in ("teacher", "weights"):
            if key in options:
                options[key] = str(folder / f"{options[key]}-seed0")
        if "data_dir" in options:
            options["data_dir"] = str(folder.parent / options["data_dir"])
        options = {key if key in known else former[key]: v for key, v in options.items()}
        params = folder / f"{name}.yaml"
        params.write_text(json.dumps(options))  # JSON is YAML
        python("-c", TRAIN.format(read=read), str(params))
        results[name] = digests(folder / f"{name}-seed{options.get('seed', 0)}")
        print(f"{tree}: {name} {results[name][0][:12]} {results[name][1][:12]}", flush=True)
    return results


def digests(run: Path) -> tuple[str, str]:
    from safetensors.numpy import load_file

    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.reader(file))[1:]
    weights = hashlib.sha256()
    for name, values in sorted(load_file(run / "best.safetensors").items()):
        weights.update(f"{name} {values.dtype} {values.shape}".encode() + values.tobytes())
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest(), weights.hexdigest()


def former_names() -> dict[str, str]:
    """Former name by option, from the table in recipe.py."""
    sys.path.insert(0, str(ROOT))
    from workbench import recipe

    return {new: old for old, new in getattr(recipe, "RENAMED", {}).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("trees", type=Path, nargs="+")
    asked = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        write_images(Path(temporary) / "images")
        for number, tree in enumerate(asked.trees):
            folder = Path(temporary) / str(number)
            folder.mkdir()
            results.append(train_all(tree.resolve(), folder, former_names()))
    print("\n| recipe | metrics.csv | weights | same |\n|---|---|---|---|")
    for name in RECIPES:
        found = [result[name] for result in results]
        same = "yes" if len(set(found)) == 1 else "NO"
        print(f"| {name} | {found[0][0][:16]} | {found[0][1][:16]} | {same} |")
    sys.exit(any(result != results[0] for result in results))


if __name__ == "__main__":
    main()
