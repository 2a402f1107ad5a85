"""A cache changes nothing but time: its bytes are those of the images, whatever happens to it."""

import errno
import hashlib
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
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
    monkeypatch.setattr(pixel_cache, "_ends", every(4))


def every(count: int):
    """Parts that end after so many images, whatever those are."""
    return lambda digests: np.arange(1, len(digests) + 1) % count == 0


@pytest.fixture
def photos(tmp_path) -> pd.DataFrame:
    """An examined frame of JPEG and PNG files of several sizes."""
    paths = []
    for i in range(COUNT):
        size = (30 + 3 * i, 50 - 2 * i)
        paths.append(save_noise(tmp_path / f"{i}.{'jpg' if i % 3 else 'png'}", i, size))
    return examined(paths)


def examined(paths: list[Path]) -> pd.DataFrame:
    frame = pd.DataFrame({"file": [p.name for p in paths], "path": [str(p) for p in paths]})
    frame["label"] = np.arange(len(paths)) % 3
    return data.verify_images(frame, cache=False, progress=False)


def fill(frame: pd.DataFrame, folder: Path, form=FORMS[1]) -> pixel_cache.Cache:
    kept = pixel_cache.Cache(frame, form, folder)
    pixel_cache.build(kept, progress=False)
    return kept


def assert_holds(kept: pixel_cache.Cache, frame: pd.DataFrame, form=FORMS[1]) -> None:
    assert len(kept) == len(frame)
    for row, path in enumerate(frame.path):
        np.testing.assert_array_equal(kept.image(row).pixels(), form(images.open(path)))


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def part_of(kept: pixel_cache.Cache, part: int = 0) -> Path:
    return kept.files[part]


def noted(monkeypatch) -> list[str]:
    """The paths that are read from here on."""
    read, look = [], images.open
    monkeypatch.setattr(images, "open", lambda path: (read.append(path), look(path))[1])
    return read


@pytest.mark.parametrize("form", FORMS)
def test_a_cache_holds_what_reading_the_images_gives(photos, tmp_path, form):
    kept = fill(photos, tmp_path / "kept", form)
    assert_holds(kept, photos, form)
    assert [path.stat().st_size for path in kept.files] == [kept.size(part) for part in range(3)]


@pytest.mark.parametrize("form", FORMS)
def test_a_forms_shape_is_that_of_its_pixels(photos, form):
    for path in photos.path:
        image = images.open(path)
        width, height = form.shape(image.width, image.height)
        assert form(image).shape == (height, width, 3)


def test_a_image_shorter_than_the_side_is_kept_as_it_is(photos):
    for path in photos.path:
        np.testing.assert_array_equal(ResizeShortSide(500)(images.open(path)), images.decode(path))


def test_what_is_cached_is_not_read_again(photos, tmp_path, monkeypatch):
    fill(photos, tmp_path / "kept")
    read = noted(monkeypatch)
    kept = fill(photos, tmp_path / "kept")
    assert read == photos.path[::4].tolist()  # the first of each part, to compare
    read.clear()
    for row in range(COUNT):
        kept.image(row)
    assert read == []


def test_a_list_that_grows_at_its_end_reads_only_what_is_new(photos, tmp_path, monkeypatch):
    fill(photos[:8], tmp_path / "kept")
    old, read = files(tmp_path / "kept"), noted(monkeypatch)
    kept = fill(photos, tmp_path / "kept")
    assert set(read) == {photos.path[0], photos.path[4], *photos.path[8:]}
    assert set(old) < set(files(tmp_path / "kept"))
    assert_holds(kept, photos)


@pytest.mark.parametrize("change", ["goes", "comes", "differs"])
def test_a_image_that_changes_concerns_its_own_part(monkeypatch, tmp_path, change):
    """In a list of 9,000, in which a part holds 100 on average: at most two are not there yet."""
    monkeypatch.undo()
    monkeypatch.setattr(pixel_cache, "PART", 100)
    digests = [hashlib.sha1(str(i).encode()).hexdigest() for i in range(9001)]
    frame = pd.DataFrame({"path": digests, "digest": digests, "width": 30, "height": 20})
    before = set(pixel_cache.Cache(frame[:9000], ResizeShortSide(), tmp_path).files)
    assert 70 <= len(before) <= 115
    for row in (0, 17, 4711, 8999):
        rows = list(range(9000))
        rows[row : row + 1] = {"goes": [], "comes": [9000, row], "differs": [9000]}[change]
        after = pixel_cache.Cache(
            frame.iloc[rows].reset_index(drop=True), ResizeShortSide(), tmp_path
        )
        assert len(set(after.files) - before) <= 2
        assert sum(len(after.rows(part)) for part in range(len(after.files))) == len(rows)


