"""The device that engines run on, measured shortly in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from paretron.errors import Code, ParetronError, Problem
from paretron_profiling.roofline.devices import Device

WORKER = Path(__file__).with_name("probe_worker.py")
TIMEOUT_S = 120.0


def probe_device(*, python: Path | None = None) -> Device:
    """Measure the first GPU that torch sees, or else the CPU: some seconds with torch's start.

    It runs under this interpreter, or under `python`, with the environment's threads and the cores
    that this process may use, as the engines do. Errors: ENGINE.
    """
    command = [str(python or sys.executable), "-I", str(WORKER)]
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_TOKEN", "HUGGING_FACE"))}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_S, check=True, env=kept
        )
        return Device.from_json(json.loads(done.stdout))
    except subprocess.TimeoutExpired as error:
        raise _failed(f"gave no answer for {TIMEOUT_S:.0f} s") from error
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or ["nothing said"])[-1]
        raise _failed(f"ended with {error.returncode}: {last[:300]}") from error
    except OSError as error:
        raise _failed(f"could not start: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise _failed("printed something else than its figures") from error


def _failed(cause: str) -> ParetronError:
    return ParetronError(
        Problem(
            Code.ENGINE,
            f"the device's probe {cause}",
            where=WORKER.name,
            fix="the measurements do without it; a roofline needs it, or a device by its numbers",
        )
    )
