"""Teachers and layers that cannot be used are refused before the first step."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import CLASSES, save_noise
from distillation_helpers import CPU, DIGITS, student_recipe
from helpers import train
from safetensors.torch import load_file, save_file
from torch import nn

from workbench import models, runs, training
from workbench.distillation import Distillation, DistillationError
from workbench.models import ModelError
from workbench.recipe import Recipe
from workbench.runs import RunError

pytestmark = pytest.mark.usefixtures("one_thread", "logit_cache")
RUN, FILE = "runs/teacher-seed0", "t.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Images of three classes, and a run that was trained on them."""
    folder = tmp_path_factory.mktemp("abc")
    for side, count in (("train", 4), ("val", 2)):
        for label, name in enumerate(CLASSES):
            (folder / side / name).mkdir(parents=True)
            for i in range(count):
                save_noise(folder / side / name / f"{i}.png", seed=[label, i, side == "val"])
    train(Recipe(name="teacher", **options_of(folder)))
    return folder


def options_of(folder: Path) -> dict:
    options = {"dataset": "files", "data_dir": str(folder), "runs_dir": str(folder / "runs")}
    options |= {"image_size": 32, "val_resize": 32, "epochs": 1, "batch_size": 6, "lr": 0.01}
    return options | {"workers": 0}


def run_of_classes(folder: Path, classes: list[str]) -> dict:
    path = folder / RUN / "environment.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "classes": classes}))
    return {"teacher": RUN}


def run_of(folder: Path, model: str, **options) -> dict:
    """The run as if it had trained another model."""
    path, run = folder / RUN, runs.Run(folder / RUN)
    text = (path / "recipe.yaml").read_text().replace('"test_resnet"', f'"{model}"')
    (path / "recipe.yaml").write_text(text)
    weights = models.create(model, 3, image_size=32).state_dict()
    torch.save({**run.load_checkpoint(), "model": weights}, path / "last.pt")
    return {"teacher": RUN, **options}


def file_of(folder: Path, model: str, name: str, classes: int = 3, **options) -> dict:
    """A weights file of one model with the name of another."""
    save_file(models.create(model, classes, **options).state_dict(), folder / FILE)
    return {"teacher": FILE, "teacher_model": name}


def file_without(folder: Path, name: str) -> dict:
    tensors = load_file(folder / RUN / "best.safetensors")
    del tensors[name]
    save_file(tensors, folder / FILE)
    return {"teacher": FILE, "teacher_model": "test_resnet"}


def layers(pair: str, **options) -> dict:
    return {"teacher": RUN, "distill_pairs": [pair], "kd_loss": ["l2"], **options}


KD = DistillationError
REFUSED = {  # name -> options, error, its words
    "other classes": (
        lambda f: run_of_classes(f, ["b", "a", "c"]), KD,
        ["trained on 3 classes ['b', 'a', 'c'], the student's data have 3: ['a', 'b', 'c']"],
    ),
    "a file of other classes": (
        lambda f: file_of(f, "test_resnet", "test_resnet", classes=5), KD,
        ["does not fit test_resnet with 3 classes", "file has (5, 96), model (3, 96)"],
    ),
    "a timm model of other classes": (
        lambda f: {"teacher": "test_resnet"}, KD,
        ["test_resnet has 1000 classes and the data have 3", "pretrained: true"],
    ),
    "no such file": (
        lambda f: {"teacher": "gone.pt", "teacher_model": "test_resnet"}, KD,
        ["gone.pt: a weights file needs"],
    ),
    "no such model": (
        lambda f: {"teacher": "test_resnett"}, KD,
        ["'test_resnett' is neither a run folder nor a weights file, and timm has no model"],
    ),
    "no published weights": (
        lambda f: {"teacher": "resnet200"}, KD, ["timm has no weights of resnet200"],
    ),
    "no run": (lambda f: {"teacher": "train"}, RunError, ["train is no readable run"]),
    "a smaller model": (
        lambda f: file_of(f, "resnet34", "resnet18"), KD,
        ["t.safetensors does not fit resnet18", "80 ignored: layer1.2"],
    ),
    "a transformer of other images": (
        lambda f: file_of(f, "test_vit", "test_vit", image_size=160), KD,
        ["at 32 pixels", "pos_embed (file has (1, 101, 64), model (1, 5, 64))"],
    ),
    "a missing tensor": (
        lambda f: file_without(f, "layer2.0.bn1.bias"), KD,
        ["does not fit test_resnet", "1 re-initialised: layer2.0.bn1.bias (not in the"],
    ),
    "a file without its model": (
        lambda f: file_without(f, "fc.bias") | {"teacher_model": ""}, KD, ["needs a timm name"],
    ),
    "a run with a model": (
        lambda f: {"teacher": RUN, "teacher_model": "test_resnet"}, KD, ["run folders and timm"],
    ),
    "images it cannot take": (
        lambda f: run_of(f, "test_vit_relpos", teacher_image_size=48), ModelError,
        ["test_vit_relpos does not take teacher_image_size 48", "set it to 32"],
    ),
    "no such layer of the student": (
        lambda f: layers("layer44 -> layer4"), ModelError,
        ["ResNet has no module 'layer44'; near: layer4"],
    ),
    "no such layer of the teacher": (
        lambda f: layers("layer4 -> layer5"), ModelError, ["ResNet has no module 'layer5'"],
    ),
    "layers of other sizes": (
        lambda f: layers("layer1 -> layer2"), KD,
        ["layer1 -> layer2: the student's (32, 8, 8) and the teacher's (48, 4, 4) differ in more"],
    ),
    "a vector and a map": (
        lambda f: layers("global_pool -> layer4"), KD,
        ["the student's (96,) and the teacher's (96, 1, 1)"],
    ),
    "a cache of images without digests": (
        lambda f: {"teacher": RUN, "cache_teacher_logits": True, "verify_data": False}, KD,
        ["verify_data: false"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_unusable_teacher_is_refused_before_the_first_step(folder, tmp_path, case):
    make, kind, words = REFUSED[case]
    folder = Path(shutil.copytree(folder, tmp_path / "abc"))
    options = options_of(folder) | {"kd_loss": ["kl"]} | make(folder)
    if (folder / options["teacher"]).exists():
        options["teacher"] = str(folder / options["teacher"])
    recipe = Recipe(**options)
    run = runs.Run(recipe.folder)
    with pytest.raises(kind) as error:
        next(training.fit(recipe, run))
    assert type(error.value) is kind
    assert [word for word in words if word not in str(error.value)] == []
    assert not run.file("last.pt").exists() and not run.steps().size
    assert run.status()["state"] == "failed"


class TwoOutputs(nn.Module):
    """`twice` returns two tensors, `unused` is never called."""

    def __init__(self):
        super().__init__()
        self.twice, self.fc, self.unused = nn.Identity(), nn.Linear(3, 10), nn.Identity()
        self.twice.forward = lambda images: (images, images)

    def forward(self, images):
        return self.fc(self.twice(images)[0].mean((2, 3)))


@pytest.mark.parametrize("layer", ["twice", "unused"])
def test_layer_without_one_tensor_cannot_be_compared(sources, tmp_path, layer):
    pairs = {"distill_pairs": [f"{layer} -> fc"], "kd_loss": ["l2"]}
    with pytest.raises(DistillationError, match=f"{layer} -> fc: .* not return one tensor"):
        Distillation(student_recipe(sources, tmp_path, **pairs), TwoOutputs(), DIGITS, CPU)
