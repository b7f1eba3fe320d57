"""What a word is in every script, in C++ and in numpy; near-duplicates and evaluation text without spaces are found."""

import json
import random
import unicodedata

import numpy as np
import pytest

from megalm.corpus import suffix
from megalm.corpus.dedup import shingles as shingles_module
from megalm.corpus.dedup.scripts import ALONE, JOINER, LEADING, LETTER, MARK, SEPARATOR, classify_characters
from megalm.corpus.dedup.shingles import hash_words, make_shingles
from tools.dedup.__main__ import main

CHINESE = (
    "北京大学创办于一八九八年初名师堂是中国近代第所立综合性学校位市海淀区拥有多个门类"
    "齐全资力量雄厚的了在人我们来他时地要就出会可也你对生能而子那得着下自之去过家说"
)
THAI = [
    "ประเทศ",
    "ไทย",
    "เป็น",
    "ที่",
    "ตั้ง",
    "อยู่",
    "ใน",
    "ภูมิภาค",
    "เอเชีย",
    "ตะวันออก",
    "เฉียง",
    "ใต้",
    "มี",
    "พรมแดน",
    "ติด",
    "กับ",
    "ลาว",
    "และ",
    "กัมพูชา",
    "น้ำ",
]


def plain_words(text):
    """The words of a text, character by character."""
    classes = classify_characters()
    words, word, alone, joins = [], "", False, False
    for character in text.lower():
        kind = classes[ord(character)]
        goes_on = kind in (MARK, JOINER) or (kind == ALONE and joins) or (kind == LETTER and not alone)
        if not goes_on:
            words.append(word)
            word, alone, joins = "", False, False
        if kind != SEPARATOR:
            alone, joins = alone or kind in (ALONE, LEADING), kind in (LEADING, JOINER)
            word += character
    return [found for found in [*words, word] if found]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The naïve CAFÉ, cafe\u0301!", "the naïve café cafe\u0301"),
        ("Съешь ещё — этих «мягких» булок…", "съешь ещё этих мягких булок"),
        ("Ἐν ἀρχῇ ἦν ὁ λόγος·", "ἐν ἀρχῇ ἦν ὁ λόγος"),
        ("مرحبًا، كيف حالك؟ می\u200cروم", "مرحبًا كيف حالك می\u200cروم"),
        ("नमस्ते दुनिया। १२३", "नमस्ते दुनिया १२३"),
        ("한국어는 띄어쓰기가 있다.", "한국어는 띄어쓰기가 있다"),
        ("የኢትዮጵያ፡ሕዝብ።", "የኢትዮጵያ ሕዝብ"),
        ("GPT模型，你好。2024年", "gpt 模 型 你 好 2024 年"),
        ("「カタカナー」と々", "カ タ カ ナー と 々"),
        ("か\u3099ぎ", "か\u3099 ぎ"),
        ("ที่เป็นไทย", "ที่ เป็ น ไท ย"),
        ("ພາສາລາວ", "ພາ ສາ ລາ ວ"),
        ("ភាសាខ្មែរ។", "ភា សា ខ្មែ រ"),
        ("မြန်မာ၊ သတ္တ", "မြ န် မာ သ တ္တ"),
        ("𠀀𠀁", "𠀀 𠀁"),
        ("a✓b🙂c", "a b c"),
        ("\u0301x", "\u0301x"),
    ],
)
def test_words_of_every_script(text, words):
    assert plain_words(text) == words.split(" ")
    hashes, ends = hash_words([text])
    alone, _ = hash_words(words.split(" "))
    assert hashes.tolist() == alone.tolist() and ends.tolist() == [len(hashes)]


def test_ascii_words_are_what_they_were():
    """By the definition that files on disk were made by: bytes of letters and digits, added up with powers."""
    text = "The quick_brown Fox2, don't!"
    expected = []
    for word in ("the", "quick", "brown", "fox2", "don", "t"):
        total, power = 0, 0x9E3779B97F4A7C15
        for byte in word.encode():
            total, power = (total + (byte + 1) * power) % 2**64, power * 0x9E3779B97F4A7C15 % 2**64
        expected.append(int(shingles_module.mix(np.array([total], np.uint64))[0]))
    assert hash_words([text])[0].tolist() == expected


def test_classes_are_those_of_unicode():
    classes = classify_characters()
    database = unicodedata.ucd_3_2_0  # the same in every Python
    for code in range(0x80, 0x20000):
        kind = database.category(chr(code))
        if kind != unicodedata.category(chr(code)):
            continue
        if kind in ("Zs", "Zl", "Zp", "Pd", "Ps", "Pe", "Pi", "Pf", "Sc", "Sm"):
            assert classes[code] == SEPARATOR, hex(code)
        if kind in ("Lu", "Ll", "Lt"):
            assert classes[code] == LETTER, hex(code)
        if kind[0] == "M":
            assert classes[code] in (LETTER, MARK, JOINER), hex(code)


