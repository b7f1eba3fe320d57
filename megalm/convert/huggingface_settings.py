"""Every setting of a `config.json` is accounted for: it is used, it is known not to matter, or it is refused.

A key that is passed over may be the one that makes the model another function (a soft cap on the logits, a multiplier, a
window). So the reader of an architecture is handed a config that remembers what it was asked for; what is left must be on
one of two lists, or the import stops and names it. A new key of transformers' that is harmless is let through by name
(`--accept KEY`), and said.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Collection, Iterator
from typing import Any

from megalm.config.errors import ConfigError


class _Everything:
    """A collection that any key is in."""

    def __contains__(self, key: object) -> bool:
        return True

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


EVERYTHING: Collection[str] = _Everything()
"""For a config that was accepted before."""

HARMLESS: dict[str, tuple[str, ...]] = {
    "names and versions": (
        "architectures", "model_type", "transformers_version", "_name_or_path", "name_or_path", "tokenizer_class",
        "tokenizer_name", "is_llama_config", "transformers.js_config", "unsloth_version", "unsloth_fixed", "_commit_hash",
        "id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "task_specific_params", "prefix", "verbose",
        "model_name", "model_max_length", "language", "_from_model_config",
    ),
    "the tokenizer's, and carried with it": (
        "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "decoder_start_token_id",
    ),
    "number format of the files": ("dtype", "torch_dtype", "use_bfloat16"),
    "how transformers computes, not what": (
        "use_cache", "pretraining_tp", "_attn_implementation", "attn_implementation", "_attn_implementation_autoset",
        "_flash_attn_2_enabled", "gradient_checkpointing", "torchscript", "return_dict", "output_attentions",
        "output_hidden_states", "chunk_size_feed_forward", "reorder_and_upcast_attn", "init_device", "attn_impl",
        "_experts_implementation", "base_model_tp_plan", "base_model_pp_plan", "keys_to_ignore_at_inference",
        "_output_attentions", "pruned_heads", "tf_legacy_loss", "n_ctx",
    ),
    "training only": (
        "attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "emb_pdrop", "classifier_dropout",
        "dropout", "embedding_dropout", "residual_dropout", "init_config", "initializer_range", "init_std", "scaled_init",
        "z_loss", "loss_fn", "router_aux_loss_coef", "output_router_logits",
    ),
    "of other heads than the language model's": (
        "summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj",
    ),
    "how text was drawn, before there was generation_config.json": (
        "max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty",
        "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size",
        "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "output_scores",
        "return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values",
        "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens", "max_new_tokens",
    ),
    "of encoder-decoders only": ("is_encoder_decoder", "tie_encoder_decoder", "cross_attention_hidden_size", "is_decoder"),
    "without effect where no layer has a window": ("max_window_layers",),
    "without effect beside ALiBi": ("learned_pos_emb",),
}  # fmt: skip
"""Keys that do not change the function, by the reason why."""

OFF: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "use_bias": (False, None),
    "bias": (False, None),
    "sliding_window": (None, 0),
    "use_sliding_window": (False, None),
    "partial_rotary_factor": (1, None),
    "rotary_pct": (1, None),
    "rope_interleaved": (False, None),
    "use_mrope": (False, None),
    "no_rope_layer_interval": (None, 0),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "logit_softcapping": (None,),
    "query_pre_attn_scalar": (None,),
    "logit_scale": (1, None),
    "logits_scaling": (1, None),
    "residual_multiplier": (1, None),
    "embedding_multiplier": (1, None),
    "embedding_scale": (1, None),
    "attention_multiplier": (None,),
    "scale_emb": (1, None),
    "scale_depth": (None,),
    "dim_model_base": (None,),
    "mup_*": (1, False, None),
    "clip_qkv": (None,),
    "qk_norm": (False, None),
    "use_qk_norm": (False, None),
    "qk_layernorm": (False, None),
    "qkv_bias": (False, None),
    "attention_out_bias": (False, None),
    "num_experts": (0, None),
    "num_local_experts": (0, None),
    "n_routed_experts": (0, None),
    "n_shared_experts": (0, None),
    "num_experts_per_tok": (0, None),
    "moe_*": (0, False, None),
    "num_nextn_predict_layers": (0, None),
    "quantization_config": (None,),
    "quantization": (None,),
    "compression_config": (None,),
    "add_cross_attention": (False, None),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "use_parallel_residual": (False, None),
    "parallel_attn": (False, None),
    "attention_sinks": (False, None),
    "attn_temperature_tuning": (False, 0, None),
    "position_embedding_type": ("rope", "absolute", None),
    "embedding_fraction": (1,),
    "norm_type": ("low_precision_layernorm", "layernorm"),
    "attn_type": ("multihead_attention",),
    "attn_uses_sequence_id": (False,),
    "ffn_config": (None,),
    "is_causal": (True, None),
    "causal": (True, None),
    "original_max_position_embeddings": (None,),
}
"""Keys that change the function where an architecture does not read them itself, and the values that mean "off"."""

WHY = {
    "quantization_config": "the weights are quantized; take the model's unquantized folder",
    "quantization": "the weights are quantized; take the model's unquantized folder",
    "auto_map": "the model brings code of its own, which is not run",
}


class Asked(dict):
    """A config.json that remembers which of its keys were asked for; so do the objects in it."""

    def __init__(self, values: dict[str, Any]):
        super().__init__({key: Asked(value) if isinstance(value, dict) else value for key, value in values.items()})
        self.asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)


def account_for(config: Asked, accept: Collection[str]) -> list[str]:
    """Tell of the keys that nobody asked for. ConfigError for those that may change the function."""
    notes: list[str] = []
    unknown: dict[str, Any] = {}
    harmless = {key for keys in HARMLESS.values() for key in keys}
    for path, key, value in _left(config):
        if key in harmless:
            continue
        off = next((values for pattern, values in OFF.items() if fnmatch.fnmatchcase(key, pattern)), None)
        if off is not None:
            if not any(value == allowed and isinstance(value, bool) == isinstance(allowed, bool) for allowed in off):
                why = WHY.get(key, f"this model is not computed with it here; off is {' or '.join(map(_show, off))}")
                raise ConfigError(f"config.json: {path}={_show(value)} is not supported: {why}")
        elif path in accept:
            notes.append(f"config.json: {path}={_show(value)} is not known here and was accepted")
        elif value in (None, [], {}):
            notes.append(f"config.json: {path}={_show(value)} is not known here; it is taken to mean off")
        else:
            unknown[path] = value
    if unknown:
        listed = ", ".join(f"{path}={_show(value)}" for path, value in unknown.items())
        ways = " ".join(f"--accept {path}" for path in unknown)
        raise ConfigError(
            f"config.json: {len(unknown)} settings are not known here and may change what the model computes: {listed}. Where "
            f"you know that they do not, go on with {ways}"
        )
    return notes


def _left(config: Asked, prefix: str = "") -> Iterator[tuple[str, str, Any]]:
    """Yield (path, key, value) of each setting that was not asked for; within an object that was, of its own."""
    for key, value in config.items():
        if key not in config.asked:
            yield prefix + key, key, value
        elif isinstance(value, Asked):
            yield from _left(value, f"{prefix}{key}.")


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
