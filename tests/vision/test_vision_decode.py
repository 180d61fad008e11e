"""Pictures: every format becomes upright RGB, every broken one and what is none a clear line."""

import base64
import codecs
import gzip
import inspect
import io
import os
import struct
import subprocess
import sys
import threading
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from goose_mm.vision.decode import MAX_PIXELS, image_digest, load_image


def photo(width=75, height=50):
    """A smooth RGB picture with detail, the same every time."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    channels = [120 + 100 * np.sin(x / 3 + y / 7), 2 * x + y, 128 + 90 * np.cos(x * y / 90)]
    return Image.fromarray(np.stack(channels, -1).clip(0, 255).astype(np.uint8))


def as_bytes(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


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


def test_8_bit_greys_in_a_wider_type_keep_theirs():
    values = np.arange(256).reshape(16, 16)
    short, long = Image.fromarray(np.uint16(values)), Image.fromarray(np.int32(values))
    for wide in (np.uint16(values), short, long, as_bytes(short, "PNG"), as_bytes(long, "TIFF")):
        assert (np.asarray(load_image(wide))[..., 0] == values).all()


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
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "AVIF", "BMP", "PPM", "ICO"):
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


def heic(image, **options):
    pillow_heif = pytest.importorskip("pillow_heif")
    file = io.BytesIO()
    pillow_heif.from_pillow(image).save(file, **options)
    return file.getvalue()


@pytest.mark.parametrize("make", [heic, lambda image, **o: as_bytes(image, "AVIF", **o)])
def test_what_phones_and_browsers_save_is_read(make):
    half = Image.new("RGB", (64, 32), "black")
    half.paste("white", (0, 0, 64, 16))
    upright = np.asarray(load_image(make(half, quality=90))).mean(-1)
    assert upright.shape == (32, 64) and upright[:14].min() > 240 and upright[18:].max() < 15
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    turned = np.asarray(load_image(make(half, quality=90, exif=exif.tobytes()))).mean(-1)
    assert turned.shape == (64, 32) and turned[:, 18:].min() > 240 and turned[:, :14].max() < 15
    clear = half.copy()
    clear.putalpha(0)
    assert np.asarray(load_image(make(clear))).min() > 250
    whole = make(photo())
    for damaged in (whole[:40], whole[: len(whole) // 2]):
        with pytest.raises(ValueError, match="damaged"):
            load_image(damaged)


def test_heic_without_its_library_names_it(monkeypatch):
    whole = heic(photo())
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ValueError, match=r"is HEIC, .*pip install 'goose-mm\[heif\]'"):
        load_image(whole)


SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'


XML = f'<?xml version="1.0"?>\n<!-- by hand -->\n<!DOCTYPE svg [<!ENTITY a "b">]>{SVG}'


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "an empty file"),
        (bytes(4096), "zeros alone"),
        (SVG.encode(), "an SVG drawing; .*rsvg-convert"),
        (XML.encode(), "an SVG"),
        (codecs.BOM_UTF8 + SVG.encode(), "an SVG"),
        (SVG.encode("utf-16"), "an SVG"),
        (gzip.compress(SVG.encode()), "a packed file"),
        (f"<!DOCTYPE html>\n<html><body>{SVG}</body></html>".encode(), "a web page"),
        (b"<!-- cached -->\n<HTML><head>", "a web page"),
        (b'{"error": "no such picture"}', "JSON"),
        ("schön ".encode() * 900, "a text file"),  # a character is cut where reading ends
        (base64.b64encode(as_bytes(photo())), "a picture written as text"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1\n", "git lfs pull"),
        (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "a PDF document; .*pdftoppm"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "a PostScript drawing"),
        (b"\0\0\0\x20ftypisom\0\0\x02\0isomiso2avc1mp41", "a video; .*ffmpeg"),
        (b"\0\0\0\x14ftypqt  \0\0\0\0qt  ", "a video"),
        (b"\x1aE\xdf\xa3\x9fB\x86\x81\x01", "a video"),
        (b"RIFF\x24\0\0\0WAVEfmt ", "a sound"),
        (b"PK\x03\x04\x14\0", "a ZIP archive"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "a JPEG XL file"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_is_no_picture_is_called_by_its_name(data, said, tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"picture.png is no image but .*{said}") as caught:
        load_image(path)
    assert len(str(caught.value)) < 300


def test_a_picture_in_a_data_address_is_read():
    text = base64.b64encode(as_bytes(photo())).decode()
    lines = "\n".join(text[i : i + 76] for i in range(0, len(text), 76))
    for address in (f"data:image/png;base64,{text}", f"data:;base64,{lines}"):
        assert image_digest(load_image(address)) == image_digest(photo())
    for address, said in [
        (f"data:image/png;base64,{text[:-3]}", "data: address of"),
        (f"data:image/png;base64,{text[:400]}", "damaged"),
        ("data:image/svg+xml;utf8,%3Csvg%20/%3E", "an SVG drawing"),
        ("data:", "an empty file"),
    ]:
        with pytest.raises(ValueError, match=said) as caught:
            load_image(address)
        assert len(str(caught.value)) < 300
    with pytest.raises(FileNotFoundError) as caught:  # the same without the address
        load_image(text)
    assert len(str(caught.value)) < 300


def test_a_pipe_is_read(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_bytes, args=[as_bytes(photo())])
    writer.start()
    assert image_digest(load_image(path)) == image_digest(photo())
    writer.join()


def test_what_cannot_be_a_picture_is_refused():
    unchecked = inspect.unwrap(load_image)  # without the types that pytest checks
    for other in (None, 3, [photo()]):
        with pytest.raises(ValueError, match=r"not (NoneType|int|list); a tensor \[B, 3, H, W\]"):
            unchecked(other)


def test_decoding_needs_no_torch():
    code = "import sys; from goose_mm.vision import load_image; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
