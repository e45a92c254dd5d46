"""The page of `mae-scale report` in a real Chromium: drawn at two widths, light and dark, zoomed, without a network."""

from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from mae_scale.reports.page import render
from mae_scale.tasks.run_report import page_of_folders
from tests.run_folders import DONE, START, put_run, rows_of

SWEEP = "sweep_" + 90 * "x"  # a word that is wider than a phone
WIDTHS = {"phone": (390, 844), "desktop": (1400, 900)}


@pytest.fixture(scope="module")
def page_file(tmp_path_factory) -> Path:
    """A page on four pre-trainings with reconstructions, a probe, a failure with a long reason, and a figure."""
    root = tmp_path_factory.mktemp("report")
    for number, ratio in enumerate((0.4, 0.5, 0.75, 0.9)):
        rows = rows_of(120, offset=number / 10)
        put_run(root / SWEEP / f"mask_ratio-{ratio}_seed-0", f"model.mask_ratio={ratio}", rows=rows)
    point = root / SWEEP / "mask_ratio-0.4_seed-0"
    put_run(point / "then", recipe="probe/demo", rows=[{**row, "val/top1": row["epoch"]} for row in rows_of(20)])
    picture = Image.new("RGB", (1206, 852), "white")
    ImageDraw.Draw(picture).rectangle((200, 100, 900, 700), fill="navy")
    (point / "figures").mkdir()
    picture.save(point / "figures" / "reconstructions.png")
    picture.crop((0, 0, 1140, 456)).save(root / SWEEP / "results.png")
    failure = {"step": 3, "event": "failure", "reason": "<b>rank 1</b> " + "lost " * 60 + "x" * 200, "time": 1300.0}
    put_run(root / SWEEP / "failed_run", rows=rows_of(40)[:9], events=[START, DONE, START, failure])
    written = root / "report.html"
    written.write_bytes(render(page_of_folders([root / SWEEP])))
    return written


class Opened:
    """A page, and what it has said and asked for."""

    def __init__(self, browser, file: Path, width: str, scheme: str = "light", **more):
        size = dict(zip(("width", "height"), WIDTHS[width], strict=True))
        self.context = browser.new_context(viewport=size, color_scheme=scheme, **more)
        self.page = self.context.new_page()
        self.said, self.requests = [], []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(file.as_uri())
        self.page.wait_for_selector("canvas")

    def ask(self, script: str):
        return self.page.evaluate(script)


@pytest.fixture
def opened(chromium, page_file):
    pages = []

    def open_page(width: str, **how) -> Opened:
        pages.append(Opened(chromium, how.pop("file", page_file), width, **how))
        return pages[-1]

    yield open_page
    for one in pages:
        one.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_renders_without_an_error_a_request_or_overflow(width, scheme, opened, page_file):
    shown = opened(width, scheme=scheme)
    assert shown.said == []
    assert [url for url in shown.requests if not url.startswith("data:")] == [page_file.as_uri()]
    assert shown.ask("document.documentElement.scrollWidth") == WIDTHS[width][0]


INKED = """() => [...document.querySelectorAll("canvas")].map((canvas) => {
  const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  const colours = new Set();
  for (let i = 0; i < pixels.length; i += 4)
    if (pixels[i + 3] > 200) colours.add(pixels[i] << 16 | pixels[i + 1] << 8 | pixels[i + 2]);
  const box = canvas.getBoundingClientRect();
  return { colours: colours.size, width: box.width, height: box.height, right: box.right };
})"""


@pytest.mark.parametrize("width", WIDTHS)
def test_every_chart_and_picture_is_drawn_and_within_the_page(width, opened):
    shown = opened(width)
    charts = shown.ask(INKED)
    assert len(charts) == 7 + 8  # those of pre-training, and of the probe
    for chart in charts:
        assert chart["colours"] > 3
        assert chart["height"] == 230
        assert 250 < chart["width"] < WIDTHS[width][0]
        assert chart["right"] <= WIDTHS[width][0]
    facts = "[one.complete, one.naturalWidth, one.getBoundingClientRect().width, one.alt]"
    pictures = shown.ask(f"[...document.images].map((one) => {facts})")
    assert len(pictures) == 2
    for complete, natural, drawn, alt in pictures:
        assert complete
        assert natural == 900
        assert 250 < drawn < WIDTHS[width][0]
        assert alt


def test_dark_mode_has_light_text_on_a_dark_page(opened):
    def lightness(shown, name):
        red, green, blue = shown.ask(f"getComputedStyle(document.body).{name}.match(/\\d+/g).slice(0, 3).map(Number)")
        return (red + green + blue) / 3

    light, dark = opened("phone", scheme="light"), opened("phone", scheme="dark")
    assert lightness(dark, "backgroundColor") < 60 < 180 < lightness(dark, "color")
    assert lightness(light, "backgroundColor") > 230
    dark.page.emulate_media(color_scheme="light")
    assert lightness(dark, "backgroundColor") > 230
    assert dark.said == []


