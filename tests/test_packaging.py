"""What people install is what is in the repository: real files, all packages, all data; and clear errors elsewhere."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

PACKAGES = ("costmodel", "executor", "hw_profiles", "kernels", "planner", "reports")
NOT_DATA = {".py", ".pyc", ".md", ".tmp"}
IGNORED = shutil.ignore_patterns("__pycache__", "*.pyc", "*.egg-info", ".*_cache")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory, root: Path) -> zipfile.ZipFile:
    """The wheel built from the source archive of a copy of this checkout."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in (*PACKAGES, "src"):
        shutil.copytree(root / name, copy / name, symlinks=True, ignore=IGNORED)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, copy / name)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(copy / "dist"), str(copy)]
    built = subprocess.run(command, capture_output=True, text=True, check=False, cwd=copy)
    assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-2000:]
    (path,) = (copy / "dist").glob("*.whl")
    return zipfile.ZipFile(path)


def data_files(root: Path) -> set[str]:
    """Every file in the six folders that code may read at run time, as its path in the wheel."""
    return {
        f"shardplan/{path.relative_to(root).as_posix()}"
        for name in PACKAGES
        for path in (root / name).rglob("*")
        if path.is_file() and path.suffix not in NOT_DATA and not path.name.startswith(".")
    }


def test_wheel_holds_every_module(wheel: zipfile.ZipFile, root: Path) -> None:
    names = set(wheel.namelist())
    modules = {
        f"shardplan/{path.relative_to(root).as_posix()}" for name in PACKAGES for path in (root / name).rglob("*.py")
    }
    assert modules <= names, f"missing: {sorted(modules - names)}"
    assert {"shardplan/__init__.py", "shardplan/cli/__init__.py", "shardplan/py.typed"} <= names


def test_wheel_holds_every_data_file(wheel: zipfile.ZipFile, root: Path) -> None:
    missing = data_files(root) - set(wheel.namelist())
    assert not missing, f"add their endings to [tool.setuptools.package-data]: {sorted(missing)}"


def test_wheel_holds_nothing_else(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"shardplan"}
    assert not [name for name in wheel.namelist() if "__pycache__" in name]


def test_wheel_holds_no_links(wheel: zipfile.ZipFile) -> None:
    assert not [one.filename for one in wheel.infolist() if stat.S_ISLNK(one.external_attr >> 16)]


def test_wheel_works_elsewhere(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path / "site")
    program = "import shardplan; print(shardplan.__file__); print(shardplan.load_model('tiny').name)"
    result = subprocess.run(
        [sys.executable, "-P", "-c", program],
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.split() == [str(tmp_path / "site" / "shardplan" / "__init__.py"), "tiny"]


def test_wheel_knows_its_licence_and_typing(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
    text = wheel.read(metadata).decode()
    assert "License-Expression: Apache-2.0" in text
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_packages_of_a_checkout_are_links(root: Path) -> None:
    if not (root / ".git").exists():
        pytest.skip("not a git checkout")
    for name in PACKAGES:
        assert (root / "src" / "shardplan" / name).readlink() == Path("../..") / name


@pytest.mark.parametrize("name", PACKAGES)
def test_bare_import_is_refused(name: str, root: Path, child_environment: dict[str, str]) -> None:
    result = subprocess.run(
        [sys.executable, "-c", f"import {name}"],
        env=child_environment,
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert f"ImportError: this folder is the package shardplan.{name}" in result.stderr


def test_checkout_without_links_says_so(root: Path, tmp_path: Path) -> None:
    face = tmp_path / "shardplan"
    face.mkdir()
    shutil.copy(root / "src" / "shardplan" / "__init__.py", face)
    for name in PACKAGES:
        (face / name).write_text(f"../../{name}")
    result = subprocess.run(
        [sys.executable, "-c", "import shardplan"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ")
    assert "this checkout has no symbolic links" in last


def test_make_installs_what_the_run_extra_names(root: Path) -> None:
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {need.split(">")[0] for need in extras["run"]}
    (line,) = (line for line in (root / "Makefile").read_text().splitlines() if line.startswith("RUN_NEEDS"))
    assert set(line.split(":=")[1].split()) == named - {"triton"}
