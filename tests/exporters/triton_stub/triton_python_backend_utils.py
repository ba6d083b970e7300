"""What a model of Triton's Python backend sees of its server, as far as ours uses it.

Names and behaviour are those of the module that the server gives to such a model.
"""

from __future__ import annotations

import json
import queue
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1


class TritonError:
    INVALID_ARG = 4
    CANCELLED = 7

    def __init__(self, message: str, code: int = INVALID_ARG) -> None:
        self._message, self._code = message, code

    def message(self) -> str:
        return self._message

    def code(self) -> int:
        return self._code


class Tensor:
    def __init__(self, name: str, array: np.ndarray[Any, Any]) -> None:
        if not isinstance(array, np.ndarray):
            raise TypeError("a tensor is made from a numpy array")
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray[Any, Any]:
        return self._array


class InferenceResponse:
    def __init__(
        self, output_tensors: Sequence[Tensor] = (), error: TritonError | None = None
    ) -> None:
        self._tensors, self._error = list(output_tensors), error

    def output_tensors(self) -> list[Tensor]:
        return self._tensors

    def error(self) -> TritonError | None:
        return self._error


SENT: list[ResponseSender] = []  # who sent each response, in order


class ResponseSender:
    """Gives responses to whoever reads `arrived`, and refuses one after the last."""

    def __init__(self) -> None:
        self.arrived: queue.Queue[tuple[InferenceResponse, bool]] = queue.Queue()
        self.cancelled = False
        self._closed = False

    def send(self, response: InferenceResponse, flags: int = 0) -> None:
        if self._closed:
            raise RuntimeError("a response after the final one")
        SENT.append(self)
        self._closed = flags == TRITONSERVER_RESPONSE_COMPLETE_FINAL
        self.arrived.put((response, self._closed))

    def is_cancelled(self) -> bool:
        return self.cancelled


class InferenceRequest:
    def __init__(self, inputs: Sequence[Tensor], parameters: Mapping[str, Any]) -> None:
        self._inputs, self._parameters = list(inputs), dict(parameters)
        self._sender = ResponseSender()

    def inputs(self) -> list[Tensor]:
        return self._inputs

    def parameters(self) -> str:
        return json.dumps(self._parameters)

    def get_response_sender(self) -> ResponseSender:
        return self._sender


class Logger:
    @staticmethod
    def log_error(message: str) -> None:
        print(message, file=sys.stderr)


def get_input_tensor_by_name(request: InferenceRequest, name: str) -> Tensor | None:
    return next((t for t in request.inputs() if t.name() == name), None)
