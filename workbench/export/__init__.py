"""The deployment package of a run: ONNX, optionally int8, and the report that it answers alike.

    path = package("runs/mine-seed0", "packages", int8=True)     # mine_1.0.0.tar
    check(path)                                                  # one that came from elsewhere

A package is a plain tar. The names and fields of parameters.json, category_param.json and meta.json
are those of United Perception's `to_kestrel` for classifiers, with what it left out: resize and
crop, hashes, the recipe, and the accuracy on the whole validation list.
"""

import contextlib
import hashlib
import io
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from torch import nn

from workbench import augmentation, consumer, data, models, runs, training
from workbench.data import images
from workbench.evaluation import statistics
from workbench.progress import bar
from workbench.recipe import Recipe, RecipeError, runtime_only

FORMAT = 1  # of the package; a reader refuses a higher one
OPSET = 20
PLACES = "data_dir train_list train_root val_list val_root class_names verify_data".split()
TIE = 1e-3  # logits: an answer ahead of the next by less is no answer to defend
LARGEST = 4 * 2**30  # bytes of a whole package
CALIBRATION = 512  # training images that the ranges of int8 come from
SAMPLE = 64  # validation images that the predict.py of a package is run on
PROBES = 2  # images of noise whose logits go with the package


class ExportError(RuntimeError):
    """A run cannot be packed, or its package answers otherwise; the text says what to do."""


class PackageError(ValueError):
    """A package is not what it says; all that is wrong with it, a line each."""

    def __init__(self, path: str | Path, problems: list[str]):
        self.problems = problems
        super().__init__(f"{path} is no sound package\n" + "\n".join(f"  - {p}" for p in problems))


# ---- what the files of a package say


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


Three = Annotated[list[float], Field(min_length=3, max_length=3)]


class Preprocess(_Part):
    """From an image file to the network's input, in this order."""

    resize: int = Field(ge=8, le=8192, description="pixels, short side")
    size: int = Field(ge=8, le=4096, description="pixels, side of the square centre crop")
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]
    mean: Three = Field(description="RGB, 0 to 1, subtracted")
    std: Three = Field(description="RGB, 0 to 1, divided by")
    normalised_inside: bool = Field(description="the network takes uint8 and normalises itself")


def preprocess(recipe: Recipe, pixels: bool = False) -> Preprocess:
    """What a recipe's validation does to an image; with `pixels` the network normalises."""
    seen = training.eval_transform(recipe)
    kept = {key: getattr(seen, key) for key in ("resize", "size", "interpolation")}
    kept |= {"mean": list(recipe.mean), "std": list(recipe.std)}
    return Preprocess(**kept, normalised_inside=pixels)


class Meta(_Part):
    """meta.json."""

    format: int = Field(ge=1, le=FORMAT)
    model_name: str = Field(pattern=r"^[\w.-]+$", max_length=200)
    version: str = Field(pattern=r"^[\w.-]+$", max_length=50)
    toks_type: Literal["cls"]
    plugin: str = Field(pattern=r"^[\w-]+$")
    model: str = Field(description="timm's name")
    weights: Literal["raw", "ema"]
    classes: list[str] = Field(min_length=2)
    preprocess: Preprocess
    opset: int
    probe: list[list[float]] = Field(description="logits of PROBES images of Network.noise")
    made: dict[str, Any] = Field(description="run, fingerprints of recipe and data, versions")


class Net(_Part):
    """The network of parameters.json."""

    net: str
    backend: str
    max_batch_size: int = Field(ge=1)
    input: dict[str, str]
    output: dict[str, str]


class Parameters(_Part):
    """parameters.json, as to_kestrel writes it; means and stds on the scale of 0 to 255."""

    model_files: dict[Literal["net"], Net]
    input_h: int
    input_w: int
    pixel_means: Three
    pixel_stds: Three
    is_rgb: Literal[True]
    type: str
    save_all_label: bool
    support_labels: Any = None


class Category(_Part):
    """One entry of category_param.json: a stretch of the scores, both ends included."""

    calculator: str
    feature_start: int = Field(ge=0)
    feature_end: int = Field(ge=0)
    labels: list[str]


FORMS = {
    "onnx": "model.onnx", "int8": "model_int8.onnx",
    "whole": "model_whole.onnx", "program": "model.pt2",
}  # fmt: skip
REQUIRED = (  # what a package has to hold; beside it there may be the files of FORMS
    "model.onnx meta.json parameters.json category_param.json parity.json SHA256SUMS predict.py "
    "recipe.yaml README.md flips.csv"
).split()


def schema() -> dict[str, Any]:
    """The JSON schemas of meta.json, parameters.json and an entry of category_param.json."""
    parts = {"meta.json": Meta, "parameters.json": Parameters, "category_param.json": Category}
    return {name: part.model_json_schema() for name, part in parts.items()}


# ---- the network of a run


def trained_model(run: runs.Run, weights: str = "") -> tuple[Recipe, list[str], nn.Module, str]:
    """A run's recipe, class names, model in evaluation mode, weights it has. Raises ExportError."""
    if not run.file("recipe.yaml").exists():
        raise ExportError(f"{run.path} is no run folder; workbench runs lists those there are")
    classes = models.run_classes(run.path)
    if not classes:
        raise ExportError(f"{run.path} names no classes (environment.json); train it first")
    try:
        recipe = Recipe(**run.recipe())
        model, weights, file = training.load_run_model(recipe, run, len(classes), weights)
    except (runs.RunError, RecipeError, models.ModelError) as error:
        raise ExportError(f"{run.path}: {error}") from None
    if file != "last.pt":
        raise ExportError(f"{run.path} has lost last.pt: its last epoch cannot be packed")
    return recipe, classes, model, weights


