"""What the next step computes, and what follows from what a step produced.

``plan()`` and ``commit()`` alternate; at most one further plan may be made before the previous one is committed, so
that planning overlaps the device's work. Everything that a plan promises is computed in the order of the plans, and
within a step every K/V row is stored before any sequence attends to it. Hence counts move when a step is *planned*,
full pages of a prompt can be found from then on, and pages can be given away while a step that still reads them runs.
Only adapters' memory is written outside that order (copies run beside the computation), so an adapter counts as in use
until the last step that computes with it is *committed*.

A sequence that turns out to be finished when the step after it is planned already has one row too many there; whatever
that row samples is dropped.

**Long prompts do not hold short ones.** What decoding leaves of a step is shared among the prompts, those under way and
those that wait. One half goes to them in order, first come first served (or as ``lpm`` has it). The other half goes to
the shortest *length class* first, and within a class in order again. A prompt is in class 0 if it fits in half of a step,
in class k if it takes up to 2^k such halves; what the prefix cache holds of it when it comes does not count. What one half
has no use for the other takes, so a step is full whenever there are prompts for it. Where all are of one class, as short
prompts are, everything goes in order.

*The bound.* Let h be half of what decoding leaves of a step. Longer classes get nothing of the second half before a
prompt of class k is done, so it is computed after at most ceil(W / h) steps that are planned since it came, where W counts
the tokens to compute of the prompts up to class k that came before it, of those of shorter classes that came since, and of
itself: whatever longer prompts there are. In the first half nobody passes at all, so it also is computed after at most
ceil(V / h) steps, where V counts the prompts that came before it and itself: nobody starves, and nobody waits longer than
twice what first come first served would take. Both hold for prompts that have room: a row, pages, their adapter
(``scheduler/admission.py``).
"""

from __future__ import annotations

from collections import Counter

from lorikeet.adapters.residency import AdapterAdmission, Residency
from lorikeet.core.failure import Failure
from lorikeet.core.plan import (
    NOT_FINITE,
    DecodeRow,
    PooledVector,
    PrefillChunk,
    SampledToken,
    SequenceStart,
    StepPlan,
    StepResult,
)
from lorikeet.core.request import FinishReason, RequestOutput
from lorikeet.core.sequence import Sequence, SequenceState
from lorikeet.errors import RequestError
from lorikeet.kv.manager import KVManager
from lorikeet.scheduler.admission import Admission, Round
from lorikeet.scheduler.limits import (
    SchedulerLimits,
    StepBudget,
    adapter_failure,
    failure,
    finish_reason,
    prepare,
)
from lorikeet.scheduler.queue import CallShares, RunningSet, WaitingQueue, most_following
from lorikeet.scheduler.stats import Counters, SchedulerStats

# Eviction looks this far into the queue; farther away, the order will have changed before it matters.
_NEXT_VERSIONS = 64
_MAX_IN_FLIGHT = 2


