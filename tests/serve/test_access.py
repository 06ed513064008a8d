"""Keys, tokens, scopes and rates: who is admitted, and that no secret is kept or shown."""

from __future__ import annotations

import json
import logging
import re
import time
from pathlib import Path
from typing import Any

import pytest
from joserfc import jwk, jwt
from starlette.testclient import TestClient

from evertune.cli.main import main
from evertune.registry.registry import Registry
from evertune.serve import Access, AccessSettings, Service, application
from evertune.serve.access import Client, DeniedError
from evertune.serve.keys import KeyFile, KeyRing
from evertune.serve.settings import ServerSettings
from tests.helpers.served import Echo, echoes


@pytest.fixture
def file(tmp_path: Path) -> KeyFile:
    return KeyFile(tmp_path / "keys.json")


def bearer(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}


# --- the file


def test_a_key_is_kept_as_a_hash_and_only_its_owner_may_read_the_file(file: KeyFile) -> None:
    secret = file.add("web", ["predict", "feedback"], days=90, rate=50)
    (key,) = file.read()
    assert (key.name, key.scopes, key.rate) == ("web", ["predict", "feedback"], 50)
    assert key.expires is not None and (key.expires - key.created).days == 90
    assert secret.split("_")[1] == key.id
    assert secret not in file.path.read_text() and secret.partition(key.id)[2][1:] not in file.path.read_text()
    assert file.path.stat().st_mode & 0o777 == 0o600
    assert KeyRing(file).find(secret) == key


@pytest.mark.parametrize("change", [lambda s: s[:-1] + "!", lambda s: s[:-2] + "xx", lambda s: "", lambda s: s + s])
def test_other_keys_are_not_found(file: KeyFile, change: Any) -> None:
    secret = file.add("web")
    assert KeyRing(file).find(change(secret)) is None
    assert KeyRing(file).find("evt_00000000_" + "a" * 43) is None
    assert KeyRing(file).find("\udc80") is None


def test_rotation_gives_both_keys_time_and_then_only_the_new_one(file: KeyFile) -> None:
    old = file.add("web", ["predict", "metrics"], rate=3)
    new = file.rotate(old.split("_")[1], grace_hours=1)
    ring = KeyRing(file)
    assert ring.find(old) is not None
    key = ring.find(new)
    assert key is not None and (key.name, key.scopes, key.rate) == ("web", ["predict", "metrics"], 3)
    file.rotate(new.split("_")[1], grace_hours=0)
    assert KeyRing(file).find(new) is None


