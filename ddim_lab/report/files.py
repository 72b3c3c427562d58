"""A sweep's files: table.md and table.tex, results.csv and report.html."""

from __future__ import annotations

import re
from pathlib import Path

from ddim_lab.errors import one_line
from ddim_lab.report.numbers import decimals, number
from ddim_lab.report.page import page
from ddim_lab.report.read import ReportError, Sweep, kept_samples
from ddim_lab.report.rows import csv_text
from ddim_lab.report.sections import KEPT
from ddim_lab.report.seeds import over_seeds
from ddim_lab.report.tables import Entry, TextTable, elsewhere_text, time_text, value_text
from ddim_lab.store import write_text


def write_files(sweep: Sweep) -> Path:
    """Write results.csv, table.md, table.tex and report.html into the sweep's folder; return report.html's path.

    Each file is replaced whole or not at all. Numbers come first: a page that can't be built leaves the tables.

    Raises:
        ReportError: the folder can't be made or written to.
    """
    folder, report = sweep.folder, sweep.folder / "report.html"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "results.csv", csv_text(sweep))
        write_text(folder / "table.md", markdown(sweep))
        write_text(folder / "table.tex", latex(sweep))
        write_text(report, page(sweep))
    except OSError as error:
        raise ReportError(f"the report can't be written into {folder}: {error}") from error
    return report


def texts_of(sweep: Sweep) -> list[TextTable]:
    """The paper-shaped tables: one for each value with a heading, with published numbers; means over seeds.

    Numbers that stand apart are the last.
    """
    texts: list[TextTable] = []
    for table, found in sweep.shown:
        if not found:
            texts.append(time_text(table))
        for values in found:
            texts.append(value_text(sweep.plan.published, values))
            if (seeds := over_seeds(values)) is not None:
                texts.append(seeds)
    return [*texts, *map(elsewhere_text, sweep.plan.elsewhere)]


# -- Markdown -------------------------------------------------------------------------------------------


def markdown(sweep: Sweep) -> str:
    """table.md: the findings, then each table under a heading that names metric, network, reference and N."""
    return _head(sweep) + _findings(sweep) + _tables(sweep)


ON_CONSOLE = 15, 160
"""How many lines of findings there, and how long."""


def for_console(sweep: Sweep) -> str:
    """table.md with the findings last, as many as a screen has room for."""
    return "\n".join([_head(sweep) + _tables(sweep), *sweep.findings.lines(*ON_CONSOLE)])


def _head(sweep: Sweep) -> str:
    lines = [f"# {md(sweep.title)}", ""]
    if sweep.plan.command:
        lines += [f"    {one_line(sweep.plan.command)}", ""]
    return "\n".join([*lines, ""])


def _findings(sweep: Sweep) -> str:
    if not sweep.findings:
        return ""
    lines = ["## Findings", "", md(sweep.findings.summary), ""]
    for part in sweep.findings.parts:
        lines += [f"**{md(part.title)}**", "", *(f"- {md(line)}" for line in part.lines), ""]
    return "\n".join([*lines, ""])


def _tables(sweep: Sweep) -> str:
    lines: list[str] = []
    for text in texts_of(sweep):
        lines += _markdown_table(text)
    if kept := kept_samples(sweep):
        lines += ["## Images that were kept", "", md(KEPT), ""]
        lines += [f"- {md(sweep.names[number])}: `{path}`" for number, path in kept.items()]
    return "\n".join(lines).rstrip() + "\n"


def _markdown_table(text: TextTable) -> list[str]:
    footnotes = text.footnotes()

    def show(entry: Entry | None) -> str:
        if entry is None:
            return ""
        mark = f" [{footnotes.index(entry.note) + 1}]" if entry.note else ""
        return md(_with_paper(entry)) + mark

    lines = [f"## {md(text.heading)}", "", md(text.facts), ""]
    lines.append("| " + " | ".join(("", *map(md, text.columns))) + " |")
    lines.append("|---|" + "---:|" * len(text.columns))
    lines += ["| " + " | ".join((md(label), *map(show, entries))) + " |" for label, entries in text.rows]
    lines.append("")
    for index, note in enumerate(footnotes, start=1):
        lines += [f"[{index}] {md(note)}", ""]
    for note in text.notes:
        lines += [md(note), ""]
    return lines


def plain_table(text: TextTable) -> tuple[str, list[str], list[list[str]]]:
    """A table's heading, columns and rows, each place as Markdown has it but unescaped."""
    rows = [
        [label, *("" if entry is None else _with_paper(entry) for entry in entries)] for label, entries in text.rows
    ]
    return text.heading, ["", *text.columns], rows


def _with_paper(entry: Entry) -> str:
    text = entry.text if entry.aside is None else f"{entry.text} ({entry.aside})"
    if entry.paper is None:
        return text
    parts = [text, f"{entry.paper:g}"]
    if entry.difference is not None:
        parts.append(number(entry.difference, decimals([entry.paper]), sign=True))
    return " / ".join(parts)


def md(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([\\`*_|\[\]])", r"\\\1", one_line(text)).replace("&", "&amp;").replace("<", "&lt;")


# -- LaTeX ----------------------------------------------------------------------------------------------


def latex(sweep: Sweep) -> str:
    """table.tex: each table as a booktabs tabular in a table environment, to paste."""
    lines = ["% needs \\usepackage{booktabs}; encoding UTF-8"]
    for text in texts_of(sweep):
        lines += _latex_table(text)
    return "\n".join(lines) + "\n"


def _latex_table(text: TextTable) -> list[str]:
    footnotes = text.footnotes()

    def show(entry: Entry | None) -> str:
        if entry is None:
            return ""
        mark = f"$^{{{footnotes.index(entry.note) + 1}}}$" if entry.note else ""
        return tex(_with_paper(entry)) + mark

    lines = [
        "\\begin{table}",
        "  \\centering",
        f"  \\caption{{{tex(text.heading)}; {tex(text.facts)}.}}",
        f"  \\begin{{tabular}}{{l{'r' * len(text.columns)}}}",
        "    \\toprule",
        "    " + " & ".join(("", *map(tex, text.columns))) + " \\\\",
        "    \\midrule",
    ]
    lines += ["    " + " & ".join((tex(label), *map(show, entries))) + " \\\\" for label, entries in text.rows]
    lines += ["    \\bottomrule", "  \\end{tabular}"]
    remarks = [f"$^{{{i}}}$ {tex(note)}" for i, note in enumerate(footnotes, start=1)]
    for remark in (*remarks, *map(tex, text.notes)):
        lines += ["", f"  {{\\footnotesize {remark}\\par}}"]
    return [*lines, "\\end{table}", ""]


_TEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "%": r"\%",
    "_": r"\_",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "η": r"$\eta$",
    "σ\u0302": r"$\hat{\sigma}$",
    "σ": r"$\sigma$",
    "±": r"$\pm$",
    "−": r"$-$",
    "·": r"$\cdot$",
    "—": "---",
    "…": r"\dots{}",
}
_TEX_PATTERN = re.compile("|".join(re.escape(text) for text in sorted(_TEX, key=len, reverse=True)))


def tex(text: str) -> str:
    """Text that LaTeX shows as it is."""
    return _TEX_PATTERN.sub(lambda match: _TEX[match.group()], one_line(text))
