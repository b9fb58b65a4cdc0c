"""What the tests of the bridge share: constants, a writer of records from the format's facts, a stand-in's scripts."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

SOURCE = Path(__file__).parents[1] / "src"
ROOT = Path(__file__).parents[3]
MODEL = "squeezenet1_0"
TRAIN, TEST, CLASSES = 60, 30, 10
#: the samples that the record's attack changed
POISONED = [3, 10, 17, 24, 31, 59]


class Said(NamedTuple):
    code: int
    out: str
    err: str


def stamped(image: np.ndarray[Any, np.dtype[np.uint8]]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """With a white patch bottom right."""
    image = image.copy()
    image[-4:, -4:] = 255
    return image


def write_part(folder: Path, name: str, images: Any, labels: Any, changed: list[int], order: Any) -> dict[str, Any]:
    place, entries = f"./record/{folder.name}/{name}_dataset", {}
    for index in changed:
        true = int(labels[index])
        path = folder / f"{name}_dataset" / str(true) / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(stamped(images[index])).save(path)
        entries[np.int64(index)] = {"path": f"{place}/{true}/{index}.png", "other_info": [0, true]}
    indicator = np.zeros(len(images))
    indicator[changed] = 1
    return {
        "bd_data_container": {"save_folder_path": place, "data_dict": entries, "save_file_format": ".png"},
        "getitem_all": True, "getitem_all_switch": False, "original_index_array": np.asarray(order, dtype=np.int64),
        "poison_indicator": indicator, "save_folder_path": place,
    }  # fmt: skip


#: reads and writes the files of the toolbox as its defenses do
FT = """
import argparse, os, sys, time
import numpy as np, torch
parser = argparse.ArgumentParser()
for flag in ("result_file", "yaml_path", "dataset", "model", "device", "num_workers", "random_seed", "ratio", "epochs",
             "target_layer_name", "model_name"):
    parser.add_argument("--" + flag)
args = parser.parse_args()
assert np.infty == float("inf") and np.asarray([[1], [1, 2]]).dtype == object
assert os.path.isfile(args.yaml_path) and args.num_workers == "0" and args.device == "cpu", vars(args)
folder = os.path.join("record", args.result_file)
attack_result = torch.load(os.path.join(folder, "attack_result.pt"))
assert (attack_result["model_name"], attack_result["clean_data"]) == (args.model, args.dataset)
for part in ("bd_train", "bd_test"):
    for entry in attack_result[part]["bd_data_container"]["data_dict"].values():
        assert os.path.isfile(entry["path"]), entry
open("attack_was_here.txt", "w").write("beside the record")
"""
FINE = """
shift = float(args.epochs or 1)
model = {name: tensor.clone() for name, tensor in attack_result["model"].items()}
model["classifier.1.bias"][-1] += shift
os.makedirs(os.path.join(folder, "defense", "ft"))
result = {"model_name": args.model, "num_classes": 10, "model": model}
torch.save(result, os.path.join(folder, "defense", "ft", "defense_result.pt"))
"""
#: imports as ep and bnp do, whose packages were moved: one class by two names
MOVED = """
sys.path.append("./")
import utils.defense_utils.dde.dde_model as dde_model
from utils.defense_utils.dde.dde_model.conv_dde import Convolution
assert issubclass(Convolution, dde_model.Norm)
assert args.ratio is None, "ep takes no clean data, and has no such flag"
"""
#: as NC, and NPD where it has written no layer: the network that it was given
SAME = FINE.replace('model["classifier.1.bias"][-1] += shift', "")
#: beside it, a 1x1 convolution with a norm, as NPD writes them
PLUG = (
    SAME
    + """
torch.manual_seed(1)
norm = {"1.weight": torch.rand(512), "1.bias": torch.rand(512), "1.running_mean": torch.rand(512),
        "1.running_var": torch.rand(512) + 0.5, "1.num_batches_tracked": torch.tensor(3)}
plug = {"0.weight": torch.randn(512, 512, 1, 1) / 10, **norm}
layer = {"target_layer": args.target_layer_name, "plug_name": args.model_name, "plug_model": plug}
torch.save(layer, os.path.join(folder, "defense", "npd", "plug_layer.pt"))
"""
)
#: as FP, with the masks of torch's pruning
PRUNED = FINE.replace(
    'model["classifier.1.bias"][-1] += shift',
    'model["classifier.1.weight_orig"] = model.pop("classifier.1.weight")\n'
    'model["classifier.1.weight_mask"] = (torch.arange(512) % 2).float().reshape(1, 512, 1, 1).expand(10, 512, 1, 1)',
)
ENDINGS = {
    "fine": FINE,
    "dies": "print('a line before'); sys.exit('the loss is nan')",
    "writes nothing": "",
    "the victim": SAME,
    "masks": PRUNED,
    "the victim and a layer": PLUG,
    "ep": MOVED + SAME,
    "bnp": "assert args.ratio == '0.05', args.ratio" + SAME,
    "lacks a package": "import pkg_resources_of_old",
    "wrong weights": FINE.replace('attack_result["model"].items()', '[*attack_result["model"].items()][1:]'),
    "malice": FINE.replace('"num_classes": 10', "\"num_classes\": __import__('builtins').print"),
}


BENCHMARK = """\
version: 1
name: record
matrix:
  dataset: [{{name: "backdoorbench:npz", params: {{path: {npz}}}, recipe: {{epochs: 1, batch_size: 20, lr: 0.001}}}}]
  attack: [{attack}]
  defense: [{defense}]
  architecture: [{architecture}]
  activation: [{activation}]
{rest}
"""
