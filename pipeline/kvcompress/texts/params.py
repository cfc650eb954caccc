"""Section `corpus`: texts by name, and the share of each text that is used for calibration."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from kvcompress.core.packages import PackagedFile
from kvcompress.core.params import Count, Name, Params, SectionParams, Share


class DatasetText(Params):
    """First `rows` rows of a text column of a Hugging Face dataset, or of a folder that `datasets` can load."""

    path: Name
    name: Name | None = None
    revision: Name | None = None
    split: Name = "train"
    column: Name = "text"
    rows: Count = 1000


class TextParams(Params):
    """One text: its leading `calibration` share is for calibration, the rest for evaluation alone.

    stdlib: a module of the standard library whose `topics` are the text.
    """

    source: Literal["package", "stdlib", "file", "dataset"]
    package: PackagedFile | None = None
    stdlib: Name | None = None
    file: Name | None = None
    dataset: DatasetText | None = None
    calibration: Share

    @model_validator(mode="after")
    def source_is_described(self) -> "TextParams":
        if getattr(self, self.source) is None:
            raise ValueError(f"source is {self.source}, but the field {self.source} is missing")
        return self


class CorpusParams(SectionParams):
    """Texts by name. At least one is for calibration, and at least one for evaluation alone (calibration share 0)."""

    section = "corpus"

    texts: Annotated[dict[Annotated[str, Field(pattern=r"^[a-z0-9_-]+$")], TextParams], Field(min_length=1)]

    @model_validator(mode="after")
    def both_uses(self) -> "CorpusParams":
        if all(text.calibration == 0 for text in self.texts.values()):
            raise ValueError("no text has a calibration share above 0")
        if all(text.calibration > 0 for text in self.texts.values()):
            raise ValueError("every text has a calibration share; at least one must be for evaluation alone (share 0)")
        return self
