"""A Llama as one would write it in plain torch, for torch.compile: what an engine has to be held against.

Its parameters have transformers' names. Attention takes cuDNN's kernel first on a GPU, as torchtitan does.
"""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
_EPS = 1e-6


class Attention(nn.Module):
    """Causal attention with rotary positions; key heads are shared where there are fewer."""

    def __init__(self, hidden: int, heads: int, groups: int) -> None:
        super().__init__()
        self.width = hidden // heads
        self.q_proj = nn.Linear(hidden, heads * self.width, bias=False)
        self.k_proj = nn.Linear(hidden, groups * self.width, bias=False)
        self.v_proj = nn.Linear(hidden, groups * self.width, bias=False)
        self.o_proj = nn.Linear(heads * self.width, hidden, bias=False)
        self.shared = heads != groups

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Shapes: x [B, S, H], cos and sin [S, width] -> [B, S, H]"""
        q, k, v = (
            project(x).unflatten(-1, (-1, self.width)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = (turn(t, cos, sin) for t in (q, k))
        with sdpa_kernel(_FIRST, set_priority=True) if x.is_cuda else nullcontext():
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.shared)
        projected: Tensor = self.o_proj(out.transpose(1, 2).flatten(2))
        return projected


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves of each head by its position's angles."""
    one, other = x.float().chunk(2, -1)
    turned = torch.cat([-other, one], -1)
    return (x.float() * cos + turned * sin).to(x.dtype)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, width, bias=False)
        self.up_proj = nn.Linear(hidden, width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: [B, S, H] -> [B, S, H]"""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    """Attention and MLP, each behind its norm and beside its residual."""

    def __init__(self, shape: dict[str, Any]) -> None:
        super().__init__()
        hidden, heads = shape["hidden_size"], shape["num_heads"]
        self.input_layernorm = nn.RMSNorm(hidden, eps=_EPS)
        self.self_attn = Attention(hidden, heads, shape.get("num_kv_heads", heads))
        self.post_attention_layernorm = nn.RMSNorm(hidden, eps=_EPS)
        self.mlp = MLP(hidden, shape["ffn_hidden_size"])

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Shapes: x [B, S, H] -> [B, S, H]"""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Llama(nn.Module):
    """The whole model."""

    def __init__(self, shape: dict[str, Any]) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape["vocab_size"], shape["hidden_size"])
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape["num_layers"]))
        self.norm = nn.RMSNorm(shape["hidden_size"], eps=_EPS)
        self.lm_head = nn.Linear(shape["hidden_size"], shape["vocab_size"], bias=False)
        self.width = shape["hidden_size"] // shape["num_heads"]

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        """Logits as transformers gives them. Shapes: [B, S] -> .logits [B, S, V]"""
        places = torch.arange(input_ids.shape[1], device=input_ids.device, dtype=torch.float32)
        rates = 1e4 ** -(torch.arange(0, self.width, 2, device=input_ids.device, dtype=torch.float32) / self.width)
        angles = torch.outer(places, rates).repeat(1, 2)
        cos, sin = angles.cos(), angles.sin()
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return SimpleNamespace(logits=self.lm_head(self.norm(x)))


def build_plain(shape: dict[str, Any], device: str) -> Llama:
    """Build the model of a shape with random weights."""
    torch.manual_seed(0)
    with torch.device(device):
        model = Llama(shape)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.02)
    return model
