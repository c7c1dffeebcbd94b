"""torchrun that does not outlive who started it: python -m shardplan.executor.torchrun PARENT_PID TORCHRUN_ARGUMENTS..."""

from __future__ import annotations

import sys

from shardplan.executor.lifetime import die_with_parent

if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]))  # before torch is imported, which takes seconds
    from torch.distributed.run import main

    main(sys.argv[2:])
