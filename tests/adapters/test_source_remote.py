"""Adapters from object stores and web servers: download, resume, refusal, and what the disk cache keeps."""

from __future__ import annotations

import errno
import json
import logging
import socket
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from lorikeet.adapters.sources import addresses, remote
from lorikeet.adapters.sources.disk_cache import DiskCache
from lorikeet.adapters.sources.source import SourceOptions, open_source, public_path, resolve_source
from lorikeet.adapters.sources.transfer import NeedsNetworkError, Reach, Transfer
from lorikeet.config import LORA_SOURCES
from lorikeet.errors import AdapterError
from tests.support.fake_hub import fake_hub

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def weights(num_bytes: int = 3000, fill: bytes = b"x") -> bytes:
    header = b'{"__metadata__":{}}'
    return len(header).to_bytes(8, "little") + header + fill * (num_bytes - 8 - len(header))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(remote, "_FIRST_WAIT_S", 0.0)
    monkeypatch.setattr(remote, "_CHUNK_BYTES", 1000)


@pytest.fixture
def web():
    with fake_hub() as server:
        put(server, "a")
        yield server


def put(web, name, config=b'{"r": 4}', data=None):
    web.files[f"/{name}/{CONFIG}"] = config
    web.files[f"/{name}/{WEIGHTS}"] = weights() if data is None else data


@pytest.fixture
def options(tmp_path):
    return SourceOptions(
        cache_dir=tmp_path / "cache", cache_bytes=100_000, allow_private_hosts=True
    )


