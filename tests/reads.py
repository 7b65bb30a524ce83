"""What the tests of pipeline.py run in other processes. No torch here: they start quicker."""

import os
import signal
import sys
import time
from collections.abc import Iterator

from miniglm.prep import pipeline
from miniglm.prep.forms import Record
from miniglm.prep.readers import Source, Tally, find_sources, records


def in_named_files(source: Source, tally: Tally) -> Iterator[tuple[str, Record]]:
    """The split is the file's name."""
    for record in records(source, tally):
        yield source.path.stem, record


def kills_itself(source: Source, tally: Tally) -> Iterator[tuple[str, Record]]:
    yield "train", "话说天下大势"
    os.kill(os.getpid(), signal.SIGKILL)


def slowly(source: Source, tally: Tally) -> Iterator[tuple[str, Record]]:
    for record in pipeline.read_records(source, tally, want=list, val=0.2):
        time.sleep(0.02)
        yield record


if __name__ == "__main__":  # FILE OUT TOKENIZER: prepares slowly, so that it can be killed
    pipeline.UNIT = 3000
    file, out, tokenizer = sys.argv[1:]
    config = pipeline.Settings(out=out, tokenizer=tokenizer, processes=2)
    pipeline.prepare(config, find_sources([file]), slowly, "sft")
