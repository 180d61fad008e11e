"""Random RWKV-7 checkpoints in the official layout, with every term of the model at work."""

import torch
from torch import Tensor


def official_checkpoint(
    layers: int = 2,
    dim: int = 128,
    *,
    ffn: int = 0,
    vocab: int = 300,
    ranks: tuple[int, int, int, int] = (32, 24, 16, 40),
    head_size: int = 64,
    layer0_value_residual: bool = True,
    flat: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Names and shapes as in the released files; `ranks` are those of w, a, v, g.

    `flat` stores vectors as [C], the form of some tools, instead of [1, 1, C].
    """
    generator = torch.Generator().manual_seed(seed)
    ffn = ffn or 4 * dim

    def normal(*shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        return mean + scale * torch.randn(*shape, generator=generator)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(1, 1, dim, generator=generator)

    tensors: dict[str, Tensor] = {
        "emb.weight": normal(vocab, dim, mean=0.3),
        "head.weight": normal(vocab, dim, scale=dim**-0.5),
    }

    def norm(name: str) -> None:
        tensors[f"{name}.weight"] = normal(dim, mean=1.0, scale=0.3)
        tensors[f"{name}.bias"] = normal(dim, scale=0.3)

    norm("blocks.0.ln0")
    norm("ln_out")
    for layer in range(layers):
        block, att = f"blocks.{layer}", f"blocks.{layer}.att"
        for name in (f"{block}.ln1", f"{block}.ln2", f"{att}.ln_x"):
            norm(name)
        for x in "rwkvag":
            tensors[f"{att}.x_{x}"] = uniform(0, 1)
        for x, rank in zip("wavg", ranks, strict=True):
            if x == "v" and layer == 0 and not layer0_value_residual:
                continue
            tensors[f"{att}.{x}1"] = normal(dim, rank, scale=dim**-0.5)
            tensors[f"{att}.{x}2"] = normal(rank, dim, scale=rank**-0.5)
            if x != "g":
                tensors[f"{att}.{x}0"] = uniform(-6, 1) if x == "w" else uniform(-1, 1)
        tensors[f"{att}.k_k"] = uniform(-1, 2)
        tensors[f"{att}.k_a"] = uniform(0, 1.5)
        tensors[f"{att}.r_k"] = normal(dim // head_size, head_size, scale=0.3)
        for name in ("receptance", "key", "value", "output"):
            tensors[f"{att}.{name}.weight"] = normal(dim, dim, scale=dim**-0.5)
        tensors[f"{block}.ffn.x_k"] = uniform(0, 1)
        tensors[f"{block}.ffn.key.weight"] = normal(ffn, dim, scale=dim**-0.5)
        tensors[f"{block}.ffn.value.weight"] = normal(dim, ffn, scale=ffn**-0.5)
    if flat:
        tensors = {n: t.flatten() if t.ndim == 3 else t for n, t in tensors.items()}
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}
