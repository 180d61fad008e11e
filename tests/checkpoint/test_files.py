"""Checkpoint files: read safely, converted, written whole or not at all; errors in one line."""

import json
import os
import random
from pathlib import Path

import pytest
import torch
from official import official_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

from goose_mm import checkpoint
from goose_mm.config import AudioModel, VisionModel, to_dict


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Equal names, shapes, dtypes and bits."""
    return a.keys() == b.keys() and all(
        a[n].shape == b[n].shape and a[n].dtype == b[n].dtype and a[n].equal(b[n]) for n in a
    )


def saved(folder: Path, tensors: object, name: str = "model.pth") -> Path:
    torch.save(tensors, folder / name)
    return folder / name


# conversion


def test_files_there_and_back(tmp_path: Path) -> None:
    tensors = official_checkpoint(dtype=torch.bfloat16)
    start = saved(tmp_path, tensors)
    before = start.read_bytes()
    assert checkpoint.convert(start, tmp_path / "ours") == "goose"
    assert checkpoint.convert(tmp_path / "ours", tmp_path / "hf" / "fla", "fla") == "fla"
    assert checkpoint.convert(tmp_path / "hf" / "fla", tmp_path / "back.pth") == "rwkv"
    assert checkpoint.convert(tmp_path / "back.pth", tmp_path / "v1.5") == "goose"
    back = torch.load(tmp_path / "back.pth")
    assert back.keys() == tensors.keys()
    assert same(checkpoint.to_goose(back)[1], checkpoint.to_goose(tensors)[1])
    assert start.read_bytes() == before
    assert checkpoint.is_ours(tmp_path / "ours") and not checkpoint.is_ours(tmp_path / "hf" / "fla")
    config, ours = checkpoint.load_model_files(tmp_path / "v1.5")
    assert config == checkpoint.to_goose(tensors)[0]
    assert same(ours, checkpoint.to_goose(tensors)[1])
    hf = json.loads((tmp_path / "hf" / "fla" / "config.json").read_text())
    assert hf["torch_dtype"] == "bfloat16"
    assert not list(tmp_path.rglob("*.part"))


def test_sharded_folders_are_read(tmp_path: Path) -> None:
    config, ours = checkpoint.to_goose(official_checkpoint())
    fla = checkpoint.from_goose(config, ours, "fla")
    names = sorted(fla)
    shards = {n: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, n in enumerate(names)}
    for shard in set(shards.values()):
        some = {n: fla[n].contiguous() for n in names if shards[n] == shard}
        save_file(some, tmp_path / shard)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": shards}))
    assert same(checkpoint.read_model(tmp_path)[1], ours)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of-00002"):
        checkpoint.read_tensors(tmp_path)
    for bad in ("../model.safetensors", "/etc/passwd", "..", 3):
        index.write_text(json.dumps({"weight_map": {"a": bad}}))
        with pytest.raises(ValueError, match="does not list files of this folder"):
            checkpoint.read_tensors(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "rwkv-final.pth", "Model.PTH", "x.pt"])
def test_folders_of_pickles_alone_are_read(tmp_path: Path, name: str) -> None:
    tensors = official_checkpoint()
    saved(tmp_path, tensors, name)
    saved(tmp_path, {"lr": 1e-4}, "training_args.bin")  # what a Trainer leaves beside it
    saved(tmp_path, {"state": {}}, "optimizer.pt")
    assert same(checkpoint.read_model(tmp_path)[1], checkpoint.to_goose(tensors)[1])
    assert checkpoint.convert(tmp_path, tmp_path / "ours") == "goose"


def test_sharded_pickles_are_read(tmp_path: Path) -> None:
    tensors = official_checkpoint()
    shards = {n: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, n in enumerate(tensors)}
    for shard in set(shards.values()):
        saved(tmp_path, {n: t for n, t in tensors.items() if shards[n] == shard}, shard)
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    assert same(checkpoint.read_model(tmp_path)[1], checkpoint.to_goose(tensors)[1])
    save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")  # the better one counts
    assert checkpoint.read_tensors(tmp_path).keys() == {"x"}


def test_several_checkpoints_in_a_folder_are_a_choice(tmp_path: Path) -> None:
    for name in ("rwkv-0.pth", "rwkv-1.pth"):
        saved(tmp_path, official_checkpoint(), name)
    with pytest.raises(ValueError, match=r"holds 2 checkpoints \(rwkv-0\.pth, rwkv-1\.pth\)"):
        checkpoint.read_model(tmp_path)


def test_convert_never_overwrites_unless_told(tmp_path: Path) -> None:
    start = saved(tmp_path, official_checkpoint())
    taken = tmp_path / "taken.pth"
    taken.write_text("precious")
    with pytest.raises(FileExistsError, match=r"taken\.pth exists"):
        checkpoint.convert(start, taken)
    assert taken.read_text() == "precious"
    checkpoint.convert(start, taken, force=True)
    assert len(torch.load(taken)) == len(official_checkpoint())


@pytest.mark.parametrize(
    ("name", "to"),
    [("a.safetensors", None), ("A.PT", None), ("folder", "rwkv"), ("a.PTH", "fla")],
)
def test_convert_wants_a_fitting_name(
    tmp_path: Path, name: str, to: checkpoint.Layout | None
) -> None:
    start = saved(tmp_path, official_checkpoint())
    with pytest.raises(ValueError, match="layout"):
        checkpoint.convert(start, tmp_path / name, to)
    assert [p.name for p in tmp_path.iterdir()] == ["model.pth"]


def test_convert_keeps_the_tokenizer_and_refuses_other_modalities(tmp_path: Path) -> None:
    config, ours = checkpoint.to_goose(official_checkpoint())
    files = ["tokenizer.json", "tokenizer_config.json", "vocab.txt", "spiece.model", "merges.txt"]
    for name in files:
        (tmp_path / name).write_text("{}")
    checkpoint.save_model(tmp_path / "text", config, ours, [tmp_path / name for name in files])
    checkpoint.convert(tmp_path / "text", tmp_path / "fla", "fla")
    assert all((tmp_path / "fla" / name).read_text() == "{}" for name in files)
    checkpoint.save_model(tmp_path / "sound", AudioModel(), {"x": torch.ones(2)})
    with pytest.raises(ValueError, match="only text models are converted"):
        checkpoint.convert(tmp_path / "sound", tmp_path / "sound.pth")


# files


class Malicious:
    """Unpickling this makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
