"""Words, counts, edited lines and decisions are those of spaCy and datatrove."""

import random
from pathlib import Path

import pytest
import yaml

from megalm.corpus.dedup.texts import Texts
from megalm.corpus.filter import english
from megalm.corpus.filter.scores import COUNTS, STOP_WORDS, CountSettings, count_texts
from tests.corpus.filter.referee import judge, judge_by_datatrove
from tests.texts import sentences

PARTS = [
    "can't",
    "I'm",
    "U.S.A.",
    "e.g.",
    "p.m.",
    "10km",
    "5$",
    "US$5",
    "http://www.example.com/a",
    "a@b.co",
    "foo.bar",
    "x.y.z.",
    "Mr.Smith",
    ":)",
    ";-)",
    "10.0.0.1",
    "8.8.8.8:80",
    "cannot",
    "and/or",
    "don’t",
    "...",
    "o'clock",
    "1,000.5",
    "C++",
    "10a.m.",
    "x--y",
    "--",
    "…",
    "……",
    "中文。",
    "αβγ.",
    "50%",
    "20°C.",
    "(e.g.,",
    "won't've",
    "'em",
    "rock'n'roll",
    '"Hello,"',
    "end.)",
    "U.S.",
    "Ph.D.,",
    "5+5",
    "3-4",
    "a=b",
    "[1]",
    "[edit]",
    "mailto:joe@x.org",
    "日本語テキスト",
    "ไทยภาษา",
    "😀😀",
    "😀word",
    "{",
    "JavaScript",
    "lorem",
    "ipsum",
    "use",
    "cookies",
    "•",
    "-",
    "#",
    "the",
    "of",
    "and",
]
SIGNS = "aAbz019.,'’-–—…/:<>=+*^~()[]$€%°FCk \n\t@#_·“é中αя\u00a0USms\r\u2028\x0b"


def random_texts(count: int, seed: int = 1) -> list[str]:
    """Texts of odd pieces and odd signs."""
    rng = random.Random(seed)
    made = []
    for number in range(count):
        if number % 2:
            made.append("".join(rng.choice(SIGNS) for _ in range(rng.randint(1, 80))))
        else:
            ends = ["", " ", " ", "  ", "\n", "\n\n", ".", ",", ")"]
            made.append("".join(rng.choice(PARTS) + rng.choice(ends) for _ in range(rng.randint(1, 30))))
    return made


def pages(count: int) -> list[str]:
    """Prose with lines, paragraphs, lists and repeats, of which the rules keep some and drop others."""
    rng = random.Random(5)
    made = []
    for number in range(count):
        lines = [
            sentences(1000 + 31 * number + line, rng.randint(1, 4)) for line in range(rng.choice((1, 2, 3, 6, 14)))
        ]
        lines += rng.choices(lines, k=rng.choice((0, 0, 1, 4)))
        lines += [f"- item {i}" for i in range(rng.choice((0, 0, 3, 30)))]
        lines += rng.choices(
            ["Read more...", "We use cookies.", "int main() { return 0; }", "[edit]"], k=rng.choice((0, 0, 1))
        )
        made.append(rng.choice(("\n", "\n\n", "\n")).join(lines))
    return made


def sources(count: int) -> list[str]:
    """Programs: the beginnings of files of this repository."""
    files = sorted(Path(__file__).parents[3].glob("megalm/**/*.py"))[:count]
    return [file.read_text(encoding="utf-8")[:6000] for file in files]


KINDS = {"pages": lambda: pages(150), "odd": lambda: random_texts(300), "programs": lambda: sources(60)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("preset", ["gopher_repetition", "gopher_quality", "c4", "fineweb_quality", "fineweb"])
def test_decisions_are_those_of_datatrove(preset, kind):
    texts = KINDS[kind]()
    ours, theirs = judge(preset, texts), judge_by_datatrove(preset, texts)
    for text, mine, reference in zip(texts, ours, theirs, strict=True):
        assert mine[0] == reference[0] and (mine[1] == reference[1] or "Error" in reference[1]), (text, mine, reference)
        if mine[0]:
            assert mine[2] == reference[2]


def test_the_pages_are_decided_both_ways():
    for preset in ("gopher_quality", "gopher_repetition", "c4", "fineweb_quality"):
        stays = [stays for stays, _, _ in judge(preset, pages(150))]
        assert 10 < sum(stays) < 140, preset


def test_counts_are_those_of_datatrove():
    pytest.importorskip("spacy")
    pytest.importorskip("datatrove")
    from datatrove.pipeline.filters.gopher_repetition_filter import find_all_duplicate, find_top_duplicate, get_n_grams
    from datatrove.utils.text import PUNCTUATION_SET, split_into_words

    texts = [*random_texts(400, 2), *pages(40)]
    table = count_texts(Texts.of(texts), CountSettings()).table.tolist()
    for text, row in zip(texts, table, strict=True):
        words = split_into_words(text, "eng")
        plain = [word for word in words if any(sign not in PUNCTUATION_SET for sign in word)]
        expected = {
            "characters": len(text),
            "words": len(words),
            "plain_words": len(plain),
            "plain_word_characters": sum(map(len, plain)),
            "alphabetic_words": sum(any(sign.isalpha() for sign in word) for word in words),
            "stop_words": len(set(STOP_WORDS) & set(words)),
            "lines": len(text.splitlines()),
            "ellipses": text.count("...") + text.count("…"),
        }
        for n in (2, 3, 4):
            grams = get_n_grams(words, n)
            expected[f"top_{n}_gram_characters"] = find_top_duplicate(grams) if grams else 0
        for n in range(5, 11):
            expected[f"repeated_{n}_gram_characters"] = find_all_duplicate(words, n)
        found = dict(zip(COUNTS, row, strict=True))
        assert {name: found[name] for name in expected} == expected, text


def test_exceptions_are_those_of_spacy():
    spacy = pytest.importorskip("spacy")
    rules = {
        whole: tuple(piece[65] for piece in pieces)  # 65: ORTH
        for whole, pieces in spacy.blank("en").tokenizer.rules.items()
        if not whole.isspace()
    }
    assert english.list_exceptions() == rules


def test_a_text_counts_alike_alone_and_among_others():
    texts = [*pages(6), "", *random_texts(20)]
    together = count_texts(Texts.of(texts), CountSettings()).table
    for number, text in enumerate(texts):
        assert (count_texts(Texts.of([text]), CountSettings()).table[0] == together[number]).all()


def test_presets_are_yaml_of_rules():
    folder = Path(english.__file__).parent / "presets"
    for file in folder.glob("*.yaml"):
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        assert content["description"] and content["rules"], file
