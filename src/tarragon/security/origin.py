"""Who asks? Only programs of this machine, or a web page that comes from here.

A foreign web page must not reach a listener on loopback through its visitor's browser: a rebound DNS name
does not name this machine in the Host header, and browsers say where a page comes from.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from urllib.parse import urlsplit


def is_loopback(host: str) -> bool:
    """Whether a host name or address means this machine and no other."""
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def host_name(headers: Mapping[str, str]) -> str:
    """The Host header without its port; "" if there is none. Names in ``headers`` are as in HTTP."""
    host = headers.get("Host", "")
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def from_here(headers: Mapping[str, str], scheme: str) -> bool:
    """Whether a page of this server asks, or no page at all: other programs send none of these headers.

    Following a link is fine too, wherever it is: the answer shows itself to the person alone. (A form that
    is sent from elsewhere names its Origin.)
    """
    origin = headers.get("Origin")
    if origin is not None and origin != f"{scheme}://{headers.get('Host', '')}":
        return False
    site, mode = headers.get("Sec-Fetch-Site", "none"), headers.get("Sec-Fetch-Mode", "")
    return site in ("same-origin", "none") or mode == "navigate"


def is_local_origin(origin: str) -> bool:
    """Whether an Origin header names a page that a server of this machine has served."""
    try:
        return is_loopback(urlsplit(origin).hostname or "")
    except ValueError:
        return False
