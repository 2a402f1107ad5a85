"""What contradicts what in a recipe, and which options have no effect beside the others."""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any, Protocol

from pydantic import BaseModel

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
TABLE_SUFFIXES = (".csv", ".tsv", ".parquet")
# Code of the user's: file.py:name or package.module:name, in a run with its SHA-256.
PART = r"(?P<where>[^:@]+):(?P<name>[A-Za-z_]\w*)(@(?P<digest>[0-9a-f]{12}))?"
A_PART = "file.py:name"  # as a value in `needs`: any part
losses_with_temperature = ("kl", "ce", "dist", "dkd", "kl_standardized_logits")


class Values(Protocol):
    """Options by name: a Recipe, or values that are not checked."""

    def __getattr__(self, option: str) -> Any: ...


def unmet_needs(needs: Mapping | list[Mapping], recipe: Values) -> str:
    """Why an option has no effect, "" where it has: "optimizer is 'adamw'".

    `needs` maps other options to the value they must have, or a tuple of such values; True and
    False mean set and not set. A list holds alternatives.
    """
    return " and ".join(
        f"{key} is {getattr(recipe, key)!r}" for key in missing_needs(needs, recipe)
    )


def missing_needs(needs: Mapping | list[Mapping], recipe: Values) -> list[str]:
    """The options whose values leave an option without effect, none where it has one."""
    unmet: dict[str, None] = {}
    for alternative in needs if isinstance(needs, list) else [needs]:
        missing = [key for key, wanted in alternative.items() if not _has(recipe, key, wanted)]
        if not missing:
            return []
        unmet |= dict.fromkeys(missing)
    return [*unmet]


def _has(recipe: Values, key: str, wanted: Any) -> bool:
    value = getattr(recipe, key)
    if isinstance(wanted, bool):
        return bool(value) == wanted
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)
    values = value if isinstance(value, list) else [value]
    return any(one in wanted or (A_PART in wanted and is_part(one)) for one in values)


def conflicts(recipe: BaseModel, bad: set[str]) -> Iterator[str]:
    """A sentence for each option that has no effect, and each that contradicts another.

    Options in `bad` have a value that was refused already: what depends on them is not judged.
    """
    known = SimpleNamespace(**{key: value for key, value in recipe if key not in bad})

    def judged(rule: Callable[[Values], Any]) -> Any:
        try:
            return rule(known)
        except AttributeError:  # the rule reads an option in `bad`
            if not bad:
                raise
            return False

    unused = set(bad)
    for key, field in type(recipe).model_fields.items():
        needs = field.json_schema_extra["needs"]
        if needs and (why := judged(partial(unmet_needs, needs))):
            unused.add(key)
            if key not in bad and getattr(recipe, key) != field.default:
                yield f"{key}: {getattr(recipe, key)!r} has no effect, since {why}"
    for key, rule, text in CONFLICTS:
        if key not in unused and (found := judged(rule)):
            yield f"{key}: " + (found if isinstance(found, str) else text.format(r=recipe))


# ---- distillation pairs

_ONE = r"(teacher[1-9]\d*:)?"  # a pair may be of one teacher: layer4 -> teacher2:layer4
_PAIR = re.compile(rf"logits( -> {_ONE}logits)?|(?!logits )[\w.]+ -> {_ONE}(?!logits$)[\w.]+")


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


def is_part(value: str) -> bool:
    """Whether a value of an option names code of the user's: losses.py:focal."""
    return bool(re.fullmatch(PART, str(value)))


def _timm_only(recipe: Values) -> str:
    if is_part(recipe.model):
        for key in ("pretrained", "drop_path", "dropout", "layer_decay"):
            if getattr(recipe, key):
                return f"{recipe.model!r} is a custom part, and {key} is for timm's models"
    return ""


def mixes(recipe: Values) -> bool:
    """Whether labels are mixed, by Mixup or CutMix."""
    return recipe.mixup_alpha > 0 or recipe.cutmix_alpha > 0


def _bad_pair(recipe: Values) -> str:
    for text in recipe.distill_pairs:
        if not _PAIR.fullmatch(text):
            return f"{text!r} is neither logits nor 'student module -> teacher module'"
        if (number := parse_pair(text)[2] or 0) > len(recipe.teacher):
            return f"{text!r} names teacher {number} of {len(recipe.teacher)}"
    return ""


def _module_by_logits_loss(recipe: Values) -> bool:
    losses = one_each(recipe.kd_loss, len(recipe.distill_pairs))
    pairs = zip(recipe.distill_pairs, losses, strict=False)
    fits = lambda loss: loss.startswith("l2") or is_part(loss)
    return any(not on_logits(pair) and not fits(loss) for pair, loss in pairs)


def _count(key: str, of: str, per: int = 1, may_be_empty: bool = False) -> tuple:
    """A row of CONFLICTS: a list holds `per` values for all, or for each of the options in `of`."""

    def wrong(recipe: Values) -> str:
        given, count = len(getattr(recipe, key)), len(getattr(recipe, of))
        if not count or given in (per, per * count) or (may_be_empty and not given):
            return ""
        return f"{given} values for {count} in {of}; give {per} for all, or {per} each"

    return key, wrong, ""


