"""What a family of Hugging Face models is: its settings and its tensors' names, as tables that are read in both directions.

To add a family: a file here (or a line in the file of its relatives) and its place in `FAMILIES`; tests/convert then holds it
against transformers. What no table says (rotations, windows) is a pair of functions beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from megalm.config import ModelConfig
from megalm.config.errors import ConfigError
from megalm.convert.huggingface_settings import Asked

Json = dict[str, Any]
"""What is written; readers are handed `Config`."""

REQUIRED = object()
"""The default of a setting without one."""

GATED = {
    "silu": "swiglu",
    "swish": "swiglu",
    "gelu": "geglu",
    "gelu_pytorch_tanh": "geglu_tanh",
    "gelu_new": "geglu_tanh",
}
UNGATED = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}
_ACTIVATION_NAMES = {
    "swiglu": "silu",
    "geglu": "gelu",
    "geglu_tanh": "gelu_pytorch_tanh",
    "gelu": "gelu",
    "gelu_tanh": "gelu_new",
    "relu": "relu",
    "relu2": "relu2",
}


class Config(Asked):
    """A config.json being read: what was asked of it, what the user accepts, and what there is to tell."""

    def __init__(self, values: Json, accept: Collection[str] = ()):
        super().__init__(values)
        self.accept, self.notes = accept, list[str]()

    def require(self, key: str) -> Any:
        """Give a setting that must be there. Errors: ConfigError."""
        if self.get(key) is None:
            raise ConfigError(f"config.json: key '{key}' is missing; a {self.get('model_type')} config must have it")
        return self[key]


def refuse(json: Asked, key: str, *allowed: Any) -> None:
    """Stop at a setting that this model cannot compute; the first value allowed is the default."""
    value = json.get(key, allowed[0])
    if value not in allowed:
        raise ConfigError(f"config.json: {key}={value!r} is not supported; allowed: {', '.join(map(repr, allowed))}")


@dataclass(frozen=True)
class Setting:
    """A setting that has the same meaning on both sides.

    default: transformers' own where config.json does not say (None with a REQUIRED neighbour: megalm's resolved default).
    fields: names in ModelConfig (`moe.top_k` within a group), which all hold the value; of several, config.json is written
    with what holds for all.
    """

    key: str
    fields: tuple[str, ...]
    default: Any = REQUIRED
    read: Callable[[Any], Any] = lambda value: value
    write: Callable[[Any], Any] = lambda value: value
    none: Any = None
    """What is written where the model has None."""
    also: tuple[str, ...] = ()
    """Other names that config.json has for it."""

    def read_into(self, json: Config, values: dict[str, Any]) -> None:
        """Take it out of config.json."""
        other = next((key for key in self.also if json.get(key) is not None), None)
        if other is not None and json.get(self.key) in (None, json[other]):
            return values.update(dict.fromkeys(self.fields, self.read(json[other])))
        found = json.require(self.key) if self.default is REQUIRED else json.get(self.key, self.default)
        try:
            value = None if found is None else self.read(found)
        except KeyError:
            raise ConfigError(f"config.json: {self.key}={found!r} is not supported") from None
        values.update(dict.fromkeys(self.fields, value))

    def written(self, model: ModelConfig) -> Any:
        """Give its value in config.json."""
        values = [attrgetter(name)(model) for name in self.fields]
        value = all(values) if isinstance(values[0], bool) else values[0]
        return self.none if value is None else self.write(value)


def same(key: str, field: str, default: Any = REQUIRED) -> Setting:
    """A number that only has another name."""
    return Setting(key, (field,), default)


def longest(key: str, default: int) -> Setting:
    """The longest sequence that the model is for; how it was trained is not said."""
    return Setting(key, ("seq_length", "max_positions"), default)


def truth(key: str, default: bool, *fields: str) -> Setting:
    """A setting that is true or false."""
    return Setting(key, fields, default, bool)


def activation(key: str, default: str, words: Mapping[str, str], **written: str) -> Setting:
    """The MLP's function; `written`: words of this family's own for ours."""

    def read(word: str) -> str:
        if word not in words:
            raise ConfigError(f"config.json: {key}={word!r} is not supported; supported are {', '.join(words)}")
        return words[word]

    return Setting(key, ("activation",), default, read, lambda ours: {**_ACTIVATION_NAMES, **written}.get(ours, ours))


@dataclass(frozen=True)
class Experts:
    """One foreign tensor, named in full, that holds a tensor of every expert (of several: one below the other)."""

    parts: tuple[str, ...]
    """Ours of one expert, with {} for its number."""
    interleaved: bool = False
    """Rows of two parts alternate."""
    transposed: bool = False
    """Each expert's matrix is stored [in, out]."""
    flat: bool = False
    """All experts' rows are one dim; else experts are a dim of their own."""


