"""Grammars that want too much: each is refused with a reason, for its own request alone."""

from __future__ import annotations

import dataclasses
import json
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future

import psutil
import pytest
import torch

from lorikeet.core.request import SamplingParams
from lorikeet.errors import EngineFault, RequestError, UnavailableError
from lorikeet.worker.grammar.compiler import CompiledGrammar, GrammarCompiler
from lorikeet.worker.grammar.compiler import compiler as grammar
from lorikeet.worker.grammar.compiler import masks as grammar_masks
from lorikeet.worker.grammar.masks import GrammarMatcher, MaskFiller
from tests.support.grammar_tokenizer import EOS_ID, VOCAB, save_byte_level_tokenizer
from tests.support.sampling import accepts, compile_grammar

STR = {"type": "string"}


def make_compiler(tmp_path_factory) -> GrammarCompiler:
    directory = tmp_path_factory.mktemp("tokenizer")
    save_byte_level_tokenizer(directory)
    return GrammarCompiler(directory, VOCAB, (EOS_ID,))


@pytest.fixture(scope="module")
def compiler(tmp_path_factory) -> Iterator[GrammarCompiler]:
    made = make_compiler(tmp_path_factory)
    yield made
    made.close()


@pytest.fixture
def own_compiler(tmp_path_factory) -> Iterator[GrammarCompiler]:
    """Of one test, which changes limits before it asks for the first grammar."""
    made = make_compiler(tmp_path_factory)
    yield made
    made.close()


def tag(form: object) -> str:
    return json.dumps({"type": "structural_tag", "format": form})


def properties(**keywords: object) -> str:
    return json.dumps({"type": "object", **keywords})


def unit_rules(first: str, count: int) -> str:
    rules = [f"r{i} ::= r{i + 1}" for i in range(count)]
    return "\n".join([f"root ::= {first}", *rules, f'r{count} ::= "a"'])


def chain(count: int, link: str = "properties") -> str:
    def to(index: int) -> dict[str, object]:
        ref = {"$ref": f"#/$defs/D{index}"}
        return {"type": "object", "properties": {"a": ref}} if link == "properties" else ref

    defs: dict[str, object] = {f"D{i}": to(i + 1) for i in range(count)}
    return json.dumps({**to(0), "$defs": {**defs, f"D{count}": {"type": "integer"}}})


NESTED = "nested too deeply, or repeats too much"
# Which of the two limits is met first is up to the tokens of the trial.
TOO_COSTLY = (
    "of memory for each token; allowed: 256 KB",
    "s of processor time; allowed: 0.05 s",
)
HOSTILE = [
    # What overflows XGrammar's stack.
    ("ebnf", "root ::= root{2}", NESTED),
    ("ebnf", 'root ::= "a"\nr ::= (r){2,}', NESTED),
    ("ebnf", 'root ::= "a"\nr ::= (r){0,0}', NESTED),
    ("ebnf", 'root ::= "a"\nr ::= (r){1000}', NESTED),
    ("structural_tag", tag({"type": "grammar", "grammar": "root ::= root{2}"}), NESTED),
    ("json_schema", chain(6000)[:100_000], "not valid JSON"),
    ("json_schema", chain(1200), "references nest the schema deeper than 500"),
    ("json_schema", chain(2500, "bare"), "references nest the schema deeper than 500"),
    # What costs each sequence that follows it too much.
    ("json_schema", properties(properties={f"name{i}": STR for i in range(1400)}), TOO_COSTLY),
    ("ebnf", unit_rules("r0", 6000), "allowed: "),
    ("ebnf", unit_rules('"x" r0', 6000), "allowed: "),
    ("ebnf", unit_rules('"a very long secret that no random output begins with" r0', 7000), "each output"),
    # What was an exception of another type, or none.
    ("json_schema", '{"type":5,"enum":[1]}', "type is 5; allowed: one of string"),
    ("json_schema", properties(properties={"a": {}}, required=[[]]), "a list of strings"),
    ("json_schema", properties(properties={"a": {}}, required=[{}]), "a list of strings"),
    ("json_schema", properties(properties={"ab": STR}, patternProperties={"a{" + "9" * 20 + "}": STR}), "a{999"),
    ("json_schema", '{"type":"object","properties":{"\\ud800":{"not":{}}}}', "not is not supported"),
    ("json_schema", '{"const":"\\ud800"}', "surrogate"),
    ("json_schema", '{"const":"\ud800"}', "surrogate"),
    ("json_schema", '{"const":1e400}', "infinite"),
    ("json_schema", '{"const":NaN}', "infinite"),
    ("json_schema", '{"type":"string","pattern":5}', "pattern is 5; allowed: a string"),
    ("json_schema", '{"anyOf":[]}', "must not be empty"),
    ("json_schema", '{"type":[]}', "type is []"),
    ("json_schema", '{"type":"number","minimum":1e300}', "from -2^63 to 2^63"),
    ("json_schema", '{"type":"string","minLength":-1}', "a whole number"),
    ("json_schema", '{"items":[{"type":"string"}]}', "prefixItems"),
    ("json_schema", '{"default":' * 990 + "1" + "}" * 990, "nested too deeply"),
    ("json_schema", '{"type":"integer","multipleOf":100000}', "in part only"),
    ("json_schema", '{"type":"string","pattern":"^(?!a)a$"}', "Lookahead"),
    ("json_schema", properties(propertyNames={**STR, "pattern": "^(?!a)b$"}), "Lookahead"),
    ("json_schema", properties(patternProperties={"^(?!a)b$": STR}), "Lookahead"),
    ("structural_tag", tag({"type": "json_schema", "json_schema": {"type": "string", "pattern": "(?=a)a"}}), "Lookahead"),
    ("structural_tag", tag({"type": "regex", "pattern": "(a$)b"}), "$ in the middle"),
    ("structural_tag", tag(5), "object"),
    ("regex", "(a$)b", "$ in the middle"),
    ("regex", "[" * 100_000, "a bracket is not closed"),
    ("regex", "a{99999999999999999999}", "too large"),
    ("regex", "\0", "null character"),
    ("regex", "a" * 140_000, "140,000 characters; allowed: up to 131,072"),
    ("ebnf", "root ::= " + "(" * 20_000 + '"a"' + ")" * 20_000, "Nest layer"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "source", "why"),
    HOSTILE,
    ids=[f"{kind}-{n}" for n, (kind, _, _) in enumerate(HOSTILE)],
)
def test_it_is_refused_with_a_reason(compiler, kind, source, why):
    with pytest.raises(RequestError) as caught:
        compile_grammar(compiler, SamplingParams(**{kind: source}))
    message = str(caught.value)
    assert message.startswith(f"sampling_params.{kind}")
    assert any(reason in message for reason in ([why] if isinstance(why, str) else why))
    assert len(message) < 600
    assert "Check failed" not in message
    message.encode()


