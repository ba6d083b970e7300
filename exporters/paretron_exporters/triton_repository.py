"""The files of a Triton model repository: what each backend reads, as text.

A repository is one folder with one model in it: `NAME/config.pbtxt`, `NAME/1/` with what the
backend starts from, and `NAME/1/weights/`. Servers see it at MOUNT. The engines' own settings take
absolute paths only (vLLM's backend and TensorRT-LLM's resolve relative ones against the folder that
the server happened to be started in), so they name MOUNT; the ONNX model finds its graph beside
itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from paretron.artifacts.jsonfile import dump
from paretron.recipe import Export
from paretron_exporters.trtllm import write_settings

Backend = Literal["trtllm", "vllm", "onnx"]
BACKENDS: tuple[Backend, ...] = ("trtllm", "vllm", "onnx")
MOUNT = "/models"
WEIGHTS = "weights"
# The model.py of TensorRT-LLM's release is made for a model of this name.
NAMES: Mapping[Backend, str] = {"trtllm": "tensorrt_llm", "vllm": "llm", "onnx": "llm"}
# The file in `1/` that a backend starts from.
STARTED_FROM: Mapping[Backend, str] = {
    "trtllm": "model.yaml",
    "vllm": "model.json",
    "onnx": "model.py",
}
# How the same wish is called in a request to each backend.
_ASKED: Mapping[Backend, Mapping[str, str]] = {
    "trtllm": {
        "stream": "streaming",
        "max_tokens": "sampling_param_max_tokens",
        "temperature": "sampling_param_temperature",
        "without_prompt": "sampling_param_exclude_input_from_output",
    },
    "vllm": {
        "stream": "stream",
        "max_tokens": "max_tokens",
        "temperature": "temperature",
        "without_prompt": "exclude_input_in_output",
    },
}
CLIENTS = ("client_http.py", "client_grpc.py")


@dataclass(frozen=True)
class Deployment:
    """What a server is started with; `max_seq_len` counts tokens of prompt and answer together.

    `arguments` are the engine's own.
    """

    backend: Backend
    max_seq_len: int
    max_batch_size: int
    arguments: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The model's name in URLs, and its folder's."""
        return NAMES[self.backend]

    @property
    def weights_on_server(self) -> str:
        """Where the server sees the weights."""
        return f"{MOUNT}/{self.name}/1/{WEIGHTS}"


def write_repository(folder: Path, deployment: Deployment) -> None:
    """Write every file but the weights; `NAME/1/` is there already."""
    version = folder / deployment.name / "1"
    start = version / STARTED_FROM[deployment.backend]
    config = {"trtllm": _trtllm_config, "vllm": _vllm_config, "onnx": _onnx_config}
    text = config[deployment.backend](deployment)
    (folder / deployment.name / "config.pbtxt").write_text(text, "utf-8")
    if deployment.backend == "trtllm":
        # Batches are TensorRT-LLM's own, so Triton makes none; only a decoupled model streams.
        triton = {"triton_config": {"max_batch_size": 0, "decoupled": True}}
        model = {"model": deployment.weights_on_server, "backend": "pytorch"}
        write_settings(start, model | dict(deployment.arguments) | triton)
    elif deployment.backend == "vllm":
        dump(start, {"model": deployment.weights_on_server} | dict(deployment.arguments))
    else:
        start.write_text(_packaged("model.py"), "utf-8")
    for name in CLIENTS:
        (folder / name).write_text(_client(name, deployment), "utf-8")


def vllm_arguments(export: Export, *, max_seq_len: int, dtype: str) -> dict[str, Any]:
    """Arguments of vLLM's AsyncEngineArgs, which refuses a key that it does not know.

    Left to itself it computes float32 weights in half precision, which is not what was compared.
    """
    return {
        "dtype": dtype,
        "tensor_parallel_size": export.tensor_parallel,
        "pipeline_parallel_size": export.pipeline_parallel,
        "max_model_len": max_seq_len,
        "max_num_seqs": export.serving.max_batch_size,
        "max_num_batched_tokens": export.serving.max_num_tokens,
        "gpu_memory_utilization": export.serving.gpu_memory,
    }


def _packaged(name: str) -> str:
    folder = resources.files("paretron_exporters") / "triton_files"
    return (folder / f"{name}.txt").read_text("utf-8")


