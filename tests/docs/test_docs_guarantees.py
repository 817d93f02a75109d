"""Every promise names tests and benchmarks that exist."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest
from tests.docs_pages import PAGES, ROOT, inline_code, name_of

from tarragon import cli

GUARANTEES = ROOT / "docs/guarantees.md"
_TEST = re.compile(r"(tests/[\w/]+\.py)::(\w+)")
_BENCHMARK = re.compile(r"tarragon bench ([a-z-]+)")
_SECTION = re.compile(r"^## \d+\. (.+)$", re.MULTILINE)
MEASURED_ONLY = {"Protection costs little"}
"""Promises about speed, which no test asserts."""


@cache
def functions(file: Path) -> frozenset[str]:
    """Names of the functions at the top of a module."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    body = ast.parse(file.read_text(encoding="utf-8")).body
    return frozenset(node.name for node in body if isinstance(node, kinds))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_tests_that_are_named_exist(page: Path) -> None:
    for code in inline_code(page):
        for file, name in _TEST.findall(code):
            assert (ROOT / file).is_file(), f"{name_of(page)} names {file}"
            assert name in functions(ROOT / file), f"{name_of(page)} names {file}::{name}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_benchmarks_that_are_named_exist(page: Path) -> None:
    names = {name for code in inline_code(page) for name in _BENCHMARK.findall(code)}
    assert {name.replace("-", "_") for name in names} <= set(cli._benchmarks())


def test_every_promise_names_what_holds_it() -> None:
    text = GUARANTEES.read_text(encoding="utf-8").partition("## What is not promised")[0]
    titles = _SECTION.findall(text)
    sections = _SECTION.split(text)[2::2]
    assert len(titles) == len(sections) > 5
    for title, section in zip(titles, sections, strict=True):
        pattern = _BENCHMARK if title in MEASURED_ONLY else _TEST
        assert pattern.search(section), f"nothing holds the promise {title!r}"


def test_every_line_of_a_table_names_a_test() -> None:
    for line in GUARANTEES.read_text(encoding="utf-8").splitlines():
        if line.startswith("| ") and not line.endswith("| held by |"):
            assert _TEST.search(line), f"no test holds: {line}"
