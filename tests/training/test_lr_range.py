"""The learning-rate range test: the steps of a training whose lr grows, without its folder."""

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from helpers import train

from workbench import ROOT, data, training
from workbench.recipe import Recipe
from workbench.ui import plots

OPTIONS = {"train_fraction": 0.1, "epochs": 1, "workers": 0, "log_every": 1, "lr": 0.05}


@pytest.fixture
def recipe(tmp_path):
    return Recipe(runs_dir=str(tmp_path / "runs"), **OPTIONS)


def test_losses_are_those_of_steps_with_an_lr_that_grows(recipe, float64):
    """Against a loop of torch's; the optimizer is plain SGD."""
    recipe = recipe.replace(momentum=0.0, weight_decay=0.0, label_smoothing=0.1)
    table = training.lr_range_test(recipe, steps=12)
    dataset = data.load_dataset(recipe)
    model, _ = training.build_initial_model(recipe, dataset.classes)
    model.train()
    normalize = training.Normalize(recipe, torch.device("cpu"))
    transform, how = training.train_transform(recipe), training.sampler_options(recipe)
    losses = []
    for batch in data.train_loader(dataset.train, transform, steps=range(len(table)), **how):
        logits = model(normalize(batch.images))
        loss = torch.nn.functional.cross_entropy(logits, batch.labels, label_smoothing=0.1)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for weight, gradient in zip(model.parameters(), gradients, strict=True):
                weight -= 0.05 * 10 ** (-3 + 5 * batch.step / 11) * gradient
        losses.append(loss.item())
    assert table.step.tolist() == list(range(len(table)))
    np.testing.assert_allclose(table.lr, 0.05 * np.geomspace(1e-3, 100, 12)[: len(table)])
    np.testing.assert_allclose(table.loss, losses, rtol=1e-6)
    expected = pd.Series(table.loss).ewm(alpha=0.1).mean()
    np.testing.assert_allclose(table.smoothed_loss, expected)


def test_what_training_refuses_is_refused(recipe):
    small = {"precision": "bf16", "device": "cpu", "image_size": 16, "val_resize": 16}
    with pytest.raises(training.TrainingError, match="bf16 on a CPU"):
        training.lr_range_test(recipe.replace(**small))


def test_it_ends_where_the_loss_diverges(recipe):
    table = training.lr_range_test(recipe.replace(lr=10.0), steps=60)
    assert 5 < len(table) < 60 and np.isfinite(table.loss).all()
    diverged = table.smoothed_loss > 4 * table.smoothed_loss.cummin()
    assert not diverged[:-1].any()


def test_it_changes_neither_a_run_nor_its_folder(recipe, tmp_path):
    before = train(recipe.replace(name="before"))
    files = {p: p.read_bytes() for p in (tmp_path / "runs").rglob("*") if p.is_file()}
    training.lr_range_test(recipe, steps=5)
    assert files == {p: p.read_bytes() for p in (tmp_path / "runs").rglob("*") if p.is_file()}
    after = train(recipe)
    assert after.file("metrics.csv").read_bytes() == before.file("metrics.csv").read_bytes()


def test_the_figure_has_both_losses_and_the_lr_of_the_recipe():
    table = pd.DataFrame({"lr": [0.1, 1.0], "loss": [2.0, 3.0], "smoothed_loss": [2.0, 2.5]})
    [ax] = plots.lr_range(table, 0.3).axes
    assert ax.get_xscale() == "log"
    shown = [line.get_xydata().tolist() for line in ax.lines]
    assert [[0.1, 2.0], [1.0, 3.0]] in shown and [[0.1, 2.0], [1.0, 2.5]] in shown
    assert [[0.3, 0], [0.3, 1]] in shown


def test_the_cell_of_02_draws_it_on_request(recipe):
    cells = nbformat.read(ROOT / "notebooks" / "02_baseline.ipynb", as_version=4).cells
    [source] = [cell.source for cell in cells if cell.id == "find-lr"]
    shown = []
    names = {"recipe": recipe, "content": data.load_dataset(recipe), "training": training}
    names |= {"plots": plots, "display": shown.append}
    exec(source, names)
    assert shown == []
    exec(source.replace("find_lr = False", "find_lr = True"), names)
    assert len(shown) == 1 and isinstance(shown[0], plots.Figure)
