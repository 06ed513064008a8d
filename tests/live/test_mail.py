"""Alerts by e-mail, through a real mail server on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import UTC
from pathlib import Path
from typing import Any

import pytest

from evertune.live.alerts import Email
from tests.helpers.certificates import self_signed
from tests.helpers.smtp import MailServer

PATIENCE = 60.0
OPEN: dict[str, Any] = {"host": "127.0.0.1", "sender": "evertune@example.com", "recipients": ["ml@example.com"]}


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return self_signed(tmp_path_factory.mktemp("certificate"))


@pytest.fixture
def server() -> Iterator[MailServer]:
    made = MailServer()
    yield made
    made.close()


@pytest.mark.parametrize("security", ["starttls", "tls"])
def test_an_event_arrives_encrypted_after_a_login(
    security: Any, certificate: tuple[str, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SMTP_PASSWORD", "s3cret")
    server = MailServer(certificate, tls=security == "tls", login=("me", "s3cret"))
    settings = OPEN | {"port": server.port, "security": security, "certificate_authority": certificate[0]}
    try:
        mail = Email(user="me", password="${SMTP_PASSWORD}", **settings)
        mail.send("refusal", "version 8 was refused é\nbecause it forgets", registry="news", version=8)
        mail.send("promotion", "nobody asked")
        mail.close(PATIENCE)
        [message] = server.messages
        assert server.encrypted == [True]
        assert message["Subject"] == "evertune: refusal: version 8 was refused é"
        assert (message["From"], message["To"]) == ("evertune@example.com", "ml@example.com")
        assert message["Date"].datetime.tzinfo == UTC and message["Auto-Submitted"] == "auto-generated"
        body = message.get_content().replace("\r\n", "\n")
        assert body.startswith("version 8 was refused é\nbecause it forgets\n\nevent: refusal\n")
        assert "\nregistry: news\nversion: 8\n" in body
        wrong = Email(user="me", password="wrong-s3cret", **settings)
        wrong.send("drift", "one")
        wrong.close(PATIENCE)
        assert "alert to 127.0.0.1 is dropped: SMTP 535 (SMTPAuthenticationError)" in caplog.text
        assert "s3cret" not in caplog.text and len(server.messages) == 1
    finally:
        server.close()


def test_a_certificate_that_nobody_vouches_for_is_refused(
    certificate: tuple[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    server = MailServer(certificate)
    try:
        mail = Email(**OPEN, port=server.port, user="me", password="s3cret")
        mail.send("drift", "one")
        mail.close(PATIENCE)
        assert "is dropped: SSLCertVerificationError: self-signed certificate" in caplog.text
        assert (server.messages, server.n_connections) == ([], 1)
    finally:
        server.close()


def test_nothing_is_sent_unencrypted_unasked(server: MailServer, caplog: pytest.LogCaptureFixture) -> None:
    mail = Email(**OPEN, port=server.port)
    mail.send("drift", "one")
    mail.close(PATIENCE)
    assert server.messages == [] and "is dropped: SMTPNotSupportedError: STARTTLS" in caplog.text


def test_a_busy_server_gets_it_again_and_a_refusal_is_final(
    server: MailServer, caplog: pytest.LogCaptureFixture
) -> None:
    server.answers = ["451 later", "", "554 never"]
    mail = Email(**OPEN, port=server.port, security="none", pause=0.01)
    mail.send("drift", "one")
    until(lambda: "is dropped: SMTP 554 (SMTPDataError)" in caplog.text)
    server.answers = ["452 full"]
    mail.send("error", "two")
    until(lambda: len(server.messages) == 1)
    mail.send("error", "three")
    mail.close(PATIENCE)
    assert [message["Subject"] for message in server.messages] == ["evertune: error: two", "evertune: error: three"]
    assert caplog.text.count("is dropped") == 1


def test_some_recipients_are_unknown(caplog: pytest.LogCaptureFixture, server: MailServer) -> None:
    server.unknown = {"gone@example.com"}
    settings = {**OPEN, "recipients": ["gone@example.com", "ml@example.com"], "port": server.port, "security": "none"}
    mail = Email(**settings)
    mail.send("drift", "one")
    mail.close(PATIENCE)
    assert len(server.messages) == 1 and "1 of 2 recipients are refused" in caplog.text
    server.unknown.add("ml@example.com")
    mail = Email(**settings)
    mail.send("drift", "two")
    mail.close(PATIENCE)
    assert len(server.messages) == 1 and "SMTP 550, all recipients are refused" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"security": "ssl"}, "security must be one of starttls, tls, none, got 'ssl'"),
        ({"user": "me"}, "user and password belong together"),
        ({"user": "me", "password": "s3cret", "security": "none"}, "would send the password unencrypted"),
        ({"user": "me", "password": "${NOT_THERE}"}, "the environment variable NOT_THERE is not set"),
        ({"recipients": "ml@example.com"}, "recipients must be a list of addresses"),
        ({"recipients": ["ml"]}, "an address must be like name@example.com, got 'ml'"),
        ({"sender": "a@b.c\r\nBcc: d@e.f"}, "an address must be like name@example.com"),
        ({"port": 0}, "port from 1 to 65535"),
        ({"events": ["news"]}, "events must be among drift"),
        ({"timeout": 0}, "timeout must be positive"),
    ],
)
def test_it_is_checked_where_it_is_made(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        Email(**OPEN | settings)
    assert "s3cret" not in str(error.value)


def test_a_file_of_certificates_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"certificate_authority: .*absent\.pem"):
        Email(**OPEN, certificate_authority=str(tmp_path / "absent.pem"))
