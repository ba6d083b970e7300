"""The guarded reader: what it accepts, what it refuses, and that it reads what is there."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from contextlib import closing
from math import prod
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file as map_file
from safetensors.torch import save_file

from makers import PicoMaker
from paretron.artifacts.reader import INDEX, SINGLE, Checkpoint
from paretron.artifacts.tensors import check_finite
from paretron.artifacts.writer import TensorWriter, dtype_name
from paretron.errors import Code, ParetronError
from paretron.families import FAMILIES as FAMILIES_BY_NAME
from paretron.families import expected_tensors

EMBEDDING = "model.embed_tokens.weight"
NORM = "model.norm.weight"
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "nemotron")


def load_file(file: Path) -> dict[str, torch.Tensor]:
    """The library maps the file: a copy survives its being written anew."""
    return {name: tensor.clone() for name, tensor in map_file(file).items()}


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    tensors = load_file(folder / SINGLE) | {k.replace("__", "."): v for k, v in changes.items()}
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / SINGLE)


def shard(folder: Path, *, max_shard_bytes: int = 30_000) -> list[str]:
    """Rewrite a checkpoint as shards with an index; their names."""
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    layout = {n: (dtype_name(t), tuple(t.shape)) for n, t in tensors.items()}
    with TensorWriter(folder, layout, max_shard_bytes=max_shard_bytes) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    return sorted(p.name for p in folder.glob("model-*.safetensors"))


def codes_of(folder: Path) -> set[Code]:
    with pytest.raises(ParetronError) as caught:
        Checkpoint.open(folder)
    assert all(p.cause and p.where and p.fix for p in caught.value.problems)
    return {p.code for p in caught.value.problems}


@pytest.mark.parametrize("family", FAMILIES)
def test_reads_every_tensor_of_every_family(family: str, pico: PicoMaker) -> None:
    folder = pico(family)
    checkpoint = Checkpoint.open(folder)
    stored = load_file(folder / SINGLE)
    assert set(checkpoint.entries) == set(stored)
    for name, tensor in stored.items():
        assert torch.equal(checkpoint.read(name), tensor)
    assert checkpoint.nbytes == sum(t.nbytes for t in stored.values())
    assert (checkpoint.dtype, checkpoint.family.model_type) == ("F32", family)


def test_reads_shards(pico: PicoMaker) -> None:
    folder = pico()
    stored = load_file(folder / SINGLE)
    assert len(shard(folder)) > 3
    checkpoint = Checkpoint.open(folder)
    assert all(torch.equal(checkpoint.read(n), t) for n, t in stored.items())


def test_a_tensor_read_is_not_the_file(pico: PicoMaker) -> None:
    folder = pico()
    before = (folder / SINGLE).read_bytes()
    Checkpoint.open(folder).read(NORM).add_(1)
    assert (folder / SINGLE).read_bytes() == before


def test_unknown_missing_and_misshapen_are_all_told_at_once(pico: PicoMaker) -> None:
    folder = pico()
    edit_weights(folder, extra__weight=torch.ones(1), model__norm__weight=None,
                 lm_head__weight=torch.ones(319, 64))  # fmt: skip
    with pytest.raises(ParetronError) as caught:
        Checkpoint.open(folder)
    found = {p.code: p for p in caught.value.problems}
    assert "extra.weight" in found[Code.INPUT_UNKNOWN_TENSOR].where
    assert NORM in found[Code.INPUT_MISSING_TENSOR].where
    assert "vocab(320), hidden(64)" in found[Code.INPUT_SHAPE].cause


def test_a_layer_too_many_in_the_config_is_missing_tensors(pico: PicoMaker) -> None:
    folder = pico()
    edit_config(folder, num_hidden_layers=5)
    assert codes_of(folder) == {Code.INPUT_MISSING_TENSOR}


def test_derived_buffers_are_left_out(pico: PicoMaker) -> None:
    folder = pico()
    edit_weights(folder, model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(16))
    assert not any("inv_freq" in n for n in Checkpoint.open(folder).entries)


def test_tied_embeddings_are_verified_not_believed(pico: PicoMaker) -> None:
    folder = pico(tie_word_embeddings=True)
    assert "lm_head.weight" not in Checkpoint.open(folder).entries
    embedding = load_file(folder / SINGLE)[EMBEDDING]
    edit_weights(folder, lm_head__weight=embedding.clone())
    assert "lm_head.weight" not in Checkpoint.open(folder).entries
    edit_weights(folder, lm_head__weight=embedding + 1)
    assert codes_of(folder) == {Code.INPUT_TIED}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_value_that_is_no_number_is_counted(
    value: float, dtype: torch.dtype, pico: PicoMaker
) -> None:
    folder = pico()
    norm = torch.ones(64, dtype=dtype)
    norm[3] = norm[60] = value
    edit_weights(folder, model__norm__weight=norm)
    checkpoint = Checkpoint.open(folder)
    checkpoint.read(EMBEDDING)
    with pytest.raises(ParetronError, match="2 of 64 values") as caught:
        checkpoint.read(NORM)
    assert caught.value.problems[0].code is Code.INPUT_NONFINITE
    assert NORM in caught.value.problems[0].where


def test_large_finite_values_are_finite(pico: PicoMaker) -> None:
    folder = pico()
    edit_weights(folder, model__norm__weight=torch.full((64,), torch.finfo(torch.float32).max))
    assert Checkpoint.open(folder).read(NORM).max() > 1e38


UNSAFE = ["../x", "/etc/passwd", "a/../../x", "..\\x", "a\0b", "x" * 5000, "", ".hidden", "a/b"]


@pytest.mark.parametrize("name", UNSAFE, ids=lambda n: repr(n)[:14])
def test_a_shard_name_that_leads_out_is_never_opened(
    name: str, pico: PicoMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = pico()
    shard(folder)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][NORM] = name
    (folder / INDEX).write_text(json.dumps(index))
    for stray in folder.glob("model-*.safetensors"):
        if stray.name not in index["weight_map"].values():
            stray.unlink()
    opened: list[str] = []
    path_open = Path.open

    def spy(self: Path, *args: object, **kwargs: object) -> object:
        opened.append(str(self))
        return path_open(self, *args, **kwargs)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", spy)
    assert codes_of(folder) == {Code.INPUT_UNSAFE_PATH}
    assert all(str(folder) in path and path.endswith(".json") for path in opened)


def test_a_shard_that_links_out(pico: PicoMaker, tmp_path: Path) -> None:
    folder = pico()
    shutil.move(folder / SINGLE, tmp_path / "elsewhere.safetensors")
    os.symlink(tmp_path / "elsewhere.safetensors", folder / SINGLE)
    assert codes_of(folder) == {Code.INPUT_UNSAFE_PATH}


def test_the_hub_cache_links_to_its_blobs(pico: PicoMaker, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b/snapshots/0123"
    blobs = tmp_path / "models--a--b/blobs"
    blobs.mkdir(parents=True)
    shutil.move(pico(), snapshot)
    shutil.move(snapshot / SINGLE, blobs / "abcd")
    os.symlink("../../blobs/abcd", snapshot / SINGLE)
    assert Checkpoint.open(snapshot).entries


def test_shards_and_index_must_agree(pico: PicoMaker) -> None:
    folder = pico()
    names = shard(folder)
    text = (folder / INDEX).read_text()
    index = json.loads(text)

    def with_map(weight_map: object) -> set[Code]:
        (folder / INDEX).write_text(json.dumps(index | {"weight_map": weight_map}))
        return codes_of(folder)

    weight_map = index["weight_map"]
    wrong = next(n for n in names if n != weight_map[NORM])
    assert with_map(weight_map | {NORM: wrong}) == {Code.INPUT_INDEX}
    assert with_map({k: v for k, v in weight_map.items() if k != NORM}) == {Code.INPUT_INDEX}
    assert with_map(weight_map | {"ghost": wrong}) == {Code.INPUT_INDEX}
    assert with_map(weight_map | {NORM: 7}) == {Code.INPUT_INDEX}
    assert with_map({}) == with_map(None) == with_map([]) == {Code.INPUT_INDEX}
    (folder / INDEX).write_text(text)
    Checkpoint.open(folder)
    shutil.copy(folder / names[0], folder / "model-00099-of-00002.safetensors")
    assert codes_of(folder) == {Code.INPUT_INDEX}
    (folder / "model-00099-of-00002.safetensors").unlink()
    (folder / names[1]).unlink()
    assert codes_of(folder) == {Code.INPUT_INDEX}


def test_a_tensor_in_two_shards(pico: PicoMaker) -> None:
    folder = pico()
    names = shard(folder)
    tensors = load_file(folder / names[0])
    save_file(load_file(folder / names[1]) | tensors, folder / names[1])
    assert codes_of(folder) == {Code.INPUT_INDEX}


def test_an_unrelated_weight_file_is_ignored(pico: PicoMaker) -> None:
    folder = pico()
    shard(folder)
    (folder / "consolidated.safetensors").write_bytes(b"not looked at")
    assert Checkpoint.open(folder).entries


def test_without_weights(pico: PicoMaker, tmp_path: Path) -> None:
    folder = pico()
    (folder / SINGLE).unlink()
    assert codes_of(folder) == {Code.INPUT_MISSING}
    (folder / "pytorch_model.bin").write_bytes(b"")
    assert codes_of(folder) == {Code.INPUT_PICKLE}
    (folder / "config.json").unlink()
    assert codes_of(folder) == {Code.INPUT_MISSING}
    assert codes_of(tmp_path / "nowhere") == {Code.INPUT_MISSING}


def test_unaligned_tensors(tmp_path: Path, pico: PicoMaker) -> None:
    """The format does not promise alignment inside of the data."""
    folder = pico()
    tensors = load_file(folder / SINGLE)
    odd = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(3, dtype=torch.uint8)}
    layout = {n: (dtype_name(t), tuple(t.shape)) for n, t in (odd | tensors).items()}
    with TensorWriter(folder, layout) as writer:
        for name, tensor in (odd | tensors).items():
            writer.write(name, tensor)
    checkpoint = Checkpoint.open(folder)
    assert any(e.start % 4 for e in checkpoint.entries.values())
    assert all(torch.equal(checkpoint.read(n), t) for n, t in tensors.items())


def test_opening_reads_nothing_but_headers(tmp_path: Path) -> None:
    """30 shards of 30 tensors, 24 GB as they claim and next to nothing on disk."""
    folder = tmp_path / "large"
    names = large_checkpoint(folder, shards=30)
    script = (
        "import sys, time; from pathlib import Path; from paretron.artifacts.reader import *\n"
        "start = time.process_time(); found = Checkpoint.open(Path(sys.argv[1]))\n"
        "spent = time.process_time() - start\n"
        "status = Path('/proc/self/status').read_text().splitlines()\n"
        "peak = next(l for l in status if 'VmHWM' in l).split()[1]\n"
        "print(len(found.entries), found.nbytes, spent, peak, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder)], capture_output=True, text=True, check=True
    )
    count, nbytes, seconds, peak_kb, torch_imported = done.stdout.split()
    assert int(count) == len(names) > 880
    assert int(nbytes) > 20e9
    assert float(seconds) < 0.2
    assert int(peak_kb) < 50_000
    assert torch_imported == "False"


def large_checkpoint(folder: Path, *, shards: int) -> list[str]:
    """A checkpoint of sparse files: real headers, and data that takes no room."""
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32000,
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 98,
        "num_attention_heads": 32, "num_key_value_heads": 8,
    }  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    expected = list(expected_tensors(FAMILIES_BY_NAME["llama"], config).items())
    each = -(-len(expected) // shards)
    weight_map = {}
    for k in range(shards):
        name = f"model-{k + 1:05d}-of-{shards:05d}.safetensors"
        header: dict[str, object] = {}
        position = 0
        for tensor, shape in expected[k * each : (k + 1) * each]:
            end = position + 2 * prod(shape)
            header[tensor] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, end]}
            position = end
            weight_map[tensor] = name
        text = json.dumps(header).encode()
        with (folder / name).open("wb") as f:
            f.write(len(text).to_bytes(8, "little") + text)
            f.truncate(8 + len(text) + position)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return list(weight_map)


def test_a_tensor_is_mapped_without_being_checked(pico: PicoMaker) -> None:
    folder = pico()
    norm = torch.ones(64)
    norm[3] = float("nan")
    edit_weights(folder, model__norm__weight=norm)
    checkpoint = Checkpoint.open(folder)
    tensor = checkpoint.map(NORM)
    assert tensor.isnan().sum() == 1
    check_finite(tensor[4:], checkpoint.where(NORM))
    with pytest.raises(ParetronError, match="1 of 4 values") as caught:
        check_finite(tensor[:4], checkpoint.where(NORM))
    assert caught.value.problems[0].where.endswith(f"{SINGLE}: {NORM}")


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.float64, torch.bool])
def test_weights_of_a_dtype_that_nothing_computes_in(dtype: torch.dtype, pico: PicoMaker) -> None:
    folder = pico()
    edit_weights(folder, model__norm__weight=torch.ones(64).to(dtype))
    assert codes_of(folder) == {Code.INPUT_DTYPE}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64,
                                   torch.float8_e4m3fn, torch.float8_e5m2])  # fmt: skip
def test_every_bit_pattern_that_is_no_number_is_counted(dtype: torch.dtype) -> None:
    one_byte = torch.arange(256, dtype=torch.uint8)
    if dtype.itemsize == 1:
        values = one_byte.view(dtype)
    else:
        high = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16)
        wide = torch.zeros(len(high), dtype.itemsize // 2, dtype=torch.uint16)
        wide[:, -1] = high  # the high half of each value, little-endian
        values = wide.view(dtype).view(-1)
    expected = int((~torch.isfinite(values.double())).sum())
    assert expected > 0
    with pytest.raises(ParetronError, match=f"{expected} of {len(values)} values"):
        check_finite(values, "x")
    check_finite(values[torch.isfinite(values.double())], "x")


def test_names_inside_of_the_folder_may_share_a_file(pico: PicoMaker) -> None:
    folder = pico()
    os.link(folder / SINGLE, folder / "another-name")
    assert Checkpoint.open(folder).entries
    os.link(folder / SINGLE, folder.parent / "outside")
    assert codes_of(folder) == {Code.INPUT_UNSAFE_PATH}


def test_a_socket_in_place_of_a_file(pico: PicoMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pico()
    monkeypatch.chdir(folder)  # a socket's path must be short
    (folder / SINGLE).unlink()
    with closing(socket.socket(socket.AF_UNIX)) as end:
        end.bind(SINGLE)
        assert codes_of(folder) == {Code.INPUT_FILE}
