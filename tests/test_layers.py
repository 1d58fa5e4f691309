"""Imports point down the layers only, and what must start without torch does."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "src" / "pdrelay"

# Higher may import lower, not the other way round; equal ones only where listed together.
RANKS = {
    "errors": 0,
    "core": 1,
    "model": 2,
    "transport": 3,
    "engine": 4,
    "integrations": 5,
    "launch": 6,
    "doctor": 6,  # its preflight asks launch; launch asks its diagnose
    "telemetry": 6,
    "router": 7,
    "bench": 8,
    "lab": 9,
    "serve": 10,
    "front_door": 10,
    "cli": 11,
    "__main__": 12,
}
TORCH_FREE = (
    "core",
    "model",
    "transport",
    "launch",
    "doctor",
    "telemetry",
    "router",
    "bench",
    "lab",
    "cli",
)
# Behind a seam of a torch-free layer: imported by name, inside functions, when a rank has a GPU.
DEVICE_PACKAGES = ("pdrelay.transport.cuda",)


def layer_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def module_of(path: Path) -> str:
    parts = ("pdrelay", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts).removesuffix(".__init__")


def of_a_device(module: str) -> bool:
    return module.startswith(DEVICE_PACKAGES)


def imports_of(path: Path) -> list[tuple[int, str]]:
    """(line, dotted module) of every import, those inside functions too."""
    return imports_among(path, ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def imports_at_start(path: Path) -> list[tuple[int, str]]:
    """Of the imports that run when the module is imported; none in functions."""
    nodes, found = [ast.parse(path.read_text(encoding="utf-8"))], []
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        found.append(node)
        nodes += ast.iter_child_nodes(node)
    return imports_among(path, found)


def imports_among(path: Path, nodes) -> list[tuple[int, str]]:
    found = []
    for node in nodes:
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            found.append((node.lineno, node.module))
            if node.module == "pdrelay":
                found += [(node.lineno, f"pdrelay.{alias.name}") for alias in node.names]
    return found


def modules():
    return sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    layer = layer_of(path)
    assert layer in RANKS, f"{path}: give its layer a rank in tests/test_layers.py"
    for line, module in imports_of(path):
        parts = module.split(".")
        if parts[0] != "pdrelay" or len(parts) < 2 or parts[1] == "__version__":
            continue
        assert parts[1] in RANKS, f"{path}:{line}: no layer {parts[1]}"
        down = RANKS[parts[1]] < RANKS[layer] or parts[1] == layer
        same = RANKS[parts[1]] == RANKS[layer]
        assert down or same, f"{path}:{line}: {layer} imports {module}, which is above it"


def test_modules_without_torch_do_not_name_it():
    for path in modules():
        if layer_of(path) not in TORCH_FREE or of_a_device(module_of(path)):
            continue
        for line, module in imports_of(path):
            assert module.split(".")[0] != "torch", f"{path}:{line} imports torch"


def test_device_modules_are_imported_by_nothing_at_its_start():
    assert any(of_a_device(module_of(path)) for path in modules())
    for path in modules():
        if of_a_device(module_of(path)):
            continue
        for line, module in imports_at_start(path):
            assert not of_a_device(module), f"{path}:{line} imports {module} at its start"


def python(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_front_door_processes_never_load_torch():
    names = [
        module_of(path)
        for path in modules()
        if layer_of(path) in (*TORCH_FREE, "serve", "front_door", "errors")
        and not of_a_device(module_of(path))
    ]
    code = "import importlib, sys\n"
    code += f"for name in {names!r}: importlib.import_module(name)\n"
    code += "assert 'torch' not in sys.modules, 'torch was imported'\n"
    python(code)


def third_party(code: str) -> set[str]:
    """Top-level modules from outside the standard library that `code` loads."""
    shown = python(
        "import sys; before = set(sys.modules)\n"
        + code
        + "\nprint(*sorted({n.split('.')[0] for n in set(sys.modules) - before}))"
    )
    return set(shown.split()) - set(sys.stdlib_module_names) - {"pdrelay"}


def test_importing_the_package_loads_nothing_else():
    assert third_party("import pdrelay") == set()


def test_help_loads_no_third_party_package():
    code = (
        "from pdrelay import cli, errors\n"
        "import contextlib, io\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n"
        "    cli.main(['--help'])"
    )
    assert third_party(code) == set()


def test_help_of_serve_is_light():
    code = (
        "from pdrelay import cli, errors\n"
        "import contextlib, io\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n"
        "    cli.main(['serve', '--help'])"
    )
    assert third_party(code) <= {"msgspec", "typing_extensions"}
