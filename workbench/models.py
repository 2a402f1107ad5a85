"""timm models by name, United Perception's ResNet variants, and their weights.

model = create("resnet50", num_classes=196)
print(load(model, "runs/imagenet-seed0"))     # what was loaded, re-initialised, ignored
"""

import argparse
import contextlib
import difflib
import hashlib
import re
import sys
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
import safetensors.torch
import timm
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.flop_counter import FlopCounterMode

from workbench import ROOT, counted, parts, runs
from workbench.recipe_checks import is_part

hub = huggingface_hub.constants


class ModelError(ValueError):
    """A model or weights that cannot be used."""


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
    model_args: Mapping[str, Any] | None = None,
    folder: Path | None = None,
) -> nn.Module:
    """A timm model with initial weights drawn from `seed`; the global generator is unchanged.

    Or a custom one, called with `model_args`, of the run `folder` if it is in one.

    num_classes None means that of the published weights. deep_stem and avg_down are UP's flags for
    resnet18 to resnet152; both together are timm's resnet*d (BoT, section 4, "ResNet-D", stem width
    32). Raises ModelError.
    """
    if is_part(name):
        factory = parts.load("model", name, folder, **model_args or {})
        return _custom(name, num_classes, image_size, seed, factory)
    check_name(name)
    published = timm.get_pretrained_cfg(name)
    options = {  # None is not passed on
        "num_classes": num_classes,
        "drop_rate": dropout,
        "drop_path_rate": drop_path or None,
        "stem_type": "deep" if deep_stem else None,
        "stem_width": 32 if deep_stem else None,
        "avg_down": avg_down or None,
        "img_size": image_size if published and published.fixed_input_size else None,
    }
    offline = pretrained and (hub.HF_HUB_OFFLINE or not _online())
    with torch.random.fork_rng(devices=[]), mock.patch.object(hub, "HF_HUB_OFFLINE", offline):
        torch.default_generator.manual_seed(seed)  # timm initialises on the CPU
        try:
            model = timm.create_model(name, pretrained=pretrained, **options)
        except Exception as error:
            given = {key: value for key, value in options.items() if value}
            text = f"{name} cannot be created with image_size {image_size} and {given}"
            if pretrained:
                text = f"the weights {published and published.hf_hub_id} of {name} are neither in "
                text += f"{hub.HF_HUB_CACHE} nor online; download them and name the file in weights"
            raise ModelError(f"{text} ({_first_sentence(error)})") from None
    for part in model.modules() if not drop_path else ():
        if isinstance(part, timm.layers.DropPath):
            part.drop_prob = 0.0  # Swin's own default is 0.1, NesT's 0.5
    return model


def _custom(
    name: str, num_classes: int, size: int, seed: int, factory: Callable[[int], nn.Module]
) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        try:
            model = factory(num_classes)
            with eval_mode(model), torch.no_grad():
                shape = tuple(model(torch.zeros(2, 3, size, size)).shape)
        except Exception as error:
            raise parts.PartError(f"model {name!r} failed: {_first_sentence(error)}") from error
    if shape != (2, num_classes):
        raise parts.PartError(
            f"model {name!r} gives {shape} for 2 images of {size} pixels and {num_classes} "
            f"classes; it must give logits (2, {num_classes})"
        )
    return model


def _online() -> bool:
    """Whether Hugging Face responds within 5 s; its own downloads would retry for a minute."""
    with contextlib.suppress(Exception):
        return bool(huggingface_hub.get_session().head(hub.ENDPOINT, timeout=5))
    return False


def _first_sentence(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split()).split(". ")[0].rstrip(".")


def check_name(name: str) -> None:
    """Raises ModelError, with close names, if timm has no such model."""
    if not timm.is_model(name):
        close = timm.list_models(f"*{name.split('.')[0]}*")[:6]
        close = close or difflib.get_close_matches(name, timm.list_models(), n=6, cutoff=0.5)
        raise ModelError(f"timm has no model {name!r}; close names: {', '.join(close) or 'none'}")


