"""A recurrent network that predicts the next character of Python's own documentation (`pydoc_data.topics`).

python examples/character_model.py --steps 200 --seed 0
"""

from pydoc_data.topics import topics

import torch
from compare import compare, settings, train
from torch import nn

TEXT = "".join(topics.values())[:200_000]
LETTERS = sorted(set(TEXT))
codes = torch.tensor([LETTERS.index(letter) for letter in TEXT])
SPLIT = 9 * len(codes) // 10
LENGTH = 32
"""Characters of a sequence."""


class CharacterModel(nn.Module):
    """An embedding, a GRU, a linear layer: logits `[batch, length, letters]` of codes `[batch, length]`."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(len(LETTERS), 32)
        self.recurrent = nn.GRU(32, 64, batch_first=True)
        self.output = nn.Linear(64, len(LETTERS))

    def forward(self, sequences):
        return self.output(self.recurrent(self.embedding(sequences))[0])


def cross_entropy(model, starts):
    """Return the mean over sequences that begin at `starts [batch]`, in nats a character."""
    sequences = torch.stack([codes[i : i + LENGTH + 1] for i in starts.tolist()])
    logits = model(sequences[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1), sequences[:, 1:].flatten())


def run(make, steps):
    """Train on batches of 16 sequences."""
    model = CharacterModel()

    def training_loss():
        return cross_entropy(model, torch.randint(SPLIT - LENGTH, (16,)))

    def validation_loss():
        return cross_entropy(model, torch.arange(SPLIT, len(codes) - LENGTH - 1, LENGTH))

    return train(model.parameters(), make, steps, training_loss, validation_loss)


if __name__ == "__main__":
    compare(run, settings(__doc__, steps=200))
