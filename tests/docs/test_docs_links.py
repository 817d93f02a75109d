"""Links between the pages, to pictures, and to files of the repository lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tests.docs_pages import (
    OTHER,
    PAGES,
    ROOT,
    SESSION,
    SHELL,
    UNMARKED,
    anchors,
    blocks,
    inline_code,
    links,
    name_of,
)

GENERATED = {"docs/evaluation.md"}
"""Made by `make evaluation`; it may not be there yet."""
_FILE = re.compile(r"(?:src|tests|docs|deploy)/[\w./-]+\.(?:py|md|json|yml|png|toml)")

pages = pytest.mark.parametrize("page", PAGES, ids=name_of)


@pages
def test_links_and_pictures_lead_somewhere(page: Path) -> None:
    for link in links(page):
        if link.startswith(("https://", "http://", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if name_of(target) in GENERATED:
            continue
        assert target.exists(), f"{name_of(page)} links to {link}, which is not there"
        if anchor:
            assert anchor in anchors(target), f"{name_of(page)} links to {link}, but there is no such heading"


@pages
def test_files_that_are_named_exist(page: Path) -> None:
    for code in inline_code(page):
        for file in _FILE.findall(code):
            assert (ROOT / file).exists() or file in GENERATED, f"{name_of(page)} names {file}"


@pages
def test_languages_of_blocks_are_known(page: Path) -> None:
    known = {*SHELL, SESSION, UNMARKED, *OTHER}
    for block in blocks(page):
        assert block.language in known, f"{name_of(page)}:{block.line} is in {block.language!r}"


def test_every_page_is_reached_from_the_readme() -> None:
    reached, todo = set(), [ROOT / "README.md"]
    while todo:
        page = todo.pop()
        if page in reached or not page.is_file():
            continue
        reached.add(page)
        todo += [
            (page.parent / link.partition("#")[0]).resolve()
            for link in links(page)
            if "://" not in link and link.partition("#")[0].endswith(".md")
        ]
    assert {name_of(page) for page in PAGES} <= {name_of(page) for page in reached}
