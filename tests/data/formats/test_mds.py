import bz2
import contextlib
import gzip
import json
import struct

import numpy as np
import pytest

from megalm.config.errors import ConfigError
from megalm.data.formats.mds import MDSReader, MDSWriter, read_token_documents, write_token_documents
from megalm.data.formats.mds_tokens import MDSTokens
from megalm.data.formats.mds_values import decode_value, encode_value
from megalm.data.formats.store import Cache

COLUMNS = {
    "tokens": "ndarray:uint16",
    "fixed": "ndarray:int32:2,3",
    "free": "ndarray",
    "text": "str",
    "raw": "bytes",
    "n": "int",
    "small": "uint8",
    "x": "float32",
    "j": "json",
    "big": "str_int",
}


def sample(i):
    return {
        "tokens": np.arange(1 + i % 7, dtype=np.uint16),
        "fixed": np.full((2, 3), i, np.int32),
        "free": np.ones((1 + i % 3, 2), np.float64) * i,
        "text": f"té {i}",
        "raw": bytes([i % 256] * (i % 4)),
        "n": -i,
        "small": i % 256,
        "x": i / 2,
        "j": {"i": [i]},
        "big": 10**30 + i,
    }


def same(a, b):
    assert a.keys() == b.keys()
    for key, value in a.items():
        if isinstance(value, np.ndarray):
            assert np.array_equal(value, b[key]) and value.dtype == b[key].dtype and value.shape == b[key].shape
        else:
            assert value == b[key]


@pytest.mark.parametrize("compression", [None, "zstd", "zstd:7"])
def test_samples_come_back(tmp_path, compression):
    with MDSWriter(tmp_path, COLUMNS, compression=compression, hashes=["xxh64"], size_limit=5000) as writer:
        for i in range(200):
            writer.write(sample(i))
    reader = MDSReader(tmp_path)
    assert len(reader) == 200 and len(reader.shards) > 3
    assert all(shard["raw_data"]["bytes"] <= 5000 for shard in reader.shards)
    for i, got in enumerate(reader):
        same(sample(i), got)
    same(sample(150), reader[150])


def packed(folder, kind, pack):
    """The shards of a folder, compressed by something that is read and not written."""
    index = json.loads((folder / "index.json").read_text())
    for info in index["shards"]:
        raw = folder / info["raw_data"]["basename"]
        data = pack(raw.read_bytes())
        info["compression"] = kind
        info["zip_data"] = {"basename": f"{raw.name}.{kind}", "bytes": len(data), "hashes": {}}
        (folder / info["zip_data"]["basename"]).write_bytes(data)
        raw.unlink()
    (folder / "index.json").write_text(json.dumps(index))


def snap(data):
    """Snappy's format with nothing but literals."""
    size, out = len(data), b""
    while size > 127:
        out, size = out + bytes([size & 127 | 128]), size >> 7
    parts = (data[at : at + 60] for at in range(0, len(data), 60))
    return out + bytes([size]) + b"".join(bytes([len(part) - 1 << 2]) + part for part in parts)


@pytest.mark.parametrize("kind", ["gz", "gz:6", "bz2", "br", "snappy"])
def test_other_compressions_are_read(tmp_path, kind):
    library = {"br": "brotli", "snappy": "snappy"}.get(kind)
    pack = {"gz": gzip.compress, "bz2": bz2.compress, "snappy": snap}.get(kind.split(":")[0])
    if library:
        module = pytest.importorskip(library)
        pack = pack or module.compress
    with MDSWriter(tmp_path, COLUMNS, size_limit=5000, hashes=["sha1"]) as writer:
        for i in range(60):
            writer.write(sample(i))
    packed(tmp_path, kind, pack)
    for i, got in enumerate(MDSReader(tmp_path)):
        same(sample(i), got)
    shard = next(tmp_path.glob("shard.00000.mds.*"))
    whole = shard.read_bytes()
    for damaged in (whole[:-9], whole[:40] + bytes([whole[40] ^ 1]) + whole[41:], pack(b"x" * 10**6)):
        damaged += bytes(max(0, len(whole) - len(damaged)))
        shard.write_bytes(damaged[: len(whole)])
        with pytest.raises(ConfigError, match=r"shard\.00000"):
            MDSReader(tmp_path)[0]


