"""The HTML page in a real browser: opened from disk, by mouse and keyboard, in dark mode, and printed."""

import csv
import io
import shutil

import pytest
from sample_report import make_report, make_thumbnails

from eval.report.write_report import write_report

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright, of the dev extra")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe, of the dev extra")
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium or Chrome on the PATH")


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    write_report(make_report(), folder, make_thumbnails())
    return (folder / "report.html").as_uri()


@pytest.fixture
def open_page(browser, address):
    """Opens the report with the options of a browser context; there must be no console message and no request."""
    contexts, said, asked = [], [], []

    def open_it(**options):
        usual = {"viewport": {"width": 1280, "height": 900}, "reduced_motion": "reduce"}
        context = browser.new_context(**{**usual, **options})
        contexts.append(context)
        context.set_default_timeout(5000)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.on("requestfailed", lambda request: said.append(request.url))
        page.goto(address)
        return page

    yield open_it
    for context in contexts:
        context.close()
    assert not said
    assert {url for url in asked if not url.startswith("data:")} <= {address}


@pytest.fixture
def page(open_page):
    return open_page()


def _column(page, name):
    cells = f'#rows tbody tr:not([hidden]) [data-column="{name}"]'
    return page.eval_on_selector_all(cells, "all => all.map(cell => cell.textContent)")


def _values(page, name):
    return [float(text) for text in _column(page, name) if text != "-"]


def _points(page):
    """Returns, by name, the position of the mark."""
    return page.eval_on_selector_all(
        ".point",
        "all => Object.fromEntries(all.map(e => [e.dataset.name.split(',')[0], "
        "[Number(e.querySelector('.halo').getAttribute('cx')), Number(e.querySelector('.halo').getAttribute('cy'))]]))",
    )


def test_strings_of_others_do_nothing(page):
    assert page.evaluate("window.hacked") is None
    assert "</script><script>window.hacked = 1" in page.inner_text("#made ~ pre")
    assert page.evaluate("document.scripts.length") == 2


def test_a_click_sorts_a_column_and_what_was_not_measured_stays_last(page):
    heading = page.locator("#rows th", has_text="p50 ms")
    heading.get_by_role("button").click()
    assert heading.get_attribute("aria-sort") == "ascending"
    assert _column(page, "p50 ms") == ["1.00", "2.00", "4.00", "10.00", "-"]
    heading.get_by_role("button").press("Enter")
    assert heading.get_attribute("aria-sort") == "descending"
    assert _column(page, "p50 ms") == ["10.00", "4.00", "2.00", "1.00", "-"]
    page.locator("#rows th", has_text="scheme").get_by_role("button").click()
    assert heading.get_attribute("aria-sort") is None and page.locator("[aria-sort]").count() == 1
    assert _column(page, "scheme") == ["fp8", "fp8|odd", "fp32", "int8", "w4"]  # as a person counts


def test_the_filter_and_the_pareto_front(page):
    page.get_by_label("Filter", exact=True).fill("FP8")
    assert _column(page, "scheme") == ["fp8|odd", "fp8"]
    assert "2 of 5" in page.inner_text("#said")
    page.get_by_label("Filter", exact=True).fill("")
    page.locator("#pareto-only").check()
    assert _column(page, "scheme") == ["fp32", "int8"]


