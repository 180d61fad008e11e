"""The plug-ins under the real harnesses, on small tasks with local data; each set of tests needs
its harness: `pip install lm_eval==0.4.13`, `pip install lmms-eval==0.7.3`."""

import importlib
import json
import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import CI, QUESTIONS, lm_eval, text_tasks
from PIL import Image

from goose_mm import checkpoint
from goose_mm.config import (
    BackboneConfig,
    EncoderSpec,
    TextConfig,
    TextModel,
    VisionConfig,
    VisionModel,
)
from goose_mm.eval.tasks.likelihood import loglikelihoods
from goose_mm.hub import load
from goose_mm.text import RWKV7LM, BPETokenizer
from goose_mm.vision import VisualRWKV7, prompt_text

lmms_eval = pytest.mark.skipif(
    not (CI or find_spec("lmms_eval")),
    reason="lmms_eval is not installed: pip install lmms-eval==0.7.3",
)
ROOT = Path(__file__).parents[2]


def disturbed(model):
    """The official start ignores all context."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer():
    return BPETokenizer.train(["What is this? A red ball. How many are there? two " * 9], 300)


@pytest.fixture(scope="module")
def text_model(tokenizer):
    torch.manual_seed(0)
    config = TextModel(
        backbone=BackboneConfig(dim=64, num_layers=2),
        text=TextConfig(vocab_size=tokenizer.vocab_size, tokenizer="bpe"),
    )
    return disturbed(RWKV7LM(config, tokenizer)).double()


@pytest.fixture(scope="module")
def vision_model(tokenizer):
    torch.manual_seed(3)
    config = VisionModel(
        backbone=BackboneConfig(dim=32, num_layers=2, head_size=16),
        text=TextConfig(vocab_size=tokenizer.vocab_size, tokenizer="bpe"),
        vision=VisionConfig(encoders=(EncoderSpec(source="toy", name="eye", image_size=32),)),
    )
    return disturbed(VisualRWKV7(config, tokenizer))


def save(model, tokenizer, folder):
    """Write a model, and read it again: a folder's configuration is spelled out in full."""
    folder.mkdir(exist_ok=True)
    tokenizer.save(folder / "tokenizer.json")
    checkpoint.save_model(folder, model.config, model.state_dict())
    return load(folder)


