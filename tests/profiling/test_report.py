"""report.json holds what it must; the page says it, escaped, whatever strings are in it."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from paretron_profiling import figures
from paretron_profiling.report.page import build_report, embed, write_report
from paretron_profiling.report.schema import Report, loss_above, won_back
from paretron_profiling.report.text import doubts, headlines, verdict
from paretron_profiling.report.view import COLOURS, TEACHER_COLOUR, payload
from report_example import example_report

HOSTILE = '</script><script>window.hacked=1</script><img src=x onerror="window.hacked=1">"\'\n& é'


def without_speed(**changes: Any) -> dict[str, Any]:
    content = example_report(**changes)
    for model in content["models"]:
        model["speed"] = []
    return content | {"speedup": []}


class Texts(HTMLParser):
    """The visible text of a page, and the names of its elements."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self._inside = "", ""
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._inside = tag

    def handle_data(self, data: str) -> None:
        if self._inside not in ("script", "style"):
            self.text += data

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""


def read(page: str) -> Texts:
    texts = Texts()
    texts.feed(page)
    return texts


def test_report_json_holds_what_readers_rely_on(tmp_path: Path) -> None:
    write_report(example_report(), out=tmp_path)
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["schema"] == 1
    for model in content["models"]:
        assert {
            "name", "kind", "params", "non_embedding_params", "weight_bytes",
            "kv_bytes_per_token", "loss", "perplexity", "speed", "artifacts",
        } <= set(model)  # fmt: skip
        assert set(model["loss"]) == {"pruned", "final"}
        for speed in model["speed"]:
            assert {
                "engine", "load", "input_len", "output_len", "output_tok_s", "prefill_tok_s",
                "ttft_ms", "tpot_ms", "repeats", "spread",
            } <= set(speed)  # fmt: skip
    assert {s["rule"] for s in content["speedup"]} >= {"same_batch", "same_memory"}
    assert {"goals", "roofline", "cost", "importance", "raw"} <= set(content)
    for speedup in content["speedup"]:
        assert {"model", "engine", "rule", "ratio", "load", "teacher_load"} <= set(speedup)
    assert {"hardware", "versions", "curves", "captions"} <= set(content)
    assert Report.of(content) == Report.of(example_report())


def test_unknown_and_missing_keys_are_refused() -> None:
    with pytest.raises(ValidationError, match="colour"):
        Report.of(example_report(colour="red"))
    content = example_report()
    del content["models"][0]["kind"]
    with pytest.raises(ValidationError, match="kind"):
        Report.of(content)
    with pytest.raises(ValidationError, match="schema"):
        Report.of(example_report(schema=2))


def test_nan_becomes_null(tmp_path: Path) -> None:
    content = example_report()
    content["models"][1]["loss"] = {"pruned": math.inf, "final": math.nan}
    content["models"][1]["speed"][0]["output_tok_s"] = math.nan
    content["models"][1]["perplexity"] = {"validation": math.nan}
    content["speedup"][0]["ratio"] = math.nan
    write_report(content, out=tmp_path)
    written = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert written["models"][1]["loss"] == {"pruned": None, "final": None}
    page = (tmp_path / "report.html").read_text()
    assert "nan" not in read(page).text.lower().replace("finance", "")
    json.loads(_data(page), parse_constant=pytest.fail)


@pytest.mark.parametrize("name", [HOSTILE, "<!--", "{{ 7 * 7 }}", "\u2028", "x" * 500, ""])
def test_hostile_names_are_only_text(name: str) -> None:
    content = example_report(title=name, incomplete=name, captions=[name], versions={name: name})
    for speedup in content["speedup"]:
        speedup["model"] = name if speedup["model"] == "width" else speedup["model"]
    model = content["models"][1] | {"name": name, "kind": name, "perplexity": {name: 3.0}}
    content["models"][1] = model
    page, plain = build_report(content), build_report(example_report(incomplete="x"))
    ours = read(page)
    assert ours.tags.count("script") == read(plain).tags.count("script") == 3
    assert "img" not in ours.tags
    assert "49" not in ours.text.split("Versions")[0][:200]
    assert json.loads(_data(page))["models"][1]["name"] == name


@given(st.text())
def test_embedded_json_cannot_leave_its_script(text: str) -> None:
    embedded = embed({"a": [text, math.nan]})
    assert not set("<>&\u2028\u2029") & set(embedded)
    assert json.loads(embedded) == {"a": [text, None]}


def _data(page: str) -> str:
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.S)
    assert found
    return found.group(1)


def test_the_page_asks_for_nothing() -> None:
    page = build_report(example_report())
    head = page.split("<script")[0]
    assert "default-src 'none'" in head
    ours = page.replace(_plotly(), "")
    # A place in the page, or a file beside it that is opened when somebody asks for it.
    assert not re.search(r"(src|href)=[\"'](?!data:|#|(\.\./)*[\w.]+/)", ours)
    assert "src=" not in ours
    assert "http" not in ours.replace("http-equiv", "")
    assert "@import" not in ours
    assert "url(" not in ours


