"""Where a run's time went, over all its attempts. In: seconds by kind and what earlier attempts left; out: metrics.

    step        training steps that count          checkpoint  the training thread held by one
    data_wait   waiting for batches                validation  with the audio and pictures for listening
    restart     from an attempt's last sign of life to the end of the next one's first step
    redone      what a dead attempt had done since the checkpoint that the next one started from

Signs of life are log lines: what an attempt did after its last one counts as restart.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

WORK = ("step", "data_wait", "checkpoint", "validation")
KINDS = (*WORK, "restart", "redone")


class Goodput:
    """Seconds by kind since the run first started.

    `rows` are those of metrics.jsonl up to the step the run goes on from, `last` is what `note` gave in the attempt
    before, None in the first one; `now` is the time of day in seconds.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]], last: str | None, now: float) -> None:
        self.seconds = dict.fromkeys(KINDS, 0.0)
        self.sign_of_life = now
        for row in rows:
            if "goodput/step_seconds" in row:
                self.seconds |= {kind: row[f"goodput/{kind}_seconds"] for kind in WORK}
        if last is None:
            return
        before = json.loads(last)
        self.sign_of_life = before["time"]
        lost = sum(before["seconds"][kind] - self.seconds[kind] for kind in WORK)
        self.seconds["restart"] = before["seconds"]["restart"]
        self.seconds["redone"] = before["seconds"]["redone"] + lost

    def started(self, now: float) -> None:
        """The attempt's first step is done."""
        self.seconds["restart"] += now - self.sign_of_life

    def add(self, seconds: Mapping[str, float]) -> None:
        """Count work."""
        for kind, value in seconds.items():
            self.seconds[kind] += value

    def read(self) -> dict[str, float]:
        """Metrics: seconds by kind, and the share of `step` in all."""
        total = sum(self.seconds.values())
        metrics = {
            f"goodput/{kind}_seconds": round(value, 3) for kind, value in self.seconds.items()
        }
        return metrics | {"goodput/share": self.seconds["step"] / total if total else 0.0}

    def note(self, now: float) -> str:
        """What the next attempt has to know, should this one die."""
        return json.dumps({"time": now, "seconds": self.seconds})
