"""The order against the algorithm written as Megatron runs it: step by step, one token boundary after another."""

import math
import zlib

import numpy as np
import pytest

from megalm.config.errors import ConfigError
from megalm.data import megatron_order
from megalm.data.loader import Loader
from megalm.data.megatron_order import SampleIndex, blend, normalize, sample_starts, split_bounds
from megalm.data.native import load_library
from tests.data.test_loader import axis, config, write


def walk(sizes, documents, epochs, epoch_tokens, s):
    """The sample index by walking: where each sample begins, as (entry of the document order, offset)."""
    entries = (epochs * epoch_tokens - 1) // s
    index = np.zeros((entries + 1, 2), np.int64)
    at = offset = 0
    for sample in range(1, entries + 1):
        remaining = s + 1
        while remaining > 0:
            length = sizes[documents[at]] - offset
            remaining -= length
            if remaining <= 0:
                offset += remaining + length - 1
                remaining = 0
            elif at == len(documents) - 1:
                offset = sizes[documents[at]] - 1
                remaining = 0
            else:
                at += 1
                offset = 0
        index[sample] = at, offset
    return index


def restated(sizes, wanted, s, seed):
    tokens = int(np.sum(sizes))
    epochs = 1
    while epochs * tokens < wanted * s + 1:
        epochs += 1
    separate, sans = False, 0
    if epochs > 1:
        sans = ((epochs - 1) * tokens - 1) // s
        separate = wanted - sans < int(0.8 * ((tokens - 1) // s))
    random = np.random.RandomState(seed)

    def order(count):
        tiled = np.mgrid[0:count, 0 : len(sizes)][1].reshape(-1).astype(np.int32)
        random.shuffle(tiled)
        return tiled

    documents = np.concatenate((order(epochs - 1), order(1))) if separate else order(epochs)
    samples = walk(sizes, documents, epochs, tokens, s)
    total = samples.shape[0] - 1
    first = np.arange(sans if separate else total, dtype=np.uint32)
    random.shuffle(first)
    shuffle = first
    if len(first) != total:
        last = np.arange(len(first), total, dtype=np.uint32)
        random.shuffle(last)
        shuffle = np.concatenate((first, last))
    return documents, samples, shuffle


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("share", [0.3, 1.0, 1.2, 1.9, 3.5])
def test_the_three_indices(seed, share):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 60, 40).astype(np.int32)
    sizes[rng.integers(0, 40, 3)] = 17
    s = int(rng.integers(3, 20))
    wanted = max(1, int(share * sizes.sum() / s))
    documents, samples, shuffle = restated(sizes, wanted, s, seed)
    got = SampleIndex(sizes, 0, len(sizes), wanted, s, seed)
    assert np.array_equal(got.documents, documents)
    assert [got.place(i) for i in range(got.size + 1)] == [tuple(row) for row in samples.tolist()]
    assert np.array_equal(got.shuffle, shuffle) and got.shuffle.dtype == np.uint32
    starts = np.concatenate(([0], np.cumsum(sizes)))
    stream = np.concatenate([np.arange(starts[d], starts[d + 1]) for d in documents])
    for i in (0, got.size // 2, got.size - 1):
        tokens = np.concatenate([np.arange(starts[d] + a, starts[d] + b) for d, a, b in got.spans(i)])
        assert np.array_equal(tokens, stream[shuffle[i] * s : shuffle[i] * s + s + 1])


def test_separate_last_epoch_happens_in_these_tests():
    sizes = np.full(10, 10)
    assert len(set(SampleIndex(sizes, 0, 10, 22, 5, 1).documents[:10])) == 10  # a part of the second epoch: kept apart
    both = SampleIndex(sizes, 0, 10, 37, 5, 1).documents  # most of the second epoch: mixed into the first
    assert len(both) == 20 and len(set(both[:10])) < 10


def test_blend_is_greedy():
    weights = [0.5, 0.3, 0.2]
    source, index = blend(weights, 2000)
    counts = np.zeros(3)
    for i in range(2000):
        expected = int(np.argmax(np.array(weights) * max(i, 1.0) - counts))
        assert (source[i], index[i]) == (expected, counts[expected])
        counts[expected] += 1


needs_extension = pytest.mark.skipif(load_library() is None, reason="megalm._C is not built")


@needs_extension
@pytest.mark.parametrize("seed", range(8))
def test_blend_is_the_same_with_and_without_the_extension(monkeypatch, seed):
    rng = np.random.default_rng(seed)
    weights = [float(w) for w in rng.dirichlet(np.ones(2 + seed * 5))] if seed else [1 / 3, 1 / 3, 1 / 3]
    got = blend(weights, 20000)
    monkeypatch.setattr(megatron_order, "load_library", lambda: None)
    for a, b in zip(got, blend(weights, 20000), strict=True):
        assert a.dtype == b.dtype and np.array_equal(a, b)


@needs_extension
@pytest.mark.parametrize("seed", range(6))
def test_sample_starts_are_the_same_with_and_without_the_extension(monkeypatch, seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0 if seed % 2 else 1, 40, 300)  # also documents without a token
    order = (rng.permutation(900) % 300 + 1000).astype(np.int32)
    length = int(rng.integers(1, 90))
    samples = (3 * int(sizes.sum()) - 1) // length + 1
    got = sample_starts(sizes, order, 1000, samples, length)
    monkeypatch.setattr(megatron_order, "load_library", lambda: None)
    for a, b in zip(got, sample_starts(sizes, order, 1000, samples, length), strict=True):
        assert np.array_equal(a, b)


def test_blend_of_no_source_and_of_too_many():
    for weights in ([], [1.0] * 32768):
        with pytest.raises(ConfigError, match="cannot be blended"):
            blend(weights, 1)


def test_split_rounds_to_even():
    assert split_bounds([969, 30, 1], 1000) == [(0, 969), (969, 999), (999, 1000)]
    assert split_bounds([0.5, 0.5], 5) == [(0, 2), (2, 5)]
    assert split_bounds([1, 0, 0], 7) == [(0, 7), (7, 7), (7, 7)]


@pytest.fixture
def two(tmp_path):
    rng = np.random.default_rng(3)
    prefixes, at = [], 0
    for name in "ab":
        lengths = rng.integers(2, 30, 50)
        prefixes.append(write(tmp_path / name, np.split(np.arange(at, at + lengths.sum()), np.cumsum(lengths)[:-1])))
        at += int(lengths.sum())
    return prefixes


def megatron(prefixes, **changes):
    made = config(prefixes, order="megatron", **changes)
    made.data.split = "80,20,0"
    made.train.steps = 4
    return made


def test_loader_follows_it(two):
    loader = Loader(megatron(two), axis())
    wanted, shares = 48, [0.75, 0.25]
    order = blend(shares, wanted)
    indices = []
    for source, share in zip(loader.sources, shares, strict=True):
        lengths = source.file.lengths[:40]
        documents, samples, shuffle = restated(lengths, math.ceil(math.ceil(wanted * share) * 1.005), 8, 1)
        stream = np.concatenate([source.file.document(d) for d in documents])
        indices.append((stream, shuffle))
    got = [b for _ in range(4) for b in loader.next()]
    rows = [(t.tolist(), n.tolist()) for b in got for t, n in zip(b.tokens, b.labels, strict=True)]
    for (tokens, labels), source, index in zip(rows, *order, strict=True):
        stream, shuffle = indices[source]
        expected = stream[shuffle[index] * 8 : shuffle[index] * 8 + 9].tolist()
        assert tokens == expected[:-1] and labels == expected[1:]
    with pytest.raises(ConfigError, match="train.steps"):
        loader.next()


def test_loader_resumes_and_notices_changes(two):
    loader = Loader(megatron(two), axis())
    loader.next()
    state = loader.state_dict()
    other = [Loader(megatron(two), axis(rank, 2)) for rank in range(2)]
    for part in other:
        part.load_state_dict(state)
    expected = [t for b in loader.next() for t in b.tokens.tolist()]
    assert expected == [t for part in other for b in part.next() for t in b.tokens.tolist()]
    changed = megatron(two)
    changed.train.steps = 5
    with pytest.raises(ConfigError, match="must stay as they were"):
        Loader(changed, axis()).load_state_dict(state)


def test_documents_are_kept_apart_in_megatrons_order_too(two):
    (batch, *_) = Loader(megatron(two[:1], weights=None, packing="documents"), axis()).next()
    for tokens, positions, ids in zip(batch.tokens, batch.positions, batch.document_ids, strict=True):
        inside = ids[1:] == ids[:-1]
        assert (tokens[1:][inside] == tokens[:-1][inside] + 1).all()
        assert (positions[1:][~inside] == 0).all() and positions[0] == 0


def test_held_out_is_the_validation_split(two):
    loader = Loader(megatron(two[:1], weights=None), axis())
    file = loader.sources[0].file
    held = {int(t) for b in loader.evaluation_batches(1000) for t in b.tokens[b.loss_mask > 0]}
    assert held == {int(t) for d in range(40, 50) for t in file.document(d)} - {int(file.tokens[-1])}


def test_without_weights_every_sample_of_an_epoch_comes_in_proportion_to_the_sizes(two):
    loader = Loader(megatron(two, weights=None), axis())
    sizes = [source.num_samples for source in loader.sources]
    assert sizes == [(int(source.file.lengths[:40].sum()) - 1) // 8 for source in loader.sources]
    source, index = loader._stream._order
    assert all(np.array_equal(a, b) for a, b in zip((source, index), blend(sizes, 48), strict=True))
    longer = megatron(two, weights=None)
    longer.train.steps = sum(sizes) // 12 + 1
    with pytest.raises(ConfigError, match="takes every sample once"):
        Loader(longer, axis())
    with pytest.raises(ConfigError, match="data.weights has 1 numbers for 2 sources"):
        Loader(megatron(two, weights=[1.0]), axis())


def test_a_weight_for_a_single_source_asks_for_the_margin_too(tmp_path):
    """As `--data-path 1 PREFIX` does: here the margin makes a second epoch."""
    prefix = write(tmp_path / "a", [np.arange(10 if k < 30 else 9) + 10 * k for k in range(50)])  # 390 to train on
    loaders = [Loader(megatron([prefix], weights=weights), axis()) for weights in (None, [3.0])]
    assert [source.samples.size for loader in loaders for source in loader.sources] == [48, 97]


def test_shares_are_normalized_as_megatron_does_it():
    """Once where the shares are asked for and once where they are blended: 1/49 and its like change their last bit."""
    weights = [float(w) for w in (3, 7, 11, 5, 13, 17, 2, 23, 29)]
    once = np.array(weights) / np.sum(np.array(weights))
    twice = once / np.sum(once)
    assert normalize(weights) == once.tolist()
    counts, expected = np.zeros(9), []
    for i in range(3000):
        expected.append(int(np.argmax(twice * max(i, 1.0) - counts)))
        counts[expected[-1]] += 1
    assert blend(normalize(weights), 3000)[0].tolist() == expected


def made(folder, case):
    """Sources, weights and split of a case, the same on every machine."""
    rng = np.random.RandomState(case)
    count, prefixes, at = 1 + case % 9, [], 0
    for number in range(count):
        lengths = rng.randint(1, 40, rng.randint(20, 80))
        documents = np.split(np.arange(at, at + lengths.sum()) % 10000, np.cumsum(lengths)[:-1])
        prefixes.append(write(folder / f"{case}.{number}", documents))
        at += int(lengths.sum())
    weights = [None, rng.randint(1, 9, count).astype(float).tolist(), (rng.rand(count) + 0.01).tolist()][case % 3]
    wanted = 12 if weights is None and count > 1 else 12 * int(rng.randint(1, 30))
    return prefixes, weights, ["100,0,0", "80,20,0", "70,20,10", "1"][case % 4], wanted


def rows_of(prefixes, weights, split, wanted, seed):
    made = config(prefixes, order="megatron", weights=weights)
    made.data.split, made.train.seed, made.train.steps = split, seed, wanted // made.train.global_batch_size
    loader = Loader(made, axis())
    batches = [batch for _ in range(made.train.steps) for batch in loader.next()]
    return np.concatenate([np.column_stack((batch.tokens, batch.labels[:, -1])) for batch in batches])


# crc32 of the samples that megatron-core 0.16.1 gives for these cases
RECORDED = {
    0: 4218718,
    1: 321540872,
    2: 3033669955,
    4: 3622797912,
    5: 3601082175,
    6: 1518869880,
    7: 3112591505,
    8: 2337978305,
}


@pytest.mark.parametrize("case", RECORDED)
def test_samples_are_those_that_megatron_core_gave(tmp_path, case):
    assert zlib.crc32(rows_of(*made(tmp_path, case), case).astype("<i8").tobytes()) == RECORDED[case]


@pytest.mark.parametrize("case", range(12))
def test_samples_are_those_of_megatron_core(tmp_path, monkeypatch, case):
    """Beside the library itself, where it is installed: `pip install --no-deps megatron-core`."""
    pytest.importorskip("megatron.core.datasets.gpt_dataset")
    import torch
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    class Names:
        eod, pad, vocab_size = 0, -1, 10000
        unique_identifiers: dict = {}

    monkeypatch.setattr(torch.distributed, "get_rank", lambda *_: 0)
    monkeypatch.setattr(torch.distributed, "barrier", lambda *_: None)
    prefixes, weights, split, wanted = made(tmp_path, case)
    names = ("reset_position_ids", "reset_attention_mask", "eod_mask_loss", "create_attention_mask")
    asked = GPTDatasetConfig(
        random_seed=case,
        sequence_length=8,
        blend=(prefixes, weights),
        split=split,
        tokenizer=Names(),
        path_to_cache=str(tmp_path / "cache"),
        **dict.fromkeys(names, False),
    )
    train = BlendedMegatronDatasetBuilder(GPTDataset, [wanted, 0, 0], lambda: True, asked).build()[0]
    samples = [train[i] for i in range(wanted)]
    expected = np.array([[*sample["tokens"].tolist(), int(sample["labels"][-1])] for sample in samples])
    assert np.array_equal(rows_of(prefixes, weights, split, wanted, case), expected)
