"""The throughput benchmark takes whatever is registered."""

import json

import pytest

from benchmarks import throughput


def test_models_of_any_family_are_measured_beside_one_ceiling(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(throughput, "SIDE", 64)
    throughput.main(["Hybrid_mu", "Mixer_mu", "--batch=2", "--rounds=1", f"--json={tmp_path / 'rates.json'}"])
    records = json.loads((tmp_path / "rates.json").read_text())
    assert [record["model"] for record in records] == ["Hybrid_mu", "Mixer_mu"]
    first, second = (record["ceiling"] for record in records)
    assert first["gflops_max"] == second["gflops_max"] >= first["gflops_median"] and first["median"] != second["median"]
    for record in records:
        ours = max(rate["median"] for rate in record["images_per_second"].values())
        assert record["ratios"]["keras_vit / best ceiling"] == pytest.approx(ours / record["ceiling"]["max"])
    assert "keras_vit / best ceiling" in capsys.readouterr().out