def _bad_args(option: str, recipe: Values) -> str:
    """Why arguments cannot be saved and compared."""
    for key, value in getattr(recipe, option).items():
        items = value if isinstance(value, list) else [value]
        if not all(isinstance(x, bool | int | float | str | None) for x in items):
            return f"{key} is {value!r}; an argument is a number, a text, true, false or a list"
        if not all(math.isfinite(x) for x in items if isinstance(x, float)):
            return f"{key} is {value!r}, which is not finite"
    return ""


# (option, rule, sentence): what is wrong where the rule holds; a rule may return the sentence.
# Rules of an option that has no effect are not judged.
CONFLICTS: list[tuple[str, Callable[[Values], Any], str]] = [
    ("name", lambda r: r.name in (".", ".."), "must be the name of a folder"),
    _count("train_root", "train_list"),
    _count("val_root", "val_list"),
    ("file_column", lambda r: (r.file_column or r.label_column or r.group_column)
     and r.dataset == "files"
     and {p.lower().endswith(TABLE_SUFFIXES) for p in r.train_list + r.val_list} == {False},
     "like label_column and group_column, needs a table (.csv, .tsv, .parquet) as a list"),
    ("fold", lambda r: r.fold and (r.val_fraction or r.val_list or r.val_root != ["val"]),
     "validation images are given already; leave out val_fraction, val_list and val_root"),
    ("fold", lambda r: r.fold and int.__gt__(*map(int, r.fold.split("/"))),
     "{r.fold} is no fold; 2/5 is the second of five"),
    ("val_fraction", lambda r: r.val_fraction > 0 and (r.val_list or r.val_root != ["val"]),
     "there is a validation list or root already; leave out one of the two"),
    ("val_resize", lambda r: r.val_resize < (r.val_image_size or r.image_size),
     "{r.val_resize} is smaller than the centre crop"),
    ("train_resize", lambda r: r.train_resize is not None and r.train_resize < r.image_size,
     "{r.train_resize} is below image_size {r.image_size}, every crop would be enlarged"),
    ("cache", lambda r: r.cache and not r.verify_data,
     "identifies images by their bytes, which verify_data: false does not read"),
    ("model", _timm_only, ""),
    ("loss", lambda r: is_part(r.loss) and r.label_smoothing,
     "the custom loss {r.loss!r} does not use label_smoothing; set it to 0, and give loss_args"),
    ("transform", lambda r: r.transform and r.augment_on_device,
     "{r.transform!r} works on single images; switch augment_on_device off"),
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
    ("nesterov", lambda r: r.nesterov and r.momentum == 0, "needs momentum above 0"),
    ("class_weights", lambda r: r.class_weights != ["balanced"]
     and not all(isinstance(w, float) and w > 0 for w in r.class_weights),
     "{r.class_weights}; give balanced alone, or a number above 0 for each class"),
    *((f"{key}_args", partial(_bad_args, f"{key}_args"), "")
      for key in "dataset model optimizer loss kd_loss transform".split()),
    ("milestones", lambda r: not r.milestones
     or sorted({m for m in r.milestones if 1 <= m < r.epochs}) != r.milestones,
     "{r.milestones}; multistep needs increasing epochs from 1, below epochs {r.epochs}"),
    ("lr_step_epochs", lambda r: not 0 < (r.lr_step_epochs or 0) < r.epochs,
     "{r.lr_step_epochs}; step needs a number of epochs, below epochs {r.epochs}"),
    ("lr_min", lambda r: r.lr_min > r.lr, "{r.lr_min} is above lr {r.lr}"),
    ("warmup_epochs", lambda r: r.warmup_epochs >= r.epochs,
     "{r.warmup_epochs} of {r.epochs} epochs would leave no training at lr"),
    ("warmup_epochs", lambda r: r.warmup_epochs > 0 and r.warmup_steps > 0,
     "warmup_steps is set too; leave out one"),
    ("warmup_start_factor", lambda r: r.warmup == "exponential" and r.warmup_start_factor == 0,
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
    ("teacher_model", lambda r: len(r.teacher_model) not in (0, len(r.teacher)),
     "one name for each teacher is needed, '' for those that are no weights files"),
    ("distill_pairs", _bad_pair, ""),
    _count("kd_loss", "distill_pairs"),
    _count("kd_weight", "distill_pairs"),
    ("kd_loss", _module_by_logits_loss,
     "modules are compared by l2, l2_normalized or a custom part; the others are for logits"),
    ("kd_warmup_epochs", lambda r: r.kd_warmup_epochs > r.epochs,
     "{r.kd_warmup_epochs} of {r.epochs} epochs would never reach the whole loss"),
    ("task_weight", lambda r: r.task_weight == 0 and not any(map(on_logits, r.distill_pairs)),
     "0 and no pair of logits: nothing would train the classifier"),
    ("cache_teacher_logits", lambda r: r.cache_teacher_logits
     and not all(map(on_logits, r.distill_pairs)),
     "saves logits only; modules would need the teacher itself"),
    ("grad_checkpointing", lambda r: r.grad_checkpointing and r.compile,
     "compile decides itself what is recomputed; leave out one of the two"),
    ("grad_checkpointing", lambda r: r.grad_checkpointing and r.teacher
     and not all(map(on_logits, r.distill_pairs)),
     "modules compared by distill_pairs would be computed twice; leave out one of the two"),
    ("eval_every", lambda r: r.eval_every > r.epochs,
     "{r.eval_every} has no effect, since epochs is {r.epochs}"),
]  # fmt: skip
