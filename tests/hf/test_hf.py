"""The transformers shell: what transformers does with it is what our own model does."""

from __future__ import annotations

import copy
import importlib
import subprocess
import sys
from dataclasses import fields

import pytest
import torch
from harness import lm_eval, text_tasks
from tiny import text_model

from goose_mm.config import BackboneConfig, ConfigError, TextConfig, TextModel
from goose_mm.hf import GooseTokenizer, RWKV7Cache, RWKV7Config, RWKV7ForCausalLM
from goose_mm.hf.configuration import NOT_FOR_TEXT, SIZES
from goose_mm.hub import load
from goose_mm.text import RWKV7LM
from goose_mm.text.generate import prefill

PROMPTS = ["The goose", "A", "Once upon a time there was a wide river, and"]
LENGTH = 12


@pytest.fixture(scope="module")
def lm() -> RWKV7LM:
    return text_model(["the goose swam over the wide river " * 9, *PROMPTS])


@pytest.fixture(scope="module")
def model(lm) -> RWKV7ForCausalLM:
    return RWKV7ForCausalLM.from_goose(lm)


@pytest.fixture(scope="module")
def tokenizer(lm) -> GooseTokenizer:
    return GooseTokenizer.of(lm.tokenizer, "bpe")


@pytest.fixture(scope="module")
def wanted(lm) -> list[str]:
    return [lm.generate(p, max_new_tokens=LENGTH, temperature=0.0) for p in PROMPTS]


def write(model, tokenizer, prompts, **more):
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    asked = {"max_new_tokens": LENGTH, "do_sample": False, **more}
    ids = model.generate(**batch, **asked)[:, batch["input_ids"].shape[1] :]
    return tokenizer.batch_decode(ids, skip_special_tokens=True)


def random_model(seed: int = 0, **more) -> RWKV7ForCausalLM:
    torch.manual_seed(seed)
    config = RWKV7Config(dim=64, num_layers=2, vocab_size=300, tokenizer="bpe", **more)
    model = RWKV7ForCausalLM(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


# --- generation ---------------------------------------------------------------------------------


def test_greedy_is_ours_one_by_one_and_padded_on_the_left(model, tokenizer, wanted):
    assert [write(model, tokenizer, [p])[0] for p in PROMPTS] == wanted
    assert write(model, tokenizer, PROMPTS) == wanted


@pytest.mark.parametrize(
    "how", [{"use_cache": False}, {"prefill_chunk_size": 3}, {"num_return_sequences": 1}]
)
def test_greedy_does_not_depend_on_how_the_text_is_fed(model, tokenizer, wanted, how):
    assert write(model, tokenizer, PROMPTS, **how) == wanted


def test_greedy_in_training_mode_and_from_embeddings(model, tokenizer, wanted):
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    embedded = model.lm.emb(batch["input_ids"])
    model.train()
    ids = model.generate(
        inputs_embeds=embedded,
        attention_mask=batch["attention_mask"],
        max_new_tokens=LENGTH,
        do_sample=False,
    )
    model.eval()
    assert tokenizer.batch_decode(ids, skip_special_tokens=True) == wanted


def test_beams_do_not_depend_on_the_cache(model, tokenizer):
    beams = {"num_beams": 3, "num_return_sequences": 2}
    cached = write(model, tokenizer, PROMPTS, **beams)
    assert cached == write(model, tokenizer, PROMPTS, use_cache=False, **beams)


def test_the_prompt_is_read_once(model, tokenizer):
    seen = []
    hook = model.lm.backbone.register_forward_pre_hook(
        lambda m, args: seen.append(args[0].shape[1])
    )
    write(model, tokenizer, PROMPTS[:1], max_new_tokens=4, eos_token_id=-1)
    hook.remove()
    assert seen == [len(tokenizer(PROMPTS[0])["input_ids"]), 1, 1, 1]


def test_a_cache_goes_on_as_if_the_whole_had_been_read(model, tokenizer, lm):
    ids = tokenizer(PROMPTS[2], return_tensors="pt")["input_ids"]
    whole = model(ids).logits
    first = model(ids[:, :5], use_cache=True)
    rest = model(ids[:, 5:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), whole)
    assert rest.past_key_values.get_seq_length() == ids.shape[1]
    _, state = prefill(lm, [ids[0].tolist()])
    torch.testing.assert_close(rest.past_key_values.state.wkv, state.wkv)


@torch.no_grad()
def test_generate_goes_on_from_a_cache_and_from_a_state_of_ours(model, tokenizer, lm, wanted):
    ids = tokenizer(PROMPTS[2], return_tensors="pt")["input_ids"]
    cache = model(ids[:, :5], use_cache=True).past_key_values
    asked = {"max_new_tokens": LENGTH, "do_sample": False}
    out = model.generate(ids, past_key_values=copy.deepcopy(cache), **asked)
    assert tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True) == wanted[2]
    _, state = prefill(lm, [ids[0, :5].tolist()])
    out = model.generate(ids[:, 5:], past_key_values=RWKV7Cache(state), **asked)
    assert tokenizer.decode(out[0, ids.shape[1] - 5 :], skip_special_tokens=True) == wanted[2]


