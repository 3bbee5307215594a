"""Run with transformers 4.x first on the path: ``python transformers_4_classifiers.py FOLDER``.

For test_classifier_checkpoints.py. Loads the classifiers in ``FOLDER/ours-*`` and writes each again to
``FOLDER/theirs-*``; what it saw goes to ``FOLDER/seen.pt``.
"""

import sys
from pathlib import Path

import torch
import transformers

folder = Path(sys.argv[1])
assert transformers.__version__.startswith("4."), transformers.__version__
images = torch.load(folder / "images.pt")
seen = {}
for ours in sorted(folder.glob("ours-*")):
    model, report = transformers.AutoModelForImageClassification.from_pretrained(ours, output_loading_info=True)
    with torch.no_grad():
        logits = model.eval()(images).logits
    model.save_pretrained(folder / ours.name.replace("ours", "theirs"))
    seen[ours.name] = {
        "class": type(model).__name__,
        "missing": report["missing_keys"],
        "unexpected": report["unexpected_keys"],
        "logits": logits,
        "names": model.config.id2label,
        "pixels": transformers.AutoImageProcessor.from_pretrained(ours).image_mean,
    }
torch.save(seen, folder / "seen.pt")
