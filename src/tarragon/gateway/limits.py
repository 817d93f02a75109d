"""How much one request may ask for, and in which words. Pure.

vLLM ignores parameters that it does not know, so that a misspelt one changes nothing and nobody is told. Here
they are a 400, and so is what would cost a worker, or the gateway itself, more than it should.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Final, NamedTuple

import msgspec

from tarragon.config import Config
from tarragon.gateway.refusal import Refusal

UNSUPPORTED: Final = frozenset({"kv_transfer_params", "ec_transfer_params"})
"""Parameters of vLLM's that would steer where a request's state comes from; that is Tarragon's matter."""
GRAMMARS: Final = ("response_format", "structured_outputs", "text", "output_config", "output_format")
"""Parameters that may hold a schema, a regular expression or a grammar."""
STRINGS: Final = ("stop", "stop_sequences", "bad_words")
TOKEN_LISTS: Final = ("stop_token_ids", "logit_bias")
NAME_CHARACTERS_SHOWN: Final = 100


class Limits(NamedTuple):
    """Of one request; see the settings of the same names."""

    prompt_tokens: int
    texts: int
    prompts: int
    stop_strings: int
    stop_string_chars: int
    token_lists: int
    grammar_bytes: int
    tools_bytes: int

    @staticmethod
    def of(config: Config, max_model_len: int) -> Limits:
        return Limits(
            max_model_len,
            config.texts_per_request_max,
            config.prompts_per_request_max,
            config.stop_strings_max,
            config.stop_string_chars_max,
            config.token_lists_max,
            config.grammar_bytes_max,
            config.tools_bytes_max,
        )


_Given = Mapping[str, msgspec.Raw]


def check_request(body: bytes, known: frozenset[str], limits: Limits) -> None:
    """Raise Refusal if ``body`` is a JSON object with a name not in ``known``, or asks for too much.

    Whatever else may be wrong with it is vLLM's matter.
    """
    try:
        given = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    except RecursionError as error:
        raise Refusal(HTTPStatus.BAD_REQUEST, "the body is nested too deeply") from error
    except (msgspec.DecodeError, UnicodeDecodeError):
        return
    for name in given:
        _check_name(name, known, given[name])
    _check_counts(given, limits)
    _check_strings(given, limits)
    for name in GRAMMARS:
        _check_length(given, name, limits.grammar_bytes)
    _check_length(given, "tools", limits.tools_bytes)


def _check_name(name: str, known: frozenset[str], value: msgspec.Raw) -> None:
    if name not in known:
        shown = name[:NAME_CHARACTERS_SHOWN]
        close = difflib.get_close_matches(shown, known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise Refusal(HTTPStatus.BAD_REQUEST, f"unknown parameter {shown!r}{hint}", shown)
    if name in UNSUPPORTED and bytes(value) != b"null":
        raise Refusal(HTTPStatus.BAD_REQUEST, f"{name} is not supported", name)


def _check_counts(given: _Given, limits: Limits) -> None:
    texts = _decoded(given, "n", int)
    if texts is not None and texts > limits.texts:
        raise Refusal(HTTPStatus.BAD_REQUEST, f"n must be at most {limits.texts}, but is {texts}", "n")
    _check_tokens(given, limits)
    for name in ("prompt", "messages"):
        prompts = _decoded(given, name, list[msgspec.Raw])
        # A list of numbers is one prompt, a list of objects one conversation.
        several = sum(bytes(memoryview(one)[:1]) in (b'"', b"[") for one in prompts or ())
        if several > limits.prompts:
            raise Refusal(
                HTTPStatus.BAD_REQUEST, f"{name} must be at most {limits.prompts}, but are {several}", name
            )
    for name in TOKEN_LISTS:
        tokens = _decoded(given, name, list[msgspec.Raw] | dict[str, msgspec.Raw])
        if tokens is not None and len(tokens) > limits.token_lists:
            raise Refusal(
                HTTPStatus.BAD_REQUEST,
                f"{name} must have at most {limits.token_lists} entries, but has {len(tokens)}",
                name,
            )


def _check_tokens(given: _Given, limits: Limits) -> None:
    """A prompt of numbers is counted before anything takes it apart: that of millions takes seconds."""
    raw = bytes(given.get("prompt", b""))
    is_tokens = raw.startswith(b"[") and raw[1:].lstrip()[:1].isdigit()
    if is_tokens and (tokens := raw.count(b",") + 1) > limits.prompt_tokens:
        raise Refusal(
            HTTPStatus.BAD_REQUEST,
            f"the maximum context length is {limits.prompt_tokens} tokens, but prompt has {tokens}",
            "prompt",
        )


def _check_strings(given: _Given, limits: Limits) -> None:
    for name in STRINGS:
        found = _decoded(given, name, str | list[str])
        strings = [found] if isinstance(found, str) else found or []
        if len(strings) > limits.stop_strings:
            raise Refusal(
                HTTPStatus.BAD_REQUEST,
                f"{name} must have at most {limits.stop_strings} entries, but has {len(strings)}",
                name,
            )
        longest = max(map(len, strings), default=0)
        if longest > limits.stop_string_chars:
            raise Refusal(
                HTTPStatus.BAD_REQUEST,
                f"{name} must be at most {limits.stop_string_chars} characters, but has {longest}",
                name,
            )


def _check_length(given: _Given, name: str, bytes_max: int) -> None:
    length = len(bytes(given[name])) if name in given else 0
    if length > bytes_max:
        raise Refusal(
            HTTPStatus.BAD_REQUEST,
            f"{name} must be at most {bytes_max} bytes of JSON, but has {length}",
            name,
        )


def _decoded(given: _Given, name: str, kind: Any) -> Any:
    """A parameter's value if it is of this kind; else None, and what is wrong with it vLLM says."""
    try:
        return msgspec.json.decode(given.get(name, msgspec.Raw(b"null")), type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
