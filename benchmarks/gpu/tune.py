"""Proposes a table of tiles from the sweep's rows: entropy_kernels/_triton/common/tiles.py anew.

The fastest tile of each variant stays, the fastest variant first. What the sweep did not measure
stays as it is.
"""

from pathlib import Path

from benchmarks.gpu import sweep
from benchmarks.gpu.environment import ROOT
from benchmarks.gpu.rows import Row, Rows
from entropy_kernels._triton.common import tiles
from entropy_kernels._triton.common.tiles import ANY, Key, Tile

PATH = ROOT / "entropy_kernels" / "_triton" / "common" / "tiles.py"
BEGIN = "TILES: dict[Key, tuple[Tile, ...]] = {\n"
END = "}\n"

Table = dict[Key, tuple[Tile, ...]]


def propose(rows: Rows, path: Path) -> str:
    """Writes the proposal where any tile was timed; what to read about it."""
    timed = [row for row in rows.of(sweep.STAGE) if "p50_ms" in row and "op" in row]
    if not timed:
        return ""
    about = rows.about
    source = f"{about['gpu'] or 'interpreter'}, {about['date']}"
    dtype = "any" if about["architecture"] == "interpreter" else "bfloat16"
    measured = best(timed, about["architecture"], dtype, source)
    write(merged(tiles.TILES, measured), PATH, path)
    fastest = [f"{key.op} D<={_number(key.hidden)}: {x[0]}" for key, x in measured.items()]
    return "\n".join([*fastest, f"wrote {path}: a proposal for {PATH.relative_to(ROOT)}"])


def best(rows: list[Row], architecture: str, dtype: str, source: str) -> Table:
    """The fastest tile of each variant, for each op and hidden size; the last also for larger."""
    found: Table = {}
    for op in sweep.OPS:
        sizes = sorted({row["hidden"] for row in rows if row["op"] == op})
        for hidden in sizes:
            here = [row for row in rows if (row["op"], row["hidden"]) == (op, hidden)]
            fastest: dict[str, Tile] = {}
            for row in sorted(here, key=lambda row: row["p50_ms"]):
                fastest.setdefault(row["tile"][0], Tile._make([*row["tile"], source]))
            limit = ANY if hidden == sizes[-1] else hidden
            found[Key(op, architecture, dtype, limit, ANY)] = tuple(fastest.values())
    return found


def merged(table: Table, measured: Table) -> Table:
    """`measured` in place of what the table has for the same op, architecture and dtype.

    A variant that was not measured, because this version of Triton lacks it, keeps its last place.
    """
    replaced = {key[:3] for key in measured}
    found: Table = {}
    for key, entries in table.items():
        if key[:3] not in replaced:
            found[key] = entries
            continue
        for new, fastest in measured.items():
            if new[:3] == key[:3] and new not in found:
                known = {tile.variant for tile in fastest}
                found[new] = fastest + tuple(x for x in entries if x.variant not in known)
    return found | {key: entries for key, entries in measured.items() if key not in found}


def write(table: Table, source: Path, path: Path) -> None:
    """The file `source` with this table, as ruff would format it."""
    text = source.read_text()
    before, rest = text.split(BEGIN)
    after = rest[rest.index(f"\n{END}") + 1 + len(END) :]
    path.write_text(before + BEGIN + "".join(map(_entry, table.items())) + END + after)


def _entry(item: tuple[Key, tuple[Tile, ...]]) -> str:
    key, entries = item
    names = ", ".join(f'"{x}"' for x in key[:3])
    head = f"    Key({names}, {_number(key.hidden)}, {_number(key.tokens)}): ("
    if len(entries) == 1 and len(one := f"{head}{_tile(entries[0])},),\n") <= 101:
        return one
    lines = "".join(f"        {_tile(tile)},\n" for tile in entries)
    return f"{head}\n{lines}    ),\n"


def _tile(tile: Tile) -> str:
    """Defaults are left out; what comes after one is named."""
    arguments, named = [f'"{tile.variant}"', *map(str, tile[1:6])], False
    for name in ("group_t", "split_v", "max_registers"):
        value = getattr(tile, name)
        if value == Tile._field_defaults[name]:
            named = True
        else:
            arguments.append(f"{name}={value}" if named else str(value))
    if tile.source != Tile._field_defaults["source"]:
        arguments.append(f'source="{tile.source}"')
    return f"Tile({', '.join(arguments)})"


def _number(value: int) -> str:
    return "ANY" if value == ANY else str(value)
