"""From words to a :class:`ServerConfig`: the command line and the YAML file of ``--config``.

Both read the table ``OPTIONS``, so an option exists in both or in neither. The command line wins over the file, and
the file over the environment. Values stay as they are given: :func:`lorikeet.config.resolve` reads them.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol, cast

import yaml

from lorikeet import envs
from lorikeet.config.server_config import OPTIONS, ServerConfig
from lorikeet.config.values import Option
from lorikeet.errors import ConfigError


class _ArgumentGroup(Protocol):
    """The part of argparse's (private) group of arguments that is used here."""

    def add_argument(self, *flags: str, **rules: Any) -> argparse.Action: ...


class Parser(argparse.ArgumentParser):
    """An argument parser that raises :class:`ConfigError` and takes ``--like_this`` for ``--like-this``."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse all of ``argv``.

        Raises:
            ConfigError: an unknown option (the nearest known one is named) or a bad use of a known one.
        """
        known = set(self._option_string_actions)
        namespace, rest = self.parse_known_args([_with_dashes(word, known) for word in argv])
        if rest:
            flag = rest[0].partition("=")[0]
            near = difflib.get_close_matches(flag, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else "; --help lists the options"
            raise ConfigError(f"unknown argument {rest[0]}{hint}")
        return namespace


def _with_dashes(word: str, known: set[str]) -> str:
    flag, separator, value = word.partition("=")
    dashed = flag.replace("_", "-")
    return dashed + separator + value if dashed in known else word


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add every option of the table, and ``--config``. Values stay text, and only options that are given are in the
    namespace that the parser returns."""
    group = parser.add_argument_group("configuration")
    group.add_argument(
        "--config",
        metavar="FILE",
        default=argparse.SUPPRESS,
        help="YAML file with these options by name; the command line wins over it",
    )
    for option in OPTIONS.values():
        add_option(group, option)


def add_option(group: _ArgumentGroup, option: Option) -> None:
    """Add one option to a parser or to a group of its arguments."""
    text = f"{option.meaning} (default: {option.default_text})".replace("%", "%%")
    if option.required:
        text = f"{option.meaning} (required)"
    choices = ",".join(str(choice) for choice in option.allowed_values)
    rules: dict[str, Any] = {
        "metavar": f"{{{choices}}}" if choices else option.name.rsplit("_", 1)[-1].upper()
    }
    if option.value_type is bool:
        rules = {"action": argparse.BooleanOptionalAction}
    elif option.kind.is_list:
        # A list given twice is one list, so that a script can append to a command.
        rules |= {"nargs": "*", "action": "extend"}
    group.add_argument(
        *option.flags, dest=option.name, default=argparse.SUPPRESS, help=text, **rules
    )


def config_from_args(args: argparse.Namespace) -> ServerConfig:
    """The options of a command: those of the command line, else of the file, else of the environment.

    Raises:
        ConfigError: the file or the environment is wrong, or the model is missing.
    """
    given = {name: value for name, value in vars(args).items() if name in OPTIONS}
    path: str | None = getattr(args, "config", None)
    from_file = _read_file(Path(path)) if path else {}
    return config_from_values(_from_environment() | from_file | given)


def config_from_values(values: Mapping[str, Any]) -> ServerConfig:
    """Options by their field names, each as text or as a value of its type.

    Raises:
        ConfigError: the model is missing.
    """
    if "model_path" not in values:
        raise ConfigError("--model-path is required: a directory, a hub id, or demo")
    return ServerConfig(**values)


def _from_environment() -> dict[str, object]:
    found = {"api_key": envs.API_KEY.get(), "admin_api_key": envs.ADMIN_API_KEY.get()}
    return {name: value for name, value in found.items() if value is not None}


def _read_file(path: Path) -> dict[str, object]:
    """Read a YAML file whose keys are options, with dashes or underscores.

    Raises:
        ConfigError: the file cannot be read, is not a mapping, or has a key that is unknown or twice there.
    """
    try:
        content: object = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())
        raise ConfigError(f"--config {path} is not YAML: {problem}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"--config {path} must be a mapping from option to value")
    return _known_keys(path, cast("dict[object, object]", content))


def _known_keys(path: Path, content: dict[object, object]) -> dict[str, object]:
    names = {
        alias.replace("-", "_"): name
        for name, option in OPTIONS.items()
        for alias in (name, *option.aliases)
    }
    values: dict[str, object] = {}
    for key, value in content.items():
        name = names.get(str(key).replace("-", "_"))
        if name is None:
            raise ConfigError(
                f"--config {path} has the unknown key {key!r}; known: {', '.join(OPTIONS)}"
            )
        if name in values:
            raise ConfigError(f"--config {path} gives {name} twice")
        if value is None and OPTIONS[name].secret:
            raise ConfigError(f"--config {path}: {name} is empty; allowed: a key, or no such line")
        values[name] = value
    return values
