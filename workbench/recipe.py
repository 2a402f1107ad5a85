"""One recipe: every knob of a training run, typed, checked and flat.

    recipe = Recipe.read("params/resnet50_100e.yaml", data_dir="/data/imagenet", seed=1)

A params file, the tagged cell of a notebook and the command line hold flat subsets of the same
fields. What a recipe does not name is off; the sizes default to the embedded digits, so that
`Recipe()` trains. Nothing heavy is imported here: a recipe is judged within a second.
"""

import ast
import contextlib
import difflib
import hashlib
import json
import math
import re
import types
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from workbench import ROOT

Fraction = Annotated[float, Field(ge=0, le=1)]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]

TEMPERED = {"kl", "ce", "dist", "dkd", "kl_standardized"}  # mimic losses with a temperature
RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")


class RecipeError(ValueError):
    """Everything that is wrong with a recipe, one line per problem."""

    def __init__(self, problems: list[str], source: str = "recipe"):
        self.problems = problems
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"{source}: {count}\n" + "\n".join(f"  - {text}" for text in problems))


def knob(default: Any, text: str, *, place: bool = False, **limits) -> Any:
    """A field with its one-line description; `place` marks what never changes the weights."""
    return Field(default, description=text, json_schema_extra={"place": place}, **limits)


