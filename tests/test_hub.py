"""Where models come from: names, folders, files, the hub; with words or without."""

import json
from pathlib import Path

import huggingface_hub
import pytest
import torch
from official import official_checkpoint

import goose_mm
from goose_mm import checkpoint, cli, hub
from goose_mm.text import BPETokenizer

WORDS = ["the goose swam and the goose slept"] * 9


@pytest.fixture
def complaint(capsys):
    """Run a command that must fail: exit code 2, one line on stderr."""

    def run(*argv: object) -> str:
        assert cli.main([*map(str, argv)]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1, err
        return err

    return run


def saved(path: Path, **sizes: int) -> Path:
    torch.save(official_checkpoint(1, 64, **sizes), path)
    return path


def word_level(path: Path, vocabulary: int = 300) -> None:
    """A tokenizer file of a kind that is not read."""
    words = {f"w{i}": i for i in range(vocabulary)}
    model = {"type": "WordLevel", "vocab": words, "unk_token": "w0"}
    path.write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))


# vocabularies of any size


@pytest.mark.parametrize("size", [3, 512, 50280, 65525])
def test_any_vocabulary_loads_and_converts(tmp_path: Path, size: int) -> None:
    start = saved(tmp_path / "start.pth", vocab=size)
    ids, want = torch.tensor([[1, 2, 0]]), goose_mm.load(start)
    assert want.tokenizer is None
    logits = want(ids)[0]
    assert logits.shape == (1, 3, size)
    steps = [(tmp_path / "ours", "goose"), (tmp_path / "fla", "fla"), (tmp_path / "end.pth", None)]
    for before, (after, layout) in zip([start, *(s for s, _ in steps)], steps, strict=False):
        checkpoint.convert(before, after, layout)
        again = goose_mm.load(after)
        assert again.tokenizer is None and again(ids)[0].equal(logits)


def test_verbs_that_need_words_say_why_there_are_none(tmp_path, complaint) -> None:
    model = saved(tmp_path / "midi.pth", vocab=512)
    with pytest.raises(ValueError, match=r"no tokenizer: .*512 ids"):
        goose_mm.load(model).generate("The")
    assert "no tokenizer" in complaint("chat", "--model", model)
    (tmp_path / "a.txt").write_text("The goose swam. " * 20)
    data = ["--data", tmp_path, "--out", tmp_path / "run", "--model", model]
    assert "no tokenizer" in complaint("eval", "bits_per_byte", *data)
    checkpoint.convert(model, tmp_path / "midi")
    assert "no tokenizer file" in complaint("chat", "--model", tmp_path / "midi")
    word_level(tmp_path / "midi" / "tokenizer.json")
    assert goose_mm.load(tmp_path / "midi").tokenizer is None
    assert "id 0 must be" in complaint("chat", "--model", tmp_path / "midi")
    train = ["train", "text_tiny", "--data.path", tmp_path, "--out", tmp_path / "t"]
    assert "no tokenizer" in complaint(*train, "--init", model)


def test_words_put_beside_a_converted_model_are_read(tmp_path: Path) -> None:
    words = BPETokenizer.train(WORDS, 280)
    model = saved(tmp_path / "a.pth", vocab=words.vocab_size)
    checkpoint.convert(model, tmp_path / "a")
    words.save(tmp_path / "a" / "tokenizer.json")
    assert goose_mm.load(tmp_path / "a").tokenizer.encode("the") == words.encode("the")
    few = saved(tmp_path / "few.pth", vocab=words.vocab_size - 1)
    checkpoint.convert(few, tmp_path / "few")
    words.save(tmp_path / "few" / "tokenizer.json")  # ids that the model has no rows for
    assert goose_mm.load(tmp_path / "few").tokenizer is None


