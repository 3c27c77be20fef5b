"""Results and tables: the files that evaluate.py and speed.py write, the paper's Tables 1 to 3.

--out of evaluate.py is a folder. Each combination of set, predictor, size and alignment has a file
there, JSON line by line: what decides its scores (settings), then a line for each image as soon as
it is scored, then a summary each time the set is done. So an interrupted run goes on, and other
weights or another precision begin another file. tables.md is made anew from all summaries.

    lines = table(["predictor", "AbsRel"], [["ours", 0.06]])     # Markdown
"""
import csv
import hashlib
import json
import re
from collections import defaultdict
from pathlib import Path

from data import UserError, add_line, read_lines, replacing

PUBLISHED = Path(__file__).with_name("published.csv")  # the paper's tables as printed
TABLES = {  # columns of published.csv
    "Table 1: AbsRel % / delta1 %, DA-2K accuracy %":
        ("NYUv2", "KITTI", "ETH3D", "ScanNet", "DIODE-Full", "DA-2K"),
    "Table 2: boundary F1, recall":
        ("Sintel F1", "Spring F1", "iBims F1", "AM R", "P3M R", "DIS R"),
}
PERCENT, PLAIN = "{:.2%}", "{:.3f}"
OTHERS = {"rmse": ("RMSE m", PLAIN), "rmse_log": ("RMSE log", PLAIN), "log10": ("log10", PLAIN),
          "silog": ("SILog", "{:.2f}"), "delta2": ("delta2", PERCENT),
          "delta3": ("delta3", PERCENT)}
SCORES = {  # key -> title and format, in the order of the columns
    "abs_rel": ("AbsRel", PERCENT), "delta1": ("delta1", PERCENT),
    "f1_raw": ("boundary F1 (raw)", PLAIN), "f1_aligned": ("boundary F1 (aligned)", PLAIN),
    "f1_metric": ("boundary F1 (metric)", PLAIN),
    "recall_raw": ("recall (raw)", PLAIN), "recall_metric": ("recall (metric)", PLAIN),
    "pairs_right": ("pairs", PERCENT)} | OTHERS
MARK = "<!-- tables of evaluate.py -->\n"


# ---------------------------------------------------------------- Markdown


def table(head, rows):
    """Yields the lines of a Markdown table, each row as soon as `rows` yields it."""
    yield line_of(head)
    yield "|" + "---|" * len(head)
    yield from map(line_of, rows)


def line_of(cells):
    return "| " + " | ".join(str(cell).replace("|", "/") for cell in cells) + " |"


