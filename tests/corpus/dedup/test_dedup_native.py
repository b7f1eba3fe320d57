"""What deduplication does in C++ is what its numpy and Python references do, for every instruction set."""

import json
import random
from itertools import combinations

import numpy as np
import pytest

from megalm.corpus import json_lines, suffix
from megalm.corpus.dedup import near
from megalm.corpus.dedup import shingles as shingles_module
from megalm.corpus.dedup import texts as texts_module
from megalm.corpus.dedup.corpus import Corpus
from megalm.corpus.dedup.shingles import hash_bands, make_shingles
from megalm.corpus.dedup.texts import Texts
from megalm.corpus.documents import BadDocument, Piece, read_json_line, read_piece
from tests.texts import documents, sentences


@pytest.fixture(params=[0, 1, 2], ids=["baseline", "avx2", "avx512"])
def isa(request):
    library = suffix.load_native()
    if library is None:
        pytest.skip("the extension was not built")
    if request.param > library.best_cpu_isa():
        pytest.skip("this processor does not have it")
    before = library.cpu_isa()
    library.set_cpu_isa(request.param)
    yield request.param
    library.set_cpu_isa(before)


def without_extension(monkeypatch, *modules):
    for module in modules:
        monkeypatch.setattr(module, "load_native", lambda: None)


SAMPLES = [
    b'{"text": "plain", "n": 1}',
    b'{"n": [1, -2.5e+10, true, null, {"text": "inner"}], "text": "caf\xc3\xa9 \xf0\x9f\x98\x80", "x": ""}',
    rb'{"text": "\u00e9\ud83d\ude00 \n\t\"\\\/\b\f\r \u0000", "a\nb": "\ud800"}',
    b' { "text" : "" } ',
    b'{"text": "' + b"long " * 60 + b'"}\r',
    b"",
    b" \t",
    b'"a text alone"',
    b'{"text": 5}',
    b'{"other": "x"}',
    b'{"text": "twice", "text": "last"}',
    rb'{"te\u0078t": "escaped key"}',
    rb'{"text": "half \ud800"}',
    b'{"text": "bad \xff"}',
    b'{"text": "over \xc0\xaf long, \xed\xa0\x80"}',
    b'{"text": "x"',
    b'{"text": "x"} y',
    b'{"text": "x", }',
    b'{"text": "tab\there"}',
    b'{"text": "x", "n": 01}',
    b'{"text": "x", "n": NaN}',
    b'{"text": "x", "n": ' + b"1" * 1200 + b"}",
    b'{"text": "x", "n": ' + b"[" * 80 + b"]" * 80 + b"}",
    b"{}",
    b"[]",
    b"\xef\xbb\xbf{}",
]


def by_lines(block, offset, field):
    """What the reader of documents makes of the lines: (line, document)"""
    found, at = [], offset
    for line in [part + b"\n" for part in block.split(b"\n")[:-1]] + [block.split(b"\n")[-1]]:
        if line.strip():
            found.append((at, len(line), read_json_line(line, at, field)))
        at += len(line)
    return found


def check(block, offset=0, field="text"):
    got = json_lines.parse(block, offset, field)
    expected = by_lines(block, offset, field)
    good = [(at, size, found) for at, size, found in expected if not isinstance(found, BadDocument)]
    assert list(Texts(got.data, got.ends, got.ascii)) == [found.text for _, _, found in good]
    assert got.ascii.tolist() == [found.text.isascii() for _, _, found in good]
    assert got.begins.tolist() == [at for at, _, _ in good]
    assert [found for _, found in got.bad] == [found for _, _, found in expected if isinstance(found, BadDocument)]
    for index, (at, size, found) in enumerate(good):
        assert got.sizes[index] == (size if found.fields else -size), at
    for (before, found), place in zip(got.bad, [x for x in expected if isinstance(x[2], BadDocument)], strict=True):
        assert before == sum(at < place[0] for at, _, _ in good), found


