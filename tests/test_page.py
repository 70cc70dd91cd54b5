"""The report's page: one file, safe and complete, and what it does in a real browser."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from report_documents import (
    METHODS,
    Document,
    calibrate_document,
    check_document,
    compare_document,
)

from calib.errors import OptionError
from calib.report import page as page_module
from calib.report.page import render_page

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

ROOT = Path(__file__).resolve().parents[1]
ARTIFACTS = Path(os.environ.get("OCTAV_ARTIFACTS") or ROOT / "build")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--no-first-run",
    "--disable-component-update",
    "--disable-sync",
)
DOCUMENTS = {
    "compare": compare_document(),
    "calibrate": calibrate_document(),
    "check": check_document(),
    "passed": check_document(passed=True),
}
EN_DASH = "\u2013"
EVIL = "</script><img src=x onerror=\"fetch('http://evil.test')\"><b>\u2028%{y}&lt;{{style}}"


def embedded(text: str) -> Any:
    """The document in a page, as a browser reads it."""
    (found,) = re.findall(r'<script type="application/json" id="document">(.*?)</script>', text)
    return json.loads(found)


class Tags(HTMLParser):
    """Counts the elements that a parser finds."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        del attrs
        self.found.append(tag)

    def count(self, tag: str) -> int:
        return self.found.count(tag)


# --- the file ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_a_page_carries_its_whole_document(kind: str) -> None:
    document = DOCUMENTS[kind]
    found = embedded(render_page(document))
    assert found.keys() == document.keys()
    for part in ("title", "model", "options", "samples", "methods", "bits", "skipped"):
        assert found[part] == document[part]
    for row, expected in zip(found["rows"], document["rows"], strict=True):
        assert row == {
            name: pytest.approx(value, rel=1e-6) if isinstance(value, float) else value
            for name, value in expected.items()
        }


def test_curves_are_rounded_to_what_can_be_seen() -> None:
    document = DOCUMENTS["compare"]
    found = embedded(render_page(document))["tensors"][0]["curves"][0]
    expected = document["tensors"][0]["curves"][0]
    assert found["measured"] == pytest.approx(expected["measured"], rel=6e-3)
    assert found["minima"][0]["mse"] == pytest.approx(expected["minima"][0]["mse"], rel=1e-6)


def test_a_page_of_a_model_of_60_layers_stays_below_6_mb() -> None:
    document = compare_document(60)
    assert len(document["tensors"]) == 120
    assert {len(tensor["results"]) for tensor in document["tensors"]} == {15}
    assert len(render_page(document).encode()) < 6e6


def test_no_name_can_end_the_script_that_holds_it_or_the_title() -> None:
    document = compare_document(1) | {"title": EVIL}
    text = render_page(document)
    tags = Tags()
    tags.feed(text)
    assert tags.count("img") == 0
    assert tags.count("script") == 3
    assert tags.count("h1") == 1
    assert "\u2028" not in text.partition('id="document"')[2].partition("</script>")[0]
    assert embedded(text)["title"] == EVIL


def test_a_title_that_is_no_unicode_text_can_be_written_too() -> None:
    text = render_page(compare_document(1) | {"title": "model\udcff.onnx"})
    assert text.encode("utf-8")


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_numbers_that_json_does_not_have_are_missing(value: float) -> None:
    document = calibrate_document()
    document["rows"] = [document["rows"][0] | {"sqnr_db": value}]
    assert embedded(render_page(document))["rows"][0]["sqnr_db"] is None


def test_without_plotly_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_module, "find_spec", lambda _: None)
    with pytest.raises(OptionError) as error:
        render_page(DOCUMENTS["check"])
    assert str(error.value) == "report: needs plotly: pip install 'octav-calibrate[report]'"


# --- in a browser -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Debian's chromium; a test that needs it is skipped without, but never in CI."""
    if CHROMIUM is None or find_spec("playwright") is None:
        reason = "needs playwright (extra dev) and chromium (apt-get install chromium)"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield browser
        browser.close()


class Viewer:
    """Opens documents in the browser, and remembers what must not have happened there."""

    def __init__(self, browser: Browser, folder: Path) -> None:
        self.browser = browser
        self.folder = folder
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.opened: list[str] = []

    def show(self, document: Document, *, phone: bool = False, **context: Any) -> Page:
        """The page of ``document``, on a desktop or a phone, which is dark."""
        path = self.folder / "report.html"
        path.write_text(render_page(document), "utf-8")
        look: dict[str, Any] = {"viewport": {"width": 1280, "height": 900}, "color_scheme": "light"}
        if phone:
            look = {"viewport": {"width": 390, "height": 844}, "color_scheme": "dark"}
            look |= {"has_touch": True, "is_mobile": True, "device_scale_factor": 2}
        page = self.browser.new_context(**look, **context).new_page()
        page.set_default_timeout(20_000)
        page.on("console", lambda message: self.complaints.append(message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))
        self.opened.append(path.as_uri())
        page.goto(path.as_uri())
        return page


