"""The shape of the network: one decoder-only transformer that covers Llama, GPT-2, MPT and their relatives."""

from dataclasses import dataclass, field

from megalm.config.effects import Aside, Course, Fixed, Function, Start
from megalm.config.fields import choice, number, required

GATED = ("swiglu", "geglu", "geglu_tanh", "clamped_swiglu")
"""Activations of an MLP that has a gate beside its up projection."""


@dataclass
class RopeScalingConfig:
    """How rotary frequencies are stretched for sequences longer than those trained on."""

    kind: str = choice("none", "linear", "dynamic", "llama3", "yarn", "longrope")
    """none; linear: positions are divided by `factor`; dynamic: the base grows with the sequence beyond
    original_seq_length; llama3: only the low frequencies are stretched; yarn: those with fewer turns than beta_slow are,
    those with more than beta_fast are not (arXiv:2309.00071); longrope: a factor for each frequency (arXiv:2402.13753)."""
    factor: float = number(1.0, above=0)
    """How many times longer the sequences become."""
    low_frequency_factor: float = number(1.0, above=0)
    """llama3: wavelengths above original_seq_length / this are fully stretched."""
    high_frequency_factor: float = number(4.0, above=0)
    """llama3: wavelengths below original_seq_length / this are left alone."""
    original_seq_length: int = number(8192, at_least=1)
    """The sequence length before stretching; linear has no use for it."""
    beta_fast: float = number(32.0, above=0)
    """yarn: frequencies with more turns than this in the original sequence are left alone."""
    beta_slow: float = number(1.0, above=0)
    """yarn: frequencies with fewer turns than this in the original sequence are fully stretched."""
    truncate: bool = True
    """yarn: the two bounds are moved outwards to whole numbers of pairs (gpt-oss: false)."""
    attention_factor: float = number(1.0, above=0)
    """yarn, longrope: queries and keys are multiplied by this, as far as they are rotated (yarn: usually
    0.1 ln(factor) + 1)."""
    short_factors: list[float] = number(list, above=0)
    """longrope: for sequences up to original_seq_length, what each pair's frequency is divided by."""
    long_factors: list[float] = number(list, above=0)
    """longrope: the same for longer sequences."""


@dataclass
class LatentConfig:
    """Latent attention (DeepSeek-V2, arXiv:2405.04434) in place of heads with keys and values of their own."""

    key_rank: int = number(0, at_least=0)
    """Width of the latent that keys and values are made of (DeepSeek-V3: 512); 0: no latent attention."""
    query_rank: int | None = number(None, at_least=1)
    """Width of the latent that queries are made of (DeepSeek-V3: 1536); None: of the hidden state itself."""
    plain_dim: int = number(128, at_least=1)
    """Features of each query and key head that are not rotated."""
    rope_dim: int = number(64, at_least=2)
    """Features behind them that are rotated; the keys' are shared by all heads."""
    value_dim: int = number(128, at_least=1)
    """Features of each value head."""


