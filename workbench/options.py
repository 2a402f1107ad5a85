"""Every option of a recipe: type, range, help, when it has an effect and what it affects.

A new option is a line here and its use in the one place that reads it.
"""

import functools
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from workbench.recipe_checks import A_PART, PART, RESNETS, losses_with_temperature

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
PositiveFraction = Annotated[float, Field(gt=0, le=1)]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]
Schedule = Literal["constant", "multistep", "step", "cosine", "polynomial", "one_cycle"]
Part = Annotated[str, Field(pattern=f"^{PART}$")]
KDLoss = Literal[
    "kl", "ce", "l2", "l2_normalized", "up_kl", "dist", "dkd", "kl_standardized_logits"
]


def option(
    default: Any,
    help: str,
    *,
    aka: str = "",
    needs: Mapping[str, Any] | list[Mapping[str, Any]] | None = None,
    affects: str = "weights",
    **limits,
) -> Any:
    """A field of Recipe with everything that is known about it.

    Args:
        help: one line.
        aka: its names in timm, torchvision, United Perception and Lightning, as suggestions.
        needs: values of other options that give it an effect; see `recipe_checks.unmet_needs`.
        affects: "weights"; "inputs", how images become training batches, and so the weights; or
            "runtime", where and how fast the run happens: a run may be resumed with another value.
        limits: pydantic's constraints.
    """
    extra = {"aka": aka.split(), "needs": needs or {}, "affects": affects}
    return Field(default, description=help, json_schema_extra=extra, **limits)


input_option = functools.partial(option, affects="inputs")
runtime_option = functools.partial(option, affects="runtime")

LISTED, FILES = {"dataset": "files"}, {"dataset": ("files", A_PART)}
RESNET = {"model": RESNETS}
SGD, LAMB, DECAY = {"optimizer": "sgd"}, {"optimizer": "lamb"}, {"weight_decay": True}
STEPPED = {"schedule": ("multistep", "step")}
DECAYING = {"schedule": ("cosine", "polynomial")}
BEFORE_PEAK = {"schedule": ("constant", "multistep", "step", "cosine", "polynomial")}
WARMUP = [{"warmup_epochs": True}, {"warmup_steps": True}]
BCE = {"loss": "bce", "task_weight": True}
WEIGHTED = {"loss": ("ce", "focal"), "task_weight": True}
TASK_LOSS = [{"teacher": False}, {"task_weight": True}]
RANDAUG, ERASE, TEACHER = {"randaug_n": True}, {"erase_prob": True}, {"teacher": True}
MIXED = [{"mixup_alpha": True}, {"cutmix_alpha": True}]
SMOOTHED_MIX = [{"loss": "ce", "label_smoothing": True, "task_weight": True, **m} for m in MIXED]
ON_DEVICE = [
    {key: True} for key in "hflip randaug_n brightness contrast saturation hue autoaugment".split()
]