def test_json_lines_are_read_as_python_reads_them(isa):
    for sample in SAMPLES:
        check(sample)
        check(b"\n".join([b'{"text": "before"}', sample, b'{"text": "behind"}\n']), 77)
    check(b"\n".join(SAMPLES), 5)
    check(b"\n".join(SAMPLES), 5, "n")
    check(b'{"meta": {"text": "inside"}, "a": "1"}\n{"meta.text": "whole"}\n', 0, "meta.text")
    check(b'{"a": "1", "b": "2"}\n', 0, "{a} and {b}")


def test_damaged_json_lines_are_read_as_python_reads_them(isa):
    rng = random.Random(isa)
    for _ in range(1500):
        line = bytearray(rng.choice(SAMPLES[:5]))
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(line) + 1)
            line[at : at + rng.randrange(3)] = rng.choice(
                [
                    b'"',
                    b"\\",
                    b"{",
                    b"}",
                    b",",
                    b":",
                    b"\xc3",
                    b"\xa9",
                    b"\x00",
                    b"u",
                    b"\n",
                    b"[",
                    b"text",
                    b"\\u",
                    b"e",
                ]
            )
        check(bytes(line), 3)


def test_pieces_of_json_lines_hold_what_documents_says(tmp_path, monkeypatch):
    monkeypatch.setattr(json_lines, "BLOCK", 64)
    path = tmp_path / "c.jsonl"
    lines = [json.dumps({"text": text}, ensure_ascii=i % 2 == 0).encode() for i, text in enumerate(documents(20))]
    path.write_bytes(b"\n".join([*lines, b"", b'"alone"', b"oops", b'{"text": "end"}']))
    size = path.stat().st_size
    for native in (True, False):
        if not native:
            without_extension(monkeypatch, json_lines)
        for step in (50, 333, size):
            got, expected = [], []
            for start in range(0, size, step):
                stop = min(start + step, size)
                piece = Piece(str(path), size) if step == size else Piece(str(path), stop - start, start, stop)
                for part in json_lines.read_lines(piece, "text"):
                    texts = list(Texts(part.data, part.ends, part.ascii))
                    got += [(f"byte {at}", text) for at, text in zip(part.begins.tolist(), texts, strict=True)]
                    got += [(found.place, found.reason) for _, found in part.bad]
                for found in read_piece(piece, "text"):
                    expected.append((found.place, found.reason if isinstance(found, BadDocument) else found.text))
            assert sorted(got) == sorted(expected) and len(got) == 23


def test_small_letters_are_those_of_python(isa, monkeypatch):
    everything = [chr(code) for code in range(0x80, 0x20200) if not 0xD800 <= code < 0xE000]
    texts = ["".join(everything[at : at + 50]) for at in range(0, len(everything), 50)]
    texts += ["ΑΣ ΣΑ", "İstanbul ŞIŞ", "KELVIN \u212a", "ascii ONLY", "", "\u023a\u023e" * 9, "日本 É" * 20]
    data, ends = Texts.of(texts).in_lower_case()
    got = list(Texts(data, ends, np.zeros(len(ends), bool)))
    assert [text.lower() for text in got] == [text.lower() for text in texts]
    for mine, text in zip(got, texts, strict=True):
        assert [c for c in mine if c > "\x7f"] == [c for c in text.lower() if c > "\x7f"]
    without_extension(monkeypatch, texts_module, shingles_module)
    reference = make_shingles([*texts], 1)
    monkeypatch.undo()
    assert all(np.array_equal(a, b) for a, b in zip(make_shingles(texts, 1), reference, strict=True))


def test_signatures_are_those_of_numpy(isa):
    rng = np.random.default_rng(1)
    sizes = np.array([0, 1, 2, 700, 0, 33, 5000])
    values = rng.integers(0, 2**64, sizes.sum(), np.uint64)
    offsets = np.concatenate(([0], np.cumsum(sizes)))
    for bands, rows in ((21, 6), (1, 1), (3, 43)):
        factors, addends = rng.integers(0, 2**32, (2, bands, rows), np.uint32)
        expected = shingles_module._band_hashes(values, offsets, factors | np.uint32(1), addends)
        got = hash_bands(values, offsets, factors | np.uint32(1), addends)
        assert np.array_equal(got, expected) and len(np.unique(got[:, [1, 2, 3, 5, 6]])) == 5 * bands


