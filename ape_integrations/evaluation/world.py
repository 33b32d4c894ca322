"""A seeded synthetic world: short documents, questions about them, and pipelines' prompts.

The demo model is trained on this world and evaluated on its held-out part: people, companies,
products and events whose two-word names never occur in training. Facts are drawn anew for every
prompt, so that nothing can be answered from memory; the documents have to be read.

The prompts are those that LlamaIndex and LangChain pipelines build, with the documents joined by
a blank line. :class:`Prompt` keeps prefix, contexts and query apart, so that one task can be run
sequentially or with any kind of parallel encoding.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any


def _split(words: str) -> list[str]:
    return words.split()


SEPARATOR = "\n\n"
REFUSAL = "the context does not say."
HELD_OUT_SHARE = 8  # one name combination in eight is never trained on

FIRST_NAMES = _split(
    "Ada Abel Agnes Aldo Alma Amir Anika Anton Arlo Astrid Bela Berta Bo Boris Bruno Carla Cato "
    "Celia Clara Cyril Dario Delia Dina Dora Edgar Edith Elias Ella Elmo Emil Enzo Erik Esme "
    "Eva Fabian Felix Fiona Flora Frida Gaston Gerda Gilda Greta Gustav Hanna Hector Heidi "
    "Helga Hugo Ida Igor Ilse Ines Irma Ivan Ivo Jana Jarek Jonas Judith Julius Karim Karla "
    "Kasper Klara Knut Lars Laura Leif Lena Leo Linus Livia Lorenz Lotte Luca Magda Malik Marek "
    "Marta Matilda Maya Milan Mina Mira Moritz Nadia Nils Nina Noah Nora Olaf Olga Oskar Otto "
    "Paula Pavel Petra Quentin Rafael Ravi Rita Rolf Rosa Ruben Runa Samir Selma Silas Sonja "
    "Stefan Tamar Tessa Theo Tilda Tomas Ulla Uma Vera Viktor Wanda Yara Yusuf Zora"
)
LAST_NAMES = _split(
    "Abend Adler Albers Amsel Arndt Bacher Barlow Becker Bellini Berg Birk Blom Bodin Brandt "
    "Brecht Brook Calder Carver Castell Conti Corbin Dahl Daley Darrow Dietz Dorn Draper Duarte "
    "Ebner Eklund Ellis Engel Esser Fabri Falk Farrow Fenn Ferro Finch Fisk Fontana Frost Gallo "
    "Garner Geller Gerber Glover Grieg Haas Hagen Hale Harper Hartig Heller Hobbs Holm Horn "
    "Ibsen Ingram Jansen Jarvis Jensen Joyner Kaiser Karr Keller Kemp Kessler Kirsch Klein "
    "Kolbe Kramer Kroll Lamont Lang Larsen Lehner Lind Lorca Lund Maddox Mahler Marsh Mercer "
    "Moreau Moss Munk Nagel Nash Neri Nolan Norris Novak Oakes Olsen Orlov Osborn Pace Palmer "
    "Parr Pasco Perrin Pike Pohl Quist Radley Ramsey Rau Reed Renn Ricci Riedel Rossi Roth Ruiz "
    "Sander Sauer Scholl Seidel Sloan Sommer Stark Storm Strand Swann Talbot Tanner Thorn Tobin "
    "Turner Ulrich Unger Vance Varga Vogel Voss Wagner Walsh Weber Wells Wexler Winter Wolf "
    "Yates Zander Ziegler"
)
CITIES = _split(
    "Aarhus Antwerp Athens Bergen Bilbao Bologna Bremen Brno Bruges Cadiz Cardiff Cork Cologne "
    "Cracow Dresden Dublin Florence Gdansk Geneva Genoa Ghent Girona Graz Hamburg Helsinki "
    "Izmir Kiel Leeds Leipzig Lisbon Ljubljana Lucerne Lyon Malmo Marseille Milano Modena "
    "Munich Nantes Naples Odense Oporto Oslo Ostrava Oulu Padua Palermo Pisa Porto Prague "
    "Ravenna Riga Rotterdam Salzburg Seville Siena Sofia Split Tallinn Tampere Tartu Toledo "
    "Trieste Turin Turku Utrecht Valencia Verona Vienna Vilnius Warsaw York Zagreb Zurich"
)
JOBS = _split(
    "actor architect baker barber botanist brewer butcher carpenter cellist chemist clerk cook "
    "dentist diver doctor editor farmer florist gardener geologist glazier guide jeweller judge "
    "lawyer librarian locksmith mason mechanic midwife miller nurse optician painter pharmacist "
    "pianist pilot plumber poet potter printer roofer sailor sculptor shepherd surgeon tailor "
    "teacher translator waiter weaver welder"
)
HOBBIES = _split(
    "archery badminton ballet birdwatching bowling boxing chess climbing cricket cycling "
    "dancing drawing embroidery fencing fishing gliding hiking judo juggling karate knitting "
    "origami photography pottery rowing running sailing skating skiing sewing surfing swimming "
    "tennis volleyball whittling yoga"
)
ANIMALS = _split(
    "beaver bear camel canary cat cow dog donkey duck falcon ferret fox goat goose hamster hare "
    "hedgehog heron horse lizard llama lynx mouse mule otter owl parrot pig pony rabbit raven "
    "sheep snake squirrel swan tortoise turkey wolf"
)
LANGUAGES = _split(
    "Arabic Basque Breton Catalan Czech Danish Dutch Estonian Finnish French Gaelic Georgian "
    "German Greek Hindi Hungarian Icelandic Italian Japanese Korean Latvian Maltese Norwegian "
    "Persian Polish Portuguese Romanian Russian Slovak Spanish Swahili Swedish Tamil Turkish "
    "Welsh"
)
GOODS = _split(
    "almonds anchors apples baskets bells bicycles blankets boats boots bread brushes buttons "
    "candles canoes carpets cheese cherries chocolate cider clocks coffee coins combs drums "
    "fans flutes furniture glass gloves guitars hats honey hops ink jam kites ladders lace "
    "leather lemons lenses linen mirrors mustard nails nets olives oranges paper pears pencils "
    "pepper pipes plums porcelain ropes saddles salt scarves seeds silk silver soap spoons "
    "stamps stoves tea tiles timber tools toys tulips umbrellas velvet vinegar violins wheels "
    "wine wool"
)
COLOURS = _split(
    "amber beige black blue brown copper green grey pink purple red teal violet white yellow"
)
MONTHS = _split(
    "January February March April May June July August September October November December"
)
RIVERS = _split(
    "Adige Aller Arno Avon Danube Douro Drava Ebro Elbe Garonne Isar Loire Main Meuse Mosel "
    "Neva Oder Rhine Rhone Sava Seine Severn Tagus Thames Tiber Vistula Weser"
)
COMPANY_STEMS = _split(
    "Altura Arbor Argent Atlas Bolt Borealis Brava Cedar Cobalt Comet Corvo Delta Ember Falcon "
    "Ferrum Flint Fulmar Halcyon Harbor Helix Iris Juniper Kestrel Lumen Magnet Marlin Meridian "
    "Monarch Nimbus Norvo Oakline Onyx Orbit Osprey Pallas Pinnacle Quarry Quill Raven Rondo "
    "Sable Sierra Solstice Summit Tandem Tern Vega Vertex Willow Zenith"
)
COMPANY_KINDS = _split(
    "Bank Brothers Crafts Dairy Foods Foundry Freight Group Holdings Labs Logistics Mills "
    "Motors Optics Partners Press Shipyard Studios Systems Textiles Trading Works"
)
PRODUCT_STEMS = _split(
    "Alto Arco Astra Bento Brio Calla Cirro Cleo Dolce Dune Echo Elan Fino Fjord Gala Gusto "
    "Halo Indigo Jolly Kappa Lago Largo Lumo Mambo Mesa Mono Nero Nova Opal Orca Pico Polo "
    "Prisma Rapid Rialto Salto Sigma Solo Tempo Terra Tinto Ultra Vento Viva Zelo Zippo"
)
PRODUCT_KINDS = _split(
    "Backpack Blender Bike Camera Chair Clock Desk Drill Heater Kettle Lamp Mixer Oven Phone "
    "Pump Radio Scooter Sofa Speaker Stove Tent Toaster Watch"
)
EVENT_STEMS = _split(
    "Autumn Bridge Castle Coastal Crystal Garden Golden Granite Harvest Island Lantern Maple "
    "Market Midnight Morning Northern Old Orchard Plaza Polar River Royal Silver Southern "
    "Spring Starlight Summer Sunset Tidal Valley Village Western"
)
EVENT_KINDS = _split(
    "Ball Carnival Concert Congress Contest Exhibition Fair Festival Forum Gala Marathon Parade "
    "Race Regatta Summit Symposium Tournament Workshop"
)
YEARS = [str(year) for year in range(1900, 2026)]
NUMBERS = [str(number) for number in [*range(2, 100), *range(100, 1000, 10)]]

PEOPLE = "person"
COMPANY, PRODUCT, EVENT, CITY = "company", "product", "event", "city"
_NAME_PARTS: dict[str, tuple[Sequence[str], Sequence[str]]] = {
    PEOPLE: (FIRST_NAMES, LAST_NAMES),
    COMPANY: (COMPANY_STEMS, COMPANY_KINDS),
    PRODUCT: (PRODUCT_STEMS, PRODUCT_KINDS),
    EVENT: (EVENT_STEMS, EVENT_KINDS),
}
_PLAIN_VALUES: dict[str, Sequence[str]] = {
    "job": JOBS,
    "hobby": HOBBIES,
    "animal": ANIMALS,
    "language": LANGUAGES,
    "goods": GOODS,
    "colour": COLOURS,
    "month": MONTHS,
    "river": RIVERS,
    "year": YEARS,
    "number": NUMBERS,
}


@dataclass(frozen=True)
class Relation:
    """One attribute of an entity: how documents state it and how users ask for it.

    Parameters
    ----------
    name : str
        Unique name, such as ``"person.manager"``.
    subject : str
        Kind of entity that has the attribute.
    value : str
        Kind of value: a kind of entity, or a key of the plain value lists.
    phrases : tuple of str
        Predicates with one ``{v}``; their first words are unique within the kind of entity.
    questions : tuple of str
        Questions with one ``{e}``.
    noun : str
        ``"the manager of {e}"``, for two-hop questions; empty when the value is no entity.
    """

    name: str
    subject: str
    value: str
    phrases: tuple[str, ...]
    questions: tuple[str, ...]
    noun: str = ""


def _relation(
    subject: str, name: str, value: str, phrases: str, questions: str, noun: str = ""
) -> Relation:
    return Relation(
        name=f"{subject}.{name}",
        subject=subject,
        value=value,
        phrases=tuple(phrases.split(" | ")),
        questions=tuple(questions.split(" | ")),
        noun=noun,
    )


RELATIONS: tuple[Relation, ...] = (
    _relation(
        PEOPLE, "job", "job",
        "works as a {v} | serves as a {v} | earns a living as a {v}",
        "What does {e} do for a living? | What is the job of {e}? | What is the profession of {e}?",
    ),
    _relation(
        PEOPLE, "home", CITY,
        "lives in {v} | resides in {v} | has a home in {v}",
        "Where does {e} live? | In which city does {e} live? | Which city is the home of {e}?",
        "the home city of {e}",
    ),
    _relation(
        PEOPLE, "employer", COMPANY,
        "is employed by {v} | belongs to the staff of {v} | joined {v}",
        "Which company employs {e}? | Who is the employer of {e}? | Where is {e} employed?",
        "the employer of {e}",
    ),
    _relation(
        PEOPLE, "manager", PEOPLE,
        "reports to {v} | answers to {v} | takes instructions from {v}",
        "Who is the manager of {e}? | Who manages {e}? | Who is the boss of {e}?",
        "the manager of {e}",
    ),
    _relation(
        PEOPLE, "birth", "year",
        "was born in {v} | came into the world in {v}",
        "When was {e} born? | In which year was {e} born? | What is the birth year of {e}?",
    ),
    _relation(
        PEOPLE, "hobby", "hobby",
        "enjoys {v} | loves {v} | spends weekends on {v}",
        "What is the hobby of {e}? | What does {e} do for fun? | Which hobby does {e} have?",
    ),
    _relation(
        PEOPLE, "pet", "animal",
        "keeps a tame {v} | owns a pet {v} | cares for a {v}",
        "Which animal does {e} keep? | What is the pet of {e}? | What kind of pet does {e} have?",
    ),
    _relation(
        PEOPLE, "language", "language",
        "speaks {v} | studies {v} | learned {v}",
        "Which language does {e} speak? | What language does {e} know?",
    ),
    _relation(
        COMPANY, "seat", CITY,
        "sits in {v} | operates from {v} | keeps its headquarters in {v}",
        "Where is {e} based? | In which city is {e} based? | Where are the headquarters of {e}?",
        "the home city of {e}",
    ),
    _relation(
        COMPANY, "director", PEOPLE,
        "is led by {v} | follows director {v} | has a director named {v}",
        "Who is the director of {e}? | Who leads {e}? | Who runs {e}?",
        "the director of {e}",
    ),
    _relation(
        COMPANY, "founded", "year",
        "was founded in {v} | opened its doors in {v} | started in {v}",
        "When was {e} founded? | In which year was {e} founded? | "
        "What is the founding year of {e}?",
    ),
    _relation(
        COMPANY, "goods", "goods",
        "sells {v} | makes {v} | deals in {v}",
        "What does {e} sell? | What does {e} make? | Which goods does {e} offer?",
    ),
    _relation(
        COMPANY, "staff", "number",
        "employs {v} people | counts {v} employees",
        "How many people work for {e}? | How many employees does {e} have?",
    ),
    _relation(
        PRODUCT, "price", "number",
        "costs {v} euros | sells for {v} euros | is priced at {v} euros",
        "How much is {e}? | What is the price of {e}? | What does {e} cost?",
    ),
    _relation(
        PRODUCT, "maker", COMPANY,
        "comes from {v} | carries the brand of {v}",
        "Which company makes {e}? | Who is the maker of {e}? | Who makes {e}?",
        "the maker of {e}",
    ),
    _relation(
        PRODUCT, "designer", PEOPLE,
        "was designed by {v} | owes its shape to {v}",
        "Who designed {e}? | Who is the designer of {e}?",
        "the designer of {e}",
    ),
    _relation(
        PRODUCT, "colour", "colour",
        "ships in {v} | appears in {v} | has a finish in {v}",
        "What is the colour of {e}? | Which colour does {e} have? | What colour is {e}?",
    ),
    _relation(
        PRODUCT, "launch", "year",
        "launched in {v} | arrived in {v} | reached shops in {v}",
        "When did {e} launch? | In which year did {e} launch? | What is the launch year of {e}?",
    ),
    _relation(
        EVENT, "venue", CITY,
        "takes place in {v} | happens in {v} | fills the streets of {v}",
        "Where does {e} take place? | In which city is {e} held? | Where is {e} held?",
        "the host city of {e}",
    ),
    _relation(
        EVENT, "month", "month",
        "begins in {v} | starts in {v} | opens in {v}",
        "In which month is {e}? | When does {e} begin? | Which month is {e} in?",
    ),
    _relation(
        EVENT, "organiser", PEOPLE,
        "is organised by {v} | owes its programme to {v}",
        "Who organises {e}? | Who is the organiser of {e}?",
        "the organiser of {e}",
    ),
    _relation(
        EVENT, "theme", "goods",
        "celebrates {v} | honours {v}",
        "What does {e} celebrate? | What is the theme of {e}?",
    ),
    _relation(
        EVENT, "since", "year",
        "dates from {v} | was first held in {v}",
        "When was {e} first held? | In which year was {e} first held?",
    ),
    _relation(
        CITY, "river", "river",
        "lies on the {v} | stands beside the {v}",
        "Which river runs through {e}? | On which river does {e} lie?",
    ),
    _relation(
        CITY, "mayor", PEOPLE,
        "is governed by {v} | answers to mayor {v} | elected {v}",
        "Who is the mayor of {e}? | Who governs {e}?",
        "the mayor of {e}",
    ),
    _relation(
        CITY, "fame", "goods",
        "draws visitors with its {v} | takes pride in its {v} | was made famous by its {v}",
        "What is {e} known for? | What is {e} famous for?",
    ),
)  # fmt: skip
RELATIONS_OF: dict[str, tuple[Relation, ...]] = {
    kind: tuple(relation for relation in RELATIONS if relation.subject == kind)
    for kind in (PEOPLE, COMPANY, PRODUCT, EVENT, CITY)
}

OPENERS = (
    "Today,", "These days,", "As is well known,", "By all accounts,", "According to the register,",
    "For some time now,", "It is said that", "Neighbours report that", "Records show that",
    "At present,", "As far as we know,", "In fact,",
)  # fmt: skip
TAILS = (
    ", as the register shows", ", according to the local paper",
    ", much to the surprise of friends",
    ", and nobody minds", ", which is no secret", ", at least for now", ", as many people know",
    ", and has no plans to change that",
)  # fmt: skip
FILLERS = (
    "The weather was mild that year.", "Not much else is known.", "The story was in the paper.",
    "More details will follow.", "This entry was checked twice.",
    "There is a photo in the archive.",
    "The rest is on file.", "An old map hangs on the wall.", "Visitors are welcome on Sunday.",
    "This page was last edited in spring.", "People talk about it to this day.",
    "There is more to tell, but not here.", "The archive has a copy of the letter.",
    "Few people remember how it began.", "The note was written by hand.",
)  # fmt: skip


def stable_hash(text: str) -> int:
    """Return a hash that is the same in every process."""
    return zlib.crc32(text.encode())


def is_held_out(first: str, second: str) -> bool:
    """Tell whether the two-word name belongs to the held-out part of the world."""
    return stable_hash(f"{first} {second}") % HELD_OUT_SHARE == 0


@dataclass(frozen=True)
class Fact:
    """One statement about an entity, and the sentence that a document and an answer say it with."""

    entity: str
    relation: Relation
    value: str
    sentence: str


@dataclass
class Document:
    """A short text about one entity."""

    entity: str
    kind: str
    facts: list[Fact]
    text: str = ""


@dataclass
class Turn:
    """One question with its expected answer and the ranks of the documents it needs."""

    question: str
    answer: str
    kind: str
    sources: list[int] = field(default_factory=list)


@dataclass
class Task:
    """Documents and one or several questions about them, asked in order."""

    documents: list[str]
    turns: list[Turn]


def _subject(entity: str, kind: str) -> str:
    return f"the {entity}" if kind in (PRODUCT, EVENT) else entity


def upper_first(text: str) -> str:
    """Return `text` with its first letter in upper case."""
    return text[:1].upper() + text[1:]


class World:
    """Draws documents and questions from one part of the world.

    Parameters
    ----------
    seed : int
        Two worlds with one seed and split give the same tasks.
    split : {"train", "held_out"}
        Which two-word names may occur.
    plain : bool
        Leave out openers, tails, filler sentences and titles.
    share : float
        Probability that a new name takes one of its two words from a name already drawn.
    """

    def __init__(
        self, seed: int, split: str = "held_out", *, plain: bool = False, share: float = 0.5
    ) -> None:
        if split not in ("train", "held_out"):
            raise ValueError(f"split must be 'train' or 'held_out', not {split!r}")
        self.rng = random.Random(seed)
        self.split = split
        self.plain = plain
        self.share = share

    def name(self, kind: str, taken: set[str]) -> str:
        """Draw a name that is not `taken`, often sharing a word with one that is, and add it."""
        rng = self.rng
        while True:
            if kind == CITY:
                candidate = rng.choice(CITIES)
            else:
                firsts, seconds = _NAME_PARTS[kind]
                first, second = rng.choice(firsts), rng.choice(seconds)
                if taken and rng.random() < self.share:
                    other = rng.choice(sorted(taken)).split()
                    if len(other) == 2 and other[0] in firsts and other[1] in seconds:
                        first, second = rng.choice([(other[0], second), (first, other[1])])
                if is_held_out(first, second) != (self.split == "held_out"):
                    continue
                candidate = f"{first} {second}"
            if candidate not in taken:
                taken.add(candidate)
                return candidate

    def fact(self, entity: str, relation: Relation, value: str) -> Fact:
        """Return the statement in one of the relation's phrasings."""
        predicate = self.rng.choice(relation.phrases).format(v=value)
        sentence = upper_first(f"{_subject(entity, relation.subject)} {predicate}.")
        return Fact(entity, relation, value, sentence)

    def documents(
        self,
        count: int,
        *,
        facts: tuple[int, int] = (2, 5),
        kinds: Sequence[str] = (PEOPLE, PEOPLE, PEOPLE, COMPANY, PRODUCT, EVENT, CITY),
        relations: Sequence[Relation] | None = None,
    ) -> list[Document]:
        """Draw `count` documents whose entities refer to one another where they can.

        Parameters
        ----------
        count : int
            Number of documents, each about another entity.
        facts : tuple of int
            Least and largest number of facts in a document.
        kinds : sequence of str
            Kinds of entity, drawn with equal weight.
        relations : sequence of Relation, optional
            Only these relations occur.
        """
        rng = self.rng
        taken: set[str] = set()
        chosen = [rng.choice(kinds) for _ in range(count)]
        entities = [(self.name(kind, taken), kind) for kind in chosen]
        return [
            self._document(entity, kind, entities, facts, relations) for entity, kind in entities
        ]

    def _document(
        self,
        entity: str,
        kind: str,
        entities: list[tuple[str, str]],
        facts: tuple[int, int],
        relations: Sequence[Relation] | None,
    ) -> Document:
        rng = self.rng
        pool = [r for r in RELATIONS_OF[kind] if relations is None or r in relations]
        count = min(len(pool), rng.randint(*facts))
        picked = rng.sample(pool, count)
        document = Document(
            entity,
            kind,
            [self.fact(entity, r, self._value(entity, r.value, entities)) for r in picked],
        )
        document.text = self._text(document)
        return document

    def _value(self, entity: str, kind: str, entities: list[tuple[str, str]]) -> str:
        rng = self.rng
        if kind in _PLAIN_VALUES:
            return rng.choice(_PLAIN_VALUES[kind])
        known = [name for name, other in entities if other == kind and name != entity]
        if known and rng.random() < 0.7:
            return rng.choice(known)
        return self.name(kind, {name for name, _ in entities})

    def _text(self, document: Document) -> str:
        sentences = [fact.sentence for fact in document.facts]
        if self.plain:
            return " ".join(sentences)
        rng = self.rng
        article = document.kind in (PRODUCT, EVENT)
        for index, sentence in enumerate(sentences):
            if rng.random() < 0.12:
                sentence = sentence[:-1] + rng.choice(TAILS) + "."
            if rng.random() < 0.12:
                rest = sentence[0].lower() + sentence[1:] if article else sentence
                sentence = f"{rng.choice(OPENERS)} {rest}"
            sentences[index] = sentence
        for _ in range(rng.choice((0, 0, 0, 1, 2))):
            sentences.insert(rng.randint(1, len(sentences)), rng.choice(FILLERS))
        text = (" " if rng.random() < 0.85 else "\n").join(sentences)
        chance = rng.random()
        if chance < 0.05:
            text = f"{document.entity}\n{text}"
        elif chance < 0.08:
            text = f"Title: {document.entity}\n{text}"
        return text

    def single(self, documents: list[Document], *, relation: Relation | None = None) -> Turn:
        """Ask for a fact of one document."""
        options = [
            (rank, fact)
            for rank, document in enumerate(documents)
            for fact in document.facts
            if relation is None or fact.relation is relation
        ]
        rank, fact = self.rng.choice(options)
        return Turn(self._ask(fact.relation, fact.entity), fact.sentence, "single", [rank])

    def unanswerable(self, documents: list[Document]) -> Turn:
        """Ask for a fact that no document holds: a stranger, or an attribute left out."""
        rng = self.rng
        document = rng.choice(documents)
        stated = {fact.relation for fact in document.facts}
        missing = [r for r in RELATIONS_OF[document.kind] if r not in stated]
        entity, kind = document.entity, document.kind
        if kind != CITY and (not missing or rng.random() < 0.5):
            mentioned = {d.entity for d in documents}
            mentioned |= {fact.value for d in documents for fact in d.facts}
            entity = self.name(kind, mentioned)
            relation = rng.choice(sorted(stated, key=lambda r: r.name))
        elif missing:
            relation = rng.choice(missing)
        else:
            return self.single(documents)
        answer = f"{upper_first(_subject(entity, kind))}: {REFUSAL}"
        return Turn(self._ask(relation, entity), answer, "unanswerable")

    def two_hop(self, documents: list[Document]) -> Turn | None:
        """Ask for a fact about the value of another fact, or return None if no two join.

        One in ten such questions has a first half that is stated and a second that is not.
        """
        rng = self.rng
        by_entity = {document.entity: rank for rank, document in enumerate(documents)}
        joins = [
            (rank, fact, by_entity[fact.value])
            for rank, document in enumerate(documents)
            for fact in document.facts
            if fact.relation.noun and fact.value in by_entity
        ]
        if not joins:
            return None
        rank, first, other = rng.choice(joins)
        target = documents[other]
        noun = first.relation.noun.format(e=_subject(first.entity, first.relation.subject))
        stated = {fact.relation for fact in target.facts}
        missing = [r for r in RELATIONS_OF[target.kind] if r not in stated]
        if missing and rng.random() < 0.1:
            question = self._ask(rng.choice(missing), noun, noun=True)
            answer = f"{first.sentence} {target.entity}: {REFUSAL}"
            return Turn(question, answer, "unanswerable two-hop", [rank])
        second = rng.choice(target.facts)
        question = self._ask(second.relation, noun, noun=True)
        return Turn(question, f"{first.sentence} {second.sentence}", "two-hop", [rank, other])

    def follow_up(self, documents: list[Document], previous: Turn) -> Turn | None:
        """Ask a question that only the turn before makes complete.

        Either another attribute of the entity in question (``And where do they live?``) or the
        same attribute of another one (``And Bo Lind?``). Returns None where neither is possible.
        """
        if previous.kind not in ("single", "follow-up"):
            return None
        rng = self.rng
        rank = previous.sources[0]
        document = documents[rank]
        fact = next(f for f in document.facts if f.sentence == previous.answer)
        others = [
            (r, f)
            for r, d in enumerate(documents)
            for f in d.facts
            if f.relation is fact.relation and f.entity != fact.entity
        ]
        if others and rng.random() < 0.5:
            rank, fact = rng.choice(others)
            entity = _subject(fact.entity, fact.relation.subject)
            question = rng.choice(("And {e}?", "What about {e}?", "And what about {e}?"))
            return Turn(question.format(e=entity), fact.sentence, "follow-up", [rank])
        rest = [f for f in document.facts if f is not fact]
        if not rest:
            return None
        other = rng.choice(rest)
        pronoun = "this person" if document.kind == PEOPLE else f"this {document.kind}"
        question = rng.choice(other.relation.questions).format(e=pronoun)
        question = f"And {question[0].lower()}{question[1:]}"
        return Turn(question, other.sentence, "follow-up", [rank])

    def _ask(self, relation: Relation, entity: str, *, noun: bool = False) -> str:
        subject = entity if noun else _subject(entity, relation.subject)
        question = upper_first(self.rng.choice(relation.questions).format(e=subject))
        chance = self.rng.random()
        if self.plain or chance < 0.85:
            return question
        if chance < 0.95:
            return question[0].lower() + question[1:]
        return question[:-1]

    def task(
        self,
        documents: int,
        kinds: Sequence[str],
        *,
        facts: tuple[int, int] = (2, 5),
        entity_kinds: Sequence[str] = (PEOPLE, PEOPLE, PEOPLE, COMPANY, PRODUCT, EVENT, CITY),
    ) -> Task:
        """Draw documents and one turn for each of `kinds`.

        Parameters
        ----------
        documents : int
            Number of documents.
        kinds : sequence of str
            ``single``, ``unanswerable``, ``two-hop`` or ``follow-up``, one per turn. A follow-up
            takes the place of nothing but itself: it needs a single-fact turn before it.
        """
        while True:
            drawn = self.documents(documents, facts=facts, kinds=entity_kinds)
            turns: list[Turn] = []
            for kind in kinds:
                turn = self._turn(drawn, kind, turns)
                if turn is None:
                    break
                turns.append(turn)
            else:
                return Task([document.text for document in drawn], turns)

    def _turn(self, documents: list[Document], kind: str, turns: list[Turn]) -> Turn | None:
        if kind == "single":
            return self.single(documents)
        if kind == "unanswerable":
            turn = self.unanswerable(documents)
            return turn if turn.kind == kind else None
        if kind == "two-hop":
            found = self.two_hop(documents)
            return found if found is not None and found.kind == kind else None
        if kind == "follow-up":
            return self.follow_up(documents, turns[-1]) if turns else None
        raise ValueError(f"unknown kind of question: {kind!r}")

    def few_shot(self, examples: int) -> Task:
        """Draw labelled words as documents, and ask for the label of a word not among them.

        The words come from two or three categories; which label a category has is only to be
        learned from the examples.
        """
        rng = self.rng
        groups = rng.sample(FEW_SHOT_CATEGORIES, rng.choice((2, 2, 3)))
        labels = rng.sample(FEW_SHOT_LABELS, len(groups))
        while True:
            ranks = [rng.randrange(len(groups)) for _ in range(examples)]
            asked = rng.randrange(len(groups))
            if asked in ranks:
                break
        words = [rng.sample(list(group), min(len(group), examples + 1)) for group in groups]
        documents = [f"Word: {words[rank].pop()}\nLabel: {labels[rank]}" for rank in ranks]
        word = words[asked].pop()
        turn = Turn(f"Word: {word}\nLabel:", labels[asked], "few-shot", [])
        return Task(documents, [turn])


