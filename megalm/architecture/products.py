"""The products with weights that layers are made of, by name, and which of them are computed in 8-bit floats."""

from collections.abc import Iterator
from fnmatch import fnmatchcase

from megalm.architecture.blocks import ProductSpec
from megalm.architecture.layers import name_layer, specify_layers
from megalm.config.errors import ConfigError
from megalm.config.model import ModelConfig
from megalm.config.precision import Fp8Config


def list_products(model: ModelConfig) -> Iterator[tuple[int, ProductSpec]]:
    """Yield (layer, product) of all layers."""
    for index, layer in enumerate(specify_layers(model)):
        for sublayer in layer.sublayers:
            for product in sublayer.block.list_products(f"{name_layer(index)}.{sublayer.name}"):
                yield index, product


def choose_fp8_products(model: ModelConfig, fp8: Fp8Config) -> frozenset[str]:
    """Choose names of the products that are computed in 8-bit floats.

    Errors: ConfigError for a pattern of `precision.fp8.skip` that no product has, and where nothing is left.
    """
    if fp8.recipe == "none":
        return frozenset()
    found = list(list_products(model))
    for pattern in fp8.skip:
        if not any(fnmatchcase(product.name, pattern) for _, product in found):
            names = [product.name for layer, product in found if layer == 0]
            raise ConfigError(
                f"precision.fp8.skip has {pattern}, and no product is called so. Those of the first layer are "
                f"{', '.join(names)}; * stands for anything."
            )
    last = model.num_layers - fp8.skip_last
    chosen = frozenset(
        product.name
        for layer, product in found
        if fp8.skip_first <= layer < last
        and min(product.rows, product.columns) >= fp8.smallest
        and not any(fnmatchcase(product.name, pattern) for pattern in fp8.skip)
    )
    if not chosen:
        raise ConfigError(
            f"precision.fp8.recipe={fp8.recipe}, and none of the {len(found)} products is left for it: skip fewer "
            "(precision.fp8.skip, skip_first, skip_last, smallest), or choose precision=bf16."
        )
    return chosen
