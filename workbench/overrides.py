"""What an explicit override changes beside itself: options that depend on the former value."""

from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

from workbench.recipe_checks import CONFLICTS, missing_needs

Options = dict[str, Any]
# An override of the first sets the others back to their defaults where they contradict it.
GIVE_WAY = [
    ("batch_size", "micro_batch_size"), ("distill_pairs", "kd_loss"), ("momentum", "nesterov"),
    ("distill_pairs", "kd_weight"), ("pretrained", "weights"), ("pretrained", "resume_from"),
    ("resume_from", "weights"), ("resume_from", "pretrained"), ("weights", "pretrained"),
    ("weights", "resume_from"), ("teacher", "teacher_weight"), ("teacher", "teacher_model"),
    ("warmup_epochs", "warmup_steps"), ("warmup_steps", "warmup_epochs"),
    ("val_fraction", "val_list val_root"), ("val_list", "val_fraction"),
]  # fmt: skip


def resolve(
    base: Options, overrides: Options, defaults: Options, needs: Mapping[str, Any]
) -> tuple[Options, list[str]]:
    """All options with the overrides in place, and a note for each override that changed others.

    Options of `base` go back to their defaults where an override takes away their effect, or
    contradicts them. What no longer fits fewer epochs, milestones, and val_resize with image_size
    are scaled. Other contradictions stay.
    """
    before = defaults | base
    values, cause = before | overrides, {}

    def change(option: str, value: Any, override: str) -> None:
        if option not in overrides and values[option] != value:
            values[option], cause[option] = value, override

    fewer, longer = (sign * (values["epochs"] - before["epochs"]) > 0 for sign in (-1, 1))
    if fewer or (longer and "resume_from" not in overrides):
        for option, value in _scaled(before, values, overrides):
            change(option, value, "epochs")
    if not values["val_image_size"] and before["val_resize"] >= before["image_size"]:
        share = before["val_resize"] / before["image_size"]
        change("val_resize", round(values["image_size"] * share), "image_size")
    for override, others in GIVE_WAY:
        reset = {key: defaults[key] for key in others.split()}
        if override in overrides and _contradictions(values | reset) < _contradictions(values):
            for option, value in reset.items():
                change(option, value, override)
    count = -1
    while count < len(cause):  # an option that is reset may take others with it
        count = len(cause)
        for option, needed in needs.items():
            missing = missing_needs(needed, SimpleNamespace(**values))
            if missing and not missing_needs(needed, SimpleNamespace(**before)):
                first = next(key for key in missing if values[key] != before[key])
                change(option, defaults[option], cause.get(first, first))
    changes: dict[str, list[str]] = {override: [] for override in cause.values()}
    for key, override in cause.items():
        changes[override].append(f"{key} {before[key]!r} -> {values[key]!r}")
    return values, [f"{k}={values[k]!r} changes {', '.join(v)}" for k, v in changes.items()]


def _contradictions(values: Options) -> set[int]:
    recipe = SimpleNamespace(**values)
    return {i for i, (_, rule, _) in enumerate(CONFLICTS) if rule(recipe)}


def _scaled(before: Options, values: Options, overrides: Options) -> Iterator[tuple[str, Any]]:
    """Milestones, and durations that do not fit fewer epochs, as shares of the training."""
    old, new = before["epochs"], values["epochs"]
    scaled = lambda key: float(f"{values[key] * new / old:.4g}")
    if values["warmup_epochs"] >= new:
        yield "warmup_epochs", scaled("warmup_epochs")
    if values["warmup_steps"] and new < old:  # the steps of an epoch are not known here
        yield "warmup_steps", max(1, int(scaled("warmup_steps")))
    if values["kd_warmup_epochs"] > new:
        yield "kd_warmup_epochs", scaled("kd_warmup_epochs")
    if new < (values["cosine_epochs"] or 0) <= old:
        yield "cosine_epochs", scaled("cosine_epochs")
    if values["head_only_epochs"] >= new:
        yield "head_only_epochs", int(scaled("head_only_epochs"))
    yield "eval_every", min(values["eval_every"], new)
    kind, every, milestones = (values[k] for k in ("schedule", "lr_step_epochs", "milestones"))
    if (
        kind == "multistep"
        and milestones == before["milestones"]
        and (new > old or max(milestones, default=0) >= new)
    ):
        fitting = sorted({round(m * new / old) for m in milestones} & set(range(1, new)))
        yield "milestones", fitting
        yield "schedule", kind if fitting else "constant"
    elif kind == "step" and (every or 0) >= new and "lr_step_epochs" not in overrides:
        yield "lr_step_epochs", min(max(1, round(every * new / old)), max(1, new - 1))
        yield "schedule", kind if new > 1 else "constant"