def test_a_running_server_notices_changes_and_survives_a_damaged_file(
    file: KeyFile, caplog: pytest.LogCaptureFixture
) -> None:
    now = [0.0]
    first = file.add("web")
    ring = KeyRing(file, clock=lambda: now[0])
    second = file.add("app")
    assert ring.find(second) is None
    now[0] += 1.1
    assert ring.find(second) is not None
    file.revoke(first.split("_")[1])
    assert ring.find(first) is not None  # for another second
    now[0] += 1.1
    assert ring.find(first) is None
    file.path.write_text("{")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            now[0] += 1.1
            assert ring.find(second) is not None
    assert len([record for record in caplog.records if "stay as they are" in record.message]) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "a b"}, "name must be letters, digits"),
        ({"scopes": []}, "scopes must be among predict, explain, feedback, metrics, view, change, got none"),
        ({"scopes": ["root"]}, "got root"),
        ({"days": 0}, "days must be positive, got 0"),
        ({"rate": -1}, "rate must be positive, got -1"),
    ],
)
def test_a_key_is_checked_where_it_is_made(file: KeyFile, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        file.add(**{"name": "web", **settings})
    assert not file.path.exists()


# --- the command


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["keys", *arguments])
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_the_command_makes_lists_rotates_and_revokes(file: KeyFile, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(file.path)
    assert run("list", path) == 1
    assert "make a key with `evertune keys add" in capsys.readouterr().err
    assert run("add", path, "--name", "web", "--scopes", "predict", "metrics", "--days", "1") == 0
    secret = capsys.readouterr().out.strip()
    id = secret.split("_")[1]
    assert run("list", path, "--json") == 0
    shown = capsys.readouterr().out
    (row,) = json.loads(shown)
    assert (row["id"], row["name"], row["valid"]) == (id, "web", True) and secret not in shown
    assert run("rotate", path, id, "--grace", "1") == 0
    assert run("revoke", path, id) == 0
    assert run("revoke", path, id) == 1
    assert f"has no key {id}" in capsys.readouterr().err
    assert run("list", path) == 0
    assert "never" in capsys.readouterr().out and len(file.read()) == 1


# --- requests


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return echoes(tmp_path, ["yes"])


def http(registry: Registry, **access: Any) -> TestClient:
    service = Service(registry, module_class=Echo)
    return TestClient(application(service, Access(AccessSettings(**access))), "http://localhost")


def test_scopes_and_statuses(registry: Registry, file: KeyFile, caplog: pytest.LogCaptureFixture) -> None:
    predict, metrics = file.add("web"), file.add("prometheus", ["metrics"])
    body = {"json": {"text": "a"}}
    with http(registry, keys=str(file.path)) as client, caplog.at_level(logging.DEBUG):
        nobody = client.post("/predict", **body)
        assert nobody.status_code == 401 and nobody.headers["www-authenticate"].startswith("Bearer")
        assert client.post("/predict", **body, headers=bearer("evt_wrong")).status_code == 401
        assert client.post("/predict", **body, headers=bearer(predict)).status_code == 200
        assert client.post("/predict", **body, headers={"x-api-key": predict}).status_code == 200
        other = client.post("/predict", **body, headers=bearer(metrics))
        assert other.status_code == 403 and "scope predict" in other.json()["error"]
        assert client.get("/metrics", headers=bearer(predict)).status_code == 403
        page = client.get("/metrics", headers=bearer(metrics))
        assert 'evertune_serve_refused_total{reason="wrong credentials"} 1.0' in page.text
        assert client.get("/health").status_code == client.get("/ready").status_code == 200
    for secret in (predict, metrics, "evt_wrong"):
        assert secret not in caplog.text and secret not in page.text


def test_rates_are_per_client_and_need_no_whole_second(file: KeyFile) -> None:
    now = [0.0]
    access = Access(AccessSettings(rate=10), clock=lambda: now[0])
    web = access.admit({}, "10.0.0.1", "predict")
    for _ in range(10):
        access.charge(web, 1)
    with pytest.raises(DeniedError, match="more than 10 records a second") as caught:
        access.charge(web, 1)
    assert (caught.value.status, caught.value.headers) == (429, {"retry-after": "1"})
    access.charge(access.admit({}, "10.0.0.2", "predict"), 1)
    now[0] += 0.11
    access.charge(web, 50)  # larger than a second's worth: it passes whole, and is owed
    now[0] += 4.0
    with pytest.raises(DeniedError):
        access.charge(web, 1)
    now[0] += 1.1
    access.charge(web, 1)
    key = Client("slow", "k", None, 0.5)
    access.charge(key, 1)
    with pytest.raises(DeniedError):
        access.charge(key, 1)
    now[0] += 2.1
    access.charge(key, 1)


def test_a_request_above_the_rate_gets_429(registry: Registry, file: KeyFile) -> None:
    secret = file.add("web", rate=0.01)
    with http(registry, keys=str(file.path)) as client:
        statuses = [client.post("/predict", json={"text": "a"}, headers=bearer(secret)).status_code for _ in range(3)]
    assert statuses == [200, 429, 429]


# --- tokens


def signed(key: Any, **claims: Any) -> str:
    whole = {"iss": "https://id.example", "aud": "evertune", "sub": "ann", "exp": int(time.time()) + 60}
    return jwt.encode({"alg": "ES256", "kid": key.kid}, {**whole, "scope": "predict openid", **claims}, key)


def test_tokens_of_an_identity_provider(registry: Registry, tmp_path: Path, file: KeyFile) -> None:
    key, other = (jwk.ECKey.generate_key("P-256", {"kid": name}) for name in ("a", "b"))
    public = tmp_path / "jwks.json"
    public.write_text(json.dumps(jwk.KeySet([key]).as_dict(private=False)))
    settings = {"jwks": str(public), "issuer": "https://id.example", "audience": "evertune"}
    api_key = file.add("web")
    with http(registry, **settings, keys=str(file.path)) as client:

        def status(token: str, path: str = "/predict") -> int:
            if path == "/predict":
                return client.post(path, json={"text": "a"}, headers=bearer(token)).status_code
            return client.get(path, headers=bearer(token)).status_code

        assert status(signed(key)) == status(api_key) == 200
        assert status(signed(key), "/metrics") == 403
        assert status(signed(key, scope=["metrics"]), "/metrics") == 200
        for bad in ({"iss": "https://evil.example"}, {"aud": "another"}, {"exp": int(time.time()) - 120}):
            assert status(signed(key, **bad)) == 401
        assert status(signed(other)) == 401
        assert status(signed(key)[:-4] + "AAAA") == 401
        unsigned = re.sub(r"^[^.]*", "eyJhbGciOiJub25lIn0", signed(key)).rpartition(".")[0] + "."
        assert status(unsigned) == 401
        shared = jwk.OctKey.import_key(json.dumps(key.as_dict(private=False)))
        assert status(jwt.encode({"alg": "HS256"}, {"sub": "ann"}, shared)) == 401


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"jwks": "keys.json"}, "jwks needs issuer and audience"),
        ({"issuer": "x"}, "give jwks"),
        ({"jwks": "http://id.example", "issuer": "x", "audience": "y"}, "must be a file or an https"),
        ({"open": True, "keys": "keys.json"}, "open answers anyone"),
        ({"rate": 0}, "rate must be positive, got 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AccessSettings(**settings)


def test_the_network_is_not_answered_by_accident() -> None:
    for host in ("127.0.0.1", "::1", "localhost"):
        AccessSettings().check_for(ServerSettings(host=host))
    for host in ("0.0.0.0", "::", "10.0.0.1", "server.example"):
        with pytest.raises(ValueError, match=r"other machines can reach .*set access\.keys"):
            AccessSettings().check_for(ServerSettings(host=host))
    AccessSettings(open=True).check_for(ServerSettings(host="0.0.0.0"))
    AccessSettings(keys="keys.json").check_for(ServerSettings(host="0.0.0.0"))
    with pytest.raises(ValueError, match="belong together"):
        ServerSettings(certificate="a.pem")
