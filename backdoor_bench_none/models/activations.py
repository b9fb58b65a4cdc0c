"""The activation functions of Table 7 of the NONE paper, and three more."""

from __future__ import annotations

import torch.nn as nn
from pydantic import Field

from backdoor_bench_none.contracts.architecture import Activation


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
    """Leaky ReLU whose slope is trained, one slope per layer of the network.

    The released code uses one instance in the whole network, so that all its layers share a single slope.
    """

    paper = "released code of NONE, resnet_more_activation"

    init: float = Field(0.25, ge=0, le=1, description="slope for negative inputs before training")

    def build(self) -> nn.Module:
        """A new PReLU with its own slope."""
        return nn.PReLU(init=self.init)


class Tanhshrink(Activation):
    """x - tanh(x), which is about x**3 / 3 near 0: small inputs vanish unless something normalises them."""

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
