"""Group I, what shows only when a model is used: its bytes, its tokenizer, where results go."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from faults.broken import EMBEDDING, NORM, RECIPE, set_config, set_json, set_weights, weights
from faults.conftest import Cli, Outcome, Refused
from makers import PicoMaker
from paretron.artifacts.manifest import Provenance, write_manifest
from paretron.artifacts.reader import SINGLE, Checkpoint
from paretron.errors import Code
from picoscores import random_scores


@pytest.fixture
def scores(tmp_path: Path) -> Callable[[Path], Path]:
    def make(model: Path) -> Path:
        folder = tmp_path / "scores"
        folder.mkdir()
        random_scores(Checkpoint.open(model)).save(folder)
        return folder

    return make


def flip_a_bit(file: Path, *, at: int = -100) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("verb", ["verify", "prune"])
def test_i2_a_flipped_bit_where_the_sum_is_known(
    verb: str, pico: PicoMaker, scores: Callable[[Path], Path], refused: Refused, tmp_path: Path
) -> None:
    folder = pico()
    write_manifest(folder, Provenance(kind="student"))
    given = scores(folder)
    flip_a_bit(folder / SINGLE)
    arguments = {
        "verify": (folder,),
        "prune": (folder, "--scores", given, "--hidden", "48", "--out", tmp_path / "out"),
    }
    refused(verb, *arguments[verb], code=Code.INPUT_MANIFEST, names=SINGLE)
    assert not (tmp_path / "out").exists()


def in_a_hub_cache(folder: Path) -> Path:
    """The checkpoint as a hub's cache holds it: the weights under their own sha256."""
    from paretron.artifacts.manifest import sha256_file

    hub = folder.parent / "models--someone--some-model"
    snapshot = hub / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    (hub / "blobs").mkdir()
    folder.rename(snapshot)
    name = sha256_file(snapshot / SINGLE)
    (snapshot / SINGLE).rename(hub / "blobs" / name)
    (snapshot / SINGLE).symlink_to(f"../../blobs/{name}")
    return snapshot


def prune(cli: Cli, model: Path, given: Path, out: Path) -> Outcome:
    return cli("prune", model, "--scores", given, "--hidden", "48", "--out", out)


def test_i2_a_flipped_bit_where_the_hub_knows_the_sum(
    pico: PicoMaker, scores: Callable[[Path], Path], refused: Refused, cli: Cli, tmp_path: Path
) -> None:
    snapshot = in_a_hub_cache(pico())
    given = scores(snapshot)
    assert prune(cli, snapshot, given, tmp_path / "good").code == 0
    assert json.loads((tmp_path / "good/manifest.json").read_text())["unverified"] == ["scores"]
    flip_a_bit((snapshot / SINGLE).resolve())
    refused(
        "prune", snapshot, "--scores", given, "--hidden", "48", "--out", tmp_path / "out",
        code=Code.INPUT_CHECKSUM, names=SINGLE,
    )  # fmt: skip


def test_i2_without_a_sum_it_is_recorded_as_unverified(
    pico: PicoMaker, scores: Callable[[Path], Path], cli: Cli, tmp_path: Path
) -> None:
    folder = pico()
    given = scores(folder)
    write_manifest(given, Provenance(kind="scores"))
    flip_a_bit(folder / SINGLE)
    assert prune(cli, folder, given, tmp_path / "out").code == 0
    assert json.loads((tmp_path / "out/manifest.json").read_text())["unverified"] == ["model"]
    exported = cli("export", tmp_path / "out", "--to", "hf", "--out", tmp_path / "known")
    assert exported.code == 0, exported.err
    assert "unverified" not in (tmp_path / "known/README.md").read_text()
    exported = cli("export", folder, "--to", "hf", "--out", tmp_path / "unknown")
    assert exported.code == 0, exported.err
    card = (tmp_path / "unknown/README.md").read_text()
    assert re.search(r"- model: `[0-9a-f]{64}` \(unverified: no checksum is known of it\)\n", card)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_i15_not_a_number(
    value: float, dtype: torch.dtype, pico: PicoMaker, scores: Callable[[Path], Path],
    refused: Refused, tmp_path: Path,
) -> None:  # fmt: skip
    folder = pico()
    given = scores(folder)
    tensors = {name: tensor.to(dtype) for name, tensor in weights(folder).items()}
    tensors[NORM][5] = tensors[NORM][7] = value
    save_file(tensors, folder / SINGLE)
    refused(
        "prune", folder, "--scores", given, "--ffn", "64", "--out", tmp_path / "out",
        code=Code.INPUT_NONFINITE, names=(f"{SINGLE}: {NORM}", "2 of 64 values are NaN"),
    )  # fmt: skip
    assert not (tmp_path / "out").exists()


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def larger_tokenizer(folder: Path) -> None:
    set_weights(folder, {n: weights(folder)[n][:300] for n in (EMBEDDING, "lm_head.weight")})
    set_config(folder, vocab_size=300)


def change_tokenizer(folder: Path, **token: object) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"].append(content["added_tokens"][0] | token)
    (folder / "tokenizer.json").write_text(json.dumps(content))


def added_beyond(folder: Path) -> None:
    change_tokenizer(folder, id=320, content="<more>", special=False)


