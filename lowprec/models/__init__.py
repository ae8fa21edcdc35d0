"""Networks for first experiments, tests and studies: usable from a config, traceable by fx and torch.export.

Ordinary torch modules with ordinary layers; they know nothing of this library, so what works on them works on a user's.
Modules bear torchvision's names where torchvision has the network, so that its checkpoints load. Every function takes
what its network is made of: `norm(channels)` and `act()`, or their names, because a TOML file cannot hold a class.
"""

from lowprec.models.attention import transformer
from lowprec.models.mobilenet import mobilenet_v2
from lowprec.models.recurrent import lstm
from lowprec.models.resnet import (
    cifar_resnet20,
    cifar_resnet32,
    cifar_resnet44,
    cifar_resnet56,
    cifar_resnet110,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
)
from lowprec.models.shufflenet import shufflenet_v2
from lowprec.models.small import mlp, small_resnet
from lowprec.models.vgg import vgg11, vgg13, vgg16, vgg19

__all__ = [
    "cifar_resnet20",
    "cifar_resnet32",
    "cifar_resnet44",
    "cifar_resnet56",
    "cifar_resnet110",
    "lstm",
    "mlp",
    "mobilenet_v2",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "shufflenet_v2",
    "small_resnet",
    "transformer",
    "vgg11",
    "vgg13",
    "vgg16",
    "vgg19",
]
