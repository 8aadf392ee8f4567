"""``python -m benchmarks atlas``, on a very small atlas."""

from benchmarks.scaling_store import STAGES, measure_atlas


def test_a_small_atlas_goes_through_every_stage_and_leaves_nothing(tmp_path):
    costs = measure_atlas(tmp_path, 600, 0.02, "one")
    assert [item.stage for item in costs] == list(STAGES)
    assert all(item.cost.cpu_s > 0.1 for item in costs)
    assert [item.disk_bytes > 0 for item in costs] == [True, True, False, False]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"{s}.log" for s in STAGES)
    assert "perturbed cells" in (tmp_path / "epoch.log").read_text()
