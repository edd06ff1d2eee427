"""Objectives: what a step minimises, as functions of a `View`."""

from jaxtransfer.objectives.losses import IGNORE as IGNORE
from jaxtransfer.objectives.losses import Objective as Objective
from jaxtransfer.objectives.losses import cross_entropy as cross_entropy
