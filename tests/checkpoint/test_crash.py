"""A sample of the crash enumeration; all of it runs with `python -m tools.bench crash`."""

import shutil

import pytest

from tools.bench.checkpoint._crash_points import enumerate_crashes

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="the fault library is compiled with gcc")


def test_a_sample_of_crash_points_recovers():
    report = enumerate_crashes(sample=16, seed=3)
    assert report.failures == []
    assert report.recovered == report.points == 16
    assert report.found_old and report.found_new  # faults before and after the commit are in the sample
    # The save makes the operations that the commit protocol needs, so none of them has escaped the library.
    assert report.operations["rename"] >= 2 and report.operations["fsync"] == report.operations["create"] == 6
    assert report.operations["fsync-folder"] >= 4 and report.operations["write"] > 6


def test_the_enumeration_finds_a_save_that_does_not_fsync():
    report = enumerate_crashes(without_fsync=True, fault="power", operation="unlink", sample=1)
    assert len(report.failures) == 1 and "CorruptCheckpointError" in report.failures[0]
