import os

import numpy as np
import pytest
import torch

from megalm.config.errors import ConfigError
from megalm.data.fim import FillInTheMiddle, make_fill_in_the_middle
from megalm.data.loader import Loader
from megalm.data.packing import PackedSource, cut_pieces, pack_best_fit
from megalm.data.tokens import TokenFile
from megalm.tokenizer.tokenizer import load_tokenizer
from tests.data.test_loader import axis, config, write


def one_by_one(lengths, capacity):
    """Best-fit decreasing as the book has it."""
    room = []
    for length in sorted(lengths, reverse=True):
        fits = [bin for bin, free in enumerate(room) if free >= length]
        if fits:
            best = min(fits, key=lambda bin: room[bin])
        else:
            best = len(room)
            room.append(capacity)
        room[best] -= length
    return sorted(room)  # which of two bins with equal room is taken is free


@pytest.mark.parametrize("capacity", [5, 17, 64])
def test_best_fit_is_what_placing_one_by_one_gives(capacity):
    rng = np.random.default_rng(capacity)
    for count in (0, 1, 7, 300):
        lengths = np.minimum(rng.geometric(3 / capacity, count), capacity) if count else np.empty(0, np.int64)
        bins, number = pack_best_fit(lengths, capacity)
        room = capacity - np.bincount(bins, weights=lengths, minlength=number)
        assert sorted(room.astype(int).tolist()) == one_by_one(lengths, capacity)


def test_pieces_predict_every_token_but_the_first_once():
    lengths = np.array([1, 2, 8, 9, 10, 17, 18, 40])
    document, first, size = cut_pieces(lengths, 8)
    for number, length in enumerate(lengths):
        mine = document == number
        predicted = [t for a, n in zip(first[mine], size[mine], strict=True) for t in range(a + 1, a + n)]
        assert predicted == list(range(1, length))
    assert size.max() == 9 and size.min() >= 2


def documents(seed, count, most):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, most, count)
    return np.split(np.arange(lengths.sum()), np.cumsum(lengths)[:-1])


