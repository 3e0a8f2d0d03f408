"""Train a model: `torchrun --nproc-per-node N -m titans_scale.train --config FILE --section.key value`, or with plain `python -m`.

Run again with the same command, it goes on from the newest checkpoint. Ctrl-C, SIGTERM and SIGUSR2 finish the step, save, and exit 0.
"""

import os
import sys
import time
from collections.abc import Sequence

from titans_scale.config import ConfigError, config_parser, parse_config

BAD_INPUT = 2
"""Exit code of everything that one sentence explains."""
LOST_RANK = 75
"""Exit code where another rank is gone or stuck: nothing is wrong with the command, and it may be run again (sysexits' EX_TEMPFAIL)."""
INTERRUPTED = 130
LET_RANK_0_SPEAK_SECONDS = 10
"""torchrun ends all ranks as soon as one has failed, so the others wait for rank 0 to have told why."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, train, and turn what a user can mend into one sentence on stderr.

    Returns:
        0: trained to the last step, or stopped by a signal and saved.   2: it could not work, and why is on stderr.   75: it would
        have, but another rank is gone or stuck; which is on stderr.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        config, _ = parse_config(config_parser(prog="python -m titans_scale.train", description=__doc__), arguments)
    except ConfigError as error:
        return _fail(str(error))
    import torch  # not before the options are known to be good: it takes seconds

    from titans_scale.parallel.context import LostRank, RunError, sentence_of
    from titans_scale.training.trainer import Trainer

    try:
        Trainer(config).run()
    except (ConfigError, RunError) as error:
        return _fail(str(error))
    except LostRank as error:
        if error.speaks:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return LOST_RANK
    except (ValueError, OSError) as error:
        return _fail(sentence_of(error), of_this_rank_alone=True)
    except torch.OutOfMemoryError as error:
        cure = "lower training.micro_batch_size, or set activation_checkpoint.mode to full"
        return _fail(f"the GPU's memory is full ({sentence_of(error)}); {cure}", of_this_rank_alone=True)
    except KeyboardInterrupt:
        print("interrupted before training began; nothing was changed", file=sys.stderr)
        return INTERRUPTED
    return 0


def _fail(sentence: str, *, of_this_rank_alone: bool = False) -> int:
    rank = int(os.environ.get("RANK", "0"))
    if rank == 0 or of_this_rank_alone:
        where = f"rank {rank}: " if rank else ""
        print(f"error: {where}{sentence}", file=sys.stderr, flush=True)
    else:
        time.sleep(LET_RANK_0_SPEAK_SECONDS)
    return BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
