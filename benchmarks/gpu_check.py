"""Checks everything that is claimed for a GPU, most valuable first, within a few minutes.

    python benchmarks/gpu_check.py [--device cuda|cpu] [--minutes 9] [--data TAR_GZ] [--out DIR]

Each part runs as a process of its own with a time limit, and appends what it measured to
DIR/results.jsonl, row by row, so an interrupted run keeps what it has. What a part leaves of its
time goes to the last one. At the end DIR/gpu_check.md has the tables for README. Without --data
the CIFAR-10 part is left out. `--device cpu` runs the same parts with tiny sizes, two at a time:
it tests this script, and its figures mean nothing.
"""

import argparse
import contextlib
import itertools
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tarfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
Row = dict[str, Any]
TARGETS = {"step loop": 1.03, "LAMB": 0.6}


# ---- the parts: generators of rows, called in a process of their own


def machine(options) -> Iterator[Row]:
    import timm
    import torch
    import torchvision

    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    smi = ""
    with contextlib.suppress(OSError):
        smi = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    yield {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "name, driver, memory": smi or "none",
        "cpu": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
    }


def tests(options) -> Iterator[Row]:
    """pytest -m gpu, a row as each test ends; then what the tests recorded."""
    report = options.out / "tests.xml"
    report.write_text("<testsuites/>")
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "--junit-xml", str(report)]
    command += ["-p", "no:cacheprovider", "-o", "addopts=", "-o", "junit_family=xunit1"]
    command += ["--durations=10", "--color=no"]
    command += ["tests/test_gpu.py", "tests/test_lamb.py", "tests/test_batched.py"]
    environment = {**os.environ, "WORKBENCH_TEST_DEVICE": options.device, "PYTHONUNBUFFERED": "1"}
    child = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip
    for line in child.stdout:
        print(line, end="", flush=True)  # to tests.log
        if found := re.match(r"tests/\S*::(.*) (PASSED|FAILED|ERROR|SKIPPED)", line):
            yield {"test": found[1], "result": found[2].lower()}
    code = child.wait()
    for case in ElementTree.parse(report).iter("testcase"):
        if found := {p.get("name"): p.get("value") for p in case.iter("property")}:
            yield {"test": case.get("name"), "recorded": json.dumps(found)}
    if code:
        raise SystemExit(f"pytest ended with {code}; see tests.log")


