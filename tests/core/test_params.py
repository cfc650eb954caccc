"""params.yaml: strict, and every complaint names the field."""

from pathlib import Path

import pytest

from kvcompress.analysis.params import ThresholdParams, WindowParams
from kvcompress.collect.params import CollectParams, StatisticsParams
from kvcompress.core.errors import InputError
from kvcompress.core.params import SECTIONS, load_section
from kvcompress.evaluation.params import AblationParams
from kvcompress.models.params import MachineParams, ModelParams
from kvcompress.reporting.params import PlotParams
from kvcompress.texts.params import CorpusParams
from tests.core.param_sections import CLASSES

DEFAULT = Path(__file__).parents[2] / "params.yaml"


def test_every_section_has_one_class() -> None:
    assert set(CLASSES) == set(SECTIONS)
    assert {AblationParams, PlotParams} <= set(CLASSES.values())


@pytest.mark.parametrize("name", SECTIONS)
def test_the_committed_file_is_valid(name: str) -> None:
    assert load_section(CLASSES[name], DEFAULT)


@pytest.mark.parametrize(
    ("section", "old", "new", "message"),
    [
        (ThresholdParams, "low_entropy: 1.5", "low_entropy: 3.0", r"low_entropy \(3.0\) must be below"),
        (ThresholdParams, "low_entropy: 1.5", "low_entropy: abc", "low_entropy.*found 'abc'"),
        (ThresholdParams, "low_entropy: 1.5", "low_entropy: '1.5'", "low_entropy.*found '1.5'"),
        (ThresholdParams, "  dead: 0.1", "  dead: .nan", "dead.*finite"),
        (ThresholdParams, "  sink: 0.3", "  sink: 1.3", "sink.*less than or equal to 1"),
        (ThresholdParams, "  sink: 0.3", "  sinks: 0.3", "sinks: there is no such field"),
        (StatisticsParams, "sink_size: 4", "sink_size: 0", "sink_size.*greater than or equal to 1"),
        (StatisticsParams, "sink_size: 4", "sink_size: -4", "sink_size"),
        (StatisticsParams, "sink_size: 4", "sink_size: 4.5", "sink_size"),
        (StatisticsParams, "recent_ratio: 0.1", "recent_ratio: 0", "recent_ratio"),
        (CollectParams, "max_tokens: 2048", "max_tokens: 100", "max_tokens.*128"),
        (WindowParams, "sink_mixed_min: 16", "sink_mixed_min: 33", r"sink_mixed_min \(33\) is above"),
        (ModelParams, "source: package     ", "source: floppy     ", "source"),
        (ModelParams, "dtype: float32", "dtype: float8", "dtype"),
        (ModelParams, "sha256: bcc8", "sha256: bcc", "sha256"),
        (CorpusParams, "calibration: ", "calibration: 0.0 # ", "no text has a calibration share"),
        (CorpusParams, "calibration: 0.0", "calibration: 0.5", "at least one must be for evaluation alone"),
        (CorpusParams, "stdlib: pydoc_data.topics", "file: null", "source is stdlib, but the field stdlib is missing"),
        (ThresholdParams, "thresholds:", "threshold:", "there is no section 'threshold'"),
        (ThresholdParams, "plots:", "plots: [", "is not YAML"),
    ],
)
def test_what_is_wrong_is_named(section: type, old: str, new: str, message: str, tmp_path: Path) -> None:
    text = DEFAULT.read_text()
    assert old in text
    path = tmp_path / "params.yaml"
    path.write_text(text.replace(old, new))
    with pytest.raises(InputError, match=message) as caught:
        load_section(section, path)
    assert str(path) in str(caught.value)


def test_missing_section_and_file(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    with pytest.raises(InputError, match="cannot read"):
        load_section(ThresholdParams, path)
    path.write_text("plots:\n  dpi: 100\n")
    with pytest.raises(InputError, match="the section 'thresholds' is missing"):
        load_section(ThresholdParams, path)
    path.write_text("")
    with pytest.raises(InputError, match="has no sections"):
        load_section(ThresholdParams, path)


def test_a_file_without_the_machine_is_for_one_process(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text("plots:\n  dpi: 100\n")
    assert load_section(MachineParams, path).count == 1
    assert [name for name, section in CLASSES.items() if section.optional] == ["machine"]


def test_flags_override_and_are_checked() -> None:
    assert load_section(CollectParams, DEFAULT, max_tokens=512, chunk_size=None).max_tokens == 512
    with pytest.raises(InputError, match=r"command line: max_tokens"):
        load_section(CollectParams, DEFAULT, max_tokens=5)
