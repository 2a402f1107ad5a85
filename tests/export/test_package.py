"""A package predicts like its run, reports what was measured, and is refused if it is invalid."""

import csv
import gzip
import io
import json
import os
import shutil
import site
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pandas as pd
import pytest
import scipy.stats
import timm
import torch
import yaml
from conftest import save_noise, write_list
from helpers import train
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from workbench import data, export, image_files, runs, training
from workbench.__main__ import app
from workbench.augmentation import EvalTransform
from workbench.data import images
from workbench.export import (
    ExportError,
    PackageError,
    archive,
    metadata,
    packaging,
    parity,
    prediction,
)
from workbench.export import onnx as networks
from workbench.recipe import Recipe


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> runs.Run:
    """A run on the digits with EMA."""
    folder = tmp_path_factory.mktemp("runs")
    return train(Recipe(name="small", runs_dir=str(folder), epochs=2, ema_decay=0.9, workers=0))


@pytest.fixture(scope="module")
def built(trained, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("packages")
    formats = {"int8": True, "with_preprocessing": True, "torch_export": True}
    return export.package(trained.path, out, **formats, seconds=0.02, int8_points=5.0)


@pytest.fixture(scope="module")
def files(built) -> dict[str, bytes]:
    return export.check(built)


@pytest.fixture
def exported_once(files, monkeypatch):
    """Takes the network of `built` for every package of its run: an export takes 5 s."""
    monkeypatch.setattr(networks, "to_onnx", lambda network: files["model.onnx"])


# ---- predict.py of the package


@pytest.fixture(scope="module")
def script(built, tmp_path_factory):
    """Runs predict.py where only onnxruntime, numpy and Pillow can be imported.

    Returns exit code, rows and stderr.
    """
    folder = tmp_path_factory.mktemp("package")
    with tarfile.open(built) as tar:
        tar.extractall(folder, filter="data")
    [packages] = {Path(p) for p in site.getsitepackages()}
    for name in ("onnxruntime", "numpy", "numpy.libs", "PIL", "pillow.libs"):
        if (packages / name).exists():
            (folder / name).symlink_to(packages / name)

    def call(*words) -> tuple[int, list[list[str]], str]:
        command = [sys.executable, "-S", folder / "predict.py", *words]
        done = subprocess.run(command, capture_output=True, text=True, env={})
        return done.returncode, list(csv.reader(io.StringIO(done.stdout), "excel-tab")), done.stderr

    return call


def test_the_script_predicts_the_validation_images_like_the_run_without_torch(trained, script):
    val = data.load_dataset(Recipe(**trained.recipe())).val
    code, rows, stderr = script(*val.path)
    assert code == 0, stderr
    own, classes = trained.predictions("ema"), trained.environment()["classes"]
    assert [row[0] for row in rows] == [str(path) for path in val.path[own.row]]
    assert [row[1] for row in rows] == [classes[k] for k in own.class1]
    assert np.array([float(row[2]) for row in rows]) == pytest.approx(own.p1, abs=2e-5)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest", "lanczos"])
@pytest.mark.parametrize("size", [(40, 32), (32, 40), (200, 37), (24, 24), (101, 100)])
def test_the_script_preprocesses_like_training(tmp_path, size, interpolation):
    recipe = Recipe(image_size=24, val_resize=27, interpolation=interpolation, mean=[0.1, 0.5, 0.9])
    path = save_noise(tmp_path / "a.png", seed=list(size), size=size)
    pixels = training.eval_transform(recipe)(images.decode(path))
    expected = torch.from_numpy(np.asarray(pixels).copy()).permute(2, 0, 1)[None]
    prepared = lambda inside: image_files.prepare(
        image_files.read(path), export.preprocess(recipe, inside).model_dump()
    )
    np.testing.assert_array_equal(prepared(True), expected.numpy())
    normalised = training.Normalize(recipe, torch.device("cpu"))(expected).numpy()
    np.testing.assert_allclose(prepared(False), normalised, atol=1e-5)
    assert prepared(False).dtype == np.float32


UNREADABLE = "float.tif one.png half.png half.jpg empty.png".split()


def files_of_every_kind(folder: Path) -> list[Path]:
    """An image in many formats, modes, depths and orientations, and the files of UNREADABLE."""
    y, x = np.mgrid[0:48, 0:64]
    image = Image.fromarray(np.stack([x * 3, y * 5, x + y], -1).astype(np.uint8))
    transparent = image.copy()
    transparent.putalpha(Image.fromarray((4 * x).astype(np.uint8)))
    save = lambda image, name, **options: image.save(folder / name, **options)
    for number in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = number
        save(image, f"orientation{number}.jpg", exif=exif)
        save(image, f"orientation{number}.png", exif=exif)
    for name in ("plain.bmp", "plain.jp2", "plain.avif", "plain.webp", "plain.gif"):
        save(image, name)
    for name in ("L.jpg", "CMYK.jpg", "P.png", "1.png", "LAB.tif", "YCbCr.tif"):
        save(image.convert(name.partition(".")[0]), name)
    save(transparent, "RGBA.png")
    save(image.convert("P"), "transparent.png", transparency=0)
    save(image, "progressive.jpg", progressive=True)
    save(Image.fromarray((x * 1000).astype(np.uint16)), "16.png")
    for bits in (10, 16):
        levels = (x * 1000 >> (16 - bits)).astype(">u2").tobytes()
        (folder / f"{bits}.pgm").write_bytes(f"P5\n64 48\n{2**bits - 1}\n".encode() + levels)
    save(image, "several.mpo", save_all=True, append_images=[image.rotate(90)])
    save(Image.new("F", (64, 48)), "float.tif")
    save(image.resize((1, 1)), "one.png")
    for name in ("half.png", "half.jpg"):
        save(image, name)
        os.truncate(folder / name, (folder / name).stat().st_size // 2)
    (folder / "empty.png").touch()
    return sorted(folder.iterdir())


def test_the_script_and_workbench_predict_agree_for_files_of_every_kind(built, script, tmp_path):
    paths = [*files_of_every_kind(tmp_path), tmp_path / "missing.png", tmp_path]
    expected = export.predict(built, [write_list(tmp_path / "all.txt", *map(str, paths))])
    code, rows, stderr = script(*paths)
    assert code == 1 and stderr == ""
    assert [row[0] for row in rows] == [str(path) for path in paths]
    for (path, name, p), row in zip(rows, expected.itertuples(), strict=True):
        if row.error:
            assert (name, p) == ("", f"error: {row.error}"), path
        else:
            assert name == row.class1 and float(p) == pytest.approx(row.p1, abs=1e-5), path
    failed = {Path(row[0]).name for row in rows if row[2].startswith("error: ")}
    failed -= {"YCbCr.tif"}  # read by Pillow 13 and later
    assert failed == {*UNREADABLE, "missing.png", tmp_path.name}


def test_classes_of_one_name_do_not_keep_the_script_from_agreeing(files, trained):
    recipe, classes, model, *_ = packaging.trained_model(trained, "ema")
    meta = json.loads(files["meta.json"]) | {"classes": 2 * classes[:5]}
    network = networks.Network(model, export.preprocess(recipe)).eval()
    report = parity.compare_script(
        {key: files[key] for key in ("predict.py", "model.onnx")}
        | {"meta.json": json.dumps(meta).encode()},
        data.load_dataset(recipe).val.iloc[::25],
        training.eval_transform(recipe),
        network,
        networks.runners({"model.onnx": files["model.onnx"]}),
    )
    assert report["onnx"]["images"] == 20 and report["onnx"]["max_abs_diff"] < 1e-4


def test_the_script_names_no_class_where_the_logits_are_nan(files, tmp_path, monkeypatch, capsys):
    (tmp_path / "meta.json").write_bytes(files["meta.json"])
    monkeypatch.setattr(image_files, "HERE", tmp_path)
    network = SimpleNamespace(run=lambda names, inputs: [np.full((1, 10), np.nan, np.float32)])
    monkeypatch.setattr("onnxruntime.InferenceSession", lambda *args, **how: network)
    path = save_noise(tmp_path / "a.png", seed=0, size=(32, 32))
    assert image_files.main([str(path)]) == 1
    text = f"{path}\t\terror: not finite: the logits have NaN or infinity\n"
    assert capsys.readouterr().out == text


def test_the_script_runs_int8_and_prints_its_usage(script, tmp_path):
    image = save_noise(tmp_path / "image.png", 1)
    (_, [float32], _), (_, [int8], _) = script(image), script("model_int8.onnx", image)
    assert int8[1] in "0123456789" and int8[2] != float32[2]
    for words in ((), ("--help",)):
        code, _, usage = script(*words)
        assert code == 1 and "IMAGE ..." in usage


# ---- networks and parity


def test_int8_computes_in_int8_with_weights_that_cannot_saturate_16_bits(files):
    """x86-64 without VNNI adds pairs of uint8 * int8 in int16, which saturates at 32767."""
    report = json.loads(files["parity.json"])
    graph = onnx.load_from_string(files["model_int8.onnx"]).graph
    modules = timm.create_model("test_resnet", num_classes=10).modules()
    convolutions = sum(isinstance(module, nn.Conv2d) for module in modules)
    assert report["quantised"] == {"QLinearConv": convolutions, "QGemm": 1}
    assert report["bytes"]["model_int8.onnx"] < 0.5 * report["bytes"]["model.onnx"]
    assert report["formats"]["int8"]["max_abs_diff"] > 0
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    used = [n.input[0] for n in graph.node if n.op_type == "DequantizeLinear"]
    weights = [values[n] for n in used if n in values and values[n].dtype == np.int8]
    assert len(weights) == convolutions + 1
    largest = max(int(np.abs(weight.astype(int)).max()) for weight in weights)
    assert largest == 64 and 2 * 255 * largest <= np.iinfo(np.int16).max


def test_int8_is_calibrated_on_training_images_with_the_validation_transform():
    recipe = Recipe(crop_scale=[0.2, 0.3], hflip=1.0)
    train_list = data.load_dataset(recipe).train
    network = networks.Network(nn.Flatten(), export.preprocess(recipe, True))
    inputs = np.concatenate(list(packaging.calibration_inputs(network, recipe, train_list)))
    assert inputs.shape == (512, 3, 32, 32)
    for i in (0, 511):
        path = train_list.path[round(i * (len(train_list) - 1) / 511)]
        pixels = training.eval_transform(recipe)(images.decode(path))
        np.testing.assert_array_equal(inputs[i].transpose(1, 2, 0), np.asarray(pixels))


def test_the_report_covers_the_whole_validation_list(files, trained):
    report, own = json.loads(files["parity.json"]), trained.predictions("ema")
    assert report["images"] == len(own) == 500
    top1 = 100 * (own.class1 == own.label).mean()
    assert report["formats"]["torch"]["top1"] == pytest.approx(top1)
    assert report["data"] == trained.environment()["val_data"]
    assert set(report["formats"]) == {"torch", *archive.FORMATS}
    for name in ("onnx", "torch_export"):
        entry = report["formats"][name]
        assert entry["flips"] == entry["ties"] == 0 and entry["max_abs_diff"] < 1e-4
    table = export.table(report)
    assert table.loc["int8", "MB"] < table.loc["onnx", "MB"]
    flips = export.read_flips(files)
    assert len(flips) == sum(entry["flips"] for entry in report["formats"].values())


def test_an_int8_network_over_the_budget_is_left_out(trained, exported_once, tmp_path):
    """A budget of -100 points: int8 would have to gain 100."""
    words = ["export", str(trained.path), "--int8", "--int8-points=-100", "--out", str(tmp_path)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 1
    sentence, path = done.stdout.splitlines()[-2:]
    assert sentence.startswith("not in the package: int8 loses ")
    files = export.check(path)
    assert "model.onnx" in files and "model_int8.onnx" not in files
    card = files["README.md"].decode()
    assert f"N{sentence[1:]}." in card and "| int8 |" in card
    assert "model_int8.onnx IMAGE" not in card


def test_a_script_with_other_predictions_is_not_packed(
    trained, exported_once, tmp_path, monkeypatch
):
    source = Path(image_files.__file__).read_text(encoding="utf-8")
    other = source.replace("np.asarray(to_rgb(image))", "np.asarray(to_rgb(image)) // 2")
    assert other != source
    (tmp_path / "other.py").write_text(other, encoding="utf-8")
    monkeypatch.setattr(image_files, "__file__", str(tmp_path / "other.py"))
    with pytest.raises(ExportError, match="probabilities of predict.py with onnx differ by"):
        export.package(trained.path, tmp_path, seconds=0.001)
    (tmp_path / "other.py").write_text("import nothing_of_this_name", encoding="utf-8")
    with pytest.raises(
        ExportError, match="(?s)predict.py of the package crashes: .*nothing_of_this"
    ):
        export.package(trained.path, tmp_path, seconds=0.001)


def test_other_predictions_leave_a_report_and_no_package(
    trained, exported_once, tmp_path, monkeypatch
):
    right = networks.onnx_runner
    with monkeypatch.context() as patch:
        patch.setattr(networks, "onnx_runner", lambda content: lambda data: -right(content)(data))
        with pytest.raises(ExportError, match="onnx has other predictions .*the report is"):
            export.package(trained.path, tmp_path, seconds=0.01)
    flips, parity = sorted(tmp_path.iterdir())
    assert (flips.name, parity.name) == ("small_1.0.0.flips.csv", "small_1.0.0.parity.json")
    report = json.loads(parity.read_text())
    assert report["problems"] and report["formats"]["onnx"]["flips"] > 100
    assert len(pd.read_csv(flips)) == report["formats"]["onnx"]["flips"]
    path = export.package(trained.path, tmp_path, seconds=0.01)
    assert list(tmp_path.iterdir()) == [path]


def test_measure_reports_predictions_that_differ_on_this_machine(built, files, tmp_path):
    report = export.measure(built, seconds=0.001)
    assert report["problems"] == [] and report["images"] == 500
    top1 = export.read_report(built)["formats"]["int8"]["top1"]
    assert report["formats"]["int8"]["top1"] == top1
    other = onnx.load_from_string(files["model.onnx"])
    [bias] = [tensor for tensor in other.graph.initializer if tensor.name.endswith("fc.bias")]
    bias.CopyFrom(onnx.numpy_helper.from_array(np.arange(10, dtype=np.float32), bias.name))
    changed = files | {"model_int8.onnx": other.SerializeToString()}
    path = archive.write_tar(tmp_path / "x.tar", changed)
    done = CliRunner().invoke(app, ["export", "--check", str(path), "--measure"])
    assert done.exit_code == 1
    [sentence] = [line for line in done.stdout.splitlines() if line.startswith("int8: ")]
    assert f"{top1:.2f} in the package" in sentence


# ---- files of a package


def test_parameters_categories_and_meta_have_the_fields_of_to_kestrel(files, trained):
    recipe = Recipe(**trained.recipe())
    parameters = json.loads(files["parameters.json"])
    net = parameters["model_files"]["net"]
    assert set(net) == {"net", "backend", "max_batch_size", "input", "output"}
    assert net["net"] == "model.onnx" and net["output"] == {"score": "score"}
    assert (parameters["input_h"], parameters["input_w"]) == (32, 32)
    assert parameters["pixel_means"] == pytest.approx([255 * x for x in recipe.mean])
    assert parameters["pixel_stds"] == pytest.approx([255 * x for x in recipe.std])
    assert parameters["is_rgb"] is parameters["save_all_label"] is True
    labels = [str(i) for i in range(10)]
    category = {"calculator": "bypass", "feature_start": 0, "feature_end": 9, "labels": labels}
    assert list(json.loads(files["category_param.json"]).values()) == [category]
    meta = json.loads(files["meta.json"])
    assert (meta["model_name"], meta["version"]) == ("small", "1.0.0")
    assert (meta["toks_type"], meta["plugin"], meta["weights"]) == ("cls", "classifier", "ema")
    assert meta["preprocess"]["resize"] == 32 and meta["made"]["recipe"] == recipe.fingerprint


def test_a_to_kestrel_block_sets_names_types_and_categories(trained, tmp_path):
    groups = {
        "low": {"labels": list("0123")},
        "high": {"labels": list("456789"), "calculator": "max"},
    }
    block = {
        "toks_type": "cls", "plugin": "classifier", "model_name": "numbers", "version": "2.1",
        "type": "DIGITS", "save_all_label": False, "class_label": groups,
    }  # fmt: skip
    (tmp_path / "up.yaml").write_text(yaml.safe_dump({"to_kestrel": block}, sort_keys=False))
    words = ["export", str(trained.path), "--out", str(tmp_path), "--uint8-input"]
    done = CliRunner().invoke(app, [*words, "--kestrel", str(tmp_path / "up.yaml")])
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[-1] == str(tmp_path / "numbers_2.1.tar")
    found = export.check(tmp_path / "numbers_2.1.tar")
    parameters = json.loads(found["parameters.json"])
    assert parameters["type"] == "DIGITS" and parameters["save_all_label"] is False
    assert parameters["pixel_means"] == [0, 0, 0] and parameters["pixel_stds"] == [1, 1, 1]
    low, high = json.loads(found["category_param.json"]).values()
    assert (low["feature_start"], low["feature_end"]) == (0, 3)
    assert (high["feature_start"], high["feature_end"], high["calculator"]) == (4, 9, "max")
    with pytest.raises(ExportError, match=r"resize_hw is \[224, 256\], the run has \[32, 32\]"):
        export.package(trained.path, tmp_path, kestrel={"resize_hw": [224, 256]})


@pytest.mark.parametrize(
    ("group", "problem"),
    [
        ({"labels": list("1023456789")}, "class_label has the classes of the run in another order"),
        ({"labels": list("023456789")}, "class_label has 9 labels for 10 classes"),
        ({"labels": list("0123456789"), "threshold": 1}, "class_label.x: threshold is not"),
    ],
)
def test_a_class_label_that_does_not_fit_is_refused(group, problem):
    with pytest.raises(ExportError, match=problem):
        metadata.categories({"class_label": {"x": group}}, list("0123456789"))


def test_sha256sum_accepts_the_sums(files, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stdout
    assert len(done.stdout.splitlines()) == len(files) - 1


def test_the_recipe_has_no_paths_of_this_machine(files, trained, tmp_path):
    text = files["recipe.yaml"].decode()
    assert "runs_dir:" not in text and "data_dir:" not in text
    (tmp_path / "recipe.yaml").write_text(text)
    recipe = Recipe.from_yaml(tmp_path / "recipe.yaml")
    assert recipe.fingerprint == Recipe(**trained.recipe()).fingerprint


def test_the_card_reports_what_was_measured(files, trained):
    head, body = files["README.md"].decode().removeprefix("---\n").split("---\n", 1)
    report, environment = json.loads(files["parity.json"]), trained.environment()
    top1 = report["formats"]["torch"]["top1"]
    [result] = yaml.safe_load(head)["model-index"][0]["results"]
    assert result["metrics"] == [{"type": "accuracy", "value": round(top1, 2)}]
    low, high = scipy.stats.binomtest(round(5 * top1), 500).proportion_ci(method="wilson")
    assert f"{top1:.2f} %** (95 % interval {100 * low:.2f} to {100 * high:.2f}, n=500" in body
    assert environment["val_data"] in body and "| int8 |" in body
    assert "0 to 255 minus `pixel_means`, divided by `pixel_stds` of parameters.json" in body
    assert "1,297 images" in body and "python predict.py model_int8.onnx" in body
    assert "model_with_preprocessing.onnx" in body and "model.pt2" in body
    meta, recipe = metadata.Meta(**json.loads(files["meta.json"])), Recipe(**trained.recipe())
    found = environment | {"train_val_duplicates": 2, "val_repeats": 5, "empty_classes": ["4", "7"]}
    found |= {"trained_on_validation": ["runs/first was trained on 6 of the 6"]}
    card = metadata.model_card(meta, report, recipe, found)
    assert "2 of the 500 validation images are in training too, so top-1 is too high." in card
    assert "5 of the 500 validation images are repeated, so intervals are too narrow." in card
    assert "a teacher, were trained on validation images" in card and "runs/first" not in card
    assert "Without a training image: 4, 7." in card and "in training too" not in body


# ---- runs that cannot be exported


def test_bad_arguments_are_refused_before_the_export(built, trained, monkeypatch):
    before = built.read_bytes()
    monkeypatch.setattr(networks, "to_onnx", None)  # a call would fail otherwise
    for options, problem in (
        ({}, "exists and is not replaced; choose another version"),
        ({"name": "../evil"}, "model_name: string should match pattern"),
        ({"version": "1/2"}, "version: string should match pattern"),
        ({"lr": "3"}, "lr cannot be changed after training; allowed are data_dir"),
        ({"kestrel": {"type": 3}}, "type must be text"),
    ):
        with pytest.raises(ExportError, match=problem):
            export.package(trained.path, built.parent, **options)
    assert list(built.parent.iterdir()) == [built] and built.read_bytes() == before


def other_classes(run: runs.Run) -> None:
    environment = run.environment()
    environment["classes"][3] = "three"
    run.file("environment.json").write_text(json.dumps(environment))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda run: run.file("last.pt").unlink(), "is not finished or has no last.pt"),
        (lambda run: run.file("status.json").unlink(), "is not finished or has no last.pt"),
        (lambda run: run.file("environment.json").unlink(), "has no classes"),
        (other_classes, "the data does not have the classes of"),
    ],
)
def test_a_run_that_cannot_be_exported_is_one_error(change, problem, trained, tmp_path):
    run = runs.Run(shutil.copytree(trained.path, tmp_path / "run"))
    change(run)
    with pytest.raises(ExportError, match=problem):
        export.package(run.path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_changed_validation_images_are_refused_and_moved_ones_are_found(image_folder):
    options = {"dataset": "files", "data_dir": str(image_folder), "workers": 0}
    run = train(Recipe(**options, runs_dir=str(image_folder / "runs"), epochs=1, batch_size=6))
    [first, *_] = sorted((image_folder / "val" / "a").iterdir())
    saved = first.read_bytes()
    other = image_folder / "val" / "b" / "0.png"
    for change in (first.unlink, lambda: shutil.copy(other, first)):
        change()
        with pytest.raises(ExportError, match="validation images have changed since"):
            export.package(run.path, image_folder / "out")
    first.write_bytes(saved)
    moved = image_folder.rename(image_folder.with_name("moved"))
    moved_run = runs.Run(moved / "runs" / run.path.name)
    path = export.package(moved_run.path, moved / "out", seconds=0.001, data_dir=str(moved))
    report = export.read_report(path)
    assert report["images"] == 6 and report["data"] == moved_run.environment()["val_data"]


# ---- verification


def test_a_package_of_format_1_is_read(built, files, tmp_path):
    """Its files and keys have the names of FORMER_FILES and FORMER_KEYS."""
    former = {new: old for old, new in archive.FORMER_KEYS.items()}

    def rename(value):
        if isinstance(value, dict):
            return {former.get(key, key): rename(item) for key, item in value.items()}
        return value

    old = {former.get(name, name): content for name, content in files.items()}
    old["parity.json"] = json.dumps(rename(json.loads(files["parity.json"]))).encode()
    old["meta.json"] = json.dumps({**json.loads(files["meta.json"]), "format": 1}).encode()
    flips = export.read_flips(files).rename(columns=former)
    old["flips.csv"] = flips.assign(form=flips.form.replace(former)).to_csv(index=False).encode()
    path = archive.write_tar(tmp_path / "old.tar", old)
    found = export.check(path)
    assert export.read_report(path) == export.read_report(built)
    pd.testing.assert_frame_equal(export.read_flips(found), export.read_flips(files))
    assert found["model_with_preprocessing.onnx"] == files["model_with_preprocessing.onnx"]
    assert export.measure(path, seconds=0.001)["problems"] == []


# A case writes a file for the contents of a valid package.


def member(name: str, content: bytes = b"", copies: int = 1, **fields):
    """A tar with one member."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in fields.items():
        setattr(info, key, value)

    def make(files, path):
        with tarfile.open(path, "w") as tar:
            for _ in range(copies):
                tar.addfile(info, io.BytesIO(content))

    return make


def edited(name: str, *keys, value):
    """A package with another value in a JSON file, under valid checksums."""

    def make(files, path):
        content = part = json.loads(files[name])
        for key in keys[:-1]:
            part = part[key]
        part[keys[-1]] = value
        archive.write_tar(path, files | {name: json.dumps(content).encode()})

    return make


def with_content(name: str, content):
    """A package with other content of a file, or a function of it, under valid checksums."""
    new = lambda files: content(files[name]) if callable(content) else content
    return lambda files, path: archive.write_tar(path, files | {name: new(files)})


def tar_bytes(change):
    """A valid package whose bytes were changed by a function."""
    return lambda files, path: path.write_bytes(change(archive.write_tar(path, files).read_bytes()))


def without(name: str):
    return lambda files, path: archive.write_tar(
        path, {key: content for key, content in files.items() if key != name}
    )


def with_external_data(content: bytes) -> bytes:
    model = onnx.load_from_string(content)
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "../../etc/passwd"
    return model.SerializeToString()


def with_constant_score(content: bytes) -> bytes:
    model = onnx.load_from_string(content)
    [softmax] = [node for node in model.graph.node if "score" in node.output]
    softmax.op_type = "Sigmoid"
    del softmax.attribute[:]
    return model.SerializeToString()


def sparse_tar(_: bytes) -> bytes:
    """A header of GNU's sparse type that claims a terabyte in one block."""
    info = tarfile.TarInfo("model.onnx")
    info.type = tarfile.GNUTYPE_SPARSE
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[483:495] = b"17777777777\0"  # real size
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    return bytes(header) + bytes(1024)


def one_bit(tar: bytes) -> bytes:
    return tar[:50_000] + bytes([tar[50_000] ^ 1]) + tar[50_001:]


META, PARAMETERS, CATEGORIES = "meta.json", "parameters.json", "category_param.json"
ODD = "is not a file of a package"
INVALID = {
    "no file": (lambda files, path: None, "cannot be read"),
    "text": (tar_bytes(lambda tar: b"hello " * 999), "cannot be read"),
    "a gzip bomb": (tar_bytes(lambda tar: gzip.compress(tar + bytes(10**8))), "cannot be read"),
    "a sparse bomb": (tar_bytes(sparse_tar), "not a regular|cannot be read"),
    "half": (tar_bytes(lambda tar: tar[: len(tar) // 2]), "cannot be read|missing"),
    "one bit": (tar_bytes(one_bit), r"by SHA256SUMS: \['model.onnx'\]"),
    "a missing file": (without(CATEGORIES), "category_param.json is missing"),
    "path traversal": (member("../x.py", b"evil"), ODD),
    "an absolute path": (member("/etc/x", b"evil"), ODD),
    "a file twice": (member(META, b"{}", copies=2), "is repeated"),
    "a symlink": (member(META, type=tarfile.SYMTYPE, linkname="/etc/passwd"), "not a regular"),
    "a hard link": (member(META, type=tarfile.LNKTYPE, linkname=META), "not a regular"),
    "a device": (member(META, type=tarfile.CHRTYPE), "not a regular"),
    "no JSON": (with_content(META, b"{"), META),
    "deep JSON": (with_content(CATEGORIES, b"[" * 100_000 + b"]" * 100_000), CATEGORIES),
    "a network of text": (with_content("model.onnx", b"hello"), "cannot run"),
    "external weights": (with_content("model.onnx", with_external_data), "cannot run"),
    "another score": (with_content("model.onnx", with_constant_score), "is not the softmax"),
    "a broken int8": (with_content("model_int8.onnx", lambda its: its[:5000]), "int8.onnx"),
    # edited fields
    "labels": (edited(CATEGORIES, "classes", "labels", value=["a"] * 9), "9 labels"),
    "fewer classes": (edited(META, "classes", value=list("012345678")), "10 labels"),
    "range": (edited(CATEGORIES, "classes", "feature_end", value=10**12), "ranges"),
    "list for an object": (edited(CATEGORIES, "classes", value=[1]), CATEGORIES),
    "mean": (edited(PARAMETERS, "pixel_means", value=[1.0, 2.0, 3.0]), "pixel_means"),
    "BGR": (edited(PARAMETERS, "is_rgb", value=False), "is_rgb"),
    "path of the network": (edited(PARAMETERS, "model_files", "net", "net", value="/x"), "files"),
    "type": (edited(PARAMETERS, "type", value=3), "type must be text"),
    "unknown parameter": (edited(PARAMETERS, "run_me", value="rm"), "run_me"),
    "normalised twice": (edited(META, "preprocess", "normalised_inside", value=True), "pixel"),
    "size": (edited(META, "preprocess", "size", value=24), "input_h"),
    "resize below crop": (edited(META, "preprocess", "resize", value=8), "smaller than"),
    "interpolation": (edited(META, "preprocess", "interpolation", value="x"), "interpolation"),
    "later format": (edited(META, "format", value=99), "format"),
    "path as name": (edited(META, "model_name", value="../x"), "model_name"),
    "unknown field": (edited(META, "run_me", value="rm"), "run_me"),
    "logits": (edited(META, "probe", 0, value=[0.0] * 10), "for noise differ"),
    "NaN": (edited(META, "probe", value=[[float("nan")] * 10] * 2), "probe"),
    "no logits": (edited(META, "probe", value=[]), "probe"),
}


@pytest.mark.parametrize("case", INVALID)
def test_an_invalid_package_is_one_error_and_nothing_is_written(case, files, tmp_path):
    make, problem = INVALID[case]
    make(files, tmp_path / "x.tar")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(PackageError, match=problem):
        export.check(tmp_path / "x.tar")
    assert sorted(tmp_path.rglob("*")) == before


def test_the_command_verifies_a_package(built, tmp_path, command):
    done = command("export", "--check", built)
    assert done.returncode == 0 and "valid; small 1.0.0, test_resnet, 10 classes" in done.stdout
    (tmp_path / "x.tar").write_bytes(b"no tar")
    done = command("export", "--check", tmp_path / "x.tar")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "is not a valid package" in done.stderr


# ---- prediction


def test_predictions_of_a_package_are_those_of_its_run(built, trained, tmp_path):
    val = data.load_dataset(Recipe(**trained.recipe())).val
    inputs = [write_list(tmp_path / "all.txt", *val.path)]
    table, own = export.predict(built, inputs), trained.predictions("ema")
    package, classes = export.load(built), trained.environment()["classes"]
    assert package.classes == classes
    assert package.transform == EvalTransform(32, 32, "bilinear")
    assert table.class1.tolist() == [classes[k] for k in own.class1]
    assert table.p1.to_numpy() == pytest.approx(own.p1, abs=1e-4)
    assert str(package) == "small 1.0.0, test_resnet, ema weights"
    with pytest.raises(export.PredictionError, match="leave out weights"):
        export.predict(built, inputs, weights="raw")


@pytest.mark.parametrize("key", ["resize", "interpolation"])
def test_a_table_of_one_package_is_not_continued_with_another_preprocessing(
    files, built, tmp_path, monkeypatch, key
):
    """Runs of one seed whose validation differs have the same weights."""
    meta = json.loads(files["meta.json"])
    meta["preprocess"] |= {key: {"resize": 40, "interpolation": "bicubic"}[key]}
    content = json.dumps(meta).encode()
    other = archive.write_tar(tmp_path / "other.tar", {**files, "meta.json": content})
    (photos := tmp_path / "photos").mkdir()
    for i in range(4):
        save_noise(photos / f"{i}.png", seed=i)
    out = tmp_path / "out.csv"

    def killed(entries, targets, rows):
        if rows[0]["file"] == "2.png":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prediction, "annotate_batch", killed)
        export.predict_to_file(built, [photos], out, batch_size=2)
    with pytest.raises(export.PredictionError, match="with other weights"):
        export.predict_to_file(other, [photos], out, batch_size=2)
    assert export.predict_to_file(built, [photos], out, batch_size=2) == {"": 4}
