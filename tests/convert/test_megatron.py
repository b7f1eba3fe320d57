"""Megatron-LM checkpoints in both directions, against layouts made by hand."""

import pickle
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan

from megalm.config.errors import ConfigError
from megalm.convert.formats import open_source
from megalm.convert.megatron_dist import write_dist
from megalm.convert.megatron_legacy import write_legacy
from megalm.convert.source import Source
from megalm.convert.weights import MemoryWeights
from tests.convert.megatron_checkpoints import MODELS, make_model, random_weights, write_ranks, write_torch_dist


def same(source, weights) -> None:
    """Bit for bit the weights the checkpoint was made from, and none beside them."""
    assert set(source.weights.names()) == set(weights)
    for name, expected in weights.items():
        assert torch.equal(source.weights.read(name), expected), name


@pytest.mark.parametrize("spelling", ["te", "plain", "legacy", "legacy-2.6"])
@pytest.mark.parametrize("tensor, pipeline", [(1, 1), (2, 1), (1, 2), (2, 4)])
@pytest.mark.parametrize("name", MODELS)
def test_reading_rank_files(name, tensor, pipeline, spelling, tmp_path):
    model = make_model(**MODELS[name])
    weights = random_weights(model)
    source = open_source(write_ranks(tmp_path, weights, model, tensor, pipeline, spelling=spelling), vocab_size=50)
    assert source.step == 300
    model.name = source.model.name
    assert source.model == model
    same(source, weights)


def test_interleaved_and_uneven_stages(tmp_path):
    model = make_model()
    weights = random_weights(model)
    same(open_source(write_ranks(tmp_path / "a", weights, model, 2, 2, virtual=2), vocab_size=50), weights)
    same(open_source(write_ranks(tmp_path / "b", weights, model, 1, 2, stage_layers=[1, 3]), vocab_size=50), weights)


@pytest.mark.parametrize("version", [0, 1.0])
@pytest.mark.parametrize("tensor", [1, 2])
def test_row_orders_of_old_versions(version, tensor, tmp_path):
    model = make_model(**MODELS["gpt"])
    weights = random_weights(model)
    same(
        open_source(
            write_ranks(tmp_path, weights, model, tensor, spelling="legacy-2.6", version=version), vocab_size=50
        ),
        weights,
    )


def test_without_a_vocabulary_size_the_padding_stays(tmp_path):
    model = make_model()
    source = open_source(write_ranks(tmp_path, random_weights(model), model, 2))
    assert source.model.vocab_size == 64
    assert torch.equal(source.weights.read("embedding.weight")[50:], torch.full((14, 24), 7.0))


@pytest.mark.parametrize("common", ["file", "object"])
@pytest.mark.parametrize("name", MODELS)
def test_reading_torch_dist(name, common, tmp_path):
    model = make_model(**MODELS[name])
    weights = random_weights(model)
    source = open_source(write_torch_dist(tmp_path, weights, model, common=common), vocab_size=50)
    assert source.step == 300
    assert source.ignored["optimizer.state.exp_avg.embedding.word_embeddings.weight"] == "is not a weight"
    same(source, weights)


