"""How fast a person's data set is checked.

    python bench/bench_check.py [--rows 1000]

Rows with photographs of one megapixel, two thirds of them with masks and a third with depth; the bar is 1,000 records
a minute on two cores.  Writes bench/results/check.json.
"""

import argparse
import json
import os
import tempfile
import time
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from perceptio.data.check import check_data

WIDTH, HEIGHT = 1152, 864


def write_set(folder: Path, rows: int) -> None:
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 255, (HEIGHT // 16, WIDTH // 16, 3), dtype=np.uint8)
    picture = Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
    file = BytesIO()
    picture.save(file, "JPEG", quality=90)
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[100:500, 200:700] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    Image.fromarray(np.linspace(1, 65_000, WIDTH * HEIGHT).reshape(HEIGHT, WIDTH).astype(np.uint16)).save(
        folder / "depth.png"
    )
    with open(folder / "train.jsonl", "w", encoding="utf-8") as lines:
        for index in range(rows):
            (folder / f"{index}.jpg").write_bytes(file.getvalue())
            row = {"image": f"{index}.jpg", "question": "Where is it?", "answer": "Here."}
            row |= {"mask": "mask.png"} if index % 3 else {"depth": "depth.png"}
            lines.write(json.dumps(row) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_set(Path(folder), arguments.rows)
        start = time.perf_counter()
        report = check_data(folder)
        seconds = time.perf_counter() - start
    if report.kept != arguments.rows:
        raise SystemExit(f"{report.read - report.kept} of {arguments.rows} good rows were refused")
    results = {
        "rows": arguments.rows,
        "megapixels": WIDTH * HEIGHT / 1e6,
        "cores": os.cpu_count(),
        "records_per_minute": 60 * arguments.rows / seconds,
    }
    print(f"{results['records_per_minute']:.0f} records a minute", flush=True)
    target = Path(__file__).parent / "results" / "check.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
