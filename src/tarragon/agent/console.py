"""What the user of `tarragon serve` sees until the cluster is ready; runs in a child process of its own.

The node agent must stay single-threaded and is busy importing for seconds;
this process may draw as it likes. It ends once the ready line is out.
"""

from __future__ import annotations

import http.client
import signal
import ssl
import sys
import time
from typing import Any, Final, NoReturn

from tarragon.admin import AdminClient, AdminError, base_url, connect, reachable_host
from tarragon.agent.log import FORMATS, record
from tarragon.config import Config
from tarragon.security.tls import client_context

_POLL_S: Final = 0.1


def ready_line(config: Config, status: dict[str, Any], seconds: float) -> str:
    """The one line on stdout that says where the API is and what stands behind it."""
    attention, expert = _healthy(status, "attention"), _healthy(status, "expert")
    url = base_url(config.host, config.port, bool(config.ssl_certfile))
    return f"ready: {url}/v1 ({attention} attention + {expert} expert workers, {seconds:.1f} s)"


def progress_text(config: Config, status: dict[str, Any] | None) -> str:
    """What is being waited for, in words."""
    if status is None:
        return "starting"
    workers = status.get("workers", [])
    if not any(worker.get("pid") and worker.get("role") != "orchestrator" for worker in workers):
        return "importing torch and vLLM"
    return (
        f"workers: attention {_healthy(status, 'attention')}/{config.attention_workers}, "
        f"expert {_healthy(status, 'expert')}/{config.expert_workers}, "
        f"gateway {'ready' if _healthy(status, 'gateway') else 'starting'}"
    )


def is_complete(config: Config, status: dict[str, Any]) -> bool:
    """Whether the cluster serves, with all the workers that were asked for."""
    return bool(status.get("ready")) and all(
        _healthy(status, role) >= count
        for role, count in (("attention", config.attention_workers), ("expert", config.expert_workers))
    )


def _healthy(status: dict[str, Any], role: str) -> int:
    return sum(
        worker.get("role") == role and worker.get("state") == "healthy"
        for worker in status.get("workers", [])
    )


def is_healthy(config: Config) -> bool:
    """Whether GET /health of the gateway is 200."""
    tls = client_context(config.ssl_certfile)
    connection = connect(reachable_host(config.host), config.port, config.connect_timeout_s, tls)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except ssl.SSLError as error:
        # It serves, but only those who show a certificate of their own (--ssl-cert-reqs).
        return "CERTIFICATE_REQUIRED" in (error.reason or "")
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def watch(config: Config, started_s: float) -> None:
    """Show progress on stderr until the cluster serves, then print the ready line on stdout.

    ``started_s`` is on the monotonic clock.
    """
    from rich.console import Console

    signal.signal(signal.SIGTERM, _leave)  # so that the terminal's cursor comes back
    admin = AdminClient.of(config)
    console = Console(stderr=True)
    shown = ""
    with console.status("starting") as spinner:
        while True:
            status = _status(admin)
            if status is not None and is_complete(config, status) and is_healthy(config):
                break
            text = progress_text(config, status)
            if text != shown:
                shown = text
                spinner.update(text)
                if not console.is_terminal:
                    said = record(f"{text} ({time.monotonic() - started_s:.1f} s)", "console", 0, time.time())
                    print(FORMATS[config.log_format](said), file=sys.stderr, flush=True)
            time.sleep(_POLL_S)
    print(ready_line(config, status, time.monotonic() - started_s), flush=True)


def _status(admin: AdminClient) -> dict[str, Any] | None:
    try:
        return admin.status()
    except AdminError:
        return None


def _leave(number: int, frame: object) -> NoReturn:
    raise SystemExit(1)