def published():
    """-> the rows of published.csv, {column: text}."""
    with open(PUBLISHED, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# ---------------------------------------------------------------- the results of evaluate.py


def check_folder(folder):
    """--out, made where it is not there; a file and other people's tables are refused."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder}: is a file; name a folder for the results and tables")
    folder.mkdir(parents=True, exist_ok=True)
    tables = folder / "tables.md"
    if tables.exists() and not tables.read_text("utf-8", errors="replace").startswith(MARK):
        raise UserError(f"--out {folder}: {tables} is not of this program and would be replaced; "
                        "choose another folder")


def open_results(folder, settings):
    """The file of these settings, begun where there is none -> its path and its lines."""
    digest = hashlib.sha1(json.dumps(settings).encode()).hexdigest()[:12]
    words = [settings[key] for key in ("set", "predictor", "size", "aligned_in")]
    name = "-".join(str(word) for word in words if word is not None)
    file = folder / (re.sub(r"[^\w-]+", "_", f"{name}-{digest}") + ".jsonl")
    first, lines = {"settings": settings}, read_lines(file)
    begun = file.read_text("utf-8", errors="replace") if file.exists() else ""
    if not lines and json.dumps(first).startswith(begun):  # nothing, or what a kill left of it
        lines = [first]
        add_line(file, first)
    if lines[:1] != [first]:
        raise UserError(f"{file}: does not begin as a file of evaluate.py; remove it, or choose "
                        "another --out")
    return file, lines


def all_results(folder, program):
    """-> what the tables show, in their order: of each file in the folder that evaluate.py wrote,
    settings and summary in one dict, the last summary for each choice of images."""
    found = []
    for file in sorted(folder.glob("*.jsonl")):
        first, *lines = read_lines(file) or [{}]
        settings = first.get("settings")
        if isinstance(settings, dict) and settings.get("program") == program:
            summaries = {line["chosen"]: settings | line for line in lines if "chosen" in line}
            found += summaries.values()
    columns = [title for titles in TABLES.values() for title in titles]

    def place(r):
        column = columns.index(r["title"]) if r["title"] in columns else len(columns)
        return column, *(str(r[key]) for key in ("title", "predictor", "source", "path", "chosen"))

    return sorted(found, key=place)


def write_tables(folder, results, others):
    """All results -> tables.md; returns the lines of the paper's tables."""
    by_set = defaultdict(list)
    for result in results:
        by_set[result["protocol"]].append(result)
    ours = [line for title, columns in TABLES.items()
            if any(r["title"] in columns for r in results)
            for line in (title, "", *paper_table(columns, results), "")]
    sets = [line for same in by_set.values() for line in set_table(same, others)]
    with replacing(folder / "tables.md") as part:
        # paths under a locale that is not UTF-8 hold surrogates: back to their own bytes
        part.write_bytes("\n".join([MARK, *ours, *sets]).encode("utf-8", "surrogateescape"))
    return ours


def set_table(results, others=False):
    """Results of one set -> Markdown lines, what decides the numbers first.

    others  with the metrics of --all_metrics
    """
    keys = list(SCORES) + [key for r in results for key in r["scores"] if key not in SCORES]
    keys = [key for key in dict.fromkeys(keys) if any(key in r["scores"] for r in results)
            and (others or key not in OTHERS)]
    titles = {key: SCORES.get(key, (key, PERCENT)) for key in keys}  # of DA-2K's scenes: itself
    head = ["predictor", "map", "aligned in", "longer side", "images", "without a score"]
    aligned = any(r["aligned_in"] for r in results)
    rows = []
    for r in results:
        cells = [f"{r['predictor']} {r['source']}".strip(), r["map"], r["aligned_in"] or "-",
                 size_label(r["size"]), r["scored"], r["failed"]]
        cells += [r["upside_down"]] if aligned else []
        rows.append(cells + [form.format(r["scores"][key]) if key in r["scores"] else ""
                             for key, (_, form) in titles.items()])
    head += ["scale < 0"] if aligned else []
    head += [title for title, _ in titles.values()]
    return [results[0]["protocol"], "", *table(head, rows), ""]


def paper_table(columns, results):
    """The paper's table, our results below its rows, blanks where nothing was run -> lines. A
    number that not all images of the set went into says so."""
    rows = [(row["method"], row) for row in published() if any(row[c] for c in columns)]
    for r in results:
        if r["title"] not in columns or not r["scored"]:
            continue
        part = "" if r["scored"] >= r["count"] else f" ({r['scored']} of {r['count']})"
        for mode, cell in paper_cells(r["scores"]).items():
            label, cell = paper_label(r, mode), cell + part
            # A row of this label in which the set has no other number, as of another list; a raw
            # score comes with each alignment.
            free = (cells for name, cells in rows
                    if name == label and cells.get(r["title"], cell) == cell)
            cells = next(free, None)
            if cells is None:
                cells = {}
                rows.append((label, cells))
            cells[r["title"]] = cell
    return list(table(["", *columns],
                      [[label, *(cells.get(c, "") for c in columns)] for label, cells in rows]))


def paper_cells(scores):
    """-> {mode: cell}; one of no mode for Table 1, one for each mode of Table 2."""
    if "abs_rel" in scores:
        return {"": f"{100 * scores['abs_rel']:.1f} / {100 * scores['delta1']:.1f}"}
    if "all" in scores:
        return {"": f"{100 * scores['all']:.1f}"}
    return {key.partition("_")[2]: f"{value:.3f}" for key, value in scores.items()}


def paper_label(r, mode):
    """What distinguishes a row; two networks of one name by the digest of their weights."""
    words = [f"{r['predictor']} {r['source']}".strip()]
    words += [f"weights {r['weights'][:6]}"] if r["weights"] and r["predictor"] != "maps" else []
    if r["aligned_in"] and mode in ("", "aligned"):
        words.append(f"aligned in {r['aligned_in']}")
    else:
        words.append(" ".join(dict.fromkeys([mode, r["map"]])).strip())  # not: metric metric
    if mode or "all" in r["scores"]:  # the sets that the paper names no size for
        words.append(f"longer side {size_label(r['size'])}")
    return ", ".join(words)


def size_label(size):
    return "its own" if size is None else "native" if size == 0 else str(size)
