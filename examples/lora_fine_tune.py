"""LoRA by peft: a network that knows digits learns to read them upside down, through adapters of rank 4.

python examples/lora_fine_tune.py --steps 200 --seed 0
"""

import torch
from compare import compare, settings, train
from peft import LoraConfig, get_peft_model
from sklearn.datasets import load_digits
from torch import nn

digits = load_digits()
x = torch.tensor(digits.images, dtype=torch.float32) / 16  # [1797, 8, 8]
y = torch.tensor(digits.target)
KEPT = 400


def loss_of(model, images, rows):
    """Return the cross-entropy of `images[rows]`."""
    return nn.functional.cross_entropy(model(images[rows].flatten(1)), y[rows])


def pretrained():
    """Return a perceptron trained on upright digits, by AdamW for 300 steps."""
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(300):
        optimizer.zero_grad()
        loss_of(model, x, torch.randint(len(x) - KEPT, (64,))).backward()
        optimizer.step()
    return model


def run(make, steps):
    """Train on batches of 64; the adapters have 4 thousand parameters, and nothing else is trained."""
    model = get_peft_model(pretrained(), LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2", "4"]))
    turned = x.flip(1, 2)

    def training_loss():
        return loss_of(model, turned, torch.randint(len(x) - KEPT, (64,)))

    def validation_loss():
        return loss_of(model, turned, torch.arange(len(x) - KEPT, len(x)))

    trained = [p for p in model.parameters() if p.requires_grad]
    return train(trained, make, steps, training_loss, validation_loss)


if __name__ == "__main__":
    compare(run, settings(__doc__, steps=200))
