"""What every test gets: no network, no telemetry, and tensor shapes checked at every call but where long tests are left out.

Checking shapes took a third of the processor time of the methods' conformance (27 s, without it 18), a seventh of other files',
and nine seconds when modules are imported (2026-12-01). So `run.py test` goes without; `run.py test --all`, CI and whoever names
a file check them.

Sockets reach this machine only, so a test that would download something fails at once and says
where it wanted to go. Browsers and kernels are other processes; their tests see to themselves.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from typing import Any

import jaxtyping
import pytest

import tests.support.shapes  # noqa: F401  the import hook below looks it up by name

os.environ.update({"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "MPLBACKEND": "Agg"})
# One thread a process: the models are small, and with `pytest -n` more threads than cores would wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

pytest_plugins = ["tests.support.fixtures"]


def pytest_configure(config: pytest.Config) -> None:
    """From here on, importing a module of llava_lab checks the tensor shapes in its signatures at every call."""
    if "not long" not in config.option.markexpr:
        jaxtyping.install_import_hook("llava_lab", "tests.support.shapes.check")


LOCAL_NAMES = ("localhost", "ip6-localhost", "::1", "0.0.0.0", "")


class NetworkUse(RuntimeError):
    """A test tried to reach another machine."""


def is_local(host: object) -> bool:
    """Whether an address or name means this machine; file-system sockets have none and are."""
    name = host.decode() if isinstance(host, bytes) else host
    return name is None or (isinstance(name, str) and (name in LOCAL_NAMES or name.startswith("127.")))


@pytest.fixture(autouse=True, scope="session")
def _this_machine_only() -> Iterator[None]:
    connect, connect_ex, lookup = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo

    def check(address: Any) -> None:
        host = address[0] if isinstance(address, tuple) else None
        if not is_local(host):
            raise NetworkUse(f"a test wanted to connect to {address!r}; tests stay on this machine")

    def guarded_connect(self: socket.socket, address: Any) -> None:
        check(address)
        connect(self, address)

    def guarded_connect_ex(self: socket.socket, address: Any) -> int:
        check(address)
        return connect_ex(self, address)

    def guarded_lookup(host: Any, *args: Any, **options: Any) -> Any:
        check((host,))
        return lookup(host, *args, **options)

    patch = pytest.MonkeyPatch()
    patch.setattr(socket.socket, "connect", guarded_connect)
    patch.setattr(socket.socket, "connect_ex", guarded_connect_ex)
    patch.setattr(socket, "getaddrinfo", guarded_lookup)
    yield
    patch.undo()
