"""Tests of megalm/objectives."""