@pytest.mark.parametrize("name", ["md5", "sha1", "sha256", "blake2b", "xxh128", "xxh3_64"])
def test_every_kind_of_checksum_is_compared(tmp_path, name):
    with MDSWriter(tmp_path, {"n": "int"}, hashes=[name]) as writer:
        writer.write({"n": 5})
    assert MDSReader(tmp_path)[0] == {"n": 5}
    data = bytearray((tmp_path / "shard.00000.mds").read_bytes())
    data[-1] ^= 1
    (tmp_path / "shard.00000.mds").write_bytes(data)
    with pytest.raises(ConfigError, match=f"its {name} checksum"):
        MDSReader(tmp_path)[0]
    index = (tmp_path / "index.json").read_text()
    (tmp_path / "index.json").write_text(index.replace(f'"{name}": "', '"crc": "'))
    with pytest.raises(ConfigError, match="'crc' is not known"):
        MDSReader(tmp_path)


def test_bytes_are_as_the_format_says(tmp_path):
    with MDSWriter(tmp_path, {"b": "str", "a": "int32"}) as writer:
        writer.write({"a": 5, "b": "xy"})
        writer.write({"a": 6, "b": ""})
    config = {
        "version": 2, "format": "mds", "compression": None, "hashes": [], "size_limit": 1 << 26, "column_names": ["a", "b"],
        "column_encodings": ["int32", "str"], "column_sizes": [4, None],
    }  # fmt: skip
    head = json.dumps(config, sort_keys=True).encode()
    samples = [struct.pack("<Ii", 2, 5) + b"xy", struct.pack("<Ii", 0, 6)]
    start = 4 + 12 + len(head)
    expected = struct.pack("<4I", 2, start, start + 10, start + 18) + head + b"".join(samples)
    assert (tmp_path / "shard.00000.mds").read_bytes() == expected
    index = json.loads((tmp_path / "index.json").read_text())
    raw = {"basename": "shard.00000.mds", "bytes": len(expected), "hashes": {}}
    assert index == {"version": 2, "shards": [{**config, "samples": 2, "raw_data": raw, "zip_data": None}]}


def test_dynamic_arrays_are_as_the_format_says():
    assert encode_value("ndarray", np.array([[1, 2]], np.uint16)) == bytes([16, 2 << 2, 1, 2, 1, 0, 2, 0])
    assert encode_value("ndarray:uint8", np.zeros(300, np.uint8))[:3] == bytes([1 << 2 | 1, 44, 1])
    for array in (np.array(3.5), np.zeros((0, 4), np.int8), np.arange(70_000)):
        assert np.array_equal(decode_value("ndarray", encode_value("ndarray", array)), array)


@pytest.mark.parametrize("encoding", ["ndarray", "ndarray:uint16", "int64", "str", "json", "str_float"])
def test_any_bytes_give_a_value_or_an_error(encoding):
    rng = np.random.default_rng(1)
    for _ in range(3000):
        data = rng.integers(0, 256, rng.integers(0, 24), dtype=np.uint8).tobytes()
        with contextlib.suppress(ValueError):
            decode_value(encoding, data)


