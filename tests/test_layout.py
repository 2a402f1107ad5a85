"""Imports point one way, dependencies stand once, and nothing depends on one machine."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from workbench import ROOT

PACKAGE = ROOT / "workbench"

# part -> the parts it may import from (design, section 2): imports point downwards only
PARTS = {
    "__init__": "",
    "params_files": "",
    "recipe_checks": "",
    "options": "recipe_checks",
    "overrides": "recipe_checks",
    "recipe": "options overrides params_files recipe_checks",
    "locks": "",
    "runs": "locks params_files recipe",
    "jobs": "locks runs",
    "run_list": "jobs runs",
    "schedule": "recipe",
    "progress": "",
    "image_files": "",
    "shard_store": "",
    "shard_cache": "shard_store",
    "parts": "recipe recipe_checks",
    "data": (
        "image_files locks parts progress recipe recipe_checks schedule shard_cache shard_store"
    ),
    "augmentation": "data recipe",
    "models": "parts recipe recipe_checks runs",
    "evaluation": "data models recipe runs",
    "distillation": "data models parts recipe recipe_checks runs",
    "importers": "recipe recipe_checks schedule",
}
PARTS["training"] = (
    "augmentation data distillation evaluation models parts progress recipe recipe_checks runs "
    "schedule shard_store"
)
PARTS["doctor"] = f"{PARTS['training']} training"
PARTS["export"] = f"{PARTS['training']} image_files locks training"
PARTS["ui"] = f"{PARTS['export']} doctor export importers jobs params_files run_list"
PARTS["smoke"] = PARTS["sweep"] = f"{PARTS['ui']} params_files ui"
PARTS["cluster"] = f"{PARTS['sweep']} sweep"
PARTS["job_commands"] = f"{PARTS['cluster']} cluster"
PARTS["__main__"] = f"{PARTS['job_commands']} job_commands smoke"
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in PACKAGE.rglob("*.py")
)


def tree(module: str) -> ast.Module:
    path = PACKAGE.joinpath(*module.split(".")).with_suffix(".py")
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(node: ast.AST) -> set[str]:
    """Dotted names that import statements anywhere below a node bring in."""
    names = set()
    for found in ast.walk(node):
        if isinstance(found, ast.Import):
            names |= {alias.name for alias in found.names}
        elif isinstance(found, ast.ImportFrom):
            assert found.level == 0, "imports are absolute"
            names |= {f"{found.module}.{alias.name}" for alias in found.names}
    return names


def ours(names: set[str]) -> set[str]:
    parts = {tuple(name.split(".")) for name in names}
    return {p[1] for p in parts if p[0] == "workbench" and len(p) > 1} & set(PARTS)


def test_the_reader_of_imports_sees_every_form():
    source = """
from workbench import ROOT, data
from workbench.recipe import runtime_only
import workbench.ui.plots
def late():
    from workbench import runs
