"""Controls of 06_deploy: which run is exported, and predictions for a user's image files."""

import io
from collections.abc import Mapping
from pathlib import Path

import ipywidgets
from PIL import Image

from workbench import export, from_root, image_files, run_list, runs
from workbench.data import images
from workbench.evaluation.statistics import wilson_percent
from workbench.ui import plots
from workbench.ui.figure import Figure

MOST = 16  # images in a figure


def run_choice(root: Path, default: Path) -> ipywidgets.Dropdown:
    """The finished runs of a folder that have a checkpoint, best first; the value is the path.

    Of equal top-1 the newest is first. `default` is selected, and listed first if it is elsewhere.
    """
    found = [
        runs.Run(root / row["run"])
        for row in run_list.rows(root, sweeps=True)
        if row["state"] == "finished"
    ]
    found = [run for run in found if run.file("last.pt").exists() and len(run.metrics())]
    found.sort(key=lambda run: -_exported_top1(run)[1])
    if default not in [run.path for run in found]:
        found.insert(0, runs.Run(default))
    options = [(_figures(run), str(run.path)) for run in found]
    layout = {"width": "640px", "max_width": "100%"}
    return ipywidgets.Dropdown(
        options=options, value=str(default), description="run", layout=layout
    )


def _exported_top1(run: runs.Run) -> tuple[str, float, int]:
    """Weights that are exported by default, their last top-1 in percent, and validation images."""
    kind, _ = run.choose_weights()
    last = run.metrics().iloc[-1]
    return kind, last["ema_top1" if kind == "ema" else "top1"], int(last.val_images)


def _figures(run: runs.Run) -> str:
    status, name = run.status(), run.path.name
    if (run.path.parent / "sweep.yaml").exists():
        name = f"{run.path.parent.name}/{name}"
    if run.metrics().empty:
        return f"{name}: {status['state']}"
    _, top1, images = _exported_top1(run)
    low, high = wilson_percent(top1, images)
    date = status.get("updated", "")[:16].replace("T", " ")
    text = f"{name}: top-1 {top1:.2f} % ({low:.1f} to {high:.1f})"
    return f"{text}, seed {run.recipe()['seed']}, {date}"


def run_facts(run: str) -> list[str]:
    """Sentences on the run of a choice: its state, and which weights are exported."""
    chosen = runs.Run(run)
    message = f"{from_root(chosen.path)}: {chosen.status()['message'] or chosen.status()['state']}"
    if chosen.metrics().empty:
        return [message]
    kind, top1, images = _exported_top1(chosen)
    weights = f"the {kind} weights are exported by default: top-1 {top1:.2f} % of {images:,} images"
    return [message, f"{weights}; the interval in the list is Wilson's, 95 %"]


def predictions(
    source: export.prediction.Source, files: Mapping[str, bytes | str | Path]
) -> tuple[list[str], Figure | None]:
    """Sentences on the files that are no images, and a figure of the others with predictions."""
    shown, problems = {}, []
    for name, content in list(files.items())[:MOST]:
        try:
            image = _decoded(content)
            shown[name] = image, export.predict_image(source, image)
        except images.ImageError as error:
            problems.append(f"{name} cannot be read as an image ({error}); drop a JPEG or PNG file")
    if len(files) > MOST:
        problems.append(f"the first {MOST} of {len(files)} files; workbench predict takes folders")
    return problems, plots.probabilities(shown) if shown else None


def _decoded(content: bytes | str | Path) -> Image.Image:
    if not isinstance(content, bytes):
        return images.decode(content)
    read = lambda: image_files.decode(io.BytesIO(content))
    return Image.fromarray(image_files.with_reason("", read))
