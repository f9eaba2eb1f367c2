"""torchrun, run as a module, that ends without a trace of its own where it was asked to stop.

Its processes were asked as well: they write their checkpoint and say so.
"""

import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.run import parse_args, run

if __name__ == "__main__":
    try:
        run(parse_args(sys.argv[1:]))
    except SignalException as stopped:
        raise SystemExit(128 + stopped.sigval) from None
