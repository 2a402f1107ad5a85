"""The pixel cache has the bytes that reading the images has, also after damage."""

import errno
import hashlib
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import save_noise

from workbench import data
from workbench.augmentation import EvalTransform, ResizeShortSide, TrainTransform
from workbench.data import images, pixel_cache

FORMS = [
    ResizeShortSide(),
    ResizeShortSide(20),
    ResizeShortSide(24, "bicubic"),
    EvalTransform(16, 20),
]
COUNT = 11


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(pixel_cache, "part_ends", every(4))


def every(count: int):
    """Parts of `count` images."""
    return lambda digests: np.arange(1, len(digests) + 1) % count == 0


@pytest.fixture
def photos(tmp_path) -> pd.DataFrame:
    """A verified frame of JPEG and PNG files of several sizes."""
    paths = []
    for i in range(COUNT):
        size = (30 + 3 * i, 50 - 2 * i)
        paths.append(save_noise(tmp_path / f"{i}.{'jpg' if i % 3 else 'png'}", i, size))
    return verified(paths)


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "cache"


def verified(paths: list[Path]) -> pd.DataFrame:
    frame = pd.DataFrame({"file": [p.name for p in paths], "path": [str(p) for p in paths]})
    frame["label"] = np.arange(len(paths)) % 3
    return data.verify_images(frame, cache=False, progress=False)


def fill(frame: pd.DataFrame, folder: Path, form=FORMS[1]) -> pixel_cache.Cache:
    cache = pixel_cache.Cache(frame, form, folder)
    pixel_cache.build(cache, progress=False)
    return cache


def assert_holds(cache: pixel_cache.Cache, frame: pd.DataFrame) -> None:
    for row, path in enumerate(frame.path):
        np.testing.assert_array_equal(cache.image(row).pixels(), cache.form(images.open(path)))


def parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.pixels"))


def noted(monkeypatch) -> list[str]:
    """The paths that are read from here on."""
    read, look = [], images.open
    monkeypatch.setattr(
        images, "open", lambda path, *more: (read.append(path), look(path, *more))[1]
    )
    return read


@pytest.mark.parametrize("form", FORMS)
def test_a_cache_has_the_pixels_of_the_images_also_in_another_process(photos, folder, form):
    cache = fill(photos, folder, form)
    cache.image(0)
    assert_holds(pickle.loads(pickle.dumps(cache)), photos)
    assert [path.stat().st_size for path in cache.files] == [cache.size(part) for part in range(3)]
    assert cache.bytes == sum(path.stat().st_size for path in cache.files)
    assert sorted(cache.files) == parts(folder) and not list(folder.glob("*.part"))
    assert fill(photos[:0], folder, form).files == []


def test_only_images_without_a_cache_are_read(photos, folder, tmp_path, monkeypatch):
    fill(photos[:8], folder)
    read = noted(monkeypatch)
    fill(photos, folder)
    assert set(read) == {photos.path[0], photos.path[4], *photos.path[8:]}  # 0 and 4 to compare
    (tmp_path / "moved").mkdir()
    moved = verified([Path(shutil.move(path, tmp_path / "moved")) for path in photos.path])
    read.clear()
    cache = fill(moved, folder)
    assert read == moved.path[::4].tolist()
    read.clear()
    for row in range(COUNT):
        cache.image(row)
    assert read == []


@pytest.mark.parametrize("change", ["removed", "added", "changed"])
def test_a_changed_image_affects_its_own_part(monkeypatch, folder, change):
    """With parts of 100 images on average, at most two of 9,000 images' parts are new."""
    monkeypatch.undo()
    monkeypatch.setattr(pixel_cache, "PART", 100)
    digests = [hashlib.sha1(str(i).encode()).hexdigest() for i in range(9001)]
    frame = pd.DataFrame({"path": digests, "digest": digests, "width": 30, "height": 20})
    before = set(pixel_cache.Cache(frame[:9000], ResizeShortSide(), folder).files)
    assert 70 <= len(before) <= 115
    for row in (0, 4711, 8999):
        rows = list(range(9000))
        rows[row : row + 1] = {"removed": [], "added": [9000, row], "changed": [9000]}[change]
        after = pixel_cache.Cache(frame.iloc[rows].reset_index(drop=True), FORMS[0], folder)
        assert len(set(after.files) - before) <= 2
        assert sum(len(after.rows(part)) for part in range(len(after.files))) == len(rows)


