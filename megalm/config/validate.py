"""Checks of every field by its declaration, then of several at once. The launcher checks what depends on the machine."""

from megalm.config.attention import check_attention
from megalm.config.changes import check_allowed_keys
from megalm.config.data import split_shares
from megalm.config.errors import ConfigError
from megalm.config.guard import check_guard
from megalm.config.mixture import check_mixture
from megalm.config.model import ModelConfig
from megalm.config.objective import BUILT_IN, PAIRED, check_objective
from megalm.config.optim import READS, STATES, OptimConfig
from megalm.config.phases import list_configured_spans
from megalm.config.precision import RECIPES, Fp8Config
from megalm.config.ranges import check_fields
from megalm.config.rollout import check_rollout
from megalm.config.root import Config
from megalm.config.typed import show


def validate(config: Config) -> None:
    """Raise ConfigError for the first value, or pair of values, that cannot work."""
    check_fields(config)
    _check_model(config.model)
    _check_optim(config.optim)
    _check_prevention(config)
    _check_precision(config)
    _check_rest(config)
    check_guard(config.guard)
    check_objective(config.objective)
    check_rollout(config.rollout, config.train.global_batch_size, wanted=config.objective.name == "policy")
    _check_phases(config)
    check_allowed_keys(config)


def _check_phases(config: Config) -> None:
    list_configured_spans(config)
    _require(
        not config.data.phases or config.data.order == "keyed",
        f"data.phases needs data.order=keyed: data.order={config.data.order} fixes one order for the whole run.",
    )
    of_pairs = config.objective.name in PAIRED
    _require(
        (config.data.packing == "pairs") == of_pairs or config.objective.name not in BUILT_IN,
        f"objective.name={config.objective.name} and data.packing={config.data.packing}: "
        + (
            f"{config.objective.name} learns from pairs of answers: set data.packing=pairs."
            if of_pairs
            else f"pairs are read by objective.name={' or '.join(PAIRED)}: choose one, or another packing."
        ),
    )
    packs = config.data.packing in ("best_fit", "pairs")
    _require(
        not packs or config.data.order == "keyed",
        f"data.packing={config.data.packing} needs data.order=keyed: data.order={config.data.order} cuts samples in its own way.",
    )
    short = next((p for p in config.data.phases if p.seq_length not in (None, config.model.seq_length)), None)
    _require(
        not packs or short is None,
        f"data.packing={config.data.packing} packs samples of model.seq_length: leave seq_length out of data.phases.",
    )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _check_model(model: ModelConfig) -> None:
    assert model.num_kv_heads is not None and model.head_dim is not None
    if model.hidden_size % model.num_heads and model.head_dim == model.hidden_size // model.num_heads:
        near = [h for h in range(1, model.hidden_size + 1) if model.hidden_size % h == 0]
        near = sorted(sorted(near, key=lambda h: abs(h - model.num_heads))[:4])
        raise ConfigError(
            f"model.hidden_size={model.hidden_size} is not divisible by model.num_heads={model.num_heads}. "
            f"Numbers of heads near it that divide: {', '.join(map(str, near))}; or set model.head_dim."
        )
    _require(
        model.num_heads % model.num_kv_heads == 0,
        f"model.num_heads={model.num_heads} is not a multiple of model.num_kv_heads={model.num_kv_heads}: "
        "each key/value head serves the same number of query heads.",
    )
    _require(
        model.position != "rope" or int(model.head_dim * model.rope_fraction) % 2 == 0,
        f"model.position=rope rotates pairs: head_dim {model.head_dim} x rope_fraction {model.rope_fraction} is odd.",
    )
    _require(
        model.position != "rope" or int(model.head_dim * model.rope_fraction) > 0,
        f"model.rope_fraction={model.rope_fraction} of head_dim {model.head_dim} rotates nothing: set model.position=none.",
    )
    scaling = model.rope_scaling
    _require(
        scaling.kind != "llama3" or scaling.high_frequency_factor > scaling.low_frequency_factor,
        f"model.rope_scaling.high_frequency_factor={scaling.high_frequency_factor}: must lie above low_frequency_factor="
        f"{scaling.low_frequency_factor}.",
    )
    _require(
        not (model.parallel_residual and model.norm_placement != "pre"),
        "model.parallel_residual=true needs model.norm_placement=pre: both sub-layers read the same normalised input.",
    )
    check_attention(model)
    if model.moe.num_experts:
        check_mixture(model)
    _require(
        model.position != "learned" or model.position_limit == model.seq_length,
        f"model.max_positions={model.max_positions}: with model.position=learned there is a vector for each of the "
        f"model.seq_length={model.seq_length} positions, and none beyond: leave it out, or train on that length.",
    )
    _require(
        model.prediction.depth < model.seq_length,
        f"model.prediction.depth={model.prediction.depth}: a token that lies so far ahead must lie within "
        f"model.seq_length={model.seq_length}: choose at most {model.seq_length - 1}.",
    )


