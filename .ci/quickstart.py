"""Hold a finished quickstart to what it promises: print the figures, exit 1 when one is missed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

run = Path(sys.argv[1])
report = json.loads((run / "report/report.json").read_text())
models = {m["name"]: m for m in report["models"]}
teacher = models.pop("teacher")
before = json.loads((run / "stages/teacher.evaluate-uncorrected/evaluation.json").read_text())
vocabulary = json.loads((run / "stages/teacher/config.json").read_text())["vocab_size"]
events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
done = next(e["time"] for e in events if (e["stage"], e["kind"]) == ("report", "finished"))
sizes = [m["params"] for m in models.values()]

promises = {
    "the run in minutes": ((done - events[0]["time"]) / 60, 9),
    "the demo teacher's loss": (before["texts"]["validation"]["loss"], 5.0),
    "the demo teacher's vocabulary": (vocabulary, 4096),
    "students' sizes apart": (max(sizes) / min(sizes) - 1, 0.03),
}
for name, model in models.items():
    lost = model["loss"]["pruned"] - teacher["loss"]["final"]
    left = model["loss"]["final"] - teacher["loss"]["final"]
    promises[f"{name}: share of the loss not won back"] = (left / lost, 0.4)
    promises[f"{name}: nats above the teacher"] = (left, 0.1)
    for artifact in model["artifacts"]:
        differences = [
            c["measured"]["max_abs"] for c in artifact["checks"] if "max_abs" in c["measured"]
        ]
        promises[f"{name}: {artifact['to']} logits apart"] = (max(differences), 1e-4)
missed = 0
for what, (value, limit) in promises.items():
    missed += not value <= limit
    print(f"{'ok' if value <= limit else 'MISSED'}: {what}: {value:.6g} (at most {limit})")
sys.exit(missed > 0)
