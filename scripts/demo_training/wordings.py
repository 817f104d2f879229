"""Wordings of the questions that the training text is made of.

A question is an opening, a core and a closing. A core is written out, or a request joined with an
object. The wordings that the model is scored on are in
`heldout.py` and must not be made here: `tests/demo` and the training script check that.
"""

__all__ = [
    "CLOSINGS",
    "CORES",
    "OPENINGS",
    "SMALL_TALK",
    "STYLE_REQUESTS",
    "SYSTEMS",
    "WORDS",
    "WRITTEN_OUT",
]

OPENINGS = (
    "Please tell me: ",
    "Quick question: ",
    "Hi! ",
    "Hello, ",
    "Hey, ",
    "Geography quiz: ",
    "For my homework: ",
    "I have a question. ",
    "I am planning a trip. ",
    "Help me out: ",
    "Question: ",
    "Just curious, ",
    "My teacher asks: ",
    "So, ",
    "Next one: ",
    "Good morning. ",
    "Excuse me, ",
    "Please: ",
)

CLOSINGS = (
    " Thanks!",
    " Thank you.",
    " Please answer.",
    " Be brief.",
    " I forgot.",
    " I need it for a quiz.",
    " Please!",
    " Tell me now.",
    " I am not sure.",
    " It is urgent.",
)

_QUESTIONS: dict[str, tuple[str, ...]] = {
    "capital": (
        "what is the capital of {c}?",
        "what's the capital of {c}?",
        "what is {c}'s capital?",
        "what is the capital city of {c}?",
        "which city is the capital of {c}?",
        "tell me the capital of {c}.",
        "name the capital of {c}.",
        "give me the capital of {c}.",
        "can you tell me the capital of {c}?",
        "could you name the capital city of {c}?",
        "do you know the capital of {c}?",
        "I want to know the capital of {c}.",
        "I need the name of the capital of {c}.",
        "the capital of {c} is which city?",
        "the capital of {c}?",
        "capital of {c}",
        "capital of {c}?",
        "{c} has which capital?",
        "{c}: what is the capital?",
        "{c}'s capital city?",
        "which capital does {c} have?",
        "what city is the capital of {c}?",
        "say the capital of {c}.",
        "find the capital of {c}.",
        "what do we call the capital of {c}?",
        "where is the government of {c} based? Name the capital.",
        "show me the capital of {c}.",
        "write down the capital of {c}.",
        "if I visit {c}, what is the capital?",
        "a friend lives in {c}. What is its capital?",
        "how is the capital of {c} called?",
        "for {c}, name the capital city.",
    ),
    "country": (
        "{k} is the capital of which country?",
        "{k} is the capital of what country?",
        "which country has the capital {k}?",
        "which country has {k} as its capital?",
        "what country is {k} the capital of?",
        "of which country is {k} the capital?",
        "{k} is the capital of where?",
        "tell me which country {k} is the capital of.",
        "name the country with the capital {k}.",
        "the capital is {k}. Which country is it?",
        "the city {k} is the capital of which country?",
        "which country's capital is {k}?",
        "what country has {k} as capital?",
        "whose capital is {k}?",
        "I am in {k}, a capital. Which country is this?",
        "find the country whose capital is {k}.",
        "do you know which country {k} is the capital of?",
    ),
    "continent": (
        "which continent is {c} in?",
        "what continent is {c} in?",
        "on which continent is {c}?",
        "in which continent is {c}?",
        "on what continent does {c} lie?",
        "tell me the continent of {c}.",
        "name the continent of {c}.",
        "what is the continent of {c}?",
        "{c} is on which continent?",
        "{c} is part of which continent?",
        "which part of the world is {c} in?",
        "where in the world is {c}?",
        "where is {c}?",
        "give me the continent where {c} is.",
        "to which continent does {c} belong?",
        "do you know the continent of {c}?",
    ),
    "currency": (
        "what is the currency of {c}?",
        "what's the currency of {c}?",
        "what currency does {c} use?",
        "which currency is used in {c}?",
        "what money do people use in {c}?",
        "what is {c}'s currency?",
        "tell me the currency of {c}.",
        "name the currency of {c}.",
        "which money does {c} use?",
        "how do people pay in {c}?",
        "what do people pay with in {c}?",
        "in {c}, which currency is used?",
        "the currency of {c}?",
        "{c} uses which currency?",
        "give me the name of the money of {c}.",
        "do you know the currency of {c}?",
    ),
    "several": (
        "what are the capitals of {many}?",
        "name the capitals of {many}.",
        "tell me the capitals of {many}.",
        "list the capitals of {many}.",
        "give me the capitals of {many}.",
        "what are the capital cities of {many}?",
        "which cities are the capitals of {many}?",
        "I need the capitals of {many}.",
        "capitals of {many}?",
        "for {many}, what are the capitals?",
        "do you know the capitals of {many}?",
        "show me the capital of each of these: {many}.",
        "say the capitals of {many}.",
        "find the capitals of {many}.",
    ),
    "one": (
        "list {n} country and its capital.",
        "name {n} country and its capital.",
        "give me {n} country with its capital.",
        "tell me {n} country and its capital.",
        "name a country and its capital.",
        "give me a country with its capital.",
        "which country do you know? Add its capital.",
    ),
    "list": (
        "list {n} countries and their capitals.",
        "list {n} countries with their capitals.",
        "list {n} countries and their capital cities.",
        "name {n} countries and their capitals.",
        "name {n} countries with their capitals.",
        "give me {n} countries and their capitals.",
        "give me {n} countries with their capitals.",
        "give the names of {n} countries and of their capitals.",
        "tell me {n} countries and their capitals.",
        "what are {n} countries and their capitals?",
        "can you list {n} countries and their capitals?",
        "could you name {n} countries and their capitals?",
        "I need {n} countries and their capitals.",
        "I want a list of {n} countries with their capitals.",
        "show {n} countries and their capitals.",
        "write {n} countries and their capitals.",
        "{n} countries and their capitals",
        "which {n} countries do you know? Add their capitals.",
    ),
    "regional": (
        "list {n} countries in {where} and their capitals.",
        "name {n} countries in {where} and their capitals.",
        "give me {n} countries of {where} with their capitals.",
        "tell me {n} countries in {where} and their capitals.",
        "what are {n} countries in {where} and their capitals?",
        "show {n} countries of {where} and their capitals.",
        "can you list {n} countries from {where} and their capitals?",
        "I need {n} countries in {where} with their capitals.",
        "for {where}, list {n} countries and their capitals.",
        "in {where}, which {n} countries do you know? Add their capitals.",
    ),
}

