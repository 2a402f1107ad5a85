"""Custom parts train like built-in ones, are saved with their run, and run only where trusted."""

import functools
import hashlib
import linecache
import multiprocessing
import pickle
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import assert_same_run, train
from torch.nn import functional as F

from workbench import data, export, parts, runs, sweep, training
from workbench.evaluation import comparison
from workbench.parts import PartError
from workbench.recipe import Recipe, RecipeError
from workbench.ui import widgets

CODE = """
import random
from pathlib import Path
import numpy as np
import pandas as pd
import timm
import torch
from torch.nn import functional as F
from workbench import data
from workbench.recipe import Recipe
def ce(logits, targets, power=1.0):
    return F.cross_entropy(logits, targets, reduction="none") ** power
def model(num_classes, name="test_resnet"):
    return timm.create_model(name, num_classes=num_classes)
def same(image, rng):
    image[:] = rng.permutation(image.ravel()).reshape(image.shape) * 0 + image
    return image
def noise(image, rng, sigma=30.0):
    return np.clip(image + rng.normal(0, sigma, image.shape), 0, 255).astype(np.uint8)
def sgd(groups, lr):
    return torch.optim.SGD(groups, lr=lr, momentum=0.9, fused=True)
class Momentum(torch.optim.Optimizer):
    def __init__(self, groups, lr, momentum=0.9):
        super().__init__(groups, {"lr": lr, "momentum": momentum})
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                velocity = self.state[p].setdefault("velocity", torch.zeros_like(p))
                velocity.mul_(group["momentum"]).add_(p.grad).add_(p, alpha=group["weight_decay"])
                p.sub_(velocity, alpha=group["lr"])
def kl(student, teacher, targets, temperature=1.0):
    s, t = (x / temperature for x in (student, teacher))
    return temperature**2 * F.kl_div(
        s.log_softmax(1), t.log_softmax(1), reduction="batchmean", log_target=True
    )
def l2(student, teacher, targets):
    return F.mse_loss(student, teacher)
def frames(data_dir, stored=False):
    content, found = data.load_dataset(Recipe()), []
    for frame in (content.train, content.val):
        label = frame.label.map(lambda i: f"digit {content.classes[i]}")
        paths = {"path": frame.path.map(Path)}
        images = {"image": [Path(p).read_bytes() for p in frame.path]} if stored else paths
        found.append(pd.DataFrame({"label": label, "odd": frame.label % 2} | images))
    return found
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


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> runs.Run:
    return train(small(tmp_path_factory.mktemp("teacher"), epochs=1))


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
    "option, name, more",
    [
        ("loss", "ce", {}),
        ("model", "model", {}),
        ("transform", "same", {}),
        ("optimizer", "sgd", {"decay_norm_and_bias": False, "head_lr_scale": 3.0}),
        ("dataset", "frames", {}),
        ("dataset", "frames", {"cache": True, "workers": 1}),
        ("dataset", "frames", {"dataset_args": {"stored": True}, "cache": True}),
    ],
)
def test_a_part_that_does_what_is_built_in_trains_to_the_same_numbers(
    tmp_path, code, option, name, more
):
    options = {"hflip": 0.5, "crop_scale": [0.5, 1.0], "weight_decay": 0.01, **more}
    options["cache_dir" if "cache" in more else "runs_dir"] = str(tmp_path)
    own = train(small(tmp_path, "own", **options, **{option: f"{code}:{name}"}))
    options.pop("dataset_args", None)
    plain = train(small(tmp_path, "plain", **options))
    pd.testing.assert_frame_equal(metrics(plain), metrics(own), check_exact=True)


@pytest.mark.parametrize(
    "built_in, own, pair, args",
    [("kl", "kl", "logits", {"temperature": 2.0}), ("l2", "l2", "layer4 -> layer4", {})],
)
def test_an_own_distillation_loss_is_that_of_the_same_formula(
    tmp_path, code, teacher, built_in, own, pair, args
):
    options = {"teacher": [str(teacher.path)], "distill_pairs": [pair], "epochs": 1, "seed": 1}
    plain = train(small(tmp_path, "plain", **options, kd_loss=[built_in], **args))
    named = small(tmp_path, "own", **options, kd_loss=[f"{code}:{own}"], kd_loss_args=args)
    columns = ["train_loss", "train_kd_loss", "top1"]
    theirs, ours = (run.metrics()[columns] for run in (plain, train(named)))
    pd.testing.assert_frame_equal(theirs, ours, rtol=1e-5)
    assert ours.train_kd_loss[0] > 0


def test_arguments_reach_a_part_and_change_the_run(tmp_path, code):
    loss = {"loss": f"{code}:ce"}
    plain = train(small(tmp_path, "plain", **loss))
    own = train(small(tmp_path, "own", **loss, loss_args={"power": 2.0}))
    assert metrics(plain).train_loss[0] != metrics(own).train_loss[0]
    assert plain.recipe()["loss_args"] == {} and own.recipe()["loss_args"] == {"power": 2.0}


def test_metrics_are_columns_of_every_epoch_of_both_weights(tmp_path, code, capsys):
    options = {"metrics": [f"{code}:errors"], "ema_decay": 0.9, "eval_every": 2}
    recipe = small(tmp_path, **options)
    run, progress = runs.Run(recipe.folder), widgets.Progress(runs.Run(recipe.folder))
    for row in training.fit(recipe, run):
        progress.show(row)
    table = run.metrics()
    assert f"wrong {table.wrong.iloc[-1]:.0f}  of_zeros" in capsys.readouterr().out
    [shown] = comparison.compare([run.path], weights="ema").table.to_dict("records")
    assert shown["wrong"] == table.ema_wrong.iloc[-1]
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
    optimizer = torch.optim.Adagrad  # of a package
    assert list(training.fit(recipe, given, dataset=mine.frames, loss=mine.ce, optimizer=optimizer))
    found = given.recipe()
    assert found["loss"] == named.recipe()["loss"] == f"mine.py:ce@{digest(code)}"  # no folder
    assert found["dataset"] == f"mine.py:frames@{digest(code)}"
    assert found["optimizer"].startswith("torch.optim.adagrad:Adagrad@")
    forget()
    monkeypatch.setenv("WORKBENCH_TRUST_CODE", "1")
    code.unlink()  # the run folder has it
    assert data.load_dataset(Recipe(**found)).classes[0] == "digit 0"
    assert list(training.fit(Recipe(**found), given)) == []


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def test_a_metric_that_is_added_later_is_empty_in_the_epochs_before(tmp_path, code):
    recipe = small(tmp_path)
    for row in training.fit(recipe, runs.Run(recipe.folder)):
        if row["kind"] == "epoch":
            break
    run = train(recipe.replace(metrics=[f"{code}:errors"]))
    assert run.metrics().wrong.isna().tolist() == [True, False]
    with pytest.raises(runs.RunError, match="another recipe .metrics:"):
        train(recipe)


FEW = """
def few(predictions):
    assert predictions.p1.nunique() <= 4, "too many"
    return {"few": 1.0}
