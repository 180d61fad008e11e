"""What text tasks and harness plug-ins share: log-likelihoods, and a harness's words in our terms.

Text is read the recurrent way: the beginning that all contexts share is read once, then the rest
of every different context, then the continuations, each from the state behind its context. Rows
of mixed length are padded on the right, which touches no state. Long rows are read in spans that
hand on their state: no context is ever cut off, and nothing changes but the memory used.
"""

# B rows, T tokens, C channels, M scored tokens

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from goose_mm.backbone import State
    from goose_mm.text.generate import Sampling
    from goose_mm.text.model import RWKV7LM

PREFIX_TOKEN = 0  # end of text: a document begins after it, so it stands before the first token
SPAN = 512  # tokens of a row that are read at once
HEAD = 1024  # tokens whose logits are held at once: they are the largest tensor by far

Ids = Sequence[int]


def loglikelihoods(
    model: RWKV7LM,
    contexts: Sequence[Ids],
    continuations: Sequence[Ids],
    *,
    state: State | None = None,
    batch_size: int = 64,
) -> list[tuple[float, bool]]:
    """For every pair: log P(continuation | context) in nats, and whether greedy decoding from the
    context would write it.

    Pairs are token ids and may have any lengths, but neither side may be empty (ValueError): put
    `PREFIX_TOKEN` where there is no context. `state` (of one row) is what was read before all
    contexts. `batch_size` rows are read at once; the results do not depend on it.
    """
    import torch

    if len(contexts) != len(continuations):
        raise ValueError(f"{len(contexts)} contexts for {len(continuations)} continuations")
    for name, rows in (("context", contexts), ("continuation", continuations)):
        if empty := [i for i, row in enumerate(rows) if not len(row)]:
            raise ValueError(f"{name} {empty[0]} has no tokens; the least is the prefix token")
    owners: dict[tuple[int, ...], list[int]] = {}
    for i, context in enumerate(contexts):
        owners.setdefault(tuple(context), []).append(i)
    found: list[tuple[float, bool]] = [(0.0, True)] * len(contexts)
    if not owners:
        return found
    with torch.no_grad():
        shared = common_beginning(list(owners))
        start = _start(model, state)
        for ids, mask in _spans(model, [next(iter(owners))[:shared]]):
            _advance(model, ids, mask, start)
        for some in _batches(sorted(owners, key=len, reverse=True), batch_size):
            behind, states = _behind(model, [c[shared:] for c in some], start)
            pairs = [(row, i) for row, context in enumerate(some) for i in owners[context]]
            pairs.sort(key=lambda pair: len(continuations[pair[1]]), reverse=True)
            for part in _batches(pairs, batch_size):
                rows, places = [row for row, _ in part], [i for _, i in part]
                texts = [continuations[i] for i in places]
                scores = _score(model, texts, behind[rows], states.select(rows))
                for i, score in zip(places, scores, strict=True):
                    found[i] = score
    return found


def common_beginning(rows: Sequence[tuple[int, ...]]) -> int:
    """How many tokens all rows begin with; at least one token of every row is left over."""
    low, high = min(rows), max(rows)  # in the order of a dictionary, all others lie between
    most = min(map(len, rows)) - 1
    return next((i for i in range(most) if low[i] != high[i]), most)


def _start(model: RWKV7LM, state: State | None) -> State:
    """A state of one row of our own, that may be overwritten."""
    from goose_mm.backbone import State

    if state is not None:
        return state.clone()
    weight = model.emb.weight
    return State.zeros(model.backbone.config, 1, weight.device, weight.dtype)


