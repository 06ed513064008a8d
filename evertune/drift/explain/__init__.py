"""What has changed between two sets of records: words, topics, fields, and examples."""

from evertune.drift.explain.attribution import Attribution, attribute

__all__ = ["Attribution", "attribute"]
