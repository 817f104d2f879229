"""The HTTP application, and :func:`serve`, which runs it with an engine."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from multiprocessing.process import BaseProcess

import uvloop
from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from starlette.middleware.cors import CORSMiddleware

from lorikeet import __version__
from lorikeet.adapters.registry import MAX_LISTED
from lorikeet.client.client import EngineClient
from lorikeet.client.transport import ClientTransport, EngineAddress
from lorikeet.config import Settings
from lorikeet.engine.spawn import spawn_engine
from lorikeet.models.source import locate_tokenizer
from lorikeet.server import adapters, document, errors
from lorikeet.server.adapters import AdapterRoutes
from lorikeet.server.health import HealthRoutes
from lorikeet.server.lifecycle import (
    HTTPServer,
    StopSignals,
    bind,
    end_process,
    raise_descriptor_limit,
    run_server,
)
from lorikeet.server.limits import BodyLimits, Limits
from lorikeet.server.middleware import (
    AccessLog,
    Drain,
    DrainGate,
    Gate,
    KeyRules,
    OriginRules,
)
from lorikeet.server.native import NativeRoutes
from lorikeet.server.openai.routes import CompletionRoutes, ModelRoutes
from lorikeet.text.tokenizer import Tokenizer

SpawnEngine = Callable[[Settings, EngineAddress], BaseProcess]

# How long /health_generate waits for its token before it calls the engine stuck.
HEALTH_TIMEOUT_S = 20.0
LIMITS = Limits()
# Probes need no key; what changes the server needs the admin key, if there is one.
OPEN_PATHS = ("/health", "/health_generate")
# What may be asked while running requests finish: how many there are, and to end them.
DRAIN_PATHS = ("/metrics", "/abort_request")
ADMIN_PATHS = ("/flush_cache", "/abort_request", *adapters.ADMIN_PATHS)


def make_app(
    settings: Settings,
    client: EngineClient,
    registry: CollectorRegistry,
    *,
    drain: Drain,
    health_timeout: float = HEALTH_TIMEOUT_S,
    limits: Limits = LIMITS,
) -> FastAPI:
    """Make the application: the routes over a started client, behind keys, limits and CORS rules.

    Args:
        registry: the one the client counts in; shown at ``/metrics`` if the settings say so.
        drain: begun when the server is to end.
        health_timeout: seconds that ``/health_generate`` waits for its token.
        limits: on the bodies of requests.
    """
    app = FastAPI(title="Lorikeet", version=__version__)
    app.include_router(NativeRoutes(client).router())
    app.include_router(AdapterRoutes(settings.served_model_name, client).router())
    app.include_router(CompletionRoutes(settings, client).router())
    app.include_router(ModelRoutes(settings, client).router())
    health = HealthRoutes(settings, client, registry, generate_timeout=health_timeout)
    app.include_router(health.router())
    http = settings.http
    errors.install(app)
    rules = KeyRules(
        api_key=http.api_key,
        admin_api_key=http.admin_api_key,
        admin_paths=ADMIN_PATHS,
        open_paths=OPEN_PATHS,
    )
    document.install(
        app, needs_key=lambda path: rules.key_of(path) is not None, changing_paths=ADMIN_PATHS
    )
    app.add_middleware(BodyLimits, limits=limits, adapter_paths=adapters.LARGE_PATHS)
    # The last one added is the outermost, so requests that are refused have an access line, too.
    app.add_middleware(Gate, refusal=rules.refusal)
    origins = OriginRules.of(http.host, http.allowed_origins, http.allowed_hosts, paths=ADMIN_PATHS)
    app.add_middleware(Gate, refusal=origins.refusal)
    app.add_middleware(DrainGate, drain=drain, open_paths=DRAIN_PATHS)
    if http.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=http.allowed_origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
            expose_headers=("*",),
        )
    app.add_middleware(AccessLog)
    return app


def serve(settings: Settings, *, spawn: SpawnEngine = spawn_engine) -> None:
    """Serve until a signal to stop (SIGTERM, SIGINT, ...), then let running requests finish. Call it in the main thread.

    Meanwhile new ones get 503, and what has not finished after ``--shutdown-timeout`` is cut off with 503. A second
    signal ends it at once. When it returns or raises, the engine process is gone.

    Args:
        spawn: starts the engine process.

    Raises:
        UserError: flags or files are wrong (ConfigError: the port is in use, ...). Nothing was served.
        EngineDeadError: the engine died; its open requests were answered with that error.
    """
    raise_descriptor_limit()
    with bind(settings.http.host, settings.http.port) as listener:
        tokenizer = Tokenizer.load(locate_tokenizer(settings.tokenizer_path))
        address = EngineAddress.create()
        try:
            work = _run(settings, tokenizer, address, spawn, listener)
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(work)
        finally:
            address.remove()


async def _run(
    settings: Settings,
    tokenizer: Tokenizer,
    address: EngineAddress,
    spawn: SpawnEngine,
    listener: socket.socket,
) -> None:
    # Installed first: a signal that came right after the engine's start would leave the engine behind.
    stop = StopSignals()
    stop.install()
    process = spawn(settings, address)
    registry = CollectorRegistry()

    def make_server() -> HTTPServer:
        drain = Drain(settings.http.shutdown_timeout)
        app = make_app(settings, client, registry, drain=drain)
        ready_line = _ready_line(settings, client)
        return HTTPServer(app, drain=drain, ready_line=ready_line, limits=LIMITS)

    try:
        client = EngineClient(
            transport=ClientTransport(address),
            process=process,
            tokenizer=tokenizer,
            registry=registry,
            model_name=settings.served_model_name,
            max_lora=settings.lora.max_loras_per_batch if settings.enable_lora else None,
            watchdog_timeout=settings.http.watchdog_timeout,
        )
        await run_server(client, process, listener, make_server, stop)
    finally:
        await end_process(process, stop)


def _ready_line(settings: Settings, client: EngineClient) -> str:
    num_adapters = len(client.adapters)
    names = list(client.adapters.paths())[:MAX_LISTED]
    names += ["…"] if num_adapters > len(names) else []
    http = settings.http
    host = f"[{http.host}]" if ":" in http.host else http.host
    return (
        f"Server ready at http://{host}:{http.port}: {settings.served_model_name} "
        f"with {num_adapters} adapters" + (f" ({', '.join(names)})" if names else "")
    )
