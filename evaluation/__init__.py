"""How good a model is: benchmarks, the run over them, and what it measured."""

from .choice import BENCHMARKS as CHOICE

BENCHMARKS = {  # name → "module:Class", relative to this package
    "refcoco": ".referring:RefCOCO",
    "refcoco+": ".referring:RefCOCOPlus",
    "refcocog": ".referring:RefCOCOg",
    "grefcoco": ".referring:GRefCOCO",
    "depth": ".depth:Depth",
    "world": ".world:World",
    **{name: f".choice{place}" for name, place in CHOICE.items()},
}

# What may stand in the depth span: see `predict.Predictor`.
CODES = ("own", "random", "constant", "other", "oracle")
