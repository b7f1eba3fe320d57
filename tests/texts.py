"""Small texts and tokenizers that the tests of the data tools make for themselves."""

import random
import re

WORDS = re.findall(
    r"\w+",
    "the of and to in that it was for on as with his they at be this have from or one had by word but not what all were we when "
    "your can said there use an each which she do how their if will up other about out many then them these so some her would",
)


def sentences(seed, count):
    """Plain text of `count` sentences, the same for the same seed."""
    rng = random.Random(seed)
    return " ".join(" ".join(rng.choices(WORDS, k=rng.randrange(4, 12))).capitalize() + "." for _ in range(count))


def documents(count, seed=0):
    """Texts of different lengths, with some that are not English or not polite."""
    rng = random.Random(seed)
    texts = [sentences(seed * 1000 + i, rng.randrange(1, 20)) for i in range(count)]
    texts[1 % count] = "naïve café — 日本語\n\tdef f(x):\n    return x  # <|endoftext|> </s>\n"
    return texts
