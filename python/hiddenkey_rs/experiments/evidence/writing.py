"""The report's files: a page, the pictures, the figures as CSV, and Markdown."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ...errors import DataError, StateError
from ..folder import replace_folder, write_text
from . import paper, records
from .page import MARK, page
from .pictures import Pictures
from .render import Table, markdown
from .sections import Block, Family, Section, families, sections
from .studies import Study, read_studies

PAGE, MARKDOWN, PICTURES, TABLES = "index.html", "report.md", "pictures", "tables"
_OPEN = re.compile(r"<!-- report ([^>]*?) -->")
_CLOSE = "<!-- /report -->"
_SHORT = 40
"""Rows of a folded table that stands in a file without pictures."""


def write_report(
    folders: Sequence[str | Path],
    out: str | Path | None = None,
    data: str | None = None,
    results: str | Path | None = None,
) -> list[str]:
    """Read the folders of sweeps and write what their results say; returns the outcome in sentences.

    Args:
        folders: of ``hiddenkey sweep --out``; those of one plan are parts of one study. out: the report's folder: a page
            (``index.html``), ``report.md``, ``pictures/`` and ``tables/``. data: where the paper's figure 4 may lie.
        results: a Markdown file of which the parts between ``<!-- report NAME -->`` and ``<!-- /report -->`` are written
            anew; NAME is a section's name, with the study's before it (``small/main``) where only one is meant.

    Raises:
        DataError: folders without results, with results of other plans or that lack figures; a Markdown file without such
            parts. StateError: ``out`` holds something else.
    """
    studies = read_studies(folders)
    theirs = paper.figure_4(data)
    tested = {study.name: families(study) for study in studies}
    plain = [(study.name, sections(study, tested[study.name], None)) for study in studies]
    if out is not None:
        _check_free(Path(out))
    if results is not None:  # all that can be refused is refused before anything is written
        write_text(Path(results), filled(Path(results), plain))
    if out is not None:
        _write_folder(Path(out), studies, tested, theirs)
    return [str(block) for _, found in plain for block in found[0].blocks]


def _write_folder(out: Path, studies: list[Study], tested: Mapping[str, list[Family]], theirs: paper.Curves) -> None:
    out.mkdir(parents=True, exist_ok=True)
    if not (out / PAGE).is_file():  # what is stopped in the middle is known for a report again
        write_text(out / PAGE, f"<!DOCTYPE html>\n{MARK}\n<p>This report was not finished.</p>\n")
    told: list[tuple[str, list[Section]]] = []

    def draw_all(folder: Path) -> None:
        folder.mkdir()
        for study in studies:
            pictures = Pictures(study, folder, PICTURES, theirs)
            told.append((study.name, sections(study, tested[study.name], pictures)))

    def write_all(folder: Path) -> None:
        folder.mkdir()
        held = [(study, entry.key, entry.found) for study in studies for entry in tested[study.name]]
        records.write_csv(folder / "runs.csv", records.runs(studies))
        records.write_csv(folder / "epochs.csv", records.epochs(studies))
        records.write_csv(folder / "cells.csv", records.cells(studies))
        records.write_csv(folder / "comparisons.csv", records.comparisons(held))
        records.write_csv(folder / "early_stopping.csv", records.early_stopping(studies))
        records.write_csv(folder / "curves.csv", records.curves(studies))

    replace_folder(out / PICTURES, draw_all)
    replace_folder(out / TABLES, write_all)
    write_text(out / MARKDOWN, "\n".join(_study_markdown(name, found) for name, found in told))
    write_text(out / PAGE, page(told, out / PICTURES))


def _check_free(out: Path) -> None:
    """A report replaces a report, and nothing else."""
    if out.is_file():
        raise StateError(f"the report's folder is a file (got {str(out)!r}); choose another --out")
    if out.is_dir() and any(not file.name.startswith(".") for file in out.iterdir()):
        index = out / PAGE
        if not index.is_file() or MARK not in index.read_text(encoding="utf-8", errors="replace")[:200]:
            raise StateError(f"the report's folder holds other files (got {str(out)!r}); choose another --out")


def _study_markdown(name: str, found: Sequence[Section]) -> str:
    parts = [f"# {name}\n"]
    for section in found:
        parts += [f"## {section.title}\n", section_markdown(section)]
    return "\n".join(parts)


def section_markdown(section: Section, pictures: bool = True) -> str:
    """A section's blocks in Markdown; what the page folds away is left to the CSV files, unless it stands for a picture."""
    blocks = [_block(block, pictures) for block in section.blocks if block]
    return "\n".join(block for block in blocks if block)


def _block(block: Block, pictures: bool) -> str:
    if isinstance(block, str):
        return block + "\n"
    if isinstance(block, Table):
        if block.folded and (pictures or len(block.rows) > _SHORT):
            return f"### {block.title}\n\n{len(block.rows)} rows, see the report's {TABLES}/ folder.\n"
        return markdown(block)
    return "\n".join(f"![{item.words}]({item.path})" for item in block) + "\n" if pictures else ""


def filled(path: Path, studies: Sequence[tuple[str, Sequence[Section]]]) -> str:
    """The Markdown file's text with its marked parts written anew, everything else as it was.

    Raises:
        DataError: no file, a part that is not closed or that there is no section for, or no part at all; with its line.
    """
    if not path.is_file():
        raise DataError(
            f"there is no Markdown file to fill (got {str(path)!r}); write it, with <!-- report main --> in it"
        )
    kept, wanted, start = [], None, 0
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        opened = _OPEN.fullmatch(line.strip())
        if wanted is None:
            kept.append(line)
            if opened:
                wanted, start = opened[1], number
        elif line.strip() == _CLOSE:
            kept += ["", _named(wanted, studies, f"{path}, line {start}").rstrip("\n"), "", line]
            wanted = None
        elif opened:
            raise DataError(f"a part of a report is not closed (got {path}, line {start}); write {_CLOSE} behind it")
    if wanted is not None:
        raise DataError(f"a part of a report is not closed (got {path}, line {start}); write {_CLOSE} behind it")
    if not start:
        raise DataError(
            f"the file has no place for a report (got {str(path)!r}); write <!-- report main --> and {_CLOSE}"
        )
    return "\n".join(kept) + "\n"


def _named(wanted: str, studies: Sequence[tuple[str, Sequence[Section]]], place: str) -> str:
    study, _, name = wanted.rpartition("/")
    own = [(key, section) for key, found in studies for section in found if section.name == name and study in ("", key)]
    if not own:
        known = ", ".join(dict.fromkeys(section.name for _, found in studies for section in found))
        names = ", ".join(key for key, _ in studies)
        raise DataError(
            f"the report has no such section (got {wanted!r} in {place}); use one of {known}, of the studies {names}"
        )
    if len(own) == 1:
        return section_markdown(own[0][1], pictures=False)
    return "\n".join(f"**{key}**\n\n{section_markdown(section, pictures=False)}" for key, section in own)
