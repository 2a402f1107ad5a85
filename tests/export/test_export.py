"""A package answers as its run did, says only what was measured, and is refused when it lies."""

import ast
import csv
import hashlib
import io
import json
import os
import shutil
import site
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pandas as pd
import pytest
import timm
import torch
from conftest import save_noise
from onnx.reference import ReferenceEvaluator
from PIL import Image
from scipy import stats
from torch import nn
from typer.testing import CliRunner

from workbench import augmentation, data, export, runs, training
from workbench.__main__ import app
from workbench.data import images
from workbench.evaluation import statistics
from workbench.export import ExportError, PackageError, consumer, prediction
from workbench.recipe import Recipe


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> runs.Run:
    """A run on the digits that is right more often than not, with an average of its weights."""
    folder = tmp_path_factory.mktemp("runs")
    recipe = Recipe(name="small", runs_dir=str(folder), epochs=2, ema_decay=0.9, workers=0)
    run = runs.Run(recipe.folder)
    list(training.fit(recipe, run))
    return run


@pytest.fixture(scope="module")
def built(trained, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("packages")
    forms = {"int8": True, "whole": True, "program": True}
    return export.package(trained.path, out, **forms, seconds=0.02, int8_points=5.0)


@pytest.fixture(scope="module")
def files(built) -> dict[str, bytes]:
    return export.check(built)


@pytest.fixture
def exported_once(files, monkeypatch):
    """The network of `built` for each package of its run: torch exports for 5 s."""
    monkeypatch.setattr(export, "to_onnx", lambda network: files["model.onnx"])


def packed(path: Path, files: dict[str, bytes]) -> Path:
    """A tar of these files under fresh sums, where none are given."""
    if "SHA256SUMS" not in files:
        sums = [f"{hashlib.sha256(its).hexdigest()}  {name}\n" for name, its in files.items()]
        files = {**files, "SHA256SUMS": "".join(sums).encode()}
    with tarfile.open(path, "w") as tar:
        for name, its in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(its)
            tar.addfile(member, io.BytesIO(its))
    return path


# ---- the same answers


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory) -> Path:
    """A folder of onnxruntime, numpy and Pillow alone: nothing else can be imported from it."""
    folder = tmp_path_factory.mktemp("site")
    [packages] = {Path(p) for p in site.getsitepackages()}
    for name in ("onnxruntime", "numpy", "numpy.libs", "PIL", "pillow.libs"):
        if (packages / name).exists():
            (folder / name).symlink_to(packages / name)
    return folder


def test_the_generated_consumer_answers_every_image_as_the_run_did_without_torch(
    trained, built, elsewhere, tmp_path
):
    with tarfile.open(built) as tar:
        tar.extractall(tmp_path, filter="data")
    recipe = Recipe(**trained.recipe())
    val = data.load_dataset(recipe).val
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); sys.path.insert(0, sys.argv[2]); "
        "import predict; predict.main(sys.stdin.read().split('\\n')); "
        "assert not {'torch', 'torchvision', 'timm', 'workbench', 'pandas'} & set(sys.modules)\n"
        "try:\n  import torch\nexcept ImportError:\n  sys.exit(0)\nsys.exit('torch is there')"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, str(elsewhere), str(tmp_path)],
        input="\n".join(map(str, val.path)), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answers = list(csv.reader(io.StringIO(done.stdout), delimiter="\t"))
    own = trained.predictions("ema")
    assert [row[0] for row in answers] == [str(path) for path in val.path[own.row]]
    classes = trained.environment()["classes"]
    assert [row[1] for row in answers] == [classes[k] for k in own.class1]
    assert np.array([float(row[2]) for row in answers]) == pytest.approx(own.p1, abs=2e-5)


def test_the_consumer_is_short_and_imports_onnxruntime_numpy_and_pillow_alone():
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
def test_the_consumer_prepares_a_image_as_the_training_does(tmp_path, size, interpolation):
    recipe = Recipe(image_size=24, val_resize=27, interpolation=interpolation, mean=[0.1, 0.5, 0.9])
    path = save_noise(tmp_path / "a.png", seed=list(size), size=size)
    pixels = training.eval_transform(recipe)(images.decode(path))
    tensor = torch.from_numpy(np.asarray(pixels).copy()).permute(2, 0, 1)[None]
    wanted = training.Normalize(recipe, torch.device("cpu"))(tensor).numpy()
    for inside in (False, True):
        seen = export.preprocess(recipe, inside).model_dump()
        came = consumer.prepare(consumer.read(path), seen)
        if inside:
            np.testing.assert_array_equal(came, tensor.numpy())
        else:
            np.testing.assert_allclose(came, wanted, atol=1e-5)
            assert came.dtype == np.float32


def files_of_every_kind(folder: Path) -> list[Path]:
    """An image in many file formats, modes, depths and orientations, and files that are none."""
    y, x = np.mgrid[0:48, 0:64]
    rgb = np.stack([x * 3, y * 5, x + y], -1).astype(np.uint8)
    image, grey16 = Image.fromarray(rgb), (x * 1000).astype(np.uint16)
    alpha = np.dstack([rgb, np.where(x < 32, 0, 255).astype(np.uint8)])
    frames = [Image.new("RGB", (64, 48), colour) for colour in ("red", "lime", "blue")]
    several = {"save_all": True, "append_images": frames[1:]}
    save = lambda image, name, **how: image.save(folder / name, **how)
    for number in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = number
        for suffix, how in {"jpg": {}, "png": {}, "tif": {}, "webp": {"lossless": True}}.items():
            save(image, f"turned{number}.{suffix}", exif=exif, **how)
    for suffix in ("png", "bmp", "gif", "ppm", "jp2", "avif", "ico"):
        save(image, f"plain.{suffix}")
    for mode in ("L", "P", "1", "CMYK", "LAB", "YCbCr"):
        save(image.convert(mode), f"{mode}.tif")
    for mode in ("L", "P", "1"):
        save(image.convert(mode), f"{mode}.png")
    for mode in ("RGBA", "LA", "P"):
        save(
            Image.fromarray(alpha).convert(mode),
            f"transparent{mode}.png",
            transparency=0 if mode == "P" else None,
        )
    for suffix in ("png", "tif"):
        save(Image.fromarray(grey16), f"16.{suffix}")
    for bits in (10, 16):
        levels = (grey16 >> (16 - bits)).astype(">u2").tobytes()
        (folder / f"{bits}.pgm").write_bytes(f"P5\n64 48\n{2**bits - 1}\n".encode() + levels)
    save(Image.fromarray(x.astype(np.int32)), "32.tif")
    save(Image.fromarray((x / 64).astype(np.float32)), "float.tif")
    for suffix in ("gif", "png", "webp", "tif", "mpo"):
        save(frames[0], f"several.{suffix}", **several)
    save(image.convert("CMYK"), "CMYK.jpg")
    save(image, "progressive.jpg", progressive=True)
    save(image, "png.jpg", format="PNG")
    save(image.resize((900, 5)), "wide.png")
    save(image.resize((5, 900)), "tall.jpg")
    save(image.resize((1, 1)), "one.png")
    (folder / "half.png").write_bytes((folder / "plain.png").read_bytes()[:-60])
    damaged = bytearray((folder / "plain.png").read_bytes())
    damaged[damaged.index(b"IDAT") + 4 :] = b"IDAT" * 40
    (folder / "damaged.png").write_bytes(damaged)
    (folder / "empty.png").write_bytes(b"")
    (folder / "half.avif").write_bytes((folder / "plain.avif").read_bytes()[:400])
    return sorted(folder.iterdir())


