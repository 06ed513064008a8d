"""Serving on Kubernetes: manifests against the published models, and what could not work there."""

from __future__ import annotations

import copy
import json
import stat
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from evertune.cli.launch import launch
from evertune.launch.kubernetes import manifest as job_manifest
from evertune.launch.kubernetes_serve import manifest, run
from evertune.launch.settings import Container, KubernetesServeSettings, KubernetesSettings, LaunchSettings

GOLDEN = Path(__file__).parent / "golden"
CONFIG = GOLDEN / "kubernetes-server.yaml"
OPEN = ["serve", "--registry=s3://bucket/news", "--access.open=true"]
LAUNCHES: dict[str, tuple[LaunchSettings, list[str]]] = {
    "serve": (LaunchSettings(name="news"), OPEN),
    "serve-everything": (
        LaunchSettings(
            name="news",
            python="/opt/venv/bin/python",
            environment={"AWS_REGION": "eu-west-1", "NOTE": "kept $(as it is)"},
            kubernetes=KubernetesSettings(
                image="registry.example.org/evertune:1.2",
                namespace="nlp",
                cpu="3500m",
                memory="8Gi",
                volumes={"models": "/models", "runs.nlp": "/runs"},
                service_account="server",
                node_selector={"pool": "cpu"},
                serve=KubernetesServeSettings(
                    replicas=3,
                    max_replicas=12,
                    cpu_target=60,
                    port=8443,
                    keys_secret="news-keys",
                    env_secret="bucket",
                ),
            ),
        ),
        [
            *("serve", "--wait", "--config", str(CONFIG), "--registry", "/models/news", "--server.host=10.0.0.1"),
            *("--server.certificate=/runs/tls.crt", "--server.private_key=/runs/tls.key"),
        ],
    ),
}
MODELS = {
    "ConfigMap": "V1ConfigMap",
    "Deployment": "V1Deployment",
    "Service": "V1Service",
    "HorizontalPodAutoscaler": "V2HorizontalPodAutoscaler",
    "PodDisruptionBudget": "V1PodDisruptionBudget",
}


def documents(name: str) -> dict[str, Any]:
    return {document["kind"]: document for document in yaml.safe_load_all(manifest(*LAUNCHES[name]))}


def pod(name: str) -> dict[str, Any]:
    return dict(documents(name)["Deployment"]["spec"]["template"]["spec"])


def check(document: dict[str, Any]) -> None:
    """Refuse what the published model does not know, or has in another type: it does not come back as it was."""
    client = pytest.importorskip("kubernetes.client", reason="the client of Kubernetes is not installed").ApiClient()
    answer = client.deserialize(SimpleNamespace(data=json.dumps(document)), MODELS[document["kind"]])
    assert client.sanitize_for_serialization(answer) == document


@pytest.mark.parametrize("name", LAUNCHES)
def test_the_manifest_is_the_expected_one_byte_for_byte(name: str) -> None:
    assert manifest(*LAUNCHES[name]) == (GOLDEN / f"kubernetes-{name}.yaml").read_text()


@pytest.mark.parametrize("name", LAUNCHES)
def test_the_manifest_fits_the_published_models(name: str) -> None:
    assert documents(name).keys() >= MODELS.keys() - {"ConfigMap"}
    for document in documents(name).values():
        check(document)


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("Deployment", ("spec", "stragety"), {}),
        ("Deployment", ("spec", "selector"), None),
        ("Deployment", ("spec", "template", "spec", "containers", 0, "readinesProbe"), {}),
        ("Deployment", ("spec", "template", "spec", "terminationGracePeriodSeconds"), "65"),
        ("Service", ("spec", "ports", 0, "port"), None),
        ("HorizontalPodAutoscaler", ("spec", "maxReplicas"), None),
        ("PodDisruptionBudget", ("spec", "maxUnavailabel"), 1),
    ],
)
def test_a_broken_manifest_does_not_fit_the_published_models(kind: str, path: tuple[Any, ...], value: object) -> None:
    document = copy.deepcopy(documents("serve")[kind])
    place: Any = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises((AssertionError, ValueError)):
        check(document)


@pytest.mark.parametrize("name", LAUNCHES)
def test_names_labels_and_ports_belong_together(name: str) -> None:
    found = documents(name)
    served = {kind: found[kind] for kind in MODELS.keys() - {"ConfigMap"}}
    assert {document["metadata"]["name"] for document in served.values()} == {"news"}
    assert len({document["metadata"].get("namespace") for document in found.values()}) == 1
    deployment, service = found["Deployment"]["spec"], found["Service"]["spec"]
    labels = deployment["template"]["metadata"]["labels"]
    assert deployment["selector"]["matchLabels"] == service["selector"] == labels
    assert found["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    target = found["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", "news")
    (container,) = pod(name)["containers"]
    probes = [container[f"{kind}Probe"]["httpGet"]["port"] for kind in ("startup", "readiness", "liveness")]
    assert {*probes, service["ports"][0]["targetPort"]} == {container["ports"][0]["name"]}
    assert container["resources"]["requests"]["cpu"], "without it, the autoscaler has nothing to measure"
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod(name)["volumes"]}


