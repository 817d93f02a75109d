"""The configuration as text: as a TOML file that says where each value came from, and as a reference."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import groupby
from typing import Any, Final

import msgspec

from tarragon.config import Config, Settings, flag_of
from tarragon.options import descriptions, group_title, unit

_REFERENCE_HEAD: Final = """\
# Configuration

<!-- Made from src/tarragon/config.py by `tarragon config --markdown`; a test compares the two. -->

Every setting has one name in three places. The later place wins:

1. a TOML file, named with `--config FILE`: `kv_cache_bytes = 268435456` in a table `[tarragon]`;
2. the environment: `TARRAGON_KV_CACHE_BYTES=268435456`;
3. a flag of `tarragon serve`: `--kv-cache-bytes 268435456`.

A name that is no setting is refused, in the file and among the flags, and the refusal names the nearest
setting. Of the environment, only names that look misspelt are refused.

`tarragon config` takes the same file, environment and flags, starts nothing, and prints the values that hold
and where each came from; what it prints is a valid file. `tarragon serve MODEL --dry-run` shows what they
mean for a model. Flags of `vllm serve` pass through `tarragon serve`; they are no settings of Tarragon.
"""
_COLUMNS: Final = "| setting | flag | default | unit | meaning |\n|---|---|---|---|---|"
_SECRET: Final = ("_key", "_secret")
"""How names of settings end whose values are not to be shown."""
_HIDDEN: Final = "(hidden)"


def as_toml(settings: Settings) -> str:
    """A file that sets what holds; each line ends with a comment on where the value came from."""
    texts = descriptions()
    lines = ["[tarragon]"]
    for group, names in groupby(texts, key=lambda name: texts[name].group):
        lines += ["", f"# {group}"]
        for name in names:
            value = getattr(settings.config, name)
            line = f"{name} = {toml_value(_HIDDEN if value and name.endswith(_SECRET) else value)}"
            lines.append(f"{line:<48}  # {settings.sources[name]}")
    return "\n".join(lines)


def toml_value(value: Any) -> str:
    """A number, truth value or string in TOML's notation."""
    return repr(value) if isinstance(value, float) else json.dumps(value)


def reference() -> str:
    """docs/configuration.md: every setting with its default, unit and whole description."""
    return "\n".join([_REFERENCE_HEAD, *_tables()]).rstrip() + "\n"


def _tables() -> Iterator[str]:
    texts = descriptions()
    fields = {field.name: field for field in msgspec.structs.fields(Config)}
    for group, names in groupby(texts, key=lambda name: texts[name].group):
        yield f"## {group_title(group)}\n\n{_COLUMNS}"
        for name in names:
            default = toml_value(fields[name].default)
            text = texts[name].text.replace("|", "\\|")
            yield f"| `{name}` | `{flag_of(name)}` | `{default}` | {unit(fields[name])} | {text} |"
        yield ""