def check_size(model: nn.Module, size: int, option: str, takes: int) -> None:
    """Raises ModelError if a forward of `size` pixels fails; suggests `takes` pixels."""
    try:
        with eval_mode(model), torch.no_grad():
            model(torch.zeros(1, 3, size, size, device=next(model.parameters()).device))
    except Exception as error:
        name = getattr(model, "default_cfg", {}).get("architecture", type(model).__name__)
        text = f"{name} does not take {option} {size}"
        raise ModelError(f"{text} ({_first_sentence(error)}); set it to {takes}") from None


def parameters(model: nn.Module) -> int:
    """The number of trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def heads(model: nn.Module) -> tuple[str, ...]:
    """Prefixes of the names of the classifier's tensors: ("fc.",), or two for a DeiT."""
    names = getattr(model, "default_cfg", {}).get("classifier") or "fc"
    return tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))


def checkpoint_gradients(model: nn.Module, on: bool) -> None:
    """Recomputes activations in the backward pass. Raises ModelError for a model that cannot."""
    if not on:
        return
    try:
        model.set_grad_checkpointing(True)
    except (AttributeError, AssertionError, NotImplementedError, TypeError):
        raise ModelError(f"{type(model).__name__} has no gradient checkpointing") from None


def module(model: nn.Module, name: str) -> nn.Module:
    """The submodule of that name. Raises ModelError with close names."""
    names = [known for known, _ in model.named_modules() if known]
    if name not in names:
        close = difflib.get_close_matches(name, names, n=4) or [n for n in names if "." not in n]
        raise ModelError(f"{type(model).__name__} has no module {name!r}; near: {_few(close)}")
    return model.get_submodule(name)


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every module has its previous mode."""
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def profile(model: nn.Module, image_size: int) -> dict[str, float]:
    """The cost of a forward pass for one image: `parameters` (M), `macs` (G), `activations` (MB).

    MACs are the multiply-adds of convolutions, linear layers and attention products for one image
    (3, image_size, image_size). Activations are the outputs of all modules for one image, in 1e6
    bytes and the model's precision, without views and in-place results.
    """
    weight = next(model.parameters())
    image = torch.zeros(1, 3, image_size, image_size, device=weight.device, dtype=weight.dtype)
    outputs: dict[int, Tensor] = {}  # all of them, otherwise memory would be reused

    def save(module: nn.Module, args: tuple, output: Any) -> None:
        for value in output if isinstance(output, tuple | list) else [output]:
            if isinstance(value, Tensor):
                outputs.setdefault(value.untyped_storage().data_ptr(), value)

    with (
        register_module_forward_hook(save),
        eval_mode(model),
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),  # fused attention is not counted on every device
        FlopCounterMode(display=False) as flops,
    ):
        model(image)
    outputs.pop(image.untyped_storage().data_ptr(), None)
    return {
        "parameters": sum(p.numel() for p in model.parameters()) / 1e6,
        "macs": flops.get_total_flops() / 2e9,
        "activations": sum(v.untyped_storage().nbytes() for v in outputs.values()) / 1e6,
    }


# ---- loading weights


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """12 hex digits over the names and values of tensors."""
    sha = hashlib.sha256()
    for name, value in tensors.items():
        sha.update(name.encode())
        sha.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()[:12]


@dataclass
class Loaded:
    """The status of every tensor after loading weights; str() is a one-line summary."""

    source: str
    loaded: dict[str, str] = field(default_factory=dict)  # name -> why it was resampled, or ""
    reinitialised: dict[str, str] = field(default_factory=dict)  # name -> why
    ignored: list[str] = field(default_factory=list)  # names in the file
    note: str = ""
    digest: str = ""  # of the loaded tensors

    def __str__(self) -> str:
        text = f"{self.source}: {counted(len(self.loaded), 'tensor')} loaded"
        for status, rows in self.table().groupby("status", sort=False):
            if status != "loaded":
                names = [f"{row.tensor} ({row.why})" for row in rows.itertuples()]
                text += f"; {len(names)} {status}: {_few(names)}"
        return f"{text}; {self.note}" if self.note else text

    def table(self) -> pd.DataFrame:
        """A row per tensor: tensor, status (re-initialised, ignored, resampled or loaded), why."""
        rows = [(name, "re-initialised", why) for name, why in self.reinitialised.items()]
        rows += [(name, "ignored", "not in the model") for name in self.ignored]
        rows += [(n, "resampled" if why else "loaded", why) for n, why in self.loaded.items()]
        return pd.DataFrame(rows, columns=["tensor", "status", "why"])


def load(
    model: nn.Module, source: str | Path, *, classes: list[str] | None = None, force: bool = False
) -> Loaded:
    """Loads the weights that fit from a run folder or a weights file.

    Reads run folders (EMA weights as by runs.Run.choose_weights), safetensors, and state dicts of
    torch, plain or below "ema", "model", "state_dict" and the like (EMA preferred), with any prefix
    (`module.`), in timm's, torchvision's or UP's names. Position embeddings of another image size
    are resampled. The classifier of a run trained on other `classes` is re-initialised. Raises
    ModelError for a file that cannot be read, contains other Python objects or nan, or (without
    `force`) fits less than half of the body's tensors.
    """
    path = ROOT / Path(source).expanduser()
    label, tensors = read_weights(path)
    other_classes = classes is not None and not same_classes(run_classes(path), classes)
    return _load_fitting(model, label, _rename(label, tensors, model), other_classes, force)


def load_published(model: nn.Module, name: str, **options: Any) -> Loaded:
    """Loads timm's published weights of `name` that fit; `options` are those of `create`."""
    published = create(name, None, pretrained=True, **options)
    return _load_fitting(model, f"timm's published weights of {name}", published.state_dict())


