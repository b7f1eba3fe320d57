"""What a person sees while a run trains: a progress line on a terminal, plain lines elsewhere, a picture at the end."""

import math
import time
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from megalm.journal import QUIET, choose_course, describe_event, format_number, read_number
from megalm.observe.kept import KeptSteps
from megalm.observe.plot import draw_text_plot
from megalm.train.hooks import Hook

if TYPE_CHECKING:
    from megalm.train.trainer import Trainer

MOST_SOURCES = 8
"""Losses by source on a console line; all of them are in metrics.jsonl and the report."""

BAR = 10
BESIDE_THE_NUMBERS = BAR + 40
"""Characters of the progress line: of its bar, and of all but a step's numbers."""

UNTOLD = QUIET | {"resume", "load_weights"}
"""Kinds of events without a line of their own: quiet ones, and what the first line says."""


class ConsoleHook(Hook):
    """Shows a run on rank 0's console: a moving line, lines that stay, a picture at the end."""

    def __init__(self, console: Console, log_every: int) -> None:
        self.console = console
        self.log_every = log_every
        self._made = KeptSteps("loss")
        self._by_source: dict[str, float] = {}
        self._since_line: list[float] = []
        """Finite losses since the last line; the next one shows their mean."""
        self._progress: Progress | None = None

    def on_complete(self, trainer: "Trainer") -> None:
        self.console.print(
            f"this run is complete: step {trainer.step} of {trainer.total_steps}. To train on, give a larger "
            "train.steps; to train again, another run.name."
        )

    def on_train_start(self, trainer: "Trainer") -> None:
        self._first_step = trainer.step + 1
        self._started = time.perf_counter()
        if trainer.step:
            self.console.print(f"resumed at step {trainer.step} of {trainer.total_steps}")
        if self.console.is_terminal:
            self._progress = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(BAR),
                TextColumn("{task.description}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
            )
            self._task = self._progress.add_task("", total=trainer.total_steps, completed=trainer.step)
            self._progress.start()

    def on_step_end(self, trainer: "Trainer", record: dict[str, Any]) -> None:
        if record["step"] <= self._made.last_step:  # the run went back: what is made again counts
            self._since_line.clear()
        self._made.add(record)
        loss = read_number(record["loss"])
        self._since_line += [loss] if loss is not None and math.isfinite(loss) else []
        if self._progress is not None:
            room = self.console.width - BESIDE_THE_NUMBERS
            self._progress.update(self._task, completed=record["step"], description=describe(record, room))
        self._by_source.update({key[5:]: value for key, value in record.items() if key.startswith("loss/")})
        evaluated = "eval/loss" in record
        logged = self.log_every > 0 and (record["step"] % self.log_every == 0 or record["step"] == self._first_step)
        if evaluated or (logged and self._progress is None):
            left = (time.perf_counter() - self._started) / len(self._made) * (trainer.total_steps - record["step"])
            recent = self._since_line
            smooth = record | {"loss": sum(recent) / len(recent) if recent else record["loss"]}
            self._since_line.clear()
            text = f"step {record['step']:>6}/{trainer.total_steps}  {describe(smooth)}"
            if evaluated:
                text += f"  eval loss {format_number(record['eval/loss'], '.4f')}"
                text += "".join(
                    f"  {name} {format_number(loss, '.4f')}"
                    for name, loss in list(self._by_source.items())[:MOST_SOURCES]
                )
            self.console.print(f"{text}  left {format_seconds(left)}", highlight=False, markup=False)

    def on_event(self, event: dict[str, Any]) -> None:
        """Print a line for what the guard saw and did, and for what is wrong with a checkpoint."""
        if event["kind"].startswith("checkpoint_"):
            what = event["kind"].removeprefix("checkpoint_")
            text = f"checkpoint of step {event['step']} {what}: {event.get('reason', '')}"
        elif event["kind"] in UNTOLD:
            return
        else:
            text = describe_event(event)
        self.console.print(text, highlight=False, markup=False)

    def on_train_end(self, trainer: "Trainer", status: int) -> None:
        if self._progress is not None:
            self._progress.stop()
        if len(self._made) > 1:
            course = choose_course(self._made.rows())
            line, *abandoned = ([(r["step"], r["loss"]) for r in each] for each in (course.steps, *course.abandoned))
            picture = draw_text_plot(line, abandoned=abandoned, title="loss (nats a token) over steps")
            self.console.print(picture, highlight=False)
        if status == 130:
            self.console.print(
                f"interrupted and saved at step {trainer.step} of {trainer.total_steps}; the same command goes on from there"
            )


def describe(record: dict[str, Any], room: int | None = None) -> str:
    """Put the numbers of a step into one short line; of at most `room` characters, for which the less telling ones give way."""
    parts = {
        "loss": f"loss {format_number(record['loss'], '.4f')}",
        "grad": f"grad {format_number(record['grad_norm'], '.2f')}",
        "lr": f"lr {format_number(record['lr'], '.2e')}",
        "speed": f"{format_number(record['tokens_per_s'], ',.0f')} tokens/s",
    }
    if record.get("mfu") is not None:
        parts["mfu"] = f"mfu {format_number(100 * record['mfu'], '4.1f')}%"
    if record["skipped"]:
        parts["skipped"] = "update refused"
    for name in ("lr", "mfu", "grad", "speed"):
        if room is not None and len("  ".join(parts.values())) > room:
            parts.pop(name, None)
    return "  ".join(parts.values())


def format_seconds(seconds: float) -> str:
    """Write seconds as 1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
