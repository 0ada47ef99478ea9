"""The report of ledgers: what it says, what it leaves out, and how it behaves in a browser."""

from __future__ import annotations

import json
import re

import pytest

from tests.evidence.rows import FULL_BYTES, compared, comparison, failed, others, written
from vestige.cli import main
from vestige.errors import SpecError
from vestige.evidence.ledgers import read_ledgers
from vestige.evidence.points import difference, pareto, points_of
from vestige.evidence.report.ledger_page import ledger_page, markdown, report
from vestige.evidence.report.quality_figures import bytes_cost, quality_figure


@pytest.fixture(scope="module")
def ledger(tmp_path_factory):
    return written(tmp_path_factory.mktemp("ledger") / "ledger.jsonl", comparison() + others())


@pytest.fixture(scope="module")
def page(ledger):
    path = ledger.parent / "report.html"
    report(ledger, path, ledger.parent / "summary.md")
    return path


def test_points_are_means_over_examples_and_seeds():
    rows = [compared("h2o", 0.25, seed, [1.0, 0.0, float(seed)]) for seed in (0, 1)]
    (point,) = points_of([*rows, compared("h2o", 0.5, 0, [1.0]), failed("h2o", 0), *others()[4:]]).all[:1]
    assert point.value == 0.5 and point.seeds == 2 and len(point.values) == 6
    assert point.budget == "25%" and point.kv_bytes == round(0.97 * 0.25 * FULL_BYTES)
    assert point.interval.low == pytest.approx(0.1876, abs=1e-4)  # Wilson, three of six
    assert len(points_of([*rows, compared("h2o", 0.5, 0, [1.0])]).all) == 2


def test_a_difference_is_between_the_same_examples_and_turned_to_what_is_better():
    first, second = (
        [compared(name, 0.25, 0, values, metric="perplexity")]
        for name, values in (("a", [10.0, 20.0, 30.0]), ("b", [11.0, 21.0, 31.5]))
    )
    one, other = points_of(first + second).all
    gap = difference(one, other)
    assert gap.value == pytest.approx(3.5 / 3) and gap.low > 0 and difference(other, one).high < 0


def test_the_front_holds_what_nothing_beats():
    rows = [
        compared("cheap", 0.1, 0, [0.0, 1.0]),
        compared("worse", 0.25, 0, [0.0, 0.0]),
        compared("good", 0.5, 0, [1.0, 1.0]),
        compared("full", None, 0, [1.0, 1.0]),
    ]
    points = points_of(rows).all
    assert [point.method for point in pareto(points, bytes_cost.of)] == ["cheap", "good"]
    figure = quality_figure(
        points, bytes_cost, {p: p.method for p in points}, {"full": 0, "cheap": 1, "worse": 2, "good": 3}
    )
    front = next(trace for trace in figure.data if trace.name == "Pareto front")
    assert list(front.y) == [0.5, 1.0] and list(front.x) == pytest.approx([1.94e6, 9.7e6])
    good = next(trace for trace in figure.data if trace.name == "good")
    assert good.customdata[0]["point"] == "good" and good.error_y.arrayminus[0] > 0.5


def test_the_page_shows_each_kind_of_row_and_the_command_of_each(page, ledger):
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=", text)
    for title in ("Quality against bytes", "Quality against seconds", "Forgetting", "Erasure", "Heads", "What failed"):
        assert f">{title}</h2>" in text
    rows = [json.loads(line) for line in ledger.read_text().splitlines()]
    assert text.count("<tbody id=") == len(rows)
    assert all(row["command"] in text for row in rows if "command" in row)
    assert "not resolved from" in text and "clearly ahead of" in text


def test_a_ledger_without_comparisons_has_a_page_too(tmp_path):
    path = written(tmp_path / "ledger.jsonl", [{"study": "x", "metrics": {"loss": 1.5}, "seed": 0}])
    titles = [section.title for section in ledger_page(read_ledgers([path])).sections]
    assert titles == ["In short", "Every row"]


def test_the_failure_of_a_cell_that_was_measured_later_is_no_longer_told():
    rows = [{**row, "ledger": "x"} for row in [failed("h2o", 0), failed("h2o", 1), compared("h2o", 0.1, 0, [1.0])]]
    from vestige.evidence.report.ledger_page import _unsettled

    assert [row["seed"] for row in _unsettled(rows)] == [1]


def test_the_summary_is_markdown_with_the_numbers(page, ledger):
    text = (ledger.parent / "summary.md").read_text()
    assert text == markdown(read_ledgers([ledger]))
    assert "### needle (length=384) on smollm2 (accuracy)" in text and "must hold 64" in text
    table = [line for line in text.splitlines() if line.startswith("| streaming-llm | 25% |")]
    assert len(table) == 2 and all(line.count("|") == 9 for line in table)