@pytest.mark.slow  # imports everything that `evertune serve` needs
def test_the_server_reads_its_arguments_as_they_were_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from evertune.cli.serve import _parser

    (container,) = pod("serve-everything")["containers"]
    data = documents("serve-everything")["ConfigMap"]["data"]
    (tmp_path / "kubernetes-server.yaml").write_text(data["kubernetes-server.yaml"])
    words = [word.replace("/etc/evertune/", f"{tmp_path}/") for word in container["args"]]
    parser = _parser()
    made = parser.instantiate(parser.parse_args(words[1:]))
    assert made.wait
    assert (made.registry, made.precision) == ("$(EVERTUNE_REGISTRY)", "bf16")
    assert {"name": "EVERTUNE_REGISTRY", "value": "/models/news"} in container["env"]
    assert (made.server.host, made.server.port, made.server.drain) == ("0.0.0.0", 8080, 7.5)
    assert container["ports"][0]["containerPort"] == made.server.port
    assert made.access.keys == "/etc/evertune-keys/keys.json"
    assert pod("serve-everything")["terminationGracePeriodSeconds"] > made.server.drain + made.server.grace
    made.access.check_for(made.server)


def test_a_changed_configuration_starts_new_pods(tmp_path: Path) -> None:
    noted = []
    for precision in ("bf16", "32"):
        (tmp_path / "serve.yaml").write_text(f"precision: '{precision}'")
        text = manifest(LaunchSettings(), [*OPEN, "--config", str(tmp_path / "serve.yaml")])
        deployment = list(yaml.safe_load_all(text))[1]
        noted.append(deployment["spec"]["template"]["metadata"]["annotations"])
    assert noted[0] != noted[1]


def on(**settings: Any) -> dict[str, Any]:
    return {"kubernetes": KubernetesSettings(**settings)}


KEYS = on(serve=KubernetesServeSettings(keys_secret="news-keys"))


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"nodes": 2}, [], "nodes belongs to training"),
        ({"processes_per_node": 2}, [], "processes_per_node belongs to training"),
        ({"grace": 5.0}, [], "grace belongs to training"),
        ({"setup": ["true"]}, [], "setup belongs to training"),
        ({"container": Container(image="evertune.sif")}, [], "container belongs to training"),
        (on(kind="pytorchjob"), [], r"kubernetes\.kind belongs to training"),
        (on(gpus_per_node=1), [], r"kubernetes\.gpus_per_node belongs to training"),
        (on(queue="research"), [], r"kubernetes\.queue belongs to training"),
        ({"name": "News_1"}, [], "name 'News_1' is not a valid"),
        ({"name": "n" * 64}, [], "1 characters too long"),
        (on(namespace="a b"), [], "namespace 'a b'"),
        (on(volumes={"data": "data"}), [], "absolute path, got 'data'"),
        (on(cpu="two"), [], r"kubernetes\.cpu must be a number of cores .* got 'two'"),
        (on(serve=KubernetesServeSettings(env_secret="My_Secret")), [], "env_secret 'My_Secret'"),
        ({"environment": {"AWS_SECRET_ACCESS_KEY": "abc"}}, [], "AWS_SECRET_ACCESS_KEY holds a secret"),
        ({}, ["--registry=s3://me:abc@bucket/news"], "registry holds a secret"),
        ({}, ["--registry", "news-registry"], r"registry=news-registry lies on none of kubernetes\.volumes"),
        (on(volumes={"models": "/models"}), ["--registry=/modelsx"], "registry=/modelsx lies on none"),
        ({}, ["--log.path=requests"], r"log\.path=requests lies on none"),
        ({}, ["--log", "{path: requests}"], r"log\.path=requests lies on none"),
        ({}, ["--server.port=80"], "server.port must be at least 1024.* got 80"),
        ({}, ["--server.port=many"], r"serve: .*server\.port"),
        ({}, ["--server.prot=8000"], r"serve: .*server\.prot"),
        ({}, ["--server.drain=-1"], "drain must not be negative, got -1"),
        (
            on(volumes={"tls": "/tls"}),
            ["--server", "{certificate: /tls/a, private_key: /tls/b, client_authority: /tls/c}"],
            "client_authority cannot be used",
        ),
        ({}, ["--check"], "check ends at once"),
        ({}, ["--device", "cuda:0"], "'cuda:0' cannot be used"),
        ({}, ["--access.open=false"], r"kubernetes\.serve\.keys_secret .* access\.open=true"),
        ({}, ["--access", "{open: false, keys: keys.json}"], r"access\.keys=keys\.json .*keys_secret"),
        (KEYS, [], "open answers anyone"),
        ({}, ["--config", "nowhere.yaml"], r"nowhere\.yaml is not a file"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_runs(
    changes: dict[str, Any], options: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(LaunchSettings(**changes), [*OPEN, *options], dry_run=False, wait=False)


def test_without_a_registry_there_is_nothing_to_serve() -> None:
    with pytest.raises(ValueError, match="serve needs --registry"):
        manifest(LaunchSettings(), ["serve", "--access.open=true"])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"replicas": 0}, "replicas must be positive, got 0"),
        ({"replicas": 4, "max_replicas": 3}, "max_replicas must be at least replicas=4, got 3"),
        ({"cpu_target": 120}, "cpu_target must be between 1 and 100 percent, got 120"),
        ({"port": 0}, "port must be between 1 and 65535, got 0"),
    ],
)
def test_numbers_out_of_range_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KubernetesServeSettings(**wrong)


