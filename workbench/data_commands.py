"""Commands about data, of `workbench.__main__`."""

from typing import Annotated

import typer


def index(
    sources: Annotated[list[str], typer.Argument(help="'s3://bucket/train/*.tar' a{0..9}.tar")],
    out: Annotated[str, typer.Option(help="NAME.arrow, for train_list or val_list")],
) -> None:
    """Index the images of tar shards, WebDataset's or of class folders, to train in place."""
    from workbench import data

    print(data.write_index(sources, out))
