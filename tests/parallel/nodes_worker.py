"""What the test of nodes starts under two torchruns: four processes, of which each says how its buffers see them.
Argument: a folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from dsv3.parallel.data import DataParallel
from dsv3.parallel.expert import ExpertParallel


def main() -> None:
    parallel = DataParallel.start("cpu")
    layouts = [ExpertParallel.split(parallel, ep, 8).buffer.layout for ep in (2, 4)]
    said = [[layout.ranks, layout.ranks_per_node, len(layout.levels)] for layout in layouts]
    (Path(sys.argv[1]) / f"{parallel.rank}.json").write_text(json.dumps(said))
    parallel.stop()


if __name__ == "__main__":
    main()
