"""The demo's tasks: read name, city and job from a sentence about a person, and write them down.

Each adapter has a form of its own for the answer; sentences and prompts are the same.

All sentences are generated here, from lists of words and a seed. The lists for training and for
evaluation share no name, no city and no job, so a right answer to a held-out sentence has been
read from the sentence and not remembered.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

INSTRUCTION = "Extract the fields name, city and job."
"""The system message of every prompt, in training and in evaluation alike."""

TEMPLATES = (
    "{name} is {a} {job} who lives in {city}.",
    "Living in {city}, {name} works as {a} {job}.",
    "My friend {name} moved to {city} last year and became {a} {job}.",
    "If you need {a} {job} in {city}, ask for {name}.",
    "In {city}, everybody knows {name}, the {job}.",
    "After ten years as {a} {job}, {name} still loves {city}.",
    "{name} from {city} has always wanted to be {a} {job}.",
    "The {job} we met in {city} is called {name}.",
)


@dataclass(frozen=True)
class Words:
    """The words that fill a template."""

    names: tuple[str, ...]
    cities: tuple[str, ...]
    jobs: tuple[str, ...]


def _split(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(","))


TRAIN_WORDS = Words(
    names=_split(
        "Anna, Boris, Carla, David, Elena, Farid, Grace, Henrik, Irene, Jamal, Keiko, Liam, Mona, "
        "Nikhil, Olga, Pedro, Rosa, Samuel, Tara, Umberto, Vera, Walter, Yusuf, Zoe, Amina, Bruno, "
        "Chloe, Dmitri, Esther, Felix"
    ),
    cities=_split(
        "Paris, Lagos, Oslo, Lima, Cairo, Boston, Kyoto, Madrid, Nairobi, Sydney, Toronto, Vienna, "
        "Warsaw, Athens, Bangkok, Chicago, Dublin, Geneva, Hanoi, Istanbul, Jakarta, Karachi, "
        "Mumbai, Naples, Prague, Quito, Seville, Tunis, New Orleans, Buenos Aires"
    ),
    jobs=_split(
        "baker, teacher, plumber, lawyer, nurse, carpenter, pilot, painter, chemist, dentist, "
        "gardener, librarian, mechanic, photographer, surgeon, tailor, waiter, writer, architect, "
        "electrician, engineer, actor, bus driver, tour guide, fashion designer, truck driver, "
        "data analyst, police officer, music teacher, civil engineer"
    ),
)

HELD_OUT_WORDS = Words(
    names=_split(
        "Marta, Oscar, Priya, Quentin, Ruth, Stefan, Thandi, Victor, Wendy, Xavier, Yara, Gustav"
    ),
    cities=_split(
        "Berlin, Havana, Seoul, Lisbon, Denver, Zurich, Manila, Glasgow, Accra, Montreal, "
        "San Diego, Cape Town"
    ),
    jobs=_split(
        "farmer, astronomer, butcher, violinist, barber, journalist, optician, translator, "
        "firefighter, marine biologist, taxi driver, interior designer"
    ),
)


@dataclass(frozen=True)
class Example:
    """One sentence and the answer that is right for it."""

    sentence: str
    answer: str


Form = Callable[[str, str, str], str]
"""Writes an answer from name, city and job."""


def as_fields(name: str, city: str, job: str) -> str:
    """Return ``name = ...; city = ...; job = ...``."""
    return f"name = {name}; city = {city}; job = {job}"


def as_table(name: str, city: str, job: str) -> str:
    """Return a row of a Markdown table."""
    return f"| {name} | {city} | {job} |"


def make_examples(words: Words, count: int, seed: int, form: Form = as_fields) -> list[Example]:
    """Return ``count`` examples, the same for the same arguments; templates are taken in turn.

    The sentences do not depend on ``form``, which writes the answers.
    """
    draw = random.Random(seed)
    names, cities, jobs = (
        _cycle(pool, count, draw) for pool in (words.names, words.cities, words.jobs)
    )
    return [
        _fill(TEMPLATES[i % len(TEMPLATES)], names[i], cities[i], jobs[i], form)
        for i in range(count)
    ]


def _cycle(pool: tuple[str, ...], count: int, draw: random.Random) -> list[str]:
    """Return ``count`` words in which every word of the pool comes equally often."""
    words: list[str] = []
    while len(words) < count:
        words += draw.sample(pool, len(pool))
    return words[:count]


def _fill(template: str, name: str, city: str, job: str, form: Form) -> Example:
    a = "an" if job[0] in "aeiou" else "a"
    sentence = template.format(name=name, city=city, job=job, a=a)
    return Example(sentence, form(name, city, job))
