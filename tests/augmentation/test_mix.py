"""RandomErasing, Mixup and CutMix against their formulas and timm's statistics."""

import math
import random

import numpy as np
import pytest
import timm.data
import torch
from scipy import stats
from timm.data import random_erasing
from timm.data.mixup import cutmix_bbox_and_lam

from workbench.augmentation import MixupCutmix, RandomErasing


def erased(erase: RandomErasing, count: int = 3000, size: int = 64) -> dict[str, np.ndarray]:
    return erase.sample_params(np.random.default_rng(0), count, size)


def areas(boxes: np.ndarray) -> np.ndarray:
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def test_erased_boxes_have_the_stated_areas_and_aspects():
    boxes = erased(RandomErasing(1.0))["boxes"][:, 0]
    assert boxes.any(1).all()
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert (boxes[:, :2].min(0) == 0).all() and (boxes[:, 2:].max(0) == 64).all()
    assert (width < 64).all() and (height < 64).all()
    small = areas(boxes) < 64 * 64 * 0.2  # every aspect fits, so no attempt was lost
    shares, aspects = areas(boxes)[small] / 64**2, np.log((height / width)[small])
    assert stats.kstest(shares, stats.uniform(0.02, 0.18).cdf).pvalue > 1e-3
    assert stats.kstest(aspects, stats.uniform(math.log(0.3), -2 * math.log(0.3)).cdf).pvalue > 1e-4


def test_erased_areas_have_timms_distribution():
    random.seed(0)
    theirs = random_erasing.RandomErasing(1.0, mode="const", device="cpu")
    shares = [(theirs(torch.ones(3, 48, 48))[0] == 0).float().mean().item() for _ in range(1500)]
    ours = areas(erased(RandomErasing(1.0), 1500, 48)["boxes"][:, 0]) / 48**2
    assert stats.ks_2samp(shares, ours).pvalue > 1e-3


def test_erasing_has_its_probability_and_up_to_count_boxes():
    chosen = erased(RandomErasing(0.25))["boxes"].any((1, 2))
    assert stats.binomtest(int(chosen.sum()), len(chosen), 0.25).pvalue > 1e-3
    boxes = erased(RandomErasing(1.0, count=3))["boxes"]
    assert set(boxes.any(2).sum(1)) == {1, 2, 3}
    assert areas(boxes).sum(1).max() / 64**2 < 1 / 3 + 0.05  # the boxes share the area


@pytest.mark.parametrize("mode", ["pixel", "rand", "const"])
def test_the_three_modes_fill_the_box_and_nothing_else(mode):
    erase = RandomErasing(1.0, mode)
    params, images, noise = erased(erase, 8, 32), torch.full((8, 3, 32, 32), 7.0), []
    assert erase.apply(images, **params).data_ptr() == images.data_ptr()
    for image, [(left, top, right, bottom)] in zip(images, params["boxes"].tolist(), strict=True):
        inside = image[:, top:bottom, left:right]
        outside = torch.ones(32, 32, dtype=bool)
        outside[top:bottom, left:right] = False
        assert (image[:, outside] == 7).all() and not (inside == 7).any()
        assert mode == "pixel" or [len(channel.unique()) for channel in inside] == [1, 1, 1]
        assert (inside == 0).all() == (mode == "const")
        noise.append(inside.flatten())
    if mode == "pixel":
        assert stats.kstest(torch.cat(noise).numpy(), stats.norm.cdf).pvalue > 1e-3


def test_the_noise_of_an_image_does_not_depend_on_its_neighbours():
    erase, params = RandomErasing(1.0), erased(RandomErasing(1.0), 6, 32)
    whole = erase.apply(torch.zeros(6, 3, 32, 32), **params)
    for i in range(6):
        alone = erase.apply(torch.zeros(1, 3, 32, 32), **{k: v[[i]] for k, v in params.items()})
        assert torch.equal(alone[0], whole[i])


# ---- Mixup and CutMix


def mixed(mix: MixupCutmix, count: int = 6, seed: int = 0):
    """Noise, what a mix makes of it, the soft labels, and the parameters."""
    rng = np.random.default_rng(seed)
    images = torch.from_numpy(rng.normal(size=(count, 3, 32, 32))).float()
    targets, params = torch.eye(count), mix.sample_params(rng, count, 32)
    return images, *mix.apply(images, targets, np.arange(count), **params), params


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("per_sample", [False, True])
def test_mixup_is_its_formula_between_neighbours(per_sample, seed):
    images, result, targets, params = mixed(MixupCutmix(0.8, per_sample=per_sample), seed=seed)
    for i in range(6):
        lam = params["lam"][i]
        torch.testing.assert_close(result[i], lam * images[i] + (1 - lam) * images[i ^ 1])
        wanted = torch.zeros(6)
        wanted[i], wanted[i ^ 1] = lam, 1 - lam
        torch.testing.assert_close(targets[i], wanted)
    assert len(set(params["lam"])) == (6 if per_sample else 1)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("per_sample", [False, True])
