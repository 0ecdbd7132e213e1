"""`linear-moe evaluate` of this checkout, also where the package is not installed."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # for the processes that it starts

from linear_moe.commands import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