@pytest.fixture
def viewer(browser: Browser, tmp_path: Path) -> Iterator[Viewer]:
    """A viewer; nothing was said on the console and nothing but the file was asked for."""
    viewer = Viewer(browser, tmp_path)
    yield viewer
    for context in browser.contexts:
        context.close()
    assert viewer.complaints == []
    assert viewer.requests == viewer.opened


def draw_all(page: Page) -> None:
    """Scrolls past every chart until it is drawn."""
    for plot in page.locator(".plot").all():
        plot.scroll_into_view_if_needed()
        plot.locator(".main-svg").first.wait_for()
    page.evaluate("scrollTo({top: 0, behavior: 'instant'})")


def wait_until(page: Page, holds: Callable[[], bool]) -> None:
    """Waits for what the page's own policy lets no polling script wait for."""
    for _ in range(200):
        if holds():
            return
        page.wait_for_timeout(50)
    pytest.fail("it did not happen within 10 seconds")


def open_tensor(page: Page, place: int) -> None:
    page.locator("#tensors .name button").nth(place).click()


@pytest.mark.parametrize("phone", [False, True], ids=["desktop", "phone"])
@pytest.mark.parametrize("kind", DOCUMENTS)
def test_a_page_fits_its_screen_says_nothing_and_is_kept(
    viewer: Viewer, kind: str, phone: bool
) -> None:
    page = viewer.show(DOCUMENTS[kind], phone=phone)
    if DOCUMENTS[kind]["tensors"]:
        open_tensor(page, 0)
        open_tensor(page, 3)
    draw_all(page)
    assert page.evaluate("document.documentElement.scrollWidth") == (390 if phone else 1280)
    ARTIFACTS.mkdir(parents=True, exist_ok=True)
    look = "phone-dark" if phone else "desktop-light"
    page.screenshot(path=ARTIFACTS / f"report-{kind}-{look}.png", full_page=True)


def test_only_sections_with_content_are_shown(viewer: Viewer) -> None:
    def shown(document: Document) -> list[str]:
        page = viewer.show(document)
        sections = page.locator("main > section:visible").all()
        return [section.get_attribute("id") or "" for section in sections]

    assert shown(DOCUMENTS["check"]) == ["check", "details"]
    assert "sensitivity" in shown(DOCUMENTS["compare"])
    bare = calibrate_document() | {name: [] for name in ("warnings", "notes", "skipped", "tensors")}
    assert shown(bare) == ["results", "details"]


def test_a_check_says_passed_or_failed_first(viewer: Viewer) -> None:
    page = viewer.show(DOCUMENTS["check"])
    assert page.locator("header .verdict").inner_text() == "FAILED"
    assert "at least 20 dB" in page.locator("header").inner_text()
    assert "✗ fails" in page.locator("#check").inner_text()
    page = viewer.show(DOCUMENTS["passed"])
    assert page.locator("header .verdict").inner_text() == "PASSED"


def test_the_best_of_each_width_is_marked(viewer: Viewer) -> None:
    page = viewer.show(DOCUMENTS["compare"])
    for line in page.locator("#results tbody tr:has(.best)").all():
        assert "octav" in line.inner_text()
    assert page.locator("#results tbody tr:has(.best)").count() == len(DOCUMENTS["compare"]["bits"])


def test_a_heading_sorts_by_its_column_and_back_and_missing_values_stay_last(
    viewer: Viewer,
) -> None:
    document = compare_document()
    for result in document["tensors"][2]["results"]:
        result["sqnr_db"] = None
    page = viewer.show(document)
    column = 4 + METHODS.index("max")
    heading = page.locator(f"#tensors th:nth-child({column})")
    cells = page.locator(f"#tensors tbody td:nth-child({column})")
    for state in ("descending", "ascending"):
        heading.locator("button").click()
        assert heading.get_attribute("aria-sort") == state
        *values, last = cells.all_inner_texts()
        assert last == EN_DASH
        expected = sorted(map(float, values), reverse=state == "descending")
        assert list(map(float, values)) == expected
        assert len(set(values)) > 3


