"""YAML as its users mean it."""

import re

import yaml


class _Loader(yaml.SafeLoader):
    """YAML 1.2's truth values and decimal numbers; everything else is text, all capitals too (--layer-pattern).

    PyYAML reads YAML 1.1: 1e-6 is text there, NO is false, 010 is 8, and 2026-01-01 is a date, which is not JSON.
    """

    yaml_implicit_resolvers = {}

    def construct_mapping(self, node, deep=False):
        """Refuses a key that stands there twice, of which PyYAML takes the last."""
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"key {twice[0]!r} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


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
        raise ValueError(f"{named} is not valid YAML: {_said(error)}") from None


def _said(error: Exception) -> str:
    """In one line, without the name that PyYAML gives to a text."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return " ".join(str(error).replace('in "<byte string>", position', "at byte").split())
    mark = error.problem_mark
    said = ", ".join(text for text in (error.context, error.problem) if text)
    return f"{said}, in column {mark.column + 1} of line {mark.line + 1}"