def ranges(shown) -> list[list[float]]:
    """The epochs from and to which each chart of pre-training shows."""
    return shown.ask(
        "[...document.querySelectorAll('#groups > section:first-child .chart')]"
        ".map((one) => one.dataset.range.split(' ').map(Number))"
    )


def test_dragging_zooms_all_charts_of_a_kind_and_a_double_click_goes_back(opened):
    shown = opened("desktop")
    before = ranges(shown)
    chart = shown.page.locator(".u-over").first
    chart.scroll_into_view_if_needed()
    box = chart.bounding_box()
    y = box["y"] + box["height"] / 2
    shown.page.mouse.move(box["x"] + 0.25 * box["width"], y)
    shown.page.mouse.down()
    shown.page.mouse.move(box["x"] + 0.5 * box["width"], y, steps=5)
    shown.page.mouse.up()
    shown.page.wait_for_timeout(100)
    for low, high in ranges(shown):
        assert low == pytest.approx(5, abs=0.5)
        assert high == pytest.approx(10, abs=0.5)
    assert "at epoch" in shown.page.locator(".readout").first.inner_text()
    chart.dblclick()
    shown.page.wait_for_timeout(100)
    assert ranges(shown) == before
    assert shown.said == []


def test_a_finger_that_moves_sideways_zooms(opened):
    shown = opened("phone", has_touch=True, is_mobile=True)
    shown.page.locator(".u-over").first.scroll_into_view_if_needed()
    box = shown.page.locator(".u-over").first.bounding_box()
    touch = shown.context.new_cdp_session(shown.page)
    y = box["y"] + box["height"] / 2
    for kind, share in (
        ("touchStart", 0.5),
        *(("touchMove", 0.5 + part / 20) for part in range(1, 9)),
        ("touchEnd", None),
    ):
        points = [] if share is None else [{"x": box["x"] + share * box["width"], "y": y}]
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    shown.page.wait_for_timeout(100)
    for low, high in ranges(shown):
        assert low == pytest.approx(10, abs=1)
        assert high == pytest.approx(18, abs=1)
    shown.page.get_by_role("button", name="Reset zoom").first.click()
    assert ranges(shown)[0][1] == pytest.approx(20, abs=0.5)


def test_a_run_is_hidden_by_its_name_and_the_table_sorted_by_a_column(opened):
    shown = opened("desktop")
    chip = shown.page.get_by_role("button", name="mask_ratio-0.9_seed-0", exact=True)
    assert chip.get_attribute("aria-pressed") == "true"
    label = shown.page.locator(".plot").first
    assert label.get_attribute("aria-label") == "training loss by epoch of 5 runs"
    chip.click()
    assert chip.get_attribute("aria-pressed") == "false"
    assert label.get_attribute("aria-label") == "training loss by epoch of 4 runs"
    names = "[...document.querySelectorAll('#runs tbody th')].map((one) => one.textContent)"
    shown.page.get_by_role("button", name="train loss").click()
    first = shown.ask(names)
    shown.page.get_by_role("button", name="train loss").click()
    assert shown.ask(names) == first[::-1]
    assert first[0].startswith("mask_ratio-0.4_seed-0")
    assert shown.ask("document.querySelector('#runs th[aria-sort]').getAttribute('aria-sort')") == "descending"


def test_the_page_can_be_used_without_seeing_it(opened):
    shown = opened("phone")
    assert shown.ask("document.documentElement.lang") == "en"
    assert shown.page.title() == SWEEP
    assert shown.ask("document.querySelectorAll('h1').length") == 1
    without = (
        "[...document.querySelectorAll('img:not([alt]), th:not([scope]), button:empty, [role=img]:not([aria-label])')]"
    )
    assert shown.ask(f"{without}.map((one) => one.outerHTML.slice(0, 100))") == []


def test_three_hundred_runs_can_be_filtered_and_drawn(opened, tmp_path):
    for number in range(300):
        put_run(tmp_path / "many" / f"seed-{number:03d}", rows=rows_of(20, epochs=20 - number / 100))
    file = tmp_path / "many.html"
    file.write_bytes(render(page_of_folders([tmp_path / "many"])))
    shown = opened("desktop", file=file)
    status = shown.page.get_by_role("status")
    assert status.inner_text() == "20 of 300 runs drawn"
    shown.page.get_by_role("button", name="Show all").click()
    assert status.inner_text() == "100 of 300 runs drawn; at most 100 are drawn at once"
    shown.page.get_by_role("button", name="Show none").click()
    assert shown.page.locator("canvas").count() == 0
    shown.page.get_by_role("searchbox").fill("seed-29")
    shown.page.get_by_role("button", name="Show all").click()
    assert status.inner_text() == "10 of 300 runs drawn"
    assert shown.page.locator(".chip:visible").count() == 10
    assert shown.said == []
