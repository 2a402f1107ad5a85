"""Broken, hostile and odd texts."""

import random
import re
import time

import pytest
from up_files import BLOCKS, FAMILIES, KESTREL, changed, config, refused

from workbench.importers.united_perception import UnitedPerceptionError, loads
from workbench.recipe import Recipe


def test_merged_block():
    text = "optimizer:\n  type: SGD\n  kwargs: &k {lr: 0.5, momentum: 0.8}\n"
    text += "ema:\n  enable: true\n  kwargs: {<<: *k, decay: 0.99}\n"
    assert changed(text) == dict(lr=0.5, momentum=0.8, ema_decay=0.99)
    for other in ("3", "[*k, {decay: 0.5}]"):  # versions of PyYAML differ in which one wins
        assert "line 6: '<<' is no plain name" in refused(text.replace("*k,", f"{other},"))


LAMB = "optimizer:\n  momentum=0.9,weight_decay=0.0001)\n  type: LAMB\n  kwargs:\n    lr: 0.008\n"
BCE = "- name: post_process\ntype: base_cls_postprocess\nkwargs:\n   cls_loss:\n     type: bce\n"
KESTREL_OPEN = KESTREL.replace("'UNKNOWN'", "'UNKNOWN")


@pytest.mark.parametrize(
    "text, number, words",
    [
        # the three blocks of the page that are no YAML
        (LAMB, 2, ["'momentum=0.9,weight_decay=0.0001)'", "comment"]),
        (BCE, 2, ["`- name` entry", "indent"]),
        (KESTREL_OPEN.split("  class")[0], 12, ["quote", "close"]),
        # the same faults where PyYAML finds something else, or nothing at all
        ("optimizer:\n  type: SGD\n  momentum=0.9)\n  kwargs: {lr: 1}\n", 3, ["'momentum=0.9)'"]),
        ("optimizer:\n  kwargs:\n    lr: 0.1\n      (of 2)\n", 4, ["'0.1 (of 2)'", "comment"]),
        (KESTREL_OPEN, 12, ["quote"]),
        ("a: 1\nsaver: {save_dir: 'x, b: 2}\nc: 'd'\n", 2, ["quote"]),
        ("optimizer:\n  type: SGD\n\tkwargs: {}\n", 3, ["tabs"]),
        ("dataset: {a: 1\nb: 2\n", 1, ["brackets"]),
        ("saver:\n  a: 3\n  a: 4\n", 3, ["'a' appears twice"]),
        ("optimizer:\n  kwargs: {lr: *base_lr}\n", 2, ["undefined alias 'base_lr'", "anchor"]),
        ("trainer:\n  max_epoch: many\n", 2, ["trainer.max_epoch is 'many'", "integer"]),
        ("a: 1\nb: !include other.yaml\n", 2, ["!include"]),
    ],
)
def test_error_names_line_and_repair(text, number, words):
    message = refused(text)
    assert f"line {number}: " in message and all(word in message for word in words), message


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
HOSTILE = {  # text: part of the message
    "": "no blocks",
    "hello\n": "no blocks",
    "a: !!python/object/apply:os.system ['echo']\n": "python/object/apply",
    "overwrite@: {trainer.max_epoch: 3}\n": "no plain name",
    "{a: 1}: 2\n": "no plain name",
    "a: &a [*a]\n": "recursive",
    LAUGHS: "more entries",
    "a: [" + "1, " * 5_000 + "]": "more entries",
    "[" * 400: "recursion",
    "a: \x00\n": "special characters",
    f"a: {'9' * 5000}\n": "integer string",
    "optimizer: {type: SGD, kwargs: {lr: .nan}}\n": "finite number",
    "optimizer: {type: SGD, kwargs: {lr: '1e999'}}\n": "finite number",
    "optimizer: {type: SGD, kwargs: {lr: 0}}\n": "optimizer.kwargs.lr",
    "trainer: {max_epoch: 99999999}\n": "less than or equal to 100000",
    "trainer: {max_epoch: 0.5}\n": "fractional part",
    "trainer: {max_epoch: [1]}\n": "valid integer",
    "lr_scheduler: {type: CosineAnnealingLR, warmup_register_type: x}\n": "or 'no_scale_lr'",
    KESTREL.replace("labels: [cat, 7]", "names: [cat]"): "class_label",
    KESTREL.replace("plugin: classifier", "plugin: [a]"): "to_kestrel.plugin",
    'saver: {pretrain_model: "a\\nb"}\n': "spans lines",
    "a: {type: torch_random_resized_crop, kwargs: {size: [2, 3]}}\n": "valid integer",
    "a: {type: torch_color_jitter, kwargs: {brightness: [0.2, 0.2]}}\n": "valid number",
    "a: {type: torch_randerase, kwargs: {mode: Pixel}}\n": "'pixel', 'rand' or 'const'",
}


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_invalid_text_is_refused_within_two_seconds(text):
    started = time.process_time()
    message = refused(text)
    assert time.process_time() - started < 2
    assert HOSTILE[text] in message and len(message) < 500, message