def test_sets_in_cpp_are_those_of_numpy(isa):
    texts = [*documents(40), "a b " * 40_000, "q " * 3000, " ".join(f"w{i % 977}" for i in range(20_000))]
    for mine, reference in zip(make_shingles(texts, 2), shingles_module._shingles(texts, 2), strict=True):
        assert np.array_equal(mine, reference)


def test_minima_agree_as_often_as_the_sets_are_alike():
    """The share of equal minima estimates the Jaccard similarity without bias: 126 functions, 300 pairs of sets."""
    rng = np.random.default_rng(2)
    for common, apart in ((40, 10), (200, 200), (3, 1)):
        similarity = common / (common + 2 * apart)
        parts = []
        for _ in range(300):
            drawn = rng.integers(0, 2**64, common + 2 * apart, np.uint64)
            parts += [drawn[: common + apart], np.concatenate((drawn[:common], drawn[common + apart :]))]
        offsets = np.arange(601) * (common + apart)
        # a band of one row: its hash tells the minimum
        hashes = hash_bands(np.concatenate(parts), offsets, near._FACTORS.reshape(-1, 1), near._ADDENDS.reshape(-1, 1))
        equal = (hashes[:, 0::2] == hashes[:, 1::2]).mean(axis=0)
        deviation = (similarity * (1 - similarity) / 126) ** 0.5
        assert abs(equal.mean() - similarity) < 5 * deviation / 300**0.5
        assert 0.8 < equal.std() / deviation < 1.25


def by_buckets(hashes, numbers):
    pairs = set()
    for band in hashes.tolist():
        buckets: dict[int, list[int]] = {}
        for number, value in zip(numbers.tolist(), band, strict=True):
            buckets.setdefault(value, []).append(number)
        for bucket in buckets.values():
            if len(bucket) <= near.ALL_PAIRS:
                pairs |= set(combinations(bucket, 2))
            else:
                pairs |= {(bucket[0], other) for other in bucket[1:]} | set(zip(bucket, bucket[1:], strict=False))
    return sorted(pairs)


def test_candidates_share_a_bucket():
    rng = np.random.default_rng(3)
    values = rng.integers(0, 2**64, 60, np.uint64)
    for count in (0, 1, 2, 500):
        numbers = np.sort(rng.choice(10**6, count, replace=False))
        hashes = values[rng.integers(0, 60, (3, count)) * (rng.random((3, count)) < 0.7)]
        assert [tuple(p) for part in near._candidates(hashes, numbers) for p in part.tolist()] == by_buckets(
            hashes, numbers
        )


def test_near_duplicates_are_the_same_without_the_extension(tmp_path, monkeypatch):
    if suffix.load_native() is None:
        pytest.skip("the extension was not built")
    path = tmp_path / "c.jsonl"
    texts = [sentences(i, 12) for i in range(60)]
    texts += [text.replace("the", "a", 1) + " naïve É" for text in texts[:40]] + ["", "?"]
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))
    found = []
    for native in (True, False):
        if not native:
            without_extension(monkeypatch, texts_module, shingles_module, json_lines, near)
        with Corpus([str(path)]) as corpus:
            removals, pairs = near.find_near_duplicates(corpus, 0.7)
            found.append((list(removals), pairs.tolist()))
    assert found[0] == found[1] and len(found[0][0]) > 20


def test_clusters_are_the_connected_documents():
    rng = random.Random(5)
    for edges in (0, 30, 200):
        first, second = np.array([sorted(rng.sample(range(150), 2)) for _ in range(edges)], np.int64).reshape(-1, 2).T
        root = near._smallest_connected(150, first, second)
        expected = list(range(150))
        for _ in range(150):
            for a, b in zip(first.tolist(), second.tolist(), strict=True):
                expected[a] = expected[b] = min(expected[a], expected[b])
        assert root.tolist() == expected
    chain = np.arange(9999)
    assert not near._smallest_connected(10_000, chain, chain + 1).any()
