"""Requests that ask for much, in few bytes or in many, and values that are none."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

from tests.support.hostile import EITHER, SERVED, Call, Case
from tests.support.hostile_calls import (
    Fields,
    chat,
    completion,
    embed,
    generate,
    get,
    loads,
    nested,
    post,
    tokens,
)

MISSING = frozenset({404})
GONE = frozenset({400, 404})
TOO_LARGE = frozenset({413})
BUSY = frozenset({200, 400, 503})
# About 20 ms to try on any text: (?:(?!a)|(?!b)) has two ways at each place.
SLOW_STOP = "(?:(?!a)|(?!b))" * 17 + "(?!)"
LONG_STOP = r"(.|\s)*" * 5 + "zzzq"
HUGE = "1" + "0" * 4000
# A control character, a line of the log, and one that is no character.
BAD_NAMES = {
    "line": "x\n2026-01-01 00:00:00.000 INFO    server  FORGED",
    "escape": "x\x1b[2Jy",
    "NUL": "x\0y",
    "surrogate": "x\ud800y",
    "of base and adapter": "demo:sql",
    "of the base": "demo",
    "of 100,000 letters": "x" * 100_000,
}


def value(name: str, text: str) -> Call:
    """A sampling parameter written as JSON text."""
    return post("/generate", f'{{"text":"Hi","sampling_params":{{"{name}":{text}}}}}')


def chat_of(messages: object) -> Call:
    return post("/v1/chat/completions", {"model": "demo", "messages": messages, "max_tokens": 4})


def stopping(patterns: list[str], **sampling: Any) -> Call:
    return generate(stop_regex=patterns, **sampling)


def biases(number: int) -> dict[str, float]:
    return {str(token): 1.0 for token in range(number)}


def lines(number: int, role: str = "user") -> list[Fields]:
    return [{"role": role, "content": "a"}] * number


def parts(number: int) -> list[Fields]:
    return [{"type": "text", "text": "a"}] * number


LONG_ANSWERS: Fields = {"max_new_tokens": 300, "ignore_eos": True}
MANY = [
    Case("200 prompts of n=1024", lambda: generate(["a"] * 200, n=1024), r"\d.*completions"),
    Case("500 prompts of n=1024", lambda: generate(["a"] * 500, n=1024), r"\d.*completions"),
    Case("4000 prompts of n=1024", lambda: generate(["a"] * 4000, n=1024), r"\d.*completions"),
    Case("4000 prompts, leaves", lambda: generate(["a"] * 4000, n=1024), leaves=1.0),
    Case("4000 prompts of ids, n", lambda: tokens([[5]] * 4000, n=1024), r"\d.*completions"),
    Case("4000 prompts, completions", lambda: completion(["a"] * 4000, n=128), r"\d.*completions"),
    Case(
        "4000 prompts of ids, completions",
        lambda: completion([[5]] * 4000, n=128),
        r"\d.*completions",
    ),
    Case("400,000 prompts", lambda: generate(["a"] * 400_000), r"\d"),
    Case("400,000 prompts of ids", lambda: tokens([[5]] * 400_000), r"\d"),
    Case("400,000 prompts, completions", lambda: completion(["a"] * 400_000), r"\d"),
    Case("400,000 texts to embed", lambda: embed(["a"] * 400_000), r"\d"),
    Case("400,000 lists to embed", lambda: embed([[5]] * 400_000), r"\d"),
    Case("4000 texts to embed", lambda: embed(["a"] * 4000), r"\d", EITHER),
    Case("parameters of 500 prompts", lambda: parameters(500, n=1024), r"\d.*completions"),
    Case("n=1024", lambda: generate(n=1024, max_new_tokens=1), r"\d.*completions", EITHER),
    Case("n=1024, chat", lambda: chat(n=1024, max_tokens=1), r"\d", EITHER),
    Case("n=10^30", lambda: value("n", "1" + "0" * 30), "n|JSON"),
    Case("n=1024, a long prompt", lambda: tokens([5] * 2000, n=1024), leaves=15.0, slow=True),
    Case("n=1024, long answers", lambda: generate(n=1024, **LONG_ANSWERS), leaves=10.0),
    Case("2000 prompts, long answers", lambda: generate(["a"] * 2000, **LONG_ANSWERS), leaves=10.0),
    Case(
        "crowds of long answers",
        lambda: generate(n=256, **LONG_ANSWERS),
        leaves=10.0,
        at_once=4,
        slow=True,
    ),
    Case("n=1024, biases", lambda: generate(n=1024, logit_bias=biases(2000)), r"bias|\bn\b"),
    Case("biases 128k", lambda: generate(logit_bias=biases(128_000)), "logit_bias"),
    Case("biases all", lambda: generate(logit_bias=biases(2048)), "logit_bias", EITHER),
    Case("stop ids", lambda: generate(stop_token_ids=[5] * 500_000), "stop_token_ids", EITHER),
    Case("every stop id", lambda: every_stop_id(), "token", EITHER),
    Case("stops 128 of 1024, n", lambda: generate(stop=stops(128), n=64), r"stop|\bn\b", EITHER),
    Case("stops 100,000", lambda: generate(stop=["a"] * 100_000), "stop"),
    Case("stop of 1 MB", lambda: generate(stop="a" * 10**6), "stop"),
    Case("stop patterns of 20 ms", lambda: stopping([SLOW_STOP] * 60, n=8), "stop_regex"),
    Case("stop patterns, n=1024", lambda: stopping([SLOW_STOP] * 128, n=1024), "stop_regex|n"),
    Case("stop patterns that look far", lambda: far_stops(), "stop_regex|n", EITHER),
    Case("stop pattern evil", lambda: stopping(["(a+)+$"]), "stop_regex", EITHER),
    Case("stop pattern evil, text", lambda: stopping(["^(.+)+!!"], max_new_tokens=200), "", EITHER),
    Case("stop pattern {10000}", lambda: stopping(["(a{1000}){10}"] * 128), "stop_regex"),
    Case("stop pattern {10^20}", lambda: stopping([f"a{{{10**20}}}"]), "stop_regex"),
    Case("stop pattern of groups", lambda: stopping(["(){9000}a"] * 4), "stop_regex", EITHER),
    Case("stop pattern of groups, ^", lambda: stopping(["(){9999}(a+)+?^|"]), "stop_regex"),
    Case("stop pattern nested", lambda: stopping([nested(5000, "(", ")")]), "stop_regex"),
    Case("stop pattern open", lambda: stopping(["[" * 16000]), "stop_regex"),
    Case("stop pattern, completions", lambda: completion(stop_regex=["(a+)+$"]), "stop", EITHER),
    Case("all log-probabilities", lambda: every_logprob(1024), r"top_logprobs_num.*\d"),
    Case("all, streamed", lambda: every_logprob(1024, stream=True), r"top_logprobs_num.*\d"),
    Case("many log-probabilities", lambda: every_logprob(20), r"top_logprobs_num.*\d", EITHER),
    Case(
        "log-probabilities for a crowd", lambda: every_logprob(20), "", BUSY, at_once=16, slow=True
    ),
    Case(
        "echo for a crowd",
        lambda: completion([5] * 2000, echo=True, logprobs=5),
        "",
        BUSY,
        at_once=16,
        slow=True,
    ),
    Case("long prompts at once", lambda: tokens([7] * 2000), "", BUSY, at_once=16),
    Case("streams left", lambda: generate(fields={"stream": True}, **LONG), leaves=0.5, at_once=64),
    Case(
        "32 streams with log-probabilities",
        lambda: top_stream(),
        "",
        BUSY,
        at_once=32,
        slow=True,
        seconds=120,
    ),
    Case("flush left", lambda: post("/flush_cache?timeout=1e9", b""), leaves=0.2, at_once=64),
    Case("models listed", lambda: get("/v1/models"), "", SERVED, at_once=64),
    Case("server_info at once", lambda: get("/server_info"), "", SERVED, at_once=64),
    Case("a prompt of 2000 words", lambda: generate("word " * 1500), "", EITHER),
    Case("8 prompts", lambda: generate(["Hello"] * 8, n=4), "", SERVED),
]

LONG: Fields = {"max_new_tokens": 1500, "ignore_eos": True}


def parameters(number: int, **sampling: object) -> Call:
    body = {"text": ["a"] * number, "sampling_params": [sampling] * number}
    return post("/generate", body)


def every_stop_id() -> Call:
    """No token is possible."""
    return generate(stop_token_ids=list(range(2048)), min_new_tokens=2)


def stops(number: int) -> list[str]:
    return [f"{'a' * 1020}{i:03}" for i in range(number)]


def far_stops() -> Call:
    return stopping([LONG_STOP] * 128, n=32, max_new_tokens=64, ignore_eos=True)


def every_logprob(top: int, **fields: object) -> Call:
    asked = {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": top}
    return tokens([5] * 2000, {**asked, **fields}, max_new_tokens=8)


def top_stream() -> Call:
    asked = {"return_logprob": True, "top_logprobs_num": 300, "stream": True}
    return generate(fields=asked, max_new_tokens=300, ignore_eos=True)


TEXTS = [
    Case("text 1 MB", lambda: generate("Where is Oslo? " * 70_000), "context"),
    Case("text 5 MB", lambda: generate("What is the capital of France? " * 160_000), "context"),
    Case("text 20 MB", lambda: generate("Where is Oslo? " * 1_300_000), "context"),
    Case("text 30 MB", lambda: generate("a b c " * 5_000_000), "context"),
    Case("text 5 MB of one word", lambda: generate("a" * 5_000_000), "context"),
    Case("text 5 MB of blanks", lambda: generate(" " * 5_000_000), "context", EITHER),
    Case("text 100 kB of one word", lambda: generate("ab" * 50_000), "context", EITHER),
    Case("text 5 MB of combining marks", lambda: generate("a\u0301" * 400_000), "context"),
    Case("text 5 MB of emoji", lambda: generate("\U0001f600" * 400_000), "context"),
    Case("text of 1 MB, completions", lambda: completion("Hello " * 170_000), "context"),
    Case("text of 3 MB, chat", lambda: chat("Hello " * 500_000), "context"),
    Case("text of 5 MB to embed", lambda: embed("Hello " * 800_000), "context"),
    Case("texts of 1 MB", lambda: generate(["Hello " * 170_000] * 20), "context"),
    Case("texts of 100 kB", lambda: generate(["Hello " * 17_000] * 200), "context"),
    Case("text of 1 MB in a crowd", lambda: generate("Hello " * 170_000), "context", at_once=8),
    Case("messages 100,000", lambda: chat_of(lines(100_000)), "context|messages|body"),
    Case("messages 100,000 of no role", lambda: chat_of(lines(100_000, "x")), "", EITHER | GONE),
    Case("messages 300,000 empty", lambda: chat_of([{}] * 300_000), "messages|role|body"),
    Case("parts 100,000", lambda: chat(parts(100_000)), "context|messages|body"),
    Case("parts 300,000 of no kind", lambda: chat([{}] * 300_000), "messages|content|body"),
    Case("body 33 MB", lambda: generate("a" * 34_000_000), "", TOO_LARGE),
    Case("role of 1 MB", lambda: chat_of(lines(1, "x" * 10**6)), "", EITHER),
    Case("surrogate in text", lambda: generate("a\ud800"), "JSON"),
    Case("surrogates in text", lambda: generate("\ud800" * 10**6), "JSON"),
    Case("surrogate in a chat", lambda: chat("\udfff"), "JSON"),
    Case("surrogate in a role", lambda: chat_of(lines(1, "\ud800")), "JSON"),
    Case("surrogate in a key", lambda: post("/generate", {"\ud800": 1}), "JSON"),
    Case("surrogate in a stop", lambda: generate(stop="\ud800"), "JSON"),
    Case("surrogate in a stop pattern", lambda: stopping(["\ud800"]), "JSON"),
    Case("surrogate in a rid", lambda: generate(fields={"rid": "\ud800"}), "JSON"),
    Case("surrogate in a prompt", lambda: completion("\ud800"), "JSON"),
    Case("surrogate in an input", lambda: embed("\ud800"), "JSON"),
    Case("surrogate in a user", lambda: chat(user="\ud800"), "", EITHER),
    Case("surrogate in metadata", lambda: chat(metadata={"\ud800": "\ud800"}), "", EITHER),
    Case("surrogate in a parameter's name", lambda: generate(**SURROGATE), "JSON"),
    Case("surrogate in a response_format", lambda: chat(response_format=NAMED), "", EITHER),
    Case("NUL in text", lambda: generate("\0\0\uffff"), "", EITHER),
]

SURROGATE: Fields = {"\ud800": 1}
NAMED = {"type": "json_schema", "json_schema": {"name": "\ud800", "schema": {"title": "\ud800"}}}

VALUES = [
    Case("ids 3 million strings", lambda: tokens(["a"] * 3_000_000), "input_ids|values"),
    Case("ids 300,000 strings", lambda: tokens(["a"] * 300_000), "input_ids"),
    Case("ids mixed", lambda: tokens([5, "a", None, []] * 100_000), "input_ids|body"),
    Case("ids 300,000 lists of strings", lambda: tokens([["a"]] * 300_000), "input_ids|body"),
    Case("ids 2 million", lambda: tokens([5] * 2_000_000), "context|input_ids|values"),
    Case("ids deep", lambda: post("/generate", f'{{"input_ids":{nested(900, "[", "]")}}}'), ""),
    Case("ids of 10^4000", lambda: post("/generate", f'{{"input_ids":[{HUGE}]}}'), ""),
    Case("text 300,000 numbers", lambda: generate([1] * 300_000), "text"),
    Case("text 300,000 nulls", lambda: generate([None] * 300_000), "text"),
    Case("prompt 300,000 objects", lambda: completion([{}] * 300_000), "prompt|body"),
    Case("input 300,000 objects", lambda: embed([{}] * 300_000), "input|body"),
    Case("input 300,000 nulls", lambda: embed([None] * 300_000), "input"),
    Case("lora_path 300,000 numbers", lambda: generate(fields=many("lora_path", 1)), "lora_path"),
    Case("rid 300,000 numbers", lambda: generate(fields=many("rid", 1)), "rid"),
    Case("return_logprob 300,000", lambda: generate(fields=many("return_logprob", "a")), "logprob"),
    Case("sampling_params 300,000", lambda: generate(fields=many("sampling_params", 1)), "sampl"),
    Case("stop 300,000 numbers", lambda: completion(stop=[1] * 300_000), "stop"),
    Case("stop_token_ids 300,000", lambda: completion(stop_token_ids=["a"] * 300_000), "stop"),
    Case("logit_bias of strings", lambda: completion(logit_bias=wrong_biases()), "logit_bias"),
    Case("tools 300,000 numbers", lambda: chat(tools=[1] * 300_000), "tools"),
    Case("messages 300,000 numbers", lambda: chat_of([1] * 300_000), "messages"),
    Case("modalities 300,000", lambda: chat(modalities=["a"] * 300_000), "modalities"),
    Case("unknown keys 100,000", lambda: generate(fields=keys(100_000)), "", EITHER),
    Case("unknown keys 100,000, chat", lambda: chat(**keys(100_000)), "", EITHER),
    Case("unknown parameters", lambda: generate(**keys(100_000)), "sampling_params"),
    Case("message of 100,000 keys", lambda: chat_of([keys(100_000)]), "messages|role", EITHER),
    Case("response_format keys", lambda: chat(response_format=keys(100_000)), "response_format"),
    Case("body deep", lambda: post("/generate", nested(100_000, "[", "]")), "JSON|body"),
    Case("body an array", lambda: post("/generate", "[1]"), "object"),
    Case("body empty", lambda: post("/generate", b""), "JSON|body"),
    Case("body null", lambda: post("/v1/chat/completions", "null"), "object"),
    Case("body no UTF-8", lambda: post("/generate", b'{"text":"\xff\xfe"}'), ""),
    Case("body with NaN", lambda: value("temperature", "NaN"), ""),
    Case("body with Infinity", lambda: value("temperature", "-Infinity"), ""),
    Case("temperature 1e400", lambda: value("temperature", "1e400"), ""),
    Case("temperature -0", lambda: value("temperature", "-0.0"), "", EITHER),
    Case("temperature 5e-324", lambda: value("temperature", "5e-324"), "", SERVED),
    Case("temperature 10^4000", lambda: value("temperature", HUGE), ""),
    Case("max_new_tokens 10^4000", lambda: value("max_new_tokens", HUGE), "", EITHER),
    Case("max_new_tokens 2^63", lambda: value("max_new_tokens", str(2**63)), "", EITHER),
    Case("top_k 2^64", lambda: value("top_k", str(2**64)), "", EITHER),
    Case("seed 10^30", lambda: value("sampling_seed", "1" + "0" * 30), ""),
    Case("bias 1e308", lambda: value("logit_bias", '{"5":1e308}'), "logit_bias"),
    Case("bias of a huge id", lambda: value("logit_bias", f'{{"{HUGE}":1}}'), "logit_bias"),
    Case("bias of no id", lambda: value("logit_bias", '{"\\u0663":1}'), "logit_bias", EITHER),
    Case("logprob_start_len", lambda: generate(fields={"logprob_start_len": 2**70}), ""),
    Case("top_logprobs 10^30", lambda: chat(logprobs=True, top_logprobs=10**30), ""),
    Case("same key", lambda: post("/generate", '{"text":"a","text":["b"]}'), "", EITHER),
    Case("dimensions 10^30", lambda: embed(dimensions=10**30), ""),
    Case("unload timeout 1e400", lambda: post("/unload_lora_adapter", UNLOAD), ""),
    Case("flush timeout", lambda: post("/flush_cache?timeout=" + "9" * 5000, b""), ""),
    Case("response_format deep", lambda: post("/v1/chat/completions", DEEP_FORMAT), ""),
]

UNLOAD = '{"lora_name":"x","timeout":1e400}'
DEEP_FORMAT = (
    '{"model":"demo","messages":[{"role":"user","content":"a"}],"response_format":'
    + nested(1000, '{"type":', "}")
    + "}"
)


def many(name: str, item: object) -> Fields:
    return {name: [item] * 300_000}


def keys(number: int) -> Fields:
    return {f"key{i}": i for i in range(number)}


def wrong_biases() -> Fields:
    return {f"x{i}": "y" for i in range(100_000)}


NAMES = [
    *[
        Case(f"name {kind}, asked for", lambda name=name: generate(fields={"lora_path": name}))
        for kind, name in BAD_NAMES.items()
        if kind not in ("of base and adapter", "of the base")
    ],
    *[
        Case(f"name {kind}, as a model", lambda name=name: chat(model=name), "", GONE)
        for kind, name in BAD_NAMES.items()
        if kind not in ("of base and adapter", "of the base")
    ],
    *[
        Case(f"name {kind}, loaded", lambda name=name: loads(name), "name|JSON")
        for kind, name in BAD_NAMES.items()
    ],
    *[
        Case(f"name {kind}, unloaded", lambda name=name: unload(name), "", GONE)
        for kind, name in BAD_NAMES.items()
    ],
    Case("name of many dots", lambda: generate(fields={"lora_path": "a." * 16_000}), "lora_path"),
    Case("name of 200 kB of dots", lambda: generate(fields={"lora_path": "a." * 10**5}), "lora"),
    Case("name like a URL", lambda: generate(fields={"lora_path": "a+" * 20_000 + "://"}), "lora"),
    Case("name of dots, vLLM", lambda: post("/v1/load_lora_adapter", VLLM), "lora", GONE),
    Case("name of dots as a model", lambda: completion(model="a." * 10**5), "", GONE),
    Case("name of 1 MB as a model", lambda: embed(model="a" * 10**6), "", GONE),
    Case("name with base as a model", lambda: chat(model="demo:" + "a" * 10**6), "", GONE),
    Case("name of colons", lambda: chat(model=":" * 10**6), "", GONE),
    Case("name that leads away", lambda: generate(fields={"lora_path": "../../etc"}), ""),
    Case("path of 1 MB", lambda: load_path("a/" * 500_000), "path"),
    Case("path of dots", lambda: load_path("a." * 100_000), "path"),
    Case("path with a line", lambda: load_path("/x\n2026-01-01 00:00:00.000 INFO x"), "path"),
    Case("path with NUL", lambda: load_path("/x\0y"), "path"),
    Case("path with a surrogate", lambda: load_path("/x\ud800"), "path|JSON"),
    Case("path with a password", lambda: load_path("ftp://user:S3CRET@host/x"), ""),
    Case("path misspelt with a password", lambda: load_path("http:/user:S3CRET@host/x"), ""),
    Case("path with a signature", lambda: load_path("http://127.0.0.1:9/x?sig=S3CRET"), ""),
    Case("path of a device", lambda: load_path("/dev/zero"), "path|director"),
    Case("model card of 60 kB", lambda: get("/v1/models/" + "a" * 60_000), "", GONE),
    Case("model card of a line", lambda: get("/v1/models/" + quote("a\nb")), "", GONE),
    Case("adapter of a line", lambda: get("/v1/adapters/" + quote("a\n\x1bb")), "", GONE),
    Case("adapter of no UTF-8", lambda: get("/v1/adapters/%ff%fe"), "", GONE),
    Case("unknown path", lambda: get("/" + "a" * 50_000), "", MISSING),
    Case("rid of 1 MB", lambda: generate(fields={"rid": "r" * 2**20}, n=32), "rid"),
    Case("rid of 16 MB", lambda: generate(fields={"rid": "r" * 2**24}), "rid"),
    Case("rid of a line", lambda: generate(fields={"rid": "a\nb\x1b"}), "rid", EITHER),
    Case("rids of 1 MB", lambda: generate(["a"] * 8, {"rid": ["r" * 2**20] * 8}), "rid"),
    Case("abort of 16 MB", lambda: post("/abort_request", {"rid": "r" * 2**24}), "", EITHER),
    Case("abort of a surrogate", lambda: post("/abort_request", {"rid": "\ud800"}), "", EITHER),
]

VLLM = {"lora_name": "a." * 100_000, "lora_path": "a." * 100_000}


def unload(name: str) -> Call:
    return post("/unload_lora_adapter", {"lora_name": name})


def load_path(path: str) -> Call:
    return post("/load_lora_adapter", {"lora_name": "stranger", "lora_path": path})