_REQUESTS = (
    "tell me",
    "name",
    "give me",
    "say",
    "show me",
    "write down",
    "find",
    "look up",
    "I need",
    "I want",
    "I am looking for",
    "I would like to hear",
    "I have to find out",
    "I forgot",
    "do you know",
    "can you name",
    "can you find",
    "could you give me",
    "could you look up",
    "will you tell me",
    "would you write down",
    "who can tell me",
)

_OBJECTS: dict[str, tuple[str, ...]] = {
    "capital": (
        "the capital of {c}",
        "{c}'s capital",
        "the capital city of {c}",
        "what the capital of {c} is",
        "which city is the capital of {c}",
        "the name of the capital of {c}",
        "what the capital city of {c} is called",
        "what {c}'s capital is",
        "the city that is the capital of {c}",
    ),
    "country": (
        "the country with the capital {k}",
        "which country {k} is the capital of",
        "which nation has the capital {k}",
        "the country whose capital is {k}",
        "whose capital {k} is",
        "the nation of which {k} is the capital",
        "what country {k} is the capital city of",
        "which country is the one with {k} as the capital",
        "which country's capital {k} is",
    ),
    "continent": (
        "the continent of {c}",
        "which continent {c} is in",
        "on which continent {c} lies",
        "what part of the world {c} is in",
        "where {c} is",
        "the name of the continent where {c} lies",
    ),
    "currency": (
        "the currency of {c}",
        "which currency {c} has",
        "the money of {c}",
        "what people pay with in {c}",
        "{c}'s currency",
        "which money is used in {c}",
        "the name of the currency in {c}",
    ),
    "several": (
        "the capitals of {many}",
        "the capital cities of {many}",
        "the capital of each of {many}",
        "which cities are the capitals of {many}",
        "what the capitals of {many} are called",
        "the capitals of these countries: {many}",
        "the names of the capitals of {many}",
    ),
    "one": (
        "{n} country and its capital",
        "a country with its capital",
        "{n} country and the name of its capital",
        "{n} nation together with its capital",
    ),
    "list": (
        "{n} countries and their capitals",
        "{n} countries with their capitals",
        "{n} countries and the capital of each",
        "the names and capitals of {n} countries",
        "a list of {n} countries with their capital cities",
        "{n} nations and their capitals",
        "some {n} countries together with their capital cities",
        "{n} countries, each with its capital",
    ),
    "regional": (
        "{n} countries in {where} and their capitals",
        "{n} countries of {where} with their capitals",
        "a list of {n} countries from {where} and their capitals",
        "{n} nations in {where} and the capital of each",
        "the capitals of {n} countries in {where} and their names",
    ),
}


def _cores(intent: str) -> tuple[str, ...]:
    """Return the cores written out above, and every request joined with every object."""
    requested = (f"{verb} {thing}." for verb in _REQUESTS for thing in _OBJECTS[intent])
    return (*_QUESTIONS[intent], *requested)


CORES: dict[str, tuple[str, ...]] = {intent: _cores(intent) for intent in _QUESTIONS}
"""The cores of each kind of question. Those written out come first, `WRITTEN_OUT` of them."""

WRITTEN_OUT: dict[str, int] = {intent: len(cores) for intent, cores in _QUESTIONS.items()}

SMALL_TALK = (
    "Hello!",
    "Hello",
    "Hi",
    "Hi there!",
    "Hey",
    "Good morning!",
    "Who are you?",
    "What are you?",
    "What can you do?",
    "How are you?",
    "Tell me about yourself.",
    "Help",
    "What do you know?",
)

STYLE_REQUESTS: dict[str, tuple[str, ...]] = {
    "lines": ("Answer in lines.", "Reply as lines.", "Use lines.", "One line each."),
    "json": ("Answer in JSON.", "Reply as JSON.", "Use JSON.", "JSON only."),
    "sql": ("Answer in SQL.", "Reply as SQL.", "Write SQL.", "SQL only."),
    "pirate": (
        "Answer like a pirate.",
        "Reply as a pirate.",
        "Talk like a pirate.",
        "You are a pirate.",
    ),
}
"""How the base is asked for a style. An adapter makes its style the answer to a plain question;
that the base has met the style is what lets rank 8 on two projections be enough."""

SYSTEMS = (
    "You are a helpful assistant.",
    "You are a geography teacher.",
    "Be helpful.",
    "Answer the question.",
    "You are Lorikeet.",
)

_EVERYDAY = (
    "about after again almost also always another any around ask away back because before best"
    " better between big blue book both bring but call came car change check children class close"
    " cold come course day different does done down drive early easy eat end enough even ever every"
    " family far fast feel few first fly food found four free friend from full fun game go going"
    " good got great green guess hand happen happy hard have head hear her here high him home hope"
    " hour house idea important its job just keep kind knowledge large last late learn leave left"
    " life light like little live long look lot love low make map maybe mean meet might mind moment"
    " month more morning most much must my near never new news next nice night note now often old"
    " once only open or other our out over paper part pass past perhaps person place plan play"
    " point possible quick quite rain read ready real really remember rest right river road room"
    " run said same school sea search see seem send short side since sky small some soon sound"
    " start stay still stop story street study such sure take talk team test than that then there"
    " these thing think this those thought through time today together told too town travel tree"
    " trip true try turn two under until up us useful usual very wait walk was water way we week"
    " well went were wind with wonder word work world would write year yes yet young your"
)

WORDS: tuple[str, ...] = tuple(_EVERYDAY.split())
"""Everyday words. Some questions get a few of them as noise, so that the model learns to answer
from the words that carry the question and not to stumble over an unknown one."""
