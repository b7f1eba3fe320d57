"""Both passes over a table see the same rows, whichever columns they read: who stays is told by the place."""

import json

import numpy as np
import pytest

from tests.texts import sentences
from tools.dedup.__main__ import main

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

LONG = [sentences(i, 8) for i in range(4)]
X, A, B = LONG[:3]
ROWS = [X, A, A, B]
WAYS = {
    "exact": [],
    "near": [],
    "semantic": ["--clusters", "1"],
    "substring": ["--bytes", "60"],
}


def broken_strings(count, kind="string"):
    """The first is no UTF-8."""
    data = b"\xff" + b"u" * (count - 1)
    if kind == "large_string":
        return pa.LargeStringArray.from_buffers(
            count, pa.py_buffer(np.arange(count + 1, dtype="<i8").tobytes()), pa.py_buffer(data)
        )
    return pa.StringArray.from_buffers(
        count, pa.py_buffer(np.arange(count + 1, dtype="<i4").tobytes()), pa.py_buffer(data)
    )


def numbers_as(kind, values):
    return pa.array(values, pa.int32() if kind.bit_width == 32 else pa.int64()).view(kind)


OTHERS = {
    "string": (lambda n: broken_strings(n), "\udcff"),
    "large string": (lambda n: broken_strings(n, "large_string"), "\udcff"),
    "dictionary": (
        lambda n: pa.DictionaryArray.from_arrays(pa.array(range(n), pa.int16()), broken_strings(n)),
        "\udcff",
    ),
    "struct": (
        lambda n: pa.StructArray.from_arrays([broken_strings(n), pa.array(range(n))], ["u", "n"]),
        {"u": "\udcff", "n": 0},
    ),
    "list": (lambda n: pa.ListArray.from_arrays(list(range(n + 1)), broken_strings(n)), ["\udcff"]),
    "map": (
        lambda n: pa.MapArray.from_arrays(list(range(n + 1)), pa.array(["k"] * n), broken_strings(n)),
        [["k", "\udcff"]],
    ),
    "far timestamp": (lambda n: numbers_as(pa.timestamp("us"), [2**62] * n), "148108-07-06 14:00:27.387904"),
    "nanoseconds": (lambda n: numbers_as(pa.timestamp("ns"), [1] * n), "1970-01-01 00:00:00.000000001"),
    "unknown zone": (
        lambda n: numbers_as(pa.timestamp("us", tz="Mars/Phobos"), [1] * n),
        "1970-01-01 00:00:00.000001+00:00",
    ),
    "far day": (lambda n: numbers_as(pa.date32(), [2**30] * n), "2941775-04-07"),
    "long duration": (lambda n: numbers_as(pa.duration("s"), [2**60] * n), "1152921504606846976 seconds"),
    "time of day": (lambda n: numbers_as(pa.time64("ns"), [1] * n), "00:00:00.000000001"),
}


def write(path, table):
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
    return str(path)


def run(way, source, folder, *more):
    outputs = ["--output", str(folder / "kept.jsonl"), "--removed", str(folder / "gone.jsonl")]
    assert main([way, source, *outputs, *WAYS.get(way, []), "--workers", "1", *more]) == 0
    return [
        [json.loads(line) for line in (folder / name).read_text().splitlines()] for name in ("kept.jsonl", "gone.jsonl")
    ]


@pytest.mark.parametrize("ending", ["parquet", "arrow"])
@pytest.mark.parametrize("other", OTHERS)
def test_a_value_of_another_column_does_not_decide_who_stays(tmp_path, other, ending):
    make, expected = OTHERS[other]
    source = write(tmp_path / f"in.{ending}", pa.table({"text": ROWS, "other": make(4)}))
    if (other, ending) == ("dictionary", "parquet"):  # pyarrow does not give such a column at all
        assert main(["exact", source, "--output", str(tmp_path / "k"), "--workers", "1"]) == 2
        kept, gone = run("exact", source, tmp_path, "--skip-bad")
        assert "other" not in kept[0]
    else:
        kept, gone = run("exact", source, tmp_path)
        assert kept[0]["other"] == expected
    assert [row["text"] for row in kept] == [X, A, B]
    assert [(row["place"], row["duplicate_of"]["place"]) for row in gone] == [("row 2", "row 1")]


@pytest.mark.parametrize("skip", [(), ("--skip-bad",)])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_writes_the_rows_that_it_chose(tmp_path, way, skip):
    source = write(tmp_path / "in.parquet", pa.table({"text": ROWS, "url": broken_strings(4)}))
    kept, gone = run(way, source, tmp_path, *skip)
    assert [(row["text"], row["url"]) for row in kept] == [(X, "\udcff"), (A, "u"), (B, "u")]
    assert [row["place"] for row in gone] == ["row 2"]


def test_contaminated_rows_go_and_others_stay(tmp_path):
    source = write(tmp_path / "in.parquet", pa.table({"text": [X, A, B], "url": broken_strings(3)}))
    (tmp_path / "e.jsonl").write_text(json.dumps({"text": A}) + "\n")
    kept, gone = run("against", source, tmp_path, "--evaluation", str(tmp_path / "e.jsonl"))
    assert [row["text"] for row in kept] == [X, B] and [row["place"] for row in gone] == ["row 1"]


