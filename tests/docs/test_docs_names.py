"""Settings, metrics and error messages that the documentation names are those of the code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from tests.docs_pages import PAGES, ROOT, inline_code, name_of
from tests.metric_names import documented

from tarragon.config import Config

_METRIC = re.compile(r"\btarragon_[a-z0-9_]*[a-z0-9](?![a-z0-9_]*[*<])")
_SERIES = re.compile(r"_(bucket|sum|count)$")
_SETTING = re.compile(r"[a-z]+(?:_[a-z]+)+_(?:s|ms|us|bytes|max|min)")
ABOUT_SETTINGS = (
    "README.md",
    "docs/failures.md",
    "docs/guarantees.md",
    "docs/operations.md",
    "docs/security.md",
)
"""Pages in which a name with a unit is a setting, if it is no metric."""
MESSAGES_OF = ("src/tarragon/gateway", "src/tarragon/refe", "src/tarragon/attention")
_MESSAGE = re.compile(r"`([^`]{12,})`")
FRAGMENT_MIN = 6
"""Characters; what is shorter says nothing."""


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_metrics_that_are_named_are_documented(page: Path) -> None:
    named = {_SERIES.sub("", name) for code in inline_code(page) for name in _METRIC.findall(code)}
    assert named <= {_SERIES.sub("", name) for name in documented()} | {"tarragon_worker_"}


@pytest.mark.parametrize("name", ABOUT_SETTINGS)
def test_settings_that_are_named_exist(name: str) -> None:
    named = {code for code in inline_code(ROOT / name) if _SETTING.fullmatch(code)}
    assert named <= set(Config.__struct_fields__)


def strings(tree: ast.AST) -> Iterator[str]:
    """The constant parts of all strings, those between the braces of f-strings left out."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


@cache
def spoken() -> str:
    """All that the gateway and the attention workers, and vLLM's exceptions, can say."""
    import importlib.util

    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    files = [file for folder in MESSAGES_OF for file in sorted((ROOT / folder).glob("*.py"))]
    files.append(Path(spec.origin).parent / "exceptions.py")
    found = [text for file in files for text in strings(ast.parse(file.read_text(encoding="utf-8")))]
    return "\n".join(found)


def is_spoken(fragment: str) -> bool:
    """Whether the code says it, in one string or in two that are put together."""
    cuts = range(FRAGMENT_MIN, len(fragment) - FRAGMENT_MIN)
    return fragment in spoken() or any(fragment[:n] in spoken() and fragment[n:] in spoken() for n in cuts)


def test_messages_of_errors_are_those_of_the_code() -> None:
    errors = (ROOT / "docs/api.md").read_text(encoding="utf-8").partition("### Errors")[2]
    rows = [line for line in errors.partition("## The admin API")[0].splitlines() if line.startswith("| ")]
    own = [row for row in rows if not re.match(r"\| (404|429|503|message|status) ", row)]
    messages = [message for row in own for message in _MESSAGE.findall(row) if " " in message]
    assert len(messages) > 12
    for message in messages:
        if message.startswith("Authorization"):
            continue
        fragments = [part.strip(" :;,'") for part in message.split("...")]
        for fragment in fragments:
            assert len(fragment) < FRAGMENT_MIN or is_spoken(fragment), f"nothing says: {message}"
