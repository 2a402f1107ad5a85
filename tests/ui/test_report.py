"""Reports as one file, made from notebooks that papermill would have written."""

import base64
import io
import json
import os
import re
import subprocess
import sys

import nbformat
import numpy as np
import pytest
from conftest import run_folder
from helpers import train
from nbformat import v4
from PIL import Image

from workbench import ROOT, evaluation
from workbench.recipe import Recipe
from workbench.runs import Run, RunError
from workbench.ui import report

QUICK = {"train_fraction": 0.25, "epochs": 2, "workers": 0}


def png(width: int, height: int) -> str:
    """Noise, which no PNG compresses."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return base64.b64encode(file.getvalue()).decode()


def shown(text: str = "", **data: str) -> list:
    if text:
        return [v4.new_output("stream", name="stdout", text=text)]
    data = {key.replace("_", "/"): value for key, value in data.items()}
    return [v4.new_output("display_data", data, metadata={"image/png": {"width": 321}})]


@pytest.fixture
def executed(tmp_path) -> Run:
    """A finished run with a notebook that was executed after its end."""
    run = Run(run_folder(tmp_path, "a", epochs=2))
    script = {"text_html": "<b>table</b>", "application_javascript": "alert(1)"}
    trace = ["----> 1 secret_code = 1 / 0"]
    failed = v4.new_output("error", ename="ZeroDivisionError", evalue="by zero", traceback=trace)
    warned = v4.new_output("stream", name="stderr", text="warning:\n  secret_code = 0")
    sections = [
        v4.new_markdown_cell("# A title\n\n**Question:** why?\n\nIt **reads** and **writes**."),
        v4.new_code_cell("import secret_code", outputs=[]),
        v4.new_markdown_cell("## Options\n\nA misspelt option is an error."),
        v4.new_code_cell("lr = 0.1", metadata={"tags": ["parameters"]}),
        v4.new_code_cell("page", outputs=shown(text_markdown="## First page")),
        v4.new_markdown_cell("With `find = True` there would be a figure."),
        v4.new_code_cell("find = False"),
        v4.new_markdown_cell("Look at this."),
        v4.new_code_cell("figure", outputs=shown(image_png=png(40, 30))),
        v4.new_code_cell("photographs", outputs=shown(image_png=png(800, 450))),
        v4.new_code_cell("widget", outputs=shown(**script)),
        v4.new_code_cell("print", outputs=shown("1 < 2 in text")),
        v4.new_code_cell("1 / 0", outputs=[failed, warned]),
    ]
    nbformat.write(v4.new_notebook(cells=sections), run.file("02_baseline.ipynb"))
    return run


def test_a_report_is_one_file_without_code_scripts_or_anything_to_load(executed):
    path = report.write(executed)
    text = path.read_text(encoding="utf-8")
    assert path == executed.file("report.html") and path.stat().st_size < 5e6
    assert "<title>a-seed0</title>" in text and "<b>table</b>" in text and "1 &lt; 2" in text
    assert "by zero" in text  # a notebook that failed shows where
    for hidden in ("secret_code", "<script", "<link", "@import", "alert(1)", "http:", "https:"):
        assert hidden not in text
    sources = re.findall(r"<img[^>]* src=[\"']([^\"']*)", text)
    assert len(sources) == 2 and all(source.startswith("data:image/") for source in sources)


def test_names_are_text_and_not_html(tmp_path):
    name = "<img src=x onerror=alert(1)>"
    run = Run(run_folder(tmp_path, name, epochs=2))
    facts = run.environment() | {"classes": [name, "b", "c", "d"]}
    run.file("environment.json").write_text(json.dumps(facts))
    title = v4.new_code_cell("# no title of a notebook")
    nbformat.write(v4.new_notebook(cells=[title, v4.new_markdown_cell("# One line")]),
                   run.file("02_baseline.ipynb"))  # fmt: skip
    text = report.write(run).read_text(encoding="utf-8")
    assert "<img src=x" not in text and "&lt;img src=x" in text


def test_a_report_begins_with_headline_and_summary_and_then_the_question(executed):
    Image.new("RGB", (200, 100)).save(executed.file("summary.png"))
    text = report.write(executed).read_text(encoding="utf-8").replace("\xa0", " ")
    sentence = re.sub(r"\*\*(.*?)\*\*", r"<strong>\1</strong>", evaluation.headline(executed))
    order = ["<h1>a-seed0</h1>", sentence, 'alt="summary" width="100" src="data:image/png;base64,']
    order += ["why?", "First page", "Look at this."]
    positions = [text.index(part) for part in order]
    assert positions == sorted(positions)


def test_prose_on_how_to_use_the_notebook_or_on_nothing_is_left_out(executed):
    text = report.write(executed).read_text(encoding="utf-8")
    for left_out in ("A title", "reads", "misspelt", "find"):
        assert left_out not in text


def test_figures_are_embedded_as_they_are_with_their_width(executed):
    text = report.write(executed).read_text(encoding="utf-8")
    shown = re.findall(r"data:image/(\w+);base64,([^\"]*)\" width=\"(\d+)", text)
    assert shown == [("png", png(*size), "321") for size in ((40, 30), (800, 450))]


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda path: (path / "status.json").unlink(), "is no run folder"),
        (lambda path: (path / "status.json").write_text('{"state": "stopped"}'), "is stopped, and"),
        (lambda path: path.rename(path.with_name("b")), "was renamed; call it a-seed0"),
    ],
)
def test_a_run_that_no_notebook_can_report_on_is_an_error_in_one_sentence(tmp_path, change, says):
    path = run_folder(tmp_path, "a", epochs=2)
    change(path)
    [folder] = tmp_path.iterdir()
    with pytest.raises(RunError, match=says) as error:
        report.write(Run(folder))
    assert "\n" not in str(error.value) and not (folder / "report.html").exists()


def test_a_notebook_from_before_the_end_of_a_run_is_not_reported(executed):
    status = executed.file("status.json")
    status.write_text('{"state": "stopped"}')
    os.utime(executed.file("02_baseline.ipynb"), (0, 0))
    with pytest.raises(RunError, match="no notebook was executed since"):
        report.write(executed)
    os.utime(status, (0, 0))
    assert report.write(executed).exists()


def test_the_counterpart_is_the_student_alone_or_the_nearest_run_without_weights(tmp_path):
    other = {"epochs": 2, "weights": "w.pt"}
    student = run_folder(tmp_path, "student", epochs=2, teacher=["t"], kd_loss=["kl"])
    assert report.counterpart(Run(student)) is None
    run_folder(tmp_path, "slow", epochs=2, lr=0.01)
    alone = run_folder(tmp_path, "anything", epochs=2)
    assert report.counterpart(Run(student)).path == alone

    tuned = run_folder(tmp_path, "tuned", 1, **other)
    run_folder(tmp_path, "warm", 1, **other, lr=0.3)
    assert report.counterpart(Run(tuned)).path == alone
    same_seed = run_folder(tmp_path, "anything", 1, epochs=2)
    assert report.counterpart(Run(tuned)).path == same_seed
    assert report.counterpart(Run(alone)) is None


def test_the_first_page_has_title_changed_options_and_notes(tmp_path):
    recipe = Recipe(runs_dir=str(tmp_path), warmup_epochs=4.0, epochs=10, seed=3)
    recipe = recipe.replace(epochs=2, train_list=["a|b.txt"], dataset="files", data_dir="d")
    lines = report.first_page("Baseline", recipe, Run(recipe.folder)).data.splitlines()
    assert lines[0] == "## Baseline: baseline, seed 3"
    assert f"`{recipe.folder}` (new at the start), recipe {recipe.fingerprint}" in lines[2]
    assert "| epochs | `2` | `8` |" in lines and '| train_list | `["a\\|b.txt"]` | `[]` |' in lines
    assert not any(line.startswith("| lr |") for line in lines)
    assert lines[-1].startswith("Note: ") and lines[-1] == f"Note: {recipe.notes[-1]}"
    plain = report.first_page("Baseline", Recipe(), Run(tmp_path)).data
    assert plain.endswith("All options are the defaults.")


@pytest.mark.slow
def test_a_run_that_was_trained_without_a_notebook_gets_a_report_and_stays_as_it_is(tmp_path):
    recipe = Recipe(**QUICK, runs_dir=str(tmp_path))
    run = train(recipe)
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in run.path.iterdir()}
    command = [sys.executable, "-m", "workbench", "report", str(run.path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{run.file('report.html')}\n"
    text = run.file("report.html").read_text(encoding="utf-8")
    assert "nothing to do: finished: top-1" in text and text.count("data:image/") >= 5
    assert f"<strong>{100 * run.metrics().top1.iloc[-1] / 100:.1f}" in text
    after = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in run.path.iterdir()}
    del after["report.html"]
    without_lock = lambda files: {k: v for k, v in files.items() if not k.startswith("lock")}
    assert without_lock(after) == without_lock(before)

    moved = json.loads(run.file("status.json").read_text())
    run.file("status.json").write_text(json.dumps({**moved, "state": "failed"}))
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and done.stderr.startswith("RunError: ")
