"""Pictures: every format becomes upright RGB, every broken one a clear line, resizing is right."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

from goose_mm.config import EncoderSpec
from goose_mm.vision.preprocess import MAX_PIXELS, image_digest, load_image, normalise, transform

STATISTICS = {"mean": (0.48, 0.46, 0.41), "std": (0.27, 0.26, 0.28)}


def photo(width=75, height=50):
    """A smooth RGB picture with detail, the same every time."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    channels = [120 + 100 * np.sin(x / 3 + y / 7), 2 * x + y, 128 + 90 * np.cos(x * y / 90)]
    return Image.fromarray(np.stack(channels, -1).clip(0, 255).astype(np.uint8))


def as_bytes(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("name", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(75, 50), (33, 90), (64, 64), (20, 15)])
def test_squash_and_crop_agree_with_torchvision(name, size):
    image, mode = photo(*size), InterpolationMode[name.upper()]
    end = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(**STATISTICS)]
    peers = {
        "squash": v2.Compose([v2.Resize((48, 48), mode), *end]),
        "crop": v2.Compose([v2.Resize(48, mode), v2.CenterCrop(48), *end]),
    }
    for resize, peer in peers.items():
        spec = EncoderSpec(image_size=48, resize=resize, interpolation=name, **STATISTICS)
        ours = transform([image], spec)[0]
        step = 1 / 255 / min(STATISTICS["std"])  # one of 255 grey levels: cropping may round
        torch.testing.assert_close(
            ours, peer(image), atol=1e-5 if resize == "squash" else step, rtol=0
        )


def test_letterbox_keeps_the_aspect_and_fills_with_the_mean():
    spec = EncoderSpec(image_size=60, resize="letterbox", **STATISTICS)
    out = transform([photo(75, 50)], spec)[0]
    assert out[:, :10].abs().max() < 0.01 and out[:, 50:].abs().max() < 0.01
    inner = transform([photo(75, 50).resize((60, 40), Image.Resampling.BICUBIC)], spec)[0]
    torch.testing.assert_close(out, inner)
    assert transform([photo(1, 500)], spec).shape == (1, 3, 60, 60)


def test_a_very_long_picture_is_cropped_without_blowing_up():
    spec = EncoderSpec(image_size=448, resize="crop")
    assert transform([Image.new("RGB", (1_000_000, 1), "red")], spec).shape == (1, 3, 448, 448)


def test_the_tensor_path_equals_the_picture_path():
    spec = EncoderSpec(image_size=48, **STATISTICS)
    pixels = torch.from_numpy(np.array(photo(48, 48))).permute(2, 0, 1)[None]
    torch.testing.assert_close(normalise(pixels, spec), transform([photo(48, 48)], spec))
    larger = torch.from_numpy(np.array(photo(96, 80))).permute(2, 0, 1)[None]
    off = (normalise(larger, spec) - transform([photo(96, 80)], spec)).abs()
    assert off.max() < 2.5 / 255 / min(STATISTICS["std"])
    with pytest.raises(ValueError, match="crop needs square tensors, got 80 x 96"):
        normalise(larger, EncoderSpec(image_size=48, resize="crop"))


def test_exif_orientation_is_applied():
    image = Image.new("RGB", (40, 20), "black")
    image.paste("white", (0, 0, 40, 10))  # the upper half is white
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    upright = load_image(as_bytes(image, "JPEG", exif=exif, quality=95))
    assert upright.size == (20, 40)
    assert upright.getpixel((15, 20))[0] > 250 and upright.getpixel((5, 20))[0] < 5


