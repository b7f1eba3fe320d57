"""Damaged data sets by the million: what the readers say to them is a message, never another exception or a crash."""

import argparse
import faulthandler
import io
import json
import multiprocessing
import os
import platform
import random
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np

HELP = "damage indexes, shards and values of data sets, and require a message for each that cannot be read"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--inputs", type=int, default=1_000_000, help="damaged inputs, over all readers (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the damage (%(default)s)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")


class _Memory:
    """A file in memory, as the readers see files."""

    def __init__(self, name: str, data: bytes):
        self.name, self.size, self._raw = name, len(data), np.frombuffer(data, np.uint8)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self._raw[start:stop]

    def array(self, offset: int, dtype: np.dtype, count: int) -> np.ndarray:
        return self._raw[offset : offset + count * dtype.itemsize].view(dtype)

    def prefetch(self, start: int, stop: int) -> None:
        pass


EDGES = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 62, (1 << 63) - 1, (1 << 64) - 1]


def damage(data: bytes, rng: random.Random) -> bytes:
    """One to four changes: bits, bytes, whole numbers at their edges, cuts, repeats, other lengths."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        kind, at = rng.randrange(7), rng.randrange(len(out) + 1)
        if not out or kind == 0:
            out[at:at] = rng.randbytes(rng.randrange(1, 9))
        elif kind == 1:
            out[at % len(out)] ^= 1 << rng.randrange(8)
        elif kind == 2:
            out[at % len(out)] = rng.randrange(256)
        elif kind == 3:
            del out[at:]
        elif kind == 4:
            del out[at : at + rng.randrange(1, 17)]
        elif kind == 5:
            value, width = rng.choice(EDGES), rng.choice((1, 2, 4, 8))
            at -= at % width
            out[at : at + width] = (value & ((1 << 8 * width) - 1)).to_bytes(width, "little")
        else:
            out[at:at] = out[at : at + rng.randrange(1, 33)]
    return bytes(out)


def _index_cases() -> Callable[[random.Random], Callable[[], None]]:
    """.idx and .bin: opened, looked up, cut into samples, read, put into Megatron's order, verified."""
    from megalm.data.formats.mds import write_index
    from megalm.data.megatron_order import MegatronSource
    from megalm.data.separate import separate_documents
    from megalm.data.sources import TokenSource
    from megalm.data.tokens import TokenFile

    pairs = []
    for dtype, lengths in (("<u2", [3, 1, 9, 20, 7]), ("<i4", [40]), ("<i8", [2, 2, 2]), ("u1", [5, 5, 30, 1])):
        path = Path(f"/tmp/fuzz-{os.getpid()}.idx")
        write_index(path, np.dtype(dtype), np.array(lengths))
        pairs.append((path.read_bytes(), np.arange(sum(lengths)).astype(dtype).tobytes()))
        path.unlink()

    def case(rng: random.Random) -> Callable[[], None]:
        index, tokens = rng.choice(pairs)
        if rng.random() < 0.8:
            index = damage(index, rng)
        else:
            tokens = damage(tokens, rng)
        number, thorough = rng.randrange(4), rng.random() < 0.3

        def read() -> None:
            file = TokenFile.of(_Memory("x.idx", index), _Memory("x.bin", tokens))
            file.document(number)
            source = TokenSource("x", file, 4, 1.0, 0.2)
            for sample in range(min(2, source.num_samples)):
                assert len(source.read(sample)) == 5
                separate_documents([source.boundaries(sample)], 4)
                source.locate(sample)
            held_out = source.held_out()
            if held_out.num_samples:
                assert len(held_out.read(0)) == 5
                separate_documents([held_out.boundaries(0)], 4, [held_out.filled(0)])
            if thorough:
                ordered = MegatronSource("x", file, 4, 1.0, [4.0, 1.0], 9, seed=number)
                for sample in range(ordered.num_samples):
                    assert len(ordered.read(sample)) == 5
                file.verify(vocab_size=100)

        return read

    return case


