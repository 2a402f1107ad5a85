"""The commands: `workbench --help`."""

import contextlib
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from workbench import ROOT, counted
from workbench.job_commands import Overrides, Params, app, read_overrides, read_recipe

if TYPE_CHECKING:  # imported where needed, so that `workbench --help` starts at once
    from workbench.recipe import Recipe

Weights = Annotated[str, typer.Option(help="raw or ema; ema unless it is clearly worse")]
STOPPED = 3  # exit code of a run that was stopped and can be resumed


def main() -> None:
    """Runs a command; errors of the package and of files are a message and exit code 1.

    --trust-code, anywhere in it, lets the custom parts of recipes and run folders run.
    """
    if "--trust-code" in sys.argv:
        sys.argv.remove("--trust-code")
        os.environ["WORKBENCH_TRUST_CODE"] = "1"  # also for child processes
    try:
        app()
    except (ValueError, RuntimeError, OSError) as error:
        of_a_file = isinstance(error, OSError) and error.filename  # its text names the file
        if not (of_a_file or type(error).__module__.startswith("workbench.")):
            raise
        name = type(error).__name__
        text = str(error) if name == "RecipeError" else f"{name}: {error}"
        if name != "StoreUnavailable":
            sys.exit(text)
        print(text, file=sys.stderr)
        sys.exit(STOPPED)


@app.command()
def train(
    params: Params,
    p: Overrides = [],  # noqa: B006  typer reads it, never writes
    smoke: Annotated[
        bool, typer.Option(help="two steps, an evaluation and an export on a few images, no run")
    ] = False,
) -> None:
    """Train a recipe, or resume it. Exit code 0 finished, 3 stopped and resumable.

    On several GPUs: torchrun --nproc-per-node 8 -m workbench train PARAMS, or srun in a job.
    """
    recipe = read_recipe(params, p)
    if smoke:
        from workbench.smoke import smoke_test

        if "RANK" in os.environ:
            raise typer.BadParameter("--smoke runs in one process, without torchrun or srun")
        for line in smoke_test(recipe):
            print(line, flush=True)
        return
    from workbench import data, jobs, runs, training
    from workbench.doctor import teachers, throughput
    from workbench.ui import summary, widgets

    run = runs.Run(recipe.folder)
    progress, content = widgets.Progress(run), None
    job = jobs.of_runs([run.path]).get(run.path) if training.is_main() else None
    if job and job.state in ("queued", "unknown"):
        print(f"note: {job.name} of this run is {job.state}: workbench cancel {run.path}")
    if recipe.teacher and training.is_main() and not run.file("last.pt").exists():
        content = data.load_dataset(recipe)
        report = teachers.teacher_report(recipe, content, max_images=512, max_val_images=2048)
        print(*teachers.teacher_findings(recipe, report), sep="\n", flush=True)
    with contextlib.suppress(KeyboardInterrupt):  # before the first step, or twice: status says so
        for row in training.fit(recipe, run, dataset=content):
            if progress.bar is None:
                _print_warnings(recipe, run.environment())
            progress.show(row)
    if training.is_main():
        progress.close()
        print(throughput.seen(run.steps(), training.pick_device(recipe.device).type))
        summary.write(run)
        print(f"run folder: {run.path}")
    if run.status()["state"] == "stopped":
        raise typer.Exit(STOPPED)


@app.command()
def sweep(
    params: Params,
    axes: Annotated[list[str], typer.Argument(help="lr=0.03,0.1 seed=0-2: every combination")],
    p: Overrides = [],  # noqa: B006
    jobs: Annotated[int, typer.Option(min=1, help="processes, which share the cores")] = 1,
    trials: Annotated[int, typer.Option(min=0, help="Optuna: lr=0.001:0.3:log or lists")] = 0,
) -> None:
    """Train every combination of some values of options, and compare them over seeds.

    The same command resumes. Exit code 0 all finished, 1 a run failed, 3 stopped.
    """
    recipe = read_recipe(params, p)
    from workbench import sweep as sweeping

    options, states = sweeping.parse_axes(axes), set()
    recipes = [] if trials else sweeping.combinations(recipe, options)
    print(*(f"note: {text}\n" for text in sweeping.notes(recipe, recipes)), sep="", end="")
    rows = sweeping.sweep(recipe, options, jobs=jobs, trials=trials)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, between runs too
    try:
        for number, row in enumerate(rows, 1):
            print(f"{number}/{trials or len(recipes)} {row['run']}: {row['message']}", flush=True)
            states.add(row["state"])
    except KeyboardInterrupt:
        states.add("stopped")
    print(f"sweep folder: {(folder := sweeping.folder_of(recipe, options))}")
    if "stopped" in states:
        print("stopped; the same command resumes")
    elif "fold" in options and states == {"finished"}:
        print(sweeping.fold_report(folder, options))
    elif "finished" in states:
        compare(sweeping.finished(folder), sweeping.compared_weights(options))
    raise typer.Exit(STOPPED if "stopped" in states else int("failed" in states))


