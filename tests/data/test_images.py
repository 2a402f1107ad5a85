"""Any image file comes out as the RGB a person sees, or as one error that names its fault."""

import errno
import os
import pickle
import struct
import time
import warnings

import numpy as np
import pytest
from conftest import save_noise
from PIL import Image, ImageFile, ImageOps

from workbench import consumer
from workbench.data import images
from workbench.data.images import ImageError, decode

# 8 x 6 pixels: left half red, right half blue, top row white.
SCENE = np.zeros((6, 8, 3), np.uint8)
SCENE[:, :4, 0] = 255
SCENE[:, 4:, 2] = 255
SCENE[0] = 255


def pixels(path) -> np.ndarray:
    """What decode gives, with the promise of its mode checked."""
    image = decode(path)
    assert image.mode == "RGB"
    return np.asarray(image)


def mode_of(path) -> str:
    """How Pillow finds a file stored, so that a test knows it tests what it says."""
    with Image.open(path) as image:
        return image.mode


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "ppm", "webp"])
def test_a_image_stored_without_loss_comes_out_as_it_was(tmp_path, suffix):
    Image.fromarray(SCENE).save(tmp_path / f"x.{suffix}", lossless=True)
    np.testing.assert_array_equal(pixels(tmp_path / f"x.{suffix}"), SCENE)


@pytest.mark.parametrize("suffix", ["jpg", "gif"])
def test_a_image_stored_with_loss_comes_out_much_as_it_was(tmp_path, suffix):
    smooth = np.kron(SCENE, np.ones((8, 8, 1), np.uint8))
    Image.fromarray(smooth).save(tmp_path / f"x.{suffix}")
    assert np.abs(pixels(tmp_path / f"x.{suffix}").astype(int) - smooth).mean() < 6


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_every_exif_orientation_comes_out_upright(tmp_path, orientation, suffix):
    # How the sensor holds a scene that a viewer with this tag (EXIF 2.3, 4.6.4) sees upright.
    stored = {
        1: SCENE,
        2: SCENE[:, ::-1],
        3: SCENE[::-1, ::-1],
        4: SCENE[::-1],
        5: SCENE.transpose(1, 0, 2),
        6: np.rot90(SCENE, 1),
        7: SCENE[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(SCENE, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    large = np.kron(stored, np.ones((8, 8, 1), np.uint8))
    Image.fromarray(large).save(tmp_path / f"x.{suffix}", exif=exif, quality=95)
    seen = pixels(tmp_path / f"x.{suffix}")[4::8, 4::8]
    assert seen.shape == SCENE.shape
    assert np.abs(seen.astype(int) - SCENE).max() < 40


def test_grey_becomes_three_equal_channels(tmp_path):
    grey = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5
    Image.fromarray(grey).save(tmp_path / "x.png")
    np.testing.assert_array_equal(pixels(tmp_path / "x.png"), np.stack([grey] * 3, axis=2))


def test_one_bit_becomes_black_and_white(tmp_path):
    bits = (np.arange(48).reshape(6, 8) % 3 == 0) * np.uint8(255)
    Image.fromarray(bits).convert("1").save(tmp_path / "x.png")
    np.testing.assert_array_equal(pixels(tmp_path / "x.png"), np.stack([bits] * 3, axis=2))


GREY16 = np.linspace(0, 65535, 48).round().astype(np.uint16).reshape(6, 8)


@pytest.mark.parametrize("suffix", ["png", "tif", "big-endian.tif", "pgm"])
def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    if suffix == "pgm":
        path.write_bytes(b"P5\n8 6\n65535\n" + GREY16.astype(">u2").tobytes())
    elif suffix == "big-endian.tif":
        Image.frombytes("I;16B", (8, 6), GREY16.astype(">u2").tobytes()).save(path)
    else:
        Image.fromarray(GREY16).save(path)
    seen = pixels(path)
    np.testing.assert_array_equal(seen[..., 0], np.round(GREY16 / 257))
    np.testing.assert_array_equal(seen[..., 0], seen[..., 2])


def test_a_palette_becomes_its_colours(tmp_path):
    Image.fromarray(SCENE).convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "x.png")
    assert mode_of(tmp_path / "x.png") == "P"
    np.testing.assert_array_equal(pixels(tmp_path / "x.png"), SCENE)


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_cmyk_becomes_the_colours_it_prints(tmp_path, suffix):
    ink = np.zeros((64, 64, 4), np.uint8)
    ink[:32, :, 0] = 255  # cyan above
    ink[32:, :, 2] = 255  # yellow below
    Image.frombytes("CMYK", (64, 64), ink.tobytes()).save(tmp_path / f"x.{suffix}", quality=95)
    assert mode_of(tmp_path / f"x.{suffix}") == "CMYK"
    seen = pixels(tmp_path / f"x.{suffix}").astype(int)
    assert np.abs(seen[8, 8] - [0, 255, 255]).max() < 10
    assert np.abs(seen[56, 56] - [255, 255, 0]).max() < 10


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "L"])
def test_what_is_transparent_shows_white(tmp_path, mode):
    path = tmp_path / "x.png"
    if mode in ("RGBA", "LA"):
        image = Image.new(mode, (8, 6), (*[200] * (len(mode) - 1), 255))
        image.paste(tuple([90] * (len(mode) - 1) + [0]), (0, 0, 4, 6))
        image.save(path)
    elif mode == "P":
        image = Image.new("P", (8, 6), 1)
        image.putpalette([90, 90, 90, 200, 200, 200])
        image.paste(0, (0, 0, 4, 6))
        image.save(path, transparency=0)
    else:
        colour = {"RGB": ((200,) * 3, (90,) * 3), "L": (200, 90)}[mode]
        image = Image.new(mode, (8, 6), colour[0])
        image.paste(colour[1], (0, 0, 4, 6))
        image.save(path, transparency=colour[1])
    seen = pixels(path)
    np.testing.assert_array_equal(seen[3, 1], [255, 255, 255])
    np.testing.assert_array_equal(seen[3, 6], [200, 200, 200])


