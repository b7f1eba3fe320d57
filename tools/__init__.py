"""Command-line tools: `megalm NAME --help`. Each is a thin face over a part of megalm."""
