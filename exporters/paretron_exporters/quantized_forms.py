"""The forms that a Hugging Face checkpoint can be quantised to, and which models each takes.

Data only, no torch: planning reads it. A form quantises the matrices inside of the layers;
embedding, head, norms, biases and the routers of experts stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any, Literal

from paretron.errors import Code, Problem
from paretron.families import Family, Placed, expected_tensors, family_of, placed_tensors, sizes
from paretron.versions import missing_or_old

FLOORS = {"nvidia-modelopt": "0.47", "requests": "2.32"}
INSTALL = 'pip install "paretron[quantize]"'
Codes = Literal["int8", "fp8", "int4", "nvfp4"]
Layout = dict[str, tuple[str, tuple[int, ...]]]  # name -> (safetensors dtype, shape)

# The last part of the name of what stands beside a quantised weight.
SCALE, SCALE_2, INPUT, SMOOTH = "weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale"
INT4_BLOCK, NVFP4_BLOCK = 128, 16


@dataclass(frozen=True)
class Form:
    """One way to store a model in fewer bits, and what must hold of the result.

    `multiple` is of the input sizes of matrices, `multiple_out` of their output sizes; the engines'
    kernels ask for them. `largest_error` bounds the relative Frobenius error of one matrix, `kl`
    the divergence of logits (nats a token) that rounding the weights causes.
    """

    name: str
    codes: Codes
    about: str
    multiple: int
    multiple_out: int
    largest_error: float
    kl: float
    calibrated: bool = False  # by nvidia-modelopt, on a text
    smoothed: bool = False  # inputs are multiplied by `pre_quant_scale`, weights divided by it
    kv_cache: bool = False
    experts: bool = True
    vllm: bool = True


# Bounds of the error of a matrix. FP8 (e4m3) keeps four bits of every weight: rounding them is
# 2^-4 / sqrt(3) of the power of two below, 0.026 over all. INT8 rounds to 1/127 of a row's largest
# weight: 0.009 where that is four times the spread, as in a normal distribution, and a row whose
# outlier makes it 0.05 is not one for this form. INT4 (1/7 of the largest of 128) and NVFP4 (1/6
# of the largest of 16, in steps that grow) were measured at 0.12 and 0.095 on normal weights.
# SmoothQuant's weights take over the spread of the activations: up to 0.09 was measured on inputs
# whose channels are far apart, while logits stay within the bound.
# Bounds of the divergence are for the rounding of weights alone.
FORMS: dict[str, Form] = {
    form.name: form
    for form in (
        Form("int8", "int8", "INT8 weights by output channel, INT8 activations by token",
             16, 16, 0.05, 1e-2),
        Form("fp8_dynamic", "fp8", "FP8 weights by output channel, FP8 activations by token",
             16, 16, 0.03, 5e-2),
        Form("fp8", "fp8", "FP8 weights and activations, a scale for each matrix",
             16, 16, 0.03, 5e-2, calibrated=True),
        Form("fp8_kv", "fp8", "FP8 weights, activations and key-value cache, a scale for each",
             16, 16, 0.03, 5e-2, calibrated=True, kv_cache=True),
        Form("nvfp4", "nvfp4", "NVFP4 weights and activations in blocks of 16",
             NVFP4_BLOCK, 16, 0.15, 0.5, calibrated=True),
        Form("int4_awq", "int4", "INT4 weights in blocks of 128 along the input, smoothed (AWQ)",
             INT4_BLOCK, 16, 0.2, 0.5, calibrated=True, smoothed=True, experts=False, vllm=False),
        Form("int8_sq", "int8", "INT8 weights and activations, smoothed (SmoothQuant)",
             16, 16, 0.2, 1e-2, calibrated=True, smoothed=True, vllm=False),
    )
}  # fmt: skip

# Whose checkpoints were quantised, read back, and seen to give the source's logits. A family with
# experts is not among those that int4_awq takes: modelopt 0.47 cannot smooth stacked experts.
TRIED = (
    "llama", "mistral", "qwen2", "qwen3", "nemotron", "gemma2", "gemma3_text", "phi3", "olmo2",
    "granite", "starcoder2", "smollm3", "mixtral", "qwen3_moe",
)  # fmt: skip


def form_problems(config: Mapping[str, Any], *, quantize: str) -> list[Problem]:
    """What keeps a model from a form: its name, family, sizes, or a package that is not here."""
    form = FORMS.get(quantize)
    if form is None:
        return [_unsupported(f"quantize: {quantize}", f"supported: {', '.join(FORMS)}")]
    family = family_of(config)
    if family.model_type not in TRIED:
        cause = f"{family.model_type} was not yet quantised"
        return [_unsupported(cause, f"supported: {', '.join(TRIED)}")]
    if not form.experts and "experts" in sizes(family, config):
        others = ", ".join(f.name for f in FORMS.values() if f.experts)
        cause = f"{form.name} takes no family with experts, and this is {family.model_type}"
        return [_unsupported(cause, f"one of {others}")]
    problems = _odd_sizes(form, family, config)
    return problems + (missing_or_old(FLOORS, install=INSTALL) if form.calibrated else [])


def calibration_needs(quantize: str, *, params: int, embedding_params: int) -> tuple[int, int]:
    """Bytes of memory to calibrate a form, and of disk beside the result; (0, 0) without.

    The model is held in float32, and in float32 the library writes what it does not quantise.
    """
    form = FORMS.get(quantize)
    if form is None or not form.calibrated:
        return 0, 0
    bits = 4 if form.codes in ("int4", "nvfp4") else 8
    return 4 * params, (params - embedding_params) * bits // 8 + 4 * embedding_params


def quantised(family: Family, config: Mapping[str, Any]) -> dict[str, Placed]:
    """Name of each matrix that a form quantises -> its place, in the order of execution."""
    return {p.name: p for p in placed_tensors(family, config) if _is_quantised(p)}


def sharing_input(places: Mapping[str, Placed]) -> dict[str, tuple[str, ...]]:
    """Name -> the matrices that read what it reads, itself among them; they may share scales."""
    groups: dict[tuple[str, str], list[str]] = {}
    keys = {n: (n.rsplit(".", 2)[0], _axes(p, 1)) for n, p in places.items()}
    for name, key in keys.items():
        groups.setdefault(key, []).append(name)
    return {name: tuple(groups[key]) for name, key in keys.items()}


def folded_norms(family: Family, config: Mapping[str, Any]) -> dict[str, str]:
    """Matrix -> weight of the norm whose output it alone and its like read, where there is one.

    AWQ's smoothing goes into that norm where several matrices share its output.
    """
    after = tuple(norm for _, norm in family.post_norms)
    norms = [t for t in family.tensors if t.per_layer and t.is_norm and not t.name.endswith(after)]
    places = quantised(family, config)
    shared = sharing_input(places)
    found = {}
    for name, place in places.items():
        if norms and _axes(place, 1) == "hidden" and len(shared[name]) > 1:
            norm = norms[0] if ".self_attn." in name else norms[1]
            found[name] = norm.name.format(i=place.layer)
    return found


def stored_layout(
    form: Form, family: Family, config: Mapping[str, Any], *, dtypes: Mapping[str, str]
) -> Layout:
    """Every tensor of a quantised checkpoint; `dtypes` are those of the tensors of the source."""
    places, out = quantised(family, config), Layout()
    folded = folded_norms(family, config) if form.name == "int4_awq" else {}
    for name, shape in expected_tensors(family, config).items():
        if name not in places:
            out[name] = (dtypes[name], shape)
            continue
        module = name.removesuffix("weight")
        out |= {module + last: what for last, what in _parts(form, shape).items()}
        if form.smoothed and name not in folded and places[name].expert is None:
            out[module + SMOOTH] = (dtypes[name], shape[1:])
        if form.kv_cache:
            out |= dict.fromkeys(_cache_scales(module), ("F32", ()))
    return out


def _cache_scales(module: str) -> tuple[str, ...]:
    """The scales of the cache that follow a matrix: that of what it writes, keys or values.

    A family that has both in one matrix gets the names of those that have two.
    """
    if module.endswith("qkv_proj."):
        module = module.removesuffix("qkv_proj.")
        return (f"{module}k_proj.k_scale", f"{module}v_proj.v_scale")
    return tuple(f"{module}{x}_scale" for x in "kv" if module.endswith(f"{x}_proj."))


def _parts(form: Form, shape: tuple[int, ...]) -> Layout:
    out, reads = shape
    scalar: tuple[str, tuple[int, ...]] = ("F32", ())
    match form.codes, form.calibrated:
        case ("int8", False):
            return {"weight": ("I8", shape), SCALE: ("F32", (out, 1))}
        case ("fp8", False):
            return {"weight": ("F8_E4M3", shape), SCALE: ("F32", (out, 1))}
        case ("int8", True):
            return {"weight": ("I8", shape), SCALE: ("F32", (out,)), INPUT: scalar}
        case ("fp8", True):
            return {"weight": ("F8_E4M3", shape), SCALE: scalar, INPUT: scalar}
        case ("int4", _):
            blocks = ("F32", (out, reads // INT4_BLOCK))
            return {"weight": ("U8", (out // 2, reads)), SCALE: blocks}
        case _:
            blocks = ("F8_E4M3", (out, reads // NVFP4_BLOCK))
            packed = ("U8", (out, reads // 2))
            return {"weight": packed, SCALE: blocks, SCALE_2: scalar, INPUT: scalar}


def _is_quantised(place: Placed) -> bool:
    row = place.row
    return row.per_layer and len(row.dims) == 2 and row.dims[0] != (("experts",),)


def _axes(place: Placed, dim: int) -> str:
    return place.row.dims_text.split(",")[dim].strip()


def _odd_sizes(form: Form, family: Family, config: Mapping[str, Any]) -> list[Problem]:
    """One problem for each axis, or product of axes, that the form's kernels do not take."""
    shapes = expected_tensors(family, config)
    found: dict[str, Problem] = {}
    for name, place in quantised(family, config).items():
        for dim, multiple in ((1, form.multiple), (0, form.multiple_out)):
            axes, size = _axes(place, dim), shapes[name][dim]
            if size % multiple and axes not in found:
                below, above = size // multiple * multiple, ceil(size / multiple) * multiple
                nearest = f"{below} or {above}" if below else f"{above}"
                found[axes] = _unsupported(
                    f"{form.name} takes {axes} in multiples of {multiple}, and it is {size}",
                    f"nearest: {nearest}",
                    where=name,
                )
    return list(found.values())


def _unsupported(cause: str, fix: str, *, where: str = "export.quantize") -> Problem:
    return Problem(Code.UNSUPPORTED, cause, where=where, fix=fix)
