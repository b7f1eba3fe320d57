"""Other ways of finding near-duplicates, for `tools/bench data dedup`, each a program of one process: SIDE SOURCE.jsonl RESULT.

The result is a JSON list of the numbers of the documents that it would remove.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

WORDS, THRESHOLD = 5, 0.8


def texts(source: str) -> list[str]:
    with open(source, encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


def words(text: str) -> list[str]:
    """Lower-case words of letters, digits and all beyond ASCII: what tools/dedup takes for words."""
    return "".join(c if c.isalnum() or not c.isascii() else " " for c in text.lower()).split()


def runs(text: str) -> set[tuple[str, ...]]:
    found = words(text)
    return {tuple(found[i : i + WORDS]) for i in range(max(len(found) - WORDS + 1, min(len(found), 1)))}


def find_by_brute_force(source: str) -> tuple[set[int], int]:
    """Find all pairs of a Jaccard similarity of THRESHOLD and more, by counting what they share; all but the first document of
    each connected group would go. Also returns the number of pairs."""
    numbers: dict[int, int] = {}  # by a hash of 64 bits: the runs themselves would take gigabytes
    sets = [[numbers.setdefault(hash(run), len(numbers)) for run in runs(text)] for text in texts(source)]
    holders: list[list[int]] = [[] for _ in numbers]
    parent = list(range(len(sets)))

    def find(x: int) -> int:
        while parent[x] != x:
            parent[x] = parent[parent[x]]
            x = parent[x]
        return x

    pairs = 0
    for number, mine in enumerate(sets):
        shared: dict[int, int] = {}
        for run in mine:
            for other in holders[run]:
                shared[other] = shared.get(other, 0) + 1
            holders[run].append(number)
        for other, common in shared.items():
            if common >= THRESHOLD * (len(mine) + len(sets[other]) - common):
                pairs += 1
                a, b = find(number), find(other)
                parent[max(a, b)] = min(a, b)
    return {number for number in range(len(sets)) if find(number) != number}, pairs


def run_rensa(source: str) -> list[int]:
    """rensa's R-MinHash and its LSH as its documentation uses them, over sets of runs made in Python."""
    from rensa import RMinHash, RMinHashLSH

    index = RMinHashLSH(threshold=THRESHOLD, num_perm=126, num_bands=21)
    signatures = []
    for number, text in enumerate(texts(source)):
        signature = RMinHash(num_perm=126, seed=1)
        signature.update([" ".join(run) for run in runs(text)])
        index.insert(number, signature)
        signatures.append(signature)
    gone: set[int] = set()
    for number, signature in enumerate(signatures):
        if number not in gone:
            near = (other for other in index.query(signature) if other > number)
            gone |= {other for other in near if signature.jaccard(signatures[other]) >= THRESHOLD}
    return sorted(gone)


def run_datatrove(source: str) -> list[int]:
    """datatrove's four stages in their order. Words are split at white space in place of its model of a language: less
    work than it does by default."""
    import xxhash
    from datatrove.data import Document
    from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupSignature
    from datatrove.pipeline.dedup import minhash as module
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.utils import word_tokenizers
    from datatrove.utils.hashes import xxhash as hashes

    class Digest:
        """xxhash 4 hashes bytes only, this datatrove gives it texts."""

        xxh32_intdigest = staticmethod(lambda text: xxhash.xxh32_intdigest(text.encode()))
        xxh64_intdigest = staticmethod(lambda text: xxhash.xxh64_intdigest(text.encode()))

    class Splitter:
        def word_tokenize(self, text: str) -> list[str]:
            return text.split()

    hashes.xxhash = Digest  # type: ignore[attr-defined]
    for place in (module, word_tokenizers):
        for name in ("load_word_tokenizer", "split_into_words"):
            if hasattr(place, name):
                replacement: Any = (
                    (lambda *_: Splitter()) if name.startswith("load") else (lambda text, *_: text.split())
                )
                setattr(place, name, replacement)
    config = MinhashConfig(n_grams=WORDS)
    with tempfile.TemporaryDirectory(prefix="bench-datatrove-") as folder:
        documents = (Document(text=text, id=str(number)) for number, text in enumerate(texts(source)))
        MinhashDedupSignature(f"{folder}/signatures", config=config).run(documents, 0, 1)
        for bucket in range(config.num_buckets):
            MinhashDedupBuckets(f"{folder}/signatures", f"{folder}/buckets", config=config).run(
                None, bucket, config.num_buckets
            )
        MinhashDedupCluster(f"{folder}/buckets", f"{folder}/remove", config=config).run(None, 0, 1)
        content = b"".join(path.read_bytes() for path in sorted(Path(folder, "remove").glob("*.remove")))
    return [int.from_bytes(content[at : at + 4], "little") for at in range(0, len(content), 4)]


if __name__ == "__main__":
    side, source, result = sys.argv[1:4]
    Path(result).write_text(json.dumps(sorted({"rensa": run_rensa, "datatrove": run_datatrove}[side](source))))
