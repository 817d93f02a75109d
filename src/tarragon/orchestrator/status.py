"""The HTTP interface for operators: who may ask what, and in which form.

Every route that is not listed here is denied, and every error is a JSON object whose ``error`` is one
sentence. With keys, every route but the dashboard's own files needs one; without, the server listens on
loopback only. A foreign web page must not reach it through its visitor's browser: on loopback the Host
header has to name this machine (a rebound DNS name does not), a page that asks has to come from here (Origin
and Sec-Fetch-Site say so), and a POST has to be declared as JSON (which a form cannot).
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from typing import Annotated, Any, Final, Protocol, TypeVar

import msgspec
from aiohttp import web

from tarragon.config import SHADOW_REPLICAS_MAX, Config
from tarragon.messages import Failpoint, FailpointEffect
from tarragon.observability import dashboard, metrics
from tarragon.orchestrator.membership import MembershipError, UnknownWorkerError
from tarragon.routing.placement import PlacementError
from tarragon.security.keys import KeyFileError, Keys, admin_keys
from tarragon.security.origin import from_here, host_name, is_loopback
from tarragon.security.tls import CertificateError, admin_server_context

SIGNALS: Final = ("KILL", "TERM", "INT", "STOP", "CONT", "ABRT", "SEGV", "BUS", "QUIT")
INSTRUCTIONS: Final = ("retry", "restart", "scale_down")
# A compressed body could be far longer than it says; nobody needs one here.
_HTTP_OPTIONS: Final[dict[str, Any]] = {"access_log": None, "auto_decompress": False, "lingering_time": 1.0}
_HEADERS: Final = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}


class Operations(Protocol):
    """What the routes offer. Commands raise MembershipError or PlacementError."""

    def status(self) -> dict[str, Any]: ...
    def table(self) -> dict[str, Any]: ...
    def events(self, limit: int, after: int) -> dict[str, Any]: ...
    def history(self, after: int) -> dict[str, Any]: ...
    def faults(self) -> dict[str, Any]: ...
    def kill(self, worker_id: str, number: int) -> dict[str, Any]: ...
    def drain(self, worker_id: str) -> dict[str, Any]: ...
    def add(self, role: str) -> dict[str, Any]: ...
    def checkpointing(self, mode: str, reprotect: bool) -> dict[str, Any]: ...
    def protection(self, probing: bool, shadow_replicas: int) -> dict[str, Any]: ...
    def inject(self, worker_id: str, order: Failpoint) -> dict[str, Any]: ...
    def apply(self, instruction: str, worker_ids: list[str]) -> dict[str, Any]: ...


class Denied(ValueError):
    """A request that is answered with ``status`` and one sentence."""

    def __init__(self, status: HTTPStatus, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


class AddressError(ValueError):
    """The address of the admin API cannot be used; the message is one sentence."""


# ------------------------------------------------------------------ bodies


class _Body(msgspec.Struct, forbid_unknown_fields=True):
    pass


class _Kill(_Body):
    worker_id: str
    signal: str = "SIGKILL"


class _Drain(_Body):
    worker_id: str


class _Add(_Body):
    role: str


class _Checkpointing(_Body):
    mode: str
    reprotect: bool = True


class _Protection(_Body):
    probing: bool
    shadow_replicas: Annotated[int, msgspec.Meta(ge=0, le=SHADOW_REPLICAS_MAX)]


class _Inject(_Body):
    worker_id: str
    failpoint: str
    after: Annotated[int, msgspec.Meta(ge=1)] = 1
    effect: FailpointEffect = "die"


class _Params(_Body):
    worker_ids: list[str] = []


class _Apply(_Body):
    instruction: str
    params: _Params = msgspec.field(default_factory=_Params)


_B = TypeVar("_B", bound=_Body)
_Route = Callable[[web.BaseRequest], Awaitable[web.Response]]


# ------------------------------------------------------------------ the server


class StatusServer:
    """Serves ``operations`` at ``config.admin_host:config.admin_port``."""

    def __init__(self, operations: Operations, config: Config) -> None:
        self._operations = operations
        self._config = config
        self._runner: web.ServerRunner | None = None
        self._keys = Keys(())
        self._is_local = is_loopback(config.admin_host)
        self._scheme = "https" if config.admin_ssl_certfile else "http"
        self._assets = dashboard.load()
        self._routes: Mapping[str, Mapping[str, _Route]] = {
            **{path: {"GET": self._asset} for path in self._assets},
            "/status": {"GET": self._status},
            "/table": {"GET": self._table},
            "/events": {"GET": self._events},
            "/history": {"GET": self._history},
            "/metrics": {"GET": self._metrics},
            "/kill": {"POST": self._kill},
            "/drain": {"POST": self._drain},
            "/add": {"POST": self._add},
            "/checkpointing": {"POST": self._checkpointing},
            "/protection": {"POST": self._protection},
            "/fault_tolerance/inject": {"POST": self._inject},
            "/fault_tolerance/status": {"GET": self._faults},
            "/fault_tolerance/apply": {"POST": self._apply},
        }

    async def start(self) -> None:
        """Listen; raises AddressError if the address is taken or unknown, or needs a key and has none."""
        host, port = self._config.admin_host, self._config.admin_port
        try:
            self._keys = Keys(admin_keys(self._config))
            tls = admin_server_context(self._config)
        except (KeyFileError, CertificateError) as error:
            raise AddressError(str(error)) from error
        if not (self._is_local or self._keys):
            raise AddressError(
                f"admin_host {host} is not of this machine alone, and whoever reaches it may kill workers: "
                "it needs an admin key"
            )
        runner = web.ServerRunner(_Server(self._answer, **_HTTP_OPTIONS))
        await runner.setup()
        try:
            await web.TCPSite(runner, host, port, ssl_context=tls).start()
        except OSError as error:
            await runner.cleanup()
            why = os.strerror(error.errno) if error.errno else str(error)
            raise AddressError(
                f"the status API cannot listen at {host} port {port} (admin_port): {why}"
            ) from error
        self._runner = runner

    async def close(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        try:
            return await self._route(request)(request)
        except Denied as denied:
            return error_response(denied.status, str(denied))
        except UnknownWorkerError as error:
            return error_response(HTTPStatus.NOT_FOUND, str(error))
        except (MembershipError, PlacementError) as error:
            return error_response(HTTPStatus.CONFLICT, str(error))

    def _route(self, request: web.BaseRequest) -> _Route:
        """The handler of a request that may be answered; raises Denied."""
        if self._is_local and not is_loopback(host_name(request.headers)):
            raise Denied(HTTPStatus.FORBIDDEN, "the Host header must name this machine, such as localhost")
        if not from_here(request.headers, self._scheme):
            raise Denied(HTTPStatus.FORBIDDEN, "a page from elsewhere must not ask the status API")
        # The dashboard's files are the same everywhere and tell nothing; what they show needs the key.
        is_asset = request.path in self._assets
        if self._keys and not is_asset and not self._keys.admit(request.headers.get("Authorization", "")):
            raise Denied(HTTPStatus.UNAUTHORIZED, "the admin key is needed: Authorization: Bearer KEY")
        methods = self._routes.get(request.path)
        if methods is None:
            raise Denied(HTTPStatus.NOT_FOUND, f"there is nothing at {request.path[:200]}")
        if request.method not in methods:
            allowed = " or ".join(methods)
            raise Denied(HTTPStatus.METHOD_NOT_ALLOWED, f"{request.path} takes {allowed} only")
        if request.method == "POST" and request.content_type != "application/json":
            raise Denied(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "the content type must be application/json")
        return methods[request.method]

    # ------------------------------------------------------------------ routes

    async def _asset(self, request: web.BaseRequest) -> web.Response:
        asset = self._assets[request.path]
        headers = {**_HEADERS, **dashboard.SECURITY_HEADERS}
        return web.Response(
            body=asset.body, content_type=asset.content_type, charset="utf-8", headers=headers
        )

    async def _status(self, request: web.BaseRequest) -> web.Response:
        return _json(self._operations.status())

    async def _table(self, request: web.BaseRequest) -> web.Response:
        return _json(self._operations.table())

    async def _events(self, request: web.BaseRequest) -> web.Response:
        limit = _number(request.query, "limit", self._config.events_max)
        return _json(self._operations.events(limit, _number(request.query, "after", 0)))

    async def _history(self, request: web.BaseRequest) -> web.Response:
        return _json(self._operations.history(_number(request.query, "after", 0)))

    async def _metrics(self, request: web.BaseRequest) -> web.Response:
        headers = {**_HEADERS, "Content-Type": metrics.CONTENT_TYPE}
        samples = self._operations.history(0)["samples"]
        body = metrics.exposition(self._operations.status(), samples[-1] if samples else {})
        return web.Response(body=body, headers=headers)

    async def _faults(self, request: web.BaseRequest) -> web.Response:
        return _json(self._operations.faults())

    async def _kill(self, request: web.BaseRequest) -> web.Response:
        body = await self._body(request, _Kill)
        name = body.signal.upper().removeprefix("SIG")
        if name not in SIGNALS:
            raise Denied(HTTPStatus.BAD_REQUEST, f"signal must be one of {', '.join(SIGNALS)}")
        number = signal.Signals[f"SIG{name}"].value
        return _json(self._operations.kill(body.worker_id, number), HTTPStatus.ACCEPTED)

    async def _checkpointing(self, request: web.BaseRequest) -> web.Response:
        body = await self._body(request, _Checkpointing)
        return _json(self._operations.checkpointing(body.mode, body.reprotect), HTTPStatus.ACCEPTED)

    async def _protection(self, request: web.BaseRequest) -> web.Response:
        body = await self._body(request, _Protection)
        return _json(self._operations.protection(body.probing, body.shadow_replicas), HTTPStatus.ACCEPTED)

    async def _inject(self, request: web.BaseRequest) -> web.Response:
        body = await self._body(request, _Inject)
        order = Failpoint(name=body.failpoint, after=body.after, effect=body.effect)
        return _json(self._operations.inject(body.worker_id, order), HTTPStatus.ACCEPTED)

    async def _drain(self, request: web.BaseRequest) -> web.Response:
        body = await self._body(request, _Drain)
        return _json(self._operations.drain(body.worker_id), HTTPStatus.ACCEPTED)

    async def _add(self, request: web.BaseRequest) -> web.Response:
        body = await self._body(request, _Add)
        if body.role not in ("attention", "expert"):
            raise Denied(HTTPStatus.BAD_REQUEST, "role must be attention or expert")
        return _json(self._operations.add(body.role), HTTPStatus.ACCEPTED)

    async def _apply(self, request: web.BaseRequest) -> web.Response:
        body = await self._body(request, _Apply)
        if body.instruction not in INSTRUCTIONS:
            raise Denied(HTTPStatus.BAD_REQUEST, f"instruction must be one of {', '.join(INSTRUCTIONS)}")
        ids = body.params.worker_ids
        if (body.instruction == "retry") == bool(ids):
            wanted = "takes no worker_ids" if ids else "needs worker_ids"
            raise Denied(HTTPStatus.BAD_REQUEST, f"{body.instruction} {wanted} in params")
        return _json(self._operations.apply(body.instruction, ids), HTTPStatus.ACCEPTED)

    async def _body(self, request: web.BaseRequest, kind: type[_B]) -> _B:
        """The request's body as ``kind``; its size is checked before it is read."""
        limit_bytes = self._config.admin_body_bytes_max
        data = bytearray()
        try:
            async with asyncio.timeout(self._config.admin_request_timeout_s):
                while (request.content_length or 0) <= limit_bytes and len(data) <= limit_bytes:
                    chunk = await request.content.readany()
                    if not chunk:
                        return msgspec.json.decode(bytes(data), type=kind)
                    data += chunk
        except TimeoutError as error:
            raise Denied(HTTPStatus.REQUEST_TIMEOUT, "the body did not arrive in time") from error
        except (msgspec.MsgspecError, UnicodeDecodeError, web.RequestPayloadError) as error:
            raise Denied(HTTPStatus.BAD_REQUEST, f"the body does not fit: {error}") from error
        raise Denied(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the body is longer than {limit_bytes} bytes")


class _Server(web.Server):
    """aiohttp's server, but what it refuses by itself is answered in JSON too."""

    def __call__(self) -> web.RequestHandler:
        return _JsonRequestHandler(self, loop=self._loop, **self._kwargs)


class _JsonRequestHandler(web.RequestHandler):
    __slots__ = ()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """What is no HTTP, or an error of ours (whose traceback goes to the log, never to the client)."""
        if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            self.log_exception("the status API failed", exc_info=exc)
            response = error_response(HTTPStatus.INTERNAL_SERVER_ERROR, "the status API failed: see the log")
        else:
            response = error_response(HTTPStatus(status), "this is no valid HTTP request")
        response.force_close()
        return response


def error_response(status: HTTPStatus, sentence: str) -> web.Response:
    """An error as every route answers it."""
    response = _json({"error": sentence}, status)
    if status is HTTPStatus.UNAUTHORIZED:
        response.headers["WWW-Authenticate"] = 'Bearer realm="tarragon admin"'
    return response


def _number(query: Mapping[str, str], name: str, default: int) -> int:
    text = query.get(name, str(default))
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise Denied(HTTPStatus.BAD_REQUEST, f"{name} must be a number that is not negative")
    return int(text)


def _json(body: dict[str, Any], status: HTTPStatus = HTTPStatus.OK) -> web.Response:
    return web.json_response(body, status=status, headers=_HEADERS)
