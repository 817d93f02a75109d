"""vLLM's flags in Tarragon: which pass through, which are refused, what Tarragon sets on top."""

from __future__ import annotations

import argparse
import difflib
import functools
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NoReturn

import msgspec
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.exceptions import VLLMError
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser

from tarragon.boot import Boot
from tarragon.config import Config
from tarragon.gateway.flag_table import HARMLESS, OWN, REFUSED


class FlagError(ValueError):
    """A flag is unknown, malformed, or does not apply here; the message is one sentence for the user."""


class ModelRefused(ValueError):
    """The checkpoint is of a kind that Tarragon does not serve; the message is one sentence for the user."""


_DEFAULTS: Final = (
    "--disable-uvicorn-access-log",
    "--uvicorn-log-level=warning",
    "--aggregate-engine-logging",
    "--no-use-tqdm-on-load",
    # Compiling takes minutes per cold start, on every core, and a replacement worker has none to spare.
    "--enforce-eager",
    # A reader's next token waits for the chunk of somebody's prompt beside it: up to 22 s at 2,048 tokens.
    "--max-num-batched-tokens=512",
)
"""What the user's flags may override."""


_DTYPES: Final = {"half": "float16", "float": "float32"}
"""vLLM's other names of types."""


class _Parser(FlexibleArgumentParser):  # type: ignore[misc]
    def error(self, message: str) -> NoReturn:
        raise FlagError(message)


@functools.cache
def serve_parser() -> FlexibleArgumentParser:
    """Return vLLM's own parser of ``vllm serve``; it raises FlagError instead of ending the process."""
    return make_arg_parser(_Parser(prog="tarragon serve", allow_abbrev=False, add_json_tip=False))


def split_flags(argv: Sequence[str]) -> tuple[str, ...]:
    """Check the flags of ``tarragon serve`` that are not Tarragon's own; return ``Boot.engine_args``.

    Raises FlagError, with one sentence for the user, for the first flag that is unknown, malformed or does
    not apply here. A refused flag that is given its harmless value (``--tensor-parallel-size 1``) passes.
    """
    parser = serve_parser()
    given = dict(_given(parser, argv))
    refused = {name: flag for name, flag in given.items() if name in OWN or name in REFUSED}
    try:
        values = parse(argv)
    except FlagError:
        if refused:  # that it is refused matters more than that its value is malformed
            raise _refusal(*next(iter(refused.items()))) from None
        raise
    for name, flag in refused.items():
        if not _harmless(parser, name, getattr(values, name, None)):
            raise _refusal(name, flag)
    if values.max_model_len == -1:
        raise FlagError(
            "--max-model-len auto is refused: gateway and workers must agree on a number before they start."
        )
    return tuple(argv)


def check_dtype(argv: Sequence[str], stored: str) -> None:
    """Raise FlagError if ``--dtype`` asks for another type than ``stored``, that of the experts."""
    asked = str(parse(argv).dtype)
    if _DTYPES.get(asked, asked) not in ("auto", stored):
        raise FlagError(
            f"--dtype {asked} is refused: the model is computed in the type in which its experts are stored, "
            f"{stored}."
        )


def _refusal(name: str, flag: str) -> FlagError:
    return FlagError(f"{flag} is refused: {OWN.get(name) or REFUSED[name]}.")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse flags as ``vllm serve`` does; raise FlagError where it would end the process."""
    try:
        # parse_args changes lists of nested flags in place, so it gets its own.
        values: argparse.Namespace = serve_parser().parse_args(list(argv))
        validate_parsed_serve_args(values)
    except FlagError:
        raise
    except (ValueError, TypeError, KeyError, argparse.ArgumentError, VLLMError) as error:
        raise FlagError(str(error).removeprefix("Error: ")) from error
    return values


def _given(parser: FlexibleArgumentParser, argv: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield (name in the table, flag as written) per flag in ``argv``; raise FlagError for unknown ones."""
    known: dict[str, argparse.Action] = parser._option_string_actions
    for token in argv:
        written = token.partition("=")[0]
        if token.startswith("--"):
            # Nested settings are written --name.key, and underscores pass for dashes.
            flag = written.partition(".")[0].replace("_", "-")
        elif token.startswith("-O"):
            flag = "--optimization-level"
        elif token.startswith("-") and token[1:2].isalpha() and " " not in token:
            flag = written.partition(".")[0]
        else:
            continue
        if flag not in known:
            raise FlagError(f"{written} is not a setting of Tarragon or vLLM{_nearest(flag, known)}.")
        yield known[flag].dest, written


