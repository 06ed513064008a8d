"""Renders the templates beside this file, each to one self-contained HTML page."""

from __future__ import annotations

import re
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from evertune.reports.summary import duration, percent
from evertune.utils.terminal import visible

if TYPE_CHECKING:
    from jinja2 import Environment
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
    return environment("reports").get_template(template).render(version=version("evertune"), **values)


def environment(*rooms: str) -> Environment:
    """Templates of rooms of evertune, in whose pages no foreign text can become markup or a control character.

    Args:
        rooms: Names of the rooms, in the order in which a template is looked for.

    Raises:
        ImportError: If jinja2 is not installed.
    """
    try:
        from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
    except ImportError as error:
        raise ImportError("the HTML report needs jinja2: pip install 'evertune[reports]'") from error

    made = Environment(
        loader=ChoiceLoader([PackageLoader("evertune", room) for room in rooms]),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"percent": percent, "duration": duration, "breakable": breakable}
    return made


def _shown(value: Any) -> Any:
    """A value as a page shows it: control characters, and what UTF-8 cannot encode, become their escapes."""
    return visible(value) if type(value) is str else value  # not Markup, which may be a whole page


def breakable(text: str) -> Markup:
    """A name as HTML that a browser breaks at its parts, where it must, and not in the middle of a word.

    Example:
        >>> str(breakable("SequenceClassificationModule")), str(breakable("a-b_c & d"))
        ('Sequence<wbr>Classification<wbr>Module', 'a-<wbr>b_<wbr>c &amp; d')
    """
    from markupsafe import Markup, escape

    return Markup("<wbr>").join(escape(part) for part in _BREAKS.split(visible(text)))
