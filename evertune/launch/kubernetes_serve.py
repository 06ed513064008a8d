"""Serve on Kubernetes: a Deployment of servers with its Service, autoscaler and disruption budget.

The same command can be launched again with other settings: ``kubectl apply`` replaces pods one by one, without dropping
a request, and leaves the number of replicas to the autoscaler.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import subprocess
import sys
from argparse import ArgumentError
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from evertune.launch.kubernetes import (
    _CONFIG_FOLDER,
    _GROUP,
    _LABEL,
    _MARGIN,
    _SUBDOMAIN,
    _check_cluster,
    _check_name,
    _config_map,
    _Dumper,
    _literal,
    _metadata,
    _resources,
    _with_mounted_files,
)
from evertune.launch.settings import LaunchSettings
from evertune.serve.settings import AccessSettings, ServerSettings
from evertune.utils.secrets import without_secrets

_KEYS = "/etc/evertune-keys"  # where the Secret with the hashes of the API keys is mounted
_REGISTRY = "EVERTUNE_REGISTRY"
_SCRATCH = "/tmp"  # the only writable folder beside the volumes
_DRAIN = 5.0  # seconds after which every load balancer has noticed that a pod is ending
_CPU, _MEMORY = "2", "4Gi"
_START = 600
"""Seconds that a server may take to load its first version."""
_OF_TRAINING = (
    *("nodes", "min_nodes", "processes_per_node", "port", "modules", "setup", "container", "log_dir"),
    *("shared_folders", "interface", "preflight", "max_restarts", "hang_timeout", "silence_timeout", "grace"),
)
_OF_JOBS = ("kind", "gpus_per_node", "shared_memory", "queue")
_PATHS = ("registry", "log.path", "server.certificate", "server.private_key", "access.jwks", "access.keys")
"""Options of ``serve`` that name a file or folder, which must lie on a volume."""


def manifest(settings: LaunchSettings, command: Sequence[str]) -> str:
    """The YAML of the Deployment and what belongs to it.

    The server listens on all addresses of its pod. Its registry is given by the variable ``EVERTUNE_REGISTRY``. It runs
    as a user without privileges, and can write only to ``/tmp`` and ``kubernetes.volumes``. API keys and credentials
    come from Secrets, which are only named here.

    Args:
        settings: Settings of the launch. Each pod gets ``kubernetes.cpu`` (default 2, which the autoscaler needs) and
            ``kubernetes.memory`` (default 4Gi).
        command: ``["serve", "--registry", "s3://bucket/news", ...]``. ``server.drain`` defaults to 5 seconds.

    Returns:
        A Deployment, a Service, a HorizontalPodAutoscaler and a PodDisruptionBudget, after a ConfigMap if the command
        has a ``--config``.

    Raises:
        ValueError: If a setting belongs to training, cannot work in a pod, or would put a secret into the manifest.
        OSError: If a configuration file cannot be read.

    Example:
        >>> from evertune.launch.settings import LaunchSettings
        >>> text = manifest(LaunchSettings(name="news"), ["serve", "--registry=s3://a/news", "--access.open=true"])
        >>> [line for line in text.splitlines() if line.startswith("kind")][1:]
        ['kind: Service', 'kind: HorizontalPodAutoscaler', 'kind: PodDisruptionBudget']
    """
    _check(settings)
    _, files = _with_mounted_files(command)
    asked = dict(_options(command))
    server = _checked_server(settings, asked)
    documents = [
        *([_config_map(settings, files)] if files else []),
        _deployment(settings, command, asked, server, files),
        _service(settings, server),
        _autoscaler(settings),
        _disruption_budget(settings),
    ]
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=10_000)


def run(settings: LaunchSettings, command: Sequence[str], *, dry_run: bool, wait: bool) -> int:
    """Create the servers, or replace those of the same name one by one.

    Args:
        settings: Settings of the launch.
        command: ``["serve", ...]``.
        dry_run: Only print the manifest.
        wait: Wait until all servers are ready. They keep running when the waiting ends.

    Returns:
        0, or 1 if kubectl fails or, with ``wait``, the servers do not become ready.

    Raises:
        ValueError: Before anything is created, if :func:`manifest` refuses the settings.
        OSError: Before anything is created, if a configuration file cannot be read.
    """
    text = manifest(settings, command)
    if dry_run:
        print(text, end="")
        return 0
    if shutil.which("kubectl") is None:
        print(
            "evertune launch kubernetes: kubectl is not on the PATH: install it, or print the manifest with --dry_run",
            file=sys.stderr,
        )
        return 1
    namespace = settings.kubernetes.namespace
    kubectl = ["kubectl", *(["--namespace", namespace] if namespace else [])]
    if subprocess.run([*kubectl, "apply", "-f", "-"], input=text, text=True, check=False).returncode:
        return 1
    rollout = [*kubectl, "rollout", "status", f"deployment/{settings.name}"]
    if wait:
        return int(subprocess.run(rollout, check=False).returncode != 0)
    print(f"to see when it is ready: {' '.join(rollout)}", flush=True)
    return 0


def _check(settings: LaunchSettings) -> None:
    """Refuse what a server has no use for, and what Kubernetes would refuse."""
    asked, default = settings.kubernetes, LaunchSettings()
    changed = [name for name in _OF_TRAINING if getattr(settings, name) != getattr(default, name)]
    changed += [f"kubernetes.{name}" for name in _OF_JOBS if getattr(asked, name) != getattr(default.kubernetes, name)]
    if changed:
        raise ValueError(
            f"{changed[0]} belongs to training and cannot be used with `serve`, whose own settings are those of "
            "kubernetes.serve and, after `--`, of `evertune serve`: leave it out"
        )
    _check_name("name", settings.name, _LABEL)
    if len(settings.name) > 63:
        raise ValueError(f"name {settings.name!r} is {len(settings.name) - 63} characters too long for a Service")
    _check_cluster(asked)
    for what in ("keys_secret", "env_secret"):
        if (secret := getattr(asked.serve, what)) is not None:
            _check_name(f"kubernetes.serve.{what}", secret, _SUBDOMAIN)
    if asked.cpu is not None and not re.fullmatch(r"\d+(\.\d+)?|\d+m", asked.cpu):
        raise ValueError(f"kubernetes.cpu must be a number of cores such as '2' or '500m', got {asked.cpu!r}")
    hidden: dict[str, str] = without_secrets(settings.environment)
    for name, value in settings.environment.items():
        if hidden[name] != value:
            raise ValueError(
                f"environment: {name} holds a secret, which anyone who reads the manifest would see: put it into a "
                "Secret, and name that in kubernetes.serve.env_secret"
            )


def _options(command: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Each option of the command and of its ``--config`` files as dotted name and text; the last one counts."""
    for word, following in zip(command, [*command[1:], ""], strict=True):
        option, equals, value = word.partition("=")
        value = value if equals else following
        if option in ("--config", "-c"):
            yield from _flat("", yaml.safe_load(Path(value).read_text()))
        elif option in ("--server", "--access", "--log"):
            yield from _flat(option[2:], yaml.safe_load(value))
        elif option.startswith("--"):
            yield option[2:], value


