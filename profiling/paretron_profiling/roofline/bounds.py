"""The least time that a step of a model can take on a device, and what it is limited by.

A step is a prefill of a batch or the decoding of one token for each of its requests. It reads the
weights once (of experts, those that its tokens are expected to be routed to), and the keys and
values of every request; it multiplies. Neither can be done faster than the device reads and
multiplies, so that no engine is faster than

    bound = max((weight bytes + KV bytes) / bandwidth, FLOPs of layers / rate + other FLOPs / rate).

Activations, the lookup of embeddings, sampling and what runs between steps are left out; prefill in
several chunks reads the weights more than once. What small operations cost to start is a second
figure, because it is of the engine as much as of the device: launches * launch cost.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from paretron.families import family_of
from paretron.families.experts import PER_TOKEN
from paretron.families.kinds import windowed_layers
from paretron.plan.cost import model_facts
from paretron_profiling.roofline.devices import Device

PREFILL, DECODE = "prefill", "decode"
MEMORY, COMPUTE, LAUNCH = "memory", "compute", "launch"

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8": 1, "int8": 1}


@dataclass(frozen=True)
class Formats:
    """How a model is held and multiplied, as keys of BYTES.

    `layers` are the matrices of the layers, `others` the head and what is computed between them,
    `kv` the cache. Quantised checkpoints leave the head in 16 bits.
    """

    layers: str
    others: str
    kv: str

    @classmethod
    def of(cls, dtype: str, *, kv: str | None = None) -> Formats:
        """The formats of a checkpoint in `dtype`: what has 8 bits computes the rest in bfloat16."""
        others = "bfloat16" if BYTES[dtype] == 1 else dtype
        return cls(dtype, others, kv or others)


@dataclass(frozen=True)
class Launches:
    """How many small operations a step starts: in each layer, and outside of the layers."""

    per_layer: int
    outside: int
    basis: str


# What a step of a Llama starts. Another family's layer differs by some of its norms and biases.
LAUNCHES: Mapping[str, Launches] = {
    "transformers": Launches(40, 22, "operations of torch that a bf16 Llama's forward calls"),
    "vllm": Launches(10, 5, "kernels that its Llama names, without CUDA graphs: an estimate"),
    "ortgenai": Launches(
        11, 11, "nodes of its graph of a Llama, each at the cost of a small operation of torch"
    ),
}


@dataclass(frozen=True)
class Costs:
    """What a model reads and computes, from its config; bytes are those of `formats`.

    shared_bytes are read in every step: layers without their experts, the final norm, the head.
    expert_bytes are those of all experts of all layers. weight_bytes is what lies in memory.
    kv_bytes and attention_flops are of one layer for one position (and one token that sees it).
    """

    formats: Formats
    layers: int
    windowed_layers: int
    window: int
    shared_bytes: float
    expert_bytes: float
    experts: int
    experts_per_token: int
    weight_bytes: float
    kv_bytes: int
    attention_flops: int
    layer_flops: int
    head_flops: int

    @classmethod
    def of(
        cls,
        config: Mapping[str, Any],
        *,
        formats: Formats,
        bytes_per_weight: float | None = None,
    ) -> Costs:
        """The costs of a model of this config.

        `bytes_per_weight` is what a parameter takes on average where the formats do not say it
        (weights in 4 bits with their scales).
        """
        family = family_of(config)
        facts = model_facts(config, dtype="bfloat16")  # counts alone are read
        size = facts.sizes
        experts, routed = size.get("experts", 1), int(config.get(PER_TOKEN) or 1)
        idle = facts.params - facts.active_params  # of the experts, those a token does not pass
        expert_params = idle * experts // (experts - routed) if idle else 0
        windowed, window = windowed_layers(family, config)
        in_layers = bytes_per_weight or BYTES[formats.layers]
        elsewhere = bytes_per_weight or BYTES[formats.others]
        head = size["vocab"] * size["hidden"]
        embeddings = facts.params - facts.non_embedding_params
        return cls(
            formats=formats,
            layers=size["layers"],
            windowed_layers=windowed,
            window=window,
            shared_bytes=(facts.non_embedding_params - expert_params) * in_layers
            + head * elsewhere,
            expert_bytes=expert_params * in_layers,
            experts=experts,
            experts_per_token=routed,
            weight_bytes=facts.non_embedding_params * in_layers + embeddings * elsewhere,
            kv_bytes=2 * size["kv_heads"] * size["head_dim"] * BYTES[formats.kv],
            attention_flops=facts.attention_flops_per_token_and_position // size["layers"],
            layer_flops=facts.forward_flops_per_token - 2 * head,
            head_flops=2 * head,
        )

    def read_bytes(self, tokens: float) -> float:
        """Bytes of weights that a step of so many tokens reads.

        Of E experts, each token is routed to k: if all are as likely, (1 - k/E)^tokens of them are
        not touched.
        """
        idle = 1 - self.experts_per_token / self.experts
        return self.shared_bytes + self.expert_bytes * (1 - idle**tokens)

    def kv_bytes_at(self, context: float) -> float:
        """Bytes of one request's keys and values after `context` tokens, windows taken off."""
        return self.kv_bytes * self._positions(context, min(context, self.window))

    def memory_bytes(self, *, batch: float, context: float) -> float:
        """Weights and the KV cache of a batch."""
        return self.weight_bytes + batch * self.kv_bytes_at(context)

    def attention_flops_at(self, positions: float, windowed: float) -> float:
        """FLOPs of one token that sees so many positions, or `windowed` in a window's layer."""
        return self.attention_flops * self._positions(positions, windowed)

    def _positions(self, full: float, windowed: float) -> float:
        """Positions summed over layers."""
        return (self.layers - self.windowed_layers) * full + self.windowed_layers * windowed


