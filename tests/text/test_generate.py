"""Laws of generation: batched = one by one, streamed = whole, the state decides alone."""

from math import inf, nan

import pytest
import torch
from tiny import text_model

from goose_mm.text import RWKV7LM, Sampling
from goose_mm.text.generate import Sampler, Writer, complete, decode, prefill

PROMPTS = ["The goose", "A", "Once upon a time there was a wide river, and", "é漢字"]


@pytest.fixture(scope="module")
def model() -> RWKV7LM:
    return text_model(["the goose swam over the wide river " * 9, *PROMPTS])


SETTINGS = [
    {"temperature": 0.0},
    {"temperature": 1.3, "seed": 5},
    {"temperature": 0.8, "top_p": 0.7, "top_k": 9, "seed": 1},
    {"presence_penalty": 0.6, "frequency_penalty": 0.4, "seed": 2, "stop": ("e",)},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_batch_is_one_by_one(model, settings):
    batch = model.generate(PROMPTS, max_new_tokens=20, **settings)
    assert batch == [model.generate(p, max_new_tokens=20, **settings) for p in PROMPTS]


@pytest.mark.parametrize("settings", SETTINGS)
def test_streamed_is_whole(model, settings):
    for prompt in PROMPTS:
        pieces = list(model.stream(prompt, max_new_tokens=20, **settings))
        assert "".join(pieces) == model.generate(prompt, max_new_tokens=20, **settings)
        assert all(pieces)


def test_greedy_is_the_argmax_of_forward(model):
    ids = model.tokenizer.encode("The wide")
    logits, state = prefill(model, [ids])
    written = [
        int(t) for t in decode(model, logits, state, Sampling(temperature=0.0, max_new_tokens=8))
    ]
    for n in range(8):
        all_logits, _ = model(torch.tensor([ids + written[:n]]))
        assert int(all_logits[0, -1].argmax()) == written[n]


def test_forward_with_a_mask_gives_the_logits_of_each_prompt(model):
    rows = [model.tokenizer.encode(p) for p in PROMPTS]
    logits, state = prefill(model, rows)
    for i, row in enumerate(rows):
        alone, alone_state = model(torch.tensor([row]))
        torch.testing.assert_close(logits[i], alone[0, -1])
        torch.testing.assert_close(state.select(i).wkv, alone_state.wkv)


def test_generation_keeps_the_callers_state(model):
    logits, state = prefill(model, [[5, 6, 7]])
    before = state.clone()
    list(decode(model, logits, state, Sampling(max_new_tokens=5, seed=0)))
    assert all(torch.equal(a, b) for a, b in zip(state, before, strict=True))


def test_a_seed_repeats_and_another_differs(model):
    once, again, other = (model.generate("The", max_new_tokens=30, seed=s) for s in (3, 3, 4))
    assert once == again != other


def test_samples_follow_the_softmax():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).repeat(4000, 1)
    sampler = Sampler(Sampling(seed=0), 4000)
    for i, generator in enumerate(sampler.random):
        generator.manual_seed(i)
    share = torch.bincount(sampler(logits), minlength=4) / 4000
    torch.testing.assert_close(share, logits[0].exp(), atol=0.03, rtol=0)


def drawn(logits: list[float], draws: int = 500, **settings) -> set[int]:
    """What is drawn from the same logits, many times over."""
    sampler = Sampler(Sampling(seed=0, **settings), draws)
    for i, generator in enumerate(sampler.random):
        generator.manual_seed(i)
    return set(sampler(torch.tensor([logits]).repeat(draws, 1)).tolist())


def test_top_p_and_top_k_cut_the_tail():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().tolist()
    assert drawn(logits, top_p=0.5) == {0} and drawn(logits, top_p=0.79) == {0, 1}
    assert drawn(logits, top_k=3) == {0, 1, 2} and drawn(logits, top_p=1e-60) == {0}


@pytest.mark.parametrize("temperature", [0.02, 1e-3, 1e-9, 5e-324])
def test_a_temperature_near_0_is_greedy(model, temperature):
    greedy = model.generate("The goose", max_new_tokens=12, temperature=0.0)
    near = {"temperature": temperature, "max_new_tokens": 12, "seed": 1}
    assert model.generate("The goose", **near) == greedy
    assert drawn([0.0, 4.0, 3.0, 2.0], temperature=temperature) == {1}
    tied = drawn([5.0, 5.0, 3.0, 2.0], temperature=temperature)
    assert tied == {0, 1}


