"""Checks everything that is claimed for a GPU, most valuable first, within a few minutes.

    python benchmarks/gpu_check.py [--device cuda|cpu] [--minutes 9] [--data TAR_GZ] [--out DIR]

Each part runs as a process of its own with a time limit, and appends what it measured to
DIR/results.jsonl, row by row, so an interrupted run keeps what it has; DIR/gpu_check.md has the
tables for README. Time that a part leaves is shared by those after it. DIR must be empty; with
--only it may have results, to which the named parts are added. Without --data the CIFAR-10 part is
left out. `--device cpu` runs the same parts with tiny sizes, two at a time: it tests this script,
and its figures mean nothing.
"""

import argparse
import contextlib
import importlib.metadata
import itertools
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
Row = dict[str, Any]
GPU_TESTS = ("training/test_lamb", "augmentation/test_device_ops", "training/test_gpu")
STATES = "PASSED|FAILED|ERROR|SKIPPED"
RESULT = re.compile(  # a line of pytest -v, alone or by pytest-xdist
    rf"(?:\[gw\d+\].*? (?P<beside>{STATES}) )?tests/\S*::(?P<test>\S+)(?: (?P<alone>{STATES}))?"
)
TARGETS = {"step loop": 1.03, "LAMB": 0.6}


# ---- the parts: generators of rows, called in a process of their own


def machine(options) -> Iterator[Row]:
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    smi = ""
    with contextlib.suppress(OSError):
        smi = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    packages = ("torch", "torchvision", "timm")
    yield {  # before torch is imported, which may take a minute on a cold disk
        "name, driver, memory": smi or "none",
        "cpu": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    }
    import torch

    yield {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch finds no GPU")


def tests(options) -> Iterator[Row]:
    """pytest -m gpu, a row as each test ends; the tests append what they measure themselves.

    On a GPU four at a time: they are small and mostly wait for processes to start.
    """
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "--durations=10", "--color=no"]
    # pytest-benchmark, where a machine has it, warns beside xdist, and a warning is an error here.
    command += ["-p", "no:cacheprovider", "-p", "no:benchmark", "-o", "addopts="]
    command += ["-n", "4"] if options.device == "cuda" else []
    command += [f"tests/{name}.py" for name in GPU_TESTS]
    environment = {
        **os.environ,
        "WORKBENCH_TEST_DEVICE": options.device,
        "WORKBENCH_TEST_RESULTS": str(options.out / "results.jsonl"),
        "PYTHONUNBUFFERED": "1",
    }
    child = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip
    for line in child.stdout:
        print(line, end="", flush=True)  # to tests.log
        if (found := RESULT.match(line)) and (state := found["alone"] or found["beside"]):
            yield {"test": found["test"], "result": state.lower()}
    if code := child.wait():
        raise SystemExit(f"pytest ended with {code}; see tests.log")


def papermill(options) -> Iterator[Row]:
    output = options.out / "02_baseline.ipynb"
    command = [sys.executable, "-m", "papermill", str(ROOT / "notebooks/02_baseline.ipynb")]
    command += [str(output), "-f", str(ROOT / "params/digits_strikes.yaml"), "-k", "python3"]
    command += ["-p", "device", options.device, "-p", "runs_dir", str(options.scratch / "runs")]
    command += (
        ["-p", "epochs", "2", "-p", "train_fraction", "0.1"] if options.device == "cpu" else []
    )
    start = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    yield {
        "notebook": output.name,
        "exit code": done.returncode,
        "seconds": round(time.monotonic() - start, 1),
        **last_epoch(options.scratch / "runs" / "digits_strikes-seed0"),
    }


def last_epoch(folder: Path) -> Row:
    from workbench import runs

    run = runs.Run(folder)
    epoch, environment = run.metrics().iloc[-1], run.environment()
    return {
        "epochs": int(epoch.epoch),
        "top1": round(float(epoch.top1), 2),
        "seconds of training": round(environment["seconds"], 1),
        "precision": environment["precision"],
        "GPU memory (MB)": environment.get("peak_gpu_memory_mb"),
    }


def step_loop(options) -> Iterator[Row]:
    """Our loop over a bare loop, eager and compiled; the bare loop is compiled as well."""
    import step_loop as benchmark
    import torch

    cuda = options.device == "cuda"
    size, batch = (224, 256) if cuda else (32, 16)
    forms = [("resnet50", False, 4), ("resnet18", False, 4), ("resnet18", True, 10)]
    forms.append(("resnet50", True, 4))  # last: it compiles for a minute
    for model, compile, blocks in forms if cuda else [("test_resnet", c, 1) for c in (False, True)]:
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        found = benchmark.measure(model, size, batch, options.device, blocks, compile=compile)
        yield {
            "model": model,
            "pixels": size,
            "batch": batch,
            "compile": compile,
            "warm-up of both (s)": round(found.warmup, 1),
            "ours (ms)": round(found.ours, 2),
            "bare (ms)": round(found.bare, 2),
            "ratio": round(found.ratio, 3),
            "target": TARGETS["step loop"],
            "img/s": round(1000 * batch / found.ours),
            "memory, both (MB)": round(torch.cuda.max_memory_allocated() / 1e6) if cuda else None,
        }


