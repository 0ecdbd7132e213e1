"""YAML as its users mean it."""

import re

import yaml


class _Loader(yaml.SafeLoader):
    """YAML 1.2's truth values and decimal numbers; everything else is text, all capitals too (--layer-pattern).

    PyYAML reads YAML 1.1: 1e-6 is text there, NO is false, 010 is 8, and 2026-01-01 is a date, which is not JSON.
    """

    yaml_implicit_resolvers = {}


for _kind, _words, _first in (
    ("bool", r"true|True|false|False", "tTfF"),
    ("null", r"~|null|Null|", ["~", "n", "N", ""]),
    ("int", r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+", "-+.0123456789"),
    ("float", r"[-+]?\.inf|\.nan", "-+."),
    ("merge", r"<<", "<"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"^({_words})$"), list(_first))


def parse_yaml(content: str | bytes, named: str) -> object:
    """What a YAML 1.2 text says.

    Raises:
        ValueError: what cannot be read, under the name that it has for the user.
    """
    try:
        return yaml.load(content, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # also: too many digits, brackets too deep
        raise ValueError(f"{named} is not valid YAML: {' '.join(str(error).split())}") from None
