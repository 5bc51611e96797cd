"""Lines of code of the packages, without blanks, comments and docstrings: `python benchmarks/lines.py [FOLDER ...]`.

FOLDER/**/*.py -> tokens less docstrings -> lines that hold one, by package and in all
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from pathlib import Path

_FOLDERS = ("wds_tools", "loaders")
_NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def code_lines(source: str) -> int:
    """Lines of a module that hold code. A string that stands alone, as under a field, is a docstring too."""
    docstrings = {
        line
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    lines = {line for token in tokens if token.type not in _NO_CODE for line in range(token.start[0], token.end[0] + 1)}
    return len(lines - docstrings)


def main(folders: list[str]) -> None:
    """Print a line for each package below the folders, and the total."""
    num_lines = num_files = 0
    for folder in folders:
        by_package: dict[str, list[int]] = {}
        for path in sorted(Path(folder).rglob("*.py")):
            package = "/".join(path.parts[:2]) if len(path.parts) > 2 else folder
            by_package.setdefault(package, []).append(code_lines(path.read_text()))
        for package, counts in by_package.items():
            print(f"{package:30} {sum(counts):7,} lines {len(counts):4} files")
            num_lines, num_files = num_lines + sum(counts), num_files + len(counts)
    print(f"{'total':30} {num_lines:7,} lines {num_files:4} files")


if __name__ == "__main__":
    main(sys.argv[1:] or list(_FOLDERS))
