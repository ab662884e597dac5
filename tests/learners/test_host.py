"""What a rank asks of the machine that it runs on."""

import socket
from pathlib import Path

import pytest

from rlsys.learners import host


def test_a_free_port_is_none_that_the_kernel_gives_to_others_meanwhile() -> None:
    lowest, _ = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
    port = host.free_port()
    assert 10_000 < port < int(lowest)
    with socket.create_server(("127.0.0.1", port)):
        pass


def test_a_port_that_somebody_listens_on_is_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    port = host.free_port()
    monkeypatch.setattr(host, "_PORTS", range(port, port + 1))
    with (
        socket.create_server(("127.0.0.1", port)),
        pytest.raises(OSError, match=f"no port from {port} to {port} is free on this node"),
    ):
        host.free_port()
