"""Where an adapter is read from: local directories and hub ids."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from lorikeet.adapters.files import confined, read_small
from lorikeet.adapters.sources import hub, source
from lorikeet.adapters.sources.source import SourceOptions, open_source, resolve_source
from lorikeet.config import LoRAPath, ServerConfig, resolve
from lorikeet.errors import AdapterError

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
        (("adapter_config.json", "adapter_model.safetensors.index.json"), "shards"),
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

    def download(repo_id, *, allow_patterns, **rest):
        calls.append((repo_id, allow_patterns))
        return str(_fill(tmp_path / "snap", "adapter_config.json", "adapter_model.safetensors"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_source("owner/some-adapter_v1.0") == tmp_path / "snap"
    assert calls == [
        (
            "owner/some-adapter_v1.0",
            [
                "adapter_config.json",
                "adapter_model.safetensors",
                "chat_template.jinja",
                "tokenizer_config.json",
            ],
        )
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


# ---- --lora-root ----


@pytest.fixture
def root(tmp_path):
    _fill(tmp_path / "root" / "a", "adapter_config.json", "adapter_model.safetensors")
    _fill(tmp_path / "outside", "adapter_config.json", "adapter_model.safetensors")
    return tmp_path / "root"


@pytest.fixture
def inside(root):
    return SourceOptions(roots=(root,))


def refused(path, options):
    with pytest.raises(AdapterError) as caught:
        resolve_source(str(path), options)
    return str(caught.value)


def test_below_a_root(root, inside):
    assert resolve_source(str(root / "a"), inside) == root / "a"
    assert resolve_source(str(root / "a" / ".." / "a"), inside) == root / "a"


def test_outside_of_every_root(root, inside):
    outside = root.parent / "outside"
    for path in (outside, root / ".." / "outside", root / "a" / ".." / ".." / "outside"):
        assert "outside of --lora-root" in refused(path, inside)
    assert resolve_source(str(outside), inside.trusted()) == outside
    both = SourceOptions(roots=(root, outside))
    assert resolve_source(str(outside), both) == outside


def test_a_name_that_only_begins_like_a_root(root, inside):
    path = _fill(root.parent / "root2", "adapter_config.json", "adapter_model.safetensors")
    assert "outside of --lora-root" in refused(path, inside)


def test_what_is_outside_is_not_told_apart_from_what_is_not_there(root, inside):
    there, missing = root.parent / "outside", root.parent / "missing"
    assert refused(there, inside).replace("outside", "") == refused(missing, inside).replace(
        "missing", ""
    ).replace("outside", "")


def test_a_link_out_of_a_root(root, inside):
    (root / "link").symlink_to(root.parent / "outside")
    assert "outside of --lora-root" in refused(root / "link", inside)


def test_a_file_that_is_a_link_out_of_a_root(root, inside):
    weights = root / "a" / "adapter_model.safetensors"
    weights.unlink()
    weights.symlink_to(root.parent / "outside" / "adapter_model.safetensors")
    assert "leads out of --lora-root" in refused(root / "a", inside)
    assert resolve_source(str(root / "a")) == root / "a"


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_template_that_is_a_link_out_of_a_root(root, inside, name):
    (root / "a" / name).symlink_to(root.parent / "outside" / "adapter_config.json")
    assert f"{name} is a link that leads out of --lora-root" in refused(root / "a", inside)


def test_a_link_within_a_root_is_followed_once(root, inside):
    (root / "link").symlink_to(root / "a")
    assert resolve_source(str(root / "link"), inside) == root / "a"


def test_a_root_that_is_a_link(root):
    (root.parent / "alias").symlink_to(root)
    options = SourceOptions(roots=(root.parent / "alias",))
    assert resolve_source(str(root / "a"), options) == root / "a"


def test_roots_bind_local_paths_only(inside, tmp_path, monkeypatch):
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda *a, **k: str(_fill(tmp_path / "snap", *source_files())),
    )
    assert resolve_source("owner/name", inside) == tmp_path / "snap"


def source_files():
    return "adapter_config.json", source.WEIGHTS_FILE


@pytest.mark.parametrize("path", ["a\0b", "x" * 5000, "~no-such-user-here/a", "loop/a"])
def test_paths_that_the_system_refuses(path, tmp_path, monkeypatch, inside):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for options in (SourceOptions(), inside):
        # Of what is not below a root nothing is said, so it may be a hub id.
        assert refused(path, options).startswith(("adapter path", "loop/a is no local directory"))


@pytest.mark.parametrize("path", ["file:///etc", "FILE:/etc", "ftp://h/a", "simplecache::s3://b/a"])
def test_other_schemes(path):
    assert "adapter path" in refused(path, SourceOptions())


def test_a_pipe_in_place_of_a_file(tmp_path):
    os.mkfifo(_fill(tmp_path / "a", "adapter_config.json") / "adapter_model.safetensors")
    assert "has no adapter_model.safetensors" in refused(tmp_path / "a", SourceOptions())


def test_an_error_inside_the_context_is_not_ours(root):
    with pytest.raises(ZeroDivisionError), open_source(str(root / "a")):
        _ = 1 / 0


def test_options_of_a_configuration(root):
    config = resolve(
        ServerConfig(
            model_path="base",
            lora_paths=(LoRAPath("a", "p"),),
            lora_root=(str(root / ".." / "root"),),
            lora_disk_cache_dir="cache",
            lora_disk_cache_gb=1.5,
        )
    )
    assert SourceOptions.from_config(config.lora) == SourceOptions(
        roots=(root,), cache_dir=Path("cache"), cache_bytes=1_500_000_000
    )
    assert (
        SourceOptions.from_config(resolve(ServerConfig(model_path="base")).lora) == SourceOptions()
    )


def test_a_link_that_is_turned_elsewhere_after_it_was_looked_at(root, inside):
    """The file that is opened is looked at, not the path that was."""
    secret = root.parent / "outside" / "adapter_config.json"
    path = root / "a" / "adapter_config.json"
    with open_source(str(root / "a"), inside) as directory:
        assert read_small(directory / "adapter_config.json", 100) == b"{}"
        path.unlink()
        path.symlink_to(secret)
        with pytest.raises(AdapterError, match="leads out of --lora-root"):
            read_small(directory / "adapter_config.json", 100)
    assert read_small(secret, 100) == b"{}"  # others of this thread are not bound


def test_a_directory_that_is_turned_elsewhere_after_it_was_looked_at(root, inside):
    with open_source(str(root / "a"), inside) as directory:
        (root / "a").rename(root / "b")
        (root / "a").symlink_to(root.parent / "outside")
        with pytest.raises(AdapterError, match="leads out of --lora-root"):
            read_small(directory / "adapter_config.json", 100)


def test_a_link_that_is_turned_back_before_it_is_looked_at(root, inside, monkeypatch):
    path = root / "a" / "adapter_config.json"
    kept = root / "kept.json"
    path.rename(kept)
    path.symlink_to(root.parent / "outside" / "adapter_config.json")
    resolve = Path.resolve

    def turn(self, *args):
        if self == path:
            path.unlink()
            path.symlink_to(kept)
        return resolve(self, *args)

    monkeypatch.setattr(Path, "resolve", turn)
    with confined((root,)), pytest.raises(AdapterError, match="leads out"):
        read_small(path, 100)


def test_short_names_outside_of_a_root_are_all_alike(root, inside, tmp_path, monkeypatch):
    """Whether a directory lies beside the roots, or what it is, changes neither the answer nor who is asked."""
    asked = []

    def download(repo_id, **rest):
        asked.append(repo_id)
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(hub, "_check_size", lambda *args: None)
    monkeypatch.chdir(tmp_path)
    _fill(tmp_path / "zoo" / "base", "adapter_config.json")
    (tmp_path / "closed").mkdir(mode=0)
    paths = ["zoo/base", "zoo/none", "none/none", "closed/x"]
    answers = {refused(path, inside).replace(path, "PATH") for path in paths}
    assert len(answers) == 1
    assert asked == paths
    only_local = replace(inside, kinds=("local",))
    assert len({refused(path, only_local).replace(path, "PATH") for path in paths}) == 1


def test_a_path_without_permission_is_as_any_other_outside(root, inside, monkeypatch):
    def closed(self):
        raise PermissionError(13, "Permission denied")

    missing = refused("/closed/a/b", inside)
    monkeypatch.setattr(Path, "exists", closed)
    assert refused("/closed/a/b", inside) == missing
    assert "Permission" in refused("/closed/a/b", SourceOptions())


def test_a_directory_that_may_not_be_looked_into(tmp_path, monkeypatch):
    _fill(tmp_path / "a", "adapter_config.json")

    def closed(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "is_file", closed)
    assert "cannot be read: Permission denied" in refused(tmp_path / "a", SourceOptions())


@pytest.mark.parametrize(
    "path",
    [
        "ftp://user:secret@host/a",
        "http:/user:secret@host/a",
        "htps:user:secret@host/a?sig=secret",
        "file://user:secret@host/a",
        "user:secret@host/a/b",
    ],
)
def test_a_misspelt_url_shows_no_password(path, inside):
    for options in (SourceOptions(), inside):
        assert "secret" not in refused(path, options)
    assert "secret" not in source.public_path(path)


def test_a_path_of_megabytes_is_quoted_in_part():
    message = refused("a." * 500_000 + "\n", SourceOptions())
    assert len(message) < 9000
    assert message.isprintable()


def test_what_a_resolver_finds_lies_in_its_directory_or_a_root(root, tmp_path):
    found = SourceOptions(kinds=("hub",), roots=(root,)).within(tmp_path / "found")
    adapter = _fill(tmp_path / "found" / "x", *source_files())
    assert resolve_source(str(adapter), found) == adapter
    assert resolve_source(str(root / "a"), found) == root / "a"
    for name in ("adapter_model.safetensors", "chat_template.jinja", "tokenizer_config.json"):
        (adapter / name).unlink(missing_ok=True)
        (adapter / name).symlink_to(root.parent / "outside" / "adapter_config.json")
        assert f"{name} is a link that leads out of" in refused(adapter, found)
        (adapter / name).unlink()
        _fill(adapter, "adapter_model.safetensors")
