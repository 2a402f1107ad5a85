"""Exports a run as a deployment package, after its networks were compared with PyTorch."""

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from pydantic import ValidationError
from torch import nn

from workbench import data, image_files, models, parts, runs, training
from workbench.data import images
from workbench.export import metadata, onnx, parity
from workbench.export.archive import FORMATS, ExportError, write_tar
from workbench.export.metadata import PROBES, Meta
from workbench.export.onnx import Network
from workbench.recipe import Recipe, RecipeError, runtime_only

DATA_OPTIONS = "data_dir train_list train_root val_list val_root class_names verify_data".split()
CALIBRATION_IMAGES = 512  # of training, for the ranges of int8
SCRIPT_IMAGES = 64  # of validation, for predict.py of the package
FAILURES = (ExportError, runs.RunError, RecipeError, models.ModelError, data.DataError, OSError)
FAILURES += (parts.PartError,)


def trained_model(
    run: runs.Run, weights: str = ""
) -> tuple[Recipe, list[str], nn.Module, str, str]:
    """Recipe, classes, model in evaluation mode, kind of weights and the file they are from.

    The file is last.pt, or best.safetensors if there is none. Raises one of FAILURES.
    """
    recipe, classes = Recipe(**run.recipe()), models.run_classes(run.path)
    if not classes:
        raise ExportError(f"{run.path} has no classes in environment.json; train it first")
    return recipe, classes, *training.load_run_model(recipe, run, len(classes), weights)


def newest(root: str | Path) -> runs.Run:
    """The run in `root` that finished last of those that can be exported. Raises ExportError."""
    time = lambda run: run.file("status.json").stat().st_mtime
    folders = [root, *(file.parent for file in Path(root).glob("*/sweep.yaml"))]
    found = [run for folder in folders for run in runs.finished(folder)]
    for run in sorted(found, key=time, reverse=True):
        with contextlib.suppress(*FAILURES):
            recipe, classes, *_, file = trained_model(run)
            if file == "last.pt" and data.load_dataset(recipe, folder=run.path).classes == classes:
                return run
    raise ExportError(f"no finished run in {root} can be exported; `make demo` trains one")


def default_name(recipe_name: str) -> str:
    """The name of a package of a recipe: "lr=0.3" of a sweep becomes "lr-0.3"."""
    return re.sub(r"[^\w.-]+", "-", recipe_name)


def package(
    run: str | Path,
    out: str | Path = "packages",
    *,
    name: str = "",
    version: str = "",
    weights: str = "",
    uint8_input: bool = False,
    int8: bool = False,
    with_preprocessing: bool = False,
    torch_export: bool = False,
    kestrel: Mapping[str, Any] | None = None,
    int8_points: float = 0.5,
    seconds: float = 1.0,
    dataset: data.Dataset | None = None,
    **overrides: Any,
) -> Path:
    """Writes `<name>_<version>.tar` into the folder `out` and returns its path.

    Name and version default to those of the to_kestrel block `kestrel`, then to the run's and
    1.0.0. With `uint8_input` the network normalises its input. `int8` adds a quantised network,
    `with_preprocessing` one that also resizes and crops, `torch_export` a file for
    torch.export.load. `overrides` are options of DATA_OPTIONS; `dataset` replaces the recipe's.

    Raises ExportError and writes only the report if a prediction of a network, ties aside, or of
    predict.py differs from PyTorch's for a validation image. int8 and with_preprocessing are left
    out if their interval shows a loss above `int8_points` of top-1.
    """
    run, block = runs.Run(run), kestrel or {}
    recipe, classes, model, weights, file = trained_model(run, weights)
    if file != "last.pt" or run.status()["state"] != "finished":
        raise ExportError(f"{run.path} is not finished or has no last.pt; finish its training")
    network = Network(model, metadata.preprocess(recipe, uint8_input)).eval()
    environment = run.environment()
    train, val, val_data = load_lists(
        recipe, overrides, classes, run.path, environment.get("val_data"), dataset
    )
    names = {"model_name": name or block.get("model_name") or default_name(recipe.name)}
    names |= {"version": version or str(block.get("version", "1.0.0"))}
    names |= {"plugin": block.get("plugin", "classifier"), "weights": weights, "classes": classes}
    meta = _meta(run, recipe, network, val_data, names)
    files = _descriptions(meta, block)
    path, beside = _new_path(Path(out) / f"{meta.model_name}_{meta.version}.tar")
    calibration = calibration_inputs(network, recipe, train) if int8 else None
    networks, quantised = _networks(network, calibration, with_preprocessing, torch_export)
    files |= networks
    report, flips = _compare(files, network, recipe, val, seconds, int8_points)
    report |= {"weights": weights, "data": val_data, "quantised": quantised}
    files |= {"parity.json": _json(report), "flips.csv": flips.to_csv(index=False).encode()}
    if report["problems"]:
        for file in beside:
            beside[file].write_bytes(files[file])
        problems = "; ".join(report["problems"])
        raise ExportError(f"{problems}. No package; the report is {beside['parity.json']}")
    options = (k for k in recipe.non_default() if k == "name" or k not in runtime_only)
    files["recipe.yaml"] = recipe.yaml(options).encode()  # without the paths of this machine
    files["README.md"] = metadata.model_card(meta, report, recipe, environment).encode()
    return write_tar(path, files)


def _descriptions(meta: Meta, block: Mapping[str, Any]) -> dict[str, bytes]:
    """The files that do not depend on a comparison. Raises ExportError."""
    size = [meta.preprocess.size] * 2
    if (hw := block.get("resize_hw", size)) != size:
        raise ExportError(f"resize_hw is {hw}, the run has {size}; leave it out")
    return {
        "meta.json": _json(meta.model_dump()),
        "parameters.json": _json(metadata.parameters(meta.preprocess, block)),
        "category_param.json": _json(metadata.categories(block, meta.classes)),
        "predict.py": Path(image_files.__file__).read_bytes(),
    }


