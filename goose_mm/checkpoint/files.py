"""Files of tensors and settings: read safely, written whole or not at all, whatever they mean."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from goose_mm.checkpoint.contents import is_pickle, is_safetensors, what_it_is

Tensors = dict[str, Tensor]

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
WHOLE = (WEIGHTS, "pytorch_model.bin")  # what Hugging Face calls weights, the better one first
INDEX = ".index.json"  # behind either: it says which shard holds which tensor
SHARD = re.compile(r"[\w-][\w.-]*\.(safetensors|bin)")
WEIGHT_SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")
BESIDE = ("training_args", "optimizer", "scheduler", "rng_state", "resume")


def digest(tensors: Mapping[str, Tensor], before: str = "") -> str:
    """sha256 of names, types, shapes and values, behind some text."""
    found = hashlib.sha256(before.encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        found.update(flat.view(torch.uint8).numpy().data)
    return found.hexdigest()


def read_tensors(path: str | os.PathLike[str]) -> Tensors:
    """The tensors of a `.pth`, a `.safetensors` or a folder that holds them, whole or in shards.

    What a file is, its content decides. Pickles are read with `weights_only=True`: one that carries
    code is refused, never run. FileNotFoundError, or ValueError in one line when a file is empty,
    cut short or something else.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}; check the path")
    if is_safetensors(path):
        return _read_safetensors(path)
    if is_pickle(path):
        return _read_pickle(path)
    if what := what_it_is(path):
        raise ValueError(f"{path} is no checkpoint but {what}")
    if path.suffix.lower() in WEIGHT_SUFFIXES:
        raise ValueError(f"{path} is damaged; download it again")
    raise ValueError(
        f"{path} is no checkpoint we read; give a .pth, a .safetensors or a model folder"
    )


def _read_folder(folder: Path) -> Tensors:
    for name in (f"{stem}{end}" for stem in WHOLE for end in ("", INDEX)):
        if not (folder / name).is_file():
            continue
        if not name.endswith(INDEX):
            return read_tensors(folder / name)
        tensors: Tensors = {}
        for shard in _shards(folder / name):
            tensors |= read_tensors(folder / shard)
        return tensors
    found = sorted(p for p in folder.iterdir() if p.is_file() and is_weights(p.name))
    if not found:
        raise FileNotFoundError(f"no {WEIGHTS} in {folder}; it is not a model folder")
    if len(found) > 1:
        names = ", ".join(p.name for p in found[:5]) + (", ..." if len(found) > 5 else "")
        raise ValueError(f"{folder} holds {len(found)} checkpoints ({names}); give one of them")
    return read_tensors(found[0])


def is_weights(name: str) -> bool:
    """Whether a file of this name holds a model, and not what training keeps beside it."""
    stem, suffix = os.path.splitext(name.lower())
    return suffix in WEIGHT_SUFFIXES and not stem.startswith(BESIDE)


def _shards(index: Path) -> list[str]:
    listed = read_json(index).get("weight_map")
    names = list(listed.values()) if isinstance(listed, dict) else []
    if not names or not all(isinstance(n, str) and SHARD.fullmatch(n) for n in names):
        raise ValueError(f"{index} does not list files of this folder; download it again")
    return sorted(set(names))


def _read_safetensors(path: Path) -> Tensors:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or cut short ({error}); download it again") from None


def _read_pickle(path: Path) -> Tensors:
    try:
        # only the zip form, the default since torch 1.6, can be mapped instead of copied
        found = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except OSError:
        raise
    except Exception as error:  # the parser of a damaged pickle can raise anything
        if isinstance(error, pickle.UnpicklingError) and "unsupported" in str(error).lower():
            raise ValueError(
                f"{path} carries Python objects or code beside tensors and was not run; "
                "use a plain state_dict or a .safetensors"
            ) from None
        raise ValueError(f"{path} is damaged or cut short; download it again") from None
    if not isinstance(found, dict) or not found:
        raise ValueError(f"{path} holds a {type(found).__name__}, expected names and tensors")
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(
                f"{path}: entry {name!r} is a {type(value).__name__}, expected names and tensors; "
                "save the model's state_dict alone"
            )
    return dict(found)


def read_settings(path: Path) -> dict[str, Any]:
    """config.json of a model folder; empty where there is none, as beside a single file.

    ValueError when it is no configuration of a model, as the error page of a server.
    """
    config = path / CONFIG
    if not config.is_file():
        return {}
    values = read_json(config)
    if not values.keys() & {"model", "model_type"}:
        raise ValueError(
            f"{config} describes no model, it names neither `model` nor `model_type`; it is "
            + what_it_is(config)
        )
    return values


def read_json(path: Path) -> dict[str, Any]:
    """The object a JSON file holds. ValueError that says what else the file is, if it is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        what = what_it_is(path)
        known = what and not what.startswith("JSON")
        raise ValueError(
            f"{path} is not valid JSON" + (f" but {what}" if known else f": {error}")
        ) from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold an object, it holds a {type(values).__name__}")
    return values


def write_folder(
    folder: Path,
    settings: dict[str, Any],
    tensors: Mapping[str, Tensor],
    extra_files: Iterable[Path] = (),
) -> None:
    """model.safetensors, copies of `extra_files` and config.json: they take their places together,
    config.json last. OSError when there is no room; then nothing has changed."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with made(folder), ExitStack() as stack:
        config = stack.enter_context(whole(folder / CONFIG))  # left last
        config.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        for extra in extra_files:
            shutil.copyfile(extra, stack.enter_context(whole(folder / extra.name)))
        part = stack.enter_context(whole(folder / WEIGHTS))
        part.touch()
        mode = part.stat().st_mode
        try:
            save_file(_apart(tensors), part, metadata={"format": "pt"})
            part.chmod(mode)  # safetensors makes its files private; models obey the umask
        except SafetensorError as error:
            code = re.search(r"os error (\d+)", str(error))
            told = (int(code[1]), os.strerror(int(code[1]))) if code else (str(error),)
            raise OSError(*told) from None


def write_pickle(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A `.pth` of names and tensors. OSError when there is no room; then nothing has changed."""
    with made(path.parent), whole(path) as part:
        dump(_apart(tensors), part)


def dump(value: object, path: Path) -> None:
    """`torch.save`, but OSError says why a disk did not take it."""
    with path.open("wb") as file:
        try:
            torch.save(value, file)
        except RuntimeError as error:  # its cleaning up, behind what the disk said
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def _apart(tensors: Mapping[str, Tensor]) -> Tensors:
    """Each tensor on the CPU in storage of its own: a view would be written with all it views."""
    apart: Tensors = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        apart[name] = tensor
    return apart


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path to write to that becomes `path` on success and leaves nothing behind on failure."""
    part = path.with_name(f".{path.name}.part")
    try:
        yield part
        os.replace(part, path)
    except OSError as error:
        if error.errno and error.filename is None:  # a failed write does not know where it was
            error.filename = str(path)
        raise
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def made(folder: Path) -> Iterator[None]:
    """A folder that is there; on failure those that were made for it and hold nothing are not."""
    absent = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for path in absent:
            with suppress(OSError):
                path.rmdir()
        raise