class Recipe(BaseModel):
    """The knobs, in the order data, model, optimisation, loss, augmentation, distillation, run.

    Sources: UP is United Perception's classification task; BoT is arXiv 1812.01187; RSB is
    arXiv 2110.00476. Raises RecipeError, never a bare pydantic error.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    name: str = knob("baseline", "run folder is runs_dir/<name>-seed<seed>", pattern=r"^[^/\\]+$")

    # data
    dataset: Literal["digits", "letters", "files"] = knob(
        "digits", "digits and letters are embedded; files reads data_dir"
    )
    data_dir: str = knob("", "folder that the lists and roots below lie in", place=True)
    train_list: list[str] = knob([], "list files, imagenet or custom_cls; none: class folders")
    train_root: list[str] = knob(["train"], "folders the entries start from, one per list or one")
    val_list: list[str] = knob([], "as train_list")
    val_root: list[str] = knob(["val"], "as train_root")
    val_fraction: float = knob(
        0.0, "share of every class held out when there is no validation list", ge=0, lt=1
    )
    class_names: str = knob("", "text file with one class name per line")
    num_classes: int | None = knob(None, "None counts them in the data", ge=2)
    fraction: float = knob(1.0, "share of the training list that is used", gt=0, le=1)
    class_balance: Fraction = knob(
        0.0, "0: every picture once an epoch; 1: every class equally often"
    )
    outside_root: bool = knob(False, "list entries may leave their root")
    verify_data: bool = knob(True, "decode every picture once before training, remembered")
    cache: bool = knob(
        False, "keep pixels on disk for the next epochs and runs; the same bytes", place=True
    )
    cache_dir: str = knob(
        "", "folder for them; empty: pictures/ in WORKBENCH_CACHE or ~/.cache/workbench", place=True
    )
    train_resize: int | None = knob(
        None, "pixels, short side before the training crop where longer; None: as stored", ge=8
    )
    image_size: int = knob(32, "pixels, side of the square training crop", ge=8, le=4096)
    val_image_size: int | None = knob(
        None, "pixels, side of the centre crop; None is image_size", ge=8, le=4096
    )
    val_resize: int = knob(32, "pixels, short side before the centre crop", ge=8, le=8192)
    interpolation: Interpolation = knob("bilinear", "of both resizes, antialiased")
    mean: list[Fraction] = knob(
        [0.485, 0.456, 0.406], "RGB, 0 to 1, subtracted", min_length=3, max_length=3
    )
    std: list[Annotated[float, Field(gt=0, le=1)]] = knob(
        [0.229, 0.224, 0.225], "RGB, 0 to 1, divided by", min_length=3, max_length=3
    )

    # model
    model: str = knob("test_resnet", "timm name, or resnet18 to resnet152", min_length=1)
    deep_stem: bool = knob(False, "three 3x3 convolutions for the 7x7; with avg_down a ResNet-D")
    avg_down: bool = knob(False, "average pool and 1x1 in the shortcuts, BoT section 4")
    drop_path: float = knob(
        0.0, "highest rate of skipped blocks, grows with depth, arXiv 1603.09382", ge=0, lt=1
    )
    dropout: float = knob(0.0, "before the classifier", ge=0, lt=1)
    pretrained: bool = knob(False, "start from timm's published weights")
    weights: str = knob("", "start from this weights file or run folder")
    force_weights: bool = knob(False, "take weights that fit less than half of the model, too")
    freeze: list[str] = knob([], "modules that stay as they start, norms included: conv1, layer1")

    # optimisation
    epochs: int = knob(8, "passes over the training list", ge=1, le=100_000)
    batch_size: int = knob(32, "images per optimizer step, all devices together", ge=1)
    micro_batch_size: int | None = knob(
        None, "images per forward on a device; gradients add up to the step", ge=1
    )
    drop_last: bool = knob(False, "leave out the incomplete last batch of an epoch")
    repeated_aug: int = knob(
        1, "copies of a picture in a batch, each drawn anew, arXiv 1902.05509", ge=1, le=64
    )
    optimizer: Literal["sgd", "adamw", "lamb"] = knob("sgd", "sgd, adamw or lamb, arXiv 1904.00962")
    lr: float = knob(0.1, "peak learning rate, used as it stands", gt=0)
    momentum: float = knob(0.9, "of sgd", ge=0, lt=1)
    nesterov: bool = knob(False, "of sgd")
    weight_decay: float = knob(0.0, "per step and lr, on what decay_all says", ge=0)
    decay_all: bool = knob(True, "False leaves norms, biases and position embeddings undecayed")
    trust_clip: bool = knob(False, "of lamb: trust ratios are at most 1")
    always_adapt: bool = knob(False, "of lamb: a trust ratio for undecayed tensors too")
    schedule: Literal["constant", "multistep", "step", "cosine", "polynomial", "one_cycle"] = knob(
        "cosine", "constant, multistep, step, cosine, polynomial or one_cycle"
    )
    milestones: list[int] = knob([], "epochs at which multistep multiplies by gamma")
    step_epochs: int | None = knob(None, "epochs after which step multiplies by gamma", ge=1)
    gamma: float = knob(0.1, "of multistep and step", gt=0, lt=1)
    power: float = knob(1.0, "of polynomial; 1 is a straight line", gt=0)
    lr_min: float = knob(0.0, "where cosine and polynomial end", ge=0)
    pct_start: float = knob(0.3, "share of the steps in which one_cycle rises to lr", gt=0, lt=1)
    cosine_epochs: float | None = knob(
        None, "epochs from the end of warm-up to lr_min; None is all that remain", gt=0
    )
    lr_per_epoch: bool = knob(False, "cosine and polynomial change once an epoch, not every step")
    warmup: Literal["linear", "cosine", "exponential"] = knob("linear", "shape of the climb to lr")
    warmup_epochs: float = knob(0.0, "epochs of climb to lr, arXiv 1706.02677", ge=0)
    warmup_steps: int = knob(0, "steps of climb, in the place of warmup_epochs", ge=0)
    warmup_ratio: float = knob(0.0, "share of lr that the warm-up starts from", ge=0, le=1)
    layer_decay: float | None = knob(
        None, "lr of a layer over that of the layer above it, arXiv 2106.08254", gt=0, lt=1
    )
    probe_epochs: int = knob(0, "first epochs, in which the classifier alone learns", ge=0)
    clip_grad_norm: float | None = knob(None, "largest norm of all gradients together", gt=0)
    ema_decay: float | None = knob(
        None, "share of the average kept per step, constant; both weights are evaluated", gt=0, lt=1
    )

    # loss
    loss: Literal["ce", "bce"] = knob("ce", "cross-entropy, or binary cross-entropy of every class")
    bce_threshold: float | None = knob(
        None, "targets above count as 1, others as 0; RSB 0.2", ge=0, lt=1
    )
    bce_sum: bool = knob(False, "sum over classes, not their mean: num_classes times the gradient")
    bce_shift: bool = knob(
        False, "logits less ln(num_classes) in the loss; UP's bias has sum, shift"
    )
    label_smoothing: float = knob(
        0.0, "share of the target spread over all classes, arXiv 1512.00567", ge=0, lt=1
    )
    up_smoothing: bool = knob(False, "UP's smoothing of mixed labels, sum below 1; to reproduce it")

    # augmentation
    crop_scale: list[Annotated[float, Field(gt=0, le=1)]] = knob(
        [1.0, 1.0],
        "share of the area a crop keeps, arXiv 1409.4842; ImageNet 0.08 to 1",
        min_length=2,
        max_length=2,
    )
    crop_ratio: list[Annotated[float, Field(gt=0)]] = knob(
        [0.75, 1.3333333333333333], "width over height of a crop", min_length=2, max_length=2
    )
    flip: Fraction = knob(0.0, "probability of a left-right flip")
    brightness: Fraction = knob(0.0, "factor 1 - x to 1 + x")
    contrast: Fraction = knob(0.0, "factor 1 - x to 1 + x")
    saturation: Fraction = knob(0.0, "factor 1 - x to 1 + x")
    hue: float = knob(0.0, "shift -x to x, in turns of the colour circle", ge=0, le=0.5)
    autoaugment: bool = knob(False, "torchvision's ImageNet policy, arXiv 1805.09501")
    randaug_n: int = knob(
        0, "RandAugment operations drawn, arXiv 1909.13719; 0 is off", ge=0, le=16
    )
    randaug_m: float = knob(7.0, "mean magnitude, 0 to 10", ge=0, le=10)
    randaug_std: float = knob(0.5, "standard deviation of the magnitude", ge=0, le=10)
    randaug_increasing: bool = knob(True, "a higher magnitude is never milder, timm's inc1")
    randaug_form: Literal["up", "timm"] = knob(
        "up", "up: nearest, black, shift in pixels; timm: smooth, mean colour, share of side"
    )
    mixup_alpha: float = knob(0.0, "of Beta(a, a), arXiv 1710.09412; 0 is off", ge=0, le=100)
    cutmix_alpha: float = knob(0.0, "of Beta(a, a), arXiv 1905.04899; 0 is off", ge=0, le=100)
    switch_prob: Fraction = knob(0.5, "probability of CutMix where both are on")
    mix_per_sample: bool = knob(False, "a draw for every picture instead of one for the step")
    mix_prob: Fraction = knob(1.0, "probability that a draw mixes at all, timm's mixup-prob")
    erase_prob: Fraction = knob(0.0, "probability of RandomErasing, arXiv 1708.04896")
    erase_mode: Literal["pixel", "rand", "const"] = knob(
        "pixel", "filled with noise, one noise colour, or the mean"
    )
    erase_count: int = knob(1, "boxes at most, which share the area", ge=1, le=16)

    # distillation
    teacher: list[str] = knob([], "run folders, weights files or timm names; none: no teacher")
    teacher_model: list[str] = knob([], "timm names of the teachers in weights files, one each")
    teacher_weight: list[Annotated[float, Field(gt=0)]] = knob(
        [1.0], "of what a teacher says, one for all or one each; they add up", min_length=1
    )
    teacher_image_size: list[Annotated[int, Field(ge=8, le=4096)]] = knob(
        [], "pixels, one for all or one each; none: that of its training"
    )
    teacher_mean: list[Fraction] = knob([], "RGB, 0 to 1, of all or of each; none: of its training")
    teacher_std: list[Annotated[float, Field(gt=0, le=1)]] = knob([], "as teacher_mean")
    mimic: list[str] = knob(
        ["logits"],
        "logits, or modules: layer4 -> layer4, teacher2:layer4 for one teacher's",
        min_length=1,
    )
    mimic_loss: list[
        Literal["kl", "ce", "l2", "l2_normalized", "up_kl", "dist", "dkd", "kl_standardized"]
    ] = knob(["dist"], "one for all or one each; modules take l2 or l2_normalized", min_length=1)
    mimic_weight: list[Annotated[float, Field(gt=0)]] = knob(
        [1.0], "one for all or one each", min_length=1
    )
    temperature: float = knob(1.0, "divides logits in kl, ce, dist, dkd and kl_standardized", gt=0)
    dkd_beta: float = knob(8.0, "weight of the other classes in dkd, arXiv 2203.08679", gt=0)
    mimic_warmup_epochs: float = knob(0.0, "epochs in which the mimic loss grows from 0", ge=0)
    task_weight: float = knob(1.0, "of the loss against the labels; 0 leaves the teacher's", ge=0)
    cache_teacher: bool = knob(
        False, "keep the teachers' logits on disk for the next student", place=True
    )

    # run
    seed: int = knob(0, "order, draws and initial weights follow from it", ge=0, lt=2**32)
    resume_from: str = knob("", "run folder whose last.pt is continued here")
    auto_resume: bool = knob(True, "go on where this run folder stopped", place=True)
    val_every: int = knob(1, "epochs between evaluations; the last is always evaluated", ge=1)
    checkpoint_minutes: float = knob(
        10.0, "between checkpoints inside an epoch; 0 is every step", ge=0, place=True
    )
    log_every: int = knob(10, "steps per row of steps.csv", ge=1, place=True)
    device: Literal["auto", "cpu", "cuda", "mps"] = knob("auto", "auto takes a GPU", place=True)
    precision: Literal["auto", "fp32", "bf16"] = knob("auto", "auto is bf16 where it is native")
    channels_last: bool = knob(True, "memory layout of images and weights")
    compile: bool = knob(
        False, "torch.compile of the model; its first steps take longer", place=True
    )
    augment_on_device: bool = knob(
        False, "flip, RandAugment and jitter by the batch; loaders only crop"
    )
    workers: int | None = knob(
        None, "processes that decode, per device; None is one per core, at most 8", ge=0, place=True
    )
    runs_dir: str = knob("runs", "where run folders lie", place=True, min_length=1)

    def __init__(self, /, **values: Any):
        values, problems = _typed(values)
        problems += _contradictions(values, {key for key, _ in problems})
        if problems:
            raise RecipeError([text for _, text in problems])
        super().__init__(**values)

    @classmethod
    def read(cls, path: str | Path, **overrides: Any) -> "Recipe":
        """The recipe in a YAML file, with overrides as `-p` gives them.

        Raises RecipeError for a file that is missing, is no flat mapping or holds a bad knob.
        """
        return cls._named(str(path), {**read_params(path), **overrides})

    @classmethod
    def collect(cls, namespace: Mapping[str, Any]) -> "Recipe":
        """The recipe in a notebook's `globals()`, or in any mapping of plain values.

        In a notebook every name assigned in the cells that begin with `# Parameters` counts (the
        tagged cell, and the one papermill injects), so an injected misspelling is found; other
        variables are left alone.
        """
        cells = [text for text in namespace.get("In") or [] if text.startswith("# Parameters")]
        if not cells:
            values = {
                k: v
                for k, v in namespace.items()
                if (not k.startswith("_") and _plain(v))
                or (k in cls.model_fields and not isinstance(v, types.ModuleType))
            }
            return cls._named("parameters", values)
        # Of a cell that was corrected and run again, the last text counts.
        cells = {text.partition("\n")[0]: text for text in cells}.values()
        names = [name for cell in cells for name in _assigned(cell)]
        return cls._named("parameters", {name: namespace[name] for name in names})

    @classmethod
    def _named(cls, source: str, values: Mapping[str, Any]) -> "Recipe":
        try:
            return cls(**values)
        except RecipeError as error:
            raise RecipeError(error.problems, source) from None

    def replace(self, **changes: Any) -> "Recipe":
        """This recipe with other values, checked again."""
        return Recipe(**{**self.changed(), **changes})

    def changed(self) -> dict[str, Any]:
        """The fields that differ from the defaults."""
        return {
            k: v for k, v in self.model_dump().items() if v != type(self).model_fields[k].default
        }

    def write(self, path: str | Path) -> None:
        """Every field as YAML, each with its description; `read` gives an equal recipe."""
        head = f"# workbench recipe, fingerprint {self.fingerprint}\n"
        Path(path).write_text(head + self.yaml(type(self).model_fields), encoding="utf-8")

    def yaml(self, keys: Iterable[str]) -> str:
        """These fields as lines of a params file, each with its description."""
        values, fields = self.model_dump(), type(self).model_fields
        return "".join(f"{k}: {_yaml(values[k])}  # {fields[k].description}\n" for k in keys)

    @classmethod
    def cell(cls) -> str:
        """The source of the notebooks' parameters cell: every default, one per line."""
        lines = [
            "# Parameters. What a recipe does not name is off; papermill overrides any of them."
        ]
        for key, field in cls.model_fields.items():
            lines.append(f"{key} = {_python(field.default)}  # {field.description}")
        return "\n".join(lines)

    @property
    def folder(self) -> Path:
        """The run folder."""
        return ROOT / self.runs_dir / f"{self.name}-seed{self.seed}"

    @property
    def fingerprint(self) -> str:
        """Twelve hex digits over every field that can change the trained weights."""
        text = json.dumps({k: v for k, v in self.model_dump().items() if k not in PLACE})
        return hashlib.sha256(text.encode()).hexdigest()[:12]


