from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from faults.fakehub import DATASET, FakeHub, serve
from makers import PicoMaker
from paretron.cli.main import _run
from paretron.data import datasets
from paretron.data.datasets import find_dataset
from paretron.data.sources import read_documents
from paretron.errors import Code, ParetronError, Problem
from paretron.recipe import TextSource
from picorun import RECIPE

FIRST, SECOND = "1" * 40, "2" * 40
CARD = """---
license: mit
configs:
- config_name: plain
  data_files:
  - split: train
    path: plain/train-*.jsonl
  - {split: test, path: [plain/test.jsonl]}
- config_name: raw
  default: true
  data_files: [{split: train, path: "raw/**/*.jsonl"}, {split: odd, path: raw.csv}]
---
# Texts
"""
FILES = {
    "README.md": CARD,
    "plain/train-00000-of-00003.jsonl": '{"text": "one"}\n',
    "plain/train-00001-of-00003.jsonl": '{"text": "two"}\n',
    "plain/train-00002-of-00003.jsonl": '{"text": "three"}\n',
    "plain/test.jsonl": '{"text": "held out"}\n',
    "raw/a/b.jsonl": '{"text": "raw"}\n',
    "raw.csv": "text\nx\n",
    "script.py": "raise SystemExit('code of a dataset was run')\n",
}


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub with a dataset of two commits, which this process's client asks."""
    second = FILES | {"plain/test.jsonl": '{"text": "another"}\n'}
    commits = {FIRST: write(tmp_path / "1", FILES), SECOND: write(tmp_path / "2", second)}
    hub = FakeHub(commits, kind="datasets")
    with serve(hub) as address:
        for module in ("constants", "file_download", "hf_api", "_snapshot_download"):
            for name, value in (
                ("HF_HUB_CACHE", str(tmp_path / "cache")), ("ENDPOINT", address),
                ("HF_HUB_OFFLINE", False), ("HF_HUB_DISABLE_XET", True),
            ):  # fmt: skip
                monkeypatch.setattr(f"huggingface_hub.{module}.{name}", value, raising=False)
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
                            address + "/{repo_id}/resolve/{revision}/{filename}")  # fmt: skip
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", address, raising=False)
        yield hub


def source(**keys: str) -> TextSource:
    return TextSource.model_validate({"dataset": DATASET, "revision": FIRST} | keys)


def refusal(keys: dict[str, str], *, offline: bool = False) -> Problem:
    with pytest.raises(ParetronError) as caught:
        list(read_documents(source(**keys), offline=offline))
    return caught.value.problems[0]


def test_the_card_says_which_files_a_split_has(hub: FakeHub) -> None:
    documents = read_documents(source(config="plain"), offline=False)
    assert list(documents) == ["one", "two", "three"]
    assert list(read_documents(source(config="plain", split="test"), offline=False)) == ["held out"]
    assert list(read_documents(source(), offline=False)) == ["raw"]  # the card's default
    assert not any(path.endswith(".py") for path in hub.asked)


def test_only_the_files_that_are_needed_are_downloaded(hub: FakeHub) -> None:
    documents = read_documents(source(config="plain"), offline=False)
    assert next(documents) == "one"
    data = [path for path in hub.asked if "/resolve/" in path and path.endswith(".jsonl")]
    assert data
    assert all("train-00000" in path for path in data)


def test_a_commit_stays_when_main_moves(hub: FakeHub) -> None:
    moving = TextSource(dataset=DATASET, config="plain", split="test")
    found = find_dataset(moving, offline=False)
    assert found.commit == FIRST
    assert find_dataset(moving, offline=False).commit == SECOND
    assert list(read_documents(moving, offline=False)) == ["another"]
    assert list(read_documents(moving, offline=True)) == ["another"]
    pinned = source(config="plain", split="test", revision=found.commit)
    assert list(read_documents(pinned, offline=False)) == ["held out"]


def test_offline_reads_the_cache_alone(hub: FakeHub) -> None:
    problem = refusal({"config": "plain"}, offline=True)
    assert problem.code is Code.INPUT_OFFLINE
    assert DATASET in problem.where
    assert hub.asked == []
    assert len(list(read_documents(source(config="plain"), offline=False))) == 3
    hub.asked.clear()
    assert list(read_documents(source(config="plain"), offline=True)) == ["one", "two", "three"]
    assert hub.asked == []


def test_offline_a_card_alone_is_not_the_dataset(hub: FakeHub) -> None:
    find_dataset(source(config="plain", split="test"), offline=False)
    problem = refusal({"config": "plain", "split": "test"}, offline=True)
    assert problem.code is Code.INPUT_OFFLINE
    assert DATASET in problem.where


