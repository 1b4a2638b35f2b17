"""Where rows come from: files of any container, folders, globs, hub ids, the embedded world.

A row that cannot be read is Bad, one that is left out a Drop; neither message has row contents.
"""
import contextlib
import csv
import functools
import glob
import gzip
import io
import json
import os
import re
import sys
from pathlib import Path

from lab import toy_world
from lab.base import die, first_line, log, user_files

TOY = {"toy": ("helpful", "harmless"), "toy:summary": ("summary",)}
toy_data = functools.cache(toy_world.build)
SUFFIXES, PACKED = (".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".parquet"), (".gz", ".zst")
ROWS = {"chosen", "prompt", "instruction", "question", "query", "messages", "conversation",
        "conversations", "history", "info"}
QUOTED = re.compile(r'"([^"]|"")*"')  # a cell of CSV
METADATA = re.compile(r"\bdataset_infos?\.json\Z")  # of a hub repository, of LLaMA-Factory's data
MEANT = re.compile("prompt|chosen|rejected|preferred|response|answer|output|completion|conversation"
                   "|message|instruction|input|question|query|system|history|choice|winner|label"
                   "|preference|score|human_ref|task")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w./-]+)?")
# their names tell the task
FOLDERS = {"Anthropic/hh-rlhf": [f"Anthropic/hh-rlhf:{folder}" for folder in (
    "harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled")]}


class Drop(Exception):
    """A row that is left out; the message is the reason it is counted under."""


class Bad(Exception):
    """A row that cannot be read; the message says what is wrong, without the row's contents."""


class Misread(Bad):
    """One that shows that rows before it may have been misread: none can be skipped."""


class Twice(dict):
    """A JSON object in which the key `name` stands twice."""


class Cells(dict):
    """A row of CSV, whose values are texts, of lists too."""


def container(path):
    """(suffix, packing) of a file that can be read, in any case: (".jsonl", ".gz"); or None."""
    name = str(path).lower()
    packed = next((p for p in PACKED if name.endswith(p)), "")
    suffix = next((s for s in SUFFIXES if name.removesuffix(packed).endswith(s)), None)
    return (suffix, packed) if suffix and not (packed and suffix == ".parquet") else None


def saved_to_disk(source):
    return any((Path(source) / f).is_file() for f in ("dataset_dict.json", "state.json"))


def parts(source):
    """The sources that one stands for: the files of a folder or glob, each once whatever its names,
    the folders of a hub id."""
    if source in TOY or Path(source).is_file() or saved_to_disk(source):
        return [source]
    if Path(source).is_dir():
        found = [p for p in user_files(source) if container(p) and not METADATA.search(p)]
    elif any(c in source for c in "*?["):
        found = [str(Path(f).absolute()) for p in sorted(glob.glob(source, recursive=True))
                 for f in (parts(p) if Path(p).is_dir() else [p])]
    else:
        return FOLDERS.get(source, [source])
    return list({os.path.realpath(p): p for p in found[::-1]}.values())[::-1]


def called(source, part):
    """What a part is called: its place in the folder given, its file's name, or its hub id."""
    if Path(source).is_dir() and not saved_to_disk(source):
        return str(Path(part).relative_to(Path(source).resolve().parent))
    return Path(part).name if Path(part).exists() else part


def files(source):
    """Absolute paths of the user's own files that a source is read from."""
    return [f for part in parts(source) if Path(part).exists() for f in user_files(part)]


def check(sources):
    """Stop on a source that is neither readable here nor a hub id nor the embedded world."""
    for s in sources:
        found, local = parts(s), Path(s).exists() or any(c in s for c in "*?[")
        if Path(s).is_dir() and not saved_to_disk(s):
            left = [p for p in user_files(s) if p not in found]
            if packed := [p for p in left if re.search(r"\.(bz2|xz|zip|lz4|7z|br)$", p, re.I)]:
                die(f"{packed[0]}: only {' and '.join(PACKED)} are unpacked")
            if left:
                log(f"{s}: files that are not read: {', '.join(map(os.path.basename, left[:9]))}"
                    + f" and {len(left) - 9} more" * (len(left) > 9))
        if local and not found:
            die(f"{s} names no file that ends in one of {', '.join(SUFFIXES)}")
        for p in found:
            if Path(p).is_file() and saved_to_disk(folder := Path(p).parent):
                die(f"{folder} was written by save_to_disk: give that folder itself")
            if Path(p).is_file() and not container(p):
                die(f"{p}: a file must end in one of {', '.join(SUFFIXES)}, or in one of them and "
                    f"{' or '.join(PACKED)}")
        if not local and s not in TOY and (container(s) or not HUB_ID.fullmatch(s)):
            die(f"{s} is no file or folder, no hub id (owner/name, owner/name:data_dir or "
                "owner/name:configuration), not toy and not toy:summary")


