"""Class folders inside of a .zip or .tar are read where they are, as the unpacked ones are."""

import io
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import save_noise
from PIL import Image

from workbench import data
from workbench.augmentation import TrainTransform
from workbench.data import DataError, archives, images, pixel_cache
from workbench.image_files import stored_in
from workbench.recipe import Recipe


def opened(folder: Path, **options) -> data.Dataset:
    return data.load_dataset(Recipe(dataset="files", data_dir=str(folder), **options))


def archived(folder: Path, form: str, around: bool = False, method=zipfile.ZIP_DEFLATED) -> dict:
    """train and val packed in the order of the disk, the folders removed; options that name them"""
    for side in ("train", "val"):
        top, path = folder / side, folder / f"{side}.{form}"
        files = sorted(top.rglob("*"), key=lambda p: p.name)
        names = [str(p.relative_to(folder if around else top)) for p in files]
        if form == "zip":
            with zipfile.ZipFile(path, "w", method) as archive:
                for file, name in zip(files, names, strict=True):
                    archive.write(file, name)
        else:
            with tarfile.open(path, "w") as archive:
                for file, name in zip(files, names, strict=True):
                    archive.add(file, f"./{name}", recursive=False)
        shutil.rmtree(top)
    return dict(train_root=f"train.{form}", val_root=f"val.{form}")


@pytest.mark.parametrize("form", ["zip", "tar"])
@pytest.mark.parametrize("around", [False, True])
def test_files_labels_and_skipped_are_those_of_the_unpacked_folders(image_folder, form, around):
    train = image_folder / "train"
    (train / "aa").mkdir()  # a class without images
    (train / "b/deep/er").mkdir(parents=True)
    shutil.copy(train / "b/0.png", train / "b/deep/er/0.png")
    shutil.copy(train / "b/1.png", train / "b/zz é.PNG")
    shutil.copy(train / "b/2.png", train / "b/no suffix")
    for junk in ("b/.hidden.png", "b/notes.txt"):
        (train / junk).write_text("x")
    folders = opened(image_folder)
    found = opened(image_folder, **archived(image_folder, form, around))
    assert found.classes == folders.classes == ["a", "aa", "b", "c"]
    for ours, theirs in ((found.train, folders.train), (found.val, folders.val)):
        assert ours[["file", "label", "list", "outside"]].equals(
            theirs[["file", "label", "list", "outside"]]
        )
    assert sorted(f.removeprefix("train/") for _, f, _ in found.skipped) == [
        "b/.hidden.png", "b/notes.txt",
    ]  # fmt: skip
    assert sorted(folders.skipped)[0][1:] == ("b/.hidden.png", "hidden")


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_every_member_has_the_bytes_that_zipfile_reads(image_folder, method):
    found = opened(image_folder, **archived(image_folder, "zip", method=method))
    with zipfile.ZipFile(image_folder / "train.zip") as archive:
        for row in found.train.itertuples():
            unpacked = Image.open(io.BytesIO(archive.read(row.file))).convert("RGB")
            assert images.decode(row.path).tobytes() == unpacked.tobytes()
            assert stored_in(row.path) == (
                str(image_folder / "train.zip"), archive.getinfo(row.file).compress_size,
            )  # fmt: skip


