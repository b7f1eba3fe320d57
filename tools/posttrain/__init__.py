"""After pretraining: instruction data made ready to train on.

megalm posttrain lint chat.jsonl
megalm posttrain prepare chat.jsonl --tokenizer runs/imported/huggingface --output data/chat
megalm posttrain look data/chat --tokenizer runs/imported/huggingface
megalm posttrain verify runs/tuned runs/rl --prompts held_out.jsonl
"""
