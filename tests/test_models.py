"""Models and weights against timm, torchvision and published numbers."""

import argparse
import contextlib
import copy
import json
import os
import pickle
import re
import time

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from workbench import models
from workbench.models import ModelError, create, load

RESNETS = ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]


@contextlib.contextmanager
def meta():
    """Builds models without memory or initial values: for counts and shapes."""
    with torch.device("meta"):
        yield


def shapes(model: nn.Module) -> dict[str, tuple]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def tiny(num_classes: int = 3, seed: int = 0, **options) -> nn.Module:
    return create("test_resnet", num_classes, image_size=32, seed=seed, **options)


def same(ours: nn.Module, theirs: nn.Module, leave_out: str = "num_batches_tracked") -> bool:
    pairs = zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True)
    return all(leave_out in name or torch.equal(a, b) for (name, a), b in pairs)


def unchanged_by(model: nn.Module, source, **options) -> str:
    """The error of a load that leaves the model as it was."""
    before = copy.deepcopy(model)
    with pytest.raises(ModelError) as caught:
        load(model, source, **options)
    assert same(model, before)
    return str(caught.value)


# ---- architecture and cost


@pytest.mark.parametrize(
    "name, millions",
    [  # United Perception's table; resnet101 and 152 as torchvision publishes them
        ("resnet18", 11.690),
        ("resnet34", 21.798),
        ("resnet50", 25.557),
        ("resnet101", 44.549),
        ("resnet152", 60.193),
    ],
)
def test_parameter_counts_are_the_published_ones(name, millions):
    with meta():
        count = models.parameters(create(name, 1000))
    assert round(count / 1e6, 3) == millions


PUBLISHED_MACS = [  # G at 224 pixels, of the whole network
    # timm's table (results/model_benchmark_amp_nchw_rtx3090.csv) has 1.82, 3.67 and 4.11 for these
    # ResNets: it counts norms as well, two for each output of a convolution.
    ("resnet18", 1.814, 2.48),
    ("resnet34", 3.664, 3.74),
    ("resnet50", 4.089, 11.11),
    ("mobilenetv2_100", 0.30, 6.68),  # arXiv 1801.04381, table 4: 300 M
    ("convnext_tiny", 4.5, None),  # arXiv 2201.03545, table 1
    ("swin_tiny_patch4_window7_224", 4.5, None),  # arXiv 2103.14030, table 1
    ("vit_small_patch16_224", 4.6, None),  # DeiT-S, arXiv 2012.12877
]


@pytest.mark.parametrize("name, published, outputs", PUBLISHED_MACS)
def test_multiply_adds_are_the_published_ones(name, published, outputs):
    """To the digits that were printed; the third is timm's count of outputs, in millions."""
    model = timm.create_model(name)
    row = models.profile(model, 224)
    digits = len(str(published).partition(".")[2])
    assert round(row["macs"], digits) == published
    assert row["parameters"] == sum(p.numel() for p in model.parameters()) / 1e6
    if name.startswith("resnet"):
        # Every convolution's output and its norm's, ReLUs and additions work in place; beside them
        # the stem's pooling, the pooled features and the logits.
        features = model.num_features
        small = 64 * 56 * 56 + features + 1000
        convolutions = outputs * 1e6 - 1000
        assert row["activations"] == pytest.approx(4 * (2 * convolutions + small) / 1e6, abs=0.05)
        timms = {"resnet18": 1.82, "resnet34": 3.67, "resnet50": 4.11}[name]
        assert round(row["macs"] + 2 * outputs / 1e3, 2) == timms


def test_multiply_adds_include_attention():
    tokens, width, blocks = 101, 64, 6
    model = timm.create_model("test_vit", num_classes=10)
    assert (model.embed_dim, len(model.blocks)) == (width, blocks)
    hidden = model.blocks[0].mlp.fc1.out_features
    block = tokens * (width * 3 * width + width * width + 2 * width * hidden)
    block += 2 * tokens**2 * width  # queries by keys, and the weights by the values
    total = 100 * 3 * 16 * 16 * width + blocks * block + width * 10
    assert models.profile(model, 160)["macs"] == total / 1e9