# Fields that say where and how often, not what: a run may be resumed with others.
PLACE = frozenset(
    key for key, field in Recipe.model_fields.items() if field.json_schema_extra["place"]
) | {"name"}
# Options whose values are text: a number that is given for one is text too.
TEXT = frozenset(k for k, f in Recipe.model_fields.items() if f.annotation in (str, list[str]))


def read_params(path: str | Path) -> dict[str, Any]:
    """The flat mapping of a params file.

    Raises RecipeError naming the line of a syntax error, a repeated key, or what came instead of
    a mapping.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        siblings = [p.name for p in Path(path).parent.glob("*.y*ml")]
        near = difflib.get_close_matches(Path(path).name, siblings, n=1)
        hint = f"; the nearest is {near[0]!r}" if near else ""
        raise RecipeError([f"cannot be read: {error}{hint}"], str(path)) from None
    if len(text) > 100_000:
        raise RecipeError([f"{len(text):,} characters; a recipe is a page of YAML"], str(path))
    try:
        values = _yaml_value(text)
    except ValueError as error:
        raise RecipeError([str(error)], str(path)) from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise RecipeError(
            [f"holds a {type(values).__name__}; wanted lines of `knob: value`"], str(path)
        )
    return {str(key): value for key, value in values.items()}  # `on:` is a boolean to YAML


def _yaml_value(text: str) -> Any:
    """What YAML text holds. Raises ValueError, whatever PyYAML makes of hostile text."""
    try:
        return yaml.load(text, Loader=_FlatLoader)
    except RecursionError:
        raise ValueError("nested too deeply; a recipe is flat") from None
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise ValueError(" ".join(str(error).split())) from None


class _FlatLoader(yaml.SafeLoader):
    """PyYAML's safe loader without aliases (no billion laughs), with an error on doubled keys.

    Numbers and booleans of text options stay as they are written: `name: 007`.
    """

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.YAMLError(f"line {mark.line + 1}: aliases have no place in a flat recipe")
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, value in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, list | dict) or key in seen:
                line = key_node.start_mark.line + 1
                raise yaml.YAMLError(f"line {line}: {key!r} stands twice or is no plain name")
            seen.add(key)
            if key in TEXT:
                for one in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                    implicit = self.resolve(yaml.ScalarNode, one.value, (True, False))
                    if one.tag == implicit and implicit.endswith((":int", ":float", ":bool")):
                        one.tag = "tag:yaml.org,2002:str"
        return super().construct_mapping(node, deep)


# Dates stay text (`name: 2026-01-02`), as papermill has it too.
_FlatLoader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in rules if tag != "tag:yaml.org,2002:timestamp"]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _typed(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Values with number-like strings understood, and what is wrong: (field, sentence)."""
    good, problems = {}, []
    for key, value in values.items():
        if key not in Recipe.model_fields:
            hint = f"; {_nearest(key)}" if len(problems) < 20 else ""  # each takes a millisecond
            problems.append((key, f"{key}: no such knob{hint}"))
        else:
            good[key] = _understood(value, Recipe.model_fields[key].annotation)
    try:
        Recipe.__pydantic_validator__.validate_python(good, self_instance=Recipe.model_construct())
    except ValidationError as error:
        bad: dict[str, str] = {}
        for item in error.errors():
            key = item["loc"][0]
            bad.setdefault(key, f"{key}: {_sentence(key, values[key], item)}")
        problems += bad.items()
        good = {k: v for k, v in good.items() if k not in bad}
    return good, problems


