"""Features of frozen stages: extracted at boundaries, or computed once and kept while what follows them trains."""

from jaxtransfer.features.extract import FeatureError as FeatureError
from jaxtransfer.features.extract import extract as extract
from jaxtransfer.features.extract import hidden_boundaries as hidden_boundaries
from jaxtransfer.features.extract import last_boundary as last_boundary
from jaxtransfer.features.once import Pass as Pass
from jaxtransfer.features.once import forward as forward
from jaxtransfer.features.once import kept as kept
from jaxtransfer.features.prefix import Prefix as Prefix
from jaxtransfer.features.prefix import frozen_prefix as frozen_prefix
from jaxtransfer.features.prefix import frozen_stages as frozen_stages
from jaxtransfer.features.store import Store as Store
