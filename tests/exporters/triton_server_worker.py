"""A small server in place of Triton: the same wire formats in front of a repository's own model.py.

HTTP is Triton's generate extension, gRPC its inference protocol by tritonclient's own service.
Prints both ports as JSON, serves until standard input ends, and says that `finalize` came back.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "triton_stub"))

import grpc
import numpy as np
import triton_python_backend_utils as pb_utils
from google.protobuf import json_format, text_format
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc
from tritonclient.utils import deserialize_bytes_tensor, serialize_byte_tensor

NUMPY = {"TYPE_STRING": np.object_, "TYPE_BOOL": np.bool_, "TYPE_INT32": np.int32}


class Model:
    """The repository's one model, loaded as Triton's Python backend does."""

    def __init__(self, repository: Path) -> None:
        (folder,) = [p for p in repository.iterdir() if p.is_dir()]
        text = (folder / "config.pbtxt").read_text()
        self.config = text_format.Parse(text, model_config_pb2.ModelConfig())
        spec = importlib.util.spec_from_file_location("model", folder / "1" / "model.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["model"] = module
        spec.loader.exec_module(module)
        self._model = module.TritonPythonModel()
        as_dict = json_format.MessageToDict(self.config, preserving_proto_field_name=True)
        self._model.initialize({
            "model_config": json.dumps(as_dict), "model_repository": str(folder),
            "model_version": "1", "model_name": folder.name,
        })  # fmt: skip

    def ask(
        self, given: Mapping[str, Any], parameters: Mapping[str, Any]
    ) -> Iterator[tuple[Any, bool]]:
        """(response, is it the last) of one request; `given` are inputs by name."""
        kinds = {i.name: model_config_pb2.DataType.Name(i.data_type) for i in self.config.input}
        tensors = [
            pb_utils.Tensor(name, np.array([value], dtype=NUMPY[kinds[name]]))
            for name, value in given.items()
        ]
        request = pb_utils.InferenceRequest(tensors, parameters)
        self._model.execute([request])
        last = False
        while not last:
            response, last = request.get_response_sender().arrived.get(timeout=60)
            yield response, last

    def finalize(self) -> None:
        self._model.finalize()


def http_handler(model: Model) -> type[BaseHTTPRequestHandler]:
    inputs = {i.name for i in model.config.input}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            way = self.path.rsplit("/", 1)[-1]
            if self.path != f"/v2/models/{model.config.name}/{way}" or "generate" not in way:
                self._answer(404, b'{"error":"no such model"}')
                return
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            flat = {k: v for k, v in body.items() if k != "parameters"} | body.get("parameters", {})
            given = {
                k: v.encode() if isinstance(v, str) else v for k, v in flat.items() if k in inputs
            }
            parameters = {k: v for k, v in flat.items() if k not in inputs}
            answers = [as_json(response) for response, _ in model.ask(given, parameters)]
            if way == "generate_stream":
                events = "".join(f"data: {json.dumps(a)}\n\n" for a in answers)
                self._answer(200, events.encode(), kind="text/event-stream; charset=utf-8")
            elif len(answers) != 1:
                self._answer(400, b'{"error":"generate expects model to produce one response"}')
            else:
                self._answer(400 if "error" in answers[0] else 200, json.dumps(answers[0]).encode())

        def _answer(self, status: int, body: bytes, kind: str = "application/json") -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Quiet."""

    return Handler


def as_json(response: Any) -> dict[str, Any]:
    if response.error() is not None:
        return {"error": response.error().message()}
    found = {}
    for tensor in response.output_tensors():
        values = [v.decode() if isinstance(v, bytes) else v for v in tensor.as_numpy().tolist()]
        found[tensor.name()] = values[0] if len(values) == 1 else values
    return found


class Service(service_pb2_grpc.GRPCInferenceServiceServicer):
    def __init__(self, model: Model) -> None:
        self._model = model

    def ModelStreamInfer(self, requests: Iterator[Any], context: Any) -> Iterator[Any]:  # noqa: N802
        for request in requests:
            given = {
                i.name: deserialize_bytes_tensor(raw)[0]
                if i.datatype == "BYTES"
                else np.frombuffer(raw, np.bool_)[0]
                for i, raw in zip(request.inputs, request.raw_input_contents, strict=True)
            }
            for response, last in self._model.ask(given, {}):
                yield as_protobuf(response, last=last)


def as_protobuf(response: Any, *, last: bool) -> Any:
    answer = service_pb2.ModelStreamInferResponse()
    if response.error() is not None:
        answer.error_message = response.error().message()
    answer.infer_response.parameters["triton_final_response"].bool_param = last
    for tensor in response.output_tensors():
        array = tensor.as_numpy()
        output = answer.infer_response.outputs.add(name=tensor.name(), shape=list(array.shape))
        output.datatype = "BYTES" if array.dtype == np.object_ else "INT32"
        raw = serialize_byte_tensor(array).item() if output.datatype == "BYTES" else array.tobytes()
        answer.infer_response.raw_output_contents.append(raw)
    return answer


def main() -> None:
    model = Model(Path(sys.argv[1]))
    http = ThreadingHTTPServer(("127.0.0.1", 0), http_handler(model))
    threading.Thread(target=http.serve_forever, daemon=True).start()
    server = grpc.server(ThreadPoolExecutor(max_workers=4))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Service(model), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    print(json.dumps({"http": http.server_port, "grpc": port}), flush=True)
    sys.stdin.read()
    http.shutdown()
    server.stop(None)
    model.finalize()
    print("finalized", flush=True)


if __name__ == "__main__":
    main()
