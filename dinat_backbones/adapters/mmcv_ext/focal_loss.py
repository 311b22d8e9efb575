"""Focal losses with the arguments of mmcv's compiled functions.

`target` (N,) holds the class of each row. `weight` is empty or has one factor per class, that of the row's target.
"""

import torch
from torch import Tensor

OPERATORS = (
    "sigmoid_focal_loss_forward",
    "sigmoid_focal_loss_backward",
    "softmax_focal_loss_forward",
    "softmax_focal_loss_backward",
)
LEAST = torch.finfo(torch.float32).tiny  # FLT_MIN, to which mmcv clamps before the logarithm


def _class_weight(weight: Tensor, target: Tensor) -> Tensor:
    # a target outside of the classes is background; compiled mmcv reads past the weights there
    inside = (target >= 0) & (target < len(weight))
    return torch.where(inside, weight[target.clamp(0, len(weight) - 1)], weight.new_ones(()))


def _sigmoid_terms(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    p = input.sigmoid()
    positive = target[:, None] == torch.arange(input.shape[1], device=input.device)
    return p, 1 - p, positive


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """The loss of every logit of `input` (N, classes) into `output`."""
    p, q, positive = _sigmoid_terms(input, target)
    loss = torch.where(
        positive,
        -alpha * q.pow(gamma) * p.clamp(min=LEAST).log(),
        -(1 - alpha) * p.pow(gamma) * q.clamp(min=LEAST).log(),
    )
    output.copy_(loss * _class_weight(weight, target)[:, None] if weight.numel() else loss)


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """The derivative of the loss with respect to its logit into `grad_input` (N, classes)."""
    p, q, positive = _sigmoid_terms(input, target)
    grad = torch.where(
        positive,
        -alpha * q.pow(gamma) * (q - gamma * p * p.clamp(min=LEAST).log()),
        -(1 - alpha) * p.pow(gamma) * (gamma * q * q.clamp(min=LEAST).log() - p),
    )
    grad_input.copy_(grad * _class_weight(weight, target)[:, None] if weight.numel() else grad)


def softmax_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """The loss of every row of `input` (N, classes), which holds probabilities, into `output` (N,)."""
    valid = target >= 0
    p = input.gather(1, target.clamp(min=0)[:, None])[:, 0]
    loss = torch.where(valid, -alpha * (1 - p).pow(gamma) * p.clamp(min=LEAST).log(), p.new_zeros(()))
    output.copy_(loss * _class_weight(weight, target) if weight.numel() else loss)


def softmax_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, buff: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Gradients with respect to logits into `grad_input` (N, classes); the factor of each row into `buff` (N,)."""
    valid = target >= 0
    p = input.gather(1, target.clamp(min=0)[:, None])[:, 0]
    factor = alpha * (-(1 - p).pow(gamma) + gamma * (1 - p).pow(gamma - 1) * p * p.clamp(min=LEAST).log())
    factor = torch.where(valid, factor, p.new_zeros(()))
    buff.copy_(factor * _class_weight(weight, target) if weight.numel() else factor)
    positive = target[:, None] == torch.arange(input.shape[1], device=input.device)
    grad_input.copy_(
        torch.where(valid[:, None], buff[:, None] * (positive.to(input.dtype) - input), input.new_zeros(()))
    )
