"""A convolutional network on scikit-learn's digits.

python examples/image_classifier.py --steps 300 --seed 0
"""

import torch
from compare import compare, settings, train
from sklearn.datasets import load_digits
from torch import nn

digits = load_digits()
x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16  # [1797, 1, 8, 8], from 0 to 1
y = torch.tensor(digits.target)
KEPT = 400
"""The last ones, by other writers, are for validation."""


def run(make, steps):
    """Train on batches of 64; 10 thousand parameters."""
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(512, 10)),
    )

    def training_loss():
        rows = torch.randint(len(x) - KEPT, (64,))
        return nn.functional.cross_entropy(model(x[rows]), y[rows])

    def validation_loss():
        return nn.functional.cross_entropy(model(x[-KEPT:]), y[-KEPT:])

    return train(model.parameters(), make, steps, training_loss, validation_loss)


if __name__ == "__main__":
    compare(run, settings(__doc__, steps=300))