FEW_SHOT_CATEGORIES: tuple[Sequence[str], ...] = (JOBS, ANIMALS, LANGUAGES, HOBBIES, GOODS, CITIES)
FEW_SHOT_LABELS = ("red", "blue", "green", "left", "right", "one", "two", "three", "yes", "no")
FEW_SHOT_HEAD = "Give each word its label, as in the examples."

# --- Prompts --------------------------------------------------------------------------------------

_LINE_21 = "-" * 21
_LINE_20 = "-" * 20
_LINE_16 = "-" * 16
TEXT_QA = (
    f"Context information is below.\n{_LINE_21}\n{{context}}\n{_LINE_21}\n"
    "Given the context information and not prior knowledge, answer the query.\n"
    "Query: {question}\nAnswer: "
)
TREE_SUMMARIZE = (
    f"Context information from multiple sources is below.\n{_LINE_21}\n{{context}}\n{_LINE_21}\n"
    "Given the information from multiple sources and not prior knowledge, answer the query.\n"
    "Query: {question}\nAnswer: "
)
QA_SYSTEM = (
    "You are an expert Q&A system that is trusted around the world.\n"
    "Always answer the query using the provided context information, and not prior knowledge.\n"
    "Some rules to follow:\n"
    "1. Never directly reference the given context in your answer.\n"
    "2. Avoid statements like 'Based on the context, ...' or 'The context information ...' or "
    "anything along those lines."
)
CONTEXT_CHAT = (
    f"Use the context information below to assist the user.\n{_LINE_20}\n{{context}}\n{_LINE_20}\n"
)
RAG_HEAD = (
    "You are an assistant for question-answering tasks. Use the following pieces of retrieved "
    "context to answer the question. If you don't know the answer, just say that you don't know. "
    "Use three sentences maximum and keep the answer concise.\n"
)
STUFF_SYSTEM = (
    "Use the following pieces of context to answer the user's question. \n"
    "If you don't know the answer, just say that you don't know, don't try to make up an answer.\n"
    f"{_LINE_16}\n{{context}}"
)
SHORT_SYSTEM = "Answer the question from the context.\n\n{context}"
CHAT_STYLES = ("context_chat", "stuff", "short_system")
SINGLE_STYLES = ("chat_qa", "text_qa", "tree_summarize", "rag", "rag_moved", "user", "tool")
STYLES = (*CHAT_STYLES, *SINGLE_STYLES)
_GAP = "\x00"

Message = dict[str, str]
Renderer = Callable[[list[Message]], str]


@dataclass(frozen=True)
class Prompt:
    """A rendered prompt in its parts.

    Parameters
    ----------
    prefix : str
        Everything before the first context, special tokens included.
    contexts : tuple of str
        Texts of the documents, without separators.
    query : str
        Everything after the last context.
    """

    prefix: str
    contexts: tuple[str, ...]
    query: str

    @property
    def text(self) -> str:
        """The prompt as a pipeline sends it: contexts joined by a blank line."""
        return self.prefix + SEPARATOR.join(self.contexts) + self.query


def messages_for(style: str, turns: Sequence[Turn], rng: random.Random | None = None) -> Any:
    """Return the chat messages of a style, or one string for bare completion.

    The place of the documents is marked by a NUL character. The answers of all turns but the
    last are part of the history; the last one is left open.
    """
    question = turns[-1].question
    if style == "text_qa":
        return TEXT_QA.format(context=_GAP, question=question)
    if style == "chat_qa":
        user = TEXT_QA.format(context=_GAP, question=question)
        return [_message("system", QA_SYSTEM), _message("user", user)]
    if style == "tree_summarize":
        user = TREE_SUMMARIZE.format(context=_GAP, question=question)
        return [_message("system", QA_SYSTEM), _message("user", user)]
    if style == "rag":
        user = f"{RAG_HEAD}Question: {question} \nContext: {_GAP} \nAnswer:"
        return [_message("user", user)]
    if style == "rag_moved":
        head = (rng or random).choice(("", "", "Question: ", "Context: "))
        ask = question if head == "Question: " else f"Question: {question}"
        user = f"{RAG_HEAD}{head}{_GAP}\n\n{ask} \nContext:  \nAnswer:"
        return [_message("user", user)]
    if style == "user":
        return [_message("user", f"{_GAP}\n\n{question}")]
    if style == "tool":
        return [_message("user", question), _message("assistant", ""), _message("tool", _GAP)]
    if style == "few_shot":
        return [_message("user", f"{FEW_SHOT_HEAD}\n\n{_GAP}\n\n{question}")]
    systems = {"context_chat": CONTEXT_CHAT, "stuff": STUFF_SYSTEM, "short_system": SHORT_SYSTEM}
    messages = [_message("system", systems[style].format(context=_GAP))]
    for turn in turns[:-1]:
        messages += [_message("user", turn.question), _message("assistant", turn.answer)]
    return [*messages, _message("user", question)]


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def build_prompt(
    style: str,
    documents: Sequence[str],
    turns: Sequence[Turn],
    render: Renderer,
    rng: random.Random | None = None,
    bos: str = "<|bos|>",
) -> Prompt:
    """Render a prompt of the given style around `documents`.

    Parameters
    ----------
    style : str
        One of :data:`STYLES` or ``"few_shot"``.
    documents : sequence of str
        Texts as they enter the prompt.
    turns : sequence of Turn
        The last turn's question is open; the ones before are history (chat styles only).
    render : callable
        Chat template: list of messages to text, with generation prompt.
    rng : random.Random, optional
        Chooses among variants of a style.
    bos : str
        Token in front of a bare completion prompt.
    """
    messages = messages_for(style, turns, rng)
    text = bos + messages if isinstance(messages, str) else render(messages)
    prefix, query = text.split(_GAP)
    return Prompt(prefix, tuple(documents), query)


