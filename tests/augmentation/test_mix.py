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

from workbench.augmentation import (
    MixupCutmix,
    RandomErasing,
)


def erased(erase: RandomErasing, count: int = 3000, size: int = 64, seed: int = 0) -> dict:
    return erase.sample_params(np.random.default_rng(seed), count, size)


def test_erased_boxes_have_the_stated_areas_and_aspects():
    boxes = erased(RandomErasing(1.0))["boxes"][:, 0]
    assert boxes.any(1).all()
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert (boxes[:, :2].min(0) == 0).all() and (boxes[:, 2:].max(0) == 64).all()
    assert (width < 64).all() and (height < 64).all()
    small = width * height < 64 * 64 * 0.2  # every aspect fits, so no attempt was lost
    areas = (width * height)[small] / 64**2
    assert stats.kstest(areas, stats.uniform(0.02, 0.18).cdf).pvalue > 1e-3
    aspects = np.log((height / width)[small])
    assert stats.kstest(aspects, stats.uniform(math.log(0.3), -2 * math.log(0.3)).cdf).pvalue > 1e-4


def test_erasing_has_timms_statistics():
    """timm's own boxes, found again in what it erased."""
    random.seed(0)
    theirs = random_erasing.RandomErasing(1.0, mode="const", device="cpu")
    shares = [(theirs(torch.ones(3, 48, 48))[0] == 0).float().mean().item() for _ in range(1500)]
    boxes = erased(RandomErasing(1.0), 1500, 48)["boxes"][:, 0]
    ours = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) / 48**2
    assert stats.ks_2samp(shares, ours).pvalue > 1e-3


def test_erasing_has_its_probability_and_up_to_count_boxes():
    chosen = erased(RandomErasing(0.25))["boxes"].any((1, 2))
    assert stats.binomtest(int(chosen.sum()), len(chosen), 0.25).pvalue > 1e-3
    boxes = erased(RandomErasing(1.0, count=3))["boxes"]
    numbers = boxes.any(2).sum(1)
    assert set(numbers) == {1, 2, 3}
    area = ((boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])).sum(1) / 64**2
    assert area.max() < 1 / 3 + 0.05  # the boxes share the area
    assert not erased(RandomErasing(0.0))["boxes"].any()


@pytest.mark.parametrize("mode", ["pixel", "rand", "const"])
def test_the_three_modes_fill_the_box_and_nothing_else(mode):
    erase = RandomErasing(1.0, mode)
    draw = erased(erase, 8, 32)
    images = torch.full((8, 3, 32, 32), 7.0)
    result = erase.apply(images, **draw)
    assert result.data_ptr() == images.data_ptr()
    noise = []
    for image, [(left, top, right, bottom)] in zip(images, draw["boxes"].tolist(), strict=True):
        inside = image[:, top:bottom, left:right]
        outside = torch.ones(32, 32, dtype=bool)
        outside[top:bottom, left:right] = False
        assert (image[:, outside] == 7).all() and not (inside == 7).any()
        values = [len(channel.unique()) for channel in inside]
        assert values == {"const": [1, 1, 1], "rand": [1, 1, 1]}.get(mode, values)
        assert (inside == 0).all() == (mode == "const")
        noise.append(inside.flatten())
    if mode == "pixel":
        assert stats.kstest(torch.cat(noise).numpy(), stats.norm.cdf).pvalue > 1e-3


def test_the_noise_of_an_image_does_not_depend_on_its_neighbours():
    erase, draw = RandomErasing(1.0), erased(RandomErasing(1.0), 6, 32)
    whole = erase.apply(torch.zeros(6, 3, 32, 32), **draw)
    for i in range(6):
        alone = erase.apply(torch.zeros(1, 3, 32, 32), **{k: v[[i]] for k, v in draw.items()})
        assert torch.equal(alone[0], whole[i])


def mixed(mix: MixupCutmix, count: int = 6, size: int = 32, seed: int = 0):
    """What a mix makes of noise: the noise, the result, its soft labels, the draw."""
    rng = np.random.default_rng(seed)
    images = torch.from_numpy(rng.normal(size=(count, 3, size, size))).float()
    targets, draw = torch.eye(count), mix.sample_params(rng, count, size)
    return images, *mix.apply(images, targets, np.arange(count), **draw), draw


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("mix", [MixupCutmix(0.8), MixupCutmix(0.8, per_sample=True)])
def test_mixup_is_its_formula_between_neighbours(mix, seed):
    images, result, targets, draw = mixed(mix, seed=seed)
    for i in range(6):
        lam = draw["lam"][i]
        torch.testing.assert_close(result[i], lam * images[i] + (1 - lam) * images[i ^ 1])
        wanted = torch.zeros(6)
        wanted[i], wanted[i ^ 1] = lam, 1 - lam
        torch.testing.assert_close(targets[i], wanted)
    assert len(set(draw["lam"])) == (6 if mix.per_sample else 1)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("mix", [MixupCutmix(0.0, 1.0), MixupCutmix(0.0, 1.0, per_sample=True)])