def _client(name: str, deployment: Deployment) -> str:
    """A client with the model's name and the backend's words put in; both are ours."""
    asked = _ASKED.get(deployment.backend, _ASKED["vllm"])
    lines = "".join(f'    "{wish}": "{word}",\n' for wish, word in asked.items())
    text = _packaged(name).replace('"$model"', f'"{deployment.name}"')
    # A response of TensorRT-LLM's stream holds the whole text so far, of the others the next part.
    text = text.replace('"$whole"', str(deployment.backend == "trtllm"))
    return text.replace('"$asked"', "{\n" + lines + "}")


def _vllm_config(deployment: Deployment) -> str:
    """Inputs, outputs and transactions are completed by the backend itself."""
    return f"""\
name: "{deployment.name}"
backend: "vllm"
instance_group [{{ count: 1 kind: KIND_MODEL }}]
"""


def _onnx_config(deployment: Deployment) -> str:
    """Inputs as those of vLLM's backend; `token_ids` is one more output."""
    return f"""\
name: "{deployment.name}"
backend: "python"
max_batch_size: 0
model_transaction_policy {{ decoupled: true }}
{_inputs(_ONNX_INPUTS)}
{_outputs(_ONNX_OUTPUTS)}
instance_group [{{ count: 1 kind: KIND_CPU }}]
{_parameter("max_seq_len", deployment.max_seq_len)}
{_parameter("max_sessions", deployment.max_batch_size)}
"""


def _trtllm_config(deployment: Deployment) -> str:
    """`max_batch_size` and transactions are stated in model.yaml, which model.py reads."""
    return f"""\
name: "{deployment.name}"
backend: "python"
{_inputs(_TRTLLM_INPUTS)}
{_outputs(_TRTLLM_OUTPUTS)}
instance_group [{{ count: 1 kind: KIND_CPU }}]
"""


# Name -> type and number of values; only the text must be given.
_ONNX_INPUTS = {
    "text_input": ("STRING", 1),
    "stream": ("BOOL", 1),
    "sampling_parameters": ("STRING", 1),
    "exclude_input_in_output": ("BOOL", 1),
}
_ONNX_OUTPUTS = {
    "text_output": ("STRING", -1),
    "token_ids": ("INT32", -1),
    "finish_reason": ("STRING", -1),
}
_TRTLLM_INPUTS = {
    "text_input": ("STRING", -1),
    "streaming": ("BOOL", 1),
    "sampling_param_best_of": ("INT32", 1),
    "sampling_param_temperature": ("FP32", 1),
    "sampling_param_top_k": ("INT32", 1),
    "sampling_param_top_p": ("FP32", 1),
    "sampling_param_frequency_penalty": ("FP32", 1),
    "sampling_param_presence_penalty": ("FP32", 1),
    "sampling_param_max_tokens": ("INT32", 1),
    "sampling_param_stop": ("STRING", -1),
    "sampling_param_seed": ("UINT64", 1),
    "sampling_param_exclude_input_from_output": ("BOOL", 1),
    "sampling_param_return_perf_metrics": ("BOOL", 1),
    "return_finish_reason": ("BOOL", 1),
    "return_stop_reason": ("BOOL", 1),
    "return_cumulative_logprob": ("BOOL", 1),
    "stop": ("BOOL", 1),
}
_TRTLLM_OUTPUTS = {
    "text_output": ("STRING", -1),
    "finish_reason": ("STRING", -1),
    "stop_reason": ("STRING", -1),
    "cumulative_logprob": ("FP32", -1),
    "kv_cache_reused_block": ("INT32", -1),
    "kv_cache_missed_block": ("INT32", -1),
    "kv_cache_alloc_new_blocks": ("INT32", -1),
    "kv_cache_alloc_total_blocks": ("INT32", -1),
    "kv_cache_hit_rate": ("FP32", -1),
    "arrival_time_ns": ("INT64", 1),
    "first_scheduled_time_ns": ("INT64", 1),
    "first_token_time_ns": ("INT64", 1),
    "last_token_time_ns": ("INT64", 1),
    "acceptance_rate": ("FP32", 1),
    "total_accepted_draft_tokens": ("INT32", 1),
    "total_draft_tokens": ("INT32", 1),
}


def _inputs(tensors: Mapping[str, tuple[str, int]]) -> str:
    return "\n".join(
        f'input {{ name: "{name}" data_type: TYPE_{kind} dims: [{count}]'
        f"{'' if name == 'text_input' else ' optional: true'} }}"
        for name, (kind, count) in tensors.items()
    )


def _outputs(tensors: Mapping[str, tuple[str, int]]) -> str:
    return "\n".join(
        f'output {{ name: "{name}" data_type: TYPE_{kind} dims: [{count}] }}'
        for name, (kind, count) in tensors.items()
    )


def _parameter(key: str, value: int) -> str:
    return f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}'
