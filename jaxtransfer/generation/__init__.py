"""Generation: prompts in, tokens or text out, by one compiled prefill and one compiled loop over a donated cache."""

from jaxtransfer.generation.loop import generate as generate
from jaxtransfer.generation.loop import stream as stream
from jaxtransfer.generation.prompts import GenerationError as GenerationError
from jaxtransfer.generation.prompts import left_pad as left_pad
from jaxtransfer.generation.text import pieces as pieces
from jaxtransfer.generation.text import stream_text as stream_text
