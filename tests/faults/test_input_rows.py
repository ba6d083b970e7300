"""Group I: a hostile or broken input model is refused from its headers, in words that help.

A row is a function that breaks a pico checkpoint; `inspect` and `plan` must both find it. Add one
with the decorator: its id, the code, and what the message must name.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from faults.conftest import Cli, Refused, run_and_measure
from makers import PicoMaker
from paretron.artifacts.manifest import Provenance, write_manifest
from paretron.artifacts.models import load_model
from paretron.artifacts.reader import INDEX, SINGLE, Checkpoint
from paretron.artifacts.writer import TensorWriter, dtype_name
from paretron.errors import Code, ParetronError

NORM = "model.norm.weight"
EMBEDDING = "model.embed_tokens.weight"
Fault = Callable[[Path], None]

RECIPE = """\
schema: 1
teacher: {model: ./model}
data:
  calibration: {corpus: stdlib, part: calibration, seq_len: 64}
  train: {corpus: stdlib, part: train, seq_len: 64}
  validation: {corpus: stdlib, part: validation, seq_len: 64}
students: {width: {hidden: 48}}
distill: {tokens: 1.0e5, global_batch: 8}
"""


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


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in load_file(folder / SINGLE).items()}


def set_weights(folder: Path, changes: dict[str, torch.Tensor | None]) -> None:
    tensors = weights(folder) | changes
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / SINGLE)


def set_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def shard(folder: Path) -> tuple[dict[str, str], list[str]]:
    """Split the weights into shards; the index's map and the shards' names."""
    tensors = weights(folder)
    (folder / SINGLE).unlink()
    layout = {n: (dtype_name(t), tuple(t.shape)) for n, t in tensors.items()}
    with TensorWriter(folder, layout, max_shard_bytes=100_000) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    return weight_map, sorted(set(weight_map.values()))


def set_map(folder: Path, weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def set_header(folder: Path, text: bytes, data: bytes, *, length: int | None = None) -> None:
    size = len(text) if length is None else length
    (folder / SINGLE).write_bytes(struct.pack("<Q", size) + text + data)


def header(folder: Path) -> tuple[dict[str, dict[str, list[int]]], bytes]:
    content = (folder / SINGLE).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def two_last(entries: dict[str, dict[str, list[int]]]) -> list[str]:
    names = [n for n in entries if n != "__metadata__"]
    return sorted(names, key=lambda n: entries[n]["data_offsets"])[-2:]


def cut(keep: Callable[[int], int]) -> Fault:
    def make(folder: Path) -> None:
        with (folder / SINGLE).open("r+b") as f:
            f.truncate(keep((folder / SINGLE).stat().st_size))

    return make


row("I1-one-byte", Code.INPUT_TRUNCATED, SINGLE)(cut(lambda size: size - 1))
row("I1-half", Code.INPUT_TRUNCATED, SINGLE)(cut(lambda size: size // 2))
row("I1-nothing-left", Code.INPUT_TRUNCATED, SINGLE)(cut(lambda size: 0))


@row("I3-garbage", Code.INPUT_HEADER, SINGLE, "not valid JSON")
def _(folder: Path) -> None:
    set_header(folder, b"\xde\xad\xbe\xef", b"")


@row("I3-length", Code.INPUT_HEADER, SINGLE, str(2**63))
def _(folder: Path) -> None:
    set_header(folder, b"{}", b"", length=2**63)


@row("I3-overlap", Code.INPUT_HEADER, SINGLE, "overlaps")
def _(folder: Path) -> None:
    entries, data = header(folder)
    _, last = two_last(entries)
    entries[last]["data_offsets"] = [n - 4 for n in entries[last]["data_offsets"]]
    set_header(folder, json.dumps(entries).encode(), data[:-4])


@row("I3-hole", Code.INPUT_HEADER, SINGLE, "hole")
def _(folder: Path) -> None:
    entries, data = header(folder)
    _, last = two_last(entries)
    entries[last]["data_offsets"] = [n + 4 for n in entries[last]["data_offsets"]]
    set_header(folder, json.dumps(entries).encode(), data + bytes(4))


@row("I3-trailing", Code.INPUT_HEADER, SINGLE, "after the last tensor")
def _(folder: Path) -> None:
    with (folder / SINGLE).open("ab") as f:
        f.write(b"x")


@row("I3-duplicate", Code.INPUT_HEADER, SINGLE, "twice")
def _(folder: Path) -> None:
    entries, data = header(folder)
    text = json.dumps(entries)
    set_header(folder, (text[:-1] + f', "{NORM}": {{}}}}').encode(), data)


@row("I4", Code.INPUT_INDEX, "model-00002-of-")
def _(folder: Path) -> None:
    _, names = shard(folder)
    (folder / names[1]).unlink()


@row("I5-extra-shard", Code.INPUT_INDEX, "model-00003-of-00002.safetensors")
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


@row("I17", Code.INPUT_PICKLE, "pytorch_model.bin")
def _(folder: Path) -> None:
    (folder / SINGLE).unlink()
    canary = folder.parent / "canary"
    (folder / "pytorch_model.bin").write_bytes(f"cos\nsystem\n(S'touch {canary}'\ntR.".encode())


@row("I18-model-type", Code.INPUT_FAMILY, "lama", "closest is llama")
def _(folder: Path) -> None:
    set_config(folder, model_type="lama")


@row("I18-architecture", Code.INPUT_FAMILY, "LlamaForCausalLM")
def _(folder: Path) -> None:
    set_config(folder, architectures=["LlamaForSequenceClassification"])


for key, value in (
    ("num_hidden_layers", 10**9), ("hidden_size", -1), ("vocab_size", "4096"),
    ("intermediate_size", 4096.5), ("num_attention_heads", True), ("head_dim", 0),
    ("num_key_value_heads", 3), ("tie_word_embeddings", "false"), ("rope_theta", "big"),
    ("rope_scaling", 8),
):  # fmt: skip
    row(f"I19-{key}", Code.INPUT_CONFIG, key)(
        lambda folder, key=key, value=value: set_config(folder, **{key: value})  # type: ignore[misc]
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
    assert len({r.id for r in ROWS}) == len(ROWS) > 40


# What looks odd but is fine.


def extra_weights(folder: Path) -> None:
    shard(folder)
    (folder / "consolidated.safetensors").write_bytes(b"not ours to read")


def identical_head(folder: Path) -> None:
    set_weights(folder, {"lm_head.weight": weights(folder)[EMBEDDING]})
    set_config(folder, tie_word_embeddings=True)


def no_head(folder: Path) -> None:
    set_weights(folder, {"lm_head.weight": None})
    set_config(folder, tie_word_embeddings=True)


def old_buffers(folder: Path) -> None:
    set_weights(folder, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)})


def names_code(folder: Path) -> None:
    (folder / "evil.py").write_text(f"open({str(folder.parent / 'canary')!r}, 'w')\n")
    set_config(
        folder,
        auto_map={"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"},
        trust_remote_code=True,
        attn_implementation="someone/kernel",
        _attn_implementation_internal="someone/kernel",
    )


ACCEPTED: dict[str, Fault] = {
    "I5-consolidated": extra_weights,
    "I11-inv-freq": old_buffers,
    "I13-identical": identical_head,
    "I13-without": no_head,
    "I16": names_code,
}


@pytest.mark.parametrize("id", ACCEPTED)
def test_an_odd_model_is_accepted(id: str, pico: PicoMaker, cli: Cli, tmp_path: Path) -> None:
    folder = pico()
    ACCEPTED[id](folder)
    assert cli("inspect", folder).code == 0
    assert load_model(folder)(torch.arange(5)[None]).logits.isfinite().all()
    assert not (tmp_path / "canary").exists()
    assert "evil" not in sys.modules


def test_i2_a_flipped_bit_where_the_sum_is_known(pico: PicoMaker, refused: Refused) -> None:
    folder = pico()
    write_manifest(folder, Provenance(kind="student"))
    content = bytearray((folder / SINGLE).read_bytes())
    content[-100] ^= 1
    (folder / SINGLE).write_bytes(content)
    refused("verify", folder, code=Code.INPUT_MANIFEST, names=SINGLE)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_i15_not_a_number(value: float, pico: PicoMaker) -> None:
    folder = pico()
    norm = torch.ones(64)
    norm[5] = value
    set_weights(folder, {NORM: norm})
    with pytest.raises(ParetronError, match="1 of 64 values") as caught:
        Checkpoint.open(folder).read(NORM)
    assert caught.value.exit_code == 3
    assert NORM in caught.value.problems[0].where


def test_i22_no_tokenizer(pico: PicoMaker, refused: Refused, tmp_path: Path) -> None:
    folder = pico()
    (folder / "tokenizer.json").unlink()
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    refused("plan", tmp_path / "recipe.yaml", code=Code.INPUT_TOKENIZER, names="no tokenizer.json")


OVERLAPS = ("model", "model/inside", ".", "link", "link/inside")


@pytest.mark.parametrize("out", OVERLAPS)
def test_i25_output_over_input(out: str, pico: PicoMaker, refused: Refused, tmp_path: Path) -> None:
    folder = pico()
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "scores").mkdir()
    refused(
        "prune", folder, "--scores", tmp_path / "scores", "--hidden", "48",
        "--out", tmp_path / out, "--overwrite", code=Code.OUT_OVERLAP, names=str(folder),
    )  # fmt: skip


def test_i26_a_hub_id_offline(
    refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("./model", "someone/some-model"))
    start = time.monotonic()
    refused(
        "plan", tmp_path / "recipe.yaml", "--offline",
        code=Code.INPUT_OFFLINE, names="someone/some-model",
    )  # fmt: skip
    assert time.monotonic() - start < 2


def test_i19_nothing_is_allocated(pico: PicoMaker) -> None:
    folder = pico()
    set_config(folder, num_hidden_layers=4096, vocab_size=1 << 24, hidden_size=1 << 20)
    exit_code, peak_kb, _ = run_and_measure("inspect", folder)
    assert exit_code == 3
    assert peak_kb < 300_000
