"""How the classes of heads look in every figure and on the report page."""

from kvcompress.core.head_classes import HeadType

# class -> (colour, marker), in the order of every legend; Okabe and Ito's colours, which colour-blind readers can tell apart
STYLE: dict[HeadType, tuple[str, str]] = {
    HeadType.SINK_POSITIONAL: ("#0072B2", "o"),
    HeadType.POSITIONAL: ("#0072B2", "p"),
    HeadType.TRUE_POSITIONAL: ("#CC79A7", "D"),
    HeadType.SINK_MIXED: ("#56B4E9", "s"),
    HeadType.GATHERING: ("#D55E00", "^"),
    HeadType.MIXED: ("#E69F00", "v"),
    HeadType.DEAD: ("#000000", "X"),
}
LABELS = {kind: kind.value.replace("_", "-") for kind in HeadType}
# a letter for every class, so that a map can be read without its colours
LETTERS = {
    HeadType.SINK_POSITIONAL: "s",
    HeadType.POSITIONAL: "p",
    HeadType.TRUE_POSITIONAL: "t",
    HeadType.SINK_MIXED: "x",
    HeadType.GATHERING: "G",
    HeadType.MIXED: "m",
    HeadType.DEAD: ".",
}
