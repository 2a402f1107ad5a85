"""The JSON files and the model card of a package.

meta.json, parameters.json and category_param.json have the fields that United Perception's
`to_kestrel` writes for classifiers; meta.json adds preprocessing, classes and reference logits.
README.md is a card in the form of the Hugging Face hub.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from workbench import training
from workbench.evaluation import metrics, statistics
from workbench.export.archive import FORMATS, ExportError
from workbench.recipe import Recipe

FORMAT = 2  # of the package; a higher one is refused
NAME = r"^[\w.-]+$"  # of a package and of its version
PROBES = 2  # images of noise whose logits are in meta.json
CARD = Path(__file__).with_name("card.md")
USES = {
    "int8": "`model_int8.onnx` has the same inputs and outputs in int8: `python predict.py "
    "model_int8.onnx IMAGE ...`. Its weights have 7 bits, so its integer sums are exact, and the "
    "same, on processors with VNNI and without.",
    "with_preprocessing": "`model_with_preprocessing.onnx` takes decoded RGB images of any one "
    "size, uint8 (n, 3, height, width), and resizes and crops itself.",
    "torch_export": "`model.pt2` is for `torch.export.load`.",
}

PerChannel = Annotated[list[float], Field(min_length=3, max_length=3)]


class Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Preprocess(Strict):
    """From an image file to the network's input, in this order."""

    resize: int = Field(ge=8, le=8192, description="pixels, short side")
    size: int = Field(ge=8, le=4096, description="pixels, side of the square centre crop")
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]
    mean: PerChannel = Field(description="RGB, 0 to 1, subtracted")
    std: PerChannel = Field(description="RGB, 0 to 1, divided by")
    normalised_inside: bool = Field(description="the network takes uint8 and normalises itself")


class Meta(Strict):
    """meta.json."""

    format: int = Field(ge=1, le=FORMAT)
    model_name: str = Field(pattern=NAME, max_length=200)
    version: str = Field(pattern=NAME, max_length=50)
    toks_type: Literal["cls"] = "cls"
    plugin: str = Field(pattern=r"^[\w-]+$")
    model: str = Field(description="timm's name")
    weights: Literal["raw", "ema"]
    classes: list[str] = Field(min_length=2)
    preprocess: Preprocess
    opset: int
    probe: list[list[float]] = Field(description="logits for Network.noise(PROBES)")
    made: dict[str, Any] = Field(description="run, fingerprints of recipe and data, versions")


def preprocess(recipe: Recipe, uint8_input: bool = False) -> Preprocess:
    """The preprocessing of a recipe's validation images."""
    transform = training.eval_transform(recipe)
    fields = {key: getattr(transform, key) for key in ("resize", "size", "interpolation")}
    mean, std = list(recipe.mean), list(recipe.std)
    return Preprocess(**fields, mean=mean, std=std, normalised_inside=uint8_input)


def parameters(preprocess: Preprocess, block: Mapping[str, Any]) -> dict[str, Any]:
    """parameters.json for a to_kestrel block, which may be empty. Raises ExportError.

    Means and stds have the scale 0 to 255; they are 0 and 1 if the network normalises itself.
    """
    net = {"net": FORMATS["onnx"], "backend": "kestrel_nart", "max_batch_size": 8}
    net |= {"input": {"data": "data"}, "output": {"score": "score"}}
    means, stds = ([round(255 * x, 6) for x in v] for v in (preprocess.mean, preprocess.std))
    inside = preprocess.normalised_inside
    kind, save_all_label = block.get("type", "UNKNOWN"), block.get("save_all_label", True)
    if not isinstance(kind, str) or not isinstance(save_all_label, bool):
        raise ExportError("type must be text, save_all_label true or false")
    return {
        "model_files": {"net": net},
        "input_h": preprocess.size,
        "input_w": preprocess.size,
        "pixel_means": [0.0] * 3 if inside else means,
        "pixel_stds": [1.0] * 3 if inside else stds,
        "is_rgb": True,
        "type": kind,
        "save_all_label": save_all_label,
        "support_labels": block.get("support_labels"),
    }


def categories(block: Mapping[str, Any], classes: list[str]) -> dict[str, Any]:
    """category_param.json: the class_label of a to_kestrel block, else one category.

    Each category is a range of the scores, both ends included. Raises ExportError unless the block
    has one label for each score, in the order of the run.
    """
    groups = block.get("class_label") or {"classes": {"labels": classes}}
    found, labels = {}, []
    for name, group in groups.items():
        if unknown := sorted(set(group) - {"labels", "calculator"}):
            raise ExportError(f"class_label.{name}: {', '.join(unknown)} is not supported")
        found[name] = {
            "calculator": group.get("calculator", "bypass"),
            "feature_start": len(labels),
            "feature_end": len(labels) + len(group["labels"]) - 1,
            "labels": [str(label) for label in group["labels"]],
        }
        labels += found[name]["labels"]
    if len(labels) != len(classes):
        raise ExportError(f"class_label has {len(labels)} labels for {len(classes)} classes")
    if labels != classes and sorted(labels) == sorted(classes):
        raise ExportError("class_label has the classes of the run in another order; use that order")
    return found


def sentences(error: ValidationError) -> list[str]:
    """What is wrong, by field."""
    return [f"{'.'.join(map(str, e['loc']))}: {e['msg'].lower()}" for e in error.errors()]


def model_card(
    meta: Meta, report: Mapping[str, Any], recipe: Recipe, environment: Mapping[str, Any]
) -> str:
    """The card of a package with this parity report; `environment` is that of the training."""
    formats, left_out, n = report["formats"], report["left_out"], report["images"]
    top1, preprocess = formats["torch"]["top1"], meta.preprocess
    low, high = statistics.wilson_percent(top1, n)
    warnings = [f"{t.partition(';')[0]}." for t in metrics.image_cautions(environment)]
    if environment.get("trained_on_validation"):
        warnings.append("Weights it started from, or a teacher, were trained on validation images.")
    if empty := environment.get("empty_classes"):
        warnings.append(f"Without a training image: {', '.join(empty)}.")
    normalised = "0 to 255 minus `pixel_means`, divided by `pixel_stds` of parameters.json, float32"
    fields = {**recipe.model_dump(), **meta.model_dump(), **preprocess.model_dump(), **report}
    fields |= {
        "model_json": json.dumps(meta.model),
        "class_count": len(meta.classes),
        "classes": ", ".join(meta.classes[:12] + ["and others"] * (len(meta.classes) > 12)),
        "train_images": f"{environment['train_images']:,}",
        "recipe": recipe.fingerprint,
        "top1": f"{top1:.2f}",
        "interval": f"{low:.2f} to {high:.2f}, n={n:,}",
        "formats": "\n".join(_row(name, entry) for name, entry in formats.items()),
        "left_out": "\n".join(f"Not in the package: {text}." for text in left_out.values()),
        "input": "uint8, 0 to 255" if preprocess.normalised_inside else normalised,
        "uses": "\n\n".join(USES[name] for name in USES if name in formats.keys() - left_out),
        "warnings": "\n".join(warnings),
    }
    return Template(CARD.read_text(encoding="utf-8")).substitute(fields).strip() + "\n"


def _row(name: str, entry: Mapping[str, Any]) -> str:
    ms = ", ".join(f"{times['median']:.2f}" for times in entry["latency"].values())
    flips = f"{entry['flips']} ({entry['ties']} ties)" if entry["ties"] else entry["flips"]
    return f"| {name} | {entry['top1']:.2f} | {flips} | {entry['max_abs_diff']:.2g} | {ms} |"
