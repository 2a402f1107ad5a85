"""What contradicts what in a recipe, and which options have no effect beside the others."""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
losses_with_temperature = ("kl", "ce", "dist", "dkd", "kl_standardized_logits")


def unmet_needs(needs: Mapping | list[Mapping] | None, recipe: Any) -> str:
    """Why an option has no effect, "" where it has: "optimizer is 'adamw'".

    `needs` maps other options to the value they must have, or a tuple of such values; True and
    False mean set and not set. A list holds alternatives.
    """
    alternatives = needs if isinstance(needs, list) else [needs] if needs else []
    unmet: dict[str, str] = {}
    for alternative in alternatives:
        missing = [key for key, wanted in alternative.items() if not _has(recipe, key, wanted)]
        if not missing:
            return ""
        unmet |= {key: f"{key} is {getattr(recipe, key)!r}" for key in missing}
    return " and ".join(unmet.values())


def _has(recipe: Any, key: str, wanted: Any) -> bool:
    value = getattr(recipe, key)
    if isinstance(wanted, bool):
        return bool(value) == wanted
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)
    return any(one in wanted for one in (value if isinstance(value, list) else [value]))


def conflicts(recipe: Any, bad: set[str]) -> Iterator[str]:
    """A sentence for each option that has no effect, and each that contradicts another.

    Options in `bad` have a value that was refused already: what depends on them is not judged.
    """
    known = _Known(recipe, bad)
    for key, field in type(recipe).model_fields.items():
        if key not in bad and (value := getattr(recipe, key)) != field.default:
            if why := _judged(
                lambda r, f=field: unmet_needs(f.json_schema_extra["needs"], r), known
            ):
                yield f"{key}: {value!r} has no effect, since {why}"
    for key, contradicts, text in CONFLICTS:
        if key not in bad and (found := _judged(contradicts, known)):
            yield f"{key}: " + (found if isinstance(found, str) else text.format(r=recipe))


class _Known:
    """The recipe; reading an option of `bad` raises LookupError."""

    def __init__(self, recipe: Any, bad: set[str]):
        self._recipe, self._bad = recipe, bad

    def __getattr__(self, key: str) -> Any:
        if key in self._bad:
            raise LookupError(key)
        return getattr(self._recipe, key)


def _judged(rule: Callable[[Any], Any], recipe: Any) -> Any:
    try:
        return rule(recipe)
    except LookupError:
        return False


# ---- distillation pairs

# A module's name, or one teacher's: teacher2:layer4.
_PAIR = re.compile(r"[\w.]+( -> (teacher[1-9]\d*:)?[\w.]+)?")


def parse_pair(text: str) -> tuple[str, str, int | None]:
    """Student's module, teacher's module, and the teacher's number from 1, None for all."""
    student, _, teacher = text.partition(" -> ")
    number, colon, module = (teacher or student).rpartition(":")
    return student, module, int(number.removeprefix("teacher")) if colon else None


def on_logits(text: str) -> bool:
    """Whether a pair compares logits, not modules."""
    return parse_pair(text)[0] == "logits"


def one_each(values: list, count: int) -> list:
    """One value for all, as one for each."""
    return values * count if len(values) == 1 else values


def mixes(recipe: Any) -> bool:
    """Whether labels are mixed, by Mixup or CutMix."""
    return recipe.mixup_alpha > 0 or recipe.cutmix_alpha > 0


def _bad_pair(recipe: Any) -> str | bool:
    for text in recipe.distill_pairs if recipe.teacher else ():
        if not _PAIR.fullmatch(text) or ("->" not in text and text != "logits"):
            return f"{text!r} is neither logits nor 'student module -> teacher module'"
        student, teacher, number = parse_pair(text)
        if (student == "logits") != (teacher == "logits"):
            return f"{text!r} compares logits with a module; write logits -> logits"
        if number and number > len(recipe.teacher):
            return f"{text!r} names teacher {number} of {len(recipe.teacher)}"
    return False


def _module_by_logits_loss(r: Any) -> bool:
    losses = one_each(r.kd_loss, len(r.distill_pairs))
    return bool(r.teacher) and any(
        not on_logits(pair) and not loss.startswith("l2")
        for pair, loss in zip(r.distill_pairs, losses, strict=False)
    )


def _count(key: str, of: str, per: int = 1, may_be_empty: bool = False) -> tuple:
    """A row of CONFLICTS: a list holds `per` values for all, or for each of the options in `of`."""

    def wrong(recipe: Any) -> str | bool:
        given, count = len(getattr(recipe, key)), len(getattr(recipe, of))
        allowed = {per, per * count} | ({0} if may_be_empty else set())
        return bool(recipe.teacher) and given not in allowed and (
            f"{given} values for {count} in {of}; give {per} for all, or {per} each"
        )  # fmt: skip

    return key, wrong, ""


def _roots(key: str, lists: str) -> tuple:
    def wrong(recipe: Any) -> str | bool:
        roots, count = getattr(recipe, key), len(getattr(recipe, lists))
        if not roots:
            return "empty; name the folder, '.' is data_dir itself"
        return count > 0 and len(roots) not in (1, count) and (
            f"{len(roots)} roots for {count} lists; give one, or one for each list"
        )  # fmt: skip

    return key, wrong, ""


