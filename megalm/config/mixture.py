"""Which mixtures of experts can be: what is wrong with one that cannot, and the nearest that can. No torch."""

from megalm.config.errors import ConfigError
from megalm.config.model import ModelConfig, MoEConfig


def check_mixture(model: ModelConfig) -> None:
    """Errors: ConfigError for the first setting of model.moe that does not go with the others."""
    moe = model.moe
    _check_choice(moe)
    _check_groups(moe)
    _check_bias(moe)
    _check_layers(model)
    if moe.shared_gate and not moe.shared_ffn_hidden_size:
        raise ConfigError(
            "model.moe.shared_gate=true, and there is no shared expert: set model.moe.num_shared_experts=1, or leave it out."
        )


def name_near_divisors(number: int, wanted: int, count: int = 2) -> str:
    """Name the divisors of a number that lie nearest to the wanted one, as a text."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return " or ".join(map(str, sorted(sorted(divisors, key=lambda d: abs(d - wanted))[:count])))


def _check_choice(moe: MoEConfig) -> None:
    if moe.top_k > moe.num_experts:
        raise ConfigError(
            f"model.moe.top_k={moe.top_k}: there are model.moe.num_experts={moe.num_experts} experts, and a token goes to "
            f"each at most once: set model.moe.top_k={moe.num_experts} or less."
        )


def _check_groups(moe: MoEConfig) -> None:
    if not moe.groups:
        if moe.top_groups:
            raise ConfigError(
                f"model.moe.top_groups={moe.top_groups} limits a token to some of model.moe.groups, and there are none: set "
                "model.moe.groups too, or leave both out."
            )
        return
    if moe.num_experts % moe.groups:
        raise ConfigError(
            f"model.moe.groups={moe.groups} does not divide model.moe.num_experts={moe.num_experts}: "
            f"model.moe.groups={name_near_divisors(moe.num_experts, moe.groups)} would."
        )
    run = moe.num_experts // moe.groups
    least = -(-moe.top_k // run)
    if not least <= moe.top_groups <= moe.groups:
        raise ConfigError(
            f"model.moe.top_groups={moe.top_groups}: {moe.groups} groups of {run} experts allow {least} (which hold "
            f"model.moe.top_k={moe.top_k}) to {moe.groups}."
        )
    if moe.group_scores > run:
        raise ConfigError(
            f"model.moe.group_scores={moe.group_scores}: a group has {run} experts; set it to {run} or less."
        )


def _check_bias(moe: MoEConfig) -> None:
    if moe.selection_bias and moe.score != "sigmoid":
        raise ConfigError(
            f"model.moe.selection_bias=true with model.moe.score={moe.score}: scores that sum to 1 over {moe.num_experts} "
            "experts are too small for a bias that moves in fixed steps. Set model.moe.score=sigmoid, or "
            "model.moe.selection_bias=false and balance by model.moe.balance_loss (1e-2 is usual with softmax)."
        )


def _check_layers(model: ModelConfig) -> None:
    moe = model.moe
    beyond = [layer for layer in moe.dense_layers if layer >= model.num_layers]
    if beyond:
        raise ConfigError(
            f"model.moe.dense_layers={moe.dense_layers}: there is no layer {beyond[0]}; they are numbered from 0 to "
            f"{model.num_layers - 1}."
        )
    if all(moe.is_dense(layer) for layer in range(model.num_layers)):
        raise ConfigError(
            f"model.moe.first_dense={moe.first_dense}, every={moe.every} and dense_layers={moe.dense_layers} make all "
            f"{model.num_layers} layers dense, and model.moe.num_experts={moe.num_experts} asks for a mixture: set "
            "model.moe.num_experts=0, or leave a layer to it."
        )
