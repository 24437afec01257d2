"""The words that the demo model's conversations are made of. Knows no sentences: corpus.py puts them together.

All of it was written for this project. Made-up words (`made_up`) stand beside the real ones so that the model learns
to copy what it reads, not to choose from what it has seen.
"""

from __future__ import annotations

from random import Random
from typing import Final

NAMES: Final = """
Ada Adam Alan Alba Alice Amir Amy Ana Anna Anton Aria Arthur Basil Bella Ben Bianca Bob Boris Carla Carol Chen Clara
Cora Daisy Dan Dana David Diego Dora Edgar Ella Elsa Emil Emma Eric Erik Esther Eva Felix Finn Flora Frank Frida Gina
Grace Greta Hana Hanna Hans Harry Hugo Ida Igor Ines Iris Isaac Ivan Jack James Jan Jane Jasper John Jonas Julia Karl
Kate Kenji Kira Klaus Lara Laura Lea Lena Leo Lily Linda Lisa Liu Louis Lucy Luis Luna Maria Mark Marta Mary Max Maya
Mia Mike Milo Mina Nadia Nina Noah Nora Oleg Olga Oliver Omar Oscar Otto Paul Paula Pedro Peter Petra Pia Priya Rachel
Rita Robin Rosa Ruth Sam Sara Sofia Sven Tara Theo Tim Tina Tom Uma Vera Victor Wanda Will Yara Yuki Zara Zoe
""".split()

CITIES: Final = """
Oslo Paris Rome Berlin Madrid Lisbon Vienna Prague Athens Dublin London Warsaw Zurich Geneva Milan Turin Naples Munich
Hamburg Cologne Boston Chicago Denver Dallas Seattle Austin Miami Toronto Montreal Lima Quito Bogota Santiago Havana
Cairo Tunis Nairobi Lagos Accra Dakar Delhi Mumbai Lahore Tokyo Osaka Kyoto Seoul Beijing Shanghai Hanoi Manila Sydney
Perth Auckland Helsinki Stockholm Bergen Malmo Riga Tallinn Vilnius Kyiv Budapest Zagreb Sofia Porto Seville Lyon Nice
Ghent Bruges Leeds York Bath Basel Graz Krakow
""".split()

COLOURS: Final = """
red green blue yellow orange purple pink brown black white grey silver gold violet turquoise crimson scarlet indigo
olive beige maroon teal amber ivory
""".split()

ANIMALS: Final = """
cat dog horse rabbit fox bear wolf owl eagle mouse goat sheep cow duck goose frog turtle whale dolphin tiger lion
elephant monkey parrot squirrel hedgehog otter beaver badger deer snail crab penguin hamster donkey zebra
""".split()

FOODS: Final = """
apple banana bread butter cheese cherry chocolate soup rice pasta pizza salad potato tomato carrot onion lemon honey
mango melon peach pear plum grape noodle pancake waffle yogurt cookie cake sandwich
""".split()

THINGS: Final = """
anchor arrow ball basket bell bench bicycle blanket boat book bottle bowl box bridge brush bucket button candle card
chair clock cloud coat coin comb compass cup curtain desk door drum engine fence flag flower flute fork garden gate
glass glove hammer hat house island jacket jar kettle key kite knife ladder lamp leaf letter lock map mirror moon
mountain nail needle ocean paper pencil piano picture pillow pipe plate pocket pond river road rock roof rope ruler
sail school scissors shelf ship shirt shoe shovel silver spoon stamp star stone storm street sugar summer sun table
tent ticket tower train tree truck umbrella valley violin wagon wall watch water wheel whistle window winter wire yarn
""".split()

ADJECTIVES: Final = """
big small old young brave quiet loud clever gentle hungry sleepy happy sad lonely curious tiny golden broken strange
kind wise shy proud lucky
""".split()

JOBS: Final = """
baker teacher doctor farmer pilot painter sailor nurse writer singer cook lawyer dentist gardener plumber carpenter
mechanic driver librarian chemist
""".split()

HOBBIES: Final = """
chess swimming reading painting cycling running cooking fishing dancing singing hiking sailing skating knitting
climbing gardening rowing surfing
""".split()

DAYS: Final = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()

LANGUAGES: Final = "English German French Spanish Italian Dutch Polish Greek Turkish Arabic Hindi Japanese".split()

ONSETS: Final = "b br c d dr f fl g gr h j k l m n p pl qu r s sh sk st t tr v w z".split()
VOWELS: Final = "a e i o u ai ee oo".split()
CODAS: Final = "b d k l m n p r s t nd st rk".split()


def made_up(rng: Random) -> str:
    """A word of two or three syllables in lower case that is in no list: `brimo`, `skanteel`."""
    count = rng.choice((2, 2, 3))
    word = "".join(rng.choice(ONSETS) + rng.choice(VOWELS) for _ in range(count))
    return word + (rng.choice(CODAS) if rng.random() < 0.5 else "")


def name(rng: Random) -> str:
    """A first name; one in five is made up."""
    return made_up(rng).capitalize() if rng.random() < 0.2 else rng.choice(NAMES)


def city(rng: Random) -> str:
    """A city; one in five is made up."""
    return made_up(rng).capitalize() if rng.random() < 0.2 else rng.choice(CITIES)


COMMON: Final = tuple(dict.fromkeys([*ANIMALS, *FOODS, *THINGS, *COLOURS, *JOBS]))
"""Words for spelling, sorting and the like."""


def word(rng: Random) -> str:
    """A common word; one in seven is made up."""
    return made_up(rng) if rng.random() < 0.14 else rng.choice(COMMON)


LISTED: Final = frozenset([*NAMES, *CITIES, *DAYS, *HOBBIES, *COMMON])


def listed(value: str) -> bool:
    """Whether a value is a number or stands in a list, so is not made up."""
    return value.isdigit() or value in LISTED
