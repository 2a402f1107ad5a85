"""timm models by name, United Perception's ResNet variants, and weights from wherever they lie.

model = create("resnet50", num_classes=196)
print(load(model, "runs/imagenet-seed0"))     # what was loaded, re-initialised, ignored
"""

import argparse
import contextlib
import difflib
import json
import re
import statistics
import sys
import time
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import huggingface_hub
import numpy as np
import pandas as pd
import timm
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from workbench import ROOT, runs


class ModelError(ValueError):
    """A model or its weights cannot be had; the text says what is allowed or what was found."""


def create(
    name: str,
    num_classes: int | None,
    *,
    image_size: int = 224,
    deep_stem: bool = False,
    avg_down: bool = False,
    drop_path: float = 0.0,
    dropout: float = 0.0,
    pretrained: bool = False,
    seed: int = 0,
) -> nn.Module:
    """A timm model with initial weights drawn from `seed` (the global stream is left alone).

    num_classes None is that of the published weights. deep_stem and avg_down are UP's flags for
    resnet18 to resnet152; both together give timm's resnet*d (BoT, section 4, "ResNet-D", with a
    stem 32 wide). Raises ModelError.
    """
    check_name(name)
    options: dict[str, Any] = {"drop_rate": dropout}
    if num_classes is not None:
        options["num_classes"] = num_classes
    if deep_stem:
        options |= {"stem_type": "deep", "stem_width": 32}
    if avg_down:
        options["avg_down"] = True
    if drop_path:
        options["drop_path_rate"] = drop_path
    if timm.get_pretrained_cfg(name) and timm.get_pretrained_cfg(name).fixed_input_size:
        options["img_size"] = image_size
    hub = huggingface_hub.constants
    offline = pretrained and (hub.HF_HUB_OFFLINE or not _online())
    with torch.random.fork_rng(devices=[]), mock.patch.object(hub, "HF_HUB_OFFLINE", offline):
        torch.default_generator.manual_seed(seed)  # timm draws on the CPU
        try:
            return timm.create_model(name, pretrained=pretrained, **options)
        except TypeError as error:
            raise ModelError(f"{name} does not take these options: {error}") from None
        except Exception as error:
            why, published = _line(error), timm.get_pretrained_cfg(name)
            if not pretrained:
                told = f"{name} at image_size {image_size} cannot be built: {why}"
                raise ModelError(told) from None
            raise ModelError(
                f"the published weights of {name}, {published and published.hf_hub_id}, are not in "
                f"{hub.HF_HUB_CACHE} and could not be fetched ({why}); fetch the file elsewhere "
                "and name it in weights, or set pretrained: false"
            ) from None


def _online() -> bool:
    """Whether Hugging Face answers within 5 s: its own downloads would try for a minute."""
    with contextlib.suppress(Exception):
        address = huggingface_hub.constants.ENDPOINT
        return bool(huggingface_hub.get_session().head(address, timeout=5))
    return False


def _line(error: Exception) -> str:
    """Its type and first sentence."""
    return " ".join(f"{type(error).__name__}: {error}".split()).split(". ")[0].rstrip(".")


def check_name(name: str) -> None:
    """Raises ModelError, with the nearest names, where timm has no such model."""
    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('.')[0]}*")[:6]
        near = near or difflib.get_close_matches(name, timm.list_models(), n=6, cutoff=0.5)
        raise ModelError(f"timm has no model {name!r}; close names: {', '.join(near) or 'none'}")


def check_size(model: nn.Module, size: int, option: str, takes: int) -> None:
    """A forward of a blank image of `size` pixels. Raises ModelError, naming a size it takes."""
    try:
        with eval_mode(model), torch.no_grad():
            model(torch.zeros(1, 3, size, size, device=next(model.parameters()).device))
    except Exception as error:
        raise ModelError(
            f"{model.default_cfg['architecture']} does not take {option} {size} ({_line(error)}); "
            f"set it to {takes}, or to another size that the model takes"
        ) from None


