"""`inspect`: what a checkpoint is, whether it is whole, what it can become, and who takes it."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import pytest

from faults.conftest import run_and_measure
from makers import PicoMaker
from paretron.artifacts.manifest import Provenance, write_manifest
from paretron.cli.main import main
from paretron.families import FAMILIES, sizes
from paretron.plan.inspection import inspect_model, prunable_axes
from paretron.plan.shapes import target_problems
from paretron.recipe import Student
from published import LLAMA, PUBLISHED, recipe_text
from sparse import sparse_checkpoint


def inspect(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["inspect", *map(str, arguments)])
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.out, said.err


@pytest.mark.parametrize("verb", ["inspect", "plan"])
def test_16_gb_are_looked_at_in_seconds(verb: str, tmp_path: Path) -> None:
    """Processor seconds: how long it takes depends on who else uses the machine."""
    model = sparse_checkpoint(tmp_path / "teacher", LLAMA)
    assert sum(p.stat().st_size for p in model.glob("*.safetensors")) > 16e9
    (tmp_path / "recipe.yaml").write_text(recipe_text(PUBLISHED[3]))
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    target = model if verb == "inspect" else tmp_path / "recipe.yaml"
    code, peak_kb, heavy = run_and_measure(verb, target)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # A small machine has no room for the run that is planned.
    assert code in ((0,) if verb == "inspect" else (0, 4))
    assert heavy == []
    assert peak_kb < 300_000
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3


def test_hashes_only_when_asked(pico: PicoMaker, capsys: pytest.CaptureFixture[str]) -> None:
    model = pico()

    def hashes(*flags: str) -> Any:
        code, out, _ = inspect(capsys, model, "--json", *flags)
        return (code, json.loads(out).get("integrity", {}).get("hashes"))

    assert hashes() == hashes("--verify") == (0, "unknown")
    write_manifest(model, Provenance(kind="student"))
    assert hashes() == (0, "unverified")
    assert hashes("--verify") == (0, "verified")
    content = bytearray((model / "model.safetensors").read_bytes())
    content[-100] ^= 1
    (model / "model.safetensors").write_bytes(content)
    assert hashes() == (0, "unverified")
    assert hashes("--verify") == (3, None)


def test_an_edited_manifest_needs_no_hash(
    pico: PicoMaker, capsys: pytest.CaptureFixture[str]
) -> None:
    model = pico()
    write_manifest(model, Provenance(kind="student"))
    path = model / "manifest.json"
    path.write_text(path.read_text().replace('"student"', '"teacher"'))
    assert inspect(capsys, model)[0] == 3


def test_a_notice_is_said_once(pico: PicoMaker, capsys: pytest.CaptureFixture[str]) -> None:
    model = pico()
    (model / "consolidated.safetensors").write_bytes(b"")
    for flags in ((), ("--json",)):
        code, out, err = inspect(capsys, model, *flags)
        assert code == 0
        (line,) = err.splitlines()
        assert line.startswith("note: ")
        assert "consolidated.safetensors" in line
    assert json.loads(out)["notices"] == [line.removeprefix("note: ")]


def test_what_a_person_reads(pico: PicoMaker, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = inspect(capsys, pico("qwen3", dtype="bfloat16", tie_word_embeddings=True))
    assert code == 0
    assert max(map(len, out.splitlines()[1:])) <= 96
    for part in ("Qwen3ForCausalLM", "BF16", "tied", "hidden 64", "64 down to 1", "vllm", "yes",
                 "4 down to 2 in multiples of 2", "there is no manifest.json"):  # fmt: skip
        assert part in out


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_prunable_is_what_a_target_may_be(family: str, pico: PicoMaker) -> None:
    found = inspect_model(pico(family))
    config = found.checkpoint.config
    size = sizes(FAMILIES[family], config)
    assert found.prunable == prunable_axes(FAMILIES[family], config, size)
    assert {"hidden", "heads", "kv_heads", "layers"} <= set(found.prunable)
    assert ("moe_ffn" in found.prunable) == ("moe_ffn" in size)
    for axis, prunable in found.prunable.items():
        for n, fits in (
            (prunable.now - prunable.multiple_of, True),
            (prunable.now - prunable.multiple_of + 1, prunable.multiple_of == 1 and None),
            (prunable.now + prunable.multiple_of, False),
            (prunable.least, True),
            (prunable.least - 1, False),
        ):
            if n < 1 or fits is None:
                continue
            problems = target_problems(
                "a", size, Student.model_validate({axis: n}), family=FAMILIES[family], config=config
            )
            assert (problems == []) == fits, (axis, n, problems)
