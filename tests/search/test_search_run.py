"""A search inside a whole run, alone, killed and gone on with, and refused before any work."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import xml.dom.minidom
from pathlib import Path
from typing import Any

import pytest

from paretron.artifacts.manifest import verify
from picorun import events, paretron, write_pico_recipe

SEARCH: dict[str, Any] = {
    "space": {"hidden": [48, 56, 64], "ffn": {"from": 32, "to": 96, "multiple": 16},
              "layers": [2, 3, 4]},
    "budget": {"params": 1.2e5},
    "samples": 4, "keep": 3, "rounds": [256, 512],
}  # fmt: skip
LITTLE: dict[str, Any] = {"correct": None, "profile": None, "export": [{"to": "hf"}]}


def recipe_of(folder: Path, search: dict[str, Any], **changes: Any) -> Path:
    return write_pico_recipe(folder, students={"best": {"search": search}}, **(LITTLE | changes))


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A recipe's folder after `paretron search` ran in it, and what it printed."""
    folder = tmp_path_factory.mktemp("searched")
    recipe_of(folder, SEARCH)
    done = paretron("search", "recipe.yaml", "--out", "run", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


def test_a_search_alone_chooses_within_the_budget(
    searched: tuple[Path, dict[str, Any]],
) -> None:
    folder, printed = searched
    found = printed["searches"]["best"]
    artifact = folder / "run/stages/best.search"
    verify(artifact)
    assert json.loads((artifact / "search.json").read_text()) == found
    rows = found["candidates"]
    assert all(row["costs"]["params"] <= 1.2e5 for row in rows)
    kinds = [(r["sizes"]["hidden"], r["sizes"]["layers"]) for r in rows]
    assert len(kinds) == len(set(kinds))  # the widest MLP of each
    (chosen,) = [row for row in rows if row["chosen"]]
    assert chosen == rows[0]
    assert chosen["sizes"] == found["choice"]
    trained = [row for row in rows if row["rounds"]]
    assert sorted(len(row["rounds"]) for row in trained) == [1, 2, 2]
    assert chosen["rounds"][-1] == min(r["rounds"][1] for r in trained if len(r["rounds"]) == 2)
    assert not (folder / "run/stages/best.prune").exists()
    assert not (folder / "run/state/best.search").exists()


def test_the_page_and_the_picture_hold_every_candidate(
    searched: tuple[Path, dict[str, Any]],
) -> None:
    folder, printed = searched
    artifact = folder / "run/stages/best.search"
    rows = printed["searches"]["best"]["candidates"]
    picture = xml.dom.minidom.parse(str(artifact / "frontier.svg"))
    trained = sum(bool(row["rounds"]) for row in rows)
    assert len(picture.getElementsByTagName("circle")) == len(rows) + trained + 4  # the legend
    page = (artifact / "search.html").read_text()
    assert all(row["words"] in page for row in rows)
    assert page.count("<tr") == len(rows) + 1


def test_a_run_goes_on_from_it_with_the_shape_that_was_chosen(
    searched: tuple[Path, dict[str, Any]],
) -> None:
    folder, printed = searched
    done = paretron("run", "recipe.yaml", "--out", "run", cwd=folder)
    assert done.returncode == 0, done.stderr
    reused = {e["stage"] for e in events(folder / "run") if e["kind"] == "reused"}
    assert {"data", "score", "best.shapes", "best.search"} <= reused
    choice = printed["searches"]["best"]["choice"]
    config = json.loads((folder / "run/stages/best.distill/config.json").read_text())
    assert config["hidden_size"] == choice["hidden"]
    assert config["num_hidden_layers"] == choice["layers"]
    assert config["intermediate_size"] == choice["ffn"]
    (model,) = json.loads((folder / "run/report/report.json").read_text())["models"][1:]
    assert model["kind"] == "searched"


def test_killed_and_run_again_it_ends_the_same(
    searched: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, printed = searched
    journal = tmp_path / "run/state/best.search/journal.jsonl"
    command = [sys.executable, "-m", "paretron", "search", str(folder / "recipe.yaml")]
    command += ["--out", str(tmp_path / "run"), "-q"]
    seen = 0
    for wanted in (3, len(printed["searches"]["best"]["candidates"]) + 2):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None:
            lines = journal.read_text().count("\n") if journal.is_file() else 0
            if lines >= wanted:
                os.kill(process.pid, signal.SIGKILL)
                break
            time.sleep(0.005)
        process.wait()
        assert journal.is_file()
        lines = journal.read_text().count("\n")
        assert lines > seen
        seen = lines
    with journal.open("a") as f:
        f.write('{"step": "rank", "key": "cut')  # as if killed while writing
    done = paretron(*command[3:], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run/stages/best.search/search.json").read_text())
    assert result == printed["searches"]["best"]


def test_plan_shows_the_space_and_refuses_what_it_cannot_reach(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, SEARCH)
    done = paretron("plan", recipe, "--json")
    assert done.returncode == 0, done.stdout
    plan = json.loads(done.stdout)
    assert plan["searches"]["best"]["shapes"] == 3 * 5 * 3 - 1
    assert plan["searches"]["best"]["candidates"] > 3
    assert plan["searches"]["best"]["smallest"]["params"] < plan["students"]["best"]["params"]
    assert plan["students"]["best"]["params"] <= 120_000
    names = [stage["name"] for stage in plan["stages"]]
    assert names.index("best.shapes") < names.index("data") < names.index("best.search")
    key = "students.best.search"
    done = paretron("search", recipe, "--set", f"{key}.budget.params=3e4", "--out", "run")
    assert done.returncode == 2
    assert "nearest reachable: params" in done.stderr
    assert "layers 2, hidden 48, ffn 32" in done.stderr
    assert not (tmp_path / "run").exists()
    done = paretron("plan", recipe, "--set", f"{key}.max_candidates=2")
    assert f"{key}.max_candidates" in done.stderr


def test_a_budget_of_speed_is_timed_first(tmp_path: Path) -> None:
    search = SEARCH | {
        "space": {"hidden": [48, 64], "layers": [1, 4]},
        "budget": {"speed": {"ms": 1e6, "lengths": [8, 4], "repeats": 1}},
        "rounds": [],
    }
    recipe = recipe_of(tmp_path, search)
    done = paretron("search", recipe, "--out", "run", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["searches"]["best"]
    assert all(row["costs"]["ms"] > 0 for row in found["candidates"])
    assert (tmp_path / "run/stages/best.shapes/table.json").is_file()
    out = ("--out", str(tmp_path / "other"))
    faster = ("--set", "students.best.search.budget.speed.ms=0.001")
    done = paretron("search", recipe, *out, *faster, cwd=tmp_path)
    assert done.returncode == 2
    assert "nearest reachable" in done.stderr
    assert not (tmp_path / "other/stages/score").exists()  # said before anything is scored
    # A table from elsewhere gives the candidates at plan time.
    table = "students.best.search.budget.speed.table=run/stages/best.shapes/table.json"
    done = paretron("plan", recipe, "--json", "--set", table)
    assert json.loads(done.stdout)["searches"]["best"]["candidates"] == len(found["candidates"])


def test_a_rehearsal_searches_on_the_twin(tmp_path: Path) -> None:
    search = SEARCH | {"budget": SEARCH["budget"] | {"speed": {"ms": 1e6, "lengths": [8, 4]}}}
    recipe = recipe_of(tmp_path, search)
    done = paretron("check", recipe)
    assert done.returncode == 0, done.stderr


def test_without_a_search_there_is_nothing_to_do(tmp_path: Path) -> None:
    recipe = write_pico_recipe(tmp_path, **LITTLE)
    done = paretron("search", recipe)
    assert done.returncode == 2
    assert "no student" in done.stderr
