"""Perceptio: a vision-language model that segments and estimates depth before it answers.

Importing registers configuration, model, processor and pipeline with transformers' Auto classes, so that an installed
package needs no `trust_remote_code`.
"""

from pathlib import Path

# First of all: it refuses a transformers that is too old for the imports below.
from .configuration_perceptio import PerceptioConfig, PerceptioDepthConfig

# isort: split
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor
from transformers.pipelines import PIPELINE_REGISTRY

from .generation_perceptio import DepthSpanError, PerceptionGrammar, PerceptionSpan, parse_span
from .modeling_depth_vqvae import DepthVQVAE
from .modeling_perceptio import PerceptioForConditionalGeneration, PerceptioGenerationOutput
from .pipeline_perceptio import PerceptioPipeline
from .processing_perceptio import PerceptioProcessor, add_perception_tokens, load_picture

__version__ = "0.1.0"

DEFAULT_MODEL = Path(__file__).parent / "checkpoints" / "perceptio-tiny"
DEFAULT_DEPTH_MODEL = Path(__file__).parent / "checkpoints" / "depth-tiny"


def _register() -> None:
    AutoConfig.register("perceptio", PerceptioConfig, exist_ok=True)
    for auto in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM):
        auto.register(PerceptioConfig, PerceptioForConditionalGeneration, exist_ok=True)
    AutoProcessor.register(PerceptioConfig, PerceptioProcessor, exist_ok=True)
    PIPELINE_REGISTRY.register_pipeline(
        "perceptio",
        pipeline_class=PerceptioPipeline,
        pt_model=(AutoModelForImageTextToText,),
        default={"model": (str(DEFAULT_MODEL), "main")},
        type="multimodal",
    )


_register()

__all__ = [
    "DEFAULT_DEPTH_MODEL",
    "DEFAULT_MODEL",
    "DepthSpanError",
    "DepthVQVAE",
    "PerceptioConfig",
    "PerceptioDepthConfig",
    "PerceptioForConditionalGeneration",
    "PerceptioGenerationOutput",
    "PerceptioPipeline",
    "PerceptioProcessor",
    "PerceptionGrammar",
    "PerceptionSpan",
    "add_perception_tokens",
    "load_picture",
    "parse_span",
]
