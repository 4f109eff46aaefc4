"""The networks: a convolutional trunk without batch normalization, shared by all tasks, and one linear head per task."""

from collections import OrderedDict

import torch
from torch import nn


class MultiHead(nn.Module):
    """A trunk and one linear head per task, all heads made up front. ``model(x, task)`` is that task's logits."""

    def __init__(self, trunk: nn.Module, features: int, classes_per_task: list[int]):
        super().__init__()
        self.trunk = trunk
        self.heads = nn.ModuleList(nn.Linear(features, classes) for classes in classes_per_task)

    def forward(self, x: torch.Tensor, task: int) -> torch.Tensor:
        return self.heads[task](self.trunk(x))


def build(image_shape: tuple[int, int, int], classes_per_task: list[int], dropout: tuple[float, float]) -> MultiHead:
    """The paper's network for images of 32 x 32 pixels and above, a smaller one of its kind below.

    Args:
        image_shape: channels, height, width of square images of at least 8 x 8.
        classes_per_task: the outputs of each head.
        dropout: (d1, d2) of the paper: d1 after the first convolutions, d2 after the last one and the linear layers.
    """
    channels, size, _ = image_shape
    d1, d2 = dropout
    if size >= 32:
        convolutions = [(64, size // 8, d1), (128, size // 10, d1), (256, 2, d2)]
        linears = [2048, 2048]
    else:
        convolutions = [(16, 3, d1), (32, 2, d2)]
        linears = [256]
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for number, (outputs, kernel, rate) in enumerate(convolutions, 1):
        layers[f"conv{number}"] = nn.Conv2d(channels, outputs, kernel)
        layers[f"conv{number}_relu"] = nn.ReLU()
        layers[f"conv{number}_dropout"] = nn.Dropout(rate)
        layers[f"conv{number}_pool"] = nn.MaxPool2d(2)
        channels, size = outputs, (size - kernel + 1) // 2
    layers["flatten"] = nn.Flatten()
    features = channels * size * size
    for number, outputs in enumerate(linears, 1):
        layers[f"linear{number}"] = nn.Linear(features, outputs)
        layers[f"linear{number}_relu"] = nn.ReLU()
        layers[f"linear{number}_dropout"] = nn.Dropout(d2)
        features = outputs
    return MultiHead(nn.Sequential(layers), features, classes_per_task)
