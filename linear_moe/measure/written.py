"""The report as Markdown and JSON, written anew whenever something is known."""

import json
import os
from collections import Counter
from pathlib import Path

from .plan import PARTS
from .pool import CUT, GOOD
from .tables import table

DTYPES = ("bfloat16", "float16", "float32")
TITLES = {
    "checks": "Right or wrong",
    "times": "Kernels",
    "layer": "The layer",
    "train": "A training step",
    "decode": "Decoding: tokens a second",
}
LINES = 12  # of a profile


class Report:
    """Outcomes in the order in which they came. folder: where report.md and report.json go."""

    def __init__(self, folder, heading, command):
        self.folder, self.heading, self.command, self.outcomes = Path(folder), heading, command, []
        self.folder.mkdir(parents=True, exist_ok=True)
        self.write()

    def add(self, outcome):
        self.outcomes.append(outcome)
        self.write()

    @property
    def bad(self):
        return [outcome for outcome in self.outcomes if outcome.bad]

    def write(self):
        _replace(self.folder / "report.md", self.markdown())
        _replace(self.folder / "report.json", json.dumps(self.json(), indent=1))

    def json(self):
        rows = [
            {
                "part": o.task.part,
                "name": o.task.name,
                "status": o.status,
                "seconds": round(o.seconds, 1),
                "text": o.text,
                "details": o.details,
                **o.result,
            }
            for o in self.outcomes
        ]
        return {"heading": self.heading, "command": self.command, "outcomes": rows}

    def markdown(self):
        top = f"# GPU report\n\n{self.heading}\n\n`{self.command}`"
        return "\n\n".join([top, *self.summary(), *self.profiles()]) + "\n"

    def summary(self):
        """Sections, without the profiles: what went wrong, every part's table, what there was no time for."""
        sections = [self.failures()]
        for part in PARTS:
            mine = [o for o in self.outcomes if o.task.part == part and o.status != CUT]
            tables = checks_table(mine) if part == "checks" else tables_of(mine)
            if tables:
                sections.append(f"## {TITLES[part]}\n\n{tables}")
        cut = [f"{o.task.part}: {o.task.name}" for o in self.outcomes if o.status == CUT]
        if cut:
            sections.append("## No time was left for\n\n" + "\n".join(f"- {line}" for line in cut))
        return sections

    def failures(self):
        """What went wrong, the same words once."""
        counts = Counter(o.status for o in self.outcomes)
        lines = [", ".join(f"{count} {status}" for status, count in counts.items()) or "nothing yet"]
        grouped = {}
        for o in self.bad:
            grouped.setdefault((o.status, o.text), []).append(o)
        for (status, text), some in grouped.items():
            names = "; ".join(o.task.name for o in some[:6]) + (f" and {len(some) - 6} more" if some[6:] else "")
            lines.append(f"- **{status}**: {names}: {text}")
            streams = some[0].result.get("streams")
            if streams:
                lines.append("\n".join(f"  - {line}" for line in streams))
        return "## Result\n\n" + "\n".join([lines[0], "", *lines[1:]]).strip()

    def profiles(self):
        sections = []
        for o in self.outcomes:
            work = o.result.get("flops", {})
            for name, rows in o.result.get("profiles", {}).items():
                total = sum(row[1] for row in rows)
                cells = [
                    (kernel, f"{us:.1f}", f"{launches:.1f}", f"{us / total:.0%}", _rate(work.get(kernel), us))
                    for kernel, us, launches in rows[:LINES]
                ]
                header = ("kernel", "us", "launches", "share", "TFLOP/s")
                sections.append(f"### {name}: {total / 1e3:.3f} ms\n\n{table(header, cells)}")
        return ["## By kernel, forward and backward", *sections] if sections else []


def _rate(flops, microseconds):
    return f"{1e-6 * flops / microseconds:.0f}" if flops else ""


def checks_table(outcomes):
    """One row a check, one column a dtype: the worst error, or what happened."""
    rows = {}
    for o in outcomes:
        *label, last = o.task.name.split()
        name, dtype = (" ".join(label), last) if last in DTYPES else (o.task.name, "")
        errors = o.result.get("errors", {})
        worst = max(errors, key=lambda n: errors[n] if errors[n] == errors[n] else float("inf")) if errors else ""
        size = f"{worst} {errors[worst]:.0e}" if worst else ""
        rows.setdefault(name, {})[dtype] = size or o.status if o.status == GOOD else f"**{o.status}** {size}".strip()
    columns = [d for d in (*DTYPES, "") if any(d in row for row in rows.values())]
    body = [(name, *(row.get(d, "") for d in columns)) for name, row in rows.items()]
    return table(("check", *(d or "any" for d in columns)), body) if rows else ""


def tables_of(outcomes):
    """The rows of results, those with the same first column below each other; and the parts of a step."""
    groups = {}
    for o in outcomes:
        for row in [*o.result.get("rows", []), *([o.result["row"]] if "row" in o.result else [])]:
            groups.setdefault(next(iter(row)), []).append(row)
    found = []
    for rows in groups.values():
        columns = list(dict.fromkeys(column for row in rows for column in row))
        found.append(table(columns, [[row.get(column, "") for column in columns] for row in rows]))
    for parts in (o.result["parts"] for o in outcomes if "parts" in o.result):
        total = sum(us for _, us, _ in parts)
        cells = [(name, f"{us / 1e3:.2f}", f"{us / total:.0%}", f"{n:.0f}") for name, us, n in parts]
        found.append(table(("part of a step", "ms", "share", "launches"), cells))
    return "\n\n".join(found)


def _replace(path, text):
    """At once: whoever is cut off in the middle leaves the last whole file."""
    new = path.with_suffix(".new")
    new.write_text(text)
    os.replace(new, path)
