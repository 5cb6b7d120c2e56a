"""The share of an optimizer's step: operations as counted by hand, and a record of a small model."""

import dataclasses

import pytest
import torch

from l2o.bench.share import Decoder, Language, measure_share, product_flops
from l2o.rules import Steered

M = 64
COUNTS = {
    "square": ([(M, M)], torch.float32, 3 * 6 * M**3),
    "tall": ([(2 * M, M)], torch.float32, 3 * (4 * 2 * M**3 + 2 * M**3)),
    "long, on the Gram matrix": ([(M, 8 * M)], torch.float32, 4 * 8 * M**3 + 3 * 8 * M**3),
    "long, in bfloat16": ([(M, 8 * M)], torch.bfloat16, 3 * (4 * 8 * M**3 + 2 * M**3)),
    "vectors": ([(M,), (1, M), ()], torch.float32, 0),
    "two": ([(M, M), (M, M)], torch.float32, 2 * 3 * 6 * M**3),
}
SMALL = Decoder(vocabulary=50, context=16, width=16, blocks=1, heads=2, sample=8)


@pytest.mark.parametrize(("shapes", "dtype", "expected"), COUNTS.values(), ids=COUNTS)
def test_operations_are_those_of_the_products(shapes, dtype, expected):
    assert product_flops(Steered(iterations=3), shapes, dtype) == expected


def test_in_an_eigenbasis_there_are_two_products_of_gradients_and_four_to_turn_them():
    rule = Steered(direction="eigenbasis", widest=M)
    tall = 3 * (2 * M * M * 2 * M) + 3 * (2 * M * 2 * M * 2 * M)
    assert product_flops(rule, [(M, M), (M,)], torch.float32) == 6 * 2 * M**3
    assert product_flops(dataclasses.replace(rule, widest=2 * M), [(2 * M, M)], torch.float32) == tall


def test_a_token_is_predicted_from_those_before_it():
    torch.manual_seed(0)
    model, tokens = Language(SMALL), torch.randint(50, (1, 8))
    seen = torch.nn.functional.one_hot(tokens, 50).float().requires_grad_()
    model.tokens.forward = lambda _: seen @ model.tokens.weight
    model(tokens).backward()
    assert not seen.grad[0, -1].any()  # after which nothing is predicted
    assert seen.grad[0, 0].any()


def test_gpt2_small_has_its_parameters():
    with torch.device("meta"):
        assert sum(p.numel() for p in Decoder().model().parameters()) == 124_439_808


def test_a_record_has_shares_by_operations_and_by_time():
    record = measure_share("default", 1000, SMALL)
    assert record["training_flops"] == 6 * record["parameters"] * 1000
    for name in ("float32", "bfloat16"):
        count = record[f"step_flops_{name}"]
        assert record[f"flops_share_{name}"] == count / (record["training_flops"] + count)
    assert 0 < record["adamw_time_share"] < record["time_share"] < 1