@dataclass(frozen=True)
class Bound:
    """The parts of a step's bound, in seconds; launch_s is None where no launch cost is known."""

    phase: str
    weights_s: float
    kv_s: float
    compute_s: float
    launch_s: float | None
    in_order: bool  # launching and computing take turns, as on a CPU

    @property
    def memory_s(self) -> float:
        """Of reading weights and cache."""
        return self.weights_s + self.kv_s

    @property
    def bound_s(self) -> float:
        """The least time, launches left out."""
        return max(self.memory_s, self.compute_s)

    @property
    def with_launch_s(self) -> float:
        """With what launches cost: added where they take turns with the work; a GPU works while
        the next ones are queued, so there the longer of both."""
        launch_s = self.launch_s or 0.0
        return self.bound_s + launch_s if self.in_order else max(self.bound_s, launch_s)

    @property
    def limited_by(self) -> str:
        """The longest of the three."""
        if (self.launch_s or 0.0) > self.bound_s:
            return LAUNCH
        return MEMORY if self.memory_s >= self.compute_s else COMPUTE

    def as_json(self) -> dict[str, Any]:
        """Bound, what limits, and the parts."""
        return {
            "bound_s": self.bound_s,
            "with_launch_s": self.with_launch_s,
            "limited_by": self.limited_by,
            "parts": {
                "weights_s": self.weights_s,
                "kv_s": self.kv_s,
                "compute_s": self.compute_s,
                "launch_s": self.launch_s,
            },
        }


def prefill_bound(
    costs: Costs,
    device: Device,
    *,
    batch: float,
    input_len: int,
    launches: Launches | None = None,
) -> Bound:
    """The bound of running a batch of prompts until their first tokens; the head runs once each."""
    tokens = batch * input_len
    seen = costs.attention_flops_at(
        mean_positions(input_len, input_len), mean_positions(input_len, costs.window)
    )
    return _bound(
        PREFILL, costs, device, launches,
        weights=costs.read_bytes(tokens),
        kv=batch * costs.kv_bytes_at(input_len),
        layer_flops=tokens * costs.layer_flops,
        other_flops=tokens * seen + batch * costs.head_flops,
    )  # fmt: skip


def decode_bound(
    costs: Costs,
    device: Device,
    *,
    batch: float,
    context: float,
    launches: Launches | None = None,
) -> Bound:
    """The bound of one more token for each of `batch` requests behind `context` tokens."""
    seen = costs.attention_flops_at(context, min(context, costs.window))
    return _bound(
        DECODE, costs, device, launches,
        weights=costs.read_bytes(batch),
        kv=batch * costs.kv_bytes_at(context),
        layer_flops=batch * costs.layer_flops,
        other_flops=batch * (seen + costs.head_flops),
    )  # fmt: skip


def mean_context(input_len: int, output_len: int) -> float:
    """The tokens that a decode step sees on average, its own among them.

    The first token comes from the prefill; of the output_len - 1 steps after it the first sees
    input_len + 1 and the last input_len + output_len - 1.
    """
    return input_len + output_len / 2


def mean_positions(length: int, window: int) -> float:
    """The positions that a token of a prompt sees on average when it sees `window` at most."""
    if length <= window:
        return (length + 1) / 2
    return window - window * (window - 1) / (2 * length)


def _bound(
    phase: str,
    costs: Costs,
    device: Device,
    launches: Launches | None,
    *,
    weights: float,
    kv: float,
    layer_flops: float,
    other_flops: float,
) -> Bound:
    bandwidth = device.bandwidth_of(weights + kv)
    formats = costs.formats
    # Weights in a format that the device does not multiply are widened to the others'.
    compute_s = layer_flops / _rate(device, formats.layers, formats.others)
    compute_s += other_flops / _rate(device, formats.others)
    launch_s = None
    if launches is not None and device.launch_s is not None:
        launch_s = device.launch_s * (costs.layers * launches.per_layer + launches.outside)
    return Bound(
        phase, weights / bandwidth, kv / bandwidth, compute_s, launch_s, device.kind == "cpu"
    )


def _rate(device: Device, *dtypes: str) -> float:
    """FLOP/s in the first dtype that the device multiplies, else in its fastest: still a bound."""
    known = (rate for dtype in dtypes if (rate := device.flop_s.get(dtype)))
    return next(known, max(rate for rate in device.flop_s.values() if rate))
