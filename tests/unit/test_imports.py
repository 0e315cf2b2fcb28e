"""The direction of imports, the cost of ``import splitrun``, and the public names."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import splitrun

ROOT = Path(splitrun.__file__).parent
RANKS = {
    "errors": 0, "quantities": 0, "child": 0, "folders": 0, "planner": 1, "schedule": 1,
    "kernels": 2, "model": 2, "stage": 3,
    "transport": 4, "measure": 5, "cluster": 6, "engine": 7, "api": 8, "what_if": 9, "serve": 8, "bench": 9, "cli": 10,
    "__main__": 11, "demo": 1,
}  # fmt: skip
"""Package -> layer. A module imports from layers below its own and from its own package."""
MAY_SHARE_A_LAYER = {("model", "kernels")}
PURE = ("planner", "schedule", "errors", "quantities")
FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def package(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import in the file, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write the package's full name"
            if node.module == "splitrun":
                yield from ((node.lineno, f"splitrun.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, node.module or ""


def test_every_package_has_a_layer() -> None:
    assert {package(path) for path in FILES} <= RANKS.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    own = package(path)
    for line, name in imported_names(ast.parse(path.read_text(encoding="utf-8"))):
        parts = name.split(".")
        if parts[0] != "splitrun" or len(parts) < 2 or parts[1] not in RANKS:
            continue  # another project, or a name of splitrun/__init__.py itself
        target = parts[1]
        allowed = target == own or RANKS[target] < RANKS[own] or (own, target) in MAY_SHARE_A_LAYER
        assert allowed, f"{path.relative_to(ROOT)}:{line} imports {name}: {own} lies below {target}"


@pytest.mark.parametrize("path", [path for path in FILES if package(path) in PURE], ids=lambda path: path.name)
def test_pure_packages_import_no_torch(path: Path) -> None:
    heavy = {"torch", "transformers", "accelerate", "ray", "safetensors"}
    for line, name in imported_names(ast.parse(path.read_text(encoding="utf-8"))):
        assert name.split(".")[0] not in heavy, f"{path.name}:{line} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_stay_small(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 350


def modules_after(code: str) -> set[str]:
    script = f"import sys; {code}; print(*sorted(sys.modules))"
    outcome = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(outcome.stdout.split())


HEAVY = {"torch", "transformers", "accelerate", "numpy", "pydantic", "fastapi", "ray", "yaml", "typer", "asyncio"}


def test_import_splitrun_loads_nothing_heavy() -> None:
    # What costs time is what is loaded: the bound of 50 ms is measured in tests/bench.
    loaded = modules_after("import splitrun")
    assert not loaded & HEAVY
    assert {name for name in loaded if name.startswith("splitrun")} == {"splitrun"}


def test_the_command_line_loads_only_its_parser() -> None:
    loaded = modules_after("import splitrun.cli.app")
    assert not loaded & (HEAVY - {"typer", "asyncio"})


def test_public_names() -> None:
    assert sorted(splitrun.__all__) == [
        "Completion", "Engine", "Placement", "SamplingParams", "SplitrunError", "TokenEvent", "__version__", "plan",
    ]  # fmt: skip
    assert dir(splitrun) == sorted(splitrun.__all__)


@pytest.mark.parametrize("name", splitrun.__all__)
def test_public_names_resolve(name: str) -> None:
    assert getattr(splitrun, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = splitrun.nothing
