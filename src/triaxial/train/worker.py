"""Entry point of one rank that `launch` started: `python -m triaxial.train.worker SETTINGS`."""

from __future__ import annotations

import sys

from triaxial.train.config import TrainConfig
from triaxial.train.launch import report_failure, work


def main() -> None:
    """Train as one rank; a failure is reported to the launcher instead of being printed by every rank."""
    config = TrainConfig.model_validate_json(sys.argv[1])
    try:
        work(config)
    except Exception as error:
        report_failure(error, config)
        sys.exit(1)


if __name__ == "__main__":
    main()
