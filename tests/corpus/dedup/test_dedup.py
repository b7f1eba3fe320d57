import json
import random
import tempfile
from itertools import combinations

import numpy as np
import pytest

import tools.dedup
from megalm.config.errors import ConfigError
from megalm.corpus import suffix
from megalm.corpus.dedup import near
from megalm.corpus.dedup import shingles as shingles_module
from megalm.corpus.dedup.contamination import find_contaminated
from megalm.corpus.dedup.corpus import Corpus
from megalm.corpus.dedup.exact import find_exact_duplicates
from megalm.corpus.dedup.near import find_near_duplicates
from megalm.corpus.dedup.removal import write_lists
from megalm.corpus.dedup.shingles import hash_words, jaccard, make_shingles
from megalm.corpus.dedup.substring import cut_spans, find_repeated_token_spans
from megalm.data.tokens import TokenFile
from tests.corpus.dedup.test_dedup_scripts import plain_words
from tests.data.test_loader import write
from tests.texts import documents, sentences
from tools.dedup.__main__ import main
from tools.subcommands import run_tool


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def corpus(tmp_path, texts, name="c"):
    path = tmp_path / f"{name}.jsonl"
    path.write_text("".join(json.dumps({"text": text, "n": i}) + "\n" for i, text in enumerate(texts)))
    return Corpus([str(path)])


def plain_shingles(text, words):
    """By the definition, in plain Python."""
    found = plain_words(text)
    return {tuple(found[i : i + words]) for i in range(max(len(found) - words + 1, min(len(found), 1)))}


def test_words_are_found_as_defined():
    hashes, ends = hash_words(["The cat, the CAT", "", "...", "naïve x1"])
    assert ends.tolist() == [4, 4, 4, 6]
    assert hashes[0] == hashes[2] and hashes[1] == hashes[3] and len(set(hashes.tolist())) == 4


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("words", [1, 2, 5])
def test_shingles_are_the_sets_of_runs(words, native, monkeypatch):
    if not native:
        monkeypatch.setattr(shingles_module, "load_native", lambda: None)
    texts = [*documents(30), "", "one", "one two", "a b a b a b a b", "!!!"]
    values, offsets = make_shingles(texts, words)
    runs: dict[tuple, int] = {}
    for number, text in enumerate(texts):
        mine, plain = values[offsets[number] : offsets[number + 1]], plain_shingles(text, words)
        assert len(mine) == len(plain) and (np.diff(mine.astype(object)) > 0).all()
        alone, _ = make_shingles([text], words)
        assert np.array_equal(alone, mine)
        if len(plain) == 1:
            runs.setdefault(next(iter(plain)), int(mine[0]))
    assert len(set(runs.values())) == len(runs)
    sets = [values[a:b] for a, b in zip(offsets[:-1], offsets[1:], strict=True)]
    for i, j in combinations(range(0, len(texts), 3), 2):
        a, b = plain_shingles(texts[i], words), plain_shingles(texts[j], words)
        assert jaccard(sets[i], sets[j]) == pytest.approx(len(a & b) / len(a | b) if a and b else 0.0)


def test_shingles_in_cpp_are_those_in_numpy():
    if suffix.load_native() is None:
        pytest.skip("the extension was not built")
    rng = random.Random(3)
    texts = ["".join(rng.choices("aB9 _.\né日\U0001f600 ", k=rng.randrange(200))) for _ in range(300)]
    texts += [" ".join(sentences(i, 1) for i in range(900)), "a " * 70, "x" * 5000, ""]
    for words in (1, 3, 60):
        for mine, reference in zip(make_shingles(texts, words), shingles_module._shingles(texts, words), strict=True):
            assert np.array_equal(mine, reference)


def test_exact_keeps_the_first(tmp_path):
    texts = documents(50) + ["same", "Same ", "same"] + documents(50)[10:20]
    removals = find_exact_duplicates(corpus(tmp_path, texts))
    assert {number: of for number, of, _ in removals} == {52: 50, **{53 + i: 10 + i for i in range(10)}}
    assert (51, 50, "the same text") in set(find_exact_duplicates(corpus(tmp_path, texts), normalize=True))


def changed(text, rng, share):
    words = text.split()
    for i in range(len(words)):
        if rng.random() < share:
            words[i] = f"w{rng.randrange(10**6)}"
    return " ".join(words)


