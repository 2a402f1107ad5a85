"""The pixel cache gives the bytes that reading the images gives, also after damage."""

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
    assert len(cache) == len(frame)
    for row, path in enumerate(frame.path):
        np.testing.assert_array_equal(cache.image(row).pixels(), cache.form(images.open(path)))


def parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.pixels"))


def noted(monkeypatch) -> list[str]:
    """The paths that are read from here on."""
    read, look = [], images.open
    monkeypatch.setattr(images, "open", lambda path: (read.append(path), look(path))[1])
    return read


@pytest.mark.parametrize("form", FORMS)
def test_a_cache_has_the_pixels_of_the_images_also_in_another_process(photos, folder, form):
    cache = fill(photos, folder, form)
    cache.image(0)
    assert_holds(pickle.loads(pickle.dumps(cache)), photos)
    assert [path.stat().st_size for path in cache.files] == [cache.size(part) for part in range(3)]
    assert len(cache.files) == 3 and cache.bytes == sum(p.stat().st_size for p in parts(folder))
    assert not list(folder.glob("*.part"))


def test_a_small_image_is_not_enlarged(photos):
    for path in photos.path:
        np.testing.assert_array_equal(ResizeShortSide(500)(images.open(path)), images.decode(path))


def test_cached_images_are_not_read_again(photos, folder, monkeypatch):
    fill(photos, folder)
    read = noted(monkeypatch)
    cache = fill(photos, folder)
    assert read == photos.path[::4].tolist()  # the first of each part, to compare
    read.clear()
    for row in range(COUNT):
        cache.image(row)
    assert read == []


def test_only_the_new_images_of_a_longer_list_are_read(photos, folder, monkeypatch):
    fill(photos[:8], folder)
    old, read = parts(folder), noted(monkeypatch)
    cache = fill(photos, folder)
    assert set(read) == {photos.path[0], photos.path[4], *photos.path[8:]}
    assert set(old) < set(parts(folder))
    assert_holds(cache, photos)


@pytest.mark.parametrize("change", ["removed", "added", "changed"])
def test_a_changed_image_affects_its_own_part(monkeypatch, folder, change):
    """With parts of 100 images on average, at most two of 9,000 images' parts are new."""
    monkeypatch.undo()
    monkeypatch.setattr(pixel_cache, "PART", 100)
    digests = [hashlib.sha1(str(i).encode()).hexdigest() for i in range(9001)]
    frame = pd.DataFrame({"path": digests, "digest": digests, "width": 30, "height": 20})
    before = set(pixel_cache.Cache(frame[:9000], ResizeShortSide(), folder).files)
    assert 70 <= len(before) <= 115
    for row in (0, 17, 4711, 8999):
        rows = list(range(9000))
        rows[row : row + 1] = {"removed": [], "added": [9000, row], "changed": [9000]}[change]
        after = pixel_cache.Cache(frame.iloc[rows].reset_index(drop=True), FORMS[0], folder)
        assert len(set(after.files) - before) <= 2
        assert sum(len(after.rows(part)) for part in range(len(after.files))) == len(rows)


def test_a_build_prints_its_size_and_folder_and_the_size_of_other_parts(photos, folder, capsys):
    def printed(frame: pd.DataFrame) -> str:
        pixel_cache.build(pixel_cache.Cache(frame, FORMS[1], folder))
        return capsys.readouterr().out

    def size(files: list[Path]) -> str:
        return f"{sum(path.stat().st_size for path in files) / 1e3:.1f} kB"

    first = printed(photos[:4])
    mine = parts(folder)
    assert first == f"cache: {size(mine)} in {folder}, {size(mine)} of it built in 0 s\n"
    there = f"cache: {size(mine)} in {folder}, all of it was there"
    assert printed(photos[:4]) == there + "\n"
    printed(photos)
    others = size([path for path in parts(folder) if path not in mine])
    assert printed(photos[:4]) == f"{there}; {others} there are of other lists or options\n"


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


def test_a_moved_folder_finds_its_cache(photos, tmp_path, folder, monkeypatch):
    fill(photos, folder)
    (tmp_path / "moved").mkdir()
    moved = [Path(shutil.move(path, tmp_path / "moved")) for path in photos.path]
    frame, read = verified(moved), noted(monkeypatch)
    fill(frame, folder)
    assert len(read) == 3


