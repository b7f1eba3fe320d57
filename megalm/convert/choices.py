"""Words that a conversion is asked for by; here without torch, so that a command line can list them at once."""

FORMATS = ("huggingface", "megalm", "megatron")
"""Formats of a folder with weights."""

SPELLINGS = ("te", "plain", "legacy", "legacy-2.6")
"""Generations of Megatron-LM's tensor names (`megalm/convert/megatron_names.py` has them)."""
