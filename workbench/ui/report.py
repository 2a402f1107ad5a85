"""The executed notebook of a run as one HTML file without code, and a notebook's first page."""

import base64
import html
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd
from IPython.display import Markdown
from PIL import Image
from traitlets.config import Config

from workbench import ROOT, evaluation, from_root, params_files
from workbench.evaluation import comparison
from workbench.recipe import Recipe, defaults
from workbench.runs import Run, RunError, atomic_write, finished

STYLE = """
:root { color-scheme: light }
body { max-width: 1000px; margin: 2em auto; padding: 0 1em; color: #222; background: #fff;
  font: 15px/1.5 system-ui, sans-serif }
h1, h2, h3 { line-height: 1.2; break-after: avoid }
img { max-width: 100%; height: auto }
pre { margin: 4px 0; font-size: 12px; white-space: pre-wrap; overflow-wrap: anywhere }
table { border-collapse: collapse; font-size: 13px; border: 0 }
th, td { padding: 2px 10px; border: 0; border-bottom: 1px solid #ddd; text-align: left }
.dataframe th, .dataframe td { text-align: right }
.headline { font-size: 18px }
.facts { color: #555 }
@media print { body { margin: 0; max-width: none } img, table { break-inside: avoid } }
"""


def first_page(kind: str, recipe: Recipe, run: Run) -> Markdown:
    """The kind of training, name and seed as a title; the run folder; options that were changed."""
    code = lambda values: [f"`{params_files.dump(values[key])}`" for key in recipe.non_default()]
    changed, state = recipe.non_default(), run.status()["state"]
    table = {"option": [*changed], "value": code(changed), "default": code(defaults())}
    table = comparison.markdown(pd.DataFrame(table)) if changed else "All options are the defaults."
    folder = (
        f"Run folder `{from_root(run.path)}` ({state} at the start), recipe {recipe.fingerprint}."
    )
    notes = [f"Note: {text}" for text in recipe.notes]
    title = f"## {kind}: {recipe.name}, seed {recipe.seed}"
    return Markdown("\n\n".join([title, folder, table, *notes]))


def execute(notebook: Path, recipe: Recipe, output: Path, **pipes: Any) -> tuple[int, str]:
    """Runs a notebook on a recipe through papermill: the exit code, and what it logged."""
    # The checked recipe itself: papermill would read numbers into `name=007` or `name: 1_000`.
    command = [sys.executable, "-m", "papermill", str(notebook), str(output), "-k", "python3"]
    command += ["-y", recipe.yaml(recipe.non_default()), "--no-progress-bar", "--stdout-file", "-"]
    with tempfile.TemporaryFile("w+", errors="replace") as log:  # warnings of a success too
        code = subprocess.run(command, stderr=log, **pipes).returncode
        log.seek(0)
        return code, log.read()


def write(run: Run) -> Path:
    """report.html in the run folder: headline, summary.png, then the notebook without code.

    The notebook is the newest that `workbench notebook` executed there. For a finished run without
    one, or with one from before its end, a notebook is executed in a temporary folder. That trains
    nothing and changes no other file of the run. Raises RunError.
    """
    time = lambda path: path.stat().st_mtime
    if not (ended := run.file("status.json")).exists():
        raise RunError(f"{run.path} is no run folder; `workbench runs` lists them")
    executed = max(run.path.glob("*.ipynb"), key=time, default=ended)
    if executed != ended and time(executed) >= time(ended):
        return _write(run, executed)
    if (state := run.status()["state"]) != "finished":
        raise RunError(
            f"{run.path} is {state}, and no notebook was executed since; finish it first"
        )
    recipe = Recipe(**run.recipe()).replace(runs_dir=str(run.path.resolve().parent))
    if recipe.folder.name != run.path.resolve().name:
        raise RunError(f"{run.path} was renamed; call it {recipe.folder.name} for a report")
    with tempfile.TemporaryDirectory() as folder:
        notebook = ROOT / "notebooks" / _notebook(recipe, run)
        output = Path(folder) / notebook.name
        code, log = execute(notebook, recipe, output, stdout=subprocess.DEVNULL)
        if code:
            raise RunError(f"{notebook} failed on {run.path}: {log.strip().splitlines()[-1]}")
        return _write(run, output)


