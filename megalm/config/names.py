"""What other trainers call our keys: a word that is theirs gets ours in the answer."""

_OURS = {
    "checkpoint.every": "save_interval save_steps save_every ckpt_interval checkpoint_interval",
    "checkpoint.keep": "save_total_limit keep_last",
    "checkpoint.load_path": "load init_from resume_from_checkpoint load_checkpoint from_pretrained finetune_from",
    "checkpoint.path": "save save_dir checkpoint_dir ckpt_dir save_folder",
    "data.packing": "pack",
    "data.tokenizer": "tokenizer_path tokenizer_model tokenizer_name tokenizer_name_or_path tokenizer_file vocab_file",
    "data.train": "data data_path data_dir dataset dataset_path train_data train_data_path train_file train_files corpus",
    "data.valid": "eval_data valid_data valid_data_path validation_data eval_dataset val_data validation_file",
    "data.weights": "mixture_weights data_weights",
    "device": "accelerator",
    "dry_run": "dryrun",
    "model.dropout": "hidden_dropout attention_dropout resid_pdrop",
    "model.ffn_hidden_size": "intermediate_size d_ff mlp_hidden_size ffn_dim n_inner",
    "model.head_dim": "kv_channels d_head head_size",
    "model.hidden_size": "d_model n_embd dim embed_dim emb_size hidden_dim",
    "model.init_std": "initializer_range init_method_std",
    "model.num_heads": "num_attention_heads n_heads n_head heads",
    "model.num_kv_heads": "num_key_value_heads num_query_groups n_kv_heads kv_n_heads",
    "model.num_layers": "n_layers n_layer num_hidden_layers layers depth",
    "model.rope_theta": "rotary_base rope_base",
    "model.seq_length": "seq_len max_seq_len sequence_length block_size context_length max_position_embeddings n_ctx max_length",
    "model.tie_embeddings": "tie_word_embeddings tie_weights",
    "model.vocab_size": "n_vocab padded_vocab_size",
    "optim.betas": "adam_beta1 adam_beta2 beta1 beta2",
    "optim.clip_grad_norm": "max_grad_norm grad_clip clip_grad gradient_clip_val gradient_clipping grad_norm",
    "optim.eps": "adam_eps adam_epsilon epsilon",
    "optim.lr": "learning_rate learnrate max_lr peak_lr lr_max learningrate",
    "optim.min_lr": "min_learning_rate lr_min end_lr",
    "optim.min_lr_ratio": "min_lr_rate alpha_f lr_min_ratio",
    "optim.name": "optimizer",
    "optim.schedule": "lr_scheduler lr_scheduler_type scheduler lr_schedule lr_decay_style",
    "optim.warmup_steps": "warmup num_warmup_steps lr_warmup_iters warmup_iters lr_warmup_steps t_warmup",
    "optim.weight_decay": "wd decay",
    "parallel.context": "context_parallel cp context_parallel_size context_parallel_degree cp_size",
    "parallel.data": "data_parallel dp data_parallel_size dp_size data_parallel_replicate_degree",
    "parallel.expert": "expert_parallel ep expert_model_parallel_size ep_size expert_parallel_degree",
    "parallel.expert_tensor": "etp expert_tensor_parallel_size expert_tensor_parallel expert_tensor_parallel_degree",
    "parallel.pipeline": "pipeline_parallel pp pipeline_model_parallel_size pp_size pipeline_parallel_degree",
    "parallel.recompute": "gradient_checkpointing activation_checkpointing recompute_granularity",
    "parallel.sequence": "sequence_parallel sp",
    "parallel.tensor": "tensor_parallel tp tensor_model_parallel_size tp_size tensor_parallel_degree",
    "parallel.zero_stage": "zero zero_optimization",
    "precision": "dtype torch_dtype",
    "precision=bf16": "bf16 fp16 amp mixed_precision half",
    "resilience.timeout_minutes": "timeout distributed_timeout_minutes ddp_timeout",
    "run.dir": "output_dir out_dir output_folder log_dir",
    "run.name": "run_name name experiment_name exp_name job_name",
    "tracking.tensorboard": "use_tensorboard report_to",
    "train.determinism": "deterministic deterministic_mode use_deterministic_algorithms full_determinism",
    "train.eval_every": "eval_interval eval_steps val_check_interval eval_freq",
    "train.global_batch_size": "batch_size batch total_batch_size global_train_batch_size bs gbs",
    "train.log_every": "log_interval logging_steps log_freq",
    "train.micro_batch_size": "per_device_train_batch_size device_batch_size device_train_microbatch_size mbs microbatch_size",
    "train.seed": "random_seed",
    "train.steps": "max_steps train_iters num_steps max_iters iterations iters total_steps training_steps max_duration",
    "train.tokens": "max_tokens num_tokens train_tokens total_tokens token_budget",
    "world_size": "nproc_per_node num_gpus ngpus n_gpus gpus num_processes nproc",
}  # fmt: skip
_BY_NAME = {theirs: ours for ours, names in _OURS.items() for theirs in names.split()}


def find_our_key(word: str) -> str | None:
    """Our key for another trainer's word, however it is spelt (--learning-rate, learningRate); None for a word nobody has."""
    split = "".join(
        f"_{letter.lower()}" if letter.isupper() and index else letter.lower() for index, letter in enumerate(word)
    )
    for spelling in (word.lower(), split):
        name = spelling.lstrip("-+").replace("-", "_").strip("_")
        if name in _BY_NAME:
            return _BY_NAME[name]
    return None