@dataclass
class MoEConfig:
    """Mixture of experts in place of the dense MLP. `num_experts: 0` means dense."""

    num_experts: int = number(0, at_least=0)
    """Experts per layer; 0 for a dense model."""
    top_k: Function[int] = number(2, at_least=1)
    """Experts that each token is sent to."""
    ffn_hidden_size: int | None = number(None, at_least=1)
    """Hidden size of one expert; None: the model's ffn_hidden_size."""
    num_shared_experts: int = number(0, at_least=0)
    """Experts that every token passes through, beside the routed ones: one MLP of so many times an expert's hidden size."""
    shared_ffn_hidden_size: int | None = number(None, at_least=1)
    """Hidden size of what every token passes through; None: num_shared_experts times an expert's."""
    shared_gate: bool = False
    """The shared experts' output is multiplied by the sigmoid of a linear map of the token (Qwen2-MoE)."""
    first_dense: int = number(0, at_least=0)
    """So many first layers have the dense MLP of ffn_hidden_size (DeepSeek-V3: 3)."""
    every: int = number(1, at_least=1)
    """Every so many-th layer is a mixture, the others are dense: with 2 the second, the fourth, ..."""
    dense_layers: list[int] = number(list, at_least=0)
    """Numbers of further layers, from 0, that are dense."""
    score: Function[str] = choice("sigmoid", "softmax")
    """Of the router's logits: of each by itself (DeepSeek-V3, GLM-4.5) or of all (Mixtral, OLMoE, Qwen3)."""
    weight_norm: Function[float | None] = number(1.0, above=0)
    """The chosen scores are divided by their p-norm, p this (1: they sum to 1; DBRX's `moe_normalize_expert_weights`); None:
    they are the weights as they are (OLMoE, Qwen2-MoE)."""
    weight_scale: Function[float] = number(1.0, above=0)
    """Factor on the weights (DeepSeek-V3: 2.5)."""
    groups: Function[int] = number(0, at_least=0)
    """Equal runs of experts, of which a token may use the best top_groups only (DeepSeek-V3: 8); 0: no such limit."""
    top_groups: Function[int] = number(0, at_least=0)
    """Groups that a token's experts may come from (DeepSeek-V3: 4)."""
    group_scores: Function[int] = number(2, at_least=1)
    """A group's score is the sum of so many of its best experts' (DeepSeek-V3: 2; without a selection bias: 1)."""
    router_bias: bool = False
    """A bias in the router's linear map (gpt-oss)."""
    selection_bias: bool | None = None
    """A number for each expert is added to its score for the choice alone, and follows the load (Wang et al. 2024,
    arXiv:2408.15664); it is no parameter. None: with score=sigmoid, which alone allows it."""
    bias_rate: Course[float] = number(1e-3, at_least=0)
    """What is added to the selection bias of an expert with less than the mean load of the global batch, and taken from one
    with more, after each update."""
    balance: str = choice("sequence", "global", "micro_batch")
    """Over which tokens the balance loss takes an expert's share of the load: each sequence by itself (DeepSeek-V3), the
    whole global batch of the update before (in the spirit of arXiv:2501.11873), or a data rank's micro-batch, which depends
    on the layout and the micro-batch's size."""
    balance_loss: Course[float] = number(1e-4, at_least=0)
    """Factor of the balance loss, which is 1 for an even load, summed over layers (DeepSeek-V3: 1e-4; OLMoE: 1e-2)."""
    z_loss: Course[float] = number(0.0, at_least=0)
    """Factor of the mean square of the router logits' log-sum-exp, summed over layers (OLMoE: 1e-3)."""

    def is_dense(self, layer: int) -> bool:
        """Whether the layer of this number has the dense MLP."""
        return (
            not self.num_experts
            or layer < self.first_dense
            or (layer + 1) % self.every != 0
            or layer in self.dense_layers
        )


@dataclass
class PredictionConfig:
    """Multi-token prediction (DeepSeek-V3, arXiv:2412.19437, section 2.2): layers behind the last one, each of which predicts
    one token further ahead. They shape the training; generation and evaluation leave them out."""

    depth: Fixed[int] = number(0, at_least=0, at_most=16)
    """So many layers, of the last layer's kind, each with one more token to look at and to predict (DeepSeek-V3: 1)."""
    loss: Course[float] = number(0.3, at_least=0)
    """What is added to the loss: this times the mean over depths (DeepSeek-V3: 0.3, and 0.1 towards the end)."""


