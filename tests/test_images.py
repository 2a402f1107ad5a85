"""Any picture file comes out as the RGB a person sees, or as one error that names its fault."""

import errno
import pickle
import warnings

import numpy as np
import pytest
from conftest import save_noise
from PIL import Image, ImageFile

from workbench import images
from workbench.images import ImageError, decode

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
def test_a_picture_stored_without_loss_comes_out_as_it_was(tmp_path, suffix):
    Image.fromarray(SCENE).save(tmp_path / f"x.{suffix}", lossless=True)
    np.testing.assert_array_equal(pixels(tmp_path / f"x.{suffix}"), SCENE)


@pytest.mark.parametrize("suffix", ["jpg", "gif"])
def test_a_picture_stored_with_loss_comes_out_much_as_it_was(tmp_path, suffix):
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


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0"])
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
def test_half_a_file_is_never_half_a_picture(tmp_path, suffix):
    path = save_noise(tmp_path / f"x.{suffix}", seed=1, size=(64, 64))
    whole = path.read_bytes()
    decode(path)
    path.write_bytes(whole[: len(whole) // 2])
    assert reason_of(path) in ("truncated", "undecodable")


def test_half_a_jpeg_is_called_truncated(tmp_path):
    path = save_noise(tmp_path / "x.jpg", seed=1, size=(64, 64))
    path.write_bytes(path.read_bytes()[:-100])
    assert reason_of(path) == "truncated"


def test_damaged_bytes_give_a_picture_or_an_image_error_and_nothing_else(tmp_path):
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
def test_a_tiny_picture_is_too_small(tmp_path, size):
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

    monkeypatch.setattr(images.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(Image, "open", stumbling)
    assert decode(path).size == (40, 32)
    left[0] = 100
    assert reason_of(path) == "unreadable"


def test_an_image_error_travels_between_processes():
    error = pickle.loads(pickle.dumps(ImageError("truncated", "12 bytes missing")))
    assert (error.reason, error.detail) == ("truncated", "12 bytes missing")
    assert str(error) == "truncated: 12 bytes missing"
