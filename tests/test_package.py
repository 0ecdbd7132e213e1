"""The package as it is installed: a wheel in an empty folder, used from an empty directory, without a checkout."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from linear_moe import __version__

ROOT = Path(__file__).resolve().parents[1]
# Python runs this at its start: takes back what `pip install -e` of the checkout has put there.
SITECUSTOMIZE = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "__editable__" not in getattr(finder, "__module__", "")]
"""


def files(folder):
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts}


class Installed:
    """A folder with the installed package and one without, and a way to call programs in an empty directory."""

    def __init__(self, folder):
        self.site, self.nothing, self.empty = folder / "site", folder / "nothing", folder / "empty"
        self.nothing.mkdir()
        self.empty.mkdir()
        (self.nothing / "sitecustomize.py").write_text(SITECUSTOMIZE)

    def run(self, *words, package=True):
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
        environment["PYTHONPATH"] = os.pathsep.join(map(str, [self.site, self.nothing] if package else [self.nothing]))
        return subprocess.run(
            list(map(str, words)), cwd=self.empty, env=environment, capture_output=True, text=True, timeout=200
        )

    def command(self, *words):
        done = self.run(self.site / "bin" / "linear-moe", *words)
        assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
        return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("package")
    source, wheels = folder / "source", folder / "wheels"
    shutil.copytree(ROOT / "linear_moe", source / "linear_moe", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    found, pip = Installed(folder), [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", wheels, source]
    done = found.run(*build)
    assert done.returncode == 0, done.stderr
    (wheel,) = wheels.iterdir()
    done = found.run(*pip, "install", "--no-deps", "--no-index", "--no-compile", "--target", found.site, wheel)
    assert done.returncode == 0, done.stderr
    return found


def test_no_checkout_is_importable_beside_it(installed):
    show = [sys.executable, "-c", "import linear_moe; print(linear_moe.__file__, linear_moe.__version__)"]
    missing = installed.run(*show, package=False)
    assert "ModuleNotFoundError: No module named 'linear_moe'" in missing.stderr
    assert installed.run(*show).stdout.split() == [str(installed.site / "linear_moe" / "__init__.py"), __version__]


def test_the_wheel_has_every_file_of_the_package(installed):
    assert files(installed.site / "linear_moe") == files(ROOT / "linear_moe")
    (metadata,) = installed.site.glob("linear_moe-*.dist-info/METADATA")
    lines = metadata.read_text().splitlines()
    assert {f"Version: {__version__}", "Requires-Python: >=3.12", "License-Expression: Apache-2.0"} <= {*lines}
    assert "Classifier: Typing :: Typed" in lines and "Provides-Extra: data" in lines
    assert {path.name for path in installed.site.iterdir()} == {"bin", "linear_moe", metadata.parent.name}, "no tests"


def test_the_command_trains_and_saves(installed):
    """From a name, with checkpoints, whose writer starts processes that import the command's script again."""
    flags = "--mock-data --tokenizer-type NullTokenizer --vocab-size 99 --seq-length 32 --train-iters 3 --eval-iters 0"
    shown = installed.command("pretrain", "--config", "tiny", *flags.split(), "--log-interval", "1", "--save", "out")
    assert [float(loss) for loss in re.findall(r"lm loss: (\S+)", shown)] == pytest.approx([4.9] * 3, abs=0.4)
    assert (installed.empty / "out" / "latest_checkpointed_iteration.txt").read_text() == "3"


def test_the_command_helps(installed):
    assert "pretrain" in installed.command("--help")
    assert installed.command("--version") == f"linear-moe {__version__}\n"
    assert "--state-sizes" in installed.command("evaluate", "mqar", "--help")
    assert "--threads" in installed.command("benchmark", "ops", "--help")
    assert installed.run(sys.executable, "-m", "linear_moe", "--version").stdout == f"linear-moe {__version__}\n"
