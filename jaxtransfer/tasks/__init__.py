"""Tasks: one file per task, its preparation, head, objective, metrics and the decoding of its predictions."""

from jaxtransfer.tasks.causal_lm import causal_lm as causal_lm
from jaxtransfer.tasks.image_classification import image_classification as image_classification
from jaxtransfer.tasks.masked_lm import masked_lm as masked_lm
from jaxtransfer.tasks.metrics import Metric as Metric
from jaxtransfer.tasks.metrics import collect as collect
from jaxtransfer.tasks.metrics import confusion as confusion
from jaxtransfer.tasks.metrics import roc as roc
from jaxtransfer.tasks.predictions import Answer as Answer
from jaxtransfer.tasks.predictions import Entity as Entity
from jaxtransfer.tasks.predictions import LabelSet as LabelSet
from jaxtransfer.tasks.predictions import Prediction as Prediction
from jaxtransfer.tasks.predictions import Tagged as Tagged
from jaxtransfer.tasks.question_answering import question_answering as question_answering
from jaxtransfer.tasks.task import Task as Task
from jaxtransfer.tasks.text_classification import text_classification as text_classification
from jaxtransfer.tasks.token_classification import token_classification as token_classification
