"""The step: ``step(state, frozen, batch) -> (state, metrics)``, differentiating the trainable partition only.

No gradient, optimizer state, clipping norm, accumulator or weight decay exists for a frozen leaf, by construction.
"""

from jaxtransfer.step.evaluation import Observe as Observe
from jaxtransfer.step.evaluation import make_eval as make_eval
from jaxtransfer.step.placing import places as places
from jaxtransfer.step.placing import shard_batch as shard_batch
from jaxtransfer.step.state import CONSTANTS as CONSTANTS
from jaxtransfer.step.state import bare as bare
from jaxtransfer.step.state import init_state as init_state
from jaxtransfer.step.state import params_of as params_of
from jaxtransfer.step.state import whole as whole
from jaxtransfer.step.state import with_constants as with_constants
from jaxtransfer.step.state import without_constants as without_constants
from jaxtransfer.step.training import Metrics as Metrics
from jaxtransfer.step.training import Objective as Objective
from jaxtransfer.step.training import Perturb as Perturb
from jaxtransfer.step.training import Step as Step
from jaxtransfer.step.training import make_step as make_step
from jaxtransfer.step.training import training_stages as training_stages