def test_a_build_says_what_there_is_where_and_what_is_of_others(photos, tmp_path, capsys):
    def said(*chosen: slice) -> str:
        pixel_cache.build(
            *(pixel_cache.Cache(photos[s], FORMS[1], tmp_path / "kept") for s in chosen)
        )
        return capsys.readouterr().out

    def size() -> str:
        return f"{sum(path.stat().st_size for path in files(tmp_path / 'kept')) / 1e3:.1f} kB"

    few = slice(0, 4)
    assert said(few) == f"cache: {size()} in {tmp_path / 'kept'}, {size()} of it built in 0 s\n"
    there = f"cache: {size()} in {tmp_path / 'kept'}, all of it was there"
    assert said(few) == there + "\n"
    mine = set(files(tmp_path / "kept"))
    said(slice(0, COUNT))
    others = sum(path.stat().st_size for path in set(files(tmp_path / "kept")) - mine)
    assert said(few) == f"{there}; {others / 1e3:.1f} kB there are of other lists or options\n"


def test_a_changed_file_a_changed_order_and_another_form_are_other_parts(photos, tmp_path):
    first = fill(photos, tmp_path / "kept")
    save_noise(Path(photos.path[1]), seed=99, size=(33, 48))
    changed = examined([Path(path) for path in photos.path])
    kept = fill(changed, tmp_path / "kept")
    assert_holds(kept, changed)
    assert part_of(kept) != part_of(first) and part_of(kept, 1) == part_of(first, 1)
    turned = photos[::-1].reset_index(drop=True)
    turned = turned[turned.file != "1.jpg"].reset_index(drop=True)
    assert_holds(fill(turned, tmp_path / "kept"), turned)
    assert_holds(fill(turned, tmp_path / "kept", FORMS[3]), turned, FORMS[3])


def test_caches_of_several_forms_stand_beside_each_other(photos, tmp_path):
    kept = [fill(photos, tmp_path / "kept", form) for form in FORMS]
    assert [one.missing() for one in kept] == [[]] * len(FORMS)
    assert len(files(tmp_path / "kept")) == 3 * len(FORMS)


def test_a_moved_folder_finds_its_cache(photos, tmp_path, monkeypatch):
    fill(photos, tmp_path / "kept")
    (tmp_path / "moved").mkdir()
    moved = [Path(shutil.move(path, tmp_path / "moved")) for path in photos.path]
    frame, read = examined(moved), noted(monkeypatch)
    fill(frame, tmp_path / "kept")
    assert len(read) == 3


def test_a_library_that_computes_other_pixels_makes_the_parts_anew(photos, tmp_path):
    """Stood in for by a form of the same name, one level brighter."""
    fill(photos, tmp_path / "kept")

    class Other(ResizeShortSide):
        def __repr__(self):
            return repr(FORMS[1])

        def __call__(self, image):
            return super().__call__(image) // 2 + 1

    form = Other(20)
    assert_holds(fill(photos, tmp_path / "kept", form), photos, form)


def test_a_cache_travels_to_a_loaders_process(photos, tmp_path):
    kept = fill(photos, tmp_path / "kept")
    kept.image(0)
    assert_holds(pickle.loads(pickle.dumps(kept)), photos)


def test_an_empty_frame_has_an_empty_cache(photos, tmp_path):
    kept = fill(photos[:0], tmp_path / "kept")
    assert len(kept) == 0 and kept.missing() == []


# ---- batches


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_same_bytes_with_a_cache_and_without(photos, tmp_path, workers):
    transform = TrainTransform(16, hflip=0.5, brightness=0.3, resize=FORMS[1])
    kept = fill(photos, tmp_path / "kept", transform.resize)
    how = dict(seed=3, batch_size=4, steps=range(2, 9))
    plain = list(data.train_loader(photos, transform, **how))
    cached = list(data.train_loader(photos, transform, **how, workers=workers, cached=kept))
    assert len(plain) == len(cached) == 7
    for a, b in zip(plain, cached, strict=True):
        np.testing.assert_array_equal(a.images.numpy(), b.images.numpy())
        assert a.indices.tolist() == b.indices.tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_validation_is_the_same_bytes_with_a_cache_and_without(photos, tmp_path, workers):
    form = EvalTransform(16, 20)
    kept = fill(photos, tmp_path / "kept", form)
    plain = list(data.eval_loader(photos, form, batch_size=4))
    cached = list(data.eval_loader(photos, form, batch_size=4, workers=workers, cached=kept))
    for a, b in zip(plain, cached, strict=True):
        np.testing.assert_array_equal(a.images.numpy(), b.images.numpy())


