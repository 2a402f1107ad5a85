"""Broken, hostile and odd texts."""

import copy
import random
import re
import time

import pytest
import yaml
from up_files import (
    BLOCKS,
    EMA,
    FAMILIES,
    INVALID,
    KD_NEW,
    KESTREL,
    changed,
    config,
    leaves,
    refused,
)

from workbench.importers.united_perception import UnitedPerceptionError, loads
from workbench.recipe import Recipe


def test_merged_block():
    text = "optimizer:\n  type: SGD\n  kwargs: &k {lr: 0.5, momentum: 0.8}\n"
    text += "ema:\n  enable: true\n  kwargs: {<<: *k, decay: 0.99}\n"
    assert changed(text) == dict(lr=0.5, momentum=0.8, ema_decay=0.99)
    assert changed(text.replace("<<: *k", "<<: [*k, {decay: 0.5}]"))["ema_decay"] == 0.99
    text = text.replace("<<: *k, decay: 0.99", "<<: [{decay: 0.9}, {decay: 0.8}]")
    assert changed(text)["ema_decay"] == 0.9  # of several the first, as YAML has it
    assert "wants a mapping" in refused("ema: {<<: 3}")


@pytest.mark.parametrize(
    "text, number, words",
    [
        (
            "optimizer:\n  momentum=0.9,weight_decay=0.0001)\n  type: LAMB\n  kwargs:\n"
            "    lr: 0.008\n    weight_decay: 0.02\n",
            2,
            ["'momentum=0.9,weight_decay=0.0001)'", "comment"],
        ),
        (
            "- name: post_process\ntype: base_cls_postprocess\nkwargs:\n   cls_loss:\n"
            "     type: bce\n     kwargs:\n       {}\n",
            2,
            ["`- name` entry", "indent"],
        ),
        (KESTREL.replace("'UNKNOWN'", "'UNKNOWN").split("  class")[0], 12, ["quote", "close"]),
        # the same faults where PyYAML finds something else, or nothing at all
        (
            "optimizer:\n  type: SGD\n  momentum=0.9)\n  kwargs: {lr: 1}\n",
            3,
            ["'momentum=0.9)'", "comment"],
        ),
        ("optimizer:\n  type: SGD\n  kwargs:\n    lr: 0.1\n      (of 2)\n", 5, ["'0.1 (of 2)'"]),
        ("optimizer:\ntype: SGD\nkwargs: {lr: 0.1}\n", 1, ["optimizer is empty"]),
        (KESTREL.replace("'UNKNOWN'", "'UNKNOWN"), 12, ["quote"]),
        ("a: 1\nsaver: {save_dir: 'x, b: 2}\nc: 'd'\n", 2, ["quote"]),
        ('runtime:\n  task_names: "cls\n  random_seed: 1\n  x: "y"\n', 4, ["quote"]),
        ("optimizer:\n  type: SGD\n\tkwargs: {}\n", 3, ["the tab"]),
        ("a: 1\n---\nb: 2\n", 2, ["second document"]),
        ("dataset: {a: 1\nb: 2\n", 1, ["brackets"]),
    ],
)
def test_syntax_error_names_line_and_repair(text, number, words):
    message = refused(text)
    assert f"line {number}: " in message and all(word in message for word in words), message


