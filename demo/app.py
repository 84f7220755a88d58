"""What a Space runs.  PERCEPTIO_MODEL names another model than the embedded one: a folder, or an id of the Hub."""

import os
import sys

from perceptio.cli import main

if __name__ == "__main__":
    model = os.environ.get("PERCEPTIO_MODEL")
    sys.exit(main(["demo", *(["--model", model] if model else [])]))
