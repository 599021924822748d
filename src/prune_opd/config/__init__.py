"""Every setting of a run, how a recipe is read, and what may not be combined."""

from prune_opd.config.load import load_config, parse_config, setting_names
from prune_opd.config.rules import settings_without_effect
from prune_opd.config.schema import (
    Config,
    ControlSection,
    DataSection,
    DynamicResponseLengthSection,
    EvaluationSection,
    InFlightSection,
    LoraSection,
    ModelSection,
    ObjectiveSection,
    PruningSection,
    RepetitionSection,
    RewardSection,
    RolloutSection,
    Section,
    TeacherServerSection,
    TrackingSection,
    TrainingSection,
    VLLMServerSection,
)

__all__ = [
    "Config",
    "ControlSection",
    "DataSection",
    "DynamicResponseLengthSection",
    "EvaluationSection",
    "InFlightSection",
    "LoraSection",
    "ModelSection",
    "ObjectiveSection",
    "PruningSection",
    "RepetitionSection",
    "RewardSection",
    "RolloutSection",
    "Section",
    "TeacherServerSection",
    "TrackingSection",
    "TrainingSection",
    "VLLMServerSection",
    "load_config",
    "parse_config",
    "setting_names",
    "settings_without_effect",
]
