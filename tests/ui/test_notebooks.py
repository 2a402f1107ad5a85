"""Notebooks: committed clean, run through papermill, stopped and resumed in a real kernel."""

import ast
import asyncio
import html
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import nbformat
import pandas as pd
import psutil
import pytest
import torch
from helpers import train
from jupyter_client.manager import start_new_kernel

from workbench import ROOT, data, distillation, export, params_files, runs, training
from workbench.recipe import Recipe

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
QUICK = {"train_fraction": 0.25, "epochs": 2, "workers": 0, "log_every": 1}
STRIKES = {  # what a notebook has to show and a resume has to restore
    "optimizer": "lamb",
    "lr": 0.005,
    "loss": "bce",
    "bce_sum": True,
    "randaug_n": 2,
    "mixup_alpha": 0.2,
    "cutmix_alpha": 1.0,
    "erase_prob": 0.25,
    "ema_decay": 0.9,
}


def cells(path: Path | str) -> list:
    """The code cells of a notebook."""
    found = nbformat.read(ROOT / "notebooks" / path, as_version=4).cells
    return [cell for cell in found if cell.cell_type == "code"]


def run_cells(names: dict[str, object], code: list) -> None:
    """Executes cells in a namespace, in this process."""
    for cell in code:
        ran = compile(cell.source, cell.id, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        if waiting := eval(ran, names):
            asyncio.run(waiting)


def papermill(notebook: str, output: Path, *words: str) -> list[str]:
    command = [sys.executable, "-m", "papermill", str(ROOT / "notebooks" / notebook), str(output)]
    return [*command, "-k", "python3", "--no-progress-bar", "--log-output", *words]


def params_file(folder: Path, **options) -> str:
    path = folder / "params.yaml"
    path.write_text(json.dumps({**QUICK, "runs_dir": str(folder / "runs"), **options}))
    return str(path)


class Executed:
    """A notebook that papermill ran: its outputs by the names of the cells."""

    def __init__(self, notebook: str, root: Path, *words: str):
        output = root / "out.ipynb"
        environment = {**os.environ, "WORKBENCH_ROOT": str(root)}
        command = papermill(notebook, output, *words)
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        self.cells = {c.id: c.outputs for c in cells(output)}
        self.text = "".join(self.printed(name) for name in self.cells)
        outputs = [o for outputs in self.cells.values() for o in outputs]
        assert not [o for o in outputs if o.get("name") == "stderr"]
        assert "it/s" not in self.text and "0%|" not in self.text and "\r" not in self.text
        assert not [o for o in outputs if any("widget" in kind for kind in o.get("data", {}))]

    def printed(self, name: str) -> str:
        return "".join(o.get("text", "") for o in self.cells[name])

    def shown(self, name: str, kind: str = "text/html") -> list[str]:
        """What a cell displayed, of one MIME type."""
        return [o.data[kind] for o in self.cells[name] if kind in o.get("data", {})]

    def figures(self) -> dict[str, int]:
        """Images by cell, of the cells that show some."""
        count = {name: len(self.shown(name, "image/png")) for name in self.cells}
        return {name: n for name, n in count.items() if n}

    def table(self, name: str) -> dict[str, dict[str, str]]:
        """The table that a cell shows: its rows by their names, values by their columns."""
        [shown] = self.shown(name)
        rows = [
            [html.unescape(text) for text in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.S)]
            for row in re.findall(r"<tr.*?</tr>", shown, re.S)
        ]
        columns, *rest = [row for row in rows if any(row[1:])]  # an index may have a named line
        return {row[0]: dict(zip(columns[1:], row[1:], strict=True)) for row in rest}


def shortened(root: Path, **params: dict) -> None:
    """Shipped params files in a root folder, changed to be trained in seconds."""
    (root / "params").mkdir()
    for name, changes in params.items():
        values = params_files.read(ROOT / "params" / f"{name}.yaml")
        (root / "params" / f"{name}.yaml").write_text(json.dumps({**values, **QUICK, **changes}))


def contents(run: runs.Run) -> dict[str, tuple]:
    """Bytes and times of all that a training writes."""
    paths = [p for p in run.path.iterdir() if not p.name.startswith("lock")]
    return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in paths}