def chat_renderer(tokenizer: Any) -> Renderer:
    """Return a renderer that applies the tokenizer's chat template."""

    def render(messages: list[Message]) -> str:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return str(text)

    return render


def with_metadata(text: str, rng: random.Random) -> str:
    """Put a metadata line in front of a document, as LlamaIndex's default text template does."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    stem = "".join(rng.choice(letters) for _ in range(rng.randint(1, 4)))
    folder = rng.choice(("data", "docs", "examples/data", "home/user/data", stem))
    line = rng.choice(
        (
            f"file_path: /{folder}/{stem}.txt",
            f"file_path: {folder}/{stem}.txt",
            f"source: {stem}.txt",
            f"file_name: {stem}.md",
        )
    )
    return f"{line}\n\n{text}"


def vocabulary() -> set[str]:
    """Return all words of the world and of the prompts, each of which becomes one token."""
    texts: list[str] = [*OPENERS, *TAILS, *FILLERS, REFUSAL, *FEW_SHOT_LABELS, FEW_SHOT_HEAD]
    for relation in RELATIONS:
        texts += [phrase.format(v="x") for phrase in relation.phrases]
        texts += [question.format(e="x") for question in relation.questions]
        texts.append(relation.noun.format(e="x"))
    texts += [TEXT_QA, TREE_SUMMARIZE, QA_SYSTEM, CONTEXT_CHAT, RAG_HEAD, STUFF_SYSTEM]
    texts += [SHORT_SYSTEM, _COMMON_TEXT]
    words = {word for text in texts for word in _words(text)}
    words |= {word.lower() for word in words} | {upper_first(word) for word in words}
    for values in (*_PLAIN_VALUES.values(), *(p for parts in _NAME_PARTS.values() for p in parts)):
        words.update(values)
    words.update(CITIES)
    return words | {_LINE_21, _LINE_20, _LINE_16, "-" * 12, "  "}


def _words(text: str) -> Iterable[str]:
    word = ""
    for char in text + " ":
        if char.isalnum() or (char == "'" and word):
            word += char
        else:
            if word.rstrip("'"):
                yield word.rstrip("'")
            word = ""


# Words of pipelines' other prompts and of everyday questions, so that they stay cheap in tokens.
_COMMON_TEXT = """
The original query is as follows. We have provided an existing answer. We have the opportunity to
refine the existing answer only if needed with some more context below. Given the new context,
refine the original answer to better answer the query. If the context isn't useful, return the
original answer. Refined Answer. New Context. strictly operates in two modes when refining existing
answers. Rewrite Repeat Original In doubt. The following is a friendly conversation between a user
and an AI assistant. The assistant is talkative and provides lots of specific details from its
context. it truthfully says it does not know. Here are the relevant documents for the context.
Instruction: Based on the above documents, provide a detailed answer for the user question below.
not present in the document. Given the following conversation and a follow up question, rephrase the
follow up question to be a standalone question. Chat History Follow Up Input Standalone. Human AI
helpful truthful. Source Title Word Label Query Question Answer Context Example Examples Text Input
Output file path name source data docs txt md home user page examples and or but so if then else
who whom whose what which when where why how he she they it his her their its him them this that
these those person company product event city thanks thank you please tell me about can could
would should will may might must shall do does did done has have had be been being am are was were
not no yes all any some many much more most few less least other another same different first
second third last next new old good bad big small long short high low early late one two three
four five six seven eight nine ten with without by from to in on at of for as than into over under
after before between during through against about because while until since also only just very
too even still again never always often there here now up down out off work works worked live
lives lived make makes made sell sells sold buy name named call called born year years month day
time world country town people man woman child friend family house street office job manager boss
director mayor organiser maker designer price colour hobby pet animal language river employer
founded based
""".replace("\n", " ")
