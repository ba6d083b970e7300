"""Reports of several runs, of a profile alone, and as Markdown; who is on the frontier."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from paretron.artifacts.manifest import Provenance, write_manifest
from paretron.cli.main import main
from paretron.errors import Code, ParetronError
from paretron.run.rereporting import report_of, rewrite_report, stands_alone
from paretron_profiling.report.choice import (
    Accuracy,
    Dominated,
    Interval,
    accuracies,
    dominated,
    frontier_words,
    headline_workload,
    throughputs,
)
from paretron_profiling.report.details import memory_table
from paretron_profiling.report.markdown import escaped, markdown
from paretron_profiling.report.page import build_report, write_report
from paretron_profiling.report.schema import Report
from report_example import example_profile, example_report

HOSTILE = "<script>window.hacked=1</script>\"'\n| **b** [l](http://x) `c` &amp; # h\n- x"


def finished_run(folder: Path, **changes: Any) -> Path:
    """A run's folder with nothing but a report."""
    (folder / "report").mkdir(parents=True)
    write_report(example_report(**changes), out=folder / "report")
    return folder


def profiled(folder: Path, **changes: Any) -> Path:
    """What `paretron profile` leaves, but for the manifest."""
    folder.mkdir()
    (folder / "profile.json").write_text(json.dumps(example_profile() | changes))
    return folder


def test_measured_peaks_stand_beside_the_computed_memory(tmp_path: Path) -> None:
    def cells(report: Report) -> dict[tuple[str, ...], str]:
        table = memory_table(report)
        assert table.heads[-1] == "Measured peak"
        return {(row[0], row[1], row[2]): row[-1] for row in table.rows}

    found = cells(Report.of(example_report()))
    assert found["teacher", "ortgenai", "batch 4"] == "244 MB added"
    assert found["teacher", "vllm", "16 in flight"] == "244 MB, whole process; 2 GB of GPUs"
    assert found["teacher", "ortgenai", "batch 1"] == "–"
    older = memory_table(Report.of(example_report(memory=[])))
    assert older.heads[-1] == "Together"
    assert len(older.rows) == len(found)
    # Of a profile alone no sizes are known, so that what was measured stands alone, also in a page.
    alone = report_of([profiled(tmp_path / "p")], out=tmp_path / "one", overwrite=False)
    report = Report.of(json.loads((alone / "report.json").read_text()))
    assert set(cells(report)) == {k for k, peak in found.items() if peak != "–"}
    assert {row[-2] for row in memory_table(report).rows} == {"–"}
    assert "244 MB added" in (alone / "report.html").read_text()
    runs = [finished_run(tmp_path / name) for name in "ab"]
    both = report_of(runs, out=tmp_path / "both", overwrite=False)
    merged = cells(Report.of(json.loads((both / "report.json").read_text())))
    assert merged["b/depth", "ortgenai", "batch 4"] == found["depth", "ortgenai", "batch 4"]


def test_runs_are_merged_under_their_names(tmp_path: Path) -> None:
    runs = [finished_run(tmp_path / name, seed=i) for i, name in enumerate("ab")]
    out = report_of(runs, out=tmp_path / "both", overwrite=False)
    assert sorted(p.name for p in out.iterdir()) == [
        "manifest.json", "report.html", "report.json", "report.md",
    ]  # fmt: skip
    report = Report.of(json.loads((out / "report.json").read_text()))
    names = [f"{run}/{model}" for run in "ab" for model in ("teacher", "width", "depth")]
    assert [m.name for m in report.models] == names
    for model in report.students:
        teacher = report.teacher_of(model)
        assert teacher is not None
        assert teacher.name == f"{model.run}/teacher"
        ratio = report.headline_speedup(model.name)
        assert ratio is not None
        assert ratio.model == model.name
    assert [r.name for r in report.runs] == ["a", "b"]
    assert [r.path for r in report.raw] == [
        "../a/stages/profile/profile.json", "../b/stages/profile/profile.json",
    ]  # fmt: skip
    page = (out / "report.html").read_text()
    assert "Ratios of a student" not in page
    assert "Figures of different runs were measured at different times and are not paired" in page
    assert "ratios of medians, not paired" in page


