"""The floors of docs/architecture.md, held against the imports."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent
SINGLE_DEVICE = ("titans_scale/models", "titans_scale/memory")


def floors() -> dict[str, int]:
    """Folder or file -> floor, from the page's table."""
    rows = re.findall(r"^\| (\d) \| (.+?) \|", (ROOT / "docs" / "architecture.md").read_text(), flags=re.MULTILINE)
    return {path.rstrip("/"): int(floor) for floor, paths in rows for path in re.findall(r"`([^`]+)`", paths)}


def python_files() -> list[Path]:
    return sorted([*(ROOT / "titans_scale").rglob("*.py"), *(ROOT / "tools").glob("*.py")])


def imported(file: Path) -> set[str]:
    """Modules that a file imports, anywhere in it; names from a package count as its modules where there are such."""
    modules = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return modules


def place_of(path: str) -> str | None:
    """The row of the table that a file belongs to."""
    return next((place for place in floors() if path == place or path.startswith(f"{place}/")), None)


def our_imports(file: Path) -> set[str]:
    """Rows that a file imports from."""
    paths = {module.replace(".", "/") for module in imported(file) if module.startswith("titans_scale.")}
    return {place for path in paths for name in (path, f"{path}.py") if (place := place_of(name))}


def test_every_file_has_a_floor():
    named = {
        place_of(str(file.relative_to(ROOT))) for file in python_files() if file.parent.name != "titans_scale" or file.stem == "config"
    }
    assert named == set(floors()) - {"titans_scale/train.py"}


def test_imports_run_downwards():
    table = floors()
    upwards = []
    for file in python_files():
        here = place_of(str(file.relative_to(ROOT)))
        if here is not None:
            upwards += [f"{file.relative_to(ROOT)} -> {place}" for place in our_imports(file) if table[place] > table[here]]
    assert upwards == []


def test_there_are_no_circles():
    graph: dict[str, set[str]] = {}
    for file in python_files():
        here = place_of(str(file.relative_to(ROOT)))
        if here is not None:
            graph.setdefault(here, set()).update(our_imports(file) - {here})
    assert set(TopologicalSorter(graph).static_order()) >= set(graph)  # raises CycleError at a circle


def test_models_and_memory_know_nothing_of_other_processes():
    for file in python_files():
        if str(file.relative_to(ROOT)).startswith(SINGLE_DEVICE):
            assert not {module for module in imported(file) if module.startswith("torch.distributed")}, file


def test_entry_points_are_short():
    for file in [ROOT / "titans_scale" / "train.py", *(ROOT / "tools").glob("*.py")]:
        assert len(file.read_text().splitlines()) < 100, file


def test_the_folders_of_data_import_only_those_before_them():
    """As the row of titans_scale/data/ names them."""
    row = next(line for line in (ROOT / "docs" / "architecture.md").read_text().splitlines() if "`titans_scale/data/`" in line)
    folders = re.findall(r"`(\w+)/`", row)
    assert sorted(folders) == sorted(init.parent.name for init in (ROOT / "titans_scale" / "data").glob("*/__init__.py"))
    later = [
        f"{file.name} -> {module}"
        for number, folder in enumerate(folders)
        for file in (ROOT / "titans_scale" / "data" / folder).glob("*.py")
        for module in imported(file)
        if module.startswith(tuple(f"titans_scale.data.{other}." for other in folders[number + 1 :]))
    ]
    assert later == []