LARGE = [
    ("json_schema", properties(properties={f"name{i}": STR for i in range(300)})),
    ("json_schema", properties(properties={f"name{i}": STR for i in range(900)}, required=[f"name{i}" for i in range(900)])),
    ("json_schema", json.dumps({"enum": [f"value {i * 7919}" for i in range(5000)]})),
    ("json_schema", '{"type":"string","pattern":"^[a-zA-Z0-9_-]{1,255}$"}'),
    ("json_schema", chain(100)),
    ("json_schema", properties(properties={"a" * 40 + "!": STR}, patternProperties={"^(a+)+$": STR})),
    ("regex", "|".join(f"word{i}" for i in range(4000))),
    ("regex", "((((a{1,50}){1,50}){1,50}){1,50}){1,50}"),
    ("ebnf", 'root ::= root root | "a"'),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "source"), LARGE)
def test_large_ones_that_cost_little_are_compiled(compiler, kind, source):
    assert compile_grammar(compiler, SamplingParams(**{kind: source})).num_bytes > 0


def with_less(monkeypatch, **limits: float) -> None:
    for name in ("_FIRST", "_LIMITS"):
        changed = dataclasses.replace(getattr(grammar, name), **limits)
        monkeypatch.setattr(grammar, name, changed)


SLOW = "root ::= " + " | ".join(f'[a-z]{{{i}}} "x"' for i in range(2500))


@pytest.mark.parametrize(
    ("limits", "why"),
    [
        ({"cpu_seconds": 0.3}, "takes more than 0.3 s of processor time"),
        ({"wall_seconds": 0.3}, "takes longer than 0.3 s"),
        ({"memory_bytes": 32 * 2**20}, "takes more than 32 MB of memory"),
    ],
)
def test_limits_are_named(tmp_path_factory, monkeypatch, limits, why):
    with_less(monkeypatch, **limits)
    compiler = make_compiler(tmp_path_factory)
    try:
        with pytest.raises(RequestError, match="sampling_params.ebnf: compiling it " + why):
            compile_grammar(compiler, SamplingParams(ebnf=SLOW))
        compile_grammar(compiler, SamplingParams(regex="a"))
    finally:
        compiler.close()


