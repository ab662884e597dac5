"""The rules that the tree must show: names, direction of dependencies, one door for each heavy library, small rooms."""

import ast
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("actors", "learners", "rewards", "tools", "configs")
PLUG_INS = ("actors", "learners", "rewards", "tools")
DOORS = {
    "deepspeed": {"learners/deepspeed.py"},
    "ray": {"rlsys/cluster.py"},
    "vllm": {"actors/engine.py", "actors/scheduler.py", "actors/weights.py", "learners/sender.py"},
}
MAX_LINES = 420


def sources(*folders: str) -> Iterator[Path]:
    """Python files of the package, each once: the links inside `rlsys` are not followed."""
    for folder in folders:
        for directory, _, names in os.walk(ROOT / folder, followlinks=False):
            yield from (Path(directory) / name for name in sorted(names) if name.endswith(".py"))


def imported_modules(path: Path) -> set[str]:
    """Absolute names of all modules that a file imports, anywhere in it, for type checkers only or not."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            found |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_link_in_the_package_is_relative_and_resolves(folder: str) -> None:
    link = ROOT / "rlsys" / folder
    assert link.is_symlink()
    assert os.readlink(link) == f"../{folder}"
    assert link.resolve() == (ROOT / folder).resolve()
    assert (link / "__init__.py").is_file()


@pytest.mark.parametrize("folder", ["rlsys", *PLUG_INS, "configs"])
def test_one_word_names_the_folder_and_its_tests(folder: str) -> None:
    assert (ROOT / folder).is_dir()
    assert (ROOT / "tests" / folder).is_dir()


def test_the_core_imports_no_plug_in() -> None:
    forbidden = tuple(f"rlsys.{folder}" for folder in PLUG_INS)
    offenders = {
        name_of(path): module
        for path in sources("rlsys")
        for module in imported_modules(path)
        if any(module == name or module.startswith(f"{name}.") for name in forbidden)
    }
    assert offenders == {}, "reach plug-ins by a `module:object` reference from the config"


@pytest.mark.parametrize("folder", PLUG_INS)
def test_plug_ins_do_not_import_one_another(folder: str) -> None:
    allowed = {folder} | ({"tools"} if folder == "rewards" else set())
    forbidden = tuple(f"rlsys.{other}" for other in PLUG_INS if other not in allowed)
    offenders = {
        name_of(path): module
        for path in sources(folder)
        for module in imported_modules(path)
        if any(module == name or module.startswith(f"{name}.") for name in forbidden)
    }
    assert offenders == {}


@pytest.mark.parametrize("library", DOORS)
def test_a_heavy_library_has_one_door(library: str) -> None:
    importers = {
        name_of(path)
        for path in sources("rlsys", *PLUG_INS)
        if any(module.split(".")[0] == library for module in imported_modules(path))
    }
    assert importers <= DOORS[library], f"`{library}` is imported elsewhere"
    assert importers, f"the rule about `{library}` is about nothing"


def test_no_file_loads_a_plug_in_a_second_time_under_its_bare_name() -> None:
    tests_and_sources = sources("rlsys", *PLUG_INS, "configs", "tests")
    offenders = {
        name_of(path): module
        for path in tests_and_sources
        for module in imported_modules(path)
        if module.split(".")[0] in PLUG_INS
    }
    assert offenders == {}
    ruff = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]["lint"]
    assert "TID" in ruff["select"]
    assert set(PLUG_INS) <= set(ruff["flake8-tidy-imports"]["banned-api"]), "ruff must say so while one types"


@pytest.mark.parametrize("module", ["rlsys.cli", "rlsys.config"])
def test_the_command_line_starts_without_heavy_libraries(module: str) -> None:
    code = f"import {module}, sys; print(*sorted({{'torch', 'ray', 'vllm', 'transformers'}} & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert loaded.split() == []


def test_no_file_is_a_monster() -> None:
    lengths = {name_of(path): len(path.read_text().splitlines()) for path in sources("rlsys", *PLUG_INS)}
    assert {name: lines for name, lines in lengths.items() if lines > MAX_LINES} == {}, "a second idea moved in"


def test_the_package_says_that_it_is_typed_and_carries_its_configurations() -> None:
    assert (ROOT / "rlsys" / "py.typed").is_file()
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert setuptools["package-data"] == {"rlsys": ["py.typed"], "rlsys.configs": ["*.yaml", "miniature/*.yaml"]}
