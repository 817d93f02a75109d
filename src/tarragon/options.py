"""Every setting as a command-line option: name, type, default, help and group come from config.py itself."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Final, NamedTuple

import msgspec
import typer

from tarragon import config as config_module
from tarragon.config import Config, flag_of

_GROUP: Final = re.compile(r"^    # --- (.+)$")
_SENTENCE_END: Final = re.compile(r"(?<=[.!?])\s+(?=[A-Z0-9\"])")
_UNITS: Final = {"bytes": "bytes", "s": "seconds", "ms": "milliseconds", "us": "microseconds"}


class Description(NamedTuple):
    """What config.py says about a setting: the ``# ---`` comment above it and its docstring."""

    group: str
    text: str

    @property
    def line(self) -> str:
        """The first sentence."""
        return _SENTENCE_END.split(self.text, maxsplit=1)[0]


def settings_help(source: str) -> dict[str, Description]:
    """Map each field of class Config in ``source`` to its description, in the order of the file."""
    groups = {
        number: match[1]
        for number, line in enumerate(source.splitlines(), 1)
        if (match := _GROUP.match(line))
    }
    [body] = [
        node.body
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef) and node.name == "Config"
    ]
    found = {}
    for node, following in zip(body, [*body[1:], None], strict=True):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        above = [number for number in groups if number < node.lineno]
        text = ""
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            text = " ".join(str(following.value.value).split())
        found[node.target.id] = Description(groups[max(above)] if above else "settings", text)
    return found


def descriptions() -> dict[str, Description]:
    """The description of every setting."""
    return settings_help(Path(config_module.__file__).read_text(encoding="utf-8"))


def unit(field: msgspec.structs.FieldInfo) -> str:
    """What a value of a setting is counted in, by its name: "seconds", "bytes"; else its type in a word."""
    words = field.name.removesuffix("_max").removesuffix("_min").split("_")
    if field.type in (int, float):
        return _UNITS.get(words[-1], "number")
    return {bool: "yes or no", str: "text"}.get(field.type, "text")


def group_title(group: str) -> str:
    return group[:1].upper() + group[1:]


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a typer command whose last parameter is ``settings: dict[str, Any]`` one option per setting.

    It receives the options that were given, and no others: the file and the environment set the rest.
    """
    own = [
        param
        for param in inspect.signature(command, eval_str=True).parameters.values()
        if param.name != "settings"
    ]
    texts = descriptions()
    added = [_parameter(field, texts[field.name]) for field in msgspec.structs.fields(Config)]

    def run(**values: Any) -> None:
        names = [param.name for param in own]
        settings = {name: value for name, value in values.items() if name not in names and value is not None}
        command(**{name: values[name] for name in names}, settings=settings)

    run.__signature__ = inspect.Signature([*own, *added])  # type: ignore[attr-defined]
    run.__annotations__ = {param.name: param.annotation for param in [*own, *added]}
    run.__doc__ = command.__doc__
    run.__name__ = command.__name__
    return run


def _parameter(field: msgspec.structs.FieldInfo, description: Description) -> inspect.Parameter:
    kind = field.type if field.type in (int, float, str, bool) else str
    flag = flag_of(field.name)
    option = typer.Option(
        f"{flag}/--no-{flag[2:]}" if kind is bool else flag,
        help=description.line,
        metavar=None if kind is bool else unit(field).upper(),
        show_default=str(field.default) or "none",
        rich_help_panel=group_title(description.group),
    )
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )
