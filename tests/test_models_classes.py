"""The class that a config is built as."""

from __future__ import annotations

import pytest
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from dbes.errors import ModelError
from dbes.models.classes import choose_class, text_config_of


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        ("olmoe", "AutoModelForCausalLM"),
        ("qwen3_5_moe", "AutoModelForCausalLM"),
        ("qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration"),
        ("glm4v_moe", "Glm4vMoeForConditionalGeneration"),
        ("mistral4", "Mistral4ForCausalLM"),
        ("qwen3_omni_moe", "Qwen3OmniMoeThinkerForConditionalGeneration"),
        ("qwen3_vl_moe_text", "Qwen3VLMoeTextModel"),
        ("ernie4_5_vl_moe_text", "Ernie4_5_VLMoeTextModel"),
    ],
)
def test_by_config(model_type: str, expected: str) -> None:
    kind, config = choose_class(CONFIG_MAPPING[model_type]())
    assert kind.__name__ == expected
    assert text_config_of(CONFIG_MAPPING[model_type]()).model_type == text_config_of(config).model_type


def test_by_the_name_that_config_json_gives() -> None:
    config = CONFIG_MAPPING["openai_privacy_filter"](architectures=["OpenAIPrivacyFilterForTokenClassification"])
    assert choose_class(config)[0].__name__ == "OpenAIPrivacyFilterForTokenClassification"
    config = CONFIG_MAPPING["qwen3_vl_moe"](architectures=["OlmoeForCausalLM", 7, "Nonsense"])
    assert choose_class(config)[0].__name__ == "Qwen3VLMoeForConditionalGeneration"


def test_what_has_none() -> None:
    with pytest.raises(ModelError, match="an encoder with a decoder"):
        choose_class(transformers.SwitchTransformersConfig())
    with pytest.raises(ModelError, match="has no language model for this config"):
        choose_class(transformers.PreTrainedConfig())
