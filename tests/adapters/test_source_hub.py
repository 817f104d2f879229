"""Adapters from the Hugging Face hub, over HTTP against a double of its API."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from dataclasses import replace

import huggingface_hub
import pytest
from huggingface_hub import constants

from lorikeet.adapters.sources.hub import HUB, HubId, _stopper, parse_id
from lorikeet.adapters.sources.source import SourceOptions, open_source, pin_source, resolve_source
from lorikeet.adapters.sources.transfer import (
    NeedsNetworkError,
    Reach,
    Transfer,
    TransferEndedError,
)
from lorikeet.errors import AdapterError
from tests.support.fake_hub import Repo, commit_of, fake_hub

WEIGHTS = "adapter_model.safetensors"
FILES = {
    "adapter_config.json": b'{"r": 4}',
    "adapter_model.safetensors": bytes(range(256)) * 400,
    "chat_template.jinja": b"{{ messages }}",
    "tokenizer_config.json": b"{}",
    "adapter_model.bin": b"pickle",
    "training_args.bin": b"pickle",
    "README.md": b"# an adapter",
}
OTHER = {**FILES, "adapter_config.json": b'{"r": 8}'}


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    # The tests run offline; the double is on this machine.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with fake_hub() as server:
        server.repos["owner/name"] = Repo({"main": FILES, "v2": OTHER})
        yield server


@pytest.fixture
def small_blocks(monkeypatch):
    """The client resumes at whole blocks, 10 MB unless told otherwise, and waits before it does."""
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


@pytest.fixture
def options(hub, tmp_path):
    return SourceOptions(hub_cache=tmp_path / "cache", hub_endpoint=hub.url)


def refused(path, options):
    with pytest.raises(AdapterError) as caught:
        resolve_source(path, options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_download_takes_only_what_an_adapter_has(hub, options):
    directory = resolve_source("owner/name", options)
    assert {path.name for path in directory.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "tokenizer_config.json",
    }
    for path in directory.iterdir():
        assert path.read_bytes() == FILES[path.name]
    assert hub.asked("GET", ".bin") == []


def test_a_second_use_transfers_nothing(hub, options):
    first = resolve_source("owner/name", options)
    sent = hub.sent
    assert resolve_source("owner/name", options) == first
    assert len(hub.asked("GET", "adapter_model.safetensors")) == 1
    assert hub.sent - sent < 1000


def test_a_revision(options):
    directory = resolve_source("owner/name@v2", options)
    assert (directory / "adapter_config.json").read_bytes() == b'{"r": 8}'
    assert directory.name == commit_of(OTHER)
    main = resolve_source(f"owner/name@{commit_of(FILES)}", options)
    assert (main / "adapter_config.json").read_bytes() == b'{"r": 4}'


def test_a_pinned_id_keeps_its_bytes_when_the_branch_moves_on(hub, options):
    pinned = pin_source("owner/name", resolve_source("owner/name", options))
    assert pinned == f"owner/name@{commit_of(FILES)}"
    hub.repos["owner/name"] = Repo({"main": OTHER, "old": FILES})
    assert (resolve_source(pinned, options) / "adapter_config.json").read_bytes() == b'{"r": 4}'
    moved = resolve_source("owner/name", options)
    assert (moved / "adapter_config.json").read_bytes() == b'{"r": 8}'


def test_only_hub_ids_are_pinned(tmp_path):
    for path in (str(tmp_path), "s3://bucket/a", "a/b/c"):
        assert pin_source(path, tmp_path) == path


def test_a_cut_connection_is_resumed(hub, options, small_blocks):
    hub.cuts[WEIGHTS] = [50_000, 20_000]
    directory = resolve_source("owner/name", options)
    assert (directory / WEIGHTS).read_bytes() == FILES[WEIGHTS]
    assert hub.asked("GET", WEIGHTS) == [None, "bytes=50000-", "bytes=70000-"]


def test_a_download_that_failed_leaves_nothing_that_passes_for_an_adapter(
    hub, options, small_blocks
):
    hub.cuts[WEIGHTS] = [50_000] + 20 * [0]
    message = refused("owner/name", options)
    assert "owner/name" in message
    assert "could not be downloaded" in message
    down = SourceOptions(hub_cache=options.hub_cache, hub_endpoint="http://127.0.0.1:9")
    assert "owner/name" in refused("owner/name", down)
    hub.cuts.clear()
    directory = resolve_source("owner/name", options)
    assert (directory / WEIGHTS).read_bytes() == FILES[WEIGHTS]


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("owner/missing", "no such repository"),
        ("owner/name@v9", "no revision v9"),
        ("owner/gated", "gated"),
    ],
)
def test_what_is_not_there_or_not_allowed(hub, options, path, says):
    hub.repos["owner/gated"] = Repo({"main": FILES}, gated=True)
    message = refused(path, options)
    assert path in message
    assert says in message


def test_a_gated_repository_opens_with_a_token_that_no_message_shows(hub, options, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    hub.repos["owner/gated"] = Repo({"main": FILES}, gated=True)
    assert "secret" not in refused("owner/gated", options)
    assert hub.authorization == {"Bearer hf_verysecret"}


def test_a_repository_of_a_model_is_refused_by_the_missing_file(hub, options):
    hub.repos["owner/model"] = Repo({"main": {"config.json": b"{}", "model.safetensors": b"x"}})
    assert "adapter_config.json" in refused("owner/model", options)
    assert hub.asked("GET", "model.safetensors") == []


def test_a_repository_with_a_pickle_only(hub, options):
    files = {"adapter_config.json": b"{}", "adapter_model.bin": b"pickle"}
    hub.repos["owner/pickle"] = Repo({"main": files})
    assert "no adapter_model.safetensors" in refused("owner/pickle", options)


def test_offline_serves_what_was_downloaded_and_nothing_else(hub, options, monkeypatch):
    first = resolve_source("owner/name", options)
    num_requests = len(hub.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve_source("owner/name", options) == first
    assert "owner/other" in refused("owner/other", options)
    assert len(hub.requests) == num_requests


def test_a_hub_that_is_down_serves_what_was_downloaded(hub, options, tmp_path):
    first = resolve_source("owner/name", options)
    down = SourceOptions(hub_cache=options.hub_cache, hub_endpoint="http://127.0.0.1:9")
    assert resolve_source("owner/name", down) == first
    assert "owner/other" in refused("owner/other", down)


def test_the_endpoint_of_the_environment(hub, tmp_path):
    """In a process of its own: the client reads its variables when it is imported."""
    code = "from lorikeet.adapters.sources.source import resolve_source; print(resolve_source('owner/name'))"
    changes = {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "c"), "HF_HUB_OFFLINE": "0"}
    environment = {**os.environ, **changes}
    shown = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert shown.stdout.strip().endswith(commit_of(FILES))
    assert str(tmp_path / "c") in shown.stdout


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("owner/name", HubId("owner/name")),
        ("owner/na-me_v1.0", HubId("owner/na-me_v1.0")),
        ("owner/name@main", HubId("owner/name", "main")),
        ("owner/name@refs/pr/1", HubId("owner/name", "refs/pr/1")),
        ("name", None),
        ("a/b/c", None),
        ("../name", None),
        ("owner/..", None),
        ("owner/name@", None),
        ("owner/name@../../x", None),
        ("owner/name@/etc", None),
        ("owner/na me", None),
        ("owner/name\n", None),
    ],
)
def test_hub_ids(text, expected):
    assert parse_id(text) == expected
    assert expected is None or str(expected) == text


def within(reach, path, options):
    with open_source(path, options, Transfer(reach)) as directory:
        return directory


def test_within_the_cache_the_hub_is_not_asked(hub, options):
    with pytest.raises(NeedsNetworkError) as caught:
        within(Reach.CACHE, "owner/name", options)
    assert caught.value.host == HUB
    directory = resolve_source("owner/name", options)
    pinned = pin_source("owner/name", directory)
    num_requests = len(hub.requests)
    assert within(Reach.CACHE, pinned, options) == directory
    with pytest.raises(NeedsNetworkError):
        within(Reach.LOCAL, pinned, options)
    assert len(hub.requests) == num_requests


def test_a_repository_that_is_too_large_is_refused_before_it_is_transferred(hub, options):
    small = replace(options, cache_bytes=50_000)
    assert "more than --lora-disk-cache-gb allows (50000)" in refused("owner/name", small)
    hub.repos["owner/text"] = Repo({"main": {**FILES, "chat_template.jinja": b"x" * (5 << 20)}})
    assert "chat_template.jinja has 5242880 bytes" in refused("owner/text", options)
    assert hub.asked("GET", WEIGHTS) == hub.asked("GET", "chat_template.jinja") == []


@pytest.mark.parametrize("seconds", [0.2, None])
def test_a_hub_that_is_silent_holds_nobody_for_ever(hub, options, seconds, monkeypatch):
    gate = threading.Event()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: gate.wait(20))
    transfer = Transfer(seconds=seconds)
    if seconds is None:
        threading.Timer(0.2, transfer.cancel).start()
    with pytest.raises(TransferEndedError), open_source("owner/name", options, transfer):
        pass
    gate.set()


def test_a_download_that_nobody_wants_stops_by_itself(hub, options, small_blocks):
    """The part that is left behind looks whether it is wanted with each block."""
    transfer = Transfer()
    stopper = _stopper(transfer)
    with stopper(total=10, name="x", unit="B") as bar:
        bar.update(5)
        transfer.cancel()
        with pytest.raises(TransferEndedError):
            bar.update(5)
