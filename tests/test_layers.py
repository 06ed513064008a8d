"""The rooms of the package: which may import which, without a circle, and without each other's private names."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import grimp
import pytest

import evertune

# A room imports from its own line and from lines below it. Whoever adds a room says here where it belongs.
LAYERS = [
    {"cli", "__main__"},
    {"explain", "launch", "serve", "export", "ui"},
    {"reports"},
    {"live"},
    {"training", "registry", "presets"},
    {"lightning_modules", "callbacks"},
    {"streams", "drift", "importance", "strategies"},
    {"sources", "memory", "shards", "tasks", "gate"},
    {"metrics", "utils", "_lightning"},
]
# These two hand names on to users from rooms above them, lazily; no module of ours may import them.
FACES_FOR_USERS = {"evertune", "evertune.callbacks"}
OUTSIDE = {"benchmarks", "examples", "tests"}
NOT_OURS = {"_parameters", "_trainer", "_replace"}  # private names of torch, Lightning and named tuples that we share

ROOT = Path(evertune.__file__).parent
MODULES = {
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}
PACKAGES = [name for name, path in MODULES.items() if path.name == "__init__.py"]


@cache
def imports() -> grimp.ImportGraph:
    """All imports, those inside functions and those for type checkers as well."""
    return grimp.build_graph("evertune", include_external_packages=True, cache_dir=None)


def room(module: str) -> str:
    return module.split(".")[1]


def layer(module: str) -> int:
    return next(number for number, rooms in enumerate(LAYERS) if room(module) in rooms)


def violations(graph: grimp.ImportGraph) -> list[str]:
    """Imports that break the order of the rooms."""
    found = []
    for importer in sorted(graph.modules - FACES_FOR_USERS):
        for imported in sorted(graph.find_modules_directly_imported_by(importer)):
            if imported in FACES_FOR_USERS:
                found.append(f"{importer} imports {imported}, a face for users: import from the module that defines it")
            elif imported in OUTSIDE:
                found.append(f"{importer} imports {imported}, which is not a part of the package")
            elif imported.startswith("evertune.") and layer(imported) < layer(importer):
                found.append(f"{importer} imports {imported}, of a room above it")
    return found


def circles(graph: grimp.ImportGraph) -> list[str]:
    """A circle of modules and a circle of rooms, if there are any."""
    modules = {name for name in graph.modules if name.startswith("evertune.")} - FACES_FOR_USERS
    of_modules = {module: graph.find_modules_directly_imported_by(module) & modules for module in modules}
    of_rooms: dict[str, set[str]] = {}
    for module, imported in of_modules.items():
        of_rooms.setdefault(room(module), set()).update({room(name) for name in imported} - {room(module)})
    found = []
    for nodes in (of_modules, of_rooms):
        try:
            TopologicalSorter(nodes).prepare()
        except CycleError as error:
            found.append(" imports ".join(reversed(error.args[1])))
    return found


def test_every_room_has_its_layer() -> None:
    rooms = {room(module) for module in MODULES if module != "evertune"}
    assert rooms == set().union(*LAYERS)
    assert len(rooms) == sum(map(len, LAYERS)), "a room is in two layers"


def test_a_room_imports_only_from_rooms_below_it() -> None:
    assert violations(imports()) == []


def test_imports_make_no_circle() -> None:
    assert circles(imports()) == []


@pytest.mark.parametrize(
    ("importer", "imported", "reason"),
    [
        ("evertune.drift.mmd", "evertune.callbacks.base", "a room above it"),
        ("evertune.utils.files", "evertune.gate.gate", "a room above it"),
        ("evertune.launch.slurm", "evertune.cli.main", "a room above it"),
        ("evertune.training.trainer", "evertune.callbacks", "a face for users"),
        ("evertune.live.update", "evertune", "a face for users"),
        ("evertune.reports.page", "benchmarks", "not a part of the package"),
    ],
)
def test_a_forbidden_import_is_found(importer: str, imported: str, reason: str) -> None:
    graph = deepcopy(imports())
    if imported == "benchmarks":
        graph.add_module(imported, is_squashed=True)
    graph.add_import(importer=importer, imported=imported)
    (found,) = violations(graph)
    assert found.startswith(f"{importer} imports {imported}, ")
    assert reason in found


def test_a_circle_is_found() -> None:
    graph = deepcopy(imports())
    graph.add_import(importer="evertune.drift.detector", imported="evertune.drift.mmd")
    (of_modules,) = circles(graph)
    assert "evertune.drift.detector imports evertune.drift.mmd" in of_modules


def test_a_circle_of_rooms_is_found() -> None:
    graph = deepcopy(imports())
    graph.add_import(importer="evertune.streams.sampler", imported="evertune.importance.rules")
    graph.add_import(importer="evertune.importance.per_example", imported="evertune.streams.experience")
    (of_rooms,) = circles(graph)
    assert of_rooms in ("importance imports streams imports importance", "streams imports importance imports streams")


# --- private names


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def package_of(module: str) -> str:
    return module if module in PACKAGES else module.rpartition(".")[0]


def within(package: str, other: str) -> bool:
    """Whether a package is another one or inside it."""
    return f"{package}.".startswith(f"{other}.")


def private_imports(module: str, tree: ast.AST) -> Iterator[str]:
    """Names that a module imports though they are private to another package."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or node.module is None or node.module.split(".")[0] != "evertune":
            continue
        for name in node.names:
            path = [*node.module.split("."), name.name]
            for depth, part in enumerate(path):
                owner = package_of(".".join(path[:depth]))
                if is_private(part) and not within(package_of(module), owner):
                    yield f"{module}:{node.lineno} imports {'.'.join(path)}"