def random_text(rng, pools):
    parts = [
        chr(rng.choice(pools[rng.randrange(6)])) if rng.random() < 0.6 else rng.choice("aB 9.\n") for _ in range(60)
    ]
    return "".join(parts[: rng.randrange(60)])


def test_cpp_and_numpy_agree_on_random_texts_of_all_scripts():
    if suffix.load_native() is None:
        pytest.skip("the extension was not built")
    rng = random.Random(9)
    classes = classify_characters()
    pools = [
        [code for code in np.flatnonzero(classes == kind).tolist() if not 0xD800 <= code < 0xE000] for kind in range(6)
    ]
    for _ in range(60):
        texts = [random_text(rng, pools) for _ in range(25)]
        for words in (1, 4):
            got, expected = make_shingles(texts, words), shingles_module._shingles(texts, words)
            assert all(np.array_equal(a, b) for a, b in zip(got, expected, strict=True)), texts
        for text in texts:
            hashes, plain = hash_words([text])[0].tolist(), plain_words(text)
            assert len(hashes) == len(plain) and len(set(hashes)) == len(set(plain)), text


def made(rng, units, count):
    return "".join(rng.choices(units, k=count))


def exchanged(rng, text, units, share):
    """The text with some of its characters, or words, exchanged."""
    return "".join(rng.choice(units) if rng.random() < share else part for part in text)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("script", ["chinese", "thai"])
def test_near_duplicates_without_spaces(tmp_path, script, native, monkeypatch):
    """Pairs of Jaccard similarity above 0.8 by runs of five words are found; texts of the same characters are not joined."""
    if not native:
        for name in ("shingles", "texts", "near"):
            monkeypatch.setattr(f"megalm.corpus.dedup.{name}.load_native", lambda: None)
    rng = random.Random(5)
    units = list(CHINESE) if script == "chinese" else THAI
    originals = [[rng.choice(units) for _ in range(300)] for _ in range(40)]
    copies = [exchanged(rng, text, units, 0.01) for text in originals[:20]]
    others = [exchanged(rng, text, units, 0.3) for text in originals[20:]]
    texts = ["".join(text) for text in [*originals, *copies, *others]]
    source = tmp_path / "in.jsonl"
    source.write_text(
        "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8"
    )
    assert main(["near", str(source), "--removed", str(tmp_path / "gone"), "--workers", "1"]) == 0
    gone = {(row["number"], row["duplicate_of"]["number"]) for row in map(json.loads, (tmp_path / "gone").open())}
    sets = []
    for text in texts:
        words = plain_words(text)
        sets.append({tuple(words[i : i + 5]) for i in range(len(words) - 4)})
    near = {
        (j, i)
        for i in range(len(texts))
        for j in range(i + 1, len(texts))
        if len(sets[i] & sets[j]) >= 0.8 * len(sets[i] | sets[j])
    }
    assert len(near) >= 15 and gone == near


def test_a_page_and_the_same_with_one_more_character(tmp_path, capsys):
    chinese = (
        "北京大学是中国最著名的高等学府之一，创办于一八九八年，初名京师大学堂。学校位于北京市海淀区，拥有多个校区，学科门类齐全。"
        * 2
    )
    thai = "ประเทศไทยเป็นประเทศที่ตั้งอยู่ในภูมิภาคเอเชียตะวันออกเฉียงใต้มีพรมแดนติดกับประเทศลาวและกัมพูชา" * 2
    japanese = (
        "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。何でも薄暗いじめじめした所で泣いていた。"
    )
    texts = [text + end for text in (chinese, thai, japanese) for end in ("", "完")]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for way in (["near"], ["semantic", "--clusters", "1", "--threshold", "0.9"]):
        assert main([*way, str(source), "--removed", str(tmp_path / "gone"), "--workers", "1"]) == 0
        assert [json.loads(line)["number"] for line in (tmp_path / "gone").open()] == [1, 3, 5]


def test_a_question_without_spaces_is_found(tmp_path, capsys):
    question = "下列关于光合作用的说法中哪一项是正确的请选择"
    texts = [f"前面的文字{question}后面的文字", "这一页说的是完全不同的事情，没有任何题目在里面。" * 3]
    for name, rows in (("in", texts), ("evaluation", [question, "太短了"])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    command = [
        "against",
        str(tmp_path / "in.jsonl"),
        "--evaluation",
        str(tmp_path / "evaluation.jsonl"),
        "--workers",
        "1",
    ]
    assert main([*command, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["removed"], answer["evaluation_documents_too_short"]) == (1, 1)
