"""Convert weights between runs, Hugging Face folders and Megatron-LM checkpoints."""
