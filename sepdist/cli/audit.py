"""Check that a run consumed every position of its data exactly once.

    sepdist audit run_dir=runs/a
    sepdist audit run_dir=s3://bucket/runs/a json=true

It reads the newest committed checkpoint and the ledger that leads to it, and compares the positions
that the workers fetched with those that the steps should have consumed. Exit status 0: none lost,
none repeated; 1: some were, or the ledger is damaged; 2: there is nothing to check.
"""

import json
import sys
from dataclasses import asdict

from sepdist.cli.compose import read_config
from sepdist.config import AuditConfig
from sepdist.console import printable


def main() -> int:
    """Print the result; returns the exit status."""
    try:
        cfg = read_config("audit", AuditConfig, __doc__)
        from sepdist.training.audit import LedgerError, audit, to_text
    except ValueError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 2
    try:
        result = audit(cfg.run_dir)
    except (OSError, ValueError) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 1 if isinstance(error, LedgerError) else 2
    print(json.dumps(asdict(result), allow_nan=False) if cfg.json else to_text(result))
    return 0 if result.sound else 1