# ---- as committed


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_committed_notebook_is_in_its_canonical_form(path):
    text = path.read_text(encoding="utf-8")
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    assert text.endswith("}\n")
    first = notebook.cells[0]
    assert first.cell_type == "markdown" and first.source.startswith("# ")
    assert "**Question:**" in first.source and "papermill" in first.source
    for cell in notebook.cells:
        assert cell.id.replace("-", "").isalpha(), f"{cell.id} is no readable id"
        assert set(cell.metadata) <= {"tags", "jupyter"}
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None
            if "parameters" not in cell.metadata.get("tags", []):
                assert cell.source.count("\n") < 25, f"{cell.id} does not fit on a screen"


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p.stem < "05"], ids=lambda p: p.stem)
def test_the_parameters_cell_has_every_option_at_its_default(path):
    """Otherwise a params file would have another meaning for papermill than for the command."""
    [tagged] = [c for c in cells(path) if "parameters" in c.metadata.get("tags", [])]
    generated, committed = {}, {}
    exec(Recipe.parameters_cell(), generated)
    exec(tagged.source, committed)
    assert committed == generated


# ---- a training


@pytest.mark.slow
def test_a_misspelt_option_ends_papermill_with_a_message_and_leaves_no_run(tmp_path):
    params = params_file(tmp_path, lerning_rate=0.5)
    command = papermill("02_baseline.ipynb", tmp_path / "out.ipynb", "-f", params)
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "lerning_rate: no such option; the nearest is 'lr'" in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_papermill_killed_in_training_resumes_and_ends_as_if_undisturbed(tmp_path):
    undisturbed = train(Recipe(**QUICK, **STRIKES, runs_dir=str(tmp_path / "undisturbed")))
    params = params_file(tmp_path, checkpoint_minutes=0, **STRIKES)
    run = runs.Run(tmp_path / "runs" / "baseline-seed0")
    command = papermill("02_baseline.ipynb", tmp_path / "out.ipynb", "-f", params)
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while first.poll() is None and len(run.steps()) < 5:
        time.sleep(0.05)
    assert first.poll() is None, "the first run ended by itself"
    for process in [*psutil.Process(first.pid).children(recursive=True), psutil.Process(first.pid)]:
        process.kill()
    first.wait()
    while run.locked():
        time.sleep(0.05)
    assert run.status()["state"] == "interrupted"

    done = Executed("02_baseline.ipynb", tmp_path, "-f", params)
    assert run.status()["state"] == "finished"
    assert run.file("metrics.csv").read_bytes() == undisturbed.file("metrics.csv").read_bytes()
    assert sum(done.figures().values()) >= 5
    assert "epoch   2" in done.text and "finished: top-1" in done.text
    assert "11 steps an epoch of 324 images" in done.text
    assert "warning: mixing in 2 epochs" in done.text
    millions = run.environment()["parameters"] / 1e6
    cost = f"test_resnet: {millions:.3f} M parameters, 0.0041 G multiply-adds, "
    assert cost in done.printed("model")
    kind, measured = run.choose_weights()
    assert done.printed("why") == f"{run.path}/last.pt [{kind}] {measured}\n"


@pytest.mark.slow
def test_the_notebook_command_prints_counts_a_line_per_epoch_and_the_result(tmp_path):
    """Under a name that papermill would take for a number; then a start that fails."""
    (tmp_path / "params.yaml").write_text(json.dumps(QUICK))
    command = [sys.executable, "-m", "workbench", "notebook"]
    command += [ROOT / "notebooks" / "02_baseline.ipynb", tmp_path / "params.yaml"]
    command += ["-p", "name=1_000", "-p", "model=test_resnet"]
    environment = {**os.environ, "WORKBENCH_ROOT": str(tmp_path), "PYTHONPATH": str(ROOT)}
    options = {"capture_output": True, "text": True, "env": environment}
    done = subprocess.run(command, **options)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    run = runs.Run(tmp_path / "runs" / "1_000-seed0")
    assert run.status()["state"] == "finished" and run.file("02_baseline.ipynb").exists()
    lines = done.stdout.splitlines()
    assert all(lines), "no blank lines"
    assert "Executing" not in done.stdout and "WARNING" not in done.stdout
    assert len([x for x in lines if x.startswith("324 training and 500 validation")]) == 1
    assert [x.split()[1] for x in lines if x.startswith("epoch ")] == ["1", "2"]
    assert run.status()["message"] in lines and lines.count(f"run folder: {run.path}") == 1
    assert "-p name=1_000 -p model=test_resnet -p seed=1" in lines[-1]

    failed = subprocess.run([*command, "-p", "dataset=files", "-p", "data_dir=nowhere"], **options)
    assert failed.returncode == 1 and "nowhere" in failed.stderr
    assert "finished: top-1" not in failed.stdout and "last checkpoint" not in failed.stderr


