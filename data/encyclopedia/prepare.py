"""Entries of an encyclopedia -> data/encyclopedia: title, summary and sections as one text each.

    python data/encyclopedia/prepare.py --input=baike.jsonl

A record is {"title", "summary", "sections": [{"title", "content"}]}; each of them may be missing.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from configurator import command, configure
from miniglm.prep import pipeline
from miniglm.prep.forms import BadRecord, Record, interpret


@dataclass
class Settings(pipeline.Settings):
    out: str = "data/encyclopedia"  # directory to write


def entry(value: object) -> Record:
    """A line each: title, summary, and of the sections those that have a content."""
    if not isinstance(value, dict):
        raise BadRecord("wrong type", f"{type(value).__name__}, not an object")
    sections = value.get("sections") or []
    if not isinstance(sections, list) or not all(isinstance(one, dict) for one in sections):
        raise BadRecord("wrong type", "sections are no list of objects")
    parts = [value.get("summary")]
    for section in sections:
        if section.get("content"):
            parts += [section.get("title"), section["content"]]
    parts = [part for part in parts if part]
    if not parts:
        raise BadRecord("no summary and no section", value.get("title", ""))
    parts = [value.get("title") or "", *parts]
    if not all(isinstance(part, str) for part in parts):
        raise BadRecord("wrong type", "a title, summary or content is no text")
    return interpret("\n".join(filter(None, map(str.strip, parts))), {})


def main(argv: list[str]) -> None:
    config = configure(Settings, argv)
    pipeline.refuse_fields(config)
    pipeline.prepare_texts(config, entry)


if __name__ == "__main__":
    command(main)
