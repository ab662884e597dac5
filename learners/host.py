"""What a rank asks of the machine that it runs on."""

from __future__ import annotations

import contextlib
import ctypes
import random
import socket

_PORTS = range(20_000, 32_000)
"""Below those that kernels give to whoever asks for any port, above those of Ray's own workers."""


def keep_freed_memory() -> None:
    """Let the C library keep the memory of freed tensors for the next ones.

    By default it returns large blocks to the kernel, and every page of their successors faults: up to a quarter of a
    step on CPUs. Does nothing where there is no glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # names and numbers of malloc.h
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(top_pad, 64 * 2**20)
        mallopt(mmap_threshold, 32 * 2**20)  # the most it takes


def own_address() -> str:
    """This node's address as other nodes see it; loopback where there is no network."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # a documentation address: nothing is sent, only a route is chosen
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"


def free_port() -> int:
    """A port of this node that nobody listens on, and that nobody is given who does not ask for just this one."""
    dice = random.SystemRandom()  # actors that were seeded alike must not try the same ports
    for port in dice.sample(_PORTS, len(_PORTS)):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
    raise OSError(f"no port from {_PORTS.start} to {_PORTS.stop - 1} is free on this node")
