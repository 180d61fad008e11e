"""What is shipped, and how the house is built: a light import, a whole wheel, locks, rooms."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from graphlib import CycleError, TopologicalSorter
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


def pins(lock: str) -> dict[str, set[str]]:
    """Versions by package; several where Python's version decides."""
    found: dict[str, set[str]] = {}
    for name, version in re.findall(r"^([\w.-]+)==([^ ;]+)", (ROOT / lock).read_text(), re.M):
        found.setdefault(name, set()).add(version)
    return found


@pytest.mark.parametrize("file", ["requirements.lock", "requirements-dev.lock"])
def test_locks_are_portable_and_pin_the_set_that_fits(file):
    lock = (ROOT / file).read_text()
    assert not re.search(r"https?://|file:|\.whl|^-|@ ", lock, re.M)
    for pin in ("torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0", "triton==3.6.0"):
        assert re.search(rf"^{re.escape(pin)}\b", lock, re.M), pin
    requirements = re.findall(r"^[\w.-]+==[^ ]+.*?(?=^\S|\Z)", lock, re.M | re.S)
    assert requirements and all("--hash=sha256:" in requirement for requirement in requirements)


def test_what_runs_is_locked_within_what_develops():
    run, develop = pins("requirements.lock"), pins("requirements-dev.lock")
    assert all(versions <= develop[name] for name, versions in run.items())
    assert not run.keys() & {"pytest", "ruff", "lm-eval", "lmms-eval", "wandb", "rwkv"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for lock, wanted in (
        (run, [*project["dependencies"], *extras["demo"]]),
        (develop, [*extras["dev"], *extras["heif"], *extras["demo"]]),
    ):
        names = {re.match(r"[\w.-]+", line)[0].replace("_", "-").lower() for line in wanted}
        assert names - {"goose-mm"} <= lock.keys()


# the house

MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}


def imported(module: str) -> set[str]:
    """The modules of ours that one names in its imports, wherever these stand: at the top, in a
    function, or for the sake of annotations alone."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: imports are absolute"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inner & MODULES.keys()) or {str(node.module)}
    return found & MODULES.keys()


def test_imports_go_round_in_no_circle():
    """Of modules, and of the rooms they stand in."""
    modules = {module: imported(module) for module in MODULES}
    assert len(modules) > 100 and sum(map(len, modules.values())) > 200
    rooms: dict[str, set[str]] = {}
    for module, others in modules.items():
        room, *_ = f"{module}.".removeprefix("goose_mm.").split(".")
        for other in others:
            there, *_ = f"{other}.".removeprefix("goose_mm.").split(".")
            rooms.setdefault(room, set()).update({there} - {room})
    for graph in (modules, rooms):
        try:
            list(TopologicalSorter(graph).static_order())
        except CycleError as error:
            pytest.fail(" -> ".join(error.args[1]))


def test_every_room_says_what_it_is():
    folders = {path.parent for path in MODULES.values()}
    for folder in folders:
        text = (folder / "__init__.py").read_text()
        said = ast.get_docstring(ast.parse(text))
        assert said and text.splitlines()[0].startswith('"""'), folder
        assert said.splitlines()[0].endswith((".", "!", "?")), folder
