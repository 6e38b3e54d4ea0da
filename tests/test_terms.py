"""Gradients and shares of loss terms, beside gradients written out."""

import pytest
import torch

from sae_lib.training import terms


def made():
    a = torch.tensor([[1.0, -2.0], [3.0, 0.5]], requires_grad=True)
    b = torch.tensor([0.5, 2.0], requires_grad=True)
    return {"reconstruction": a.square().sum() + b.sum(), "prefixes": 2 * b.square().sum(),
            "rows": 3 * a[0].sum(), "nothing": 0 * b.sum()}, [a, b]


@pytest.mark.parametrize("left", [("reconstruction",), ("reconstruction", "prefixes"),
                                  ("reconstruction", "prefixes", "rows"), ("reconstruction", "rows", "nothing")])
def test_a_logged_step_trains_as_any_other(left):
    gradients = []
    for step in (terms.backward, terms.backward_with_shares):
        losses, parameters = made()
        losses = {name: losses[name] for name in left}
        step(losses, parameters, frozenset({"prefixes"})) if step is terms.backward_with_shares else step(losses)
        gradients.append([torch.zeros_like(p) if p.grad is None else p.grad for p in parameters])
    assert all(map(torch.equal, *gradients))


def test_shares_are_of_the_weights_that_a_term_acts_on():
    losses, parameters = made()
    shares = terms.backward_with_shares(losses, parameters, frozenset({"prefixes"}))
    row = torch.tensor([1.0, -2.0])  # the only one that "rows" acts on; its reconstruction gradient is 2 a
    assert shares == {"rows": pytest.approx(3 * 2 ** 0.5 / float((2 * row).norm())), "nothing": 0.0}
    assert terms.backward_with_shares({"reconstruction": made()[0]["reconstruction"]}, []) == {}
