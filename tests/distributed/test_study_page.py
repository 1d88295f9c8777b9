"""A study in MLflow's own pages, seen through a browser."""

from pathlib import Path

import pytest

from aceray.data.particles import ParticleSet
from aceray.distributed.study_run import run_study
from tests import browser
from tests.distributed.test_study_run import Make


@pytest.mark.slow
@pytest.mark.skipif(bool(browser.missing()), reason=browser.missing() or "nothing is missing")
def test_the_page_of_a_study_leads_to_its_trials_side_by_side(tmp_path: Path, particle_set: ParticleSet) -> None:
    database = f"sqlite:///{tmp_path / 'ml.db'}"
    make = Make(tmp_path, particle_set)
    make.defaults = {"objective": "pose/coverage"}
    make.more = ("tracking.enabled=true", f"tracking.uri={database}")
    result = run_study(make(), "none")
    picture = tmp_path / "study.png"
    with browser.mlflow_server(database) as server, browser.chromium() as driver:
        browser.open_comparison(driver, server, str(result.mlflow_run_id))
        browser.show_metric(driver, "pose/coverage")
        text = browser.there(driver, "css selector", "body").text
        chart = browser.there(driver, "css selector", ".js-plotly-plot")
        assert "Comparing 2 Runs" in text
        for name in ("weight_0.0", "weight_2.0", "pose/coverage", "pose/view_entropy", "select/d4_consistency"):
            assert name in text
        assert "pip.weight" in chart.text and chart.size["width"] > 200
        driver.save_screenshot(str(picture))
        browser.open_all_runs(driver)
        assert "workflowType=machine_learning" in driver.current_url
        assert "tiny" in browser.there(driver, "partial link text", "tiny").text
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 20_000
