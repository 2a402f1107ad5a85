"""The batch on the device: the same however a step is divided, and what a recipe says."""

import pytest
import torch

from workbench import augmentation, data, training
from workbench.recipe import Recipe

CPU = torch.device("cpu")
ERASE_AND_MIX = {"erase_prob": 0.5, "mixup_alpha": 0.8, "cutmix_alpha": 1.0, "mix_per_sample": True}
AUGMENT = {"hflip": 0.5, "randaug_n": 2, "brightness": 0.4, "saturation": 0.4, "hue": 0.1}


def prepared(options: dict, **how) -> list:
    """Batches of two steps and what DeviceTransform makes of each part."""
    recipe = Recipe(train_fraction=0.05, batch_size=24, crop_scale=[0.5, 1.0], **options)
    frame = data.load_dataset(recipe).train
    how = {"seed": 0, "batch_size": 24, "steps": range(2), **how}
    prepare = training.DeviceTransform(recipe, 10, CPU)
    batches = data.train_loader(frame, training.train_transform(recipe), **how)
    return [(batch, *prepare(batch)) for batch in batches]


@pytest.mark.parametrize("options", [{}, {**AUGMENT, "augment_on_device": True}])
@pytest.mark.parametrize(
    "how",
    [[{"micro_batch_size": 4}], [{"rank": r, "world": 3} for r in range(3)], [{"workers": 1}]],
    ids=["parts", "processes", "worker"],
)
def test_a_batch_does_not_depend_on_how_a_step_is_divided(how, options):
    options = {**ERASE_AND_MIX, **options}
    whole = {b.step: (images, targets) for b, images, targets in prepared(options)}
    count = 0
    for division in how:
        for batch, images, targets in prepared(options, **division):
            assert torch.equal(images, whole[batch.step][0][batch.positions])
            assert torch.equal(targets, whole[batch.step][1][batch.positions])
            count += len(images)
    assert count == 48


@pytest.mark.parametrize("variant", ["up", "timm"])
def test_augmenting_on_the_device_is_what_the_loaders_do(variant):
    """The same samples by other code, which rounds otherwise."""
    there = prepared({**AUGMENT, "randaug_variant": variant, "augment_on_device": True})
    here = prepared({**AUGMENT, "randaug_variant": variant})
    normalize = training.Normalize(Recipe(), CPU)
    for (batch, ours, _), (_, theirs, _) in zip(there, here, strict=True):
        assert len(batch.aug_params) == 24 and {"flip", "randaug"} <= set(batch.aug_params[0])
        apart = (normalize.undo(ours).int() - normalize.undo(theirs).int()).abs().float()
        assert apart.mean() < 2.5 and apart.mean((1, 2, 3)).median() < 1


def test_images_are_normalised_then_erased_then_mixed():
    """An erased box of 0 is the mean colour, and a neighbour's box comes through the mix."""
    erase = {"erase_prob": 1.0, "erase_mode": "const"}
    (_, plain, _), (_, erased, _), (_, mixed, _) = (
        prepared(options)[0] for options in ({}, erase, {**erase, "mixup_alpha": 0.8})
    )
    boxes = erased != plain
    assert not erased[boxes].any() and 0.01 < boxes.float().mean() < 0.4
    rng = data.rng_for(0, data.MIX, 0)
    lam = augmentation.MixupCutmix(0.8).sample_params(rng, 24, 32)["lam"][0]
    neighbour = erased.view(12, 2, 3, 32, 32).flip(1).reshape(24, 3, 32, 32)
    torch.testing.assert_close(mixed, (lam * erased + (1 - lam) * neighbour).float())


def test_targets_are_class_numbers_until_images_are_mixed():
    batch, _, targets = prepared({"erase_prob": 0.5})[0]
    assert torch.equal(targets, batch.labels)
    _, _, targets = prepared(ERASE_AND_MIX)[0]
    assert targets.shape == (24, 10) and targets.dtype == torch.float32
    torch.testing.assert_close(targets.sum(1), torch.ones(24))


def test_every_step_samples_again():
    first, second = ({x.item() for x in t.unique()} for _, _, t in prepared({"mixup_alpha": 0.8}))
    assert first & second == {0.0, 1.0}  # 1 where neighbours have the same class


def test_a_preview_is_the_first_images_of_the_first_step():
    recipe = Recipe(**ERASE_AND_MIX, batch_size=64, randaug_n=2)
    dataset = data.load_dataset(recipe)
    images, targets = training.preview_batch(recipe, dataset, 24)
    transform = training.train_transform(recipe)
    loader = data.train_loader(dataset.train, transform, seed=0, batch_size=64, steps=range(1))
    whole, soft = training.DeviceTransform(recipe, 10, CPU)(next(loader))
    assert torch.equal(images, whole[:24]) and torch.equal(targets, soft[:24])


def test_undoing_the_normalisation_gives_the_pixels_back():
    pixels = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    normalize = training.Normalize(Recipe(), CPU)
    assert torch.equal(normalize.undo(normalize(pixels)), pixels.permute(0, 2, 3, 1))
