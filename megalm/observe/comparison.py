"""What was planned beside what was measured, when the run ends."""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import sys
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from megalm.journal import choose_course, encode_json, format_number, read_number
from megalm.observe.kept import KeptSteps
from megalm.train.hooks import Hook

if TYPE_CHECKING:
    from megalm.train.trainer import Trainer

WARM_UP_STEPS = 3
"""Steps left out: memory is first touched and threads are started in them."""


class ComparisonHook(Hook):
    """Adds `measured` to plan.json and prints both columns."""

    def __init__(self, folder: Path, console: Console, memory: PeakMemory) -> None:
        """memory: counts from before the run was built."""
        self.file, self.console, self.memory = folder / "plan.json", console, memory
        self._made = KeptSteps("step_time_s", "tokens_per_s", "mfu", "hfu")

    def on_step_end(self, trainer: Trainer, record: dict[str, Any]) -> None:
        self._made.add(record)

    def on_train_end(self, trainer: Trainer, status: int) -> None:
        steps = choose_course(self._made.rows(WARM_UP_STEPS) or self._made.rows()).steps
        if not steps or not self.file.exists():
            return
        measured: dict[str, Any] = {"step_seconds": median(step["step_time_s"] for step in steps)}
        measured["tokens_per_second"] = median(step["tokens_per_s"] for step in steps)
        if all(math.isfinite(step["mfu"]) for step in steps):
            measured["mfu"] = median(step["mfu"] for step in steps)
            measured["hfu"] = median(step["hfu"] for step in steps)
        measured["bytes_per_gpu"] = self.memory.bytes()
        plan = json.loads(self.file.read_text(encoding="utf-8"))
        plan["measured"] = measured
        aside = self.file.with_suffix(".json.new")
        aside.write_text(encode_json(plan, indent=2) + "\n", encoding="utf-8")
        os.replace(aside, self.file)
        self.console.print(make_comparison_table(plan))


TITLE = "planned and measured (medians of this rank)"
COLUMNS = ("", "planned", "measured", "measured / planned")


def make_comparison_table(plan: dict[str, Any]) -> Table:
    """Lay planned, measured and their ratio out as a table for the terminal."""
    table = Table(title=TITLE, title_justify="left", caption=describe_flat_part(plan), caption_justify="left")
    for name in COLUMNS:
        table.add_column(name, justify="right" if name else "left")
    for row in list_comparison_rows(plan):
        table.add_row(*row)
    return table


def describe_flat_part(plan: dict[str, Any]) -> str | None:
    """Say what of a small run's planned memory is no sum of its tensors; None where that is less than a tenth."""
    stages = plan.get("memory", {}).get("stages", [])
    flat = max((stage["runtime_bytes"] for stage in stages), default=0)
    if flat <= 0.1 * plan.get("bytes_per_gpu", 0):
        return None
    return (
        f"of the planned memory {format_number(flat * 2.0**-20, '.0f')} MiB are a flat figure for what libraries and the "
        "allocator take; it can be 30 MiB more or less"
    )


def list_comparison_rows(plan: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """List what was measured: its name and unit, planned, measured and their ratio."""
    rows = []
    units = {
        "step_seconds": ("step, s", 1.0),
        "tokens_per_second": ("tokens/s", 1.0),
        "mfu": ("MFU, %", 100.0),
        "hfu": ("HFU, %", 100.0),
        "bytes_per_gpu": ("memory of a rank, MiB", 2.0**-20),
    }
    found = plan.get("measured")
    if not isinstance(found, dict):
        return []
    for key, (label, factor) in units.items():
        planned, measured = (read_number(values.get(key)) for values in (plan, found))
        if planned and measured is not None:
            ratio = format_number(measured / planned, ".2f")
            rows.append((label, _shown(planned * factor), _shown(measured * factor), ratio))
    return rows


def _shown(value: float) -> str:
    return format_number(value, ",.0f" if value >= 1000 else ".3g")


class PeakMemory:
    """Measures the most memory that this rank holds from now on.

    On a GPU with what contexts and libraries take there, as a plan counts it; on a CPU what the process takes beyond what it
    has now (Python and its libraries), which no plan counts.
    """

    def __init__(self, device_type: str) -> None:
        self.device_type = device_type
        if device_type != "cuda":
            _forget_peak()
            self.before = _resident("VmRSS")

    def bytes(self) -> int:
        """Measure the peak so far."""
        if self.device_type != "cuda":
            return max(0, _resident("VmHWM") - self.before)
        import torch

        free, total = torch.cuda.mem_get_info()
        beside = max(0, total - free - torch.cuda.memory_reserved())  # a rank has its GPU for itself
        return torch.cuda.max_memory_reserved() + beside


def _forget_peak() -> None:
    """Begin the peak anew (on Linux): importing and measuring the machine took memory that is free again."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _resident(name: str) -> int:
    """Read VmRSS (now) or VmHWM (at most) of the process; elsewhere than on Linux only the most is known."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
