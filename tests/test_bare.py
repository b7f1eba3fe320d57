"""Kernels, model, trainer and benchmarks on a machine that has torch and little else: no Hydra, no zstandard."""

import subprocess
import sys

CODE = """
import sys

sys.modules.update(dict.fromkeys(("hydra", "omegaconf", "antlr4", "zstandard")))  # None: not found
import megalm.ops, megalm.train.trainer, megalm.launch.worker
import tools.bench.kernels.kernels, tools.bench.kernels.moe_kernels, tools.bench.train.train
from megalm.config import Config, ModelConfig
from megalm.parallel.mesh import Mesh
from megalm.train.build import build_chunks

config = Config(model=ModelConfig(num_layers=1, hidden_size=8, num_heads=2, vocab_size=16, seq_length=8))
config.model.num_kv_heads, config.model.head_dim, config.model.ffn_hidden_size = 2, 4, 16
print(sum(p.numel() for p in build_chunks(config, Mesh.single())[0].parameters()) > 0)
"""


def test_what_needs_no_hydra_loads_without_it():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "True"), done.stderr
