"""Launch on Kubernetes: a JobSet or a PyTorchJob whose pods each run one supervisor.

How the job reacts to the exit code of a supervisor:

====================================  ==========================================  ================================
exit code                             JobSet (0.10.1 or newer)                    PyTorchJob
====================================  ==========================================  ================================
0                                     completed                                   succeeded
75: preempted, has saved              restarted, not counted                      restarted
2, 3, 4, 5: a result, not a crash     failed at once: a retry would end the same  failed at once
a pod is evicted, its node is lost    restarted, not counted                      the pod is restarted
any other                             restarted up to ``max_restarts`` times      failed (if killed: restarted)
====================================  ==========================================  ================================

With ``min_nodes``, a lost pod of a JobSet is replaced while the others continue.
"""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from evertune.launch.settings import (
    DECIDED,
    KubernetesServeSettings,
    KubernetesSettings,
    LaunchSettings,
    config_files,
    shell_words,
)
from evertune.utils.processes import PREEMPTED

_CONFIG_FOLDER = "/etc/evertune"
_GROUP = 1000
"""Group of the user in evertune's image, which gets write access to the volumes."""
_RETRYABLE = 138
"""Exit code after which a PyTorchJob restarts a pod; it treats all codes below 128 as permanent failures."""
_MARGIN = 30
"""Seconds after ``grace`` in which the supervisor can still end by itself."""
_INTERVAL = 5.0  # seconds between two requests for the state of the job
_RESOURCES = {"jobset": "jobsets.jobset.x-k8s.io", "pytorchjob": "pytorchjobs.kubeflow.org"}
_JOB_LABELS = {"jobset": "jobset.sigs.k8s.io/jobset-name", "pytorchjob": "training.kubeflow.org/job-name"}


