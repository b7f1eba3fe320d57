import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megalm.config.compose import compose_config
from megalm.config.errors import ConfigError
from megalm.data import loader as module
from megalm.data.blend import Chairman, Tree
from megalm.data.formats.store import LocalFile
from megalm.data.loader import Loader
from megalm.data.order import Source
from megalm.data.sources import TokenSource
from megalm.data.stream import Stream
from megalm.data.tokens import TokenFile, TokenWriter

SEQ = 8


def axis(rank=0, size=1):
    return SimpleNamespace(rank=rank, size=size)


def write(prefix, documents, dtype=np.int32):
    with TokenWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(np.asarray(document))
    return str(prefix)


@pytest.fixture
def corpora(tmp_path):
    """Two sources whose tokens are all different, so that a token says where it comes from."""
    rng = np.random.default_rng(0)
    prefixes, start = [], 0
    for name, documents in (("a", 60), ("b", 25)):
        lengths = rng.integers(1, 40, documents)
        pieces = np.split(np.arange(start, start + lengths.sum()), np.cumsum(lengths)[:-1])
        start += int(lengths.sum())
        prefixes.append(write(tmp_path / f"{name}_text_document", pieces))
    return prefixes


def config(corpora, **changes):
    data = dict(
        train=corpora,
        weights=[0.75, 0.25],
        valid=None,
        holdout=0.1,
        tokenizer=None,
        order="keyed",
        packing="stream",
        phases=[],
        fim_rate=0.0,
        shuffle_window=0,
        cache=None,
        cache_gb=1.0,
        retries=2,
        mds_bytes="int64",
        prefetch=2,
        split=None,
    )
    train = dict(global_batch_size=12, micro_batch_size=2, seed=1, eval_sequences=10, steps=None)
    for key, value in changes.items():
        (data if key in data else train)[key] = value
    return SimpleNamespace(
        data=SimpleNamespace(**data),
        train=SimpleNamespace(**train),
        model=SimpleNamespace(seq_length=SEQ, vocab_size=10_000),
    )


def firsts(batches):
    return [int(row[0]) for batch in batches for row in batch.tokens]


def test_batches_follow_the_files(corpora):
    loader = Loader(config(corpora), axis())
    described = loader.describe(loader.next_positions())
    batches = loader.next()
    assert len(batches) == 6 and batches[0].tokens.shape == (2, SEQ) and batches[0].tokens.dtype == torch.int64
    files = {"a": TokenFile(corpora[0]), "b": TokenFile(corpora[1])}
    for batch in batches:
        assert torch.equal(batch.tokens[:, 1:], batch.labels[:, :-1])
        for tokens, labels in zip(batch.tokens, batch.labels, strict=True):
            where = described.pop(0)
            raw = files[where["source"]].read(where["token"], where["token"] + SEQ + 1)
            assert tokens.tolist() == raw[:-1].tolist() and labels.tolist() == raw[1:].tolist()
            assert files[where["source"]].document(where["document"])[where["offset"]] == tokens[0]
    loader.close()


@pytest.mark.parametrize("size", [2, 3, 4, 6])
def test_the_global_batch_is_the_same_on_every_layout(corpora, size):
    one = Loader(config(corpora), axis())
    many = [Loader(config(corpora, prefetch=rank % 2), axis(rank, size)) for rank in range(size)]
    for _ in range(7):
        assert firsts(one.next()) == [token for loader in many for token in firsts(loader.next())]


def test_every_sample_exactly_once_over_layouts_kills_and_skips(corpora):
    """A ledger over one epoch: three layouts, the state travels as JSON, batches prepared ahead are lost at each
    kill.
    """
    reference = Loader(config(corpora[:1], weights=None, prefetch=0), axis())
    samples = reference.sources[0].num_samples
    steps = samples // 12
    assert steps >= 7
    seen, state = [], None
    for size, count in ((1, 2), (3, 2), (2, 2), (6, steps - 6)):
        loaders = [Loader(config(corpora[:1], weights=None, prefetch=3), axis(rank, size)) for rank in range(size)]
        for loader in loaders:
            if state is not None:
                loader.load_state_dict(json.loads(state))
        for _ in range(count):
            for loader in loaders:
                seen += firsts(loader.next())
        state = json.dumps(loaders[0].state_dict())
        assert all(json.dumps(loader.state_dict()) == state for loader in loaders)
    assert len(seen) == len(set(seen)) == steps * 12
    assert seen == [token for _ in range(steps) for token in firsts(reference.next())]


