"""The families of Hugging Face models, by `model_type`."""

from megalm.convert.families import fused, gemma, gpt, layernorm, llama, mixtures
from megalm.convert.families.family import Family

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for group in (llama.FAMILIES, gpt.FAMILIES, layernorm.FAMILIES, fused.FAMILIES, gemma.FAMILIES, mixtures.FAMILIES)
    for family in group
}
