"""A slow network on one machine: two network namespaces joined by a veth pair, both ends limited.

Loopback is a copy in memory: on it, communication costs processor time and nothing else, and there
is nothing to hide. Here bytes leave a rank at the rate of a real link, at next to no processor
time, so computation can run meanwhile. Needs root, and iproute2's `ip` and `tc`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

CLONE_NEWNET = 0x40000000  # linux/sched.h
# Reno is in every kernel, and sends as fast as the link takes it: nothing is lost here. BBR guesses
# the rate, and low for traffic that comes in bursts.
CONGESTION_CONTROL = Path("/proc/sys/net/ipv4/tcp_congestion_control")
QUEUE = "100ms"  # what may wait for the link; more than TCP ever has in flight, so none is dropped


@dataclass(frozen=True)
class Network:
    """Where ranks find each other."""

    interface: str
    address: str
    """Of rank 0."""
    namespaces: tuple[str, ...] = ()
    """One for each rank; none: all are where this process is."""


LOOPBACK = Network("lo", "127.0.0.1")


@contextlib.contextmanager
def limited_link(mbit: int) -> Iterator[Network]:
    """Two namespaces joined by a link of `mbit` Mbit/s each way; gone on exit."""
    _check_possible()
    names = tuple(f"bench{os.getpid()}-{end}" for end in "ab")
    interface, addresses = "veth0", ("10.77.0.1", "10.77.0.2")
    # The bucket is 0.6 ms deep, so that small messages have no free ride; a packet must fit in.
    packet = min(65536, mbit * 1_000_000 // 8 * 6 // 10_000)
    burst = packet * 5 // 4
    on_term = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that we clean up
    try:
        for name in names:
            _run(f"ip netns add {name}")
        peer = f"peer name {interface} netns {names[1]}"
        _run(f"ip link add {interface} netns {names[0]} type veth {peer}")
        for name, address in zip(names, addresses, strict=True):
            _in_namespace(name, lambda: CONGESTION_CONTROL.write_text("reno"))
            ip = f"ip -netns {name}"
            _run(f"{ip} link set lo up")
            _run(f"{ip} address add {address}/24 dev {interface}")
            _run(f"{ip} link set {interface} up gso_max_size {packet}")
            limit = f"tbf rate {mbit}mbit burst {burst} latency {QUEUE}"
            _run(f"tc -netns {name} qdisc add dev {interface} root {limit}")
        yield Network(interface, addresses[0], names)
    finally:
        for name in names:  # and the pair with them
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)
        signal.signal(signal.SIGTERM, on_term)


def enter(namespace: str) -> None:
    """Move this thread, and all that it starts from now on, into the namespace."""
    libc = ctypes.CDLL(None, use_errno=True)  # os.setns is new in Python 3.12
    with Path("/var/run/netns", namespace).open() as handle:
        if libc.setns(handle.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter network namespace {namespace}")


def bytes_sent(interface: str) -> int:
    """By this process's network namespace through the interface, headers included."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == interface:
            return int(counters.split()[8])
    raise ValueError(f"no interface {interface}")


def measured_mbit(network: Network, seconds: float = 0.5, expected_mbit: int = 1000) -> float:
    """Mbit/s of user data that one TCP connection carries from the second namespace to the first.

    seconds: how long that would take at `expected_mbit`.
    """
    listener, client = (_in_namespace(name, socket.socket) for name in network.namespaces)
    with listener, client:
        listener.bind((network.address, 0))
        listener.listen()
        client.connect(listener.getsockname())
        server, _ = listener.accept()
        size = int(expected_mbit * 1e6 / 8 * seconds)
        sender = threading.Thread(target=client.sendall, args=(bytes(size),))
        with server:
            start = time.perf_counter()
            sender.start()
            left = size
            while left:
                left -= len(server.recv(1 << 20))
            elapsed = time.perf_counter() - start
        sender.join()
    return size * 8 / elapsed / 1e6


def _in_namespace(namespace: str, function: Callable[[], T]) -> T:
    """The function's result, called by a thread of its own in the namespace. (A socket belongs to
    the namespace of the thread that made it, whoever uses it.)"""

    def call() -> T:
        enter(namespace)
        return function()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(call).result()


def _check_possible() -> None:
    if os.geteuid() != 0:
        raise SystemExit("error: network namespaces need root: run this benchmark as root")
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            raise SystemExit(f"error: {tool} not found: install iproute2")


def _run(command: str) -> None:
    result = subprocess.run(command.split(), capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"error: `{command}`: {result.stderr.strip()}")
