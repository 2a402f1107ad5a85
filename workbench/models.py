"""timm models by name, United Perception's ResNet variants, and weights from wherever they lie.

model = create("resnet50", num_classes=196)
print(load(model, "runs/imagenet-seed0"))     # what was loaded, made anew, ignored
"""

import contextlib
import difflib
import json
import re
import statistics
import time
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import timm
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from workbench import ROOT


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
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # timm draws on the CPU
        try:
            return timm.create_model(name, pretrained=pretrained, **options)
        except TypeError as error:
            raise ModelError(f"{name} does not take these options: {error}") from None
        except Exception as error:
            if not pretrained:
                raise ModelError(f"{name} cannot be built: {error}") from None
            raise ModelError(
                f"the published weights of {name} could not be had "
                f"({type(error).__name__}: {str(error).splitlines()[0][:200]}); fetch the file "
                "elsewhere and name it in weights, or set pretrained: false"
            ) from None


def check_name(name: str) -> None:
    """Raises ModelError, with the nearest names, where timm has no such model."""
    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('.')[0]}*")[:6] or _near(name)
        raise ModelError(f"timm has no model {name!r}; close names: {', '.join(near) or 'none'}")


def _near(name: str) -> list[str]:
    return difflib.get_close_matches(name, timm.list_models(), n=6, cutoff=0.5)


