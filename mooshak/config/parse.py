"""Parse YAML files and command-line options into a `Config`, and write it as YAML."""

import argparse
import functools
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

import jsonargparse
import yaml

from mooshak.command_line import HelpFormatter, description, prog
from mooshak.config import renamed
from mooshak.config.model import ModelConfig
from mooshak.config.sections import Config, InitConfig, SourceConfig
from mooshak.config.yaml_file import checked_text
from mooshak.errors import InputError, did_you_mean

SECTIONS = tuple(f.name for f in fields(Config))

USAGE = "--config FILE [--section.key VALUE ...]"

INIT_FROM = (
    "checkpoint of any format, or Hugging Face directory, that supplies the initial weights; keys "
    "of model that are not given, and the tokenizer, are taken from it (empty: random weights)"
)
"""The help of `--init.from`."""


class _HelpFormatter(HelpFormatter, jsonargparse.DefaultHelpFormatter):
    """Help with the options by section, and their defaults as YAML."""

    def _format_action(self, action: argparse.Action) -> str:
        # Hide the options that read a single section from a file.
        if action.dest in SECTIONS:
            return ""
        return super()._format_action(action)

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = (action.help or "").rstrip("."), action.default
        if action.dest == "data.sources":
            return f"{text} (default: the built-in tales in Hindi and English)"
        if action.dest == "print_config":
            return "print the configuration as YAML and exit"
        limits = _range_of(action.dest)
        opening = f" ({limits}; default" if limits else " (default"
        # Where null or an empty text has a meaning, the help says it.
        text, is_explained = re.subn(r" \((null|empty): ", rf"{opening} \1: ", text)
        if is_explained or action.nargs == 0 or default in (None, "", argparse.SUPPRESS):
            return text if is_explained or not limits else f"{text} ({limits})"
        shown = str(default).lower() if isinstance(default, bool) else "%(default)s"
        return f"{text}{opening}: {shown})"

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        names = {"int": "N", "float": "X", "str": "TEXT"}
        kind = (self._get_type_str(action) or "").removesuffix(" | null")
        return names.get(kind) or super()._get_default_metavar_for_optional(action)


def _range_of(dest: str) -> str:
    """Return the range of `section.key` as text, empty if it has none."""
    section, _, key = dest.partition(".")
    if section not in SECTIONS:
        return ""
    ranges = (
        f.metadata.get("range") for f in fields(get_type_hints(Config)[section]) if f.name == key
    )
    return str(next(ranges, None) or "")


def config_parser(
    module: str = "", doc: str | None = None, usage: str = USAGE
) -> jsonargparse.ArgumentParser:
    """Return a parser of `--config FILE` and every `--section.key`.

    `module` is the module of the command and `doc` its docstring; the command adds its own options,
    and passes another `usage` if it has required arguments.
    """
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    result = jsonargparse.ArgumentParser(
        prog=prog(module),
        usage=f"{prog(module)} {usage}",
        description=description(doc),
        formatter_class=_HelpFormatter,
        exit_on_error=False,
        allow_abbrev=False,  # `--train.st` may become another option tomorrow.
    )
    result.add_argument(
        "--config", action="config", metavar="FILE", help="YAML file with the sections below"
    )
    # Section by section: defaults come from the signatures, where a derived value is still null.
    for section in fields(Config):
        title = f"{section.name}: {(section.type.__doc__ or '').splitlines()[0].rstrip('.')}"
        if section.type is InitConfig:
            result.add_argument_group(title).add_argument("--init.from", default="", help=INIT_FROM)
        else:
            # The adapters of a model have a section of their own.
            skip = {"lora"} if section.type is ModelConfig else None
            result.add_class_arguments(section.type, section.name, skip=skip)
            assert result.groups is not None
            result.groups[section.name].title = title
    return result


@dataclass(frozen=True)
class Draft:
    """A configuration with types and defaults, not yet validated across sections."""

    sections: dict[str, Any]
    """Section -> its dataclass; a dict for `model`, whose missing keys `init.from` may supply."""
    given: frozenset[str]
    """Dotted keys that the YAML file or the command line sets."""

    def config(self, **sections: Any) -> Config:
        """Validate and return the configuration, with some sections replaced.

        No file is opened: `init_from.resolve` replaces the sections that a checkpoint supplies.
        """
        merged = self.sections | sections
        if isinstance(merged["model"], dict):
            merged["model"] = ModelConfig(**merged["model"])
        return Config(**merged)