@dataclass(frozen=True)
class Names:
    """A family's tensors. Both tables map a foreign name to ours; a tuple of ours is stacked along the rows.

    ends: outside the layers. layer: within one, whose foreign names begin with `prefix` with the layer's number in it; a name
    with {} in it stands for each expert's.
    """

    ends: Mapping[str, str]
    prefix: str
    layer: Mapping[str, str | tuple[str, ...] | Experts]
    transposed: bool = False
    """Matrices of layers are stored [in, out] (GPT-2)."""
    grouped: bool = False
    """Stacked queries, keys and values lie group by group: query heads, key, value (GPT-NeoX)."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Other foreign names of a tensor, by the usual one."""
    prediction: Mapping[str, str] = field(default_factory=dict)
    """What a layer that predicts further tokens has beside those of `layer`."""
    copies: Mapping[str, str] = field(default_factory=dict)
    """What it has that is a tensor of ours outside the layers once more."""


def nothing_more(json: Config, model: ModelConfig) -> None:
    """Read no setting that is not in the table."""


def no_more(model: ModelConfig) -> Json:
    """Write no setting that is not in the table."""
    return {}


@dataclass(frozen=True)
class Family:
    """One `model_type`: its class in transformers, its config and its tensors in both directions."""

    model_type: str
    class_name: str
    settings: tuple[Setting, ...]
    names: Names
    always: Mapping[str, Any] = field(default_factory=dict)
    """What ModelConfig holds for every model of the family."""
    read_more: Callable[[Config, ModelConfig], None] = nothing_more
    write_more: Callable[[ModelConfig], Json] = no_more
    interleaved: bool = False
    """Rotary pairs are neighbours in the stored rows of queries and keys."""

    def read(self, json: Config) -> ModelConfig:
        """Read a config.json. Errors: ConfigError for what the family or this engine does not have."""
        values: dict[str, Any] = dict(self.always)
        for setting in self.settings:
            setting.read_into(json, values)
        inner = {key: values.pop(key) for key in list(values) if "." in key}
        model = ModelConfig(name=self.model_type, rope_interleaved=self.interleaved, **values)
        for key, value in inner.items():
            group, _, name = key.partition(".")
            setattr(getattr(model, group), name, value)
        model.fill_in()
        if not {"head_dim", "latent.rope_dim"} & {field for setting in self.settings for field in setting.fields}:
            refuse(json, "head_dim", None, model.head_dim)  # said by some, and always this
        self.read_more(json, model)
        return model

    def write(self, model: ModelConfig) -> Json:
        """Write what `read` would read as this model where the family can express it."""
        return {**{setting.key: setting.written(model) for setting in self.settings}, **self.write_more(model)}


def chain(*readers: Callable[[Config, ModelConfig], None]) -> Callable[[Config, ModelConfig], None]:
    """Call several readers one after the other."""

    def read_all(json: Config, model: ModelConfig) -> None:
        for reader in readers:
            reader(json, model)

    return read_all


def join(*writers: Callable[[ModelConfig], Json]) -> Callable[[ModelConfig], Json]:
    """Write what several writers do."""
    return lambda model: {key: value for writer in writers for key, value in writer(model).items()}