LOOP = "for row in training.fit(recipe, run):\n    pass"
BUTTONS = "await widgets.train(recipe, run)"


@pytest.mark.slow
@pytest.mark.parametrize("loop, why", [(LOOP, "Ctrl-C"), (BUTTONS, "request")])
def test_interrupt_in_a_kernel_ends_the_cell_normally_and_the_kernel_lives(tmp_path, loop, why):
    manager, client = start_new_kernel(kernel_name="python3")

    def status_of(message: str) -> str:
        """Of a cell that was sent; replies to earlier messages may come first."""
        while True:
            reply = client.get_shell_msg(timeout=60)
            if reply["parent_header"]["msg_id"] == message:
                return reply["content"]["status"]

    try:
        run = runs.Run(tmp_path / "baseline-seed0")
        message = client.execute(f"""
from workbench import runs, training
from workbench.ui import widgets
from workbench.recipe import Recipe
recipe = Recipe(epochs=500, workers=2, runs_dir={str(tmp_path)!r})
run = runs.Run(recipe.folder)
{loop}
""")
        deadline = time.monotonic() + 120
        while len(run.steps()) < 3 and time.monotonic() < deadline:
            time.sleep(0.1)
        manager.interrupt_kernel()
        assert status_of(message) == "ok"
        assert run.status()["state"] == "stopped" and why in run.status()["message"]
        assert status_of(client.execute("alive = len(run.metrics().columns)")) == "ok"
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


# ---- the other notebooks


@pytest.mark.slow
@pytest.mark.parametrize("params", ["", "digits_strikes"])
def test_the_augmentation_notebook_shows_photographs_or_the_data_of_a_recipe(tmp_path, params):
    shutil.copytree(ROOT / "params", tmp_path / "params")
    words = ["-f", str(tmp_path / "params" / f"{params}.yaml")] if params else []
    done = Executed("01_augmentation.ipynb", tmp_path, *words)
    drawn = {"grid": 3, "sweep": 2, "model-inputs": 1, "mixed": 1, "randaugment": 1}
    kind = "image/png" if params else "image/jpeg"  # JPEG for photographs
    sheets = {name: len(done.shown(name, kind)) for name in drawn}
    assert sheets == drawn
    assert {"distances": 2, "lr": 1}.items() <= done.figures().items()
    [shown] = done.shown("try")  # the widgets' static representations
    assert "<pre>crop_scale" in shown and f"data:{kind}" in shown
    [table] = done.shown("randaugment")
    assert "solarize_add_all" in table and "of the side" in table
    [title] = done.shown("checks", "text/markdown")
    if params:
        assert title.startswith("# digits_strikes") and "1,297 training images" in done.text
        changed = done.shown("checks")[0]
        assert "mixup_alpha" in changed and "crop_ratio" not in changed
        assert "randaug_n: 2  #" in shown
    else:
        assert "24 training images of 3 classes" in done.text
        assert "every option at its default" in done.printed("checks")


@pytest.mark.slow
def test_the_deployment_notebook_exports_a_run_and_predicts(tmp_path):
    recipe = Recipe(**QUICK, runs_dir=str(tmp_path / "runs"))
    train(recipe)
    words = ["-p", "run", str(recipe.folder), "-p", "out", str(tmp_path / "out")]
    words += ["-p", "int8_points", "-100"]  # int8 is left out
    done = Executed("06_deploy.ipynb", tmp_path, *words)
    [package] = (tmp_path / "out").iterdir()
    report, files = export.read_report(package), export.check(package)
    assert report["images"] == 500 and list(report["formats"]) == ["torch", "onnx", "int8"]
    assert "model.onnx" in files and "model_int8.onnx" not in files
    assert "not in the package: int8 loses" in done.text
    assert "int8" in done.shown("report")[0]
    top1 = f"**Top-1 {report['formats']['torch']['top1']:.2f} %**"
    assert top1 in done.shown("card", "text/markdown")[0]
    assert done.figures()["try"] == 1
    assert "flips" in done.figures() or report["formats"]["int8"]["flips"] == 0


