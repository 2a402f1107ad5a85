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

from workbench import consumer, data, models, runs, training
from workbench.data import images
from workbench.export import metadata, onnx, parity
from workbench.export.archive import FORMATS, ExportError, write_tar
from workbench.export.card import model_card
from workbench.export.onnx import Network
from workbench.recipe import Recipe, RecipeError, runtime_only

DATA_OPTIONS = "data_dir train_list train_root val_list val_root class_names verify_data".split()
CALIBRATION_IMAGES = 512  # of training, for the ranges of int8
SCRIPT_IMAGES = 64  # of validation, for predict.py of the package
PROBES = 2  # images of noise whose logits are in meta.json


def trained_model(run: runs.Run, weights: str = "") -> tuple[Recipe, list[str], nn.Module, str]:
    """Recipe, classes, model in evaluation mode and kind of weights of a run's last epoch.

    Raises ExportError.
    """
    if not run.file("recipe.yaml").exists():
        raise ExportError(f"{run.path} is not a run folder; `workbench runs` lists them")
    recipe, classes, model, weights, file = load_run(run, weights)
    if file != "last.pt":
        raise ExportError(f"{run.path} has no last.pt, so its last epoch cannot be exported")
    return recipe, classes, model, weights


def load_run(run: runs.Run, weights: str = "") -> tuple[Recipe, list[str], nn.Module, str, str]:
    """Recipe, classes, model, kind of weights and their file, which may be best.safetensors."""
    classes = models.run_classes(run.path)
    if not classes or not all(isinstance(name, str) for name in classes):
        raise ExportError(f"{run.path} has no classes in environment.json; train it first")
    try:
        recipe = Recipe(**run.recipe())
        return recipe, classes, *training.load_run_model(recipe, run, len(classes), weights)
    except (runs.RunError, RecipeError, models.ModelError) as error:
        raise ExportError(f"{run.path} cannot be used: {error}") from None


def newest(root: str | Path) -> runs.Run:
    """The run in `root` that finished last of those that can be exported. Raises ExportError."""
    finished = runs.finished(root)
    finished.sort(key=lambda run: run.file("status.json").stat().st_mtime, reverse=True)
    for run in finished:
        with contextlib.suppress(ExportError, data.DataError, OSError):
            recipe, classes, *_ = trained_model(run)
            valid = re.fullmatch(metadata.NAME, recipe.name)
            if valid and data.load_dataset(recipe).classes == classes:
                return run
    raise ExportError(f"no finished run in {root} can be exported; `make demo` trains one")


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
    **overrides: Any,
) -> Path:
    """Writes `<name>_<version>.tar` into the folder `out` and returns its path.

    Name and version default to those of the to_kestrel block `kestrel`, then to the run's and
    1.0.0. With `uint8_input` the network normalises its input. `int8` adds a quantised network,
    `with_preprocessing` one that also resizes and crops, `torch_export` a file for
    torch.export.load. `overrides` are options of DATA_OPTIONS.

    Raises ExportError and writes only the report if a prediction of a network, ties aside, or of
    predict.py differs from PyTorch's for a validation image. int8 and with_preprocessing are left
    out if their interval shows a loss above `int8_points` of top-1.
    """
    run, block = runs.Run(run), kestrel or {}
    recipe, classes, model, weights = trained_model(run, weights)
    name = name or block.get("model_name") or recipe.name
    version = version or str(block.get("version", "1.0.0"))
    network = Network(model, metadata.preprocess(recipe, uint8_input)).eval()
    _check(run, network, block, name=name, version=version)
    categories = metadata.categories(block, classes)
    environment = run.environment()
    train, val, val_data = load_lists(
        recipe, overrides, classes, run.path, environment.get("val_data")
    )
    path = _new_path(Path(out), f"{name}_{version}")
    calibration = calibration_inputs(network, recipe, train) if int8 else None
    files, quantised = _networks(network, calibration, with_preprocessing, torch_export)
    names = {"model_name": name, "version": version, "plugin": block.get("plugin", "classifier")}
    names |= {"weights": weights, "classes": classes}
    meta = _meta(run, recipe, network, val_data, names)
    script = Path(consumer.__file__).read_bytes()
    files |= {"meta.json": _json(meta.model_dump()), "predict.py": script}
    report, flips = _compare(files, network, recipe, val, seconds, int8_points)
    report |= {"weights": weights, "data": val_data, "quantised": quantised}
    if report["problems"]:
        _write_failed(path, report, flips)
    files |= {
        "parameters.json": _json(metadata.parameters(network.preprocess, block)),
        "category_param.json": _json(categories),
        "parity.json": _json(report),
        "flips.csv": flips.to_csv(index=False).encode(),
        "recipe.yaml": _recipe_yaml(recipe),
        "README.md": model_card(meta, report, recipe, environment).encode(),
    }
    return write_tar(path, files)


