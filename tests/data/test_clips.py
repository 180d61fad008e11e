"""Labelled clips: batches are a function of the step, and the test fold stays out of them."""

import numpy as np
import pytest
import soundfile
import torch
from sklearn.metrics import average_precision_score

from goose_mm.audio import AudioRWKV7
from goose_mm.config import AudioConfig, AudioModel, BackboneConfig, ClipData
from goose_mm.data.clips import Clips, mean_average_precision, read_rows

RATE = 16000
FREQUENCY = {"low": 300.0, "high": 3000.0}


@pytest.fixture
def folder(tmp_path):
    """Twelve clips of .6 s: silence, then a tone whose level tells the fold (0.1 a fold)."""
    rows = ["filename,fold,label,author"]
    for index in range(12):
        fold, label = 1 + index % 3, ("low", "high")[index % 2]
        tone = 0.1 * fold * np.sin(np.arange(9600) * 2 * np.pi * FREQUENCY[label] / RATE)
        tone[:6400] = 0
        soundfile.write(tmp_path / f"{index}.wav", tone, RATE)
        rows.append(f"{index}.wav,{fold},{label},me")
    (tmp_path / "meta.csv").write_text("\n".join(rows) + "\n")
    return tmp_path


def clips(folder, batch_size=8, **settings) -> Clips:
    config = ClipData(path=str(folder), seconds=0.5, **settings)
    return Clips(config, AudioConfig(), batch_size, seed=0)


def test_a_batch_is_a_function_of_seed_and_step(folder):
    first, second = clips(folder), clips(folder)
    second.batch(4)
    for name, value in first.batch(7).items():
        assert torch.equal(value, second.batch(7)[name]), name
    assert not torch.equal(first.batch(7)["waveform"], first.batch(8)["waveform"])


def test_shapes_and_targets(folder):
    batch = clips(folder, batch_size=30, label_smoothing=0.1).batch(0)
    assert batch["waveform"].shape == (30, 8000)
    assert batch["length"].min() > 0 and batch["length"].max() <= 8000
    assert batch["target"].unique().tolist() == pytest.approx([0.05, 0.95])
    assert sorted(batch["partner"].tolist()) == list(range(30))


def test_the_test_fold_is_in_no_batch(folder):
    data = clips(folder, test_fold=3)
    peaks = torch.cat([data.batch(step)["waveform"].abs().amax(1) for step in range(20)])
    assert peaks.max() < 0.25  # folds 1 and 2 reach 0.1 and 0.2, fold 3 reaches 0.3
    assert len(data.held_out) == 4


def test_every_crop_has_sound(folder):
    data = clips(folder)
    for step in range(20):
        assert data.batch(step)["waveform"].abs().amax(1).min() > 0.05


def test_no_augmentation_leaves_the_samples(folder):
    batch = clips(folder, augment=0.0, mixup=0.0).batch(0)
    assert (batch["ratio"] == 1).all() and (batch["length"] == 8000).all()


def test_evaluate(folder):
    data = clips(folder, test_fold=2)
    backbone = BackboneConfig(dim=32, num_layers=1, head_size=16, bidirectional=True)
    model = AudioRWKV7(AudioModel(backbone=backbone, audio=AudioConfig(labels=data.labels)))
    scores = data.evaluate(model)
    assert scores.keys() == {"accuracy", "map"} and min(scores.values()) >= 0
    assert clips(folder, test_fold=0).evaluate(model) == {}


@pytest.mark.parametrize("seed", range(5))
def test_average_precision_is_that_of_scikit_learn(seed):
    random = np.random.default_rng(seed)
    scores = random.integers(0, 5, (40, 3)).astype(float)
    truth = random.random((40, 3)) < 0.3
    want = average_precision_score(truth, scores)
    assert mean_average_precision(scores, truth) == pytest.approx(want)


