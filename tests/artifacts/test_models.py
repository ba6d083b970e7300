"""Checkpoints to and from transformers: strict, offline, without code of theirs, and exact."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from makers import PicoMaker
from paretron.artifacts.companions import TOKENIZER_FILES
from paretron.artifacts.config import read_config
from paretron.artifacts.models import load_model, load_tokenizer, save_model
from paretron.artifacts.reader import SINGLE, Checkpoint
from paretron.errors import Code, ParetronError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "nemotron")
IDS = torch.arange(3, 43)[None]


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded_the_logits_are_the_same(
    family: str, pico: PicoMaker, tmp_path: Path
) -> None:
    source = pico(family)
    model = load_model(source)
    assert not model.training
    out = tmp_path / "out"
    out.mkdir()
    save_model(model, out, config=read_config(source), companions=source, max_shard_bytes=50_000)
    assert len(list(out.glob("model-*.safetensors"))) > 1
    Checkpoint.open(out)
    with torch.no_grad():
        assert torch.equal(load_model(out)(IDS).logits, model(IDS).logits)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            assert (out / name).read_bytes() == (source / name).read_bytes()
    assert (out / "generation_config.json").is_file()


def test_tied_embeddings_are_written_once(pico: PicoMaker, tmp_path: Path) -> None:
    source = pico(tie_word_embeddings=True)
    model = load_model(source)
    save_model(model, tmp_path, config=read_config(source), companions=source)
    assert "lm_head.weight" not in load_file(tmp_path / SINGLE)
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path)(IDS).logits, model(IDS).logits)


def test_a_shape_that_llama_refuses_is_saved_and_loaded(pico: PicoMaker, tmp_path: Path) -> None:
    source = pico("mistral", hidden_size=66, num_attention_heads=4)
    config = read_config(source) | {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
    }
    model = load_model(source)
    save_model(model, tmp_path, config=config, companions=source)
    assert read_config(tmp_path)["model_type"] == "mistral"
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path)(IDS).logits, model(IDS).logits)


def test_the_dtype_is_what_was_asked_for(pico: PicoMaker) -> None:
    assert load_model(pico(dtype="bfloat16"), dtype=torch.bfloat16).dtype == torch.bfloat16


def test_a_chat_template_is_copied_and_never_rendered(pico: PicoMaker, tmp_path: Path) -> None:
    source = pico()
    canary = tmp_path / "canary"
    payload = "{{ ''.__class__.__mro__[1].__subclasses__() }}" + f"{{# {canary} #}}"
    (source / "chat_template.jinja").write_text(payload)
    out = tmp_path / "out"
    out.mkdir()
    save_model(load_model(source), out, config=read_config(source), companions=source)
    load_tokenizer(out)
    assert (out / "chat_template.jinja").read_text() == payload
    assert not canary.exists()


def test_code_beside_the_weights_is_never_imported(pico: PicoMaker, tmp_path: Path) -> None:
    source = pico()
    canary = tmp_path / "canary"
    (source / "evil.py").write_text(f"open({str(canary)!r}, 'w')\nclass M: pass\n")
    for name, key in (("config.json", "AutoModelForCausalLM"), ("tokenizer_config.json", "Auto")):
        content = json.loads((source / name).read_text())
        content["auto_map"] = {key: "evil.M", "AutoConfig": "evil.M", "AutoTokenizer": ["evil.M"]}
        (source / name).write_text(json.dumps(content))
    load_model(source)
    try:
        load_tokenizer(source)
    except ParetronError as error:
        assert error.problems[0].code is Code.INPUT_TOKENIZER
    assert not canary.exists()
    assert "evil" not in sys.modules


@pytest.mark.parametrize("text", ["", "{}", "[]", "x", '{"version": "1.0", "model": {}}'])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_broken_tokenizer(name: str, text: str, pico: PicoMaker) -> None:
    folder = pico()
    (folder / name).write_text(text)
    try:
        load_tokenizer(folder)
    except ParetronError as error:
        assert error.problems[0].code is Code.INPUT_TOKENIZER
        assert error.problems[0].fix
    else:
        assert name == "tokenizer_config.json"  # tokenizer.json says enough


def test_no_tokenizer(pico: PicoMaker) -> None:
    folder = pico()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ParetronError, match=r"no tokenizer\.json"):
        load_tokenizer(folder)