def test_cutmix_pastes_the_neighbours_box_and_uses_its_true_area(mix, seed):
    images, result, targets, draw = mixed(mix, seed=seed)
    for i, (left, top, right, bottom) in enumerate(draw["boxes"].tolist()):
        wanted = images[i].clone()
        wanted[:, top:bottom, left:right] = images[i ^ 1][:, top:bottom, left:right]
        assert torch.equal(result[i], wanted)
        own = (result[i] == images[i]).all(0).float().mean().item()
        assert targets[i, i].item() == pytest.approx(own, abs=1e-6)
        assert draw["lam"][i] == pytest.approx(own)


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("alphas", [(0.2, 0.0), (0.0, 1.0), (0.8, 1.0)])
@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_soft_labels_sum_to_one_for_any_batch(alphas, per_sample, count):
    for seed in range(20):
        _, result, targets, _ = mixed(MixupCutmix(*alphas, per_sample=per_sample), count, seed=seed)
        torch.testing.assert_close(targets.sum(1), torch.ones(count))
        assert (targets >= 0).all() and result.isfinite().all()


def test_an_image_without_its_partner_is_unchanged():
    mix, images, targets = MixupCutmix(0.0, 1.0), torch.randn(3, 3, 16, 16), torch.eye(3)
    places = np.array([1, 4, 5])  # 0 could not be read
    draw = mix.sample_params(np.random.default_rng(3), 6, 16)
    result, labels = mix.apply(images, targets, places, **{k: v[places] for k, v in draw.items()})
    assert torch.equal(result[0], images[0]) and torch.equal(labels[0], targets[0])
    assert not torch.equal(result[1], images[1]) and labels[1, 2] > 0


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_lambdas_are_beta_distributed(alpha):
    lam = MixupCutmix(alpha, per_sample=True).sample_params(np.random.default_rng(0), 4000, 64)[
        "lam"
    ]
    assert stats.kstest(lam, stats.beta(alpha, alpha).cdf).pvalue > 1e-3


def test_mixup_and_cutmix_have_timms_statistics():
    """Share kept and kind, drawn 3,000 times by timm's Mixup per element and by ours."""
    np.random.seed(0)  # noqa: NPY002  timm draws from it
    theirs = timm.data.Mixup(0.2, 1.0, switch_prob=0.4, mode="elem", num_classes=2)
    lam, cut = theirs._params_per_elem(3000)
    boxes = [cutmix_bbox_and_lam((3, 64, 64), x) for x in lam[cut]]
    kept = np.concatenate([lam[~cut], [b[1] for b in boxes]])
    ours = MixupCutmix(0.2, 1.0, 0.4, per_sample=True).sample_params(
        np.random.default_rng(0), 3000, 64
    )
    is_box = ours["boxes"].any(1)
    assert stats.ks_2samp(kept, ours["lam"]).pvalue > 1e-3
    for k, name in enumerate(("left", "top", "right", "bottom")):
        own = ours["boxes"][is_box, k]
        order = (2, 0, 3, 1)[k]  # timm's are top, bottom, left, right
        assert stats.ks_2samp([b[0][order] for b in boxes], own).pvalue > 1e-3, name


def test_cutmix_has_the_switch_probability():
    draws = [
        MixupCutmix(0.8, 1.0, 0.3).sample_params(np.random.default_rng(i), 4, 224)
        for i in range(1500)
    ]
    cut = [bool(d["boxes"].any()) for d in draws]
    assert stats.binomtest(sum(cut), len(cut), 0.3).pvalue > 1e-3
    for d in draws[:50]:
        assert (d["boxes"] == d["boxes"][0]).all() and (d["lam"] == d["lam"][0]).all()


@pytest.mark.parametrize("mode", ["elem", "batch"])
def test_the_mixing_probability_is_timms(mode):
    np.random.seed(0)  # noqa: NPY002  timm draws from it
    theirs = timm.data.Mixup(0.8, 1.0, prob=0.3, mode=mode, num_classes=2)
    mix = MixupCutmix(0.8, 1.0, 0.5, mode == "elem", 0.3)
    if mode == "elem":
        mixed_by_timm = int((theirs._params_per_elem(3000)[0] < 1).sum())
        draws = [mix.sample_params(np.random.default_rng(0), 3000, 224)]
    else:
        mixed_by_timm = sum(theirs._params_per_batch()[0] < 1 for _ in range(3000))
        draws = [mix.sample_params(np.random.default_rng(i), 1, 224) for i in range(3000)]
    ours = sum(int((d["lam"] < 1).sum()) for d in draws)
    table = [[ours, 3000 - ours], [mixed_by_timm, 3000 - mixed_by_timm]]
    assert stats.fisher_exact(table)[1] > 1e-3
    assert not any(d["boxes"][d["lam"] == 1].any() for d in draws)


def test_a_step_that_is_not_mixed_is_unchanged_and_others_keep_their_parameters():
    images, targets, seen = torch.randn(4, 3, 16, 16), torch.eye(4), set()
    for seed in range(20):
        plain = MixupCutmix(0.8, 1.0).sample_params(np.random.default_rng(seed), 4, 16)
        draw = MixupCutmix(0.8, 1.0, prob=0.5).sample_params(np.random.default_rng(seed), 4, 16)
        left = bool((draw["lam"] == 1).all())
        if left:
            result, labels = MixupCutmix().apply(images, targets, np.arange(4), **draw)
            assert torch.equal(result, images) and torch.equal(labels, targets)
        else:
            assert all((draw[key] == plain[key]).all() for key in plain)
        seen.add(left)
    assert seen == {True, False}


def test_mixing_keeps_precision_and_memory_layout():
    images = torch.randn(4, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    mix = MixupCutmix(0.4, 1.0, per_sample=True)
    draw = mix.sample_params(np.random.default_rng(0), 4, 16)
    result, labels = mix.apply(images, torch.eye(4), np.arange(4), **draw)
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert result.dtype == labels.dtype == torch.float32
