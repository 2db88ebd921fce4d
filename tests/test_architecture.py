"""Imports go one way, commands start light, and public names resolve."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ukbob_seg

PACKAGE = Path(ukbob_seg.__file__).parent
ORDER = [
    "dataset", "conversion", "preprocessing", "filtering", "networks", "training", "nnunet", "inference",
    "evaluation", "portable", "benchmark", "labelling", "demo", "cli",
]  # fmt: skip
# Validation inside training uses the sliding window, which itself needs nothing but networks.
EXCEPTIONS = {("training", "ukbob_seg.inference.sliding_window"), ("training", "ukbob_seg.inference.passes")}
# The same resampling for tensors, for inference to use.
TORCH_TWIN = PACKAGE / "preprocessing" / "resampling_torch.py"
HEAVY = {
    "torch",
    "numba",
    "SimpleITK",
    "pandas",
    "matplotlib",
    "blosc2",
    "scipy",
    "skimage",
    "nibabel",
    "monai",
    "pydicom",
    "highdicom",
}
COMMANDS = sorted(
    path.stem for path in (PACKAGE / "cli").glob("*.py") if "@command\ndef main" in path.read_text(encoding="utf-8")
)


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def test_imports_go_one_way():
    wrong = []
    for position, layer in enumerate(ORDER):
        later = {f"ukbob_seg.{name}" for name in ORDER[position + 1 :]}
        for path in (PACKAGE / layer).rglob("*.py"):
            for name in _imports(path):
                if any(name == x or name.startswith(x + ".") for x in later) and (layer, name) not in EXCEPTIONS:
                    wrong.append(f"{path.relative_to(PACKAGE)} imports {name}")
    assert wrong == []


def test_the_exceptions_could_come_earlier():
    for layer, module in EXCEPTIONS:
        path = PACKAGE.parent / (module.replace(".", "/") + ".py")
        earlier = tuple(f"ukbob_seg.{name}." for name in ORDER[: ORDER.index(layer)])
        assert all(name.startswith(earlier) for name in _imports(path) if name.startswith("ukbob_seg"))


def test_light_folders_never_import_torch():
    for layer in ("dataset", "conversion", "preprocessing", "filtering"):
        for path in (PACKAGE / layer).rglob("*.py"):
            if path != TORCH_TWIN:
                names = _imports(path)
                assert not any(name.split(".")[0] == "torch" for name in names), path
                assert not any(TORCH_TWIN.stem in name for name in names), path


def test_all_commands_are_installed():
    declared = set((PACKAGE.parent / "setup.py").read_text(encoding="utf-8").split('COMMANDS = (')[1].split(")")[0]
                   .replace('"', " ").replace(",", " ").split())  # fmt: skip
    assert declared == set(COMMANDS)
    assert len(COMMANDS) >= 9


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run_as_modules_too(command):
    """As torchrun starts them; a module without its last lines would do nothing and say nothing."""
    module = [sys.executable, "-m", f"ukbob_seg.cli.{command}"]
    result = subprocess.run([*module, "--no-such-option"], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_and_loads_nothing_heavy(command):
    code = (
        f"import sys; from ukbob_seg.cli.{command} import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        f"heavy = {sorted(HEAVY)!r}\n"
        "print('LOADED', [name for name in heavy if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "LOADED []" in result.stdout
    assert "example:" in result.stdout
    assert f"ukbob_{command}" in result.stdout


def test_public_names_resolve():
    for name in ukbob_seg.__all__:
        assert getattr(ukbob_seg, name) is not None
    with pytest.raises(AttributeError):
        _ = ukbob_seg.nothing


def test_files_stay_small():
    long = {
        path: n for path in PACKAGE.rglob("*.py") if (n := len(path.read_text(encoding="utf-8").splitlines())) > 400
    }
    assert long == {}