def test_code_in_a_pickle_is_not_run(tmp_path: Path, suffix: str) -> None:
    path = saved(tmp_path, {"a": Malicious(tmp_path / "owned")}, "model" + suffix)
    with pytest.raises(ValueError, match="carries Python objects or code") as error:
        checkpoint.read_tensors(path)
    assert not (tmp_path / "owned").exists()
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_old_pickles_are_read(tmp_path: Path) -> None:
    tensors = official_checkpoint()
    torch.save(tensors, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert same(checkpoint.read_tensors(tmp_path / "old.pth"), tensors)


@pytest.mark.parametrize("name", ["model.pth", "model.safetensors"])
def test_broken_files_are_refused_in_one_line(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.endswith(".pth"):
        torch.save(official_checkpoint(), path)
    else:
        save_file(official_checkpoint(), path)
    whole = path.read_bytes()
    rng = random.Random(0)
    cuts = [1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1]
    broken = [whole[:cut] for cut in cuts] + [rng.randbytes(n) for n in (1, 9, 1000)]
    for content in [b"", *broken, b"\0" * 500, b"not a checkpoint" * 9]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=name) as error:
            checkpoint.read_tensors(path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (torch.ones(2), "holds a Tensor"),
        ({}, "holds a dict"),
        ({"state_dict": {"a": torch.ones(1)}}, "'state_dict' is a dict.*state_dict alone"),
        ({"a": torch.ones(1), "step": 3}, "'step' is a int"),
        ({1: torch.ones(1)}, "entry 1"),
    ],
)
def test_pickles_of_other_things_are_refused(tmp_path: Path, content: object, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        checkpoint.read_tensors(saved(tmp_path, content))


def test_missing_and_strange_paths(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        checkpoint.read_tensors(tmp_path / "none.pth")
    with pytest.raises(FileNotFoundError, match="not a model folder"):
        checkpoint.read_tensors(tmp_path)
    with pytest.raises(FileNotFoundError, match="not a model folder"):
        checkpoint.load_model_files(tmp_path)
    (tmp_path / "model.gguf").write_text("GGUF")
    with pytest.raises(ValueError, match=r"give a \.pth, a \.safetensors or a model folder"):
        checkpoint.read_tensors(tmp_path / "model.gguf")
    with pytest.raises(ValueError, match=r"model\.pth: this is an RWKV-6"):
        checkpoint.read_model(saved(tmp_path, {"blocks.0.att.time_maa_x": torch.ones(1)}))


# folders of ours


@pytest.mark.parametrize("config", [VisionModel(), AudioModel()], ids=["vision", "audio"])
def test_folders_of_every_modality_come_back(
    tmp_path: Path, config: VisionModel | AudioModel
) -> None:
    shared = torch.randn(3, 4)
    tensors = {
        "a": shared,
        "tied": shared,
        "view": shared[1],
        "turned": shared.t(),
        "n": torch.ones(2).long(),
    }
    checkpoint.save_model(tmp_path / "m", config, tensors)
    config_again, again = checkpoint.read_model(tmp_path / "m")
    assert to_dict(config_again) == to_dict(config) and same(again, tensors)
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_a_text_folder_is_checked_against_its_configuration(tmp_path: Path) -> None:
    config, ours = checkpoint.to_goose(official_checkpoint())
    checkpoint.save_model(tmp_path, config, ours)
    assert checkpoint.load_model_files(tmp_path)[0] == config
    stated = json.loads((tmp_path / "config.json").read_text())
    stated["backbone"]["num_layers"] = 3
    (tmp_path / "config.json").write_text(json.dumps(stated))
    with pytest.raises(ValueError, match=r"missing \(backbone.blocks.2"):
        checkpoint.load_model_files(tmp_path)
    (tmp_path / "config.json").write_text("{")
    for read in (checkpoint.load_model_files, checkpoint.read_model, checkpoint.is_ours):
        with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
            read(tmp_path)


def test_a_failed_save_leaves_the_old_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, ours = checkpoint.to_goose(official_checkpoint())
    checkpoint.save_model(tmp_path, config, ours)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full_disk(tensors: object, path: Path, **_: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full_disk)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in ours.items()}
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save_model(tmp_path, config, zeros)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_model_can_be_saved_over_the_files_it_was_read_from(tmp_path: Path) -> None:
    config, ours = checkpoint.to_goose(official_checkpoint())
    checkpoint.save_model(tmp_path, config, ours)
    _, mapped = checkpoint.load_model_files(tmp_path)
    checkpoint.save_model(tmp_path, config, mapped)
    assert same(load_file(tmp_path / "model.safetensors"), ours)
