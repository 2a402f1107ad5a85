"""Augmentation: of one image in a loader's process, and of a batch on the device."""

from workbench.augmentation.mix import MixupCutmix, RandomErasing
from workbench.augmentation.randaugment import RandAugment, RandAugmentIncreasing
from workbench.augmentation.transforms import (
    EvalTransform,
    ResizeShortSide,
    TrainTransform,
    describe,
)
