"""What happens between the passes of a step of compact training: SAM, late gradients, masks that move."""

import pytest
import torch
from masked_networks import difference, enforced, network

import lightning_sparse_cl as scl
from lightning_sparse_cl.optim.sam import perturbed


def test_a_weight_read_between_the_passes_still_gets_its_gradient():
    net, masks = network("cnn")
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    found = scl.accelerate(net, masks, [optimizer], measure=False)
    x = torch.randn(8, 3, 16, 16)
    (net(x) ** 2).mean().backward()
    expected = [p.grad.clone() for p in net.parameters()]
    optimizer.zero_grad()
    found.train_compact()
    loss = (net(x) ** 2).mean()
    penalty = sum((p**2).sum() for p in net.parameters())  # as EWC does
    assert found.compact is None
    (loss + 0 * penalty).backward()
    assert all(torch.allclose(p.grad, e, atol=1e-7) for p, e in zip(net.parameters(), expected))


@pytest.mark.parametrize("end", ["step", "read", "densify"])
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("zero", [False, True])
def test_weights_given_up_inside_sam_are_put_back(zero, again, end):
    net, masks = network("cnn")
    sgd = torch.optim.SGD(net.parameters(), 0.0)
    found = scl.accelerate(net, masks, [sgd], measure=False)
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    found.train_compact()
    x = torch.randn(8, 3, 16, 16)
    net(x).square().mean().backward()
    with perturbed([p for p in sgd.param_groups[0]["params"] if p.grad is not None], 1.0):
        if zero:  # as SAM does
            sgd.zero_grad()
        assert sum(p.norm() for p in net.parameters())  # every weight is read
        assert found.compact is None
        if again:
            found.train_compact()
    if end == "step":
        sgd.step()
    elif end == "densify":
        scl.densify(net)
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters() if n in masks)


@pytest.mark.parametrize("again", [False, True])
def test_weights_pruned_inside_sam_stay_zero(again):
    net, masks = network("cnn")
    sgd = torch.optim.SGD(net.parameters(), 0.0)
    own, name = enforced(net, masks, sgd), list(masks)[1]
    found = scl.accelerate(net, own, [sgd], measure=False)
    before = net.get_parameter(name).detach().clone()
    fewer = masks[name] & (torch.rand(masks[name].shape) < 0.5)
    found.train_compact()
    net(torch.randn(8, 3, 16, 16)).square().mean().backward()
    with perturbed([p for p in sgd.param_groups[0]["params"] if p.grad is not None], 1.0):
        own.set_alive(name, fewer)
        if again:
            found.train_compact()
    sgd.step()
    assert torch.equal(net.get_parameter(name), before * fewer)


def test_weights_that_sam_has_put_back_are_those_of_the_next_pass():
    net, masks = network("cnn")
    sgd = torch.optim.SGD(net.parameters(), 0.0)
    found = scl.accelerate(net, masks, [sgd], measure=False)
    x, outputs = torch.randn(8, 3, 16, 16), []
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    for _ in range(2):  # batches whose gradients are summed
        found.train_compact()
        outputs.append(net(x))
        outputs[-1].square().mean().backward()
        with perturbed([p for p in sgd.param_groups[0]["params"] if p.grad is not None], 1.0):
            assert sum(p.norm() for p in net.parameters())
            found.train_compact()
            net(x).square().mean().backward()
    sgd.step()
    assert difference(outputs[1], outputs[0]) < 1e-5
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters() if n in masks)


def run_late(net, sgd, found, compact):
    """Gradients of passes that began before the weights were given up, or taken."""
    begin = found.train_compact if compact else lambda: None
    torch.manual_seed(3)
    for _ in range(3):
        sgd.zero_grad()
        losses = []
        for i in range(4):
            if i != 1:  # the second pass begins with whole weights
                begin()
            losses.append(net(torch.randn(8, 3, 16, 16)).square().mean())
            if i % 2 == 0:
                losses.pop(0).backward()  # there are gradients
            assert sum(p.norm() for p in net.parameters())  # every weight is read
        begin()
        for loss in losses:
            loss.backward()
        assert sum(p.norm() for p in net.parameters())
        begin()
        sgd.step()
    return [(p.detach().clone(), sgd.state[p]["momentum_buffer"]) for p in net.parameters()]


def test_gradients_find_the_weights_wherever_these_are():
    results = []
    for compact in (False, True):
        net, masks = network("cnn")
        sgd = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)
        found = scl.accelerate(net, masks, [sgd], measure=False)
        results.append(run_late(net, sgd, found, compact))
    for whole, compact in zip(*results):
        assert all(map(torch.equal, whole, compact))


@pytest.mark.parametrize("between", ["layout", "frozen", "again"])
def test_late_gradients_find_weights_that_have_changed(between):
    results = []
    for compact in (False, True):
        net, masks = network("cnn")
        sgd = torch.optim.SGD(net.parameters(), 0.1)
        found = scl.accelerate(net, masks, [sgd], measure=False)
        if compact:
            found.train_compact()
        loss = net(torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(3))).square().mean()
        if between == "layout" and compact:
            net.to(memory_format=torch.channels_last)
        elif between == "frozen":
            net[0].weight.requires_grad_(False)
        else:
            scl.densify(net)
            found = scl.accelerate(net, masks, [sgd], measure=False)
            if compact:
                found.train_compact()
        loss.backward()
        sgd.step()
        results.append([p.detach() for p in net.parameters()])
    assert all(map(torch.equal, *results))


def test_masks_that_change_between_the_passes_mask_late_gradients():
    net, masks = network("cnn")
    sgd = torch.optim.SGD(net.parameters(), 0.01)
    own, name = enforced(net, masks, sgd), list(masks)[1]
    found = scl.accelerate(net, own, [sgd], measure=False)
    found.train_compact()
    loss = net(torch.randn(8, 3, 16, 16)).square().mean()
    fewer = masks[name] & (torch.rand(masks[name].shape) < 0.5)
    own.set_alive(name, fewer)
    loss.backward()
    grad = net.get_parameter(name).grad
    assert grad[fewer].any() and not grad[~fewer].any()
