"""``python -m bilect`` of a rank that kills itself once a stage (``KILL_IN``) has a checkpoint at step ``KILL_AT``."""

import os
import signal

from bilect.cli.commands import main
from bilect.pipeline.directory import scratch_name
from bilect.training.trainer import Watch

plain = Watch.on_save


def on_save(self, args, state, control, **kwargs):
    plain(self, args, state, control, **kwargs)
    if f"/{scratch_name(os.environ['KILL_IN'])}/" in args.output_dir and state.global_step == int(
        os.environ["KILL_AT"]
    ):
        os.kill(os.getpid(), signal.SIGKILL)


Watch.on_save = on_save
main()
