"""Another library's attention: asked for where it can run, and reaching the model."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from makers import PicoMaker
from paretron.artifacts.models import load_model
from paretron.distill import parallel
from paretron.distill.parallel import check_devices
from paretron.errors import Code, ParetronError
from paretron.recipe import Distill, devices
from paretron.workers.world import World

FLASH = Distill(tokens=1, global_batch=2, attention="flash_attention_2")
ALONE = World(0, 1, torch.device("cpu"))


def test_it_is_refused_without_its_library_and_without_its_device(
    pico: PicoMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = pico()
    check_devices(FLASH.model_copy(update={"attention": "sdpa"}), [model], ALONE, apart=False)
    for installed, codes in ((None, [Code.OPTIONAL_MISSING, Code.DEVICE]), (True, [Code.DEVICE])):
        monkeypatch.setattr(devices, "find_spec", lambda name, found=installed: found)
        with pytest.raises(ParetronError) as caught:
            check_devices(FLASH, [model], ALONE, apart=False)
        assert [p.code for p in caught.value.problems] == codes
        assert {p.where for p in caught.value.problems} == {"distill.attention"}


@pytest.mark.skipif(find_spec("flash_attn") is not None, reason="flash-attn is installed")
def test_what_transformers_cannot_use_is_refused(
    pico: PicoMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package of that name is not enough: transformers would look for a kernel elsewhere."""
    monkeypatch.setattr(devices, "find_spec", lambda name: True)
    model, cuda = pico(), World(0, 1, torch.device("cuda"))
    with pytest.raises(ParetronError) as caught:
        check_devices(FLASH, [model], cuda, apart=False)
    (problem,) = caught.value.problems
    assert (problem.code, problem.where) == (Code.OPTIONAL_MISSING, "distill.attention")
    monkeypatch.setattr(parallel, "is_flash_attn_2_available", lambda: True)
    check_devices(FLASH, [model], cuda, apart=False)


@pytest.mark.skipif(find_spec("flash_attn") is not None, reason="flash-attn is installed")
def test_the_model_is_asked_to_use_it(pico: PicoMaker) -> None:
    """What the library says that lacks it; nothing more of it can be tried without CUDA."""
    with pytest.raises(ImportError, match="FlashAttention2"):
        load_model(pico(), attention="flash_attention_2")
