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
from jupyter_client.manager import start_new_kernel

from workbench import ROOT, data, distillation, export, runs, training
from workbench.recipe import Recipe, read_params

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SMALL = {
    "train_fraction": 0.25,
    "epochs": 2,
    "crop_scale": [0.5, 1.0],
    "workers": 0,
    "log_every": 1,
}
STRIKES = {  # what a notebook has to show and a resume has to find again
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


def cells(path, kind="code"):
    return [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == kind]


def papermill(notebook, output, *words):
    command = [sys.executable, "-m", "papermill", str(ROOT / "notebooks" / notebook), str(output)]
    return [*command, "-k", "python3", "--no-progress-bar", "--log-output", *words]


def params_file(folder: Path, **options) -> Path:
    path = folder / "params.yaml"
    path.write_text(json.dumps({**SMALL, "runs_dir": str(folder / "runs"), **options}))
    return path


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
            ast.parse(cell.source)
            if "parameters" not in cell.metadata.get("tags", []):
                assert cell.source.count("\n") < 25, f"{cell.id} does not fit on a screen"


OF_RECIPES = [path for path in NOTEBOOKS if path.stem[:2] < "05"]  # the others read runs


@pytest.mark.parametrize("path", OF_RECIPES, ids=lambda p: p.stem)
def test_the_parameters_cell_holds_every_knob_at_its_default(path):
    """Else the same params file would mean one thing to papermill and another to the command."""
    tagged = [c for c in cells(path) if "parameters" in c.metadata.get("tags", [])]
    assert len(tagged) == 1
    ours, committed = {}, {}
    exec(Recipe.parameters_cell(), ours)
    exec(tagged[0].source, committed)
    del ours["__builtins__"], committed["__builtins__"]
    assert committed == ours
    assert tagged[0].source.startswith("# Parameters")
    assert Recipe.from_namespace({"In": ["", tagged[0].source], **committed}) == Recipe()


@pytest.mark.slow
def test_a_misspelt_knob_ends_papermill_with_a_message_and_leaves_no_run(tmp_path):
    params = params_file(tmp_path, lerning_rate=0.5)
    done = subprocess.run(
        papermill("02_baseline.ipynb", tmp_path / "out.ipynb", "-f", str(params)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "lerning_rate: no such option; the nearest is 'lr'" in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_papermill_killed_in_training_goes_on_and_ends_as_if_undisturbed(tmp_path):
    recipe = Recipe(**SMALL, **STRIKES, runs_dir=str(tmp_path / "undisturbed"))
    undisturbed = runs.Run(recipe.folder)
    list(training.fit(recipe, undisturbed))

    params = params_file(tmp_path, checkpoint_minutes=0, **STRIKES)
    command = papermill("02_baseline.ipynb", tmp_path / "out.ipynb", "-f", str(params))
    run = runs.Run(tmp_path / "runs" / "baseline-seed0")
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

    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert run.status()["state"] == "finished"
    assert run.file("metrics.csv").read_bytes() == undisturbed.file("metrics.csv").read_bytes()

    executed = nbformat.read(tmp_path / "out.ipynb", as_version=4)
    outputs = [o for c in executed.cells if c.cell_type == "code" for o in c.outputs]
    assert sum("image/png" in o.get("data", {}) for o in outputs) >= 5, "figures stay on paper"
    text = "".join(o.get("text", "") for o in outputs)
    assert "epoch   2" in text and "finished: top-1" in text
    assert "11 steps an epoch of 324 images" in text and "warning: mixing in 2 epochs" in text
    assert "0%|" not in text, "a progress bar froze in the saved notebook"
    said = {c.id: c.outputs for c in executed.cells if c.cell_type == "code"}
    [line] = [x for x in said["model"][0].text.splitlines() if x.startswith("test_resnet")]
    millions = run.environment()["parameters"] / 1e6
    assert line.startswith(f"test_resnet: {millions:.3f} M parameters, 0.0041 G multiply-adds, ")
    kind, measured = run.choose_weights()
    assert said["why"][0].text == f"{run.path}/last.pt [{kind}] {measured}\n"
    assert [list(o.get("data", {})) for o in said["why"]][1:] == [["image/png", "text/plain"]]


@pytest.mark.slow
def test_the_augmentation_notebook_runs_on_any_recipe(tmp_path):
    output = tmp_path / "out.ipynb"
    params = ROOT / "params" / "digits_strikes.yaml"
    done = subprocess.run(
        papermill("01_augmentation.ipynb", output, "-f", str(params)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    executed = nbformat.read(output, as_version=4)
    images = {
        c.id: sum("image/png" in o.get("data", {}) for o in c.outputs)
        for c in executed.cells
        if c.cell_type == "code"
    }
    assert images["grid"] == 3 and images["strengths"] == images["distances"] == 2
    assert all(images[cell] == 1 for cell in ("randaugment", "eats", "mixed", "lr"))
    assert images["try"] == 1, "the widget's static twin"
    [lines, lost] = [o.data["text/html"] for c in executed.cells if c.id == "try"
                     for o in c.outputs if "text/html" in o.get("data", {})]  # fmt: skip
    assert "something is left of every image" in lost
    assert "randaug_n: 2  #" in lines and "<pre>" in lines
    [table] = [o.data["text/html"] for c in executed.cells if c.id == "randaugment"
               for o in c.outputs if "text/html" in o.get("data", {})]  # fmt: skip
    assert "solarize_add_all" in table and "of the side" in table
    assert not [
        o for c in executed.cells for o in c.get("outputs", []) if o.get("name") == "stderr"
    ]


@pytest.mark.slow
def test_the_deployment_notebook_packs_a_run_reports_and_answers(tmp_path):
    recipe = Recipe(**SMALL, runs_dir=str(tmp_path / "runs"))
    list(training.fit(recipe, runs.Run(recipe.folder)))
    words = ["-p", "run", str(recipe.folder), "-p", "out", str(tmp_path / "out")]
    words += ["-p", "int8_points", "-100"]  # int8 is left out
    done = subprocess.run(
        papermill("06_deploy.ipynb", tmp_path / "out.ipynb", *words), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    [package] = (tmp_path / "out").iterdir()
    report = export.read_report(package)
    assert report["images"] == 500 and list(report["formats"]) == ["torch", "onnx", "int8"]
    kept = export.check(package)
    assert "model.onnx" in kept and "model_int8.onnx" not in kept
    said = "".join(o.text for c in cells(tmp_path / "out.ipynb") for o in c.get("outputs", [])
                   if o.output_type == "stream")  # fmt: skip
    assert "not in the package: int8 loses" in said
    executed = nbformat.read(tmp_path / "out.ipynb", as_version=4)
    shown = {c.id: [o for o in c.outputs if "data" in o] for c in executed.cells if "outputs" in c}
    assert "int8" in shown["report"][0].data["text/html"]
    assert f"**Top-1 {report['formats']['torch']['top1']:.2f} %**" in (
        shown["card"][0].data["text/markdown"])  # fmt: skip
    assert "image/png" in shown["try"][0].data
    assert "image/png" in shown["flips"][0].data or report["formats"]["int8"]["flips"] == 0


class Executed:
    """A notebook that papermill ran: its outputs by the names of the cells."""

    def __init__(self, notebook: str, root: Path, *words: str):
        output = root / "out.ipynb"
        command, places = papermill(notebook, output, *words), {"WORKBENCH_ROOT": str(root)}
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **places})
        assert done.returncode == 0, done.stderr[-3000:]
        self.cells = {c.id: c.outputs for c in cells(output)}
        self.text = "".join(self.said(name) for name in self.cells)
        outputs = [o for outputs in self.cells.values() for o in outputs]
        assert not [o for o in outputs if o.get("name") == "stderr"]
        assert "it/s" not in self.text and "0%|" not in self.text and "\r" not in self.text
        assert not [o for o in outputs if any("widget" in kind for kind in o.get("data", {}))]

    def said(self, name: str) -> str:
        """What a cell printed."""
        return "".join(o.get("text", "") for o in self.cells[name])

    def figures(self) -> dict[str, int]:
        """Images by cell, of the cells that show some."""
        count = {
            name: sum("image/png" in o.get("data", {}) for o in outputs)
            for name, outputs in self.cells.items()
        }
        return {name: n for name, n in count.items() if n}

    def table(self, name: str) -> dict[str, dict[str, str]]:
        """The table that a cell shows: its rows by their names, values by their columns."""
        [shown] = [o["data"]["text/html"] for o in self.cells[name]
                   if "text/html" in o.get("data", {})]  # fmt: skip
        rows = [
            [html.unescape(text) for text in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.S)]
            for row in re.findall(r"<tr.*?</tr>", shown, re.S)
        ]
        columns, *rest = [row for row in rows if any(row[1:])]  # an index may have a named line
        return {row[0]: dict(zip(columns[1:], row[1:], strict=True)) for row in rest}


def shortened(root: Path, **params: dict) -> None:
    """Shipped params files in a root of their own, changed to be trained in seconds."""
    (root / "params").mkdir()
    for name, changes in params.items():
        values = read_params(ROOT / "params" / f"{name}.yaml")
        small = {"train_fraction": 0.25, "epochs": 2, "workers": 0, "log_every": 1, **changes}
        (root / "params" / f"{name}.yaml").write_text(json.dumps({**values, **small}))


def contents(run: runs.Run) -> dict[str, tuple]:
    """Bytes and times of all that a training writes."""
    paths = [p for p in run.path.iterdir() if p.name != "lock"]
    return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in paths}


@pytest.mark.slow
def test_the_distillation_notebook_judges_teaches_and_compares(tmp_path):
    """Run All as it stands, its teacher first; then the same recipe by name, all finished."""
    shortened(tmp_path, digits_teacher={}, digits_distillation={})
    first = Executed("03_distillation.ipynb", tmp_path)
    names = "demo_student", "demo_student_alone", "demo_teacher"
    student, alone, teacher = (runs.Run(tmp_path / "runs" / f"{name}-seed0") for name in names)
    source = "runs/demo_teacher-seed0"
    own = teacher.metrics().iloc[-1].top1
    assert f"teacher, epoch 2 of 2: top-1 {own:.2f} %" in first.said("checks")

    one_each = ["lesson", "curves", "both-curves", "gains", "copied", "why"]
    assert first.figures() == dict.fromkeys(one_each, 1)
    report = first.table("report")
    assert float(report["val_top1"][source]) == pytest.approx(own, abs=1)  # in bf16, maybe
    assert 0 < float(report["step_share"][source]) < 100
    assert f"teacher {source}, resnet10t, 4.9 million parameters" in first.said("findings")
    assert "11 steps an epoch of 324 images" in first.said("findings")
    assert "teacher logits are cached in" in first.said("training")
    assert "task " in first.said("training") and "distillation " in first.said("training")
    assert f"student alone: {alone.path}" in first.said("alone")

    table = first.table("result")
    assert list(table) == ["alone", "distilled", "teacher"]
    for name, run in (("alone", alone), ("distilled", student), ("teacher", teacher)):
        last = run.metrics().iloc[-1]
        for column in ("top1", "top5", "val_loss"):
            assert float(table[name][column]) == pytest.approx(last[column], abs=1e-3)
        assert float(table[name]["val_images"]) == 500
    ours, theirs = student.predictions("raw"), alone.predictions("raw")
    right = [(frame.class1 == frame.label).tolist() for frame in (ours, theirs)]
    pairs = Counter(zip(*right, strict=True))
    assert f"only the distilled student is right: {pairs[True, False]} images" in first.text
    assert f"only the student alone is right: {pairs[False, True]} images" in first.text
    shared_teacher_errors = first.table("borrowed")
    wrong = (teacher.predictions("raw").class1 != teacher.predictions("raw").label).sum()
    assert {float(row["wrong"]) for row in shared_teacher_errors.values()} == {wrong}
    assert first.said("next").count("finished: top-1") == 2 and "-p seed 1" in first.said("next")

    assert student.environment()["teachers"][0]["source"] == source
    assert student.environment()["teacher_logits"] == {"requests": 2 * 324, "hits": 0}
    assert "train_kd_loss" in student.metrics() and "train_kd_loss" not in alone.metrics()
    assert alone.recipe()["teacher"] == [] and alone.recipe()["batch_size"] == 32
    for run in (student, alone):
        assert run.status()["state"] == "finished" and run.file("best.safetensors").exists()

    before = [contents(run) for run in (student, alone, teacher)]
    params = tmp_path / "params" / "digits_distillation.yaml"
    words = ["-p", "name", "demo_student", "-p", "teacher", source]
    again = Executed("03_distillation.ipynb", tmp_path, "-f", str(params), *words)
    assert again.said("training").startswith("nothing to do: finished: top-1")
    assert (
        "teacher, epoch" not in again.said("checks")
        and "epoch" not in again.said("alone")
        and again.table("result") == table
    )
    assert [contents(run) for run in (student, alone, teacher)] == before
    assert again.figures() == first.figures()


def last_shown(source: str, names: dict[str, object]) -> object:
    """What a cell displays last."""
    shown: list[object] = []
    exec(source, {**names, "display": shown.append})
    return shown[-1]


def test_without_a_mistake_the_notebooks_say_so_where_the_maps_would_be(tmp_path):
    recipe = Recipe(**SMALL, runs_dir=str(tmp_path))
    run, content = runs.Run(recipe.folder), data.load_dataset(recipe)
    list(training.fit(recipe, run))
    none = run.predictions("raw").head(0).merge(content.val[["file", "path"]], on="file")
    names: dict[str, object] = {"recipe": recipe, "run": run, "content": content, "worst": none}
    names["rival"] = run
    names |= {"copied": none, "device": torch.device("cpu")}
    names["teachers"] = distillation.open_teachers(
        recipe.replace(name="student", teacher=[str(run.path)], epochs=2), content.classes
    )
    for notebook, count in (("02_baseline", "the 0 mistakes"), ("03_distillation", "on 0 of the")):
        source = {c.id: c.source for c in cells(ROOT / "notebooks" / f"{notebook}.ipynb")}
        exec(source["imports"], names)
        [words] = [text.get_text() for text in last_shown(source["why"], names).axes[0].texts]
        assert count in words


def test_the_distillation_notebook_without_a_teacher_says_what_it_wants():
    """Some option is set, so it is not the demonstration, and no teacher is."""
    source = {c.id: c.source for c in cells(ROOT / "notebooks" / "03_distillation.ipynb")}
    names: dict[str, object] = {}
    exec(source["imports"], names)
    exec(source["parameters"], names)
    names["epochs"] = 2
    with pytest.raises(ValueError, match="no teacher: name one, such as -p teacher runs/"):
        exec(source["checks"], names)


def test_a_stopped_student_does_not_make_the_notebook_train_the_other_one(tmp_path, capsys):
    source = {c.id: c.source for c in cells(ROOT / "notebooks" / "03_distillation.ipynb")}
    teacher = runs.Run(tmp_path / "teacher")
    list(training.fit(Recipe(**SMALL, runs_dir=str(tmp_path)), teacher))
    recipe = Recipe(**SMALL, name="student", runs_dir=str(tmp_path), teacher=[str(teacher.path)])
    run = runs.Run(recipe.folder)
    rows = training.fit(recipe, run)
    next(rows)
    rows.close()
    names: dict[str, object] = {"recipe": recipe, "run": run}
    exec(source["imports"], names)
    cell = compile(source["alone"], "alone", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    asyncio.run(eval(cell, names | {"recipe": recipe, "run": run}))
    assert capsys.readouterr().out.startswith("nothing to show yet: stopped by leaving the loop")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["student-seed0", "teacher"]


@pytest.mark.parametrize("notebook", ["02_baseline", "03_distillation", "04_downstream"])
def test_after_a_stop_before_the_first_epoch_every_later_cell_says_so(tmp_path, capsys, notebook):
    teacher = runs.Run(tmp_path / "teacher-seed0")
    list(training.fit(Recipe(**SMALL, name="teacher", runs_dir=str(tmp_path)), teacher))
    recipe = Recipe(**SMALL, name="student", runs_dir=str(tmp_path), teacher=[str(teacher.path)])
    recipe = recipe if notebook.startswith("03") else Recipe(**SMALL, runs_dir=str(tmp_path))
    run, stop = runs.Run(recipe.folder), threading.Event()
    for _ in training.fit(recipe, run, stop=stop):
        stop.set()
    assert run.status()["state"] == "stopped" and run.metrics().empty
    code = cells(ROOT / "notebooks" / f"{notebook}.ipynb")
    later = [c.id for c in code].index("training") + 1
    names: dict[str, object] = {"recipe": recipe, "run": run, "content": data.load_dataset(recipe)}
    exec(code[0].source, names)
    said = {}
    for one in code[later:]:
        ran = compile(one.source, one.id, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        if waiting := eval(ran, names):
            asyncio.run(waiting)
        said[one.id] = capsys.readouterr().out
    expected = {
        "result",
        "why",
        "both-curves",
        "gains",
        "borrowed",
        "copied",
        "confusion",
    }
    expected |= {"per-class", "worst", "alone", "rivals"}
    assert {name for name, text in said.items() if "nothing to show yet" in text} == (
        expected & {c.id for c in code})  # fmt: skip
    assert "nothing to show yet: stopped by the stop event after step" in said["result"]
    assert "stopped by the stop event" in said["next"]


def test_run_all_of_04_meets_no_run_of_another_recipe(tmp_path, monkeypatch):
    monkeypatch.setattr("workbench.recipe.ROOT", tmp_path)
    for name in ("digits_baseline", "demo_digits", "letters_downstream", "demo_letters"):
        other = Recipe(name=name, epochs=3)
        other.folder.mkdir(parents=True)
        other.to_yaml(other.folder / "recipe.yaml")
        (other.folder / "last.pt").touch()
    names: dict[str, object] = {}
    for one in cells(ROOT / "notebooks" / "04_downstream.ipynb")[:3]:
        exec(one.source, names)
    assert not (names["before"].folder / "last.pt").exists()
    assert not (names["recipe"].folder / "last.pt").exists()
    assert names["recipe"].weights == str(names["before"].folder.relative_to(tmp_path))


def test_the_newest_run_that_can_be_packed_is_packed(tmp_path):
    recipe = Recipe(**{**SMALL, "epochs": 1}, runs_dir=str(tmp_path))
    run = runs.Run(recipe.folder)
    list(training.fit(recipe, run))
    for name in ("a word", "gone", "lost"):  # each finished later than the one before
        shutil.copytree(run.path, tmp_path / f"{name}-seed0")
    Recipe(**{**SMALL, "epochs": 1}, name="a word").to_yaml(
        tmp_path / "a word-seed0" / "recipe.yaml"
    )
    gone = Recipe(dataset="files", data_dir=str(tmp_path / "gone"), name="gone")
    gone.to_yaml(tmp_path / "gone-seed0" / "recipe.yaml")
    (tmp_path / "lost-seed0" / "last.pt").unlink()
    for later, path in enumerate([run.path, *(tmp_path / f"{n}-seed0" for n in (
        "a word", "gone", "lost"))]):  # fmt: skip
        os.utime(path / "status.json", (later, later))
    assert export.newest(tmp_path).path == run.path
    shutil.rmtree(run.path)
    with pytest.raises(export.ExportError, match="no finished run in .* can be exported"):
        export.newest(tmp_path)


def commanded(root: Path, *words: str) -> subprocess.CompletedProcess:
    """`workbench notebook 02_baseline` on small digits, its runs below that root."""
    path = root / "params.yaml"
    path.write_text(json.dumps(SMALL))
    command = [sys.executable, "-m", "workbench", "notebook"]
    command += [ROOT / "notebooks" / "02_baseline.ipynb", path, *words]
    places = {"WORKBENCH_ROOT": str(root), "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **places})


@pytest.mark.slow
def test_the_notebook_command_prints_counts_a_line_per_epoch_and_the_result(tmp_path):
    """Under a name that papermill would take for a number; then a start that fails."""
    done = commanded(tmp_path, "-p", "name=1_000", "-p", "model=test_resnet")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    run = runs.Run(tmp_path / "runs" / "1_000-seed0")
    assert run.status()["state"] == "finished" and run.file("02_baseline.ipynb").exists()
    lines = done.stdout.splitlines()
    assert all(lines), "no blank lines"
    assert "Executing" not in done.stdout and "WARNING" not in done.stdout
    assert len([x for x in lines if x.startswith("324 training and 500 validation")]) == 1
    assert [x.split()[1] for x in lines if x.startswith("epoch ")] == ["1", "2"]
    assert lines.count(run.status()["message"]) >= 1 and lines.count(f"run folder: {run.path}") == 1
    assert "-p name=1_000 -p model=test_resnet -p seed=1" in lines[-1]

    words = "-p", "name=1_000", "-p", "dataset=files", "-p", "data_dir=nowhere"
    failed = commanded(tmp_path, *words)
    assert failed.returncode == 1 and "nowhere" in failed.stderr
    assert "finished: top-1" not in failed.stdout and "last checkpoint" not in failed.stderr


@pytest.fixture
def unequal_letters(tmp_path) -> dict[str, object]:
    """Real letters under two lists in custom_cls form: of class a six times as many to train on.

    One image is cut short, and one lies there twice, under another label.
    """
    root = tmp_path / "letters"
    root.mkdir()
    content = data.load_dataset(Recipe(dataset="letters"))
    lines = {"train": [], "val": []}
    for side, frame in (("train", content.train), ("val", content.val)):
        for label, group in frame[frame.label < 8].groupby("label"):
            count = 4 if side == "val" else 48 if label == 0 else 8
            for i, path in enumerate(group.path.head(count)):
                name = f"{side} {content.classes[label]} {i}.png"  # with spaces, as they come
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
    """Run All as it stands but for its lists, the digits first; then the same recipe by name."""
    options = {
        **unequal_letters,
        "class_balanced_sampling": 0.5,
        "head_only_epochs": 1,
        "train_fraction": 1.0,
    }
    shortened(tmp_path, digits_baseline={}, letters_downstream=options)
    first = Executed("04_downstream.ipynb", tmp_path)
    run, source = (
        runs.Run(tmp_path / "runs" / f"{n}-seed0") for n in ("demo_letters", "demo_digits")
    )
    assert f"digits, epoch 2 of 2: top-1 {source.metrics().top1[1]:.2f} %" in first.said("start")

    one_each = ["counts", "batch", "curves", "rivals", "per-class", "worst"]
    assert first.figures() == dict.fromkeys(one_each, 1)
    gate = first.table("gate")
    assert {row["finding"] for row in gate.values()} >= {"duplicate", "truncated"}
    [double] = [row for row in gate.values() if row["file"] == "again.png"]
    assert double["detail"] == "of train c 3.png, labelled 2 there"
    assert [row["file"] for row in gate.values() if row["finding"] == "truncated"] == ["cut.png"]

    # 48 of a, 9 of b (one cut short) and e (one twice), 8 of each other: 106 lines of the list.
    assert "this recipe has class_balanced_sampling 0.5" in first.said("balance")
    shown = {float(k): {c: int(float(v)) for c, v in row.items()}
             for k, row in first.table("balance").items()}  # fmt: skip
    root = {48: math.sqrt(48), 9: 3.0, 8: math.sqrt(8)}
    share = 106 / (root[48] + 2 * root[9] + 5 * root[8])
    assert shown[0.0]["smallest class"] == 8 and shown[0.0]["largest class"] == 48
    assert shown[1.0]["smallest class"] == 13 and shown[1.0]["largest class"] == 14
    assert shown[0.5]["smallest class"] == pytest.approx(share * root[8], abs=1)
    assert shown[0.5]["largest class"] == pytest.approx(share * root[48], abs=1)
    assert [row["times an image of the rarest class is shown"] for row in shown.values()][0] == 1

    assert f"{source.path}/last.pt [model]: 75 tensors loaded; 2 re-initialised" in first.said(
        "start"
    )
    assert [row["tensor"] for row in first.table("start").values()] == ["fc.weight", "fc.bias"]
    assert "frozen: nothing" in first.said("first-loss")
    assert "first epochs of the classifier alone: 1" in first.said("first-loss")
    assert "log(8) = 2.079" in first.said("first-loss")
    assert "class_balanced_sampling" in first.said("checks") and "of 106 images" in first.said(
        "doctor"
    )

    assert run.status()["state"] == "finished"
    assert run.quarantine()[["file", "reason"]].values.tolist() == [["cut.png", "truncated"]]
    assert run.environment()["train_images"] == 105 and run.environment()["val_images"] == 32
    listed = pd.read_csv(run.file("weights_report.csv"))
    assert Counter(listed.status) == {"loaded": 75, "re-initialised": 2}

    frame = run.predictions("raw")
    right = frame.class1 == frame.label
    [row] = first.table("result").values()
    assert float(row["top1"]) == pytest.approx(100 * right.mean(), abs=1e-3)
    means = [right[frame.label == label].mean() for label in range(8)]
    assert float(row["mean over classes"]) == pytest.approx(100 * sum(means) / 8, abs=1e-3)
    assert "finished: top-1" in first.said("next") and str(run.path) in first.said("next")

    before = contents(run)
    params = tmp_path / "params" / "letters_downstream.yaml"
    words = ["-p", "name", "demo_letters", "-p", "weights", "runs/demo_digits-seed0"]
    again = Executed("04_downstream.ipynb", tmp_path, "-f", str(params), *words)
    assert again.said("training").startswith("nothing to do: finished: top-1")
    assert contents(run) == before and again.figures() == first.figures()


def replied(client, message: str) -> str:
    """The status of a cell that was sent; a slow kernel still answers earlier questions before."""
    while True:
        reply = client.get_shell_msg(timeout=60)
        if reply["parent_header"]["msg_id"] == message:
            return reply["content"]["status"]


LOOP = "for row in training.fit(recipe, run):\n    pass"
BUTTONS = "await widgets.train(recipe, run)"


@pytest.mark.slow
@pytest.mark.parametrize("loop, why", [(LOOP, "Ctrl-C"), (BUTTONS, "the stop event")])
def test_interrupt_in_a_kernel_ends_the_cell_normally_and_the_kernel_lives(tmp_path, loop, why):
    manager, client = start_new_kernel(kernel_name="python3")
    try:
        code = f"""
from workbench import runs, training
from workbench.ui import widgets
from workbench.recipe import Recipe
recipe = Recipe(epochs=500, workers=2, runs_dir={str(tmp_path)!r})
run = runs.Run(recipe.folder)
{loop}
print(run.status()["message"])
"""
        run = runs.Run(tmp_path / "baseline-seed0")
        message = client.execute(code)
        deadline = time.monotonic() + 120
        while len(run.steps()) < 3 and time.monotonic() < deadline:
            time.sleep(0.1)
        manager.interrupt_kernel()
        assert replied(client, message) == "ok"
        assert run.status()["state"] == "stopped"
        assert why in run.status()["message"]
        assert replied(client, client.execute("alive = len(run.metrics().columns)")) == "ok"
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
