"""WKV-7 in Triton, for GPUs and, interpreted, for tests on a CPU."""

from goose_mm.kernels.triton.launch import backward, empty_saved, forward, lowest_log_w, unavailable

__all__ = ["backward", "empty_saved", "forward", "lowest_log_w", "unavailable"]