class Scheduler:
    """Continuous batching over paged K/V and a bounded number of adapters."""

    def __init__(self, limits: SchedulerLimits, kv: KVManager, residency: Residency) -> None:
        self.limits = limits
        self._kv = kv
        self._residency = residency
        # Waiting and running; a sequence that has ended is not here.
        self._sequences: dict[int, Sequence] = {}
        self._queue = WaitingQueue()
        self._shares = CallShares(most_following(limits.max_running))
        self._running = RunningSet()
        self._admission = Admission(limits, self._queue, self._running, self._num_cached, residency)
        # Step of each plan that is not committed, oldest first -> adapters to release once it is.
        self._in_flight: dict[int, list[int]] = {}
        self._outputs: list[RequestOutput] = []
        # Sequences whose worker state the next plan drops, and slots that it frees.
        self._ended: list[int] = []
        self._freed_slots: list[int] = []
        # Waiting sequences that were refused pages. To ask for them again is useless until there is more headroom than
        # there was, or `KVManager.num_changes` is another.
        self._short_of_pages: list[Sequence] = []
        self._short_at = (0, 0)
        self._counters = Counters()
        # `Residency.num_changes` when there was nothing to plan; until something moves there is nothing again.
        self._stalled_at = -1
        self._next_step = 0

    @property
    def num_waiting(self) -> int:
        """Sequences that were taken and do not run."""
        return len(self._queue) + len(self._shares)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def has_copies_in_flight(self) -> bool:
        """True if adapters are on their way to the device: steps are needed to learn of their end."""
        return self._residency.has_copies_in_flight

    @property
    def has_work(self) -> bool:
        """True if ``plan`` may return a plan, or there are reads to hand out (``Residency.take_reads``).

        False while all that waits waits for reads: ``Residency.read_done`` makes it True again.
        """
        residency = self._residency
        if (
            len(self._running)
            or self._ended
            or self._freed_slots
            or residency.has_decisions
            or residency.has_copies_in_flight
            or residency.host.reads
        ):
            return True
        is_waiting = self.num_waiting > 0 or residency.has_unplaced_pins
        return is_waiting and self._stalled_at != residency.ledger.num_changes

    def add(self, seq: Sequence) -> None:
        """Take a new sequence into the queue.

        Raises:
            RequestError: it can never run: longer than the context or than the whole K/V pool, or its adapter has
                failed.
            ValueError: its id was used before, or its adapter is not in ``Residency``.
        """
        if seq.id in self._sequences or seq.state is not SequenceState.WAITING:
            raise ValueError(f"sequence {seq.id} was added before")
        if seq.version not in self._residency:
            raise ValueError(f"version {seq.version} is unknown to the residency")
        if (reason := self._residency.failure(seq.version)) is not None:
            raise RequestError(adapter_failure(reason), "lora_path")
        prepare(seq, self.limits, self._kv)
        self._stalled_at = -1
        self._sequences[seq.id] = seq
        if self._shares.take(seq):
            self._line_up(seq)

    def abort(self, seq_id: int, reason: FinishReason) -> None:
        """End a sequence now. Its terminal output comes out of the next ``drain``; no effect if it has ended."""
        seq = self._sequences.get(seq_id)
        if seq is not None:
            self._stalled_at = -1
            self._end(seq, reason)

    def fail_version(self, version: int, failure: Failure) -> None:
        """End all sequences of a version, waiting and running, with an error."""
        reason = FinishReason(kind="abort", failure=failure)
        # Those that run come first.
        parts = self._running, self._queue, self._shares
        for seq in [seq for part in parts for seq in part.sequences() if seq.version == version]:
            self.abort(seq.id, reason)

    def plan(self) -> StepPlan | None:
        """Decide the next step. None if there is nothing to compute, copy or clean up.

        A plan that is returned must be executed and committed (or given to ``fail``). It may be entirely empty while
        copies are on their way: the worker then waits until one of them has ended.

        Raises:
            ValueError: two plans wait for their commit.
        """
        if len(self._in_flight) >= _MAX_IN_FLIGHT:
            raise ValueError("two plans are in flight; commit one first")
        for version, reason in self._residency.host.take_failures().items():
            self.fail_version(version, Failure("refused", adapter_failure(reason)))
        while (seq := self._shares.next()) is not None:
            self._line_up(seq)
        plan = StepPlan(step=self._next_step)
        num_preemptions = self._counters.preemptions
        self._plan_rows(plan)
        self._residency.ledger.want(self._queue.versions(_NEXT_VERSIONS))
        budget = StepBudget.for_step(
            self.limits,
            num_rows=len(plan.rows),
            num_running=len(self._running),
            num_adapters=len(self._running.num_of_version),
        )
        # Whoever lost its pages in this step must not be given them back in the same step.
        self._plan_prompts(plan, budget, admits=num_preemptions == self._counters.preemptions)
        plan.ended, self._ended = self._ended, []
        freed_slots, plan.copies = self._residency.take_decisions()
        plan.freed_slots, self._freed_slots = [*self._freed_slots, *freed_slots], []
        if plan.is_empty and not (plan.ended or plan.freed_slots or plan.copies):
            if self._in_flight:
                return None
            if not self._residency.has_copies_in_flight:
                self._stalled_at = self._residency.ledger.num_changes
                return None
        self._in_flight[plan.step] = []
        self._next_step += 1
        return plan

    def commit(self, plan: StepPlan, result: StepResult) -> None:
        """Take in what a step produced. Plans are committed in their order.

        Raises:
            ValueError: the result is not that of this plan, or another plan is older.
        """
        expected = [chunk.seq for chunk in plan.chunks if chunk.sample]
        expected.extend([row.seq for row in plan.rows])
        pooled = [chunk.seq for chunk in plan.chunks if chunk.pool]
        found = [token.seq for token in result.tokens], [item.seq for item in result.vectors]
        if result.step != plan.step or found != (expected, pooled):
            raise ValueError(f"the result does not fit the plan of step {plan.step}")
        releases = self._close(plan)
        self._residency.copies_done(result.copied, result.failed_copies)
        for version, message in result.failed_copies.items():
            text = f"the adapter could not be copied to the device: {message}"
            self.fail_version(version, Failure("failed", text))
        for seq_id, logprobs in result.prompt_logprobs.items():
            seq = self._sequences.get(seq_id)
            if seq is not None:
                seq.prompt_logprobs.extend(logprobs)
                seq.num_prompt_logprobs += len(logprobs)
        for token in result.tokens:
            seq = self._sequences.get(token.seq)
            if seq is not None:
                self._take_token(seq, token)
        for vector in result.vectors:
            seq = self._sequences.get(vector.seq)
            if seq is not None:
                self._take_vector(seq, vector)
        for version in releases:
            self._residency.release(version)

    def fail(self, plan: StepPlan, message: str) -> None:
        """A step had no memory and was not executed: end as few sequences as possible, with an error.

        That is the one of which it was to compute most of a prompt, since prompts are what takes memory; in a step that
        only decodes, the youngest. The others that it would have advanced go back to the queue, in front, and lose
        nothing but time. The prefix cache is emptied, because it lists pages that this step was to fill. The next plan
        repeats ``ended`` and ``freed_slots`` of this one; workers ignore what they have cleaned up already.

        Raises:
            ValueError: another plan is in flight; commit it first.
        """
        if len(self._in_flight) > 1:
            raise ValueError("another plan is in flight; commit it first")
        releases = self._close(plan)
        copies = [copy.version for copy in plan.copies]
        self._residency.copies_done([], copies)
        self._give_up(plan, failure(message))
        # Pages of sequences that were aborted since the plan was made are among those that were not filled.
        self._kv.drop_all()
        for version in releases:
            self._residency.release(version)
        self._ended = [*plan.ended, *self._ended]
        self._freed_slots = [*plan.freed_slots, *self._freed_slots]

    def drain(self) -> list[RequestOutput]:
        """Outputs since the last call, in order. Each request gets exactly one with ``finish``, its last."""
        outputs, self._outputs = self._outputs, []
        return outputs

    def stats(self) -> SchedulerStats:
        num_pages, num_cached = self._kv.num_pages, self._kv.num_cached
        return SchedulerStats(
            num_running=len(self._running),
            num_waiting=self.num_waiting,
            num_running_adapters=len(self._running.num_of_version),
            num_waiting_adapters=self._queue.num_versions,
            running_versions=tuple(self._running.num_of_version),
            waiting_versions=tuple(self._queue.versions(self._queue.num_versions)),
            num_waiting_for_adapter=len(self._queue)
            - sum(map(self._queue.num_of_version, [0, *self._residency.usable()])),
            num_pages=num_pages,
            num_used_pages=num_pages - self._kv.num_free - num_cached,
            num_cached_pages=num_cached,
            total_prompt_tokens=self._counters.prompt_tokens,
            total_cached_tokens=self._counters.cached_tokens,
            total_output_tokens=self._counters.output_tokens,
            total_preemptions=self._counters.preemptions,
            total_finished=self._counters.finished,
            total_adapter_device_evictions=self._residency.device.num_evictions,
        )

    def check_integrity(self) -> None:
        """Compare the sets of sequences with each other and with what the managers hold, and every count of those.

        Raises:
            AssertionError: names what does not match.
        """
        self._kv.check_integrity()
        self._residency.check_integrity()
        self._queue.check_integrity(self._running.num_of_version, self._admission.is_off)
        self._running.check_integrity(self._kv, has_steps=bool(self._in_flight))
        running = self._running.sequences()
        waiting = {seq.id for part in (self._queue, self._shares) for seq in part.sequences()}
        num_found = len(waiting) + len(running)
        if waiting & {seq.id for seq in running} or num_found != len(self._sequences):
            raise AssertionError("a sequence is in no set or in two")
        if len(running) > self.limits.max_running:
            raise AssertionError(f"{len(running)} sequences run")
        if len(self._running.num_of_version) > self.limits.max_loras_per_batch:
            raise AssertionError(f"{len(self._running.num_of_version)} adapters run")
        uses = Counter(seq.version for seq in running)
        for versions in self._in_flight.values():
            uses.update(versions)
        for version in {*uses, *self._residency.device.placed} - {0}:
            if self._residency.num_uses(version) != uses[version]:
                raise AssertionError(f"version {version}: uses are not those of its sequences")

    def _plan_rows(self, plan: StepPlan) -> None:
        """One row for each decoding sequence, oldest first, so that victims of a shortage have no row yet."""
        page_size = self._kv.page_size
        step, rows = plan.step, plan.rows
        for seq in self._running.decoding():
            position = seq.num_scheduled
            if position + 1 >= seq.max_tokens or seq.state is not SequenceState.DECODING:
                # Its last token is on its way, or an older sequence has just taken its pages.
                continue
            new_pages: list[int] = []
            if position % page_size == 0:
                extension = self._make_room(seq, position + 1)
                if extension is None:
                    continue
                new_pages = extension
            rows.append(DecodeRow(seq=seq.id, position=position, new_page_ids=new_pages))
            seq.num_scheduled = position + 1
            seq.num_pending += 1
            seq.last_step = step

    def _make_room(self, seq: Sequence, num_tokens: int) -> list[int] | None:
        """Pages for ``num_tokens`` tokens, taken from younger sequences if need be; None if ``seq`` had to yield."""
        while (pages := self._kv.extend(seq.id, num_tokens)) is None:
            victim = self._running.youngest()
            self._preempt(victim)
            if victim is seq:
                return None
        return pages

    def _plan_prompts(self, plan: StepPlan, budget: StepBudget, *, admits: bool) -> None:
        """Divide what is left of the step among the prompts under way and, if it ``admits``, those that wait."""
        self._admission.note_reads()
        prefilling = self._running.prefilling.values()
        classes = {*self._queue.length_classes, *(seq.length_class for seq in prefilling)}
        if not classes or budget.tokens <= 0:
            return
        round_ = self._open_round(budget) if admits else None
        second = budget.tokens // 2 if len(classes) > 1 else 0
        budget.tokens -= second
        self._fill(plan, budget, round_, None)
        # The last token of a half may cost more than what was left of it; the other half does not pay for that.
        budget.tokens = max(0, budget.tokens) + second
        for most in sorted(classes):
            self._fill(plan, budget, round_, most)
        self._fill(plan, budget, round_, None)
        if round_ is not None:
            round_.close()

    def _open_round(self, budget: StepBudget) -> Round:
        round_ = Round(self._admission, budget)
        headroom, num_changes = self._short_at
        if self._headroom() > headroom or num_changes != self._kv.num_changes:
            self._short_of_pages = []
        for seq in self._short_of_pages:
            round_.short_of_pages(seq)
        return round_

    def _fill(
        self, plan: StepPlan, budget: StepBudget, round_: Round | None, most: int | None
    ) -> None:
        """Spend the budget on prompts of length classes up to ``most`` (None: all), in order."""
        while budget.tokens > 0:
            running = self._running.first_prefilling(most)
            waiting = round_.next(most) if round_ is not None and budget.can_admit else None
            is_next = running is None or (waiting is not None and waiting.order < running.order)
            if is_next and waiting is not None and round_ is not None:
                self._admit(plan, waiting, budget, round_)
            elif running is not None:
                self._plan_chunk(plan, running, [], budget)
            else:
                return

    def _plan_chunk(
        self, plan: StepPlan, seq: Sequence, new_pages: list[int], budget: StepBudget
    ) -> None:
        start = seq.num_scheduled
        end = start + budget.take(seq.num_tokens - start, self.limits.price(start))
        is_last = end == seq.num_tokens
        if seq.last_step == plan.step:
            chunk = next(chunk for chunk in plan.chunks if chunk.seq == seq.id)
        else:
            chunk = PrefillChunk(
                seq=seq.id, start=start, end=end, new_page_ids=new_pages, sample=False
            )
            plan.chunks.append(chunk)
        chunk.end = end
        chunk.sample = is_last and seq.request.pooling is None
        chunk.pool = is_last and seq.request.pooling is not None
        seq.num_scheduled = end
        seq.last_step = plan.step
        self._kv.commit(seq.id, seq.tokens, end)
        if is_last:
            seq.num_pending += 1
            self._running.start_decoding(seq)

    def _headroom(self) -> int:
        """Pages left if each running sequence took one more: admitting beyond that would only end in preemption."""
        return self._kv.num_available - len(self._running)

    def _admit(self, plan: StepPlan, seq: Sequence, budget: StepBudget, round_: Round) -> None:
        """Admit ``seq`` if there is room, or let the round know what is missing."""
        version, limit = seq.version, seq.max_cacheable
        if not self._residency.is_resident(version):
            self._fetch(seq, round_)
            return
        if not self._kv.fits(version, seq.tokens, limit, reserve=len(self._running)):
            self._wait_for_pages(seq, round_)
            return
        self._residency.admit(version)
        self._queue.remove(seq)
        if version and version not in self._running.num_of_version:
            budget.adapters -= 1
        budget.sequences -= 1
        self._running.add(seq)
        admitted = self._kv.admit(seq.id, version, seq.tokens, limit)
        seq.num_scheduled = admitted.num_cached
        if seq.cached_tokens is None:
            seq.cached_tokens = admitted.num_cached
            self._counters.prompt_tokens += seq.num_prompt
            self._counters.cached_tokens += admitted.num_cached
        plan.starts.append(
            SequenceStart(
                seq=seq.id,
                token_ids=list(seq.tokens),
                num_prompt=seq.num_prompt,
                num_cached=admitted.num_cached,
                page_ids=admitted.cached_pages,
                slot=self._residency.slot(version),
                sampling=seq.sampling,
                seed=seq.seed,
                logprob_start=seq.logprob_start,
                num_top_logprobs=seq.num_top_logprobs,
                pooling=seq.request.pooling,
            )
        )
        self._plan_chunk(plan, seq, admitted.new_pages, budget)

    def _wait_for_pages(self, seq: Sequence, round_: Round) -> None:
        if not self._short_of_pages:
            self._short_at = self._headroom(), self._kv.num_changes
        self._short_of_pages.append(seq)
        round_.short_of_pages(seq)

    def _fetch(self, seq: Sequence, round_: Round) -> None:
        """Ask for the adapter of ``seq``, which is not on the device."""
        if self._residency.admit(seq.version) is AdapterAdmission.WAIT:
            round_.park(seq)
        else:
            round_.refuse(seq)

    def _close(self, plan: StepPlan) -> list[int]:
        """Take the oldest plan off the list of those in flight. Returns the adapters to release."""
        if next(iter(self._in_flight), None) != plan.step:
            raise ValueError(f"step {plan.step} is not the oldest that is in flight")
        return self._in_flight.pop(plan.step)

    def _take_vector(self, seq: Sequence, vector: PooledVector) -> None:
        seq.num_pending -= 1
        reason = FinishReason(kind="length", length=0)
        if vector.error is not None:
            reason = self._row_failure(seq, vector.error)
        self._end(seq, reason, embedding=vector.values or None)

    def _row_failure(self, seq: Sequence, error: str) -> FinishReason:
        """The finish reason of a sequence whose row failed while the others went on."""
        if error not in NOT_FINITE:
            return failure(error)
        # Its K/V may be wrong too: nobody may find it.
        self._kv.drop_version(seq.version)
        if seq.request.adapter is None:
            return failure(error)
        return failure(
            f"{error} with the adapter {seq.request.adapter!r}: its weights or its lora_alpha are too large for this model"
        )

    def _take_token(self, seq: Sequence, token: SampledToken) -> None:
        seq.num_pending -= 1
        if token.error is not None:
            self._end(seq, self._row_failure(seq, token.error))
            return
        if seq.max_tokens == seq.num_prompt:
            # max_new_tokens is 0: only the prompt was to be computed, and nobody asked for the token after it.
            self._end(seq, FinishReason(kind="length", length=0))
            return
        seq.append(token.token_id)
        self._counters.output_tokens += 1
        reason = finish_reason(seq, token.token_id)
        if reason is not None:
            self._end(seq, reason, token)
        else:
            self._emit(seq, None, token)

    def _num_cached(self, seq: Sequence) -> int:
        """Tokens of a waiting sequence whose K/V is cached."""
        return self._kv.match(seq.version, seq.tokens, seq.max_cacheable)

    def _line_up(self, seq: Sequence, *, preempted: bool = False) -> None:
        """Give a sequence that comes into the queue its length class and its place."""
        seq.length_class = self.limits.length_class(seq.num_tokens)
        if seq.length_class:
            seq.length_class = self.limits.length_class(seq.num_tokens - self._num_cached(seq))
        push = self._queue.push_front if preempted else self._queue.push
        push(seq)

    def _preempt(self, seq: Sequence) -> None:
        """Back to the queue, in front, with all its tokens; what it computed stays findable for a while."""
        self._leave(seq)
        seq.enter(SequenceState.PREEMPTED)
        seq.num_scheduled = 0
        self._line_up(seq, preempted=True)
        self._counters.preemptions += 1

    def _end(
        self,
        seq: Sequence,
        reason: FinishReason,
        token: SampledToken | None = None,
        embedding: bytes | None = None,
    ) -> None:
        """The one place where a sequence ends: everything it holds is given back, and its terminal output made."""
        if self._shares.forget(seq):
            pass  # it was never in the queue
        elif seq.state in (SequenceState.WAITING, SequenceState.PREEMPTED):
            self._queue.remove(seq)
            # It may have been the one that pages were short for.
            self._short_of_pages = []
        else:
            self._leave(seq)
        seq.enter(SequenceState.FINISHED)
        del self._sequences[seq.id]
        self._counters.finished += 1
        self._emit(seq, reason, token, embedding)

    def _emit(
        self,
        seq: Sequence,
        reason: FinishReason | None,
        token: SampledToken | None,
        embedding: bytes | None = None,
    ) -> None:
        """Add an output of ``seq``; it carries the prompt's log-probabilities if they were not handed out yet."""
        output = RequestOutput(
            id=seq.id,
            token_ids=[] if token is None else [token.token_id],
            cached_tokens=seq.cached_tokens or 0,
            embedding=embedding,
            finish=reason,
        )
        if token is not None and token.logprobs is not None:
            output.logprobs = [token.logprobs]
        if seq.prompt_logprobs:
            output.prompt_logprobs, seq.prompt_logprobs = seq.prompt_logprobs, []
        self._outputs.append(output)

    def _give_up(self, plan: StepPlan, reason: FinishReason) -> None:
        """Undo a plan that was not executed: end the sequence of its largest chunk, or its youngest row; preempt the others."""
        lengths = {chunk.seq: chunk.end - chunk.start for chunk in plan.chunks}
        lengths = {seq: length for seq, length in lengths.items() if seq in self._sequences}
        victim = max(lengths, key=lambda seq: (lengths[seq], seq), default=None)
        if victim is None and plan.rows:
            victim = plan.rows[-1].seq
        if victim in self._sequences:
            self._end(self._sequences[victim], reason)
        for part in (*plan.rows, *(chunk for chunk in plan.chunks if chunk.sample or chunk.pool)):
            if part.seq in self._sequences:
                self._sequences[part.seq].num_pending -= 1
        # The youngest first: whoever is put in front last stays in front.
        lost = {part.seq for part in (*plan.rows, *plan.chunks)}
        for seq in reversed(self._running.sequences()):
            if seq.id in lost:
                self._preempt(seq)

    def _leave(self, seq: Sequence) -> None:
        """Give back a running sequence's row, pages, adapter and worker state."""
        if self._running.remove(seq):
            self._queue.offer(seq.version)
        self._kv.release(seq.id, seq.tokens, min(seq.num_scheduled, seq.num_tokens))
        self._ended.append(seq.id)
        releases = self._in_flight.get(seq.last_step)
        if releases is not None and seq.version:
            releases.append(seq.version)
        else:
            self._residency.release(seq.version)