@pytest.mark.parametrize("clipboard", [True, False])
def test_the_table_is_copied_as_it_is_shown(page, clipboard):
    if not clipboard:  # as in a browser without a clipboard for files
        page.evaluate("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    page.locator("#rows th", has_text="file MB").get_by_role("button").click()
    page.get_by_label("Filter", exact=True).fill("cpu")
    texts = "all => all.map(row => [...row.cells].map(cell => cell.textContent.trim()))"
    shown = page.eval_on_selector_all("#rows tr:not([hidden])", texts)
    page.evaluate("document.body.append(document.createElement('textarea'))")
    pasted = page.locator("textarea")
    for name in ("CSV", "Markdown"):
        page.get_by_role("button", name=f"Copy as {name}").click()
        sync_api.expect(page.locator("#said")).to_have_text(f"copied 4 files as {name}")
        pasted.fill("")
        pasted.press("Control+v")
        text = pasted.input_value()
        if name == "CSV":
            read = list(csv.reader(io.StringIO(text)))
            assert [[cell.removeprefix("'") for cell in row] for row in read] == shown
            # No spreadsheet may evaluate a cell as a formula.
            assert not any(cell[1:] and cell[0] in "=+-@" and "(" in cell for row in read for cell in row)
        else:
            lines = [line.replace("\\|", "&").strip("| ").split(" | ") for line in text.splitlines()]
            assert lines.pop(1) == ["---"] * len(shown[0])
            assert lines == [[cell.replace("|", "&") for cell in row] for row in shown]


def test_the_plot_is_to_scale_on_either_axis(page):
    def ratio(points, axis):
        low, middle, high = (points[name][axis] for name in ("int8", "fp32", "w4"))
        return (middle - low) / (high - low)

    assert ratio(_points(page), 0) == pytest.approx((4 - 1) / (10 - 1), abs=0.002)
    assert ratio(_points(page), 1) == pytest.approx((93.0 - 92.9) / (92.0 - 92.9), abs=0.002)
    page.get_by_label("Log latency").check()
    assert ratio(_points(page), 0) == pytest.approx(0.60206, abs=0.002)  # log10 of 4 to 1 and 10 to 1
    page.get_by_label("Log error").check()
    assert ratio(_points(page), 1) == pytest.approx(-0.11999, abs=0.002)  # errors of 7.1, 7.0, 8.0
    assert page.locator(".plot .optimal").count() == 2 and page.locator(".plot line.untimed").count() == 1
    assert page.locator(".plot .ruled-out").count() == 2


def test_another_batch_size_changes_plot_and_table(page):
    page.locator("#rows th", has_text="p50 ms").get_by_role("button").click()
    page.get_by_role("combobox", name="Batch size").select_option("8")
    assert _values(page, "p50 ms") == [8, 16, 32, 80]
    assert "batch 8" in page.locator(".point").first.get_attribute("aria-label")
    assert page.inner_text("span.batch") == "8"


def test_a_mark_tells_its_figures_to_mouse_and_keyboard(page):
    point = page.locator('.point[data-name^="int8"]')
    point.locator(".mark").hover()
    assert "1.00 ms at batch 1" in page.inner_text(".tip") and "92.90% top-1" in page.inner_text(".tip")
    page.mouse.move(0, 0)
    assert page.locator(".tip").is_hidden()
    point.focus()
    assert "Pareto-optimal" in page.inner_text(".tip")
    assert point.get_attribute("aria-label").startswith("int8, ONNX Runtime, CPU, 1.00 ms")


def test_a_part_of_the_plot_can_be_looked_at_closer(page):
    before = _points(page)
    box = page.locator(".plot svg").bounding_box()
    x, y = before["int8"]
    page.mouse.move(box["x"] + x - 25, box["y"] + y - 25)
    page.mouse.down()
    page.mouse.move(box["x"] + x + 25, box["y"] + y + 25)
    page.mouse.up()
    assert _points(page).keys() == {"int8"}
    page.get_by_role("button", name="Reset").click()
    assert _points(page) == before
    page.get_by_role("button", name="Zoom in").click()
    assert _points(page) != before
    page.get_by_role("button", name="Zoom out").click()
    assert _points(page)["int8"] == pytest.approx(before["int8"], abs=0.01)


def test_a_hidden_class_is_found(page):
    rows = page.locator("#by-class tbody tr:visible")
    assert rows.count() == 40 and "-15.0* significant" in rows.first.text_content().replace("\n", "")
    hidden = page.locator("#by-class tbody tr.more th").first.text_content()
    page.get_by_label("Filter classes").fill(hidden)
    assert hidden in rows.locator("th").all_text_contents() and rows.count() < 40
    page.get_by_label("Filter classes").fill("")
    assert rows.count() == 40


def _brightness(page):
    return page.evaluate("getComputedStyle(document.body).backgroundColor.match(/[\\d.]+/g).slice(0, 3).map(Number)")


def test_dark_as_the_system_has_it_or_as_the_reader_likes(open_page):
    page = open_page(color_scheme="dark")
    assert max(_brightness(page)) < 60
    assert page.evaluate("getComputedStyle(document.documentElement).scrollBehavior") == "auto"
    page.get_by_role("button", name="Light").click()
    assert min(_brightness(page)) > 240
    page.get_by_role("button", name="Dark").click()
    assert max(_brightness(page)) < 60


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_to_object_to_and_a_phone_scrolls_only_down(open_page, scheme):
    page = open_page(color_scheme=scheme, viewport={"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    page.eval_on_selector_all("details", "all => all.forEach(fold => fold.open = true)")
    found = axe.Axe().run(page).response["violations"]
    assert [(each["id"], [node["html"] for node in each["nodes"][:3]]) for each in found] == []
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    # Every cell is in sight, with the heading of its column.
    assert page.evaluate("[...document.querySelectorAll('.scroll')].every(e => e.scrollWidth <= e.clientWidth)")
    headings = page.eval_on_selector_all("#rows tbody tr:first-child td", "all => all.map(e => e.dataset.column)")
    assert "p90 ms" in headings and "Pareto" in headings


def test_on_paper_all_is_light_open_and_without_buttons(open_page):
    page = open_page(color_scheme="dark")
    closed = "document.querySelectorAll('details:not([open])').length"
    page.evaluate(f"addEventListener('beforeprint', () => window.closed_on_paper = {closed})")
    assert page.locator("details:not([open])").count() > 0
    assert page.pdf(prefer_css_page_size=True).startswith(b"%PDF")
    assert page.evaluate("window.closed_on_paper") == 0 and page.locator("details:not([open])").count() > 0
    page.emulate_media(media="print")
    assert min(_brightness(page)) > 240
    assert not any(page.locator(name).first.is_visible() for name in ("nav", ".tools", "#theme"))


def test_without_a_script_the_tables_and_a_picture_are_there(open_page):
    page = open_page(java_script_enabled=False)
    assert page.locator(".plot img").is_visible() and not page.locator(".tools").first.is_visible()
    assert page.locator("#rows tbody tr").count() == 5
