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

# module -> the modules of ours it may import (design, section 2); a level never imports upwards
LEVEL_0 = """
recipe runs lamb schedule losses mimic operations progress consumer
""".split()
LEVEL_1 = {
    "images": {"consumer"},
    "augmentation": {"images", "operations"},
    "batched": {"operations"},
    "data": {"augmentation", "images", "progress", "schedule"},
    "cache": {"data", "images", "progress"},
    "models": {"recipe", "runs"},
    "distillation": {"mimic", "models", "recipe", "runs"},
    "evaluation": {"data", "models"},
    "explain": {"models"},
}
BELOW_TRAINING = {*LEVEL_0, *LEVEL_1}
LEVEL_2 = {
    "training": BELOW_TRAINING - {"explain", "consumer"},
    "meter": {"data", "images", "models", "training"},
    "prediction": {
        "consumer",
        "data",
        "export",
        "images",
        "models",
        "progress",
        "recipe",
        "runs",
        "training",
    },
    "comparison": {"recipe", "runs"},
    "export": {*BELOW_TRAINING, "training", "comparison"},
    "united_perception": {"recipe", "schedule"},
    "doctor": {"data", "distillation", "models", "progress", "recipe", "schedule", "training"},
}
BELOW_VIEWS = {*BELOW_TRAINING, *LEVEL_2}
ARROWS = {
    "__init__": set(),
    **{name: set() for name in LEVEL_0},
    **LEVEL_1,
    **LEVEL_2,
    "plots": BELOW_VIEWS - {"training"},
    "views": BELOW_VIEWS | {"plots"},
    "widgets": BELOW_VIEWS | {"plots"},
    "__main__": BELOW_VIEWS | {"plots", "widgets"},
}
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py"))


def tree(module: str) -> ast.Module:
    return ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))


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
    return {p[1] for p in parts if p[0] == "workbench" and len(p) > 1} & set(ARROWS)


def test_the_reader_of_imports_sees_every_form():
    source = """
from workbench import ROOT, data
from workbench.recipe import PLACE
import workbench.plots
def late():
    from workbench import runs
"""
    assert ours(imported(ast.parse(source))) == {"data", "recipe", "plots", "runs"}


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module):
    assert module in ARROWS, "a new module has its place in the design's table"
    assert ours(imported(tree(module))) <= ARROWS[module]


@pytest.mark.parametrize("module", [m for m in LEVEL_0 if m in MODULES])
def test_level_0_takes_nothing_but_places_from_the_package(module):
    names = {n for n in imported(tree(module)) if n.split(".")[0] == "workbench"}
    assert names <= {"workbench.ROOT", "workbench.CACHE"}


def test_training_reads_the_recipe_as_a_value():
    """fit takes what has the fields; only the names of PLACE come from recipe, and late."""
    body = tree("training")
    assert {n for n in imported(body) if "recipe" in n} <= {"workbench.recipe.PLACE"}
    at_import = [node for node in body.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert "recipe" not in ours(set().union(*map(imported, at_import)))


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
        (["knobs"], ["pandas"]),  # the name it had before
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


# ---- dependencies

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
DECLARED = [*PROJECT["dependencies"], *(d for extra in EXTRAS.values() for d in extra)]


def test_every_dependency_stands_once_on_a_line_with_its_reason():
    lines = (ROOT / "pyproject.toml").read_text(encoding="utf-8").splitlines()
    with_reason = [m.group(1) for x in lines if (m := re.match(r'\s+"([^"]+)",\s+# \w+', x))]
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
    names = {re.split(r"[^\w.-]", d)[0].lower() for d in PROJECT["dependencies"]}
    for module in MODULES:
        top = {name.split(".")[0] for name in imported(tree(module))}
        for name in top - set(sys.stdlib_module_names) - {"workbench"}:
            assert DISTRIBUTION.get(name, name).lower() in names, f"{module} imports {name}"


# ---- any machine


def texts() -> list[Path]:
    found = [path for path in ROOT.iterdir() if path.is_file()]
    for folder in ("workbench", "tests", "notebooks", "params", "benchmarks", ".ci"):
        found += [path for path in (ROOT / folder).rglob("*") if path.is_file()]
    binary = {".png", ".jpg", ".gif", ".pyc", ".webp", ".safetensors"}
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


def test_the_tests_follow_the_modules():
    """One file per module, so that a change is met where one looks for it."""
    files = {path.stem.removeprefix("test_") for path in (ROOT / "tests").glob("test_*.py")}
    assert {"recipe", "schedule", "images", "augmentation", "data", "models", "evaluation"} <= files


def test_commands_and_folders_stand_where_others_look_for_them():
    for name in ("README.md", "LICENSE", "Makefile", "environment.yml", "pyproject.toml"):
        assert (ROOT / name).is_file(), name
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").split()
    assert {".venv/", "runs/", "__pycache__/"} <= set(ignored)