def test_near_duplicates_agree_with_comparing_all_pairs(tmp_path):
    """Recall and precision of pairs of similarity 0.8 and more against brute force; clusters by their transitive closure."""
    rng = random.Random(4)
    texts = [sentences(i, 25) for i in range(120)]
    texts += [changed(texts[rng.randrange(120)], rng, rng.choice([0.0, 0.01, 0.02, 0.04, 0.08])) for _ in range(150)]
    rng.shuffle(texts)
    removals, pairs = find_near_duplicates(corpus(tmp_path, texts))
    sets = [plain_shingles(text, 5) for text in texts]
    true = [
        (i, j) for i, j in combinations(range(len(texts)), 2) if len(sets[i] & sets[j]) >= 0.8 * len(sets[i] | sets[j])
    ]
    assert len(true) > 80 and set(zip(pairs["first"].tolist(), pairs["second"].tolist(), strict=True)) <= set(true)
    parent = list(range(len(texts)))

    def root(x):
        return x if parent[x] == x else root(parent[x])

    for i, j in true:
        parent[max(root(i), root(j))] = min(root(i), root(j))
    expected = {x: root(x) for x in range(len(texts)) if root(x) != x}
    got = {number: of for number, of, _ in removals}
    assert len(set(got) & set(expected)) >= 0.97 * len(expected) and set(got) <= set(expected)
    assert sum(got[x] == expected[x] for x in got) >= 0.97 * len(got)


def test_large_buckets_and_empty_documents(tmp_path):
    texts = ["", "!"] + [sentences(1, 10)] * (near.ALL_PAIRS + 20) + [""]
    removals, _ = find_near_duplicates(corpus(tmp_path, texts))
    assert {number: of for number, of, _ in removals} == {i: 2 for i in range(3, len(texts) - 1)}


def test_contamination(tmp_path):
    question = sentences(77, 4)
    texts = [
        sentences(1, 10),
        sentences(2, 3) + " " + question.upper().replace(" ", "\n ") + " " + sentences(3, 3),
        sentences(4, 9),
    ]
    evaluation = corpus(tmp_path, [question, "too short"], "e")
    source = corpus(tmp_path, texts)
    found = find_contaminated(source, evaluation)
    assert [number for number, _, _ in found.removals] == [1] and found.too_short == 1
    write_lists(source, found.removals, None, str(tmp_path / "gone"))
    (row,) = (json.loads(line) for line in (tmp_path / "gone").read_text().splitlines())
    assert row["number"] == 1 and "in its document 0" in row["why"]
    assert row["evaluation"] == {"number": 0, "file": str(tmp_path / "e.jsonl"), "place": "byte 0"}
    with pytest.raises(ConfigError, match="--words"):
        find_contaminated(corpus(tmp_path, texts), corpus(tmp_path, ["short"], "e"))


def brute_spans(documents, length):
    """Tokens that lie in a window which occurred before without overlapping its first occurrence."""
    seen, flagged, at = {}, set(), 0
    for document in documents:
        for i in range(len(document) - length + 1):
            window = tuple(document[i : i + length])
            first = seen.setdefault(window, at + i)
            if at + i >= first + length:
                flagged.update(range(at + i, at + i + length))
        at += len(document)
    return flagged


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("chunk", [7, 64, 1200, 1 << 24])
def test_repeated_spans_are_those_of_the_definition(tmp_path, monkeypatch, chunk, native):
    if not native:
        monkeypatch.setattr(suffix, "load_native", lambda: None)
    count = 10 if chunk < 12 else 40  # each chunk is compared with every other
    rng = np.random.default_rng(chunk)
    pool = [rng.integers(0, 500, rng.integers(5, 40)) for _ in range(20)]
    texts = [
        np.concatenate([pool[k] for k in rng.integers(0, 20, 5)] + [rng.integers(0, 500, 10)]) for _ in range(count)
    ]
    texts.append(np.full(60, 3))
    file = TokenFile(write(tmp_path / "t", texts))
    spans = find_repeated_token_spans(file, 12, chunk=chunk)
    got = {token for span in spans for token in range(span.start, span.stop)}
    assert got == brute_spans([text.tolist() for text in texts], 12) and len(got) > 500
    for span in spans:
        assert file.tokens[span.start : span.start + 12].tolist() == file.tokens[span.first : span.first + 12].tolist()
    result = cut_spans(file, spans, str(tmp_path / "out"), str(tmp_path / "removed.jsonl"))
    left = TokenFile(tmp_path / "out")
    stream = np.concatenate(texts)
    assert left.tokens.tolist() == np.delete(stream, sorted(got)).tolist()
    assert result["tokens_cut"] == len(got) == file.num_tokens - left.num_tokens
    rows = [json.loads(line) for line in (tmp_path / "removed.jsonl").read_text().splitlines()]
    assert sum(row["tokens"] for row in rows) == len(got)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