def private_definitions(tree: ast.AST) -> Iterator[str]:
    """Private functions, classes, attributes and constants of a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def private_uses(trees: dict[str, ast.AST]) -> list[str]:
    """Uses of ``x._name`` in packages that do not define it, where another package of ours does."""
    definers: dict[str, set[str]] = {}
    for module, tree in trees.items():
        for name in set(filter(is_private, private_definitions(tree))) - NOT_OURS:
            definers.setdefault(name, set()).add(package_of(module))
    return [
        f"{module}:{node.lineno} uses {ast.unparse(node)}, which is private to {' and '.join(sorted(owners))}"
        for module, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and (owners := definers.get(node.attr))
        and not any(within(package_of(module), owner) for owner in owners)
    ]


@cache
def trees() -> dict[str, ast.AST]:
    return {module: ast.parse(path.read_text()) for module, path in MODULES.items()}


def test_no_module_imports_the_private_name_of_another_package() -> None:
    assert [found for module, tree in trees().items() for found in private_imports(module, tree)] == []


def test_no_module_uses_the_private_attribute_of_another_package() -> None:
    assert private_uses(trees()) == []


def test_private_names_of_others_are_found() -> None:
    code = "from evertune.drift.detector import Detector, _hidden\nfrom evertune.drift import _module\n"
    assert list(private_imports("evertune.callbacks.drift_trigger", ast.parse(code))) == [
        "evertune.callbacks.drift_trigger:1 imports evertune.drift.detector._hidden",
        "evertune.callbacks.drift_trigger:2 imports evertune.drift._module",
    ]
    assert list(private_imports("evertune.drift.mmd", ast.parse(code))) == []
    assert list(private_imports("evertune.drift.explain.topics", ast.parse(code))) == []
    assert list(private_imports("evertune.utils.ranks", ast.parse("from evertune._lightning import pl"))) == []
    detector = ast.parse("class Detector:\n    def _validated(self, x): ...")
    trigger = ast.parse("def run(detector):\n    detector.update(detector._validated(1), detector._river)")
    assert private_uses({"evertune.drift.detector": detector, "evertune.callbacks.drift_trigger": trigger}) == [
        "evertune.callbacks.drift_trigger:2 uses detector._validated, which is private to evertune.drift"
    ]
    assert private_uses({"evertune.drift.detector": detector, "evertune.drift.mmd": trigger}) == []


# --- faces


def handed_on(tree: ast.AST) -> set[str]:
    """The names that the ``__init__`` of a package imports for type checkers."""
    return {
        name.asname for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for name in node.names if name.asname
    }


@pytest.mark.parametrize("package", [name for name in PACKAGES if "face(" in MODULES[name].read_text()])
def test_a_face_hands_on_the_same_names_to_people_and_to_type_checkers(package: str) -> None:
    face = importlib.import_module(package)
    assert face.__all__ == sorted(handed_on(trees()[package]))
    for name in face.__all__:
        assert f"{package}.{name}" not in MODULES, f"{package} hands on {name}, which is also the name of a module"
        assert not is_private(name)
        assert getattr(face, name) is not None
