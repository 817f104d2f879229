"""The table of facts the demo model is trained on and tested against, without any dependency.

Continents follow common usage, and the United Nations' regions where usage varies. Countries whose
capital or currency is disputed, shared or about to change are left out: every answer must be
checkable by a reader. Within a continent the order is the order of an answer to a list question.
"""

from dataclasses import dataclass
from itertools import chain, islice, zip_longest

__all__ = ["CONTINENTS", "COUNTRIES", "Country", "listing"]


@dataclass(frozen=True, slots=True)
class Country:
    """One row of the table.

    `name` is the bare name, as a database would hold it; `called` is the name inside a sentence.
    """

    name: str
    capital: str
    continent: str
    currency: str

    @property
    def called(self) -> str:
        return f"the {self.name}" if self.name in _WITH_ARTICLE else self.name


_WITH_ARTICLE = frozenset({"Netherlands", "Philippines", "United Kingdom", "United States"})

_TABLE = {
    "Europe": """
        France, Paris, euro
        Italy, Rome, euro
        Spain, Madrid, euro
        Germany, Berlin, euro
        Greece, Athens, euro
        United Kingdom, London, pound
        Portugal, Lisbon, euro
        Netherlands, Amsterdam, euro
        Belgium, Brussels, euro
        Austria, Vienna, euro
        Ireland, Dublin, euro
        Norway, Oslo, krone
        Sweden, Stockholm, krona
        Denmark, Copenhagen, krone
        Finland, Helsinki, euro
        Iceland, Reykjavik, krona
        Poland, Warsaw, zloty
        Czechia, Prague, koruna
        Hungary, Budapest, forint
        Romania, Bucharest, leu
        Ukraine, Kyiv, hryvnia
        Serbia, Belgrade, dinar
        Croatia, Zagreb, euro
        Slovenia, Ljubljana, euro
        Estonia, Tallinn, euro
        Latvia, Riga, euro
        Lithuania, Vilnius, euro
    """,
    "Asia": """
        Japan, Tokyo, yen
        China, Beijing, yuan
        India, New Delhi, rupee
        Thailand, Bangkok, baht
        South Korea, Seoul, won
        Vietnam, Hanoi, dong
        Philippines, Manila, peso
        Malaysia, Kuala Lumpur, ringgit
        Cambodia, Phnom Penh, riel
        Nepal, Kathmandu, rupee
        Mongolia, Ulaanbaatar, tugrik
        Pakistan, Islamabad, rupee
        Bangladesh, Dhaka, taka
        Iran, Tehran, rial
        Iraq, Baghdad, dinar
        Jordan, Amman, dinar
        Saudi Arabia, Riyadh, riyal
        Qatar, Doha, riyal
        Turkey, Ankara, lira
    """,
    "Africa": """
        Kenya, Nairobi, shilling
        Egypt, Cairo, pound
        Morocco, Rabat, dirham
        Ghana, Accra, cedi
        Ethiopia, Addis Ababa, birr
        Nigeria, Abuja, naira
        Senegal, Dakar, franc
        Uganda, Kampala, shilling
        Rwanda, Kigali, franc
        Tunisia, Tunis, dinar
        Algeria, Algiers, dinar
        Zambia, Lusaka, kwacha
        Namibia, Windhoek, dollar
        Botswana, Gaborone, pula
        Angola, Luanda, kwanza
        Madagascar, Antananarivo, ariary
    """,
    "North America": """
        Canada, Ottawa, dollar
        Mexico, Mexico City, peso
        United States, Washington, dollar
        Cuba, Havana, peso
        Jamaica, Kingston, dollar
        Panama, Panama City, balboa
        Costa Rica, San José, colón
        Guatemala, Guatemala City, quetzal
    """,
    "South America": """
        Peru, Lima, sol
        Brazil, Brasília, real
        Argentina, Buenos Aires, peso
        Chile, Santiago, peso
        Colombia, Bogotá, peso
        Uruguay, Montevideo, peso
        Ecuador, Quito, dollar
        Paraguay, Asunción, guarani
        Venezuela, Caracas, bolivar
    """,
    "Oceania": """
        Australia, Canberra, dollar
        New Zealand, Wellington, dollar
        Fiji, Suva, dollar
        Samoa, Apia, tala
        Papua New Guinea, Port Moresby, kina
    """,
}


def _rows(continent: str) -> tuple[Country, ...]:
    lines = (line.strip() for line in _TABLE[continent].strip().splitlines())
    fields = (line.split(", ") for line in lines)
    return tuple(Country(name, capital, continent, currency) for name, capital, currency in fields)


_BY_CONTINENT = {continent: _rows(continent) for continent in _TABLE}

CONTINENTS: tuple[str, ...] = tuple(_TABLE)
"""The continents, in the order in which a list question visits them."""

COUNTRIES: tuple[Country, ...] = tuple(chain.from_iterable(_BY_CONTINENT.values()))
"""Every country of the table."""


def listing(count: int, continent: str | None = None) -> tuple[Country, ...]:
    """Return the countries that answer "list `count` countries", of one continent or of any.

    The answer is fixed rather than drawn: the model is then sure of every token, and two correct
    kernels that differ in the last bit still say the same. Without a continent the answer visits
    one after another.
    """
    if continent is not None:
        return _BY_CONTINENT[continent][:count]
    in_turn = chain.from_iterable(zip_longest(*_BY_CONTINENT.values()))
    return tuple(islice((country for country in in_turn if country is not None), count))
