"""How an objective is chosen: by a word of the command line, or by a plugin's own name."""

import pytest

from megalm.config import ConfigError
from megalm.config.compose import compose_config
from megalm.objectives import registry
from megalm.objectives.next_token import NextToken
from megalm.objectives.registry import build_objective, register_objective


def configure(*words):
    return compose_config(["+model=tiny", *words])


@pytest.mark.parametrize("words", [(), ("objective=sft",), ("+experiment=sft", "checkpoint.load_path=somewhere")])
def test_pretraining_and_fine_tuning_predict_the_next_token(words):
    assert isinstance(build_objective(configure(*words)), NextToken)


def test_an_unknown_name_is_told_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"objective.name=next_tokn: there is no such .* Did you mean 'next_token'\?"):
        build_objective(configure("objective.name=next_tokn"))


def test_a_plugins_objective_is_built_with_its_own_options(monkeypatch):
    class Own(NextToken):
        def __init__(self, config):
            super().__init__(z_loss=float(config.objective.options["weight"]))

    monkeypatch.setattr(registry, "_BUILDERS", dict(registry._BUILDERS))
    register_objective("own", Own)
    register_objective("own", Own)  # a module that is read twice
    made = build_objective(configure("objective.name=own", "objective.options={weight: 0.5}"))
    assert isinstance(made, Own) and made.z_loss == 0.5
    with pytest.raises(ValueError, match="an objective is called 'own' already"):
        register_objective("own", NextToken)
