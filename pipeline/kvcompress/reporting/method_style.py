"""One look for every method: the label, colour and marker it has in every figure, in `dvc plots` and on the report page.

METHODS is in the order of every legend: policies of this project, the full cache, baselines and published methods, controls.
Keys are the families of `evaluation` and the policies of `planning`. "Even budget" means equal slots in every head. Colours
differ pairwise, because `dvc plots` uses markers for revisions; the first ones are Okabe and Ito's, which colour-blind
readers can tell apart.
"""

from collections.abc import Iterable
from colorsys import hsv_to_rgb
from hashlib import sha256
from typing import NamedTuple

from kvcompress.core.matplotlib_setup import INK

FULL, UNIFORM, WINDOW_ONLY, CACHE_POSITIONS = "full", "uniform sink + window", "window only", "positions in the cache"


class Look(NamedTuple):
    """`line`: points of this method at several sizes are connected."""

    label: str
    colour: str
    marker: str
    line: bool = False


OWN = {
    "select": Look("select", "#D55E00", "^", True),
    "priced": Look("priced", "#009E73", "s", True),
    "retrieval_heads": Look("retrieval heads", "#E69F00", "D"),
    "class_table_scaled": Look("class table, scaled", "#56B4E9", "P"),
    "class table": Look("class table", "#7D5BA6", "p"),
}
PUBLISHED = {
    "snapkv": Look("SnapKV, even budget", "#C2185B", "d", True),
    "ada_kv": Look("Ada-KV with SnapKV", "#E27DA3", "X", True),
    "expected_attention": Look("Expected Attention, even budget", "#6A8F00", ">", True),
    "leverage": Look("Compactor, even budget", "#00838F", "<", True),
    "key_diff": Look("KeyDiff, even budget", "#4B4FA8", "h", True),
    "accumulated_attention": Look("H2O, even budget", "#8B1A1A", "X", True),
    "key_norm": Look("L2 norm, even budget", "#8A7F00", "8", True),
    "l2_compress": Look("L2 norm, share (l2_compress)", "#B8A900", "<"),
    "fix_size_l2": Look("L2 norm, fixed size (fix_size_l2)", "#6B6300", ">"),
}
METHODS: dict[str, Look] = {
    **OWN,
    FULL: Look("full cache", INK, "*"),
    UNIFORM: Look("sink + window (StreamingLLM)", "#0072B2", "o", True),
    CACHE_POSITIONS: Look("StreamingLLM, positions in the cache", "#17405F", "H"),
    WINDOW_ONLY: Look("window only", "#A6642A", "v", True),
    "other sink counts": Look("other sink counts", "#5E7FA3", "."),
    **PUBLISHED,
    "per layer": Look("class table, one size a layer", "#B58BD6", "h"),
    "random": Look("random heads", "#999999", "x"),
    "inverse": Look("inverse prices", "#CC79A7", "+"),
    "inverted": Look("class table, inverted", "#882255", "1"),
}
ALIASES = {
    "full cache": FULL,
    "uniform": UNIFORM,
    "streaming_llm": UNIFORM,
    "recent_only": WINDOW_ONLY,
    "class_table": "class table",
    "head_aware": "class table",
    "adaptive snapkv": "ada_kv",
    **{f"select {score}": score for score in PUBLISHED},  # as older results name them
}
STROKES = "x+1"  # markers without an area
SPARE = "oshpXdPH"


def key_of(method: str) -> str:
    """Return the key of a method in METHODS; an unknown one is its own key."""
    return ALIASES.get(method, method)


def look(method: str) -> Look:
    """Return the look of a method; an unknown one gets a colour and a marker made from its name."""
    key = key_of(method)
    if key in METHODS:
        return METHODS[key]
    digest = sha256(key.encode()).digest()
    parts = hsv_to_rgb(int.from_bytes(digest[:2]) / 65536, 0.8, 0.45 + digest[2] / 850)
    colour = "#" + "".join(f"{round(255 * part):02X}" for part in parts)
    return Look(key, colour, SPARE[digest[3] % len(SPARE)])


def in_order(methods: Iterable[str]) -> list[str]:
    """Sort methods as legends have them, each once; unknown ones come last, by name."""
    places = {key: place for place, key in enumerate(METHODS)}
    return sorted(set(methods), key=lambda name: (places.get(key_of(name), len(places)), name))
