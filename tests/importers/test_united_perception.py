"""The public functions: recipe, notes, params file and deployment block of a configuration."""

import os
import re
import subprocess
import sys
from collections import Counter

import pytest
import yaml
from up_files import (
    BLOCKS,
    EMA,
    FAMILIES,
    KD_NEW,
    KESTREL,
    changed,
    config,
    cosine,
    leaves,
    read,
    refused,
    said,
    wanted,
)

from workbench import ROOT
from workbench.importers.united_perception import (
    DEFECT,
    MISSING,
    NOTHING,
    TAKEN,
    UnitedPerceptionError,
    load,
    loads,
)
from workbench.recipe import Recipe


@pytest.mark.parametrize("name", FAMILIES)
def test_recipe_and_params_file_of_each_family(name, tmp_path):
    found, path = read(name), tmp_path / "recipe.yaml"
    assert found.recipe.non_default() == wanted(name)
    path.write_text(found.params(), encoding="utf-8")
    assert Recipe.from_yaml(path) == found.recipe
    options = [line for line in found.params().splitlines() if not line.startswith("#")]
    names = [line.split(":")[0] for line in options]
    assert names == [option for option in Recipe.model_fields if option in wanted(name)]
    assert all(" # " in line for line in options)
    text = " ".join(line.lstrip("# ") for line in found.params().splitlines())
    for kind, where, what in found.notes:
        if kind != TAKEN or where.startswith("--"):
            assert f"{where}: {what}" in text
    assert {note.kind for note in found.origin.values()} == {TAKEN}


def test_every_misspelt_key_is_noted_or_refused():
    """The value of a misspelt key may be lost, but not without a note."""
    text = config(extra=EMA.format(0.99) + "\n" + KD_NEW)
    text = re.sub(r"(?ms)^  test:\n.*?(?=^trainer)", "", text)  # as the training side
    covers = "not supported|the file of its weights"
    unused = "random_augmentation|auto_augmentation|rand_erase|cutmix_mixup|torch_\\w+"
    lines, silent = re.sub(rf"(?m)^({unused}): .*\n( .*\n)+", "", text).splitlines(), []
    for i, line in enumerate(lines):
        if (match := re.match(r"[ -]*(\w+):", line)) and (i % 3 or "type" not in line):
            renamed = line.replace(match[1] + ":", f"zzz_{match[1]}:", 1)
            text = "\n".join([*lines[:i], renamed, *lines[i + 1 :]])
            try:
                found = loads(text)
            except UnitedPerceptionError:
                continue
            path = next(where for where in leaves(yaml.safe_load(text)) if "zzz_" in where)
            above = {path[: m.start()] for m in re.finditer(r"[.\[]", path)}
            notes = [n for n in found.notes if n.kind != TAKEN]
            whole = [n for n in notes if n.where in above and re.search(covers, n.text)]
            if not whole and not any("zzz_" in n.where for n in notes):
                silent.append(line.partition(":")[0])
    # names that a file chooses: those of anchors
    assert silent == [line.partition(":")[0] for line in lines if re.match(r"\w+: &", line)]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_value_is_taken_or_noted(name):
    """A note is at the value, at its list, or at a block that it covers."""
    own = {n.where for n in read(name).notes}
    tree = yaml.safe_load(config(**FAMILIES[name]["slots"]))
    for where in leaves({k: v for k, v in tree.items() if k not in ("dataset", "net")}):
        above = {where[: m.start()] for m in re.finditer(r"[.\[]", where)}
        # an alias is noted at its anchor
        assert where in own or above & own - {"mimic"} or where.endswith(".num_classes"), where


def test_note_on_an_alias_is_at_its_anchor():
    found = read("plain")
    assert said(found, "num_classes", TAKEN) == "num_classes 1000"
    assert said(found, "pil_color_jitter.kwargs.hue", TAKEN) == "hue 0.1"


def test_summary_counts_notes_and_lists_assumptions():
    found = loads(config())
    assert "--gpus: not given" in found.summary() and found.recipe.batch_size == 64
    assert "--train-images: not given, 1,281,167" in found.summary()
    found = loads(config(), gpus=4, train_images=5000)
    assert "--" not in found.summary() and found.recipe.batch_size == 256
    assert MISSING + ":" not in found.summary()
    counts = Counter(note.kind for note in found.notes)
    kinds = ", ".join(f"{counts[kind]} {kind}" for kind in (MISSING, DEFECT, NOTHING, TAKEN))
    assert found.summary().startswith(f"text: {kinds}")


UNKNOWN = [
    # (in the configuration, instead, where, part of the note)
    ("type: SGD", "type: SDG", "trainer.optimizer", "'SDG' is not supported"),
    ("type: resnet18", "type: resnet18q", "net[0].type", "the nearest is 'resnet18'"),
    ("test_freq:", "test_freqq:", "trainer.test_freqq", "the nearest is 'test_freq'"),
    ("gamma:", "gama:", "trainer.lr_scheduler.kwargs.gama", "the nearest is 'gamma'"),
    ("auto_resume:", "auto_resum:", "saver.auto_resum", "the nearest is 'auto_resume'"),
]


