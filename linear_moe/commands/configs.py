"""List the configurations of this package: pretrain's --config, build_model, and base: in a file of your own take
their names. A file that exists under the same name wins.
"""

import argparse


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="linear-moe configs", description=__doc__)
    parser.parse_args(argv)
    from linear_moe.mcore.configs import CONFIGS, packaged

    found = packaged()
    width = max(map(len, found))
    print(f"Files below {CONFIGS}:\n")
    for name, path in found.items():
        print(f"{name:{width}}  {path.read_text().splitlines()[0].removeprefix('# ')}")
