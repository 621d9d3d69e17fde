"""Sentences of the demo voices: plain English, drawn from word lists, none of them in two splits.

A sentence has 8 to 18 words; there are tens of millions.
"""

import re
import zlib

import numpy as np

# The words that a template's {name} stands for.
_LISTS = """
who: the old captain, my younger sister, a patient teacher, the village baker, our quiet neighbour,
  the tired gardener, one of the musicians, the night watchman, a famous painter, her eldest cousin,
  the railway clerk, a curious child, the new librarian, the bus driver, his former partner, the
  young doctor, a travelling merchant, the school choir, nobody but the cook, the wise judge, an
  honest farmer, the chess champion, our friendly postman, the visiting engineer
did: carried, painted, repaired, borrowed, described, hid, photographed, discovered, washed,
  followed, measured, sold, polished, dropped, examined, praised, forgot, cherished, wrapped up,
  gave away, looked for, asked about, dreamed of, searched for
what: a wooden box, three silver spoons, the broken clock, an enormous map, the yellow bicycle, a
  basket of pears, the forgotten letter, two woollen blankets, the garden gate, a jar of honey, the
  heavy suitcase, an old violin, the missing key, a bundle of papers, the blue teapot, a cage of
  finches, the stone bridge, seven candles, the fishing boat, a pair of leather boots, the kitchen
  window, her grandmother's ring, a loaf of fresh bread, the spotted horse, a telescope, the
  mountain path, his favourite jacket, a very strange machine
where: near the harbour, behind the church, on the kitchen table, under the apple tree, at the
  market, beside the river, in the narrow street, along the southern wall, by the lighthouse, in the
  attic, outside the station, at the edge of the forest, above the bakery, between two hills, across
  the frozen lake, in the museum, on the upper deck, close to the windmill
when: before breakfast, last winter, early this morning, on Thursday evening, after the storm, just
  before midnight, during the festival, every single summer, a week ago, at half past nine, while it
  was raining, on the first of March, as soon as school was over, for the second time, late in
  October, without any warning, when the bells rang, on their way home
how: with great care, in complete silence, rather slowly, without a word, with a nervous laugh, for
  no good reason, with both hands, much too quickly, in spite of the cold, as gently as possible,
  with real joy, against all advice
weather: a thick fog rolled in, the wind turned north, snow began to fall, the sun broke through,
  heavy clouds were gathering, it grew warm again, the thunder faded away, frost covered the fields,
  a light rain was falling, the sky became orange, the moon was hidden, a cool breeze was blowing
said: said, believed, whispered, explained, shouted, was certain, wrote, insisted
asked: asked, explained, wondered, found out, guessed, told us
told: said, whispered, explained, shouted, wrote, insisted
number: four, eleven, sixteen, twenty, thirty five, fifty two, ninety, two hundred
many: sailors, pigeons, visitors, bottles, wooden chairs, soldiers, oranges, lanterns
were: were waiting, had been left, were counted, could be seen, stood in a row, were expected
"""
_LINES = _LISTS.strip().replace("\n  ", " ").splitlines()
_WORDS = {name: words.split(", ") for name, words in (line.split(": ") for line in _LINES)}
_TEMPLATES = (
    "{who} {did} {what} {where} {when}.",
    "{when}, {who} {did} {what} {how}.",
    "{who} {did} {what}, and {weather} {where}.",
    "{weather} when {who} {did} {what} {where}.",
    "{number} {many} {were} {where}, but {who} {did} {what}.",
    "{who} {said} that {who} {did} {what} {when}.",
    "why has {who} never {asked} who {did} {what} {where}?",
    "{where}, {who} {did} {what} and then {did} {what}.",
    "{when}, {number} {many} {were} {where}, and {weather}.",
    "{who} {did} {what} {how}, because {weather}.",
    "if {weather} {when}, {number} {many} {were} {where}.",
    "{number} {many} {were} {where} {when}, {told} {who}.",
)


def sentence(random: np.random.Generator, split: str) -> str:
    """Draw a sentence of `split`: its checksum decides, one in ten each for dev and test."""

    def choose(slot: re.Match[str]) -> str:
        words = _WORDS[slot[1]]
        return words[random.integers(len(words))]

    while True:
        text = re.sub(r"\{(\w+)\}", choose, _TEMPLATES[random.integers(len(_TEMPLATES))])
        text = text[0].upper() + text[1:]
        if {0: "dev", 1: "test"}.get(zlib.crc32(text.encode()) % 10, "train") == split:
            return text