def test_half_transparent_mixes_with_white(tmp_path):
    Image.new("RGBA", (8, 6), (255, 0, 0, 128)).save(tmp_path / "x.png")
    np.testing.assert_allclose(pixels(tmp_path / "x.png")[0, 0], [255, 127, 127], atol=1)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_an_animation_gives_its_first_frame(tmp_path, suffix):
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue")]
    path = tmp_path / f"x.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:], lossless=True)
    np.testing.assert_array_equal(pixels(path)[3, 3], [255, 0, 0])


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_without_a_white_point_are_refused(tmp_path, mode):
    Image.new(mode, (8, 6), 3).save(tmp_path / "x.tif")
    with pytest.raises(ImageError, match="no defined white"):
        decode(tmp_path / "x.tif")


# ---- faults


def reason_of(path) -> str:
    with pytest.raises(ImageError) as caught:
        decode(path)
    assert caught.value.reason in images.REASONS
    assert str(caught.value).startswith(caught.value.reason + ": ") and caught.value.detail
    return caught.value.reason


def test_a_missing_file_is_missing(tmp_path):
    assert reason_of(tmp_path / "none.png") == "missing"


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0"])
def test_a_file_of_something_else_is_undecodable(tmp_path, content):
    (tmp_path / "x.png").write_bytes(content)
    assert reason_of(tmp_path / "x.png") in ("undecodable", "truncated")


def test_an_empty_file_is_called_empty(tmp_path):
    (tmp_path / "x.png").write_bytes(b"")
    with pytest.raises(ImageError, match="undecodable: empty file"):
        decode(tmp_path / "x.png")


