"""A package predicts like its run, reports what was measured, and is refused if it is invalid."""

import ast
import csv
import gzip
import hashlib
import io
import json
import os
import shutil
import site
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pandas as pd
import pytest
import timm
import torch
import yaml
from conftest import save_noise
from helpers import train
from PIL import Image
from scipy import stats
from torch import nn
from typer.testing import CliRunner

from workbench import consumer, data, export, runs, training
from workbench.__main__ import app
from workbench.augmentation import EvalTransform
from workbench.data import images
from workbench.export import ExportError, PackageError, metadata, packaging
from workbench.export import onnx as networks
from workbench.export.card import model_card
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


def member(name: str, size: int = 0, **fields) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size = size
    for key, value in fields.items():
        setattr(info, key, value)
    return info


def write_tar(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return path


def packed(path: Path, files: dict[str, bytes], **changed: bytes) -> Path:
    """A tar of these files, changed by name with _ for the dot, with valid sums."""
    files = {name: content for name, content in files.items() if name != "SHA256SUMS"}
    files |= {name.replace("__", "."): content for name, content in changed.items()}
    if "SHA256SUMS" not in files:
        sums = [f"{hashlib.sha256(its).hexdigest()}  {name}\n" for name, its in files.items()]
        files["SHA256SUMS"] = "".join(sums).encode()
    return write_tar(path, *((member(name, len(its)), its) for name, its in files.items()))


def extracted(path: Path, folder: Path) -> Path:
    with tarfile.open(path) as tar:
        tar.extractall(folder, filter="data")
    return folder


# ---- predict.py of the package


@pytest.fixture(scope="module")
def site_packages(tmp_path_factory) -> Path:
    """A folder with onnxruntime, numpy and Pillow only."""
    folder = tmp_path_factory.mktemp("site")
    [packages] = {Path(p) for p in site.getsitepackages()}
    for name in ("onnxruntime", "numpy", "numpy.libs", "PIL", "pillow.libs"):
        if (packages / name).exists():
            (folder / name).symlink_to(packages / name)
    return folder


@pytest.fixture
def script(built, site_packages, tmp_path):
    """Runs predict.py of the package with those packages; returns exit code, rows and stderr."""
    extracted(built, tmp_path / "package")
    code = (
        "import runpy, sys; sys.path.insert(0, sys.argv.pop(1)); del sys.argv[0]\n"
        "try:\n  runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally:\n  assert not {'torch', 'timm', 'workbench', 'pandas'} & set(sys.modules)"
    )
    start = [sys.executable, "-I", "-S", "-c", code, str(site_packages)]

    def call(*words) -> tuple[int, list[list[str]], str]:
        command = [*start, str(tmp_path / "package" / "predict.py"), *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True)
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


def test_the_script_is_short_and_imports_only_onnxruntime_numpy_and_pillow():
    source = Path(consumer.__file__).read_text(encoding="utf-8")
    lines = [line for line in source.split("\n") if line.strip() and '"""' not in line]
    assert len(lines) <= 160
    tree = ast.parse(source)
    names = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    packages = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)
    assert packages == {"numpy", "onnxruntime", "PIL"}


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest", "lanczos"])
@pytest.mark.parametrize(
    "size", [(40, 32), (32, 40), (33, 61), (200, 37), (24, 24), (25, 24), (101, 100)]
)
def test_the_script_preprocesses_like_training(tmp_path, size, interpolation):
    recipe = Recipe(image_size=24, val_resize=27, interpolation=interpolation, mean=[0.1, 0.5, 0.9])
    path = save_noise(tmp_path / "a.png", seed=list(size), size=size)
    pixels = training.eval_transform(recipe)(images.decode(path))
    expected = torch.from_numpy(np.asarray(pixels).copy()).permute(2, 0, 1)[None]
    prepared = lambda inside: consumer.prepare(
        consumer.read(path), export.preprocess(recipe, inside).model_dump()
    )
    np.testing.assert_array_equal(prepared(True), expected.numpy())
    normalised = training.Normalize(recipe, torch.device("cpu"))(expected).numpy()
    np.testing.assert_allclose(prepared(False), normalised, atol=1e-5)
    assert prepared(False).dtype == np.float32


