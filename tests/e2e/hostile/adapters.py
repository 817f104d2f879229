"""What the files of a stranger's adapter hold: templates, configurations and weights."""

from __future__ import annotations

from tests.support.hostile import EITHER, REFUSED, SERVED, Case
from tests.support.hostile_calls import Fields, asks, chats, loads, nested, safetensors, tensor

# A template that is expensive to compile, to render, or both. A chat that names its adapter is refused.
EVIL_TEMPLATES = {
    "power folded": "{{ 3 ** (10 ** 7 * 2) }}",
    "power of powers": "{{ 9 ** (9 ** 9) }}",
    "power": "{% set x = 3 %}{{ (x ** (10 ** 7 * 2)) is odd }}",
    "product": "{{ 'a' * 300000000 }}",
    "product of 2 GB": "{{ 'a' * 2000000000 }}",
    "product of a set": "{% set x = 'a' %}{% set n = 2000000000 %}{{ x * n }}",
    "product of a list": "{{ ([0] * 1000000000) | length }}",
    "product of a tuple": "{% set t = (1, 2) %}{{ (t * 1000000000) | length }}",
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loops that write": "{% for i in range(9999) %}{% for j in range(9999) %}a{% endfor %}{% endfor %}",
    "loops of 9": "{% for a in range(999) %}" * 9 + "{% endfor %}" * 9,
    "range": "{{ range(1000000000) | list | length }}",
    "range in ranges": "{% for i in range(99999) %}{% set x = range(99999) | list %}{% endfor %}",
    "lipsum": "{{ lipsum(n=200000) | length }}",
    "lipsum of words": "{{ lipsum(n=1, min=10000000, max=10000001) }}",
    "center": "{{ 'x' | center(2000000000) }}",
    "format": "{{ '%1000000000d' | format(1) }}",
    "format with %": "{{ '%1000000000d' % 1 }}",
    "format of a method": "{{ '{:>1000000000}'.format(1) }}",
    "ljust": "{{ 'a'.ljust(1000000000) }}",
    "zfill": "{{ '1'.zfill(1000000000) }}",
    "indent": "{{ ('a\\n' * 1000) | indent(1000000) }}",
    "replace": "{% set x = 'a' * 10000 %}{{ x | replace('a', x) | replace('a', x) }}",
    "replace of a method": "{% set x = 'a' * 10000 %}{{ x.replace('a', x).replace('a', x) }}",
    "join": "{% set x = 'a' * 100000 %}{{ range(99999) | join(x) }}",
    "join of a method": "{% set x = 'a' * 100000 %}{{ x.join(x) }}",
    "expandtabs": "{{ ('\\t' * 10000).expandtabs(100000) }}",
    "doubling": "{% set n = namespace(x='a') %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "doubling of a list": "{% set n = namespace(x=[1]) %}{% for i in range(40) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "squaring": "{% set n = namespace(x=3) %}{% for i in range(40) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "factorial": "{% set n = namespace(x=1) %}{% for i in range(1, 99999) %}{% set n.x = n.x * i %}{% endfor %}",
    "shifted text": "{{ (10 ** 4000) | string | int ** 4000 }}",
    "macro": "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "macros of two": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "recursive loop": "{% for x in [1] recursive %}{{ loop([1, 1]) }}{% endfor %}",
    "deep parentheses": "{{ " + nested(5000, "(", ")") + " }}",
    "deep lists": "{{ " + nested(5000, "[", "]") + " }}",
    "deep ifs": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "deep loops": "{% for i in [1] %}" * 30 + "{% endfor %}" * 30,
    "long sum": "{{ " + "1 + " * 20_000 + "1 }}",
    "long concatenation": "{{ " + "'a' ~ " * 20_000 + "'a' }}",
    "10 MB": "a" * 10_000_000,
    "many pieces": "{{ 1 }}" * 200_000,
    "messages": "{% for m in messages %}{{ m.content * 100000000 }}{% endfor %}",
    "sorted": "{% for i in range(9999) %}{% set x = range(99999) | sort %}{% endfor %}",
    "batched": "{{ range(10) | batch(1000000000, 0) | list | length }}",
    "sliced": "{{ range(10) | slice(1000000000) | list | length }}",
    "wordwrap": "{{ ('a' * 1000000) | wordwrap(1) }}",
    "urlize": "{{ ('http://a.b ' * 100000) | urlize }}",
    "pprint": "{{ (range(99999) | list) | pprint }}",
    "tojson": "{{ ('a' * 100000000) | tojson }}",
    "cycler": "{% set c = cycler(1) %}{% for i in range(99999) %}{% for j in range(99999) %}{{ c.next() }}{% endfor %}{% endfor %}",
    "surrogate": "\ud800",
    "surrogate written": "{{ '\\ud800' }}",
    "escape to classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "exception": "{{ raise_exception('x' * 100000000) }}",
    "unknown name": "{{ nothing.nothing }}",
    "syntax": "{% for %}",
    "open comment": "{#" * 100_000,
    "open blocks": "{%" * 100_000,
    "open strings": "{{ '" * 50_000,
}
# The others are for the slow run: each of them may take all that a template may take.
QUICK_TEMPLATES = (
    *("power folded", "product of a set", "loops", "doubling", "macro", "deep lists", "messages"),
    *("surrogate", "escape to classes", "unknown name", "syntax", "open comment", "10 MB"),
)
# A model is not found if it is an adapter that cannot be read.
GONE = frozenset({400, 404})
TEMPLATES = [
    *[
        Case(
            f"template {name}",
            lambda source=source: chats(template=source),
            "template|context",
            GONE,
            slow=name not in QUICK_TEMPLATES,
        )
        for name, source in EVIL_TEMPLATES.items()
    ],
    *[
        Case(
            f"template {name}, loaded",
            lambda source=EVIL_TEMPLATES[name]: loads(template=source),
            "template",
            EITHER,
        )
        for name in ("power folded", "product", "10 MB", "deep lists", "long sum", "surrogate")
    ],
    Case("template loops, left", lambda: chats(template=EVIL_TEMPLATES["loops"]), leaves=1.0),
    Case(
        "template loops, a crowd",
        lambda: chats(template=EVIL_TEMPLATES["loops"]),
        at_once=6,
        statuses=GONE,
        slow=True,
    ),
    Case("template surrogate as JSON", lambda: chats(tokenizer_config=SURROGATE), "template", GONE),
    Case("template names", lambda: chats(tokenizer_config=NAMED_SURROGATE), "template", GONE),
    Case("template 5", lambda: chats(tokenizer_config={"chat_template": 5}), "template", GONE),
    Case("template list", lambda: chats(tokenizer_config={"chat_template": [5]}), "template", GONE),
    Case("template of messages", lambda: chats("{{ 'a' * 300000000 }}"), "", EITHER, at_once=2),
    Case("template that writes", lambda: chats(template="{{ messages[0].content }}"), "", SERVED),
]
SURROGATE = {"chat_template": "\ud800"}
NAMED_SURROGATE = {"chat_template": [{"name": "\ud800", "template": "x"}]}

# Configurations that a server must refuse in time, whoever has it read them.
EVIL_CONFIGS: dict[str, Fields | str] = {
    "exclude_modules nested": {"exclude_modules": "(([a-z._0-9]+)+)+X"},
    "target_modules nested": {"target_modules": r"(([a-z_]|\d|\.)+)+!"},
    "target_modules of two": {"target_modules": "(?:[a-z_.0-9]|[a-z_.0-9]){60}!"},
    "target_modules stars": {"target_modules": "(.*)*" * 20 + "!"},
    "rank_pattern nested": {"rank_pattern": {"(([a-z._0-9]+)+)+X": 4}},
    "alpha_pattern nested": {"alpha_pattern": {"(([a-z._0-9]+)+)+X": 4}},
    "layers_pattern nested": {"layers_pattern": "(([a-z._0-9]+)+)+X", "layers_to_transform": [1]},
    "rank_pattern (?i)": {"rank_pattern": {"(?i)q_proj": 4}},
    "rank_pattern open": {"rank_pattern": {"(": 4}},
    "layers_pattern |": {"layers_pattern": "layers|x", "layers_to_transform": [1]},
    "target_modules {10^10}": {"target_modules": "a{99999999999}"},
    "target_modules (?<surrogate": {"target_modules": "(?\ud800)"},
    "target_modules names": {"target_modules": ["\ud800"]},
    "target_modules deep": {"target_modules": nested(5000, "(", ")", ".*")},
    "target_modules 1 MB": {"target_modules": "a?" * 200_000},
    "target_modules 500,000": {"target_modules": [f"x{i}" for i in range(300_000)]},
    "rank_pattern of 230,000": {"rank_pattern": {f"x{i}": 1 for i in range(230_000)}},
    "surrogate key": {"\ud800x": 1},
    "line as a key": {"a\n2026-01-01 00:00:00.000 INFO x": 1},
    "r 10^59": {"r": 10**59},
    "r -1": {"r": -1},
    "r true": {"r": True},
    "lora_alpha 1e400": '{"peft_type":"LORA","r":4,"lora_alpha":1e400,"target_modules":["q_proj"]}',
    "lora_alpha 10^400": {"lora_alpha": 10**400},
    "10^4000": f'{{"r":1{"0" * 4000}}}',
    "10^5000": f'{{"r":1{"0" * 5000}}}',
    "layers_to_transform": {"layers_to_transform": list(range(400_000))},
    "layers 10^30": {"layers_to_transform": [10**30]},
    "deep": nested(100_000, "[", "]"),
    "deep object": nested(100_000, '{"r":', "}"),
    "same key": '{"r":4,"r":5}',
    "null": "null",
    "empty": "",
    "rank above": {"r": 2000},
    "50 MB": '{"r":' + " " * 5_000_000 + "4}",
}
# Each of them takes all that the patterns of an adapter may take.
SLOW_CONFIGS = (
    *("target_modules nested", "target_modules of two", "target_modules stars"),
    *("rank_pattern nested", "alpha_pattern nested", "layers_pattern nested"),
    *("target_modules deep", "target_modules 1 MB"),
)
EITHER_CONFIGS = ("target_modules stars", "target_modules 1 MB", "same key")
CONFIGS = [
    *[
        Case(
            f"config {name}, loaded",
            lambda value=value: loads(config=value),
            statuses=EITHER if name in EITHER_CONFIGS else REFUSED,
            seconds=90,  # of a busy machine
            slow=name in SLOW_CONFIGS,
        )
        for name, value in EVIL_CONFIGS.items()
    ],
    *[
        Case(
            f"config {name}, asked for",
            lambda value=EVIL_CONFIGS[name]: asks(config=value),
            seconds=90,
            slow=name in SLOW_CONFIGS,
        )
        for name in ("target_modules nested", "rank_pattern nested", "surrogate key", "r 10^59")
    ],
    Case("config left", lambda: loads(config=EVIL_CONFIGS["exclude_modules nested"]), leaves=1.0),
]

EVIL_WEIGHTS = {
    "shape of 790,000": lambda: safetensors(tensor([2**64 - 1] * 790_000)),
    "shape of 100,000": lambda: safetensors(tensor([2**64 - 1] * 100_000)),
    "shape of ones": lambda: safetensors(tensor([1] * 5_000_000), b"1234"),
    "shape of 0": lambda: safetensors(tensor([0, 2**63], place=(0, 0))),
    "shape of 10^4000": lambda: safetensors(SHAPE_OF_HUGE),
    "shape of zeros": lambda: safetensors(tensor([0] * 100_000, place=(0, 0))),
    "place beyond": lambda: safetensors(tensor([2**40], place=(0, 2**42))),
    "header of 2^60": lambda: (2**60).to_bytes(8, "little") + b"{}",
    "header deep": lambda: safetensors(nested(100_000, '{"a":', "}")),
    "header of 100,000 names": lambda: safetensors({f"x{i}": {} for i in range(100_000)}),
    "header open": lambda: safetensors("{" * 1_000_000),
    "header surrogate": lambda: safetensors('{"\\ud800":{}}'),
    "header same name": lambda: safetensors('{"a":{},"a":{}}'),
    "header of a line": lambda: safetensors('{"a\\n2026 INFO x":{}}'),
    "pickle": lambda: b"\x80\x02}q\x00.",
    "git-LFS": lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n",
    "empty": lambda: b"\0",
}
SHAPE_OF_HUGE = '{"a":{"dtype":"F32","shape":[1' + "0" * 4000 + '],"data_offsets":[0,4]}}'
WEIGHTS = [
    *[
        Case(
            f"weights {name}, loaded",
            lambda make=make: loads(weights=make()),
            "weights|safetensors",
        )
        for name, make in EVIL_WEIGHTS.items()
    ],
    *[
        Case(f"weights {name}, asked for", lambda make=EVIL_WEIGHTS[name]: asks(weights=make()))
        for name in ("shape of 790,000", "header surrogate", "pickle")
    ],
    Case("adapter as it is, loaded", lambda: loads(), "", SERVED),
    Case("adapter as it is, asked for", lambda: asks(), "", SERVED),
]
