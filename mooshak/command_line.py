"""Argument parsers of the commands: help that opens with one line of usage and examples."""

import argparse
import re
import shutil
from textwrap import indent

_EXAMPLE = re.compile(r"\s*(python|torchrun|make|sbatch|\w+=\S+) ")
_MAX_WIDTH = 100


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Help with the description as it is written and the default of every option."""

    def __init__(self, prog: str) -> None:
        width = min(shutil.get_terminal_size().columns, _MAX_WIDTH)
        super().__init__(prog, max_help_position=30, width=width)

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        is_flag = action.nargs == 0
        if is_flag or action.default in (None, "", argparse.SUPPRESS):
            return text
        return f"{text} (default: %(default)s)"


def command_parser(program: str, doc: str | None, usage: str) -> argparse.ArgumentParser:
    """Return the parser of a command, to which its options are added.

    `program` is a module, or the path of a script; `doc` is its docstring, `usage` what follows
    the program in the line of usage.
    """
    return argparse.ArgumentParser(
        prog=prog(program),
        usage=f"{prog(program)} {usage}",
        description=description(doc),
        formatter_class=HelpFormatter,
    )


def prog(program: str) -> str:
    """Return how a module or a script is started."""
    return f"python {program}" if program.endswith(".py") else f"python -m {program}"


def description(doc: str | None) -> str:
    """Return the paragraphs of a docstring, with its command lines last, as examples."""
    paragraphs = re.split(r"\n\n+", (doc or "").strip())
    is_example = [all(map(_EXAMPLE.match, part.splitlines())) for part in paragraphs]
    texts = [part for part, example in zip(paragraphs, is_example, strict=True) if not example]
    lines = [
        line.strip()
        for part, example in zip(paragraphs, is_example, strict=True)
        if example
        for line in part.splitlines()
    ]
    examples = ["examples:\n" + indent("\n".join(lines), "  ")] if lines else []
    return "\n\n".join(texts + examples)
