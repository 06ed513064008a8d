"""Models and data inside an installed package."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

_SCHEME = "package:"


def locate(name_or_path: str) -> str:
    """Resolve ``package:NAME/FOLDER`` to a path; any other name is returned unchanged.

    Args:
        name_or_path: ``package:`` and the import name of a package, then a path inside it.

    Raises:
        FileNotFoundError: If the package is not installed, or the path does not exist in it.

    Example:
        >>> locate("bert-base-uncased")
        'bert-base-uncased'
        >>> Path(locate("package:evertune/py.typed")).name
        'py.typed'
    """
    if not name_or_path.startswith(_SCHEME):
        return name_or_path
    package, _, inside = name_or_path.removeprefix(_SCHEME).partition("/")
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"{name_or_path}: the package {package!r} is not installed")
    path = Path(spec.submodule_search_locations[0]) / inside
    if not path.exists():
        raise FileNotFoundError(f"{name_or_path}: {path} does not exist")
    return str(path)
