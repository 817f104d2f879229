"""The safetensors format: what the library writes is read, what it refuses is refused, and nothing big is read for it."""

from __future__ import annotations

import errno
import json
import os
import pickle
import random
import shutil
import stat
from io import BytesIO
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError

from lorikeet.adapters.tensor_header import MAX_HEADER_BYTES, parse_header
from lorikeet.errors import AdapterError
from lorikeet.lora.loader import load_adapter
from lorikeet.lora.tensors import TORCH_TYPES, accept_tensors, open_tensors
from tests.support.peft_adapters import WEIGHTS, make_adapter

CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
GIB = 1 << 30


def parse(data: bytes) -> dict:
    return parse_header(lambda at, length: data[at : at + length], len(data), "x")


def with_header(header: object, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def entry(dtype="F32", shape=(1,), offsets=(0, 4), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


def some_tensors() -> dict[str, torch.Tensor]:
    noise = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(3, 5, generator=noise),
        "b": torch.randn(7, generator=noise).bfloat16(),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(2.5, dtype=torch.float16),
        "z": torch.randn(2, 2, generator=noise).half(),
    }


def test_what_the_library_writes_is_read(tmp_path):
    tensors = some_tensors()
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    with open_tensors(path) as file:
        assert file.tensors.keys() == tensors.keys()
        for name, tensor in tensors.items():
            found = file.read(name)
            assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(found, tensor)


def test_tensors_are_read_at_once_whatever_lies_between_them(tmp_path):
    """Types of different width behind each other, an odd number of values, nothing at all, some that nobody wants."""
    made = {
        "a": torch.randn(3).to(torch.bfloat16),
        "b": torch.randn(2, 5),
        "c": torch.zeros(0, 4),
        "d": torch.randn(7).half(),
        "e": torch.randn(1, 3),
        "f": torch.randn(5, 2).to(torch.bfloat16),
    }
    path = tmp_path / "x.safetensors"
    for order in ("abcdef", "fbdace", "edcbaf"):
        # Written here: the library puts the widest first.
        entries, body = {}, b""
        for name in order:
            tensor = made[name]
            kind = next(key for key, dtype in TORCH_TYPES.items() if dtype == tensor.dtype)
            data = tensor.view(torch.uint8).numpy().tobytes()
            place = [len(body), len(body) + len(data)]
            entries[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": place}
            body += data
        path.write_bytes(with_header(entries, body))
        for wanted in (order, order[::-1], "afd", "b", ""):
            with open_tensors(path) as file:
                found = file.read_all(iter(wanted))
            assert set(found) == set(wanted)
            assert all(torch.equal(found[name], made[name]) for name in wanted)


def test_a_tensor_is_the_readers_own(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({"a": torch.ones(4)}, path)
    with open_tensors(path) as file:
        tensor = file.read("a")
        path.write_bytes(b"")
        assert torch.equal(tensor.add_(1), torch.full((4,), 2.0))


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.int8, torch.bool, torch.uint16, torch.int64, torch.float8_e4m3fn]
)
def test_every_type_has_a_place_in_the_header(dtype):
    info = parse(safetensors.torch.save({"a": torch.zeros(3).to(dtype)}))["a"]
    assert info.dtype not in TORCH_TYPES
    assert info.end - info.start == 3 * dtype.itemsize


def test_the_library_never_refuses_what_is_accepted():
    """Spoil one file in thousands of ways; where it is still accepted, the library reads the same from it."""
    good = safetensors.torch.save(some_tensors())
    source = random.Random(0)
    num_accepted = 0
    for _ in range(3000):
        data = bytearray(good)
        for _ in range(source.randint(1, 3)):
            data[source.randrange(len(data))] = source.choice(b'0123456789[]{},:"FB \x00\xff\x80')
        if source.random() < 0.2:
            del data[source.randrange(len(data)) :]
        try:
            found = parse(bytes(data))
        except AdapterError:
            continue
        num_accepted += 1
        theirs = dict(safetensors.deserialize(bytes(data)))
        assert found.keys() == theirs.keys()
        for name, info in found.items():
            assert data[info.start : info.end] == theirs[name]["data"]
    assert 100 < num_accepted < 2900


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "0 bytes"),
        (b"\x02\0\0\0\0\0\0", "7 bytes"),
        (bytes(8), "not a JSON object"),
        (bytes(100), "not a JSON object"),
        ((3).to_bytes(8, "little") + b"{}", "claims 3 bytes"),
        ((2**63).to_bytes(8, "little") + b"{}", "claims 9223372036854775808 bytes"),
        ((2**64 - 1).to_bytes(8, "little") + b"{}", "claims"),
        (with_header(b"[]"), "not a JSON object"),
        (with_header(b"{"), "not valid JSON"),
        (with_header(b"{\xff}"), "not valid JSON"),
        (with_header(b'{"a":' * 100_000), "not valid JSON"),
        (with_header(b'{"a": NaN}'), "needs dtype"),
        (with_header(b'{"a": 1, "a": 1}'), "twice"),
        (with_header({"a": []}), "needs dtype"),
        (with_header({"a": entry(more=1)}, bytes(4)), "needs dtype"),
        (with_header({"a": entry(dtype="F31")}, bytes(4)), "unknown type 'F31'"),
        (with_header({"a": entry(dtype=[])}, bytes(4)), "unknown type"),
        (with_header({"a": entry(shape=[-1])}, bytes(4)), "shape [-1]"),
        (with_header({"a": entry(shape=[1.0])}, bytes(4)), "shape [1.0]"),
        (with_header({"a": entry(shape=[True])}, bytes(4)), "shape [True]"),
        (with_header({"a": entry(offsets=[0, 4, 8])}, bytes(4)), "place [0, 4, 8]"),
        (with_header({"a": entry(offsets=[4, 0])}, bytes(4)), "-4 bytes"),
        (with_header({"a": entry(shape=[2])}, bytes(4)), "4 bytes"),
        (with_header({"a": entry(shape=[2**40, 2**40])}, bytes(4)), "4 bytes"),
        (with_header({"a": entry()}, bytes(3)), "in truth"),
        (with_header({"a": entry()}, bytes(5)), "in truth"),
        (with_header({"a": entry(offsets=[1, 5])}, bytes(5)), "begins at"),
        (with_header({"a": entry(), "b": entry()}, bytes(4)), "tensor b begins at"),
        (with_header({"": entry()}, bytes(4)), "the name ''"),
        (with_header({"a\n[31m": entry()}, bytes(4)), "the name 'a\\n"),
        (with_header({"a" * 600: entry()}, bytes(4)), "the name"),
    ],
)
def test_a_header_that_is_wrong(data, says):
    with pytest.raises(AdapterError, match=r"^x is broken or truncated: ") as caught:
        parse(data)
    assert says in str(caught.value)


