"""Names of contenders: every plan file competes under a name of its own."""

from pathlib import Path

from kvcompress.core.plan import RetentionPlan
from kvcompress.core.retention import FULL, Retention
from kvcompress.evaluation.contenders import benchmark_contenders, plan_contenders, plan_files
from kvcompress.evaluation.params import BenchmarkParams
from tests.tiny import CONFIGS


def saved_plan(path: Path, window: int) -> Path:
    kept = ((Retention(2, window), FULL), (Retention(2, window), Retention(2, window)))
    RetentionPlan(kept, 4, "m", "mine").save(path)
    return path


def test_plans_of_one_file_name_all_compete_each_with_its_own_rival(tmp_path: Path) -> None:
    paths = [saved_plan(tmp_path / f"{folder}/plan.json", 10 + 20 * i) for i, folder in enumerate(("a", "b", "b/c"))]
    config = CONFIGS["llama"]()
    found = plan_contenders(config, 128, [*paths, tmp_path / "b/../a/plan.json"])
    names = ["a/plan", "b/plan", "c/plan"]
    assert list(found) == ["full cache", *(one for name in names for one in (name, f"uniform = {name}"))]
    for name, path in zip(names, paths, strict=True):
        mine, rival = found[name], found[f"uniform = {name}"]
        assert mine.plan == RetentionPlan.load(path)
        assert rival.plan is not None
        assert mine.rival == rival.name
        assert mine.plan.held(128) == rival.plan.held(128)
    heads = benchmark_contenders(["head_aware"], config, BenchmarkParams(), None, paths)
    assert [one.name for one in heads[1:]] == [f"head_aware {name}" for name in names]
    assert [one.plan for one in heads[1:]] == [RetentionPlan.load(path) for path in paths]


def test_a_plan_is_never_called_as_another_contender_is(tmp_path: Path) -> None:
    files = ("full cache.json", "mine.json", "uniform = mine.json", "4 + 60.json")
    paths = [saved_plan(tmp_path / "a" / name, 10 + i) for i, name in enumerate(files)]
    found = plan_contenders(CONFIGS["llama"](), 128, paths, taken=["4 + 60"])
    plans = [one for one in found.values() if one.rival]
    assert [one.name for one in plans] == ["a/full cache", "mine", "a/uniform = mine", "a/4 + 60"]
    assert len(found) == 1 + 2 * len(paths)


def test_a_plan_is_never_called_as_a_score_or_its_rival_is(tmp_path: Path) -> None:
    names = ["25%", "select key_norm 25%", "select key_norm 50%"]
    paths = [saved_plan(tmp_path / f"a/{name}.json", 10 + i) for i, name in enumerate(names)]
    found = plan_contenders(CONFIGS["llama"](), 128, paths, ["key_norm"], [0.25])
    named = plan_files(paths, ["key_norm"], [0.25])
    assert list(named) == ["a/25%", "a/select key_norm 25%", "select key_norm 50%"]
    assert [one.name for one in found.values() if one.rival] == [*named, "select key_norm 25%"]
    assert len(found) == 1 + 2 * 4
