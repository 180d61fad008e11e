"""Our GPU kernels beside their peers; writes results/wkv7_gpu/DEVICE.json.

    python benchmarks/wkv7.py                # a CUDA device; peers that are installed take part
    python benchmarks/wkv7.py --quick        # one small shape, writes nothing
    python benchmarks/wkv7.py --only goose_mm --out FILE
    python benchmarks/wkv7.py --minutes 10   # for each of them, compiling and tuning included

Peers: fla-core (with chunks of 16, and with the settings of its own layer), rwkv-ops (with keras),
flashrwkv2. No speed without correctness: y, the last state and all gradients are first compared
with float64, and a kernel that is off by more than TOLERANCE is not timed. Inputs are brought into
a peer's form before its time is taken, the L2 cache is flushed before every run, medians count.
One after the other, each in a process of its own: what hangs or crashes takes only itself along.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from wkv7_cpu import commit

from goose_mm.kernels import wkv7

RESULTS = Path(__file__).parent / "results" / "wkv7_gpu"
TOLERANCE = 1e-2  # of the norm: peers with bfloat16 operands reach 5e-3
SHAPES = [(8, 4096, 32), (8, 4096, 12), (4, 1024, 32), (64, 512, 12)]  # B, T, H; N = 64
NAMES = ("r", "log_w", "k", "v", "kappa", "a")


class Contender(NamedTuple):
    prepare: Callable[..., list[Tensor]]  # from our six inputs to its own
    run: Callable[..., tuple[Tensor, Tensor]]  # y, last state [B, H, value, key]


def make(B: int, T: int, H: int, N: int = 64) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    r, d, k, v, kappa, a = torch.randn(6, B, T, H, N, device="cuda", generator=generator)
    log_w = -(torch.tensor(-0.5).exp() * torch.sigmoid(d))
    inputs = [r, log_w, k, v, torch.nn.functional.normalize(kappa, dim=-1), torch.sigmoid(a)]
    return [x.bfloat16() for x in inputs]


def ours(kernel: str) -> Contender:
    return Contender(lambda *inputs: list(inputs), lambda *inputs: wkv7(*inputs, kernel=kernel))


def fla(**settings: Any) -> Contender:
    from fla.ops.rwkv7 import chunk_rwkv7

    def run(*inputs):
        y, state = chunk_rwkv7(*inputs, scale=1.0, output_final_state=True, **settings)
        return y, state.mT

    def prepare(r, log_w, k, v, kappa, a):
        return [r, log_w, k, v, -kappa, kappa * a]

    return Contender(prepare, run)


def rwkv_ops() -> Contender:
    os.environ["KERAS_BACKEND"] = "torch"
    from rwkv_ops import get_generalized_delta_rule

    def prepare(r, log_w, k, v, kappa, a):
        return [r, torch.log(-log_w.float()).to(r.dtype), k, v, -kappa, kappa * a]

    return Contender(prepare, get_generalized_delta_rule(64, KERNEL_TYPE="cuda")[0])


def flashrwkv2() -> Contender:
    from flashrwkv2.tmix.wkv7.tilelang import tmix_wkv7_recurrent

    def prepare(r, log_w, k, v, kappa, a):
        share = (-log_w.float() * torch.tensor(0.5).exp()).clamp(1e-6, 1 - 1e-6)
        raw = torch.logit(share).to(r.dtype)
        return [r, raw, k, v, -kappa, kappa * a]

    def run(*inputs):
        B, T, H, N = inputs[0].shape
        state = inputs[0].new_zeros(B, H, N, N, dtype=torch.float32)
        starts = torch.arange(0, B * T + 1, T, device="cuda", dtype=torch.int32)
        y, last = tmix_wkv7_recurrent(*(x.reshape(B * T, H, N) for x in inputs), state, starts)
        return y.view(B, T, H, N), last.mT

    return Contender(prepare, run)


LAYER = {"safe_gate": True, "lower_bound": -0.6065306597126334, "chunk_size": 64}
CONTENDERS: dict[str, Callable[[], Contender]] = {
    "goose_mm cuda": lambda: ours("cuda"),
    "goose_mm triton": lambda: ours("triton"),
    "fla-core, chunks of 16": lambda: fla(chunk_size=16),
    "rwkv-ops cuda": rwkv_ops,
    "flashrwkv2": flashrwkv2,
    "fla-core, as its layer": lambda: fla(**LAYER),
}


def training(run: Callable, inputs: list[Tensor], dy: Tensor) -> tuple[Tensor, ...]:
    inputs = [x.detach().requires_grad_() for x in inputs]
    y, last = run(*inputs)
    return y.detach(), last.detach(), *torch.autograd.grad(y, inputs, dy)


def errors(contender: Contender) -> dict[str, float]:
    """Relative to the norm in float64, on B2 T256 H3."""
    inputs = make(2, 256, 3)
    dy = torch.randn_like(inputs[0])
    exact = training(ours("chunked").run, [x.double() for x in inputs], dy.double())
    got = training(lambda *x: contender.run(*contender.prepare(*x)), inputs, dy)
    names = ("y", "state", *(f"d{name}" for name in NAMES))
    return {
        name: float(f"{((x - want).norm() / want.norm()).item():.2e}")
        for name, x, want in zip(names, got, exact, strict=True)
    }


def milliseconds(run: Callable[[], object]) -> dict[str, float]:
    import triton

    low, median, high = triton.testing.do_bench(run, warmup=50, rep=200, quantiles=[0.2, 0.5, 0.8])
    return {"median": round(median, 4), "p20": round(low, 4), "p80": round(high, 4)}


def replayed(run: Callable[[], tuple[Tensor, ...]]) -> dict[str, float] | None:
    """As a CUDA graph, without what the host takes for a call; None if it cannot be captured."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    try:
        with torch.cuda.stream(stream):
            run(), run()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            results = run()
    except RuntimeError:
        return None
    for x in results:
        x.fill_(torch.nan)
    graph.replay()
    if any(x.isnan().any() for x in results):  # what ran on another stream is not in the graph
        return None
    return milliseconds(graph.replay)


