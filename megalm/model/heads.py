"""How attention's heads lie on the tensor ranks."""

from megalm.config import ModelConfig
from megalm.parallel.linear import Output, split_rows
from megalm.parallel.mesh import Axis


def query_heads(config: ModelConfig, axis: Axis, name: str) -> Output:
    """The query heads as the rows of the tensor called `name`.

    With a key/value head or more for each rank, those are dealt out with their query heads, as evenly as they can be:
    9 query heads on 3 key/value heads are 6 and 3 on two ranks. With fewer, ranks share a key/value head, and its query
    heads are divided.
    """
    assert config.head_dim is not None and config.num_kv_heads is not None
    own = config.num_kv_heads >= axis.size
    unit = config.head_dim * (config.num_heads // config.num_kv_heads if own else 1)
    return Output(name, config.num_heads * config.head_dim, unit=unit, replicate=not own, uneven=own)


def key_value_heads(config: ModelConfig, axis: Axis, name: str) -> Output:
    """The key or the value heads as the rows of the tensor called `name`."""
    assert config.head_dim is not None and config.num_kv_heads is not None
    own = config.num_kv_heads >= axis.size
    return Output(name, config.num_kv_heads * config.head_dim, unit=config.head_dim, replicate=not own, uneven=own)


def local_query_heads(config: ModelConfig, axis: Axis) -> slice:
    """Which of the model's query heads this rank computes."""
    assert config.head_dim is not None
    first, rows, _, _ = split_rows(query_heads(config, axis, "query"), axis)
    return slice(first // config.head_dim, (first + rows) // config.head_dim)
