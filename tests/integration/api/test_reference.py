"""What is written down about the API and the command line is what they are."""

import tomllib
from pathlib import Path

import httpx
import pytest

from bacalhau.server import openapi
from bacalhau.version import VERSION
from tools.reference import pages

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    "name", ["docs/openapi.json", "docs/reference/rest.md", "docs/reference/cli.md"]
)
def test_generated_pages_are_current(name: str) -> None:
    assert (ROOT / name).read_text() == pages()[ROOT / name], "run python tools/reference.py"


def test_the_served_document_is_the_written_one(http: httpx.Client) -> None:
    assert http.get("/openapi.json").json() == openapi.document()


def test_every_operation_has_a_name_of_its_own_and_says_its_errors() -> None:
    document = openapi.document()
    operations = [op for path in document["paths"].values() for op in path.values()]
    names = [operation["operationId"] for operation in operations]
    assert len(names) == len(set(names))
    for operation in operations:
        for status, answer in operation["responses"].items():
            if status == "default" or (int(status) >= 400 and status != "416"):
                schema = answer["content"]["application/json"]["schema"]
                assert schema == {"$ref": "#/components/schemas/ErrorModel"}, operation[
                    "operationId"
                ]


def test_one_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project.get("version", VERSION) == VERSION
