"""Every environment variable that Lorikeet reads, typed, in one table.

``docs/environment.md`` is written from it. Variables of the libraries below us (``HF_HOME``, ``OMP_NUM_THREADS``) are
theirs and not repeated here.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from lorikeet.errors import ConfigError

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class EnvVar(Generic[_T]):
    """One environment variable.

    Attributes:
        parse: text -> value; raises ValueError with the allowed values.
        default: what :meth:`get` gives when the variable is unset or empty.
        may_be_empty: False if an empty one is a mistake: a key that a script lost must not open the server.
    """

    name: str
    meaning: str
    parse: Callable[[str], _T]
    default: _T
    may_be_empty: bool = True

    def get(self) -> _T:
        """Read the variable now.

        Raises:
            ConfigError: names the variable, its value and the allowed ones.
        """
        given = os.environ.get(self.name)
        text = (given or "").strip()
        if not text:
            if given is not None and not self.may_be_empty:
                raise ConfigError(f"{self.name} is empty; allowed: a key, or no such variable")
            return self.default
        try:
            return self.parse(text)
        except ValueError as error:
            raise ConfigError(f"{self.name} is {text!r}; allowed: {error}") from None


def for_child(**changes: str) -> dict[str, str]:
    """The environment for a child process: this one's without the API keys, which no child needs.

    Args:
        changes: variables that it has besides, or with other values.
    """
    keys = (API_KEY.name, ADMIN_API_KEY.name)
    return {name: value for name, value in os.environ.items() if name not in keys} | changes


BOOLEANS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}


def _boolean(text: str) -> bool:
    if text.lower() not in BOOLEANS:
        raise ValueError(", ".join(BOOLEANS))
    return BOOLEANS[text.lower()]


API_KEY: EnvVar[str | None] = EnvVar(
    "LORIKEET_API_KEY",
    "`--api-key` when the option is not given. A key on the command line is visible to every user of the machine.",
    str,
    None,
    may_be_empty=False,
)
ADMIN_API_KEY: EnvVar[str | None] = EnvVar(
    "LORIKEET_ADMIN_API_KEY",
    "`--admin-api-key` when the option is not given.",
    str,
    None,
    may_be_empty=False,
)
DEMO_ONCE: EnvVar[bool] = EnvVar(
    "DEMO_ONCE",
    "`lorikeet demo` and `make demo` end after the table instead of serving until Ctrl-C.",
    _boolean,
    default=False,
)

HF_ENDPOINT: EnvVar[str | None] = EnvVar(
    "HF_ENDPOINT",
    "The Hugging Face hub that adapters are downloaded from, in place of huggingface.co (a mirror, say).",
    str,
    None,
)

TRITON_INTERPRET: EnvVar[bool] = EnvVar(
    "TRITON_INTERPRET",
    "Triton's own: its kernels run on the CPU, slowly. With it the LoRA backends `triton` and `csgmv` are allowed there.",
    _boolean,
    default=False,
)

ALL = (API_KEY, ADMIN_API_KEY, DEMO_ONCE, HF_ENDPOINT, TRITON_INTERPRET)
