"""The loss of trained adapters on held-out rows, by plain transformers and PEFT alone: one judge for all arms.

    python benchmarks/final_loss.py WORK ADAPTER.safetensors ...

WORK is a directory that `benchmarks/speed.py` prepared. Prints one JSON object: the mean loss of a supervised token by
adapter, in float32, row by row, and of the adapter that all arms start from. Nothing here is shared with an arm.
"""

import json
import sys
from pathlib import Path


def main(work, *adapters):
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    work = Path(work)
    base = AutoModelForCausalLM.from_pretrained(work / "model", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, work / "adapter").eval()
    rows = json.loads((work / "rows.json").read_text())["held_out"]
    found = {"start": loss(model, rows)}
    for path in adapters:
        missing, strange = model.load_state_dict(load_file(path), strict=False)
        if strange or any("lora_" in name for name in missing):
            raise SystemExit(f"{path} is no adapter of this model")
        found[path] = loss(model, rows)
    print(json.dumps(found))


def loss(model, rows):
    """The mean cross-entropy over the supervised tokens of all rows."""
    import torch

    total, tokens = 0.0, 0
    with torch.no_grad():
        for row in rows:
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
            scores = model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
            kept = labels != -100
            total -= float(scores[kept].gather(1, labels[kept][:, None]).sum())
            tokens += int(kept.sum())
    return total / tokens


if __name__ == "__main__":
    main(*sys.argv[1:])