def role_beyond(folder: Path) -> None:
    change_tokenizer(folder, id=320, content="<end>")
    set_json(folder / "tokenizer_config.json", eos_token="<end>")


def declared_beyond(folder: Path) -> None:
    declared = {"9999": {"content": "<more>", "special": False}}
    set_json(folder / "tokenizer_config.json", added_tokens_decoder=declared)


def in_config(folder: Path) -> None:
    set_config(folder, eos_token_id=[1, 320])


def negative(folder: Path) -> None:
    set_config(folder, pad_token_id=-1)


def in_generation_config(folder: Path) -> None:
    set_json(folder / "generation_config.json", eos_token_id=10**6)


I22: dict[str, tuple[Callable[[Path], None], Code, str]] = {
    "I22-no-tokenizer": (no_tokenizer, Code.INPUT_TOKENIZER, "no tokenizer.json"),
    "I22-larger": (larger_tokenizer, Code.INPUT_TOKENIZER, "the embedding has 300 rows"),
    "I22-added": (added_beyond, Code.INPUT_TOKENIZER, "'<more>' has number 320"),
    "I22-role": (role_beyond, Code.INPUT_TOKENIZER, "'<end>' has number 320"),
    "I22-declared": (declared_beyond, Code.INPUT_TOKENIZER, "'<more>' has number 9999"),
    "I22-config": (in_config, Code.INPUT_CONFIG, "eos_token_id is [1, 320]"),
    "I22-negative": (negative, Code.INPUT_CONFIG, "pad_token_id is -1"),
    "I22-generation": (in_generation_config, Code.INPUT_CONFIG, "generation_config.json"),
}


@pytest.mark.parametrize("verb", ["plan", "score", "prune", "export"])
@pytest.mark.parametrize("id", I22)
def test_i22_a_tokenizer_that_does_not_fit(
    id: str,
    verb: str,
    pico: PicoMaker,
    scores: Callable[[Path], Path],
    refused: Refused,
    cli: Cli,
    tmp_path: Path,
) -> None:
    folder = pico()
    given = scores(folder) if verb == "prune" else tmp_path
    make, code, says = I22[id]
    make(folder)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    arguments = {
        "plan": (recipe,),
        "score": (folder, "--recipe", recipe, "--out", tmp_path / "out"),
        "prune": (folder, "--scores", given, "--hidden", "48", "--out", tmp_path / "out"),
        "export": (folder, "--to", "hf", "--out", tmp_path / "out"),
    }
    if id == "I22-no-tokenizer" and verb in ("prune", "export"):
        assert "no tokenizer.json here" in cli(verb, *arguments[verb]).err  # weights are welcome
        return
    refused(verb, *arguments[verb], code=code, names=says)


def test_i22_special_tokens_without_a_role_may_lie_beyond(
    pico: PicoMaker, cli: Cli, tmp_path: Path
) -> None:
    """As in text models that keep the tokenizer of one with images."""
    folder = pico()
    change_tokenizer(folder, id=320, content="<image>")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    assert cli("plan", tmp_path / "recipe.yaml").code == 0


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 17000000\n"


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_i21_a_pointer_instead_of_a_tokenizer(
    name: str, pico: PicoMaker, scores: Callable[[Path], Path], refused: Refused, tmp_path: Path
) -> None:
    folder = pico()
    given = scores(folder)
    (folder / name).write_text(POINTER)
    says = (name, "git lfs pull")
    refused(
        "prune", folder, "--scores", given, "--hidden", "48", "--out", tmp_path / "out",
        code=Code.INPUT_LFS, names=says,
    )  # fmt: skip
    refused("export", folder, "--to", "hf", "--out", "out", code=Code.INPUT_LFS, names=says)
    if name == "tokenizer.json":
        (tmp_path / "recipe.yaml").write_text(RECIPE)
        refused("plan", tmp_path / "recipe.yaml", code=Code.INPUT_LFS, names=says)


OVERLAPS = ("model", "model/inside", ".", "link", "link/inside")


@pytest.mark.parametrize("verb", ["prune", "export", "score", "eval", "run", "profile"])
@pytest.mark.parametrize("out", OVERLAPS)
def test_i25_output_over_input(
    out: str, verb: str, pico: PicoMaker, refused: Refused, tmp_path: Path
) -> None:
    folder = pico()
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "scores").mkdir()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    arguments: dict[str, tuple[str | Path, ...]] = {
        "prune": (folder, "--scores", tmp_path / "scores", "--hidden", "48"),
        "export": (folder, "--to", "hf"),
        "score": (folder, "--recipe", recipe),
        "eval": (folder, "--recipe", recipe),
        "run": (recipe,),
        "profile": (f"teacher={folder}", "--engine", "transformers"),
    }
    refused(
        verb, *arguments[verb], "--out", tmp_path / out, "--overwrite",
        code=Code.OUT_OVERLAP, names=str(folder),
    )  # fmt: skip


@pytest.mark.parametrize("out", ["model/inside", "link/inside"])
def test_i25_a_rehearsal_inside_its_teacher(
    out: str, pico: PicoMaker, refused: Refused, tmp_path: Path
) -> None:
    folder = pico()
    (tmp_path / "link").symlink_to(folder)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    refused(
        "check", recipe, "--offline", "--out", tmp_path / out,
        code=Code.OUT_OVERLAP, names=str(folder),
    )  # fmt: skip