def test_a_tokenizer_beside_the_weights_is_theirs(tmp_path: Path) -> None:
    """Also with as many rows as the World vocabulary, unless that stands there."""
    words = BPETokenizer.train(WORDS, 280)
    saved(tmp_path / "pytorch_model.bin", vocab=65536)
    assert type(goose_mm.load(tmp_path).tokenizer).__name__ == "WorldTokenizer"
    words.save(tmp_path / "tokenizer.json")
    assert type(goose_mm.load(tmp_path).tokenizer).__name__ == "BPETokenizer"
    official = Path(goose_mm.text.tokenizer.__file__).parent / "rwkv_vocab_v20230424.txt"
    vocabulary = tmp_path / official.name
    vocabulary.write_bytes(official.read_bytes().replace(b"\n", b"\r\n"))
    assert type(goose_mm.load(tmp_path).tokenizer).__name__ == "WorldTokenizer"
    vocabulary.write_text("1 'a' 1\n")
    changed = goose_mm.load(tmp_path)
    assert changed.tokenizer is None and "not the official vocabulary" in changed.no_tokenizer


# convert


def test_convert_takes_shipped_names_and_tells_what_became_of_words(tmp_path, capsys) -> None:
    def convert(*argv: object) -> str:
        assert cli.main(["convert", *map(str, argv)]) == 0
        out, err = capsys.readouterr()
        assert out == f"{argv[1]}\n" and err.count("\n") == bool(err)
        return err

    assert "tokenizer.json left behind" in convert("goose-tiny-text", tmp_path / "x.PTH")
    assert convert("goose-tiny-text", tmp_path / "x", "--to", "fla") == ""
    text = goose_mm.load("goose-tiny-text")
    assert goose_mm.load(tmp_path / "x").generate("The", max_new_tokens=3, temperature=0.0) == (
        text.generate("The", max_new_tokens=3, temperature=0.0)
    )
    source = tmp_path / "source"
    source.mkdir()
    saved(source / "model.pth")
    assert convert(source, tmp_path / "none") == ""
    word_level(source / "tokenizer.json")
    (source / "vocab.txt").write_text("w0")
    said = convert(source, tmp_path / "kept")
    assert "tokenizer.json, vocab.txt copied, but not read here: " in said and "id 0" in said
    assert (tmp_path / "kept" / "vocab.txt").read_text() == "w0"


# the hub


class Hub:
    """Stands for huggingface_hub, with the files of one repository."""

    def __init__(self, folder: Path, files: list[str]) -> None:
        self.folder, self.files = folder, files

    def snapshot_download(self, repository: str, allow_patterns: list[str]) -> str:
        for name in self.files:
            if any(Path(name).match(pattern) for pattern in allow_patterns):
                saved(self.folder / name)
        return str(self.folder)

    def list_repo_files(self, repository: str) -> list[str]:
        return self.files


@pytest.fixture
def online(tmp_path, monkeypatch):
    def of(*files: str) -> Hub:
        found = Hub(tmp_path, list(files))
        monkeypatch.setattr(huggingface_hub, "snapshot_download", found.snapshot_download)
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: found)
        return found

    return of


@pytest.mark.parametrize("name", ["some/rwkv7-tiny", "some/rwkv7-0.1B-g1", "a.b/v1.5", "x/m.v2"])
def test_hub_ids_may_have_dots(name: str, online, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    found = online("model.safetensors")
    assert hub.locate(name) == found.folder


def test_files_are_no_hub_ids(online, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    online("model.safetensors")
    for name in ("some/model.pth", "some/model.SAFETENSORS", "../x", "./x/y", "a/b/c", "x"):
        with pytest.raises(FileNotFoundError, match="no such file or folder"):
            hub.locate(name)


def test_repositories_of_pickles_alone_are_downloaded(online) -> None:
    found = online("README.md", "rwkv.pth", "more/other.pth")
    assert goose_mm.load("some/rwkv").config.text.vocab_size == 300
    assert [p.name for p in found.folder.iterdir()] == ["rwkv.pth"]


def test_shards_of_pickles_are_downloaded_all(online) -> None:
    shards = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    found = online(*shards)
    assert hub.locate("some/rwkv") == found.folder
    assert sorted(p.name for p in found.folder.iterdir()) == shards


def test_a_repository_of_many_models_is_a_choice(online) -> None:
    online("rwkv-0.1b.pth", "rwkv-0.4b.pth", "rwkv-2.9b.pth")
    with pytest.raises(FileNotFoundError, match=r"holds 3 models \(rwkv-0.1b.pth.*give its path"):
        hub.locate("BlinkDL/rwkv7-g1")