def test_a_changed_file_another_order_and_another_form_have_other_parts(photos, folder):
    first = fill(photos, folder)
    save_noise(Path(photos.path[1]), seed=99, size=(33, 48))
    changed = verified([Path(path) for path in photos.path])
    cache = fill(changed, folder)
    assert_holds(cache, changed)
    assert cache.files[0] != first.files[0] and cache.files[1:] == first.files[1:]
    turned = changed[::-1].reset_index(drop=True)
    for form in FORMS:
        assert_holds(fill(turned, folder, form), turned)
    assert len(parts(folder)) == 4 + 3 * len(FORMS)


def test_parts_are_rebuilt_where_a_library_computes_other_pixels(photos, folder):
    """Simulated by a form with the same repr."""
    fill(photos, folder)

    class Other(ResizeShortSide):
        def __repr__(self):
            return repr(FORMS[1])

        def __call__(self, image):
            return super().__call__(image) // 2 + 1

    assert_holds(fill(photos, folder, Other(20)), photos)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("side", [None, 20, 40, 500])
def test_batches_are_the_same_bytes_with_a_cache(photos, tmp_path, folder, workers, side):
    """One of the images is decoded at a smaller scale where that is allowed."""
    large = save_noise(tmp_path / "large.jpg", 0, (640, 480))
    frame = verified([*map(Path, photos.path), large])
    transform = TrainTransform(16, hflip=0.5, brightness=0.3, resize=ResizeShortSide(side))
    see, cache = FORMS[3], fill(frame, folder, transform.resize)
    train = dict(seed=3, batch_size=4, steps=range(2, 9))
    for plain, cached in [
        (data.train_loader(frame, transform, **train),
         data.train_loader(frame, transform, **train, workers=workers, cached=cache)),
        (data.eval_loader(frame, see, batch_size=4),
         data.eval_loader(frame, see, batch_size=4, workers=workers,
                          cached=fill(frame, folder, see))),
    ]:  # fmt: skip
        for a, b in zip(plain, cached, strict=True):
            np.testing.assert_array_equal(a.images.numpy(), b.images.numpy())
            assert a.indices.tolist() == b.indices.tolist()


# ---- damage


