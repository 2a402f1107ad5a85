"""Commands that write files of data, which `workbench.__main__` offers."""

from pathlib import Path
from typing import Annotated

import typer


def index(
    sources: Annotated[list[str], typer.Argument(help="'s3://bucket/train/*.tar' a{0..9}.tar")],
    out: Annotated[Path, typer.Option(help="NAME.arrow, for train_list or val_list")],
) -> None:
    """Index the images of tar shards, WebDataset's or of class folders, to train from in place.

    workbench index 's3://bucket/train/{00000..00099}.tar' --out train.arrow
    """
    from workbench import data

    print(data.write_index(sources, out))
