"""Launch on Kubernetes: manifests against the published schemas, their shell run by bash, kubectl's part by a stub."""

from __future__ import annotations

import copy
import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from evertune.launch.kubernetes import manifest, run
from evertune.launch.settings import Container, KubernetesSettings, LaunchSettings

GOLDEN = Path(__file__).parent / "golden"
CONFIG = GOLDEN / "kubernetes-stream.yaml"
COMMAND = ["fit", "--config", str(CONFIG), "--trainer.max_epochs=2"]
EVERYTHING: dict[str, Any] = {
    "image": "registry.example.org/evertune:1.2",
    "namespace": "nlp",
    "gpus_per_node": 4,
    "cpu": "32",
    "memory": "480Gi",
    "shared_memory": "64Gi",
    "volumes": {"training-data": "/data", "runs.nlp": "/runs"},
    "service_account": "trainer",
    "node_selector": {"gpu": "h200"},
    "queue": "research",
}
LAUNCHES: dict[str, tuple[LaunchSettings, list[str]]] = {
    "jobset": (LaunchSettings(name="news", nodes=2, processes_per_node=8), ["update", "--registry=s3://bucket/news"]),
    "jobset-everything": (
        LaunchSettings(
            name="news",
            nodes=4,
            min_nodes=2,
            port=29400,
            python="/opt/venv/bin/python",
            environment={"NCCL_DEBUG": "INFO", "NOTE": "kept $(as it is)"},
            setup=["ulimit -n 65536", 'export SCRATCH="/scratch/$HOSTNAME"'],
            log_dir="/runs/logs",
            shared_folders=["/runs"],
            interface="eth0",
            max_restarts=5,
            grace=600.5,
            kubernetes=KubernetesSettings(**EVERYTHING),
        ),
        [*COMMAND, f"--config={GOLDEN / 'kubernetes-more.yaml'}", "-c", str(CONFIG), "--out=/runs/it's here"],
    ),
    "pytorchjob": (
        LaunchSettings(
            name="news", nodes=3, kubernetes=KubernetesSettings(kind="pytorchjob", gpus_per_node=2, volumes={"a": "/a"})
        ),
        COMMAND,
    ),
}


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(manifest(*LAUNCHES[name])))


def pod(document: dict[str, Any]) -> dict[str, Any]:
    """The spec of a job's pods."""
    if document["kind"] == "JobSet":
        return dict(document["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"])
    return dict(document["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"])


def check(document: dict[str, Any]) -> None:
    """Refuse what the published schema does not know, or has in another type: it does not come back as it was."""
    kind = document["kind"]
    if kind == "PyTorchJob":
        client = pytest.importorskip("kubeflow.training.api_client", reason="kubeflow-training is not installed")
        answer = client.ApiClient().deserialize(SimpleNamespace(data=json.dumps(document)), "KubeflowOrgV1PyTorchJob")
        back = client.ApiClient().sanitize_for_serialization(answer)
    else:
        models = pytest.importorskip("kubeflow_trainer_api.models", reason="kubeflow-trainer-api is not installed")
        model = {"JobSet": models.JobsetV1alpha2JobSet, "ConfigMap": models.IoK8sApiCoreV1ConfigMap}[kind]
        back = model.from_dict(document).to_dict()
    assert back == document


@pytest.mark.parametrize("name", LAUNCHES)
def test_the_manifest_is_the_expected_one_byte_for_byte(name: str) -> None:
    assert manifest(*LAUNCHES[name]) == (GOLDEN / f"kubernetes-{name}.yaml").read_text()


@pytest.mark.parametrize("name", LAUNCHES)
def test_the_manifest_fits_the_published_schema(name: str) -> None:
    for document in documents(name):
        check(document)


def test_actions_of_the_failure_policy_are_published() -> None:
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="kubeflow-trainer-api is not installed")
    known = models.JobsetV1alpha2FailurePolicyRule.model_fields["action"].description
    for rule in documents("jobset")[0]["spec"]["failurePolicy"]["rules"]:
        assert re.search(rf"\b{rule['action']}\b", known)


@pytest.mark.parametrize(
    ("name", "path", "value"),
    [
        ("jobset", ("spec", "netwrok"), {}),
        ("jobset", ("spec", "failurePolicy", "maxRestarts"), "3"),
        ("jobset", ("spec", "replicatedJobs", 0, "template", "spec", "completionMode"), "indexed"),
        ("jobset", ("spec", "replicatedJobs", 0, "template", "spec", "template", "spec", "container"), []),
        ("pytorchjob", ("spec", "nprocPerNode"), 2),
        ("pytorchjob", ("spec", "runPolicy", "cleanPods"), "Running"),
        ("pytorchjob", ("spec", "pytorchReplicaSpecs", "Worker", "replicas"), "2"),
        ("pytorchjob", ("spec", "pytorchReplicaSpecs", "Worker", "template", "spec", "volumes", 0, "emptydir"), {}),
    ],
)
def test_a_broken_manifest_does_not_fit_the_published_schema(name: str, path: tuple[Any, ...], value: object) -> None:
    document = copy.deepcopy(documents(name)[-1])
    check(document)
    place: Any = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises((AssertionError, ValueError)):
        check(document)


