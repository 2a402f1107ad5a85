"""What a recipe will do, in sentences with numbers, before a second of training is spent.

    for finding in doctor.examine(recipe, images=1_281_167, classes=1000):
        print(finding)

Facts follow from the recipe; a warning stands on evidence, which it names. It is advice: nothing
is refused for it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from workbench import schedule
from workbench.recipe_checks import losses_with_temperature, mixes, on_logits, one_each

if TYPE_CHECKING:  # torch takes seconds to import, and a recipe is judged without it
    import numpy as np
    import pandas as pd
    import torch

    from workbench import data


class Finding(NamedTuple):
    """A sentence; `source` names the evidence of a warning and is empty for a fact."""

    kind: str  # "fact" or "warning"
    text: str
    source: str = ""

    def __str__(self) -> str:
        return f"warning: {self.text} [{self.source}]" if self.source else self.text


def examine(
    recipe: Any,
    *,
    images: int,
    classes: int,
    counts: Sequence[int] | None = None,
    downscaled: int | None = None,
    measured: bool = True,
) -> list[Finding]:
    """Facts first, then warnings, for a training list of `images` images in `classes` classes.

    `counts` are the images of every class and `downscaled` those that train_resize makes smaller,
    where they are known. `measured` applies the augmentation and asks timm too, which takes
    seconds. Raises TrainingError for a recipe that cannot be trained on so many
    images, ModelError for a model that does not exist.
    """
    _check_name(recipe.model)
    if classes < 2:
        from workbench import data

        raise data.DataError(f"there is {classes} class, and a classifier needs two or more")
    per_epoch = schedule.steps_per_epoch(images, recipe.batch_size, recipe.drop_last)
    if per_epoch == 0:
        raise schedule.TrainingError(
            f"batch_size {recipe.batch_size} is above {images} images and drop_last leaves none"
        )
    steps = recipe.epochs * per_epoch
    facts = [
        _length(recipe, images, per_epoch, steps),
        _classes(images, classes, counts),
        _rate(recipe, per_epoch, steps),
        _pull(recipe, classes),
        *_average(recipe, per_epoch, steps),
        *_decay(recipe, per_epoch),
        *_mixing(recipe),
    ]
    warnings = [
        Finding("warning", text, source)
        for rule, source in _EVIDENCE + _MEASURED * measured
        if (text := rule(recipe, per_epoch, steps, classes))
    ]
    if counts is not None and 0 in counts:
        text = f"{list(counts).count(0):,} of {classes:,} classes have no training image"
        warnings.append(Finding("warning", f"{text}; workbench check-data names them", "the data"))
    if downscaled == 0:
        text = f"train_resize {recipe.train_resize} shrinks none of {images:,} training images"
        warnings.append(Finding("warning", f"{text}; leave it out", "their sizes"))
    return [*(Finding("fact", text) for text in facts), *warnings]


def _check_name(name: str) -> None:
    """Raises ModelError where timm has no such model; timm is imported for names it lacks only."""
    folder = Path(importlib.util.find_spec("timm").origin).parent / "models"
    made = re.compile(rf"^@register_model\ndef {re.escape(name.split('.')[0])}\(", re.M)
    if not any(made.search(path.read_text(encoding="utf-8")) for path in folder.glob("*.py")):
        from workbench import models

        models.check_name(name)


def gradient_scale(recipe: Any, classes: int) -> float:
    """Norm of the loss's gradient at the logits of a fresh model, for one image of one class.

    Logits of a fresh model are near 0. Plain cross-entropy gives sqrt(1 - 1 / classes). The
    gradient is the prediction less the target: softmax, or sigmoid, of logits of 0.
    """
    rest, said, share = recipe.label_smoothing / classes, 1 / classes, 1.0
    wanted = [1 - recipe.label_smoothing + rest, rest]
    if recipe.loss == "bce":
        said = 1 / (1 + classes) if recipe.bce_shift else 0.5
        share = 1.0 if recipe.bce_sum else 1 / classes
        if recipe.bce_threshold is not None:
            wanted = [float(target > recipe.bce_threshold) for target in wanted]
    return share * math.hypot(said - wanted[0], math.sqrt(classes - 1) * (said - wanted[1]))


# ---- facts


def _length(recipe: Any, images: int, per_epoch: int, steps: int) -> str:
    text = f"{per_epoch:,} steps an epoch of {images:,} images, {steps:,} steps in all"
    if (rest := images % recipe.batch_size) and not recipe.drop_last:
        text += f"; the last step of an epoch has {rest:,} images instead of {recipe.batch_size:,}"
    if recipe.repeated_aug > 1:
        seen = recipe.epochs / recipe.repeated_aug
        text += f"; an epoch shows 1 / {recipe.repeated_aug} of the images, {recipe.repeated_aug}"
        text += f" times each, so that an image meets {seen:.0f} epochs"
    return text + "."


def _classes(images: int, classes: int, counts: Sequence[int] | None) -> str:
    text = f"{images / classes:,.0f} images a class on average"
    if counts is not None and len(counts):
        text += f", {min(counts):,} in the smallest and {max(counts):,} in the largest"
    return text + f"; guessing gives {100 / classes:.3g} % top-1."


def _rate(recipe: Any, per_epoch: int, steps: int) -> str:
    rate = schedule.lr_schedule(recipe, per_epoch)
    climb = schedule.warmup_steps(recipe, per_epoch)
    text = f"lr stands at its peak of {recipe.lr:g}"
    if climb:
        text = (
            f"lr climbs from {rate(0):.3g} to its peak of {recipe.lr:g} over {climb:,} steps "
            f"({climb / per_epoch:.3g} of {recipe.epochs} epochs)"
        )
    return (
        text + f", is {rate(steps // 2):.3g} half way and {rate(steps - 1):.3g} in the last step."
    )


def _pull(recipe: Any, classes: int) -> str:
    scale, plain = gradient_scale(recipe, classes), math.sqrt(1 - 1 / classes)
    text = f"The gradient of the loss at a fresh model's logits has a norm of {scale:.3g} an image"
    if abs(scale / plain - 1) > 0.02:
        text += f", {scale / plain:.2g} times that of cross-entropy"
    if recipe.optimizer == "sgd":
        return text + "."
    return text + f"; {recipe.optimizer} divides a constant factor out again."


def _average(recipe: Any, per_epoch: int, steps: int) -> list[str]:
    if recipe.ema_decay is None:
        return []
    half, left = _half_life(recipe), recipe.ema_decay**steps
    return [
        f"EMA: half of it is younger than {half:,.0f} steps ({_few(half / per_epoch)} epochs of "
        f"{recipe.epochs}); at the end {left:.2g} of it are still the initial weights."
    ]


def _half_life(recipe: Any) -> float:
    return math.log(0.5) / math.log(recipe.ema_decay)


def _decay(recipe: Any, per_epoch: int) -> list[str]:
    if recipe.weight_decay == 0 or recipe.optimizer == "lamb":
        return []
    epochs = math.log(2) / (recipe.lr * recipe.weight_decay) / per_epoch
    if recipe.optimizer == "sgd" and recipe.momentum:
        epochs *= 1 - recipe.momentum  # a constant gradient moves 1 / (1 - momentum) as far
    spared = "" if recipe.decay_norm_and_bias else "; norms and biases are spared"
    many = _few(epochs)
    return [f"Weight decay alone would halve a weight in {many} epochs at the peak{spared}."]


def _few(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _mixing(recipe: Any) -> list[str]:
    if not mixes(recipe):
        return []
    share = recipe.switch_prob if recipe.mixup_alpha else 1.0
    share = share if recipe.cutmix_alpha else 0.0
    kinds = [
        f"{part * recipe.mix_prob:.0%} {name} (alpha {alpha:g})"
        for name, alpha, part in (
            ("Mixup", recipe.mixup_alpha, 1 - share),
            ("CutMix", recipe.cutmix_alpha, share),
        )
        if part
    ]
    unit = "images" if recipe.mix_per_sample else "steps"
    return [f"Of all {unit} {' and '.join(kinds)}; training top-1 counts the larger label."]


# ---- teachers, who must be run to be judged


def teachers(
    recipe: Any,
    content: data.Dataset,
    *,
    max_images: int = 2048,
    max_val_images: int | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """What the recipe's teachers are worth to this student, a row each, from running them.

    `max_val_images` takes so many of the validation list, evenly spaced, in the place of all.

    teacher, model, parameters; own_top1 (its own run's, nan where unknown), val_top1 (of the
    validation list, as the student sees it), crops_top1 (of the first `max_images` training crops,
    erased and mixed; a mix counts by its larger share), all in percent; entropy (mean, nats, of
    its softmax on those crops); offset (mean logit, in standard deviations of an image's logits);
    bce (True where its run says so, or the offset: cross-entropy leaves the mean logit where it
    began, near 0, binary cross-entropy pulls it far below); temperature (of the smallest
    cross-entropy on the validation list, arXiv 1706.04599); agreement (percent of the validation
    list on which the student's start says the same); step_share (percent of a step's time that
    the teacher takes); state (of its own run). Raises DistillationError or ModelError.
    """
    import numpy as np
    import pandas as pd
    import torch

    from workbench import data, distillation, models, training
    from workbench.progress import bar

    device = training.pick_device(recipe.device)
    bf16 = training.pick_precision(recipe.precision, device) == "bf16"
    model, _ = training.build_initial_model(recipe, content.classes)
    if recipe.resume_from:
        model.load_state_dict(training.resumed_state(recipe)["model"])
    layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
    model.to(device, memory_format=layout)
    kd = distillation.Distillation(recipe, model, content.classes, device)
    every = math.ceil(len(content.val) / (max_val_images or len(content.val)))
    val = content.val.iloc[::every].reset_index(drop=True)
    total = min(max_images, len(content.train)) + len(val)
    with contextlib.ExitStack() as stack:
        if progress:
            shown = stack.enter_context(bar(total, "asking the teachers", "img"))

        def ask(images: torch.Tensor) -> list[np.ndarray]:
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                answers = [answer.logits for answer in kd.teacher_outputs(images)]
            if progress:
                shown.update(len(images))
            return [z.float().cpu().numpy() for z in answers]

        crops, drawn, seen, first = [], [], 0, None
        prepare = training.DeviceTransform(recipe, len(content.classes), device)
        for batch in _first_batches(recipe, content):
            if len(batch.labels):
                images, targets = prepare(batch)
                crops.append(ask(images))
                drawn.append((targets if targets.ndim == 1 else targets.argmax(1)).cpu().numpy())
                first = first or (images, targets)
                if (seen := seen + len(images)) >= max_images:
                    break
        answers, starts, labels = [], [], []
        normalize = training.Normalize(recipe, device)
        stack.enter_context(models.eval_mode(model))
        stack.enter_context(torch.no_grad())
        for batch in data.eval_loader(
            val,
            training.eval_transform(recipe),
            batch_size=64,
            workers=training.pick_workers(recipe.workers) if len(val) > 2000 else 0,
        ):
            if len(batch.labels):
                images = normalize(batch.images.to(device))
                answers.append(ask(images))
                starts.append(model(images).argmax(1).cpu().numpy())
                labels.append(batch.labels.numpy())
    start, label, want = (np.concatenate(parts) for parts in (starts, labels, drawn))
    shares = _step_shares(recipe, kd, *first, bf16)
    rows = []
    for k, teacher in enumerate(kd.teachers):
        z, crop = (np.concatenate([part[k] for part in parts]) for parts in (answers, crops))
        offset = float((z.mean(1) / z.std(1).clip(1e-9)).mean())
        rows.append(
            {
                "teacher": teacher.source,
                "model": teacher.name,
                "parameters": sum(p.numel() for p in teacher.model.parameters()),
                "own_top1": math.nan if teacher.top1 is None else teacher.top1,
                "val_top1": 100 * float((z.argmax(1) == label).mean()),
                "val_images": len(label),
                "crops_top1": 100 * float((crop.argmax(1) == want).mean()),
                "crops": len(want),
                "entropy": _entropy(crop),
                "offset": offset,
                "bce": teacher.loss == "bce" if teacher.loss else offset < -0.2,
                "temperature": best_temperature(z, label),
                "agreement": 100 * float((z.argmax(1) == start).mean()),
                "start_top1": 100 * float((start == label).mean()),
                "step_share": 100 * shares[k],
                "smoothing": teacher.smoothing,
                "state": teacher.state,
            }
        )
    return pd.DataFrame(rows)


LEAST_T, MOST_T = 0.05, 20.0  # where best_temperature looks; at either end it found none


def best_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The T of the smallest mean cross-entropy of softmax(logits / T), within 2 %, 0.05 to 20.

    Guo et al., arXiv 1706.04599, section 4.2.
    """
    import numpy as np
    import torch
    from torch.nn import functional as F

    z, y = torch.from_numpy(logits).double(), torch.from_numpy(labels)
    grid = np.geomspace(LEAST_T, MOST_T, 301)
    return float(grid[np.argmin([F.cross_entropy(z / t, y).item() for t in grid])])


def about_teachers(recipe: Any, report: pd.DataFrame) -> list[Finding]:
    """What `teachers` found, in sentences: a fact for each, then what speaks against it."""
    found = [Finding("fact", _taught(row)) for row in report.itertuples()]
    for row in report.itertuples():
        for rule, source in _TEACHER_EVIDENCE:
            if text := rule(recipe, row):
                found.append(Finding("warning", f"teacher {row.teacher}: {text}", source))
    return found


def _first_batches(recipe: Any, content: data.Dataset) -> Any:
    from workbench import data, training

    per_epoch = schedule.steps_per_epoch(len(content.train), recipe.batch_size, recipe.drop_last)
    return data.train_loader(
        content.train,
        training.train_transform(recipe),
        **training.sampler_options(recipe),
        steps=range(per_epoch),
        micro_batch_size=min(recipe.micro_batch_size or 256, 256),
    )


def _entropy(logits: np.ndarray) -> float:
    import torch
    from torch.nn import functional as F

    log_p = F.log_softmax(torch.from_numpy(logits).double(), 1)
    return float(-(log_p.exp() * log_p).sum(1).mean())


def _step_shares(
    recipe: Any, kd: Any, images: torch.Tensor, targets: torch.Tensor, bf16: bool
) -> list[float]:
    """The part of forward and backward of one batch that each teacher takes, median of three."""
    import torch

    from workbench import models, training

    device = images.device

    def learn() -> None:
        with models.eval_mode(kd.student):  # the norms' statistics are not to move
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                logits, _ = kd.student(images)
            training.loss_function(recipe)(logits.float(), targets).sum().backward()
        kd.student.zero_grad(set_to_none=True)

    def teach(teacher: Any) -> None:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            teacher.model(teacher.view(images, recipe.mean, recipe.std))

    each = [models.median_seconds(lambda t=t: teach(t), device) for t in kd.teachers]
    whole = models.median_seconds(learn, device) + sum(each)
    return [seconds / whole for seconds in each]


def _taught(row: Any) -> str:
    own = "" if math.isnan(row.own_top1) else f" ({row.own_top1:.2f} % in its own run)"
    return (
        f"teacher {row.teacher}, {row.model}, {row.parameters / 1e6:.1f} million parameters: top-1 "
        f"{row.val_top1:.2f} % of {row.val_images:,} validation images at the student's size"
        f"{own}, {row.crops_top1:.1f} % of {row.crops:,} training crops and mixes, where its "
        f"entropy is {row.entropy:.2f} nats; its best softmax temperature is "
        f"{row.temperature:.2f}; the student's start agrees with it on {row.agreement:.1f} %; it "
        f"takes {row.step_share:.0f} % of a step."
    )


def _tempered(recipe: Any) -> bool:
    """Whether some mimic takes softmax at a temperature, not of standardised logits."""
    return bool(set(recipe.kd_loss) & {*losses_with_temperature} - {"kl_standardized_logits"})


def _bce_teacher(recipe: Any, row: Any) -> str | bool:
    asked, honest = recipe.temperature, row.temperature
    if not LEAST_T < honest < MOST_T:
        advice = "which temperature is honest these images do not say; take kl_standardized_logits"
    elif abs(math.log(honest)) > math.log(1.2):
        advice = f"temperature {asked * honest:.2g} would do to it what {asked:g} does to others; "
        advice += "or take kl_standardized_logits"
    else:
        advice = f"here that is no harm, its honest temperature is {honest:.2f}"
    return (
        row.bce
        and _tempered(recipe)
        and f"looks trained with binary cross-entropy (mean logit {row.offset:+.2f} standard "
        f"deviations), so its softmax at temperature 1 is not what it learnt to say: {advice}"
    )


def _cut_teacher(recipe: Any, row: Any) -> str | bool:
    return (
        row.bce
        and "up_kl" in recipe.kd_loss
        and f"looks trained with binary cross-entropy (mean logit {row.offset:+.2f} standard "
        "deviations), and up_kl cuts every logit below 0, which are nearly all of it: take kl with "
        "its own temperature, or kl_standardized_logits"
    )


def _unfinished_teacher(recipe: Any, row: Any) -> str | bool:
    return row.state != "finished" and f"its run is {row.state}: a teacher has finished learning"


def _smoothed_teacher(recipe: Any, row: Any) -> str | bool:
    return (
        (row.smoothing or 0) > 0
        and bool(set(recipe.kd_loss) & {"kl", "ce", "up_kl", "dkd"})
        and f"was trained with label smoothing {row.smoothing:g}, which wipes out what a student "
        "learns from the wrong classes' logits; train it without, or mimic modules"
    )


def _weak_teacher(recipe: Any, row: Any) -> str | bool:
    return (
        row.start_top1 >= row.val_top1
        and f"the student's start has top-1 {row.start_top1:.2f} % already, the teacher "
        f"{row.val_top1:.2f} %"
    )


def _lost_teacher(recipe: Any, row: Any) -> str | bool:
    return (
        row.crops_top1 < 0.6 * row.val_top1
        and f"knows {row.crops_top1:.1f} % of the student's crops and mixes, but "
        f"{row.val_top1:.1f} % of the validation images: larger crops, milder "
        "augmentation or another image size would let it teach"
    )


def _smaller_images(recipe: Any, row: Any) -> str | bool:
    return (
        row.own_top1 - row.val_top1 > 5
        and f"loses {row.own_top1 - row.val_top1:.1f} points at the student's images; a larger "
        "image_size, or another teacher_image_size, would give it more to see"
    )


_TEACHER_EVIDENCE = [
    (_bce_teacher, "the mean logit; arXiv 2110.00476 trains so; arXiv 1706.04599"),
    (_cut_teacher, "the mean logit; arXiv 2110.00476 trains so"),
    (_unfinished_teacher, "its run folder"),
    (_smoothed_teacher, "arXiv 1906.02629, section 5"),
    (_weak_teacher, "the report above"),
    (_lost_teacher, "the report above; arXiv 2106.05237, section 3"),
    (_smaller_images, "the report above"),
]


# ---- warnings: (recipe, steps per epoch, steps, classes) -> sentence, or False


def _small(recipe: Any) -> bool:
    names = "resnet10 resnet14 resnet18 test_ mobilenet regnetx_002".split()
    return recipe.model.startswith(tuple(names))


def _from_scratch(recipe: Any) -> bool:
    return not (recipe.weights or recipe.pretrained or recipe.resume_from)


def _strikes_on_a_small_network(recipe, per_epoch, steps, classes):
    return (
        recipe.loss == "bce"
        and mixes(recipe)
        and recipe.epochs <= 100
        and _small(recipe)
        and _from_scratch(recipe)
        and f"strikes in {recipe.epochs} epochs on a small network: RSB's 100 epochs (A3) gave "
        "ResNet-18 68.25 on ImageNet, 300 (A2) 70.63, 600 (A1) 71.50, and plain training 69.75; "
        "United Perception's lighter form, without RandAugment, 72.78 in 300"
    )


def _lamb_rate(recipe, per_epoch, steps, classes):
    # Below 2,048 the rule is no upper bound: the unscaled 0.008 did best on CIFAR-10 at 128.
    root = math.sqrt(recipe.batch_size / 2048)
    low, high = 0.005 * root, 0.008 * max(1.0, root)
    return (
        recipe.optimizer == "lamb"
        and _from_scratch(recipe)
        and not low / 1.6 <= recipe.lr <= high * 1.6
        and f"LAMB with lr {recipe.lr:g} at batch_size {recipe.batch_size:,}: known to work are "
        f"0.005 to 0.008 at 2,048; {low:.2g} to {high:.2g} is the range to look in here"
    )


def _lamb_clip(recipe, per_epoch, steps, classes):
    return (
        recipe.optimizer == "lamb"
        and recipe.clip_grad_norm is None
        and "LAMB without clip_grad_norm: the published recipes clip at 1.0 inside LAMB, mostly "
        "without saying so"
    )


def _sgd_rate(recipe, per_epoch, steps, classes):
    linear = 0.1 * recipe.batch_size / 256
    return (
        recipe.optimizer == "sgd"
        and _from_scratch(recipe)
        and recipe.momentum >= 0.8
        and not linear / 4 <= recipe.lr <= linear * 4
        and recipe.batch_size >= 64
        and f"SGD with lr {recipe.lr:g} at batch_size {recipe.batch_size:,}: the linear rule says "
        f"{linear:.2g}; lr is not rescaled when batch_size changes"
    )


def _no_warmup(recipe, per_epoch, steps, classes):
    return (
        schedule.warmup_steps(recipe, per_epoch) == 0
        and recipe.schedule != "one_cycle"
        and _from_scratch(recipe)
        and recipe.batch_size >= 1024
        and f"no warm-up at batch_size {recipe.batch_size:,}: large batches diverge or lose "
        "accuracy in the first epochs without one; 5 epochs are usual"
    )


def _long_warmup(recipe, per_epoch, steps, classes):
    climb = schedule.warmup_steps(recipe, per_epoch)
    return (
        climb > 0.2 * steps
        and f"the warm-up takes {climb:,} of {steps:,} steps; published recipes take 1 to 7 %. "
        "United Perception's resnet50D file holds 62,560 steps where 6,256 or so were meant"
    )


def _slow_average(recipe, per_epoch, steps, classes):
    if recipe.ema_decay is None or _half_life(recipe) <= 0.1 * steps:
        return False
    fitting = 1 - math.log(2) / (0.05 * steps)
    advice = f"{fitting:.4g} would make it 5 %" if fitting > 0 else "leave it out"
    return (
        f"EMA with decay {recipe.ema_decay:g} has a half-life of {_half_life(recipe):,.0f} steps "
        f"of {steps:,}, so it trails far behind; {advice}"
    )


def _weak_pull(recipe, per_epoch, steps, classes):
    scale = gradient_scale(recipe, classes)
    return (
        recipe.optimizer == "sgd"
        and scale < 0.3
        and f"the loss pulls with {scale:.2g}, the mean over {classes:,} classes, and sgd follows "
        "its length: bce_sum, a larger lr, or lamb"
    )


def _short_mixing(recipe, per_epoch, steps, classes):
    return (
        mixes(recipe)
        and recipe.epochs < 100
        and _from_scratch(recipe)
        and f"mixing in {recipe.epochs} epochs: mixed images ask for longer training, Bag of "
        "Tricks goes from 120 epochs to 200 for them"
    )


def _smoothing_and_threshold(recipe, per_epoch, steps, classes):
    return (
        recipe.bce_threshold is not None
        and recipe.label_smoothing > 0
        and recipe.label_smoothing / classes < recipe.bce_threshold
        and f"label_smoothing {recipe.label_smoothing:g} before bce_threshold "
        f"{recipe.bce_threshold:g}: every target becomes 0 or 1, so smoothing only moves the share "
        f"of a mix that counts, to {_least_share(recipe, classes):.3f}"
    )


def _least_share(recipe: Any, classes: int) -> float:
    s = recipe.label_smoothing
    return (recipe.bce_threshold - s / classes) / (1 - s)


def lost_share(recipe: Any, draws: int = 200) -> float:
    """The share of training images of noise of which one colour covers 3/4 after augmentation."""
    jitter = recipe.randaug_n or recipe.autoaugment or recipe.brightness or recipe.contrast
    if not jitter and recipe.crop_scale[0] * recipe.image_size**2 > 4:  # pixels
        return 0.0
    import numpy as np

    from workbench import training

    size = recipe.image_size
    noise = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    transform = replace(training.train_transform(recipe), on_device=False)
    seen = (transform(noise, np.random.default_rng(i)).reshape(-1, 3) for i in range(draws))
    most = [np.bincount((pixels >> 3) @ np.array([1024, 32, 1])).max() for pixels in seen]
    return float(np.mean(np.array(most) > 0.75 * size**2))


def nothing_left(recipe: Any, *_: Any, draws: int = 200) -> str:
    """A warning, where augmentation leaves nothing of 1 % of the images or more; else empty."""
    if (share := lost_share(recipe, draws)) < 0.01:
        return ""
    milder = ", or take randaug_variant: timm, which moves by at most 45 % of the side (up by "
    milder += "randaug_m times 10 pixels at any image_size)"
    return (
        f"augmentation leaves little or nothing of {share:.0%} of the training images: one colour "
        f"covers 3/4 of their pixels or more; make it milder{milder * _moves_far(recipe)}"
    )


def _moves_far(recipe: Any) -> bool:
    """Whether RandAugment in UP's form moves an image by 10 randaug_m pixels and out of itself."""
    far = 10 * recipe.randaug_m >= recipe.image_size
    return bool(recipe.randaug_n and recipe.randaug_variant == "up" and far)


def worth_measuring(recipe: Any) -> bool:
    """Whether `measured` may find something of a recipe whose data are not at hand."""
    return bool(recipe.weights or recipe.pretrained or recipe.resume_from) or _moves_far(recipe)


def _other_normalization(recipe, per_epoch, steps, classes):
    from workbench import training

    return training.other_normalization(recipe)


def _mirrored_writing(recipe, per_epoch, steps, classes):
    return (
        recipe.hflip > 0
        and recipe.dataset in ("digits", "letters")
        and f"hflip {recipe.hflip:g} mirrors {recipe.dataset}, and a mirrored one is another or "
        "none"
    )


def _small_norm_batch(recipe, per_epoch, steps, classes):
    size = recipe.micro_batch_size or recipe.batch_size
    return (
        size < 16
        and recipe.model.startswith(("resnet", "regnet", "mobilenet", "efficientnet"))
        and f"batch norm sees {size} images at a time: its error rises below 16"
    )


def _short_of_the_end(recipe, per_epoch, steps, classes):
    if recipe.cosine_epochs is None:
        return False
    last = schedule.lr_schedule(recipe, per_epoch)(steps - 1)
    return (
        last > recipe.lr_min + 0.005 * recipe.lr
        and f"cosine_epochs {recipe.cosine_epochs:g} after the warm-up reach beyond the last "
        f"epoch: lr ends at {last:.3g}, {last / recipe.lr:.1%} of its peak"
    )


def _kl_on_a_strong_recipe(recipe, per_epoch, steps, classes):
    kinds = zip(
        recipe.distill_pairs, one_each(recipe.kd_loss, len(recipe.distill_pairs)), strict=True
    )
    plain = [kind for name, kind in kinds if on_logits(name) and kind in ("kl", "ce", "up_kl")]
    strong = recipe.randaug_n > 0 or recipe.autoaugment or recipe.cutmix_alpha > 0
    return (
        bool(recipe.teacher and plain)
        and strong
        and f"kd_loss {plain[0]} on a strong recipe: it took ResNet-18 from 73.4 without a "
        "teacher to 72.6, and dist to 74.5"
    )


def _few_beside_each_other(recipe, per_epoch, steps, classes):
    together = min(recipe.micro_batch_size or recipe.batch_size, recipe.batch_size)
    return (
        bool(recipe.teacher)
        and "dist" in recipe.kd_loss
        and together < 16
        and f"dist correlates every class over the {together} images of a forward, mostly noise; "
        "let a forward hold 16 or more (on several devices each its own), or take kl"
    )


def _rate_of_a_scratch(recipe, per_epoch, steps, classes):
    linear = 0.1 * recipe.batch_size / 256
    return (
        recipe.optimizer == "sgd"
        and not _from_scratch(recipe)
        and not recipe.resume_from
        and recipe.momentum >= 0.8
        and recipe.lr > linear
        and recipe.batch_size >= 64
        and f"lr {recipe.lr:g} from trained weights is what a start from scratch takes at "
        f"batch_size {recipe.batch_size:,}; a tenth or a hundredth of that of pre-training keeps "
        "what was learnt"
    )


def _frozen_at_random(recipe, per_epoch, steps, classes):
    return (
        bool(recipe.freeze or recipe.head_only_epochs)
        and _from_scratch(recipe)
        and "freeze and head_only_epochs keep weights as they start, and these start at random; "
        "name "
        "weights, or pretrained"
    )


_RSB = "arXiv 2110.00476, table 2"
_UP = "United Perception's lr_helper.py"
_TIMM = "timm's results-imagenet.csv, resnet18.{a1,a2,a3,tv}_in1k at 224 pixels; UP's benchmark"
_EVIDENCE = [
    (_strikes_on_a_small_network, _TIMM),
    (_lamb_rate, f"{_RSB}; arXiv 1904.00962; README, results"),
    (_lamb_clip, "timm's and United Perception's LAMB: max_grad_norm 1.0 by default"),
    (_sgd_rate, "arXiv 1706.02677, section 2.1: 0.1 for 256 images"),
    (_no_warmup, "arXiv 1706.02677, section 2.2"),
    (_long_warmup, _UP),
    (_slow_average, "half-life ln 0.5 / ln decay; timm issue 281"),
    (_weak_pull, "the formula; timm's bce_sum and UP's bias exist for it"),
    (_short_mixing, "arXiv 1812.01187, section 5"),
    (_smoothing_and_threshold, "the formula; timm thresholds after smoothing"),
    (_mirrored_writing, "b and d, 2 and its mirror image"),
    (_small_norm_batch, "arXiv 1803.08494, figure 1"),
    (_short_of_the_end, _UP),
    (_kl_on_a_strong_recipe, "arXiv 2205.10536, table 3, and its code's README"),
    (_few_beside_each_other, "the formula: arXiv 2205.10536, eq. 10"),
    (_rate_of_a_scratch, "United Perception's page on downstream tasks: 0.1 or 0.01 of it"),
    (_frozen_at_random, "United Perception freezes pre-trained layers"),
]
_MEASURED = [
    (nothing_left, "200 draws of this recipe's augmentation on an image of noise"),
    (_other_normalization, "its run's recipe; timm's pretrained_cfg"),
]
