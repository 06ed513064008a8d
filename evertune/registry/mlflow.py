"""Mirrors the versions of a registry to MLflow."""

from __future__ import annotations

import hashlib
import json
import os
import re
from typing import TYPE_CHECKING, Any

from evertune.registry.registry import RegistryError
from evertune.registry.version import Version

if TYPE_CHECKING:
    from mlflow import MlflowClient  # type: ignore[import-not-found]

MODEL = "model"
ALIAS = "production"
MAX_TAG = 5_000
"""Maximum length of a tag in characters that every MLflow server accepts."""

_NO_METRIC_NAME = re.compile(r"[^\w\-. /]")
_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
"""Environment variables that are set unless the user has: by default MLflow retries for minutes, and prints URLs."""


class MLflowMirror:
    """Mirrors versions to MLflow's model registry: metrics, lineage, verdict, and which one is in production.

    The registry remains authoritative; nothing is ever read back. Each version becomes a run with its metrics and a
    model version with tags (``evertune.version``, ``evertune.parent``, ``evertune.digest``, ...). MLflow numbers its
    model versions itself: look for the tag. Mirroring a version again changes only the alias ``production``.

    Requires the extra ``evertune[mlflow]``. If the server is unreachable, the mirror gives up after seconds instead of
    MLflow's minutes, unless ``MLFLOW_HTTP_REQUEST_MAX_RETRIES`` is set.

    Args:
        tracking_uri: MLflow's server, or any other tracking URI of MLflow; None for MLflow's own setting
            (``MLFLOW_TRACKING_URI``).
        name: Name of the registered model, and of the experiment with the runs; each registry needs its own.
        upload: Whether to copy the model's files to MLflow. If False, the model versions point to the files in the
            registry. None copies them only if a pointer would not work: from a local folder to a server.

    Example::

        mirror = MLflowMirror("http://mlflow.internal:5000", name="news-topics")
        mirror.mirror(registry.production, production=True)
    """

    def __init__(self, tracking_uri: str | None = None, name: str = "evertune", upload: bool | None = None) -> None:
        if not name or set(name) & set("/:"):
            raise ValueError(f"name must not be empty and have no / or :, got {name!r}")
        self.tracking_uri = tracking_uri
        self.name = name
        self.upload = upload

    def mirror(self, version: Version, production: bool) -> str:
        """Mirror a version to MLflow. Idempotent.

        Args:
            version: Version of the registry.
            production: Whether the version is in production now, so that it gets the alias ``production``.

        Returns:
            The number that MLflow has given to the model version.

        Raises:
            ModuleNotFoundError: If the extra ``evertune[mlflow]`` is not installed.
            RegistryError: If MLflow cannot be reached or refuses the request, or holds a version of another registry
                under this name.
        """
        try:
            from mlflow import MlflowClient
            from mlflow.exceptions import MlflowException  # type: ignore[import-not-found]
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError('the mirror needs MLflow: pip install "evertune[mlflow]"') from error

        for variable, value in _SETTINGS.items():
            os.environ.setdefault(variable, value)
        client = MlflowClient(self.tracking_uri)
        try:
            # The alias is moved last, so that it never names a model version that is incomplete.
            number = self._find(client, version) or self._create(client, version)
            if production:
                client.set_registered_model_alias(self.name, ALIAS, number)
        except (MlflowException, OSError) as error:
            raise RegistryError(
                f"version {version.number} is not mirrored as {self.name!r} in MLflow at {client.tracking_uri}: {error}"
            ) from error
        return number

    def _find(self, client: MlflowClient, version: Version) -> str | None:
        """The number of the model version that already mirrors a version; None if there is none."""
        where = f"name = '{_quoted(self.name)}' and tags.`evertune.version` = '{version.number}'"
        for found in client.search_model_versions(where):
            if found.tags.get("evertune.digest") != digest(version):
                raise RegistryError(
                    f"MLflow has another version {version.number} under the name {self.name!r}, of the registry "
                    f"{found.tags.get('evertune.registry')}: give each registry a name of its own"
                )
            return str(found.version)
        return None

    def _create(self, client: MlflowClient, version: Version) -> str:
        from mlflow.exceptions import MlflowException

        try:
            client.create_registered_model(self.name, description="Mirrored by evertune; the registry is what counts.")
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        tags, words = _tags(version), _words(version)
        # The run comes before the model version: the latter is what marks a version as mirrored.
        run = self._run(client, version, tags | {"mlflow.note.content": words[:MAX_TAG]})
        source = f"{version.store.address(f'versions/{version.number}')}/{MODEL}"
        server = client.tracking_uri.startswith(("http://", "https://", "databricks"))
        if version.store.is_local and server if self.upload is None else self.upload:
            client.log_artifacts(run.info.run_id, str(version.verified_folder(MODEL) / MODEL), MODEL)
            source = f"{run.info.artifact_uri}/{MODEL}"
        created = client.create_model_version(
            self.name, source, run.info.run_id, tags=tags, description=words[:MAX_TAG], await_creation_for=0
        )
        return str(created.version)

    def _run(self, client: MlflowClient, version: Version, tags: dict[str, str]) -> Any:
        """The run with the metrics of a version: an unfinished one of an earlier attempt, or a new one."""
        from mlflow.entities import Metric  # type: ignore[import-not-found]

        experiment = client.get_experiment_by_name(self.name)
        number = experiment.experiment_id if experiment else client.create_experiment(self.name)
        mine = f"tags.`evertune.version` = '{version.number}' and tags.`evertune.digest` = '{digest(version)}'"
        found = client.search_runs([number], mine, max_results=1)
        run = found[0] if found else client.create_run(number, tags=tags, run_name=f"version {version.number}")
        time = int(version.created.timestamp() * 1000)
        metrics = [Metric(name, value, time, version.number) for name, value in _metrics(version).items()]
        for start in range(0, len(metrics), 1000):  # MLflow's limit per request
            client.log_batch(run.info.run_id, metrics=metrics[start : start + 1000])
        client.set_terminated(run.info.run_id)
        return run