def _load_fitting(
    model: nn.Module,
    label: str,
    tensors: Mapping[str, Tensor],
    other_classes: bool = False,
    force: bool = False,
) -> Loaded:
    """Loads the tensors that fit; with `other_classes` the classifier is re-initialised."""
    own = {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    tensors = {k: v for k, v in tensors.items() if not k.endswith("num_batches_tracked")}
    head = heads(model)
    result = Loaded(label, ignored=[name for name in tensors if name not in own])
    fitting: dict[str, Tensor] = {}
    resampled: dict[str, Tensor] | None = None
    for name, value in own.items():
        why, given = "", tensors.get(name)
        if given is None:
            why = "not in the file"
        elif given.shape != value.shape:
            resampled = _resample(model, tensors) if resampled is None else resampled
            why = f"file has {tuple(given.shape)}, model {tuple(value.shape)}"
            given = None if name.startswith(head) else resampled.get(name)
        elif other_classes and name.startswith(head):
            why, given = "the file's classes are others", None
        elif not torch.isfinite(given).all():
            raise ModelError(f"{label}: {name} holds nan or infinity; use another file")
        if given is None or given.shape != value.shape:
            result.reinitialised[name] = why
        else:
            fitting[name], result.loaded[name] = given, why
    body = [name for name in own if not name.startswith(head)]
    fits = sum(name in fitting for name in body)
    if not fitting or (2 * fits < len(body) and not force):
        hint = "; allow_partial_weights: true loads them nevertheless" if fitting else ""
        raise ModelError(
            f"{label} fits {fits} of the model's {len(body)} tensors before the classifier, so it "
            f"is of another model: the file has {_few([*tensors])}, the model {_few(body)}{hint}"
        )
    model.load_state_dict(fitting, strict=False)
    return result


def _resample(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors after timm's filter, which resamples position embeddings and bias tables."""
    adapt = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    with contextlib.suppress(Exception), warnings.catch_warnings(action="ignore"):
        return adapt(dict(tensors), model)  # some models have none, some reject other models
    return {}


# Harmless objects beside the tensors of a checkpoint: arguments, numpy scalars.
_SCALAR = np.float64().__reduce__()[0]
_SAFE = [argparse.Namespace, np.dtype, *{type(np.dtype(c)) for c in "?bBhHiIlLqQefd"}]
_SAFE += [(_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
_EMA_KEYS = ("ema", "state_dict_ema", "model_ema", "ema_model", "ema_state_dict")  # last: UP's
_MODEL_KEYS = ("model", "state_dict", "model_state_dict", "module")


def read_weights(path: Path) -> tuple[str, dict[str, Tensor]]:
    """(description, tensors by name) of a run folder or a file. Never executes code from it."""
    if path.is_dir():
        files = [file for name in ("last.pt", "best.safetensors") if (file := path / name).exists()]
        if not files:
            raise ModelError(f"{path} is no run folder: neither last.pt nor best.safetensors")
        path = files[0]
    content = _read_file(path)
    keys, measured = _EMA_KEYS + _MODEL_KEYS, ""
    if path.name == "last.pt" and isinstance(content, Mapping) and content.get("ema"):
        kind, measured = runs.Run(path.parent).choose_weights()
        keys = _MODEL_KEYS if kind == "raw" else keys
    key, tensors = _find_state_dict(content, keys)
    if not tensors:
        held = [*content] if isinstance(content, Mapping) else type(content).__name__
        raise ModelError(f"{path} has no state dict below one of {', '.join(keys)}, but {held}")
    details = ", ".join(text for text in (key, measured) if text)
    return f"{path} [{details}]" if key else str(path), tensors


def _read_file(path: Path) -> Any:
    if not path.exists():
        raise ModelError(f"weights {str(path)!r} are not there")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with torch.serialization.safe_globals(_SAFE):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        objects = ", ".join(re.findall(r"GLOBAL (\S+)", str(error)))
        why = f"holds Python objects, {objects}" if objects else "is truncated or no weights file"
        raise ModelError(f"{path} {why}; only tensors are read, objects are not run here") from None


def _find_state_dict(content: Any, keys: tuple[str, ...]) -> tuple[str, dict[str, Tensor]]:
    """(key, tensors) of the first of `keys` with tensors, at any depth; else content's own."""
    if not isinstance(content, Mapping):
        return "", {}
    for key in keys:
        _, tensors = _find_state_dict(content.get(key), keys)
        if tensors:
            return key, tensors
    return "", {str(k): value for k, value in content.items() if isinstance(value, Tensor)}


_UP_NAMES = {  # United Perception: layer0.0 is the stem's convolution(s), layer0.1 its norm
    r"\bbackbone\.layer0\.0\.": "conv1.",
    r"\bbackbone\.layer0\.1\.": "bn1.",
    r"\bbackbone\.": "",
    r"\bhead\.classifier\.": "fc.",
}


def _rename(label: str, tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Tensors under the model's names: UP's ResNet names translated, common prefix removed.

    Raises ModelError if the file holds the model twice, such as a student and a teacher.
    """
    if any("backbone.layer0." in name for name in tensors):
        for pattern, name in _UP_NAMES.items():
            tensors = {re.sub(pattern, name, key): value for key, value in tensors.items()}
    own = model.state_dict()
    starts = [(name, m.end()) for name in tensors for m in re.finditer(r"^|\.", name)]
    prefixes = Counter(name[:end] for name, end in starts if name[end:] in own).most_common(2)
    if sum(2 * count > len(own) for _, count in prefixes) == 2:
        both = " and ".join(repr(prefix) for prefix, _ in prefixes)
        raise ModelError(f"{label} holds the model twice, below {both}; save one of them alone")
    prefix = prefixes[0][0] if prefixes else ""
    return {name.removeprefix(prefix): value for name, value in tensors.items()}


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more


def run_pixels(path: Path) -> dict[str, Any]:
    """image_size, mean and std of the recipe of a run folder, or of a file in one; else empty."""
    with contextlib.suppress(runs.RunError):
        recipe = runs.Run(path if path.is_dir() else path.parent).recipe()
        return {k: recipe[k] for k in ("image_size", "mean", "std") if k in recipe}
    return {}


def run_classes(path: Path) -> list[str] | None:
    """Class names, in NFC, of a run folder or of a file in one; None if unknown."""
    with contextlib.suppress(runs.RunError, KeyError, TypeError):
        names = runs.Run(path if path.is_dir() else path.parent).environment()["classes"]
        return [unicodedata.normalize("NFC", name) for name in names]
    return None


def same_classes(theirs: list[str] | None, ours: list[str]) -> bool:
    """Whether two lists may name the same classes in the same order.

    Unknown classes and the numbers "0", "1", ... may be any classes.
    """
    if theirs is None or theirs == ours:
        return True
    numbers = [str(i) for i in range(len(ours))]
    same_size = len(theirs) == len(ours)
    return same_size and numbers in (theirs, ours) and sorted(theirs) != sorted(ours)
