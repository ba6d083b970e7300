"""Group I: a hostile or broken input model is refused from its headers, in words that help.

A row is a function that breaks a pico checkpoint; `inspect` and `plan` must both find it. Add one
with the decorator: its id, the code, and what the message must name.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from faults.broken import (
    NORM,
    RECIPE,
    header,
    set_config,
    set_header,
    set_map,
    set_weights,
    shard,
    two_last,
)
from faults.conftest import Refused, run_and_measure
from makers import PicoMaker
from paretron.artifacts.reader import INDEX, SINGLE, Checkpoint
from paretron.errors import Code, ParetronError

Fault = Callable[[Path], None]


@dataclass(frozen=True)
class Row:
    """One fault: how to make it, and how it must be refused."""

    id: str
    make: Fault
    code: Code
    names: tuple[str, ...]
    family: str = "llama"


ROWS: list[Row] = []


def row(id: str, code: Code, *names: str, family: str = "llama") -> Callable[[Fault], Fault]:
    """Add the function as a row of the table."""

    def add(make: Fault) -> Fault:
        ROWS.append(Row(id, make, code, names, family))
        return make

    return add


def cut(keep: Callable[[int], int]) -> Fault:
    def make(folder: Path) -> None:
        with (folder / SINGLE).open("r+b") as f:
            f.truncate(keep((folder / SINGLE).stat().st_size))

    return make


row("I1-one-byte", Code.INPUT_TRUNCATED, SINGLE)(cut(lambda size: size - 1))
row("I1-half", Code.INPUT_TRUNCATED, SINGLE)(cut(lambda size: size // 2))
row("I1-nothing-left", Code.INPUT_TRUNCATED, SINGLE)(cut(lambda size: 0))


@row("I1-shard", Code.INPUT_TRUNCATED, "model-00002-of-")
def _(folder: Path) -> None:
    _, names = shard(folder)
    with (folder / names[1]).open("r+b") as f:
        f.truncate((folder / names[1]).stat().st_size - 1)


@row("I3-garbage", Code.HEADER_JSON, SINGLE, "not valid JSON")
def _(folder: Path) -> None:
    set_header(folder, b"\xde\xad\xbe\xef", b"")


@row("I3-length", Code.HEADER_LENGTH, SINGLE, str(2**63))
def _(folder: Path) -> None:
    set_header(folder, b"{}", b"", length=2**63)


@row("I3-overlap", Code.HEADER_OVERLAP, SINGLE, "overlaps")
def _(folder: Path) -> None:
    entries, data = header(folder)
    _, last = two_last(entries)
    entries[last]["data_offsets"] = [n - 4 for n in entries[last]["data_offsets"]]
    set_header(folder, json.dumps(entries).encode(), data[:-4])


@row("I3-hole", Code.HEADER_HOLE, SINGLE, "hole")
def _(folder: Path) -> None:
    entries, data = header(folder)
    _, last = two_last(entries)
    entries[last]["data_offsets"] = [n + 4 for n in entries[last]["data_offsets"]]
    set_header(folder, json.dumps(entries).encode(), data + bytes(4))


@row("I3-trailing", Code.HEADER_TRAILING, SINGLE, "after the last tensor")
def _(folder: Path) -> None:
    with (folder / SINGLE).open("ab") as f:
        f.write(b"x")


@row("I3-duplicate", Code.HEADER_DUPLICATE, SINGLE, "twice")
def _(folder: Path) -> None:
    entries, data = header(folder)
    text = json.dumps(entries)
    set_header(folder, (text[:-1] + f', "{NORM}": {{}}}}').encode(), data)


@row("I4", Code.INPUT_INDEX, "model-00002-of-")
def _(folder: Path) -> None:
    _, names = shard(folder)
    (folder / names[1]).unlink()


@row("I5-extra-shard", Code.INPUT_INDEX, "model-00003-of-00002.safetensors", "not named by the")
def _(folder: Path) -> None:
    _, names = shard(folder)
    shutil.copy(folder / names[0], folder / "model-00003-of-00002.safetensors")


def leads_out(name: str) -> Fault:
    def make(folder: Path) -> None:
        weight_map, names = shard(folder)
        for shard_name in names:
            (folder / shard_name).unlink()
        set_map(folder, dict.fromkeys(weight_map, name))

    return make


for number, name in enumerate(
    ("../x", "/etc/passwd", "a/../../x", "..\\x", "a\0b", "x" * 5000), start=1
):
    row(f"I6-{number}", Code.INPUT_UNSAFE_PATH, INDEX)(leads_out(name))


@row("I7-symlink", Code.INPUT_UNSAFE_PATH, SINGLE)
def _(folder: Path) -> None:
    shutil.move(folder / SINGLE, folder.parent / "outside.safetensors")
    os.symlink("../outside.safetensors", folder / SINGLE)


@row("I7-symlink-absolute", Code.INPUT_UNSAFE_PATH, SINGLE, "link out of the folder")
def _(folder: Path) -> None:
    shutil.move(folder / SINGLE, folder.parent / "outside.safetensors")
    os.symlink(folder.parent / "outside.safetensors", folder / SINGLE)


@row("I7-symlink-shard", Code.INPUT_UNSAFE_PATH, "model-00002-of-", "link out of the folder")
def _(folder: Path) -> None:
    _, names = shard(folder)
    shutil.move(folder / names[1], folder.parent / "outside.safetensors")
    os.symlink("../outside.safetensors", folder / names[1])


@row("I7-hard-link", Code.INPUT_UNSAFE_PATH, SINGLE, "hard link", "cp ")
def _(folder: Path) -> None:
    os.link(folder / SINGLE, folder.parent / "outside.safetensors")


@row("I7-config", Code.INPUT_UNSAFE_PATH, "config.json")
def _(folder: Path) -> None:
    shutil.move(folder / "config.json", folder.parent / "outside.json")
    os.symlink("../outside.json", folder / "config.json")


@row("I7-tokenizer", Code.INPUT_UNSAFE_PATH, "tokenizer_config.json")
def _(folder: Path) -> None:
    shutil.move(folder / "tokenizer_config.json", folder.parent / "outside.json")
    os.symlink("../outside.json", folder / "tokenizer_config.json")


def special(make: Callable[[Path], object], name: str) -> Fault:
    def fault(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return fault


for kind, make in (("pipe", os.mkfifo), ("folder", os.mkdir)):
    for name in (SINGLE, "config.json", "tokenizer_config.json"):
        row(f"I7-{kind}-{name}", Code.INPUT_FILE, name, f"a {kind}")(special(make, name))
row("I7-device", Code.INPUT_UNSAFE_PATH, SINGLE)(
    special(lambda path: path.symlink_to("/dev/zero"), SINGLE)
)


@row("I9-wrong-shard", Code.INPUT_INDEX, NORM)
def _(folder: Path) -> None:
    weight_map, names = shard(folder)
    wrong = next(n for n in names if n != weight_map[NORM])
    set_map(folder, weight_map | {NORM: wrong})


@row("I9-two-shards", Code.INPUT_INDEX, "stands in")
def _(folder: Path) -> None:
    _, names = shard(folder)
    first, second = ({k: v.clone() for k, v in load_file(folder / n).items()} for n in names[:2])
    save_file(first | second, folder / names[1])


@row("I9-absent", Code.INPUT_INDEX, NORM)
def _(folder: Path) -> None:
    weight_map, _ = shard(folder)
    del weight_map[NORM]
    set_map(folder, weight_map)


@row("I10", Code.INPUT_SHAPE, "q_proj", "kv_heads(2)*q_per_kv(2)*head_dim(32), hidden(64)")
def _(folder: Path) -> None:
    set_weights(folder, {"model.layers.1.self_attn.q_proj.weight": torch.zeros(128, 63)})


@row("I11-bias", Code.INPUT_UNKNOWN_TENSOR, "o_proj.bias")
def _(folder: Path) -> None:
    set_weights(folder, {"model.layers.0.self_attn.o_proj.bias": torch.zeros(64)})


@row("I11-adapter", Code.INPUT_UNKNOWN_TENSOR, "lora_A")
def _(folder: Path) -> None:
    set_weights(folder, {"base_model.model.layers.0.lora_A.weight": torch.zeros(4, 64)})


@row("I11-scales", Code.INPUT_UNKNOWN_TENSOR, "weight_scale")
def _(folder: Path) -> None:
    set_weights(folder, {"model.layers.0.mlp.up_proj.weight_scale": torch.ones(())})


@row("I12", Code.INPUT_MISSING_TENSOR, NORM)
def _(folder: Path) -> None:
    set_weights(folder, {NORM: None})


@row("I13-different", Code.INPUT_TIED, "lm_head.weight")
def _(folder: Path) -> None:
    set_config(folder, tie_word_embeddings=True)


@row("I16-unsupported", Code.INPUT_FAMILY, "made_up", "supported: gemma2")
def _(folder: Path) -> None:
    (folder / "evil.py").write_text(f"open({str(folder.parent / 'canary')!r}, 'w')\n")
    set_config(folder, model_type="made_up", auto_map={"AutoConfig": "evil.Config"})


@row("I17", Code.INPUT_PICKLE, "pytorch_model.bin", "convert them to safetensors")
def _(folder: Path) -> None:
    (folder / SINGLE).unlink()
    canary = folder.parent / "canary"
    (folder / "pytorch_model.bin").write_bytes(f"cos\nsystem\n(S'touch {canary}'\ntR.".encode())


@row("I18-model-type", Code.INPUT_FAMILY, "lama", "supported: gemma2,", "closest is llama")
def _(folder: Path) -> None:
    set_config(folder, model_type="lama")


@row("I18-architecture", Code.INPUT_FAMILY, "LlamaForCausalLM")
def _(folder: Path) -> None:
    set_config(folder, architectures=["LlamaForSequenceClassification"])


for key, value in (
    ("num_hidden_layers", 10**9), ("hidden_size", -1), ("vocab_size", "4096"),
    ("intermediate_size", 4096.5), ("num_attention_heads", True), ("head_dim", 0),
    ("num_key_value_heads", 3), ("tie_word_embeddings", "false"), ("rope_theta", "big"),
    ("rope_scaling", 8), ("hidden_act", "__import__"),
):  # fmt: skip
    row(f"I19-{key}", Code.INPUT_CONFIG, key)(
        lambda folder, key=key, value=value: set_config(folder, **{key: value})  # type: ignore[misc]
    )


for rope in (
    {"rope_type": "mine"}, {"type": "evil", "factor": 2.0}, {"rope_type": "linear", "factor": "2"},
    {"rope_type": "yarn", "beta_fast": [1]}, {"rope_type": "longrope", "long_factor": [1.0, "x"]},
    {"full_attention": {"rope_type": "default", "rope_theta": float("1e300") * 10}},
):  # fmt: skip
    row(f"I19-rope-{'-'.join(map(str, rope.values()))}"[:40], Code.INPUT_CONFIG, "rope_scaling.")(
        lambda folder, rope=rope: set_config(folder, rope_scaling=rope, rope_parameters=None)  # type: ignore[misc]
    )


@row("I19-1e400", Code.INPUT_CONFIG, "config.json", "1e400")
def _(folder: Path) -> None:
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace("10000.0", "1e400"))


@row("I21", Code.INPUT_LFS, SINGLE, "git lfs pull")
def _(folder: Path) -> None:
    (folder / SINGLE).write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 16060522904\n"
    )


@pytest.mark.parametrize("verb", ["inspect", "plan"])
@pytest.mark.parametrize("fault", ROWS, ids=lambda r: r.id)
def test_a_broken_model_is_refused(
    fault: Row, verb: str, pico: PicoMaker, refused: Refused, tmp_path: Path
) -> None:
    folder = pico(fault.family)
    fault.make(folder)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    target = folder if verb == "inspect" else tmp_path / "recipe.yaml"
    refused(verb, target, code=fault.code, names=fault.names)
    assert not (tmp_path / "canary").exists()


def test_rows_have_ids_of_their_own() -> None:
    assert len({r.id for r in ROWS}) == len(ROWS) > 50


def test_i3_each_fault_of_a_header_has_a_code_of_its_own() -> None:
    codes = [r.code for r in ROWS if r.id.startswith("I3-")]
    assert len(set(codes)) == len(codes) == 6


_OPENED: list[str] = []  # while it is watched; a hook of this kind stays for ever
_WATCHED: list[bool] = []


def _on_audit(event: str, arguments: tuple[object, ...]) -> None:
    if event == "open" and _WATCHED:
        _OPENED.append(os.fsdecode(arguments[0]) if isinstance(arguments[0], str | bytes) else "")


sys.addaudithook(_on_audit)


@pytest.mark.parametrize("fault", [r for r in ROWS if r.id.startswith("I6-")], ids=lambda r: r.id)
def test_i6_a_name_that_leads_out_is_never_opened(fault: Row, pico: PicoMaker) -> None:
    folder = pico()
    fault.make(folder)
    _OPENED.clear()
    _WATCHED.append(True)
    try:
        with pytest.raises(ParetronError) as caught:
            Checkpoint.open(folder)
    finally:
        _WATCHED.clear()
    assert caught.value.problems[0].code is Code.INPUT_UNSAFE_PATH
    inside = {str(folder / name) for name in ("config.json", "tokenizer_config.json",
                                              "generation_config.json", INDEX)}  # fmt: skip
    assert inside >= {p for p in _OPENED if p != "/proc/self/status"} > set()


@pytest.mark.parametrize("layers", [10**9, 4096])
def test_i19_nothing_is_allocated(layers: int, pico: PicoMaker) -> None:
    folder = pico()
    set_config(folder, num_hidden_layers=layers, vocab_size=1 << 24, hidden_size=1 << 20)
    exit_code, peak_kb, _ = run_and_measure("inspect", folder)
    assert exit_code == 3
    assert peak_kb < 300_000