def _check(run: runs.Run, network: Network, block: Mapping[str, Any], **names: str) -> None:
    """Raises ExportError for a name, a to_kestrel block or a run that cannot be exported."""
    for what, text in names.items():
        if not re.fullmatch(metadata.NAME, text):
            raise ExportError(f"{what} is {text!r}; allowed are letters, digits, dot, dash and _")
    size = [network.size, network.size]
    if (hw := block.get("resize_hw", size)) != size:
        raise ExportError(f"resize_hw is {hw}, the run has {size}; leave it out")
    if (state := run.status()["state"]) != "finished":
        raise ExportError(f"{run.path} is {state}; finish its training first")


def _new_path(out: Path, stem: str) -> Path:
    """Path of a new package. Makes the folder and removes the report of an earlier failure."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        for suffix in ("parity.json", "flips.csv"):
            (out / f"{stem}.{suffix}").unlink(missing_ok=True)
    except OSError as error:
        raise ExportError(f"cannot write {out}: {error.strerror}; choose another out") from None
    if (path := out / f"{stem}.tar").exists():
        raise ExportError(f"{path} exists and is not replaced; choose another version")
    return path


def load_lists(
    recipe: Recipe, overrides: Mapping[str, Any], classes: list[str], source: Path, recorded: str
) -> tuple[pd.DataFrame, pd.DataFrame, str]:
    """Training and validation list of a recipe, and the fingerprint of the validation images.

    Raises ExportError if classes or images differ from those recorded by `source`.
    """
    if unknown := ", ".join(sorted(set(overrides) - set(DATA_OPTIONS))):
        allowed = ", ".join(DATA_OPTIONS)
        raise ExportError(f"{unknown} cannot be changed after training; allowed are {allowed}")
    try:
        recipe = recipe.replace(**overrides)
    except RecipeError as error:
        raise ExportError(str(error)) from None
    dataset = data.load_dataset(recipe)
    if dataset.classes != classes:
        raise ExportError(
            f"the data has {len(dataset.classes)} classes, {source} was trained for "
            f"{len(classes)}, with other names or in another order"
        )
    val = dataset.val
    if recipe.verify_data:
        val, _ = data.drop_corrupt(data.verify_images(val), "val")
    found = data.fingerprint(data.Dataset(val.iloc[:0], val, classes))
    if recorded and found != recorded:
        raise ExportError(
            f"the validation images have changed since {source} was trained "
            f"(fingerprint {recorded}, now {found}); restore them"
        )
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
    network: Network, recipe: Recipe, train: pd.DataFrame, count: int = CALIBRATION_IMAGES
) -> Iterator[np.ndarray]:
    """Inputs from training images with the validation transform, evenly over the list."""
    sample, transform = _evenly(train, count), training.eval_transform(recipe)
    for batch in data.eval_loader(sample, transform, batch_size=32):
        if len(batch.images):
            yield network.to_input(batch.images).numpy()


def _evenly(frame: pd.DataFrame, count: int) -> pd.DataFrame:
    """At most `count` rows, evenly over the frame."""
    rows = np.unique(np.linspace(0, len(frame) - 1, min(count, len(frame))).astype(int))
    return frame.iloc[rows].reset_index(drop=True)


def _meta(
    run: runs.Run, recipe: Recipe, network: Network, val_data: str, names: Mapping[str, Any]
) -> metadata.Meta:
    """meta.json, validated as `check` does. Raises ExportError."""
    with torch.no_grad():
        probe = network(network.to_input(network.noise(PROBES)))[1].tolist()
    made = {"run": run.path.name, "recipe": recipe.fingerprint, "data": val_data}
    made |= {"torch": torch.__version__, "workbench": run.environment().get("commit")}
    fields = {"format": metadata.FORMAT, "model": recipe.model, "opset": onnx.OPSET}
    fields |= {"preprocess": network.preprocess, "probe": probe, "made": made}
    try:
        return metadata.Meta(**fields, **names)
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
        image = lambda row: torch.from_numpy(np.array(images.decode(val.path.iloc[row])))
        decoded = lambda row: run(image(row).permute(2, 0, 1)[None])
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


def _write_failed(path: Path, report: Mapping[str, Any], flips: pd.DataFrame) -> None:
    """Writes report and flips beside the path of the package, and raises ExportError."""
    beside = path.with_name(f"{path.stem}.parity.json")
    beside.write_bytes(_json(report))
    flips.to_csv(path.with_name(f"{path.stem}.flips.csv"), index=False)
    raise ExportError(f"{'; '.join(report['problems'])}. No package; the report is {beside}")


def _recipe_yaml(recipe: Recipe) -> bytes:
    """The options that are not the default, without the paths of this machine."""
    keys = (k for k in recipe.non_default() if k == "name" or k not in runtime_only)
    return recipe.yaml(keys).encode()


def _json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
