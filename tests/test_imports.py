"""Who may import whom, what a file may be called and how long it may get: the rules of CONTRIBUTING.md, checked."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CLI = ROOT / "src" / "shardplan" / "cli"
FACE = ROOT / "src" / "shardplan" / "__init__.py"
MAY_IMPORT = {
    "hw_profiles": set(),
    "costmodel": {"hw_profiles"},
    "planner": {"costmodel", "hw_profiles"},
    "kernels": set(),
    "executor": {"planner", "costmodel", "hw_profiles", "kernels"},
    "reports": {"planner", "costmodel", "hw_profiles"},
}
ONLY_IN = {
    "torch": {"executor", "kernels"},
    "triton": {"executor", "kernels"},
    "matplotlib": {"reports"},
    "pandas": {"reports"},
}
HEAVY = ("torch", "triton", "matplotlib", "pandas", "scipy", "networkx", "pydantic", "numpy")
MOST_LINES = 400


def python_files() -> list[Path]:
    """Every Python file of the project, by its real path."""
    folders = [ROOT / name for name in MAY_IMPORT] + [CLI, ROOT / "tests"]
    return sorted([FACE, *(path for folder in folders for path in folder.rglob("*.py"))])


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import, inside functions too; relative ones start with a dot."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            bare = module == "shardplan"
            yield from ((node.lineno, f"{module}.{alias.name}" if bare else module) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = ast.unparse(node.func).split(".")[-1]
            if called in {"import_module", "__import__"}:
                yield node.lineno, str(node.args[0].value)


def forbidden(package: str, module: str) -> str:
    """Why `package` may not import `module`; empty where it may."""
    top, *rest = module.split(".")
    if top in ONLY_IN and package not in ONLY_IN[top]:
        return f"only {' and '.join(sorted(ONLY_IN[top]))} import {top}"
    if top in MAY_IMPORT:
        return f"write shardplan.{module}"
    if top != "shardplan" or package == "cli":
        return ""
    target = rest[0] if rest else "the public face"
    allowed = MAY_IMPORT[package] | {package}
    return "" if target in allowed else f"{package} may import {', '.join(sorted(allowed))}"


@pytest.mark.parametrize("package", [*MAY_IMPORT, "cli"])
def test_imports_follow_the_table(package: str) -> None:
    folder = CLI if package == "cli" else ROOT / package
    faults = [
        f"{path.relative_to(ROOT)}:{line}: imports {module}: {why}"
        for path in sorted(folder.rglob("*.py"))
        for line, module in imported(path)
        if (why := forbidden(package, module))
    ]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("package", "module"),
    [
        ("hw_profiles", "shardplan.costmodel.model"),
        ("planner", "torch.nn"),
        ("costmodel", "pandas"),
        ("costmodel", "shardplan.estimate"),
        ("kernels", "kernels.attention"),
        ("cli", "torch"),
    ],
)
def test_a_wrong_arrow_is_found(package: str, module: str) -> None:
    assert forbidden(package, module)


def test_no_relative_imports() -> None:
    faults = [
        f"{path.relative_to(ROOT)}:{line}" for path in python_files() for line, m in imported(path) if m[0] == "."
    ]
    assert not faults


def test_files_are_short() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in python_files()}
    long = [f"{path.relative_to(ROOT)}: {lines} lines" for path, lines in lengths.items() if lines > MOST_LINES]
    assert not long, f"more than {MOST_LINES} lines; split by idea: {', '.join(long)}"


def test_names_say_what_is_inside() -> None:
    faults = [
        str(path.relative_to(ROOT))
        for path in python_files()
        if path.stem in sys.stdlib_module_names or path.stem in {"utils", "util", "helpers", "misc"}
        if path.stem != "__init__"
    ]
    assert not faults, f"a standard-library name, or one that says nothing: {', '.join(faults)}"


@pytest.mark.parametrize(
    ("statement", "unwanted"),
    [
        ("import shardplan; shardplan.__all__; dir(shardplan)", HEAVY),
        ("import shardplan; shardplan.__version__", HEAVY),
        ("import shardplan.cli", tuple(name for name in HEAVY if name != "numpy")),
        ("import shardplan; shardplan.Layout(); shardplan.Plan", ("torch", "matplotlib", "pandas")),
    ],
)
def test_imports_stay_light(statement: str, unwanted: tuple[str, ...], child_environment: dict[str, str]) -> None:
    program = f"import sys; {statement}; print(*(set({unwanted!r}) & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", program], env=child_environment, capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == []
