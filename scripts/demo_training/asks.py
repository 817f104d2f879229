"""What can be asked about the facts, apart from how it is worded and how it is answered."""

from dataclasses import dataclass

from demo_training.facts import Country

__all__ = ["INTENTS", "NUMBER_WORDS", "Ask", "fill"]

INTENTS = ("capital", "country", "continent", "currency", "several", "one", "list", "regional")
"""The kinds of question: four about one country, `several` about named countries, and three kinds
of list: of a single country, of several, and of several in one continent."""

NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five")


@dataclass(frozen=True, slots=True)
class Ask:
    """One question's meaning.

    `countries` are those the answer speaks of, in its order; `continent` is set for a list that
    is limited to one.
    """

    intent: str
    countries: tuple[Country, ...]
    continent: str | None = None


def fill(wording: str, ask: Ask, *, spell_number: bool = False) -> str:
    """Put the names of `ask` into a wording.

    The fields of a wording are {c} a country inside a sentence, {k} its capital, {many} several
    countries, {n} how many, {where} a continent. The first letter becomes a capital, because a
    wording may start with a field.
    """
    count = len(ask.countries)
    names = [country.called for country in ask.countries]
    text = wording.format(
        c=names[0],
        k=ask.countries[0].capital,
        many=", ".join(names[:-1]) + " and " + names[-1] if count > 1 else names[0],
        n=NUMBER_WORDS[count] if spell_number else str(count),
        where=ask.continent or "",
    )
    return text[0].upper() + text[1:]