def shell_line(name: str) -> str:
    """What the container's shell gets, after Kubernetes has filled in its ``$(NAME)``, of which there are none."""
    program, option, script = pod(documents(name)[-1])["containers"][0]["command"]
    assert (program, option) == ("bash", "-c")
    return script.replace("$$", "$")


@pytest.mark.parametrize("name", LAUNCHES)
def test_the_shell_of_the_manifest_is_shell(name: str) -> None:
    subprocess.run(["bash", "-n"], input=shell_line(name), text=True, check=True)


@pytest.fixture
def path_with(tmp_path: Path) -> Any:
    """Puts a program of this test before all others on the PATH."""

    def add(program: str, script: str) -> dict[str, str]:
        file = tmp_path / "bin" / program
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"#!{sys.executable}\n{script}")
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
        return {**os.environ, "PATH": f"{file.parent}:{os.environ['PATH']}"}

    return add


NODE = """
import json, os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
open("seen.json", "w").write(json.dumps(sys.argv[1:]))
while os.environ["CODE"] == "wait":
    time.sleep(0.05)
sys.exit(int(os.environ["CODE"]))
"""


def bash(name: str, variables: dict[str, str], folder: Path) -> int:
    """The exit code of a pod."""
    return subprocess.run(["bash", "-c", shell_line(name)], env=variables, cwd=folder, check=False).returncode


def test_a_pod_of_a_jobset_runs_the_supervisor(tmp_path: Path, path_with: Any) -> None:
    variables = {**path_with("python", NODE), "JOB_COMPLETION_INDEX": "1", "RUN_ID": "uid", "CODE": "75"}
    assert bash("jobset", variables, tmp_path) == 75
    words = json.loads((tmp_path / "seen.json").read_text())
    assert words[:2] == ["-m", "evertune.launch.supervisor.node"]
    assert words[words.index("--") + 1 :] == ["update", "--registry=s3://bucket/news"]
    options = dict(pairwise(words))
    assert options["--node_rank"] == "1"
    assert options["--run_id"] == "uid"
    assert options["--master"] == "news-workers-0-0.news:29500"


@pytest.mark.parametrize(("code", "seen"), [("0", 0), ("75", 138), ("4", 4), ("1", 1)])
def test_a_pytorchjob_starts_a_preempted_pod_again(tmp_path: Path, path_with: Any, code: str, seen: int) -> None:
    variables = {**path_with("python", NODE), "NODE_RANK": "1", "CODE": code}
    assert bash("pytorchjob", variables, tmp_path) == seen
    options = dict(pairwise(json.loads((tmp_path / "seen.json").read_text())))
    assert options["--node_rank"] == "1"
    assert options["--master"] == "news-worker-0:29500"
    assert options["--config"] == "/etc/evertune/kubernetes-stream.yaml"


def test_sigterm_reaches_the_supervisor_in_a_pod_of_a_pytorchjob(tmp_path: Path, path_with: Any) -> None:
    variables = {**path_with("python", NODE), "NODE_RANK": "1", "CODE": "wait"}
    with subprocess.Popen(["bash", "-c", shell_line("pytorchjob")], env=variables, cwd=tmp_path) as shell:
        try:
            wait_for(tmp_path / "seen.json")
            shell.send_signal(signal.SIGTERM)
            assert shell.wait(60) == 138
        finally:
            shell.kill()