def test_esc50_checkout(folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("ESC-50")
    (root / "meta").mkdir()
    (root / "audio").symlink_to(folder)
    (root / "meta" / "esc50.csv").write_text(
        "filename,fold,target,category,esc10,src_file,take\n"
        "0.wav,1,0,dog,True,1,A\n1.wav,2,1,rain,True,2,A\n2.wav,3,9,cow,False,3,A\n"
    )
    config = ClipData(path=str(root), test_fold=2)
    data = Clips(config, AudioConfig(labels=("dog_bark", "rain")), 2, seed=0)
    assert [row.label for row in data.training + data.held_out] == ["dog_bark", "rain"]
    assert Clips(config, AudioConfig(), 2, seed=0).labels == ("cow", "dog_bark", "rain")


def break_table(old, new):
    def change(folder):
        table = folder / "meta.csv"
        table.write_text(table.read_text().replace(old, new))

    return change


@pytest.mark.parametrize(
    ("change", "settings", "says"),
    [
        (break_table("filename", "name"), {}, "lacks the columns filename"),
        (break_table("0.wav,1,", "0.wav,one,"), {}, "line 2: fold must be 1 or more, got 'one'"),
        (lambda folder: (folder / "meta.csv").unlink(), {}, "neither meta.csv nor"),
        (lambda folder: (folder / "5.wav").unlink(), {}, "1 of 12 clips.*karolpiczak/ESC-50"),
        (
            lambda folder: (folder / "5.wav").write_text(""),
            {},
            r"5\.wav is empty.*--data\.skip-bad",
        ),
        (break_table("3.wav,1,high,me", "3.wav,1"), {}, r"line 5: 2 cells, but the heading has 4"),
        (break_table("3.wav,1,", "3,5.wav,1,"), {}, r"line 5: 5 cells, .* that holds ','"),
        (break_table("3.wav,1,", '"3.wav,1,'), {}, "line 5: unexpected end of data"),
        (break_table("3.wav,1,high", "3.wav,1,"), {}, "line 5: label is empty"),
        (break_table("3.wav,1,", ",1,"), {}, "line 5: filename is empty"),
        (
            break_table("3.wav,1,", "0.wav,2,"),
            {},
            r"0.wav stands in line 2 \(fold 1, low\) and in "
            r"line 5 \(fold 2, high\)",
        ),
        (break_table("3.wav,1,high", "x/../0.wav,1,high"), {}, "0.wav stands in line 2 .* line 5"),
        (
            lambda folder: (folder / "meta.csv").write_bytes(b"filename,fold,label\n\xe9.wav,1,a"),
            {},
            "line 2: this is not UTF-8",
        ),
        (lambda folder: (folder / "meta.csv").write_text("\n\n"), {}, "meta.csv is empty"),
        (lambda folder: None, {"test_fold": 9}, r"test_fold=9 is not one of the folds \[1, 2, 3\]"),
        (lambda folder: (folder / "meta.csv").write_text("filename,fold,label\n"), {}, "no clips"),
    ],
)
def test_unusable_folders(folder, change, settings, says):
    change(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        clips(folder, **settings)


def test_missing_folder_and_unknown_label(folder):
    with pytest.raises(ValueError, match=r"no folder of clips at .*karolpiczak/ESC-50"):
        Clips(ClipData(), AudioConfig(), 2, seed=0)
    with pytest.raises(ValueError, match=r"labels high are not among audio\.labels"):
        Clips(ClipData(path=str(folder)), AudioConfig(labels=("low",)), 2, seed=0)


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_tables_as_programs_write_them(folder, separator):
    table = folder / "meta.csv"
    want = read_rows(folder, ())
    lines = [line.replace(",", f" {separator}") for line in table.read_text().splitlines()]
    lines[0] = lines[0].title()
    lines[3:3] = ["", separator * 3, "   "]
    lines[7] += separator * 2
    table.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert read_rows(folder, ()) == want


def test_a_row_that_comes_twice_counts_once(folder):
    want = read_rows(folder, ())
    with (folder / "meta.csv").open("a") as table:
        table.write("./0.wav,1,low,me\n0.wav,1,low,me\n")
    assert read_rows(folder, ()) == want


def test_all_bad_clips_are_told_at_once_or_left_out(folder, caplog):
    (folder / "2.wav").unlink()
    (folder / "5.wav").write_text("no sound")
    with pytest.raises(ValueError, match=r"2 of 12 clips .*2\.wav: no such file; .*5\.wav: cannot"):
        clips(folder)
    data = clips(folder, skip_bad=True, test_fold=1)
    assert (len(data.training), len(data.held_out)) == (6, 4)
    assert len(caplog.messages) == 2 and all("left out: " in said for said in caplog.messages)
    for index in range(12):
        (folder / f"{index}.wav").write_text("no sound")
    with pytest.raises(ValueError, match="none of 12 clips can be used"):
        clips(folder, skip_bad=True)