@pytest.mark.parametrize("there, instead, where, words", UNKNOWN, ids=[u[1] for u in UNKNOWN])
def test_unknown_names_come_first(there, instead, where, words):
    text = config()
    assert there in text
    found = loads(text.replace(there, instead, 1))
    assert words in said(found, where, MISSING)
    first = found.summary().splitlines()[1:3]
    assert first[0] == f"{MISSING}:" and first[1].startswith(f"  {where}: ")
    assert found.params().splitlines()[1] == f"# {MISSING}:"


def test_option_without_effect_becomes_a_note():
    found = loads(config(length="max_epoch: 4", scheduler=cosine(0, 1, 4, 0.0)))
    assert "eval_every" not in found.recipe.non_default()
    words = "eval_every: 5 has no effect, since epochs is 4"
    assert words in said(found, "trainer.test_freq", NOTHING)
    assert said(found, "trainer.test_freq", TAKEN) == ""


def test_deployment_block_is_returned():
    found = loads(KESTREL)
    wanted = yaml.safe_load(KESTREL)["to_kestrel"]
    wanted |= {"version": "1.0", "resize_hw": [224, 256]}
    wanted["class_label"]["imagenet"]["labels"] = ["cat", "7"]
    assert found.deployment == wanted and found.recipe == Recipe()
    assert not [note for note in found.notes if note.kind != TAKEN]


@pytest.mark.parametrize(
    "old, new, where, words",
    [
        ("toks_type: cls", "toks_type: det", "toks_type", "classifier"),
        ("is_rgb: True", "is_rgb: False", "is_rgb", "RGB"),
        ("type: 'UNKNOWN'", "add_softmax: True", "add_softmax", "twice"),
        ("[123.675, 116.28, 103.53]", "[127.5, 127.5, 127.5]", "pixel_means", "123.675"),
    ],
)
def test_misleading_deployment_block_is_noted(old, new, where, words):
    text = config(extra=KESTREL.replace(old, new))
    assert words in said(loads(text), f"to_kestrel.{where}")


@pytest.mark.parametrize("name", BLOCKS)
def test_documented_block_alone(name):
    assert changed(BLOCKS[name]["text"]) == BLOCKS[name]["recipe"]


def test_alias_without_anchor_is_ups_usual_transform():
    found = loads(BLOCKS["imagenet"]["text"])
    assert "UP's usual {'kwargs': {'brightness': 0.2" in said(found, "*pil_color_jitter", TAKEN)
    assert "*normalize: no such anchor" in found.params() and "*torch_resize" in found.params()


@pytest.mark.parametrize(
    "options", [{"gpus": 0}, {"train_images": -1}, {"name": "a/b"}, {"name": "a\nb"}]
)
def test_options_are_checked(options):
    assert "name" in refused("a: 1", **options)


def test_run_is_named_after_the_file(tmp_path):
    path = tmp_path / "res18.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + config().replace("\n", "\r\n").encode())
    found = load(path, gpus=16)
    assert found.recipe.non_default() == {"name": "res18", **read("plain").recipe.non_default()}
    assert found.params().startswith("# read from United Perception's 'res18.yaml'\n")
    assert load(path, name="mine").recipe.name == "mine"


@pytest.mark.parametrize(
    "content, words",
    [
        (None, "No such file"),
        (b"\x89PNG\r\n\x1a\n", "cannot be read as text"),
        (b"a: [\n", "line "),
    ],
)
def test_file_without_text_is_refused(content, words, tmp_path):
    path = tmp_path / "x.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UnitedPerceptionError, match=r"x\.yaml: ") as caught:
        load(path)
    assert words in str(caught.value)


def command(*words) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "workbench", "import-up", *map(str, words)],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_import_up_command(tmp_path):
    gpus, path = FAMILIES["resnet50D"]["gpus"], tmp_path / "res50d.yaml"
    path.write_text(config(**FAMILIES["resnet50D"]["slots"]))
    done = command(path, "--gpus", gpus, "--train-images", 1_281_167, "--name", "mine")
    assert done.returncode == 0, done.stderr
    params = tmp_path / "params.yaml"
    params.write_text(done.stdout)
    assert Recipe.from_yaml(params) == read("resnet50D", name="mine").recipe
    assert "62,560 of 125,200 steps" in done.stderr and "--gpus" not in done.stderr
    path.write_text("optimizer:\n  type: 'SGD\n")
    done = command(path)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("UnitedPerceptionError: ") and "line 2" in done.stderr
    assert "Traceback" not in done.stderr