def test_samples_hold_whole_documents_and_every_one_of_them(tmp_path):
    pieces = documents(3, 200, 30)
    prefix = write(tmp_path / "c", pieces)
    changes = {"packing": "best_fit", "weights": None, "global_batch_size": 4}
    loader = Loader(config([prefix], **changes), axis())
    held = 20  # the last tenth of the documents
    source = loader.sources[0]
    count = {}
    for _ in range(source.num_samples // 4):
        for batch in loader.next():
            for row in range(2):
                keep = batch.loss_mask[row] > 0
                for a, b in zip(batch.tokens[row][keep].tolist(), batch.labels[row][keep].tolist(), strict=True):
                    assert b == a + 1
                    count[b] = count.get(b, 0) + 1
                for d in batch.document_ids[row].unique():
                    inside = batch.document_ids[row] == d
                    assert batch.positions[row][inside].tolist() == list(range(int(inside.sum())))
    seen = sum(len(d) - 1 for d in pieces[:-held])
    assert set(count.values()) == {1} and seen - 3 * 8 <= len(count) <= seen
    assert not set(count) & set(np.concatenate(pieces[-held:]).tolist())
    cut = sum(len(d) for d in pieces[:-held] if len(d) <= 9)
    whole = [size for index in range(source.num_samples) for size in source._pieces(index)[1]]
    assert sum(size for size in whole if size < 9) >= sum(len(d) for d in pieces[:-held] if 1 < len(d) < 9)
    assert cut and source.num_samples < 1.1 * seen / 8


def test_the_packing_is_kept_and_made_again_for_other_data(tmp_path):
    prefix = write(tmp_path / "c", documents(1, 50, 20))
    path = tmp_path / "c.pack8"

    def opened():
        return PackedSource("c", TokenFile(prefix), 8, 1.0, 0.1)

    first = opened()
    made = os.stat(path).st_mtime_ns
    assert opened().num_samples == first.num_samples and os.stat(path).st_mtime_ns == made
    path.write_bytes(path.read_bytes()[:-1])
    assert opened().num_samples == first.num_samples and os.stat(path).st_mtime_ns > made
    write(tmp_path / "c", documents(2, 70, 20))
    assert opened().num_samples != first.num_samples


def test_fill_in_the_middle_rearranges_documents_and_loses_three_tokens():
    row = np.arange(100, 140)
    starts, filled = np.array([5, 20, 36]), 36
    for spm in (0.0, 1.0):
        fim = FillInTheMiddle(1.0, spm, (1, 2, 3), seed=0, eos=119)
        got = row.copy()
        fim.apply(got, starts, filled, "code", 7, 0)
        assert got[:5].tolist() == row[:5].tolist() and got[36:].tolist() == row[36:].tolist()
        assert got[19] == 119
        for first, end in ((5, 19), (20, 36)):
            ids = got[first:end].tolist()
            prefix, suffix, middle = ids.index(1), ids.index(3), ids.index(2)
            assert prefix == 0 and (suffix == 1 if spm else suffix < middle)
            if spm:
                again = ids[middle + 1 :] + ids[2:middle]
                assert sorted(again) == list(row[first : end - 3])
            else:
                assert ids[1:suffix] + ids[middle + 1 :] + ids[suffix + 1 : middle] == row[first : end - 3].tolist()
        same = row.copy()
        fim.apply(same, starts, filled, "code", 7, 0)
        assert np.array_equal(same, got)
        other = row.copy()
        fim.apply(other, starts, filled, "code", 7, 1)
        assert not np.array_equal(other, got)
    none = row.copy()
    FillInTheMiddle(0.0, 0.5, (1, 2, 3), 0).apply(none, starts, filled, "code", 7, 0)
    assert np.array_equal(none, row)


def test_the_rates_are_kept():
    fim = FillInTheMiddle(0.3, 0.25, (1, 2, 3), seed=5)
    forms = {"none": 0, "psm": 0, "spm": 0}
    for index in range(4000):
        row = np.arange(100, 120)
        fim.apply(row, np.empty(0, int), 20, "s", index, 0)
        forms["none" if row[0] != 1 else "spm" if row[1] == 3 and 2 in row[2:] and row[0] == 1 else "psm"] += 1
    assert forms["none"] / 4000 == pytest.approx(0.7, abs=0.03)
    assert forms["spm"] / (forms["spm"] + forms["psm"]) == pytest.approx(0.25, abs=0.06)  # PSM with an empty prefix too


def test_a_run_with_it_is_the_same_on_every_layout(tmp_path):
    prefix = write(tmp_path / "c", documents(3, 100, 60), np.uint16)
    changes = dict(weights=None, fim_rate=0.9, fim_spm_rate=0.5, fim_tokens=["70001", "70002", "70003"])

    def rows(rank, size, **more):
        asked = config([prefix], **more)
        for key, value in changes.items():
            setattr(asked.data, key, value)
        asked.model.vocab_size, asked.model.seq_length = 70_004, 32
        loader = Loader(asked, axis(rank, size))
        return [row.tolist() for _ in range(3) for batch in loader.next() for row in batch.tokens]

    for packing in ("stream", "documents", "best_fit"):
        one = rows(0, 1, packing=packing)
        assert any(70_001 in row for row in one)
        two = [rows(rank, 2, packing=packing, prefetch=rank) for rank in range(2)]
        assert one == [row for step in range(3) for part in two for row in part[step * 6 : step * 6 + 6]]


def test_sentinels_are_checked(tokenizer_file, corpora_config):
    data = corpora_config.data
    data.fim_rate, data.fim_spm_rate = 0.5, 0.5
    data.fim_tokens = ["<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"]
    with pytest.raises(ConfigError, match="data.tokenizer is not given"):
        make_fill_in_the_middle(data, 0, 1000)
    data.tokenizer = tokenizer_file
    with pytest.raises(ConfigError, match="has no such token"):
        make_fill_in_the_middle(data, 0, 1000)
    data.fim_tokens = ["5", "6", "6"]
    with pytest.raises(ConfigError, match="three different"):
        make_fill_in_the_middle(data, 0, 1000)
    data.fim_tokens = ["5", "6", "5000"]
    with pytest.raises(ConfigError, match="outside model.vocab_size=1000"):
        make_fill_in_the_middle(data, 0, 1000)
    data.fim_tokens = ["5", "6", "7"]
    made = make_fill_in_the_middle(data, 0, 1000)
    assert (made.prefix, made.middle, made.suffix) == (5, 6, 7) and made.eos == load_tokenizer(tokenizer_file).eos_id


@pytest.fixture
def corpora_config():
    return config([])


@pytest.mark.parametrize("fim_rate", [0.0, 0.7], ids=["as written", "fill in the middle"])
@pytest.mark.parametrize("packing", ["stream", "documents", "best_fit"])
def test_held_out_text_is_laid_out_as_training_text_is(tmp_path, packing, fim_rate):
    """The same file trained on and held out: each row of evaluation is a row of training, with the same masks."""
    prefix = write(tmp_path / "c", documents(5, 60, 20))
    settings = config([prefix], weights=None, valid=prefix, packing=packing, fim_rate=fim_rate, global_batch_size=1)
    settings.data.fim_tokens, settings.data.fim_spm_rate = ["1997", "1998", "1999"], 0.5
    settings.train.eval_sequences, settings.train.micro_batch_size = 1000, 1
    loader = Loader(settings, axis())
    trained = {}
    for _ in range(loader.sources[0].num_samples):
        (batch,) = loader.next()
        trained[tuple(batch.tokens[0].tolist())] = batch
    held_out = loader.evaluation_batches()
    assert len(held_out) >= len(trained) > 20
    known = [(batch, trained.get(tuple(batch.tokens[0].tolist()))) for batch in held_out]
    assert sum(twin is None for _, twin in known) <= 1, "all but the file's last, padded sequence are trained on"
    for batch, twin in known:
        if twin is None:
            continue
        assert torch.equal(batch.labels, twin.labels)
        mask = torch.ones(1, 8) if twin.loss_mask is None else twin.loss_mask
        assert torch.equal(batch.loss_mask, mask)
        for name in ("positions", "document_ids"):
            ours, theirs = getattr(batch, name), getattr(twin, name)
            assert (ours is None) == (theirs is None) == (packing == "stream")
            assert ours is None or torch.equal(ours, theirs)


@pytest.mark.parametrize("ranks", [1, 3])
def test_what_a_micro_batch_of_evaluation_lacks_is_padding_that_does_not_count(tmp_path, ranks):
    prefix = write(tmp_path / "c", documents(5, 40, 20))
    changes = {"weights": None, "holdout": 0.2, "global_batch_size": 6, "micro_batch_size": 2, "vocab_size": 2000}
    for packing in ("stream", "documents", "best_fit"):
        loaders = [Loader(config([prefix], packing=packing, **changes), axis(rank, ranks)) for rank in range(ranks)]
        batches = [loader.evaluation_batches(5) for loader in loaders]
        assert len({len(part) for part in batches}) == 1
        rows = [row for part in batches for batch in part for row in batch.loss_mask]
        assert sum(bool(row.any()) for row in rows) == 5 and len(rows) == 6


def test_a_packed_end_holds_whole_documents(tmp_path):
    pieces = documents(3, 200, 9)
    prefix = write(tmp_path / "c", pieces)
    loader = Loader(config([prefix], packing="best_fit", weights=None, global_batch_size=4), axis())
    (source,) = loader.held_out
    seen = []
    for sample in range(source.num_samples):
        row, filled = source.read(sample), source.filled(sample)
        edges = [0, *source.boundaries(sample), filled]
        seen += [tuple(row[a:b]) for a, b in zip(edges, edges[1:], strict=False) if b > a]
    assert sorted(seen) == sorted(tuple(piece) for piece in pieces[180:] if len(piece) > 1)