def _new_path(path: Path) -> tuple[Path, dict[str, Path]]:
    """Path of a new package and of the report of a failure; removes that of an earlier one."""
    beside = {name: path.with_suffix(f".{name}") for name in ("parity.json", "flips.csv")}
    if path.exists():
        raise ExportError(f"{path} exists and is not replaced; choose another version")
    path.parent.mkdir(parents=True, exist_ok=True)
    for file in beside.values():
        file.unlink(missing_ok=True)
    return path, beside


def load_lists(
    recipe: Recipe,
    overrides: Mapping[str, Any],
    classes: list[str],
    source: Path,
    recorded: str,
    dataset: data.Dataset | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame, str]:
    """Training and validation list of a recipe, and the fingerprint of the validation images.

    Raises ExportError if classes or images differ from those recorded by `source`.
    """
    if unknown := ", ".join(sorted(set(overrides) - set(DATA_OPTIONS))):
        allowed = ", ".join(DATA_OPTIONS)
        raise ExportError(f"{unknown} cannot be changed after training; allowed are {allowed}")
    recipe = recipe.replace(**overrides)
    dataset = dataset or data.load_dataset(recipe, folder=source)
    if dataset.classes != classes:
        raise ExportError(f"the data does not have the classes of {source}, in their order")
    val = dataset.val
    if recipe.verify_data and "index" in val.attrs:
        data.check_shards(val)
    elif recipe.verify_data:
        val, _ = data.drop_corrupt(data.verify_images(val), "val")
    found = data.val_fingerprint(val)
    if recorded and found != recorded:
        raise ExportError(f"the validation images have changed since the training of {source}")
    return dataset.train, val, found


def _networks(
    network: Network,
    calibration: Iterator[np.ndarray] | None,
    with_preprocessing: bool,
    torch_export: bool,
) -> tuple[dict[str, bytes], dict[str, int]]:
    """The files of a network, and the integer nodes of the quantised one."""
    files, quantised = {FORMATS["onnx"]: onnx.to_onnx(network)}, {}
    if calibration is not None:
        files[FORMATS["int8"]], quantised = onnx.to_int8(files[FORMATS["onnx"]], calibration)
    if torch_export:
        files[FORMATS["torch_export"]] = onnx.to_torch_export(network)
    if with_preprocessing:
        files[FORMATS["with_preprocessing"]] = onnx.to_onnx_with_preprocessing(network)
    return files, quantised


def calibration_inputs(
    network: Network, recipe: Recipe, train: pd.DataFrame
) -> Iterator[np.ndarray]:
    """Inputs from training images with the validation transform, evenly over the list."""
    sample, transform = _evenly(train, CALIBRATION_IMAGES), training.eval_transform(recipe)
    for batch in data.eval_loader(sample, transform, batch_size=32):
        if len(batch.images):
            yield network.to_input(batch.images).numpy()


def _evenly(frame: pd.DataFrame, count: int) -> pd.DataFrame:
    """At most `count` rows, evenly over the frame."""
    rows = np.unique(np.linspace(0, len(frame) - 1, min(count, len(frame))).astype(int))
    return frame.iloc[rows].reset_index(drop=True)


def _meta(
    run: runs.Run, recipe: Recipe, network: Network, val_data: str, names: Mapping[str, Any]
) -> Meta:
    """meta.json, validated as `check` does. Raises ExportError."""
    with torch.no_grad():
        probe = network(network.to_input(network.noise(PROBES)))[1].tolist()
    made = {"run": run.path.name, "recipe": recipe.fingerprint, "data": val_data}
    made |= {"torch": torch.__version__, "workbench": run.environment().get("commit")}
    fields = {"format": metadata.FORMAT, "model": recipe.model, "opset": onnx.OPSET}
    fields |= {"preprocess": network.preprocess, "probe": probe, "made": made}
    try:
        return Meta(**fields, **names)
    except ValidationError as error:
        raise ExportError("; ".join(metadata.sentences(error))) from None


def _compare(
    files: dict[str, bytes],
    network: Network,
    recipe: Recipe,
    val: pd.DataFrame,
    seconds: float,
    int8_points: float,
) -> tuple[dict[str, Any], pd.DataFrame]:
    """Parity report and flips of the networks. Removes those over the budget from `files`."""
    runners, transform = onnx.runners(files, network), training.eval_transform(recipe)
    batches, decoded = data.eval_loader(val, transform, batch_size=64), None
    if FORMATS["with_preprocessing"] in files:
        run = onnx.onnx_runner(files[FORMATS["with_preprocessing"]])
        pixels = lambda image: torch.from_numpy(image.pixels().copy()).permute(2, 0, 1)[None]
        decoded = lambda rows: [run(pixels(one)) for one in images.open_all(val.path.iloc[rows])]
    report, flips = parity.compare_formats(runners, network, batches, len(val), seconds, decoded)
    flips = val[["file", "list"]].iloc[flips.row].reset_index(drop=True).join(flips)
    report["bytes"] = {name: len(files[name]) for name in FORMATS.values() if name in files}
    report |= {"threads": torch.get_num_threads(), "device": training.processor()}
    report["budget"] = {"flips": 0, "int8_points": int8_points}
    report["left_out"] = parity.over_budget(report, int8_points)
    for name in report["left_out"]:
        del files[FORMATS[name]]
    sample = _evenly(val, SCRIPT_IMAGES)
    report["script"] = parity.compare_script(files, sample, transform, network, runners)
    report["problems"] = parity.problems(report)
    return report, flips


def _json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