def _check_optim(optim: OptimConfig) -> None:
    assert optim.min_lr is not None
    _require(
        optim.min_lr <= optim.lr,
        f"optim.min_lr={optim.min_lr:g}: must lie between 0 and optim.lr={optim.lr:g}. Leave it out for a share of optim.lr.",
    )
    usual = OptimConfig()
    for group in optim.groups:
        _require(
            group.rule is None or group.rule in READS,
            f"optim.groups: rule={group.rule}: there is no such update rule. Known: {', '.join(READS)}.",
        )
    used = dict.fromkeys([optim.name, *(group.rule for group in optim.groups if group.rule)])
    read = {key for rule in used for key in READS[rule]}
    for key in dict.fromkeys(key for keys in READS.values() for key in keys):
        value, rules = getattr(optim, key), [rule for rule, keys in READS.items() if key in keys]
        _require(
            key in read or value == getattr(usual, key),
            f"optim.{key}={show(value)} is read by optim.name={' or '.join(rules)} alone, and {optim.name} would ignore it. "
            f"Leave it out, or use optim.name={rules[0]}. {optim.name} reads {', '.join(READS[optim.name])}.",
        )
    _require(
        not optim.nesterov or optim.momentum > 0,
        f"optim.nesterov=true looks ahead by the momentum, and optim.momentum={optim.momentum:g}: give it one, such as 0.9.",
    )


def _check_precision(config: Config) -> None:
    fp8, unused = config.precision.fp8, Fp8Config()
    if fp8.recipe == "none":
        given = [key for key in vars(unused) if getattr(fp8, key) != getattr(unused, key)]
        _require(
            not given,
            f"precision.fp8.{given[0] if given else ''} is read with a recipe of 8-bit products alone: set precision=fp8, or "
            f"precision.fp8.recipe to one of {', '.join(RECIPES)}.",
        )
        widens = any(rung.action == "widen" for rung in config.guard.rungs)
        _require(
            not widens, "guard.rungs has widen, and there are no 8-bit products: leave it out, or set precision=fp8."
        )


def _check_rest(config: Config) -> None:
    data = config.data
    _require(
        data.weights is None or sum(data.weights) > 0,
        f"data.weights={show(data.weights)}: at least one of them must be above 0.",
    )
    if data.split is not None:
        split_shares(data.split)
    _require(
        config.parallel.data == "auto" or isinstance(config.parallel.data, int),
        f"parallel.data={config.parallel.data}: a positive number, or auto (what is left of the world).",
    )
    _require(
        config.checkpoint.load == "all" or config.checkpoint.load_path is not None,
        "checkpoint.load=weights needs checkpoint.load_path=FOLDER: the weights to start from.",
    )
    _check_run_name(config.run.name)


def _check_run_name(name: str) -> None:
    """The run's folder must be one of its own within run.dir."""
    parts = name.split("/")
    _require(
        all(part.strip() and part not in (".", "..") for part in parts) and name.isprintable(),
        f"run.name={name!r}: the name of a folder within run.dir: not empty, no . or .. for a folder, not from the root.",
    )


def _check_prevention(config: Config) -> None:
    """What keeps a run from diverging."""
    optim, clip = config.optim, config.optim.adaptive_clip
    others = sorted({group.rule for group in optim.groups if group.rule} - {"adamw"})
    _require(
        not (optim.update_clip and others),
        f"optim.update_clip=true judges updates by adamw's second moment, and optim.groups gives some parameters to "
        f"{', '.join(others)}: leave one of the two out.",
    )
    assert optim.reset_warmup_steps is not None
    _require(
        config.guard.provoke.kind != "zero_second_moment" or "exp_avg_sq" in STATES[optim.name],
        f"guard.provoke.kind=zero_second_moment: optim.name={optim.name} keeps no second moment.",
    )
    _require(
        not (optim.qk_clip and config.model.qk_norm),
        f"optim.qk_clip={optim.qk_clip} and model.qk_norm=true: the norm makes the size of query and key weights "
        "irrelevant, so scaling them bounds nothing. Choose one of the two.",
    )
    _require(
        not optim.reset_every or optim.reset_every > optim.reset_warmup_steps,
        f"optim.reset_every={optim.reset_every} is not above optim.reset_warmup_steps={optim.reset_warmup_steps}: the "
        "learning rate would never come back.",
    )
    if clip.kind == "none":
        return
    _require(
        clip.threshold > 0 and 0 < clip.decay < 1 and clip.warmup_steps > 1,
        f"optim.adaptive_clip: threshold={clip.threshold} must be positive, decay={clip.decay} between 0 and 1, "
        f"warmup_steps={clip.warmup_steps} at least 2.",
    )
