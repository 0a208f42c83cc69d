"""Seeding, statistics, run folder: the small parts that a run is recorded with."""

import json
import math

import pytest
import torch

from torch_utils import seeding
from training import run_dir
from training.stats import StatsCollector

PINNED_SEED = 7667506512434995351


def test_streams_depend_on_every_key_and_on_nothing_else() -> None:
    seeds = {
        seeding.derive(*keys) for keys in [(0,), (1,), (0, "a"), (0, "a", 0), (0, "a", 1), (0, "a", "1"), (0, "b", 0)]
    }
    assert len(seeds) == 7
    assert (
        seeding.derive(0, "latents", 0, 4096) == PINNED_SEED
    )  # equal on every machine and version, or runs are not repeatable
    first = torch.randn(4, generator=seeding.generator(3, "x"))
    torch.randn(100)
    assert torch.equal(first, torch.randn(4, generator=seeding.generator(3, "x")))


def test_scope_leaves_the_global_stream_as_it_was() -> None:
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    with seeding.scoped(1, "phase"):
        inside = torch.randn(3)
    assert torch.equal(torch.randn(3), expected)
    with seeding.scoped(1, "phase"):
        assert torch.equal(torch.randn(3), inside)


def test_statistics_start_anew_each_tick_and_survive_infinity() -> None:
    stats = StatsCollector()
    stats.report("a", torch.tensor([1.0, 2.0, 3.0]))
    stats.report("a", 6.0)
    stats.report("bad", torch.tensor([float("inf"), 1.0]))
    row = stats.collect()
    assert row["a"].num == 4 and row["a"].mean == 3.0 and row["a"].std == pytest.approx(math.sqrt(3.5))
    assert math.isinf(row["bad"].mean) or math.isnan(row["bad"].mean)
    stats.report("bad", 2.0)
    row = stats.collect()
    assert row["bad"].mean == 2.0 and row["a"].mean == 3.0


def test_run_folders_are_numbered_after_the_largest(tmp_path) -> None:
    assert run_dir.create(tmp_path / "runs", "a b/c").name == "00000-a_b_c"
    (tmp_path / "runs" / "00041-x").mkdir()
    assert run_dir.create(tmp_path / "runs", "next").name == "00042-next"
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file"):
        run_dir.create(tmp_path / "file", "x")


def test_json_is_strict_and_lines_survive_a_torn_end(tmp_path) -> None:
    path = tmp_path / "s.jsonl"
    run_dir.append_jsonl(path, {"a": float("nan"), "b": [1, float("inf")], "c": 2.5})
    with open(path, "a") as f:
        f.write('{"torn": 1')
    assert run_dir.read_jsonl(path) == [{"a": None, "b": [1, None], "c": 2.5}]
    run_dir.write_json(tmp_path / "x.json", {"v": float("nan")})
    assert json.loads((tmp_path / "x.json").read_text()) == {"v": None}
    assert not [p for p in tmp_path.iterdir() if p.name.endswith(".tmp")]