@pytest.mark.parametrize("native", [True, False])
def test_suffix_arrays_sort_all_suffixes(dtype, native, monkeypatch):
    if native and suffix.load_native() is None:
        pytest.skip("the extension was not built")
    if not native:
        monkeypatch.setattr(suffix, "load_native", lambda: None)
    rng = np.random.default_rng(5)
    for _ in range(60):
        short = rng.integers(0, rng.choice([1, 2, 3, 200]), rng.integers(0, 60)).astype(dtype)
        for text in (short, np.tile(short[:7], 4)):
            expected = sorted(range(len(text)), key=lambda i: text[i:].tolist())
            assert suffix.build_suffix_array(text).tolist() == expected
    long = np.concatenate((rng.integers(0, 100, 30_000), np.zeros(3000, np.int64))).astype(dtype)
    order = suffix.build_suffix_array(long)
    assert np.array_equal(np.sort(order), np.arange(len(long)))
    rank = np.empty(len(long) + 1, np.int64)
    rank[order], rank[-1] = np.arange(len(long)), -1
    before, after = order[:-1], order[1:]  # each adjacent pair: by the first symbol, then by the rest's own order
    assert (long[before] <= long[after]).all()
    same = long[before] == long[after]
    assert (rank[before + 1][same] < rank[after + 1][same]).all()


def test_indices_of_64_bits(monkeypatch):
    native = suffix.load_native()
    if native is None:
        pytest.skip("the extension was not built")
    text = np.random.default_rng(1).integers(0, 9, 5000).astype(np.uint16)
    out = np.empty(len(text), np.int64)
    assert native.suffix_array(text.ctypes.data, 2, len(text), 9, out.ctypes.data, 8)
    assert np.array_equal(out, suffix.build_suffix_array(text))


def test_lists_say_what_went_and_why(tmp_path):
    source = corpus(tmp_path, ["a", "b", "a"])
    counts = write_lists(source, find_exact_duplicates(source), str(tmp_path / "kept"), str(tmp_path / "gone"))
    assert (counts.documents, counts.removed) == (3, 1)
    assert [json.loads(line) for line in (tmp_path / "kept").open()] == [{"text": "a", "n": 0}, {"text": "b", "n": 1}]
    (row,) = (json.loads(line) for line in (tmp_path / "gone").open())
    assert row["place"] == "byte 44" and row["duplicate_of"]["place"] == "byte 0" and row["why"] == "the same text"


def test_bad_documents_are_listed_and_the_rest_goes_on(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n{oops\n{"text": "a"}\n')
    with pytest.raises(ConfigError, match=r"c\.jsonl: byte 24: invalid UTF-8.*--skip-bad"):
        find_exact_duplicates(Corpus([str(path)]))
    source = Corpus([str(path)], skip_bad=True)
    counts = write_lists(source, find_exact_duplicates(source), str(tmp_path / "kept"), str(tmp_path / "gone"))
    assert (counts.documents, counts.removed, counts.bad) == (2, 1, 2)
    rows = [json.loads(line) for line in (tmp_path / "gone").read_text().splitlines()]
    assert [row["place"] for row in rows] == ["byte 24", "byte 28", "byte 34"]
    assert "invalid UTF-8" in rows[0]["why"] and rows[2]["why"] == "the same text"


def test_command_line(tmp_path, capsys):
    source = tmp_path / "c.jsonl"
    corpus(tmp_path, [*documents(20), *documents(5)])
    kept = str(tmp_path / "kept.jsonl")
    assert run_tool(tools.dedup, ["exact", str(source), "--output", kept, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["removed"] == 5
    assert len((tmp_path / "kept.jsonl").read_text().splitlines()) == 20
    assert run_tool(tools.dedup, ["against", str(source), "--evaluation", kept, "--words", "4"]) == 0
    with_runs = sum(
        len(plain_shingles(text, 4)) > 0 and len(text.split()) >= 4 for text in [*documents(20), *documents(5)]
    )
    assert f"{with_runs} to remove" in capsys.readouterr().out
    assert main(["--against", kept, str(source), "--words", "4", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert main(["--against=" + kept, str(source), "--words", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == answer and answer["removed"] == with_runs
    assert run_tool(tools.dedup, ["exact", str(source), "--output", str(source)]) == 2
    assert "is an input" in capsys.readouterr().err
    for target, message in (
        (str(tmp_path), "is no file"),
        (kept + "/under/a/file", "cannot be written"),
        *((f"{kept}.{ending}", "results are JSON lines") for ending in ("parquet", "csv", "txt", "gz", "zst")),
    ):
        assert run_tool(tools.dedup, ["exact", str(source), "--output", target]) == 2
        assert message in capsys.readouterr().err
    assert run_tool(tools.dedup, ["exact", str(source), "--output", "x", "--removed", "./x"]) == 2
    assert "give two files" in capsys.readouterr().err
    prefix = write(tmp_path / "t", [np.arange(100), np.arange(100)])
    assert run_tool(tools.dedup, ["substring", prefix, "--output", str(tmp_path / "u"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens_cut"] == 100
    assert TokenFile(tmp_path / "u").num_documents == 1
    assert run_tool(tools.dedup, ["substring", prefix, "--output", prefix]) == 2
