"""A step of decoding in CUDA C++ (`csrc/step_*.cu`): buffers, grids, launches.

Every row of a batch names the slot of its memory; a negative slot is that of a row of padding. A
row's numbers do not depend on the other rows, nor on how many there are, except where a product
goes to the library, as large ones do.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from goose_mm.kernels.cuda import nvrtc
from goose_mm.kernels.cuda.launch import TYPES, granted, multiprocessors
from goose_mm.kernels.step import Gates, Norm, Weights

# B rows, C channels, H heads, N head size, F width of a channel mix, K columns of a matrix

HEAD_SIZE = 64
KINDS = ("plain", "tanh", "sigmoid", "squared_relu", "float")  # enum Kind of matrices.cuh
MADE = 6  # enum Made of step.cuh
MOST = 7  # matrices of a launch
PARTS = 8  # of the columns of a matrix, whose sums are kept apart until the next norm
CHUNK, HEIGHT = 512, 16  # columns and rows of a matrix that step_linear.cu takes at once
FEW = 4  # rows that step_linear.cu takes at most
LIBRARY = 1.2e9  # operations from which on the library is faster, for more than 32 rows


def unavailable(device: torch.device, weights: Weights) -> str:
    """Why these kernels cannot take a step there; empty if they can."""
    dtype, (_, C) = weights.head.dtype, weights.head.shape
    if device.type != "cuda" or torch.version.hip is not None or not granted(device):
        return f"a step needs an NVIDIA GPU of compute capability 8.0, the weights are on {device}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"a step takes bfloat16 and float16, not {dtype}"
    if weights.head_size != HEAD_SIZE:
        return f"a step takes heads of {HEAD_SIZE}, not {weights.head_size}"
    F = weights.layers[0].key.shape[0]
    if C % 64 or F % 64 or any(rank % 32 for rank in weights.ranks):
        return f"a step takes widths in 64s and ranks in 32s, not {C}, {F} and {weights.ranks}"
    wanted = max(shared_of_few(C, False), shared_of_few(F, True))
    if granted(device) < wanted:
        return f"a step needs {wanted} bytes of shared memory a block, there are {granted(device)}"
    return nvrtc.missing()


def parts_of_few(K: int, apart: bool) -> int:
    """Into how many parts `step_linear.cu` cuts the columns."""
    return next(p for p in (4, 2, 1) if p == 1 or (apart and 3 * p <= -(-K // CHUNK)))


def chunks_of_few(K: int, parts: int) -> int:
    """How many chunks the longest part of the columns has."""
    chunks = -(-K // CHUNK)
    return -(-chunks // parts)


def shared_of_few(K: int, apart: bool) -> int:
    """The shared memory that a block of `step_linear.cu` takes for FEW rows."""
    chunks = chunks_of_few(K, parts_of_few(K, apart))
    buffers = 4 // max(chunks - 1, 1) + 2
    return 65_536 + 2 * buffers * FEW * (chunks * CHUNK + 32) + 640 * FEW


class Product(NamedTuple):
    """Matrices with one number of columns, what they are multiplied by, and where that goes.

    `kinds` say what becomes of the results; those of kind "float" are [parts, B, rows].
    """

    weights: tuple[Float[Tensor, "_ K"], ...]
    xs: tuple[Float[Tensor, "B K"], ...]
    ys: tuple[Float[Tensor, "*parts B _"], ...]
    kinds: tuple[str, ...]

    @property
    def operations(self) -> int:
        return 2 * sum(w.numel() for w in self.weights) * len(self.xs[0])

    def tiles(self, height: int) -> int:
        return sum(-(-len(w) // height) for w in self.weights)

    def struct(self, height: int) -> list[int]:
        """struct Matrices of matrices.cuh, for tiles of `height` rows."""
        fields = [len(self.weights), self.tiles(height), self.weights[0].shape[1]]
        for w, x, y, kind in zip(*self, strict=True):
            fields += [w.data_ptr(), x.data_ptr(), y.data_ptr(), len(w), y.stride(-2)]
            fields.append(KINDS.index(kind))
        return fields + [0] * (3 + 6 * MOST - len(fields))


class Step:
    """`kernels.step.step` for batches of one width, with a slot of memory for every row."""

    def __init__(self, weights: Weights, width: int) -> None:
        self.weights, self.width = weights, width
        head, ranks, B = weights.head, weights.ranks, width
        self.device, self.dtype, (V, C) = head.device, head.dtype, head.shape
        self.C = C
        self.early = False  # the first kernel of a step begins when all before have ended

        def empty(*shape: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.empty(*shape, dtype=dtype, device=self.device)

        self.x, self.mixed, self.rkv = (
            empty(B, C, dtype=torch.float32),
            empty(6, B, C),
            empty(3, B, C),
        )
        self.hidden, self.v_first = empty(B, sum(ranks)), empty(B, C)
        self.made, self.bonus = (
            empty(MADE, B, C, dtype=torch.float32),
            empty(B, C // HEAD_SIZE, dtype=torch.float32),
        )
        self.heads, self.wide = empty(B, C), empty(B, len(weights.layers[0].key))
        self.added = empty(PARTS, B, C, dtype=torch.float32)
        self.last, self.logits = empty(1, B, C), empty(1, B, V, dtype=torch.float32)

    def __call__(
        self,
        tokens: Int[Tensor, " B"],
        slots: Int[Tensor, " B"],
        time_shift: Float[Tensor, "L slots C"],
        channel_shift: Float[Tensor, "L slots C"],
        wkv: Float[Tensor, "L slots H N N"],
    ) -> Float[Tensor, "B V"]:
        """Logits in float32, where the next call will write its own; `slots` in int32."""
        weights, mixed = self.weights, self.mixed
        firsts, (w, a, v, g) = self.hidden.split(weights.ranks, dim=1), (3, 4, 2, 5)
        gates = ((w, firsts[0], "tanh"), (a, firsts[1], "plain"), (v, firsts[2], "plain"))
        gates += ((g, firsts[3], "sigmoid"),)
        embedded, added = (tokens, weights.embedding, *weights.norm0), None
        memory = zip(time_shift, channel_shift, wkv, strict=True)
        for layer, (before, before_ffn, state) in zip(weights.layers, memory, strict=True):
            self.norm(added, layer.norm1, slots, mixed, layer.mu, before, embedded)
            chosen = gates if len(layer.first) == 4 else (*gates[:2], gates[3])
            inner = [
                *zip(layer.rkv, mixed[:3], self.rkv, ["plain"] * 3, strict=True),
                *(
                    (m, mixed[i], y, kind)
                    for m, (i, y, kind) in zip(layer.first, chosen, strict=True)
                ),
            ]
            self.multiply(*inner)
            self.mix(layer.gates, state, slots)
            added = self.multiply((layer.output, self.heads, self.added, "float"))
            self.norm(added, layer.norm2, slots, mixed[:1], layer.mu_ffn, before_ffn)
            self.multiply((layer.key, mixed[0], self.wide, "squared_relu"))
            added = self.multiply((layer.value, self.wide, self.added, "float"))
            embedded = (None,) * 4
        self.norm(added, weights.norm, slots, self.last)
        return self.multiply((weights.head, self.last[0], self.logits, "float"))[0]

    def norm(
        self,
        added: Float[Tensor, "parts B C"] | None,
        norm: Norm,
        slots: Int[Tensor, " B"],
        out: Float[Tensor, "M B C"],
        mu: Float[Tensor, "M C"] | None = None,
        carried: Float[Tensor, "slots C"] | None = None,
        embedded: tuple[Tensor | None, ...] = (None,) * 4,
    ) -> None:
        mixes, parts = 0 if mu is None else len(mu), 0 if added is None else len(added)
        self.early = embedded[0] is None
        self.launch(
            "step_norm", {"C": self.C, "MIXES": mixes}, (self.width, 1),
            *embedded, self.x, added, *norm, mu, carried, slots, out, self.width, parts,
        )  # fmt: skip

    def multiply(self, *products: tuple[Tensor, Tensor, Tensor, str]) -> Tensor:
        """The last product's result, as many parts of it as there are."""
        product, B = Product(*zip(*products, strict=True)), self.width
        y, apart = product.ys[-1], product.kinds[-1] == "float" and len(product.ys[-1]) > 1
        K = product.weights[0].shape[1]
        if B > 32 and product.operations > LIBRARY:
            return self.multiply_by_library(product)
        if B <= FEW:
            parts, columns = parts_of_few(K, apart), 1 << (B - 1).bit_length()
            blocks = max(1, min(product.tiles(HEIGHT), 2 * multiprocessors(self.device) // parts))
            sizes = {"COLUMNS": columns, "CHUNKS": chunks_of_few(K, parts)}
            self.launch("step_linear", sizes, (blocks, parts), product.struct(HEIGHT), B, parts)
            return y[:parts]
        height, wide, down, split, stages = (
            (32, 16, 2, 2, 4) if B <= 16 else (32, 32, 2, 2, 4) if B <= 32 else (64, 32, 4, 1, 6)
        )
        blocks, batches = product.tiles(height), -(-B // wide)
        most = min(
            PARTS, K // (128 * split), 4 * multiprocessors(self.device) // (blocks * batches)
        )
        parts = max(1, most) if apart else 1
        sizes = {"HEIGHT": height, "WIDTH": wide, "DOWN": down, "ACROSS": 1}
        sizes |= {"SPLIT": split, "STAGES": stages}
        grid = (blocks, parts * batches)
        self.launch("step_product", sizes, grid, product.struct(height), B, parts)
        return y[:parts]

    def multiply_by_library(self, product: Product) -> Tensor:
        """Matrices of a time mix, of which the first three lie together, or a single one."""
        w, x, y = product.weights[0], product.xs[0], product.ys[0]
        if len(product.weights) > 1:
            three = w.as_strided((3, *w.shape), (w.numel(), *w.stride()))
            torch.bmm(self.mixed[:3], three.transpose(1, 2), out=self.rkv)
            return self.multiply(*list(zip(*product, strict=True))[3:])
        if product.kinds[0] == "float":
            torch.mm(x, w.t(), torch.float32, out=y[0])
            return y[:1]
        torch.mm(x, w.t(), out=y)
        return y.relu_().square_()

    def mix(
        self, gates: Gates, state: Float[Tensor, "slots H N N"], slots: Int[Tensor, " B"]
    ) -> None:
        H, ranks = state.shape[1], zip("WAVG", self.weights.ranks, strict=True)
        rows = 8 if self.width <= 64 else 32
        sizes = {"ROWS": rows, "C": self.C, "A_MAX": f"{gates.a_max:.9f}f"}
        sizes |= {f"RANK_{x}": rank for x, rank in ranks}
        self.launch(
            "step_gates", sizes, (H, -(-self.width // rows)),
            *self.rkv, self.hidden, gates.w2, gates.a2, gates.v2, gates.g2,
            gates.w0, gates.a0, gates.v0, gates.k_k, gates.k_a, gates.r_k,
            self.v_first, self.made, self.bonus, self.width,
        )  # fmt: skip
        self.launch(
            "step_state", {"C": self.C}, (H, self.width),
            self.rkv[0], self.made, self.bonus, *gates.norm, state, slots, self.heads, self.width,
        )  # fmt: skip

    def launch(
        self, name: str, sizes: dict[str, Any], grid: tuple[int, int], *arguments: Any
    ) -> None:
        flags = (f"-DIO={TYPES[self.dtype]}", *(f"-D{name}={x}" for name, x in sizes.items()))
        run(name, flags, self.device, grid, self.early, *arguments)
        self.early = True


def run(
    name: str,
    flags: tuple[str, ...],
    device: torch.device,
    grid: tuple[int, int],
    early: bool,
    *arguments: Tensor | Sequence[int] | int | None,
) -> None:
    """Start `csrc/NAME.cu` on the current stream of a device.

    `early`: it may begin before the kernels ahead of it have ended.
    """
    function, threads, shared = loaded(name, flags, device.index)
    values = [x.data_ptr() if isinstance(x, Tensor) else x or 0 for x in arguments]
    stream = torch._C._cuda_getCurrentRawStream(device.index)
    nvrtc.launch(function, (*grid, 1), threads, shared, device.index, stream, values, early)


@cache
def loaded(name: str, flags: tuple[str, ...], index: int) -> tuple[Any, int, int]:
    """The kernel, its threads and its bytes of shared memory."""
    major, minor = torch.cuda.get_device_capability(index)
    return nvrtc.kernel(name, f"sm_{major}{minor}", flags, index)