def _flat(name: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(f"{name}.{key}" if name else str(key), inner)
    elif value is not None:
        yield name, value if isinstance(value, str) else json.dumps(value)


def _checked_server(settings: LaunchSettings, asked: dict[str, str]) -> ServerSettings:
    """Where the server listens in its pod.

    Raises:
        ValueError: If it would not start there, or nobody could reach it.
    """
    secret = settings.kubernetes.serve.keys_secret
    if secret:
        asked["access.keys"] = f"{_KEYS}/keys.json"
    asked.setdefault("server.drain", f"{_DRAIN:g}")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(ServerSettings, "server")
    parser.add_class_arguments(AccessSettings, "access")
    theirs = {name: value for name, value in asked.items() if name.startswith(("server.", "access."))}
    words = [f"--{name}={value}" for name, value in {**theirs, "server.host": "0.0.0.0"}.items()]
    try:
        made = parser.instantiate_classes(parser.parse_args(words))
    except ArgumentError as error:
        raise ValueError(f"serve: {error}") from error
    server: ServerSettings = made.server
    if server.port < 1024:
        raise ValueError(f"server.port must be at least 1024, which the pod's user may listen on, got {server.port}")
    if server.client_authority is not None:
        raise ValueError("server.client_authority cannot be used: the probes of Kubernetes show no certificate")
    if "check" in asked:
        raise ValueError("check ends at once, and Kubernetes would start it again and again: leave it out")
    if asked.get("device", "").startswith("cuda"):
        raise ValueError(f"device {asked['device']!r} cannot be used: the pods request no GPU; leave it out")
    if "registry" not in asked and "model" not in asked:
        raise ValueError("serve needs --registry, a path on one of kubernetes.volumes or a URL, or --model")
    for name in ("registry", "model"):
        if name in asked and without_secrets(asked[name]) != asked[name]:
            raise ValueError(f"{name} holds a secret: put it into the Secret of kubernetes.serve.env_secret")
    if not (made.access.asks or made.access.open):
        raise ValueError(
            "other machines can reach the server: name the Secret with its API keys in kubernetes.serve.keys_secret "
            "(kubectl create secret generic NAME --from-file=keys.json), or set access.jwks; or access.open=true to "
            "answer anyone"
        )
    for name in _PATHS:
        if name in asked and not (name == "access.keys" and secret) and not _stays(settings, asked[name]):
            better = ", or name its Secret in kubernetes.serve.keys_secret" if name == "access.keys" else ""
            raise ValueError(f"{name}={asked[name]} lies on none of kubernetes.volumes: put it on one{better}")
    return server


def _stays(settings: LaunchSettings, place: str) -> bool:
    """Whether all pods find a place: it is a URL, or lies on a volume."""
    volumes = settings.kubernetes.volumes.values()
    return "://" in place or any(PurePosixPath(place).is_relative_to(path) for path in volumes)


def _words(command: Sequence[str], given: Mapping[str, str]) -> list[str]:
    """The command as the pod gets it, with ``given`` in place of its own values."""
    command, _ = _with_mounted_files(command)
    words = []
    for word, before in zip(command, ["", *command], strict=False):
        name = word.partition("=")[0]
        if name.removeprefix("--") in given or (before.startswith("--") and before.removeprefix("--") in given):
            continue
        words.append(_literal(word))
    return [*words, *(f"--{name}={value}" for name, value in given.items())]


def _labels(settings: LaunchSettings) -> dict[str, str]:
    """By which the pods are found: also those of an earlier launch of the same name."""
    return {
        "app.kubernetes.io/name": "evertune",
        "app.kubernetes.io/component": "serve",
        "app.kubernetes.io/instance": settings.name,
    }


def _named(settings: LaunchSettings) -> dict[str, Any]:
    return {**_metadata(settings, settings.name), "labels": _labels(settings)}


def _deployment(
    settings: LaunchSettings,
    command: Sequence[str],
    asked: Mapping[str, str],
    server: ServerSettings,
    files: Mapping[str, str],
) -> dict[str, Any]:
    content = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    # A changed ConfigMap alone starts no new pods; a changed annotation does.
    noted = {"annotations": {"evertune/config-sha256": content}} if files else {}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": _named(settings),
        "spec": {  # without `replicas`: each launch would undo what the autoscaler has decided
            "selector": {"matchLabels": _labels(settings)},
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}},
            "progressDeadlineSeconds": _START + 300,
            "template": {
                "metadata": {"labels": _labels(settings), **noted},
                "spec": _pod(settings, command, asked, server, mounts_files=bool(files)),
            },
        },
    }


