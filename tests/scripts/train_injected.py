"""Trains a tiny BERT with an injected ω by a plain Trainer; run in two processes by test_injected_training.py."""

import hashlib
import json
import sys
from pathlib import Path

from families import connections, family_model
from test_injected_training import trainer

from admin_hf import AdminProfilingCallback, inject
from training.processes import end_process_group


def main(folder: str) -> None:
    model = inject(family_model("bert"))
    run = trainer(model, folder, [AdminProfilingCallback(verbose=False)], max_steps=3, save_strategy="no")
    run.train()
    weights = b"".join(value.numpy().tobytes() for _, value in sorted(model.state_dict().items()))
    report = {
        "omega": [float(each.omega.detach()[0]) for each in connections(model)],
        "is_profiled": model.injection.is_profiled,
        "weights": hashlib.sha256(weights).hexdigest(),
    }
    Path(folder, f"rank{run.args.process_index}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
    end_process_group()
