"""Command-line tools: `python -m tools.NAME --help`. Each is a thin face over a part of megalm."""
