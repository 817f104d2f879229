"""The server under test: one that is started here, or one that runs already."""

from __future__ import annotations

import shlex
import tempfile
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import yaml

from benchmarks.engine.fixtures import model_directory, write_adapters
from benchmarks.engine.session import Adapters, engine_values
from lorikeet.config import LoRAPath
from lorikeet.models.spec import read_model_spec
from lorikeet.utils import launch_server_cmd, terminate_process, wait_for_server

START_TIMEOUT_S = 900.0


@dataclass(frozen=True)
class Target:
    """A server that answers.

    Attributes:
        adapters: names that requests may use, the most popular first.
        info: what ``/get_server_info`` said.
        api_key: that requests must carry, if any.
        pid: of its HTTP process; None for a server that was not started here.
    """

    url: str
    adapters: tuple[str, ...]
    info: dict[str, Any]
    api_key: str | None = None
    pid: int | None = None

    @property
    def vocab_size(self) -> int:
        return self.info["vocab_size"]


def running(url: str, num_adapters: int) -> Target:
    """A server that runs already, with the first ``num_adapters`` of the adapters that it has loaded.

    Raises:
        ValueError: it has fewer.
    """
    info = _server_info(url)
    names = tuple(sorted(info["adapters"]))[:num_adapters]
    if len(names) < num_adapters:
        raise ValueError(f"{url} has {len(names)} adapters loaded, fewer than {num_adapters}")
    return Target(url, names, info)


@contextmanager
def started(
    model: str, num_adapters: int, rank: int, options: dict[str, object]
) -> Iterator[Target]:
    """A server of its own on a free port, ended afterwards.

    Args:
        model: as :func:`benchmarks.engine.fixtures.model_directory` takes it.
        options: of the server, by field name.
    """
    with tempfile.TemporaryDirectory(prefix="lorikeet-serving-") as temporary:
        scratch = Path(temporary)
        directory, load_format = model_directory(model, scratch)
        spec = read_model_spec(directory)
        adapters = None
        if num_adapters:
            paths = write_adapters(scratch / "adapters", num_adapters, spec, rank)
            adapters = Adapters(tuple(paths), rank)
        common: dict[str, object] = {
            "model_path": str(directory),
            "load_format": load_format,
            "log_level": "warning",
        }
        values = engine_values(common | options, spec, adapters, 0)
        config = scratch / "server.yaml"
        config.write_text(yaml.safe_dump({name: _plain(value) for name, value in values.items()}))
        command = ["python3", "-m", "lorikeet.launch_server", "--config", str(config)]
        process, port = launch_server_cmd(shlex.join(command))
        try:
            url = f"http://127.0.0.1:{port}"
            wait_for_server(url, timeout=START_TIMEOUT_S, process=process)
            names = tuple(adapters.names) if adapters else ()
            key = values.get("api_key")
            api_key = None if key is None else str(key)
            yield Target(url, names, _server_info(url, api_key), api_key, process.pid)
        finally:
            terminate_process(process)


def forget_prefixes(url: str) -> None:
    """Empty the prefix cache of an idle server."""
    request = urllib.request.Request(f"{url}/flush_cache?timeout=30", method="POST")
    with _opener.open(request, timeout=60) as response:
        response.read()


def _server_info(url: str, api_key: str | None = None) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    request = urllib.request.Request(f"{url}/get_server_info", headers=headers)
    with _opener.open(request, timeout=60) as response:
        return orjson.loads(response.read())


def _plain(value: object) -> object:
    """A value of an option as YAML can hold it."""
    if isinstance(value, LoRAPath):
        return f"{value.name}={value.path}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value


# A proxy of the environment must not come between a client and its own machine.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
