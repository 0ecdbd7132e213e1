"""List the configurations of this package: pretrain's --config, build_model, and base: in a file of your own take
their names. A file that exists under the same name wins.
"""

import argparse
import textwrap
from itertools import takewhile
from pathlib import Path


def summary(path: Path) -> str:
    """The first sentence of the comment that a configuration begins with."""
    comment = takewhile(lambda line: line.startswith("#"), path.read_text().splitlines())
    return " ".join(line.removeprefix("#").strip() for line in comment).partition(". ")[0].removesuffix(".")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="linear-moe configs", description=__doc__)
    parser.parse_args(argv)
    from linear_moe.mcore.configs import CONFIGS, packaged

    found = packaged()
    width = max(map(len, found)) + 2
    print(f"Files below {CONFIGS}:\n")
    for name, path in found.items():
        print(textwrap.fill(summary(path), 120, initial_indent=name.ljust(width), subsequent_indent=" " * width))
