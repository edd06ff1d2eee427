"""Objectives: what a step minimises, as functions of a `View`; and what they are made of, as functions of arrays."""

from jaxtransfer.objectives import adversarial as adversarial
from jaxtransfer.objectives import continual as continual
from jaxtransfer.objectives import discrepancy as discrepancy
from jaxtransfer.objectives import distillation as distillation
from jaxtransfer.objectives import gradual as gradual
from jaxtransfer.objectives import regularisers as regularisers
from jaxtransfer.objectives import source_free as source_free
from jaxtransfer.objectives import terms as terms
from jaxtransfer.objectives.language import language_model as language_model
from jaxtransfer.objectives.language import token_losses as token_losses
from jaxtransfer.objectives.losses import IGNORE as IGNORE
from jaxtransfer.objectives.losses import Objective as Objective
from jaxtransfer.objectives.losses import balanced as balanced
from jaxtransfer.objectives.losses import binary_cross_entropy as binary_cross_entropy
from jaxtransfer.objectives.losses import cross_entropy as cross_entropy
from jaxtransfer.objectives.mixup import mixup as mixup
from jaxtransfer.objectives.seen import boundary as boundary
from jaxtransfer.objectives.spans import span_cross_entropy as span_cross_entropy
from jaxtransfer.objectives.sums import Term as Term
from jaxtransfer.objectives.sums import aux_of as aux_of
from jaxtransfer.objectives.sums import captures as captures
from jaxtransfer.objectives.sums import shapes_of as shapes_of
from jaxtransfer.objectives.sums import states_of as states_of
from jaxtransfer.objectives.sums import total as total
