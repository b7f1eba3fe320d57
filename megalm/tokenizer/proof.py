"""The texts on which a fast tokenizer must agree with the exact one before it is used."""

from __future__ import annotations

import random
from collections.abc import Sequence

NAMES = 2048  # of added tokens that are tried: some vocabularies reserve six thousand, alike but for a number
TOGETHER = 16  # names in a text: a library takes its time for a call, not for a name
OVERLAPS = 200  # pairs of names that are tried


def make_proof_texts(names: Sequence[str] = ()) -> list[str]:
    """Make texts on which tokenizers differ when they differ at all: spaces, numbers, scripts, emoji, controls, random
    code points, and names of added tokens."""
    texts = [
        "",
        " ",
        "\n",
        "  \n\n \t\t x",
        "a" * 3000,
        "ab " * 700,
        "0123456789 1,234.5678e-9 \u0661\u0662\u0663 \u00bd",
    ]
    texts += [
        "don't I'LL we'Ve o'clock 'S",
        "def f(x):\n    return  x ** 2   # done\n\n\n",
        "\x00\x01\x7f\x85\u2028\u2029",
    ]
    texts += ["<s></s><|endoftext|><|begin_of_text|>[CLS]<pad>", "\r\n\r\r\n \u00a0\u2003\u3000\u200b\ufeff"]
    texts += [
        "Ünïcödé ßẞ İı ŉ ǆ ﬁ",
        "한국어 日本語 中文 ไทย हिन्दी العربية עברית",
        "e\u0301 \u0301 \u0e33 \u1100\u1161\u11a8",
    ]
    texts += [
        "\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \u261d\U0001f3fd \U0001f9ff",
        "CamelCaseHTTPServer snake_case x1y2z3",
    ]
    texts += ["http://a.b/c?d=e&f#g %20 __init__ ===>>> ++i"]
    rng = random.Random(20)
    ranges = [(32, 127), (32, 127), (0xA0, 0x250), (0x300, 0x370), (0x400, 0x500), (0x900, 0xE80), (0x2000, 0x2070)]
    ranges += [(0x3040, 0x3100), (0x4E00, 0x9FA5), (0xAC00, 0xD7A3), (0x1F300, 0x1FAFF), (9, 14)]
    for _ in range(300):
        pieces = []
        for _ in range(rng.randrange(1, 12)):
            low, high = rng.choice(ranges)
            pieces.append("".join(chr(rng.randrange(low, high)) for _ in range(rng.randrange(1, 9))))
            pieces.append(rng.choice(["", " ", "  ", "\n", "'s"]))
        texts.append("".join(pieces))
    return texts + _texts_of_names(list(names))


def _texts_of_names(names: list[str]) -> list[str]:
    """Names of added tokens alone, inside and around words, with spaces on each side (some swallow them), in another case
    (some are looked for behind a normalizer), cut short, and running into one another."""
    texts = [*names[:TOGETHER]]
    for start in range(0, min(len(names), NAMES), TOGETHER):
        some = names[start : start + TOGETHER]
        texts.append("".join(f"one{name}two {name} three\n{name}{name}" for name in some))
        texts.append("".join(f"a  {name}  b\t{name}\n\n{name}." for name in some))
        texts.append(" ".join(f"{name.upper()} {name.lower()} {name[:-1]} {name[1:]} {name}s" for name in some))
    return texts + _overlaps(names)


def _overlaps(names: list[str]) -> list[str]:
    """One name whose end begins another, and one inside another: which of them a library takes first differs."""
    beginnings: dict[str, list[str]] = {}
    for name in names[:NAMES]:
        for length in range(1, len(name)):
            beginnings.setdefault(name[:length], []).append(name)
    found = []
    for name in names[:NAMES]:
        for length in range(1, len(name)):
            for other in beginnings.get(name[-length:], ())[:2]:
                found.append(f"x {name}{other[length:]} y{name[:-length]}{other}")
    return found if len(found) <= OVERLAPS else random.Random(21).sample(found, OVERLAPS)