def _shard_cases() -> Callable[[random.Random], Callable[[], None]]:
    """Shards of MDS, their index left as it is."""
    import tempfile

    from megalm.data.formats.mds import MDSReader, MDSWriter

    columns = {"tokens": "ndarray:uint16", "text": "str", "n": "int", "j": "json", "free": "ndarray"}
    with tempfile.TemporaryDirectory() as folder:
        with MDSWriter(folder, columns) as writer:
            for i in range(4):
                row = {
                    "tokens": np.arange(i * 3, dtype=np.uint16),
                    "text": "é" * i,
                    "n": i,
                    "j": [i],
                    "free": np.ones((i, 2)),
                }
                writer.write(row)
        whole = Path(folder, "shard.00000.mds").read_bytes()
        reader = MDSReader(folder, verify=False)

    def case(rng: random.Random) -> Callable[[], None]:
        data, number = np.frombuffer(damage(whole, rng), np.uint8), rng.randrange(4)

        def read() -> None:
            reader._open[0] = data
            reader[number]

        return read

    return case


def _json_cases() -> Callable[[random.Random], Callable[[], None]]:
    """index.json: as bytes, and with values exchanged for others."""
    from megalm.config.errors import ConfigError
    from megalm.data.formats.mds import _checked_info

    info = {
        "version": 2, "format": "mds", "compression": None, "hashes": ["xxh64"], "size_limit": 1 << 26, "samples": 3,
        "column_names": ["a", "b"], "column_encodings": ["int32", "ndarray:uint16"], "column_sizes": [4, None],
        "raw_data": {"basename": "shard.00000.mds", "bytes": 99, "hashes": {"xxh64": "00"}}, "zip_data": None,
    }  # fmt: skip
    text = json.dumps(info).encode()
    odd = [
        None,
        True,
        -1,
        1.5,
        1 << 70,
        "",
        "x",
        "../x",
        "ndarray:uint16:",
        "ndarray:uint16:-1",
        [],
        {},
        [None],
        {"a": 1},
    ]

    def case(rng: random.Random) -> Callable[[], None]:
        if rng.random() < 0.5:
            data = damage(text, rng)
        else:
            changed = json.loads(text)
            target = rng.choice([changed, changed, changed["raw_data"]])
            target[rng.choice(list(target))] = rng.choice(odd)
            data = json.dumps(changed).encode()

        def read() -> None:
            try:
                _checked_info("index.json", json.loads(data))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
                raise ConfigError(str(error)) from error  # as the reader does

        return read

    return case


def _document_cases() -> Callable[[random.Random], Callable[[], None]]:
    """Text to be tokenized, in every format and compression; a broken record is a BadDocument, a broken file an error."""
    import bz2
    import csv
    import gzip
    import lzma

    import zstandard

    from megalm.config.errors import ConfigError
    from megalm.corpus.documents import BadDocument, cut_into_pieces, find_files, read_piece

    rows = [{"text": "né " * (i % 5), "n": i, "meta": {"lang": "en"}} for i in range(12)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, ["text", "n"], extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    forms = [(".jsonl", lines), (".json", json.dumps(rows).encode()), (".csv", table.getvalue().encode())]
    forms.append((".txt", "né\n日本語\n".encode() * 9))
    packs: dict[str, Callable[[bytes], bytes]] = {
        ".gz": gzip.compress,
        ".bz2": bz2.compress,
        ".xz": lzma.compress,
        ".zst": zstandard.compress,
    }
    forms += [(f".jsonl{ending}", pack(lines)) for ending, pack in packs.items()]
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet

        content = pyarrow.Table.from_pylist(rows)
        for new in (pyarrow.ipc.new_file, pyarrow.ipc.new_stream):
            out = io.BytesIO()
            with new(out, content.schema) as target:
                target.write_table(content)
            forms.append((".arrow", out.getvalue()))
        out = io.BytesIO()
        pyarrow.parquet.write_table(content, out, row_group_size=5)
        forms.append((".parquet", out.getvalue()))
    except ImportError:
        pass

    def case(rng: random.Random) -> Callable[[], None]:
        ending, data = rng.choice(forms)
        damaged = damage(data, rng)
        path = f"/tmp/fuzz-{os.getpid()}{ending}"

        def read() -> None:
            Path(path).write_bytes(damaged)
            try:
                pieces = cut_into_pieces(find_files([path]))
                found = [item for piece in pieces for item in read_piece(piece, "text", ["meta.lang"])]
                bad = [item for item in found if isinstance(item, BadDocument)]
                if bad:
                    raise ConfigError(f"{bad[0].place}: {bad[0].reason}")
            finally:
                os.unlink(path)

        return read

    return case


def _value_cases() -> Callable[[random.Random], Callable[[], None]]:
    """Values of MDS columns, images too."""
    from megalm.data.formats.mds_values import decode_value, encode_value

    values: list[tuple[str, Any]] = [
        ("ndarray", np.arange(12, dtype=np.int16).reshape(3, 4)), ("ndarray:uint16", np.arange(5, dtype=np.uint16)),
        ("ndarray:int32:2,2", np.ones((2, 2), np.int32)), ("int64", 7), ("float32", 0.5), ("str", "né"), ("json", {"a": [1]}),
        ("str_int", 10**20), ("str_float", 0.25), ("str_decimal", "1.5"), ("uint8", 3),
    ]  # fmt: skip
    try:
        from PIL import Image

        picture = Image.fromarray(np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3))
        values += [(encoding, picture) for encoding in ("pil", "png", "jpeg")]
    except ImportError:
        pass
    encoded = [(encoding, encode_value(encoding, value)) for encoding, value in values]

    def case(rng: random.Random) -> Callable[[], None]:
        encoding, data = rng.choice(encoded)
        damaged = damage(data, rng) if rng.random() < 0.9 else rng.randbytes(rng.randrange(64))
        return lambda: decode_value(encoding, damaged)

    return case


