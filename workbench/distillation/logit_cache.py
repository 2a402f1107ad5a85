"""Teacher logits on disk, for the next student that is trained on the same batches."""

import hashlib
import json
import os
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from workbench import CACHE, runs
from workbench.distillation.teachers import DistillationError


class TeacherLogitCache:
    """Logits of all teachers by epoch and position in it; one file per epoch.

    A row holds float32 logits and the CRC-32 of them and their position, so corrupt and misplaced
    rows are detected and computed again. Several processes and runs may write the same files.
    """

    def __init__(
        self, settings: dict[str, Any], steps_per_epoch: int, batch_size: int, columns: int
    ):
        self.settings = json.dumps(settings, sort_keys=True, indent=1)
        digest = hashlib.sha256(self.settings.encode()).hexdigest()[:12]
        self.folder = CACHE / "teachers" / digest
        self.steps_per_epoch, self.batch_size = steps_per_epoch, batch_size
        self.row = np.dtype([("logits", "<f4", (columns,)), ("crc", "<u4")])
        self.requests = self.hits = 0  # images since the start

    def prepare(self, epochs: int) -> str:
        """Creates the folder; returns a sentence about it. Raises DistillationError."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with runs.atomic_write(self.folder / "recipe.json") as temporary:
                temporary.write_text(self.settings)
        except OSError as error:
            raise self._write_error(error) from None
        cached = [path for path in map(self._file, range(epochs)) if path.exists()]
        rows = epochs * self.steps_per_epoch * self.batch_size
        used = sum(path.stat().st_blocks * 512 for path in cached)
        need = max(0, rows * self.row.itemsize - used)
        free = shutil.disk_usage(self.folder).free
        if need > 0.95 * free:
            raise DistillationError(
                f"cache_teacher_logits needs {need / 1e9:,.2f} GB for {rows:,} images in {epochs} "
                f"epochs, and {self.folder} has {free / 1e9:,.2f} GB; set cache_teacher_logits: "
                "false, or WORKBENCH_CACHE to another disk"
            )
        return (
            f"teacher logits are cached in {self.folder}: {len(cached)} of {epochs} epochs, "
            f"{need / 1e6:,.0f} MB to write"
        )

    def read(self, batch: Any) -> Tensor | None:
        """float32 (n, teachers * C) of a data.Batch; None if a row is missing or corrupt."""
        epoch, rows = self._position(batch)
        self.requests += len(rows)
        first, count = int(rows.min()), int(rows.max() - rows.min()) + 1
        try:
            offset = first * self.row.itemsize
            block = np.fromfile(self._file(epoch), self.row, count, offset=offset)
        except OSError:
            return None
        if len(block) < count:
            return None
        block = block[rows - first]
        logits = np.ascontiguousarray(block["logits"])
        if not np.array_equal(block["crc"], self._checksums(logits, epoch, rows)):
            return None
        self.hits += len(rows)
        return torch.from_numpy(logits)

    def write(self, batch: Any, logits: Tensor) -> None:
        """Writes float32 (n, teachers * C). Raises DistillationError if the disk is full."""
        epoch, rows = self._position(batch)
        block = np.empty(len(rows), self.row)
        block["logits"] = logits.cpu().numpy()
        block["crc"] = self._checksums(np.ascontiguousarray(block["logits"]), epoch, rows)
        try:
            with open(os.open(self._file(epoch), os.O_WRONLY | os.O_CREAT, 0o644), "wb") as file:
                # One write per consecutive rows; a single process has only one.
                for part in np.split(np.arange(len(rows)), np.flatnonzero(np.diff(rows) != 1) + 1):
                    file.seek(int(rows[part[0]]) * self.row.itemsize)
                    file.write(block[part].tobytes())
        except OSError as error:
            raise self._write_error(error) from None

    def _file(self, epoch: int) -> Path:
        return self.folder / f"epoch-{epoch:05d}.rows"

    def _position(self, batch: Any) -> tuple[int, np.ndarray]:
        """The epoch of a batch, and the rows of its images in that epoch."""
        epoch, step = divmod(batch.step, self.steps_per_epoch)
        return epoch, step * self.batch_size + batch.positions.numpy()

    def _checksums(self, logits: np.ndarray, epoch: int, rows: np.ndarray) -> list[int]:
        """CRC-32 of the folder, the position and the values of each row."""
        positions = [zlib.crc32(f"{self.folder.name} {epoch} {row}".encode()) for row in rows]
        return [zlib.crc32(x, start) for x, start in zip(logits, positions, strict=True)]

    def _write_error(self, error: OSError) -> DistillationError:
        return DistillationError(
            f"teacher logits cannot be written to {self.folder} ({error.strerror or error}); set "
            "cache_teacher_logits: false, or WORKBENCH_CACHE to another disk, and resume with the "
            "same command"
        )
