"""`linear-moe generate` of this checkout, also where the package is not installed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from linear_moe.commands import main

if __name__ == "__main__":
    main(["generate", *sys.argv[1:]])
