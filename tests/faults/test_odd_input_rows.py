"""Group I, what looks odd but is fine: it is read, and what is left out is said once."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from faults.broken import EMBEDDING, set_config, set_json, set_weights, shard, weights
from faults.conftest import Cli
from makers import PicoMaker
from paretron.artifacts.models import load_model, load_tokenizer
from paretron.artifacts.reader import SINGLE, Checkpoint
from picoscores import random_scores


@dataclass(frozen=True)
class Row:
    """One oddity: how to make it, and what the one notice must name (none without)."""

    id: str
    make: Callable[[Path], None]
    notice: str = ""


def extra_weights(folder: Path) -> None:
    shard(folder)
    (folder / "consolidated.safetensors").write_bytes(b"not ours to read")


def extra_beside_one_file(folder: Path) -> None:
    (folder / "consolidated.safetensors").write_bytes(b"not ours to read")


def identical_head(folder: Path) -> None:
    set_weights(folder, {"lm_head.weight": weights(folder)[EMBEDDING]})
    set_config(folder, tie_word_embeddings=True)


def no_head(folder: Path) -> None:
    set_weights(folder, {"lm_head.weight": None})
    set_config(folder, tie_word_embeddings=True)


def old_buffers(folder: Path) -> None:
    names = [f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(4)]
    set_weights(folder, {name: torch.ones(16) for name in names})


def evil_module(folder: Path) -> None:
    (folder / "evil.py").write_text(f"open({str(folder.parent / 'canary')!r}, 'w')\n")


def config_names_code(folder: Path) -> None:
    evil_module(folder)
    set_config(
        folder,
        auto_map={"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"},
        trust_remote_code=True,
        attn_implementation="someone/kernel",
        _attn_implementation_internal="someone/kernel",
        _made_up=1,
    )


def tokenizer_names_code(folder: Path) -> None:
    evil_module(folder)
    set_json(
        folder / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["evil.Slow", "evil.Fast"]},
        tokenizer_class="MadeUpTokenizer",
        trust_remote_code=True,
        _made_up=1,
    )


def of_a_fork(folder: Path) -> None:
    set_config(folder, residual_gate=0.5, moe_shape={"a": 1}, not_set=None)


ROWS = (
    Row("I5-consolidated", extra_weights, "consolidated.safetensors"),
    Row("I5-consolidated-beside-one", extra_beside_one_file, "consolidated.safetensors"),
    Row("I11-inv-freq", old_buffers, "rotary_emb.inv_freq"),
    Row("I13-identical", identical_head),
    Row("I13-without", no_head),
    Row(
        "I16-config",
        config_names_code,
        "_attn_implementation_internal, _made_up, attn_implementation, auto_map, trust_remote_code",
    ),
    Row("I16-tokenizer", tokenizer_names_code, "_made_up, auto_map, trust_remote_code"),
    Row("I16-fork", of_a_fork, "moe_shape, residual_gate"),
)


def notes(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("note: ")]


@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.id)
def test_an_odd_model_is_accepted(row: Row, pico: PicoMaker, cli: Cli, tmp_path: Path) -> None:
    folder = pico()
    row.make(folder)
    inspected = cli("inspect", folder)
    assert inspected.code == 0
    said = notes(inspected.err)
    assert len(said) == bool(row.notice), said
    assert row.notice in "".join(said)
    assert load_model(folder)(torch.arange(5)[None]).logits.isfinite().all()
    assert load_tokenizer(folder)("the cat")["input_ids"]
    assert not (tmp_path / "canary").exists()
    assert "evil" not in sys.modules


@pytest.fixture
def prune(cli: Cli, tmp_path: Path) -> Callable[[Path], Path]:
    def run(model: Path) -> Path:
        (tmp_path / "scores").mkdir()
        random_scores(Checkpoint.open(model)).save(tmp_path / "scores")
        out = tmp_path / "out"
        done = cli("prune", model, "--scores", tmp_path / "scores", "--ffn", "64", "--out", out)
        assert done.code == 0, done.err
        return out

    return run


@pytest.mark.parametrize("row", [r for r in ROWS if r.id.startswith("I16")], ids=lambda r: r.id)
def test_i16_what_is_made_names_no_code(
    row: Row, pico: PicoMaker, prune: Callable[[Path], Path], tmp_path: Path
) -> None:
    folder = pico()
    before = json.loads((folder / "tokenizer_config.json").read_text())
    row.make(folder)
    out = prune(folder)
    config = json.loads((out / "config.json").read_text())
    tokenizer = json.loads((out / "tokenizer_config.json").read_text())
    written = {*config, *tokenizer}
    assert not written & {*row.notice.split(", ")}
    assert not [key for key in written if key.startswith("_")]
    kept = {k: v for k, v in tokenizer.items() if k != "tokenizer_class"}
    assert kept == {k: v for k, v in before.items() if k != "tokenizer_class"}
    assert not (out / "evil.py").exists()
    assert not (tmp_path / "canary").exists()
    assert "evil" not in sys.modules


PAYLOAD = (
    "{% for c in [].__class__.__base__.__subclasses__() %}{% if 'Popen' in c.__name__ %}"
    "{{ c('touch CANARY', shell=True) }}{% endif %}{% endfor %}\r\n\tä"
)


def test_i23_a_chat_template_is_copied_not_rendered(
    pico: PicoMaker, prune: Callable[[Path], Path], tmp_path: Path
) -> None:
    folder = pico()
    payload = PAYLOAD.replace("CANARY", str(tmp_path / "canary"))
    (folder / "chat_template.jinja").write_bytes(payload.encode())
    set_json(folder / "tokenizer_config.json", chat_template=payload)
    out = prune(folder)
    for name in ("chat_template.jinja", "tokenizer_config.json", "tokenizer.json"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    tokenizer = load_tokenizer(out)
    assert not (tmp_path / "canary").exists()
    # The library's own sandbox is what stands between the payload and a shell.
    with pytest.raises(Exception, match="unsafe"):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    assert not (tmp_path / "canary").exists()


def test_i7_a_hub_cache_links_to_its_blobs(pico: PicoMaker, cli: Cli, tmp_path: Path) -> None:
    hub = tmp_path / "models--someone--some-model"
    snapshot = hub / "snapshots/0123"
    (hub / "blobs").mkdir(parents=True)
    pico(name=str(snapshot))
    (snapshot / SINGLE).rename(hub / "blobs/abcd")
    (snapshot / SINGLE).symlink_to("../../blobs/abcd")
    (snapshot / "config.json").rename(hub / "blobs/ef01")
    (snapshot / "config.json").hardlink_to(hub / "blobs/ef01")
    assert cli("inspect", snapshot).code == 0
