"""Renders the templates beside this file, each to one self-contained HTML page."""

from __future__ import annotations

import re
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from evertune.reports.summary import duration, percent

if TYPE_CHECKING:
    from markupsafe import Markup

_BREAKS = re.compile(r"(?<=[-_/:])(?=\w)|(?<=\.)(?=[a-z])|(?<=[a-z])(?=[A-Z])")


def fill(template: str, **values: Any) -> str:
    """Render a template to a page.

    Args:
        template: File name of the template.
        values: Values of the template's variables. Text in them is escaped.

    Raises:
        ImportError: If jinja2 is not installed.
        jinja2.UndefinedError: If a variable has no value, so that no page is ever incomplete.
    """
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
    environment.filters |= {"percent": percent, "duration": duration, "breakable": breakable}
    return environment.get_template(template).render(version=version("evertune"), **values)


def breakable(text: str) -> Markup:
    """A name as HTML that a browser breaks at its parts, where it must, and not in the middle of a word.

    Example:
        >>> str(breakable("SequenceClassificationModule")), str(breakable("a-b_c & d"))
        ('Sequence<wbr>Classification<wbr>Module', 'a-<wbr>b_<wbr>c &amp; d')
    """
    from markupsafe import Markup, escape

    return Markup("<wbr>").join(escape(part) for part in _BREAKS.split(str(text)))