@pytest.mark.parametrize(
    "text",
    [
        "a: ~\nb: [~, {c: ~}]\n1: 2\ntrue: no\n2026-01-01: 2026-01-02\n",
        "dataset: {}\ntrainer: {}\nnet: []\nhooks:\nmimic: {}\nto_kestrel: {}\nema: {}\nquant:\n",
        "lr_scheduler: {type: CosineAnnealingLR, kwargs: {T_max: 1.0e-8, warmup_iter: 9}}\n",
        "net: [{name: head}, {type: x_head}, {kwargs: {cls_loss: []}}]\n",
        "optimizer: {type: {a: 1}}\nhooks: [{type: [1]}]\na: {type: {b: 2}}\n",
    ],
)
def test_odd_text_gives_valid_params(text, tmp_path):
    found, path = loads(text, gpus=2), tmp_path / "recipe.yaml"
    path.write_text(found.params(), encoding="utf-8")
    assert Recipe.from_yaml(path) == found.recipe


def test_keys_and_names_cannot_inject_options():
    for text in ('"a\\nlr: 5": 1\n', '"b\\u2028lr: 5": 1\n', 'saver: {d: "\\nlr: 7"}\n'):
        assert "line 1: " in refused(text)
    assert "printable" in refused("a: 1", name="x\nlr: 8")
    assert loads("a: 1", source="x\nlr: 8").params().count("\n") == 3


MUTATIONS = "'\"[]{}:,-&*!#|>%@ \n\t0x9.eé~"


def mutated(text: str, rng: random.Random) -> str:
    """A few cuts, copies, odd characters and values of another type."""
    for _ in range(rng.randint(1, 4)):
        lines = text.splitlines() or ["a"]
        k = rng.randrange(len(lines))
        lines[k] = re.sub(r"(?<=: ).+", rng.choice(["many", "-3", "[1, 2]", "{a: 1}"]), lines[k])
        text = rng.choice([text, "\n".join(lines)]) or "a"
        i, j = sorted(rng.randrange(len(text)) for _ in range(2))
        j = min(j, i + 60)
        word = rng.choice(["null", "[]", "-1", "1e9", "*x", "true", *MUTATIONS])
        text = rng.choice([text[:i] + text[j:], text[:i] + word + text[j:], text[:j] + text[i:]])
        text = text or "a"
    return text


def test_mutated_text_is_read_or_refused(tmp_path):
    rng = random.Random(7)
    texts = [block["text"] for block in BLOCKS.values()] * 12
    texts += [config(**case["slots"]) for case in FAMILIES.values()]
    outcomes = {True: 0, False: 0}
    for text in texts:
        try:
            found = loads(mutated(text, rng))
        except UnitedPerceptionError:
            outcomes[False] += 1
            continue
        outcomes[True] += 1
        (tmp_path / "recipe.yaml").write_text(found.params(), encoding="utf-8")
        assert Recipe.from_yaml(tmp_path / "recipe.yaml") == found.recipe
    assert min(outcomes.values()) > 20
