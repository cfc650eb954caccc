"""Section `plots`."""

from typing import Annotated

from pydantic import Field

from kvcompress.core.params import SectionParams


class PlotParams(SectionParams):
    section = "plots"

    dpi: Annotated[int, Field(ge=50, le=600)] = 150