class Options(BaseModel):
    """The fields of a Recipe: data, model, optimisation, loss, augmentation, distillation, run.

    Sources: UP is United Perception's classification task; BoT is arXiv 1812.01187; RSB is
    arXiv 2110.00476.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    # fmt: off
    name: str = runtime_option("baseline", pattern=r"^[^/\\]+$",
        help="the run folder is runs_dir/<name>-seed<seed>")

    # data
    dataset: Literal["digits", "letters", "files"] | Part = option("digits",
        help="digits, letters; files: data_dir, load_dataset(x).save_to_disk(dir); file.py:f")
    dataset_args: dict[str, Any] = option({}, "of a custom dataset", needs={"dataset": A_PART})
    data_dir: str = runtime_option("", "folder of the lists and roots below", needs=FILES)
    train_list: list[str] = option([], needs=LISTED, aka="meta_file",
        help="lists (imagenet, custom_cls) or tables (.csv .tsv .parquet); none: class folders")
    train_root: list[str] = option(["train"], needs=LISTED, aka="image_dir", min_length=1,
        help="folders of the listed files, one for all lists or one each")
    val_list: list[str] = option([], "as train_list", needs=LISTED)
    val_root: list[str] = option(["val"], "as train_root", needs=LISTED, min_length=1)
    file_column: str = option("", needs=FILES, aka="filename_col input_col image_column",
        help="of tables: paths, or images in Parquet; empty: file, filename, path or image")
    label_column: str = option("", needs=FILES, aka="target_col",
        help="of tables: numbers or names; empty: label, target, class or class_name")
    val_fraction: float = option(0.0, needs=FILES, ge=0, lt=1,
        help="share of each class held out when there is no validation list")
    fold: str = option("", pattern=r"^([1-9]\d*/([2-9]|[1-9]\d+))?$",
        help="2/5: validation is the second of five parts of training, stratified by class")
    group_column: str = option("", needs={**FILES, "fold": True},
        help="of tables: images with one value, such as a patient, are in one fold")
    class_names: str = option("", "text file with one class name a line", needs=FILES)
    num_classes: int | None = option(None, "None counts them in the data", needs=FILES, ge=2)
    train_fraction: float = input_option(1.0, "share of the training list that is used", gt=0, le=1)
    class_balanced_sampling: Fraction = input_option(0.0, aka="balanced",
        help="0: each image once an epoch; 1: each class equally often")
    allow_outside_root: bool = option(False, "list entries may leave their root", needs=LISTED)
    verify_data: bool = option(True, "decode every image once before training; remembered")
    cache: bool = runtime_option(False,
        help="save pixels on disk for the next epochs and runs; batches are the same bytes")
    shard_cache_gb: float = runtime_option(0.0, needs=LISTED, ge=0,
        help="GB of images from object stores that are kept on this machine; 0: none")
    cache_dir: str = runtime_option("", needs=[{"cache": True}, {"shard_cache_gb": True}],
        help="folder of both; empty: pixels/ and shards/ in WORKBENCH_CACHE or ~/.cache/workbench")
    train_resize: int | None = input_option(None, ge=8,
        help="pixels, short side before the training crop if longer; None: as stored")
    image_size: int = input_option(32, aka="img_size input_size", ge=8, le=4096,
        help="pixels, side of the square training crop")
    val_image_size: int | None = option(None, ge=8, le=4096,
        help="pixels, side of the centre crop; None is image_size")
    val_resize: int = option(32, aka="crop_pct", ge=8, le=8192,
        help="pixels, short side before the centre crop")
    interpolation: Interpolation = input_option("bilinear", "of both resizes, antialiased")
    mean: list[Fraction] = input_option([0.485, 0.456, 0.406], min_length=3, max_length=3,
        help="RGB, 0 to 1, subtracted")
    std: list[PositiveFraction] = input_option([0.229, 0.224, 0.225], min_length=3, max_length=3,
        help="RGB, 0 to 1, divided by")

    # model
    model: str = option("test_resnet", aka="arch backbone", min_length=1,
        help="timm name, resnet18 to resnet152, or file.py:name")
    model_args: dict[str, Any] = option({}, "of a custom model", needs={"model": A_PART})
    deep_stem: bool = option(False, needs=RESNET,
        help="three 3x3 convolutions instead of the 7x7; with avg_down a ResNet-D")
    avg_down: bool = option(False, needs=RESNET,
        help="average pooling and a 1x1 convolution in the shortcuts, BoT section 4")
    drop_path: float = option(0.0, ge=0, lt=1,
        help="highest rate of skipped blocks, grows with depth, arXiv 1603.09382")
    dropout: float = option(0.0, "before the classifier", ge=0, lt=1)
    pretrained: bool = option(False, "start from timm's published weights")
    weights: str = option("", aka="pretrain_model checkpoint",
        help="start from this weights file or run folder")
    allow_partial_weights: bool = option(False, needs={"weights": True},
        help="accept weights that fit less than half of the model")
    freeze: list[str] = option([], aka="frozen_layers",
        help="modules that are not trained, batch norm included: conv1, layer1")

    # optimisation
    epochs: int = option(8, aka="max_epoch num_epochs", ge=1, le=100_000,
        help="passes over the training list")
    batch_size: int = input_option(32, aka="bs", ge=1,
        help="images per optimizer step, on all devices together")
    micro_batch_size: int | None = input_option(None, aka="accumulate", ge=1,
        help="images per forward on a device; gradients add up to the step")
    drop_last: bool = input_option(False, "leave out the incomplete last batch of an epoch")
    repeated_aug: int = input_option(1, aka="aug_repeats", ge=1, le=64,
        help="copies of an image in a batch, each augmented differently, arXiv 1902.05509")
    optimizer: str = option("sgd", aka="optim opt", min_length=1,
        help="sgd, adamw, lamb (arXiv 1904.00962), a name of timm.optim, file.py:name")
    optimizer_args: dict[str, Any] = option({}, aka="opt_args opt_betas opt_eps betas eps",
        help="more arguments of the optimizer, such as {betas: [0.9, 0.99], eps: 1.0e-6}")
    lr: float = option(0.1, aka="learning_rate", gt=0,
        help="peak learning rate, not scaled by the batch size")
    momentum: float = option(0.9, "of sgd", needs=SGD, ge=0, lt=1)
    nesterov: bool = option(False, "of sgd", needs=SGD)
    weight_decay: float = option(0.0, "per step, times lr", aka="wd", ge=0)
    decay_norm_and_bias: bool = option(True, needs=DECAY,
        help="False leaves norms, biases and position embeddings undecayed")
    trust_clip: bool = option(False, "of lamb: trust ratios are at most 1", needs=LAMB)
    always_adapt: bool = option(
        False, needs=[{**LAMB, "weight_decay": False}, {**LAMB, "decay_norm_and_bias": False}],
        help="of lamb: a trust ratio for undecayed tensors too")
    schedule: Schedule = option("cosine", aka="scheduler lr_scheduler",
        help="constant, multistep, step, cosine, polynomial or one_cycle")
    milestones: list[int] = option([], needs={"schedule": "multistep"},
        help="epochs at which multistep multiplies lr by gamma")
    lr_step_epochs: int | None = option(None, needs={"schedule": "step"}, aka="decay_epochs", ge=1,
        help="epochs after which step multiplies lr by gamma")
    gamma: float = option(0.1, needs=STEPPED, aka="decay_rate", gt=0, lt=1,
        help="of multistep and step")
    power: float = option(1.0, "of polynomial; 1 is linear", needs={"schedule": "polynomial"}, gt=0)
    lr_min: float = option(0.0, needs=DECAYING, aka="eta_min min_lr", ge=0,
        help="final lr of cosine and polynomial")
    pct_start: float = option(0.3, needs={"schedule": "one_cycle"}, gt=0, lt=1,
        help="share of the steps in which one_cycle rises to lr")
    cosine_epochs: float | None = option(None, needs={"schedule": "cosine"}, gt=0,
        help="epochs from the end of the warm-up to lr_min; None is all that remain")
    lr_per_epoch: bool = option(False, needs=DECAYING,
        help="cosine and polynomial change once an epoch, not every step")
    warmup: Literal["linear", "cosine", "exponential"] = option(
        "linear", needs=WARMUP, aka="warmup_type warmup_mode",
        help="shape of the warm-up")
    warmup_epochs: float = option(0.0, needs=BEFORE_PEAK, ge=0,
        help="epochs in which lr rises to its peak, arXiv 1706.02677")
    warmup_steps: int = option(0, "the same in steps", needs=BEFORE_PEAK, aka="warmup_iter", ge=0)
    warmup_start_factor: Fraction = option(0.0, needs=WARMUP, aka="warmup_lr",
        help="share of lr that the warm-up starts from")
    layer_decay: float | None = option(None, aka="layer_wise_decay", gt=0, lt=1,
        help="lr of a layer over that of the layer above it, arXiv 2106.08254")
    head_lr_scale: float = option(1.0, aka="head_lr classifier_lr", gt=0,
        help="lr of the classifier over that of the other layers")
    head_only_epochs: int = option(0, aka="linear_probe", ge=0,
        help="first epochs, in which only the classifier is trained")
    clip_grad_norm: float | None = option(None, aka="clip_grad max_grad_norm", gt=0,
        help="largest norm of all gradients together")
    ema_decay: float | None = option(None, aka="model_ema_decay", gt=0, lt=1,
        help="share of the average kept per step, constant; both weights are evaluated")

    # loss
    loss: Literal["ce", "bce", "focal"] | Part = option("ce", needs=TASK_LOSS, aka="bce_loss",
        help="cross-entropy, binary cross-entropy of every class, softmax focal loss, file.py:name")
    loss_args: dict[str, Any] = option({}, "of a custom loss", needs={"loss": A_PART})
    focal_gamma: float = option(2.0, needs={"loss": "focal", "task_weight": True}, ge=0,
        help="power of 1 - p, arXiv 1708.02002; 0 is cross-entropy")
    class_weights: list[float | Literal["balanced"]] = option([], needs=WEIGHTED,
        help="of ce and focal, one per class; balanced: inverse to the images of a class")
    bce_threshold: float | None = option(None, needs=BCE, aka="bce_target_thresh", ge=0, lt=1,
        help="targets above count as 1, others as 0; RSB 0.2")
    bce_sum: bool = option(False, needs=BCE,
        help="sum over classes, not the mean: num_classes times the gradient")
    bce_shift: bool = option(False, needs=BCE,
        help="logits minus ln(num_classes) in the loss; UP's bias has sum, shift")
    label_smoothing: float = option(0.0, needs=TASK_LOSS, aka="smoothing smooth_ratio", ge=0, lt=1,
        help="share of the target spread over all classes, arXiv 1512.00567")
    up_smoothing: bool = option(False, needs=SMOOTHED_MIX,
        help="UP's smoothing of mixed labels, sum below 1; to reproduce it")

    # augmentation
    transform: Literal[""] | Part = input_option("",
        help="file.py:name, applied to a training image after all other augmentation")
    transform_args: dict[str, Any] = input_option({}, needs={"transform": True},
        help="of the transform")
    crop_scale: list[PositiveFraction] = input_option([1.0, 1.0], min_length=2, max_length=2,
        help="share of the area a crop keeps, arXiv 1409.4842; ImageNet 0.08 to 1")
    crop_ratio: list[Positive] = input_option(
        [0.75, 1.3333333333333333], min_length=2, max_length=2,
        help="width over height of a crop")
    hflip: Fraction = input_option(0.0, "probability of a horizontal flip")
    brightness: Fraction = input_option(0.0, "factor 1 - x to 1 + x")
    contrast: Fraction = input_option(0.0, "factor 1 - x to 1 + x")
    saturation: Fraction = input_option(0.0, "factor 1 - x to 1 + x")
    hue: float = input_option(0.0, "shift -x to x, in turns of the colour circle", ge=0, le=0.5)
    autoaugment: bool | Literal["trivialaugment", "augmix"] = input_option(False,
        help="torchvision's: True, ImageNet's policy, arXiv 1805.09501; 2103.10158; 1912.02781")
    randaug_n: int = input_option(0, aka="aa", ge=0, le=16,
        help="RandAugment operations per image, arXiv 1909.13719; 0 is off")
    randaug_m: float = input_option(7.0, "mean magnitude, 0 to 10", needs=RANDAUG, ge=0, le=10)
    randaug_std: float = input_option(0.5, needs=RANDAUG, aka="magnitude_std", ge=0, le=10,
        help="standard deviation of the magnitude")
    randaug_increasing: bool = input_option(True, needs=RANDAUG,
        help="a higher magnitude is never milder, timm's inc1")
    randaug_variant: Literal["up", "timm"] = input_option("up", needs=RANDAUG,
        help="up: nearest, black, shift in pixels; timm: smooth, mean colour, in shares")
    mixup_alpha: float = input_option(0.0, aka="mixup", ge=0, le=100,
        help="of Beta(a, a), arXiv 1710.09412; 0 is off")
    cutmix_alpha: float = input_option(0.0, aka="cutmix", ge=0, le=100,
        help="of Beta(a, a), arXiv 1905.04899; 0 is off")
    switch_prob: Fraction = input_option(
        0.5, aka="mixup_switch_prob", needs={"mixup_alpha": True, "cutmix_alpha": True},
        help="probability of CutMix where both are on")
    mix_per_sample: bool = input_option(False, needs=MIXED,
        help="different parameters for each image, not one for the step")
    mix_prob: Fraction = input_option(1.0, needs=MIXED, aka="mixup_prob",
        help="probability that anything is mixed, timm's mixup-prob")
    erase_prob: Fraction = input_option(0.0, aka="reprob",
        help="probability of RandomErasing, arXiv 1708.04896")
    erase_mode: Literal["pixel", "rand", "const"] = input_option("pixel", needs=ERASE, aka="remode",
        help="filled with noise, one noise colour, or the mean")
    erase_count: int = input_option(1, needs=ERASE, ge=1, le=16,
        help="boxes at most, which share the area")

    # distillation
    teacher: list[str] = option([], aka="teacher_path",
        help="run folders, weights files or timm names; none: no teacher")
    teacher_model: list[str] = option([], needs=TEACHER,
        help="timm names of the teachers in weights files, one each")
    teacher_weight: list[Positive] = option([1.0], needs=TEACHER, min_length=1,
        help="of a teacher's loss, one for all or one each")
    teacher_image_size: list[Annotated[int, Field(ge=8, le=4096)]] = option([], needs=TEACHER,
        help="pixels, one for all or one each; none: as trained")
    teacher_mean: list[Fraction] = option([], needs=TEACHER,
        help="RGB, 0 to 1, one for all or one each; none: as trained")
    teacher_std: list[PositiveFraction] = option([], "as teacher_mean", needs=TEACHER)
    distill_pairs: list[str] = option(["logits"], needs=TEACHER, aka="mimic_name", min_length=1,
        help="logits, or modules: layer4 -> layer4, layer4 -> teacher2:layer4")
    kd_loss: list[KDLoss | Part] = option(["dist"], needs=TEACHER, aka="mimic_type", min_length=1,
        help="one for all pairs or one each; modules take l2, l2_normalized or file.py:name")
    kd_loss_args: dict[str, Any] = option({}, "of a custom kd_loss", needs={"kd_loss": A_PART})
    kd_weight: list[Positive] = option([1.0], needs=TEACHER, aka="distill_weight", min_length=1,
        help="one for all pairs or one each")
    temperature: Positive = option(
        1.0, needs={**TEACHER, "kd_loss": losses_with_temperature}, aka="kd_temperature tau",
        help="divides logits in kl, ce, dist, dkd and kl_standardized_logits")
    dkd_beta: float = option(8.0, needs={**TEACHER, "kd_loss": "dkd"}, gt=0,
        help="weight of the other classes in dkd, arXiv 2203.08679")
    kd_warmup_epochs: float = option(0.0, needs=TEACHER, ge=0,
        help="epochs in which the weight of the distillation loss rises from 0")
    task_weight: float = option(1.0, needs=TEACHER, aka="task_loss", ge=0,
        help="of the loss against the labels; 0 leaves the teacher's")
    cache_teacher_logits: bool = runtime_option(False, needs=TEACHER,
        help="save the teachers' logits on disk for the next student")

    # run
    seed: int = input_option(0, aka="random_seed", ge=0, lt=2**32,
        help="of the order, augmentation and initial weights")
    resume_from: str = option("", "run folder whose last.pt is continued here", aka="resume")
    auto_resume: bool = runtime_option(True, "continue where this run folder stopped")
    metrics: list[Part] = option([], "file.py:name, columns of metrics.csv from the predictions")
    early_stopping: int | None = option(None, aka="patience early_stopping_patience", ge=1,
        help="evaluations without a higher top-1 after which the run is finished; None: never")
    eval_every: int = option(1, "epochs between evaluations; the last is always evaluated", ge=1)
    checkpoint_minutes: float = runtime_option(10.0, ge=0,
        help="between checkpoints inside an epoch; 0 is every step")
    log_every: int = runtime_option(10, "steps per row of steps.csv", ge=1)
    device: Literal["auto", "cpu", "cuda", "mps"] = runtime_option("auto", "auto takes a GPU")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = option("auto", aka="amp",
        help="auto is bf16 on GPUs that have it; fp16, with a scaled loss, is for older GPUs")
    channels_last: bool = input_option(True, "memory layout of images and weights")
    compile: bool = runtime_option(False, aka="torchcompile",
        help="torch.compile of the model; its first steps take longer")
    grad_checkpointing: bool = runtime_option(False, aka="gradient_checkpointing checkpointing",
        help="recompute activations in the backward pass: less memory, more time")
    sync_batch_norm: bool = option(False, aka="sync_bn syncbn",
        help="batch-norm statistics over all GPUs' images, not of each GPU's own")
    augment_on_device: bool = input_option(False, needs=ON_DEVICE,
        help="hflip, RandAugment and jitter on the batch; loaders only crop")
    workers: int | None = runtime_option(None, aka="num_workers", ge=0,
        help="loader processes per device; None is one per core, at most 16")
    runs_dir: str = runtime_option("runs", "folder of the run folders", min_length=1)
    # fmt: on