def measure(contender: Contender, shape: tuple[int, int, int]) -> dict[str, Any]:
    """Times from Python and of a CUDA graph, and memory beyond what is held before."""
    run, inputs = contender.run, contender.prepare(*make(*shape))
    dy = torch.randn_like(inputs[0])
    found: dict[str, Any] = {}
    with torch.no_grad():
        found["forward"] = milliseconds(lambda: run(*inputs))
        found["forward replayed"] = replayed(lambda: run(*inputs))
    found["training"] = milliseconds(lambda: training(run, inputs, dy))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    resting = torch.cuda.memory_allocated()
    training(run, inputs, dy)
    extra = (torch.cuda.max_memory_allocated() - resting) / 2**30
    found["training replayed"] = replayed(lambda: training(run, inputs, dy))
    return found | {"extra_gib": round(extra, 3)}


def floors(shape: tuple[int, int, int], rates: dict[str, float]) -> dict[str, dict[str, float]]:
    """Milliseconds to move what must be moved, and to multiply what chunks of 16 multiply.

    Bytes: 6 inputs, y; for the gradients the inputs and dy once more, 6 gradients. FLOP of a token
    and head: 16 Q N + 8 N^2 forward, 48 Q N + 18 N^2 backward (scores, triangles, states).
    """
    B, T, H = shape
    Q, N = 16, 64
    heads, tensor = B * T * H, B * T * H * N * 2 / rates["copy_bytes_per_ms"]
    forward, backward = 16 * Q * N + 8 * N**2, 48 * Q * N + 18 * N**2
    flop = heads / rates["product_flop_per_ms"]
    return {
        "memory floor": {"forward": round(7 * tensor, 4), "training": round(20 * tensor, 4)},
        "arithmetic floor": {
            "forward": round(forward * flop, 4),
            "training": round((forward + backward) * flop, 4),
        },
    }


