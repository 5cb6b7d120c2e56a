"""A perceptron on scikit-learn's diabetes table: 442 patients, ten columns, the disease a year later.

python examples/table_regression.py --steps 300 --seed 0
"""

import torch
from compare import compare, settings, train
from sklearn.datasets import load_diabetes
from torch import nn

table = load_diabetes()
x = torch.tensor(table.data, dtype=torch.float32) * len(table.data) ** 0.5  # columns of variance 1
y = torch.tensor(table.target, dtype=torch.float32).unsqueeze(1)
y = (y - y.mean()) / y.std()
KEPT = 100


def run(make, steps):
    """Train on batches of 32; the squared error is in variances of the target, so that 1 is what a constant gets."""
    order = torch.randperm(len(x))
    kept, used = order[:KEPT], order[KEPT:]
    model = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))

    def training_loss():
        rows = used[torch.randint(len(used), (32,))]
        return nn.functional.mse_loss(model(x[rows]), y[rows])

    def validation_loss():
        return nn.functional.mse_loss(model(x[kept]), y[kept])

    return train(model.parameters(), make, steps, training_loss, validation_loss)


if __name__ == "__main__":
    compare(run, settings(__doc__, steps=300))
