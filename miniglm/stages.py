"""Which objective a run has: by the kind of its data and, with --reward=, by that."""

from miniglm.marks import Marks
from miniglm.objectives import NextToken, Objective, Preferences
from miniglm.rewards import Rewards

OBJECTIVES = {"pretrain": NextToken, "sft": NextToken, "dpo": Preferences, "kto": Marks}


def objective_of(config, data) -> type[Objective]:
    """config: train.py's Settings; data: a Dataset or a Mixture."""
    return Rewards if config.reward else OBJECTIVES[data.kind]
