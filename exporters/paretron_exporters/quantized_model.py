"""What a quantised checkpoint computes, in transformers: its decoded weights in the source's model.

Where asked for, the inputs of its matrices are rounded too, as an engine rounds them; those of
experts are not, because transformers holds them stacked, in no module of their own.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from paretron.artifacts.held import held_parameters
from paretron.artifacts.reader import Checkpoint
from paretron.data.store import TokenStore
from paretron.data.texts import Texts
from paretron.evaluate.parity import Observation, observe, seeded_prompts
from paretron.evaluate.perplexity import summed_loss
from paretron_exporters.exporter import OnEvent
from paretron_exporters.quantized_codes import FP8_LARGEST, INT8_LARGEST, round_fp4
from paretron_exporters.quantized_forms import (
    INPUT,
    NVFP4_BLOCK,
    SMOOTH,
    Form,
    quantised,
)
from paretron_exporters.quantized_gates import Written
from paretron_exporters.transformers_engine import TransformersEngine, observe_transformers
from paretron_exporters.twin import TWIN_PROMPTS, Twin, twin_config, twin_model

_MICRO_BATCH = 4  # windows
Round = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Decoded(Checkpoint):
    """A checkpoint whose tensors are those that were written of it, decoded."""

    written: Written | None = None

    def map(self, name: str) -> torch.Tensor:
        """One tensor in float32."""
        return super().map(name) if self.written is None else self.written.plain(name)


@dataclass(frozen=True)
class Computed:
    """Logits on fixed prompts and, where there is a text, the mean loss on it in nats a token.

    `rounded_loss` is that with the inputs of the matrices rounded too; None where nothing was
    measured, or where a form leaves activations as they are. `tokens` were predicted.
    """

    observation: Observation
    loss: float | None = None
    rounded_loss: float | None = None
    tokens: int = 0


def compute(
    checkpoint: Checkpoint,
    *,
    twin: Twin | None,
    texts: Texts | None,
    written: Written | None = None,
    on_event: OnEvent,
) -> Computed:
    """Run a checkpoint, or in its place what was `written` of it; its memory is freed again.

    A `twin` stands for a model that is too large to be run on a CPU; its loss is measured where
    there is a GPU.
    """
    if twin is None:
        engine = _whole(checkpoint, written)
        observation = observe(engine, seeded_prompts(checkpoint.config))
        measured = _measured(engine.model, observation, texts, written, on_event)
        del engine
    else:
        prompts = seeded_prompts(twin_config(checkpoint.family, checkpoint.config, twin))
        decoded = Decoded(**vars(checkpoint), written=written)
        observation = observe_transformers(twin_model(decoded, twin), prompts[-TWIN_PROMPTS:])
        measured = Computed(observation)
        if texts is not None and torch.cuda.is_available():
            model = _whole(checkpoint, written).model
            measured = _measured(model, observation, texts, written, on_event)
            del model
    gc.collect()
    return measured


def _whole(checkpoint: Checkpoint, written: Written | None) -> TransformersEngine:
    engine = TransformersEngine(checkpoint.path)
    if written is not None:
        _put(written, engine.model)
    return engine


def _measured(
    model: PreTrainedModel,
    observation: Observation,
    texts: Texts | None,
    written: Written | None,
    on_event: OnEvent,
) -> Computed:
    if texts is None:
        return Computed(observation)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    loss, tokens = _loss(model, texts, on_event)
    if written is None or written.form.codes == "int4":
        return Computed(observation, loss, None, tokens)
    with rounded_inputs(model, written):
        rounded, _ = _loss(model, texts, on_event)
    return Computed(observation, loss, rounded, tokens)


@contextmanager
def rounded_inputs(model: PreTrainedModel, written: Written) -> Iterator[None]:
    """Within, what the quantised linears of a model read is rounded to the form's numbers."""
    modules = dict(model.named_modules())
    hooks = []
    for name in quantised(written.source.family, written.source.config):
        module = modules.get(name.removesuffix(".weight"))
        if isinstance(module, torch.nn.Linear):
            hooks.append(module.register_forward_pre_hook(_hook(_rounder(written, name))))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _hook(rounded: Round) -> Callable[[torch.nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    return lambda module, inputs: (rounded(inputs[0]), *inputs[1:])


def _rounder(written: Written, name: str) -> Round:
    """How the inputs of one matrix are rounded; the last dimension holds a token's channels."""
    form, module = written.form, name.removesuffix("weight")
    if not form.calibrated:
        return lambda x: _to_codes(x, x.abs().amax(-1, keepdim=True).clamp(min=1e-12), form)
    scale = float(written.read(module + INPUT))
    if form.codes == "nvfp4":
        return lambda x: _to_blocks(x, scale)
    smooth: torch.Tensor | float = 1.0
    if module + SMOOTH in written.entries:
        smooth = written.read(module + SMOOTH).float()

    def static(x: torch.Tensor) -> torch.Tensor:
        factors = smooth.to(x.device) if isinstance(smooth, torch.Tensor) else smooth
        largest = torch.full((1,), scale * _largest(form), device=x.device)
        return _to_codes(x * factors, largest, form) / factors

    return static


def _largest(form: Form) -> float:
    return INT8_LARGEST if form.codes == "int8" else FP8_LARGEST


def _to_codes(x: torch.Tensor, largest: torch.Tensor, form: Form) -> torch.Tensor:
    """Numbers rounded to codes of which the largest stands for `largest`."""
    step = largest / _largest(form)
    scaled = (x / step).clamp(-_largest(form), _largest(form))
    codes = scaled.round() if form.codes == "int8" else scaled.to(torch.float8_e4m3fn).to(x.dtype)
    return codes * step


def _to_blocks(x: torch.Tensor, scale: float) -> torch.Tensor:
    """NVFP4: four bits, a scale of eight bits for each block, under one scale of all."""
    blocks = x.unflatten(-1, (-1, NVFP4_BLOCK))
    largest = blocks.abs().amax(-1, keepdim=True)
    step = (largest / 6.0 / scale).clamp(2.0**-9, FP8_LARGEST).to(torch.float8_e4m3fn)
    steps = step.to(x.dtype) * scale
    return (round_fp4(blocks / steps) * steps).flatten(-2)


@torch.no_grad()
def _put(written: Written, model: PreTrainedModel) -> None:
    """Every parameter of a model becomes what was written of it."""
    source = written.source
    parameters = dict(model.named_parameters())
    for held in held_parameters(source.family, source.config):
        parameters[held.name].copy_(held.from_disk(written.plain))


def _loss(model: PreTrainedModel, texts: Texts, on_event: OnEvent) -> tuple[float, int]:
    """Mean loss over every window of the validation text, and the number of tokens predicted."""
    store = TokenStore.open(texts.validation)
    length = texts.validation_seq_len
    count = store.windows(length)
    nats = 0.0
    for first in range(0, count, _MICRO_BATCH):
        last = min(first + _MICRO_BATCH, count)
        ids = torch.stack([store.window(i, length) for i in range(first, last)])
        nats += summed_loss(model, ids)
        on_event("progress", {"done": last, "total": count, "unit": "windows"})
    tokens = count * (length - 1)
    return nats / max(1, tokens), tokens
