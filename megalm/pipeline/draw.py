"""Pictures of a simulated schedule: text for the terminal, SVG for documents. No torch."""

from html import escape

from megalm.pipeline.actions import Kind
from megalm.pipeline.simulate import Simulation

_NAMES = {Kind.F: "forward", Kind.B: "backward", Kind.I: "input gradient", Kind.W: "weight gradient"}
# 256-colour backgrounds for chunks 0 and 1 (later chunks repeat them), in the papers' convention: forward blue, backward
# teal, weight gradient green; the second chunk is darker
_BACKGROUND = {Kind.F: (111, 25), Kind.B: (80, 30), Kind.I: (80, 30), Kind.W: (114, 28)}
_FILL = {
    Kind.F: ("#8fb4f5", "#3d6fd1"),
    Kind.B: ("#7fd6cf", "#1f8f86"),
    Kind.I: ("#7fd6cf", "#1f8f86"),
    Kind.W: ("#a5dd8c", "#4c9a2f"),
}


def draw_text(simulation: Simulation, *, width: int | None = None, color: bool = False, unicode: bool = True) -> str:
    """One line a rank, time from left to right: F3 is the forward pass of micro-batch 3, F3b of the rank's chunk b.

    A pass is as wide as it takes long; one column stands for the shortest pass. `width` cuts long lines.
    """
    starts, ends, orders = simulation.timeline.starts, simulation.timeline.ends, simulation.schedule.computation
    chunks, m = simulation.schedule.placement.chunks, simulation.schedule.micro_batches
    lengths = [e - s for start, end in zip(starts, ends, strict=True) for s, e in zip(start, end, strict=True)]
    unit = min((length for length in lengths if length > 0), default=1.0)
    cell = 2 + len(str(m - 1)) + (chunks > 1)
    idle, fill, cut = ("·", "─", "…") if unicode else (".", "-", ">")
    label = len(f"rank {len(orders) - 1}") + 1
    columns = round(simulation.makespan / unit) * cell
    room = columns if width is None else max(cell, width - label)
    lines = []
    for rank, order in enumerate(orders):
        # each column: its character and its colours
        row = [(idle if i % cell == 0 else " ", "") for i in range(columns)]
        for action, start, end in zip(order, starts[rank], ends[rank], strict=True):
            left, right = round(start / unit) * cell, round(end / unit) * cell
            name = f"{action.kind.value}{action.micro_batch}" + (_chunk_name(action.chunk) if chunks > 1 else "")
            inner = name.ljust(cell - 1).ljust(right - left - 1, " " if color else fill).ljust(right - left)
            style = ""
            if color:
                dark = action.chunk % 2
                style = f"\x1b[{97 if dark else 30};48;5;{_BACKGROUND[action.kind][dark]}m"
            for i, character in enumerate(inner[: right - left]):
                row[left + i] = (character, style)
        shown, style = [], ""
        for character, wanted in row[: room - (columns > room)]:
            if wanted != style:
                shown.append("\x1b[0m" * bool(style) + wanted)
                style = wanted
            shown.append(character)
        line = "".join(shown) + ("\x1b[0m" if style else "") + (cut if columns > room else "")
        lines.append(f"rank {rank}".ljust(label) + (line if color else line.rstrip()))
    return "\n".join(lines)


def _chunk_name(chunk: int) -> str:
    name = ""
    while True:
        chunk, letter = divmod(chunk, 26)
        name = chr(ord("a") + letter) + name
        if not chunk:
            return name
        chunk -= 1


def summarize(simulation: Simulation) -> str:
    """Summarize the figures under the picture, in words."""
    schedule = simulation.schedule
    placement = schedule.placement
    peaks = simulation.peak_micro_batches
    lines = [
        f"{schedule.kind}: {placement.ranks} ranks x {placement.chunks} chunk(s), {schedule.micro_batches} micro-batches",
        f"time {simulation.makespan:g}, of which each rank computes {sum(simulation.busy) / len(simulation.busy):g}",
        f"bubble {simulation.bubble_fraction:.2%} of the step; a rank waits at most "
        f"{simulation.waiting_fraction:.2%} of its own span",
        f"activations held: {max(peaks):g} micro-batches at most"
        + (f" (by rank: {', '.join(f'{p:g}' for p in peaks)})" if len(peaks) <= 16 else ""),
    ]
    return "\n".join(lines)


def draw_svg(simulation: Simulation, *, unit_width: float = 26.0, row_height: float = 26.0) -> str:
    """Draw the picture as one self-contained SVG document, readable on light and dark pages."""
    schedule, times = simulation.schedule, simulation.timeline
    durations = [e - s for ss, ee in zip(times.starts, times.ends, strict=True) for s, e in zip(ss, ee, strict=True)]
    unit = min((d for d in durations if d > 0), default=1.0)
    scale = unit_width / unit
    left, top, gap = 64.0, 40.0, 4.0
    ranks, chunks = len(times.starts), schedule.placement.chunks
    width = left + simulation.makespan * scale + 12
    bottom = top + ranks * (row_height + gap)
    kinds = [k for k in _NAMES if any(a.kind is k for order in schedule.computation for a in order)]
    title = (
        f"{schedule.kind}: {ranks} ranks, {schedule.micro_batches} micro-batches, "
        f"bubble {simulation.bubble_fraction:.1%}, {max(simulation.peak_micro_batches):g} micro-batches of activations"
    )
    # room for the legend and the title, whose letters are about 8 units wide
    legend = 170.0
    width = max(width, left + legend * len(kinds) * min(chunks, 2), 24 + 8.0 * len(title))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{bottom + 40:g}" '
        f'viewBox="0 0 {width:g} {bottom + 40:g}" font-family="sans-serif" font-size="12" role="img">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{width:g}" height="{bottom + 40:g}" fill="#ffffff"/>',
        f'<text x="12" y="22" font-size="14">{escape(title)}</text>',
    ]
    for rank, order in enumerate(schedule.computation):
        y = top + rank * (row_height + gap)
        parts.append(f'<text x="12" y="{y + row_height * 0.68:g}">rank {rank}</text>')
        parts.append(
            f'<rect x="{left:g}" y="{y:g}" width="{simulation.makespan * scale:g}" height="{row_height:g}" fill="#ededed"/>'
        )
        for action, start, end in zip(order, times.starts[rank], times.ends[rank], strict=True):
            dark = action.chunk % 2
            x, w = left + start * scale, (end - start) * scale
            parts.append(
                f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{row_height:g}" '
                f'fill="{_FILL[action.kind][dark]}" stroke="#ffffff"/>'
                f'<text x="{x + w / 2:g}" y="{y + row_height * 0.68:g}" text-anchor="middle" '
                f'fill="{"#ffffff" if dark else "#1b1b1b"}">{action.micro_batch}</text>'
            )
    x = left
    for kind in kinds:
        for dark in range(min(chunks, 2)):
            name = _NAMES[kind] + ("" if chunks == 1 else ", odd chunks" if dark and chunks > 2 else f", chunk {dark}")
            if chunks > 2 and not dark:
                name = _NAMES[kind] + ", even chunks"
            parts.append(
                f'<rect x="{x:g}" y="{bottom + 10:g}" width="12" height="12" fill="{_FILL[kind][dark]}"/>'
                f'<text x="{x + 17:g}" y="{bottom + 20:g}" font-size="11">{name}</text>'
            )
            x += legend
    parts.append("</svg>")
    return "\n".join(parts) + "\n"