UNREADABLE = {
    "32.tif", "float.tif", "one.png", "half.png", "damaged.png", "empty.png", "half.avif"
}  # fmt: skip


def files_of_every_kind(folder: Path) -> list[Path]:
    """An image in many formats, modes, depths and orientations, and the files of UNREADABLE."""
    folder.mkdir()
    y, x = np.mgrid[0:48, 0:64]
    rgb = np.stack([x * 3, y * 5, x + y], -1).astype(np.uint8)
    image, grey16 = Image.fromarray(rgb), (x * 1000).astype(np.uint16)
    alpha = Image.fromarray(np.dstack([rgb, np.where(x < 32, 0, 255).astype(np.uint8)]))
    frames = [Image.new("RGB", (64, 48), colour) for colour in ("red", "lime", "blue")]
    save = lambda image, name, **options: image.save(folder / name, **options)
    for number in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = number
        for suffix, options in {
            "jpg": {},
            "png": {},
            "tif": {},
            "webp": {"lossless": True},
        }.items():
            save(image, f"turned{number}.{suffix}", exif=exif, **options)
    for suffix in ("png", "bmp", "gif", "ppm", "jp2", "avif", "ico"):
        save(image, f"plain.{suffix}")
    for mode in ("L", "P", "1", "CMYK", "LAB", "YCbCr"):
        save(image.convert(mode), f"{mode}.tif")
    for mode in ("L", "P", "1"):
        save(image.convert(mode), f"{mode}.png")
    for mode, colour in (("RGBA", None), ("LA", None), ("P", 0)):
        save(alpha.convert(mode), f"transparent{mode}.png", transparency=colour)
    for suffix in ("png", "tif"):
        save(Image.fromarray(grey16), f"16.{suffix}")
    for bits in (10, 16):
        levels = (grey16 >> (16 - bits)).astype(">u2").tobytes()
        (folder / f"{bits}.pgm").write_bytes(f"P5\n64 48\n{2**bits - 1}\n".encode() + levels)
    save(Image.fromarray(x.astype(np.int32)), "32.tif")
    save(Image.fromarray((x / 64).astype(np.float32)), "float.tif")
    for suffix in ("gif", "png", "webp", "tif", "mpo"):
        save(frames[0], f"several.{suffix}", save_all=True, append_images=frames[1:])
    save(image.convert("CMYK"), "CMYK.jpg")
    save(image, "progressive.jpg", progressive=True)
    save(image, "png.jpg", format="PNG")
    save(image.resize((900, 5)), "wide.png")
    save(image.resize((5, 900)), "tall.jpg")
    save(image.resize((1, 1)), "one.png")
    plain = (folder / "plain.png").read_bytes()
    (folder / "half.png").write_bytes(plain[:-60])
    (folder / "damaged.png").write_bytes(plain[: plain.index(b"IDAT") + 4] + b"IDAT" * 40)
    (folder / "empty.png").write_bytes(b"")
    (folder / "half.avif").write_bytes((folder / "plain.avif").read_bytes()[:400])
    return sorted(folder.iterdir())


def test_the_script_and_workbench_predict_agree_for_files_of_every_kind(built, script, tmp_path):
    paths = files_of_every_kind(tmp_path / "files")
    (tmp_path / "all.txt").write_text("".join(f"files/{path.name}\n" for path in paths))
    expected = export.predict(built, [tmp_path / "all.txt"])
    code, rows, stderr = script(*paths)
    assert code == 1 and stderr == ""
    assert [row[0] for row in rows] == [str(path) for path in paths]
    for (path, name, p), row in zip(rows, expected.itertuples(), strict=True):
        if row.error:
            assert (name, p) == ("", f"error: {row.error}"), path
        else:
            assert name == row.class1 and float(p) == pytest.approx(row.p1, abs=1e-5), path
    assert {Path(row[0]).name for row in rows if row[2].startswith("error: ")} == UNREADABLE


