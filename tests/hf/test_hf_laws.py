"""What transformers asks of a model of its own: hidden states, a base model, tables to resize."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from safetensors.torch import save_file

from goose_mm.hf import RWKV7Config, RWKV7ForCausalLM
from goose_mm.hub import load

DIM, LAYERS, ROWS, NEW = 32, 2, 60, 3
IDS = torch.arange(1, 11).reshape(2, 5)


def a_model(**more) -> RWKV7ForCausalLM:
    torch.manual_seed(0)
    config = RWKV7Config(
        dim=DIM, num_layers=LAYERS, head_size=16, vocab_size=ROWS, eos_token_id=None, **more
    )
    model = RWKV7ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def weights(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- hidden states ------------------------------------------------------------------------------


def test_hidden_states_are_the_embeddings_and_what_leaves_each_layer():
    model = a_model()
    left = []
    for block in model.lm.backbone.blocks:
        block.register_forward_hook(lambda block, given, out: left.append(out[0]))
    out = model(IDS, output_hidden_states=True)
    first, *between, last = out.hidden_states
    assert torch.equal(first, model.lm.emb(IDS)) and len(between) == LAYERS - 1
    assert all(torch.equal(a, b) for a, b in zip(between, left, strict=False))
    assert torch.equal(last, model.lm.backbone.ln_out(left[-1]))
    assert torch.equal(model.lm.head(last), out.logits)
    assert model(IDS).hidden_states is None
    first.retain_grad()
    out.logits[0, -1, 0].backward()
    assert first.grad[0].abs().sum() > 0 and first.grad[1].abs().sum() == 0


def test_hidden_states_when_the_configuration_asks_and_as_a_tuple():
    model = a_model(output_hidden_states=True)
    assert len(model(IDS).hidden_states) == LAYERS + 1
    assert model(IDS, output_hidden_states=False).hidden_states is None
    logits, _, hidden = model(IDS, return_dict=False)
    assert torch.equal(model.lm.head(hidden[-1]), logits)
    with pytest.raises(ValueError, match="no attentions"):
        a_model(output_attentions=True)(IDS)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("how", [{}, {"num_beams": 2}, {"do_sample": True, "top_k": 9}])
def test_generate_gives_scores_and_hidden_states_of_every_step(how, cached):
    model = a_model()
    asked = {"max_new_tokens": NEW, "use_cache": cached, "do_sample": False, **how}
    mask = torch.ones_like(IDS)
    out = model.generate(
        IDS,
        attention_mask=mask,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        output_hidden_states=True,
        **asked,
    )
    rows = len(IDS) * how.get("num_beams", 1)
    assert [tuple(step.shape) for step in out.scores] == [(rows, ROWS)] * NEW
    assert [tuple(step.shape) for step in out.logits] == [(rows, ROWS)] * NEW
    for n, step in enumerate(out.hidden_states):
        read = IDS.shape[1] + n if not cached or n == 0 else 1
        assert [tuple(layer.shape) for layer in step] == [(rows, read, DIM)] * (LAYERS + 1)
    assert (out.past_key_values is not None) == cached
    if "do_sample" not in how:
        assert torch.equal(model.generate(IDS, attention_mask=mask, **asked), out.sequences)


def test_generate_goes_on_from_what_an_earlier_call_returned():
    model = a_model()
    for given in ({"input_ids": IDS}, {"inputs_embeds": model.lm.emb(IDS)}):
        asked = {"return_dict_in_generate": True, "do_sample": False, "pad_token_id": 0}
        whole = model.generate(**given, max_new_tokens=4, **asked)
        part = model.generate(**given, max_new_tokens=3, **asked)
        ids = part.sequences[:, -3:]
        if "input_ids" in given:
            more = {"input_ids": part.sequences}
        else:
            more = {"inputs_embeds": torch.cat([given["inputs_embeds"], model.lm.emb(ids)], 1)}
        rest = model.generate(
            **more, max_new_tokens=1, past_key_values=part.past_key_values, **asked
        )
        assert torch.equal(whole.sequences[:, -1], rest.sequences[:, -1])
        torch.testing.assert_close(whole.past_key_values.state, rest.past_key_values.state)


# --- the base model -----------------------------------------------------------------------------


def test_the_base_model_is_ours_and_weights_may_go_by_its_names(tmp_path):
    model = a_model()
    assert model.base_model is model.lm
    model.config.save_pretrained(tmp_path)
    save_file(model.lm.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    again, info = RWKV7ForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert same(weights(again), weights(model))


def test_adapters_of_peft_learn_and_merge():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    model = peft.get_peft_model(a_model(), config)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(5):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    logits = model(input_ids=IDS).logits
    torch.testing.assert_close(model.merge_and_unload()(IDS).logits, logits, rtol=1e-3, atol=1e-4)


# --- what a start is, and when ------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rows", [ROWS + 10, ROWS - 10])
@pytest.mark.parametrize("loaded", [False, True])
def test_resized_tables_stay_as_they_are(tied, rows, loaded, tmp_path):
    model = a_model(tie_word_embeddings=tied)
    if loaded:
        model.save_pretrained(tmp_path)
        model = RWKV7ForCausalLM.from_pretrained(tmp_path)
    before = weights(model)
    model.resize_token_embeddings(rows)
    after = weights(model)
    model.post_init()
    assert same(weights(model), after)
    assert (model.lm.head.weight is model.lm.emb.weight) == tied
    kept = min(rows, ROWS)
    assert all(torch.equal(after[name][:kept], before[name][:kept]) for name in before)
    assert model.lm.config.text.vocab_size == model.config.vocab_size == rows
    assert model(IDS, labels=IDS).logits.shape == (2, 5, rows)
    shared = RWKV7ForCausalLM.from_goose(model.lm)
    assert shared.config.vocab_size == rows and same(weights(shared), after)


def test_a_resized_model_is_saved_and_loaded(tmp_path):
    model = a_model()
    model.resize_token_embeddings(ROWS + 4)
    model.save_pretrained(tmp_path)
    again = RWKV7ForCausalLM.from_pretrained(tmp_path)
    assert same(weights(again), weights(model))
    ours, _ = load(tmp_path)(IDS)
    torch.testing.assert_close(ours, model(IDS).logits)


def test_a_start_is_drawn_once():
    fresh = RWKV7ForCausalLM(RWKV7Config(dim=DIM, num_layers=1, head_size=16, vocab_size=ROWS))
    before = weights(fresh)
    fresh.post_init()
    assert same(weights(fresh), before)
    given = RWKV7ForCausalLM.from_goose(copy.deepcopy(fresh.lm))
    given.post_init()
    assert same(weights(given), before)


# --- graphs -------------------------------------------------------------------------------------


def test_a_step_that_transformers_exports_is_the_model_s():
    exporters = pytest.importorskip("transformers.exporters")
    parts = importlib.import_module("transformers.exporters.utils").decompose_for_generation(
        a_model(), {"input_ids": IDS, "attention_mask": (IDS > 2).long()}
    )
    model, given = parts["decode"]
    config = exporters.DynamoConfig()
    exported = exporters.DynamoExporter().export(model, copy.deepcopy(given), config=config)
    wanted, out = model(**copy.deepcopy(given)), exported(**copy.deepcopy(given))
    torch.testing.assert_close(out.logits, wanted.logits)
    torch.testing.assert_close(out.past_key_values.state, wanted.past_key_values.state)
