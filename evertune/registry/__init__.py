"""Which version is in production: versions, aliases, the gate, and the way back."""

from evertune.registry.gate import Check, Gate, Verdict
from evertune.registry.registry import LeaseHeld, Registry, RegistryError, Version
from evertune.registry.serving import Served, load

__all__ = ["Check", "Gate", "LeaseHeld", "Registry", "RegistryError", "Served", "Verdict", "Version", "load"]
