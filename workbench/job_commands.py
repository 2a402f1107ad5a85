"""The commands `submit` and `cancel`, and what all commands share."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:  # imported where needed, so that `workbench --help` starts at once
    from workbench.recipe import Recipe

app = typer.Typer(
    help="Recipes, runs and checks for image classifiers. --trust-code lets custom parts run.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Params = Annotated[Path, typer.Argument(help="a params file")]
Overrides = Annotated[
    list[str], typer.Option("-p", "--set", metavar="OPTION=VALUE", help="overrides one option")
]


def read_recipe(params: Path, overrides: list[str]) -> "Recipe":
    """The recipe of a command; prints what overrides changed. Raises RecipeError."""
    from workbench.recipe import Recipe

    recipe = Recipe.from_yaml(params, **read_overrides(overrides))
    if os.environ.get("RANK", "0") == "0":  # of several processes
        print(*(f"note: {text}\n" for text in recipe.notes), sep="", end="", flush=True)
    return recipe


def read_overrides(overrides: list[str]) -> dict[str, str]:
    """Options and values of -p. Raises RecipeError."""
    from workbench.recipe import RecipeError

    if bad := [f"-p {text}: wanted OPTION=VALUE" for text in overrides if "=" not in text]:
        raise RecipeError(bad, "command line")
    return dict(text.split("=", 1) for text in overrides)


@app.command()
def submit(
    params: Params,
    axes: Annotated[list[str] | None, typer.Argument(help="as those of sweep")] = None,
    p: Overrides = [],  # noqa: B006
    local: Annotated[int, typer.Option(min=0, help="runs at once here, without Slurm")] = 0,
    nodes: Annotated[int, typer.Option(min=1, help="of a run")] = 1,
    gpus: Annotated[int, typer.Option(min=0, help="of a node; 0: train on the CPU")] = 1,
    time: Annotated[str, typer.Option(help="limit of a run, such as 4:00:00")] = "",
    partition: Annotated[str, typer.Option(help="of Slurm")] = "",
    sbatch: Annotated[str, typer.Option(help="more options of sbatch: --account=x --mem=32G")] = "",
    dry_run: Annotated[bool, typer.Option(help="write list and script, start nothing")] = False,
) -> None:
    """Train in a job of Slurm, or detached from this terminal, a recipe or each run of a sweep."""
    recipe = read_recipe(params, p)
    from workbench import cluster, sweep
    from workbench.runs import RunError

    slurm = {"nodes": nodes, "gpus": gpus, "time": time, "partition": partition, "sbatch": sbatch}
    given = {k: v for k, v in slurm.items() if v != {"nodes": 1, "gpus": 1}.get(k, "")}
    if local and given:
        raise RunError(f"--{' --'.join(given)} of Slurm and --local exclude each other; keep one")
    options = sweep.parse_axes(axes or [])
    print(*(f"note: {text}\n" for text in cluster.notes(recipe, time)), sep="", end="")
    print(cluster.submit(recipe, options, local=local, dry_run=dry_run, **slurm))


@app.command()
def cancel(
    folders: Annotated[list[Path], typer.Argument(help="of runs or sweeps, also as in `runs`")],
) -> None:
    """Cancel the jobs of runs, queued or running; these stop with a checkpoint."""
    from workbench import jobs

    print(*jobs.cancel([path for folder in folders for path in jobs.run_folders(folder)]), sep="\n")