def papermill(options) -> Iterator[Row]:
    output = options.out / "02_baseline.ipynb"
    command = [sys.executable, "-m", "papermill", str(ROOT / "notebooks/02_baseline.ipynb")]
    command += [str(output), "-f", str(ROOT / "params/digits_strikes.yaml"), "-k", "python3"]
    command += ["-p", "device", options.device, "-p", "runs_dir", str(options.out / "runs")]
    command += ["-p", "epochs", "2", "-p", "fraction", "0.1"] if options.device == "cpu" else []
    start = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    yield {
        "notebook": output.name,
        "exit code": done.returncode,
        "seconds": round(time.monotonic() - start, 1),
        **last_epoch(options.out / "runs" / "digits_strikes-seed0"),
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
    models = ("resnet18", "resnet50") if cuda else ("test_resnet",)
    size, batch, blocks = (224, 256, 4) if cuda else (32, 16, 1)
    for compile, model in itertools.product((False, True), models):
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        ratio, ours, bare, _ = benchmark.measure(
            model, size, batch, options.device, blocks, compile=compile
        )
        yield {
            "model": model,
            "pixels": size,
            "batch": batch,
            "compile": compile,
            "ours (ms)": round(ours, 2),
            "bare (ms)": round(bare, 2),
            "ratio": round(ratio, 3),
            "target": TARGETS["step loop"],
            "img/s": round(1000 * batch / ours),
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
    """Whether the loaders keep up with the model, from JPEG and from the cache."""
    from input import jpegs

    from workbench import runs, training
    from workbench.recipe import Recipe

    cuda = options.device == "cuda"
    folder = options.out / "jpegs"
    folder.mkdir(exist_ok=True)
    files = jpegs(None, folder)[: None if cuda else 40]
    for side, copies in (("train", 40 if cuda else 2), ("val", 1)):
        for copy, (i, path) in itertools.product(range(copies), enumerate(files)):
            link = folder / "data" / side / f"class{i % 4}" / f"{copy}_{i:04d}.jpg"
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path.resolve())
    recipe = {
        "dataset": "files", "data_dir": str(folder / "data"), "outside_root": True,
        "model": "resnet18" if cuda else "test_resnet", "image_size": 224 if cuda else 64,
        "val_resize": 256 if cuda else 64, "batch_size": 256 if cuda else 8, "lr": 0.01,
        "crop_scale": [0.08, 1.0], "flip": 0.5, "randaug_n": 2, "label_smoothing": 0.1,
        "drop_last": True, "log_every": 10, "epochs": 2, "device": options.device,
        "runs_dir": str(options.out / "runs"), "workers": None if cuda else 1,
    }  # fmt: skip
    pixels = {"cache": True, "train_resize": 256, "cache_dir": str(options.out / "pixels")}
    forms = itertools.product((False, True), (False, True))
    for number, (cached, on_device) in enumerate(forms):
        form = Recipe(
            **recipe, name=f"loaders{number}", augment_on_device=on_device,
            **(pixels if cached else {}),
        )  # fmt: skip
        run = runs.Run(form.folder)
        for _ in training.fit(form, run):
            pass
        # The first epoch starts the loaders and warms up; the second is measured.
        steps = run.steps()
        steps = steps[steps.epoch == 2]
        yield {
            "read from": "cache" if cached else "JPEG",
            "augment_on_device": on_device,
            "model": form.model,
            "workers": run.environment()["workers"],
            "img/s": round(float(steps.images_per_second.median())),
            "waiting for data (%)": round(100 * float(steps.data_wait.median()), 1),
            "loaders alone (img/s)": round(float(steps.loader_images_per_second.median())),
            "model alone (img/s)": round(float(steps.model_images_per_second.median())),
        }


def cifar(options) -> Iterator[Row]:
    """Three recipes over three seeds, three runs at a time; then distillation, time permitting."""
    if options.data is None:
        yield {"left out": "no --data"}
        return
    folder = options.out / "data"
    with tarfile.open(options.data) as tar:
        tar.extractall(folder, filter="data")
    [root] = [p.parent for p in folder.rglob("meta") if p.is_dir()]
    end = time.monotonic() + options.seconds
    shared = ["data_dir=" + str(root), f"runs_dir={options.out / 'runs'}", "cache=true"]
    shared += [f"device={options.device}", f"cache_dir={options.out / 'pixels'}", "log_every=50"]
    names = ["cifar10_baseline", "cifar10_bag_of_tricks", "cifar10_strikes"]
    if options.device == "cuda":
        workers = max(1, len(os.sched_getaffinity(0)) // 3)
        shared += ["epochs=20", f"workers={workers}"]
        longer = {"cifar10_baseline": ["milestones=[6, 12, 18]"]}
        seeds, students = range(3), ["mimic_loss=kl", "mimic_loss=dist"]
    else:
        shared += ["epochs=1", "workers=0", "fraction=0.004", "model=test_resnet"]
        shared += ["warmup_epochs=0.5"]
        longer = {"cifar10_baseline": ["milestones=[]", "schedule=cosine"]}
        seeds, students, names = range(1), [], names[:2]
    taken = 0.0
    for seed in seeds:
        jobs = [(name, [*shared, *longer.get(name, []), f"seed={seed}"]) for name in names]
        if time.monotonic() + taken > end:
            break
        start = time.monotonic()
        yield from trained(jobs, options.out / "runs")
        taken = time.monotonic() - start
    compared = [str(options.out / "runs" / f"{name}-seed{s}") for name in names for s in seeds]
    compared = [path for path in compared if (Path(path) / "predictions.parquet").exists()]
    command = [sys.executable, "-m", "workbench", "compare", *compared]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    yield {"verdicts": done.stdout or done.stderr[-500:]}
    teacher = [("cifar10_teacher", [*shared, "epochs=10"])]
    if students and time.monotonic() + 2 * taken < end:
        yield from trained(teacher, options.out / "runs")
        for seed in seeds:
            if time.monotonic() + taken > end:
                break
            jobs = []
            for loss in students:
                name = f"name=cifar10_{loss.partition('=')[2]}"
                place = f"teacher={options.out / 'runs' / 'cifar10_teacher-seed0'}"
                jobs.append(("cifar10_distillation", [*shared, loss, name, place, f"seed={seed}"]))
            yield from trained(jobs, options.out / "runs")


def trained(jobs: list[tuple[str, list[str]]], runs_dir: Path) -> Iterator[Row]:
    """Trains params files with their overrides, all at a time; a row per run."""
    children = []
    for params, overrides in jobs:
        named = dict(text.split("=", 1) for text in overrides)
        place = runs_dir / f"{named.get('name', params)}-seed{named.get('seed', 0)}"
        command = [sys.executable, "-m", "workbench", "train", f"params/{params}.yaml"]
        command += [word for text in overrides for word in ("-p", text)]
        log = place.with_suffix(".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as file:
            child = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        children.append((place, log, child))
    for place, log, child in children:
        if child.wait():
            raise SystemExit(f"{place.name}: {log.read_text()[-1500:]}")
        else:
            yield {"run": place.name, **last_epoch(place)}


# ---- the sequence

# part: share of the time, in the order of their value; the last also gets what the others leave
PARTS = {
    machine: 0.03,
    tests: 0.27,
    papermill: 0.12,
    step_loop: 0.2,
    lamb: 0.06,
    loaders: 0.12,
    cifar: 0.2,
}


def run_parts(options) -> None:
    """One after the other on a GPU, each within its share of the time; two at a time on a CPU."""
    end, left = time.monotonic() + 60 * options.minutes, 1.0
    if options.device == "cpu":
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda part: run_part(part, options, end - time.monotonic()), PARTS))
        return
    for part, share in PARTS.items():
        remaining = end - time.monotonic()
        last = part is list(PARTS)[-1]
        run_part(part, options, max(20.0, remaining if last else remaining * share / left))
        left -= share


def run_part(part, options, seconds: float) -> None:
    """Runs one part in a process group of its own, ends it when its time is over."""
    command = [sys.executable, __file__, "--part", part.__name__, "--seconds", str(seconds)]
    command += ["--device", options.device, "--out", str(options.out)]
    command += ["--data", str(options.data)] if options.data else []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [
        str(ROOT), os.environ.get("PYTHONPATH")]))}  # fmt: skip
    start = time.monotonic()
    with (options.out / f"{part.__name__}.log").open("w") as log:
        child = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        try:
            state = "done" if child.wait(seconds) == 0 else "failed"
        except subprocess.TimeoutExpired:
            state = f"stopped after its {seconds:.0f} seconds"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, 9)
            child.wait()
    row = {"state": state, "seconds": round(time.monotonic() - start, 1)}
    if state == "failed":
        row["error"] = (options.out / f"{part.__name__}.log").read_text()[-1500:]
    append(options.out, part.__name__, row)
    print(f"{part.__name__}: {state}, {row['seconds']} s", flush=True)


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
        text += [f"```\n{r['verdicts']}\n```" for r in own if "verdicts" in r]
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
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.out = options.out.resolve()
    options.data = options.data and options.data.resolve()
    if options.part:
        sys.path.insert(0, str(Path(__file__).parent))
        for row in globals()[options.part](options):
            append(options.out, options.part, row)
        return
    shutil.rmtree(options.out, ignore_errors=True)
    options.out.mkdir(parents=True)
    run_parts(options)
    report = markdown(options.out, options.device)
    (options.out / "gpu_check.md").write_text(report, encoding="utf-8")
    print(report)
    results = (options.out / "results.jsonl").read_text().splitlines()
    states = [r["state"] for r in map(json.loads, results) if "state" in r]
    sys.exit(any(state != "done" for state in states))


if __name__ == "__main__":
    main()
