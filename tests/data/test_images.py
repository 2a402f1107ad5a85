"""Any image file is decoded as upright RGB, or raises one error that names its fault."""

import errno
import os
import re
import struct
import time
import warnings

import numpy as np
import pytest
from conftest import save_noise
from PIL import Image, ImageFile, ImageOps

from workbench import image_files
from workbench.data import images
from workbench.data.images import ImageError, decode

# 8 x 6 pixels: left half red, right half blue, top row white.
SCENE = np.zeros((6, 8, 3), np.uint8)
SCENE[:, :4, 0] = 255
SCENE[:, 4:, 2] = 255
SCENE[0] = 255
LARGE = np.kron(SCENE, np.ones((8, 8, 1), np.uint8))


def pixels(path) -> np.ndarray:
    image = decode(path)
    assert image.mode == "RGB"
    return np.asarray(image)


def by_pillow(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "ppm", "webp", "jpg", "gif"])
def test_every_format_is_decoded(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(LARGE).save(path, lossless=True)
    apart = np.abs(pixels(path).astype(int) - LARGE)
    assert apart.mean() < 6 if suffix in ("jpg", "gif") else not apart.any()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
def test_every_exif_orientation_is_upright(tmp_path, orientation, suffix):
    path = tmp_path / f"x.{suffix}"
    save_turned(Image.fromarray(LARGE), path, orientation)
    np.testing.assert_array_equal(pixels(path), by_pillow(path))


def save_turned(image: Image.Image, path, orientation: int, **how) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(path, exif=exif, **how)


@pytest.mark.parametrize("mode", ["L", "1", "P"])
def test_grey_black_and_white_and_palettes_become_rgb(tmp_path, mode):
    stored = Image.fromarray(SCENE).convert(mode, palette=Image.Palette.ADAPTIVE)
    stored.save(tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as image:
        assert image.mode == mode
    np.testing.assert_array_equal(pixels(tmp_path / "x.png"), stored.convert("RGB"))


@pytest.mark.parametrize("suffix", ["png", "tif", "big-endian.tif", "pgm"])
def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path, suffix):
    grey = np.linspace(0, 65535, 48).round().astype(np.uint16).reshape(6, 8)
    path, big_endian = tmp_path / f"x.{suffix}", grey.astype(">u2").tobytes()
    if suffix == "pgm":
        path.write_bytes(b"P5\n8 6\n65535\n" + big_endian)
    elif suffix == "big-endian.tif":
        Image.frombytes("I;16B", (8, 6), big_endian).save(path)
    else:
        Image.fromarray(grey).save(path)
    np.testing.assert_array_equal(pixels(path), np.stack([np.round(grey / 257)] * 3, 2))


@pytest.mark.parametrize("bits, white_is_zero", [(12, False), (16, False), (16, True)])
def test_a_tiff_has_the_white_that_its_tags_name(tmp_path, bits, white_is_zero):
    white = 2**bits - 1
    grey = np.linspace(0, white, 48).round().astype(np.uint16).reshape(6, 8)
    packed = "".join(f"{level:0{bits}b}" for level in grey.ravel())
    content = int(packed, 2).to_bytes(len(packed) // 8)
    if bits == 16:
        content = grey.astype("<u2").tobytes()
    # TIFF 6.0, section 2: width, height, bits, compression, photometric interpretation, and strips
    tags = {256: 8, 257: 6, 258: bits, 259: 1, 262: int(not white_is_zero), 273: 122}
    tags |= {277: 1, 278: 6, 279: len(content)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(4)
    (tmp_path / "x.tif").write_bytes(head + content)
    wanted = np.round(grey / white * 255)
    wanted = 255 - wanted if white_is_zero else wanted
    np.testing.assert_array_equal(pixels(tmp_path / "x.tif"), np.stack([wanted] * 3, 2))


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_cmyk_becomes_the_colours_it_prints(tmp_path, suffix):
    ink = np.zeros((64, 64, 4), np.uint8)
    ink[:32, :, 0] = 255  # cyan above
    ink[32:, :, 2] = 255  # yellow below
    Image.frombytes("CMYK", (64, 64), ink.tobytes()).save(tmp_path / f"x.{suffix}", quality=95)
    seen = pixels(tmp_path / f"x.{suffix}").astype(int)
    assert np.abs(seen[8, 8] - [0, 255, 255]).max() < 10
    assert np.abs(seen[56, 56] - [255, 255, 0]).max() < 10


@pytest.mark.parametrize(
    "mode, solid, clear",
    [("RGBA", (9, 9, 9, 255), (90, 90, 90, 0)), ("LA", (9, 255), (90, 0)), ("P", 1, 0),
     ("RGB", (9, 9, 9), (90, 90, 90)), ("L", 9, 90)],
)  # fmt: skip
def test_transparent_pixels_become_white(tmp_path, mode, solid, clear):
    image = Image.new(mode, (8, 6), solid)
    if mode == "P":
        image.putpalette([90, 90, 90, 9, 9, 9])
    image.paste(clear, (0, 0, 4, 6))
    how = {} if mode.endswith("A") else {"transparency": clear}
    image.save(tmp_path / "x.png", **how)
    assert pixels(tmp_path / "x.png")[3, [1, 6]].tolist() == [[255] * 3, [9] * 3]
    Image.new("RGBA", (8, 6), (255, 0, 0, 128)).save(tmp_path / "x.png")  # half transparent
    np.testing.assert_allclose(pixels(tmp_path / "x.png")[0, 0], [255, 127, 127], atol=1)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_an_animation_gives_its_first_frame(tmp_path, suffix):
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue")]
    path = tmp_path / f"x.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:], lossless=True)
    np.testing.assert_array_equal(pixels(path)[3, 3], [255, 0, 0])


# ---- faults


def reason_of(path) -> str:
    with pytest.raises(ImageError) as caught:
        decode(path)
    assert caught.value.reason in image_files.REASONS and caught.value.detail
    return caught.value.reason


def test_files_that_are_no_image_have_their_reason(tmp_path):
    path = tmp_path / "x.png"
    assert reason_of(path) == "missing" and reason_of(tmp_path) == "unreadable"
    for content in (b"", b"no image", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0"):
        path.write_bytes(content)
        assert reason_of(path) in ("undecodable", "truncated")


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_without_a_white_point_are_refused(tmp_path, mode):
    Image.new(mode, (8, 6), 3).save(tmp_path / "x.tif")
    with pytest.raises(ImageError, match="no defined white"):
        decode(tmp_path / "x.tif")


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "gif", "tif", "webp", "ppm"])
def test_half_a_file_is_never_half_an_image(tmp_path, suffix):
    path = save_noise(tmp_path / f"x.{suffix}", seed=1, size=(64, 64))
    whole = path.read_bytes()
    decode(path)
    path.write_bytes(whole[: len(whole) // 2])
    assert reason_of(path) in (("truncated",) if suffix == "jpg" else ("truncated", "undecodable"))


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "tif", "webp", "bmp"])
def test_damaged_bytes_give_an_image_or_an_image_error_and_nothing_else(tmp_path, suffix):
    path, rng = save_noise(tmp_path / f"x.{suffix}", seed=2), np.random.default_rng(0)
    whole = np.frombuffer(path.read_bytes(), np.uint8)
    for _ in range(25):
        damaged = whole.copy()
        damaged[rng.integers(0, len(damaged), 8)] = rng.integers(0, 256, 8)
        path.write_bytes(damaged.tobytes())
        try:
            assert decode(path).mode == "RGB"
        except ImageError as error:
            assert error.reason in image_files.REASONS


@pytest.mark.parametrize("size", [(1, 1), (3, 40), (40, 3)])
def test_a_tiny_image_is_too_small(tmp_path, size):
    Image.new("RGB", size).save(tmp_path / "x.png")
    assert reason_of(tmp_path / "x.png") == "too small"
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    assert decode(tmp_path / "x.png").size == (4, 4)


def test_a_decompression_bomb_is_too_large_and_never_decoded(tmp_path, monkeypatch):
    Image.new("1", (12_000, 9_000)).save(tmp_path / "bomb.png")  # 108 million pixels in 1 kB
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    assert reason_of(tmp_path / "bomb.png") == "too large"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert reason_of(tmp_path / "bomb.png") == "too large"


def test_a_temporary_error_of_the_disk_is_tried_again_and_a_lasting_one_is_named(
    tmp_path, monkeypatch
):
    path = save_noise(tmp_path / "x.png", seed=1)
    real, left = Image.open, [2]

    def failing(*arguments, **keywords):
        if left[0]:
            left[0] -= 1
            raise OSError(errno.EIO, "Input/output error")
        return real(*arguments, **keywords)

    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr(Image, "open", failing)
    assert decode(path).size == (40, 32)
    left[0] = 100
    assert reason_of(path) == "unreadable"


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENOMEM])
def test_a_lack_of_open_files_or_memory_is_no_fault_of_an_image(tmp_path, monkeypatch, code):
    path = save_noise(tmp_path / "x.png", seed=1)

    def refusing(*arguments):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "open", refusing)
    with pytest.raises(OSError, match=re.escape(os.strerror(code))):
        decode(path)


