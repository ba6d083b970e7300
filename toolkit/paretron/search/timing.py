"""Timing shapes through transformers in eager mode: one layer and both ends, random weights.

The first measurer of operator tables; others write the same rows from other engines.
"""

from __future__ import annotations

import copy
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from paretron.artifacts.config import servable_config
from paretron.artifacts.manifest import versions
from paretron.artifacts.models import as_library_config
from paretron.families import Family, Sizes, sizes
from paretron.families.table import with_sizes
from paretron.recipe import Speed
from paretron.search.space import Shapes, distinct
from paretron.search.table import ENDS, NO_LAYER, OperatorTable, Phase, Row, decode_context

ENGINE = "transformers"
MOST_POINTS = 100  # layer shapes that are timed; a larger space is timed on three sizes an axis
_FEW_TOKENS = 32  # a vocabulary where no embedding is timed

OnEvent = Callable[[str, Mapping[str, object]], None]


@dataclass(frozen=True)
class LayerTimer:
    """Times shapes of one teacher's family; `dtype` is a torch name, `clock` gives seconds."""

    family: Family
    config: Mapping[str, Any]
    dtype: str
    speed: Speed
    clock: Callable[[], float] = time.perf_counter

    def table(
        self, points: Shapes, *, on_event: OnEvent = lambda kind, fields: None
    ) -> OperatorTable:
        """The table of every layer shape and every pair of ends among `points`."""
        layers = distinct(points, [a for a in points.sizes if a not in NO_LAYER])
        ends = distinct(points, list(ENDS))
        rows: list[Row] = []
        total = len(layers) + len(ends)
        for part, rows_of in ((layers, self.layer_rows), (ends, self.end_rows)):
            for size in part:
                rows += rows_of(size)
                done = len(rows) // 2
                on_event("progress", {"done": done, "total": total, "unit": "shapes"})
        return OperatorTable(
            engine=ENGINE,
            device=_device_name(),
            dtype=self.dtype,
            model_type=self.family.model_type,
            versions={**versions(), "threads": str(torch.get_num_threads())},
            rows=tuple(rows),
        )

    @torch.inference_mode()
    def layer_rows(self, size: Sizes) -> Iterator[Row]:
        """Prefill and decode of one layer of this shape."""
        model = self._model({**size, "layers": 1, "vocab": _FEW_TOKENS})
        layer = model.get_submodule(f"{_layers_name(self.family)}.0")
        for phase, context in self._phases():
            arguments, named = self._seen_by(model, layer, phase, context)
            cache = named.pop("past_key_values", None)

            def prepared(cache: Any = cache) -> dict[str, Any]:
                return {} if cache is None else {"past_key_values": copy.deepcopy(cache)}

            def call(more: dict[str, Any], a: Any = arguments, n: Any = named) -> None:
                layer(*a, **n, **more)

            yield self._row("layer", phase, size, context, self._timed(prepared, call))

    @torch.inference_mode()
    def end_rows(self, size: Sizes) -> Iterator[Row]:
        """Everything outside of the layers: the model's own code without any layer."""
        model = self._model(size)
        base, _, key = _layers_name(self.family).rpartition(".")
        setattr(model.get_submodule(base), key, nn.ModuleList())
        for phase, context in self._phases():
            tokens = context if phase == "prefill" else 1
            ids = torch.zeros((self.speed.batch, tokens), dtype=torch.int64, device=model.device)

            def call(more: dict[str, Any], ids: torch.Tensor = ids) -> None:
                model(input_ids=ids, use_cache=False, logits_to_keep=1)

            yield self._row("ends", phase, size, context, self._timed(dict, call))

    def _phases(self) -> tuple[tuple[Phase, int], ...]:
        return ("prefill", self.speed.lengths[0]), ("decode", decode_context(self.speed))

    def _row(self, part: Any, phase: Phase, size: Sizes, context: int, seconds: list[float]) -> Row:
        return Row(
            part=part, phase=phase, sizes=dict(size), batch=self.speed.batch, context=context,
            seconds=statistics.median(seconds), spread=max(seconds) - min(seconds),
            repeats=len(seconds),
        )  # fmt: skip

    def _model(self, changed: Sizes) -> PreTrainedModel:
        """A model with random weights; sizes that do not matter are as small as they can be."""
        smallest = {"layers": 1, "kv_heads": 1, "q_per_kv": 1, "ffn": 1, "moe_ffn": 1}
        own = sizes(self.family, self.config)
        size = {**own, **{a: n for a, n in smallest.items() if a in own}, **changed}
        config = with_sizes(self.family, self.config, size, kept_layers=(0,))
        config = {k: v for k, v in config.items() if not k.endswith("_token_id")}
        full = servable_config(config, dtype=self.dtype) | {"pad_token_id": None}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(
                as_library_config(full, where="the shape's config"),
                dtype=getattr(torch, self.dtype),
            )
        moved: PreTrainedModel = model.to(_device())
        return moved.eval()

    def _timed(
        self, prepare: Callable[[], dict[str, Any]], call: Callable[[dict[str, Any]], None]
    ) -> list[float]:
        """Seconds of each repeat after one that warms up; preparing does not count."""
        seconds = []
        for _ in range(self.speed.repeats + 1):
            more = prepare()
            _wait()
            began = self.clock()
            call(more)
            _wait()
            seconds.append(self.clock() - began)
        return seconds[1:]

    def _seen_by(
        self, model: PreTrainedModel, layer: nn.Module, phase: Phase, context: int
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the model's own code hands to its layer in a step of this phase."""
        ids = torch.zeros((self.speed.batch, context), dtype=torch.int64, device=model.device)
        cache: DynamicCache | None = None
        if phase == "decode":
            cache = DynamicCache(config=model.config)
            model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            ids = ids[:, :1]
        seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def note(_layer: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            kept = dict(named)
            if cache is not None:
                kept["past_key_values"] = copy.deepcopy(cache)  # before this step lengthens it
            seen.append((args, kept))

        handle = layer.register_forward_pre_hook(note, with_kwargs=True)
        model(input_ids=ids, past_key_values=cache, use_cache=cache is not None, logits_to_keep=1)
        handle.remove()
        return seen[0]


def grid_points(shapes: Shapes) -> Shapes:
    """The shapes to time so that every one of `shapes` lies between them.

    Every combination of the sizes that occur, or of three sizes an axis (both ends and one near the
    middle) where those are too many. The number of layers is not timed.
    """
    values = {axis: np.unique(of) for axis, of in shapes.sizes.items() if axis != "layers"}
    if np.prod([float(len(v)) for v in values.values()]) > MOST_POINTS:
        values = {axis: _three(v) for axis, v in values.items()}
    points = np.array(list(product(*values.values())), dtype=np.int64)
    found = {axis: points[:, k] for k, axis in enumerate(values)}
    return Shapes(found | {"layers": np.ones(len(points), dtype=np.int64)})


def _three(values: Any) -> Any:
    middle = values[np.argmin(np.abs(values - (values[0] + values[-1]) / 2))]
    return np.unique([values[0], middle, values[-1]])


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def _layers_name(family: Family) -> str:
    return next(t for t in family.tensors if t.per_layer).name.split(".{i}.")[0]