def test_a_bad_text_and_a_bad_other_column_are_two_things(tmp_path, capsys):
    texts = pa.StringArray.from_buffers(
        4, pa.py_buffer(np.array([0, 1, 2, 3, 4], "<i4").tobytes()), pa.py_buffer(b"a\xffab")
    )
    source = write(tmp_path / "in.parquet", pa.table({"text": texts, "url": broken_strings(4)}))
    assert main(["exact", source, "--workers", "1"]) == 2
    assert "in.parquet: row 1: invalid UTF-8" in capsys.readouterr().err
    kept, gone = run("exact", source, tmp_path, "--skip-bad", "--json")
    answer = json.loads(capsys.readouterr().out)
    assert (answer["documents"], answer["removed"], answer["bad"], answer["escaped"]) == (3, 1, 1, 1)
    assert kept == [{"text": "a", "url": "\udcff"}, {"text": "b", "url": "u"}]
    assert [row["place"] for row in gone] == ["row 1", "row 2"]


def test_a_time_is_no_text(tmp_path, capsys):
    source = write(tmp_path / "in.parquet", pa.table({"text": numbers_as(pa.timestamp("us"), [2**62])}))
    assert main(["exact", source, "--workers", "1"]) == 2
    assert "in.parquet: row 0: " in capsys.readouterr().err


def test_a_damaged_column_leaves_the_others(tmp_path, capsys):
    """The pages of `url` hold anything: their rows are written without it, or refused."""
    rows = [sentences(i, 3) for i in range(400)]
    rows[200] = rows[10]
    urls = [f"https://example.org/{i}" for i in range(400)]
    path = tmp_path / "in.parquet"
    pq.write_table(pa.table({"url": urls, "text": rows}), path, compression="snappy", use_dictionary=False)
    column = pq.ParquetFile(path).metadata.row_group(0).column(0)
    data = bytearray(path.read_bytes())
    start = column.data_page_offset
    data[start + 60 : start + column.total_compressed_size] = b"\xff" * (column.total_compressed_size - 60)
    path.write_bytes(data)
    assert main(["exact", str(path), "--output", str(tmp_path / "k"), "--workers", "1"]) == 2
    assert "in.parquet: row 0: column 'url' cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "k").exists()
    kept, gone = run("exact", str(path), tmp_path, "--skip-bad", "--json")
    assert json.loads(capsys.readouterr().out)["incomplete"] == 399
    assert kept == [{"text": text} for i, text in enumerate(rows) if i != 200]
    assert [row["place"] for row in gone] == ["row 200"]
    assert main(["exact", str(path), "--output", str(tmp_path / "k"), "--workers", "1", "--skip-bad"]) == 0
    assert "written without fields that cannot be read: 399" in capsys.readouterr().out


def test_rows_of_csv_and_json_with_odd_fields_stay_in_their_places(tmp_path):
    csv = tmp_path / "in.csv"
    csv.write_bytes(b"text,url\nx,\xff\na,b,c,d\na,b\n\nb\n")
    assert main(["exact", str(csv), "--output", str(tmp_path / "k"), "--workers", "1"]) == 2, (
        "a row has too many values"
    )
    kept, gone = run("exact", str(csv), tmp_path, "--skip-bad")
    assert [row["text"] for row in kept] == ["x", "a", "b"] and kept[0]["url"] == "\udcff"
    assert [row["place"] for row in gone] == ["line 3"]
    values = tmp_path / "in.json"
    values.write_bytes(
        b'[{"text": "x", "url": "\xff"}, {"text": "a", "n": 1e999}, "a", {"text": "b", "url": "\\ud800"}]'
    )
    kept, gone = run("exact", str(values), tmp_path)
    assert [row["text"] for row in kept] == ["x", "a", "b"] and [row["place"] for row in gone] == ["item 2"]


def test_a_file_that_can_no_longer_be_read_is_an_error(tmp_path, monkeypatch, capsys):
    """Nothing is dropped unsaid where a document that stays is not there at the second pass."""
    from megalm.corpus.dedup import removal

    source = write(tmp_path / "in.parquet", pa.table({"text": ROWS}))
    real = removal.read_piece
    monkeypatch.setattr(
        removal, "read_piece", lambda piece, field: (d for d in real(piece, field) if d.place != "row 3")
    )
    assert main(["exact", source, "--output", str(tmp_path / "k"), "--workers", "1"]) == 2
    assert "row 3: was read before, and cannot be read now" in capsys.readouterr().err


@pytest.mark.parametrize("workers", ["1", "2"])
def test_what_a_library_raises_is_one_message(tmp_path, workers, capfd):
    """A column of times in a zone that nobody knows as the text, in this process and in workers of a pool."""
    paths = []
    for name in "ab":
        column = numbers_as(pa.timestamp("us", tz="Mars/Phobos"), [1])
        paths.append(write(tmp_path / f"{name}.parquet", pa.table({"text": column})))
    assert main(["exact", *paths, "--workers", workers]) == 2
    said = capfd.readouterr().err
    assert "a.parquet: row 0: " in said and "Traceback" not in said and said.count("error:") == 1


def test_an_exception_of_a_kind_of_its_own_names_the_file(tmp_path, monkeypatch, capsys):
    from megalm.corpus.dedup import corpus

    class Unspeakable(Exception):
        def __init__(self, one, two):
            super().__init__(f"{one} {two}")

    def raising(piece, field, others):
        yield next(iter(real(piece, field, others)))
        raise Unspeakable("cannot", "be pickled")

    real = corpus.read_piece
    monkeypatch.setattr(corpus, "read_piece", raising)
    source = write(tmp_path / "in.parquet", pa.table({"text": ROWS}))
    assert main(["exact", source, "--workers", "1"]) == 2
    assert "in.parquet: cannot be read (Unspeakable: cannot be pickled)" in capsys.readouterr().err
