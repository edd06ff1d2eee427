"""Few-shot and zero-shot transfer: episodes, contrastive pairs, entailment, similarity, examples in a prompt."""

from jaxtransfer.fewshot.context import Prompt as Prompt
from jaxtransfer.fewshot.context import Template as Template
from jaxtransfer.fewshot.context import prompt as prompt
from jaxtransfer.fewshot.drawing import FewShotError as FewShotError
from jaxtransfer.fewshot.drawing import Stream as Stream
from jaxtransfer.fewshot.embedding import embed as embed
from jaxtransfer.fewshot.embedding import embed_texts as embed_texts
from jaxtransfer.fewshot.episodes import Episode as Episode
from jaxtransfer.fewshot.episodes import Episodes as Episodes
from jaxtransfer.fewshot.episodes import episode_batches as episode_batches
from jaxtransfer.fewshot.episodes import episodes as episodes
from jaxtransfer.fewshot.episodes import prototypical as prototypical
from jaxtransfer.fewshot.setfit import Pairs as Pairs
from jaxtransfer.fewshot.setfit import pair_batches as pair_batches
from jaxtransfer.fewshot.setfit import pair_similarity as pair_similarity
from jaxtransfer.fewshot.setfit import pairs as pairs
from jaxtransfer.fewshot.zero_shot import by_entailment as by_entailment
from jaxtransfer.fewshot.zero_shot import by_similarity as by_similarity
from jaxtransfer.fewshot.zero_shot import entailed as entailed
from jaxtransfer.fewshot.zero_shot import entailment as entailment
from jaxtransfer.fewshot.zero_shot import hypotheses as hypotheses