def newest(root: str | Path) -> runs.Run:
    """The run below `root` that finished last of those that can be packed. Raises ExportError."""
    found = runs.finished(root)
    for run in sorted(found, key=lambda run: run.file("status.json").stat().st_mtime, reverse=True):
        with contextlib.suppress(ExportError, data.DataError, OSError):
            recipe, classes, *_ = trained_model(run)
            if data.load_dataset(recipe).classes == classes and re.fullmatch(
                r"[\w.-]+", recipe.name
            ):
                return run
    raise ExportError(f"no finished run in {root} can be packed; make demo trains one")


class Network(nn.Module):
    """A model with what belongs to its package: (score, logits), from pixels where asked.

    score is the softmax of the logits, applied here once; both are float32 (n, classes).
    """

    def __init__(self, model: nn.Module, seen: Preprocess):
        super().__init__()
        self.model, self.pixels, self.size = model, seen.normalised_inside, seen.size
        for name in ("mean", "std"):
            value = torch.tensor(getattr(seen, name)).mul(255).reshape(1, 3, 1, 1)
            self.register_buffer(name, value, persistent=False)

    def forward(self, data: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.pixels:
            data = (data.float() - self.mean) / self.std
        logits = self.model(data)
        return logits.softmax(1), logits

    def noise(self, count: int) -> torch.Tensor:
        """uint8 images of noise, always the same."""
        rng = np.random.default_rng(0)
        shape = (count, 3, self.size, self.size)
        return torch.from_numpy(rng.integers(0, 256, shape, dtype=np.uint8))

    def feed(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 (n, 3, size, size) as the input of this network."""
        return pixels if self.pixels else (pixels.float() - self.mean) / self.std


class Whole(nn.Module):
    """A network from decoded images, uint8 (n, 3, height, width) of any one size.

    Resizes and crops as Pillow does to one grey level. Bilinear and bicubic alone.
    """

    def __init__(self, network: Network, seen: Preprocess):
        super().__init__()
        self.network, self.seen = network, seen

    def forward(self, data: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen = self.seen
        height, width = data.shape[-2:]
        short = torch.sym_min(height, width)
        shape = (seen.resize * height // short, seen.resize * width // short)
        how = {"mode": seen.interpolation, "antialias": True, "align_corners": False}
        pixels = data.float()
        for size in ((height, shape[1]), shape):  # rows first, in whole grey levels, as Pillow
            pixels = nn.functional.interpolate(pixels, size=size, **how).round().clamp(0, 255)
        for axis, side in zip((-2, -1), shape, strict=True):
            pixels = pixels.narrow(axis, _middle(side - seen.size), seen.size)
        pixels = pixels.reshape(-1, 3, seen.size, seen.size)  # tells the exporter what is known
        return self.network(pixels if self.network.pixels else self.network.feed(pixels))


def _middle(left_over: int) -> int:
    """Half of it as Python rounds, to even, in whole numbers: so torchvision crops the centre."""
    half = left_over // 2
    return half + (left_over % 2) * (half % 2)


def to_onnx(network: Network) -> bytes:
    """The network as an ONNX file, weights inside: input `data`, outputs `score` and `logits`.

    For any batch size, by torch's dynamo exporter. Raises ExportError.
    """
    return _onnx(network, network.feed(network.noise(2)), {0: "batch"})


def to_whole(network: Network, seen: Preprocess) -> bytes:
    """As to_onnx, of Whole: any batch size, height and width. Raises ExportError."""
    if seen.interpolation not in ("bilinear", "bicubic"):
        raise ExportError(f"{seen.interpolation} has no form inside ONNX; train with bilinear")
    images = torch.zeros(2, 3, seen.resize + 8, seen.resize + 24, dtype=torch.uint8)
    return _onnx(Whole(network, seen).eval(), images, {0: "batch", 2: "height", 3: "width"})


def _traced(network: nn.Module, feed: torch.Tensor, dynamic: Mapping[int, str]) -> Any:
    limits = {"batch": {}, "height": {"min": 4, "max": 2**15}, "width": {"min": 4, "max": 2**15}}
    shapes = {axis: torch.export.Dim(name, **limits[name]) for axis, name in dynamic.items()}
    return torch.export.export(network, (feed,), dynamic_shapes=(shapes,), strict=False)


def _onnx(network: nn.Module, feed: torch.Tensor, dynamic: Mapping[int, str]) -> bytes:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporter about its own parts
            program = torch.onnx.export(
                _traced(network, feed, dynamic),
                dynamo=True,
                input_names=["data"],
                output_names=["score", "logits"],
                dynamic_shapes=(dict(dynamic),),  # gives the axes their names
                opset_version=OPSET,
                verbose=False,
            )
            content = program.model_proto.SerializeToString()
    except Exception as error:
        first = str(error).strip().split("\n")[0][:300]
        raise ExportError(f"torch cannot export this model to ONNX: {first}") from None
    if len(content) >= 2**31:
        raise ExportError(f"{len(content):,} bytes: ONNX files end at 2 GiB with weights inside")
    return content


def to_program(network: Network) -> bytes:
    """The network as a file that torch.export.load reads, any batch size."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(_traced(network, network.feed(network.noise(2)), {0: "batch"}), buffer)
    return buffer.getvalue()


QUANTISED = ("QLinearConv", "QGemm", "QLinearMatMul", "ConvInteger", "MatMulInteger")


def to_int8(plain: bytes, feeds: list[np.ndarray]) -> tuple[bytes, dict[str, int]]:
    """An ONNX file in int8, and how many nodes of a kind really compute in it.

    onnxruntime's static quantisation: ranges from `feeds` (inputs as the network takes them),
    weights per channel, from -64 to 64. x86-64 without VNNI adds two products in 16 bits:
    2 * 255 * 64 = 32640 fits, 2 * 255 * 127 = 64770 would be cut at 32767. So integer sums are the
    same on every processor. Raises ExportError where nothing was quantised.
    """
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):
        left = iter(feeds)

        def get_next(self):
            return next(({"data": feed} for feed in self.left), None)

    with tempfile.TemporaryDirectory() as folder:
        given, ready, small, computed = (f"{folder}/{name}.onnx" for name in "abcd")
        Path(given).write_bytes(plain)
        quant_pre_process(given, ready, skip_symbolic_shape=True)
        quantization.quantize_static(
            ready,
            small,
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "Gemm", "MatMul", "Add", "MaxPool", "Relu", "Clip"],
            per_channel=True,
            reduce_range=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
        )
        content = Path(small).read_bytes()
        session(content, optimised=computed)
        nodes = Counter(node.op_type for node in onnx.load(computed).graph.node)
    found = {name: nodes[name] for name in QUANTISED if nodes[name]}
    if not found:
        raise ExportError(f"no node computes in int8 after quantisation: {dict(nodes)}")
    return content, found