def test_a_merged_report_is_a_source_too(tmp_path: Path) -> None:
    runs = [finished_run(tmp_path / name) for name in "ab"]
    both = report_of(runs, out=tmp_path / "both", overwrite=False)
    again = report_of([both, runs[0]], out=tmp_path / "again", overwrite=False)
    report = Report.of(json.loads((again / "report.json").read_text()))
    assert report.models[0].name == "both/a/teacher"
    assert len(report.models) == 9
    # Whose teacher is whose stays as it was.
    teachers = {m.name: of.name for m in report.students if (of := report.teacher_of(m))}
    assert teachers["both/b/width"] == "both/b/teacher"
    assert teachers["a/depth"] == "a/teacher"
    assert [r.name for r in report.runs] == ["both/a", "both/b", "a"]
    runs_of = {m.run for m in report.models}
    assert runs_of == {"both/a", "both/b", "a"} == {r.run for r in report.raw}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "All runs have the same teacher (sha256 11111111"),
        ({"teacher": "2" * 64}, "The runs' teachers differ (sha256 a 11111111"),
        ({"teacher": None}, "Whether the teachers are the same is not known"),
        ({"hardware": {"cpu": "Another"}}, "measured on different machines"),
        ({"engines": {"vllm": {"vllm": "0.33.0"}}}, "vllm was not the same"),
    ],
)
def test_what_keeps_runs_apart_is_said(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    from paretron_profiling.report.sources import Source, merged

    other = dict(changes)
    teacher = other.pop("teacher", "1" * 64)
    content = merged(
        [
            Source("a", example_report(), "0" * 64, "1" * 64),
            Source("b", example_report(**other), "0" * 64, teacher),
        ]
    )
    assert any(said in caption for caption in content["captions"])
    page = build_report(Report.of(content))
    assert ("on 2 different machines: a speed says" in page) == ("hardware" in changes)
    alike = merged([Source(n, example_report(), "0" * 64, "1" * 64) for n in "ab"])
    assert changes == {} or not any(said in caption for caption in alike["captions"])


def test_folders_of_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = [finished_run(tmp_path / i / "run") for i in "xy"]
    out = report_of(runs, out=tmp_path / "out", overwrite=False)
    report = Report.of(json.loads((out / "report.json").read_text()))
    assert {m.run for m in report.models} == {"run-1", "run-2"}
    runs.append(finished_run(tmp_path / "z/run-2"))
    out = report_of(runs, out=tmp_path / "three", overwrite=False)
    report = Report.of(json.loads((out / "report.json").read_text()))
    assert [r.name for r in report.runs] == ["run-1", "run-3", "run-2"]


def test_a_profile_alone_becomes_a_page(tmp_path: Path) -> None:
    source = profiled(tmp_path / "p")
    assert not stands_alone([source])
    out = report_of([source], out=tmp_path / "out", overwrite=False)
    report = Report.of(json.loads((out / "report.json").read_text()))
    assert [m.kind for m in report.models] == ["teacher", "profiled", "profiled"]
    assert report.models[0].params is None
    assert report.raw[0].path == "../p/profile.json"
    page = (out / "report.html").read_text()
    assert "this report knows of no losses" in page
    assert 'id="sizes"' not in page
    assert 'id="choosing"' in page
    both = report_of([source, finished_run(tmp_path / "a")], out=tmp_path / "b", overwrite=False)
    assert len(Report.of(json.loads((both / "report.json").read_text())).models) == 6


def test_a_profile_without_a_teacher_names_the_fastest(tmp_path: Path) -> None:
    content = example_profile()
    content["models"] = {f"m{i}": m for i, m in enumerate(content["models"].values())}
    content["speedup"] = []
    source = profiled(tmp_path / "p", **content)
    out = report_of([source], out=tmp_path / "out", overwrite=False)
    assert "m2 is the fastest at 1,2" in (out / "report.md").read_text().splitlines()[0]


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda f: f.mkdir(), "input.missing"),
        (lambda f: profiled(f, schema="profile.v9"), "input.config"),
        (lambda f: profiled(f, models={"m": [{"engine": "e"}]}), "input.config"),
    ],
)
def test_what_is_no_report_is_refused(tmp_path: Path, make: Any, code: str) -> None:
    make(tmp_path / "x")
    with pytest.raises(ParetronError) as caught:
        report_of([tmp_path / "x"], out=tmp_path / "out", overwrite=False)
    assert caught.value.problems[0].code.value == code
    assert not (tmp_path / "out").exists()


def at(*path: str | int, value: Any) -> Any:
    def changed(content: dict[str, Any]) -> None:
        place: Any = content
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value

    return changed


ODD: dict[str, Any] = {
    "no text": at("hardware", "cpu", value="\ud800"),
    "more tokens than values": lambda c: c["curves"][0]["tokens"].append(9),
    "a list of rates": at("device", value={"flop_s": [1]}),
    "a load beyond any": at("models", 0, "speed", 0, "load", value=1e308),
    "a number beyond any": at("models", 0, "params", value=10**400),
    "a time beyond any": at("created", value="9999-12-31T23:59:59-23:00"),
    "a workload of no kind": at("roofline", "rows", 0, "mode", value="weird"),
}


