"""Likelihoods: batched = one by one, in spans = at once; and the text tasks on small files."""

import csv
import json
import lzma
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from tiny import text_model

from goose_mm.data.text import book_bits
from goose_mm.eval.tasks import likelihood
from goose_mm.eval.tasks.likelihood import common_beginning, loglikelihoods, sampling
from goose_mm.eval.tasks.task import TaskOptions, grouped
from goose_mm.eval.tasks.text import HEADING, MMLU, BitsPerByte, Lambada
from goose_mm.text import RWKV7LM

OPTIONS = TaskOptions()
PAIRS = [
    ([0, 5, 6, 7], [8]),
    ([0, 5, 6, 7], [9, 10, 11]),
    ([0, 5, 9], [12, 13]),
    ([0], [20, 21, 22, 23, 24, 25, 26]),
    ([0, 5, 6, 7, 8, 30, 31], [8, 8]),
]


@pytest.fixture(scope="module")
def model() -> RWKV7LM:
    return text_model(["the goose swam over the wide river, Answer: A B C D " * 9])


def direct(model, context, continuation, state=None):
    """The definition: one forward pass over everything."""
    ids = torch.tensor([*context, *continuation])
    with torch.no_grad():
        logits = model(ids[None, :-1], state)[0][0, len(context) - 1 :]
    right = (logits.argmax(-1) == ids[len(context) :]).all()
    return -F.cross_entropy(logits, ids[len(context) :], reduction="sum").item(), bool(right)


def equal(found, wanted):
    assert [hit for _, hit in found] == [hit for _, hit in wanted]
    torch.testing.assert_close(
        torch.tensor([x for x, _ in found], dtype=torch.float64),
        torch.tensor([x for x, _ in wanted], dtype=torch.float64),
    )


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_batches_of_mixed_lengths_are_the_cross_entropy_of_each(model, batch_size):
    contexts, continuations = zip(*PAIRS, strict=True)
    found = loglikelihoods(model, contexts, continuations, batch_size=batch_size)
    equal(found, [direct(model, *pair) for pair in PAIRS])


def test_spans_are_the_whole(model, monkeypatch):
    torch.manual_seed(1)
    rows = [torch.randint(1, 200, (n,)).tolist() for n in (40, 3, 17, 16)]
    pairs = [([0, *row[: n % 5]], row) for n, row in enumerate(rows)]
    pairs += [([0, *rows[0]], rows[1]), ([0, *rows[2]], rows[0])]
    whole = loglikelihoods(model, *zip(*pairs, strict=True))
    monkeypatch.setattr(likelihood, "SPAN", 4)
    monkeypatch.setattr(likelihood, "HEAD", 3)
    equal(loglikelihoods(model, *zip(*pairs, strict=True)), whole)
    equal(whole, [direct(model, *pair) for pair in pairs])


def test_a_state_stands_before_every_context_and_is_kept(model):
    with torch.no_grad():
        _, state = model(torch.tensor([[0, 40, 41, 42]]))
    kept = state.clone()
    pairs = PAIRS[:3]  # they share a beginning, which is read first
    contexts, continuations = zip(*pairs, strict=True)
    found = loglikelihoods(model, contexts, continuations, state=state)
    equal(found, [direct(model, *pair, kept) for pair in pairs])
    assert all(torch.equal(a, b) for a, b in zip(state, kept, strict=True))


def test_a_greedy_continuation_is_what_the_model_writes(model):
    words = model.generate("the goose", max_new_tokens=6, temperature=0.0)
    context = [0, *model.tokenizer.encode("the goose")]
    ids = [*context]
    for _ in range(6):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]))[0][0, -1].argmax()))
    written = ids[len(context) :]
    assert words == model.tokenizer.decode(written)
    other = [*written[:-1], (written[-1] + 1) % 200]
    scores = loglikelihoods(model, [context] * 3, [written, written[:1], other])
    assert [hit for _, hit in scores] == [True, True, False]


def test_what_all_contexts_share_is_read_once(model, monkeypatch):
    read = []
    advance = likelihood._advance
    monkeypatch.setattr(
        likelihood,
        "_advance",
        lambda m, ids, mask, s: read.append(int(mask.sum())) or advance(m, ids, mask, s),
    )
    shots = list(range(10, 110))
    contexts = [[0, *shots, 120], [0, *shots, 121, 122]]
    loglikelihoods(model, [c for c in contexts for _ in "ABCD"], [[5], [6], [7], [8]] * 2)
    assert read == [101, 3]


@pytest.mark.parametrize(
    ("rows", "shared"),
    [([(1, 2, 3)], 2), ([(1, 2, 3), (1, 2, 4)], 2), ([(1,), (1, 2)], 0), ([(1, 2), (3, 4)], 0)],
)
def test_common_beginning_leaves_a_token_of_every_row(rows, shared):
    assert common_beginning(rows) == shared