READERS = {
    "token files": (_index_cases, 0.4),
    "shards": (_shard_cases, 0.2),
    "index.json": (_json_cases, 0.1),
    "values": (_value_cases, 0.15),
    "documents": (_document_cases, 0.15),
}
"""How each reader's inputs are made, and its share of them."""


def _work(task: tuple[str, int, int]) -> tuple[str, Counter, list[str]]:
    """One stretch of inputs of one reader: how many were read, how many refused, and what else happened."""
    import warnings

    from megalm.config.errors import ConfigError

    warnings.simplefilter("ignore")
    name, seed, count = task
    case, rng = READERS[name][0](), random.Random(f"{name} {seed}")
    outcomes: Counter = Counter()
    failures: list[str] = []
    for number in range(count):
        run = case(rng)
        try:
            run()
            outcomes["read"] += 1
        except (ConfigError, ValueError) as error:
            if isinstance(error, ValueError) and name != "values":
                failures.append(_explained(name, seed, number))
            outcomes["refused"] += 1
        except Exception:
            outcomes["failed"] += 1
            failures.append(_explained(name, seed, number))
    return name, outcomes, failures[:5]


def _explained(name: str, seed: int, number: int) -> str:
    out = io.StringIO()
    traceback.print_exc(limit=-4, file=out)
    return f"{name}, seed {seed}, input {number}: {out.getvalue()}"


def run(args: argparse.Namespace) -> int:
    stretch = 5000
    tasks = [
        (name, args.seed * 1_000_003 + part, min(stretch, count - part * stretch))
        for name, (_, share) in READERS.items()
        for count in [round(args.inputs * share)]
        for part in range(-(-count // stretch))
    ]
    start = time.perf_counter()
    totals: dict[str, Counter] = {name: Counter() for name in READERS}
    failures: list[str] = []
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.workers, mp_context=spawn, initializer=faulthandler.enable) as pool:
        running = {pool.submit(_work, task): task for task in tasks}
        for future in as_completed(running):
            try:
                name, outcomes, failed = future.result()
            except BrokenProcessPool:
                failures.append(f"a process died at {running[future]} or beside it")
                break
            totals[name].update(outcomes)
            failures += failed
    result = {
        "machine": platform.platform(),
        "python": sys.version.split()[0],
        "inputs": sum(sum(counter.values()) for counter in totals.values()),
        "seconds": round(time.perf_counter() - start, 1),
        "readers": {name: dict(counter) for name, counter in totals.items()},
        "failures": failures[:20],
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    if args.json:
        print(json.dumps(result))
    else:
        print(f"{result['inputs']:,} inputs in {result['seconds']} s")
        for name, counter in totals.items():
            print(
                f"  {name:<12} read {counter['read']:>8,}   refused {counter['refused']:>8,}   failed {counter['failed']}"
            )
        print("\n".join(failures[:20]))
    return 1 if failures else 0
