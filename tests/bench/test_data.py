"""The data benchmark says who encoded, and which faster encoders are not there."""

import argparse
import importlib
import json

from tests.texts import documents
from tools.bench.data import data


def test_the_tokenizing_benchmark_runs_without_the_faster_encoders_and_names_them(
    tokenizer_file, tmp_path, monkeypatch
):
    real = importlib.import_module

    def absent(name, *rest):
        if name in data.FAST_BACKENDS:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", absent)
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents(20)))
    parser = argparse.ArgumentParser()
    data.add_arguments(parser)
    words = ["--text", str(tmp_path / "text.jsonl"), "--tokenizer", tokenizer_file, "--megabytes", "0.1"]
    result = data._tokenize(parser.parse_args(["tokenize", *words, "--workers", "1", "--repeats", "1"]), tmp_path)
    assert result["same_bytes"] and result["encoded_by"] in (*data.FAST_BACKENDS, "tokenizers")
    assert result["not_there"] == dict.fromkeys(data.FAST_BACKENDS, "it is not installed")


def test_every_subject_has_its_measure(capsys, tokenizer_file, tmp_path):
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents(300)))
    parser = argparse.ArgumentParser()
    data.add_arguments(parser)
    words = ["--text", str(tmp_path / "text.jsonl"), "--tokenizer", tokenizer_file, "--seq-length", "32", "--json"]
    small = ["--megabytes", "0.2", "--documents", "60", "--repeats", "1", "--workers", "1"]
    assert data.run(parser.parse_args(["loader", "dedup", *words, *small])) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["loader"]["samples_per_cpu_s"]["megalm"] > 0 and result["dedup"]