def _nearest(flag: str, known: Iterable[str]) -> str:
    own = [f"--{name.replace('_', '-')}" for name in Config.__struct_fields__]
    close = difflib.get_close_matches(flag, [*own, *known], n=1)
    return f"; the nearest is {close[0]}" if close else ""


def _harmless(parser: FlexibleArgumentParser, name: str, value: Any) -> bool:
    """Whether ``value`` asks for nothing that vLLM would not do anyway."""
    default = parser.get_default(name)
    if value == default or (value is False and default is None):
        return True
    return isinstance(value, (int, str)) and value in HARMLESS.get(name, ())


def serve_args(boot: Boot) -> argparse.Namespace:
    """Return the arguments of vLLM's API server: defaults, the user's flags, and Tarragon's own on top."""
    config = boot.config
    folder = Path(boot.model)
    certificate = {"certfile": config.ssl_certfile, "keyfile": config.ssl_keyfile}
    own = (
        f"--model={boot.model}",
        f"--host={config.host}",
        f"--port={config.port}",
        "--distributed-executor-backend=uni",
        "--no-async-scheduling",
        "--load-format=safetensors",
        "--no-trust-remote-code",
        f"--kv-cache-memory-bytes={config.kv_cache_bytes_granted}",
        "--shutdown-timeout=0",
        *(f"--ssl-{name}={file}" for name, file in certificate.items() if file),
        *([f"--otlp-traces-endpoint={config.otlp_traces_endpoint}"] if config.otlp_traces_endpoint else []),
    )
    limits = (f"--max-num-queued-reqs={config.requests_live_max}",)
    names = ("--served-model-name", folder.name, *([boot.model] if boot.model != folder.name else []))
    return parse((*names, *_DEFAULTS, *limits, *boot.engine_args, *own))


def engine_args(boot: Boot) -> AsyncEngineArgs:
    """Return vLLM's engine arguments, the same for the gateway and every attention worker."""
    return AsyncEngineArgs.from_cli_args(serve_args(boot))


def engine_config(boot: Boot, dtype: str = "auto") -> Any:
    """Return the VllmConfig that the gateway and every attention worker share.

    ``dtype``: expert workers compute in the type of the stored experts, so an attention worker has to as
    well; vLLM's own choice may be another. The gateway computes nothing.

    Raises ModelRefused for a checkpoint that Tarragon does not serve, and whatever vLLM raises for flags
    that do not fit it.
    """
    check_model(Path(boot.model))
    arguments = engine_args(boot)
    arguments.dtype = dtype
    with _logger_caches_kept():
        return arguments.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)


@contextmanager
def _logger_caches_kept() -> Iterator[None]:
    """Empty the caches of all loggers once, at the end.

    Each level that is set empties those of all, vLLM sets nearly 400 when it configures its log, and there
    are thousands: a tenth of a second of every worker's start.
    """
    manager: Any = logging.Logger.manager
    manager._clear_cache = lambda: None
    try:
        yield
    finally:
        del manager._clear_cache
        manager._clear_cache()


def check_model(folder: Path) -> None:
    """Raise ModelRefused if the checkpoint in ``folder`` is of a kind that Tarragon does not serve."""
    try:
        document = msgspec.json.decode((folder / "config.json").read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.DecodeError) as error:
        raise ModelRefused(f"{folder} has no readable config.json: {error}") from error
    sections = [document, *(part for part in document.values() if isinstance(part, dict))]
    for section in sections:
        quantization = section.get("quantization_config")
        if quantization:
            method = (
                quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
            )
            raise ModelRefused(
                f"{folder} has quantised weights ({method}), which are not supported: "
                "experts are computed in the model's own type."
            )
    for name in ("vision_config", "audio_config", "thinker_config"):
        if document.get(name):
            raise ModelRefused(
                f"{folder} is a multimodal model ({name}), which is not supported: requests are text only."
            )
