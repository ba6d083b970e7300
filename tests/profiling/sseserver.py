"""A server of completions for tests: its delays are known, its faults come when asked for.

`python sseserver.py --port N --served-model-name NAME --plan JSON`, or with vLLM's options besides,
which it does not look at. Standard library only. Every answer of `/v1/completions` is a stream of
`max_tokens` chunks, the first after `first_s`, each further one after `gap_s`. The first token of a
prompt chooses a fault by its number; what was written when goes to the file `log`, a JSON line an
answer, on the clock of time.perf_counter, which all processes of a machine share.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from typing import Any

(REFUSED, BROKEN, SHORT, SILENT, UNCOUNTED, EMPTY_END, LONG_PROMPT, PAIRS, SAID_ERROR, NO_SSE, KEY,
 DIES, SPLIT) = range(1, 14)  # fmt: skip


class Server:
    """One model, one plan of delays."""

    def __init__(self, name: str, plan: dict[str, Any]) -> None:
        self.name, self.plan = name, plan
        self.connections = 0

    async def connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        connected = time.perf_counter()
        try:
            while head := await reader.readline():
                path = head.split()[1].decode()
                length, key = 0, ""
                while (line := (await reader.readline()).strip()) != b"":
                    name, _, value = line.partition(b":")
                    if name.lower() == b"content-length":
                        length = int(value)
                    if name.lower() == b"authorization":
                        key = value.strip().decode()
                body = await reader.readexactly(length)
                if path == "/v1/models":
                    entry = {"id": self.name, "max_model_len": self.plan.get("longest", 4096)}
                    self.plain(writer, 200, {"data": [entry]})
                elif path == "/connections":
                    self.plain(writer, 200, {"connections": self.connections})
                elif path == "/v1/completions":
                    await self.completion(writer, json.loads(body), key, connected)
                else:
                    self.plain(writer, 404, {"error": "no such page"})
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    def plain(self, writer: asyncio.StreamWriter, status: int, content: object) -> None:
        data = json.dumps(content).encode()
        writer.write(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n" % (status, len(data)) + data)

    async def completion(
        self, writer: asyncio.StreamWriter, asked: dict[str, Any], key: str, connected: float
    ) -> None:
        received = time.perf_counter()
        assert (asked["model"], asked["temperature"]) == (self.name, 0)
        assert asked["stream"] is asked["ignore_eos"] is True
        prompt = asked["prompt"]
        fault = prompt[0] if isinstance(prompt, list) and prompt[0] <= SPLIT else 0
        if fault == REFUSED:
            self.plain(writer, 400, {"error": {"message": f"prompt refused, {key}"}})
        elif fault == NO_SSE:
            self.plain(writer, 200, {"text": "all at once"})
        elif fault == DIES:
            os.killpg(os.getpgrp(), signal.SIGKILL)
        else:
            written = await self.stream(writer, len(prompt), asked["max_tokens"], fault)
            with open(self.plan["log"], "a") as log:
                row = {"connected": connected, "received": received, "written": written}
                log.write(json.dumps(row) + "\n")

    async def stream(
        self, writer: asyncio.StreamWriter, input_len: int, count: int, fault: int
    ) -> list[float]:
        writer.write(b"HTTP/1.1 200 X\r\nTransfer-Encoding: chunked\r\n\r\n")
        await asyncio.sleep(self.plan["first_s"] if fault != SILENT else 3600)
        written = []
        told = count // 2 if fault in (BROKEN, SHORT) else count
        step = 2 if fault == PAIRS else 1
        for k in range(0, told, step):
            if k:
                await asyncio.sleep(self.plan["gap_s"])
            written.append(time.perf_counter())
            choice = {"text": "ab"[:step], "finish_reason": None}
            await self.event(writer, {"choices": [choice]}, fault)
        if fault == BROKEN:
            writer.close()
            return written
        if fault == EMPTY_END:
            await asyncio.sleep(10 * self.plan["gap_s"])
            await self.event(writer, {"choices": [{"text": "", "finish_reason": "length"}]}, 0)
        if fault == SAID_ERROR:
            await self.event(writer, {"error": {"message": "out of memory"}}, 0)
        if fault != UNCOUNTED:
            tokens = input_len + (fault == LONG_PROMPT)
            usage = {"prompt_tokens": tokens, "completion_tokens": told}
            await self.event(writer, {"choices": [], "usage": usage}, 0)
        self.part(writer, b"data: [DONE]\n\n")
        writer.write(b"0\r\n\r\n")
        return written

    async def event(self, writer: asyncio.StreamWriter, content: object, fault: int) -> None:
        data = b"data: " + json.dumps(content).encode() + b"\n\n"
        if fault != SPLIT:
            self.part(writer, data)
        else:  # in pieces that end where no line does
            for piece in (data[:9], data[9:-1], data[-1:]):
                self.part(writer, piece)
                await writer.drain()
                await asyncio.sleep(0.001)

    def part(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        writer.write(b"%x\r\n" % len(data) + data + b"\r\n")


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--served-model-name", default="test")
    parser.add_argument("--plan", default=os.environ.get("SSE_PLAN", "{}"))
    asked, _ = parser.parse_known_args()
    plan = {"first_s": 0.05, "gap_s": 0.01, "log": os.devnull} | json.loads(asked.plan)
    print("starting on port", asked.port, flush=True)
    if "exit" in plan:
        sys.exit(plan["exit"])
    if "own_session" in plan:  # a child that no signal to our group reaches
        child = subprocess.Popen(["sleep", "600"], start_new_session=True)
        with open(plan["own_session"], "w") as file:
            file.write(f"{os.getpid()} {child.pid}")
    if plan.get("deaf"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if "sleep" in plan:
        print("loading for ever", flush=True)
        time.sleep(plan["sleep"])
    server = Server(asked.served_model_name, plan)
    listening = await asyncio.start_server(server.connection, "127.0.0.1", asked.port)
    async with listening:
        await listening.serve_forever()


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