# (option, rule, sentence): what is wrong where the rule holds; a rule may return the sentence.
CONFLICTS: list[tuple[str, Callable[[Any], Any], str]] = [
    ("name", lambda r: r.name in (".", ".."), "must be the name of a folder"),
    _roots("train_root", "train_list"),
    _roots("val_root", "val_list"),
    ("val_fraction", lambda r: r.val_fraction > 0 and (r.val_list or r.val_root != ["val"]),
     "there is a validation list or root already; leave out one of the two"),
    ("val_resize", lambda r: r.val_resize < (r.val_image_size or r.image_size),
     "{r.val_resize} is smaller than the centre crop"),
    ("train_resize", lambda r: r.train_resize is not None and r.train_resize < r.image_size,
     "{r.train_resize} is below image_size {r.image_size}, every crop would be enlarged"),
    ("cache", lambda r: r.cache and not r.verify_data,
     "identifies images by their bytes, which verify_data: false does not read"),
    ("weights", lambda r: r.weights and r.pretrained, "pretrained asks for other weights"),
    ("resume_from", lambda r: r.resume_from and (r.weights or r.pretrained),
     "a resumed run has its own weights; leave out weights and pretrained"),
    ("freeze", lambda r: "" in r.freeze, "an empty name would be the whole model"),
    ("micro_batch_size", lambda r: (r.micro_batch_size or 0) >= r.batch_size,
     "{r.micro_batch_size} has no effect, since batch_size is {r.batch_size}"),
    ("micro_batch_size", lambda r: (r.micro_batch_size or 0) % 2 == 1 and mixes(r),
     "{r.micro_batch_size} is odd, but images are mixed in pairs"),
    ("repeated_aug", lambda r: r.repeated_aug > r.batch_size,
     "{r.repeated_aug} is above batch_size {r.batch_size}"),
    ("batch_size", lambda r: r.batch_size == 1 and mixes(r), "1 image has no other to mix with"),
    ("nesterov", lambda r: r.optimizer == "sgd" and r.nesterov and r.momentum == 0,
     "needs momentum above 0"),
    ("milestones", lambda r: r.schedule == "multistep" and not r.milestones,
     "empty; multistep needs the epochs to step at"),
    ("milestones", lambda r: r.schedule == "multistep"
     and not all(1 <= m < r.epochs for m in r.milestones),
     "{r.milestones} has one outside 1 to epochs - 1, and epochs is {r.epochs}"),
    ("milestones", lambda r: r.schedule == "multistep"
     and all(1 <= m < r.epochs for m in r.milestones) and sorted(set(r.milestones)) != r.milestones,
     "{r.milestones} must increase"),
    ("lr_step_epochs", lambda r: r.schedule == "step" and r.lr_step_epochs is None,
     "missing; step needs the epochs between two steps"),
    ("lr_step_epochs", lambda r: r.schedule == "step" and (r.lr_step_epochs or 0) >= r.epochs,
     "{r.lr_step_epochs} of {r.epochs} epochs would never step"),
    ("lr_min", lambda r: r.lr_min > r.lr, "{r.lr_min} is above lr {r.lr}"),
    ("warmup_epochs", lambda r: r.warmup_epochs >= r.epochs,
     "{r.warmup_epochs} of {r.epochs} epochs would leave no training at lr"),
    ("warmup_epochs", lambda r: r.warmup_epochs > 0 and r.warmup_steps > 0,
     "warmup_steps is set too; leave out one"),
    ("warmup_start_factor", lambda r: r.warmup == "exponential" and r.warmup_start_factor == 0
     and (r.warmup_epochs > 0 or r.warmup_steps > 0),
     "0, but an exponential warm-up multiplies from there; set it above 0, such as 0.001"),
    ("head_only_epochs", lambda r: r.head_only_epochs >= r.epochs,
     "{r.head_only_epochs} of {r.epochs} epochs would leave none for the whole model"),
    ("crop_scale", lambda r: r.crop_scale[0] > r.crop_scale[1], "{r.crop_scale} decreases"),
    ("crop_ratio", lambda r: r.crop_ratio[0] > r.crop_ratio[1], "{r.crop_ratio} decreases"),
    ("augment_on_device", lambda r: r.augment_on_device and r.autoaugment,
     "autoaugment is torchvision's and runs in the loaders; leave out one of the two"),
    _count("teacher_weight", "teacher"),
    _count("teacher_image_size", "teacher", may_be_empty=True),
    _count("teacher_mean", "teacher", 3, may_be_empty=True),
    _count("teacher_std", "teacher", 3, may_be_empty=True),
    ("teacher_model", lambda r: r.teacher and len(r.teacher_model) not in (0, len(r.teacher)),
     "one name for each teacher is needed, '' for those that are no weights files"),
    ("distill_pairs", _bad_pair, ""),
    _count("kd_loss", "distill_pairs"),
    _count("kd_weight", "distill_pairs"),
    ("kd_loss", _module_by_logits_loss,
     "modules are compared by l2 or l2_normalized; the others are for logits"),
    ("kd_warmup_epochs", lambda r: r.teacher and r.kd_warmup_epochs > r.epochs,
     "{r.kd_warmup_epochs} of {r.epochs} epochs would never reach the whole loss"),
    ("task_weight", lambda r: r.teacher and r.task_weight == 0
     and not any(map(on_logits, r.distill_pairs)),
     "0 and no pair of logits: nothing would train the classifier"),
    ("cache_teacher_logits", lambda r: r.cache_teacher_logits
     and not all(map(on_logits, r.distill_pairs)),
     "saves logits only; modules would need the teacher itself"),
    ("eval_every", lambda r: r.eval_every > r.epochs > 0 and r.eval_every > 1,
     "{r.eval_every} has no effect, since epochs is {r.epochs}"),
]  # fmt: skip
