"""Differences between recipes, given as dictionaries of options."""

from collections.abc import Mapping, Sequence
from typing import Any

from workbench.recipe import defaults, inactive_options, runtime_only


def identity(recipe: Mapping[str, Any], environment: Mapping[str, Any]) -> str:
    """Equal for runs that differ only in the seed and in `runtime_only` options.

    The images, the weights of teachers and those a run starts from are compared too: data_dir may
    be another, or a file be replaced.
    """
    ignored = {*runtime_only, "seed"}
    options = sorted((k, v) for k, v in (defaults() | dict(recipe)).items() if k not in ignored)
    teachers = [teacher.get("digest") for teacher in environment.get("teachers", ())]
    facts = [environment.get(key, "") for key in ("initial_weights", "data")]
    return repr((options, teachers, *facts))


def recipe_difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, str]:
    """What differs between two recipes, by option: "lr 0.2 (0.1)", the former in brackets."""
    values = differing_options([before, after])
    return {option: f"{option} {new} ({old})" for option, (old, new) in values.items()}


def differing_options(recipes: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Options that differ between recipes, as text; "unused" where an option has no effect.

    An option that has its default wherever it is used is left out: that it is unused elsewhere
    follows from another option, which is listed.
    """
    unused = [inactive_options(recipe) for recipe in recipes]
    default_values = defaults()
    result = {}
    for option in recipes[-1]:
        if option in runtime_only or option == "seed":
            continue
        used = [r.get(option) for r, off in zip(recipes, unused, strict=True) if option not in off]
        default = len(used) < len(recipes) and used == [default_values.get(option, ...)] * len(used)
        values = [_text(r.get(option)) for r in recipes]
        texts = ["unused" if option in off else v for v, off in zip(values, unused, strict=True)]
        if len(set(texts)) > 1 and not default:
            result[option] = texts
    return result


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