@dataclass
class ModelConfig:
    """Every number that decides the parameters' names and shapes and the function computed with them."""

    name: Aside[str] = "custom"
    """What people call it; used in reports only."""
    num_layers: Fixed[int] = required(at_least=1)
    """Transformer layers."""
    hidden_size: Fixed[int] = required(at_least=1)
    """Width of the residual stream."""
    num_heads: Function[int] = required(at_least=1)
    """Query heads of each attention."""
    num_kv_heads: Function[int | None] = number(None, at_least=1)
    """Key/value heads (grouped-query attention, Ainslie et al. 2023); None: as many as query heads."""
    head_dim: Function[int | None] = number(None, at_least=1)
    """Width of a head; None: hidden_size / num_heads."""
    ffn_hidden_size: Fixed[int | None] = number(None, at_least=1)
    """Hidden width of the MLP; None: 4 x hidden_size, or 8/3 of it in multiples of 64 for a gated activation."""
    vocab_size: Fixed[int] = required(at_least=1)
    """Rows of the embedding: at least the tokenizer's vocabulary."""
    seq_length: Fixed[int] = required(at_least=1)
    """Tokens in a training sequence."""
    max_positions: Aside[int | None] = number(None, at_least=1)
    """The longest sequence that the model is for, where that is longer than those it is trained on: how far it writes, and
    what an exported `config.json` says. None: seq_length."""
    norm: Function[str] = choice("rmsnorm", "layernorm")
    """rmsnorm (Zhang & Sennrich 2019) or layernorm."""
    norm_eps: Function[float] = number(1e-5, above=0, at_most=1)
    """Added to the variance inside every norm."""
    norm_bias: Fixed[bool] = False
    """A bias in each layernorm (GPT-2); rmsnorm never has one."""
    norm_unit_offset: Function[bool] = False
    """Norms multiply by 1 + their weight (Gemma, Nemotron), which then begins at 0."""
    norm_placement: Function[str] = choice("pre", "post", "both")
    """pre: on each sub-layer's input; post: on its output, before the residual addition (OLMo 2); both (Gemma 2)."""
    shared_norm: Fixed[bool] = False
    """With parallel_residual: attention and MLP read the output of one norm (Cohere)."""
    activation: Function[str] = choice(
        "swiglu", "geglu", "gelu", "gelu_tanh", "relu", "clamped_swiglu", "geglu_tanh", "relu2"
    )
    """The MLP's function; swiglu, geglu and geglu_tanh are gated (Shazeer 2020), and so is clamped_swiglu (gpt-oss: (up + 1) x
    gate x sigmoid(1.702 gate) of clamped gate and up); the others have one input matrix; relu2 is the square of relu (So et
    al. 2021)."""
    activation_limit: Function[float] = number(7.0, above=0)
    """clamped_swiglu: the gate is at most this, the up projection within +- this."""
    position: Function[str] = choice("rope", "learned", "alibi", "none")
    """rope (Su et al. 2021), learned (GPT-2), alibi (Press et al. 2021) or none."""
    rope_theta: Function[float] = number(10000.0, at_least=1)
    """Base of the rotary wavelengths."""
    rope_fraction: Function[float] = number(1.0, above=0, at_most=1)
    """Share of each head that is rotated (GPT-NeoX: 0.25)."""
    rope_interleaved: Function[bool] = False
    """Pairs are neighbours (true) or half a head apart (false, as in Hugging Face's Llama)."""
    rope_scaling: Function[RopeScalingConfig] = field(default_factory=RopeScalingConfig)
    """Stretching of rotary frequencies for long sequences."""
    window: Function[int | None] = number(None, at_least=1)
    """Tokens that a token attends to in layers with a window, itself among them; None: there are no such layers."""
    layer_pattern: Function[list[str]] = field(default_factory=list)
    """How layers attend, over and over from the first one: `window` or `full`, with `_no_rope` behind it where queries and
    keys are not rotated, such as [window, window, window, full_no_rope]. Empty: all alike, with the window if there is one."""
    window_rope_theta: Function[float | None] = number(None, at_least=1)
    """Base of the rotary wavelengths in layers with a window (Gemma 3: 10000); None: rope_theta."""
    window_rope_scaling: Function[bool] = True
    """rope_scaling holds in layers with a window too (gpt-oss); false: their angles are not stretched (Gemma 3, OLMo 3)."""
    alibi_max_bias: Function[float] = number(8.0, above=0)
    """ALiBi: slopes run over 2^(-alibi_max_bias * k / heads)."""
    latent: Fixed[LatentConfig] = field(default_factory=LatentConfig)
    """Latent attention; it has num_heads heads of plain_dim + rope_dim."""
    linear_bias: Fixed[bool] = False
    """Biases in the MLP's matrices, each expert's among them."""
    qkv_bias: Fixed[bool] = False
    """Biases in the query, key and value projections (Qwen2, GPT-2)."""
    attention_out_bias: Fixed[bool] = False
    """A bias in attention's output projection."""
    parallel_residual: Function[bool] = False
    """Attention and MLP read the same input and are added together (GPT-NeoX)."""
    qk_norm: Fixed[bool] = False
    """Normalise queries and keys before their product: keeps attention logits bounded (Dehghani et al. 2023)."""
    qk_norm_scope: Function[str] = choice("head", "full", "each")
    """head: each head by itself, one weight of head_dim (Qwen3); full: over all heads together (OLMo 2); each: each head by
    itself with a weight of its own (Cohere)."""
    attention_scale: Function[float | None] = number(None, above=0)
    """What queries times keys are multiplied by; None: 1 / sqrt(head_dim)."""
    attention_softcap: Function[float | None] = number(None, above=0)
    """Attention's scores become cap x tanh(score / cap) (Gemma 2: 50); None: they stay."""
    attention_sinks: Fixed[bool] = False
    """A learned score of each head takes part in the softmax and has no value (gpt-oss): a head may attend to nothing."""
    clip_qkv: Function[float | None] = number(None, above=0)
    """Clamp queries, keys and values to +- this value (MPT); None: no clamp."""
    tie_embeddings: Fixed[bool] = False
    """The output matrix is the embedding's."""
    value_head: Fixed[bool] = False
    """A linear map from the last hidden state to one number a token, beside the output matrix: of reward models."""
    embedding_norm: Fixed[bool] = False
    """A norm right after the embedding (BLOOM)."""
    embedding_scale: Function[float] = number(1.0, above=0)
    """The embedding's output is multiplied by this."""
    residual_scale: Function[float] = number(1.0, above=0)
    """Each sub-layer's output is multiplied by this before it is added (Granite)."""
    logit_scale: Function[float] = number(1.0, above=0)
    """The logits are multiplied by this (Cohere; Granite's logits_scaling divides)."""
    logit_softcap: Function[float | None] = number(None, above=0)
    """The logits become cap x tanh(logit / cap) (Gemma 2: 30); None: they stay."""
    dropout: Course[float] = number(0.0, at_least=0, below=1)
    """Probability of dropping an element of each sub-layer's output and of the embedding's, in training."""
    z_loss: Course[float] = number(0.0, at_least=0)
    """Weight of mean log^2 Z added to the loss: keeps logits from drifting (PaLM: 1e-4)."""
    init_std: Start[float] = number(0.02, above=0)
    """Standard deviation of the initial weights."""
    scaled_init: Start[bool] = True
    """Matrices that write to the residual stream start smaller, by 1 / sqrt(2 num_layers) (GPT-2)."""
    blocks: Fixed[dict[str, str]] = field(default_factory=dict)
    """Blocks of plugins in place of megalm's own: {attention: NAME, mlp: NAME}; none: megalm's."""
    moe: Fixed[MoEConfig] = field(default_factory=MoEConfig)
    """Mixture of experts."""
    prediction: PredictionConfig = field(default_factory=PredictionConfig)
    """Layers that predict further tokens."""

    def attends(self, layer: int) -> str:
        """The word of layer_pattern that holds for the layer of this number."""
        pattern = self.layer_pattern or ["full" if self.window is None else "window"]
        return pattern[layer % len(pattern)]

    @property
    def position_limit(self) -> int:
        """Tokens of the longest sequence that the model is for."""
        return max(self.max_positions or 0, self.seq_length)

    @property
    def gated(self) -> bool:
        """Whether the MLP has a gate beside its up projection."""
        return self.activation in GATED

    @property
    def approximate_parameters(self) -> float:
        """12 L h^2 + V h: enough to choose defaults by (exact counts: megalm.architecture.tensors)."""
        return 12.0 * self.num_layers * self.hidden_size**2 + self.vocab_size * self.hidden_size

    def fill_in(self) -> None:
        """Replace each None by what it stands for."""
        if self.num_kv_heads is None:
            self.num_kv_heads = self.num_heads
        if self.head_dim is None and self.latent.key_rank:
            self.head_dim = self.latent.plain_dim + self.latent.rope_dim
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_heads
        if self.ffn_hidden_size is None:
            gated_width = -(-8 * self.hidden_size // 3 // 64) * 64
            self.ffn_hidden_size = gated_width if self.gated else 4 * self.hidden_size
        moe = self.moe
        if moe.ffn_hidden_size is None:
            moe.ffn_hidden_size = self.ffn_hidden_size
        if moe.shared_ffn_hidden_size is None:
            moe.shared_ffn_hidden_size = moe.num_shared_experts * moe.ffn_hidden_size or None
        if moe.selection_bias is None:
            moe.selection_bias = moe.score == "sigmoid"