def session(content: bytes, threads: int = 0, optimised: str = "") -> Any:
    """An onnxruntime session on the CPU; `threads` 0 is as many as torch uses.

    Bytes, not a path: a model that names files beside itself is refused. What is really computed
    goes into the file `optimised`.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.log_severity_level = 3
    if optimised:
        options.optimized_model_filepath = optimised
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


TeacherOutput = Callable[
    [torch.Tensor], np.ndarray
]  # an input of the network -> logits (n, classes)


def _answers(network: Network, files: Mapping[str, bytes]) -> dict[str, TeacherOutput]:
    """Every form of the network there is, by name, torch's eager one first."""

    def eager(feed: torch.Tensor) -> np.ndarray:
        with torch.no_grad():
            return network(feed)[1].numpy()

    answers: dict[str, TeacherOutput] = {"torch": eager}
    for form in ("onnx", "int8"):
        if FORMS[form] in files:
            answers[form] = _runner(session(files[FORMS[form]]))
    if "model.pt2" in files:
        program = torch.export.load(io.BytesIO(files["model.pt2"])).module()
        answers["program"] = lambda feed: program(feed)[1].detach().numpy()
    return answers


def _runner(its: Any) -> TeacherOutput:
    return lambda feed: its.run(["logits"], {"data": feed.numpy()})[0]


# ---- parity


def parity(
    answers: Mapping[str, TeacherOutput],
    network: Network,
    batches: Any,
    total: int,
    seconds: float = 1.0,
    whole: Callable[[int], np.ndarray] | None = None,
) -> tuple[dict[str, Any], pd.DataFrame]:
    """How each form answers the whole validation list beside the first, and every flip.

    `whole` gives the logits of the form that takes the image of a row as it was decoded. The report
    has by form: top1 in percent, flips (other predictions), ties (flips where the first was within
    TIE logits of the other class), largest and mean difference of the logits, and the paired
    difference of top-1 in points with its 95 % interval and McNemar's p. A row of the frame: row,
    label, form, before, after, margin in logits.
    """
    names = [*answers, *(["whole"] if whole else [])]
    first, right, flips = names[0], {name: [] for name in names}, []
    largest, summed, count = Counter(), Counter(), 0
    with bar(total, "parity", "img") as progress:
        for batch in batches:
            progress.update(len(batch.images) + len(batch.failures))
            if not len(batch.images):
                continue
            feed = network.feed(batch.images)
            logits = {name: answer(feed) for name, answer in answers.items()}
            if whole:
                logits["whole"] = np.concatenate([whole(row) for row in batch.indices.tolist()])
            reference, label, rows = logits[first], batch.labels.numpy(), batch.indices.tolist()
            ours = reference.argmax(1)
            count += reference.size
            for name, its in logits.items():
                if not np.isfinite(its).all():
                    raise ExportError(f"{name} answers nan or infinity; the package is of no use")
                gap, theirs = np.abs(its - reference), its.argmax(1)
                largest[name] = max(largest[name], float(gap.max()))
                summed[name] += float(gap.sum(dtype=np.float64))
                right[name].append(theirs == label)
                for i in np.flatnonzero(theirs != ours).tolist():
                    margin = float(reference[i, ours[i]] - reference[i, theirs[i]])
                    flips.append((rows[i], label[i], name, ours[i], theirs[i], margin))
    if not count:
        raise ExportError("no validation image could be read: there is nothing to compare on")
    flips = pd.DataFrame(flips, columns=["row", "label", "form", "before", "after", "margin"])
    report = {"images": len(np.concatenate(right[first])), "forms": {}}
    for name in names:
        its = flips[flips.form == name]
        before, after = (np.concatenate(right[form])[None] for form in (first, name))
        found = statistics.difference(before, after)
        report["forms"][name] = {
            "top1": 100 * float(after.mean()),
            "flips": len(its),
            "ties": int((its.margin < TIE).sum()),
            "largest": largest[name],
            "mean": summed[name] / count,
            "difference": {"points": found.points, "low": found.low, "high": found.high},
            "p": found.p,
            "latency": latency(answers[name], network, seconds) if name in answers else {},
        }
    return report, flips


def latency(answer: TeacherOutput, network: Network, seconds: float = 1.0) -> dict[str, Any]:
    """Milliseconds a call takes by batch size, 1 and 32: median, p95, over about `seconds` each."""
    found = {}
    for batch in (1, 32):
        feed = network.feed(network.noise(batch))
        answer(feed)
        times: list[float] = []
        while len(times) < 5 or (sum(times) < seconds and len(times) < 200):
            start = time.perf_counter()
            answer(feed)
            times.append(time.perf_counter() - start)
        median, p95 = np.quantile(times, [0.5, 0.95]) * 1000
        found[str(batch)] = {"median": float(median), "p95": float(p95), "calls": len(times)}
    return found


