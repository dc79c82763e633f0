from __future__ import annotations

from pathlib import Path

from benchmarks import predict_scaling

ROOT = Path(__file__).parents[2]


def test_the_page_holds_the_table_that_is_made() -> None:
    assert predict_scaling.table() in (ROOT / "docs" / "scaling.md").read_text()


def test_a_prediction_follows_the_formulas() -> None:
    small = predict_scaling.MODELS[0]
    (products, none), (_, full) = (predict_scaling.predict(small, 8, shard) for shard in ("none", "full"))
    assert products == predict_scaling.predict(small, 512, "none")[0]
    assert abs(none - 2 * 7 / 8 * 4 * 43.9e6 / predict_scaling.NEAR) < 0.02 * none
    assert full < none  # the prototypes stay where they are
