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
class OnnxSettings:
    """Whether versions answer as exports to ONNX, which ONNX Runtime computes faster than torch on a processor.

    Each version is exported when the alias moves to it, and compared with itself on the records that the registry holds
    out; until then, the version before answers. An export that answers otherwise (on more than 5 % of the records, or
    half a point worse) never takes over, nor does that of a version that cannot be exported.

    Args:
        precision: ``fp32``, ``int8`` (8-bit weights and matrix products) or ``int4`` (4-bit weights). Default: versions
            answer as they are, in torch.
        folder: Folder of the exports, which servers of one machine may share. Default: ``exports`` in
            ``$EVERTUNE_CACHE``, or in ``evertune`` in the user's cache.

    Raises:
        ValueError: If ``folder`` is given without ``precision``.
    """

    precision: Literal["fp32", "int8", "int4"] | None = None
    folder: str | None = None

    def __post_init__(self) -> None:
        if self.folder is not None and self.precision is None:
            raise ValueError("folder is that of the exports: give precision, too, or leave it out")


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
        certificate: File with the certificate (PEM, with the chain), for TLS. Default: plain HTTP.
        private_key: File with the private key of the certificate.
        client_authority: File with the certificates of an authority. Clients must then show one that it has signed.

    Raises:
        ValueError: If a number is out of range, or only one of ``certificate`` and ``private_key`` is given.
    """

    host: str = "127.0.0.1"
    port: int = 8_000
    max_connections: int = 1_000
    drain: float = 0.0
    grace: float = 30.0
    log: Literal["auto", "json", "words"] = "auto"
    certificate: str | None = None
    private_key: str | None = None
    client_authority: str | None = None

    def __post_init__(self) -> None:
        _positive(self, "max_connections", "grace")
        if (self.certificate is None) != (self.private_key is None):
            raise ValueError("certificate and private_key belong together: give both, or neither")
        if self.client_authority is not None and self.certificate is None:
            raise ValueError("client_authority needs a certificate and its private_key")
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


@dataclass(frozen=True, kw_only=True)
class LogSettings:
    """The log of requests and their answers, from which a model can learn.

    Args:
        path: Folder of the log. Default: nothing is logged, and ``/feedback`` takes no labels.
        share: Share of the requests that is logged, from 0 to 1, chosen by their ids. Default: all.
        keep_days: Days after which files are deleted. Choose more than an update may take to come: what was not read
            yet is lost. Default: they are kept.
        max_bytes: Size at which a new file begins. Default: 64 MiB.

    Raises:
        ValueError: If a number is out of range.
    """

    path: str | None = None
    share: float = 1.0
    keep_days: float | None = None
    max_bytes: int = 1 << 26

    def __post_init__(self) -> None:
        _positive(self, "max_bytes", *(["keep_days"] if self.keep_days is not None else []))
        if not 0 < self.share <= 1:
            raise ValueError(f"share must be between 0 and 1, got {self.share}")


@dataclass(frozen=True, kw_only=True)
class DriftSettings:
    """Whether the answers of production are watched for a change of what is asked. It needs no labels.

    Args:
        arl: Mean number of answers from one false alarm to the next, for each of confidence and classes; 100,000 suits
            most. Each version costs some seconds of a processor to find the thresholds. Default: nothing is watched.
        reference_size: First answers of a version, with which later ones are compared. Default: 2,000.

    Raises:
        ValueError: If a number is not positive.
    """

    arl: float | None = None
    reference_size: int = 2_000

    def __post_init__(self) -> None:
        _positive(self, "reference_size", *(["arl"] if self.arl is not None else []))


@dataclass(frozen=True, kw_only=True)
class TrafficSettings:
    """Versions that are served beside the one in production.

    Args:
        canary: Alias or number of a version that answers a share of the requests. Default: none.
        canary_share: That share, from 0 to 1, chosen by the ids of the requests: the same id always gets the same
            version. Default: 0.05.
        shadow: Alias or number of a version that answers nobody: its answers are compared with those that were given.
            Default: none. ``refused`` is the newest version that the gate did not let pass.
        shadow_share: Share of the requests that the shadow answers too. Default: all.

    Raises:
        ValueError: If a share is not between 0 and 1.
    """

    canary: str | None = None
    canary_share: float = 0.05
    shadow: str | None = None
    shadow_share: float = 1.0

    def __post_init__(self) -> None:
        for name in ("canary_share", "shadow_share"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class AccessSettings:
    """Who may send requests.

    Args:
        keys: File with the hashes of API keys, as ``evertune keys add`` writes it. Default: none are asked for.
        open: Answer anyone, even on an address that other machines can reach. Default: False.
        rate: Records a second that a client may send on average, unless its key says otherwise. Without keys and
            tokens, a client is an address. Default: any number.
        jwks: Public keys of an identity provider (a JSON web key set), as a file or an ``https://`` URL. Its tokens are
            then accepted, beside API keys.
        issuer: Issuer that a token must name; needed with ``jwks``.
        audience: Audience that a token must name; needed with ``jwks``.
        scope_claim: Claim of a token that lists its scopes: ``predict``, ``feedback``, ``metrics``; ``view``,
            ``change`` for ``evertune ui``. Default: ``scope``.

    Raises:
        ValueError: If settings do not fit together.
    """

    keys: str | None = None
    open: bool = False
    rate: float | None = None
    jwks: str | None = None
    issuer: str | None = None
    audience: str | None = None
    scope_claim: str = "scope"

    def __post_init__(self) -> None:
        if self.rate is not None:
            _positive(self, "rate")
        if self.jwks is not None and (self.issuer is None or self.audience is None):
            raise ValueError("jwks needs issuer and audience: a token for somebody else must not be accepted")
        if self.jwks is None and (self.issuer is not None or self.audience is not None):
            raise ValueError("issuer and audience are those of tokens: give jwks, the public keys, too")
        if self.jwks is not None and self.jwks.startswith("http://"):
            raise ValueError("jwks must be a file or an https:// URL: over http:// anyone could replace the keys")
        if self.open and self.asks:
            raise ValueError("open answers anyone: leave it out, or keys and jwks")

    @property
    def asks(self) -> bool:
        """Whether clients must identify themselves."""
        return self.keys is not None or self.jwks is not None

    def check_for(self, server: ServerSettings) -> None:
        """Refuse to answer the whole network by accident.

        Raises:
            ValueError: If other machines can reach the server, nothing is asked of them, and ``open`` is not set.
        """
        if not server.is_local and not self.asks and not self.open and server.client_authority is None:
            raise ValueError(
                f"other machines can reach {server.host}: set access.keys (evertune keys add FILE --name web), "
                "access.jwks or server.client_authority; or access.open=true to answer anyone"
            )


def _positive(settings: Any, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be positive, got {value}")
