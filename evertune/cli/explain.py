"""``evertune explain``: why a version answers a text as it does, and which update changed the answer."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from evertune.cli.actions import REGISTRY, opened
from evertune.cli.tables import print_part
from evertune.registry.aliases import ALIASES
from evertune.utils.shares import percent
from evertune.utils.terminal import complain, console, foreign, visible

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from evertune.explain import Explanation

_DESCRIPTION = """\
Show why a version gives a text its label: the words without which the probability falls, the nearest examples of its
memory, and what other versions say.

Exit codes: 0, or 2 for a wrong setting, or a version that cannot be explained.
"""
_EPILOG = """\
example:
  evertune explain news 8 --text "The card was charged twice" --history
"""
_WIDTH = 120  # characters after which the text of a neighbour is cut
_N_PARTS = 8
_UNITS = {  # of an effect, its factor and its digits
    "occlusion": ("points", 100.0, 1),
    "integrated_gradients": ("of the logit", 1.0, 2),
    "attention_rollout": ("% of what is read", 100.0, 1),
}
METHODS = tuple(_UNITS)


def explain(arguments: Sequence[str]) -> int:
    """Explain an answer.

    Args:
        arguments: Arguments of the command, without its name.

    Returns:
        The exit code: 0, or 2 after an error.
    """
    from evertune.explain import explain as why
    from evertune.registry.registry import RegistryError

    options = _parser().parse_args(arguments)
    try:
        with console(stderr=True).status("opening the registry") as line:
            found = why(
                opened(options.registry),
                options.version,
                text=options.text,
                label=options.label,
                method=options.method,
                against=options.against,
                history=options.history,
                n_neighbours=options.neighbours,
                progress=line.update,
            )
        show(found, console())
        if options.json is not None:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(found.as_json(), indent=1, ensure_ascii=False), encoding="utf-8")
    except (OSError, ValueError, TypeError, ImportError, RegistryError) as error:
        complain("evertune explain", error)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="evertune explain",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, one_of = parser.add_argument, f"its number, or {', '.join(ALIASES)}"
    add("registry", metavar="REGISTRY", help=REGISTRY)
    add("version", nargs="?", default="production", metavar="VERSION", help=f"{one_of} (default: production)")
    add("--text", required=True, help="the text")
    add("--label", metavar="NAME", help="the class to explain (default: the answer)")
    add("--method", default="occlusion", choices=METHODS, help="how the effect of a word is found (default: occlusion)")
    add("--against", metavar="VERSION", help="another version whose answer is shown")
    add("--history", action="store_true", help="ask all earlier versions: which update changed the answer")
    add("--neighbours", type=int, default=5, metavar="N", help="nearest examples of the memory (default: 5)")
    add("--json", type=Path, metavar="FILE", help="also write all that was found as JSON")
    return parser


def show(found: Explanation, screen: Console) -> None:
    """Print an explanation: the text with its words coloured, then the numbers."""
    said = ", ".join(f"{name} {percent(probability)}" for name, probability in found.probabilities.items())
    screen.print(foreign(f"version {found.version}: {said}"))
    screen.print(foreign(f"what speaks for (green) and against (red) {found.label!r}:"), style="dim")
    screen.print(_coloured(found))

    strongest = sorted(found.parts, key=lambda part: -abs(part.effect))[:_N_PARTS]
    unit, scale, digits = _UNITS[found.method]
    effects = [[part.text, f"{scale * part.effect:+.{digits}f}"] for part in strongest]
    print_part(screen, "Words", ["word", unit], effects)
    print_part(
        screen,
        "Nearest examples of the memory",
        ["similarity", "label", "experience", "text"],
        [[f"{one.similarity:.2f}", one.label, one.experience, one.text[:_WIDTH]] for one in found.neighbours],
    )
    print_part(
        screen,
        f"Examples that pull most, for {found.label!r} or against it",
        ["pull", "label", "experience", "text"],
        [[f"{one.pull:+.3f}", one.label, one.experience, one.text[:_WIDTH]] for one in found.pulling],
    )
    for words in found.missing:
        screen.print(foreign(words), soft_wrap=True, style="yellow")
    if len(found.history) > 1:
        print_part(
            screen,
            "Versions",
            ["version", "experience", "label", "probability", f"of {found.label}"],
            [
                [one.version, one.experience or "", one.label, percent(one.probability), percent(one.of_label)]
                for one in found.history
            ],
        )
        for before, after in found.flips:
            learned = f", which learned {after.experience!r}" if after.experience else ""
            words = f"version {after.version}{learned}, changed the answer from {before.label!r} to {after.label!r}"
            screen.print(foreign(words), soft_wrap=True)


def _coloured(found: Explanation) -> Text:
    """The text with each word in the colour of its effect."""
    from rich.text import Text

    most = max((abs(part.effect) for part in found.parts), default=0.0) or 1.0
    shown, end = Text(), 0
    for part in found.parts:
        shown.append(visible(found.text[end : part.start]))
        strength, colour = abs(part.effect) / most, "green" if part.effect > 0 else "red"
        style = f"bold {colour}" if strength > 0.5 else colour if strength > 0.15 else ""
        shown.append(visible(part.text), style)
        end = part.end
    shown.append(visible(found.text[end:]))
    return shown