def raw_rows(source, kind, args):
    """Stream (place in the source, row or Bad) of one part. What is unreadable as a whole stops the
    run with one line."""
    hint = ""
    try:
        if source in TOY:
            data = toy_data(args.seed, args.n_pairs, args.n_sft, args.n_prompts, args.n_eval,
                            TOY[source], args.n_gold)
            chosen = [row for name, rows in data.items() if name.partition("_")[0] == kind
                      for row in rows]
            yield from enumerate(chosen, 1)
        elif Path(source).is_file():
            yield from file_rows(source)
        else:
            import datasets
            name, _, folder = source.partition(":")
            if Path(source).is_dir():
                data = datasets.load_from_disk(source)
                data = data if isinstance(data, dict) else {"": data}
            else:
                hint = ": it needs the network, or give a local file"
                try:
                    data = datasets.load_dataset(name, data_dir=folder or None)
                except (ValueError, OSError):
                    if not folder:
                        raise
                    data = datasets.load_dataset(name, name=folder)
            for split, rows in data.items():
                yield from ((f"{split}:{n}" if split else n, row) for n, row in enumerate(rows, 1))
    except Bad as problem:  # of the file as a whole
        yield 1, problem
    # the libraries raise a dozen types when the network or a file is at fault
    except Exception as error:
        reason = first_line(error)[:150]
        hint = hint if isinstance(error, OSError) else ""  # of the hub, too
        die(f"{source} cannot be read ({type(error).__name__}: {reason}){hint}")


def file_rows(path):
    suffix, packed = container(path)
    if suffix == ".parquet":
        from pyarrow.parquet import ParquetFile
        file = ParquetFile(path)
        check_names(file.schema_arrow.names)
        rows = (row for batch in file.iter_batches(1000) for row in batch.to_pylist())
        yield from enumerate(map(decoded, rows), 1)
        return
    with open_text(path, packed) as text:
        yield from csv_rows(text) if suffix in (".csv", ".tsv") else json_rows(text)


def check_names(names):
    """Misread where two columns that may be read have one name."""
    if twice := next((n for n in names if names.count(n) > 1 and MEANT.search(n.lower())), None):
        raise Misread(f"two columns are called `{twice}`")


def decoded(value):
    """A value with its bytes as text where they are UTF-8."""
    if isinstance(value, bytes):
        with contextlib.suppress(UnicodeDecodeError):
            return value.decode()
    if isinstance(value, list):
        return [decoded(v) for v in value]
    return {k: decoded(v) for k, v in value.items()} if isinstance(value, dict) else value


