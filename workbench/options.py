"""Every option of a recipe: type, range, help, when it has an effect and what it affects.

A new option is a line here and its use in the one place that reads it.
"""

import functools
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from workbench.recipe_checks import RESNETS, losses_with_temperature

Fraction = Annotated[float, Field(ge=0, le=1)]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]
Schedule = Literal["constant", "multistep", "step", "cosine", "polynomial", "one_cycle"]
KDLoss = Literal[
    "kl", "ce", "l2", "l2_normalized", "up_kl", "dist", "dkd", "kl_standardized_logits"
]


def option(
    default: Any,
    text: str,
    *,
    aka: str = "",
    needs: Mapping[str, Any] | list[Mapping[str, Any]] | None = None,
    affects: str = "weights",
    **limits,
) -> Any:
    """A field of Recipe with everything that is known about it.

    Args:
        text: one line of help.
        aka: names of this option in timm, torchvision, United Perception and Lightning; they are
            suggested where one of them is given.
        needs: values of other options without which this one has no effect; see
            `recipe_checks.unmet_needs`.
        affects: "weights"; "inputs", how images become training batches, and so the weights; or
            "runtime", where and how fast the run happens: a run may be resumed with another value.
        limits: pydantic's constraints.
    """
    extra = {"aka": aka.split(), "needs": needs, "affects": affects}
    return Field(default, description=text, json_schema_extra=extra, **limits)


input_option = functools.partial(option, affects="inputs")
runtime_option = functools.partial(option, affects="runtime")

FILES = {"dataset": "files"}
SGD, LAMB, BCE = {"optimizer": "sgd"}, {"optimizer": "lamb"}, {"loss": "bce", "task_weight": True}
TEACHER, RANDAUG, ERASE = {"teacher": True}, {"randaug_n": True}, {"erase_prob": True}
TASK_LOSS = [{"teacher": False}, {"task_weight": True}]
ON_DEVICE = [
    {key: True} for key in "hflip randaug_n brightness contrast saturation hue autoaugment".split()
]
MIXED = [{"mixup_alpha": True}, {"cutmix_alpha": True}]
DECAYING = {"schedule": ("cosine", "polynomial")}
BEFORE_PEAK = {"schedule": ("constant", "multistep", "step", "cosine", "polynomial")}


