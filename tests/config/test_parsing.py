"""The command line and the YAML file: both spell the same options, and one wins over the other."""

from __future__ import annotations

import pytest

from lorikeet.config import OPTIONS, LoRAPath, Settings, resolve
from lorikeet.config.parsing import (
    Parser,
    add_options,
    config_from_args,
    config_from_values,
)
from lorikeet.errors import ConfigError
from scripts import write_docs


def parse(*argv: str) -> Settings:
    parser = Parser(prog="test", description="test")
    add_options(parser)
    return resolve(config_from_args(parser.parse(argv)))


def refused(*argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(*argv)
    return str(caught.value)


@pytest.fixture
def file(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "config.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def test_every_option_has_a_flag_and_shows_its_default():
    parser = Parser(prog="test", description="test")
    add_options(parser)
    text = " ".join(parser.format_help().split()).replace("- ", "-")
    for option in OPTIONS.values():
        assert option.flag in text
        assert option.required or f"(default: {option.default_text})".replace("- ", "-") in text


def test_values_get_their_types():
    config = parse(
        *(
            "--model-path",
            "m",
            "--port",
            "8000",
            "--mem-fraction-static",
            "0.5",
            "--enable-metrics",
        ),
        *("--lora-paths", "a=p", '{"lora_name":"b","lora_path":"q","pinned":true}', "r"),
        *("--lora-target-modules", "q_proj", "v_proj", "--cuda-graph-bs", "1", "2"),
    )
    assert (config.http.port, config.mem_fraction_static, config.http.enable_metrics) == (
        8000,
        0.5,
        True,
    )
    assert config.lora.lora_paths == (
        LoRAPath("a", "p"),
        LoRAPath("b", "q", pinned=True),
        LoRAPath("r", "r"),
    )
    assert config.lora.lora_target_modules == ("q_proj", "v_proj")
    assert config.cuda_graph_bs == (1, 2)


@pytest.mark.parametrize(
    "argv",
    [
        ("--model", "m", "--tp", "1", "--max-loras-per-batch", "3"),
        ("--model_path", "m", "--tp_size", "1", "--max_loras_per_batch", "3"),
        ("--model-path=m", "--tp-size=1", "--max_loras_per_batch=3"),
    ],
)
def test_spellings_of_a_flag(argv):
    config = parse(*argv)
    assert (config.model_path, config.tp_size, config.lora.max_loras_per_batch) == ("m", 1, 3)


def test_an_underscore_in_a_value_stays():
    config = parse("--model-path=my_model", "--served-model-name", "the_name")
    assert (config.model_path, config.served_model_name) == ("my_model", "the_name")


def test_a_list_given_twice_is_one_list():
    config = parse("--model", "m", "--lora-paths", "a=p", "--port", "1", "--lora-paths", "b=q")
    assert [entry.name for entry in config.lora.lora_paths] == ["a", "b"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ((), ["--model-path is required"]),
        (
            ("--model", "m", "--max-lora-ranks", "8"),
            ["--max-lora-ranks", "did you mean --max-lora-rank?"],
        ),
        (("--model", "m", "--zzz"), ["unknown argument --zzz", "--help"]),
        (("--model", "m", "word"), ["unknown argument word"]),
        (("--model",), ["--model", "expected one argument"]),
        (("--model", "m", "--port", "x"), ["--port is 'x'"]),
        (("--model", "m", "--max-lora", "8"), ["unknown argument --max-lora"]),
        (("--model", "m", "--no-enable-lora", "--lora-paths", "a=p"), ["--no-enable-lora"]),
        (
            ("--model", "m", "--config", "/no/such.yaml"),
            ["--config /no/such.yaml", "cannot be read"],
        ),
    ],
)
def test_a_bad_command_line_is_refused(argv, words):
    message = refused(*argv)
    assert all(word in message for word in words), message


def test_a_file_gives_options_and_the_command_line_wins(file):
    path = file(
        "model-path: m\nport: 8000\nmax_running_requests: 4\ndisable-radix-cache: true\n"
        "lora_paths:\n  - a=p\n  - {lora_name: b, lora_path: q, pinned: true}\n"
    )
    config = parse("--config", path, "--port", "9000", "--no-disable-radix-cache")
    assert (config.model_path, config.http.port, config.max_running_requests) == ("m", 9000, 4)
    assert config.disable_radix_cache is False
    assert config.lora.lora_paths == (LoRAPath("a", "p"), LoRAPath("b", "q", pinned=True))


def test_a_lone_value_is_a_list_of_one(file):
    config = parse("--config", file("model: m\nlora_paths: a=p\nlora_target_modules: all\n"))
    assert config.lora.lora_paths == (LoRAPath("a", "p"),)
    assert config.lora.lora_target_modules == ("all",)


def test_an_empty_file_gives_nothing(file):
    assert parse("--config", file("# nothing\n"), "--model", "m").model_path == "m"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "model: m\nmax_lora: 3\n",
            ["unknown key 'max_lora'", "known: model_path", "enable_metrics"],
        ),
        ("model: m\nmodel_path: n\n", ["gives model_path twice"]),
        ("model: m\nconfig: other\n", ["unknown key 'config'"]),
        ("model: m\nport: '8o00'\n", ["--port is '8o00'"]),
        ("model: m\nenable_metrics: 1\n", ["--enable-metrics is 1", "true or false"]),
        ("- model\n", ["must be a mapping"]),
        ("model: [m\n", ["is not YAML"]),
    ],
)
def test_a_bad_file_is_refused(file, text, words):
    path = file(text)
    message = refused("--config", path)
    assert all(word in message for word in [path, *words] if word != path or "--config" in message)
    assert "\n" not in message


def test_keys_come_from_the_environment_unless_given(monkeypatch, file):
    monkeypatch.setenv("LORIKEET_API_KEY", "from-env")
    monkeypatch.setenv("LORIKEET_ADMIN_API_KEY", "admin-env")
    assert parse("--model", "m").http.api_key == "from-env"
    assert parse("--model", "m").http.admin_api_key == "admin-env"
    assert parse("--model", "m", "--api-key", "given").http.api_key == "given"
    assert parse("--config", file("model: m\napi_key: file\n")).http.api_key == "file"


def test_values_may_be_text_or_typed():
    config = resolve(config_from_values({"model_path": "m", "port": "8000", "page_size": 8}))
    assert (config.http.port, config.page_size) == (8000, 8)


def test_directories_of_adapters(tmp_path):
    config = parse(
        *("--model", "m", "--lora-paths", "a=p", "--lora-root", str(tmp_path), "/"),
        *("--lora-disk-cache-gb", "1.5", "--lora-disk-cache-dir", "c"),
    )
    assert config.lora.lora_root == (str(tmp_path), "/")
    assert (config.lora.lora_disk_cache_gb, config.lora.lora_disk_cache_dir) == (1.5, "c")


def test_the_table_has_a_row_for_each_option():
    text = write_docs.options_page()
    assert all(f"| `{option.flag}`" in text for option in OPTIONS.values())