def test_activations_count_each_output_once():
    model = nn.Sequential(
        nn.Identity(),  # the image itself
        nn.Conv2d(3, 8, 3, padding=1),  # 8 x 16 x 16
        nn.ReLU(inplace=True),
        nn.Identity(),
        nn.MaxPool2d(2),  # 8 x 8 x 8
        nn.GELU(),  # as many
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(512, 10),
    )
    row = models.profile(model.train(), 16)
    assert row["activations"] == 4 * (8 * 16 * 16 + 2 * 512 + 10) / 1e6
    assert row["macs"] == (8 * 27 * 16 * 16 + 5120) / 1e9
    assert set(row) == {"parameters", "macs", "activations"}
    assert models.profile(model.bfloat16(), 16)["activations"] == row["activations"] / 2


def test_profile_keeps_modes_hooks_and_generator():
    model = create("resnet18", 10).train()
    model.layer1.eval()
    modes = [part.training for part in model.modules()]
    before, stream = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    models.profile(model, 32)
    assert torch.equal(stream, torch.random.get_rng_state())
    assert [part.training for part in model.modules()] == modes
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


@pytest.mark.parametrize("name, backbone", [("resnet152", 58.16), ("resnet50", 23.53)])
def test_both_flags_together_are_timms_resnet_d(name, backbone):
    with meta():
        ours = create(name, 1000, deep_stem=True, avg_down=True)
        theirs = timm.create_model(f"{name}d")
    assert shapes(ours) == shapes(theirs)
    assert str(ours) == str(theirs)
    classifier = sum(p.numel() for p in ours.get_classifier().parameters())
    assert round((models.parameters(ours) - classifier) / 1e6, 2) == backbone


@pytest.mark.parametrize("name", RESNETS)
@pytest.mark.parametrize("flag", ["deep_stem", "avg_down"])
def test_one_flag_changes_only_its_part(name, flag):
    with meta():
        plain, changed = create(name, 10), create(name, 10, **{flag: True})
    part = {"deep_stem": r"conv1", "avg_down": r"layer\d\.0\.downsample"}[flag]
    ours, theirs = shapes(plain), shapes(changed)
    assert ours != theirs
    assert all(re.match(part, key) for key in ours.keys() ^ theirs.keys())
    assert all(re.match(part, k) for k in ours.keys() & theirs.keys() if ours[k] != theirs[k])


def test_drop_path_grows_along_the_blocks():
    with meta():
        model = create("resnet50", 10, drop_path=0.05)
    rates = [getattr(m.drop_path, "drop_prob", 0.0) for m in model.modules() if hasattr(m, "conv3")]
    assert rates == pytest.approx([0.05 * i / 15 for i in range(16)])


def test_dropout_is_active_in_training_only():
    images, model = torch.rand(4, 3, 32, 32), tiny(dropout=0.5)
    assert not torch.equal(model.train()(images), model.train()(images))
    assert torch.equal(model.eval()(images), model.eval()(images))
    plain = tiny(dropout=0.0).train()
    assert torch.equal(plain(images), plain(images))


