import numpy as np
import pytest

from megalm.config.errors import ConfigError
from megalm.corpus import token_import
from megalm.corpus.token_import import import_tokens
from megalm.data.tokens import TokenFile
from tools.tokenize.__main__ import main

STREAM = [9, 1, 2, 9, 3, 9, 4, 5, 6]  # 9 begins documents here


def llm_c(tokens, mark=20240520, version=1, dtype="<u2", count=None):
    head = np.zeros(256, "<i4")
    head[:3] = mark, version, len(tokens) if count is None else count
    return head.tobytes() + np.array(tokens, dtype).tobytes()


def documents(prefix):
    file = TokenFile(prefix)
    file.verify()
    return [list(map(int, document)) for document in file]


@pytest.fixture
def files(tmp_path):
    """A path for each format, all of the same tokens."""
    (tmp_path / "llm.bin").write_bytes(llm_c(STREAM))
    (tmp_path / "llama.bin").write_bytes(llm_c(STREAM, 20240801, 7, "<u4"))
    for dtype in ("uint16", "int32", "int64", ">u2"):
        np.save(tmp_path / f"{dtype.replace('>', 'big')}.npy", np.array(STREAM, dtype))
    for width in (2, 4):
        (tmp_path / f"{width}.ds").write_bytes(np.array(STREAM, f"<u{width}").tobytes())
        (tmp_path / f"{width}.ds.index").write_bytes(np.array([3, 5, 9], "<u8").tobytes())
    (tmp_path / "raw.bin").write_bytes(np.array(STREAM, "<u2").tobytes())
    return tmp_path


@pytest.mark.parametrize(
    "name", ["llm.bin", "llama.bin", "uint16.npy", "int32.npy", "int64.npy", "bigu2.npy", "2.ds", "4.ds", "raw.bin"]
)
@pytest.mark.parametrize("looked_at", [2, 1 << 22])
def test_tokens_of_other_programs_come_over_in_their_documents(files, name, looked_at, monkeypatch):
    monkeypatch.setattr(token_import, "LOOKED_AT", looked_at)
    kind = "uint16" if name == "raw.bin" else None
    made = import_tokens([str(files / name)], str(files / "o"), kind, 9)
    assert documents(files / "o") == [[9, 1, 2], [9, 3], [9, 4, 5, 6]] and (made.documents, made.tokens) == (3, 9)
    import_tokens([str(files / name)] * 2, str(files / "two"), kind)
    one = [[9, 1, 2], [9, 3], [9, 4, 5, 6]] if ".ds" in name else [STREAM]
    assert documents(files / "two") == one * 2
    assert TokenFile(files / "o").dtype.itemsize == (
        2 if name in ("llm.bin", "uint16.npy", "2.ds", "raw.bin", "bigu2.npy") else 4
    )


def test_an_end_token_ends_documents_where_none_begins_with_it(tmp_path):
    np.save(tmp_path / "a.npy", np.array([1, 2, 9, 3, 9, 9, 4], np.uint16))
    import_tokens([str(tmp_path / "a.npy")], str(tmp_path / "o"), None, 9)
    assert documents(tmp_path / "o") == [[1, 2, 9], [3, 9], [9], [4]]
    np.save(tmp_path / "rows.npy", np.arange(6, dtype=np.uint32).reshape(2, 3))
    import_tokens([str(tmp_path / "rows.npy")], str(tmp_path / "o"))
    assert documents(tmp_path / "o") == [[0, 1, 2], [3, 4, 5]]


def test_what_is_damaged_or_no_tokens_is_refused(files):
    (files / "cut.bin").write_bytes(llm_c(STREAM)[:-1])
    (files / "new.bin").write_bytes(llm_c(STREAM, version=2))
    np.save(files / "float.npy", np.ones(3))
    np.save(files / "cube.npy", np.ones((2, 2, 2), np.uint16))
    np.save(files / "negative.npy", np.array([1, -1]))
    np.save(files / "large.npy", np.array([1, 2**31]))
    (files / "short.npy").write_bytes((files / "uint16.npy").read_bytes()[:-2])
    (files / "2.ds.index").write_bytes(np.array([3, 5, 10], "<u8").tobytes())
    for name, said in {
        "cut.bin": "damaged, or of a version", "new.bin": "version 2", "float.npy": "tokens are integers",
        "cube.npy": "in one row or in rows", "negative.npy": "holds -1 near token 0", "large.npy": "holds 2147483648",
        "short.npy": "its header asks for", "2.ds": "do not fit the 10 tokens", "raw.bin": "--token-type uint8 or uint16",
        "none.bin": "names no file",
    }.items():  # fmt: skip
        with pytest.raises(ConfigError, match=said):
            import_tokens([str(files / name)], str(files / "o"))
        assert not (files / "o_text_document.idx").exists()
    for options, said in (
        ((None, 8), "the token 8 is nowhere"),
        (("int32", None), "is a token file of llm.c .* of uint16, not"),
    ):
        with pytest.raises(ConfigError, match=said):
            import_tokens([str(files / "llm.bin")], str(files / "o"), *options)
    with pytest.raises(ConfigError, match="18 bytes are not tokens of int32"):
        import_tokens([str(files / "raw.bin")], str(files / "o"), "int32")


@pytest.mark.parametrize("name", ["llm.bin", "uint16.npy", "2.ds", "raw.bin", "raw", "a.jsonl", "folder"])
def test_opening_such_a_file_says_what_it_is_and_how_to_convert_it(files, name):
    (files / "a.jsonl").write_text("{}")
    (files / "folder").mkdir()
    with pytest.raises(ConfigError) as error:
        TokenFile(files / name)
    said = str(error.value)
    assert "does not exist" not in said
    expected = {"a.jsonl": "is no token file", "folder": "is a folder without an index.json"}.get(name, "--from-tokens")
    assert expected in said and ("--token-type uint16" in said) == name.startswith("raw")


def test_the_command_converts(files, capsys):
    assert main([str(files / "llm.bin"), "--from-tokens", "--end-id", "9", "--output", str(files / "o")]) == 0
    assert "3 documents, 9 tokens, from a token file of llm.c" in capsys.readouterr().out
    assert main([str(files / "llm.bin"), "--from-tokens"]) == 2
    assert main([str(files / "a.jsonl"), "--train-bpe", "300", "--end-id", "1", "--output", str(files / "p")]) == 2
    assert "give --from-tokens, too" in capsys.readouterr().err