def damage(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("readonly", [False, True])
def test_a_corrupt_part_is_read_from_the_images_and_built_again(
    photos, folder, monkeypatch, capfd, readonly
):
    whole = [path.read_bytes() for path in fill(photos, folder).files]
    for path in parts(folder):
        damage(path, 2500)  # not in the first image
    cache = pixel_cache.Cache(photos, FORMS[1], folder)
    if readonly:
        refuse = lambda *_, **__: (_ for _ in ()).throw(OSError(errno.EROFS, "Read-only"))
        monkeypatch.setattr(Path, "unlink", refuse)
    for _ in range(2):
        assert_holds(cache, photos)
    printed = capfd.readouterr().err.splitlines()  # once a part
    assert all(f"{p} is corrupt" in line for p, line in zip(cache.files, printed, strict=True))
    assert len(parts(folder)) == (3 if readonly else 0)
    if not readonly:
        assert_holds(fill(photos, folder), photos)
        assert [path.read_bytes() for path in cache.files] == whole


DAMAGE = {
    "last byte lost": lambda path: os.truncate(path, path.stat().st_size - 1),
    "checksums lost": lambda path: os.truncate(path, path.stat().st_size - 20),
    "all bytes lost": lambda path: os.truncate(path, 0),
    "a byte more": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "checksum": lambda path: damage(path, -20),
    "checksum of checksums": lambda path: damage(path, -4),
    "deleted": Path.unlink,
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_part_is_built_again(photos, folder, kind):
    cache = fill(photos, folder)
    whole = cache.files[1].read_bytes()
    DAMAGE[kind](cache.files[1])
    assert_holds(fill(photos, folder), photos)
    assert cache.files[1].read_bytes() == whole


@pytest.mark.parametrize("kind", ["checksums lost", "deleted"])
def test_a_part_that_is_lost_after_the_build_is_read_from_the_images(photos, folder, capfd, kind):
    cache = fill(photos, folder)
    DAMAGE[kind](cache.files[1])
    assert_holds(cache, photos)
    assert f"{cache.files[1]} is missing" in capfd.readouterr().err


def test_a_corrupt_image_whose_file_is_missing_or_another_is_an_error(photos, folder):
    form, frame = FORMS[3], photos
    cache = fill(frame, folder, form)
    damage(cache.files[0], 3 * 16 * 16 + 10)
    save_noise(Path(frame.path[1]), seed=98, size=(33, 48))  # of the same size
    with pytest.raises(images.ImageError, match="changed since it was verified"):
        cache.image(1)
    Path(frame.path[1]).unlink()
    [batch] = data.eval_loader(frame, form, batch_size=20, cached=cache)
    assert batch.failures == [(1, "missing", "no such file")] and len(batch.images) == COUNT - 1


def test_an_image_that_changed_since_it_was_verified_stops_the_build_by_name(photos, folder):
    path = Path(photos.path[6])
    path.write_bytes(b"no image")
    with pytest.raises(pixel_cache.CacheError, match=r"6\.png cannot be cached, undecodable"):
        fill(photos, folder)
    for size in ((90, 90), (48, 38)):
        save_noise(path, seed=66, size=size)
        with pytest.raises(pixel_cache.CacheError, match="changed since it was verified"):
            fill(photos, folder)


# ---- the disk


def test_the_room_for_all_caches_is_checked_before_anything_is_written(photos, folder, monkeypatch):
    two = [pixel_cache.Cache(photos, form, folder) for form in (FORMS[1], FORMS[3])]
    needed = sum(cache.bytes for cache in two)
    usage = shutil.disk_usage(folder.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
    with pytest.raises(pixel_cache.CacheError, match="are free"):
        pixel_cache.build(*two, progress=False)
    assert parts(folder) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed))
    pixel_cache.build(*two, progress=False)


def test_a_disk_that_fills_up_is_named_and_complete_parts_stay(photos, folder, monkeypatch):
    real, left = os.fsync, [2]  # the lock's and one of a part

    def full(file):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(file)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(pixel_cache.CacheError, match=f"{folder}: No space left"):
        fill(photos, folder)
    assert len(parts(folder)) == 1
    left[0] = 9
    assert_holds(fill(photos, folder), photos)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no list of open files here")
def test_parts_need_no_open_files(photos, folder, monkeypatch):
    monkeypatch.setattr(pixel_cache, "part_ends", every(1))
    cache, before = fill(photos, folder), len(os.listdir("/proc/self/fd"))
    assert_holds(cache, photos)
    assert len(os.listdir("/proc/self/fd")) == before


# ---- processes

BUILD = r"""
import errno, fcntl, os, sys, time
import numpy as np, pandas as pd
from workbench.data import pixel_cache, images
from workbench.augmentation import ResizeShortSide

pixel_cache.part_ends = lambda digests: np.arange(1, len(digests) + 1) % 4 == 0
look = images.open
def slow(path):
    os.write(1, f"{path}\n".encode())  # whole, though other threads write too
    time.sleep(0.02)
    return look(path)
images.open = slow
def missing(handle, kind):
    raise OSError(errno.ENOSYS, "Function not implemented")
if "missing" in sys.argv:
    fcntl.flock = missing
print("ready", flush=True)
sys.stdin.readline()
cache = pixel_cache.Cache(pd.read_parquet(sys.argv[1]), ResizeShortSide(20), sys.argv[2])
pixel_cache.build(cache, progress=False)
print("done", flush=True)
"""


def building(frame: pd.DataFrame, folder: Path, flock: str = "works") -> subprocess.Popen:
    """A process that builds a cache after a line of input, and prints the paths it reads."""
    frame.to_parquet(folder.parent / "frame.parquet")
    command = [
        sys.executable,
        "-c",
        BUILD,
        str(folder.parent / "frame.parquet"),
        str(folder),
        flock,
    ]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.fixture
def many(tmp_path) -> pd.DataFrame:
    return verified([save_noise(tmp_path / f"{i}.png", i, (30, 30)) for i in range(44)])


@pytest.mark.slow
def test_a_killed_build_resumes_with_the_parts_that_are_there(many, folder):
    for reads in (9, 17):
        process = building(many, folder)
        process.stdin.write("\n")
        for _ in range(reads):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        process.communicate()
    rest, _ = building(many, folder).communicate("\n", timeout=60)
    assert rest.endswith("done\n")
    assert rest.count("\n") - 1 <= len(many) - 8  # two parts at least were not built again
    assert_holds(fill(many, folder), many)
    rest = {path for path in folder.iterdir() if not path.name.startswith(".lock")}
    assert {path.suffix for path in rest} == {".pixels"}


@pytest.mark.slow
@pytest.mark.parametrize("flock", ["works", "missing"])
def test_a_second_process_waits_for_the_first_and_reads_nothing_twice(many, folder, flock):
    both = [building(many, folder, flock) for _ in range(2)]
    for process in both:
        process.stdin.write("\n")
        process.stdin.flush()
    read = [process.communicate(timeout=60)[0].splitlines() for process in both]
    assert all(lines[-1] == "done" for lines in read)
    later = set(many.path) - {*many.path[::4]}  # the first of a part is also read to compare
    assert sorted(path for lines in read for path in lines if path in later) == sorted(later)
    assert_holds(fill(many, folder), many)