def _print_warnings(recipe: "Recipe", environment: dict) -> None:
    from workbench import doctor

    sizes = {"images": environment["train_images"], "classes": len(environment["classes"])}
    for finding in doctor.examine(recipe, **sizes, downscaled=environment["downscaled"]):
        if finding.kind == "warning":
            print(finding, flush=True)


@app.command()
def notebook(
    notebook: Annotated[Path, typer.Argument(help="a notebook of notebooks/")],
    params: Params,
    p: Overrides = [],  # noqa: B006
) -> None:
    """Run a notebook through papermill into the run folder of a recipe, and write its report."""
    recipe = read_recipe(params, p)
    from workbench import runs
    from workbench.ui import report

    if notebook.is_file() and '"lr = ' not in notebook.read_text(encoding="utf-8"):
        raise runs.RunError(f"{notebook} takes no recipe; run it with papermill")
    run = runs.Run(recipe.folder)
    with run.writing():  # raises RunError where the folder cannot be written
        before = run.status()
    print(f"papermill {notebook} -> {(output := run.file(notebook.name))}", flush=True)
    code, log = report.execute(notebook, recipe, output)
    print(log if code else "", end="", file=sys.stderr)
    if run.file("predictions.parquet").exists():  # also where a later cell failed
        print(f"report: {report.write(run)}")
    status = run.status()
    if status != before and status["state"] == "stopped":
        raise typer.Exit(STOPPED)
    if code:
        sys.exit(code)
    words = " ".join(f"-p {text}" for text in [*p, f"seed={recipe.seed + 1}"])
    print(f"the executed notebook: {output} (make lab opens it)")
    print(f"another seed: workbench notebook {notebook} {params} {words}")


@app.command("report")
def write_report(run: Annotated[Path, typer.Argument(help="a run folder")]) -> None:
    """Write report.html into a run folder: headline, summary and its notebook without code.

    A run that was trained without a notebook is evaluated by one first, which takes a minute.
    """
    from workbench import runs
    from workbench.ui import report

    print(report.write(runs.Run(run)))


@app.command()
def index(
    sources: Annotated[list[str], typer.Argument(help="'s3://bucket/train/*.tar' a{0..9}.tar")],
    out: Annotated[str, typer.Option(help="NAME.arrow, for train_list or val_list")],
) -> None:
    """Index the images of tar shards, WebDataset's or of class folders, to train in place."""
    from workbench import data

    print(data.write_index(sources, out))


@app.command("check-data")
def check_data(
    params: Params,
    p: Overrides = [],  # noqa: B006
    out: Annotated[Path | None, typer.Option(help="write every finding to this CSV file")] = None,
) -> None:
    """Read every image of a recipe and report what is wrong. Exit code 1 if anything is.

    Hidden files are listed, and do not count as wrong.
    """
    recipe = read_recipe(params, p)
    from workbench import data

    content = data.load_dataset(recipe, strict=False)
    findings = data.check_data(content)
    counts = f"{len(content.train):,} training, {counted(len(content.val), 'validation image')}"
    print(f"{counts}, {len(content.classes)} classes")
    if out:
        findings.to_csv(out, index=False, lineterminator="\r\n")
    if findings.empty:
        print("every image can be read; no duplicates, nothing in both lists")
        return
    for (finding, side), rows in findings.groupby(["finding", "side"], sort=False):
        print(f"\n{finding}, {side}: {len(rows):,}; the first of them (--out FILE.csv writes all):")
        for row in rows.head(5).itertuples():
            print(f"  {row.file}  {row.detail}")
    print("\nTraining leaves out what cannot be read; duplicates and images in both lists stay in.")
    raise typer.Exit(int((findings.detail != "hidden").any()))


