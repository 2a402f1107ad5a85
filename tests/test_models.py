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


PUBLISHED = [  # name, G multiply-adds at 224 pixels, M outputs, M parameters
    # timm's table (results/model_benchmark_amp_nchw_rtx3090.csv) also counts the norms of these
    # ResNets, two for each output of a convolution.
    ("resnet18", 1.82, 2.48, 11.690),
    ("resnet34", 3.67, 3.74, 21.798),
    ("resnet50", 4.11, 11.11, 25.557),
    ("mobilenetv2_100", 0.30, 0, 3.505),  # arXiv 1801.04381, table 4: 300 M
    ("convnext_tiny", 4.5, 0, 28.589),  # arXiv 2201.03545, table 1
    ("swin_tiny_patch4_window7_224", 4.5, 0, 28.288),  # arXiv 2103.14030, table 1
    ("vit_small_patch16_224", 4.6, 0, 22.051),  # DeiT-S, arXiv 2012.12877
]


@pytest.mark.parametrize("name, published, outputs, millions", PUBLISHED)
def test_multiply_adds_and_parameters_are_the_published_ones(name, published, outputs, millions):
    """To the digits that were printed."""
    row = models.profile(timm.create_model(name), 224)
    digits = len(str(published).partition(".")[2])
    assert round(row["macs"] + 2 * outputs / 1e3, digits) == published
    assert round(row["parameters"], 3) == millions


def test_multiply_adds_include_attention():
    tokens, width, blocks = 101, 64, 6
    model = timm.create_model("test_vit", num_classes=10)
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
    assert models.profile(model.bfloat16(), 16)["activations"] == row["activations"] / 2


def test_profile_keeps_modes_hooks_and_generator():
    model = tiny().train()
    model.layer1.eval()
    modes, before = [part.training for part in model.modules()], copy.deepcopy(model)
    stream = torch.random.get_rng_state()
    models.profile(model, 32)
    assert torch.equal(stream, torch.random.get_rng_state()) and same(model, before, "-")
    assert [part.training for part in model.modules()] == modes
    assert not torch.nn.modules.module._global_forward_hooks


@pytest.mark.parametrize("name", ["resnet152", "resnet50"])
def test_both_flags_together_are_timms_resnet_d(name):
    with torch.device("meta"):
        ours = create(name, 1000, deep_stem=True, avg_down=True)
        theirs = timm.create_model(f"{name}d")
    assert shapes(ours) == shapes(theirs) and str(ours) == str(theirs)


@pytest.mark.parametrize("name", ["resnet18", "resnet152"])
@pytest.mark.parametrize("flag", ["deep_stem", "avg_down"])
def test_one_flag_changes_only_its_part(name, flag):
    with torch.device("meta"):
        plain, changed = create(name, 10), create(name, 10, **{flag: True})
    part = {"deep_stem": r"conv1", "avg_down": r"layer\d\.0\.downsample"}[flag]
    ours, theirs = shapes(plain), shapes(changed)
    assert ours != theirs
    assert all(re.match(part, key) for key in ours.keys() ^ theirs.keys())
    assert all(re.match(part, k) for k in ours.keys() & theirs.keys() if ours[k] != theirs[k])


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "test_resnet"])
def test_without_drop_path_no_block_is_skipped_whatever_the_model_has_by_default(name):
    rates = lambda model: [getattr(part, "drop_prob", None) or 0.0 for part in model.modules()]
    assert max(rates(create(name, 10))) == 0
    assert max(rates(create(name, 10, drop_path=0.3))) == pytest.approx(0.3, abs=0.16)


def test_drop_path_grows_along_the_blocks_and_dropout_is_active_in_training():
    with torch.device("meta"):
        model = create("resnet50", 10, drop_path=0.05)
    rates = [getattr(m.drop_path, "drop_prob", 0.0) for m in model.modules() if hasattr(m, "conv3")]
    assert rates == pytest.approx([0.05 * i / 15 for i in range(16)])
    images, model = torch.rand(4, 3, 32, 32), tiny(dropout=0.5)
    assert torch.equal(model.eval()(images), model(images))
    assert not torch.equal(model.train()(images), model(images))