def wait_for(file: Path) -> None:
    deadline = time.monotonic() + 60
    while not (file.exists() and file.read_text()):
        assert time.monotonic() < deadline, f"{file} does not come"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("changes", "command", "message"),
    [
        ({}, ["watch"], r"only `fit` and `update` .* got watch"),
        ({}, [], "got nothing"),
        ({"container": Container(image="evertune.sif")}, COMMAND, r"container .* kubernetes\.image"),
        ({"modules": ["cuda"]}, COMMAND, r"modules .* kubernetes\.image"),
        ({"name": "News_1"}, COMMAND, "name 'News_1' is not a valid Kubernetes name"),
        ({"name": "n" * 60}, COMMAND, "15 characters too long"),
        ({"kubernetes": KubernetesSettings(namespace="a b")}, COMMAND, "namespace 'a b'"),
        ({"kubernetes": KubernetesSettings(volumes={"Data": "/data"})}, COMMAND, "claim 1 'Data'"),
        ({"kubernetes": KubernetesSettings(volumes={"data": "data"})}, COMMAND, "at an absolute path, got 'data'"),
        ({"kubernetes": KubernetesSettings(gpus_per_node=-1)}, COMMAND, "negative, got -1"),
        ({}, ["fit", "--config", "nowhere.yaml"], r"nowhere\.yaml is not a file"),
    ],
)
def test_what_kubernetes_would_refuse_is_refused_here(
    changes: dict[str, Any], command: list[str], message: str, cluster: Any, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        run(LaunchSettings(**changes), command, dry_run=False, wait=True)
    assert not (tmp_path / "calls.jsonl").exists()


def test_a_dry_run_prints_the_manifest_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    settings, command = LAUNCHES["jobset"]
    assert run(settings, command, dry_run=True, wait=True) == 0
    assert capsys.readouterr().out == manifest(settings, command)


def test_each_run_of_a_pytorchjob_has_an_id_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*LAUNCHES["pytorchjob"], dry_run=True, wait=False) == 0
    assert re.search(r"--run_id news-\d{8}-\d{6} ", capsys.readouterr().out)


def test_without_gpus_none_is_asked_for() -> None:
    settings = LaunchSettings(kubernetes=KubernetesSettings(gpus_per_node=0, cpu="2"))
    document = yaml.safe_load(manifest(settings, ["fit"]))
    assert pod(document)["containers"][0]["resources"] == {"requests": {"cpu": "2"}, "limits": {"cpu": "2"}}


def test_pods_have_time_to_save() -> None:
    for name, (settings, _) in LAUNCHES.items():
        assert pod(documents(name)[-1])["terminationGracePeriodSeconds"] > settings.grace


KUBECTL = """
import json, os, pathlib, signal, sys, time
words, folder = sys.argv[1:], pathlib.Path({folder!r})
text = "" if "get" in words else sys.stdin.read()
with (folder / "calls.jsonl").open("a") as file:
    file.write(json.dumps([words, text]) + "\\n")
name = "create" if "create" in words else "delete" if "delete" in words else "pods" if "pods" in words else "job"
answers = sorted(folder.glob(name + ".*.json"))
if answers:
    answer = json.loads(answers[0].read_text())
    if len(answers) > 1:
        answers[0].unlink()
    if answer == "SIGTERM":
        os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(60)
    if isinstance(answer, str):
        sys.exit(answer)
    print(json.dumps(answer) if answer else "")
"""
RUNNING: dict[str, Any] = {"status": {"conditions": [{"type": "Suspended", "status": "False"}]}}


def ended(how: str) -> dict[str, Any]:
    return {"status": {"conditions": [{"type": how, "status": "True", "message": f"it has {how}"}]}}


def pod_with(code: int, finished: str) -> dict[str, Any]:
    return {"status": {"containerStatuses": [{"state": {"terminated": {"exitCode": code, "finishedAt": finished}}}]}}


