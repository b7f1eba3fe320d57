import argparse
import gzip
import io
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from megalm.config.errors import ConfigError
from megalm.corpus import documents as documents_module
from megalm.corpus import merge, shards, tokenize_corpus, tokenize_job
from megalm.corpus.engine import LocalEngine
from megalm.corpus.python_corpus import choose_python_files
from megalm.corpus.shards import make_shards
from megalm.corpus.tokenize_corpus import Settings, ShardRun
from megalm.corpus.tokenize_job import Job, Progress, run_job
from megalm.data.formats.mds import read_token_documents
from megalm.data.tokens import TokenFile
from megalm.tokenizer.tokenizer import load_tokenizer
from tests.texts import documents
from tools.tokenize.__main__ import main


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(6):
        lines = [
            {"text": text, "lang": "de" if i % 3 == 0 else "en"} for i, text in enumerate(documents(30, seed=number))
        ]
        (folder / f"{number}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(shards, "SHARD_PIECES", 1)


def data(prefix):
    return [open(f"{prefix}_text_document.{part}", "rb").read() for part in ("bin", "idx")]


def test_tokens_are_the_documents_with_their_ends(corpus, tokenizer_file, tmp_path):
    outcome = run_job(Job((str(corpus),), str(tmp_path / "out"), Settings(tokenizer_file)))
    file, tokenizer = TokenFile(tmp_path / "out"), load_tokenizer(tokenizer_file, backend="tokenizers")
    texts = [text for number in range(6) for text in documents(30, seed=number)]
    assert outcome.documents == file.num_documents == 180 and outcome.tokens == file.num_tokens
    for text, ids in zip(texts, file, strict=True):
        assert ids.tolist() == [*tokenizer.encode(text).tolist(), 0]
    file.verify(400)
    assert not os.path.exists(tmp_path / "out.parts")


def test_workers_and_interruptions_do_not_change_a_byte(corpus, tokenizer_file, tmp_path, small_shards, monkeypatch):
    settings = Settings(tokenizer_file)
    run_job(Job((str(corpus),), str(tmp_path / "one"), settings))
    run_job(Job((str(corpus),), str(tmp_path / "two"), settings, workers=2))
    assert data(tmp_path / "one") == data(tmp_path / "two")
    made, real = [], tokenize_corpus.tokenize_shard

    def stopping(number, *rest):
        if number == 3 and len(made) == 3:
            raise KeyboardInterrupt
        made.append(number)
        return real(number, *rest)

    monkeypatch.setattr(tokenize_corpus, "tokenize_shard", stopping)
    with pytest.raises(KeyboardInterrupt):
        run_job(Job((str(corpus),), str(tmp_path / "three"), settings))
    assert not os.path.exists(tmp_path / "three_text_document.bin")
    made.append(-1)
    run_job(Job((str(corpus),), str(tmp_path / "three"), settings))
    assert made == [0, 1, 2, -1, 3, 4, 5]
    assert data(tmp_path / "one") == data(tmp_path / "three")


def test_a_killed_worker_costs_only_its_shard(corpus, tokenizer_file, tmp_path, small_shards):
    run_job(Job((str(corpus),), str(tmp_path / "one"), Settings(tokenizer_file)))
    code = (
        "import os, sys, threading, time, psutil\n"
        "from megalm.corpus import shards, tokenize_corpus\n"
        "from megalm.corpus.tokenize_job import Job, Progress, run_job\n"
        "shards.SHARD_PIECES = 1\n"
        "class Killer(Progress):\n"
        "    killed = False\n"
        "    def shard(self, result):\n"
        "        if not Killer.killed:\n"
        "            Killer.killed = True\n"
        "            [c.kill() for c in psutil.Process().children() if 'spawn_main' in ' '.join(c.cmdline())]\n"
        "if __name__ == '__main__':\n"
        "    run_job(Job((sys.argv[1],), sys.argv[2], tokenize_corpus.Settings(sys.argv[3]), workers=2), Killer())\n"
        "    assert Killer.killed\n"
    )
    pytest.importorskip("psutil")
    script = tmp_path / "killer.py"
    script.write_text(code)
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    command = [sys.executable, str(script), str(corpus), str(tmp_path / "two"), tokenizer_file]
    subprocess.run(command, check=True, env=environment, timeout=100)
    assert data(tmp_path / "one") == data(tmp_path / "two")


def test_the_tool_survives_sigkill_and_goes_on(corpus, tokenizer_file, tmp_path):
    """The whole program is killed as soon as it has left a shard; the same command then ends with the same bytes."""
    big = tmp_path / "big.jsonl"
    lines = "".join(path.read_text() for path in sorted(corpus.iterdir()))
    big.write_text(lines * (20_000_000 // len(lines)))
    arguments = [str(big), "--tokenizer", tokenizer_file, "--workers", "1"]
    command = [sys.executable, "-m", "tools.tokenize", *arguments, "--output", str(tmp_path / "a")]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while process.poll() is None and not os.path.exists(tmp_path / "a.parts" / "000000.json"):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert main([*arguments, "--output", str(tmp_path / "a")]) == 0
    assert main([*arguments, "--output", str(tmp_path / "b")]) == 0
    assert data(tmp_path / "a") == data(tmp_path / "b")


def test_done_work_is_not_repeated_until_something_changes(corpus, tokenizer_file, tmp_path):
    job = Job((str(corpus),), str(tmp_path / "out"), Settings(tokenizer_file))
    first = run_job(job)
    again = run_job(job)
    assert (first.reused, again.reused, again.tokens) == (False, True, first.tokens)
    with open(corpus / "0.jsonl", "a") as file:
        file.write('{"text": "one more"}\n')
    assert run_job(job).documents == 181
    os.truncate(tmp_path / "out_text_document.bin", 10)
    assert not run_job(job).reused
    TokenFile(tmp_path / "out").verify()


def test_filters_ends_and_limits(corpus, tokenizer_file, tmp_path):
    def run(**settings):
        job = Job(
            (str(corpus / "0.jsonl"),), str(tmp_path / "out"), Settings(tokenizer_file, **settings), max_documents=20
        )
        return run_job(job), TokenFile(tmp_path / "out")

    outcome, file = run(language_field="lang", languages=("de",))
    assert (outcome.documents, outcome.filtered) == (10, 20)
    assert [row.split("\t")[1] for row in outcome.tallies] == ["de"]
    outcome, file = run(append_eos=False)
    assert file.num_documents == 20 and not any((document == 0).any() for document in file)
    outcome, file = run(min_characters=100, max_characters=400)
    lengths = [len(text) for text in documents(30, seed=0)]
    assert outcome.documents == sum(100 <= length <= 400 for length in lengths)


@pytest.mark.parametrize("most", [1, 29, 30, 31, 75, 1000])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_limit_of_documents_ends_the_work_early(
    corpus, tokenizer_file, tmp_path, small_shards, monkeypatch, most, workers
):
    """All counts are of what was written, whatever the workers; no shard after the last that is needed is made."""
    if workers == 2 and most not in (31, 75):
        pytest.skip("one is as good as another")
    run_job(Job((str(corpus),), str(tmp_path / "all"), Settings(tokenizer_file)))
    made, real = [], tokenize_corpus.tokenize_shard
    monkeypatch.setattr(
        tokenize_corpus, "tokenize_shard", lambda number, *rest: made.append(number) or real(number, *rest)
    )
    settings = Settings(tokenizer_file, language_field="lang")
    job = Job((str(corpus),), str(tmp_path / "out"), settings, max_documents=most, workers=workers)
    outcome = run_job(job)
    file, whole = TokenFile(tmp_path / "out"), TokenFile(tmp_path / "all")
    assert outcome.documents == file.num_documents == min(most, 180) and outcome.tokens == file.num_tokens
    assert all((a == b).all() for a, b in zip(file, whole, strict=False))
    assert sum(tally.tokens for tally in outcome.tallies.values()) == outcome.tokens
    assert outcome.tallies[f"{corpus}\tde"].documents == sum(i % 30 % 3 == 0 for i in range(outcome.documents))
    if workers == 1:
        assert sorted(set(made)) == list(range(min(-(-most // 30), 6)))


def test_streams_are_read_once_and_known_again(corpus, tokenizer_file, tmp_path):
    lines = (corpus / "0.jsonl").read_bytes()
    run_job(Job((str(corpus / "0.jsonl"),), str(tmp_path / "one"), Settings(tokenizer_file)))
    command = [sys.executable, "-m", "tools.tokenize", "--tokenizer", tokenizer_file, "--workers", "1", "--json"]

    def run(inputs, **keywords):
        done = subprocess.run([*command, *inputs], capture_output=True, check=True, **keywords)
        return json.loads(done.stdout)

    for number, content in enumerate((lines, gzip.compress(lines))):
        output = ["-", "--output", str(tmp_path / f"pipe{number}")]
        assert not run(output, input=content)["reused"]
        assert data(tmp_path / f"pipe{number}") == data(tmp_path / "one")
    outcome = run(output, input=content)
    assert outcome["reused"] and list(outcome["tallies"]) == ["standard input\t-"]
    assert not run(output, input=gzip.compress(lines + lines))["reused"]
    os.mkfifo(tmp_path / "fifo")
    writer = subprocess.Popen(["cp", str(corpus / "0.jsonl"), str(tmp_path / "fifo")])
    run([str(tmp_path / "fifo"), "--output", str(tmp_path / "fifo_out")])
    assert writer.wait() == 0 and data(tmp_path / "fifo_out") == data(tmp_path / "one")
    assert not list(tmp_path.glob("*.stdin*"))


def test_control_tokens_stay_text_unless_asked_for(tokenizer_file, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one<|endoftext|>two"}\n')
    for asked, ends in (([], 1), (["--control-tokens"], 2)):
        arguments = [str(tmp_path / "a.jsonl"), "--tokenizer", tokenizer_file, "--output", str(tmp_path / f"o{ends}")]
        assert main([*arguments, *asked, "--workers", "1"]) == 0
        assert int((TokenFile(tmp_path / f"o{ends}").tokens == 0).sum()) == ends


def test_output_is_a_place_on_this_machine(corpus, tokenizer_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="folder of this machine"):
        run_job(Job((str(corpus),), "s3://bucket/out", Settings(tokenizer_file)))
    assert not os.path.exists("s3:")


def test_bad_documents_stop_or_are_listed(tokenizer_file, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(b'{"text": "fine"}\n{"text": "\xff"}\n{"text": " "}\n{oops\n')
    with pytest.raises(ConfigError, match=r"bad\.jsonl: byte 27: invalid UTF-8.*--skip-bad"):
        run_job(Job((str(bad),), str(tmp_path / "out"), Settings(tokenizer_file)))
    outcome = run_job(Job((str(bad),), str(tmp_path / "out"), Settings(tokenizer_file, skip_bad=True)))
    assert (outcome.documents, outcome.bad, outcome.empty) == (1, 2, 1)
    assert [line.split(": ")[1] for line in outcome.listed] == ["byte 27", "byte 45"]


@pytest.mark.parametrize("workers, room", [("2", 500_000), ("1", 2_700_000)])
def test_a_full_disk_is_explained_and_the_run_goes_on_when_there_is_room(
    corpus, tokenizer_file, tmp_path, workers, room
):
    """In a worker that writes a shard, and where the shards are joined."""
    big = tmp_path / "big.jsonl"
    big.write_text("".join(path.read_text() for path in sorted(corpus.iterdir())) * 120)
    arguments = [str(big), "--tokenizer", tokenizer_file, "--workers", workers, "--output", str(tmp_path / "o")]
    limited = (
        "import resource, sys\n"
        "from tools.tokenize.__main__ import main\n"
        "if __name__ == '__main__':\n"
        f"    resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, -1))\n"
        "    sys.exit(main(sys.argv[1:]))\n"
    )
    (tmp_path / "limited.py").write_text(limited)
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    command = [sys.executable, str(tmp_path / "limited.py"), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 2 and "disk is full" in result.stderr and "Traceback" not in result.stderr
    assert not os.path.exists(tmp_path / "o_text_document.idx")
    assert main(arguments) == 0
    assert TokenFile(tmp_path / "o").num_documents == 180 * 120


def test_missing_control_tokens_are_explained(corpus, tokenizer_file, tmp_path):
    for settings, match in (
        (Settings(tokenizer_file, eos="<no>"), "'<no>'"),
        (Settings(tokenizer_file, prepend_bos=True), "--bos"),
    ):
        with pytest.raises(ConfigError, match=match):
            run_job(Job((str(corpus),), str(tmp_path / "out"), settings))


def test_large_batches_are_cut_without_changing_the_tokens(corpus, tokenizer_file, tmp_path, monkeypatch):
    run_job(Job((str(corpus),), str(tmp_path / "one"), Settings(tokenizer_file)))
    monkeypatch.setattr(tokenize_corpus, "BATCH_CHARACTERS", 500)
    monkeypatch.setattr(merge, "MERGED_DOCUMENTS", 7)
    run_job(Job((str(corpus),), str(tmp_path / "two"), Settings(tokenizer_file)))
    assert data(tmp_path / "one") == data(tmp_path / "two")


def test_command_line_trains_reports_and_explains(corpus, tmp_path, capsys):
    arguments = [str(corpus), "--train-bpe", "300", "--output", str(tmp_path / "o"), "--workers", "1"]
    assert main([*arguments, "--json"]) == 0
    outcome = json.loads(capsys.readouterr().out)
    assert outcome["vocab_size"] == 300 and outcome["report"][-1]["documents"] == 180
    assert load_tokenizer(tmp_path / "o_tokenizer.json").vocab_size == 300
    assert main(arguments) == 0 and "already there" in capsys.readouterr().out
    report = [
        str(corpus),
        "--tokenizer",
        str(tmp_path / "o_tokenizer.json"),
        "--report",
        "--language-field",
        "lang",
        "--workers",
        "1",
    ]
    assert main(report) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[2:]] == ["en", "de", "-"]
    assert main([str(tmp_path / "none"), "--train-bpe", "300", "--output", "x"]) == 2
    assert "names no file" in capsys.readouterr().err
    assert main([str(corpus), "--train-bpe", "300"]) == 2


def test_the_same_tokens_as_mds_shards(corpus, tokenizer_file, tmp_path):
    job = Job((str(corpus),), str(tmp_path / "o"), Settings(tokenizer_file), mds=True)
    assert run_job(job).documents == 180
    for ids, again in zip(TokenFile(tmp_path / "o"), read_token_documents(tmp_path / "o_mds"), strict=True):
        assert ids.tolist() == again.tolist() and again.dtype == np.uint16
    assert run_job(job).reused
    os.remove(tmp_path / "o_mds" / "index.json")
    assert not run_job(job).reused and os.path.exists(tmp_path / "o_mds" / "index.json")


def test_shards_depend_on_the_input_only(tmp_path, tokenizer_file, monkeypatch):
    for number in range(5):
        (tmp_path / f"{number}.txt").write_text("x" * 100)
    from megalm.corpus.documents import cut_into_pieces, find_files

    pieces = cut_into_pieces(find_files([str(tmp_path)]))
    monkeypatch.setattr(documents_module, "SMALLEST_PIECE", 250)
    assert [len(shard) for shard in make_shards(pieces)] == [2, 2, 1]
    folder = tmp_path / "parts"
    folder.mkdir()
    results = list(ShardRun(make_shards(pieces), Settings(tokenizer_file), str(folder), LocalEngine(1)))
    assert [result.documents for result in results] == [2, 2, 1]
    whole = (folder / "000001.tokens").read_bytes()
    for torn in (b"", bytes(len(whole))):  # a torn shard is made again, also one of the right size
        (folder / "000001.tokens").write_bytes(torn)
        list(ShardRun(make_shards(pieces), Settings(tokenizer_file), str(folder), LocalEngine(1)))
        assert (folder / "000001.tokens").read_bytes() == whole and len(whole) == 2 * results[1].tokens


def test_python_corpus_is_prose_and_code_in_a_fixed_order():
    pieces = choose_python_files(2.0)
    assert pieces == choose_python_files(2.0)
    assert 2e6 <= sum(piece.size for piece in pieces) < 2.5e6
    names = [piece.name for piece in pieces]
    assert len(set(names)) == len(names) and not any("/tests/" in name for name in names)
    assert any(name.endswith("METADATA") for name in names)


def test_a_result_in_the_folder_of_its_input_is_not_read_by_the_next_run(corpus, tmp_path):
    for name in ("a", "b"):  # the second finds the first one's results
        job = Job((str(corpus),), str(corpus / name), Settings(""), train_bpe=300, training_megabytes=0.1, mds=True)
        first, second = run_job(job), run_job(job)
        assert first.documents == second.documents == 180 and second.reused and not first.reused


def test_what_a_killed_run_had_copied_of_a_stream_is_not_read(corpus, tokenizer_file, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"text": "from the pipe"}\n')))
    seen = []

    def killed(pieces):
        seen.extend(piece.path for piece in pieces)
        raise KeyboardInterrupt

    job = Job(("-", str(corpus)), str(corpus / "x"), Settings(tokenizer_file))
    with monkeypatch.context() as patched:
        patched.setattr(tokenize_job, "cut_into_pieces", killed)
        patched.setattr(os, "unlink", lambda path: None)
        with pytest.raises(KeyboardInterrupt):
            run_job(job)
    assert os.path.exists(seen[0]) and len(seen) == 7
    assert run_job(Job((str(corpus),), str(corpus / "x"), Settings(tokenizer_file))).documents == 180


def test_a_result_of_dedup_in_the_folder_is_left_out_and_told(corpus, tokenizer_file, tmp_path):
    from tools.dedup.exact import add_arguments, run

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert run(parser.parse_args([str(corpus), "--output", str(corpus / "kept.jsonl")])) == 0
    said = []
    progress = Progress()
    progress.say = said.append
    job = Job((str(corpus),), str(tmp_path / "x"), Settings(tokenizer_file))
    assert run_job(job, progress).documents == 180
    assert any("kept.jsonl" in message for message in said)
    assert run_job(Job((str(corpus / "kept.jsonl"),), str(tmp_path / "y"), Settings(tokenizer_file))).documents > 0