def tree_equal(a, b, path="") -> None:
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            tree_equal(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path


@pytest.mark.parametrize("spelling", ["te", "plain", "legacy", "legacy-2.6"])
@pytest.mark.parametrize("tensor, pipeline, virtual", [(1, 1, 1), (2, 1, 1), (2, 2, 1), (1, 2, 2)])
@pytest.mark.parametrize("name", MODELS)
def test_written_rank_files_are_those_made_by_hand(name, tensor, pipeline, virtual, spelling, tmp_path):
    model = make_model(**MODELS[name])
    weights = random_weights(model)
    by_hand = write_ranks(tmp_path / "hand", weights, model, tensor, pipeline, spelling=spelling, virtual=virtual)
    source = open_source(by_hand, vocab_size=50)
    write_legacy(
        source,
        tmp_path / "ours",
        tensor=tensor,
        pipeline=pipeline,
        virtual=virtual,
        spelling=spelling,
        pad_vocabulary=64 // tensor,
    )
    files = sorted(path.relative_to(by_hand) for path in by_hand.rglob("*.pt"))
    assert len(files) == tensor * pipeline
    for file in files:
        expected = torch.load(by_hand / file, weights_only=False)
        written = torch.load(tmp_path / "ours" / file, weights_only=False)
        for key in [key for key in expected if key.startswith("model")]:
            expected[key] = {k: v for k, v in expected[key].items() if not k.endswith("_extra_state")}
            clear_padding(expected[key])
            tree_equal(written[key], expected[key], f"{file}:{key}")
        hand, ours = vars(expected["args"]), vars(written["args"])
        assert {key: ours[key] for key in hand if key != "bias_gelu_fusion"} == {
            k: v for k, v in hand.items() if k != "bias_gelu_fusion"
        }
    assert (tmp_path / "ours" / "latest_checkpointed_iteration.txt").read_text() == "300"


def clear_padding(tree) -> None:
    """What we write as padding is zero; what Megatron leaves there does not matter."""
    for value in tree.values():
        if isinstance(value, dict):
            clear_padding(value)
        elif value.dim() == 2 and bool((value == 7.0).all(1).any()):
            value[(value == 7.0).all(1)] = 0.0


@pytest.mark.parametrize("name", MODELS)
def test_written_torch_dist_is_read_by_torch_and_by_us(name, tmp_path):
    model = make_model(**MODELS[name])
    weights = random_weights(model)
    by_hand = write_torch_dist(tmp_path / "hand", weights, model)
    write_dist(open_source(by_hand, vocab_size=50), tmp_path / "ours", pad_vocabulary=64)
    same(open_source(tmp_path / "ours", vocab_size=50), weights)

    def load(folder):
        reader = dcp.FileSystemReader(folder / "iter_0000300")
        entries = reader.read_metadata().state_dict_metadata
        tensors = {key: entry for key, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}
        state = {key: torch.empty(entry.size) for key, entry in tensors.items() if not key.startswith("optimizer")}
        dcp.load(state, storage_reader=reader, no_dist=True)
        return state

    expected = load(by_hand)
    clear_padding(expected)
    tree_equal(load(tmp_path / "ours"), expected)


def test_what_is_missing_or_wrong_is_named(tmp_path):
    model = make_model()
    weights = random_weights(model)
    folder = write_ranks(tmp_path, weights, model, 2, 2)
    victim = folder / "iter_0000300" / "mp_rank_01_001" / "model_optim_rng.pt"
    content = torch.load(victim, weights_only=False)

    def saved(change, message):
        changed = {**content, "model": dict(content["model"])}
        change(changed["model"])
        torch.save(changed, victim)
        with pytest.raises(ConfigError, match=message):
            open_source(folder, vocab_size=50).weights.read("final_norm.weight")

    saved(
        lambda state: state.update({"decoder.final_layernorm.weight": torch.zeros(24)}),
        "final_layernorm.weight differs between tensor ranks 0 and 1",
    )
    saved(
        lambda state: state.pop("decoder.final_layernorm.weight"),
        "disagree about whether decoder.final_layernorm.weight exists",
    )
    torch.save(content, victim)
    other = folder / "iter_0000300" / "mp_rank_00_001" / "model_optim_rng.pt"
    extra = torch.load(other, weights_only=False)
    for file, state in ((victim, content), (other, extra)):
        torch.save({**state, "model": {**state["model"], "decoder.layers.0.adapter.weight": torch.zeros(2)}}, file)
    with pytest.raises(ConfigError, match="1 tensors have no place in this model: decoder.layers.2.adapter.weight"):
        open_source(folder, vocab_size=50)
    victim.unlink()
    with pytest.raises(ConfigError, match="mp_rank_01_001: holds no model_optim_rng.pt"):
        open_source(folder)
    victim.parent.rmdir()
    with pytest.raises(ConfigError, match=r"\[\(1, 1\)\] are missing"):
        open_source(folder)
    (folder / "latest_checkpointed_iteration.txt").write_text("400")
    with pytest.raises(ConfigError, match="names iter_0000400, which is not there"):
        open_source(folder)


def test_damaged_files_are_named(tmp_path):
    model = make_model()
    ranks = write_ranks(tmp_path / "a", random_weights(model), model)
    file = ranks / "iter_0000300" / "mp_rank_00" / "model_optim_rng.pt"
    whole = file.read_bytes()
    for length in (len(whole) - 100, len(whole) // 2, 10, 0):
        file.write_bytes(whole[:length])
        with pytest.raises(ConfigError, match="model_optim_rng.pt: (damaged|refused|is empty)"):
            open_source(ranks)
    (ranks / "latest_checkpointed_iteration.txt").write_text("garbage")
    with pytest.raises(ConfigError, match="says 'garbage'; it should be the number"):
        open_source(ranks)
    dist = write_torch_dist(tmp_path / "b", random_weights(model), model) / "iter_0000300"
    metadata = (dist / ".metadata").read_bytes()
    (dist / ".metadata").write_bytes(metadata[:-50])
    with pytest.raises(ConfigError, match=".metadata: (damaged|refused)"):
        open_source(dist)
    (dist / ".metadata").write_bytes(metadata)
    data = next(dist.glob("*.distcp"))
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 3])
    with pytest.raises(ConfigError, match="truncated|damaged"):
        source = open_source(dist)
        for name in source.weights.names():
            source.weights.read(name)


