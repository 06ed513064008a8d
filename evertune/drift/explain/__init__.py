"""Explains how two sets of records differ: by words, topics, fields and examples."""

from evertune.drift.explain.attribution import Attribution, attribute

__all__ = ["Attribution", "attribute"]