def test_nothing_to_score_is_an_error_that_says_where(model):
    assert loglikelihoods(model, [], []) == []
    with pytest.raises(ValueError, match="1 contexts for 2 continuations"):
        loglikelihoods(model, [[0]], [[1], [2]])
    with pytest.raises(ValueError, match="context 1 has no tokens"):
        loglikelihoods(model, [[0], []], [[1], [2]])
    with pytest.raises(ValueError, match="continuation 0 has no tokens"):
        loglikelihoods(model, [[0]], [[]])


def test_generation_settings_of_harnesses():
    greedy = sampling(
        {"do_sample": False, "temperature": 0.7, "top_p": 0, "until": "\n"}, 32, ["E"]
    )
    assert (greedy.temperature, greedy.top_p, greedy.max_new_tokens) == (0.0, 1.0, 32)
    assert greedy.stop == ("\n", "E")
    drawn = sampling({"temperature": 0.5, "top_k": 3, "max_gen_toks": 7, "num_beams": 1}, 32)
    assert (drawn.temperature, drawn.top_k, drawn.max_new_tokens, drawn.stop) == (0.5, 3, 7, ())
    assert sampling({"do_sample": True}, 9).temperature == 1.0
    assert sampling({"until": ["", "a"], "top_p": None}, 9).stop == ("a",)
    with pytest.raises(ValueError, match="num_beams cannot be honoured; known are until"):
        sampling({"num_beams": 4}, 9)


def predicted(task, model):
    groups = grouped(task.items)
    answers = task.predict(model, groups)
    found = {
        item.id: answer
        for group, some in zip(groups, answers, strict=True)
        for item, answer in zip(group, some, strict=True)
    }
    return json.loads(json.dumps(found))


def test_bits_per_byte_of_documents(model, tmp_path):
    texts = {"a.txt": "the goose", "b.txt": "the wide river, é" * 40}
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text.encode())
    (tmp_path / "notes.md").write_text("not a document")
    task = BitsPerByte(tmp_path, OPTIONS)
    found = predicted(task, model)
    scores = task.score(found)
    bits = {}
    for name, text in texts.items():
        ids = model.tokenizer.encode(text)
        bits[name] = -direct(model, [0], ids)[0] / math.log(2)
        assert found[name]["tokens"] == len(ids)
    sizes = {name: len(text.encode()) for name, text in texts.items()}
    pooled = sum(bits.values()) / sum(sizes.values())
    assert scores.headline == "bits per byte" and scores.items == {}
    assert scores.values["bits per byte"] == pytest.approx(pooled, rel=1e-9)
    for name, size in sizes.items():
        assert scores.types["document"][name] == (pytest.approx(bits[name] / size, rel=1e-9), size)
    assert task.settings["prefix token"] == 0
    packed = sum(len(lzma.compress(text.encode())) for text in texts.values())
    assert task.baselines()["xz"] == 8 * packed / sum(sizes.values())


def test_bits_per_byte_is_what_training_measures(model, tmp_path):
    text = "the wide river " * 200
    (tmp_path / "book.txt").write_text(text)
    task = BitsPerByte(tmp_path, OPTIONS)
    found = task.score(predicted(task, model)).values["bits per byte"]
    # training adds up in single precision
    assert found == pytest.approx(book_bits(model, model.tokenizer, text), rel=1e-5)


def test_bits_per_byte_by_hand(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"abcd")
    (tmp_path / "b.txt").write_bytes(b"abcdefghijkl")
    task = BitsPerByte(tmp_path, OPTIONS)
    bit = -math.log(2)
    found = {
        "a.txt": {"loglikelihood": 16 * bit, "tokens": 2},
        "b.txt": {"loglikelihood": 16 * bit, "tokens": 6},
    }
    values = task.score(found).values
    assert values["bits per byte"] == pytest.approx(2.0)
    assert values["bits per byte, mean of documents"] == pytest.approx((4 + 4 / 3) / 2)
    assert values["bits per token"] == pytest.approx(4.0)
    assert values["bytes per token"] == 2.0


def test_missing_and_empty_documents(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no \.txt files in"):
        BitsPerByte(tmp_path, OPTIONS)
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match=r"empty\.txt is empty; remove it"):
        BitsPerByte(tmp_path, OPTIONS)


