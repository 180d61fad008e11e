"""What a file holds, told by its first bytes: names lie, and downloads go wrong."""

from __future__ import annotations

import codecs
import zipfile
from pathlib import Path

HEAD = 512  # bytes; the mark of a tar archive stands at 257
ANOTHER = "download the file again"
UNPACK = "unpack it first"

SIGNS = {  # how a file begins: what it is and what to do about it
    b"version https://git-lfs": "a git-lfs pointer, not the file itself; run `git lfs pull`",
    b"GGUF": "a GGUF file, which is not read; give a .pth, a .safetensors or a model folder",
    b"PK\x03\x04": f"a zip archive; {UNPACK}",
    b"\x1f\x8b": f"a gzip archive; {UNPACK}",
    b"BZh": f"a bzip2 archive; {UNPACK}",
    b"\xfd7zXZ\x00": f"an xz archive; {UNPACK}",
    b"(\xb5/\xfd": f"a zstd archive; {UNPACK}",
    b"7z\xbc\xaf\x27\x1c": f"a 7z archive; {UNPACK}",
    b"Rar!": f"a rar archive; {UNPACK}",
    b"\x89HDF": "an HDF5 file; only PyTorch checkpoints and .safetensors are read",
    b"%PDF": f"a PDF document; {ANOTHER}",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
    b"RIFF": "a sound, video or picture",
}
SCRIPT = "constants.pkl"  # what tells TorchScript from a checkpoint of tensors
PAGE = ("<!doctype", "<html", "<head", "<body", "<?xml", "<!--")


def is_safetensors(path: Path) -> bool:
    """Eight bytes of length, then JSON."""
    head = _head(path)
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**40


def is_pickle(path: Path) -> bool:
    """A checkpoint of PyTorch: a pickle, or a zip archive with one, which may be cut short."""
    head = _head(path)
    if not head.startswith(b"PK\x03\x04"):
        return head[:1] == b"\x80" and head[1:2] <= b"\x05"
    if not zipfile.is_zipfile(path):
        return b"/data.pkl" in head
    packed = _packed(path)
    return "data.pkl" in packed and SCRIPT not in packed


def what_it_is(path: Path) -> str:
    """A file that is not what its name promises, in words that end a sentence: "a web page; ...".

    "" when nothing can be told.
    """
    head = _head(path)
    if not head:
        return f"empty (0 bytes); {ANOTHER}"
    if not any(head):
        return f"empty, all zeros as far as one sees; {ANOTHER}"
    if zipfile.is_zipfile(path) and SCRIPT in _packed(path):
        return "a TorchScript archive, which is a program; save its state_dict"
    if said := next((said for sign, said in SIGNS.items() if head.startswith(sign)), ""):
        return said
    if head[257:262] == b"ustar":
        return f"a tar archive; {UNPACK}"
    text = _text(head)
    if text.lower().startswith(PAGE):
        return f"a web page; {ANOTHER}, by the link of the file itself"
    if text:
        kind = "JSON" if text[0] in "{[" else "a text"
        shown = " ".join(text[:60].split()) + ("..." if len(text) > 60 else "")
        return f"{kind} ({shown}); {ANOTHER}"
    return ""


def _packed(path: Path) -> set[str]:
    """Names in a zip archive, below the one folder that holds all of a checkpoint."""
    with zipfile.ZipFile(path) as archive:
        return {name.partition("/")[2] for name in archive.namelist()}


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(HEAD)


def _text(head: bytes) -> str:
    """The text a file begins with, in UTF-8 or UTF-16; "" if it is none."""
    coding = "utf-16" if head[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:  # the last character may be cut
        text = codecs.getincrementaldecoder(coding)().decode(head).strip()
    except UnicodeDecodeError:
        return ""
    return text if all(c.isprintable() or c.isspace() for c in text) else ""
