"""Sections `thresholds` and `windows`: bounds between the head classes, and the window of each class."""

from typing import Annotated

from pydantic import Field, model_validator

from kvcompress.core.params import Count, SectionParams, Share


class ThresholdParams(SectionParams):
    """Bounds between the classes. The defaults are those of the published study.

    low_entropy: attention entropy below which a head may be positional (nats).
    high_entropy: attention entropy from which a head is gathering (nats).
    local: share of attention on the local window.
    sink: share of attention on the sinks.
    dead: KL divergence to uniform attention below which a head is dead (nats).
    """

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
                f"thresholds.low_entropy ({self.low_entropy}) must be below"
                f" thresholds.high_entropy ({self.high_entropy})"
            )
        return self


class WindowParams(SectionParams):
    """Window of each class (tokens); `true_positional_wide` applies to local ratios below `wide_below_local`."""

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
                f"windows.sink_mixed_min ({self.sink_mixed_min}) is above"
                f" windows.sink_mixed_max ({self.sink_mixed_max})"
            )
        return self


DEFAULT_THRESHOLDS = ThresholdParams()
DEFAULT_WINDOWS = WindowParams()
