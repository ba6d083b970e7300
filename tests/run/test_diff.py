"""What differs is said by part and key, what only noise tells apart is said to be that."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from makers import PicoMaker
from paretron.artifacts.jsonfile import dump
from paretron.artifacts.manifest import Provenance, write_manifest
from paretron.cli.main import main
from paretron.errors import Code, ParetronError
from paretron.run.diff import Diff, Difference, diff
from picorun import RECIPE
from report_example import example_report


def of(found: Diff, part: str) -> dict[str, Difference]:
    return {d.key: d for d in found.differences.get(part, ())}


def a_run(folder: Path, model: Path, *, report: dict[str, Any], **recipe: Any) -> Path:
    """A run's folder as a finished run leaves it, with one stage."""
    stage = folder / "stages" / "width.distill"
    shutil.copytree(model, stage)
    write_manifest(stage, Provenance(kind="distill"))
    (folder / "report").mkdir()
    dump(folder / "report/report.json", report)
    dump(folder / "plan.json", {})
    dump(folder / "recipe.json", RECIPE | recipe)
    return folder


@pytest.fixture
def runs(pico: PicoMaker, tmp_path: Path) -> tuple[Path, Path]:
    """Two runs that differ in the learning rate, the weights, a loss, a goal and a speed."""
    one, other = example_report(), example_report()
    goal = {"model": "width", "figure": "params", "text": "at most 1", "verdict": "met"}
    one["goals"], other["goals"] = [goal], [goal | {"verdict": "missed"}]
    model = other["models"][1]
    model["params"] *= 2
    model["texts"] = {"validation": {"loss": 3.6, "low": 3.5, "high": 3.7}}
    one["models"][1]["texts"] = {"validation": {"loss": 3.4, "low": 3.3, "high": 3.45}}
    for k, (factor, apart) in enumerate(((1.001, False), (9.0, True))):
        speed = model["speed"][k]
        assert speed["output_tok_s"] is not None, apart
        speed["output_tok_s"] *= factor
        for known in ("ranges", "intervals"):
            if "output_tok_s" in speed.get(known, {}):
                speed[known]["output_tok_s"] = [factor * v for v in speed[known]["output_tok_s"]]
    distill = RECIPE["distill"] | {"lr": 2e-3}
    return (
        a_run(tmp_path / "one", pico(), report=one),
        a_run(tmp_path / "other", pico(name="other-model", seed=1), report=other, distill=distill),
    )


def test_two_runs(runs: tuple[Path, Path]) -> None:
    found = diff(*runs)
    assert found.a.kind == "run"
    assert not found.same
    assert of(found, "recipe") == {
        "distill.lr": Difference("distill.lr", 1e-3, 2e-3, 2.0, apart=True)
    }
    assert list(of(found, "weights")) == ["width.distill/model.safetensors"]
    sizes = of(found, "sizes")
    assert sizes.keys() == {"width.params"}
    assert sizes["width.params"].ratio == 2
    assert of(found, "losses")["width.validation"].apart
    (goal,) = of(found, "goals").values()
    assert (goal.key, goal.a, goal.b) == ("width: params", "met", "missed")
    speeds = list(of(found, "speeds").values())
    assert [d.apart for d in speeds] == [False, True]
    assert speeds[0].key.startswith("width, ortgenai, offline 1, 128+128: output_tok_s")
    assert "shapes" in found.compared
    assert "shapes" not in found.differences
    assert found.compared["speeds"] > 20


def test_noise_alone_is_no_difference(runs: tuple[Path, Path]) -> None:
    report = json.loads((runs[0] / "report/report.json").read_text())
    assert diff(runs[0], runs[0]).differences == {}
    speed = report["models"][1]["speed"][0]
    speed["output_tok_s"] = sum(speed["ranges"]["output_tok_s"]) / 2
    dump(runs[0].parent / "report.json", report)
    found = diff(runs[0] / "report/report.json", runs[0].parent / "report.json")
    assert (found.a.kind, found.same) == ("report", True)
    assert found.differences.keys() == {"speeds"}


@pytest.mark.parametrize(("a", "b"), [(1, 10**400), (1e-308, 1e308)])
def test_numbers_whose_ratio_no_float_holds(a: float, b: float, tmp_path: Path) -> None:
    for name, value in (("a", a), ("b", b)):
        report = example_report()
        report["models"][0]["params"] = value
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(json.dumps(report))
    found = diff(tmp_path / "a/report.json", tmp_path / "b/report.json")
    assert of(found, "sizes")["teacher.params"].ratio is None
    json.dumps(found.as_json(), allow_nan=False)


def test_a_run_without_a_report_is_compared_by_its_recipe(runs: tuple[Path, Path]) -> None:
    shutil.rmtree(runs[1] / "report")
    found = diff(*runs)
    assert found.compared.keys() == {"recipe", "weights"}
    assert "no report yet" in found.as_json()["notes"][0]


def test_two_checkpoints(pico: PicoMaker, tmp_path: Path) -> None:
    one, other = pico(), pico(name="other", hidden_size=48, dtype="bfloat16")
    write_manifest(one, Provenance(kind="prune", settings={"student": {"hidden": 64}}))
    write_manifest(other, Provenance(kind="prune", settings={"student": {"hidden": 48}}))
    found = diff(one, other)
    tensors = of(found, "tensors")
    embedding = tensors["model.embed_tokens.weight"]
    assert (embedding.a, embedding.b) == ("F32 [320, 64]", "BF16 [320, 48]")
    assert len(tensors) == found.compared["tensors"]
    assert of(found, "settings")["settings.student.hidden"].ratio == 0.75
    assert of(found, "config")["hidden_size"].b == 48
    assert "model.safetensors" in of(found, "files")