def parse_config(
    arguments: jsonargparse.ArgumentParser,
    argv: Sequence[str] | None = None,
    find_config: Callable[[jsonargparse.Namespace], Path] | None = None,
    is_record: bool = False,
) -> tuple[Draft, jsonargparse.Namespace]:
    """Return the draft of the configuration, and the options of the command.

    Without `--config`, the file is `find_config(options)`, the record of a run. Records
    (`is_record`) may have keys of older versions. Raises `InputError` for a missing file, an
    unknown key or a value of another type.
    """
    file = None
    words = _config_first([_long(word) for word in (sys.argv[1:] if argv is None else argv)])
    try:
        if find_config is not None and _config_file(words) is None:
            words = ["--config", str(find_config(arguments.parse_args(words))), *words]
            is_record = True
        file = _config_file(words)
        words = _prepared(words, is_record)
        given = arguments.parse_args(words, defaults=False)
        namespace = arguments.parse_args(words)
        model = namespace.pop("model").as_dict()
        values = arguments.instantiate(namespace)
    except (jsonargparse.ArgumentError, yaml.YAMLError, ValueError, TypeError) as error:
        message = _explain(str(error))
        not_yaml = isinstance(error, (UnicodeDecodeError, yaml.YAMLError))
        if not_yaml or message.startswith("Problems parsing config"):
            message = re.sub(r"Problems parsing config:\s*|in \"<unicode string>\", ", "", message)
            message = f"{file} is not YAML: {message}"
        raise InputError(message) from error
    sections = {name: values[name] for name in SECTIONS if name not in ("model", "init")}
    sections |= {"model": model, "init": InitConfig(values["init.from"])}
    return Draft(sections, frozenset(given.keys())), values


def _config_first(words: list[str]) -> list[str]:
    """Move each `--config FILE` to the front: options override files, whatever their order."""
    files, others, i = list[str](), list[str](), 0
    while i < len(words):
        if words[i] == "--config" and i + 1 < len(words):
            files += words[i : i + 2]
            i += 1
        elif words[i].startswith("--config="):
            files += ["--config", words[i].removeprefix("--config=")]
        else:
            others.append(words[i])
        i += 1
    return files + others


def _prepared(words: list[str], is_record: bool) -> list[str]:
    """Return the words; a file that cannot be parsed as it is is replaced by its text.

    That is a record with old keys or of a directory that was moved, and a file with empty sections.
    """
    result = list(words)
    for i in range(0, len(words), 2):
        if words[i] != "--config" or i + 1 == len(words):
            break
        path = Path(words[i + 1])
        if not path.is_file():
            continue  # The parser reports it.
        text = checked_text(path)
        if is_record or is_run_record(path):
            try:
                values = yaml.safe_load(text or path.read_text(encoding="utf-8"))
            except (yaml.YAMLError, UnicodeDecodeError):
                continue
            if isinstance(values, dict) and (new := _present(values, path)) != values:
                text = yaml.safe_dump(new)
        if text is not None:
            result[i + 1] = text
    return result


