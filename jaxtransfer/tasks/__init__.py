"""Tasks: one file per task, its preparation, head, objective, metrics and the decoding of its predictions."""

from jaxtransfer.tasks.metrics import Metric as Metric
from jaxtransfer.tasks.metrics import collect as collect
from jaxtransfer.tasks.metrics import confusion as confusion
from jaxtransfer.tasks.task import Task as Task
from jaxtransfer.tasks.text_classification import Prediction as Prediction
from jaxtransfer.tasks.text_classification import text_classification as text_classification
