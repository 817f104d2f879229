"""Start the engine process. What runs in it is ``engine/child.py``, which this process never imports: it brings torch."""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.context import SpawnProcess

from lorikeet.client.transport import EngineAddress
from lorikeet.config import Settings
from lorikeet.signals import leave_stops_to_parent


def spawn_engine(settings: Settings, address: EngineAddress) -> SpawnProcess:
    """Start the engine process. It says Progress, then Ready or Failed, over ``address``.

    A fresh interpreter (spawn), since the HTTP process has threads and must not share them.
    """
    context = multiprocessing.get_context("spawn")
    process = context.Process(
        target=_run, args=(settings, address, os.getpid()), name="lorikeet-engine", daemon=True
    )
    process.start()
    return process


def _run(settings: Settings, address: EngineAddress, parent: int) -> None:
    leave_stops_to_parent()  # before the import, which takes seconds
    from lorikeet.engine.child import main

    main(settings, address, parent)