class _Dumper(yaml.SafeDumper):
    """Readable YAML: multi-line text as a block, no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(str, _text)


def manifest(settings: LaunchSettings, command: Sequence[str], run_id: str | None = None) -> str:
    """The YAML of the job, and of a ConfigMap with the files of the command's ``--config``.

    Args:
        settings: Settings of the launch. The interpreter defaults to ``python`` of the image, and the number of
            processes to ``gpus_per_node``, else 1: the defaults of this machine say nothing about the cluster.
        command: Command of every rank: ``["fit", "--config", "stream.yaml"]`` or ``["update", ...]``.
        run_id: Unique identifier of a PyTorchJob's run; by default its name. A JobSet uses the uid of its job.

    Returns:
        One or two YAML documents.

    Raises:
        ValueError: If Kubernetes would refuse a setting, or would ignore it.
        OSError: If a configuration file cannot be read.

    Example:
        >>> from evertune.launch.settings import LaunchSettings
        >>> print(manifest(LaunchSettings(name="news"), ["fit", "--data.path=/data"]).splitlines()[1])
        kind: JobSet
    """
    _check(settings, command)
    settings = _of_the_cluster(settings)
    command, files = _with_mounted_files(command)
    documents = [_config_map(settings, files)] if files else []
    if settings.kubernetes.kind == "jobset":
        documents.append(_jobset(settings, command, mounts_files=bool(files)))
    else:
        documents.append(_pytorchjob(settings, command, run_id or settings.name, mounts_files=bool(files)))
    # The width keeps PyYAML from folding long shell lines.
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=10_000)


def run(settings: LaunchSettings, command: Sequence[str], *, dry_run: bool, wait: bool) -> int:
    """Create the job; a finished one of the same name is replaced.

    Args:
        settings: Settings of the launch.
        command: Command of every rank.
        dry_run: Only print the manifest.
        wait: Wait until the job has ended. SIGTERM or Ctrl-C then delete the job, whose ranks have ``grace`` seconds
            to save.

    Returns:
        With ``wait`` the exit code of the command, else 0; 1 if the job could not be created.

    Raises:
        ValueError: Before anything is created, if :func:`manifest` refuses the settings.
        OSError: Before anything is created, if a configuration file cannot be read.
    """
    text = manifest(settings, command, f"{settings.name}-{datetime.now():%Y%m%d-%H%M%S}")
    if note := _lost_with_the_pod(settings, command):
        _say(note)
    if dry_run:
        print(text, end="")
        return 0
    if shutil.which("kubectl") is None:
        return _say("kubectl is not on the PATH: install it, or print the manifest with --dry_run")
    if not settings.kubernetes.volumes:
        _say("note: kubernetes.volumes is empty: everything that a pod writes, checkpoints too, is lost with it")
    return _launch(_Job(settings, text), wait=wait)


def _launch(job: _Job, *, wait: bool) -> int:
    try:
        state = job.state()
        if state is not None:  # the name is taken: by a finished job, or by one that must not be disturbed
            if _ending(state) is None:
                return _say(f"{job.name} is still running: wait for it, delete it, or choose another name")
            job.delete()
        if not wait:
            job.create()
            return 0
        with _deleted_at_a_signal(job):
            job.create()
            return _follow(job)
    except subprocess.CalledProcessError as error:
        return _say(error.stderr.strip())


class _Job:
    """A job in the cluster, controlled through kubectl."""

    def __init__(self, settings: LaunchSettings, text: str) -> None:
        kind = settings.kubernetes.kind
        self.text = text
        self.name = f"{_RESOURCES[kind]}/{settings.name}"
        self.selector = f"{_JOB_LABELS[kind]}={settings.name}"
        self.patience = _patience(settings)
        self._namespace = settings.kubernetes.namespace

    def words(self, *words: str) -> list[str]:
        """A kubectl command line in the job's namespace."""
        return ["kubectl", *(["--namespace", self._namespace] if self._namespace else []), *words]

    def kubectl(self, *words: str, text: str | None = None) -> str:
        """Run kubectl, with ``text`` as its input, and return what it prints."""
        return subprocess.run(self.words(*words), input=text, capture_output=True, text=True, check=True).stdout

    def state(self) -> dict[str, Any] | None:
        """The job as the cluster reports it; None if it does not exist."""
        text = self.kubectl("get", self.name, "--ignore-not-found", "-o", "json")
        return dict(json.loads(text)) if text.strip() else None

    def create(self) -> None:
        """Create it and its configuration."""
        self.kubectl("create", "-f", "-", text=self.text)
        output = shlex.join(self.words("logs", "-f", "-l", self.selector))
        print(f"created {self.name}; to follow its output: {output}", flush=True)

    def delete(self) -> None:
        """Delete it and its configuration, and wait until its pods are gone."""
        timeout = f"--timeout={self.patience + _MARGIN}s"
        self.kubectl("delete", "--ignore-not-found", "--cascade=foreground", timeout, "-f", "-", text=self.text)

    def exit_code(self) -> int:
        """Exit code of the container that failed first; later ones were ended because of it."""
        pods = json.loads(self.kubectl("get", "pods", "-l", self.selector, "-o", "json"))["items"]
        statuses = [status for pod in pods for status in pod.get("status", {}).get("containerStatuses", [])]
        ended = [status["state"]["terminated"] for status in statuses if "terminated" in status.get("state", {})]
        failed = sorted((one["finishedAt"], int(one["exitCode"])) for one in ended if one["exitCode"] != 0)
        return failed[0][1] if failed else 1