"""  # passes with the four images of the dry run


def test_a_metric_that_fails_in_validation_is_nan_and_the_training_goes_on(tmp_path, code):
    code.write_text(CODE + FEW)
    options = {"metrics": [f"{code}:few", f"{code}:errors"], "ema_decay": 0.9, "epochs": 3}
    with pytest.warns(UserWarning, match="metrics .*few@.* failed: AssertionError: too many") as w:
        run = train(small(tmp_path, **options))
    assert len(w) == 1  # of three epochs and two sets of weights
    table = run.metrics()
    assert table.few.isna().all() and table.ema_few.isna().all() and table.wrong.notna().all()
    assert ",nan," in run.file("metrics.csv").read_text()  # not empty, as without validation
    message = run.status()["message"]
    assert message.startswith("finished: top-1") and "too many; few is nan" in message
    [shown] = comparison.compare([run.path]).table.to_dict("records")
    assert np.isnan(shown["few"]) and shown["wrong"] == table.wrong.iloc[-1]
    plain = train(small(tmp_path, "plain", ema_decay=0.9, epochs=3))
    pd.testing.assert_frame_equal(metrics(run), metrics(plain), check_exact=True)


def test_a_resume_warns_of_a_failed_metric_no_more_and_takes_a_corrected_one(tmp_path, code):
    code.write_text(CODE + FEW)
    recipe = small(tmp_path, metrics=[f"{code}:few"], epochs=3)

    def one_epoch():
        for row in training.fit(recipe, runs.Run(recipe.folder)):
            if row["kind"] == "epoch":
                return

    with pytest.warns(UserWarning, match="few is nan"):
        one_epoch()
    one_epoch()  # a warning is an error in these tests
    code.write_text((CODE + FEW).replace("<= 4", "> 4"))
    with pytest.raises(PartError, match="few.* failed"):  # with four images
        train(recipe)
    code.write_text((CODE + FEW).replace("<= 4", "> 0"))
    run = train(recipe)
    assert run.metrics().few.fillna(-1).tolist() == [-1, -1, 1]
    assert "nan" not in run.status()["message"]


def test_a_dataset_of_one_frame_is_split_into_the_folds_of_the_same_table(tmp_path, code):
    code.write_text(CODE + "def one(data_dir):\n    return frames(data_dir)[0]\n")
    frame = data.load_dataset(Recipe(dataset=f"{code}:frames")).train
    table = frame.assign(label=frame.label.map(lambda i: f"digit {i}"))[["path", "label", "odd"]]
    table.to_parquet(tmp_path / "table.parquet")
    listed = {"dataset": "files", "data_dir": str(tmp_path), "train_root": ["."]}
    listed |= {"train_list": ["table.parquet"], "allow_outside_root": True, "fold": "2/5"}
    own = data.load_dataset(Recipe(dataset=f"{code}:one", fold="2/5"))
    theirs = data.load_dataset(Recipe(**listed))
    assert own.classes == theirs.classes and len(own.val) < len(own.train) / 3
    pd.testing.assert_frame_equal(
        own.val.drop(columns="outside"), theirs.val[[*own.val][:-2] + ["odd"]]
    )
    with pytest.raises(PartError, match="one DataFrame, which fold or val_fraction splits"):
        data.load_dataset(Recipe(dataset=f"{code}:frames", val_fraction=0.5))


def test_a_transform_is_the_same_in_another_process(tmp_path, code, monkeypatch):
    part = parts.load("transform", f"{code}:noise", sigma=3.0)
    sent, image = pickle.dumps(part), np.zeros((4, 4, 3), np.uint8)
    forget()
    code.unlink()
    monkeypatch.delenv("WORKBENCH_TRUST_CODE")  # it was trusted where it was loaded
    there = pickle.loads(sent)(image, np.random.default_rng(0))
    assert np.array_equal(part(image, np.random.default_rng(0)), there) and there.any()


@pytest.mark.slow
def test_loader_processes_that_are_spawned_transform_as_none_do(tmp_path, code):
    options = {"transform": f"{code}:noise", "epochs": 1}
    alone = train(small(tmp_path, "alone", **options))
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    try:
        spawned = train(small(tmp_path, "spawned", workers=1, **options))
    finally:
        multiprocessing.set_start_method(before, force=True)
    pd.testing.assert_frame_equal(metrics(alone), metrics(spawned), check_exact=True)


# ---- the run folder


def test_a_stopped_run_resumes_exactly_and_a_changed_part_is_refused(tmp_path, code, teacher):
    options = {"loss": f"{code}:ce", "transform": f"{code}:noise", "model": f"{code}:model"}
    options |= {"optimizer": f"{code}:Momentum", "dataset": f"{code}:frames"}
    options |= {"teacher": [str(teacher.path)], "kd_loss": [f"{code}:kl"]}
    options |= {"metrics": [f"{code}:errors"], "log_every": 1, "checkpoint_minutes": 0.0}
    whole = train(small(tmp_path, "whole", **options))
    recipe = small(tmp_path, "stopped", **options)
    for row in training.fit(recipe, runs.Run(recipe.folder)):
        if row["step"] == 3:
            break
    stopped = train(recipe)
    assert_same_run(whole, stopped)
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
    names |= {"dataset": f"{code}:frames", "optimizer": f"{code}:Momentum"}
    recipe = small(tmp_path, **names, transform=f"{code}:noise")
    run, params = train(recipe), tmp_path / "params.yaml"
    recipe.replace(name="other").to_yaml(params)
    image = data.load_dataset(recipe).val.path.iloc[0]
    assert traced.read_text() == "x"
    forget()
    monkeypatch.delenv("WORKBENCH_TRUST_CODE")
    weights = ["-p", f"weights={run.path}"]
    teacher = ["-p", f"teacher={run.path}", "-p", "model=test_resnet", "-p", "loss=ce"]
    teacher += [
        "-p",
        "metrics=[]",
        "-p",
        "transform=",
        "-p",
        "optimizer=sgd",
        "-p",
        "dataset=digits",
    ]
    for words in (
        ["train", params],
        ["train", params, *weights],
        ["train", params, *teacher],
        ["check-data", params],
        ["train", params, "--smoke"],
        ["doctor", params],
        ["export", run.path, "--out", tmp_path / "package"],
        ["predict", run.path, image, "--out", tmp_path / "out.csv"],
    ):
        done = command(*words)
        assert done.returncode == 1 and "--trust-code" in done.stderr, (words, done)
    for words in (["compare", run.path], ["runs", tmp_path]):
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
        "def part(logits, targets): return 3.0": "gives float; it must",
        "def part(logits, targets): return logits.sum(1) / 0": "must be finite",
        "def part(logits, targets): return logits.detach().sum(1)": "differentiable",
        "def part(logits, targets): return logits.sum(1) * torch.rand(1)": "global random",
        "part = 3": "has no part",
        "def part(logits, targets): return logits.argmax(1)": "differentiable",
        "import nothing_of_that_name": "No module named",
        "def part(": "SyntaxError",
    },
    "kd_loss": {
        "def part(student, teacher, targets): return (student - teacher).sum(1)": "the mean over",
        "def part(student, teacher): return student.mean()": "takes 2 positional arguments",
        "def part(student, teacher, targets): return student.mean() / 0": "must be finite",
        "def part(student, teacher, targets): return teacher.mean()": "differentiable",
        "def part(student, teacher, targets): return student.mean().item()": "gives float; it must",
        "def part(student, teacher, targets): return F.dropout(student).mean()": "global random",
    },
    "optimizer": {
        "def part(groups, lr): return None": "must give a torch.optim.Optimizer of the groups",
        "def part(groups): return torch.optim.SGD(groups)": "unexpected keyword argument 'lr'",
        "def part(groups, lr): return torch.optim.SGD(groups[1]['params'], lr)": "of the groups",
        "def part(groups, lr): raise ValueError('no lr')": "failed: ValueError: no lr",
        """class part(torch.optim.SGD):
            def step(self):
                self.steps = getattr(self, "steps", 0) + 1
                for group in self.param_groups:
                    group["lr"] = group["lr"] / self.steps
                super().step()""": "steps differently after a resume",
        """class part(torch.optim.SGD):
            def step(self):
                super().step()
                for p in self.param_groups[0]["params"]:
                    self.state[p]["f"] = lambda: 0""": "failed: .*Can't pickle|failed: .*lambda",
        """class part(torch.optim.SGD):
            def step(self):
                for group in self.param_groups:
                    group["lr"] = 0.1
                super().step()""": "ignores the lr of its groups",
        """class part(torch.optim.SGD):
            def step(self):
                for group in self.param_groups:
                    group["weight_decay"] = 0.0
                super().step()""": "ignores the weight_decay of its groups",
        """class part(torch.optim.SGD):
            def step(self):
                super().step()
                self.param_groups[0]["params"][0].data += torch.randn(1)""": "global random",
        """class part(torch.optim.SGD):
            def step(self):
                self.param_groups[0]["params"][0].data /= 0""": "infinite or nan",
    },
    "dataset": {
        "def part(data_dir): return pd.DataFrame({'file': [], 'label': []})": "(train, val)",
        "def part(data_dir): return None": "gives NoneType; it must give (train, val)",
        "def part(data_dir): return [], []": "gives tuple; it must give (train, val)",
        "def part(): return None": "takes 0 positional arguments",
        "def part(data_dir): return open('no list here')": "FileNotFoundError",
        "def part(data_dir): return [pd.DataFrame({'file': ['a.png']})] * 2": "no column label",
        "def part(data_dir): return [pd.DataFrame({'label': [0]})] * 2": "no column file",
        "def part(data_dir): return [pd.DataFrame({'file': [], 'label': []})] * 2": "has no rows",
        """def part(data_dir):
            train = pd.DataFrame({"file": ["a.png", "b.png"], "label": ["cat", "dog"]})
            return train, train.replace({"dog": "cow", "b.png": "c.png"})""": "labels .'cow'.",
        """def part(data_dir):
            labels = [0, None]
            return [pd.DataFrame({"file": ["a", "b"], "label": labels})] * 2""": "row 1 has no",
        """def part(data_dir):
            order = np.random.permutation(2)
            return [pd.DataFrame({"file": ["a", "b"], "label": order})] * 2""": "global random",
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
        "def part(image, rng): return np.random.default_rng().permutation(image)": "two images",
    },
    "metrics": {
        "def part(predictions): return 0.5": "gives 0.5; it must give {name: number}",
        "def part(predictions): return {'a': 'b'}": "must give {name: number}",
        "def part(predictions): return {'a': predictions.camera.mean()}": "camera",
        "def part(predictions): return {'top1': 0.5}": "gives 'top1', another column",
        "def part(predictions): return {'ema_wrong': 0.5}": "gives 'ema_wrong', another column",
        "def part(predictions): return {'a': np.random.rand()}": "global random",
    },
}


@pytest.mark.parametrize("option, text, words", [(o, t, w) for o in BAD for t, w in BAD[o].items()])
def test_a_bad_part_is_named_before_the_first_step(tmp_path, code, teacher, option, text, words):
    imports = (
        "import random, numpy as np, pandas as pd, torch\nfrom torch.nn import functional as F"
    )
    code.write_text(f"{imports}\n{text}")
    more = {"weight_decay": 0.01} | (
        {"teacher": [str(teacher.path)]} if option == "kd_loss" else {}
    )
    recipe = small(tmp_path, **more, **{option: f"{code}:part"})
    with pytest.raises(PartError, match=words.replace("(train, val)", ".train, val.")) as caught:
        train(recipe)
    assert str(caught.value).startswith(option) and "mine.py:part" in str(caught.value)
    assert "\n" not in str(caught.value)
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
        ({"loss_args": {"gamma": 1}}, "loss_args: .* has no effect, since loss is 'ce'"),
        ({"model_args": {"width": 1}}, "model_args: .* has no effect, since model is 'test_r"),
        ({"dataset_args": {"a": 1}}, "dataset_args: .* has no effect, since dataset is 'digits'"),
        ({"kd_loss_args": {"a": 1}}, "kd_loss_args: .* has no effect, since kd_loss is"),
        ({"dataset": "mine.py:f", "train_list": ["a.csv"]}, "train_list: .* has no effect"),
        ({"dataset": "mine.py:f", "dataset_args": {"a": {}}}, "dataset_args: a is {}"),
        ({"dataset": "mine.py"}, "dataset: 'mine.py'"),
        ({"kd_loss": ["mine"], "teacher": ["t"]}, "kd_loss: .'mine'. at"),
        ({"optimizer": "mine.py:f", "momentum": 0.8}, "momentum: 0.8 has no effect"),
        ({"transform_args": {"a": 1}}, "transform_args: .*no effect"),
        ({"model": "mine.py:net", "drop_path": 0.1}, "drop_path is for timm's models"),
        ({"loss": "mine.py:f", "label_smoothing": 0.1}, "does not use label_smoothing"),
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


def test_a_file_that_imports_from_its_folder_is_refused(code):
    (code.parent / "helper.py").write_text("K = 1.0\n")
    code.write_text("from helper import K\n" + CODE)
    with pytest.raises(PartError, match="imports helper from its folder, which a run would not"):
        parts.load("loss", f"{code}:ce")


def test_a_default_of_a_notebook_function_that_has_changed_is_refused(tmp_path):
    import __main__

    source = "def scaled(logits, targets, power=POWER):\n    return logits[:, 0] * power\n"
    path = tmp_path / "cell.py"
    path.write_text(source)
    linecache.checkcache()
    vars(__main__)["POWER"] = 2.0
    exec(compile(source, str(path), "exec"), vars(__main__))
    try:
        assert parts.pin(small(tmp_path), loss=__main__.scaled).loss.startswith("notebook:scaled@")
        vars(__main__)["POWER"] = 3.0
        with pytest.raises(PartError, match=r"has the defaults \(2.0,\) and would now have"):
            parts.pin(small(tmp_path), loss=__main__.scaled)
    finally:
        del vars(__main__)["POWER"], vars(__main__)["scaled"]


def test_text_in_arguments_stays_text(code):
    args = Recipe(loss=f"{code}:ce", loss_args={"mode": "2", "power": "3e-1"}).loss_args
    assert args == {"mode": "2", "power": 0.3}


def test_a_sweep_over_a_custom_part_compares_all_of_its_runs(tmp_path, code):
    axes = {"loss": ["ce", "focal", f"{code}:ce"]}
    rows = list(sweep.sweep(small(tmp_path, epochs=1), axes))
    assert [row["state"] for row in rows] == ["finished"] * 3
    assert len(sweep.finished(sweep.folder_of(small(tmp_path), axes))) == 3
