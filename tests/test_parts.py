"""Custom parts train like built-in ones, are saved with their run, and run only where trusted."""

import functools
import hashlib
import sys
from pathlib import Path

import pandas as pd
import pytest
from helpers import train
from torch.nn import functional as F

from workbench import data, export, parts, runs, training
from workbench.parts import PartError
from workbench.recipe import Recipe, RecipeError

CODE = """
import random
import numpy as np
import timm
import torch
from torch.nn import functional as F
def ce(logits, targets, power=1.0):
    return F.cross_entropy(logits, targets, reduction="none") ** power
def model(num_classes, name="test_resnet"):
    return timm.create_model(name, num_classes=num_classes)
def same(image, rng):
    image[:] = rng.permutation(image.ravel()).reshape(image.shape) * 0 + image
    return image
def noise(image, rng, sigma=30.0):
    return np.clip(image + rng.normal(0, sigma, image.shape), 0, 255).astype(np.uint8)
def errors(predictions):
    wrong = predictions.label != predictions.class1
    return {"wrong": float(wrong.sum()), "of_zeros": 100 * wrong[predictions.label == 0].mean()}
"""


@pytest.fixture
def code(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("WORKBENCH_TRUST_CODE", "1")
    path = tmp_path / "mine.py"
    path.write_text(CODE)
    return path


def small(folder: Path, name: str = "run", **options) -> Recipe:
    defaults = {"epochs": 2, "train_fraction": 0.1, "workers": 0, "runs_dir": str(folder)}
    return Recipe(name=name, **{**defaults, **options})


def forget() -> None:
    """As in a new process."""
    parts.LOADED.clear(), parts.SOURCES.clear()
    for name in [name for name in sys.modules if name.startswith("workbench_part_")]:
        del sys.modules[name]


def metrics(run: runs.Run) -> pd.DataFrame:
    return run.metrics()[["train_loss", "val_loss", "top1"]]


# ---- equal to what is built in


@pytest.mark.parametrize(
    "option, name", [("loss", "ce"), ("model", "model"), ("transform", "same")]
)
def test_a_part_that_does_what_is_built_in_trains_to_the_same_numbers(tmp_path, code, option, name):
    options = {"hflip": 0.5, "crop_scale": [0.5, 1.0]}
    plain = train(small(tmp_path, "plain", **options))
    own = train(small(tmp_path, "own", **options, **{option: f"{code}:{name}"}))
    pd.testing.assert_frame_equal(metrics(plain), metrics(own), check_exact=True)


def test_arguments_reach_a_part_and_change_the_run(tmp_path, code):
    loss = {"loss": f"{code}:ce"}
    plain = train(small(tmp_path, "plain", **loss))
    own = train(small(tmp_path, "own", **loss, loss_args={"power": 2.0}))
    assert metrics(plain).train_loss[0] != metrics(own).train_loss[0]
    assert plain.recipe()["loss_args"] == {} and own.recipe()["loss_args"] == {"power": 2.0}


def test_metrics_are_columns_of_every_epoch_of_both_weights(tmp_path, code):
    options = {"metrics": [f"{code}:errors"], "ema_decay": 0.9, "eval_every": 2}
    run = train(small(tmp_path, **options))
    table = run.metrics()
    assert table.wrong.isna().tolist() == [True, False]
    for weights, prefix in (("raw", ""), ("ema", "ema_")):
        frame = run.predictions(weights)
        wrong = frame.label != frame.class1
        assert table[f"{prefix}wrong"].iloc[-1] == wrong.sum()
        zeros = 100 * wrong[frame.label == 0].mean()
        assert table[f"{prefix}of_zeros"].iloc[-1] == pytest.approx(zeros)


def test_objects_are_taken_as_the_files_they_are_from(tmp_path, code, monkeypatch):
    named = train(small(tmp_path, "named", loss=f"{code}:ce"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("WORKBENCH_TRUST_CODE")
    import mine

    recipe = small(tmp_path, "given")
    given = runs.Run(recipe.folder)
    assert list(training.fit(recipe, given, loss=mine.ce))
    assert given.recipe()["loss"] == named.recipe()["loss"] == f"{code}:ce@{digest(code)}"


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


# ---- the run folder


def test_a_stopped_run_resumes_exactly_and_a_changed_part_is_refused(tmp_path, code):
    options = {"loss": f"{code}:ce", "transform": f"{code}:noise", "model": f"{code}:model"}
    options |= {"metrics": [f"{code}:errors"], "log_every": 1, "checkpoint_minutes": 0.0}
    whole = train(small(tmp_path, "whole", **options))
    recipe = small(tmp_path, "stopped", **options)
    for row in training.fit(recipe, runs.Run(recipe.folder)):
        if row["step"] == 3:
            break
    stopped = train(recipe)
    assert whole.file("metrics.csv").read_bytes() == stopped.file("metrics.csv").read_bytes()
    code.write_text(CODE + "# another\n")
    with pytest.raises(runs.RunError, match="another recipe .*loss: .*there, .*here"):
        train(recipe)
    assert recipe.replace(name="new").fingerprint == small(tmp_path, **options).fingerprint
    assert parts.pin(recipe).fingerprint != Recipe(**stopped.recipe()).fingerprint


def test_a_run_opens_without_the_file_its_model_is_from(tmp_path, code):
    run = train(small(tmp_path, model=f"{code}:model", metrics=[f"{code}:errors"]))
    [saved] = (run.path / "parts").iterdir()
    assert saved.read_text() == CODE and saved.stem == digest(code)
    code.unlink()
    forget()
    content = data.load_dataset(Recipe(**run.recipe()))
    table = export.predict(run.path, [content.val.path.iloc[0]])
    assert table.error.tolist() == [""]


# ---- trust


def test_no_command_runs_code_that_is_not_trusted(tmp_path, code, command, monkeypatch):
    traced = tmp_path / "trace"
    write = f"with open({str(traced)!r}, 'a') as trace:\n    trace.write('x')\n"
    code.write_text(write + CODE)
    names = {"model": f"{code}:model", "loss": f"{code}:ce", "metrics": [f"{code}:errors"]}
    recipe = small(tmp_path, **names, transform=f"{code}:noise")
    run, params = train(recipe), tmp_path / "params.yaml"
    recipe.replace(name="other").to_yaml(params)
    image = data.load_dataset(recipe).val.path.iloc[0]
    assert traced.read_text() == "x"
    forget()
    monkeypatch.delenv("WORKBENCH_TRUST_CODE")
    weights = ["-p", f"weights={run.path}"]
    teacher = ["-p", f"teacher={run.path}", "-p", "model=test_resnet", "-p", "loss=ce"]
    teacher += ["-p", "metrics=[]", "-p", "transform="]
    for words in (
        ["train", params],
        ["train", params, *weights],
        ["train", params, *teacher],
        ["doctor", params],
        ["export", run.path, "--out", tmp_path / "package"],
        ["predict", run.path, image, "--out", tmp_path / "out.csv"],
    ):
        done = command(*words)
        assert done.returncode == 1 and "--trust-code" in done.stderr, (words, done)
    for words in (["compare", run.path], ["runs", tmp_path], ["check-data", params]):
        assert command(*words).returncode == 0, words
    assert traced.read_text() == "x"
    trusted = command("predict", run.path, image, "--out", tmp_path / "o.csv", "--trust-code")
    assert trusted.returncode == 0
    assert traced.read_text() == "xx"


# ---- parts that cannot be used

BAD = {
    "loss": {
        "def part(logits, targets): return F.cross_entropy(logits, targets)": "not their mean",
        "def part(logits): return logits": "takes 1 positional argument",
        "def part(logits, targets): return 3.0": "gives float for",
        "def part(logits, targets): return logits.sum(1) / 0": "must be finite",
        "def part(logits, targets): return logits.detach().sum(1)": "differentiable",
        "def part(logits, targets): return logits.sum(1) * torch.rand(1)": "global random",
        "part = 3": "has no part",
        "import nothing_of_that_name": "No module named",
        "def part(": "SyntaxError",
    },
    "model": {
        "def part(classes): return torch.nn.Flatten()": "gives .2, 3072. for 2 images of 32 pixels",
        "def part(): return None": "takes 0 positional arguments",
        "def part(classes): raise KeyError('width')": "KeyError: 'width'",
    },
    "transform": {
        "def part(image, rng): return image / 255": "float64 .32, 32, 3.",
        "def part(image, rng): return image[:8]": "uint8 .8, 32, 3.",
        "def part(image, rng): return None": "NoneType",
        "def part(image, rng): return (image * np.random.rand()).astype(np.uint8)": "global random",
        "def part(image, rng): return (image * random.random()).astype(np.uint8)": "global random",
        "from os import urandom\ndef part(image, rng): return image + urandom(1)[0]": "two images",
    },
    "metrics": {
        "def part(predictions): return 0.5": "gives 0.5; it must give {name: number}",
        "def part(predictions): return {'a': 'b'}": "must give {name: number}",
        "def part(predictions): return {'a': predictions.camera.mean()}": "camera",
    },
}


@pytest.mark.parametrize("option, text, words", [(o, t, w) for o in BAD for t, w in BAD[o].items()])
def test_a_bad_part_is_named_before_the_first_step(tmp_path, code, option, text, words):
    imports = "import random, numpy as np, torch\nfrom torch.nn import functional as F\n"
    code.write_text(imports + text)
    recipe = small(tmp_path, **{option: f"{code}:part"})
    with pytest.raises(PartError, match=words) as caught:
        train(recipe)
    assert option in str(caught.value) and f"{code}:part" in str(caught.value)
    assert not runs.Run(recipe.folder).file("last.pt").exists()


def test_what_has_no_source_or_name_is_refused(tmp_path):
    recipe = small(tmp_path)
    gamma = 2.0

    def closure(logits, targets):
        return F.cross_entropy(logits, targets, reduction="none") ** gamma

    for given in (lambda logits, targets: logits, functools.partial(F.cross_entropy), closure):
        with pytest.raises(PartError, match="loss .*give a function or class with a name"):
            training.fit(recipe, runs.Run(recipe.folder), loss=given)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"loss": "margin"}, "loss: 'margin'"),
        ({"loss": "mine.py:"}, "loss: 'mine.py:'"),
        ({"loss_args": {"gamma": 1}}, "loss_args: .*not for 'ce'"),
        ({"model_args": {"width": 1}}, "model_args: .*not for 'test_resnet'"),
        ({"transform_args": {"a": 1}}, "transform_args: .*no effect"),
        ({"model": "mine.py:net", "drop_path": 0.1}, "drop_path is for timm's models"),
        ({"loss": "mine.py:f", "label_smoothing": 0.1}, "label_smoothing does not reach"),
        (
            {"transform": "mine.py:t", "augment_on_device": True, "hflip": 0.5},
            "device off",
        ),
    ],
)
def test_options_that_do_not_go_with_a_part_are_refused(options, words):
    with pytest.raises(RecipeError, match=words):
        Recipe(**options)


@pytest.mark.parametrize("reference", ["nowhere.py:part", "no.such.module:part", "json:nothing"])
def test_a_reference_to_nothing_is_refused(tmp_path, code, reference):
    with pytest.raises(PartError, match=f"loss '{reference}"):
        train(small(tmp_path, loss=reference))