def test_broken_lines_are_skipped_counted_and_told(tmp_path, capsys):
    path = written(tmp_path / "ledger.jsonl", [compared("h2o", 0.25, 0, [1.0])])
    path.write_text('{"half": \n' + path.read_text() + "no json\n")
    out = tmp_path / "page.html"
    assert main(["report", str(tmp_path), "--out", str(out)]) == 0
    assert "2 broken lines in" in capsys.readouterr().err and "2 broken lines in" in out.read_text()
    again = written(tmp_path / "other.jsonl", [compared("h2o", 0.25, 0, [1.0])])
    read = read_ledgers([path, again])
    assert read.repeated == 1 and len(read.rows) == 1 and "count once" in read.notes[1]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"schema": 99}\n', "newer Vestige .schema 99."),
        ('{"schema": "one"}\n', "there is no row .* 1 line cannot be read"),
        ("", "there is no row"),
        ("broken\n", "1 line cannot be read"),
        (None, "no ledger"),
    ],
)
def test_a_ledger_that_cannot_be_used_is_refused_and_nothing_is_overwritten(text, says, tmp_path, capsys):
    path, out = tmp_path / "ledger.jsonl", tmp_path / "page.html"
    out.write_text("before")
    if text is not None:
        path.write_text(text)
    with pytest.raises(SpecError, match=says):
        read_ledgers([path])
    assert main(["report", str(path), "--out", str(out)]) == 2
    assert re.search(says, capsys.readouterr().err) and out.read_text() == "before"


# In a browser


@pytest.mark.browser
@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (390, "dark")])
def test_the_page_fits_and_every_figure_is_drawn(page, chromium, width, scheme):
    from tests.evidence.test_report import opened

    opened(chromium, page, width, scheme)
    expected = len(re.findall(r'class="plot"', page.read_text(encoding="utf-8")))
    assert chromium.execute_script("return document.documentElement.dataset.drawn") == str(expected)
    marks = chromium.execute_script(
        """return [...document.querySelectorAll(".plot")].map((plot) =>
             plot.querySelectorAll(".hm image, .scatterlayer .trace path").length)"""
    )
    assert len(marks) == expected >= 7 and all(marks)
    assert chromium.execute_script("return document.documentElement.scrollWidth") <= width
    assert [entry for entry in chromium.get_log("browser") if entry["level"] == "SEVERE"] == []


@pytest.mark.browser
def test_rows_sort_filter_and_open(page, chromium):
    from selenium.webdriver.common.by import By

    from tests.evidence.test_report import opened

    opened(chromium, page, 1200, "light")
    values = "return [...document.querySelectorAll('#records tbody')].map((b) => b.rows[0].cells[6].dataset.by)"
    title = chromium.find_elements(By.CSS_SELECTOR, "#records thead button")[6]
    seen = []
    for _ in range(2):
        chromium.execute_script("arguments[0].click()", title)
        seen.append([float(value) for value in chromium.execute_script(values) if value])
    assert seen[0] == sorted(seen[0]) and seen[1] == seen[0][::-1] and len(set(seen[0])) > 3

    search = chromium.find_element(By.CSS_SELECTOR, ".tools input")
    search.send_keys("knorm 25% perplexity")
    shown = chromium.find_elements(By.CSS_SELECTOR, "#records tbody:not([hidden])")
    assert len(shown) == 3 and chromium.find_element(By.TAG_NAME, "output").text.startswith("3 of ")
    more = shown[0].find_element(By.CSS_SELECTOR, ".more")
    assert not more.is_displayed()
    chromium.execute_script("arguments[0].click()", shown[0].find_element(By.TAG_NAME, "button"))
    assert more.is_displayed() and "vestige compare out/ledger.jsonl --only compare-knorm" in more.text


@pytest.mark.browser
def test_a_point_leads_to_its_rows(page, chromium):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    from tests.evidence.test_report import opened

    opened(chromium, page, 1200, "light")
    point = chromium.find_element(By.CSS_SELECTOR, "#bytes-1 .scatterlayer .trace:last-child .points path")
    chromium.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", point)
    ActionChains(chromium).move_to_element(point).click().perform()
    rows = "#records tbody:not([hidden])"
    WebDriverWait(chromium, 5).until(lambda d: len(d.find_elements(By.CSS_SELECTOR, rows)) == 3)
    texts = [row.text for row in chromium.find_elements(By.CSS_SELECTOR, rows)]
    assert all("knorm" in text and "perplexity" in text for text in texts), texts
    link = chromium.find_element(By.CSS_SELECTOR, "a[data-point]")
    chromium.execute_script("arguments[0].click()", link)
    assert "full" in chromium.find_element(By.CSS_SELECTOR, rows).text
    every = chromium.find_element(By.CSS_SELECTOR, ".tools button")
    chromium.execute_script("arguments[0].click()", every)
    assert len(chromium.find_elements(By.CSS_SELECTOR, rows)) > 100