def script(
    files: Mapping[str, bytes],
    meta: Mapping[str, Any],
    frame: pd.DataFrame,
    see: augmentation.EvalTransform,
    network: Network,
    answers: Mapping[str, TeacherOutput],
) -> dict[str, Any]:
    """By form, how far the probabilities that predict.py prints are from those of this process.

    `largest` is 1 where it prints an error. Raises ExportError where it crashes.
    """
    [batch] = data.eval_loader(frame, see, batch_size=len(frame))
    paths, feed = frame.path.iloc[batch.indices.numpy()], network.feed(batch.images)
    report, shipped = {}, {**files, "meta.json": json.dumps(meta).encode()}
    with tempfile.TemporaryDirectory() as folder:
        for file, content in shipped.items():
            (Path(folder) / file).write_bytes(content)
        for form in (form for form in ("onnx", "int8") if FORMS[form] in files):
            command = [sys.executable, f"{folder}/predict.py", FORMS[form], *paths]
            done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
            lines = [line.rsplit("\t", 2)[1:] for line in done.stdout.split("\n")[:-1]]
            if len(lines) != len(paths):
                last = done.stderr.strip().split("\n")[-1]
                raise ExportError(f"predict.py of the package crashes: {last}")
            score = torch.from_numpy(answers[form](feed)).softmax(1).numpy()
            apart = [  # for the class that is printed, since ties may fall otherwise
                abs(float(p) - float(its[meta["classes"].index(name)])) if name else 1.0
                for its, (name, p) in zip(score, lines, strict=True)
            ]
            report[form] = {"images": len(paths), "largest": max(apart, default=0.0)}
    return report


def over_budget(report: Mapping[str, Any], flips: int) -> list[str]:
    """What a parity report says against shipping, a sentence each."""
    problems = []
    for name, its in report["forms"].items():
        other = its["flips"] - its["ties"]
        if name not in ("int8", "whole") and other > flips:
            problems.append(f"{name} answers {other} images otherwise beyond ties, not {flips}")
    for name, its in report["script"].items():
        if (off := its["largest"]) > TIE:
            problems.append(f"predict.py with {name} is off by a probability of {off:.2g}")
    return problems


def lossy(report: Mapping[str, Any], int8_points: float) -> dict[str, str]:
    """The forms that lose more than `int8_points`, as their intervals show, and a sentence each."""
    found = {}
    for name in ("int8", "whole"):  # these round otherwise than torch
        lost = report["forms"].get(name, {}).get("difference")
        if lost and lost["high"] < -int8_points:
            points, low, high = (-lost[key] for key in ("points", "high", "low"))
            interval = f"95 % interval {low:.2f} to {high:.2f}"
            found[name] = (
                f"{name} loses {points:.2f} points ({interval}), the budget is {int8_points}"
            )
    return found


# ---- the package


def package(
    run: str | Path,
    out: str | Path = "packages",
    *,
    name: str = "",
    version: str = "",
    weights: str = "",
    pixels: bool = False,
    int8: bool = False,
    whole: bool = False,
    program: bool = False,
    kestrel: Mapping[str, Any] | None = None,
    int8_points: float = 0.5,
    seconds: float = 1.0,
    **overrides: Any,
) -> Path:
    """Packs a run as `<name>_<version>.tar` in the folder `out`, and returns its path.

    By default name and version are those of the `to_kestrel` block `kestrel`, else the run's and
    1.0.0. With `pixels` the network takes uint8 and normalises itself. `int8` adds a network
    quantised on training images, `whole` one that resizes and crops too, `program` one for
    torch.export.load. Where a form or predict.py differs on a validation image, ties aside,
    ExportError is raised and only the report is written; int8 and whole are left out where their
    interval shows that they lose more than `int8_points`. `overrides` are options of PLACES.
    """
    run, kestrel = runs.Run(run), kestrel or {}
    recipe, classes, model, weights = trained_model(run, weights)
    name = name or kestrel.get("model_name") or recipe.name
    version = version or str(kestrel.get("version", "1.0.0"))
    for what, text in (("name", name), ("version", version)):
        if not re.fullmatch(r"[\w.-]+", text):
            raise ExportError(f"{what} {text!r}: letters, digits, dots, dashes and _ alone")
    seen = preprocess(recipe, pixels)
    size = seen.size
    if (hw := kestrel.get("resize_hw", [size, size])) != [size, size]:
        raise ExportError(f"resize_hw is {hw}, the run sees {size} x {size} pixels; leave it out")
    meta = {
        "format": FORMAT, "model_name": name, "version": version, "toks_type": "cls",
        "plugin": kestrel.get("plugin", "classifier"), "model": recipe.model, "weights": weights,
        "classes": classes, "opset": OPSET, "preprocess": seen.model_dump(),
    }  # fmt: skip
    categories = _categories(kestrel, classes)
    if (state := run.status()["state"]) != "finished":
        raise ExportError(f"{run.path} is {state}; train it to its end, then pack it")
    environment = run.environment()
    train, val, known = _lists(recipe, overrides, classes, run.path, environment.get("val_data"))
    out, stem = Path(out), f"{name}_{version}"
    _place(out, stem)
    network = Network(model, seen).eval()
    files = {"model.onnx": to_onnx(network), "predict.py": Path(consumer.__file__).read_bytes()}
    quantised = {}
    if int8:
        feeds = [f.numpy() for f in _calibration(network, recipe, train, CALIBRATION)]
        files["model_int8.onnx"], quantised = to_int8(files["model.onnx"], feeds)
    if program:
        files["model.pt2"] = to_program(network)
    if whole:
        files["model_whole.onnx"] = to_whole(network, seen)
    answers, see = _answers(network, files), training.eval_transform(recipe)
    batches = data.eval_loader(val, see, batch_size=64)
    entire = None
    if whole:
        decoded = _runner(session(files["model_whole.onnx"]))
        entire = lambda row: _entire(decoded, val.path.iloc[row])
    report, flipped = parity(answers, network, batches, len(val), seconds, entire)
    flipped = val[["file", "list"]].iloc[flipped.row].reset_index(drop=True).join(flipped)
    report |= {
        "weights": weights, "data": known, "quantised": quantised,
        "bytes": {file: len(its) for file, its in files.items()},
        "threads": torch.get_num_threads(), "device": training.processor(),
        "budget": {"flips": 0, "int8_points": int8_points},
    }  # fmt: skip
    report["run"] = _beside_the_run(run, weights)
    report["left_out"] = lossy(report, int8_points)
    for form in report["left_out"]:
        del files[FORMS[form]]
    report["script"] = script(files, meta, _spread(val, SAMPLE), see, network, answers)
    report["problems"] = over_budget(report, 0)
    if report["problems"]:
        beside = out / f"{stem}.parity.json"
        beside.write_text(json.dumps(report, indent=2) + "\n")
        flipped.to_csv(out / f"{stem}.flips.csv", index=False)
        raise ExportError(f"{'; '.join(report['problems'])}. No package; the report is {beside}")
    with torch.no_grad():
        meta["probe"] = network(network.feed(network.noise(PROBES)))[1].tolist()
    meta["made"] = {
        "run": run.path.name, "recipe": recipe.fingerprint, "data": known,
        "torch": torch.__version__, "workbench": environment.get("commit"),
    }  # fmt: skip
    texts = {
        "meta.json": _json(Meta, meta),
        "parameters.json": _json(Parameters, _parameters(meta, kestrel)),
        "category_param.json": json.dumps(categories, indent=2, ensure_ascii=False) + "\n",
        "parity.json": json.dumps(report, indent=2) + "\n",
        "recipe.yaml": recipe.yaml(
            k for k in recipe.non_default() if k == "name" or k not in runtime_only
        ),
        "flips.csv": flipped.to_csv(index=False),
        "README.md": card(Meta(**meta), report, recipe, environment),
    }
    files |= {file: text.encode() for file, text in texts.items()}
    return _packed(out / f"{stem}.tar", files)


