"""Offline use: the engine of the server in the caller's own process.

from lorikeet import LLM

llm = LLM("demo", lora_paths=["demo"])
for reply in llm.generate(["Hello"] * 2, {"temperature": 0}, lora_path=["json", None]):
    print(reply["text"])
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Literal, Self, cast

import msgspec

from lorikeet.adapters.files import write_atomically
from lorikeet.client.intake import OWN, Intake, RequestBatch
from lorikeet.client.reply import native_reply, vector_floats
from lorikeet.client.uploads import Uploads
from lorikeet.config import LoRAPath, ServerConfig, Settings, resolve
from lorikeet.core.commands import (
    Command,
    FlushCache,
    ListAdapters,
    LoadAdapter,
    LoadAdapterFromTensors,
    R,
    UnloadAdapter,
)
from lorikeet.core.request import Pooling, RequestOutput, SamplingParams
from lorikeet.engine.build import build_engine
from lorikeet.errors import AdapterError, RequestError
from lorikeet.models.source import locate_tokenizer
from lorikeet.signals import interrupt_later
from lorikeet.text.completion import Completion
from lorikeet.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

Reply = dict[str, Any]
Sampling = SamplingParams | Mapping[str, Any]


class LLM:
    """A base model with its adapters, without a server. Not safe for use by several threads at once.

    Args:
        model_path: as ``--model-path``: a directory, a hub id, or ``demo``.
        lora_paths: as ``--lora-paths``: a list of any of its spellings, or a mapping from name to path.
        progress: show a bar while weights load.
        options: any other option of the server, by its field name in :class:`lorikeet.ServerConfig`.

    Raises:
        ConfigError, ModelError, AdapterError: the options or files are wrong.
    """

    def __init__(
        self,
        model_path: str,
        *,
        lora_paths: Iterable[str | Mapping[str, object] | LoRAPath] | Mapping[str, str] = (),
        progress: bool = False,
        **options: Any,
    ) -> None:
        if isinstance(lora_paths, Mapping):
            named = cast("Mapping[str, str]", lora_paths)
            lora_paths = [LoRAPath(name, str(path)) for name, path in named.items()]
        paths = cast("tuple[LoRAPath, ...]", tuple(lora_paths))
        given = ServerConfig(model_path=str(model_path), lora_paths=paths, **options)
        self._start(resolve(given), progress=progress)

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        """Make one of settings that are resolved already, as the command line does."""
        llm = cls.__new__(cls)
        llm._start(settings, progress=False)
        return llm

    def _start(self, settings: Settings, *, progress: bool) -> None:
        self._core = build_engine(settings, report=lambda phase: None, progress=progress)
        self._uploads = Uploads()
        self.tokenizer = Tokenizer.load(locate_tokenizer(settings.tokenizer_path))
        self._intake = Intake(
            self.tokenizer,
            vocab_size=self._core.info.vocab_size,
            context_length=self._core.info.context_length,
            # Nobody else waits for this engine: a call may be as large as its caller has memory for.
            limits=OWN,
        )

    @property
    def info(self) -> dict[str, object]:
        """What ``/get_server_info`` tells of the engine: context length, memory split, adapters, ..."""
        return {**msgspec.structs.asdict(self._core.info), "adapters": self._core.adapters.paths()}

    def generate(
        self,
        prompts: str | Sequence[str] | None = None,
        sampling_params: Sampling | Sequence[Sampling] | None = None,
        *,
        input_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        lora_path: str | Sequence[str | None] | None = None,
        **options: Any,
    ) -> Any:
        """Complete prompts, all in one batch, each with its own adapter.

        Args:
            prompts: text; one string or a list.
            sampling_params: for all prompts or one per prompt; defaults as in ``POST /generate``.
            input_ids: token ids in place of ``prompts``.
            lora_path: adapter name for all prompts, or one per prompt; None is the base model.
            options: the other fields of ``POST /generate``: ``return_logprob``, ``logprob_start_len``,
                ``top_logprobs_num``, ``return_text_in_logprobs``, ``rid``.

        Returns:
            The reply of ``POST /generate``: a dict for one prompt, a list of them, in order, for a list. One of a list that
            fails when it has begun is an entry whose ``finish_reason`` says so: ``{"type": "abort", "message",
            "status_code"}``.

        Raises:
            RequestError: a field is wrong, an adapter is unknown, a grammar does not compile; nothing is generated.
            EngineFault: the engine failed, and this object can no longer be used; or the only completion of the call failed.
        """
        if unknown := options.keys() - _GENERATE_OPTIONS:
            raise RequestError(
                f"generate() has no option {', '.join(sorted(unknown))}; allowed: {', '.join(_GENERATE_OPTIONS)}"
            )
        batch = self._intake.make_requests(
            {
                "text": prompts,
                "input_ids": input_ids,
                "sampling_params": sampling_params,
                "lora_path": lora_path,
                **options,
            }
        )
        completions = self._complete(batch, each=batch.is_list)
        text = self.tokenizer.token_text if batch.return_text_in_logprobs else None
        replies = [native_reply(c.snapshot(), token_text=text) for c in completions]
        return replies if batch.is_list else replies[0]

    def embed(
        self,
        prompts: str | Sequence[str] | None = None,
        *,
        input_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        lora_path: str | Sequence[str | None] | None = None,
        pooling: Literal["last", "mean"] = "last",
        normalize: bool = True,
    ) -> Any:
        """Turn prompts into vectors: hidden states behind the final norm, each prompt with its own adapter.

        Args:
            prompts, input_ids, lora_path: as for :meth:`generate`.
            pooling: ``last`` is the state of the last token, ``mean`` the mean over all tokens.
            normalize: divide each vector by its Euclidean length.

        Returns:
            A list of floats for one prompt; a list of such lists, in order, for a list.

        Raises:
            RequestError: a field is wrong or an adapter is unknown.
            EngineFault: the engine failed; this object can no longer be used.
        """
        if pooling not in ("last", "mean"):
            raise RequestError(f"pooling is {pooling!r}; allowed: last, mean", "pooling")
        body = {"text": prompts, "input_ids": input_ids, "lora_path": lora_path}
        batch = self._intake.make_requests(
            body | {"sampling_params": {"max_new_tokens": 0}},
            Pooling(kind=pooling, normalize=normalize),
        )
        vectors = [vector_floats(done.embedding or b"") for done in self._complete(batch)]
        return vectors if batch.is_list else vectors[0]

    def load_lora_adapter(
        self, name: str, path: str, *, pinned: bool = False, replace: bool = False
    ) -> int:
        """Load an adapter under a name.

        Args:
            path: as ``--lora-paths``: a directory, a hub id or a URL.
            pinned: on the device from now on.
            replace: if the name is loaded, it means the new content from now on.

        Returns:
            its version: equal bytes, equal version.

        Raises:
            AdapterError: it cannot be served exactly, the name is taken, or there is no room; nothing has changed.
        """
        return self._run_command(LoadAdapter(name, str(path), pinned, replace)).version

    def load_lora_adapter_from_tensors(
        self,
        name: str,
        tensors: Mapping[str, torch.Tensor] | bytes,
        config_dict: Mapping[str, object],
        *,
        pinned: bool = False,
    ) -> int:
        """Load an adapter that is in memory.

        Args:
            tensors: by their names in ``adapter_model.safetensors``, or the bytes of such a file.
            config_dict: what ``adapter_config.json`` holds.

        Returns:
            its version.

        Raises:
            AdapterError: as ``load_lora_adapter``.
        """
        data = tensors if isinstance(tensors, bytes) else _safetensors(tensors)
        weights = self._uploads.new()
        command = LoadAdapterFromTensors(name, dict(config_dict), str(weights), pinned)
        try:
            write_atomically(weights, [data])
            return self._run_command(command).version
        except BaseException:
            self._uploads.discard(weights)
            raise

    def unload_lora_adapter(self, name: str) -> None:
        """Forget a name and free its memory.

        Raises:
            AdapterNotFoundError: it is not loaded.
        """
        self._run_command(UnloadAdapter(name))

    def adapters(self) -> list[dict[str, object]]:
        """What ``GET /v1/adapters`` tells: name, path, version, state, tier, pinned, rank, targets, bytes, ..."""
        return msgspec.to_builtins(self._run_command(ListAdapters()))

    def flush_cache(self) -> bool:
        """Forget every cached prefix; False if requests are running."""
        return self._run_command(FlushCache())

    def shutdown(self) -> None:
        """End the engine's threads and remove its temporary files."""
        self._core.close()
        self._uploads.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.shutdown()

    def _complete(self, batch: RequestBatch, *, each: bool = False) -> list[Completion]:
        """The completions of a call, finished, in order.

        Args:
            each: one that fails when it has begun is returned like the others; else it fails the call.
        """
        completions = [
            batch.completion(index, self.tokenizer) for index in range(batch.num_completions)
        ]
        try:
            self._run(batch, completions, each=each)
        except BaseException:
            self._abandon()
            raise
        return completions

    def _run(self, batch: RequestBatch, completions: Sequence[Completion], *, each: bool) -> None:
        with interrupt_later():
            first_id, *_ = [self._core.submit(request) for request in batch.requests]
        begun: set[int] = set()
        while not self._core.is_idle:
            outputs = self._step()
            begun.update(self._core.take_accepted())
            for output in outputs:
                completion = completions[output.id - first_id]
                if completion.add(output):
                    self._core.abort(output.id, "ended by a stop string")
                if not each or output.id not in begun:
                    _raise_error(completion)
            self._core.wait_for_threads()

    def _step(self) -> list[RequestOutput]:
        # Between a step's plan and its commit, scheduler and worker disagree: Ctrl-C takes effect after the commit.
        with interrupt_later():
            return self._core.step()

    def _run_command(self, command: Command[R]) -> R:
        """Run a command, and the loop until it is done if it takes time."""
        reply = self._core.command(command)
        if not isinstance(reply, Future):
            return reply
        try:
            while not reply.done():
                self._step()
                self._core.wait_for_threads()
        except BaseException:
            reply.cancel()
            raise
        finally:
            self._core.adapters.take_changes()  # nobody keeps a copy of the lists here
        return reply.result()

    def _abandon(self) -> None:
        """End the requests of a call that was interrupted: none may stay in the engine."""
        self._core.abort(None, "the call was interrupted")
        self._core.drain()


_GENERATE_OPTIONS = (
    "return_logprob",
    "logprob_start_len",
    "top_logprobs_num",
    "return_text_in_logprobs",
    "rid",
)


def _safetensors(tensors: Mapping[str, torch.Tensor]) -> bytes:
    from safetensors.torch import save

    try:
        return save({name: tensor.contiguous() for name, tensor in tensors.items()})
    except (RuntimeError, ValueError, AttributeError) as error:
        raise AdapterError(f"tensors cannot be written as safetensors: {error}") from error


def _raise_error(completion: Completion) -> None:
    """Raise the error of a completion that failed: the caller's if its status is below 500, else the engine's."""
    error = None if completion.finish is None else completion.finish.error()
    if error is not None:
        raise error
