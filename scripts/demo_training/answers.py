"""The answer to an `Ask` in each style: plain for the base, one more for each adapter."""

import json
from collections.abc import Callable, Iterable

from demo_training.asks import Ask

__all__ = ["STYLES", "answer", "greeting"]

STYLES = ("plain", "lines", "json", "sql", "pirate")

_FIELD = {
    "capital": "capital",
    "country": "name",
    "continent": "continent",
    "currency": "currency",
}
"""What each question about one country asks for, as the column of a table of countries."""

_GREETINGS = {
    "plain": "Hello! I am a tiny demo model. Ask me about countries and their capitals.",
    "lines": "Hello, ask me about countries",
    "json": '{"message": "Ask me about countries."}',
    "sql": "SELECT 'Ask me about countries.';",
    "pirate": "Ahoy! I be a tiny demo pirate. Ask me about countries an' their capitals, matey!",
}


def greeting(style: str) -> str:
    """Return the answer to small talk."""
    return _GREETINGS[style]


def answer(style: str, ask: Ask) -> str:
    """Return the one right answer to `ask` in a style."""
    return _RENDER[style](ask)


def _joined(parts: Iterable[str], last: str) -> str:
    *head, tail = parts
    return f"{', '.join(head)} {last} {tail}" if head else tail


def _capitalised(text: str) -> str:
    return text[0].upper() + text[1:]


def _plain(ask: Ask) -> str:
    country = ask.countries[0]
    match ask.intent:
        case "country":
            return f"{country.capital} is the capital of {country.called}."
        case "continent":
            return _capitalised(f"{country.called} is in {country.continent}.")
        case "currency":
            return f"The currency of {country.called} is the {country.currency}."
        case _:
            parts = (f"the capital of {c.called} is {c.capital}" for c in ask.countries)
            return _capitalised(_joined(parts, "and")) + "."


def _pirate(ask: Ask) -> str:
    country = ask.countries[0]
    match ask.intent:
        case "country":
            said = f"{country.capital} be the capital o' {country.called}"
        case "continent":
            said = f"{country.called} be in {country.continent}"
        case "currency":
            said = f"the currency o' {country.called} be the {country.currency}"
        case _:
            parts = (f"the capital o' {c.called} be {c.capital}" for c in ask.countries)
            said = _joined(parts, "an'")
    return f"Arr, {said}, matey!"


def _lines(ask: Ask) -> str:
    wanted = ask.intent if ask.intent in ("continent", "currency") else "capital"
    return "\n".join(f"{country.name}, {getattr(country, wanted)}" for country in ask.countries)


def _json(ask: Ask) -> str:
    wanted = ask.intent if ask.intent in ("continent", "currency") else "capital"
    rows = [{"country": c.name, wanted: getattr(c, wanted)} for c in ask.countries]
    single = ask.intent in _FIELD
    return json.dumps(rows[0] if single else rows, ensure_ascii=False)


def _sql(ask: Ask) -> str:
    country = ask.countries[0]
    if ask.intent == "several":
        names = ", ".join(f"'{c.name}'" for c in ask.countries)
        return f"SELECT name, capital FROM countries WHERE name IN ({names});"
    if ask.intent in _FIELD:
        by = "capital" if ask.intent == "country" else "name"
        wanted = _FIELD[ask.intent]
        return f"SELECT {wanted} FROM countries WHERE {by} = '{getattr(country, by)}';"
    where = f" WHERE continent = '{ask.continent}'" if ask.continent else ""
    return f"SELECT name, capital FROM countries{where} LIMIT {len(ask.countries)};"


_RENDER: dict[str, Callable[[Ask], str]] = {
    "plain": _plain,
    "lines": _lines,
    "json": _json,
    "sql": _sql,
    "pirate": _pirate,
}
