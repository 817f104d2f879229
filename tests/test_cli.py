"""The commands: what they call, their exit codes, and one line for each mistake."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from types import ModuleType

import pytest

from lorikeet import __version__, demo_run
from lorikeet.cli import main
from lorikeet.config import LoRAPath, Settings
from lorikeet.errors import AdapterError, EngineDeadError, ModelError


@pytest.fixture
def module(monkeypatch):
    """Put a module with the given contents in the place of a real one."""

    def install(name: str, **contents: object) -> None:
        double = ModuleType(name)
        vars(double).update(contents)
        monkeypatch.setitem(sys.modules, name, double)

    return install


@pytest.fixture(autouse=True)
def quiet_logging(monkeypatch):
    monkeypatch.setattr("lorikeet.cli.setup_logging", lambda level: None)


def error_line(capsys) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("lorikeet: error: ")
    return captured.err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "a command is missing; known: serve, demo, generate, check-adapter"),
        (["bench"], "unknown command 'bench'; known: serve, demo, generate, check-adapter"),
        (["--nope"], "unknown argument --nope"),
        (["serve"], "--model-path is required"),
        (["serve", "--model", "m", "--device", "cuda"], "--device is cuda"),
        (["demo", "--port", "x"], "--port is 'x'"),
        (["demo", "--port", "65536"], "--port is '65536'"),
        (["generate", "--model", "m"], "--prompt is required"),
        (
            ["generate", "--model", "m", "--prompt", "a", "--lora", "x", "--lora", "y"],
            "2 times for 1",
        ),
        (["generate", "--model", "m", "--prompt", "a", "--sampling-params", "{"], "is not JSON"),
        (["generate", "--model", "m", "--prompt", "a", "--sampling-params", "[]"], "a JSON object"),
        (["check-adapter", "a"], "--model-path is required"),
        (["check-adapter", "--model", "m"], "path"),
        (["check-adapter", "a", "--model", "m", "--max-lora-rank", "0"], "--max-lora-rank is '0'"),
        (["check-adapter", "a", "--model", "m", "--lora-target-modules", "x"], "x"),
        (["check-adapter", "a", "--model", "m", "--port", "1"], "unknown argument --port"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(capsys, argv, words):
    assert main(argv) == 2
    assert words in error_line(capsys)


@pytest.mark.parametrize(
    "argv",
    [["--help"], ["serve", "--help"], ["demo", "-h"], ["generate", "-h"], ["check-adapter", "-h"]],
)
def test_help_ends_well(capsys, argv):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 0
    assert "usage: lorikeet" in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"{__version__}\n"


def test_serve_gets_the_resolved_configuration(module):
    served = []
    module("lorikeet.server.app", serve=served.append)
    assert main(["serve", "--model-path", "m", "--port", "8000"]) == 0
    assert [(settings.model_path, settings.http.port, settings.device) for settings in served] == [
        ("m", 8000, "cpu")
    ]


def test_what_has_no_effect_is_logged(module, caplog):
    module("lorikeet.server.app", serve=lambda settings: None)
    assert main(["serve", "--model", "m", "--cuda-graph-max-bs", "2"]) == 0
    assert caplog.messages == ["--cuda-graph-max-bs has no effect: a CPU has no CUDA graphs"]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ModelError("config.json is missing\nin m"), 2),
        (EngineDeadError("the engine is gone"), 1),
    ],
)
def test_errors_of_a_command_have_their_exit_code(module, capsys, error, code):
    def serve(settings):
        raise error

    module("lorikeet.server.app", serve=serve)
    assert main(["serve", "--model", "m"]) == code
    assert " ".join(str(error).split()) in error_line(capsys)


def test_an_interrupt_has_the_shells_exit_code(module):
    def serve(settings):
        raise KeyboardInterrupt

    module("lorikeet.server.app", serve=serve)
    assert main(["serve", "--model", "m"]) == 130


class FakeLLM:
    settings: Settings

    @classmethod
    def from_settings(cls, settings):
        cls.settings = settings
        return cls()

    def generate(self, prompts, sampling, *, lora_path):
        return [
            {"text": f" {p}/{a}/{sampling['top_k']} "}
            for p, a in zip(prompts, lora_path, strict=True)
        ]


def test_generate_answers_one_prompt_with_its_text(module, capsys):
    module("lorikeet.llm", LLM=FakeLLM)
    argv = [
        "generate",
        "--model",
        "m",
        "--lora-paths",
        "a=p",
        '{"lora_name":"b","lora_path":"q=r"}',
    ]
    argv += [
        "--prompt",
        "hi",
        "--lora",
        "a",
        "--sampling-params",
        '{"top_k": 1}',
        "--page-size",
        "8",
    ]
    assert main(argv) == 0
    assert capsys.readouterr().out == "hi/a/1\n"
    settings = FakeLLM.settings
    assert settings.model_path == "m"
    assert settings.lora.lora_paths == (LoRAPath("a", "p"), LoRAPath("b", "q=r"))
    assert settings.page_size == 8


@pytest.mark.parametrize(
    ("adapters", "answers"),
    [
        ([], ["x/None/1", "y/None/1"]),
        (["--lora", "a"], ["x/a/1", "y/a/1"]),
        (["--lora", "", "--lora", "a"], ["x/None/1", "y/a/1"]),
    ],
)
def test_generate_shows_several_answers_in_a_table(module, capsys, adapters, answers):
    module("lorikeet.llm", LLM=FakeLLM)
    argv = ["generate", "--model", "m", "--lora-paths", "a=p", "--prompt", "x", "--prompt", "y"]
    assert main([*argv, *adapters, "--sampling-params", '{"top_k": 1}']) == 0
    table = capsys.readouterr().out
    assert all(answer in table for answer in answers)
    assert ("(base)" in table) == ("None" in "".join(answers))


@pytest.fixture
def checked(module):
    """What ``check-adapter`` was asked to check."""
    calls = []

    def check_adapter(settings, *, base_norms):
        calls.append((settings, base_norms))
        if settings.lora.lora_paths[0].path == "bad":
            raise AdapterError("rank 9 is\ntoo much")
        if settings.lora.lora_paths[0].path == "gone":
            raise ModelError("no such base")
        return {"rank": 4}

    def format_check(report, *, width):
        return f"table of {report} in {width}"

    module("lorikeet.engine.check", check_adapter=check_adapter, format_check=format_check)
    return calls


def test_check_adapter_prints_a_table_or_json(checked, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "90")
    assert main(["check-adapter", "a=b", "--model-path", "m"]) == 0
    assert capsys.readouterr().out == "table of {'rank': 4} in 90\n"
    argv = ["check-adapter", "a", "--model", "m", "--json", "--base-norms", "--max_lora_rank", "8"]
    assert main([*argv, "--lora-target-modules", "q_proj", "v_proj", "--dtype", "bfloat16"]) == 0
    assert json.loads(capsys.readouterr().out) == {"rank": 4}
    (first, _), (second, base_norms) = checked
    assert first.lora.lora_paths == (LoRAPath("adapter", "a=b"),)
    assert (second.lora.max_lora_rank, second.dtype, base_norms) == (8, "bfloat16", True)
    assert second.lora.lora_target_modules == ("q_proj", "v_proj")


@pytest.mark.parametrize(("path", "code"), [("bad", 1), ("gone", 2)])
def test_a_refused_adapter_has_its_own_exit_code(checked, capsys, path, code):
    assert main(["check-adapter", path, "--model-path", "m"]) == code
    error_line(capsys)
    assert len(checked) == 1


@pytest.mark.parametrize(
    ("argv", "variable", "once"),
    [([], "", False), (["--once"], "", True), ([], "1", True), (["--port", "7"], "0", False)],
)
def test_demo_ends_when_told_to(monkeypatch, argv, variable, once):
    calls = []
    monkeypatch.setattr(demo_run, "run", lambda **keywords: calls.append(keywords))
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    monkeypatch.setenv("DEMO_ONCE", variable)
    assert main(["demo", *argv]) == 0
    assert calls == [{"once": once, "port": 7 if argv == ["--port", "7"] else None}]


def test_ctrl_c_ends_the_demo_well(monkeypatch, capsys):
    def run(**keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_run, "run", run)
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    assert main(["demo"]) == 0
    assert "has ended" in capsys.readouterr().out


@pytest.mark.parametrize(
    "command", [["-m", "lorikeet.launch_server"], ["-m", "lorikeet.cli", "serve"]]
)
def test_as_a_process(command):
    done = subprocess.run(
        [sys.executable, *command, "--model", "m", "--port", "abc"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "lorikeet: error: --port is 'abc'; allowed: an integer at least 1 and at most 65535\n"
    )
