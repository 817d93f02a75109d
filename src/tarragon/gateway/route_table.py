"""Every route of vLLM's server: is it served here, and if not, why.

What is not in SERVED is not there (404), whatever a later vLLM, one of its plugins or an environment variable
adds. A test compares this table with the installed vLLM, so that an upgrade cannot add a route that nobody
has decided.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from starlette.routing import Mount

SERVED: Final[Mapping[str, frozenset[str]]] = {
    "/health": frozenset({"GET"}),
    "/ping": frozenset({"GET", "POST"}),
    "/load": frozenset({"GET"}),
    "/version": frozenset({"GET"}),
    "/metrics": frozenset({"GET"}),
    "/v1/models": frozenset({"GET"}),
    "/v1/completions": frozenset({"POST"}),
    "/v1/chat/completions": frozenset({"POST"}),
    "/v1/chat/completions/batch": frozenset({"POST"}),
    "/v1/responses": frozenset({"POST"}),
    "/v1/responses/{response_id}": frozenset({"GET"}),
    "/v1/responses/{response_id}/cancel": frozenset({"POST"}),
    "/v1/messages": frozenset({"POST"}),
    "/v1/messages/count_tokens": frozenset({"POST"}),
    "/tokenize": frozenset({"POST"}),
    "/detokenize": frozenset({"POST"}),
    "/openapi.json": frozenset({"GET", "HEAD"}),
    "/docs": frozenset({"GET", "HEAD"}),
    "/docs/oauth2-redirect": frozenset({"GET", "HEAD"}),
    "/redoc": frozenset({"GET", "HEAD"}),
}
"""Path -> methods."""
MOUNTS: Final = frozenset({"/metrics"})
"""Applications below a path of their own; of them, only GET."""

_SCALE_OUT: Final = "it is a part of a service that spreads tokenisation over several servers"
_DEVELOPERS: Final = """
    /abort_requests /collective_rpc /fault_tolerance/apply /fault_tolerance/status /finish_weight_update
    /get_world_size /init_weight_transfer_engine /is_paused /is_sleeping /pause /release_kv_cache_memory
    /reset_encoder_cache /reset_mm_cache /reset_prefix_cache /resume /server_info
    /shutdown_weight_transfer_engine /sleep /start_draft_weight_update /start_profile /start_weight_update
    /stop_profile /update_weight_version /update_weights /v1/load_lora_adapter /v1/unload_lora_adapter
    /wake_up /weight_checker /weight_info"""
"""Those that VLLM_SERVER_DEV_MODE=1 and other switches of vLLM's add."""
DENIED: Final[Mapping[str, str]] = {
    "/invocations": "it passes requests by the checks of admission",
    "/scale_elastic_ep": "Tarragon adds and drains workers itself, at the admin API",
    "/is_scaling_elastic_ep": "Tarragon adds and drains workers itself, at the admin API",
    "/kv_event_sources": "it tells where workers would publish their caches, and they do not",
    "/generative_scoring": "only text generation is served",
    "/v1/systemone": "only text generation is served",
    "/v1/chat/completions/render": _SCALE_OUT,
    "/v1/messages/render": _SCALE_OUT,
    "/v1/completions/render": _SCALE_OUT,
    "/v1/responses/render": _SCALE_OUT,
    "/v1/chat/completions/derender": _SCALE_OUT,
    "/v1/completions/derender": _SCALE_OUT,
    "/inference/v1/generate": _SCALE_OUT,
    "/inference/v1/abort_requests": "a client could end the requests of others",
    **dict.fromkeys(_DEVELOPERS.split(), "any client could stop or change the service with it"),
}
"""Path -> why it is not there."""


def only_served(routes: Iterable[Any]) -> Iterator[Any]:
    """Those of an ASGI application's routes that are in the table, with methods that are too."""
    for route in routes:
        path, methods = str(getattr(route, "path", "")), getattr(route, "methods", None)
        is_mounted = isinstance(route, Mount) and path in MOUNTS
        if is_mounted or (methods and frozenset(methods) <= SERVED.get(path, frozenset())):
            yield route