def test_a_folder_is_unreadable(tmp_path):
    assert reason_of(tmp_path) == "unreadable"


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "gif", "tif", "webp", "ppm"])
def test_half_a_file_is_never_half_a_image(tmp_path, suffix):
    path = save_noise(tmp_path / f"x.{suffix}", seed=1, size=(64, 64))
    whole = path.read_bytes()
    decode(path)
    path.write_bytes(whole[: len(whole) // 2])
    assert reason_of(path) in ("truncated", "undecodable")


def test_half_a_jpeg_is_called_truncated(tmp_path):
    path = save_noise(tmp_path / "x.jpg", seed=1, size=(64, 64))
    path.write_bytes(path.read_bytes()[:-100])
    assert reason_of(path) == "truncated"


def test_damaged_bytes_give_a_image_or_an_image_error_and_nothing_else(tmp_path):
    rng = np.random.default_rng(0)
    for suffix in ("jpg", "png", "gif", "tif", "webp", "bmp"):
        path = save_noise(tmp_path / f"x.{suffix}", seed=2)
        whole = np.frombuffer(path.read_bytes(), np.uint8)
        for _ in range(25):
            damaged = whole.copy()
            where = rng.integers(0, len(damaged), 8)
            damaged[where] = rng.integers(0, 256, 8)
            path.write_bytes(damaged.tobytes())
            with images.quiet():
                try:
                    assert decode(path).mode == "RGB"
                except ImageError as error:
                    assert error.reason in images.REASONS


@pytest.mark.parametrize("size", [(1, 1), (3, 40), (40, 3)])
def test_a_tiny_image_is_too_small(tmp_path, size):
    Image.new("RGB", size).save(tmp_path / "x.png")
    assert reason_of(tmp_path / "x.png") == "too small"
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    assert decode(tmp_path / "x.png").size == (4, 4)


def test_a_decompression_bomb_is_too_large_and_never_unpacked(tmp_path, monkeypatch):
    Image.new("1", (12_000, 9_000)).save(tmp_path / "bomb.png")  # 108 million pixels in 1 kB
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("unpacked"))
    with images.quiet():
        assert reason_of(tmp_path / "bomb.png") == "too large"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert reason_of(tmp_path / "bomb.png") == "too large"


def test_a_passing_fault_of_the_disk_is_tried_again_and_a_lasting_one_is_named(
    tmp_path, monkeypatch
):
    path = save_noise(tmp_path / "x.png", seed=1)
    real, left = Image.open, [2]

    def stumbling(*arguments, **keywords):
        if left[0]:
            left[0] -= 1
            raise OSError(errno.EIO, "Input/output error")
        return real(*arguments, **keywords)

    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr(Image, "open", stumbling)
    assert decode(path).size == (40, 32)
    left[0] = 100
    assert reason_of(path) == "unreadable"


@pytest.mark.parametrize("fault", [errno.EMFILE, errno.ENFILE])
def test_too_many_open_files_are_no_fault_of_a_image(tmp_path, monkeypatch, fault):
    def refusing(*arguments):
        raise OSError(fault, os.strerror(fault))

    monkeypatch.setattr(os, "open", refusing)
    with pytest.raises(OSError, match="open files"):
        decode(save_noise(tmp_path / "x.png", seed=1))


def test_an_image_error_travels_between_processes():
    error = pickle.loads(pickle.dumps(ImageError("truncated", "12 bytes missing")))
    assert (error.reason, error.detail) == ("truncated", "12 bytes missing")
    assert str(error) == "truncated: 12 bytes missing"


# ---- JPEG, of which no more is decoded than is asked for

KINDS = {
    "4:4:4": dict(subsampling=0),
    "4:2:2": dict(subsampling=1),
    "4:2:0": dict(subsampling=2),
    "coarse": dict(quality=30, subsampling=2),
    "progressive": dict(progressive=True),
    "restarts": dict(restart_marker_rows=1, subsampling=2),
}


def scene(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours, edges and some grain, as a camera has them."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (max(2, height // 24), max(2, width // 24), 3), dtype=np.uint8)
    smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    grain = rng.normal(0, 4, (height, width, 1))
    return Image.fromarray(np.clip(np.asarray(smooth) + grain, 0, 255).astype(np.uint8))


def as_pillow_has_it(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize("size", [(64, 48), (61, 47), (4, 5), (16, 400)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_jpeg_comes_out_as_pillow_has_it_to_the_bit(tmp_path, kind, size):
    scene(*size).save(tmp_path / "x.jpg", **KINDS[kind])
    assert isinstance(images.open(tmp_path / "x.jpg"), images.Jpeg)
    np.testing.assert_array_equal(pixels(tmp_path / "x.jpg"), as_pillow_has_it(tmp_path / "x.jpg"))


def test_a_grey_jpeg_comes_out_as_pillow_has_it(tmp_path):
    scene(50, 40).convert("L").save(tmp_path / "x.jpg")
    assert isinstance(images.open(tmp_path / "x.jpg"), images.Jpeg)
    np.testing.assert_array_equal(pixels(tmp_path / "x.jpg"), as_pillow_has_it(tmp_path / "x.jpg"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_box_of_a_jpeg_is_that_box_of_the_whole(tmp_path, kind):
    scene(151, 203).save(tmp_path / "x.jpg", **KINDS[kind])
    whole, rng = as_pillow_has_it(tmp_path / "x.jpg"), np.random.default_rng(0)
    image = images.open(tmp_path / "x.jpg")
    for bottom in (1, 7, 8, 15, 16, 17, 31, 32, 33, 120, 190, 202, 203):
        left, top = int(rng.integers(0, 100)), int(rng.integers(0, bottom))
        box = (left, top, int(rng.integers(left + 1, 152)), bottom)
        size = (box[2] - left, bottom - top)
        wanted = whole[top:bottom, left : box[2]]
        np.testing.assert_array_equal(image.resized(box, size, "bilinear"), wanted)


def decoded_rows(monkeypatch) -> list[int]:
    """Notes the rows that simplejpeg is asked for from here on."""
    rows, decode_jpeg = [], images.simplejpeg.decode_jpeg
    monkeypatch.setattr(consumer, "decode", lambda file: pytest.fail("decoded by Pillow too"))

    def noting(raw, **how):
        rows.append(len(how["buffer"]))
        return decode_jpeg(raw, **how)

    monkeypatch.setattr(images.simplejpeg, "decode_jpeg", noting)
    return rows


def test_what_lies_below_a_box_is_not_decoded(tmp_path, monkeypatch):
    scene(100, 400).save(tmp_path / "x.jpg")
    rows = decoded_rows(monkeypatch)
    images.open(tmp_path / "x.jpg").resized((0, 0, 100, 90), (50, 50), "bilinear")
    assert rows == [96]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_box_of_a_turned_jpeg_counts_from_where_it_is_upright(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    scene(120, 90).save(tmp_path / "x.jpg", exif=exif)
    with Image.open(tmp_path / "x.jpg") as opened:
        upright = np.asarray(ImageOps.exif_transpose(opened))
    image = images.open(tmp_path / "x.jpg")
    assert (image.width, image.height) == upright.shape[1::-1]
    box = (10, 20, 50, 70)
    np.testing.assert_array_equal(image.resized(box, (40, 50), "bilinear"), upright[20:70, 10:50])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale, side", [(6, 60), (7.7, 40), (12, 40), (25, 24)])
def test_a_much_larger_image_is_decoded_at_a_smaller_scale_and_looks_the_same(
    tmp_path, monkeypatch, kind, scale, side, orientation
):
    """On average 0.6 of 255 levels at most from Pillow's resize of all the pixels."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    length = round(scale * side)
    large = scene(length // 4, length // 4, 3).resize((length + 3, length + 1))
    large.save(tmp_path / "x.jpg", exif=exif, **KINDS[kind])
    whole = decode(tmp_path / "x.jpg")
    rows = decoded_rows(monkeypatch)
    seen = images.open(tmp_path / "x.jpg").downscaled((side, side), "bilinear").astype(int)
    wanted = whole.resize((side, side), Image.Resampling.BILINEAR)
    assert np.abs(seen - np.asarray(wanted)).mean() <= 0.6
    factor = next(f for f in (8, 4, 2) if 3 * f <= scale)
    assert rows == [-(-(length + 1) // factor)]


@pytest.mark.parametrize(
    "interpolation", ["nearest", "bilinear", "bicubic", "hamming", "lanczos", "box"]
)
def test_every_filter_shrinks_within_1_5_of_255_of_pillow(tmp_path, interpolation):
    scene(240, 200, 3).resize((981, 801)).save(tmp_path / "x.jpg")
    seen = images.open(tmp_path / "x.jpg").downscaled((60, 50), interpolation).astype(int)
    kind = Image.Resampling[interpolation.upper()]
    wanted = decode(tmp_path / "x.jpg").resize((60, 50), kind)
    assert np.abs(seen - np.asarray(wanted)).mean() <= 1.5


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_a_jpeg_that_only_pillow_forgives_shrinks_as_pillow_has_it(
    tmp_path, monkeypatch, orientation
):
    exif = Image.Exif()
    exif[0x0112] = orientation
    scene(240, 200, 3).resize((1003, 805)).save(tmp_path / "x.jpg", exif=exif)
    wanted = decode(tmp_path / "x.jpg").resize((33, 33), Image.Resampling.LANCZOS)

    def complaining(raw, **how):
        raise ValueError("Corrupt JPEG data: 4 extraneous bytes before marker 0xd9")

    monkeypatch.setattr(images.simplejpeg, "decode_jpeg", complaining)
    image = images.open(tmp_path / "x.jpg")
    np.testing.assert_array_equal(image.downscaled((33, 33), "lanczos"), wanted)


@pytest.mark.parametrize("fill", [1, 2, 5])
def test_fill_bytes_before_a_marker_hide_nothing(tmp_path, fill):
    """ITU-T T.81, B.1.1.2: any marker may be preceded by bytes of 0xFF."""
    exif = Image.Exif()
    exif[0x0112] = 6
    scene(160, 120).save(tmp_path / "x.jpg", exif=exif)
    raw = (tmp_path / "x.jpg").read_bytes()
    for marker in (b"\xff\xe1", b"\xff\xdb", b"\xff\xc0", b"\xff\xda"):
        at = raw.index(marker)
        (tmp_path / "x.jpg").write_bytes(raw[:at] + fill * b"\xff" + raw[at:])
        with Image.open(tmp_path / "x.jpg") as image:
            upright = np.asarray(ImageOps.exif_transpose(image))
        np.testing.assert_array_equal(pixels(tmp_path / "x.jpg"), upright)


def test_a_jpeg_with_restarts_is_decoded_once(tmp_path, monkeypatch):
    scene(160, 120).save(tmp_path / "x.jpg", restart_marker_rows=1)
    rows = decoded_rows(monkeypatch)
    images.open(tmp_path / "x.jpg").resized((0, 0, 50, 20), (50, 20), "bilinear")
    assert rows == [120]


@pytest.mark.parametrize("kind", ["bilinear", "bicubic", "lanczos", "box", "hamming", "nearest"])
@pytest.mark.parametrize("name", KINDS)
def test_an_exact_resize_is_pillows_of_the_whole_image(tmp_path, name, kind):
    """To the bit, also where Pillow resizes the height first, and the filter looks beyond a box."""
    scene(300, 400).save(tmp_path / "x.jpg", **KINDS[name])
    scene(300, 400).convert("L").save(tmp_path / "y.jpg", **KINDS[name])
    rng = np.random.default_rng(0)
    for path in (tmp_path / "x.jpg", tmp_path / "y.jpg"):
        image, whole = images.open(path), decode(path)
        for size in ((50, 40), (20, 90), (300, 300), (400, 30), (5, 250)):
            left, top = rng.uniform(0, (250, 300))
            box = (left, top, left + rng.uniform(20, 50), top + rng.uniform(20, 100))
            corner = (0, 0, min(300, size[0]), min(400, size[1]))
            for each in (box, corner, (0, 0, 300, 400), (0, 0, 300, int(top) + 1)):
                seen = image.resized(each, size, kind, exact=True)
                wanted = whole.resize(size, Image.Resampling[kind.upper()], each)
                np.testing.assert_array_equal(seen, wanted)


@pytest.mark.parametrize(
    "kind, bottom, high, rows",
    [
        ("nearest", 96, 6, 112),
        ("box", 96, 6, 112),
        ("bilinear", 96, 6, 128),
        ("hamming", 96, 6, 128),
        ("bicubic", 96, 6, 144),
        ("lanczos", 96, 6, 160),
        ("bilinear", 93, 200, 96),
    ],
)
def test_an_exact_resize_decodes_what_its_filter_reaches(
    tmp_path, monkeypatch, kind, bottom, high, rows
):
    """Below the box 0 to 3 rows of the result, of 16 each, or of one where it is enlarged; two
    more, for the colours; in whole blocks of 16."""
    scene(100, 400).save(tmp_path / "x.jpg")
    decoded = decoded_rows(monkeypatch)
    images.open(tmp_path / "x.jpg").resized((0, 0, 100, bottom), (20, high), kind, exact=True)
    assert decoded == [rows]


def test_a_damaged_jpeg_gives_pillows_pixels_or_an_error_also_in_a_box(tmp_path):
    """Whatever the decoder complains of above the lower edge of the box is heard."""
    scene(160, 120).save(tmp_path / "x.jpg")
    whole, rng = (tmp_path / "x.jpg").read_bytes(), np.random.default_rng(0)
    first = whole.index(b"\xff\xda") + 14
    path, heard = tmp_path / "y.jpg", 0
    for _ in range(150):
        damaged = bytearray(whole)
        at = int(rng.integers(first, len(whole) - 2))
        damaged[at : at + 2] = rng.integers(0, 256, 2, dtype=np.uint8).tobytes()
        path.write_bytes(damaged)
        try:
            wanted = as_pillow_has_it(path)[:50, :100]
        except OSError:
            heard += 1
            continue
        seen = images.open(path).resized((0, 0, 100, 50), (100, 50), "bilinear")
        np.testing.assert_array_equal(seen, wanted)
    path.write_bytes(whole[: first + 200])
    with pytest.raises(ImageError, match="truncated"):
        images.open(path).resized((0, 0, 100, 100), (10, 10), "bilinear")
    assert heard < 150


def test_a_jpeg_that_lost_its_end_is_truncated_in_every_box(tmp_path):
    scene(160, 120).save(tmp_path / "x.jpg")
    whole = (tmp_path / "x.jpg").read_bytes()
    for lost in (1, 2, 30, len(whole) // 2):
        (tmp_path / "x.jpg").write_bytes(whole[:-lost])
        if reason_of(tmp_path / "x.jpg") != "truncated":  # Pillow forgives a missing last byte
            continue
        with pytest.raises(ImageError, match="truncated"):
            images.open(tmp_path / "x.jpg").resized((0, 0, 20, 10), (20, 10), "bilinear")


@pytest.mark.parametrize("mode", ["RGB", "CMYK"])
def test_a_jpeg_in_other_colours_is_left_to_pillow(tmp_path, mode):
    keep = {"keep_rgb": True} if mode == "RGB" else {}
    scene(40, 30).convert(mode).save(tmp_path / "x.jpg", **keep)
    assert isinstance(images.open(tmp_path / "x.jpg"), images.Pixels)
    np.testing.assert_array_equal(pixels(tmp_path / "x.jpg"), as_pillow_has_it(tmp_path / "x.jpg"))


def test_a_jpeg_is_judged_by_its_header_before_it_is_decoded(tmp_path, monkeypatch):
    scene(40, 3).save(tmp_path / "flat.jpg")
    monkeypatch.setattr(images.simplejpeg, "decode_jpeg", lambda *a, **k: pytest.fail("decoded"))
    assert reason_of(tmp_path / "flat.jpg") == "too small"
    monkeypatch.setattr(consumer, "MAX_PIXELS", 1000)
    scene(40, 30).save(tmp_path / "large.jpg")
    assert reason_of(tmp_path / "large.jpg") == "too large"


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos", "box"])
def test_a_box_is_resized_as_pillow_does_after_cutting_it_out(interpolation):
    """Mean difference on a photograph far below the 1.5 of 255 that are allowed."""
    whole = scene(300, 260)
    for box, size in [
        ((3, 5, 203, 155), (64, 48)),
        ((3, 5, 40, 50), (64, 64)),
        ((0, 0, 300, 260), (224, 224)),
        ((10, 20, 74, 250), (64, 100)),
    ]:
        seen = images.resize(np.asarray(whole), box, size, interpolation)
        wanted = whole.crop(box).resize(size, Image.Resampling[interpolation.upper()])
        apart = np.abs(seen.astype(int) - np.asarray(wanted))
        if interpolation in ("bilinear", "bicubic"):
            assert apart.max() <= 3 and apart.mean() <= 0.3
        else:
            assert apart.max() == 0


def test_a_box_of_the_size_asked_for_is_the_very_pixels():
    whole = np.asarray(scene(40, 30))
    assert np.shares_memory(images.resize(whole, (5, 5, 25, 25), (20, 20)), whole)


def exif_bytes(*entries: tuple[int, int, int, bytes], tail: bytes = b"") -> bytes:
    """Big-endian EXIF with one directory of (tag, type, count, value or offset)."""
    rows = b"".join(struct.pack(">HHI4s", *entry) for entry in entries)
    return b"Exif\0\0MM\0*" + struct.pack(">IH", 8, len(entries)) + rows + bytes(4) + tail


TURNED = (0x0112, 3, 1, b"\0\6\0\0")
DAMAGED_EXIF = {  # -> the orientation that can be read of it
    "no byte order": (exif_bytes(TURNED).replace(b"MM", b"\xb4M"), 1),
    "no mark of a TIFF": (exif_bytes(TURNED).replace(b"MM\0*", b"MM\xa5*"), 1),
    "cut off": (exif_bytes(TURNED)[:20], 1),
    "a directory beyond the end": (b"Exif\0\0MM\0*\x7f\0\0\0", 1),
    "an orientation of 99": (exif_bytes((0x0112, 3, 1, b"\0\x63\0\0")), 1),
    "an orientation of text": (exif_bytes((0x0112, 2, 4, b"six\0")), 1),
    "another tag of a wrong type": (
        exif_bytes(TURNED, (0x0142, 2, 16, struct.pack(">I", 38)), tail=b"Model of camera\0"), 6),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGED_EXIF)
@pytest.mark.parametrize("suffix", ["png", "webp", "jpg"])
def test_damaged_exif_costs_no_image_and_an_unknown_orientation_is_upright(tmp_path, suffix, kind):
    exif, orientation = DAMAGED_EXIF[kind]
    path = tmp_path / f"x.{suffix}"
    scene(40, 30).save(path, exif=exif, lossless=True)
    assert exif[6:] in path.read_bytes(), "the file holds the damage"
    with images.quiet():
        stored = as_pillow_has_it(path)
        wanted = np.rot90(stored, -1) if orientation == 6 else stored
        np.testing.assert_array_equal(pixels(path), wanted)
        np.testing.assert_array_equal(consumer.read(path), wanted)
        np.testing.assert_array_equal(consumer.upright(Image.open(path)), wanted)


@pytest.mark.parametrize(
    "error",
    [SyntaxError, RuntimeError, struct.error, ValueError, OverflowError, TypeError, IndexError,
     AttributeError, KeyError, AssertionError, EOFError, MemoryError, ZeroDivisionError,
     Image.DecompressionBombError],
)  # fmt: skip
def test_whatever_a_decoder_raises_is_an_image_error_in_training_and_in_the_shipped_script(
    tmp_path, monkeypatch, error
):
    def raising(self):
        raise error("of a damaged file")

    path = save_noise(tmp_path / "x.png", seed=1)
    monkeypatch.setattr(ImageFile.ImageFile, "load", raising)
    for read in (decode, consumer.read):
        with pytest.raises(ImageError, match="of a damaged file"):
            read(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.jpg")
    assert reason_of(tmp_path / "x.jpg") == "unreadable"
    with pytest.raises(ImageError, match="unreadable"):
        consumer.read(tmp_path / "x.jpg")