@pytest.mark.slow
def test_the_distillation_notebook_distils_and_compares(tmp_path):
    """Run All without parameters, its teacher first; then the same recipe by name, all finished."""
    shortened(tmp_path, digits_teacher={}, digits_distillation={})
    first = Executed("03_distillation.ipynb", tmp_path)
    names = "demo_student", "demo_student_alone", "demo_teacher"
    student, alone, teacher = (runs.Run(tmp_path / "runs" / f"{name}-seed0") for name in names)
    source, top1 = "runs/demo_teacher-seed0", teacher.metrics().iloc[-1].top1
    assert f"top-1 {top1:.2f} (n=500)" in first.printed("teacher")

    cells = ["teacher-outputs", "curves", "both-curves", "gains", "copied", "why"]
    assert first.figures() == dict.fromkeys(cells, 1)
    report = first.table("report")
    assert float(report["val_top1"][source]) == pytest.approx(top1, abs=1)  # in bf16, maybe
    assert 0 < float(report["step_share"][source]) < 100
    assert f"teacher {source}, resnet10t, 4.9 million parameters" in first.printed("findings")
    assert "teacher logits are cached in" in first.printed("training")
    assert "(task " in first.printed("training")
    assert f"student alone: {alone.path}" in first.printed("alone")

    table = first.table("result")
    assert list(table) == ["alone", "distilled", "teacher"]
    for row, run in zip(table.values(), (alone, student, teacher), strict=True):
        last = run.metrics().iloc[-1]
        titles = {"top1": "top-1 (%)", "top5": "top-5 (%)", "val_loss": "validation loss (nats)"}
        for column, title in titles.items():
            assert row[title] in (f"{last[column]:.2f}", f"{last[column]:.3f}")
        assert row["validation images"] == "500"
    frames = [run.predictions("raw") for run in (student, alone, teacher)]
    ours, theirs, taught = [(frame.class1 == frame.label) for frame in frames]
    assert f"only the distilled student is right: {(ours & ~theirs).sum()} images" in first.text
    assert f"only the student alone is right: {(theirs & ~ours).sum()} images" in first.text
    wrong = {float(row["wrong"]) for row in first.table("shared-errors").values()}
    assert wrong == {(~taught).sum()}
    assert first.printed("next").count("finished: top-1") == 2

    assert student.environment()["teachers"][0]["source"] == source
    assert student.environment()["teacher_logits"] == {"requests": 2 * 324, "hits": 0}
    assert "train_kd_loss" in student.metrics() and "train_kd_loss" not in alone.metrics()
    assert alone.recipe()["teacher"] == [] and alone.recipe()["batch_size"] == 32

    before = [contents(run) for run in (student, alone, teacher)]
    params = str(tmp_path / "params" / "digits_distillation.yaml")
    words = ["-p", "name", "demo_student", "-p", "teacher", source]
    again = Executed("03_distillation.ipynb", tmp_path, "-f", params, *words)
    assert again.printed("training").startswith("nothing to do: finished: top-1")
    assert "(n=500)" not in again.printed("teacher")
    assert "epoch" not in again.printed("alone")
    assert again.table("result") == table and again.figures() == first.figures()
    assert [contents(run) for run in (student, alone, teacher)] == before