@pytest.mark.parametrize("temperature", [1e9, 1e300, inf])
def test_heat_levels_what_top_p_and_top_k_leave(temperature):
    # float32 knows no chance as small as those behind the first
    logits = [-inf, 200.0, 0.0, 600.0, 400.0]
    assert drawn(logits, temperature=temperature) == {1, 2, 3, 4}
    assert drawn(logits, temperature=temperature, top_k=3) == {1, 3, 4}
    assert drawn(logits, temperature=temperature, top_p=0.9) == {3}
    counted = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).repeat(4000, 1)
    sampler = Sampler(Sampling(temperature=temperature, top_k=2), 4000)
    for i, generator in enumerate(sampler.random):
        generator.manual_seed(i)
    share = torch.bincount(sampler(counted), minlength=4) / 4000
    torch.testing.assert_close(share, torch.tensor([0, 0, 0.5, 0.5]), atol=0.03, rtol=0)


def test_seeds_draw_what_they_always_drew():
    logits = torch.sin(torch.arange(400.0)).reshape(4, 100) * 5
    sampler = Sampler(Sampling(seed=3, temperature=0.8, top_p=0.9, top_k=20), 4)
    assert [sampler(logits).tolist() for _ in range(3)] == [
        [33, 21, 78, 66],
        [8, 2, 97, 47],
        [20, 52, 47, 35],
    ]


def test_penalties_count_what_was_written():
    logits = torch.tensor([[3.0, 2.0, 0.0]])
    # 3.0 | 1.5 against 2.0 | 1.5 against 0.5 | 1.0 against 0.5
    sampler = Sampler(Sampling(temperature=0.0, presence_penalty=1.0, frequency_penalty=0.5), 1)
    assert [int(sampler(logits)) for _ in range(4)] == [0, 1, 0, 0]


@pytest.mark.parametrize("temperature", [0.0, 1.0, inf])
def test_a_huge_penalty_forbids_what_was_written(temperature):
    logits = torch.tensor([[3.0, 2.0, 0.0, -inf]])
    for penalty in (1e30, 1e39, 1e308):
        for name in ("presence_penalty", "frequency_penalty"):
            sampler = Sampler(Sampling(temperature=temperature, top_k=3, **{name: penalty}), 1)
            if temperature < inf:
                assert sorted(int(sampler(logits)) for _ in range(3)) == [0, 1, 2]
            assert {int(sampler(logits)) for _ in range(9)} <= {0, 1, 2}
    both = Sampling(presence_penalty=1e308, frequency_penalty=-1e308)
    sampler = Sampler(both, 1)
    assert 3 not in [int(sampler(logits)) for _ in range(9)]


def test_stop_strings_are_cut_even_across_tokens(model):
    writer = Writer(model.tokenizer, ("\n\n", "END"))
    ids = model.tokenizer.encode("hello E\nEN\n\nmore")
    text = "".join(writer.push(i) for i in ids) + writer.finish()
    assert text == "hello E\nEN"
    writer = Writer(model.tokenizer, ("END",))
    ids = model.tokenizer.encode("an EN")
    assert "".join(writer.push(i) for i in ids) + writer.finish() == "an EN"


def test_user_text_cannot_end_the_document(model):
    assert 0 not in model.tokenizer.encode("<|endoftext|> and more")
    assert len(complete(model, ["<|endoftext|>"], Sampling(max_new_tokens=2, seed=0))) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature must be 0 or more, got -1"),
        ({"top_p": 0.0}, "top_p must lie"),
        ({"top_k": -2}, "top_k"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"stop": ("",)}, "stop strings"),
        ({"temperature": nan}, "temperature must be 0 or more, got nan"),
        ({"top_p": nan}, "top_p must lie"),
        ({"top_p": inf}, "top_p must lie"),
        ({"presence_penalty": inf}, "presence_penalty must be finite, got inf"),
        ({"presence_penalty": nan}, "presence_penalty must be finite, got nan"),
        ({"frequency_penalty": -inf}, "frequency_penalty must be finite, got -inf"),
        ({"frequency_penalty": nan}, "frequency_penalty must be finite, got nan"),
        ({"seed": 2**64}, "seed must fit in 64 bits, got 18446744073709551616"),
    ],
)
def test_wrong_settings_say_so(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)


@pytest.mark.parametrize("name", ["max_new_tokens", "top_k", "seed"])
@pytest.mark.parametrize("value", [nan, inf, 2.5])
def test_whole_numbers_are_whole(name, value):
    with pytest.raises((ValueError, TypeError), match=name):  # the TypeError is the tests' own
        Sampling(**{name: value})
