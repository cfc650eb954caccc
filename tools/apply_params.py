"""Write a file of overrides into params.yaml; comments stay. Run: python -m tools.apply_params recipes/params-gpu.yaml

Overrides have the shape of params.yaml and replace numbers, words and whole lists. An entry of a mapping that
params.yaml does
not have yet is added (a text of the corpus); an unknown section or field ends with one sentence and writes nothing.
"""

from collections.abc import Mapping
from io import StringIO
from pathlib import Path
from typing import Annotated, Any

import typer
from ruamel.yaml import YAML

from kvcompress.core.artifacts import read_text, write_text
from kvcompress.core.errors import InputError, said_in_a_sentence

OPEN = ("corpus.texts",)  # mappings that take new entries


def merge(base: Any, overrides: Mapping[str, Any], place: str = "") -> None:
    """Replace entries of `base` by those of `overrides`, in place. Raises `InputError` for an entry that `base` lacks."""
    for key, value in overrides.items():
        name = f"{place}.{key}".removeprefix(".")
        if key not in base and place not in OPEN:
            raise InputError(f"{name} is not in params.yaml, expected one of {', '.join(map(str, base))}")
        if isinstance(value, Mapping) and key in base:
            merge(base[key], value, name)
        else:
            base[key] = value


def main(
    overrides: Annotated[Path, typer.Argument(help="YAML file of overrides.")],
    params: Annotated[Path, typer.Option(help="File to change.")] = Path("params.yaml"),
) -> None:
    """Merge OVERRIDES into PARAMS."""
    yaml = YAML()
    yaml.width = 4096
    yaml.representer.add_representer(type(None), lambda one, _: one.represent_scalar("tag:yaml.org,2002:null", "null"))
    base, changes = yaml.load(read_text(params)), yaml.load(read_text(overrides))
    if not isinstance(changes, Mapping):
        raise InputError(f"{overrides} holds no sections, expected the shape of params.yaml")
    merge(base, changes)
    text = StringIO()
    yaml.dump(base, text)
    write_text(params, text.getvalue())


if __name__ == "__main__":
    with said_in_a_sentence():
        typer.run(main)