def _present(record: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return a record of a run with today's keys, and with the directory that it is in."""
    values = renamed.translate(record)
    if not is_run_record(path):
        return values
    run, here = values.get("run"), path.absolute().parent
    if isinstance(run, dict) and Path(str(run.get("dir"))).absolute() != here:
        run["dir"] = str(here)
    tokenizer = values.get("tokenizer")
    if isinstance(tokenizer, dict) and not Path(str(tokenizer.get("path"))).exists():
        for copied in sorted(here.glob("tokenizer/tokenizer.*")):
            if copied.suffix in (".model", ".json"):
                tokenizer["path"] = str(copied)
    return values


def is_run_record(path: Path) -> bool:
    """Return whether a YAML file is the `RUN/config.yaml` of a run."""
    return path.name == "config.yaml" and (path.parent / "environment.json").is_file()


def _long(word: str) -> str:
    """Replace `--mesh` by `--parallel.mesh`."""
    return re.sub(r"^--mesh(?==|$)", "--parallel.mesh", word)


def load_draft(path: str | Path, overrides: Sequence[str] = (), is_record: bool = False) -> Draft:
    """Load the draft in a YAML file, with `--section.key value` overrides."""
    words = ["--config", str(path), *overrides]
    return parse_config(config_parser(""), words, is_record=is_record)[0]


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Load a complete configuration from a YAML file, such as `RUN/config.yaml`.

    No checkpoint is opened: `init_from.resolve` completes a draft with the keys of `init.from`.
    """
    return load_draft(path, overrides, is_record=True).config()


def dump_config(config: Config) -> str:
    """Return the configuration as YAML; `load_config` reads it back as the same configuration."""
    values = asdict(config) | {"init": {"from": config.init.from_}}
    del values["model"]["lora"]  # The section `lora` is the same.
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _config_file(words: Sequence[str]) -> str | None:
    """Return the value of `--config`, which the messages of jsonargparse do not contain."""
    option = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    option.add_argument("--config", nargs="?")
    file: str | None = option.parse_known_args(words)[0].config
    return file


def _explain(message: str) -> str:
    """Return a message of jsonargparse, with the most similar known key for an unknown one."""
    for pattern, prefix in (
        (r"unrecognized arguments: --([\w.\-]+)", "option --"),
        (r"Group '([\w.]+)' does not accept option '([\w.]+)'", "key "),
        (r"Option '([\w.]+)' is not accepted", "key "),
    ):
        if match := re.search(pattern, message):
            key = ".".join(match.groups())
            if key in renamed.RENAMED:
                return f"{prefix}{key} was renamed; use {renamed.RENAMED[key]}"
            return f"unknown {prefix}{key}{did_you_mean(key, _known_keys())}"
    no_source = r"(?:of SourceConfig. Got value|Expected a dot import path string): (.*)"
    if match := re.search(no_source, message):
        return f"data.sources: {match[1]} is not an object with the keys of a source"
    if match := re.match(r'Parser key "config": (.*?): \'(.*)\'', message):
        reason = "does not exist" if "not exist" in match[1] else "is not a readable file"
        return f"--config {match[2]} {reason}; name a YAML file, such as configs/demo.yaml"
    if message.startswith("Unexpected config"):
        return "--config names no file; name a YAML file, such as configs/demo.yaml"
    if match := re.match(r'Parser key "([\w.]+)":(.*)', message, re.DOTALL):
        kinds = [_KINDS.get(kind, kind) for kind in re.findall(r"Expected an? (<.*?>)", match[2])]
        choices = re.search(r"Expected a typing\.Literal\[(.*?)\]", match[2])
        wanted = f"one of {choices[1]}" if choices else " or ".join(dict.fromkeys(kinds))
        value = re.search(r"(?:Got|Given) value: ?(.*)", match[2], re.DOTALL)
        if wanted and value:
            # Of a source, its own key.
            inner = re.search(r'Parser key "([\w.]+)"', match[2])
            name = f"{match[1]}: {inner[1]}" if inner else match[1]
            shown = value[1].strip() or "an empty text"
            hint = " (true and false to YAML are also yes, no, on and off: put it in quotes)"
            is_boolean = wanted == "a text" and shown in ("True", "False")
            return f"{name} must be {wanted}, not {shown}{hint if is_boolean else ''}"
    return message


_KINDS = {
    "<class 'int'>": "an integer",
    "<class 'float'>": "a number",
    "<class 'str'>": "a text",
    "<class 'bool'>": "true or false",
    "<class 'list'>": "a list",
    "<class 'dict'>": "an object",
    "<class 'NoneType'>": "null",
}
"""Type in the messages of jsonargparse -> words."""


@functools.cache
def _known_keys() -> tuple[str, ...]:
    sections = get_type_hints(Config).items()
    keys = [
        f"{name}.{key.name.rstrip('_')}" for name, section in sections for key in fields(section)
    ]
    return (*SECTIONS, *keys, *(f.name for f in fields(SourceConfig)), "config", "mesh", "resume")
