"""The settings of each attempt at a run, and which of them made a step."""

from megalm.config.attempts import CONFIG, find_config_of_step, has_attempts, keep_attempt


def texts(folder, steps):
    return [find_config_of_step(folder, step).read_text() for step in steps]


def test_the_settings_of_a_step_are_those_of_the_attempt_that_made_it_last(tmp_path):
    keep_attempt(tmp_path, "a", 1)
    keep_attempt(tmp_path, "b", 21)
    assert texts(tmp_path, (1, 20, 21, 99)) == ["a", "a", "b", "b"]
    keep_attempt(tmp_path, "c", 11)  # from an older checkpoint: what b made is gone
    assert texts(tmp_path, (1, 10, 11, 21, 99)) == ["a", "a", "c", "c", "c"]
    assert (tmp_path / CONFIG).read_text() == "c"


def test_the_same_settings_again_make_no_file(tmp_path):
    for step in (1, 6, 11):
        keep_attempt(tmp_path, "a", step)
    assert len(list((tmp_path / "configs").iterdir())) == 1


def test_old_settings_from_an_earlier_step_are_kept_once_more(tmp_path):
    for text, step in (("a", 1), ("b", 21), ("a", 11)):
        keep_attempt(tmp_path, text, step)
    assert texts(tmp_path, (25,)) == ["a"]
    keep_attempt(tmp_path, "a", 5)  # a later first step is in its place
    assert texts(tmp_path, (4, 7)) == ["a", "a"]


def test_nothing_that_was_kept_is_rewritten(tmp_path):
    keep_attempt(tmp_path, "a", 1)
    (kept,) = (tmp_path / "configs").iterdir()
    before = kept.stat().st_mtime_ns
    for text in ("b", "a", "c"):
        keep_attempt(tmp_path, text, 1)
    assert kept.read_text() == "a" and kept.stat().st_mtime_ns == before
    assert len(list((tmp_path / "configs").iterdir())) == 4


def test_a_run_of_an_earlier_version_has_one_configuration(tmp_path):
    (tmp_path / CONFIG).write_text("old")
    assert not has_attempts(tmp_path) and texts(tmp_path, (1, 7)) == ["old", "old"]


def test_other_files_are_no_settings(tmp_path):
    keep_attempt(tmp_path, "a", 1)
    for name in ("0002-step-00000001.yaml.new", "notes.yaml", "0003-step-x.yaml"):
        (tmp_path / "configs" / name).write_text("b")
    assert texts(tmp_path, (3,)) == ["a"]