@pytest.mark.parametrize("name", Lambada.files)
def test_lambada(model, tmp_path, name):
    words = ["the goose swam over the river", "a goose\u2028is the goose", "he swam the river"]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in words]
    (tmp_path / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    task = Lambada(tmp_path, OPTIONS)
    assert [task.targets[item.id] for item in task.items] == [" river", " goose", " river"]
    assert task.items[1].prompt == "a goose\u2028is the"
    found = predicted(task, model)
    encode = model.tokenizer.encode
    wanted = [
        direct(model, [0, *encode(t[: t.rindex(" ")])], encode(t[t.rindex(" ") :])) for t in words
    ]
    equal([(found[i.id]["loglikelihood"], found[i.id]["greedy"]) for i in task.items], wanted)
    assert task.baselines() == {"always 'river'": pytest.approx(200 / 3)}
    assert task.settings["file"] == name and task.settings["prefix token"] == 0


def test_lambada_by_hand(tmp_path):
    lines = [json.dumps({"text": f"some words {i}"}) for i in range(4)]
    (tmp_path / "lambada_test.jsonl").write_text("\n".join(lines))
    task = Lambada(tmp_path, OPTIONS)
    odds = zip([0.5, 0.25, 0.5, 0.25], [True, False, False, False], strict=True)
    found = {
        str(i): {"loglikelihood": math.log(p), "greedy": hit} for i, (p, hit) in enumerate(odds)
    }
    scores = task.score(found)
    assert scores.values["accuracy"] == 25.0 and scores.items["0"] == 1.0
    assert scores.values["perplexity"] == pytest.approx(8**0.5)
    assert len(Lambada(tmp_path, TaskOptions(limit=2)).items) == 2


def test_lambada_says_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"lambada_test\.jsonl \(passages\)"):
        Lambada(tmp_path, OPTIONS)


@pytest.fixture
def mmlu(tmp_path):
    rows = {
        "test/abstract_algebra": [
            ["Is 1, or 2?", "x", "None", "y, z", "w", "B"],
            ["Two?", *"abcdC"],
        ],
        "test/virology": [["Three?", *"efghD"]],
        "dev/abstract_algebra": [["First?", *"ijklA"], ["Second?", *"mnopB"]],
        "dev/virology": [["Other?", *"qrstC"], ["More?", *"uvwxD"]],
    }
    for name, table in rows.items():
        file = tmp_path / "data" / f"{name}_{name.split('/')[0]}.csv"
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("w", newline="") as stream:
            csv.writer(stream).writerows(table)
    return tmp_path


def test_mmlu_asks_as_the_official_script(model, mmlu):
    task = MMLU(mmlu, OPTIONS, shots=1)
    pairs = task.pairs(task.items[0])
    assert pairs[1] == (
        "The following are multiple choice questions (with answers) about  abstract algebra.\n\n"
        "First?\nA. i\nB. j\nC. k\nD. l\nAnswer: A\n\n"
        "Is 1, or 2?\nA. x\nB. None\nC. y, z\nD. w\nAnswer:",
        " B",
    )
    assert [item.id for item in task.items] == [
        "abstract_algebra/0", "abstract_algebra/1", "virology/0",
    ]  # fmt: skip
    found = predicted(task, model)
    encode = model.tokenizer.encode
    for item in task.items:
        wanted = [direct(model, [0, *encode(c)], encode(a))[0] for c, a in task.pairs(item)]
        assert found[item.id] == pytest.approx(wanted, rel=1e-9)
    alone = [task.predict(model, [group]) for group in grouped(task.items)]
    for item, (one,) in zip(task.items, alone, strict=True):
        assert one[0] == pytest.approx(found[item.id], rel=1e-9)
    assert task.settings["shots"] == 1 and task.settings["prompt"] == HEADING.rstrip()


def test_mmlu_averages(mmlu):
    task = MMLU(mmlu / "data", OPTIONS, shots=0)
    assert task.pairs(task.items[2])[0][0].endswith(
        "virology.\n\nThree?\nA. e\nB. f\nC. g\nD. h\nAnswer:"
    )
    found = {
        "abstract_algebra/0": [-3.0, -1.0, -2.0, -9.0],  # B, right
        "abstract_algebra/1": [-1.0, -2.0, -3.0, -4.0],  # A, wrong
        "virology/0": [-4.0, -3.0, -2.0, -1.0],  # D, right
    }
    scores = task.score(found)
    assert scores.values == {
        "accuracy, micro average over questions": pytest.approx(200 / 3),
        "accuracy, macro average over subjects": pytest.approx(75.0),
    }
    assert scores.headline == "accuracy, micro average over questions"
    assert scores.types["subject"] == {"abstract_algebra": (50.0, 2), "virology": (100.0, 1)}
    assert task.baselines() == {"a choice at random": 25.0, "always 'B'": pytest.approx(100 / 3)}


def test_mmlu_says_what_is_wrong(mmlu, tmp_path):
    with pytest.raises(ValueError, match="has 2 examples for 5 shots; take fewer"):
        MMLU(mmlu, OPTIONS)
    file = mmlu / "data" / "test" / "virology_test.csv"
    file.write_text("question,A,B,C,D,answer\n")
    with pytest.raises(
        ValueError, match=r"virology_test.csv, line 1: expected question.*'answer'\]"
    ):
        MMLU(mmlu, OPTIONS, shots=1)
    with pytest.raises(FileNotFoundError, match=r"test \(questions\), dev \(examples\)"):
        MMLU(tmp_path / "nowhere", OPTIONS)


def test_scoring_needs_no_torch():
    code = "import sys, goose_mm.eval.tasks.text; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