def photo(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def environment(tmp_path, *paths):
    """For a harness in a process of its own, without a network and with caches of its own."""
    search = os.pathsep.join([str(ROOT), *map(str, paths), os.environ.get("PYTHONPATH", "")])
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"), "1")
    homes = {"HF_HOME": str(tmp_path / "hub"), "LMMS_EVAL_HOME": str(tmp_path / "lmms")}
    return os.environ | offline | homes | {"PYTHONPATH": search}


# --- lm-evaluation-harness ---------------------------------------------------------------------


@pytest.fixture
def goose(text_model):
    return importlib.import_module("goose_mm.eval.plugins.lm_eval").GooseLM(
        text_model, batch_size=2
    )


def requests(kind, *args):
    from lm_eval.api.instance import Instance

    return [
        Instance(kind, doc={}, arguments=arg, idx=i, metadata=("task", i, 1))
        for i, arg in enumerate(args)
    ]


@lm_eval
def test_the_harness_scores_our_numbers(goose, text_model, tmp_path, monkeypatch):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tasks = text_tasks(tmp_path)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    results = simple_evaluate(goose, tasks=tasks, task_manager=manager, bootstrap_iters=0)
    encode = text_model.tokenizer.encode
    answers = [" one", " two", " a red ball"]
    right, bits, exact = 0, 0.0, 0
    for i, question in enumerate(QUESTIONS):
        whole = [encode(question + answer) for answer in answers]
        context = encode(question)
        assert all(ids[: len(context)] == context for ids in whole)
        scores = loglikelihoods(
            text_model, [[0, *context]] * 3, [ids[len(context) :] for ids in whole]
        )
        right += max(range(3), key=lambda j, s=scores: s[j][0]) == i
        bits -= loglikelihoods(text_model, [[0]], [context])[0][0] / math.log(2)
        wrote = text_model.generate(question, max_new_tokens=7, temperature=0.0, stop=("e",))
        logged = results["samples"]["goose_write"][i]["resps"][0][0]
        assert logged == wrote
        exact += wrote.strip() == answers[i].strip()
    found = results["results"]
    assert found["goose_choice"]["acc,none"] == pytest.approx(right / 3)
    size = sum(len(question) for question in QUESTIONS)
    assert found["goose_rolling"]["bits_per_byte,none"] == pytest.approx(bits / size)
    assert found["goose_write"]["exact_match,none"] == pytest.approx(exact / 3)


@lm_eval
def test_batches_are_one_by_one_in_the_harness(goose):
    pairs = [("What is", " this?"), ("", "two"), ("A", " red ball."), ("What is", " a ball")]
    together = goose.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    alone = [goose.loglikelihood(requests("loglikelihood", pair))[0] for pair in pairs]
    assert [hit for _, hit in together] == [hit for _, hit in alone]
    assert [x for x, _ in together] == pytest.approx([x for x, _ in alone], rel=1e-9)
    asked = [
        ("A", {"max_gen_toks": 5}),
        ("What is", {"until": ["a"]}),
        ("How", {"max_gen_toks": 5}),
    ]
    wrote = goose.generate_until(requests("generate_until", *asked), disable_tqdm=True)
    assert wrote == [goose.generate_until(requests("generate_until", one))[0] for one in asked]
    assert "a" not in wrote[1]
    texts = [("What is this? " * 9,), ("",), ("two",)]
    rolled = goose.loglikelihood_rolling(requests("loglikelihood_rolling", *texts))
    assert rolled[1] == 0.0 and rolled[0] < rolled[2] < 0


@lm_eval
def test_the_first_token_can_be_left_out(text_model):
    plugin = importlib.import_module("goose_mm.eval.plugins.lm_eval")
    bare = plugin.GooseLM(text_model, add_bos_token=False)
    full = plugin.GooseLM(text_model)
    ids = text_model.tokenizer.encode("two")
    assert (bare.tok_encode("two"), full.tok_encode("two")) == (ids, [0, *ids])
    asked = requests("loglikelihood", ("What is", " this?"), ("", "two"))
    (with_first, empty), (without, same) = full.loglikelihood(asked), bare.loglikelihood(asked)
    assert with_first != without and empty[0] == pytest.approx(same[0])
    rolled = requests("loglikelihood_rolling", ("What is this?",))
    assert bare.loglikelihood_rolling(rolled) == full.loglikelihood_rolling(rolled)
    assert bare.generate_until(requests("generate_until", ("", {"max_gen_toks": 3})))


@lm_eval
def test_wrong_arguments_say_so(text_model, vision_model):
    make = importlib.import_module("goose_mm.eval.plugins.lm_eval").GooseLM
    with pytest.raises(ValueError, match="batch_size must be a number, as 64; it is 'auto'"):
        make(text_model, batch_size="auto")
    with pytest.raises(ValueError, match="this is a model for vision; use one for text"):
        make(vision_model)
    with pytest.raises(ValueError, match="dtype 'int8' is not one of float32, bfloat16"):
        make("goose-tiny-text", dtype="int8")


@lm_eval
def test_the_harness_keeps_its_own_models(tmp_path):
    """In a fresh process: the harness registers them only while nothing else is registered."""
    code = (
        "import goose_mm.eval.plugins.lm_eval as plugin\n"
        "from lm_eval.api.registry import get_model, model_registry\n"
        "from lm_eval.models import MODEL_MAPPING\n"
        "assert {'goose', 'hf', *MODEL_MAPPING} <= set(model_registry)\n"
        "assert get_model('goose') is plugin.GooseLM\n"
        "print(get_model('dummy').__name__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(tmp_path), capture_output=True, text=True
    )
    assert done.stdout == "DummyLM\n", done.stderr[-3000:]


@lm_eval
def test_the_command_line_of_the_harness_knows_goose(text_model, tokenizer, tmp_path):
    folder = tmp_path / "model"
    save(text_model, tokenizer, folder)
    text_tasks(tmp_path)
    command = [
        *(sys.executable, "-m", "goose_mm.eval.plugins.lm_eval", "run", "--model", "goose"),
        *("--model_args", f"pretrained={folder}", "--tasks", "goose_choice", "--batch_size", "4"),
        *("--include_path", str(tmp_path), "--output_path", str(tmp_path / "out")),
    ]
    done = subprocess.run(
        command, env=environment(tmp_path), cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (report,) = (tmp_path / "out").rglob("results_*.json")
    assert "acc,none" in json.loads(report.read_text())["results"]["goose_choice"]


# --- lmms-eval ----------------------------------------------------------------------------------


@pytest.fixture
def plugin():
    return importlib.import_module("goose_mm.eval.plugins.lmms_eval")


DOCS = [{"picture": i % 2, "question": question} for i, question in enumerate(QUESTIONS * 2)]


def visual(doc):
    return [photo(doc["picture"])]


def messages(doc):
    parts = [{"type": "image", "url": photo(doc["picture"])}]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": doc["question"]}]}]


def look_request(args):
    from lmms_eval.api.instance import Instance

    about = {"task": "t", "doc_id": 0, "repeats": 1}
    return Instance("generate_until", arguments=args, idx=0, metadata=about)


def asked(make):
    return [look_request(make(i, doc)) for i, doc in enumerate(DOCS)]


def wanted(model, settings):
    return [model.ask(photo(doc["picture"]), doc["question"], **settings) for doc in DOCS]


@lmms_eval
@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_picture_is_read_once_and_the_order_restored(
    plugin, vision_model, batch_size, monkeypatch
):
    settings = {"max_new_tokens": 6}
    answers = wanted(vision_model, settings)
    assert len(set(answers)) > 2
    read = []
    tokens = VisualRWKV7.image_tokens
    monkeypatch.setattr(
        VisualRWKV7, "image_tokens", lambda m, p: read.append(len(p[0])) or tokens(m, p)
    )
    for kind in (plugin.GooseSimple, plugin.GooseChat):
        read.clear()
        goose = kind(vision_model, batch_size=batch_size)
        goose.task_dict = {"t": {"test": DOCS}}
        if goose.is_simple:
            made = asked(lambda i, doc: (doc["question"], settings, visual, i, "t", "test"))
        else:
            made = asked(lambda i, doc: ("", messages, settings, i, "t", "test"))
        assert goose.generate_until(made) == answers
        assert read == ([1, 1] if batch_size == 1 else [2])


@lmms_eval
def test_settings_blind_and_several_pictures(plugin, vision_model):
    goose = plugin.GooseSimple(vision_model, batch_size=4)
    goose.task_dict = {"t": {"test": DOCS}}
    both = [photo(0), photo(1)]
    looks = [visual, lambda doc: None, lambda doc: both, visual]
    settings = [{"max_new_tokens": n} for n in (3, 3, 3, 5)]
    made = [
        look_request((QUESTIONS[0], one, look, 0, "t", "test"))
        for look, one in zip(looks, settings, strict=True)
    ]
    ask = vision_model.ask
    assert goose.generate_until(made) == [
        ask(seen, QUESTIONS[0], **one)
        for seen, one in zip([photo(0), None, both, photo(0)], settings, strict=True)
    ]
    made[0].arguments = (QUESTIONS[0], {}, lambda doc: ["film.mp4"], 0, "t", "test")
    with pytest.raises(ValueError, match="pictures alone, and this task hands over a str"):
        goose.generate_until(made)


@lmms_eval
def test_likelihoods_behind_a_picture(plugin, vision_model):
    goose = plugin.GooseSimple(vision_model)
    goose.task_dict = {"t": {"test": DOCS}}
    made = [
        look_request((doc["question"], f" {answer}", visual, i, "t", "test"))
        for i, doc in enumerate(DOCS)
        for answer in ("two", "a red ball")
    ]
    found = goose.loglikelihood(made)
    encode = vision_model.lm.tokenizer.encode
    for request, (score, _) in zip(made, found, strict=True):
        question, answer, _, i, *_ = request.args
        context = encode(prompt_text(vision_model.config.vision, question))
        ids = torch.tensor([[*context, *encode(answer)]])
        with torch.no_grad():
            state = vision_model.prefix(photo(DOCS[i]["picture"])).state
            odds = vision_model.lm(ids, state)[0][0].log_softmax(-1)
        places = range(len(context), ids.shape[1])
        total = sum(float(odds[at - 1, ids[0, at]]) for at in places)
        assert score == pytest.approx(total, rel=1e-4)


@lmms_eval
def test_conversations_of_several_rounds(plugin, vision_model):
    def following(doc, previous_output, round_idx, previous_round_info):
        assert len(previous_output) == round_idx and previous_round_info in (None, "told")
        return visual(doc), QUESTIONS[1], round_idx == 2, previous_output, "told"

    def chat(doc, round_idx=0, previous_output=(), previous_round_info=None):
        if not round_idx:
            return messages(doc)
        return messages(doc | {"question": QUESTIONS[1]}), round_idx == 2, None, "told"

    settings = {"max_new_tokens": 4}
    answers = [vision_model.ask(photo(0), question, **settings) for question in QUESTIONS[:2]]
    simple, talk = plugin.GooseSimple(vision_model), plugin.GooseChat(vision_model)
    simple.task_dict = talk.task_dict = {"t": {"test": DOCS}}
    args = (QUESTIONS[0], settings, visual, following, 0, "t", "test")
    assert simple.generate_until_multi_round([look_request(args)]) == [answers]
    args = ("", chat, settings, 0, "t", "test")
    assert talk.generate_until_multi_round([look_request(args)]) == [answers]


@lmms_eval
def test_weights_must_be_named(plugin, vision_model, tokenizer, tmp_path):
    folder = str(tmp_path / "model")
    known = plugin.weights_name(save(vision_model, tokenizer, tmp_path / "model"))
    assert plugin.GooseChat(folder, weights=known, device="cpu").batch_size == 1
    with pytest.raises(ValueError, match=f"weights={known}, not sha256-0"):
        plugin.GooseChat(folder, weights="sha256-0", device="cpu")
    with pytest.raises(ValueError, match=f"weights={known}, which the response cache goes by"):
        plugin.GooseChat(folder, device="cpu")


def vision_task(folder):
    from datasets import Dataset, DatasetDict, Features, Value
    from datasets import Image as ImageFeature

    rows = [doc | {"picture": photo(doc["picture"]), "answer": "two"} for doc in DOCS]
    kinds = {"picture": ImageFeature(), "question": Value("string"), "answer": Value("string")}
    data = Dataset.from_list(rows, features=Features(kinds))
    DatasetDict({"test": data}).save_to_disk(str(folder / "data"))
    (folder / "utils.py").write_text(
        "def look(doc):\n    return [doc['picture'].convert('RGB')]\n\n\n"
        "def say(doc, lmms_eval_specific_kwargs=None):\n    return doc['question']\n\n\n"
        "def score(doc, results):\n    return {'length': float(len(results[0]))}\n"
    )
    (folder / "goose_look.yaml").write_text(f"""
task: goose_look
dataset_path: {folder / "data"}
dataset_kwargs: {{load_from_disk: true}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.look
doc_to_text: !function utils.say
doc_to_target: answer
process_results: !function utils.score
generation_kwargs: {{max_new_tokens: 6, temperature: 0, do_sample: false}}
metric_list: [{{metric: length, aggregation: mean, higher_is_better: true}}]
""")


def harness(tmp_path, folder, weights, *flags):
    """Run the task; what the report says. The entry point is that of an installed package."""
    package = tmp_path / "site" / "goose_entry-0.dist-info"
    package.mkdir(parents=True, exist_ok=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: goose-entry\nVersion: 0\n")
    (package / "entry_points.txt").write_text(
        "[lmms_eval.models]\ngoose = goose_mm.eval.plugins.lmms_eval:manifest\n"
    )
    out = tmp_path / f"out-{weights}{len(flags)}"
    command = [
        *(sys.executable, "-m", "lmms_eval", "--model", "goose", "--batch_size", "4"),
        *("--model_args", f"pretrained={folder},weights={weights},device=cpu"),
        *("--tasks", "goose_look", "--include_path", str(tmp_path), "--log_samples"),
        *("--use_cache", str(tmp_path / "answers"), "--output_path", str(out), *flags),
    ]
    where = environment(tmp_path, package.parent)
    done = subprocess.run(command, env=where, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    # the harness exits with 0 even if it failed: its report tells
    report = next(out.rglob("*results.json"), None)
    assert report, done.stdout[-2000:] + done.stderr[-3000:]
    return json.loads(report.read_text())["results"]["goose_look"]["length,none"]


@lmms_eval
@pytest.mark.parametrize("flags", [(), ("--force_simple",)])
def test_the_harness_finds_goose_and_never_answers_for_other_weights(
    plugin, vision_model, tokenizer, tmp_path, flags
):
    vision_task(tmp_path)
    folder = tmp_path / "model"
    torch.manual_seed(7)
    other = VisualRWKV7(vision_model.config, tokenizer)
    other.load_state_dict(vision_model.state_dict())
    means = []
    for model in (vision_model, disturbed(other)):
        saved = save(model, tokenizer, folder)
        length = harness(tmp_path, folder, plugin.weights_name(saved), *flags)
        lengths = [len(text) for text in wanted(saved, {"max_new_tokens": 6})]
        assert length == pytest.approx(sum(lengths) / len(lengths))
        means.append(length)
    assert means[0] != means[1]
    assert list((tmp_path / "answers").rglob("*.db")), "the harness kept no answers"
