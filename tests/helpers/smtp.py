"""A mail server (SMTP) in a thread: STARTTLS or TLS, a login, and answers that a test sets."""

from __future__ import annotations

import socketserver
import ssl
import threading
from base64 import b64decode
from contextlib import suppress
from email import message_from_bytes, policy
from email.message import EmailMessage
from typing import Any


class MailServer:
    """Takes messages on a port of this machine until :meth:`close`.

    Args:
        certificate: Files of the certificate and of its private key; None for a server without encryption.
        tls: Whether connections are encrypted from their start, rather than after STARTTLS.
        login: User and password that are asked for; None if anyone may send.
    """

    def __init__(
        self, certificate: tuple[str, str] | None = None, tls: bool = False, login: tuple[str, str] | None = None
    ) -> None:
        self.messages: list[EmailMessage] = []
        self.encrypted: list[bool] = []
        """Whether each message came over an encrypted connection."""
        self.answers: list[str] = []
        """Answers to the next messages, in place of taking them: ``451 later``; an empty one hangs up."""
        self.unknown: set[str] = set()
        """Recipients that are refused."""
        self.n_connections = 0
        self.login, self.context = login, None
        if certificate is not None:
            self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self.context.load_cert_chain(*certificate)
        self._tls = tls
        served = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                served.n_connections += 1
                with suppress(OSError, ValueError):  # a client that hangs up, or refuses the certificate
                    _Session(served, self.request).run()

        class Server(socketserver.ThreadingTCPServer):
            daemon_threads = True

        self._server = Server(("127.0.0.1", 0), Handler)
        self.port: int = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Session:
    """One connection."""

    def __init__(self, server: MailServer, connection: Any) -> None:
        self._server, self._encrypted = server, False
        self._connect(connection, server._tls)
        self._known = server.login is None

    def _connect(self, connection: Any, encrypt: bool) -> None:
        if encrypt:
            assert self._server.context is not None
            connection = self._server.context.wrap_socket(connection, server_side=True)
            self._encrypted = True
        self._connection, self._lines = connection, connection.makefile("rb")

    def _say(self, line: str) -> None:
        self._connection.sendall(f"{line}\r\n".encode())

    def run(self) -> None:
        self._say("220 test")
        while line := self._lines.readline().decode().strip():
            verb, _, rest = line.partition(" ")
            if verb.upper() == "QUIT":
                self._say("221 bye")
                return
            getattr(self, f"_{verb.lower()}")(rest)

    def _ehlo(self, name: str) -> None:
        self._say("250-test")
        if self._server.context is not None and not self._encrypted:
            self._say("250-STARTTLS")
        self._say("250 AUTH PLAIN" if self._server.login else "250 HELP")

    def _starttls(self, rest: str) -> None:
        self._say("220 go ahead")
        self._connect(self._connection, True)

    def _auth(self, rest: str) -> None:
        _, user, password = b64decode(rest.split()[1]).decode().split("\0")
        self._known = (user, password) == self._server.login
        self._say("235 welcome" if self._known else "535 wrong user or password")

    def _mail(self, rest: str) -> None:
        self._say("250 ok" if self._known else "530 log in first")

    def _rcpt(self, rest: str) -> None:
        address = rest.split("<")[1].split(">", maxsplit=1)[0]
        self._say(f"550 no {address} here" if address in self._server.unknown else "250 ok")

    def _rset(self, rest: str) -> None:
        self._say("250 ok")

    def _data(self, rest: str) -> None:
        self._say("354 go ahead")
        content = b""
        while (line := self._lines.readline()) != b".\r\n":
            content += line[1:] if line.startswith(b".") else line
        if self._server.answers:
            answer = self._server.answers.pop(0)
            if not answer:
                raise OSError("hang up")
            self._say(answer)
            return
        self._server.messages.append(message_from_bytes(content, policy=policy.default))  # type: ignore[arg-type]
        self._server.encrypted.append(self._encrypted)
        self._say("250 taken")
