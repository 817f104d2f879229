"""A scheduler over a fake worker, one step at a time."""

from __future__ import annotations

from lorikeet.adapters.rank_pages import RankPageAllocator
from lorikeet.adapters.residency import Residency
from lorikeet.core.failure import Failure
from lorikeet.core.plan import StepPlan
from lorikeet.core.request import (
    FinishReason,
    Request,
    RequestOutput,
    SamplingParams,
)
from lorikeet.core.sequence import Sequence
from lorikeet.kv.manager import KVManager
from lorikeet.scheduler.limits import SchedulerLimits
from lorikeet.scheduler.scheduler import Scheduler
from tests.support.fake_worker import FakeWorker

ABORT = FinishReason(kind="abort", failure=Failure("aborted", "enough"))


class Rig:
    """A scheduler over a fake worker; adapters 1 to 5 were loaded in this order."""

    def __init__(
        self,
        *,
        num_pages: int = 32,
        max_step_tokens: int = 64,
        max_running: int = 8,
        max_loras: int = 2,
        radix: bool = True,
        num_slots: int | None = None,
        max_host: int | None = None,
        copy_steps: int = 0,
    ) -> None:
        num_slots = num_slots or 1 + max_loras
        self.kv = KVManager(4, num_pages, radix=radix)
        allocator = RankPageAllocator((10,), 10, 8, [8])
        self.residency = Residency(
            allocator=allocator,
            num_slots=num_slots,
            policy="lru",
            max_pinned=1,
            max_host=max_host,
        )
        for version in range(1, 6):
            self.residency.add(version, [0, 0])
        limits = SchedulerLimits(
            max_running=max_running,
            max_step_tokens=max_step_tokens,
            max_prefill_tokens=1000,
            context_length=100,
            max_loras_per_batch=max_loras,
            eos_token_ids=frozenset(),
        )
        self.scheduler = Scheduler(limits, self.kv, self.residency)
        self.failing: set[int] = set()
        self.failing_tokens: set[int] = set()
        self.worker = FakeWorker(
            page_size=4,
            num_pages=num_pages,
            num_slots=num_slots,
            vocab_size=1000,
            fail_copy=lambda version: version in self.failing,
            fail_token=lambda seq: seq in self.failing_tokens,
            copy_steps=lambda: copy_steps,
        )
        self.outputs: dict[int, list[RequestOutput]] = {}
        self.num_added = 0

    def add(
        self, num_prompt: int = 6, *, version: int = 0, max_new: int = 4, **fields: object
    ) -> Sequence:
        request = Request(
            prompt_token_ids=list(range(num_prompt)),
            sampling=SamplingParams(max_new_tokens=max_new),
        )
        for name, value in fields.items():
            setattr(request, name, value)
        seq = Sequence(self.num_added, request, version, seed=5)
        self.num_added += 1
        self.scheduler.add(seq)
        return seq

    def plan(self) -> StepPlan:
        plan = self.scheduler.plan()
        assert plan is not None
        self.scheduler.check_integrity()
        return plan

    def finish(self, plan: StepPlan) -> None:
        """Execute and commit."""
        self.worker.submit(plan)
        self.commit(plan)

    def commit(self, plan: StepPlan) -> None:
        self.scheduler.commit(plan, self.worker.collect())
        self.collect()

    def collect(self) -> None:
        self.scheduler.check_integrity()
        for output in self.scheduler.drain():
            self.outputs.setdefault(output.id, []).append(output)

    def step(self) -> StepPlan:
        plan = self.plan()
        self.finish(plan)
        return plan

    def run(self) -> None:
        while (plan := self.scheduler.plan()) is not None:
            self.finish(plan)

    def end_of(self, seq: Sequence) -> FinishReason:
        """The terminal output's reason; there is exactly one, and it is the last."""
        outputs = self.outputs[seq.id]
        assert [output.finish is None for output in outputs] == [True] * (len(outputs) - 1) + [
            False
        ]
        assert outputs[-1].finish is not None
        return outputs[-1].finish

    def tokens_of(self, seq: Sequence) -> list[int]:
        return [token for output in self.outputs[seq.id] for token in output.token_ids]


def alone(num_prompt: int, max_new: int) -> list[int]:
    """Tokens of a request of the base model that has everything to itself."""
    rig = Rig(num_pages=64)
    seq = rig.add(num_prompt, max_new=max_new)
    rig.run()
    return rig.tokens_of(seq)