def _ending(state: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The condition with which a job has ended; None while it runs."""
    for condition in state.get("status", {}).get("conditions", []):
        if condition["type"] in ("Completed", "Succeeded", "Failed") and condition["status"] == "True":
            return dict(condition)
    return None


@contextmanager
def _deleted_at_a_signal(job: _Job) -> Iterator[None]:
    """Delete the job when this process gets SIGTERM or Ctrl-C."""

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, end)
    try:
        yield
    except (SystemExit, KeyboardInterrupt):
        _say(f"deleting {job.name}; it saves first")
        try:
            job.delete()
        except subprocess.CalledProcessError as error:
            _say(error.stderr.strip())
        raise
    finally:
        signal.signal(signal.SIGTERM, previous)


def _follow(job: _Job) -> int:
    """Wait until the job has ended, and return the exit code of its command."""
    while True:
        try:
            state = job.state()
            if state is None:
                return _say(f"{job.name} was deleted")
            ending = _ending(state)
            if ending is not None:
                print(f"{job.name}: {ending['type']}. {ending.get('message', '')}".rstrip(), flush=True)
                return job.exit_code() if ending["type"] == "Failed" else 0
        except subprocess.CalledProcessError as error:  # the cluster does not answer, but the job may still run
            _say(f"{error.stderr.strip()}; retrying")
        time.sleep(_INTERVAL)


def _say(message: str) -> int:
    print(f"evertune launch kubernetes: {message}", file=sys.stderr, flush=True)
    return 1


def _of_the_cluster(settings: LaunchSettings) -> LaunchSettings:
    """Settings without the defaults that were taken from this machine."""
    python = "python" if settings.python == sys.executable else settings.python
    processes = settings.processes_per_node or settings.kubernetes.gpus_per_node or 1
    return replace(settings, python=python, processes_per_node=processes)


def _check(settings: LaunchSettings, command: Sequence[str]) -> None:
    asked = settings.kubernetes
    if not command or command[0] not in ("fit", "update"):
        given = command[0] if command else "nothing"
        raise ValueError(f"only `fit` and `update` can be launched on Kubernetes, got {given}")
    if settings.container is not None:
        raise ValueError("container cannot be used with Kubernetes: pods run kubernetes.image")
    if settings.modules:
        raise ValueError("modules cannot be used with Kubernetes: install what they load in kubernetes.image")
    _check_name("name", settings.name, _LABEL)
    # Kubernetes limits host names to 63 characters and ends those of pods with five random ones.
    longest = f"{settings.name}-workers-0-{settings.nodes - 1}-abcde"
    if len(longest) > 63:
        excess = len(longest) - 63
        raise ValueError(f"name {settings.name!r} is {excess} characters too long: pod names are derived from it")
    if asked.serve != KubernetesServeSettings():
        raise ValueError(f"kubernetes.serve is for `serve`, and cannot be used with `{command[0]}`: leave it out")
    _check_cluster(asked)


def _check_cluster(asked: KubernetesSettings) -> None:
    """Refuse names, numbers and paths that Kubernetes would refuse."""
    others = {"kubernetes.namespace": asked.namespace, "kubernetes.service_account": asked.service_account}
    others |= {f"kubernetes.volumes: claim {number + 1}": claim for number, claim in enumerate(asked.volumes)}
    for what, name in others.items():
        if name is not None:
            _check_name(what, name, _SUBDOMAIN)
    if asked.gpus_per_node is not None and asked.gpus_per_node < 0:
        raise ValueError(f"kubernetes.gpus_per_node must not be negative, got {asked.gpus_per_node}")
    for claim, path in asked.volumes.items():
        if not path.startswith("/"):
            raise ValueError(f"kubernetes.volumes: {claim!r} must be mounted at an absolute path, got {path!r}")


_LABEL = r"[a-z]([-a-z0-9]*[a-z0-9])?"
_SUBDOMAIN = r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?"


def _check_name(what: str, name: str, pattern: str) -> None:
    if not re.fullmatch(pattern, name):
        raise ValueError(
            f"{what} {name!r} is not a valid Kubernetes name: use lower-case letters, digits and dashes, starting with "
            "a letter and not ending with a dash"
        )


def _with_mounted_files(command: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The command with the paths of its ``--config`` files inside the pods, and the contents of these files by name."""
    paths = list(dict.fromkeys(config_files(command)))
    contents: dict[str, str] = {}
    places: dict[Path, str] = {}
    for number, path in enumerate(paths):
        if not path.is_file():
            raise ValueError(f"--config {path} is not a file")
        name = re.sub(r"[^-\w.]", "-", path.name, flags=re.ASCII)
        name = f"{number}-{name}" if len(paths) > 1 else name  # two folders may hold files of the same name
        contents[name] = path.read_text()
        places[path] = f"{_CONFIG_FOLDER}/{name}"
    rewritten = []
    for word, before in zip(command, ["", *command], strict=False):
        option, equals, value = word.partition("=")
        if before in ("--config", "-c"):
            rewritten.append(places[Path(word)])
        elif equals and option == "--config":
            rewritten.append(f"--config={places[Path(value)]}")
        else:
            rewritten.append(word)
    return rewritten, contents


def _lost_with_the_pod(settings: LaunchSettings, command: Sequence[str]) -> str:
    """A note if the registry of an update, or the folder of a fit, lies on no volume; empty if it stays."""
    option, place = ("out", "evertune-run") if command[0] == "fit" else ("registry", "")
    for path in config_files(command):
        section = yaml.safe_load(path.read_text())
        place = str(section.get(option, place)) if isinstance(section, dict) else place
    for word, following in zip(command, [*command[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name == f"--{option}":
            place = value if equals else following
    volumes = settings.kubernetes.volumes.values()
    if not place or "://" in place or any(PurePosixPath(place).is_relative_to(path) for path in volumes):
        return ""
    return (
        f"note: {option}={place} lies in the pod, on none of kubernetes.volumes, and is lost with it: set it to a path "
        "on a volume, or to a URL such as s3://bucket/registry"
    )


def _metadata(settings: LaunchSettings, name: str) -> dict[str, Any]:
    namespace = settings.kubernetes.namespace
    return {"name": name} | ({"namespace": namespace} if namespace else {})


def _job_metadata(settings: LaunchSettings) -> dict[str, Any]:
    queue = settings.kubernetes.queue
    return _metadata(settings, settings.name) | ({"labels": {"kueue.x-k8s.io/queue-name": queue}} if queue else {})


def _config_map(settings: LaunchSettings, files: dict[str, str]) -> dict[str, Any]:
    metadata = _metadata(settings, f"{settings.name}-config")
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": files}


def _jobset(settings: LaunchSettings, command: Sequence[str], *, mounts_files: bool) -> dict[str, Any]:
    words = settings.node_command(
        [],
        node_rank="$JOB_COMPLETION_INDEX",
        master=f"{settings.name}-workers-0-0.{settings.name}",
        run_id="$RUN_ID",
    )
    line = f"exec {shell_words(words)} {shlex.join(command)}"
    labels = {"RUN_ID": "batch.kubernetes.io/controller-uid"}  # changes each time that the job is recreated
    # Elastic: the job itself replaces a lost pod. Otherwise one failed pod fails the job, and JobSet restarts all pods.
    elastic = settings.min_nodes is not None and settings.min_nodes < settings.nodes
    decided = [code for code in DECIDED if code]  # without 0, which is not a failure
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": _job_metadata(settings),
        "spec": {
            "network": {"enableDNSHostnames": True, "subdomain": settings.name},
            "failurePolicy": {
                "maxRestarts": settings.max_restarts,
                "rules": [
                    {
                        "name": "preempted",
                        "action": "RestartJobSetAndIgnoreMaxRestarts",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                        "onJobFailureMessagePatterns": [f"exit code {PREEMPTED} ", "condition DisruptionTarget "],
                    },
                    {"name": "decided", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]},
                ],
            },
            "replicatedJobs": [
                {
                    "name": "workers",
                    "replicas": 1,
                    "template": {
                        "spec": {
                            "completionMode": "Indexed",
                            "completions": settings.nodes,
                            "parallelism": settings.nodes,
                            "backoffLimit": settings.max_restarts if elastic else 0,
                            "podFailurePolicy": {
                                "rules": [
                                    _on_exit_codes([PREEMPTED]),
                                    _on_exit_codes(decided),
                                    {
                                        "action": "Ignore" if elastic else "FailJob",
                                        "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
                                    },
                                ]
                            },
                            "template": {
                                "spec": {
                                    "restartPolicy": "Never",
                                    **_pod(settings, "evertune", line, labels, mounts_files=mounts_files),
                                }
                            },
                        }
                    },
                }
            ],
        },
    }


def _on_exit_codes(codes: Sequence[int]) -> dict[str, Any]:
    return {"action": "FailJob", "onExitCodes": {"operator": "In", "values": list(codes)}}


def _pytorchjob(settings: LaunchSettings, command: Sequence[str], run_id: str, *, mounts_files: bool) -> dict[str, Any]:
    """Workers only: a job with a master is over as soon as the master ends, whether or not it holds rank 0."""
    words = settings.node_command([], node_rank="$NODE_RANK", master=f"{settings.name}-worker-0", run_id=run_id)
    # This operator cannot restart on exit code 75, so bash translates it. It forwards SIGTERM, and repeats `wait`,
    # which a trapped signal interrupts, until the supervisor has ended.
    line = "\n".join(
        [
            "trap 'kill -TERM \"$node\"' TERM",
            f"{shell_words(words)} {shlex.join(command)} & node=$!",
            'until wait "$node"; code=$?; ! kill -0 "$node" 2>/dev/null; do :; done',
            f'if [ "$code" = {PREEMPTED} ]; then exit {_RETRYABLE}; fi',
            'exit "$code"',
        ]
    )
    labels = {"NODE_RANK": "training.kubeflow.org/replica-index"}
    pod = _pod(settings, "pytorch", line, labels, mounts_files=mounts_files)
    pod["containers"][0]["ports"] = [{"name": "pytorchjob-port", "containerPort": settings.port}]
    worker = {"replicas": settings.nodes, "restartPolicy": "ExitCode", "template": {"spec": pod}}
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": _job_metadata(settings),
        "spec": {
            "nprocPerNode": str(settings.processes),
            "runPolicy": {"cleanPodPolicy": "Running"},
            "pytorchReplicaSpecs": {"Worker": worker},
        },
    }


def _pod(
    settings: LaunchSettings, name: str, line: str, labels: Mapping[str, str], *, mounts_files: bool
) -> dict[str, Any]:
    """The pod of one node: its container runs ``setup``, then ``line``, and gets ``labels`` as variables."""
    asked = settings.kubernetes
    spec: dict[str, Any] = {}
    if asked.service_account:
        spec["serviceAccountName"] = asked.service_account
    if asked.node_selector:
        spec["nodeSelector"] = asked.node_selector
    if asked.volumes:
        spec["securityContext"] = {"fsGroup": _GROUP, "fsGroupChangePolicy": "OnRootMismatch"}
    script = "\n".join([*(["set -e"] if settings.setup else []), *settings.setup, line, ""])
    known = [
        {"name": key, "valueFrom": {"fieldRef": {"fieldPath": f"metadata.labels['{label}']"}}}
        for key, label in labels.items()
    ]
    variables = [{"name": key, "value": _literal(value)} for key, value in settings.variables().items()]
    resources = _resources(settings)
    mounts = [{"name": "shared-memory", "mountPath": "/dev/shm"}]
    volumes: list[dict[str, Any]] = [
        {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": asked.shared_memory}}
    ]
    if mounts_files:
        mounts.append({"name": "config", "mountPath": _CONFIG_FOLDER})
        volumes.append({"name": "config", "configMap": {"name": f"{settings.name}-config"}})
    for number, (claim, path) in enumerate(asked.volumes.items()):
        mounts.append({"name": f"volume-{number}", "mountPath": path})
        volumes.append({"name": f"volume-{number}", "persistentVolumeClaim": {"claimName": claim}})
    container = {
        "name": name,
        "image": asked.image,
        "command": ["bash", "-c", _literal(script)],
        "env": [*known, *variables],
        **({"resources": resources} if resources else {}),
        "volumeMounts": mounts,
    }
    return {
        **spec,
        "terminationGracePeriodSeconds": _patience(settings),
        "containers": [container],
        "volumes": volumes,
    }


def _resources(settings: LaunchSettings) -> dict[str, Any]:
    asked = settings.kubernetes
    same = {name: value for name, value in (("cpu", asked.cpu), ("memory", asked.memory)) if value}
    # GPUs can only be limited; Kubernetes then requests the same number.
    gpus = settings.processes if asked.gpus_per_node is None else asked.gpus_per_node
    limits = same | ({"nvidia.com/gpu": str(gpus)} if gpus else {})
    return ({"requests": same} if same else {}) | ({"limits": limits} if limits else {})


def _patience(settings: LaunchSettings) -> int:
    """Seconds that a pod has to end after SIGTERM."""
    return math.ceil(settings.grace) + _MARGIN


def _literal(value: str) -> str:
    """Escape text so that Kubernetes' substitution of ``$(NAME)`` leaves it unchanged."""
    return re.sub(r"\$(?=[$(])", "$$", value)