def nested(depth: int, mark: str = "[]") -> str:
    return f"a: {mark[0] * depth}{mark[1] * depth}"


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
HOSTILE = {  # beside those of invalid.yaml
    **INVALID,
    "deep lists": (nested(500), "nested"),
    "open lists": ("[" * 50_000, "nested"),
    "many entries": ("a: [" + "1, " * 15_000 + "]", "more entries"),
    "huge": ("# a\n" * 20_000, "at most"),
    "one line": ("a" * 59_000 + ": 1\n", "line 1"),
    "zero byte": ("a: \x00\n", "line 1"),
    "control": ("a: 1\nb: \x07\n", "line 2"),
    "surrogate": ("a: \udcff\n", "line 1"),
    "long number": (f"a: {'9' * 5000}\n", "line 1"),
    "sexagesimal": (f"a: 1{':59' * 3000}\n", "line 1"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_invalid_text_is_refused_within_a_second(name):
    text, words = HOSTILE[name]
    started = time.process_time()
    message = refused(text)
    assert time.process_time() - started < 1
    assert words in message and len(message) < 500, message


@pytest.mark.parametrize(
    "text",
    [
        "a: ~\nb: [~, {c: ~}]\n'': 1\n",
        "dataset: {}\ntrainer: {}\nnet: []\nhooks:\nmimic: {}\nto_kestrel: {}\nema: {}\nquant:\n",
        "trainer: {optimizer: {}, lr_scheduler: {}}\n",
        "lr_scheduler: {type: CosineAnnealingLR, kwargs: {T_max: 1.0e-8, warmup_iter: 9}}\n",
        "dataset: {train: {dataset: {kwargs: {transformer: [{}]}}}}\n",
        "net: [{name: head}, {type: x_head}, {kwargs: {cls_loss: []}}, {name: backbone}]\n",
        "a: |\n  two\n  lines\nb: >\n  folded\n  text\n",
        '2026-01-01: 2026-01-02\n1: 2\ntrue: no\n"a b\\nc: d": 1\n"a\\u2028b": 1\n',
        "a: {type: to_tensor, kwargs: }\n",
    ],
)
def test_odd_text_gives_valid_params(text, tmp_path):
    try:
        found = loads(text, gpus=2)
    except UnitedPerceptionError:
        return
    path = tmp_path / "recipe.yaml"
    path.write_text(found.params(), encoding="utf-8")
    assert Recipe.from_yaml(path) == found.recipe


def test_keys_cannot_inject_options(tmp_path):
    text = (
        '"a\\nlr: 5": 1\n"b\\u2028lr: 5": 1\n"c\\x85lr: 5": 1\nsaver: {"d\\nlr: 6": "\\nlr: 7"}\n'
    )
    found = loads(text, name="x\nlr: 8\x85lr: 9")
    lines = found.params().splitlines()
    assert found.recipe.non_default() == {"name": "x\nlr: 8\x85lr: 9"}
    [option] = [line for line in lines if not line.startswith("#")]
    assert option.startswith('"name": "x\\nlr: 8') and option.isprintable()
    path = tmp_path / "recipe.yaml"
    path.write_text(found.params(), encoding="utf-8")
    assert Recipe.from_yaml(path) == found.recipe


def test_params_list_at_most_100_notes(tmp_path):
    text = "".join(f"unknown_{i}: 1\n" for i in range(1000))
    found = loads(text)
    assert len(found.notes) == 1000 and "and 900 more" in found.params()
    path = tmp_path / "recipe.yaml"
    path.write_text(found.params(), encoding="utf-8")
    assert Recipe.from_yaml(path) == Recipe()


@pytest.mark.parametrize("text", [None, 5, b"a: 1", ["a: 1"]])
def test_other_types_are_refused(text):
    assert "wanted YAML text" in refused(text)


MUTATIONS = "'\"[]{}:,-&*!#|>%@ \n\t0x9.eé~"


def mutated(text: str, rng: random.Random) -> str:
    """A few cuts, copies and odd characters."""
    for _ in range(rng.randint(1, 4)):
        i, j = sorted(rng.randrange(len(text)) for _ in range(2))
        j = min(j, i + 60)
        text = rng.choice(
            [
                text[:i] + text[j:],
                text[:i] + rng.choice(MUTATIONS) + text[i + 1 :],
                text[:j] + text[i:],
                text[:i] + rng.choice(["null", "[]", "-1", "1e9", "*x", "true"]) + text[j:],
            ]
        )
        text = text or "a"
    return text


def test_mutated_text_is_read_or_refused(tmp_path):
    rng = random.Random(7)
    texts = [block["text"] for block in BLOCKS.values()] * 12
    texts += [config(**case["slots"]) for case in FAMILIES.values()]
    outcomes = {True: 0, False: 0}
    for text in texts:
        text = mutated(text, rng)
        try:
            found = loads(text)
        except UnitedPerceptionError as error:
            outcomes[False] += 1
            assert len(str(error)) > 10
            continue
        outcomes[True] += 1
        (tmp_path / "recipe.yaml").write_text(found.params(), encoding="utf-8")
        assert Recipe.from_yaml(tmp_path / "recipe.yaml") == found.recipe
    assert min(outcomes.values()) > 20


@pytest.mark.parametrize("word", ["many", "-3", "[1, 2]", "{a: 1}", "null", "true", "''", "1e30"])
def test_value_of_wrong_type_is_read_or_refused(word):
    """Every fifteenth value of a whole configuration, replaced by the word; each word its own."""
    tree = yaml.safe_load(config(extra=EMA.format(0.99) + "\n" + KD_NEW + KESTREL))
    value, places = yaml.safe_load(word), list(leaves(tree))
    for where in places[sum(map(ord, word)) % 15 :: 15]:
        spoilt = copy.deepcopy(tree)
        *path, last = [int(k) if k.isdigit() else k for k in re.findall(r"[^.\[\]]+", where)]
        node = spoilt
        for key in path:
            node = node[key]
        node[last] = value
        try:
            loads(yaml.safe_dump(spoilt, default_flow_style=None))
        except UnitedPerceptionError as error:
            assert "beyond computing" not in str(error)