@pytest.mark.parametrize("odd", ODD)
def test_what_a_schema_does_not_see_is_no_traceback(tmp_path: Path, odd: str) -> None:
    run = finished_run(tmp_path / "run")
    path = run / "report/report.json"
    write_manifest(run / "report", Provenance(kind="report"))
    content = json.loads(path.read_text())
    ODD[odd](content)
    path.write_text(json.dumps(content))
    page = (run / "report/report.html").read_bytes()
    for make in (
        lambda: rewrite_report(run),
        lambda: report_of([run], out=tmp_path / "out", overwrite=False),
    ):
        with pytest.raises(ParetronError) as caught:
            make()
        (problem,) = caught.value.problems
        assert problem.code is Code.INPUT_CONFIG
        assert str(run) in str(problem.where)
    assert (run / "report/report.html").read_bytes() == page
    assert not (tmp_path / "out").exists()


def test_a_profile_of_many_raw_times_is_read(tmp_path: Path) -> None:
    """A loop of a thousand requests leaves more than the 20 MB that a config may have."""
    source = profiled(tmp_path / "p", notes=["x" * 21_000_000])
    out = report_of([source], out=tmp_path / "out", overwrite=False)
    assert (out / "report.html").is_file()


def test_several_sources_need_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ParetronError, match="folder of its own"):
        report_of([tmp_path, tmp_path], out=None, overwrite=False)
    with pytest.raises(ParetronError, match="no report"):
        rewrite_report(tmp_path)


