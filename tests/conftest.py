"""Order of the test files: the longest first, so that no core is left alone with one of them at the end."""

import pytest

LONGEST = ("pipeline", "costs", "how_to_add", "oracle", "readme_runs", "stages", "wheel", "cuda_graph")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {f"test_{name}": i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))
