"""The settings of ``evertune serve``, one class for each section."""

from __future__ import annotations

import math
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class BatchSettings:
    """How requests are put together into one forward pass.

    Args:
        max_batch: Most records of a forward pass. Default: 32; on a CPU, more gain nothing.
        max_delay: Most seconds that a batch waits for as many records as the batch before it had. A server with one
            client at a time never waits. Default: 0.005.
        max_queue: Most records that wait for their turn; beyond it, requests are refused with 429. Default: 1,024.

    Raises:
        ValueError: If a number is out of range.
    """

    max_batch: int = 32
    max_delay: float = 0.005
    max_queue: int = 1_024

    def __post_init__(self) -> None:
        _positive(self, "max_batch", "max_queue")
        if not 0 <= self.max_delay <= 1:
            raise ValueError(f"max_delay must be between 0 and 1 second, got {self.max_delay}")


@dataclass(frozen=True, kw_only=True)
class LimitSettings:
    """What a single request may cost.

    Args:
        max_body: Most bytes of a request's body; beyond it, 413. Default: 1 MiB.
        max_records: Most records of a request; beyond it, 422. Default: 256.
        max_characters: Most characters of a text; beyond it, 422. Default: 100,000, as in a schema of records.
        timeout: Seconds until a request that is not answered gets 503. Default: 30.
        read_timeout: Seconds that a client has to send its headers, and again for its body (408). Default: 10.

    Raises:
        ValueError: If a number is not positive.
    """

    max_body: int = 1 << 20
    max_records: int = 256
    max_characters: int = 100_000
    timeout: float = 30.0
    read_timeout: float = 10.0

    def __post_init__(self) -> None:
        _positive(self, "max_body", "max_records", "max_characters", "timeout", "read_timeout")


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Where the server listens, and how it ends.

    Args:
        host: Address to listen on. Default: this machine only; use ``0.0.0.0`` in a container.
        port: Port; 0 for any free one, which is logged. Default: 8000.
        max_connections: Most connections at a time; beyond it, 503. Default: 1,000.
        drain: Seconds between SIGTERM and the end of accepting connections, in which ``/ready`` answers 503 so that a
            load balancer sends no more. Default: 0; use 5 behind Kubernetes.
        grace: Most seconds that requests under way may take to end after that. Default: 30.
        log: JSON lines or plain text. Default: plain text on a terminal, else JSON.

    Raises:
        ValueError: If a number is out of range.
    """

    host: str = "127.0.0.1"
    port: int = 8_000
    max_connections: int = 1_000
    drain: float = 0.0
    grace: float = 30.0
    log: Literal["auto", "json", "words"] = "auto"

    def __post_init__(self) -> None:
        _positive(self, "max_connections", "grace")
        if not 0 <= self.port < 1 << 16:
            raise ValueError(f"port must be from 0 to 65535, got {self.port}")
        if self.drain < 0:
            raise ValueError(f"drain must not be negative, got {self.drain}")

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the server."""
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


def _positive(settings: Any, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be positive, got {value}")
