"""The documentation site, built by ``make docs``.

The source is the whole repository, so that links between documents are the same in it and on the site. The pages are
those of this folder and the few beside it that they link to; the reference is made from the docstrings.
"""

from __future__ import annotations

import builtins
import importlib.metadata
import pkgutil
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

import evertune

project = "evertune"
release = importlib.metadata.version("evertune")
copyright = "the evertune authors"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon"]
root_doc = "docs/index"
include_patterns = ["docs/**", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/live/README.md"]
exclude_patterns = [".*", "benchmarks", "build", "docs/_templates", "evertune", "tests"]
templates_path = [str(Path(__file__).resolve().parent / "_templates")]
html_theme = "furo"
html_title = f"evertune {release}"
html_additional_pages = {"index": "redirect.html"}
nitpicky = True

myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]

autodoc_member_order = "bysource"
autosummary_ignore_module_all = False  # the public names of a package are those in its __all__
autodoc_default_options = {"members": True, "show-inheritance": True}
linkcheck_anchors = False


def _found(name: str) -> bool:
    """Whether a dotted name can be imported, or is a field of a class that can be."""
    parts = name.split(".")
    for at in range(len(parts), 0, -1):
        try:
            value: Any = import_module(".".join(parts[:at]))
        except ImportError:
            continue
        for part in parts[at:]:
            if not hasattr(value, part):
                return part in getattr(value, "__annotations__", ())
            value = getattr(value, part)
        return True
    return False


PACKAGES = ["evertune", *(f"evertune.{module.name}" for module in pkgutil.iter_modules(evertune.__path__))]


def _linked(app: Sphinx, env: BuildEnvironment, node: addnodes.pending_xref, text: nodes.Node) -> nodes.Node | None:
    """Resolve a reference to a public name without its package, or one that has no page.

    What is not public is shown as plain text, and so are types in signatures, which may be known to type checkers
    alone. A name that does not exist stays a warning.
    """
    if node.get("refdomain") != "py":
        return None
    target, package, owner = node["reftarget"], node.get("py:module"), node.get("py:class")
    for name in PACKAGES:
        if target.split(".")[0] in getattr(sys.modules.get(name), "__all__", ()):
            full = f"{name}.{target}"
            if link := env.get_domain("py").resolve_xref(env, node["refdoc"], app.builder, "obj", full, node, text):
                return link
    homes = [package, f"{package}.{owner}"]
    if owner and _found(f"{package}.{owner}"):
        home = getattr(getattr(sys.modules[package], owner.split(".")[0]), "__module__", package)
        homes += [home, f"{home}.{owner}"]
    if hasattr(builtins, target) or _found(target) or any(_found(f"{home}.{target}") for home in homes):
        return text
    made_when_needed = "<locals>" in target  # a base class
    return text if made_when_needed or _in_signature(node) else None


def _in_signature(node: nodes.Node) -> bool:
    return isinstance(node, addnodes.desc_signature) or (node.parent is not None and _in_signature(node.parent))


def _without_types(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Keep napoleon from reading the beginning of "Names: ..." as a type: no docstring of evertune's states one."""
    nothing = "\\"  # a line that is shown as nothing, and has no colon
    if what in ("attribute", "data", "property"):
        lines.insert(0, nothing)
    for at in reversed(range(len(lines))):
        if lines[at] in ("Returns:", "Yields:"):
            lines.insert(at + 1, f"    {nothing}")


def _at_home_alone(app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Leave out of a package's page what another package hands on to it and describes itself."""
    home = ".".join((getattr(obj, "__module__", None) or "").split(".")[:2])
    page = app.env.docname.rpartition("/")[2]
    elsewhere = what == "module" and home != page and name in getattr(sys.modules.get(home), "__all__", ())
    return True if elsewhere else None


def setup(app: Sphinx) -> None:
    """Connect the above."""
    app.connect("autodoc-process-docstring", _without_types, priority=400)  # before napoleon
    app.connect("autodoc-skip-member", _at_home_alone)
    app.connect("missing-reference", _linked)
