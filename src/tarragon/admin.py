"""A client of the orchestrator's admin API: status, kill, drain, add."""

from __future__ import annotations

import http.client
import json
import os
import ssl
from collections.abc import Mapping
from typing import Any

from tarragon.config import Config
from tarragon.messages import FailpointEffect
from tarragon.security.keys import admin_keys
from tarragon.security.tls import client_context


class AdminError(ValueError):
    """The admin API does not answer, or refuses what it was asked; the text is one sentence."""


class AdminClient:
    """One request, one connection: the commands are rare and the server may go away between them."""

    def __init__(
        self,
        host: str,
        port: int,
        *,
        timeout_s: float,
        key: str = "",
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """``key`` is shown with every request, if there is one; ``tls`` makes it HTTPS."""
        self._host = host
        self._port = port
        self._timeout_s = timeout_s
        self._key = key
        self._tls = tls

    @staticmethod
    def of(config: Config, environ: Mapping[str, str] = os.environ) -> AdminClient:
        """A client of the cluster that runs with these settings, which shows the first of its keys.

        Raises KeyFileError or CertificateError.
        """
        return AdminClient(
            reachable_host(config.admin_host),
            config.admin_port,
            timeout_s=config.connect_timeout_s,
            key=next(iter(admin_keys(config, environ)), ""),
            tls=client_context(config.admin_ssl_certfile),
        )

    @property
    def url(self) -> str:
        return base_url(self._host, self._port, self._tls is not None)

    def status(self) -> dict[str, Any]:
        """The contract of ``tarragon status --json``; raises AdminError."""
        return self.request("GET", "/status")

    def kill(self, worker_id: str, signal_name: str = "SIGKILL") -> dict[str, Any]:
        """Send a signal to one worker; raises AdminError."""
        return self.request("POST", "/kill", {"worker_id": worker_id, "signal": signal_name})

    def drain(self, worker_id: str) -> dict[str, Any]:
        """Move one worker's work away and stop it; raises AdminError."""
        return self.request("POST", "/drain", {"worker_id": worker_id})

    def add(self, role: str) -> dict[str, Any]:
        """Start one more worker of ``role`` ("attention" or "expert"); raises AdminError."""
        return self.request("POST", "/add", {"role": role})

    def checkpointing(self, mode: str, *, reprotect: bool = True) -> dict[str, Any]:
        """Have the attention workers checkpoint in this way from now on; raises AdminError.

        ``reprotect``: compute anew what ran without checkpoints before, so that it has one.
        """
        return self.request("POST", "/checkpointing", {"mode": mode, "reprotect": reprotect})

    def protection(self, *, probing: bool, shadow_replicas: int) -> dict[str, Any]:
        """Switch probing, and have so many shadows of every expert; raises AdminError."""
        body = {"probing": probing, "shadow_replicas": shadow_replicas}
        return self.request("POST", "/protection", body)

    def inject(
        self, worker_id: str, failpoint: str, after: int = 1, effect: FailpointEffect = "die"
    ) -> dict[str, Any]:
        """Have a worker die or hang at a named place; raises AdminError."""
        body = {"worker_id": worker_id, "failpoint": failpoint, "after": after, "effect": effect}
        return self.request("POST", "/fault_tolerance/inject", body)

    def request(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Send one request and return the JSON object of a 2xx answer; raises AdminError."""
        connection = connect(self._host, self._port, self._timeout_s, self._tls)
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        try:
            data = None if body is None else json.dumps(body).encode()
            if data:
                headers["Content-Type"] = "application/json"
            connection.request(method, path, data, headers)
            response = connection.getresponse()
            text = response.read().decode("utf-8", "replace")
        except TimeoutError as error:
            raise AdminError(f"{self.url} did not answer within {self._timeout_s:g} s") from error
        except (OSError, http.client.HTTPException) as error:
            raise AdminError(
                f"no Tarragon cluster answers at {self.url} ({error or type(error).__name__})"
            ) from error
        finally:
            connection.close()
        answer = _json_object(text)
        if not 200 <= response.status < 300:
            reason = (answer or {}).get("error", text.strip() or response.reason)
            raise AdminError(f"the cluster refused: {reason}")
        if answer is None:
            raise AdminError(f"what answers at {self.url} is not a Tarragon cluster")
        return answer


def reachable_host(host: str) -> str:
    """Where a server that listens at ``host`` is reached from this machine."""
    return {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104


def base_url(host: str, port: int, is_tls: bool = False) -> str:
    """The URL of what listens at ``host``, as seen from this machine."""
    host = reachable_host(host)
    scheme = "https" if is_tls else "http"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def connect(host: str, port: int, timeout_s: float, tls: ssl.SSLContext | None) -> http.client.HTTPConnection:
    """A connection for one request, not yet open."""
    if tls is None:
        return http.client.HTTPConnection(host, port, timeout=timeout_s)
    return http.client.HTTPSConnection(host, port, timeout=timeout_s, context=tls)


def _json_object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text) if text.strip() else {}
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
