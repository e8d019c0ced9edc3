"""Tables of plain text for terminals and logs."""

from collections.abc import Mapping, Sequence


def format_table(rows: Sequence[Sequence[object]]) -> str:
    """Return rows in aligned columns: the first to the left, the others to the right.

    Floating numbers get four significant digits. No line ends in spaces.

    Example:
        >>> print(format_table([["level", "ms"], ["p2", 1234.56], ["p3", 0.5]]))
        level    ms
        p2     1235
        p3      0.5
    """
    texts = [[f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in r] for r in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    lines = []
    for first, *others in texts:
        cells = [first.ljust(widths[0])]
        cells += [text.rjust(width) for text, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def format_records(records: Sequence[Mapping[str, object]]) -> str:
    """Return dicts with the same keys as a table with the keys above."""
    return format_table([list(records[0]), *(list(record.values()) for record in records)])


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table in Markdown.

    Example:
        >>> markdown_table(["set", "AP"], [["val", "35.4"]])
        ['| set | AP |', '|---|---|', '| val | 35.4 |']
    """
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    return lines + [f"| {' | '.join(row)} |" for row in rows]
