"""transformers' own tests of a processor, with the tiny tokenizer of each family and pictures of 32-pixel tiles."""

import unittest

import pytest

from perceptio.hub.tiny_text import tiny_processor
from perceptio.processing_perceptio import PerceptioProcessor

WHERE = "transformers' own tests are not here: python tests/fetch_upstream.py fetches them"
common = pytest.importorskip("transformers_tests.test_processing_common", reason=WHERE)


class PerceptioQwen2ProcessorTest(common.ProcessorTesterMixin, unittest.TestCase):
    processor_class = PerceptioProcessor
    family = "qwen2"

    @classmethod
    def _setup_image_processor(cls):
        return tiny_processor(cls.family, max_patches=2).image_processor  # as in InternVL's test: one tile a picture

    @classmethod
    def _setup_tokenizer(cls):
        return tiny_processor(cls.family, num_codes=128).tokenizer  # the number that a processor expects by default

    @staticmethod
    def prepare_processor_dict():
        return {"image_seq_length": 2, "sam_image_size": 64}


class PerceptioLlamaProcessorTest(PerceptioQwen2ProcessorTest):
    family = "llama"
