"""RandAugment's levels and distribution against timm's and United Perception's; AutoAugment."""

import numpy as np
import pytest
import torch
from helpers import noise_image
from PIL import Image
from scipy import stats
from timm.data import auto_augment
from torchvision.transforms import v2

from workbench.augmentation import (
    RandAugment,
    RandAugmentIncreasing,
    TrainTransform,
)

TIMM = {
    "autocontrast": "AutoContrast",
    "equalize": "Equalize",
    "invert": "Invert",
    "rotate": "Rotate",
    "posterize": "PosterizeIncreasing",
    "solarize": "SolarizeIncreasing",
    "solarize_add": "SolarizeAdd",
    "color": "ColorIncreasing",
    "contrast": "ContrastIncreasing",
    "brightness": "BrightnessIncreasing",
    "sharpness": "SharpnessIncreasing",
    "shear_x": "ShearX",
    "shear_y": "ShearY",
    "translate_x": "TranslateXRel",
    "translate_y": "TranslateYRel",
}


MEAN = (0.485, 0.456, 0.406)


FILL = (124, 116, 104)


UP = RandAugmentIncreasing()


INC1 = RandAugmentIncreasing.timm(2, 7, 0.5, MEAN)


FORMS = {"up": UP, "timm": INC1}


MAGNITUDES = [0.0, 0.3, 2.5, 5.0, 7.0, 9.9, 10.0]


def timm_value(name: str, magnitude: float, sign: int, monkeypatch, increasing: bool = True):
    """The arguments timm's own table gives at a magnitude, its coin falling on `sign`."""
    monkeypatch.setattr(auto_augment.random, "random", lambda: 0.9 if sign < 0 else 0.1)
    theirs = TIMM[name] if increasing else TIMM[name].replace("Increasing", "")
    level = auto_augment.LEVEL_TO_ARG[theirs]
    return level(magnitude, {}) if level else ()


def test_the_timm_variant_has_timms_operations_and_fill():
    theirs = auto_augment.rand_augment_transform("rand-m7-n2-mstd0.5-inc1", {"img_mean": FILL})
    assert sorted(op.name for op in theirs.ops) == sorted(TIMM[name] for name in INC1.levels)
    assert INC1.fill == FILL and INC1.interpolations == ("bilinear", "bicubic")
    assert {(op.prob, op.magnitude, op.magnitude_std) for op in theirs.ops} == {(0.5, 7, 0.5)}


@pytest.mark.parametrize("increasing", [True, False])
@pytest.mark.parametrize("name", TIMM)
@pytest.mark.parametrize("sign", [1, -1])
def test_a_level_of_the_timm_variant_is_timms(name, sign, increasing, monkeypatch):
    ours = INC1 if increasing else RandAugment.timm(2, 7, 0.5, MEAN)
    for magnitude in MAGNITUDES:
        value = ours.levels[name].value(magnitude, sign)
        theirs = timm_value(name, magnitude, sign, monkeypatch, increasing)
        assert theirs == (() if value is None else (value,)), magnitude


UP_AT_7 = {
    "rotate": (21, 21),
    "posterize": (2, 2),
    "solarize": (179.2, 76.8),
    "solarize_add_all": (77, 77),
    **dict.fromkeys(("color", "contrast", "brightness", "sharpness"), (1.36, 1.63)),
    "shear_x": (0.21, 0.21),
    "shear_y": (0.21, 0.21),
    "translate_x": (70, 70),
    "translate_y": (70, 70),
    **dict.fromkeys(("autocontrast", "equalize", "invert"), (None, None)),
}


def test_the_up_variant_has_united_perceptions_values():
    tables = [{r["operation"]: r["value"] for r in cls(m=7).table()} for cls in
              (RandAugment, RandAugmentIncreasing)]  # fmt: skip
    for name, wanted in UP_AT_7.items():
        for table, value in zip(tables, wanted, strict=True):
            assert table[name] == (value if value is None else pytest.approx(value)), name
    assert set(tables[0]) == set(tables[1]) == set(UP_AT_7)
    assert UP.levels["color"].value(7, -1) == pytest.approx(0.37)
    assert UP.levels["posterize"].value(10, 1) == 0  # a black image, as in the source
    assert RandAugment().levels["posterize"].value(0, 1) == 1
    assert RandAugment().levels["color"].value(5, 1) == pytest.approx(1.0)  # identity
    assert UP.fill == (0, 0, 0) and UP.interpolations == ("nearest",)


