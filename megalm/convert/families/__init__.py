"""The families of Hugging Face models, by `model_type`."""

from megalm.config.registry import Registry
from megalm.convert.families import deepseek, fused, gemma, gpt, layernorm, llama, mixtures
from megalm.convert.families.family import Family

_FILES = (llama, gpt, layernorm, fused, gemma, mixtures, deepseek)
FAMILIES: Registry[Family] = Registry(
    "family", "model_type", {family.model_type: family for file in _FILES for family in file.FAMILIES}
)


def register_family(family: Family) -> None:
    """Let folders of this family's `model_type` be read and written. Errors: ValueError where the type is known."""
    FAMILIES.register(family.model_type, family)
