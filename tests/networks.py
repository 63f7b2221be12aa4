"""What tests need of this machine's network."""

from __future__ import annotations

import socket

import pytest


def _why_no_ipv6() -> str:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError as error:
        return f"this machine has no IPv6 loopback: {error.strerror or error}"
    return ""


needs_ipv6 = pytest.mark.skipif(_why_no_ipv6() != "", reason=_why_no_ipv6() or "none")
