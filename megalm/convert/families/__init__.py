"""The families of Hugging Face models, by `model_type`."""

from megalm.convert.families import deepseek, fused, gemma, gpt, layernorm, llama, mixtures
from megalm.convert.families.family import Family

_FILES = (llama, gpt, layernorm, fused, gemma, mixtures, deepseek)
FAMILIES: dict[str, Family] = {family.model_type: family for file in _FILES for family in file.FAMILIES}
