"""Jobs: a configuration read into calls of the library; what the command line does, for programs as well."""

from jaxtransfer.job.commands import explain as explain
from jaxtransfer.job.commands import inspect as inspect
from jaxtransfer.job.commands import resume as resume
from jaxtransfer.job.commands import run as run
from jaxtransfer.job.finished import complete as complete
from jaxtransfer.job.finished import evaluate as evaluate
from jaxtransfer.job.finished import export as export
from jaxtransfer.job.finished import merge as merge
from jaxtransfer.job.finished import predict as predict
from jaxtransfer.job.finished import task_of as task_of
from jaxtransfer.job.labelling import zero_shot as zero_shot
from jaxtransfer.job.launch import join as join
from jaxtransfer.job.launch import launch as launch
from jaxtransfer.job.planning import plan as plan
from jaxtransfer.job.ranking import rank as rank
from jaxtransfer.job.sweeping import parse_axes as parse_axes
from jaxtransfer.job.sweeping import sweep as sweep
