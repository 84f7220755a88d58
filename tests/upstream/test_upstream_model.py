"""transformers' own tests of a model and of its generation, with a tiny Perceptio of each family of text models.

The yardstick is InternVL in the same harness: nothing may fail or be skipped that InternVL passes.
"""

import contextlib
import unittest
from unittest.mock import patch

import pytest
import torch
from transformers import PreTrainedConfig
from transformers import initialization as init
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.models.auto import modeling_auto

from perceptio.configuration_perceptio import PerceptioConfig
from perceptio.hub.tiny import tiny_config
from perceptio.modeling_perceptio import PerceptioForConditionalGeneration

WHERE = "transformers' own tests are not here: python tests/fetch_upstream.py fetches them"
common = pytest.importorskip("transformers_tests.test_modeling_common", reason=WHERE)
generation = pytest.importorskip("transformers_tests.generation.test_utils", reason=WHERE)
configuration = pytest.importorskip("transformers_tests.test_configuration_common", reason=WHERE)

IMAGE, BOS, EOS, PAD, SEG, START, END, CODES, COUNT = 1, 3, 4, 5, 6, 7, 8, 9, 8
FIRST_WORD, VOCABULARY = CODES + COUNT, 99

# Many tests ask by the name of a class what it is for.  InternVL stands in these tables; Perceptio is registered by
# class and stands in none.
TABLES = (modeling_auto.MODEL_MAPPING_NAMES, modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
patches = contextlib.ExitStack()


def setUpModule():
    for table in TABLES:
        patches.enter_context(patch.dict(table, perceptio=PerceptioForConditionalGeneration.__name__))
    for module in (common, generation):
        patches.enter_context(patch.object(module, "set_config_for_less_flaky_test", enlarge_epsilons, create=True))


def tearDownModule():
    patches.close()


def enlarge_epsilons(config: PreTrainedConfig) -> None:
    """The library's own sets every name that an epsilon ever had; Perceptio's configuration refuses unknown ones."""
    for part in (config, *(getattr(config, name) for name in config.sub_configs)):
        for field in vars(part):
            if field.endswith("norm_eps"):
                setattr(part, field, 1.0)


@contextlib.contextmanager
def only_reporting():
    """Missing and strange weights stop Perceptio's loading; some tests read the library's report of them instead."""
    with (
        patch.object(PerceptioForConditionalGeneration, "_check_report"),
        patch("perceptio.modeling_perceptio.check_weight_files"),
    ):
        yield


@contextlib.contextmanager
def constant_noise():
    """Buffers that start at random values (SAM2's positions, the codebook) start at their spread."""
    with (
        patch("torch.randn", torch.ones),
        patch.object(init, "normal_", lambda tensor, mean=0.0, std=1.0, **_: tensor.fill_(std)),
    ):
        yield


class PerceptioModelTester:
    """A batch of pictures, each followed by random words, and the configuration they fit."""

    is_training = True
    batch_size, words = 3, 7

    def __init__(self, parent, family: str):
        self.parent, self.family = parent, family
        config = self.get_config()
        self.image_size = config.vision_config.image_size[0]
        self.seq_length = config.image_seq_length + self.words
        for name in ("num_hidden_layers", "vocab_size", "hidden_size", "num_attention_heads"):
            setattr(self, name, getattr(config.text_config, name))

    def get_config(self) -> PerceptioConfig:
        # Control tokens in front: tests cut the vocabulary from behind.
        config = tiny_config(
            self.family,
            vocab_size=VOCABULARY,
            num_codes=COUNT,
            image_token_id=IMAGE,
            seg_token_id=SEG,
            depth_start_token_id=START,
            depth_end_token_id=END,
            depth_code_token_ids=[CODES, COUNT],
        )
        text = config.text_config
        text.bos_token_id, text.eos_token_id, text.pad_token_id = BOS, EOS, PAD
        text.max_position_embeddings = 512  # far positions are compared to 1e-5, which float32 angles do not give
        return config

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        words = common.ids_tensor([self.batch_size, self.words], VOCABULARY - FIRST_WORD) + FIRST_WORD
        pictures = torch.full((self.batch_size, config.image_seq_length), IMAGE)
        input_ids = torch.cat([pictures.to(words), words], 1)
        return config, {
            "pixel_values": common.floats_tensor([self.batch_size, 3, self.image_size, self.image_size]),
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
        }


class PerceptioQwen2Test(common.ModelTesterMixin, generation.GenerationTesterMixin, unittest.TestCase):
    family = "qwen2"
    all_model_classes = (PerceptioForConditionalGeneration,)
    all_generative_model_classes = (PerceptioForConditionalGeneration,)
    test_can_init_all_missing_weights_before_2023 = True  # else decided by the year in a file's copyright line

    def setUp(self):
        self.model_tester = PerceptioModelTester(self, self.family)
        self.config_tester = configuration.ConfigTester(self, config_class=PerceptioConfig, has_text_modality=False)

    def test_config(self):
        self.config_tester.run_common_tests()

    def test_can_init_all_missing_weights(self):
        with only_reporting():
            super().test_can_init_all_missing_weights()

    def test_correct_missing_keys(self):
        with only_reporting():
            super().test_correct_missing_keys()

    def test_model_weights_reload_no_missing_tied_weights(self):
        with only_reporting():
            super().test_model_weights_reload_no_missing_tied_weights()

    def test_init_weights_can_init_buffers(self):
        with constant_noise():
            super().test_init_weights_can_init_buffers()

    def test_reverse_loading_mapping(self):
        """The library renames InternVL's weights in files; Perceptio's stand there under their own names."""
        model = PerceptioForConditionalGeneration(self.model_tester.get_config())
        self.assertFalse(get_model_conversion_mapping(model, add_legacy=False))

    test_can_load_from_already_mapped_keys = test_reverse_loading_mapping


class PerceptioLlamaTest(PerceptioQwen2Test):
    family = "llama"


@pytest.mark.slow
class PerceptioQwen3Test(PerceptioQwen2Test):
    family = "qwen3"
