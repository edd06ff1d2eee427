"""How well a source suits a task, told from its features or predictions without training it; larger is better."""

from jaxtransfer.scores.checks import ScoreError as ScoreError
from jaxtransfer.scores.features import gbc as gbc
from jaxtransfer.scores.features import h_score as h_score
from jaxtransfer.scores.features import knn as knn
from jaxtransfer.scores.features import logme as logme
from jaxtransfer.scores.features import parc as parc
from jaxtransfer.scores.features import transrate as transrate
from jaxtransfer.scores.probabilities import leep as leep
from jaxtransfer.scores.probabilities import nce as nce
