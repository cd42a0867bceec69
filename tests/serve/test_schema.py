"""Requests that are made from the OpenAPI document find no answer of 500 or above."""

from __future__ import annotations

import hypothesis
import pytest
import schemathesis
from schemathesis.checks import not_a_server_error

from tests.serve.served import Served

OPERATIONS = {
    ("GET", "/v1/models"), ("GET", "/v1/models/{name}"), ("POST", "/v1/completions"), ("POST", "/v1/chat/completions"),
    ("GET", "/v1/stream"), ("GET", "/health"), ("GET", "/metrics"),
}  # fmt: skip

RIGHT, WRONG = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE


@pytest.fixture(scope="module")
def document(served: Served) -> schemathesis.schemas.BaseSchema:
    return schemathesis.openapi.from_url(f"{served.url}/openapi.json")


def test_the_document_lists_every_operation(document: schemathesis.schemas.BaseSchema) -> None:
    found = {(one.ok().method.upper(), one.ok().path) for one in document.get_all_operations()}
    assert found == OPERATIONS


@pytest.mark.parametrize(("method", "path", "mode"), [
    *((method, path, RIGHT) for method, path in sorted(OPERATIONS)),
    *((method, path, WRONG) for method, path in sorted(OPERATIONS) if method == "POST"),
])  # fmt: skip
def test_no_request_breaks_the_server(document: schemathesis.schemas.BaseSchema, served: Served, method: str,
                                      path: str, mode: schemathesis.GenerationMode) -> None:
    operation = document[path][method]

    @hypothesis.settings(max_examples=15 if method == "POST" else 4, deadline=None, derandomize=True, database=None,
                         phases=[hypothesis.Phase.generate], suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(operation.as_strategy(generation_mode=mode))
    def check(case: schemathesis.Case) -> None:
        for given in (case.body, case.query):
            if isinstance(given, dict) and ("prompt" in given or "messages" in given):
                shorten(given)
        answer = case.call(base_url=served.url, timeout=30)
        case.validate_response(answer, checks=(not_a_server_error,))

    check()


def shorten(given: dict[str, object]) -> None:
    """Ask for few tokens, unless the number itself is what is wrong."""
    for name in ("max_tokens", "max_completion_tokens"):
        if isinstance(given.setdefault(name, 2) if name == "max_tokens" else given.get(name), int):
            given[name] = min(given[name], 2)  # type: ignore[call-overload]
