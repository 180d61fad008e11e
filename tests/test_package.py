"""What is shipped: a light import, recipes and weights inside the wheel, a portable lock."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from importlib import resources
from pathlib import Path

import pytest

import goose_mm
from goose_mm.config import load_model_config, load_recipe, recipe_names

ROOT = Path(__file__).parent.parent
PACKAGE = Path(str(resources.files("goose_mm")))
MODELS = {f"goose-tiny-{kind}": kind for kind in ("text", "vision", "audio")}
MB = 2**20


def in_git() -> list[Path]:
    """Every file that is committed or about to be."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [path for name in names.split("\0") if name and (path := ROOT / name).is_file()]


def test_import_is_light():
    code = "import sys, goose_mm; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torch", "numpy", "PIL", "timm", "transformers", "tyro", "jaxtyping"}
    assert not heavy & set(done.stdout.split())


def test_public_names():
    assert set(dir(goose_mm)) == set(goose_mm.__all__)
    assert all(getattr(goose_mm, name) for name in goose_mm.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = goose_mm.nothing


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_loads(name):
    assert load_recipe(name).model in name


def test_every_model_is_shipped():
    for name, kind in MODELS.items():
        folder = PACKAGE / "pretrained" / name
        assert load_model_config(folder / "config.json").model == kind
        assert (folder / "model.safetensors").stat().st_size > 1000
        assert (folder / "README.md").read_text()


def test_weights_are_small():
    assert sum(f.stat().st_size for f in PACKAGE.rglob("*.safetensors")) < 36 * MB
    too_large = [f for f in in_git() if f.stat().st_size > 20 * MB]
    assert not too_large


def test_wheel_holds_all_but_python_files(tmp_path):
    """Everything a checkout finds in the package is in the wheel, byte for byte as long."""
    if uv := shutil.which("uv", path=Path(sys.executable).parent):
        build = [uv, "build", "--quiet", "--wheel", "--python", sys.executable, "-o", tmp_path]
    else:
        build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path]
    subprocess.run([*build, ROOT], check=True, timeout=300)
    (wheel,) = tmp_path.glob("goose_mm-*.whl")
    packed = {i.filename: i.file_size for i in zipfile.ZipFile(wheel).infolist()}
    for path in in_git():
        name = path.relative_to(ROOT).as_posix()
        if name.startswith("goose_mm/"):
            assert packed.get(name) == path.stat().st_size, name
    assert not [n for n in packed if n.startswith(("tests", "benchmarks", "docs"))]
    assert any(n.endswith("licenses/LICENSE") for n in packed)


def test_lock_is_portable_and_pins_the_set_that_fits():
    lock = (ROOT / "requirements.lock").read_text()
    assert not re.search(r"https?://|file:|\.whl|^-|@ ", lock, re.M)
    for pin in ("torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0", "triton==3.6.0"):
        assert re.search(rf"^{re.escape(pin)}\b", lock, re.M), pin
    requirements = re.findall(r"^[\w.-]+==[^ ]+.*?(?=^\S|\Z)", lock, re.M | re.S)
    assert requirements and all("--hash=sha256:" in requirement for requirement in requirements)