def test_skipped_ranges_are_left_out_and_remembered(corpora):
    plain, skipping = Loader(config(corpora, prefetch=0), axis()), Loader(config(corpora), axis())
    order = [token for _ in range(6) for token in firsts(plain.next())]
    got = firsts(skipping.next())
    skipping.skip(15, 20)
    skipping.skip(19, 30)
    got += firsts(skipping.next())
    assert got == order[:15] + order[30:39]
    assert skipping.samples_consumed == 39
    again = Loader(config(corpora), axis())
    again.load_state_dict(skipping.state_dict())
    assert firsts(again.next()) == firsts(skipping.next()) == order[39:51]
    again.load_state_dict({**skipping.state_dict(), "samples_consumed": 0})
    assert firsts(again.next()) + firsts(again.next()) == got


def test_weights_may_change_without_repeating(corpora):
    first = Loader(config(corpora), axis())
    seen = firsts(first.next()) + firsts(first.next())
    second = Loader(config(corpora, weights=[0.25, 0.75]), axis())
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    before = len(seen)
    seen += firsts(second.next())
    limit = TokenFile(corpora[0]).num_tokens
    assert sum(token >= limit for token in seen[before:]) == 9
    third = Loader(config(corpora, weights=[0.25, 0.75]), axis())
    third.load_state_dict(json.loads(json.dumps(second.state_dict())))
    assert third.state_dict() == second.state_dict()
    seen += firsts(third.next())
    assert len(set(seen)) == len(seen)


def test_another_file_under_the_same_name_is_noticed(corpora, tmp_path):
    state = Loader(config(corpora), axis()).state_dict()
    write(tmp_path / "b_text_document", [np.arange(500)])
    with pytest.raises(ConfigError, match="data source 'b' held .* samples"):
        Loader(config(corpora), axis()).load_state_dict(state)


def test_held_out_documents_are_never_trained_on(corpora):
    loader = Loader(config(corpora), axis())
    train = {
        t
        for _ in range(40)
        for b in loader.next()
        for t in (*b.tokens.flatten().tolist(), *b.labels.flatten().tolist())
    }
    batches = loader.evaluation_batches(1000)
    held = {
        t
        for b in batches
        for row, m in zip(b.tokens, b.loss_mask, strict=True)
        for t, w in zip(row, m, strict=True)
        if w
    }
    assert held and not train & {int(t) for t in held}
    files = [TokenFile(p) for p in corpora]
    expected = sum(f.num_tokens - s.train_tokens - 1 for f, s in zip(files, loader.sources, strict=True))
    assert sum(b.token_count for b in batches) == expected
    assert loader.samples_consumed == 480


def test_evaluation_is_the_same_on_every_layout_and_equally_long(corpora):
    def rows(batches):
        return [
            r.tolist() + n.tolist()
            for b in batches
            for r, n, m in zip(b.tokens, b.labels, b.loss_mask, strict=True)
            if m.any()
        ]

    one = rows(Loader(config(corpora), axis()).evaluation_batches())
    parts = [Loader(config(corpora), axis(rank, 3)).evaluation_batches() for rank in range(3)]
    assert len({len(part) for part in parts}) == 1
    assert sorted(row for part in parts for row in rows(part)) == sorted(one) and len(one) == 10


def test_a_file_of_its_own_for_evaluation(corpora):
    loader = Loader(config(corpora[:1], weights=None, valid=corpora[1]), axis())
    assert loader.sources[0].train_tokens == TokenFile(corpora[0]).num_tokens
    low = TokenFile(corpora[0]).num_tokens
    assert all((b.tokens[b.loss_mask > 0] >= low).all() for b in loader.evaluation_batches())


def test_documents_are_kept_apart(tmp_path):
    prefix = write(tmp_path / "c", [[1, 2, 3], [4, 5], [6] * 5, [7] * 8])
    loader = Loader(config([prefix], weights=None, packing="documents", holdout=0.0, global_batch_size=2), axis())
    (batch,) = loader.next()
    row = batch.tokens[:, 0].tolist().index(1)
    assert batch.tokens[row].tolist() == [1, 2, 3, 4, 5, 6, 6, 6]
    assert batch.document_ids[row].tolist() == [0, 0, 0, 1, 1, 2, 2, 2]
    assert batch.positions[row].tolist() == [0, 1, 2, 0, 1, 0, 1, 2]
    assert batch.loss_mask[row].tolist() == [1, 1, 0, 1, 0, 1, 1, 1]


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"train": []}, "data.train is empty"),
        ({"weights": [1.0]}, "1 numbers for 2 sources"),
        ({"holdout": 1.0}, "data.holdout is 1.0"),
        ({"global_batch_size": 13}, "does not divide"),
        ({"global_batch_size": 2}, "fewer than the 2 data-parallel ranks"),
    ],
)
def test_bad_configurations_are_explained(corpora, changes, match):
    with pytest.raises(ConfigError, match=match):
        Loader(config(corpora, **changes), axis(0, 2))


def test_a_token_beyond_the_vocabulary_stops_the_run(corpora):
    bad = config(corpora)
    bad.model.vocab_size = 50
    with pytest.raises(ConfigError, match="outside model.vocab_size=50"):
        Loader(bad, axis()).next()


