"""What TensorBoard shows of a run that went back, read with TensorBoard's own reader."""

import math
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2
from tensorboard.summary.writer import event_file_writer

from megalm.config.compose import compose_config
from megalm.journal import EventLog
from megalm.observe.metrics import MetricsWriter
from megalm.observe.trackers.tensorboard import TensorBoard
from megalm.observe.trackers.tracker import TrackerHook


def shown(folder):
    """{tag: {step: value}} of the scalars of one run."""
    read = EventAccumulator(str(folder))
    read.Reload()
    return {tag: {each.step: each.value for each in read.Scalars(tag)} for tag in read.Tags()["scalars"]}


class Training:
    """Metrics, events and TensorBoard of a run, without the run."""

    def __init__(self, folder, step=0):
        self.folder = folder
        self.trainer = SimpleNamespace(
            step=step,
            folder=folder,
            config=compose_config(["+model=tiny"]),
            events=EventLog(folder / "events.jsonl"),
            mesh=SimpleNamespace(world_size=1, device=torch.device("cpu")),
            batch_source=SimpleNamespace(state_dict=dict),
        )
        self.hooks = [MetricsWriter(folder / "metrics.jsonl"), TrackerHook(TensorBoard(folder / "tensorboard"))]
        self.trainer.events.listeners += [hook.on_event for hook in self.hooks]
        for hook in self.hooks:
            hook.on_train_start(self.trainer)

    def make(self, steps, loss):
        for step in steps:
            for hook in self.hooks:
                hook.on_step_end(self.trainer, {"step": step, "loss": loss, "eval/loss": loss, "phase": "a"})

    def end(self):
        for hook in self.hooks:
            hook.on_train_end(self.trainer, 0)
        self.trainer.events.close()


@pytest.fixture
def run(tmp_path, monkeypatch):
    # Files are read in the order of their names, which end in a second and a process-wide count: 10 would come before 9.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    training = Training(tmp_path)
    training.make(range(1, 8), 1.0)
    training.trainer.events.write("spike", step=7, onset=6, loss=math.nan, expected=math.nan)
    training.trainer.events.write("rollback", step=7, to_step=4)
    training.make(range(5, 11), 2.0)
    training.trainer.events.write("rollback", step=10, to_step=8)
    training.make(range(9, 13), 3.0)
    training.end()
    return tmp_path


def test_of_a_step_made_twice_the_last_is_shown_and_the_first_beside(run):
    main = shown(run / "tensorboard")
    assert main["train/loss"] == {step: 1.0 if step < 5 else 2.0 if step < 9 else 3.0 for step in range(1, 13)}
    assert main["eval/loss"] == main["train/loss"] and "train/phase" not in main
    assert shown(run / "tensorboard/gone_back/1")["train/loss"] == {5: 1.0, 6: 1.0, 7: 1.0}
    assert shown(run / "tensorboard/gone_back/2")["train/loss"] == {9: 2.0, 10: 2.0}


def test_events_of_steps_that_came_again_are_still_shown(run):
    main = shown(run / "tensorboard")
    assert set(main["events/spike"]) == {7} and set(main["events/rollback"]) == {7, 10}
    read = EventAccumulator(str(run / "tensorboard"))
    read.Reload()
    (said,) = {each.tensor_proto.string_val[0].decode() for each in read.Tensors("events/spike/text_summary")}
    assert said == "spike at step 7, onset 6, loss NaN"


def test_a_resumed_run_goes_on_where_it_was_and_keeps_its_events(run):
    training = Training(run, step=6)
    training.make(range(7, 9), 4.0)
    training.end()
    main = shown(run / "tensorboard")
    assert main["train/loss"] == {**dict.fromkeys(range(1, 5), 1.0), 5: 2.0, 6: 2.0, 7: 4.0, 8: 4.0}
    assert set(main["events/spike"]) == {7} and set(main["events/rollback"]) == {7, 10}


def test_the_settings_are_in_the_tab_of_hyperparameters_of_the_same_run(run):
    read = EventAccumulator(str(run / "tensorboard"))
    read.Reload()
    content = read.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    settings = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert settings["optim.lr"].number_value == 3e-4 and settings["optim.name"].string_value == "adamw"
    assert {path.name for path in (run / "tensorboard").iterdir() if path.is_dir()} == {"gone_back"}