def test_the_script_continues_after_a_bad_file_and_runs_int8(script, tmp_path):
    (tmp_path / "text.jpg").write_text("no image")
    good = save_noise(tmp_path / "good.png", 1)
    code, rows, _ = script(tmp_path / "missing.png", tmp_path / "text.jpg", tmp_path, good)
    assert code == 1 and [row[2][:6] == "error:" for row in rows] == [True, True, True, False]
    _, [int8], _ = script("model_int8.onnx", good)
    assert int8[1] in "0123456789" and int8[2] != rows[3][2]
    for words in ((), ("--help",)):
        code, _, usage = script(*words)
        assert code == 1 and "IMAGE ..." in usage


# ---- networks and parity


def test_the_weights_are_those_of_the_last_epoch(trained):
    state = torch.load(trained.file("last.pt"), weights_only=True)
    for given, key, kind in (("", "ema", "ema"), ("ema", "ema", "ema"), ("raw", "model", "raw")):
        _, classes, model, weights = export.trained_model(trained, given)
        assert weights == kind and classes == [str(i) for i in range(10)] and not model.training
        for name, value in model.state_dict().items():
            assert torch.equal(value, state[key][name]), name


def test_int8_computes_in_int8_with_weights_that_cannot_saturate_16_bits(files):
    """x86-64 without VNNI adds pairs of uint8 * int8 in int16, which saturates at 32767."""
    report, content = json.loads(files["parity.json"]), files["model_int8.onnx"]
    modules = timm.create_model("test_resnet", num_classes=10).modules()
    convolutions = sum(isinstance(module, nn.Conv2d) for module in modules)
    assert report["quantised"] == {"QLinearConv": convolutions, "QGemm": 1}
    assert report["bytes"]["model_int8.onnx"] < 0.5 * report["bytes"]["model.onnx"]
    assert report["formats"]["int8"]["max_abs_diff"] > 0
    graph = onnx.load_from_string(content).graph
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    used = [n.input[0] for n in graph.node if n.op_type == "DequantizeLinear"]
    weights = [values[n] for n in used if n in values and values[n].dtype == np.int8]
    assert len(weights) == convolutions + 1
    largest = max(int(np.abs(weight.astype(int)).max()) for weight in weights)
    assert largest == 64 and 2 * 255 * largest <= np.iinfo(np.int16).max
    # onnxruntime's option for those processors; elsewhere it changes nothing
    network, logits = networks.Network(nn.Flatten(), export.preprocess(Recipe())), []
    inputs = {"data": network.to_input(network.noise(64)).numpy()}
    for precise in ("0", "1"):
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.x64quantprecision", precise)
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        logits.append(session.run(["logits"], inputs)[0])
    np.testing.assert_array_equal(*logits)


def test_int8_is_calibrated_on_training_images_with_the_validation_transform():
    recipe = Recipe(crop_scale=[0.2, 0.3], hflip=1.0)
    train_list = data.load_dataset(recipe).train
    network = networks.Network(nn.Flatten(), export.preprocess(recipe, True))
    inputs = np.concatenate(list(packaging.calibration_inputs(network, recipe, train_list, 50)))
    assert inputs.shape == (50, 3, 32, 32)
    for place in (0, 49):
        row = round(place * (len(train_list) - 1) / 49)
        image = training.eval_transform(recipe)(images.decode(train_list.path[row]))
        np.testing.assert_array_equal(inputs[place].transpose(1, 2, 0), np.asarray(image))