def parameters(model: nn.Module) -> int:
    """The number of trainable values."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def profile(
    model: nn.Module, image_size: int, *, batch: int | None = None, seconds: float = 1.0
) -> dict[str, float | int | str]:
    """What a model costs in evaluation: `parameters` (M), `macs` (G), `activations` (MB).

    Parameters are all, frozen ones too. MACs are the multiply-adds of convolutions, linear layers
    and the products of attention for one image (3, image_size, image_size); norms, activation
    functions, additions and pooling are not counted. Activations are the outputs of all modules
    for one image, in MB of 1e6 bytes and the model's precision, each piece of memory once: what
    works in place or only reshapes adds nothing, nor do the image and what functions give
    inside a module. With `batch` also `images_per_second`: the median over forwards of that many
    images of noise, for `seconds` and at least three, after one to warm up; with the `batch`,
    `device` and `threads` of that. Loading images is no part of it.
    """
    weight = next(model.parameters())
    image = torch.zeros(1, 3, image_size, image_size, device=weight.device, dtype=weight.dtype)
    given: dict[int, torch.Tensor] = {}  # kept until all are counted, or memory would be used again

    def note(module: nn.Module, args: tuple, out: Any) -> None:
        for value in out if isinstance(out, tuple | list) else [out]:
            if isinstance(value, torch.Tensor):
                given.setdefault(value.untyped_storage().data_ptr(), value)

    with eval_mode(model), torch.no_grad():
        hooks = [part.register_forward_hook(note) for part in model.modules()]
        try:
            # The fused kernels of attention are not counted on every device, plain products are.
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as flops:
                model(image)
        finally:
            for hook in hooks:
                hook.remove()
        given.pop(image.untyped_storage().data_ptr(), None)
        row: dict[str, float | int | str] = {
            "parameters": sum(p.numel() for p in model.parameters()) / 1e6,
            "macs": flops.get_total_flops() / 2e9,
            "activations": sum(value.untyped_storage().nbytes() for value in given.values()) / 1e6,
        }
        if batch:
            row |= {"images_per_second": _speed(model, image, batch, seconds), "batch": batch}
            row |= {"device": str(weight.device), "threads": torch.get_num_threads()}
    return row


def _speed(model: nn.Module, image: torch.Tensor, batch: int, seconds: float) -> float:
    stream = torch.Generator().manual_seed(0)
    images = torch.randn(batch, *image.shape[1:], generator=stream).to(image)
    return batch / median_seconds(lambda: model(images), images.device, seconds)


def median_seconds(work: Callable[[], Any], device: torch.device, least: float = 0.0) -> float:
    """The median of calls for `least` seconds, at least three, after one to warm up."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda device: None
    times: list[float] = []
    work()
    while len(times) < 3 or sum(times) < least:
        wait(device)
        start = time.perf_counter()
        work()
        wait(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@dataclass
class Loaded:
    """What became of every tensor when weights were loaded; str() is the sentence to print."""

    source: str
    loaded: dict[str, str] = field(default_factory=dict)  # the model's -> how, where resampled
    reinitialised: dict[str, str] = field(
        default_factory=dict
    )  # the model's, left at initial values -> why
    ignored: list[str] = field(default_factory=list)  # the file's
    note: str = ""

    def __str__(self) -> str:
        text = f"{self.source}: {len(self.loaded)} tensors loaded"
        if self.reinitialised:
            listed = [f"{name} ({why})" for name, why in self.reinitialised.items()]
            text += f"; {len(listed)} re-initialised: {_some(listed)}"
        if self.ignored:
            text += f"; {len(self.ignored)} in the file ignored: {_some(self.ignored)}"
        if listed := [f"{name} ({why})" for name, why in self.loaded.items() if why]:
            text += f"; {len(listed)} of them resampled: {_some(listed)}"
        return text + (f"; {self.note}" if self.note else "")

    def table(self) -> pd.DataFrame:
        """A row per tensor: tensor, status (re-initialised, ignored, resampled or loaded), why."""
        rows = [(name, "re-initialised", why) for name, why in self.reinitialised.items()]
        rows += [(name, "ignored", "not in the model") for name in self.ignored]
        rows += [(n, "resampled" if why else "loaded", why) for n, why in self.loaded.items()]
        return pd.DataFrame(rows, columns=["tensor", "status", "why"])


def load(
    model: nn.Module,
    source: str | Path,
    *,
    classes: list[str] | None = None,
    force: bool = False,
) -> Loaded:
    """Loads what fits from a run folder or a weights file into the model, and says what.

    Understood: a run folder (EMA weights as runs.Run.choose_weights says), safetensors, a plain
    state dict, {"model": ...}, {"state_dict": ...} or {"ema"/"state_dict_ema": ...} (preferred),
    with or without a prefix (`module._orig_mod.`), in timm's, torchvision's or UP's names.
    Position embeddings of another image size are resampled. The classifier of a run that was
    trained for other `classes` is re-initialised. Raises ModelError for a file that cannot be read,
    holds other Python objects or nan, or (without `force`) whose tensors fit less than half of
    what is not the classifier.
    """
    path = ROOT / Path(source).expanduser()
    label, tensors = read_weights(path)
    other_classes = classes is not None and not same_classes(run_classes(path), classes)
    tensors = _renamed(label, tensors, model.state_dict())
    if any(name.startswith("backbone.") for name in tensors):
        label += " (United Perception's names, tried as they are and as its ResNets'; those of its"
        label += " other networks are missing here: rename them to timm's)"
    return _take(model, label, tensors, other_classes, force)


def load_published(model: nn.Module, name: str, **options: Any) -> Loaded:
    """Loads timm's published weights of `name` into the model, and says what fits.

    `options` are create's, image_size among them: timm resamples position embeddings to it. Raises
    ModelError when they cannot be had.
    """
    published = create(name, None, pretrained=True, **options)
    return _take(model, f"timm's published weights of {name}", published.state_dict())


def _take(
    model: nn.Module,
    label: str,
    tensors: Mapping[str, torch.Tensor],
    other_classes: bool = False,
    force: bool = False,
) -> Loaded:
    """What fits of the tensors, into the model; with `other_classes` no classifier does."""
    own = model.state_dict()
    tensors = {k: v for k, v in tensors.items() if not k.endswith("num_batches_tracked")}
    wanted = [name for name in own if not name.endswith("num_batches_tracked")]
    head = heads(model)
    result = Loaded(label)
    take, fitted = {}, None
    for name in wanted:
        if name not in tensors:
            result.reinitialised[name] = "not in the file"
        elif tensors[name].shape != own[name].shape:
            fitted = _resampled(model, tensors) if fitted is None else fitted
            came, want = tuple(tensors[name].shape), tuple(own[name].shape)
            fits = not name.startswith(head) and name in fitted and fitted[name].shape == want
            (result.loaded if fits else result.reinitialised)[name] = (
                f"file has {came}, model {want}"
            )
            take |= {name: fitted[name]} if fits else {}
        elif other_classes and name.startswith(head):
            result.reinitialised[name] = "the file's classes are others"
        elif not torch.isfinite(tensors[name]).all():
            raise ModelError(f"{label}: {name} holds nan or infinity; the file is of no use")
        else:
            take[name] = tensors[name]
            result.loaded[name] = ""
    result.ignored = [name for name in tensors if name not in own]
    body = [name for name in wanted if not name.startswith(head)]
    fits = sum(name in take for name in body)
    if not take or (2 * fits < len(body) and not force):
        way_out = "; allow_partial_weights: true takes it all the same" if take else ""
        raise ModelError(
            f"{label} fits {fits} of the model's {len(body)} tensors before the classifier: it is "
            f"of another model. It holds {_some(list(tensors))}; wanted {_some(body)}{way_out}"
        )
    model.load_state_dict(take, strict=False)
    return result


def _resampled(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors as timm's own filter fits them to the model: position embeddings and tables."""
    adapt = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    with contextlib.suppress(Exception), warnings.catch_warnings(action="ignore"):
        return adapt(dict(tensors), model)  # many models have none, and it wants its own model's
    return {}


# What trainers save beside tensors and what is data alone: arguments, numbers of numpy.
_NUMBER = np.float64().__reduce__()[0]
_SAFE = [argparse.Namespace, np.dtype, *{type(np.dtype(c)) for c in "?bBhHiIlLqQefd"}]
_SAFE += [(_NUMBER, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]


def read_weights(path: Path) -> tuple[str, dict[str, torch.Tensor]]:
    """(what was read, its tensors by name) of a run folder or a file. Never runs code from it."""
    if path.is_dir():
        for name in ("last.pt", "best.safetensors"):
            if (path / name).exists():
                return read_weights(path / name)
        raise ModelError(
            f"{path} is no run folder with weights: neither last.pt nor best.safetensors"
        )
    if not path.exists():
        raise ModelError(f"weights {str(path)!r} are not there")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        try:
            return str(path), load_file(path)
        except Exception as error:
            raise ModelError(f"{path} is no readable safetensors file: {error}") from None
    try:
        with torch.serialization.safe_globals(_SAFE):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        objects = ", ".join(re.findall(r"GLOBAL (\S+)", str(error)))
        why = f"holds Python objects: {objects}" if objects else "is truncated or no PyTorch file"
        raise ModelError(
            f"{path} {why}; objects beside tensors are not run here, save its state dict alone"
        ) from None
    keys, measured = ("ema", "state_dict_ema", "model_ema", "model", "state_dict"), ""
    if path.name == "last.pt" and isinstance(content, Mapping) and content.get("ema"):
        kind, measured = runs.Run(path.parent).choose_weights()
        keys, measured = keys[3:] if kind == "raw" else keys, measured and f", {measured}"
    held = content if isinstance(content, Mapping) else {}
    for key in keys:
        inner = held.get(key)
        if isinstance(inner, Mapping):
            below = ("ema_state_dict", "state_dict", "model")  # the first is United Perception's
            deeper = next((inner[k] for k in below if k in inner), inner)
            if tensors := _tensors(deeper):
                return f"{path} [{key}{measured}]", tensors
    if tensors := _tensors(held):
        return str(path), tensors
    others = {key: tensors for key, inner in held.items() if (tensors := _tensors(inner))}
    if len(others) == 1:  # under a name of its own, such as model_state_dict
        [(key, tensors)] = others.items()
        return f"{path} [{key}]", tensors
    came = f"several state dicts, {list(others)}" if others else (
        f"no state dict, but {list(held) or type(content).__name__!r:.200}")  # fmt: skip
    raise ModelError(f"{path} holds {came}; save that of the model alone")


def _tensors(mapping: Any) -> dict[str, torch.Tensor]:
    if not isinstance(mapping, Mapping):
        return {}
    return {str(k): v for k, v in mapping.items() if isinstance(v, torch.Tensor)}


# United Perception: backbone.layer0.0 is the stem's convolution(s), layer0.1 its norm.
_UP_NAMES = (
    (re.compile(r"\bbackbone\.layer0\.0\."), "conv1."),
    (re.compile(r"\bbackbone\.layer0\.1\."), "bn1."),
    (re.compile(r"\bbackbone\."), ""),
    (re.compile(r"\bhead\.classifier\."), "fc."),
)


def _renamed(
    label: str, tensors: Mapping[str, torch.Tensor], own: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """Tensors by the model's own names: without the prefix below which most are, UP's as timm's.

    torchvision's ResNets share those. Two such prefixes (student and teacher) are a ModelError.
    """
    if any("backbone.layer0." in name for name in tensors):
        for pattern, name in _UP_NAMES:
            tensors = {pattern.sub(name, key): value for key, value in tensors.items()}
    starts = [(name, m.end()) for name in tensors for m in re.finditer(r"^|\.", name)]
    found = Counter(name[:end] for name, end in starts if name[end:] in own).most_common(2)
    if sum(2 * count > len(own) for _, count in found) == 2:
        both = " and ".join(repr(prefix) for prefix, _ in found)
        raise ModelError(f"{label} holds the model twice, below {both}; save the one you want")
    prefix = found[0][0] if found else ""
    return {name.removeprefix(prefix): value for name, value in tensors.items()}


def heads(model: nn.Module) -> tuple[str, ...]:
    """What the names of the classifier's tensors begin with: ("fc.",), or two for a DeiT's."""
    names = getattr(model, "default_cfg", {}).get("classifier", "fc")
    return tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))


def run_pixels(path: Path) -> dict[str, Any]:
    """image_size, mean and std of the recipe of a run folder, or of a file in one; else empty."""
    with contextlib.suppress(runs.RunError):
        recipe = runs.Run(path if path.is_dir() else path.parent).recipe()
        return {k: recipe[k] for k in ("image_size", "mean", "std") if k in recipe}
    return {}


def run_classes(path: Path) -> list[str] | None:
    """The class names, in NFC, that a run folder, or a file in one, was trained for; else None."""
    folder = path if path.is_dir() else path.parent
    try:
        names = json.loads((folder / "environment.json").read_text())["classes"]
        return [unicodedata.normalize("NFC", name) for name in names]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def same_classes(theirs: list[str] | None, ours: list[str]) -> bool:
    """Whether two lists may name the same classes: unknown and bare numbers name anything.

    The same names in another order are other classes.
    """
    if theirs is None or theirs == ours:
        return True
    bare = [str(i) for i in range(len(ours))]
    same_size = len(theirs) == len(ours)
    return same_size and bare in (theirs, ours) and sorted(theirs) != sorted(ours)


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every part is in the mode it was in."""
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def module(model: nn.Module, name: str) -> nn.Module:
    """The submodule of that name. Raises ModelError with the nearest names."""
    names = [found for found, _ in model.named_modules() if found]
    if name not in names:
        top = [found for found in names if "." not in found]
        near = difflib.get_close_matches(name, names, n=4) or top
        kind = type(model).__name__
        raise ModelError(f"{kind} has no module {name!r}; near: {_some(near, 12)}")
    return model.get_submodule(name)


def _some(names: list[str], count: int = 4) -> str:
    return ", ".join(names[:count]) + (
        f" and {len(names) - count} more" if len(names) > count else ""
    )
