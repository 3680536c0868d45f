"""The house rules that a reader of the source cannot see at a glance, read from the source itself."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "opus_jax"

# Lowest floor first: a module imports from its own floor's room or from lower floors, never from above.
FLOORS = [
    {"errors"},
    {"config_checks"},
    {"config"},
    {"distributed", "pallas_kernels"},
    {"models", "optim"},
    {"influence"},
    {"selection", "data", "evaluation"},
    {"training"},
    {"mixture", "synthesis", "curriculum", "reports"},
    {"doctor"},
    {"cli"},
    {"__main__"},
]
FLOOR = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
METHODS = ("mixture", "synthesis", "curriculum")
SOURCES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "pallas_kernels").rglob("*.py")])

# Rooms of one floor do not know each other, except: evaluation reads the validation rows that data wrote, feedback
# makes the plans that data samples from, and kernels are split over the mesh as the rules of the axes say.
NEIGHBOURS = {("evaluation", "data"), ("selection", "data"), ("pallas_kernels", "distributed")}


def room_of(module: str) -> str:
    """opus_jax.data.plan -> data; opus_jax itself -> the library face; the kernels are one room."""
    parts = module.split(".")
    if parts[0] == "pallas_kernels":
        return parts[0]
    return parts[1] if len(parts) > 1 else "opus_jax"


def module_name(file: Path) -> str:
    name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


def imported_modules(file: Path) -> set[str]:
    """Modules of ours that a file names in an import, at the top or inside a function."""
    known = {module_name(source) for source in SOURCES}
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in known else str(node.module) for name in whole}
    return {name for name in found if name.split(".")[0] in ("opus_jax", "pallas_kernels", "benchmarks", "tests")}


def edges() -> list[tuple[str, str]]:
    """(importing module, imported module) over the whole package, the library face apart."""
    return [(module_name(f), name) for f in SOURCES for name in imported_modules(f) if f != PACKAGE / "__init__.py"]


def test_every_room_is_on_a_floor():
    rooms = {room_of(module_name(f)) for f in SOURCES} - {"opus_jax"}
    assert rooms <= FLOOR.keys(), f"give these a floor in architecture.md and here: {rooms - FLOOR.keys()}"


def test_imports_point_one_way():
    wrong = []
    for user, used in edges():
        above, below = room_of(user), room_of(used)
        if above == below:
            continue
        if below not in FLOOR or FLOOR[below] > FLOOR[above]:
            wrong.append(f"{user} -> {used}")
        elif FLOOR[below] == FLOOR[above] and (above, below) not in NEIGHBOURS:
            wrong.append(f"{user} -> {used} (same floor)")
    assert not wrong, wrong


def test_method_packages_do_not_know_each_other():
    wrong = [e for e in edges() if room_of(e[0]) in METHODS and room_of(e[1]) in set(METHODS) - {room_of(e[0])}]
    assert not wrong


def test_no_module_imports_itself_in_a_circle():
    graph: dict[str, set[str]] = {}
    for user, used in edges():
        graph.setdefault(user, set()).add(used)
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for used in graph.get(module, ()):
                visit(used, (*path, module))
            done.add(module)

    for module in list(graph):
        visit(module, ())


def test_the_package_needs_neither_tests_nor_benchmarks():
    assert not [edge for edge in edges() if edge[1].split(".")[0] in ("tests", "benchmarks")]


def test_importing_the_package_does_not_start_jax():
    code = "import sys, opus_jax, opus_jax.cli; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("name", ["manager", "helper", "helpers", "utils", "util", "misc", "common"])
def test_no_file_is_named_for_nothing(name):
    assert not [f for f in SOURCES if name in f.stem.split("_")]


# -------------------------------------------------------------------------------- what must not be written

FORBIDDEN = {
    "a package registry": r"files\.pythonhosted|pypi\.org/simple|index-url|find-links|trusted-host|/simple/",
    "a path of one machine": r"/(?:work|home|Users|mnt|opt/(?:pypi|wheels))/\w|/root/",
    "a thing left to do": r"\b(?:TODO|FIXME|XXX)\b",
}
TEXT = {".py", ".md", ".toml", ".yaml", ".yml", ".sh", ".txt", ".cfg", ".ipynb", ".json", ""}


def tracked_text() -> list[Path]:
    """Tracked text files, or all of them outside git; this file, which holds the words, apart."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    files = [ROOT / name for name in listed.splitlines()] or [f for f in ROOT.rglob("*") if ".venv" not in f.parts]
    apart = {Path(__file__).resolve(), ROOT / "LICENSE"}
    return [f for f in files if f.is_file() and f.suffix in TEXT and f not in apart]


@pytest.mark.parametrize("what", FORBIDDEN)
def test_nothing_forbidden_is_written(what):
    found = []
    for file in tracked_text():
        for number, line in enumerate(file.read_text(errors="replace").splitlines(), 1):
            if re.search(FORBIDDEN[what], line):
                found.append(f"{file.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not found, f"{what}: {found}"