# What other tools call a knob, for the hint beside an unknown one.
_ELSEWHERE = {
    "learning_rate": "lr",
    "max_epoch": "epochs",
    "num_epochs": "epochs",
    "wd": "weight_decay",
    "bs": "batch_size",
    "arch": "model",
    "backbone": "model",
    "img_size": "image_size",
    "input_size": "image_size",
    "optim": "optimizer",
    "opt": "optimizer",
    "scheduler": "schedule",
    "lr_scheduler": "schedule",
    "smoothing": "label_smoothing",
    "smooth_ratio": "label_smoothing",
    "mixup": "mixup_alpha",
    "cutmix": "cutmix_alpha",
    "mixup_switch_prob": "switch_prob",
    "mixup_prob": "mix_prob",
    "reprob": "erase_prob",
    "remode": "erase_mode",
    "aa": "randaug_n",
    "magnitude_std": "randaug_std",
    "aug_repeats": "repeated_aug",
    "bce_loss": "loss",
    "bce_target_thresh": "bce_threshold",
    "warmup_iter": "warmup_steps",
    "warmup_type": "warmup",
    "warmup_mode": "warmup",
    "warmup_lr": "warmup_ratio",
    "eta_min": "lr_min",
    "min_lr": "lr_min",
    "decay_epochs": "step_epochs",
    "decay_rate": "gamma",
    "model_ema_decay": "ema_decay",
    "clip_grad": "clip_grad_norm",
    "max_grad_norm": "clip_grad_norm",
    "num_workers": "workers",
    "random_seed": "seed",
    "amp": "precision",
    "fp16": "precision",
    "bf16": "precision",
    "pretrain_model": "weights",
    "checkpoint": "weights",
    "resume": "resume_from",
    "crop_pct": "val_resize",
    "hflip": "flip",
    "meta_file": "train_list",
    "image_dir": "train_root",
    "accumulate": "micro_batch_size",
    "kd_temperature": "temperature",
    "tau": "temperature",
    "teacher_path": "teacher",
    "mimic_type": "mimic_loss",
    "mimic_name": "mimic",
    "distill_weight": "mimic_weight",
    "kd_weight": "mimic_weight",
    "task_loss": "task_weight",
    "frozen_layers": "freeze",
    "layer_wise_decay": "layer_decay",
    "linear_probe": "probe_epochs",
    "balanced": "class_balance",
}