@pytest.mark.filterwarnings("error")
def test_a_broken_exif_block_only_loses_the_rotation():
    data = as_bytes(photo(), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01\x03\0")
    assert load_image(data).size == (75, 50)


def test_transparency_is_laid_on_white():
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert load_image(clear).getpixel((0, 0)) == (255, 255, 255)
    half = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    assert load_image(half).getpixel((0, 0)) == (127, 127, 127)
    assert load_image(Image.new("LA", (4, 4), (0, 0))).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    assert load_image(as_bytes(palette)).getpixel((0, 0)) == (10, 200, 30)
    assert load_image(as_bytes(palette, transparency=1)).getpixel((0, 0)) == (255, 255, 255)


def test_every_colour_mode_becomes_rgb():
    cmyk = load_image(as_bytes(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95))
    red, green, blue = cmyk.getpixel((4, 4))
    assert red > 230 and green < 25 and blue < 25
    for mode in ("1", "L", "YCbCr", "HSV"):
        assert load_image(photo().convert(mode)).mode == "RGB"
    with pytest.raises(ValueError, match="32-bit floats"):
        load_image(Image.new("F", (4, 4)))


def test_16_bit_greys_keep_their_shades():
    values = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    expected = [0, 1, 128, 255]
    from_png = load_image(as_bytes(Image.fromarray(values)))
    assert np.asarray(from_png)[0, :, 0].tolist() == expected
    assert np.asarray(load_image(values))[0, :, 1].tolist() == expected
    assert (
        np.asarray(load_image(Image.fromarray(values.astype(np.int32))))[0, :, 2].tolist()
        == expected
    )


def test_the_first_frame_of_an_animation_is_read():
    frames = [Image.new("RGB", (6, 6), colour) for colour in ("red", "lime", "blue")]
    for kind in ("GIF", "PNG", "WEBP", "TIFF", "MPO"):
        data = as_bytes(
            frames[0], kind, save_all=True, append_images=frames[1:], lossless=True, quality=95
        )
        red, green, blue = load_image(data).getpixel((3, 3))
        assert red > 250 and green < 5 and blue < 5, kind


def test_paths_bytes_images_and_arrays_are_the_same_picture(tmp_path):
    path = tmp_path / "photo.png"
    photo().save(path)
    array = np.array(photo())
    forms = [path, str(path), path.read_bytes(), photo(), array, array[..., ::1] / 255.0]
    assert len({image_digest(load_image(form)) for form in forms}) == 1
    assert image_digest(photo()) != image_digest(photo().rotate(180))
    grey = np.zeros((5, 7, 1), dtype=np.uint8)
    assert load_image(grey).size == (7, 5)


def png_header(width, height):
    """A PNG that claims a size, with next to no data behind it."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99))


@pytest.mark.parametrize("side", [40_000, 9_000])  # beyond and below Pillow's own error
def test_a_decompression_bomb_is_refused_from_its_header(side):
    limit, before = Image.MAX_IMAGE_PIXELS, warnings.filters.copy()
    with pytest.raises(ValueError, match="more than 64 million pixels"):
        load_image(png_header(side, side))
    assert limit == Image.MAX_IMAGE_PIXELS and warnings.filters == before
    assert side * side > MAX_PIXELS


@pytest.mark.filterwarnings("error")
def test_broken_files_are_one_clear_line(tmp_path):
    png, jpeg = as_bytes(photo()), as_bytes(photo(), "JPEG")
    broken = {
        "truncated.png": png[: len(png) // 2],
        "truncated.jpg": jpeg[: len(jpeg) // 2],
        "header_only.png": png[:20],
        "empty.png": b"",
        "text.png": b"I am not a picture.\n" * 20,
        "flipped.png": png[:60] + bytes(255 - b for b in png[60:120]) + png[120:],
        "postscript.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
    }
    for name, data in broken.items():
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(ValueError) as caught:
            load_image(path)
        assert name in str(caught.value) and "\n" not in str(caught.value), name
    with pytest.raises(FileNotFoundError, match=r"image not found: .*nothing\.png"):
        load_image(tmp_path / "nothing.png")
    with pytest.raises(ValueError, match="folder"):
        load_image(tmp_path)


def test_damaged_bytes_never_raise_anything_but_value_error():
    rng = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "PPM", "ICO"):
        whole = np.frombuffer(as_bytes(photo(), kind), np.uint8)
        for _ in range(30):
            data = whole.copy()
            places = rng.integers(0, len(data), 6)
            data[places] = rng.integers(0, 256, 6)
            try:
                assert load_image(data[: rng.integers(1, 2 * len(data))].tobytes()).mode == "RGB"
            except ValueError as error:
                assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((0, 4, 3), np.uint8), r"\[0, 4, 3\]"),
        (np.zeros((3, 8, 8), np.uint8), r"\[3, 8, 8\]"),
        (np.zeros(12, np.uint8), r"\[12\]"),
        (np.zeros((4, 4, 3), np.int64), "int64"),
        (np.full((4, 4, 3), 2.0), r"0\.\.1"),
        (np.full((4, 4, 3), np.nan), r"0\.\.1"),
        (Image.new("RGB", (0, 5)), "no pixels"),
    ],
)
def test_unusable_arrays_are_refused(array, message):
    with pytest.raises(ValueError, match=message):
        load_image(array)