@app.command()
def doctor(
    params: Params,
    p: Overrides = [],  # noqa: B006
    images: Annotated[int | None, typer.Option(help="training images, without the data")] = None,
    classes: Annotated[int | None, typer.Option(help="classes, without the data")] = None,
) -> None:
    """Print facts and warnings about a recipe before it trains."""
    recipe = read_recipe(params, p)
    from workbench import doctor as rules

    content = None
    if images is None or classes is None:
        base = ROOT / Path(recipe.data_dir).expanduser()
        paths = [base / path for path in recipe.train_list or recipe.train_root]
        if recipe.dataset == "files" and not any(map(Path.exists, paths)):  # before torch loads
            sys.exit(f"there is no {paths[0]}; set data_dir, or give --images and --classes")
        from workbench import data, training

        content = data.load_dataset(recipe)
        training.create_model(recipe, len(content.classes))  # checks its image sizes
        images, classes = len(content.train), len(content.classes)
        if content.skipped:
            print(data.describe_skipped(content.skipped))
    measured = bool(content) or rules.worth_measuring(recipe)
    sizes = {"images": images, "classes": classes, "counts": content and content.counts}
    print(*rules.examine(recipe, **sizes, measured=measured), sep="\n")
    for text in training.trained_on_validation(recipe, content) if content else ():
        print(f"warning: {text} [its recipe.yaml]")
    if recipe.teacher and content:
        from workbench.doctor import teachers

        report = teachers.teacher_report(recipe, content)
        print(*teachers.teacher_findings(recipe, report), sep="\n")
    elif recipe.teacher:
        print("teachers are judged on the images: leave out --images and --classes")


@app.command()
def compare(
    folders: Annotated[list[Path], typer.Argument(help="run folders; seeds of a recipe are one")],
    weights: Annotated[str, typer.Option(help="raw, or ema where a run averaged them")] = "raw",
    baseline: Annotated[str, typer.Option(help="name of the recipe to compare with")] = "",
    csv: Annotated[Path | None, typer.Option(help="write the table to this file")] = None,
    markdown: Annotated[Path | None, typer.Option(help="write table and verdicts there")] = None,
) -> None:
    """Print which recipe is better, and whether the difference is significant.

    workbench compare runs/cifar10_*
    """
    from workbench.evaluation import comparison

    started = [folder for folder in folders if (folder / "recipe.yaml").exists()]
    early = [folder for folder in started if not (folder / "predictions.parquet").exists()]
    for folder in early:
        print(f"{folder} is left out: it was not evaluated yet")
    evaluated = [folder for folder in folders if folder not in early]
    found = comparison.compare(evaluated, weights=weights, baseline=baseline)
    if csv:
        found.table.to_csv(csv, index=False)
    if markdown:
        lines = [comparison.markdown(found.table), "", *(f"- {line}" for line in found.sentences())]
        markdown.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(found.table.to_string(index=False, na_rep="-", float_format="{:.2f}".format))
    print(f"\n{comparison.LEGEND}")
    print("", *found.sentences(), sep="\n")


@app.command()
def export(
    run: Annotated[Path | None, typer.Argument(help="a run folder")] = None,
    out: Annotated[Path, typer.Option(help="folder of the package")] = ROOT / "packages",
    name: Annotated[str, typer.Option(help="of the package; the run's if not given")] = "",
    version: Annotated[str, typer.Option(help="in the file's name; 1.0.0 if not given")] = "",
    weights: Weights = "",
    uint8_input: Annotated[bool, typer.Option(help="normalise inside the network")] = False,
    int8: Annotated[bool, typer.Option(help="add a quantised network")] = False,
    with_preprocessing: Annotated[bool, typer.Option(help="add a network that resizes")] = False,
    torch_export: Annotated[bool, typer.Option(help="add a file for torch.export.load")] = False,
    kestrel: Annotated[Path | None, typer.Option(help="UP configuration with to_kestrel")] = None,
    int8_points: Annotated[float, typer.Option(help="top-1 points a lossy format may lose")] = 0.5,
    p: Overrides = [],  # noqa: B006
    check: Annotated[Path | None, typer.Option(help="verify this package instead")] = None,
    measure: Annotated[bool, typer.Option(help="and its predictions, on -p data_dir")] = False,
) -> None:
    """Export a run for deployment after a comparison with PyTorch, or verify a package.

    workbench export runs/mine-seed0 --int8    workbench export --check mine_1.0.0.tar --measure

    Exit code 1 if a format is left out, or if --measure finds other predictions.
    """
    if (run is None) == (check is None):
        raise typer.BadParameter("name a run folder, or --check a package")
    from workbench import export as exporting
    from workbench import runs

    if check:
        meta = exporting.load(check).meta
        print(f"{check}: valid; {meta.model_name} {meta.version}, {meta.model}, ", end="")
        print(f"{len(meta.classes)} classes, {meta.weights} weights of {meta.made['run']}")
        if measure:
            report = exporting.measure(check, **read_overrides(p))
            print(exporting.table(report).to_string(float_format="{:.4g}".format))
            print(*report["problems"], sep="\n")
            raise typer.Exit(int(bool(report["problems"])))
        return
    block = None
    if kestrel:
        from workbench.importers import united_perception

        block = united_perception.load(kestrel).deployment
        if block is None:
            raise exporting.ExportError(f"{kestrel} has no to_kestrel block")
    path = exporting.package(
        run, out, name=name, version=version, weights=weights, uint8_input=uint8_input,
        int8=int8, with_preprocessing=with_preprocessing, torch_export=torch_export,
        kestrel=block, int8_points=int8_points, **read_overrides(p),
    )  # fmt: skip
    report = exporting.read_report(path)
    print(exporting.table(report).to_string(float_format="{:.4g}".format))
    kind, measured = runs.Run(run).choose_weights(weights)
    if measured:
        print(f"{kind} weights; {measured} in the run's own validation")
    print(*(f"not in the package: {text}" for text in report["left_out"].values()), path, sep="\n")
    raise typer.Exit(int(bool(report["left_out"])))