def digest(version: Version) -> str:
    """A hash that identifies the files of a version: the SHA-256 of the names and hashes in its manifest."""
    return hashlib.sha256(json.dumps(version.manifest.files, sort_keys=True).encode()).hexdigest()


def _words(version: Version) -> str:
    return version.manifest.summary


def _tags(version: Version) -> dict[str, str]:
    manifest = version.manifest
    tags = {
        "version": version.number,
        "parent": version.parent,
        "digest": digest(version),
        "verdict": "passed" if version.passed else "refused",
        "registry": version.store.root,
        "experience": version.experience,
        "created": manifest.created.isoformat(),
        **{name: getattr(manifest, name) for name in ("kind", "reason", "consumed", "offset", "module", "code")},
    }
    shown = {name: value if isinstance(value, str) else json.dumps(value) for name, value in tags.items()}
    return {f"evertune.{name}": value[:MAX_TAG] for name, value in shown.items() if tags[name] not in (None, "")}


def _metrics(version: Version) -> dict[str, float]:
    """All counts and measurements, by names that are valid in MLflow.

    Slices whose names differ only in characters that are invalid in MLflow share a metric.
    """
    manifest = version.manifest.to_dict()
    found = _flat({name: manifest[name] for name in ("metrics", "records", "seconds")})
    return {_NO_METRIC_NAME.sub("_", name.removeprefix("metrics/"))[:250]: value for name, value in found.items()}


def _flat(values: Any, prefix: str = "") -> dict[str, float]:
    """The numbers in nested dictionaries, by their path.

    Example:
        >>> _flat({"accuracy": {"sport": 0.9, "tech": None}, "n": 3})
        {'accuracy/sport': 0.9, 'n': 3.0}
    """
    if isinstance(values, dict):
        parts = [_flat(inner, f"{prefix}/{name}" if prefix else str(name)) for name, inner in values.items()]
        return {name: value for part in parts for name, value in part.items()}
    return {prefix: float(values)} if isinstance(values, int | float) and not isinstance(values, bool) else {}


def _quoted(name: str) -> str:
    return name.replace("'", "''")