def _lists(
    recipe: Recipe, overrides: Mapping[str, Any], classes: list[str], of: Path, then: str | None
) -> tuple[pd.DataFrame, pd.DataFrame, str]:
    """Both lists of `of` where they lie now, and validation's fingerprint. Raises ExportError."""
    if strange := ", ".join(sorted(set(overrides) - set(PLACES))):
        allowed = ", ".join(PLACES)
        raise ExportError(f"{strange} would change what the run was; allowed are {allowed}")
    try:
        recipe = recipe.replace(**overrides)
    except RecipeError as error:
        raise ExportError(str(error)) from None
    content = data.load_dataset(recipe)
    if content.classes != classes:
        raise ExportError(
            f"the data has {len(content.classes)} classes, {of} was trained for "
            f"{len(classes)}, or others in another order"
        )
    val = content.val
    if recipe.verify_data:
        val, _ = data.drop_corrupt(data.verify_images(val), "val")
    known = data.fingerprint(data.Dataset(val.iloc[:0], val, classes))
    if then and known != then:
        changed = f"the validation images have changed since {of} was trained"
        raise ExportError(f"{changed} (fingerprint {then}, now {known}); put them back")
    return content.train, val, known


def _place(out: Path, stem: str) -> None:
    """Makes the folder; raises ExportError, before any work, where no package can be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        for leftover in ("parity.json", "flips.csv"):  # of an earlier try that failed
            (out / f"{stem}.{leftover}").unlink(missing_ok=True)
    except OSError as error:
        raise ExportError(f"cannot write {out}: {error.strerror}; choose another out") from None
    if (path := out / f"{stem}.tar").exists():
        raise ExportError(f"{path} exists and is not replaced; give this one another version")


def _parameters(meta: Mapping[str, Any], kestrel: Mapping[str, Any]) -> dict[str, Any]:
    """Means and stds from the recipe, 0 and 1 where the network normalises itself."""
    seen = meta["preprocess"]
    inside = seen["normalised_inside"]
    net = {
        "net": "model.onnx", "backend": "kestrel_nart", "max_batch_size": 8,
        "input": {"data": "data"}, "output": {"score": "score"},
    }  # fmt: skip
    return {
        "model_files": {"net": net}, "input_h": seen["size"], "input_w": seen["size"],
        "pixel_means": [0.0] * 3 if inside else [round(255 * x, 6) for x in seen["mean"]],
        "pixel_stds": [1.0] * 3 if inside else [round(255 * x, 6) for x in seen["std"]],
        "is_rgb": True, "type": kestrel.get("type", "UNKNOWN"),
        "save_all_label": kestrel.get("save_all_label", True),
        "support_labels": kestrel.get("support_labels"),
    }  # fmt: skip


def _categories(kestrel: Mapping[str, Any], classes: list[str]) -> dict[str, Any]:
    """category_param.json: one category of all classes, or those of the block, one after another.

    Raises ExportError where the block's labels are not as many as the scores, or it holds more
    than labels and a calculator.
    """
    wanted = kestrel.get("class_label") or {"classes": {"labels": classes}}
    found, start = {}, 0
    labels = [str(label) for its in wanted.values() for label in its["labels"]]
    if labels != classes and sorted(labels) == sorted(classes):
        raise ExportError(
            f"class_label names the classes of the run in another order, first {labels[:4]} for "
            f"{classes[:4]}; put them in the order of the run"
        )
    for name, its in wanted.items():
        if strange := sorted(set(its) - {"labels", "calculator"}):
            raise ExportError(f"class_label.{name}: {', '.join(strange)} cannot be packed")
        labels = [str(label) for label in its["labels"]]
        end = start + len(labels) - 1
        entry = Category(
            calculator=its.get("calculator", "bypass"),
            feature_start=start, feature_end=end, labels=labels,
        )  # fmt: skip
        found[name], start = entry.model_dump(), end + 1
    if start != len(classes):
        raise ExportError(
            f"class_label names {start} labels, the network has {len(classes)} scores"
        )
    return found


def _entire(answer: TeacherOutput, path: str) -> np.ndarray:
    """The logits of an image as it was decoded, by a network that takes it whole."""
    return answer(torch.from_numpy(np.array(images.decode(path))).permute(2, 0, 1)[None])


def _calibration(
    network: Network, recipe: Recipe, train: pd.DataFrame, count: int
) -> Iterator[torch.Tensor]:
    """Inputs from training images as validation sees them, evenly over the list."""
    frame, see = _spread(train, count), training.eval_transform(recipe)
    for batch in data.eval_loader(frame, see, batch_size=32):
        if len(batch.images):
            yield network.feed(batch.images)


def _spread(frame: pd.DataFrame, count: int) -> pd.DataFrame:
    """At most `count` rows, evenly over the frame."""
    rows = np.unique(np.linspace(0, len(frame) - 1, min(count, len(frame))).astype(int))
    return frame.iloc[rows].reset_index(drop=True)


def _beside_the_run(run: runs.Run, weights: str) -> dict[str, Any]:
    """The run's own top-1 beside that of these weights on this machine now."""
    with contextlib.suppress(runs.RunError):
        if len(own := run.predictions(weights)):
            top1 = 100 * float((own.class1 == own.label).mean())
            return {"top1": top1, "images": len(own)}
    return {"top1": None, "images": 0}


