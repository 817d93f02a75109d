"""Keys: where they come from, which are good, and that the right one is the only one that opens."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import pytest

from tarragon.config import Config
from tarragon.gateway.authentication import Authentication, NoForeignPages
from tarragon.security import exposure
from tarragon.security.exposure import ExposureError
from tarragon.security.keys import KeyFileError, Keys, read_keys
from tarragon.security.tls import CertificateError, client_context, server_context
from tarragon.testing.certificates import make_certificate

KEY, OTHER = "0123456789abcdef", "fedcba9876543210"


def key_file(folder: Path, text: str, mode: int = 0o600) -> str:
    path = folder / "keys"
    path.write_text(text)
    path.chmod(mode)
    return str(path)


def test_keys_come_from_a_file_and_the_environment(tmp_path: Path) -> None:
    file = key_file(tmp_path, f"# mine\n{KEY}\n\n  {OTHER}  \n")
    assert read_keys(file, "V", {}) == (KEY, OTHER)
    assert read_keys("", "V", {"V": KEY}) == (KEY,)
    assert read_keys(file, "V", {"V": "another-key-0123456789"})[2] == "another-key-0123456789"
    assert read_keys("", "V", {}) == ()


@pytest.mark.parametrize(
    ("text", "mode", "words"),
    [
        ("", 0o600, "has no key"),
        ("# only this\n", 0o600, "has no key"),
        ("short\n", 0o600, "has 5 characters, but it must have 16 to 1024"),
        ("x" * 2_000, 0o600, "has 2000 characters"),
        ("passw\u00f6rt-0123456789\n", 0o600, "not printable ASCII"),
        ("two words 0123456789\n", 0o600, "not printable ASCII"),
        ("\n".join([KEY] * 65), 0o600, "has 65 keys, at most 64"),
        ("x" * 100_000, 0o600, "is longer than"),
        (KEY, 0o644, "chmod o-r"),
    ],
)
def test_a_bad_key_file_is_one_sentence_without_the_key(
    tmp_path: Path, text: str, mode: int, words: str
) -> None:
    with pytest.raises(KeyFileError) as refusal:
        read_keys(key_file(tmp_path, text, mode), "V", {})
    assert words in str(refusal.value)
    assert text.strip() == "" or text.strip() not in str(refusal.value)


@pytest.mark.parametrize("path", ["/nowhere", "/"])
def test_what_is_no_file_is_said(path: str) -> None:
    with pytest.raises(KeyFileError, match="cannot be read"):
        read_keys(path, "V", {})


def test_only_a_key_opens() -> None:
    keys = Keys((KEY, OTHER))
    for shown in (f"Bearer {KEY}", f"bearer {OTHER}"):
        assert keys.admit(shown)
    for shown in (
        "",
        "Bearer",
        "Bearer ",
        KEY,
        f"Basic {KEY}",
        f"Bearer {KEY}x",
        f"Bearer {KEY[:-1]}",
        "\udc80",
    ):
        assert not keys.admit(shown)
    assert not Keys(())
    assert not Keys(()).admit("Bearer ")


# ------------------------------------------------------------------ where a cluster may listen


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "example.org", ""])
def test_other_addresses_than_loopback_need_a_key(host: str) -> None:
    with pytest.raises(ExposureError, match="is refused without --api-key-file"):
        exposure.check(Config(host=host), [], {})
    with pytest.raises(ExposureError, match="is refused without --admin-key-file"):
        exposure.check(Config(admin_host=host), [], {})
    with pytest.raises(ExposureError):
        exposure.check(Config(admin_host=host), ["--api-key", "k"], {"TARRAGON_API_KEY": KEY})
    exposure.check(Config(host=host), ["--api-key", "k"], {})
    exposure.check(Config(host=host), ["--api-key=k"], {})
    exposure.check(Config(host=host), [], {"VLLM_API_KEY": "k"})
    exposure.check(Config(host=host), [], {"TARRAGON_API_KEY": KEY})
    exposure.check(Config(admin_host=host), [], {"TARRAGON_ADMIN_KEY": KEY})


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_loopback_needs_none(host: str) -> None:
    exposure.check(Config(host=host, admin_host=host), [], {})


# ------------------------------------------------------------------ certificates


def test_certificates_are_read_at_the_start(tmp_path: Path) -> None:
    certfile, keyfile = map(str, make_certificate(tmp_path))
    context = server_context(certfile, keyfile, "--ssl-certfile")
    assert context is not None
    assert context.minimum_version >= ssl.TLSVersion.TLSv1_2
    assert server_context("", "", "x") is None
    pinned = client_context(certfile)
    assert pinned is not None
    assert pinned.verify_mode is ssl.CERT_REQUIRED
    _, other_key = map(str, make_certificate(tmp_path, "other"))
    for pair in ((certfile, other_key), (keyfile, keyfile), (certfile, "/nowhere"), ("", keyfile)):
        with pytest.raises(CertificateError, match="--ssl-certfile: "):
            server_context(*pair, "--ssl-certfile")
    with pytest.raises(CertificateError):
        client_context(keyfile)


# ------------------------------------------------------------------ the gateway's middleware


def ask(app: Any, path: str = "/v1/models", method: str = "GET", **headers: str) -> int:
    answers: list[MutableMapping[str, Any]] = []

    async def send(message: MutableMapping[str, Any]) -> None:
        answers.append(message)

    async def receive() -> MutableMapping[str, Any]:
        return {"type": "http.request", "body": b""}

    raw = [(name.replace("_", "-").lower().encode(), value.encode()) for name, value in headers.items()]
    asyncio.run(app({"type": "http", "method": method, "path": path, "headers": raw}, receive, send))
    assert (
        answers[0]["status"] != 401
        or (b"www-authenticate", b'Bearer realm="tarragon"') in answers[0]["headers"]
    )
    return int(answers[0]["status"])


async def server(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})


def test_everything_but_health_needs_the_key() -> None:
    app = Authentication(server, [KEY])
    for path in ("/health", "/ping"):
        assert ask(app, path) == 200
    for path in ("/metrics", "/v1/models", "/health/x", "//health", "/no"):
        assert ask(app, path) == 401
        assert ask(app, path, authorization=f"Bearer {KEY}") == 200
    assert ask(app, method="OPTIONS") == 200


def test_a_websocket_without_the_key_is_closed() -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(
        Authentication(server, [KEY])({"type": "websocket", "path": "/v1/x", "headers": []}, None, send)
    )  # type: ignore[arg-type]
    assert [message["type"] for message in sent] == ["websocket.close"]


def test_without_keys_only_pages_of_this_machine_may_ask() -> None:
    app = NoForeignPages(server, ["https://app.example", "*"])
    for host in ("localhost:8000", "127.0.0.1", "[::1]:8000"):
        assert ask(app, host=host) == 200
    for host in ("", "evil.example", "127.0.0.1.evil.example", "10.0.0.1"):
        assert ask(app, host=host) == 403
    here = {"host": "localhost"}
    for origin in ("http://localhost:3000", "http://127.0.0.1", "https://[::1]", "https://app.example"):
        assert ask(app, origin=origin, **here) == 200
    for origin in (
        "https://evil.example",
        "null",
        "",
        "http://[::1",
        "file://",
        "http://localhost.evil.example",
    ):
        assert ask(app, origin=origin, **here) == 403
