"""Megatron's indexed data set: PREFIX.bin holds the tokens, PREFIX.idx where each sequence and document lies.

Layout of the index, little-endian: 9 bytes magic, u64 version 1, u8 code of the token type, u64 sequences, u64 document
indices (documents + 1), i32 length of each sequence, i64 byte position of each sequence in .bin, i64 document
indices (the first sequence of each document, then the number of sequences), and perhaps one i8 mode for each sequence.

Opening costs the same for ten megabytes and for a hundred gigabytes: both files are mapped into memory, and only the
header, the ends of the tables and the sizes of the files are checked. `TokenFile.verify` reads everything.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megalm.config.errors import ConfigError
from megalm.data.formats.foreign_tokens import format_of
from megalm.data.formats.store import Bytes, Cache, Store, is_url, open_bytes

MAGIC = b"MMIDIDX\0\0"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.float64, 7: np.float32, 8: np.uint16}
CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}
TOKEN_CODES = (1, 2, 3, 4, 5, 8)
TARGETS = np.dtype("<f2")
UINT16_VOCABULARY = 65_500  # Megatron's own bound: it stores larger vocabularies as i32
ADVICE = "Restore the file from its source, or make the data set again with `megalm tokenize`."


def choose_token_dtype(vocab_size: int) -> np.dtype:
    """Choose the type in which Megatron stores the tokens of a vocabulary of this size."""
    return np.dtype(np.uint16 if vocab_size < UINT16_VOCABULARY else np.int32)


def resolve_prefix(prefix: str | os.PathLike) -> Path:
    """Resolve the local prefix whose .idx exists: as given (with or without an ending), or with `_text_document` added, as the
    tokenizer writes it.

    Errors: ConfigError naming every file that was looked for.
    """
    return Path(_resolve(os.fspath(prefix), os.path.exists))


def _resolve(prefix: str, exists: Callable[[str], bool]) -> str:
    text = prefix[:-4] if prefix.endswith((".bin", ".idx")) else prefix
    tried = [text, text + "_text_document"]
    for candidate in tried:
        if exists(candidate + ".idx"):
            return candidate
    for path in (prefix, f"{text}.bin"):
        if path and exists(path):
            raise ConfigError(_why_no_data_set(path, text))
    names = " or ".join(f"{candidate}.idx" for candidate in tried)
    raise ConfigError(
        f"data set {prefix!r} does not exist: there is no {names}. Give the prefix of a .bin/.idx pair, "
        f"or make one: `megalm tokenize INPUT --tokenizer FILE --output {text}`."
    )


def _why_no_data_set(path: str, prefix: str) -> str:
    """Of what is there and cannot be trained on: what it is, and how it becomes a data set."""
    if not is_url(path) and os.path.isdir(path):
        return f"{path}: is a folder without an index.json of MDS shards. Give the prefix of a .bin/.idx pair in it."
    known = format_of(path)
    if known or path.endswith((".bin", ".npy", ".ds")):
        what = (
            f"is {known}" if known else f"has no {prefix}.idx beside it that says what it holds; it may be raw tokens"
        )
        option = "" if known else " --token-type uint16"
        return (
            f"{path}: {what}, and no .bin/.idx pair: make one by `megalm tokenize {path} --from-tokens{option} "
            "--end-id N --output PREFIX`, N being the token that ends documents."
        )
    return (
        f"{path}: is no token file. If it holds text, `megalm tokenize {path} --tokenizer FILE --output PREFIX` makes "
        "one."
    )


class TokenFile:
    """A read-only .bin/.idx pair: memory-mapped, or, where the prefix is a URL, read in byte ranges through the cache.

    Errors: ConfigError with the file, the byte and what to do, if the pair is missing, truncated or inconsistent.
    """

    prefix: str | Path
    targets: np.ndarray | None = None
    """Weight of each token as something to be learned, in fp16; None: all are, alike. Kept in PREFIX.targets, of local pairs."""
    cache: Any = None
    """The Cache that remote data is read through."""

    def __init__(self, prefix: str | os.PathLike, cache: Cache | None = None):
        if is_url(prefix):
            self.cache = cache = cache or Cache()
            tries = cache.tries
            self.prefix = _resolve(os.fspath(prefix), lambda url: Store(url, tries).exists())
        else:
            self.prefix = resolve_prefix(prefix)
        self.index_path, self.tokens_path = f"{self.prefix}.idx", f"{self.prefix}.bin"
        try:
            index, tokens = open_bytes(self.index_path, cache), open_bytes(self.tokens_path, cache)
        except ConfigError as error:
            raise ConfigError(f"{error} A data set is a pair of .bin and .idx. {ADVICE}") from error
        self._use(index, tokens)
        if not is_url(prefix):
            self.targets = self._open_targets(f"{self.prefix}.targets")

    @classmethod
    def of(cls, index: Bytes, tokens: Bytes) -> TokenFile:
        """A pair that is open already."""
        self = cls.__new__(cls)
        self.prefix, self.index_path, self.tokens_path = tokens.name, index.name, tokens.name
        self._use(index, tokens)
        return self

    def _use(self, index: Bytes, tokens: Bytes) -> None:
        end = self._read_index(index)
        if end != tokens.size:
            self._fail(
                self.tokens_path, min(end, tokens.size), f"has {tokens.size} bytes, but its index asks for {end}"
            )
        self._bytes = tokens
        self.num_tokens = tokens.size // self.dtype.itemsize
        if self.num_tokens == 0:
            self._fail(self.tokens_path, 0, "holds no token")
        self.tokens = tokens.array(0, self.dtype, self.num_tokens)

    def _read_index(self, index: Bytes) -> int:
        """Checks the header and the ends of the tables, and makes them attributes; returns the bytes of .bin."""
        path, index_bytes = index.name, index.size
        index.prefetch(0, HEADER.size)
        header = index.read(0, HEADER.size).tobytes()
        if not header.startswith(MAGIC):
            self._fail(path, 0, f"starts with {header[:9]!r} and not with {MAGIC!r}: it is not a Megatron index")
        if len(header) < HEADER.size:
            self._fail(path, len(header), f"ends inside its header of {HEADER.size} bytes")
        _, version, code, sequences, indices = HEADER.unpack(header)
        if version != 1:
            self._fail(path, 9, f"has version {version}; only version 1 is known")
        if code not in TOKEN_CODES:
            self._fail(path, 17, f"has element type {code}; tokens are one of {', '.join(map(str, TOKEN_CODES))}")
        if sequences == 0 or indices < 2:
            self._fail(path, 18, f"holds {sequences} sequences and {max(indices, 1) - 1} documents: it is empty")
        expected = HEADER.size + 12 * sequences + 8 * indices
        if index_bytes not in (expected, expected + sequences):
            self._fail(
                path,
                min(index_bytes, expected),
                f"has {index_bytes} bytes, but {sequences} sequences and {indices - 1} documents take {expected}",
            )
        self.dtype = np.dtype(DTYPES[code]).newbyteorder("<")
        self.num_sequences, self.num_documents = sequences, indices - 1
        at = HEADER.size
        for edge in (at + 4 * sequences, at + 12 * sequences, expected):  # where two tables meet
            index.prefetch(edge - 8, min(edge + 8, index_bytes))
        self.lengths = index.array(at, np.dtype("<i4"), sequences)
        at += 4 * sequences
        self.pointers = index.array(at, np.dtype("<i8"), sequences)
        at += 8 * sequences
        self.documents = index.array(at, np.dtype("<i8"), indices)
        if self.documents[0] != 0 or self.documents[-1] != sequences:
            self._fail(
                path,
                at,
                f"has document indices from {self.documents[0]} to {self.documents[-1]}; they must run from 0 to "
                f"{sequences}",
            )
        if self.pointers[0] != 0 or self.lengths[-1] < 0:
            self._fail(path, HEADER.size, "has a first sequence that does not start at byte 0, or a negative length")
        return int(self.pointers[-1]) + int(self.lengths[-1]) * self.dtype.itemsize

    def _fail(self, path: str, byte: int, what: str) -> None:
        raise ConfigError(f"{path}: byte {byte}: the file {what}. {ADVICE}")

    def _open_targets(self, path: str) -> np.ndarray | None:
        if not os.path.exists(path):
            return None
        size, wanted = os.path.getsize(path), TARGETS.itemsize * self.num_tokens
        if size != wanted:
            raise ConfigError(
                f"{path}: has {size} bytes, and {self.num_tokens} tokens take {wanted}: it is cut off, or of other tokens. Make "
                "the data set again with `megalm posttrain prepare`, or remove the file to train on every token."
            )
        return np.memmap(path, TARGETS, "r")

    def prefetch(self, start: int, stop: int) -> None:
        """Tokens [start, stop) will be read soon; begin to fetch them."""
        self._bytes.prefetch(start * self.dtype.itemsize, stop * self.dtype.itemsize)

    def document_start(self, document: int) -> int:
        """Position, in tokens, of a document's first token; document == num_documents: the end of the data."""
        sequence = int(self.documents[document])
        if sequence == self.num_sequences:
            return self.num_tokens
        if not 0 <= sequence < self.num_sequences:
            self._fail(
                self.index_path,
                HEADER.size + 12 * self.num_sequences + 8 * document,
                f"has the document index {sequence} for document {document}, outside its {self.num_sequences} sequences",
            )
        start, rest = divmod(int(self.pointers[sequence]), self.dtype.itemsize)
        if rest or not 0 <= start <= self.num_tokens:
            self._fail(
                self.index_path,
                HEADER.size + 4 * self.num_sequences + 8 * sequence,
                f"has the pointer {self.pointers[sequence]} for sequence {sequence}, which is not one into its tokens",
            )
        return start

    def document(self, document: int) -> np.ndarray:
        """All tokens of one document."""
        if not 0 <= document < self.num_documents:
            raise ConfigError(
                f"{self.prefix}: there is no document {document}; there are {self.num_documents}, counted from 0."
            )
        start, stop = self.document_start(document), self.document_start(document + 1)
        if stop < start:
            at = HEADER.size + 12 * self.num_sequences + 8 * document
            self._fail(
                self.index_path, at, f"lets document {document} end at token {stop}, before its start at {start}"
            )
        return self.tokens[start:stop]

    def document_at(self, position: int) -> int:
        """The document that holds the token at this position; time grows with the logarithm of the number of
        documents.
        """
        low, high = 0, self.num_documents - 1
        while low < high:
            middle = (low + high + 1) // 2
            if self.document_start(middle) <= position:
                low = middle
            else:
                high = middle - 1
        return low

    def document_starts(self, start: int, stop: int) -> tuple[int, np.ndarray]:
        """The document at `start`, and the positions in (start, stop) where further documents begin."""
        first = self.document_at(start)
        last = self.document_at(stop - 1)
        sequences = self.documents[first + 1 : last + 1]
        if len(sequences) and not 0 <= sequences.min() <= sequences.max() < self.num_sequences:
            self._fail(
                self.index_path,
                HEADER.size + 12 * self.num_sequences,
                f"has document indices outside its {self.num_sequences} sequences near document {first}",
            )
        starts = self.pointers[sequences] // self.dtype.itemsize if len(sequences) else np.empty(0, np.int64)
        if len(starts) and (starts[0] <= start or starts[-1] >= stop or (np.diff(starts) < 0).any()):
            at = HEADER.size + 4 * self.num_sequences
            self._fail(self.index_path, at, f"has pointers out of order near document {first}")
        return first, starts

    def read(self, start: int, stop: int) -> np.ndarray:
        """Read tokens [start, stop) of the whole stream, as int64."""
        return self.tokens[start:stop].astype(np.int64)

    def verify(self, vocab_size: int | None = None, chunk: int = 1 << 22) -> None:
        """Reads everything: pointers follow lengths, document indices do not fall, every token is below `vocab_size`.

        Errors: ConfigError with the file and byte of the first fault.
        """
        self.verify_index(chunk)
        for at in range(0, self.num_tokens, chunk):
            tokens = self.tokens[at : at + chunk]
            low, high = int(tokens.min()), int(tokens.max())
            if low < 0 or (vocab_size is not None and high >= vocab_size):
                worst = (tokens < 0) if low < 0 else (tokens >= vocab_size)
                bad = at + int(np.argmax(worst))
                self._fail(
                    self.tokens_path,
                    bad * self.dtype.itemsize,
                    f"holds the token {self.tokens[bad]} (document {self.document_at(bad)}), outside the vocabulary"
                    + (f" of {vocab_size}" if vocab_size is not None else ""),
                )

    def verify_index(self, chunk: int = 1 << 22) -> None:
        """The part of `verify` that reads the index only."""
        expected = 0
        for at in range(0, self.num_sequences, chunk):
            lengths = self.lengths[at : at + chunk].astype(np.int64)
            if (lengths < 0).any():
                bad = at + int(np.argmax(lengths < 0))
                self._fail(
                    self.index_path, HEADER.size + 4 * bad, f"has the length {self.lengths[bad]} for sequence {bad}"
                )
            ends = expected + np.cumsum(lengths) * self.dtype.itemsize
            starts = np.concatenate(([expected], ends[:-1]))
            wrong = self.pointers[at : at + chunk] != starts
            if wrong.any():
                bad = int(np.argmax(wrong))
                self._fail(
                    self.index_path,
                    HEADER.size + 4 * self.num_sequences + 8 * (at + bad),
                    f"has the pointer {self.pointers[at + bad]} for sequence {at + bad}, which must be {starts[bad]}",
                )
            expected = int(ends[-1])
        offset = HEADER.size + 12 * self.num_sequences
        for at in range(0, self.num_documents, chunk):
            falls = np.diff(self.documents[at : at + chunk + 1]) < 0
            if falls.any():
                bad = at + int(np.argmax(falls)) + 1
                self._fail(self.index_path, offset + 8 * bad, f"has document index {bad} below the one before it")

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self.document(i) for i in range(self.num_documents))