class Seen(HTMLParser):
    """The elements and the text of rendered Markdown."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def rendered(text: str) -> Seen:
    seen = Seen()
    seen.feed(
        MarkdownIt("commonmark", {"html": True, "linkify": False}).enable("table").render(text)
    )
    return seen


@pytest.mark.parametrize(
    "name",
    [
        HOSTILE,
        "- list",
        "1. one",
        "a|b",
        "<!-- c -->",
        "![i](x)",
        "&lt;",
        "~~s~~",
        "a\\",
        "===",
        "$x$",
    ],
)
def test_e11_markdown_shows_names_as_they_are(name: str) -> None:
    seen = rendered(
        f"| {escaped(name)} | b |\n| --- | --- |\n| {escaped(name)} | c |\n\n{escaped(name)}"
    )
    one_line = " ".join(name.split())
    assert seen.text.replace("\u200b", "").count(one_line) == 3
    assert seen.tags <= {"table", "thead", "tbody", "tr", "th", "td", "p"}


def test_e11_a_merged_report_of_hostile_names(tmp_path: Path) -> None:
    runs = []
    for run in ("a", "<i>b\n"):
        content = example_report(title=HOSTILE, captions=[HOSTILE])
        content["models"][1] |= {"name": HOSTILE, "loss": {"pruned": math.nan, "final": math.inf}}
        content["models"][1]["tasks"] = {HOSTILE: content["models"][1]["tasks"]["blimp"]}
        for rows in (content["speedup"], content["goals"], content["roofline"]["rows"]):
            for row in rows:
                row["model"] = HOSTILE if row["model"] == "width" else row["model"]
        (tmp_path / run / "report").mkdir(parents=True)
        write_report(content, out=tmp_path / run / "report")
        runs.append(tmp_path / run)
    out = report_of(runs, out=tmp_path / "out", overwrite=False)
    written = json.loads((out / "report.json").read_text(), parse_constant=pytest.fail)
    assert written["models"][1]["name"] == f"a/{HOSTILE}"
    assert written["models"][1]["loss"] == {"pruned": None, "final": None}
    page = (out / "report.html").read_text()
    assert "<script>window.hacked" not in page
    assert "<i>b" not in page
    text = (out / "report.md").read_text()
    seen = rendered(text)
    assert seen.tags <= {
        "h1", "h2", "h3", "p", "ul", "li", "table", "thead", "tbody", "tr", "th", "td",
    }  # fmt: skip
    assert "window.hacked=1" in seen.text
    assert "nan" not in text.lower().replace("finance", "")


def test_markdown_has_the_tables_and_the_verdict() -> None:
    report = Report.of(example_report())
    seen = rendered(markdown(report))
    page = build_report(report)
    for said in (
        "depth is 1.87× faster, width is better at +0.11 nats", "at least 1.5 times", "blimp",
        "Rules of comparison", "16 in flight", "arithmetic", "2.06×",
    ):  # fmt: skip
        assert said in seen.text, said
        assert said in page, said


def _accuracy(**values: float) -> Accuracy:
    found = {n: Interval(v, v - 0.1, v + 0.1) for n, v in values.items()}
    return Accuracy("loss", "loss", "", False, found)


def _speeds(**values: float) -> dict[str, Interval]:
    return {n: Interval(v, v - 1, v + 1) for n, v in values.items()}


@pytest.mark.parametrize(
    ("speeds", "losses", "found"),
    [
        ({"a": 10, "b": 20}, {"a": 3.0, "b": 4.0}, []),
        ({"a": 10, "b": 20}, {"a": 4.0, "b": 3.0}, [Dominated("a", "b", True, True, True)]),
        ({"a": 10, "b": 11}, {"a": 4.0, "b": 3.0}, [Dominated("a", "b", True, True, False)]),
        ({"a": 10, "b": 20}, {"a": 3.05, "b": 3.0}, [Dominated("a", "b", True, True, False)]),
        ({"a": 10, "b": 20}, {"a": 3.0, "b": 3.0}, [Dominated("a", "b", True, False, True)]),
        ({"a": 10, "b": 10}, {"a": 4.0, "b": 3.0}, [Dominated("a", "b", False, True, True)]),
        ({"a": 10, "b": 10}, {"a": 3.0, "b": 3.0}, []),
        ({"a": 10, "b": 20, "c": 30}, {"a": 4.0, "b": 3.0, "c": 3.5},
         [Dominated("a", "b", True, True, True)]),
    ],
)  # fmt: skip
def test_who_is_dominated(
    speeds: dict[str, float], losses: dict[str, float], found: list[Dominated]
) -> None:
    order = list(speeds)
    assert dominated(_speeds(**speeds), _accuracy(**losses), order=order) == found
    higher = Accuracy(
        "task.x", "x", "", True, _accuracy(**{n: -v for n, v in losses.items()}).values
    )
    assert dominated(_speeds(**speeds), higher, order=order) == found


def test_the_frontier_in_words() -> None:
    content = example_report()
    width = content["models"][1]
    width["loss"]["final"] = 3.7  # width: slower and worse than depth
    width["texts"] = {"validation": {"loss": 3.7, "low": 3.69, "high": 3.71}}
    said = "width is dominated: depth is faster and better"

    def words() -> tuple[str, ...]:
        report = Report.of(content)
        work = headline_workload(report)
        assert work is not None
        return frontier_words(throughputs(report, work), accuracies(report)[0], report=report)

    assert words() == ("teacher and depth are on the frontier.", f"{said}.")
    width["texts"]["validation"] |= {"low": 3.5, "high": 3.9}
    assert words()[1] == f"{said}, within the noise."
    width["texts"] = {}
    assert words()[1] == f"{said}, by medians of unknown spread."
    width["texts"] = {"validation": {"loss": 3.7, "low": 3.69, "high": 3.71}}
    for model in content["models"]:
        for speed in model["speed"]:
            speed["repeats"] = 1
    assert words()[1] == f"{said}, by medians of unknown spread."


def test_perplexities_are_known_as_well_as_losses() -> None:
    content = example_report()
    for model, high in zip(content["models"], (3.5, 3.9, 3.9), strict=True):
        model["perplexity"] = {"validation": math.exp(3.4)}
        model["texts"] = {"validation": {"loss": 3.4, "low": 3.3, "high": high}}
    found = {a.key: a for a in accuracies(Report.of(content))}["perplexity.validation"]
    assert found.values["teacher"].high == pytest.approx(math.exp(3.5))
    assert found.values["width"].low == pytest.approx(math.exp(3.3))


def test_who_dominates_for_sure_is_named_first() -> None:
    speeds = _speeds(a=10.0, b=10.5, c=20.0)
    (first, *_) = dominated(speeds, _accuracy(a=4.0, b=3.0, c=3.5), order="abc")
    assert first == Dominated("a", "c", True, True, True)


def command(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str]:
    """What the command line returns and prints."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as done:
        main(["report", *map(str, arguments)])
    return int(done.value.code or 0), capsys.readouterr().out


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = (finished_run(tmp_path / name) for name in "ab")
    write_manifest(one / "report", Provenance(kind="report"))
    assert command(capsys, one) == (0, f"report: {one / 'report/report.html'}\n")
    assert command(capsys, one, other)[0] == 2  # no --out
    code, said = command(capsys, one, other, "--out", tmp_path / "out", "--json")
    assert code == 0
    assert [r["name"] for r in json.loads(said)["runs"]] == ["a", "b"]
    assert command(capsys, one, other, "--out", tmp_path / "out")[0] != 0  # it is there
    assert command(capsys, one, other, "--out", tmp_path / "out", "--overwrite")[0] == 0
    assert command(capsys, one, "--require-goals")[0] == 5
    assert command(capsys, one, "--out", one / "stages")[0] == 2  # inside of what is read
