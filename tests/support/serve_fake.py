"""``serve`` over an engine double, as a program: ``python -m tests.support.serve_fake MODEL PORT KNOBS_AS_JSON``.

Ends with 0, with 2 for a user error and with 1 for a fault of the engine, the message on stderr.
"""

from __future__ import annotations

import json
import resource
import sys
from functools import partial

from lorikeet import signals
from lorikeet.config import ServerConfig, resolve
from lorikeet.errors import EngineFault, UserError
from lorikeet.log import setup_logging
from lorikeet.server.app import serve
from tests.support.fake_engine import Knobs, spawn_fake_engine


def main(model: str, port: str, knobs: str) -> int:
    signals.exit_on_stop()
    setup_logging("info")
    options = json.loads(knobs)
    if most_files := options.pop("most_files", None):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))
    config = ServerConfig(
        model_path=model,
        served_model_name="base",
        port=int(port),
        shutdown_timeout=options.pop("shutdown_timeout", 10),
        watchdog_timeout=options.pop("watchdog_timeout", 300),
    )
    spawn = partial(spawn_fake_engine, knobs=Knobs(**options))
    try:
        serve(resolve(config), spawn=spawn)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except EngineFault as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