def lamb(options) -> Iterator[Row]:
    import lamb as benchmark
    import torch

    model, rounds = ("resnet50", 15) if options.device == "cuda" else ("resnet10t", 3)
    taken = benchmark.measure(model, torch.device(options.device), rounds)
    for name, times in taken.items():
        ratios = [a / b for a, b in zip(times, taken["timm Lamb"], strict=True)]
        yield {
            "optimizer": name,
            "parameters of": model,
            "ms a step": round(statistics.median(times), 3),
            "to timm's": round(statistics.median(ratios), 3),
            "from": round(min(ratios), 3),
            "to": round(max(ratios), 3),
            "target": TARGETS["LAMB"] if name == "LAMB" else None,
        }


def loaders(options) -> Iterator[Row]:
    """Whether the loaders keep up with the model, from JPEG, tar shards and the cache."""
    from input import jpegs

    from workbench import runs, training
    from workbench.recipe import Recipe

    cuda = options.device == "cuda"
    folder = options.scratch / "jpegs"
    folder.mkdir(exist_ok=True)
    files = jpegs(None, folder)[: None if cuda else 40]
    for side, copies in (("train", 80 if cuda else 2), ("val", 1)):
        for copy, (i, path) in itertools.product(range(copies), enumerate(files)):
            link = folder / "data" / side / f"class{i % 4}" / f"{copy}_{i:04d}.jpg"
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path.resolve())
    recipe = {
        "dataset": "files", "data_dir": str(folder / "data"), "allow_outside_root": True,
        "model": "resnet18" if cuda else "test_resnet", "image_size": 224 if cuda else 64,
        "val_resize": 256 if cuda else 64, "batch_size": 256 if cuda else 8, "lr": 0.01,
        "crop_scale": [0.08, 1.0], "hflip": 0.5, "randaug_n": 2, "label_smoothing": 0.1,
        "drop_last": True, "log_every": 10, "epochs": 2, "eval_every": 2, "device": options.device,
        "runs_dir": str(options.scratch / "runs"), "workers": None if cuda else 1,
    }  # fmt: skip
    pixels = {"cache": True, "train_resize": 256, "cache_dir": str(options.scratch / "pixels")}
    shards = {side: f"{side}.arrow" for side in ("train_list", "val_list")}
    for side in ("train", "val"):
        index_shards(folder / "data", side)
    kinds = (("JPEG", {}), ("tar shards", shards), ("cache", pixels))
    for number, ((kind, own), on_device) in enumerate(itertools.product(kinds, (False, True))):
        form = Recipe(**recipe, name=f"loaders{number}", augment_on_device=on_device, **own)
        run = runs.Run(form.folder)
        for _ in training.fit(form, run):
            pass
        # The first epoch starts the loaders and warms up. At the start of the second their queue
        # is full: 16 batches, which are left out where there are enough.
        steps = run.steps()
        steps = steps[steps.epoch == 2].iloc[2 if cuda else 0 :]
        yield {
            "read from": kind,
            "augment_on_device": on_device,
            "model": form.model,
            "workers": run.environment()["workers"],
            "img/s": round(float(steps.images_per_second.median())),
            "waiting for data (%)": round(100 * float(steps.data_wait.median()), 1),
            "loaders alone (img/s)": round(float(steps.loader_images_per_second.median())),
            "model alone (img/s)": round(float(steps.model_images_per_second.median())),
        }


def index_shards(folder: Path, side: str) -> None:
    """Packs the class folders of one side into tar shards, and indexes these."""
    from workbench import data

    files = sorted((folder / side).rglob("*.jpg"))
    for number, start in enumerate(range(0, len(files), 1000)):
        with tarfile.open(folder / f"{side}-{number:03d}.tar", "w", dereference=True) as tar:
            for path in files[start : start + 1000]:
                tar.add(path, path.relative_to(folder / side))
    sources = [str(folder / f"{side}-*.tar")]
    data.write_index(sources, folder / f"{side}_list.arrow", progress=False)