class TokenWriter:
    """Writes a .bin/.idx pair as a stream; nothing appears under the final names until `finish`.

    Memory does not grow with the data: sequence lengths and document indices wait in files of their own.
    The index is renamed last, so that a pair with an index is complete.
    """

    def __init__(self, prefix: str | os.PathLike, dtype: np.dtype | type, *, with_targets: bool = False):
        """with_targets: each document comes with the weights of its tokens as targets."""
        self.prefix = os.fspath(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        if self.dtype.newbyteorder("=") not in CODES:
            raise ConfigError(
                f"tokens cannot be stored as {self.dtype}; choose one of {', '.join(str(d) for d in CODES)}."
            )
        Path(self.prefix).parent.mkdir(parents=True, exist_ok=True)
        parts = ("bin", "lengths", "documents", "idx", *(["targets"] if with_targets else []))
        self._names = {part: f"{self.prefix}.{part}.partial" for part in parts}
        self._targets = open(self._names["targets"], "wb", buffering=1 << 18) if with_targets else None  # noqa: SIM115
        self._bin = open(self._names["bin"], "wb", buffering=1 << 20)  # noqa: SIM115
        self._lengths = open(self._names["lengths"], "wb", buffering=1 << 18)  # noqa: SIM115
        self._documents = open(self._names["documents"], "wb", buffering=1 << 18)  # noqa: SIM115
        self.num_sequences = self.num_documents = self.num_tokens = 0
        self._documents.write(struct.pack("<q", 0))

    def add_document(self, tokens: np.ndarray, targets: np.ndarray | None = None) -> None:
        """One document of one sequence, with the weights of its tokens where the pair has them; an empty one is refused."""
        if (targets is None) != (self._targets is None) or targets is not None and len(targets) != len(tokens):
            raise ValueError("every document comes with a weight for each token, or none does")
        self.add_documents(np.asarray(tokens), np.array([len(tokens)]))
        if self._targets is not None:
            self._targets.write(np.asarray(targets, dtype=TARGETS).tobytes())

    def add_documents(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Many documents at once: their tokens one after another, and the length of each."""
        lengths = np.asarray(lengths, dtype="<i8")
        if (lengths <= 0).any() or int(lengths.sum()) != len(tokens):
            raise ValueError("every document needs a token, and the lengths must add up to the tokens")
        if len(lengths) == 0:
            return
        if (lengths > 2**31 - 1).any():
            raise ConfigError(f"a document has {lengths.max()} tokens; the format holds at most {2**31 - 1}. Split it.")
        self._bin.write(np.ascontiguousarray(tokens, dtype=self.dtype).data)
        self._lengths.write(lengths.astype("<i4").data)
        self._documents.write(
            np.arange(self.num_sequences + 1, self.num_sequences + len(lengths) + 1, dtype="<i8").data
        )
        self.num_sequences += len(lengths)
        self.num_documents += len(lengths)
        self.num_tokens += len(tokens)

    def finish(self) -> None:
        """Writes the index, makes everything durable, and gives both files their names."""
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())
            file.close()
        with open(self._names["idx"], "wb", buffering=1 << 20) as index:
            index.write(
                HEADER.pack(MAGIC, 1, CODES[self.dtype.newbyteorder("=")], self.num_sequences, self.num_documents + 1)
            )
            for lengths in self._chunks("lengths", "<i4"):
                index.write(lengths.data)
            position = 0
            for lengths in self._chunks("lengths", "<i4"):
                ends = position + np.cumsum(lengths, dtype="<i8") * self.dtype.itemsize
                index.write(np.concatenate((np.array([position], "<i8"), ends[:-1])).data)
                position = int(ends[-1])
            for documents in self._chunks("documents", "<i8"):
                index.write(documents.data)
            index.flush()
            os.fsync(index.fileno())
        for part in ("idx", "targets"):  # never an old index, or old weights, beside new tokens
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{self.prefix}.{part}")
        os.replace(self._names["bin"], f"{self.prefix}.bin")
        if self._targets is not None:
            os.replace(self._names["targets"], f"{self.prefix}.targets")
        os.replace(self._names["idx"], f"{self.prefix}.idx")
        self._remove()

    def abort(self) -> None:
        """Closes and removes what was written."""
        for file in self._files:
            with contextlib.suppress(OSError):
                file.close()
        self._remove()

    @property
    def _files(self) -> list[Any]:
        return [self._bin, self._lengths, self._documents, *([] if self._targets is None else [self._targets])]

    def _chunks(self, part: str, dtype: str, count: int = 1 << 20) -> Iterator[np.ndarray]:
        with open(self._names[part], "rb") as file:
            while len(chunk := np.fromfile(file, dtype=dtype, count=count)):
                yield chunk

    def _remove(self) -> None:
        for name in self._names.values():
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)

    def __enter__(self) -> TokenWriter:
        return self

    def __exit__(self, kind, value, trace) -> None:
        if kind is None:
            self.finish()
        else:
            self.abort()
