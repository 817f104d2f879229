"""The command ``lorikeet``: serve, demo, generate, check-adapter.

A mistake of the user is one line on stderr and exit code 2; a failure of ours is one line and exit code 1, and so is
an adapter that ``check-adapter`` refuses. The modules behind a command are imported when it runs, so ``--help`` and a
wrong flag are answered at once.
"""

from __future__ import annotations

import argparse
import json
import logging
import signal
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import cast

from lorikeet import __version__, demo, envs
from lorikeet.config import OPTIONS, LoRAPath, Settings, notes, read_value, resolve
from lorikeet.config.parsing import (
    Parser,
    add_option,
    add_options,
    config_from_args,
    config_from_values,
)
from lorikeet.errors import AdapterError, ConfigError, LorikeetError, UserError
from lorikeet.log import setup_logging
from lorikeet.signals import exit_on_interrupt
from lorikeet.utils import format_answers, terminal_width

logger = logging.getLogger(__name__)

EXIT_FAULT = 1
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130

_OVERVIEW = """\
One base model, many LoRA adapters, every sequence of a batch with its own.

commands:
  serve      the HTTP server; `python -m lorikeet.launch_server` is the same
  demo       the embedded model and its adapters: one question, every answer
  generate   answer prompts without a server
  check-adapter
             would the server take this adapter, and what would it do?

`lorikeet COMMAND --help` lists the options."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(words)
    except UserError as error:
        return _fail(error, EXIT_USER_ERROR)
    except LorikeetError as error:
        return _fail(error, EXIT_FAULT)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _fail(error: LorikeetError, code: int) -> int:
    line = " ".join(str(error).split())
    sys.stderr.write(f"lorikeet: error: {line}\n")
    return code


def _dispatch(words: list[str]) -> int:
    if words and words[0] in COMMANDS:
        return COMMANDS[words[0]](words[1:])
    parser = Parser(
        prog="lorikeet",
        description=_OVERVIEW,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    if not words:
        raise ConfigError(f"a command is missing; known: {', '.join(COMMANDS)}")
    if not words[0].startswith("-"):
        raise ConfigError(f"unknown command {words[0]!r}; known: {', '.join(COMMANDS)}")
    parser.parse(words)
    return 0


def _serve(words: list[str]) -> int:
    parser = Parser(prog="lorikeet serve", description="Serve a base model and its adapters.")
    add_options(parser)
    settings = _settings(parser.parse(words))
    # Until it listens to signals itself: it starts by importing much.
    with exit_on_interrupt():
        from lorikeet.server.app import serve

        serve(settings)
    return 0


def _demo(words: list[str]) -> int:
    parser = Parser(
        prog="lorikeet demo",
        description=f"Ask the embedded model and each of its adapters: {demo.QUESTION}",
    )
    parser.add_argument(
        "--port", default=None, help="port of the server (default: 30000, or a free one)"
    )
    parser.add_argument(
        "--once", action="store_true", help="end after the table (as DEMO_ONCE=1 does)"
    )
    args = parser.parse(words)
    port = None if args.port is None else cast(int, read_value(OPTIONS["port"], args.port))
    with exit_on_interrupt():
        from lorikeet.demo_run import run

    once = args.once or envs.DEMO_ONCE.get()
    # What ends this process (a closed terminal, a supervisor) ends the server too.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        run(once=once, port=port)
    except KeyboardInterrupt:
        sys.stdout.write("\nThe server has ended.\n")
    return 0


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _generate(words: list[str]) -> int:
    parser = Parser(
        prog="lorikeet generate", description="Answer prompts in this process, without a server."
    )
    own = parser.add_argument_group("prompts")
    own.add_argument(
        "--prompt", action="append", default=[], help="a prompt; may be given several times"
    )
    own.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="NAME",
        help="an adapter: once for all prompts, or once for each; '' is the base model",
    )
    own.add_argument(
        "--sampling-params",
        default="{}",
        metavar="JSON",
        help='like the field of the HTTP API, e.g. \'{"temperature": 0, "max_new_tokens": 64}\'',
    )
    add_options(parser)
    args = parser.parse(words)
    prompts, sampling = list(args.prompt), _json_object(args.sampling_params)
    if not prompts:
        raise ConfigError("--prompt is required")
    adapters = _adapters(list(args.lora), len(prompts))
    settings = _settings(args)
    sys.stdout.write(_answer(settings, prompts, sampling, adapters) + "\n")
    return 0


def _answer(
    settings: Settings,
    prompts: list[str],
    sampling: dict[str, object],
    adapters: list[str | None],
) -> str:
    with exit_on_interrupt():
        from lorikeet.llm import LLM

    replies = LLM.from_settings(settings).generate(prompts, sampling, lora_path=adapters)
    texts = [str(reply["text"]) for reply in replies]
    return texts[0].strip() if len(texts) == 1 else format_answers(prompts, adapters, texts)


def _check_adapter(words: list[str]) -> int:
    parser = Parser(
        prog="lorikeet check-adapter",
        description="Check an adapter against a base model as the server would, and show what it does.",
    )
    parser.add_argument("path", help="directory or source of the adapter, as in --lora-paths")
    for name in ("model_path", "max_lora_rank", "lora_target_modules", "dtype"):
        add_option(parser, OPTIONS[name])
    parser.add_argument(
        "--base-norms",
        action="store_true",
        help="also read the base model's weights, to show the change relative to them",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    values = vars(parser.parse(words))
    path, as_json, base_norms = (values.pop(key) for key in ("path", "json", "base_norms"))
    settings = resolve(config_from_values({**values, "lora_paths": (LoRAPath("adapter", path),)}))
    with exit_on_interrupt():
        from lorikeet.engine.check import check_adapter, format_check

    try:
        report = check_adapter(settings, base_norms=base_norms)
    except AdapterError as error:
        return _fail(error, EXIT_FAULT)
    width = terminal_width()
    text = json.dumps(report, indent=2) if as_json else format_check(report, width=width)
    sys.stdout.write(text + "\n")
    return 0


def _adapters(names: list[str], num_prompts: int) -> list[str | None]:
    if len(names) not in (0, 1, num_prompts):
        raise ConfigError(
            f"--lora is given {len(names)} times for {num_prompts} prompts; allowed: once, or once for each"
        )
    given = names * num_prompts if len(names) == 1 else names or [""] * num_prompts
    return [name or None for name in given]


def _json_object(text: str) -> dict[str, object]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"--sampling-params is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"--sampling-params is {text!r}; allowed: a JSON object")
    return value


def _settings(args: argparse.Namespace) -> Settings:
    """The settings of a command; logging is set up by them, and what has no effect is logged."""
    settings = resolve(config_from_args(args))
    setup_logging(settings.log_level)
    for note in notes(settings):
        logger.warning("%s", note)
    return settings


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "serve": _serve,
    "demo": _demo,
    "generate": _generate,
    "check-adapter": _check_adapter,
}

if __name__ == "__main__":
    sys.exit(main())
