"""The page: all in one file, every figure drawn, nothing asked of a network, in light, dark and on a phone."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from vestige.evidence.amounts import size
from vestige.evidence.audit import audit
from vestige.evidence.report.audit_page import answers
from vestige.evidence.report.figures import head_map, retention_curves
from vestige.evidence.report.page import Answers, Code, Figure, Page, Section, Table, Text, render, write_page
from vestige.evidence.summaries import retention

SMALL = {"length": 260, "budgets": (40, 100, 200), "depths": (0.2, 0.8), "seeds": (0,), "quick": True}


@pytest.fixture(scope="module")
def result(toy, tmp_path_factory):
    return audit(toy, out=tmp_path_factory.mktemp("audit"), progress=False, **SMALL)


def test_the_page_stands_alone_and_shows_four_policies_at_three_budgets(result):
    text = result.report.read_text(encoding="utf-8")
    assert not re.search(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=", text)
    for policy in ("full", "streaming-llm", "h2o", "a2sf"):
        assert f'<th scope="row">{policy}</th>' in text
    for budget in ("40", "100", "200"):
        assert re.search(rf'<th scope="col" class="number">{budget}</th>', text)
    assert 'name="viewport"' in text and "prefers-color-scheme: dark" in text and "@media print" in text
    assert f"vestige audit {result.model} --methods" in text


def test_figures_hold_the_numbers_of_the_table(result):
    figure = retention_curves(result.retention)
    lines = {trace.name: trace for trace in figure.data if trace.mode != "none"}
    for policy in ("streaming-llm", "h2o", "a2sf"):
        rows = result.retention[result.retention.policy == policy].sort_values("budget")
        assert list(lines[policy].x) == rows.budget.tolist() and list(lines[policy].y) == rows.found.tolist()
    assert len({lines[policy].line.color for policy in lines}) == 4
    assert len({(lines[policy].line.dash, lines[policy].marker.symbol) for policy in lines}) == 4
    assert np.array_equal(head_map(result.sinks, "share").data[0].z, result.sinks)


def test_scores_are_written_into_the_cells_of_retrieval_heads_only():
    figure = head_map([[0.05, 0.1], [0.754, 1.0]], "score", written_from=0.1)
    assert [list(row) for row in figure.data[0].text] == [["", ".10"], [".75", "1.00"]]
    assert not any(any(row) for row in head_map(np.ones((2, 32)), "score", written_from=0.1).data[0].text)


def test_headlines_say_what_the_tables_say(result):
    from dataclasses import replace

    cells = result.cells.assign(found=lambda c: (c.policy == "full") | (c.budget >= 100))
    table = retention(cells)
    from vestige.evidence.summaries import smallest_budgets

    good = replace(result, retention=table, smallest=smallest_budgets(table))
    texts = [f"{number} {sentence}" for number, sentence in answers(good)]
    assert texts[0].startswith("100% of the facts are found with the full cache (2 of 2)")
    assert any(re.match(r"100 of 260 tokens keep 95% .* under a2sf, in 4\d\.\d% of the bytes", text) for text in texts)
    poor = replace(good, retention=retention(result.cells.assign(found=result.cells.policy == "full")))
    poor = replace(poor, smallest=smallest_budgets(poor.retention))
    assert any(text.startswith("> 200 of 260 tokens are needed under h2o") for text in map(" ".join, answers(poor)))
    blind = replace(good, retention=retention(result.cells.assign(found=False)))
    assert any("No policy can be judged" in sentence for _, sentence in answers(blind))


def test_text_is_escaped_and_a_page_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    nasty = "<script>alert('x')</script>"
    sections = [
        Section("s", nasty, [Text(nasty), Code(nasty), Answers([(nasty, nasty)]), Table([nasty], [[nasty]], nasty)])
    ]
    figure = head_map(np.zeros((1, 1)), nasty)
    sections.append(Section("f", "f", [Figure("fig", figure, nasty, nasty, nasty)]))
    page = Page(nasty, nasty, sections, nasty)
    assert nasty not in render(page)
    path = write_page(page, tmp_path / "new" / "page.html")
    before = path.read_bytes()
    monkeypatch.setattr("pathlib.Path.replace", lambda *args: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        write_page(Page("other", "", []), path)
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == ["page.html"]


def test_sizes_read_well():
    assert [size(n) for n in (12, 999, 1500, 47_185_920, 123_456_789, 2.5e12)] == [
        "12 bytes",
        "999 bytes",
        "1.5 kB",
        "47.2 MB",
        "123 MB",
        "2500 GB",
    ]


def opened(chromium, report, width, scheme):
    chromium.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600},
    )
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    chromium.get(report.as_uri())
    return chromium


def test_the_ledger_of_an_audit_has_a_page_too(result, tmp_path):
    from vestige.evidence.ledgers import read_ledgers
    from vestige.evidence.points import points_of
    from vestige.evidence.report.ledger_page import ledger_page

    read = read_ledgers([result.folder])
    titles = [section.title for section in ledger_page(read).sections]
    assert titles == ["In short", "Quality against bytes", "Heads", "Every row"]
    shares = {(p.method, p.budget): p.value for p in points_of(read.rows).all}
    for row in result.retention.to_dict("records"):
        budget = "" if row["policy"] == "full" else f"{row['budget']} entries"
        assert shares[row["policy"], budget] == pytest.approx(row["found"])


@pytest.mark.browser
@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (390, "dark")])
def test_every_figure_is_drawn_within_the_page(result, chromium, width, scheme):
    page = opened(chromium, result.report, width, scheme)
    expected = len(re.findall(r'class="plot"', result.report.read_text(encoding="utf-8")))
    assert page.execute_script("return document.documentElement.dataset.drawn") == str(expected)
    drawn = page.execute_script(
        """return [...document.querySelectorAll(".plot")].map((plot) => ({
             marks: plot.querySelectorAll(".hm image, .scatterlayer .trace path").length,
             width: plot.querySelector(".main-svg").getBoundingClientRect().width,
             right: plot.getBoundingClientRect().right }))"""
    )
    assert len(drawn) == expected == 6
    assert all(figure["marks"] > 0 and 200 < figure["width"] <= width and figure["right"] <= width for figure in drawn)
    assert page.execute_script("return document.documentElement.scrollWidth") <= width
    ink = page.execute_script("return getComputedStyle(document.querySelector('.plot .xtick text')).fill")
    light = sum(int(part) for part in re.findall(r"\d+", ink)[:3]) > 380
    assert light == (scheme == "dark"), ink
    assert [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"] == []


@pytest.mark.browser
def test_colours_follow_the_reader_without_a_reload_and_paper_is_light(result, chromium):
    from selenium.webdriver.support.ui import WebDriverWait

    page = opened(chromium, result.report, 1000, "light")
    fill = "return getComputedStyle(document.querySelector('.plot .xtick text')).fill"
    light = page.execute_script(fill)
    dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", dark)
    WebDriverWait(page, 5).until(lambda driver: driver.execute_script(fill) != light)
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print", **dark})
    WebDriverWait(page, 5).until(lambda driver: driver.execute_script(fill) == light)
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


@pytest.mark.browser
def test_pointing_at_a_line_shows_its_numbers(result, chromium):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    page = opened(chromium, result.report, 1200, "light")
    point = page.find_element(By.CSS_SELECTOR, "#retention-curves .scatterlayer .trace .point")
    page.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", point)
    ActionChains(page).move_to_element(point).perform()
    shown = WebDriverWait(page, 5).until(
        lambda d: d.find_elements(By.CSS_SELECTOR, "#retention-curves .hoverlayer text")
    )
    assert "entries" in " ".join(text.text for text in shown)
    assert json.loads(page.execute_script("return document.getElementById('retention-curves-data').textContent"))