def test_image_size_reaches_models_of_fixed_size():
    with torch.device("meta"):
        model = create("vit_tiny_patch16_224", 10, image_size=64)
    assert model.pos_embed.shape[1] == (64 // 16) ** 2 + 1


@pytest.mark.parametrize("name", ["resnet5", "rasnet50"])
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


def zeros(tensors: dict) -> dict:
    return {name: value * 0 for name, value in tensors.items()}


def below(prefix: str, tensors: dict) -> dict:
    return {f"{prefix}{name}": value for name, value in tensors.items()}


def united_perception(tensors: dict) -> dict:
    """A timm ResNet's tensors under UP's names."""
    theirs = {"conv1": "backbone.layer0.0", "bn1": "backbone.layer0.1", "fc": "head.classifier"}
    names = (name.partition(".") for name in tensors)
    renamed = (theirs.get(first, f"backbone.{first}") + dot + rest for first, dot, rest in names)
    return dict(zip(renamed, tensors.values(), strict=True))


FORMATS = {
    "plain.safetensors": None,
    "plain.pth": lambda t: t,
    "up.pth.tar": lambda t: {"model": below("module.", united_perception(t)), "ema": {}},
    "up_ema.pth.tar": lambda t: {
        "model": zeros(t), "ema": {"ema_state_dict": united_perception(t), "ema_steps": 5}},
    "nested_ema.pt": lambda t: {"model": zeros(t), "ema": {"module": t, "updates": 5}},
    "averaged.pt": lambda t: {"state_dict": zeros(t), "ema_model": below("module.", t)},
    "deepspeed.pt": lambda t: {"module": t, "global_steps": 5},
    "compiled_ddp.pt": lambda t: {"model": below("module._orig_mod.", t)},
    "lightning.ckpt": lambda t: {"state_dict": below("model.", t)},
    "timm_train.pth.tar": lambda t: {"state_dict": t, "args": argparse.Namespace(lr=0.1)},
    "tutorial.pt": lambda t: {"model_state_dict": t, "optimizer_state_dict": {"state": {}}},
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
    assert "ema" not in name or "ema]" in str(result)


def test_ema_weights_are_preferred_as_timm_does(tmp_path):
    state, averaged = tiny(seed=1).state_dict(), below("module.", tiny(seed=5).state_dict())
    torch.save({"state_dict": state, "state_dict_ema": averaged}, tmp_path / "timm.pth.tar")
    ours, theirs = tiny(seed=2), tiny(seed=3)
    load(ours, tmp_path / "timm.pth.tar")
    timm.models.load_checkpoint(theirs, tmp_path / "timm.pth.tar")
    assert same(ours, theirs) and not same(ours, tiny(seed=1))


@pytest.mark.parametrize("averaged", [True, False])
def test_run_folder_gives_its_last_ema_weights_else_the_best(tmp_path, averaged):
    raw, ema, best, model = (tiny(seed=seed) for seed in (1, 3, 4, 2))
    state = {"model": raw.state_dict(), "ema": ema.state_dict() if averaged else None, "step": 7}
    with pytest.raises(ModelError, match="neither last.pt nor best.safetensors"):
        load(model, tmp_path)
    save_file(best.state_dict(), tmp_path / "best.safetensors")
    load(model, tmp_path)
    assert same(model, best)
    torch.save(state, tmp_path / "last.pt")
    assert ("[ema]" if averaged else "[model]") in str(load(model, tmp_path))
    assert same(model, ema if averaged else raw)


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
    torch.save(copy.deepcopy(source).half().state_dict(), tmp_path / "half.pth")
    load(model, tmp_path / "half.pth")
    assert model.fc.weight.dtype == torch.float32
    torch.testing.assert_close(model.fc.weight, source.fc.weight, rtol=1e-3, atol=1e-4)


def test_report_has_every_tensor_with_its_status_and_reason(tmp_path):
    tensors = tiny(10, seed=1).state_dict() | {"extra.weight": torch.zeros(3)}
    del tensors["bn1.bias"]
    torch.save(tensors, tmp_path / "odd.pth")
    model, fresh = tiny(3, seed=2), tiny(3, seed=2)
    result = load(model, tmp_path / "odd.pth")
    rows = [
        ["bn1.bias", "re-initialised", "not in the file"],
        ["fc.weight", "re-initialised", "file has (10, 96), model (3, 96)"],
        ["fc.bias", "re-initialised", "file has (10,), model (3,)"],
        ["extra.weight", "ignored", "not in the model"],
    ]
    rest = [n for n in model.state_dict() if not n.endswith("num_batches_tracked")]
    rows += [[n, "loaded", ""] for n in rest if n not in ("bn1.bias", "fc.weight", "fc.bias")]
    assert result.table().values.tolist() == rows
    assert "3 re-initialised: bn1.bias (not in the file), fc.weight (file has" in str(result)
    assert "; 1 ignored: extra.weight" in str(result)
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
    """Unpickling one makes a folder, in place of any code that a file may contain."""

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
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 half a zip", "half", None])
def test_corrupt_or_missing_file_is_refused(tmp_path, suffix, content):
    path = tmp_path / f"x.{suffix}"
    if content == "half":
        save = save_file if suffix == "safetensors" else torch.save
        save(tiny().state_dict(), path)
        content = path.read_bytes()[: path.stat().st_size // 2]
    if content is not None:
        path.write_bytes(content)
    assert str(path) in unchanged_by(tiny(), path)


@pytest.mark.parametrize("content", [{"epoch": 3}, {"model": {}}, 5, {"model": {"a": 1}}])
def test_file_without_a_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "x.pth")
    assert "no state dict" in unchanged_by(tiny(), tmp_path / "x.pth")


AMBIGUOUS = {
    "the model twice": (
        lambda t: below("student.", t) | below("teacher.", t),
        "'student.' and 'teacher.'",
    ),
    "another model": (
        lambda t: create("test_vit", 3, image_size=32).state_dict(),
        "tensors before the classifier, so it is of another model",
    ),
    "a classifier alone": (
        lambda t: {k: v for k, v in t.items() if k.startswith("fc.")},
        "of another model",
    ),
    "nothing that fits": (lambda t: {"other.weight": torch.zeros(3)}, "the file has other.weight"),
}


@pytest.mark.parametrize("case", AMBIGUOUS)
def test_file_without_the_weights_of_this_model_is_refused_in_one_line(tmp_path, case):
    content, words = AMBIGUOUS[case]
    torch.save(content(tiny(seed=1).state_dict()), tmp_path / "x.pth")
    text = unchanged_by(tiny(), tmp_path / "x.pth", force=case == "nothing that fits")
    assert words in text and "\n" not in text


def test_less_than_half_is_refused_unless_forced(tmp_path):
    source, model, fresh = tiny(seed=1), tiny(seed=2), tiny(seed=2)
    part = {k: v for k, v in source.state_dict().items() if k.startswith(("conv1", "layer1"))}
    torch.save(part, tmp_path / "part.pth")
    assert "allow_partial_weights: true" in unchanged_by(tiny(), tmp_path / "part.pth")
    loaded = load(model, tmp_path / "part.pth", force=True).loaded
    assert set(loaded) == {k for k in part if not k.endswith("num_batches_tracked")}
    wanted = fresh.state_dict() | {name: part[name] for name in loaded}
    assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())


def test_exactly_half_of_the_body_is_enough(tmp_path):
    model = create("test_vit", 3, image_size=160)
    tensors = {k: v for k, v in model.state_dict().items() if not k.startswith("head.")}
    half = len(tensors) // 2
    for count, name in ((half, "half.pth"), (half - 1, "less.pth")):
        torch.save(dict(list(tensors.items())[:count]), tmp_path / name)
    assert len(load(model, tmp_path / "half.pth").loaded) == half
    text = unchanged_by(model, tmp_path / "less.pth")
    assert f"fits {half - 1} of the model's {len(tensors)}" in text


# ---- classes of the weights


@pytest.mark.parametrize(
    "theirs, ours, expected",
    [
        (None, ["ant", "bee", "cat"], True),
        (["ant", "bee", "cat"], ["ant", "bee", "cat"], True),
        (["ant", "bee", "cat"], ["ant", "cat", "bee"], False),
        (["0", "1", "2"], ["ant", "bee", "cat"], True),  # numbers stand for any names
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


@pytest.mark.parametrize("content", [None, "{", "[]", "{}"])
def test_classes_of_a_run_folder(tmp_path, content):
    if content is not None:
        (tmp_path / "environment.json").write_text(content)
    assert models.run_classes(tmp_path) is None
    assert models.run_classes(tmp_path / "weights.pt") is None
    (tmp_path / "environment.json").write_text('{"classes": ["ant", "cafe\u0301"]}')
    (tmp_path / "weights.pt").touch()
    for path in (tmp_path, tmp_path / "weights.pt"):
        assert models.run_classes(path) == ["ant", "caf\u00e9"]  # NFC


@pytest.mark.parametrize("name, near", [("layer5", "layer4"), ("stem", "conv1")])
def test_unknown_module_has_close_names(name, near):
    model = tiny()
    assert models.module(model, "layer3.0.bn2") is model.layer3[0].bn2
    with pytest.raises(ModelError, match=f"ResNet has no module '{name}'; near: .*{near}"):
        models.module(model, name)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "convnext_tiny", "test_resnet"])
def test_head_is_the_module_that_outputs_the_classes(name):
    with torch.device("meta"):
        model = create(name, 37)
    [head] = models.heads(model)
    last = models.module(model, head.removesuffix("."))
    assert isinstance(last, nn.Linear) and last.out_features == 37


def test_eval_mode_restores_the_mode_of_every_module():
    model = tiny().train()
    model.layer3[0].bn1.eval()
    before = {name: part.training for name, part in model.named_modules()}
    with contextlib.suppress(KeyError), models.eval_mode(model):
        assert not any(part.training for part in model.modules())
        model.layer2.train()
        raise KeyError
    assert {name: part.training for name, part in model.named_modules()} == before


@pytest.mark.parametrize(
    "name, size, takes, words",
    [
        ("test_vit", 40, 160, r"does not take image_size 40 \(.*patch size .16..*; set it to 160"),
        ("test_vit_relpos", 48, 32, "test_vit_relpos does not take image_size 48 .*set it to 32"),
    ],
)
def test_unsupported_image_size_is_refused_with_one_that_works(name, size, takes, words):
    model = create(name, 3, image_size=size if name == "test_vit" else takes)
    with pytest.raises(ModelError, match=words):
        models.check_size(model, size, "image_size", takes)
    models.check_size(create(name, 3, image_size=takes), takes, "image_size", takes)


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
    assert f"; 1 resampled: pos_embed ({why})" in str(result)
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
    words = ["timm/test_resnet.r160_in1k", str(no_network), "name the file in weights"]
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)
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
