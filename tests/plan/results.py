"""Write benchmarks/results/planner-published-rows.csv: predicted step time beside each published row.

python -m tests.plan.results
"""

import csv
import sys
from pathlib import Path
from statistics import median

from megalm.plan.time import estimate_step_time
from tests.plan.published import mpt_benchmark, narayanan

FILE = Path(__file__).parent.parent.parent / "benchmarks" / "results" / "planner-published-rows.csv"
HEADER = ("row", "published step (s)", "predicted step (s)", "error (%)", "source")


def lines() -> list[tuple[str, str, str, str, str]]:
    found = []
    for row in (*mpt_benchmark(), *narayanan()):
        predicted = estimate_step_time(row.model, row.layout, row.machine).total
        error = 100 * (predicted / row.step_seconds - 1)
        found.append((row.name, f"{row.step_seconds:.3f}", f"{predicted:.3f}", f"{error:+.1f}", row.row["source"]))
    return found


def main() -> int:
    rows = lines()
    with FILE.open("w", newline="") as file:
        csv.writer(file).writerows([HEADER, *rows])
    for name in ("a100-80gb", "h100"):
        errors = [abs(float(row[3])) for row in rows if row[0].startswith(name)]
        print(f"{name}: {len(errors)} rows, median error {median(errors):.1f}%, largest {max(errors):.1f}%")
    print(f"wrote {FILE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
