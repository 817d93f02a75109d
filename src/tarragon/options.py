"""Every setting as a command-line option: name, type, default, help and group come from config.py itself."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from tarragon import config as config_module
from tarragon.config import Config

_GROUP = re.compile(r"^    # --- (.+)$")


def settings_help(source: str) -> dict[str, tuple[str, str]]:
    """Map each field of class Config in ``source`` to its group (the ``# ---`` comment) and docstring."""
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
        found[node.target.id] = (groups[max(above)] if above else "settings", text)
    return found


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a typer command whose last parameter is ``settings: dict[str, Any]`` one option per setting.

    It receives the options that were given, and no others: the file and the environment set the rest.
    """
    own = [
        param
        for param in inspect.signature(command, eval_str=True).parameters.values()
        if param.name != "settings"
    ]
    texts = settings_help(Path(config_module.__file__).read_text(encoding="utf-8"))
    added = [_parameter(field, *texts[field.name]) for field in msgspec.structs.fields(Config)]

    def run(**values: Any) -> None:
        names = [param.name for param in own]
        settings = {name: value for name, value in values.items() if name not in names and value is not None}
        command(**{name: values[name] for name in names}, settings=settings)

    run.__signature__ = inspect.Signature([*own, *added])  # type: ignore[attr-defined]
    run.__annotations__ = {param.name: param.annotation for param in [*own, *added]}
    run.__doc__ = command.__doc__
    run.__name__ = command.__name__
    return run


def _parameter(field: msgspec.structs.FieldInfo, group: str, text: str) -> inspect.Parameter:
    kind = field.type if field.type in (int, float, str, bool) else str
    option = typer.Option(
        "--" + field.name.replace("_", "-"),
        help=text,
        show_default=str(field.default),
        rich_help_panel=group[:1].upper() + group[1:],
    )
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )
