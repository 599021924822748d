"""Every setting of a run, how a recipe is read, and what may not be combined."""

from prune_opd.config.load import load_config, parse_config, placed, with_settings
from prune_opd.config.pair import DataSection, LoraSection, ModelSection, TeacherSection, TeacherServerSection
from prune_opd.config.rules import settings_without_effect
from prune_opd.config.schema import (
    Config,
    ControlSection,
    DynamicResponseLengthSection,
    EvaluationSection,
    InFlightSection,
    ObjectiveSection,
    PruningSection,
    RepetitionSection,
    RewardSection,
    RolloutSection,
    TrackingSection,
    TrainingSection,
    VLLMServerSection,
)
from prune_opd.config.section import Section
from prune_opd.config.words import setting_names

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
    "TeacherSection",
    "TeacherServerSection",
    "TrackingSection",
    "TrainingSection",
    "VLLMServerSection",
    "load_config",
    "parse_config",
    "placed",
    "setting_names",
    "settings_without_effect",
    "with_settings",
]