@app.command()
def predict(
    source: Annotated[Path, typer.Argument(help="a run folder, or a deployment package (.tar)")],
    inputs: Annotated[list[Path], typer.Argument(help="images, folders, .txt, .jsonl, .arrow")],
    out: Annotated[Path, typer.Option(help="the table: .csv, .jsonl or .parquet; a new file")],
    top: Annotated[int, typer.Option(help="classes per image")] = 5,
    batch_size: Annotated[int, typer.Option(help="images at once")] = 64,
    workers: Annotated[int | None, typer.Option(help="processes that read images")] = None,
    annotate_dir: Annotated[Path | None, typer.Option(help="folder for annotated images")] = None,
    weights: Weights = "",
) -> None:
    """Write the best classes of images to a table. Exit code 1 if no image could be read.

    The same command resumes after an interruption. A list has an image on each line.
    """
    from workbench import export as exporting

    opened = exporting.open_source(source, weights)
    print(f"predictions of {opened}", flush=True)
    how = {"top": top, "batch_size": batch_size, "workers": workers, "annotate_dir": annotate_dir}
    counts = exporting.predict_to_file(opened, inputs, out, **how)
    images, predicted = counted(sum(counts.values()), "image"), counts.pop("", 0)
    print(f"{images}: {counted(predicted, 'prediction')} in {out}")
    for reason, count in counts.items():
        print(f"{count:,} {reason}: see the column error")
    raise typer.Exit(int(not predicted))


@app.command("import-up")
def import_up(
    config: Annotated[Path, typer.Argument(help="a YAML file of United Perception's")],
    gpus: Annotated[int | None, typer.Option(help="its batch size is that of one")] = None,
    train_images: Annotated[int | None, typer.Option(help="if it is not ImageNet-1k")] = None,
    name: Annotated[str | None, typer.Option(help="of the run; as the file if not given")] = None,
) -> None:
    """Print the params file of a United Perception configuration, and what to know about it.

    workbench import-up res50.yaml --gpus 16 > params/res50.yaml
    """
    from workbench.importers import united_perception

    found = united_perception.load(config, gpus=gpus, train_images=train_images, name=name)
    print(found.params(), end="")
    print(found.summary(), file=sys.stderr)


@app.command()
def options(
    notebooks: Annotated[bool, typer.Option(help="write them into notebooks/")] = False,
) -> None:
    """Print every option of a recipe with its default and meaning."""
    from workbench.recipe import Recipe

    if not notebooks:
        print(Recipe.parameters_cell())
        return
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        Recipe.write_parameters_cell(path)


@app.command()
def migrate(files: Annotated[list[Path], typer.Argument(help="params files")]) -> None:
    """Rename options of earlier versions in params files, and name what is still wrong."""
    from workbench import params_files
    from workbench.recipe import RENAMED, RENAMED_VALUES, Recipe

    for path in files:
        changes = params_files.migrate(path, RENAMED, RENAMED_VALUES)
        print(f"{path}: {counted(len(changes), 'change')}", *changes, sep="\n  ")
    for path in files:
        Recipe.from_yaml(path)  # raises what is still wrong


@app.command("runs")
def list_runs(
    folder: Annotated[Path, typer.Argument(help="the folder of run folders")] = ROOT / "runs",
) -> None:
    """List the runs in a folder and in its sweeps, newest first."""
    from workbench import run_list

    if not (found := run_list.rows(folder, sweeps=True)):
        print(f"no runs in {folder}; make demo trains one")
        return
    print(*run_list.table(found), sep="\n")


if __name__ == "__main__":
    main()
