"""Alerts by e-mail."""

from __future__ import annotations

import smtplib
import ssl
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from email.errors import HeaderParseError
from email.headerregistry import Address
from email.message import EmailMessage
from email.utils import format_datetime, make_msgid
from typing import Any, Literal, get_args

from evertune.live.alerts.base import QueuedAlert
from evertune.utils.secrets import fill_in

Security = Literal["starttls", "tls", "none"]
_PORTS: dict[Security, int] = {"starttls": 587, "tls": 465, "none": 25}
_LONGEST_SUBJECT = 150


class Email(QueuedAlert):
    """Sends each event as an e-mail, through a mail server (SMTP).

    A separate thread sends, and what cannot be delivered is retried, then logged and dropped, as for
    :class:`Webhook`. A refusal that the server calls permanent is not retried.

    Example::

        Email("smtp.example.com", "evertune@example.com", ["ml@example.com"], user="evertune",
              password="${SMTP_PASSWORD}", events=["drift", "refusal", "error"])

    Args:
        host: Name of the mail server.
        sender: Address that the messages come from.
        recipients: Addresses that they go to.
        port: Port of the server. Default: the usual one, 587 with ``starttls``, 465 with ``tls``, 25 with ``none``.
        security: ``starttls`` (default) encrypts a connection before anything is sent, ``tls`` from its start; the
            server's certificate must be valid for ``host``. ``none`` is for a relay on the same machine.
        user: Name to log in with. Default: no login.
        password: Its password; ``${SMTP_PASSWORD}`` is taken from the environment, so that the secret is not stored in
            any configuration. Names from the environment are filled in in all texts here.
        certificate_authority: File with the certificates of authorities (PEM) that the server's may be signed by.
            Default: those of the system.
        events: The :data:`EVENTS` to report. Default: all but ``"promotion"``.
        timeout: Seconds to wait for the server in each attempt.
        retries: Maximum number of retries after the first attempt.
        pause: Seconds before the first retry.

    Raises:
        ValueError: If an address is not one, ``security`` is unknown, a password would be sent unencrypted, only one of
            ``user`` and ``password`` is given, ``certificate_authority`` cannot be read, a name is not set in the
            environment, an event is unknown, or a number is out of range.
    """

    def __init__(
        self,
        host: str,
        sender: str,
        recipients: Sequence[str],
        port: int | None = None,
        security: Security = "starttls",
        user: str | None = None,
        password: str | None = None,
        certificate_authority: str | None = None,
        events: Sequence[str] | None = None,
        timeout: float = 10.0,
        retries: int = 4,
        pause: float = 1.0,
    ) -> None:
        if security not in get_args(Security):
            raise ValueError(f"security must be one of {', '.join(get_args(Security))}, got {security!r}")
        if (user is None) != (password is None):
            raise ValueError("user and password belong together: give both, or neither")
        if user is not None and security == "none":
            raise ValueError("security='none' would send the password unencrypted: use starttls or tls")
        if isinstance(recipients, str) or not recipients:
            raise ValueError(f"recipients must be a list of addresses, got {recipients!r}")
        self.port = _PORTS[security] if port is None else port
        if not host or not 0 < self.port < 1 << 16:
            raise ValueError(f"host must be a name and port from 1 to 65535, got {host!r} and {port}")
        self.security, self._user, self._password = security, fill_in(user), fill_in(password)
        self.sender, self.recipients = _address(fill_in(sender)), [_address(fill_in(one)) for one in recipients]
        try:
            self._context = ssl.create_default_context(cafile=certificate_authority)
        except OSError as error:
            raise ValueError(f"certificate_authority: {certificate_authority} cannot be read: {error}") from None
        super().__init__(fill_in(host), events, timeout, retries, pause)

    def deliver(self, message: dict[str, Any]) -> tuple[str | None, bool]:
        """Send an event to all recipients; some who are refused are logged, and the others get it."""
        try:
            with self._connected() as server:
                refused = server.send_message(self._written(message))
        except ssl.SSLCertVerificationError as error:
            return f"{type(error).__name__}: {error.verify_message}", False
        except smtplib.SMTPRecipientsRefused as error:
            codes = [code for code, _ in error.recipients.values()]
            return f"SMTP {codes[0]}, all recipients are refused", any(code < 500 for code in codes)
        except smtplib.SMTPResponseException as error:
            # Only the code: the text of an answer may repeat the user.
            return f"SMTP {error.smtp_code} ({type(error).__name__})", error.smtp_code < 500
        except smtplib.SMTPNotSupportedError as error:  # no STARTTLS, or no login
            return f"{type(error).__name__}: {error}", False
        except (OSError, smtplib.SMTPException) as error:
            return type(error).__name__, True
        if refused:
            self._dropped(message["event"], f"{len(refused)} of {len(self.recipients)} recipients are refused")
        return None, True

    def _connected(self) -> smtplib.SMTP:
        """A connection that is encrypted and logged in, as far as it is to be."""
        if self.security == "tls":
            server: smtplib.SMTP = smtplib.SMTP_SSL(self.host, self.port, timeout=self.timeout, context=self._context)
        else:
            server = smtplib.SMTP(self.host, self.port, timeout=self.timeout)
        try:
            if self.security == "starttls":
                server.starttls(context=self._context)
            if self._user is not None and self._password is not None:
                server.login(self._user, self._password)
        except BaseException:
            server.close()
            raise
        return server

    def _written(self, message: dict[str, Any]) -> EmailMessage:
        """An event as a message: its first line is the subject, and its facts follow the text."""
        event, text, time = message["event"], message["text"], message["time"]
        mail = EmailMessage()
        first = " ".join(text.split("\n", 1)[0].split())
        mail["Subject"] = f"evertune: {event}: {first}"[:_LONGEST_SUBJECT]
        mail["From"], mail["To"] = self.sender, ", ".join(self.recipients)
        mail["Date"] = format_datetime(datetime.fromisoformat(time))
        # The same for each attempt, so that a message that has arrived twice is shown once.
        mail["Message-ID"] = message.setdefault("id", make_msgid(domain=self.sender.rpartition("@")[2]))
        mail["Auto-Submitted"] = "auto-generated"  # nobody is on holiday, and nobody answers
        facts = {name: value for name, value in message.items() if name not in ("text", "id")}
        mail.set_content(text + "\n\n" + "".join(f"{name}: {value}\n" for name, value in facts.items()))
        return mail


def _address(written: str) -> str:
    """An address that can be written in the header of a message."""
    with suppress(HeaderParseError, ValueError):
        address = Address(addr_spec=written)
        if address.username and address.domain and written.isprintable():
            return written
    raise ValueError(f"an address must be like name@example.com, got {written!r}")