def parameters(model: nn.Module) -> int:
    """The number of trainable values."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def cost(
    model: nn.Module, image_size: int, *, batch: int | None = None, seconds: float = 1.0
) -> dict[str, float | int | str]:
    """What a model costs in evaluation: `parameters` (M), `macs` (G), `activations` (MB).

    Parameters are all, frozen ones too. MACs are the multiply-adds of convolutions, linear layers
    and the products of attention for one picture (3, image_size, image_size); norms, activation
    functions, additions and pooling are not counted. Activations are the outputs of all modules
    for one picture, in MB of 1e6 bytes and the model's precision, each piece of memory once: what
    works in place or only reshapes adds nothing, nor do the picture and what functions give
    inside a module. With `batch` also `images_per_second`: the median over forwards of that many
    pictures of noise, for `seconds` and at least three, after one to warm up; with the `batch`,
    `device` and `threads` of that. Loading pictures is no part of it.
    """
    weight = next(model.parameters())
    picture = torch.zeros(1, 3, image_size, image_size, device=weight.device, dtype=weight.dtype)
    given: dict[int, torch.Tensor] = {}  # kept until all are counted, or memory would be used again

    def note(module: nn.Module, args: tuple, out: Any) -> None:
        for value in out if isinstance(out, tuple | list) else [out]:
            if isinstance(value, torch.Tensor):
                given.setdefault(value.untyped_storage().data_ptr(), value)

    with evaluating(model), torch.no_grad():
        hooks = [part.register_forward_hook(note) for part in model.modules()]
        try:
            # The fused kernels of attention are not counted on every device, plain products are.
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as flops:
                model(picture)
        finally:
            for hook in hooks:
                hook.remove()
        given.pop(picture.untyped_storage().data_ptr(), None)
        row: dict[str, float | int | str] = {
            "parameters": sum(p.numel() for p in model.parameters()) / 1e6,
            "macs": flops.get_total_flops() / 2e9,
            "activations": sum(value.untyped_storage().nbytes() for value in given.values()) / 1e6,
        }
        if batch:
            row |= {"images_per_second": _speed(model, picture, batch, seconds), "batch": batch}
            row |= {"device": str(weight.device), "threads": torch.get_num_threads()}
    return row


def _speed(model: nn.Module, picture: torch.Tensor, batch: int, seconds: float) -> float:
    stream = torch.Generator().manual_seed(0)
    images = torch.randn(batch, *picture.shape[1:], generator=stream).to(picture)
    wait = torch.cuda.synchronize if images.is_cuda else lambda: None
    times: list[float] = []
    model(images)
    while len(times) < 3 or sum(times) < seconds:
        wait()
        start = time.perf_counter()
        model(images)
        wait()
        times.append(time.perf_counter() - start)
    return batch / statistics.median(times)


@dataclass
class Loaded:
    """What became of every tensor when weights were loaded; str() is the sentence to print."""

    source: str
    loaded: list[str] = field(default_factory=list)
    anew: dict[str, str] = field(default_factory=dict)  # the model's, left at initial values -> why
    ignored: list[str] = field(default_factory=list)  # the file's

    def __str__(self) -> str:
        text = f"{self.source}: {len(self.loaded)} tensors loaded"
        if self.anew:
            listed = [f"{name} ({why})" for name, why in self.anew.items()]
            text += f"; {len(listed)} made anew: {_some(listed)}"
        if self.ignored:
            text += f"; {len(self.ignored)} in the file ignored: {_some(self.ignored)}"
        return text

    def table(self) -> pd.DataFrame:
        """A row per tensor: tensor, fate (made anew, ignored or loaded), why."""
        rows = [(name, "made anew", why) for name, why in self.anew.items()]
        rows += [(name, "ignored", "not in the model") for name in self.ignored]
        rows += [(name, "loaded", "") for name in self.loaded]
        return pd.DataFrame(rows, columns=["tensor", "fate", "why"])


def load(
    model: nn.Module,
    source: str | Path,
    *,
    classes: list[str] | None = None,
    force: bool = False,
) -> Loaded:
    """Loads what fits from a run folder or a weights file into the model, and says what.

    Understood: a run folder (EMA weights where the run kept them), safetensors, a plain state
    dict, {"model": ...}, {"state_dict": ...} or {"ema"/"state_dict_ema": ...} (preferred), with
    or without `module.`, in timm's, torchvision's or UP's names. The classifier of a run that was
    trained for other `classes` is made anew. Raises ModelError for a file that cannot be read,
    holds other Python objects or nan, or (without `force`) whose tensors fit less than half of
    what is not the classifier.
    """
    path = ROOT / Path(source).expanduser()
    label, tensors = read_weights(path)
    strange = classes is not None and not same_classes(run_classes(path), classes)
    tensors = _renamed(tensors)
    if any(name.startswith("backbone.") for name in tensors):
        label += " (United Perception's names, tried as they are and as its ResNets'; those of its"
        label += " other networks are missing here: rename them to timm's)"
    return _take(model, label, tensors, strange, force)


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
    strange: bool = False,
    force: bool = False,
) -> Loaded:
    """What fits of the tensors, into the model; with `strange` no classifier does."""
    own = model.state_dict()
    tensors = {k: v for k, v in tensors.items() if not k.endswith("num_batches_tracked")}
    wanted = [name for name in own if not name.endswith("num_batches_tracked")]
    head = heads(model)
    result = Loaded(label)
    take = {}
    for name in wanted:
        if name not in tensors:
            result.anew[name] = "not in the file"
        elif tensors[name].shape != own[name].shape:
            came, want = tuple(tensors[name].shape), tuple(own[name].shape)
            result.anew[name] = f"file has {came}, model {want}"
        elif strange and name.startswith(head):
            result.anew[name] = "the file's classes are others"
        elif not torch.isfinite(tensors[name]).all():
            raise ModelError(f"{label}: {name} holds nan or infinity; the file is of no use")
        else:
            take[name] = tensors[name]
            result.loaded.append(name)
    result.ignored = [name for name in tensors if name not in own]
    body = [name for name in wanted if not name.startswith(head)]
    fits = sum(name in take for name in body)
    if not take or (2 * fits < len(body) and not force):
        way_out = "; force_weights: true takes it all the same" if take else ""
        raise ModelError(
            f"{label} fits {fits} of the model's {len(body)} tensors before the classifier: it is "
            f"of another model. It holds {_some(list(tensors))}; wanted {_some(body)}{way_out}"
        )
    model.load_state_dict(take, strict=False)
    return result


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
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        why = str(error).split("\n")[0][:200]
        raise ModelError(
            f"{path} is truncated, no PyTorch file, or holds Python objects beside tensors, which "
            f"are not run here ({type(error).__name__}: {why}); save its state dict as safetensors"
        ) from None
    for key in ("ema", "state_dict_ema", "model_ema", "model", "state_dict"):
        inner = content.get(key) if isinstance(content, Mapping) else None
        if isinstance(inner, Mapping):
            keys = ("ema_state_dict", "state_dict", "model")  # the first is United Perception's
            deeper = next((inner[k] for k in keys if k in inner), inner)
            if tensors := _tensors(deeper):
                return f"{path} [{key}]", tensors
    if isinstance(content, Mapping) and (tensors := _tensors(content)):
        return str(path), tensors
    held = list(content) if isinstance(content, Mapping) else type(content).__name__
    raise ModelError(f"{path} holds no state dict, but {held!r:.200}")


def _tensors(mapping: Any) -> dict[str, torch.Tensor]:
    if not isinstance(mapping, Mapping):
        return {}
    return {str(k): v for k, v in mapping.items() if isinstance(v, torch.Tensor)}


# United Perception: backbone.layer0.0 is the stem's convolution(s), layer0.1 its norm.
_UP_NAMES = (
    (re.compile(r"^backbone\.layer0\.0\."), "conv1."),
    (re.compile(r"^backbone\.layer0\.1\."), "bn1."),
    (re.compile(r"^backbone\."), ""),
    (re.compile(r"^head\.classifier\."), "fc."),
)


def _renamed(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names without `module.`, UP's turned into timm's (torchvision's ResNets share those)."""
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
    if any(name.startswith("backbone.layer0.") for name in tensors):
        for pattern, name in _UP_NAMES:
            tensors = {pattern.sub(name, key): value for key, value in tensors.items()}
    return dict(tensors)


def heads(model: nn.Module) -> tuple[str, ...]:
    """What the names of the classifier's tensors begin with: ("fc.",), or two for a DeiT's."""
    names = getattr(model, "default_cfg", {}).get("classifier", "fc")
    return tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))


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
def evaluating(model: nn.Module) -> Iterator[None]:
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
