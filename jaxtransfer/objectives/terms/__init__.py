"""The terms of objectives, method by method."""

from jaxtransfer.objectives.terms.domains import cdan as cdan
from jaxtransfer.objectives.terms.domains import centroid_labels as centroid_labels
from jaxtransfer.objectives.terms.domains import coral as coral
from jaxtransfer.objectives.terms.domains import dann as dann
from jaxtransfer.objectives.terms.domains import entropy as entropy
from jaxtransfer.objectives.terms.domains import information_maximisation as information_maximisation
from jaxtransfer.objectives.terms.domains import mcc as mcc
from jaxtransfer.objectives.terms.domains import mcd as mcd
from jaxtransfer.objectives.terms.domains import mmd as mmd
from jaxtransfer.objectives.terms.domains import pseudo_labels as pseudo_labels
from jaxtransfer.objectives.terms.near import NEW as NEW
from jaxtransfer.objectives.terms.near import REPLAY as REPLAY
from jaxtransfer.objectives.terms.near import co_tuning as co_tuning
from jaxtransfer.objectives.terms.near import ewc as ewc
from jaxtransfer.objectives.terms.near import feature_distillation as feature_distillation
from jaxtransfer.objectives.terms.near import l2_sp as l2_sp
from jaxtransfer.objectives.terms.near import lwf as lwf
from jaxtransfer.objectives.terms.near import mixout as mixout
from jaxtransfer.objectives.terms.near import r3f as r3f
from jaxtransfer.objectives.terms.near import replay as replay
from jaxtransfer.objectives.terms.near import spectral_shrinkage as spectral_shrinkage
