"""The records that a run could not use."""

import json
import logging
from pathlib import Path

logger = logging.getLogger(__name__)
FILE = "skipped.jsonl"


def note_skipped(folder, skipped: list[dict]) -> None:
    """Append them to `skipped.jsonl` of the output folder; several processes write to it line by line."""
    if not skipped:
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    with open(Path(folder) / FILE, "a", encoding="utf-8") as file:
        for entry in skipped:
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")
    logger.warning("left out %d records, the first %s: %s", len(skipped), skipped[0]["id"], skipped[0]["reason"])
