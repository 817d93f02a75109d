"""Which keys open a listener: from a file or from the environment, so that `ps` shows none of them."""

from __future__ import annotations

import hashlib
import hmac
import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from tarragon.config import ADMIN_KEY_VARIABLE, API_KEY_VARIABLE, Config

KEY_CHARACTERS_MIN: Final = 16
"""A shorter key could be guessed."""
KEY_CHARACTERS_MAX: Final = 1_024
KEYS_MAX: Final = 64
"""Every one of them is compared with what each request shows."""
_FILE_BYTES_MAX: Final = KEYS_MAX * (KEY_CHARACTERS_MAX + 1)


class KeyFileError(ValueError):
    """A key cannot be read, or is no good; the text is one sentence without the key."""


class Keys:
    """The keys of one listener, as digests. False if there are none: then everybody may enter."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [_digest(key) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def admit(self, authorization: str) -> bool:
        """Whether an Authorization header shows one of the keys as a bearer token.

        Digests are compared, all of them and each in constant time: neither the length of a key, nor how
        much of it was right, nor which of several it was can be told from the time.
        """
        scheme, _, shown = authorization.partition(" ")
        given = _digest(shown)
        found = False
        for digest in self._digests:
            found |= hmac.compare_digest(given, digest)
        return found and scheme.lower() == "bearer"


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def api_keys(config: Config, environ: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """The keys of the OpenAI-compatible API; none if none are set. Raises KeyFileError."""
    return read_keys(config.api_key_file, API_KEY_VARIABLE, environ)


def admin_keys(config: Config, environ: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """The keys of the admin API; none if none are set. Raises KeyFileError."""
    return read_keys(config.admin_key_file, ADMIN_KEY_VARIABLE, environ)


def read_keys(file: str, variable: str, environ: Mapping[str, str]) -> tuple[str, ...]:
    """The keys in ``file`` (a path, or "") and in an environment variable: one a line, # begins a comment.

    Raises KeyFileError if the file cannot be read, may be read by every user, or has no key; and for a key
    that is too short, too long, or not of printable ASCII characters.
    """
    found: list[str] = []
    for place, text in ((file, _text(Path(file)) if file else ""), (variable, environ.get(variable, ""))):
        lines = [line.strip() for line in text.splitlines()]
        keys = [line for line in lines if line and not line.startswith("#")]
        for key in keys:
            _check(place, key)
        if place == file and file and not keys:
            raise KeyFileError(f"{file} has no key: it should have one a line")
        found += keys
    if len(found) > KEYS_MAX:
        raise KeyFileError(f"{file or variable} has {len(found)} keys, at most {KEYS_MAX} are allowed")
    return tuple(found)


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if stat.S_ISREG(mode) and mode & stat.S_IROTH:
                raise KeyFileError(f"every user of this host may read the keys in {path}: chmod o-r {path}")
            raw = file.read(_FILE_BYTES_MAX + 1)
    except OSError as error:
        raise KeyFileError(f"the keys in {path} cannot be read: {error.strerror}") from error
    if len(raw) > _FILE_BYTES_MAX:
        raise KeyFileError(f"{path} is longer than {_FILE_BYTES_MAX} bytes: it should have one key a line")
    return raw.decode("utf-8", "replace")


def _check(place: str, key: str) -> None:
    if not KEY_CHARACTERS_MIN <= len(key) <= KEY_CHARACTERS_MAX:
        raise KeyFileError(
            f"a key in {place} has {len(key)} characters, "
            f"but it must have {KEY_CHARACTERS_MIN} to {KEY_CHARACTERS_MAX}"
        )
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise KeyFileError(f"a key in {place} has characters that are not printable ASCII")