def open_text(path, packed):
    """A text file, unpacked, in UTF-8 or in UTF-16 by its mark; bytes that are neither become
    surrogates, which no clean row may have. Lines may end in LF, CRLF or CR."""
    if packed == ".zst":
        try:
            import zstandard
        except ImportError:
            die(f"{path} needs a package: pip install zstandard")
        file = zstandard.open(path, "rb")
    else:
        file = (gzip.open if packed else open)(path, "rb")
    file = io.BufferedReader(file)
    encoding = "utf-16" if file.peek(2)[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    return io.TextIOWrapper(file, encoding, "surrogateescape")


def csv_rows(text):
    csv.field_size_limit(sys.maxsize)
    header = text.readline()
    delimiter = max(",;\t", key=header.count)
    spaced = header.count(delimiter + " ") == header.count(delimiter) > 0  # before a quote, too
    names = [name.strip() for name in next(csv.reader(
        [header], delimiter=delimiter, skipinitialspace=True), [])]
    check_names(names)
    if not any(names):
        raise Bad("no header in the first line")
    if delimiter == "\t":  # which has no quotes by its standard, but many write them
        whole = text.read()
        lines = [line.split("\t") for line in whole.split("\n")]
        kinds = {bool(QUOTED.fullmatch(c)) for cells in lines for c in cells if c[:1] == '"'}
        if False in kinds and all(len(x) == len(names) for x in lines if x != [""]):
            yield from one_by_one(lines, names, True in kinds)
            return
        text = io.StringIO(whole)
    rows = csv.reader(text, delimiter=delimiter, strict=True, skipinitialspace=spaced)
    while True:
        try:
            cells = next(filter(None, rows), None)
            if cells is None:
                if not rows.line_num:
                    raise Bad("no row under the header")
                return
            row = Cells(zip(names, cells))
            if len(cells) != len(names):
                row = Bad(f"cells: {len(cells)}, in the header: {len(names)}")
            elif delimiter == "\t" and any("\t" in c and "\n" in c for c in cells):
                row = Bad("a quote that does not close")
            elif [c.strip("\ufeff ") for c in cells] == names:
                row = Drop("the header once more")
        except csv.Error as problem:
            row = Bad(f"not CSV ({problem})")
        yield rows.line_num + 1, row


def one_by_one(lines, names, quoted):
    """Rows of tab-separated lines of which some have a quote that does not close: it is text; where
    other cells are `quoted` the line is Bad, or it would swallow what follows."""
    for n, cells in enumerate(lines, 2):
        if quoted and any(c[:1] == '"' and not QUOTED.fullmatch(c) for c in cells):
            yield n, Bad("a quote that does not close, where other cells are in quotes")
        elif [c.strip("\ufeff ") for c in cells] == names:
            yield n, Drop("the header once more")
        elif cells != [""]:
            yield n, Cells(zip(names, (c[1:-1].replace('""', '"') if QUOTED.fullmatch(c) else c
                                       for c in cells)))


def json_rows(text):
    """Rows of JSON lines, of one array, or of an object that holds one array of rows."""
    numbered = enumerate(text, 1)
    n, first = next(((n, line) for n, line in numbered if line.strip()), (1, ""))
    row, array = parse_line(first) if first else Bad("empty"), first.lstrip().startswith("[")
    if array or isinstance(row, Bad) or rows_in(row):  # not a row a line
        rest = first + text.read()
        whole = parse_line(rest)
        rows = rows_in(whole) or [whole] if isinstance(whole, dict) else whole
        if rows == []:
            raise Bad("empty")
        if isinstance(whole, dict) or isinstance(rows, list) and all(
                isinstance(r, (dict, str)) for r in rows):
            yield from ((f"row {k}", r) for k, r in enumerate(rows, 1))
            return
        if array:
            yield from lines_of_array(rest, n, whole)
            return
        numbered = enumerate(rest.split("\n")[1:], n + 1)
    yield n, row
    yield from ((n, parse_line(line)) for n, line in numbered if line.strip())


def lines_of_array(text, n, problem):
    """Rows of an array that is not JSON, where they are objects, or texts but for one, that stand
    on a line each, or else its fault."""
    rows = [(k, parse_line(row)) for k, line in enumerate(text.split("\n"), n) if (
        row := line.strip().removeprefix("[").removesuffix("]").removesuffix(",").strip())]
    objects, texts = (sum(isinstance(row, kind) for _, row in rows) for kind in (dict, str))
    if 2 * objects > len(rows) or 1 < texts == len(rows) - 1:
        yield from rows
    else:
        yield n - 1 + getattr(problem, "line", 1), problem if isinstance(problem, Bad) else Bad(
            "an array of neither objects nor texts")


def rows_in(thing):
    """The rows of an object that holds one list of them, or None."""
    if not isinstance(thing, dict) or (ROWS - {"info"} | {"input"}) & thing.keys():
        return None
    lists = [v for v in thing.values() if isinstance(v, list)
             and v and isinstance(v[0], dict) and ROWS & v[0].keys()]
    return lists[0] if len(lists) == 1 else None


def unique(pairs):
    """The object of these keys and values: Twice if one stands twice."""
    if len(found := dict(pairs)) < len(pairs):
        names = [name for name, _ in pairs]
        found = Twice(found)
        found.name = next(n for n in names if names.count(n) > 1)
    return found


def parse_line(line):
    try:
        line.encode()  # bytes that were no text stand as surrogates
        return json.loads(line, object_pairs_hook=unique)
    except UnicodeEncodeError:
        return Bad("not in UTF-8")
    except (ValueError, RecursionError) as error:
        bad = Bad(f"not JSON ({getattr(error, 'msg', type(error).__name__)})")
        bad.line = getattr(error, "lineno", 1)  # of those given
        return bad