def test_a_run_that_was_dealt_by_the_tree_goes_on_so(corpora):
    """Checkpoints of before the chairman's assignment name no blend; their order must not change."""
    weights = [0.45, 0.35, 0.2]
    sources = [Source(name, 500, weight) for name, weight in zip("abc", weights, strict=True)]
    old = Stream(sources, 1).state_dict()
    assert [segment.pop("blend") for segment in old["segments"]] == ["chairman"]
    stream = Stream(sources, 1)
    stream.load_state_dict(old, 100)
    tree = Tree(weights).assign(np.arange(200))[0]
    assert np.array_equal(stream.samples(np.arange(200)).source, tree)
    assert not np.array_equal(tree, Chairman(weights).assign(np.arange(200))[0])
    assert stream.state_dict()["segments"][0]["blend"] == "tree"


def test_what_is_not_in_memory_is_asked_for_ahead_and_nothing_else(tmp_path, monkeypatch):
    """All rows of a batch before the first is read, at the start and for a while after a row was slow."""
    asked, read = [], []
    ahead, into = TokenFile.prefetch, TokenSource.read_into
    monkeypatch.setattr(TokenFile, "prefetch", lambda self, *span: asked.append(span) or ahead(self, *span))
    monkeypatch.setattr(TokenSource, "read_into", lambda self, *rest: read.append(len(asked)) or into(self, *rest))
    monkeypatch.setattr(module, "COLD_BATCHES", 3)
    monkeypatch.setattr(module, "SLOW_ROW_S", 1e9)
    prefix = write(tmp_path / "a", [np.arange(4000, dtype=np.int32)])
    loader = Loader(config([prefix], weights=None, holdout=0.0, prefetch=0, global_batch_size=8), axis())
    for _ in range(3):
        loader.next()
    assert len(asked) == 24 and read[:8] == [8] * 8 and read[8:16] == [16] * 8
    loader.next()
    assert len(asked) == 24
    monkeypatch.setattr(module, "SLOW_ROW_S", 0.0)
    loader.next()
    loader.next()
    assert len(asked) == 32
    file = LocalFile(f"{prefix}.bin")
    for start, stop in ((0, 1), (5000, 1 << 40), (1 << 40, 1 << 41), (7, 7)):
        file.prefetch(start, stop)


@pytest.mark.parametrize("changes", [{}, {"packing": "best_fit"}, {"order": "megatron", "weights": [1.0], "steps": 9}])
def test_a_token_beyond_the_vocabulary_is_named_with_its_place(tmp_path, changes):
    """Wherever it lies: in a sample, or in what is held out."""
    rng = np.random.default_rng(1)
    documents = [rng.integers(0, 90, rng.integers(2, 30)) for _ in range(40)]
    starts = np.cumsum([0, *map(len, documents)])
    for document, at in ((11, 1), (39, len(documents[39]) - 1)):
        wrong = [words.copy() for words in documents]
        wrong[document][at] = 90
        prefix = write(tmp_path / f"d{document}", wrong)
        settings = config([prefix], **{"weights": None, "prefetch": 0} | changes)
        settings.model.vocab_size = 90
        byte = 4 * (starts[document] + at)
        expected = (
            rf"d{document}\.bin: byte {byte}: holds the token 90 \(document {document}\), outside model.vocab_size=90"
        )
        loader = Loader(settings, axis())
        with pytest.raises(ConfigError, match=expected):
            loader.evaluation_batches(100) if document == 39 else [loader.next() for _ in range(9)]


def test_a_moved_file_is_known_by_what_it_holds(tmp_path):
    """The same tokens under another path go on; other tokens, as many of them and under the same name, do not."""

    def loader(folder, values):
        folder.mkdir(exist_ok=True)
        with TokenWriter(folder / "web", np.int32) as writer:
            for at in range(0, 4000, 50):
                writer.add_document(values[at : at + 50])
        words = [f"data.train=[{folder}/web]", "data.holdout=0", "model.seq_length=16", "data.tokenizer=null"]
        words += ["model.vocab_size=60000", "train.global_batch_size=4", "train.micro_batch_size=2", "data.prefetch=0"]
        return Loader(compose_config(["+model=tiny", *words]), axis())

    values = np.arange(4000)
    first = loader(tmp_path / "here", values)
    first.next()
    state = json.loads(json.dumps(first.state_dict()))
    moved = loader(tmp_path / "there", values)
    moved.load_state_dict(state)
    assert moved.next()[0].tokens.tolist() == first.next()[0].tokens.tolist()
    with pytest.raises(ConfigError, match="'web'.*holds other tokens"):
        loader(tmp_path / "other", values + 1).load_state_dict(state)
    del state["contents"]  # as an earlier version wrote it
    loader(tmp_path / "other", values + 1).load_state_dict(state)
