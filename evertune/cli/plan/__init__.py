"""``evertune plan``: what training a model takes on each GPU under each strategy, without any GPU at hand.

``docs/scaling.md`` gives the formulas, their sources and how they compare with measurements;
``benchmarks/scaling.py`` is what measures.
"""

from evertune.cli.plan.command import plan

__all__ = ["plan"]
