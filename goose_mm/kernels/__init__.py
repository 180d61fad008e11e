"""The WKV-7 operator: one contract (`wkv7`), interchangeable kernels behind it."""

from goose_mm.kernels.wkv7 import RWKV7_LOWEST, available_kernels, choose, wkv7

__all__ = ["RWKV7_LOWEST", "available_kernels", "choose", "wkv7"]
