"""Configurations: YAML files of arguments, the user's own or those of this package, by path or by name."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from linear_moe.mcore.yaml_text import parse_yaml

CONFIGS = Path(__file__).parents[1] / "configs"


def packaged() -> dict[str, Path]:
    """Name -> file of this package's configurations; a name is the path below ``CONFIGS`` without ``.yaml``."""
    return {path.relative_to(CONFIGS).with_suffix("").as_posix(): path for path in sorted(CONFIGS.rglob("*.yaml"))}


def read_config(name: str | Path) -> dict:
    """A YAML 1.2 mapping of arguments, its keys with ``-``.

    name: a file, or where there is no such file the name of a packaged configuration, such as ``llama3/340m_mom``.
    ``base: other.yaml`` in it, relative to the file, or ``base: llama3/340m`` names a mapping that it overrides key by
    key; null takes a key back.

    Raises:
        ValueError: neither a file nor a name (with the nearest), not a mapping, or a file that is its own base.
    """
    return _read_config(find_config(name), ())


def find_config(name: str | Path, folder: Path = Path(), above: str = "") -> Path:
    """The file that a name means, seen from a folder: one that exists there wins over a packaged one.

    above: what an error says of where the name stands.
    """
    path, known = Path(os.path.normpath(folder / name)), packaged()
    if path.is_file():
        return path
    if str(name) in known:
        return known[str(name)]
    problem, own = "is not a file" if path.exists() else "does not exist", Path(f"{path}.yaml")
    near = [str(own)] if own.is_file() else difflib.get_close_matches(_plain(name), known, n=3)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    raise ValueError(f"configuration {path}{above} {problem}, and linear_moe/configs has no such name{hint}")


def _plain(name: str | Path) -> str:
    """As names are written: below ``configs`` (as where a checkout had them), without an ending."""
    return str(name).rpartition("configs/")[2].removesuffix(".yaml").removesuffix(".yml")


def _read_config(path: Path, above: tuple[Path, ...]) -> dict:
    chain = (*above, path)
    base_of = f" (base of {above[-1]})" if above else ""
    named = f"configuration {path}{base_of}"
    if path in above:
        raise ValueError(f"configuration {path} is its own base: {' -> '.join(map(str, chain))}")
    config = parse_yaml(path.read_bytes(), named)
    if config is None:
        raise ValueError(f"{named} is empty; it must map argument names to values (num-layers: 4)")
    if not isinstance(config, dict):
        kind = type(config).__name__
        raise ValueError(f"{named} must map argument names to values, but is a {kind} (write num-layers: 4)")
    config = {str(key).replace("_", "-"): value for key, value in config.items()}
    base = config.pop("base", None)
    if base is None:
        return config
    if not isinstance(base, str):
        raise ValueError(f"{named}: base must be the name of a file, but is {base!r}")
    return _read_config(find_config(base, path.parent, f" (base of {path})"), chain) | config