def test_equal_bytes_are_known_by_sums_and_no_weight_is_read(
    pico: PicoMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = pico()
    other = Path(shutil.copytree(one, tmp_path / "copy"))
    third = pico(name="other-model", seed=1)
    for folder in (one, other, third):
        write_manifest(folder, Provenance(kind="distill"))

    def read(*_: object, **__: object) -> None:
        pytest.fail("a weight was read")

    monkeypatch.setattr("paretron.artifacts.manifest.sha256_file", read)
    monkeypatch.setattr("paretron.artifacts.reader.map_entry", read)
    assert diff(one, other).same
    found = diff(one, third)
    assert of(found, "files").keys() == {"model.safetensors"}
    assert found.differences.keys() == {"files"}


def test_a_checkpoint_of_somebody_else(pico: PicoMaker) -> None:
    own, foreign = pico(), pico(name="foreign", num_hidden_layers=2)
    write_manifest(own, Provenance(kind="distill"))
    found = diff(own, foreign)
    assert "whether bytes are equal is not known" in found.as_json()["notes"][0]
    assert "files" not in found.compared
    gone = of(found, "tensors")["model.layers.3.mlp.up_proj.weight"]
    assert (gone.a, gone.b) == ("F32 [96, 64]", None)


def test_profiles(runs: tuple[Path, Path], tmp_path: Path) -> None:
    content = json.loads((runs[0] / "report/report.json").read_text())
    profile = {k: content[k] for k in ("speedup", "hardware", "engines", "method")}
    profile["models"] = {m["name"]: m["speed"] for m in content["models"]}
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        dump(tmp_path / name / "profile.json", profile | {"method": {"repeats": name}})
    write_manifest(tmp_path / "b", Provenance(kind="profile"))
    found = diff(tmp_path / "a/profile.json", tmp_path / "b")
    assert of(found, "method").keys() == {"repeats"}
    assert found.differences.keys() == {"method"}
    assert found.compared["speeds"] > 20


HOSTILE = {
    "nothing": (None, Code.INPUT_MISSING, "nothing is here"),
    "empty-folder": ({}, Code.INPUT_MISSING, "no run, no manifest.json"),
    "manifest-broken": ({"manifest.json": "{"}, Code.INPUT_MANIFEST, "not valid JSON"),
    "manifest-edited": ({"manifest.json": '{"files": {}}'}, Code.INPUT_MANIFEST, "was changed"),
    "recipe-broken": ({"recipe.json": "[1]", "plan.json": "{}"}, Code.INPUT_CONFIG, "not a JSON"),
    "report-other": ({"report.json": '{"models": [3]}'}, Code.INPUT_CONFIG, "not what this"),
    "report-text": (
        {"report.json": '{"models": [{"name": "a", "shape": 1}]}'}, Code.INPUT_CONFIG, "not what",
    ),
    "profile-other": ({"profile.json": '{"models": 1}'}, Code.INPUT_CONFIG, "not what this"),
    "profile-huge": (
        {"profile.json": json.dumps({"models": {"a": [{
            "engine": "e", "mode": "offline", "load": 10**400, "input_len": 1, "output_len": 1,
        }]}})}, Code.INPUT_CONFIG, "OverflowError",
    ),
    "profile-deep": ({"profile.json": "[" * 10**5}, Code.INPUT_CONFIG, "not valid JSON"),
    "other-file": ({"x.json": "{}"}, Code.INPUT_MISSING, "neither report.json nor"),
    "no-weights": ({"config.json": "{}"}, Code.INPUT_MISSING, "no safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("id", HOSTILE)
def test_what_is_none_of_these_is_an_input_error(id: str, tmp_path: Path) -> None:
    files, code, said = HOSTILE[id]
    place = tmp_path / "given"
    for name, text in (files or {}).items():
        place.mkdir(exist_ok=True)
        (place / name).write_text(text)
    if files == {}:
        place.mkdir()
    named = [n for n in files or () if n in ("report.json", "profile.json", "x.json")]
    with pytest.raises(ParetronError) as caught:
        diff(place / named[0] if named else place, place)
    assert (caught.value.problems[0].code, caught.value.exit_code) == (code, 3)
    assert said in caught.value.problems[0].cause
    assert caught.value.problems[0].fix


def test_different_kinds_are_refused(runs: tuple[Path, Path]) -> None:
    with pytest.raises(ParetronError, match=r"is a run, .* is a checkpoint") as caught:
        diff(runs[0], runs[1] / "stages/width.distill")
    assert caught.value.problems[0].code is Code.USAGE


def test_the_table_says_what_differs_and_hides_nothing_dangerous(
    runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = json.loads((runs[1] / "recipe.json").read_text())
    dump(runs[1] / "recipe.json", recipe | {"[red]x\x1b[2J": "[/] a"})
    with pytest.raises(SystemExit) as ended:
        main(["diff", *map(str, runs)])
    assert not ended.value.code
    said = capsys.readouterr().out
    assert "\x1b[2J" not in said
    assert "[red]x\\x1b[2J" in said
    assert "within noise" in said
    assert "equal: " in said
    assert "distill.lr" in said


def test_looking_is_light(runs: tuple[Path, Path]) -> None:
    program = (
        "import sys\n"
        "from paretron.cli.main import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "except SystemExit as end:\n    assert not end.code\n"
        "print(*sorted({'torch', 'transformers', 'plotly'} & set(sys.modules)))\n"
    )
    command = [sys.executable, "-c", program, "diff", *map(str, runs)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == ""