def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


def test_stamp_and_incompleteness_are_plain_to_see() -> None:
    text = read(build_report(example_report(stamp="TEST", incomplete="vllm was killed"))).text
    assert "TEST" in text
    assert "its numbers mean nothing" in text
    assert "INCOMPLETE" in text
    assert "vllm was killed" in text
    text = read(build_report(example_report())).text
    assert "TEST" not in text
    assert "INCOMPLETE" not in text


def test_headlines_come_from_the_numbers() -> None:
    report = Report.of(example_report())
    width, depth = headlines(report)
    ratio = report.headline_speedup("width")
    assert ratio is not None
    assert (ratio.engine, ratio.load, ratio.rule) == ("ortgenai", 4, "same_batch")
    assert width.sentence == f"width: {ratio.ratio:.2f}× faster, +0.11 nats"
    assert depth.sentence.endswith("× faster, +0.20 nats")
    faster = depth.sentence.split(": ")[1].split(",")[0]
    assert verdict(report) == f"depth is {faster}, width is better at +0.11 nats"


def _with(ratios: dict[str, tuple[float, float, float]], losses: dict[str, float]) -> Report:
    content = example_report()
    for s in content["speedup"]:
        if s["rule"] == "same_batch" and s["model"] in ratios:
            s["ratio"], *s["interval"] = ratios[s["model"]]
    for m in content["models"]:
        m["loss"]["final"] = losses.get(m["name"], m["loss"]["final"])
    return Report.of(content)


FASTER, SLOWER = (1.5, 1.4, 1.6), (0.8, 0.7, 0.9)


@pytest.mark.parametrize(
    ("ratios", "losses", "said"),
    [
        ({"width": FASTER, "depth": (1.2, 1.1, 1.3)}, {}, "width: 1.50× faster, +0.11 nats: both"),
        ({"width": FASTER, "depth": (1.55, 1.45, 1.7)}, {}, "in speed the students do not differ"),
        (
            {"width": FASTER, "depth": (2.0, 1.9, 2.1)},
            {"depth": 3.524},
            "faster; in loss the students do not",
        ),
        ({"width": FASTER, "depth": FASTER}, {"depth": 3.523}, "No student stands out"),
        ({"width": SLOWER, "depth": FASTER}, {}, "depth is 1.50× faster, width is better"),
        ({"width": FASTER, "depth": (2.0, 1.9, 2.1)}, {"width": 3.30}, "better at −0.11 nats"),
    ],
)
def test_verdicts(ratios: Any, losses: dict[str, float], said: str) -> None:
    assert said in verdict(_with(ratios, losses))


def test_of_many_students_those_that_lead_are_named() -> None:
    """Two that tie are not all."""
    found = [
        _named({"a": (1.9, 1.8, 2.0), "b": (1.85, 1.8, 2.0), "c": (1.4, 1.3, 1.5)}, losses)
        for losses in (
            {"a": 3.6, "b": 3.6, "c": 3.5}, {"a": 3.6, "b": 3.6, "c": 3.6}, {"a": 3.5, "b": 3.6},
        )
    ]  # fmt: skip
    assert found == [
        "a and b are 1.90× faster, c is better at +0.09 nats",
        "a and b are 1.90× faster; in loss the students do not differ (+0.19 nats)",
        "a and b are 1.90× faster, a is better at +0.09 nats",
    ]
    assert _named({"a": (1.9, 1.8, 2.0), "b": (1.85, 1.8, 2.0)}, {}).startswith("No student stands")


def _named(ratios: dict[str, tuple[float, float, float]], losses: dict[str, float]) -> str:
    """The verdict on students of these ratios and losses."""
    content = _with({}, {})
    teacher, student = (m.model_dump() for m in content.models[:2])
    rows = [s.model_dump() for s in content.speedup if s.model == student["name"]]
    students = [
        student | {"name": n, "loss": {"final": losses.get(n)}, "texts": {}} for n in ratios
    ]
    speedups = [
        row | {"model": n, "ratio": ratio, "interval": ends}
        for n, (ratio, *ends) in ratios.items()
        for row in rows
    ]
    return verdict(
        Report.of(
            content.to_json() | {"models": [teacher, *students], "speedup": speedups, "goals": []}
        )
    )


def test_slower_and_equal_are_said_so() -> None:
    slow, equal = headlines(_with({"width": SLOWER, "depth": (1.02, 0.98, 1.05)}, {}))
    assert slow.speed == "1.25× slower"
    assert equal.speed == "as fast as the teacher within the noise (1.02×)"


