"""Stop a run and go on with it: `python examples/resume.py`, Ctrl-C at any time, and the same command again.

The run ends with the parameters that it would have had without the stop, bit for bit. `--stop-after` plays the stop.
"""

import argparse
import os
import signal
from pathlib import Path

import tunekit as tk

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default=tk.TINY, help="a Hub id or a directory; default: the embedded model")
parser.add_argument("--data", default=tk.ORDERS, help="a file of JSON Lines; default: the embedded data")
parser.add_argument("--steps", type=int, default=60, help="optimizer steps")
parser.add_argument("--stop-after", type=int, help="send this process what Ctrl-C sends, after so many steps")
parser.add_argument("--run", default="runs/resume", help="the run directory")
options = parser.parse_args()


class Stop:
    """An observer that does what Ctrl-C does."""

    @tk.hookimpl
    def tunekit_log(self, step):
        if step == options.stop_after:
            os.kill(os.getpid(), signal.SIGINT)


pipeline = tk.Pipeline(
    model=options.model,
    data=tk.JsonLines(path=options.data),
    adapter=tk.LoRA(rank=8, dropout=0.1),
    trainer=tk.SFT(max_steps=options.steps, batch_size=8, learning_rate=3e-3, save_minutes=10),
)
begun = Path(options.run, "recipe.toml").exists()
try:
    run = pipeline.run(options.run, resume=begun, observers=[Stop()])
except KeyboardInterrupt:
    saved = sorted(path.name for path in Path(options.run, "checkpoints").iterdir())
    print(f"Stopped; {saved[-1]} is on the disk. The same command goes on from there.")
else:
    print(run)
    print(f"\nThe run was resumed {len(run.result['resumes'])} times; nothing of it was lost.")