def test_the_report_covers_the_whole_validation_list(files, trained):
    report, own = json.loads(files["parity.json"]), trained.predictions("ema")
    assert report["images"] == len(own) == 500
    top1 = 100 * (own.class1 == own.label).mean()
    assert report["formats"]["torch"]["top1"] == pytest.approx(top1)
    assert report["data"] == trained.environment()["val_data"]
    assert set(report["formats"]) == {"torch", *export.FORMATS}
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
    assert "allowed is -100" in sentence
    kept = export.check(path)
    assert "model.onnx" in kept and "model_int8.onnx" not in kept
    text = kept["README.md"].decode()
    assert f"N{sentence[1:]}." in text
    assert "model_int8.onnx IMAGE" not in text and "| int8 |" in text


def test_a_script_with_other_predictions_is_not_packed(
    trained, exported_once, tmp_path, monkeypatch
):
    source = Path(consumer.__file__).read_text(encoding="utf-8")
    other = source.replace("np.asarray(to_rgb(image))", "np.asarray(to_rgb(image)) // 2")
    assert other != source
    (tmp_path / "other.py").write_text(other, encoding="utf-8")
    monkeypatch.setattr(consumer, "__file__", str(tmp_path / "other.py"))
    with pytest.raises(ExportError, match="probabilities of predict.py with onnx differ by"):
        export.package(trained.path, tmp_path, seconds=0.001)
    (tmp_path / "other.py").write_text("import nothing_of_this_name", encoding="utf-8")
    with pytest.raises(ExportError, match="predict.py of the package crashes: .*nothing_of_this"):
        export.package(trained.path, tmp_path, seconds=0.001)


def test_other_predictions_leave_a_report_and_no_package(
    trained, exported_once, tmp_path, monkeypatch
):
    right = networks.onnx_runner
    with monkeypatch.context() as patch:
        patch.setattr(networks, "onnx_runner", lambda content: lambda data: -right(content)(data))
        with pytest.raises(ExportError, match="onnx has other predictions .*the report is"):
            export.package(trained.path, tmp_path, seconds=0.01)
    names = ["small_1.0.0.flips.csv", "small_1.0.0.parity.json"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    report = export.read_report(tmp_path / names[1])
    assert report["problems"] and report["formats"]["onnx"]["flips"] > 100
    assert len(pd.read_csv(tmp_path / names[0])) == report["formats"]["onnx"]["flips"]
    path = export.package(trained.path, tmp_path, seconds=0.01)
    assert list(tmp_path.glob("small*")) == [path]


def test_measure_reports_predictions_that_differ_on_this_machine(built, files, tmp_path):
    report, packed_report = export.measure(built, seconds=0.001), json.loads(files["parity.json"])
    assert report["problems"] == [] and report["images"] == 500
    for name in ("onnx", "int8"):
        top1 = packed_report["formats"][name]["top1"]
        assert report["formats"][name]["top1"] == top1
    other = onnx.load_from_string(files["model.onnx"])
    [bias] = [tensor for tensor in other.graph.initializer if tensor.name.endswith("fc.bias")]
    bias.CopyFrom(onnx.numpy_helper.from_array(np.arange(10, dtype=np.float32), bias.name))
    path = packed(tmp_path / "x.tar", files | {"model_int8.onnx": other.SerializeToString()})
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
    path = export.package(trained.path, tmp_path, kestrel=block, uint8_input=True, seconds=0.01)
    assert path.name == "numbers_2.1.tar"
    found = export.check(path)
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
        ({"labels": list("023456789")}, "class_label has 9 labels, the network has 10 scores"),
        (
            {"labels": list("0123456789"), "threshold": 1},
            "class_label.x: threshold is not",
        ),
    ],
)
def test_a_class_label_that_does_not_fit_is_refused(group, problem):
    with pytest.raises(ExportError, match=problem):
        metadata.categories({"class_label": {"x": group}}, list("0123456789"))