def _pod(
    settings: LaunchSettings,
    command: Sequence[str],
    asked: Mapping[str, str],
    server: ServerSettings,
    *,
    mounts_files: bool,
) -> dict[str, Any]:
    cluster = settings.kubernetes
    volumes, mounts = _volumes(settings, mounts_files=mounts_files)
    spec: dict[str, Any] = {"automountServiceAccountToken": cluster.service_account is not None}
    if cluster.service_account:
        spec["serviceAccountName"] = cluster.service_account
    if cluster.node_selector:
        spec["nodeSelector"] = cluster.node_selector
    return {
        **spec,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": _GROUP,
            "runAsGroup": _GROUP,
            "fsGroup": _GROUP,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "terminationGracePeriodSeconds": math.ceil(server.drain + server.grace) + _MARGIN,
        "containers": [{**_container(settings, command, asked, server), "volumeMounts": mounts}],
        "volumes": volumes,
    }


def _container(
    settings: LaunchSettings, command: Sequence[str], asked: Mapping[str, str], server: ServerSettings
) -> dict[str, Any]:
    cluster = settings.kubernetes
    python = "python" if settings.python == sys.executable else settings.python
    given = {"server.host": "0.0.0.0", "server.drain": f"{server.drain:g}"}
    variables = _variables(settings)
    if "registry" in asked:
        variables[_REGISTRY] = _literal(asked["registry"])
        given["registry"] = f"$({_REGISTRY})"
    if cluster.serve.keys_secret:
        given["access.keys"] = asked["access.keys"]
    secrets = [{"secretRef": {"name": cluster.serve.env_secret}}] if cluster.serve.env_secret else []
    bounded = replace(cluster, gpus_per_node=0, cpu=cluster.cpu or _CPU, memory=cluster.memory or _MEMORY)
    scheme = "HTTPS" if server.certificate else "HTTP"

    def probe(path: str, seconds: int, failures: int) -> dict[str, Any]:
        get = {"path": path, "port": scheme.lower(), "scheme": scheme}
        return {"httpGet": get, "periodSeconds": seconds, "timeoutSeconds": 5, "failureThreshold": failures}

    return {
        "name": "serve",
        "image": cluster.image,
        "command": [python, "-m", "evertune"],
        "args": _words(command, given),
        "env": [{"name": name, "value": value} for name, value in variables.items()],
        **({"envFrom": secrets} if secrets else {}),
        "ports": [{"name": scheme.lower(), "containerPort": server.port}],
        "resources": _resources(replace(settings, kubernetes=bounded)),
        "startupProbe": probe("/health", 5, _START // 5),
        "readinessProbe": probe("/ready", 5, 2),
        "livenessProbe": probe("/health", 10, 3),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
    }


def _variables(settings: LaunchSettings) -> dict[str, str]:
    cpu = settings.kubernetes.cpu or _CPU
    cores = float(cpu[:-1]) / 1000 if cpu.endswith("m") else float(cpu)
    ours = {
        "OMP_NUM_THREADS": str(max(1, int(cores))),  # torch would otherwise start a thread for each core of the machine
        "PYTHONFAULTHANDLER": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HOME": _SCRATCH,  # libraries keep their caches there
        "EVERTUNE_CACHE": f"{_SCRATCH}/evertune",
    }
    return ours | {name: _literal(value) for name, value in settings.environment.items()}


def _volumes(settings: LaunchSettings, *, mounts_files: bool) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The volumes of a pod, and where its container has them."""
    secret = settings.kubernetes.serve.keys_secret
    volumes: list[dict[str, Any]] = [{"name": "scratch", "emptyDir": {}}]
    mounts: list[dict[str, Any]] = [{"name": "scratch", "mountPath": _SCRATCH}]
    if mounts_files:
        volumes.append({"name": "config", "configMap": {"name": f"{settings.name}-config"}})
        mounts.append({"name": "config", "mountPath": _CONFIG_FOLDER, "readOnly": True})
    if secret:
        volumes.append({"name": "keys", "secret": {"secretName": secret, "defaultMode": 0o440}})
        mounts.append({"name": "keys", "mountPath": _KEYS, "readOnly": True})
    for number, (claim, path) in enumerate(settings.kubernetes.volumes.items()):
        volumes.append({"name": f"volume-{number}", "persistentVolumeClaim": {"claimName": claim}})
        mounts.append({"name": f"volume-{number}", "mountPath": path})
    return volumes, mounts


def _service(settings: LaunchSettings, server: ServerSettings) -> dict[str, Any]:
    name = "https" if server.certificate else "http"
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _named(settings),
        "spec": {
            "selector": _labels(settings),
            "ports": [{"name": name, "port": settings.kubernetes.serve.port, "targetPort": name}],
        },
    }


def _autoscaler(settings: LaunchSettings) -> dict[str, Any]:
    serve = settings.kubernetes.serve
    target = {"type": "Utilization", "averageUtilization": serve.cpu_target}
    return {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": _named(settings),
        "spec": {
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": settings.name},
            "minReplicas": serve.replicas,
            "maxReplicas": serve.max_replicas,
            "metrics": [{"type": "Resource", "resource": {"name": "cpu", "target": target}}],
        },
    }


def _disruption_budget(settings: LaunchSettings) -> dict[str, Any]:
    """One pod at a time may be moved: a minimum would forbid that altogether where there is one replica."""
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": _named(settings),
        "spec": {"maxUnavailable": 1, "selector": {"matchLabels": _labels(settings)}},
    }