def _json(part: type[_Part], values: Mapping[str, Any]) -> str:
    """As a reader will check it, so that no package is refused by its own check."""
    try:
        return part(**values).model_dump_json(indent=2) + "\n"
    except ValidationError as error:
        raise ExportError("; ".join(_sentences(error))) from None


def _sentences(error: ValidationError) -> list[str]:
    return [f"{'.'.join(map(str, e['loc']))}: {e['msg'].lower()}" for e in error.errors()]


def _packed(path: Path, files: Mapping[str, bytes]) -> Path:
    """Writes the tar with SHA256SUMS, as `sha256sum -c` reads it; no half file is ever there."""
    sums = "".join(f"{hashlib.sha256(its).hexdigest()}  {file}\n" for file, its in files.items())
    try:
        with runs.atomic_write(path) as temporary, tarfile.open(temporary, "w") as tar:
            for file, its in {**files, "SHA256SUMS": sums.encode()}.items():
                member = tarfile.TarInfo(file)
                member.size, member.mtime = len(its), int(time.time())
                tar.addfile(member, io.BytesIO(its))
    except OSError as error:
        raise ExportError(f"{path} was not written: {error.strerror}") from None
    return path


def card(meta: Meta, report: Mapping[str, Any], recipe: Recipe, environment: Mapping) -> str:
    """The model card, README.md of the package, in the form the Hugging Face hub reads.

    `environment` is that of the training.
    """
    leaks, empty = environment.get("train_val_duplicates"), environment.get("empty_classes")
    forms, n = report["forms"], report["images"]
    top1 = forms["torch"]["top1"]
    low, high = statistics.wilson(round(top1 * n / 100), n)
    lines = [
        "---", 'library_name: "onnx"', 'pipeline_tag: "image-classification"',
        f'tags: ["image-classification", {json.dumps(meta.model)}]',
        "model-index:", f"- name: {meta.model_name}", "  results:",
        "  - task: {type: image-classification}",
        f"    dataset: {{name: validation list {report['data']}, type: {recipe.dataset}}}",
        f"    metrics: [{{type: accuracy, value: {top1:.2f}}}]", "---", "",
        f"# {meta.model_name} {meta.version}", "",
        f"A {meta.model} that tells {len(meta.classes)} classes apart: "
        f"{', '.join(meta.classes[:12])}{' and so on' if len(meta.classes) > 12 else ''}.", "",
        f"Trained by the recipe in `recipe.yaml` ({recipe.epochs} epochs, "
        f"{environment['train_images']:,} images, "
        f"fingerprint {recipe.fingerprint}); {meta.weights} weights of the last epoch.", "",
        f"**Top-1 {top1:.2f} %** (95 % interval {100 * low:.2f} to "
        f"{100 * high:.2f}, n={n:,}, validation list {report['data']}).", "",
        "| form | top-1 | other answers | largest difference of a logit | ms at batch 1, 32 |",
        "|---|---|---|---|---|",
    ]  # fmt: skip
    for name, its in forms.items():
        ms = ", ".join(f"{ms['median']:.2f}" for ms in its["latency"].values())
        flips = f"{its['flips']} ({its['ties']} ties)" if its["ties"] else its["flips"]
        lines.append(f"| {name} | {its['top1']:.2f} | {flips} | {its['largest']:.2g} | {ms} |")
    lines += ["", *(f"Not in the package: {text}." for text in report["left_out"].values())]
    seen, kept = meta.preprocess, forms.keys() - report["left_out"].keys()
    given = "uint8, 0 to 255" if seen.normalised_inside else (
        "0 to 255 less `pixel_means`, over `pixel_stds` of parameters.json, float32")  # fmt: skip
    others = {
        "int8": "`model_int8.onnx` takes and gives the same in int8: `python predict.py "
        "model_int8.onnx IMAGE ...`. Its weights have 7 bits: so its integer sums are exact, and "
        "the same, on processors with VNNI and without.",
        "whole": "`model_whole.onnx` takes decoded RGB images of any one size, uint8 "
        "(n, 3, height, width), and resizes and crops itself.",
        "program": "`model.pt2` is for `torch.export.load`.",
    }
    lines += [
        "", f"Measured on {report['device']}, {report['threads']} threads.", "",
        "## Use", "",
        f"`python predict.py IMAGE ...` needs onnxruntime and Pillow. Short side to "
        f"{seen.resize} pixels ({seen.interpolation}), the centre {seen.size} x {seen.size}, RGB, "
        f"{given}: input `data` (n, 3, {seen.size}, {seen.size}), outputs `score` (a softmax) and "
        "`logits`.", "", *(text for form, text in others.items() if form in kept), "",
        "## Limits", "", "It answers one of its classes for any image, also for one that shows "
        "none of them. Its accuracy is that on images like those of the validation list; on "
        "others it was not measured.",
        *([f"{leaks:,} of the validation images were in training too."] if leaks else []),
        *([f"Without a training image: {', '.join(empty[:12])}."] if empty else []), "",
    ]  # fmt: skip
    return "\n".join(lines)


