"""Tar shards of images with labels, for tests."""

import io
import tarfile
from pathlib import Path


def pack(path: Path, files: dict[str, bytes]) -> Path:
    """An uncompressed tar with these files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def pack_list(listed: Path, root: Path, out: Path, shards: int) -> list[Path]:
    """The images of a list file in its order as WebDataset shards: KEY.png and KEY.cls."""
    rows = [line.rsplit(" ", 1) for line in listed.read_text().splitlines()]
    size, made = -(-len(rows) // shards), []
    for number in range(shards):
        files = {}
        for name, label in rows[number * size : (number + 1) * size]:
            files[name] = (root / name).read_bytes()
            files[name.rpartition(".")[0] + ".cls"] = label.encode()
        made.append(pack(out / f"{number:05d}.tar", files))
    return made
