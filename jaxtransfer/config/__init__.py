"""Configurations: strict YAML into frozen records, and back. Reading one runs no code and imports no name from it."""

from jaxtransfer.config.document import ConfigError as ConfigError
from jaxtransfer.config.files import dump as dump
from jaxtransfer.config.files import from_dict as from_dict
from jaxtransfer.config.files import keys as keys
from jaxtransfer.config.files import load as load
from jaxtransfer.config.objectives import ObjectiveConfig as ObjectiveConfig
from jaxtransfer.config.optimizers import GroupConfig as GroupConfig
from jaxtransfer.config.optimizers import OptimizerConfig as OptimizerConfig
from jaxtransfer.config.phases import PhaseConfig as PhaseConfig
from jaxtransfer.config.schema import AdaptConfig as AdaptConfig
from jaxtransfer.config.schema import Config as Config
from jaxtransfer.config.schema import DataConfig as DataConfig
from jaxtransfer.config.schema import MeshConfig as MeshConfig
from jaxtransfer.config.schema import PretrainConfig as PretrainConfig
from jaxtransfer.config.schema import RunConfig as RunConfig
from jaxtransfer.config.schema import SourceConfig as SourceConfig
from jaxtransfer.config.schema import StudyConfig as StudyConfig
from jaxtransfer.config.tasks import CausalLMConfig as CausalLMConfig
from jaxtransfer.config.tasks import ImageClassificationConfig as ImageClassificationConfig
from jaxtransfer.config.tasks import MaskedLMConfig as MaskedLMConfig
from jaxtransfer.config.tasks import QuestionAnsweringConfig as QuestionAnsweringConfig
from jaxtransfer.config.tasks import TaskConfig as TaskConfig
from jaxtransfer.config.tasks import TextClassificationConfig as TextClassificationConfig
from jaxtransfer.config.tasks import TokenClassificationConfig as TokenClassificationConfig
