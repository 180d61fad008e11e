"""Tests run on two cores, without a network, with or without a GPU."""

from __future__ import annotations

import os

import pytest

# Before anything imports torch, here or in a process a test starts: one thread per worker.
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(name, "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` need a CUDA device."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def pillow_refuses_half_a_picture() -> None:
    """lmms_eval switches that off for the whole process when it is imported."""
    from PIL import ImageFile

    ImageFile.LOAD_TRUNCATED_IMAGES = False
