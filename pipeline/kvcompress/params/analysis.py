"""Sections `statistics`, `thresholds` and `windows`: dials of the analysis that act without the model."""

from typing import Annotated

from pydantic import Field, model_validator

from kvcompress.core.params import Count, SectionParams, Share


class StatisticsParams(SectionParams):
    """Which keys count as sinks, local and recent; the bounds are what the collected sums can answer."""

    section = "statistics"

    sink_size: Annotated[int, Field(ge=1, le=64)] = 4
    local_window: Annotated[int, Field(ge=1, le=64)] = 8
    recent_ratio: Annotated[float, Field(gt=0, le=1)] = 0.1

    @property
    def recent_percent(self) -> int:
        return round(100 * self.recent_ratio)

    @model_validator(mode="after")
    def recent_is_whole_percent(self) -> "StatisticsParams":
        if self.recent_percent < 1 or abs(self.recent_percent / 100 - self.recent_ratio) > 1e-9:
            raise ValueError(f"recent_ratio is {self.recent_ratio}, expected a multiple of 0.01")
        return self


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
