"""The model card of a package, README.md in the form of the Hugging Face hub."""

import json
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

from workbench.evaluation import statistics
from workbench.export.metadata import Meta
from workbench.recipe import Recipe

TEMPLATE = Path(__file__).with_name("card.md")
USES = {
    "int8": "`model_int8.onnx` has the same inputs and outputs in int8: `python predict.py "
    "model_int8.onnx IMAGE ...`. Its weights have 7 bits, so its integer sums are exact, and the "
    "same, on processors with VNNI and without.",
    "with_preprocessing": "`model_with_preprocessing.onnx` takes decoded RGB images of any one "
    "size, uint8 (n, 3, height, width), and resizes and crops itself.",
    "torch_export": "`model.pt2` is for `torch.export.load`.",
}


def model_card(
    meta: Meta, report: Mapping[str, Any], recipe: Recipe, environment: Mapping[str, Any]
) -> str:
    """The card of a package with this parity report; `environment` is that of the training."""
    formats, left_out, n = report["formats"], report["left_out"], report["images"]
    top1, preprocess = formats["torch"]["top1"], meta.preprocess
    low, high = statistics.wilson(round(top1 * n / 100), n)
    warnings = []
    if leaks := environment.get("train_val_duplicates"):
        warnings.append(f"{leaks:,} of the validation images were in training too.")
    if empty := environment.get("empty_classes"):
        warnings.append(f"Without a training image: {', '.join(empty[:12])}.")
    normalised = "0 to 255 minus `pixel_means`, divided by `pixel_stds` of parameters.json, float32"
    more = " and others" if len(meta.classes) > 12 else ""
    fields = meta.model_dump() | preprocess.model_dump() | dict(report)
    fields |= {
        "model_json": json.dumps(meta.model),
        "class_count": len(meta.classes),
        "classes": ", ".join(meta.classes[:12]) + more,
        "dataset": recipe.dataset,
        "epochs": recipe.epochs,
        "train_images": f"{environment['train_images']:,}",
        "recipe": recipe.fingerprint,
        "top1": f"{top1:.2f}",
        "interval": f"{100 * low:.2f} to {100 * high:.2f}, n={n:,}",
        "formats": "\n".join(_row(name, entry) for name, entry in formats.items()),
        "left_out": "\n".join(f"Not in the package: {text}." for text in left_out.values()),
        "input": "uint8, 0 to 255" if preprocess.normalised_inside else normalised,
        "uses": "\n\n".join(USES[name] for name in USES if name in formats.keys() - left_out),
        "warnings": "\n".join(warnings),
    }
    text = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(fields)
    return text.strip() + "\n"


def _row(name: str, entry: Mapping[str, Any]) -> str:
    ms = ", ".join(f"{times['median']:.2f}" for times in entry["latency"].values())
    flips = f"{entry['flips']} ({entry['ties']} ties)" if entry["ties"] else entry["flips"]
    return f"| {name} | {entry['top1']:.2f} | {flips} | {entry['max_abs_diff']:.2g} | {ms} |"
