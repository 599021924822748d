"""Draw docs/architecture.svg: the floors of the package and who imports whom, from the imports as they are.

    python scripts/make_architecture.py            (make docs)
    python scripts/make_architecture.py --check    (fails where the picture in the repository is another one)

Floors are those of the import contract in pyproject.toml, which `make lint` holds. An arrow is left out where a longer
path of arrows says the same.
"""

from __future__ import annotations

import sys
import tomllib
from html import escape
from pathlib import Path

import grimp

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "architecture.svg"
PACKAGE = "prune_opd"
WIDTH, MARGIN, GAP, LINE, PER_LINE = 980, 24, 30, 15, 62
STYLE = (
    "text{font-family:Helvetica,Arial,sans-serif;fill:#1c2733}.name{font-size:14px;font-weight:600}"
    ".modules{font-size:11px;fill:#52606d}.box{fill:#f2f6fa;stroke:#9fb3c8}"
    ".arrow{fill:none;stroke:#627d98;stroke-width:1.1;opacity:.75}"
)


def floors() -> list[list[str]]:
    """Packages and modules of each floor, from the top."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    (contract,) = (c for c in settings["contracts"] if c["type"] == "layers")
    return [[name.strip() for name in layer.split("|")] for layer in contract["layers"]]


def imports() -> dict[str, set[str]]:
    """Which floors' packages each package imports from."""
    graph = grimp.build_graph(PACKAGE)
    found: dict[str, set[str]] = {name: set() for floor in floors() for name in floor}
    for module in graph.modules:
        for imported in graph.find_modules_directly_imported_by(module):
            if module != PACKAGE and imported != PACKAGE:
                found[module.split(".")[1]].add(imported.split(".")[1])
    return {name: others - {name} for name, others in found.items()}


def reduced(edges: dict[str, set[str]]) -> list[tuple[str, str]]:
    """Edges without those that a longer path says already."""

    def reach(name: str) -> set[str]:
        return edges[name].union(*(reach(other) for other in edges[name]))

    return sorted(
        (a, b) for a in edges for b in edges[a] if not any(b in reach(other) for other in edges[a] if other != b)
    )


def modules(name: str) -> list[str]:
    """Lines with the names of a package's modules."""
    folder = ROOT / "src" / PACKAGE / name
    lines = [""]
    for path in sorted(folder.glob("*")):
        inner = path.is_dir() and (path / "__init__.py").exists()
        if (path.suffix == ".py" and path.stem != "__init__") or inner:
            word = path.stem + ("/" if inner else "")
            if len(lines[-1]) + len(word) > PER_LINE:
                lines.append("")
            lines[-1] += f"{word}  "
    return [line.strip() for line in lines if line]


def picture() -> str:
    """The whole drawing as SVG text."""
    boxes: dict[str, tuple[float, float, float, float]] = {}  # x, y, width, height
    shapes: list[str] = []
    y = float(MARGIN)
    for floor in floors():
        texts = {name: modules(name) for name in floor}
        height = 30 + LINE * max(len(lines) for lines in texts.values())
        widths = {name: max(9 * len(name), 6 * max(map(len, lines), default=0)) + 26 for name, lines in texts.items()}
        x = (WIDTH - sum(widths.values()) - GAP * (len(floor) - 1)) / 2
        for name, lines in texts.items():
            boxes[name] = x, y, widths[name], height
            middle = x + widths[name] / 2
            shapes.append(f'<rect class="box" x="{x:g}" y="{y:g}" width="{widths[name]:g}" height="{height}" rx="6"/>')
            shapes.append(
                f'<text class="name" text-anchor="middle" x="{middle:g}" y="{y + 20:g}">{escape(name)}</text>'
            )
            for i, line in enumerate(lines):
                at = f'x="{middle:g}" y="{y + 36 + LINE * i:g}"'
                shapes.append(f'<text class="modules" text-anchor="middle" {at}>{escape(line)}</text>')
            x += widths[name] + GAP
        y += height + GAP
    rows = [box[1] for box in boxes.values()]
    arrows = []
    for number, (a, b) in enumerate(reduced(imports())):
        (ax, ay, aw, ah), (bx, by, bw, _) = boxes[a], boxes[b]
        start, end = ax + aw / 2, bx + bw / 2
        bend = 0.0
        if any(ay < row < by for row in rows):  # round the floors between, to the right and to the left in turn
            side = 1 if number % 2 else -1
            widest = max(box[2] for box in boxes.values() if ay <= box[1] <= by)
            bend = side * (widest / 2 + 40 + 7 * (number % 5))
            start, end = start + side * aw / 4, end + side * bw / 4
        way = f"M{start:g},{ay + ah:g} C{start + bend:g},{ay + ah + 22:g} {end + bend:g},{by - 22:g} {end:g},{by - 2:g}"
        arrows.append(f'<path class="arrow" marker-end="url(#head)" d="{way}"/>')
    head = (
        '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6" orient="auto">'
        '<path d="M0,0 L8,4 L0,8 z" fill="#627d98"/></marker>'
    )
    body = "\n".join([*arrows, *shapes])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y:g}" width="{WIDTH}" height="{y:g}">\n'
        f'<style>{STYLE}</style>\n<defs>{head}</defs>\n<rect width="100%" height="100%" fill="#fff"/>\n{body}\n</svg>\n'
    )


if __name__ == "__main__":
    drawn = picture()
    if "--check" in sys.argv:
        if not PICTURE.exists() or PICTURE.read_text(encoding="utf-8") != drawn:
            sys.exit(f"{PICTURE.relative_to(ROOT)} is not what the imports are: run make docs")
    else:
        PICTURE.write_text(drawn, encoding="utf-8")
        print(f"wrote {PICTURE}")
