"""The Llama shapes of the training benchmarks, and how many of their sequences a step has."""

from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "num_layers": 2,
        "hidden_size": 64,
        "num_heads": 4,
        "ffn_hidden_size": 176,
        "vocab_size": 512,
        "seq_length": 64,
    },
    "50m": {
        "num_layers": 8,
        "hidden_size": 512,
        "num_heads": 8,
        "ffn_hidden_size": 1408,
        "vocab_size": 32000,
        "seq_length": 512,
    },
    "1b": {
        "num_layers": 22,
        "hidden_size": 2048,
        "num_heads": 16,
        "ffn_hidden_size": 5632,
        "vocab_size": 32000,
        "seq_length": 2048,
    },
    "8b": {
        "num_layers": 32,
        "hidden_size": 4096,
        "num_heads": 32,
        "num_kv_heads": 8,
        "ffn_hidden_size": 14336,
        "vocab_size": 128256,
        "seq_length": 8192,
    },
}
MICRO_BATCH = {
    ("tiny", "cpu"): 2, ("tiny", "cuda"): 2, ("50m", "cpu"): 4, ("50m", "cuda"): 32,
    ("1b", "cpu"): 1, ("1b", "cuda"): 4, ("8b", "cpu"): 1, ("8b", "cuda"): 1,
}  # fmt: skip
