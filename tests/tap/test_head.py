"""The classifier head is found in real model families, and its features are the tensor that the head reads."""

import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from debias.errors import HeadNotFoundError
from debias.tap.head import HeadTap
from debias.tap.tap import LossTap

Y = torch.tensor([0, 1])


class Wrapped(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net


def steps(root, run, path=None, n=3, compiled=False):
    """Several steps: the head is found in the first and hooked from the second on."""
    head = HeadTap(root, path, compiled=compiled)
    found = []
    for _ in range(n):
        finder = head.start()
        tap = LossTap(finder=finder)
        with tap:
            F.cross_entropy(run(), Y)
        (call,) = tap.calls
        head.resolve(call)
        found.append(call)
    head.close()
    return found


def assert_head(calls, module):
    for call in calls:
        assert call.head is module
        torch.testing.assert_close(F.linear(call.features, module.weight, module.bias).flatten(), call.logits.flatten())
        assert call.features.requires_grad


TIMM = {
    "resnet10t": 32,
    "vit_tiny_patch16_224": 32,
    "convnext_atto": 32,
    "mobilenetv3_small_050": 32,
    "mixer_s32_224": 224,
    "swin_tiny_patch4_window7_224": 224,
}


@pytest.mark.parametrize("name", TIMM)
def test_timm_families(name):
    timm = pytest.importorskip("timm")
    size = {"img_size": TIMM[name]} if name.startswith("vit") else {}
    net = timm.create_model(name, num_classes=3, **size).eval()
    x = torch.randn(2, 3, TIMM[name], TIMM[name])
    root = Wrapped(net)
    assert_head(steps(root, lambda: net(x), n=2), net.get_classifier())
    assert not net.get_classifier()._forward_pre_hooks


def test_torchvision_resnet():
    models = pytest.importorskip("torchvision.models")
    net = models.resnet18(num_classes=3).eval()
    x = torch.randn(2, 3, 32, 32)
    assert_head(steps(Wrapped(net), lambda: net(x), n=2), net.fc)


net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
X = torch.randn(2, 4)


@pytest.mark.parametrize(
    "between",
    [
        lambda z: z.float(),
        lambda z: z.view(2, 3).contiguous(),
        lambda z: z.unsqueeze(1).squeeze(1),
        lambda z: z.clone().reshape(-1, 3),
        lambda z: z.unsqueeze(2).transpose(1, 2).flatten(1),
        lambda z: torch.squeeze(input=z.unsqueeze(2), dim=2),
        lambda z: torch.reshape(input=torch.unsqueeze(input=z, dim=0), shape=(2, 3)),
        lambda z: z[:, None][:, 0],
        lambda z: torch.movedim(z.unsqueeze(2), -1, 1).ravel().unflatten(0, (2, 3)),
        lambda z: z.unsqueeze(2).mT.swapaxes(0, 1).moveaxis(1, 0).reshape_as(z),
    ],
)
def test_through_operations_that_change_no_logit(between):
    assert_head(steps(Wrapped(net), lambda: between(net(X))), net[2])


@pytest.mark.parametrize(
    "index",
    [(), (np.array([0, 1]), slice(None)), (torch.tensor([0, 1]), slice(None)), ([0, 1],), (None,), None, ...],
    ids=["nothing", "array", "tensor", "list", "new axis", "new axis alone", "ellipsis"],
)
def test_other_indices_are_no_concern_of_the_head(index):
    def run():
        assert X[index].numel() in (8, 2)
        return net(X)

    assert_head(steps(Wrapped(net), run), net[2])


def test_double_precision_logits_of_a_single_precision_head():
    calls = steps(Wrapped(net), lambda: net(X).double())
    assert all(call.head is net[2] for call in calls)


def test_one_by_one_convolution():
    conv = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 3, 1))
    x = torch.randn(2, 4, 1, 1)
    for call in steps(Wrapped(conv), lambda: conv(x).flatten(1)):
        assert call.head is conv[1]
        assert call.features.shape == (2, 6, 1, 1)


@pytest.mark.parametrize(
    "between",
    [
        lambda z: z / 0.5,
        lambda z: (z + net[2](net[1](net[0](X)))) / 2,
        lambda z: F.normalize(z),
        lambda z: z.flip(0),
        lambda z: z.flip(1).rot90(2),
    ],
)
def test_logits_that_are_no_linear_output_are_refused(between):
    with pytest.raises(HeadNotFoundError, match=r"head='dotted\.path'"):
        steps(Wrapped(net), lambda: between(net(X)))


