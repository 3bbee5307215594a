"""Run with transformers 4.x first on the path: ``python transformers_4.py FOLDER``, for test_convert.py.

Loads what we wrote into ``FOLDER/ours*`` and writes checkpoints of its own; what it saw goes to ``FOLDER/seen.pt``.
"""

import sys
from pathlib import Path

import torch
import transformers

folder = Path(sys.argv[1])
assert transformers.__version__.startswith("4."), transformers.__version__
inputs = torch.load(folder / "inputs.pt")
seen = {}
with torch.no_grad():
    for name in ("ours-4", "ours-5"):
        model, report = transformers.ViTMAEForPreTraining.from_pretrained(folder / name, output_loading_info=True)
        seen[name] = {
            "missing": report["missing_keys"],
            "unexpected": report["unexpected_keys"],
            "loss": model(**inputs).loss,
            "state": model.state_dict(),
        }
    model, report = transformers.ViTMAEModel.from_pretrained(folder / "ours-encoder", output_loading_info=True)
    seen["ours-encoder"] = {"missing": report["missing_keys"], "state": model.state_dict()}
    seen["pixels"] = transformers.ViTImageProcessor.from_pretrained(folder / "ours-4").image_mean

    config = transformers.ViTMAEConfig.from_pretrained(folder / "ours-4")
    for name, build in (("full", transformers.ViTMAEForPreTraining), ("encoder", transformers.ViTMAEModel)):
        model = build(config)
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
        model.save_pretrained(folder / name)
        model.save_pretrained(folder / f"{name}-bin", safe_serialization=False)
        seen[name] = {"state": model.state_dict(), "output": model(**inputs)[0]}
torch.save(seen, folder / "seen.pt")
