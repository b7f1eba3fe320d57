"""No tool writes over what it reads, by whatever name, and none takes its own results for documents."""

import json
import os
import shutil

import numpy as np
import pytest

from megalm.config.errors import ConfigError
from megalm.corpus.documents import Piece
from megalm.corpus.results import Results, is_result
from megalm.corpus.shards import WorkFolder
from tests.data.test_loader import write
from tools.dedup.__main__ import main
from tools.tokenize.__main__ import main as tokenize

LINES = '{"text": "a"}\n{"text": "a"}\n'


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("d/a.jsonl", "d/sub/b.jsonl", "e/question.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(LINES)
    return tmp_path


def contents(folder):
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


OVERWRITING = {
    "a file of the folder": ["exact", "d", "--output", "d/a.jsonl"],
    "the list of what goes": ["exact", "d", "--output", "k.jsonl", "--removed", "d/sub/b.jsonl"],
    "a file of the glob": ["near", "d/*.jsonl", "--output", "d/a.jsonl"],
    "a deep glob": ["exact", "d/**/*.jsonl", "--output", "d/sub/../sub/b.jsonl"],
    "a link": ["exact", "d", "--output", "link.jsonl"],
    "a hard link": ["exact", "d", "--output", "hard.jsonl"],
    "a folder by its link": ["exact", "linked", "--output", "d/a.jsonl"],
    "as a URL": ["exact", "file://{}/d", "--output", "d/a.jsonl"],
    "the text of an evaluation": ["against", "d", "--evaluation", "e", "--words", "1", "--output", "e/question.jsonl"],
    "a text whose spans are cut": ["substring", "d", "--bytes", "2", "--output", "d/a.jsonl"],
    "a file that waits to be whole": ["exact", "d/a.jsonl", "k.partial", "--output", "k"],
    "the folder of the parts": ["exact", "parts.parts", "--output", "parts"],
    "embeddings": ["semantic", "d", "--embeddings", "rows.npy", "--output", "rows.npy"],
}


@pytest.mark.parametrize("case", OVERWRITING)
def test_an_input_is_not_written_over(folder, case, capsys):
    os.symlink("d/a.jsonl", "link.jsonl")
    os.link("d/a.jsonl", "hard.jsonl")
    os.symlink("d", "linked")
    (folder / "k.partial").write_text("a text")
    (folder / "parts.parts").mkdir()
    (folder / "parts.parts" / "c.jsonl").write_text(LINES)
    np.save(folder / "rows.npy", np.ones((4, 2)))
    before = contents(folder)
    command = [word.format(folder) for word in OVERWRITING[case]]
    assert main([*command, "--workers", "1"]) == 2
    said = capsys.readouterr().err
    assert "is an input" in said and "Traceback" not in said
    assert contents(folder) == before


@pytest.mark.parametrize("removed", ["t.bin", "t.idx"])
def test_a_token_file_is_not_written_over(folder, removed, capsys):
    write(folder / "t", [np.arange(100), np.arange(100)])
    os.symlink("t.idx", "u.idx")
    before = contents(folder)
    for outputs in (["--output", "t"], ["--output", "u"], ["--output", "v", "--removed", removed]):
        assert main(["substring", "t", *outputs, "--workers", "1"]) == 2
        assert "is an input" in capsys.readouterr().err and contents(folder) == before


@pytest.mark.parametrize(
    ("source", "output", "more"),
    [
        ("x_recipe.json", "x", []),
        ("x_text_document.bin", "x", []),
        ("x.parts/c.jsonl", "x", []),
        ("x_mds/c.jsonl", "x", ["--mds"]),
        ("x_tokenizer.json", "x", []),
    ],
)
def test_tokenize_does_not_write_over_an_input(folder, source, output, more, capsys):
    path = folder / source
    path.parent.mkdir(exist_ok=True)
    path.write_text(LINES)
    before = contents(folder)
    assert tokenize([source, "--train-bpe", "260", "--output", output, *more, "--workers", "1"]) == 2
    assert source.split("/")[0] in capsys.readouterr().err
    assert contents(folder) == before


@pytest.mark.parametrize("way", [["exact"], ["near"], ["substring", "--bytes", "30"]])
@pytest.mark.parametrize("source", ["d", "d/*", "d/**/*.jsonl", "."])
def test_a_result_in_its_input_is_left_out_the_next_time(folder, source, way, capsys):
    command = [way[0], source, *way[1:], "--output", "d/k.jsonl", "--removed", "d/r.jsonl", "--workers", "1"]
    assert main(command) == 0
    first = contents(folder)
    for _ in range(2):
        capsys.readouterr()
        assert main(command) == 0
        assert "d/k.jsonl" in capsys.readouterr().err
        after = contents(folder)
        assert after.keys() == first.keys()
        assert all(after[path] == first[path] for path in after if not path.endswith(".result"))


def test_a_result_that_was_changed_is_an_input_again(folder, capsys):
    command = ["exact", "d", "--output", "d/k.jsonl", "--workers", "1"]
    assert main(command) == 0 and is_result("d/k.jsonl")
    with open("d/k.jsonl", "a") as file:
        file.write('{"text": "mine"}\n')
    before = contents(folder)
    assert main(command) == 2 and "d/k.jsonl is an input" in capsys.readouterr().err
    assert contents(folder) == before


def test_a_result_is_read_where_it_is_named(folder, capsys):
    assert main(["exact", "d", "--output", "d/k.jsonl", "--workers", "1"]) == 0
    capsys.readouterr()
    assert main(["exact", "d/k.jsonl", "--workers", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["documents"] == 1
    shutil.move("d/k.jsonl", "e/k.jsonl")  # without its mark it is a file like others
    assert main(["exact", "e", "--workers", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["documents"] == 3


def test_only_results_are_marked_that_a_search_could_find(folder):
    assert main(["exact", "d", "--output", "out/k.jsonl", "--workers", "1"]) == 0
    assert os.listdir("out") == ["k.jsonl"]


def test_what_waits_for_an_interrupted_run_is_no_input(folder):
    work = WorkFolder(str(folder / "d" / "k.jsonl.parts"), {"a": 1})
    (folder / "d" / "k.jsonl.parts" / "0.jsonl").write_text(LINES)
    work.close(keep=True)
    pieces = [Piece(str(folder / "d" / name), 1, source="d") for name in ("a.jsonl", "k.jsonl.parts/0.jsonl")]
    said = []
    assert Results().input_files(pieces, said.append) == pieces[:1]
    assert "k.jsonl.parts/0.jsonl" in said[0]


def test_a_folder_of_somebody_else_is_not_emptied(folder):
    (folder / "x.parts").mkdir()
    (folder / "x.parts" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"thesis\.txt is not of an interrupted run"):
        WorkFolder("x.parts", {"a": 1})
    assert os.listdir("x.parts") == ["thesis.txt"]


def test_results_are_files_of_this_machine(folder, capsys):
    assert main(["exact", "d", "--output", "s3://bucket/k.jsonl", "--workers", "1"]) == 2
    assert "s3://bucket/k.jsonl" in capsys.readouterr().err and not os.path.exists("s3:")
