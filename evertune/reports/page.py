"""One self-contained HTML page from a template beside this file."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from evertune.reports.summary import duration, percent


def fill(template: str, **values: Any) -> str:
    """A page from one of the templates beside this file: escaped, and whole, as a name without a value is an error."""
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError as error:
        raise ImportError("the HTML report needs jinja2: pip install 'evertune[reports]'") from error

    environment = Environment(
        loader=PackageLoader("evertune", "reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "duration": duration}
    return environment.get_template(template).render(version=version("evertune"), **values)
