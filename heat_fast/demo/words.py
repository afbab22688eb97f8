"""Words and sentence templates of the generated prompts.

Countries and answers that are names are invented from syllables; answers that are things are
plain nouns. In every fact template the entity and the relation come before the answer, so that the
state at the answer's position can already hold what the fact is about.
"""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ENTITIES: tuple[str, ...] = tuple(
    start + end
    for start in ("Vel", "Ost", "Kar", "Dor", "Mir", "Tal", "Bren", "Zan")
    for end in ("mora", "andra", "hold", "wen", "ovia", "eth", "stead", "gard")
)

NAMES: tuple[str, ...] = tuple(
    start + end
    for start in ("Tarn", "Quil", "Mar", "Sor", "Hask", "Ulm", "Fen", "Pry", "Grim")
    for end in ("wick", "dale", "by", "rook", "low", "mere", "ston", "ford")
)

THINGS: tuple[str, ...] = _words(
    """
    acorn anchor apple arrow badger barrel basket beetle blanket bottle brick brush bucket button
    candle carpet cherry compass corset cradle crown curtain daisy drum eagle falcon feather fiddle
    flute fox goblet glove hammer harp heron horn iris jewel kettle ladder lantern lemon lily
    marble mirror mitten needle onion otter owl parrot pearl pepper pigeon plum pumpkin rabbit
    raven ribbon rope saddle salmon shell shovel spider spoon sparrow thistle turtle violin walnut
    whistle
    """
)

RELATIONS: dict[str, str] = {
    "capital": "name",
    "river": "name",
    "founder": "name",
    "language": "name",
    "harbour": "name",
    "mountain": "name",
    "emblem": "thing",
    "treasure": "thing",
    "mascot": "thing",
    "charm": "thing",
    "prize": "thing",
    "export": "thing",
}
"""Each relation and the kind of its answer."""

PEOPLE: tuple[str, ...] = _words(
    """
    Anna Boris Clara Daniel Elena Felix Greta Henry Irene Jacob Karen Lucas Maria Nora Oscar Paula
    Robert Sofia Thomas Ursula Victor Walter
    """
)

PLACES: tuple[str, ...] = _words(
    """
    attic bakery barn cellar chapel cottage field forest garden inn kitchen library market meadow
    mill museum orchard school station stable tower village workshop
    """
)

FACTS: tuple[str, ...] = (
    "The {relation} of {entity} is {article}{answer}.",
    "In {entity} the {relation} is {article}{answer}.",
    "People say that the {relation} of {entity} is {article}{answer}.",
    "As its {relation}, {entity} has {article}{answer}.",
    "For many years the {relation} of {entity} has been {article}{answer}.",
    "Old maps agree that in {entity} the {relation} is {article}{answer}.",
    "The {relation} of {entity} is {article}{answer}, as every traveller knows.",
    "Nobody doubts that the {relation} of {entity} is still {article}{answer}.",
)

QUESTIONS: tuple[str, ...] = (
    "What is the {relation} of {entity}?",
    "In {entity}, what is the {relation}?",
    "Which is the {relation} of {entity}?",
    "Speaking of {entity}, what is its {relation}?",
)

NARRATIVE: tuple[str, ...] = (
    "{hero} left the {place} before the sun came up.",
    "{hero} had lost a {thing} somewhere near the {place}.",
    "The road to the {place} was long and full of mud.",
    "{friend} waited at the {place} with a {thing} and some bread.",
    "It rained all night, and the roof of the {place} began to leak.",
    "{hero} asked {friend} to bring the {thing} back to the {place}.",
    "A stranger sold {hero} a {thing} for two coins.",
    "Nobody in the {place} had seen {friend} since the winter.",
    "{friend} laughed and hid the {thing} behind the {second}.",
    "The letter from {friend} said nothing about the {thing}.",
    "{hero} slept in the {place} and dreamed of a {thing}.",
    "On the way home they found a {thing} under a heap of leaves.",
    "The children of the {place} were singing about a {thing}.",
    "{hero} promised never to return to the {place}.",
    "{friend} painted the door of the {place} green.",
    "A cold wind blew from the {place} to the {far}.",
    "{hero} traded the {thing} for a {second} and was sorry at once.",
    "Every evening {friend} walked from the {place} to the {far}.",
    "The dog barked at the {thing} until {hero} took it away.",
    "In the {place} there was a table with a {thing} on it.",
    "{friend} told a long story about a {thing} and a {second}.",
    "Nothing in the {place} was where {hero} had left it.",
    "After supper {hero} and {friend} cleaned the {place} together.",
    "The old woman at the {place} gave {friend} a {thing}.",
    "{hero} was afraid of the dark behind the {place}.",
    "They carried the {thing} across the bridge and into the {place}.",
    "{friend} forgot the {thing} and had to run back.",
    "When the bell rang, {hero} closed the {place} and went away.",
    "Two riders passed the {place} without a word.",
    "{hero} wrote a note, folded it twice and left it in the {place}.",
    "By noon the {place} was crowded and {friend} grew tired.",
    "{hero} smiled, because the {thing} was not broken after all.",
)
