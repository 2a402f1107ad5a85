"""Verifies a package and opens it for prediction."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml
from pydantic import ValidationError
from torch import nn

from workbench import counted, data, training
from workbench.augmentation import EvalTransform
from workbench.export import archive, metadata, onnx, parity
from workbench.export.archive import FORMATS, ExportError, PackageError
from workbench.export.metadata import PROBES, Meta
from workbench.export.onnx import Network
from workbench.export.packaging import load_lists
from workbench.recipe import Recipe, renamed


class Package(nn.Module):
    """The network of a verified package: uint8 images (n, 3, size, size) -> logits, float32."""

    device = torch.device("cpu")

    def __init__(self, files: Mapping[str, bytes]):
        super().__init__()
        self.meta = Meta.model_validate_json(files["meta.json"])
        self.classes, preprocess = self.meta.classes, self.meta.preprocess
        self.transform = EvalTransform(preprocess.size, preprocess.resize, preprocess.interpolation)
        # Networks of one name may differ in their preprocessing alone.
        settings = repr((self.classes, preprocess)).encode()
        self.fingerprint = hashlib.sha256(settings + files[FORMATS["onnx"]]).hexdigest()[:12]
        self.run = onnx.onnx_runner(files[FORMATS["onnx"]])
        self.to_input = Network(nn.Identity(), preprocess).to_input

    def __str__(self) -> str:
        meta = self.meta
        return f"{meta.model_name} {meta.version}, {meta.model}, {meta.weights} weights"

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self.run(self.to_input(images)))


def load(path: str | Path) -> Package:
    """A verified package for prediction. Raises PackageError."""
    return Package(check(path))


def measure(path: str | Path, seconds: float = 1.0, **overrides: Any) -> dict[str, Any]:
    """The parity report of a package on this machine; the reference is its ONNX network.

    `problems` has a sentence for each of onnx and int8 with other predictions, beyond ties, than in
    the report of the package. `overrides` are the options of packaging.DATA_OPTIONS. Raises
    PackageError, ExportError.
    """
    files, packed = check(path), archive.read_report(path)
    meta = Meta.model_validate_json(files["meta.json"])
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
            report["problems"].append(f"{name}: {counted(count, 'other prediction')}, {top1}")
    return report


def check(path: str | Path) -> dict[str, bytes]:
    """The files of a package after they were found consistent. Raises PackageError.

    Runs only the ONNX networks, with onnxruntime, on noise.
    """
    files = archive.read_tar(path)
    try:
        meta = Meta.model_validate_json(files["meta.json"])
    except ValidationError as error:
        problems = [f"meta.json: {text}" for text in metadata.sentences(error)]
        raise PackageError(path, *problems) from None
    problems = list(_contradictions(meta, files))
    for name in (FORMATS["onnx"], FORMATS["int8"], FORMATS["with_preprocessing"]):
        if name in files and not problems:
            problems = _network_problems(name, files[name], meta)
    if problems:
        raise PackageError(path, *problems)
    return files


def _contradictions(meta: Meta, files: Mapping[str, bytes]) -> Iterator[str]:
    """Where the files contradict meta.json, from which the expected ones are computed."""
    preprocess, classes = meta.preprocess, meta.classes
    if preprocess.resize < preprocess.size:
        yield f"resize {preprocess.resize} is smaller than the crop {preprocess.size}"
    if [len(row) for row in meta.probe] != [len(classes)] * PROBES:
        yield f"probe does not have {PROBES} rows of {len(classes)} logits"
    try:
        found = json.loads(files["parameters.json"])
        expected = metadata.parameters(preprocess, found)
        for key in sorted(found.keys() | expected.keys()):
            if found.get(key) != expected.get(key):
                yield f"parameters.json: {key} differs from meta.json"
        found = json.loads(files["category_param.json"])
        ranges = ("feature_start", "feature_end")
        groups = {n: {k: v for k, v in c.items() if k not in ranges} for n, c in found.items()}
        if found != metadata.categories({"class_label": groups}, classes):
            yield "category_param.json: the ranges differ from the labels"
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError, ExportError) as error:
        yield f"parameters.json or category_param.json: {error}"


def _network_problems(name: str, content: bytes, meta: Meta) -> list[str]:
    """Problems of an ONNX network, by its outputs for noise."""
    network, expected = Network(nn.Identity(), meta.preprocess), torch.tensor(meta.probe)
    noise = network.noise(PROBES)
    inputs = noise if name == FORMATS["with_preprocessing"] else network.to_input(noise)
    try:
        session = onnx.session(content)
        found = session.run(["score", "logits"], {"data": inputs.numpy()})
    except Exception as error:  # onnxruntime raises many types
        return [f"onnxruntime cannot run {name}: {error}"]
    sides = session.get_inputs()[0].shape[2:]
    if name == FORMATS["with_preprocessing"] and sides != ["height", "width"]:
        return [f"{name} takes images of {sides} pixels, not of any size"]
    score, logits = (torch.from_numpy(values).float() for values in found)
    if logits.shape != expected.shape or not logits.isfinite().all():
        return [f"{name} has {(*logits.shape,)} logits, or NaN; expected {(*expected.shape,)}"]
    if not torch.allclose(score, logits.softmax(1), atol=1e-3):
        return [f"the score of {name} is not the softmax of its logits"]
    difference, allowed = (logits - expected).abs().max(), 1e-3 * expected.abs().max().clamp(min=1)
    if name == FORMATS["onnx"] and difference > allowed:
        return [f"logits of {name} for noise differ by {difference:.2g}, allowed is {allowed:.2g}"]
    return []
