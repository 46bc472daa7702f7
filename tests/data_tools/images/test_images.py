"""Decoding images of unknown origin: every pixel format to RGB, limits, damage."""

import io
import struct
import zlib

import numpy as np
import pytest
from make_sources import encoded, some_image
from PIL import Image

from data_tools.images.decode import BadImage, ImageLimits, decode, encode, open_file, resize, sniff

RED = (200, 30, 40)


def test_what_is_wrong_with_an_image_is_one_sentence(tmp_path):
    (tmp_path / "notes.png").write_text("hello there")
    with pytest.raises(ValueError) as error:
        open_file(tmp_path / "notes.png")
    reason = "not an image: the first bytes are b'hello th'"
    assert str(error.value) == f"{tmp_path / 'notes.png'} is no readable image: {reason}"
    assert str(BadImage("undecodable")) == "undecodable"


def reason(data, **limits):
    with pytest.raises(BadImage) as error:
        decode(data, ImageLimits(**limits))
    return error.value.reason


def png_header(width, height):
    """A PNG that promises width x height and holds almost nothing."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "bmp", "tiff", "avif"])
def test_every_format_is_recognised_and_decoded(suffix):
    data = some_image(3, (40, 30), suffix)
    assert sniff(data) == suffix
    image = decode(data)
    assert image.mode == "RGB" and image.size == (40, 30)
    difference = np.abs(np.asarray(image, int) - np.asarray(decode(some_image(3, (40, 30), "png")), int))
    assert difference.mean() < 8


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr"])
def test_pixel_formats_become_rgb(mode):
    suffix = "jpg" if mode in ("CMYK", "YCbCr") else "png"
    colour = Image.new("RGB", (16, 16), RED).convert(mode)
    pixel = np.asarray(decode(encoded(colour, suffix)))[8, 8].astype(int)
    expected = np.array(colour.convert("RGB").getpixel((8, 8)))
    assert np.abs(pixel - expected).max() < 12


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparent_pixels_are_white(mode):
    image = Image.new("RGBA", (16, 16), (*RED, 0))
    image.paste((*RED, 255), (0, 0, 8, 16))
    if mode == "PA":
        image = image.convert("RGB").quantize(4)
        image.info["transparency"] = image.getpixel((0, 0))
        pixels = np.asarray(decode(encoded(image, "png", transparency=image.info["transparency"])))
        assert pixels[8, 2].tolist() == [255, 255, 255]
        return
    pixels = np.asarray(decode(encoded(image.convert(mode), "png")))
    assert pixels[8, 12].tolist() == [255, 255, 255] and pixels[8, 2].tolist() != [255, 255, 255]


def test_16_bit_grey_keeps_its_high_byte():
    grey = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    pixels = np.asarray(decode(encoded(Image.fromarray(grey), "png")))
    assert (pixels[..., 0] == grey >> 8).all()


def test_floating_point_pixels_are_refused():
    assert reason(encoded(Image.new("F", (8, 8), 0.5), "tiff")) == "unsupported_mode"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation):
    from PIL import ImageOps

    image = Image.fromarray(np.arange(16 * 8 * 3, dtype=np.uint8).reshape(8, 16, 3))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(image, "png", exif=exif)
    with Image.open(io.BytesIO(data)) as reference:
        expected = np.asarray(ImageOps.exif_transpose(reference))
    assert (np.asarray(decode(data)) == expected).all()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_beside_sound_pixels_is_ignored():
    data = encoded(Image.new("RGB", (16, 16), RED), "jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert decode(data).size == (16, 16)


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (12, 12), RED), Image.new("RGB", (12, 12), (0, 0, 255))]
    for suffix in ("gif", "webp", "png"):
        data = encoded(frames[0], suffix, save_all=True, append_images=frames[1:])
        assert np.abs(np.asarray(decode(data))[5, 5].astype(int) - RED).max() < 12


def test_a_decompression_bomb_is_refused_before_memory_is_taken():
    import tracemalloc

    tracemalloc.start()
    assert reason(png_header(20_000, 20_000)) == "too_many_pixels"
    assert reason(png_header(2**31 - 1, 2**31 - 1)) == "too_many_pixels"
    assert reason(some_image(1, (100, 100)), max_pixels=9_999) == "too_many_pixels"
    assert tracemalloc.get_traced_memory()[1] < 5e6
    tracemalloc.stop()


def test_limits():
    assert reason(some_image(1), max_image_bytes=10) == "image_too_large"
    assert reason(some_image(1, (40, 30)), min_side=31) == "image_too_small"
    assert reason(some_image(1, (91, 30)), max_aspect=3) == "aspect_ratio"
    assert decode(some_image(1, (90, 30)), ImageLimits(max_aspect=3, min_side=30)).size == (90, 30)
    with pytest.raises(ValueError, match="min_side"):
        ImageLimits(min_side=-1)


def test_damage_has_its_reason():
    data = some_image(1, (100, 100))
    assert reason(b"") == "empty_image"
    assert reason("这不是图片".encode() * 10) == "not_an_image"
    assert reason(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n") == "not_an_image"
    assert reason(data[: len(data) // 2]) == "truncated_image"
    assert reason(data[:20]) in ("undecodable", "truncated_image")
    assert reason(png_header(100, 100)) in ("undecodable", "truncated_image")


def test_square_crops_the_middle():
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:, 20:60] = 255
    square = resize(Image.fromarray(pixels), "square", 20)
    assert square.size == (20, 20) and np.asarray(square)[:, 1:-1].min() >= 250


def test_pad_shows_the_whole_on_white():
    padded = resize(Image.new("RGB", (40, 80), RED), "pad", 20)
    pixels = np.asarray(padded)
    assert padded.size == (20, 20) and (pixels[:, :5] == 255).all() and (pixels[:, 5:15] == RED).all()


def test_longest_never_enlarges():
    assert resize(Image.new("RGB", (40, 80)), "longest", 20).size == (10, 20)
    assert resize(Image.new("RGB", (40, 80)), "longest", 200).size == (40, 80)
    assert resize(Image.new("RGB", (3, 8000)), "longest", 100).size == (1, 100)
    assert resize(Image.new("RGB", (40, 80)), "keep", 20).size == (40, 80)
    with pytest.raises(ValueError, match="crop"):
        resize(Image.new("RGB", (4, 4)), "crop", 20)


def test_half_size_decoding_agrees_with_full_decoding():
    y, x = np.mgrid[0:600, 0:800]
    waves = 127 + 60 * np.sin(x / 40) + 60 * np.cos(y / 30)
    data = encoded(Image.fromarray(waves.astype(np.uint8)).convert("RGB"), "jpg", quality=95)
    assert decode(data, near=100).size == (200, 150)
    fast = np.asarray(resize(decode(data, near=128), "square", 64), int)
    full = np.asarray(resize(decode(data), "square", 64), int)
    assert np.abs(fast - full).mean() < 1.5


def test_encoding_is_the_same_each_time_and_quality_matters():
    image = decode(some_image(1, (64, 64), "png"))
    for image_format in ("webp", "jpg", "png"):
        assert (
            encode(image, image_format) == encode(image, image_format)
            and sniff(encode(image, image_format)) == image_format
        )
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    assert len(encode(noise, "webp", 30)) < len(encode(noise, "webp", 95))
    assert (np.asarray(decode(encode(noise, "png"))) == np.asarray(noise)).all()
    with pytest.raises(ValueError, match="gif"):
        encode(image, "gif")


def test_no_metadata_of_the_source_is_carried_over():
    exif = Image.Exif()
    exif[0x010E] = "secret place"
    data = encoded(Image.new("RGB", (16, 16), RED), "jpg", exif=exif, comment=b"secret")
    assert b"secret" in data and b"secret" not in encode(decode(data), "jpg") + encode(decode(data), "webp")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "bmp", "tiff", "avif"])
def test_damaged_bytes_are_a_bad_image_and_nothing_else(suffix, caplog):
    rng, outcomes, data = np.random.default_rng(5), {"ok": 0, "bad": 0}, some_image(2, (40, 32), suffix)
    for case in range(150):
        damaged = bytearray(data)
        for place in rng.integers(0, len(data) if case % 2 else 100, rng.choice([1, 3, 20])):
            damaged[place] = rng.integers(256)
        try:
            outcomes["ok"] += decode(bytes(damaged), ImageLimits(max_pixels=1_000_000)).mode == "RGB"
        except BadImage:
            outcomes["bad"] += 1
    assert sum(outcomes.values()) == 150 and outcomes["bad"] > 10