def _nearest(key: str) -> str:
    names = {**{name: name for name in Recipe.model_fields}, **_ELSEWHERE}
    close = difflib.get_close_matches(key.lower(), names, n=1, cutoff=0.6)
    return f"the nearest is {names[close[0]]!r}" if close else "Recipe.cell() prints all of them"


def _understood(value: Any, annotation: Any) -> Any:
    """YAML 1.1 and the command line give `3e-4`, `true` or `[1, 2]` as text; read what it means."""
    kinds = [*get_args(annotation), annotation]
    if isinstance(value, tuple):
        value = list(value)
    if isinstance(value, str) and value.strip().lower() in ("none", "null") and type(None) in kinds:
        return None
    if getattr(annotation, "__origin__", None) is list:
        if isinstance(value, str) and value.strip().startswith("["):
            try:  # text in it stays as it is written, as under a text option
                text = annotation == list[str]
                value = _yaml_value(f"teacher: {value}")["teacher"] if text else _yaml_value(value)
            except ValueError:
                return value
        if not isinstance(value, list):
            value = [value]  # `train_list: meta/train.txt` is a list of one
        return [_understood(item, kinds[0]) for item in value]
    if isinstance(value, str) and bool in kinds and value.strip().lower() in ("true", "false"):
        return value.strip().lower() == "true"
    if isinstance(value, str) and (int in kinds or float in kinds):
        try:
            number = float(value)
        except ValueError:
            return value
        return int(number) if int in kinds and number.is_integer() else number
    if annotation is str and type(value) is int:  # papermill's -p makes a number of 20261126
        return str(value)
    if isinstance(value, float) and int in kinds and float not in kinds and value.is_integer():
        return int(value)
    return value


def _sentence(key: str, came: Any, item: dict[str, Any]) -> str:
    """What came and what is allowed, for one pydantic error."""
    text = item["msg"][0].lower() + item["msg"][1:]
    if item["type"] == "string_type":
        text += "; put it in quotes, or use -r in place of papermill's -p"
    where = (
        f" at position {item['loc'][1]}" if len(item["loc"]) > 1 and item["loc"][1] != key else ""
    )
    return f"{came!r}{where}: {text} ({Recipe.model_fields[key].description})"