def read_report(path: str | Path) -> dict[str, Any]:
    """parity.json of a package, or of the file that a failed export left. Raises PackageError."""
    path = Path(path)
    content = path.read_bytes() if path.suffix == ".json" else _read(path).get("parity.json", b"")
    try:
        return dict(json.loads(content))
    except ValueError as error:
        raise PackageError(path, [f"parity.json: {error}"]) from None


def table(report: Mapping[str, Any]) -> pd.DataFrame:
    """A parity report as a table, a row per form: points are its top-1 less torch's."""
    rows = {}
    for name, its in report["forms"].items():
        rows[name] = {key: its[key] for key in ("top1", "flips", "ties", "largest", "mean")}
        rows[name] |= {"points": its["difference"]["points"], "p": its["p"]}
        rows[name] |= {f"ms, batch {b}": ms["median"] for b, ms in its["latency"].items()}
        rows[name]["MB"] = report["bytes"].get(FORMS.get(name), float("nan")) / 1e6
    return pd.DataFrame.from_dict(rows, "index")


# ---- a package from elsewhere


class Package:
    """A checked package: called with uint8 images (n, 3, size, size) it gives logits, float32."""

    def __init__(self, files: Mapping[str, bytes], form: str = "onnx"):
        self.meta = Meta(**json.loads(files["meta.json"]))
        self.classes, seen = self.meta.classes, self.meta.preprocess
        self.transform = augmentation.EvalTransform(seen.size, seen.resize, seen.interpolation)
        network = files[FORMS[form]]
        self.fingerprint = hashlib.sha256(network).hexdigest()[:12]
        self._answer = _runner(session(network))
        self._network = Network(nn.Identity(), seen)

    def __str__(self) -> str:
        its = self.meta
        return f"{its.model_name} {its.version}, {its.model}, {its.weights} weights"

    def __call__(self, pixels: torch.Tensor) -> np.ndarray:
        return self._answer(self._network.feed(pixels))


def load(path: str | Path, form: str = "onnx") -> Package:
    """A package for prediction, checked first; `form` onnx or int8. Raises PackageError."""
    files = check(path)
    if FORMS[form] not in files:
        raise PackageError(path, [f"it holds no {form} network; export with --{form}"])
    return Package(files, form)


def measure(path: str | Path, seconds: float = 1.0, **overrides: Any) -> dict[str, Any]:
    """The parity report of a package on this machine, its ONNX network first, as `parity` has it.

    `problems` has a sentence for every form whose predictions, ties aside, are others here.
    `overrides` are options of PLACES: where the images lie here. Raises PackageError, ExportError.
    """
    files = check(path)
    packed, meta = read_report(path), Meta(**json.loads(files["meta.json"]))
    recipe = Recipe(**yaml.safe_load(files["recipe.yaml"]))
    network = Network(nn.Identity(), meta.preprocess)
    _, val, _ = _lists(recipe, overrides, meta.classes, Path(path), packed["data"])
    answers = _answers(network, {name: its for name, its in files.items() if name != "model.pt2"})
    del answers["torch"]  # the run's own network is not in the package
    batches = data.eval_loader(val, training.eval_transform(recipe), batch_size=64)
    report, flips = parity(answers, network, batches, len(val), seconds)
    report["bytes"] = packed["bytes"]
    flips = pd.concat([flips, pd.read_csv(io.BytesIO(files["flips.csv"]))])
    # What both machines saw is there twice, and dropped.
    apart = flips[flips.margin >= TIE].drop_duplicates(["form", "row", "after"], keep=False)
    report["problems"] = []
    for form, its in report["forms"].items():
        changed, there = apart[apart.form == form].row.nunique(), packed["forms"][form]["top1"]
        if changed or its["top1"] != there:
            both = f"{its['top1']:.2f} here and {there:.2f} there"
            report["problems"].append(f"{form}: {changed} predictions differ, top-1 {both}")
    return report


def check(path: str | Path) -> dict[str, bytes]:
    """The files of a package, after everything in it was found to agree. Raises PackageError.

    Only a plain tar of the known names is read, into memory; nothing is unpacked, and nothing in
    it is run but the networks, by onnxruntime, on noise.
    """
    path = Path(path)
    files = _read(path)
    if problems := [f"{file} is missing" for file in REQUIRED if file not in files]:
        raise PackageError(path, problems)
    problems = _hashes(files)
    meta = _parsed(Meta, "meta.json", files, problems)
    parameters = _parsed(Parameters, "parameters.json", files, problems)
    categories = _parsed(dict[str, Category], "category_param.json", files, problems)
    if not problems:
        problems = _disagreements(meta, parameters, categories)
    for form in ("onnx", "int8", "whole"):
        if FORMS[form] in files and not problems:
            problems = _network_problems(FORMS[form], files[FORMS[form]], meta)
    if problems:
        raise PackageError(path, problems)
    return files


