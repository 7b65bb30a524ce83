"""What the tests of pipeline.py run in other processes. No torch here: they start quicker."""

import os
import signal
import sys
import time

from miniglm.prep import pipeline
from miniglm.prep.readers import Source, Tally, records


def in_named_files(config: pipeline.Settings, source: Source, tally: Tally) -> pipeline.Reads:
    """The split is the file's name."""
    for record in records(source, tally):
        yield source.path.stem, record


def kills_itself(config: pipeline.Settings, source: Source, tally: Tally) -> pipeline.Reads:
    yield "train", "话说天下大势"
    os.kill(os.getpid(), signal.SIGKILL)


def slowly(config: pipeline.Settings, source: Source, tally: Tally) -> pipeline.Reads:
    for record in pipeline.read_records(config, source, tally, want=list):
        time.sleep(0.02)
        yield record


if __name__ == "__main__":  # FILE OUT TOKENIZER: prepares slowly, so that it can be killed
    pipeline.UNIT = 3000
    file, out, tokenizer = sys.argv[1:]
    config = pipeline.Settings([file], out, tokenizer, val=0.2, processes=2)
    pipeline.prepare(config, slowly, "sft")
