"""Texts: fetched, cut, proven disjoint, tokenised."""

import json
from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing

from kvcompress.core.errors import InputError
from kvcompress.texts.corpora import (
    cut_at,
    documents,
    leading_tokens,
    load_texts,
    prepare_corpus,
    require_disjoint,
    stdlib_topics,
)
from kvcompress.texts.params import CorpusParams
from tests.tiny import prose, tiny_tokenizer


def corpus(folder: Path, **texts: tuple[str, float]) -> CorpusParams:
    sections = {}
    for name, (text, share) in texts.items():
        (folder / f"{name}.txt").write_text(text)
        sections[name] = {"source": "file", "file": str(folder / f"{name}.txt"), "calibration": share}
    return CorpusParams.model_validate({"texts": sections})


def test_parts_are_consecutive_and_complete(tmp_path: Path) -> None:
    one, two = prose(2000, 1), prose(500, 2)
    prepare_corpus(corpus(tmp_path, one=(one, 0.4), two=(two, 0.0)), tmp_path / "out")
    calibration = load_texts(tmp_path / "out", "calibration")
    evaluation = load_texts(tmp_path / "out", "evaluation")
    assert list(calibration) == ["one"]
    assert calibration["one"] + evaluation["one"] == one
    assert evaluation["two"] == two
    assert calibration["one"].endswith("\n")
    assert 0.39 < len(calibration["one"]) / len(one) < 0.42


def test_a_text_of_one_line_is_cut_where_the_share_says() -> None:
    words = " ".join(f"word{i}" for i in range(5000))
    assert 0.1 <= cut_at(words, 0.1) / len(words) < 0.11
    assert words[cut_at(words, 0.1) - 1] == " "
    assert cut_at("x" * 1000, 0.3) == 300
    assert cut_at("ab", 0.9) == 1


def test_a_passage_on_both_sides_is_found(tmp_path: Path) -> None:
    shared = prose(60, 9)
    one, two = prose(400, 1) + shared + prose(400, 2), prose(300, 3) + shared.upper().replace(" ", "\n")
    require_disjoint({"one": one}, {"two": prose(300, 3)})
    with pytest.raises(InputError, match="'two' repeats calibration text 'one': “"):
        require_disjoint({"one": one}, {"two": two})
    chinese = "".join(chr(0x4E00 + i * 7 % 5000) for i in range(8000))
    with pytest.raises(InputError, match="'two' repeats"):
        require_disjoint({"one": chinese}, {"two": chinese[2000:4000]})
    for a, b in ((one[:150], one), (one, one[50:220])):  # shorter than an indexed run
        with pytest.raises(InputError, match="'two' repeats"):
            require_disjoint({"one": a}, {"two": b})
    with pytest.raises(InputError, match="must not overlap"):
        prepare_corpus(corpus(tmp_path, one=(one, 1.0), two=(one, 0.0)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_standard_library_topics_quote_nothing_twice() -> None:
    text = stdlib_topics("pydoc_data.topics")
    paragraphs = [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]
    assert len(paragraphs) == len(set(paragraphs)) > 500
    half = text.find("\n", len(text) // 2)
    require_disjoint({"first": text[:half]}, {"second": text[half:]})
    with pytest.raises(InputError, match="no topics in 'json'"):
        stdlib_topics("json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "text 'bad'.*is empty"),
        (b" \n ", "is empty"),
        (b"abc\xff", "is not UTF-8 text: byte 3"),
        (None, "cannot read"),
    ],
)
def test_bad_texts_are_named(content: bytes | None, message: str, tmp_path: Path) -> None:
    params = corpus(tmp_path, good=(prose(400), 0.5), bad=("x", 0.0))
    if content is None:
        (tmp_path / "bad.txt").unlink()
    else:
        (tmp_path / "bad.txt").write_bytes(content)
    with pytest.raises(InputError, match=message):
        prepare_corpus(params, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_newlines_and_byte_order_mark(tmp_path: Path) -> None:
    params = corpus(tmp_path, one=("x", 0.5), two=(prose(30, 1), 0.0))
    (tmp_path / "one.txt").write_bytes("\ufeffa\r\nb\rc\n".encode())
    prepare_corpus(params, tmp_path / "out")
    parts = [load_texts(tmp_path / "out", split)["one"] for split in ("calibration", "evaluation")]
    assert "".join(parts) == "a\nb\nc\n"


def test_rows_of_a_dataset(tmp_path: Path) -> None:
    """The real `datasets` library on a local folder."""
    pytest.importorskip("datasets")
    folder = tmp_path / "set"
    folder.mkdir()
    rows = [{"text": prose(40, i), "other": i} for i in range(5)]
    (folder / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    block = {"path": str(folder), "rows": 3}
    text = {"source": "dataset", "dataset": block, "calibration": 0.5}
    plain = tmp_path / "plain.txt"
    plain.write_text(prose(40, 77))
    other = {"source": "file", "file": str(plain), "calibration": 0.0}
    prepare_corpus(CorpusParams.model_validate({"texts": {"rows": text, "plain": other}}), tmp_path / "out")
    parts = [load_texts(tmp_path / "out", split)["rows"] for split in ("calibration", "evaluation")]
    assert "".join(parts) == "\n\n".join(row["text"] for row in rows[:3])
    block["column"] = "story"
    with pytest.raises(InputError, match="has no column 'story', only"):
        prepare_corpus(CorpusParams.model_validate({"texts": {"rows": text, "plain": other}}), tmp_path / "out")
    block.update(column="text", path=str(tmp_path / "nothing"))
    with pytest.raises(InputError, match="nothing cannot be loaded"):
        prepare_corpus(CorpusParams.model_validate({"texts": {"rows": text, "plain": other}}), tmp_path / "out")


def test_documents_are_exact_and_do_not_overlap() -> None:
    tokenizer, text = tiny_tokenizer(), prose(300)
    ids = tokenizer(text).input_ids
    found = [tokens.tolist() for tokens in documents(tokenizer, "t", text, 500, 3)]
    assert [len(tokens) for tokens in found] == [500, 500, 500]
    assert found[0] == ids[:500]
    assert found[2] == ids[-500:]
    middle = (len(ids) - 1500) // 2 + 500
    assert found[1] == ids[middle : middle + 500]
    assert len(list(documents(tokenizer, "t", text, len(ids), 1))) == 1
    with pytest.raises(InputError, match=f"'t' has {len(ids)} tokens, but 4 documents of 1000 tokens need 4000"):
        list(documents(tokenizer, "t", text, 1000, 4))


def test_documents_begin_as_the_tokenizer_begins_a_text() -> None:
    tokenizer = tiny_tokenizer()
    assert leading_tokens(tokenizer) == []
    processor = TemplateProcessing(single="[B] $A [E]", special_tokens=[("[B]", 7), ("[E]", 9)])
    tokenizer.backend_tokenizer.post_processor = processor
    assert leading_tokens(tokenizer) == [7]
    (tokens,) = documents(tokenizer, "t", prose(100), 50, 1)
    assert tokens[0] == 7
    assert len(tokens) == 50
    assert 9 not in tokens