def _read(path: Path) -> dict[str, bytes]:
    """Members of a plain tar that carry known names, each once; nothing else is accepted."""
    files: dict[str, bytes] = {}
    try:
        if path.stat().st_size > LARGEST:
            raise PackageError(path, [f"over {LARGEST:,} bytes"])
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                name = member.name
                if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
                    raise PackageError(path, [f"{name[:100]!r} is no plain file"])
                if name in files:
                    raise PackageError(path, [f"{name!r} is there twice"])
                if name not in {*REQUIRED, *FORMS.values()}:
                    raise PackageError(path, [f"{name[:100]!r} is no file of a package"])
                files[name] = tar.extractfile(member).read()
                if len(files[name]) != member.size:
                    raise PackageError(path, [f"{name} is cut off: the tar ends in it"])
    except (OSError, tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        if isinstance(error, PackageError):
            raise
        raise PackageError(path, [f"it cannot be read as a tar: {error}"]) from None
    return files


def _hashes(files: Mapping[str, bytes]) -> list[str]:
    lines = files["SHA256SUMS"].decode(errors="replace").splitlines()
    told = {file: digest for digest, _, file in (line.partition("  ") for line in lines)}
    problems = [f"{file[:100]!r} of SHA256SUMS is missing" for file in told if file not in files]
    for file, its in files.items():
        if file != "SHA256SUMS" and told.get(file) != hashlib.sha256(its).hexdigest():
            problems.append(f"{file} is not what SHA256SUMS says: it was changed or damaged")
    return problems


def _parsed(kind: Any, file: str, files: Mapping[str, bytes], problems: list[str]) -> Any:
    try:
        return TypeAdapter(kind).validate_json(files[file])
    except ValidationError as error:
        problems += [f"{file}: {text}" for text in _sentences(error)[:10]]
        return None


def _disagreements(
    meta: Meta, parameters: Parameters, categories: Mapping[str, Category]
) -> list[str]:
    """Where the files of a package tell different stories."""
    problems, seen, start = [], meta.preprocess, 0
    for name, its in categories.items():
        first, last, end = its.feature_start, its.feature_end, start + len(its.labels) - 1
        if (first, last) != (start, end):
            problems.append(f"category {name}: scores {first} to {last}, labels {start} to {end}")
        start = last + 1
    if start != len(meta.classes):
        problems.append(f"categories cover {start} scores, meta.json names {len(meta.classes)}")
    if seen.resize < seen.size:
        problems.append(f"resize {seen.resize} is smaller than the crop of {seen.size}")
    inside = seen.normalised_inside
    for field, ours, plain in (("pixel_means", seen.mean, 0.0), ("pixel_stds", seen.std, 1.0)):
        wanted = [plain] * 3 if inside else [255 * x for x in ours]
        came = getattr(parameters, field)
        if not np.allclose(came, wanted, atol=1e-3):
            problems.append(f"{field} {came} do not fit meta.json, which makes them {wanted}")
    if (parameters.input_h, parameters.input_w) != (seen.size, seen.size):
        problems.append(f"input_h and input_w are not the crop of {seen.size}")
    if parameters.model_files["net"].net != "model.onnx":
        problems.append(f"net is {parameters.model_files['net'].net!r}, not model.onnx")
    if len(meta.probe) != PROBES or any(len(row) != len(meta.classes) for row in meta.probe):
        problems.append(f"probe is not {PROBES} rows of {len(meta.classes)} logits")
    return problems


def _network_problems(file: str, content: bytes, meta: Meta) -> list[str]:
    """What is wrong with a network: that it cannot be run, its shapes, its answers to noise."""
    size = meta.preprocess.size
    whole = file == "model_whole.onnx"
    kind = "tensor(uint8)" if meta.preprocess.normalised_inside or whole else "tensor(float)"
    shape = [3, "height", "width"] if whole else [3, size, size]
    try:
        its = session(content)
        inputs, outputs = its.get_inputs(), [output.name for output in its.get_outputs()]
        told = [(i.name, i.type, list(i.shape[1:])) for i in inputs]
        if told != [("data", kind, shape)] or outputs != ["score", "logits"]:
            wanted = f"data, {kind}, {shape}, and score, logits"
            return [f"{file} takes {told} and gives {outputs}; wanted {wanted}"]
        network = Network(nn.Identity(), meta.preprocess)
        noise = network.noise(PROBES)
        score, logits = its.run(None, {"data": (noise if whole else network.feed(noise)).numpy()})
    except Exception as error:  # onnxruntime has many
        first = str(error).strip().split("\n")[0][:200]
        return [f"onnxruntime cannot run {file}: {first}"]
    wanted = np.array(meta.probe, np.float32)
    if logits.shape != wanted.shape or not np.isfinite(logits).all():
        return [f"{file} answers {logits.shape} logits, or nan; wanted {wanted.shape}"]
    if not np.allclose(score.sum(1), 1, atol=1e-3) or (score < 0).any():
        return [f"the score of {file} is no softmax"]
    apart = float(np.abs(logits - wanted).max())
    allowed = 1e-3 * max(1.0, float(np.abs(wanted).max()))
    if file == "model.onnx" and apart > allowed:
        return [f"{file} answers noise {apart:.2g} away from what was packed, over {allowed:.2g}"]
    return []