def cifar(options) -> Iterator[Row]:
    """Three recipes over three seeds, three runs at a time; then distillation, time permitting."""
    if options.data is None:
        yield {"left out": "no --data"}
        return
    folder = options.scratch / "data"
    with tarfile.open(options.data) as tar:
        tar.extractall(folder, filter="data")
    [root] = [p.parent for p in folder.glob("*/meta")]
    shared = {
        "data_dir": str(root), "runs_dir": str(options.scratch / "runs"), "cache": True,
        "cache_dir": str(options.scratch / "pixels"), "device": options.device, "log_every": 50,
    }  # fmt: skip
    names = ["cifar10_baseline", "cifar10_bag_of_tricks", "cifar10_strikes"]
    longer: dict[str, Row] = {}
    if options.device == "cuda":
        workers = max(1, len(os.sched_getaffinity(0)) // 3)
        epochs = options.epochs
        shared |= {"epochs": epochs, "eval_every": max(1, epochs // 3), "workers": workers}
        steps = [round(share * epochs) for share in (0.3, 0.6, 0.9)]  # as in the recipe
        longer = {"cifar10_baseline": {"milestones": steps}}
        seeds, students = range(3), ["kl", "dist"]
    else:
        shared |= {"epochs": 1, "workers": 0, "train_fraction": 0.004, "model": "test_resnet"}
        shared |= {"warmup_epochs": 0.5}
        longer = {"cifar10_baseline": {"milestones": [], "schedule": "cosine"}}
        seeds, students, names = range(1), [], names[:2]
    prepare(f"params/{names[0]}.yaml", {**shared, **longer.get(names[0], {})})
    taken = 0.0
    for seed in seeds:
        if time.time() + taken > options.deadline:
            return
        start = time.time()
        jobs = [(name, {**shared, **longer.get(name, {}), "seed": seed}) for name in names]
        yield from trained(jobs)
        taken = time.time() - start
        yield verdicts(options, names)
    if not students or time.time() + 2 * taken > options.deadline:
        return
    yield from trained([("cifar10_teacher", {**shared, "epochs": options.epochs // 2})])
    place = str(options.scratch / "runs" / "cifar10_teacher-seed0")
    for seed in seeds:
        if time.time() + taken > options.deadline:
            return
        own = {**shared, "teacher": place, "seed": seed}
        yield from trained(
            [
                ("cifar10_distillation", {**own, "kd_loss": kind, "name": f"cifar10_{kind}"})
                for kind in students
            ]
        )
        yield verdicts(options, [f"cifar10_{kind}" for kind in students])


def prepare(params: str, overrides: Row) -> None:
    """Verifies the images and builds the pixel cache once, before several runs need them."""
    from workbench import data, training
    from workbench.recipe import Recipe

    recipe = Recipe.from_yaml(ROOT / params, **overrides)
    dataset = data.load_dataset(recipe)
    train, val = data.verify_images(dataset.train), data.verify_images(dataset.val)
    training.build_pixel_caches(recipe, train, val)


def verdicts(options, names: list[str]) -> Row:
    paths = [path for name in names for path in (options.scratch / "runs").glob(f"{name}-seed*")]
    paths = [str(path) for path in sorted(paths) if (path / "predictions.parquet").exists()]
    command = [sys.executable, "-m", "workbench", "compare", *paths]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    failed = {"failed": done.stderr[-500:]} if done.returncode else {}
    return {"verdicts": done.stdout, **failed}


def trained(jobs: list[tuple[str, Row]]) -> Iterator[Row]:
    """Trains params files with their overrides, all at a time; a row as each run ends."""
    children = {}
    for params, overrides in jobs:
        place = Path(overrides["runs_dir"], f"{overrides.get('name', params)}-seed"
                     f"{overrides.get('seed', 0)}")  # fmt: skip
        command = [sys.executable, "-m", "workbench", "train", f"params/{params}.yaml"]
        command += [word for k, v in overrides.items() for word in ("-p", f"{k}={v}")]
        place.parent.mkdir(parents=True, exist_ok=True)
        with place.with_suffix(".log").open("w") as file:
            child = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        children[child] = place
    while children:
        time.sleep(0.2)
        for child in [c for c in children if c.poll() is not None]:
            place = children.pop(child)
            if child.returncode:
                error = place.with_suffix(".log").read_text()[-800:]
                yield {"run": place.name, "failed": error}
            else:
                yield {"run": place.name, **last_epoch(place)}


# ---- the sequence

# part: share of the time, in the order of their value; what one leaves is shared by those after it
PARTS = {
    machine: 0.03,
    tests: 0.17,
    papermill: 0.08,
    step_loop: 0.22,
    lamb: 0.04,
    loaders: 0.2,
    cifar: 0.26,
}
LEAST = {machine: 90.0}  # seconds, for the first import of torch


def run_parts(options, parts: list) -> None:
    """One after the other on a GPU, each within its share of the time; two at a time on a CPU."""
    end, left = time.monotonic() + 60 * options.minutes, sum(PARTS[part] for part in parts)
    if options.device == "cpu":
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda part: run_part(part, options, end - time.monotonic()), parts))
        return
    for part in parts:
        share = (end - time.monotonic()) * PARTS[part] / left
        run_part(part, options, max(LEAST.get(part, 20.0), share))
        left -= PARTS[part]


def run_part(part, options, seconds: float) -> None:
    """Runs one part in a process of its own, and ends it when its time is over."""
    command = [sys.executable, __file__, "--part", part.__name__, "--device", options.device]
    command += ["--deadline", str(time.time() + seconds - 10), "--out", str(options.out)]
    command += ["--scratch", str(options.scratch), "--epochs", str(options.epochs)]
    command += ["--data", str(options.data)] if options.data else []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [
        str(ROOT), os.environ.get("PYTHONPATH")]))}  # fmt: skip
    start = time.monotonic()
    path = options.out / f"{part.__name__}.log"
    with path.open("w") as log:
        child = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            state = "done" if child.wait(max(1.0, seconds)) == 0 else "failed"
        except subprocess.TimeoutExpired:
            state = f"stopped after its {seconds:.0f} seconds"
        finally:
            end_family(child.pid)
            child.wait()
    row = {"state": state, "seconds": round(time.monotonic() - start, 1)}
    if state != "done":
        row["error"] = path.read_text()[-1500:]
    append(options.out, part.__name__, row)
    report = markdown(options.out, options.device)
    (options.out / "gpu_check.md").write_text(report, encoding="utf-8")
    print(f"{part.__name__}: {state}, {row['seconds']} s", flush=True)


def end_family(pid: int) -> None:
    """Kills a process and its descendants, some of which are in sessions of their own."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for one in [*process.children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()


def append(out: Path, part: str, row: Row) -> None:
    with (out / "results.jsonl").open("a") as file:
        file.write(json.dumps({"part": part, **row}) + "\n")


def markdown(out: Path, device: str) -> str:
    """The tables of results.jsonl, a section per part."""
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    text = [f"# GPU check, device {device}", ""]
    for part in PARTS:
        own = [r for r in rows if r["part"] == part.__name__]
        states = [r for r in own if "state" in r]
        own = [r for r in own if "state" not in r]
        said = ", ".join(f"{r['state']} in {r['seconds']} s" for r in states) or "not reached"
        text += [f"## {part.__name__}: {said}", ""]
        text += [f"```\n{r['verdicts'] + r.get('failed', '')}\n```" for r in own if "verdicts" in r]
        table = [r for r in own if "verdicts" not in r]
        columns = [c for c in dict.fromkeys(key for r in table for key in r) if c != "part"]
        if columns:
            cell = lambda v: "" if v is None else str(v).replace("|", "\\|").replace("\n", " ")
            lines = [columns, ["---"] * len(columns)]
            lines += [[cell(r.get(c)) for c in columns] for r in table]
            text += ["| " + " | ".join(line) + " |" for line in lines] + [""]
        text += [f"```\n{r['error']}\n```" for r in states if "error" in r] + [""]
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--data", type=Path, help="CIFAR-10 as tar.gz")
    parser.add_argument("--out", type=Path, default=Path("gpu_check"))
    parser.add_argument("--epochs", type=int, default=12, help="of the CIFAR-10 recipes")
    parser.add_argument("--only", default="", help="parts, separated by commas")
    for hidden, kind in (("--part", str), ("--deadline", float), ("--scratch", Path)):
        parser.add_argument(hidden, type=kind, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.out = options.out.resolve()
    options.data = options.data and options.data.resolve()
    if options.part:
        sys.path.insert(0, str(Path(__file__).parent))
        failed = False
        for row in globals()[options.part](options):
            append(options.out, options.part, row)
            failed |= "failed" in row
        sys.exit("a run or a comparison failed; see the rows" if failed else 0)
    named = {part.__name__: part for part in PARTS}
    if unknown := set(filter(None, options.only.split(","))) - set(named):
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(named)}")
    parts = [part for name, part in named.items() if name in (options.only or name).split(",")]
    options.out.mkdir(parents=True, exist_ok=True)
    if not options.only and any(options.out.iterdir()):
        parser.error(f"{options.out} is not empty; name another folder, or --only some parts")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with tempfile.TemporaryDirectory(prefix="gpu_check.", ignore_cleanup_errors=True) as scratch:
        options.scratch = Path(scratch)
        run_parts(options, parts)
    report = markdown(options.out, options.device)  # again: two parts may have ended together
    (options.out / "gpu_check.md").write_text(report, encoding="utf-8")
    print(report)
    results = (options.out / "results.jsonl").read_text().splitlines()
    # Of a part that was repeated the last state counts.
    states = {r["part"]: r["state"] for r in map(json.loads, results) if "state" in r}
    sys.exit(any(state != "done" for state in states.values()))


if __name__ == "__main__":
    main()