class Attack:
    def __reduce__(self):
        return (exec, ("import pathlib; pathlib.Path('/tmp/megalm-was-executed').touch()",))


@pytest.mark.parametrize("where", ["ranks", "common"])
def test_a_file_that_would_run_code_is_refused(where, tmp_path):
    model = make_model()
    if where == "ranks":
        folder = write_ranks(tmp_path, random_weights(model), model, optimizer=Attack())
    else:
        folder = write_torch_dist(tmp_path, random_weights(model), model)
        torch.save({"args": Attack()}, folder / "iter_0000300" / "common.pt")
    with pytest.raises(ConfigError, match="refused, it holds .*exec"):
        open_source(folder)


def test_a_metadata_file_that_would_run_code_is_refused(tmp_path):
    model = make_model()
    folder = write_torch_dist(tmp_path, random_weights(model), model)
    (folder / "iter_0000300" / ".metadata").write_bytes(pickle.dumps(Attack()))
    with pytest.raises(ConfigError, match="refused, it holds builtins.exec"):
        open_source(folder)


def test_objects_of_megatrons_own_classes_do_not_stand_in_the_way(tmp_path, monkeypatch):
    """Enums, random states and the like are passed over without importing what defines them."""
    names = ["megatron", "megatron.core", "megatron.core.enums"]
    modules = {name: types.ModuleType(name) for name in names}
    modules[names[-1]].ModelType = type("ModelType", (), {"__module__": names[-1]})
    rng = [{"np_rng_state": np.random.get_state(), "random_rng_state": (3, (1, 2), None)}]
    model = make_model()
    weights = random_weights(model)
    kind = modules[names[-1]].ModelType()
    kind.value = 1
    with monkeypatch.context() as patched:
        for name, module in modules.items():
            patched.setitem(sys.modules, name, module)
        folder = write_ranks(tmp_path, weights, model, rng_state=rng, model_type=kind)
    same(open_source(folder, vocab_size=50), weights)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(position="alibi"), "position_embedding_type='alibi' is not supported"),
        (dict(parallel_residual=True), "Megatron-LM cannot express model.parallel_residual=True"),
        (dict(num_kv_heads=1), "2 tensor-parallel ranks cannot divide 4 query heads, 1 key/value heads"),
        (dict(num_layers=3), "3 layers cannot be divided over 2 stages x 1 chunks evenly"),
    ],
)
def test_models_that_megatron_cannot_hold(change, message, tmp_path):
    model = make_model(**change)
    weights = random_weights(model)
    with pytest.raises(ConfigError, match=message):
        write_legacy(
            Source(Path("x"), "memory", model, MemoryWeights(weights), len(weights)), tmp_path, tensor=2, pipeline=2
        )
    assert not list(tmp_path.rglob("*.pt"))


def test_torch_dist_has_names_of_its_own(tmp_path):
    model = make_model()
    source = Source(Path("x"), "memory", model, MemoryWeights(random_weights(model)), 0)
    with pytest.raises(ConfigError, match="--names plain is not what torch_dist uses"):
        write_dist(source, tmp_path / "ours", spelling="plain")
    assert not (tmp_path / "ours").exists()


def test_plans_that_megatron_keeps_in_the_metadata_are_read_past(tmp_path):
    """Since core 0.12 the index holds each rank's plan, and objects of Megatron's own classes may be among them."""
    model = make_model()
    weights = random_weights(model)
    folder = write_torch_dist(tmp_path, weights, model)
    file = folder / "iter_0000300" / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    metadata.planner_data = SavePlan([], planner_data={"kind": np.dtype("int8")})
    metadata.all_local_plans = [SavePlan([])]
    file.write_bytes(pickle.dumps(metadata))
    same(open_source(folder, vocab_size=50), weights)


class Declared:
    pass


def test_what_other_libraries_declared_safe_is_not_built_and_stays_declared(tmp_path):
    model = make_model()
    folder = write_ranks(tmp_path, random_weights(model), model, optimizer=Declared())
    with torch.serialization.safe_globals([Declared]):
        with pytest.raises(ConfigError, match="refused, it holds .*Declared"):
            open_source(folder)
        assert Declared in torch.serialization.get_safe_globals()