# (knobs, rule): a rule returns why these knobs would change nothing under the other ones, or False.
_UNUSED = [
    (
        "data_dir train_list train_root val_list val_root val_fraction class_names num_classes"
        " outside_root",
        lambda r: (
            r.dataset != "files"
            and f"since dataset is {r.dataset}, which is embedded; say dataset: files"
        ),
    ),
    ("cache_dir", lambda r: not r.cache and "without cache: true"),
    (
        "augment_on_device",
        lambda r: (
            not (r.flip or r.randaug_n or r.brightness or r.contrast or r.saturation or r.hue)
            and not r.autoaugment  # which it contradicts
            and "without any of flip, randaug_n and jitter"
        ),
    ),
    ("deep_stem avg_down", lambda r: r.model not in RESNETS and f"since model is {r.model}"),
    (
        "micro_batch_size",
        lambda r: (
            (r.micro_batch_size or 0) >= r.batch_size and f"since batch_size is {r.batch_size}"
        ),
    ),
    ("momentum nesterov", lambda r: r.optimizer != "sgd" and f"since optimizer is {r.optimizer}"),
    ("decay_all", lambda r: r.weight_decay == 0 and "since weight_decay is 0"),
    ("trust_clip", lambda r: r.optimizer != "lamb" and f"since optimizer is {r.optimizer}"),
    (
        "always_adapt",
        lambda r: (
            (r.optimizer != "lamb" and f"since optimizer is {r.optimizer}")
            or (r.weight_decay > 0 and r.decay_all and "since every tensor is decayed")
        ),
    ),
    *[
        (keys, lambda r, f=fits: r.schedule not in f.split() and f"since schedule is {r.schedule}")
        for keys, fits in (
            ("milestones", "multistep"),
            ("step_epochs", "step"),
            ("gamma", "multistep step"),
            ("power", "polynomial"),
            ("pct_start", "one_cycle"),
            ("cosine_epochs", "cosine"),
            ("lr_min lr_per_epoch", "cosine polynomial"),
            ("warmup_epochs warmup_steps", "constant multistep step cosine polynomial"),
        )
    ],
    (
        "warmup warmup_ratio",
        lambda r: r.warmup_epochs == 0 and r.warmup_steps == 0 and "since there is no warm-up",
    ),
    ("val_every", lambda r: r.val_every > r.epochs and f"since there are {r.epochs} epochs"),
    ("bce_threshold bce_sum bce_shift", lambda r: r.loss != "bce" and f"since loss is {r.loss}"),
    (
        "up_smoothing",
        lambda r: (
            (r.loss != "ce" and f"since loss is {r.loss}")
            or (r.label_smoothing == 0 and "since label_smoothing is 0")
            or (not mixes(r) and "since no labels are mixed (mixup_alpha, cutmix_alpha)")
        ),
    ),
    (
        "randaug_m randaug_std randaug_increasing randaug_form",
        lambda r: r.randaug_n == 0 and "since randaug_n is 0",
    ),
    (
        "switch_prob",
        lambda r: (
            not (r.mixup_alpha and r.cutmix_alpha)
            and "since mixup_alpha and cutmix_alpha are not both on"
        ),
    ),
    ("mix_per_sample mix_prob", lambda r: not mixes(r) and "without mixup_alpha or cutmix_alpha"),
    ("erase_mode erase_count", lambda r: r.erase_prob == 0 and "since erase_prob is 0"),
    ("force_weights", lambda r: not r.weights and "since weights is empty"),
    (
        "teacher_model teacher_weight teacher_image_size teacher_mean teacher_std mimic mimic_loss"
        " mimic_weight temperature dkd_beta mimic_warmup_epochs task_weight cache_teacher",
        lambda r: not r.teacher and "since there is no teacher",
    ),
    (
        "temperature",
        lambda r: (
            bool(r.teacher)
            and not set(r.mimic_loss) & TEMPERED
            and f"since mimic_loss is {', '.join(r.mimic_loss)}"
        ),
    ),
    (
        "dkd_beta",
        lambda r: bool(r.teacher) and "dkd" not in r.mimic_loss and "since no mimic_loss is dkd",
    ),
    (
        "loss label_smoothing up_smoothing bce_threshold bce_sum bce_shift",
        lambda r: bool(r.teacher) and r.task_weight == 0 and "since task_weight is 0",
    ),
]