def test_the_up_variant_warps_by_nearest_neighbours_on_black():
    image = np.asarray(Image.new("RGB", (32, 32), (10, 200, 30)))
    for name in ("rotate", "shear_x", "shear_y", "translate_x", "translate_y"):
        seen = UP.apply(image, [UP.at(name, 7, 32)]).reshape(-1, 3)
        assert {tuple(c) for c in seen.tolist()} <= {(10, 200, 30), (0, 0, 0)}
        assert (seen == 0).all(1).any()


def distance(form: str, name: str, magnitude: float, sign: int) -> float:
    """How far an operation's value is from leaving an image alone."""
    value = FORMS[form].levels[name].value(magnitude, sign)
    neutral = {"posterize": 8, "solarize": 256, "color": 1, "contrast": 1, "brightness": 1,
               "sharpness": 1}.get(name, 0)  # fmt: skip
    return abs(value - neutral)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sign", [1, -1])
def test_a_higher_level_is_never_milder(form, sign):
    for name, level in FORMS[form].levels.items():
        if level.value(0, 1) is None:
            continue
        far = [distance(form, name, m, sign) for m in np.linspace(0, 10, 201)]
        assert all(a <= b + 1e-12 for a, b in zip(far, far[1:], strict=False)), name
        assert far[-1] > far[0], name


def operations(form: RandAugment, count: int = 4000) -> list[list]:
    return [form.sample_params(np.random.default_rng(i), 224) for i in range(count)]


def test_operations_are_equally_likely_and_applied_half_of_the_time():
    draws = operations(RandAugmentIncreasing(n=3))
    names = [name for draw in draws for name, _, _ in draw]
    _, counts = np.unique(names, return_counts=True)
    assert len(counts) == 15 and stats.chisquare(counts).pvalue > 1e-3
    lengths = np.bincount([len(draw) for draw in draws], minlength=4)
    wanted = len(draws) * stats.binom(3, 0.5).pmf(range(4))
    assert stats.chisquare(lengths, wanted).pvalue > 1e-3


def test_magnitudes_are_normal_around_m_clipped_to_0_and_10_with_both_signs():
    turns = [v for draw in operations(RandAugmentIncreasing(8, 7, 0.5)) for n, v, _ in draw
             if n == "rotate"]  # fmt: skip
    magnitudes = np.abs(turns) / 3
    assert stats.kstest(magnitudes, stats.norm(7, 0.5).cdf).pvalue > 1e-3
    assert stats.binomtest(int((np.array(turns) > 0).sum()), len(turns)).pvalue > 1e-3
    for m, std in ((10, 2), (0, 2)):
        turns = [v for draw in operations(RandAugment(4, m, std), 500) for n, v, _ in draw
                 if n == "rotate"]  # fmt: skip
        assert np.abs(turns).max() <= 30 and (np.isin(np.abs(turns), (0, 30))).mean() > 0.3
    still = [
        v for draw in operations(RandAugment(4, 7, 0), 300) for n, v, _ in draw if n == "rotate"
    ]
    assert np.abs(still) == pytest.approx(21)


def test_the_timm_variant_uses_both_interpolations_and_shares_of_the_side():
    draws = [op for draw in operations(INC1) for op in draw]
    kinds = [kind for name, _, kind in draws if name == "shear_x"]
    assert stats.binomtest(kinds.count("bicubic"), len(kinds)).pvalue > 1e-3
    assert set(kinds) == {"bilinear", "bicubic"}
    assert {kind for name, _, kind in draws if name == "color"} == {""}
    name, value, _ = INC1.at("translate_x", 10, 200)
    assert value == pytest.approx(90)


def test_autoaugment_depends_on_its_seed_alone_and_keeps_torchs_state():
    transform, image = TrainTransform(64, autoaugment=True), noise_image(64, 64)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    seen = []
    for i in range(20):
        draw = transform.sample_params(np.random.default_rng(i), 64, 64)
        first = transform.apply(image, draw)
        torch.rand(i)
        torch.set_rng_state(state)
        np.testing.assert_array_equal(transform.apply(image, draw), first)
        assert torch.equal(torch.get_rng_state(), state)
        seen.append(first.tobytes())
    assert len(set(seen)) > 15


def test_autoaugment_is_torchvisions():
    transform, image = TrainTransform(48, autoaugment=True), noise_image(48, 48)
    for seed in range(10):
        draw = {"left": 0, "top": 0, "width": 48, "height": 48, "flip": False, "autoaugment": seed}
        torch.manual_seed(seed)
        np.testing.assert_array_equal(transform.apply(image, draw), v2.AutoAugment()(image))