def test_offline_a_part_of_the_files_is_not_taken_for_all(hub: FakeHub) -> None:
    documents = read_documents(source(config="plain"), offline=False)
    assert [next(documents), next(documents)] == ["one", "two"]
    offline = read_documents(source(config="plain"), offline=True)
    assert [next(offline), next(offline)] == ["one", "two"]  # which may be all that is wanted
    with pytest.raises(ParetronError) as caught:
        next(offline)
    assert caught.value.problems[0].code is Code.INPUT_OFFLINE
    assert "train-00002-of-00003" in caught.value.problems[0].where


@pytest.mark.parametrize(
    ("keys", "cause", "fix"),
    [
        ({"config": "none"}, "no config 'none'", "plain, raw"),
        ({"config": "plain", "split": "dev"}, "no split 'dev'", "test, train"),
        ({"split": "odd"}, "raw.csv cannot be read", "refs/convert/parquet"),
    ],
)
def test_what_a_dataset_lacks_is_named_with_what_it_has(
    hub: FakeHub, keys: dict[str, str], cause: str, fix: str
) -> None:
    problem = refusal(keys)
    assert problem.code is Code.INPUT_CORPUS
    assert cause in problem.cause
    assert problem.where.startswith(f"{DATASET}@")
    assert fix in problem.fix


def test_a_dataset_that_is_not_there_is_told_in_our_words(hub: FakeHub) -> None:
    with pytest.raises(ParetronError) as caught:
        find_dataset(TextSource(dataset="someone/else"), offline=False)
    assert caught.value.problems[0].code in (Code.INPUT_MISSING, Code.INPUT_OFFLINE)
    assert "someone/else" in caught.value.problems[0].where


def test_a_card_that_is_no_yaml_is_named(hub: FakeHub) -> None:
    write(hub.commits[FIRST], {"README.md": "---\nconfigs: [\n---\n"})
    problem = refusal({})
    assert problem.code is Code.INPUT_FILE
    assert "card" in problem.cause


@pytest.mark.parametrize(
    ("names", "keys", "wanted"),
    [
        (["train.jsonl", "test.jsonl"], {}, ["train.jsonl"]),
        (["data/train-00000-of-00001.parquet", "data/validation-00000-of-00001.parquet"],
         {"split": "validation"}, ["data/validation-00000-of-00001.parquet"]),
        (["default/train/0000.parquet", "default/test/0000.parquet"], {},
         ["default/train/0000.parquet"]),
        (["en/train/0000.parquet", "de/train/0000.parquet"], {"config": "de"},
         ["de/train/0000.parquet"]),
        (["b.jsonl", "a.jsonl.gz", "script.py"], {}, ["a.jsonl.gz", "b.jsonl"]),
        (["en/train.jsonl", "de/train.jsonl"], {}, "several folders of data"),
        (["en/train.jsonl"], {"config": "de"}, "no config 'de'"),
        (["train.jsonl"], {"split": "test"}, "no split 'test'"),
        (["train.csv"], {}, "no file of split 'train'"),
    ],
)  # fmt: skip
def test_without_a_card_names_say_it(
    monkeypatch: pytest.MonkeyPatch,
    names: list[str],
    keys: dict[str, str],
    wanted: list[str] | str,
) -> None:
    from paretron.artifacts.hub import DatasetContents

    contents = DatasetContents(FIRST, tuple(names), {})
    monkeypatch.setattr(datasets, "dataset_contents", lambda *_, **__: contents)
    if isinstance(wanted, str):
        with pytest.raises(ParetronError, match=wanted):
            find_dataset(source(**keys), offline=False)
    else:
        assert list(find_dataset(source(**keys), offline=False).names) == wanted


@pytest.mark.parametrize("verb", ["score", "prune", "correct", "distill", "capture", "eval"])
def test_a_verb_told_to_be_offline_asks_nobody(
    verb: str, hub: FakeHub, pico: PicoMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = pico()
    text = {"dataset": DATASET, "config": "plain", "tokens": 64, "seq_len": 16}
    data = {"calibration": text | {"samples": 2}, "train": text, "validation": text}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        json.dumps(RECIPE | {"data": data, "export": [{"to": "hf"}], "profile": None})
    )
    other = {
        "prune": ["--scores", tmp_path, "--ffn", "32"],
        "distill": ["--teacher", model],
        "capture": ["--teacher", model, "--capture"],
    }.get(verb, [])
    subject = [] if verb == "capture" else [model]
    name = "distill" if verb == "capture" else verb
    command = [name, *subject, *other, "--recipe", recipe, "--out", tmp_path / "out", "--offline"]
    assert _run([str(word) for word in command]) == 3
    assert DATASET in capsys.readouterr().err
    assert hub.asked == []
    if verb == "eval":  # told nothing, it does ask
        _run([str(word) for word in command[:-1]])
        assert hub.asked
