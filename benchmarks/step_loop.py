"""What the loop of `training.fit` costs beside a bare forward, backward, step.

    python benchmarks/step_loop.py [--device auto] [--model resnet18] [--image-size 64]

Both loops take the same synthetic uint8 batches from memory, normalise them on the device, run the
same model, loss, precision and optimizer; ours also asks for stops, counts, writes rows and looks
at the clock. They run in turn, a block of steps each, and the ratio is taken block by block.
Claim: the median ratio is at most 1.03.
"""

import argparse
import contextlib
import functools
import statistics
import tempfile
import time
from typing import NamedTuple
from unittest import mock

import pandas as pd
import torch
from torch.nn import functional as F

from workbench import data, runs, training
from workbench.recipe import Recipe

STEPS = 20  # of a block
CLAIM = 1.03


class Measured(NamedTuple):
    """Medians over blocks: ours over bare, milliseconds a step; seconds of the first blocks."""

    ratio: float
    ours: float
    bare: float
    warmup: float
    device: torch.device


@functools.cache
def batches(count: int, batch_size: int, image_size: int, pin: bool) -> list[data.Batch]:
    """Made once; in pinned memory for a GPU, as a loader gives them."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch_size, 3, image_size, image_size)
    keep = lambda tensor: tensor.pin_memory() if pin else tensor
    images = lambda: torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return [
        data.Batch(
            keep(images().contiguous(memory_format=torch.channels_last)),
            keep(torch.randint(0, 10, (batch_size,), generator=generator)),
            torch.zeros(batch_size, dtype=torch.int64),
            torch.arange(batch_size),
            0,
            True,
            batch_size,
            [],
        )
        for _ in range(count)
    ]


def cycle(made: list[data.Batch]):
    while True:
        yield from made


def bare_block(recipe, model, optimizer, normalize, reader, device, precision) -> None:
    for _ in range(STEPS):
        batch = next(reader)
        labels = batch.labels.to(device, non_blocking=True)
        images = normalize(batch.images.to(device, non_blocking=True))
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits = model(images)
        F.cross_entropy(logits.float(), labels, label_smoothing=0.1).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(
    model_name: str,
    image_size: int,
    batch_size: int,
    device_name: str,
    blocks: int,
    *,
    compile: bool = False,
) -> Measured:
    folder = tempfile.mkdtemp()
    recipe = Recipe(
        model=model_name,
        image_size=image_size,
        val_resize=image_size,
        batch_size=batch_size,
        label_smoothing=0.1,
        nesterov=True,
        weight_decay=1e-4,
        lr=0.01,
        log_every=STEPS,
        epochs=1,
        workers=0,
        verify_data=False,
        device=device_name,
        compile=compile,
        runs_dir=folder,
    )
    device = training.pick_device(recipe.device)
    precision = training.pick_precision(recipe.precision, device)
    made = batches(8, batch_size, image_size, device.type == "cuda")
    frame = pd.DataFrame(
        {"file": "none", "label": 0, "path": "none", "list": 0}, index=range(10**6)
    )
    content = data.Dataset(frame, frame.head(1), [str(i) for i in range(10)])

    model = training.create_model(recipe, 10).to(device, memory_format=torch.channels_last).train()
    optimizer = training.create_optimizer(recipe, model)
    model = torch.compile(model, dynamic=False) if compile else model
    bare = (recipe, model, optimizer, training.Normalize(recipe, device), cycle(made), device)
    ratios, ours_ms, bare_ms = [], [], []
    with mock.patch.object(data, "train_loader", lambda *_, **__: cycle(made)):
        rows = training.fit(recipe, runs.Run(recipe.folder), dataset=content)
        with contextlib.closing(rows):
            start = time.perf_counter()
            next(rows)  # both warm up for a block
            bare_block(*bare, precision)
            warmup = time.perf_counter() - start
            for _ in range(blocks):
                start = time.perf_counter()
                next(rows)  # from one row to the next: STEPS steps and the row itself
                middle = time.perf_counter()
                bare_block(*bare, precision)
                end = time.perf_counter()
                ours_ms.append((middle - start) / STEPS * 1000)
                bare_ms.append((end - middle) / STEPS * 1000)
                ratios.append((middle - start) / (end - middle))
    return Measured(*map(statistics.median, (ratios, ours_ms, bare_ms)), warmup, device)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="auto")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--blocks", type=int, default=15)
    parser.add_argument("--compile", action="store_true")
    asked = parser.parse_args()
    found = measure(
        asked.model,
        asked.image_size,
        asked.batch_size,
        asked.device,
        asked.blocks,
        compile=asked.compile,
    )
    print(
        f"{asked.model} at {asked.image_size} px, batch {asked.batch_size}, {found.device}: "
        f"ours {found.ours:.2f} ms a step, bare {found.bare:.2f} ms, ratio {found.ratio:.3f} "
        f"(median of {asked.blocks} blocks of {STEPS} steps; claim: at most {CLAIM})"
    )
    raise SystemExit(found.ratio > CLAIM)


if __name__ == "__main__":
    main()
