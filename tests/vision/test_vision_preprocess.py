"""Squares for the encoders: resizing is right, a batch of pictures is never taken for another."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

from goose_mm.config import EncoderSpec
from goose_mm.vision.preprocess import as_pictures, normalise, transform

STATISTICS = {"mean": (0.48, 0.46, 0.41), "std": (0.27, 0.26, 0.28)}


def photo(width=75, height=50):
    """A smooth RGB picture with detail, the same every time."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    channels = [120 + 100 * np.sin(x / 3 + y / 7), 2 * x + y, 128 + 90 * np.cos(x * y / 90)]
    return Image.fromarray(np.stack(channels, -1).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("name", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(75, 50), (33, 90), (64, 64), (20, 15)])
def test_squash_and_crop_agree_with_torchvision(name, size):
    image, mode = photo(*size), InterpolationMode[name.upper()]
    end = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(**STATISTICS)]
    peers = {
        "squash": v2.Compose([v2.Resize((48, 48), mode), *end]),
        "crop": v2.Compose([v2.Resize(48, mode), v2.CenterCrop(48), *end]),
    }
    for resize, peer in peers.items():
        spec = EncoderSpec(image_size=48, resize=resize, interpolation=name, **STATISTICS)
        ours = transform([image], spec)[0]
        step = 1 / 255 / min(STATISTICS["std"])  # one of 255 grey levels: cropping may round
        torch.testing.assert_close(
            ours, peer(image), atol=1e-5 if resize == "squash" else step, rtol=0
        )


def test_letterbox_keeps_the_aspect_and_fills_with_the_mean():
    spec = EncoderSpec(image_size=60, resize="letterbox", **STATISTICS)
    out = transform([photo(75, 50)], spec)[0]
    assert out[:, :10].abs().max() < 0.01 and out[:, 50:].abs().max() < 0.01
    inner = transform([photo(75, 50).resize((60, 40), Image.Resampling.BICUBIC)], spec)[0]
    torch.testing.assert_close(out, inner)
    assert transform([photo(1, 500)], spec).shape == (1, 3, 60, 60)


def test_a_very_long_picture_is_cropped_without_blowing_up():
    spec = EncoderSpec(image_size=448, resize="crop")
    assert transform([Image.new("RGB", (1_000_000, 1), "red")], spec).shape == (1, 3, 448, 448)


def test_the_tensor_path_equals_the_picture_path():
    spec = EncoderSpec(image_size=48, **STATISTICS)
    pixels = torch.from_numpy(np.array(photo(48, 48))).permute(2, 0, 1)[None]
    torch.testing.assert_close(normalise(pixels, spec), transform([photo(48, 48)], spec))
    larger = torch.from_numpy(np.array(photo(96, 80))).permute(2, 0, 1)[None]
    off = (normalise(larger, spec) - transform([photo(96, 80)], spec)).abs()
    assert off.max() < 2.5 / 255 / min(STATISTICS["std"])
    with pytest.raises(ValueError, match="crop needs square tensors, got 80 x 96"):
        normalise(larger, EncoderSpec(image_size=48, resize="crop"))


def test_a_batch_of_pictures_is_uint8_or_floats_in_0_to_1():
    pixels = torch.arange(256).repeat(12).view(1, 3, 32, 32).to(torch.uint8)
    assert as_pictures(pixels) is pixels
    for dtype in (torch.float32, torch.float64, torch.float16):
        assert torch.equal(as_pictures(pixels.to(dtype) / 255), pixels)
    rough = as_pictures(pixels.to(torch.bfloat16) / 255)  # which holds no more
    assert (rough.int() - pixels.int()).abs().max() <= 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x: x.float(), r"lies in 0\.\.1, this one in 0\.\.255; divide by 255"),
        (lambda x: x / 127.5 - 1, r"this one in -1\.\.1.*preprocess\(\) makes as the list"),
        (lambda x: x / 0.0, "nan"),
        (lambda x: x.long(), r"got torch.int64; .*\.to\(torch\.uint8\)"),
        (lambda x: x > 9, "got torch.bool"),
        (lambda x: x.permute(0, 2, 3, 1), r"got \[1, 8, 32, 3\]; permute\(0, 3, 1, 2\)"),
        (lambda x: x[0], r"\[B, 3, H, W\], got \[3, 8, 32\]"),
        (lambda x: x[:, :1], r"got \[1, 1, 8, 32\]"),
        (lambda x: x[:, :, :0], r"got \[1, 3, 0, 32\]"),
    ],
)
def test_other_tensors_are_refused_with_the_cure(change, said):
    pixels = torch.arange(256).repeat(3).view(1, 3, 8, 32).to(torch.uint8)
    with pytest.raises(ValueError, match=said) as caught:
        as_pictures(change(pixels))
    assert len(str(caught.value)) < 300