def test_the_shipped_script_predicts_every_kind_of_file_as_workbench_predict_does(
    built, elsewhere, tmp_path
):
    """Another class, a probability apart, or an error on one side alone would be another rule."""
    (tmp_path / "package").mkdir()
    with tarfile.open(built) as tar:
        tar.extractall(tmp_path / "package", filter="data")
    (tmp_path / "files").mkdir()
    paths = files_of_every_kind(tmp_path / "files")
    (tmp_path / "all.txt").write_text("".join(f"files/{path.name}\n" for path in paths))
    told = prediction.predict(built, [tmp_path / "all.txt"])
    code = (
        "import runpy, sys; sys.path.insert(0, sys.argv.pop(1)); del sys.argv[0]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    start = [sys.executable, "-I", "-S", "-c", code, str(elsewhere)]
    done = subprocess.run(
        [*start, str(tmp_path / "package" / "predict.py"), *map(str, paths)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1 and done.stderr == ""
    came = [line.split("\t") for line in done.stdout.splitlines()]
    assert [row[0] for row in came] == [str(path) for path in paths]
    for (path, name, p), wanted in zip(came, told.itertuples(), strict=True):
        if wanted.error:
            assert (name, p) == ("", f"error: {wanted.error}"), path
        else:
            assert name == wanted.class1 and float(p) == pytest.approx(wanted.p1, abs=1e-5), path
    unread = {Path(row[0]).name for row in came if row[2].startswith("error: ")}
    assert unread == {
        "32.tif", "float.tif", "one.png", "half.png", "damaged.png", "empty.png", "half.avif"
    }  # fmt: skip


def network_of(name: str, size: int, pixels: bool = False) -> export.Network:
    model = timm.create_model(name, num_classes=10).eval()
    recipe = Recipe(image_size=size, val_resize=size)
    return export.Network(model, export.preprocess(recipe, pixels)).eval()


def exported(
    name: str, size: int, pixels: bool = False
) -> tuple[export.Network, export.TeacherOutput]:
    network = network_of(name, size, pixels)
    return network, export._runner(export.session(export.to_onnx(network)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("test_resnet", 32),
        ("resnet18", 64),
        ("resnet50", 64),
        ("resnet50d", 64),
        ("mobilenetv3_large_100", 64),
        ("convnext_tiny", 64),
        ("vit_small_patch16_224", 224),
        ("swin_tiny_patch4_window7_224", 224),
    ],
)
def test_a_network_leaves_torch_with_its_answers_at_any_batch_size(name, size):
    network, answer = exported(name, size)
    for batch in (1, 5):
        feed = network.feed(network.noise(batch))
        with torch.no_grad():
            plain = network.model(feed).numpy()
        came = answer(feed)
        assert np.abs(came - plain).max() <= 1e-4 * max(1, np.abs(plain).max())


@pytest.mark.slow
def test_with_pixels_the_network_takes_bytes_and_normalises_itself():
    network, answer = exported("test_resnet", 32, pixels=True)
    noise = network.noise(3)
    assert noise.dtype == torch.uint8
    recipe = Recipe()
    normalised = training.Normalize(recipe, torch.device("cpu"))(noise)
    with torch.no_grad():
        plain = network.model(normalised).numpy()
    np.testing.assert_allclose(answer(network.feed(noise)), plain, atol=1e-4)


@pytest.mark.parametrize(
    "interpolation", ["bilinear", pytest.param("bicubic", marks=pytest.mark.slow)]
)
def test_a_whole_network_sees_of_any_image_what_pillow_shows_but_for_a_grey_level(interpolation):
    recipe = Recipe(image_size=24, val_resize=27, interpolation=interpolation)
    seen = export.preprocess(recipe, pixels=True)

    class Seen(nn.Module):
        def forward(self, x):
            return x.flatten(1)

    network = export.Network(Seen(), seen).eval()
    answer = export._runner(export.session(export.to_whole(network, seen)))
    see = training.eval_transform(recipe)
    mean, std = (np.array(v).reshape(3, 1, 1) for v in (recipe.mean, recipe.std))
    rng = np.random.default_rng(0)
    for width, height in [(90, 60), (60, 90), (27, 27), (28, 27), (29, 31), (400, 33), (9, 8)]:
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        wanted = np.asarray(see(Image.fromarray(image)), float).transpose(2, 0, 1)
        logits = answer(torch.from_numpy(image).permute(2, 0, 1)[None])
        came = (logits.reshape(3, 24, 24) * std + mean) * 255
        apart = np.abs(came - wanted)
        assert apart.max() < 1.01 and apart.mean() < 0.4, (width, height)


def test_a_whole_network_is_refused_for_an_interpolation_that_onnx_has_not():
    seen = export.preprocess(Recipe(interpolation="lanczos"))
    with pytest.raises(ExportError, match="lanczos has no form inside ONNX"):
        export.to_whole(export.Network(nn.Flatten(), seen), seen)


def test_the_middle_is_where_torchvision_crops():
    for left_over in range(40):
        assert export._middle(left_over) == int(round(left_over / 2.0))


def test_the_score_is_one_softmax_of_the_logits():
    network = export.Network(nn.Flatten(), export.preprocess(Recipe()))
    x = torch.randn(4, 3, 2, 2)
    score, logits = network(x)
    torch.testing.assert_close(score, torch.exp(logits) / torch.exp(logits).sum(1, keepdim=True))


def test_ema_weights_are_packed_where_the_run_keeps_them_and_raw_ones_when_asked(trained):
    state = torch.load(trained.file("last.pt"), weights_only=True)
    for asked, key, told in (("", "ema", "ema"), ("ema", "ema", "ema"), ("raw", "model", "raw")):
        _, classes, model, weights = export.trained_model(trained, asked)
        assert weights == told and classes == [str(i) for i in range(10)] and not model.training
        for name, value in model.state_dict().items():
            assert torch.equal(value, state[key][name]), name


# ---- int8


def test_int8_really_computes_in_int8(files):
    report = json.loads(files["parity.json"])
    convolutions = sum(
        isinstance(part, nn.Conv2d)
        for part in timm.create_model("test_resnet", num_classes=10).modules()
    )
    assert report["quantised"] == {"QLinearConv": convolutions, "QGemm": 1}
    assert report["bytes"]["model_int8.onnx"] < 0.5 * report["bytes"]["model.onnx"]
    assert report["forms"]["int8"]["largest"] > 0, "rounding leaves a trace"


def quantised_weights(content: bytes) -> list[np.ndarray]:
    graph = onnx.load_from_string(content).graph
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    used = [n.input[0] for n in graph.node if n.op_type == "DequantizeLinear"]
    return [values[name] for name in used if name in values and values[name].dtype == np.int8]


def test_two_products_of_int8_fit_into_the_16_bits_that_some_processors_add_them_in(files):
    """x86-64 without VNNI adds pairs of uint8 * int8 in int16 and cuts them at 32767."""
    weights, report = quantised_weights(files["model_int8.onnx"]), json.loads(files["parity.json"])
    assert len(weights) == sum(report["quantised"].values())
    largest = max(int(np.abs(its.astype(int)).max()) for its in weights)
    assert largest == 64 and 2 * 255 * largest <= np.iinfo(np.int16).max


def test_int8_gives_the_same_bits_by_kernels_that_add_in_32_bits(files):
    """onnxruntime's option for x86-64 without VNNI; elsewhere it changes nothing."""
    content, logits = files["model_int8.onnx"], []
    network = export.Network(nn.Flatten(), export.preprocess(Recipe()))
    feed = {"data": network.feed(network.noise(64)).numpy()}
    for precise in ("0", "1"):
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.x64quantprecision", precise)
        its = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        logits.append(its.run(["logits"], feed)[0])
    np.testing.assert_array_equal(*logits)


def test_int8_computes_what_whole_numbers_give_also_where_every_product_is_large():
    """Beside onnx's own evaluation in numpy: weights of one sign and bright images, the worst."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))
    for part in (model[0], model[3]):
        nn.init.uniform_(part.weight, 0.8, 1.0)
    seen = export.preprocess(Recipe(image_size=8, val_resize=8, mean=[0, 0, 0], std=[1, 1, 1]))
    network = export.Network(model, seen).eval()
    bright = torch.randint(200, 256, (16, 3, 8, 8), dtype=torch.uint8)
    feed = network.feed(bright).numpy()
    content, _ = export.to_int8(export.to_onnx(network), [feed])
    _, wanted = ReferenceEvaluator(onnx.load_from_string(content)).run(None, {"data": feed})
    _, came = export.session(content).run(None, {"data": feed})
    step = np.unique(np.diff(np.unique(wanted.ravel()))).min()  # of the quantised logits
    assert np.abs(came - wanted).max() <= 1.01 * step
    assert np.abs(wanted - network(torch.from_numpy(feed))[1].detach().numpy()).max() < 5 * step


def test_a_network_in_which_nothing_is_quantised_is_no_int8_network():
    network = export.Network(
        nn.Sequential(nn.AvgPool2d(32), nn.Flatten()), export.preprocess(Recipe())
    )
    content = export.to_onnx(network.eval())
    with pytest.raises(ExportError, match="no node computes in int8"):
        export.to_int8(content, [network.feed(network.noise(2)).numpy()])


def test_the_ranges_come_from_training_images_as_validation_sees_them(monkeypatch):
    recipe = Recipe(crop_scale=[0.2, 0.3], hflip=1.0)
    content = data.load_dataset(recipe)
    network = export.Network(nn.Flatten(), export.preprocess(recipe, True))
    feeds = torch.cat(list(export._calibration(network, recipe, content.train, 50)))
    assert feeds.shape == (50, 3, 32, 32)
    see = training.eval_transform(recipe)
    for place in (0, 49):
        row = round(place * (len(content.train) - 1) / 49)
        image = np.asarray(see(images.decode(content.train.path[row])))
        np.testing.assert_array_equal(feeds[place].permute(1, 2, 0), image)


# ---- parity


def made_up(logits: np.ndarray, label: np.ndarray, size: int = 7) -> list[data.Batch]:
    """Batches of images in whose stead a form knows only the place."""
    found = []
    for start in range(0, len(label), size):
        rows = torch.arange(start, min(start + size, len(label)))
        images = torch.zeros(len(rows), 3, 8, 8, dtype=torch.uint8)
        images[:, 0, 0, 0] = rows
        labels = torch.from_numpy(label[start : start + size])
        found.append(data.Batch(images, labels, rows, rows, 0, True, len(rows), []))
    return found


def looked_up(logits: np.ndarray) -> export.TeacherOutput:
    place = lambda feed: feed[:, 0, 0, 0].numpy().astype(int) % len(logits)  # noise: latency's
    return lambda feed: logits[place(feed)].astype(np.float32)


def test_the_report_counts_flips_ties_and_differences_as_a_plain_loop_does():
    rng = np.random.default_rng(0)
    n, classes = 100, 4
    label = rng.integers(0, classes, n)
    first = rng.normal(0, 2, (n, classes)).astype(np.float32)
    first[np.arange(n), label] += 2
    other = first + rng.normal(0, 0.5, first.shape).astype(np.float32)
    first[3], other[3] = [1.0, 1.0005, 0, 0], [1.0005, 1.0, 0, 0]  # a tie that falls otherwise
    network = export.Network(
        nn.Flatten(), export.preprocess(Recipe(image_size=8, val_resize=8), True)
    )
    answers = {"torch": looked_up(first), "onnx": looked_up(first), "int8": looked_up(other)}
    report, flips = export.parity(answers, network, made_up(first, label), n, seconds=0.001)
    expected, ties, only_a, only_b, total = [], 0, 0, 0, 0.0
    for i in range(n):
        ours, theirs = max(range(4), key=first[i].item), 0
        ours = max(range(classes), key=lambda k, i=i: first[i][k])
        theirs = max(range(classes), key=lambda k, i=i: other[i][k])
        if ours != theirs:
            expected.append((i, int(label[i]), "int8", ours, theirs))
            ties += first[i][ours] - first[i][theirs] < 1e-3
        only_a += ours == label[i] != theirs
        only_b += theirs == label[i] != ours
        total += sum(abs(float(other[i][k]) - float(first[i][k])) for k in range(classes))
    rows = flips[["row", "label", "form", "before", "after"]].itertuples(index=False, name=None)
    assert sorted(rows) == expected and len(expected) > 5 and ties >= 1
    assert report["forms"]["onnx"]["flips"] == 0 and report["forms"]["onnx"]["largest"] == 0
    its = report["forms"]["int8"]
    assert (its["flips"], its["ties"]) == (len(expected), ties)
    assert its["largest"] == pytest.approx(np.abs(other - first).max())
    assert its["mean"] == pytest.approx(total / first.size, rel=1e-5)
    assert its["difference"]["points"] == pytest.approx(100 * (only_b - only_a) / n)
    assert its["p"] == pytest.approx(stats.binomtest(only_a, only_a + only_b).pvalue)
    assert its["difference"]["low"] <= its["difference"]["points"] <= its["difference"]["high"]


def test_the_whole_validation_list_is_compared_and_told_beside_the_run(files, trained):
    report = json.loads(files["parity.json"])
    own = trained.predictions("ema")
    assert report["images"] == len(own) == 500
    assert report["run"]["top1"] == report["forms"]["torch"]["top1"]
    assert report["forms"]["torch"]["top1"] == pytest.approx(100 * (own.class1 == own.label).mean())
    assert report["data"] == trained.environment()["val_data"]
    assert list(report["forms"]) == ["torch", "onnx", "int8", "program", "whole"]
    for name in ("onnx", "program"):
        assert report["forms"][name]["flips"] == report["forms"][name]["ties"] == 0
        assert report["forms"][name]["largest"] < 1e-4
    table = export.table(report)
    assert table.loc["int8", "MB"] < table.loc["onnx", "MB"]
    flips = pd.read_csv(io.BytesIO(files["flips.csv"]))
    assert len(flips) == sum(its["flips"] for its in report["forms"].values())


@pytest.mark.parametrize(
    ("form", "flips", "ties", "top1", "wrong"),
    [
        ("onnx", 0, 0, 90.0, ""),
        ("onnx", 3, 3, 90.0, ""),
        ("onnx", 3, 2, 90.0, "onnx answers 1 images otherwise"),
        ("program", 1, 0, 90.0, "program answers 1 images otherwise"),
        ("int8", 9, 0, 89.4, ""),
        ("whole", 9, 0, 89.4, ""),
    ],
)
def test_the_budget_is_for_answers_beyond_ties(form, flips, ties, top1, wrong):
    forms = {"torch": {"top1": 90.0, "flips": 0, "ties": 0}}
    forms[form] = {"top1": top1, "flips": flips, "ties": ties}
    problems = export.over_budget({"forms": forms, "script": {}}, 0)
    assert [wrong] == [p[: len(wrong)] for p in problems] if wrong else problems == []


@pytest.mark.parametrize("form", ["int8", "whole"])
@pytest.mark.parametrize(
    ("lost", "won", "images", "refused"),
    [(3, 0, 500, False), (25, 0, 500, True), (10, 10, 500, False), (90, 10, 10_000, True),
     (60, 40, 10_000, False), (0, 25, 500, False)],
)  # fmt: skip
def test_a_form_that_rounds_is_left_out_where_its_interval_lies_beyond_the_points_it_may_lose(
    form, lost, won, images, refused
):
    """By the normal interval of a paired difference: 100 / n * (d +- 1.96 * sqrt(lost + won))."""
    before, after = np.ones((2, 1, images), bool)
    after[0, :lost] = False
    before[0, lost : lost + won] = False
    d = statistics.difference(before, after)
    report = {"forms": {form: {"difference": {"points": d.points, "low": d.low, "high": d.high}}}}
    best = 100 / images * (won - lost + 1.96 * np.sqrt(lost + won))
    assert (best < -0.5) == refused, "the case is what it says"
    found = export.lossy(report, 0.5)
    assert list(found) == ([form] if refused else [])
    points = 100 * (lost - won) / images
    assert not refused or found[form].startswith(f"{form} loses {points:.2f} points (95 % interval")


def test_without_an_int8_that_loses_too_much_the_rest_is_packed_and_said(
    trained, exported_once, tmp_path
):
    """A budget of -100 points: int8 would have to win 100."""
    words = ["export", str(trained.path), "--int8", "--int8-points=-100", "--out", str(tmp_path)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 1
    said, path = done.stdout.splitlines()[-2:]
    assert said.startswith("not in the package: int8 loses ") and "the budget is -100" in said
    kept = export.check(path)
    assert "model.onnx" in kept and "model_int8.onnx" not in kept
    text = kept["README.md"].decode()
    assert f"N{said[1:]}." in text
    assert "model_int8.onnx IMAGE" not in text and "| int8 |" in text


def test_a_script_that_reads_files_otherwise_is_not_shipped(
    trained, exported_once, tmp_path, monkeypatch
):
    source = Path(consumer.__file__).read_text(encoding="utf-8")
    other = source.replace("(grey + 128) // 257", "grey // 256").replace(
        "np.asarray(to_rgb(image))", "np.asarray(to_rgb(image))[..., ::-1] // 2"
    )
    (tmp_path / "other.py").write_text(other, encoding="utf-8")
    monkeypatch.setattr(consumer, "__file__", str(tmp_path / "other.py"))
    with pytest.raises(ExportError, match="predict.py with onnx is off by a probability of"):
        export.package(trained.path, tmp_path, seconds=0.001)
    (tmp_path / "other.py").write_text("import nothing_of_this_name", encoding="utf-8")
    with pytest.raises(ExportError, match="predict.py of the package crashes: .*nothing_of_this"):
        export.package(trained.path, tmp_path, seconds=0.001)


def test_a_package_is_measured_again_where_it_will_run(built, files, tmp_path):
    report = export.measure(built, seconds=0.001)
    told = json.loads(files["parity.json"])
    assert report["problems"] == [] and report["images"] == 500
    for form in ("onnx", "int8"):
        assert report["forms"][form]["top1"] == told["forms"][form]["top1"]
    other = onnx.load_from_string(files["model.onnx"])  # as a processor that computes otherwise
    [bias] = [its for its in other.graph.initializer if its.name.endswith("fc.bias")]
    bias.CopyFrom(onnx.numpy_helper.from_array(np.arange(10, dtype=np.float32), bias.name))
    rest = {name: its for name, its in files.items() if name != "SHA256SUMS"}
    path = packed(tmp_path / "other.tar", {**rest, "model_int8.onnx": other.SerializeToString()})
    done = CliRunner().invoke(app, ["export", "--check", str(path), "--measure"])
    assert done.exit_code == 1
    [said] = [line for line in done.stdout.splitlines() if line.startswith("int8: ")]
    assert f"and {told['forms']['int8']['top1']:.2f} there" in said


def test_over_the_budget_there_is_a_report_and_no_package(
    trained, exported_once, tmp_path, monkeypatch
):
    spoilt = lambda its: lambda feed: -its.run(["logits"], {"data": feed.numpy()})[0]
    right = export._runner
    monkeypatch.setattr(export, "_runner", spoilt)
    with pytest.raises(ExportError, match="onnx answers .* otherwise .*the report is"):
        export.package(trained.path, tmp_path, seconds=0.01)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "small_1.0.0.flips.csv", "small_1.0.0.parity.json"]  # fmt: skip
    report = export.read_report(tmp_path / "small_1.0.0.parity.json")
    monkeypatch.setattr(export, "_runner", right)
    assert report["problems"] and report["forms"]["onnx"]["flips"] > 100
    assert len(pd.read_csv(tmp_path / "small_1.0.0.flips.csv")) == report["forms"]["onnx"]["flips"]
    path = export.package(trained.path, tmp_path, seconds=0.01)
    assert list(tmp_path.glob("small*")) == [path], "the report of the try that failed is gone"


# ---- what a package says


def test_the_files_have_the_fields_that_to_kestrel_wrote(files, trained):
    recipe = Recipe(**trained.recipe())
    told = json.loads(files["parameters.json"])
    net = told["model_files"]["net"]
    assert set(net) == {"net", "backend", "max_batch_size", "input", "output"}
    assert net["net"] == "model.onnx" and net["output"] == {"score": "score"}
    assert (told["input_h"], told["input_w"]) == (32, 32)
    assert told["pixel_means"] == pytest.approx([255 * x for x in recipe.mean])
    assert told["pixel_stds"] == pytest.approx([255 * x for x in recipe.std])
    assert told["is_rgb"] is told["save_all_label"] is True
    categories = json.loads(files["category_param.json"])
    assert list(categories.values()) == [
        {"calculator": "bypass", "feature_start": 0, "feature_end": 9,
         "labels": [str(i) for i in range(10)]}
    ]  # fmt: skip
    meta = json.loads(files["meta.json"])
    assert (meta["model_name"], meta["version"]) == ("small", "1.0.0")
    assert (meta["toks_type"], meta["plugin"], meta["weights"]) == ("cls", "classifier", "ema")
    assert meta["preprocess"]["resize"] == 32 and meta["made"]["recipe"] == recipe.fingerprint


def test_a_to_kestrel_block_decides_names_types_and_categories(trained, tmp_path):
    block = {
        "toks_type": "cls", "plugin": "classifier", "model_name": "numbers", "version": "2.1",
        "type": "DIGITS", "save_all_label": False,
        "class_label": {"low": {"labels": list("0123")}, "high": {"labels": list("456789"),
                                                                 "calculator": "max"}},
    }  # fmt: skip
    path = export.package(trained.path, tmp_path, kestrel=block, pixels=True, seconds=0.01)
    assert path.name == "numbers_2.1.tar"
    its = export.check(path)
    parameters = json.loads(its["parameters.json"])
    assert parameters["type"] == "DIGITS" and parameters["save_all_label"] is False
    assert parameters["pixel_means"] == [0, 0, 0] and parameters["pixel_stds"] == [1, 1, 1]
    low, high = json.loads(its["category_param.json"]).values()
    assert (low["feature_start"], low["feature_end"]) == (0, 3)
    assert (high["feature_start"], high["feature_end"], high["calculator"]) == (4, 9, "max")
    block["class_label"]["high"]["labels"].reverse()
    with pytest.raises(ExportError, match="class_label names the classes of the run in another"):
        export.package(trained.path, tmp_path / "other", kestrel=block)
    block["class_label"]["high"]["labels"].pop()
    with pytest.raises(ExportError, match="class_label names 9 labels, the network has 10 scores"):
        export.package(trained.path, tmp_path, kestrel=block)
    block["class_label"]["high"]["proposal_threshold"] = 0.5
    with pytest.raises(ExportError, match="class_label.high: proposal_threshold cannot be packed"):
        export.package(trained.path, tmp_path, kestrel=block)
    with pytest.raises(ExportError, match=r"resize_hw is \[224, 256\], the run sees 32 x 32"):
        export.package(trained.path, tmp_path, kestrel={"resize_hw": [224, 256]})


def test_the_command_takes_the_block_of_a_united_perception_file(trained, exported_once, tmp_path):
    labels = [f"digit {i}" for i in range(10)]
    (tmp_path / "up.yaml").write_text(
        "to_kestrel:\n  toks_type: cls\n  plugin: classifier\n  model_name: shipped\n"
        f"  version: 3.0.0\n  class_label: {{numbers: {{calculator: bypass, labels: {labels}}}}}\n"
    )
    words = [str(trained.path), "--out", str(tmp_path), "--kestrel", str(tmp_path / "up.yaml")]
    done = CliRunner().invoke(app, ["export", *words])
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[-1] == str(tmp_path / "shipped_3.0.0.tar")
    its = export.check(tmp_path / "shipped_3.0.0.tar")
    assert json.loads(its["category_param.json"])["numbers"]["labels"] == labels


def test_sha256sum_agrees(built, tmp_path):
    with tarfile.open(built) as tar:
        tar.extractall(tmp_path, filter="data")
    done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stdout
    assert len(done.stdout.split(b"\n")) == len(list(tmp_path.iterdir()))


def test_the_recipe_in_it_is_the_runs_without_the_places_of_this_machine(files, trained, tmp_path):
    text = files["recipe.yaml"].decode()
    assert "runs_dir:" not in text and "data_dir:" not in text
    (tmp_path / "recipe.yaml").write_text(text)
    again = Recipe.from_yaml(tmp_path / "recipe.yaml")
    assert again.fingerprint == Recipe(**trained.recipe()).fingerprint


def test_the_card_says_what_was_measured(files, trained):
    text = files["README.md"].decode()
    head, body = text.removeprefix("---\n").split("---\n", 1)
    import yaml

    told = yaml.safe_load(head)
    report = json.loads(files["parity.json"])
    top1 = report["forms"]["torch"]["top1"]
    [result] = told["model-index"][0]["results"]
    assert result["metrics"] == [{"type": "accuracy", "value": round(top1, 2)}]
    assert told["pipeline_tag"] == "image-classification"
    low, high = stats.binomtest(round(5 * top1), 500).proportion_ci(method="wilson")
    assert f"{top1:.2f} %** (95 % interval {100 * low:.2f} to {100 * high:.2f}, n=500" in body
    assert trained.environment()["val_data"] in body and "| int8 |" in body
    assert "0 to 255 less `pixel_means`, over `pixel_stds` of parameters.json" in body
    assert "1,297 images" in body and "python predict.py model_int8.onnx" in body
    assert "model_whole.onnx" in body and "model.pt2" in body


def test_the_card_names_leaks_and_classes_without_training_images(files, trained):
    meta = export.Meta(**json.loads(files["meta.json"]))
    report, recipe = json.loads(files["parity.json"]), Recipe(**trained.recipe())
    found = {"train_val_duplicates": 2, "empty_classes": ["4", "7"]}
    text = export.card(meta, report, recipe, trained.environment() | found)
    assert "2 of the validation images were in training too" in text
    assert "Without a training image: 4, 7." in text
    assert "in training too" not in files["README.md"].decode()


def test_the_schema_describes_every_field(files):
    told = export.schema()
    for name in ("meta.json", "parameters.json"):
        assert set(json.loads(files[name])) == set(told[name]["properties"])


def test_no_half_package_is_left_and_none_is_replaced(built, trained):
    before = built.read_bytes()
    with pytest.raises(ExportError, match="exists and is not replaced; give this one another ver"):
        export.package(trained.path, built.parent)
    assert [p.name for p in built.parent.iterdir()] == [built.name]
    assert built.read_bytes() == before


def test_a_place_that_cannot_be_written_is_said_before_any_work(trained, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(export, "to_onnx", None)  # would fail otherwise
    with pytest.raises(ExportError, match="cannot write .*; choose another out"):
        export.package(trained.path, tmp_path / "file" / "x")
    for words in ({"name": "../evil"}, {"version": "1/2"}):
        with pytest.raises(ExportError, match="letters, digits, dots, dashes and _ alone"):
            export.package(trained.path, tmp_path, **words)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_an_unfinished_run_is_not_packed(trained, tmp_path):
    shutil.copytree(trained.path, tmp_path / "run")
    run = runs.Run(tmp_path / "run")
    with run.writing():
        run.set_status("stopped")
    with pytest.raises(ExportError, match="is stopped; train it to its end"):
        export.package(run.path, tmp_path)


def test_other_validation_images_than_the_runs_are_refused(image_folder):
    recipe = Recipe(dataset="files", data_dir=str(image_folder),
                    runs_dir=str(image_folder / "runs"),
                    epochs=1, batch_size=6, workers=0)  # fmt: skip
    run = runs.Run(recipe.folder)
    list(training.fit(recipe, run))
    [first, *_] = sorted((image_folder / "val" / "a").iterdir())
    saved = first.read_bytes()
    for spoil in (first.unlink, lambda: first.write_bytes(b"garbage"),
                  lambda: shutil.copy(image_folder / "val" / "b" / "0.png", first)):  # fmt: skip
        spoil()
        with pytest.raises(ExportError, match="validation image_folder have changed since"):
            export.package(run.path, image_folder / "out")
    first.write_bytes(saved)
    moved = image_folder.rename(image_folder.with_name("moved"))
    path = export.package(moved / "runs" / run.path.name, moved / "out", seconds=0.001,
                          data_dir=str(moved))  # fmt: skip
    report = export.read_report(path)
    assert report["images"] == 6 and report["data"] == run_environment(moved, run)["val_data"]


def run_environment(root: Path, run: runs.Run) -> dict:
    return json.loads((root / "runs" / run.path.name / "environment.json").read_text())


def test_the_consumer_goes_on_after_a_bad_file_and_answers_in_int8_too(built, elsewhere, tmp_path):
    with tarfile.open(built) as tar:
        tar.extractall(tmp_path, filter="data")
    (tmp_path / "text.jpg").write_text("no image")
    good = save_noise(tmp_path / "good.png", 1)
    start = [
        sys.executable,
        "-I",
        "-S",
        "-c",
        "import sys; sys.path[:0] = sys.argv[1:3]; import predict; "
        "sys.exit(predict.main(sys.argv[3:]))",
        str(elsewhere),
        str(tmp_path),
    ]
    call = lambda *words: subprocess.run([*start, *map(str, words)], capture_output=True, text=True)
    done = call(tmp_path / "missing.png", tmp_path / "text.jpg", tmp_path, good)
    assert done.returncode == 1, done.stderr
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert [line[2][:6] == "error:" for line in lines] == [True, True, True, False]
    small = call("model_int8.onnx", good).stdout.split("\t")
    assert small[1] in "0123456789" and small[2] != lines[3][2]
    for words in ((), ("--help",)):
        usage = call(*words)
        assert usage.returncode == 1 and "IMAGE ..." in usage.stderr


# ---- what is refused


def changed(files, name, change):
    """The files with one JSON file changed, under fresh sums: only its content can give it away."""
    its = json.loads(files[name])
    change(its)
    rest = {k: v for k, v in files.items() if k != "SHA256SUMS"}
    return {**rest, name: json.dumps(its).encode()}


def set_at(*path, value):
    def change(its):
        for key in path[:-1]:
            its = its[key]
        its[path[-1]] = value

    return change


LIES = {
    "another label": (
        "category_param.json",
        set_at("classes", "labels", value=["a"] * 9),
        "labels",
    ),
    "a label less": ("meta.json", lambda m: m["classes"].pop(), "categories cover 10 scores"),
    "a range beside": (
        "category_param.json",
        set_at("classes", "feature_start", value=1),
        "scores",
    ),
    "a huge range": (
        "category_param.json",
        set_at("classes", "feature_end", value=10**12),
        "scores",
    ),
    "another mean": (
        "parameters.json",
        set_at("pixel_means", value=[1.0, 2.0, 3.0]),
        "pixel_means",
    ),
    "normalised twice": (
        "meta.json",
        set_at("preprocess", "normalised_inside", value=True),
        "pixel",
    ),
    "another size": ("meta.json", set_at("preprocess", "size", value=24), "input_h"),
    "a size of text": ("meta.json", set_at("preprocess", "size", value="32"), "preprocess.size"),
    "a negative size": ("meta.json", set_at("preprocess", "size", value=-1), "preprocess.size"),
    "resize below crop": ("meta.json", set_at("preprocess", "resize", value=8), "smaller than"),
    "a kind of resize": ("meta.json", set_at("preprocess", "interpolation", value="x"), "interpol"),
    "a later format": ("meta.json", set_at("format", value=99), "format"),
    "a strange name": ("meta.json", set_at("model_name", value="../x"), "model_name"),
    "an unknown field": ("meta.json", set_at("run_me", value="rm"), "run_me"),
    "a missing field": ("meta.json", lambda m: m.pop("opset"), "opset"),
    "other answers": ("meta.json", lambda m: m["probe"][0].reverse(), "away from what was packed"),
    "answers of nan": ("meta.json", set_at("probe", value=[[float("nan")] * 10] * 2), "probe"),
    "no answers": ("meta.json", set_at("probe", value=[]), "probe"),
    "blue first": ("parameters.json", set_at("is_rgb", value=False), "is_rgb"),
    "another network": ("parameters.json", set_at("model_files", "net", "net", value="/x"), "net"),
    "a list for an object": ("category_param.json", set_at("classes", value=[1]), "category_param"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_package_that_disagrees_with_itself_is_refused(lie, files, tmp_path):
    name, change, word = LIES[lie]
    path = packed(tmp_path / "lie.tar", changed(files, name, change))
    with pytest.raises(PackageError, match=word):
        export.check(path)


def raw_tar(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for member, its in members:
            tar.addfile(member, io.BytesIO(its))
    return path


def named(name: str, size: int = 0, **fields) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size = size
    for key, value in fields.items():
        setattr(member, key, value)
    return member


def deep_json() -> bytes:
    return b"[" * 100_000 + b"]" * 100_000


def external(content: bytes) -> bytes:
    """The network with a tensor that says it lies in a file elsewhere."""
    model = onnx.load_from_string(content)
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "../../etc/passwd"
    return model.SerializeToString()


def smaller(_: bytes) -> bytes:
    return export.to_onnx(network_of("test_resnet", 24))


BROKEN = {
    "no file": (lambda f, p: p / "missing.tar", "cannot be read"),
    "a folder": (lambda f, p: p, "cannot be read"),
    "an empty file": (lambda f, p: _bytes(p, b""), "missing|cannot be read"),
    "a text": (lambda f, p: _bytes(p, b"hello " * 999), "cannot be read"),
    "a zip": (lambda f, p: _zip(p), "cannot be read"),
    "a gzip bomb": (lambda f, p: _gzip(p), "cannot be read"),
    "cut in the middle": (lambda f, p: _cut(f, p, 0.5), "cut off|cannot be read|missing"),
    "cut near the end": (lambda f, p: _cut(f, p, 0.95), "cut off|cannot be read|missing"),
    "one bit turned": (lambda f, p: _turned(f, p), "SHA256SUMS says"),
    "a file missing": (lambda f, p: _without(f, p, "category_param.json"), "is missing"),
    "no sums": (lambda f, p: _without(f, p, "SHA256SUMS"), "SHA256SUMS is missing"),
    "sums of others": (
        lambda f, p: packed(p / "x.tar", {**f, "SHA256SUMS": b"00  model.onnx\n"}), "SHA256SUMS"),
    "path traversal": (lambda f, p: raw_tar(p / "x.tar", (named("../x.py", 4), b"evil")), "is no"),
    "an absolute path": (lambda f, p: raw_tar(p / "x.tar", (named("/etc/x", 4), b"evil")), "is no"),
    "a stranger": (lambda f, p: packed(p / "x.tar", {**f, "setup.py": b""}), "is no file of"),
    "a symlink": (
        lambda f, p: raw_tar(p / "x.tar", (
            named("model.onnx", type=tarfile.SYMTYPE, linkname="/etc/passwd"), b"")), "no plain"),
    "a hard link": (
        lambda f, p: raw_tar(p / "x.tar", (
            named("model.onnx", type=tarfile.LNKTYPE, linkname="meta.json"), b"")), "no plain"),
    "a device": (
        lambda f, p: raw_tar(p / "x.tar", (named("model.onnx", type=tarfile.CHRTYPE), b"")),
        "no plain"),
    "a folder inside": (
        lambda f, p: raw_tar(p / "x.tar", (named("model.onnx", type=tarfile.DIRTYPE), b"")),
        "no plain"),
    "a sparse bomb": (lambda f, p: _sparse(p), "no plain|cannot be read|cut off"),
    "a file twice": (
        lambda f, p: raw_tar(p / "x.tar", (named("a" and "meta.json", 2), b"{}"),
                             (named("meta.json", 2), b"{}")), "is there twice"),
    "no JSON": (lambda f, p: _with(f, p, "meta.json", b"{"), "meta.json"),
    "deep JSON": (lambda f, p: _with(f, p, "category_param.json", deep_json()), "category_param"),
    "JSON of bytes": (lambda f, p: _with(f, p, "meta.json", b"\xff\xfe\x00"), "meta.json"),
    "a network of text": (lambda f, p: _with(f, p, "model.onnx", b"hello"), "cannot run"),
    "an empty network": (lambda f, p: _with(f, p, "model.onnx", b""), "cannot run"),
    "weights in a file elsewhere": (
        lambda f, p: _with(f, p, "model.onnx", external(f["model.onnx"])), "cannot run"),
    "a network of another size": (
        lambda f, p: _with(f, p, "model.onnx", smaller(f["model.onnx"])), "wanted data"),
    "a broken int8 network": (
        lambda f, p: _with(f, p, "model_int8.onnx", f["model_int8.onnx"][:5000]), "cannot run"),
}  # fmt: skip


def _bytes(folder: Path, content: bytes) -> Path:
    (folder / "x.tar").write_bytes(content)
    return folder / "x.tar"


def _zip(folder: Path) -> Path:
    import zipfile

    with zipfile.ZipFile(folder / "x.tar", "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("meta.json", b"0" * 10**8)
    return folder / "x.tar"


def _gzip(folder: Path) -> Path:
    with tarfile.open(folder / "x.tar", "w:gz") as tar:
        tar.addfile(named("model.onnx", 10**8), io.BytesIO(bytes(10**8)))
    return folder / "x.tar"


def _cut(files, folder: Path, share: float) -> Path:
    whole = packed(folder / "whole.tar", files).read_bytes()
    return _bytes(folder, whole[: int(share * len(whole))])


def _turned(files, folder: Path) -> Path:
    content = bytearray(files["model.onnx"])
    content[len(content) // 2] ^= 1
    return packed(folder / "x.tar", {**files, "model.onnx": bytes(content)})


def _without(files, folder: Path, name: str) -> Path:
    path = folder / "x.tar"
    with tarfile.open(path, "w") as tar:
        for file, its in files.items():
            if file != name:
                tar.addfile(named(file, len(its)), io.BytesIO(its))
    return path


def _with(files, folder: Path, name: str, content: bytes) -> Path:
    rest = {k: v for k, v in files.items() if k != "SHA256SUMS"}
    return packed(folder / "x.tar", {**rest, name: content})


def _sparse(folder: Path) -> Path:
    """A header of GNU's sparse kind that promises a terabyte in one block."""
    member = named("model.onnx", type=tarfile.GNUTYPE_SPARSE)
    header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    header[483:495] = b"17777777777\0"  # real size
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    return _bytes(folder, bytes(header) + bytes(1024))


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_no_sound_package_is_one_error_and_nothing_is_written(kind, files, tmp_path):
    make, word = BROKEN[kind]
    path = make(files, tmp_path)
    before = sorted(p.name for p in tmp_path.rglob("*"))
    with pytest.raises(PackageError, match=word):
        export.check(path)
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


def test_the_command_checks_a_package_and_says_one_sentence(built, tmp_path, command):
    done = command("export", "--check", built)
    assert done.returncode == 0 and "sound; small 1.0.0, test_resnet, 10 classes" in done.stdout
    broken = _bytes(tmp_path, b"no tar")
    done = command("export", "--check", broken)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "is no sound package" in done.stderr


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (lambda run: shutil.rmtree(run), "is no run folder"),
        (lambda run: (run / "last.pt").unlink(), "has lost last.pt"),
        (lambda run: os.truncate(run / "last.pt", 1000), "cannot be read"),
        (lambda run: (run / "recipe.yaml").write_text("lr: much"), "lr"),
        (lambda run: (run / "environment.json").unlink(), "names no classes"),
    ],
)
def test_a_run_that_cannot_be_packed_is_one_error(spoil, word, trained, tmp_path):
    shutil.copytree(trained.path, tmp_path / "run")
    spoil(tmp_path / "run")
    with pytest.raises(ExportError, match=word):
        export.package(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_that_were_not_kept_and_other_classes_are_refused(trained, tmp_path):
    shutil.copytree(trained.path, tmp_path / "run")
    with pytest.raises(ExportError, match="lr would change what the run was; allowed are data_dir"):
        export.package(trained.path, tmp_path, lr="3")
    told = json.loads((tmp_path / "run" / "environment.json").read_text())
    told["classes"][3] = "three"
    (tmp_path / "run" / "environment.json").write_text(json.dumps(told))
    with pytest.raises(ExportError, match="10 classes, .* for 10, or others in another order"):
        export.package(tmp_path / "run", tmp_path)
    with pytest.raises(ExportError, match="no fast weights; it has raw and ema"):
        export.package(trained.path, tmp_path, weights="fast")


# ---- for prediction


def test_a_loaded_package_gives_the_logits_of_the_run(built, trained):
    package = export.load(built)
    recipe, classes, model, _ = export.trained_model(trained)
    assert package.classes == classes
    see = training.eval_transform(recipe)
    assert package.transform == see == augmentation.EvalTransform(32, 32, "bilinear")
    val = data.load_dataset(recipe).val.head(20)
    [batch] = data.eval_loader(val, see, batch_size=20)
    with torch.no_grad():
        wanted = model(training.Normalize(recipe, torch.device("cpu"))(batch.images)).numpy()
    np.testing.assert_allclose(package(batch.images), wanted, atol=1e-4)
    int8 = export.load(built, "int8")
    assert int8.fingerprint != package.fingerprint
    assert 0 < np.abs(int8(batch.images) - wanted).max() < 2


def test_prediction_by_a_package_is_that_of_its_run(built, trained, tmp_path):
    val = data.load_dataset(Recipe(**trained.recipe())).val
    lines = [f"{path}\n" for path in val.path]
    (tmp_path / "all.txt").write_text("".join(lines))
    told = prediction.predict(built, [tmp_path / "all.txt"])
    own = trained.predictions("ema")
    classes = trained.environment()["classes"]
    assert told.class1.tolist() == [classes[k] for k in own.class1]
    assert told.p1.to_numpy() == pytest.approx(own.p1, abs=1e-4)
    assert str(prediction.open_source(built)) == "small 1.0.0, test_resnet, ema weights"
