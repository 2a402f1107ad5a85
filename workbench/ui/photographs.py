"""Colour photographs of installed packages, for a recipe that names no data. No download.

- china.jpg by danielbuechele and flower.jpg by vultilion (Flickr): CC BY 2.0, from scikit-learn,
  whose sklearn/datasets/images/README.txt names the sources.
- grace_hopper.jpg: an official portrait of the US Navy, public domain, from matplotlib.
"""

from pathlib import Path

import matplotlib
import pandas as pd
import sklearn.datasets

from workbench import data
from workbench.recipe import Recipe
from workbench.ui.views import AUGMENTATION

CLASSES = {"china.jpg": "temple", "flower.jpg": "flower", "grace_hopper.jpg": "portrait"}
SIZES = {"image_size": 224, "val_resize": 256}  # pixels, as on ImageNet
COPIES = 8  # of each in the training list, so that a step of 24 images can be mixed


def default_images(recipe: Recipe) -> tuple[data.Dataset, dict[str, int]]:
    """The images to show a recipe on, and options that override their sizes.

    The photographs at SIZES for a recipe in which nothing but augmentation and the seed is set;
    otherwise the recipe's own data, as they are. Raises what data.load_dataset raises.
    """
    augmentation = {name for names in AUGMENTATION.values() for name in names}
    if recipe.non_default().keys() <= augmentation | {"seed"}:
        return photographs(), SIZES
    return data.load_dataset(recipe), {}


def photographs() -> data.Dataset:
    """The photographs with a class each: COPIES of each for training, one for validation."""
    sklearn_folder = Path(sklearn.datasets.__file__).parent / "images"
    paths = [sklearn_folder / "china.jpg", sklearn_folder / "flower.jpg"]
    paths.append(Path(matplotlib.get_data_path(), "sample_data", "grace_hopper.jpg"))
    frame = pd.DataFrame({"file": [path.name for path in paths], "label": range(len(paths))})
    frame = frame.assign(path=[str(path) for path in paths], list=0, outside=False)
    train = pd.concat([frame] * COPIES, ignore_index=True)
    return data.Dataset(train, frame, [CLASSES[file] for file in frame.file])