class Options(BaseModel):
    """The fields of a Recipe: data, model, optimisation, loss, augmentation, distillation, run.

    Sources: UP is United Perception's classification task; BoT is arXiv 1812.01187; RSB is
    arXiv 2110.00476.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    # fmt: off
    name: str = option(
        "baseline", "the run folder is runs_dir/<name>-seed<seed>", affects="runtime",
        pattern=r"^[^/\\]+$")

    # data
    dataset: Literal["digits", "letters", "files"] = option(
        "digits", "digits and letters are embedded; files reads data_dir")
    data_dir: str = runtime_option("", "folder of the lists and roots below", needs=FILES)
    train_list: list[str] = option(
        [], "list files, imagenet or custom_cls format; none: class folders", needs=FILES,
        aka="meta_file")
    train_root: list[str] = option(
        ["train"], "folders of the listed files, one for all lists or one each", needs=FILES,
        aka="image_dir")
    val_list: list[str] = option([], "as train_list", needs=FILES)
    val_root: list[str] = option(["val"], "as train_root", needs=FILES)
    val_fraction: float = option(
        0.0, "share of each class held out when there is no validation list", needs=FILES, ge=0,
        lt=1)
    class_names: str = option("", "text file with one class name a line", needs=FILES)
    num_classes: int | None = option(None, "None counts them in the data", needs=FILES, ge=2)
    train_fraction: float = input_option(1.0, "share of the training list that is used", gt=0, le=1)
    class_balanced_sampling: Fraction = input_option(
        0.0, "0: each image once an epoch; 1: each class equally often", aka="balanced")
    allow_outside_root: bool = option(False, "list entries may leave their root", needs=FILES)
    verify_data: bool = option(True, "decode every image once before training; remembered")
    cache: bool = runtime_option(
        False, "save pixels on disk for the next epochs and runs; batches are the same bytes")
    cache_dir: str = runtime_option(
        "", "folder for them; empty: pixels/ in WORKBENCH_CACHE or ~/.cache/workbench",
        needs={"cache": True})
    train_resize: int | None = input_option(
        None, "pixels, short side before the training crop if longer; None: as stored", ge=8)
    image_size: int = input_option(
        32, "pixels, side of the square training crop", aka="img_size input_size", ge=8, le=4096)
    val_image_size: int | None = option(
        None, "pixels, side of the centre crop; None is image_size", ge=8, le=4096)
    val_resize: int = option(
        32, "pixels, short side before the centre crop", aka="crop_pct", ge=8, le=8192)
    interpolation: Interpolation = input_option("bilinear", "of both resizes, antialiased")
    mean: list[Fraction] = input_option(
        [0.485, 0.456, 0.406], "RGB, 0 to 1, subtracted", min_length=3, max_length=3)
    std: list[Annotated[float, Field(gt=0, le=1)]] = input_option(
        [0.229, 0.224, 0.225], "RGB, 0 to 1, divided by", min_length=3, max_length=3)

    # model
    model: str = option(
        "test_resnet", "timm name, or resnet18 to resnet152", aka="arch backbone", min_length=1)
    deep_stem: bool = option(
        False, "three 3x3 convolutions instead of the 7x7; with avg_down a ResNet-D",
        needs={"model": RESNETS})
    avg_down: bool = option(
        False, "average pooling and a 1x1 convolution in the shortcuts, BoT section 4",
        needs={"model": RESNETS})
    drop_path: float = option(
        0.0, "highest rate of skipped blocks, grows with depth, arXiv 1603.09382", ge=0, lt=1)
    dropout: float = option(0.0, "before the classifier", ge=0, lt=1)
    pretrained: bool = option(False, "start from timm's published weights")
    weights: str = option(
        "", "start from this weights file or run folder", aka="pretrain_model checkpoint")
    allow_partial_weights: bool = option(
        False, "accept weights that fit less than half of the model", needs={"weights": True})
    freeze: list[str] = option(
        [], "modules that are not trained, batch norm included: conv1, layer1", aka="frozen_layers")

    # optimisation
    epochs: int = option(
        8, "passes over the training list", aka="max_epoch num_epochs", ge=1, le=100_000)
    batch_size: int = input_option(
        32, "images per optimizer step, on all devices together", aka="bs", ge=1)
    micro_batch_size: int | None = input_option(
        None, "images per forward on a device; gradients add up to the step", aka="accumulate",
        ge=1)
    drop_last: bool = input_option(False, "leave out the incomplete last batch of an epoch")
    repeated_aug: int = input_option(
        1, "copies of an image in a batch, each augmented differently, arXiv 1902.05509",
        aka="aug_repeats", ge=1, le=64)
    optimizer: Literal["sgd", "adamw", "lamb"] = option(
        "sgd", "sgd, adamw or lamb, arXiv 1904.00962", aka="optim opt")
    lr: float = option(
        0.1, "peak learning rate, not scaled by the batch size", aka="learning_rate", gt=0)
    momentum: float = option(0.9, "of sgd", needs=SGD, ge=0, lt=1)
    nesterov: bool = option(False, "of sgd", needs=SGD)
    weight_decay: float = option(0.0, "per step, times lr", aka="wd", ge=0)
    decay_norm_and_bias: bool = option(
        True, "False leaves norms, biases and position embeddings undecayed",
        needs={"weight_decay": True})
    trust_clip: bool = option(False, "of lamb: trust ratios are at most 1", needs=LAMB)
    always_adapt: bool = option(
        False, "of lamb: a trust ratio for undecayed tensors too",
        needs=[{**LAMB, "weight_decay": False}, {**LAMB, "decay_norm_and_bias": False}])
    schedule: Schedule = option(
        "cosine", "constant, multistep, step, cosine, polynomial or one_cycle",
        aka="scheduler lr_scheduler")
    milestones: list[int] = option(
        [], "epochs at which multistep multiplies lr by gamma", needs={"schedule": "multistep"})
    lr_step_epochs: int | None = option(
        None, "epochs after which step multiplies lr by gamma", needs={"schedule": "step"},
        aka="decay_epochs", ge=1)
    gamma: float = option(
        0.1, "of multistep and step", needs={"schedule": ("multistep", "step")}, aka="decay_rate",
        gt=0, lt=1)
    power: float = option(1.0, "of polynomial; 1 is linear", needs={"schedule": "polynomial"}, gt=0)
    lr_min: float = option(
        0.0, "final lr of cosine and polynomial", needs=DECAYING, aka="eta_min min_lr", ge=0)
    pct_start: float = option(
        0.3, "share of the steps in which one_cycle rises to lr", needs={"schedule": "one_cycle"},
        gt=0, lt=1)
    cosine_epochs: float | None = option(
        None, "epochs from the end of the warm-up to lr_min; None is all that remain",
        needs={"schedule": "cosine"}, gt=0)
    lr_per_epoch: bool = option(
        False, "cosine and polynomial change once an epoch, not every step", needs=DECAYING)
    warmup: Literal["linear", "cosine", "exponential"] = option(
        "linear", "shape of the warm-up", needs=[{"warmup_epochs": True}, {"warmup_steps": True}],
        aka="warmup_type warmup_mode")
    warmup_epochs: float = option(
        0.0, "epochs in which lr rises to its peak, arXiv 1706.02677", needs=BEFORE_PEAK, ge=0)
    warmup_steps: int = option(0, "the same in steps", needs=BEFORE_PEAK, aka="warmup_iter", ge=0)
    warmup_start_factor: float = option(
        0.0, "share of lr that the warm-up starts from",
        needs=[{"warmup_epochs": True}, {"warmup_steps": True}], aka="warmup_lr", ge=0, le=1)
    layer_decay: float | None = option(
        None, "lr of a layer over that of the layer above it, arXiv 2106.08254",
        aka="layer_wise_decay", gt=0, lt=1)
    head_only_epochs: int = option(
        0, "first epochs, in which only the classifier is trained", aka="linear_probe", ge=0)
    clip_grad_norm: float | None = option(
        None, "largest norm of all gradients together", aka="clip_grad max_grad_norm", gt=0)
    ema_decay: float | None = option(
        None, "share of the average kept per step, constant; both weights are evaluated",
        aka="model_ema_decay", gt=0, lt=1)

    # loss
    loss: Literal["ce", "bce"] = option(
        "ce", "cross-entropy, or binary cross-entropy of every class", needs=TASK_LOSS,
        aka="bce_loss")
    bce_threshold: float | None = option(
        None, "targets above count as 1, others as 0; RSB 0.2", needs=BCE, aka="bce_target_thresh",
        ge=0, lt=1)
    bce_sum: bool = option(
        False, "sum over classes, not the mean: num_classes times the gradient", needs=BCE)
    bce_shift: bool = option(
        False, "logits minus ln(num_classes) in the loss; UP's bias has sum, shift", needs=BCE)
    label_smoothing: float = option(
        0.0, "share of the target spread over all classes, arXiv 1512.00567", needs=TASK_LOSS,
        aka="smoothing smooth_ratio", ge=0, lt=1)
    up_smoothing: bool = option(
        False, "UP's smoothing of mixed labels, sum below 1; to reproduce it",
        needs=[{"loss": "ce", "label_smoothing": True, "task_weight": True, **m} for m in MIXED])

    # augmentation
    crop_scale: list[Annotated[float, Field(gt=0, le=1)]] = input_option(
        [1.0, 1.0], "share of the area a crop keeps, arXiv 1409.4842; ImageNet 0.08 to 1",
        min_length=2, max_length=2)
    crop_ratio: list[Annotated[float, Field(gt=0)]] = input_option(
        [0.75, 1.3333333333333333], "width over height of a crop", min_length=2, max_length=2)
    hflip: Fraction = input_option(0.0, "probability of a horizontal flip")
    brightness: Fraction = input_option(0.0, "factor 1 - x to 1 + x")
    contrast: Fraction = input_option(0.0, "factor 1 - x to 1 + x")
    saturation: Fraction = input_option(0.0, "factor 1 - x to 1 + x")
    hue: float = input_option(0.0, "shift -x to x, in turns of the colour circle", ge=0, le=0.5)
    autoaugment: bool = input_option(False, "torchvision's ImageNet policy, arXiv 1805.09501")
    randaug_n: int = input_option(
        0, "RandAugment operations per image, arXiv 1909.13719; 0 is off", aka="aa", ge=0, le=16)
    randaug_m: float = input_option(7.0, "mean magnitude, 0 to 10", needs=RANDAUG, ge=0, le=10)
    randaug_std: float = input_option(
        0.5, "standard deviation of the magnitude", needs=RANDAUG, aka="magnitude_std", ge=0, le=10)
    randaug_increasing: bool = input_option(
        True, "a higher magnitude is never milder, timm's inc1", needs=RANDAUG)
    randaug_variant: Literal["up", "timm"] = input_option(
        "up", "up: nearest, black, shift in pixels; timm: smooth, mean colour, in shares",
        needs=RANDAUG)
    mixup_alpha: float = input_option(
        0.0, "of Beta(a, a), arXiv 1710.09412; 0 is off", aka="mixup", ge=0, le=100)
    cutmix_alpha: float = input_option(
        0.0, "of Beta(a, a), arXiv 1905.04899; 0 is off", aka="cutmix", ge=0, le=100)
    switch_prob: Fraction = input_option(
        0.5, "probability of CutMix where both are on", aka="mixup_switch_prob",
        needs={"mixup_alpha": True, "cutmix_alpha": True})
    mix_per_sample: bool = input_option(
        False, "different parameters for each image, not one for the step", needs=MIXED)
    mix_prob: Fraction = input_option(
        1.0, "probability that anything is mixed, timm's mixup-prob", needs=MIXED, aka="mixup_prob")
    erase_prob: Fraction = input_option(
        0.0, "probability of RandomErasing, arXiv 1708.04896", aka="reprob")
    erase_mode: Literal["pixel", "rand", "const"] = input_option(
        "pixel", "filled with noise, one noise colour, or the mean", needs=ERASE, aka="remode")
    erase_count: int = input_option(
        1, "boxes at most, which share the area", needs=ERASE, ge=1, le=16)

    # distillation
    teacher: list[str] = option(
        [], "run folders, weights files or timm names; none: no teacher", aka="teacher_path")
    teacher_model: list[str] = option(
        [], "timm names of the teachers in weights files, one each", needs=TEACHER)
    teacher_weight: list[Annotated[float, Field(gt=0)]] = option(
        [1.0], "of a teacher's loss, one for all or one each", needs=TEACHER, min_length=1)
    teacher_image_size: list[Annotated[int, Field(ge=8, le=4096)]] = option(
        [], "pixels, one for all or one each; none: as trained", needs=TEACHER)
    teacher_mean: list[Fraction] = option(
        [], "RGB, 0 to 1, one for all or one each; none: as trained", needs=TEACHER)
    teacher_std: list[Annotated[float, Field(gt=0, le=1)]] = option(
        [], "as teacher_mean", needs=TEACHER)
    distill_pairs: list[str] = option(
        ["logits"], "logits, or modules: layer4 -> layer4, layer4 -> teacher2:layer4",
        needs=TEACHER, aka="mimic_name", min_length=1)
    kd_loss: list[KDLoss] = option(
        ["dist"], "one for all pairs or one each; modules take l2 or l2_normalized", needs=TEACHER,
        aka="mimic_type", min_length=1)
    kd_weight: list[Annotated[float, Field(gt=0)]] = option(
        [1.0], "one for all pairs or one each", needs=TEACHER, aka="distill_weight", min_length=1)
    temperature: float = option(
        1.0, "divides logits in kl, ce, dist, dkd and kl_standardized_logits",
        needs={**TEACHER, "kd_loss": losses_with_temperature}, aka="kd_temperature tau", gt=0)
    dkd_beta: float = option(
        8.0, "weight of the other classes in dkd, arXiv 2203.08679",
        needs={**TEACHER, "kd_loss": "dkd"}, gt=0)
    kd_warmup_epochs: float = option(
        0.0, "epochs in which the weight of the distillation loss rises from 0", needs=TEACHER,
        ge=0)
    task_weight: float = option(
        1.0, "of the loss against the labels; 0 leaves the teacher's", needs=TEACHER,
        aka="task_loss", ge=0)
    cache_teacher_logits: bool = runtime_option(
        False, "save the teachers' logits on disk for the next student", needs=TEACHER)

    # run
    seed: int = input_option(
        0, "of the order, augmentation and initial weights", aka="random_seed", ge=0, lt=2**32)
    resume_from: str = option("", "run folder whose last.pt is continued here", aka="resume")
    auto_resume: bool = runtime_option(True, "continue where this run folder stopped")
    eval_every: int = option(1, "epochs between evaluations; the last is always evaluated", ge=1)
    checkpoint_minutes: float = runtime_option(
        10.0, "between checkpoints inside an epoch; 0 is every step", ge=0)
    log_every: int = runtime_option(10, "steps per row of steps.csv", ge=1)
    device: Literal["auto", "cpu", "cuda", "mps"] = runtime_option("auto", "auto takes a GPU")
    precision: Literal["auto", "fp32", "bf16"] = option(
        "auto", "auto is bf16 where it is native", aka="amp fp16 bf16")
    channels_last: bool = input_option(True, "memory layout of images and weights")
    compile: bool = runtime_option(
        False, "torch.compile of the model; its first steps take longer", aka="torchcompile")
    augment_on_device: bool = input_option(
        False, "hflip, RandAugment and jitter on the batch; loaders only crop",
        needs=ON_DEVICE)
    workers: int | None = runtime_option(
        None, "loader processes per device; None is one per core, at most 8", aka="num_workers",
        ge=0)
    runs_dir: str = runtime_option("runs", "folder of the run folders", min_length=1)
    # fmt: on
