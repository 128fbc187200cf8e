"""The OpenAPI document is true, and whatever it allows, and whatever it does not, is answered without a fault."""

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from hypothesis import given as given_by
from stub_backend import HOME, Server

EXAMPLES = 3
"""Requests of each kind and each route; `make test-serve` sends more."""
PATHS = {
    "/v1/videos",
    "/v1/videos/edits",
    "/v1/videos/extensions",
    "/v1/videos/characters",
    "/v1/videos/characters/{character_id}",
    "/v1/videos/{video_id}",
    "/v1/videos/{video_id}/content",
    "/v1/videos/{video_id}/remix",
    "/v1/models",
    "/healthz",
    "/readyz",
    "/metrics",
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Server:
    server = Server(tmp_path_factory.mktemp("server"))
    server.http.post("/v1/videos", json={"prompt": "a ring", "seconds": 1})
    server.work()
    return server


@pytest.fixture(scope="module")
def document(server: Server) -> dict:
    return server.http.get("/openapi.json").json()


def test_every_route_and_body_is_described(document: dict):
    assert set(document["paths"]) == PATHS
    body = document["paths"]["/v1/videos"]["post"]["requestBody"]["content"]
    assert set(body) == {"application/json", "multipart/form-data"}
    for content in body.values():
        fields = content["schema"]["properties"]
        assert {"prompt", "seconds", "size", "model", "input_reference"} <= set(fields)
        assert {"frames", "fps", "steps", "guidance_scale", "seed", "storyboard"} <= set(fields)
        assert all(field.get("description") for name, field in fields.items()), fields
    form = body["multipart/form-data"]["schema"]["properties"]
    assert form["input_reference"]["format"] == "binary"


@pytest.mark.parametrize(
    "examples",
    [EXAMPLES, pytest.param(60, marks=pytest.mark.slow)],
)
def test_no_request_meets_a_fault(server: Server, examples: int):
    schema = schemathesis.openapi.from_asgi("/openapi.json", server.app)
    tried = set()
    for operation in schema.get_all_operations():
        case = operation.ok()
        tried.add(case.path)

        @settings(
            max_examples=examples,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
            derandomize=True,
            database=None,
        )
        @given_by(case.as_strategy())
        def one(request) -> None:
            answer = request.call(base_url=HOME)
            assert answer.status_code < 500, (request.as_curl_command(), answer.text)
            if answer.status_code >= 400:
                error = answer.json()["error"]
                assert set(error) == {"message", "type", "param", "code"}

        one()
    assert tried == PATHS
