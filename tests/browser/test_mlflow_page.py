"""The page of MLflow as a user sees it: a real server, runs made by the commands, and a real Chromium."""

import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from mlflow import MlflowClient
from PIL import Image

from tests.integration.mlflow_server import Server
from tests.tiny import STEPS, arguments, losses

pytestmark = pytest.mark.timeout(300)
WAIT_MS = 30_000
TRAINING_VIEW = "?workflowType=machine_learning"
NO_ASSISTANT = """localStorage.setItem("mlflow.assistant.fab.autoOpenedOnFirstLoad_v1", "true");
localStorage.setItem("mlflow.assistant.panelOpen_v1", "false");"""
CHILDREN = ("mask_ratio-0.5_seed-0", "mask_ratio-0.75_seed-0")


@dataclass(frozen=True)
class Tracked:
    """What was tracked: the folder of the runs' folders, MLflow's address, and the runs' ids by folder."""

    folder: Path
    uri: str
    experiment: str
    ids: dict[str, str]

    def address(self, page: str = "", view: str = TRAINING_VIEW) -> str:
        """The address of a page of the experiment's runs."""
        return f"{self.uri}/#/experiments/{self.experiment}/runs{page}{view}"

    def last_loss(self, name: str) -> float:
        return losses(self.folder / name)[STEPS]


@pytest.fixture(scope="module")
def tracked(chromium, tmp_path_factory, digits, mae_scale):
    """Two runs that differ in the seed, and a sweep of two points, on a server of their own."""
    folder = tmp_path_factory.mktemp("tracked")
    server = Server(tmp_path_factory.mktemp("server"))
    try:
        server.start()
        overrides = arguments(digits, f"tracking.uri={server.uri}")
        for seed in (0, 1):
            done = mae_scale("pretrain", "demo", "--out", folder / f"digits_{seed}", *overrides, f"seed={seed}")
            assert done.returncode == 0, done.stderr
        done = mae_scale("sweep", "demo", "model.mask_ratio=0.5,0.75", "--out", folder / "ratios", *overrides)
        assert done.returncode == 0, done.stderr
        client = MlflowClient(server.uri)
        experiment = client.get_experiment_by_name("mae-scale").experiment_id
        runs = client.search_runs([experiment])
        ids = {run.info.run_name.partition(",")[0]: run.info.run_id for run in runs}
        assert set(ids) == {"digits_0", "digits_1", "ratios", *CHILDREN}
        yield Tracked(folder, server.uri, experiment, ids)
    finally:
        server.kill()


@pytest.fixture
def page(chromium):
    """A page of a new browser, which remembers nothing, with MLflow's assistant closed."""
    context = chromium.new_context(viewport={"width": 1600, "height": 1000})
    context.add_init_script(NO_ASSISTANT)
    page = context.new_page()
    page.set_default_timeout(WAIT_MS)
    yield page
    context.close()


def rows(page, name: str):
    """The row of a run in the table: of its left part, which stays in view, and of the other columns."""
    key = page.get_by_role("row").filter(has_text=name).first.get_attribute("row-id")
    return page.locator(f"[role=row][row-id='{key}']")


def show_columns(page, *metrics: str) -> None:
    """Choose metrics as columns of the runs' table."""
    page.get_by_role("button", name="Columns", exact=True).click()
    for metric in metrics:
        page.get_by_placeholder("Search columns").fill(metric)
        page.get_by_test_id("column-selector-tree").get_by_text(metric, exact=True).click()
    page.keyboard.press("Escape")


def shown(page, text: str, **how):
    """Wait until a text can be seen."""
    found = page.get_by_text(text, **how).first
    found.wait_for(state="visible")
    return found


def pictures(page) -> list[int]:
    """The natural widths of the pictures that can be seen and are loaded."""
    seen = "(one) => one.complete && one.naturalWidth > 100 && one.getBoundingClientRect().height > 100"
    page.wait_for_function(f"[...document.images].some({seen})")
    return page.evaluate(f"[...document.images].filter({seen}).map((one) => one.naturalWidth)")


def test_an_experiment_opens_in_the_wrong_view_until_model_training_is_chosen_once(page, tracked):
    page.goto(tracked.address(view=""))
    shown(page, "Training runs")
    shown(page, "Evaluation runs")  # a menu for prompts and agents
    page.get_by_role("button", name="Model training").click()
    shown(page, "Model registry")
    page.goto("about:blank")
    page.goto(tracked.address(view=""))
    shown(page, "digits_0")
    shown(page, "Model registry")
    assert not page.get_by_text("Evaluation runs").count()


