"""docs/api.md has exactly the routes that are served, and the fields that they take."""

from __future__ import annotations

import re

import msgspec
import pytest
from tests.docs_pages import ROOT

from tarragon.config import Config
from tarragon.gateway.route_table import SERVED
from tarragon.orchestrator import status
from tarragon.orchestrator.status import StatusServer

PAGE = (ROOT / "docs/api.md").read_text(encoding="utf-8")
OPENAI, ADMIN = PAGE.split("\n## The admin API\n")
_ROUTE = re.compile(r"`((?:GET|POST|HEAD)) (/[^`]*)`")
_HEADING = re.compile(r"^### (GET|POST) (/\S*)$", re.MULTILINE)
BODIES = {
    "/kill": status._Kill,
    "/drain": status._Drain,
    "/add": status._Add,
    "/checkpointing": status._Checkpointing,
    "/protection": status._Protection,
    "/fault_tolerance/inject": status._Inject,
    "/fault_tolerance/apply": status._Apply,
}


def admin_routes() -> set[tuple[str, str]]:
    """Routes of the admin listener; the dashboard's other files are not told one by one."""
    server = StatusServer(None, Config())  # type: ignore[arg-type] # nothing is asked of it
    return {
        (method, path)
        for path, methods in server._routes.items()
        for method in methods
        if not path.startswith("/dashboard")
    }


def sections() -> dict[str, str]:
    """Map the path of each route of the admin API to its text."""
    parts = _HEADING.split(ADMIN)
    return dict(zip(parts[2::3], parts[3::3], strict=True))


def test_the_admin_routes_are_those_that_are_served() -> None:
    documented = _HEADING.findall(ADMIN)
    assert len(documented) == len(set(documented))
    assert set(documented) == admin_routes()


def test_the_gateways_routes_are_those_that_are_served() -> None:
    table = OPENAI.partition("### Where it differs")[0]
    assert set(_ROUTE.findall(table)) == {(m, path) for path, methods in SERVED.items() for m in methods}


def test_every_admin_route_has_an_example() -> None:
    for path, text in sections().items():
        assert f"curl -s http://127.0.0.1:8001{path}" in text.replace("curl -s '", "curl -s "), path


def test_every_body_is_known_here() -> None:
    assert set(BODIES) == {path for method, path in admin_routes() if method == "POST"}


@pytest.mark.parametrize("path", BODIES)
def test_the_fields_are_those_that_are_taken(path: str) -> None:
    table = re.findall(r"^\| `(\w+)` \|", sections()[path], re.MULTILINE)
    assert table == [field.name for field in msgspec.structs.fields(BODIES[path])]


def test_every_status_of_an_admin_error_is_told() -> None:
    source = (ROOT / "src/tarragon/orchestrator/status.py").read_text(encoding="utf-8")
    used = {getattr(status.HTTPStatus, name) for name in re.findall(r"HTTPStatus\.([A-Z_]+)", source)}
    told = {int(code) for code in re.findall(r"^\| (4\d\d) \|", ADMIN, re.MULTILINE)}
    assert told == {int(code) for code in used if 400 <= code < 500}