def _batches(rows: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _spans(model: RWKV7LM, rows: Sequence[Ids]) -> Iterator[tuple[Tensor, Tensor]]:
    """Ids and mask [b,t] of one span after the other. Rows come longest first: the first b of
    them go on, the others have ended."""
    from goose_mm.text.generate import pad

    for start in range(0, len(rows[0]), SPAN):
        active = [row[start : start + SPAN] for row in rows if len(row) > start]
        yield pad(active, model.emb.weight.device)


def _advance(model: RWKV7LM, ids: Tensor, mask: Tensor, state: State) -> Tensor:
    """Read a span of the first rows of `state`, which is overwritten; hidden states [b,t,C]."""
    rows = slice(0, len(ids))
    before = state.select(rows)
    padding = None if mask.all() else mask
    hidden, after = model.backbone(model.emb(ids), before, mask=padding)
    for whole, part in zip(state, after, strict=True):
        whole[:, rows] = part
    return hidden


def _behind(model: RWKV7LM, rows: Sequence[Ids], start: State) -> tuple[Tensor, State]:
    """Hidden states [B,C] and states after rows that follow `start`, longest first."""
    import torch

    weight = model.emb.weight
    last = weight.new_empty(len(rows), weight.shape[1])
    state = start.repeat(len(rows)).clone()
    for ids, mask in _spans(model, rows):
        hidden = _advance(model, ids, mask, state)
        last[: len(ids)] = hidden[torch.arange(len(ids)), mask.sum(1) - 1]
    return last, state


def _score(
    model: RWKV7LM, texts: Sequence[Ids], behind: Tensor, state: State
) -> list[tuple[float, bool]]:
    """Scores of continuations, longest first, after the hidden states [B,C] of their contexts."""
    import torch

    total = torch.zeros(len(texts), dtype=torch.float64, device=behind.device)
    missed = torch.zeros_like(total)

    def add(hidden: Tensor, targets: Tensor, row: Tensor) -> None:
        """Tokens [M] of some rows [M], predicted from hidden states [M,C]."""
        for piece in range(0, len(row), HEAD):
            some = slice(piece, piece + HEAD)
            gained, hit = _token_scores(model, hidden[some], targets[some])
            total.index_add_(0, row[some], gained)
            missed.index_add_(0, row[some], 1 - hit)

    first = torch.tensor([text[0] for text in texts], device=behind.device)
    add(behind, first, torch.arange(len(texts), device=behind.device))
    inputs = _spans(model, [text[:-1] for text in texts])
    targets = _spans(model, [text[1:] for text in texts])
    for (ids, mask), (wanted, _) in zip(inputs, targets, strict=True):
        hidden = _advance(model, ids, mask, state)
        add(hidden[mask], wanted[mask], mask.nonzero()[:, 0])
    return [(x, not bad) for x, bad in zip(total.tolist(), missed.tolist(), strict=True)]


def _token_scores(model: RWKV7LM, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities [M] of tokens, and 1.0 [M] where a token was the likeliest; float64."""
    import torch.nn.functional as F

    from goose_mm.backbone.time_mix import upcast

    logits = upcast(model.head(hidden))
    losses = F.cross_entropy(logits, targets, reduction="none")
    return -losses.double(), (logits.argmax(-1) == targets).double()


LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


def sampling(
    gen_kwargs: Mapping[str, Any], max_new_tokens: int, stop: Sequence[str] = ()
) -> Sampling:
    """The sampler that a harness's generation settings ask for: greedy unless they say otherwise.

    `max_new_tokens` is used where they name no length; `stop` is added to their `until`.
    ValueError for settings that we cannot honour, as beam search.
    """
    from goose_mm.text.generate import Sampling

    given = {key: value for key, value in gen_kwargs.items() if value is not None}
    lengths = [given.pop(name) for name in LENGTHS if name in given]
    until = given.pop("until", ())
    ends = [until] if isinstance(until, str) else list(until)
    given.pop("image_aspect_ratio", None)  # how LLaVA cuts pictures up; ours are read whole
    if given.get("num_beams") == 1:
        del given["num_beams"]
    temperature = given.pop("temperature", None)
    drawn = given.pop("do_sample", bool(temperature))
    top = {name: given.pop(name) for name in ("top_p", "top_k") if name in given}
    if given:
        raise ValueError(
            f"generation settings {', '.join(sorted(given))} cannot be honoured; known are until, "
            f"do_sample, temperature, top_p, top_k and {', '.join(LENGTHS)}"
        )
    chosen: dict[str, Any] = {"temperature": 0.0}  # greedy settings may say top_p: 0 and mean it
    if drawn:
        chosen = {"temperature": 1.0 if temperature is None else float(temperature), **top}
    return Sampling(
        max_new_tokens=int(lengths[0]) if lengths else max_new_tokens,
        stop=tuple(dict.fromkeys(text for text in (*ends, *stop) if text)),
        **chosen,
    )


def load_model(pretrained: Any, kind: str, device: str = "", dtype: str = "float32") -> Any:
    """A model of a kind by name, on a GPU if there is one and nothing else is asked for; a model
    that is given is taken as it is. ValueError if it is of another kind, or `dtype` unknown.

    Without a GPU, cuda means the CPU: lm-eval says `cuda:0` for a user who said nothing.
    """
    import torch

    from goose_mm.hub import open_model

    if isinstance(pretrained, str):
        kinds = {str(t).removeprefix("torch."): t for t in (torch.float32, torch.bfloat16)}
        if dtype not in kinds:
            raise ValueError(f"dtype {dtype!r} is not one of {', '.join(kinds)}")
        there = torch.cuda.is_available() or not device.startswith("cuda")
        return open_model(pretrained, kind, device if there else "cpu", kinds[dtype])
    if pretrained.config.model != kind:
        raise ValueError(f"this is a model for {pretrained.config.model}; use one for {kind}")
    return pretrained


def whole_number(batch_size: int | str) -> int:
    """A harness's batch size. ValueError for `auto`."""
    try:
        return max(1, int(batch_size))
    except ValueError:
        raise ValueError(f"batch_size must be a number, as 64; it is {batch_size!r}") from None
