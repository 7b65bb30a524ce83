"""Entries of an encyclopedia -> data/encyclopedia: one text per entry.

    python data/encyclopedia/prepare.py --input=baike.jsonl

A record is {"title", "summary", "sections": [{"title", "content"}]}; each of them may be missing.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from configurator import command, configure
from miniglm.prep import pipeline
from miniglm.prep.forms import BadRecord, fields_of, interpret


@dataclass
class Settings(pipeline.Settings):
    out: str = "data/encyclopedia"  # directory to write


def entry(value: object) -> str:
    """A line each: the title, the summary, and the sections that have a content."""
    record = fields_of(value)
    sections = record.get("sections") or []
    if not isinstance(sections, list):
        raise BadRecord("wrong type", "sections are no list")
    parts = [record.get("summary")]
    for section in map(fields_of, sections):
        if section.get("content"):
            parts += [section.get("title"), section["content"]]
    if not any(parts):
        raise BadRecord("no summary and no section", record.get("title", ""))
    parts = [part for part in [record.get("title"), *parts] if part]
    if not all(isinstance(part, str) for part in parts):
        raise BadRecord("wrong type", "a title, summary or content is no text")
    return interpret("\n".join(map(str.strip, parts)), {})


def main(argv: list[str]) -> None:
    pipeline.prepare_texts(configure(Settings, argv), entry)


if __name__ == "__main__":
    command(main)
