"""Checkpoints: saved on any layout, loaded on any other, committed by one rename, every byte under a checksum."""
