"""Run EDM's (and GDD's) own networks and store what they return: `make_edm_reference.py EDM_CHECKOUT GDD_CHECKOUT`.

Run from the repository's root with `PYTHONPATH=.:tests`. The code in the two checkouts is under a non-commercial
licence; it is run here, and neither copied nor needed by anything else.
"""

import json
import subprocess
import sys
from pathlib import Path

import torch
from edm_reference import FULL, SIZE, SMALL, digest, fill, inputs
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent


def edm_outputs() -> None:
    from training.networks import EDMPrecond

    outputs, digests = {}, {}
    for name, config in SMALL.items():
        net = fill(EDMPrecond(SIZE, 3, **config))
        call = inputs(config)
        captured = []
        net.model.register_forward_hook(lambda module, args, output, captured=captured: captured.append(output))
        with torch.no_grad():
            outputs[f"{name}.D"] = net(**call)
        outputs[f"{name}.F"] = captured[0]
        digests[name] = digest(net)
    for name, (resolution, config) in FULL.items():
        digests[name] = digest(EDMPrecond(resolution, 3, **config))
    save_file({name: tensor.contiguous() for name, tensor in outputs.items()}, HERE / "edm_outputs.safetensors")
    (HERE / "edm_state_dicts.json").write_text(json.dumps(digests, indent=2) + "\n")


def gdd_outputs() -> None:
    from training.networks import GDDPrecond

    path = HERE / "edm_outputs.safetensors"
    outputs = load_file(path)
    for name in ("ncsnpp_cond", "adm"):
        net = fill(GDDPrecond(SIZE, 3, **SMALL[name]))
        with torch.no_grad():
            outputs[f"{name}.GDD"] = net(**inputs(SMALL[name]))
    save_file(outputs, path)


if __name__ == "__main__":
    which, checkout = sys.argv[1:3]
    if which in ("edm", "gdd"):
        sys.path.insert(0, checkout)
        torch.set_num_threads(1)
        (edm_outputs if which == "edm" else gdd_outputs)()
    else:  # Both checkouts name their package `training`: one process each.
        for name, path in (("edm", sys.argv[1]), ("gdd", sys.argv[2])):
            subprocess.run([sys.executable, __file__, name, path], check=True)
