"""Tables: as Markdown, for readers, and as JSON, for the repository."""

import json
import re


def table(header, rows):
    """A markdown table; numbers to the right."""
    text = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*text)]
    right = [all(re.fullmatch(r"-?[\d.]+%?|", cell) for cell in column[1:]) for column in zip(*text)]
    lines = [
        "| " + " | ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right)) + " |" for row in text
    ]
    rule = "|" + "|".join("-" * (w + 1) + (":" if r else "-") for w, r in zip(widths, right)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def save(path, entries, sort_keys=False):
    """Writes nested dictionaries as JSON, each innermost one on a line of its own."""
    text = json.dumps(entries, indent=1, sort_keys=sort_keys)
    path.write_text(re.sub(r"\{[^{}]*\}", lambda innermost: " ".join(innermost[0].split()), text) + "\n")
