"""What a file is in truth that should be weights or a tokenizer and is not: told by how it begins."""

from __future__ import annotations

import re

LFS = b"version https://git-lfs.github.com/spec/"
ANSWERS = (b"invalid username", b"entry not found", b"access to model", b"repository not found")
"""How a hub answers in words in place of a file; some answer in JSON."""


def describe_damage(start: bytes) -> str | None:
    """Describe what else the file is, with what to do, by its first bytes; None where they do not tell."""
    if not start:
        return "is empty; copy it again"
    if start.startswith(LFS):
        size = re.search(rb"size (\d+)", start)
        bytes_there = f" of {int(size[1]):,} bytes" if size else ""
        return (
            f"is a Git LFS pointer, not the file itself{bytes_there}; fetch it: `git lfs install`, then `git lfs pull` in "
            "the folder it was cloned to, or download it again"
        )
    head = start.lstrip()[:200].lower()
    if head.startswith((b"<!doctype html", b"<html", b"<head", b"<?xml")) or b"<html" in head:
        return "is a web page (HTML), not the file itself: a download that went to a log-in or error page; download it again"
    if head.startswith(ANSWERS) or re.match(rb'\{\s*"(error|detail|message)"\s*:\s*"', head):
        return (
            f"is the server's answer {start[:60].decode('utf-8', 'replace')!r}, not the file itself; download it again"
        )
    if not start.strip(b"\0"):
        return "holds zero bytes only: an interrupted copy or download; copy it again"
    if start.startswith((b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ")):
        return "is a compressed file; unpack it first"
    return None