def test_what_the_shell_cannot_do_says_so(model, tokenizer):
    from transformers import DynamicCache

    ids = torch.tensor([[1, 2, 3]])
    with pytest.raises(ValueError, match=r"must be a goose_mm\.hf\.RWKV7Cache, not a DynamicCache"):
        model(ids, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match=r"attention_mask is \[1, 2\], for tokens \[1, 3\]"):
        model(ids, attention_mask=torch.ones(1, 2))
    with pytest.raises(ValueError, match="has no attentions"):
        model(ids, output_attentions=True)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="cannot unread tokens"):
        RWKV7Cache().crop(-1)
    with pytest.raises(ValueError, match="stateful"):
        model.generate(ids, assistant_model=model, max_new_tokens=2)


# --- logits and loss ----------------------------------------------------------------------------


def test_a_batch_padded_on_either_side_has_the_logits_of_its_rows(model, tokenizer):
    for side in ("left", "right"):
        batch = tokenizer(PROMPTS, return_tensors="pt", padding=True, padding_side=side)
        logits = model(**batch).logits
        for row, prompt in enumerate(PROMPTS):
            alone = model(**tokenizer(prompt, return_tensors="pt")).logits[0]
            real = batch["attention_mask"][row].bool()
            torch.testing.assert_close(logits[row][real], alone)


def test_loss_and_gradient_are_those_of_our_model(lm):
    model = RWKV7ForCausalLM.from_goose(copy.deepcopy(lm))
    ids = torch.randint(1, 300, (2, 9))
    loss = model(ids, labels=ids).loss
    loss.backward()
    ours = copy.deepcopy(lm)
    expected, _ = ours.loss({"ids": ids})
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for (name, a), b in zip(ours.named_parameters(), model.lm.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, msg=name)


def test_parts_of_a_batch_add_up_to_its_gradient(lm):
    ids = torch.randint(1, 300, (3, 7))
    labels = ids.clone()
    labels[0, :4] = -100
    labels[2] = -100
    gradients = []
    for parts in ([slice(0, 3)], [slice(0, 1), slice(1, 2), slice(2, 3)]):
        model = RWKV7ForCausalLM.from_goose(copy.deepcopy(lm))
        items = (labels[:, 1:] != -100).sum()
        for part in parts:
            model(ids[part], labels=labels[part], num_items_in_batch=items).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_the_trainer_of_transformers_trains_it(tmp_path):
    from transformers import Trainer, TrainingArguments

    model = random_model().float()
    ids = torch.arange(1, 17).repeat(2)
    data = [{"input_ids": ids, "labels": ids}] * 8
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=12,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=3e-3,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        logging_steps=1,
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data[:2])
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0] / 2
    assert trainer.evaluate()["eval_loss"] < losses[0]


# --- folders ------------------------------------------------------------------------------------


