"""Local directories and hub ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from lorikeet.errors import ModelError
from lorikeet.models import source
from lorikeet.models.source import locate_model, locate_tokenizer


def test_a_directory_is_taken_as_it_is(tmp_path: Path) -> None:
    assert locate_model(str(tmp_path)) == tmp_path


def test_a_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(ModelError, match="is a file; give the directory"):
        locate_model(str(file))


@pytest.mark.parametrize("name", ["/no/such/model", "./model", "a/b/c", "../x/y", "a/..b"])
def test_what_is_no_hub_id_is_not_looked_up(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(ModelError, match="does not exist"):
        locate_model(name)


@pytest.mark.parametrize("weights", [True, False])
def test_a_hub_id_is_downloaded_without_pickles(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, weights: bool
) -> None:
    calls: list[tuple[str, list[str]]] = []

    def download(repo_id: str, *, allow_patterns: list[str]) -> str:
        calls.append((repo_id, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert locate_model("owner/tiny-model", weights=weights) == tmp_path
    ((repo_id, patterns),) = calls
    assert repo_id == "owner/tiny-model"
    assert {"*.json", "*.jinja"} <= set(patterns)
    assert ("*.safetensors" in patterns) == weights
    assert not any("bin" in pattern or "*.pt" in pattern for pattern in patterns)


def test_a_tokenizer_is_a_path_or_what_a_hub_id_has_beside_its_weights(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    patterns: list[str] = []
    monkeypatch.setattr(source, "_download", lambda name, wanted: patterns.extend(wanted))
    file = tmp_path / "tokenizer.json"
    file.touch()
    assert locate_tokenizer(str(file)) == file
    assert patterns == []
    locate_tokenizer("owner/name")
    assert "*.json" in patterns
    assert "*.safetensors" not in patterns


def test_offline_without_a_cached_copy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The hub client itself, told to stay offline."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="'owner/tiny-model' is no local directory, and it cannot"):
        locate_model("owner/tiny-model")


class RefusedError(HfHubHTTPError):
    """The client's error without the response that its constructor wants (of which HTTP library depends)."""

    def __init__(self, message: str) -> None:
        Exception.__init__(self, message)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (LocalEntryNotFoundError("no connection"), "no local directory.*no connection"),
        (OSError(28, "No space left on device"), "No space left"),
        (HFValidationError("bad name"), "no valid hub id: bad name"),
        (RefusedError("401 gated"), "401 gated"),
    ],
)
def test_failures_name_the_repository(
    monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    def download(*args: Any, **kwargs: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ModelError, match=message) as caught:
        locate_model("owner/gated")
    assert "owner/gated" in str(caught.value)