def test_cutmix_pastes_the_neighbours_box_and_uses_its_true_area(per_sample, seed):
    images, result, targets, params = mixed(MixupCutmix(0.0, 1.0, per_sample=per_sample), seed=seed)
    for i, (left, top, right, bottom) in enumerate(params["boxes"].tolist()):
        wanted = images[i].clone()
        wanted[:, top:bottom, left:right] = images[i ^ 1][:, top:bottom, left:right]
        assert torch.equal(result[i], wanted)
        own = (result[i] == images[i]).all(0).float().mean().item()
        assert targets[i, i].item() == pytest.approx(own, abs=1e-6)
        assert params["lam"][i] == pytest.approx(own)


def test_an_image_without_its_partner_is_unchanged():
    mix, images, targets = MixupCutmix(0.0, 1.0), torch.randn(3, 3, 16, 16), torch.eye(3)
    positions = np.array([1, 4, 5])  # 0 could not be read
    params = mix.sample_params(np.random.default_rng(3), 6, 16)
    params = {key: values[positions] for key, values in params.items()}
    result, labels = mix.apply(images, targets, positions, **params)
    assert torch.equal(result[0], images[0]) and torch.equal(labels[0], targets[0])
    assert not torch.equal(result[1], images[1]) and labels[1, 2] > 0


def test_mixup_and_cutmix_have_timms_distributions():
    """Weights and boxes, sampled 3,000 times by timm's Mixup per element and by ours."""
    np.random.seed(0)  # noqa: NPY002  timm samples from it
    theirs = timm.data.Mixup(0.2, 1.0, switch_prob=0.4, mode="elem", num_classes=2)
    lam, cut = theirs._params_per_elem(3000)
    boxes = [cutmix_bbox_and_lam((3, 64, 64), x) for x in lam[cut]]
    weights = np.concatenate([lam[~cut], [b[1] for b in boxes]])
    mix = MixupCutmix(0.2, 1.0, 0.4, per_sample=True)
    ours = mix.sample_params(np.random.default_rng(0), 3000, 64)
    assert stats.ks_2samp(weights, ours["lam"]).pvalue > 1e-3
    for k, name in enumerate(("left", "top", "right", "bottom")):
        own = ours["boxes"][ours["boxes"].any(1), k]
        order = (2, 0, 3, 1)[k]  # timm's are top, bottom, left, right
        assert stats.ks_2samp([b[0][order] for b in boxes], own).pvalue > 1e-3, name


def test_a_step_has_one_weight_and_cutmix_its_switch_probability():
    mix = MixupCutmix(0.8, 1.0, 0.3)
    steps = [mix.sample_params(np.random.default_rng(i), 4, 224) for i in range(1500)]
    cut = sum(bool(params["boxes"].any()) for params in steps)
    assert stats.binomtest(cut, len(steps), 0.3).pvalue > 1e-3
    for params in steps[:50]:
        assert all((values == values[0]).all() for values in params.values())


@pytest.mark.parametrize("mode", ["elem", "batch"])
def test_the_mixing_probability_is_timms(mode):
    np.random.seed(0)  # noqa: NPY002  timm samples from it
    theirs = timm.data.Mixup(0.8, 1.0, prob=0.3, mode=mode, num_classes=2)
    mix = MixupCutmix(0.8, 1.0, 0.5, mode == "elem", 0.3)
    if mode == "elem":
        mixed_by_timm = int((theirs._params_per_elem(3000)[0] < 1).sum())
        ours = [mix.sample_params(np.random.default_rng(0), 3000, 224)]
    else:
        mixed_by_timm = sum(theirs._params_per_batch()[0] < 1 for _ in range(3000))
        ours = [mix.sample_params(np.random.default_rng(i), 1, 224) for i in range(3000)]
    count = sum(int((params["lam"] < 1).sum()) for params in ours)
    table = [[count, 3000 - count], [mixed_by_timm, 3000 - mixed_by_timm]]
    assert stats.fisher_exact(table)[1] > 1e-3
    assert not any(params["boxes"][params["lam"] == 1].any() for params in ours)


def test_a_step_that_is_not_mixed_is_unchanged_and_others_have_the_same_parameters():
    images, targets, seen = torch.randn(4, 3, 16, 16), torch.eye(4), set()
    for seed in range(20):
        plain, params = (
            MixupCutmix(0.8, 1.0, prob=prob).sample_params(np.random.default_rng(seed), 4, 16)
            for prob in (1.0, 0.5)
        )
        off = bool((params["lam"] == 1).all())
        if off:
            result, labels = MixupCutmix().apply(images, targets, np.arange(4), **params)
            assert torch.equal(result, images) and torch.equal(labels, targets)
        else:
            assert all((params[key] == plain[key]).all() for key in plain)
        seen.add(off)
    assert seen == {True, False}


def test_mixing_does_not_change_precision_and_memory_format():
    images = torch.randn(4, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    mix = MixupCutmix(0.4, 1.0, per_sample=True)
    params = mix.sample_params(np.random.default_rng(0), 4, 16)
    result, labels = mix.apply(images, torch.eye(4), np.arange(4), **params)
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert result.dtype == labels.dtype == torch.float32