def test_saved_and_loaded_it_is_the_same(model, tokenizer, wanted, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    words = AutoTokenizer.from_pretrained(tmp_path)
    assert type(again) is RWKV7ForCausalLM and type(words) is GooseTokenizer
    assert again.dtype == torch.float64 and again.config.goose() == model.config.goose()
    for (name, a), b in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert write(again, words, PROMPTS) == wanted
    assert load(tmp_path).generate(PROMPTS, max_new_tokens=LENGTH, temperature=0.0) == wanted
    half = RWKV7ForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half(torch.tensor([[1, 2]])).logits.isfinite().all()


def test_a_shipped_model_by_name(tmp_path):
    shell = RWKV7ForCausalLM.from_goose("goose-tiny-text")
    ours = load("goose-tiny-text")
    words = GooseTokenizer.of(shell.lm.tokenizer, shell.config.tokenizer)
    prompt = "The old house"
    assert write(shell, words, [prompt]) == [
        ours.generate(prompt, max_new_tokens=LENGTH, temperature=0.0)
    ]
    with pytest.raises(ValueError, match="is a model for audio; use one for text"):
        RWKV7ForCausalLM.from_goose("goose-tiny-audio")


@pytest.mark.parametrize("tied", [False, True])
def test_tied_or_not(tied, lm, tmp_path):
    from safetensors import safe_open

    model = random_model(tie_word_embeddings=tied)
    assert (model.lm.head.weight is model.lm.emb.weight) == tied
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert ("lm.head.weight" in file.keys()) != tied  # noqa: SIM118
    again = RWKV7ForCausalLM.from_pretrained(tmp_path)
    assert (again.lm.head.weight is again.lm.emb.weight) == tied
    ids = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(again(ids).logits, model(ids).logits)
    GooseTokenizer.of(lm.tokenizer, "bpe").save_pretrained(tmp_path)
    ours, _ = load(tmp_path)(ids)
    torch.testing.assert_close(ours.double(), model(ids).logits, rtol=1e-3, atol=1e-4)
    assert RWKV7ForCausalLM.from_goose(again.lm).config.tie_word_embeddings == tied


def test_the_start_is_the_official_one_and_lost_weights_get_it(tmp_path):
    from safetensors.torch import load_file, save_file

    config = RWKV7Config(dim=64, num_layers=2, vocab_size=300)
    ours, other = (RWKV7LM(config.goose()).state_dict() for _ in range(2))
    shell = RWKV7ForCausalLM(config)
    for name, tensor in shell.lm.state_dict().items():
        torch.testing.assert_close(tensor.norm(), ours[name].norm(), rtol=0.02, atol=0)
        assert torch.equal(tensor, ours[name]) == torch.equal(other[name], ours[name]), name
    half = RWKV7ForCausalLM._from_config(config, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.lm.head.weight.isfinite().all()
    with torch.no_grad():
        for parameter in shell.parameters():
            parameter.fill_(0.5)
    shell.save_pretrained(tmp_path)
    file, lost = tmp_path / "model.safetensors", "lm.backbone.blocks.0.att.w0"
    tensors = load_file(file)
    del tensors[lost]
    save_file(tensors, file, metadata={"format": "pt"})
    again = RWKV7ForCausalLM.from_pretrained(tmp_path).state_dict()
    assert torch.equal(again.pop(lost), ours[lost.removeprefix("lm.")])
    assert all((tensor == 0.5).all() for tensor in again.values())


def test_the_configuration_says_all_that_ours_says(tmp_path):
    assert {*SIZES, *NOT_FOR_TEXT} == {f.name for f in fields(BackboneConfig)}
    backbone = BackboneConfig(dim=128, num_layers=3, a_max=2.0, dropout=0.1, gate_rank=96)
    ours = TextModel(backbone=backbone, text=TextConfig(vocab_size=400, tokenizer="bpe"))
    theirs = RWKV7Config.of(ours)
    theirs.save_pretrained(tmp_path)
    assert RWKV7Config.from_pretrained(tmp_path).goose() == TextModel(
        backbone=backbone.resolved(), text=ours.text
    )
    assert (theirs.hidden_size, theirs.num_hidden_layers, theirs.num_attention_heads) == (128, 3, 2)
    assert RWKV7Config(hidden_size=128, num_hidden_layers=3).dim == 128
    with pytest.raises(ConfigError, match="multiple of head_size"):
        RWKV7Config(dim=100)
    with pytest.raises(ConfigError, match="tokenizer must be one of"):
        RWKV7Config(tokenizer="sentencepiece")


def test_importing_goose_mm_does_not_import_transformers():
    code = "import sys, goose_mm; print('transformers' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


# --- lm-evaluation-harness ----------------------------------------------------------------------


@lm_eval
def test_hflm_scores_what_our_plug_in_scores(lm, model, tokenizer, tmp_path, monkeypatch):
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tasks = text_tasks(tmp_path)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    native = importlib.import_module("goose_mm.eval.plugins.lm_eval").GooseLM
    common = {"pretrained": model, "tokenizer": tokenizer, "prefix_token_id": 0, "max_length": 4096}

    def scores(harness_model, tasks):
        found = simple_evaluate(harness_model, tasks=tasks, task_manager=manager, bootstrap_iters=0)
        rows = {
            task: [row["resps"] for row in sorted(some, key=lambda row: row["doc_id"])]
            for task, some in found["samples"].items()
        }
        return found["results"], rows

    def close(a, b):
        if isinstance(a, str | bool):
            return a == b
        if isinstance(a, float):
            return a == pytest.approx(b, rel=1e-6)
        return len(a) == len(b) and all(close(x, y) for x, y in zip(a, b, strict=True))

    # behind the end-of-text token, which the harness would count as a part of a rolled text
    ours = scores(native(lm, batch_size=2), tasks[:2])
    theirs = scores(HFLM(**common, batch_size=2), tasks[:2])
    bare = scores(native(lm, batch_size=2, add_bos_token=False), tasks)
    their_bare = scores(HFLM(**common, batch_size=2, add_bos_token=False), tasks)
    for (results, rows), (their_results, their_rows) in ((ours, theirs), (bare, their_bare)):
        for task in rows:
            assert close(rows[task], their_rows[task]), task
            for name, value in results[task].items():
                if isinstance(value, float):
                    assert their_results[task][name] == pytest.approx(value, rel=1e-6), name