def rates() -> dict[str, float]:
    """Of this device: bytes a ms of a large copy, FLOP a ms of a large bfloat16 product."""
    import triton

    x, y = torch.randn(2, 2**28, device="cuda").unbind()
    copy = 2 * x.nbytes / triton.testing.do_bench(lambda: y.copy_(x), return_mode="median")
    del x, y
    a, b = torch.randn(2, 8192, 8192, device="cuda").bfloat16().unbind()
    product = 2 * 8192**3 / triton.testing.do_bench(lambda: a @ b, return_mode="median")
    return {"copy_bytes_per_ms": copy, "product_flop_per_ms": product}


def examine(name: str, shapes: list[tuple[int, int, int]], results: Connection) -> None:
    """Sends ("errors", ...), then (shape, times) for each shape, or ("absent", why it has none)."""
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        contender = CONTENDERS[name]()
        off = errors(contender)
        results.send(("errors", off))
        worst = max(off.values())
        if not worst <= TOLERANCE:
            raise ValueError(f"off by {worst:.1e} of the norm")
        for shape in shapes:
            results.send((shape, measure(contender, shape)))
    except Exception as error:  # peers fail in many ways
        results.send(("absent", f"{type(error).__name__}: {error}"[:300]))


def answers(
    name: str, shapes: list[tuple[int, int, int]], minutes: float
) -> Iterator[tuple[Any, Any]]:
    """What `examine` sends, until it is done or its time is over."""
    spawn = get_context("spawn")
    here, there = spawn.Pipe(duplex=False)
    process = spawn.Process(target=examine, args=(name, shapes, there))
    process.start()
    there.close()
    end = time.monotonic() + 60 * minutes
    while here.poll(max(0, end - time.monotonic())):
        try:
            yield here.recv()
        except EOFError:
            process.join()
            if process.exitcode:
                yield "absent", f"ended with code {process.exitcode}"
            break
    else:
        yield "absent", f"not done after {minutes:g} minutes"
    process.kill()
    process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a small shape, nothing written")
    parser.add_argument("--only", nargs="+", default=[""], help="whose name has one of these")
    parser.add_argument("--minutes", type=float, default=5, help="at most, for each of them")
    parser.add_argument("--out", type=Path, help="instead of a file named after the device")
    options = parser.parse_args()
    names = [name for name in CONTENDERS if any(part in name for part in options.only)]
    if not names:
        parser.error(f"--only {' '.join(options.only)}: none of {', '.join(CONTENDERS)}")
    if not torch.cuda.is_available():
        print("no CUDA device: nothing measured", file=sys.stderr)
        return
    device = torch.cuda.get_device_name()
    out = options.out or RESULTS / f"{device.lower().replace(' ', '_')}.json"
    speeds = rates()
    shapes = SHAPES[-1:] if options.quick else SHAPES
    rows = {shape: "B{} T{} H{}".format(*shape) for shape in shapes}
    report: dict[str, Any] = {
        "date": date.today().isoformat(),
        "commit": commit(),
        "hardware": device,
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "dtype": "bfloat16, N 64",
        **speeds,
        "absent": {},
        "errors": {},
        "shapes": {row: floors(shape, speeds) for shape, row in rows.items()},
    }
    for name in names:
        for what, found in answers(name, shapes, options.minutes):
            if what in ("errors", "absent"):
                report[what][name] = found
            else:
                report["shapes"][rows[what]][name] = found
            print(name, what, found, file=sys.stderr, flush=True)
            if not options.quick:  # as it goes: a later one may not come back
                write(report, out)


def write(report: dict[str, Any], out: Path) -> None:
    new = out.with_suffix(".new")
    new.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(new, out)


if __name__ == "__main__":
    main()