def test_settings_of_servers_are_refused_for_training() -> None:
    with pytest.raises(ValueError, match=r"kubernetes\.serve is for `serve`, and cannot be used with `fit`"):
        job_manifest(LaunchSettings(**KEYS), ["fit"])


# --- the command


def test_options_are_read_over_the_section_of_the_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--kubernetes.serve.max_replicas=5", "--kubernetes.serve.keys_secret=k", "--dry_run"]
    options += ["--kubernetes.volumes", '{"runs": "/runs"}']
    assert launch(["kubernetes", *options, "--", "serve", "-c", str(CONFIG), "--registry=gs://bucket/news"]) == 0
    autoscaler = list(yaml.safe_load_all(capsys.readouterr().out))[3]
    assert autoscaler["metadata"]["name"] == "news"
    assert (autoscaler["spec"]["minReplicas"], autoscaler["spec"]["maxReplicas"]) == (3, 5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["kubernetes", "--nodes=4", "--", *OPEN], "evertune launch kubernetes: nodes belongs to training"),
        (["local", "--", *OPEN], "must be one of fit, update, watch, got 'serve'"),
    ],
)
def test_the_command_refuses_in_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch(words) == 2
    assert message in capsys.readouterr().err


def test_fewer_servers_than_asked_for_are_refused_by_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        launch(["kubernetes", "--kubernetes.serve.replicas=9", "--dry_run", "--", *OPEN])
    assert "max_replicas must be at least replicas=9, got 8" in capsys.readouterr().err


@pytest.fixture
def kubectl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A kubectl that records its calls, and fails where it is asked for the given word."""

    def make(fails_at: str = "") -> Path:
        calls = tmp_path / "calls.jsonl"
        script = f"""#!{sys.executable}
import json, sys
words = sys.argv[1:]
text = sys.stdin.read() if "apply" in words else ""
open({str(calls)!r}, "a").write(json.dumps([words, text]) + "\\n")
sys.exit({fails_at!r} in words)
"""
        program = tmp_path / "kubectl"
        program.write_text(script)
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", str(tmp_path))
        return calls

    return make


@pytest.mark.parametrize(("fails_at", "code", "n_calls"), [("", 0, 2), ("apply", 1, 1), ("rollout", 1, 2)])
def test_the_manifest_is_applied_and_waited_for(kubectl: Any, fails_at: str, code: int, n_calls: int) -> None:
    calls = kubectl(fails_at)
    settings, command = LAUNCHES["serve-everything"]
    assert run(settings, command, dry_run=False, wait=True) == code
    expected = [
        [["--namespace", "nlp", "apply", "-f", "-"], manifest(settings, command)],
        [["--namespace", "nlp", "rollout", "status", "deployment/news"], ""],
    ]
    assert [json.loads(line) for line in calls.read_text().splitlines()] == expected[:n_calls]


def test_without_waiting_the_command_that_waits_is_shown(kubectl: Any, capfd: pytest.CaptureFixture[str]) -> None:
    calls = kubectl()
    assert run(*LAUNCHES["serve"], dry_run=False, wait=False) == 0
    assert len(calls.read_text().splitlines()) == 1
    assert "kubectl rollout status deployment/news" in capfd.readouterr().out


def test_without_kubectl_there_is_a_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run(*LAUNCHES["serve"], dry_run=False, wait=False) == 1
    assert "kubectl is not on the PATH" in capsys.readouterr().err
