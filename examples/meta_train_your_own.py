"""Meta-train a small rule on perceptrons of one half of the digits, then use it on the other half.

python examples/meta_train_your_own.py --steps 100 --seed 0

A rule that has seen one kind of problem knows that kind: this shows meta-training, not an optimizer to keep.
"""

import torch
from compare import settings, tell, train
from torch import nn

import l2o
from l2o.estimators import Backprop
from l2o.rules import MLP
from l2o.tasks import ImageMLP
from l2o.tasks.data import image_split

OUTER_STEPS = 60
x, y = image_split("digits", "meta_test", "train", "cpu")  # of the half that meta-training never sees
valid_x, valid_y = image_split("digits", "meta_test", "valid", "cpu")


def meta_train(horizon, seed):
    """Meta-train a rule from nothing: 8 problems at once, runs of `horizon` steps, truncated backpropagation."""
    generator = torch.Generator().manual_seed(seed)
    rule = MLP(hidden=(16, 16))
    family = ImageMLP(dataset="digits", width=32)
    estimator = Backprop(rule, family, lanes=8, horizon=horizon, truncation=20, meta_loss="log")
    theta = rule.init_theta(generator)
    training = l2o.MetaTraining(estimator, theta, lambda theta: torch.optim.Adam(theta, lr=3e-3), generator)
    for step in range(OUTER_STEPS):
        metrics = training.outer_step()
        if step % 20 == 0:
            print(f"outer step {step}: meta-loss {metrics['meta_loss']:.3f}")
    return rule, training.theta


def run(make, steps):
    """Train a perceptron of other initial weights on images that meta-training never saw."""
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    def training_loss():
        rows = torch.randint(len(x), (128,))
        return nn.functional.cross_entropy(model(x[rows].flatten(1)), y[rows])

    def validation_loss():
        return nn.functional.cross_entropy(model(valid_x.flatten(1)), valid_y)

    return train(model.parameters(), make, steps, training_loss, validation_loss)


def main():
    """Meta-train, then compare with AdamW at 0.001 and with what ships."""
    given = settings(__doc__, steps=100)
    rule, theta = meta_train(given.steps, given.seed)
    makers = {
        "my own": lambda params: l2o.LearnedOptimizer(params, (rule, theta), total_steps=given.steps),
        "default": lambda params: l2o.LearnedOptimizer(params, "default", total_steps=given.steps),
        "AdamW 0.001": lambda params: torch.optim.AdamW(params, lr=1e-3),
    }
    found = {}
    for name, make in makers.items():
        torch.manual_seed(given.seed)
        found[name] = run(make, given.steps)
    tell(found, given.seed)


if __name__ == "__main__":
    main()