"""
    assert ours(imported(ast.parse(source))) == {"data", "recipe", "ui", "runs"}


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_downwards(module):
    part = module.split(".")[0]
    assert part in PARTS, "a new part has its place in the design's table"
    assert ours(imported(tree(module))) - {part} <= set(PARTS[part].split())


@pytest.mark.parametrize("part", [part for part, below in PARTS.items() if not below])
def test_the_lowest_parts_take_nothing_but_paths_from_the_package(part):
    names = {n for n in imported(tree(part)) if n.split(".")[0] == "workbench"}
    assert names <= {"workbench.ROOT", "workbench.CACHE"}


def test_a_recipe_is_judged_without_loading_anything_heavy():
    code = (
        "import sys; from workbench.recipe import Recipe; Recipe(); "
        "print([m for m in sys.argv[1:] if m in sys.modules])"
    )
    heavy = ["torch", "torchvision", "timm", "pandas", "matplotlib", "PIL", "IPython", "scipy"]
    done = subprocess.run(
        [sys.executable, "-c", code, *heavy], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "words, also",
    [
        (["--help"], ["pandas"]),
        (["options"], ["pandas"]),
        (["options"], ["pandas"]),  # the name it had before
        (["doctor", "params/resnet50_a3_100e.yaml", "--images", "9999", "--classes", "9"],
         ["pandas", "numpy"]),
        (["doctor", "params/resnet50_a3_100e.yaml"], ["pandas", "numpy"]),  # and no data there
        (["runs", "params"], ["pandas", "numpy"]),
        (["compare", "params"], []),
    ],
    ids=lambda words: " ".join(words)[:40],
)  # fmt: skip
def test_a_command_that_needs_no_network_imports_none(words, also):
    code = (
        "import sys; from workbench.__main__ import main; heavy = sys.argv.pop().split(',')\n"
        "try: main()\n"
        "except SystemExit as end: print(end, file=sys.stderr)\n"
        "print([m for m in heavy if m in sys.modules])"
    )
    heavy = ["torch", "torchvision", "timm", "matplotlib", "PIL", "IPython", "scipy", *also]
    command = [sys.executable, "-c", code, *words, ",".join(heavy)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout[-500:]
    if words[0] == "doctor" and "--images" not in words:
        assert "set data_dir, or give --images and --classes" in done.stderr


@pytest.mark.parametrize("asked", [None, "ACTIVE"])
def test_threads_wait_without_spinning_unless_asked_otherwise(asked):
    """OpenMP reads its environment once, when torch loads it."""
    code = (
        "import os, sys, workbench; early = 'torch' in sys.modules; import torch; "
        "print(early, os.environ['OMP_WAIT_POLICY'])"
    )
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    given = {"OMP_WAIT_POLICY": asked} if asked else {}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT,
        env={**clean, **given, "OMP_DISPLAY_ENV": "true"},
    )  # fmt: skip
    assert done.stdout.split() == ["False", asked or "PASSIVE"]
    assert f"OMP_WAIT_POLICY = '{asked or 'PASSIVE'}'" in done.stderr  # what OpenMP understood


# ---- size: the values reached, so that they do not grow again

LINES, LONGEST_FILE, LONGEST_FUNCTION, BRANCHES = 19_064, 450, 60, 13


def source_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def functions() -> list[tuple[str, int]]:
    """Name and lines of each function of the package."""
    found = []
    for path in source_files():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                name = f"{path.relative_to(PACKAGE)}:{node.name}"
                found.append((name, node.end_lineno - node.lineno + 1))
    return found


def test_the_package_stays_thin():
    lines = {p: len(p.read_text(encoding="utf-8").splitlines()) for p in source_files()}
    assert sum(lines.values()) <= LINES
    assert [str(p) for p, count in lines.items() if count > LONGEST_FILE] == []
    assert [name for name, count in functions() if count > LONGEST_FUNCTION] == []


def test_functions_have_few_branches():
    command = [sys.executable, "-m", "ruff", "check", str(PACKAGE), "--select", "C901", "-q"]
    command += ["--config", f"lint.mccabe.max-complexity={BRANCHES}", "--output-format", "concise"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("folder", ["workbench", "tests"])
def test_no_underscore_name_is_imported_from_the_package(folder):
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("workbench"):
                private = [a.name for a in node.names if re.match("_[^_]", a.name)]
                assert private == [], path


# ---- dependencies

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
OURS = "workbench["  # an extra that stands in another one
EVERY = [*PROJECT["dependencies"], *(d for extra in EXTRAS.values() for d in extra)]
DECLARED = [name for name in EVERY if not name.startswith(OURS)]


def test_the_tests_have_what_sweeps_with_trials_and_saved_data_sets_need():
    """Else they were skipped where nobody looks."""
    assert "workbench[search]" in EXTRAS["test"] and "optuna" in EXTRAS["search"][0]
    assert any(name.startswith("datasets>=") for name in EXTRAS["test"])
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        assert path == Path(__file__) or "importorskip(" not in path.read_text(encoding="utf-8")


def test_every_dependency_stands_once_on_a_line_with_its_reason():
    lines = (ROOT / "pyproject.toml").read_text(encoding="utf-8").splitlines()
    with_reason = [
        m.group(1) for x in lines if (m := re.match(r'\s+"([\w.\[\]-]+>=[^"]+)",\s+# \w+', x))
    ]
    assert sorted(with_reason) == sorted(DECLARED)
    names = [re.split(r"[^\w.-]", d)[0].lower() for d in DECLARED]
    assert len(set(names)) == len(names)


def test_every_dependency_has_a_lowest_version():
    assert all(re.fullmatch(r"[\w.-]+(\[\w+\])?>=[\d.]+", d) for d in DECLARED)


def test_conda_installs_the_package_and_names_no_dependency_itself():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    plain = [d for d in environment["dependencies"] if isinstance(d, str)]
    [pip] = [d for d in environment["dependencies"] if not isinstance(d, str)]
    assert pip == {"pip": ["-e .[test]"]} and "test" in EXTRAS
    assert {re.split(r"[<>=]", d)[0] for d in plain} == {"python", "pip", "make"}
    assert f"python{PROJECT['requires-python']}" in plain


# import name -> the distribution that brings it
DISTRIBUTION = {
    "PIL": "pillow",
    "yaml": "pyyaml",
    "cv2": "opencv-python-headless",
    "sklearn": "scikit-learn",
    "IPython": "ipykernel",
    "psutil": "ipykernel",
    "nbclient": "papermill",
    "huggingface_hub": "timm",
}


def test_whatever_the_package_imports_is_declared():
    asked = [d for name in EXTRAS if name != "test" for d in EXTRAS[name]]
    declared = [*PROJECT["dependencies"], *asked]
    names = {re.split(r"[^\w.-]", d)[0].lower() for d in declared}
    for module in MODULES:
        top = {name.split(".")[0] for name in imported(tree(module))}
        for name in top - set(sys.stdlib_module_names) - {"workbench"}:
            assert DISTRIBUTION.get(name, name).lower() in names, f"{module} imports {name}"


# ---- any machine


def texts() -> list[Path]:
    found = [path for path in ROOT.iterdir() if path.is_file()]
    for folder in ("workbench", "tests", "notebooks", "params", "benchmarks", ".ci"):
        found += [path for path in (ROOT / folder).rglob("*") if path.is_file()]
    binary = {".parquet", ".png", ".jpg", ".gif", ".pyc", ".webp", ".safetensors"}
    return [path for path in found if path.suffix not in binary]


# A path from the root of one person's machine; `runs/work/x` and `../root/x` are none.
MACHINE = re.compile(r"(?<![\w.~}\])-])/(?:work|root|home|Users)/[\w.]")


def test_no_file_names_a_path_of_one_machine():
    slash = "/"  # keeps this file's own examples out of its net
    assert MACHINE.search(f"cd {slash}work/main") and MACHINE.search(f'"{slash}home/me/x"')
    assert not MACHINE.search("a/work/b ../root/x my/work/x -p data_dir /data/imagenet")
    guilty = [
        f"{path.relative_to(ROOT)}:{n}: {line.strip()[:80]}"
        for path in texts()
        for n, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if MACHINE.search(line)
    ]
    assert guilty == []


def test_the_tests_mirror_the_package():
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders == {path.parent.name for path in (ROOT / "tests").glob("*/test_*.py")}


def test_commands_and_folders_stand_where_others_look_for_them():
    for name in ("README.md", "LICENSE", "Makefile", "environment.yml", "pyproject.toml"):
        assert (ROOT / name).is_file(), name
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").split()
    assert {".venv/", "runs/", "__pycache__/"} <= set(ignored)


def test_the_test_files_that_scripts_name_exist():
    named = re.findall(r"tests/[\w/]+(?:\.py)?", (ROOT / ".ci" / "run").read_text("utf-8"))
    check = (ROOT / "benchmarks" / "gpu_check.py").read_text(encoding="utf-8")
    [listed] = re.findall(r"^GPU_TESTS = \((.*)\)$", check, re.MULTILINE)
    named += [f"tests/{name}.py" for name in re.findall(r'"([\w/]+)"', listed)]
    assert len(named) > 6 and [name for name in named if not (ROOT / name).exists()] == []