def test_parts_are_rebuilt_where_a_library_computes_other_pixels(photos, folder):
    """Simulated by a form with the same repr."""
    fill(photos, folder)

    class Other(ResizeShortSide):
        def __repr__(self):
            return repr(FORMS[1])

        def __call__(self, image):
            return super().__call__(image) // 2 + 1

    assert_holds(fill(photos, folder, Other(20)), photos)


def test_an_empty_frame_has_an_empty_cache(photos, folder):
    cache = fill(photos[:0], folder)
    assert len(cache) == 0 and cache.files == []


# ---- batches


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_same_bytes_with_a_cache(photos, folder, workers):
    transform = TrainTransform(16, hflip=0.5, brightness=0.3, resize=FORMS[1])
    cache = fill(photos, folder, transform.resize)
    how = dict(seed=3, batch_size=4, steps=range(2, 9))
    plain = data.train_loader(photos, transform, **how)
    assert_same(plain, data.train_loader(photos, transform, **how, workers=workers, cached=cache))
    cache, how = fill(photos, folder, FORMS[3]), dict(batch_size=4)
    plain = data.eval_loader(photos, FORMS[3], **how)
    assert_same(plain, data.eval_loader(photos, FORMS[3], **how, workers=workers, cached=cache))


def assert_same(ours, theirs) -> None:
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a.images.numpy(), b.images.numpy())
        assert a.indices.tolist() == b.indices.tolist()


@pytest.mark.parametrize("side", [None, 500, 40])
def test_a_large_jpeg_gives_the_same_bytes_from_a_cache(tmp_path, folder, side):
    """Of a size that is decoded at a smaller scale where that is allowed."""
    frame = verified([save_noise(tmp_path / f"{i}.jpg", i, (640, 480 + i)) for i in range(3)])
    transform = TrainTransform(32, resize=ResizeShortSide(side))
    cache = fill(frame, folder, transform.resize)
    how = dict(seed=0, batch_size=3, steps=range(4))
    plain = data.train_loader(frame, transform, **how)
    assert_same(plain, data.train_loader(frame, transform, **how, cached=cache))


# ---- damage


def damage(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("readonly", [False, True])
def test_a_corrupt_image_is_read_from_its_file_and_its_part_built_again(
    photos, folder, monkeypatch, capfd, readonly
):
    whole = [path.read_bytes() for path in fill(photos, folder).files]
    for path in parts(folder):
        for at in (0, 700, 2500):  # of several images
            damage(path, at)
    cache = pixel_cache.Cache(photos, FORMS[1], folder)
    if readonly:
        refuse = lambda *_, **__: (_ for _ in ()).throw(OSError(errno.EROFS, "Read-only"))
        monkeypatch.setattr(Path, "unlink", refuse)
    for _ in range(2):
        assert_holds(cache, photos)
    assert capfd.readouterr().err.splitlines() == [  # once a part
        f"cache: {path} is corrupt; it is deleted, and built again by the next run"
        for path in cache.files
    ]
    assert len(parts(folder)) == (3 if readonly else 0)
    if not readonly:
        assert_holds(fill(photos, folder), photos)
        assert [path.read_bytes() for path in cache.files] == whole


@pytest.mark.parametrize("change", [-1, -20, -3000, None, b"x"])
def test_a_part_of_another_length_is_built_again(photos, folder, change):
    cache = fill(photos, folder)
    whole = cache.files[1].read_bytes()
    cut = b"" if change is None else whole + b"x" if change == b"x" else whole[:change]
    cache.files[1].write_bytes(cut)
    assert_holds(fill(photos, folder), photos)
    assert cache.files[1].read_bytes() == whole


def test_a_part_with_corrupt_checksums_is_built_again(photos, folder):
    cache = fill(photos, folder)
    whole = cache.files[0].read_bytes()
    for back in (1, 4, 5, 20):
        damage(cache.files[0], len(whole) - back)
        fill(photos, folder)
        assert cache.files[0].read_bytes() == whole


@pytest.mark.parametrize("change", [Path.unlink, lambda path: os.truncate(path, 100)])
def test_a_part_that_is_lost_after_the_build_is_read_from_the_images(photos, folder, capfd, change):
    cache = fill(photos, folder)
    change(cache.files[1])
    assert_holds(cache, photos)
    assert capfd.readouterr().err == (
        f"cache: {cache.files[1]} is missing or cut short; its images are read from their files\n"
    )


def test_a_corrupt_image_whose_file_is_missing_or_another_is_an_error(photos, folder):
    form, frame = FORMS[3], photos
    cache = fill(frame, folder, form)
    damage(cache.files[0], 3 * 16 * 16 + 10)
    save_noise(Path(frame.path[1]), seed=98, size=(33, 48))  # of the same size
    with pytest.raises(images.ImageError, match="not the image"):
        cache.image(1)
    Path(frame.path[1]).unlink()
    [batch] = data.eval_loader(frame, form, batch_size=20, cached=cache)
    assert batch.failures == [(1, "missing", "no such file")] and len(batch.images) == COUNT - 1


def test_an_image_that_changed_since_it_was_verified_stops_the_build_by_name(photos, folder):
    path = Path(photos.path[6])
    path.write_bytes(b"no image")
    with pytest.raises(pixel_cache.CacheError, match=r"6\.png cannot be cached, undecodable"):
        fill(photos, folder)
    for size, says in (((90, 90), "another size"), ((48, 38), "not the file that was verified")):
        save_noise(path, seed=66, size=size)
        with pytest.raises(pixel_cache.CacheError, match=says):
            fill(photos, folder)


# ---- the disk


def test_the_room_for_all_caches_is_checked_before_anything_is_written(photos, folder, monkeypatch):
    two = [pixel_cache.Cache(photos, form, folder) for form in (FORMS[1], FORMS[3])]
    needed = sum(cache.bytes for cache in two)
    usage = shutil.disk_usage(folder.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
    with pytest.raises(pixel_cache.CacheError) as error:
        pixel_cache.build(*two, progress=False)
    for text in (f"takes {needed / 1e3:.1f} kB more", str(folder), "are free", "train_resize"):
        assert text in str(error.value)
    assert parts(folder) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed))
    pixel_cache.build(*two, progress=False)


