"""What a needle says and how it is asked for: the words that `misa-eval niah` hides and that training hides too."""

import random
import re
from dataclasses import dataclass

ADJECTIVES = (
    "amber", "ancient", "arctic", "bitter", "blue", "bold", "brass", "brave", "bright", "broken", "calm", "carved",
    "clever", "cold", "copper", "coral", "crimson", "dark", "distant", "dusty", "eager", "early", "eastern", "faded",
    "fast", "fierce", "first", "frozen", "gentle", "glass", "golden", "grand", "gray", "green", "heavy", "hidden",
    "hollow", "humble", "iron", "jade", "kind", "last", "late", "little", "lonely", "loud", "lucky", "marble",
    "narrow", "noble", "northern", "olive", "orange", "pale", "paper", "patient", "plain", "proud", "purple", "quick",
    "quiet", "rapid", "royal", "rusty", "scarlet", "secret", "sharp", "silent", "silver", "simple", "sleepy", "slow",
    "small", "smooth", "solar", "southern", "steady", "stone", "strange", "sunny", "swift", "tall", "tidy", "tiny",
    "velvet", "violet", "warm", "western", "white", "wild", "winter", "wise", "wooden", "yellow", "young", "zealous",
)  # fmt: skip
NOUNS = (
    "anchor", "arrow", "badger", "barrel", "basket", "beacon", "bear", "bell", "bishop", "boat", "bottle", "bridge",
    "canyon", "captain", "carpet", "castle", "cedar", "circle", "cloud", "comet", "compass", "crane", "crown",
    "dancer", "desert", "dragon", "drum", "eagle", "engine", "falcon", "farmer", "feather", "fiddle", "forest",
    "fountain", "fox", "galley", "garden", "gate", "glacier", "hammer", "harbor", "hawk", "heron", "hill", "horse",
    "island", "jacket", "kettle", "ladder", "lantern", "lemon", "lion", "lizard", "magnet", "maple", "market",
    "meadow", "mill", "mirror", "mountain", "needle", "ocean", "orchard", "otter", "palace", "panther", "parrot",
    "pebble", "pilot", "planet", "pocket", "prince", "quarry", "rabbit", "raven", "ribbon", "river", "rocket",
    "saddle", "sailor", "shield", "spider", "spoon", "station", "summit", "table", "teacher", "temple", "thunder",
    "tiger", "tower", "turtle", "valley", "wagon", "willow", "window", "wizard",
)  # fmt: skip
CODE_DIGITS = 6


@dataclass(frozen=True)
class Needle:
    """One fact to find: the access code of something."""

    name: str
    """Two words, such as "amber falcon"."""
    code: str
    """Six digits."""

    @property
    def sentence(self) -> str:
        """What is hidden in the text."""
        return f"The access code of the {self.name} is {self.code}."

    @property
    def question(self) -> str:
        """What follows the text; a right answer goes on with the code."""
        return f"Question: {self.chat_question}\nAnswer: The access code of the {self.name} is"

    @property
    def chat_question(self) -> str:
        """What a user asks in a chat after the text."""
        return f"What is the access code of the {self.name}?"

    def is_answered_by(self, answer: str) -> bool:
        """Whether the first number in `answer` is the code."""
        number = re.search(r"\d+", answer)
        return number is not None and number.group() == self.code


def draw_needle(rng: random.Random) -> Needle:
    """A needle with a name and a code drawn from `rng`."""
    name = f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"
    return Needle(name, "".join(rng.choice("0123456789") for _ in range(CODE_DIGITS)))