@pytest.fixture
def unequal_letters(tmp_path) -> dict[str, object]:
    """Letters in two lists of custom_cls form: six times as many training images of class a.

    One image is truncated, and one is listed twice, with different labels.
    """
    root = tmp_path / "letters"
    root.mkdir()
    content = data.load_dataset(Recipe(dataset="letters"))
    lines = {"train": [], "val": []}
    for side, frame in (("train", content.train), ("val", content.val)):
        for label, group in frame[frame.label < 8].groupby("label"):
            count = 4 if side == "val" else 48 if label == 0 else 8
            for i, path in enumerate(group.path.head(count)):
                name = f"{side} {content.classes[label]} {i}.png"
                shutil.copy(path, root / name)
                lines[side].append({"filename": name, "label": label})
    shutil.copy(root / "train c 3.png", root / "again.png")
    (root / "cut.png").write_bytes((root / "train b 0.png").read_bytes()[:60])
    lines["train"] += [{"filename": "again.png", "label": 4}, {"filename": "cut.png", "label": 1}]
    for side, entries in lines.items():
        (root / f"{side}.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries))
    (root / "names.txt").write_text("\n".join("abcdefgh"))
    return {"dataset": "files", "data_dir": str(root), "class_names": "names.txt",
            "train_list": "train.jsonl", "train_root": ".", "val_list": "val.jsonl",
            "val_root": "."}  # fmt: skip


@pytest.mark.slow
def test_the_downstream_notebook_checks_starts_and_transfers(tmp_path, unequal_letters):
    """Run All with other lists, the digits first."""
    options = {"class_balanced_sampling": 0.5, "head_only_epochs": 1, "train_fraction": 1.0}
    shortened(tmp_path, digits_baseline={}, letters_downstream=unequal_letters | options)
    first = Executed("04_downstream.ipynb", tmp_path)
    run, source = (
        runs.Run(tmp_path / "runs" / f"{n}-seed0") for n in ("demo_letters", "demo_digits")
    )
    start = first.printed("start")
    assert f"top-1 {source.metrics().top1[1]:.2f} (n=500)" in first.printed("pretraining")
    assert f"{source.path}/last.pt [model]: 75 tensors loaded; 2 re-initialised" in start
    assert [*first.table("start")] == ["fc.weight", "fc.bias"]
    cells = ["counts", "batch", "curves", "rivals", "per-class", "worst"]
    assert first.figures() == dict.fromkeys(cells, 1)
    gate = {row["file"]: row | {"finding": name} for name, row in first.table("gate").items()}
    assert gate["again.png"]["finding"] == "duplicate"
    assert gate["again.png"]["detail"] == "of train c 3.png, labelled 2 there"
    assert gate["cut.png"]["finding"] == "truncated"

    # 48 of a, 9 of b (one truncated) and e (one twice), 8 of each other: 106 lines of the list.
    shown = {float(k): [int(float(v)) for v in row.values()]
             for k, row in first.table("balance").items()}  # fmt: skip
    share = 106 / (math.sqrt(48) + 2 * 3 + 5 * math.sqrt(8))
    expected = [share * math.sqrt(8), share * math.sqrt(48)]  # of the smallest and largest class
    assert shown[0.0] == [8, 48, 1] and shown[1.0][:2] == [13, 14]
    assert shown[0.5][:2] == pytest.approx(expected, abs=1)
    assert "first epochs of the classifier alone: 1" in first.printed("first-loss")
    assert "log(8) = 2.079" in first.printed("first-loss")
    assert "of 106 images" in first.printed("doctor")

    assert run.status()["state"] == "finished"
    assert run.quarantine()[["file", "reason"]].values.tolist() == [["cut.png", "truncated"]]
    assert run.environment()["train_images"] == 105 and run.environment()["val_images"] == 32
    listed = pd.read_csv(run.file("weights_report.csv"))
    assert Counter(listed.status) == {"loaded": 75, "re-initialised": 2}
    frame = run.predictions("raw")
    correct = 100.0 * (frame.class1 == frame.label)
    [row] = first.table("result").values()
    assert row["top-1 (%)"] in (f"{correct.mean():.2f}", f"{correct.mean():.3f}")
    by_class = correct.groupby(frame.label).mean().mean()
    assert row["mean over classes"] in (f"{by_class:.2f}", f"{by_class:.3f}")


# ---- single cells, in this process


def test_without_a_mistake_the_heading_of_the_maps_says_so(tmp_path):
    recipe = Recipe(**QUICK, runs_dir=str(tmp_path))
    run, content = train(recipe), data.load_dataset(recipe)
    none = run.predictions("raw").head(0).merge(content.val[["file", "path"]], on="file")
    student = recipe.replace(name="student", teacher=[str(run.path)])
    names = {"recipe": recipe, "run": run, "content": content, "worst": none, "rival": run}
    names |= {"teachers": distillation.open_teachers(student, content.classes), "copied": none}
    names["device"] = torch.device("cpu")
    for notebook, count in (("02_baseline", "the 0 mistakes"), ("03_distillation", "on 0 of the")):
        code, shown = {c.id: c for c in cells(f"{notebook}.ipynb")}, []
        run_cells(names, [code["imports"]])
        run_cells({**names, "display": shown.append}, [code["why"]])
        [heading] = shown[-1].texts
        assert count in heading


def test_the_distillation_notebook_without_a_teacher_is_an_error():
    """If some option is set, it is not the demonstration."""
    code = {c.id: c for c in cells("03_distillation.ipynb")}
    names: dict[str, object] = {}
    run_cells(names, [code["imports"], code["parameters"]])
    names["epochs"] = 2
    with pytest.raises(ValueError, match="no teacher: name one, such as -p teacher runs/"):
        run_cells(names, [code["checks"]])


@pytest.mark.parametrize("notebook", ["02_baseline", "03_distillation", "04_downstream"])
def test_after_a_stop_before_the_first_epoch_every_later_cell_says_so(tmp_path, capsys, notebook):
    recipe = Recipe(**QUICK, runs_dir=str(tmp_path))
    if notebook.startswith("03"):
        teacher = train(recipe.replace(name="teacher"))
        recipe = recipe.replace(name="student", teacher=[str(teacher.path)])
    run, stop, folders = runs.Run(recipe.folder), threading.Event(), [recipe.folder.name]
    for _ in training.fit(recipe, run, stop=stop):
        stop.set()
    assert run.status()["state"] == "stopped" and run.metrics().empty
    code = cells(f"{notebook}.ipynb")
    names: dict[str, object] = {"recipe": recipe, "run": run, "content": data.load_dataset(recipe)}
    run_cells(names, code[:1])
    printed = {}
    for cell in code[[c.id for c in code].index("training") + 1 :]:
        run_cells(names, [cell])
        printed[cell.id] = capsys.readouterr().out
    expected = {"result", "why", "both-curves", "gains", "shared-errors", "copied", "confusion"}
    expected |= {"per-class", "worst", "alone", "rivals", "columns"}
    silent = {name for name, text in printed.items() if "nothing to show yet" in text}
    assert silent == expected & set(printed)
    assert "nothing to show yet: stopped by request after step" in printed["result"]
    assert "stopped by request" in printed["next"]
    folders += ["teacher-seed0"] * notebook.startswith("03")  # the student alone is not trained
    assert sorted(path.name for path in tmp_path.iterdir()) == folders


def test_run_all_of_04_uses_no_run_of_another_recipe(tmp_path, monkeypatch):
    monkeypatch.setattr("workbench.recipe.ROOT", tmp_path)
    for name in ("digits_baseline", "demo_digits", "letters_downstream", "demo_letters"):
        other = Recipe(name=name, epochs=3)
        other.folder.mkdir(parents=True)
        other.to_yaml(other.folder / "recipe.yaml")
        (other.folder / "last.pt").touch()
    names: dict[str, object] = {}
    run_cells(names, cells("04_downstream.ipynb")[:3])
    assert not (names["before"].folder / "last.pt").exists()
    assert not (names["recipe"].folder / "last.pt").exists()
    assert names["recipe"].weights == str(names["before"].folder.relative_to(tmp_path))


def test_the_newest_run_that_can_be_exported_is_exported(tmp_path):
    recipe = Recipe(**QUICK, runs_dir=str(tmp_path))
    run = train(recipe)
    for later, name in enumerate(("gone", "lost"), 1):
        shutil.copytree(run.path, tmp_path / f"{name}-seed0")
        os.utime(tmp_path / f"{name}-seed0" / "status.json", (later, later))
    os.utime(run.file("status.json"), (0, 0))
    gone = Recipe(dataset="files", data_dir=str(tmp_path / "gone"), name="gone")
    gone.to_yaml(tmp_path / "gone-seed0" / "recipe.yaml")
    (tmp_path / "lost-seed0" / "last.pt").unlink()
    assert export.newest(tmp_path).path == run.path
    shutil.rmtree(run.path)
    with pytest.raises(export.ExportError, match="no finished run in .* can be exported"):
        export.newest(tmp_path)


@pytest.mark.slow
def test_the_parts_of_a_notebook_are_compared_and_open_without_it(tmp_path, monkeypatch):
    words = ["-p", "epochs", "1", "-p", "device", "cpu", "-y", "seeds: [0]"]
    done = Executed("07_custom_parts.ipynb", tmp_path, *words)
    [table] = done.shown("compare", "text/html")
    assert "loss notebook:focal@" in table and "import torch.nn.functional as F" in done.text
    run = runs.Run(tmp_path / "runs" / "parts_focal-seed0")
    own = run.predictions("raw").set_index("file")
    assert 100 * (own.class1 == own.label).mean() == pytest.approx(run.metrics().top1.iloc[-1])
    monkeypatch.setenv("WORKBENCH_TRUST_CODE", "1")  # the model is read from the run folder
    content = data.load_dataset(Recipe(**run.recipe()))
    table = export.predict(run.path, content.val.path.head(8).tolist())
    assert table.class1.astype(int).tolist() == own.class1[content.val.file.head(8)].tolist()
