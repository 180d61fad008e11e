"""RWKV7LM against the official runtime (PyPI rwkv), in fp32 on the CPU.

The checkpoints are random, with every term of the model at work: a missing bias, a swapped pair or
a transposed state shows. fp32 implementations differ by about 1e-5; the bar is 5e-5.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from official import official_checkpoint
from torch import Tensor

from goose_mm import checkpoint
from goose_mm.backbone import State
from goose_mm.text.model import RWKV7LM

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

CLOSE = {"rtol": 2e-6, "atol": 5e-5}
CHECKPOINTS = {
    "L2-C128": {},
    "L3-C192": {
        "layers": 3, "dim": 192, "ffn": 640, "vocab": 411, "ranks": (64, 32, 16, 96),
        "layer0_value_residual": False, "flat": True, "seed": 1,
    },
    "L4-C64-bf16": {"layers": 4, "dim": 64, "ranks": (8, 16, 24, 32), "dtype": torch.bfloat16},
}  # fmt: skip


class Peer:
    """The official runtime on one checkpoint; it changes states in place, so it gets copies."""

    def __init__(self, runtime: type, path: Path) -> None:
        self.model = runtime(model=str(path.with_suffix("")), strategy="cpu fp32")

    def forward(self, ids: list[int], state: State | None = None) -> tuple[Tensor, State]:
        """Logits [T, V] and the state of one row."""
        inside = None
        if state is not None:
            layers = zip(*(t[:, 0].clone() for t in state), strict=True)
            inside = [t for time, channel, wkv in layers for t in (time, wkv, channel)]
        logits, inside = self.model.forward(list(ids), inside, full_output=True)
        time, wkv, channel = (torch.stack(inside[i::3])[:, None] for i in range(3))
        return logits.view(len(ids), -1), State(time, channel, wkv)


class Pair(NamedTuple):
    ours: RWKV7LM
    peer: Peer
    vocab: int


@pytest.fixture(scope="module")
def runtime() -> Iterator[type]:
    with pytest.MonkeyPatch.context() as patch:  # read once, when rwkv.model is imported
        patch.setenv("RWKV_JIT_ON", "0")
        patch.setenv("RWKV_CUDA_ON", "0")
        patch.setenv("RWKV_V7_ON", "1")
        from rwkv.model import RWKV

        yield RWKV


def make_pair(runtime: type, tensors: dict[str, Tensor], folder: Path) -> Pair:
    path = folder / "official.pth"
    torch.save(tensors, path)
    config, ours = checkpoint.read_model(path)
    model = RWKV7LM(config).eval()
    model.load_state_dict(ours)
    return Pair(model, Peer(runtime, path), config.text.vocab_size)


@pytest.fixture(scope="module", params=CHECKPOINTS.values(), ids=CHECKPOINTS.keys())
def pair(
    request: pytest.FixtureRequest, runtime: type, tmp_path_factory: pytest.TempPathFactory
) -> Pair:
    folder = tmp_path_factory.mktemp("parity")
    return make_pair(runtime, official_checkpoint(**request.param), folder)


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def prompt(pair: Pair, length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(pair.vocab, (length,), generator=generator).tolist()


def some_state(pair: Pair) -> State:
    generator = torch.Generator().manual_seed(9)
    zeros = State.zeros(pair.ours.config.backbone, 1)
    return State(*(torch.randn(t.shape, generator=generator) for t in zeros))


def assert_same(found: tuple[Tensor, State], expected: tuple[Tensor, State]) -> None:
    """Logits [1, T, V] of ours against [T, V] of the peer, and every part of the states."""
    torch.testing.assert_close(found[0][0], expected[0], **CLOSE)
    for part, mine, theirs in zip(State._fields, found[1], expected[1], strict=True):
        torch.testing.assert_close(mine, theirs, **CLOSE, msg=lambda m, part=part: f"{part}: {m}")


@pytest.mark.parametrize("length", [1, 2, 16, 50])
@pytest.mark.parametrize("start", ["zero", "some"])
def test_whole_prompt(pair: Pair, length: int, start: str) -> None:
    ids, state = prompt(pair, length), some_state(pair) if start == "some" else None
    assert_same(pair.ours(torch.tensor([ids]), state), pair.peer.forward(ids, state))


def test_token_by_token(pair: Pair) -> None:
    mine = theirs = some_state(pair)
    for token in prompt(pair, 20):
        found, expected = (
            pair.ours(torch.tensor([[token]]), mine),
            pair.peer.forward([token], theirs),
        )
        assert_same(found, expected)
        mine, theirs = found[1], expected[1]


@pytest.mark.parametrize("cut", [1, 5, 16, 32, 39])
def test_split_anywhere(pair: Pair, cut: int) -> None:
    ids = prompt(pair, 40)
    expected = pair.peer.forward(ids)
    first, state = pair.ours(torch.tensor([ids[:cut]]))
    second, state = pair.ours(torch.tensor([ids[cut:]]), state)
    assert_same((torch.cat([first, second], dim=1), state), expected)


def test_rows_of_a_batch(pair: Pair) -> None:
    rows = [prompt(pair, 24, seed) for seed in range(3)]
    logits, state = pair.ours(torch.tensor(rows))
    for row, ids in enumerate(rows):
        one = (logits[row : row + 1], State(*(t[:, row : row + 1] for t in state)))
        assert_same(one, pair.peer.forward(ids))


def test_greedy_continuation(pair: Pair) -> None:
    ids = prompt(pair, 12)
    found, expected = pair.ours(torch.tensor([ids])), pair.peer.forward(ids)
    mine, theirs = [], []
    for _ in range(32):
        mine.append(int(found[0][0, -1].argmax()))
        theirs.append(int(expected[0][-1].argmax()))
        found = pair.ours(torch.tensor([mine[-1:]]), found[1])
        expected = pair.peer.forward(theirs[-1:], expected[1])
    assert mine == theirs and len(set(mine)) > 3


@pytest.mark.parametrize("size", [0.0, 1e-6])
def test_vanishing_removal_keys(runtime: type, tmp_path: Path, size: float) -> None:
    """The norm under kappa is clamped at 1e-12, not added to: tiny keys still have unit length."""
    tensors = official_checkpoint(seed=3)
    for layer in (0, 1):
        k_k = tensors[f"blocks.{layer}.att.k_k"]
        k_k[..., ::2] *= size
        k_k[..., :64] *= size
    pair = make_pair(runtime, tensors, tmp_path)
    ids = prompt(pair, 20)
    found = pair.ours(torch.tensor([ids]))
    assert found[0].isfinite().all()
    assert_same(found, pair.peer.forward(ids))


def test_unused_value_residual_of_layer_0_changes_nothing(runtime: type, tmp_path: Path) -> None:
    """An exported file, with those tensors made up, runs in the official runtime as before."""
    tensors = official_checkpoint(seed=4)
    pair = make_pair(runtime, tensors, tmp_path)
    checkpoint.convert(tmp_path / "official.pth", tmp_path / "ours")
    checkpoint.convert(tmp_path / "ours", tmp_path / "again.pth")
    again = Peer(runtime, tmp_path / "again.pth")
    ids = prompt(pair, 20)
    assert again.forward(ids)[0].equal(pair.peer.forward(ids)[0])
