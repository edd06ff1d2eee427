"""Data: where records come from, texts into tokens, images into pixels, and the deterministic loader."""

from jaxtransfer.data.dataset import DataError as DataError
from jaxtransfer.data.dataset import Dataset as Dataset
from jaxtransfer.data.dataset import from_records as from_records
from jaxtransfer.data.images import Augment as Augment
from jaxtransfer.data.images import ImageProcessor as ImageProcessor
from jaxtransfer.data.loader import Examples as Examples
from jaxtransfer.data.loader import Loader as Loader
from jaxtransfer.data.loader import batches as batches
from jaxtransfer.data.sources import DataSpec as DataSpec
from jaxtransfer.data.sources import read as read
from jaxtransfer.data.text import encode as encode
from jaxtransfer.data.text import tokenizer as tokenizer
