"""What a second worker brings to the labelling job.

    python bench/bench_label.py [--rows 384] [--rounds 3]

The same shards, the same depth tokenizer (the default size, 320 pixels, random weights), one thread in each worker;
one worker and two in turn, by processes and by Ray, and the median of the ratios.  The clock runs between the first
and the last shard that end, so that starting Python and torch does not count; the bar is 1.7.  Writes
bench/results/label.json.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import torch

from perceptio.configuration_perceptio import PerceptioDepthConfig
from perceptio.data.job import NOTES, run_job
from perceptio.data.label import Labeller
from perceptio.data.shards import write_shards
from perceptio.modeling_depth_vqvae import DepthVQVAE
from perceptio.world.records import WorldOptions, world_records

ROWS_PER_SHARD = 8


def throughput(folder: Path, function, engine: str, workers: int) -> float:
    """Rows a second while all workers are busy."""
    with tempfile.TemporaryDirectory() as out:
        run_job(folder, out, function, engine=engine, workers=workers, batch_size=ROWS_PER_SHARD)
        ends = sorted(path.stat().st_mtime for path in (Path(out) / NOTES).glob("*.parquet.json"))
    # Every worker's first shard waits for its imports; the last ends while another may have nothing left.
    inside = ends[workers:]
    return ROWS_PER_SHARD * (len(inside) - 1) / (inside[-1] - inside[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=384)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    results: dict = {"rows": arguments.rows}
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        DepthVQVAE(PerceptioDepthConfig()).save_pretrained(Path(folder, "vqvae"))
        options = WorldOptions(320, 320, 1, points=0.0)
        write_shards(world_records(arguments.rows, options=options), Path(folder, "in"), rows_per_shard=ROWS_PER_SHARD)
        function = Labeller(str(Path(folder, "vqvae")))
        for engine in ("local", "ray"):
            rounds = [
                [throughput(Path(folder, "in"), function, engine, workers) for workers in (1, 2)]
                for _ in range(arguments.rounds)
            ]
            ratios = [two / one for one, two in rounds]
            results[engine] = {"rows_per_second": rounds, "ratio": statistics.median(ratios), "ratios": ratios}
            print(f"{engine}: ratio {results[engine]['ratio']:.2f} of {[round(r, 2) for r in ratios]}", flush=True)
    target = Path(__file__).parent / "results" / "label.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