@pytest.mark.parametrize("side", [None, 500, 40])
def test_a_large_jpeg_gives_the_same_bytes_from_a_cache(tmp_path, side):
    """Of a size that is decoded at a smaller scale where that is allowed."""
    frame = examined([save_noise(tmp_path / f"{i}.jpg", i, (640, 480 + i)) for i in range(3)])
    transform = TrainTransform(32, resize=ResizeShortSide(side))
    kept = fill(frame, tmp_path / "kept", transform.resize)
    how = dict(seed=0, batch_size=3, steps=range(4))
    plain = data.train_loader(frame, transform, **how)
    cached = data.train_loader(frame, transform, **how, cached=kept)
    for a, b in zip(plain, cached, strict=True):
        np.testing.assert_array_equal(a.images.numpy(), b.images.numpy())


# ---- damage


def damage(path: Path, at: int, change: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= change
    path.write_bytes(content)


def test_a_damaged_image_is_noticed_made_again_and_mended_on_disk(photos, tmp_path, capfd):
    kept = fill(photos, tmp_path / "kept")
    whole = [path.read_bytes() for path in files(tmp_path / "kept")]
    for path in files(tmp_path / "kept"):
        damage(path, 700)
    again = fill(photos, tmp_path / "kept")
    assert_holds(again, photos)
    said = capfd.readouterr().err
    assert said.count("is damaged") == len(whole)
    assert [path.read_bytes() for path in files(tmp_path / "kept")] == whole
    assert_holds(kept, photos)
    assert_holds(fill(photos, tmp_path / "kept"), photos)
    assert not capfd.readouterr().err


def test_of_many_damaged_images_and_of_a_part_cut_short_one_line_is_said(
    photos, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr(pixel_cache, "_ends", every(len(photos)))
    kept = fill(photos, tmp_path / "kept")
    for row in range(1, len(photos)):
        damage(part_of(kept), kept._starts[row].item() + 7)
    kept = fill(photos, tmp_path / "kept")
    assert_holds(kept, photos)
    assert capfd.readouterr().err == (
        f"cache: {part_of(kept)} is damaged; what differs is made again from the images\n"
    )
    kept = pixel_cache.Cache(photos, kept.form, tmp_path / "kept")
    os.truncate(part_of(kept), 100)
    assert_holds(kept, photos)
    assert capfd.readouterr().err == (
        f"cache: {part_of(kept)} is gone or cut short; its images are read from their files\n"
    )


def test_damage_on_a_disk_that_cannot_be_written_is_seen_every_time(photos, tmp_path, monkeypatch):
    damage(part_of(fill(photos, tmp_path / "kept")), 700)
    kept = fill(photos, tmp_path / "kept")

    def refusing(*arguments):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "pwrite", refusing)
    for _ in range(2):
        assert_holds(kept, photos)


@pytest.mark.parametrize("lost", [1, 20, 3000, None])
def test_a_truncated_part_is_noticed_and_built_again(photos, tmp_path, lost):
    kept = fill(photos, tmp_path / "kept")
    whole = part_of(kept, 1).read_bytes()
    part_of(kept, 1).write_bytes(b"" if lost is None else whole[:-lost])
    assert_holds(fill(photos, tmp_path / "kept"), photos)
    assert part_of(kept, 1).read_bytes() == whole


def test_a_part_with_more_than_it_should_have_is_built_again(photos, tmp_path):
    kept = fill(photos, tmp_path / "kept")
    whole = part_of(kept).read_bytes()
    part_of(kept).write_bytes(whole + b"x")
    fill(photos, tmp_path / "kept")
    assert part_of(kept).read_bytes() == whole


def test_a_damaged_table_of_sums_is_noticed_and_built_again(photos, tmp_path):
    kept = fill(photos, tmp_path / "kept")
    whole = part_of(kept).read_bytes()
    for back in (1, 4, 5, 20):
        damage(part_of(kept), len(whole) - back)
        fill(photos, tmp_path / "kept")
        assert part_of(kept).read_bytes() == whole


def test_a_damaged_image_whose_file_is_gone_or_another_is_an_error_and_never_shown(
    photos, tmp_path
):
    kept = fill(photos, tmp_path / "kept")
    damage(part_of(kept), kept._starts[1].item() + 700)
    save_noise(Path(photos.path[1]), seed=98, size=(33, 48))  # of the same size
    with pytest.raises(images.ImageError, match="not the image"):
        fill(photos, tmp_path / "kept").image(1)
    Path(photos.path[1]).unlink()
    with pytest.raises(images.ImageError, match="missing"):
        fill(photos, tmp_path / "kept").image(1)
    form = EvalTransform(16, 20)
    kept = fill(photos[2:], tmp_path / "kept", form)
    damage(part_of(kept), kept._starts[1].item() + 700)
    Path(photos.path[3]).unlink()
    kept = fill(photos[2:], tmp_path / "kept", form)
    [batch] = data.eval_loader(photos[2:], form, batch_size=20, cached=kept)
    assert batch.failures == [(1, "missing", "no such file")] and len(batch.images) == COUNT - 3


def test_a_image_that_cannot_be_read_any_more_stops_the_build_by_name(photos, tmp_path):
    Path(photos.path[6]).write_bytes(b"no image")
    with pytest.raises(pixel_cache.CacheError, match=r"6\.png cannot be cached, undecodable"):
        fill(photos, tmp_path / "kept")
    save_noise(Path(photos.path[6]), seed=6, size=(90, 90))
    with pytest.raises(pixel_cache.CacheError, match="another size"):
        fill(photos, tmp_path / "kept")
    save_noise(Path(photos.path[6]), seed=66, size=(48, 38))
    with pytest.raises(pixel_cache.CacheError, match="not the file that was examined"):
        fill(photos, tmp_path / "kept")


# ---- the disk


def test_a_disk_that_is_too_small_is_refused_with_the_numbers_before_anything_is_written(
    photos, tmp_path, monkeypatch
):
    usage = shutil.disk_usage(tmp_path)._replace(free=9_500)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(pixel_cache.CacheError) as error:
        fill(photos, tmp_path / "kept")
    for part in ("takes 18.9 kB more", f"{tmp_path / 'kept'}", "9.5 kB are free", "train_resize"):
        assert part in str(error.value)
    assert files(tmp_path / "kept") == []


def test_the_room_is_for_all_caches_together(photos, tmp_path, monkeypatch):
    two = [pixel_cache.Cache(photos, form, tmp_path / "kept") for form in (FORMS[1], FORMS[3])]
    needed = sum(one.size(part) for one in two for part in range(3))
    for free, fits in ((needed - 1, False), (needed, True)):
        usage = shutil.disk_usage(tmp_path)._replace(free=free)
        monkeypatch.setattr(shutil, "disk_usage", lambda folder, usage=usage: usage)
        if fits:
            pixel_cache.build(*two, progress=False)
        else:
            with pytest.raises(pixel_cache.CacheError):
                pixel_cache.build(*two, progress=False)
            assert files(tmp_path / "kept") == []


def test_a_disk_that_fills_up_is_named_and_what_is_there_stays(photos, tmp_path, monkeypatch):
    real, left = os.pwrite, [6]

    def filling(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(os, "pwrite", filling)
    with pytest.raises(pixel_cache.CacheError, match="is full"):
        fill(photos, tmp_path / "kept")
    monkeypatch.undo()
    monkeypatch.setattr(pixel_cache, "_ends", every(4))
    assert [path.suffix for path in files(tmp_path / "kept")].count(".pixels") == 1
    assert_holds(fill(photos, tmp_path / "kept"), photos)


def test_the_folder_is_made_with_those_above_it(photos, tmp_path):
    assert_holds(fill(photos, tmp_path / "all" / "kept"), photos)


def test_a_folder_that_cannot_be_made_is_named(photos, tmp_path):
    (tmp_path / "kept").write_text("a file")
    with pytest.raises(pixel_cache.CacheError, match="kept: it is no folder; .* cache_dir"):
        fill(photos, tmp_path / "kept")


# ---- processes

BUILD = r"""
import os
import sys
import time
import numpy as np
import pandas as pd
from workbench.data import pixel_cache, images
from workbench.augmentation import ResizeShortSide

pixel_cache._ends = lambda digests: np.arange(1, len(digests) + 1) % 4 == 0
look = images.open
def slow(path):
    os.write(1, f"{path}\n".encode())  # whole, though other threads write too
    time.sleep(0.02)
    return look(path)
images.open = slow
print("ready", flush=True)
sys.stdin.readline()
made = pixel_cache.Cache(pd.read_parquet(sys.argv[1]), ResizeShortSide(20), sys.argv[2])
pixel_cache.build(made, progress=False)
print("done", flush=True)
"""


def building(photos: pd.DataFrame, folder: Path) -> subprocess.Popen:
    photos.to_parquet(folder.parent / "frame.parquet")
    command = [sys.executable, "-c", BUILD, str(folder.parent / "frame.parquet"), str(folder)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    assert process.stdout.readline() == "ready\n"
    return process


def begin(*processes: subprocess.Popen) -> None:
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()


@pytest.fixture
def many(tmp_path) -> pd.DataFrame:
    return examined([save_noise(tmp_path / f"{i}.png", i, (30, 30)) for i in range(44)])


@pytest.mark.slow
def test_a_build_that_was_killed_goes_on_with_the_parts_that_are_there(many, tmp_path):
    frame, folder = many, tmp_path / "kept"
    read = []
    for reads in (3, 9, 17):
        process = building(frame, folder)
        begin(process)
        for _ in range(reads):
            read.append(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
        process.communicate()
    rest, _ = building(frame, folder).communicate("\n", timeout=60)
    assert rest.endswith("done\n")
    # The third part was reached; two at least were not built again.
    assert rest.count("\n") - 1 <= len(frame) - 8
    assert_holds(fill(frame, folder), frame)
    assert {path.suffix for path in files(folder)} == {".pixels"}


@pytest.mark.slow
def test_two_processes_share_a_build_and_neither_spoils_it(many, tmp_path):
    frame, folder = many, tmp_path / "kept"
    both = [building(frame, folder) for _ in range(2)]
    begin(*both)
    read = [process.communicate(timeout=60)[0].splitlines() for process in both]
    assert all(lines[-1] == "done" for lines in read)
    # The first image of a part is also read to compare; each other one by one process, once.
    later = [
        line for lines in read for line in lines if line in set(frame.path) - {*frame.path[::4]}
    ]
    assert sorted(later) == sorted(set(frame.path) - {*frame.path[::4]})
    assert min(map(len, read)) > 8
    assert_holds(fill(frame, folder), frame)


@pytest.mark.slow
def test_whoever_comes_second_waits_for_a_part_that_is_being_built(photos, tmp_path, monkeypatch):
    folder = tmp_path / "kept"
    process = building(photos[:4], folder)
    begin(process)
    process.stdout.readline()
    read = noted(monkeypatch)
    kept = fill(photos[:4], folder)
    assert set(read) <= {photos.path[0]}  # to compare; the other process made the part
    process.communicate(timeout=60)
    assert_holds(kept, photos[:4])


def test_a_file_that_is_gone_when_its_lock_is_there_is_begun_again(photos, tmp_path, monkeypatch):
    """As when another process finished it, or gave it up, in between."""
    flock, times = pixel_cache.fcntl.flock, [0]

    def late(file, how):
        flock(file, how)
        times[0] += 1
        if times[0] == 1:
            next((tmp_path / "kept").glob("*.part")).unlink()

    monkeypatch.setattr(pixel_cache.fcntl, "flock", late)
    assert_holds(fill(photos, tmp_path / "kept"), photos)
    assert times[0] == 4  # three parts, one of them twice


def test_no_thread_of_a_failed_build_writes_after_its_file_is_closed(photos, tmp_path, monkeypatch):
    """Whatever is opened next gets the number of that file."""
    look, write, close = images.open, os.pwrite, os.close
    closed, late = set(), []

    def slow(path):
        if path == photos.path[0]:
            raise images.ImageError("missing", "no such file")
        time.sleep(0.2)
        return look(path)

    monkeypatch.setattr(images, "open", slow)
    monkeypatch.setattr(os, "close", lambda file: (closed.add(file), close(file))[1])
    monkeypatch.setattr(
        os, "pwrite", lambda file, *rest: (late.append(file in closed), write(file, *rest))[1]
    )
    with pytest.raises(pixel_cache.CacheError):
        fill(photos, tmp_path / "kept")
    assert True not in late


# ---- what is there when it is read


def test_a_part_that_is_gone_or_cut_when_it_is_first_read_is_made_from_the_images(photos, tmp_path):
    for change in (Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-9])):
        kept = fill(photos, tmp_path / "kept")
        change(part_of(kept, 1))
        assert_holds(kept, photos)


def test_more_parts_than_files_may_be_open_can_be_read(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(pixel_cache, "_ends", every(1))
    kept = fill(photos, tmp_path / "kept")
    fds = lambda: len(os.listdir("/proc/self/fd"))
    if not Path("/proc/self/fd").exists():
        pytest.skip("no /proc here to count open files in")
    before = fds()
    assert_holds(kept, photos)
    assert fds() == before