def saved(**options) -> bytes:
    file = BytesIO()
    torch.save(some_tensors(), file, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        saved(),
        saved(_use_new_zipfile_serialization=False),
        pickle.dumps({"a": 1}),
        pickle.dumps({"a": 1}, protocol=2),
    ],
    ids=["zip", "legacy", "pickle", "protocol-2"],
)
def test_a_pickle_is_named(data):
    with pytest.raises(AdapterError, match="x is a pickle or an archive, not safetensors"):
        parse(data)


def test_a_header_that_begins_like_a_pickle_is_none():
    """Its length is 0x280, which are the first two bytes of a pickle."""
    name, size = "a" * 10, 0x280
    text = json.dumps({name: entry()}).encode().ljust(size)
    assert parse(with_header(text, bytes(4)))[name].end == 8 + size + 4


# Large files that are no adapters: as many bytes are read as there are in the header.


def bytes_read() -> int:
    """What this process has read so far, from files and everything else."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


def sparse(path: Path, head: bytes, size: int) -> None:
    path.unlink()
    with path.open("wb") as file:
        file.write(head)
        file.truncate(size)


def model_header(body: int) -> bytes:
    """Of 5 GiB of a base model's weights."""
    shape = [body // 4]
    return with_header({"model.embed_tokens.weight": entry("F32", shape, [0, body])})


@pytest.fixture
def copied(llama, tmp_path):
    return make_adapter(llama, tmp_path / "a", r=4, targets=("q_proj",))


@pytest.mark.parametrize(
    ("head", "says"),
    [
        (b"", "not a JSON object"),
        (b"\x80\x02}q\x00", "pickle"),
        ((4 * GIB).to_bytes(8, "little") + b"{", f"claims {4 * GIB} bytes"),
        ((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{", f"at most {MAX_HEADER_BYTES}"),
        (model_header(5 * GIB), "model.embed_tokens.weight matches no module"),
        (model_header(4 * GIB), "in truth"),
    ],
    ids=["zeros", "pickle", "header-of-4-GiB", "header-too-long", "a-model", "longer-than-said"],
)
def test_gigabytes_that_are_no_adapter_are_not_read(copied, sites, layout, head, says):
    body = 5 * GIB
    size = len(head) + body if says.startswith("model") else body
    sparse(copied / WEIGHTS, head, size)
    before = bytes_read()
    with pytest.raises(AdapterError) as caught:
        load_adapter("a", copied, sites, layout, torch.float32)
    assert bytes_read() - before < 100_000
    assert says in str(caught.value)


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(1 << 20), "b": torch.ones(4)}, path)
    with open_tensors(path) as file:
        os.truncate(path, 1 << 20)
        with pytest.raises(AdapterError, match=r"x\.safetensors.*truncated"):
            file.read("a")


# From the wire.


def send(config, data, directory):
    """Accept what lies in a directory of its own, as whoever has received it has written it."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(
        directory / "weights", "wb", opener=lambda path, flags: os.open(path, flags, 0o600)
    ) as file:
        file.write(data)
    accept_tensors(config, directory / "weights")


@pytest.fixture(scope="module")
def plain(llama, tmp_path_factory):
    return make_adapter(llama, tmp_path_factory.mktemp("plain"), r=4, targets=("q_proj",))


def test_an_adapter_from_the_wire_is_the_one_that_was_sent(plain, tmp_path, sites, layout):
    config = json.loads((plain / "adapter_config.json").read_text())
    out = tmp_path / "new" / "out"
    send(config, (plain / WEIGHTS).read_bytes(), out)
    sent, got = (load_adapter("a", d, sites, layout, torch.float32) for d in (plain, out))
    assert sent.digest == got.digest
    assert sorted(path.name for path in out.iterdir()) == ["adapter_config.json", WEIGHTS]
    assert stat.S_IMODE(out.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in out.iterdir()} == {0o600}


def test_a_configuration_as_peft_holds_it(tmp_path):
    from peft import LoraConfig

    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"]).to_dict()
    send(config, safetensors.torch.save(some_tensors()), tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stored["target_modules"] == ["q_proj", "v_proj"]
    assert stored["peft_type"] == "LORA"


@pytest.mark.parametrize(
    ("config", "tensors", "says"),
    [
        ({**CONFIG, "use_dora": True}, None, "config_dict: use_dora"),
        ({**CONFIG, "r": 0}, None, "config_dict: r is 0"),
        ({**CONFIG, "lora_alpha": float("nan")}, None, "lora_alpha"),
        ({}, None, "peft_type"),
        ({**CONFIG, "note": object()}, None, "object is not JSON"),
        ({**CONFIG, "note": "x" * 5_000_000}, None, "allowed: at most"),
        (CONFIG, b"", "tensors is broken or truncated"),
        (CONFIG, saved(), "pickle"),
        (CONFIG, safetensors.torch.save({}), "no tensor"),
        (CONFIG, safetensors.torch.save(some_tensors())[:-1], "truncated"),
    ],
)
def test_what_the_wire_may_not_bring(tmp_path, config, tensors, says):
    data = safetensors.torch.save(some_tensors()) if tensors is None else tensors
    with pytest.raises(AdapterError) as caught:
        send(config, data, tmp_path / "out")
    assert says in str(caught.value)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["weights"]


def test_more_than_is_allowed(tmp_path, monkeypatch):
    monkeypatch.setattr("lorikeet.lora.tensors.MAX_TENSORS_BYTES", 100)
    with pytest.raises(AdapterError, match="at most 100"):
        send(CONFIG, safetensors.torch.save(some_tensors()), tmp_path)


@pytest.mark.parametrize("fails", ["replace", "rename"])
def test_a_full_disk_is_a_refusal(tmp_path, monkeypatch, fails):
    def full(*paths, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, fails, full)
    with pytest.raises(AdapterError, match="No space left on device"):
        send(CONFIG, safetensors.torch.save(some_tensors()), tmp_path)
    assert not (tmp_path / WEIGHTS).exists()


def test_an_adapter_is_replaced_whole(plain, tmp_path):
    out = shutil.copytree(plain, tmp_path / "out")
    send(CONFIG, safetensors.torch.save(some_tensors()), out)
    assert safetensors.torch.load_file(out / WEIGHTS).keys() == some_tensors().keys()


def test_the_library_is_stricter_nowhere():
    """The oracle of the fuzz test does refuse."""
    with pytest.raises(SafetensorError):
        safetensors.deserialize(with_header({"a": entry()}, bytes(3)))


@pytest.mark.parametrize(
    ("shape", "offsets"),
    [
        ([2**64 - 1] * 100_000, [0, 4]),
        ([2**64 - 1] * 8, [0, 4]),
        ([1] * 9, [0, 4]),
        ([1], [0, 10**4000]),
        ([1], [0, 4, 4]),
        ([1], [0, 4] * 50_000),
        ([[[]]], [0, 4]),
        ([0] * 300_000, [0, 0]),
    ],
)
def test_numbers_of_a_header_are_bounded_before_anything_is_computed_with_them(shape, offsets):
    entry = {"dtype": "F32", "shape": shape, "data_offsets": offsets}
    with pytest.raises(AdapterError, match="is broken or truncated: tensor a ") as caught:
        parse(with_header({"a": entry}, b"xxxx"))
    assert len(str(caught.value)) < 700


def test_a_pointer_of_git_lfs_is_called_by_its_name():
    data = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    with pytest.raises(AdapterError, match=r"pointer of Git LFS.*git lfs pull"):
        parse(data)
