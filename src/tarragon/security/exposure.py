"""Whether a cluster may listen where it is told to: beyond this machine only with keys."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Final

from tarragon.config import Config
from tarragon.security import tls
from tarragon.security.keys import admin_keys, api_keys
from tarragon.security.origin import is_loopback

VLLM_API_KEY: Final = "VLLM_API_KEY"
"""vLLM's own environment variable, which counts here too."""
_VLLM_FLAGS: Final = ("--api-key", "--api_key")


class ExposureError(ValueError):
    """A listener would let strangers in; the text is one sentence."""


def check(config: Config, engine_args: Sequence[str], environ: Mapping[str, str] = os.environ) -> None:
    """Raise ExposureError, KeyFileError or CertificateError unless both listeners are safe to open."""
    has_flag = any(argument.partition("=")[0] in _VLLM_FLAGS for argument in engine_args)
    api_open = not (api_keys(config, environ) or has_flag or environ.get(VLLM_API_KEY))
    if api_open and not is_loopback(config.host):
        raise ExposureError(
            f"--host {config.host} is refused without --api-key-file (or TARRAGON_API_KEY): "
            "anybody could send requests"
        )
    if not admin_keys(config, environ) and not is_loopback(config.admin_host):
        raise ExposureError(
            f"--admin-host {config.admin_host} is refused without --admin-key-file (or TARRAGON_ADMIN_KEY): "
            "anybody could kill workers"
        )
    tls.gateway_server_context(config)
    tls.admin_server_context(config)
