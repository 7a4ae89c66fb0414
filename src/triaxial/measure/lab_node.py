"""The launcher of one node of the lab: `python -m triaxial.measure.lab_node NODE ARGUMENTS...`, NODE in JSON."""

from __future__ import annotations

import sys

from triaxial import BadInput, NoAnswer
from triaxial.measure.ranks import Node, run_ranks


def main() -> None:
    """Run this node's ranks; end with the exit code of the rank that failed, after its sentence."""
    try:
        run_ranks(Node.model_validate_json(sys.argv[1]), sys.argv[2:])
    except (BadInput, NoAnswer) as error:
        print(f"triaxial: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, BadInput) else 1)


if __name__ == "__main__":
    main()