@pytest.fixture
def cluster(tmp_path: Path, path_with: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A kubectl that gives the answers it is told, the last of each kind again and again."""
    monkeypatch.setenv("PATH", path_with("kubectl", KUBECTL.format(folder=str(tmp_path)))["PATH"])
    monkeypatch.setattr("evertune.launch.kubernetes._INTERVAL", 0.01)

    def answer(**answers: list[object]) -> None:
        for kind, values in answers.items():
            for number, value in enumerate(values):
                (tmp_path / f"{kind}.{number}.json").write_text(json.dumps(value))

    def calls() -> list[Any]:
        return [json.loads(line) for line in (tmp_path / "calls.jsonl").read_text().splitlines()]

    return SimpleNamespace(answer=answer, calls=calls)


def test_the_job_is_created(cluster: Any, capsys: pytest.CaptureFixture[str]) -> None:
    settings, command = LAUNCHES["jobset-everything"]
    cluster.answer(job=[None])
    assert run(settings, command, dry_run=False, wait=False) == 0
    name = "jobsets.jobset.x-k8s.io/news"
    assert cluster.calls() == [
        [["--namespace", "nlp", "get", name, "--ignore-not-found", "-o", "json"], ""],
        [["--namespace", "nlp", "create", "-f", "-"], manifest(settings, command)],
    ]
    output = capsys.readouterr()
    logs = "kubectl --namespace nlp logs -f -l jobset.sigs.k8s.io/jobset-name=news"
    assert output.out == f"created {name}; to follow its output: {logs}\n"
    assert output.err == ""


def test_a_launch_without_volumes_says_that_nothing_stays(cluster: Any, capsys: pytest.CaptureFixture[str]) -> None:
    cluster.answer(job=[None])
    assert run(*LAUNCHES["jobset"], dry_run=False, wait=False) == 0
    assert "everything that a pod writes, checkpoints too, is lost" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "lost"),
    [
        (["update", "--registry", "news-registry"], "registry=news-registry"),
        (["update", "--registry=./news"], "registry=./news"),
        (["update", "--registry", "/tmp/news"], "registry=/tmp/news"),
        (["update", "--config", "live.yaml"], "registry=in-yaml"),
        (["update", "--config", "live.yaml", "--registry", "/data/news"], ""),
        (["update", "--registry", "/data/news"], ""),
        (["update", "--registry", "s3://bucket/news"], ""),
        (["fit", "--config", "live.yaml"], "out=evertune-run"),
        (["fit", "--out", "/data/run"], ""),
    ],
)
def test_what_would_be_lost_with_the_pod_is_named(
    command: list[str], lost: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "live.yaml").write_text("registry: in-yaml\n")
    settings = LaunchSettings(name="news", kubernetes=KubernetesSettings(image="image", volumes={"claim": "/data"}))
    assert run(settings, command, dry_run=True, wait=False) == 0
    err = capsys.readouterr().err
    assert f"note: {lost} lies in the pod" in err if lost else err == ""


def test_a_finished_job_of_the_same_name_is_replaced(cluster: Any) -> None:
    cluster.answer(job=[ended("Completed")])
    assert run(*LAUNCHES["jobset"], dry_run=False, wait=False) == 0
    assert [words[0] for words, _ in cluster.calls()] == ["get", "delete", "create"]
    assert "--cascade=foreground" in cluster.calls()[1][0]


def test_a_running_job_of_the_same_name_stays(cluster: Any, capsys: pytest.CaptureFixture[str]) -> None:
    cluster.answer(job=[RUNNING])
    assert run(*LAUNCHES["jobset"], dry_run=False, wait=True) == 1
    assert [words[0] for words, _ in cluster.calls()] == ["get"]
    assert "still running" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["jobset", "pytorchjob"])
def test_waiting_ends_with_the_exit_code_of_the_command(
    cluster: Any, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    first, later = pod_with(4, "2026-01-01T10:00:00Z"), pod_with(143, "2026-01-01T10:00:09Z")
    states = [None, {"status": {}}, "the cluster is away", RUNNING, ended("Failed")]
    cluster.answer(job=states, pods=[{"items": [later, first, pod_with(0, "2026-01-01T09:00:00Z"), {}]}])
    assert run(*LAUNCHES[name], dry_run=False, wait=True) == 4
    output = capsys.readouterr()
    assert "Failed. it has Failed" in output.out
    assert "the cluster is away; retrying" in output.err


@pytest.mark.parametrize(("name", "ending"), [("jobset", "Completed"), ("pytorchjob", "Succeeded")])
def test_waiting_ends_well(cluster: Any, name: str, ending: str) -> None:
    cluster.answer(job=[None, RUNNING, ended(ending)])
    assert run(*LAUNCHES[name], dry_run=False, wait=True) == 0


def test_a_deleted_job_ends_the_waiting(cluster: Any) -> None:
    cluster.answer(job=[None, RUNNING, None])
    assert run(*LAUNCHES["jobset"], dry_run=False, wait=True) == 1


def test_what_kubectl_refuses_is_told(cluster: Any, capsys: pytest.CaptureFixture[str]) -> None:
    cluster.answer(job=[None], create=["error: unknown kind"])
    assert run(*LAUNCHES["jobset"], dry_run=False, wait=True) == 1
    assert "evertune launch kubernetes: error: unknown kind\n" in capsys.readouterr().err


def test_sigterm_deletes_the_job(cluster: Any) -> None:
    cluster.answer(job=[None, RUNNING, "SIGTERM"])
    settings, command = LAUNCHES["jobset"]
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ending:
        run(settings, command, dry_run=False, wait=True)
    assert ending.value.code == 128 + signal.SIGTERM
    words, text = cluster.calls()[-1]
    assert words == ["delete", "--ignore-not-found", "--cascade=foreground", "--timeout=180s", "-f", "-"]
    assert text == manifest(settings, command)
    assert signal.getsignal(signal.SIGTERM) is before


def test_without_kubectl_there_is_a_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run(*LAUNCHES["jobset"], dry_run=False, wait=False) == 1
    assert "kubectl is not on the PATH" in capsys.readouterr().err