def test_named_head():
    calls = steps(Wrapped(net), lambda: net(X) / 0.5, path="net.2")
    assert all(call.head is net[2] for call in calls)
    torch.testing.assert_close(calls[0].features, net[:2](X))


def test_wrong_name_lists_what_is_there():
    with pytest.raises(HeadNotFoundError, match=r"`head`.*'fc'.*net\.2"):
        HeadTap(Wrapped(net), "fc")


def one_step(head, run):
    head.start()
    with LossTap() as tap:
        F.cross_entropy(run(), Y)
    return tap.calls[0]


def test_features_are_those_of_this_step():
    head = HeadTap(Wrapped(net), "net.2")
    for _ in range(2):
        head.resolve(one_step(head, lambda: net(X)))
    other = one_step(head, lambda: torch.randn(2, 3, requires_grad=True))
    with pytest.raises(HeadNotFoundError, match="ran 0 times"):
        head.resolve(other)
    head.close()


def test_a_head_that_runs_twice():
    head = HeadTap(Wrapped(net), "net.2")
    call = one_step(head, lambda: net(X) + net(X))
    with pytest.raises(HeadNotFoundError, match="ran several times"):
        head.resolve(call)
    head.close()


def test_a_run_without_gradients_is_not_the_losss():
    head = HeadTap(Wrapped(net), "net.2")
    with torch.no_grad():
        net(X)

    def run():
        with torch.no_grad():
            net(2 * X)
        return net(X)

    call = one_step(head, run)
    head.resolve(call)
    torch.testing.assert_close(call.features, net[:2](X))
    head.close()


def test_the_run_of_a_named_head_that_made_the_logits():
    head = HeadTap(Wrapped(net), "net.2")
    call = one_step(head, lambda: (net(X), net(2 * X))[0])
    head.resolve(call)
    torch.testing.assert_close(call.features, net[:2](X))
    head.close()


def test_a_head_that_is_given_its_input_by_name():
    calls = steps(Wrapped(net), lambda: net[2](input=net[:2](X)))
    assert_head(calls, net[2])


def test_one_column_of_the_logits():
    binary = nn.Linear(4, 1)
    head = HeadTap(Wrapped(binary), None)
    for _ in range(3):
        with LossTap(finder=head.start()) as tap:
            F.binary_cross_entropy_with_logits(binary(X)[:, 0], Y.float())
        head.resolve(tap.calls[0])
        assert tap.calls[0].features is X
    head.close()


@pytest.mark.parametrize("n", [1, 2])
def test_a_head_that_runs_for_several_losses(n):
    """Both take the inputs that they were computed from, in every step."""
    other = nn.Linear(6, 3) if n == 2 else net[2]
    root = nn.ModuleList([net, other])
    head = HeadTap(root, None)
    for _ in range(4):
        with LossTap(finder=head.start()) as tap:
            F.cross_entropy(net(X), Y)
            F.cross_entropy(other(net[:2](2 * X)), Y)
        for call, module in zip(tap.calls, (net[2], other), strict=True):
            head.resolve(call)
            assert_head([call], module)
    assert not net[2]._forward_pre_hooks
    head.close()


def test_a_weight_that_is_used_without_its_layer():
    calls = steps(Wrapped(net), lambda: F.linear(net[:2](X), net[2].weight, net[2].bias))
    assert_head(calls, net[2])


def test_nothing_of_a_step_outlives_it():
    head = HeadTap(Wrapped(net), None)
    with LossTap(finder=head.start()) as tap:
        F.cross_entropy(net(X).double(), Y)
    head.resolve(tap.calls[0])
    seen = weakref.ref(tap.calls[0].logits)
    tap.close()
    head.forget()
    del tap
    assert seen() is None
    head.close()


def test_looking_for_the_head_leaves_parametrizations_as_they_are():
    """Spectral normalisation changes its vectors whenever `weight` is read in training."""
    body = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 6))
    root = nn.Sequential(body, nn.ReLU(), nn.Linear(6, 3))
    head = HeadTap(root, None)
    with LossTap(finder=head.start()) as tap:
        F.cross_entropy(root(X), Y)
    before = body.parametrizations.weight[0]._u.clone()
    head.resolve(tap.calls[0])
    assert torch.equal(before, body.parametrizations.weight[0]._u)
    head.close()


# Dynamo looks at .grad of the noted tensors while it traces, and warns about itself.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_models_are_never_given_a_late_hook():
    """A hook added after compilation would silently never run, so the function-mode route is kept."""
    compiled = torch.compile(net, backend="eager")
    calls = steps(Wrapped(compiled), lambda: compiled(X), compiled=True)
    assert_head(calls, net[2])
    assert not net[2]._forward_pre_hooks
