"""Checks of a YAML file before it is parsed: duplicate keys, odd numbers, empty sections, nulls."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

from mooshak.config.sections import Config
from mooshak.errors import InputError


def checked_text(path: Path) -> str | None:
    """Return the text to parse in place of a file whose empty sections are their defaults.

    None if the file can be parsed as it is, or is not YAML at all, which the parser reports. Raises
    `InputError`, with the lines, for a key that stands twice, a section without keys, a null where
    a value is needed, and a number in base 8 or 60.
    """
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError):
        return None
    if root is None or _is_null(root):
        return "{}"
    _check_values(path, root, "", set())
    if not isinstance(root, yaml.MappingNode):
        raise InputError(f"{path} does not consist of sections, such as `train: {{steps: 100}}`")
    sections, kept = get_type_hints(Config), []
    for key, value in root.value:
        if key.value not in sections:
            kept.append((key, value))  # The parser names the most similar section.
        elif isinstance(value, yaml.MappingNode):
            _check_nulls(path, key.value, sections[key.value], value)
            kept.append((key, value))
        elif not _is_null(value):
            raise InputError(
                f"{path}, line {_line(value)}: section {key.value} has no keys but the value "
                f"{_shown(value)}; write `{key.value}: {{key: value}}`"
            )
    if len(kept) == len(root.value):
        return None
    root.value = kept
    text: str = yaml.serialize(root)
    return text


def _check_values(path: Path, node: yaml.Node, where: str, seen: set[int]) -> None:
    if id(node) in seen:  # An alias may name a node that contains it.
        return
    seen.add(id(node))
    if isinstance(node, yaml.ScalarNode):
        _check_number(path, node, where)
    if isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            _check_values(path, item, f"{where}[{i}]", seen)
    if isinstance(node, yaml.MappingNode):
        lines: dict[Any, int] = {}
        for key, value in node.value:
            name = f"{where}.{key.value}".lstrip(".")
            if isinstance(key, yaml.ScalarNode) and key.value in lines:
                raise InputError(
                    f"{path}: {name} stands twice, in lines {lines[key.value]} and {_line(key)}; "
                    "merge the two"
                )
            if isinstance(key, yaml.ScalarNode):
                lines[key.value] = _line(key)
            _check_values(path, value, name, seen)


def _check_nulls(path: Path, section: str, kind: type, node: yaml.MappingNode) -> None:
    required = {
        one.name.rstrip("_") for one in fields(kind) if type(None) not in get_args(one.type)
    }
    for key, value in node.value:
        if key.value in required and _is_null(value):
            raise InputError(
                f"{path}, line {_line(key)}: {section}.{key.value} is null, and needs a value; "
                "remove the key for its default"
            )


def _shown(node: yaml.Node) -> str:
    return str(node.value) if isinstance(node, yaml.ScalarNode) else "[...]"


def _check_number(path: Path, node: yaml.Node, name: str) -> None:
    """Refuse a number that YAML 1.1 reads in base 8 or 60: `010` is 8 there, `1:30` is 90."""
    is_number = node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
    if is_number and (":" in node.value or re.fullmatch(r"[-+]?0[0-7_]+", node.value)):
        base = 60 if ":" in node.value else 8
        raise InputError(
            f"{path}, line {_line(node)}: {name} {node.value} is a number in base {base} to YAML; "
            "write it as a decimal number, or a text in quotes"
        )


def _is_null(node: yaml.Node) -> bool:
    return bool(node.tag == "tag:yaml.org,2002:null")


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1
