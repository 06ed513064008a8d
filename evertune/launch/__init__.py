"""Launchers, one per file: they start a command of evertune on many processes."""