def test_every_damage_is_an_error(tmp_path):
    with MDSWriter(tmp_path, {"tokens": "ndarray:uint16"}, hashes=["xxh3_64"]) as writer:
        for i in range(5):
            writer.write({"tokens": np.arange(i, dtype=np.uint16)})
    path = tmp_path / "shard.00000.mds"
    whole = path.read_bytes()
    for byte in range(0, len(whole), 3):
        path.write_bytes(whole[:byte] + bytes([whole[byte] ^ 4]) + whole[byte + 1 :])
        with pytest.raises(ConfigError, match="checksum"):
            list(MDSReader(tmp_path))
        for number in range(5):  # without checksums: a value or a clear error
            try:
                MDSReader(tmp_path, verify=False)[number]
            except ConfigError as error:
                assert "sample" in str(error)
    path.write_bytes(whole[:-1])
    with pytest.raises(ConfigError, match="bytes, index.json says"):
        MDSReader(tmp_path)[0]
    path.unlink()
    with pytest.raises(ConfigError, match="index.json names it"):
        MDSReader(tmp_path)[0]
    (tmp_path / "index.json").write_text('{"version": 2, "shards": [{}]}')
    with pytest.raises(ConfigError, match="not an index"):
        MDSReader(tmp_path)


def test_images_come_back(tmp_path):
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    pictures = [image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8)), image.new("L", (3, 2), 9)]
    with MDSWriter(tmp_path, {"a": "pil", "b": "png", "c": "jpeg"}) as writer:
        for picture in pictures:
            writer.write({"a": picture, "b": picture, "c": picture})
    for picture, got in zip(pictures, MDSReader(tmp_path), strict=True):
        for name in "ab":
            assert got[name].mode == picture.mode and got[name].tobytes() == picture.tobytes()
        assert got["c"].size == picture.size and got["c"].format == "JPEG"
    raw = encode_value("pil", pictures[0])
    assert raw[:15] == struct.pack("<3I", 7, 5, 3) + b"RGB" and len(raw) == 15 + 105
    with pytest.raises(ValueError, match="takes a PIL image"):
        encode_value("png", b"no")


def test_what_is_no_image_is_an_error():
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(1)
    for encoding in ("pil", "png", "jpeg"):
        whole = encode_value(encoding, image.fromarray(rng.integers(0, 256, (9, 9, 3), np.uint8)))
        for _ in range(500):
            data = bytearray(whole[: rng.integers(0, len(whole) + 1)])
            for at in rng.integers(0, len(data), 3) if data else ():
                data[at] = rng.integers(256)
            with contextlib.suppress(ValueError):
                decode_value(encoding, bytes(data))


def test_pickles_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="pkl"):
        MDSWriter(tmp_path, {"a": "pkl"})


def test_token_documents(tmp_path):
    documents = [np.arange(n) for n in (3, 0, 9)]
    assert write_token_documents(documents, tmp_path / "d", np.dtype(np.int32), compression="zstd") == 3
    assert [list(d) for d in read_token_documents(tmp_path / "d")] == [list(d) for d in documents]
    with pytest.raises(ConfigError, match="'text' is not an array"):
        list(read_token_documents(tmp_path / "d", "text"))
    with pytest.raises(ConfigError, match="already"):
        write_token_documents(documents, tmp_path / "d", np.dtype(np.int32))


def test_mosaicml_streaming_reads_ours_and_we_read_theirs(tmp_path):
    pytest.importorskip("streaming")
    import streaming.base.format.mds as streaming

    columns = {name: encoding for name, encoding in COLUMNS.items() if name != "j"}
    with MDSWriter(tmp_path / "ours", columns, size_limit=3000) as writer:
        for i in range(100):
            writer.write(sample(i))
    with streaming.MDSWriter(out=str(tmp_path / "theirs"), columns=columns, size_limit=3000) as theirs:
        for i in range(100):
            theirs.write({name: sample(i)[name] for name in columns})
    for path in sorted((tmp_path / "theirs").iterdir()):
        if path.suffix == ".mds":
            assert path.read_bytes() == (tmp_path / "ours" / path.name).read_bytes()
    shards = json.loads((tmp_path / "ours" / "index.json").read_text())["shards"]
    readers = [streaming.MDSReader.from_json(str(tmp_path / "ours"), None, shard) for shard in shards]
    theirs_of_ours = [reader[k] for reader in readers for k in range(reader.size)]
    for i, got in enumerate(theirs_of_ours):
        assert got["text"] == f"té {i}" and got["tokens"].tolist() == list(range(1 + i % 7)) and got["n"] == -i
    assert len(theirs_of_ours) == 100
    for i, got in enumerate(MDSReader(tmp_path / "theirs")):
        same({name: sample(i)[name] for name in columns}, got)


