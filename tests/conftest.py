"""Slow tests and the order of test files: the longest first, so that no core is left alone with one of them at the end.

Slow files run the whole pipeline, build the wheel, start a browser or several processes, or interpret kernels. `make
test` leaves
them out, `make test-slow` runs them.
"""

import pytest

SLOW = {  # test file -> reason
    "project/test_pipeline.py": "runs the pipeline",
    "project/test_how_to_add.py": "runs pytest in a copy of the project",
    "project/test_wheel.py": "builds the wheel",
    "reporting/test_page_browser.py": "starts a browser",
    "models/test_distributed.py": "starts several processes",
    "models/test_tensor_parallel.py": "starts several processes",
    "models/test_scaling.py": "runs DVC in clones",
    "ops/test_ragged_decode.py": "interprets the kernel",
    "ops/test_score_kernels.py": "interprets kernels",
}
LONGEST = (
    *SLOW,
    "cache/test_oracle.py",
    "project/test_readme_runs.py",
    "project/test_stages.py",
    "cache/test_cuda_graph.py",
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    assert all((config.rootpath / "tests" / name).is_file() for name in SLOW), "a slow file was renamed"
    place = {name: i for i, name in enumerate(LONGEST)}
    names = {item: item.path.relative_to(config.rootpath / "tests").as_posix() for item in items}
    for item in items:
        if names[item] in SLOW:
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: place.get(names[item], len(place)))
