"""Feed spoilt JSON Lines to the reader: `python scripts/fuzz_json_lines.py --seconds 60 --seed 0`, or `make fuzz`.

Whatever a file holds, reading it gives rows or DataErrors and nothing else; a row that is given can be encoded and is
JSON; the quick way through the reader agrees with the strict one. The first file that breaks this is written beside.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path

import tunekit as tk
from tunekit.plugins.sources.json_lines import parse_quickly, parse_strictly

SEEDS = (
    b'{"text": "a: b"}\n{"text": "\\u003a\\ud83d\\ude00"}\n\n{"text": "x", "n": [1, {"y": null}]}\n',
    b'{"prompt": "q", "completion": "a"}\r\n{"prompt": "q", "completion": "a", "completion": "b"}\r\n',
    b'{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 1}]}\n'
    b'{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [{"type": "function", '
    b'"function": {"name": "f", "arguments": "{}"}}]}, {"role": "tool", "content": "1"}, {"role": "assistant", '
    b'"content": "b"}], "tools": [{"type": "function"}]}\n',
    b'{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"}\n',
    b'{"instruction": "i", "input": "<noinput>", "output": "o"}\n{"instruction": "i", "response": "r"}\n',
    b'{"chosen": "\\n\\nHuman: q\\n\\nAssistant: a", "rejected": "\\n\\nHuman: q\\n\\nAssistant: b"}\n',
    b'{"prompt": [{"role": "user", "content": "q"}], "chosen": "a", "rejected": '
    b'[{"role": "assistant", "content": "b"}]}\n',
    b'{"question": "q", "answer": "a"}\n{"text": "t", "label": 1}\n',
)
PIECES = (
    *(b'"', b"\\", b":", b" :", b",", b"{", b"}", b"[", b"]", b"\n", b"\r\n", b" ", b"\x00", b"\xff", b"\xef\xbb\xbf"),
    *(b"null", b"NaN", b"1e999", b"-", b"9" * 5000, b"[" * 3000, b'{"a":' * 300, b"\\ud800", b"\\u003a", b"\\u0000"),
    *(b"\xe2\x80\xa8", b"\xff\xfe", b"\x1f\x8b\x08", b"<", b"true", b'"role"', b'"content"', b'"text"', b'""', b"{}"),
)


def mutate(data: bytes, draw: random.Random, corpus: list[bytes]) -> bytes:
    """`data` with a few pieces cut out, put in, doubled, or taken from another file."""
    for _ in range(draw.choice((1, 1, 2, 3, 8))):
        at = draw.randrange(len(data) + 1)
        end = min(len(data), at + draw.choice((0, 1, 1, 2, 8, 64)))
        other = draw.choice(corpus)
        begin = draw.randrange(len(other) + 1)
        middle = draw.choice((b"", draw.choice(PIECES), data[at:end] * 2, other[begin : begin + draw.randrange(1, 80)]))
        data = data[:at] + middle + data[end:]
    return data


def check(path: Path, data: bytes) -> None:
    """Read `data` as a file; AssertionError if the reader breaks its word, any other error as it was raised."""
    path.write_bytes(data)
    for place, row in tk.JsonLines(path=path).examine("train"):
        assert place.startswith(str(path)), place
        if isinstance(row, tk.DataError):
            assert str(row).startswith(place), (place, str(row))
            str(row).encode()
        else:
            json.dumps(row, ensure_ascii=False).encode()
    if not data.startswith((b"\x1f\x8b", b"\xef\xbb\xbf")):
        lines = data.splitlines(keepends=True) if b"\r" not in data else [line + b"\n" for line in data.split(b"\n")]
        for line, row in zip(lines, parse_quickly(lines), strict=True):
            assert row is None or row == parse_strictly(line.decode(), "f:1"), line


def fuzz(seconds: float, seed: int, corpus: list[bytes], directory: Path, most: int = sys.maxsize) -> int:
    """Try files for so many seconds, or so many files; how many were tried."""
    draw = random.Random(seed)
    path = directory / "fuzz.jsonl"
    until = time.monotonic() + seconds
    tried = 0
    while time.monotonic() < until and tried < most:
        data = mutate(draw.choice(corpus), draw, corpus)
        tried += 1
        try:
            check(path, data)
        except Exception:
            print(f"file {tried} of seed {seed} broke the reader; it is {path}", file=sys.stderr)
            raise
    return tried


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--corpus", type=Path, help="a folder of JSON Lines files to start from, besides our own")
    arguments = parser.parse_args()
    more = sorted(arguments.corpus.glob("*.jsonl")) if arguments.corpus else []
    corpus = [*SEEDS, *(path.read_bytes() for path in more)]
    directory = Path(tempfile.mkdtemp(prefix="tunekit-fuzz-"))
    print(f"{fuzz(arguments.seconds, arguments.seed, corpus, directory):,} files, and only rows and DataErrors")


if __name__ == "__main__":
    main()