def refused(path, options):
    with pytest.raises(AdapterError) as caught:
        resolve_source(path, options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def entries(options):
    return [path for path in options.cache_dir.iterdir() if path.is_dir()]


def test_download_over_http(web, options):
    web.files[f"/a/{'chat_template.jinja'}"] = b"{{ messages }}"
    web.files["/a/tokenizer_config.json"] = b"{}"
    web.files["/a/adapter_model.bin"] = b"pickle"
    directory = resolve_source(f"{web.url}/a/", options)
    assert (directory / "tokenizer_config.json").read_bytes() == b"{}"
    assert (directory / CONFIG).read_bytes() == b'{"r": 4}'
    assert (directory / WEIGHTS).read_bytes() == weights()
    assert (directory / "chat_template.jinja").read_bytes() == b"{{ messages }}"
    assert web.asked("GET", ".bin") == web.asked("HEAD", ".bin") == []


def test_an_empty_file(web, options):
    web.files["/a/chat_template.jinja"] = b""
    directory = resolve_source(f"{web.url}/a", options)
    assert (directory / "chat_template.jinja").read_bytes() == b""


def test_a_second_use_only_asks_whether_it_has_changed(web, options):
    first = resolve_source(f"{web.url}/a", options)
    sent = web.sent
    assert resolve_source(f"{web.url}/a", options) == first
    assert web.sent - sent < 100


def test_changed_files_are_fetched_again(web, options):
    resolve_source(f"{web.url}/a", options)
    put(web, "a", config=b'{"r": 8}')
    directory = resolve_source(f"{web.url}/a", options)
    assert (directory / CONFIG).read_bytes() == b'{"r": 8}'


def test_without_a_validator_every_use_is_a_download(web, options):
    web.etags = False
    resolve_source(f"{web.url}/a", options)
    put(web, "a", config=b'{"r": 8}')  # the same size
    assert (resolve_source(f"{web.url}/a", options) / CONFIG).read_bytes() == b'{"r": 8}'


def test_a_cut_connection_is_resumed(web, options):
    web.cuts[WEIGHTS] = [1000, 1000, 400, 0]
    directory = resolve_source(f"{web.url}/a", options)
    assert (directory / WEIGHTS).read_bytes() == weights()
    # The block in flight is lost, what came before it is not asked for again.
    assert web.asked("GET", WEIGHTS)[-1] == "bytes=2000-2999"
    assert web.asked("GET", WEIGHTS).count("bytes=0-999") == 1


def test_the_next_call_goes_on_where_the_last_one_gave_up(web, options):
    web.cuts[WEIGHTS] = [1000] + 100 * [0]
    message = refused(f"{web.url}/a", options)
    assert f"{WEIGHTS} ends after 1000 of 3000 bytes" in message
    assert not any(path.suffix == "" for path in entries(options))
    web.cuts.clear()
    web.requests.clear()
    assert (resolve_source(f"{web.url}/a", options) / WEIGHTS).read_bytes() == weights()
    assert web.asked("GET", WEIGHTS)[0] == "bytes=1000-1999"


def test_a_changed_file_is_not_glued_to_the_beginning_of_the_old_one(web, options):
    web.cuts[WEIGHTS] = [1000] + 100 * [0]
    refused(f"{web.url}/a", options)
    web.cuts.clear()
    put(web, "a", data=weights(fill=b"y"))
    assert (resolve_source(f"{web.url}/a", options) / WEIGHTS).read_bytes() == weights(fill=b"y")


def test_a_server_without_ranges(web, options):
    web.ranges = False
    assert (resolve_source(f"{web.url}/a", options) / WEIGHTS).read_bytes() == weights()


def test_a_server_without_ranges_that_cuts(web, options):
    web.ranges = False
    web.cuts[WEIGHTS] = [3000, 1500]
    assert (resolve_source(f"{web.url}/a", options) / WEIGHTS).read_bytes() == weights()
    web.cuts[WEIGHTS] = 1000 * [1500]
    put(web, "a", data=weights(fill=b"y"))
    assert "1500 of 3000" in refused(f"{web.url}/a", options)
    assert len(web.cuts[WEIGHTS]) > 900


def test_a_server_that_stumbles_is_asked_again(web, options):
    web.statuses[WEIGHTS] = [503, 503, 429, 200]
    assert (resolve_source(f"{web.url}/a", options) / WEIGHTS).read_bytes() == weights()


@pytest.mark.parametrize(
    ("status", "says"), [(401, "401"), (403, "403"), (404, f"there is no {WEIGHTS}"), (500, "500")]
)
def test_refusals_name_the_file_and_the_reason(web, options, status, says):
    web.statuses[WEIGHTS] = [status]
    message = refused(f"{web.url}/a", options)
    assert says in message
    assert WEIGHTS in message
    assert f"{web.url}/a" in message


def test_a_store_that_says_forbidden_of_what_does_not_exist(web, options):
    web.statuses["chat_template.jinja"] = [403]
    directory = resolve_source(f"{web.url}/a", options)
    assert not (directory / "chat_template.jinja").exists()


def test_access_that_is_withdrawn_is_refused_although_there_is_a_copy(web, options):
    resolve_source(f"{web.url}/a", options)
    web.statuses[WEIGHTS] = [403]
    assert "403" in refused(f"{web.url}/a", options)


def test_a_source_that_is_down_is_served_from_the_copy(options, caplog):
    with fake_hub() as web:
        put(web, "a")
        first = resolve_source(f"{web.url}/a?key=secret", options)
    with caplog.at_level(logging.WARNING):
        assert resolve_source(f"{web.url}/a?key=secret", options) == first
    assert "served from the disk cache" in caplog.text
    assert "secret" not in caplog.text
    assert "cannot be read" in refused(f"{web.url}/b", options)


def test_a_file_that_is_no_safetensors_is_refused_from_its_beginning(web, options):
    put(web, "a", data=b"PK\x03\x04" + 50_000 * b"z")
    assert "is not a safetensors file" in refused(f"{web.url}/a", options)
    assert web.asked("GET", WEIGHTS) == ["bytes=0-999"]
    assert entries(options) == []


def test_a_huge_configuration_is_refused_before_it_is_read(web, options):
    put(web, "a", config=b"x" * (5 * 2**20))
    assert "5242880 bytes; allowed: at most" in refused(f"{web.url}/a", options)
    assert web.asked("GET", CONFIG) == []


def test_an_adapter_larger_than_the_cache_is_refused_before_it_is_read(web, options):
    put(web, "a", data=weights(100_001))
    assert "--lora-disk-cache-gb" in refused(f"{web.url}/a", options)
    assert web.asked("GET", WEIGHTS) == []


def test_a_blank_in_a_url(web, options):
    put(web, "a%20b")
    for path in ("a b", "a%20b"):
        assert (resolve_source(f"{web.url}/{path}", options) / WEIGHTS).read_bytes() == weights()


def test_what_is_wrong_with_the_files_is_said_of_the_url(web, options):
    with (
        pytest.raises(AdapterError) as caught,
        open_source(f"{web.url}/a?k=secret", options) as directory,
    ):
        raise AdapterError(f"{directory}/{CONFIG} has no r")
    assert str(caught.value) == f"{web.url}/a?***/{CONFIG} has no r"


def test_a_query_stays_with_every_file_and_out_of_every_message(web, options):
    web.query = "X-Signature=a%2Fb%3D&secret=1"
    directory = resolve_source(f"{web.url}/a?{web.query}", options)
    assert (directory / WEIGHTS).read_bytes() == weights()
    web.files.clear()
    message = refused(f"{web.url}/a?{web.query}", options)
    assert "secret" not in message
    assert f"{web.url}/a?***" in message
    kept = [path.read_bytes() for path in options.cache_dir.rglob("*") if path.is_file()]
    assert not any(b"secret" in content for content in kept)


def test_a_password_is_shown_nowhere(web, options):
    url = web.url.replace("http://", "http://user:hunter2@") + "/missing"
    assert "hunter2" not in refused(url, options)
    assert "Basic dXNlcjpodW50ZXIy" in web.authorization


def test_two_at_once_download_once(web, options):
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(resolve_source(f"{web.url}/a", options)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(found)) == 1
    assert web.asked("GET", WEIGHTS).count("bytes=0-999") == 1


def test_a_full_disk(web, options, monkeypatch):
    def full(path, *args, **kwargs):
        if path.name == WEIGHTS:
            raise OSError(errno.ENOSPC, "No space left on device")
        return opened(path, *args, **kwargs)

    opened = Path.open
    monkeypatch.setattr(Path, "open", full)
    message = refused(f"{web.url}/a", options)
    assert "the disk is full" in message
    assert "--lora-disk-cache-dir" in message
    assert entries(options) == []
    monkeypatch.setattr(Path, "open", opened)
    assert (resolve_source(f"{web.url}/a", options) / WEIGHTS).read_bytes() == weights()


def test_a_cache_directory_that_is_a_file(web, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    options = SourceOptions(
        cache_dir=tmp_path / "file", cache_bytes=10_000, allow_private_hosts=True
    )
    assert "cannot be written" in refused(f"{web.url}/a", options)


def test_the_least_recently_used_adapter_leaves(web, tmp_path):
    options = SourceOptions(
        cache_dir=tmp_path / "cache", cache_bytes=10_000, allow_private_hosts=True
    )
    for name in "abcd":
        put(web, name)
    a, b, c = (resolve_source(f"{web.url}/{name}", options) for name in "abc")
    resolve_source(f"{web.url}/a", options)
    d = resolve_source(f"{web.url}/d", options)
    assert [path.exists() for path in (a, b, c, d)] == [True, False, True, True]


def test_an_adapter_that_is_being_read_stays(web, tmp_path):
    options = SourceOptions(
        cache_dir=tmp_path / "cache", cache_bytes=7000, allow_private_hosts=True
    )
    put(web, "b")
    put(web, "c")
    with open_source(f"{web.url}/a", options) as a:
        b = resolve_source(f"{web.url}/b", options)
        resolve_source(f"{web.url}/c", options)
        assert a.exists()
        assert not b.exists()
        with open_source(f"{web.url}/b", options):
            message = refused(f"{web.url}/c", options)
            assert "do not fit" in message
    assert resolve_source(f"{web.url}/c", options).exists()
    kept = (tmp_path / "cache").rglob("*.safetensors")
    assert sum(path.stat().st_size for path in kept) <= 7000


def test_a_damaged_copy_is_fetched_again(web, options):
    directory = resolve_source(f"{web.url}/a", options)
    (directory / WEIGHTS).write_bytes(b"short")
    assert (resolve_source(f"{web.url}/a", options) / WEIGHTS).read_bytes() == weights()
    (directory / "source.json").write_bytes(b"[]")
    assert (resolve_source(f"{web.url}/a", options) / WEIGHTS).read_bytes() == weights()


def test_files_that_change_during_the_download_are_not_mixed(web, options, monkeypatch):
    append = remote._append

    def change(target, chunk, size):
        append(target, chunk, size)
        put(web, "a", config=b'{"r": 9}')

    monkeypatch.setattr(remote, "_append", change)
    assert "changed while they were downloaded" in refused(f"{web.url}/a", options)
    assert entries(options) == []


class Store(MemoryFileSystem):
    """An object store in memory, under the name of a real one."""

    protocol = ("s3", "gs")
    store: dict = {}  # noqa: RUF012 - as the parent has it
    pseudo_dirs = [""]  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + path.partition("://")[2] if "://" in path else super()._strip_protocol(path)


@pytest.fixture
def store(monkeypatch):
    Store.store.clear()
    registry = sys.modules["fsspec.registry"]._registry
    for scheme in Store.protocol:
        monkeypatch.setitem(registry, scheme, Store)
    Store.clear_instance_cache()
    return Store()


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_object_stores(store, options, scheme):
    store.pipe({f"/bucket/a b/{CONFIG}": b"{}", f"/bucket/a b/{WEIGHTS}": weights()})
    directory = resolve_source(f"{scheme}://bucket/a b", options)
    assert (directory / WEIGHTS).read_bytes() == weights()
    assert json.loads((directory / "source.json").read_text())["url"] == f"{scheme}://bucket/a b"
    assert "there is no adapter_config.json" in refused(f"{scheme}://bucket/b", options)


@pytest.mark.parametrize(
    ("scheme", "module"), [("s3", "s3fs"), ("gs", "gcsfs"), ("http", "aiohttp")]
)
def test_a_library_that_is_not_installed_is_named_with_its_extra(
    options, monkeypatch, scheme, module
):
    monkeypatch.setitem(sys.modules, module, None)
    message = refused(f"{scheme}://bucket/a?k=secret", options)
    assert "lorikeet[remote]" in message
    assert "secret" not in message


def test_public_path():
    assert public_path("https://u:p@h/a?k=1") == "https://***@h/a?***"
    assert public_path("/local/path") == "/local/path"


# ---- how far a download may go ----


def within(reach, path, options):
    with open_source(path, options, Transfer(reach)) as directory:
        return directory


def test_within_the_cache_the_source_is_not_asked(web, options):
    url = f"{web.url}/a?key=secret"
    with pytest.raises(NeedsNetworkError) as caught:
        within(Reach.CACHE, url, options)
    assert caught.value.host == "127.0.0.1"
    assert "secret" not in str(caught.value)
    directory = resolve_source(url, options)
    web.requests.clear()
    assert within(Reach.CACHE, url, options) == directory
    with pytest.raises(NeedsNetworkError):
        within(Reach.LOCAL, url, options)
    (directory / WEIGHTS).write_bytes(b"short")
    with pytest.raises(NeedsNetworkError):
        within(Reach.CACHE, url, options)
    assert web.requests == []


def test_within_the_cache_a_download_of_the_same_is_not_waited_for(web, options):
    url = f"{web.url}/a"
    resolve_source(url, options)
    cache = DiskCache(options.cache_dir, options.cache_bytes)
    (key,) = (path.name for path in entries(options))
    with cache.hold(key), pytest.raises(NeedsNetworkError):
        within(Reach.CACHE, url, options)
    transfer = Transfer(seconds=0.2)
    with (
        cache.hold(key),
        pytest.raises(AdapterError, match="--lora-download-timeout"),
        open_source(url, options, transfer),
    ):
        pass
    with open_source(url, options), cache.read(key) as directory:
        assert directory is not None


def test_what_is_read_within_the_cache_stays(web, tmp_path):
    options = SourceOptions(
        cache_dir=tmp_path / "cache", cache_bytes=4000, allow_private_hosts=True
    )
    resolve_source(f"{web.url}/a", options)
    put(web, "b")
    with open_source(f"{web.url}/a", options, Transfer(Reach.CACHE)) as directory:
        assert "do not fit" in refused(f"{web.url}/b", options)
        assert (directory / WEIGHTS).exists()


class Slow:
    """A web server that answers one byte at a time, or not at all.

    Attributes:
        drips: the body of a file comes so; False: not even the head.
        closed: set when a client has closed its connection.
    """

    def __init__(self, *, drips: bool) -> None:
        self.drips = drips
        self.asked, self.closed = threading.Event(), threading.Event()
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        size = 20_000
        with client:
            try:
                while head := client.recv(65536):
                    if not self.drips:
                        self.asked.set()
                        continue
                    client.sendall(
                        f"HTTP/1.1 200 OK\r\nETag: x\r\nContent-Length: {size}\r\n\r\n".encode()
                    )
                    if head.startswith(b"GET"):
                        self.asked.set()
                        while True:
                            client.sendall(b"{")
                            time.sleep(0.01)
            except OSError:
                pass
        self.closed.set()

    def close(self) -> None:
        self._socket.close()


@pytest.fixture(params=[True, False], ids=["drips", "silent"])
def slow(request):
    server = Slow(drips=request.param)
    yield server
    server.close()


def test_a_download_that_drips_or_hangs_ends_with_its_time(slow, options):
    with (
        pytest.raises(AdapterError, match=r"took more than 0\.5 s"),
        open_source(slow.url, options, Transfer(seconds=0.5)),
    ):
        pass
    assert slow.asked.is_set()
    assert slow.closed.wait(20)


def test_a_download_that_nobody_wants_closes_its_connection(slow, options):
    transfer = Transfer()
    ended: list[str] = []

    def load() -> None:
        try:
            with open_source(slow.url, options, transfer):
                pass
        except AdapterError as error:
            ended.append(str(error))

    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    assert slow.asked.wait(20)
    transfer.cancel()
    thread.join(20)
    assert "cancelled" in ended[0]
    assert slow.closed.wait(20)


def test_no_more_is_read_than_was_announced(web, options, monkeypatch):
    """A server that sends without end in place of a range."""
    asked = []
    original = remote._http_get

    async def get(fs, url, headers):
        response = await original(fs, url, {})
        asked.append(url)
        response.status = 206
        return response

    monkeypatch.setattr(remote, "_http_get", get)
    put(web, "a", data=weights(50_000))
    web.ranges = False
    monkeypatch.setattr(remote, "_CHUNK_BYTES", 10_000)
    directory = resolve_source(f"{web.url}/a", options)
    assert (directory / WEIGHTS).stat().st_size == 50_000


# ---- whom a request may ask ----


@pytest.mark.parametrize("path", ["s3://bucket/a", "http://host/a", "owner/name", "/local/a"])
def test_kinds_of_source(path, tmp_path):
    kinds = {"s3": "s3", "ht": "http", "ow": "hub", "/l": "local"}
    kind = kinds[path[:2]]
    others = tuple(other for other in LORA_SOURCES if other != kind)
    options = SourceOptions(kinds=others, cache_dir=tmp_path)
    message = refused(path, options)
    assert f"is of the kind '{kind}'; allowed by --lora-sources: {', '.join(others)}" in message


def test_a_private_host_is_refused_before_it_is_asked(web, tmp_path):
    options = SourceOptions(cache_dir=tmp_path / "cache")
    port = web.url.rpartition(":")[2]
    for host in ("127.0.0.1", "localhost", "2130706433", "0x7f.1", "0", "[::ffff:127.0.0.1]"):
        message = refused(f"http://{host}:{port}/a", options)
        assert "--lora-allow-private-hosts" in message or "not a canonical" in message, message
    assert web.requests == []
    assert entries(options) == []


def test_a_redirect_to_a_private_host_is_refused(web, options, monkeypatch):
    """The address that is connected to is looked at, for each hop."""
    with fake_hub() as public:
        public.redirect = f"{web.url}/a"
        put(public, "a")
        port = int(public.url.rpartition(":")[2])
        monkeypatch.setattr(
            addresses.PublicSockets,
            "__init__",
            lambda self: setattr(self, "_proxies", {("127.0.0.1", port)}),
        )
        message = refused(f"{public.url}/a", replace(options, allow_private_hosts=False))
        assert "--lora-allow-private-hosts" in message
        assert public.requests
        assert web.requests == []
        directory = resolve_source(f"{public.url}/a", options)
        assert (directory / WEIGHTS).read_bytes() == weights()
        assert web.requests


def test_a_name_that_means_a_private_address_is_refused(web, options, monkeypatch):
    def resolved(host, port, *args, **kwargs):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr(socket, "getaddrinfo", resolved)
    port = web.url.rpartition(":")[2]
    message = refused(
        f"http://adapters.example.com:{port}/a", replace(options, allow_private_hosts=False)
    )
    assert "not public" in message
    assert web.requests == []


def test_a_pointer_of_git_lfs_is_named(web, options):
    put(web, "a", data=b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    assert "Git LFS" in refused(f"{web.url}/a", options)
