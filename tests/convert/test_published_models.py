"""The published models of conf/model are those that people know: sizes, and the architecture each is exported to."""

import pytest

from megalm.architecture.tensors import list_states, list_tensors
from megalm.convert.huggingface_config import choose_architecture
from megalm.convert.huggingface_names import make_huggingface_rules
from megalm.plan.models import list_models

# Parameters as their publishers count them (a tied embedding once).
PUBLISHED = {
    "gpt2-124m": ("gpt2", 124_439_808),
    "llama3-8b": ("llama", 8_030_261_248),
    "llama3-70b": ("llama", 70_553_706_496),
    "mistral-7b": ("llama", 7_241_732_096),
    "olmo2-7b": ("olmo2", 7_298_617_344),
    "pythia-1.4b": ("gpt_neox", 1_414_647_808),
    "qwen2.5-7b": ("qwen2", 7_615_616_512),
    "qwen3-0.6b": ("qwen3", 596_049_920),
    "qwen3-8b": ("qwen3", 8_190_735_360),
    "smollm2-135m": ("llama", 134_515_008),
    "gemma2-2b": ("gemma2", 2_614_341_888),
    "gemma3-1b": ("gemma3_text", 999_885_952),
    "phi3-mini": ("mistral", 3_821_079_552),
    "olmo3-7b": ("olmo3", 7_298_011_136),
    "smollm3-3b": ("smollm3", 3_075_098_624),
    "granite3-2b": ("granite", 2_533_531_648),
    "glm4-9b": ("glm4", 9_400_279_040),
    "starcoder2-3b": ("starcoder2", 3_030_371_328),
    "command-r7b": ("cohere2", 8_028_033_024),
    "mixtral-8x7b": ("mixtral", 46_702_792_704),
    "dbrx": ("dbrx", 131_596_523_520),
    "olmoe-1b-7b": ("olmoe", 6_919_161_856),
    "qwen3-30b-a3b": ("qwen3_moe", 30_532_122_624),
    "qwen3-235b-a22b": ("qwen3_moe", 235_093_634_560),
    "gpt-oss-20b": ("gpt_oss", 20_914_757_184),
    "glm-4.5-air": ("glm4_moe", None),
    "deepseek-v3": ("deepseek_v3", 671_026_419_200),
    "kimi-k2": ("deepseek_v3", 1_026_408_232_448),
    "7b": ("mpt", None),
    "30b": ("mpt", None),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_size_and_architecture(name):
    model = list_models()[name]
    architecture, parameters = PUBLISHED[name]
    assert choose_architecture(model).model_type == architecture
    if parameters is not None:
        assert sum(rule.numel for rule in make_huggingface_rules(model, architecture)) == parameters


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_table_has_every_tensor_of_the_plan(name):
    model = list_models()[name]
    table = make_huggingface_rules(model, PUBLISHED[name][0])
    states = {state: shape for state, shape in list_states(model) if state.endswith("selection_bias")}
    assert {part.name: part.shape for rule in table for part in rule.parts} == {**dict(list_tensors(model)), **states}