def test_a_tensor_opens_by_click_and_by_key_and_shows_two_charts(viewer: Viewer) -> None:
    page = viewer.show(DOCUMENTS["compare"])
    button = page.locator("#tensors .name button").nth(3)
    button.click()
    assert button.get_attribute("aria-expanded") == "true"
    plots = page.locator("#tensors .detail .plot")
    assert plots.count() == 2
    draw_all(page)
    for plot in plots.all():
        for method in METHODS:
            assert plot.locator(".annotation", has_text=method).count() == 1
    assert plots.nth(1).locator(".scatterlayer .trace").count() == 4
    button.press("Enter")
    assert button.get_attribute("aria-expanded") == "false"
    assert page.locator("#tensors .detail").count() == 0
    page.locator("#tensors tbody tr").first.locator("td").nth(1).click()
    assert page.locator("#tensors .detail").count() == 1


def test_another_width_and_a_part_of_a_name_choose_what_the_table_shows(viewer: Viewer) -> None:
    document = DOCUMENTS["compare"]
    page = viewer.show(document)
    open_tensor(page, 1)
    page.get_by_role("radio", name="8 bits").check()
    first = page.locator("#tensors tbody tr").first
    expected = next(r for r in document["tensors"][0]["results"] if r["bits"] == 8)["sqnr_db"]
    assert first.locator("td").nth(3).inner_text() == f"{expected:.2f}"
    assert page.locator("#tensors .detail").count() == 1
    page.get_by_placeholder("part of a name").fill("RELU3")
    assert page.locator("#tensors tr.opens").count() == 1


def test_the_copy_button_copies_the_yaml(viewer: Viewer) -> None:
    document = DOCUMENTS["compare"]
    page = viewer.show(document, permissions=["clipboard-read", "clipboard-write"])
    button = page.locator("#proposals button").first
    button.click()
    page.locator("#proposals button", has_text="Copied").wait_for()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied == document["sensitivity"]["proposals"][0]["yaml"]


def test_charts_follow_a_change_of_the_colour_scheme_and_are_light_on_paper(viewer: Viewer) -> None:
    def ink() -> str:
        return str(
            page.evaluate("document.querySelector('.js-plotly-plot')._fullLayout.font.color")
        )

    page = viewer.show(DOCUMENTS["compare"])
    draw_all(page)
    light = ink()
    page.emulate_media(color_scheme="dark")
    wait_until(page, lambda: ink() != light)
    page.emulate_media(color_scheme="dark", media="print")
    wait_until(page, lambda: ink() == light)


def test_names_are_shown_as_they_are_and_run_nothing(viewer: Viewer) -> None:
    text = json.dumps(compare_document(3))
    for name in ("layer1.0.conv0.weight", "/layer1.0/relu3/Relu_output_0", "entropy"):
        text = text.replace(name, f"{name}{json.dumps(EVIL)[1:-1]}")
    document = json.loads(text)
    page = viewer.show(document)
    open_tensor(page, 3)
    draw_all(page)
    assert page.locator("img").count() == 0
    assert page.locator("#tensors .name button").first.text_content() == (
        f"layer1.0.conv0.weight{EVIL}"
    )
    label = page.locator("#tensors .annotation", has_text="entropy").first
    shown = label.text_content() or ""
    assert all(part in shown for part in ("<img src=x", "<b>", "%{y}&lt;{{style}}"))


def test_a_document_with_nothing_measured_is_shown_with_dashes(viewer: Viewer) -> None:
    def emptied(value: Any) -> Any:
        if isinstance(value, float):
            return None
        if isinstance(value, dict):
            return {name: emptied(item) for name, item in value.items()}
        return [emptied(item) for item in value] if isinstance(value, list) else value

    for document in DOCUMENTS.values():
        page = viewer.show(emptied(document))
        if document["tensors"]:
            open_tensor(page, 0)
        draw_all(page)
        assert "NaN" not in page.locator("main").inner_text()
        assert "null" not in page.locator("main").inner_text()


def test_a_page_of_120_tensors_opens_fast_and_draws_only_what_is_seen(viewer: Viewer) -> None:
    page = viewer.show(compare_document(60))
    assert page.locator("#tensors tr.opens").count() == 120
    assert page.locator(".js-plotly-plot").count() <= 2
    milliseconds = page.evaluate("performance.getEntriesByType('navigation')[0].duration")
    assert milliseconds < 15_000  # 1 s here; CI may be slow


def test_a_calibrated_model_shows_each_tensor_at_its_own_width(viewer: Viewer) -> None:
    page = viewer.show(DOCUMENTS["calibrate"])
    assert page.get_by_role("radio").count() == 0
    assert page.locator("#tensors tbody td:nth-child(4)").all_inner_texts() == ["8"] * 2 + ["4"] * 6
    assert EN_DASH not in page.locator("#tensors table").inner_text()