# (knob, rule): a rule returns what is wrong with the knob beside the other ones, or False.
_WRONG = [
    ("name", lambda r: r.name in (".", "..") and "must be the name of a folder"),
    ("train_root", lambda r: _roots(r.train_list, r.train_root)),
    ("val_root", lambda r: _roots(r.val_list, r.val_root)),
    (
        "val_fraction",
        lambda r: (
            r.val_fraction > 0
            and (r.val_list or r.val_root != ["val"])
            and "there is a validation list or root already; leave out one of the two"
        ),
    ),
    (
        "val_resize",
        lambda r: (
            r.val_resize < (r.val_image_size or r.image_size)
            and f"{r.val_resize} is smaller than the {r.val_image_size or r.image_size} pixel crop"
        ),
    ),
    ("weights", lambda r: r.weights and r.pretrained and "pretrained asks for other weights"),
    (
        "resume_from",
        lambda r: (
            r.resume_from
            and (r.weights or r.pretrained)
            and "a resumed run brings its own weights; leave out weights and pretrained"
        ),
    ),
    (
        "nesterov",
        lambda r: (
            r.optimizer == "sgd" and r.nesterov and r.momentum == 0 and "needs momentum above 0"
        ),
    ),
    (
        "milestones",
        lambda r: (
            r.schedule == "multistep"
            and (
                (not r.milestones and "empty; multistep needs the epochs to step at")
                or (
                    not all(1 <= m < r.epochs for m in r.milestones)
                    and f"{r.milestones} has one outside epochs 1 to {r.epochs - 1}"
                )
                or (sorted(set(r.milestones)) != r.milestones and f"{r.milestones} must climb")
            )
        ),
    ),
    ("lr_min", lambda r: r.lr_min > r.lr and f"{r.lr_min} is above lr {r.lr}"),
    (
        "step_epochs",
        lambda r: (
            r.schedule == "step"
            and (
                (r.step_epochs is None and "missing; step needs the epochs between two steps")
                or (
                    r.step_epochs >= r.epochs
                    and f"{r.step_epochs} of {r.epochs} epochs would never step"
                )
            )
        ),
    ),
    (
        "warmup_epochs",
        lambda r: (
            (
                r.warmup_epochs >= r.epochs
                and f"{r.warmup_epochs} of {r.epochs} epochs would leave no training at lr"
            )
            or (r.warmup_epochs > 0 and r.warmup_steps > 0 and "warmup_steps is set too; leave one")
        ),
    ),
    (
        "warmup_ratio",
        lambda r: (
            r.warmup == "exponential"
            and r.warmup_ratio == 0
            and (r.warmup_epochs > 0 or r.warmup_steps > 0)
            and "0, but an exponential warm-up multiplies from there; above 0, such as 0.001"
        ),
    ),
    (
        "repeated_aug",
        lambda r: (
            r.repeated_aug > r.batch_size and f"{r.repeated_aug} is above batch_size {r.batch_size}"
        ),
    ),
    (
        "batch_size",
        lambda r: r.batch_size == 1 and mixes(r) and "1 picture has no partner to mix with",
    ),
    (
        "micro_batch_size",
        lambda r: (
            (r.micro_batch_size or 0) % 2 == 1
            and mixes(r)
            and f"{r.micro_batch_size} is odd, but pictures are mixed in pairs"
        ),
    ),
    (
        "probe_epochs",
        lambda r: (
            r.probe_epochs >= r.epochs
            and f"{r.probe_epochs} of {r.epochs} epochs would leave none for the whole model"
        ),
    ),
    ("freeze", lambda r: "" in r.freeze and "an empty name would be the whole model"),
    *[
        (
            key,
            lambda r, k=key, n=per: bool(r.teacher) and _each(r, k, len(r.teacher), "teachers", n),
        )
        for key, per in (
            ("teacher_weight", 1),
            ("teacher_image_size", 1),
            ("teacher_mean", 3),
            ("teacher_std", 3),
        )
    ],
    (
        "teacher_model",
        lambda r: (
            bool(r.teacher)
            and len(r.teacher_model) not in (0, len(r.teacher))
            and f"{len(r.teacher_model)} names for {len(r.teacher)} teachers; give one each"
        ),
    ),
    ("mimic", lambda r: bool(r.teacher) and _mimics(r)),
    *[
        (key, lambda r, k=key: bool(r.teacher) and _each(r, k, len(r.mimic), "mimics"))
        for key in ("mimic_loss", "mimic_weight")
    ],
    (
        "mimic_loss",
        lambda r: (
            bool(r.teacher)
            and any(not on_logits(m) for m in r.mimic)
            and any(
                not on_logits(m) and not k.startswith("l2")
                for m, k in zip(r.mimic, one_each(r.mimic_loss, len(r.mimic)), strict=False)
            )
            and "modules are compared by l2 or l2_normalized; the others are for logits"
        ),
    ),
    (
        "mimic_warmup_epochs",
        lambda r: (
            r.mimic_warmup_epochs > r.epochs
            and f"{r.mimic_warmup_epochs} of {r.epochs} epochs would never reach the whole loss"
        ),
    ),
    (
        "task_weight",
        lambda r: (
            bool(r.teacher)
            and r.task_weight == 0
            and not any(map(on_logits, r.mimic))
            and "0 and no mimic of logits: nothing would train the classifier"
        ),
    ),
    (
        "augment_on_device",
        lambda r: (
            r.augment_on_device
            and r.autoaugment
            and "autoaugment is torchvision's and runs in the loaders; leave out one of the two"
        ),
    ),
    (
        "cache",
        lambda r: (
            r.cache
            and not r.verify_data
            and "knows pictures by their bytes, which verify_data: false never reads; leave that "
            "at true"
        ),
    ),
    (
        "train_resize",
        lambda r: (
            r.train_resize is not None
            and r.train_resize < r.image_size
            and f"{r.train_resize} is below image_size {r.image_size}, every crop would be enlarged"
        ),
    ),
    (
        "cache_teacher",
        lambda r: (
            r.cache_teacher
            and not all(map(on_logits, r.mimic))
            and "keeps logits only; modules would need the teacher itself"
        ),
    ),
    *[
        (key, lambda r, k=key: getattr(r, k)[0] > getattr(r, k)[1] and f"{getattr(r, k)} falls")
        for key in ("crop_scale", "crop_ratio")
    ],
]


