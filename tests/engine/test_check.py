"""``lorikeet check-adapter`` on real files: the server's verdict without a server."""

from __future__ import annotations

import json

import pytest

from lorikeet import demo
from lorikeet.cli import main
from tests.support.peft_adapters import WEIGHTS, edit_config, make_adapter
from tests.support.tiny_models import make_tiny_model


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("base"), "llama")


@pytest.fixture
def adapter(llama, tmp_path):
    return make_adapter(llama, tmp_path / "a", r=20, alpha=10, targets=("q_proj", "down_proj"))


@pytest.fixture
def check(capsys):
    def check(path, model, *argv):
        # What the oracle's library wrote while it made the files.
        capsys.readouterr()
        code = main(["check-adapter", str(path), "--model-path", str(model), *argv])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return check


def test_a_good_adapter_is_a_table(check, adapter, llama):
    code, out, err = check(adapter, llama)
    assert (code, err) == (0, "")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines()]
    assert ["q_proj", "2 of 2", "20", "0.5"] in [row[:4] for row in rows]
    assert "rank 20, 4 of 4 targeted modules hit" in out.splitlines()[-1]
    assert "of the base)" not in out


def test_the_size_of_the_change_beside_the_base(check, adapter, llama):
    code, out, _ = check(adapter, llama, "--base-norms", "--json")
    assert code == 0
    assert json.loads(out)["relative_norm"] > 0


def test_no_weights_of_the_base_are_needed(check, adapter, llama):
    before = json.loads(check(adapter, llama, "--json")[1])
    for file in llama.glob("*.safetensors"):
        file.rename(file.with_suffix(".moved"))
    try:
        code, out, _ = check(adapter, llama, "--json")
        assert (code, json.loads(out)) == (0, before)
        code, out, err = check(adapter, llama, "--base-norms")
        assert (code, out) == (2, "")
        assert "model.safetensors" in err
    finally:
        for file in llama.glob("*.moved"):
            file.rename(file.with_suffix(".safetensors"))


def test_bytes_are_those_of_the_servers_type(check, adapter, llama):
    whole, half = (
        json.loads(check(adapter, llama, "--json", "--dtype", dtype)[1])["bytes"]
        for dtype in ("float32", "bfloat16")
    )
    assert whole == 2 * half > 0


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--max-lora-rank", "16"], ("rank is 20", "--max-lora-rank is 16")),
        (["--lora-target-modules", "q_proj", "v_proj"], ("down_proj", "q_proj, v_proj")),
    ],
)
def test_the_servers_limits(check, adapter, llama, argv, says):
    code, out, err = check(adapter, llama, *argv)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert all(text in err for text in ("incompatible", *says))


def test_limits_that_it_keeps(check, adapter, llama):
    argv = ("--max-lora-rank", "20", "--lora-target-modules", "all")
    assert check(adapter, llama, *argv)[0] == 0


def test_refusals_name_the_reason(check, adapter, llama, tmp_path):
    edit_config(adapter, use_dora=True)
    code, out, err = check(adapter, llama)
    assert (code, out) == (1, "")
    assert "use_dora" in err
    edit_config(adapter, use_dora=False)
    data = (adapter / WEIGHTS).read_bytes()
    (adapter / WEIGHTS).write_bytes(data[:-1])
    assert "truncated" in check(adapter, llama)[2]
    code, _, err = check(tmp_path / "nowhere", llama)
    assert code == 1
    assert "nowhere" in err
    (adapter / WEIGHTS).unlink()
    (adapter / WEIGHTS).mkdir()
    code, _, err = check(adapter, llama)
    assert code == 1
    assert WEIGHTS in err


def test_a_copy_of_the_embedding_is_compared_with_the_base(check, llama, tmp_path):
    directory = make_adapter(llama, tmp_path / "e", r=4, targets=("embed_tokens",))
    assert check(directory, llama)[0] == 0


def test_another_base(check, adapter, tmp_path):
    other = make_tiny_model(tmp_path / "other", "llama", hidden_size=32)
    code, _, err = check(adapter, other)
    assert code == 1
    assert "another base model" in err
    code, _, err = check(adapter, tmp_path / "no-base")
    assert code == 2
    assert "no-base" in err


def test_the_demo(check):
    path = demo.adapter_paths()["sql"]
    code, out, _ = check(path, "demo", "--json")
    report = json.loads(out)
    assert (code, report["rank"], report["path"]) == (0, 64, str(path))
    assert report["modules"]["hit"] == report["modules"]["in_model"] == 35