def test_a_disk_that_fills_up_is_named_and_complete_parts_stay(photos, folder, monkeypatch):
    real, left = os.fsync, [1]

    def full(file):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(file)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(pixel_cache.CacheError, match="is full"):
        fill(photos, folder)
    assert len(parts(folder)) == 1
    left[0] = 9
    assert_holds(fill(photos, folder), photos)


def test_the_folder_is_made_or_named_in_an_error(photos, folder):
    assert_holds(fill(photos, folder / "deeper"), photos)
    (folder / "file").write_text("a file")
    with pytest.raises(pixel_cache.CacheError, match="file: it is no folder; .* cache_dir"):
        fill(photos, folder / "file")


def test_parts_need_no_open_files(photos, folder, monkeypatch):
    if not Path("/proc/self/fd").exists():
        pytest.skip("no /proc here to count open files in")
    monkeypatch.setattr(pixel_cache, "part_ends", every(1))
    cache, before = fill(photos, folder), len(os.listdir("/proc/self/fd"))
    assert_holds(cache, photos)
    assert len(os.listdir("/proc/self/fd")) == before


# ---- processes

BUILD = r"""
import os, sys, time
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
print("ready", flush=True)
sys.stdin.readline()
cache = pixel_cache.Cache(pd.read_parquet(sys.argv[1]), ResizeShortSide(20), sys.argv[2])
pixel_cache.build(cache, progress=False)
print("done", flush=True)
"""


def building(frame: pd.DataFrame, folder: Path) -> subprocess.Popen:
    """A process that builds a cache after a line of input, and prints the paths it reads."""
    frame.to_parquet(folder.parent / "frame.parquet")
    command = [sys.executable, "-c", BUILD, str(folder.parent / "frame.parquet"), str(folder)]
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
    assert {path.suffix for path in folder.iterdir()} == {".pixels", ""}  # and the lock


@pytest.mark.slow
def test_a_second_process_waits_for_the_first_and_reads_nothing_twice(many, folder):
    both = [building(many, folder) for _ in range(2)]
    for process in both:
        process.stdin.write("\n")
        process.stdin.flush()
    read = [process.communicate(timeout=60)[0].splitlines() for process in both]
    assert all(lines[-1] == "done" for lines in read)
    later = set(many.path) - {*many.path[::4]}  # the first of a part is also read to compare
    assert sorted(path for lines in read for path in lines if path in later) == sorted(later)
    assert_holds(fill(many, folder), many)
