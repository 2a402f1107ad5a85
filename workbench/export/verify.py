"""Verifies a package and opens it for prediction."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml
from pydantic import ValidationError
from torch import nn

from workbench import data, training
from workbench.augmentation import EvalTransform
from workbench.export import archive, metadata, onnx, parity
from workbench.export.archive import FORMATS, ExportError, PackageError
from workbench.export.metadata import Meta
from workbench.export.onnx import Network
from workbench.export.packaging import PROBES, load_lists
from workbench.recipe import Recipe, renamed


class Package(nn.Module):
    """The network of a verified package: uint8 images (n, 3, size, size) -> logits, float32."""

    device = torch.device("cpu")

    def __init__(self, files: Mapping[str, bytes], format: str = "onnx"):
        super().__init__()
        self.meta = Meta(**json.loads(files["meta.json"]))
        self.classes, preprocess = self.meta.classes, self.meta.preprocess
        self.transform = EvalTransform(preprocess.size, preprocess.resize, preprocess.interpolation)
        self.fingerprint = hashlib.sha256(files[FORMATS[format]]).hexdigest()[:12]
        self.run = onnx.onnx_runner(files[FORMATS[format]])
        self.to_input = Network(nn.Identity(), preprocess).to_input

    def __str__(self) -> str:
        meta = self.meta
        return f"{meta.model_name} {meta.version}, {meta.model}, {meta.weights} weights"

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self.run(self.to_input(images)))


def load(path: str | Path, format: str = "onnx") -> Package:
    """A verified package for prediction; `format` is onnx or int8. Raises PackageError."""
    files = check(path)
    if FORMATS[format] not in files:
        raise PackageError(path, [f"it has no {format} network; export with --{format}"])
    return Package(files, format)


def measure(path: str | Path, seconds: float = 1.0, **overrides: Any) -> dict[str, Any]:
    """The parity report of a package on this machine; the reference is its ONNX network.

    `problems` has a sentence for each format with other predictions, beyond ties, than in the
    report of the package. `overrides` are the options of packaging.DATA_OPTIONS. Raises
    PackageError, ExportError.
    """
    files, path = check(path), Path(path)
    packed, meta = archive.read_report(path), Meta(**json.loads(files["meta.json"]))
    recipe = Recipe(**renamed(yaml.safe_load(files["recipe.yaml"])))
    network = Network(nn.Identity(), meta.preprocess)
    _, val, _ = load_lists(recipe, overrides, meta.classes, path, packed["data"])
    onnx_files = {name: content for name, content in files.items() if name.endswith(".onnx")}
    batches = data.eval_loader(val, training.eval_transform(recipe), batch_size=64)
    report, flips = parity.compare_formats(
        onnx.runners(onnx_files), network, batches, len(val), seconds
    )
    report |= {"bytes": packed["bytes"], "problems": []}
    # A flip on both machines occurs twice and is dropped.
    flips = pd.concat([flips, archive.read_flips(files)])
    flips = flips[flips.margin >= parity.TIE]
    flips = flips.drop_duplicates(["format", "row", "after"], keep=False)
    for name, entry in report["formats"].items():
        count, expected = flips[flips.format == name].row.nunique(), packed["formats"][name]["top1"]
        if count or entry["top1"] != expected:
            top1 = f"top-1 is {entry['top1']:.2f} here, {expected:.2f} in the package"
            report["problems"].append(f"{name}: {count} predictions differ, {top1}")
    return report


def check(path: str | Path) -> dict[str, bytes]:
    """The files of a package after they were found consistent. Raises PackageError.

    Runs only the ONNX networks, with onnxruntime, on noise.
    """
    path = Path(path)
    files = archive.read_tar(path)
    if missing := [f"{name} is missing" for name in archive.REQUIRED if name not in files]:
        raise PackageError(path, missing)
    problems = archive.hash_problems(files)
    files = {archive.FORMER_FILES.get(name, name): content for name, content in files.items()}
    try:
        meta = Meta.model_validate_json(files["meta.json"])
    except ValidationError as error:
        problems += [f"meta.json: {text}" for text in metadata.sentences(error)[:10]]
    problems = problems or _contradictions(meta, files)
    for name in ("onnx", "int8", "with_preprocessing"):
        if FORMATS[name] in files and not problems:
            problems = _network_problems(FORMATS[name], files[FORMATS[name]], meta)
    if problems:
        raise PackageError(path, problems)
    return files


def _contradictions(meta: Meta, files: Mapping[str, bytes]) -> list[str]:
    """Where the files contradict meta.json, from which the expected ones are computed."""
    problems, preprocess = [], meta.preprocess
    if preprocess.resize < preprocess.size:
        problems.append(f"resize {preprocess.resize} is smaller than the crop {preprocess.size}")
    if len(meta.probe) != PROBES or any(len(row) != len(meta.classes) for row in meta.probe):
        problems.append(f"probe does not have {PROBES} rows of {len(meta.classes)} logits")
    try:
        found = json.loads(files["parameters.json"])
        if not isinstance(found["type"], str) or not isinstance(found["save_all_label"], bool):
            problems.append("parameters.json: type must be text, save_all_label true or false")
        expected = metadata.parameters(preprocess, found)
        for key in found.keys() | expected.keys():
            if found.get(key) != expected.get(key):
                problems.append(f"parameters.json: {key} differs from meta.json")
        found = json.loads(files["category_param.json"])
        ranges = ("feature_start", "feature_end")
        groups = {n: {k: v for k, v in c.items() if k not in ranges} for n, c in found.items()}
        if found != metadata.categories({"class_label": groups}, meta.classes):
            problems.append("category_param.json: the ranges differ from the labels")
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError, ExportError) as error:
        problems.append(f"parameters.json or category_param.json: {error}")
    return problems


def _network_problems(name: str, content: bytes, meta: Meta) -> list[str]:
    """Problems of an ONNX network: inputs, outputs, and its logits for noise."""
    decoded = name == FORMATS["with_preprocessing"]
    network = Network(nn.Identity(), meta.preprocess)
    kind = "tensor(uint8)" if network.uint8_input or decoded else "tensor(float)"
    shape = [3, "height", "width"] if decoded else [3, network.size, network.size]
    noise = network.noise(PROBES)
    try:
        runtime = onnx.session(content)
        inputs = [(i.name, i.type, list(i.shape[1:])) for i in runtime.get_inputs()]
        outputs = [output.name for output in runtime.get_outputs()]
        if inputs != [("data", kind, shape)] or outputs != ["score", "logits"]:
            expected = f"data, {kind}, {shape}, and score, logits"
            return [f"{name} has inputs {inputs} and outputs {outputs}; expected {expected}"]
        noise = noise if decoded else network.to_input(noise)
        score, logits = runtime.run(None, {"data": noise.numpy()})
    except Exception as error:  # onnxruntime raises many types
        reason = str(error).strip().split("\n")[0][:200]
        return [f"onnxruntime cannot run {name}: {reason}"]
    expected = np.array(meta.probe, np.float32)
    if logits.shape != expected.shape or not np.isfinite(logits).all():
        return [f"{name} has {logits.shape} logits, or NaN; expected {expected.shape}"]
    if not np.allclose(score.sum(1), 1, atol=1e-3) or (score < 0).any():
        return [f"the score of {name} is not a softmax"]
    difference = float(np.abs(logits - expected).max())
    allowed = 1e-3 * max(1.0, float(np.abs(expected).max()))
    if name == FORMATS["onnx"] and difference > allowed:
        return [f"logits of {name} for noise differ by {difference:.2g}, allowed is {allowed:.2g}"]
    return []
