"""WKV-7 in plain PyTorch, chunk by chunk: the kernel of every device without one of its own."""

from goose_mm.kernels.chunked.scan import (
    LOWEST_LOG_W,
    backward,
    empty_saved,
    forward,
    lowest_log_w,
    unavailable,
)

__all__ = ["LOWEST_LOG_W", "backward", "empty_saved", "forward", "lowest_log_w", "unavailable"]
