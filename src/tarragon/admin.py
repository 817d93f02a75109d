"""A client of the orchestrator's admin API on loopback: status, kill, drain, add."""

from __future__ import annotations

import http.client
import json
from typing import Any


class AdminError(ValueError):
    """The admin API does not answer, or refuses what it was asked; the text is one sentence."""


class AdminClient:
    """One request, one connection: the commands are rare and the server may go away between them."""

    def __init__(self, host: str, port: int, *, timeout_s: float) -> None:
        self._host = host
        self._port = port
        self._timeout_s = timeout_s

    @property
    def url(self) -> str:
        return f"http://{self._host}:{self._port}"

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

    def checkpointing(self, mode: str) -> dict[str, Any]:
        """Have the attention workers checkpoint in this way from now on; raises AdminError."""
        return self.request("POST", "/checkpointing", {"mode": mode})

    def request(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Send one request and return the JSON object of a 2xx answer; raises AdminError."""
        connection = http.client.HTTPConnection(self._host, self._port, timeout=self._timeout_s)
        try:
            data = None if body is None else json.dumps(body).encode()
            connection.request(method, path, data, {"Content-Type": "application/json"} if data else {})
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


def _json_object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text) if text.strip() else {}
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