BATCHES = """
import multiprocessing, sys, torch
from workbench import data
from workbench.augmentation import TrainTransform
from workbench.recipe import Recipe
if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[2])
    found = data.load_dataset(Recipe(dataset="files", data_dir=sys.argv[1], train_root="train.zip",
                                     val_root="val.zip"))
    batches = data.train_loader(found.train, TrainTransform(16, hflip=0.5), seed=3, batch_size=5,
                                steps=range(4), workers=2)
    torch.save([batch.images for batch in batches], sys.argv[3])
"""


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_read_the_same_bytes_however_they_are_started(image_folder, tmp_path, method):
    found = opened(image_folder, **archived(image_folder, "zip"))
    options = dict(seed=3, batch_size=5, steps=range(4))
    expected = list(data.train_loader(found.train, TrainTransform(16, hflip=0.5), **options))
    (tmp_path / "batches.py").write_text(BATCHES)
    command = [sys.executable, "batches.py", str(image_folder), method, "out.pt"]
    path = os.pathsep.join([str(Path(data.__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    subprocess.run(command, check=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path})
    for ours, theirs in zip(torch.load(tmp_path / "out.pt"), expected, strict=True):
        assert torch.equal(ours, theirs.images)


def test_the_pixel_cache_of_an_archive_is_that_of_its_folder(image_folder, tmp_path):
    resize = TrainTransform(16).resize
    frame = data.verify_images(opened(image_folder).train, progress=False)
    pixel_cache.build(pixel_cache.Cache(frame, resize, tmp_path), progress=False)
    options = archived(image_folder, "tar")
    frame = data.verify_images(opened(image_folder, **options).train, progress=False)
    cache = pixel_cache.Cache(frame, resize, tmp_path)
    assert all(map(cache.is_complete, range(len(cache.files))))
    reference = resize(images.open(frame.path[7]))
    assert cache.image(7).pixels().tobytes() == reference.tobytes()


def test_facts_are_read_again_when_the_archive_changes(image_folder):
    options = archived(image_folder, "zip", method=zipfile.ZIP_STORED)
    before = data.verify_images(opened(image_folder, **options).train, progress=False)
    path = image_folder / "train.zip"
    start = int(before.path[0].split("::z")[1].split("+")[0])
    raw = bytearray(path.read_bytes())
    raw[start + 60 : start + 300] = bytes(240)  # in the pixels of the first image
    path.write_bytes(raw)
    after = data.verify_images(opened(image_folder, **options).train, progress=False)
    assert (before.problem == "").all()
    assert after.problem[0] in ("undecodable", "truncated") and (after.problem[1:] == "").all()


def test_a_shortened_or_replaced_archive_is_an_error_of_its_images(image_folder):
    found = opened(image_folder, **archived(image_folder, "tar")).train
    path = image_folder / "train.tar"
    os.truncate(path, 6000)
    assert "truncated" in set(data.verify_images(found, cache=False, progress=False).problem)
    (image_folder / "train").mkdir()
    (image_folder / "val").mkdir()
    (image_folder / "train/a").mkdir()
    save_noise(image_folder / "train/a/0.png", 0)
    zipped = image_folder / "train.zip"
    archived(image_folder, "zip")
    place = f"{zipped}::z7+20:a/0.png"
    with pytest.raises(images.ImageError, match="has changed since it was listed"):
        images.open(place)


def packed(folder: Path, name: str) -> Path:
    path = folder / name
    if name.endswith("tgz"):
        with tarfile.open(path, "w:gz") as archive:
            archive.add(folder / "train", "train")
    elif name == "lzma.zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
            archive.writestr("a/0.png", b"x")
    elif name == "encrypted.zip":
        archived(folder, "zip")
        raw = bytearray((folder / "train.zip").read_bytes())
        raw[raw.index(b"PK\1\2") + 8] |= 1  # of the first entry, APPNOTE.TXT 4.4.4
        path.write_bytes(raw)
    elif name == "cut.zip":
        archived(folder, "zip")
        path.write_bytes((folder / "train.zip").read_bytes()[:-30])
    elif name == "cut.tar":
        archived(folder, "tar")
        path.write_bytes((folder / "train.tar").read_bytes()[:3000])
    elif name == "empty.zip":
        zipfile.ZipFile(path, "w").close()
    else:
        path.write_text("a/0.png a\n")
    return path


@pytest.mark.parametrize(
    "name, says",
    [
        ("train.tgz", "uncompressed .tar .*unpack it, or pack it again"),
        ("lzma.zip", "'a/0.png' is encrypted, or not deflated"),
        ("encrypted.zip", "is encrypted, or not deflated"),
        ("cut.zip", "neither a folder nor a readable .zip"),
        ("cut.tar", "neither a folder nor a readable .zip or uncompressed .tar"),
        ("text.txt", "neither a folder nor a readable .zip"),
        ("empty.zip", "no images in class folders"),
    ],
)
def test_an_archive_that_cannot_be_read_is_refused_in_a_sentence(image_folder, name, says):
    packed(image_folder, name)
    with pytest.raises(DataError, match=says) as error:
        opened(image_folder, train_root=name, val_fraction=0.5)
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("form", ["zip", "tar"])
def test_names_that_leave_the_archive_are_skipped_and_of_equal_names_the_last_counts(
    image_folder, form
):
    first, last = (save_noise(image_folder / f"{i}.png", seed=i) for i in (1, 2))
    members = [(first, "a/0.png"), (first, "../out.png"), (first, "b/../../x/1.png"),
               (last, "./a/0.png"), (first, "b/0.png")]  # fmt: skip
    path = image_folder / f"odd.{form}"
    if form == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for file, name in members:
                archive.write(file, name)
    else:
        with tarfile.open(path, "w") as archive:
            for file, name in members:
                archive.add(file, name)
    found = opened(image_folder, train_root=path.name, val_root=path.name)
    assert found.train.file.tolist() == ["a/0.png", "b/0.png"] and found.classes == ["a", "b"]
    assert images.decode(found.train.path[0]).tobytes() == images.decode(last).tobytes()
    assert {(file, why) for _, file, why in found.skipped} == {
        ("../out.png", "hidden"), ("../x/1.png", "hidden"),
    }  # fmt: skip


@pytest.mark.parametrize("form", ["zip", "tar"])
def test_a_listing_is_kept_until_the_archive_changes(image_folder, form, monkeypatch):
    options = archived(image_folder, form)
    before = opened(image_folder, **options)
    monkeypatch.setattr(archives, "_members", lambda path: pytest.fail("listed again"))
    assert opened(image_folder, **options).train.equals(before.train)
    monkeypatch.undo()
    for listing in (archives.CACHE / "archives").iterdir():
        listing.write_text("{")  # damaged
    assert opened(image_folder, **options).train.equals(before.train)
    image = save_noise(image_folder / "new.png", seed=9)
    opener = zipfile.ZipFile if form == "zip" else tarfile.open
    with opener(image_folder / f"train.{form}", "a") as archive:
        (archive.write if form == "zip" else archive.add)(image, "c/new.png")
    assert len(opened(image_folder, **options).train) == len(before.train) + 1
