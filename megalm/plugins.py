"""What a plugin calls when it is imported, to add something of its own; each of them is documented where it is defined.

    from megalm import plugins
    plugins.register_rule("lion", Lion, reads=("betas",))

docs/extending.md has a worked example of each. Only what is asked for is imported: a plugin of yaml alone needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megalm.config.plugins import list_loaded, load_plugins
    from megalm.convert.choices import register_format
    from megalm.convert.families import register_family
    from megalm.data.openers import register_token_source
    from megalm.model.transformer import register_block
    from megalm.objectives.registry import register_objective
    from megalm.observe.trackers.registry import register_tracker
    from megalm.ops.attention_choice import register_attention_kernel
    from megalm.optim.rules import register_rule
    from megalm.train.hook_registry import register_hook

_PLACES = {
    "list_loaded": "config.plugins",
    "load_plugins": "config.plugins",
    "register_attention_kernel": "ops.attention_choice",
    "register_block": "model.transformer",
    "register_family": "convert.families",
    "register_format": "convert.choices",
    "register_hook": "train.hook_registry",
    "register_objective": "objectives.registry",
    "register_rule": "optim.rules",
    "register_token_source": "data.openers",
    "register_tracker": "observe.trackers.registry",
}

__all__ = [
    "list_loaded",
    "load_plugins",
    "register_attention_kernel",
    "register_block",
    "register_family",
    "register_format",
    "register_hook",
    "register_objective",
    "register_rule",
    "register_token_source",
    "register_tracker",
]


def __getattr__(name: str) -> Any:
    """Import the room that owns the function when it is asked for."""
    if name not in _PLACES:
        raise AttributeError(f"megalm.plugins has no {name!r}. There are: {', '.join(__all__)}.")
    return getattr(import_module(f"megalm.{_PLACES[name]}"), name)