def merged(folder, parts=2):
    """What mosaicml-streaming's merge_index makes: shards in folders, and one index above that names them."""
    infos = []
    for part in range(parts):
        name = f"a/{part}" if part else "0"
        with MDSWriter(folder / name, {"tokens": "ndarray:int32"}, compression="zstd" if part else None) as writer:
            for i in range(20):
                writer.write({"tokens": np.arange(50, dtype=np.int32) + 100 * part + i})
        for info in json.loads((folder / name / "index.json").read_text())["shards"]:
            for kind in ("raw_data", "zip_data"):
                if info[kind]:
                    info[kind]["basename"] = f"{name}/{info[kind]['basename']}"
            infos.append(info)
    (folder / "index.json").write_text(json.dumps({"version": 2, "shards": infos}))
    return infos


@pytest.mark.parametrize("where", ["here", "memory", "file"])
def test_shards_in_folders_below_one_index_are_read(tmp_path, where):
    merged(tmp_path / "m")
    folder = {"here": str(tmp_path / "m"), "file": f"file://{tmp_path}/m", "memory": f"memory://{tmp_path}/m"}[where]
    if where == "memory":
        fsspec = pytest.importorskip("fsspec")
        fsspec.filesystem("memory").put(str(tmp_path / "m"), f"{tmp_path}/m", recursive=True)
    cache = Cache(tmp_path / "cache", 1e9)
    reader = MDSReader(folder, cache=cache)
    assert len(reader) == 40 and reader[39]["tokens"][0] == 119
    file = MDSTokens(folder, cache)
    assert file.num_tokens == 2000 and file.document(25)[0] == 105
    (tmp_path / "m" / "0" / "shard.00000.mds").unlink()
    if where == "here":
        with pytest.raises(ConfigError, match=r"m/0/shard\.00000\.mds: cannot be read"):
            MDSReader(folder)[0]


@pytest.mark.parametrize(
    "name",
    ["../x.mds", "a/../../x.mds", "/etc/x.mds", "a\\x.mds", "a//x.mds", "a/./x.mds", "a/", "", "..", "a\0x", 3, None],
)
def test_an_index_names_nothing_outside_of_its_folder(tmp_path, name):
    infos = merged(tmp_path / "m", 1)
    infos[0]["raw_data"]["basename"] = name
    (tmp_path / "m" / "index.json").write_text(json.dumps({"version": 2, "shards": infos}))
    with pytest.raises(ConfigError, match="is not the name of a file in the folder or below it"):
        MDSReader(tmp_path / "m")


def test_a_folder_of_shards_that_is_a_link_out_of_the_set_is_refused(tmp_path):
    merged(tmp_path / "m", 1)
    (tmp_path / "m" / "0").rename(tmp_path / "elsewhere")
    (tmp_path / "m" / "0").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="the folder '0' leads out of this one by a link"):
        MDSReader(tmp_path / "m")
    (tmp_path / "link").symlink_to(tmp_path / "m")
    (tmp_path / "m" / "0").unlink()
    (tmp_path / "elsewhere").rename(tmp_path / "m" / "0")
    assert len(MDSReader(tmp_path / "link")) == 20


@pytest.mark.parametrize("encoding", ["ndarray:int32:2,3", "ndarray:int32", "ndarray"])
def test_arrays_of_two_dimensions_are_no_tokens_in_any_encoding(tmp_path, encoding):
    with MDSWriter(tmp_path / "m", {"tokens": encoding}) as writer:
        for _ in range(3):
            writer.write({"tokens": np.ones((2, 3), np.int32)})
    with pytest.raises(ConfigError, match="dimension"):
        MDSTokens(tmp_path / "m", Cache(tmp_path / "cache", 1e9)).document(0)
