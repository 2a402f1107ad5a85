"""RandAugment's levels and distribution against timm's and United Perception's; AutoAugment."""

import numpy as np
import pytest
import torch
from helpers import noise_image
from scipy import stats
from timm.data import auto_augment
from torchvision.transforms import v2

from workbench.augmentation import RandAugment, RandAugmentIncreasing, TrainTransform, describe

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
MEAN, FILL = (0.485, 0.456, 0.406), (124, 116, 104)
UP = RandAugmentIncreasing()
INC1 = RandAugmentIncreasing.timm(2, 7, 0.5, MEAN)
VARIANTS = {"up": UP, "timm": INC1}


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
    monkeypatch.setattr(auto_augment.random, "random", lambda: 0.9 if sign < 0 else 0.1)
    theirs = TIMM[name] if increasing else TIMM[name].replace("Increasing", "")
    level = auto_augment.LEVEL_TO_ARG[theirs]
    for magnitude in (0.0, 0.3, 2.5, 5.0, 7.0, 9.9, 10.0):
        value = ours.levels[name].value(magnitude, sign)
        wanted = level(magnitude, {}) if level else ()
        assert wanted == (() if value is None else (value,)), magnitude


UP_AT_7 = {  # RandAugment and RandAugmentIncreasing
    "rotate": (21, 21),
    "posterize": (2, 2),
    "solarize": (179.2, 76.8),
    "solarize_add_all": (77, 77),
    **dict.fromkeys(("color", "contrast", "brightness", "sharpness"), (1.36, 1.63)),
    **dict.fromkeys(("shear_x", "shear_y"), (0.21, 0.21)),
    **dict.fromkeys(("translate_x", "translate_y"), (70, 70)),
    **dict.fromkeys(("autocontrast", "equalize", "invert"), (None, None)),
}


def test_the_up_variant_has_united_perceptions_values():
    for i, kind in enumerate((RandAugment, RandAugmentIncreasing)):
        table = {row["operation"]: row["value"] for row in kind(m=7).table()}
        assert table == {name: pytest.approx(values[i]) for name, values in UP_AT_7.items()}
    assert UP.levels["color"].value(7, -1) == pytest.approx(0.37)
    assert UP.levels["posterize"].value(10, 1) == 0  # a black image, as in the source
    assert RandAugment().levels["posterize"].value(0, 1) == 1
    assert RandAugment().levels["color"].value(5, 1) == pytest.approx(1.0)  # identity
    assert UP.fill == (0, 0, 0) and UP.interpolations == ("nearest",)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("sign", [1, -1])
def test_a_higher_level_is_never_milder(variant, sign):
    factors = dict.fromkeys(("color", "contrast", "brightness", "sharpness"), 1)
    neutral = {"posterize": 8, "solarize": 256, **factors}  # the value that changes nothing
    for name, level in VARIANTS[variant].levels.items():
        if level.value(0, 1) is not None:
            values = np.array([level.value(m, sign) for m in np.linspace(0, 10, 201)])
            far = np.abs(values - neutral.get(name, 0))
            assert (np.diff(far) >= -1e-12).all() and far[-1] > far[0], name


def operations(variant: RandAugment, count: int = 4000) -> list[list]:
    return [variant.sample_params(np.random.default_rng(i), 224) for i in range(count)]


def rotations(variant: RandAugment, count: int = 4000) -> np.ndarray:
    steps = operations(variant, count)
    return np.array([v for step in steps for name, v, _ in step if name == "rotate"])


def test_operations_are_equally_likely_and_applied_half_of_the_time():
    steps = operations(RandAugmentIncreasing(n=3))
    names = [name for step in steps for name, _, _ in step]
    _, counts = np.unique(names, return_counts=True)
    assert len(counts) == 15 and stats.chisquare(counts).pvalue > 1e-3
    lengths = np.bincount([len(step) for step in steps], minlength=4)
    wanted = len(steps) * stats.binom(3, 0.5).pmf(range(4))
    assert stats.chisquare(lengths, wanted).pvalue > 1e-3


def test_magnitudes_are_normal_around_m_clipped_to_0_and_10_with_both_signs():
    turns = rotations(RandAugmentIncreasing(8, 7, 0.5))
    assert stats.kstest(np.abs(turns) / 3, stats.norm(7, 0.5).cdf).pvalue > 1e-3
    assert stats.binomtest(int((turns > 0).sum()), len(turns)).pvalue > 1e-3
    for m, std in ((10, 2), (0, 2)):
        turns = np.abs(rotations(RandAugment(4, m, std), 500))
        assert turns.max() <= 30 and np.isin(turns, (0, 30)).mean() > 0.3
    assert np.abs(rotations(RandAugment(4, 7, 0), 300)) == pytest.approx(21)


def test_the_timm_variant_uses_both_interpolations_and_shares_of_the_side():
    steps = [step for image in operations(INC1) for step in image]
    kinds = [kind for name, _, kind in steps if name == "shear_x"]
    assert stats.binomtest(kinds.count("bicubic"), len(kinds)).pvalue > 1e-3
    assert set(kinds) == {"bilinear", "bicubic"}
    assert {kind for name, _, kind in steps if name == "color"} == {""}
    assert INC1.at("translate_x", 10, 200)[1] == pytest.approx(90)


@pytest.mark.parametrize(
    "option, name, policy",
    [
        (True, "autoaugment", v2.AutoAugment()),
        ("trivialaugment", "trivialaugment", v2.TrivialAugmentWide()),
        ("augmix", "augmix", v2.AugMix()),
    ],
)
def test_a_policy_is_torchvisions_depends_on_its_seed_alone_and_keeps_torchs_state(
    option, name, policy
):
    transform, image, seen = TrainTransform(48, autoaugment=option), noise_image(48, 48), set()
    for seed in range(20):
        box = {"left": 0, "top": 0, "width": 48, "height": 48, "flip": False}
        torch.manual_seed(seed)
        wanted = np.asarray(policy(image))
        state = torch.get_rng_state()
        ours = transform.apply(image, {**box, name: seed})
        np.testing.assert_array_equal(ours, wanted)
        assert torch.equal(torch.get_rng_state(), state)
        seen.add(ours.tobytes())
    assert len(seen) > 10
    params = [transform.sample_params(np.random.default_rng(i), 48, 48) for i in (0, 0, 1)]
    assert params[0][name] == params[1][name] != params[2][name]
    assert name in describe(params[0])
