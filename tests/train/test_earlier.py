"""A run that begins where another one was: nothing of the other is lost, counted, resumed or mixed in."""

import json
import os
import shutil

import pytest

from megalm.checkpoint.commit import list_committed, parse_step
from megalm.config import ConfigError
from tests.small_run import small_run
from tests.train.test_trainer import train


def steps(folder):
    return [parse_step(path) for path in list_committed(folder)]


def metrics(trainer, name="metrics.jsonl"):
    return [json.loads(line)["step"] for line in (trainer.folder / name).read_text().splitlines()]


def told(trainer):
    lines = (trainer.folder / "events.jsonl").read_text().splitlines()
    return [(event["kind"], event["step"]) for event in map(json.loads, lines)]


def test_a_run_that_begins_anew_keeps_its_checkpoints_and_sets_those_of_the_former_aside(tmp_path):
    train(small_run(tmp_path, "train.steps=9"))
    trainer, _, status = train(small_run(tmp_path, "train.steps=6", "checkpoint.resume=false", "optim.lr=1e-3"))
    place = trainer.folder / "checkpoints"
    assert status == 0
    assert steps(place) == [6, 3] and steps(place / "earlier-1") == [9, 6]
    assert told(trainer)[0] == ("set_aside", 0) and told(trainer).count(("checkpoint", 6)) == 1
    assert len((trainer.folder / "earlier-1" / "events.jsonl").read_text().splitlines()) == 3  # its three checkpoints
    trainer, recorder, _ = train(small_run(tmp_path, "train.steps=7", "optim.lr=1e-3"))
    assert recorder.records[0]["step"] == 7, "it goes on with the new run"


def test_the_third_run_finds_a_name_of_its_own(tmp_path):
    for _ in range(3):
        trainer, _, _ = train(small_run(tmp_path, "train.steps=3", "checkpoint.resume=false"))
    place = trainer.folder / "checkpoints"
    assert [steps(place / name) for name in ("", "earlier-1", "earlier-2")] == [[3], [3], [3]]
    assert not (place / "earlier-3").exists() and (trainer.folder / "earlier-2").is_dir()


def test_a_run_taken_back_to_an_earlier_step_keeps_what_came_before_it(tmp_path):
    trainer, _, _ = train(small_run(tmp_path, "train.steps=9", "checkpoint.keep=0"))
    place = trainer.folder / "checkpoints"
    back = f"checkpoint.load_path={place}/step-00000006"
    trainer, recorder, _ = train(small_run(tmp_path, "train.steps=8", "checkpoint.resume=false", back))
    assert [record["step"] for record in recorder.records] == [7, 8]
    assert steps(place) == [8, 6] and steps(place / "earlier-1") == [9]
    assert ("checkpoint", 9) not in told(trainer) and ("checkpoint", 6) in told(trainer)
    assert (trainer.folder / "earlier-1" / "events.jsonl").exists()


def test_a_run_whose_checkpoints_were_deleted_does_not_go_on_with_its_journal(tmp_path):
    trainer, _, _ = train(small_run(tmp_path, "train.steps=6"))
    (trainer.folder / "metrics.jsonl").write_text('{"step": 6}\n')
    shutil.rmtree(trainer.folder / "checkpoints")
    trainer, _, _ = train(small_run(tmp_path, "train.steps=3"))
    assert told(trainer)[0][0] == "set_aside" and ("checkpoint", 6) not in told(trainer)
    assert metrics(trainer, "earlier-1/metrics.jsonl") == [6] and not (trainer.folder / "metrics.jsonl").exists()


def test_a_newer_checkpoint_that_is_damaged_does_not_count_for_the_run_that_goes_on_before_it(tmp_path):
    trainer, _, _ = train(small_run(tmp_path, "train.steps=6"))
    place = trainer.folder / "checkpoints"
    with (place / "step-00000006" / "__0_0.distcp").open("r+b") as file:
        file.seek(2000)
        file.write(b"x" * 300)
    _, recorder, _ = train(small_run(tmp_path, "train.steps=5", "checkpoint.keep=1"))
    assert recorder.records[0]["step"] == 4
    assert steps(place) == [5], "the damaged one neither stands for it nor pushes it out"
    assert steps(place / "earlier-1") == [6]


def test_a_place_is_one_runs(tmp_path):
    shared = f"checkpoint.path={tmp_path}/shared"
    train(small_run(tmp_path, shared, "run.name=a", "train.steps=3"))
    for more in ([], ["checkpoint.resume=false"]):
        with pytest.raises(ConfigError, match="where the run 'a' saves, and this run is 'b'"):
            train(small_run(tmp_path, shared, "run.name=b", *more))
    assert steps(tmp_path / "shared") == [3]
    _, recorder, _ = train(small_run(tmp_path, shared, "run.name=a", "train.steps=4"))
    assert [record["step"] for record in recorder.records] == [4]


def test_a_place_of_an_earlier_version_is_the_runs_that_its_checkpoints_name(tmp_path):
    shared = f"checkpoint.path={tmp_path}/shared"
    train(small_run(tmp_path, shared, "run.name=a", "train.steps=3"))
    (tmp_path / "shared" / "run.json").unlink()
    with pytest.raises(ConfigError, match="run 'a'"):
        train(small_run(tmp_path, shared, "run.name=b"))
    (tmp_path / "shared" / "run.json").write_text('{"name": "b"}')
    assert train(small_run(tmp_path, shared, "run.name=b", "train.steps=4"))[2] == 0, "handed over"


def test_a_run_that_was_moved_goes_on(tmp_path):
    train(small_run(tmp_path, "train.steps=3"))
    os.rename(tmp_path / "runs" / "small", tmp_path / "runs" / "moved")
    _, recorder, _ = train(small_run(tmp_path, "train.steps=4", "run.name=moved"))
    assert [record["step"] for record in recorder.records] == [4]


def test_weights_of_the_own_place_are_no_beginning(tmp_path):
    trainer, _, _ = train(small_run(tmp_path, "train.steps=3"))
    words = [f"checkpoint.load_path={trainer.folder}", "checkpoint.load=weights", "checkpoint.resume=false"]
    with pytest.raises(ConfigError, match="needs a run.name or checkpoint.path of its own"):
        train(small_run(tmp_path, *words))
    assert steps(trainer.folder / "checkpoints") == [3]


@pytest.mark.parametrize("kind", ["file", "dangling", "under a file", "nowhere"])
def test_a_place_that_cannot_be_written_is_refused_before_the_first_step(tmp_path, kind):
    (tmp_path / "plain").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    places = {"file": tmp_path / "plain", "dangling": tmp_path / "link", "under a file": tmp_path / "plain" / "ck"}
    place = places.get(kind, "/proc/nowhere/ck")
    with pytest.raises(ConfigError, match=str(place)) as refused:
        train(small_run(tmp_path, f"checkpoint.path={place}"))
    assert str(refused.value).count("\n") == 0


def test_what_a_crash_left_is_gone_before_the_first_step(tmp_path):
    place = tmp_path / "place"
    place.mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").write_text("x")
    (place / "step-00000007.trash-0123abcd").symlink_to(tmp_path / "elsewhere")
    (place / "step-00000008.tmp-0123abcd").mkdir()
    (place / "step-00000009.tmp-0123abcd").write_text("x")
    train(small_run(tmp_path, f"checkpoint.path={place}", "train.steps=1"))
    assert sorted(os.listdir(place)) == ["run.json", "step-00000001"]
    assert (tmp_path / "elsewhere" / "kept").exists()