def counterpart(run: Run) -> Run | None:
    """The finished run that shows what a teacher or initial weights contribute, beside `run`.

    That is the student without a teacher, with the same seed; of runs that start without weights
    the one whose recipe differs least. None for other recipes, and if there is no such run.
    """
    recipe, data = Recipe(**run.recipe()), run.environment().get("data")
    if recipe.teacher:
        from workbench import distillation  # imports torch

        alone = distillation.without_teacher(recipe).fingerprint
        return next(iter(finished(run.path.parent, recipe=alone, data=data)), None)
    if not (recipe.weights or recipe.pretrained):
        return None
    scratch = [
        other for other in finished(run.path.parent, data=data)
        if not any(map(other.recipe().get, ("weights", "pretrained", "teacher", "resume_from")))
    ]  # fmt: skip
    nearest = comparison.newest_pair([run, *scratch])[1:]
    return min(nearest, key=lambda other: other.recipe()["seed"] != recipe.seed, default=None)


def _notebook(recipe: Recipe, run: Run) -> str:
    """The notebook of a recipe; that of distillation trains a student alone where none is there."""
    if recipe.teacher:
        return "03_distillation.ipynb" if counterpart(run) else "02_baseline.ipynb"
    return f"{'04_downstream' if recipe.weights or recipe.pretrained else '02_baseline'}.ipynb"


def _write(run: Run, notebook: Path) -> Path:
    from nbconvert import HTMLExporter  # takes half a second
    from nbconvert.filters import markdown2html

    shown = ["text/html", "text/markdown", "image/png", "image/jpeg", "text/plain"]
    exporter = HTMLExporter(
        template_name="basic", exclude_input=True, exclude_anchor_links=True,
        exclude_input_prompt=True, exclude_output_prompt=True,
        config=Config(NbConvertBase={"display_data_priority": shown}),  # no scripts, no widgets
    )  # fmt: skip
    exporter.register_preprocessor(_for_readers, enabled=True)
    body, _ = exporter.from_filename(str(notebook))
    facts = run.environment()
    trained = f"{facts.get('seconds', 0) / 60:.1f} minutes of training on {facts.get('device', '')}"
    trained = html.escape(f"{run.status().get('updated', '')[:10]}, {trained}")
    parts = [f"<h1>{(name := html.escape(run.path.name))}</h1>"]
    sentence = evaluation.headline(run, counterpart(run)).replace(" %", "\N{NO-BREAK SPACE}%")
    sentence = markdown2html(html.escape(sentence, quote=False))
    parts += [f'<div class="headline">{sentence}</div>', f'<p class="facts">{trained}</p>']
    if (summary := run.file("summary.png")).exists():
        with Image.open(summary) as image:
            width = image.width // 2  # it has twice the pixels
        data = base64.b64encode(summary.read_bytes()).decode()
        parts += [f'<img alt="summary" width="{width}" src="data:image/png;base64,{data}">']
    head = f'<meta charset="utf-8"><title>{name}</title><style>{STYLE}</style>'
    page = f'<!doctype html><html lang="en"><head>{head}</head><body>'
    with atomic_write(run.file("report.html")) as temporary:
        temporary.write_text("\n".join([page, *parts, body, "</body></html>"]), encoding="utf-8")
    return run.file("report.html")


def _for_readers(notebook: Any, resources: dict) -> tuple[Any, dict]:
    """Of the title only the question, no prose on cells that show nothing."""
    sections: list[list] = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown" or not sections:
            sections.append([])
        sections[-1].append(cell)
        cell.metadata.setdefault("alt", cell.id)  # of its figures
        outputs = [o for o in cell.get("outputs", ()) if o.get("name") != "stderr"]
        if cell.cell_type == "code":
            cell.outputs = outputs  # without warnings, which have lines of code
        for output in outputs:
            if output.output_type == "error":  # a traceback has lines of code
                output.traceback = [f"{output.ename}: {output.evalue}"]
    notebook.cells = []
    for first, *code in sections:
        if first.cell_type == "markdown" and first.source.startswith("# "):
            first.source = "".join(first.source.split("\n\n")[1:2])
        elif "parameters" in str([cell.metadata.get("tags") for cell in code]):
            first.source = ""
        elif code and not any(cell.get("outputs") for cell in code):
            continue
        notebook.cells += [first, *code]
    return notebook, resources
