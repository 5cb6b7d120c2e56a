"""Text: word vectors, models of words and characters, classifiers, a tagger, a prompt; Python's help."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meta_train.problems.common import Begun, Draw, Parts, fit, fixed, problem
from meta_train.problems.data import characters, stretches, words

VOCABULARY = 3000
"""Of what is classified."""
TAGS = 6


@problem(1500)
def skipgram(draw: Draw) -> Begun:
    """Train word vectors by telling neighbours from random words, from near zero (word2vec)."""
    text, vocabulary, width = words(2000), 2000, 32
    model = Parts(word=nn.Embedding(vocabulary, width), context=nn.Embedding(vocabulary, width))
    nn.init.uniform_(model.word.weight, -0.5 / width, 0.5 / width)
    nn.init.zeros_(model.context.weight)

    def loss() -> Tensor:
        place = draw.integers(len(text) - 3, 128, low=3)
        neighbour = text[place + draw.integers(4, 128, low=1)]
        random = draw.integers(vocabulary, 128, 5)
        word = model.word(text[place])
        near = F.logsigmoid((word * model.context(neighbour)).sum(1))
        far = F.logsigmoid(-(word[:, None] * model.context(random)).sum(2)).sum(1)
        return -(near + far).mean()

    return Begun(model, loss)


@problem(400)
def char_lstm_2layer(draw: Draw) -> Begun:
    """Predict characters by an LSTM of two layers."""
    text, kinds = characters()
    model = Parts(
        embedding=nn.Embedding(kinds, 32), lstm=nn.LSTM(32, 96, 2, batch_first=True), head=nn.Linear(96, kinds)
    )

    def loss() -> Tensor:
        x = text[draw.spans(len(text), 16, 33)]
        logits = model.head(model.lstm(model.embedding(x[:, :-1]))[0])
        return F.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten())

    return Begun(model, loss)


def _small_embedding(size: int, width: int) -> nn.Embedding:
    made = nn.Embedding(size, width)
    nn.init.normal_(made.weight, std=0.02)
    return made


class GPT(nn.Module):
    """Three blocks with dropout over at most 48 words; the embedding is also the last layer."""

    def __init__(self, vocabulary: int, width: int = 64) -> None:
        super().__init__()
        self.words, self.places = _small_embedding(vocabulary, width), _small_embedding(48, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, 0.1, "gelu", batch_first=True, norm_first=True)
            for _ in range(3)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, text: Tensor) -> Tensor:
        """Return logits ``[n, length, vocabulary]`` of ``text [n, length]``."""
        length = text.shape[1]
        hidden = self.words(text) + self.places.weight[:length]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        for block in self.blocks:
            hidden = block(hidden, src_mask=mask, is_causal=True)
        logits: Tensor = self.norm(hidden) @ self.words.weight.T
        return logits


@problem(400)
def gpt_tied_dropout(draw: Draw) -> Begun:
    """Predict words by a small GPT with tied embeddings and dropout."""
    text = words(2000)
    model = GPT(2000)

    def loss() -> Tensor:
        x = text[draw.spans(len(text), 8, 33)]
        return F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())

    return Begun(model, loss)


@problem(400)
def bag_of_words_linear(draw: Draw) -> Begun:
    """Classify texts by a linear layer over how often each word comes."""
    texts, labels = stretches(VOCABULARY)
    counts = torch.zeros(len(texts), VOCABULARY).scatter_add_(1, texts, torch.ones(texts.shape)).clamp(max=3)
    return fit(nn.Linear(VOCABULARY, 8), draw, 32, counts, labels)


@problem(400)
def embedding_bag(draw: Draw) -> Begun:
    """Classify texts by means of vectors of their words."""
    return fit(nn.Sequential(nn.EmbeddingBag(VOCABULARY, 32), nn.Linear(32, 8)), draw, 32, *stretches(VOCABULARY))


@problem(300)
def text_cnn(draw: Draw) -> Begun:
    """Classify texts by convolutions of three lengths over words, with dropout."""
    texts, labels = stretches(VOCABULARY)
    model = Parts(
        embedding=nn.Embedding(VOCABULARY, 32),
        convolutions=nn.ModuleList(nn.Conv1d(32, 24, length) for length in (2, 3, 4)),
        head=nn.Linear(72, 8),
    )

    def loss() -> Tensor:
        x, y = draw.batch(32, texts, labels)
        hidden = model.embedding(x).transpose(1, 2)
        features = torch.cat([convolution(hidden).relu().amax(2) for convolution in model.convolutions], 1)
        return F.cross_entropy(model.head(F.dropout(features, 0.3)), y)

    return Begun(model, loss)


@problem(500)
def bilstm_tagger_crf_like(draw: Draw) -> Begun:
    """Tag words by an LSTM in both directions and a conditional random field."""
    text, length = words(1000), 12
    own = (text * 7919) % TAGS
    model = Parts(
        embedding=nn.Embedding(1000, 24),
        lstm=nn.LSTM(24, 32, batch_first=True, bidirectional=True),
        head=nn.Linear(64, TAGS),
        transitions=torch.zeros(TAGS, TAGS),
    )

    def loss() -> Tensor:
        place = draw.spans(len(text), 16, length)
        before = place - (place[:, :1] > 0).long()  # nothing comes before the first word of all
        tags = (own[place] + own[before]) % TAGS
        scores = model.head(model.lstm(model.embedding(text[place]))[0])
        right = scores.gather(2, tags[..., None]).sum((1, 2)) + model.transitions[tags[:, :-1], tags[:, 1:]].sum(1)
        paths = scores[:, 0]
        for step in range(1, length):
            paths = torch.logsumexp(paths[:, :, None] + model.transitions, 1) + scores[:, step]
        return (torch.logsumexp(paths, 1) - right).mean() / length

    return Begun(model, loss)


@problem(600)
def conditional_prompt(draw: Draw) -> Begun:
    """Train a prompt of eight vectors, and the last layer, of a random transformer that stays as it is."""
    text, kinds = characters()
    embedding, block = fixed(
        7, lambda: (nn.Embedding(kinds, 48), nn.TransformerEncoderLayer(48, 4, 96, 0.0, batch_first=True))
    )
    embedding.requires_grad_(False)
    block.requires_grad_(False)
    model = Parts(prompt=draw.normal(8, 48) * 0.02, head=nn.Linear(48, kinds))

    def loss() -> Tensor:
        x = text[draw.spans(len(text), 16, 17)]
        tokens = torch.cat([model.prompt.expand(16, 8, 48), embedding(x[:, :-1])], 1)
        return F.cross_entropy(model.head(block(tokens))[:, -1], x[:, -1])

    return Begun(model, loss)