def test_image_size_reaches_models_of_fixed_size():
    with meta():
        model = create("vit_tiny_patch16_224", 10, image_size=64)
    assert model.pos_embed.shape[1] == (64 // 16) ** 2 + 1


@pytest.mark.parametrize("name", ["resnet5", "rasnet50", "ResNet50", "vit_base_patch16_225"])
def test_unknown_model_has_close_names(name):
    with pytest.raises(ModelError, match=f"no model '{name}'; close names: ") as caught:
        create(name, 10)
    named = str(caught.value).partition("close names: ")[2].split(", ")
    assert named and all(timm.is_model(other) for other in named)


def test_options_a_model_does_not_take_are_an_error():
    with pytest.raises(ModelError, match="vit_tiny_patch16_224"):
        create("vit_tiny_patch16_224", 10, avg_down=True)


def test_initial_weights_follow_the_seed_and_keep_the_generator():
    before = torch.get_rng_state()
    first = tiny(seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    assert same(first, tiny(seed=1)) and not same(first, tiny(seed=2))


# ---- formats of weights


def zeros(tensors: dict) -> dict:
    return {name: value * 0 for name, value in tensors.items()}


def below(prefix: str, tensors: dict) -> dict:
    return {f"{prefix}{name}": value for name, value in tensors.items()}


FORMATS = {
    "plain.safetensors": None,
    "plain.pth": lambda t: t,
    "model.pth": lambda t: {"model": t, "epoch": 3},
    "state_dict.pth": lambda t: {"state_dict": t, "arch": "resnet"},
    "ddp.pth": lambda t: {"state_dict": below("module.", t)},
    "ema.pth": lambda t: {"model": zeros(t), "ema": t},
    "no_ema.pth": lambda t: {"model": t, "ema": None},
    "timm_ema.pth": lambda t: {"state_dict": zeros(t), "state_dict_ema": below("module.", t)},
    "up.pth.tar": lambda t: {"model": t, "ema": {}},
    "up_ema.pth.tar": lambda t: {
        "model": zeros(t), "ema": {"ema_state_dict": t, "ema_steps": 5}},
    "compiled.pt": lambda t: below("_orig_mod.", t),
    "compiled_ddp.pt": lambda t: {"model": below("module._orig_mod.", t)},
    "lightning.ckpt": lambda t: {"state_dict": below("model.", t)},
    "timm_train.pth.tar": lambda t: {"state_dict": t, "args": argparse.Namespace(lr=0.1)},
    "tutorial.pt": lambda t: {"model_state_dict": t, "optimizer_state_dict": {"state": {}}},
    "alone.pt": lambda t: {"epoch": 3, "weights": below("module.", t)},
    "numpy_scalar.pt": lambda t: {"state_dict": t, "best": np.float64(3), "n": np.int64(2)},
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_of_weights_is_loaded_completely(tmp_path, name):
    source, model = tiny(seed=1), tiny(seed=2)
    if FORMATS[name] is None:
        save_file(source.state_dict(), tmp_path / name)
    else:
        torch.save(FORMATS[name](source.state_dict()), tmp_path / name)
    result = load(model, tmp_path / name)
    assert same(model, source)
    assert result.reinitialised == {} and result.ignored == []
    wanted = {k for k in source.state_dict() if not k.endswith("num_batches_tracked")}
    assert set(result.loaded) == wanted
    assert f"{len(wanted)} tensors loaded" in str(result) and str(tmp_path / name) in str(result)
    if "ema" in name:
        assert ("[model]" if name == "no_ema.pth" else "ema]") in str(result)


def test_ema_weights_are_preferred_as_timm_does(tmp_path):
    state, averaged = tiny(seed=1).state_dict(), below("module.", tiny(seed=5).state_dict())
    torch.save({"state_dict": state, "state_dict_ema": averaged}, tmp_path / "timm.pth.tar")
    ours, theirs = tiny(seed=2), tiny(seed=3)
    load(ours, tmp_path / "timm.pth.tar")
    timm.models.load_checkpoint(theirs, tmp_path / "timm.pth.tar")
    assert same(ours, theirs) and not same(ours, tiny(seed=1))


@pytest.mark.parametrize("averaged", [True, False])
def test_run_folder_gives_its_ema_weights_if_it_has_some(tmp_path, averaged):
    raw, ema, model = tiny(seed=1), tiny(seed=3), tiny(seed=2)
    state = {"model": raw.state_dict(), "ema": ema.state_dict() if averaged else None, "step": 7}
    torch.save(state, tmp_path / "last.pt")
    save_file(tiny(seed=4).state_dict(), tmp_path / "best.safetensors")
    result = load(model, tmp_path)
    assert same(model, ema if averaged else raw)
    assert ("[ema]" if averaged else "[model]") in str(result)


def test_run_folder_without_last_gives_its_best(tmp_path):
    source, model = tiny(seed=1), tiny(seed=2)
    save_file(source.state_dict(), tmp_path / "best.safetensors")
    load(model, tmp_path)
    assert same(model, source)
    (tmp_path / "best.safetensors").unlink()
    with pytest.raises(ModelError, match="neither last.pt nor best.safetensors"):
        load(model, tmp_path)


def united_perception(model: nn.Module) -> dict[str, torch.Tensor]:
    """A timm ResNet's tensors under UP's names."""
    renamed = {}
    for name, value in model.state_dict().items():
        first, _, rest = name.partition(".")
        if first == "conv1":
            name = f"backbone.layer0.0.{rest}"
        elif first == "bn1":
            name = f"backbone.layer0.1.{rest}"
        elif first == "fc":
            name = f"head.classifier.{rest}"
        else:
            name = f"backbone.{name}"
        renamed[name] = value
    return renamed


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("flags", [{}, {"deep_stem": True, "avg_down": True}])
def test_united_perception_checkpoint_is_loaded_completely(tmp_path, flags, prefix):
    source, model = (create("resnet18", 7, seed=seed, **flags) for seed in (1, 2))
    theirs = {prefix + name: value for name, value in united_perception(source).items()}
    assert prefix + "head.classifier.bias" in theirs
    assert prefix + f"backbone.layer0.0.{'0.' if flags else ''}weight" in theirs
    torch.save({"epoch": 99, "iter": 5, "model": theirs}, tmp_path / "ckpt.pth")
    result = load(model, tmp_path / "ckpt.pth")
    assert same(model, source) and not result.reinitialised and not result.ignored


def test_torchvision_checkpoint_gives_torchvisions_logits(tmp_path):
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18(num_classes=5).eval()
    torch.save(theirs.state_dict(), tmp_path / "tv.pth")
    ours = create("resnet18", 5, seed=2)
    result = load(ours, tmp_path / "tv.pth")
    assert not result.reinitialised and not result.ignored
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(images), theirs(images))


def test_half_precision_weights_are_loaded_as_float32(tmp_path):
    source, model = tiny(seed=1), tiny(seed=2)
    half = {k: v.half() if v.is_floating_point() else v for k, v in source.state_dict().items()}
    torch.save(half, tmp_path / "half.pth")
    load(model, tmp_path / "half.pth")
    assert model.fc.weight.dtype == torch.float32
    torch.testing.assert_close(model.fc.weight, source.fc.weight, rtol=1e-3, atol=1e-4)


# ---- the report


def test_report_has_every_tensor_with_its_status_and_reason(tmp_path):
    tensors = tiny(10, seed=1).state_dict()
    del tensors["bn1.bias"]
    tensors["extra.weight"] = torch.zeros(3)
    torch.save(tensors, tmp_path / "odd.pth")
    model, fresh = tiny(3, seed=2), tiny(3, seed=2)
    result = load(model, tmp_path / "odd.pth")
    table = result.table()
    assert table.columns.tolist() == ["tensor", "status", "why"]
    assert table.values.tolist()[:4] == [
        ["bn1.bias", "re-initialised", "not in the file"],
        ["fc.weight", "re-initialised", "file has (10, 96), model (3, 96)"],
        ["fc.bias", "re-initialised", "file has (10,), model (3,)"],
        ["extra.weight", "ignored", "not in the model"],
    ]
    rest = [n for n in model.state_dict() if not n.endswith("num_batches_tracked")]
    rest = [n for n in rest if n not in ("bn1.bias", "fc.weight", "fc.bias")]
    assert table.values.tolist()[4:] == [[name, "loaded", ""] for name in rest]
    assert "3 re-initialised: bn1.bias (not in the file), fc.weight (file has" in str(result)
    assert "1 in the file ignored: extra.weight" in str(result)
    assert torch.equal(model.fc.weight, fresh.fc.weight)
    assert torch.equal(model.conv1[0].weight, tensors["conv1.0.weight"])


def test_both_classifiers_of_a_model_with_two_are_reinitialised(tmp_path):
    """DeiT with a distillation token."""
    name = "deit_tiny_distilled_patch16_224"
    torch.save(create(name, 10).state_dict(), tmp_path / "ten.pth")
    model = create(name, 7)
    assert models.heads(model) == ("head.", "head_dist.")
    loaded = load(model, tmp_path / "ten.pth")
    assert sorted(loaded.reinitialised) == sorted(
        f"{head}.{kind}" for head in ("head", "head_dist") for kind in ("weight", "bias")
    )


# ---- refused files


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, value):
    tensors = tiny(seed=1).state_dict()
    tensors["layer1.0.conv1.weight"].view(-1)[3] = value
    torch.save(tensors, tmp_path / "nan.pth")
    assert "layer1.0.conv1.weight holds nan" in unchanged_by(tiny(), tmp_path / "nan.pth")


class Marker:
    """Unpickling one makes a folder: the harmless stand-in for any code a file may bring."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("way", ["torch", "pickle"])
def test_code_in_a_weights_file_is_refused_and_never_run(tmp_path, suffix, way):
    file, marker = tmp_path / f"evil.{suffix}", tmp_path / "marker"
    content = {"model": tiny().state_dict(), "extra": Marker(marker)}
    if way == "torch":
        torch.save(content, file)
    else:
        file.write_bytes(pickle.dumps(content))
    unchanged_by(tiny(), file)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Marker(marker)))
    assert marker.exists()  # the marker works


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("content", [b"", b"no weights", b"PK\x03\x04 half a zip", "half"])
def test_corrupt_file_is_refused(tmp_path, suffix, content):
    path = tmp_path / f"x.{suffix}"
    if content == "half":
        save = save_file if suffix == "safetensors" else torch.save
        save(tiny().state_dict(), path)
        content = path.read_bytes()[: path.stat().st_size // 2]
    path.write_bytes(content)
    assert str(path) in unchanged_by(tiny(), path)


@pytest.mark.parametrize(
    "content", [{"epoch": 3}, {"model": {}}, [1, 2], 5, {"model": {"a": 1}}, torch.zeros(3)]
)
def test_file_without_a_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "x.pth")
    assert "no state dict" in unchanged_by(tiny(), tmp_path / "x.pth")


def test_missing_file_is_refused(tmp_path):
    assert "are not there" in unchanged_by(tiny(), tmp_path / "none.pth")


class Stranger:
    pass


AMBIGUOUS = {
    "two unknown keys": (
        lambda t: {"student": t, "expert": t},
        "holds several state dicts, ['student', 'expert']; save that of the model alone",
    ),
    "the model twice": (
        lambda t: below("student.", t) | below("teacher.", t),
        "'student.' and 'teacher.'",
    ),
    "an object": (lambda t: {"state_dict": t, "extra": Stranger()}, "Stranger; objects beside"),
    "another model": (
        lambda t: create("test_vit", 3, image_size=32).state_dict(),
        "tensors before the classifier, so it is of another model",
    ),
    "UP's other networks": (lambda t: below("backbone.stage", t), "United Perception's names"),
    "a classifier alone": (
        lambda t: {k: v for k, v in t.items() if k.startswith("fc.")},
        "of another model",
    ),
}


@pytest.mark.parametrize("case", AMBIGUOUS)
def test_file_without_the_weights_of_this_model_is_refused_in_one_line(tmp_path, case):
    content, words = AMBIGUOUS[case]
    torch.save(content(tiny(seed=1).state_dict()), tmp_path / "x.pth")
    text = unchanged_by(tiny(), tmp_path / "x.pth")
    assert words in text and "\n" not in text and "\x1b" not in text


def test_less_than_half_is_refused_unless_forced(tmp_path):
    source = tiny(seed=1)
    part = {k: v for k, v in source.state_dict().items() if k.startswith(("conv1", "layer1"))}
    torch.save(part, tmp_path / "part.pth")
    assert "allow_partial_weights: true" in unchanged_by(tiny(), tmp_path / "part.pth")
    model, fresh = tiny(seed=2), tiny(seed=2)
    result = load(model, tmp_path / "part.pth", force=True)
    assert set(result.loaded) == {k for k in part if not k.endswith("num_batches_tracked")}
    for name, value in model.state_dict().items():
        wanted = (source if name in result.loaded else fresh).state_dict()[name]
        assert torch.equal(value, wanted), name


def test_exactly_half_of_the_body_is_enough(tmp_path):
    model = create("test_vit", 3, image_size=160)
    tensors = {k: v for k, v in model.state_dict().items() if not k.startswith("head.")}
    half, odd = divmod(len(tensors), 2)
    assert not odd
    for count, name in ((half, "half.pth"), (half - 1, "less.pth")):
        torch.save(dict(list(tensors.items())[:count]), tmp_path / name)
    assert len(load(model, tmp_path / "half.pth").loaded) == half
    text = unchanged_by(model, tmp_path / "less.pth")
    assert f"fits {half - 1} of the model's {len(tensors)}" in text


@pytest.mark.parametrize("force", [False, True])
def test_file_of_which_nothing_fits_is_refused_even_if_forced(tmp_path, force):
    torch.save({"other.weight": torch.zeros(3)}, tmp_path / "other.pth")
    text = unchanged_by(tiny(), tmp_path / "other.pth", force=force)
    assert "of another model" in text and "allow_partial_weights" not in text


# ---- classes of the weights


@pytest.mark.parametrize(
    "theirs, ours, expected",
    [
        (None, ["ant", "bee", "cat"], True),
        (["ant", "bee", "cat"], ["ant", "bee", "cat"], True),
        (["ant", "bee", "cat"], ["ant", "cat", "bee"], False),
        (["ant", "bee", "cat"], ["dog", "elk", "fox"], False),
        (["0", "1", "2"], ["ant", "bee", "cat"], True),  # numbers if nobody named the classes
        (["ant", "bee", "cat"], ["0", "1", "2"], True),
        (["1", "2", "3"], ["ant", "bee", "cat"], False),  # do not start at 0
        (["0", "1"], ["ant", "bee", "cat"], False),
        (["0", "1"], ["1", "0"], False),
        ([str(i) for i in range(11)], sorted(str(i) for i in range(11)), False),
    ],
)
def test_same_classes(theirs, ours, expected):
    assert models.same_classes(theirs, ours) is expected


@pytest.mark.parametrize("ours", [["ant", "bee", "cat"], ["dog", "elk", "fox"], None])
def test_classifier_of_other_classes_is_reinitialised(tmp_path, ours):
    source, fresh, model = tiny(seed=1), tiny(seed=2), tiny(seed=2)
    torch.save({"model": source.state_dict()}, tmp_path / "last.pt")
    (tmp_path / "environment.json").write_text(json.dumps({"classes": ["ant", "bee", "cat"]}))
    result = load(model, tmp_path, classes=ours)
    other = ours == ["dog", "elk", "fox"]
    assert torch.equal(model.fc.weight, (fresh if other else source).fc.weight)
    assert torch.equal(model.conv1[0].weight, source.conv1[0].weight)
    why = "the file's classes are others"
    assert result.reinitialised == ({"fc.weight": why, "fc.bias": why} if other else {})


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", "null"])
def test_classes_of_a_run_folder(tmp_path, content):
    if content is not None:
        (tmp_path / "environment.json").write_text(content)
    assert models.run_classes(tmp_path) is None
    assert models.run_classes(tmp_path / "weights.pt") is None
    (tmp_path / "environment.json").write_text('{"classes": ["ant", "cafe\u0301"]}')
    (tmp_path / "weights.pt").touch()
    for path in (tmp_path, tmp_path / "weights.pt"):
        assert models.run_classes(path) == ["ant", "caf\u00e9"]  # NFC


# ---- modules


def test_module_is_found_by_its_dotted_name():
    model = tiny()
    assert models.module(model, "layer3.0.bn2") is model.layer3[0].bn2
    assert models.heads(model) == ("fc.",)
    assert models.module(model, "fc") is model.fc


@pytest.mark.parametrize(
    "name, near",
    [("layer5", "layer4"), ("layer3.0.bn9", "layer3.0.bn1"), ("stem", "conv1"), ("", "")],
)
def test_unknown_module_has_close_names(name, near):
    model = tiny()
    with pytest.raises(ModelError, match=f"ResNet has no module '{name}'; near: ") as caught:
        models.module(model, name)
    told = str(caught.value).partition("near: ")[2].split(", ")
    assert near in told or not near
    assert all(models.module(model, found.partition(" and ")[0]) for found in told)


@pytest.mark.parametrize(
    "name",
    ["resnet18", "vit_tiny_patch16_224", "convnext_tiny", "swin_tiny_patch4_window7_224"],
)
def test_head_is_the_module_that_outputs_the_classes(name):
    with meta():
        model = create(name, 37)
    [head] = models.heads(model)
    last = models.module(model, head.removesuffix("."))
    assert isinstance(last, nn.Linear) and last.out_features == 37


@pytest.mark.parametrize("error", [None, KeyError])
def test_eval_mode_restores_the_mode_of_every_module(error):
    model = tiny().train()
    model.layer2.eval()
    model.layer3[0].bn1.eval()
    before = {name: part.training for name, part in model.named_modules()}
    assert set(before.values()) == {True, False}
    with contextlib.suppress(KeyError), models.eval_mode(model):
        assert not any(part.training for part in model.modules())
        model.layer2.train()
        if error:
            raise error
    assert {name: part.training for name, part in model.named_modules()} == before


# ---- image sizes


@pytest.mark.parametrize(
    "name, built, size, option, words",
    [
        ("test_vit", 40, 40, "image_size", ["test_vit", "image_size 40", "patch size (16)", "160"]),
        ("test_vit_relpos", 32, 48, "val_image_size", ["val_image_size 48", "set it to 32"]),
        (
            "test_convnext",
            16,
            16,
            "image_size",
            ["test_convnext", "image_size 16", "set it to 160"],
        ),
    ],
)
def test_unsupported_image_size_is_refused_with_one_that_works(name, built, size, option, words):
    with meta():
        model = create(name, 3, image_size=built)
        takes = built if option == "val_image_size" else model.default_cfg["input_size"][-1]
        with pytest.raises(ModelError) as caught:
            models.check_size(model, size, option, takes)
        assert all(word in str(caught.value) for word in words), caught.value
        own = create(name, 3, image_size=takes)
        models.check_size(own, takes, option, takes)


def resampled_by_timm(name: str, file, **options) -> dict[str, torch.Tensor]:
    """The weights of a file after timm's own loader, for another image size."""
    overlay = {"file": str(file), "num_classes": 3}
    model = timm.create_model(
        name, num_classes=3, pretrained=True, pretrained_cfg_overlay=overlay, **options
    )
    return model.state_dict()


def test_position_embeddings_are_resampled_as_in_timm(tmp_path):
    source, model = (create("test_vit", 3, image_size=s, seed=s) for s in (32, 64))
    torch.save(source.state_dict(), tmp_path / "vit.pt")
    result = load(model, tmp_path / "vit.pt")
    wanted = resampled_by_timm("test_vit", tmp_path / "vit.pt", img_size=64)
    assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())
    assert result.reinitialised == {} and result.ignored == []
    why = "file has (1, 5, 64), model (1, 17, 64)"
    assert f"1 of them resampled: pos_embed ({why})" in str(result)
    assert ["pos_embed", "resampled", why] in result.table().values.tolist()


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")  # timm's own
def test_tables_of_relative_positions_are_resampled_too(tmp_path):
    name, small = "swin_tiny_patch4_window7_224", {"embed_dim": 8, "depths": (1, 1)}
    small |= {"num_heads": (1, 2), "num_classes": 3}
    torch.manual_seed(0)
    source = timm.create_model(name, img_size=56, window_size=7, **small)
    model = timm.create_model(name, img_size=64, window_size=8, **small)
    torch.save(source.state_dict(), tmp_path / "swin.pt")
    result = load(model, tmp_path / "swin.pt")
    del small["num_classes"]
    wanted = resampled_by_timm(name, tmp_path / "swin.pt", img_size=64, window_size=8, **small)
    assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())
    resampled = [k for k, why in result.loaded.items() if why]
    assert len(resampled) == 2 and all(k.endswith("bias_table") for k in resampled)


# ---- published weights without a network


@pytest.fixture
def no_network(tmp_path, monkeypatch):
    """Hugging Face at a closed port, with an empty cache; returns the cache."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_published_weights_without_a_network_fail_at_once_in_one_sentence(no_network, caplog):
    start = time.monotonic()
    with pytest.raises(ModelError) as caught:
        create("test_resnet", 3, pretrained=True)
    assert time.monotonic() - start < 5
    told = str(caught.value)
    words = ["test_resnet", "timm/test_resnet.r160_in1k", str(no_network), "name it in weights"]
    assert all(word in told for word in words) and "\n" not in told
    assert not caplog.records


def test_published_weights_in_the_cache_need_no_network(no_network):
    source = timm.create_model("test_resnet")
    repository = no_network / "models--timm--test_resnet.r160_in1k"
    (repository / "snapshots" / "abc").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    save_file(source.state_dict(), repository / "snapshots" / "abc" / "model.safetensors")
    start = time.monotonic()
    model = create("test_resnet", 1000, pretrained=True)
    assert time.monotonic() - start < 5 and same(model, source)
