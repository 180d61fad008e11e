"""WKV-7 in CUDA C++, for NVIDIA GPUs; compiled where it is first needed."""

from goose_mm.kernels.cuda.launch import backward, empty_saved, forward, lowest_log_w, unavailable

__all__ = ["backward", "empty_saved", "forward", "lowest_log_w", "unavailable"]
