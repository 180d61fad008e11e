"""What a file is that is no picture, read off its first bytes, and how to come by a picture."""

from __future__ import annotations

import codecs
import re

HEAD = 4096  # bytes that are looked at
HEIF = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
AVIF = {b"avif", b"avis"}
VIDEO = "a video; take a frame of it: ffmpeg -i VIDEO -frames:v 1 frame.png"
SOUND = "a sound"
PACKED = "a packed file; unpack it first"
RAW = "what a camera's sensor saw; develop it first, and save it as JPEG"
# (place, bytes that stand there, what they mean)
SIGNATURES = (
    (0, bytes(64), "zeros alone; it was never written to its end"),
    (0, b"version https://git-lfs", "a Git LFS pointer; fetch what it stands for: git lfs pull"),
    (0, b"%PDF", "a PDF document; draw a page of it: pdftoppm -png DOCUMENT page"),
    (0, b"%!PS", "a PostScript drawing; draw it in pixels: pstopnm DRAWING"),
    (0, b"8BPS", "a Photoshop document; save it as PNG there"),
    (0, b"\xff\x0a", "a JPEG XL file; write it as PNG: djxl FILE picture.png"),
    (4, b"JXL ", "a JPEG XL file; write it as PNG: djxl FILE picture.png"),
    (4, b"jP  ", "a JPEG 2000 file; write it as PNG: opj_decompress -i FILE -o picture.png"),
    (4, b"ftypcrx", RAW),
    (0, b"FUJIFILM", RAW),
    (4, b"ftypM4A", SOUND),
    (4, b"ftyp", VIDEO),
    (4, b"moov", VIDEO),
    (4, b"mdat", VIDEO),
    (0, b"\x1aE\xdf\xa3", VIDEO),  # Matroska, WebM
    (8, b"AVI ", VIDEO),
    (0, b"FLV\x01", VIDEO),
    (0, b"\0\0\x01\xba", VIDEO),  # MPEG
    (0, b"0&\xb2u\x8ef", VIDEO),  # Windows Media
    (8, b"WAVE", SOUND),
    (0, b"ID3", SOUND),
    (0, b"fLaC", SOUND),
    (0, b"OggS", SOUND),
    (0, b"PK\x03\x04", "a ZIP archive or an office document"),
    (0, b"\x1f\x8b", PACKED),
    (0, b"7z\xbc\xaf", PACKED),
    (0, b"Rar!", PACKED),
    (0, b"\x93NUMPY", "a NumPy array; give the array itself: numpy.load(FILE)"),
)
# Atomic groups: a file may be made to be read in many ways.
HTML = r"\s*+((?><\?.*?\?>|<!--.*?-->)\s*+)*+<(!doctype html|html|head|body|script)\b"
TEXTS = (
    (HTML, "a web page (HTML); the download went wrong"),
    (r".*<svg\b", "an SVG drawing; draw it in pixels: rsvg-convert DRAWING -o drawing.png"),
    (r"\s*[\[{]\s*[\[{\"]", "JSON, perhaps an error message; the download went wrong"),
    (r"(iVBORw0K|/9j/|data:)", "a picture written as text; base64 --decode TEXT > picture"),
    ("", "a text file"),
)


def is_heif(head: bytes) -> bool:
    """Whether a file may be a HEIC picture, as phones take them."""
    brands = _brands(head)
    return bool(brands & HEIF) and not brands & AVIF


def what_it_is(head: bytes) -> str:
    """What the file that begins so is, and the cure; "" if it is unknown or a broken picture."""
    if not head:
        return "an empty file"
    if _brands(head) & (HEIF | AVIF):
        return ""
    for place, mark, kind in SIGNATURES:
        if head.startswith(mark, place):
            return kind
    text = _as_text(head)
    kinds = (kind for mark, kind in TEXTS if text and re.match(mark, text, re.I | re.S))
    return next(kinds, "")


def _brands(head: bytes) -> set[bytes]:
    """What an ISO media file calls itself: the first brand, and those it is compatible with."""
    if head[4:8] != b"ftyp":
        return set()
    size = int.from_bytes(head[:4])
    return {head[8:12], *(head[i : i + 4] for i in range(16, min(size, len(head)), 4))}


def _as_text(head: bytes) -> str:
    """The beginning of a text; "" if these bytes are none."""
    wide = head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    decoder = codecs.getincrementaldecoder("utf-16" if wide else "utf-8-sig")()
    try:
        text = decoder.decode(head)  # the end may be half a character
    except UnicodeDecodeError:
        return ""
    return "" if "\0" in text else text
