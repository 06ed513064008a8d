"""The description of the endpoints: OpenAPI for machines, and a page for people."""

from __future__ import annotations

import json
from functools import cache
from html import escape
from importlib.metadata import version
from importlib.resources import files
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from evertune.serve.messages import (
    Accepted,
    Answer,
    Answers,
    Error,
    Explain,
    Explained,
    Feedback,
    Feedbacks,
    Many,
    One,
    TaskAnswer,
)

_REFUSALS = {
    "400": "The body is not JSON",
    "401": "The API key or token is missing, wrong or expired",
    "403": "The API key or token does not have the scope",
    "408": "The body did not arrive in time",
    "413": "The body is too large",
    "415": "The body is not declared as JSON",
    "422": "The body does not fit",
    "429": "Too many requests; Retry-After says when to try again",
    "503": "No version is loaded yet, or there was no answer in time",
}


@cache
def specification() -> dict[str, Any]:
    """The OpenAPI 3.1 document."""
    models: list[type[BaseModel]] = [
        One,
        Many,
        Answer,
        TaskAnswer,
        Answers,
        Explain,
        Explained,
        Feedback,
        Feedbacks,
        Accepted,
        Error,
    ]
    _, schemas = models_json_schema(
        [(model, "validation") for model in models], ref_template="#/components/schemas/{model}"
    )
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "evertune serve",
            "version": version("evertune"),
            "description": "Answers of the version in production.",
        },
        "paths": {
            "/predict": {
                "post": _operation(
                    "Answer one text, or several", [One, Many], [Answer, TaskAnswer, Answers], {"text": "Shares fell."}
                )
            },
            "/explain": {
                "post": _operation(
                    "Say why a text gets its label: the words that count, and the nearest examples of the memory",
                    [Explain],
                    [Explained],
                    {"text": "Shares fell.", "neighbours": 3},
                )
            },
            "/feedback": {
                "post": _operation(
                    "Send the right label of a record, or of several, once it is known",
                    [Feedback, Feedbacks],
                    [Accepted],
                    {"id": "t-1", "label": "business"},
                    "202",
                )
            },
            "/health": {"get": _plain("Whether the process works (liveness)", "Why it does not")},
            "/ready": {"get": _plain("Which versions answer (readiness)", "No version is loaded, or it is ending")},
            "/metrics": {"get": _plain("Metrics for Prometheus")},
            "/openapi.json": {"get": _plain("This document")},
            "/docs": {"get": _plain("This document as a page")},
        },
        "components": {
            "schemas": schemas["$defs"],
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer", "description": "An API key or a token"}},
        },
        "security": [{"key": []}, {}],
    }


def _operation(summary: str, bodies: list[Any], answers: list[Any], example: Any, status: str = "200") -> Any:
    content = {"schema": {"anyOf": [_reference(body) for body in bodies]}, "example": example}
    refused = {"application/json": {"schema": _reference(Error)}}
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": {"application/json": content}},
        "responses": {
            status: {
                "description": "Answered",
                "content": {"application/json": {"schema": {"anyOf": [_reference(answer) for answer in answers]}}},
            },
            **{code: {"description": words, "content": refused} for code, words in _REFUSALS.items()},
        },
    }


def _plain(summary: str, problem: str | None = None) -> Any:
    responses = {"200": {"description": "OK"}} | ({"503": {"description": problem}} if problem else {})
    return {"summary": summary, "responses": responses}


def _reference(model: Any) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{model.__name__}"}


@cache
def page() -> str:
    """The description as a page of HTML without scripts."""
    described = specification()
    parts = []
    for path, methods in described["paths"].items():
        for method, operation in methods.items():
            parts.append(f"<h2><code>{method.upper()} {escape(path)}</code></h2><p>{escape(operation['summary'])}</p>")
            if "requestBody" in operation:
                example = json.dumps(operation["requestBody"]["content"]["application/json"]["example"])
                parts.append(
                    f"<pre>curl http://127.0.0.1:8000{escape(path)} -H 'Content-Type: application/json' \\\n"
                    f"    -d '{escape(example)}'</pre>"
                )
            rows = "".join(
                f"<tr><td>{code}</td><td>{escape(answer['description'])}</td></tr>"
                for code, answer in operation["responses"].items()
            )
            parts.append(f"<table><tr><th>status</th><th>meaning</th></tr>{rows}</table>")
    parts.append("<h2>Messages</h2>")
    for name, schema in described["components"]["schemas"].items():
        parts.append(f"<h3>{escape(name)}</h3><p>{escape(schema.get('description', ''))}</p>{_fields(schema)}")
    frame = (files("evertune.serve") / "docs.html").read_text(encoding="utf-8")
    return frame.replace("{{ content }}", "\n".join(parts)).replace("{{ version }}", described["info"]["version"])


def _fields(schema: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><td><code>{escape(name)}</code></td><td>{escape(_type(field))}</td>"
        f"<td>{'yes' if name in schema.get('required', ()) else ''}</td>"
        f"<td>{escape(field.get('description', ''))}</td></tr>"
        for name, field in schema.get("properties", {}).items()
    )
    return f"<table><tr><th>field</th><th>type</th><th>required</th><th></th></tr>{rows}</table>"


def _type(field: dict[str, Any]) -> str:
    if "$ref" in field:
        return str(field["$ref"]).rpartition("/")[2]
    if "anyOf" in field:
        return " or ".join(map(_type, field["anyOf"]))
    if field.get("type") == "array":
        return f"list of {_type(field['items'])}"
    return str(field.get("type", "any"))
