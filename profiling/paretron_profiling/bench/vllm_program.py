"""vLLM's own benchmarks, started as a program: the `vllm` command is not in every build of it.

`python -I vllm_program.py serve|throughput|latency OPTION...` under an interpreter that has vLLM.
vLLM starts processes that import this file again, so that nothing happens on import.
"""

from __future__ import annotations

import sys
from importlib import import_module


def main(name: str, options: list[str]) -> None:
    """What `vllm bench NAME OPTION...` does."""
    benchmark = import_module(f"vllm.benchmarks.{name}")
    # Their parser: it takes the spellings that vLLM's own commands take.
    parser = import_module("vllm.utils.argparse_utils").FlexibleArgumentParser()
    benchmark.add_cli_args(parser)
    benchmark.main(parser.parse_args(options))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
