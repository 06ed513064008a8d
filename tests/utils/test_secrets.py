"""Secrets: references are filled in, and no secret is shown or recorded."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

import pytest

from evertune.cli.update import updater_from
from evertune.live.telemetry import JsonLines, Words
from evertune.sources.folder import FolderSource
from evertune.utils.secrets import fill_in, without_secrets
from evertune.utils.terminal import complain
from tests.helpers.live_worker import prepare

SECRET = "hunter2"
SHOWN = {
    "password": f"redis://feed:{SECRET}@broker:6379/0 does not answer",
    "password without user": f"redis://:{SECRET}@broker:6379/0",
    "password with @": f"redis://feed:p@{SECRET}@broker:6379",
    "password with /": f"postgresql://feed:1/{SECRET}/2@broker/db",
    "password with a space": f"postgresql://feed:my {SECRET}@broker/db",
    "password with ? and #": f"postgresql://feed:a?b#{SECRET}@broker/db",
    "password after an address": f"http://host:80/x and then redis://feed:{SECRET}@broker:6379 fail",
    "token as a user": f"https://{SECRET}@broker/repository.git",
    "password as a parameter": f"redis://broker/0?a=1&password={SECRET}&b=2",
    "api_key": f"https://broker/x?api_key={SECRET}",
    "apikey": f"https://broker/x?apikey={SECRET}",
    "access_token": f"https://broker/x?access_token={SECRET}",
    "a token in the fragment": f"https://broker/x#access_token={SECRET}&x=1",
    "signature of S3": f"https://broker/x?X-Amz-Signature={SECRET}&X-Amz-Date=1",
    "credential of S3": f"https://broker/x?X-Amz-Credential={SECRET}&X-Amz-Date=1",
    "token of S3": f"https://broker/x?X-Amz-Security-Token={SECRET}",
    "signature of Google": f"https://broker/x?X-Goog-Signature={SECRET}",
    "signature of Azure": f"https://broker/x?sv=2&sig={SECRET}&se=3",
    "connection string of Azure": f"AccountName=broker;AccountKey={SECRET};Suffix=x",
    "connection string of PostgreSQL": f"host=broker password={SECRET} dbname=x",
    "quoted": f"host=broker password='my {SECRET}' dbname=x",
    "setting of Kafka": f"sasl.password={SECRET} of broker",
    "as Python shows it": f"{{'host': 'broker', 'secret': '{SECRET}'}}",
    "as JSON": f'{{"host": "broker", "api_key": "{SECRET}"}}',
    "header": f"broker: Authorization: Bearer {SECRET}-and-more",
}
HARMLESS = (
    "redis://broker:6379 does not answer; write to ops@example.com",
    "http://[::1]:8080/metrics and a@b",
    "s3://bucket/key of 3 files",
    "pad_token=<pad> and sort_key=3",
    "unknown token: 'abc'",
    "https://medium.com/@user/post",
    "postgresql://feed:${PASSWORD}@broker/db?password=${OTHER}",
)


@pytest.mark.parametrize("text", SHOWN.values(), ids=SHOWN)
def test_a_secret_is_masked_wherever_a_text_is_shown(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    complain("evertune update", ValueError(text))
    record = logging.LogRecord("evertune", logging.INFO, "file.py", 1, "%s", (text,), None)
    record.__dict__["fact"] = text
    lines = [without_secrets(text), without_secrets([{"url": text}])[0]["url"], capsys.readouterr().err]
    for line in [*lines, Words().format(record), JsonLines().format(record)]:
        assert SECRET not in line and "***" in line and "broker" in line
    assert without_secrets(without_secrets(text)) == without_secrets(text)
    json.loads(JsonLines().format(record))


@pytest.mark.parametrize("text", HARMLESS)
def test_other_text_is_left_alone(text: str) -> None:
    assert without_secrets(text) == text


def test_settings_keep_references_and_what_is_not_secret() -> None:
    secret = {"secret": SECRET, "key": SECRET, "token": SECRET, "client_kwargs": {"aws_secret_access_key": SECRET}}
    open_ = {"endpoint_url": "http://broker:9000", "anon": False, "n": 3}
    settings = {
        "storage_options": {**secret, **open_, "password": "${PASSWORD}"},
        "headers": {"Authorization": SECRET, "X-Api-Key": SECRET, "Accept": "json"},
        "settings": {"sasl.password": SECRET, "sasl.username": "me"},
        "model": {"pad_token": "<pad>", "key": "text", "weights": None},
        "urls": [f"redis://feed:{SECRET}@broker"],
    }
    found = without_secrets(settings)
    assert SECRET not in json.dumps(found)
    assert found["storage_options"]["password"] == "${PASSWORD}"
    assert {name: found["storage_options"][name] for name in open_} == open_
    assert found["headers"]["Accept"] == "json" and found["settings"]["sasl.username"] == "me"
    assert found["model"] == settings["model"]


def test_time_grows_with_the_text_and_no_more() -> None:
    def seconds(text: str) -> float:
        start = time.process_time()
        without_secrets(text)
        return time.process_time() - start

    for evil in ("a", "a.", "://", "x://", "x://a:", "x://a:b ", "@", "?key", "password=", "'secret':", "bearer a"):
        short, long = (evil * (n // len(evil)) for n in (2_000, 16_000))
        limit = 24 * max(seconds(short), 0.001)
        assert any(seconds(long) < limit for _ in range(3)), evil


def test_references_are_filled_in_at_any_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A", "1")
    assert fill_in({"a": "${A}", "b": [{"c": "x${A}y"}], "d": 3, "e": None}) == {
        "a": "1",
        "b": [{"c": "x1y"}],
        "d": 3,
        "e": None,
    }
    with pytest.raises(ValueError, match="the environment variable NOT_SET is not set"):
        fill_in({"a": ["${NOT_SET}"]})


def test_the_options_of_a_bucket_are_read_from_the_environment_and_recorded_as_references(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(tmp_path)
    source = "{path: 'memory://inbox', storage_options: {secret: '${BUCKET}', key: literal, anon: false}}"
    (tmp_path / "live.yaml").write_text(
        f"registry: {tmp_path / 'registry'}\n"
        f"source: {{class_path: evertune.sources.FolderSource, init_args: {source}}}\n"
        "model: {class_path: evertune.lightning_modules.SequenceClassificationModule,"
        f" init_args: {{model_name_or_path: {tmp_path / 'bert'}}}}}\n"
    )
    monkeypatch.delenv("BUCKET", raising=False)
    with pytest.raises(ValueError, match="the environment variable BUCKET is not set"):
        updater_from(["--config", str(tmp_path / "live.yaml")])
    monkeypatch.setenv("BUCKET", SECRET)
    updater, _ = updater_from(["--config", str(tmp_path / "live.yaml")])
    assert isinstance(updater.source, FolderSource)
    assert updater.source._fs.storage_options == {"secret": SECRET, "key": "literal", "anon": False}
    options = updater.config["source"]["init_args"]["storage_options"]
    assert options == {"secret": "${BUCKET}", "key": "***", "anon": False}