def test_the_command_reads_the_block_of_a_united_perception_file(trained, exported_once, tmp_path):
    labels = [f"digit {i}" for i in range(10)]
    (tmp_path / "up.yaml").write_text(
        "to_kestrel:\n  toks_type: cls\n  plugin: classifier\n  model_name: shipped\n"
        f"  version: 3.0.0\n  class_label: {{numbers: {{calculator: bypass, labels: {labels}}}}}\n"
    )
    words = [str(trained.path), "--out", str(tmp_path), "--kestrel", str(tmp_path / "up.yaml")]
    done = CliRunner().invoke(app, ["export", *words])
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[-1] == str(tmp_path / "shipped_3.0.0.tar")
    found = export.check(tmp_path / "shipped_3.0.0.tar")
    assert json.loads(found["category_param.json"])["numbers"]["labels"] == labels


def test_sha256sum_accepts_the_sums(built, tmp_path):
    extracted(built, tmp_path)
    done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stdout
    assert len(done.stdout.split(b"\n")) == len(list(tmp_path.iterdir()))


def test_the_recipe_has_no_paths_of_this_machine(files, trained, tmp_path):
    text = files["recipe.yaml"].decode()
    assert "runs_dir:" not in text and "data_dir:" not in text
    (tmp_path / "recipe.yaml").write_text(text)
    recipe = Recipe.from_yaml(tmp_path / "recipe.yaml")
    assert recipe.fingerprint == Recipe(**trained.recipe()).fingerprint


def test_the_card_reports_what_was_measured(files, trained):
    head, body = files["README.md"].decode().removeprefix("---\n").split("---\n", 1)
    head, report = yaml.safe_load(head), json.loads(files["parity.json"])
    top1 = report["formats"]["torch"]["top1"]
    [result] = head["model-index"][0]["results"]
    assert result["metrics"] == [{"type": "accuracy", "value": round(top1, 2)}]
    assert head["pipeline_tag"] == "image-classification"
    low, high = stats.binomtest(round(5 * top1), 500).proportion_ci(method="wilson")
    assert f"{top1:.2f} %** (95 % interval {100 * low:.2f} to {100 * high:.2f}, n=500" in body
    assert trained.environment()["val_data"] in body and "| int8 |" in body
    assert "0 to 255 minus `pixel_means`, divided by `pixel_stds` of parameters.json" in body
    assert "1,297 images" in body and "python predict.py model_int8.onnx" in body
    assert "model_with_preprocessing.onnx" in body and "model.pt2" in body
    meta, recipe = metadata.Meta(**json.loads(files["meta.json"])), Recipe(**trained.recipe())
    found = {"train_val_duplicates": 2, "empty_classes": ["4", "7"]}
    text = model_card(meta, report, recipe, trained.environment() | found)
    assert "2 of the validation images were in training too" in text
    assert "Without a training image: 4, 7." in text and "in training too" not in body


# ---- runs that cannot be exported


def test_an_existing_package_is_not_replaced(built, trained):
    before = built.read_bytes()
    with pytest.raises(ExportError, match="exists and is not replaced; choose another version"):
        export.package(trained.path, built.parent)
    assert [p.name for p in built.parent.iterdir()] == [built.name]
    assert built.read_bytes() == before


