"""The activation functions of Table 7 of the NONE paper, three more, and initial weights calibrated to them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from pydantic import Field
from torch import nn

from backdoor_bench_none.models.architecture import Activation

#: Standard deviation of calibrated pre-activations: large enough for tanhshrink, which loses values below 1.
PRE_ACTIVATION_SPREAD = 3.0


class ReLU(Activation):
    """max(x, 0): the activation of all networks of the paper outside Table 7."""

    paper = "NONE, section 5.1"

    def build(self) -> nn.Module:
        """A new ReLU, not in place."""
        return nn.ReLU()


class LeakyReLU(Activation):
    """x for x >= 0, `negative_slope` times x below; slope 0.01 in the released code."""

    paper = "NONE, Table 7"

    negative_slope: float = Field(0.01, ge=0, le=1, description="slope for negative inputs")

    def build(self) -> nn.Module:
        """A new LeakyReLU, not in place."""
        return nn.LeakyReLU(self.negative_slope)


class ELU(Activation):
    """x for x >= 0, `alpha` times (exp(x) - 1) below."""

    paper = "NONE, Table 7"

    alpha: float = Field(1.0, gt=0, le=10, description="minus the limit for inputs towards minus infinity")

    def build(self) -> nn.Module:
        """A new ELU, not in place."""
        return nn.ELU(self.alpha)


class PReLU(Activation):
    """Leaky ReLU whose slope is trained, one slope per place in the network.

    The released code puts one instance into the whole network, so all its layers share a single slope.
    """

    paper = "released code of NONE, resnet_more_activation"

    init: float = Field(0.25, ge=0, le=1, description="slope for negative inputs before training")

    def build(self) -> nn.Module:
        """A new PReLU with a slope of its own."""
        return nn.PReLU(init=self.init)


class Tanhshrink(Activation):
    """x - tanh(x), which is about x**3 / 3 near 0: small inputs are lost unless something normalises them."""

    paper = "NONE, Table 7"

    def build(self) -> nn.Module:
        """A new Tanhshrink."""
        return nn.Tanhshrink()


class Softplus(Activation):
    """log(1 + exp(beta x)) / beta, and x itself where beta x exceeds `threshold`."""

    paper = "NONE, Table 7"

    beta: float = Field(1.0, gt=0, le=100, description="sharpness of the bend at 0")
    threshold: float = Field(20.0, gt=0, le=100, description="value of beta x from which the function is the identity")

    def build(self) -> nn.Module:
        """A new Softplus."""
        return nn.Softplus(beta=self.beta, threshold=self.threshold)


class GELU(Activation):
    """x times the standard normal distribution function of x."""

    paper = "arXiv:1606.08415"

    def build(self) -> nn.Module:
        """A new exact GELU."""
        return nn.GELU()


class SiLU(Activation):
    """x times the logistic function of x."""

    paper = "arXiv:1702.03118"

    def build(self) -> nn.Module:
        """A new SiLU, not in place."""
        return nn.SiLU()


def draw_calibrated_weights(
    network: nn.Module, make_activation: Callable[[], nn.Module], head_spread: float = 0.1, head_bias: float = 0.0
) -> None:
    """Normal weights for a chain of convolutions and linear layers without normalisation, zero biases.

    For independent inputs of variance 1 every layer's pre-activations have standard deviation 3, the last layer's
    `head_spread`. All weights but the first layer's sum to zero per output: otherwise the mean of a positive activation
    such as softplus grows from layer to layer until all inputs look alike, and the network stays at chance. Deep
    tanhshrink networks keep the spread for images whose neighbouring pixels agree, not for white noise.
    """
    layers = [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    gain = 1 / measure_spread(make_activation, PRE_ACTIVATION_SPREAD)
    for layer in layers:
        first, last = layer is layers[0], layer is layers[-1]
        weight = layer.weight.detach()
        fan_in = weight[0].numel()
        spread = head_spread if last else PRE_ACTIVATION_SPREAD
        if first or fan_in == 1:
            weight.normal_(0.0, spread / fan_in**0.5)
        else:
            weight.normal_(0.0, spread * gain / (fan_in - 1) ** 0.5)
            weight -= weight.mean(dim=tuple(range(1, weight.ndim)), keepdim=True)
        if layer.bias is not None:
            nn.init.constant_(layer.bias, head_bias if last else 0.0)


def measure_spread(make_activation: Callable[[], nn.Module], spread: float) -> float:
    """Standard deviation of the activation of N(0, spread ** 2), by quadrature."""
    with torch.device("cpu"), torch.no_grad():
        normal = torch.linspace(-6, 6, 4001)
        density = torch.softmax(-normal.square() / 2, 0)
        outputs = make_activation()(spread * normal)
        mean = (density * outputs).sum()
        return float((density * (outputs - mean).square()).sum().sqrt())
