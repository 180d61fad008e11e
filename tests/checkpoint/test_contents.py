"""A file that is not what its name says is called what it is, in one line."""

import gzip
import io
import json
import tarfile
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from official import official_checkpoint
from safetensors.torch import save_file

import goose_mm
from goose_mm import checkpoint

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1382\n"


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("model/model.pth", b"weights")
    return file.getvalue()


def tarred() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("model.pth"))
    return file.getvalue()


MISTAKEN = {
    "a git-lfs pointer.*git lfs pull": POINTER,
    "a web page": b"\n <!DOCTYPE HTML>\n<html><body>403</body></html>",
    "a web page;": b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>",
    r'JSON \({"error":"Unauthorized"}\)': b'{"error":"Unauthorized"}',
    r"a text \(Entry not found\)": b"Entry not found",
    "a zip archive; unpack it": zipped(),
    "a gzip archive": gzip.compress(b"x" * 99),
    "a tar archive": tarred(),
    "a GGUF file": b"GGUF\x03\0\0\0" + bytes(90),
    "an HDF5 file": b"\x89HDF\r\n\x1a\n" + bytes(90),
    "empty, all zeros": bytes(4096),
    "empty .0 bytes.": b"",
}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".bin", ".PTH", ""])
@pytest.mark.parametrize("said", MISTAKEN)
def test_weights_that_are_none(tmp_path: Path, said: str, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(MISTAKEN[said])
    with pytest.raises(ValueError, match=rf"model{suffix} is no checkpoint but {said}") as error:
        checkpoint.read_tensors(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize("said", MISTAKEN)
def test_the_same_in_a_folder(tmp_path: Path, said: str) -> None:
    """Whichever file of a model it is; the error names the file."""
    config, ours = checkpoint.to_goose(official_checkpoint())
    checkpoint.save_model(tmp_path, config, ours)
    (tmp_path / "tokenizer.json").write_bytes(MISTAKEN[said])
    with pytest.raises(ValueError, match=rf"tokenizer\.json is not a tokenizer.*{said}"):
        goose_mm.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(MISTAKEN[said])
    with pytest.raises(ValueError, match=rf"model\.safetensors is no checkpoint but {said}"):
        goose_mm.load(tmp_path)
    (tmp_path / "config.json").write_bytes(MISTAKEN[said])
    with pytest.raises(ValueError, match=rf"config\.json .*{said}") as error:
        goose_mm.load(tmp_path)
    assert "\n" not in str(error.value)


def test_content_counts_and_not_the_name(tmp_path: Path) -> None:
    tensors = official_checkpoint()
    torch.save(tensors, tmp_path / "a.safetensors")
    save_file(tensors, tmp_path / "b.pth")
    torch.save(tensors, tmp_path / "C.PTH")
    torch.save(tensors, tmp_path / "blob")
    for path in tmp_path.iterdir():
        assert checkpoint.read_tensors(path).keys() == tensors.keys()


def test_torchscript_is_named(tmp_path: Path) -> None:
    with warnings.catch_warnings(action="ignore"):
        torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)).save(str(tmp_path / "model.pt"))
    with pytest.raises(ValueError, match=r"model\.pt is no checkpoint but a TorchScript archive"):
        checkpoint.read_tensors(tmp_path / "model.pt")


def test_a_configuration_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    config, ours = checkpoint.to_goose(official_checkpoint())
    checkpoint.save_model(tmp_path, config, ours)
    path = tmp_path / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert checkpoint.read_model(tmp_path)[0] == config
    path.write_text(json.dumps({"error": "Repository not found"}))
    with pytest.raises(ValueError, match=r"describes no model.*Repository not found"):
        checkpoint.read_model(tmp_path)
