# SPDX-License-Identifier: Apache-2.0
"""Runs everything here that needs a GPU, each in a process of its own: python benchmarks/gpu.py [PART_OF_A_NAME]

The last line of stdout is a JSON list of their results, `null` for one that failed.
"""

import json
import subprocess
import sys
from pathlib import Path

CASES = (
    "turbo_vae.py --num-frames 125",
    "turbo_vae.py --num-frames 125 --height 1088 --width 1920 --tiling",
    "local_attention.py step",
    "local_attention.py variants",
    "memory.py check --size 256p",
    "memory.py table --size 1080p",
)


def main() -> None:
    results = []
    for case in CASES:
        if not any(part in case for part in sys.argv[1:] or ("",)):
            continue
        script, *arguments = case.split()
        command = [sys.executable, Path(__file__).with_name(script), *arguments, "--device", "cuda"]
        lines = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False).stdout.splitlines()
        is_result = bool(lines) and lines[-1].startswith("{")
        results.append(json.loads(lines[-1]) if is_result else None)
        print(case, lines[-1] if is_result else "failed", file=sys.stderr, flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
