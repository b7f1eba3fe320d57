"""Judges that are made up: what they are worth is known, and it is said."""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from megalm.__main__ import main
from megalm.config.errors import ConfigError
from megalm.evaluate.judge import Judge, judge_pairs, read_verdict
from megalm.evaluate.pairs import make_pairs, write_pairs

PROMPTS = [f"question {n}" for n in range(20)]
GOOD = {prompt: f"one two three four five {prompt} is true" for prompt in PROMPTS}
BAD = {prompt: f"no {prompt}" for prompt in PROMPTS}
PAIRS = make_pairs(PROMPTS, GOOD, BAD, ("good", "weak"))


def answers(text):
    return re.search(r"\[Answer A\]\n(.*)\n\n\[Answer B\]\n(.*)\n\nExplain", text, re.DOTALL).groups()


def always_first(text):
    return "Reasons. [[A]]"


def fair(text):
    first, second = (answer.startswith("one two three") for answer in answers(text))
    return "[[C]]" if first == second else "I first thought [[C]], but\n" + ("[[A]]" if first else "[[B]]")


def make_judge(tmp_path, said):
    judge = Judge("http://nowhere", "made-up", tmp_path / "judge.jsonl", pause=0.0)
    judge._send = lambda body: {"choices": [{"message": {"content": said(body["messages"][0]["content"])}}]}
    return judge


def test_a_judge_that_always_says_first_flips_always_and_nobody_wins(tmp_path):
    found = judge_pairs(PAIRS, make_judge(tmp_path, always_first), bootstrap=5)
    assert found.flip_rate == 1.0 and found.wins == (0, 0) and found.ties == 20
    assert found.trial == {"itself": 0.0, "empty": 0.0, "shuffled": 0.0}


def test_a_fair_judge_is_believed(tmp_path):
    found = judge_pairs(PAIRS, make_judge(tmp_path, fair), bootstrap=5)
    assert found.models == ("good", "weak") and found.wins == (20, 0) and found.flip_rate == 0.0
    assert found.trial["itself"] == 1.0 and found.longer_won == 1.0 and found.interval[0] > 0.8


def test_answers_without_a_verdict_are_ties_and_counted(tmp_path):
    found = judge_pairs(PAIRS, make_judge(tmp_path, lambda text: "I cannot say"), bootstrap=5)
    assert found.ties == 20 and found.unread == 40 and found.flip_rate == 0.0


@pytest.mark.parametrize("text,verdict", [("[[A]] no, [[B]]", "B"), ("A", None), ("[[D]]", None), ("x\n[[C]]", "C")])
def test_the_last_verdict_counts(text, verdict):
    assert read_verdict(text) == verdict


@pytest.fixture
def endpoint():
    """A fair judge behind HTTP, that fails every third question when it is asked first."""
    seen, known = [], []
    counting = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            question = body["messages"][0]["content"]
            with counting:  # questions are asked side by side
                seen.append(body)
                new = question not in known
                known.extend([question] * new)
                fails = new and len(known) % 3 == 0
            if fails:
                self.send_error(503)
                return
            said = fair(body["messages"][0]["content"])
            usage = {"prompt_tokens": 10, "completion_tokens": 2}
            reply = json.dumps({"choices": [{"message": {"content": said}}], "usage": usage}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1", seen
    server.shutdown()
    server.server_close()


def test_what_was_asked_is_kept_and_not_asked_again(endpoint, tmp_path, capsys, monkeypatch):
    url, seen = endpoint
    monkeypatch.setattr("megalm.evaluate.judge.time.sleep", lambda seconds: None)
    write_pairs(tmp_path, PAIRS)
    words = ["evaluate", "judge", str(tmp_path), "--endpoint", url, "--model", "judge", "--json"]
    assert main(words) == 0
    first = json.loads(capsys.readouterr().out)
    assert first["wins"] == [20, 0] and first["prompt_tokens"] == 10 * first["requests"] > 0
    count = len(seen)
    kept = (tmp_path / "judge.jsonl").read_text()
    (tmp_path / "judge.jsonl").write_text(kept[: len(kept) - 10])  # a crash cut the last line off
    assert main(words) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["wins"] == first["wins"] and again["requests"] == 1 and count < len(seen) <= count + 2
    assert main(words) == 0 and json.loads(capsys.readouterr().out)["requests"] == 0


def test_an_endpoint_that_is_away_is_said_and_nothing_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr("megalm.evaluate.judge.time.sleep", lambda seconds: None)
    judge = Judge("http://127.0.0.1:9", "judge", tmp_path / "judge.jsonl")
    with pytest.raises(ConfigError, match="the judge does not answer .* the same command goes on from there"):
        judge_pairs(PAIRS, judge, bootstrap=0)


def test_an_address_that_is_none(tmp_path, capsys):
    assert main(["evaluate", "judge", str(tmp_path), "--endpoint", "file:///etc/passwd", "--model", "x"]) == 2
    assert "must begin with http:// or https://" in capsys.readouterr().err
