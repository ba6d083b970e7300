"""The report in a real browser, opened from the file system as a customer opens it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chromium import CHROMIUM, DRIVER, Chrome
from paretron_profiling.report.page import write_report
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
    assert drawn(chrome, "first-bars") == drawn(chrome, "second-bars") == 3
    assert drawn(chrome, "ratios") == 6
    assert drawn(chrome, "per-user") == 8
    assert drawn(chrome, "latency-ttft") == drawn(chrome, "latency-e2e") == 18
    assert drawn(chrome, "roof-prefill") == drawn(chrome, "memory") == 6
    assert drawn(chrome, "importance") == 7
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
    before = chrome.js("return document.getElementById('second-bars').getAttribute('aria-label')")
    options = chrome.js(
        "return [...document.querySelectorAll('#workload option')].map(o => o.text)"
    )
    assert len(options) == 7
    chosen = chrome.js(
        "const s = document.getElementById('workload'); return s.options[s.selectedIndex].text"
    )
    assert chosen == "ortgenai, batch 4, 128 + 128 tokens"
    assert chrome.js("return document.querySelector('[data-doubt]').textContent") == ""
    chrome.js(
        "const s = document.getElementById('workload'); s.value = '3';"
        "s.dispatchEvent(new Event('change'))"
    )
    after = chrome.js("return document.getElementById('second-bars').getAttribute('aria-label')")
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


def advice(chrome: Chrome) -> tuple[str, str]:
    """Which model is taken ("" for none), and the sentence."""
    taken, text = chrome.js(
        "const a = document.getElementById('advice'); return [a.dataset.taken, a.textContent]"
    )
    return taken, text


def slide(chrome: Chrome, limit: str, *, end: bool) -> None:
    """Move a slider to one of its ends, by the keyboard."""
    chrome.js("document.getElementById(arguments[0]).focus()", f"limit-{limit}")
    chrome.press(*(("End",) if end else ("Home",)), code=35 if end else 36)


def test_sliders_change_what_to_take(chrome: Chrome, page: Path) -> None:
    chrome.open(page, width=1400)
    taken, text = advice(chrome)
    assert taken == "depth"
    assert text.startswith("Take depth at batch 28: the fastest of the 3 models, with ")
    slide(chrome, "above", end=False)
    taken, text = advice(chrome)
    assert taken == "teacher"
    assert "it alone meets these limits" in text
    rows = chrome.js(
        "return [...document.querySelectorAll('#candidates tr')].map(r => r.innerText)"
    )
    assert sum("misses loss" in row for row in rows) == 6
    assert sum("take this" in row for row in rows) == 1
    slide(chrome, "above", end=True)
    assert advice(chrome)[0] == "depth"
    slide(chrome, "memory", end=False)  # of the smallest that was measured
    assert advice(chrome)[1].startswith("Take depth at batch 1: it alone")
    slide(chrome, "rate", end=True)  # and of the fastest: nothing is both
    taken, text = advice(chrome)
    assert taken == ""
    assert text.startswith("None meets these limits. Nearest is depth at batch ")
    assert "which misses " in text
    assert is_quiet(chrome)
    chrome.js("document.getElementById('reset').click()")
    assert advice(chrome)[0] == "depth"


def test_what_to_take_follows_the_aim_and_the_workload(chrome: Chrome, page: Path) -> None:
    chrome.open(page, width=360)
    chrome.js("document.querySelector('input[value=closest]').click()")
    # Every load of a model has its loss: of them the fastest is taken.
    assert advice(chrome)[1].startswith("Take teacher at batch 4: the closest to its teacher of ")
    chrome.js("document.querySelector('input[value=smallest]').click()")
    assert advice(chrome)[1].startswith("Take depth at batch 1: the smallest in memory of the 3")
    chrome.js(
        "const s = document.getElementById('choice-group'); s.value = '2';"
        "s.dispatchEvent(new Event('change'))"
    )
    assert "in flight" in advice(chrome)[1]
    assert chrome.js("return document.documentElement.scrollWidth") <= 360
    assert is_quiet(chrome)


def test_a_wider_limit_never_leaves_less(chrome: Chrome, tmp_path: Path) -> None:
    """Steps finer than what is shown of a number are no stricter than the end of the slider."""
    content = example_report()
    for model in content["models"]:
        for place, speed in enumerate(model["speed"]):
            speed["ttft_ms"] = 1004.4 + place
    write_report(content, out=tmp_path)
    chrome.open(tmp_path / "report.html", width=1400)
    slide(chrome, "ttft", end=False)
    taken = [advice(chrome)[0]]
    for _ in range(3):
        chrome.press("ArrowRight", code=39)
        taken.append(advice(chrome)[0])
    assert set(taken) <= {"teacher", "width", "depth"}


def test_a_single_model_is_no_choice(chrome: Chrome, tmp_path: Path) -> None:
    content = example_report(speedup=[], goals=[], roofline=None)
    content["models"] = content["models"][:1]
    write_report(content, out=tmp_path)
    chrome.open(tmp_path / "report.html", width=1400)
    assert "no other model was measured here" in advice(chrome)[1]
    assert is_quiet(chrome)


def test_a_keyboard_reaches_the_sliders(chrome: Chrome, page: Path) -> None:
    chrome.open(page, width=1400)
    seen = []
    for _ in range(40):
        chrome.press("Tab", code=9)
        seen.append(chrome.js("return document.activeElement.id"))
        if seen[-1] == "limit-above":
            break
    assert [i for i in seen if i.startswith("limit-")] == [
        "limit-ttft", "limit-tpot", "limit-rate", "limit-memory", "limit-above",
    ]  # fmt: skip
    said = "return document.activeElement.getAttribute('aria-valuetext')"
    assert chrome.js(said) == "any"
    chrome.press("ArrowLeft", code=37)
    assert chrome.js(said).startswith("at most +0.19")
    assert chrome.js("return document.activeElement.labels.length") == 1
    assert advice(chrome)[0] == "width"
    assert (
        chrome.js("return document.getElementById('advice').getAttribute('aria-live')") == "polite"
    )


def test_the_frontier_by_every_accuracy(chrome: Chrome, tmp_path: Path) -> None:
    content = example_report()
    content["models"][2]["loss"]["final"] = 3.3  # depth is now the best and the fastest
    page = page_of(tmp_path, **content)
    chrome.open(page, width=1400)
    words = "return document.getElementById('frontier-words').textContent"
    assert chrome.js(words).startswith("depth is on the frontier. teacher is dominated: depth is ")
    hollow = (
        "return [...document.querySelectorAll('#scatter .point')]"
        ".map((p) => p.style.fill === 'rgb(255, 255, 255)')"
    )
    assert chrome.js(hollow) == [True, True, False]
    names = chrome.js("return [...document.querySelectorAll('#accuracy option')].map(o => o.text)")
    assert names == ["Final loss", "Perplexity on validation", "Blimp (acc)"]
    chrome.js(
        "const s = document.getElementById('accuracy'); s.value = '2';"
        "s.dispatchEvent(new Event('change'))"
    )
    assert chrome.js(words) == "teacher, width and depth are on the frontier."
    assert chrome.js(hollow) == [False] * 3
    assert is_quiet(chrome)


def test_importance_is_a_map_of_layers_and_units(chrome: Chrome, page: Path) -> None:
    chrome.open(page, width=360)
    chrome.js(
        "const s = document.getElementById('importance-what'); s.value = '1';"
        "s.dispatchEvent(new Event('change'))"
    )
    assert chrome.js("return document.querySelectorAll('#importance .heatmaplayer image').length")
    label = chrome.js("return document.getElementById('importance').getAttribute('aria-label')")
    assert label.startswith("Heat map of MLP neurons.")
    assert "layer 7 down_proj" in label
    assert is_quiet(chrome)


def test_every_figure_has_words_and_a_table(chrome: Chrome, page: Path) -> None:
    chrome.open(page, width=1400)
    labels = chrome.js(
        "return [...document.querySelectorAll('.plot')].map((p) => [p.getAttribute('role'),"
        " p.getAttribute('aria-label').length,"
        " p.closest('section').querySelectorAll('table').length])"
    )
    assert len(labels) == 13
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


def test_it_prints_with_its_tables_open(chrome: Chrome, page: Path, tmp_path: Path) -> None:
    chrome.open(page, width=1400)
    chrome.js("window.dispatchEvent(new Event('beforeprint'))")
    assert chrome.js("return document.querySelectorAll('details:not([open])').length") == 0
    chrome.cdp("Emulation.setEmulatedMedia", {"media": "print"})
    shown = "return document.getElementById(arguments[0]).getClientRects().length > 0"
    assert [chrome.js(shown, i) for i in ("choose", "limits", "scatter", "t-speed-caption")] == [
        False, False, True, True,
    ]  # fmt: skip
    chrome.cdp("Emulation.setEmulatedMedia", {"media": ""})
    chrome.js("window.dispatchEvent(new Event('afterprint'))")
    assert chrome.js("return document.querySelectorAll('details[open]').length") == 0
    chrome.pdf(tmp_path / "page.pdf")
    printed = (tmp_path / "page.pdf").read_bytes()
    assert printed.startswith(b"%PDF")
    assert printed.count(b"/Type /Page\n") > 3
    assert is_quiet(chrome)


def test_hostile_names_run_nothing(chrome: Chrome, tmp_path: Path) -> None:
    content = example_report(title=HOSTILE, captions=[HOSTILE], incomplete=HOSTILE)
    for rows in (content["speedup"], content["curves"], content["roofline"]["rows"]):
        for row in rows:
            row["model"] = HOSTILE if row["model"] == "width" else row["model"]
    content["models"][1] |= {"name": HOSTILE, "kind": HOSTILE, "perplexity": {HOSTILE: 3.0}}
    page = page_of(tmp_path, **content)
    for width in (1400, 360):
        chrome.open(page, width=width)
        assert chrome.js("return window.hacked === undefined && !document.querySelector('img')")
        assert is_quiet(chrome)
        assert drawn(chrome, "scatter") == 3
        assert chrome.js("return document.documentElement.scrollWidth") <= width
        for figure in ("scatter", "first-bars", "ratios", "per-user", "roof-decode", "memory"):
            text = "return document.getElementById(arguments[0]).textContent"
            assert "<b></scrip" in chrome.js(text, figure), figure
        assert "<b></script>" in chrome.js(
            "return document.getElementById('candidates').textContent"
        )
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
