"""Multiple-choice and yes-or-no benchmarks."""

BENCHMARKS: dict[str, str] = {  # name → ".module:Class", relative to this package
    "hardblink": ".hardblink:HardBLINK",
    "blink": ".blink:BLINK",
    "mmbench": ".mmbench:MMBench",
    "seed-bench": ".seed:SEEDBench",
    "mme": ".mme:MME",
}