def test_what_was_not_measured_is_said_so() -> None:
    content = without_speed(curves=[])
    for model in content["models"]:
        model["loss"] = {"pruned": None, "final": None}
    report = Report.of(content)
    assert verdict(report) == "2 students, not yet measured"
    text = read(build_report(report)).text
    assert "speed not measured" in text
    assert "loss not measured" in text
    assert "Speed against loss" not in text
    single = Report.of(without_speed(models=content["models"][:1]))
    assert verdict(single) == "No student was made"
    assert "Sizes and losses" in read(build_report(single)).text


def test_doubtful_measurements_are_named() -> None:
    report = Report.of(example_report())
    flagged = [(m.name, s) for m in report.models for s in m.speed if s.flags]
    assert flagged
    assert len(doubts(report)) == len(flagged)
    text = read(build_report(report)).text
    assert "repeats differ by more than 5%" in text
    assert all(d in text for d in doubts(report))


def test_checks_of_artifacts_are_told() -> None:
    content = example_report()
    text = read(build_report(content)).text
    assert "passed: logits (max_abs 8.1e-06, limit 0.0001); greedy tokens" in text
    assert "FAILED" not in text
    content["models"][1]["artifacts"][0]["checks"][1]["passed"] = False
    text = read(build_report(content)).text
    assert "FAILED: greedy tokens. passed: logits (max_abs" in text


def test_power_is_shown_where_it_was_read() -> None:
    content = example_report()
    assert "Power and clocks" not in read(build_report(content)).text
    content["models"][1]["speed"][0] |= {
        "power_w": 412.4, "energy_j_tok": 0.0613, "sm_clock_mhz": 1980.0,
    }  # fmt: skip
    text = read(build_report(content)).text
    for said in ("Power and clocks of the GPU", "412", "0.0613", "1,980"):
        assert said in text


def test_captions_state_conditions() -> None:
    text = read(build_report(example_report())).text
    for said in ("Example CPU", "2 threads", "0.32.0", "3 repeats", "1 warm-up", "Seed 0",
                 "TTFT", "same memory", "distilled on 2,500,000 tokens"):  # fmt: skip
        assert said in text, said


def test_shares_and_differences() -> None:
    report = Report.of(example_report())
    width = report.students[0]
    assert loss_above(width, teacher=report.teacher) == pytest.approx(0.111)
    assert won_back(width, teacher=report.teacher) == pytest.approx((4.91 - 3.523) / (4.91 - 3.412))
    assert won_back(width, teacher=None) is None
    memory = report.memory_speedup("depth")
    assert memory is not None
    assert (memory.engine, memory.teacher_load) == ("ortgenai", 4)


def test_tables_hold_every_number_of_the_figures() -> None:
    report = Report.of(example_report())
    text = read(build_report(report)).text
    for model in report.models:
        assert figures.nats(model.loss.final) in text
        for s in model.speed:
            assert figures.plain(s.prefill_tok_s) in text
            assert figures.plain(s.decode_tok_s) in text
    for ratio in report.speedup:
        assert figures.times(ratio.ratio) in text


def test_colours_are_readable_and_told_apart() -> None:
    for colour in (*COLOURS, TEACHER_COLOUR):
        assert _contrast(colour, "#ffffff") >= 4.5
    assert len(set(COLOURS)) == len(COLOURS)
    models = payload(Report.of(example_report()))["models"]
    assert len({(m["colour"], m["symbol"]) for m in models}) == len(models)


def _contrast(one: str, other: str) -> float:
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_styles_have_contrast() -> None:
    from importlib.resources import files

    style = files("paretron_profiling.templates").joinpath("report.css").read_text()
    named = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", style))
    for colour in ("ink", "soft", "link"):
        assert _contrast(named[colour], "#ffffff") >= 4.5
        assert _contrast(named[colour], named["page"]) >= 4.5
    assert _contrast(named["warn"], named["warn-page"]) >= 4.5


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (figures.count(4540469248), "4.54 B"),
        (figures.count(6100000), "6.1 M"),
        (figures.count(12), "12"),
        (figures.size(18874368), "18.9 MB"),
        (figures.size(None), "–"),
        (figures.plain(57416.2), "57,416"),
        (figures.plain(0.5154), "0.515"),
        (figures.plain(0.0000123), "0.000012"),
        (figures.plain(None), "–"),
        (figures.signed_nats(-0.114), "−0.11"),
        (figures.signed_nats(0.0041), "+0.004"),
        (figures.signed_nats(0.0208), "+0.021"),
        (figures.percent(0.834), "83 %"),
        (figures.percent(0.0512), "5.1 %"),
        (figures.times(1.3821), "1.38×"),
    ],
)
def test_numbers_as_people_read_them(said: str, expected: str) -> None:
    assert said == expected
