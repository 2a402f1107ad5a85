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

from workbench import CACHE, counted, runs
from workbench.data import Batch
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
        """Creates the folder; returns a sentence. Raises OSError, DistillationError if full."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with runs.atomic_write(self.folder / "recipe.json") as temporary:
            temporary.write_text(self.settings)
        cached = [path for path in map(self._file, range(epochs)) if path.exists()]
        need = epochs * self.steps_per_epoch * self.batch_size * self.row.itemsize
        need -= sum(path.stat().st_blocks * 512 for path in cached)
        if need > shutil.disk_usage(self.folder).free:
            raise DistillationError(
                f"teacher logits need {need / 1e9:,.2f} GB, more than is free in {self.folder}; "
                "set cache_teacher_logits: false or WORKBENCH_CACHE"
            )
        text = f"{len(cached)} of {counted(epochs, 'epoch')}"
        return f"teacher logits are cached in {self.folder}: {text}"

    def read(self, batch: Batch) -> Tensor | None:
        """float32 (n, teachers * C), or None if a row is missing or corrupt."""
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

    def write(self, batch: Batch, logits: Tensor) -> None:
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
            raise DistillationError(
                f"teacher logits cannot be written to {self.folder} ({error}); set "
                "cache_teacher_logits: false, or WORKBENCH_CACHE, and resume with the same command"
            ) from None

    def _file(self, epoch: int) -> Path:
        return self.folder / f"epoch-{epoch:05d}.rows"

    def _position(self, batch: Batch) -> tuple[int, np.ndarray]:
        """The epoch of a batch, and the rows of its images in that epoch."""
        epoch, step = divmod(batch.step, self.steps_per_epoch)
        return epoch, step * self.batch_size + batch.positions.numpy()

    def _checksums(self, logits: np.ndarray, epoch: int, rows: np.ndarray) -> list[int]:
        """CRC-32 of the folder, the position and the values of each row."""
        positions = [zlib.crc32(f"{self.folder.name} {epoch} {row}".encode()) for row in rows]
        return [zlib.crc32(x, start) for x, start in zip(logits, positions, strict=True)]
