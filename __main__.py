"""`python -m perceptio` is the command `perceptio`."""

import sys

from .cli import main

sys.exit(main())
