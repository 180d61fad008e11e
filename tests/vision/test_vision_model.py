"""VisualRWKV7: one reading of a picture serves every question, in asking and in training."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from goose_mm.config import (
    BackboneConfig,
    ConfigError,
    EncoderSpec,
    TextConfig,
    VisionConfig,
    VisionModel,
)
from goose_mm.text.tokenizer import BPETokenizer
from goose_mm.vision import Prefix, PrefixCache, VisualRWKV7, prompt_text
from goose_mm.vision.preprocess import normalise

EYE = EncoderSpec(source="toy", name="eye", image_size=32, layers=(-1,))
SECOND_EYE = EncoderSpec(source="toy", name="other", image_size=48, layers=(1, 2), mean=(0.4,) * 3)
QUESTIONS = ["What is this?", "How many?", "Is there\na long question about {this} too?"]


@pytest.fixture(scope="module")
def tokenizer():
    texts = ["User: What is this? Assistant: a red ball", "How many are there?\n\nAssistant: two"]
    return BPETokenizer.train(texts, 300)


def build(tokenizer, dtype=torch.float32, **vision):
    """A small model with every weight disturbed: the official start ignores all context."""
    torch.manual_seed(3)
    config = VisionModel(
        backbone=BackboneConfig(dim=32, num_layers=2, head_size=16),
        text=TextConfig(vocab_size=tokenizer.vocab_size, tokenizer="bpe"),
        vision=VisionConfig(**{"encoders": (EYE,), **vision}),
    )
    model = VisualRWKV7(config, tokenizer).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def model(tokenizer):
    return build(tokenizer)


def photo(seed, side=32):
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def training_batch(tokenizer, pictures=2):
    """Two questions a picture, mixed lengths; the last text has no answer, as padding has none."""
    rows = [
        [("What is this?", " a red ball"), ("How many?", " two")],
        [("What is this, there?", " a ball"), None],
    ][:pictures]
    ids, target, starts = [], [], [0]
    for pair in (pair for row in rows for pair in row):
        asked = tokenizer.encode(prompt_text(VisionConfig(), pair[0])) if pair else [1, 2, 3]
        answer = tokenizer.encode(pair[1] + "\n\n") if pair else []
        ids += asked + answer
        target += [False] * len(asked) + [True] * len(answer)
        starts.append(len(ids))
    pixels = np.stack([np.array(photo(i)) for i in range(len(rows))])
    return {
        "pixels": torch.from_numpy(pixels).permute(0, 3, 1, 2),
        "ids": torch.tensor([ids]),
        "target": torch.tensor([target]),
        "cu_seqlens": torch.tensor(starts, dtype=torch.int32),
    }


def naive_loss(model, batch):
    """Every text by itself, from its first word to its last: no state, no packing, no batch."""
    before = model.lm.tokenizer.encode(model.config.vision.before_image)
    losses, exact = [], []
    for i, (start, stop) in enumerate(itertools.pairwise(batch["cu_seqlens"].tolist())):
        tokens = model.image_tokens([normalise(batch["pixels"][i // 2][None], EYE)])
        ids, target = (batch[key][0, start:stop] for key in ("ids", "target"))
        if not target.any():
            continue
        words = model.lm.emb(torch.cat([torch.tensor(before), ids]))[None]
        stream = torch.cat([words[:, : len(before)], tokens, words[:, len(before) :]], 1)
        logits = model.lm.head(model.lm.backbone(stream)[0][0])
        logits = logits[-len(ids) - 1 : -1][target]  # the token before predicts
        losses.append(F.cross_entropy(logits, ids[target]))
        exact.append((logits.argmax(-1) == ids[target]).all())
    return torch.stack(losses).mean(), torch.stack(exact).double().mean()


def test_loss_and_its_gradients_are_those_of_whole_separate_rows(tokenizer):
    model, batch = build(tokenizer, torch.float64), training_batch(tokenizer)
    results = []
    for compute in (model.loss, lambda b: naive_loss(model, b)):
        model.zero_grad()
        loss, metrics = compute(batch)
        loss.backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        results.append((loss.detach(), gradients, metrics))
    (loss, gradients, metrics), (expected, wanted, exact) = results
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(metrics["exact"].double(), exact)
    assert gradients.keys() == wanted.keys() >= {"projector.1.weight", "lm.emb.weight"}
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], atol=1e-9, rtol=1e-6)
    assert gradients["projector.1.weight"].abs().max() > 1e-4  # it came through the state


def test_exact_counts_rows_whose_every_answer_token_is_right(tokenizer):
    model, batch = build(tokenizer), training_batch(tokenizer, pictures=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    assert model.loss(batch)[1]["exact"] == 0
    for _ in range(40):
        loss, metrics = model.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert metrics["exact"] == 1 and metrics["loss"] < 0.1
    model.eval()
    picture = photo(0)  # and what was learned is what is said
    assert model.ask_many(picture, ["What is this?", "How many?"]) == ["a red ball", "two"]


def test_a_batch_without_answers_or_pictures_is_fine(model, tokenizer):
    batch = training_batch(tokenizer)
    batch["target"] = torch.zeros_like(batch["target"])
    assert model.loss(batch)[0] == 0
    blind = {k: t for k, t in training_batch(tokenizer).items() if k != "pixels"}
    assert model.loss(blind)[0] > 0


def test_bf16_autocast_trains(tokenizer):
    model = build(tokenizer, projector="grid_mixer", mixer_layers=1)
    exact, _ = model.loss(training_batch(tokenizer))
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = model.loss(training_batch(tokenizer))
    loss.backward()
    assert abs(loss - exact) < 0.05 * exact
    assert model.projector.rows.grad.isfinite().all()


def test_many_questions_at_once_are_answered_as_one_by_one(model):
    picture = photo(0)
    one_by_one = [model.ask(picture, question) for question in QUESTIONS]
    assert model.ask_many(picture, QUESTIONS) == one_by_one
    assert model.ask_many(picture, QUESTIONS, batch_size=2) == one_by_one
    assert model.ask_many(picture, QUESTIONS[::-1]) == one_by_one[::-1]
    assert model.ask_many(picture, []) == []
    assert len(set(one_by_one)) == 3 and all(one_by_one)


def test_pictures_in_a_batch_are_read_as_alone(model):
    pictures = [photo(i, side) for i, side in enumerate((32, 20, 51))]
    asked = [QUESTIONS[:2], [], QUESTIONS[1:]]
    alone = [[model.ask(p, q) for q in some] for p, some in zip(pictures, asked, strict=True)]
    assert model.ask_batch(pictures, asked) == alone
    assert model.ask_batch(pictures, asked, batch_size=1) == alone
    raw = torch.from_numpy(np.stack([np.array(photo(i)) for i in (0, 1)])).permute(0, 3, 1, 2)
    from_raw = model.ask_batch(raw, [QUESTIONS, QUESTIONS])
    assert from_raw == [model.ask_many(photo(i), QUESTIONS) for i in (0, 1)]
    with pytest.raises(ValueError, match="3 images but questions for 2"):
        model.ask_batch(pictures, asked[:2])


def test_a_tensor_of_pictures_is_never_taken_for_normalised(model):
    raw = torch.from_numpy(np.stack([np.array(photo(i)) for i in (0, 1)])).permute(0, 3, 1, 2)
    asked = [QUESTIONS, QUESTIONS]
    assert model.ask_batch(raw.float() / 255, asked) == model.ask_batch(raw, asked)
    (normal,) = model.preprocess([photo(0), photo(1)])
    assert torch.equal(model.image_tokens([normal]), model.image_tokens(raw))
    for other in (raw.long(), raw.float(), raw.permute(0, 2, 3, 1), raw[0], normal):
        for use in (lambda x: model.ask_batch(x, asked), model.image_tokens):
            with pytest.raises(ValueError, match=r"a (float )?batch of pictures"):
                use(other)
    with pytest.raises(ValueError, match="give pictures as one tensor"):
        model.image_tokens([raw])


def test_nothing_to_ask_and_nothing_to_see(model):
    assert model.ask_batch(None, []) == model.ask_batch([], []) == []
    assert model.ask_batch(None, [[], []]) == [[], []]
    for nothing in ([], ()):
        with pytest.raises(ValueError, match="list of pictures is empty; give one, or None"):
            model.ask(nothing, QUESTIONS[0])
    for size in (0, -1):
        for ask in (
            lambda size: model.ask_many(photo(0), QUESTIONS, batch_size=size),
            lambda size: model.ask_many(photo(0), [], batch_size=size),
            lambda size: model.ask_batch(None, [QUESTIONS], batch_size=size),
        ):
            with pytest.raises(ValueError, match=f"batch_size must be at least 1, got {size}"):
                ask(size)


def test_stop_adds_to_the_end_of_a_turn(tokenizer):
    plain = build(tokenizer, stop="")
    whole = plain.ask(photo(0), QUESTIONS[0])
    mark, end = whole[8:10], whole[4:6]  # what the model says anyway
    assert mark and end and mark not in whole[:6] and end not in whole[:4]
    ended = build(tokenizer, stop=end)
    assert ended.ask(photo(0), QUESTIONS[0]) == whole[:4].strip()
    for stop in ((mark,), ()):
        assert ended.ask(photo(0), QUESTIONS[0], stop=stop) == whole[:4].strip()
    assert plain.ask(photo(0), QUESTIONS[0], stop=(mark,)) == whole[:8].strip()


def test_the_answer_depends_on_the_picture_and_can_be_blind(model):
    answers = {model.ask(photo(i), "What is this?") for i in range(4)}
    blind = model.ask(None, "What is this?")
    assert len(answers) > 1 and blind not in answers
    assert model.ask_batch(None, [["What is this?"], QUESTIONS[1:]])[0] == [blind]


def test_the_stream_is_before_image_then_patches_then_prompt(model, tokenizer):
    """Greedy decoding by hand, the whole sequence anew for every token."""
    tokens = model.image_tokens(model.preprocess([photo(5)]))
    assert tokens.shape == (1, 4, 32) and model.grid == (2, 2)
    before = tokenizer.encode("User: ")
    after = tokenizer.encode("\nWhat is this?\n\nAssistant:")
    written = []
    with torch.no_grad():
        for _ in range(6):
            words = [model.lm.emb(torch.tensor([ids])) for ids in (before, after + written)]
            hidden, _ = model.lm.backbone(torch.cat([words[0], tokens, words[1]], 1))
            written.append(model.lm.head(hidden[0, -1]).argmax().item())
    said = model.ask(photo(5), "What is this?", max_new_tokens=6)
    assert said == tokenizer.decode(written).split("\n\n")[0].strip()


def test_encoders_that_cannot_be_fused_are_refused(tokenizer):
    with pytest.raises(ValueError, match="3 x 3 patches with one of 2 x 2"):
        build(tokenizer, encoders=(EYE, SECOND_EYE))


def test_user_text_stays_text(model, tokenizer):
    ids = model._prompts(["a<|endoftext|>b"])[0]
    assert tokenizer.eos_id not in ids and "<|endoftext|>" in tokenizer.decode(ids)
    vision = VisionConfig()
    assert prompt_text(vision, " Hi\n \n\n\nAssistant: no") == "\nHi\nAssistant: no\n\nAssistant:"
    for empty in ("", "  \n "):
        with pytest.raises(ValueError, match="question is empty"):
            model.ask(photo(0), empty)
    with pytest.raises(ValueError, match="must be a list"):
        model.ask_many(photo(0), "What?")


def test_a_prefix_answers_like_its_picture_and_survives_a_file(model, tokenizer, tmp_path):
    prefix = model.prefix(photo(2))
    before = prefix.state.clone()
    assert prefix.n_tokens == len(tokenizer.encode("User: ")) + 4
    answers = model.ask_many(photo(2), QUESTIONS)
    assert model.ask_many(prefix, QUESTIONS) == answers
    assert all(torch.equal(a, b) for a, b in zip(prefix.state, before, strict=True))

    prefix.save(tmp_path / "picture.prefix")
    loaded = Prefix.load(tmp_path / "picture.prefix")
    assert (loaded.n_tokens, loaded.fingerprint) == (prefix.n_tokens, prefix.fingerprint)
    assert model.ask_many(loaded, QUESTIONS) == answers
    assert [p.name for p in tmp_path.iterdir()] == ["picture.prefix"]

    (tmp_path / "wrong").write_bytes(b"not safetensors at all")
    prefix.state.save(tmp_path / "bare")
    for name in ("wrong", "bare"):
        with pytest.raises(ValueError, match="is not a saved prefix"):
            Prefix.load(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        Prefix.load(tmp_path / "nothing")


def test_a_prefix_belongs_to_the_weights_that_made_it(tokenizer):
    model = build(tokenizer)
    prefix, name = model.prefix(photo(2)), model.fingerprint()
    assert model.fingerprint() == name == build(tokenizer).fingerprint()
    with torch.no_grad():
        model.lm.head.weight[0, 0] += 1
    assert model.fingerprint() != name
    with pytest.raises(ValueError, match="made by another model"):
        model.ask(prefix, "What is this?")


def test_several_pictures_make_one_prefix(model, tokenizer):
    both = model.prefix([photo(0), photo(1)])
    newline = len(tokenizer.encode("\n"))
    assert both.n_tokens == len(tokenizer.encode("User: ")) + 4 + newline + 4
    order = {model.ask([photo(a), photo(b)], QUESTIONS[0]) for a, b in ((0, 1), (1, 0), (1, 1))}
    assert len(order) > 1


def test_the_cache_keeps_what_was_used_last(tokenizer, monkeypatch):
    model = build(tokenizer)
    reads = []
    read = model._read
    monkeypatch.setattr(model, "_read", lambda *args: reads.append(1) or read(*args))
    size = model.prefix(photo(0)).nbytes
    cache = PrefixCache(max_bytes=2 * size)
    reads.clear()
    for seed in (0, 1, 0, 2, 0, 1):  # 2 pushes 1 out, not 0
        model.prefix(photo(seed), cache)
    assert len(reads) == 4 and len(cache) == 2 and cache.nbytes == 2 * size
    with torch.no_grad():
        model.lm.emb.weight.mul_(2)
    model.prefix(photo(0), cache)  # other weights: read again
    assert len(reads) == 5
    small = PrefixCache(max_bytes=size - 1)
    model.prefix(photo(0), small)
    assert len(small) == 0


def test_checkpoints_hold_what_was_trained(tokenizer):
    model = build(tokenizer)
    assert {name.split(".")[0] for name in model.state_dict()} == {"lm", "projector"}
    kept = EncoderSpec(name="test_vit", image_size=32, layers=(-2,))
    eyed = build(tokenizer, encoders=(kept,))
    assert any(name.startswith("encoders.0.network.blocks") for name in eyed.state_dict())


def test_pixels_must_match_the_encoders(tokenizer):
    spec = EncoderSpec(source="toy", name="other", image_size=64, layers=(-1,))
    model = build(tokenizer, encoders=(EYE, spec))
    assert model.image_tokens(model.preprocess([photo(0)])).shape == (1, 4, 32)
    pixels = torch.from_numpy(np.array(photo(0))).permute(2, 0, 1)[None]
    assert model.image_tokens(pixels).shape == (1, 4, 32)
    with pytest.raises(ValueError, match="2 encoders need as many normalised tensors, got 1"):
        model.image_tokens([normalise(pixels, EYE)])


def test_the_meta_device_gives_shapes(tokenizer):
    model = build(tokenizer, projector="grid_mixer", mixer_layers=1).to("meta")
    pixels = torch.zeros(2, 3, 40, 50, dtype=torch.uint8, device="meta")
    assert model.image_tokens(pixels).shape == (2, 4, 32)


def test_configurations_that_cannot_work_are_refused(tokenizer):
    with pytest.raises(ConfigError, match="at least one"):
        build(tokenizer, encoders=())
    with pytest.raises(ConfigError, match=r"must contain \{question\}"):
        build(tokenizer, prompt="\nQ\n\nAssistant:")


def test_unreadable_pictures_reach_the_user(model, tmp_path):
    with pytest.raises(FileNotFoundError, match="image not found"):
        model.ask(tmp_path / "no.png", "What is this?")