def without_effect(values: Mapping[str, Any]) -> set[str]:
    """The knobs that change nothing beside the other values, whatever they are set to."""
    known = types.SimpleNamespace(
        **{k: values.get(k, field.default) for k, field in Recipe.model_fields.items()}
    )
    found: set[str] = set()
    for keys, rule in _UNUSED:
        with contextlib.suppress(TypeError, ValueError):  # a run of an older version
            if rule(known):
                found |= set(keys.split())
    return found


def _contradictions(values: Mapping[str, Any], bad: set[str]) -> list[tuple[str, str]]:
    """Knobs that exclude each other, and knobs that are set and would change nothing.

    A rule that reads a knob with a bad value is skipped: that knob is reported already.
    """

    class Known:
        def __getattr__(self, key: str) -> Any:
            if key in bad:
                raise LookupError(key)
            return values.get(key, Recipe.model_fields[key].default)

    problems = []
    for keys, rule in _UNUSED:
        for key in keys.split():
            if values.get(key, default := Recipe.model_fields[key].default) == default:
                continue
            if why := _asked(rule, Known()):
                problems.append((key, f"{key}: {values[key]!r} would change nothing {why}"))
    for key, rule in _WRONG:
        if why := _asked(rule, Known()):
            problems.append((key, f"{key}: {why}"))
    return problems


def _asked(rule: Callable[[Any], Any], recipe: Any) -> Any:
    try:
        return rule(recipe)
    except LookupError:
        return False


def _roots(lists: list[str], roots: list[str]) -> str | bool:
    if not roots:
        return "empty; name the folder, '.' is data_dir itself"
    return (
        bool(lists)
        and len(roots) not in (1, len(lists))
        and f"{len(roots)} roots for {len(lists)} lists; give one, or one for each list"
    )


def _each(recipe: Any, key: str, count: int, of: str, per: int = 1) -> str | bool:
    """What is wrong with a list that holds `per` values for all, or for each of `count`."""
    given = len(getattr(recipe, key))
    allowed = {per, per * count} | ({0} if Recipe.model_fields[key].default == [] else set())
    return (
        given not in allowed
        and f"{given} values for {count} {of}; give {per} for all, or {per} each"
    )


# A module's name, or one teacher's: teacher2:layer4.
_MIMIC = re.compile(r"[\w.]+( -> (teacher[1-9]\d*:)?[\w.]+)?")


def _mimics(recipe: Any) -> str | bool:
    for text in recipe.mimic:
        if not _MIMIC.fullmatch(text) or ("->" not in text and text != "logits"):
            return f"{text!r} is neither logits nor 'student module -> teacher module'"
        ours, theirs, number = mimic_parts(text)
        if (ours == "logits") != (theirs == "logits"):
            return f"{text!r} compares logits with a module; say logits -> logits"
        if number and number > len(recipe.teacher):
            return f"{text!r} names teacher {number} of {len(recipe.teacher)}"
    return False


def mimic_parts(text: str) -> tuple[str, str, int | None]:
    """Student's module, teacher's module, and the teacher's number from 1, None for all."""
    ours, _, theirs = text.partition(" -> ")
    number, colon, module = (theirs or ours).rpartition(":")
    return ours, module, int(number.removeprefix("teacher")) if colon else None


def on_logits(text: str) -> bool:
    """Whether a mimic compares logits, not modules."""
    return mimic_parts(text)[0] == "logits"


def one_each(values: list, count: int) -> list:
    """One value for all, as one for each."""
    return values * count if len(values) == 1 else values


def mixes(recipe: Any) -> bool:
    """Whether labels come mixed, by Mixup or CutMix."""
    return recipe.mixup_alpha > 0 or recipe.cutmix_alpha > 0


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str | list | tuple)


def _assigned(source: str) -> list[str]:
    targets = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign):
            targets += [name.id for name in node.targets if isinstance(name, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            targets.append(node.target.id)
    return list(dict.fromkeys(targets))


def _yaml(value: Any) -> str:
    """One YAML value on one line that every YAML 1.1 reader takes for what it is."""
    if isinstance(value, float):
        return repr(value) if "." in repr(value) else _dotted(value)
    if isinstance(value, list):
        return "[" + ", ".join(_yaml(item) for item in value) + "]"
    # JSON is YAML but for these control characters, which YAML takes escaped only.
    escape = lambda match: f"\\x{ord(match[0]):02x}"
    return re.sub("[\x7f-\x9f]", escape, json.dumps(value, ensure_ascii=False))


def _dotted(value: float) -> str:
    """5e-05 as 5.0e-05: without the dot YAML 1.1 reads text."""
    assert math.isfinite(value)
    mantissa, _, exponent = repr(value).partition("e")
    sign = "" if exponent[:1] in ("-", "+") else "+"
    return f"{mantissa}.0e{sign}{exponent}" if exponent else f"{mantissa}.0"


def _python(value: Any) -> str:
    return json.dumps(value) if isinstance(value, str) else repr(value)
