"""The documentation as data: its pages, the commands in their code blocks, their links and headings."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]
PAGES: Final = (*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")))

SHELL: Final = frozenset({"sh", "bash"})
"""Languages of blocks in which every line is a command."""
SESSION: Final = "console"
"""Language of blocks in which lines that begin with "$ " are commands and the others what they print."""
UNMARKED: Final = ""
"""A block without a language may hold anything: lines that begin with a known program are commands."""
PROGRAMS: Final = frozenset(
    {"apt", "cat", "cd", "curl", "git", "kill", "make", "mkdir", "pip", "python", "ssh"}
)
OTHER: Final = frozenset({"json", "mermaid", "python", "toml", "yaml", "text", "ini"})
"""Languages of blocks that hold no commands."""
_ASSIGNMENT: Final = re.compile(r"[A-Z_]+=\S*")
_INLINE: Final = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_LINK: Final = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_HEADING: Final = re.compile(r"^#{1,6}\s+(.+?)\s*$")
_FENCE: Final = re.compile(r"^\s*```(\w*)\s*$")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, and its lines without the fences."""

    page: Path
    line: int
    language: str
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Command:
    """A command as the page has it, on one line, without its comment."""

    text: str
    where: str

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text)

    @property
    def assignments(self) -> dict[str, str]:
        """Environment variables that are set in front of the command."""
        found = {}
        for word in self.words:
            if not _ASSIGNMENT.fullmatch(word):
                break
            name, _, value = word.partition("=")
            found[name] = value
        return found

    @property
    def argv(self) -> list[str]:
        """The words behind the assignments."""
        return self.words[len(self.assignments) :]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page, in order; a fence that is never closed is an AssertionError."""
    language, begin, lines = None, 0, []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        fence = _FENCE.match(line)
        if language is None:
            if fence:
                language, begin, lines = fence[1], number, []
        elif fence and not fence[1]:
            yield Block(page, begin, language, tuple(lines))
            language = None
        else:
            lines.append(line)
    assert language is None, f"{name_of(page)}:{begin}: this block has no end"


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    kept, is_inside = [], False
    for line in page.read_text(encoding="utf-8").splitlines():
        if _FENCE.match(line):
            is_inside = not is_inside
        elif not is_inside:
            kept.append(line)
    return "\n".join(kept)


def commands(block: Block) -> Iterator[Command]:
    """The commands of a block, lines that end in a backslash joined with those that follow."""
    if block.language in OTHER:
        return
    joined, begin = "", block.line
    for number, line in enumerate(block.lines, block.line + 1):
        if not joined:
            begin = number
        if block.language == SESSION and not joined:
            if not line.startswith("$ "):
                continue
            line = line[2:]
        joined += line
        if joined.endswith("\\"):
            joined = joined[:-1]
            continue
        text, joined = _without_comment(joined), ""
        if text and (block.language != UNMARKED or _begins_with_a_program(text)):
            yield Command(text, f"{name_of(block.page)}:{begin}")


def all_commands() -> list[Command]:
    """The commands of all pages, each distinct one once, in the order of the pages."""
    found: dict[str, Command] = {}
    for page in PAGES:
        for block in blocks(page):
            for command in commands(block):
                found.setdefault(command.text, command)
    return list(found.values())


def inline_code(page: Path) -> list[str]:
    """What stands between backticks in the text of a page, tables included."""
    return _INLINE.findall(prose(page))


def links(page: Path) -> list[str]:
    """Targets of links and pictures."""
    return _LINK.findall(_INLINE.sub("", prose(page)))


def anchors(page: Path) -> set[str]:
    """What headings of a page are called in links, by the rule of the usual renderers."""
    headings = [match[1] for line in prose(page).splitlines() if (match := _HEADING.match(line))]
    return {
        re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()).replace(" ", "-")
        for heading in headings
    }


def _without_comment(line: str) -> str:
    """The command of a line; a "#" begins a comment where a word could begin."""
    quote = ""
    for index, character in enumerate(line):
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character == "#" and (index == 0 or line[index - 1].isspace()):
            return line[:index].strip()
    return line.strip()


def _begins_with_a_program(text: str) -> bool:
    try:
        argv = Command(text, "").argv
    except ValueError:  # an apostrophe: it is no command
        return False
    return bool(argv) and (argv[0] in PROGRAMS or argv[0] == "tarragon" or argv[0].startswith(".venv/bin/"))
