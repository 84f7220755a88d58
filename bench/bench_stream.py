"""What it costs to stream shards: memory that must not grow with the data set, and records a second.

    python bench/bench_stream.py [--records 500]

The data set is written at 1, 4 and 16 times the size; each is streamed, shuffled, by a fresh process that does nothing
else, and whose peak memory is taken.  Writes bench/results/stream.json.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from perceptio.data.record import assistant, make_record, user
from perceptio.data.shards import write_shards
from perceptio.data.stream import stream

SIDE, BUFFER = 224, 64


def records(count: int):
    """Pictures of about 30 kB."""
    rng = np.random.default_rng(0)
    for index in range(count):
        file = BytesIO()
        pixels = rng.integers(0, 255, (SIDE // 2, SIDE // 2, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((SIDE, SIDE)).save(file, "JPEG", quality=90)
        yield make_record(
            id=f"row-{index:06d}",
            image=file.getvalue(),
            messages=[user("What is this?"), assistant("Noise.")],
            source="bench",
            licence="CC0-1.0",
        )


def measure(count: int) -> dict:
    """Peak memory and speed of a fresh process that streams `count` records."""
    with tempfile.TemporaryDirectory() as folder:
        write_shards(records(count), folder, bytes_per_shard=16 << 20)
        size = sum(path.stat().st_size for path in Path(folder).rglob("*.parquet"))
        done = subprocess.run(
            [sys.executable, __file__, "--stream", folder], capture_output=True, text=True, check=True
        )
    return {"records": count, "bytes": size, **json.loads(done.stdout.splitlines()[-1])}


def print_cost(folder: str) -> None:
    start, count = time.perf_counter(), 0
    for record in stream(folder, shuffle_buffer=BUFFER):
        count += len(record["image"]["bytes"]) > 0
    seconds = time.perf_counter() - start
    # Not getrusage: its peak is inherited from the process that started this one.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    peak = 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
    print(json.dumps({"peak_bytes": peak, "records_per_second": count / seconds, "streamed": count}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=500)
    parser.add_argument("--stream", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stream:
        return print_cost(arguments.stream)
    results = {}
    for factor in (1, 4, 16):
        found = results[f"x{factor}"] = measure(factor * arguments.records)
        if found["streamed"] != found["records"]:
            raise SystemExit(f"{found['streamed']} of {found['records']} records came out of the stream")
        print(
            f"{factor:2d}x: {found['bytes'] / 2**20:.0f} MiB of shards, peak {found['peak_bytes'] / 2**20:.0f} MiB, "
            f"{found['records_per_second']:.0f} records a second",
            flush=True,
        )
    results["peak_ratio"] = results["x16"]["peak_bytes"] / results["x1"]["peak_bytes"]
    target = Path(__file__).parent / "results" / "stream.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
