"""These tests run beside Avalanche, in an environment of their own: ``make test-avalanche``."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("avalanche") else ["*.py"]