@pytest.mark.parametrize(
    "error", [SyntaxError, struct.error, TypeError, EOFError, MemoryError,
              Image.DecompressionBombError],
)  # fmt: skip
def test_all_errors_of_decoders_are_image_errors_in_training_and_in_the_exported_script(
    tmp_path, monkeypatch, error
):
    def raising(self):
        raise error("of a damaged file")

    path = save_noise(tmp_path / "x.png", seed=1)
    monkeypatch.setattr(ImageFile.ImageFile, "load", raising)
    for read in (decode, image_files.read):
        with pytest.raises(ImageError, match="of a damaged file"):
            read(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.jpg")
    assert reason_of(tmp_path / "x.jpg") == "unreadable"
    with pytest.raises(ImageError, match="unreadable"):
        image_files.read(tmp_path / "x.jpg")


# ---- JPEG, of which only the rows that are needed are decoded

KINDS = {
    "4:4:4": dict(subsampling=0),
    "4:2:2": dict(subsampling=1),
    "4:2:0": dict(subsampling=2),
    "coarse": dict(quality=30, subsampling=2),
    "progressive": dict(progressive=True),
    "restarts": dict(restart_marker_rows=1, subsampling=2),
    "grey": {},
}


def scene(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours, edges and some grain, as a photograph has them."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (max(2, height // 24), max(2, width // 24), 3), dtype=np.uint8)
    smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    grain = rng.normal(0, 4, (height, width, 1))
    return Image.fromarray(np.clip(np.asarray(smooth) + grain, 0, 255).astype(np.uint8))


def save_jpeg(image: Image.Image, path, kind: str = "4:2:0", orientation: int = 1) -> None:
    image = image.convert("L") if kind == "grey" else image
    save_turned(image, path, orientation, **KINDS[kind])
    assert isinstance(images.open(path), images.Jpeg)


@pytest.mark.parametrize("kind", KINDS)
def test_a_jpeg_and_a_box_of_it_have_pillows_pixels(tmp_path, kind):
    path, rng = tmp_path / "x.jpg", np.random.default_rng(0)
    for size in ((64, 48), (4, 5), (16, 400), (151, 203)):
        save_jpeg(scene(*size), path, kind)
        whole = by_pillow(path)
        np.testing.assert_array_equal(pixels(path), whole)
    for bottom in (1, 7, 8, 15, 16, 17, 31, 32, 33, 120, 190, 202, 203):
        left, top = int(rng.integers(0, 100)), int(rng.integers(0, bottom))
        box = (left, top, int(rng.integers(left + 1, 152)), bottom)
        seen = images.open(path).resized(box, (box[2] - left, bottom - top), "bilinear")
        np.testing.assert_array_equal(seen, whole[top:bottom, left : box[2]])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_box_of_a_turned_jpeg_counts_from_where_it_is_upright(tmp_path, orientation):
    save_jpeg(scene(120, 90), tmp_path / "x.jpg", orientation=orientation)
    upright, image = by_pillow(tmp_path / "x.jpg"), images.open(tmp_path / "x.jpg")
    assert (image.width, image.height) == upright.shape[1::-1]
    seen = image.resized((10, 20, 50, 70), (40, 50), "bilinear")
    np.testing.assert_array_equal(seen, upright[20:70, 10:50])


def decoded_rows(monkeypatch) -> list[int]:
    """The rows that simplejpeg decodes from here on."""
    rows, decode_jpeg = [], images.simplejpeg.decode_jpeg
    monkeypatch.setattr(image_files, "decode", lambda file: pytest.fail("decoded by Pillow too"))

    def noting(raw, **how):
        rows.append(len(how["buffer"]))
        return decode_jpeg(raw, **how)

    monkeypatch.setattr(images.simplejpeg, "decode_jpeg", noting)
    return rows


@pytest.mark.parametrize(
    "kind, filter, bottom, high, exact, rows",
    [
        ("4:2:0", "bilinear", 90, 50, False, 96),
        ("restarts", "bilinear", 90, 50, False, 400),  # whose rows cannot be cut off
        ("4:2:0", "nearest", 96, 6, True, 112),
        ("4:2:0", "bilinear", 96, 6, True, 128),
        ("4:2:0", "bicubic", 96, 6, True, 144),
        ("4:2:0", "lanczos", 96, 6, True, 160),
        ("4:2:0", "bilinear", 93, 200, True, 96),
    ],
)
def test_rows_below_a_box_and_the_reach_of_a_filter_are_not_decoded(
    tmp_path, monkeypatch, kind, filter, bottom, high, exact, rows
):
    """An exact filter reads 0 to 3 rows of the result below the box; blocks have 16 rows."""
    save_jpeg(scene(100, 400), tmp_path / "x.jpg", kind)
    decoded = decoded_rows(monkeypatch)
    images.open(tmp_path / "x.jpg").resized((0, 0, 100, bottom), (20, high), filter, exact)
    assert decoded == [rows]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale, side", [(6, 60), (7.7, 40), (12, 40), (25, 24)])
def test_a_much_larger_jpeg_is_decoded_at_a_smaller_scale_near_pillows_resize(
    tmp_path, monkeypatch, kind, scale, side, orientation
):
    length = round(scale * side)
    large = scene(length // 4, length // 4, 3).resize((length + 3, length + 1))
    save_jpeg(large, tmp_path / "x.jpg", kind, orientation)
    wanted = decode(tmp_path / "x.jpg").resize((side, side), Image.Resampling.BILINEAR)
    rows = decoded_rows(monkeypatch)
    seen = images.open(tmp_path / "x.jpg").downscaled((side, side), "bilinear").astype(int)
    assert np.abs(seen - np.asarray(wanted)).mean() <= 0.6
    factor = next(f for f in (8, 4, 2) if 3 * f <= scale)
    assert rows == [-(-(length + 1) // factor)]


FILTERS = ["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]


@pytest.mark.parametrize("interpolation", FILTERS)
def test_every_filter_downscales_within_1_5_of_255_of_pillow(tmp_path, interpolation):
    scene(240, 200, 3).resize((981, 801)).save(tmp_path / "x.jpg")
    seen = images.open(tmp_path / "x.jpg").downscaled((60, 50), interpolation).astype(int)
    wanted = decode(tmp_path / "x.jpg").resize((60, 50), Image.Resampling[interpolation.upper()])
    assert np.abs(seen - np.asarray(wanted)).mean() <= 1.5


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_a_jpeg_that_only_pillow_accepts_has_pillows_pixels(tmp_path, monkeypatch, orientation):
    save_jpeg(scene(1003, 805, 3), tmp_path / "x.jpg", orientation=orientation)
    wanted = decode(tmp_path / "x.jpg").resize((33, 33), Image.Resampling.LANCZOS)

    def complaining(raw, **how):
        raise ValueError("Corrupt JPEG data: 4 extraneous bytes before marker 0xd9")

    monkeypatch.setattr(images.simplejpeg, "decode_jpeg", complaining)
    image = images.open(tmp_path / "x.jpg")
    np.testing.assert_array_equal(image.downscaled((33, 33), "lanczos"), wanted)


@pytest.mark.parametrize("fill", [1, 2, 5])
def test_fill_bytes_before_a_marker_hide_nothing(tmp_path, fill):
    """ITU-T T.81, B.1.1.2: any marker may be preceded by bytes of 0xFF."""
    path = tmp_path / "x.jpg"
    save_jpeg(scene(160, 120), path, orientation=6)
    raw = path.read_bytes()
    for marker in (b"\xff\xe1", b"\xff\xdb", b"\xff\xc0", b"\xff\xda"):
        at = raw.index(marker)
        path.write_bytes(raw[:at] + fill * b"\xff" + raw[at:])
        np.testing.assert_array_equal(pixels(path), by_pillow(path))


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize("kind", KINDS)
def test_an_exact_resize_is_pillows_of_the_whole_image(tmp_path, kind, interpolation):
    """Also where Pillow resizes the height first, and the filter reads beyond a box."""
    save_jpeg(scene(300, 400), tmp_path / "x.jpg", kind)
    image, whole = images.open(tmp_path / "x.jpg"), decode(tmp_path / "x.jpg")
    rng, how = np.random.default_rng(0), Image.Resampling[interpolation.upper()]
    for size in ((50, 40), (20, 90), (300, 300), (400, 30), (5, 250)):
        left, top = rng.uniform(0, (250, 300))
        box = (left, top, left + rng.uniform(20, 50), top + rng.uniform(20, 100))
        corner = (0, 0, min(300, size[0]), min(400, size[1]))
        for each in (box, corner, (0, 0, 300, 400), (0, 0, 300, int(top) + 1)):
            seen = image.resized(each, size, interpolation, exact=True)
            np.testing.assert_array_equal(seen, whole.resize(size, how, each))


def test_a_damaged_jpeg_gives_pillows_pixels_or_an_error_also_in_a_box(tmp_path):
    path, rng, failed = tmp_path / "x.jpg", np.random.default_rng(0), 0
    save_jpeg(scene(160, 120), path)
    whole = path.read_bytes()
    first = whole.index(b"\xff\xda") + 14
    for _ in range(150):
        damaged = bytearray(whole)
        at = int(rng.integers(first, len(whole) - 2))
        damaged[at : at + 2] = rng.integers(0, 256, 2, dtype=np.uint8).tobytes()
        path.write_bytes(damaged)
        try:
            wanted = by_pillow(path)[:50, :100]
        except OSError:
            failed += 1
            continue
        seen = images.open(path).resized((0, 0, 100, 50), (100, 50), "bilinear")
        np.testing.assert_array_equal(seen, wanted)
    assert failed < 150


def test_a_jpeg_that_lost_its_end_is_truncated_in_every_box(tmp_path):
    path = tmp_path / "x.jpg"
    save_jpeg(scene(160, 120), path)
    whole = path.read_bytes()
    for lost in (2, 30, len(whole) // 2):
        path.write_bytes(whole[:-lost])
        assert reason_of(path) == "truncated"
        with pytest.raises(ImageError, match="truncated"):
            images.open(path).resized((0, 0, 20, 10), (20, 10), "bilinear")


@pytest.mark.parametrize("mode", ["RGB", "CMYK"])
def test_a_jpeg_in_other_colours_is_decoded_by_pillow(tmp_path, mode):
    keep = {"keep_rgb": True} if mode == "RGB" else {}
    scene(40, 30).convert(mode).save(tmp_path / "x.jpg", **keep)
    assert isinstance(images.open(tmp_path / "x.jpg"), images.Pixels)
    np.testing.assert_array_equal(pixels(tmp_path / "x.jpg"), by_pillow(tmp_path / "x.jpg"))


def test_the_size_of_a_jpeg_is_checked_before_it_is_decoded(tmp_path, monkeypatch):
    scene(40, 3).save(tmp_path / "flat.jpg")
    scene(40, 30).save(tmp_path / "large.jpg")
    monkeypatch.setattr(images.simplejpeg, "decode_jpeg", lambda *a, **k: pytest.fail("decoded"))
    assert reason_of(tmp_path / "flat.jpg") == "too small"
    monkeypatch.setattr(image_files, "MAX_PIXELS", 1000)
    assert reason_of(tmp_path / "large.jpg") == "too large"


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize(
    "box, size",
    [
        ((3, 5, 203, 155), (64, 48)),
        ((3, 5, 40, 50), (64, 64)),
        ((0, 0, 300, 260), (224, 224)),
        ((10, 20, 74, 250), (64, 100)),
    ],
)
def test_a_box_is_resized_as_pillow_does_after_the_crop(interpolation, box, size):
    whole = scene(300, 260)
    seen = images.resize(np.asarray(whole), box, size, interpolation)
    wanted = whole.crop(box).resize(size, Image.Resampling[interpolation.upper()])
    apart = np.abs(seen.astype(int) - np.asarray(wanted))
    most, mean = (3, 0.3) if interpolation in ("bilinear", "bicubic") else (0, 0)
    assert apart.max() <= most and apart.mean() <= mean


# ---- damaged EXIF


def exif_bytes(*entries: tuple[int, int, int, bytes], tail: bytes = b"") -> bytes:
    """Big-endian EXIF with one directory of (tag, type, count, value or offset)."""
    rows = b"".join(struct.pack(">HHI4s", *entry) for entry in entries)
    return b"Exif\0\0MM\0*" + struct.pack(">IH", 8, len(entries)) + rows + bytes(4) + tail


TURNED = (0x0112, 3, 1, b"\0\6\0\0")
DAMAGED_EXIF = {  # -> the orientation that can be read of it
    "no byte order": (exif_bytes(TURNED).replace(b"MM", b"\xb4M"), 1),
    "cut off": (exif_bytes(TURNED)[:20], 1),
    "a directory beyond the end": (b"Exif\0\0MM\0*\x7f\0\0\0", 1),
    "an orientation of 99": (exif_bytes((0x0112, 3, 1, b"\0\x63\0\0")), 1),
    "an orientation of text": (exif_bytes((0x0112, 2, 4, b"six\0")), 1),
    "another tag of a wrong type": (
        exif_bytes(TURNED, (0x0142, 2, 16, struct.pack(">I", 38)), tail=b"Model of camera\0"), 6),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGED_EXIF)
@pytest.mark.parametrize("suffix", ["png", "webp", "jpg"])
def test_an_image_with_damaged_exif_is_decoded_and_an_unknown_orientation_is_upright(
    tmp_path, suffix, kind
):
    exif, orientation = DAMAGED_EXIF[kind]
    path = tmp_path / f"x.{suffix}"
    scene(40, 30).save(path, exif=exif, lossless=True)
    assert exif[6:] in path.read_bytes(), "the file has the damage"
    with Image.open(path) as image:
        stored = np.asarray(image.convert("RGB"))
    wanted = np.rot90(stored, -1) if orientation == 6 else stored
    np.testing.assert_array_equal(pixels(path), wanted)
    np.testing.assert_array_equal(image_files.read(path), wanted)
