"""Where an adapter is read from: local directories and hub ids."""

from __future__ import annotations

import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from lorikeet.errors import AdapterError
from lorikeet.lora.source import resolve_source

# What the client's own HTTP library raises when a transfer breaks off.
HFHTTPError = HfHubHTTPError.__bases__[0]


def _fill(directory, *names):
    directory.mkdir(parents=True, exist_ok=True)
    for name in names:
        (directory / name).write_bytes(b"{}")
    return directory


def test_a_local_directory(tmp_path):
    path = _fill(tmp_path / "a", "adapter_config.json", "adapter_model.safetensors")
    assert resolve_source(str(path)) == path


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ((), "adapter_config.json"),
        (("adapter_model.safetensors",), "adapter_config.json"),
        (("adapter_config.json",), "adapter_model.safetensors"),
        (("adapter_config.json", "model.safetensors"), "adapter_model.safetensors"),
        (("adapter_config.json", "adapter_model.bin"), "pickle"),
    ],
)
def test_missing_files_are_named(tmp_path, files, says):
    with pytest.raises(AdapterError, match=says) as caught:
        resolve_source(str(_fill(tmp_path / "a", *files)))
    assert str(tmp_path / "a") in str(caught.value)


@pytest.mark.parametrize(
    "path", ["/nowhere/adapter", "nowhere", "./owner/name", "../x/y", "a/b/c", "~/no/adapter"]
)
def test_a_missing_path_is_named_and_not_looked_for_on_the_hub(path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(AdapterError, match="does not exist") as caught:
        resolve_source(path)
    assert path in str(caught.value)


def test_a_missing_path_below_a_local_directory_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "adapters").mkdir()
    with pytest.raises(AdapterError, match="adapters/sql does not exist"):
        resolve_source("adapters/sql")


def test_a_file_in_place_of_a_directory(tmp_path):
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(b"x")
    with pytest.raises(AdapterError, match="not a directory"):
        resolve_source(str(path))


def test_a_hub_id_is_downloaded_without_pickles(tmp_path, monkeypatch):
    calls = []

    def download(repo_id, *, allow_patterns):
        calls.append((repo_id, allow_patterns))
        return str(_fill(tmp_path / "snap", "adapter_config.json", "adapter_model.safetensors"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_source("owner/some-adapter_v1.0") == tmp_path / "snap"
    assert calls == [
        ("owner/some-adapter_v1.0", ["adapter_config.json", "adapter_model.safetensors"])
    ]


def test_a_hub_repository_of_something_else_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *a, **k: str(_fill(tmp_path / "s"))
    )
    with pytest.raises(AdapterError, match=r"adapter_config\.json"):
        resolve_source("owner/name")


def test_a_bad_hub_id_is_refused(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(AdapterError, match=r"a/b\.\.c"):
        resolve_source("a/b..c")


@pytest.mark.parametrize(
    "error",
    [
        LocalEntryNotFoundError("no such snapshot"),
        HFHTTPError("no such repository"),
        OSError("no network"),
    ],
)
def test_a_failed_download_names_the_id_and_the_reason(error, monkeypatch):
    def download(*args, **fields):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(
        AdapterError, match=r"owner/name.*no (such snapshot|such repository|network)"
    ):
        resolve_source("owner/name")
