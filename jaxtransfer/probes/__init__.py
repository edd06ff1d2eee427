"""Probes: classifiers of features that are fitted in closed form or to convergence, as pure functions of arrays."""

from jaxtransfer.probes.checks import ProbeError as ProbeError
from jaxtransfer.probes.choosing import Choice as Choice
from jaxtransfer.probes.choosing import choose as choose
from jaxtransfer.probes.choosing import folds as folds
from jaxtransfer.probes.choosing import log_loss as log_loss
from jaxtransfer.probes.choosing import zero_one as zero_one
from jaxtransfer.probes.linear import Linear as Linear
from jaxtransfer.probes.linear import logistic as logistic
from jaxtransfer.probes.linear import ridge as ridge
from jaxtransfer.probes.linear import standardised as standardised
from jaxtransfer.probes.neighbours import classify_by_prototypes as classify_by_prototypes
from jaxtransfer.probes.neighbours import nearest_neighbours as nearest_neighbours
from jaxtransfer.probes.neighbours import prototypes as prototypes