def test_bad_arguments_are_refused_before_the_export(trained, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(networks, "to_onnx", None)  # a call would fail otherwise
    with pytest.raises(ExportError, match="cannot write .*; choose another out"):
        export.package(trained.path, tmp_path / "file" / "x")
    for options, problem in (
        ({"name": "../evil"}, "allowed are letters, digits, dot, dash and _"),
        ({"version": "1/2"}, "allowed are letters, digits, dot, dash and _"),
        ({"lr": "3"}, "lr cannot be changed after training; allowed are data_dir"),
        ({"weights": "fast"}, "no fast weights, only raw and ema"),
    ):
        with pytest.raises(ExportError, match=problem):
            export.package(trained.path, tmp_path, **options)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def other_classes(run: Path) -> None:
    environment = json.loads((run / "environment.json").read_text())
    environment["classes"][3] = "three"
    (run / "environment.json").write_text(json.dumps(environment))


def stopped(path: Path) -> None:
    run = runs.Run(path)
    with run.writing():
        run.set_status("stopped")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda run: shutil.rmtree(run), "is not a run folder"),
        (lambda run: (run / "last.pt").unlink(), "has no last.pt"),
        (lambda run: os.truncate(run / "last.pt", 1000), "cannot be read"),
        (lambda run: (run / "recipe.yaml").write_text("lr: much"), "lr"),
        (lambda run: (run / "environment.json").unlink(), "has no classes"),
        (other_classes, "10 classes, .* for 10, with other names or in another order"),
        (stopped, "is stopped; finish its training first"),
    ],
)
def test_a_run_that_cannot_be_exported_is_one_error(change, problem, trained, tmp_path):
    shutil.copytree(trained.path, tmp_path / "run")
    change(tmp_path / "run")
    with pytest.raises(ExportError, match=problem):
        export.package(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_changed_validation_images_are_refused_and_moved_ones_are_found(image_folder):
    options = {"dataset": "files", "data_dir": str(image_folder), "workers": 0}
    run = train(Recipe(**options, runs_dir=str(image_folder / "runs"), epochs=1, batch_size=6))
    [first, *_] = sorted((image_folder / "val" / "a").iterdir())
    saved = first.read_bytes()
    other = image_folder / "val" / "b" / "0.png"
    for change in (
        first.unlink,
        lambda: first.write_bytes(b"garbage"),
        lambda: shutil.copy(other, first),
    ):
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
    former = {new: old for old, new in export.archive.FORMER_KEYS.items()}

    def rename(value):
        if isinstance(value, dict):
            return {former.get(key, key): rename(item) for key, item in value.items()}
        return value

    old = {former.get(name, name): content for name, content in files.items()}
    old["parity.json"] = json.dumps(rename(json.loads(files["parity.json"]))).encode()
    old["meta.json"] = json.dumps({**json.loads(files["meta.json"]), "format": 1}).encode()
    flips = export.read_flips(files).rename(columns=former)
    old["flips.csv"] = flips.assign(form=flips.form.replace(former)).to_csv(index=False).encode()
    path = packed(tmp_path / "old.tar", old)
    found = export.check(path)
    assert export.read_report(path) == export.read_report(built)
    pd.testing.assert_frame_equal(export.read_flips(found), export.read_flips(files))
    assert found["model_with_preprocessing.onnx"] == files["model_with_preprocessing.onnx"]
    assert export.measure(path, seconds=0.001)["problems"] == []


def set_at(*path, value):
    def change(content):
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return change


META, PARAMETERS, CATEGORIES = "meta.json", "parameters.json", "category_param.json"
CONTRADICTIONS = {
    "labels": (CATEGORIES, set_at("classes", "labels", value=["a"] * 9), "9 labels"),
    "missing class": (META, lambda meta: meta["classes"].pop(), "10 labels"),
    "range": (CATEGORIES, set_at("classes", "feature_start", value=1), "ranges"),
    "huge range": (CATEGORIES, set_at("classes", "feature_end", value=10**12), "ranges"),
    "mean": (PARAMETERS, set_at("pixel_means", value=[1.0, 2.0, 3.0]), "pixel_means"),
    "normalised twice": (META, set_at("preprocess", "normalised_inside", value=True), "pixel"),
    "size": (META, set_at("preprocess", "size", value=24), "input_h"),
    "size as text": (META, set_at("preprocess", "size", value="32"), "preprocess.size"),
    "negative size": (META, set_at("preprocess", "size", value=-1), "preprocess.size"),
    "resize below crop": (META, set_at("preprocess", "resize", value=8), "smaller than"),
    "interpolation": (META, set_at("preprocess", "interpolation", value="x"), "interpolation"),
    "later format": (META, set_at("format", value=99), "format"),
    "path as name": (META, set_at("model_name", value="../x"), "model_name"),
    "unknown field": (META, set_at("run_me", value="rm"), "run_me"),
    "unknown parameter": (PARAMETERS, set_at("run_me", value="rm"), "run_me"),
    "missing field": (META, lambda meta: meta.pop("opset"), "opset"),
    "missing parameter": (PARAMETERS, lambda its: its.pop("type"), "type"),
    "type": (PARAMETERS, set_at("type", value=3), "type must be text"),
    "logits": (META, lambda meta: meta["probe"][0].reverse(), "for noise differ"),
    "NaN": (META, set_at("probe", value=[[float("nan")] * 10] * 2), "probe"),
    "no logits": (META, set_at("probe", value=[]), "probe"),
    "BGR": (PARAMETERS, set_at("is_rgb", value=False), "is_rgb"),
    "network": (PARAMETERS, set_at("model_files", "net", "net", value="/x"), "model_files"),
    "list for an object": (CATEGORIES, set_at("classes", value=[1]), CATEGORIES),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_a_package_with_a_contradiction_is_refused(case, files, tmp_path):
    name, change, problem = CONTRADICTIONS[case]
    content = json.loads(files[name])
    change(content)
    path = packed(tmp_path / "x.tar", files | {name: json.dumps(content).encode()})
    with pytest.raises(PackageError, match=problem):
        export.check(path)


def with_external_data(content: bytes) -> bytes:
    model = onnx.load_from_string(content)
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "../../etc/passwd"
    return model.SerializeToString()


def of_another_size() -> bytes:
    model = timm.create_model("test_resnet", num_classes=10).eval()
    seen = export.preprocess(Recipe(image_size=24, val_resize=24))
    return export.to_onnx(networks.Network(model, seen).eval())


def sparse_tar() -> bytes:
    """A header of GNU's sparse type that claims a terabyte in one block."""
    header = bytearray(member("model.onnx", type=tarfile.GNUTYPE_SPARSE).tobuf(tarfile.GNU_FORMAT))
    header[483:495] = b"17777777777\0"  # real size
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    return bytes(header) + bytes(1024)


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("meta.json", b"0" * 10**8)


def one_member(name: str, content: bytes = b"", **fields):
    return lambda files, path: write_tar(path, (member(name, len(content), **fields), content))


def with_content(name: str, content):
    """A package with other content of a file; `content` may be a function of the old one."""
    new = lambda files: content(files[name]) if callable(content) else content
    return lambda files, path: packed(path, files | {name: new(files)})


def as_tar(content):
    """A file of these bytes, or of what a function makes of a package."""
    return lambda files, path: path.write_bytes(
        content(packed(path, files).read_bytes()) if callable(content) else content
    )


def without(name: str, **sums: bytes):
    def make(files, path):
        kept = {k: v for k, v in files.items() if k != name} | sums
        write_tar(path, *((member(k, len(v)), v) for k, v in kept.items()))

    return make


def one_bit(content: bytes) -> bytes:
    half = len(content) // 2
    return content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :]


INVALID = {
    "no file": (lambda files, path: None, "cannot be read"),
    "a folder": (lambda files, path: path.mkdir(), "cannot be read"),
    "an empty file": (as_tar(b""), "missing|cannot be read"),
    "text": (as_tar(b"hello " * 999), "cannot be read"),
    "a zip file": (lambda files, path: zipped(path), "cannot be read"),
    "a gzip bomb": (as_tar(lambda tar: gzip.compress(tar + bytes(10**8))), "cannot be read"),
    "truncated": (as_tar(lambda tar: tar[: len(tar) // 2]), "truncated|cannot be read|missing"),
    "truncated at the end": (
        as_tar(lambda tar: tar[: int(0.95 * len(tar))]), "truncated|cannot be read|missing"),
    "one bit": (lambda files, path: without("model.onnx", **{
        "model.onnx": one_bit(files["model.onnx"])})(files, path), "does not match SHA256SUMS"),
    "a missing file": (without("category_param.json"), "is missing"),
    "no sums": (without("SHA256SUMS"), "SHA256SUMS is missing"),
    "other sums": (without("", SHA256SUMS=b"00  model.onnx\n"), "SHA256SUMS"),
    "path traversal": (one_member("../x.py", b"evil"), "is not a file"),
    "an absolute path": (one_member("/etc/x", b"evil"), "is not a file"),
    "an unknown file": (with_content("setup.py", b""), "is not a file of"),
    "a symlink": (
        one_member("model.onnx", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "not a regular"),
    "a hard link": (
        one_member("model.onnx", type=tarfile.LNKTYPE, linkname="meta.json"), "not a regular"),
    "a device": (one_member("model.onnx", type=tarfile.CHRTYPE), "not a regular"),
    "a folder inside": (one_member("model.onnx", type=tarfile.DIRTYPE), "not a regular"),
    "a sparse bomb": (as_tar(sparse_tar()), "not a regular|cannot be read|truncated"),
    "a file twice": (
        lambda files, path: write_tar(path, *[(member("meta.json", 2), b"{}")] * 2), "twice"),
    "no JSON": (with_content("meta.json", b"{"), "meta.json"),
    "deep JSON": (
        with_content("category_param.json", b"[" * 100_000 + b"]" * 100_000), "category_param"),
    "JSON of bytes": (with_content("meta.json", b"\xff\xfe\x00"), "meta.json"),
    "a network of text": (with_content("model.onnx", b"hello"), "cannot run"),
    "an empty network": (with_content("model.onnx", b""), "cannot run"),
    "external weights": (with_content("model.onnx", with_external_data), "cannot run"),
    "another input size": (
        with_content("model.onnx", lambda _: of_another_size()), "expected data"),
    "a broken int8 network": (
        with_content("model_int8.onnx", lambda its: its[:5000]), "cannot run"),
}  # fmt: skip


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


def test_a_loaded_package_has_the_logits_of_the_run(built, trained):
    package = export.load(built)
    recipe, classes, model, _ = export.trained_model(trained)
    assert package.classes == classes
    transform = training.eval_transform(recipe)
    assert package.transform == transform == EvalTransform(32, 32, "bilinear")
    val = data.load_dataset(recipe).val.head(20)
    [batch] = data.eval_loader(val, transform, batch_size=20)
    with torch.no_grad():
        expected = model(training.Normalize(recipe, torch.device("cpu"))(batch.images)).numpy()
    np.testing.assert_allclose(package(batch.images), expected, atol=1e-4)
    int8 = export.load(built, "int8")
    assert int8.fingerprint != package.fingerprint
    assert 0 < np.abs(int8(batch.images).numpy() - expected).max() < 2


def test_predictions_of_a_package_are_those_of_its_run(built, trained, tmp_path):
    val = data.load_dataset(Recipe(**trained.recipe())).val
    (tmp_path / "all.txt").write_text("".join(f"{path}\n" for path in val.path))
    table = export.predict(built, [tmp_path / "all.txt"])
    own, classes = trained.predictions("ema"), trained.environment()["classes"]
    assert table.class1.tolist() == [classes[k] for k in own.class1]
    assert table.p1.to_numpy() == pytest.approx(own.p1, abs=1e-4)
    assert str(export.open_source(built)) == "small 1.0.0, test_resnet, ema weights"
    with pytest.raises(export.PredictionError, match="leave out weights"):
        export.predict(built, [tmp_path / "all.txt"], weights="raw")