def children() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def wait_until(condition, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_slow_ones_delay_no_others_and_end_when_nobody_waits(own_compiler):
    compile_grammar(own_compiler, SamplingParams(regex="a"))
    slow = [
        own_compiler.request(SamplingParams(ebnf=f"{SLOW} | {i}")) for i in ('"p"', '"q"', '"r"')
    ]
    wait_until(lambda: own_compiler._second._num_threads == 2)
    for i in range(3):
        compile_grammar(own_compiler, SamplingParams(regex=f"b{i}"))
    assert not any(future.done() for future in slow)
    for future in slow:
        assert future.cancel()
    assert own_compiler._sandbox._server._process is not None
    server = psutil.Process(own_compiler._sandbox._server._process.pid)
    # The spare process is left.
    wait_until(lambda: not own_compiler._compiling and len(server.children()) <= 1)


def test_equal_grammars_compile_once_and_go_on_while_one_request_waits(own_compiler, monkeypatch):
    jobs: list[object] = []
    begun = threading.Event()
    go_on = threading.Event()
    submit = own_compiler._sandbox.submit

    def note(work, limits):
        jobs.append(work)
        begun.set()
        assert go_on.wait(60)
        return submit(work, limits)

    monkeypatch.setattr(own_compiler._sandbox, "submit", note)
    futures = [own_compiler.request(SamplingParams(regex="ab?")) for _ in range(5)]
    assert begun.wait(60)
    assert all(future.cancel() for future in futures[:4])
    go_on.set()
    last = futures[4].result(timeout=60)
    assert own_compiler.request(SamplingParams(regex="ab?")).result(timeout=60) is last
    assert len(jobs) == 1
    compile_grammar(
        own_compiler, SamplingParams(regex="ab?", skip_special_tokens=False)
    )  # other tokens
    assert len(jobs) == 2


def test_a_grammar_that_everybody_left_is_compiled_for_who_comes_later(own_compiler):
    first = own_compiler.request(SamplingParams(regex="xy"))
    first.cancel()
    assert compile_grammar(own_compiler, SamplingParams(regex="xy")) is not None


def test_what_is_kept_is_bounded_but_for_what_requests_hold(compiler, monkeypatch):
    held = compile_grammar(compiler, SamplingParams(regex="held"))
    one = held.num_bytes
    monkeypatch.setattr(grammar, "_MAX_IDLE_BYTES", 4 * one)
    for i in range(12):
        compile_grammar(compiler, SamplingParams(regex=f"idle{i:02}"))
    assert sum(kept.num_bytes for kept in compiler._recent.values()) <= 4 * one
    assert len(compiler._known) <= 5
    assert compile_grammar(compiler, SamplingParams(regex="held")) is held
    monkeypatch.setattr(grammar, "_MAX_OPEN_BYTES", -4 * one)
    with pytest.raises(UnavailableError, match="grammars of open requests take"):
        compile_grammar(compiler, SamplingParams(regex="more"))
    assert compile_grammar(compiler, SamplingParams(regex="held")) is held


def test_too_many_and_too_long_waiting(own_compiler, monkeypatch):
    monkeypatch.setattr(grammar, "_MAX_WAITING", 0)
    with pytest.raises(UnavailableError, match="0 grammars wait"):
        compile_grammar(own_compiler, SamplingParams(regex="a"))
    monkeypatch.undo()
    monkeypatch.setattr(grammar, "_MAX_WAIT_SECONDS", -1.0)
    with pytest.raises(UnavailableError, match="has waited"):
        compile_grammar(own_compiler, SamplingParams(regex="a"))
    monkeypatch.undo()
    compile_grammar(own_compiler, SamplingParams(regex="a"))


def test_no_process_before_the_first_grammar_and_none_after_the_end(tmp_path_factory):
    before = set(children())
    compiler = make_compiler(tmp_path_factory)
    compile_grammar(compiler, SamplingParams())
    assert set(children()) == before
    compile_grammar(compiler, SamplingParams(regex="a"))
    mine = [process for process in children() if process not in before]
    assert mine
    waiting = compiler.request(SamplingParams(ebnf=SLOW))
    compiler.close()
    with pytest.raises(EngineFault):
        waiting.result(timeout=60)
    with pytest.raises(EngineFault):
        compile_grammar(compiler, SamplingParams(regex="b"))
    _, alive = psutil.wait_procs(mine, timeout=30)
    assert not alive


def test_a_grammar_that_names_a_token_is_not_taken_for_one_that_names_another(compiler):
    """XGrammar's own cache gives the second the first one's mask."""
    for token in (66, 70, 1):
        matcher = compiler.matcher(
            SamplingParams(structural_tag=tag({"type": "token", "token": token}))
        )
        assert admitted(matcher) == [token]
        assert accepts(matcher, token)


def admitted(matcher: GrammarMatcher) -> list[int]:
    bits = torch.zeros((1, (VOCAB + 31) // 32), dtype=torch.int32)
    matcher.fill(bits, 0)
    return [t for t in range(VOCAB) if bits[0, t // 32] >> (t % 32) & 1]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_many_distinct_schemas_take_no_more_memory(own_compiler):
    sizes: list[int] = []
    for i in range(2000):
        names = {f"p{i}_{j}": {"type": ["string", "integer"][j % 2]} for j in range(60)}
        compile_grammar(own_compiler, SamplingParams(json_schema=properties(properties=names)))
        if i % 250 == 249:
            sizes.append(psutil.Process().memory_info().rss)
    # The cache fills up to its bound; a leak of 33 kB each would be 50 MB from there on.
    assert sizes[-1] - sizes[3] < 20 * 2**20 + grammar._MAX_IDLE_BYTES * (
        len(own_compiler._recent) > 1000
    )


# --- masks of running sequences ---


class OddMatcher(GrammarMatcher):
    """Does something else in place of ``fill``."""

    def __init__(self, compiled: CompiledGrammar, act) -> None:
        super().__init__(compiled, VOCAB, (EOS_ID,))
        self._act = act

    def fill(self, bits_GW, row, avoid=()):
        bits_GW[row] = 7
        self._act()


def spin(seconds: float) -> None:
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def raise_error() -> None:
    raise TypeError("odd")


@torch.inference_mode()  # as steps are computed
def fill(filler: MaskFiller, *matchers: GrammarMatcher) -> list[int]:
    bits = filler.fill(
        torch.zeros((len(matchers), 13), dtype=torch.int32), [(m, ()) for m in matchers]
    )
    return bits[:, 0].tolist()


@pytest.fixture
def filler() -> Iterator[MaskFiller]:
    made = MaskFiller()
    yield made
    made.close()


def test_an_exception_is_that_rows_error(filler):
    compiled = CompiledGrammar(None, 0)
    bad, good = OddMatcher(compiled, raise_error), OddMatcher(compiled, lambda: None)
    assert fill(filler, bad, good) == [0, 7]
    assert "odd" in (bad.error or "")
    assert good.error is None


def test_a_thread_that_has_died_is_that_rows_error(filler, monkeypatch):
    """Only an error of ours can end it so."""
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    compiled = CompiledGrammar(None, 0)
    bad, good = OddMatcher(compiled, sys.exit), OddMatcher(CompiledGrammar(None, 1), lambda: None)
    assert fill(filler, bad, good) == [0, 7]
    assert bad.error is not None
    assert good.error is None


def test_a_row_that_takes_too_long_is_left_behind(filler, monkeypatch):
    one, other = CompiledGrammar(None, 0), CompiledGrammar(None, 0)
    stopped = threading.Event()
    before = threading.enumerate()

    def num_new() -> int:
        return sum(t.name == "masks" and t not in before for t in threading.enumerate())

    def hang() -> None:
        while not stopped.is_set():
            spin(0.01)

    first, slow = OddMatcher(other, lambda: None), OddMatcher(one, hang)
    same, last = OddMatcher(one, lambda: None), OddMatcher(other, lambda: None)
    assert fill(filler, first, slow, same, last) == [7, 0, 0, 7]
    assert "0.1 s of processor time" in (slow.error or "")
    assert same.error == slow.error
    assert first.error is last.error is None
    assert fill(filler, first, slow, same, last) == [7, 0, 0, 7]
    left = filler._tasks
    assert num_new() > 1
    stopped.set()
    wait_until(lambda: num_new() == 1)
    assert filler._tasks is left


def test_a_row_that_always_takes_long_ends(filler, monkeypatch):
    monkeypatch.setattr(grammar_masks, "START_SECONDS", 0.05)
    matcher = OddMatcher(CompiledGrammar(None, 0), lambda: spin(0.03))
    assert fill(filler, matcher) == [7]
    assert matcher.error is None
    fill(filler, matcher)
    assert "on the average" in (matcher.error or "")


def test_waiting_takes_no_time_from_a_row(filler):
    matcher = OddMatcher(CompiledGrammar(None, 0), lambda: time.sleep(0.6))
    assert fill(filler, matcher) == [7]
    assert matcher.error is None


def test_a_growing_ambiguity_ends_its_output(compiler, filler):
    """The states of this one grow with the output's length, and their number with its square."""
    matcher = compiler.matcher(SamplingParams(ebnf='root ::= root root root | "a" | root root'))
    token = admitted(matcher)[0]
    bits = torch.zeros((1, 13), dtype=torch.int32)
    for _ in range(20_000):
        filler.fill(bits, [(matcher, ())])
        if matcher.error is not None:
            break
        matcher.note(token)
    assert "takes too long" in (matcher.error or "")


def test_the_future_of_a_refusal_says_why(compiler):
    future: Future[CompiledGrammar] = compiler.request(SamplingParams(regex="("))
    with pytest.raises(RequestError, match="parenthesis"):
        future.result(timeout=60)
