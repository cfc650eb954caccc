"""Sections `thresholds` and `windows`: bounds between the classes and the windows these get."""

from typing import Annotated

from pydantic import Field, model_validator

from kvcompress.core.params import Count, SectionParams, Share


class ThresholdParams(SectionParams):
    """Bounds between the classes: entropies and `dead` in nats, `local` and `sink` as shares of attention."""

    section = "thresholds"

    low_entropy: Annotated[float, Field(gt=0)] = 1.5
    high_entropy: Annotated[float, Field(gt=0)] = 3.0
    local: Share = 0.6
    sink: Share = 0.3
    dead: Annotated[float, Field(ge=0)] = 0.1

    @model_validator(mode="after")
    def low_is_below_high(self) -> "ThresholdParams":
        if self.low_entropy >= self.high_entropy:
            raise ValueError(
                f"thresholds.low_entropy ({self.low_entropy}) must be below thresholds.high_entropy ({self.high_entropy})"
            )
        return self


class WindowParams(SectionParams):
    """Window of each class, in tokens; `wide_below_local`: true_positional heads less local than this get the wide one."""

    section = "windows"

    sink_positional: Count = 8
    true_positional: Count = 8
    true_positional_wide: Count = 16
    wide_below_local: Share = 0.8
    sink_mixed_min: Count = 16
    sink_mixed_max: Count = 32

    @model_validator(mode="after")
    def min_is_not_above_max(self) -> "WindowParams":
        if self.sink_mixed_min > self.sink_mixed_max:
            raise ValueError(
                f"windows.sink_mixed_min ({self.sink_mixed_min}) is above windows.sink_mixed_max ({self.sink_mixed_max})"
            )
        return self