def test_the_runs_table_has_names_states_and_metrics_and_a_sweeps_runs_below_their_parent(page, tracked):
    page.goto(tracked.address())
    shown(page, "digits_0, pretrain 32x2, seed 0")
    assert not page.get_by_text(CHILDREN[0]).count()
    rows(page, "ratios").get_by_role("button").first.click()
    for child in CHILDREN:
        shown(page, child)
    show_columns(page, "train/loss", "val/loss")
    shown(page, "train/loss", exact=True)
    for name in ("digits_0", "digits_1"):
        assert str(tracked.last_loss(name))[:8] in " ".join(rows(page, name).all_inner_texts())
    for name in tracked.ids:
        icon = rows(page, name).locator("[title] > [role=img]").first  # beside the time at which the run was begun
        red, green, blue = icon.evaluate("(one) => getComputedStyle(one).color.match(/\\d+/g).map(Number).slice(0, 3)")
        assert green > max(red, blue)


def test_a_runs_overview_says_what_it_is_how_to_go_on_and_on_which_images(page, tracked):
    page.goto(tracked.address(f"/{tracked.ids['digits_0']}"))
    shown(page, "pretrain of 32x2 (width 32, 2 blocks, patches of 8 px) at 32 px: 2 epochs of 1,442 images")
    shown(page, f"mae-scale pretrain demo --out {tracked.folder / 'digits_0'}")
    shown(page, "The same command goes on with this run")
    state = shown(page, "Finished", exact=True).bounding_box()
    assert state["x"] + state["width"] < page.viewport_size["width"]  # nothing pushes that column out of the window
    shown(page, "digits/train (")
    shown(page, "+1", exact=True).click()
    shown(page, "digits/val (")
    text = page.locator("main").inner_text()
    assert str(tracked.last_loss("digits_0"))[:8] in text
    for tag, value in (("mae_scale.task", "pretrain"), ("engine", "deepspeed ZeRO 2"), ("world_size", "1")):
        assert f"{tag}\n: {value}" in text


def test_the_charts_of_a_run_have_its_curves(page, tracked):
    page.goto(tracked.address(f"/{tracked.ids['digits_0']}"))
    page.get_by_role("tab", name="Model metrics").click()
    shown(page, "Add chart")
    lines = page.locator("main").inner_text().splitlines()
    groups = [name for name, count in itertools.pairwise(lines) if re.fullmatch(r"\(\d+\)", count)]
    assert groups == ["train", "val", "Model metrics"]  # the losses come first
    page.get_by_placeholder("Search metric charts").fill("train/loss")
    card = page.get_by_test_id("experiment-view-compare-runs-card").filter(has_text="(train/loss)")
    card.wait_for(state="visible")
    curve = card.locator("path.js-line").first
    curve.wait_for(state="attached")
    box = curve.bounding_box()
    assert box["width"] > 100
    assert box["height"] > 20
    assert curve.locator("xpath=ancestor::*[contains(@class, 'trace')]").locator("path.point").count() == STEPS


def test_two_runs_are_compared_by_what_differs(page, tracked):
    page.goto(tracked.address())
    for name in ("digits_0", "digits_1"):
        shown(page, name)
        rows(page, name).locator("input[type=checkbox]").first.check()
    page.get_by_role("button", name="Compare", exact=True).click()
    shown(page, "Comparing 2 Runs from 1 Experiment")
    shown(page, "digits_1, pretrain 32x2, seed 1")
    shown(page, "model.mask_ratio")
    page.get_by_text("Show diff only").first.click()
    page.get_by_text("model.mask_ratio").first.wait_for(state="hidden")
    assert page.get_by_role("table").nth(1).inner_text().split() == ["seed", "0", "1"]
    for name in ("digits_0", "digits_1"):
        shown(page, f"{tracked.last_loss(name):.3f}".rstrip("0"))


def test_a_sweeps_parent_shows_its_table_its_runs_and_its_figure(page, tracked):
    page.goto(tracked.address(f"/{tracked.ids['ratios']}"))
    shown(page, "Sweep of demo: 2 runs in")
    table = page.get_by_role("table").filter(has_text="mask_ratio").first
    table.wait_for(state="visible")
    results = json.loads((tracked.folder / "ratios" / "results.json").read_text())["points"]
    assert len(results) == 2
    for point in results:
        ratio, loss = point["values"]["mask_ratio"], point["metrics"]["val/loss"]["mean"]
        row = table.get_by_role("row").filter(has_text="1/1").filter(has_text=f"{loss:.4g}")
        assert ratio in row.inner_text()
    for child in CHILDREN:
        assert page.get_by_role("link", name=child).first.is_visible()
    shown(page, "Show more").click()
    with Image.open(tracked.folder / "ratios" / "results.png") as figure:
        assert pictures(page) == [figure.width]
    state = shown(page, "Finished", exact=True).bounding_box()
    assert state["x"] + state["width"] < page.viewport_size["width"]
    page.get_by_role("tab", name="Artifacts").click()
    shown(page, "results.png").click()
    assert pictures(page)
    files = page.locator("main").inner_text().split()
    assert files.index("results.png") < files.index("results_table.json")
