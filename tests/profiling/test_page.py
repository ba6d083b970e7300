"""The report in a real browser, opened from the file system as a customer opens it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chromium import CHROMIUM, DRIVER, Chrome
from paretron_profiling.report import write_report
from report_example import example_report

pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None, reason="chromium and chromedriver are not installed"
)

HOSTILE = '<b></script><script>window.hacked=1</script><img src=x onerror="window.hacked=1">\n"\''
WIDTHS = (1400, 768, 360)


@pytest.fixture(scope="module")
def chrome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    with Chrome(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


def page_of(folder: Path, **changes: Any) -> Path:
    write_report(example_report(**changes), out=folder)
    return folder / "report.html"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return page_of(tmp_path_factory.mktemp("page"))


def is_quiet(chrome: Chrome) -> bool:
    """No console error or warning, and no request but for the page itself and what is inside it."""
    assert chrome.console() == []
    outside = [r for r in chrome.requests() if not r.startswith(("file:///", "data:", "blob:"))]
    assert outside == []
    files = chrome.js("return performance.getEntriesByType('resource').map((e) => e.name)")
    assert [f for f in files if not f.startswith(("data:", "blob:"))] == []
    return True


def drawn(chrome: Chrome, figure: str) -> int:
    """How many marks a figure has."""
    script = "return document.querySelectorAll(`#${arguments[0]} .point`).length"
    return int(chrome.js(script, figure))


@pytest.mark.parametrize("width", WIDTHS)
def test_it_draws_quietly_at_every_width(chrome: Chrome, page: Path, width: int) -> None:
    chrome.open(page, width=width)
    assert is_quiet(chrome)
    assert drawn(chrome, "scatter") == 3
    assert drawn(chrome, "prefill") == drawn(chrome, "decode") == 3
    assert drawn(chrome, "ratios") == 4
    assert drawn(chrome, "curves") > 10
    assert chrome.js("return document.documentElement.scrollWidth") <= width
    overflow = chrome.js(
        "return [...document.querySelectorAll('.js-plotly-plot text')].filter((t) => {"
        " const r = t.getBoundingClientRect(), p = t.closest('.js-plotly-plot')"
        ".getBoundingClientRect();"
        " return r.width && (r.left < p.left - 1 || r.right > p.right + 1); })"
        ".map((t) => t.textContent)"
    )
    assert overflow == []


def test_the_first_screen_says_it(chrome: Chrome, page: Path) -> None:
    chrome.open(page, width=1400, height=900)
    seen = chrome.js(
        "return [...document.querySelectorAll('h1, .card h2, .big span')].filter((e) =>"
        " e.getBoundingClientRect().bottom < 900).map((e) => e.textContent)"
    )
    assert "is better at +0.11 nats" in seen[0]
    assert seen[1:] == ["width", seen[2], "+0.11 nats", "depth", seen[5], "+0.20 nats"]
    assert "× faster" in seen[2]
    assert "× faster" in seen[5]


def test_hovering_shows_a_models_facts(chrome: Chrome, page: Path) -> None:
    chrome.open(page, width=1400)
    for model in range(3):
        where = chrome.js(
            "const p = document.querySelectorAll('#scatter .scatterlayer .point')[arguments[0]];"
            "p.scrollIntoView({block: 'center'}); const r = p.getBoundingClientRect();"
            "return [r.x + r.width / 2, r.y + r.height / 2]",
            model,
        )
        text = hover_text(chrome, *where)
        for fact in ("output tok/s", "nats", "parameters", "KV cache per token", "TTFT"):
            assert fact in text, (model, text)
    assert is_quiet(chrome)


def hover_text(chrome: Chrome, x: float, y: float) -> str:
    """What the scatter shows for a mouse that comes to rest there; it waits a moment first."""
    deadline = time.monotonic() + 10
    text = ""
    while not text and time.monotonic() < deadline:
        chrome.move_to(x - 5, y - 5)
        time.sleep(0.1)
        chrome.move_to(x, y)
        time.sleep(0.1)
        text = chrome.js("return document.querySelector('#scatter .hoverlayer').textContent")
    return text


def test_choosing_another_workload(chrome: Chrome, page: Path) -> None:
    chrome.open(page, width=1400)
    before = chrome.js("return document.getElementById('decode').getAttribute('aria-label')")
    options = chrome.js(
        "return [...document.querySelectorAll('#workload option')].map(o => o.text)"
    )
    assert len(options) == 4
    chosen = chrome.js(
        "const s = document.getElementById('workload'); return s.options[s.selectedIndex].text"
    )
    assert chosen == "ortgenai, batch 4, 128 + 128 tokens"
    assert chrome.js("return document.querySelector('[data-doubt]').textContent") == ""
    chrome.js(
        "const s = document.getElementById('workload'); s.value = '3';"
        "s.dispatchEvent(new Event('change'))"
    )
    after = chrome.js("return document.getElementById('decode').getAttribute('aria-label')")
    assert before != after
    assert "teacher" in after
    doubt = chrome.js("return document.querySelector('[data-doubt]').textContent")
    assert "repeats differ" in doubt
    assert is_quiet(chrome)


def test_choosing_another_curve(chrome: Chrome, page: Path) -> None:
    chrome.open(page, width=1400)
    label = "return document.getElementById('curves').getAttribute('aria-label')"
    assert chrome.js(label).startswith("distillation: validation loss")
    chrome.js(
        "const s = document.getElementById('curve'); s.value = '1';"
        "s.dispatchEvent(new Event('change'))"
    )
    assert chrome.js(label).startswith("distillation: training KL")
    assert is_quiet(chrome)


def test_every_figure_has_words_and_a_table(chrome: Chrome, page: Path) -> None:
    chrome.open(page, width=1400)
    labels = chrome.js(
        "return [...document.querySelectorAll('.plot')].map((p) => [p.getAttribute('role'),"
        " p.getAttribute('aria-label').length,"
        " p.closest('section').querySelectorAll('table').length])"
    )
    assert len(labels) == 5
    assert all(role == "img" and length > 60 and tables for role, length, tables in labels)
    unlabelled = chrome.js(
        "return [...document.querySelectorAll('select')].filter((s) => !s.labels.length).length"
    )
    assert unlabelled == 0
    assert chrome.js("return document.querySelectorAll('h1').length") == 1
    focusable = chrome.js(
        "return [...document.querySelectorAll('select, summary, .scroll')]"
        ".every((e) => e.tabIndex >= 0)"
    )
    assert focusable


def test_it_prints_with_its_tables_open(chrome: Chrome, page: Path) -> None:
    chrome.open(page, width=1400)
    chrome.js("window.dispatchEvent(new Event('beforeprint'))")
    assert chrome.js("return document.querySelectorAll('details:not([open])').length") == 0
    chrome.js("window.dispatchEvent(new Event('afterprint'))")
    assert chrome.js("return document.querySelectorAll('details[open]').length") == 0


def test_hostile_names_run_nothing(chrome: Chrome, tmp_path: Path) -> None:
    content = example_report(title=HOSTILE, captions=[HOSTILE], incomplete=HOSTILE)
    for kind in ("speedup", "curves"):
        for row in content[kind]:
            row["model"] = HOSTILE if row["model"] == "width" else row["model"]
    content["models"][1] |= {"name": HOSTILE, "kind": HOSTILE, "perplexity": {HOSTILE: 3.0}}
    page = page_of(tmp_path, **content)
    for width in (1400, 360):
        chrome.open(page, width=width)
        assert chrome.js("return window.hacked === undefined && !document.querySelector('img')")
        assert is_quiet(chrome)
        assert drawn(chrome, "scatter") == 3
        assert chrome.js("return document.documentElement.scrollWidth") <= width
        figures = "return [...document.querySelectorAll('.plot')].map((p) => p.textContent)"
        assert all("<b></script>" in text for text in chrome.js(figures))
    shown = chrome.js("return document.querySelector('.card h2').textContent")
    assert shown.startswith("<b></script><script>window.hacked=1")


def test_gaps_leave_no_error(chrome: Chrome, tmp_path: Path) -> None:
    """A figure that is null, a model without speed, a ratio that is null, an empty curve."""
    content = example_report()
    content["models"][0]["speed"][0]["prefill_tok_s"] = None
    content["models"][1]["loss"]["final"] = None
    content["models"][2]["speed"] = []
    content["speedup"][0]["ratio"] = None
    content["speedup"][1] |= {"ratio": None, "interval": [None, None]}
    content["curves"][0] |= {"tokens": [], "values": []}
    content["curves"][1]["values"][3] = None
    page = page_of(tmp_path, **content)
    chrome.open(page, width=1400)
    for option in range(4):
        chrome.js(
            "const s = document.getElementById('workload'); s.value = String(arguments[0]);"
            "s.dispatchEvent(new Event('change'))",
            option,
        )
    assert is_quiet(chrome)


@pytest.mark.parametrize("left_out", ["speed", "curves", "students"])
def test_parts_that_are_missing(chrome: Chrome, tmp_path: Path, left_out: str) -> None:
    content = example_report()
    if left_out == "speed":
        content["speedup"] = []
        for model in content["models"]:
            model["speed"] = []
    elif left_out == "curves":
        content["curves"] = []
    else:
        content |= {"models": content["models"][:1], "speedup": []}
    chrome.open(page_of(tmp_path, **content), width=360)
    assert is_quiet(chrome)


def test_the_stamp_stays_in_sight(chrome: Chrome, tmp_path: Path) -> None:
    chrome.open(page_of(tmp_path, stamp="TEST"), width=360, height=700)
    chrome.js("window.scrollTo(0, 1500)")
    top, bottom = chrome.js(
        "const r = document.querySelector('.stamp').getBoundingClientRect();"
        "return [r.top, r.bottom]"
    )
    assert top >= 0
    assert bottom < 300
