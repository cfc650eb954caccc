"""What a reader may copy from a Markdown page: commands in indented blocks, Python blocks, and commands named in prose."""

import argparse
import re
import shlex
import sys
import textwrap
from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import typer
from typer.main import get_command

PROGRAMS = ("make", "dvc", "python", "torchrun", "bash", "kvcompress", "source", "pip")


def indented_blocks(text: str) -> list[str]:
    """Blocks indented by four spaces, fenced ones left out."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    return [textwrap.dedent(block) for block in re.findall(r"(?:(?:^ {4}.*\n)+)", prose, flags=re.M)]


def is_shell(block: str) -> bool:
    return block.split(maxsplit=1)[0] in PROGRAMS


def commands(text: str) -> list[list[str]]:
    """Words of every command in shell blocks, in order: comments gone, continued lines joined, `&&` taken apart."""
    lines = [line for block in indented_blocks(text) if is_shell(block) for line in unfolded(block)]
    return [shlex.split(part, comments=True) for line in lines for part in line.split(" && ")]


def unfolded(block: str) -> list[str]:
    return [line for line in re.sub(r"\\\n\s*", "", block).splitlines() if line.strip()]


def mentioned(text: str) -> list[list[str]]:
    """Words of every command that stands in prose or a table, between backticks; it need not be complete."""
    spans = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S))
    return [shlex.split(span) for span in spans if span.split()[0] in PROGRAMS and " " in span]


def python_blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", text, flags=re.M | re.S)


def alternatives(block: str) -> list[str]:
    """Expressions that comments of a Python block offer: `# or by class: EXPRESSION`."""
    return re.findall(r"^\s*# or [^:\n]*: (\S.*)$", block, flags=re.M)


def program(app: typer.Typer, words: Sequence[str]) -> tuple[Any, list[str]]:
    """The (sub)command of a Typer app that `words` name, and the words after it."""
    command, rest = get_command(app), list(words)
    while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
        assert rest[0] in command.commands, f"{rest[0]} is not one of {', '.join(command.commands)}"
        command = command.commands[rest.pop(0)]
    return command, rest


def unknown_flags(command: Any, words: Sequence[str]) -> list[str]:
    """Flags among `words` that the command does not have."""
    known = {"--help", "-h"} | {
        name for parameter in command.params for name in parameter.opts + parameter.secondary_opts
    }
    flags = [word.split("=")[0] for word in words if re.match(r"--?[a-z]", word)]
    return [flag for flag in flags if flag not in known]


def parsed_by_dvc(words: list[str]) -> argparse.Namespace:
    """What DVC's own parser makes of a command, the word `dvc` first; `SystemExit` where it does not take it."""
    from dvc.cli.parser import get_main_parser

    with patch.object(sys, "argv", words):  # DVC looks there, too, for -v; pytest may have been given -q and -v
        get_main_parser.cache_clear()
        return get_main_parser().parse_args(words[1:])
