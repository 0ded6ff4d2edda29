"""Parallel text from files: JSON lines, tab-separated text, or two plain files side by side."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from raylp.errors import UserError


@dataclass(frozen=True)
class Pair:
    """A sentence and its reference. `id` is unique in its file; a part before `:` names the document."""

    id: str
    source: str
    target: str
    pair: str

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


def read_pairs(path: str | Path | list[str], pair: str) -> list[Pair]:
    """Reads `.jsonl` ({"id", "source", "target"}), `.tsv` (source, target), or a list of two plain text files.

    Raises:
        UserError: a file is missing, empty, not UTF-8, or a line has no source or target; with its name and line.
    """
    if isinstance(path, list):
        pairs = list(_side_by_side(path, pair))
        name = " and ".join(path)
    else:
        file = Path(path)
        name = str(file)
        read = {".jsonl": _jsonl, ".tsv": _tsv}.get(file.suffix)
        if read is None:
            raise UserError(f"data file {file}: use .jsonl, .tsv, or a list of two text files [source, target]")
        pairs = list(read(file, pair))
    return _unique(pairs, name)


def _unique(pairs: list[Pair], name: str) -> list[Pair]:
    if not pairs:
        raise UserError(f"data file {name} is empty")
    seen: set[str] = set()
    for example in pairs:
        if example.id in seen:
            raise UserError(f"data file {name}: the id {example.id!r} stands twice")
        seen.add(example.id)
    return pairs


def read_sources(path: str | Path, pair: str) -> list[Pair]:
    """Reads source text alone, with empty targets: `.txt`, a sentence a line, or `.jsonl` ({"id", "source"}).

    Raises:
        UserError: the file is missing, empty, not UTF-8, or has an id twice; with its name and line.
    """
    file = Path(path)
    if file.suffix not in (".txt", ".jsonl"):
        raise UserError(f"data file {file}: source text alone is .txt or .jsonl")
    found = []
    for number, line in _lines(file):
        name, text = str(number), line.strip()
        if file.suffix == ".jsonl" and text:
            try:
                row = json.loads(line)
                name, text = str(row.get("id", number)), row["source"].strip()
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise UserError(f"data file {file}, line {number}: no text under 'source' ({error})") from error
        if text:
            _check_one_line(file, number, "source", text)
            found.append(Pair(name, text, "", pair))
    return _unique(found, str(file))


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    if not path.is_file():
        raise UserError(f"data file {path} is not there")
    with path.open("rb") as stream:
        for number, raw in enumerate(stream, 1):
            try:
                line = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"data file {path}, line {number}: not UTF-8 ({error.reason}); convert it first"
                ) from error
            yield number, line.rstrip("\r\n").removeprefix("\ufeff")


def _checked(path: Path, number: int, example: Pair) -> Pair:
    for side in ("source", "target"):
        text = getattr(example, side)
        if not text.strip():
            raise UserError(f"data file {path}, line {number}: no {side}; remove the line or fill it")
        _check_one_line(path, number, side, text)
    return example


def _check_one_line(path: Path, number: int, side: str, text: str) -> None:
    if "\n" in text or "\r" in text:
        raise UserError(f"data file {path}, line {number}: a line break inside the {side}; one sentence is one line")


def _jsonl(path: Path, pair: str) -> Iterator[Pair]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"data file {path}, line {number}: not JSON ({error})") from error
        missing = [
            key for key in ("source", "target") if not isinstance(row, dict) or not isinstance(row.get(key), str)
        ]
        if missing:
            there = ", ".join(sorted(row)) if isinstance(row, dict) else type(row).__name__
            raise UserError(
                f"data file {path}, line {number}: no text under {' and '.join(missing)!r} (it has: {there})"
            )
        example = Pair(str(row.get("id", number)), row["source"].strip(), row["target"].strip(), pair)
        yield _checked(path, number, example)


def _tsv(path: Path, pair: str) -> Iterator[Pair]:
    for number, line in _lines(path):
        columns = line.split("\t")
        if len(columns) != 2:
            raise UserError(f"data file {path}, line {number}: {len(columns)} columns; source, tab, target is wanted")
        yield _checked(path, number, Pair(str(number), columns[0].strip(), columns[1].strip(), pair))


def _side_by_side(paths: list[str], pair: str) -> Iterator[Pair]:
    if len(paths) != 2:
        raise UserError(f"data: {len(paths)} files in a list; two are wanted, source and target")
    sources, targets = (list(_lines(Path(path))) for path in paths)
    if len(sources) != len(targets):
        raise UserError(f"data files {paths[0]} and {paths[1]} differ in lines: {len(sources)} and {len(targets)}")
    for (number, source), (_, target) in zip(sources, targets, strict=True):
        yield _checked(Path(paths[1]), number, Pair(str(number), source.strip(), target.strip(), pair))


def parse_jsonl(text: str) -> list[dict]:
    """The rows of JSON lines; a line ends with a newline only, and not with what else Unicode calls one."""
    return [json.loads(line) for line in text.split("\n") if line]


def write_jsonl(rows: Iterable[dict]) -> str:
    """The rows as JSON lines, in the characters they were written with."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
