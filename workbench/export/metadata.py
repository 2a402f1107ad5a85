"""The JSON files of a package.

meta.json, parameters.json and category_param.json have the fields that United Perception's
`to_kestrel` writes for classifiers; meta.json adds preprocessing, classes and reference logits.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from workbench import training
from workbench.export.archive import FORMATS, ExportError
from workbench.recipe import Recipe

FORMAT = 2  # of the package; a higher one is refused
NAME = r"^[\w.-]+$"  # of a package and of its version

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
    """parameters.json for a to_kestrel block, which may be empty.

    Means and stds have the scale 0 to 255; they are 0 and 1 if the network normalises itself.
    """
    net = {"net": FORMATS["onnx"], "backend": "kestrel_nart", "max_batch_size": 8}
    net |= {"input": {"data": "data"}, "output": {"score": "score"}}
    means, stds = ([round(255 * x, 6) for x in v] for v in (preprocess.mean, preprocess.std))
    inside = preprocess.normalised_inside
    return {
        "model_files": {"net": net},
        "input_h": preprocess.size,
        "input_w": preprocess.size,
        "pixel_means": [0.0] * 3 if inside else means,
        "pixel_stds": [1.0] * 3 if inside else stds,
        "is_rgb": True,
        "type": block.get("type", "UNKNOWN"),
        "save_all_label": block.get("save_all_label", True),
        "support_labels": block.get("support_labels"),
    }


def categories(block: Mapping[str, Any], classes: list[str]) -> dict[str, Any]:
    """category_param.json: the class_label of a to_kestrel block, else one category.

    Each category is a range of the scores, both ends included. Raises ExportError unless the block
    has one label for each score, in the order of the run.
    """
    groups = block.get("class_label") or {"classes": {"labels": classes}}
    labels = [str(label) for group in groups.values() for label in group["labels"]]
    if labels != classes and sorted(labels) == sorted(classes):
        raise ExportError(
            f"class_label has the classes of the run in another order, first {labels[:4]} for "
            f"{classes[:4]}; put them in the order of the run"
        )
    found, start = {}, 0
    for name, group in groups.items():
        if unknown := sorted(set(group) - {"labels", "calculator"}):
            raise ExportError(f"class_label.{name}: {', '.join(unknown)} is not supported")
        labels = [str(label) for label in group["labels"]]
        end = start + len(labels)
        found[name] = {
            "calculator": group.get("calculator", "bypass"),
            "feature_start": start,
            "feature_end": end - 1,
            "labels": labels,
        }
        start = end
    if start != len(classes):
        raise ExportError(f"class_label has {start} labels, the network has {len(classes)} scores")
    return found


def sentences(error: ValidationError) -> list[str]:
    """What is wrong, by field."""
    return [f"{'.'.join(map(str, e['loc']))}: {e['msg'].lower()}" for e in error.errors()]
