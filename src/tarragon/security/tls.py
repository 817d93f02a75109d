"""Certificates: what a listener shows, and which one a client of ours accepts."""

from __future__ import annotations

import ssl
from collections.abc import Callable

from tarragon.config import Config


class CertificateError(ValueError):
    """A certificate or its key is of no use; the text is one sentence."""


def server_context(certfile: str, keyfile: str, flags: str) -> ssl.SSLContext | None:
    """What a listener needs for TLS 1.2 and 1.3; None without a certificate (plain HTTP).

    ``keyfile`` may be empty if ``certfile`` has the key too; ``flags`` names the settings in errors.
    Raises CertificateError.
    """
    if not certfile:
        if keyfile:
            raise CertificateError(f"{flags}: a key without a certificate is of no use")
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    return _with_files(
        # Without a password OpenSSL would ask for one on the terminal.
        lambda: context.load_cert_chain(certfile, keyfile or None, password=lambda: b""),
        context,
        f"{flags}: {certfile}{f' with {keyfile}' if keyfile else ''}",
    )


def client_context(certfile: str) -> ssl.SSLContext | None:
    """What accepts exactly the certificate in ``certfile``, whatever name it is for; None without one.

    Raises CertificateError.
    """
    if not certfile:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False  # the certificate itself is known: its name adds nothing
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return _with_files(lambda: context.load_verify_locations(certfile), context, certfile)


def _with_files(load: Callable[[], None], context: ssl.SSLContext, what: str) -> ssl.SSLContext:
    try:
        load()
    except ssl.SSLError as error:
        reason = (error.reason or str(error)).replace("_", " ").lower()
        raise CertificateError(f"{what} cannot be used: {reason}") from error
    except OSError as error:
        raise CertificateError(f"{what} cannot be read: {error.strerror}") from error
    return context


def admin_server_context(config: Config) -> ssl.SSLContext | None:
    """Raises CertificateError."""
    return server_context(config.admin_ssl_certfile, config.admin_ssl_keyfile, "--admin-ssl-certfile")


def gateway_server_context(config: Config) -> ssl.SSLContext | None:
    """As vLLM's server makes its own from the same files. Raises CertificateError."""
    return server_context(config.ssl_certfile, config.ssl_keyfile, "--ssl-certfile")
