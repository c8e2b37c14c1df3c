#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["PyNaCl>=1.6.2,<2", "pytest>=8", "hypothesis>=6.100"]
# ///
"""The tests of btlog.py: `uv run test_btlog.py`, or `python -m pytest` where the three dependencies are.

T1 to T68 in names and docstrings number the defects of other logs, witnesses and clients that a test stands for.
Slow tests run with `-m slow`.
"""

from __future__ import annotations

import ast
import asyncio
import atexit
import base64
import bisect
import codecs
import collections
import concurrent.futures
import contextlib
import dataclasses
import datetime
import errno
import fnmatch
import functools
import gzip
import hashlib
import html
import http.client
import http.server
import importlib.util
import inspect
import io
import itertools
import json
import logging
import os
import py_compile
import random
import re
import resource
import select
import shlex
import shutil
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import tracemalloc
import urllib.parse
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast
from xml.etree import ElementTree

import nacl.signing
import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

import btlog
from btlog import (
    BadProof,
    BadSignature,
    Checkpoint,
    Conflict,
    Corrupt,
    Entry,
    Error,
    Malformed,
    Policy,
    Proof,
    Publisher,
    Quorum,
    Tree,
    Unavailable,
    VerifierKey,
    check_consistency,
    check_inclusion,
    check_logged,
    encode_vkey,
    leaf_hash,
    node_hash,
    open_checkpoint,
    parse_policy,
)

# Thousands of commits are quicker in memory; what a crash of the machine does is not tested here.
if os.path.isdir("/dev/shm") and shutil.disk_usage("/dev/shm").free > 4 << 30:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", "/dev/shm")

HERE = Path(__file__).resolve().parent
SOURCE = HERE / "btlog.py"
settings.register_profile("here", deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
settings.load_profile("here")

# --- Known answers, made with golang.org/x/mod/sumdb/note and tlog, and transparency-dev/formats -----------------------

LOG_SKEY = "PRIVATE+KEY+log.example/vectors+fdabb4f8+AYXBV0uM3qySyOMFgQ7ck2eVh2rFLVUdJu+BtsLiC8Wd"
LOG_VKEY = "log.example/vectors+fdabb4f8+ARb6Padcqcp1sfkuznISj7T6p0DRAwaEMxAI/tdy2mIF"
WITNESS_SKEY = "PRIVATE+KEY+witness.example/w1+6562751b+AXyAcJaWmGJggM8gOD5p798Ez6ZNtPm6H13cP0s7WAXT"
WITNESS_VKEY = "witness.example/w1+6562751b+AQ2E2xQXlA1m7zqrVU6IxF5SYjlUmU5shfAYkVpHnchH"
WITNESS_VKEY_4 = "witness.example/w1+37de2426+BA2E2xQXlA1m7zqrVU6IxF5SYjlUmU5shfAYkVpHnchH"
PQ_VKEY = (
    "witness.example/pq+d1b92445+Bu0VeZD27nkAKLsdcjfABVaZJ+t0HBpxrPdmI2hB3I8OdIzuSBMwXslqMqzzKTeWsjmbxy1MKoCGRElsYb/x"
    "pE+J/py3XxIngAceh2VarPJhzuW+nJ+BA9igByVSi38g4sB5Xa3ql/pon7T4lgDB62hSrXY9Eyk3kjtDNQimU0FI8AAhMfJqKk97sTwOabGcvp2E"
    "qr49vQH4e0Na9bI0gZAyx0Vc9XfcJFIC99Anb8yeTAGmjjtYtebS+b56YiZZFSQf3Jifv71a9aF1Qw8TQYZSgmsFDxfDey/IP7eSy144D2jjSbt3"
    "v7VaQqDuevRR4Mktj5xTSTkakjxC6aNsX4l4u9NGRB2nZLUm9KqYqpnHGx/flAKay2rOacKq8JcP27kvZ/A8Wh+yIYHjOgoiXQoOaB7/esW33mdr"
    "B4HqpPpYjTW/Eat6WjjXaKsbcckMv4v7DIP3or1KigWf+KQqWg6cc1nRXOa55+2YCnBbk/n7Cd/PcKmzkiVf59iVYDAxpObLUBZqAP6jem/AWhn+"
    "GhoZ9BD4fKmBYygi5KyvstSjOeQxZX+UoCOoHCDKcJW14nEY4fZ53zJDY+x2i4+JivwvrTRISQ4dPN8UdswX7PnjL0qI12BoQJDTpG3Q/UX7Yoi/"
    "ZCJGzW5CRd5SysViTRpUrUos+gU0tofueaeGAgJs0f7yeeItKLP8atGnE7tUKUDp4cx+3U6JrvCV9W9/Tb/pM5DfGGW6sEmDcZwx2I94CLy75xBI"
    "QfBDSyQnMLSzkDHaqPl7b852ewjUZi4K1ZGAnYZx+xY6EETxXy/0FfjaM/nlzKO4bLWtWEmcOUqmQwmke5BVlHZmvcKahzhrXWNomTAwgJgJ0NmV"
    "m0zm7w8WR2Z57cMr8pHFdjToxdeJIDDrWLL0o2loMH8ZHzY5CkgT2TKIFV6tmu/xJwFkliY/X97RoENaA5BgZZ/PQoSEclQY4PHt89IMrL2ayDze"
    "wjXEgANAo5xMD8oP7kqeZnCD8dmGV7eJE/YRuzxJbgltGKm0Hgu/1am2Wl98hsplY9YaAGEBrMam0TiZ2DoMR2O/FuaCDHRYMZHcFmL6qdEi0BxH"
    "g7wd/ZEy6fUel7wM8cCE5iCW5kR2ZU8QaTszADV4/dQvdUCg5YYOzeJUfvV1DGd7BMkSlFbeTYdDWnw1kqoQPptxqX+b7k+H7+2UNjmN8UQeri3q"
    "Mc/AGf07sKTbYKkPQ9VWkY3+o+XfhEhqjx4EjLPc8Cvxypf/0vEl5gmwG+pSYJDkNmybaJVyVR9PwUZYNdfjfjp8RmU48pTJkwr1Ah225LDqx5rN"
    "dHPjnGK5nJRPF3dA68nh2qTk85w5pOTejJQ5d67u8MzRQQ/2iF93Z9GWiGJAQEAb2hmS7Xpsn+PEGm1Bp7kqmDmbtRLn4SUL8C0yI7AOgIEzjUlS"
    "7ru/ylFNbWWvk0/3Ri+U+ff+FSKxDSWwlF/sDZFgm37nP/NuQT1mWeJSuIP4U2frLwkm7xhlF4CDCQYm0H+zcK+osL03AXx3mA4RWu36m6QzL26E"
    "Sov1R3LuVaL6sDsjX2zi03YSpGPt7JU8wHlgIjEUpi6xs+UmMJhzKyKu6Jq60ZWgVJo6rE23sRZ14uXiZMgfArGM6OME+2mQZBetowqdq/oAI7Kc"
    "VPle51sG5FnZQQd7SB5SiL/XQsgUSJWk/QY50A/7MYYSv3HmsLGdlHOLGHpUcZVr4B/A7IMr2CcI6GkHMz8HQ+Hxyfjhqh/CLvI="
)
SIGNED = """log.example/vectors
70000
o5IPun8jmgcam9EHIfE0Gt3vuu3ttBx+JEN6nRa98Ao=

— log.example/vectors /au0+CC/opq+hZM30zVXlyT67sYBkN1+OwMLAAQx+RuDez02yMrvNIehnNxjaNLpiBqlll5PZ7Hb3ytKykwQelIULgY=
"""
COSIGNATURE = "— witness.example/w1 N94kJgAAAABqsTuAzQRMu3OerpUMXbtCT1iOJS6zz0EdLgUuklV2j1LRxDLiQaQ2V3R6OHw2DXMrwcuvLgrgYvbBeJ2togkvWoECAQ==\n"
COSIGNED = SIGNED + COSIGNATURE
COSIGNED_AT = 1790000000
ROOTS = {  # of the first n of the entries "entry 0", "entry 1", …
    0: "47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=", 1: "dziFphNIniTOLPdhmdakI/BC5LvxLX7s7pEu8nbGVwE=",
    2: "WkdmL9ijF9lgSaP59HxV3GfKZgUbqjaD27GbL+CaB7A=", 3: "lPvQ3YNvUDAWkubQ6t5yjuGexSv/8WBu2AfIV11aqhk=",
    4: "l5nzB1F+9RfCIF35tndivzR1ayAJn7ffzOdrzr0nOy4=", 5: "fKo0Xb2JKmZFTWxlEuo8PqPw0+whvj/C4jdXBf049nI=",
    6: "y+7JnbPk1n26qmDBa11M9zesLdwVB7eK83V2PrrRwB4=", 7: "mMl/C6MXXNCLAx3QhLncTmSbZNGijm6mlGRlAxc6tYc=",
    8: "tpcyzlyRQWLKmsz69OldP5h01ogFQ3CIqv8YSk25Z3M=", 9: "JA2btqVfDLN1tdAIJR5xRUWLexrchGOrj+92/RT3X2s=",
    15: "3ZednduKo2udzbV2BhOlYC9u84+nMbSdqCF62jbxuMg=", 16: "xx5OIvnaHWqhEh6W7X4IV2WsZ7RVaDJqj/i3yN3iOl8=",
    17: "jdjVxVyqRcO5WYL8Fl5e3XIueSPvGQuynS3U7BGEue8=", 31: "aEFZBAy92y635HIEYgTrPDqX624tmt0KqNmcvuVbqHE=",
    33: "YxCgz+StOp/7Pye3gNzz8z0PT8oGERhNY4ZifLKUkwU=", 63: "EgzrwFkY/7GyUQ3TwFfYHXQWaeMRuc/d6Rhd+qUe3wc=",
    64: "XLzAg+gACv0VcwjMo+tUlHo5GHjMA3NrD8Rxvc2cTBw=", 65: "r7Sal9INk9tb4xmIMCTHGgJOWmVdQvRss1Qflt86mU4=",
    127: "dKvd4JKE9Dd6FAfz72f5eWz8ceasRBUFJB1Jh5Qel5Q=", 128: "Y9TldO9rV2Bvn1rrhx8jsQshQGvXUIJNxBcKNW6Adyk=",
    129: "zU+LJxfF2J55kj6aUGInRJ25DM0uZ5u8Ob3NpIr/kHI=", 255: "z2Z5PmMp3/JC6zzuCm82rT46GW3MVzoex3XhAr6GPxw=",
    256: "2mWW2VNp9f7zIquOTg2jsLUCNqqcijsdJG90Ecni4y4=", 257: "XB/f6DU1gCLyOS3keNvgU/wTDP4dOggoeakM9r8Uv34=",
    511: "uiTGt6wKXP4z1jM1r8HnaLsgypMfJxLzM+YIbyIp5KE=", 512: "xtuUnnbP1dYUB8c6SBkhJlqwJOphMdAtxrcN79/U+to=",
    513: "eNZ0zD3mmFwl1kdju5aKzwItgn68EVhYSmYpuuvEwxw=", 1000: "NGxrnLicS3b6ydyyDNqG46AcCldBfBOQKOrNRTj96Vs=",
    4096: "B22ASenXfQ7W6g2VF3zdj+x3PG3BDQa5GBF2RtLvxJ4=", 65535: "uM1QRqGZab3H6JKJJyOQtA3WarGKeGbCC4kgpnUmaKU=",
    65536: "B7Gjd5YKThLjNI1ukymuYxapWwL7HCLpCSMbOqRIYac=", 65537: "uZxXCq8TuW4CY4Po4lLmnHFCs61+bgJk89wQ39iE2MU=",
    65792: "Y8oZodj104kWrM5pXBaVKjxoeEh9FXjaGn5tWRnKFlY=", 69999: "dwSVkzH4FloReNZwiqiwYAdFnCk3MoiZ/0VXh1Da3Y0=",
    70000: "o5IPun8jmgcam9EHIfE0Gt3vuu3ttBx+JEN6nRa98Ao=",
}
INCLUSION = [
    (0, 1), (0, 2), (1, 2), (2, 3), (0, 7), (3, 7), (6, 7), (5, 8), (99, 256), (255, 257), (256, 257), (511, 513),
    (512, 513), (12345, 65536), (65535, 65537), (65536, 65537), (0, 70000), (69999, 70000), (65791, 70000),
]
CONSISTENCY = [
    (1, 1), (1, 2), (1, 3), (2, 3), (3, 7), (4, 7), (6, 7), (6, 8), (7, 8), (8, 8), (255, 256), (255, 257), (256, 257),
    (257, 512), (4096, 65537), (65535, 65536), (65536, 70000), (65537, 70000), (69999, 70000),
]
PROOFS_DIGEST = "f84c9d333d17b3eb60bc9b219ac07b0be8b1ece2387a57793999fa3a4887b282"  # of those proofs as JSON
TILE_DIGESTS = {  # level, index, width: SHA-256 of the tile of the tree of 70,000
    (0, 0, 256): "b0f6ca2ff42508faf8c6bb4ea8bb9c74243b19d4174fdc4fd17bdad9099e605e",
    (0, 273, 112): "e31da4e768fc0d0f1f1f0046a1c4b68d71326b04a07951a7d3dcefef0de9b8cd",
    (1, 0, 256): "44f879be76da41edaf37c0d67303fbd25f2ea44be93285b320561fbaaaaabbfa",
    (1, 1, 17): "5a8eb2fe63c90ddf7fd813d165c04fa79d6eca48534b61bd312fcd2d1cf0aef3",
    (2, 0, 1): "7e27fb89709243536fe26030f273fc9f7a73443f5e7ec296b3053aa520623e76",
}
PROOF_DIGESTS = {  # of the .tlog-proof of entry 12345 under COSIGNED, without and with extra data
    b"": "675bade50dc7ec4a5d8d471fd2dfa78871cb0cdebe6341ceef7148ea46c38831",
    b"extra data": "d09d9fc2597e0309bc280c4822a4e41083aa17124b21af78f3f98c65c9dc8f65",
}
PATHS = {
    (None, 0, 256): "tile/entries/000", (None, 0, 5): "tile/entries/000.p/5",
    (None, 1234067, 256): "tile/entries/x001/x234/067", (None, 273, 112): "tile/entries/273.p/112",
    (0, 0, 256): "tile/0/000", (0, 0, 1): "tile/0/000.p/1", (0, 1000, 256): "tile/0/x001/000",
    (0, 1234067, 256): "tile/0/x001/x234/067", (0, 1234067, 8): "tile/0/x001/x234/067.p/8",
    (0, 273, 112): "tile/0/273.p/112", (1, 0, 256): "tile/1/000", (1, 1, 17): "tile/1/001.p/17",
    (2, 0, 1): "tile/2/000.p/1", (5, 1000000, 3): "tile/5/x001/x000/000.p/3", (7, 999, 255): "tile/7/999.p/255",
}
# The key pair in the README of trailofbits/bt-log.
BT_LOG_SKEY = "PRIVATE+KEY+binarytransparency.log/example+5de0f997+AXNNv9racVtMynH7oHIogZ4xS5sAIHBl47hlrcf6vsfu"
BT_LOG_VKEY = "binarytransparency.log/example+5de0f997+AcPfp2roeTxqSqmPdDkA9rIAd0pe3C5Je6Rze2SqBDUp"

# --- Oracles: RFC 6962 section 2.1 as it is written, over lists of entries -------------------------------------------


def k_of(n: int) -> int:
    k = 1
    while k * 2 < n:
        k *= 2
    return k


def mth(d: list[bytes]) -> bytes:
    if not d:
        return hashlib.sha256(b"").digest()
    if len(d) == 1:
        return hashlib.sha256(b"\0" + d[0]).digest()
    k = k_of(len(d))
    return hashlib.sha256(b"\1" + mth(d[:k]) + mth(d[k:])).digest()


def path(m: int, d: list[bytes]) -> list[bytes]:
    if len(d) == 1:
        return []
    k = k_of(len(d))
    return path(m, d[:k]) + [mth(d[k:])] if m < k else path(m - k, d[k:]) + [mth(d[:k])]


def subproof(m: int, d: list[bytes], b: bool) -> list[bytes]:
    if m == len(d):
        return [] if b else [mth(d)]
    k = k_of(len(d))
    return subproof(m, d[:k], b) + [mth(d[k:])] if m <= k else subproof(m - k, d[k:], False) + [mth(d[:k])]


ENTRIES = [b"entry %d" % i for i in range(70_000)]


def tiles_of(entries: list[bytes]) -> dict[tuple[int, int], bytes]:
    """All tiles of a tree, grown at once."""
    grown = btlog.grow(0, lambda *_: b"", [leaf_hash(entry) for entry in entries])
    return {(level, index): data for level, index, data, _ in grown}


def root_of(entries: list[bytes]) -> bytes:
    """The root of a tree, bottom up and level by level: RFC 6962 in another order than mth."""
    hashes = [hashlib.sha256(b"\0" + entry).digest() for entry in entries]
    while len(hashes) > 1:  # an odd one out moves up as it is
        pairs = [hashlib.sha256(b"\1" + a + b).digest() for a, b in zip(hashes[::2], hashes[1::2], strict=False)]
        hashes = pairs + hashes[len(hashes) & ~1 :]
    return hashes[0] if hashes else hashlib.sha256(b"").digest()


@pytest.fixture(scope="session")
def big() -> Callable[[int, int, int], bytes]:
    """Fetches the tiles of the tree of 70,000."""
    tiles = tiles_of(ENTRIES)
    return lambda level, index, width: tiles[level, index][: 32 * width]


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def refuses(kind: type[Error] | tuple[type[Error], ...], call: Callable[..., Any], *args: Any) -> None:
    try:
        value = call(*args)
    except kind:
        return
    pytest.fail(f"{args!r:.2000} gives {value!r:.500}")


def mutations(data: bytes, every: bool = False) -> Iterator[bytes]:
    """All texts of one byte changed, in eight ways or in every way; one byte missing; one byte doubled."""
    for at in range(len(data)):
        others = range(256) if every else {data[at] ^ 1 << bit for bit in range(8)} | {10, 32, 43, 48, 61}
        for other in others:
            if other != data[at]:
                yield data[:at] + bytes([other]) + data[at + 1 :]
        yield data[:at] + data[at + 1 :]
        yield data[: at + 1] + data[at:]


def survives(parse: Callable[[bytes], Any], encode: Callable[[Any], bytes], cases: Iterator[bytes]) -> int:
    """Each case is refused with an Error, or parses to what encodes to that very case; how many were refused."""
    refused = 0
    for case in cases:
        try:
            value = parse(case)
        except Error:
            refused += 1
        else:
            assert encode(value) == case
    return refused


def flip(at: int = 0) -> Callable[[bytes], bytes]:
    return lambda data: data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :] if at >= 0 else flip(len(data) + at)(data)


SUM_OF_A = hashlib.sha256(b"a").hexdigest()


# --- Strict scalars ---------------------------------------------------------------------------------------------------


def test_decimal() -> None:
    """T42: a number has one form."""
    for text in "0", "1", "9", "10", "255", str(2**63 - 1):
        assert btlog.parse_decimal(text) == int(text)
    for text in (
        "", "+7", "-0", "-1", " 7", "7 ", "7\n", "1_000", "٧", "²", "00", "007", "0x1", "1e3", "1.0", str(2**63),
        "9" * 19, "9" * 5000,
    ):
        refuses(Malformed, btlog.parse_decimal, text)


def test_T41_T51_base64_has_one_form() -> None:
    for n in range(40):
        data = random.Random(n).randbytes(n)
        assert btlog.to_base64(data) == b64(data)
        assert btlog.parse_base64(b64(data)) == btlog.parse_base64(b64(data), n) == data
        for other in {0, n - 1, n + 1} - {n}:
            refuses(Malformed, btlog.parse_base64, b64(data), other)
    for text in "Kjh=", "YQ", "YQ=", "YQ===", "YQ==\n", " YQ==", "Y Q==", "YR==", "YWI", "YWJ=", "é", "_-8=", "=":
        refuses(Malformed, btlog.parse_base64, text)


def test_T43_text_is_whole_lines_of_clean_utf8() -> None:
    for data in b"", b"a", b"a\r\n", b"a\x0bb\n", b"\0\n", b"\x1f\n", b"\xff\n", b"\xed\xa0\x80\n", b"\xc0\x80\n":
        refuses(Malformed, btlog.parse_text, data)
    odd = "a\x7f\x85\u2028\u2029b"  # str.splitlines would cut at three of them
    assert btlog.parse_text(f"{odd}\n".encode()) == f"{odd}\n"


# --- Merkle trees ------------------------------------------------------------------------------------------------------

SMALL = 64
MTH = [mth(ENTRIES[:n]) for n in range(SMALL + 1)]


def test_roots_of_small_trees_and_hashes() -> None:
    assert leaf_hash(b"") == hashlib.sha256(b"\0").digest()
    assert node_hash(b"a" * 32, b"b" * 32) == hashlib.sha256(b"\1" + b"a" * 32 + b"b" * 32).digest()
    assert len(ROOTS) == 35
    assert [b64(root) for n, root in enumerate(MTH) if n in ROOTS] == [root for n, root in ROOTS.items() if n <= SMALL]


def spoilt(proof: list[bytes]) -> Iterator[list[bytes]]:
    """The proof with a bit flipped in each element, with one missing, one extra, two swapped, one too short."""
    for i, element in enumerate(proof):
        flipped = bytearray(element)
        flipped[(7 * i) % 32] ^= 1 << i % 8
        yield [*proof[:i], bytes(flipped), *proof[i + 1 :]]
        yield proof[:i] + proof[i + 1 :]
        yield [*proof[:i], element[:-1], *proof[i + 1 :]]
        if i and proof[i - 1] != element:
            yield [*proof[: i - 1], element, proof[i - 1], *proof[i + 1 :]]
    for extra in proof[:1] + [bytes(32)]:
        yield [*proof, extra]
        yield [extra, *proof]


def small_tiles(n: int) -> btlog.Tiles:
    grown = tiles_of(ENTRIES[:n])
    return btlog.Tiles(n, lambda level, index, width: grown[level, index][: 32 * width])


def test_T56_inclusion_exhaustively_in_small_trees() -> None:
    """Agrees with the RFC's definition for every entry of every tree up to 64, and nothing else passes."""
    tried = 0
    for n in range(1, SMALL + 1):
        tree, tiles = Tree(n, MTH[n]), small_tiles(n)
        for m in range(n):
            proof, leaf = path(m, ENTRIES[:n]), leaf_hash(ENTRIES[m])
            assert btlog.prove_inclusion(tiles, m) == proof
            check_inclusion(leaf, m, tree, proof)
            for bad in spoilt(proof):
                refuses(BadProof, check_inclusion, leaf, m, tree, bad)
                tried += 1
            refuses(BadProof, check_inclusion, leaf_hash(b"other"), m, tree, proof)
            refuses(BadProof, check_inclusion, leaf, m, Tree(n, bytes(32)), proof)
            refuses(BadProof, check_inclusion, leaf[1:], m, tree, proof)
            for other in {0, m ^ 1, m + 1, n - 1} - {m}:  # under another index the path is another one
                refuses(BadProof, check_inclusion, leaf, other, tree, proof)
        for m in -1, n, n + 1:
            refuses(BadProof, check_inclusion, leaf_hash(ENTRIES[0]), m, tree, [])
    assert tried > 40_000


def test_consistency_exhaustively_in_small_trees() -> None:
    tried = 0
    for n in range(SMALL + 1):
        new, tiles = Tree(n, MTH[n]), small_tiles(n)
        for m in range(n + 1):
            proof = subproof(m, ENTRIES[:n], True) if m else []
            old = Tree(m, MTH[m])
            assert btlog.prove_consistency(tiles, m) == proof
            check_consistency(old, new, proof)
            for bad in spoilt(proof):
                refuses(BadProof, check_consistency, old, new, bad)
                tried += 1
            if m:  # every tree follows the empty one
                refuses(BadProof, check_consistency, old, Tree(n, bytes(32)), proof)
            refuses(BadProof, check_consistency, Tree(m, bytes(32)), new, proof)
            if m < n:
                refuses(BadProof, check_consistency, new, old, proof)
    assert tried > 20_000


def test_T31_the_empty_tree() -> None:
    empty, zero, five = Tree(0, hashlib.sha256(b"").digest()), Tree(0, bytes(32)), Tree(5, MTH[5])
    check_consistency(empty, five, [])
    for old, new, proof in (zero, five, []), (empty, zero, []), (zero, zero, []), (empty, five, [MTH[5]]):
        refuses(BadProof, check_consistency, old, new, proof)
    refuses(BadProof, check_inclusion, leaf_hash(b""), 0, empty, [])


def test_a_tree_is_a_size_and_a_hash() -> None:
    for size, root in (-1, bytes(32)), (2**63, bytes(32)), (1, bytes(31)), (1, bytes(33)), (0, b""):
        refuses(Malformed, Tree, size, root)


def test_proofs_of_huge_trees_end() -> None:
    for size in 2**62, 2**63 - 1:
        for count in 0, 1, 62, 63, 64, 500:
            refuses(BadProof, check_inclusion, bytes(32), size // 2, Tree(size, bytes(32)), [bytes(32)] * count)
            refuses(BadProof, check_consistency, Tree(size // 3, bytes(32)), Tree(size, bytes(32)), [bytes(32)] * count)


def test_vectors_of_go(big: Callable[[int, int, int], bytes]) -> None:
    """Roots, proofs and tiles of golang.org/x/mod/sumdb/tlog."""
    assert len(INCLUSION) == len(CONSISTENCY) == 19
    for n, root in ROOTS.items():
        assert b64(btlog.Tiles(n, big).hash(0, n)) == root
    digest = hashlib.sha256()
    for index, size in INCLUSION:
        proof = btlog.prove_inclusion(btlog.Tiles(size, big), index)
        check_inclusion(leaf_hash(ENTRIES[index]), index, Tree(size, base64.b64decode(ROOTS[size])), proof)
        digest.update(json.dumps([index, size, [b64(h) for h in proof]]).encode())
    for old, new in CONSISTENCY:
        proof = btlog.prove_consistency(btlog.Tiles(new, big), old)
        before, after = (Tree(n, btlog.Tiles(n, big).hash(0, n)) for n in (old, new))
        check_consistency(before, after, proof)
        digest.update(json.dumps([old, new, [b64(h) for h in proof]]).encode())
    assert digest.hexdigest() == PROOFS_DIGEST
    for (level, index, width), sha in TILE_DIGESTS.items():
        assert hashlib.sha256(big(level, index, width)).hexdigest() == sha


def test_many_proofs_at_once_are_the_same(big: Callable[[int, int, int], bytes]) -> None:
    choose = random.Random(3)
    for size in 1, 2, 3, 255, 256, 257, 1000, 65_535, 65_536, 65_537, 70_000:
        tiles = btlog.Tiles(size, big)
        some = sorted(set(choose.choices(range(size), k=20)) | {0, size - 1} | set(range(max(0, size - 300), size)))
        for index, text in zip(some, btlog.prove_many(tiles, some, b"\n"), strict=True):
            assert text.decode() == "\n".join(b64(h) for h in btlog.prove_inclusion(tiles, index))
    assert list(btlog.prove_many(btlog.Tiles(5, big), [], b",")) == []


def test_thousands_of_proofs_pinned(big: Callable[[int, int, int], bytes]) -> None:
    """One hash over 3,000 proofs: whatever changes the provers shows here."""
    rolling = hashlib.sha256()
    for size in 300, 4097, 69_632:
        tiles = btlog.Tiles(size, big)
        for i in range(500):
            rolling.update(b"".join(btlog.prove_inclusion(tiles, i * 7919 % size)))
            rolling.update(b"".join(btlog.prove_consistency(tiles, 1 + i * 104_729 % size)))
    assert rolling.hexdigest() == "d8e11262d3bc81107fdb4159845fe73fb698e078be71094156175c3bd1dbe5b5"


@settings(max_examples=40)
@given(st.integers(0, 600), st.lists(st.integers(1, 300), max_size=6))
def test_growing_in_steps_is_growing_at_once(first: int, steps: list[int]) -> None:
    tiles: dict[tuple[int, int], bytes] = {}
    size = 0
    for count in [first, *steps]:
        leaves = [leaf_hash(entry) for entry in ENTRIES[size : size + count]]
        edge = lambda level, index, width: tiles[level, index][: 32 * width]  # noqa: E731
        for level, index, data, _ in list(btlog.grow(size, edge, leaves)):
            tiles[level, index] = data
        size += count
    assert tiles == tiles_of(ENTRIES[:size])
    assert btlog.Tiles(size, edge).hash(0, size) == mth(ENTRIES[:size])


# --- The checkers, with terms in the place of hashes: what they accept, of all that can be said ----------------------------------


class Term:
    """A leaf, a node over two terms, or a variable. Comparing one with another binds variables, if it can be made equal."""

    made: ClassVar[dict[tuple[Any, ...], Term]] = {}
    bound: ClassVar[dict[Any, Term]] = {}

    def __init__(self, *parts: Any) -> None:
        self.parts = parts

    @classmethod
    def of(cls, *parts: Any) -> Term:
        """The term with these parts, of which there is one."""
        return cls.made.setdefault(tuple(map(id, parts)) if len(parts) == 2 else parts, cls(*parts))

    def __len__(self) -> int:
        return 32

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        if self is other or not isinstance(other, Term):
            return self is other
        for a, b in (self, other), (other, self):
            if len(a.parts) == 3:  # "variable", what, which
                return self.bound.setdefault(a.parts[1:], b) is b
        return len(self.parts) == len(other.parts) == 2 and self.parts[0] == other.parts[0] and self.parts[1] == other.parts[1]


def term_root(first: int, size: int, odd: int = -1) -> Term:
    """MTH of RFC 6962 over leaves; that at `odd` is another one."""
    if size == 1:
        return Term.of(f"leaf {first}" + "'" * (first == odd))
    k = k_of(size)
    return Term.of(term_root(first, k, odd), term_root(first + k, size - k, odd))


def term_path(m: int, first: int, size: int) -> list[Term]:
    """PATH of RFC 6962."""
    if size == 1:
        return []
    k = k_of(size)
    if m < k:
        return [*term_path(m, first, k), term_root(first + k, size - k)]
    return [*term_path(m - k, first + k, size - k), term_root(first, k)]


def term_subproof(m: int, first: int, size: int, whole: bool) -> list[Term]:
    """SUBPROOF of RFC 6962."""
    if m == size:
        return [] if whole else [term_root(first, size)]
    k = k_of(size)
    if m <= k:
        return [*term_subproof(m, first, k, whole), term_root(first + k, size - k)]
    return [*term_subproof(m - k, first + k, size - k, False), term_root(first, k)]


def solved(check: Callable[..., None], *what: Any) -> dict[Any, Term] | None:
    """What the variables have to be for a checker to accept; None if it never does."""
    Term.bound = {}
    try:
        check(*what)
    except BadProof:
        return None
    return Term.bound


@pytest.fixture
def terms(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(btlog, "node_hash", Term.of)
    Term.made = {}
    yield
    Term.made = {}


def variables(count: int) -> list[Term]:
    return [Term.of("variable", "proof", i) for i in range(count)]


@pytest.mark.parametrize("most", [64, pytest.param(128, marks=pytest.mark.slow)])
def test_check_inclusion_accepts_the_proofs_of_the_definition_and_no_others(terms: None, most: int) -> None:
    """Of all sequences of all terms: each hash of a proof, and the leaf, is a variable, and there is one solution."""
    leaf = Term.of("variable", "leaf", 0)
    for size in range(1, most + 1):
        tree = Tree(size, cast(Any, term_root(0, size)))
        for index in range(size):
            right = term_path(index, 0, size)
            for length in range(size.bit_length() + 3):
                found_ = solved(btlog.check_inclusion, leaf, index, tree, variables(length))
                if length == len(right):
                    assert found_ == {("leaf", 0): Term.of(f"leaf {index}"), **{("proof", i): t for i, t in enumerate(right)}}
                else:
                    assert found_ is None


@pytest.mark.parametrize("most", [40, pytest.param(128, marks=pytest.mark.slow)])
def test_check_consistency_accepts_the_proofs_of_the_definition_and_no_others(terms: None, most: int) -> None:
    """And none at all from a tree that the new one does not begin with."""
    for new in range(2, most + 1):
        tree = Tree(new, cast(Any, term_root(0, new)))
        for old in range(1, new):
            before, right = Tree(old, cast(Any, term_root(0, old))), term_subproof(old, 0, new, True)
            others = [Tree(old, cast(Any, term_root(0, old, odd))) for odd in {0, old // 2, old - 1}]
            for length in range(new.bit_length() + 3):
                found_ = solved(btlog.check_consistency, before, tree, variables(length))
                assert found_ == ({("proof", i): t for i, t in enumerate(right)} if length == len(right) else None)
                for other in others:
                    assert solved(btlog.check_consistency, other, tree, variables(length)) is None


def collision(checks: Iterable[Callable[[], None]], patch: pytest.MonkeyPatch) -> tuple[bytes, bytes]:
    """Two inputs with one hash, from two proofs that are accepted for one place and root, and for different leaves."""
    real, inputs = btlog.node_hash, dict[bytes, bytes]()
    found_: list[tuple[bytes, bytes]] = []

    def node(left: bytes, right: bytes) -> bytes:
        out = real(left, right)
        if inputs.setdefault(out, left + right) != left + right:
            found_.append((inputs[out], left + right))
        return out

    patch.setattr(btlog, "node_hash", node)
    for check in checks:
        check()
    return found_[0]


def test_two_leaves_for_one_place_are_a_collision(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reduction: whoever has two accepted proofs has a collision of the hash. With a weak hash, it can be seen."""

    def weak(data: bytes) -> bytes:
        return hashlib.sha256(data).digest()[:1] * 32

    monkeypatch.setattr(btlog, "node_hash", lambda left, right: weak(left + right))
    found_ = 0
    for size in range(2, 20):
        for index in range(size):
            proof = [bytes([7 * i % 256]) * 32 for i in range(len(path(index, [b""] * size)))]
            by_root: dict[bytes, tuple[bytes, list[bytes]]] = {}
            for n in range(256):
                leaf, proof = bytes([n]) * 32, [bytes([n * 31 % 251]) * 32, *proof[1:]]
                root = btlog._climb(index, size - 1, leaf, proof)[1]
                if root in by_root:
                    both = [functools.partial(btlog.check_inclusion, a, index, Tree(size, root), b) for a, b in (by_root[root], (leaf, proof))]
                    with monkeypatch.context() as patch:
                        one, other = collision(both, patch)
                    assert (one != other, weak(one)) == (True, weak(other))
                    found_ += 1
                    break
                by_root[root] = leaf, proof
    assert found_ == sum(range(2, 20))


# --- Keys and notes ----------------------------------------------------------------------------------------------------

LOG, WITNESS, PQ = VerifierKey.parse(LOG_VKEY), VerifierKey.parse(WITNESS_VKEY), VerifierKey.parse(PQ_VKEY)
SIGNER, COSIGNER = btlog.Signer.parse(LOG_SKEY), btlog.Signer.parse(WITNESS_SKEY)
POLICY = btlog.simple_policy([LOG], [WITNESS])
UNWITNESSED = btlog.simple_policy([LOG])
TEXT_70000 = SIGNED.partition("\n\n")[0] + "\n"


def signature_line(key: btlog.Signer, text: str, seconds: int = 0) -> str:
    """A note's signature line, or with a time the line of a cosignature, made without what btlog makes it with."""
    raw = key._key
    if not seconds:
        return f"— {key.name} {b64(key.key.key_id + raw.sign(text.encode()).signature)}\n"
    message = b"cosignature/v1\ntime %d\n" % seconds + text.encode()
    key_id = hashlib.sha256(key.name.encode() + b"\n\x04" + key.key.key).digest()[:4]
    return f"— {key.name} {b64(key_id + seconds.to_bytes(8, 'big') + raw.sign(message).signature)}\n"


def note_of(text: str, *lines: str) -> bytes:
    return f"{text}\n{''.join(lines)}".encode()


def new_key(name: str) -> btlog.Signer:
    return btlog.Signer(name, hashlib.sha256(name.encode()).digest())


def test_T46_keys_of_go() -> None:
    for vkey in LOG_VKEY, WITNESS_VKEY_4, PQ_VKEY:
        assert btlog.encode_vkey(VerifierKey.parse(vkey)) == vkey
    as_witness = VerifierKey.parse(WITNESS_VKEY_4)
    assert btlog.as_witness(WITNESS) == as_witness == btlog.as_witness(as_witness)
    assert (SIGNER.key, COSIGNER.key) == (LOG, WITNESS)
    assert (SIGNER.encode(), COSIGNER.encode()) == (LOG_SKEY, WITNESS_SKEY)
    assert btlog.encode_vkey(btlog.Signer.parse(BT_LOG_SKEY).key) == BT_LOG_VKEY
    assert (PQ.kind, len(PQ.key)) == (0x06, 1312)
    seeds = (hashlib.sha256(b"%d" % i).digest() for i in itertools.count())  # their base64 may hold plus signs
    keys = (btlog.Signer("plus.example", seed).key for seed in seeds)
    key = next(key for key in keys if btlog.encode_vkey(key).count("+") > 3)
    assert VerifierKey.parse(btlog.encode_vkey(key)) == key


def test_T46_what_is_no_vkey() -> None:
    for vkey in (
        "", "a", "a+b", "a+b+c", "+" + LOG_VKEY.partition("+")[2], LOG_VKEY + "\n", " " + LOG_VKEY, LOG_VKEY + "+",
        LOG_VKEY.upper(), LOG_VKEY.replace("fdabb4f8", "FDABB4F8"), LOG_VKEY.replace("fdabb4f8", "fdabb4f9"),
        LOG_VKEY.replace("fdabb4f8", "0fdabb4f8"), LOG_VKEY.replace("log.example", "log example"),
        LOG_VKEY.replace("log.example", "log\u00a0example"), LOG_VKEY[:-4],
        "x+" + hashlib.sha256(b"x\n").hexdigest()[:8] + "+", LOG_SKEY, LOG_VKEY.replace("log.example", "log\udc80"),
    ):
        refuses(Malformed, VerifierKey.parse, vkey)


def test_T46_keys_have_a_known_type_and_its_length() -> None:
    for kind in 0, 2, 3, 5, 0xFA, 0xFF:
        key_id = hashlib.sha256(b"x\n" + bytes([kind]) + LOG.key).hexdigest()[:8]
        refuses(Malformed, VerifierKey.parse, f"x+{key_id}+{b64(bytes([kind]) + LOG.key)}")
        refuses(Malformed, VerifierKey, "x", kind, LOG.key)
    for kind, length in (1, 31), (1, 33), (1, 0), (4, 31), (4, 1312), (6, 32), (6, 1311):
        refuses(Malformed, VerifierKey, "x", kind, bytes(length))


def test_T38_names_of_at_most_255_bytes() -> None:
    for name in "a" * 255, "é" * 127 + "a":
        assert VerifierKey(name, 1, bytes(32)).name == name
        assert Checkpoint.parse(f"{name}\n0\n{ROOTS[0]}\n").origin == name
    for name in "a" * 256, "é" * 128, "", "a\nb", "a\tb", "a\x1f", "a b", "a+b", "a\u2003b", "a\u0085":
        refuses(Malformed, VerifierKey, name, 1, bytes(32))
    for name in "a" * 256, "é" * 128, "", "a\nb", "a\tb", "a\x1f", "\udcff", "a\x00":
        refuses(Malformed, Checkpoint.parse, f"{name}\n0\n{ROOTS[0]}\n")
        refuses(Malformed, btlog.check_origin, name)
    refuses(Malformed, btlog.check_origin, f"a\n0\n{ROOTS[0]}")
    for origin in "a" * 255, "go.sum database tree", "a+b", "a\u2003b", "a\u0085", "x\x7f":
        assert btlog.check_origin(origin) == Checkpoint.parse(f"{origin}\n0\n{ROOTS[0]}\n").origin == origin


def test_what_is_no_private_key_is_not_quoted() -> None:
    for skey in (
        "", LOG_VKEY, LOG_SKEY + "\n", LOG_SKEY.replace("fdabb4f8", "fdabb4f9"), LOG_SKEY.replace("PRIVATE", "PUBLIC"),
        LOG_SKEY[:-4], LOG_SKEY.replace("+AY", "+BI"), LOG_SKEY.replace("log.example", "log example"), "PRIVATE+KEY+x",
    ):
        with pytest.raises(Malformed) as caught:
            btlog.Signer.parse(skey)
        assert "XBV0uM3" not in "".join(map(str, (caught.value, caught.value.__context__, *caught.value.args)))
    assert "seed" not in repr(SIGNER)


def test_open_what_go_signed() -> None:
    opened = open_checkpoint(COSIGNED.encode(), POLICY)
    assert opened == Checkpoint("log.example/vectors", Tree(70_000, base64.b64decode(ROOTS[70_000])))
    assert opened.cosigned == ((VerifierKey.parse(WITNESS_VKEY_4), COSIGNED_AT),)
    for note in SIGNED, COSIGNED:
        assert open_checkpoint(note.encode(), UNWITNESSED).cosigned == ()
    refuses(BadSignature, open_checkpoint, SIGNED.encode(), POLICY)
    assert SIGNER.sign(opened) == SIGNED.encode()


def test_T39_cosignature_time() -> None:
    text = TEXT_70000
    assert signature_line(COSIGNER, text, COSIGNED_AT) == COSIGNATURE
    key = btlog.as_witness(WITNESS)
    for seconds in 1, 2**63 - 1:
        note = note_of(text, signature_line(SIGNER, text), signature_line(COSIGNER, text, seconds))
        assert open_checkpoint(note, POLICY).cosigned == ((key, seconds),)
    for seconds in 0, 2**63, 2**64 - 1:
        message = b"cosignature/v1\ntime %d\n" % seconds + text.encode()
        value = key.key_id + seconds.to_bytes(8, "big") + COSIGNER._key.sign(message).signature
        note = note_of(text, signature_line(SIGNER, text), f"— {WITNESS.name} {b64(value)}\n")
        refuses(BadSignature, open_checkpoint, note, POLICY)


def test_T45_signatures_in_any_order_and_number() -> None:
    text = TEXT_70000
    log, witness = signature_line(SIGNER, text), signature_line(COSIGNER, text, 5)
    later = signature_line(COSIGNER, text, 9)
    unknown = [signature_line(new_key(f"unknown{i}.example"), text) for i in range(97)]
    for lines in (
        [log, witness], [witness, log], [log, log, witness], [log, *unknown[:15], witness], [*unknown, log, witness],
    ):
        assert open_checkpoint(note_of(text, *lines), POLICY).cosigned[0][1] == 5
    assert open_checkpoint(note_of(text, later, log, witness), POLICY).cosigned == ((btlog.as_witness(WITNESS), 9),)
    refuses(BadSignature, open_checkpoint, note_of(text, log, *unknown), POLICY)
    refuses(BadSignature, open_checkpoint, note_of(text, witness, *unknown), POLICY)
    second = new_key(LOG.name)
    both = btlog.simple_policy([LOG, second.key], [WITNESS])
    for lines in [signature_line(second, text), witness], [log, witness, signature_line(second, text)]:
        assert open_checkpoint(note_of(text, *lines), both).origin == LOG.name


def test_T40_unknown_signatures_are_ignored_and_false_ones_are_not() -> None:
    text = TEXT_70000
    log, witness = signature_line(SIGNER, text), signature_line(COSIGNER, text, 5)
    unknown = [signature_line(new_key(f"unknown{i}.example"), text) for i in range(15)]
    for at in range(16):
        lines = [*unknown[:at], log, *unknown[at:]]
        assert open_checkpoint(note_of(text, *lines), UNWITNESSED).tree.size == 70_000
    # a key of another name with our ID, and of our name with another ID: unknown
    for name, key_id in ("other.example", LOG.key_id), (LOG.name, b"abcd"):
        line = f"— {name} {b64(key_id + bytes(64))}\n"
        assert open_checkpoint(note_of(text, log, line), UNWITNESSED)
        refuses(BadSignature, open_checkpoint, note_of(text, line), UNWITNESSED)
    other = text.replace("70000", "70001")
    for line in (
        signature_line(SIGNER, other), f"— {LOG.name} {b64(LOG.key_id + bytes(64))}\n",
        f"— {LOG.name} {b64(LOG.key_id + b'short')}\n",
        f"— {LOG.name} {b64(LOG.key_id + base64.b64decode(log.split()[2])[4:] + b'!')}\n",
        signature_line(COSIGNER, other, 5), f"— {WITNESS.name} {b64(btlog.as_witness(WITNESS).key_id + bytes(7))}\n",
    ):
        for lines in [log, witness, line], [line, log, witness]:
            refuses(BadSignature, open_checkpoint, note_of(text, *lines), POLICY)


def test_T57_the_key_of_one_origin_does_not_speak_for_another() -> None:
    text = f"other.example\n1\n{ROOTS[1]}\n"
    other = new_key("other.example")
    both = btlog.simple_policy([LOG, other.key])
    for policy in UNWITNESSED, both:
        refuses(BadSignature, open_checkpoint, note_of(text, signature_line(SIGNER, text)), policy)
    assert open_checkpoint(note_of(text, signature_line(SIGNER, text), signature_line(other, text)), both)


def test_T44_only_the_last_empty_line_separates() -> None:
    text = "a\n\nb\n\n\nc\n"
    assert btlog.open_note(note_of(text, signature_line(SIGNER, text)), [LOG]) == (text, {LOG: 0})
    for part in text, "\n":
        assert btlog.split_note(note_of(part, signature_line(SIGNER, part)))[0] == part
    blank = TEXT_70000 + "\nextension\n"  # a checkpoint has no empty lines
    refuses(Malformed, open_checkpoint, note_of(blank, signature_line(SIGNER, blank)), UNWITNESSED)


LINE = SIGNED.split("\n")[4]


def test_T43_what_is_no_note() -> None:
    for note in (
        "", "\n", "\n\n", "a\n", "a\n\n", SIGNED[:-1], SIGNED.replace("\n\n", "\n"), SIGNED + "\n", "\n" + LINE + "\n",
        SIGNED.replace("\n", "\r\n"), SIGNED.replace("— ", "- "), SIGNED.replace("— ", "—  "),
        SIGNED.replace("— ", "—"), SIGNED.replace("— ", "– "), SIGNED + " \n", SIGNED + "x\n", SIGNED + LINE,
        SIGNED.replace("=\n", "=  \n"), SIGNED + LINE + " x\n", SIGNED + "— a\n", SIGNED + "— a \n",
        SIGNED + "— a YWJjZA==\n", SIGNED + "—  YWJjZGU=\n", SIGNED + "— a+b YWJjZGU=\n", SIGNED + "— a YWJjZGV=\n",
        SIGNED + "— a YWJjZGU\n", SIGNED + "— a\u2003b YWJjZGU=\n", SIGNED.replace("\n\n", "\n \n"),
        "\ufeff" + SIGNED[:30], SIGNED.replace("log", "l\0g"), SIGNED.replace("log", "l\tg"),
    ):
        refuses(Malformed, btlog.split_note, note.encode())


def test_limits_of_notes() -> None:
    many = [f"— key{i}.example {b64(b'abcdefgh')}\n" for i in range(101)]
    assert len(btlog.split_note(note_of("a\n", *many[:100]))[1]) == 100
    refuses(Malformed, btlog.split_note, note_of("a\n", *many))
    start = time.perf_counter()
    refuses(Malformed, btlog.split_note, note_of("a\n", *(many * 1000)))
    assert time.perf_counter() - start < 1
    refuses(Malformed, btlog.split_note, note_of("a" * 1_000_000 + "\n", many[0]))


def test_what_is_no_checkpoint() -> None:
    root = ROOTS[1]
    for text in (
        "", "\n", "a\n", "a\n1\n", f"a\n1\n{root}", f"\n1\n{root}\n", f"a\n01\n{root}\n", f"a\n-1\n{root}\n",
        f"a\n1 \n{root}\n", f"a\n{2**63}\n{root}\n", f"a\n1\n{root[:-1]}\n", f"a\n1\n{b64(bytes(31))}\n",
        f"a\n1\n{b64(bytes(33))}\n", f"a\n1\n{root}\n\n", f"a\n1\n{root}\n\nx\n", f"{'a' * 256}\n1\n{root}\n", f"a\n\n{root}\n",
        f"a\n1\n\n{root}\n", f"a\n1\n{root}=\n", f"a\n\n1\n{root}\n",
    ):
        refuses(Malformed, Checkpoint.parse, text)


def test_T37_extension_lines_are_covered_by_signatures() -> None:
    text = f"{LOG.name}\n1\n{ROOTS[1]}\nextension 1\nß\n"
    note = note_of(text, signature_line(SIGNER, text), signature_line(COSIGNER, text, 7))
    opened = open_checkpoint(note, POLICY)
    assert opened.extensions == ("extension 1", "ß")
    assert btlog.encode_checkpoint(opened) == text
    refuses(BadSignature, open_checkpoint, note.replace(b"extension 1", b"extension 2"), POLICY)


# --- Policies ------------------------------------------------------------------------------------------------------------

W = [VerifierKey(f"w{i}.example", 4, hashlib.sha256(b"%d" % i).digest()) for i in range(6)]
VKEYS = [btlog.encode_vkey(key) for key in W]
WITNESS_LINES = "".join(f"witness W{i} {vkey} https://w{i}.example/\n" for i, vkey in enumerate(VKEYS))
TWO_AND_ONE = "group X 2 W0 W1 W2\n group\tY any W3  W4 W5 \ngroup both all X Y\nquorum both\n"


def policy_file(text: str) -> bytes:
    return f"# a policy\n\nlog {LOG_VKEY} https://log.example/\n{WITNESS_LINES}{text}".encode()


def test_policy_of_the_specification() -> None:
    """The example of tlog-policy: two of three X and any of three Y."""
    policy = parse_policy(policy_file(TWO_AND_ONE))
    assert policy.logs == (LOG,)
    assert policy.witnesses == tuple(W)
    assert policy.quorum == Quorum(2, (Quorum(2, (W[0], W[1], W[2])), Quorum(1, (W[3], W[4], W[5]))))
    assert policy.urls[:2] == ((LOG, "https://log.example/"), (W[0], "https://w0.example/"))
    for cosigners in itertools.chain.from_iterable(itertools.combinations(range(6), n) for n in range(7)):
        wanted = sum(i < 3 for i in cosigners) >= 2 and any(i >= 3 for i in cosigners)
        assert policy.quorum.met([W[i] for i in cosigners]) is wanted


def test_simple_quorums_and_deep_ones() -> None:
    assert parse_policy(b"quorum none\n").quorum.met([])
    assert parse_policy(policy_file("quorum W1\n")).quorum == Quorum(1, (W[1],))
    assert parse_policy(policy_file("quorum none\n")).quorum == Quorum(0, ())
    for vkey in WITNESS_VKEY, WITNESS_VKEY_4:  # Go hands out type 0x01
        assert parse_policy(f"log {LOG_VKEY}\nwitness a {vkey}\nquorum a\n".encode()) == POLICY
    two = f"log {LOG_VKEY}\nwitness a {WITNESS_VKEY}\nwitness b {PQ_VKEY}\ngroup g any a b\nquorum g\n"
    assert open_checkpoint(COSIGNED.encode(), parse_policy(two.encode())).cosigned[0][0].name == "witness.example/w1"
    keys = [VerifierKey(f"x{i}", 4, hashlib.sha256(b"x%d" % i).digest()) for i in range(64)]  # as many as recommended
    lines = [f"witness n{i} {btlog.encode_vkey(key)}" for i, key in enumerate(keys)]
    lines += [f"log {btlog.encode_vkey(new_key(f'l{i}').key)}" for i in range(64)]
    lines += ["group g0 all n0"] + [f"group g{i} all n{i} g{i - 1}" for i in range(1, 64)] + ["quorum g63"]
    policy = parse_policy("".join(f"{line}\n" for line in lines).encode())
    assert policy.quorum.met(keys)
    assert not policy.quorum.met(keys[1:])


def test_T47_what_is_no_policy() -> None:
    """Some of these would always be satisfied, or by one witness under two names."""
    for text in (
        "", "# quorum none\n", "quorum none", "quorum none\nquorum none\n", "quorum W0\nquorum W0\n", "quorum W9\n",
        "quorum\n", "quorum W0 W1\n", "quorum g\ngroup g any W0\n", "quorum none # comment\n",
        f"witness W0 {PQ_VKEY}\nquorum none\n", f"witness none {PQ_VKEY}\nquorum none\n",
        f"witness X {VKEYS[0]}\nquorum none\n", "other\nquorum none\n", f"log {LOG_VKEY}\nquorum none\n",
        f"log {VKEYS[0]}\nquorum none\n", "log\nquorum none\n", "log x\nquorum none\n",
        f"witness X {VKEYS[0].replace('w0', 'other')}\nquorum none\n", f"witness X {PQ_VKEY} u v\nquorum none\n",
        f"log {btlog.encode_vkey(new_key('l0').key)} u v\nquorum none\n", "group g any W0 W0\nquorum W1\n",
        "quorum none\r\n", "quorum none\x0b\n", "quorum none\x00\n", "quorum none\x7f\n", "quorum n\u00f6ne\n",
        "group g all W0 W1\nquorum G\n", "Quorum none\n", "quorum None\n", "quorum\u00a0none\n",
        "group g any W0\ngroup h any W0\nquorum h\n", "group none any W0\nquorum none\n", "group W0 any W1\nquorum W0\n",
    ):
        refuses(Malformed, parse_policy, policy_file(text))
    for group in (
        " 0 W0 W1", " 3 W0 W1", " 01 W0", " +1 W0", " -1 W0", "", " any", " all", " 1", " any W0 W0", " any g",
        " any none", " any h\ngroup h any W0", " \u0661 W0",
    ):
        refuses(Malformed, parse_policy, policy_file(f"group g{group}\nquorum g\n"))


def test_T47_names_are_bytes_and_comments_whole_lines() -> None:
    kelvin, k = "\u212a".encode(), b"K"
    file = policy_file("").replace(b" W0 ", b" %b " % kelvin).replace(b" W1 ", b" K ").replace(b" W2 ", b" \xff# ")
    policy = parse_policy(file + b"\t # a comment \xff\n \t \ngroup g all \xff# " + k + b"\nquorum g\n")
    assert policy.quorum == Quorum(2, (W[2], W[1]))
    assert parse_policy(policy_file("quorum W0\n").replace(VKEYS[0].encode(), PQ_VKEY.encode())).quorum.members == (PQ,)
    one_key_two_types = f"witness a {WITNESS_VKEY}\nwitness b {WITNESS_VKEY_4}\nquorum none\n"
    refuses(Malformed, parse_policy, one_key_two_types.encode())
    refuses(Malformed, parse_policy, b"#" * btlog.MAX_POLICY + b"\nquorum none\n")


def test_T64_groups_within_groups_have_a_bound() -> None:
    lines = "".join(f"group g{i} any g{i - 1}\n" for i in range(1, 5000))
    refuses(Malformed, parse_policy, policy_file(f"group g0 any W0\n{lines}quorum g4999\n"))


def test_policies_as_values_hold_the_same_rules() -> None:
    for make in (
        lambda: Quorum(0, (W[0],)), lambda: Quorum(2, (W[0],)), lambda: Quorum(1, ()), lambda: Quorum(-1, ()),
        lambda: Policy((LOG, LOG)), lambda: Policy((LOG,), (W[0], W[0])), lambda: Policy((W[0],)),
        lambda: Policy((PQ,)), lambda: Policy((LOG,), (WITNESS,)), lambda: Policy((LOG,), (), Quorum(1, (W[0],))),
        lambda: Policy((LOG,), (W[0],), Quorum(1, (W[0], W[0]))), lambda: Policy((LOG, VerifierKey("x", 1, LOG.key))),
        lambda: Policy((LOG,), (W[0], W[1]), Quorum(2, (W[0], Quorum(1, (W[0], W[1]))))),
        lambda: btlog.simple_policy([LOG], [WITNESS], 2), lambda: btlog.simple_policy([LOG], [WITNESS], 0),
    ):
        refuses(Malformed, make)
    assert Policy((LOG,), (btlog.as_witness(WITNESS),), Quorum(1, (btlog.as_witness(WITNESS),))) == POLICY


# --- Ed25519 without PyNaCl: what libsodium accepts, and nothing else ------------------------------------------------------------

FIELD, GROUP = 2**255 - 19, 2**252 + 27742317777372353535851937790883648493


def both_verify(key: bytes, message: bytes, signature: bytes) -> bool:
    """What both verifications say of a signature, with PyNaCl and without."""
    libsodium = btlog.verify_ed25519(key, message, signature)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(btlog, "signing", None)
        assert btlog.verify_ed25519(key, message, signature) is libsodium, (key.hex(), message.hex(), signature.hex())
    return libsodium


def test_ed25519_as_wycheproof_has_it() -> None:
    vectors = json.loads((HERE / ".ci" / "vectors" / "ed25519_wycheproof.json").read_text())
    seen = 0
    for group in vectors["testGroups"]:
        key = bytes.fromhex(group["publicKey"]["pk"])
        for case in group["tests"]:
            good = both_verify(key, bytes.fromhex(case["msg"]), bytes.fromhex(case["sig"]))
            assert good is (case["result"] == "valid"), case
            seen += 1
    assert seen == vectors["numberOfTests"] == 151


def compress(point: tuple[int, int, int, int]) -> bytes:
    inverse = pow(point[2], -1, FIELD)
    x, y = point[0] * inverse % FIELD, point[1] * inverse % FIELD
    return (y | (x & 1) << 255).to_bytes(32, "little")


def times(k: int, point: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    total = (0, 1, 1, 0)
    while k:
        total = btlog._plus(total, point) if k & 1 else total
        point, k = btlog._plus(point, point), k >> 1
    return total


def torsion() -> list[tuple[int, int, int, int]]:
    """The eight points of small order, the neutral one first."""
    candidates = (btlog._point(y.to_bytes(32, "little")) for y in range(2, 100))
    found_ = (times(GROUP, point) for point in candidates if point)
    eighth = next(point for point in found_ if times(4, point)[1] != times(4, point)[2])
    return [times(i, eighth) for i in range(8)]


def test_ed25519_with_points_of_small_order_and_other_encodings() -> None:
    """Each point of a key and a signature with each of small order added, alone, and as bytes that are not canonical."""
    base, message, counts = btlog._point(b"\x58" + 31 * b"\x66"), b"message", {True: 0, False: 0}
    assert base
    small = torsion()
    assert len({compress(point) for point in small}) == 8
    for (i, s), (j, t) in itertools.product(enumerate(small), repeat=2):
        for a, r in ((3, 5), (7, 0), (0, 9)) if i == j or not i else ((3, 5),):
            key, first = compress(btlog._plus(times(a, base), s)), compress(btlog._plus(times(r, base), t))
            k = int.from_bytes(hashlib.sha512(first + key + message).digest(), "little") % GROUP
            for scalar in ((r + k * a) % GROUP, (r + k * a) % GROUP + GROUP):
                good = both_verify(key, message, first + scalar.to_bytes(32, "little"))
                counts[good] += 1
                assert not good or (a and r and scalar < GROUP and (j + k * i) % 8 == 0)
    assert counts == {True: 11, False: 177}
    for y in (*range(FIELD, 2**255), 0, 1, FIELD - 1):  # not reduced, and the neutral element with a sign
        for sign in 0, 1 << 255:
            data = (y | sign).to_bytes(32, "little")
            assert not both_verify(data, message, compress(base) + bytes(32))
            assert not both_verify(compress(base), message, data + bytes(32))


def flips(count: int) -> None:
    key = nacl.signing.SigningKey(b"k" * 32)
    for i in range(count):
        message = i.to_bytes(8, "big")
        whole = bytearray(key.verify_key.encode() + key.sign(message).signature + message)
        assert i % 50 or both_verify(bytes(whole[:32]), message, bytes(whole[32:96]))
        bit = int.from_bytes(hashlib.sha256(message).digest()[:4], "big") % (8 * len(whole))
        whole[bit // 8] ^= 1 << bit % 8
        assert not both_verify(bytes(whole[:32]), bytes(whole[96:]), bytes(whole[32:96]))


def test_ed25519_with_a_bit_flipped() -> None:
    flips(200)


@pytest.mark.slow
def test_ed25519_with_a_bit_flipped_many_times() -> None:
    flips(10_000)


def test_other_lengths_are_no_ed25519() -> None:
    key = nacl.signing.SigningKey(b"k" * 32)
    signature = key.sign(b"m").signature
    for length in range(70):
        assert both_verify(key.verify_key.encode(), b"m", (signature + bytes(6))[:length]) is (length == 64)
        assert not both_verify((key.verify_key.encode() + bytes(40))[:length], b"m", signature) or length == 32


def test_verify_on_a_bare_python(tmp_path: Path) -> None:
    """Before anything is installed; to sign says what is missing."""
    file = wheel(tmp_path / "some-1.0.whl")
    (tmp_path / "proof").write_bytes(proof_of_one(Entry(file.name, btlog.checksum_of(file))))
    (tmp_path / "key").write_text(LOG_VKEY)
    for words, code, says in [
        (("verify", "some-1.0.whl", "--public-key", "key", "--proof", "proof"), 0, "logged at index 0"),
        (("keygen", "--origin", "log.example/x"), 3, "btlog: signing needs PyNaCl: python -m pip install 'PyNaCl"),
    ]:
        bare = [sys.executable, "-S", str(SOURCE), *words]
        done = subprocess.run(bare, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == code, done
        assert says in done.stdout + done.stderr
    assert not (tmp_path / "private.key").exists()


# --- ML-DSA-44: cosignatures of type 0x06 ---------------------------------------------------------------------------------------

PQ_NOTE = (HERE / ".ci" / "vectors" / "ml_dsa_44_cosigned.txt").read_bytes()  # made by Go: signed, and cosigned by PQ
PQ_AT = 1795358524


def test_ml_dsa_44_as_wycheproof_has_it() -> None:
    vectors = json.loads(gzip.decompress((HERE / ".ci" / "vectors" / "mldsa44_verify_wycheproof.json.gz").read_bytes()))
    results = {"valid": 0, "invalid": 0}
    for group in vectors["testGroups"]:
        for case in group["tests"]:
            words = (bytes.fromhex(text) for text in (group["publicKey"], case["msg"], case["sig"], case.get("ctx", "")))
            assert btlog.verify_ml_dsa_44(*words) is (case["result"] == "valid"), case["tcId"]
            results[case["result"]] += 1
    assert results == {"valid": 77, "invalid": 103}


def test_a_log_may_have_keys_that_are_not_used_here() -> None:
    """A `log` line of another type, 0x06 or 0x02, is kept for others, as long as one key can be used."""
    ecdsa = f"log.example/vectors+0a1b2c3d+{b64(bytes([2]) + bytes(91))}"
    lines = [f"log {vkey}\n" for vkey in (PQ_VKEY, ecdsa, LOG_VKEY)]
    for order in itertools.permutations(lines):
        assert parse_policy("".join([*order, "quorum none\n"]).encode()).logs == (LOG,)
    bad = [lines[:2], [lines[0], lines[0], lines[2]], [lines[2], lines[1].replace("0a1b2c3d", "0a1b2c3")],
           [lines[2], f"log x+0a1b2c3d+{b64(b'')}\n"], [lines[2], f"log x\xa0y+0a1b2c3d+{b64(bytes([2]) + bytes(9))}\n"]]  # fmt: skip
    for some in bad:
        refuses(Malformed, parse_policy, "".join([*some, "quorum none\n"]).encode())


def test_two_keys_that_no_signature_line_can_tell_apart() -> None:
    """Of one name and one key ID: one of them would hide the other."""
    other = dataclasses.replace(btlog.as_witness(WITNESS), key=bytes(32))
    other.__dict__["key_id"] = btlog.as_witness(WITNESS).key_id  # as if somebody had searched for a collision
    refuses(Malformed, btlog.simple_policy, [LOG], [WITNESS, other])


def test_an_ml_dsa_witness_counts() -> None:
    """As Go's library has cosigned it; in a quorum with and without another one."""
    assert open_checkpoint(PQ_NOTE, btlog.simple_policy([LOG], [PQ])).cosigned == ((PQ, PQ_AT),)
    assert open_checkpoint(PQ_NOTE, btlog.simple_policy([LOG], [WITNESS, PQ], 1)).cosigned == ((PQ, PQ_AT),)
    refuses(BadSignature, open_checkpoint, PQ_NOTE, btlog.simple_policy([LOG], [WITNESS, PQ]))
    assert open_checkpoint(PQ_NOTE, UNWITNESSED).cosigned == ()
    both = PQ_NOTE + COSIGNED.encode().splitlines(keepends=True)[-1]
    assert len(open_checkpoint(both, btlog.simple_policy([LOG], [WITNESS, PQ])).cosigned) == 2


def test_an_ml_dsa_cosignature_is_of_one_witness_one_time_and_one_tree() -> None:
    """All of the `cosigned_message` counts; extension lines do not ("no statement is made about them")."""
    text, [*_, (_, key_id, signature)] = btlog.split_note(PQ_NOTE)
    assert key_id == PQ.key_id
    assert PQ.verify(text, signature) == PQ.verify(f"{text}extension\n", signature) == PQ_AT
    origin, size, root = text.split("\n")[:3]
    others = [
        f"{origin}x\n{size}\n{root}\n", f"{origin}\n70001\n{root}\n", f"{origin}\n{size}\n{ROOTS[1]}\n",
        f"{origin}\n{size}\nroot\n", f"{origin}\n", "", f"{'x' * 256}\n{size}\n{root}\n", f"{origin}\n-1\n{root}\n",
    ]  # fmt: skip
    for other in others:
        refuses(BadSignature, PQ.verify, other, signature)
    refuses(BadSignature, dataclasses.replace(PQ, name="witness.example/pr").verify, text, signature)
    for seconds in 0, PQ_AT + 1, 2**63:
        refuses(BadSignature, PQ.verify, text, seconds.to_bytes(8, "big") + signature[8:])
    for data in b"", signature[:8], signature[:-1], signature + b"\0":
        refuses(BadSignature, PQ.verify, text, data)


def test_the_hints_of_an_ml_dsa_signature_have_one_encoding() -> None:
    """FIPS 204, Algorithm 21: counts that do not fall, at most 80 places in order, and zeros behind them."""
    good = btlog._hints(bytes([3, 9, 0, 255]) + bytes(76) + bytes([2, 2, 4, 4]))
    assert good is not None
    assert [[at for at, hint in enumerate(poly) if hint] for poly in good] == [[3, 9], [], [0, 255], []]
    for places, counts in (
        ((), (1, 0, 0, 0)), ((), (0, 81, 81, 81)), ((9, 3), (2, 2, 2, 2)), ((3, 3), (2, 2, 2, 2)), ((3, 9), (1, 1, 1, 1)),
        (range(1, 81), (80, 80, 80, 84)), ((0, 0), (1, 2, 1, 2)),
    ):  # fmt: skip
        assert btlog._hints(bytes(places).ljust(80, b"\0") + bytes(counts)) is None


def test_an_ml_dsa_signature_with_a_byte_changed() -> None:
    """Each part of a signature and of a key counts."""
    text, [*_, (_, _, signature)] = btlog.split_note(PQ_NOTE)
    message = PQ.subtree_message(text, PQ_AT)
    assert btlog.verify_ml_dsa_44(PQ.key, message, signature[8:])
    for at in range(0, 2420, 53):
        assert not btlog.verify_ml_dsa_44(PQ.key, message, flip(at)(signature[8:]))
    for at in range(0, 1312, 131):
        assert not btlog.verify_ml_dsa_44(flip(at)(PQ.key), message, signature[8:])


@pytest.mark.slow
def test_ml_dsa_44_as_cryptography_has_it() -> None:
    """Signatures of another implementation, over messages and contexts of many lengths."""
    mldsa = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.mldsa", reason="it needs cryptography")
    for n in range(100):
        private = mldsa.MLDSA44PrivateKey.from_seed_bytes(hashlib.sha256(b"%d" % n).digest())
        key, message, context = private.public_key().public_bytes_raw(), bytes(n * 7), bytes(n % 2 * n)
        signature = private.sign(message, context)
        assert btlog.verify_ml_dsa_44(key, message, signature, context)
        assert not btlog.verify_ml_dsa_44(key, message + b"x", signature, context)
        assert not btlog.verify_ml_dsa_44(key, message, signature, context + b"x")
        assert not btlog.verify_ml_dsa_44(key, message, flip(n * 24)(signature), context)


# --- Entries -------------------------------------------------------------------------------------------------------------

SUM = "sha256:" + "5141b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be92"
NAME = "pkgname-1.2.3-py3-none-any.whl"
PUBLISHER = Publisher("https://issuer.example", "https://example.com/a b")


def test_entries_as_bt_log_encodes_them() -> None:
    plain, signed = Entry(NAME, SUM), Entry(NAME, SUM, PUBLISHER)
    assert plain.encode() == f"pypi-transparency/v1\n{SUM}\n{NAME}".encode()
    assert signed.encode() == plain.encode() + b"\npublisher https://issuer.example https://example.com/a b"
    assert [Entry.parse(e.encode()) for e in (plain, signed)] == [plain, signed]


def test_T50_filenames() -> None:
    for name in "a", "a b", "é.whl", "a+b.tar.gz", "a" * 255, "é" * 127, "a\u2028b", "publisher x y", "..", "#":
        assert Entry.parse(Entry(name, SUM).encode()).filename == name
    for name in (
        "", " a", "a ", "a/b", "a\\b", "a\nb", "a\tb", "a\0", "a\x7f", "a\x85b", "\u00a0a", "a\u3000", "a" * 256,
        "é" * 128, "\ud800", "a\npublisher b c", "a\n", "\n", "a\x1cb",
    ):
        refuses(Malformed, Entry, name, SUM)


def test_what_is_no_checksum() -> None:
    for checksum in (
        "", SUM[7:], SUM[:-1], SUM + "0", SUM.upper(), "sha256:" + SUM[7:].upper(), SUM + "\n", " " + SUM,
        "md5:" + "0" * 32, "sha512:" + SUM[7:], "sha256:" + "٧" * 64,
    ):
        refuses(Malformed, Entry, NAME, checksum)


def test_T50_what_is_no_publisher() -> None:
    """An issuer with a space would make two publishers encode alike."""
    for issuer, subject in (
        ("", "x"), ("x", ""), ("a b", "c"), ("a\u00a0b", "c"), ("a", "b\nc"), ("a\n", "b"), ("a", "b\x85"),
        ("a\tb", "c"), ("\ud800", "x"), ("x", "\udfff"),
    ):
        refuses(Malformed, Entry, NAME, SUM, Publisher(issuer, subject))


@settings(max_examples=60)
@given(st.text(max_size=20), st.none() | st.tuples(st.text(max_size=8), st.text(max_size=8)))
def test_T50_an_entry_is_what_its_encoding_says(name: str, publisher: tuple[str, str] | None) -> None:
    with contextlib.suppress(Malformed):
        entry = Entry(name, SUM, Publisher(*publisher) if publisher else None)
        assert Entry.parse(entry.encode()) == entry


def test_T49_the_largest_entry() -> None:
    room = 65_535 - len(Entry(NAME, SUM, Publisher("i", "s")).encode()) + 1
    assert len(Entry(NAME, SUM, Publisher("i", "s" * room)).encode()) == 65_535
    refuses(Malformed, Entry, NAME, SUM, Publisher("i", "s" * (room + 1)))
    refuses(Malformed, Entry, NAME, SUM, Publisher("i", "é" * (room // 2 + 1)))


def test_what_is_no_entry() -> None:
    good = Entry("a", SUM).encode()
    for data in (
        b"", b"\n\n", b"pypi-transparency/v2\n" + SUM.encode() + b"\na", b"x" + good, good + b"\n", good + b"\n\n",
        good + b"\npublisher a", good + b"\npublisher  a", good + b"\nPublisher a b", good + b"\npublisher a b\n",
        good[:-1] + b"\xff", good[:-1] + b"\xed\xa0\x80", b"x" * 70_000,
    ):
        refuses(Malformed, Entry.parse, data)


# --- Offline proofs -------------------------------------------------------------------------------------------------------


def go_proof(big: Callable[[int, int, int], bytes], extra: bytes = b"") -> bytes:
    hashes = tuple(btlog.prove_inclusion(btlog.Tiles(70_000, big), 12_345))
    return btlog.encode_proof(Proof(12_345, hashes, COSIGNED.encode(), extra))


def test_a_file_is_verified_by_its_name_and_bytes(tmp_path: Path) -> None:
    file, proof = tmp_path / NAME, proof_of_one(Entry(NAME, f"sha256:{SUM_OF_A}"))
    file.write_bytes(b"a")
    assert btlog.verify_file(file, proof, UNWITNESSED).tree.size == 1
    assert btlog.verify_file(str(file), proof, UNWITNESSED).origin == LOG.name
    refuses(BadProof, btlog.verify_file, file.rename(tmp_path / f"x{NAME}"), proof, UNWITNESSED)
    file.write_bytes(b"b")
    refuses(BadProof, btlog.verify_file, file, proof, UNWITNESSED)


def test_proofs_of_go(big: Callable[[int, int, int], bytes]) -> None:
    for extra, digest in PROOF_DIGESTS.items():
        text = go_proof(big, extra)
        assert hashlib.sha256(text).hexdigest() == digest
        assert btlog.encode_proof(Proof.parse(text)) == text
        checkpoint = check_logged(b"entry 12345", text, POLICY)
        assert (checkpoint.origin, checkpoint.tree.size, checkpoint.cosigned[0][1]) == (LOG.name, 70_000, COSIGNED_AT)
        refuses(BadProof, check_logged, b"entry 12346", text, POLICY)


def test_T56_what_is_missing_from_a_proof(big: Callable[[int, int, int], bytes]) -> None:
    text = go_proof(big)
    head, _, note = text.partition(b"\n\n")
    first, index, *hashes = head.split(b"\n")
    signed = note.partition(b"\n\n")[0]

    def proof(*lines: bytes, note: bytes = note) -> bytes:
        return b"\n".join(lines) + b"\n\n" + note

    def fails(kind: type[Error], *bad: bytes, policy: Policy = POLICY) -> None:
        for text in bad:
            refuses(kind, check_logged, b"entry 12345", text, policy)

    good = [first, index, *hashes]
    assert check_logged(b"entry 12345", proof(*good), POLICY)
    fails(
        Malformed, b"", head, head + b"\n", head + b"\n\n", text[1:], text[:-1], proof(index, *hashes), proof(first),
        proof(first, *hashes), proof(b"c2sp.org/tlog-proof@v2", index, *hashes), text.replace(b"\n", b"\r\n"),
        proof(*good, note=signed), proof(*good[:-1], hashes[-1][:-4]), proof(*good[:-1], hashes[-1] + b" "),
        proof(first, index, b"extra YQ==", *hashes), proof(first, b"extra YQ==", b"extra YQ==", index, *hashes),
        *(proof(first, extra, index, *hashes) for extra in (b"extra ", b"extra", b"extra YR==")),
        *(proof(first, b"%bndex %b" % (i, n), *hashes) for i, n in (
            (b"i", b"012345"), (b"i", b" 12345"), (b"I", b"12345"), (b"i", b"9223372036854775808"))),
    )
    fails(
        BadProof, proof(*good[:-1]), proof(*good, hashes[-1]), proof(first, index, hashes[0], *hashes),
        proof(first, index, *hashes[1:]), proof(first, b"index 12346", *hashes), proof(first, b"index 70000", *hashes),
        proof(first, index, hashes[1], hashes[0], *hashes[2:]), proof(first, index, *[hashes[0]] * 70),
    )
    unknown = signed + b"\n\n" + signature_line(new_key("unknown.example"), "x").encode()
    fails(BadSignature, *(proof(*good, note=other) for other in (unknown, SIGNED.encode(), b"\n" + note)))
    smaller = f"{LOG.name}\n{69_999}\n{ROOTS[69_999]}\n"
    fails(BadProof, proof(*good, note=note_of(smaller, signature_line(SIGNER, smaller))), policy=UNWITNESSED)


def proof_of_one(entry: Entry, extra: bytes = b"") -> bytes:
    """The proof of an entry in a log of its own."""
    checkpoint = Checkpoint(LOG.name, Tree(1, leaf_hash(entry.encode())))
    return btlog.encode_proof(Proof(0, (), SIGNER.sign(checkpoint), extra))


def test_T54_T55_extra_data_adds_a_publisher_and_changes_no_file() -> None:
    signed, plain = Entry(NAME, SUM, PUBLISHER), Entry(NAME, SUM)
    proof = proof_of_one(signed, signed.encode())
    claimed = Proof.parse(proof).entry(NAME, SUM)
    assert claimed == signed
    assert check_logged(claimed, proof, UNWITNESSED)
    refuses(BadProof, check_logged, plain, proof, UNWITNESSED)
    for other in Entry(NAME + "x", SUM, PUBLISHER), Entry(NAME, SUM[:-1] + "0", PUBLISHER), Entry(NAME[:-1], SUM):
        something_else = Proof.parse(proof_of_one(other, other.encode()))  # it is valid
        refuses(BadProof, something_else.entry, NAME, SUM)
    invented = Entry(NAME, SUM, Publisher("https://issuer.example", "mallory"))
    proof = proof_of_one(plain, invented.encode())
    refuses(BadProof, check_logged, Proof.parse(proof).entry(NAME, SUM), proof, UNWITNESSED)
    for extra in b"no entry", b"":  # W7: it is opaque
        assert Proof.parse(proof_of_one(plain, extra)).entry(NAME, SUM) == plain


# --- One byte changed -------------------------------------------------------------------------------------------------------


def as_text(parse: Callable[[str], Any]) -> Callable[[bytes], Any]:
    return lambda data: parse(data.decode("utf-8", "surrogateescape"))


def test_every_byte_of_a_key_counts() -> None:
    parsers: dict[str, Callable[[str], Any]] = {LOG_VKEY: VerifierKey.parse, WITNESS_VKEY_4: VerifierKey.parse}
    for data, parse in (parsers | {LOG_SKEY: btlog.Signer.parse}).items():
        for case in mutations(data.encode(), every=True):
            refuses(Malformed, as_text(parse), case)


def test_every_byte_of_a_note_and_checkpoint_counts() -> None:
    def encode(parts: tuple[str, list[tuple[str, bytes, bytes]]]) -> bytes:
        return note_of(parts[0], *(f"— {name} {b64(key_id + value)}\n" for name, key_id, value in parts[1]))

    def encode_checkpoint(checkpoint: Checkpoint) -> bytes:
        return btlog.encode_checkpoint(checkpoint).encode("utf-8", "surrogateescape")

    assert survives(btlog.split_note, encode, mutations(SIGNED.encode())) > 500
    assert survives(as_text(Checkpoint.parse), encode_checkpoint, mutations(TEXT_70000.encode())) > 200
    for case in mutations(SIGNED.encode()):
        refuses(Error, open_checkpoint, case, UNWITNESSED)


def test_every_byte_of_a_proof_counts(big: Callable[[int, int, int], bytes]) -> None:
    text, refused, passed = go_proof(big, b"extra data"), 0, 0
    for case in mutations(text):
        try:
            proof = Proof.parse(case)
        except Error:
            refused += 1
            continue
        assert btlog.encode_proof(proof) == case
        with contextlib.suppress(Error):
            check_logged(b"entry 12345", case, POLICY)
            passed += 1
            assert proof.extra != b"extra data" or proof.checkpoint != COSIGNED.encode()
    assert refused > 5000
    assert passed < 1500  # other extra data, which nothing authenticates; names of witnesses that nobody knows


def test_every_byte_of_an_entry_counts() -> None:
    for entry in Entry(NAME, SUM), Entry(NAME, SUM, PUBLISHER):
        assert survives(Entry.parse, Entry.encode, mutations(entry.encode(), every=True)) > 20_000


def test_every_byte_of_a_tile_path_and_a_bundle_counts() -> None:
    for path_ in PATHS.values():
        cases = mutations(path_.encode(), every=True)
        assert survives(as_text(btlog.parse_tile_path), lambda parts: btlog.tile_path(*parts).encode(), cases) > 1000
    bundle = btlog.encode_bundle([b"", b"a", b"bc" * 200])
    assert survives(lambda data: btlog.parse_bundle(data, 3), btlog.encode_bundle, mutations(bundle)) > 100


def test_every_byte_of_a_policy_counts() -> None:
    """It stays the same policy (a comment, a name, white space), becomes another one, or is refused with an Error."""
    groups = "group X 2 W0 W1\n group\tY any W2  W3\ngroup both all X Y\nquorum both\n"
    file = f"log {LOG_VKEY} u\n{''.join(WITNESS_LINES.splitlines(True)[:4])}{groups}".encode()
    policy, same, refused = parse_policy(file), 0, 0
    for case in mutations(file):
        try:
            changed = parse_policy(case)
        except Malformed:
            refused += 1
        else:
            same += changed == policy
            assert changed.logs == policy.logs
            assert set(changed.quorum.leaves()) <= set(policy.witnesses)
            assert not changed.quorum.met([]) or changed.quorum == Quorum(0, ())
    assert refused > 5000
    assert same > 30


# --- Tiles ---------------------------------------------------------------------------------------------------------------------


def test_T27_a_tile_has_one_path() -> None:
    assert len(PATHS) == 15
    for parts, text in PATHS.items():
        assert btlog.tile_path(*parts) == text
        assert btlog.parse_tile_path(text) == parts
    for level, width in itertools.product(range(64), (1, 255, 256)):
        assert btlog.parse_tile_path(btlog.tile_path(level, 5, width)) == (level, 5, width)
    assert btlog.parse_tile_path(btlog.tile_path(0, 2**63 - 1)) == (0, 2**63 - 1, 256)
    for text in (
        "", "tile", "tile/", "/tile/0/000", "tile//000", "tile/./0/000", "tile/64/000", "tile/-1/000", "tile/+1/000",
        "tile/00/000", "tile/01/000", "tile/²/000", "tile/data/000", "tile/entries", "tile/entries/", "tile/entries/0",
        "tile/Entries/000",
    ):
        refuses(Malformed, btlog.parse_tile_path, text)
    for text in (
        "", "/", "/0", "/00", "/0000", "/x000/000", "/x000/001", "/001/000", "/x001/x000", "/x001/0", "/x001", "/000.p",
        "/000.p/", "/000.p/0", "/000.p/00", "/000.p/01", "/000.p/256", "/000.p/999", "/000.p/1/", "/000/", "//000",
        "/../0/000", "/%30%30%30", "/000%00", "/000\0", "/000\n", "/000.P/1", "/٠٠٠", "/000.p/1.p/1", "/000.p/255 ",
        "/x009/x223/x372/x036/x854/x775/808", "/" + "x999/" * 50 + "999", "/X001/000",
    ):
        refuses(Malformed, btlog.parse_tile_path, "tile/0" + text)


@settings(max_examples=40)
@given(st.lists(st.binary(max_size=300), max_size=256))
def test_bundles(entries: list[bytes]) -> None:
    data = btlog.encode_bundle(entries)
    assert btlog.parse_bundle(data, len(entries)) == btlog.split_bundle(data) == entries
    refuses(Malformed, btlog.parse_bundle, data, len(entries) + 1)
    refuses(Malformed, btlog.parse_bundle, data + b"\0", len(entries))
    if entries:
        refuses(Malformed, btlog.parse_bundle, data[:-1], len(entries))
        refuses(Malformed, btlog.parse_bundle, data, len(entries) - 1)


def test_T24_all_ranges_that_begin_or_end_inside_a_tile(big: Callable[[int, int, int], bytes]) -> None:
    for size in 1, 2, 255, 256, 257, 513, 600:
        tiles = btlog.Tiles(size, big)
        for height in range(10):
            for lo in range(0, size - (1 << height) + 1, 1 << height):
                if height < 3 or lo % (1 << height + 2) == 0:
                    assert tiles.hash(lo, lo + (1 << height)) == mth(ENTRIES[lo : lo + (1 << height)])
        for lo in (0, 1, 2, 4, 128, 256, 512):
            if lo < size <= 2 * lo:
                assert tiles.hash(lo, size) == mth(ENTRIES[lo:size])
        assert tiles.hash(0, size) == mth(ENTRIES[:size])


def test_T52_every_corrupt_tile_is_found(big: Callable[[int, int, int], bytes]) -> None:
    """At 65,535 = 0xffff entries; each tile that a client fetches, corrupted in turn."""
    tree = Tree(65_535, base64.b64decode(ROOTS[65_535]))
    fetched: list[tuple[int, int, int]] = []

    def record(*place: int) -> bytes:
        fetched.append(place)  # type: ignore[arg-type]
        return big(*place)

    def use(fetch: Callable[[int, int, int], bytes]) -> None:
        tiles = btlog.AuthenticTiles(tree, fetch)
        for index in 0, 30_000, 65_534:
            check_inclusion(leaf_hash(ENTRIES[index]), index, tree, btlog.prove_inclusion(tiles, index))
        btlog.prove_consistency(tiles, 12_345)

    use(record)
    assert len(fetched) == len(set(fetched)) == 5
    assert {(0, 255, 255), (1, 0, 255)} <= set(fetched)
    for bad in fetched:
        for at in {0, 31, 32 * bad[2] - 1, 32 * (bad[2] // 2)}:

            def corrupt(*place: int, bad: tuple[int, int, int] = bad, at: int = at) -> bytes:
                data = bytearray(big(*place))
                if place == bad:
                    data[at] ^= 1
                return bytes(data)

            refuses(BadProof, use, corrupt)
    for cut in b"", big(0, 255, 254), big(0, 0, 256):
        refuses(BadProof, use, lambda *_: cut)  # noqa: B023
    for size in 65_535, 0:
        refuses(BadProof, btlog.AuthenticTiles, Tree(size, bytes(32)), big)
    assert btlog.AuthenticTiles(Tree(0, base64.b64decode(ROOTS[0])), big).size == 0


def test_T52_what_was_proved_stays_proved(big: Callable[[int, int, int], bytes]) -> None:
    """A source that is honest at first: the right edge is kept for good, however much else is read."""
    size = 69_999
    tree = Tree(size, base64.b64decode(ROOTS[size]))
    forged = False

    def fetch(level: int, index: int, width: int) -> bytes:
        return bytes(32 * width) if forged else big(level, index, width)

    tiles = btlog.AuthenticTiles(tree, fetch)
    for index in range(0, size, 256):
        tiles.expanded(0, index // 256)
    forged = True
    assert tiles.expanded(2, 0)[0] == [big(2, 0, 1)]
    assert tiles.hash(0, size) == tree.root
    for index in range(0, size, 256):
        with contextlib.suppress(BadProof):  # nothing else
            assert tiles.expanded(0, index // 256)[0][0] == leaf_hash(ENTRIES[index])
    assert tiles._cache.get((0, 3, 256)) is None  # it was read first, and is long gone
    refuses(BadProof, tiles.expanded, 0, 3)


def test_a_cache_has_a_bound() -> None:
    cache = btlog.Cache(10, len)
    for i in range(20):
        cache.put(i, b"abc")
    assert [i for i in range(20) if cache.get(i)] == [17, 18, 19]
    cache.get(17)  # now 18 was used least recently
    cache.put(20, b"xxxx")
    assert [i for i in range(21) if cache.get(i)] == [17, 19, 20]
    cache.put(21, b"x" * 100)  # larger than the cache: not kept
    assert cache.get(21) is None


# --- The store ------------------------------------------------------------------------------------------------------------------


def entry(i: int, tag: str = "") -> bytes:
    """The i-th of endlessly many entries."""
    name = f"pkg{tag}-{i}-py3-none-any.whl"
    checksum = "sha256:" + hashlib.sha256(name.encode()).hexdigest()
    return Entry(name, checksum, PUBLISHER if i % 7 == 0 else None).encode()


def found(folder: Path, key: btlog.Signer = SIGNER) -> btlog.LogStore:
    """A store in `folder`, new unless there is one."""
    folder.mkdir(exist_ok=True)
    store = btlog.LogStore(folder)
    if store.key() is None:
        store.create_log(key.key, key.sign(Checkpoint(key.name, Tree(0, btlog.EMPTY_ROOT))))
    return store


def seal(tree: Tree) -> bytes:
    return SIGNER.sign(Checkpoint(LOG.name, tree))


def fill(store: btlog.LogStore, *counts: int) -> list[bytes]:
    """Appends in batches of `counts`; all entries of the log thereafter."""
    size = store.tree("signed").size
    for count in counts:
        batch = [entry(i) for i in range(size, size + count)]
        assert store.append(batch, seal, True) == list(range(size, size + count))
        size += count
    return [entry(i) for i in range(size)]


def findings(store: btlog.LogStore) -> list[str]:
    return list(btlog.check_store(store, LOG, lambda done, total: None))


def change_store(folder: Path, sql: str, *values: Any) -> None:
    """Changes what a log has on disk, behind its back."""
    with contextlib.closing(sqlite3.connect(folder / "log.sqlite3")) as db, db:
        db.execute(sql, values)


def holds(store: btlog.LogStore, entries: list[bytes]) -> None:
    """The store has just these entries, and all that follows from them: by oracles, not by its own readers."""
    tree = Tree(len(entries), root_of(entries))
    for kind in "signed", "published":
        note = store.checkpoint(kind)
        assert note is not None
        assert open_checkpoint(note, UNWITNESSED).tree == tree
    with contextlib.closing(sqlite3.connect(store.database.path)) as db:
        stored = {(key >> 56, key & (1 << 56) - 1): data for key, data in db.execute("SELECT key, data FROM tile")}
        assert stored == tiles_of(entries)
        bundles = [data for _, data in db.execute("SELECT n, data FROM bundle ORDER BY n")]
    decoded = []
    for bundle in bundles:  # T28: by a decoder of its own
        stream = io.BytesIO(bundle)
        while length := stream.read(2):
            decoded.append(stream.read(int.from_bytes(length, "big")))
    assert decoded == entries
    assert findings(store) == []


@pytest.mark.parametrize("counts", [(1, 1, 1), (255, 1, 1), (100, 156, 256, 1), (256, 257, 300), (7, 1000)])
def test_T28_what_is_stored_is_what_the_specification_says(tmp_path: Path, counts: tuple[int, ...]) -> None:
    with contextlib.closing(found(tmp_path / "log")) as store:
        for count in counts:
            holds(store, fill(store, count))


def test_an_append_is_proved_to_follow_before_it_is_signed(tmp_path: Path) -> None:
    """T10: a wrong tile, or a tree that does not begin with the last one, is never signed."""
    with contextlib.closing(found(tmp_path)) as store:
        fill(store, 300)
        [(data,)] = store.database.read("SELECT data FROM tile WHERE key = 1")
        change_store(tmp_path, "UPDATE tile SET data = ? WHERE key = 1", bytes([data[0] ^ 1]) + data[1:])
        signed: list[Tree] = []
        refuses(BadProof, store.append, [entry(300)], signed.append, True)
        assert signed == []
        assert store.tree("signed").size == 300


def test_T16_a_failed_add_is_not_remembered(tmp_path: Path) -> None:
    def fail(tree: Tree) -> bytes:
        raise Unavailable("no")

    with contextlib.closing(found(tmp_path)) as store:
        entries = fill(store, 5)
        for count in 1, 300:
            refuses(Unavailable, store.append, [entry(i) for i in range(5, 5 + count)], fail, True)
            holds(store, entries)
        for _ in range(2):
            assert store.append([entry(5), entry(6)], seal, True) == [5, 6]
        holds(store, [*entries, entry(5), entry(6)])


def other_sum(data: bytes) -> bytes:
    parsed = Entry.parse(data)
    return Entry(parsed.filename, "sha256:" + "0" * 64, parsed.publisher).encode()


def test_T17_one_filename_one_checksum(tmp_path: Path) -> None:
    with contextlib.closing(found(tmp_path)) as store:
        fill(store, 300)
        other = [other_sum(entry(i)) for i in range(301)]
        batch = [entry(3), other[4], entry(300), entry(300), other[300], other[299], entry(301)]
        outcomes = [o if isinstance(o, int) else (type(o), o.index) for o in store.append(batch, seal, True)]
        assert outcomes == [3, (Conflict, 4), 300, 300, (Conflict, 300), (Conflict, 299), 301]
        assert store.append([other[4]], seal, True, replace=True) == [302]
        for replace in True, False:
            assert store.append([other[4], entry(4)], seal, True, replace=replace) == [302, 4]
        parsed = Entry.parse(entry(1))  # the same file, now with its publisher
        signed = Entry(parsed.filename, parsed.checksum, Publisher("https://new.example", "someone")).encode()
        assert store.append([signed, entry(1), signed], seal, True) == [303, 1, 303]
        assert findings(store) == []


@pytest.mark.parametrize("part", [8, 9, 18])
def test_look_up_finds_what_is_there_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: int) -> None:
    monkeypatch.setattr(btlog, "PART", part)  # 8: many small parts
    with contextlib.closing(found(tmp_path)) as store:
        entries = fill(store, 300, 1, 299, 1, 600)
        size = len(entries)
        for i in 0, 255, 256, 511, 512, 599, 601, size - 1:
            parsed = Entry.parse(entries[i])
            assert store.look_up(btlog.FILENAME, parsed.filename.encode(), size) == [(i, entries[i])]
            assert store.look_up(btlog.CHECKSUM, parsed.checksum.encode(), size) == [(i, entries[i])]
            assert store.look_up(btlog.FILENAME, parsed.filename.encode(), i) == []  # beyond what is published
        name = Entry.parse(entries[5]).filename.encode()
        for other in name[:-1], name + b"x", b"", name.upper():
            assert store.look_up(btlog.FILENAME, other, size) == []
        assert findings(store) == []


def test_names_that_share_a_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is found by a hash is compared in full."""
    monkeypatch.setattr(btlog, "field_hashes", lambda kind, values: [7 for _ in values])
    with contextlib.closing(found(tmp_path)) as store:
        entries = fill(store, 100, 70, 1)
        for i in 0, 99, 170:
            assert store.look_up(btlog.FILENAME, Entry.parse(entries[i]).filename.encode(), 171) == [(i, entries[i])]
        assert store.append([entries[3], entry(200), other_sum(entries[5])], seal, True)[:2] == [3, 171]


@pytest.mark.parametrize("part, large", [(8, 2200), (9, 700)])
def test_T17_across_parts_and_restarts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: int, large: int) -> None:
    """The filter of names forgets none: neither in the part that grows, nor in full ones, nor when it is read again."""
    monkeypatch.setattr(btlog, "PART", part)
    monkeypatch.setattr(btlog.NameFilter, "SLOTS", 1 << 14)
    size = 0
    for steps in [(100,), (30, 126, 1, 255), (256, 256), (large,), (1, 64)]:
        with contextlib.closing(found(tmp_path)) as store:
            for count in steps:
                size += count
                batch = [entry(i) for i in range(size)]
                assert store.append(batch, seal, True) == list(range(size))  # all that is there again, and more
            conflicts = store.append([other_sum(e) for e in batch], seal, True)
            assert [c.index for c in conflicts if isinstance(c, Conflict)] == list(range(size))
            assert findings(store) == []
            stored = store.database.read("SELECT count(*) FROM name_filter")[0][0]
            assert stored == ((size >> part) + 7) // 8


def test_look_up_keys_have_63_bits() -> None:
    for index in 0, 262_143, 262_144, 17_000_000, 2**31 - 1:
        for kind in btlog.CHECKSUM, btlog.FILENAME:
            [key] = btlog.look_up_keys(kind, index, [2**31 - 1])
            assert (key >> 62, btlog.key_index(key)) == (kind, index)
    first = 262_144 - 3
    keys = btlog.look_up_keys(btlog.FILENAME, first, btlog.field_hashes(btlog.FILENAME, [b"x"] * 7))
    assert list(map(btlog.key_index, keys)) == list(range(first, first + 7))


def test_T2_T14_commits_are_synchronous(tmp_path: Path) -> None:
    with contextlib.closing(found(tmp_path)) as store:
        for name, value in ("journal_mode", "wal"), ("synchronous", 2), ("busy_timeout", 4_000):
            assert store.database._writer.execute(f"PRAGMA {name}").fetchone() == (value,)
    with contextlib.closing(sqlite3.connect(":memory:")) as memory:  # which can have no WAL
        refuses(Corrupt, btlog._make_durable, memory)


class Faulty:
    """A connection whose n-th statement fails, and perhaps is carried out nevertheless."""

    def __init__(self, connection: sqlite3.Connection, n: int, persist: bool) -> None:
        self._connection, self.left, self._persist = connection, n, persist

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    def _run(self, run: Callable[..., Any], *args: Any) -> Any:
        self.left -= 1
        if self.left == 0:
            if self._persist:
                run(*args)
            raise sqlite3.OperationalError("disk I/O error")
        return run(*args)

    def execute(self, *args: Any) -> Any:
        return self._run(self._connection.execute, *args)

    def executemany(self, *args: Any) -> Any:
        return self._run(self._connection.executemany, *args)


@pytest.mark.parametrize("persist", [False, True], ids=["not persisted", "persisted"])
def test_T4_every_statement_failed_once(tmp_path: Path, persist: bool) -> None:
    """Each as "failed, not persisted" and "failed, but persisted": all of the batch is there, or nothing."""
    with contextlib.closing(found(tmp_path / "whole")) as store:
        fill(store, 250)
        store.database._writer = counting = Faulty(store.database._writer, 10**9, False)  # type: ignore[assignment]
        fill(store, 20)
        statements = 10**9 - counting.left
    assert statements > 12
    commits = 0
    for n in range(1, statements + 1):
        folder = tmp_path / f"{n}"
        with contextlib.closing(found(folder)) as store:
            entries = fill(store, 250)
            store.database._writer = Faulty(store.database._writer, n, persist)  # type: ignore[assignment]
            batch = [entry(i) for i in range(250, 270)]
            with pytest.raises(Unavailable) as caught:
                store.append(batch, seal, True)
            commits += isinstance(caught.value, btlog.CommitFailed)
            if isinstance(caught.value, btlog.CommitFailed) and not persist:
                store.database._writer.execute("ROLLBACK")
        with contextlib.closing(btlog.LogStore(folder)) as store:  # read again from disk
            if isinstance(caught.value, btlog.CommitFailed) and persist:
                entries = entries + batch
            holds(store, entries)
            assert store.append(batch, seal, True) == list(range(250, 270))
        shutil.rmtree(folder)
    assert commits == 1


def exits(codes: int | tuple[int, ...], says: str, *args: str, cwd: Path | None = None, lines: int | None = None) -> str:
    """A command, in this process, ends with that code, and says that on stderr, in so many lines; what it prints."""
    out, err = io.StringIO(), io.StringIO()
    got: Any
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f"{args} does not end"))
    signal.alarm(60)
    try:
        with contextlib.chdir(cwd or "."), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            got = btlog.main(args)
    except SystemExit as end:
        got = end.code
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert got in (codes if isinstance(codes, tuple) else (codes,)), (args, out.getvalue(), err.getvalue())
    assert says in err.getvalue(), args
    assert lines in (None, err.getvalue().count("\n")), (args, err.getvalue())
    assert "Traceback" not in err.getvalue()
    return out.getvalue()


def test_T13_a_folder_is_of_one_log(tmp_path: Path) -> None:
    (tmp_path / "b").write_text(new_key("b.example").encode())
    with contextlib.closing(found(tmp_path / "log", new_key("a.example"))) as store:
        assert store.key() == new_key("a.example").key
        refuses(Error, store.create_log, LOG, b"")  # a second founding
    other_key = ("--private-key", "b", "--port", "0")
    exits(2, "is the log of a.example+", "serve", "--storage-dir", "log", *other_key, cwd=tmp_path)


def test_T7_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").write_text("something else's")
    serve = ("serve", "--port", "0", "--storage-dir")
    exits(3, "can't make", *serve, str(tmp_path / "checkpoint" / "log"))
    exits(3, "holds no log but other things", *serve, str(tmp_path))
    assert os.listdir(tmp_path) == ["checkpoint"]
    folder = tmp_path / "x"
    folder.mkdir()
    path = folder / "log.sqlite3"
    for data in b"", b"\0" * 8192, b"SQLite format 3\0" + bytes(4080):  # T1: truncated or zeroed
        path.write_bytes(data)
        exits(3, "log.sqlite3", *serve, str(folder))
        assert not (folder / "private.key").exists()
    path.unlink()
    change_store(folder, "CREATE TABLE tlog (origin)")
    before = path.read_bytes()
    refuses(Corrupt, btlog.LogStore, folder)
    assert path.read_bytes() == before  # nothing of another program's file is changed


def test_T7_many_first_starts_make_one_log(tmp_path: Path) -> None:
    command = [sys.executable, str(SOURCE), "serve", "--storage-dir", "log", "--port", "0", "--origin", "log.example"]
    pipe = subprocess.PIPE
    starts = [subprocess.Popen(command, cwd=tmp_path, stdout=pipe, stderr=pipe, text=True) for _ in range(4)]
    try:
        lines = [start.stdout.readline() for start in starts if start.stdout]  # one answers, the others end
        assert sorted(map(bool, lines)) == [False] * 3 + [True]
        assert all(start.wait(20) == 3 for start, line in zip(starts, lines, strict=True) if not line)
    finally:
        for start in starts:
            start.kill()
            start.communicate()
    with contextlib.closing(btlog.LogStore(tmp_path / "log")) as store:
        assert store.key() == VerifierKey.parse((tmp_path / "log" / "public.key").read_text().strip())


def corruptions(path: Path) -> Iterator[tuple[str, str, str, tuple[Any, ...]]]:
    """One changed byte in each kind of row: the table, what a finding names, the SQL that does it, and its values."""

    def flipped(data: bytes, at: int) -> bytes:
        return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]

    with contextlib.closing(sqlite3.connect(path)) as db:
        for table, key, place in ("bundle", "n", "{:03d}"), ("tile", "key", "tile/"):
            for number, data in db.execute(f"SELECT {key}, data FROM {table}").fetchall():
                for at in {0, 1, 2, len(data) // 2, len(data) - 1}:
                    sql = f"UPDATE {table} SET data = ? WHERE {key} = ?"
                    yield table, place.format(number), sql, (flipped(data, at), number)
        for kind, note in db.execute("SELECT kind, note FROM checkpoint").fetchall():
            for at in {0, len(LOG.name) + 1, len(LOG.name) + 6, len(note) - 90, len(note) - 60, len(note) - 5}:
                sql = "UPDATE checkpoint SET note = ? WHERE kind = ?"
                yield "checkpoint", kind, sql, (flipped(note, at), kind)
        keys = [key for (key,) in db.execute("SELECT key FROM lookup ORDER BY key")]
    for key in keys[0], keys[len(keys) // 2], keys[-1]:
        for bit in 0, 17, 40, 48, 62:
            yield "lookup", "look", "UPDATE lookup SET key = ? WHERE key = ?", (key ^ 1 << bit, key)
        yield "lookup", "look", "DELETE FROM lookup WHERE key = ?", (key,)


def test_T11_fsck_finds_any_changed_byte(tmp_path: Path) -> None:
    with contextlib.closing(found(tmp_path / "log")) as store:
        fill(store, 300)
        assert findings(store) == []
    tried: dict[str, int] = {}
    (tmp_path / "copy").mkdir()
    for table, place, sql, values in list(corruptions(tmp_path / "log" / "log.sqlite3")):
        shutil.copy(tmp_path / "log" / "log.sqlite3", tmp_path / "copy")
        change_store(tmp_path / "copy", sql, *values)
        with contextlib.closing(btlog.LogStore(tmp_path / "copy", read_only=True)) as store:
            lines = findings(store)
        assert any(place in line for line in lines), (table, values, lines)
        tried[table] = tried.get(table, 0) + 1
    assert tried == {"bundle": 10, "tile": 15, "checkpoint": 12, "lookup": 18}


def test_T1_T11_a_log_that_is_corrupt_does_not_start(tmp_path: Path) -> None:
    with contextlib.closing(found(tmp_path / "log")) as store:
        fill(store, 700)
    (tmp_path / "log" / "private.key").write_text(LOG_SKEY)
    for says, *changes in (
        (
            "corrupt",  # its right edge
            "UPDATE checkpoint SET note = CAST(replace(note, '700', '699') AS BLOB)",
            "UPDATE tile SET data = CAST(data AS TEXT)",
            "UPDATE tile SET data = zeroblob(length(data)) WHERE key = 2",
            "DELETE FROM tile WHERE key = 1 << 56",
            "UPDATE tile SET data = x'00' WHERE key = 2",
            "UPDATE checkpoint SET note = replace(note, '700', '699')",
            "DELETE FROM checkpoint",
            "UPDATE checkpoint SET note = x'ff'",
        ),
        (
            "",
            "UPDATE setting SET value = x'ff'",
            "UPDATE setting SET value = 5",
            "UPDATE setting SET value = 'junk'",
            "DELETE FROM lookup",
            "DROP TABLE lookup",
            "DROP TABLE tile",
            "DELETE FROM lookup WHERE key = (SELECT max(key) FROM lookup)",
        ),
    ):
        for sql in changes:
            shutil.copytree(tmp_path / "log", tmp_path / "copy")
            change_store(tmp_path / "copy", sql)
            assert exits(3, says, "serve", "--storage-dir", "copy", "--port", "0", cwd=tmp_path) == "", sql
            exits((1, 3), "", "fsck", "--storage-dir", "copy", cwd=tmp_path)
            shutil.rmtree(tmp_path / "copy")


# --- Servers, in this process and in others ------------------------------------------------------------------------------------


FORKER = """
import json, os, sys
import btlog
for line in sys.stdin:
    job = json.loads(line)
    if not (child := os.fork()):
        os.chdir(job["cwd"])
        for number, path in enumerate((os.devnull, job["out"], job["err"])):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
        sys.exit(btlog.main(job["args"]))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Forker:
    """A process that has imported btlog, and forks for each command: what would take 0.3 s to start takes 0.02 s."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", FORKER]
        self._process = subprocess.Popen(command, cwd=HERE, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._lock = threading.Lock()

    def run(self, *args: str, cwd: Path | None) -> subprocess.CompletedProcess[str]:
        with tempfile.TemporaryDirectory() as folder, self._lock:
            out, err = Path(folder, "out"), Path(folder, "err")
            job = {"args": args, "cwd": str(cwd or os.getcwd()), "out": str(out), "err": str(err)}
            assert self._process.stdin
            assert self._process.stdout
            self._process.stdin.write(f"{json.dumps(job)}\n")
            self._process.stdin.flush()
            assert select.select([self._process.stdout], [], [], 60)[0], f"{args} does not end"
            code = int(self._process.stdout.readline())
            return subprocess.CompletedProcess(args, code, *(p.read_text(errors="surrogateescape") for p in (out, err)))

    def close(self) -> None:
        self._process.communicate(timeout=10)


@functools.cache
def forker() -> Forker:
    made = Forker()
    atexit.register(made.close)
    return made


def run_btlog(*args: str, cwd: Path | None = None, **more: Any) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own; with more than a folder, one that is started from the beginning."""
    if not more:
        return forker().run(*args, cwd=cwd)
    return subprocess.run(
        [sys.executable, str(SOURCE), *args], cwd=cwd, capture_output=True, text=True, timeout=60, check=False, **more
    )


@functools.cache
def compiled_program() -> str:
    """The path of the compiled btlog.py: servers start in half the time from there."""
    folder = tempfile.TemporaryDirectory(prefix="btlog-tests-")
    atexit.register(folder.cleanup)
    return py_compile.compile(str(SOURCE), str(Path(folder.name, "btlog.pyc")), doraise=True) or ""


class Running:
    """btlog.py as a process that serves."""

    def __init__(self, *args: str, cwd: Path | None = None, port: str = "0", trace: Path | None = None) -> None:
        program = ["-c", tracer(), str(trace)] if trace else []
        command = [sys.executable, *program, compiled_program(), *args, "--port", port]
        self.process = subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stdout
        self.line = self.process.stdout.readline()
        if not self.line:
            raise AssertionError(f"{args} did not start: {self.process.communicate()[1]}")
        self.url = self.line.split()[0]

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """The exit code, and what it wrote to stderr."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            error = self.process.communicate(timeout=15)[1]
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        return self.process.returncode, error


@contextlib.contextmanager
def running(*args: str, cwd: Path | None = None) -> Iterator[Running]:
    server = Running(*args, cwd=cwd)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
        server.process.communicate()


class Told(btlog.Handler):
    """A request that is answered as a function of it and its body says."""

    def answer(self, body: btlog.Body) -> Any:
        return vars(type(self))["app"](self, body)


class Local:
    """A server in a thread of this process; `handler` is a class of handlers, or how to answer."""

    def __init__(self, handler: Any, port: int = 0) -> None:
        handler = handler if isinstance(handler, type) else Told.of(handler)
        self.server = btlog.Server("127.0.0.1", port, handler)
        self.url, self.port = self.server.url, int(self.server.url.rpartition(":")[2])
        ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self.server.run(ready.set, lambda: False)))
        self._thread.start()
        assert ready.wait(10)

    def close(self) -> None:
        if self._thread.is_alive():  # and not closed already
            self.server.loop.call_soon_threadsafe(self.server.over.set)
        self._thread.join(15)
        assert not self._thread.is_alive()


class LocalLog(Local):
    """A log in this process, over a store in `folder`."""

    def __init__(self, folder: Path, **more: Any) -> None:
        self.store = found(folder)
        options = btlog.LogOptions(
            replace=more.pop("replace", False), add_timeout=more.pop("timeout", 20), **more.pop("options", {})
        )
        self.log = btlog.Log(self.store, SIGNER, more.pop("policy", UNWITNESSED), options)
        self.routes = btlog.LogServer(self.log, **more)
        super().__init__(btlog.LogHandler.of(self.routes))
        self.log.start()

    def close(self) -> None:
        super().close()
        self.log.stop()
        self.store.close()


@pytest.fixture
def log(tmp_path: Path) -> Iterator[LocalLog]:
    with contextlib.closing(LocalLog(tmp_path / "log")) as server:
        yield server


def ask(
    url: str, path_: str, method: str = "GET", body: bytes | None = None, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers (by lowercase name) and body of an answer."""
    parts = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=30)
    with contextlib.closing(connection):
        connection.request(method, path_, body, {name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()


def as_json(data: bytes) -> dict[str, Any]:
    parsed = Entry.parse(data)
    publisher = {"publisher": parsed.publisher._asdict()} if parsed.publisher else {}
    return {"filename": parsed.filename, "checksum": parsed.checksum, **publisher}


def as_line(data: bytes) -> bytes:
    return json.dumps(as_json(data)).encode() + b"\n"


def many_lines(first: int, end: int) -> bytes:
    """The entries from `first` to `end` as the body of a bulk."""
    return b"".join(as_line(entry(i)) for i in range(first, end))


def add(url: str, data: bytes, **headers: str) -> tuple[int, dict[str, Any]]:
    status, _, answer = ask(url, "/add", "POST", as_line(data), **headers)
    return status, json.loads(answer)


def bulk(url: str, body: bytes, **headers: str) -> tuple[int, list[dict[str, Any]]]:
    headers = {"Content_Type": "application/x-ndjson", **headers}
    status, _, answer = ask(url, "/admin/bulk/append", "POST", body, **headers)
    return status, [json.loads(line) for line in answer.splitlines()]


def acknowledged(data: bytes, answer: dict[str, Any]) -> int:
    """The index at which an answer to /add proves the entry to be logged."""
    hashes = tuple(base64.b64decode(h, validate=True) for h in answer["inclusionProof"])
    proof = btlog.encode_proof(Proof(answer["index"], hashes, base64.b64decode(answer["checkpoint"], validate=True)))
    check_logged(data, proof, UNWITNESSED)
    return int(answer["index"])


def walk(url: str, policy: Policy = UNWITNESSED) -> list[bytes]:
    """All entries of a served log, after checking over HTTP all of it that the specification speaks of."""
    status, headers, note = ask(url, "/checkpoint")
    assert (status, headers["content-type"], headers["cache-control"]) == (200, "text/plain; charset=utf-8", "no-cache")
    tree = open_checkpoint(note, policy).tree
    entries: list[bytes] = []
    for index in range((tree.size + 255) // 256):
        path_ = btlog.tile_path(None, index, min(256, tree.size - 256 * index))
        status, headers, data = ask(url, f"/{path_}")
        assert (status, headers["content-type"]) == (200, "application/octet-stream"), path_
        assert "immutable" in headers["cache-control"]
        entries += btlog.parse_bundle(data, min(256, tree.size - 256 * index))
    assert len(entries) == tree.size
    grown = tiles_of(entries)
    for (level, index), data in grown.items():
        status, headers, served = ask(url, f"/{btlog.tile_path(level, index, len(data) // 32)}")
        assert (status, headers["content-type"], served) == (200, "application/octet-stream", data)
    assert root_of(entries) == tree.root
    return entries


# --- HTTP: the routes of the log ---------------------------------------------------------------------------------------------------


def test_an_add_is_answered_with_index_checkpoint_and_proof(log: LocalLog) -> None:
    for i in range(20):
        status, answer = add(log.url, entry(i))
        assert status == 200
        assert list(answer) == ["index", "checkpoint", "inclusionProof"]
        assert acknowledged(entry(i), answer) == i
    status, again = add(log.url, entry(3))
    assert (status, acknowledged(entry(3), again)) == (200, 3)
    status, conflict = add(log.url, other_sum(entry(4)))
    assert (status, conflict["index"]) == (409, 4)
    assert Entry.parse(entry(4)).filename in conflict["error"]
    assert walk(log.url) == [entry(i) for i in range(20)]


def test_T50_json_is_an_entry_or_is_refused(log: LocalLog) -> None:
    for body in (
        b"", b"{", b"[]", b"null", b"1", b'"a"', b"{}", b"\xff", b"\xef\xbb\xbf{}", b"1" * 5000, b"Infinity",
        b"-Infinity", b"[" * 100_000, b'{"a":' * 100_000, b'{"filename":"a"}', b'{"checksum":"%b"}',
        b'{"filename":"a","checksum":NaN}',
        b'{"filename":1,"checksum":"%b"}', b'{"filename":["a"],"checksum":"%b"}', b'{"filename":"a/b","checksum":"%b"}',
        b'{"filename":"a","checksum":"%b","filename":"a"}', b'{"filename":"a","checksum":"%b","x":1}',
        b'{"filename":"\\ud800","checksum":"%b"}', b'{"filename":"a","checksum":"%b"} x',
        '{"filename":"a","checksum":"%b"}'.encode("utf-16"),
        *(b'{"filename":"a","checksum":"%%b","publisher":%b}' % publisher for publisher in (
            b"1", b"{}", b'{"issuer":"i"}', b'{"issuer":"i","subject":"s","issuer":"i"}', b'["i","s"]',
            b'{"issuer":"i j","subject":"s"}', b'[["issuer","i"],["subject","s"]]')),
    ):
        status, headers, answer = ask(log.url, "/add", "POST", body.replace(b"%b", SUM.encode()))
        assert (status, headers["content-type"], *json.loads(answer)) == (400, "application/json", "error"), body
    assert log.log.published.tree.size == 0
    plain = '{"filename":"a","checksum":"%s"}'
    for text, content in (
        (plain, "application/x-www-form-urlencoded"),  # which curl sends with -d: nobody has to say that it is JSON
        (plain, "text/plain"),
        (plain, "application/json"),
        (' { "checksum" : "%s",\n "filename" : "\\u0061" } ', "application/json"),
        ('{"filename":"a","checksum":"%s","publisher":null}', "application/json"),
    ):
        status, _, answer = ask(log.url, "/add", "POST", (text % SUM).encode(), Content_Type=content)
        assert (status, acknowledged(Entry("a", SUM).encode(), json.loads(answer))) == (200, 0)


def test_T49_the_largest_entry_over_http(log: LocalLog) -> None:
    room = 65_535 - len(Entry("a", SUM, Publisher("i", "s")).encode()) + 1
    largest = Entry("a", SUM, Publisher("i", "s" * room)).encode()
    assert acknowledged(largest, add(log.url, largest)[1]) == 0
    one = json.dumps({"filename": "a", "checksum": SUM, "publisher": {"issuer": "i", "subject": "s"}})
    escaped = one.replace('"s"', '"' + "\\u0073" * room + '"')
    assert ask(log.url, "/add", "POST", escaped.encode())[0] == 200
    assert ask(log.url, "/add", "POST", escaped.replace("\\u0073", "\\u0073" * 2, 1).encode())[0] == 400
    assert ask(log.url, "/add", "POST", b" " * (btlog.MAX_ADD + 1))[0] == 413
    assert walk(log.url) == [largest]


def proved(answer: list[dict[str, Any]], wanted: list[tuple[str, int | None]]) -> Tree:
    """The tree in an answer to a bulk, which says just this of each line, and proves what is logged."""
    head, *results, end = answer
    tree = open_checkpoint(base64.b64decode(head["checkpoint"], validate=True), UNWITNESSED).tree
    assert (head["type"], head["tree_size"], end["type"], end["count"]) == (
        "checkpoint", tree.size, "complete", len(wanted),
    )
    assert {r["type"] for r in results} <= {"result"}
    said = [r["result"] for r in results]
    assert [(r["status"], r.get("index")) for r in said] == wanted
    for result in said:
        if result["status"] == "logged":
            index = result["index"]
            assert result["filename"] == Entry.parse(entry(index)).filename
            proof = [base64.b64decode(h) for h in result["inclusionProof"]]
            check_inclusion(leaf_hash(entry(index)), index, tree, proof)
        else:
            assert result["error"]
            assert "inclusionProof" not in result
    return tree


def test_a_bulk_is_answered_line_by_line(log: LocalLog) -> None:
    add(log.url, entry(0))
    error = ("error", None)
    lines: list[tuple[bytes, tuple[str, int | None]]] = [
        (as_line(entry(1)), ("logged", 1)),
        (b"{}\n", error),
        (as_line(entry(0)), ("logged", 0)),
        (b"\n", ("", None)),  # no line at all
        (as_line(entry(2)), ("logged", 2)),
        (b"x\n", error),
        (as_line(other_sum(entry(2))), ("error", 2)),
        (b"  \r\n", ("", None)),
        (as_line(entry(1)), ("logged", 1)),
        (b'{"filename":"a"\n', error),
        (b'"checksum":"x"}\n', error),
        (b'{"filename":"a","checksum":"' + SUM.encode() + b'"},{}\n', error),
        (b"\xff\n", error),
        (as_line(entry(3))[:-1], ("logged", 3)),
    ]
    status, answer = bulk(log.url, b"".join(line for line, _ in lines))
    assert (status, proved(answer, [said for _, said in lines if said[0]]).size) == (200, 4)
    assert walk(log.url) == [entry(i) for i in range(4)]


@pytest.mark.parametrize("count", [255, 256, 257, 1500])
def test_a_large_bulk(log: LocalLog, count: int) -> None:
    for first in 0, 100:  # the second overlaps the first
        status, answer = bulk(log.url, many_lines(first, first + count))
        assert status == 200
        proved(answer, [("logged", i) for i in range(first, first + count)])
    assert walk(log.url) == [entry(i) for i in range(count + 100)]


def test_bulk_limits(tmp_path: Path) -> None:
    with contextlib.closing(LocalLog(tmp_path / "log", max_bulk=10)) as log:
        for content in "application/json", "", "text/plain; charset=application/x-ndjson":
            assert bulk(log.url, as_line(entry(0)), Content_Type=content)[0] == 415
        assert bulk(log.url, as_line(entry(0)), Content_Type="application/x-ndjson; charset=utf-8")[0] == 200
        for body in many_lines(0, 11), b"{}\n" * 11, b"x" * (btlog.MAX_ADD + 2):
            assert bulk(log.url, body)[0] == 413
        assert log.log.published.tree.size == 1  # nothing is logged of what is too much
        assert bulk(log.url, many_lines(0, 10) + b"\n\n")[0] == 200
        for body, wanted in (b"", []), (b"{}\n", [("error", None)]):
            status, answer = bulk(log.url, body)
            assert (status, proved(answer, wanted).size) == (200, 10)  # type: ignore[arg-type]


def at_once(*calls: Callable[[], Any]) -> None:
    """Makes calls, each in a thread of its own."""
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_T17_the_same_at_once(log: LocalLog) -> None:
    """Many clients add the same files, some with other checksums, by add and by bulk."""
    got: list[tuple[int, int, int]] = []  # entry, status, index

    def client(seed: int) -> None:
        order = list(range(25))
        random.Random(seed).shuffle(order)
        for i in order:
            data = entry(i) if (seed + i) % 4 else other_sum(entry(i))
            if seed % 3:
                status, answer = add(log.url, data)
                got.append((i, status, answer["index"]))
            else:
                result = bulk(log.url, as_line(data))[1][1]["result"]
                got.append((i, 200 if result["status"] == "logged" else 409, result["index"]))

    at_once(*(functools.partial(client, seed) for seed in range(8)))
    assert len(got) == 200
    for i in range(25):
        assert len({index for j, _, index in got if j == i}) == 1
    assert sum(status == 409 for _, status, _ in got) >= 25
    entries = walk(log.url)
    assert len(entries) == len({Entry.parse(e).filename for e in entries}) == 25


def test_entries_by_filename_and_checksum(log: LocalLog) -> None:
    entries = [Entry("torch-2.0+cu118 é%.whl", SUM, PUBLISHER).encode(), entry(1), entry(2)]
    for data in entries:
        add(log.url, data)
    for query, index in (
        ("filename=torch-2.0+cu118%20%C3%A9%25.whl", 0), ("filename=torch-2.0%2Bcu118%20%c3%a9%25.whl", 0),
        (f"checksum={SUM}", 0), (f"checksum={SUM.replace(':', '%3A')}", 0),
        ("filename=" + Entry.parse(entry(1)).filename, 1), ("checksum=" + Entry.parse(entry(2)).checksum, 2),
    ):
        status, headers, body = ask(log.url, f"/entries?{query}")
        assert (status, headers["content-type"]) == (200, "application/json")
        wanted = {"index": index, **as_json(entries[index])}
        assert json.loads(body)["entries"] == [wanted]
        assert json.loads(ask(log.url, f"/entry/{index}")[2]) == wanted
    name = Entry.parse(entry(1)).filename
    for query in "filename=pkg", f"filename={name[:-1]}", "checksum=x", "filename=a%00b", "filename=" + "x" * 5000:
        assert ask(log.url, f"/entries?{query}")[::2] == (200, b'{"entries": []}\n')
    for query in (
        "", "?", "?filename", "?other=x", "?filename=a&checksum=b", "?filename=a&filename=a", "?filename=%ff",
        "?file%6eame=a",
    ):
        assert ask(log.url, f"/entries{query}")[0] == 400, query


def test_proofs_of_entries(log: LocalLog) -> None:
    bulk(log.url, many_lines(0, 10))
    for i in range(10):
        status, headers, proof = ask(log.url, f"/entry/{i}/proof")
        assert (status, headers["content-type"]) == (200, "text/plain; charset=utf-8")
        parsed = Entry.parse(entry(i))
        assert Proof.parse(proof).entry(parsed.filename, parsed.checksum) == parsed
        assert check_logged(parsed, proof, UNWITNESSED).tree.size == 10
        assert (Proof.parse(proof).extra == entry(i)) is (parsed.publisher is not None)
    for bad in (
        "", "/", "/10", "/10/proof", "/-1", "/00", "/1/", "/1/proof/", "/1/x", "/1//proof", "/٧", "/1%30",
        "/9223372036854775808",
    ):
        assert ask(log.url, urllib.parse.quote(f"/entry{bad}", safe="/%"))[0] == 404, bad


def test_T19_T20_T21_only_what_the_checkpoint_implies_is_there(log: LocalLog) -> None:
    done = 0
    for size in 1, 129, 255, 256, 257, 513:
        bulk(log.url, many_lines(done, size))
        done = size
        for level, index, w in itertools.product((None, 0, 1, 2), range(3), (1, 24, 255, 256)):
            there = index * 256 + w <= size >> 8 * (level or 0)
            status, headers, data = ask(log.url, "/" + btlog.tile_path(level, index, w))
            assert status == (200 if there else 404), (size, level, index, w)
            if there and level is not None:
                assert len(data) == 32 * w
            assert ("immutable" in headers.get("cache-control", "")) is there  # T25
        assert walk(log.url) == [entry(i) for i in range(size)]
    assert ask(log.url, "/tile/0/001.p/24")[0] == 200  # T22: partial tiles stay, also beside the full one
    assert ask(log.url, "/tile/0/000.p/200")[2] == ask(log.url, "/tile/0/000")[2][: 32 * 200]


def test_T21_a_reader_never_sees_a_checkpoint_without_its_tiles(log: LocalLog) -> None:
    over = threading.Event()

    def write() -> None:
        for i in range(0, 1500, 37):
            bulk(log.url, many_lines(i, i + 37))
        over.set()

    sizes = set()

    def read() -> None:
        while not over.is_set():
            sizes.add(len(walk(log.url)))

    with concurrent.futures.ThreadPoolExecutor() as pool:
        for done in [pool.submit(write), pool.submit(read)]:
            done.result()
    assert len(sizes) > 3


def test_T27_paths_that_lead_nowhere(log: LocalLog) -> None:
    bulk(log.url, many_lines(0, 256))
    for path_ in (
        "/tile", "/tile/", "/tile/0", "/tile/0/", "/tile/0/../0/000", "/tile/0/%2e%2e/0/000", "/tile/%30/000",
        "//tile/0/000", "/tile//0/000", "/tile/0/000/", "/tile/0/000?x=1", "/tile/0/000?", "/tile/0/000.p/256",
        "/tile/0/000.p/01", "/tile/64/000", "/tile/8/000", "/tile/63/000", "/tile/0/x001/000", "/../../etc/passwd",
        "/%00", "/checkpoint/", "/checkpoint%00", "/Checkpoint", "/log.sqlite3", "/private.key", "/.well-known",
        "/.well-known/private-key", "/add/", "/admin", "/x", "checkpoint", "http://127.0.0.1/checkpoint", "*",
        "/tile/entries/../../checkpoint", "/;/checkpoint", "/./checkpoint", "/entry/0/proof?x",
        "/tile/0/" + "x001/" * 3000 + "000",
    ):
        status, headers, body = ask(log.url, path_)
        assert (status, headers["content-type"], *json.loads(body)) == (404, "application/json", "error"), path_
        assert "cache-control" not in headers


def test_what_is_read_may_be_zipped_and_used_by_any_page(log: LocalLog) -> None:
    bulk(log.url, many_lines(0, 300))
    for path_ in (
        "/checkpoint", "/tile/0/000", "/tile/entries/000", "/tile/entries/001.p/44", "/entry/1", "/entry/1/proof",
        "/entries?filename=x", "/healthz", "/.well-known/public-key", "/nothing", "/status.json",
    ):
        status, headers, body = ask(log.url, path_, Origin="https://example.com")
        if path_ != "/status.json":  # which says the time
            head = ask(log.url, path_, "HEAD")
            assert (head[0], head[1]["content-length"], head[2]) == (status, headers["content-length"], b"")
        assert headers["content-length"] == str(len(body))
        assert "content-encoding" not in headers
        zipped = ask(log.url, path_, Accept_Encoding="br, gzip")
        assert ("content-encoding" in zipped[1]) is path_.startswith("/tile/entries/")
        if path_.startswith("/tile/entries/"):
            assert headers["vary"] == zipped[1]["vary"] == "Accept-Encoding"
            assert zipped[1]["content-encoding"] == "gzip"
            assert gzip.decompress(zipped[2]) == btlog._unzip(zipped[2], len(body)) == body
            assert len(zipped[2]) < len(body)
            refuses(Unavailable, btlog._unzip, zipped[2], len(body) - 1)
        if path_ != "/nothing":
            assert headers["access-control-allow-origin"] == "*"
            status, headers, body = ask(log.url, path_, "OPTIONS", Origin="https://example.com", Access_Control_Request_Headers="x")
            allowed = [headers[name] for name in ("allow", "access-control-allow-origin", "access-control-allow-headers")]
            assert (status, body, allowed) == (200, b"", ["GET, HEAD, OPTIONS", "*", "*"])
            for method in "POST", "PUT", "DELETE", "PATCH", "TRACE", "get", "FOO":
                body_ = b"" if method in ("POST", "PUT", "PATCH") else None
                status, headers, _ = ask(log.url, path_, method, body_)
                assert (status, headers["allow"]) == (405, "GET, HEAD")
    for path_ in "/add", "/admin/bulk/append":
        for method in "GET", "HEAD", "PUT", "OPTIONS":
            status, headers, _ = ask(log.url, path_, method, b"" if method == "PUT" else None)
            assert (status, headers["allow"]) == (405, "POST")
    assert "access-control-allow-origin" not in ask(log.url, "/add", "POST", as_line(entry(1)))[1]
    for accepts in "gzip", "br, gzip;q=0.5", "GZIP ; q=1.0":
        assert btlog.takes_gzip(accepts)
    for accepts in "gzip;q=0", "gzip;q=0.000, br", "x-gzip", "", "*":
        assert not btlog.takes_gzip(accepts)


def test_pages_of_other_sites_cant_write(log: LocalLog) -> None:
    """Nor does a page whose own name was made to point to this address: its requests look like those of this site."""
    refused: list[dict[str, str]] = [
        {"Origin": "https://evil.example"}, {"Origin": "null"}, {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"}, {"Origin": ""},
        {"Origin": "http://127.0.0.1:1", "Sec_Fetch_Site": "same-origin"},
    ]
    taken: list[dict[str, str]] = [{"Origin": log.url, "Sec_Fetch_Site": "same-origin"}, {"Sec_Fetch_Site": "none"}]
    for host in "evil.example:8080", "127.0.0.1:8080", "localhost", "[::1]:80":
        same = {"Host": host, "Origin": f"http://{host}", "Sec_Fetch_Site": "same-origin"}
        (refused if "evil" in host else taken).append(same)
    for headers in refused:
        assert ask(log.url, "/add", "POST", as_line(entry(0)), **headers)[0] == 403
        assert bulk(log.url, as_line(entry(0)), **headers)[0] == 403
    assert log.log.published.tree.size == 0
    for headers in taken:
        assert ask(log.url, "/add", "POST", as_line(entry(0)), **headers)[0] == 200


def test_writing_with_a_token(tmp_path: Path) -> None:
    with contextlib.closing(LocalLog(tmp_path / "log", token="s3cret")) as log:
        for value in None, "Bearer other", "Basic s3cret", "s3cret", "Bearer", "Bearer s3cret2":
            headers = {"Authorization": value} if value else {}
            status, answer, _ = ask(log.url, "/add", "POST", as_line(entry(0)), **headers)
            assert (status, answer["www-authenticate"]) == (401, "Bearer")
            assert bulk(log.url, as_line(entry(0)), **headers)[0] == 401
        for token in "Bearer s3cret", "bearer  s3cret ":
            assert add(log.url, entry(0), Authorization=token)[0] == 200
        assert ask(log.url, "/checkpoint")[0] == 200


def test_status_and_health(log: LocalLog) -> None:
    add(log.url, entry(0))
    add(log.url, other_sum(entry(0)))
    bulk(log.url, as_line(entry(1)) + b"x\n")
    status = json.loads(ask(log.url, "/status.json")[2])
    known = {"origin": LOG.name, "entry_type": "pypi-transparency/v1", "witness_configured": False, "vkey": LOG_VKEY}
    assert known.items() <= status.items()
    note = ask(log.url, "/checkpoint")[2].decode()
    root = open_checkpoint(note.encode(), UNWITNESSED).tree.root.hex()
    assert status["checkpoint"] == {"available": True, "tree_size": 2, "root_hash": root, "raw_checkpoint": note}
    for name in "latency", "bulk_latency":
        assert (status[name]["count"], status[name]["failures"]) == (1, 1)
    assert status["latency"]["min_ms"] <= status["latency"]["average_ms"] <= status["latency"]["max_ms"]
    assert status["disk"]["bytes"] > 20_000
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", status["generated_at"])
    assert "XBV0uM3" not in json.dumps(status)
    assert ask(log.url, "/healthz")[0] == 200
    log.log.sequencer._disk_trouble = "no room"
    answer = ask(log.url, "/healthz")
    assert (answer[0], "retry-after" in answer[1]) == (503, True)
    assert ask(log.url, "/.well-known/public-key")[2] == f"{LOG_VKEY}\n".encode()


def test_T3_T6_a_commit_that_fails_ends_the_log(tmp_path: Path) -> None:
    with contextlib.closing(LocalLog(tmp_path / "log")) as log:
        assert add(log.url, entry(0))[0] == 200
        faulty = Faulty(log.store.database._writer, 10**9, True)
        log.store.database._writer = faulty  # type: ignore[assignment]
        assert add(log.url, entry(1))[0] == 200
        faulty.left = 10**9 - faulty.left  # the commit of the next add
        status, answer = add(log.url, entry(2))
        assert (status, answer["error"]) == (503, "stopped: log.sqlite3: a commit failed: disk I/O error")
        assert log.log.failed.is_set()
        assert add(log.url, entry(3))[0] == 503
        assert ask(log.url, "/healthz")[0] == 503
        assert log.log.published.tree.size == len(walk(log.url)) == 2
    with contextlib.closing(LocalLog(tmp_path / "log")) as log:
        assert add(log.url, entry(2))[0] == 200  # once, whether the commit went through or not
        assert walk(log.url) == [entry(0), entry(1), entry(2)]


def test_T68_a_passing_error_fails_nobody(log: LocalLog) -> None:
    log.store.database._writer = faulty = Faulty(log.store.database._writer, 3, False)  # type: ignore[assignment]
    statuses: list[int] = []
    at_once(*(lambda i=i: statuses.append(add(log.url, entry(i))[0]) for i in range(8)))
    assert statuses == [200] * 8
    assert faulty.left < 0
    assert log.log.trouble == ""
    assert sorted(walk(log.url)) == sorted(entry(i) for i in range(8))


# --- HTTP: what is not a request ----------------------------------------------------------------------------------------------------


def raw(port: int, data: bytes, end: bool = False, answers: int = 10**6) -> bytes:
    """All that the server sends until it closes; or, once there are `answers`, until it sends no more for a moment."""
    with socket.create_connection(("127.0.0.1", port), 10) as connection:
        with contextlib.suppress(OSError):  # it may have closed before it has read all of it
            connection.sendall(data)
        if end:
            connection.shutdown(socket.SHUT_WR)
        got = b""
        with contextlib.suppress(TimeoutError, ConnectionResetError):
            while part := connection.recv(65536):
                got += part
                connection.settimeout(0.1 if got.count(b"HTTP/1.1 ") >= answers else 10)
        return got


class Oracle(http.server.BaseHTTPRequestHandler):
    """What http.server says to the same bytes."""

    protocol_version, timeout = "HTTP/1.1", 0.2

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_POST = do_HEAD = do_GET

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def http_server() -> Iterator[int]:
    """The port of Python's own server."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Oracle) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


BODY = as_line(entry(0))[:-1]
REQUESTS = [  # what is sent, and the statuses of the answers
    (b"GET /checkpoint HTTP/1.1\r\n\r\n", [200]),
    (b"GET /checkpoint HTTP/1.1\r\nHost: a\r\n\r\n" * 3, [200] * 3),  # pipelined
    (
        b"GET /checkpoint HTTP/1.1\r\n\r\nGET /x HTTP/1.1\r\n\r\nHEAD /x HTTP/1.1\r\n\r\nGET /healthz HTTP/1.1\r\n\r\n",
        [200, 404, 404, 200],
    ),
    (b"GET /checkpoint HTTP/1.0\r\n\r\nGET /checkpoint HTTP/1.0\r\n\r\n", [200]),
    (b"GET /checkpoint HTTP/1.1\r\nConnection: close\r\n\r\nGET /checkpoint HTTP/1.1\r\n\r\n", [200]),
    (b"GET /checkpoint HTTP/1.1\r\nContent-Length: 5\r\n\r\nhelloGET /checkpoint HTTP/1.1\r\n\r\n", [200, 200]),
    (
        b"POST /add HTTP/1.1\r\nContent-Length: %d\r\n\r\n%bGET /checkpoint HTTP/1.1\r\n\r\n" % (len(BODY), BODY),
        [200, 200],
    ),
    (b"POST /add HTTP/1.1\r\nContent-Length: 0\r\n\r\n", [400]),
    (b"POST /add HTTP/1.1\r\n\r\n", [411]),
    (b"POST /add HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n", [411]),
    (b"POST /add HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\nhello", [411]),
    (b"GET /checkpoint HTTP/1.1\r\nTransfer-Encoding: identity\r\n\r\n", [411]),
    *((b"POST /add HTTP/1.1\r\nContent-Length: %b\r\n\r\n" % length, [400]) for length in (
        b"-1", b"+5", b"5_0", b"0x5", b"5, 5", b"", b"\xb2", b"9" * 20, b"5\r\nContent-Length: 6",
        b"5\r\nContent-Length: 5")),
    (b"POST /add HTTP/1.1\r\nContent-Length: 9999999999\r\n\r\n", [413]),
    (
        b"POST /admin/bulk/append HTTP/1.1\r\nContent-Type: application/x-ndjson\r\nContent-Length: 9999999999\r\n\r\n",
        [413],
    ),
    *((b"GET /checkpoint HTTP/1.1\r\n%b\r\n\r\n" % header, [400]) for header in (
        b"A: b\r\n c", b" A: b", b"A : b", b"A", b": b", b"A: b\0c", b"A: b\rc", b"A: b\nC: d", b"Host: a\r\nHost: b")),
    *((line + b"\r\n\r\n", [400]) for line in (
        b"", b"\r\nGET /checkpoint HTTP/1.1", b"GET", b"GET /checkpoint", b"GET /check\0point HTTP/1.1",
        b"GET /check point HTTP/1.1", b"GET /checkpoint\xff HTTP/1.1", b"GET  /checkpoint HTTP/1.1",
        b" GET /checkpoint HTTP/1.1", b"GET /checkpoint HTTP/1", b"GET /checkpoint HTTP/1.1.1",
        b"GET /checkpoint HTTP/1.a", b"GET /checkpoint HTTP/+1.1", b"GET /checkpoint http/1.1",
        b"G\xc3\x89T / HTTP/1.1", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
    )),
    (b"GET /checkpoint HTTP/1.1\nA: b\n\n", [400]),
    (b"GET /checkpoint HTTP/2.0\r\n\r\n", [505]),
    (b"GET /checkpoint HTTP/0.9\r\n\r\n", [505]),
    (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", [505]),
    (b"GET /" + b"x" * 65_536 + b" HTTP/1.1\r\n\r\n", [414]),
    (b"GET /" + b"x" * 70_000, [414]),
    (b"GET / HTTP/1.1\r\nA: " + b"x" * 65_536 + b"\r\n\r\n", [431]),
    (b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 101 + b"\r\n", [431]),
    (b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 50_000, [431]),
    # 60,000 spaces and a byte that is not allowed: a regular expression that goes back would take hours
    *((b"GET /x HTTP/1.1\r\nX:" + b" " * 60_000 + tail + b"\r\n\r\n", [400]) for tail in (b"\x7f", b"\n", b"\0")),
    (b"GET /x HTTP/1.1\r\nX:" + b" " * 60_000 + b"\r\n\r\n", [404]),
]


def test_raw_requests(log: LocalLog, http_server: int) -> None:
    assert len(REQUESTS) == 62
    for data, statuses in REQUESTS:
        begun = time.monotonic()
        answer = raw(log.port, data, answers=len(statuses))
        assert time.monotonic() - begun < 1
        assert [int(s) for s in re.findall(rb"HTTP/1\.1 (\d+) [A-Z]", answer)] == statuses, data[:100]
        if statuses[0] >= 400:
            assert b"\r\nContent-Type: application/json\r\n" in answer
            assert b'\r\n\r\n{"error": "' in answer
        else:  # Python's own server takes it too
            assert b" 200 " in raw(http_server, data, answers=1).split(b"\r\n")[0], data
        assert ask(log.url, "/checkpoint")[0] == 200


def test_T61_half_requests_and_half_closed_sockets(log: LocalLog) -> None:
    request = b"POST /add HTTP/1.1\r\nContent-Length: %d\r\n\r\n%b" % (len(BODY), BODY)
    assert raw(log.port, request, end=True).startswith(b"HTTP/1.1 200 ")  # who closes its side still gets its answer
    assert raw(log.port, b"GET /checkpoint HTTP/1.1\r\n\r\n" * 2, end=True).count(b"HTTP/1.1 200 ") == 2
    for cut in range(1, len(request)):
        answer = raw(log.port, request[:cut], end=True)
        assert answer.startswith(b"HTTP/1.1 400 "), cut
    for _ in range(20):
        socket.create_connection(("127.0.0.1", log.port)).close()
    assert log.log.published.tree.size == 1


def test_T61_slow_clients_are_cut_off(log: LocalLog, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "IDLE_TIMEOUT", "HEAD_TIMEOUT", "LINGER_TIMEOUT":
        monkeypatch.setattr(btlog, name, 0.2)
    monkeypatch.setattr(btlog, "MIN_RATE", 10**9)
    for start, byte, answer in (
        (b"", b"", b""), (b"G", b"E", b"HTTP/1.1 408 "), (b"GET / HTTP/1.1\r\nA:", b"b", b"HTTP/1.1 408 "),
        (b"POST /add HTTP/1.1\r\nContent-Length: 1000\r\n\r\n", b"x", b"HTTP/1.1 408 "),
    ):
        with socket.create_connection(("127.0.0.1", log.port), 10) as connection:
            connection.sendall(start)
            begun, got = time.monotonic(), b""
            connection.settimeout(0.05)
            while time.monotonic() < begun + 8:  # a byte now and then does not keep it open
                with contextlib.suppress(TimeoutError):
                    if not (part := connection.recv(65536)):
                        break
                    got += part
                with contextlib.suppress(OSError):
                    connection.sendall(byte)
            else:
                pytest.fail("it is still open")
            assert got.startswith(answer)
    assert add(log.url, entry(0))[0] == 200


def test_a_client_that_expects_to_be_asked_on(log: LocalLog) -> None:
    with socket.create_connection(("127.0.0.1", log.port), 10) as connection:
        connection.sendall(b"POST /add HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(BODY))
        assert connection.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(BODY)
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
        connection.sendall(b"POST /add HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 999999999\r\n\r\n")
        assert connection.recv(65536).startswith((b"HTTP/1.1 413 ", b"HTTP/1.1 100 "))


def test_a_bulk_over_http_1_0_or_byte_by_byte(log: LocalLog) -> None:
    """HTTP/1.0 is how nginx asks by default: without chunks, to the end of the connection."""
    head = b"POST /admin/bulk/append HTTP/%b\r\nContent-Type: application/x-ndjson\r\nContent-Length: %d\r\n\r\n%b"
    body = many_lines(0, 600)
    answer, _, rest = raw(log.port, head % (b"1.0", len(body), body)).partition(b"\r\n\r\n")
    assert b"chunked" not in answer
    assert b"Content-Length" not in answer
    assert [json.loads(line)["type"] for line in rest.splitlines()] == ["checkpoint", *["result"] * 600, "complete"]
    body = many_lines(0, 5)
    with socket.create_connection(("127.0.0.1", log.port), 10) as connection:
        for byte in head % (b"1.1\r\nConnection: close", len(body), body):
            connection.sendall(bytes([byte]))
        got = all_of(connection)
    assert got.count(b'"status":"logged"') == 5
    assert got.endswith(b"\r\n0\r\n\r\n")


def test_errors_of_our_own_say_nothing_of_the_inside(
    log: LocalLog, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    add(log.url, entry(0))
    change_store(Path(log.store.database.path).parent, "DELETE FROM bundle")
    status, _, body = ask(log.url, "/tile/entries/000.p/1")
    assert (status, body) == (500, b'{"error": "internal error"}\n')
    assert "is missing" in caplog.text
    monkeypatch.setitem(btlog.LogHandler.PAGES, "/checkpoint", lambda handler: 1 // 0)
    assert ask(log.url, "/checkpoint")[::2] == (500, b'{"error": "internal error"}\n')
    assert "ZeroDivisionError" in caplog.text


def memory() -> float:
    """MiB that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


def all_of(connection: socket.socket) -> bytes:
    """What is sent until the other side closes."""
    return b"".join(iter(functools.partial(connection.recv, 65536), b""))


def test_a_client_that_does_not_read_holds_little(log: LocalLog, monkeypatch: pytest.MonkeyPatch) -> None:
    bulk(log.url, many_lines(0, 256))
    monkeypatch.setattr(btlog, "SEND_TIMEOUT", 1)
    request = b"GET /tile/0/000 HTTP/1.1\r\n\r\n"
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", log.port))
        connection.settimeout(0.2)
        before, sent = memory(), 0
        with contextlib.suppress(OSError):
            for _ in range(200):
                sent += connection.send(request * 2000)
        assert sent < 20_000_000  # it is not read from while it does not read
        assert memory() - before < 60
        assert add(log.url, entry(300))[0] == 200
        eventually(lambda: len(log.server.connections) <= 1)  # and after a while it is gone
    assert add(log.url, entry(301))[0] == 200


def test_a_flood_of_pipelined_requests_starves_nobody(log: LocalLog) -> None:
    add(log.url, entry(0))
    over = threading.Event()
    got = 0

    def flood() -> None:
        nonlocal got
        with socket.create_connection(("127.0.0.1", log.port), 10) as connection:
            connection.settimeout(0.001)
            requests = b"GET /checkpoint HTTP/1.1\r\n\r\n" * 3000
            rest = b""
            while not over.is_set():
                rest = rest or requests
                with contextlib.suppress(TimeoutError):
                    rest = rest[connection.send(rest) :]
                with contextlib.suppress(TimeoutError):
                    got += connection.recv(1 << 20).count(b"HTTP/1.1 200 ")

    thread = threading.Thread(target=flood)
    thread.start()
    slowest = 0.0
    for i in range(20):
        begun = time.monotonic()
        assert add(log.url, entry(1 + i))[0] == 200
        slowest = max(slowest, time.monotonic() - begun)
    over.set()
    thread.join()
    assert got > 100
    assert slowest < 1


def test_answers_come_in_the_order_of_the_requests(log: LocalLog) -> None:
    """Entries, which are there, and adds, which take their time, on one connection, in pieces of any size."""
    bulk(log.url, many_lines(0, 30))
    choose = random.Random(5)
    for trial in range(8):
        wanted = [choose.randrange(30) for _ in range(30)]
        stream = b""
        for i in wanted:
            body = as_line(entry(i))
            if choose.random() < 0.5:
                stream += b"GET /entry/%d HTTP/1.1\r\n\r\n" % i
            else:
                stream += b"POST /add HTTP/1.1\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
        with socket.create_connection(("127.0.0.1", log.port), 10) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
            while stream:
                piece = choose.randrange(1, 400)
                connection.sendall(stream[:piece])
                stream = stream[piece:]
            connection.shutdown(socket.SHUT_WR)
            got = all_of(connection)
        assert [int(i) for i in re.findall(rb'\r\n\r\n\{"index": ?(\d+)', got)] == wanted, trial


def test_a_connection_that_is_reset_says_nothing(log: LocalLog, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", log.port), 10) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            connection.sendall(b"GET /checkpoint HTTP/1.1\r\n\r\n" * 5000)
    assert add(log.url, entry(0))[0] == 200
    assert caplog.records == []


def test_publishers_of_one_file_are_bounded(log: LocalLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(btlog, "MAX_FOUND", 20)
    publishers = [Entry("one.whl", SUM, Publisher("i", f"s{i}")).encode() for i in range(25)]
    assert [add(log.url, data)[0] for data in publishers] == [200] * 20 + [409] * 5
    assert add(log.url, publishers[7])[1]["index"] == 7
    assert len(json.loads(ask(log.url, f"/entries?checksum={SUM}")[2])["entries"]) == 20


def test_connections_have_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(btlog, "MAX_CONNECTIONS", 20)
    with contextlib.closing(LocalLog(tmp_path / "log")) as log, contextlib.ExitStack() as stack:
        for i in range(100):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", log.port), 10))
            connection.sendall(b"GET /" if i % 2 else b"")
        assert add(log.url, entry(0))[0] == 200  # those that ask for nothing make room
        assert len(log.server.connections) <= 20


# --- Commands ------------------------------------------------------------------------------------------------------------------------


def test_keygen(tmp_path: Path) -> None:
    private, public = tmp_path / "private.key", tmp_path / "public.key"
    keygen = ("keygen", "--origin", "log.example/pypi")
    assert exits(0, "", *keygen, cwd=tmp_path) == public.read_text()
    signer = btlog.Signer.parse(private.read_text().removesuffix("\n"))
    assert signer.key == VerifierKey.parse(public.read_text().removesuffix("\n"))
    assert signer.name == "log.example/pypi"
    assert private.stat().st_mode & 0o777 == 0o600  # T66
    before = private.read_bytes(), public.read_bytes()
    assert exits(2, "never overwritten", *keygen, cwd=tmp_path) == ""
    private.rename(tmp_path / "elsewhere")
    exits(2, "", *keygen, cwd=tmp_path)
    assert not private.exists()  # both files or none
    assert ((tmp_path / "elsewhere").read_bytes(), public.read_bytes()) == before
    for origin in "", "a b", "a+b", "a" * 256, "a\nb":  # T38
        paths = ("--private-key-path", "p", "--public-key-path", "q")
        exits(2, "btlog: ", "keygen", "--origin", origin, *paths, cwd=tmp_path)
        assert not (tmp_path / "p").exists()


def test_vkey_of_pem_and_der(tmp_path: Path) -> None:
    der = bytes.fromhex("302a300506032b6570032100") + LOG.key
    lines = "\n".join(b64(der)[i : i + 64] for i in range(0, 60, 64))
    vkey = ("vkey", "--origin", LOG.name, "--public-key-path", "key")
    for text in f"-----BEGIN PUBLIC KEY-----\n{lines}\n-----END PUBLIC KEY-----\n", b64(der), b64(der) + "\n":
        (tmp_path / "key").write_text(text)
        assert exits(0, "", *vkey, cwd=tmp_path) == LOG_VKEY + "\n"
    other_type = b64(der.replace(b"\x70", b"\x71"))
    for text in "", "x", b64(der[:-1]), b64(LOG.key), "-----BEGIN PUBLIC KEY-----\n", other_type:
        (tmp_path / "key").write_text(text)
        assert exits(2, "btlog: ", *vkey, cwd=tmp_path, lines=1) == ""


def test_T7_a_first_start_needs_nothing(tmp_path: Path) -> None:
    """What a start left that was killed is cleared away; a key that is only half there never exists under its name."""
    folder = tmp_path / "btlog-data"
    folder.mkdir()
    left = [".log.sqlite3.77.new", ".log.sqlite3.77.new-wal", ".log.sqlite3.77.new-shm", ".private.key.77.new"]
    for name in left:
        (folder / name).write_text("half")
    with running("serve", cwd=tmp_path) as server:
        url, serves, the, log_, vkey, *_ = server.line.split()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+", url)
        assert (serves, the, log_) == ("serves", "the", "log")
        assert ask(url, "/.well-known/public-key")[2].decode() == vkey + "\n" == (folder / "public.key").read_text()
        policy = btlog.simple_policy([VerifierKey.parse(vkey)])
        assert open_checkpoint(ask(url, "/checkpoint")[2], policy).tree == Tree(0, btlog.EMPTY_ROOT)
        assert add(url, entry(0))[0] == 200
        assert server.stop()[0] == 0
    assert sorted({*os.listdir(folder)} - {left[-1]}) == ["log.sqlite3", "private.key", "public.key"]
    assert (folder / "private.key").stat().st_mode & 0o777 == 0o600
    (folder / "public.key").unlink()
    with running("serve", "--storage-dir", str(folder)) as server:
        assert server.line.split()[4] == vkey == (folder / "public.key").read_text().strip()
        assert walk(server.url, policy) == [entry(0)]
        assert add(server.url, entry(0))[1]["index"] == 0
        assert server.stop(signal.SIGINT) == (0, "")  # no traceback


def test_the_keys_of_bt_log_load(tmp_path: Path) -> None:
    (tmp_path / "private.key").write_text(BT_LOG_SKEY)
    (tmp_path / "public.key").write_text(BT_LOG_VKEY)
    (tmp_path / "private.key").chmod(0o644)
    serve = ("serve", "--storage-dir", "log")
    key, public = ("--private-key", "private.key"), ("--public-key", "public.key")
    with running(*serve, *key, *public, "--new", cwd=tmp_path) as server:
        assert server.line.split()[4] == BT_LOG_VKEY
        assert add(server.url, entry(0))[0] == 200
        assert "can be read by other users" in server.stop()[1]  # T66
    (tmp_path / "public.key").write_text(LOG_VKEY)
    exits(2, "is not the public key of", *serve, *key, *public, "--port", "0", cwd=tmp_path)
    exits(2, "", *serve, *key, "--origin", "other.example", "--port", "0", cwd=tmp_path)
    exits(2, "", *serve, "--port", "0", cwd=tmp_path)  # it makes no key for a log that has one
    assert not (tmp_path / "log" / "private.key").exists()


def test_a_server_that_is_only_read(tmp_path: Path) -> None:
    with contextlib.closing(found(tmp_path / "log")) as store:
        fill(store, 3)
    with running("serve", "--storage-dir", "log", "--read-only", "--host", "127.0.0.1", cwd=tmp_path) as reader:
        assert reader.line.split()[4] == LOG_VKEY
        assert walk(reader.url) == [entry(0), entry(1), entry(2)]  # without a writer
        with contextlib.closing(LocalLog(tmp_path / "log")) as writer:
            add(writer.url, entry(3))  # what is published later is seen
            assert walk(reader.url) == [entry(0), entry(1), entry(2), entry(3)]
            name = Entry.parse(entry(3)).filename
            assert json.loads(ask(reader.url, f"/entries?filename={name}")[2])["entries"][0]["index"] == 3
        assert add(reader.url, entry(9))[0] == 405
        assert reader.stop() == (0, "")
    exits(3, "", "serve", "--storage-dir", "nothing", "--read-only", cwd=tmp_path)
    assert not (tmp_path / "nothing").exists()


def test_on_other_addresses_writing_needs_a_word(tmp_path: Path) -> None:
    serve = ("serve", "--host", "0.0.0.0", "--port", "0")
    exits(2, "--write-token-file, --read-only or --open-writes", *serve, cwd=tmp_path)
    assert os.listdir(tmp_path) == []
    (tmp_path / "empty").write_text("\n")
    exits(2, "", *serve, "--write-token-file", "empty", cwd=tmp_path)
    for host in "127.0.0.1", "127.1.2.3", "::1", "localhost":
        assert btlog.is_loopback(host)
    for host in "0.0.0.0", "::", "10.0.0.1", "log.example":
        assert not btlog.is_loopback(host)


def wheel(path_: Path, text: str = "x") -> Path:
    path_.write_bytes(hashlib.sha256(text.encode()).digest() * 10_000)
    return path_


def test_add_and_verify_online_and_offline(log: LocalLog, tmp_path: Path) -> None:
    file, other = "some-1.0-py3-none-any.whl", "other-1.0+local é.tar.gz"
    for name in file, other:
        wheel(tmp_path / name, name)
    (tmp_path / "public.key").write_text(LOG_VKEY)
    (tmp_path / "policy").write_text(f"log {LOG_VKEY} {log.url}\nquorum none\n")
    key, at = ("--public-key", "public.key"), ("--log-url", log.url)

    def does(code: int, says: str, *args: str, lines: int | None = None) -> str:
        return exits(code, says, *args, cwd=tmp_path, lines=lines)

    assert does(0, "", "add", file, other, *at, *key, lines=0).count("logged at index") == 2
    does(3, "", "add", file, *at, "--proof-dir", "proofs")
    (tmp_path / "proofs").mkdir()
    does(0, "hold it to that with --public-key", "add", file, *at, "--proof-dir", "proofs")
    assert os.listdir(tmp_path / "proofs") == [f"{file}.tlog-proof"]
    for more in at, (), ("--proof", f"proofs/{file}.tlog-proof"):
        assert "logged at index 0 of" in does(0, "", "verify", file, *key, *more, lines=0)
    does(0, "", "verify", file, other, *key, *at)
    (tmp_path / f"{other}.tlog-proof").unlink()
    does(0, "", "verify", file, other, "--policy", "policy")  # which knows the log's URL
    does(3, "--log-url", "verify", other, *key)
    signed = wheel(tmp_path / "signed-1.0.whl")
    assert add(log.url, Entry(signed.name, btlog.checksum_of(signed), PUBLISHER).encode())[0] == 200
    assert "published by https://example.com/a b" in does(0, "", "verify", signed.name, *key, *at)

    shutil.copy(tmp_path / file, tmp_path / "some-1.1-py3-none-any.whl")
    changed, proof = f"changed/{file}", ("--proof", f"{file}.tlog-proof")
    (tmp_path / "changed").mkdir()
    wheel(tmp_path / changed, "another")
    (tmp_path / "wrong.key").write_text(WITNESS_VKEY)
    (tmp_path / "garbage").write_bytes(b"garbage")
    for code, says, *args in (
        (1, "not logged", "some-1.1-py3-none-any.whl", *key, *at),  # T54
        (1, "the proof does not show", "some-1.1-py3-none-any.whl", *key, *proof),  # T55
        (1, "with another checksum at index 0", changed, *key, *at),
        (1, "the proof does not show", changed, *key, *proof),
        (1, "no signature of a trusted key", file, "--public-key", "wrong.key", *at),
        (1, "no signature of a trusted key", file, "--public-key", "wrong.key"),
        (1, "not a c2sp.org/tlog-proof@v1", file, *key, "--proof", "garbage"),
        (3, "can't read", "missing.whl", *key, *at),
        (3, "can't read", file, *key, "--proof", "missing"),
        (2, "can't read", file, "--public-key", "missing", *at),
        (2, "give --policy F, or --public-key F", file, *at),
        (2, "give --policy F, or --public-key F", file, *key, "--policy", "policy"),
        (2, "the proof of one file", file, other, *key, "--proof", "garbage"),
        (3, "is not reached", other, *key, "--log-url", "http://127.0.0.1:1"),
    ):
        assert does(code, says, "verify", *args, lines=1) == "", args
    does(1, "is logged with another checksum, at index 0", "add", changed, *at)
    does(3, "btlog: ", "add", other, "--log-url", "http://127.0.0.1:1", lines=1)
    Local.close(log)
    does(0, "", "verify", file, *key)  # offline it still holds


class Liar:
    """A log that answers as it is told."""

    def __init__(self, **answers: Any) -> None:
        self.answers = answers

    def answer(self, request: btlog.Handler, body: btlog.Body) -> btlog.Response:
        key = request.route.strip("/").replace("/", "_").replace(".", "").replace("-", "")
        value = self.answers.get(key, self.answers.get("else_"))
        if value is None:
            raise btlog.HttpError(404, "nothing")
        return value if isinstance(value, btlog.Response) else btlog.Response(value)


def facing(tmp_path: Path, command: str, code: int, **answers: Any) -> None:
    """A command ends with that code where a log answers so, and passes nothing odd on to the terminal."""
    with contextlib.closing(Local(Liar(**answers).answer)) as liar:
        done = call_btlog(
            command, str(tmp_path / "some-1.0.whl"), "--public-key", str(tmp_path / "key"), "--log-url", liar.url
        )
    assert done[0] == code, (answers, done)
    assert not re.search("[\x07\x1b]", done[2])


def test_T53_T54_logs_that_lie(tmp_path: Path) -> None:
    """What a log says beside the proof is believed for nothing, and does not reach the terminal."""
    file = wheel(tmp_path / "some-1.0.whl")
    (tmp_path / "key").write_text(LOG_VKEY)
    checksum = btlog.checksum_of(file)

    def row(index: Any = 0, filename: str = file.name, checksum: str = checksum) -> bytes:
        return json.dumps({"entries": [{"index": index, "filename": filename, "checksum": checksum}]}).encode()

    evil = "\x1b[31mEVIL\x1b]0;x\x07"
    other = proof_of_one(Entry("other", SUM))  # a valid proof, of something else
    bomb = btlog.Response(gzip.compress(bytes(btlog.MAX_ANSWER + 1)), headers={"Content-Encoding": "gzip"})
    answers: list[tuple[int, dict[str, Any]]] = [
        (3, {}),
        *((3, {"entries": body}) for body in (
            b"x", b"[]", b'{"entries":1}', b'{"entries":[1]}', b"[" * 100_000, row(), row("../x"), row(evil),
            btlog.Response(b"x", headers={"Content-Encoding": "gzip"}), bomb,
            btlog.Response.json({"error": evil}, {}, 500),
        )),
        *((1, {"entries": body}) for body in (
            b'{"entries":[]}', row(checksum="x"), row(filename=file.name + "x"),  # T54: only starts alike
        )),
        (1, {"entries": row(), "entry_0_proof": b"x"}),
        (1, {"entries": row(), "entry_0_proof": other}),
        (3, {"else_": btlog.Response(b"", status=302, headers={"Location": "/x"})}),
        (3, {"else_": btlog.Response(b"", status=500)}),
        (3, {"else_": btlog.Response(evil.encode(), status=400)}),
    ]
    for code, answer in answers:
        facing(tmp_path, "verify", code, **answer)


def test_T26_add_believes_nothing_and_follows_no_redirect(tmp_path: Path) -> None:
    file = wheel(tmp_path / "some-1.0.whl")
    (tmp_path / "key").write_text(LOG_VKEY)
    data = Entry(file.name, btlog.checksum_of(file)).encode()
    note = b64(SIGNER.sign(Checkpoint(LOG.name, Tree(1, leaf_hash(data)))))
    good = {"index": 0, "checkpoint": note, "inclusionProof": []}
    proof = Path(f"{file}.tlog-proof")
    for bad in (
        {**good, "index": 1}, {**good, "index": -1}, {**good, "index": 0.0}, {**good, "index": None},
        {**good, "checkpoint": ""}, {**good, "checkpoint": b64(SIGNED.encode())}, {**good, "more": 1},
        {**good, "inclusionProof": [b64(bytes(32))]}, {**good, "inclusionProof": 5}, {**good, "inclusionProof": None},
        {"checkpoint": note, "inclusionProof": []}, [good], {},
    ):
        facing(tmp_path, "add", 1, add=json.dumps(bad).encode())
    for status in 301, 302, 303, 307, 308:
        redirect = btlog.Response(b"", status=status, headers={"Location": "/elsewhere"})
        facing(tmp_path, "add", 3, add=redirect, elsewhere=json.dumps(good).encode())
    assert not proof.exists()
    facing(tmp_path, "add", 0, add=json.dumps(good).encode())
    assert proof.exists()


def test_fsck_as_a_command(tmp_path: Path) -> None:
    fsck = ("fsck", "--storage-dir", "log")
    with contextlib.closing(found(tmp_path / "log")) as store:
        fill(store, 300)
        assert "all 300 entries" in exits(0, "", *fsck, cwd=tmp_path, lines=0)  # also while it is open elsewhere
    change_store(tmp_path / "log", "UPDATE tile SET data = zeroblob(8192) WHERE key = 0")
    assert "tile/0/000, hash 0: not the hash of entry 0" in exits(1, "", *fsck, cwd=tmp_path)
    (tmp_path / "log" / "log.sqlite3").write_bytes(b"\0" * 8192)  # T1: an accident, not a finding
    exits(3, "", *fsck, cwd=tmp_path)
    exits(3, "", "fsck", "--storage-dir", "nothing", cwd=tmp_path)


def test_fsck_of_a_log_that_goes_on(log: LocalLog, tmp_path: Path) -> None:
    over = threading.Event()

    def write() -> None:
        for i in itertools.count(0, 7):
            bulk(log.url, many_lines(i, i + 7))
            if over.is_set():
                return

    thread = threading.Thread(target=write)
    thread.start()
    try:
        for _ in range(6):
            exits(0, "", "fsck", "--storage-dir", "log", cwd=tmp_path, lines=0)
    finally:
        over.set()
        thread.join()


def test_urls_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "key").write_text(LOG_VKEY)
    (tmp_path / "w").write_text(WITNESS_VKEY)
    wheel(tmp_path / "a.whl")
    for url in (
        "http://[::1", "http://a..b/", "http://.example/", "http://" + "a" * 70 + ".example/",
        "http://127.0.0.1:1/\u00fc", "http://a b/", "http://h\u2100.example/", "x", "http://",
        "http://127.0.0.1:99999/", "http://127.0.0.1:1/ x",
    ):
        for command in (
            ("health", url), ("verify", "a.whl", "--public-key", "key", "--log-url", url),
            ("add", "a.whl", "--log-url", url),
            ("serve", "--port", "0", "--witness-url", url, "--witness-public-key", "w"),
        ):
            exits((2, 3), "btlog: ", *command, cwd=tmp_path)


def test_tokens_that_dont_fit_are_not_shown(tmp_path: Path) -> None:
    wheel(tmp_path / "a.whl")
    token = ("--write-token-file", str(tmp_path / "token"))
    for text in "tok\nen", "t\u00f6ken", "", "a b", "\n":
        (tmp_path / "token").write_text(text)
        for command in ("add", str(tmp_path / "a.whl"), "--log-url", "http://127.0.0.1:1"), ("serve", "--port", "0"):
            code, _, said = call_btlog(*command, *token)
            assert (code, "tok" in said.replace("token", "")) == (2, False)
    (tmp_path / "token").write_text(" s3cret \n")
    with running("serve", *token, cwd=tmp_path) as server:
        to = ("add", "a.whl", "--log-url", server.url)
        exits(0, "", *to, *token, cwd=tmp_path)
        exits(2, "see --write-token-file", *to, cwd=tmp_path)


def test_health_as_a_command(log: LocalLog) -> None:
    exits(0, "", "health", log.url)
    exits(0, "", "health", "http://127.0.0.1:1", log.url)
    log.log.sequencer._halt_reason = "x"
    exits(3, "btlog: ", "health", log.url, "http://127.0.0.1:1", lines=1)


COMMANDS = [
    "keygen", "vkey", "core", "serve", "witness", "add", "verify", "proxy", "fsck", "health", "monitor", "export", "ingest", "demo",
    "conformance",
]


def test_help_reads_well() -> None:
    top = exits(0, "", "--help", lines=0)
    assert all(re.search(rf"^    {name}(?: |$)", top, re.MULTILINE) for name in COMMANDS)
    assert exits(2, "") == top
    for name in COMMANDS:
        text = exits(0, "", name, "--help")
        example = re.search(rf"example:\n  btlog ({name} .*)", text)
        assert example
        assert btlog.parser().parse_args(example[1].partition(">")[0].split())
        assert "None" not in text
    assert exits(0, "", "--version") == f"btlog {btlog.__version__}\n"


def test_wrong_usage(tmp_path: Path) -> None:
    for args in (
        ["x"], ["serve", "--port", "x"], ["keygen"], ["add"], ["verify"], ["serve", "--por", "1"], ["--x"],
        ["fsck", "x"], ["add", "f", "--log-url", "x"], ["add", "f", "--log-url", "ftp://x"],
        ["add", "f", "--log-url", "http://x:y"], ["serve", "--port", "70000"],
    ):
        assert exits(2, "btlog: ", *args, cwd=tmp_path, lines=1) == ""
    for name, value in (
        ("--add-timeout", "-1"), ("--add-timeout", "nan"), ("--witness-timeout", "inf"),
        ("--republish-interval", "1e300"), ("--checkpoint-interval", "x"), ("--bulk-append-max-entries", "-1"),
        ("--port", "abc"),
    ):
        assert exits(2, name, "serve", name, value, cwd=tmp_path, lines=1) == ""
    assert os.listdir(tmp_path) == []


def test_output_that_nobody_reads(tmp_path: Path) -> None:
    with contextlib.closing(found(tmp_path / "log")) as store:
        fill(store, 3)
    command = [sys.executable, str(SOURCE), "fsck", "--storage-dir", "log"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=tmp_path, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        assert "Traceback" not in process.stderr.read()


# --- The witness: tlog-witness, status by status ---------------------------------------------------------------------------


class LocalWitness(Local):
    """A witness in this process that knows `keys`, with a clock that a test can set."""

    def __init__(self, path: Path, *keys: VerifierKey, signer: btlog.Signer = COSIGNER, port: int = 0) -> None:
        self.now = 1_000_000.0
        self.store = btlog.WitnessStore(path)
        self.witness = btlog.Witness(self.store, signer, lambda: self.now)
        self.witness.register(keys or [LOG])
        super().__init__(btlog.WitnessHandler.of(self.witness), port)

    def close(self) -> None:
        super().close()
        self.store.close()


@pytest.fixture
def witness(tmp_path: Path) -> Iterator[LocalWitness]:
    with contextlib.closing(LocalWitness(tmp_path / "witness.db")) as server:
        yield server


def request_for(
    old: int, new: int, signer: btlog.Signer = SIGNER, tag: str = "", proof: list[bytes] | None = None, more: str = ""
) -> bytes:
    """An add-checkpoint request for a log of the entries "entry 0"…, or of others with another tag, by oracles alone."""
    entries = [e + tag.encode() for e in ENTRIES[:new]]
    text = f"{signer.name}\n{new}\n{b64(root_of(entries))}\n{more}"
    hashes = (subproof(old, entries, True) if 0 < old <= new else []) if proof is None else proof
    lines = "".join(f"{b64(h)}\n" for h in hashes)
    return f"old {old}\n{lines}\n".encode() + note_of(text, signature_line(signer, text))


def cosign(server: LocalWitness, body: bytes) -> tuple[int, str, bytes]:
    status, headers, answer = ask(server.url, "/add-checkpoint", "POST", body)
    return status, headers["content-type"], answer


def stored(server: LocalWitness, origin: str = LOG.name) -> tuple[int, bytes]:
    return ask(server.url, f"/{hashlib.sha256(origin.encode()).hexdigest()}/checkpoint")[::2]


def offered(body: bytes) -> bytes:
    return body.partition(b"\n\n")[2]


def cosigned(server: LocalWitness, body: bytes, policy: Policy = POLICY) -> Checkpoint:
    """What the policy makes of a checkpoint with the cosignature that the witness gives it."""
    status, _, answer = cosign(server, body)
    assert status == 200
    return open_checkpoint(offered(body) + answer, policy)


def test_T32_T35_a_cosignature(witness: LocalWitness) -> None:
    assert stored(witness)[0] == 404
    for old, new in (0, 0), (0, 3), (3, 3), (3, 8), (8, 8), (8, 500):
        body = request_for(old, new)
        status, kind, answer = cosign(witness, body)
        assert (status, kind, answer.count(b"\n")) == (200, "text/plain; charset=utf-8", 1)
        opened = open_checkpoint(offered(body) + answer, POLICY)
        assert (opened.tree.size, opened.cosigned[0][1]) == (new, 1_000_000)
        assert stored(witness) == (200, offered(body) + answer)
    body = request_for(500, 501, more="an extension\n")  # T37
    assert cosigned(witness, body).extensions == ("an extension",)


def test_T34_T35_only_the_witness_signs_the_answer(witness: LocalWitness) -> None:
    """Two log signatures, unknown lines (T40) and a forged one in its own name in the request, in any order."""
    second = new_key(LOG.name)
    witness.witness.register([second.key])  # a further key of a known log
    text = f"{LOG.name}\n3\n{b64(root_of(ENTRIES[:3]))}\n"
    ours, theirs = signature_line(SIGNER, text), signature_line(second, text)
    forged = f"— {WITNESS.name} {b64(btlog.as_witness(WITNESS).key_id + bytes(72))}\n"
    unknown = [signature_line(new_key(f"x{i}.example"), text) for i in range(15)]
    head = b"old 0\n\n"
    for lines in (
        [ours, theirs, *unknown], [*unknown, theirs, ours], [theirs, *unknown], [*unknown, ours, *unknown[:3], ours],
        [forged, ours], *([*unknown[:at], ours, *unknown[at:]] for at in range(16)),
    ):
        status, _, answer = cosign(witness, head + note_of(text, *lines))
        assert status == 200
        [(name, key_id, _)] = btlog.split_note(note_of(text) + answer)[1]
        assert (name, key_id) == (WITNESS.name, btlog.as_witness(WITNESS).key_id)
        assert forged.encode() not in stored(witness)[1]
        kept = btlog.split_note(stored(witness)[1])[1]  # verified signatures only, each once
        assert {parts[:2] for parts in kept} <= {(LOG.name, LOG.key_id), (LOG.name, second.key.key_id), (name, key_id)}
        assert len(kept) == len(set(kept)) == len({line for line in lines if line in (ours, theirs)}) + 1
        head = b"old 3\n\n"
    assert cosign(witness, request_for(3, 12))[0] == 200


def test_T12_T30_the_clock_may_jump(witness: LocalWitness) -> None:
    """Each is answered with a time that is new, unless the clock went back; also a checkpoint that it has seen."""
    times = []
    for now, old, new in (500, 0, 1), (400, 1, 1), (0, 1, 2), (-5, 2, 2), (501.9, 2, 3), (2**40, 3, 3), (500, 3, 4):
        witness.now = now
        times.append(cosigned(witness, request_for(old, new)).cosigned[0][1])
    assert times == [500, 500, 500, 500, 501, 2**40, 2**40]


def test_T31_size_zero(witness: LocalWitness) -> None:
    wrong = f"{LOG.name}\n0\n{b64(bytes(32))}\n"
    for body in (
        b"old 0\n\n" + note_of(wrong, signature_line(SIGNER, wrong)),
        request_for(0, 3, proof=[bytes(32)]), request_for(0, 0, proof=[bytes(32)]),
    ):
        assert cosign(witness, body)[0] == 422
    assert stored(witness)[0] == 404
    for new in 0, 0, 3:
        assert cosign(witness, request_for(0, new))[0] == 200
    assert cosign(witness, request_for(0, 0)) == (409, "text/x.tlog.size", b"3\n")


def test_T32_T33_statuses(witness: LocalWitness) -> None:
    unknown = new_key("unknown.example")
    assert cosign(witness, request_for(0, 3, unknown))[0] == 404
    assert cosign(witness, request_for(7, 9)) == (409, "text/x.tlog.size", b"0\n")
    assert cosign(witness, request_for(0, 7))[0] == 200
    before = stored(witness)
    text = f"{LOG.name}\n9\n{b64(root_of(ENTRIES[:9]))}\n"
    right = subproof(7, ENTRIES[:9], True)
    head = request_for(7, 9).partition(b"\n\n")[0] + b"\n\n"
    imposter, mine = new_key(LOG.name), signature_line(SIGNER, text)
    other = signature_line(SIGNER, text.replace("9", "8"))
    flipped = mine.replace(mine.split()[2], b64(base64.b64decode(mine.split()[2])[:-1] + b"!"))
    for lines in (
        [signature_line(imposter, text)], [signature_line(unknown, text)], [other], [flipped], [mine, flipped],
        [other, mine], [mine.replace(LOG.name, "other.example")],
    ):
        assert cosign(witness, head + note_of(text, *lines))[0] == 403
    for status, bodies in (
        (400, [request_for(8, 7, proof=[])]),  # old above the checkpoint's size, and no conflict
        (409, [request_for(old, new) for old, new in ((6, 9), (0, 9), (8, 9), (0, 3), (3, 5))]),
        (422, [request_for(7, 9, proof=proof) for proof in ([], [bytes(32)] * 3, right[:-1], [*right, bytes(32)])]),
        (422, [request_for(7, 9, tag="x"), request_for(7, 7, tag="x")]),  # also the same size with another root
        (422, [request_for(7, 7, proof=[bytes(32)]), request_for(7, 7, tag="x", proof=[bytes(32)])]),
        (422, [request_for(7, 9, proof=[bytes(32)] * 63)]),  # T63: as many lines as there may be
        (400, [request_for(7, 9, proof=[bytes(32)] * 64)]),
    ):
        for body in bodies:
            got = cosign(witness, body)
            assert got[0] == status, body
            assert (got[1:] == ("text/x.tlog.size", b"7\n")) is (status == 409)
    assert stored(witness) == before
    assert cosign(witness, request_for(7, 9))[0] == 200


def test_T32_T42_T62_T63_malformed_requests(witness: LocalWitness) -> None:
    assert cosign(witness, request_for(0, 5))[0] == 200
    before, body = stored(witness), request_for(5, 9)
    head = body.partition(b"\n\n")[0]
    for bad in (
        b"", b"\n", b"\n\n", body[1:], b"\n" + body, body[:-1], body + b"\n", b"\xff" + body, head, head + b"\n\n",
        body.replace("\u2014".encode(), b"-"), body.replace(LOG.name.encode(), b""),
        body.replace(b"\n\n", b"\n", 1), body.replace(b"=\n", b"\n", 1), body.replace(b"\n", b"\nYQ==\n", 1),
        body.replace(b"\n", b"\r\n"), body.replace(b"old 5\n", b"old 5\n\n"),
        *(body.replace(b"old 5", old) for old in (
            b"old 05", b"old 007", b"old +5", b"old  5", b"old 5 ", b"old", b"old -1", b"Old 5", b"old \xd9\xa5",
            b"old 9223372036854775808", b"o\0ld 5")),
        *(body.replace(b"\n9\n", size) for size in (b"\n09\n", b"\n\n", b"\nx\n")),
        body + b"".join(b"\xe2\x80\x94 x%d YWFhYWFh\n" % i for i in range(1000)),
    ):
        assert bad != body
        assert cosign(witness, bad)[:2] == (400, "application/json"), bad
    assert stored(witness) == before


def test_a_witness_s_key_says_what_it_is_for(tmp_path: Path) -> None:
    """Type 0x04, from `keygen --witness` and a first start; a file of type 0x01 goes on working, and can be converted."""
    done = run_btlog("keygen", "--witness", "--origin", "w.example", "--private-key-path", "w.private", "--public-key-path", "w.key", cwd=tmp_path)
    vkey = done.stdout.strip()
    assert (VerifierKey.parse(vkey).kind, (tmp_path / "w.key").read_text()) == (4, f"{vkey}\n")
    old = btlog.encode_vkey(btlog.Signer.parse((tmp_path / "w.private").read_text().strip()).key)
    (tmp_path / "old.key").write_text(f"{old}\n")
    assert run_btlog("vkey", "--as-witness", "old.key", cwd=tmp_path).stdout == run_btlog("vkey", "--as-witness", "w.key", cwd=tmp_path).stdout == f"{vkey}\n"
    assert run_btlog("vkey", "--origin", "w.example", cwd=tmp_path).returncode == 2
    (tmp_path / "log.key").write_text(f"{LOG_VKEY}\n")
    for key in "w.key", "old.key":
        args = ("witness", "--database-path", f"{key}.db", "--private-key", "w.private", "--public-key", key, "--log-public-key", "log.key")
        with running(*args, cwd=tmp_path) as witness:
            assert f"serves the witness {vkey} of 1 logs" in witness.line
            answer = ask(witness.url, "/add-checkpoint", "POST", btlog.AddCheckpoint(0, (), SIGNED.encode()).encode())[2]
            assert btlog.take_cosignatures(TEXT_70000, answer, [VerifierKey.parse(vkey)])
    with running("witness", "--database-path", "new.db", "--origin", "n.example", cwd=tmp_path) as witness:
        assert VerifierKey.parse((tmp_path / "witness-public.key").read_text().strip()).kind == 4
    exits(2, "", "witness", "--private-key", "w.private", "--public-key", "log.key", "--port", "0", cwd=tmp_path)


LISTED = f"""
#
# List:      testing
#
logs/v0

# 1st list item -- foo's log
vkey {LOG_VKEY}
qpd 86400
contact https://log.example/contact

\t vkey {btlog.encode_vkey(new_key("key.example").key)}\r
origin go.sum database tree
qpd 2
  contact sysadmin (at) example.org
"""


def test_a_list_of_logs() -> None:
    """As the witness network's description of log-list-format.md has it, and its lists of April 2026 are."""
    logs, faults = btlog.parse_log_list(LISTED.encode())
    assert (faults, [log.origin for log in logs]) == ([], [LOG.name, "go.sum database tree"])
    assert logs[0] == (LOG, LOG.name, 86400, "https://log.example/contact")
    assert logs[1][1:] == ("go.sum database tree", 2, "sysadmin (at) example.org")
    assert btlog.parse_log_list(b"logs/v0") == btlog.parse_log_list(b"\n# x\n logs/v0 \n\n") == ([], [])
    lines = ["logs/v0", f"vkey {LOG_VKEY}", "origin o", "qpd 1", "contact c"]
    for bad in (
        [], lines[1:], ["logs/v1", *lines[1:]], lines[:-1], lines[:-2], [*lines, "x y"], [*lines, "vkey"], [*lines, lines[1]],
        [*lines[:2], "contact c", "qpd 1"], [*lines[:2], "origin o", "origin p", *lines[3:]], [*lines[:3], "qpd", "contact c"],
        [*lines[:4], "contact"], [lines[0], *lines[2:]], [*lines, *lines],
    ):  # fmt: skip
        refuses(Malformed, btlog.parse_log_list, "\n".join(bad).encode())
    for line, word in (
        *((3, f"qpd {n}") for n in ("0", "01", "-1", "1.0", str(2**31), "x", "1 2", "١")),
        *((1, f"vkey {vkey}") for vkey in (WITNESS_VKEY_4, PQ_VKEY, LOG_VKEY[:-1], "x", f"{LOG_VKEY} {LOG_VKEY}")),
        (2, f"origin {'o' * 256}"), (2, "origin a\x00b"), (2, "origin \ufffd\x1b"),
    ):  # fmt: skip
        changed = [*lines[:line], word, *lines[line + 1 :], *lines[1:]]
        logs, faults = btlog.parse_log_list("\n".join(changed).encode())
        assert ([log.qpd for log in logs], len(faults), "line 2" in faults[0]) == ([1], 1, True)


def test_a_budget_of_requests() -> None:
    budget, now = btlog.Budget(24, 1000.0), 1000.0
    assert [budget.take(now) for _ in range(24)] == [0] * 24
    assert budget.take(now) == 3600
    assert budget.take(now + 1800) == 1800
    assert (budget.take(now + 3600), budget.take(now + 3600) > 0) == (0, True)
    assert [budget.take(now + 10**9) for _ in range(25)][-2:] == [0, 3600]
    assert budget.take(now) == 3600  # a clock that was set back takes nothing away
    assert budget.take(now + 3600) == 0


def test_a_list_never_changes_what_a_witness_knows(witness: LocalWitness) -> None:
    """The first list that names an origin counts, and none where the operator has."""
    one, two, three = (new_key(f"{name}.example") for name in "abc")
    shown = "logs/v0\n" + "".join(
        f"vkey {btlog.encode_vkey(key)}\norigin {origin}\nqpd {qpd}\ncontact c\n"
        for key, origin, qpd in (
            (one.key, LOG.name, 1), (one.key, "o", 3), (two.key, "o", 4), (one.key, "p", 5), (LOG, "q", 6), (three.key, "r", 7),
            (COSIGNER.key, "s", 8), (new_key(COSIGNER.name).key, "t", 8), (new_key("u").key, COSIGNER.name, 8),
        )
    )  # fmt: skip
    for _ in range(2):
        witness.witness.discover("a list", shown.encode())
        known = {origin: [key.name for key in keys] for origin, keys in witness.witness.logs.items()}
        one_each = {"o": ["a.example"], "p": ["a.example"], "q": [LOG.name], "r": ["c.example"]}
        assert known == {LOG.name: [LOG.name], **one_each}
        assert witness.witness.listed == {"o": (3, "c"), "p": (5, "c"), "q": (6, "c"), "r": (7, "c")}
    refuses(Malformed, witness.witness.discover, "a list", shown.encode()[1:])
    witness.witness.discover("a list", shown.replace("qpd 3", "qpd 30").encode())
    witness.witness.discover("a list", b"logs/v0\n")
    assert witness.store.listed()["o"] == (3, "c")
    witness.witness.register([one.key])  # which the list gave to other origins
    assert witness.witness.logs["a.example"] == witness.witness.logs["o"] == [one.key]
    witness.witness.register([new_key("o").key])  # a further key of a listed log
    assert len(witness.witness.logs["o"]) == 2


def test_a_listed_log_has_its_requests_a_day(witness: LocalWitness) -> None:
    """Its own origin, a budget for larger trees, another for the same tree again, and none for what is refused."""
    signer = new_key("key.example")
    vkey = btlog.encode_vkey(signer.key)
    witness.witness.discover("x", f"logs/v0\nvkey {vkey}\norigin go.sum database tree\nqpd 2\ncontact c\n".encode())

    def request(old: int, new: int, by: btlog.Signer = signer) -> bytes:
        tree = Tree(new, root_of(ENTRIES[:new]))
        proof = subproof(old, ENTRIES[:new], True) if 0 < old <= new else []
        return btlog.AddCheckpoint(old, tuple(proof), by.sign(Checkpoint("go.sum database tree", tree))).encode()

    assert cosign(witness, request(0, 1))[0] == 200
    for _ in range(5):
        assert cosign(witness, request(0, 2))[0] == 409
        assert cosign(witness, request(1, 2, btlog.Signer(signer.name, bytes(32))))[0] == 403
        assert cosign(witness, request(2, 1))[0] == 400
    assert [cosign(witness, request(1, 1))[0] for _ in range(3)] == [200, 200, 429]
    status, _, line = cosign(witness, request(1, 2))
    note = request(1, 2).partition(b"\n\n")[2]
    ours = btlog.as_witness(COSIGNER.key)
    assert (status, btlog.open_note(note + line, [ours])[1]) == (200, {ours: 1_000_000})
    status, headers, answer = ask(witness.url, "/add-checkpoint", "POST", request(2, 3))
    assert (status, headers["retry-after"], b"2 requests" in answer) == (429, "43200", True)
    witness.now += 43200
    assert [cosign(witness, request(2, 3))[0], cosign(witness, request(3, 4))[0]] == [200, 429]
    name = hashlib.sha256(b"go.sum database tree").hexdigest()
    kept = ask(witness.url, f"/{name}/checkpoint")[2]
    assert open_checkpoint(kept, Policy((signer.key,), origin="go.sum database tree")).tree.size == 3
    assert [cosign(witness, request_for(i, i + 1))[0] for i in range(9)] == [200] * 9  # not listed: not counted


def test_a_witness_s_database_of_an_older_version(tmp_path: Path) -> None:
    """It had no table for what lists say of logs; it goes on with what it knows."""
    older = btlog.WITNESS_SCHEMA.replace(f"{btlog.WITNESS_LISTED};", "")
    assert older != btlog.WITNESS_SCHEMA
    btlog.Database.create(tmp_path / "w.db", btlog.WITNESS_ID, older)
    for size in 3, 5:
        with contextlib.closing(LocalWitness(tmp_path / "w.db")) as server:
            assert cosign(server, request_for(size - 3 if size == 3 else 3, size))[0] == 200
            server.witness.discover("x", LISTED.encode())
            assert list(server.witness.listed) == ["go.sum database tree"]


def test_a_witness_reads_lists(tmp_path: Path) -> None:
    """From a file and from a server, at the start and on SIGHUP, also gzip; what is no list later changes nothing."""
    pages: dict[str, HtmlOrJson] = {"/log-list.1": (200, {}, b"x")}
    with contextlib.closing(Served(lambda path_: pages[path_])) as served:
        (tmp_path / "list").write_text(LISTED.partition("\t vkey")[0])
        args = ("witness", "--origin", "w.example", "--log-list", "list", "--log-list", f"{served.url}/log-list.1", "--contact",
                "a <b>", "--url", "https://w.example/", "--operator", "An {rows} & co")
        with running(*args, cwd=tmp_path) as witness:

            def logs() -> int:
                return int(json.loads(ask(witness.url, "/healthz")[2])["logs"])

            assert logs() == 1
            assert eventually(lambda: len(served.asked) == 1)
            pages["/log-list.1"] = (200, {"Content-Encoding": "gzip"}, gzip.compress(LISTED.encode()))
            witness.process.send_signal(signal.SIGHUP)
            assert eventually(lambda: logs() == 2)
            (tmp_path / "list").write_text("logs/v1\n")
            witness.process.send_signal(signal.SIGHUP)
            assert eventually(lambda: len(served.asked) == 3)
            status = json.loads(ask(witness.url, "/status.json")[2])
            vkey = (tmp_path / "witness-public.key").read_text().strip()
            assert (status["vkeys"], status["url"], status["contact"]) == ([vkey], "https://w.example", "a <b>")
            assert status["log_lists"] == ["list", f"{served.url}/log-list.1"]
            assert [(log["origin"], log["qpd"], log["size"]) for log in status["logs"]] == [
                ("go.sum database tree", 2, 0), (LOG.name, 86400, 0)]
            code, headers, page = ask(witness.url, "/")
            text = html.unescape(page.decode())
            assert (code, headers["content-type"], "a &lt;b>" in text) == (200, "text/html; charset=utf-8", False)
            for word in vkey, "go.sum database tree", "a <b>", "https://w.example/add-checkpoint", "Operator: An {rows} & co":
                assert word in text, word
            assert "<b>" not in page.decode()
            code, error = witness.stop()
            assert (code, "is not read; what is known stays" in error) == (0, True)
        exits(2, "", "witness", "--origin", "w.example", "--log-list", "list", "--port", "0", cwd=tmp_path)
        exits(2, "", "witness", "--origin", "w.example", "--log-list", "gone", "--port", "0", cwd=tmp_path)


def bundles_asked(web: Web) -> list[str]:
    return sorted(path_.partition("/tile/entries/")[2] for path_ in web.asked if "/tile/entries/" in path_)


FAST_LOG = [  # by how many entries it grows in each minute, and which bundles are asked for
    (10, ["000.p/10"]), (240, ["000.p/250"]),  # no other bundle is full: nothing would be gained
    (300, ["000", "001"]), (201, ["002.p/239"]),  # 550: 38 entries can wait; 751
    (256, ["002"]), (256, ["003"]), (256, ["004"]), (256, ["005"]),  # 1,775
    (256, ["006", "007.p/239"]),  # that was long enough
    (0, []), (100, ["007", "008.p/83"]),  # not fast
    (300, ["008"]), (0, ["009.p/127"]),  # and no more comes
]  # fmt: skip


def test_a_monitor_that_follows_leaves_partial_bundles_of_a_fast_log(tmp_path: Path) -> None:
    """tlog-tiles: it should, where more than 200 entries come at once, and not for too long; its mirror is whole then."""
    with (
        contextlib.closing(StaticLog(tmp_path / "static")) as static,
        contextlib.closing(btlog.MirrorStore(make(tmp_path / "mirror"))) as store,
        contextlib.closing(btlog.LogReader(static.web.url)) as source,
    ):
        patient = btlog.Monitor(store, source, UNWITNESSED, btlog.WatchList(), True)
        for minute, (grows, bundles) in enumerate(FAST_LOG):
            static.grow_to(len(static.entries) + grows)
            static.web.asked.clear()
            assert patient.round(lambda done, total: None, lambda: 60.0 * minute)  # noqa: B023
            assert (bundles_asked(static.web), patient.conditions) == (bundles, [])
            whole = not bundles or ".p/" in bundles[-1]
            assert whole == (store.tree("signed").size == store.stored().size == len(static.entries))
        static.grow_to(3000)
        static.web.asked.clear()
        assert btlog.Monitor(store, source, UNWITNESSED, btlog.WatchList()).round(lambda done, total: None, time.time)
        assert bundles_asked(static.web)[-1] == "011.p/184"
        encodings = {head.get("Accept-Encoding") for _, head in static.web.heads}
        assert encodings == {"gzip, identity"}
        assert list(btlog.check_store(store, LOG, lambda done, total: None)) == []


def test_a_log_at_several_urls(tmp_path: Path) -> None:
    """What one lacks, or is too late with, comes from the next; only what all of them show is held against the log."""
    with contextlib.closing(StaticLog(tmp_path / "static", 300)) as static, contextlib.closing(Web(static.tree)) as dead:
        dead.close()
        shutil.copytree(static.tree, tmp_path / "older")
        with contextlib.closing(Web(tmp_path / "older")) as older:
            static.grow_to(600)
            (static.tree / "tile" / "entries" / "001").rename(tmp_path / "001")  # this one lacks a bundle, the other one more

            def follow(*webs: Web) -> Seen:
                urls = [word for web in webs[1:] for word in ("--log-url", web.url)]
                return monitor(webs[0].url, tmp_path / "mirror", *urls)

            assert follow(dead, older).code == 0
            assert follow(older, dead, static.web).code == 0  # by what is at the first that answers
            (tmp_path / "001").rename(static.tree / "tile" / "entries" / "001")
            assert follow(static.web, dead).code == 0
            with contextlib.closing(btlog.LogStore(tmp_path / "mirror", read_only=True)) as store:
                assert store.tree("published").size == 600
            for webs in (older, static.web), (older, dead, static.web):
                assert follow(*webs).code == 0
            seen_ = follow(older, dead)
            assert (seen_.code, [line["kind"] for line in seen_.lines if "kind" in line]) == (1, ["rollback"])
            static.spoil("checkpoint", flip(30))
            assert follow(older, static.web).code == 1
        name = static.entries[0].split(b"\n")[2].decode()
        (tmp_path / name).write_bytes(b"")
        static.repent()
        found_ = [call_btlog("verify", str(tmp_path / name), "--public-key", key_file(tmp_path), *urls)[:2] for urls in (
            ("--log-url", dead.url), ("--log-url", dead.url, "--log-url", static.web.url))]
        assert [code for code, _ in found_] == [3, 1]  # another checksum is logged


# --- Conformance ---------------------------------------------------------------------------------------------------------

def held(*args: str, cwd: Path) -> tuple[int, dict[str, bool | None]]:
    """The exit code of `conformance`, and each check by its name; the TAP says the same as the JSON."""
    told_ = run_btlog("conformance", *args, "--json", cwd=cwd)
    return told_.returncode, {check["name"]: check["kept"] for check in json.loads(told_.stdout)["checks"]}


@pytest.fixture(scope="module")
def made_up_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("conformance")
    run_btlog("keygen", "--origin", "test.example/log", "--private-key-path", "t.key", "--public-key-path", "t.pub", cwd=folder)
    run_btlog("keygen", "--witness", "--origin", "w.example", "--private-key-path", "witness-private.key", "--public-key-path",
              "witness-public.key", cwd=folder)
    return folder


def test_conformance_of_a_witness(made_up_log: Path) -> None:
    """This one keeps all, at first and again; each sentence is from the specification that is named."""
    keys = ("--witness-public-key", "witness-public.key", "--private-key", "t.key")
    with running("witness", "--log-public-key", "t.pub", cwd=made_up_log) as witness:
        seen_ = run_btlog("conformance", "--witness", witness.url, *keys, cwd=made_up_log)
        lines = seen_.stdout.splitlines()
        assert (seen_.returncode, lines[0], lines[-2:]) == (
            0, "TAP version 14", ["1..33", "# 33 kept; 0 not; 0 not, but no MUST; 0 skipped"]), seen_.stdout
        assert [line.split(" - ")[0] for line in lines[1:-2]] == [f"ok {i + 1}" for i in range(33)]
        code, checks = held("--witness", witness.url, *keys, cwd=made_up_log)
        assert (code, list(checks.values())) == (0, [None] + [True] * 30)
        exits(2, "", "conformance", "--witness", witness.url, cwd=made_up_log)
        exits(2, "", "conformance", cwd=made_up_log)
        (made_up_log / "o.key").write_text(LOG_SKEY)
        told_ = run_btlog("conformance", "--witness", witness.url, *keys[:3], "o.key", cwd=made_up_log)
        assert (told_.returncode, "it has to know the log" in told_.stderr) == (2, True)
        told_ = run_btlog("conformance", "--witness", witness.url, *keys[:1], "t.pub", *keys[2:], cwd=made_up_log)
        assert (told_.returncode, "it does not cosign a good checkpoint" in told_.stderr) == (1, True)
    exits(3, "", "conformance", "--witness", witness.url, *keys, cwd=made_up_log)


WRONG_ANSWERS: dict[str, Callable[[int, str, bytes], tuple[int, str, bytes]]] = {
    "the checkpoint of an unknown origin": lambda status, kind, data: (500 if status == 404 else status, kind, data),
    "a checkpoint without a signature by a trusted key": lambda status, kind, data: (401 if status == 403 else status, kind, data),
    "an old size above the checkpoint's": lambda status, kind, data: (422 if b"above" in data else status, kind, data),
    "no proof": lambda status, kind, data: (400 if status == 422 else status, kind, data),
    "the size in a 409": lambda status, kind, data: (status, "text/plain" if status == 409 else kind, data),
    "a larger checkpoint is cosigned": lambda status, kind, data: (status, kind, b"" if status == 200 else data),
    "with its cosignatures and the log's signature": lambda status, kind, data: (
        status, kind, re.sub("— w.example .*\n".encode(), b"", data) if data.startswith(b"test.example") else data),
    "an old size with a leading zero": lambda status, kind, data: (500 if status == 400 else status, kind, data),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_ANSWERS)
def test_conformance_of_a_witness_that_answers_wrongly(made_up_log: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(made_up_log, tmp_path / "x")

    def relay(handler: btlog.Handler, body: btlog.Body) -> Any:
        async def answer() -> btlog.Response:
            data = await body.all(10**6)
            what = (real.url, handler.path, handler.command, data or None)
            status, headers, text = await asyncio.get_running_loop().run_in_executor(None, ask, *what)
            status, kind, text = WRONG_ANSWERS[name](status, headers["content-type"], text)
            return btlog.Response(text, kind, status)

        return answer()

    with (
        running("witness", "--database-path", "new.db", "--private-key", "witness-private.key", "--log-public-key", "t.pub",
                cwd=tmp_path / "x") as real,
        contextlib.closing(Local(relay)) as gate,
    ):  # fmt: skip
        keys = ("--witness-public-key", "witness-public.key", "--private-key", "t.key")
        code, checks = held("--witness", gate.url, *keys, cwd=tmp_path / "x")
        assert (code, checks[name]) == (1, False)


@pytest.mark.parametrize("size", [b"x\n", b"-1\n", b"", b"9000000000000000000\n", b"1\n" * 99])
def test_conformance_of_what_is_no_witness(made_up_log: Path, size: bytes) -> None:
    """It ends, without a traceback, whatever a server says."""
    def answer(handler: btlog.Handler, body: btlog.Body) -> Any:
        async def later() -> btlog.Response:
            await body.all(10**6)
            return btlog.Response(size, "text/x.tlog.size", 409)

        return later()

    with contextlib.closing(Local(answer)) as server:
        (made_up_log / "w.pub").write_text(f"{WITNESS_VKEY_4}\n")
        code, checks = held("--witness", server.url, "--witness-public-key", "w.pub", "--private-key", "t.key", cwd=made_up_log)
        assert (code, checks) == (1, {"the size in a 409": False})


def test_conformance_of_a_log(made_up_log: Path, tmp_path: Path, log: LocalLog) -> None:
    key = ("--public-key", key_file(tmp_path))
    assert bulk(log.url, many_lines(0, 700))[0] == 200
    code, checks = held("--log", log.url, *key, cwd=tmp_path)
    assert (code, checks) == (0, dict.fromkeys(checks, True))
    assert len(checks) == 17
    with contextlib.closing(StaticLog(tmp_path / "static", 600)) as static:
        code, checks = held("--log", static.web.url, *key, cwd=tmp_path)
        assert [name for name, kept in checks.items() if not kept] == [
            "its content type", "tiles are kept in caches", "bundles are compressed"]
        for path_, name in (
            ("checkpoint", "it is signed"), ("tile/0/002.p/88", "the tiles lead to the root"),
            ("tile/0/001", "entry bundles and tiles are of the tree"),
            ("tile/entries/000", "entry bundles and tiles are of the tree"),
            ("tile/entries/002.p/88", "entry bundles and tiles are of the tree"),
        ):  # fmt: skip
            static.spoil(path_, flip(77))
            code, checks = held("--log", static.web.url, *key, cwd=tmp_path)
            assert (code, checks[name]) == (1, False), path_
            static.repent()
        note = [static.notes[600]]
        static.grow_to(601)
        note.append(SIGNER.sign(Checkpoint(LOG.name, Tree(601, bytes(32)))))
        static.web.instead = lambda path_: (200, "text/plain", note[len(static.web.asked) > 1]) if path_ == "/checkpoint" else None
        static.web.asked.clear()
        code, checks = held("--log", static.web.url, *key, cwd=tmp_path)
        assert (code, checks["a later checkpoint is consistent"]) == (1, False)


def test_a_monitor_and_a_verifier_of_a_log_whose_origin_is_not_its_keys_name(tmp_path: Path) -> None:
    """go.sum database tree is one; the origin is never taken from what is to be checked."""
    key, origin = ("--public-key", key_file(tmp_path)), "go.sum database tree"
    with contextlib.closing(StaticLog(tmp_path / "static")) as static:
        static.sign = lambda tree: SIGNER.sign(Checkpoint(origin, tree))
        static.store.database._writer.execute("INSERT INTO setting VALUES ('origin', ?)", (origin,))
        (tmp_path / "demo-1.0.zip").write_bytes(b"x")
        static.grow(Entry("demo-1.0.zip", btlog.checksum_of(tmp_path / "demo-1.0.zip")).encode())
        url, mirror = ("--log-url", static.web.url), ("--storage-dir", str(tmp_path / "mirror"))
        assert call_btlog("monitor", *url, *key, "--storage-dir", str(tmp_path / "other"))[0] == 1
        for _ in range(2):
            assert call_btlog("monitor", *url, *key, *mirror, "--origin", origin)[::2] == (0, "")
        for wrong in ((), ("--origin", "x")):
            code, _, error = call_btlog("monitor", *url, *key, *mirror, *wrong)
            assert (code, "mirrors the log" in error) == (2, True)
        assert call_btlog("fsck", *mirror)[0] == 0
        target = ("verify", str(tmp_path / "demo-1.0.zip"), *key, *mirror)
        assert call_btlog(*target, "--origin", origin)[0] == 0
        assert (call_btlog(*target)[0], call_btlog(*target, "--origin", "x")[0]) == (1, 1)
        (tmp_path / "policy").write_text(f"log {LOG_VKEY}\nquorum none\n")
        assert call_btlog(*target[:2], *mirror, "--policy", str(tmp_path / "policy"), "--origin", origin)[0] == 2
        with running("serve", *mirror, "--read-only") as log:
            assert json.loads(ask(log.url, "/status.json")[2])["origin"] == origin
        assert call_btlog("export", *mirror, str(tmp_path / "out"))[0] == call_btlog("export", *mirror, str(tmp_path / "out"))[0] == 0


@pytest.mark.slow
def test_a_log_and_a_witness_with_two_keys(tmp_path: Path) -> None:
    """Both sign all, in one answer to one request; each of the two is enough for a policy; needs cryptography."""
    for name in "log.example", "w.example":
        run_btlog("keygen", "--origin", name, "--private-key-path", f"{name}.1", "--public-key-path", f"{name}.1.pub",
                  *["--witness"] * (name[0] == "w"), cwd=tmp_path)
        made = run_btlog("keygen", "--origin", name, "--ml-dsa-44", "--private-key-path", f"{name}.6", "--public-key-path",
                         f"{name}.6.pub", cwd=tmp_path)
        assert (made.returncode, made.stdout) == (0, (tmp_path / f"{name}.6.pub").read_text()), made.stderr
    vkeys = {path_.name[:-4]: VerifierKey.parse(path_.read_text().strip()) for path_ in tmp_path.glob("*.pub")}
    assert [vkeys[name].kind for name in sorted(vkeys)] == [1, 6, 4, 6]
    keys = ("--private-key", "w.example.1", "--ml-dsa-44-private-key", "w.example.6")
    with running("witness", *keys, "--log-public-key", "log.example.1.pub", cwd=tmp_path) as witness:
        for wrong in "log.example.6", "w.example.1":
            exits(2, "", "witness", "--database-path", "x.db", *keys[:3], wrong, "--port", "0", cwd=tmp_path)
        exits(2, "", "witness", "--database-path", "x.db", "--private-key", "w.example.6", "--port", "0", cwd=tmp_path)
        ours = [btlog.encode_vkey(vkeys[f"w.example.{kind}"]) for kind in (1, 6)]
        assert json.loads(ask(witness.url, "/status.json")[2])["vkeys"] == ours
        lines = "".join(f"witness w{i} {vkey} {witness.url}\n" for i, vkey in enumerate(ours))
        logs = "".join(f"log {btlog.encode_vkey(vkeys[f'log.example.{kind}'])}\n" for kind in (1, 6))
        (tmp_path / "policy").write_text(f"{logs}{lines}group g all w0 w1\nquorum g\n")
        log_keys = ("--private-key", "log.example.1", "--ml-dsa-44-private-key", "log.example.6")
        with running("serve", *log_keys, "--policy", "policy", cwd=tmp_path) as log:
            for i in range(3):
                assert add(log.url, entry(i))[0] == 200
            note = ask(log.url, "/checkpoint")[2]
            _, signed = btlog.open_note(note, vkeys.values())
            assert (len(signed), all(signed[key] for key in signed if key.kind != 1)) == (4, True)
            for kind in 1, 6:
                one = btlog.simple_policy([vkeys["log.example.1"]], [vkeys[f"w.example.{kind}"]])
                assert open_checkpoint(note, one).tree.size == 3
            assert json.loads(ask(log.url, "/status.json")[2])["second_vkey"] == btlog.encode_vkey(vkeys["log.example.6"])
            assert samples_of(witness.url)["btlog_cosign_seconds_count", ""] in (4, 5)  # one request for each round
            held = ask(witness.url, f"/{hashlib.sha256(b'log.example').hexdigest()}/checkpoint")[2]
            assert len(btlog.open_note(held, vkeys.values())[1]) == 3
    code = "import sys; sys.modules['cryptography'] = None; sys.path.insert(0, sys.argv.pop(1)); import btlog; exit(btlog.main())"
    without = [sys.executable, "-c", code, str(HERE), "keygen", "--origin", "x", "--ml-dsa-44"]
    told_ = subprocess.run(without, capture_output=True, text=True, cwd=tmp_path)
    assert (told_.returncode, "pip install 'cryptography>=48'" in told_.stderr, told_.stderr.count("\n")) == (3, True, 1)


def test_T61_bodies_of_128_KiB_pass(witness: LocalWitness) -> None:
    full = request_for(0, 5) + b"\xe2\x80\x94 filler YWFhYWFh\n" * 90
    room = 131_072 - len(full) - len(b"\xe2\x80\x94 filler \n")
    filler = base64.b64encode(bytes(room // 4 * 3)) + b"\n"
    full += b"\xe2\x80\x94 filler" + b"x" * (room % 4) + b" " + filler
    assert len(full) == 131_072
    assert cosign(witness, full)[0] == 200
    for body in full + b"\n", b"x" * 10_000_000:
        assert ask(witness.url, "/add-checkpoint", "POST", body)[0] == 413
    assert cosign(witness, request_for(5, 6))[0] == 200


def test_T29_a_race_between_check_and_store(tmp_path: Path) -> None:
    """A is checked, B is checked and stored, A is to be stored: it is told the new size, and nothing is rolled back."""
    with contextlib.closing(btlog.WitnessStore(tmp_path / "w.db")) as store:

        def step(last: btlog.Witnessed | None, old: int, new: int) -> btlog.Witnessed:
            return btlog.witness_step(last, [LOG], btlog.AddCheckpoint.parse(request_for(old, new)), [COSIGNER], 5)[0]

        for size in 0, 7:
            last = store.last(LOG.name)
            a, b = step(last, size, size + 3), step(last, size, size + 7)
            with store.database.transaction() as db:
                store.update(db, LOG.name, last, b)
            with pytest.raises(btlog.Stale) as caught, store.database.transaction() as db:
                store.update(db, LOG.name, last, a)
            assert caught.value.size == size + 7
            assert store.last(LOG.name) == b


def test_T15_many_writers_over_a_few_logs(tmp_path: Path) -> None:
    """300 requests: sizes only grow, every answer is 200 or 409, and what is cosigned of a log is one history."""
    signers = [new_key(f"log{i}.example") for i in range(5)]
    trees: list[tuple[str, Tree]] = []
    statuses: list[int] = []
    falls: list[str] = []
    with contextlib.closing(LocalWitness(tmp_path / "w.db", *(s.key for s in signers))) as server:

        def client(seed: int) -> None:
            choose = random.Random(seed)
            known = dict.fromkeys(range(5), 0)
            for _ in range(15):
                i = choose.randrange(5)
                size = known[i] + choose.randrange(4)
                body = request_for(known[i], size, signers[i])
                status, _, answer = cosign(server, body)
                statuses.append(status)
                if status == 200:
                    policy = btlog.simple_policy([signers[i].key], [WITNESS])
                    opened = open_checkpoint(offered(body) + answer, policy)
                    trees.append((opened.origin, opened.tree))
                else:
                    size = int(answer)
                if size < known[i]:
                    falls.append(f"log {i} from {known[i]} to {size}")
                known[i] = size

        at_once(*(functools.partial(client, seed) for seed in range(20)))
        for signer in signers:
            size = max((tree.size for origin, tree in trees if origin == signer.name), default=0)
            assert open_checkpoint(stored(server, signer.name)[1], btlog.simple_policy([signer.key])).tree.size == size
    assert falls == []
    assert set(statuses) == {200, 409}
    assert len(statuses) == 300
    assert len(trees) == statuses.count(200) > 30
    assert all(tree.root == root_of(ENTRIES[: tree.size]) for _, tree in trees)


def test_a_log_that_shows_two_histories_leaves_evidence(
    witness: LocalWitness, caplog: pytest.LogCaptureFixture
) -> None:
    assert cosign(witness, request_for(0, 5))[0] == 200
    kept = stored(witness)[1]
    unknown = signature_line(new_key("unknown.example"), "x").encode()
    same_size, larger = request_for(5, 5, tag="x"), request_for(5, 9, tag="x")
    for body in same_size, larger, same_size + unknown:
        assert cosign(witness, body)[0] == 422
    rows = witness.store.database.read("SELECT origin, forked, stored, offered FROM evidence ORDER BY rowid")
    assert rows == [(LOG.name, 1, kept, offered(same_size)), (LOG.name, 0, kept, offered(larger))]
    for _, _, a, b in rows:  # each of the two is signed by the log: another verifier can check that
        assert open_checkpoint(a, UNWITNESSED).tree.size == 5
        tree = open_checkpoint(b, UNWITNESSED).tree
        assert tree.root != root_of(ENTRIES[: tree.size])
        assert json.dumps([a.decode(), b.decode()]) in caplog.text
    assert caplog.text.count("two trees of one size") == 1
    assert cosign(witness, request_for(5, 9))[0] == 200  # the history that it has seen goes on


def test_nobody_can_fill_the_evidence(
    witness: LocalWitness, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever asks chooses the proof and the lines that nobody knows: they are no evidence, and hide none."""
    monkeypatch.setattr(btlog, "MAX_EVIDENCE", 3)
    assert cosign(witness, request_for(0, 5))[0] == 200
    for i in range(12):
        line = signature_line(new_key(f"x{i}.example"), "x").encode()
        assert cosign(witness, request_for(5, 5, proof=[bytes(32)]) + line)[0] == 422  # the tree that it has
        assert cosign(witness, request_for(5, 6, proof=[bytes(32)]) + line)[0] == 422  # one checkpoint, 12 times
    for size in range(7, 17):
        assert cosign(witness, request_for(5, size, proof=[bytes(32)]))[0] == 422
    assert witness.store.database.read("SELECT count(*) FROM evidence") == [(3,)]
    assert len(caplog.records) < 10
    assert cosign(witness, request_for(5, 5, tag="fork"))[0] == 422
    assert "two trees of one size" in caplog.text
    assert len(witness.store.database.read("SELECT 1 FROM evidence WHERE forked")) == 1


def test_other_routes_of_the_witness(witness: LocalWitness) -> None:
    assert ask(witness.url, "/healthz")[0] == 200
    hash_ = hashlib.sha256(LOG.name.encode()).hexdigest()
    checkpoint = f"/{hash_}/checkpoint"
    cosign(witness, request_for(0, 5))
    status, headers, _ = ask(witness.url, checkpoint)
    assert (status, headers["cache-control"], headers["access-control-allow-origin"]) == (200, "no-cache", "*")
    for path_ in (
        f"/{hash_}", f"/{hash_}/", f"{checkpoint}/", f"/{hash_.upper()}/checkpoint",
        f"/{hash_[:-1]}0/checkpoint", "//checkpoint", f"/{hash_}//checkpoint", "/add-checkpoint/",
    ):
        assert ask(witness.url, path_)[0] == 404
    assert ask(witness.url, checkpoint, "POST", b"")[0] == ask(witness.url, "/add-checkpoint")[0] == 405
    assert ask(witness.url, checkpoint, "HEAD")[::2] == (200, b"")


@pytest.mark.parametrize("persist", [False, True])
def test_T3_a_witness_whose_disk_fails_cosigns_nothing(tmp_path: Path, persist: bool) -> None:
    with contextlib.closing(LocalWitness(tmp_path / "w.db")) as server:
        assert cosign(server, request_for(0, 3))[0] == 200
        faulty = Faulty(server.store.database._writer, 10**9, persist)
        server.store.database._writer = faulty  # type: ignore[assignment]
        assert cosign(server, request_for(3, 4))[0] == 200
        faulty.left = 10**9 - faulty.left
        status, _, answer = cosign(server, request_for(4, 5))
        assert (status, b"commit failed" in answer) == (503, True)
        assert cosign(server, request_for(4, 5))[0] == 503
        assert ask(server.url, "/healthz")[0] == 503
        assert server.witness.failed.is_set()
    with contextlib.closing(LocalWitness(tmp_path / "w.db")) as server:  # after a start, what is on disk counts
        size = 5 if persist else 4
        assert cosign(server, request_for(0, 0))[2] == b"%d\n" % size
        assert cosign(server, request_for(size, 6))[0] == 200


def test_a_witness_as_a_command(tmp_path: Path) -> None:
    log_key, second = new_key("log.example/a"), new_key("log.example/b")
    (tmp_path / "log.key").write_text(btlog.encode_vkey(log_key.key) + "\n")
    (tmp_path / "policy").write_text(f"log {LOG_VKEY}\nwitness x {WITNESS_VKEY}\nquorum none\n")
    knows = ("--log-public-key", "log.key", "--policy", "policy")
    with running("witness", "--origin", "witness.example/new", *knows, cwd=tmp_path) as server:
        url, serves, the, what, vkey, *_ = server.line.split()
        assert (serves, the, what) == ("serves", "the", "witness")
        assert (tmp_path / "witness-public.key").read_text() == vkey + "\n"
        assert (tmp_path / "witness-private.key").stat().st_mode & 0o777 == 0o600

        def status_for(old: int, new: int, signer: btlog.Signer) -> int:
            body = request_for(old, new, signer)
            status, _, answer = ask(url, "/add-checkpoint", "POST", body)
            if status == 200:
                policy = btlog.simple_policy([signer.key], [VerifierKey.parse(vkey)])
                assert open_checkpoint(offered(body) + answer, policy).cosigned
            return status

        assert [status_for(0, 5, signer) for signer in (log_key, SIGNER, second)] == [200, 200, 404]
        (tmp_path / "log.key").write_text(btlog.encode_vkey(second.key))
        server.process.send_signal(signal.SIGHUP)  # adding a log while it runs
        eventually(lambda: status_for(0, 5, second) == 200)
        (tmp_path / "log.key").write_text("garbage")
        server.process.send_signal(signal.SIGHUP)
        assert status_for(5, 6, log_key) == 200  # none is forgotten
        code, error = server.stop()
        assert code == 0
        assert "SIGHUP: log.key" in error
        assert "Traceback" not in error
    with running("witness", cwd=tmp_path) as server:  # without flags: it knows its logs, and where they were
        assert server.line.split()[4] == vkey
        assert ask(server.url, "/add-checkpoint", "POST", request_for(0, 5, log_key))[::2] == (409, b"6\n")
        assert server.stop(signal.SIGINT) == (0, "")


def test_whose_keys_a_witness_refuses(tmp_path: Path) -> None:
    for name, skey in ("w.key", WITNESS_SKEY), ("other.key", LOG_SKEY):
        (tmp_path / name).write_text(skey)
        (tmp_path / name).chmod(0o600)
    base = ("witness", "--port", "0", "--private-key", "w.key")
    same_name, same_key = new_key(WITNESS.name).key, VerifierKey("other.example", 1, WITNESS.key)
    for key in (
        WITNESS_VKEY, WITNESS_VKEY_4, PQ_VKEY, btlog.encode_vkey(same_name), btlog.encode_vkey(same_key), "garbage",
    ):
        (tmp_path / "log.key").write_text(key)
        assert exits(2, "btlog: ", *base, "--log-public-key", "log.key", cwd=tmp_path, lines=1) == "", key
    exits(2, "is the database of the witness", "witness", "--port", "0", "--private-key", "other.key", cwd=tmp_path)
    (tmp_path / "w.db").write_bytes(b"garbage" * 1000)
    exits(3, "", *base, "--database-path", "w.db", cwd=tmp_path)
    found(tmp_path / "log").close()
    exits(3, "is not of this version of btlog", *base, "--database-path", "log/log.sqlite3", cwd=tmp_path)


def test_every_byte_of_an_add_checkpoint_request_counts() -> None:
    for case in mutations(request_for(5, 9)):
        try:
            request = btlog.AddCheckpoint.parse(case)
        except Error:
            continue
        assert btlog.AddCheckpoint.encode(request) == case
        refuses(Error, btlog.witness_step, None, [LOG], request, COSIGNER, 7)


# --- A log with witnesses -------------------------------------------------------------------------------------------------------


def asks(k: int, *witnesses: tuple[VerifierKey, str]) -> Policy:
    """The policy of a log that asks these witnesses, of which k have to cosign."""
    urls = tuple((btlog.as_witness(key), url) for key, url in witnesses)
    keys = tuple(key for key, _ in urls)
    return Policy((LOG,), keys, Quorum(k, keys), urls)


def witnessed_policy(*witnesses: LocalWitness, k: int | None = None) -> Policy:
    return asks(k or len(witnesses), *((w.witness.signer.key, w.url) for w in witnesses))


def eventually(check: Callable[[], Any], seconds: float = 20) -> Any:
    """Waits for what has to become true by itself."""
    until = time.monotonic() + seconds
    while not (value := check()) and time.monotonic() < until:
        time.sleep(0.02)
    assert value
    return value


def published(url: str, policy: Policy) -> Checkpoint | None:
    status, _, note = ask(url, "/checkpoint")
    return open_checkpoint(note, policy) if status == 200 else None


@contextlib.contextmanager
def several_witnesses(tmp_path: Path, count: int) -> Iterator[list[LocalWitness]]:
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(
                contextlib.closing(LocalWitness(tmp_path / f"w{i}.db", signer=new_key(f"w{i}.example")))
            )
            for i in range(count)
        ]


def opened_answer(answer: dict[str, Any], policy: Policy) -> Checkpoint:
    return open_checkpoint(base64.b64decode(answer["checkpoint"]), policy)


def test_a_log_publishes_what_its_quorum_has_cosigned(tmp_path: Path) -> None:
    with several_witnesses(tmp_path, 3) as witnesses:
        policy = witnessed_policy(*witnesses)
        with contextlib.closing(LocalLog(tmp_path / "log", policy=policy)) as log:
            assert eventually(lambda: published(log.url, policy)).tree.size == 0
            for i in range(3):
                status, answer = add(log.url, entry(i))
                assert status == 200
                opened = opened_answer(answer, policy)
                assert opened.tree.size == i + 1
                assert [key.name for key, _ in opened.cosigned] == ["w0.example", "w1.example", "w2.example"]
            assert walk(log.url, policy) == [entry(0), entry(1), entry(2)]
            proof = ask(log.url, "/entry/1/proof")[2]
            assert len(check_logged(Entry.parse(entry(1)), proof, policy).cosigned) == 3
            status = json.loads(ask(log.url, "/status.json")[2])
            assert status["witness_configured"]
            assert [(w["name"], w["dark_since"], w["size"]) for w in status["witnesses"]] == [
                (f"w{i}.example", None, 3) for i in range(3)
            ]
            assert bulk(log.url, many_lines(0, 600))[0] == 200
            assert len(walk(log.url, policy)) == 600
        with contextlib.closing(LocalLog(tmp_path / "log", policy=policy)) as log:
            assert published(log.url, policy)
            assert add(log.url, entry(600))[0] == 200
            assert all(caller.size == 601 for caller in log.log.witnesses)


def test_the_quorum_is_missed_and_met_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One of three is down: adds go on. A second one: adds get 503. It is back: all that waited is there, once."""
    with several_witnesses(tmp_path, 3) as witnesses:
        policy = witnessed_policy(*witnesses, k=2)
        with contextlib.closing(LocalLog(tmp_path / "log", policy=policy, timeout=0.5)) as log:
            witnesses[2].close()
            assert add(log.url, entry(0))[0] == ask(log.url, "/healthz")[0] == 200
            before = ask(log.url, "/checkpoint")[2]
            witnesses[1].close()
            status, headers, body = ask(log.url, "/add", "POST", as_line(entry(1)))
            assert (status, "retry-after" in headers) == (503, True)
            assert bulk(log.url, as_line(entry(2)))[0] == 503
            assert ask(log.url, "/checkpoint")[2] == before  # it stays at the last one that met the quorum
            assert ask(log.url, "/entry/1")[0] == ask(log.url, "/tile/0/000.p/2")[0] == 404
            status, _, health = ask(log.url, "/healthz")
            assert status == 503
            for said in body, health:
                assert [b"w%d.example since 20" % i in said for i in range(3)] == [False, True, True]
            up, dark, _ = json.loads(ask(log.url, "/status.json")[2])["witnesses"]
            assert (up["dark_since"], "refused" in dark["error"]) == (None, True)
            assert dark["dark_since"]
            assert log.store.tree("signed").size == 3  # what is sequenced stays
            port, signer = witnesses[1].port, new_key("w1.example")
            with contextlib.closing(LocalWitness(tmp_path / "w1.db", signer=signer, port=port)):
                eventually(lambda: published(log.url, policy).tree.size == 3)  # type: ignore[union-attr]
                assert ask(log.url, "/healthz")[0] == 200
                assert add(log.url, entry(1))[1]["index"] == 1  # once
                assert walk(log.url, policy) == [entry(0), entry(1), entry(2)]
        del witnesses[1:]
    assert caplog.text.count("the quorum of witnesses is missed") == 1


def test_T9_a_restored_backup_signs_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with several_witnesses(tmp_path, 2) as witnesses:
        policy = witnessed_policy(*witnesses, k=1)

        def grow(folder: str, first: int, end: int, policy: Policy, size: int) -> None:
            with contextlib.closing(LocalLog(tmp_path / folder, policy=policy)) as log:
                for i in range(first, end):
                    assert add(log.url, entry(i))[0] == 200
                assert log.log.published.tree.size == size

        def halts(size: int, says: str) -> None:
            with contextlib.closing(LocalLog(tmp_path / "backup", policy=policy)) as log:
                eventually(lambda: log.log.trouble)
                status, answer = add(log.url, entry(110))
                assert (status, says in answer["error"]) == (503, True), answer
                assert ask(log.url, "/healthz")[0] == 503
                assert log.store.tree("signed").size == size  # nothing was signed, not even to be refused
                if size == 3:
                    assert len(walk(log.url)) == 3  # reading goes on

        grow("log", 0, 3, policy, 3)
        shutil.copytree(tmp_path / "log", tmp_path / "backup")
        grow("log", 3, 8, policy, 8)
        halts(3, "has cosigned size 8, and this log has size 3. Either this folder is an old backup")
        # It goes on in both places to the same size, with other entries: another root. Without its witnesses it does
        # not know better.
        change_store(tmp_path / "backup", "DELETE FROM witness")
        grow("backup", 100, 105, UNWITNESSED, 8)
        halts(8, "is an old backup")
        grow("log", 9, 10, policy, 9)
    assert caplog.text.count("It signs nothing more") == 2


class Odd(Local):
    """A witness that answers as it is told, with what it was asked."""

    def __init__(self, answer: Callable[[btlog.AddCheckpoint], btlog.Response]) -> None:
        self.asked: list[btlog.AddCheckpoint] = []

        async def respond(body: btlog.Body) -> btlog.Response:
            self.asked.append(btlog.AddCheckpoint.parse(await body.all(1 << 20)))
            return answer(self.asked[-1])

        super().__init__(lambda request, body: respond(body))


def honest(request: btlog.AddCheckpoint, signer: btlog.Signer = COSIGNER) -> bytes:
    text = btlog.split_note(request.note)[0]
    return signature_line(signer, text, 77).encode()


def offered_text(request: btlog.AddCheckpoint) -> str:
    return btlog.split_note(request.note)[0]


BOMB = gzip.compress(b"ab\n" * (1 << 24))  # 64 KiB that become 48 MiB
ODD_ANSWERS: list[Callable[[btlog.AddCheckpoint, btlog.Signer], btlog.Response]] = [
    lambda r, s: btlog.Response(b"x" * 100_000),
    lambda r, s: btlog.Response(BOMB, headers={"Content-Encoding": "gzip"}),
    lambda r, s: btlog.Response(honest(r, s)[:-1]),
    lambda r, s: btlog.Response(b"\n" + honest(r, s)),
    lambda r, s: btlog.Response(honest(r, s) + b"\n"),
    lambda r, s: btlog.Response(honest(r, s) * 101),
    lambda r, s: btlog.Response(honest(r, s).replace(b"\n", b"\r\n")),
    lambda r, s: btlog.Response(signature_line(btlog.Signer(s.name, bytes(32)), offered_text(r), 5).encode()),
    lambda r, s: btlog.Response(signature_line(s, "other\n", 5).encode()),
    lambda r, s: btlog.Response(signature_line(s, offered_text(r)).encode()),
    *(lambda r, s, status=status: btlog.Response(honest(r, s), status=status) for status in (201, 403, 404, 500)),
    lambda r, s: btlog.Response(b"", status=302, headers={"Location": "/x"}),
    *(lambda r, s, body=body: btlog.Response(body) for body in (b"", b"garbage", b"\xff" * 1000)),
    *(lambda r, s, size=size: btlog.Response(size, "text/x.tlog.size", 409) for size in (
        b"x\n", b"", b"01\n", b"-1\n", b"0\n")),
]  # fmt: skip


def test_T26_T36_T67_witnesses_that_answer_oddly_or_not_at_all(tmp_path: Path) -> None:
    """Nothing of it enters a checkpoint or stays in memory, and it does not keep the others from making the quorum."""
    assert len(ODD_ANSWERS) == 23
    with contextlib.ExitStack() as stack:
        [good] = stack.enter_context(several_witnesses(tmp_path, 1))
        silent = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        asked = [(good.witness.signer.key, good.url), (WITNESS, f"http://127.0.0.1:{silent.getsockname()[1]}")]
        odd: list[Odd] = []
        for i, answer in enumerate(ODD_ANSWERS):
            signer = new_key(f"odd{i}.example")
            odd.append(Odd(lambda request, answer=answer, signer=signer: answer(request, signer)))  # type: ignore[misc]
            stack.callback(odd[-1].close)
            asked.append((signer.key, odd[-1].url))
        policy, held = asks(1, *asked), memory()
        options = {"witness_timeout": 0.3}
        with contextlib.closing(LocalLog(tmp_path / "log", policy=policy, options=options)) as log:
            threads, begun = threading.active_count(), time.monotonic()
            for i in range(6):
                status, got = add(log.url, entry(i))
                assert status == 200
                assert [key.name for key, _ in opened_answer(got, policy).cosigned] == ["w0.example"]
                assert len(btlog.split_note(base64.b64decode(got["checkpoint"]))[1]) == 2
            assert time.monotonic() - begun < 5
            assert threading.active_count() <= threads + 5  # nothing piles up
            for caller in log.log.witnesses[1:]:
                eventually(lambda: caller.dark_since)  # noqa: B023
            assert "larger than" in log.log.witnesses[3].error
            assert all(1 <= len(server.asked) <= 28 for server in odd)  # four times for each of seven checkpoints
            assert not log.log.witnesses[0].dark_since
            begun = time.monotonic()
        assert time.monotonic() - begun < 10
        assert memory() - held < 100


def test_T36_hints_are_taken_and_unknown_lines_are_not(tmp_path: Path) -> None:
    """A stale size is recovered from, with or without a newline (bt-log sends none); sizes are remembered."""
    size = 0

    def answer(request: btlog.AddCheckpoint) -> btlog.Response:
        nonlocal size
        if request.old != size:
            return btlog.Response(str(size).encode(), "text/x.tlog.size", 409)
        text = offered_text(request)
        size = Checkpoint.parse(text).tree.size
        unknown = signature_line(new_key("unknown.example"), text).encode()
        return btlog.Response(unknown + honest(request) + unknown)

    with contextlib.closing(Odd(answer)) as odd:
        policy = asks(1, (WITNESS, odd.url))

        def adds(*numbers: int) -> list[int]:
            """What sizes the log, started anew, takes the witness to have."""
            before = len(odd.asked)
            with contextlib.closing(LocalLog(tmp_path / "log", policy=policy)) as log:
                for i in numbers:
                    status, got = add(log.url, entry(i))
                    assert status == 200
                    lines = btlog.split_note(base64.b64decode(got["checkpoint"]))[1]
                    assert [parts[0] for parts in lines] == [LOG.name, WITNESS.name]
            return [request.old for request in odd.asked[before:]]

        adds(0, 1, 2)
        assert adds(3) == [3, 3]  # remembered across a restart
        size = 2  # it has lost a checkpoint
        assert adds(4) == [4, 2, 4]


def test_a_client_s_time_out_is_for_all_of_it() -> None:
    """Also for a server that closes the connection, and sends a byte now and then."""
    over = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def drip() -> None:
            connection, _ = server.accept()
            with connection, contextlib.suppress(OSError):
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 60000\r\n\r\n")
                while not over.wait(0.05):
                    connection.sendall(b"x")

        thread = threading.Thread(target=drip)
        thread.start()
        begun = time.monotonic()
        with contextlib.closing(btlog.Client(f"http://127.0.0.1:{server.getsockname()[1]}", timeout=0.3)) as client:
            refuses(Unavailable, client.get, "/")
        assert time.monotonic() - begun < 5
        over.set()
        thread.join()


def test_a_log_that_lost_its_witnesses_publishes_what_it_signed(tmp_path: Path) -> None:
    """What is acknowledged later, also without witnesses, is still there after the next start."""
    with (
        several_witnesses(tmp_path, 1) as [witness_],
        contextlib.closing(LocalLog(tmp_path / "log", policy=witnessed_policy(witness_))) as log,
    ):
        assert add(log.url, entry(0))[0] == 200
    with contextlib.closing(found(tmp_path / "log")) as store:
        store.append([entry(1)], seal, False)  # sequenced, and not published
    nowhere = asks(1, (WITNESS, "http://127.0.0.1:1"))
    with contextlib.closing(LocalLog(tmp_path / "log", policy=nowhere, timeout=0.3)) as log:
        assert ask(log.url, "/checkpoint")[0] == 503  # no witness of this policy has cosigned anything
        assert add(log.url, entry(1))[0] == 503
        for _ in range(2):
            assert bulk(log.url, many_lines(0, 100))[0] == 503
        eventually(lambda: not log.log.sequencer.queue)  # what is given up leaves nothing
        assert (log.log.sequencer.weight, log.log.sequencer.unpublished) == (0, [])
    for _ in range(2):
        with contextlib.closing(LocalLog(tmp_path / "log")) as log:
            assert walk(log.url)[:2] == [entry(0), entry(1)]
            assert add(log.url, entry(1))[1]["index"] == 1


def test_health_comes_back_by_itself(tmp_path: Path) -> None:
    """Another process holds the database for a while, and nobody asks for anything thereafter."""
    with contextlib.closing(LocalLog(tmp_path / "log", timeout=0.3)) as log:
        for connection in log.store.database._writer, log.store.database._reader:
            connection.execute("PRAGMA busy_timeout = 50")
        with contextlib.closing(sqlite3.connect(log.store.database.path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            status, answer = add(log.url, entry(0))
            assert (status, "locked" in answer["error"]) == (503, True)
            assert ask(log.url, "/healthz")[0] == 503
            other.execute("ROLLBACK")
        eventually(lambda: ask(log.url, "/healthz")[0] == 200)
        assert add(log.url, entry(0))[0] == 200


def test_sighup_under_load(tmp_path: Path) -> None:
    """Registering logs and cosigning share one connection to the database."""
    signers = [new_key(f"log{i}.example") for i in range(20)]
    with contextlib.closing(LocalWitness(tmp_path / "w.db", signers[0].key)) as server:
        over = threading.Event()
        statuses: list[int] = []

        def client() -> None:
            while not over.is_set():
                statuses.append(cosign(server, request_for(0, 0, signers[0]))[0])

        def register() -> None:
            for signer in signers:
                server.witness.register([signer.key])
            eventually(lambda: len(statuses) > 8)  # also where all are registered before the first is answered
            over.set()

        at_once(register, *[client] * 4)
        assert set(statuses) == {200}
        assert len(server.witness.logs) == 20
        assert all(cosign(server, request_for(0, 1, signer))[0] == 200 for signer in signers)


def test_T67_adds_that_wait_are_told_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "w").write_text(WITNESS_VKEY)
    witness_ = ("--witness-url", "http://127.0.0.1:1", "--witness-public-key", "w")
    with running("serve", *witness_, cwd=tmp_path) as server, concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(add, server.url, entry(i)) for i in range(8)]
        eventually(lambda: samples_of(server.url)["btlog_queue_entries", ""] == 8)
        begun = time.monotonic()
        assert server.stop()[0] == 0
        assert time.monotonic() - begun < 5
        assert [answer.result()[0] for answer in answers] == [503] * 8


def test_an_idle_log_has_its_checkpoint_cosigned_anew(tmp_path: Path) -> None:
    with several_witnesses(tmp_path, 1) as [witness_]:
        policy = witnessed_policy(witness_)
        with contextlib.closing(LocalLog(tmp_path / "log", policy=policy, options={"republish_interval": 0.2})) as log:
            assert add(log.url, entry(0))[0] == 200
            first = published(log.url, policy)
            assert first
            witness_.now += 3600
            later = eventually(lambda: (c := published(log.url, policy)) and c.cosigned[0][1] == 1_003_600 and c)
            assert later.tree == first.tree
            assert len(btlog.split_note(log.log.published.note)[1]) == 2


def test_quorums_that_cant_be_met_are_refused(tmp_path: Path) -> None:
    nobody = "http://127.0.0.1:1"
    many = [VerifierKey(f"x{i}", 4, hashlib.sha256(b"x%d" % i).digest()) for i in range(btlog.MAX_WITNESSES + 1)]
    for says, policy in (
        ("can't be met", btlog.simple_policy([LOG], [WITNESS])),  # without a URL
        ("no room", asks(1, *((key, nobody) for key in many))),
    ):
        with contextlib.closing(found(tmp_path / "log")) as store, pytest.raises(Malformed, match=says):
            btlog.Log(store, SIGNER, policy, btlog.LogOptions())
    (tmp_path / "w").write_text(WITNESS_VKEY)
    url, key = ("--witness-url", nobody), ("--witness-public-key", "w")
    for args in url, key, ("--policy", "p", *url, *key):
        exits(2, "", "serve", *args, "--port", "0", cwd=tmp_path)
        assert not (tmp_path / "btlog-data").exists()


def test_verify_with_witnesses(tmp_path: Path) -> None:
    file = wheel(tmp_path / "some-1.0.whl")
    with several_witnesses(tmp_path, 2) as witnesses:
        witnesses[1].now = time.time()
        data = Entry(file.name, btlog.checksum_of(file)).encode()
        with contextlib.closing(LocalLog(tmp_path / "log", policy=witnessed_policy(*witnesses))) as log:
            assert add(log.url, data)[0] == 200
            (tmp_path / f"{file.name}.tlog-proof").write_bytes(ask(log.url, "/entry/0/proof")[2])
    for i, signer in enumerate([new_key("w0.example"), new_key("w1.example"), COSIGNER]):
        (tmp_path / f"w{i}").write_text(btlog.encode_vkey(signer.key))
    (tmp_path / "log.key").write_text(LOG_VKEY)
    for keys, more, code in (
        ("0", "", 0), ("01", "", 0), ("012", "", 1), ("2", "", 1), ("", "", 0), ("00", "", 2),
        ("012", "--quorum 2", 0), ("12", "--quorum 2", 1), ("0", "--quorum 2", 2), ("0", "--quorum 0", 2),
        ("", "--quorum 1", 2), ("", "--max-age 10", 1), ("0", "--max-age 10", 1), ("1", "--max-age 100", 0),
        ("01", "--max-age 100", 1),  # each of the quorum has to be fresh
        ("01", "--quorum 1 --max-age 100", 0), ("21", "--quorum 1 --max-age 100", 0), ("1", "--max-age nan", 2),
    ):
        flags = [word for i in keys for word in ("--witness-public-key", f"w{i}")] + more.split()
        said = exits(code, "", "verify", file.name, "--public-key", "log.key", *flags, cwd=tmp_path)
        assert ("cosigned by 2 witnesses" in said) is (code == 0 and keys in ("01", "012")), (flags, said)


# --- Killed -----------------------------------------------------------------------------------------------------------------------------

BULK_HEAD = b"POST /admin/bulk/append HTTP/1.0\r\nContent-Type: application/x-ndjson\r\nContent-Length: %d\r\n\r\n"


@pytest.mark.slow
def test_T4_a_bulk_that_a_kill_cuts_off_is_there_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    """Each line that was answered is in the log at its index, wherever the answer was cut off."""
    answered: dict[int, bytes] = {}
    for turn, after in enumerate([0.02, 0.15, 0.3, 0.5]):
        batch = [entry(i, f"t{turn}-") for i in range(20_000)]
        body = b"".join(map(as_line, batch))
        with running("serve", "--storage-dir", "log", "--origin", LOG.name, cwd=tmp_path) as server:
            policy = btlog.simple_policy([VerifierKey.parse(server.line.split()[4])])
            killer = threading.Timer(after, server.process.kill)
            killer.start()
            got = raw(int(server.url.rpartition(":")[2]), BULK_HEAD % len(body) + body)
            killer.join()
        lines = got.partition(b"\r\n\r\n")[2].split(b"\n")[1:-1]  # the last one may be cut off
        answered.update((json.loads(line)["result"]["index"], data) for data, line in zip(batch, lines, strict=False))
    with running("serve", "--storage-dir", "log", cwd=tmp_path) as server:
        entries = walk(server.url, policy)
        server.stop()
    assert len(entries) % 20_000 == 0
    assert len(answered) > 0
    assert {index: entries[index] for index in answered} == answered
    assert run_btlog("fsck", "--storage-dir", "log", cwd=tmp_path).returncode == 0


def test_while_a_bulk_runs_others_are_answered(tmp_path: Path) -> None:
    with running("serve", "--storage-dir", "log", cwd=tmp_path) as server:
        over = threading.Event()
        took: dict[str, list[float]] = {"add": [], "read": []}

        def ask_on(what: str) -> None:
            while not over.is_set():
                begun = time.monotonic()
                if what == "add":
                    assert add(server.url, entry(len(took[what]), "lone"))[0] == 200
                else:
                    assert ask(server.url, "/checkpoint")[0] == 200
                took[what].append(time.monotonic() - begun)

        threads = [threading.Thread(target=ask_on, args=(what,)) for what in took]
        for thread in threads:
            thread.start()
        lines = b"".join(as_line(entry(i)) for i in range(25_000))
        begun = time.monotonic()
        status, answer = bulk(server.url, lines)
        whole_bulk = time.monotonic() - begun
        over.set()
        for thread in threads:
            thread.join()
        assert (status, answer[-1]) == (200, {"type": "complete", "count": 25_000})
        # Other processes may slow down all.
        assert max(*took["add"], *took["read"]) < max(1, whole_bulk * 0.6), (whole_bulk, took)
        assert min(map(len, took.values())) > 3
        server.stop()


# --- The README -------------------------------------------------------------------------------------------------------

README = (HERE / "README.md").read_text()


def run_readme(kind: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The commands of the README's blocks of a kind, one after the other in one shell, on ports that are free."""
    blocks = re.findall(rf"^```sh {kind}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert blocks
    script = "wait_for() { while [ ! -s $1 ]; do sleep 0.05; done; }\nset -e; trap 'kill $(jobs -p) || true' EXIT\n"
    shutil.copy(SOURCE, cwd)
    ports = {"serve": free_port(), "witness": free_port()}
    for text in blocks:
        text = text.replace("sleep 2\n", "")  # it is waited for below
        for command, default in ("serve", 8080), ("witness", 8081):
            start = rf"$PYTHON $BTLOG \1 --port {ports[command]} > ready-{command} & wait_for ready-{command}"
            text = re.sub(rf"^python btlog\.py ({command}\b.*?) &$", start, text, flags=re.MULTILINE)
            text = text.replace(f"localhost:{default}", f"127.0.0.1:{ports[command]}")
        at = f"--log-url http://127.0.0.1:{ports['serve']}"
        text = re.sub(r"^(python btlog\.py add .*)$", rf"\1 {at}", text, flags=re.MULTILINE)
        script += text.replace("python btlog.py", "$PYTHON $BTLOG").replace("python -c", "$PYTHON -c")
    done = subprocess.run(
        ["bash", "-c", script], cwd=cwd, env={**os.environ, "PYTHON": sys.executable, "BTLOG": str(SOURCE)},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert [path_.name for path_ in cwd.iterdir()] == [SOURCE.name]  # P3: nothing is left behind
    return done


def test_P3_the_walk_of_the_readme(tmp_path: Path) -> None:
    """It can be walked twice in the same folder, as nothing is left behind."""
    done = run_readme("walk", tmp_path)
    assert '"index":0,' in done.stdout
    assert done.stdout.count("logged at index 1 of log.example.com/pypi, tree size 2") == 2
    assert "exit code 1: don't install it" in done.stdout
    assert "demo-1.0-py3-none-any.whl: the proof does not show this entry at index 1 of the tree of size 2" in done.stderr


def test_P3_the_two_processes_of_the_readme(tmp_path: Path) -> None:
    done = run_readme("witnesses", tmp_path)
    keys = [VerifierKey.parse(vkey) for vkey in done.stdout.splitlines()[:2]]
    note = done.stdout[done.stdout.index("log.example.com/pypi\n") :].removesuffix("\n").encode()
    opened = open_checkpoint(note, btlog.simple_policy(keys[:1], keys[1:]))
    assert (opened.tree.size, len(opened.cosigned), note.count("\n\u2014 ".encode())) == (1, 1, 2)


def test_the_owner_of_the_readme(tmp_path: Path) -> None:
    """From no log at all: what the index has is logged, and what its owner has not made is told, once."""
    [text] = re.findall(r"^```sh owner\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    heard = list[Any]()

    class Phone(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            heard.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            pass

    wheel(make(tmp_path / "dist") / "my_project-1.0-py3-none-any.whl")
    mine = {"my_project-1.0-py3-none-any.whl": btlog.checksum_of(tmp_path / "dist" / "my_project-1.0-py3-none-any.whl")}
    log_port, phone = free_port(), http.server.ThreadingHTTPServer(("127.0.0.1", 0), Phone)
    answering = threading.Thread(target=phone.serve_forever, args=(0.01,))
    answering.start()
    with contextlib.closing(FakeIndex(make(tmp_path / "index"), mine)) as index:
        for old, new in (
            ("python btlog.py", f"{sys.executable} {SOURCE}"), ("localhost:8080", f"127.0.0.1:{log_port}"),
            (" serve ", f" serve --port {log_port} "), ("https://index.example.com/simple/", f"{index.url}/"),
            (" ingest ", f" ingest --frequency 0.2 --log-url http://127.0.0.1:{log_port} "), (" monitor ", " monitor --frequency 0.2 "),
            ("https://push.example.com/my-topic", f"http://127.0.0.1:{phone.server_address[1]}/"),
            ("sleep 2", f"until curl -sf http://127.0.0.1:{log_port}/healthz; do sleep 0.05; done"),
        ):  # fmt: skip
            assert old in text
            text = text.replace(old, new)
        with (tmp_path / "said").open("w") as said:
            shell = subprocess.Popen(["bash", "-ec", f"trap 'kill $(jobs -p); wait' EXIT\n{text}\nread"], cwd=tmp_path,
                                     stdin=subprocess.PIPE, stdout=said, stderr=said)  # fmt: skip
        try:
            eventually(lambda: "as you made it" in (tmp_path / "said").read_text())
            index.files = {**mine, "my_project-1.0.tar.gz": "sha256:" + SUM_OF_A}
            eventually(lambda: heard)
            index.files["my_project-1.1.tar.gz"] = "sha256:" + SUM_OF_A
            eventually(lambda: len(heard) > 1)
        finally:
            shell.communicate(b"\n", timeout=20)
            phone.shutdown()
            answering.join()
            phone.server_close()
    assert [(found_["kind"], found_["filename"]) for found_ in heard] == [
        ("unexpected", "my_project-1.0.tar.gz"), ("unexpected", "my_project-1.1.tar.gz")]  # fmt: skip
    assert "Traceback" not in (tmp_path / "said").read_text()


def test_the_proof_and_the_example_of_the_readme_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [vkey] = re.findall(r"^```\n(log\.example\.com/pypi\+\S+)\nhttp", README, re.MULTILINE)
    [proof] = re.findall(r"^c2sp\.org/tlog-proof@v1\n.*?(?=^```)", README, re.MULTILINE | re.DOTALL)
    [text] = re.findall(r"^echo '(.*)' > demo-1.0-py3-none-any.whl$", README, re.MULTILINE)
    name = "demo-1.0-py3-none-any.whl"
    entry_ = Entry(name, "sha256:" + hashlib.sha256(f"{text}\n".encode()).hexdigest())
    assert check_logged(entry_, proof.encode(), btlog.simple_policy([VerifierKey.parse(vkey)])).tree.size == 2


def test_the_example_of_the_readme(tmp_path: Path) -> None:
    """On a Python without packages; and not with a file that was changed."""
    [code] = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    entry_ = Entry("x-1.0.whl", f"sha256:{hashlib.sha256(b'x').hexdigest()}")
    (tmp_path / "core.py").write_text(run_btlog("core").stdout)
    (tmp_path / "x-1.0.whl.tlog-proof").write_bytes(proof_of_one(entry_))
    (tmp_path / "log.policy").write_text(f"log {LOG_VKEY}\nquorum none\n")
    for data, says in (b"x", ""), (b"y", "BadProof"):
        (tmp_path / "x-1.0.whl").write_bytes(data)
        done = subprocess.run(
            [sys.executable, "-S", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
        )
        assert (done.returncode, says in done.stderr) == (int(bool(says)), True), done.stderr


def test_the_readme_names_what_there_is() -> None:
    foreign = r"pip install --report|docker compose .*|useradd .*|(?:un)?mount .*|--(?:hash|find-links|only-binary|require-hashes|extra-index-url)"
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", re.sub(foreign, "", README)))
    actions: list[Any] = list(btlog.parser()._actions)
    subparsers: dict[str, Any] = next(dict(a.choices) for a in actions if isinstance(a.choices, dict))
    assert len(flags) > 12
    assert flags - {flag for sub in subparsers.values() for flag in sub._option_string_actions} == set()
    named = set(re.findall(r"`([a-z]+)", " ".join(re.findall(r"^\|([^|]*)\|", README, re.MULTILINE))))
    assert set(subparsers) == set(COMMANDS) <= named
    for path_ in re.findall(r"`(?:GET|POST) (/[^`?]*)", README):
        assert path_.startswith("/<") or path_.split("/")[1] in TEXT


# --- What operators watch ------------------------------------------------------------------------------------------------------------------

def samples_of(url: str) -> dict[tuple[str, str], float]:
    """The samples of /metrics, by name and labels, each line of which has the form that it should have."""
    status, headers, body = ask(url, "/metrics")
    assert (status, headers["content-type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    samples = {}
    for line in body.decode().splitlines():
        if not line.startswith("#"):
            match = re.fullmatch(r"(btlog_[a-z_]+)(?:\{(.*)\})? ([0-9.e+-]+)", line)
            assert match, line
            assert (match[1], match[2] or "") not in samples
            samples[match[1], match[2] or ""] = float(match[3])
    return samples


def test_metrics_of_a_log(log: LocalLog) -> None:
    url = log.url
    assert samples_of(url)["btlog_tree_size", 'tree="published"'] == 0
    assert [add(url, entry(1))[0], add(url, entry(1))[0], add(url, other_sum(entry(1)))[0]] == [200, 200, 409]
    assert ask(url, "/add", "POST", b"{}")[0] == 400
    assert bulk(url, b"".join(as_line(entry(i)) for i in range(2, 9)))[0] == 200
    after = samples_of(url)
    results = {"logged": 9, "conflict": 1, "refused": 1, "unavailable": 0, "failed": 0}
    assert {label: value for (name, label), value in after.items() if name == "btlog_entries_total"} == {
        f'result="{result}"': count for result, count in results.items()
    }
    for name, label, value in [
        ("tree_size", 'tree="published"', 8), ("tree_size", 'tree="signed"', 8), ("bulk_seconds_count", "", 1),
        ("add_seconds_count", "", 2), ("add_seconds_bucket", 'le="+Inf"', 2), ("queue_entries", "", 0), ("trouble", "", 0),
    ]:  # fmt: skip
        assert after[f"btlog_{name}", label] == value
    assert 0 < after["btlog_add_seconds_sum", ""] < 60
    buckets = [value for (name, _), value in after.items() if name == "btlog_add_seconds_bucket"]
    assert buckets == sorted(buckets)


def test_metrics_and_lines_of_json_are_escaped() -> None:
    text = btlog.metric("m", "gauge", "What it is.", [("", {"a": 'x\\y"z\nw'}, 1)])
    assert text == '# HELP m What it is.\n# TYPE m gauge\nm{a="x\\\\y\\"z\\nw"} 1\n'
    record = logging.LogRecord("btlog", logging.ERROR, "", 0, "%s: \u2014 and\nmore", ("what",), None)
    line = btlog.JsonLines().format(record)
    assert "\n" not in line
    parsed = json.loads(line)
    assert (parsed["level"], parsed["msg"]) == ("ERROR", "what: \u2014 and\nmore")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", parsed["time"])


def test_a_flood_of_records_is_held_back() -> None:
    flood = btlog.Flood(limit=3, period=60)

    def say(text: str, at: float) -> str | None:
        record = logging.LogRecord("btlog", logging.ERROR, "", 0, text, ("x",), None)
        record.created = at
        return record.getMessage() if flood.filter(record) else None

    assert [say("a %s", 100.0 + i) for i in range(10)] == ["a x"] * 3 + [None] * 7
    assert say("b %s", 110.0) == "b x"  # another kind is not held back with it
    assert say("a %s", 170.0) == "a x (and 7 more like it)"
    assert [say("a %s", 171.0) for _ in range(3)] == ["a x", "a x", None]
    assert say("a %s", 300.0) == "a x (and 1 more like it)"
    assert say("a %s", 400.0) == "a x"


# --- The page, in a real browser -----------------------------------------------------------------------------------------------

HOSTILE = "<img src=x onerror=alert(1)>.whl"
EXEC_WITH_PIPES = """
import fcntl, os, sys  # a Chromium reads its orders from 3 and answers on 4
for number, file in zip((3, 4), [fcntl.fcntl(int(file), fcntl.F_DUPFD, 10) for file in sys.argv[1:3]]):
    os.dup2(file, number)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Browser:
    """A headless Chromium that is told what to do over a pipe, and that keeps what its console says."""

    def __init__(self, profile: Path) -> None:
        found_at = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
        assert found_at, "this test needs a Chromium: apt-get install chromium"
        theirs, self._write = os.pipe()
        self._read, back = os.pipe()
        flags = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run")
        begin = (sys.executable, "-c", EXEC_WITH_PIPES, str(theirs), str(back), found_at)
        command = (*begin, *flags, f"--user-data-dir={profile}", "--remote-debugging-pipe")
        with open(profile.with_suffix(".log"), "wb") as output:
            self._process = subprocess.Popen(command, pass_fds=(theirs, back), stdout=output, stderr=output)
        os.close(theirs)
        os.close(back)
        self._count, self._rest, self._session = itertools.count(1), b"", ""
        self.complaints: list[str] = []

    def start(self) -> None:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in "Page", "Runtime", "Log":
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self._count)
        session = {"sessionId": self._session} if self._session else {}
        os.write(self._write, json.dumps({"id": number, "method": method, "params": params, **session}).encode() + b"\0")
        while True:
            while b"\0" not in self._rest:
                assert select.select([self._read], [], [], 60)[0], f"Chromium has no answer to {method}"
                data = os.read(self._read, 1 << 16)
                assert data, f"Chromium ended at {method}"
                self._rest += data
            line, _, self._rest = self._rest.partition(b"\0")
            message = json.loads(line)
            if message.get("method") in ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled"):
                self.complaints.append(str(message["params"]))
            if message.get("id") == number:
                assert "error" not in message, message
                result: dict[str, Any] = message["result"]
                return result

    def run(self, script: str) -> Any:
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def open(self, url: str) -> None:
        """Opens a page anew, whatever is open, and waits until it is there."""
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=url)
        eventually(lambda: self.run("location.protocol === 'http:' && document.body?.className === 'ready'"))

    def verdict(self) -> str:
        """What the page finds in the end: verified, consistent, short (of witnesses), unchecked or refused."""
        last = "[...document.querySelectorAll('.verdict')].map(e => e.dataset.verdict).at(-1)"
        return str(eventually(lambda: self.run(last)))

    def text(self, selector: str) -> str:
        return str(self.run(f"[...document.querySelectorAll({json.dumps(selector)})].map(e => e.textContent).join('|')"))

    def close(self) -> None:
        with contextlib.suppress(AssertionError, OSError):
            self._session = ""
            self.call("Browser.close")
        try:
            self._process.wait(15)
        finally:
            self._process.kill()
            os.close(self._read)
            os.close(self._write)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with contextlib.closing(Browser(tmp_path_factory.mktemp("chromium") / "profile")) as started:
        started.start()
        yield started


@pytest.fixture
def browser(chromium: Browser) -> Iterator[Browser]:
    """A browser with nothing open and nothing complained of: a page left open goes on asking a log that has ended."""
    chromium.call("Page.navigate", url="about:blank")
    chromium.complaints.clear()
    yield chromium
    chromium.call("Page.navigate", url="about:blank")


@contextlib.contextmanager
def tampering(url: str, tamper: Callable[[str, bytes], bytes]) -> Iterator[str]:
    """The URL of a server between a browser and the log at `url` that changes what `tamper` changes."""

    class Between(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, data = ask(url, self.path)
            data = tamper(self.path, data)
            self.send_response(status)
            for name in {"content-type", "content-security-policy"} & headers.keys():
                self.send_header(name, headers[name])
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: Any) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Between) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def page_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a log with 301 entries and a witness; tests only read it."""
    folder = tmp_path_factory.mktemp("page")
    with contextlib.closing(LocalWitness(folder / "w.db")) as witness_:
        witness_.now = time.time()
        with contextlib.closing(LocalLog(folder / "log", policy=witnessed_policy(witness_))) as log:
            signed = Entry("signed-1.0.whl", f"sha256:{'12' * 32}", PUBLISHER), Entry(HOSTILE, f"sha256:{'ab' * 32}")
            entries = [*(entry(i) for i in range(299)), *(data.encode() for data in signed)]
            assert bulk(log.url, b"".join(map(as_line, entries)))[0] == 200
            yield log.url


def at_hash(url: str, value: str) -> str:
    return f"{url}/#{urllib.parse.quote(value, safe='')}"


@pytest.mark.slow
def test_page_finds_and_verifies(page_url: str, browser: Browser) -> None:
    """T65: names are text. The page verifies by keys that were pinned, and says so where none was."""
    status, headers, _ = ask(page_url, "/")
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert headers["content-security-policy"].startswith("default-src 'none'; connect-src 'self'; ")
    browser.open(page_url)
    assert (browser.text("#origin"), browser.text("#size")) == (LOG.name, "301")
    assert HOSTILE in browser.text("#newest a")
    assert browser.run("document.querySelectorAll('#newest li').length") == 10
    for value in "ab" * 32, f"sha256:{'AB' * 32}", "signed-1.0.whl", Entry.parse(entry(7)).filename, HOSTILE:
        browser.open(at_hash(page_url, value))
        assert browser.verdict() == "consistent", browser.text("#results")
    assert browser.text("article h3") == HOSTILE
    assert browser.run("document.images.length") == 0
    # What is pinned stays: also for the next visit.
    browser.run(f"pin({json.dumps(LOG_VKEY)}, {json.dumps(WITNESS_VKEY)})")
    assert browser.verdict() == "verified", browser.text("#results")
    browser.open(at_hash(page_url, "signed-1.0.whl"))
    assert browser.verdict() == "verified"
    assert browser.text(".steps li > span") == "✓|✓|✓|✓"
    assert "cosigned at 20" in browser.text(".steps")
    assert f"publisher {PUBLISHER.issuer} {PUBLISHER.subject}" in browser.text(".steps")
    # Another log's key is refused. An absent witness, or a key that is none, proves nothing, nor is it false.
    absent = btlog.encode_vkey(new_key("w.example").key)
    for key, witnesses, kind, says in [
        (btlog.encode_vkey(new_key("log.example/other").key), "", "refused", "Refused: "),
        (LOG_VKEY, absent, "short", "Not verified: none of your witnesses has cosigned."),
        (LOG_VKEY, f"{WITNESS_VKEY}\n{absent}", "short", "Not verified: only 1 of the 2 witnesses"),
        (LOG_VKEY[:-4], "", "unchecked", "Not verified: the key ID"),
    ]:
        browser.run(f"pin({json.dumps(key)}, {json.dumps(witnesses)})")
        assert browser.verdict() == kind, key
        assert says in browser.text(".verdict")
    browser.open(at_hash(page_url, "nothing-1.0.whl"))
    assert "No file and no project of this name is logged." in eventually(lambda: browser.text("#found.warn"))
    browser.run("isSigned = async () => null; pin('', ''); location.hash = '#signed-1.0.whl'")
    assert browser.verdict() == "unchecked"  # a browser without Ed25519
    assert browser.complaints == []


def flipped(line: str, at: int) -> str:
    """A line with one bit changed in the base64 at its end."""
    head, space, value = line.rpartition(" ")
    data = bytearray(base64.b64decode(value, validate=True))
    data[at] ^= 1
    return f"{head}{space}{b64(bytes(data))}"


def change_line(part: int, line: int, change: Callable[[str], str]) -> Callable[[str, bytes], bytes]:
    """Changes a line of a part of a proof: 0 is its head, 1 the text of the checkpoint, 2 its signatures."""

    def tamper(path_: str, data: bytes) -> bytes:
        if not path_.endswith("/proof"):
            return data
        parts = [text.split("\n") for text in data.decode().split("\n\n")]
        parts[part][line] = change(parts[part][line])
        return "\n\n".join("\n".join(lines) for lines in parts).encode()

    return tamper


def in_answer(old: bytes, new: bytes) -> Callable[[str, bytes], bytes]:
    return lambda path_, data: data.replace(old, new) if path_.startswith("/entries") else data


@pytest.mark.slow
def test_page_refuses_what_is_forged(page_url: str, browser: Browser) -> None:
    logged = {i: ask(page_url, f"/entry/{i}")[2] for i in (299, 300)}
    proof, moved = ask(page_url, "/entry/299/proof")[2], logged[299].replace(b"299", b"298")
    forged: dict[str, Callable[[str, bytes], bytes]] = {
        "nothing": lambda path_, data: data,
        "a hash": change_line(0, -1, lambda line: flipped(line, 0)),
        "a hash that is none": change_line(0, -1, lambda line: "index 0"),
        "the extra": change_line(0, 1, lambda line: flipped(line, -1)),
        "the index": change_line(0, 2, lambda line: "index 298"),
        "not a number": change_line(0, 2, lambda line: "index 0299"),
        "the origin": change_line(1, 0, lambda line: "log.example/other"),
        "the size": change_line(1, 1, lambda line: "302"),
        "the root": change_line(1, 2, lambda line: flipped(line, 0)),
        "the signature": change_line(2, 0, lambda line: flipped(line, 20)),
        "its key ID": change_line(2, 0, lambda line: flipped(line, 0)),
        "the time of a cosignature": change_line(2, 1, lambda line: flipped(line, 11)),
        "the cosignature": change_line(2, 1, lambda line: flipped(line, 30)),
        "the checksum": in_answer(b"sha256:12", b"sha256:21"),
        "the name": in_answer(b"signed-1.0", b"signed-2.0"),
        "the publisher": in_answer(PUBLISHER.subject.encode(), b"somebody else"),
        "a newline in the name": in_answer(b"signed-1.0.whl", rb"signed-1.0.whl\npublisher a b"),
        "the index of the answer": in_answer(b'"index": 299', b'"index": 298'),
        "another entry": in_answer(b"12" * 32, b"ab" * 32),
        "an entry that is logged, and was not asked for": lambda path_, data: (
            b'{"entries":[%b]}' % logged[300] if path_.startswith("/entries") else data
        ),
        "a proof of another index than the answer has": lambda path_, data: (
            b'{"entries":[%b]}' % moved if path_.startswith("/entries") else proof if path_ == "/entry/298/proof" else data
        ),
    }
    for what, tamper in forged.items():
        with tampering(page_url, tamper) as between:
            browser.open(f"{between}/")
            browser.complaints.clear()
            browser.run(f"pin({json.dumps(LOG_VKEY)}, {json.dumps(WITNESS_VKEY)})")
            browser.run("location.hash = '#signed-1.0.whl'")
            assert browser.verdict() == ("verified" if what == "nothing" else "refused"), (what, browser.text("#results"))
            assert browser.complaints == []


# --- What people have: lock files, reports, folders --------------------------------------------------------------------------------------

HASHES = {name: hashlib.sha256(name.encode()).hexdigest() for name in "abcdef"}
PYLOCK = f"""
lock-version = "1.0"
created-by = "hand"
[[packages]]
name = "Some.Thing"
version = "1.0"
sdist = {{ url = "https://files.example/x/some_thing-1.0.tar.gz", hashes = {{ sha256 = "{HASHES["a"]}" }} }}
wheels = [
  {{ name = "some_thing-1.0-py3-none-any.whl", url = "https://files.example/y", hashes = {{ sha256 = "{HASHES["b"]}" }} }},
  {{ path = "./wheels/some_thing-1.0-cp311-cp311-linux_x86_64.whl", hashes = {{ sha256 = "{HASHES["c"]}" }} }},
]
[[packages]]
name = "archived"
archive = {{ url = "https://files.example/archived-2%2B1.zip", hashes = {{ sha256 = "{HASHES["d"]}" }} }}
"""
LACKING_PYLOCK = """
lock-version = "1.0"
created-by = "x"
packages = [
  { name = "here", directory = { path = "." } }, { name = "x", wheels = [{ name = "x-1-py3-none-any.whl" }] }, { name = "none" },
]
"""
UV_LOCK = f"""
version = 1
requires-python = ">=3.11"
[[package]]
name = "mine"
version = "0.1"
source = {{ virtual = "." }}
[[package]]
name = "some-thing"
version = "1.0"
source = {{ registry = "https://index.example/simple" }}
sdist = {{ url = "https://files.example/x/some_thing-1.0.tar.gz", hash = "sha256:{HASHES["a"]}", size = 1 }}
wheels = [{{ url = "https://files.example/x/some_thing-1.0-py3-none-any.whl", hash = "sha256:{HASHES["b"]}", size = 1 }}]
"""
REQUIREMENTS = f"""
# a comment
--index-url https://index.example/simple
-c constraints.txt
some.thing[extra]==1.0 ; python_version >= "3.11" \\
    --hash=sha256:{HASHES["a"]} \\
    --hash=sha256:{HASHES["b"]}  # via what
other==2 --hash sha256:{HASHES["c"]}
linked @ https://files.example/linked-3-py3-none-any.whl#sha256={HASHES["d"]}
-r more.txt
"""
REPORT = {"version": "1", "install": [
    {"metadata": {"name": "some.thing", "version": "1.0"}, "download_info": {
        "url": "https://files.example/some_thing-1.0-py3-none-any.whl", "archive_info": {"hashes": {"sha256": HASHES["b"]}}}},
    {"metadata": {"name": "old", "version": "1"}, "download_info": {
        "url": "https://files.example/old-1.tar.gz", "archive_info": {"hash": f"sha256={HASHES['c']}"}}},
]}  # fmt: skip


def named(target: Path) -> list[tuple[str, str, str]]:
    """Filename, project and the letter of the checksum of each artifact that a target names."""
    letters = {f"sha256:{value}": name for name, value in HASHES.items()}
    found = btlog.artifacts_of(str(target))
    assert all(bool(a.checksum) + bool(a.trouble) + bool(a.skipped) == 1 for a in found)
    return [(a.filename, a.project, letters.get(a.checksum, a.trouble or a.skipped)) for a in found]


def test_artifacts_of_lock_files_and_reports(tmp_path: Path) -> None:
    inspected = json.dumps({"version": "1", "installed": [{"metadata": {"name": "bare"}}]})
    for name, text, expected in [
        ("pylock.toml", PYLOCK, [
            ("some_thing-1.0-py3-none-any.whl", "some-thing", "b"),
            ("some_thing-1.0-cp311-cp311-linux_x86_64.whl", "some-thing", "c"),
            ("some_thing-1.0.tar.gz", "some-thing", "a"),
            ("archived-2+1.zip", "archived", "d"),
        ]),
        ("uv.lock", UV_LOCK, [
            ("", "mine", "a folder: ."),
            ("some_thing-1.0-py3-none-any.whl", "some-thing", "b"),
            ("some_thing-1.0.tar.gz", "some-thing", "a"),
        ]),
        ("pylock.dev.toml", LACKING_PYLOCK, [
            ("", "here", "a folder: ."),
            ("", "x", "x-1-py3-none-any.whl needs a SHA-256 and no other hash, and it has none"),
            ("", "none", "it is locked without a file, or in two ways"),
        ]),
        ("report.json", json.dumps(REPORT), [
            ("some_thing-1.0-py3-none-any.whl", "some-thing", "b"), ("old-1.tar.gz", "old", "c"),
        ]),
        ("inspect.json", inspected, [("", "bare", "it has no checksum here; the JSON of pip install --report has")]),
    ]:  # fmt: skip
        (tmp_path / name).write_text(text)
        assert named(tmp_path / name) == expected


def test_artifacts_of_requirements(tmp_path: Path) -> None:
    (tmp_path / "requirements.txt").write_text(REQUIREMENTS)
    (tmp_path / "constraints.txt").write_text(f"free>=1,<2\nother==2 --hash=sha256:{HASHES['c']}\nx @ https://x.example/x-1.zip\n")
    (tmp_path / "more.txt").write_text(f"more==1 --hash=sha256:{HASHES['e']}\r\nbare==1\n-e .\n")
    only = "-e: a folder, or version control, has no hash: export with --no-emit-project or --no-emit-local"
    assert named(tmp_path / "requirements.txt") == [
        ("", "other", "c"),
        ("", "x", "constraints.txt, line 3: x is a URL in a constraint"),
        ("", "some-thing", "a"),
        ("", "some-thing", "b"),
        ("linked-3-py3-none-any.whl", "linked", "d"),
        ("", "more", "e"),
        ("", "bare", "more.txt, line 2: bare needs --hash=sha256:\u2026"),
        ("", "-e .", f"more.txt, line 3: {only}"),
    ]
    (tmp_path / "more.txt").write_text("-r requirements.txt\n")
    refuses(Malformed, btlog.artifacts_of, str(tmp_path / "requirements.txt"))


def test_artifacts_of_folders_and_of_what_is_malformed(tmp_path: Path) -> None:
    refuses(Malformed, btlog.artifacts_of, str(make(tmp_path / "empty")))
    make(tmp_path / "sub").joinpath("z-1.tar.gz").write_bytes(b"z")
    names = ["a-1.tar.xz", "b-1.tar", "c-1.txz", "d-1.tbz", "e-1.tar.lzma", "f-1-py3-none-any.WHL"]
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    assert [Path(a.target).name for a in btlog.artifacts_of(str(tmp_path))] == [*names, "z-1.tar.gz"]
    for name, text in [
        ("pylock.toml", "["), ("pylock.toml", "x = 1"), ("pylock.toml", 'packages = [1]'), ("uv.lock", "package = []"),
        ("a.json", "[]"), ("a.json", '{"install": [{}]}'), ("a.json", "[" * 100_000), ("r.txt", ""), ("r.txt", "\udcff"),
    ]:  # fmt: skip
        (tmp_path / name).write_bytes(text.encode(errors="surrogateescape"))
        refuses((Malformed, Unavailable), btlog.artifacts_of, str(tmp_path / name))


@pytest.fixture
def locked(log: LocalLog, tmp_path: Path) -> tuple[LocalLog, Path]:
    """A log that has what the lock files above name, and a folder with these and its key."""
    files = [
        ("some_thing-1.0.tar.gz", "a", None), ("some_thing-1.0-py3-none-any.whl", "b", PUBLISHER),
        ("some_thing-1.0-cp311-cp311-linux_x86_64.whl", "c", None), ("archived-2+1.zip", "d", None),
    ]  # fmt: skip
    for filename, letter, publisher in files:
        assert add(log.url, Entry(filename, f"sha256:{HASHES[letter]}", publisher).encode())[0] == 200
    (tmp_path / "public.key").write_text(f"{LOG_VKEY}\n")
    (tmp_path / "pylock.toml").write_text(PYLOCK)
    (tmp_path / "requirements.txt").write_text(
        f"some-thing==1.0 --hash=sha256:{HASHES['a']} --hash=sha256:{HASHES['b']} --hash=sha256:{HASHES['c']}\n"
    )
    return log, tmp_path


def verify(folder: Path, *words: str) -> tuple[int, str, str]:
    done = run_btlog("verify", *words, "--public-key", "public.key", cwd=folder)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout, done.stderr


def test_verify_lock_files(locked: tuple[LocalLog, Path]) -> None:
    log, folder = locked
    online = ("--log-url", log.url)
    code, out, err = verify(folder, "pylock.toml", *online)
    assert (code, out.count(": logged at index "), err) == (0, 4, "btlog: 4 of 4 artifacts are logged as they should be\n")
    code, out, err = verify(folder, "requirements.txt", "pylock.toml", "--json", *online, "--save-proofs", "proofs")
    told = json.loads(out)
    assert (code, told["ok"], len(told["artifacts"])) == (0, True, 7)
    whl = [a for a in told["artifacts"] if a["filename"] == "some_thing-1.0-py3-none-any.whl"]
    assert [(a["index"], a["publisher"], a["origin"], a["cosigned"]) for a in whl] == [
        (1, PUBLISHER._asdict(), LOG.name, [])
    ] * 2
    assert len(list((folder / "proofs").iterdir())) == 4
    # Offline, from the proofs that were kept; and from the log's own folder.
    assert verify(folder, "requirements.txt", "pylock.toml", "--proofs", "proofs")[0] == 0
    assert verify(folder, "requirements.txt", "pylock.toml", "--storage-dir", "log")[0] == 0
    (folder / "proofs" / "archived-2+1.zip.tlog-proof").unlink()
    code, out, err = verify(folder, "pylock.toml", "--proofs", "proofs")
    assert (code, out.count("logged at")) == (3, 3)
    assert "archived-2+1.zip" in err


def test_verify_refuses_what_is_not_logged_so(locked: tuple[LocalLog, Path]) -> None:
    log, folder = locked
    online = ("--log-url", log.url)
    text = (folder / "requirements.txt").read_text()
    for changed in [
        text.replace(HASHES["a"], HASHES["f"]),
        text.replace("some-thing", "other-thing"),  # the hash is logged, for another project
        text.replace(f" --hash=sha256:{HASHES['b']}", " --hash=sha256:" + "0" * 64),
    ]:
        (folder / "requirements.txt").write_text(changed)
        for where in online, ("--storage-dir", "log"):
            code, _, err = verify(folder, "requirements.txt", *where)
            assert (code, "not logged" in err) == (1, True)
    (folder / "pylock.toml").write_text(PYLOCK.replace(HASHES["c"], HASHES["e"]))
    code, out, err = verify(folder, "pylock.toml", *online)
    assert (code, out.count("logged at index")) == (1, 3)
    assert "linux_x86_64.whl: not logged, but with another checksum at index 2" in err
    assert "3 of 4 artifacts" in err
    (folder / "pylock.toml").write_text("packages = 3")
    assert verify(folder, "pylock.toml", *online)[:2] == (2, "")
    assert verify(folder, "away-1.0.tar.gz", *online)[0] == 3
    (folder / "some_thing-1.0.tar.gz").write_bytes(b"tampered")
    code, _, err = verify(folder, "some_thing-1.0.tar.gz", "away-1.0.tar.gz", *online)
    # What is wrong counts for more than what is not read.
    assert (code, "can't read away" in err, "another checksum" in err) == (1, True, True)


def test_verify_pins_publishers(locked: tuple[LocalLog, Path]) -> None:
    log, folder = locked
    (folder / "one.txt").write_text(f"some-thing==1 --hash=sha256:{HASHES['b']}\n")
    for pins, code in [
        (("--publisher-issuer", "https://issuer.example"), 0),
        (("--publisher-subject", "https://example[.]com/.*"), 0),
        (("--publisher-issuer", "https://issuer"), 1),  # a part is not enough
        (("--publisher-issuer", ".*", "--publisher-subject", "x"), 1),
        (("--publisher-issuer", "("), 2),
    ]:
        assert verify(folder, "one.txt", "--log-url", log.url, *pins)[0] == code
    code, _, err = verify(folder, "pylock.toml", "--log-url", log.url, "--publisher-issuer", ".*")
    assert (code, err.count("it has no publisher")) == (1, 3)


def test_verify_prints_a_table_on_a_terminal(locked: tuple[LocalLog, Path]) -> None:
    log, folder = locked
    ours, theirs = os.openpty()
    shown = b""
    with os.fdopen(theirs, "w", encoding="utf-8") as terminal, contextlib.redirect_stdout(terminal):
        args = ("--public-key", str(folder / "public.key"), "--log-url", log.url)
        assert btlog.main(["verify", str(folder / "pylock.toml"), *args]) == 0
    with contextlib.suppress(OSError):  # which is how a terminal ends
        while data := os.read(ours, 65536):
            shown += data
    os.close(ours)
    lines = shown.decode().splitlines()
    assert [line.split()[:2] for line in lines[:2]] == [["artifact", "logged"], ["\u2713", f"{folder}/pylock.toml:"]]
    assert len(lines) == 5


GOOD, EVIL = (f"--hash=sha256:{HASHES[letter]}" for letter in "ab")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (f"# note \\\nevil==6.6 {EVIL}\n", "a comment within"),  # pip never continues a comment
        (f"# note\x0cevil==6.6 {EVIL}\n", "the end of a line"),  # and ends lines where splitlines() does
        (f"# note\revil==6.6 {EVIL}\n", "the end of a line"),
        (f"# note\u2028evil==6.6 {EVIL}\n", "the end of a line"),
        (f"# coding: utf-7\nx==1 {GOOD}\n", "utf-7"),
        (f"x==1 {GOOD} --hash='sha256:{HASHES['b']}'\n", "no other option"),
        (f"x==1 {GOOD} --has=sha256:{HASHES['b']}\n", "no other option"),
        (f"x==1 {GOOD} --hash=sha512:{'0' * 128}\n", "no other option"),
        ("--requirem evil.txt\n", "no other option"),
        ("--requirement evil.txt --pre\n", "no other option"),
        ("-i https://index.example -r evil.txt\n", "no other option"),
    ],
)  # fmt: skip
def test_requirements_are_read_as_pip_reads_them(tmp_path: Path, text: str, says: str) -> None:
    """Or not at all: what pip would install beside what is verified here must not go unseen."""
    [trouble] = troubles_of(tmp_path / "r.txt", text)
    assert says in trouble


WHEEL = f'wheels = [{{ name = "x-1-py3-none-any.whl", hashes = {{ sha256 = "{HASHES["a"]}" }} }}]\n'


def troubles_of(file: Path, text: str) -> list[str]:
    file.write_text(text)
    try:
        return [artifact.trouble for artifact in btlog.artifacts_of(str(file)) if artifact.trouble]
    except Unavailable as error:
        return [str(error)]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("pylock.toml", '[[packages]]\nname = "x"\nsource = { virtual = "." }\nvcs = { type = "git" }\n'),
        ("pylock.toml", f'[[packages]]\nname = "x"\nvcs = {{ type = "git" }}\n{WHEEL}'),
        ("pylock.toml", '[[packages]]\nname = "x"\n' + WHEEL.replace("hashes = {", 'hashes = { sha512 = "b",')),
        ("uv.lock", f'[[packages]]\nname = "x"\n{WHEEL}[[package]]\nname = "y"\n'),
        ("uv.lock", f'[[package]]\nname = "x"\nsource = {{ git = "https://x.example" }}\n{WHEEL}'),
    ],
)
def test_lock_files_that_say_two_things(tmp_path: Path, name: str, text: str) -> None:
    """What one installer goes by must not be what this verifier leaves out."""
    head = {"pylock.toml": 'lock-version = "1.0"\ncreated-by = "x"\n', "uv.lock": "version = 1\n"}[name]
    assert troubles_of(tmp_path / name, head + text)


def test_passwords_in_urls_are_not_shown() -> None:
    for words in ("health", "http://user:s3cret@127.0.0.1:1/"), ("ingest", "--index-url", "http://user:s3cret@127.0.0.1:1/"):
        code, out, error = call_btlog(*words)
        assert (code, "s3cret" in out + error, "user names and passwords" in error) == (2, False, True)


def tiny_wheel(folder: Path, name: str, text: str, version: str = "1.0", *requires: str) -> Path:
    """A wheel of a project with one module."""
    path_, info = folder / f"{name}-{version}-py3-none-any.whl", f"{name}-{version}.dist-info"
    needs = "".join(f"Requires-Dist: {what}\n" for what in requires)
    files = {
        f"{name}.py": f"TEXT = {text!r}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{file},,\n" for file in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(path_, "w") as archive:
        for file, data in files.items():
            archive.writestr(file, data)
    return path_


def simple_pages(files: Path) -> Callable[[str], Answered | None]:
    """What a PEP 503 index of the files in a folder answers; None stands for the files themselves."""

    def answer(path_: str) -> Answered | None:
        if not path_.startswith("/simple/"):
            return None
        project = path_.removeprefix("/simple/").strip("/")
        names = [file.name for file in sorted(files.iterdir()) if btlog.project_of(file.name) == project]
        sums = {name: hashlib.sha256((files / name).read_bytes()).hexdigest() for name in names}
        text = "".join(f'<a href="/{name}#sha256={value}">{name}</a>\n' for name, value in sums.items())
        return 200 if names else 404, "text/html", f"<!DOCTYPE html><html><body>{text}</body></html>".encode()

    return answer


MY_PROJECT = """\
[project]
name = "mine"
version = "0.1"
requires-python = ">=3.11"
dependencies = ["alpha"]
[[tool.uv.index]]
url = "INDEX"
default = true
[[tool.pdm.source]]
name = "pypi"
url = "INDEX"
[[tool.poetry.source]]
name = "here"
url = "INDEX"
"""
MY_PIPFILE = '[[source]]\nname = "here"\nurl = "INDEX"\nverify_ssl = false\n[packages]\nalpha = "*"\n'
# Of each tool: how it's installed, what is run, and how many files of the index stand in what that writes.
LOCKERS: dict[str, tuple[str, str, dict[str, int]]] = {
    "uv": (
        "pip install uv",
        "uv lock -q; uv export -q --frozen --format pylock.toml -o pylock.toml;"
        "uv export -q --frozen --no-emit-project -o requirements.txt;"
        "uv pip compile -q --generate-hashes requirements.in -o compiled.txt;"
        "uv pip compile -q --format pylock.toml requirements.in -o pylock.compiled.toml",
        {"uv.lock": 3, "pylock.toml": 3, "requirements.txt": 3, "compiled.txt": 3, "pylock.compiled.toml": 3},
    ),
    "pip": (
        "pip install 'pip>=25.1'",
        "pip lock -q --index-url INDEX -o pylock.toml alpha;"
        "pip install -q --dry-run --ignore-installed --index-url INDEX --report report.json alpha",
        {"pylock.toml": 2, "report.json": 2},
    ),
    "pip-compile": (
        "uv tool install pip-tools",
        "pip-compile -q --generate-hashes --strip-extras --index-url INDEX -o requirements.txt requirements.in",
        {"requirements.txt": 3},
    ),
    "pdm": (
        "uv tool install pdm --with 'hishel<2'",
        "pdm lock; pdm export -o requirements.txt; pdm export -f pylock -o pylock.toml",
        {"pdm.lock": 3, "requirements.txt": 3, "pylock.toml": 3},
    ),
    "poetry": (
        "uv tool install poetry --with poetry-plugin-export",
        "poetry lock; poetry export -o requirements.txt; poetry export -f pylock.toml -o pylock.toml",
        {"poetry.lock": 3, "requirements.txt": 3, "pylock.toml": 3},
    ),
    "pipenv": (
        "uv tool install pipenv",
        "pipenv lock; pipenv requirements --hash >requirements.txt",
        {"Pipfile.lock": 3, "requirements.txt": 3},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LOCKERS)
def test_verify_what_real_tools_write(tmp_path: Path, log: LocalLog, name: str) -> None:
    """Lock files, requirements and reports of packages of an index of this test: before and after they're logged."""
    install, script, targets = LOCKERS[name]
    path_ = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    assert shutil.which(name, path=path_), f"this test needs {name}, on PATH or beside {sys.executable}: {install}"
    files = make(tmp_path / "files")
    tiny_wheel(files, "alpha", "x", "1.0", "beta-gamma>=1")
    tiny_wheel(files, "beta_gamma", "x", "2.1")
    sdist_of(files / "alpha-1.0.tar.gz", "alpha")
    sums = {hashlib.sha256(file.read_bytes()).hexdigest() for file in files.iterdir()}
    (tmp_path / "public.key").write_text(f"{LOG_VKEY}\n")
    (tmp_path / "requirements.in").write_text("alpha\n")
    environment = {
        "PATH": path_, "HOME": str(tmp_path), "LANG": "C.UTF-8", "PIP_CONFIG_FILE": os.devnull, "PDM_CHECK_UPDATE": "0",
        "PDM_PYTHON": sys.executable,
    }  # fmt: skip
    with contextlib.closing(Web(files)) as web:
        web.instead, index = simple_pages(files), f"{web.url}/simple"
        (tmp_path / "pyproject.toml").write_text(MY_PROJECT.replace("INDEX", index))
        (tmp_path / "Pipfile").write_text(MY_PIPFILE.replace("INDEX", index))
        done = subprocess.run(
            ["sh", "-ec", script.replace("INDEX", index)],
            cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{done.stdout}{done.stderr} (this test needs a new {name}: {install})"
        for target, count in targets.items():
            code, out, err = verify(tmp_path, target, "--log-url", log.url)
            assert (code, out, err.count(": not logged")) == (1, "", count), (target, err)
        done = run_btlog("ingest", "--index-url", index, "--log-url", log.url, "alpha", "Beta.Gamma")
        assert (done.returncode, done.stdout.startswith("2 projects: 3 files logged")) == (0, True), done
    for target, count in targets.items():
        code, out, err = verify(tmp_path, target, "--log-url", log.url)
        assert (code, out.count("logged at index")) == (0, count), (target, out, err)
        assert f"{count} of {count} artifacts" in err
        text = (tmp_path / target).read_text()
        locked = [value for value in sums if value in text]
        assert len(locked) == count
        for value in locked:
            (tmp_path / target).write_text(text.replace(value, "0" * 64))
            code, out, err = verify(tmp_path, target, "--log-url", log.url)
            assert (code, out.count("logged at index")) == (1, count - 1), (target, out, err)
    assert verify(tmp_path, "files", "--log-url", log.url)[0] == 0


@pytest.mark.slow
def test_a_lock_file_of_200_packages_takes_no_time(tmp_path: Path, log: LocalLog) -> None:
    """Two files for each, so that 400 artifacts are looked up and proved."""
    packages, entries = [], []
    for i in range(200):
        names = f"p{i}-1.0-py3-none-any.whl", f"p{i}-1.0.tar.gz"
        sums = [hashlib.sha256(name.encode()).hexdigest() for name in names]
        entries += [Entry(name, f"sha256:{value}").encode() for name, value in zip(names, sums, strict=True)]
        wheel, sdist = (f'{{ name = "{n}", hashes = {{ sha256 = "{s}" }} }}' for n, s in zip(names, sums, strict=True))
        packages.append(f'[[packages]]\nname = "p{i}"\nwheels = [{wheel}]\nsdist = {sdist}\n')
    assert bulk(log.url, b"".join(map(as_line, entries)))[0] == 200
    (tmp_path / "pylock.toml").write_text('lock-version = "1.0"\ncreated-by = "x"\n' + "".join(packages))
    (tmp_path / "public.key").write_text(f"{LOG_VKEY}\n")
    begun = time.monotonic()
    code, out, _ = verify(tmp_path, "pylock.toml", "--log-url", log.url)
    assert (code, out.count("logged at index")) == (0, 400)
    assert time.monotonic() - begun < 3


def test_the_demonstration(tmp_path: Path) -> None:
    done = run_btlog("demo", env={**os.environ, "TMPDIR": str(tmp_path)})
    assert (done.returncode, done.stderr) == (0, "")
    assert "FOUND match: bisect.py" in done.stdout
    assert "the proof does not show this entry at index 0" in done.stdout
    assert list(tmp_path.iterdir()) == []  # and its servers have ended, which it waits for


def test_wrong_use_gets_the_nearest_right_one() -> None:
    for words, hint in [
        (["serv"], "did you mean serve?"),
        (["serve", "--storage-dri", "x"], "did you mean --storage-dir?"),
        (["verify", "--publickey", "x"], "did you mean --public-key?"),
        (["xyzzy"], ""),
    ]:
        done = run_btlog(*words)
        assert (done.returncode, done.stdout, hint in done.stderr) == (2, "", True), done.stderr
        assert ("did you mean" in done.stderr) is bool(hint)


@pytest.mark.slow
def test_metrics_as_prometheus_reads_them(log: LocalLog, witness: LocalWitness) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    add(log.url, entry(1))
    note = log.log.published.note
    assert [cosign(witness, old + note)[0] for old in (b"old 0\n\n", b"old 7\n\n")] == [200, 400]
    families = {
        family.name: family
        for url in (log.url, witness.url)
        for family in text_string_to_metric_families(ask(url, "/metrics")[2].decode())
    }
    assert families["btlog_entries"].type == "counter"
    assert families["btlog_add_seconds"].type == families["btlog_cosign_seconds"].type == "histogram"
    sizes = families["btlog_log_size"].samples
    assert [(sample.labels, sample.value) for sample in sizes] == [({"log": LOG.name}, 1.0)]
    assert {sample.labels["status"]: sample.value for sample in families["btlog_refused"].samples} == {"400": 1.0}


# --- fsck --repair, and what a start finds ------------------------------------------------------------------------------------------------

def dump(folder: Path) -> dict[str, list[Any]]:
    with contextlib.closing(sqlite3.connect(folder / "log.sqlite3")) as db:
        db.text_factory = bytes
        tables = [name for name, in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return {name.decode(): sorted(db.execute(f"SELECT * FROM {name.decode()}")) for name in tables}


@pytest.fixture(scope="module")
def log_of_700(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a log; tests damage copies of it."""
    folder = tmp_path_factory.mktemp("700") / "log"
    with contextlib.closing(found(folder)) as store:
        fill(store, 700)
    return folder


def damaged(log: Path, copy: Path, damage: str) -> str:
    shutil.copytree(log, copy)
    with contextlib.closing(sqlite3.connect(copy / "log.sqlite3")) as db:
        db.executescript(damage)
    return str(copy)


@pytest.mark.parametrize(
    "damage",
    [
        "DELETE FROM tile",
        "UPDATE tile SET data = zeroblob(length(data))",
        "DELETE FROM lookup WHERE key % 3 = 0",
        "INSERT INTO lookup VALUES (7)",
        "INSERT INTO tile VALUES (999, x'00')",
        "DELETE FROM lookup; DELETE FROM tile; INSERT INTO name_filter VALUES (5, x'00')",
        "INSERT INTO bundle SELECT 77, data FROM bundle WHERE n = 0",
        "UPDATE bundle SET data = CAST(data || x'0001ff' AS BLOB) WHERE n = 2",
    ],
)
def test_fsck_repairs_what_can_be_derived(tmp_path: Path, log_of_700: Path, damage: str) -> None:
    folder = damaged(log_of_700, tmp_path / "log", damage)
    assert call_btlog("fsck", "--storage-dir", folder)[0] == 1
    code, out, error = call_btlog("fsck", "--storage-dir", folder, "--repair")
    assert (code, error) == (0, "")
    assert "the entries lead to the signed root of size 700" in out
    assert dump(tmp_path / "log") == dump(log_of_700)
    with contextlib.closing(found(tmp_path / "log")) as store:
        fill(store, 30)
        assert findings(store) == []


@pytest.mark.parametrize(
    ("damage", "code", "says"),
    [
        ("UPDATE bundle SET data = CAST(replace(data, x'706b67', x'706b68') AS BLOB) WHERE n = 1", 1, "the entries do not lead to the signed root"),
        ("DELETE FROM bundle WHERE n = 2", 3, "tile/entries/002 is missing"),
        ("UPDATE bundle SET data = CAST(data AS TEXT) WHERE n = 1", 3, "tile/entries/001 is not a blob"),
        ("UPDATE bundle SET data = CAST(x'ff' || data AS TEXT) WHERE n = 1", 3, "tile/entries/001 is not a blob"),
        ("UPDATE bundle SET data = substr(data, 1, 1000) WHERE n = 0", 3, "tile/entries/000"),
        ("UPDATE checkpoint SET note = x'00' WHERE kind = 'signed'", 3, "a checkpoint can't be derived"),
        ("UPDATE checkpoint SET note = x'00' WHERE kind = 'published'", 3, "a checkpoint can't be derived"),
    ],
)
def test_fsck_refuses_to_repair_what_only_a_backup_has(
    tmp_path: Path, log_of_700: Path, damage: str, code: int, says: str
) -> None:
    folder = damaged(log_of_700, tmp_path / "log", f"{damage}; DELETE FROM tile")
    before = dump(tmp_path / "log")
    got, _, error = call_btlog("fsck", "--storage-dir", folder, "--repair")
    assert (got, says in error) == (code, True), error
    assert dump(tmp_path / "log") == before


def test_a_start_says_what_a_crash_has_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with contextlib.closing(LocalLog(tmp_path / "log")) as log:
        assert add(log.url, entry(1))[0] == 200
        shutil.copytree(tmp_path / "log", tmp_path / "crashed")  # as a kill leaves it
    (tmp_path / "key").write_text(LOG_SKEY)
    (tmp_path / "key").chmod(0o600)
    monkeypatch.setattr(btlog, "run_server", lambda *args, **more: 0)
    start = ("serve", "--storage-dir", str(tmp_path / "crashed"), "--private-key", str(tmp_path / "key"), "--port", "0")
    code, _, error = call_btlog(*start)
    assert code == 0
    assert re.search(r"did not end in good order: took over its journal of [1-9]\d* bytes; signed is size 1, published size 1", error)
    assert call_btlog(*start) == (0, "", "")


def test_the_commands_of_the_readme_for_operators() -> None:
    """Units, compose file and scripts: what they have btlog do is what btlog can be asked to do."""
    units = re.findall(r"^ExecStart=\S+/python \S+/btlog\.py (.*)$", README, re.MULTILINE)
    compose = re.findall(r"^    command: (.*)$", README, re.MULTILINE)
    scripts = re.findall(r"^python btlog\.py (.*?)(?: &| \|\| .*)?$", README, re.MULTILINE)
    assert (len(units), len(compose), len(scripts)) == (5, 3, 25)
    for line in (*units, *compose, *scripts):
        args = btlog.parser().parse_args(shlex.split(line))
        assert callable(args.run)
    [build] = re.findall(r"^docker run .* btlog (serve .*)$", README, re.MULTILINE)
    assert btlog.parser().parse_args(shlex.split(build)).host == "0.0.0.0"


def test_the_workflow_pins_what_it_uses() -> None:
    text = (HERE / ".github" / "workflows" / "ci.yml").read_text()
    used = re.findall(r"uses: (\S+)(.*)", text)
    assert len(used) == 2
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", name) and "# v" in version for name, version in used)
    assert all(f'"3.{minor}"' in text for minor in (11, 12, 13, 14))
    assert "- run: .ci/run\n" in text


# --- Monitors: a log that lies is found out, with evidence ---------------------------------------------------------------

Answered = tuple[int, str, bytes]  # status, content type and body


class Web:
    """A web server over a folder, under a path prefix; a test says what it answers instead, and sees what was asked."""

    def __init__(self, folder: Path, prefix: str = "") -> None:
        self.folder, self.asked = folder, list[str]()
        self.instead: Callable[[str], Answered | None] = lambda path_: None
        self.heads, self.tags = list[tuple[str, dict[str, str]]](), False  # what was asked; if answers have an ETag
        self.serial = ""  # what answers say of the last change
        web = self

        class Handler(http.server.SimpleHTTPRequestHandler):
            protocol_version, disable_nagle_algorithm, timeout = "HTTP/1.1", True, 20

            def log_message(self, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                web.asked.append(self.path)
                web.heads.append((self.path, dict(self.headers)))
                self.directory = str(web.folder)
                inside = self.path.startswith(f"{prefix}/")
                self.path = self.path.removeprefix(prefix)
                answer = web.instead(self.path) if inside else (404, "text/plain", b"")
                if answer is None:
                    super().do_GET()
                else:
                    tag = f'"{hashlib.sha256(answer[2]).hexdigest()[:20]}"'
                    if web.tags and self.headers.get("If-None-Match") == tag:
                        answer = 304, answer[1], b""
                    self.send_response(answer[0])
                    self.send_header("Content-Type", answer[1])
                    self.send_header("Content-Length", str(len(answer[2])))
                    for name, value in ("ETag", web.tags and tag), ("X-PyPI-Last-Serial", web.serial):
                        if value:
                            self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(answer[2])

        class Threads(http.server.ThreadingHTTPServer):
            request_queue_size = 64

            def handle_error(self, request: Any, client_address: Any) -> None:
                """A client that is gone is no error."""

        self._server = Threads(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}{prefix}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def quiet(i: int, tag: str = "") -> bytes:
    """The i-th of endlessly many entries in which there is nothing to find, of ten projects."""
    name = f"quiet{tag}{i % 10}-{i}-py3-none-any.whl"
    return Entry(name, "sha256:" + hashlib.sha256(name.encode()).hexdigest()).encode()


class StaticLog:
    """A log as static files, which the test signs, tampers with, and serves."""

    def __init__(self, folder: Path, *sizes: int, tag: str = "") -> None:
        folder.mkdir(exist_ok=True)
        self.store, self.tree, self._tag = found(folder / "log"), folder / "tree", tag
        self.tree.mkdir(exist_ok=True)
        self.web = Web(self.tree)
        self.notes: dict[int, bytes] = {}
        self.entries: list[bytes] = []
        self.sign: Callable[[Tree], bytes] = seal
        self._right: dict[Path, bytes] = {}
        for size in sizes:
            self.grow_to(size)

    def grow(self, *entries: bytes) -> None:
        indices = list(range(len(self.entries), len(self.entries) + len(entries)))
        assert self.store.append(list(entries), lambda tree: self.sign(tree), True, replace=True) == indices
        self.entries += entries
        self.export()

    def grow_to(self, size: int) -> None:
        self.grow(*(quiet(i, self._tag) for i in range(len(self.entries), size)))

    def export(self) -> None:
        note = self.notes[len(self.entries)] = self.store.checkpoint("published") or b""
        btlog.StaticTree(self.store, self.tree).export(note, lambda done, total: None)

    def put(self, path_: str, data: bytes) -> None:
        """Serves `data` as a file, until the log repents."""
        file = self.tree / path_
        self._right.setdefault(file, file.read_bytes())
        btlog.replace_file(file, data)  # at once: a monitor may be reading

    def spoil(self, path_: str, change: Callable[[bytes], bytes]) -> None:
        self.put(path_, change((self.tree / path_).read_bytes()))

    def repent(self) -> None:
        for file, data in self._right.items():
            btlog.replace_file(file, data)
        self._right.clear()
        self.web.folder = self.tree

    def close(self) -> None:
        self.web.close()
        self.store.close()


@pytest.fixture(scope="session")
def grown(tmp_path_factory: pytest.TempPathFactory) -> StaticLog:
    """A log of 300 entries, with the partial tiles that it had at 200, and a mirror of it; tests have copies of both."""
    folder = tmp_path_factory.mktemp("grown")
    with contextlib.closing(StaticLog(folder / "static", 200, 300)) as log:
        assert monitor(log.web.url, folder / "mirror").code == 0
    return log


@pytest.fixture
def static(tmp_path: Path, grown: StaticLog) -> Iterator[StaticLog]:
    shutil.copytree(grown.tree.parent, tmp_path / "static")
    with contextlib.closing(StaticLog(tmp_path / "static")) as log:
        log.notes, log.entries = dict(grown.notes), list(grown.entries)
        yield log


@pytest.fixture
def mirror(tmp_path: Path, grown: StaticLog) -> Path:
    """A mirror of the 300 entries of `static`, made when all was well."""
    return Path(shutil.copytree(grown.tree.parent.parent / "mirror", tmp_path / "mirror"))


@dataclasses.dataclass
class Seen:
    """How a monitor ended, and what it said: the kinds and texts of findings, and their evidence."""

    code: int
    lines: list[dict[str, Any]]
    error: str

    def _of_findings(self, field: str) -> list[str]:
        return [line[field] for line in self.lines if line["level"] == "ERROR"]

    @property
    def kinds(self) -> list[str]:
        return self._of_findings("kind")

    @property
    def texts(self) -> list[str]:
        return self._of_findings("msg")

    @property
    def evidence(self) -> list[Path]:
        return list(map(Path, self._of_findings("evidence")))


def call_btlog(*args: str) -> tuple[int, str, str]:
    """A command in this process: exit code, stdout, stderr."""
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        code = btlog.main(args)
    return code, out.getvalue(), error.getvalue()


def try_only(monkeypatch: pytest.MonkeyPatch, attempts: int) -> None:
    """Has what is not answered given up sooner."""
    right = btlog.Fetcher.__init__

    def start(self: btlog.Fetcher, url: str, *args: Any, **more: Any) -> None:
        right(self, url, *args, **more)
        self._attempts = attempts

    monkeypatch.setattr(btlog.Fetcher, "__init__", start)


def key_file(folder: Path, vkey: str = LOG_VKEY) -> str:
    path_ = folder / f"{hashlib.sha256(vkey.encode()).hexdigest()[:8]}.key"
    path_.write_text(f"{vkey}\n")
    return str(path_)


def monitor_args(url: str, mirror: Path, *args: str) -> tuple[str, ...]:
    key = ("--public-key", key_file(mirror.parent))
    return ("monitor", "--log-url", url, *key, "--storage-dir", str(mirror), "--json-logging", *args)


def monitor(url: str, mirror: Path, *args: str) -> Seen:
    """One run of a monitor, in this process."""
    code, out, error = call_btlog(*monitor_args(url, mirror, *args))
    return Seen(code, [json.loads(line) for line in out.splitlines()], error)


def proves(folder: Path) -> Any:
    """True if a folder of evidence shows what its name says to somebody who has nothing but public keys."""
    files = {path_.relative_to(folder).as_posix(): path_.read_bytes() for path_ in folder.rglob("*") if path_.is_file()}
    text, said = files.pop("finding.txt").decode(), json.loads(files.pop("finding.json"))
    kind = folder.name[:-17]
    assert (said["level"], said["kind"], said["evidence"], f"{said['msg']}\n") == ("ERROR", kind, str(folder), btlog.printable(text[:-1]) + "\n")
    places = [btlog.parse_tile_path(name) for name in files if name.startswith("tile/")]

    def fetch(level: int | None, index: int, width: int) -> bytes:
        return files[btlog.tile_path(level, index, width)]

    def tree(name: str) -> Tree:
        return open_checkpoint(files[name], UNWITNESSED).tree

    def fails(kind: type[Error], call: Callable[..., Any], *args: Any) -> bool:
        try:
            call(*args)
        except kind:
            return True
        return False

    def read_all() -> None:
        tiles = btlog.AuthenticTiles(tree("checkpoint"), fetch)
        for level, index, _ in places:
            tiles.expanded(level or 0, index)

    proved = {}
    for name in files:
        if name.endswith(".tlog-proof"):
            data = files[name.replace(".tlog-proof", ".entry")]
            check_logged(data, files[name], UNWITNESSED)
            proved[Proof.parse(files[name]).index] = data
    entries = [data for _, data in sorted(proved.items())]
    if kind in ("fork", "rollback"):
        old, new = tree("earlier-checkpoint"), tree("checkpoint")
        small, large = sorted([old, new], key=lambda tree: tree.size)
        if kind == "rollback":
            return new.size < old.size
        forked = old.size == new.size or btlog.AuthenticTiles(large, fetch).hash(0, small.size) != small.root
        return old != new and forked
    if kind == "bad-signature":
        return fails(Error, tree, "checkpoint")
    if kind == "bad-cosignature":
        return tree("checkpoint") and fails(Error, open_checkpoint, files["checkpoint"], POLICY)
    if kind == "stale":
        opened = open_checkpoint(files["checkpoint"], POLICY)
        return fails(BadSignature, btlog.check_age, opened, POLICY, 60, time.time())
    if kind == "extension":
        return open_checkpoint(files["checkpoint"], UNWITNESSED).extensions
    if kind == "bad-tile":
        return fails(BadProof, read_all)
    if kind == "bad-bundle":
        [(_, index, width)] = [place for place in places if place[0] is None]
        data, tiles = fetch(None, index, width), btlog.AuthenticTiles(tree("checkpoint"), fetch)
        if fails(Malformed, btlog.parse_bundle, data, width):
            return True
        leaves = [leaf_hash(entry) for entry in btlog.parse_bundle(data, width)]
        if width < 256:
            return tiles.expanded(0, index)[0] != leaves
        return tiles.hash(256 * index, 256 * index + 256) != btlog.expand_tile(b"".join(leaves))[8][0]
    if kind == "bad-entry":
        return len(entries) == 1 and fails(Malformed, Entry.parse, entries[0])
    if kind == "not-logged":
        return not entries and json.loads(files["index.json"])["filename"]
    first, *others = map(Entry.parse, entries)
    if kind == "replaced":
        return first.filename == others[0].filename and first.checksum != others[0].checksum
    if kind == "publisher":
        same = btlog.project_of(first.filename) == btlog.project_of(others[0].filename)
        return same and first.publisher != others[0].publisher
    if kind == "index-differs":
        index_json = json.loads(files["index.json"])
        return index_json["filename"] == first.filename and index_json["checksum"] != first.checksum
    return kind in ("match", "not-on-index") and not others
Judged = Callable[[Seen], None]


@pytest.fixture(scope="session")
def guilty() -> Judged:
    """Checks that whatever was found has evidence that proves it."""

    def judge(seen: Seen) -> None:
        assert seen.evidence
        for folder in seen.evidence:
            with contextlib.suppress(Error, KeyError):
                if proves(folder):
                    continue
            raise AssertionError(f"{folder} proves nothing")

    return judge


def test_a_monitor_sees_lies_from_the_first_run_on(tmp_path: Path, static: StaticLog, guilty: Judged) -> None:
    """A false tile that nothing else needs is told once, and does not stop it. Evidence that is changed does not hold."""
    static.spoil("tile/0/000", flip(9))
    seen = monitor(static.web.url, tmp_path / "first")
    assert (seen.code, seen.kinds) == (1, ["bad-tile"])
    guilty(seen)
    assert monitor(static.web.url, tmp_path / "first").code == 0
    mirrored(tmp_path / "first", static.entries)
    tile = seen.evidence[0] / "tile/0/000"
    tile.write_bytes(flip(9)(tile.read_bytes()))  # a right one, which accuses nobody
    refuses(AssertionError, guilty, seen)  # type: ignore[arg-type]
    tile.unlink()
    refuses(AssertionError, guilty, seen)  # type: ignore[arg-type]
    static.put("checkpoint", seal(Tree(0, bytes(32))))  # not the root of an empty tree
    seen = monitor(static.web.url, tmp_path / "empty")
    assert (seen.code, seen.kinds) == (1, ["bad-tile"])
    guilty(seen)


def bundled(change: Callable[[list[bytes]], list[bytes]]) -> Callable[[bytes], bytes]:
    return lambda data: btlog.encode_bundle(change(btlog.split_bundle(data)))


def mirrored(mirror: Path, entries: list[bytes]) -> None:
    with contextlib.closing(btlog.LogStore(mirror)) as store:
        holds(store, entries)


def serve_other(size: int, whole: bool = True) -> Callable[[StaticLog], None]:
    """Another history of the log, of `size`: all of it, or with the tiles withheld."""

    def lie(log: StaticLog) -> None:
        with contextlib.closing(StaticLog(log.tree.parent / "other", size, tag="other-")) as other:
            log.put("checkpoint", other.notes[size])
            if whole:
                log.web.folder = other.tree

    return lie


def serve_note(make: Callable[[StaticLog], bytes]) -> Callable[[StaticLog], None]:
    return lambda log: log.put("checkpoint", make(log))


def spoil(path_: str, change: Callable[[bytes], bytes], size: int = 700) -> Callable[[StaticLog], None]:
    """The log grows, with a file that is not as it should be."""

    def lie(log: StaticLog) -> None:
        log.grow_to(size)
        log.spoil(path_, change)

    return lie


def signed_text(change: Callable[[str], str], signer: btlog.Signer = SIGNER) -> Callable[[StaticLog], bytes]:
    def make(log: StaticLog) -> bytes:
        text = change(btlog.split_note(log.notes[300])[0])
        return note_of(text, signature_line(signer, text))

    return make


LIES: dict[str, tuple[str, Callable[[StaticLog], None]]] = {
    "fork, same size": ("fork", serve_other(300)),
    "fork, same size, without tiles": ("fork", serve_other(300, False)),
    "fork, later size": ("fork", serve_other(700)),
    "fork, smaller size": ("fork", serve_other(200)),
    "fork, smaller size, without tiles": ("fork", serve_other(200, False)),
    "fork, size zero": ("fork", serve_note(lambda log: seal(Tree(0, bytes(32))))),
    "rollback": ("rollback", serve_note(lambda log: log.notes[200])),
    "rollback to nothing": ("rollback", serve_note(lambda log: seal(Tree(0, btlog.EMPTY_ROOT)))),
    "no signature": ("bad-signature", serve_note(lambda log: btlog.split_note(log.notes[300])[0].encode() + b"\n")),
    "false signature": ("bad-signature", serve_note(lambda log: log.notes[300].replace(b"\n300\n", b"\n301\n"))),
    "signed by another": ("bad-signature", serve_note(signed_text(str, btlog.Signer(LOG.name, bytes(32))))),
    "T57 of another origin": ("bad-signature", serve_note(signed_text(lambda text: text.replace("vectors", "other")))),
    "empty": ("bad-signature", serve_note(lambda log: b"")),
    "a web page": ("bad-signature", serve_note(lambda log: b"<!doctype html>\n\n<p>\xff")),
    "T37 extension": ("extension", serve_note(signed_text(lambda text: f"{text}more \x85 of it\n"))),
    "full tile, too short": ("bad-tile", spoil("tile/0/001", lambda data: data[:-32])),
    "full tile, too long": ("bad-tile", spoil("tile/0/001", lambda data: data + data[:32])),
    "partial tile, empty": ("bad-tile", spoil("tile/1/000.p/2", lambda data: b"")),
    "T60 other checksum": ("bad-bundle", spoil("tile/entries/001", bundled(lambda e: [*e[:99], other_sum(e[99]), *e[100:]]))),
    "two entries swapped": ("bad-bundle", spoil("tile/entries/002.p/188", bundled(lambda e: [e[1], e[0], *e[2:]]))),
    "bundle of another form": ("bad-bundle", spoil("tile/entries/001", lambda data: data[:-1])),
    "partial bundle of another form": ("bad-bundle", spoil("tile/entries/002.p/188", lambda data: data + b"\0")),
    "one entry less": ("bad-bundle", spoil("tile/entries/001", bundled(lambda e: e[:-1]))),
    "one entry more": ("bad-bundle", spoil("tile/entries/002.p/188", bundled(lambda e: [*e, b"more"]))),
    "no entry": ("bad-bundle", spoil("tile/entries/001", lambda data: b"")),
    "what is mirrored already": ("bad-bundle", spoil("tile/entries/001", bundled(lambda e: [*e[:3], b"x", *e[4:]]))),
}  # fmt: skip


def told_while_it_holds(
    static: StaticLog, mirror: Path, guilty: Judged, kind: str, lie: Callable[[StaticLog], None]
) -> None:
    """One lie, one finding, with evidence for everybody; and once the log repents, it is followed on."""
    lie(static)
    for _ in range(2):
        seen = monitor(static.web.url, mirror)
        assert (seen.code, seen.kinds, seen.error) == (1, [kind], ""), seen
    guilty(seen)
    static.repent()
    seen = monitor(static.web.url, mirror)
    assert (seen.code, seen.kinds, seen.error) == (0, [], "")
    mirrored(mirror, static.entries)


@pytest.mark.parametrize("name", LIES)
def test_a_monitor_sees(mirror: Path, static: StaticLog, guilty: Judged, name: str) -> None:
    """T57, T60: lies about what it has followed."""
    told_while_it_holds(static, mirror, guilty, *LIES[name])


def test_T52_a_full_tile_above(tmp_path: Path, guilty: Judged, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hashes of 256 full tiles are in one that is full itself, and that is authenticated by those above it."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    with contextlib.closing(StaticLog(tmp_path / "static")) as log:
        append_anyway(log.store, [quiet(0)] * 66_000)
        log.export()
        for path_ in "tile/1/000", "tile/2/000.p/1":
            log.spoil(path_, flip(17))
            seen = monitor(log.web.url, tmp_path / "mirror")
            assert (seen.code, seen.kinds) == (1, ["bad-tile"])
            assert seen.evidence[0].joinpath(path_).read_bytes() == (log.tree / path_).read_bytes()
            guilty(seen)
            log.repent()
        assert monitor(log.web.url, tmp_path / "mirror").code == 0


COSIGNED_NOW = 1_700_000_000


def cosigned_by(signer: btlog.Signer, seconds: int, spoil: Callable[[bytes], bytes] = bytes) -> Callable[[Tree], bytes]:
    def sign(tree: Tree) -> bytes:
        note = seal(tree)
        line = signature_line(signer, btlog.split_note(note)[0], seconds)
        dash, name, value = line.split()
        return note + f"{dash} {name} {b64(spoil(base64.b64decode(value)))}\n".encode()

    return sign


@pytest.mark.parametrize(
    ("kind", "sign"),
    [
        ("bad-cosignature", seal),
        ("bad-cosignature", cosigned_by(new_key("w.example"), COSIGNED_NOW)),
        ("bad-cosignature", cosigned_by(COSIGNER, COSIGNED_NOW, flip(-1))),
        ("bad-cosignature", cosigned_by(COSIGNER, COSIGNED_NOW, flip(11))),
        ("stale", cosigned_by(COSIGNER, COSIGNED_NOW - 61)),
        ("stale", cosigned_by(COSIGNER, COSIGNED_NOW + btlog.MAX_SKEW + 1)),
    ],
    ids=["missing", "of another", "false", "of another time", "old", "ahead"],
)
def test_a_monitor_sees_cosignatures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, guilty: Judged, kind: str, sign: Callable[[Tree], bytes]
) -> None:
    monkeypatch.setattr(time, "time", lambda: float(COSIGNED_NOW))
    honest = cosigned_by(COSIGNER, COSIGNED_NOW - 59)
    with contextlib.closing(StaticLog(tmp_path / "static")) as log:

        def round_(size: int, sign: Callable[[Tree], bytes]) -> Seen:
            log.sign = sign
            log.grow_to(size)
            witness = ("--witness-public-key", key_file(tmp_path, WITNESS_VKEY), "--max-age", "60")
            return monitor(log.web.url, tmp_path / "mirror", *witness)

        assert round_(5, honest).code == 0
        seen = round_(9, sign)
        assert (seen.code, seen.kinds) == (1, [kind])
        guilty(seen)
        seen = round_(12, honest)
        assert (seen.code, seen.lines[0]["new"]) == (0, 7 if kind == "bad-cosignature" else 3)
        log.put("checkpoint", cosigned_by(COSIGNER, COSIGNED_NOW)(log.store.tree("signed")))  # cosigned anew
        assert round_(12, honest).code == 0
        with contextlib.closing(btlog.LogStore(tmp_path / "mirror", read_only=True)) as store:
            assert store.checkpoint("published") == (log.tree / "checkpoint").read_bytes()


def named_entry(filename: str, text: str = "", publisher: Publisher | None = None) -> bytes:
    return Entry(filename, "sha256:" + hashlib.sha256(text.encode()).hexdigest(), publisher).encode()


ANOTHER = Publisher("https://issuer.example", "https://example.com/other")


BAD_ENTRIES = [
    b"garbage", b"", bytes(65_535), named_entry("a-1.whl") + b"\n",
    *(named_entry("a-1.whl").replace(b"a-1", name) for name in (b"a/1", b"\xff-1", b"\x1b[2J-1", b"a" * 256)),
]  # fmt: skip


def test_T59_a_monitor_sees_what_is_wrong_with_entries(mirror: Path, static: StaticLog, guilty: Judged) -> None:
    """Each is reported once, exit code 1, under proofs; and the rest is processed."""
    static.grow(
        *BAD_ENTRIES, named_entry("a-1.whl", "a"), named_entry("a-1.whl", "b"), other_sum(quiet(7)),
        named_entry("b-1.whl", "", PUBLISHER), named_entry("b-2.whl", "", ANOTHER),
        named_entry("A_c-1.whl", "", PUBLISHER), named_entry("a.c-2.tar.gz"), *(quiet(i) for i in range(2000, 2300)),
    )  # fmt: skip
    seen = monitor(static.web.url, mirror)
    assert (seen.code, seen.error) == (1, "")
    proved = [sorted(int(p.stem) for p in folder.glob("*.tlog-proof")) for folder in seen.evidence]
    assert sorted(zip(seen.kinds, proved, strict=True)) == [
        *(("bad-entry", [300 + i]) for i in range(8)), ("publisher", [311, 312]), ("publisher", [313, 314]),
        ("replaced", [7, 310]), ("replaced", [308, 309]),
    ]  # fmt: skip
    guilty(seen)
    assert all(text.isprintable() for text in seen.texts)  # T65
    assert monitor(static.web.url, mirror).code == 0
    mirrored(mirror, static.entries)


def test_a_monitor_remembers_entries(mirror: Path, static: StaticLog, guilty: Judged) -> None:
    """What was logged before is held against what comes in later runs, however it is spelt, and not twice."""
    for new, kinds in [
        ([named_entry("A_b-1.whl", "", PUBLISHER)], []),
        ([named_entry("a.B-2.whl", "", PUBLISHER), named_entry("quiet1-1.0.zip")], []),
        ([named_entry("A_b-1.whl", "other", PUBLISHER)], ["replaced"]),
        ([named_entry("a-b-3.zip", "", PUBLISHER)], []),
        ([named_entry("a-b-4.zip", "", ANOTHER)], ["publisher"]),
        ([named_entry("a-b-5.zip", "", ANOTHER), named_entry("a-b-6.zip", "", PUBLISHER)], []),
    ]:
        static.grow(*new)
        seen = monitor(static.web.url, mirror)
        assert (seen.code, seen.kinds) == (len(kinds), kinds)
        if kinds:
            guilty(seen)


def test_a_log_of_a_thousand_findings(
    mirror: Path, static: StaticLog, guilty: Judged, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hostile log does not fill the disk with evidence: beyond a number, findings of a kind are counted."""
    monkeypatch.setattr(btlog, "MAX_FINDINGS", 3)
    static.grow(*(b"no entry %d" % i for i in range(10)))
    seen = monitor(static.web.url, mirror)
    assert (seen.code, seen.kinds) == (1, ["bad-entry"] * 4)
    assert "and 6 more like it" in seen.texts[-1]
    guilty(seen)
    monkeypatch.setattr(btlog, "MAX_BAD_TILES", 2)
    static.grow_to(1300)
    for index in 2, 3, 4:
        static.spoil(f"tile/0/{index:03d}", flip(3))
    seen = monitor(static.web.url, mirror)
    assert (seen.code, seen.kinds) == (1, ["bad-tile"] * 2)
    guilty(seen)


# --- Monitors: an index beside the log --------------------------------------------------------------------------------------


class FakeIndex(Web):
    """A package index, by PEP 691 or PEP 503, of files with their checksums (or links, as a page has them)."""

    def __init__(self, folder: Path, files: dict[str, str], html: bool = False) -> None:
        super().__init__(folder, "/simple")
        self.files, self.html, self.instead = files, html, self.page
        self.serials, self.provenance = dict[str, int](), dict[str, str]()  # of projects; of files, as URLs

    def page(self, path_: str) -> Answered | None:
        projects: dict[str, list[str]] = {}
        for name in self.files:
            projects.setdefault(btlog.project_of(name), []).append(name)
        project = path_.strip("/")
        if project and project not in projects:
            return 404, "text/plain", b"no such project"
        if self.html:
            links = [(f"/simple/{name}/", name) for name in projects] if not project else [
                (f"../../files/{name}{self.files[name]}", name) for name in projects[project]
            ]  # fmt: skip
            text = "".join(f'<a data-x="1" href="{href}">{name}</a><br>\n' for href, name in links)
            return 200, "text/html; charset=utf-8", f"<!DOCTYPE html><title>x</title>{text}".encode()
        known = [{"name": name, **({"_last-serial": self.serials[name]} if self.serials else {})} for name in projects]
        value: dict[str, Any] = {"meta": {"api-version": "1.0"}, "projects": known}
        if project:
            hashes = {name: {"sha256": self.files[name].removeprefix("sha256:")} for name in projects[project]}
            files = [{"filename": n, "url": f"/files/{n}", "hashes": h, "provenance": self.provenance.get(n)} for n, h in hashes.items()]
            value = {"meta": value["meta"], "name": project, "files": files}
        return 200, "application/vnd.pypi.simple.v1+json", json.dumps(value).encode()


def index_of(entries: list[bytes]) -> dict[str, str]:
    return {parsed.filename: parsed.checksum for parsed in map(Entry.parse, entries)}


NEW = Entry.parse(named_entry("quiet3-9999-py3-none-any.whl"))
OF_7 = Entry.parse(quiet(7))


@pytest.mark.parametrize(
    ("kind", "change", "lasts"),
    [
        ("index-differs", {OF_7.filename: "sha256:" + SUM_OF_A}, True),
        ("not-on-index", {OF_7.filename: None}, False),
        ("not-logged", {NEW.filename: NEW.checksum}, True),
    ],
)
def test_a_monitor_compares_with_an_index(
    tmp_path: Path, static: StaticLog, guilty: Judged, kind: str, change: dict[str, str | None], lasts: bool
) -> None:
    """What is about an entry is told once; what is wrong on the index, for as long as it is."""
    with contextlib.closing(FakeIndex(tmp_path, index_of(static.entries))) as index:

        def compare(name: str) -> Seen:
            return monitor(static.web.url, tmp_path / name, "--index-url", f"{index.url}/")

        assert compare("good").code == 0
        right = index.files
        index.files = {name: sum_ for name, sum_ in {**right, **change}.items() if sum_}
        seen = compare("new")
        assert (seen.code, seen.kinds) == (1, [kind])
        guilty(seen)
        assert [compare(name).kinds for name in ("new", "good")] == [[kind] if lasts else []] * 2
        index.files = right
        assert [compare(name).code for name in ("new", "good")] == [0, 0]


def test_a_log_of_garbage_takes_no_time_to_follow(mirror: Path, static: StaticLog) -> None:
    """Entries without a name have the same one, and each is compared with none of them more than once."""
    append_anyway(static.store, [b"garbage %d" % i for i in range(40_000)])
    static.export()
    begun = time.process_time()
    seen = monitor(static.web.url, mirror)
    assert time.process_time() - begun < 10
    assert (seen.code, set(seen.kinds)) == (1, {"bad-entry"})
    assert len(seen.kinds) == 202  # of two batches, each with its summary
    assert sum("more like it" in text for text in seen.texts) == 2
    assert monitor(static.web.url, mirror).code == 0


@pytest.mark.slow
def test_one_name_over_and_over_takes_no_time(tmp_path: Path) -> None:
    """As often as a name can be logged, and then in every line of a bulk."""
    many = [Entry("same-1.0-py3-none-any.whl", SUM, Publisher("https://i.example", str(i))).encode() for i in range(1000)]
    with contextlib.closing(found(tmp_path)) as store:
        assert store.append(many, seal, True) == list(range(1000))
        begun = time.process_time()
        assert store.append(many * 30, seal, True) == list(range(1000)) * 30
        assert time.process_time() - begun < 8


def test_what_was_logged_meanwhile_is_not_missing(mirror: Path, static: StaticLog) -> None:
    """An index that tells its log first is not accused by a monitor that has read the log before."""
    late = named_entry("late-1.0-py3-none-any.whl")
    static.grow(named_entry("late-0.9-py3-none-any.whl"))
    with contextlib.closing(FakeIndex(mirror.parent, index_of([*static.entries, late]))) as index:

        def instead(path_: str) -> Answered | None:
            if "late" in path_ and len(static.entries) == 301:
                static.grow(late)  # between the monitor's look at the log and that at the index
            return index.page(path_)

        index.instead = instead
        seen = monitor(static.web.url, mirror, "--index-url", index.url)
    assert (seen.code, seen.kinds, len(static.entries)) == (0, [], 302), seen


@pytest.mark.parametrize(
    ("page", "kind"),
    [
        ('<a href="/files/NAME">NAME</a>', "index-differs"),  # no checksum: pip installs it all the same
        ('<a href="/files/NAME#sha512=00">NAME</a>', "index-differs"),
        ('<a href="/files/NAME#sha256=EVIL">NAME</a><a href="/files/NAME#sha256=GOOD">NAME</a>', "index-differs"),
        ('<a href="/files/quiet7-9-py3-none-any.whl#sha256=EVIL">NAME</a><a href="/NAME#sha256=GOOD">x</a>', "not-logged"),
    ],
)
def test_an_index_that_is_broken_into(mirror: Path, static: StaticLog, page: str, kind: str) -> None:
    """What an installer would take from a page is what is compared, whatever else the page shows."""
    mine, *others = [e for e in map(Entry.parse, static.entries) if e.filename.startswith("quiet7-")]
    text = page.replace("NAME", mine.filename).replace("GOOD", mine.checksum[7:]).replace("EVIL", "0" * 64)
    text += "".join(f'<a href="/{e.filename}#{e.checksum.replace(":", "=")}">x</a>' for e in others)
    with contextlib.closing(FakeIndex(mirror.parent, index_of(static.entries))) as index:
        index.instead = lambda path_: (200, "text/html", text.encode()) if "quiet7" in path_ else index.page(path_)
        seen = monitor(static.web.url, mirror, "--index-url", index.url)
    assert (seen.code, seen.kinds) == (1, [kind])


def test_old_names_are_found_on_an_index(mirror: Path, static: StaticLog) -> None:
    """Of which it can't be told where the project ends and the version begins."""
    old = [named_entry(f"demo-{rest}") for rest in ("1.0.win32-py2.7.exe", "1.0-beta1.tar.gz", "1.0.linux-x86_64.tar.gz")]
    static.grow(*old)
    listed = [Entry.parse(data) for data in old]
    files = [{"filename": e.filename, "url": e.filename, "hashes": {"sha256": e.checksum[7:]}} for e in listed]
    pages = {"/demo/": (200, "application/json", json.dumps({"files": files}).encode())}
    with contextlib.closing(FakeIndex(mirror.parent, index_of(static.entries[:300]))) as index:
        index.instead = lambda path_: pages.get(path_) or index.page(path_)
        assert monitor(static.web.url, mirror, "--index-url", index.url).code == 0


def test_an_index_of_a_thousand_findings(mirror: Path, static: StaticLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(btlog, "MAX_FINDINGS", 3)
    files = {**index_of(static.entries), **{f"quiet7-x{i}-py3-none-any.whl": "sha256:" + SUM_OF_A for i in range(10)}}
    with contextlib.closing(FakeIndex(mirror.parent, files)) as index:
        index.instead = lambda path_: (402, "text/plain", b"") if "quiet0" in path_ else index.page(path_)
        seen = monitor(static.web.url, mirror, "--index-url", index.url)
    assert (seen.code, seen.kinds) == (1, ["not-logged"] * 4)
    assert "7 in all that are not told one by one" in seen.texts[-1]
    assert "answers 402" in seen.error  # one page that can't be read hides none of it


@pytest.mark.parametrize(("size", "later"), [(310, []), (400, [320])], ids=["smaller", "larger"])
def test_a_fork_whose_tiles_were_withheld_is_remembered(
    mirror: Path, static: StaticLog, guilty: Judged, size: int, later: list[int]
) -> None:
    """A signed checkpoint is evidence, also alone, once the log is as large; until then there is nothing to be told."""
    with contextlib.closing(StaticLog(mirror.parent / "other", size, tag="other")) as other:
        note = other.notes[size]
    static.web.instead = lambda path_: (200, "text/plain", note) if path_ == "/checkpoint" else (404, "text/plain", b"")
    assert monitor(static.web.url, mirror).code == 3
    static.web.instead = lambda path_: None
    for smaller in later:
        static.grow_to(smaller)
        assert monitor(static.web.url, mirror).code == 0
    static.grow_to(size + 10)
    seen = monitor(static.web.url, mirror)
    assert (seen.code, seen.kinds) == (1, ["fork"])
    guilty(seen)


def test_what_an_index_did_not_answer_stays_due(
    tmp_path: Path, static: StaticLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At no moment is more taken for compared than was, so that a kill loses nothing."""
    try_only(monkeypatch, 1)
    monkeypatch.setattr(btlog.Comparison, "CHUNK", 100)
    sizes: list[int] = []
    compared = btlog.MirrorStore.compared

    def counted(self: btlog.MirrorStore, size: int, *args: Any) -> None:
        sizes.append(size)
        compared(self, size, *args)

    monkeypatch.setattr(btlog.MirrorStore, "compared", counted)
    static.grow(named_entry("demo-1.0-beta1.tar.gz"))
    with contextlib.closing(FakeIndex(tmp_path, index_of(static.entries[:-1]))) as index:
        args = (static.web.url, tmp_path / "mirror", "--index-url", index.url)
        down = ["quiet0", "/demo/"]  # the second one is asked for a file that is not of its project
        index.instead = lambda path_: (500, "text/plain", b"") if any(d in path_ for d in down) else index.page(path_)
        seen = monitor(*args)
        assert (seen.code, seen.kinds, set(sizes)) == (3, [], {0})
        down.clear()
        seen = monitor(*args)
        assert (seen.code, seen.kinds, max(sizes)) == (1, ["not-on-index"], 301)


def test_large_entries_are_stored_in_small_batches(
    tmp_path: Path, static: StaticLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(btlog, "MAX_STORED_AT_ONCE", 30_000)  # about a bundle
    batches: list[int] = []
    follow = btlog.MirrorStore.follow

    def counted(self: btlog.MirrorStore, entries: list[bytes], *args: Any) -> None:
        batches.append(len(entries))
        follow(self, entries, *args)

    monkeypatch.setattr(btlog.MirrorStore, "follow", counted)
    static.grow_to(1200)
    assert monitor(static.web.url, tmp_path / "mirror").code == 0
    assert (sum(batches), max(batches) <= 512) == (1200, True)
    mirrored(tmp_path / "mirror", static.entries)


def test_a_refused_batch_leaves_no_trace(tmp_path: Path, static: StaticLog) -> None:
    """The projects of a batch that was refused are stored with the one that is accepted."""
    with contextlib.closing(btlog.MirrorStore(make(tmp_path / "mirror"))) as store:
        store.create_log(LOG, None)
        target = (static.store.tree("signed"), static.notes[300])

        def refuse(tree: Tree, grown: Any) -> list[btlog.Finding]:
            raise BadProof("no")

        refuses(BadProof, store.follow, static.entries, target, refuse, ())
        store.follow(static.entries, target, lambda tree, grown: [], ())
        assert len(store.query("SELECT name FROM project")) == 10


def test_names_that_the_locale_has_not(mirror: Path, static: StaticLog) -> None:
    static.grow(named_entry("snowman-\u2603-1.0.tar.gz"))
    args = monitor_args(static.web.url, mirror, "--filename-regex", "snowman")
    with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), encoding="ascii")) as out:
        assert btlog.main([word for word in args if word != "--json-logging"]) == 1
        out.flush()
        assert b"snowman-\\u2603-1.0.tar.gz" in out.buffer.getvalue()


def test_half_a_log_is_not_compared(tmp_path: Path, static: StaticLog, monkeypatch: pytest.MonkeyPatch) -> None:
    """While entries are missing here, it would look as if the index had files that are not logged."""
    monkeypatch.setattr(btlog.Monitor, "BATCH", 256)
    try_only(monkeypatch, 1)
    static.grow_to(700)
    with contextlib.closing(FakeIndex(tmp_path, index_of(static.entries))) as index:
        args = (static.web.url, tmp_path / "mirror", "--index-url", index.url)
        static.web.instead = lambda path_: (402, "text/plain", b"") if path_.startswith("/tile/entries/002") else None
        seen = monitor(*args)
        assert (seen.code, seen.kinds, "answers 402" in seen.error) == (3, [], True)
        static.spoil("tile/entries/002.p/188", flip(-1))
        static.web.instead = lambda path_: None
        assert monitor(*args).kinds == ["bad-bundle"]
        static.repent()
        assert monitor(*args).code == 0
        static.web.close()  # as well as when the log is away: files may have been logged since
        index.files = {**index.files, NEW.filename: NEW.checksum}
        seen = monitor(*args)
        assert (seen.code, seen.kinds) == (3, [])


def test_an_index_that_is_away(mirror: Path, static: StaticLog, monkeypatch: pytest.MonkeyPatch) -> None:
    try_only(monkeypatch, 1)
    with contextlib.closing(FakeIndex(mirror.parent, {})) as index:
        args = (static.web.url, mirror, "--index-url", index.url)
        json_page = "application/json"
        for answer in (500, "text/plain", b""), (200, json_page, b"["), (200, json_page, b"[]"), (200, "text/html", b"\xff"):
            index.instead = lambda path_, answer=answer: answer  # type: ignore[misc]
            seen = monitor(*args)
            assert (seen.code, seen.kinds) == (3, [])
        index.instead, index.files = index.page, index_of(static.entries)
        assert monitor(*args).code == 0  # nothing was skipped, and nothing made up


# --- Monitors: what they keep ------------------------------------------------------------------------------------------------


def change_mirror(mirror: Path, sql: str, *values: Any) -> int:
    """Changes what a mirror has stored, as a failing disk might; how many rows."""
    with contextlib.closing(sqlite3.connect(mirror / "log.sqlite3")) as db, db:
        return db.execute(sql, values).rowcount


def damages(mirror: Path) -> Iterator[tuple[str, Callable[[Path], Any]]]:
    """Ways in which a mirror of 300 entries can be damaged, so that it can't be gone on from."""
    size = (mirror / "log.sqlite3").stat().st_size
    files: dict[str, Callable[[bytes], bytes]] = {
        "NULs": lambda data: bytes(size),
        "half of it": lambda data: data[: size // 2],
        "half of it, and NULs": lambda data: data[: size // 2] + bytes(size - size // 2),
        "nothing of it": lambda data: b"",
        "a page": lambda data: data[:4096],
        "its beginning lost": lambda data: bytes(4096) + data[4096:],
    }
    for name, change in files.items():
        yield name, lambda copy, change=change: (copy / "log.sqlite3").write_bytes(  # type: ignore[misc]
            change((copy / "log.sqlite3").read_bytes())
        )
    for name, sql in {
        "a checkpoint of NULs": "UPDATE checkpoint SET note = zeroblob(99)",
        "half a checkpoint": "UPDATE checkpoint SET note = substr(note, 1, 90)",
        "no checkpoint": "UPDATE checkpoint SET note = x''",
        "an edge of NULs": "UPDATE tile SET data = zeroblob(1408) WHERE key = 1",
        "half an edge": "UPDATE tile SET data = substr(data, 1, 640) WHERE key = 1",
        "an upper edge": "UPDATE tile SET data = zeroblob(32) WHERE key = 1 << 56",
        "no tiles": "DELETE FROM tile",
        "a bundle of NULs": "UPDATE bundle SET data = zeroblob(length(data)) WHERE n = 1",
        "half a bundle": "UPDATE bundle SET data = substr(data, 1, 1000) WHERE n = 1",
        "no bundles": "DELETE FROM bundle",
        "look-up keys": "DELETE FROM lookup WHERE key = (SELECT max(key) FROM lookup)",
    }.items():
        yield name, lambda copy, sql=sql: change_mirror(copy, sql)  # type: ignore[misc]


def accuses_nobody(url: str, mirror: Path) -> None:
    seen = monitor(url, mirror)
    assert (seen.code, seen.lines) == (3, [])
    assert "local state is corrupt" in seen.error
    assert not (mirror / "evidence").exists()


def test_T1_a_damaged_mirror_accuses_nobody(tmp_path: Path, mirror: Path, static: StaticLog) -> None:
    """Zeroed or truncated state: "local state is corrupt", exit 3, and no finding."""
    static.grow_to(700)
    ways = list(damages(mirror))
    assert len(ways) == 17
    for name, damage in ways:
        copy = tmp_path / name
        shutil.copytree(mirror, copy)
        assert damage(copy) != 0 or name == "nothing of it"
        accuses_nobody(static.web.url, copy)
    # The log goes back, and our own tiles, which should tell whether it forked, are damaged.
    static.put("checkpoint", static.notes[200])
    assert change_mirror(mirror, "UPDATE tile SET data = zeroblob(8192) WHERE key = 0") == 1
    accuses_nobody(static.web.url, mirror)


def interrupted(static: StaticLog, mirror: Path, monkeypatch: pytest.MonkeyPatch, *sizes: int) -> None:
    """A first run towards the last size that came to 512 entries, and no further."""
    monkeypatch.setattr(btlog.Monitor, "BATCH", 256)
    try_only(monkeypatch, 1)
    for size in sizes:
        static.grow_to(size)
    static.web.instead = lambda path_: (503, "text/plain", b"") if path_.startswith("/tile/entries/002") else None
    seen = monitor(static.web.url, mirror)
    assert (seen.code, seen.kinds) == (3, [])
    static.web.instead = lambda path_: None
    with contextlib.closing(btlog.LogStore(mirror, read_only=True)) as store:
        assert (store.stored().size, store.checkpoint("signed")) == (512, None)


def test_an_interrupted_first_run_goes_on(tmp_path: Path, static: StaticLog, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is here already is not fetched again; nor served or verified from before all of it leads to a signed root."""
    mirror = tmp_path / "mirror"
    where = ("--storage-dir", str(mirror))
    interrupted(static, mirror, monkeypatch, 700)
    assert call_btlog("fsck", *where)[0] == 0
    (tmp_path / "log.skey").write_text(LOG_SKEY)
    (tmp_path / "log.skey").chmod(0o600)
    for args, says in [
        (("serve", "--read-only", "--port", "0"), "the mirror of a part of its log"),
        # Its next checkpoint would be a fork.
        (("serve", "--port", "0", "--private-key", str(tmp_path / "log.skey")), "the mirror of a part of its log"),
        (("verify", str(wheel(tmp_path / "a-1.whl")), "--public-key", key_file(tmp_path)), ""),
        (("export", str(tmp_path / "out")), "no published checkpoint yet"),
    ]:
        code, _, error = call_btlog(*args, *where)
        assert (code, says in error) == (3, True)
    static.web.asked.clear()
    static.grow_to(900)
    assert monitor(static.web.url, mirror).code == 0
    assert sorted(p for p in static.web.asked if "entries" in p) == ["/tile/entries/002", "/tile/entries/003.p/132"]
    mirrored(mirror, static.entries)


@pytest.mark.parametrize(
    ("kind", "lie"),
    [
        ("rollback", serve_note(lambda log: log.notes[300])),
        ("rollback", serve_note(lambda log: log.notes[600])),
        ("fork", serve_other(700, False)),
        ("fork", serve_other(900)),
        ("fork", serve_other(400, False)),
        ("fork", serve_other(600, False)),
        ("rollback", serve_other(600)),  # and the tiles that would show that it is a fork are withheld
    ],
)
def test_lies_to_an_interrupted_first_run(
    tmp_path: Path, static: StaticLog, guilty: Judged, monkeypatch: pytest.MonkeyPatch, kind: str,
    lie: Callable[[StaticLog], None],
) -> None:  # fmt: skip
    interrupted(static, tmp_path / "mirror", monkeypatch, 600, 700)
    told_while_it_holds(static, tmp_path / "mirror", guilty, kind, lie)


def test_T1_a_damaged_part_of_a_mirror(tmp_path: Path, static: StaticLog, monkeypatch: pytest.MonkeyPatch) -> None:
    """No checkpoint was signed for what is here of an interrupted first run: it is the log that shows it damaged."""
    interrupted(static, tmp_path / "mirror", monkeypatch, 700)
    for n, sql in enumerate([
        "UPDATE tile SET data = zeroblob(64) WHERE key = 1 << 56",
        "UPDATE tile SET data = x'00' || substr(data, 2) WHERE key = 1 << 56",
        "UPDATE setting SET value = 511 WHERE name = 'stored'",
        "UPDATE checkpoint SET note = zeroblob(90)",
    ]):  # fmt: skip
        copy = tmp_path / f"{n}"
        shutil.copytree(tmp_path / "mirror", copy)
        assert change_mirror(copy, sql) == 1
        accuses_nobody(static.web.url, copy)


def test_T22_a_partial_tile_that_is_gone(tmp_path: Path, static: StaticLog) -> None:
    """The full tile is taken in its place, and of that only what the checkpoint covers."""
    static.grow_to(600)
    for partial in "tile/0/001.p", "tile/entries/001.p":
        shutil.rmtree(static.tree / partial)
    (static.tree / "tile/1/000.p/1").unlink()
    static.put("tile/1/000.p/2", b"")
    (static.tree / "tile/1/000").write_bytes(static.store.tile(1, 0, 2) * 128)  # whatever is behind it
    static.spoil("tile/0/001", lambda data: data[: 32 * 44] + bytes(8192 - 32 * 44))
    static.spoil("tile/entries/001", bundled(lambda entries: [*entries[:44], *(b"x%d" % i for i in range(212))]))
    static.put("checkpoint", static.notes[300])
    seen = monitor(static.web.url, tmp_path / "mirror")
    assert (seen.code, seen.kinds, seen.error) == (0, [], "")
    mirrored(tmp_path / "mirror", static.entries[:300])
    static.spoil("tile/entries/001", bundled(lambda entries: entries[:255]))  # not a full one
    assert monitor(static.web.url, tmp_path / "other").kinds == ["bad-bundle"]
    static.spoil("tile/0/001", lambda data: data[: 32 * 40])
    assert monitor(static.web.url, tmp_path / "third").kinds == ["bad-tile"]




def test_T24_from_every_size_to_every_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    small, edges = list(range(10)), [255, 256, 257, 511, 512, 513]
    with contextlib.closing(StaticLog(tmp_path / "static", *small[1:], *edges)) as log:
        policy, watch, source = btlog.simple_policy([LOG]), btlog.WatchList(), btlog.LogReader(log.web.url)

        def follow(mirror: Path, size: int) -> None:
            note = seal(Tree(0, btlog.EMPTY_ROOT)) if size == 0 else log.notes[size]
            log.web.instead = lambda path_: (200, "text/plain", note) if path_ == "/checkpoint" else None
            with contextlib.closing(btlog.MirrorStore(mirror)) as store:
                btlog.Monitor(store, source, policy, watch).round(lambda done, total: None, lambda: 0.0)
                holds(store, log.entries[:size])
                assert store.unreported(size) == []

        with contextlib.closing(source):
            for sizes in small, edges:
                for old in sizes:
                    follow(make(tmp_path / f"from{old}"), old)
                    for new in sizes[sizes.index(old) :]:
                        follow(Path(shutil.copytree(tmp_path / f"from{old}", tmp_path / f"{old}to{new}")), new)
        assert len(list(tmp_path.glob("*to*"))) == 10 * 11 // 2 + 6 * 7 // 2


def make(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_T52_every_file_that_is_fetched_corrupted(tmp_path: Path, guilty: Judged) -> None:
    """Each is found, one at a time, and nothing of it is kept."""
    with contextlib.closing(StaticLog(tmp_path / "static", 400, 1023)) as log:
        log.web.asked.clear()
        assert monitor(log.web.url, tmp_path / "good").code == 0
        asked = sorted(set(log.web.asked) - {"/checkpoint"})
        assert len(asked) == 9  # four bundles and tiles, and the tile above
        log.put("checkpoint", log.notes[400])
        assert monitor(log.web.url, tmp_path / "old").code == 0
        log.repent()
        for path_, (at, old) in itertools.product(asked, [(0, 0), (1001, 400), (-1, 0)]):
            if old and path_ in ("/tile/0/000", "/tile/entries/000"):
                continue  # what is not new is not fetched
            data = (log.tree / path_[1:]).read_bytes()
            wrong = flip(at % len(data))(data)
            log.web.instead = lambda p, path_=path_, wrong=wrong: (200, "x", wrong) if p == path_ else None  # type: ignore[misc]
            copy = tmp_path / "copy"
            if old:
                shutil.copytree(tmp_path / "old", copy)
            seen = monitor(log.web.url, copy)
            assert (seen.code, seen.kinds) == (1, ["bad-bundle" if "entries" in path_ else "bad-tile"]), (path_, at)
            assert seen.evidence[0].joinpath(path_[1:]).read_bytes() == wrong
            guilty(seen)
            with contextlib.closing(btlog.LogStore(copy)) as store:
                size = store.tree("signed").size
                assert size in (old, 1023)
                if size:
                    holds(store, log.entries[:size])
            shutil.rmtree(copy)


class Crash(BaseException):
    """What nothing catches, as if the power had gone."""


STEPS = [  # of a monitor, where it may be interrupted before or behind each call
    (btlog, "_extended"), (btlog, "replace_file"), (btlog.MirrorStore, "follow"), (btlog.MirrorStore, "_accept"),
    (btlog.MirrorStore, "reported"), (btlog.MirrorStore, "compared"), (btlog.Reporter, "__call__"),
    (btlog.Reporter, "say"), (btlog.Monitor, "_check_tiles"), (btlog.Comparison, "_compare"),
]  # fmt: skip


@pytest.fixture(scope="module")
def suspicious(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[StaticLog, FakeIndex]]:
    """A log in which there is one finding of each of five kinds, and the index beside it; tests only read them."""
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(contextlib.closing(StaticLog(tmp_path_factory.mktemp("suspicious") / "static")))
        log.grow(quiet(0), b"bad", *(quiet(i) for i in range(1, 290)), other_sum(quiet(5)))
        log.grow(*(quiet(i) for i in range(300, 320)), named_entry("a-1.whl", "", PUBLISHER), named_entry("a-2.whl"))
        files = index_of([data for data in log.entries if data not in (b"bad", other_sum(quiet(5)), quiet(310))])
        yield log, stack.enter_context(contextlib.closing(FakeIndex(log.tree.parent, files)))


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(("where", "name"), STEPS, ids=[name for _, name in STEPS])
def test_T58_interrupted_between_any_two_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suspicious: tuple[StaticLog, FakeIndex], where: Any, name: str,
    after: bool,
) -> None:  # fmt: skip
    """Nothing is skipped: all entries are there, and every finding is reported once at least."""
    monkeypatch.setattr(btlog.Monitor, "BATCH", 256)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # it is a crash of the program, not of the machine
    right, left = getattr(where, name), 0

    def step(*args: Any, **more: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0 and not after:
            raise Crash
        value = right(*args, **more)
        if left == 0:
            raise Crash
        return value

    log, index = suspicious
    monkeypatch.setattr(where, name, staticmethod(step) if name == "_accept" else step)
    for nth in (1,) if after else (1, 2):
        mirror, left = tmp_path / f"mirror{nth}", nth
        args = (log.web.url, mirror, "--filename-regex", "^quiet5-315-", "--index-url", index.url)
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(Crash):
            btlog.main(monitor_args(*args))
        assert left == 0 or nth == 2
        left = 0
        told = {line["msg"] for line in map(json.loads, out.getvalue().splitlines()) if "kind" in line}
        told |= set(monitor(*args).texts)
        assert sorted(text.split(" ")[0] for text in told) == sorted(
            ["what", "quiet5-5-py3-none-any.whl", "a-2.whl", "quiet5-315-py3-none-any.whl", "quiet0-310-py3-none-any.whl"]
        )
        kinds = ["bad-entry", "match", "not-on-index", "publisher", "replaced"]
        assert sorted({p.name[:-17] for p in (mirror / "evidence").iterdir()}) == kinds
        if nth == 1:
            mirrored(mirror, log.entries)
        seen = monitor(*args)
        assert (seen.code, seen.kinds) == (0, [])


# --- Monitors: only the unexpected, told to somebody -----------------------------------------------------------------------

MINE = Entry("quiet3-1-py3-none-any.whl", "sha256:" + hashlib.sha256(b"mine").hexdigest())


def owner(url: str, mirror: Path, *args: str) -> Seen:
    return monitor(url, mirror, "--project", "quiet3", *args)


def test_an_owner_is_told_what_they_have_not_made(tmp_path: Path) -> None:
    """By checksum and name; the list is read anew in each round, also as a folder and as a lock file."""
    dist, sums = make(tmp_path / "dist"), tmp_path / "SHA256SUMS"
    other = dataclasses.replace(MINE, filename="quiet3-2-py3-none-any.whl")
    with contextlib.closing(StaticLog(tmp_path / "static", 1)) as log:
        sums.write_text(f"{MINE.checksum[7:]}  dist/{MINE.filename}\n{'0' * 64} *x-1.0.zip\n")
        known = "--known", str(sums)
        assert owner(log.web.url, tmp_path / "m", *known).code == 0
        log.grow(MINE.encode())
        seen = owner(log.web.url, tmp_path / "m", *known)
        assert (seen.code, seen.kinds) == (0, [])
        told = {"level": "INFO", "msg": f"{MINE.filename} with {MINE.checksum} is logged at index 1, as you made it"}
        assert told.items() <= seen.lines[0].items()
        log.grow(other.encode(), quiet(4))  # my bytes under another name
        seen = owner(log.web.url, tmp_path / "m", *known)
        assert (seen.code, seen.kinds) == (1, ["unexpected"])
        assert seen.texts == [f"{other.filename} with {MINE.checksum} is logged at index 2: you have not made it"]
        (dist / MINE.filename).write_bytes(b"mine")
        (dist / "notes.txt").write_text("no distribution")
        lock = tmp_path / "requirements.txt"
        lock.write_text(f"quiet3==1 --hash={MINE.checksum}\n")
        for path_, kinds in (dist, ["unexpected"]), (lock, []), (dist / MINE.filename, ["unexpected"]):
            assert owner(log.web.url, tmp_path / f"m-{path_.name}", "--known", str(path_)).kinds == kinds
        both = owner(log.web.url, tmp_path / "both", "--known", str(dist), *known, "--filename-regex", "^quiet4")
        assert both.kinds == ["unexpected", "match"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("SHA256SUMS", None, "can't read"),
        ("SHA256SUMS", "0" * 64 + "  x\nnot a sum\n", "is no list of SHA-256 sums, in this line: 'not a sum'"),
        ("requirements.txt", "x==1\n", "requirements.txt"),
        ("poetry.lock", "?", "poetry.lock can't be parsed"),
    ],
)
def test_what_an_owner_has_made_has_to_be_readable(
    tmp_path: Path, static: StaticLog, name: str, content: str | None, says: str
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    seen = owner(static.web.url, tmp_path / "m", "--known", str(tmp_path / name))
    assert (seen.code, says in seen.error, "--known" in seen.error) == (2, True, True), seen.error
    assert monitor(static.web.url, tmp_path / "m", "--known", str(tmp_path / name)).code == 2  # without a project


def test_a_finding_is_told_until_somebody_takes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--exec`: after any number of failures, over restarts, once; and again only if it has come back."""
    mirror, heard, broken = tmp_path / "m", tmp_path / "heard", tmp_path / "broken"
    command = f"cat >> {shlex.quote(str(tmp_path / 'tried'))}; test ! -e {shlex.quote(str(broken))} && cat {tmp_path / 'tried'} > {heard}"
    args = "--exec", command, "--feed", str(tmp_path / "feed.xml")
    monkeypatch.setattr(btlog.Alarms, "PAUSE", 0.01)
    with contextlib.closing(StaticLog(tmp_path / "static", 3)) as log:
        log.grow(MINE.encode())
        broken.touch()
        seen = owner(log.web.url, mirror, *args)
        assert (seen.code, seen.error.count("--exec: the command ended with 1")) == (1, 3)
        assert (len(seen.kinds), heard.exists()) == (1, False)
        assert owner(log.web.url, mirror, *args).code == 3  # nothing new, and one is not told
        broken.unlink()
        (tmp_path / "tried").unlink()
        assert owner(log.web.url, mirror, *args).code == 0
        [line] = [json.loads(line) for line in heard.read_text().splitlines()]
        assert (line["kind"], line["index"], line["filename"], line["publisher"]) == ("match", 3, MINE.filename, None)
        assert line == seen.lines[0]
        feed = ElementTree.fromstring((tmp_path / "feed.xml").read_text())
        titles = [entry_.findtext("{*}title") for entry_ in feed.findall("{*}entry")]
        assert titles == [f"match in {SIGNER.key.name}: {MINE.filename} with {MINE.checksum} is logged at index 3"]
        assert feed.findtext("{*}updated") == feed.findtext("{*}entry/{*}updated") == line["time"]

        def lie_and_tell(lie: bool) -> int:
            """How often the command was run with what stands."""
            heard.unlink(missing_ok=True)
            (tmp_path / "tried").unlink(missing_ok=True)
            log.put("checkpoint", flip(-30)(log.notes[4])) if lie else log.repent()
            assert owner(log.web.url, mirror, *args).code == int(lie)
            return len(heard.read_text().splitlines()) if heard.exists() else 0

        assert [lie_and_tell(lie) for lie in (True, True, False, True, True)] == [1, 0, 0, 1, 0]


def test_a_finding_that_nobody_takes_keeps_no_other_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does a feed that can't be written, or a list of one's own that can't be read."""
    monkeypatch.setattr(btlog.Alarms, "PAUSE", 0.01)
    heard, sums = tmp_path / "heard", tmp_path / "SHA256SUMS"
    sums.write_text(f"{MINE.checksum[7:]}  {MINE.filename}\n")
    command = f"grep -v quiet3-666 >> {heard}"
    with contextlib.closing(StaticLog(tmp_path / "static", 1)) as log:
        log.grow(*(of_publisher(f"quiet3-{n}-py3-none-any.whl", None) for n in (666, 7)))
        seen = owner(log.web.url, tmp_path / "m", "--known", str(sums), "--exec", command, "--feed", str(tmp_path / "no" / "feed"))
        assert (seen.code, seen.kinds, "--feed" in seen.error) == (1, ["unexpected"] * 2, True)
        assert [json.loads(line)["filename"] for line in heard.read_text().splitlines()] == ["quiet3-7-py3-none-any.whl"]
        report = btlog.Reporter.__new__(btlog.Reporter)
        report._owned = btlog.OwnFiles([str(sums)], [btlog.WatchTerm(project="quiet3")])
        assert report.prepare()
        sums.unlink()
        assert not report.prepare()
        assert report._owned.has(MINE)  # as it was read last


def test_what_installers_take_for_a_project_is_watched(tmp_path: Path) -> None:
    """pip lowers letters beyond ASCII, and skips spaces; a wheel's metadata is its owner's as the wheel is."""
    dist = make(tmp_path / "dist")
    wheel_ = tiny_wheel(dist, "key", "x")
    with zipfile.ZipFile(wheel_) as packed:
        metadata = packed.read("key-1.0.dist-info/METADATA")
    with contextlib.closing(StaticLog(tmp_path / "static", 1)) as log:
        mine = [Entry(wheel_.name, btlog.checksum_of(wheel_)), Entry(f"{wheel_.name}.metadata", f"sha256:{hashlib.sha256(metadata).hexdigest()}")]
        evil = ["\u212aey-1.0-py3-none-any.whl", "key- 1.0.tar.gz", "key-1.1-py3-none-any.whl.metadata"]
        log.grow(*(entry_.encode() for entry_ in mine), *(of_publisher(name, None) for name in evil))
        seen = monitor(log.web.url, tmp_path / "m", "--project", "key", "--known", str(dist))
    assert [text.partition(" with")[0] for text in seen.texts] == evil


def test_a_command_that_hangs_is_ended(tmp_path: Path, static: StaticLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(btlog.Alarms, "TIMEOUT", 0.2)
    monkeypatch.setattr(btlog.Alarms, "PAUSE", 0.01)
    begun = time.monotonic()
    assert monitor(static.web.url, tmp_path / "m", "--checksum-regex", quiet(0)[28:40].decode(), "--exec", "sleep 60 & sleep 60").code == 1
    assert time.monotonic() - begun < 20


def of_publisher(name: str, publisher: btlog.Publisher | None) -> bytes:
    return Entry(name, "sha256:" + hashlib.sha256(name.encode()).hexdigest(), publisher).encode()


def of_release(tag: str) -> btlog.Publisher:
    return GITHUB._replace(subject=f"https://github.com/a/b/.github/workflows/c.yml@refs/tags/{tag}")


@pytest.mark.parametrize(
    ("rounds", "found"),
    [
        ("1a+ 1b+;2a+;3a+ 3b+", []),  # the tag differs from release to release, and means nothing
        ("1a+ 1b+;2a-", ["lost"]),
        ("1a+ 1b+;2a- 2b+", ["partial"]),
        ("1a+ 1b-", []),  # from the beginning
        ("1a+;1b-;1c-", ["partial"]),
        ("1a+ 1b-;2a+ 2b-", []),  # as before
        ("1a+ 1b-;2a-;2b-", ["lost"]),
        ("1a+;2a-;2b+;3a+;4a-", ["lost", "lost"]),
        ("1a-;1b-;2a+;3a+", []),
        ("1a+;2a*", ["changed"]),
        ("1a+;2a*;3a+;4a-", ["changed", "lost"]),
        ("1a+;1a-", []),  # the same file, without what was said before
        ("1a-;1a+;2a-", ["lost"]),
    ],
)
def test_a_project_whose_publisher_is_lost_or_changed(tmp_path: Path, rounds: str, found: list[str]) -> None:
    """In the words full, partial, lost, changed; release by release."""
    other = GITHUB._replace(subject="https://github.com/evil/b/.github/workflows/c.yml@refs/tags/1")
    seen = list[str]()
    with contextlib.closing(StaticLog(tmp_path / "static", 3)) as log:
        for round_ in rounds.split(";"):
            made = [(f"demo-{w[0]}-py3-none-{w[1]}.whl", {"+": of_release(w[0]), "-": None, "*": other}[w[2]]) for w in round_.split()]
            append_anyway(log.store, [of_publisher(*of) for of in made])
            log.export()
            got = monitor(log.web.url, tmp_path / "m")
            assert set(got.kinds) <= {"publisher"}
            seen += [text.rpartition(": ")[2] for text in got.texts]
    assert seen == found


def test_a_file_that_is_added_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To a release that has had files for more than 14 days, by the monitor's own clock."""
    now = [1_800_000_000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])

    log = StaticLog(tmp_path / "static", 300)

    def after(days: float, *names: str) -> list[str]:
        now[0] += days * 86400
        log.grow(*(of_publisher(name, None) for name in names))
        got = monitor(log.web.url, tmp_path / "m")
        return [text.partition(" ")[0] for kind, text in zip(got.kinds, got.texts, strict=True) if kind == "late"]

    with contextlib.closing(log):
        assert after(0, "demo-1.0-py3-none-a.whl", "demo-1.0.tar.gz", "demo-0.9-beta.tar.gz") == []
        assert after(13, "demo-1.0-py3-none-b.whl") == []
        assert after(1.1, "demo-1.0-py3-none-c.whl", "demo-1.1-py3-none-a.whl", "demo-1.0.tar.gz.metadata", "Demo-1.0.zip") == [
            "demo-1.0-py3-none-c.whl", "Demo-1.0.zip"]  # fmt: skip
        assert after(0, "demo-1.1.tar.gz", "other-1.0.tar.gz") == []
        log.grow(of_publisher("demo-1.0.tar.gz", GITHUB))  # the same file
        assert after(0) == []
        assert after(15, "demo-1.1.zip", "quiet7-7-x.whl") == ["demo-1.1.zip", "quiet7-7-x.whl"]
        assert after(0, "demo-1.1.0-py3-none-d.whl", "demo-v1.1-1-none-d.whl", "demo-01.1.zip") == [
            "demo-1.1.0-py3-none-d.whl", "demo-v1.1-1-none-d.whl"]  # fmt: skip


def test_a_late_file_is_seen_whenever_and_wherever_its_release_was_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a first run in many steps, and for a project with files in more bundles than are read at a time."""
    now = [1_800_000_000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    monkeypatch.setattr(btlog, "MAX_BUNDLES_READ", 1)
    monkeypatch.setattr(btlog.Monitor, "BATCH", 256)
    with contextlib.closing(StaticLog(tmp_path / "static")) as log:
        log.grow(*(of_publisher(f"pop-{i}-py3-none-a.whl" if i % 200 == 0 else f"x{i}-1.zip", None) for i in range(1001)))
        assert monitor(log.web.url, tmp_path / "m").code == 0
        now[0] += 15 * 86400
        log.grow(*(of_publisher(f"pop-{i}-py3-none-b.whl", None) for i in (0, 400, 1000)))
        assert monitor(log.web.url, tmp_path / "m").kinds == ["late"] * 3


# --- Files by project ---------------------------------------------------------------------------------------------------------


def pages(url: str, project: str) -> list[list[str]]:
    """The pages of a project's files."""
    found_, before = list[list[str]](), ""
    while True:
        status, _, data = ask(url, f"/entries?project={project}{before}")
        assert status == 200
        answer = json.loads(data)
        found_.append([entry_["filename"] for entry_ in answer["entries"]])
        if "next" not in answer:
            return found_
        before = f"&before={answer['next']}"


def test_files_are_found_by_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Newest first, in pages, as an exhaustive search has it; whatever the batches, over parts and restarts."""
    names = ["Foo.Bar-1.0.tar.gz", "foo_bar-1.0-py3-none-any.whl", "foo-bar-1.0-2.zip", "foo-2.0.zip", "foo_bar-1-py3.egg",
             "foo-bar-v2-x.tar.gz", "foobar-1.0.zip", "foo.zip", "-", "x", "foo_bar-1.0-py3-none-any.whl.metadata", "f\u00f6-1.zip"]  # fmt: skip
    monkeypatch.setattr(btlog, "PART", 9)
    monkeypatch.setattr(btlog, "MAX_OF_PROJECT", 5)
    monkeypatch.setattr(btlog, "MAX_BUNDLES_READ", 2)
    with contextlib.closing(LocalLog(tmp_path / "log", options={})) as log:
        entries = list[bytes]()
        for count in 1, 1, 300, 2, 512, 3:
            batch = [entry(i) for i in range(len(entries), len(entries) + count)]
            bulk(log.url, b"".join(map(as_line, batch)))
            entries += batch
        bulk(log.url, b"".join(as_line(of_publisher(name, None)) for name in names))
        for i in range(20):
            bulk(log.url, b"".join(as_line(entry(2000 + 100 * i + k)) for k in range(97)))
            add(log.url, of_publisher(f"foo_bar-9.{i}-py3-none-any.whl", None))
        logged = [Entry.parse(data).filename for data in walk(log.url)]
        for project in "foo-bar", "Foo_Bar", "foo", "foobar", "x", "nothing", "package-1":
            wanted = [name for name in reversed(logged) if btlog.is_of(btlog.normalize(project), name)]
            got = pages(log.url, project)
            assert [name for page in got for name in page] == wanted
            assert all(page for page in got[:-1]) or len(wanted) < 3
        assert len(pages(log.url, "foo-bar")) > 3
        assert [ask(log.url, f"/entries?{query}")[0] for query in (
            "project=", "project=a&before=", "project=a&before=x", "project=a&filename=b", "before=3")] == [400] * 5
        assert json.loads(ask(log.url, "/entries?project=foo&before=0")[2]) == {"entries": []}
    with contextlib.closing(btlog.LogStore(tmp_path / "log")) as store:
        assert list(btlog.check_store(store, SIGNER.key, lambda *n: None)) == []
        with store.database.transaction() as db:  # as an older btlog made it
            keys = db.execute("DELETE FROM lookup WHERE key < 0 RETURNING key").fetchall()
            db.execute("DELETE FROM setting WHERE name = 'project_keys'")
        assert list(btlog.check_store(store, SIGNER.key, lambda *n: None)) == []
        with pytest.raises(Unavailable, match="no look-up by project yet"):
            store.of_project("foo", 100, 5)
    with contextlib.closing(btlog.LogStore(tmp_path / "log")) as store:
        assert store.query("SELECT key FROM lookup WHERE key < 0 ORDER BY key") == sorted(keys)
        with store.database.transaction() as db:
            db.execute("DELETE FROM lookup WHERE key = ?", keys[3])
        assert any("lookup: a key of entry" in line for line in btlog.check_store(store, SIGNER.key, lambda *n: None))
        btlog.rebuild(store, SIGNER.key, lambda *n: None)
        assert list(btlog.check_store(store, SIGNER.key, lambda *n: None)) == []


def test_verify_finds_the_files_of_a_project(tmp_path: Path, log: LocalLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(btlog, "MAX_OF_PROJECT", 3)
    monkeypatch.setattr(btlog, "MAX_BUNDLES_READ", 1)
    bulk(log.url, b"".join(as_line(quiet(i)) for i in range(600)))
    key = "--public-key", key_file(tmp_path)
    for where in ("--log-url", log.url), ("--storage-dir", str(tmp_path / "log")):
        code, out, error = call_btlog("verify", "--project", "Quiet3", *where, *key)
        assert (code, out.count(": logged at index "), "60 of 60 artifacts" in error) == (0, 60, True), error
        assert re.findall(r"at index (\d+)", out) == [str(n) for n in range(593, -1, -10)]
        assert call_btlog("verify", "--project", "quiet", *where, *key)[0] == 3
    assert call_btlog("verify", "--project", "quiet3", *key)[0] == 2
    liar = Liar(entries=b'{"entries": [], "next": 5}')
    with contextlib.closing(Local(liar.answer)) as other:
        code, _, error = call_btlog("verify", "--project", "quiet3", "--log-url", other.url, *key)
    assert (code, "again and again" in error) == (3, True)


# --- Static trees ---------------------------------------------------------------------------------------------------------------


def export(store: btlog.LogStore, out: Path) -> tuple[int, int]:
    note = store.checkpoint("published")
    assert note
    return btlog.StaticTree(store, out).export(note, lambda done, total: None)


def files_of(tree: Path) -> dict[str, bytes]:
    """All that a web server would serve of a tree."""
    names = {path_: path_.relative_to(tree).as_posix() for path_ in tree.rglob("*") if path_.is_file()}
    return {name: path_.read_bytes() for path_, name in names.items() if not name.startswith(".")}


def whole(tree: Path, entries: list[bytes]) -> set[str]:
    """The paths that the checkpoint of an exported tree implies, all of which are there and right."""
    files = files_of(tree)
    size = open_checkpoint(files["checkpoint"], UNWITNESSED).tree.size
    right = {
        btlog.tile_path(level, index, len(data) // 32): data for (level, index), data in tiles_of(entries[:size]).items()
    }
    for index in range((size + 255) // 256):
        part = entries[256 * index : min(256 * index + 256, size)]
        right[btlog.tile_path(None, index, len(part))] = b"".join(len(e).to_bytes(2, "big") + e for e in part)
    assert {name: files.get(name) for name in right} == right
    return set(right)


@pytest.mark.parametrize("sizes", [(0, 1), (129,), (600,), (1, 255, 256, 257), (300, 300, 812, 1025)])
def test_T21_an_exported_tree_is_whole(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    """Each partial tile that a checkpoint implies is there, and a second export writes only what has changed."""
    out, before = make(tmp_path / "out"), 0
    with contextlib.closing(found(tmp_path / "log")) as store:
        for size in sizes:
            entries = fill(store, *([size - before] if size > before else []))
            old = {name: (out / name).stat().st_mtime_ns for name in files_of(out)}
            assert export(store, out) == (before, size)
            implied = whole(out, entries)
            fresh = {n for n in files_of(out) if old.get(n) != (out / n).stat().st_mtime_ns} - {"checkpoint"}
            assert fresh == (implied - old.keys() if size > before else set())
            assert {name for name in os.listdir(out) if name.startswith(".")} == {".partials"}
            before = size


def test_T2_what_is_exported_is_on_disk_before_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write, fsync, rename, fsync of the folders; the checkpoint last. A folder's names are synced behind the last one."""
    events: list[tuple[str, Any]] = []
    fsync, replace = os.fsync, Path.replace

    def traced_fsync(descriptor: int) -> None:
        fsync(descriptor)
        events.append(("fsync", os.fstat(descriptor).st_ino))

    def traced_replace(self: Path, target: Path) -> Path:
        events.append(("rename", (self.stat().st_ino, Path(target))))
        return replace(self, target)

    out = make(tmp_path / "out")
    with contextlib.closing(found(tmp_path / "log")) as store:
        for count in 200, 400, 1:
            fill(store, count)
            events.clear()
            with monkeypatch.context() as patch:
                patch.setattr(os, "fsync", traced_fsync)
                patch.setattr(Path, "replace", traced_replace)
                export(store, out)
            renamed = [(at, *value) for at, (what, value) in enumerate(events) if what == "rename"]
            names = [path_.relative_to(out).as_posix() for _, _, path_ in renamed]
            assert names[-2:] == ["checkpoint", ".partials"]
            assert len(names) >= 4
            at_checkpoint = renamed[-2][0]
            for at, inode, path_ in renamed:
                assert ("fsync", inode) in events[:at], path_  # the bytes, before they have their name
                if path_.parent != out:
                    for folder in [p for p in path_.parents if p.is_relative_to(out)]:
                        assert ("fsync", folder.stat().st_ino) in events[at:at_checkpoint], folder
            assert ("fsync", out.stat().st_ino) in events[at_checkpoint:]


def test_T21_a_reader_races_the_exporter(tmp_path: Path) -> None:
    """Whatever checkpoint a reader sees, its tiles are there: over twenty sizes of a tree that grows."""
    out, over = make(tmp_path / "out"), threading.Event()
    seen, failed = set[int](), list[BaseException]()

    def read() -> None:
        try:
            while not over.is_set():
                tree = open_checkpoint((out / "checkpoint").read_bytes(), UNWITNESSED).tree
                seen.add(tree.size)
                for level, size in (None, tree.size), (0, tree.size), (1, tree.size >> 8):
                    if size:
                        index = (size - 1) // 256
                        data = (out / btlog.tile_path(level, index, size - 256 * index)).read_bytes()
                        assert data, (level, size)
                btlog.AuthenticTiles(tree, lambda *place: (out / btlog.tile_path(*place)).read_bytes())
        except BaseException as error:
            failed.append(error)

    with contextlib.closing(found(tmp_path / "log")) as store:
        fill(store, 3)
        export(store, out)
        reader = threading.Thread(target=read)
        reader.start()
        for i in range(20):
            entries = fill(store, 1 + 37 * i % 99)
            export(store, out)
        over.set()
        reader.join()
        assert failed == []
        assert len(seen) > 5
        whole(out, entries)


def test_T22_partial_tiles_stay_for_an_hour(tmp_path: Path) -> None:
    """A reader may still have the checkpoint that implies them."""
    out = make(tmp_path / "out")
    partials = {"tile/0/000.p/100", "tile/0/000.p/200", "tile/entries/000.p/100", "tile/entries/000.p/200"}
    with contextlib.closing(found(tmp_path / "log")) as store:
        for count in 100, 100, 100, 1:
            fill(store, count)
            export(store, out)
        assert partials <= files_of(out).keys()
        for name in "tile/0/000", "tile/entries/000":
            long_ago = time.time() - btlog.StaticTree.KEPT - 5
            os.utime(out / name, (long_ago, long_ago))
        entries = fill(store, 1)
        export(store, out)
    whole(out, entries)
    left = files_of(out).keys()
    assert left & partials == set()
    assert not (out / "tile/0/000.p").exists()
    assert {"tile/0/001.p/44", "tile/0/001.p/45", "tile/0/001.p/46", "tile/1/000.p/1"} <= left  # not full yet
    assert "tile/0/000.p" not in (out / ".partials").read_text().split("\n")


def test_export_takes_only_a_folder_of_its_own(tmp_path: Path) -> None:
    with contextlib.closing(found(tmp_path / "log")) as store:
        fill(store, 10)
        shutil.copytree(tmp_path / "log", tmp_path / "early")
        fill(store, 300)
    found(tmp_path / "alien", new_key("log.example/alien")).close()
    shutil.copytree(tmp_path / "log", tmp_path / "twin")
    with contextlib.closing(found(tmp_path / "fork")) as store:
        store.append([entry(i, "fork") for i in range(20)], seal, True)

    def exports(log: str, out: str) -> tuple[int, str, str]:
        return call_btlog("export", str(tmp_path / out), "--storage-dir", str(tmp_path / log))

    said = f"{tmp_path / 'out'} has the tree of size 310"
    assert exports("log", "out") == (0, f"{said}, 310 entries of it new\n", "")
    assert exports("log", "out") == (0, f"{said}, 0 entries of it new\n", "")
    assert exports("twin", "out")[0] == 0  # the same log, from elsewhere
    before = files_of(tmp_path / "out")
    assert exports("fork", "forked")[0] == 0
    make(tmp_path / "other").joinpath("thesis.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    for log, out, code, says in (
        ("early", "out", 2, "of a tree of size 310 that this log, of size 10, does not have"),
        ("fork", "out", 2, "of a tree of size 310 that this log, of size 20, does not have"),
        ("log", "forked", 2, "of a tree of size 20 that this log, of size 310, does not have"),
        ("alien", "out", 2, "is not a checkpoint of log.example/alien"),
        ("log", "other", 2, "holds other things than a static tree (thesis.tex)"),
        ("nothing", "new", 3, ""),
        ("log", "file", 3, ""),
    ):
        got, text, error = exports(log, out)
        assert (got, text, error.count("\n"), says in error) == (code, "", 1, True), log
    assert os.listdir(tmp_path / "other") == ["thesis.tex"]
    assert files_of(tmp_path / "out") == before
    with contextlib.closing(btlog.LogStore(tmp_path / "twin")):  # which locks the folder, as another export does
        assert "in use by another btlog" in exports("log", "twin")[2]
    shutil.rmtree(tmp_path / "out" / "tile")
    (tmp_path / "out" / "checkpoint").unlink()
    (tmp_path / "out" / "tile").write_text("x")  # nothing can be written below it
    code, _, error = exports("log", "out")
    assert (code, error.count("\n"), "can't" in error) == (3, 1, True)
    assert not (tmp_path / "out" / ".draft").exists()


def test_export_to_a_folder_that_cant_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """T18: an error at once, and nothing is left behind; also where the disk fails later, and then the rest is tried again."""
    with contextlib.closing(found(tmp_path / "log")) as store:
        entries = fill(store, 300)
    out = tmp_path / "out"
    args = ("export", str(out), "--storage-dir", str(tmp_path / "log"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path_, mode: False)
        code, _, error = call_btlog(*args)
        assert (code, os.listdir(out), "is not writable" in error) == (3, [], True)
    real, left = os.fsync, 0

    def full(descriptor: int) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise OSError(28, "No space left on device")
        real(descriptor)

    for left in 1, 3, 5:  # noqa: B007
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            code, _, error = call_btlog(*args)
        assert (code, "No space left on device" in error) == (3, True)
        assert not {"checkpoint", ".draft"} & set(os.listdir(out))
    assert call_btlog(*args)[0] == 0
    whole(out, entries)


class Process:
    """A command as a process that goes on, and the lines that it prints."""

    def __init__(self, *args: str) -> None:
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, compiled_program(), *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        self.lines.extend(iter(self.process.stdout.readline, ""))

    def printed(self, *words: str) -> str:
        """The first line with these words, once it is printed."""

        def look() -> str:
            if self.process.poll() is not None:
                self._reader.join()
            line = next((line for line in list(self.lines) if all(word in line for word in words)), "")
            assert line or self.process.poll() is None, (words, self.lines)
            return line

        return str(eventually(look))

    def stop(self, number: int = signal.SIGTERM, within: float = 10) -> tuple[int, str]:
        """The exit code, and what it wrote to stderr; it has 10 s to end (T67)."""
        begun = time.monotonic()
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            self.process.wait(within + 10)
            assert time.monotonic() - begun < within
        finally:
            self.process.kill()
            self._reader.join()
            error = self.process.communicate()[1]
        return self.process.returncode, error


@contextlib.contextmanager
def process(*args: str) -> Iterator[Process]:
    started = Process(*args)
    try:
        yield started
    finally:
        if started.process.stdout and not started.process.stdout.closed:
            started.stop(signal.SIGKILL)


def test_export_follows(tmp_path: Path) -> None:
    """It writes what comes, until it is told to end; a monitor and a verifier read what a web server makes of it."""
    out, mirror, file = tmp_path / "out", tmp_path / "mirror", wheel(tmp_path / "signed-1.0.whl")
    other = wheel(tmp_path / "pkg-3-py3-none-any.whl", "other")  # its name is logged, with another checksum
    with contextlib.closing(LocalLog(tmp_path / "log")) as log, contextlib.closing(Web(out, "/some/prefix")) as web:
        entries = [quiet(i) for i in range(5)]
        assert bulk(log.url, b"".join(map(as_line, entries)))[0] == 200
        key = ("--public-key", key_file(tmp_path), "--log-url", web.url)
        with process("export", str(out), "--storage-dir", str(tmp_path / "log"), "--follow", "--frequency", "0.02") as exporter:
            exporter.printed("the tree of size 5, 5 entries")
            assert add(log.url, entry(3))[0] == 200
            exporter.printed("the tree of size 6, 1 entries")
            code, text, error = call_btlog("verify", str(other), str(file), *key)
            assert (code, text) == (1, "")
            assert "not logged, but with another checksum at index 5" in error
            assert "signed-1.0.whl: not logged\n" in error
            more = [*(quiet(i) for i in range(10, 610)), Entry(file.name, btlog.checksum_of(file), PUBLISHER).encode()]
            assert bulk(log.url, b"".join(map(as_line, more)))[0] == 200
            exporter.printed("the tree of size 607")
            code, text, error = call_btlog("verify", str(file), *key)
            assert (code, error) == (0, "")
            assert f"logged at index 606 of {LOG.name}, tree size 607, published by https://example.com/a b" in text
            assert monitor(web.url, mirror).code == 0
            assert exporter.stop() == (0, "")
        assert set(os.listdir(out)) == {".partials", "checkpoint", "tile"}
        whole(out, entries := [*entries, entry(3), *more])
        assert all(path_.startswith("/some/prefix/") for path_ in web.asked)
        (out / "tile/entries/002.p/95").write_bytes(b"")  # what can't be read, can't be said not to be logged
        assert call_btlog("verify", str(file), *key)[0] == 3
    mirrored(mirror, entries)


# --- Monitors that go on ---------------------------------------------------------------------------------------------------------


def test_a_monitor_follows(mirror: Path, static: StaticLog) -> None:
    """A finding is told once while it lasts, and again when it is back; every line is JSON; SIGTERM ends it, with 1."""
    with process(*monitor_args(static.web.url, mirror, "--follow", "--frequency", "0.02")) as follower:

        def rounds(count: int = 3) -> None:
            """Some rounds begin, and all but the last end."""
            before = static.web.asked.count("/checkpoint")
            eventually(lambda: static.web.asked.count("/checkpoint") >= before + count)

        def told() -> int:
            return sum('"rollback"' in line for line in follower.lines)

        rounds()
        for times in 1, 2:
            static.put("checkpoint", static.notes[200])
            eventually(lambda: told() == times)  # noqa: B023
            rounds()
            assert told() == times
            static.repent()
            rounds()
        static.grow_to(400)
        assert "100 of them new" in follower.printed("400 entries")
        refused: list[str] = []

        def refuse(path_: str) -> Answered:
            refused.append(path_)
            return 503, "text/plain", b""

        static.web.instead = refuse
        eventually(lambda: len(refused) > 1)
        static.web.instead = lambda path_: None
        static.grow_to(500)
        follower.printed("500 entries")  # it went on
        code, error = follower.stop()
        assert (code, error, told()) == (1, "", 2)
        lines = [json.loads(line) for line in follower.lines]
        assert all({"time", "level", "msg"} <= line.keys() for line in lines)
        assert [line["level"] for line in lines] == ["ERROR", "ERROR", "INFO", "INFO"]


@pytest.mark.parametrize("flag", [("--once=false",), ("--once", "false")])
def test_T67_a_monitor_ends(mirror: Path, static: StaticLog, flag: tuple[str, ...]) -> None:
    """Without findings with 0, also while the log does not answer; within ten seconds."""
    silent, ended = threading.Event(), threading.Event()

    def hang(path_: str) -> None:
        silent.set()
        ended.wait(30)

    static.web.instead = hang
    with process(*monitor_args(static.web.url, mirror, "--frequency", "0.02", *flag)) as follower:
        assert silent.wait(20)
        result = follower.stop(signal.SIGINT if flag == ("--once=false",) else signal.SIGTERM)
        ended.set()
        assert result == (0, "")


@pytest.mark.slow
def test_T67_a_monitor_ends_while_nobody_answers(mirror: Path, static: StaticLog) -> None:
    """Also while its connections are on the way to where nothing accepts them, as to an address that is filtered."""
    with contextlib.ExitStack() as stack:
        full = stack.enter_context(socket.socket())
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(4):  # which nobody takes out of the queue
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        url = f"http://127.0.0.1:{full.getsockname()[1]}"
        with process(*monitor_args(static.web.url, mirror, "--follow", "--index-url", url)) as follower:
            on_the_way = f":{full.getsockname()[1]:04X} 02 "  # SYN_SENT, of ours and of the index's readers
            eventually(lambda: Path("/proc/net/tcp").read_text().count(on_the_way) > 4)
            assert follower.stop() == (0, "")


def test_a_monitor_tries_again(tmp_path: Path, static: StaticLog, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once each file has been refused, with 429 or 5xx, it is asked again; what is not there is not."""
    refused: set[str] = set()
    codes = itertools.cycle([429, 503, 500, 502])

    def refuse(path_: str) -> Answered | None:
        if path_ in refused:
            return None
        refused.add(path_)
        return next(codes), "text/plain", b"later"

    monkeypatch.setattr(btlog.LogReader, "WINDOW", 8)
    static.web.instead = refuse
    assert monitor(static.web.url, tmp_path / "mirror").code == 0
    mirrored(tmp_path / "mirror", static.entries)
    try_only(monkeypatch, 2)
    for status, says in (429, "answers 429: ?[2Jlater"), (404, "is not there"), (302, "answers 302"), (0, "is not reached"):
        static.web.instead = lambda path_, status=status: (status, "text/plain", b"\x1b[2Jlater")  # type: ignore[misc]
        if not status:
            static.web.close()
        seen = monitor(static.web.url, tmp_path / "mirror")
        assert (seen.code, seen.lines, says in seen.error) == (3, [], True), seen.error  # a redirect is not followed


def test_a_mirror_is_served(tmp_path: Path, mirror: Path, static: StaticLog) -> None:
    """With all that a log answers, also where an entry is none; `fsck` and `verify` take it as well."""
    file = wheel(tmp_path / "some-1.0.whl")
    static.grow(b"no entry", Entry(file.name, btlog.checksum_of(file)).encode(), *(quiet(i) for i in range(300, 700)))
    assert monitor(static.web.url, mirror).kinds == ["bad-entry"]
    code, text, error = call_btlog("fsck", "--storage-dir", str(mirror))
    assert (code, error) == (0, "")
    assert f"all 702 entries of {LOG.name} are as they should be" in text
    key = ("--public-key", key_file(tmp_path))
    missing = wheel(tmp_path / "some-1.1.whl")
    assert [call_btlog("verify", str(f), "--storage-dir", str(mirror), *key)[0] for f in (file, missing)] == [0, 1]
    with running("serve", "--read-only", "--storage-dir", str(mirror)) as server:
        assert walk(server.url) == static.entries
        assert ask(server.url, "/checkpoint")[2] == static.notes[702]
        for i in 0, 300, 301, 701:
            proof = ask(server.url, f"/entry/{i}/proof")[2]
            check_logged(static.entries[i], proof, UNWITNESSED)
            assert (Proof.parse(proof).extra == static.entries[i]) is (i == 300)
        assert json.loads(ask(server.url, "/entry/301")[2])["filename"] == file.name
        assert json.loads(ask(server.url, f"/entries?filename={file.name}")[2])["entries"][0]["index"] == 301
        status, _, body = ask(server.url, "/entry/300")
        assert (status < 500, "error" in json.loads(body)) == (True, True)
        assert ask(server.url, "/add", "POST", b"{}")[0] == 405
        assert call_btlog("verify", str(file), "--log-url", server.url, *key)[0] == 0
        assert monitor(server.url, tmp_path / "mirror2").kinds == ["bad-entry"]  # a mirror of the mirror
        static.grow(quiet(701))
        assert monitor(static.web.url, mirror).code == 0  # while it is served
        assert len(eventually(lambda: walk(server.url)[702:])) == 1
        assert server.stop()[0] == 0
    mirrored(mirror, static.entries)


def test_a_mirror_has_one_monitor_and_one_log(tmp_path: Path, mirror: Path, static: StaticLog) -> None:
    with contextlib.closing(btlog.MirrorStore(mirror)):
        seen = monitor(static.web.url, mirror)
        assert (seen.code, "is in use by another btlog" in seen.error) == (3, True)
    other, key = btlog.encode_vkey(new_key("log.example/other").key), ("--public-key", key_file(tmp_path))
    url, where = ("--log-url", static.web.url), ("--storage-dir", str(mirror))
    for more, says in (
        ((*url, "--public-key", key_file(tmp_path, other)), f"mirrors the log {LOG_VKEY}, not {other}"),
        (url, "give --policy F, or --public-key F"),
        ((*url, *key, "--filename-regex", "("), "not a regular expression"),
        ((*url, *key, "--frequency", "x"), "no number of seconds"),
        ((*url, *key, "--once=maybe"), "invalid choice"),
        (key, "give --log-url"),
    ):
        code, text, error = call_btlog("monitor", *where, *more)
        assert (code, text, error.count("\n"), says in error) == (2, "", 1, True), more
    make(tmp_path / "home").joinpath("thesis.tex").write_text("x")
    assert monitor(static.web.url, tmp_path / "home").code == 3
    (tmp_path / "policy").write_text(f"log {LOG_VKEY} {static.web.url}\nquorum none\n")
    new = tmp_path / "by-policy"
    by_policy = ("monitor", "--policy", str(tmp_path / "policy"), "--storage-dir", str(new))
    code, text, error = call_btlog(*by_policy)
    assert (code, text) == (0, f"{new} has all 300 entries of the log, 300 of them new: nothing found\n")
    static.grow(b"bad \x1b[2J")
    code, text, error = call_btlog(*by_policy)
    assert (code, error) == (1, "")
    assert re.fullmatch(r"FOUND bad-entry: what is logged at index 300 .*\(evidence: .*/bad-entry-[0-9a-f]{16}\)\n", text)


TABLES = {"bundle": "n", "tile": "key", "lookup": "key", "setting": "name", "checkpoint": "kind", "project": "name"}


def rows_of(mirror: Path) -> dict[str, str]:
    """A digest of each table."""
    with contextlib.closing(sqlite3.connect(f"file:{mirror / 'log.sqlite3'}?mode=ro", uri=True)) as db:
        tables = {name: db.execute(f"SELECT * FROM {name} ORDER BY {by}").fetchall() for name, by in TABLES.items()}
    return {name: hashlib.sha256(repr(rows).encode()).hexdigest() for name, rows in tables.items()}


def stored_size(mirror: Path) -> int:
    """How far a mirror has come, as another process sees it."""
    with contextlib.suppress(sqlite3.OperationalError), contextlib.ExitStack() as stack:
        db = stack.enter_context(contextlib.closing(sqlite3.connect(f"file:{mirror / 'log.sqlite3'}?mode=ro", uri=True)))
        for name in "signed", "target":  # by what was accepted last, or is on its way
            for (note,) in db.execute("SELECT note FROM checkpoint WHERE kind = ?", (name,)):
                size = Checkpoint.parse(btlog.split_note(note)[0]).tree.size
                return int(sum(n for n, in db.execute("SELECT value FROM setting WHERE name = 'stored'"))) or size
    return 0


IN_SMALL_BATCHES = "import sys, btlog; btlog.Monitor.BATCH = 256; sys.exit(btlog.main())"


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_T58_killed_in_a_first_run(tmp_path: Path, kills: int) -> None:
    """SIGKILL at random moments, and as soon as there is progress: it is kept, and the end is always the same."""
    choose, count, mirror = random.Random(kills), 8000, tmp_path / "mirror"
    with contextlib.closing(StaticLog(tmp_path / "static", count)) as log:
        begun = time.monotonic()
        assert monitor(log.web.url, tmp_path / "whole").code == 0
        took, right = time.monotonic() - begun, rows_of(tmp_path / "whole")
        command = [sys.executable, "-c", IN_SMALL_BATCHES, *monitor_args(log.web.url, mirror)]
        size, parts = 0, 0
        for turn in range(kills):
            with subprocess.Popen(command, cwd=HERE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
                if turn % 3 == 2:  # a random moment, not a wait for something
                    time.sleep(choose.uniform(0.3, 0.3 + took))
                else:
                    while run.poll() is None and stored_size(mirror) <= size:
                        time.sleep(0.005)
                run.kill()
            assert stored_size(mirror) >= size  # nothing that was there is lost
            size = stored_size(mirror)
            parts += 0 < size < count
            if size == count:
                assert rows_of(mirror) == right
                shutil.rmtree(mirror)
                size = 0
        assert parts > kills // 3
        seen = monitor(log.web.url, mirror)
        assert (seen.code, seen.error) == (0, "")
    assert rows_of(mirror) == right
    assert call_btlog("fsck", "--storage-dir", str(mirror))[0] == 0


# --- Logging what an index has -----------------------------------------------------------------------------------------------------


def ingest(url: str, index: Web, folder: Path, *args: str) -> tuple[int, str, str]:
    key = ("--public-key", key_file(folder))
    return call_btlog("ingest", "--index-url", index.url, "--log-url", url, *key, *args)


def told_by_ingest(projects: int, logged: int, already: int, conflicts: int, failed: int) -> str:
    counts = f"{logged} files logged, {already} were logged already, {conflicts} conflicts, {failed} failed"
    return f"{projects} projects: {counts}\n"


def test_ingest_of_json(tmp_path: Path, log: LocalLog, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the index lists is logged, once; and a file that it has replaced is a conflict."""
    files = index_of([quiet(i) for i in range(50)])
    with contextlib.closing(FakeIndex(make(tmp_path / "index"), files)) as index:
        said = ingest(log.url, index, tmp_path, "quiet3", "Quiet_4")
        assert said == (3, told_by_ingest(2, 5, 0, 0, 1), "btlog: the index has no project Quiet_4\n")
        assert ingest(log.url, index, tmp_path) == (0, told_by_ingest(10, 45, 5, 0, 0), "")
        assert index_of(walk(log.url)) == files
        assert ingest(log.url, index, tmp_path) == (0, told_by_ingest(10, 0, 50, 0, 0), "")
        assert len(walk(log.url)) == 50
        assert ingest(log.url, index, tmp_path, "quiet3", "--proof-dir", str(tmp_path / "proofs"))[0] == 0
        proofs = {path_.name.removesuffix(".tlog-proof"): path_.read_bytes() for path_ in (tmp_path / "proofs").iterdir()}
        assert len(proofs) == 5
        assert {check_logged(Entry(n, files[n]), data, UNWITNESSED).tree.size for n, data in proofs.items()} == {50}
        index.files = {**files, OF_7.filename: "sha256:" + SUM_OF_A, NEW.filename: NEW.checksum}
        code, text, error = ingest(log.url, index, tmp_path)
        assert (code, text, error.count("\n")) == (1, told_by_ingest(10, 1, 49, 1, 0), 1)
        assert f"{OF_7.filename} is logged with another checksum, at index" in error
        assert len(walk(log.url)) == 51
        assert call_btlog("ingest", "--index-url", index.url, "--log-url", log.url)[0] == 1  # by the key that the log tells
        try_only(monkeypatch, 1)
        for answer, expected in [
            ((200, "application/json", b"<garbage>"), ""),
            ((200, "application/json", b'{"projects": [{"name": "q"}], "files": [7]}'), told_by_ingest(1, 0, 0, 0, 1)),
            ((404, "text/plain", b""), ""),
        ]:
            index.instead = lambda path_, answer=answer: answer  # type: ignore[misc]
            code, text, error = ingest(log.url, index, tmp_path)
            assert (code, text) == (3, expected)
            assert ("is no page of a package index" in error) is (answer[0] == 200)
    assert ingest(log.url, index, tmp_path)[0] == 3


def test_ingest_of_html(tmp_path: Path, log: LocalLog) -> None:
    """PEP 503: names are in the text, the hash in the fragment. What has no SHA-256 is said, and the rest is logged."""
    good = hashlib.sha256(b"good").hexdigest()
    links = [
        f"some-1.0.tar.gz #sha256={good}", f"some-1.1.tar.gz ?x=1#sha256={good.upper()}", "some-1.2.tar.gz ",
        "some-1.3.tar.gz #md5=d41d8cd98f00b204e9800998ecf8427e", f"some-1.4.tar.gz #sha256={good[1:]}",
        f"some-1&#x2B;local.tar.gz #sha256={good}&egg=x", f"some-2&#43;local.tar.gz #sha256={good}",
    ]  # fmt: skip
    files = {name: fragment for name, _, fragment in (link.partition(" ") for link in links)}
    with contextlib.closing(FakeIndex(make(tmp_path / "index"), files, html=True)) as index:
        code, text, error = ingest(log.url, index, tmp_path, "some")
        assert (code, text) == (3, told_by_ingest(1, 4, 0, 0, 3))
        lacking = re.findall(r"^btlog: some-1.(\d).tar.gz: the index does not give its SHA-256$", error, re.MULTILINE)
        assert lacking == ["2", "3", "4"]
        names = ["some-1.0.tar.gz", "some-1.1.tar.gz", "some-1+local.tar.gz", "some-2+local.tar.gz"]
        assert index_of(walk(log.url)) == dict.fromkeys(names, f"sha256:{good}")
        link = f'<a href="../files/some-4.zip#sha256={good}"><b>\n </b></a><a name="x">y</a><a href="z">'.encode()
        index.instead = lambda path_: (200, "text/html", link)  # where there is no text, the link has the name
        assert ingest(log.url, index, tmp_path, "some")[1].startswith("1 projects: 1 files logged")
        assert Entry.parse(walk(log.url)[-1]).filename == "some-4.zip"


def with_result(n: int, **more: Any) -> Callable[[list[dict[str, Any]]], list[dict[str, Any]]]:
    """Changes the n-th result of an answer to a bulk; what becomes None, leaves it."""

    def change(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        result = {name: value for name, value in {**lines[n + 1]["result"], **more}.items() if value is not None}
        return [*lines[: n + 1], {**lines[n + 1], "result": result}, *lines[n + 2 :]]

    return change


BATCH_OF_THREE = [quiet(i) for i in (0, 10, 20)]


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, list[dict[str, Any]]]:
    """The first checkpoint of a log, and its answer to a bulk of three entries."""
    with contextlib.closing(LocalLog(tmp_path_factory.mktemp("answered") / "log")) as log:
        return ask(log.url, "/checkpoint")[2], bulk(log.url, b"".join(map(as_line, BATCH_OF_THREE)))[1]


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda lines: lines, 0),
        (with_result(1, index=2), 1),
        (with_result(1, index=-1), 1),
        (with_result(1, index="x"), 1),
        (with_result(1, inclusionProof=[]), 1),
        (with_result(1, inclusionProof=5), 1),
        (with_result(1, inclusionProof=["x"]), 1),
        (with_result(1, inclusionProof=[b64(bytes(32))] * 2), 1),
        (with_result(1, status="error", error="no \x1b[2J", index=None), 3),
        (with_result(1, status="error", error="no", index=0), 1),
        (lambda lines: [lines[0], lines[2], lines[1], *lines[3:]], 1),
        (lambda lines: [*lines[:2], *lines[3:]], 1),
        (lambda lines: [*lines[:-1], {"type": "complete", "count": 2}], 1),
        (lambda lines: lines[:-1], 1),
        (lambda lines: lines[1:], 1),
        (lambda lines: [], 1),
        (lambda lines: [{**lines[0], "checkpoint": b64(SIGNED.encode())}, *lines[1:]], 1),
        (lambda lines: [{**lines[0], "checkpoint": b64(flip(30)(base64.b64decode(lines[0]["checkpoint"])))}, *lines[1:]], 1),
        (lambda lines: [{"type": "checkpoint"}, *lines[1:]], 1),
        (lambda lines: [lines[0], 5, *lines[2:]], 1),
        (lambda lines: [lines[0], {"result": None}, *lines[2:]], 1),
    ],
)
def test_ingest_believes_nothing(
    tmp_path: Path, answered: tuple[bytes, list[Any]], change: Callable[[list[Any]], list[Any]], code: int
) -> None:
    """T53, T55, T56: an answer that does not prove that each of the files is logged is refused."""
    note, honest = answered
    answer = b"".join(json.dumps(line).encode() + b"\n" for line in change(honest))
    liar = Liar(checkpoint=note, admin_bulk_append=answer)
    with (
        contextlib.closing(Local(liar.answer)) as log_,
        contextlib.closing(FakeIndex(tmp_path, index_of(BATCH_OF_THREE))) as index,
    ):
        got, text, error = ingest(log_.url, index, tmp_path)
    assert got == code, error
    assert ("3 files logged" in text, error.count("\n"), "\x1b" in error) == (code == 0, code != 0, False)


def test_ingest_asks_for_the_token(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret\n")
    (tmp_path / "token").chmod(0o600)
    with (
        contextlib.closing(LocalLog(tmp_path / "log", token="secret")) as log,
        contextlib.closing(FakeIndex(tmp_path, index_of([quiet(0)]))) as index,
    ):
        code, _, error = ingest(log.url, index, tmp_path)
        assert (code, "token" in error) == (2, True)
        assert ingest(log.url, index, tmp_path, "--write-token-file", str(tmp_path / "token"))[0] == 0


# --- Publishers: what an index says of attestations ------------------------------------------------------------------------

GITHUB = btlog.Publisher(
    "https://token.actions.githubusercontent.com",
    "https://github.com/trailofbits/pypi-attestations/.github/workflows/release.yml@refs/tags/v0.0.19",
)
ATTESTED = Entry("pypi_attestations-0.0.19.tar.gz", "sha256:9bb1add04b1b4e182be6b0b80931593f7a291eb49d69b4fd728a5d4cbcdc4bd3")
PROVENANCE = (HERE / ".ci" / "vectors" / "github.provenance.json").read_bytes()


def certificate_in(attestation: Any) -> bytes:
    return base64.b64decode(attestation["verification_material"]["certificate"])


CERTIFICATE = certificate_in(json.loads(PROVENANCE)["attestation_bundles"][0]["attestations"][0])


def der(tag: int, *inside: bytes) -> bytes:
    data = b"".join(inside)
    size = len(data).to_bytes((len(data).bit_length() + 7) // 8 or 1, "big")
    return bytes([tag, *(size if len(data) < 128 else [128 + len(size), *size])]) + data


def certificate(*extensions: bytes) -> bytes:
    """A certificate with these extensions, and with nothing else that is looked at."""
    inside = der(0x30, der(0xA0, der(2, b"\2")), der(2, b"\1"), der(0xA3, der(0x30, *extensions)))
    return der(0x30, inside, der(0x30, b""), der(3, b"\0"))


def extension(oid: bytes, value: bytes, critical: bytes = b"") -> bytes:
    return der(0x30, der(6, oid), critical, der(4, value))


NAMED = extension(btlog.SUBJECT_NAME, der(0x30, der(0x86, b"https://ci.example/x")), der(1, b"\xff"))
ISSUED, ISSUED_NEWLY = extension(btlog.BARE_ISSUER, b"https://ci.example"), extension(btlog.ISSUER, der(12, b"https://ci.example"))


def test_the_publisher_in_real_certificates() -> None:
    said = [btlog.certificate_publisher(CERTIFICATE)]
    for name in "gitlab", "email":
        attestation = json.loads((HERE / ".ci" / "vectors" / f"{name}.attestation.json").read_text())
        said.append(btlog.certificate_publisher(certificate_in(attestation)))
    gitlab = "https://gitlab.com", "https://gitlab.com/facutuesca/gitlab-oidc-project//.gitlab-ci.yml@refs/heads/main"
    assert said == [GITHUB, gitlab, ("https://github.com/login/oauth", "william@yossarian.net")]


@pytest.mark.parametrize(
    ("data", "publisher"),
    [
        (certificate(NAMED, ISSUED), ("https://ci.example", "https://ci.example/x")),
        (certificate(ISSUED_NEWLY, NAMED, ISSUED), ("https://ci.example", "https://ci.example/x")),
        (certificate(NAMED), None),
        (certificate(ISSUED), None),
        (certificate(), None),
        (certificate(NAMED, ISSUED, ISSUED), Malformed),
        (certificate(NAMED, ISSUED, extension(btlog.ISSUER, der(12, b"https://other.example"))), Malformed),
        (certificate(NAMED, extension(btlog.ISSUER, der(19, b"https://ci.example"))), Malformed),
        (certificate(ISSUED, extension(btlog.SUBJECT_NAME, der(0x30, der(0x86, b"a"), der(0x86, b"b")))), Malformed),
        (certificate(ISSUED, extension(btlog.SUBJECT_NAME, der(0x30, der(0x82, b"ci.example")))), Malformed),
        (certificate(ISSUED, extension(btlog.SUBJECT_NAME, der(0x30, der(0x86, b"\xff")))), Malformed),
        (certificate(NAMED, extension(btlog.BARE_ISSUER, b"\xff")), Malformed),
        (certificate(NAMED, extension(btlog.BARE_ISSUER, b"x", der(1, b"\0"))), Malformed),
        (certificate(NAMED, der(0x30, der(1, b"\xff"), der(6, btlog.BARE_ISSUER), der(4, b"x"))), Malformed),
        (certificate(NAMED, der(0x31, der(6, btlog.BARE_ISSUER), der(4, b"x"))), Malformed),
        (der(0x30, der(0x30), der(0x30)), Malformed),
        (certificate(NAMED, ISSUED) + b"\0", Malformed),
        (b"", Malformed),
    ],
)
def test_the_publisher_in_a_certificate(data: bytes, publisher: Any) -> None:
    if publisher is Malformed:
        with pytest.raises(Malformed):
            btlog.certificate_publisher(data)
    else:
        assert btlog.certificate_publisher(data) == publisher


def test_der_has_one_form() -> None:
    """X.690 section 10.1: the shortest length, and nothing else."""
    assert btlog.parse_der(b"\x04\x02ab\x05\0") == [(4, b"ab"), (5, b"")]
    for count in 0, 1, 127, 128, 255, 256, 65535, 65536:
        assert btlog.parse_der(der(4, bytes(count))) == [(4, bytes(count))]
    bad = [b"\x04", b"\x04\x01", b"\x04\x80\0\0", b"\x04\x81\x01a", b"\x04\x82\0\x80" + bytes(128), b"\x1f\x01a",
           b"\x04\x84\x01\0\0\0", b"\x04\xff" + bytes(200), b"\x04\x81", b"\x04\x82\x01"]  # fmt: skip
    for data in bad:
        with pytest.raises(Malformed):
            btlog.parse_der(data)


def test_a_changed_certificate_is_read_or_refused() -> None:
    """One byte changed, or cut off anywhere: no other exception, and no publisher out of nothing."""
    seen = {"read": 0, "refused": 0}
    for case in itertools.chain(mutations(CERTIFICATE), (CERTIFICATE[:n] for n in range(len(CERTIFICATE)))):
        try:
            seen["read"] += btlog.certificate_publisher(case) is not None
        except Malformed:
            seen["refused"] += 1
    assert seen["read"] > 500  # its key and its signature are not looked at
    assert seen["refused"] > len(CERTIFICATE)


def provenance(*attestations: Any, **publisher: Any) -> bytes:
    return json.dumps({"version": 1, "attestation_bundles": [{"publisher": publisher, "attestations": attestations}]}).encode()


def attestation(data: bytes | None, entry_: Entry = ATTESTED) -> dict[str, Any]:
    statement = {"subject": [{"name": entry_.filename, "digest": {"sha256": entry_.checksum[7:]}}]}
    material = {} if data is None else {"certificate": b64(data)}
    return {"envelope": {"statement": b64(json.dumps(statement).encode())}, "verification_material": material}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (PROVENANCE, {GITHUB: "certificate"}),
        (provenance(attestation(certificate(NAMED, ISSUED)), attestation(CERTIFICATE)),
         {("https://ci.example", "https://ci.example/x"): "certificate", GITHUB: "certificate"}),
        (provenance(kind="GitHub", repository="a/b", workflow="c.yml"),
         {(GITHUB.issuer, "https://github.com/a/b/.github/workflows/c.yml"): "index"}),
        (provenance(attestation(None), kind="GitLab", repository="a/b", workflow_filepath=".x.yml"),
         {("https://gitlab.com", "https://gitlab.com/a/b//.x.yml"): "index"}),
        (provenance(attestation(certificate()), kind="Google", email="a@example.com"),
         {("https://accounts.google.com", "a@example.com"): "index"}),
        (provenance(kind="Other", email="a@example.com"), None),
        (provenance(kind="GitHub", repository=["a"], workflow="c.yml"), None),
        (provenance(kind="GitHub", repository="a/b"), None),
        (provenance(attestation(CERTIFICATE, entry_=OF_7)), None),
        (provenance(attestation(CERTIFICATE[:-1]), kind="Google", email="a@example.com"), None),
        (provenance(attestation(certificate(ISSUED, extension(btlog.SUBJECT_NAME, der(0x30, der(0x86, b"a\nb")))))), None),
        (provenance(*(attestation(certificate(extension(btlog.BARE_ISSUER, b"%d" % i), NAMED)) for i in range(9))), None),
        (b'{"attestation_bundles": []}', None),
        (b'{"attestation_bundles": {}}', None),
        (b"[]", None),
        (b"[" * 100_000, None),
    ],
)  # fmt: skip
def test_the_publisher_in_a_provenance_object(data: bytes, said: dict[Any, str] | None) -> None:
    """PEP 740: by the certificate, or else by what the index says of it; and of this file."""
    if said is None:
        with pytest.raises(Malformed):
            btlog.parse_provenance(data, ATTESTED.checksum)
    else:
        assert btlog.parse_provenance(data, ATTESTED.checksum) == said


def test_ingest_logs_publishers(tmp_path: Path, log: LocalLog) -> None:
    """With the file; and a file that has one is not logged again without it."""
    plain = "pypi_attestations-0.0.18.tar.gz"
    with (
        contextlib.closing(FakeIndex(make(tmp_path / "index"), {ATTESTED.filename: ATTESTED.checksum, plain: "sha256:" + SUM_OF_A})) as index,
        contextlib.closing(Web(tmp_path / "index", "/integrity")) as other,
    ):
        index.provenance = {ATTESTED.filename: f"{other.url}/x/provenance"}
        other.instead = lambda path_: (200, "application/json", PROVENANCE)
        code, text, error = ingest(log.url, index, tmp_path, "--proof-dir", str(tmp_path / "proofs"))
        told = "; publishers: 1 by its certificate, 0 by the index's word\n"
        assert (code, text, error) == (0, told_by_ingest(1, 2, 0, 0, 0)[:-1] + told, "")
        assert {Entry.parse(entry_).publisher for entry_ in walk(log.url)} == {GITHUB, None}
        proof = (tmp_path / "proofs" / f"{ATTESTED.filename}.tlog-proof").read_bytes()
        check_logged(dataclasses.replace(ATTESTED, publisher=GITHUB), proof, UNWITNESSED)
        assert ingest(log.url, index, tmp_path)[1].startswith(told_by_ingest(1, 0, 2, 0, 0)[:-1])
        index.provenance = {}
        assert ingest(log.url, index, tmp_path)[1] == told_by_ingest(1, 0, 2, 0, 0)
        index.provenance = {plain: f"{other.url}/x/provenance"}  # of the other file
        code, text, error = ingest(log.url, index, tmp_path)
        assert (code, text) == (0, told_by_ingest(1, 0, 2, 0, 0))
        assert error == f"btlog: {plain} is logged without a publisher: an attestation of another file\n"
        other.instead = lambda path_: (503, "text/plain", b"")
        index.files["pypi_attestations-0.0.20.tar.gz"] = "sha256:" + SUM_OF_A
        index.provenance = {"pypi_attestations-0.0.20.tar.gz": f"{other.url}/x/provenance"}
        with pytest.MonkeyPatch.context() as patch:
            try_only(patch, 1)
            code, text, error = ingest(log.url, index, tmp_path)  # it may have one: it is not logged without it
        assert (code, text) == (3, told_by_ingest(1, 0, 2, 0, 1))
        assert len(walk(log.url)) == 2


def test_add_with_a_publisher(tmp_path: Path, log: LocalLog) -> None:
    (tmp_path / "x-1.0.tar.gz").write_bytes(b"x")
    args = "add", str(tmp_path / "x-1.0.tar.gz"), "--log-url", log.url, "--public-key", key_file(tmp_path)
    assert call_btlog(*args)[0] == 0
    assert call_btlog(*args, "--publisher-issuer", GITHUB.issuer)[0] == 2
    assert call_btlog(*args, "--publisher-issuer", GITHUB.issuer, "--publisher-subject", GITHUB.subject)[0] == 0
    assert call_btlog(*args)[0] == 0
    assert [Entry.parse(entry_).publisher for entry_ in walk(log.url)] == [None, GITHUB]
    assert call_btlog("verify", *args[1:], "--publisher-subject", ".*release.yml@.*")[0] == 0


# --- The whole of an index, again and again ----------------------------------------------------------------------------------


def ingest_on(url: str, index: Web, folder: Path, *args: str) -> tuple[int, str, str, int]:
    """What a run that remembers tells, and how many requests it took."""
    before = len(index.asked)
    return *ingest(url, index, folder, "--database-path", str(folder / "ingest.db"), *args), len(index.asked) - before


@pytest.mark.parametrize("kind", ["serials", "tags"])
def test_ingest_asks_for_what_has_changed(tmp_path: Path, log: LocalLog, kind: str) -> None:
    """By the index's serial numbers, one request tells it all; by ETags, there is one for each project."""
    files = index_of([quiet(i) for i in range(50)])
    with contextlib.closing(FakeIndex(make(tmp_path / "index"), files)) as index:
        index.serials, index.tags = ({f"quiet{n}": 7 for n in range(10)} if kind == "serials" else {}), kind == "tags"
        assert ingest_on(log.url, index, tmp_path) == (0, told_by_ingest(10, 50, 0, 0, 0), "", 11)
        same = f"{told_by_ingest(10, 0, 0, 0, 0)[:-1]}; 10 projects are unchanged\n"
        assert ingest_on(log.url, index, tmp_path) == (0, same, "", 1 if kind == "serials" else 11)
        index.files = {**files, "quiet3-9999-py3-none-any.whl": "sha256:" + SUM_OF_A}
        index.serials = index.serials and {**index.serials, "quiet3": 8}
        changed = f"{told_by_ingest(10, 1, 5, 0, 0)[:-1]}; 9 projects are unchanged\n"
        assert ingest_on(log.url, index, tmp_path) == (0, changed, "", 2 if kind == "serials" else 11)
        assert len(walk(log.url)) == 51
        index.files |= {OF_7.filename: "sha256:" + SUM_OF_A, "quiet4-x-py3-none-any.whl": ""}
        index.serials = index.serials and {**index.serials, "quiet7": 8, "quiet4": 9}
        failed = f"{told_by_ingest(10, 0, 9, 1, 1)[:-1]}; 8 projects are unchanged\n"
        assert ingest_on(log.url, index, tmp_path)[:2] == (1, failed)
        assert ingest_on(log.url, index, tmp_path)[:2] == (0, same)
        assert ingest_on(log.url, index, tmp_path, "--retry-failed")[:2] == (1, failed)


def test_ingest_follows_a_cache_that_is_behind(tmp_path: Path, log: LocalLog) -> None:
    """A page that is older than the list of projects says is read again in the next round."""
    with contextlib.closing(FakeIndex(make(tmp_path / "index"), index_of([quiet(i) for i in range(5)]))) as index:
        index.serials = dict.fromkeys((f"quiet{n}" for n in range(5)), 7)
        took = []
        for index.serial in "6", "6", "7", "7":
            took.append(ingest_on(log.url, index, tmp_path)[3])
        assert took == [6, 6, 6, 1]


def test_what_is_not_logged_is_not_done(tmp_path: Path, log: LocalLog, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page that was not there, attestations that can't be had for once, a file that a proof is wanted of later."""
    try_only(monkeypatch, 1)
    with (
        contextlib.closing(FakeIndex(make(tmp_path / "index"), {ATTESTED.filename: ATTESTED.checksum})) as index,
        contextlib.closing(Web(tmp_path / "index")) as other,
    ):
        index.serials, index.provenance = {"pypi-attestations": 7}, {ATTESTED.filename: f"{other.url}/p"}
        index.instead = lambda path_: (404, "text/plain", b"") if path_ != "/" else index.page(path_)
        assert ingest_on(log.url, index, tmp_path)[0] == 3
        index.instead = lambda path_: (304, "text/plain", b"") if path_ != "/" else index.page(path_)
        code, _, error, _ = ingest_on(log.url, index, tmp_path)
        assert (code, "answers 304 to a plain request" in error) == (3, True)
        index.instead = index.page
        other.instead = lambda path_: (503, "text/plain", b"")
        assert ingest_on(log.url, index, tmp_path)[0] == 3
        assert walk(log.url) == []
        other.instead = lambda path_: (200, "application/json", PROVENANCE)
        assert ingest_on(log.url, index, tmp_path)[::3] == (0, 2)
        assert Entry.parse(walk(log.url)[0]).publisher == GITHUB
        assert ingest_on(log.url, index, tmp_path)[::3] == (0, 1)
        assert ingest_on(log.url, index, tmp_path, "--proof-dir", str(tmp_path / "proofs"))[0] == 0
        assert [path_.name for path_ in (tmp_path / "proofs").iterdir()] == [f"{ATTESTED.filename}.tlog-proof"]


def test_what_ends_while_attestations_are_slow_is_not_done(tmp_path: Path, log: LocalLog) -> None:
    """SIGTERM: it ends at once, and the next start logs what was not logged."""
    slow = threading.Event()
    with (
        contextlib.closing(FakeIndex(make(tmp_path / "index"), {ATTESTED.filename: ATTESTED.checksum})) as index,
        contextlib.closing(Web(tmp_path / "index")) as other,
    ):
        index.serials, index.provenance = {"pypi-attestations": 7}, {ATTESTED.filename: f"{other.url}/p"}

        def late(path_: str) -> Answered:
            slow.wait(20)
            return 200, "application/json", PROVENANCE

        other.instead = late
        args = ("ingest", "--index-url", index.url, "--log-url", log.url, "--public-key", key_file(tmp_path),
                "--database-path", str(tmp_path / "ingest.db"))  # fmt: skip
        with process(*args, "--follow") as first:
            eventually(lambda: other.asked)
            begun = time.monotonic()
            code, error = first.stop()
            assert (code, "Traceback" in error, time.monotonic() - begun < 10) == (0, False, True)
        slow.set()
        assert call_btlog(*args)[0] == 0
        assert len(walk(log.url)) == 1


@pytest.mark.parametrize("page", [
    {"files": [{"filename": "a-1.0\ud800.tar.gz", "url": "x", "hashes": {"sha256": "0" * 64}}]},
    {"files": [{"filename": f"a-{'1' * 245}.zip", "url": "x", "hashes": {"sha256": "0" * 64}}]},
])  # fmt: skip
def test_no_name_stops_an_index_from_being_logged(tmp_path: Path, log: LocalLog, page: dict[str, Any]) -> None:
    with contextlib.closing(FakeIndex(make(tmp_path / "index"), index_of([quiet(0)]))) as index:
        listing = {"projects": [{"name": name, "_last-serial": 5} for name in ("a", "b\ud800", "quiet0")]}
        answers = {"/": listing, "/a/": page}
        index.instead = lambda path_: (200, btlog.JSON_PAGE, json.dumps(answers[path_]).encode()) if path_ in answers else index.page(path_)
        code, _, error, _ = ingest_on(log.url, index, tmp_path, "--proof-dir", str(tmp_path / "proofs"))
        assert (code, "Traceback" in error) == (3, False)
        assert Entry.parse(quiet(0)).filename in [Entry.parse(data).filename for data in walk(log.url)]
        assert ingest_on(log.url, index, tmp_path, "--proof-dir", str(tmp_path / "proofs"))[0] == 3  # the list has a wrong name


def test_ingest_remembers_for_one_index_and_one_log(tmp_path: Path, log: LocalLog) -> None:
    with contextlib.closing(FakeIndex(make(tmp_path / "index"), index_of([quiet(0)]))) as index:
        assert ingest_on(log.url, index, tmp_path)[0] == 0
        with contextlib.closing(FakeIndex(tmp_path / "index", {})) as other:
            assert ingest_on(log.url, other, tmp_path)[0] == 2
        with contextlib.closing(LocalLog(tmp_path / "older")) as older:
            code, _, error, _ = ingest_on(older.url, index, tmp_path)
        assert (code, "the log has fewer entries than before" in error) == (3, True)


def test_the_credentials_of_an_index(tmp_path: Path, log: LocalLog, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the environment or from a netrc file, to the index's own server alone, and in no message."""
    with (
        contextlib.closing(FakeIndex(make(tmp_path / "index"), {ATTESTED.filename: ATTESTED.checksum})) as index,
        contextlib.closing(Web(tmp_path / "index")) as other,
    ):
        right = index.page
        index.instead = lambda path_: right(path_) if "Authorization" in index.heads[-1][1] else (401, "text/plain", b"who?")
        other.instead = lambda path_: (200, "application/json", PROVENANCE)
        index.provenance = {ATTESTED.filename: f"{other.url}/provenance"}
        code, _, error = ingest(log.url, index, tmp_path)
        assert (code, "answers 401 (give a name and a password by a netrc file)" in error) == (3, True)
        (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password s3cret\n")
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
        assert ingest(log.url, index, tmp_path)[0] == 0
        assert index.heads[-1][1]["Authorization"] == f"Basic {b64(b'me:s3cret')}"
        assert all("Authorization" not in head for _, head in other.heads)
        (tmp_path / "netrc").write_text("machine 127.0.0.1 login me passwort s3cret\n")
        code, _, error = ingest(log.url, index, tmp_path)
        assert (code, "s3cret" in error, "netrc can't be parsed: line 1" in error) == (2, False, True)
        monkeypatch.setenv("BTLOG_INDEX_USERNAME", "you")
        monkeypatch.setenv("BTLOG_INDEX_PASSWORD", "0ther")
        assert ingest(log.url, index, tmp_path)[0] == 0
        assert index.heads[-1][1]["Authorization"] == f"Basic {b64(b'you:0ther')}"
        code, _, error = call_btlog("ingest", "--index-url", "http://me:s3cret@127.0.0.1:9/simple", "--log-url", log.url)
        assert (code, "s3cret" in error, "netrc" in error) == (2, False, True)


# --- The whole of it, with a real index and a real web server ---------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextlib.contextmanager
def program(port: int, *command: str, cwd: Path) -> Iterator[str]:
    """A server that is not ours, on a port of loopback, once it answers."""
    with (cwd / "output").open("w") as output:
        process_ = subprocess.Popen(command, cwd=cwd, stdout=output, stderr=subprocess.STDOUT)

    def answers() -> bool:
        assert process_.poll() is None, (cwd / "output").read_text()
        with contextlib.suppress(OSError):
            return ask(f"http://127.0.0.1:{port}", "/")[0] > 0
        return False

    try:
        eventually(answers)
        yield f"http://127.0.0.1:{port}"
    finally:
        process_.terminate()
        try:
            process_.wait(10)
        except subprocess.TimeoutExpired:
            process_.kill()
            process_.wait()


NGINX = """
daemon off; master_process off; pid nginx.pid; error_log stderr;
events { }
http {
    access_log off;
    default_type application/octet-stream;
    client_body_temp_path t1; proxy_temp_path t2; fastcgi_temp_path t3; uwsgi_temp_path t4; scgi_temp_path t5;
    server { listen 127.0.0.1:%d; root %s; location = / { return 204; } }
}
"""


@pytest.mark.slow
def test_an_index_a_log_two_witnesses_a_web_server_and_a_monitor(tmp_path: Path) -> None:
    """pypiserver → ingest → log with two witnesses → export → nginx → monitor; then a file on the index is replaced."""
    nginx = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
    assert nginx, "this test needs nginx (Debian's package of that name)"
    assert importlib.util.find_spec("pypiserver"), "this test needs pypiserver (pip install pypiserver)"
    wheels, out, home, port = make(tmp_path / "wheels"), tmp_path / "out", make(tmp_path / "nginx"), free_port()
    for name in "one", "two", "three":
        tiny_wheel(wheels, name, "hello")

    def btlog_says(code: int, command: str, *args: str) -> str:
        done = run_btlog(command, *args, "--policy", "policy", cwd=tmp_path)
        assert (done.returncode, done.stderr == "" or code > 0) == (code, True), done
        return done.stdout + done.stderr

    assert run_btlog("keygen", "--origin", "log.example/loop", cwd=tmp_path).returncode == 0
    with contextlib.ExitStack() as stack:
        lines = [f"log {(tmp_path / 'public.key').read_text().strip()}"]
        for i in range(2):
            signer = new_key(f"w{i}.example/loop")
            (tmp_path / f"w{i}.key").write_text(signer.encode())
            (tmp_path / f"w{i}.key").chmod(0o600)
            args = ("--database-path", f"w{i}.db", "--private-key", f"w{i}.key", "--log-public-key", "public.key")
            url = stack.enter_context(running("witness", *args, cwd=tmp_path)).url
            lines.append(f"witness w{i} {btlog.encode_vkey(signer.key)} {url}")
        (tmp_path / "policy").write_text("\n".join([*lines, "group both 2 w0 w1", "quorum both", ""]))
        args = ("--private-key", "private.key", "--public-key", "public.key", "--policy", "policy")
        log = stack.enter_context(running("serve", "--storage-dir", "log", *args, cwd=tmp_path))
        index_command = (
            sys.executable, "-m", "pypiserver", "run", "--disable-fallback", "--hash-algo", "sha256",
            "-i", "127.0.0.1", "-p", str(port), str(wheels),
        )  # fmt: skip
        index = ("--index-url", f"http://127.0.0.1:{port}/simple/")
        ingest_all = ("ingest", *index, "--log-url", log.url)
        with program(port, *index_command, cwd=make(tmp_path / "index")):
            assert btlog_says(0, *ingest_all) == told_by_ingest(3, 3, 0, 0, 0)
            exporter = stack.enter_context(
                process("export", str(out), "--storage-dir", str(tmp_path / "log"), "--follow", "--frequency", "0.05")
            )
            exporter.printed("the tree of size 3")
            web_port = free_port()
            (home / "nginx.conf").write_text(NGINX % (web_port, out))
            command = (nginx, "-p", str(home), "-e", "stderr", "-c", str(home / "nginx.conf"))
            web = ("--log-url", stack.enter_context(program(web_port, *command, cwd=home)))
            watch = ("monitor", *web, *index, "--storage-dir", "mirror", "--max-age", "600")
            assert "has all 3 entries of the log, 3 of them new: nothing found" in btlog_says(0, *watch)
            file = str(wheels / "one-1.0-py3-none-any.whl")
            assert "cosigned by 2 witnesses" in btlog_says(0, "verify", file, *web)
            tiny_wheel(wheels, "four", "hello")
        with program(port, *index_command, cwd=tmp_path / "index"):  # anew, as it keeps hashes for a while
            btlog_says(0, *watch)  # it asks about projects of which something is logged
            assert "4 projects: 1 files logged, 3 were" in btlog_says(0, *ingest_all)
            exporter.printed("the tree of size 4, 1 entries")
            btlog_says(0, *watch)
            two = tiny_wheel(wheels, "two", "tampered")
        with program(port, *index_command, cwd=tmp_path / "index"):
            said = btlog_says(1, *watch)
            assert said.count("FOUND") == 1
            assert "FOUND index-differs: the index has two-1.0-py3-none-any.whl with sha256:" in said
            assert "1 conflicts" in btlog_says(1, *ingest_all)
            assert "not logged, but with another checksum" in btlog_says(1, "verify", str(two), *web)
        assert exporter.stop() == (0, "")
        assert run_btlog("fsck", "--storage-dir", "mirror", cwd=tmp_path).returncode == 0


def upload(index: str, file: Path) -> None:
    """Uploads a file as twine does, as devpi's root."""
    fields = {":action": "file_upload", "name": file.name.partition("-")[0], "version": file.name.split("-")[1]}
    parts = [f'Content-Disposition: form-data; name="{name}"\r\n\r\n{value}'.encode() for name, value in fields.items()]
    parts.append(f'Content-Disposition: form-data; name="content"; filename="{file.name}"\r\n\r\n'.encode() + file.read_bytes())
    body = b"".join(b"--x\r\n" + part + b"\r\n" for part in parts) + b"--x--\r\n"
    status, _, said = ask(index, urllib.parse.urlsplit(index).path, "POST", body, Content_Type="multipart/form-data; boundary=x",
                          Authorization=f"Basic {b64(b'root:')}")  # fmt: skip
    assert status == 200, said


@contextlib.contextmanager
def package_index(kind: str, folder: Path) -> Iterator[tuple[str, Callable[[Path], object]]]:
    """A real package index: its URL, and what adds a file to it."""
    port = free_port()
    if kind == "pypiserver":
        files = make(folder / "files")
        command = [sys.executable, "-m", "pypiserver", "run", "--disable-fallback", "--hash-algo", "sha256", "-i", "127.0.0.1",
                   "-p", str(port), str(files)]  # fmt: skip
        with program(port, *command, cwd=make(folder / "index")) as url:
            yield f"{url}/simple/", lambda file: shutil.copy(file, files)
        return
    found_ = Path(sys.executable).parent
    assert (found_ / "devpi-server").exists(), "this test needs devpi-server (uv tool install devpi-server)"
    server = make(folder / "index")
    subprocess.run([found_ / "devpi-init", "--serverdir", str(server / "data"), "--no-root-pypi"], check=True, capture_output=True)
    command = [str(found_ / "devpi-server"), "--serverdir", str(server / "data"), "--host", "127.0.0.1", "--port", str(port)]
    with program(port, *command, cwd=server) as url:
        head = {"Authorization": f"Basic {b64(b'root:')}", "Content_Type": "application/json"}
        assert ask(url, "/root/dev", "PUT", b'{"bases": []}', **head)[0] == 200
        yield f"{url}/root/dev/+simple/", lambda file: upload(f"{url}/root/dev/", file)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pypiserver", "devpi"])
def test_a_real_index_is_followed(tmp_path: Path, log: LocalLog, kind: str) -> None:
    """What is uploaded is logged within a round; also after a kill; each file once."""
    with package_index(kind, tmp_path) as (url, add_to_index):
        add_to_index(tiny_wheel(make(tmp_path / "dist"), "one", "hello"))
        args = ("ingest", "--index-url", url, "--log-url", log.url, "--public-key", key_file(tmp_path), "--follow",
                "--frequency", "0.1", "--database-path", str(tmp_path / "ingest.db"))  # fmt: skip

        def names() -> list[str]:
            return [Entry.parse(data).filename.partition("-")[0] for data in walk(log.url)]

        follower = process(*args)
        with follower as first:
            first.printed(told_by_ingest(1, 1, 0, 0, 0)[:-1])
            add_to_index(tiny_wheel(tmp_path / "dist", "two", "hello"))
            eventually(lambda: names() == ["one", "two"])
            first.process.kill()
        add_to_index(tiny_wheel(tmp_path / "dist", "one", "hello", "2.0"))
        with process(*args) as second:
            eventually(lambda: names() == ["one", "two", "one"])
            assert second.stop()[0] == 0


@pytest.mark.slow
def test_an_index_is_logged_by_a_process_that_is_killed_again_and_again(tmp_path: Path, log: LocalLog) -> None:
    """A simulated index of 2,000 projects: ten kills on the way cost at most a few hundred requests, and no file."""
    files = {f"p{i}-{k}.0-py3-none-any.whl": "sha256:" + hashlib.sha256(b"%d %d" % (i, k)).hexdigest() for i in range(2000) for k in range(5)}
    with contextlib.closing(FakeIndex(make(tmp_path / "index"), {})) as index:
        index.serials = {f"p{i}": i for i in range(2000)}
        by_project = {f"p{i}": dict(itertools.islice(files.items(), 5 * i, 5 * i + 5)) for i in range(2000)}

        def page(path_: str) -> Answered | None:
            index.files = by_project[path_.strip("/")] if path_ != "/" else {f"p{i}-1-x.whl": "" for i in range(2000)}
            return index.page(path_)

        lock = threading.Lock()

        def one_at_a_time(path_: str) -> Answered | None:
            with lock:
                return page(path_)

        index.instead = one_at_a_time
        args = ("ingest", "--index-url", index.url, "--log-url", log.url, "--public-key", key_file(tmp_path),
                "--database-path", str(tmp_path / "ingest.db"))  # fmt: skip
        for n in range(10):
            running_ = subprocess.Popen([sys.executable, str(SOURCE), *args], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            seen_ = len(index.asked)
            eventually(lambda seen_=seen_: len(index.asked) > seen_ + 100, 60)  # type: ignore[misc]
            time.sleep(random.Random(n).random() / 2)
            running_.kill()
            running_.wait()
        assert call_btlog(*args)[0] == 0
        assert index_of(walk(log.url)) == files
        assert len(walk(log.url)) == len(files)
        pages_asked = len([path_ for path_ in index.asked if path_ != "/simple/"])
        assert pages_asked < 2000 + 10 * 600
        asked = len(index.asked)
        assert call_btlog(*args)[0] == 0
        assert len(index.asked) == asked + 1


# --- The shape of the file ------------------------------------------------------------------------------------------------------------------

TEXT = SOURCE.read_text()
TREE = ast.parse(TEXT)
NODES = list(ast.walk(TREE))
PARTS = {m[1]: TEXT[: m.start()].count("\n") + 1 for m in re.finditer(r"^# === (Part \w+): .*$", TEXT, re.MULTILINE)}


def test_part_one_is_small_and_pure() -> None:
    assert list(PARTS) == ["Part I", "Part II", "Part III", "Part IV", "Part V"]
    first, end = PARTS["Part I"], PARTS["Part II"]
    post_quantum = TEXT[: TEXT.index("# === Part I, continued: ")].count("\n") + 1
    assert (post_quantum - first <= 600, end - post_quantum <= 130) == (True, True)
    imports = [node for node in TREE.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    imported = {a.asname or a.name.partition(".")[0] for node in imports for a in node.names}
    nodes = [node for node in NODES if first <= getattr(node, "lineno", 0) < end]
    used = {node.id for node in nodes if isinstance(node, ast.Name)}
    assert used & imported <= {
        "base64", "dataclass", "dataclasses", "field", "functools", "hashlib", "re", "exceptions", "signing",
        "Path",
        "Collection", "Iterable", "Sequence", "NamedTuple",
    }  # fmt: skip
    calls = [node.func for node in nodes if isinstance(node, ast.Call)]
    called = [(func.id, func.lineno) for func in calls if isinstance(func, ast.Name)]
    assert not {name for name, _ in called} & {"print", "input", "exec", "eval", "__import__", "globals"}
    assert TEXT[: TEXT.index("# === Part II:")].count(" open(") == 1  # of verify_file
    [decimal] = [node for node in TREE.body if isinstance(node, ast.FunctionDef) and node.name == "parse_decimal"]
    ints = [line for name, line in called if name == "int"]
    assert len(ints) == 2
    assert all(decimal.lineno < line <= (decimal.end_lineno or 0) for line in ints)  # nothing else calls int()


SECTIONS = [TEXT[: m.start()].count("\n") + 1 for m in re.finditer(r"^# (?:---|===) ", TEXT, re.MULTILINE)]


def test_sections_stand_in_dependency_order() -> None:
    """A section uses only what itself or a section above it defines; annotations may look ahead."""
    defined: dict[str, int] = {}
    for node in TREE.body:
        names = [node.name] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else []
        names += [t.id for t in getattr(node, "targets", []) if isinstance(t, ast.Name)]
        defined.update(dict.fromkeys(names, node.lineno))

    section = functools.partial(bisect.bisect_right, SECTIONS)
    annotated = [getattr(node, field, None) for node in NODES for field in ("annotation", "returns")]
    annotations = {id(inner) for node in annotated if node for inner in ast.walk(node)}
    uses = [node for node in NODES if isinstance(node, ast.Name) and node.id in defined and id(node) not in annotations]
    wrong = [f"line {node.lineno} uses {node.id}" for node in uses if section(defined[node.id]) > section(node.lineno)]
    assert wrong == []


def test_functions_are_small_and_documented() -> None:
    for node in NODES:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            doc = ast.get_docstring(node, clean=False)
            length = (node.end_lineno or 0) - node.lineno + 1 - (len(doc.splitlines()) if doc else 0)
            assert length <= 45, f"{node.name} has {length} lines"
        assert not isinstance(node, ast.Assert)
        assert not isinstance(node, ast.ExceptHandler) or node.type is not None
    for name in btlog.__all__:
        assert getattr(btlog, name).__doc__, name


def test_terms_of_the_file_are_used_and_have_no_second_word() -> None:
    terms = re.findall(r"^  ([a-z]+)  +[a-z0-9]", btlog.__doc__ or "", re.MULTILINE)
    assert terms == ["submission", "round", "part", "mirror", "finding", "target", "gate"]
    body = TEXT.partition('"""\n\n')[2]
    for term in terms:
        assert len(re.findall(rf"(?i){term}", body)) >= 10, term
    text = re.sub(r'"""PAGE|<script>.*?</script>', "", body, flags=re.DOTALL)
    for other in "replica", "shard", "sequencing", "witness caller":
        assert not re.search(rf"(?i)\b{other}\b", text), other


def test_P3_files_at_the_top() -> None:
    """And what the first command of the README makes here is no file of the project."""
    ignored = [line for line in (HERE / ".gitignore").read_text().split() if not line.startswith("#")]
    there = {path_.name for path_ in HERE.iterdir() if not path_.name.startswith(".")}
    there = {name for name in there if not any(fnmatch.fnmatch(name, pattern.rstrip("/")) for pattern in ignored)}
    assert there == {"btlog.py", "test_btlog.py", "README.md", "Dockerfile", "LICENSE"}


# --- The sequencer, in a simulated world ---------------------------------------------------------------------------------------


class SequencerWorld:
    """A sequencer with a clock, a disk and witnesses that chance decides of: one seed is one history."""

    def __init__(self, seed_: int) -> None:
        self.r, self.now, self.count = random.Random(seed_), 0.0, 0  # of entries that are on disk
        self.keys = [btlog.as_witness(new_key(f"w{i}.example").key) for i in range(self.r.choice([0, 1, 3]))]
        self.quorum = Quorum((len(self.keys) + 1) // 2, tuple(self.keys))
        self.machine = btlog.Sequencer(
            self.signed(), None if self.keys else self.signed(), Policy((LOG,), tuple(self.keys), self.quorum), self.keys,
            btlog.LogOptions(),
        )
        self.later: list[tuple[float, int, Callable[[], None]]] = []  # what witnesses will answer
        self.waiting, self.answers = list[btlog.Submission](), dict[int, str]()
        self.faulty, self.lost, self.halts = True, False, 0
        self.cosigned: dict[int, set[VerifierKey]] = {}  # by size

    def signed(self) -> btlog.SignedNote:
        root = hashlib.sha256(str(self.count).encode()).digest() if self.count else btlog.EMPTY_ROOT
        return btlog.SignedNote.of(seal(Tree(self.count, root)))

    def step(self) -> None:
        """Something happens; then the machine is asked what to do, until it waits."""
        chance = self.r.random()
        if chance < 0.4 and not self.lost:
            submission = btlog.Submission([b"x"] * self.r.choice([1, 1, 3, 70]), True)
            with contextlib.suppress(btlog.Unavailable):
                self.machine.submit(submission)
                self.waiting.append(submission)
        elif chance < 0.45 and self.waiting:
            self.machine.give_up(self.r.choice(self.waiting))
        self.now += self.r.choice([0, 0.01, 0.3, 6])
        while self.later and min(self.later)[0] <= self.now:
            self.later.remove(first := min(self.later, key=lambda item: item[:2]))
            first[2]()
        while action := self.machine.next(self.now):
            self.do(action)
        assert self.machine.wake_at() > self.now or self.machine.over or self.lost

    def do(self, action: btlog.Action) -> None:
        machine, fault = self.machine, self.r.random() < 0.2 and self.faulty
        if isinstance(action, btlog.Answer):
            self.answer(action)
        elif isinstance(action, btlog.Halt):
            self.halts += 1
        elif isinstance(action, btlog.Ask):
            for key in self.keys:
                if self.r.random() < (0.7 if self.faulty else 1):
                    answer = functools.partial(self.witness, action.round, key, self.r.random() < 0.2 and self.faulty)
                    delay = self.r.choice([0, 0.1, 3, 9]) * self.faulty
                    self.later.append((self.now + delay, self.r.randrange(1 << 60), answer))
        elif fault and self.r.random() < 0.02:
            self.lost = True
            machine.outcome_unknown("nobody knows")
        elif fault:
            machine.refused(self.now, "the disk is full")
        elif isinstance(action, btlog.Commit):
            assert not self.lost
            assert not self.keys or any(map(self.quorum.met, self.cosigned.values()))  # of this run
            for submission in action.batch:
                submission.outcomes = list(range(self.count, self.count + len(submission.entries)))
                self.count += len(submission.entries)
            machine.done(self.now, self.signed())
        elif isinstance(action, btlog.Publish):
            assert self.quorum.met(self.cosigned.get(action.checkpoint.tree.size, set()))
            assert action.checkpoint.tree.size >= (machine.published.tree.size if machine.published else 0)
            machine.done(self.now)
        else:
            machine.done(self.now)

    def witness(self, round_: btlog.CosigningRound, key: VerifierKey, declines: bool) -> None:
        if declines:
            self.machine.declined(round_, key, "no")
        else:
            self.cosigned.setdefault(round_.signed.tree.size, set()).add(key)
            self.machine.cosigned(round_, key, btlog.signature_line(key.name, key.key_id, bytes(72)))

    def answer(self, action: btlog.Answer) -> None:
        for submission in action.submissions:
            assert id(submission) not in self.answers, "answered twice"
            self.answers[id(submission)] = action.error
            if not action.error:
                assert self.machine.published
                assert max(submission.outcomes) < self.machine.published.tree.size  # type: ignore[type-var, operator]

    def end(self) -> None:
        """Faults end, or not: then the log lives again. A stop leaves nobody without an answer."""
        self.faulty = self.r.random() < 0.5
        for _ in range(60):
            self.step()
            self.now += 3
        kept = [submission for submission in self.waiting if not submission.given_up]
        if not self.lost and not self.faulty:
            assert not self.machine.trouble
            assert len([s for s in kept if id(s) not in self.answers]) < 12  # of the last steps
        self.machine.stop()
        for _ in range(4):
            self.step()
        assert self.machine.over
        assert self.machine.next(self.now) is None
        assert [s for s in kept if not s.given_up and id(s) not in self.answers] == []
        assert self.halts == self.lost


def test_the_sequencer_keeps_nothing_that_nobody_waits_for() -> None:
    """A client that tries again and again while the quorum is missed fills no memory."""
    key = btlog.as_witness(WITNESS)
    signed = btlog.SignedNote.of(seal(Tree(0, btlog.EMPTY_ROOT)))
    policy = Policy((LOG,), (key,), Quorum(1, (key,)))
    machine = btlog.Sequencer(signed, None, policy, [key], btlog.LogOptions())
    machine.agreed = True
    for now in range(0, 1000, 10):
        submission = btlog.Submission([b"x"], True)
        machine.submit(submission)
        while action := machine.next(now):
            if isinstance(action, btlog.Commit):
                if now % 20:
                    machine.give_up(submission)
                machine.done(now)
            elif isinstance(action, btlog.Ask):
                machine.declined(action.round, key, "no")
        machine.give_up(submission)
        assert len(machine.unpublished) <= 1


def test_the_sequencer_keeps_its_promises_in_every_history(monkeypatch: pytest.MonkeyPatch) -> None:
    """Published is what met the quorum; answered is what is published; each is answered once; and it lives again."""
    monkeypatch.setattr(btlog, "MAX_BATCH", 50)
    monkeypatch.setattr(btlog, "MAX_WAITING", 200)
    lost = 0
    for seed_ in range(100):
        world = SequencerWorld(seed_)
        for _ in range(60):
            world.step()
        world.end()
        lost += world.lost
    assert 3 < lost < 90


# --- Nothing lost, nothing forked: faults in turn ------------------------------------------------------------------------


class Observer:
    """Somebody outside, who keeps every checkpoint and every acknowledgement that is seen, and holds the log to them."""

    def __init__(self, policy: Policy = UNWITNESSED) -> None:
        self.policy = policy
        self.trees: set[Tree] = set()
        self.entries: dict[int, bytes] = {}  # as acknowledged
        self.contradictions: list[str] = []
        self._notes: dict[bytes, Tree] = {}
        self._lock = threading.Lock()

    def see(self, note: bytes) -> Tree:
        """Verifies a checkpoint, once, and keeps what it says."""
        tree = self._notes.get(note)
        if tree is None:
            tree = self._notes[note] = open_checkpoint(note, self.policy).tree
            with self._lock:
                self.trees.add(tree)
        return tree

    def _take(self, checkpoint: str, data: bytes, result: dict[str, Any]) -> None:
        """Verifies an acknowledgement, and keeps it."""
        tree, index = self.see(base64.b64decode(checkpoint, validate=True)), result["index"]
        hashes = [base64.b64decode(text, validate=True) for text in result["inclusionProof"]]
        check_inclusion(leaf_hash(data), index, tree, hashes)
        with self._lock:
            if self.entries.setdefault(index, data) != data:
                self.contradictions.append(f"index {index} was given twice")

    def look(self, url: str) -> None:
        """Takes the published checkpoint, where there is one."""
        status, _, note = ask(url, "/checkpoint")
        if status == 200:
            self.see(note)

    def add(self, url: str, data: bytes) -> int:
        status, answer = add(url, data)
        if status == 200:
            self._take(answer["checkpoint"], data, answer)
        return status

    def bulk(self, url: str, batch: list[bytes]) -> int:
        """The same for many; what came of an answer that is cut off counts as well. 0 if there was no whole one."""
        body = b"".join(map(as_line, batch))
        answer = raw(urllib.parse.urlsplit(url).port or 0, BULK_HEAD % len(body) + body)
        head, _, rest = answer.partition(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200 "):
            return int(head[9:12] or b"0")
        lines = [json.loads(line) for line in rest.split(b"\n")[:-1]]  # the last one may be cut off
        for data, line in zip(batch, lines[1:], strict=False):
            if line["type"] == "result" and line["result"]["status"] == "logged":
                self._take(lines[0]["checkpoint"], data, line["result"])
        return 200 if lines and lines[-1] == {"type": "complete", "count": len(batch)} else 0

    def hold(self, url: str) -> list[bytes]:
        """Walks the whole log: all that was acknowledged is at its index, each tree seen is a beginning of the last."""
        self.look(url)
        entries = walk(url, self.policy)
        tiles = tiles_of(entries)
        last = btlog.Tiles(len(entries), lambda level, index, width: tiles[level, index][: 32 * width])
        tree = Tree(len(entries), root_of(entries))
        for seen in self.trees:
            assert seen.size <= tree.size
            check_consistency(seen, tree, btlog.prove_consistency(last, seen.size))
        lost = [index for index, data in self.entries.items() if entries[index : index + 1] != [data]]
        assert (lost, self.contradictions) == ([], [])
        assert len({Entry.parse(data).filename for data in entries}) == len(entries)
        return entries


class Failing(Faulty):
    """As Faulty; and where the fault is lasting, all statements after the n-th fail as well."""

    def __init__(self, connection: sqlite3.Connection, n: int, fault: str) -> None:
        super().__init__(connection, n, fault == "persisted")
        self.lasting, self.statements = fault == "lasting", 0
        self.committing = False  # it was a commit that failed

    def _run(self, run: Callable[..., Any], *args: Any) -> Any:
        self.statements += 1
        self.left = 1 if self.lasting and self.left <= 1 else self.left
        self.committing |= self.left == 1 and args[0] == "COMMIT"
        return super()._run(run, *args)
WHERE = ["log", "log with a witness", "its witness"]


@contextlib.contextmanager
def log_in(folder: Path, where: str, timeout: float = 20) -> Iterator[tuple[LocalLog, btlog.Database]]:
    """The log in `folder`, perhaps with a witness that keeps its database there, and the database that is to fail."""
    with contextlib.ExitStack() as stack:
        policy, options = UNWITNESSED, {"checkpoint_interval": 0.01, "witness_timeout": 1.0}
        if where != "log":
            witness_ = stack.enter_context(contextlib.closing(LocalWitness(folder / "w.db")))
            policy = witnessed_policy(witness_)
        log = LocalLog(folder / "log", policy=policy, timeout=timeout, options=options)
        stack.enter_context(contextlib.closing(log))
        yield log, (witness_.store if where == "its witness" else log.store).database


def write_a_little(url: str, observer: Observer) -> list[int]:
    """Adds, and bulks with and without a thread for the look-up keys, with some entries again; up to the first failure."""
    batches = ([0], [1], range(1, 10), range(5, 300))
    statuses: list[int] = []
    for batch in batches:
        new = [entry(i, "new-") for i in batch]
        statuses.append(observer.bulk(url, new) if len(new) > 1 else observer.add(url, new[0]))
        observer.look(url)
        if statuses[-1] != 200:
            break
    return statuses


def faults_in_turn(tmp_path: Path, fault: str, where: str, every: int) -> int:
    """Fails each `every`-th statement in turn, and walks over HTTP all that is there then, and after a restart."""
    whole = make(tmp_path / "whole")
    with log_in(whole, where) as (log, _):
        assert Observer(log.log._policy).bulk(log.url, [entry(i) for i in range(250)]) == 200
        eventually(lambda: log.log.published.tree.size == 250)
    for n in itertools.count(1, every):
        copy = Path(shutil.copytree(whole, tmp_path / f"{n}"))
        with log_in(copy, where, 0.3 if fault == "lasting" else 3) as (log, database):
            observer = Observer(log.log._policy)
            database._writer = faulty = Failing(database._writer, n, fault)  # type: ignore[assignment]
            statuses = write_a_little(log.url, observer)
            assert statuses[-1] in (200, 503)
            if fault != "lasting" and not faulty.committing:  # what passes fails nobody for long
                assert statuses == [200] * 4, n
            entries = observer.hold(log.url)  # readers see nothing of it
            assert entries[:250] == [entry(i) for i in range(250)]
        with log_in(copy, where) as (log, _):  # read again from disk
            observer.hold(log.url)
            assert write_a_little(log.url, observer) == [200] * 4  # retried: each of them is there once
            assert len(observer.hold(log.url)) == 550
            assert findings(log.store) == []
        shutil.rmtree(copy)
        if faulty.statements < n:  # there are not as many
            return n // every
    raise AssertionError


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("fault", ["not persisted", "persisted"])
def test_T4_T6_some_statements_fail(tmp_path: Path, fault: str, where: str) -> None:
    """One in 25 of them; all of them in the next test."""
    assert faults_in_turn(tmp_path, fault, where, 25) > 0


def test_T4_a_failed_append_leaves_no_lock(tmp_path: Path) -> None:
    """Whichever statement fails, and even if nothing can be rolled back: who opens the folder next can write."""
    batch = [entry(i) for i in range(300)]  # some statements run in another thread
    for n in itertools.count(1):
        with contextlib.closing(found(tmp_path / f"{n}")) as store:
            store.database._writer = faulty = Failing(store.database._writer, n, "lasting")  # type: ignore[assignment]
            failed: list[Error] = []  # keeps the frames, and all that is in them
            try:
                store.append(batch, seal, True)
            except Error as error:
                failed.append(error)
        with contextlib.closing(btlog.LogStore(tmp_path / f"{n}")) as again:
            assert again.append(batch, seal, True) == list(range(300))
        if not failed:
            break
    assert n > 8
    assert faulty.statements < n


@pytest.mark.slow
@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("fault", ["not persisted", "persisted", "lasting"])
def test_T4_T6_every_statement_fails(tmp_path: Path, fault: str, where: str) -> None:
    """Statements, and commits, of the log and of its witness: "failed, not persisted", "failed, but persisted", for good."""
    count = faults_in_turn(tmp_path, fault, where, 1)
    print(f"{where}: {count} statements, each {fault} in turn")
    assert count > (10 if where == "its witness" else 40)


class FaultyDisk:
    """What a first start asks of the system, with the n-th call failing."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, n: int, persist: bool) -> None:
        self.calls, self._n, self._persist = 0, n, persist
        connect = sqlite3.connect
        monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # the machine itself does not fail
        for name in "link", "fsync", "replace", "open":
            monkeypatch.setattr(os, name, functools.partial(self.call, getattr(os, name), OSError(28, "No space")))
        monkeypatch.setattr(sqlite3, "connect", lambda *args, **more: FaultyConnection(connect(*args, **more), self))

    def call(self, run: Callable[..., Any], error: Exception, *args: Any, **more: Any) -> Any:
        self.calls += 1
        if self.calls == self._n:
            if self._persist:
                run(*args, **more)
            raise error
        return run(*args, **more)


class FaultyConnection:
    def __init__(self, connection: sqlite3.Connection, disk: FaultyDisk) -> None:
        self._connection, self._disk = connection, disk

    def __getattr__(self, name: str) -> Any:
        found_ = getattr(self._connection, name)
        if not name.startswith("execute"):
            return found_
        return functools.partial(self._disk.call, found_, sqlite3.OperationalError("database or disk is full"))


@pytest.mark.parametrize("persist", [False, True], ids=["not persisted", "persisted"])
@pytest.mark.parametrize("command", ["serve", "witness"])
def test_T7_each_step_of_a_first_start_fails_in_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, persist: bool
) -> None:
    """Whatever it was, the next start makes it whole: one log or witness, of the key that the folder holds."""
    monkeypatch.setattr(btlog, "Server", lambda *args, **more: contextlib.ExitStack())
    monkeypatch.setattr(btlog, "run_server", lambda *args, **more: 0)
    args = btlog.parser().parse_args([command, "--port", "0", "--origin", "log.example/first"])
    prefix = "" if command == "serve" else "witness-"
    codes: list[int] = []

    def start(folder: Path) -> int:
        if command == "serve":
            args.storage_dir = type(args.storage_dir)(folder)
        else:
            args.database_path = type(args.database_path)(folder / "w.db")
        try:
            return int(args.run(args))
        except Error as error:
            return error.exit_code

    for n in itertools.count(1):
        folder = make(tmp_path / str(n))
        with monkeypatch.context() as context:
            disk = FaultyDisk(context, n, persist)
            codes.append(start(folder))
        if disk.calls < n:
            break
        private, public = folder / f"{prefix}private.key", folder / f"{prefix}public.key"
        kept = {path_: path_.read_text() for path_ in (private, public) if path_.exists()}
        assert start(folder) == 0, (n, os.listdir(folder))
        assert all(path_.read_text() == text for path_, text in kept.items())
        signer = btlog.Signer.parse(private.read_text().removesuffix("\n"))
        key = signer.key if command == "serve" else signer.witness_key
        assert VerifierKey.parse(public.read_text().removesuffix("\n")) == key
        if command == "serve":
            with contextlib.closing(btlog.LogStore(folder)) as store:
                assert (store.key(), store.tree("published").size) == (signer.key, 0)
        assert [name for name in os.listdir(folder) if name.startswith(".") and "key" in name] == []
    assert len(codes) > 15
    assert set(codes[:-1]) <= {0, 2, 3}
    assert codes[-1] == 0


# --- Nothing lost, nothing forked: killed --------------------------------------------------------------------------------


def described(action: btlog.Action | None, number: Callable[[btlog.Submission], int]) -> list[Any] | None:
    """An action of a log's state machine as JSON, in which submissions are numbers."""
    match action:
        case btlog.Commit(batch):
            return ["Commit", [number(submission) for submission in batch]]
        case btlog.Ask(round_):
            return ["Ask", round_.begun, round_.signed.note.decode()]
        case btlog.Publish(checkpoint, sizes, begun):
            return ["Publish", checkpoint.note.decode(), sorted(map(btlog.encode_vkey, sizes)), begun]
        case btlog.Answer(submissions, error):
            return ["Answer", [number(submission) for submission in submissions], error]
        case btlog.Halt(message, fatal):
            return ["Halt", message, fatal]
        case btlog.Probe():
            return ["Probe"]
    return None


def traced(path: str) -> None:
    """Makes this process write, line by line, what its state machines are told and decide, and what it really does."""
    out, inside = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), False

    def write(*words: Any) -> None:
        os.write(out, f"{json.dumps(words)}\n".encode())

    def event(name: str, tell: Callable[..., list[Any]]) -> None:
        """A method of the log's state machine, which is called under the log's lock."""
        real = getattr(btlog.Sequencer, name)

        def method(self: btlog.Sequencer, *args: Any) -> Any:
            nonlocal inside
            if inside:  # one event has led to another
                return real(self, *args)
            inside = True
            try:
                value = real(self, *args)
                write(name, *tell(*args), described(value, id))
            except btlog.Error as error:
                write(name, *tell(*args), type(error).__name__)
                raise
            finally:
                inside = False
            return value

        setattr(btlog.Sequencer, name, method)

    event("__init__", lambda signed, published, policy, witnesses, options: [
        signed.note.decode(), published and published.note.decode(), list(map(btlog.encode_vkey, witnesses)), vars(options)])
    event("submit", lambda submission: [id(submission), len(submission.entries), submission.prove])
    event("give_up", lambda submission: [id(submission)])
    event("done", lambda now, signed=None: [now, signed and signed.note.decode()])
    event("refused", lambda now, error: [now, error])
    event("outcome_unknown", lambda error: [error])
    event("halt", lambda message, fatal=False: [message, fatal])
    event("cosigned", lambda round_, key, line: [round_.begun, btlog.encode_vkey(key), line])
    event("declined", lambda round_, key, error: [round_.begun, btlog.encode_vkey(key), error])
    event("stop", list)
    event("next", lambda now: [now])

    def effect(owner: Any, name: str, before: Callable[..., list[Any]], after: Callable[..., list[Any]]) -> None:
        """What is read, written or sent: `before` it and `after` it, as these describe it; [] is left out."""
        real = getattr(owner, name)

        def do(*args: Any, **more: Any) -> Any:
            for words in filter(None, [before(*args)]):
                write(*words)
            value = real(*args, **more)
            for words in filter(None, [after(value, *args)]):
                write(*words)
            return value

        async def wait(*args: Any) -> Any:
            value = await real(*args)
            write(*after(value, *args))
            return value

        setattr(owner, name, wait if inspect.iscoroutinefunction(real) else do)

    def nothing(*args: Any) -> list[Any]:
        return []

    def answered(response: btlog.Response, *args: Any) -> list[Any]:
        answer = json.loads(cast(bytes, response.body))
        return ["ANSWERED", base64.b64decode(answer["checkpoint"]).decode(), [answer["index"]]]

    def streamed(self: Any, published: btlog.SignedNote, lines: Any, outcomes: list[Any]) -> list[Any]:
        return ["ANSWERED", published.note.decode(), [index for index in outcomes if isinstance(index, int)]]

    def of(state: btlog.Witnessed | None) -> list[Any] | None:
        return [state.tree.size, state.tree.root.hex(), state.seconds] if state else None

    def step(last: Any, keys: Any, request: btlog.AddCheckpoint, signers: Any, now: int) -> tuple[btlog.Witnessed, str]:
        try:
            new, lines = decide(last, keys, request, signers, now)
        except btlog.Error as error:
            write("STEP", of(last), request.encode().decode(), now, type(error).__name__)
            raise
        write("STEP", of(last), request.encode().decode(), now, of(new))
        return new, lines

    def begin(self: btlog.Witness) -> list[Any]:
        return ["BEGIN", len(self._waiting)]

    def end(value: None, self: btlog.Witness) -> list[Any]:
        return ["END", self.trouble]

    def sent(response: btlog.Response, *args: Any) -> list[Any]:
        return ["SENT", response.status, cast(bytes, response.body).decode()]

    decide, btlog.witness_step = btlog.witness_step, step
    effect(btlog.LogStore, "append", lambda self, entries, *rest: ["APPEND", len(entries)],
           lambda outcomes, self, *rest: ["APPENDED", self.checkpoint("signed").decode()])
    effect(btlog.LogStore, "publish", lambda self, note, sizes: ["PUBLISH", note.decode()], lambda *args: ["PUBLISHED"])
    effect(btlog.Client, "request", lambda self, method, path, body, *rest: ["ASK", body.decode()] if body else [], nothing)
    effect(btlog.LogHandler, "_add", nothing, answered)
    effect(btlog.LogHandler, "_bulk_answer", streamed, nothing)
    effect(btlog.Witness, "_process", begin, end)
    effect(btlog.WitnessHandler, "_add_checkpoint", nothing, sent)


@functools.cache
def tracer() -> str:
    """The program of a process that runs btlog.py and traces it: its arguments are the trace, btlog.py, and those of btlog.py."""
    return f"""
from __future__ import annotations
import base64, importlib.util, inspect, json, os, sys
from typing import cast
spec = importlib.util.spec_from_file_location("btlog", sys.argv[2])
sys.modules["btlog"] = btlog = importlib.util.module_from_spec(spec)
spec.loader.exec_module(btlog)
{inspect.getsource(described)}
{inspect.getsource(traced)}
traced(sys.argv[1])
sys.exit(btlog.main(sys.argv[3:]))
"""


def read_trace(path: Path) -> Iterator[tuple[str, list[Any]]]:
    for line in path.read_text().splitlines() if path.exists() else ():
        name, *words = json.loads(line)
        yield name, words


class LogReplay:
    """Holds the traces of a log's processes, one after the other, to a state machine that runs here.

    Told the same, it has to decide the same; and all that a process did is what it has decided.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy, self.counts = policy, collections.Counter[str]()
        self._signed, self._published = "", set[str]()  # as the disk has them; of the latter, one of these
        self._growing = 0  # entries that a process was storing when it was killed

    def hold(self, trace: Path) -> None:
        self._machine: btlog.Sequencer | None = None
        self._submissions, self._numbers = dict[int, btlog.Submission](), dict[int, int]()
        self._rounds, self._asked = dict[float, btlog.CosigningRound](), set[str]()
        self._doing, self._told = list[Any](), set(self._published)  # _told: what may be told to clients
        for name, words in read_trace(trace):
            self.counts[name] += 1
            if name.isupper():
                getattr(self, f"do_{name.lower()}")(*words)
            elif name == "__init__":
                self._start(*words[:-1])
            else:
                assert self._event(name, words[:-1]) == words[-1], (name, words)

    def _start(self, signed: str, published: str | None, witnesses: list[str], options: dict[str, Any]) -> None:
        if self._signed and signed != self._signed:
            before, after = (btlog.SignedNote.of(note.encode()).tree.size for note in (self._signed, signed))
            assert before < after <= before + self._growing  # it was killed after the commit, and before it knew that
            self._published |= set() if witnesses else {signed}
        assert not self._published or (published or "") in self._published
        self._signed, self._published, self._growing = signed, {published or ""}, 0
        self._told = {published or ""}
        notes = [note and btlog.SignedNote.of(note.encode()) for note in (signed, published)]
        keys = list(map(VerifierKey.parse, witnesses))
        self._machine = btlog.Sequencer(cast(Any, notes[0]), cast(Any, notes[1]), self._policy, keys, btlog.LogOptions(**options))

    def _event(self, name: str, words: list[Any]) -> Any:
        """Tells the state machine of an event; returns what it decides."""
        if name == "submit":
            self._submissions[words[0]] = submission = btlog.Submission([b""] * words[1], words[2])
            self._numbers[id(submission)] = words[0]
        if name in ("submit", "give_up"):
            words = [self._submissions[words[0]]]
        elif name in ("cosigned", "declined"):
            words = [self._rounds[words[0]], VerifierKey.parse(words[1]), words[2]]
        elif name == "done" and words[1]:
            assert words[1] == self._signed
            words = [words[0], btlog.SignedNote.of(words[1].encode())]
        try:
            action = getattr(self._machine, name)(*words)
        except Error as error:
            return type(error).__name__
        if isinstance(action, btlog.Ask):
            self._rounds[action.round.begun] = action.round
            self._asked.add(action.round.signed.note.decode())
        decided = described(action, lambda submission: self._numbers[id(submission)])
        self._doing = decided or self._doing
        return decided

    def do_append(self, count: int) -> None:
        assert self._doing[0] == "Commit"
        assert sum(len(self._submissions[number].entries) for number in self._doing[1]) == count
        self._growing = count

    def do_appended(self, note: str) -> None:
        before, after = (btlog.SignedNote.of(text.encode()).tree.size for text in (self._signed, note))
        assert after <= before + self._growing
        assert (after == before) == (note == self._signed)
        self._signed, self._growing = note, 0
        if not self._policy.witnesses:
            self._published = {note}
            self._told.add(note)

    def do_publish(self, note: str) -> None:
        assert self._doing[:2] == ["Publish", note]
        self._published.add(note)

    def do_published(self) -> None:
        self._published = {self._doing[1]}
        self._told.add(self._doing[1])

    def do_ask(self, body: str) -> None:
        assert btlog.AddCheckpoint.parse(body.encode()).note.decode() in self._asked

    def do_answered(self, note: str, indices: list[int]) -> None:
        """Whoever is told that an entry is logged is shown a checkpoint that has it, and that was published before."""
        assert note in self._told
        assert max(indices, default=-1) < btlog.SignedNote.of(note.encode()).tree.size


class WitnessReplay:
    """Holds the traces of a witness's processes to witness_step, and to what they stored before they sent it."""

    def __init__(self, log_key: VerifierKey) -> None:
        self._key, self.counts = log_key, collections.Counter[str]()
        self._stored: list[list[Any] | None] = [None]  # the size, root and time that the disk has: one of these
        self._settled, self._pending, self._inside = list[Any](), list[Any](), False

    def hold(self, trace: Path) -> None:
        if self._inside:  # it was killed in a transaction
            self._stored += self._pending[-1:]
        self._pending, self._inside = [], False
        for name, words in read_trace(trace):
            self.counts[name] += 1
            getattr(self, f"do_{name.lower()}")(*words)

    def do_begin(self, count: int) -> None:
        assert count > 0
        assert not self._inside
        self._inside, self._pending = True, []

    def do_step(self, last: list[Any] | None, body: str, now: int, outcome: list[Any] | str) -> None:
        assert self._inside
        assert last in (self._pending[-1:] or self._stored)
        if not self._pending:
            self._stored = [last]
        known = btlog.Witnessed(Tree(last[0], bytes.fromhex(last[1])), last[2], b"") if last else None
        decided: list[Any] | str
        try:
            new, _ = btlog.witness_step(known, [self._key], btlog.AddCheckpoint.parse(body.encode()), [], now)
            decided = [new.tree.size, new.tree.root.hex(), new.seconds]
        except Error as error:
            decided = type(error).__name__
        assert outcome == decided
        self._pending += [outcome] if isinstance(outcome, list) else []

    def do_end(self, trouble: str) -> None:
        assert self._inside
        assert not trouble
        self._stored, self._inside = self._pending[-1:] or self._stored, False
        self._settled += [*self._pending, *self._stored]

    def do_sent(self, status: int, body: str) -> None:
        assert status in (200, 409)
        if status == 200:
            assert max(at for _, at in btlog.cosignature_times(f"x\n\n{body}".encode())) in [s[2] for s in self._settled if s]
        else:
            assert body in [f"{s[0] if s else 0}\n" for s in self._settled]


class Target:
    """A log and perhaps its witness as processes, which are killed and started again on the ports that they had."""

    def __init__(self, folder: Path, witnessed: bool) -> None:
        self._folder = folder
        assert run_btlog("keygen", "--origin", "log.example/killed", cwd=folder).returncode == 0
        keys = [VerifierKey.parse((folder / "public.key").read_text().strip())]
        self.names = ["log", "witness"][: 1 + witnessed]
        self.processes: dict[str, Running] = {}
        self._ports = {"log": "0", "witness": "0"}
        log_args = ["serve", "--storage-dir", "log", "--private-key", "private.key", "--checkpoint-interval", "0.02"]
        log_args += ["--witness-timeout", "2", "--add-timeout", "10"]
        self._args = {"witness": ["witness", "--log-public-key", "public.key"], "log": log_args}
        self.traces: dict[str, list[Path]] = {name: [] for name in self.names}  # of all processes
        if witnessed:
            self.start("witness")
            keys.append(VerifierKey.parse((folder / "witness-public.key").read_text().strip()))
            url = self.processes["witness"].url
            log_args += ["--witness-url", url, "--witness-public-key", "witness-public.key"]
        self.policy = btlog.simple_policy(keys[:1], keys[1:])
        self.start("log")

    def _trace(self, name: str) -> Path:
        self.traces[name].append(self._folder / f"{name}-{len(self.traces[name])}.trace")
        return self.traces[name][-1]

    def start(self, name: str) -> None:
        process = Running(*self._args[name], cwd=self._folder, port=self._ports[name], trace=self._trace(name))
        self.processes[name], self._ports[name] = process, process.url.rpartition(":")[2]

    def start_in_vain(self, name: str, seconds: float) -> None:
        """It is killed before it answers."""
        traced_program = [sys.executable, "-c", tracer(), str(self._trace(name)), compiled_program()]
        command = [*traced_program, *self._args[name], "--port", self._ports[name]]
        with subprocess.Popen(command, cwd=self._folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as start:
            with contextlib.suppress(subprocess.TimeoutExpired):
                start.wait(seconds)
            start.kill()
            assert b"Traceback" not in start.communicate()[1]

    def replay(self) -> collections.Counter[str]:
        """Holds all traces to the state machines; returns how often which step was seen."""
        log = LogReplay(self.policy)
        for trace in self.traces["log"]:
            log.hold(trace)
        witness = WitnessReplay(self.policy.logs[0])
        for trace in self.traces.get("witness", ()):
            witness.hold(trace)
        return log.counts + witness.counts

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._ports['log']}"

    def kill(self, name: str) -> None:
        self.processes[name].stop(signal.SIGKILL)

    def close(self) -> None:
        for name in self.processes:
            self.kill(name)


class Crowd:
    """32 clients that add, one that appends bulks, one that looks at checkpoints, all until it is over."""

    def __init__(self, url: str, observer: Observer) -> None:
        self._url, self._observer = url, observer
        self.up, self.over = threading.Event(), threading.Event()
        self.up.set()
        self.counts: dict[int, int] = {}  # of answers; 0: none, or none that was whole
        self.trouble: list[BaseException] = []
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        works = [self._add] * 32 + [self._bulk, self._look]
        self._threads = [threading.Thread(target=self._run, args=(work,)) for work in works]
        for thread in self._threads:
            thread.start()

    def _run(self, work: Callable[[], int]) -> None:
        while not self.over.is_set():
            self.up.wait(0.2)
            status = 0
            try:
                with contextlib.suppress(OSError, http.client.HTTPException):  # it was killed
                    status = work()
            except BaseException as error:
                self.trouble.append(error)
                return
            with self._lock:
                self.counts[status] = self.counts.get(status, 0) + 1

    def _add(self) -> int:
        data = entry(next(self._numbers))
        status = 0
        while status != 200 and not self.over.is_set():  # whoever has no answer asks again
            self.up.wait(0.2)
            with contextlib.suppress(OSError, http.client.HTTPException, json.JSONDecodeError):
                status = self._observer.add(self._url, data)
        return status

    def _bulk(self) -> int:
        return self._observer.bulk(self._url, [entry(next(self._numbers), "bulk-") for _ in range(400)])

    def _look(self) -> int:
        self._observer.look(self._url)
        self.over.wait(0.01)  # somebody who looks now and then
        return 200

    def end(self) -> None:
        self.over.set()
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive()
        if self.trouble:
            raise self.trouble[0]


KILLS = int(os.environ.get("BTLOG_KILLS", "500"))  # of each kind; 1,000 in all take six minutes


@pytest.mark.parametrize("rounds", [3, pytest.param(KILLS, marks=pytest.mark.slow)])
@pytest.mark.parametrize("witnessed", [False, True], ids=["log", "log and witness"])
def test_T3_T4_T5_killed_again_and_again(tmp_path: Path, witnessed: bool, rounds: int) -> None:
    """SIGKILL at random moments, of log and witness in turn and of both at once, under 32 clients and bulks.

    What was acknowledged is there, and no two checkpoints contradict each other.
    """
    choose = random.Random(rounds + witnessed)
    target = Target(tmp_path, witnessed)
    observer = Observer(target.policy)
    with contextlib.closing(target):
        crowd = Crowd(target.url, observer)
        try:
            for turn in range(rounds):
                before = len(observer.entries)
                if choose.random() < 0.7:  # else it is killed at its start, or soon after
                    eventually(lambda: len(observer.entries) > before or crowd.trouble, 60)  # noqa: B023
                    crowd.over.wait(choose.uniform(0, 0.1))  # a random moment
                victims = target.names if turn % 3 == 2 else [target.names[turn % 3 % len(target.names)]]
                crowd.up.clear()
                for name in victims:
                    target.kill(name)
                for name in reversed(victims):
                    if turn % 4 == 0:
                        target.start_in_vain(name, choose.uniform(0.1, 0.3))
                    target.start(name)
                crowd.up.set()
            before = len(observer.entries)
            eventually(lambda: len(observer.entries) > before + 32, 60)
        finally:
            crowd.end()
        entries = eventually(lambda: (e := observer.hold(target.url)) and observer.add(target.url, e[0]) == 200 and e)
        for process in target.processes.values():
            code, error = process.stop()
            assert (code, "Traceback" in error) == (0, False), error
    assert run_btlog("fsck", "--storage-dir", "log", cwd=tmp_path).returncode == 0
    steps = target.replay()
    seen = ["__init__", "submit", "next", "done", "APPEND", "APPENDED", "ANSWERED"]
    assert all(steps[name] > rounds / 2 for name in seen + ["cosigned", "PUBLISH", "ASK", "STEP", "END", "SENT"] * witnessed), steps
    left_out = {"log": ["done", "APPENDED", *["cosigned", "PUBLISHED"] * witnessed], "witness": ["END", "BEGIN"]}
    for name in target.names:
        trace = max(filter(Path.exists, target.traces[name]), key=os.path.getsize)
        whole = trace.read_text()
        for left in left_out[name]:  # a trace without such steps is none of these machines
            trace.write_text(re.sub(rf'(?m)^\["{left}".*\n', "", whole))
            with pytest.raises(AssertionError):
                target.replay()
        trace.write_text(whole)
    print(
        f"{rounds} kills: {len(observer.entries)} acknowledged of {len(entries)} entries at their index, "
        f"{len(observer.trees)} checkpoints, each a beginning of the last; answers {crowd.counts}"
    )
    assert len(observer.entries) > 20 * rounds
    assert len(observer.trees) > rounds


# --- Nothing lost, nothing forked: copies, clocks, second writers ------------------------------------------------------------


def test_T8_a_second_writer_by_another_path_is_refused(tmp_path: Path) -> None:
    """The folder is locked, not its name; and for as long as the writer lives, whatever else ends."""
    (tmp_path / "link").symlink_to("log")
    with running("serve", "--storage-dir", "log", "--origin", LOG.name, cwd=tmp_path) as writer:
        policy = btlog.simple_policy([VerifierKey.parse(writer.line.split()[4])])
        assert add(writer.url, entry(0))[0] == 200
        for path_ in "link", "./log/../log":
            done = run_btlog("serve", "--storage-dir", path_, "--port", "0", cwd=tmp_path)
            assert (done.returncode, done.stdout, "one writer" in done.stderr) == (3, "", True)
        with running("serve", "--storage-dir", "link", "--read-only", cwd=tmp_path) as reader:
            assert walk(reader.url, policy) == [entry(0)]
            reader.stop(signal.SIGKILL)
        refuses(Unavailable, btlog.LogStore, tmp_path / "link")
        assert add(writer.url, entry(1))[0] == 200
        assert walk(writer.url, policy) == [entry(0), entry(1)]
        assert writer.stop()[0] == 0
    with contextlib.closing(btlog.LogStore(tmp_path / "link")) as store:
        assert store.tree("signed").size == 2


def copy_files(source: Path, target: Path) -> None:
    """File by file, as cp does, while they change: the parts need not be of one moment."""
    target.mkdir()
    for path_ in sorted(source.iterdir(), reverse=source.name < target.name):
        with contextlib.suppress(FileNotFoundError):
            shutil.copy(path_, target / path_.name)


def test_T9_a_folder_that_is_copied_while_it_runs(tmp_path: Path) -> None:
    """A copy that starts may be cut in two, which it says, or whole, and old; under the witness it makes no second history."""
    options = {"checkpoint_interval": 0.01}
    numbers, over = itertools.count(), threading.Event()
    with contextlib.closing(LocalWitness(tmp_path / "w.db")) as witness_:
        policy = witnessed_policy(witness_)
        observer = Observer(policy)
        with contextlib.closing(LocalLog(tmp_path / "log", policy=policy, options=options)) as log:

            def client() -> None:
                while not over.is_set():
                    assert observer.bulk(log.url, [entry(next(numbers)) for _ in range(60)]) == 200

            thread = threading.Thread(target=client)
            thread.start()
            copies = [tmp_path / name for name in ("a0", "z1", "a2", "z3")]
            try:
                for copied in copies:
                    before = len(observer.entries)
                    eventually(lambda: len(observer.entries) > before)  # noqa: B023
                    copy_files(tmp_path / "log", copied)
            finally:
                over.set()
                thread.join()
            assert observer.add(log.url, entry(next(numbers))) == 200  # which no copy has
            entries = observer.hold(log.url)
            for copied in copies:
                try:
                    copy = LocalLog(copied, policy=policy, options=options, timeout=2)  # while the first one goes on
                except (Corrupt, Unavailable):
                    continue
                with contextlib.closing(copy):
                    size = copy.store.tree("signed").size
                    assert size < len(entries)
                    eventually(lambda: copy.log.trouble)  # noqa: B023
                    assert observer.add(copy.url, entry(0, f"copy-{copied.name}-")) == 503
                    assert copy.store.tree("signed").size == size  # nothing was signed
            assert observer.add(log.url, entry(next(numbers))) == 200
            assert observer.hold(log.url)[: len(entries)] == entries


def test_T8_T9_two_that_run_from_one_copy_make_no_two_histories(tmp_path: Path) -> None:
    """Both were started when the witness had seen the same of both: whoever is second with an entry is halted."""
    with contextlib.closing(LocalWitness(tmp_path / "w.db")) as witness_, contextlib.ExitStack() as stack:
        policy = witnessed_policy(witness_)
        observer = Observer(policy)
        with contextlib.closing(LocalLog(tmp_path / "log", policy=policy)) as log:
            assert observer.bulk(log.url, [entry(i) for i in range(10)]) == 200
        shutil.copytree(tmp_path / "log", tmp_path / "copy")
        logs = [
            stack.enter_context(contextlib.closing(LocalLog(tmp_path / name, policy=policy, timeout=2)))
            for name in ("log", "copy")
        ]
        for log in logs:
            eventually(lambda: log.log.sequencer.agreed)  # noqa: B023
        statuses = [observer.add(log.url, entry(0, f"{i}-")) for i, log in enumerate(logs)]
        assert statuses == [200, 503]
        assert "It signs nothing more" in logs[1].log.trouble
        assert len(observer.hold(logs[0].url)) == 11
        assert len(walk(logs[1].url, policy)) == 10  # what it published is what it was copied with
        assert observer.add(logs[0].url, entry(1)) == 200
        assert witness_.store.last(LOG.name).tree.size == 11  # type: ignore[union-attr]


def test_T12_the_clock_of_a_log_jumps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adds, rounds of witnesses and restarts go on, and what is cosigned keeps its order."""
    offset, clock = 0.0, time.time
    monkeypatch.setattr(time, "time", lambda: clock() + offset)
    times: list[int] = []
    with contextlib.closing(LocalWitness(tmp_path / "w.db")) as witness_:
        witness_.witness._clock = time.time
        policy = witnessed_policy(witness_)
        observer, options = Observer(policy), {"checkpoint_interval": 0.01}
        for turn, offset in enumerate([0.0, 1e8, -1e8, -clock() + 5, 0.0]):  # noqa: B007
            with contextlib.closing(LocalLog(tmp_path / "log", policy=policy, options=options)) as log:
                for i in range(2):
                    assert observer.add(log.url, entry(i, f"{turn}-")) == 200
                times.append(open_checkpoint(ask(log.url, "/checkpoint")[2], policy).cosigned[0][1])
                assert ask(log.url, "/healthz")[0] == ask(log.url, "/status.json")[0] == 200
                assert len(observer.hold(log.url)) == 2 * turn + 2
    assert times == sorted(times)
    assert times[-1] > times[0] + 9e7


def test_T25_an_error_is_not_kept_as_content(log: LocalLog) -> None:
    """Neither by what is between, which is told nothing of the kind, nor by the server, once there is an answer."""
    there = ["/tile/0/000.p/1", "/tile/entries/000.p/1", "/entry/0", "/entry/0/proof"]
    for path_ in [*there, "/tile/0/000", "/nothing", "/entries"]:
        for method in "GET", "HEAD":
            status, headers, _ = ask(log.url, path_, method, Accept_Encoding="gzip")
            assert status in (400, 404)
            assert "cache-control" not in headers
    assert add(log.url, entry(0))[0] == 200
    assert [ask(log.url, path_, Accept_Encoding="gzip")[0] for path_ in there] == [200] * 4
    with contextlib.closing(sqlite3.connect(log.store.database.path)) as db, db:
        db.execute("UPDATE tile SET key = key + 1000")
    assert add(log.url, entry(1))[0] == 503  # it ends on what it finds
    log.routes.cache = btlog.Cache(1 << 20, lambda response: len(response.body))
    for _ in range(2):
        status, headers, _ = ask(log.url, there[0])
        assert (status, "cache-control" in headers) == (500, False)
    with contextlib.closing(sqlite3.connect(log.store.database.path)) as db, db:
        db.execute("UPDATE tile SET key = key - 1000")
    assert ask(log.url, there[0])[0] == 200


# --- All at once: hostile clients, and an honest one -------------------------------------------------------------------------


def peak_memory(process: int) -> float:
    """MiB that a process has held at most."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(re.findall(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)[0]) / 1024


class Attack:
    """Clients of one server that do what they should not, over and over, until told to stop."""

    def __init__(self, url: str, path_: str, over: threading.Event) -> None:
        self.port, self.over = int(url.rpartition(":")[2]), over
        self.statuses: dict[int, int] = {}
        self.odd: list[bytes] = []
        self.rounds = 0  # of the bad requests
        self._post = b"POST " + path_.encode() + b" HTTP/1.1\r\n"
        works = self._requests, self._slow_senders, self._half_open, self._never_reads
        self._threads = [threading.Thread(target=self._again, args=(work,)) for work in works]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def join(self) -> None:
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive()

    def _again(self, work: Callable[[], None]) -> None:
        while not self.over.is_set():
            with contextlib.suppress(OSError):  # a server may well cut them off
                work()

    def bad_requests(self) -> Iterator[bytes]:
        """Those which the tests of HTTP have, and large ones."""
        yield from (data for data, statuses in REQUESTS if all(400 <= status < 500 for status in statuses))
        yield self._post + b"Content-Length: 500000\r\n\r\n{}"  # more than what comes
        note = request_for(0, 0)
        yield self._post + b"Content-Length: 2\r\n\r\n{}" + note  # less, so that the rest is no request
        bomb = gzip.compress(bytes(1 << 24))
        yield self._post + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(bomb) + bomb
        lines = b"".join(f"— x{i} YWJjZGVmZ2g=\n".encode() for i in range(1000))
        for body in (
            b"[" * 60_000, b'{"a":' * 10_000, b'"' + b"\\u0000" * 10_000, b"9" * 60_000, b"\xff" * 60_000,
            note + lines, note + lines * 2, b"old 0\n" + (b64(bytes(32)).encode() + b"\n") * 1000 + b"\n",
        ):  # fmt: skip
            yield self._post + b"Content-Length: %d\r\n\r\n" % len(body) + body
        for path_ in (
            b"/../etc/passwd", b"//", b"/%2e%2e/private.key", b"/tile/0/%30%30%30", b"/tile/0/..%2f000", b"/tile/64/000",
            b"/tile/0/x999/x999/x999/x999/x999/x999/999", b"/private.key", b"/entry/-1", b"/entry/9223372036854775807",
            b"/entries?filename=%ff", b"/entries?checksum=a&checksum=b", b"http://evil.example/",
        ):  # fmt: skip
            yield b"GET " + path_ + b" HTTP/1.1\r\n\r\n"

    def _requests(self) -> None:
        """Counts what the server says, and keeps what it should not say."""
        for request in self.bad_requests():
            if self.over.is_set():
                return
            answer = raw(self.port, request, end=True)
            for status in map(int, re.findall(rb"HTTP/1\.1 (\d{3}) [A-Z]", answer)):
                self.statuses[status] = self.statuses.get(status, 0) + 1
            if answer and not re.match(rb'HTTP/1\.1 4\d\d [ -~]*\r\n(?:[ -~]+\r\n)*\r\n\{"error": "', answer):
                self.odd.append(answer[:500])
        self.rounds += 1

    def _connected(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), 10)

    def _slow_senders(self) -> None:
        """Many connections, each with a beginning, and now and then some more of it."""
        with contextlib.ExitStack() as stack:
            connections = [stack.enter_context(self._connected()) for _ in range(100)]
            for connection in connections:
                connection.sendall(self._post + b"Content-Length: 400000\r\n\r\n")
            while not self.over.wait(0.05):
                for connection in connections:
                    connection.sendall(b"{")

    def _half_open(self) -> None:
        for cut in b"", b"GET /che", self._post + b"Content-Length: 50\r\n\r\n{":
            with self._connected() as connection:
                connection.sendall(cut)
                connection.shutdown(socket.SHUT_WR)
                self.over.wait(0.01)

    def _never_reads(self) -> None:
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.settimeout(0.2)
            connection.connect(("127.0.0.1", self.port))
            with contextlib.suppress(TimeoutError):
                while not self.over.is_set():
                    connection.sendall(b"GET /nothing HTTP/1.1\r\n\r\n" * 1000)
            self.over.wait(1)


def test_T61_T62_hostile_clients_all_at_once(tmp_path: Path) -> None:
    """Against log and witness together; an honest client's adds, which need both, go on, each within a second."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert hard == resource.RLIM_INFINITY or hard > 5000, "4,000 idle connections need as many open files"
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 5000), hard))
    over = threading.Event()
    took: list[float] = []
    with contextlib.closing(Target(tmp_path, witnessed=True)) as target, contextlib.ExitStack() as stack:
        observer = Observer(target.policy)
        assert observer.add(target.url, entry(0)) == 200
        paths = {"log": "/add", "witness": "/add-checkpoint"}
        attacks = {name: Attack(process.url, paths[name], over) for name, process in target.processes.items()}
        for attack in attacks.values():
            for _ in range(2000):
                stack.enter_context(socket.socket()).connect(("127.0.0.1", attack.port))
            attack.start()
        try:
            until = time.monotonic() + 2
            while time.monotonic() < until or len(took) < 11 or not all(attack.rounds for attack in attacks.values()):
                assert time.monotonic() < until + 40
                begun = time.monotonic()
                assert observer.add(target.url, entry(1 + len(took))) == 200
                took.append(time.monotonic() - begun)
        finally:
            over.set()
            for attack in attacks.values():
                attack.join()
        memory_ = {name: peak_memory(process.process.pid) for name, process in target.processes.items()}
        stack.close()
        assert len(observer.hold(target.url)) == 1 + len(took)
        for name, attack in attacks.items():
            statuses = dict(sorted(attack.statuses.items()))
            print(f"{name}: {attack.rounds} rounds, {statuses}, {memory_[name]:.0f} MiB at most")
            assert attack.odd == []
            assert {400, 404, 411, 413, 414, 431} <= set(statuses)
            assert all(400 <= status < 500 for status in statuses)
            code, error = target.processes[name].stop()
            wrong = [word for word in ("Traceback", "internal error", "network:", "quorum") if word in error]
            assert (code, wrong, error.count("\n") < 10) == (0, [], True), error[:2000]
    print(f"{len(took)} adds meanwhile, {max(took) * 1000:.0f} ms at most")
    assert len(took) > 10
    assert max(took) < 3
    assert max(memory_.values()) < 200


@pytest.mark.parametrize("line", [b"x", b'{"a":1}'])
def test_T61_a_bulk_of_lines_that_are_none_stops_nobody(log: LocalLog, line: bytes) -> None:
    """More lines than a bulk may have, each of which is refused by itself, which takes longer than being logged."""
    over = threading.Event()
    took: list[float] = []
    statuses: list[int] = []
    body = (line + b"\n") * 400_000

    def post() -> None:
        while not over.is_set():
            with contextlib.suppress(OSError):  # the server may answer, and close, before it has read all of it
                statuses.append(ask(log.url, "/admin/bulk/append", "POST", body, Content_Type=btlog.NDJSON)[0])

    thread = threading.Thread(target=post)
    thread.start()
    try:
        until = time.monotonic() + 0.5
        while time.monotonic() < until or not statuses:
            begun = time.monotonic()
            assert add(log.url, entry(len(took)))[0] == 200
            took.append(time.monotonic() - begun)
    finally:
        over.set()
        thread.join(30)
    assert set(statuses) == {413}
    assert max(took) < 3  # also while other processes have the processor; without turns it is as long as all lines take


# --- Part I: every guard is missed by some test, and every branch is taken ---------------------------------------------


def test_errors_and_their_codes() -> None:
    """One table of what each error means to a client over HTTP and to the caller of a command."""
    kinds = (Error, Malformed, BadSignature, BadProof, Conflict, Unavailable, Corrupt)
    assert {kind.__name__: (kind.status, kind.exit_code) for kind in kinds} == {
        "Error": (500, 3), "Malformed": (400, 2), "BadSignature": (403, 1), "BadProof": (422, 1), "Conflict": (409, 1),
        "Unavailable": (503, 3), "Corrupt": (500, 3),
    }  # fmt: skip
    conflict = Conflict("it is logged already", 7)
    assert (conflict.index, str(conflict)) == (7, "it is logged already")


def test_T40_a_note_that_nobody_known_signed_is_not_opened() -> None:
    """By itself, and not only because a checkpoint asks for a log's signature."""
    for keys in [], [WITNESS], [btlog.as_witness(WITNESS), PQ]:
        refuses(BadSignature, btlog.open_note, SIGNED.encode(), keys)
    assert btlog.open_note(SIGNED.encode(), [LOG, WITNESS])[1] == {LOG: 0}


def test_T56_a_proof_has_the_shape_of_its_tree_even_if_it_leads_to_the_root() -> None:
    """A log may sign any root: one for which a proof that is too long, or of other lengths than hashes have, works out."""
    leaf, more, short = leaf_hash(b"a"), bytes(32), bytes(31)
    for elements, size in (
        ([more], 1), ([more, more], 1), ([more, more], 2), ([short], 2), ([short + more], 2), ([b""], 2),
    ):  # fmt: skip
        root = leaf
        for i, element in enumerate(elements):  # as a checker that does not look would hash them
            root = node_hash(element, root) if i >= size.bit_length() - 1 else node_hash(root, element)
        refuses(BadProof, check_inclusion, leaf, 0, Tree(size, root), elements)
        refuses(BadProof, check_consistency, Tree(1, leaf), Tree(max(size, 2), root), elements)
    for odd in b"", bytes(31), bytes(33), bytes(64):
        refuses(BadProof, check_inclusion, odd, 0, Tree(2, node_hash(odd, more)), [more])
    check_inclusion(leaf, 0, Tree(2, node_hash(leaf, more)), [more])
    check_consistency(Tree(1, leaf), Tree(2, node_hash(leaf, more)), [more])


def test_the_longest_note() -> None:
    line = "— a YWJjZGVmZ2g=\n"
    text = "a" * (btlog.MAX_NOTE - len(line.encode()) - 2) + "\n"
    assert len(note_of(text, line)) == btlog.MAX_NOTE
    assert btlog.split_note(note_of(text, line))[0] == text
    refuses(Malformed, btlog.split_note, note_of("a" + text, line))
    refuses(Malformed, btlog.split_note, note_of(text, line) + line.encode())  # of which the beginning is a note


def test_T40_a_false_signature_of_a_known_key_spoils_a_note() -> None:
    """"If a signature from a known key fails to verify, clients SHOULD reject the whole note": also if enough others do."""
    line = f"— {PQ.name} {b64(PQ.key_id + bytes(8 + 2420))}\n"
    known, unknown = btlog.simple_policy([LOG], [WITNESS, PQ], 1), btlog.simple_policy([LOG], [WITNESS], 1)
    for note in COSIGNED + line, SIGNED + line + COSIGNATURE:
        refuses(BadSignature, open_checkpoint, note.encode(), known)
        assert open_checkpoint(note.encode(), unknown).cosigned == ((btlog.as_witness(WITNESS), COSIGNED_AT),)


def test_T57_a_witness_of_the_origin_s_name_is_no_log() -> None:
    """Its cosignature alone makes no checkpoint, whatever it is called."""
    namesake = btlog.Signer(LOG.name, COSIGNER.seed)
    text = SIGNED.partition("\n\n")[0] + "\n"
    policy = btlog.simple_policy([LOG], [namesake.key])
    cosignature = signature_line(namesake, text, 7)
    refuses(BadSignature, open_checkpoint, note_of(text, cosignature), policy)
    assert open_checkpoint(note_of(text, signature_line(SIGNER, text), cosignature), policy).cosigned[0][1] == 7


CORE = (  # the sections whose tests need Part I, the parser of policies and some signing, and no more
    "Strict scalars", "Merkle trees", "Keys and notes", "Ed25519 without PyNaCl", "ML-DSA-44", "Policies", "Entries", "Offline proofs",
    "One byte changed", "Part I: every guard",
)  # fmt: skip
# What costs more than it finds, where each of a hundred mutants is to take a second.
DEAR = {
    "test_every_byte_of_a_proof_counts",
    "test_thousands_of_proofs_pinned",
    "test_growing_in_steps_is_growing_at_once",
    "test_every_byte_of_a_policy_counts",
    "test_every_byte_of_a_key_counts",
    "test_T50_an_entry_is_what_its_encoding_says",
    "test_ed25519_with_a_bit_flipped",
    "test_ed25519_with_a_bit_flipped_many_times",
    "test_verify_on_a_bare_python",
    "test_every_guard_of_part_one_is_needed",
    "test_every_branch_of_part_one_is_taken",
}
# Guards without which Part I does the same: the line, what stands there instead, and why nothing can show it.
EQUIVALENT = {
    ("len(data) > MAX_FILENAME", "True"),  # saves two checks for entries that are too short to fail them
    ("y >= _P", "False"),  # such keys of small order are refused anyway, and of the others nobody has a private key
}


def core_sections() -> list[str]:
    """The beginning of this file, and the sections in CORE."""
    text = Path(__file__).read_text()
    parts = re.split(r"^(?=# --- )", text, flags=re.MULTILINE)
    titles = [re.match(r"# --- (.*?) -*\n", part) for part in parts]
    first = next(i for i, title in enumerate(titles) if title and title[1].startswith(CORE))
    return parts[:first] + [p for p, title in zip(parts, titles, strict=True) if title and title[1].startswith(CORE)]


def core_tests(but: set[str]) -> list[str]:
    """The tests of these sections, as pytest names them."""
    names = [
        f"test_btlog.py::{node.name}" for node in ast.parse("".join(core_sections())).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_") and node.name not in but
    ]  # fmt: skip
    assert len(names) > 50
    return names


def mutants() -> Iterator[tuple[str, str, str]]:
    """The file with one guard of Part I gone: the line, what stands there instead, and the whole text."""
    data = TEXT.encode()
    starts = [0, *(m.end() for m in re.finditer(rb"\n", data))]
    first, end = PARTS["Part I"], PARTS["Part II"]
    for node in ast.walk(TREE):
        if isinstance(node, (ast.Raise, ast.Compare)) and first <= node.lineno < end:
            lo = starts[node.lineno - 1] + node.col_offset
            hi = starts[(node.end_lineno or 0) - 1] + (node.end_col_offset or 0)
            for other in [b"pass"] if isinstance(node, ast.Raise) else [b"True", b"False"]:
                was = " ".join(data[lo:hi].decode().split())
                yield was, other.decode(), (data[:lo] + other + data[hi:]).decode()


def a_place_for_mutants(folder: Path) -> Path:
    """The tests of the core, to be run against what is put beside them as btlog.py."""
    folder.mkdir()
    shutil.copy(HERE / ".pytest.ini", folder)
    (folder / "test_btlog.py").write_text("".join(core_sections()))
    shutil.copytree(HERE / ".ci" / "vectors", folder / ".ci" / "vectors")
    (folder / "btlog.py").write_text(TEXT)
    py_compile.compile(str(folder / "test_btlog.py"), doraise=True)
    return folder


CORE_FORKER = """
import __future__, json, os, signal, sys, types
import asyncio, concurrent.futures, http.server, sqlite3, tarfile, tomllib, tracemalloc, xml.etree.ElementTree
import _pytest.pytester, hypothesis.strategies, nacl.signing, pytest
sys.dont_write_bytecode = True
whole = open("btlog.py").read()
flags = __future__.annotations.compiler_flag if whole.count("\\nfrom __future__ import annotations\\n") else 0
rest = whole[whole.index("\\n# === Part II") :]
compiled = compile("\\n" * whole[: -len(rest)].count("\\n") + rest, "btlog.py", "exec", flags, True)  # what no mutant changes


class Durations:
    def __init__(self):
        self.seconds = {}

    def pytest_runtest_logreport(self, report):
        name = report.nodeid.partition("[")[0]
        self.seconds[name] = self.seconds.get(name, 0.0) + report.duration


for line in sys.stdin:
    if not (child := os.fork()):
        for number, how in (0, os.O_RDONLY), (1, os.O_WRONLY), (2, os.O_WRONLY):
            os.dup2(os.open(os.devnull, how), number)
        signal.alarm(60)
        text = open("btlog.py").read()
        module = sys.modules["btlog"] = types.ModuleType("btlog")
        module.__file__ = os.path.abspath("btlog.py")
        try:
            exec(compile(text.removesuffix(rest), "btlog.py", "exec", flags, True), vars(module))
            exec(compiled, vars(module))
        except Exception:
            os._exit(2)
        options, durations = ["-x", "-q", "-p", "no:cacheprovider", "--assert=plain"], Durations()
        code = pytest.main([*options, *json.loads(line)], [durations])
        with open("durations", "w") as file:
            json.dump(durations.seconds, file)
        sys.exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class CoreTests:
    """Runs the tests of the core against what stands in a folder, in a process that has imported all but that."""

    def __init__(self, folder: Path, names: list[str]) -> None:
        self.folder, self._names, pipe = folder, names, subprocess.PIPE
        self._process = subprocess.Popen([sys.executable, "-c", CORE_FORKER], cwd=folder, stdin=pipe, stdout=pipe, text=True)

    def run(self) -> int:
        """pytest's exit code: 0 all pass, 1 some fail, 2 or 4 they can't even be imported; -14 where they take too long."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(f"{json.dumps(self._names)}\n")
        self._process.stdin.flush()
        code = int(self._process.stdout.readline())
        assert code in (0, 1, 2, 4, -signal.SIGALRM), code
        if code == 0:  # next time, what takes long comes last: one failure is enough
            seconds = json.loads((self.folder / "durations").read_text())  # without those that are left out
            self._names = sorted(self._names, key=lambda name: cast(float, seconds.get(name, 0.0)))
        return code

    def close(self) -> None:
        self._process.communicate()
        assert self._process.returncode == 0


@pytest.mark.slow
def test_every_guard_of_part_one_is_needed(tmp_path: Path) -> None:
    """Each `raise` made `pass`, and each comparison True and False: some test of the core fails, or none can."""
    places = [CoreTests(a_place_for_mutants(tmp_path / f"{i}"), core_tests(DEAR)) for i in range(2)]
    assert [place.run() for place in places] == [0, 0]
    todo = list(mutants())
    assert sum(there == "pass" for _, there, _ in todo) > 25
    assert len(todo) > 120

    def survivors(place: CoreTests, share: list[tuple[str, str, str]]) -> list[tuple[str, str]]:
        alive = []
        with contextlib.closing(place):
            for was, there, text in share:
                (place.folder / "btlog.py").write_text(text)
                if place.run() == 0:
                    alive.append((was, there))
        return alive

    with concurrent.futures.ThreadPoolExecutor() as pool:
        alive = [*itertools.chain(*pool.map(survivors, places, (todo[::2], todo[1::2])))]
    assert sorted(alive) == sorted(EQUIVALENT)


@pytest.mark.slow
def test_every_branch_of_part_one_is_taken(tmp_path: Path) -> None:
    """By the tests of the core alone; it needs the package coverage, which .ci/run installs."""
    assert importlib.util.find_spec("coverage"), "this test needs the package coverage: pip install coverage"
    place, coverage = a_place_for_mutants(tmp_path / "place"), [sys.executable, "-m", "coverage"]
    run = [*coverage, "run", "--branch", "--include=btlog.py", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*run, *core_tests(DEAR)], cwd=place, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    done = subprocess.run([*coverage, "json", "-q", "-o", "-"], cwd=place, capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)["files"]["btlog.py"]
    part = range(PARTS["Part I"], PARTS["Part II"])
    assert len([line for line in report["executed_lines"] if line in part]) > 150
    assert len([branch for branch in report["executed_branches"] if branch[0] in part]) > 50
    assert [line for line in report["missing_lines"] if line in part] == []
    assert [branch for branch in report["missing_branches"] if branch[0] in part] == []


# --- Every parser, fed with what it was not made for ------------------------------------------------------------------------


@dataclasses.dataclass
class Parser:
    """A parser: what it is fed at first, and what of it has to encode to the very bytes that were accepted."""

    parse: Callable[[bytes], Any]
    seeds: list[bytes]
    encode: Callable[[Any], bytes] | None = None


def raw_text(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def note_again(parts: tuple[str, list[tuple[str, bytes, bytes]]]) -> bytes:
    return note_of(parts[0], *(f"— {name} {b64(key_id + value)}\n" for name, key_id, value in parts[1]))


def json_entry(data: bytes) -> bytes:
    """What is taken as an entry says what Python's own reading of the JSON says."""
    encoded = btlog.entry_from_json(btlog.parse_json(data))
    parsed = Entry.parse(encoded)
    publisher = parsed.publisher._asdict() if parsed.publisher else None
    read = {"filename": parsed.filename, "checksum": parsed.checksum, "publisher": publisher}
    assert {"publisher": None, **json.loads(data)} == read
    return encoded


def lines_one_by_one(block: bytes) -> list[bytes | btlog.Refused]:
    """Many lines, read at once, are what they are one by one."""

    def plain(results: Iterable[bytes | btlog.Refused]) -> list[Any]:
        return [r if isinstance(r, bytes) else (r.filename, str(r.error)) for r in results]

    def alone(line: bytes) -> bytes | btlog.Refused:
        try:
            return btlog.entry_from_json(btlog.parse_json(line.strip()))
        except Malformed:
            [refused] = btlog.parse_lines(line)
            assert isinstance(refused, btlog.Refused)
            return refused

    at_once = btlog.parse_lines(block)
    if block.count(b"\n") <= 1000:
        assert plain(at_once) == plain(map(alone, filter(bytes.strip, block.split(b"\n"))))
    return at_once


def one_step(body: bytes) -> None:
    """Nothing but what the log signed is cosigned."""
    new, line = btlog.witness_step(None, [LOG], btlog.AddCheckpoint.parse(body), [COSIGNER], 7)
    assert open_checkpoint(new.note, POLICY).tree in (new.tree, Tree(9, root_of(ENTRIES[:9])))
    assert line.startswith(f"— {WITNESS.name} ")


def judged(proof: bytes) -> None:
    assert check_logged(Entry(NAME, SUM), proof, UNWITNESSED).tree == Tree(1, leaf_hash(Entry(NAME, SUM).encode()))


def taken(answer: bytes) -> None:
    text = SIGNED.partition("\n\n")[0] + "\n"
    [line] = btlog.take_cosignatures(text, answer, [btlog.as_witness(WITNESS)]).values()
    assert open_checkpoint(SIGNED.encode() + line.encode(), POLICY).tree.size == 70_000


def requested(data: bytes) -> btlog.Handler:
    request = btlog.Handler()
    request.read(data.partition(b"\r\n\r\n")[0] + b"\r\n\r\n")
    assert re.fullmatch(r"[\x21-\x7e]+", request.path)
    with contextlib.suppress(Malformed):
        request.query()
    btlog.takes_gzip(request.headers.get("accept-encoding", ""))
    btlog.is_address(request.headers.get("host", ""))
    return request


def shown(data: bytes) -> None:
    assert btlog.error_message(data).isprintable()


def unzipped(data: bytes) -> None:
    assert len(btlog._unzip(data, 1000)) <= 1000


def indexed(kind: str) -> Callable[[bytes], Any]:
    """The pages of a package index, which are of somebody else."""

    @dataclasses.dataclass
    class Page:
        data: bytes
        url, last = "http://index.example", btlog.Answered(200)

        def fetch(self, path_: str, headers: dict[str, str], *more: Any) -> tuple[str, bytes]:
            return kind, self.data

    def parse(data: bytes) -> None:
        index = btlog.Index.__new__(btlog.Index)
        index.source, index.credentials = Page(data), {}  # type: ignore[assignment]
        with contextlib.suppress(Unavailable):
            assert all(isinstance(name, str) for name in index.projects())
        for file in index.files("a") or []:
            for name, checksum in file.readings():
                assert isinstance(name, str)
                assert re.fullmatch("(sha256:[0-9a-f]{64})?", checksum)

    return parse


HEADS = [data.partition(b"\r\n\r\n")[0] + b"\r\n\r\n" for data, _ in REQUESTS if len(data) < 10_000] + [
    b"GET /entries?filename=a%2Fb+c&checksum=%ff&&=x HTTP/1.1\r\nHost: [::1]:80\r\nAccept-Encoding: br, gzip;q=0.1\r\n\r\n",
    b"POST /add HTTP/1.0\r\nHost: a\r\nconnection: close, x\r\nA: b\r\nA: c\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n",
]


def parsers() -> dict[str, Parser]:
    """Every parser of what comes from outside."""
    text = SIGNED.partition("\n\n")[0].encode() + b"\n"
    plain, signed = Entry(NAME, SUM), Entry(NAME, SUM, PUBLISHER)
    proofs = [proof_of_one(plain), proof_of_one(signed, signed.encode())]
    policy = policy_file("group X 2 W0 W1 W2\ngroup Y any W3 W4 W5\ngroup both all X Y\nquorum both\n")
    lines = [as_line(entry(i)) for i in range(9)]
    bodies = [request_for(5, 9), request_for(0, 9), request_for(0, 0), request_for(9, 9)]
    keys = [key.encode() for key in (LOG_VKEY, WITNESS_VKEY_4, PQ_VKEY, BT_LOG_VKEY)]
    zipped = [gzip.compress(data, mtime=0) for data in (b"", b"abc", bytes(1000), bytes(100_000))]
    file_ = f'{{"filename": "{NAME}", "url": "u", "hashes": {{"sha256": "{SUM[7:]}"}}}}'
    page = f'{{"name": "a", "files": [{file_}, {file_}], "projects": [{{"name": "a"}}, {{"name": "\\ud800"}}]}}'.encode()
    links = f'<html><a href="/a/{NAME}#{SUM.replace(":", "=")}">{NAME}</a><a href="//[::1]/b">b</a></html>'.encode()
    errors = [b'{"error": "no"}', b'{"error": 1}', b"\xff\x1b[0m", b"[" * 1000]
    cosignatures = [COSIGNATURE.encode(), SIGNED.rpartition("\n\n")[2].encode()]
    paths = [path_.encode() for path_ in PATHS.values()]
    table: dict[str, tuple[Callable[..., Any], list[bytes]] | tuple[Callable[..., Any], list[bytes], Callable[..., bytes]]] = {
        "parse_decimal": (as_text(btlog.parse_decimal), [b"0", b"70000", b"%d" % 2**63], lambda n: b"%d" % n),
        "parse_base64": (as_text(btlog.parse_base64), [b"", b"YQ==", LINE.split()[2].encode()], btlog.b64),
        "parse_text": (btlog.parse_text, [text, SIGNED.encode()], str.encode),
        "VerifierKey.parse": (as_text(VerifierKey.parse), keys, lambda key: encode_vkey(key).encode()),
        "Signer.parse": (as_text(btlog.Signer.parse), [LOG_SKEY.encode(), BT_LOG_SKEY.encode()], lambda k: k.encode().encode()),
        "split_note": (btlog.split_note, [SIGNED.encode(), COSIGNED.encode()], note_again),
        "open_checkpoint": (lambda data: open_checkpoint(data, POLICY), [COSIGNED.encode(), SIGNED.encode()]),
        "Checkpoint.parse": (as_text(Checkpoint.parse), [text, text + b"more\n"], lambda c: raw_text(btlog.encode_checkpoint(c))),
        "Entry.parse": (Entry.parse, [plain.encode(), signed.encode()], Entry.encode),
        "Proof.parse": (Proof.parse, proofs, btlog.encode_proof),
        "check_logged": (judged, proofs[:1]),
        "parse_policy": (parse_policy, [policy, b"quorum none\n"]),
        "parse_tile_path": (as_text(btlog.parse_tile_path), paths, lambda place: btlog.tile_path(*place).encode()),
        "split_bundle": (btlog.split_bundle, [btlog.encode_bundle([b"", b"a", b"bc" * 200]), b""], btlog.encode_bundle),
        "entry_from_json": (json_entry, [*lines, b'{"filename":"\\ud800","checksum":1e999}']),
        "parse_lines": (lines_one_by_one, [b"".join(lines), b"".join(lines[:2]), b"{}\n[]\n1\n"]),
        "AddCheckpoint.parse": (btlog.AddCheckpoint.parse, bodies, btlog.AddCheckpoint.encode),
        "witness_step": (one_step, bodies),
        "take_cosignature": (taken, cosignatures),
        "Index, JSON": (indexed("application/vnd.pypi.simple.v1+json"), [page]),
        "Index, HTML": (indexed("text/html"), [links]),
        "parse_head": (requested, HEADS),
        "error_message": (shown, errors),
        "_unzip": (unzipped, zipped),
    }
    return {name: Parser(*row) for name, row in table.items()}


TOKENS = [
    *(b"\n", b"\n\n", b"\r\n", b"\r\n\r\n", b" ", b"\t", b"\0", b"\x7f", b"\x85", b"\xff", b"\xed\xa0\x80", b"\xc0\x80"),
    *("—".encode(), "\u2028".encode(), "\u00a0".encode(), "é".encode(), "٧".encode(), "²".encode(), "\ufeff".encode()),
    *(b"+", b"=", b"==", b"/", b"-", b"_", b".", b"..", b":", b",", b";q=0", b"%00", b"%2e%2e", b"?", b"&", b"#"),
    *(b"0", b"-0", b"-1", b"00", b"007", b"1_0", b"255", b"256", b"65535", b"9223372036854775807", b"9223372036854775808"),
    *(b"{", b"}", b"[", b"]", b"{}", b"[]", b'"', b"\\", b"\\u0000", b"\\ud800", b"null", b"true", b"NaN", b"1e999", b"}\n{"),
    *(b'"filename":', b'"checksum":', b'"publisher":', b'"index":', b"publisher a b", b"sha256:", b"old 0", b"index 0"),
    *(b"extra YQ==", b"x001/", b".p/1", b"tile/", b"none", b"any", b"all", b"group g 1 W0\n", b"quorum g\n", b"log ", b"witness "),
    *(b"<", b"<!", b"<![", b"<!--", b"<?", b"<a ", b"href=", b"'", b"</a>", b"</", b"&#", b"//[", b"#sha256="),
    *(b"HTTP/1.1", b"HTTP/1.0", b"GET / ", b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n", b"Host: a\r\n"),
]


def mutated(choose: random.Random, corpus: list[bytes]) -> bytes:
    """One to four random changes to one of the corpus."""
    data = choose.choice(corpus)
    for _ in range(choose.choice((1, 1, 1, 2, 2, 3, 4))):
        at, what = choose.randrange(len(data) + 1), choose.randrange(9)
        end = min(len(data), at + choose.choice((1, 1, 2, 4, 16, 100)))
        if what == 0:
            data = data[:at] + bytes([choose.randrange(256)]) + data[at + 1 :]
        elif what == 1 and at < len(data):
            data = data[:at] + bytes([data[at] ^ 1 << choose.randrange(8)]) + data[at + 1 :]
        elif what in (2, 3):
            data = data[:at] + choose.choice(TOKENS) + data[at if what == 2 else end :]
        elif what == 4:
            data = data[:at] + data[end:]
        elif what == 5:
            data = data[:end] + data[at:]
        elif what == 6:
            data = data[:at] + choose.choice(corpus)[at:]
        elif what == 7 and choose.randrange(100) == 0:  # long, to find what takes more time than it has bytes
            piece = data[at:end] or choose.choice(TOKENS)
            data = data[:at] + piece * (choose.choice((1_000, 30_000)) // len(piece)) + data[end:]
        else:
            data = data[:at] + data[end : 2 * end - at] + data[at:end] + data[2 * end - at :]
    return data


def fuzz(name: str, parser: Parser, count: int, seed: int) -> tuple[int, int, float]:
    """Feeds a parser with mutants of all that was refused in a new way or taken; counts what it took, and the ways."""
    choose = random.Random(f"{name} {seed}")
    corpus, ways = list(parser.seeds), {""}
    accepted, slowest = 0, 0.0
    for seed_ in parser.seeds:
        with contextlib.suppress(Error):
            parser.parse(seed_)
            accepted += 1
    assert accepted, name
    for _ in range(count):
        case = mutated(choose, corpus)
        begun = time.thread_time()
        try:
            value = parser.parse(case)
        except Error as error:
            way = f"{type(error).__name__} {re.split('[:0-9]', str(error))[0][:40]}"
        except BaseException as error:
            raise AssertionError(f"{name} (seed {seed}): {case!r}") from error
        else:
            way, accepted = "", accepted + 1
            if parser.encode and parser.encode(value) != case:
                raise AssertionError(f"{name} (seed {seed}): {case!r} is taken as {value!r}")
        slowest = max(slowest, took := time.thread_time() - begun)
        assert took < 1, f"{name} (seed {seed}) took {took:.1f} s: {len(case)} bytes {case[:300]!r} {case[-300:]!r}"
        if (way not in ways or (not way and choose.randrange(50) == 0)) and len(case) < 5_000:
            ways.add(way)
            corpus = corpus[-200:] + parser.seeds + [case]
    return accepted, len(ways), slowest


def fuzz_all(count: int, seed: int) -> int:
    """How many inputs there were."""
    for name, parser in parsers().items():
        accepted, ways, slowest = fuzz(name, parser, count, seed)
        print(f"{name}: {count} inputs, {accepted} taken, {ways} ways, {slowest * 1000:.0f} ms at most")
        assert ways > 1 or name in ("parse_lines", "error_message"), name  # those two refuse nothing as a whole
    return count * len(parsers())


def fuzz_http(url: str, count: int, seed: int) -> dict[int, int]:
    """Sends mutants of whole requests, each on a connection of its own; how often each status came."""
    choose, port = random.Random(seed), int(url.rpartition(":")[2])
    body, note = as_line(entry(0)), request_for(0, 0)
    gets = [*(path_.encode() for path_ in PATHS.values()), b"entries?filename=a", b"entry/0", b"entry/0/proof", b"status.json"]
    seeds = [
        *(data for data, _ in REQUESTS if len(data) < 10_000),
        b"POST /add HTTP/1.1\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body),
        BULK_HEAD % (3 * len(body)) + 3 * body,
        b"POST /add-checkpoint HTTP/1.1\r\nContent-Length: %d\r\n\r\n%b" % (len(note), note),
        *(b"GET /%b HTTP/1.1\r\n\r\n" % path_ for path_ in gets),
    ]
    statuses: dict[int, int] = {}
    for _ in range(count):
        case = mutated(choose, seeds)
        begun = time.monotonic()
        answer = raw(port, case, end=True)
        assert time.monotonic() - begun < 1, case
        assert not answer or re.match(rb"HTTP/1\.1 \d{3} [ -~]*\r\n", answer), case
        for status in re.findall(rb"HTTP/1\.1 (\d{3}) [A-Z]", answer):
            statuses[int(status)] = statuses.get(int(status), 0) + 1
    assert not [status for status in statuses if status not in (100, 200) and not 400 <= status < 500 and status != 505]
    return statuses


def fuzz_servers(tmp_path: Path, count: int, seed: int) -> int:
    """How many requests there were."""
    with (
        running("serve", "--storage-dir", "log", "--origin", LOG.name, cwd=tmp_path) as log,
        running("witness", "--log-public-key", "log/public.key", cwd=tmp_path) as witness,
    ):
        assert add(log.url, entry(0))[0] == 200
        for server in log, witness:
            statuses = fuzz_http(server.url, count, seed)
            print(f"{count} requests to {server.line.split()[3]}: {dict(sorted(statuses.items()))}")
            assert {200, 400, 404} <= set(statuses)
            code, error = server.stop()
            assert (code, "Traceback" in error, "internal error" in error) == (0, False, False)
    return 2 * count


@pytest.mark.parametrize(
    ("count", "requests", "seed"), [(600, 200, 20260701), pytest.param(42_000, 6_000, 20260702, marks=pytest.mark.slow)]
)
def test_T64_parsers_are_fuzzed(tmp_path: Path, count: int, requests: int, seed: int) -> None:
    """An Error or what encodes to just these bytes, within a second; HTTP answers with 4xx; nothing is a traceback."""
    total = fuzz_all(count, seed) + fuzz_servers(tmp_path, requests, seed)
    print(f"{total} inputs, seed {seed}")
    assert total > (1_000_000 if count > 600 else 14_000)


def test_T64_a_request_without_the_empty_line_is_refused() -> None:
    """Which the encoding of what it was taken for would have."""
    for body in b"old 5", b"old 0", b"", b"old 5\n":
        refuses(Malformed, btlog.AddCheckpoint.parse, body)


# --- The end, in every state ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def silent_server() -> Iterator[str]:
    """Something that takes connections and never says a word; its URL."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def never_reads(stack: contextlib.ExitStack, url: str, body: bytes) -> None:
    """A client that asks for a large answer, and takes none of it."""
    connection = stack.enter_context(socket.socket())
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", int(url.rpartition(":")[2])))
    connection.sendall(BULK_HEAD % len(body) + body)


@pytest.mark.parametrize("state", ["adds", "a bulk", "half a body", "clients that never read", "a witness that hangs"])
def test_T67_a_log_ends_in_every_state(tmp_path: Path, state: str) -> None:
    """Within 10 s and with exit code 0, and what it has acknowledged is there at the next start."""
    observer, over = Observer(), threading.Event()
    threads: list[threading.Thread] = []

    def work(do: Callable[[], Any]) -> None:
        def run() -> None:
            with contextlib.suppress(OSError, http.client.HTTPException, ValueError):  # an answer may be cut off
                do()

        threads.append(threading.Thread(target=run))
        threads[-1].start()

    with contextlib.closing(LocalLog(tmp_path / "log")) as log:
        assert observer.bulk(log.url, [entry(i) for i in range(300)]) == 200
    (tmp_path / "key").write_text(LOG_SKEY)
    (tmp_path / "key").chmod(0o600)
    (tmp_path / "w").write_text(WITNESS_VKEY)
    with contextlib.ExitStack() as stack:
        args = ["serve", "--storage-dir", "log", "--private-key", "key"]
        if state == "a witness that hangs":
            args += ["--witness-url", stack.enter_context(silent_server()), "--witness-public-key", "w"]
        server = stack.enter_context(running(*args, cwd=tmp_path))
        url = server.url
        if state == "adds":
            numbers = itertools.count()
            for _ in range(16):
                work(lambda: all(observer.add(url, entry(next(numbers), "add-")) == 200 for _ in iter(over.is_set, True)))
            eventually(lambda: len(observer.entries) > 350)
        elif state == "a bulk":
            work(lambda: observer.bulk(url, [entry(i, "bulk-") for i in range(8_000)]))
            eventually(lambda: ask(url, "/checkpoint")[2].split(b"\n")[1] != b"300")  # its answer is being made
        elif state == "half a body":
            for _ in range(20):
                connection = stack.enter_context(socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))))
                connection.sendall(b"POST /add HTTP/1.1\r\nContent-Length: 1000\r\n\r\n{")
        elif state == "clients that never read":
            for i in range(2):
                never_reads(stack, url, b"".join(as_line(entry(j, f"{i}-")) for j in range(8_000)))
            eventually(lambda: ask(url, "/checkpoint")[2].split(b"\n")[1] == b"16300")
        else:
            for i in range(8):
                work(lambda i=i: observer.add(url, entry(i, "add-")))  # type: ignore[misc]
            eventually(lambda: ask(url, "/healthz")[0] == 503)
        begun = time.monotonic()
        code, error = server.stop()
        took = time.monotonic() - begun
        over.set()
        for thread in threads:
            thread.join(20)
        assert (code, "Traceback" in error) == (0, False), error
        assert took < 10
    with contextlib.closing(LocalLog(tmp_path / "log")) as log:
        size = len(observer.hold(log.url))
    assert size == 16_300 if state == "clients that never read" else size >= 300


def test_T67_a_witness_ends_in_every_state(tmp_path: Path) -> None:
    (tmp_path / "log.key").write_text(LOG_VKEY)
    for number in signal.SIGTERM, signal.SIGINT:
        with contextlib.ExitStack() as stack:
            server = stack.enter_context(running("witness", "--log-public-key", "log.key", cwd=tmp_path))
            assert ask(server.url, "/add-checkpoint", "POST", request_for(0, 0))[0] == 200
            port = int(server.url.rpartition(":")[2])
            for start in (b"", b"GET /", b"POST /add-checkpoint HTTP/1.1\r\nContent-Length: 60000\r\n\r\nold") * 20:
                stack.enter_context(socket.create_connection(("127.0.0.1", port))).sendall(start)
            begun = time.monotonic()
            code, error = server.stop(number)
            assert time.monotonic() - begun < 10
            assert (code, "Traceback" in error) == (0, False), error


# --- Keys: what must not be seen, and what must not be written --------------------------------------------------------


def secrets_of(signer: btlog.Signer) -> list[bytes]:
    """Pieces of the seed, of nine bytes or so: as it is, in hex, and in base64 at each place in what is encoded."""
    seed = signer.seed
    forms = [seed.hex().encode(), seed.hex().upper().encode()]
    for before in range(3):  # bytes, of which some characters are made together with the seed's
        encoded = base64.b64encode(bytes(before) + seed)
        forms.append(encoded[-(-8 * before // 6) : 8 * (before + 32) // 6])
    return [form[at : at + 12] for form in forms for at in range(0, len(form) - 11, 12)] + [seed[:9], seed[-9:]]


def shows_nothing(text: str | bytes, *signers: btlog.Signer) -> None:
    data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape")
    for signer in signers:
        assert [secret for secret in secrets_of(signer) if secret in data] == [], data[:2000]


@contextlib.contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def test_T66_a_private_key_in_the_wrong_place_is_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The file of the private key, given for another one: what is wrong is said without quoting it."""
    monkeypatch.chdir(tmp_path)
    online = "--log-url http://127.0.0.1:1"
    for origin in "a", "log.example/an-origin-of-some-length":
        signer = new_key(origin)
        for name, text in {
            "KEY": f"{signer.encode()}\n",
            "CUT": signer.encode()[:-3],
            "TWICE": f"{signer.encode()}\n" * 2,
            "POLICY": f"log {signer.encode()}\nquorum none\n",
            "PUBLIC": f"{btlog.encode_vkey(signer.key)}\n",
        }.items():
            (tmp_path / name).write_text(text)
            (tmp_path / name).chmod(0o600)
        for line in [
            "serve --private-key KEY --public-key KEY", "serve --policy KEY", "serve --policy POLICY",
            "serve --private-key CUT", "serve --private-key TWICE", "witness --private-key CUT", "witness --policy KEY",
            "serve --witness-url http://127.0.0.1:1 --witness-public-key KEY", "witness --log-public-key KEY",
            f"add KEY {online} --public-key KEY", f"add KEY {online} --policy KEY", "verify KEY --public-key KEY",
            "verify KEY --public-key PUBLIC --witness-public-key KEY", "verify KEY --public-key PUBLIC --proof KEY",
            "vkey --origin a --public-key-path KEY",
        ]:  # fmt: skip
            port = ["--port", "0"] if line.startswith(("serve", "witness")) else []
            code, out, err = call_btlog(*line.split(), *port)
            said = out + err + caplog.text
            assert (code in (1, 2, 3), bool(said)) == (True, True), line
            shows_nothing(said, signer)
    refuses(Malformed, btlog.read_token, "KEY")  # as a token it would be sent


def test_T66_private_keys_are_private_whatever_the_umask(tmp_path: Path) -> None:
    """The next test looks at the keys that a log and a witness make by themselves."""
    for mask in 0, 0o077, 0o277:
        (tmp_path / str(mask)).mkdir()
        with contextlib.chdir(tmp_path / str(mask)), umask(mask):
            assert call_btlog("keygen", "--origin", "a")[0] == 0
            assert os.stat("private.key").st_mode & 0o177 == 0


def test_T66_nothing_of_a_private_key_leaves_a_process(tmp_path: Path) -> None:
    """All that a log and its witness print and answer, well and ill treated, is searched for their seeds."""
    said: list[str | bytes] = []
    with umask(0):
        target = Target(tmp_path, witnessed=True)
    with contextlib.closing(target):
        files = [tmp_path / "private.key", tmp_path / "witness-private.key"]
        signers = [btlog.Signer.parse(path_.read_text().removesuffix("\n")) for path_ in files]
        assert [path_.stat().st_mode & 0o777 for path_ in files] == [0o600, 0o600]
        for name, process in target.processes.items():
            limits = Path(f"/proc/{process.process.pid}/limits").read_text()
            assert re.search(r"^Max core file size +0 +0 ", limits, re.MULTILINE)
            said.append(process.line)
            for path_ in (
                "/", "/status.json", "/healthz", "/metrics", "/checkpoint", "/.well-known/public-key", "/private.key",
                "/entries?filename=a", "/entry/0", "/entry/0/proof", "/log/private.key", "/../private.key", "/%00",
                f"/{hashlib.sha256(signers[0].name.encode()).hexdigest()}/checkpoint",
            ):  # fmt: skip
                status, headers, body = ask(process.url, path_)
                said += [str(headers), body]
                assert (name, path_) != ("log", "/status.json") or status == 200
            port = int(process.url.rpartition(":")[2])
            said += [raw(port, data, end=True) for data, _ in REQUESTS if len(data) < 10_000]
        said += [json.dumps(add(target.url, entry(i))[1]) for i in range(2)]
        said.append(json.dumps(bulk(target.url, b"".join(as_line(entry(i)) for i in range(300)) + b"x\n")[1]))
        target.kill("witness")
        said.append(ask(target.url, "/add", "POST", b"{}")[2])
        with contextlib.closing(sqlite3.connect(tmp_path / "log" / "log.sqlite3")) as db, db:
            db.execute("UPDATE bundle SET data = x'00'")  # so that it has something to complain of
        said.append(ask(target.url, "/entry/299")[2])
        said += [process.stop()[1] for process in target.processes.values()]
    assert "internal error" in str(said)
    assert len(said) > 150
    for text in said:
        shows_nothing(text, *signers)
    for file in tmp_path.rglob("*"):
        if file.is_file() and file not in files:
            shows_nothing(file.read_bytes(), *signers)
    with pytest.raises(AssertionError):  # the search finds what it is for
        shows_nothing(files[0].read_bytes(), *signers)


# Starts a command without the right of a superuser to write where the mode of a file forbids it.
POWERLESS = """
import ctypes, os, sys
if os.geteuid() == 0:
    assert ctypes.CDLL(None, use_errno=True).prctl(24, 1, 0, 0, 0) == 0, "PR_CAPBSET_DROP of CAP_DAC_OVERRIDE"
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def modes_of(process: int, folder: Path) -> dict[str, set[int]]:
    """How a process has opened which files of a folder."""
    modes: dict[str, set[int]] = {}
    for info in Path(f"/proc/{process}/fdinfo").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            path_ = Path(f"/proc/{process}/fd/{info.name}").resolve()
            [flags] = re.findall(r"^flags:\s+(\d+)$", info.read_text(), re.MULTILINE)
            if path_.is_relative_to(folder):
                modes.setdefault(path_.name, set()).add(int(flags, 8) & os.O_ACCMODE)
    return modes


def test_a_reader_needs_no_private_key_and_no_right_to_write(tmp_path: Path) -> None:
    """T18: where nothing can be written a reader serves, and a writer ends at once and leaves nothing behind.

    T66: the private key that the first writer made is private, whatever the umask.
    """
    folder = tmp_path / "log"
    with umask(0):
        context = running("serve", "--storage-dir", "log", "--origin", LOG.name, cwd=tmp_path)
        writer = context.__enter__()
    with contextlib.ExitStack() as stack:
        stack.push(context.__exit__)
        assert (folder / "private.key").stat().st_mode & 0o777 == 0o600
        policy = btlog.simple_policy([VerifierKey.parse(writer.line.split()[4])])
        assert bulk(writer.url, b"".join(as_line(entry(i)) for i in range(300)))[0] == 200
        (folder / "private.key").rename(tmp_path / "private.key")
        for path_ in folder.iterdir():
            path_.chmod(0o444)
        folder.chmod(0o555)
        stack.callback(folder.chmod, 0o755)
        before = {path_.name: path_.read_bytes() for path_ in folder.iterdir()}

        def start(*args: str) -> subprocess.Popen[str]:
            command = [sys.executable, "-c", POWERLESS, *args]
            return subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

        serve = (str(SOURCE), "serve", "--storage-dir", "log", "--port", "0")
        with start("-c", "open('log/x', 'w')") as probe:
            assert "PermissionError" in probe.communicate(timeout=20)[1]  # or this would show nothing
        with start(*serve) as second, start(*serve, "--read-only") as reader:
            out, err = second.communicate(timeout=20)
            assert (second.returncode, out, err.count("\n")) == (3, "", 1)
            try:
                assert reader.stdout
                url = reader.stdout.readline().split()[0]
                assert walk(url, policy) == [entry(i) for i in range(300)]
                assert add(url, entry(0))[0] == 405
                modes = modes_of(reader.pid, folder)
                assert "log.sqlite3" in modes
                assert set.union(*modes.values()) == {os.O_RDONLY}
            finally:
                reader.terminate()
            assert (reader.wait(15), reader.communicate()[1]) == (0, "")
        folder.chmod(0o755)
        assert {path_.name: path_.read_bytes() for path_ in folder.iterdir()} == before
        assert modes_of(writer.process.pid, folder)["log.sqlite3"] == {os.O_RDWR}
        with running("serve", "--storage-dir", "log", "--read-only", cwd=tmp_path) as able:  # and does not want to
            assert ask(able.url, "/entry/299")[0] == 200
            assert modes_of(able.process.pid, folder)["log.sqlite3"] == {os.O_RDONLY}
            assert able.stop() == (0, "")
        assert writer.stop()[0] == 0


# --- A world of good files, which are logged, and of evil ones under the same names -----------------------------------

BACKEND = '''
import os, zipfile

HERE = os.path.dirname(os.path.abspath(__file__))

def _wheel(folder, file, text):
    info = "NAME-VERSION.dist-info"
    files = {file: text, f"{info}/METADATA": "Metadata-Version: 2.1\\nName: NAME\\nVersion: VERSION\\n"}
    files[f"{info}/WHEEL"] = "Wheel-Version: 1.0\\nGenerator: test\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n"
    files[f"{info}/RECORD"] = "".join(f"{name},,\\n" for name in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(os.path.join(folder, "NAME-VERSION-py3-none-any.whl"), "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return "NAME-VERSION-py3-none-any.whl"

def build_wheel(folder, config_settings=None, metadata_directory=None):
    with open(os.path.join(HERE, "NAME.py")) as file:
        return _wheel(folder, "NAME.py", file.read())

def build_editable(folder, config_settings=None, metadata_directory=None):
    return _wheel(folder, "NAME.pth", HERE + "\\n")

def get_requires_for_build_wheel(config_settings=None):
    return []

get_requires_for_build_editable = get_requires_for_build_wheel
'''
BUILD_SYSTEM = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'

# A process that has pip imported, and forks for each command that it reads. What rustc and lsb_release say and what
# certificates there are has nothing to do with what is taken, and takes long.
PIP_SERVER = """
import json, os, sys, warnings
warnings.simplefilter("ignore")
import pip._internal.commands.install
import pip._internal.network.session
import pip._internal.resolution.resolvelib.resolver
import pip._vendor.rich.console
from pip._internal.cli import index_command
from pip._internal.cli.main import main
pip._internal.network.session.user_agent = lambda: "pip"
index_command._create_truststore_ssl_context = lambda: None
for line in sys.stdin:
    job = json.loads(line)
    if not (child := os.fork()):
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(os.open(job["log"], os.O_CREAT | os.O_WRONLY), 1)
        os.dup2(1, 2)
        os.chdir(job["cwd"])
        sys.exit(main(job["argv"]))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
Files = dict[str, Any]  # by name the text, or bytes


def sources_of(name: str, version: str, token: str) -> Files:
    """A project that brings its own backend, so that nothing else is needed to build it."""
    return {
        "pyproject.toml": f'{BUILD_SYSTEM}[project]\nname = "{name}"\nversion = "{version}"\n',
        "backend.py": BACKEND.replace("NAME", name).replace("VERSION", version),
        f"{name}.py": f"TOKEN = {token!r}\n",
        "PKG-INFO": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
    }


def inside(folder: str, token: str = "tree/demo") -> Files:
    return {f"{folder}/{name}": data for name, data in sources_of("demo", "1.0", token).items()}


def wheel_of(path_: Path, token: str, *lines: str) -> None:
    """A wheel whose module says which file it came from; `lines` go into its metadata."""
    name, version = path_.name.split("-")[:2]
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}.py": f"TOKEN = {token!r}\n",
        f"{info}/METADATA": "\n".join(["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *lines, ""]),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{file},,\n" for file in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(path_, "w") as archive:
        for file, text in files.items():
            archive.writestr(zipfile.ZipInfo(file), text)


def sdist_of(path_: Path, token: str, mode: str = "w:gz") -> None:
    """An sdist as a tar in a mode of tarfile.open(), or with mode "" as a zip."""
    [stem] = re.findall(r"^[a-z]+-[0-9.]*[0-9]", path_.name)
    name, version = stem.split("-")
    files = {f"{stem}/{file}": text for file, text in sources_of(name, version, token).items()}
    path_.parent.mkdir(parents=True, exist_ok=True)
    if not mode:
        with zipfile.ZipFile(path_, "w") as zipped:
            for file, text in files.items():
                zipped.writestr(zipfile.ZipInfo(file), text)
        return
    with tarfile.open(path_, mode) as archive:  # type: ignore[call-overload]
        for file, text in files.items():
            member = tarfile.TarInfo(file)
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))


def raw_zstd(data: bytes) -> bytes:
    """A zstd frame that holds `data` as it is, in one block."""
    assert len(data) < 1 << 17
    size = len(data).to_bytes(4, "little")
    return b"\x28\xb5\x2f\xfd" + bytes([0b10100000]) + size + (len(data) << 3 | 1).to_bytes(3, "little") + data


@dataclasses.dataclass(frozen=True)
class Taken:
    """What an installer did: its exit code, the files whose content it installed, and what it said."""

    code: int
    tokens: frozenset[str]
    said: str


class World:
    """The files, a server of them, a log of the good ones, and the two installers."""

    def __init__(self, root: Path) -> None:
        self.root, self.number = root, 0
        self.sums: dict[str, str] = {}  # of each token the SHA-256 of its file; none for folders and repositories
        files = root / "files"

        class Handler(http.server.SimpleHTTPRequestHandler):
            def __init__(self, *args: Any) -> None:
                super().__init__(*args, directory=str(files))

            def log_message(self, *args: object) -> None: ...

        self.make_files()
        self.log = root / "log"
        with contextlib.closing(found(self.log)) as store:
            good = [token for token in self.sums if token.startswith("good/")]
            store.append([Entry(t[5:], f"sha256:{self.sums[t]}").encode() for t in good], seal, True)
        (root / "public.key").write_text(f"{LOG_VKEY}\n")
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,))
        self.thread.start()
        unwanted = ("PIP_", "UV_", "GIT_", "VIRTUAL_ENV", "PYTHONWARN", "COV")
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(unwanted) and "proxy" not in k.lower()},
            "PIP_CONFIG_FILE": os.devnull, "PIP_NO_CACHE_DIR": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "UV_CACHE_DIR": str(root / "uv-cache"), "UV_NO_CONFIG": "1", "UV_PYTHON_DOWNLOADS": "never",
            "UV_LINK_MODE": "copy", "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull,
            "HOME": str(root / "home"), "NO_COLOR": "1", "EVILVAR": "", "LOGGED": "demo", "EVIL_FILE": "evil.txt",
            "EVIL_URL": f"{self.url}/evil/{WHEEL_NAME}",
        }  # fmt: skip
        (root / "home").mkdir()
        self.make_repository()
        self.words = self.make_words()
        for folder in root, files:
            (folder / "evil.txt").write_text(self.fill("<EVIL>\n"))
            (folder / "c.txt").write_text(self.fill("demo @ <X>#sha256=<E>\n"))
        (files / "links.html").write_text(self.fill(PAGE))
        command = [sys.executable, "-c", PIP_SERVER]
        self.pip_process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=self.environment
        )

    def make_files(self) -> None:
        """Evil wheels of build 1 and of version 3.0 are what is taken where nothing says which."""
        files = self.root / "files"
        extra = ["Provides-Extra: more", 'Requires-Dist: dep; extra == "more"']
        needs = {"withdep": ["Requires-Dist: dep"], "extras": extra}
        for kind in "good", "evil":
            (files / kind).mkdir(parents=True)
            wheels = [(name, "1.0") for name in PROJECTS] + [("demo", "2.0"), ("demo", "1.0+local")]
            if kind == "evil":
                wheels += [(name, version) for name in PROJECTS for version in ("1.0-1", "3.0")] + [("evil", "6.6")]
                sdist_of(files / "evil" / "demo-1.0.zip", "evil/demo-1.0.zip", "")
            for name, version in wheels:
                file = files / kind / f"{name}-{version}-py3-none-any.whl"
                wheel_of(file, f"{kind}/{file.name}", *needs.get(name, []) * (version[0] != "3" and version != "1.0-1"))
            for stem in "demo-1.0", "dep-1.0":
                sdist_of(files / kind / f"{stem}.tar.gz", f"{kind}/{stem}.tar.gz")
        for file in sorted(files.rglob("*-*")):
            self.sums[f"{file.parent.name}/{file.name}"] = hashlib.sha256(file.read_bytes()).hexdigest()
        for file in (files / "good").glob("*.whl"):  # beside good/x.whl, and as uv.lock's zstd names it, evil/x.whl
            Path(f"{file}.zst").write_bytes(raw_zstd((files / "evil" / file.name).read_bytes()))
        for project in [*PROJECTS, "evil"]:
            (files / "simple" / project).mkdir(parents=True)
            shown = [t for t in self.sums if t.split("/")[1].startswith(f"{project}-") and self.on_page(t)]
            links = "".join(f'<a href="/{t}#sha256={self.sums[t]}">{t.split("/")[1]}</a>\n' for t in shown)
            (files / "simple" / project / "index.html").write_text(f"<!DOCTYPE html><html><body>{links}</body></html>")
        for name, text in sources_of("demo", "1.0", "tree/demo").items():
            (self.root / "tree").mkdir(exist_ok=True)
            (self.root / "tree" / name).write_text(text)

    def on_page(self, token: str) -> bool:
        """Whether the index shows a file: all good ones, and evil ones that are preferred by who may choose."""
        preferred = any(version in token for version in ("1.0-1-", "3.0-", "6.6-"))
        return "+local" not in token and (token.startswith("good/") or preferred)

    def make_repository(self) -> None:
        repository = self.root / "repo"
        shutil.copytree(self.root / "tree", repository)
        (repository / "demo.py").write_text("TOKEN = 'git/demo'\n")
        who = ["-c", "user.name=x", "-c", "user.email=x@x.example"]
        for words in ["init", "-q"], ["add", "."], [*who, "commit", "-q", "-m", "x"], ["rev-parse", "HEAD"]:
            done = subprocess.run(
                ["git", *words], cwd=repository, check=True, env=self.environment, capture_output=True
            )
        self.commit = done.stdout.decode().strip()

    def close(self) -> None:
        self.pip_process.communicate(timeout=20)
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    # --- What inputs are written with ---------------------------------------------------------------------------------

    def make_words(self) -> dict[str, str]:
        """What stands for <words>: for <G> and <E> the SHA-256 of demo-1.0 as it is logged, and as it is not."""
        good, evil = self.root / "files" / "good", self.root / "files" / "evil"
        words = {
            "U": self.url, "P": str(self.root), "PORT": self.url.rpartition(":")[2], "C": self.commit, "W": WHEEL_NAME,
            "H": "--hash=sha256:<G>", "X": "<U>/evil/<W>", "Y": "<U>/good/<W>", "HG": 'hashes = { sha256 = "<G>" }',
            "PW": 'wheels = [{ url = "<Y>", <HG> }]', "UW": '{ url = "<Y>", hash = "sha256:<G>" }',
            "XE": '{ url = "<X>", hash = "sha256:<E>" }', "EVIL": "evil==6.6 --hash=sha256:<EE>",
            "OK": "demo==1.0 <H>", "DX": "demo @ <X>", "F": "<P>/files/evil/<W>", "T": "<P>/tree",
            "R": "git+file://<P>/repo", "X1": "<U>/evil/demo-1.0-1-py3-none-any.whl",
            "D": "<U>/good/dep-1.0-py3-none-any.whl",
            "XS": "<U>/evil/demo-1.0.tar.gz",
            "PD": '[[packages]]\nname = "demo"\nversion = "1.0"\n', "UD": UV_DEMO + UV_SIMPLE,
            "PDEP": '[[packages]]\nname = "dep"\nversion = "1.0"',
            "PIN": "withdep==1.0 --hash=sha256:<GW>", "WD": "<U>/good/withdep-1.0-py3-none-any.whl",
            "WITH": "<WD>#sha256=<GW>",
            "EZST": hashlib.sha256((good / f"{WHEEL_NAME}.zst").read_bytes()).hexdigest(),
            "EZSTN": str((good / f"{WHEEL_NAME}.zst").stat().st_size), "EN": str((evil / WHEEL_NAME).stat().st_size),
        }  # fmt: skip
        for kind in "md5", "sha1", "sha224", "sha384", "sha512", "blake2b":
            name = {"md5": "EM", "blake2b": "EB2"}.get(kind, f"E{kind[3:]}")
            words[name] = hashlib.new(kind, (evil / WHEEL_NAME).read_bytes()).hexdigest()
        for letters, file in {
            **{letter: f"{name}-1.0-py3-none-any.whl" for name, letter in PROJECTS.items()},
            "2": "demo-2.0-py3-none-any.whl", "S": "demo-1.0.tar.gz", "DS": "dep-1.0.tar.gz", "Z": "demo-1.0.zip",
            "I": "demo-1.0-1-py3-none-any.whl", "E": "evil-6.6-py3-none-any.whl",
        }.items():  # fmt: skip
            for folder in good, evil:
                if (folder / file).exists():
                    value = self.sums[f"{folder.name}/{file}"]
                    words[f"{folder.name[0].upper()}{letters}"] = value
                    words[f"{folder.name[0].upper()}{letters}UP"] = value.upper()
                    words[f"Z{letters}"] = str((good / file).stat().st_size if folder == good else 0)
        return words

    def fill(self, text: str) -> str:
        """The text with what stands in angle brackets replaced: URLs, folders, checksums, and words made of these."""
        while (filled := re.sub(r"<([A-Z0-9]+)>", lambda m: self.words[m[1]], text)) != text:
            text = filled
        return text

    def folder(self, files: Files) -> Path:
        """A new folder with these files."""
        self.number += 1
        folder = self.root / "inputs" / str(self.number)
        folder.mkdir(parents=True)
        for name, data in files.items():
            file = folder / self.fill(name)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(self.fill(data).encode("utf-8", "surrogateescape") if isinstance(data, str) else data)
        return folder

    # --- The three that are held against each other -------------------------------------------------------------------

    def verify(self, folder: Path, target: str) -> tuple[int, set[str], str]:
        """Exit code of `verify`, the SHA-256 that it vouched for, and what it said."""
        with contextlib.chdir(folder):
            words = ("--json", "--public-key", str(self.root / "public.key"), "--storage-dir", str(self.log))
            code, out, err = call_btlog("verify", target, *words)
        assert code in (0, 1, 2, 3)
        assert "Traceback" not in err
        told = json.loads(out) if out else {"artifacts": [], "skipped": []}
        said = err + "".join(f"not looked at: {skipped['reason']}\n" for skipped in told["skipped"])
        return code, {a["checksum"].removeprefix("sha256:") for a in told["artifacts"] if a["ok"]}, said

    def taken(self, target: Path, code: int, said: str) -> Taken:
        tokens = set()
        for file in target.rglob("*"):
            if file.suffix == ".py" and (found_ := re.search(r"TOKEN = '(.*)'", file.read_text())):
                tokens.add(found_[1])
            elif file.suffix == ".pth" and str(self.root) in file.read_text():
                tokens.add("tree/editable")
        shutil.rmtree(target, ignore_errors=True)
        return Taken(code, frozenset(tokens), said)

    def pip(self, folder: Path, *words: str, index: bool = True) -> Taken:
        """What `pip install` takes, in a process of its own."""
        target = folder / "by-pip"
        where = ("--index-url", f"{self.url}/simple/") if index else ("--no-index",)
        command = ["install", "-q", "--no-compile", "--no-warn-conflicts", "--root-user-action", "ignore", *where]
        command += ["--retries", "0", "--timeout", "5", "--target", str(target), "--src", str(folder / "src"), *words]
        job = {"argv": command, "cwd": str(folder), "log": str(folder / "pip.log")}
        assert self.pip_process.stdin
        assert self.pip_process.stdout
        self.pip_process.stdin.write(f"{json.dumps(job)}\n")
        self.pip_process.stdin.flush()
        code = int(self.pip_process.stdout.readline())
        return self.taken(target, code, (folder / "pip.log").read_text(errors="replace"))

    def uv(self, folder: Path, *words: str, target: Path, **variables: str) -> Taken:
        """What a command of uv takes, and puts into `target`."""
        from uv import find_uv_bin  # only slow tests need it

        done = subprocess.run(
            [find_uv_bin(), *words, "-q", "--python", sys.executable], cwd=folder, capture_output=True, text=True,
            errors="replace", timeout=120, check=False, env=self.environment | variables,
        )  # fmt: skip
        return self.taken(target, done.returncode, done.stderr)

    def uv_pip(self, folder: Path, *words: str, index: bool = True) -> Taken:
        """What `uv pip install` or `uv pip sync` takes."""
        where = ("--default-index", f"{self.url}/simple/") if index else ("--no-index",)
        target = folder / "by-uv"
        return self.uv(folder, "pip", *words, *where, "--target", str(target), target=target)

    def install(self, folder: Path, target: str, turn: int | None = None) -> dict[str, Taken]:
        """What pip and uv take from an input, by the commands for its kind; with a turn by one of uv's only."""
        kind = Path(target).name
        if (folder / target).is_dir():
            links = ("--find-links", target, "demo")
            taken = self.pip(folder, *links, index=False)
            return {"pip": taken, "uv install": self.uv_pip(folder, "install", *links, index=False)}
        if kind == "uv.lock":
            if not (folder / "pyproject.toml").exists():
                (folder / "pyproject.toml").write_text(PROJECT)
            made = folder / "by-uv-sync"
            return {"uv sync": self.uv(folder, "sync", "--frozen", target=made, UV_PROJECT_ENVIRONMENT=str(made))}
        if kind.endswith(".lock"):  # its environment can't be chosen: it is in uv's cache
            script, cache = kind.removesuffix(".lock"), folder / "cache"
            (folder / script).write_text(SCRIPT)
            words, made = ("sync", "--frozen", "--script", script), cache / "environments-v2"
            return {"uv sync": self.uv(folder, *words, target=made, UV_CACHE_DIR=str(cache))}
        commands = {"uv pip sync": ["sync"], "uv install": ["install", "-r"]}
        if not kind.startswith("pylock"):
            commands["uv pip sync"] = ["sync", "--allow-empty-requirements"]
            commands["uv install --require-hashes"] = ["install", "--require-hashes", "-r"]
        chosen = [*commands] if turn is None else [[*commands][turn % len(commands)]]
        by_pip = self.pip(folder, "-r", target)
        return {"pip": by_pip, **{by: self.uv_pip(folder, *commands[by], target) for by in chosen}}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with contextlib.closing(World(tmp_path_factory.mktemp("world"))) as made:
        yield made


# --- The one invariant ------------------------------------------------------------------------------------------------

# How `verify` says that folders of sources were left out.
NOT_LOOKED_AT = r"(?i)not (been )?(looked|checked|covered|verified|vouched)|director|editable|folder|sources? tree"


@dataclasses.dataclass
class Outcome:
    """What the three made of one input."""

    code: int
    vouched: set[str]
    said: str
    taken: dict[str, Taken]

    def evil(self, world: World) -> dict[str, list[str]]:
        """By installer, what it took that nobody has vouched for.

        Two things are held against nobody. `uv pip install` without --require-hashes takes dependencies that no line
        names, with no checksum at all, and nothing in the input tells of these (see test_V4_what_uv_takes_beside). And
        sources in a folder, as the project itself is one, are no files of an index, if `verify` says that it did not
        look at them.
        """
        good = self.vouched if self.code == 0 else {v for t, v in world.sums.items() if t.startswith("good/")}
        left_out = self.code == 0 and re.search(NOT_LOOKED_AT, self.said)
        strange = {
            by: [
                t for t in sorted(taken.tokens)
                if world.sums.get(t) not in good and not (left_out and t.startswith("tree/"))
                and not (by == "uv install" and t.startswith("evil/dep-"))
            ] for by, taken in self.taken.items()
        }  # fmt: skip
        return {by: tokens for by, tokens in strange.items() if tokens}


def judge(world: World, files: Files, target: str, always: bool = False, turn: int | None = None) -> Outcome:
    """Verifies an input, and has it installed: always, or where it was vouched for."""
    folder = world.folder(files)
    outcome = Outcome(*world.verify(folder, target), {})
    if always or outcome.code == 0:
        outcome.taken = world.install(folder, target, turn)
    shutil.rmtree(folder, ignore_errors=True)
    return outcome


# --- V: verify says yes, and the installer takes another file ---------------------------------------------------------
# Files of requirements stand without their last newline. See World.make_words for what is in angle brackets.

PROJECTS = {"demo": "", "dep": "D", "withdep": "W", "kit": "K", "solo": "O", "extras": "X"}
WHEEL_NAME = "demo-1.0-py3-none-any.whl"
PROJECT = '[project]\nname = "app"\nversion = "0"\nrequires-python = ">=3.11"\ndependencies = ["demo"]\n'
SCRIPT = '# /// script\n# requires-python = ">=3.11"\n# dependencies = ["demo"]\n# ///\n'
PAGE = '<!DOCTYPE html><html><body><a href="<U>/evil/demo-3.0-py3-none-any.whl">x</a></body></html>'
UV_BEGIN = 'version = 1\nrevision = 3\nrequires-python = ">=3.11"\n'
UV_APP = """
[[package]]
name = "app"
version = "0"
source = { virtual = "." }
dependencies = [{ name = "demo" }]
[package.metadata]
requires-dist = [{ name = "demo" }]
"""
UV_DEMO = '[[package]]\nname = "demo"\nversion = "1.0"\n'
UV_SIMPLE = 'source = { registry = "<U>/simple" }\n'
PY_BEGIN = 'lock-version = "1.0"\ncreated-by = "x"\n'


def requirements_of(*texts: str) -> list[Files]:
    return [{"r.txt": f"{text}\n"} for text in texts]


def uv_lock(more: str, source: str = UV_SIMPLE, head: str = UV_BEGIN + UV_APP) -> Files:
    return {"uv.lock": f"{head}{UV_DEMO}{source}{more}\n"}


def pylock(body: str, name: str = "demo", version: str = "1.0", head: str = PY_BEGIN) -> Files:
    return {"pylock.toml": f'{head}[[packages]]\nname = "{name}"\nversion = "{version}"\n{body}\n'}


# Fragments and URLs, of files, of repositories and of folders.
V1 = [
    "<DX>#md5=<EM> <H>", "<DX>#sha512=<E512> <H>", "<DX>#sha256=<E> <H>", "<DX>#sha256=<EUP> <H>",
    "<DX>#blake2b=<EB2> <H>", "<DX>#md5=<EM>&sha256=<G>", "<DX>#sha256=<E>&sha256=<G>", "<DX>#sha256=<G>&sha512=<E512>",
    "<DX>#sha256=<G>", "<DX>#sha256=<GUP>", "<DX>#sha256=<G>x", "<DX>#xsha256=<G>", "<DX>#SHA256=<G>",
    "<DX>#Sha256=<G>&md5=<EM>", "<DX>#sha256%3D<G>", "<DX>%23sha256=<G>", "<DX>#sha256=sha256:<G>", "<DX>#;sha256=<G>",
    "<DX>##sha256=<G>", "<DX>#md5=<EM>#sha256=<G>", "<DX>#subdirectory=x&sha256=<G>", "<DX>?sha256=<G>",
    "<DX>?x&sha256=<G>", "<DX>?x&md5=<EM>#sha256=<G>", "<DX>?x&sha256=<E> <H>", "<DX>?x&sha256=<E>#sha256=<G> <H>",
    "demo @ http://u&md5=<EM>&x@127.0.0.1:<PORT>/evil/<W> <H>",
    "demo @ http://sha256=<G>@127.0.0.1:<PORT>/evil/<W> <H>", "demo @ <U>/&sha256=<E>&/../evil/<W> <H>",
    "demo @ <U>/good/../evil/<W>;&md5=<EM> <H>", "<X>#md5=<EM> <H>", "<X>#sha256=<G>", "<X>?a&sha256=<E> <H>",
    "<X> <H>", "<U>/evil/demo-1.0.zip#sha256=<EZ> <H>", "demo @ <R>#sha256=<G>", "demo @ <R> <H>", "demo @ <R>@<C> <H>",
    "<R>#egg=demo&sha256=<G>", "<R>#egg=demo <H>", "demo @ GIT+FILE://<P>/repo#sha256=<G>", "demo @ <R>/<W>#sha256=<G>",
    "-e <R>#egg=demo&sha256=<G>", "-e <R>#egg=demo <H>", "demo @ file://<T>#sha256=<G>", "demo @ file://<T> <H>",
    "demo @ file:<T>#sha256=<G>", "demo @ FILE://<T>#sha256=<G>", "demo @ <T>#sha256=<G>", "<T> <H>", "<T>#sha256=<G>",
    "file://<T>#egg=demo&sha256=<G>", "-e <T>#sha256=<G>", "-e <T> <H>", "demo @ file://<F>#sha256=<G>",
    "demo @ file://<F>#sha256=<E> <H>", "<F> <H>", "<F>#md5=<EM> <H>", "file://<F>#sha256=<E> <H>",
]  # fmt: skip
# Paths that are folders here: what stands for one, and where it is.
V1_FOLDERS = {
    "./demo-1.0.zip": "demo-1.0.zip", "./<W>": "<W>", "./tree": "tree", ".": ".", "./": ".", "demo @ .": ".",
    ".[x]": ".", "demo": "demo", "demo/": "demo", "demo==1.0": "demo==1.0", "demo-1.0.zip": "demo-1.0.zip",
    "./demo[more]": "demo", "demo @ file:demo-1.0.zip": "demo-1.0.zip",
    "demo @ demo-1.0.zip#sha256=<G>": "demo-1.0.zip", "demo @ file://<P>/tree/demo-1.0.tar.gz/../#sha256=<G>": "tree",
}  # fmt: skip
# Files in a lock file, each as a wheel and as an archive of pylock.toml and as a wheel of uv.lock.
V2_FILES = [
    'url = "<X>", <HG>', 'url = "<X>", hash = "sha256:<E>", <HG>', 'url = "<X>", hash = "sha256:<G>"',
    'url = "<X>", hashes = { sha256 = "<G>", sha512 = "<E512>" }',
    'url = "<X>", hashes = { sha256 = "<G>", md5 = "<EM>" }', 'url = "<X>", hashes = { SHA256 = "<G>" }',
    'url = "<X>", hashes = { sha256 = "<EUP>" }', 'url = "<Y>", hashes = { sha256 = "<GUP>" }',
    'url = "<X>#md5=<EM>", <HG>', 'url = "<X>?&sha256=<E>", <HG>', 'url = "<Y>", path = "<F>", <HG>',
    'path = "<F>", <HG>', 'path = "<P>/files/good/<W>", <HG>', 'url = "<X>?&sha512=<E512>", <HG>', 'path = "<T>", <HG>',
    'url = "file://<T>", <HG>', 'url = "file://<T>/x.zip/..", <HG>', 'url = "<R>", <HG>',
    'url = "<X>", <HG>, "hashes " = 1', 'url = "<X>", hashes = { sha256 = ["<G>"] }', 'url = "<X>", hashes = {}',
    'url = "<X>"', 'url = "<X>", hash = "sha512:<E512>"', 'url = "<X>", hash = "sha256:<EUP>"',
    'url = "<X>#sha256=<G>"', 'url = "<X>#md5=<EM>", hash = "sha256:<G>"', 'url = "<X>", hash = "md5:<EM>"',
    'url = "<Y>", hash = "sha256:<G>", zstd = { hash = "sha256:<EZST>", size = <EZSTN> }',
    'url = "<Y>", hash = "sha256:<G>", zstd = { hash = "sha256:<E>", size = <EN> }',
    'url = "<Y>", path = "<F>", hash = "sha256:<G>"', 'url = "<X1>", hash = "sha256:<G>"',
    'url = "<U>/evil/evil-6.6-py3-none-any.whl", hash = "sha256:<EE>"',
]  # fmt: skip
V2_UV = [
    *(f"wheels = [{{ {file} }}]" for file in V2_FILES),
    "wheels = [<UW>]", 'wheels = [<UW>]\nsdist = { url = "<XS>", hash = "sha256:<GS>" }',
    'wheels = [<UW>]\noptional-dependencies = { x = [{ name = "dep" }] }', "wheels = [<UW>, <XE>]",
    'wheels = [<UW>]\n[package.wheels-extra]\nurl = "<X>"',
    'wheels = [<UW>]\n[[distribution]]\nname = "x"\nversion = "1"\nsource = { registry = "<U>/simple" }',
    "wheels = [<XE>]\n<PD><PW>", "wheels = [<UW>]\n<UD>wheels = [<XE>]",
    'wheels = [<UW>]\n[[package]]\nname = "demo"\nversion = "3.0"\nsource = { registry = "<U>/simple" }\n'
    'wheels = [{ url = "<U>/evil/demo-3.0-py3-none-any.whl", hash = "sha256:<G>" }]',
    'wheels = [<UW>]\ndependencies = [{ name = \'evil\' }]\n[[package]]\nname = "evil"\nversion = "6.6"\n'
    'source = { directory = "<T>" }',
]  # fmt: skip
# Sources of uv.lock: with a good wheel and without, and with something else.
V2_SOURCES = [
    'url = "<X>", virtual = "x"', 'url = "<X>", directory = "x"', 'registry = "<U>/simple", url = "<X>"',
    'registry = "<U>/simple", git = "file://<P>/repo?rev=<C>#<C>"', 'git = "file://<P>/repo?rev=<C>#<C>"',
    'git = "file://<P>/repo#<C>", virtual = "x"', 'git = "file://<P>/repo#<C>"', 'url = "<X>"',
    'url = "<X>", subdirectory = "x"', 'path = "<F>"', 'directory = "<T>"', 'editable = "<T>"', 'virtual = "<T>"',
    'registry = "<U>/simple", virtual = "."', 'registry = "<U>/simple", editable = "<T>"',
    'registry = "<U>/simple", directory = "<T>"', 'registry = "<U>/simple", path = "<F>"',
    'directory = "<T>", virtual = "x"', 'editable = "<T>", virtual = "x"',
]  # fmt: skip
V2_SOURCES_AND_FILES = [
    'registry = "<P>/files/evil" | wheels = [{ path = "<F>", hash = "sha256:<G>" }]',
    'registry = "<P>/files/evil" | wheels = [{ path = "<W>", hash = "sha256:<G>" }]',
    'url = "<X>" | wheels = [{ filename = "<W>", hash = "sha256:<G>" }]',
    'url = "<X>", virtual = "x" | wheels = [{ filename = "<W>", hash = "sha256:<E>" }]',
    'url = "<X>", virtual = "x" | wheels = [<XE>]',
    'path = "<F>" | wheels = [{ filename = "<W>", hash = "sha256:<G>" }]',
    'path = "<F>" | wheels = [{ filename = "<W>" }]', 'url = "<XS>" | sdist = { hash = "sha256:<GS>" }',
    'url = "<XS>" | sdist = { hash = "sha256:<ES>" }',
]  # fmt: skip
V2_PYLOCK = [
    *(f"wheels = [{{ {file} }}]" for file in V2_FILES), *(f"archive = {{ {file} }}" for file in V2_FILES),
    "<PW>", 'wheels = [{ name = "<W>", url = "<Y>", <HG> }]\nsdist = { url = "<XS>", hashes = { sha256 = "<GS>" } }',
    'sdist = { url = "<XS>", hashes = { sha256 = "<GS>" } }',
    'archive = { url = "<Y>", <HG> }\ndirectory = { path = "<T>" }',
    'archive = { url = "<Y>", <HG> }\nvcs = { type = "git", url = "file://<P>/repo", commit-id = "<C>" }',
    '<PW>\ndirectory = { path = "<T>" }', '<PW>\nvcs = { type = "git", url = "file://<P>/repo", commit-id = "<C>" }',
    '<PW>\narchive = { url = "<X>", <HG> }', 'directory = { path = "<T>" }',
    'directory = { path = "<T>" }\n<PDEP>\nwheels = [{ url = "<D>", hashes = { sha256 = "<GD>" } }]',
    'vcs = { type = "git", url = "file://<P>/repo", commit-id = "<C>" }',
    'wheels = [{ url = "<Y>", <HG> }, { url = "<X1>", <HG> }]', '<PW>\n[packages.tool.x]\nurl = "<X>"',
    '<PW>\ndependencies = [{ name = "dep" }]', "<PW>\n<UD>wheels = [<XE>]",
    '<PW>\n<PD>wheels = [{ url = "<X>", <HG> }]', "<PW>\n<PDEP>", '<PW>\n<PDEP>\nindex = "<U>/simple"',
    '<PW>\nmarker = "python_version < \'3\'"',
    '[[packages.wheels]]\nurl = "<X>"\nhashes.sha256 = "<G>"\nhashes.sha512 = "<E512>"',
    '[[packages.wheels]]\nurl = "<Y>"\n[packages.wheels.hashes]\nsha256 = "<G>"\n[[packages.wheels]]\n'
    'url = "<X1>"\n[packages.wheels.hashes]\nsha256 = "<G>"\nsha512 = "<E512>"',
]  # fmt: skip
V2: list[Files] = [
    *(uv_lock(more) for more in V2_UV),
    *(uv_lock(more, f"source = {{ {source} }}\n") for source in V2_SOURCES for more in ("", "wheels = [<UW>]")),
    *(uv_lock(more, f"source = {{ {source} }}\n") for source, more in (x.split(" | ") for x in V2_SOURCES_AND_FILES)),
    *({"uv.lock": (UV_BEGIN + UV_APP + UV_DEMO).replace("package", name) + f"{UV_SIMPLE}wheels = [<XE>]\n{more}"}
      for name, more in [("distribution", ""), ("packages", ""), ("distribution", "<PD><PW>\n")]),
    uv_lock("wheels = [<UW>]", head="\ufeff" + UV_BEGIN + UV_APP),
    *(uv_lock("wheels = [<UW>]", head=UV_BEGIN + UV_APP.replace('virtual = "."', source))
      for source in ('editable = "."', 'editable = "<P>/tree"', 'directory = "<P>/tree"')),
    *(pylock(body) for body in V2_PYLOCK), pylock("<PW>", version="3.0"), pylock("<PW>", head="\ufeff" + PY_BEGIN),
    {"pylock.toml": PY_BEGIN + 'packages = [{ name = "demo", version = "1.0", <PW> }]\n'},
]  # fmt: skip
V3 = [
    "<OK>\n-c <U>/c.txt", "<OK>\n-r file://<P>/evil.txt", "demo==1.0\t<H>", "demo==1.0\t<H> --hash=sha256:<EI>",
    "<OK>\t--hash=sha256:<EI>", "<DX>\t<H>", "<DX>#\t<H>", "<DX>\xa0<H>", "demo==1.0;<H>",
    "demo==1.0 ; python_version>'3' <H>", "<DX>;<H>", "<DX> # <H>", "<DX> #\\\n <H>", "<DX> \\\n# comment\n <H>",
    "<DX> \\ \n <H>", "<DX> \\\n\n <H>", "<DX>\\\\\n <H>", "<DX> \\\r <H>", "<DX>\r <H>",
    "<OK> \\\n --hash=sha256:<EI>", "<OK> \\\n<EVIL>", "<OK> <EVIL>", "<OK> --hash=md5:<EM>",
    "<DX> <H> --hash=sha512:<E512>", "<DX> <H> --has=sha512:<E512>", "<DX> <H> --h=sha256:<E>",
    "<DX> <H> --hash='sha256:<E>'", '<DX> <H> "--hash=sha256:<E>"', "<DX> <H> \\--hash=sha256:<E>",
    "<DX> <H> x --hash=sha256:<E>", "<DX> <H> --config-settings a=b --hash=sha384:<E384>", "<OK> -C a=b",
    "<OK> --global-option=x", "<OK> --index-url <U>/simple", "--no-require-hashes\n<OK>", "--no-require-hashes\n<PIN>",
    "--no-req\n<PIN>", "--ind <U>/simple\n<OK>", "--index-url <U>/simple --find-links <U>/links.html\n<OK>",
    "-f <P>/files/evil\n<OK>", "--find-links=<P>/files/evil --no-index\n<OK>", "-e <T>\n<OK>", "--editable=<T>",
    "-i <U>/simple -e <T>", "# note \\\nevil==6.6", "<OK>\x0c<EVIL>", "<OK> # x\x0c<EVIL>", "<OK> # x\x1c<EVIL>",
    "<OK> # x\x85<EVIL>", "<OK> # x\u2028<EVIL>", "<OK> # x\r<EVIL>", "<OK> # x\x00<EVIL>", "<OK>\x00",
    "# coding: utf-7\n<OK> # +AAo-evil==6.6 --hash+AD0-sha256:<EE>",
    "#\n# vim: set fileencoding=utf-7 :\n<OK> # +AAo-evil==6.6 --hash+AD0-sha256:<EE>",
    "# coding: rot13\nqrzb==1.0 <H>", "# coding: cp037\n<OK>", "# coding: latin-1\n<OK> # caf\xe9 \x85<EVIL>",
    "<OK> # \udc85<EVIL>", "<OK> # coding: utf-7 +AAo-evil==6.6",
    " # coding: utf-7\n<OK> # +AAo-evil==6.6 --hash+AD0-sha256:<EE>",
    "\ufeff# coding: utf-7\n<OK> # +AAo-evil==6.6 --hash+AD0-sha256:<EE>", "\ufeff<OK>", "\ufeff\ufeff<OK>",
    "<OK>\n\ufeff<EVIL>", "demo @ ${EVIL_URL}#sha256=<G>", "demo @ ${EVIL_URL}#md5=<EM> <H>", "${LOGGED}==1.0 <H>",
    "<OK>${EVILVAR}", "<OK>\ndemo==1.0 --hash=sha256:<EI>", "<OK>\n<DX>", "<OK>\n<DX> <H>", "<OK>\ndemo",
    "<OK>\nDEMO==1.0", "demo <H>", "demo>=1 <H>", "demo==1.* <H>", "demo===1.0 <H>", "demo==1 <H>",
    "demo==1.0+local <H>", "demo==1.0,>0 <H>", "demo (==1.0) <H>", "demo ==1.0 <H>", "demo[x]==1.0 <H>",
    "extras[more]==1.0 --hash=sha256:<GX>", "extras[more]==1.0 --hash=sha256:<GX>\ndep==1.0 --hash=sha256:<GD>",
    "<PIN>\ndep==1.0 --hash=sha256:<GD>", "<PIN>\ndep==1.0 ; python_version < '3' --hash=sha256:<GD>",
    "<PIN>\ndep @ <U>/evil/dep-1.0-py3-none-any.whl ; python_version < '3' --hash=sha256:<GD>",
    "demo==1.0 ; python_version < '3' <H>", "demo==1.0 ; python_version < '3' <H>\nevil==6.6",
    "<DX>#md5=<EM> ; python_version > '3' <H>", "demo@<X>#md5=<EM> <H>", "demo [x] @ <X>#md5=<EM> <H>", "<OK> ; evil",
    "<OK>,sha256:<EI>", "demo==1.0 --hash=sha256:<GUP>", "<DX> --hash=SHA256:<E> <H>", "<OK>\\\n\n--hash=sha256:<EI>",
    "<H> demo==1.0", "<H>\ndemo==1.0", "<OK>\npylock.toml", "--no-binary demo\n<OK> --hash=sha256:<GS>",
    "--only-binary :all:\n<OK>", "--no-deps\n<OK>", "-r /dev/stdin\n<OK>", "--index-url <U>/simple/#\n<OK>",
    "<OK> # \\\r\n<EVIL>", "demo==1.0 \\\r\n    <H>\r\nevil==6.6 \\\r\n   --hash=sha256:<EE>\r", "<OK>\nevil=={}",
    "<OK>#sha256:<EI>", "demo==1.0<H>", "demo!=1.0 <H>", "demo==1.0 || <H>", "demo==1.0dev0 <H>", "demo~=1.0 <H>",
    "demo==1.0;python_version>='3'<H>", "demo==1.0; python_version >= '3' or 'x' == ' <H>'", "<DX>?x= <H>",
    "demo @ '<X>' <H>", "demo @ <<X>> <H>", "<DX>,<H>", "demo[x @ y] @ <X> <H>",
]  # fmt: skip
# Lines that include evil.txt, and the file that is included if they are read otherwise; that one is good.
V3_DECOYS = {
    "-r 'evil.txt'": "'evil.txt'", '-r "evil.txt"': '"evil.txt"', "-r ev\\il.txt": "ev\\il.txt",
    "-r ${EVIL_FILE}": "${EVIL_FILE}", "-r %EVIL_FILE%": "%EVIL_FILE%", "-r $EVIL_FILE": "$EVIL_FILE",
    "-r ${UNSET}evil.txt": "${UNSET}evil.txt", "-r FILE:evil.txt": "FILE:evil.txt", "-r evil.txt # x": "",
    "-r evil.txt#x": "evil.txt#x", "-revil.txt": "", "--req evil.txt": "", "--requirements evil.txt": "",
    "--requirement\tevil.txt": "", "-r a.txt -r evil.txt": "a.txt", "--pre -r evil.txt": "", "-- -r evil.txt": "",
    "-ir evil.txt": "", "-r evil.txt\xa0": "evil.txt\xa0", "-r evil.txt \\\n": "", "-r \\\nevil.txt": "",
    "--index-url <U>/simple/ -r evil.txt": "", "--index-url '<U>/simple/ -r evil.txt'": "",
    "--requirement-file evil.txt": "",
}  # fmt: skip
OK, FOUL = "<OK>\n", "<EVIL>\n"
V3_BESIDE: list[tuple[str, Files]] = [
    *((f"{line}\n{OK}", {"evil.txt": FOUL, **({decoy: OK} if decoy else {})}) for line, decoy in V3_DECOYS.items()),
    *((f"{OK}-c c.txt\n", {"c.txt": f"{text}\n", "evil.txt": FOUL}) for text in (
        "-r evil.txt", "<DX>", "<DX>#sha256=<E>", "<DX>#md5=<EM>", "demo==1.0 --hash=sha256:<EI>",
        "<DX> --hash=sha256:<E>", "demo @ file://<T>", "<X>", "demo @ <R>")),
    *(("<PIN>\n-c c.txt\n", {"c.txt": f"{text}\n"}) for text in (
        "dep==1.0 --hash=sha256:<ED>", "dep @ <U>/evil/dep-1.0-py3-none-any.whl#sha256=<ED>", "--no-require-hashes",
        "dep @ <U>/evil/dep-1.0-py3-none-any.whl", "dep==1.0 --hash=sha256:<GD>")),
    ("<PIN>\n-c c.txt --no-require-hashes\n", {"c.txt": "dep==1.0\n"}),
    ("demo <H>\n-c c.txt\n", {"c.txt": "demo==1.0\n"}),
    (f"{OK}-c c.txt\n", {"c.txt": "-r evil.txt\n", "evil.txt": "evil==6.6\n"}), ("demo==1.0 <H> \\", {}),
    (f"-r 'e v.txt'\n{OK}", {"e v.txt": FOUL, "'e": OK}), (f"-r e\\ v.txt\n{OK}", {"e v.txt": FOUL, "e\\": OK}),
    (f"-r a%20b.txt\n{OK}", {"a b.txt": FOUL, "a%20b.txt": OK}), (f"-r ~/evil.txt\n{OK}", {"~/evil.txt": OK}),
    (f"-r <U>/evil.txt\n{OK}", {"http:/127.0.0.1:<PORT>/evil.txt": OK}), (f"-r -\n{OK}", {"-": FOUL}),
    (f"-r sub/a.txt\n{OK}", {"sub/a.txt": "-r b.txt\n", "sub/b.txt": FOUL, "b.txt": OK}),
    (f"-r sub/a.txt\n{OK}", {"sub/a.txt": "-c b.txt\n", "sub/b.txt": "<DX>#sha256=<E>\n", "b.txt": "demo==1.0\n"}),
    (f"-r=evil.txt\n{OK}", {"evil.txt": FOUL, "=evil.txt": FOUL}), (f"-r sub\n{OK}", {"sub/requirements.txt": FOUL}),
    *((f"{line}\n{OK}", {"evil.txt": FOUL, "c.txt": "\n"})
      for line in ("-r evil.txt -c c.txt", "-c c.txt -r evil.txt")),
    (OK.replace("\n", " -r evil.txt\n"), {"evil.txt": FOUL}),
    (f"-r pylock.toml\n{OK}", pylock('wheels = [{ url = "<X>", hashes = { sha256 = "<E>" } }]')),
    *((f"-{option} pyproject.toml\n{OK}", {"pyproject.toml": PROJECT.replace("demo", "evil==6.6")}) for option in "rc"),
    *((f"-r x.py\n{OK}", {"x.py": text}) for text in (SCRIPT.replace("demo", "evil==6.6"), FOUL)),
    (f"-c evil.txt#x\n{OK}", {"evil.txt": "demo @ <X>#sha256=<E>\n", "evil.txt#x": "\n"}),
    (f"-c a.txt,b.txt\n{OK}", {"a.txt": "demo @ <X>#sha256=<E>\n", "b.txt": "\n", "a.txt,b.txt": "\n"}),
]  # fmt: skip
V3_BYTES = [
    codecs.BOM_UTF16_LE + "evil==6.6\n".encode("utf-16-le"), codecs.BOM_UTF16_BE + "evil==6.6\n".encode("utf-16-be"),
    codecs.BOM_UTF32_LE + "evil==6.6\n".encode("utf-32-le"),
    codecs.BOM_UTF16_LE + "# \u0a23\n".encode("utf-16-le") + b"demo==1.0",
]  # fmt: skip
V4 = [
    "withdep @ <WITH>", "<WITH>", "withdep @ <WITH>\ndemo @ <Y>#sha256=<G>", "withdep @ <WITH> ; python_version > '3'",
    "extras[more] @ <U>/good/extras-1.0-py3-none-any.whl#sha256=<GX>",
    "demo==1.0 ; python_version < '3' <H>\nwithdep @ <WITH>", "<OK>\nwithdep @ <WITH>",
    "--require-hashes\nwithdep @ <WITH>", "--require-hashes\nwithdep @ <WITH>\ndep==1.0 --hash=sha256:<GD>",
    "--require-hashes\ndemo @ <Y>#sha256=<G>", "# --require-hashes\nwithdep @ <WITH>",
    "--require-hashes --no-require-hashes\nwithdep @ <WITH>",
    "withdep @ <U>/good/withdep-1.0-py3-none-any.whl --require-hashes --hash=sha256:<GW>",
    "withdep @ <WITH> --require-hashes", "--req\nwithdep @ <WITH>", "withdep @ <WITH>\n--require-hashes", "<PIN>",
    "<PIN> --hash=sha256:<GD>", "<PIN>\ndep==1.0 --hash=sha256:<GDS>",
    "extras[more]==1.0 --hash=sha256:<GX>\ndep==1.0 --hash=sha256:<GDS>",
]  # fmt: skip
UV_TWO = UV_BEGIN + UV_APP.replace('[{ name = "demo" }]', '[{ name = "demo" }, { name = "dep" }]', 1)
V4_FILES: list[Files] = [
    {"r.txt": "-c c.txt\nwithdep @ <WITH>\n", "c.txt": OK},
    *({"r.txt": f"-{option} c.txt\nwithdep @ <WITH>\n", "c.txt": "--require-hashes\n"} for option in "cr"),
    *(uv_lock("", f'source = {{ {kind} = "<P>/tree" }}\n') for kind in ("directory", "editable", "virtual")),
    *(uv_lock(f'wheels = [<UW>]\n{UV_DEMO.replace("demo", "dep")}source = {{ {kind} = "<P>/tree" }}', head=UV_TWO)
      for kind in ("directory", "editable")),
    {**uv_lock("wheels = [<UW>]", head=UV_BEGIN + UV_APP.replace("virtual", "editable")),
     "app.py": "TOKEN = 'tree/app'\n", "pyproject.toml": PROJECT + BUILD_SYSTEM,
     "backend.py": BACKEND.replace("NAME", "app").replace("VERSION", "0")},
    pylock('directory = { path = "<P>/tree" }'), pylock('directory = { path = "<P>/tree", editable = true }'),
    pylock('<PDEP>\nwheels = [{ url = "<D>", hashes = { sha256 = "<GD>" } }]'),
    pylock('wheels = [{ url = "<WD>", hashes = { sha256 = "<GW>" } }]', name="withdep"),
]  # fmt: skip
V7 = [
    "\u212ait==1.0 --hash=sha256:<GK>", "\u212ait @ <U>/evil/kit-1.0-py3-none-any.whl#sha256=<GK>",
    "\u212ait==1.0 --hash=sha256:<GK>\nevil==6.6", "<OK>\n\u212ait", "kit==1.0 --hash=sha256:<GK>",
    "K\u0131t==1.0 --hash=sha256:<GK>", "\u017folo==1.0 --hash=sha256:<GO>", "so\u1d38o==1.0 --hash=sha256:<GO>",
    "\uff44\uff45\uff4d\uff4f==1.0 <H>", "dem\u043e==1.0 <H>", "demo\u200b==1.0 <H>", "demo==\uff11.\uff10 <H>",
    "<OK>\u200b", "demo\u2013x==1.0 <H>", "de_mo==1.0 <H>", "demo_==1.0 <H>", "-<OK>", "DEMO==1.0 <H>", "\u0130<OK>",
    "demo==1.0 \u2014\u2014hash=sha256:<G>", "demo==1.0 --hash=\u017fha256:<G>", "demo==1.0 --ha\u017fh=sha256:<G>",
]  # fmt: skip
KIT = 'wheels = [{ url = "<U>/good/kit-1.0-py3-none-any.whl", hashes = { sha256 = "<GK>" } }]'
V7_LOCKS: list[Files] = [
    pylock(KIT, name="\u212ait"), pylock(KIT, name="kit"), pylock('wheels = [{ url = "<X>", <HG> }]', name="dem\u043e"),
    pylock(KIT.replace("url", 'name = "\u212ait-1.0-py3-none-any.whl", url'), name="kit"),
    {"uv.lock": UV_BEGIN + UV_APP.replace("demo", "kit") + UV_DEMO.replace("demo", "\u212ait") + UV_SIMPLE
     + 'wheels = [{ url = "<U>/good/kit-1.0-py3-none-any.whl", hash = "sha256:<GK>" }]\n'},
]  # fmt: skip
V8_PYLOCK = [
    'wheels = [{ name = "<W>", url = "<D>", hashes = { sha256 = "<GD>" } }]',
    'wheels = [{ name = "evil-6.6-py3-none-any.whl", url = "<Y>", <HG> }]',
    'wheels = [{ name = "evil-6.6-py3-none-any.whl", url = "<U>/evil/evil-6.6-py3-none-any.whl", <HG> }]',
    'archive = { url = "<D>", hashes = { sha256 = "<GD>" } }',
    'archive = { url = "<U>/good/dep-1.0.tar.gz", hashes = { sha256 = "<GDS>" } }',
]  # fmt: skip
V8: list[Files] = [
    *(pylock("<PW>", head=f'{version}created-by = "x"\n') for version in (
        *(f"lock-version = {v}\n" for v in ('"99.0"', '"2.0"', '"1.1"', '"1"', '"0.9"', "1.0", '"1.0 "', '""')),
        "", 'version = 1\nlock-version = "1.0"\n')),
    pylock("<PW>", head='lock-version = "1.0"\n'), pylock("<PW>", name="dep"), pylock("<PW>", name="evil"),
    *(pylock("<PW>", version=version) for version in ("2.0", "1.0.0", "v1", "x")),
    *(pylock(body) for body in V8_PYLOCK),
    *(uv_lock("wheels = [<UW>]", head=UV_BEGIN.replace("version = 1\n", line, 1) + UV_APP) for line in (
        *(f"version = {v}\n" for v in ("9", "0", "-1", "1.0", '"1"', "true", "2")), "")),
    *(uv_lock("wheels = [<UW>]", head=UV_BEGIN.replace("revision = 3\n", line) + UV_APP)
      for line in ("revision = 99\n", "")),
    uv_lock('wheels = [{ url = "<D>", hash = "sha256:<GD>" }]', 'source = { url = "<D>" }\n'),
]  # fmt: skip
R1 = [*requirements_of(*V1), *({"r.txt": f"{path_} <H>\n", **inside(at)} for path_, at in V1_FOLDERS.items())]
R3: list[Files] = [*requirements_of(*V3), *({"r.txt": text, **more} for text, more in V3_BESIDE)]
R3 += [{"r.txt": data} for data in V3_BYTES]
V_TABLES: dict[str, tuple[list[Files], int]] = {  # and how many of these are vouched for, at least
    "V1": (R1, 6), "V2": (V2, 46), "V3": (R3, 25), "V4": ([*requirements_of(*V4), *V4_FILES], 15),
    "V7": ([*requirements_of(*V7), *V7_LOCKS], 3), "V8": (V8, 5),
}  # fmt: skip


def target_of(files: Files) -> str:
    return next(name for name in files if Path(name).name in ("r.txt", "pylock.toml", "uv.lock"))


@pytest.mark.slow
@pytest.mark.parametrize("number", V_TABLES)
def test_V_what_is_vouched_for_is_what_is_installed(world: World, number: str) -> None:
    """V1: fragments. V2: lock files. V3: options. V4: what is beside. V7: names. V8: versions.

    Of V7 and V8, also what neither installer takes at all is not to be vouched for.
    """
    rows, least = V_TABLES[number]
    outcomes = [(files, outcome) for files in rows if (outcome := judge(world, files, target_of(files))).code == 0]
    assert [(files, evil) for files, outcome in outcomes if (evil := outcome.evil(world))] == []
    assert len(outcomes) >= least
    if number in ("V7", "V8"):
        assert [files for files, outcome in outcomes if all(taken.code for taken in outcome.taken.values())] == []


@pytest.mark.slow
def test_V_the_world_is_hostile(world: World) -> None:
    """Without a checksum all take what is evil, and with one what is logged: else nothing here would mean anything."""
    for text, code, token in [
        ("demo==1.0 <H>", 0, f"good/{WHEEL_NAME}"),
        ("demo @ <Y> <H>", 0, f"good/{WHEEL_NAME}"),
        ("demo==1.0 --hash=sha256:<GS>", 0, "good/demo-1.0.tar.gz"),
        ("demo==1.0 --hash=sha256:<EI>", 1, "evil/demo-1.0-1-py3-none-any.whl"),
        ("demo @ <X> --hash=sha256:<E>", 1, f"evil/{WHEEL_NAME}"),
        ("demo==1.0", 3, "evil/demo-1.0-1-py3-none-any.whl"),
        ("demo @ git+file://<P>/repo", 3, "git/demo"),
        ("demo @ file://<P>/tree", 3, "tree/demo"),
    ]:
        outcome = judge(world, {"r.txt": f"{text}\n"}, "r.txt", always=True)
        assert outcome.code == code, (text, outcome.said)
        for by, taken in outcome.taken.items():
            if code != 3 or by != "uv install --require-hashes":
                assert taken.tokens == {token}, (text, by, taken)
    script = uv_lock("wheels = [<UW>]", head=UV_BEGIN + '[manifest]\nrequirements = [{ name = "demo" }]\n')["uv.lock"]
    for files in pylock("<PW>"), uv_lock("wheels = [<UW>]"), Files({"x.py.lock": script}):
        outcome = judge(world, files, next(iter(files)))
        assert outcome.code == 0
        assert {taken.tokens for taken in outcome.taken.values()} == {frozenset({f"good/{WHEEL_NAME}"})}


@pytest.mark.slow
def test_V4_what_uv_takes_beside(world: World) -> None:
    """Why `uv pip install` has to be told --require-hashes: pip needs no such word, and `uv pip sync` takes no more."""
    taken = judge(world, {"r.txt": "<PIN>\n"}, "r.txt").taken
    wheel = "good/withdep-1.0-py3-none-any.whl"
    assert {by: {*what.tokens} for by, what in taken.items() if what.code == 0} == {
        "uv pip sync": {wheel}, "uv install": {wheel, "evil/dep-3.0-py3-none-any.whl"},
    }  # fmt: skip
    taken = judge(world, {"r.txt": "--require-hashes\n<PIN>\n"}, "r.txt").taken  # which uv obeys in a file, too
    assert {by for by, what in taken.items() if what.code == 0} == {"uv pip sync"}


V6_PAGES = ["index.html", "index.htm", "INDEX.HTML", "x.shtml", "x.html.gz", "x.html.bz2", "x.htm.Z", "x.html.br",
            "x.html.xz", ".html", ".hidden.html", "x%2ehtml", "x.html ", "x.xhtml", "sub/index.html",
            "x.html/index.html"]  # fmt: skip
V6_TREES = ["demo-2.0.tar.gz", "demo-2.0.zip", "demo-2.0-py3-none-any.whl", "demo"]
V6_WHEELS = ["-py3-none-any.whl", "-py3-none-any.WHL", "-py3-none-any.whl.gz"]
V6_SDISTS = {  # by what the name of demo-3.0 ends with, how it is packed
    ".tar.zst": "w", ".TAR.GZ": "w:gz", ".tgz": "w:gz", ".tar": "w", ".tar.bz2": "w:bz2", ".tar.lzma": "w:xz",
    ".tar.lz": "w:xz", ".ZIP": "", ".egg": "",
}  # fmt: skip
V6_LINKS = {
    "demo-3.0-py3-none-any.whl": "files/evil/demo-3.0-py3-none-any.whl", "demo-2.0-py3-none-any.whl": "tree",
    "demo-2.0.tar.gz": "tree", "x.html": "files/links.html", "sub": "files/evil",
}  # fmt: skip


@pytest.mark.slow
def test_V6_folders(world: World) -> None:
    """A folder with a good wheel and something else; pip may be pointed at it, at a folder in it, and at each file."""
    evil = (world.root / "files" / "evil" / "demo-3.0-py3-none-any.whl").read_bytes()
    rows: list[Files] = [{}, {"README.txt": "nothing here"}, *({name: PAGE} for name in V6_PAGES)]
    rows += [*(inside(name) for name in V6_TREES), *({f"demo-3.0{end}": evil} for end in V6_WHEELS)]
    for end, mode in V6_SDISTS.items():
        sdist_of(world.root / f"demo-3.0{end}", f"evil/3.0{end}", mode)
        data = (world.root / f"demo-3.0{end}").read_bytes()
        rows.append({f"demo-3.0{end}": raw_zstd(data) if end == ".tar.zst" else data})
    rows += [{f"@{name}": to} for name, to in V6_LINKS.items()]
    assert len(rows) == 39
    good = (world.root / "files" / "good" / WHEEL_NAME).read_bytes()
    vouched, wrong = 0, []
    for files in rows:
        made = world.folder({"d/<W>": good, **{f"d/{name}": data for name, data in files.items() if name[0] != "@"}})
        for name, to in files.items():
            if name[0] == "@":
                (made / "d" / name[1:]).symlink_to(world.root / to)
        outcome = Outcome(*world.verify(made, "d"), {})
        if outcome.code == 0:
            vouched += 1
            for sub in "d", "d/sub", "d/x.html":
                if (made / sub).is_dir():
                    outcome.taken |= {f"{by} of {sub}": what for by, what in world.install(made, sub).items()}
            for name in files:
                if (made / "d" / name).is_file() and name.startswith("demo-3"):
                    outcome.taken[f"pip of {name}"] = world.pip(made, f"./d/{name}")
                    outcome.taken[f"uv of {name}"] = world.uv_pip(made, "install", f"./d/{name}")
            if evil_ := outcome.evil(world):
                wrong.append((list(files), evil_))
    assert wrong == []
    assert vouched >= 9


# --- The property: thousands of inputs from a grammar -----------------------------------------------------------------

UV_HEAD = UV_BEGIN + UV_APP
TWISTS = ["\t", "\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\0", "'", '"', "\\", "#", " #", "&", ";", "\ufeff", "\u00a0", "${EVIL_FILE}",
           "%", ",", "\r", "-", "\u212a", "@", "\\\n", " \\\n", "\n", "--", "=", "?", "!", "evil ", "://"]  # fmt: skip


Choices = list[tuple[int, str]]


def weighted(*choices: tuple[int, str]) -> Choices:
    return [*choices]


class Chance(random.Random):
    """Chance that is calm for half of the inputs: it then mostly takes what is usual, of weight 4 and above."""

    calm = False

    def pick(self, choices: Choices) -> str:
        if self.calm and self.random() < 0.98:
            choices = [choice for choice in choices if choice[0] >= 4] or choices
        return self.choices([value for _, value in choices], [weight for weight, _ in choices])[0]

    def one_in(self, n: int) -> bool:
        return not self.randrange(5 * n if self.calm else n)


URLS = weighted((30, "<U>/good/{n}-1.0-py3-none-any.whl"), (3, "<U>/evil/{n}-1.0-py3-none-any.whl"),
                (2, "file://<P>/files/good/{n}-1.0-py3-none-any.whl"), (1, "file://<P>/files/evil/{n}-1.0-py3-none-any.whl"),
                (1, "file://<P>/tree"), (1, "git+file://<P>/repo"), (1, "http://u:p@127.0.0.1:<PORT>/good/{n}-1.0-py3-none-any.whl"),
                (1, "http://u&sha256={e}&@127.0.0.1:<PORT>/evil/{n}-1.0-py3-none-any.whl"))  # fmt: skip
FRAGMENTS = weighted((30, ""), (8, "#sha256={g}"), (1, "#sha256={e}"), (1, "#md5=<EM>&sha256={g}"), (1, "#sha512=<E512>&sha256={g}"),
                     (1, "#sha256={g}&md5=<EM>"), (1, "#egg={n}"), (1, "#egg={n}&sha256={g}"), (1, "#SHA256={g}"), (1, "#xsha256={g}"),
                     (1, "?x"), (1, "?x&sha256={e}"), (1, "?x&sha512=<E512>#sha256={g}"), (1, "#subdirectory=x"), (1, "#sha256%3D{g}"),
                     (1, "#;sha256={g}"), (1, "#sha512=<E512>"), (1, "#"))  # fmt: skip
SPECIFIERS = weighted((40, "=={v}"), (2, " == {v}"), (1, "==={v}"), (1, "==1"), (1, ">=1"), (1, "==1.*"), (1, ""), (1, "==1.0,<2"),
                      (1, "~=1.0"), (1, " (==1.0)"), (1, "== 1.0"), (1, "==1.0.0"), (1, "==1.0+local"), (1, "==3.0"))  # fmt: skip
MARKERS = weighted((20, ""), (4, ' ; python_version >= "3.8"'), (1, ' ; python_version < "3"'), (1, "; sys_platform == 'linux'"),
                   (1, ' ; python_version >= "3.8" and os_name != "x"'), (1, " ; extra == 'x'"))  # fmt: skip
HASH_LISTS = weighted((30, "{g}"), (6, "{g}|{s}"), (2, "{g}|{g}"), (1, "{e}"), (1, "{g}|{e}"), (2, ""), (1, "{G}"), (1, "sha512:<E512>|{g}"),
                      (1, "md5:<EM>|{g}"), (1, "{s}"))  # fmt: skip
BETWEEN = weighted((20, " \\\n    --hash="), (20, " --hash="), (2, " --hash "), (1, "\t--hash="), (1, " \\\n\t--hash="), (1, " --has="),
                   (1, " --hash=\\\n"), (1, "\\\n--hash="), (1, " \\\n\n --hash="), (1, " \\\n# x\n --hash="), (1, "--hash="))  # fmt: skip
OPTIONS = weighted((4, "--index-url <U>/simple/"), (2, "-i <U>/simple/"), (2, "--extra-index-url <U>/simple/"), (2, "--no-binary :none:"),
                   (2, "--only-binary :all:"), (4, "--require-hashes"), (1, "--prefer-binary"), (1, "--pre"), (1, "--no-require-hashes"),
                   (1, "-f <P>/files/evil"), (1, "--find-links <P>/files/good"), (1, "--trusted-host 127.0.0.1"),
                   (1, "--index-url <U>/simple/ --extra-index-url <U>/simple/"), (1, "--index-url=<U>/simple/"), (1, "-e <P>/tree"),
                   (1, "--ind <U>/simple/"), (1, "--pre --require-hashes"), (1, "--no-index"), (1, "--use-feature fast-deps"))  # fmt: skip
INCLUDES = weighted((4, "-r more.txt"), (3, "-c more.txt"), (1, "-r 'more.txt'"), (1, "--requirement=more.txt"), (1, "--constraint more.txt"),
                    (1, "-rmore.txt"), (1, "-r ./more.txt"), (1, "-c more.txt -r more.txt"), (1, "-r more.txt # x"), (1, "-r more.txt#x"),
                    (1, "-r file://<P>/evil.txt"), (1, "-r mo\\re.txt"))  # fmt: skip
ENDS = weighted((40, "\n"), (3, "\r\n"), (4, "  # via x\n"), (1, " # x \\\n"), (1, "\x0c\n"), (1, "\r"), (1, ""))


def requirement_lines(r: Chance, name: str) -> str:
    letter = PROJECTS[name]
    words = {"n": name, "v": "1.0", "g": f"<G{letter}>", "e": f"<E{letter}>", "s": "<GS>" if name == "demo" else "<GDS>"}
    shown = r.pick(weighted((30, name), (2, name.upper()), (1, f"{name}[x]"), (1, name.replace("k", "\u212a"))))
    if name == "extras":
        shown = r.pick(weighted((3, "extras[more]"), (1, "extras")))
    form = r.pick(weighted((14, "pinned"), (4, "url"), (1, "bare"), (1, "path")))
    if form == "pinned":
        line = shown + r.pick(SPECIFIERS).format(**words)
    else:
        url = (r.pick(URLS) + r.pick(FRAGMENTS)).format(**words)
        line = {"url": f"{shown} @ {url}", "bare": url, "path": f"<P>/files/good/{name}-1.0-py3-none-any.whl"}[form]
    line += r.pick(MARKERS)
    between = r.pick(BETWEEN)
    hashes = r.pick(HASH_LISTS)
    if "{s}" in hashes and name not in ("demo", "dep"):
        hashes = "{g}"
    for value in hashes.split("|") if hashes else []:
        value = value.replace("{G}", f"<G{letter}UP>" if not letter else words["g"]).format(**words)
        line += between + (value if ":" in value else f"sha256:{value}")
    return line


def twisted(r: Chance, text: str) -> str:
    """The text with something hostile at some place, or without a line, or with one twice."""
    kind = r.pick(weighted((4, "insert"), (1, "drop"), (1, "twice"), (1, "swap"), (1, "evil")))
    lines = text.splitlines(keepends=True)
    at = r.randrange(max(len(lines), 1))
    if kind == "insert":
        place = r.randrange(len(text) + 1)
        return text[:place] + r.choice(TWISTS) + text[place:]
    if kind == "drop":
        return "".join(lines[:at] + lines[at + 1 :])
    if kind == "twice":
        return "".join(lines[:at] + lines[at : at + 1] * 2 + lines[at + 1 :])
    if kind == "swap":
        return text.replace("<U>/good", "<U>/evil", 1)
    return text.replace("<G", "<E", 1) if "<GS>" not in text and "<GDS>" not in text and "UP>" not in text else text


def requirements(r: Chance) -> tuple[Files, str]:
    """A file of requirements, with what it includes; by chance and not drawn, to be as frequent as they say."""
    names = r.sample(list(PROJECTS), r.randint(1, 3))
    if {"withdep", "extras"} & {*names} and "dep" not in names and r.randrange(8):
        names.append("dep")
    parts = [requirement_lines(r, name) for name in names]
    if not r.randrange(4):
        parts.insert(0 if r.calm else r.choice([0, 0, len(parts)]), r.pick(OPTIONS))
    if not r.randrange(6):
        parts.insert(0, "# a comment")
    files: Files = {}
    if not r.randrange(6):
        parts.insert(r.choice([0, len(parts)]), r.pick(INCLUDES))
        other = r.choice([name for name in PROJECTS if name not in names] or ["demo"])
        files["more.txt"] = requirement_lines(r, other) + r.pick(ENDS)
    text = "".join(part + r.pick(ENDS) for part in parts)
    if r.one_in(4):
        text = twisted(r, text)
    if r.one_in(20):
        text = "\ufeff" + text
    files["r.txt"] = text
    return files, "r.txt"


HASH_TABLES = weighted((30, 'sha256 = "{g}"'), (1, 'sha256 = "{g}", sha512 = "<E512>"'), (1, 'sha512 = "<E512>"'), (1, 'sha256 = "{e}"'),
                       (1, 'SHA256 = "{g}"'), (1, 'sha256 = "{g}", md5 = "<EM>"'), (1, ""), (1, 'sha256 = "{g}", x = "y"'))  # fmt: skip
PLACES = weighted((20, 'url = "<U>/good/{f}"'), (6, 'name = "{f}", url = "<U>/good/{f}"'), (1, 'url = "<U>/evil/{f}"'), (2, 'path = "<P>/files/good/{f}"'),
                  (1, 'path = "<P>/files/evil/{f}"'), (1, 'url = "<U>/good/{f}", path = "<P>/files/evil/{f}"'), (1, 'url = "<U>/evil/{f}#sha256={e}"'),
                  (1, 'url = "<U>/evil/{f}?&sha256={e}"'), (1, 'name = "{f}"'), (1, 'name = "x-1.0-py3-none-any.whl", url = "<U>/good/{f}"'))  # fmt: skip
MORE_KEYS = weighted((30, ""), (2, ", size = {z}"), (1, ', hash = "sha256:{e}"'), (1, ", upload-time = 2024-01-01T00:00:00Z"), (1, ', zstd = {{ hash = "sha256:{e}" }}'),
                     (1, ", size = 1"), (1, ', x = "y"'))  # fmt: skip
PACKAGE_KEYS = weighted((20, ""), (2, 'index = "<U>/simple"\n'), (1, 'requires-python = ">=3.8"\n'), (1, "marker = \"python_version > '3'\"\n"),
                        (1, "marker = \"python_version < '3'\"\n"), (1, 'directory = {{ path = "<P>/tree" }}\n'), (1, "dependencies = [{{ name = 'dep' }}]\n"),
                        (1, 'x = "y"\n'), (1, 'vcs = {{ type = "git", url = "file://<P>/repo", commit-id = "<C>" }}\n'),
                        (1, "[packages.tool.x]\ny = 1\n"))  # fmt: skip
LOCK_HEADS = weighted((30, 'lock-version = "1.0"\ncreated-by = "x"\n'), (2, 'lock-version = "1.0"\ncreated-by = "x"\nrequires-python = ">=3.8"\n'),
                 (1, 'lock-version = "9.0"\ncreated-by = "x"\n'), (1, 'created-by = "x"\n'), (1, 'lock-version = "1.0"\ncreated-by = "x"\nextras = ["a"]\n'),
                 (1, 'lock-version = "1.1"\ncreated-by = "x"\n'), (1, 'lock-version = "1.0"\ncreated-by = "x"\nversion = 1\n'))  # fmt: skip


def words_of(name: str) -> dict[str, str]:
    letter = PROJECTS[name]
    return {"n": name, "f": f"{name}-1.0-py3-none-any.whl", "g": f"<G{letter}>", "e": f"<E{letter}>", "z": f"<Z{letter}>"}


def pylocks(r: Chance) -> tuple[Files, str]:
    names = r.sample(list(PROJECTS), r.randint(1, 3))
    text = r.pick(LOCK_HEADS)
    for name in names:
        words = words_of(name)
        version = r.pick(weighted((30, "1.0"), (1, "2.0"), (1, "1")))
        shown = r.pick(weighted((30, name), (1, name.upper()), (1, "dep"), (1, name.replace("k", "\u212a"))))
        text += f'[[packages]]\nname = "{shown}"\nversion = "{version}"\n'
        file = (f"{{{{ {r.pick(PLACES)}, hashes = {{{{ {r.pick(HASH_TABLES)} }}}}{r.pick(MORE_KEYS)} }}}}").format(**words)
        kind = r.pick(weighted((12, "wheels"), (2, "archive"), (1, "both"), (1, "sdist")))
        if kind in ("wheels", "both"):
            text += f"wheels = [{file}]\n"
        if kind in ("archive", "both"):
            text += f"archive = {file}\n"
        if kind == "sdist":
            text += 'sdist = { url = "<U>/good/demo-1.0.tar.gz", hashes = { sha256 = "<GS>" } }\n'
        text += r.pick(PACKAGE_KEYS).format(**words)
    if r.one_in(4):
        text = twisted(r, text)
    return {"pylock.toml": text}, "pylock.toml"


UV_SOURCES = weighted((30, 'registry = "<U>/simple"'), (2, 'url = "<U>/good/{f}"'), (1, 'url = "<U>/evil/{f}"'), (1, 'registry = "<U>/simple", virtual = "."'),
                      (1, 'url = "<U>/evil/{f}", virtual = "x"'), (1, 'git = "file://<P>/repo?rev=<C>#<C>"'), (1, 'directory = "<P>/tree"'),
                      (1, 'registry = "<U>/simple", x = "y"'), (1, 'path = "<P>/files/good/{f}"'))  # fmt: skip
UV_WHEELS = weighted((30, 'url = "<U>/good/{f}", hash = "sha256:{g}"'), (6, 'url = "<U>/good/{f}", hash = "sha256:{g}", size = {z}'), (1, 'url = "<U>/good/{f}"'),
                     (1, 'url = "<U>/evil/{f}", hash = "sha256:{e}", hashes = {{ sha256 = "{g}" }}'), (1, 'url = "<U>/evil/{f}", hashes = {{ sha256 = "{g}" }}'),
                     (1, 'url = "<U>/evil/{f}", hash = "sha256:{g}"'), (1, 'url = "<U>/evil/{f}", hash = "sha512:<E512>"'), (1, 'filename = "{f}", hash = "sha256:{g}"'),
                     (1, 'url = "<U>/good/{f}", hash = "sha256:{g}", zstd = {{ hash = "sha256:{e}", size = 1 }}'),
                     (1, 'url = "<U>/evil/{f}", hash = "md5:<EM>"'), (1, 'url = "<U>/good/{f}", hash = "sha256:{g}", x = 1'),
                     (1, 'url = "<U>/good/{f}", hash = "sha256:{g}", upload-time = "2024-01-01T00:00:00Z"'))  # fmt: skip


def uv_locks(r: Chance) -> tuple[Files, str]:
    names = r.sample([n for n in PROJECTS if n not in ("extras", "withdep")], r.randint(1, 3))
    needs = ", ".join(f'{{ name = "{name}" }}' for name in names)
    head = UV_HEAD.replace('[{ name = "demo" }]', f"[{needs}]")
    head = head.replace("version = 1\n", r.pick(weighted((30, "version = 1\n"), (1, "version = 9\n"), (1, ""), (1, "version = 2\n"))), 1)
    head = head.replace("revision = 3\n", r.pick(weighted((10, "revision = 3\n"), (1, ""), (1, "revision = 1\n"), (1, "x = 1\n"))), 1)
    text = head
    for name in names:
        words = words_of(name)
        table = r.pick(weighted((40, "package"), (1, "distribution"), (1, "packages")))
        text += f'[[{table}]]\nname = "{name}"\nversion = "{r.pick(weighted((30, "1.0"), (1, "2.0")))}"\n'
        text += f"source = {{{{ {r.pick(UV_SOURCES)} }}}}\nwheels = [\n    {{{{ {r.pick(UV_WHEELS)} }}}},\n]\n".format(**words) + "\n"
    if r.one_in(4):
        text = twisted(r, text)
    project = PROJECT.replace('"demo"', ", ".join(f'"{name}"' for name in names))
    return {"uv.lock": text, "pyproject.toml": project}, "uv.lock"


INPUTS = int(os.environ.get("BTLOG_INPUTS", "2000"))
SEED = int(os.environ.get("BTLOG_SEED", "20260701"))


@pytest.mark.slow
def test_V_whatever_is_vouched_for_is_what_is_installed(world: World) -> None:
    """The invariant, for 2,000 inputs of a grammar; that many are accepted and installed that it means something."""
    count = {"inputs": 0, "accepted": 0, "pip": 0, "uv": 0, "hostile": 0, "refused and tried": 0, "requirements": 0, "pylock": 0, "uv.lock": 0}
    wrong: list[str] = []

    @seed(SEED)
    @settings(max_examples=INPUTS, phases=(Phase.generate,), derandomize=False, database=None, deadline=None)
    @given(st.integers(0, 2**62))
    def held(chance: int) -> None:
        r = Chance(chance)
        r.calm = r.random() < 0.4
        files, target = r.choice([requirements, requirements, requirements, pylocks, uv_locks])(r)
        count["inputs"] += 1
        # Also what is refused is tried now and then, which shows how many of these are hostile.
        outcome = judge(world, files, target, always=count["inputs"] % 8 == 0, turn=count["inputs"])
        evil = outcome.evil(world)
        if outcome.code:
            count["refused and tried"] += bool(outcome.taken)
            count["hostile"] += bool(evil)
            return
        count["accepted"] += 1
        count[{"r.txt": "requirements", "pylock.toml": "pylock"}.get(target, target)] += 1
        for who in "pip", "uv":
            count[who] += any(by.startswith(who) and what.code == 0 and bool(what.tokens) for by, what in outcome.taken.items())
        if evil:
            wrong.append(f"{evil}\n" + "\n".join(f"--- {name}\n{data!r}" for name, data in files.items()))

    begun = time.monotonic()
    held()
    told = f"{count} in {time.monotonic() - begun:.0f} s, seed {SEED}"
    print(told)
    assert not wrong, f"{len(wrong)} of {told}\n\n" + "\n\n".join(wrong[:40])
    assert count["inputs"] >= INPUTS, told
    part = INPUTS / 2000
    assert count["accepted"] >= 600 * part, told
    assert count["pip"] >= 300 * part, told
    assert count["uv"] >= 400 * part, told
    assert min(count["requirements"], count["pylock"], count["uv.lock"]) >= 60 * part, told
    assert count["hostile"] >= 3 * part, told


# --- W: verify says no where it should say yes, or accuses what it does not know --------------------------------------

SUMS = {letter: hashlib.sha256(letter.lower().encode()).hexdigest() for letter in "ABCDEFGHIJ"}
LOGGED = {
    "demo-1.0-py3-none-any.whl": "A", "demo-1.0.tar.gz": "B", "dep-1.0-py3-none-any.whl": "C",
    "DemoPkg-1.0-py3-none-any.whl": "D", "demo-2.0-py3-none-any.whl": "H", "demo-2.0.tar.gz": "I",
    "dep-1.0.tar.gz": "J",
}  # fmt: skip
PINNED = "demo==1.0 --hash=sha256:<A>\n"
DEMO_URL = "http://127.0.0.1:1/good/demo-1.0-py3-none-any.whl"
VERIFY = ("verify", "--public-key", "public.key", "--storage-dir", "log")


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a key, and a log of what LOGGED names."""
    folder = tmp_path_factory.mktemp("shelf")
    with contextlib.closing(found(folder / "log")) as store:
        store.append([Entry(name, f"sha256:{SUMS[letter]}").encode() for name, letter in LOGGED.items()], seal, True)
    (folder / "public.key").write_text(f"{LOG_VKEY}\n")
    return folder


def put(shelf: Path, name: str, data: str | bytes) -> None:
    """Writes a file in which <A> to <J> stand for checksums, of which E to G are not logged."""
    if isinstance(data, str):
        data = re.sub(r"<([A-J])>", lambda m: SUMS[m[1]], data).encode("utf-8", "surrogateescape")
    (shelf / name).write_bytes(data)


def verified(shelf: Path, name: str, data: str | bytes, *words: str) -> tuple[int, str]:
    """Exit code and stderr of `verify` for a file of this name; without more words, by the log's folder."""
    put(shelf, name, data)
    with contextlib.chdir(shelf):
        code, _, err = call_btlog(*(VERIFY if not words else VERIFY[:3]), name, *words)
    assert "Traceback" not in err
    return code, err


def in_a_process(script: str, folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """Runs a script that may import btlog, and goes to the folder by itself."""
    command = [sys.executable, "-c", script, str(folder), *args]
    return subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=60, check=False)


def test_V5_an_empty_pin_is_wrong_usage(shelf: Path) -> None:
    assert verified(shelf, "demo-1.0.tar.gz", b"b") == (0, "")
    for pins in [
        ("--publisher-subject", ""), ("--publisher-issuer", ""), ("--publisher-subject=",),
        ("--publisher-issuer", ".*", "--publisher-subject", ""),
    ]:  # fmt: skip
        assert verified(shelf, "demo-1.0.tar.gz", b"b", "--storage-dir", "log", *pins)[0] == 2, pins


def test_V8_a_file_of_another_project_or_version_is_refused(shelf: Path) -> None:
    """Also where uv takes it, as it does out of a uv.lock: what is locked as one project and is another is no lock."""
    for name, letter in LOGGED.items():
        if letter not in "BD":  # that is demo-1.0 too, or a file for W1
            url, kind = f'url = "https://files.example/{name}"', "wheels" if name.endswith("whl") else "sdist"
            for lock, text, value in [
                ("uv.lock", UV_BEGIN + UV_DEMO + UV_SIMPLE, f'hash = "sha256:<{letter}>"'),
                ("pylock.toml", pylock("")["pylock.toml"], f'hashes = {{ sha256 = "<{letter}>" }}'),
            ]:
                file = f"{{ {url}, {value} }}"
                code, err = verified(shelf, lock, f"{text}{kind} = {file if kind == 'sdist' else f'[{file}]'}\n")
                assert (code == 0) == (letter == "A"), (lock, name, err)


def test_W1_a_name_in_another_case_than_the_url_s(shelf: Path) -> None:
    """The log knows the file as the index does: by the last part of its URL."""
    name, url = "demopkg-1.0-py3-none-any.whl", "https://files.example/DemoPkg-1.0-py3-none-any.whl"
    lock = PY_BEGIN + '[[packages]]\nname = "demopkg"\nversion = "1.0"\n'
    lock += f'wheels = [{{ name = "{name}", url = "{url}", hashes = {{ sha256 = "<D>" }} }}]\n'
    assert verified(shelf, "pylock.toml", lock)[0] == 0
    assert verified(shelf, "pylock.toml", lock.replace("<D>", "<E>"))[0] == 1
    assert verified(shelf, "pylock.toml", lock.replace(f'name = "{name}", ', ""))[0] == 0
    # By `name` alone, as of a file in a folder, or at a URL that does not tell it.
    for place in "https://files.example/x/demo-1.0-py3-none-any.whl", "https://files.example/blob/1234":
        other = lock.replace(url, place).replace("demopkg", "demo").replace("<D>", "<A>")
        assert verified(shelf, "pylock.toml", other)[0] == 0


W2 = [
    f"\ufeff{PINNED}", f"# -*- coding: utf-8 -*-\n{PINNED}", f"#!x\n# vim: set fileencoding=UTF-8 :\n{PINNED}",
    f"--no-index --find-links=./wheels\n{PINNED}",
    f"--index-url https://a.example --extra-index-url https://b.example\n{PINNED}",
    f'--index-url "https://a.example/simple"\n{PINNED}', f"--index-url='https://a.example/simple'\n{PINNED}",
    f"{DEMO_URL} --hash=sha256:<A>\n", "./demo-1.0-py3-none-any.whl --hash=sha256:<A>\n",
    "Demo[x]==1.0 --hash=sha256:<A>\n",
    f"demo @ {DEMO_URL} --hash=sha256:<A>\n", f"demo @ {DEMO_URL}#sha256=<A> --hash=sha256:<A>\n",
    "demo==1.0 \\\r\n    --hash=sha256:<A>\r\n",
    # As pip-compile writes, uv, poetry, pipenv.
    "#\n# This file is autogenerated by pip-compile with Python 3.11\n# by the following command:\n#\n"
    "#    pip-compile --generate-hashes x.in\n#\n--index-url https://a.example/simple\n\ndemo==1.0 \\\n"
    "    --hash=sha256:<A> \\\n    --hash=sha256:<B>\n    # via -r x.in\ndep==1.0 ; python_version >= \"3.8\" \\\n"
    "    --hash=sha256:<C>\n    # via\n    #   -r x.in\n    #   demo\n",
    "# This file was autogenerated by uv via the following command:\n#    uv export --frozen -o requirements.txt\n"
    "demo==1.0 ; sys_platform == 'linux' \\\n    --hash=sha256:<B> \\\n    --hash=sha256:<A>\n",
    'demo==1.0 ; python_version >= "3.11" and python_version < "4.0" \\\n    --hash=sha256:<A> \\\n'
    "    --hash=sha256:<B>\n"
    'dep==1.0 ; python_version >= "3.11" --hash=sha256:<C>\n',
    "-i https://a.example/simple\ndemo==1.0; python_version >= '3.8' --hash=sha256:<A> --hash=sha256:<B>\n",
]  # fmt: skip


def test_W2_requirements_as_pip_takes_them(shelf: Path) -> None:
    for text in W2:
        assert verified(shelf, "r.txt", text)[0] == 0, text
        assert verified(shelf, "r.txt", text.replace("<A>", "<F>"))[0] == 1, text


LOCK_FILES = (
    'files = [\n    {file = "demo-1.0-py3-none-any.whl", hash = "sha256:<A>"},\n'
    '    {file = "demo-1.0.tar.gz", hash = "sha256:<B>"},\n]\n'
)
NO_SHA256 = "0" * 64
# Of each tool a lock file; and what of it, replaced by what, makes one that says more: something is taken without a
# checksum, or is not known. & stands for what is replaced.
LOCKS: dict[str, tuple[str, dict[str, list[str]]]] = {
    "poetry.lock": (
        '# This file is automatically @generated by Poetry 2.1.3 and should not be changed by hand.\n\n[[package]]\n'
        'name = "demo"\nversion = "1.0"\ndescription = ""\noptional = false\npython-versions = ">=3.8"\n'
        f'groups = ["main"]\n{LOCK_FILES}\n[metadata]\nlock-version = "2.1"\npython-versions = ">=3.11"\n'
        f'content-hash = "{NO_SHA256}"\n',
        {
            "[metadata]": [
                '[package.source]\ntype = "git"\nurl = "https://x.example/demo.git"\nreference = "HEAD"\n'
                f'resolved_reference = "{NO_SHA256[:40]}"\n\n&',
                *(f'[package.source]\ntype = "{kind}"\nurl = "../demo"\n\n&' for kind in ("directory", "x")),
                '[[package]]\nname = "dep"\nversion = "1.0"\ndescription = ""\noptional = false\n'
                'python-versions = "*"\nfiles = []\n\n&', "[[packages]]\n\n&",
            ],
            'hash = "sha256:<A>"': [
                'hash = "sha512:<A><A>"', f'hash = "md5:{NO_SHA256[:32]}"', '&, hashes = ["sha256:<F>"]',
                '&, url = "https://x.example/evil-1.0-py3-none-any.whl"',
            ],
            'lock-version = "2.1"': ['lock-version = "9.0"', ""],
            'name = "demo"': ['name = "dep"'], '\nversion = "1.0"': ['\nversion = "2.0"'],
        },
    ),
    "pdm.lock": (
        '# This file is @generated by PDM.\n\n[metadata]\ngroups = ["default"]\nstrategy = ["inherit_metadata"]\n'
        f'lock_version = "4.5.0"\ncontent_hash = "sha256:{NO_SHA256}"\n\n[[metadata.targets]]\n'
        'requires_python = ">=3.11"\n\n[[package]]\nname = "demo"\nversion = "1.0"\nrequires_python = ">=3.8"\n'
        f'summary = ""\ngroups = ["default"]\n{LOCK_FILES}',
        {
            'summary = ""': [
                f'&\ngit = "https://x.example/demo.git"\nrevision = "{NO_SHA256[:40]}"', '&\npath = "./demo"',
                '&\npath = "./demo"\neditable = true', '&\nx = "y"',
            ],
            'hash = "sha256:<A>"': ['hash = "sha512:<A><A>"', '&, x = "y"'],
            'lock_version = "4.5.0"': ['lock_version = "9.0"', ""], "files = [": ["x = ["],
            'name = "demo"': ['name = "dep"'], '\nversion = "1.0"': ['\nversion = "2.0"'],
        },
    ),
    "Pipfile.lock": (
        f'{{"_meta": {{"hash": {{"sha256": "{NO_SHA256}"}}, "pipfile-spec": 6,\n'
        '"requires": {"python_version": "3.11"}, "sources": [{"name": "pypi", '
        '"url": "https://a.example/simple", "verify_ssl": true}]},\n"default": {"demo": {'
        '"hashes": ["sha256:<A>", "sha256:<B>"], "index": "pypi",\n'
        '"markers": "python_version >= \'3.8\'", "version": "==1.0"}},\n"develop": {}}\n',
        {
            '"version": "==1.0"': [
                f'&, "git": "https://x.example/demo.git", "ref": "{NO_SHA256[:40]}"', '&, "path": "./demo"',
                '&, "x": "y"', '&, "path": "./demo", "editable": true',
                '&, "file": "https://x.example/evil-1.0-py3-none-any.whl"',
            ],
            '"sha256:<A>"': ['&, "sha512:<A><A>"', f'&, "md5:{NO_SHA256[:32]}"'], '"sha256:<A>", "sha256:<B>"': [""],
            '"pipfile-spec": 6': ['"pipfile-spec": 99'],
            '"demo": {': ['"demo": {"version": "==3.0"}, &', '"\u212ait": {"version": "==3.0"}, &'],
            '"develop": {}': [
                '"develop": {"evil": {"version": "==6.6"}}', '&, "docs": {"evil": {"version": "==6.6"}}',
                '&, "default": {}',
            ],
        },
    ),
    "script.py.lock": (
        'version = 1\nrevision = 5\nrequires-python = ">=3.11"\n\n[manifest]\n'
        f'requirements = [{{ name = "demo", specifier = "==1.0" }}]\n\n{UV_DEMO}{UV_SIMPLE}'
        'sdist = { url = "https://files.example/demo-1.0.tar.gz", hash = "sha256:<B>", size = 190490, '
        'upload-time = "2024-09-15T18:07:39.745Z" }\n'
        'wheels = [{ url = "https://files.example/demo-1.0-py3-none-any.whl", hash = "sha256:<A>", size = 70442 }]\n',
        {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LOCKS)
def test_W3_V2_lock_files_of_other_tools(shelf: Path, name: str) -> None:
    """They are read; their own bytes are of no distribution, so that nobody says of these that they are not logged."""
    text, changes = LOCKS[name]
    assert verified(shelf, name, text)[0] == 0
    assert verified(shelf, name, text.replace("<A>", "<F>"))[0] == 1
    wrong = text.replace('name = "demo"\nversion', 'name = "demo:"\nversion').replace('"demo": {', '"demo:": {')
    for other in "", "x", "{}", "[[package]]", wrong, text.replace("sha256:<A>", "md5:0"):
        code, err = verified(shelf, name, other)
        assert code in (2, 3), (other, err)
        assert "not logged" not in err
    for old, news in changes.items():
        for new in news:
            assert old in text
            assert verified(shelf, name, text.replace(old, new.replace("&", old), 1))[0] in (1, 2, 3), new


def test_W3_what_is_not_read_is_not_accused(shelf: Path) -> None:
    for name in "requirements.lock", "conda.lock", "pixi.lock", "x.lock":
        code, err = verified(shelf, name, "demo==1.0\n")
        assert (code in (2, 3), "not logged" in err) == (True, False), err
    assert verified(shelf, "requirements.lock", PINNED)[0] in (0, 2)


def test_W4_what_a_file_lacks_is_said(shelf: Path) -> None:
    for name, text, lacks in [
        ("pylock.toml", PY_BEGIN + 'requires-python = ">=3.11"\n', "packages"),
        ("pylock.toml", PY_BEGIN + '[[packages]]\nversion = "1.0"\n', "name"),
        ("uv.lock", "version = 1\n", "package"),
        ("uv.lock", 'version = 1\n[[package]]\nversion = "1.0"\n', "name"),
        ("report.json", '{"version": "1", "pip_version": "26.3", "install": [], "environment": {}}', "no"),
        ("report.json", '{"version": "1", "pip_version": "26.3", "environment": {}}', "install"),
        ("report.json", '{"version": "1", "install": [{}]}', ""),
    ]:
        code, err = verified(shelf, name, text)
        assert code in (2, 3)
        assert not re.search(r"\w+Error\(|object is not|object has no|NoneType|unhashable", err), err
        assert lacks in err
        assert err.count("\n") <= 2


def test_W5_a_log_that_never_answers(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A word after 3 s, while one waits; then one word for all files, and not one time-out for each of them."""
    right, after = threading.Timer, []

    def sooner(seconds: float, *args: Any) -> threading.Timer:
        after.append(seconds)
        return right(seconds / 30, *args)

    monkeypatch.setattr(threading, "Timer", sooner)
    sums = [hashlib.sha256(str(i).encode()).hexdigest() for i in range(100)]
    text = "".join(f"p{i}==1.0 --hash=sha256:{value}\n" for i, value in enumerate(sums))
    begun = time.monotonic()
    with silent_server() as url:
        code, err = verified(shelf, "r.txt", text, "--log-url", url, "--timeout", "0.3")
    assert (code, after) == (3, [3])
    assert err.splitlines()[0] == f"btlog: asking {url} \u2026"
    assert time.monotonic() - begun < 5
    assert err.count(url) <= 5
    assert len(err.splitlines()) <= 8, err


@pytest.mark.slow
def test_W6_a_folder_of_many_proofs(tmp_path: Path) -> None:
    """800 hashes of twenty projects, each of which has a proof; the time is this process's own."""
    names = [f"p{i % 20}-1.{i}-py3-none-any.whl" for i in range(800)]
    sums = [hashlib.sha256(name.encode()).hexdigest() for name in names]
    (tmp_path / "proofs").mkdir()
    with contextlib.closing(found(tmp_path / "log")) as store:
        entries = [Entry(name, f"sha256:{value}").encode() for name, value in zip(names, sums, strict=True)]
        store.append(entries, seal, True)
        note = store.checkpoint("published")
        assert note
        tiles = btlog.Tiles(len(names), store.tile)
        for i, name in enumerate(names):
            (tmp_path / "proofs" / f"{name}.tlog-proof").write_bytes(store.proof(i, note, tiles))
    lines = [f"p{p}==1.0 " + " ".join(f"--hash=sha256:{value}" for value in sums[p::20]) for p in range(20)]
    (tmp_path / "r.txt").write_text("\n".join(lines) + "\n")
    begun = time.process_time()
    with contextlib.chdir(tmp_path):
        code, out, _ = call_btlog("verify", "r.txt", "--public-key", key_file(tmp_path), "--proofs", "proofs")
    assert (code, out.count("logged at index")) == (0, 800)
    assert time.process_time() - begun < 3


def test_W7_extra_data_that_is_no_entry_of_ours(shelf: Path) -> None:
    """The specification leaves it opaque: what cannot be used is left alone."""
    with contextlib.closing(found(shelf / "log")) as store:
        note = store.checkpoint("published")
        assert note
        proof = btlog.Proof.parse(store.proof(1, note, btlog.Tiles(len(LOGGED), store.tile)))
    for extra in b'{"x": 1}', b"\0\xff", b"pypi-transparency/v1\n", b"x" * 60_000:
        (shelf / "proof").write_bytes(btlog.encode_proof(dataclasses.replace(proof, extra=extra)))
        assert verified(shelf, "demo-1.0.tar.gz", b"b", "--proof", "proof")[0] == 0
        assert verified(shelf, "demo-1.0.tar.gz", b"other", "--proof", "proof")[0] == 1


PEAK = """
import os, sys
import btlog
os.chdir(sys.argv[1])
codes = [btlog.main(["verify", "r.txt", "--public-key", "public.key", "--log-url", url]) for url in sys.argv[2:]]
[peak] = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
print(*codes, int(peak.split()[1]) // 1024)
"""


def test_W8_a_log_does_not_decide_how_much_memory_is_taken(shelf: Path) -> None:
    """15 MiB of empty lists would be 320 MiB, out of 15 KiB of gzip: for a look-up, and for a proof."""
    bomb = gzip.compress(b'{"entries":[' + b"[]," * 5_000_000 + b"[]]}")
    answer = {"index": 0, "filename": "demo-1.0-py3-none-any.whl", "checksum": f"sha256:{SUMS['A']}"}
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None: ...

        def do_GET(self) -> None:
            _, place, rest = self.path.split("/", 2)  # /lookup, or /proof, before each path of the log
            zipped = rest.startswith({"lookup": "entries", "proof": "entry/0/proof"}[place])
            asked.append((place, zipped))
            body = bomb if zipped else json.dumps({"entries": [answer]}).encode()
            self.send_response(200)
            if zipped:
                self.send_header("Content-Encoding", "gzip")
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    put(shelf, "r.txt", PINNED)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        done = in_a_process(PEAK, shelf, f"{url}/lookup", f"{url}/proof")
        server.shutdown()
        thread.join()
    assert {("lookup", True), ("proof", True)} <= {*asked}
    *codes, peak = map(int, done.stdout.split())
    assert {*codes} <= {1, 3}, done.stderr
    assert peak < 150


PY_X = PY_BEGIN + '[[packages]]\nname = "x"\n'
UV_X = 'version = 1\n[[package]]\nname = "x"\nversion = "1"\nsource = '
REPORT_X = '{"version": "1", "install": [{"metadata": {"name": %s}, "download_info": {"url": "%s", "archive_info": ' + (
    '{"hashes": {"sha256": "<A>"}}}}]}'
)
ODD_INPUTS = [
    ("pylock.toml", PY_X.replace('"x"\n', '["x"]\n')),
    ("pylock.toml", PY_X + 'wheels = [{ name = ["x"], hashes = { sha256 = "<A>" } }]\n'),
    ("pylock.toml", PY_X.replace('"x"\n', "1979-05-27\n") + 'wheels = [{ url = 1.5, hashes = { sha256 = "<A>" } }]\n'),
    ("pylock.toml", "x = " + "[" * 5000),
    ("uv.lock", UV_X.replace('"x"', '["x"]') + '{ registry = "x" }\nwheels = [{ url = "x", hash = "sha256:<A>" }]\n'),
    ("uv.lock", UV_X + "[]\nwheels = {}\n"),
    ("report.json", REPORT_X % ('"\\ud800"', "http://x/\\ud800-1.whl")),
    ("report.json", REPORT_X % ('["x"]', "x")),
    ("report.json", REPORT_X % ('"x"', "http://[x/a.whl")),
    ("report.json", "[" * 100_000),
    ("report.json", '{"version": "1", "install": ' + "9" * 5000 + "}"),
    ("r.txt", "demo @ http://[x/demo-1.0-py3-none-any.whl --hash=sha256:<A>\n"),
    ("r.txt", "demo @ http://x/%00-1.0.whl --hash=sha256:<A>\n"),
    ("r.txt", PINNED.replace("\n", "\0\n")),
    *(("r.txt", text) for text in ("-r \0\n", "-r \udcff\n", f"-r {'x' * 5000}\n", "\udcff\udcfe")),
]  # fmt: skip


def test_W9_odd_inputs_are_refused_in_one_line(shelf: Path) -> None:
    """Some of them through a process, too: what a terminal or a pipe can't encode must not be a traceback."""
    for name, text in ODD_INPUTS:
        code, err = verified(shelf, name, text)
        assert code in (1, 2, 3)
        if re.search(r"\\ud|[\udc80-\udcff\0]|%00", text):
            done = run_btlog(*VERIFY, name, "--json", cwd=shelf)
            assert (done.returncode in (1, 2, 3), "Traceback" in done.stderr) == (True, False), done.stderr
            err += done.stderr
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f]", err)


def test_W9_names_do_not_write_to_the_terminal(shelf: Path) -> None:
    """Nothing of a lock file reaches the terminal raw: not in the table, nor in an error."""
    name = "demo\\u001b[31mred\\nlogged at index 9\\r\\u009b-1.0-py3-none-any.whl"
    files = [(name, f"https://files.example/{name}"), ("demo-1.0-py3-none-any.whl", DEMO_URL)]
    wheels = [f'{{ name = "{n}", url = "{url}", hashes = {{ sha256 = "<A>" }} }}' for n, url in files]
    text = pylock(f"wheels = [{', '.join(wheels)}]")["pylock.toml"]
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\x9b]", verified(shelf, "pylock.toml", text)[1])
    ours, theirs = os.openpty()
    with contextlib.ExitStack() as stack:
        terminal = stack.enter_context(open(theirs, "w"))
        stack.enter_context(contextlib.chdir(shelf))
        stack.enter_context(contextlib.redirect_stdout(terminal))
        stack.enter_context(contextlib.redirect_stderr(terminal))
        assert btlog.main([*VERIFY, "pylock.toml"]) in (1, 2, 3)
    shown = b""
    with contextlib.suppress(OSError):  # which is how a terminal ends
        while data := os.read(ours, 65536):
            shown += data
    os.close(ours)
    assert b"red" in shown
    assert not re.search(rb"\x1b|\xc2\x9b|(?m:^logged at index 9)", shown)


# Verifies r.txt with a stdout that is full and with one that is closed, in a process each; prints exit codes to stderr.
NO_STDOUT = """
import os, sys
import btlog
os.chdir(sys.argv[1])
codes = []
for full in True, False:
    for more in [], ["--json"]:
        if not (child := os.fork()):
            os.close(1)
            if full:
                os.open("/dev/full", os.O_WRONLY)
            else:
                sys.stdout = None  # as Python has it then
            sys.exit(btlog.main([*sys.argv[2:], "r.txt", *more]))
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print("codes", *codes, file=sys.stderr)
"""


def test_W9_stdout_that_is_full_or_closed(shelf: Path) -> None:
    put(shelf, "r.txt", PINNED)
    error = in_a_process(NO_STDOUT, shelf, *VERIFY).stderr
    assert error.endswith("codes 3 3 0 0\n"), error
    assert not re.search("Traceback|Exception ignored", error)


def test_W9_a_key_on_a_file_system_that_is_only_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing can be made, and nothing can be removed: not even what is not there."""

    def refuse(*args: Any, **more: Any) -> Any:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    for name in "link", "unlink", "remove", "rename", "replace", "mkdir":
        monkeypatch.setattr(os, name, refuse)
    real = os.open
    make = lambda path, flags, *more: refuse() if flags & os.O_CREAT else real(path, flags, *more)  # noqa: E731
    monkeypatch.setattr(os, "open", make)
    private, public = tmp_path / "private.key", tmp_path / "public.key"
    words = ("--private-key-path", str(private), "--public-key-path", str(public))
    code, out, err = call_btlog("keygen", "--origin", "x.example/log", *words)
    assert (code in (2, 3), out, err.count("\n"), str(private) in err) == (True, "", 1, True)


def test_W9_fifos_do_not_wait_without_end(tmp_path: Path, shelf: Path) -> None:
    """Neither as a target nor where a file includes them."""
    for name in "r.txt", "pylock.toml", "uv.lock", "report.json", "demo-1.0.tar.gz":
        os.mkfifo(tmp_path / name)
        (tmp_path / "sub.txt").write_text(f"-r {tmp_path / name}\n")
        for target in tmp_path / name, tmp_path / "sub.txt":
            # Whoever waits for a writer gets one, so that this ends in any case.
            writer = threading.Timer(10, lambda path_=tmp_path / name: os.close(os.open(path_, os.O_RDWR)))
            writer.start()
            with contextlib.chdir(shelf):
                assert call_btlog(*VERIFY, str(target))[0] in (2, 3)
            assert writer.is_alive(), f"it waited for {target}"
            writer.cancel()
            writer.join()


def test_W9_files_that_are_included_twice(shelf: Path) -> None:
    """Twice in each of n files is 2^n; each file is read once, or all of it is refused."""
    for i in range(14):
        put(shelf, f"{i}.txt", f"-r {i + 1}.txt\n-r {i + 1}.txt\n")
    put(shelf, "14.txt", PINNED)
    begun = time.process_time()
    with contextlib.chdir(shelf):
        code, out, err = call_btlog(*VERIFY, "0.txt")
    assert code in (0, 2, 3)
    assert len(out + err) < 10_000
    assert time.process_time() - begun < 1


def test_W10_equal_cases_equal_exit_codes(shelf: Path) -> None:
    """A proof that is not there says nothing about a file: it could not be checked, whatever named the file."""
    (shelf / "no proofs").mkdir()
    report = {"install": [{"metadata": {"name": "demo", "version": "1.0"}, "download_info": {
        "url": DEMO_URL, "archive_info": {"hash": "sha256=<A>", "hashes": {"sha256": "<A>"}}}}]}  # fmt: skip
    uv = f'{UV_BEGIN}{UV_DEMO}{UV_SIMPLE}wheels = [\n    {{ url = "{DEMO_URL}", hash = "sha256:<A>" }},\n]\n'
    lock = pylock(f'wheels = [{{ url = "{DEMO_URL}", hashes = {{ sha256 = "<A>" }} }}]')["pylock.toml"]
    report_text = json.dumps({"version": "1", "pip_version": "26.3", "environment": {}, **report})
    for name, text in ("r.txt", PINNED), ("uv.lock", uv), ("pylock.toml", lock), ("report.json", report_text):
        assert verified(shelf, name, text)[0] == 0
        assert verified(shelf, name, text, "--proofs", "no proofs")[0] == 3
        assert verified(shelf, name, text.replace("<A>", "<F>"))[0] == 1


# --- L1: what a witness below the quorum can do at worst --------------------------------------------------------------
# It can keep its own cosignature to itself. It can make a start wait for the witnesses' time-out, once. And it can show
# something that the log's own key has signed and the log does not have: then the log ends, and rightly. That is all.


@dataclasses.dataclass
class Reply:
    """What a witness sends, and how."""

    body: bytes = b""
    status: int = 200
    kind: str = "text/plain; charset=utf-8"
    headers: tuple[str, ...] = ()
    raw: bytes | None = None  # instead of all of the above
    pause: float = 0  # in seconds, after each byte
    end: str = "keep"  # what becomes of the connection: "keep", "close", "reset"; "hold" is never to say more


Lie = Callable[["LyingWitness", btlog.AddCheckpoint | None], Reply]  # None: it is asked for its last checkpoint


class LyingWitness:
    """A witness of its own make, on http.server, that answers as `lie` says while it lies, and else as it should."""

    def __init__(self, lie: Lie | None = None, signer: btlog.Signer = COSIGNER) -> None:
        self.lie, self.signer = lie, signer
        self.told = 0  # how often it has begun to lie
        self.seen: list[btlog.AddCheckpoint] = []
        self.lines: list[bytes] = []  # the cosignatures that were right, in order
        self.log_url = self.friend_url = ""  # where the log is, and a witness that is honest
        self.over = threading.Event()
        liar = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: Any) -> None: ...

            def do_POST(self) -> None:
                request = btlog.AddCheckpoint.parse(self.rfile.read(int(self.headers["Content-Length"])))
                liar.seen.append(request)
                self.tell(liar.answer(request))

            def do_GET(self) -> None:
                self.tell(liar.answer(None))

            def tell(self, reply: Reply) -> None:
                if (data := reply.raw) is None:
                    fields = [f"Content-Type: {reply.kind}", f"Content-Length: {len(reply.body)}", *reply.headers]
                    data = "\r\n".join([f"HTTP/1.1 {reply.status} So", *fields, "", ""]).encode() + reply.body
                with contextlib.suppress(OSError):  # it did not wait so long
                    for piece in [data] if not reply.pause else [data[i : i + 1] for i in range(len(data))]:
                        self.wfile.write(piece)
                        if reply.pause and liar.over.wait(reply.pause):
                            break
                if reply.end == "hold":
                    liar.over.wait()
                if reply.end == "reset":
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.close_connection = reply.end != "keep"

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def answer(self, request: btlog.AddCheckpoint | None) -> Reply:
        if self.lie is None:
            return self.honest(request)
        self.told += 1
        try:
            return self.lie(self, request)
        except OSError:  # the log that it asked has ended
            return Reply(status=500)

    def honest(self, request: btlog.AddCheckpoint | None) -> Reply:
        if request is None:
            return Reply(self.seen[-1].note) if self.seen else Reply(status=404)
        self.lines.append(self.cosignature(request))
        return Reply(self.lines[-1])

    def cosignature(self, request: btlog.AddCheckpoint, signer: btlog.Signer | None = None, seconds: int = 0) -> bytes:
        text = btlog.split_note(request.note)[0]
        return signature_line(signer or self.signer, text, seconds or int(time.time())).encode()

    def published(self) -> bytes:
        """What the log shows now; empty where there is nothing yet."""
        status, _, note = ask(self.log_url, "/checkpoint")
        return note if status == 200 else b""

    def newer(self) -> bytes:
        """What the log shows once it has published more; what it has now if it does not for too long."""
        note = first = self.published()
        for _ in range(100):
            if size_of_note(note) > size_of_note(first) or self.over.wait(0.01):
                break
            note = self.published()
        return note

    def close(self) -> None:
        self.over.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def size_of_note(note: bytes) -> int:
    """Of the tree of a checkpoint, -1 for none."""
    return int(note.split(b"\n")[1]) if note else -1


def hint(size: int | str, newline: str = "\n") -> Reply:
    """409 and a size, as a witness says what it has."""
    return Reply(f"{size}{newline}".encode(), 409, "text/x.tlog.size")


NO = Reply(b"no", 422)
CLAIMS = 18


def claims(liar: LyingWitness, request: btlog.AddCheckpoint) -> Reply:
    """All that a witness may claim of a log, one after the other: CLAIMS of them."""
    size = size_of_note(request.note)
    replies = [
        NO, hint(size + 1), hint(999_999), NO, hint(2**63 - 1), hint(2**64), hint(10**30), hint(0), hint(size),
        hint(max(size_of_note(liar.published()), 0)), hint(max(size_of_note(liar.newer()), 0)), hint(max(size - 1, 0)),
        hint(size + 1, ""), hint("-1"), hint("01"), hint("٣"), hint(""), Reply(b"no", 409),
    ]  # fmt: skip
    assert len(replies) == CLAIMS
    return replies[len(liar.seen) % CLAIMS]


Answer = Callable[[LyingWitness, btlog.AddCheckpoint], Reply]


class InTurn:
    """One lie after the other, `count` of them, and again; what it shows when it is asked is honest, or `shown`."""

    def __init__(self, *replies: Answer | Reply, shown: Callable[[LyingWitness], Reply] | None = None) -> None:
        self._replies, self._shown = replies, shown
        self.count = CLAIMS if claims in replies else len(replies)

    def __call__(self, liar: LyingWitness, request: btlog.AddCheckpoint | None) -> Reply:
        if request is None:
            return self._shown(liar) if self._shown else liar.honest(None)
        reply = self._replies[len(liar.seen) % len(self._replies)]
        return reply if isinstance(reply, Reply) else reply(liar, request)


def always(make: Answer) -> Lie:
    return InTurn(make)


def signed_by(signer: btlog.Signer, size: int, origin: str = "", entries: str = "other-") -> bytes:
    """A checkpoint of a tree that this log does not have."""
    root = root_of([entry(i, entries) for i in range(min(size, 3))])
    text = f"{origin or signer.name}\n{size}\n{b64(root)}\n"
    return note_of(text, signature_line(signer, text))


def slowly(liar: LyingWitness, seconds: float, reply: Reply) -> Reply:
    liar.over.wait(seconds)
    return reply


def of_friend(liar: LyingWitness) -> Reply:
    """The newest that another witness has: signed, and perhaps not published yet."""
    status, _, note = ask(liar.friend_url, f"/{hashlib.sha256(LOG.name.encode()).hexdigest()}/checkpoint")
    return Reply(note, status)


def elsewhere(status: int) -> Answer:
    return lambda liar, request: Reply(status=status, headers=(f"Location: {liar.log_url}/checkpoint",))


def cosigns(**more: Any) -> Answer:
    """Its cosignature under another status, by another signer, at another time."""
    status = more.pop("status", 200)
    return lambda liar, request: Reply(liar.cosignature(request, **more), status)


def cosigns_with_others(liar: LyingWitness, request: btlog.AddCheckpoint) -> Reply:
    others = [liar.cosignature(request, new_key(f"x{i}.example")) for i in range(99)]
    return Reply(b"".join([*others, liar.cosignature(request)]))


def cosigns_another_tree(liar: LyingWitness, request: btlog.AddCheckpoint) -> Reply:
    return Reply(signature_line(liar.signer, signed_by(SIGNER, 9).decode().partition("\n\n")[0] + "\n", 5).encode())


def first_right(liar: LyingWitness, request: btlog.AddCheckpoint | None) -> Reply:
    if liar.told < 3:
        return liar.honest(request)
    return claims(liar, request) if request else Reply(liar.newer())


NOBODY, MIMIC = new_key("nobody.example"), new_key(LOG.name)  # the log's name, and another key
STATUSES = [100, 101, 102, 103, 199, 201, 202, 203, 204, 205, 206, 300, 301, 302, 303, 304, 305, 307, 308, 400, 401,
            402, 403, 404, 405, 406, 407, 408, 410, 411, 412, 413, 414, 415, 416, 417, 418, 421, 423, 424, 425, 426,
            428, 429, 431, 451, 500, 501, 502, 503, 504, 505, 507, 508, 511, 599, 600, 999]  # fmt: skip
TIMES = [1, 10**10, 10**12, 2**63 - 1, 2**63, 2**64 - 1]
OK_HEAD = b"HTTP/1.1 200 OK\r\n"
RAW = {  # what is no answer: it is sent for all that is asked
    "nothing": Reply(raw=b"", end="hold"),
    "nothing, and hangs up": Reply(raw=b"", end="close"),
    "nothing, and resets": Reply(raw=b"", end="reset"),
    "half a head": Reply(raw=OK_HEAD + b"Content-", end="hold"),
    "half a body": Reply(raw=OK_HEAD + b"Content-Length: 99\r\n\r\nx", end="close"),
    "a length that is none": Reply(raw=OK_HEAD + b"Content-Length: -1\r\n\r\nx", end="hold"),
    "chunks that are none": Reply(raw=OK_HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", end="hold"),
    "no HTTP": Reply(raw=b"SSH-2.0-OpenSSH_9.2\r\n", end="hold"),
    "endlessly many headers": Reply(raw=OK_HEAD + b"X: y\r\n" * 100_000, end="close"),
    "endlessly often that it goes on": Reply(raw=b"HTTP/1.1 100 Continue\r\n\r\n" * 100_000, end="hold"),
}
SHOWN: dict[str, Callable[[LyingWitness], Reply]] = {  # what it shows for its claims
    "nothing": lambda liar: Reply(status=404),
    "what is published": lambda liar: Reply(liar.published()),
    "the newest, once there is more": lambda liar: Reply(liar.newer()),
    "the newest of an honest witness": of_friend,
    "what it is asked for": lambda liar: Reply(liar.seen[-1].note),
    "the oldest that it knows": lambda liar: Reply(liar.seen[0].note),
    "an empty tree": lambda liar: Reply(SIGNER.sign(Checkpoint(LOG.name, Tree(0, btlog.EMPTY_ROOT)))),
    "a larger tree by a key of the log's name": lambda liar: Reply(signed_by(MIMIC, 9999)),
    "a larger tree by its own key": lambda liar: Reply(signed_by(liar.signer, 9999, LOG.name)),
    "its own log's newest": lambda liar: Reply(signed_by(liar.signer, 9999)),
    "another log's newest": lambda liar: Reply(signed_by(NOBODY, 9999)),
    "another origin by the log's key": lambda liar: Reply(signed_by(SIGNER, 9999, "log.example/b")),
    "a larger tree without a signature": lambda liar: Reply(signed_by(SIGNER, 9999).partition(b"\n\n")[0] + b"\n\n"),
    "a larger tree under the signature of a smaller one": lambda liar: Reply(
        re.sub(rb"\A(.*\n)\d+\n", rb"\g<1>9999\n", liar.seen[-1].note)
    ),
    "its cosignature of what is published": lambda liar: Reply(liar.published() + liar.cosignature(liar.seen[-1])),
    "garbage": lambda liar: Reply(b"\xff" * 100),
    "endlessly much": lambda liar: Reply(b"x" * 10_000_000),
    "an error": lambda liar: Reply(b"no", 500),
    "the way to the log": lambda liar: Reply(status=302, headers=(f"Location: {liar.log_url}/checkpoint",)),
    "what never ends": lambda liar: Reply(raw=b"", end="hold"),
    "it byte by byte": lambda liar: Reply(liar.published(), pause=0.01),
}
WITNESS_LIES: dict[str, Lie] = {
    "any status": InTurn(*(Reply(b"x", status) for status in STATUSES)),
    "any status with a good cosignature": InTurn(*(cosigns(status=status) for status in STATUSES)),
    "go elsewhere": InTurn(*(elsewhere(status) for status in (301, 302, 303, 307, 308))),
    "come back in a year": InTurn(*(Reply(b"busy", s, headers=("Retry-After: 31536000",)) for s in (429, 503))),
    "refuses, whatever it is": lambda liar, request: NO,
    "refuses, shows what is published": lambda liar, request: NO if request else Reply(liar.published()),
    "refuses, shows the newest, once there is more": lambda liar, request: NO if request else Reply(liar.newer()),
    "has more, whatever it is": lambda liar, request: hint(999_999) if request else Reply(status=404),
    "has more, by what it was asked": lambda liar, request: (
        hint(size_of_note(request.note) + 1) if request else Reply(liar.newer())
    ),
    **{f"claims, shows {what}": InTurn(claims, shown=show) for what, show in SHOWN.items()},
    **{f"says {what}": lambda liar, request, reply=reply: reply for what, reply in RAW.items()},  # type: ignore[misc]
    "says it byte by byte": always(lambda liar, request: Reply(liar.cosignature(request), pause=0.01)),
    "says it when the round is over": always(lambda liar, request: slowly(liar, 0.06, liar.honest(request))),
    "says it when the time is over": always(lambda liar, request: slowly(liar, 0.3, liar.honest(request))),
    "says garbage": InTurn(
        *map(Reply, [b"", b"\n", b"garbage\n", b"\xff" * 1000, b"x" * 1_000_000, b"\xe2\x80\x94 x y\n"])
    ),
    "cosigns what came before": always(lambda liar, request: Reply(liar.cosignature(liar.seen[-2:][0]))),
    "cosigns in the name of the log": InTurn(cosigns(signer=MIMIC)),
    "cosigns by a key that nobody knows": InTurn(cosigns(signer=new_key(COSIGNER.name))),
    "cosigns a hundred times": always(lambda liar, request: Reply(liar.cosignature(request) * 100)),
    "cosigns with lines of others": InTurn(cosigns_with_others),
    "cosigns at times that nobody has": InTurn(*(cosigns(seconds=at) for at in TIMES)),
    "cosigns another tree": InTurn(cosigns_another_tree),
    "every second one is right": InTurn(lambda liar, request: liar.honest(request), claims),
    "first right, then wrong": first_right,
    "answers what it was asked before": always(
        lambda liar, request: Reply(liar.lines[-1]) if liar.lines else liar.honest(request)
    ),
}


def a_policy(role: str, honest: list[LocalWitness], liar: LyingWitness) -> Policy:
    """Who has to cosign: never the one that lies."""
    good = tuple(btlog.as_witness(w.witness.signer.key) for w in honest)
    bad = btlog.as_witness(liar.signer.key)
    urls = (*((key, w.url) for key, w in zip(good, honest, strict=True)), (bad, liar.url))
    quorum = {
        "one of three": Quorum(2, (bad, *good)),
        "one of a group": Quorum(2, (good[0], Quorum(1, (bad, good[1])))),
        "outside the quorum": Quorum(2, good),
    }[role]
    return Policy((LOG,), (bad, *good), quorum, urls)


LIE_OPTIONS = {"witness_timeout": 0.2, "checkpoint_interval": 0.01}


class Trial:
    """A log with two honest witnesses and one that lies, in a folder; it can be stopped and started again."""

    def __init__(
        self, folder: Path, stack: contextlib.ExitStack, role: str = "one of three", lie: Lie | None = None
    ) -> None:
        self.liar = LyingWitness(lie)
        stack.enter_context(contextlib.closing(self.liar))
        honest = stack.enter_context(several_witnesses(folder, 2))
        self.policy = a_policy(role, honest, self.liar)
        self.liar.friend_url = honest[0].url
        self.entries: list[bytes] = []
        self._folder = folder / "log"

    @contextlib.contextmanager
    def log(self, **options: Any) -> Iterator[LocalLog]:
        """The log while it runs; in the end it has all that was added, and is well."""
        more: dict[str, Any] = {"policy": self.policy, "timeout": 5, "options": {**LIE_OPTIONS, **options}}
        with contextlib.closing(LocalLog(self._folder, **more)) as log:
            self.liar.log_url = log.url
            yield log
            assert ask(log.url, "/healthz")[0] == 200
            assert walk(log.url, self.policy) == self.entries

    def add(self, log: LocalLog) -> Checkpoint:
        """Adds one more entry, which is acknowledged at once; returns the checkpoint of the answer."""
        data = entry(len(self.entries))
        begun = time.monotonic()
        status, answer = add(log.url, data)
        assert (status, answer.get("error"), answer["index"]) == (200, None, len(self.entries))
        assert time.monotonic() - begun < 3
        self.entries.append(data)
        return open_checkpoint(base64.b64decode(answer["checkpoint"]), self.policy)

    def add_until_told(self, log: LocalLog, count: int) -> None:
        """Adds until the witness has lied so often."""
        told, begun = self.liar.told, time.monotonic()
        while self.liar.told < told + count:
            self.add(log)
            assert time.monotonic() - begun < 30, f"only {self.liar.told - told} lies were told"


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as made:
        yield made


DEFAULT_LIES = ["any status", "claims, shows the newest of an honest witness", "says nothing"]  # the next test has all


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in DEFAULT_LIES)) for name in WITNESS_LIES]
)
def test_L1_a_witness_that_lies_stops_no_log(tmp_path: Path, stack: contextlib.ExitStack, name: str) -> None:
    """One of three where two are needed: at a first start, while it runs, after the lie, and at the next start."""
    lie = WITNESS_LIES[name]
    trial = Trial(tmp_path, stack, lie=lie)
    with trial.log() as log:
        trial.add_until_told(log, max(3, lie.count) if isinstance(lie, InTurn) else 3)
        trial.liar.lie = None
        trial.add(log)
        trial.liar.lie = lie
        trial.add_until_told(log, 1)
    told = trial.liar.told
    with trial.log() as log:
        trial.add_until_told(log, 1)
        assert trial.liar.told > told
    trial.liar.lie = None  # and it is asked again, and counts again, once it is honest
    witness = btlog.as_witness(trial.liar.signer.key)
    with trial.log() as log:
        eventually(lambda: witness in dict(trial.add(log).cosigned), 5)


def test_L1_all_lies_one_after_the_other(tmp_path: Path, stack: contextlib.ExitStack) -> None:
    """Also where it is one of two that are as good."""
    assert len(WITNESS_LIES) == 54
    trial = Trial(tmp_path, stack, "one of a group")
    with trial.log(witness_timeout=0.1) as log:
        for trial.liar.lie in WITNESS_LIES.values():
            trial.add_until_told(log, 2)


def cosigners(log: LocalLog, policy: Policy) -> list[VerifierKey]:
    checkpoint = published(log.url, policy)
    return [key for key, _ in checkpoint.cosigned] if checkpoint else []


def test_L1_a_witness_outside_of_the_quorum_lies(tmp_path: Path, stack: contextlib.ExitStack) -> None:
    """Whatever it says is nothing to the log, which asks it, too, and publishes what it cosigns once it is honest."""
    trial = Trial(tmp_path, stack, "outside the quorum")
    with trial.log(witness_timeout=0.1) as log:
        for trial.liar.lie in WITNESS_LIES.values():
            trial.add_until_told(log, 1)
        trial.liar.lie = None
        trial.add(log)
        witness = btlog.as_witness(trial.liar.signer.key)
        assert eventually(lambda: witness in cosigners(log, trial.policy), 5)


def test_what_is_cosigned_after_the_quorum_is_published_too(tmp_path: Path) -> None:
    """Nobody waits for a witness that the quorum can do without; if no more is added, its line comes later."""
    go = threading.Event()
    with several_witnesses(tmp_path, 2) as (fast, slow):

        def relay(handler: btlog.Handler, body: btlog.Body) -> Any:
            async def answer() -> btlog.Response:
                data = await body.all(10**6)
                await asyncio.get_running_loop().run_in_executor(None, go.wait, 20)
                status, headers, text = await asyncio.get_running_loop().run_in_executor(
                    None, ask, slow.url, handler.path, "POST", data)
                return btlog.Response(text, headers["content-type"], status)

            return answer()

        keys = [btlog.as_witness(w.witness.signer.key) for w in (fast, slow)]
        with contextlib.closing(Local(relay)) as gate:
            policy = Policy((LOG,), tuple(keys), Quorum(1, (keys[0],)), ((keys[0], fast.url), (keys[1], gate.url)))
            go.set()  # a first round hears all
            with contextlib.closing(LocalLog(tmp_path / "log", policy=policy)) as log:
                assert eventually(lambda: cosigners(log, policy) == keys)
                go.clear()
                opened = opened_answer(add(log.url, entry(0))[1], policy)
                assert [key for key, _ in opened.cosigned] == keys[:1]
                assert cosigners(log, policy) == keys[:1]
                go.set()
                assert eventually(lambda: cosigners(log, policy) == keys)
                assert published(log.url, policy) == opened
                assert opened_answer(add(log.url, entry(1))[1], policy).tree.size == 2


def test_a_policy_without_a_quorum_has_its_witnesses_asked(tmp_path: Path) -> None:
    with several_witnesses(tmp_path, 1) as [witness_]:
        key = btlog.as_witness(witness_.witness.signer.key)
        policy = Policy((LOG,), (key,), Quorum(0, ()), ((key, witness_.url),))
        with contextlib.closing(LocalLog(tmp_path / "log", policy=policy)) as log:
            assert add(log.url, entry(0))[0] == 200
            assert eventually(lambda: cosigners(log, policy) == [key])
        witness_.close()
        with contextlib.closing(LocalLog(tmp_path / "log", policy=policy, timeout=1)) as log:
            assert add(log.url, entry(1))[0] == 200  # and not waited for, once it has been heard or not


def test_L1_a_silent_witness_delays_a_start_by_its_time_out(tmp_path: Path, stack: contextlib.ExitStack) -> None:
    """At a start all are heard, since one may have seen what the log has lost; the log waits once, and briefly."""
    trial = Trial(tmp_path, stack, lie=WITNESS_LIES["says nothing"])
    for _ in range(2):
        with trial.log(witness_timeout=0.6) as log:
            trial.add(log)
            begun = time.monotonic()
            trial.add(log)
            assert time.monotonic() - begun < 0.5  # and not again


def test_L1_what_the_log_signed_meanwhile_is_no_evidence(tmp_path: Path, stack: contextlib.ExitStack) -> None:
    """L1 as it was found: it answers 422, holds the next request until the log has published more, and shows that."""
    asked, go = threading.Event(), threading.Event()

    def lie(liar: LyingWitness, request: btlog.AddCheckpoint | None) -> Reply:
        if request is not None:
            return NO
        asked.set()
        go.wait(10)
        return Reply(liar.published())

    trial = Trial(tmp_path, stack)
    with trial.log(witness_timeout=10.0) as log:
        trial.add(log)
        trial.liar.lie = lie
        for _ in range(4):
            trial.add(log)
        assert asked.wait(10)
        for _ in range(4):
            trial.add(log)
        go.set()
        eventually(lambda: trial.liar.told >= 3)
        trial.add(log)


@pytest.mark.parametrize("status", [409, 422])
@pytest.mark.parametrize("forked", [99, 4, 2], ids=["larger", "other root", "other past"])
def test_L1_what_the_log_s_own_key_has_signed_ends_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, stack: contextlib.ExitStack, forked: int, status: int
) -> None:
    """One witness is enough for that, though the quorum is met: nobody else can have signed a second history."""
    trial = Trial(tmp_path, stack)
    options: dict[str, Any] = {"policy": trial.policy, "timeout": 1, "options": LIE_OPTIONS}
    with contextlib.closing(LocalLog(tmp_path / "log", **options)) as log:
        for _ in range(4):
            trial.add(log)
        note = SIGNER.sign(Checkpoint(LOG.name, Tree(forked, hashlib.sha256(b"other").digest())))
        claim = NO if status == 422 else hint(99)
        trial.liar.lie = lambda liar, request: claim if request else Reply(note)
        numbers = itertools.count()
        eventually(lambda: add(log.url, entry(next(numbers), "more-"))[0] == 503, 10)
        size = log.store.tree("signed").size
        assert "signature" in add(log.url, entry(0, "later-"))[1]["error"]
        assert ask(log.url, "/healthz")[0] == 503
        assert log.store.tree("signed").size == size
        assert len(walk(log.url, trial.policy)) > 0  # reading goes on
        [critical] = [record for record in caplog.records if record.levelname == "CRITICAL"]
        assert "signature" in critical.getMessage()
    with contextlib.closing(LocalLog(tmp_path / "log", **options)) as log:
        assert add(log.url, entry(0, "start-"))[0] == 503
        assert log.store.tree("signed").size == size


# --- L2: a first start, and no other, begins a log ---------------------------------------------------------------------


def served(
    *args: str, cwd: Path, port: str = "0", use: Callable[[str], Any] = lambda url: None
) -> tuple[int, str, str]:
    """Runs a server in this process until its URL has been used: the exit code, its one line, and its stderr."""
    uses: list[concurrent.futures.Future[Any]] = []
    over = threading.Event()

    def work(url: str) -> None:
        try:
            use(url)
        finally:
            if not over.is_set():
                os.kill(os.getpid(), signal.SIGINT)

    class Output(io.StringIO):
        def flush(self) -> None:
            if self.getvalue() and not uses:
                uses.append(pool.submit(work, self.getvalue().split()[0]))

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    error = io.StringIO()
    try:
        with (
            concurrent.futures.ThreadPoolExecutor(1) as pool,
            contextlib.chdir(cwd),
            contextlib.redirect_stdout(Output()) as out,
            contextlib.redirect_stderr(error),
        ):
            code = btlog.main((*args, "--port", port))
            over.set()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for used in uses:
        used.result()
    return code, out.getvalue(), error.getvalue()


def starts(*args: str, cwd: Path, use: Callable[[str], Any] = lambda url: None) -> str:
    """The key of a server that starts, is used, and ends as it should."""
    code, line, error = served(*args, cwd=cwd, use=use)
    assert code == 0, error
    return line.split()[4]


def refused(*args: str, cwd: Path, codes: Collection[int] = (2,), port: str = "0") -> str:
    """The one line with which a server that does not start ends. Exit code 2: the command has to be changed."""
    code, line, error = served(*args, cwd=cwd, port=port)
    assert (line, error.count("\n")) == ("", 1), (args, line, error)
    assert code in codes, error
    assert "unrecognized arguments" not in error
    return error


def key_from_elsewhere(folder: Path) -> str:
    """A key pair as bt-log's gen-key writes it: nobody can tell whether it has signed anything."""
    signer = btlog.Signer("log.example/a", os.urandom(32))
    (folder / "private.key").write_text(signer.encode())
    (folder / "private.key").chmod(0o600)
    (folder / "public.key").write_text(btlog.encode_vkey(signer.key))
    return btlog.encode_vkey(signer.key)


def test_L2_a_key_that_may_have_signed_begins_a_log_only_with_new(tmp_path: Path) -> None:
    """The folder was mistyped, or its volume is not mounted: the key says that there was a log."""
    vkey, data = key_from_elsewhere(tmp_path), tmp_path / "data"
    args = ("serve", "--storage-dir", "data", "--private-key", "private.key")
    assert "--new" in refused(*args, cwd=tmp_path)
    assert not data.exists()
    assert starts(*args, "--new", cwd=tmp_path) == vkey
    assert starts(*args, cwd=tmp_path) == vkey
    assert re.search("exists|already", refused(*args, "--new", cwd=tmp_path))  # it is for a first start alone
    assert starts(*args, cwd=tmp_path) == vkey
    shutil.rmtree(data)
    data.mkdir()  # where the volume would be
    assert "--new" in refused(*args, cwd=tmp_path)
    assert os.listdir(data) == []
    vkey = key_from_elsewhere(data)
    assert "--new" in refused(*args[:3], cwd=tmp_path)
    assert starts(*args[:3], "--new", cwd=tmp_path) == vkey


def test_L2_a_new_key_begins_one_log_and_no_other(tmp_path: Path) -> None:
    """It is known not to have been used, until it is. A start that fails uses nothing."""
    half = make(tmp_path / "half")  # as a start leaves it that ends behind its keys
    vkey = btlog.encode_vkey(btlog.make_keys("log.example/half", half / "private.key", half / "public.key").key)
    shutil.copy(half / "private.key", tmp_path / "copy.key")
    key = ("--private-key", "half/private.key", "--public-key", "half/public.key")
    assert "--new" in refused("serve", "--storage-dir", "x", "--private-key", "copy.key", cwd=tmp_path)
    assert "is the key of" in refused("serve", "--storage-dir", "y", *key, "--origin", "typo", cwd=tmp_path)
    for _ in range(2):
        assert starts("serve", "--storage-dir", "x", *key, cwd=tmp_path) == vkey
    for folder, *more in ("half",), ("y", *key), ("z", *key):
        assert "--new" in refused("serve", "--storage-dir", folder, *more, cwd=tmp_path)
    assert sorted(os.listdir(half)) == ["private.key", "public.key"]
    assert not (tmp_path / "z").exists()
    assert call_btlog("keygen", "--origin", "a", *of_pair(tmp_path))[0] == 0
    assert starts("serve", "--storage-dir", "w", "--private-key", "private.key", cwd=tmp_path)


def of_pair(folder: Path) -> tuple[str, ...]:
    return "--private-key-path", str(folder / "private.key"), "--public-key-path", str(folder / "public.key")


def test_L2_the_key_of_a_log_begins_no_other(tmp_path: Path) -> None:
    """It was used, whether it is named from elsewhere or its database is gone. No key, no word: one is made."""
    data, args = make(tmp_path / "data"), ("serve", "--storage-dir", "data")
    vkey = starts(*args, "--new", cwd=tmp_path)
    assert starts(*args, cwd=tmp_path) == vkey == (data / "public.key").read_text().strip()
    assert "--new" in refused("serve", "--storage-dir", "x", "--private-key", "data/private.key", cwd=tmp_path)
    for path_ in *data.glob("log.sqlite3*"), data / "public.key":
        assert path_.exists()
        path_.unlink()
        if not (data / "log.sqlite3").exists():
            assert "--new" in refused(*args, cwd=tmp_path)
            assert not (data / "log.sqlite3").exists()
    assert starts(*args, "--new", cwd=tmp_path) == vkey
    assert starts(*args, cwd=tmp_path) == vkey


@pytest.mark.slow
@pytest.mark.parametrize("first", ["private.key", "public.key", "log.sqlite3"])
def test_L2_a_first_start_that_is_killed(tmp_path: Path, first: str) -> None:
    """The next one goes on from it without a word: the key was made for this folder, and has not been used."""
    args, data = ("serve", "--storage-dir", "data"), make(tmp_path / "data")
    command = [sys.executable, str(SOURCE), *args, "--port", "0"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as start:
        while not (data / first).exists() and start.poll() is None:
            time.sleep(0.0005)
        start.kill()
        assert start.communicate()[0] == b"", "it was too late"
    vkey = starts(*args, cwd=tmp_path)
    assert starts(*args, cwd=tmp_path) == vkey == (data / "public.key").read_text().strip()


# --- L3: a full disk -------------------------------------------------------------------------------------------------------


class SmallDisk:
    """A disk that a test fills: a file system of its own, or a limit of what files may have.

    The first fails with ENOSPC, the second with EFBIG, in the middle of a page if need be.
    """

    def __init__(self, folder: Path, mounted: bool) -> None:
        self.folder, self.mounted, self.ballast = folder, mounted, folder / "ballast"

    def fill(self, pid: int, room: int) -> None:
        """Leaves about `room` bytes."""
        if not self.mounted:
            [wal] = [path_.stat().st_size for path_ in self.folder.rglob("*-wal")]
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (max(wal + room - 4096, 0), resource.RLIM_INFINITY))
            return
        with self.ballast.open("ab", buffering=0) as file:
            for size in 65_536, 4096, 1:
                with contextlib.suppress(OSError):
                    while file.write(b"x" * size) == size:
                        pass
        os.truncate(self.ballast, self.ballast.stat().st_size - room)

    def free(self, pid: int) -> None:
        self.ballast.unlink(missing_ok=True)
        if not self.mounted:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


@contextlib.contextmanager
def small_disk(folder: Path, mounted: bool) -> Iterator[SmallDisk]:
    """By mount as root, or with sudo as on a CI's machine."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m,mode=0777", "tmpfs", str(folder)]
    sudos = [[], ["sudo", "-n"]] if mounted else []
    can = (s for s in sudos if shutil.which((s or mount)[0]) and not subprocess.run([*s, *mount], capture_output=True).returncode)
    sudo = next(can, None)
    if mounted and sudo is None:
        pytest.skip("no file system may be mounted here: see the same with a limit of what files may have")
    try:
        yield SmallDisk(folder, mounted)
    finally:
        if sudo is not None:
            subprocess.run([*sudo, "umount", "-l", str(folder)], check=True)


DISKS = {"a limit": False, "a file system": True}


def write_until_full(url: str, observer: Observer, numbers: Iterator[int]) -> None:
    """Adds and bulks until one is not acknowledged: what it then says is that there is no room now."""
    for _ in range(200):
        if observer.add(url, entry(next(numbers))) != 200:
            break
        if observer.bulk(url, [entry(next(numbers)) for _ in range(200)]) != 200:
            break
    status, headers, body = ask(url, "/add", "POST", as_line(entry(next(numbers))))
    assert (status, "retry-after" in headers) == (503, True), body
    assert re.search(rb"full|disk|space|room", body), body
    assert observer.bulk(url, [entry(next(numbers)) for _ in range(200)]) == 503


@pytest.mark.parametrize("disk_", ["a limit", pytest.param("a file system", marks=pytest.mark.slow)])
def test_L3_reads_outlive_a_full_disk(tmp_path: Path, disk_: str) -> None:
    """Writes get 503 as long as it is full and go on by themselves; nothing that was acknowledged is gone."""
    observer, numbers = Observer(), itertools.count()
    args = ("serve", "--storage-dir", str(tmp_path / "disk" / "log"), "--origin", LOG.name, "--add-timeout", "0.2")
    with small_disk(tmp_path / "disk", DISKS[disk_]) as disk, contextlib.ExitStack() as stack:
        server = stack.enter_context(running(*args))
        pid = server.process.pid
        observer.policy = btlog.simple_policy([VerifierKey.parse(server.line.split()[4])])
        for room in 0, 20_000:
            assert observer.bulk(server.url, [entry(next(numbers)) for _ in range(300)]) == 200
            disk.fill(pid, room)
            write_until_full(server.url, observer, numbers)
            assert ask(server.url, "/healthz")[0] == 503
            for _ in range(2):  # however often one tries
                assert observer.add(server.url, entry(next(numbers))) == 503
                assert observer.bulk(server.url, [entry(next(numbers))] * 3) == 503
            seen = observer.hold(server.url)  # all of it is read meanwhile
            assert [ask(server.url, path_)[0] for path_ in ("/entry/0/proof", "/", "/metrics")] == [200] * 3
            disk.free(pid)
            eventually(lambda: ask(server.url, "/healthz")[0] == 200)  # nobody has to ask for anything
            again = entry(next(numbers))
            assert observer.add(server.url, again) == observer.add(server.url, again) == 200
        assert observer.hold(server.url)[: len(seen)] == seen
        for number in signal.SIGTERM, signal.SIGKILL:  # it ends while it is full, one way or the other
            disk.fill(server.process.pid, 0)
            write_until_full(server.url, observer, numbers)
            code, error = server.stop(number)
            assert (code, "Traceback" in error) == (-9 if number == signal.SIGKILL else 0, False), error
            disk.free(os.getpid())
            server = stack.enter_context(running(*args))
            assert observer.add(server.url, entry(next(numbers))) == 200
        observer.hold(server.url)
        assert server.stop()[0] == 0
        assert call_btlog("fsck", "--storage-dir", str(tmp_path / "disk" / "log"))[0] == 0


@pytest.mark.parametrize("disk_", DISKS)
def test_L3_a_witness_outlives_a_full_disk(tmp_path: Path, disk_: str) -> None:
    """It cosigns nothing that it has not stored, shows what it has, and goes on once there is room."""
    args = ("--database-path", str(tmp_path / "disk" / "w.db"), "--log-public-key", key_file(tmp_path))
    name = hashlib.sha256(LOG.name.encode()).hexdigest()
    with small_disk(tmp_path / "disk", DISKS[disk_]) as disk, running("witness", *args) as server:
        pid, size = server.process.pid, 0

        def asks() -> int:
            nonlocal size
            status, _, answer = ask(server.url, "/add-checkpoint", "POST", request_for(size, size + 1))
            size += status == 200
            assert status in (200, 503), answer
            return status

        for room in 0, 4096:
            for _ in range(3):
                assert asks() == 200
            disk.fill(pid, room)
            assert 503 in (asks() for _ in range(80))
            assert [asks() for _ in range(9)] == [503] * 9
            # No cosignature is without its row, and reads go on.
            assert size_of_note(ask(server.url, f"/{name}/checkpoint")[2]) == size
            assert ask(server.url, "/healthz")[0] == 503
            disk.free(pid)
            eventually(lambda: ask(server.url, "/healthz")[0] == 200)
            eventually(lambda: asks() == 200, 5)
        code, error = server.stop()
        assert (code, "Traceback" in error) == (0, False), error


class CommitsFail(Faulty):
    """A commit fails when it is due."""

    def __init__(self, connection: sqlite3.Connection, code: int = sqlite3.SQLITE_IOERR_FSYNC) -> None:
        super().__init__(connection, 0, False)
        self.due, self.failed, self._code = False, 0, code

    def _run(self, run: Callable[..., Any], *args: Any) -> Any:
        if not self.due or args[0] != "COMMIT":
            return run(*args)
        self.due, self.failed = False, self.failed + 1
        error = sqlite3.OperationalError("disk I/O error")
        error.sqlite_errorcode = self._code
        raise error


@pytest.mark.parametrize("code", [sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE], ids=["full", "nothing is written"])
@pytest.mark.parametrize("where", ["log", "log with a witness"])
def test_L3_a_commit_that_finds_no_room(tmp_path: Path, code: int, where: str) -> None:
    """What is on disk is read again before anything is signed: the entry is there once, and the log goes on."""
    with log_in(tmp_path, where, timeout=5) as (log, database):
        policy = UNWITNESSED if where == "log" else POLICY
        assert add(log.url, entry(0))[0] == 200
        database._writer = failing = CommitsFail(database._writer, code)  # type: ignore[assignment]
        for i in range(1, 4):
            failing.due = True
            status, _ = add(log.url, entry(i))
            assert status in (200, 503)
            if status == 503:
                eventually(lambda: ask(log.url, "/healthz")[0] == 200)
            assert (add(log.url, entry(i))[1]["index"], failing.due) == (i, False)
        assert failing.failed == 3
        assert walk(log.url, policy) == [entry(i) for i in range(4)]
        assert ask(log.url, "/healthz")[0] == 200
        assert not log.log.failed.is_set()
        assert findings(log.store) == []


def test_L3_a_disk_that_came_back_with_something_else(tmp_path: Path) -> None:
    """After a failed commit the disk has neither what was signed before nor what was to be: nothing is signed."""
    with contextlib.closing(LocalLog(tmp_path / "log", timeout=0.3)) as log:
        for i in range(3):
            assert add(log.url, entry(i))[0] == 200
        shutil.copytree(tmp_path / "log", tmp_path / "other")
        with contextlib.closing(found(tmp_path / "other")) as other:
            other.append([entry(i, "fork-") for i in range(9)], seal, True)
            note = other.checkpoint("signed")
        real = log.store.database._writer

        class Swapped(CommitsFail):
            def _run(self, run: Callable[..., Any], *args: Any) -> Any:
                try:
                    return super()._run(run, *args)
                except sqlite3.OperationalError:
                    real.execute("ROLLBACK")
                    real.execute("UPDATE checkpoint SET note = ? WHERE kind = 'signed'", (note,))
                    raise

        log.store.database._writer = failing = Swapped(real)  # type: ignore[assignment]
        failing.due = True
        before = ask(log.url, "/checkpoint")[2]
        for i in range(3, 6):
            assert add(log.url, entry(i))[0] == 503
        assert ask(log.url, "/healthz")[0] == 503
        assert ask(log.url, "/checkpoint")[2] == before  # reads go on
        assert len(walk(log.url)) == 3
        assert log.store.checkpoint("signed") == note  # and nothing was signed over it


# --- L4: a clock that was ahead --------------------------------------------------------------------------------------------


def test_L4_a_clock_that_was_once_ahead_is_said(tmp_path: Path) -> None:
    """Cosignatures never go back in time, so they are of the future until the clock is there: somebody has to know."""
    other, size = new_key("log.example/other"), 0

    def time_of(body: bytes) -> int:
        return int.from_bytes(base64.b64decode(cosign(server, body)[2].split()[-1])[4:12], "big")

    def grown() -> bytes:
        nonlocal size
        size += 1
        return request_for(size - 1, size)

    with contextlib.closing(LocalWitness(tmp_path / "w.db", LOG, other.key)) as server:
        assert cosign(server, request_for(0, 2, other))[0] == 200
        for ahead, status in (299, 200), (300, 200), (301, 503), (86_400, 503):
            server.now = 1_000_000.0 + ahead
            assert time_of(grown()) == 1_000_000 + ahead
            assert ask(server.url, "/healthz")[0] == 200  # by its own clock all is well
            server.now = 1_000_000.0
            code, _, body = ask(server.url, "/healthz")
            assert (code, b"clock" in body) == (status, status == 503), (ahead, body)
            assert time_of(grown()) == 1_000_000 + ahead  # it goes on, and never back
        assert time_of(request_for(2, 3, other)) == 1_000_000  # others have nothing to do with it
    with contextlib.closing(LocalWitness(tmp_path / "w.db")) as server:
        assert ask(server.url, "/healthz")[0] == 503  # a start does not make it well
        server.now = 1_000_000.0 + 86_400 - 300
        assert ask(server.url, "/healthz")[0] == 200  # time does


# --- L5: what is held back -------------------------------------------------------------------------------------------------


def test_L5_bad_proofs_of_one_log_hide_no_fork_of_another(tmp_path: Path) -> None:
    """25 of the one were enough. Critical lines are never held back, however many there were of a kind."""
    loud, forked, third = signers = [new_key(f"log.example/{name}") for name in ("loud", "forked", "third")]
    keys = [key_file(tmp_path, btlog.encode_vkey(signer.key)) for signer in signers]

    def use(url: str) -> None:
        def post(*args: Any, **more: Any) -> int:
            return ask(url, "/add-checkpoint", "POST", request_for(*args, **more))[0]

        for signer in signers:
            assert post(0, 5, signer) == 200
        for i in range(40):
            assert post(5, 6 + i, loud, proof=[bytes(32)]) == 422
        assert post(5, 9, third, proof=[bytes(32)]) == 422
        for signer, count in (forked, 3), (loud, 25):
            for i in range(count):
                assert post(5, 5, signer, tag=f"fork{i}") in (409, 422)

    flags = [word for path_ in keys for word in ("--log-public-key", path_)]
    code, _, error = served("witness", *flags, cwd=tmp_path, use=use)
    assert code == 0

    def count(name: str, says: str) -> int:
        return len([line for line in error.splitlines() if f"log.example/{name}" in line and says in line])

    assert [count(name, "two trees of one size") for name in ("loud", "forked")] == [25, 3]
    assert count("third", "does not verify") == 1
    assert count("loud", "does not verify") < 30  # a flood is one


# --- L6: look-ups ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def colliding(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Checksums that share their look-up key. It has 31 bits of a CRC-32, so whoever wants to can make as many."""
    right = btlog.field_hashes

    def one(kind: int, values: Iterable[bytes]) -> list[int]:
        return [7 for _ in values] if kind == btlog.CHECKSUM else right(kind, values)

    monkeypatch.setattr(btlog, "field_hashes", one)
    return [f"sha256:{i:064x}" for i in range(2002)]


def test_L6_a_thousand_collisions_blind_no_checksum(tmp_path: Path, colliding: list[str]) -> None:
    """What is found by a key is compared, and only what is right is counted."""
    *others, target, between = colliding

    def files(name: str, checksums: list[str]) -> list[bytes]:
        return [Entry(f"{name}{i}-1.0-py3-none-any.whl", checksum).encode() for i, checksum in enumerate(checksums)]

    log = files("a", others[:1000]) + files("b", [between]) + files("c", others[1000:]) + files("d", [target] * 3)
    with contextlib.closing(LocalLog(tmp_path / "log")) as server:
        assert bulk(server.url, b"".join(map(as_line, log)))[1][-1]["count"] == 2004
        begun = time.monotonic()
        for checksum, indices in ((between, [1000]), (target, [2001, 2002, 2003]), (others[-1], [2000])):
            answer = json.loads(ask(server.url, f"/entries?checksum={checksum}")[2])
            assert [line["index"] for line in answer["entries"]] == indices
        assert time.monotonic() - begun < 3
    (tmp_path / "requirements.txt").write_text(f"d0==1.0 --hash={target}\n")
    more = ("--public-key", key_file(tmp_path), "--storage-dir", str(tmp_path / "log"))
    assert call_btlog("verify", str(tmp_path / "requirements.txt"), *more)[0] == 0


def test_L6_many_true_ones_among_collisions_are_still_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, colliding: list[str]
) -> None:
    monkeypatch.setattr(btlog, "MAX_FOUND", 40)
    others, target = colliding[:100], colliding[100]
    with contextlib.closing(found(tmp_path / "log")) as store:
        pairs = [Entry(f"{i}.whl", checksum).encode() for i, checksum in enumerate([*others, *[target] * 60, *others])]
        store.append(pairs, seal, True)
        found_ = store.look_up(btlog.CHECKSUM, target.encode(), len(pairs))
        assert [index for index, _ in found_] == list(range(100, 140))
        assert [index for index, _ in store.look_up(btlog.CHECKSUM, others[7].encode(), len(pairs))] == [7, 167]
        assert store.look_up(btlog.CHECKSUM, target.encode(), 100) == []


# --- L7: memory, nohup, a used port ------------------------------------------------------------------------------------------


def test_L7_heads_that_are_remembered_have_a_bound_in_bytes() -> None:
    """4,300 different ones of 99 headers kept 72 MiB."""
    tracemalloc.start()
    try:
        for i in range(450):
            lines = (b"X%d: %d\r\n" % (j, 10**8 + i * 100 + j) for j in range(99))
            head = b"GET /healthz HTTP/1.1\r\n%b\r\n" % b"".join(lines)
            assert len(head) < 2048  # it is of the size that is remembered
            btlog.Handler().read(head)
        assert tracemalloc.get_traced_memory()[0] < 6 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("command", [("serve", "--storage-dir", "data"), ("witness", "--log-public-key", "log.key")])
def test_L7_what_nohup_ignores_stays_ignored(tmp_path: Path, command: tuple[str, ...]) -> None:
    """SIGHUP ends a log and has a witness read its keys again; where it is ignored at the start, it ends neither."""
    (tmp_path / "log.key").write_text(LOG_VKEY)

    def use(url: str) -> None:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.02)
            assert ask(url, "/healthz")[0] == 200

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        starts(*command, cwd=tmp_path, use=use)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup themselves
        if command[0] == "serve":
            with running(*command, cwd=tmp_path) as plain:
                assert plain.stop(signal.SIGHUP)[0] == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_L7_a_port_that_is_used_is_found_before_anything_is_made(tmp_path: Path) -> None:
    """Exit code 3: it may be free again in a moment, and whatever starts services tries again (2 is for good)."""
    (tmp_path / "log.key").write_text(LOG_SKEY)
    (tmp_path / "log.key").chmod(0o600)
    key = ("--private-key", "log.key")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for args in (
            ("serve",), ("serve", "--storage-dir", "a/b"), ("serve", "--new", *key),
            ("witness",), ("witness", "--database-path", "w.db"), ("witness", *key),
        ):  # fmt: skip
            assert port in refused(*args, cwd=tmp_path, codes=(3,), port=port)
            assert os.listdir(tmp_path) == ["log.key"]  # so that the next start still is the first
    refused("serve", cwd=tmp_path, port="70000")


def test_L7_starts_on_one_port_at_once(tmp_path: Path) -> None:
    """One of them serves. The others end with exit code 3 and a line, also where they had bound the port before."""
    words = [sys.executable, str(SOURCE), "serve", "--port", str(free_port()), "--storage-dir"]
    pipes: dict[str, Any] = {"cwd": tmp_path, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    runs = [subprocess.Popen([*words, f"{i}"], **pipes) for i in range(4)]
    try:
        eventually(lambda: sum(run.poll() is not None for run in runs) == 3)
    finally:
        for run in runs:
            if run.poll() is None:
                run.terminate()
        said = [run.communicate(timeout=15)[1] for run in runs]
    assert sorted(run.returncode for run in runs) == [0, 3, 3, 3], said
    assert "Traceback" not in "".join(said), said


# --- L8: what an export deletes, and where drafts lead -----------------------------------------------------------------


def old_folder(path_: Path) -> Path:
    """Something of somebody else's, as old as what an export deletes: `NAME.p` with a file in it, beside `NAME`."""
    path_.mkdir(parents=True)
    (path_ / "1").write_text("precious")
    full = path_.with_name(path_.name.removesuffix(".p"))
    full.write_text("full")
    for each in path_, path_ / "1", full:
        os.utime(each, (1, 1))
    return path_


def test_L8_export_deletes_only_partial_tiles_of_its_own(tmp_path: Path) -> None:
    """Whatever .partials names, and wherever links lead. What a killed export left is in nobody's way."""
    with contextlib.closing(found(tmp_path / "log")) as store:
        fill(store, 300)
    out = tmp_path / "out"
    args = ("export", str(out), "--storage-dir", str(tmp_path / "log"))
    assert call_btlog(*args)[0] == 0
    victims = {
        "../victim.p": tmp_path / "victim.p",
        str(tmp_path / "absolute.p"): tmp_path / "absolute.p",
        "tile/../../dots.p": tmp_path / "dots.p",
        "tile/0/../../../more.p": tmp_path / "more.p",
        "tile//0/002.p": out / "tile" / "0" / "002.p",
        "tile/3/000.p": tmp_path / "linked" / "000.p",
        "tile/4/000.p": tmp_path / "leaf" / "000.p",
    }
    here = ("here.p", "tile/notes.p", "tile/0/thesis.p", "tile/0/0123.p", "tile/64/000.p", "tile/0/x00/000.p")
    victims |= {f"./{name}" if "/" not in name else name: out / name for name in here}
    victims["tile/0/003"] = out / "tile" / "0" / "003.p"
    for victim in victims.values():
        old_folder(victim)
    (out / "tile" / "3").symlink_to(tmp_path / "linked", target_is_directory=True)
    (out / "tile" / "4").mkdir()
    (out / "tile" / "4" / "000").write_text("full")
    os.utime(out / "tile" / "4" / "000", (1, 1))
    (out / "tile" / "4" / "000.p").symlink_to(tmp_path / "leaf" / "000.p", target_is_directory=True)
    own = old_folder(out / "tile" / "5" / "000.p")  # and this is one, from when the log was smaller
    more = ["", ".", "..", "/", "tile", "tile/0", "checkpoint", "\0", "é.p", "tile/0/000.p/1", "\udcff.p"]
    (out / ".partials").write_bytes("\n".join([*victims, "tile/5/000.p", *more]).encode("utf-8", "surrogateescape"))
    (out / ".draft").write_text("half")
    with contextlib.closing(found(tmp_path / "log")) as store:
        fill(store, 30)
    code, _, error = call_btlog(*args)
    assert (code, "Traceback" in error) == (0, False), error
    assert [name for name, victim in victims.items() if (victim / "1").read_text() != "precious"] == []
    assert not own.exists()
    assert open_checkpoint((out / "checkpoint").read_bytes(), UNWITNESSED).tree.size == 330
    assert (out / "tile" / "0" / "000").exists()


@pytest.mark.parametrize("link", [os.symlink, os.link], ids=["a symbolic link", "a hard link"])
def test_L8_drafts_lead_nowhere(tmp_path: Path, link: Callable[[Path, Path], None]) -> None:
    """In a folder that others can write to, a name that can be guessed may be a link to something of ours."""
    victim, shared, file = tmp_path / "victim", make(tmp_path / "shared"), wheel(tmp_path / "file.whl")
    (shared / "out" / "tile").mkdir(parents=True)
    victim.write_bytes(b"precious")
    pid = os.getpid()  # drafts had it in their names

    def guess(*names_: str) -> None:
        for name in names_:
            if not os.path.lexists(shared / name):
                link(victim, shared / name)

    def works(*args: str) -> None:
        code, _, error = call_btlog(*args)
        assert code == 0, error
        assert victim.read_bytes() == b"precious"

    with contextlib.closing(LocalLog(tmp_path / "log")) as log:
        for command in ("add", str(file), "--proof-dir"), ("verify", str(file), "--save-proofs"):
            guess(f".{pid}.new", f".file.whl.tlog-proof.{pid}.new")
            works(*command, str(shared), "--log-url", log.url, "--public-key", key_file(tmp_path))
        assert (shared / "file.whl.tlog-proof").read_bytes().startswith(b"c2sp.org/tlog-proof@v1\n")
        assert not (shared / "file.whl.tlog-proof").is_symlink()
    guess("out/.draft", "out/.partials.new", "out/.checkpoint.new")
    works("export", str(shared / "out"), "--storage-dir", str(tmp_path / "log"))
    assert open_checkpoint((shared / "out" / "checkpoint").read_bytes(), UNWITNESSED).tree.size == 1
    guess(f".private.key.{pid}.new", f".public.key.{pid}.new")
    works("keygen", "--origin", "log.example/a", *of_pair(shared))  # no guess keeps it from working
    assert (shared / "private.key").stat().st_mode & 0o777 == 0o600


# --- L9: the interval between rounds -----------------------------------------------------------------------------------


def drive(url: str, clients: int, seconds: float, tag: str) -> list[float]:
    """Adds by so many clients at once, each over a connection of its own; the seconds that each of them took."""
    numbers, times, until = itertools.count(), list[float](), time.perf_counter() + seconds

    def work(client: int) -> None:
        with contextlib.closing(http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)) as connection:
            while (begun := time.perf_counter()) < until:
                connection.request("POST", "/add", as_line(entry(next(numbers), tag)))
                answer = connection.getresponse()
                assert (answer.status, answer.read() == b"") == (200, False)
                times.append(time.perf_counter() - begun)

    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        list(pool.map(work, range(clients)))
    return times


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def test_L9_batches_grow_with_what_a_round_takes(tmp_path: Path) -> None:
    """A lone add is asked for at once, also right behind another: it took 200 ms. 64 clients share a round as one."""
    slow = LyingWitness(always(lambda liar, request: slowly(liar, 0.03, liar.honest(request))))
    key = btlog.as_witness(slow.signer.key)
    policy = Policy((LOG,), (key,), Quorum(1, (key,)), ((key, slow.url),))
    with contextlib.closing(slow), contextlib.closing(LocalLog(tmp_path / "log", policy=policy)) as log:
        slow.log_url = log.url
        drive(log.url, 1, 0.1, "warm-")
        asked = len(slow.seen)
        times = drive(log.url, 1, 0.6, "lone-")
        assert median(times) < 0.1
        assert len(slow.seen) - asked <= len(times) + 2  # one request to the witness for each, no more
        asked = len(slow.seen)
        times = drive(log.url, 64, 0.6, "many-")
        assert median(times) < 0.3  # it waits for the round that runs, and for its own
        assert len(times) / (len(slow.seen) - asked) > 20
        assert walk(log.url, policy)


# --- L10, and what else comes from bt-log ------------------------------------------------------------------------------

BT_LOG_TABLE = """
    CREATE TABLE IF NOT EXISTS tlog (
        origin VARCHAR(255) PRIMARY KEY,
        public_key TEXT NOT NULL, -- note verifier format
        tree_size INTEGER NOT NULL,
        tree_hash TEXT NOT NULL -- base64-encoded
    )
"""  # cmd/witness-server/main.go of trailofbits/bt-log


def bt_log_witness(path_: Path, *rows: tuple[str, str, Any, str], journal: str = "delete") -> Path:
    """The database of a bt-log witness, as its witness-add-key and witness-server make it."""
    with contextlib.closing(sqlite3.connect(path_, isolation_level=None)) as db:
        db.execute(f"PRAGMA journal_mode = {journal}")
        db.execute(BT_LOG_TABLE)
        db.executemany("INSERT INTO tlog VALUES (?, ?, ?, ?)", rows)
    return path_


def bt_log_row(signer: btlog.Signer, size: int, newline: str = "") -> tuple[str, str, int, str]:
    root = root_of([b"entry %d" % i for i in range(size)])
    return signer.name, btlog.encode_vkey(signer.key) + newline, size, b64(root)


def witness_key(folder: Path) -> tuple[str, str]:
    (folder / "w.key").write_text(WITNESS_SKEY)
    (folder / "w.key").chmod(0o600)
    return "--private-key", "w.key"


def posted(url: str, *args: Any, **more: Any) -> tuple[int, bytes]:
    """What a witness answers to a request for a cosignature."""
    return ask(url, "/add-checkpoint", "POST", request_for(*args, **more))[::2]


def knows(*sizes: tuple[btlog.Signer, int]) -> Callable[[str], None]:
    """What to ask a witness that has cosigned these logs at these sizes."""

    def use(url: str) -> None:
        for signer, size in sizes:
            assert posted(url, 0, 9, signer) == (409, b"%d\n" % size)

    return use


def test_L10_a_database_of_0_bytes_is_a_new_one(tmp_path: Path) -> None:
    """As `sqlite3 -line witness.db '.database'` makes it, by bt-log's README."""
    (tmp_path / "witness.db").write_bytes(b"")

    def use(url: str) -> None:
        assert posted(url, 0, 5)[0] == 200

    vkey = starts("witness", "--log-public-key", key_file(tmp_path), cwd=tmp_path, use=use)
    assert (tmp_path / "witness-public.key").read_text().strip() == vkey
    assert starts("witness", cwd=tmp_path, use=knows((SIGNER, 5))) == vkey
    args = ("witness", "--database-path", "x.db", *witness_key(tmp_path))
    for data in b"\0", b"\0" * 4096, b"SQLite format 3\0":  # what has something in it is not taken for empty
        (tmp_path / "x.db").write_bytes(data)
        refused(*args, cwd=tmp_path, codes=(2, 3))
        assert (tmp_path / "x.db").read_bytes() == data
    (tmp_path / "x.db").write_bytes(b"")
    assert starts(*args, cwd=tmp_path)  # with a key of its own it is a new one as well
    assert (tmp_path / "x.db").stat().st_size > 0


@pytest.mark.parametrize("journal", ["delete", "wal"])
def test_a_witness_of_bt_log_is_taken_over(tmp_path: Path, journal: str) -> None:
    """Its logs with their sizes, so that its key can go on: what it has cosigned it will not contradict."""
    a, b, c = (new_key(f"log.example/{name}") for name in "abc")
    bt_log_witness(tmp_path / "bt.db", bt_log_row(a, 5), bt_log_row(b, 0, "\n"), bt_log_row(c, 300), journal=journal)
    before = (tmp_path / "bt.db").read_bytes()
    args = ("witness", *witness_key(tmp_path))

    def use(url: str) -> None:
        path_ = f"/{hashlib.sha256(a.name.encode()).hexdigest()}/checkpoint"
        assert posted(url, 0, 9, a) == (409, b"5\n")
        assert posted(url, 5, 5, a, tag="fork")[0] in (409, 422)
        assert posted(url, 5, 9, a, proof=[bytes(32)])[0] == 422
        assert ask(url, path_)[0] == 404  # it never had a note of it to show
        assert ask(url, "/healthz")[0] == ask(url, "/metrics")[0] == 200
        status, answer = posted(url, 5, 9, a)
        assert status == 200
        note = request_for(5, 9, a).partition(b"\n\n")[2] + answer
        assert open_checkpoint(note, btlog.simple_policy([a.key], [WITNESS])).tree.size == 9
        assert size_of_note(ask(url, path_)[2]) == 9
        assert posted(url, 0, 4, b)[0] == 200
        assert posted(url, 300, 300, c)[0] == 200  # the same again
        assert posted(url, 299, 301, c) == (409, b"300\n")
        assert posted(url, 0, 1, new_key("log.example/unknown"))[0] == 404

    code, line, error = served(*args, "--import", "bt.db", cwd=tmp_path, use=use)
    assert (code, "of 3 logs" in line) == (0, True), error
    assert (tmp_path / "bt.db").read_bytes() == before
    starts(*args, cwd=tmp_path, use=knows((a, 9)))  # from now on without it
    starts(*args, "--import", "bt.db", cwd=tmp_path, use=knows((a, 9), (b, 4)))  # again: no size falls


def test_an_import_that_contradicts_what_was_cosigned_is_refused(tmp_path: Path) -> None:
    args, forked = ("witness", *witness_key(tmp_path)), (A.name, btlog.encode_vkey(A.key), 5, b64(bytes(32)))
    for name, row in {"bt.db": bt_log_row(A, 5), "fork.db": forked, "ahead.db": bt_log_row(A, 20)}.items():
        bt_log_witness(tmp_path / name, row)

    def use(url: str) -> None:
        assert posted(url, 5, 9, A)[0] == 200

    assert starts(*args, "--import", "bt.db", cwd=tmp_path)
    error = refused(*args, "--import", "fork.db", cwd=tmp_path, codes=(1, 2, 3))
    assert A.name in error or "fork.db" in error
    starts(*args, cwd=tmp_path, use=use)
    starts(*args, "--import", "ahead.db", cwd=tmp_path, use=knows((A, 20)))  # it went on cosigning elsewhere


A = new_key("log.example/a")
A_VKEY = btlog.encode_vkey(A.key)
ZEROS = b64(bytes(32))
NO_WITNESS: dict[str, Callable[[Path], Any] | list[tuple[str, str, Any, str]]] = {
    "nothing": lambda path_: None,
    "0 bytes": lambda path_: path_.write_bytes(b""),
    "garbage": lambda path_: path_.write_bytes(b"garbage" * 1000),
    "a folder": lambda path_: path_.mkdir(),
    "ours": lambda path_: btlog.WitnessStore(path_).close(),
    "vkey": [(A.name, "garbage", 5, ZEROS)],
    "origin": [("log.example\n/b", A_VKEY, 5, ZEROS)],
    "negative": [(A.name, A_VKEY, -1, ZEROS)],
    "no number": [(A.name, A_VKEY, "x", ZEROS)],
    "short": [(A.name, A_VKEY, 5, b64(bytes(31)))],
    "no hash": [(A.name, A_VKEY, 5, "")],
    "empty": [(A.name, A_VKEY, 0, ZEROS)],  # no empty tree's
    "the second": [bt_log_row(new_key("log.example/good"), 5), (A.name, A_VKEY, 5, "?")],
    "own name": [(WITNESS.name, btlog.encode_vkey(new_key(WITNESS.name).key), 0, b64(root_of([])))],
}


@pytest.mark.parametrize("kind", NO_WITNESS)
def test_what_is_no_database_of_a_bt_log_witness(tmp_path: Path, kind: str) -> None:
    """One line, and all of it or nothing is taken over."""
    what = NO_WITNESS[kind]
    if isinstance(what, list):
        bt_log_witness(tmp_path / "bt.db", *what)
    else:
        what(tmp_path / "bt.db")
    error = refused("witness", "--import", "bt.db", *witness_key(tmp_path), cwd=tmp_path, codes=(2, 3))
    assert "bt.db" in error or "log.example" in error or WITNESS.name in error
    if (tmp_path / "witness.db").exists():
        with contextlib.closing(btlog.WitnessStore(tmp_path / "witness.db")) as store:
            assert store.logs() == {}


def test_flags_of_bt_log_are_taken(tmp_path: Path) -> None:
    """--bulk-append-publish-timeout is a time-out; --bulk-append-workers has no effect here, and that is said."""

    def use(url: str) -> None:
        begun = time.monotonic()
        assert bulk(url, as_line(entry(0)))[0] == 503
        assert 0.2 < time.monotonic() - begun < 0.9
        begun = time.monotonic()
        assert add(url, entry(1))[0] == 503
        assert 0.9 < time.monotonic() - begun < 3

    def use_again(url: str) -> None:
        assert bulk(url, as_line(entry(0)))[0] == 200

    with silent_server() as silent:
        asks = ("--witness-url", silent, "--witness-public-key", key_file(tmp_path, WITNESS_VKEY), "--witness-timeout", "0.2")
        flags = ("--bulk-append-workers", "8192", "--bulk-append-publish-timeout=300ms", "--add-timeout", "1")
        code, _, error = served("serve", *asks, *flags, "--bulk-append-max-entries=50000", cwd=tmp_path, use=use)
        assert code == 0
        assert [line for line in error.splitlines() if "--bulk-append-workers" in line and "no effect" in line]
    code, _, error = served("serve", "--bulk-append-publish-timeout", "1m30s", cwd=tmp_path, use=use_again)
    assert (code, "--bulk-append-workers" in error) == (0, False)  # who does not give it hears nothing of it
    for flag, value in (("--bulk-append-publish-timeout", "x"), ("--bulk-append-workers", "-1")):
        refused("serve", flag, value, cwd=tmp_path)


# --- L11: what is left open ----------------------------------------------------------------------------------------------


def test_L11_a_process_that_ends_leaves_nothing_open(tmp_path: Path) -> None:
    """Sockets of connections in any state are closed by the server, not by whoever collects the garbage."""
    words = [sys.executable, "-X", "dev", "-W", "always", str(SOURCE), "serve", "--storage-dir", "log", "--port", "0"]
    with (
        subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server,
        contextlib.ExitStack() as stack,
    ):
        try:
            assert server.stdout
            port = int(server.stdout.readline().split()[0].rpartition(":")[2])
            body = b"".join(as_line(entry(i)) for i in range(600))
            head = b"POST /admin/bulk/append HTTP/1.0\r\nContent-Type: application/x-ndjson\r\nContent-Length: %d\r\n\r\n"
            assert b'"complete"' in raw(port, head % len(body) + body)
            for data in (
                b"",
                b"GET /",
                b"POST /add HTTP/1.1\r\nContent-Length: 1000\r\n\r\n{",
                b"GET /tile/entries/000 HTTP/1.1\r\n\r\n" * 2000,  # and none of it is read
                b"GET / HTTP/1.0\r\n\r\n",
                b"garbage\r\n\r\n",
                b"GET /healthz HTTP/1.1\r\n\r\n",
            ):
                connection = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
                connection.sendall(data)
            assert connection.recv(100).startswith(b"HTTP/1.1 200 ")
            server.send_signal(signal.SIGTERM)
            assert server.wait(15) == 0
        finally:
            server.kill()
            error = server.communicate()[1]
    assert "Warning" not in error, error


UNLOGGED = "quiet7-9999-py3-none-any.whl"
LIMIT = 250  # MiB that a monitor or an ingest may hold, whatever it is served
JSON_PAGE = "application/vnd.pypi.simple.v1+json"
HtmlOrJson = tuple[int, dict[str, str], bytes]  # status, headers and body of an answer


class Served(Web):
    """A web server whose answers, headers included, a test makes."""

    def __init__(self, answer: Callable[[str], HtmlOrJson]) -> None:
        super().__init__(Path())
        self.answer, self.origin, self.over = answer, self.url, threading.Event()
        served = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version, disable_nagle_algorithm, timeout = "HTTP/1.1", True, 20

            def log_message(self, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                served.asked.append(self.path)
                status, headers, body = served.answer(self.path)
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

        self._server.RequestHandlerClass = Handler

    def close(self) -> None:
        self.over.set()  # lets go of the answers that are held
        super().close()


def fold(hashes: list[bytes]) -> bytes:
    """RFC 6962's tree hash over hashes of complete subtrees of one size."""
    if len(hashes) == 1:
        return hashes[0]
    k = k_of(len(hashes))
    return node_hash(fold(hashes[:k]), fold(hashes[k:]))


class SyntheticLog(Served):
    """A log of `count` bundles, at most 255, which `bundle` makes when they are asked for; zipped ones are all alike.

    What `held` says of a bundle's number is answered only when the server ends.
    """

    def __init__(self, count: int, bundle: Callable[[int], list[bytes]], zipped: bool = False) -> None:
        hashes = [[leaf_hash(entry) for entry in bundle(n)] for n in range(count)]
        roots = [fold(leaves) for leaves in hashes]
        self.held: Callable[[int], bool] = lambda n: False
        zip_ = gzip.compress(btlog.encode_bundle(bundle(0)), 1) if zipped else b""
        note = seal(Tree(256 * count, fold(roots)))

        def answer(path: str) -> HtmlOrJson:
            if path == "/checkpoint":
                return 200, {"Content-Type": "text/plain; charset=utf-8"}, note
            level, index, width = btlog.parse_tile_path(path[1:])
            if level is not None:
                return 200, {}, b"".join((hashes[index] if level == 0 else roots)[:width])
            if self.held(index):
                self.over.wait(60)
            return (200, {"Content-Encoding": "gzip"}, zip_) if zipped else (200, {}, btlog.encode_bundle(bundle(index)))

        super().__init__(answer)


def test_a_synthetic_log_is_one(tmp_path: Path) -> None:
    """Its root is that of its entries, by RFC 6962's definition and by fsck."""
    with contextlib.closing(SyntheticLog(3, lambda n: [quiet(256 * n + i) for i in range(256)])) as log_:
        assert monitor(log_.url, tmp_path / "mirror").code == 0
    assert call_btlog("fsck", "--storage-dir", str(tmp_path / "mirror"))[0] == 0
    mirrored(tmp_path / "mirror", [quiet(i) for i in range(768)])


def measured(*args: str) -> tuple[float, int, list[str], str]:
    """Runs a command within LIMIT: its CPU seconds, its exit code, its lines, and what it said on stderr."""

    def spent() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    peak, until, before = 0.0, time.monotonic() + 300, spent()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as error:
        run = subprocess.Popen([sys.executable, str(SOURCE), *args], stdout=out, stderr=error)
        try:
            while run.poll() is None:
                with contextlib.suppress(IndexError, OSError):  # it ends
                    peak = max(peak, peak_memory(run.pid))
                assert time.monotonic() < until
                time.sleep(0.003)
        finally:
            run.kill()
            run.wait()
        out.seek(0)
        error.seek(0)
        said = error.read().decode()
        print(f"{peak:.0f} MiB, {spent() - before:.1f} s")
        assert 0 < peak < LIMIT, f"{peak:.0f} MiB"
        assert "Traceback" not in said
        return spent() - before, run.returncode, out.read().decode().splitlines(), said


def told(lines: Iterable[str], kind: str = "") -> list[dict[str, Any]]:
    """The findings in lines of JSON, all or those of a kind."""
    values = [json.loads(line) for line in lines]
    return [value for value in values if (value.get("kind") == kind if kind else "kind" in value)]


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


# --- M1: when findings are told ------------------------------------------------------------------------------------------


def test_the_journal_of_a_mirror_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(btlog, "MAX_WAL", 1 << 18)
    monkeypatch.setattr(btlog.Monitor, "BATCH", 512)
    with (
        contextlib.closing(StaticLog(tmp_path / "static", 8000)) as log,
        contextlib.closing(btlog.LogReader(log.web.url)) as source,
        contextlib.closing(btlog.MirrorStore(make(tmp_path / "mirror"))) as store,
    ):
        follower = btlog.Monitor(store, source, btlog.simple_policy([LOG]), btlog.WatchList())
        assert follower.round(lambda done, total: None, time.time)
        assert store.tree("signed").size == 8000
        assert (tmp_path / "mirror" / "log.sqlite3-wal").stat().st_size < 1 << 20 < store.database.path.stat().st_size


def test_M1_findings_are_told_as_they_are_stored(tmp_path: Path) -> None:
    """After each batch, in a round without end; the exit code of a run that is ended says if there was something."""
    common = [named_entry(f"same{i}-1.0-py3-none-any.whl") for i in range(256)]
    batch = btlog.Monitor.BATCH // 256  # bundles
    log_ = SyntheticLog(2 * batch - 1, lambda n: [b"no entry %d" % n, *common[1:]] if n in (3, batch + 5) else common)
    args = monitor_args(log_.url, tmp_path / "mirror")
    with contextlib.closing(log_):
        log_.held = lambda n: n >= batch  # the first batch can be had, and no more
        with process(*args) as run:
            assert "no entry 3" in run.printed("bad-entry")
            assert run.stop() == (1, ""), run.lines
        log_.held = lambda n: False
        with process(*args, "--follow") as run:  # it goes on where it was, and tells nothing twice
            assert f"no entry {batch + 5}" in run.printed("bad-entry")
            assert run.stop(signal.SIGINT)[0] == 1
            assert len(told(run.lines)) == 1


@pytest.mark.parametrize(("words", "kind"), [((), "bad-entry"), (("--filename-regex", "^quiet5-15-"), "match")])
def test_M1_M6_what_is_still_untold(
    tmp_path: Path, static: StaticLog, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], kind: str
) -> None:
    """Ended between storing and telling: exit 1, and the next run tells it. A search needs no log, but says that."""
    try_only(monkeypatch, 1)
    args = (static.web.url, tmp_path / "mirror")
    assert monitor(*args).code == 0
    static.grow(*([] if words else [b"no entry"]))

    def stop(*args: Any, **more: Any) -> None:
        raise btlog.Stopped("somebody asks it to end")

    with monkeypatch.context() as patch:
        patch.setattr(btlog.Reporter, "__call__", stop)
        seen = monitor(*args, *words)
        assert (seen.code, seen.kinds) == (1, [])
    static.web.instead = lambda path_: (503, "text/plain", b"")
    seen = monitor(*args, *words)
    assert (seen.code, seen.kinds, "503" in seen.error) == (1, [kind], True)
    static.web.instead = lambda path_: None
    assert monitor(*args, *words).code == 0


def test_M1_what_an_index_has_and_the_log_has_not_is_told_soon(
    tmp_path: Path, static: StaticLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the entries that it was compared with, and not behind all others: an index can be slow for hours."""
    monkeypatch.setattr(btlog.Comparison, "CHUNK", 30)
    static.grow(*project_entries(100))
    evidence: list[int] = []
    with contextlib.closing(FakeIndex(tmp_path, index_of([*static.entries, named_entry("many0-2.0.zip")]))) as index:
        right = index.instead

        def instead(path_: str) -> Answered | None:
            if path_ == "/many99/":
                evidence.append(len(list((tmp_path / "mirror").glob("evidence/not-logged-*"))))
            return right(path_)

        index.instead = instead
        seen = monitor(static.web.url, tmp_path / "mirror", "--index-url", index.url)
    assert (seen.code, seen.kinds, evidence) == (1, ["not-logged"], [1])


# --- M2: what a hostile log costs in memory ------------------------------------------------------------------------------


def hostile(kind: str, count: int) -> SyntheticLog:
    """So many bundles of 16 MiB each: of entries as large as they may be, 65,535 bytes."""

    def bundle(n: int) -> list[bytes]:
        entries = []
        for i in range(256):
            who = Publisher("https://issuer.example", f"{n} {i}x" if kind == "publishers" else "x")
            base = Entry(f"wide-{n:03}.{i:03}-py3-none-any.whl", SUM, who).encode()
            entries.append(base + b"x" * (btlog.MAX_ENTRY - len(base)))
        return entries

    if kind in ("names", "publishers"):
        return SyntheticLog(count, bundle)
    common = {"the same names, zipped": bundle(0), "one name, zipped": bundle(0)[:1] * 256}[kind]
    return SyntheticLog(count, lambda n: common, zipped=True)


@pytest.mark.parametrize(("kind", "count"), [
    ("the same names, zipped", 6), pytest.param("names", 8, marks=pytest.mark.slow),
    pytest.param("one name, zipped", 8, marks=pytest.mark.slow), pytest.param("publishers", 6, marks=pytest.mark.slow),
])  # fmt: skip
def test_M2_a_log_of_wide_entries(tmp_path: Path, kind: str, count: int) -> None:
    """Read-ahead is bounded by bytes, as is the look-up of earlier entries that have a name, and of publishers."""
    with contextlib.closing(hostile(kind, count)) as log_:
        _, code, lines, error = measured(*monitor_args(log_.url, tmp_path / "mirror"))
    kinds = {line["kind"] for line in told(lines)}
    assert (code, kinds) == ((1, {"publisher"}) if kind == "publishers" else (0, set()))
    assert all("no more evidence is kept" in line for line in error.splitlines())
    assert stored_size(tmp_path / "mirror") == 256 * count
    assert size_of(tmp_path / "mirror" / "evidence") <= 256 << 20
    shutil.rmtree(tmp_path / "mirror")


def test_M2_a_checkpoint_that_is_a_bomb(tmp_path: Path) -> None:
    """64 KiB of gzip, and 64 MiB of checkpoint: neither is held, nor kept as evidence in full each time."""
    zipped = gzip.compress(b"x" * ((1 << 26) - 3) + b"\n\n\n", 9)
    with contextlib.closing(Served(lambda path: (200, {"Content-Encoding": "gzip"}, zipped))) as log_:
        _, code, lines, _ = measured(*monitor_args(log_.url, tmp_path / "mirror"))
    assert code in (1, 3)  # a false checkpoint, or none that can be read
    assert {line["kind"] for line in told(lines)} <= {"bad-signature"}
    assert size_of(tmp_path / "mirror") < 2 * btlog.MAX_NOTE


@pytest.mark.parametrize("others", [0, 255])
def test_M2_a_bounded_look_up_overlooks_nothing(tmp_path: Path, others: int) -> None:
    """However often a name was logged before, another checksum for it is found."""
    name = "same-1.0-py3-none-any.whl"
    common = [named_entry(name, "a"), *(named_entry(f"other-{i}-py3-none-any.whl") for i in range(others))]
    bundle = (common * 256)[:256]
    last = [*bundle[:-1], named_entry(name, "b")]
    with contextlib.closing(SyntheticLog(12, lambda n: last if n == 11 else bundle)) as log_:
        seen = monitor(log_.url, tmp_path / "mirror")
    assert (seen.code, seen.kinds) == (1, ["replaced"])
    assert all(text in seen.texts[0] for text in ("at index 0,", "at index 3071", SUM_OF_A))


NAMESAKES = ["demo1000-1.0.tar.gz", "demo6580-1.0.tar.gz"]


@pytest.mark.parametrize("names", [NAMESAKES, NAMESAKES[::-1]])
def test_M2_names_that_share_a_hash_hide_no_replaced_file(tmp_path: Path, static: StaticLog, names: list[str]) -> None:
    assert len(set(btlog.field_hashes(btlog.FILENAME, [name.encode() for name in names]))) == 1
    static.grow(*map(named_entry, names), b"#" * 93 + b"bad-1.0.tar.gz", named_entry("bad-1.0.tar.gz"))
    assert monitor(static.web.url, tmp_path / "mirror").kinds == ["bad-entry"]
    static.grow(named_entry(names[0], "c"), named_entry(names[1], "b"), named_entry("bad-1.0.tar.gz", "b"))
    seen = monitor(static.web.url, tmp_path / "mirror")
    assert (seen.code, seen.kinds) == (1, ["replaced"] * 3)


# --- M3: a file that is logged with a publisher ------------------------------------------------------------------------------


def append_anyway(store: btlog.LogStore, entries: list[bytes]) -> None:
    """Adds entries to a log as they are, also those that our own log would not add."""

    def finish(db: sqlite3.Connection, tree: Tree, grown: Any) -> None:
        rows = [(kind, seal(tree)) for kind in ("signed", "published")]
        db.executemany("INSERT OR REPLACE INTO checkpoint VALUES (?, ?)", rows)

    store._append(entries, lambda db, size, new, names, known: ([], new), finish)


def logged_anyway(folder: Path, *entries: bytes) -> None:
    """The same for the log in `folder`."""
    with contextlib.closing(found(folder)) as store:
        append_anyway(store, list(entries))


def of_file(path_: Path, publisher: Publisher | None = None) -> bytes:
    return Entry(path_.name, btlog.checksum_of(path_), publisher).encode()


def summary(*counts: int) -> str:
    """What `ingest` says at its end."""
    return "{} projects: {} files logged, {} were logged already, {} conflicts, {} failed\n".format(*counts)


def test_M3_who_knows_no_publisher_logs_no_file_twice(tmp_path: Path, log: LocalLog) -> None:
    """An index adds nothing to what a publisher has logged. The proof that `add` keeps also holds for a pin."""
    file = wheel(tmp_path / "demo-1.0-py3-none-any.whl")
    signed = of_file(file, PUBLISHER)
    assert add(log.url, signed)[0] == 200
    with contextlib.closing(FakeIndex(tmp_path, index_of([signed]))) as index:
        for _ in range(2):
            assert ingest(log.url, index, tmp_path) == (0, summary(1, 0, 1, 0, 0), "")
    key = ("--public-key", key_file(tmp_path))
    code, text, error = call_btlog("add", str(file), "--log-url", log.url, *key)
    assert (code, error, "logged at index 0" in text) == (0, "", True)
    pin_ = ("--publisher-subject", re.escape(PUBLISHER.subject))
    assert call_btlog("verify", str(file), *key, *pin_)[0] == 0  # by the .tlog-proof beside it
    assert walk(log.url) == [signed]


def test_M3_the_log_answers_with_the_entry_that_has_a_publisher(log: LocalLog) -> None:
    plain, by_one, by_other = (named_entry("demo-1.0-py3-none-any.whl", "a", who) for who in (None, PUBLISHER, ANOTHER))
    assert acknowledged(by_one, add(log.url, by_one)[1]) == 0
    assert acknowledged(by_one, add(log.url, plain)[1]) == 0  # the proof is that of the entry that is logged
    assert acknowledged(by_other, add(log.url, by_other)[1]) == 1  # another publisher is another claim
    assert add(log.url, plain)[1]["index"] == 0  # the first
    assert add(log.url, other_sum(plain))[0] == 409
    early, late = (named_entry("demo-1.1.tar.gz", "b", who) for who in (None, PUBLISHER))
    status, lines = bulk(log.url, b"".join(map(as_line, (plain, by_other, early, late))))
    # A line without a publisher says something new only before one that has it.
    assert (status, [line["result"]["index"] for line in lines[1:-1]]) == (200, [0, 1, 2, 3])
    assert add(log.url, early)[1]["index"] == 2  # an equal entry again has the same index, always
    signed, plain_ = (named_entry("demo-1.2.tar.gz", "c", who) for who in (PUBLISHER, None))
    lines = bulk(log.url, as_line(signed) + as_line(plain_))[1]
    assert [line["result"]["index"] for line in lines[1:-1]] == [4, 4]
    assert walk(log.url) == [by_one, by_other, early, late, signed]


ELSEWHERE = Publisher("https://elsewhere.example", PUBLISHER.subject)


@pytest.mark.parametrize("where", ["log", "static tree", "folder"])
@pytest.mark.parametrize(
    "publishers", [(PUBLISHER, None), (None, PUBLISHER), (PUBLISHER, ANOTHER), (ANOTHER, None, PUBLISHER), (ELSEWHERE, ANOTHER)]
)
def test_M3_a_pin_considers_all_entries_of_a_file(
    tmp_path: Path, publishers: tuple[Publisher | None, ...], where: str
) -> None:
    """One that satisfies the pin suffices, wherever it is; not the issuer of one and the subject of another."""
    file = wheel(tmp_path / "demo-1.0-py3-none-any.whl")
    logged_anyway(tmp_path / "log", *(of_file(file, who) for who in publishers))
    with contextlib.ExitStack() as stack:
        at = ("--storage-dir", str(tmp_path / "log"))
        if where == "log":
            at = ("--log-url", stack.enter_context(contextlib.closing(LocalLog(tmp_path / "log"))).url)
        elif where == "static tree":
            assert call_btlog("export", str(tmp_path / "out"), *at)[0] == 0
            at = ("--log-url", stack.enter_context(contextlib.closing(Web(tmp_path / "out"))).url)
        args = ("verify", str(file), "--public-key", key_file(tmp_path), *at)
        for issuer, subject in [
            ("", ""), ("", PUBLISHER.subject), (PUBLISHER.issuer, ""), ("", "nobody"), (PUBLISHER.issuer, ANOTHER.subject),
            (PUBLISHER.issuer, PUBLISHER.subject),
        ]:  # fmt: skip
            met = any(who and issuer in ("", who.issuer) and subject in ("", who.subject) for who in publishers)
            pins = {"--publisher-issuer": issuer, "--publisher-subject": subject}
            words = [word for flag, text in pins.items() if text for word in (flag, re.escape(text))]
            assert call_btlog(*args, *words)[0] == (0 if met else 1), pins


def test_M3_a_monitor_does_not_accuse_a_copy_without_a_publisher(tmp_path: Path, guilty: Judged) -> None:
    """The same file without its publisher is no news, now or in a later run; another file of the project is."""
    folder, plain = tmp_path / "log", named_entry("demo-1.0-py3-none-any.whl", "a")
    for entries, kinds in [
        ((named_entry("demo-1.0-py3-none-any.whl", "a", PUBLISHER), plain, *map(quiet, range(5))), []), ((plain,), []),
        ((named_entry("demo-1.1-py3-none-any.whl", "b"),), ["publisher"]),
    ]:  # fmt: skip
        logged_anyway(folder, *entries)
        with contextlib.closing(LocalLog(folder)) as log_:
            seen = monitor(log_.url, tmp_path / "mirror")
        assert (seen.code, seen.kinds) == (len(kinds), kinds)
    guilty(seen)


# --- M4: pages that are not understood ----------------------------------------------------------------------------------------

ONE, TWO = f"{1:064x}", f"{2:064x}"
D1, D2, X1 = "demo-1.0-py3-none-any.whl", "demo-2.0-py3-none-any.whl", "other-1.0-py3-none-any.whl"


def listed(filename: str, url: str, sha256: str) -> dict[str, Any]:
    return {"filename": filename, "url": url, "hashes": {"sha256": sha256}}


def as_files(*files: dict[str, Any]) -> str:
    """A page of an index as JSON."""
    return json.dumps({"meta": {"api-version": "1.0"}, "files": files})


DEMO = f'<a href="demo-1.0.tar.gz#sha256={ONE}">demo-1.0.tar.gz</a>'
DEMO_JSON = as_files(listed("demo-1.0.tar.gz", "demo-1.0.tar.gz", ONE))
NOT_UNDERSTOOD = [
    ("application/octet-stream", DEMO_JSON, "octet-stream"),
    ("application/octet-stream", DEMO, "octet-stream"),
    ("text/plain", DEMO, "text/plain"),
    ("application/xml", DEMO, "application/xml"),
    ("", DEMO, ""),
    ("application/json", '{"errors":[{"status":404}]}', "files"),
    (JSON_PAGE, "{}", "files"),
    (JSON_PAGE, '{"files": null}', "files"),
    (JSON_PAGE, '{"files": {"demo-1.0.tar.gz": {}}}', "files"),
    (JSON_PAGE, '"files"', ""),
    (JSON_PAGE, DEMO, ""),
]
UNDERSTOOD = [
    ("text/html", f"<!DOCTYPE html><html><body>{DEMO.removesuffix('</a>')}<br></body></html>"),
    ("text/html", f"{DEMO.removesuffix('</a>')}"),
    ("text/html", f'<a href="../">up</a>{DEMO}<a href="demo-1.0.tar.gz.asc">sig</a>'),
    ("text/html", f'<a href="../">up<a href="https://demo.example/">home{DEMO}<a href="demo-1.0.tar.gz.asc">sig'),
    ("text/html", f'<a name="top">x</a><a>y</a><a href="">z</a><a href="#top">top</a>{DEMO}<a href="{DEMO[9:]}'),
    ("text/html", f'{DEMO}<a href="demo-1.0-py3-none-any.whl.metadata">m</a><a href="?sort=name">by name</a>'),
    ("TEXT/HTML;charset=UTF-8", DEMO.upper().replace("DEMO-1.0.TAR.GZ", "demo-1.0.tar.gz").replace("#SHA", "#sha")),
    ("application/vnd.pypi.simple.v1+html", DEMO),
    (f"{JSON_PAGE}; charset=utf-8", DEMO_JSON),
]
SPELLED = [
    (D1, f"/files/{D1.replace('-', '%2D')}"),
    (D1, f"/files/{D1}#sha256={ONE}"),
    (D1, f"/files/{D1}?token=a/b#egg=demo"),
    ("demo-1.0+local.1.tar.gz", "../../files/demo-1.0%2Blocal.1.tar.gz"),
    *((name, f"/files/{name}") for name in ("demo-1.0-beta1.tar.gz", "demo-1.0.win32-py2.7.exe", "a-b-1.0.zip", "a_b-1.0.zip")),
    *((name, f"/files/{name}") for name in ("Demo-1.0-1-py2.py3-none-any.whl", "A.b-1.0.tar.gz", "a_b-1.0-py3.9.egg")),
]
FINE = [
    *(("demo", kind, text, "demo-1.0.tar.gz") for kind, text in UNDERSTOOD),
    *(("demo" if name[0] in "dD" else "a-b", JSON_PAGE, as_files(listed(name, url, ONE)), name) for name, url in SPELLED),
]


@contextlib.contextmanager
def page(kind: str, text: str, status: int = 200, path_: str = "demo/") -> Iterator[Served]:
    """An index whose page of the project demo, or what else it has at a path, is this."""
    headers = {"Content-Type": kind} if kind else {}

    def answer(path: str) -> HtmlOrJson:
        return (status, headers, text.encode()) if path == f"/simple/{path_}" else (404, {}, b"")

    with contextlib.closing(Served(answer)) as index:
        index.url = f"{index.origin}/simple"
        yield index


def ingested(url: str, index: Served | Web, folder: Path, *projects: str) -> tuple[int, str, str]:
    key = ("--public-key", key_file(folder))
    return call_btlog("ingest", "--index-url", index.url, "--log-url", url, *key, *projects)


@pytest.mark.parametrize(("kind", "text", "says"), NOT_UNDERSTOOD)
def test_M4_a_page_that_is_not_understood_is_not_empty(
    tmp_path: Path, log: LocalLog, monkeypatch: pytest.MonkeyPatch, kind: str, text: str, says: str
) -> None:
    """It could not be checked: exit 3, and a line that says what it was. Nobody is accused for want of a page."""
    try_only(monkeypatch, 1)
    add(log.url, named_entry("demo-1.0.tar.gz"))
    with page(kind, text) as index:
        code, out, error = ingested(log.url, index, tmp_path, "demo")
        assert (code, says in error, "/simple/demo/" in error, "1 files" in out) == (3, True, True, False), (out, error)
        seen = monitor(log.url, tmp_path / "mirror", "--index-url", index.url)
        assert (seen.code, seen.kinds, says in seen.error, "/simple/demo/" in seen.error) == (3, [], True, True), seen
    assert len(walk(log.url)) == 1


@pytest.mark.parametrize(("project", "kind", "text", "filename"), FINE, ids=range(len(FINE)))
def test_M4_M5_a_page_is_read_as_browsers_and_pip_read_it(
    tmp_path: Path, log: LocalLog, project: str, kind: str, text: str, filename: str
) -> None:
    """A link needs no end tag; what leads to no distribution is none, and no failure. Encoded and old names are fine."""
    with page(kind, text, path_=f"{project}/") as index:
        assert ingested(log.url, index, tmp_path, project) == (0, summary(1, 1, 0, 0, 0), "")
        assert walk(log.url) == [Entry(filename, f"sha256:{ONE}").encode()]
        seen = monitor(log.url, tmp_path / "mirror", "--index-url", index.url)
        assert (seen.code, seen.kinds, seen.error) == (0, [], "")


@pytest.mark.parametrize(("kind", "text"), [(JSON_PAGE, '{"files": []}'), ("text/html", "<!DOCTYPE html><title>demo</title>")])
def test_M4_a_project_without_files(tmp_path: Path, log: LocalLog, kind: str, text: str) -> None:
    """Is understood, and empty."""
    with page(kind, text) as index:
        assert ingested(log.url, index, tmp_path, "demo")[:2] == (0, summary(1, 0, 0, 0, 0))
        add(log.url, named_entry("demo-1.0.tar.gz"))
        seen = monitor(log.url, tmp_path / "mirror", "--index-url", index.url)
        assert (seen.code, seen.kinds) == (1, ["not-on-index"])


@pytest.mark.parametrize(
    ("status", "kind", "text"),
    [
        (404, "text/plain", "this index lists no projects"),
        (410, "text/html", DEMO),
        (200, "application/octet-stream", '{"projects": [{"name": "demo"}]}'),
        (200, "application/json", '{"errors":[{"status":404}]}'),
        (200, JSON_PAGE, '{"projects": {"name": "demo"}}'),
        (200, "text/plain", '<a href="demo/">demo</a>'),
        (200, "text/html", '<h1>Welcome</h1><a href="https://web.example/">docs</a>'),
    ],
)
def test_M4_a_list_of_projects_that_is_none(
    tmp_path: Path, log: LocalLog, monkeypatch: pytest.MonkeyPatch, status: int, kind: str, text: str
) -> None:
    """Where nothing was asked for by name and the index does not say what it has, nothing was checked: exit 3."""
    try_only(monkeypatch, 1)
    with page(kind, text, status, path_="") as index:
        code, out, error = ingested(log.url, index, tmp_path)
    assert (code, out, error.count("\n")) == (3, "", 1)
    assert index.url in error
    assert ("none of them leads to a project" in error) == ("Welcome" in text)


def test_M4_a_list_of_projects_as_html(tmp_path: Path, log: LocalLog) -> None:
    """Links without end tags list projects as well; the way up is no project."""
    text = '<!DOCTYPE html><a href="../">..</a><a href="/demo/">demo<br><a href="/other/">other'
    pages = {"/": text, "/demo/": DEMO, "/other/": DEMO.replace("demo-", "other-")}
    with contextlib.closing(Served(lambda path: (200, {"Content-Type": "text/html"}, pages[path].encode()))) as index:
        assert ingested(log.url, index, tmp_path) == (0, summary(2, 2, 0, 0, 0), "")


# --- M5: a page that names a file otherwise than its URL ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("filename", "url", "says"),
    [
        (D1, f"/files/{D2}", (D1, D2)),
        (D1, f"https://files.example/{D2}?x=/{D1}#sha256={ONE}", (D1, D2)),
        (D1, f"/files/{X1}", (D1, X1)),
        (X1, f"/files/{D1}", (D1, X1)),
        (X1, f"/files/{X1}", (X1,)),  # it would bind a name of another project to this checksum
        ("demo2-1.0.tar.gz", "/files/demo2-1.0.tar.gz", ("demo2-1.0.tar.gz",)),
        (D1, f"/files/x%2F{D2}", (D1, D2)),  # pip decodes the whole path first
        (D1, f"/files/{D2}/", (D1, D2)),  # and leaves a slash at the end out
        (D1, f"/files/{D1}#sha256={TWO}", (D1,)),  # pip goes by the fragment, uv by `hashes`
        (D1, "/files/download", (D1, "download")),
        ("", f"/files/{X1}#sha256={TWO}", (X1,)),  # in HTML there is one name only, and the text of a link is none
    ],
)
def test_M5_ingest_refuses_two_names(
    tmp_path: Path, log: LocalLog, filename: str, url: str, says: tuple[str, ...]
) -> None:
    """pip 26.3 takes the name of the URL, uv 0.13.9 `filename`: a file is logged where they agree, or not at all."""
    files = as_files(listed(filename, url, ONE), listed("demo-1.0.tar.gz", "/files/demo-1.0.tar.gz", ONE))
    kind, text = (JSON_PAGE, files) if filename else ("text/html", f'{DEMO}<a href="{url}">{D1}</a>')
    with page(kind, text) as index:
        code, out, error = ingested(log.url, index, tmp_path, "demo")
    assert (code, out, error.count("\n")) == (3, summary(1, 1, 0, 0, 1), 1), error
    assert all(name in error for name in says)
    assert index_of(walk(log.url)) == {"demo-1.0.tar.gz": f"sha256:{ONE}"}


@pytest.mark.parametrize("base", [f"/files/{D2}", f"../../{D2}?x=/{D1}"])
def test_M5_a_base_that_names_the_file(tmp_path: Path, log: LocalLog, base: str) -> None:
    """For pip, a link of a page with a <base> leads to the base: under that name it is logged, or not at all."""
    with page("text/html", f'<base href="{base}"><a href="">x</a><a href="#sha256={ONE}">{D1}</a>') as index:
        code, out, error = ingested(log.url, index, tmp_path, "demo")
    assert (code, "1 files logged" in out) in ((0, True), (3, False)), error
    assert index_of(walk(log.url)) == ({D2: f"sha256:{ONE}"} if code == 0 else {})


@pytest.mark.parametrize(
    ("link", "checksum"),
    [
        (f"x-1.zip#md5={'0' * 32}&sha256={ONE}", ""), (f"x-1.zip#sha256={TWO}&sha256={ONE}", f"sha256:{TWO}"),
        (f"x-1.zip?x&sha256={TWO}#sha256={ONE}", ""), (f"x-1.zip#sha256={ONE}&egg=x", f"sha256:{ONE}"),
    ],
)  # fmt: skip
def test_M5_the_hash_of_a_link_is_the_one_that_pip_takes(link: str, checksum: str) -> None:
    assert btlog.index_file("", link, "").checksum == checksum


F7, F8, F17 = OF_7.filename, Entry.parse(quiet(8)).filename, Entry.parse(quiet(17)).filename
SUM_7 = OF_7.checksum.removeprefix("sha256:")


@pytest.mark.parametrize(
    ("filename", "url", "kinds"),
    [
        (F7, UNLOGGED, ["not-logged"]),  # pip installs version 9999
        (UNLOGGED, F7, ["not-logged"]),  # uv does
        (F7, f"x%2F{UNLOGGED}", ["not-logged"]),
        (F7, f"{UNLOGGED}/", ["not-logged"]),
        (F7, F17, ["index-differs"]),  # pip installs the file of 7 as version 17
        (F17, F7, ["index-differs"]),  # uv does
        (F7, F8, ["index-differs"]),
        (F7, f"{F7}#sha256={TWO}", ["index-differs"]),  # pip goes by the fragment
        (X1, X1, ["not-logged"]),
        (F7, F7.replace("-", "%2d"), []),
        (F7, f"{F7}?x=/{UNLOGGED}#sha256={SUM_7}", []),
        ("", UNLOGGED, ["not-logged"]),  # instead of the logged file: no installer would find that
    ],
)
def test_M5_a_monitor_compares_both_names(
    tmp_path: Path, static: StaticLog, guilty: Judged, filename: str, url: str, kinds: list[str]
) -> None:
    """What either installer would take has to be logged, with this checksum."""
    with contextlib.closing(FakeIndex(tmp_path, index_of(static.entries))) as index:
        right = index.instead
        files = json.loads((right("/quiet7/") or (0, "", b"{}"))[2])["files"]
        files = [item for item in files if filename or item["filename"] != F7]
        body = as_files(*files, listed(filename or F7, f"/files/{url}", SUM_7)).encode()
        index.instead = lambda path_: (200, JSON_PAGE, body) if path_ == "/quiet7/" else right(path_)
        seen = monitor(static.web.url, tmp_path / "mirror", "--index-url", index.url)
    assert (seen.code, seen.kinds, seen.error) == (1 if kinds else 0, kinds, ""), seen
    if kinds == ["not-logged"]:
        assert seen.lines[0]["filename"] in (UNLOGGED, X1)
    if kinds:
        guilty(seen)


# --- M6: patterns ---------------------------------------------------------------------------------------------------------------


def names(seen: Seen) -> list[str]:
    """The filenames of the matches that were told, in order."""
    assert set(seen.kinds) <= {"match"}
    return [text.split(" ")[0] for text in seen.texts]


def regexes(*patterns: str) -> tuple[str, ...]:
    return tuple(word for pattern in patterns for word in ("--filename-regex", pattern))


def quiets(*numbers: int) -> list[str]:
    return [Entry.parse(quiet(i)).filename for i in numbers]


def test_M6_patterns_repeat(tmp_path: Path, static: StaticLog, guilty: Judged) -> None:
    """Any of them matches; of two kinds, as with bt-log, both have to."""
    static.grow(*(named_entry(f"{x}-1.0-py3-none-any.whl", x) for x in "abcd"))
    sums = {x: btlog.Entry.parse(named_entry("x", x)).checksum for x in "abcd"}
    of_sums = ("--checksum-regex", sums["b"], "--checksum-regex", sums["c"][10:])
    for words, matching in (regexes("^a-", "^c-"), "ac"), (of_sums, "bc"), ((*of_sums, *regexes("^a-", "^c-")), "c"):
        seen = monitor(static.web.url, tmp_path / f"m{len(words)}{matching}", *words)
        assert (seen.code, names(seen)) == (1, [f"{x}-1.0-py3-none-any.whl" for x in matching])
        guilty(seen)


def test_M6_a_project_is_watched(tmp_path: Path, static: StaticLog) -> None:
    """All wheels and sdists of it, in every spelling, and of no other; also a sdist whose version has a hyphen."""
    mine = [
        "foo_bar-1.0-py3-none-any.whl", "Foo.Bar-1.0-1-cp311-cp311-linux_x86_64.whl", "foo-bar-1.0.tar.gz",
        "FOO_BAR-2.0.zip", "foo.bar-2!3.0rc1+local.tar.gz", "foo--bar-1.0.tar.bz2",
        "foo-bar-1.0-1.tar.gz",  # for pip, version 1.0.post1 of foo-bar
    ]  # fmt: skip
    others = [
        "foo-1.0.tar.gz", "foobar-1.0.tar.gz", "foo_bar_baz-1.0-py3-none-any.whl", "foo-bar-baz-1.0.tar.gz",
        "bar-1.0.zip", "xfoo-bar-1.0.tar.gz", "foo-1.0-bar.tar.gz",
    ]  # fmt: skip
    static.grow(*map(named_entry, itertools.chain(mine, others)))
    seen = monitor(static.web.url, tmp_path / "mirror", "--project", "Foo-_Bar")
    assert (seen.code, sorted(names(seen))) == (1, sorted(mine))
    two = names(monitor(static.web.url, tmp_path / "two", "--project", "foo", "--project", "bar"))
    assert {"foo-1.0.tar.gz", "bar-1.0.zip"} <= set(two) <= set(others)


def test_M6_a_new_pattern_searches_what_is_there(tmp_path: Path, static: StaticLog, guilty: Judged) -> None:
    """At the next round, from entry 0 on. What was told is not told again; what was logged while it was out, is."""
    mirror, url, ours = tmp_path / "mirror", static.web.url, "^quiet5-15-"
    assert monitor(url, mirror).code == 0
    seen = monitor(url, mirror, *regexes(ours))
    assert (seen.code, names(seen)) == (1, quiets(15))
    guilty(seen)
    assert monitor(url, mirror, *regexes(ours)).code == 0
    static.grow_to(600)
    old_and_new = "^quiet5-(25|295|305|555)-"  # in a round that also reads on
    assert sorted(names(monitor(url, mirror, *regexes(ours, old_and_new)))) == quiets(25, 295, 305, 555)
    assert monitor(url, mirror, *regexes(old_and_new, ours)).code == 0  # the order is nothing new
    assert monitor(url, mirror, *regexes(ours)).code == 0
    assert len(names(monitor(url, mirror, *regexes(ours), "--project", "quiet9"))) == 60
    assert monitor(url, mirror, *regexes(ours), "--project", "Quiet9").code == 0  # another spelling of it
    assert names(monitor(url, mirror, "--checksum-regex", OF_7.checksum)) == [OF_7.filename]
    for words in regexes("^quiet5-(25|615)-"), regexes("^nothing-"):
        assert monitor(url, mirror, *words).code == (1 if "25" in words[1] else 0)
        static.grow_to(len(static.entries) + 10)
    assert quiets(615)[0] in names(monitor(url, mirror, *regexes("^quiet5-(25|615)-")))
    assert monitor(url, mirror, *regexes("^quiet5-(25|615)-")).code == 0


def test_M6_usage(tmp_path: Path, static: StaticLog) -> None:
    for words, says in (
        (("--filename-regex", "a", "--filename-regex", "("), "not a regular expression"),
        (("--project", ""), "project"),
        (("--project", "a b"), "project"),
        (("--project", "\u212aerberos"), "project"),  # names are ASCII (PEP 508)
    ):
        code, text, error = call_btlog(*monitor_args(static.web.url, tmp_path / "mirror", *words))
        assert (code, text, error.count("\n"), says in error) == (2, "", 1, True), words


@pytest.mark.slow
def test_M6_how_fast_a_mirror_is_searched(tmp_path: Path) -> None:
    """100,000 entries in 2 s, the start of the process included."""
    with contextlib.closing(found(tmp_path / "log")) as store:
        for first in range(0, 100_000, 10_000):
            store.append([quiet(i) for i in range(first, first + 10_000)], seal, True)
        store.append([named_entry("rare-1.0.tar.gz")], seal, True)
    shutil.copytree(tmp_path / "log", tmp_path / "mirror")  # a log's folder is that of a monitor that has all of it
    with contextlib.closing(LocalLog(tmp_path / "log")) as log_:
        words = (*regexes("^quiet5-15-", "^quiet6-.*77776-"), "--project", "rare")
        took, code, lines, _ = measured(*monitor_args(log_.url, tmp_path / "mirror", *words))
        assert (code, len(told(lines, "match"))) == (1, 3)
        assert took < 2, f"{took:.1f} s"
        again, code, lines, _ = measured(*monitor_args(log_.url, tmp_path / "mirror", *words))
        assert (code, told(lines)) == (0, [])
        assert again < took


# --- M7: an index that dies, or leads elsewhere -----------------------------------------------------------------------------------


def project_entries(count: int) -> list[bytes]:
    return [named_entry(f"many{i}-1.0-py3-none-any.whl") for i in range(count)]


def dying(index: FakeIndex, after: int, status: int = 503) -> None:
    """Has an index answer so many pages, and then none."""
    right, count = index.instead, itertools.count()

    def instead(path_: str) -> Answered | None:
        return right(path_) if path_ == "/" or next(count) < after else (status, "text/plain", b"")

    index.instead = instead


@pytest.mark.parametrize("status", [500, 503])
def test_M7_an_index_that_dies_is_given_up(
    tmp_path: Path, static: StaticLog, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    """After a few failures in a row, with one line; what was found before is told, and what is due stays due."""
    try_only(monkeypatch, 1)
    static.grow(*project_entries(120))
    files = index_of(static.entries)
    with contextlib.closing(FakeIndex(tmp_path, files)) as index:
        right = index.instead

        def round_(mirror: str, pages: int) -> Seen:
            index.asked.clear()
            index.instead = right
            dying(index, pages, status)
            return monitor(static.web.url, tmp_path / mirror, "--index-url", index.url)

        for missing in (), ("many0-1.0-py3-none-any.whl", "many119-1.0-py3-none-any.whl"):
            for name in missing:
                del files[name]
            seen = round_(f"{len(missing)}", 30)
            assert (seen.code, seen.kinds, seen.error.count("\n")) == (
                (1, ["not-on-index"], 1) if missing else (3, [], 1)
            ), seen
            assert all("many0-" in text for text in seen.texts)
            assert len(index.asked) <= 30 + 8 + 2 * btlog.LogReader.WINDOW
        seen = round_("2", 1000)
        assert (seen.code, set(seen.kinds)) == (1, {"not-on-index"})  # many0 is due still, with the others of its batch
        assert any("many119-" in text for text in seen.texts)


def test_M7_single_failures_do_not_end_a_round(tmp_path: Path, static: StaticLog, monkeypatch: pytest.MonkeyPatch) -> None:
    """One page in five, or ten in a row that are refused: all others are compared, and all that is wrong is found."""
    try_only(monkeypatch, 1)
    static.grow(*project_entries(50), *(named_entry(f"aa{i}-1.0.tar.gz") for i in range(10)), named_entry("zz-1.0.tar.gz"))
    files = {**index_of(static.entries), "zz-1.0.tar.gz": f"sha256:{ONE}"}
    del files["many49-1.0-py3-none-any.whl"]
    with contextlib.closing(FakeIndex(tmp_path, files)) as index:
        right = index.instead
        for status, pages, failed in (500, "/many[0-9]*[05]/", "10 pages"), (403, "/aa", ""):

            def instead(path_: str, status: int = status, pages: str = pages) -> Answered | None:
                return (status, "text/plain", b"") if re.match(pages, path_) else right(path_)

            index.instead = instead
            seen = monitor(static.web.url, tmp_path / f"{status}", "--index-url", index.url)
            assert (seen.code, sorted(seen.kinds), failed in seen.error) == (1, ["index-differs", "not-on-index"], True)
            assert any("many49-" in text for text in seen.texts)


@pytest.mark.slow
def test_M7_how_long_a_dead_index_is_asked(tmp_path: Path, static: StaticLog) -> None:
    """With all attempts, and nobody there at all: seconds, not hours."""
    static.grow(*project_entries(1000))
    index = FakeIndex(tmp_path, {})
    index.close()
    begun = time.monotonic()
    seen = monitor(static.web.url, tmp_path / "mirror", "--index-url", index.url)
    assert (seen.code, seen.kinds, seen.error.count("\n")) == (3, [], 1)
    assert time.monotonic() - begun < 20


def test_M7_ingest_from_an_index_that_dies(tmp_path: Path, log: LocalLog, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was read is logged and counted; the rest is given up."""
    try_only(monkeypatch, 1)
    with contextlib.closing(FakeIndex(tmp_path, index_of(project_entries(120)))) as index:
        dying(index, 30)
        code, _, error = ingest(log.url, index, tmp_path)
        assert (code, error.count("\n") <= 10) == (3, True)
        assert len(index.asked) <= 1 + 30 + 8 + 2 * btlog.LogReader.WINDOW


def moved(status: int, to: str) -> HtmlOrJson:
    return status, {"Location": to, "Content-Type": "text/html"}, b"<a href='elsewhere'>moved</a>"


def json_page(*files: dict[str, Any]) -> HtmlOrJson:
    return 200, {"Content-Type": JSON_PAGE}, as_files(*files).encode()


def test_M7_an_index_that_sends_elsewhere_for_what_it_has_not(tmp_path: Path, log: LocalLog) -> None:
    """pypiserver answers 303 for an unknown project, to PyPI: the index has no such project. Nobody else is asked."""
    demo, other = named_entry("demo-1.0.tar.gz"), named_entry("other-1.0.tar.gz")
    page_ = json_page(listed("demo-1.0.tar.gz", "/files/demo-1.0.tar.gz", Entry.parse(demo).checksum[7:]))
    with contextlib.closing(Served(lambda path: page_)) as elsewhere:
        index = Served(lambda path: page_ if path == "/demo/" else moved(303, f"{elsewhere.origin}{path}"))
        with contextlib.closing(index):
            lines = "btlog: the index has no project other\nbtlog: the index has no project third\n"
            assert ingested(log.url, index, tmp_path, "other", "demo", "third") == (3, summary(3, 1, 0, 0, 2), lines)
            args = (log.url, tmp_path / "mirror", "--index-url", index.url)
            assert monitor(*args).code == 0
            add(log.url, other)
            seen = monitor(*args)
            assert (seen.code, seen.kinds, seen.error) == (1, ["not-on-index"], "")
            assert monitor(*args).code == 0  # it is told once, and 0 again
        assert elsewhere.asked == []


@pytest.mark.parametrize(("hops", "code"), [(5, 0), (6, 3), (10**9, 3)])
def test_M7_redirects_within_the_index_are_followed(
    tmp_path: Path, log: LocalLog, monkeypatch: pytest.MonkeyPatch, hops: int, code: int
) -> None:
    """Of each kind, five at most; what leads on and on could not be checked. To the name as the index spells it, say."""
    try_only(monkeypatch, 1)

    def answer(path: str) -> HtmlOrJson:
        if path in ("/", "/all/"):
            return moved(301, "all/") if path == "/" else (200, {"Content-Type": JSON_PAGE}, b'{"projects":[{"name":"demo"}]}')
        n = int(path.partition("n=")[2] or 0)
        to = ("../Demo/", "/Demo/", f"{index.origin}/Demo/", f"?n={n}")[n % 4].partition("?")[0]
        status = (301, 302, 307, 308)[n % 4]
        return moved(status, f"{to}?n={n + 1}") if n < hops else json_page(listed(D1, f"/{D1}", ONE))

    with contextlib.closing(Served(answer)) as index:
        got, out, error = ingested(log.url, index, tmp_path)
        assert (got, "1 files logged" in out) == (code, code == 0), error
        assert len(index.asked) <= 9
        seen = monitor(log.url, tmp_path / "mirror", "--index-url", index.url)
        assert (seen.code, seen.kinds, seen.error) == (0, [], "")


@pytest.mark.parametrize(
    "to",
    ["http://127.0.0.1:OTHER/demo/", "//127.0.0.1:OTHER/demo/", "http://localhost:PORT/demo/", "ftp://127.0.0.1/", "", "http://["],
)
def test_M7_a_redirect_elsewhere_is_not_followed(
    tmp_path: Path, log: LocalLog, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    """Only the index that was named is asked; that it sends us away is an error that names the page."""
    try_only(monkeypatch, 1)
    add(log.url, named_entry(D1))
    other = Served(lambda path: json_page(listed(D1, f"/{D1}", ONE)))
    with contextlib.closing(other), contextlib.closing(Served(lambda path: moved(302, to))) as index:
        to = to.replace("OTHER", other.origin.rpartition(":")[2]).replace("PORT", index.origin.rpartition(":")[2])
        code, out, error = ingested(log.url, index, tmp_path, "demo")
        assert (code, "1 files logged" in out, "Traceback" in error) == (3, False, False)
        seen = monitor(log.url, tmp_path / "mirror", "--index-url", index.url)
        assert (seen.code, seen.kinds) == (3, [])
        assert (other.asked, set(index.asked), len(index.asked) <= 4) == ([], {"/demo/"}, True)


# --- M8: what a hostile index costs, and what evidence does --------------------------------------------------------------------------


HOSTILE_PAGES: dict[str, Callable[[], tuple[str, bytes]]] = {
    "empty objects": lambda: (JSON_PAGE, b'{"files":[' + b"{}," * 4_000_000 + b"{}]}"),
    "empty lists": lambda: (JSON_PAGE, b'{"files":[' + b"[]," * 8_000_000 + b"{}]}"),
    "numbers": lambda: (JSON_PAGE, b'{"files":[' + b"1.5," * 8_000_000 + b"{}]}"),
    "keys": lambda: (JSON_PAGE, ("{" + ",".join(f'"{i}":0' for i in range(2_000_000)) + ',"files":[]}').encode()),
    "nested": lambda: (JSON_PAGE, b'{"files":' + b"[" * 30_000_000),
    "one name": lambda: (JSON_PAGE, b'{"files":[{"filename":"' + b"x" * 60_000_000 + b'"}]}'),
    "wide characters": lambda: (JSON_PAGE, b'{"files":[],"x":"' + b"\xf0\x9f\x90\x8d" + b"x" * 60_000_000 + b'"}'),
    "attributes": lambda: ("text/html", b"<a " + b"".join(b"a%d=1 " % i for i in range(500_000)) + b"href=x>x</a>"),
    "open tags": lambda: ("text/html", b"<a href=x>" * 3_000_000),
    "text": lambda: ("text/html", b"<a href=x>" + b"x" * 60_000_000),
    # As many names as an answer of 64 MiB has room for; all of them are counted.
    "400,000 names": lambda: (JSON_PAGE, b'{"files":[%b]}' % many_names(
        '{{"filename":"{0}","url":"{0}","hashes":{{"sha256":"{1}"}}}}', ",")),
    "400,000 links": lambda: ("text/html", many_names('<a href="/{0}#sha256={1}">{0}</a>', "\n")),
}  # fmt: skip


def many_names(each: str, between: str) -> bytes:
    return between.join(each.format(f"quiet7-{i}.zip", ONE) for i in range(400_000)).encode()


def zipped_page(kind: str, body: bytes) -> Callable[[str], HtmlOrJson]:
    """What an index answers that has this page for all of its projects."""
    zipped = gzip.compress(body, 1)
    return lambda path: (200, {"Content-Type": kind, "Content-Encoding": "gzip"}, zipped)


@pytest.mark.parametrize(
    "name", [name if name == "empty objects" else pytest.param(name, marks=pytest.mark.slow) for name in HOSTILE_PAGES]
)
def test_M8_a_hostile_page(tmp_path: Path, log: LocalLog, name: str) -> None:
    """However it is told, a page costs less than the limit, and no endless time: for a monitor, and for an ingest."""
    add(log.url, quiet(7))
    with contextlib.closing(Served(zipped_page(*HOSTILE_PAGES[name]()))) as index:
        took, code, lines, _ = measured(*monitor_args(log.url, tmp_path / "mirror", "--index-url", index.url))
        assert (code in (1, 3), len(lines) <= 2 * btlog.MAX_FINDINGS, took < 30) == (True, True, True), took
        if name.startswith("400,000"):
            assert (code, len(told(lines, "not-logged"))) == (1, btlog.MAX_FINDINGS + 1)
        if name == "empty objects":
            key = ("--public-key", key_file(tmp_path))
            _, code, _, error = measured("ingest", "--index-url", index.url, "--log-url", log.url, *key, "quiet7")
            assert (code, error.count("\n") < 1000) == (3, True)


def test_M8_large_pages_at_once(tmp_path: Path, static: StaticLog) -> None:
    """What is read ahead of an index is bounded by bytes as well, however many projects it has."""
    body = b'{"files":[],"x":"' + b"x" * 30_000_000 + b'"}'
    with contextlib.closing(Served(zipped_page(JSON_PAGE, body))) as index:
        _, code, _, _ = measured(*monitor_args(static.web.url, tmp_path / "mirror", "--index-url", index.url))
    assert code in (1, 3)  # the pages have no files, or are too large


@pytest.mark.parametrize("data", [
    (b"<" * 65_535 + b">") * 100, b'<base href="http://x/' + b"a" * 60_000 + b'/">' + b"<a href=x>" * 20_000,
    b"<![CDATA[>" * 100_000, b"<a href=x>" + b"xxxxxxxxxxxx<b>" * 80_000 + b"</a>",
], ids=["tags", "base", "sections", "pieces"])  # fmt: skip
def test_M8_pages_that_cost_more_than_they_weigh(data: bytes) -> None:
    """Twice as many pieces take twice as long, not four times."""
    begun = time.process_time()
    with contextlib.suppress(ValueError):
        btlog.parse_links(data, btlog._Links("http://index.example/simple/x/"))
    assert time.process_time() - begun < 5


def about_evidence(lines: Iterable[str], error: str) -> list[str]:
    """The lines that say that no more evidence is kept."""
    other = [line for line in lines if "evidence" in line and "evidence" not in json.loads(line)]
    return [line for line in [*other, *error.splitlines()] if "evidence" in line]


def test_M8_evidence_has_a_limit_by_number(tmp_path: Path, static: StaticLog, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond it all findings are told, without evidence, and one line says so; what earlier runs left counts as well."""
    monkeypatch.setattr(btlog, "MAX_KEPT", 20)
    mirror = tmp_path / "mirror"

    def watch(*words: str) -> list[dict[str, Any]]:
        code, out, error = call_btlog(*monitor_args(static.web.url, mirror, *words))
        assert (code, len(about_evidence(out.splitlines(), error))) == (1, 1), error
        assert len(list((mirror / "evidence").iterdir())) == 10  # half of it, for findings about entries
        return told(out.splitlines())

    lines = watch("--filename-regex", "^quiet5-")
    assert [line["kind"] for line in lines] == ["match"] * 30
    kept = [line["evidence"] for line in lines if line.get("evidence")]
    assert len(kept) == 10
    assert all(Path(folder).is_dir() for folder in kept)
    static.grow(b"no entry")
    assert [line["kind"] for line in watch()] == ["bad-entry"]
    shutil.rmtree(mirror / "evidence")  # whoever takes it away makes room for more
    static.grow(b"no other entry")
    seen = monitor(static.web.url, mirror)
    assert (seen.code, seen.kinds, seen.error) == (1, ["bad-entry"], "")
    assert seen.evidence[0].joinpath("301.entry").read_bytes() == b"no other entry"


def test_M8_evidence_has_a_limit_by_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of false checkpoints, as large as one may be, and other ones in each round; a run says once that it keeps none."""
    monkeypatch.setattr(btlog, "MAX_KEPT_BYTES", 2_500_000)
    served = itertools.count()

    def answer(path: str) -> HtmlOrJson:
        if (n := next(served)) == 20:
            os.kill(os.getpid(), signal.SIGTERM)
        return 200, {"Content-Type": "text/plain"}, b"%b\n\nno %d\n" % (b"x" * 995_000, n)

    with contextlib.closing(Served(answer)) as log_:
        for flags, said in ((), 0), ((), 0), ((), 1), ((), 1), (("--follow", "--frequency", "0"), 1):
            code, out, error = call_btlog(*monitor_args(log_.url, tmp_path / "mirror", *flags))
            kinds = [line["kind"] for line in told(out.splitlines())]
            assert (code, set(kinds), len(kinds) > 1) == (1, {"bad-signature"}, bool(flags))
            assert len(about_evidence(out.splitlines(), error)) == said
            assert size_of(tmp_path / "mirror" / "evidence") <= 2_500_000
    assert len(list((tmp_path / "mirror" / "evidence").iterdir())) == 2


# --- M9: the fields of findings ------------------------------------------------------------------------------------------------------


def test_M9_the_fields_of_a_match(tmp_path: Path, static: StaticLog) -> None:
    """Those of bt-log's monitor (checksum, filename, tile-index, log-size), and what it lacks. A line is one finding.

    A value from outside stays within its string, whatever is in it.
    """
    odd = Publisher("https://i.example", 'x", "index": 7')
    new = [
        named_entry("demo-1.0.tar.gz", "a", PUBLISHER), named_entry("demo2-1.0.tar.gz", "b"),
        named_entry('demo-"}\u2028{"kind": "x-1.0.tar.gz', "a", odd),
    ]  # fmt: skip
    static.grow_to(765)
    static.grow(*new)
    before = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=2)
    seen = monitor(static.web.url, tmp_path / "mirror", "--filename-regex", "^demo")
    assert (seen.code, seen.kinds) == (1, ["match"] * 3)
    for index, (line, data) in enumerate(zip(seen.lines, new, strict=True), 765):
        entry = Entry.parse(data)
        assert has(line, filename=entry.filename, checksum=entry.checksum, index=index, tile_index=2, log_size=768)
        assert has(line, publisher=entry.publisher._asdict() if entry.publisher else None)
        assert before < datetime.datetime.fromisoformat(line["time"]) <= datetime.datetime.now(datetime.UTC)
        assert {"level", "msg", "kind", "evidence"} <= line.keys()


def has(line: dict[str, Any], **fields: Any) -> bool:
    """Whether a finding has these fields, in whose names a hyphen is an underscore here."""
    return {**line, **{name.replace("_", "-"): value for name, value in fields.items()}} == line


@pytest.mark.parametrize(
    ("kind", "entries", "fields"),
    [
        ("replaced", [named_entry("a-1.whl", "a"), named_entry("a-1.whl", "b")],
         {"filename": "a-1.whl", "index": 301, "checksum": Entry.parse(named_entry("a-1.whl", "b")).checksum}),
        ("publisher", [named_entry("a-1.whl", "", PUBLISHER), named_entry("a-2.whl", "", ANOTHER)],
         {"filename": "a-2.whl", "index": 301, "publisher": ANOTHER._asdict()}),
        ("publisher", [named_entry("a-1.whl", "", PUBLISHER), named_entry("a-2.whl")],
         {"filename": "a-2.whl", "index": 301, "publisher": None}),
        ("bad-entry", [b"no entry"], {"index": 300}),
        ("index-differs", [], {"filename": OF_7.filename, "index": 7}),
        ("not-on-index", [], {"filename": OF_7.filename, "index": 7, "checksum": OF_7.checksum}),
        ("not-logged", [], {"filename": UNLOGGED, "checksum": f"sha256:{ONE}"}),
    ],
)  # fmt: skip
def test_M9_the_fields_of_what_is_wrong(
    tmp_path: Path, static: StaticLog, kind: str, entries: list[bytes], fields: dict[str, Any]
) -> None:
    """Those of the entry that makes it wrong, the later one; and those of a file of an index."""
    static.grow(*entries)
    files = index_of(static.entries if not entries else [])
    if kind == "not-on-index":
        del files[OF_7.filename]
    elif not entries:
        files[fields["filename"]] = f"sha256:{ONE}"
    with contextlib.closing(FakeIndex(tmp_path, files)) as index:
        beside = () if entries else ("--index-url", index.url)
        seen = monitor(static.web.url, tmp_path / "mirror", *beside)
    assert (seen.code, seen.kinds, has(seen.lines[0], **fields)) == (1, [kind], True), seen.lines
    assert (seen.lines[0].get("index") is None) == (kind == "not-logged")


def test_M9_the_end_to_end_test_of_bt_log(tmp_path: Path, static: StaticLog) -> None:
    """Its workflow runs the monitor with both patterns, and takes `.checksum` of all that it has written."""
    static.grow(Entry("pkgname-1.2.3-py3-none-any.whl", SUM).encode())
    words = ("--once=true", f"--checksum-regex={SUM}", "--filename-regex=pkgname")
    seen = monitor(static.web.url, tmp_path / "mirror", *words)
    assert [line.get("checksum") for line in seen.lines] == [SUM]


# --- P: the page, for a log of three witnesses -------------------------------------------------------------------------------

CONTENT = b"what is in the file"
CONTENT_SUM = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"
OTHER_SUM = f"sha256:{hashlib.sha256(b'something else').hexdigest()}"
ANOTHER_LOG = btlog.encode_vkey(A.key)


@dataclass(frozen=True)
class LogOfThree:
    """A log whose policy asks for 2 of 3 witnesses; the third of them is down for good."""

    url: str
    key: str
    witnesses: list[str]
    policy: str


@pytest.fixture(scope="module")
def log_of_three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LogOfThree]:
    folder = tmp_path_factory.mktemp("three")
    with several_witnesses(folder, 2) as two:
        for each in two:
            each.now = time.time()
        keys = [*(encode_vkey(each.witness.signer.key) for each in two), WITNESS_VKEY_4]
        urls = [*(each.url for each in two), "http://127.0.0.1:1"]
        lines = "".join(f"witness w{i} {keys[i]} {urls[i]}\n" for i in range(3))
        policy = f"log {LOG_VKEY}\n{lines}group g 2 w0 w1 w2\nquorum g\n"
        with contextlib.closing(LocalLog(folder / "log", policy=parse_policy(policy.encode()))) as log_:
            for entry in Entry("signed-1.0.whl", CONTENT_SUM, PUBLISHER), Entry("plain-1.0.whl", OTHER_SUM):
                assert add(log_.url, entry.encode())[0] == 200
            yield LogOfThree(log_.url, LOG_VKEY, keys, policy)


@pytest.fixture
def three(log_of_three: LogOfThree, browser: Browser) -> LogOfThree:
    """The same, in whose page nothing is pinned yet."""
    browser.open(log_of_three.url)
    browser.run("localStorage.clear()")
    return log_of_three


def pin(page: Browser, *pins: str) -> str:
    """The verdict once these are pinned: a key or policy, keys of witnesses, and how many of them."""
    page.run(f"pin({', '.join(map(json.dumps, pins))})")
    return page.verdict()


def submit(page: Browser, **fields: str) -> None:
    """Fills in the form that pins, and sends it off."""
    for name, value in fields.items():
        page.run(f"$({json.dumps(name)}).value = {json.dumps(value)}; $({json.dumps(name)}).oninput?.()")
    page.run("$('pin').requestSubmit()")


def choose(page: Browser, path: Path) -> None:
    """Chooses a file in the page's form."""
    root = page.call("DOM.getDocument")["root"]["nodeId"]
    node = page.call("DOM.querySelector", nodeId=root, selector="#file")["nodeId"]
    page.call("DOM.setFileInputFiles", files=[str(path)], nodeId=node)


def awaited(page: Browser, script: str) -> Any:
    """What the promise that a script gives is resolved with."""
    answer = page.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
    assert "exceptionDetails" not in answer, answer
    return answer["result"].get("value")


@pytest.mark.slow
def test_P1_as_many_witnesses_as_are_asked_for(three: LogOfThree, browser: Browser) -> None:
    """A healthy log of 2 of 3 is verified with the keys of all three. Too few is not refused, but not verified."""
    key, (first, second, dark), every = three.key, three.witnesses, "\n".join(three.witnesses)
    ours = f"log {key}\nwitness a {first}\nwitness b {second}\nwitness c {dark}\n"
    browser.open(at_hash(three.url, "signed-1.0.whl"))
    assert browser.verdict() == "consistent"
    for verdict, says, *pins in [
        ("verified", f"Verified: a file of this name is entry 0 of the 2 that {LOG.name} has signed.", key),
        ("verified", "cosigned by 2 of your 3 witnesses.", key, every, "2"),
        ("verified", "cosigned by 2 of your 3 witnesses.", key, every, "1"),
        ("verified", "cosigned by 2 of your 2 witnesses.", key, f"{first}\n{second}"),
        ("short", "Not verified: only 2 of the 3 witnesses that you ask for have cosigned.", key, every),
        ("short", "Not verified: only 2 of the 3 witnesses that you ask for have cosigned.", key, every, "3"),
        ("short", "only 1 of the 2 witnesses that you ask for have cosigned.", key, f"{first}\n{dark}", "2"),
        ("short", "Not verified: none of your witnesses has cosigned.", key, dark),
        ("unchecked", "Not verified: 4 of 3 can't be asked for.", key, every, "4"),
        ("unchecked", "not a decimal", key, every, "1e0"),
        ("unchecked", "1 of 0 can't be asked for", key, "", "1"),
        ("unchecked", "the same key twice", key, f"{first}\n{first}"),
        ("unchecked", "Not verified: the key ID", key[:-4], ""),
        ("refused", "Refused: ", ANOTHER_LOG, every, "1"),
        ("verified", "cosigned by 2 of your 3 witnesses.", three.policy),
        ("verified", "cosigned by 2 of your 3 witnesses.", f"{ours}quorum none\n"),
        ("verified", "Verified: ", f"{ours}quorum a\n"),
        ("verified", "Verified: ", f"{ours}group g all a b\ngroup h any g c\nquorum h\n"),
        ("short", "only 2 of the 3 witnesses that you ask for", f"{ours}group g all a b c\nquorum g\n"),
        ("short", "none of your witnesses has cosigned.", f"{ours}quorum c\n"),
        ("short", "too few for your policy have cosigned.", f"{ours}group g any a b\ngroup h all g c\nquorum h\n"),
        ("verified", "Verified: ", f"log {ANOTHER_LOG}\n{ours}quorum a\n"),
        ("refused", "Refused: ", f"log {ANOTHER_LOG}\nwitness a {first}\nquorum a\n"),
    ]:
        assert pin(browser, *pins) == verdict, (pins, browser.text("#results"))
        assert says in browser.text(".verdict"), browser.text(".verdict")
        assert ("Don't trust it" in browser.text("article")) == (verdict == "refused")
        assert browser.run("document.querySelector('.fold').open") == (verdict == "refused")
    assert browser.complaints == []


@pytest.mark.slow
def test_P1_the_form_takes_keys_or_a_policy(three: LogOfThree, browser: Browser) -> None:
    """What is pinned stays for the next visit; what can't be used is not pinned; old pins still work."""
    every = "\n".join(three.witnesses)
    browser.open(at_hash(three.url, "signed-1.0.whl"))
    assert browser.verdict() == "consistent"
    browser.run("document.querySelector('details').open = true")
    bottom = browser.run("$('k').getBoundingClientRect().bottom")
    assert browser.run("document.querySelector('#pin button').getBoundingClientRect().top") > bottom
    submit(browser, key=f" {three.key}\n", trusted=every, k="2")
    assert eventually(lambda: browser.text(".verdict.good")).startswith("Verified: ")
    browser.open(at_hash(three.url, "plain-1.0.whl"))
    assert browser.verdict() == "verified"
    assert browser.run("[$('key').value, $('trusted').value, $('k').value]") == [three.key, every, "2"]
    # A policy needs neither of the other fields.
    submit(browser, key=three.policy)
    assert eventually(lambda: browser.text("#whose") == "the policy that you pinned")
    assert browser.verdict() == "verified"
    assert browser.run("$('simple').hidden && localStorage.getItem('witnesses')") == ""
    assert browser.text("#remark") == "The server gives it, too."
    for text, says in {
        three.policy[:-1]: "the policy's last line has no line break: was it cut off?",
        three.policy.replace("group g 2", "group g 4"): "line 5 of the policy: 4 of 3 can't be asked for",
        three.policy.replace("quorum g\n", ""): "the policy has no quorum line",
        three.policy.replace("log ", "# log "): "the policy has no log line",
        "hello world\n": "line 1 of the policy: not a log, witness, group or quorum line",
        "hello": "not a verifier key: hello",
    }.items():
        submit(browser, key=text)
        assert eventually(lambda: "Not pinned: " in browser.text("#remark.bad"))
        assert says in browser.text("#remark"), (text, browser.text("#remark"))
        assert browser.run("localStorage.getItem('key')") == three.policy
        browser.run("showKeys()")
    browser.run("$('forget').click()")
    assert browser.verdict() == "consistent"
    assert browser.run("$('key').value") == three.key
    assert not browser.run("$('simple').hidden")
    # What the page before this one has stored has no number: each of the witnesses has to have cosigned.
    for trusted, verdict in ("\n".join(three.witnesses[:2]), "verified"), (every, "short"):
        pins = json.dumps([["key", three.key], ["witnesses", trusted]])
        browser.run(f"localStorage.clear(); {pins}.forEach(pair => localStorage.setItem(...pair))")
        browser.open(at_hash(three.url, "signed-1.0.whl"))
        assert browser.verdict() == verdict


@pytest.mark.slow
def test_P1_a_false_cosignature_is_refused(three: LogOfThree, browser: Browser) -> None:
    """Also where enough others have cosigned; only the signatures of keys that nobody pinned don't matter."""
    (first, second, dark), every = three.witnesses, "\n".join(three.witnesses)
    for line in 1, 2:
        with tampering(three.url, change_line(2, line, lambda line: flipped(line, 30))) as between:
            browser.open(at_hash(between, "signed-1.0.whl"))
            for pins in (three.key, every, "1"), (three.key, every, "2"), (three.key, every), (three.policy,):
                assert pin(browser, *pins) == "refused", pins
                assert "What does not hold: The cosignatures are true." in browser.text("article > .small")
            assert sorted(pin(browser, three.key, witness) for witness in (first, second)) == ["refused", "verified"]
    # One of the two is not there, or is there twice, or a false one stands under the name of the third.
    third = VerifierKey.parse(dark)
    false = btlog.signature_line(third.name, third.key_id, bytes(7) + b"\1" + bytes(64))
    for verdict, change in {
        "short": lambda lines: lines[:-1],
        "verified": lambda lines: [*lines, lines[-1]],
        "refused": lambda lines: [*lines, false],
    }.items():

        def tamper(path: str, data: bytes, change: Callable[[list[str]], list[str]] = change) -> bytes:
            head, _, signatures = data.decode().rpartition("\n\n")
            lines = change(signatures.splitlines(keepends=True))
            return f"{head}\n\n{''.join(lines)}".encode() if path.endswith("/proof") else data

        with tampering(three.url, tamper) as between:
            browser.open(at_hash(between, "signed-1.0.whl"))
            assert pin(browser, three.policy) == verdict, browser.text("#results")


# --- P1: the parser of policies, by that of btlog.py

PAGE_POLICIES = f"log {LOG_VKEY} https://log.example/\nwitness a {WITNESS_VKEY_4}\ngroup b 1 a\nquorum b\n"
OTHERS = [encode_vkey(VerifierKey(f"w{i}", 4, bytes([i]) * 32)) for i in range(4)]
FOUR = f"log {LOG_VKEY}\n" + "".join(f"witness w{i} {vkey}\n" for i, vkey in enumerate(OTHERS))
GOOD_PINS = [
    PAGE_POLICIES,
    PAGE_POLICIES.replace(" ", "\t \t"),
    f"# a comment\n\n \t\n{PAGE_POLICIES}\n#\n",
    PAGE_POLICIES + "# é \u2028 \x80\n",
    f"log {LOG_VKEY}\nquorum none\n",
    f"log {LOG_VKEY}\nwitness a {WITNESS_VKEY} https://é.example\nquorum a\n",
    f"log {LOG_VKEY}\nwitness a {PQ_VKEY}\nquorum a\n",
    f"log {LOG_VKEY}\nwitness constructor {WITNESS_VKEY}\ngroup __proto__ any constructor\nquorum __proto__\n",
    f"log {LOG_VKEY}\nlog {encode_vkey(VerifierKey('x', 1, bytes(32)))}\nquorum none\n",
    *(f"log {vkey}\n{PAGE_POLICIES}" for vkey in (PQ_VKEY, "a+00000000+Ag==", f"{PQ_VKEY} u")),
    f"{FOUR}group g 2 w0 w1 w2\nquorum g\n",
    f"{FOUR}group g all w0 w1\ngroup h any w2 w3\ngroup i 1 g h\nquorum i\n",
    f"{FOUR}group g any w0 w1\ngroup h 2 g w2 w3\nquorum h\ngroup i any h\n",
    f"{FOUR}" + "".join(f"group g{i} any {f'g{i - 1}' if i else 'w0'}\n" for i in range(100)) + "quorum g99\n",
]
BAD = [
    *("", "\n", "quorum none", PAGE_POLICIES[:-1], f"\ufeff{PAGE_POLICIES}", PAGE_POLICIES.replace("\n", "\r\n"), PAGE_POLICIES + "\x00\n"),
    *(PAGE_POLICIES + line for line in ("quorum b\n", "quorum none\n", "what\n", "Log x\n", "log\n", "\x7f\n", "\x0b\n")),
    *(PAGE_POLICIES + f"log {vkey}\n" for vkey in (LOG_VKEY, WITNESS_VKEY_4, f"{LOG_VKEY}=", f"{LOG_VKEY} u v", "a+00000000+")),
    *(f"log {PQ_VKEY}\n" * n + PAGE_POLICIES.replace(log, "") for n, log in ((2, "-"), (1, f"log {LOG_VKEY} https://log.example/\n"))),
    *(PAGE_POLICIES + f"witness {words}\n" for words in ("c", f"c {WITNESS_VKEY}", f"a {OTHERS[0]}", f"none {OTHERS[0]}")),
    *(PAGE_POLICIES + f"group {words}\n" for words in ("a any b", "c any", "c 1 a", "c 1 b b", "c 2 b", "c 0 b", "c 01 b")),
    *(PAGE_POLICIES + f"group {words}\n" for words in ("c -1 b", "c 1.0 b", "c ١ b", "c 1 none", "none 1 b", "c ANY b")),
    *(PAGE_POLICIES + f"group {words}\n" for words in ("c 1 c", f"c {2**64} b", "c toString b", "b 1 b")),
    *(PAGE_POLICIES.replace("quorum b", text) for text in ("quorum", "quorum c", "quorum a b", "quorum log", "#quorum b")),
    *(PAGE_POLICIES.replace("group b 1 a", f"group b 1 a\xa0{space}") for space in ("", " ", "c")),
    f"group b 1 a\nwitness a {WITNESS_VKEY}\nlog {LOG_VKEY}\nquorum b\n",
    PAGE_POLICIES.replace(WITNESS_VKEY_4, f"{WITNESS_VKEY_4}\xa0"),
    PAGE_POLICIES.replace(WITNESS_VKEY_4, encode_vkey(VerifierKey("a" * 255, 4, bytes(32))).replace("a" * 255, "a" * 256)),
    f"{FOUR}" + "".join(f"group g{i} any {f'g{i - 1}' if i else 'w0'}\n" for i in range(101)) + "quorum g100\n",
    f"{PAGE_POLICIES}#{'x' * 1_000_000}\n",
]


def refusals(page: Browser, texts: list[str]) -> list[bool]:
    """Which of these policies the page refuses."""
    script = "Promise.all(%s.map(text => parsePolicy(text).then(() => false, () => true)))"
    found: list[bool] = awaited(page, script % json.dumps(texts))
    return found


def is_refused(text: str) -> bool:
    """True where parse_policy refuses a text, or where it names no log: a page could verify nothing by that."""
    try:
        return not parse_policy(text.encode()).logs
    except Malformed:
        return True


@pytest.mark.slow
def test_P1_policies_are_read_as_by_parse_policy(log: LocalLog, browser: Browser) -> None:
    """The page refuses what parse_policy refuses, also of texts of one byte changed, and counts as it does."""
    browser.open(log.url)
    for texts, expected in (GOOD_PINS, False), (BAD, True):
        assert [is_refused(text) for text in texts] == refusals(browser, texts) == [expected] * len(texts)
    changed = [
        f"{PAGE_POLICIES[:at]}{new}{PAGE_POLICIES[at + 1 :]}"
        for at, old in enumerate(PAGE_POLICIES)
        for new in {"", old * 2, *"\n #+é\x1f", *(chr(ord(old) ^ 1 << i) for i in range(7))}
    ]
    assert len(changed) > 2000
    assert [t for t, why in zip(changed, refusals(browser, changed), strict=True) if why != is_refused(t)] == []
    for text in GOOD_PINS:
        policy = parse_policy(text.encode())
        keys = [key for key in policy.witnesses if key.kind == btlog.COSIGNATURE]
        subsets = [[key for i, key in enumerate(keys) if n >> i & 1] for n in range(1 << len(keys))]
        script = f"""parsePolicy({json.dumps(text)}).then(policy => {json.dumps([[k.name for k in s] for s in subsets])}
            .map(names => met(policy.quorum, policy.witnesses.filter(key => names.includes(key.name)))))"""
        assert awaited(browser, script) == [policy.quorum.met(subset) for subset in subsets]


# --- P2: what a visitor sees first


@pytest.mark.slow
def test_P2_an_empty_log_shows_how_to_begin(log: LocalLog, browser: Browser) -> None:
    """No table of zeros, but a first command; and then the entry, without a reload."""
    shown = "['next', 'tree', 'recent', 'since'].filter(id => $(id).checkVisibility())"
    browser.open(log.url)
    assert browser.run(shown) == ["next"]
    assert browser.text("#h-next") == "This log is empty"
    assert browser.text("#first") == f"python btlog.py add FILE --log-url {log.url}"
    assert "0.00" not in browser.run("document.body.innerText")
    assert add(log.url, Entry("first-1.0.whl", CONTENT_SUM).encode())[0] == 200
    browser.run("poll()")
    assert eventually(lambda: browser.run(shown) == ["tree", "recent", "since"])
    assert browser.text("#size") == "1"
    assert eventually(lambda: browser.text("#newest a")) == "first-1.0.whl"
    assert "0.00" not in browser.run("document.body.innerText")  # there was no bulk
    assert browser.complaints == []


@pytest.mark.slow
def test_P2_the_verdict_stands_first(three: LogOfThree, browser: Browser) -> None:
    """Steps are folded unless they refuse. A first result is no alarm, and no proof. A name has to be exact."""
    browser.open(at_hash(three.url, "signed-1.0.whl"))
    for key, verdict, look in ("", "consistent", "calm"), (three.key, "verified", "good"), (ANOTHER_LOG, "refused", "bad"):
        assert (pin(browser, key) if key else browser.verdict()) == verdict
        assert browser.run("document.querySelector('article').firstElementChild.className") == f"verdict {look}"
        assert browser.run("document.querySelector('.steps').checkVisibility()") == (look == "bad")
        if look == "calm":
            assert browser.text(".verdict") == "Consistent: a file of this name is entry 0, by this server's own key."
            proof = "That is no proof yet: pin a key of the log that you got elsewhere"
            assert proof in browser.text("article > .small")
    for query, says in (
        ("signe", "No file and no project of this name is logged. Try the file's full name, its checksum, or drop the file here."),
        ("ff" * 32, "No file with this checksum is logged."),
    ):
        browser.open(at_hash(three.url, query))
        assert eventually(lambda: browser.text("#found.warn")).startswith(says)


@pytest.mark.slow
def test_P2_a_file_is_hashed_in_the_browser(tmp_path: Path, three: LogOfThree, browser: Browser) -> None:
    """By its checksum and its name: logged, logged otherwise, logged under another name, or not at all."""
    asked: list[str] = []

    def record(path: str, data: bytes) -> bytes:
        asked.append(path)
        return data

    with tampering(three.url, record) as between:  # answers GET only
        browser.open(between)
        browser.complaints.clear()
        browser.run(f"pin({json.dumps(three.policy)})")
        for name, content, verdict, says in [
            ("signed-1.0.whl", CONTENT, "verified", "Verified: your file is entry 0 of the 2 that"),
            ("plain-1.0.whl", CONTENT, "refused", "Refused: your file is not the one that is logged."),
            ("plain-1.0.whl", b"something else", "verified", "Verified: your file is entry 1 of the 2 that"),
            ("signed-1.0.whl", CONTENT + b"!", "refused", "Refused: your file is not the one that is logged."),
            ("renamed-1.0.whl", CONTENT, "verified", "Verified: your file is entry 0 of the 2 that"),
        ]:
            (tmp_path / name).write_bytes(content)
            choose(browser, tmp_path / name)
            wanted = f"document.querySelectorAll('article')[0]?.innerText.startsWith({json.dumps(says)})"
            assert eventually(functools.partial(browser.run, wanted))
            assert browser.run("document.querySelector('.verdict').dataset.verdict") == verdict
            said, sum_ = browser.text("#found"), f"sha256:{hashlib.sha256(content).hexdigest()}"
            if verdict == "refused":
                logged = OTHER_SUM if name == "plain-1.0.whl" else CONTENT_SUM
                both = f"The log has another checksum for this name: logged {logged}, your file {sum_}. It may"
                assert browser.text("article > .small.bad").startswith(both)
            elif name == "renamed-1.0.whl":
                assert said == "The log knows your file under another name: signed-1.0.whl"
                assert "The log has your file as signed-1.0.whl." in browser.text("article > .small")
            else:
                assert said == ""
        assert browser.run("location.hash + $('query').value") == ""
        # Two articles, and the one with another checksum is the first: the name of one file, the content of another.
        choose(browser, tmp_path / "signed-1.0.whl")
        (tmp_path / "plain-1.0.whl").write_bytes(CONTENT)
        choose(browser, tmp_path / "plain-1.0.whl")
        kinds = "[...document.querySelectorAll('.verdict')].map(e => e.dataset.verdict).join()"
        assert eventually(lambda: browser.run(kinds) == "refused,verified")
        # It is asked for by name again, and then it is no longer about the file.
        browser.run("$('query').value = 'plain-1.0.whl'; $('find').requestSubmit()")
        assert eventually(lambda: "a file of this name" in browser.text(".verdict.good"))
        # Dropped instead of chosen, and not logged
        browser.run("""{ const dataTransfer = new DataTransfer();
            dataTransfer.items.add(new File(["what"], "<b>dropped"));
            const event = new DragEvent("drop", {dataTransfer, bubbles: true, cancelable: true});
            document.querySelector("footer").dispatchEvent(event);
            must(event.defaultPrevented, "the browser would show the file"); }""")
        sum_ = hashlib.sha256(b"what").hexdigest()
        assert eventually(lambda: browser.text("#found.warn")).startswith(
            f"Neither the name nor the checksum of your file is logged: <b>dropped, sha256:{sum_}."
        )
        with (tmp_path / "big").open("wb") as big:
            big.truncate(2**30 + 1)
        choose(browser, tmp_path / "big")
        said = eventually(lambda: browser.text("#found.bad"))
        assert said.startswith("This page can't hash big: it has more than 1 GiB.")
        assert browser.complaints == []
    known = ("/.well-known/", "/status.json", "/entry/", "/entries?checksum=sha256%3A", "/entries?filename=")
    assert {path for path in asked if not path.startswith(known)} == {"/"}


# --- P4: both checksums where they differ


@pytest.mark.slow
def test_P4_a_changed_checksum_is_named(tmp_path: Path, three: LogOfThree, browser: Browser) -> None:
    """Where the proof doesn't fit the entry, the page says which checksum it has, and which one the log has."""
    evil = "sha256:" + "e" * 64
    for file, logged in ("signed-1.0.whl", CONTENT_SUM), ("plain-1.0.whl", OTHER_SUM):
        with tampering(three.url, in_answer(logged.encode(), evil.encode())) as between:
            browser.open(at_hash(between, file))
            for pins in ("",), (three.key,), (three.policy,), (ANOTHER_LOG,):  # nobody knows what another log has
                of = f"the proof is of {logged}" if ANOTHER_LOG in pins else f"the log has {logged}"
                assert pin(browser, *pins) == "refused"
                assert f"may have been changed: this answer has {evil}, {of}" in browser.text("article > .small")
    # Nor can an answer be passed off as what a file has: the entry that it shows is not what was signed.
    (tmp_path / "signed-1.0.whl").write_bytes(b"evil")
    evil = f"sha256:{hashlib.sha256(b'evil').hexdigest()}"
    forged = json.dumps({"entries": [{**json.loads(ask(three.url, "/entry/0")[2]), "checksum": evil}]}).encode()
    with tampering(three.url, lambda path, data: forged if path.startswith("/entries?") else data) as between:
        browser.open(between)
        browser.run(f"pin({json.dumps(three.policy)})")
        choose(browser, tmp_path / "signed-1.0.whl")
        assert browser.verdict() == "refused"
        assert f"this answer has {evil}, the log has {CONTENT_SUM}" in browser.text("article > .small")


# --- What an attack on all this found ---------------------------------------------------------------------------------------

A_HASH = HASHES["a"]
A_WHEEL = "x-1-py3-none-any.whl"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        # pip obeys the first `coding:` of the first two lines
        ("r.txt", f"# coding: utf-7 coding: utf-8\n# +AAo-evil==6.6\nx==1 --hash=sha256:{A_HASH}\n"),
        ("r.txt", f"# coding: utf-7\n# coding: utf-8\nx==1 --hash=sha256:{A_HASH}\n"),
        # without "/" it may be a project for uv; behind file: a folder, whose fragment counts for nothing
        ("r.txt", f"x-1.0.egg --hash=sha256:{A_HASH}\n"),
        ("r.txt", f"y==1 --hash=sha256:{A_HASH}\nx @ file://localhost/tmp/x-1.zip#sha256={A_HASH}\n"),
        # uv falls back to the source, unhashed
        ("uv.lock", f'version = 1\n[[package]]\nname = "x"\nversion = "1"\nsource = {{ url = "https://h.example/x-1.zip" }}\n'
                    f'wheels = [{{ filename = "x-1-cp27-cp27m-win32.whl", hash = "sha256:{A_HASH}" }}]\n'),
        # pip looks for a hash behind "&" in the URL that it makes of this
        ("pylock.toml", f'lock-version = "1.0"\ncreated-by = "x"\n[[packages]]\nname = "x"\narchive = {{ url = "https://h.example/'
                        f'{A_WHEEL}", subdirectory = "x&sha256={HASHES["b"]}", hashes = {{ sha256 = "{A_HASH}" }} }}\n'),
        ("pylock.toml", 'lock-version = "1.0"\ncreated-by = "x"\n[[packages]]\nname = "x"\ndirectory = { path = "x-1.zip/." }\n'),
        ("pdm.lock", f'[metadata]\nlock_version = "4.5.0"\n[[package]]\nname = "x"\nversion = "1"\nurl = "file:///tmp/tree"\n'
                     f'files = [{{ file = "{A_WHEEL}", hash = "sha256:{A_HASH}" }}]\n'),
        ("Pipfile.lock", '{"_meta": {"pipfile-spec": 6}, "default": {"x": {"path": "/tmp/x-1-py3-none-any.whl "}}, "develop": {}}'),
        ("poetry.lock", f'[[package]]\nname = "x"\nversion = "1"\nfiles = [{{ file = "{A_WHEEL}", hash = "sha256:{A_HASH}" }}]\n'
                        '[package.dependencies]\ny = { url = "https://h.example/y-1.zip" }\n[metadata]\nlock-version = "2.1"\n'),
    ],
)  # fmt: skip
def test_V_what_an_attack_found(tmp_path: Path, name: str, text: str) -> None:
    """Real installers took something else, or could have, where each of these was believed."""
    (tmp_path / name).write_text(text)
    with contextlib.suppress(Unavailable):
        assert [artifact for artifact in btlog.artifacts_of(str(tmp_path / name)) if artifact.trouble]


def test_V3_a_file_over_a_link_is_not_included(tmp_path: Path) -> None:
    """pip takes ".." away by text, and reads another file."""
    (tmp_path / "link").symlink_to(make(make(tmp_path / "a") / "b"))
    for folder in tmp_path, tmp_path / "a":
        (folder / "x.txt").write_text(f"x==1 --hash=sha256:{A_HASH}\n")
    (tmp_path / "r.txt").write_text("-r link/../x.txt\n")
    refuses(Unavailable, btlog.artifacts_of, str(tmp_path / "r.txt"))


def test_V4_only_a_line_of_its_own_asks_uv_for_hashes(tmp_path: Path) -> None:
    for line, loose in ("--require-hashes", False), ("--pre --require-hashes", True), ("--pre", True):
        (tmp_path / "r.txt").write_text(f"{line}\nx==1 --hash=sha256:{A_HASH}\n")
        assert [artifact.loose for artifact in btlog.artifacts_of(str(tmp_path / "r.txt"))] == [loose]


def test_W10_what_is_malformed_hides_nothing(locked: tuple[LocalLog, Path]) -> None:
    log, folder = locked
    (folder / "evil-1.0.zip").write_bytes(b"evil")
    (folder / "broken.json").write_text("{")
    code, _, err = verify(folder, "evil-1.0.zip", "broken.json", "--log-url", log.url)
    assert (code, "evil-1.0.zip: not logged" in err, "broken.json can't be parsed" in err) == (1, True, True)
    assert verify(folder, "pylock.toml", "broken.json", "--log-url", log.url)[0] == 2


def test_installed_distributions(tmp_path: Path, locked: tuple[LocalLog, Path]) -> None:
    """What came by a direct URL is verified; what was changed since is found; a bad package does not end the rest."""
    log, folder = locked
    site = make(tmp_path / "site")
    digest = base64.urlsafe_b64encode(hashlib.sha256(b"x = 1\n").digest()).decode().rstrip("=")
    info = {"url": "https://h.example/archived-2+1.zip", "archive_info": {"hashes": {"sha256": HASHES["d"]}}}
    (site / "json.py").write_text("raise SystemExit('this must not run')\n")
    for name, direct, record in [
        ("archived", json.dumps(info), f"archived.py,sha256={digest},6\n"), ("indexed", None, ""),
        ("broken", "{", f"broken.py,sha256={digest},6\n"), ("changed", json.dumps(info), f"changed.py,sha256={'0' * 43},6\n"),
        ("unhashed", json.dumps(info), "unhashed.py,,\n"),
    ]:  # fmt: skip
        meta = make(site / f"{name}-2.dist-info")
        (site / f"{name}.py").write_text("x = 1\n")
        (meta / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 2\n")
        (meta / "RECORD").write_text(record)
        if direct:
            (meta / "direct_url.json").write_text(direct)
    (tmp_path / "python").write_text(f"#!/bin/sh\nPYTHONPATH={site} exec {sys.executable} -S \"$@\"\n")
    (tmp_path / "python").chmod(0o755)
    (site / "json.py").unlink()
    (folder / "json.py").write_text("raise SystemExit('this must not run')\n")
    code, out, err = verify(folder, "--installed", str(tmp_path / "python"), "--log-url", log.url)
    assert (code, out.count("logged at index"), err.count("\n")) == (1, 1, 5), (out, err)
    for says in "changed: 1 of its files", "does not tell which file", "can't be read", "has no hash of unhashed.py":
        assert says in err
    for python in "no-such-python", "/bin/false", "/bin/echo":
        code, out, err = verify(folder, "--installed", python, "--log-url", log.url)
        assert (code, out, err.count("\n"), "does not list" in err) == (3, "", 1, True), err


# --- The gate: installers get only what is logged -----------------------------------------------------------------------------

PEP_691 = "application/vnd.pypi.simple.v1+json"
PIP_ACCEPTS = f"{PEP_691}, application/vnd.pypi.simple.v1+html; q=0.1, text/html; q=0.01"


class Gated:
    """An index of wheels, a log of some of them, and a gate before the index."""

    def __init__(self, folder: Path, source: btlog.ProofSource | None = None, **more: Any) -> None:
        self.folder, self.files, self.pages = folder, dict[str, dict[str, Any]](), dict[str, Answered]()
        (folder / "index").mkdir()
        self.index = Web(folder / "index")
        self.index.instead = self.answer
        for name in "good", "evil", "other":
            wheel_of(folder / "index" / f"{name}-1.0-py3-none-any.whl", name)
            self.list(f"{name}-1.0-py3-none-any.whl")
        self.store = found(folder / "log")
        self.log([self.files["good-1.0-py3-none-any.whl"], {"filename": "other-1.0-py3-none-any.whl", "hashes": {"sha256": "ab" * 32}}])
        demands = btlog.Demands(UNWITNESSED, **more.pop("demands", {}))
        source_ = btlog.LiveProofs(self.store) if source is None else source
        index = btlog.Index(f"{self.index.url}/simple", 1, 2)
        self.proofs = btlog.ProvedFiles(folder / "proxy.db", index, source_)
        self.gate = btlog.Gate(index, self.proofs, demands, **{"carry": False, **more})
        self.local = Local(btlog.GateHandler.of(self.gate))
        self.url = self.local.url

    def list(self, name: str, **more: Any) -> None:
        """Has the index list a file that it has, or, with `more`, says of it."""
        data = self.folder / "index" / name
        sha256 = hashlib.sha256(data.read_bytes()).hexdigest() if data.exists() else "cd" * 32
        self.files[name] = {"filename": name, "url": f"../../{name}", "hashes": {"sha256": sha256}, **more}

    def log(self, files: Iterable[dict[str, Any]]) -> None:
        entries = [Entry(file["filename"], f"sha256:{file['hashes']['sha256']}").encode() for file in files]
        self.store.append(entries, seal, True)

    def answer(self, path_: str) -> Answered | None:
        if path_ in self.pages:
            return self.pages[path_]
        if not (match := re.fullmatch(r"/simple/(.*)/", path_)):
            return None
        files = [file for file in self.files.values() if btlog.project_of(file["filename"]) == match[1]]
        page = {"meta": {"api-version": "1.0"}, "name": match[1], "files": files}
        return (200, PEP_691, json.dumps(page).encode()) if files else (404, "text/plain", b"")

    def page(self, project: str, accept: str = PIP_ACCEPTS) -> tuple[int, dict[str, str], bytes]:
        return ask(self.url, f"/simple/{project}/", accept=accept)

    def get(self, name: str) -> tuple[int, dict[str, str], bytes]:
        """What an installer gets over the link that the gate's page has for a file."""
        page = json.loads(self.page(btlog.project_of(name))[2])
        [link] = [file["url"] for file in page["files"] if file["filename"] == name]
        return ask(self.url, link)

    def close(self) -> None:
        self.local.close()
        self.gate.pool.shutdown()
        self.gate.index.source.close()
        self.proofs.close()
        self.index.close()
        self.store.close()


@pytest.fixture
def gated(tmp_path: Path) -> Iterator[Gated]:
    with contextlib.closing(Gated(tmp_path)) as gate:
        yield gate


def test_a_gate_sends_on_what_is_logged_and_refuses_the_rest(gated: Gated, caplog: pytest.LogCaptureFixture) -> None:
    """The sentence is where pip shows it, behind the status, and where uv does, in the body."""
    status, headers, _ = gated.get("good-1.0-py3-none-any.whl")
    assert (status, headers["location"]) == (302, f"{gated.index.url}/good-1.0-py3-none-any.whl")
    gated.list("good-2.0.tar.gz", hashes={})
    gated.list("good-3.0.tar.gz", url="file:///etc/passwd")
    gated.list("good-4.0.tar.gz", url="ftp://127.0.0.1/good-4.0.tar.gz")
    gated.log([gated.files["good-3.0.tar.gz"], gated.files["good-4.0.tar.gz"]])
    for name, why in {
        "evil-1.0-py3-none-any.whl": "not logged",
        "other-1.0-py3-none-any.whl": f"not logged, but with another checksum at index 1: the log has sha256:{'ab' * 32}",
        "good-2.0.tar.gz": "the index gives no SHA-256 for it",
        "good-3.0.tar.gz": "the index has it at a URL that is not http or https",
        "good-4.0.tar.gz": "the index has it at a URL that is not http or https",
    }.items():
        status, headers, body = gated.get(name)
        assert (status, headers["content-type"]) == (403, "application/problem+json")
        assert json.loads(body)["detail"].startswith(f"{name} is refused: {why}")
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", gated.local.port)) as connection:
            link = next(f["url"] for f in json.loads(gated.page(btlog.project_of(name))[2])["files"] if f["filename"] == name)
            connection.request("GET", link)
            assert connection.getresponse().reason.startswith(f"{name} is refused: {why}"[:300])
        assert f"{name} is refused: {why}" in caplog.text
    gated.list("good-1.0-py3-none-any.whl", url="../../a\r\nSet-Cookie: x\u2028é good.whl")
    gated.page("good")
    assert gated.get("good-1.0-py3-none-any.whl")[1]["location"] == f"{gated.index.url}/aSet-Cookie:%20x%E2%80%A8%C3%A9%20good.whl"
    assert b'{result="passed"} 2\n' in (metrics := ask(gated.url, "/metrics")[2])
    assert b'{result="refused"} 10\n' in metrics


def test_a_gate_lists_all_files_and_no_metadata_apart_from_them(gated: Gated) -> None:
    """A file that is left out would have an installer take an older one."""
    more = {"requires-python": ">=3.8, <4", "yanked": 'bad "<b>"', "size": 7, "upload-time": "2026-01-01T00:00:00Z"}
    gated.list("good-2.0.tar.gz", **more, **{"core-metadata": {"sha256": "00" * 32}, "dist-info-metadata": True})
    gated.list('good-3.0"><b>.tar.gz', hashes={})
    status, headers, body = gated.page("Good")
    assert (status, headers["location"]) == (308, "/simple/good/")
    status, headers, body = gated.page("good")
    page = json.loads(body)
    assert (status, headers["content-type"], page["name"]) == (200, PEP_691, "good")
    assert [file["filename"] for file in page["files"]] == ["good-1.0-py3-none-any.whl", "good-2.0.tar.gz", 'good-3.0"><b>.tar.gz']
    assert page["files"][1] == {
        "filename": "good-2.0.tar.gz", "url": f"/files/good/{'cd' * 32}/good-2.0.tar.gz", "hashes": {"sha256": "cd" * 32}, **more
    }  # fmt: skip
    for accept in "text/html", "*/*", "application/vnd.pypi.simple.v1+html":
        kind, body = (answer := gated.page("good", accept))[1]["content-type"], answer[2]
        assert kind == (accept if "pypi" in accept else "text/html; charset=utf-8")
        assert btlog.parse_links(body, btlog._Links(f"{gated.url}/simple/good/")) == [
            f"{gated.url}{file['url']}" + (f"#sha256={file['hashes']['sha256']}" if file["hashes"] else "") for file in page["files"]
        ]
        assert b"<b>" not in body
        assert b"metadata" not in body
        assert b'data-requires-python="&gt;=3.8, &lt;4" data-yanked="bad &quot;&lt;b&gt;&quot;">good-2.0.tar.gz</a>' in body
    assert gated.page("none")[0] == 404
    assert ask(gated.url, "/simple/good/", "POST", b"")[0] == 405
    for path_ in "/", "/simple", "/files/good", "/files/good/x", "/files/../../x/y", "/files/good/a/b/c", "/simple/a/b/":
        assert ask(gated.url, path_)[0] == 404, path_
    assert ask(gated.url, f"/files/good/{'00' * 32}/good-1.0-py3-none-any.whl")[0] == 403


def test_a_gate_offers_metadata_that_is_logged(gated: Gated, tmp_path: Path) -> None:
    """Once the file was asked for, and with the bytes that are logged; a monitor knows what these entries are."""
    with contextlib.closing(LocalLog(tmp_path / "asked")) as log:
        name, data = "good-1.0-py3-none-any.whl", b"Metadata-Version: 2.1"
        (tmp_path / "index" / f"{name}.metadata").write_bytes(data)
        sha256 = hashlib.sha256(data).hexdigest()
        gated.list(name, **{"core-metadata": {"sha256": sha256}})
        index = f"{gated.index.url}/simple"
        assert call_btlog("ingest", "--index-url", index, "--log-url", log.url, "--metadata", "good")[0] == 0
        assert [Entry.parse(data).filename for data in walk(log.url)] == [name, f"{name}.metadata"]
        (tmp_path / "key").write_text(LOG_VKEY)
        watched = ("monitor", "--log-url", log.url, "--public-key", str(tmp_path / "key"), "--index-url", index)
        assert call_btlog(*watched, "--storage-dir", str(tmp_path / "mirror"))[0] == 0
        gated.proofs._other = btlog.LoggedProofs(btlog.LogReader(log.url, 1), UNWITNESSED, ())
        assert b"metadata" not in gated.page("good")[2]
        link = f"/files/good/{gated.files[name]['hashes']['sha256']}/{name}"
        assert ask(gated.url, link)[0] == 302
        eventually(lambda: b"core-metadata" in gated.page("good")[2])
        [file] = json.loads(gated.page("good")[2])["files"]
        assert file["core-metadata"] == file["dist-info-metadata"] == {"sha256": sha256}
        page = gated.page("good", "text/html")[2].decode()
        assert f'data-core-metadata="sha256={sha256}" data-dist-info-metadata="sha256={sha256}"' in page
        assert ask(gated.url, f"{link}.metadata")[::2] == (200, data)
        (tmp_path / "index" / f"{name}.metadata").write_bytes(b"other")
        assert ask(gated.url, f"{link}.metadata")[0] == 403
        gated.list(name, **{"core-metadata": {"sha256": "00" * 32}})  # which is not what is logged
        assert b"core-metadata" not in gated.page("good")[2]
        assert ask(gated.url, f"{link}.metadata")[0] == 403
        gated.proofs._other._source.close()


def test_a_gate_before_an_index_in_html(gated: Gated) -> None:
    [good] = [file["hashes"]["sha256"] for file in gated.files.values() if "good" in file["filename"]]
    links = f'<a href="../../good-1.0-py3-none-any.whl#sha256={good}" data-requires-python="&gt;=3" data-yanked>x</a><a href="/y">y</a>'
    gated.pages["/simple/good/"] = 200, "text/html", links.encode()
    [file] = json.loads(gated.page("good")[2])["files"]
    assert (file["filename"], file["requires-python"], file["yanked"]) == ("good-1.0-py3-none-any.whl", ">=3", True)
    assert ask(gated.url, file["url"])[1]["location"] == f"{gated.index.url}/good-1.0-py3-none-any.whl"
    gated.pages["/simple/"] = 200, "text/html", b'<a href="good/">Good</a>'
    assert json.loads(ask(gated.url, "/simple/", accept=PIP_ACCEPTS)[2])["projects"] == [{"name": "good"}]
    assert b'<a href="/simple/good/">good</a>' in ask(gated.url, "/simple/")[2]


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (PEP_691, b"x"),
        (PEP_691, b"[]"),
        (PEP_691, b'{"files": [1]}'),
        (PEP_691, b'{"files": [{"filename": 1, "url": ""}]}'),
        (PEP_691, b'{"files": [{"filename": "a/b", "url": ""}]}'),
        (PEP_691, b'{"files": [{"filename": "\\ud800", "url": ""}]}'),
        (PEP_691, b'{"files": [{"filename": "a", "url": "", "hashes": [1]}]}'),
        (PEP_691, b'{"files": [{"filename": "a", "url": "http://[", "hashes": {}}]}'),
        (PEP_691, b"[" * 100_000),
        (PEP_691, b'{"files": [' + b"[]," * 500_001 + b"[]]}"),
        ("text/html", b"<a" + b" " * 100_000 + b">"),
        ("text/plain", b""),
        ("text/html", b"\xff"),
    ],
)
def test_a_gate_before_pages_that_are_none(gated: Gated, kind: str, body: bytes) -> None:
    gated.pages["/simple/good/"] = 200, kind, body
    status, _, said = gated.page("good")
    assert (status, b"no page of a package index" in said or body == b"[]") == (503, True), said
    status, _, said = ask(gated.url, f"/files/good/{'00' * 32}/good-1.0.tar.gz")
    assert (status, json.loads(said)["title"]) == (403, "not proved to be logged")


def test_a_gate_keeps_what_it_has_proved(gated: Gated, tmp_path: Path) -> None:
    """With the log gone, what was proved still serves; the rest is refused, with the reason."""
    assert gated.get("good-1.0-py3-none-any.whl")[0] == 302
    gated.log([gated.files["evil-1.0-py3-none-any.whl"]])
    gated.proofs._other = None
    assert gated.get("good-1.0-py3-none-any.whl")[0] == 302
    status, _, body = gated.get("evil-1.0-py3-none-any.whl")
    assert (status, "the index gives no proof, and there is no log to ask" in json.loads(body)["detail"]) == (403, True)
    gated.gate.demands = btlog.Demands(btlog.simple_policy([new_key("log.example/vectors").key]))  # which did not sign it
    assert gated.get("good-1.0-py3-none-any.whl")[0] == 403
    with contextlib.closing(sqlite3.connect(tmp_path / "proxy.db")) as db:
        assert db.execute("SELECT filename FROM proof").fetchall() == [("good-1.0-py3-none-any.whl",)]


def test_a_gate_forgets_the_oldest_proofs(gated: Gated, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(btlog, "MAX_PROVED", 3)
    for i in range(6):
        gated.proofs.keep(btlog.GateFile(f"{i}.whl", "sha256:x", ""), b"proof")
    kept = [i for i in range(6) if gated.proofs.kept(btlog.GateFile(f"{i}.whl", "sha256:x", ""))]
    assert kept == [3, 4, 5]


def test_a_gate_demands_publishers_and_freshness(tmp_path: Path) -> None:
    for n, (demands, why) in enumerate([({"issuer": "https://example.com"}, "it has no publisher"), ({"max_age": 60.0}, "not fresh enough")]):
        (tmp_path / str(n)).mkdir()
        with contextlib.closing(Gated(tmp_path / str(n), demands=demands)) as gated:
            status, _, body = gated.get("good-1.0-py3-none-any.whl")
            assert (status, why in json.loads(body)["detail"]) == (403, True), body


def test_a_gate_takes_proofs_from_the_index_first(gated: Gated) -> None:
    """In the page, or where the page says; what is false there does not hide what the log has."""
    proof = gated.store.proof(0, gated.store.checkpoint("published") or b"", btlog.Tiles(2, gated.store.tile))
    other, gated.proofs._other = gated.proofs._other, None
    name = "good-1.0-py3-none-any.whl"
    (gated.folder / "index" / "p").write_bytes(proof)
    for key, value, status in [
        ("_tlog-proof", proof.decode(), 302),
        ("tlog-proof", "../../p", 302),
        ("_tlog-proof", "../../missing", 403),
        ("_tlog-proof", "file:///etc/passwd", 403),
        ("_tlog-proof", proof.decode().replace("index 0", "index 1"), 403),
        ("_tlog-proof", 5, 403),
        ("_tlog-proof", "http://[bad", 403),
    ]:
        gated.list(name, **{key: value})
        assert gated.get(name)[0] == status, value
        with contextlib.closing(sqlite3.connect(gated.folder / "proxy.db")) as db, db:
            db.execute("DELETE FROM proof")
    gated.proofs._other = other
    assert gated.get(name)[0] == 302


def test_a_gate_carries_files_and_holds_them_to_their_checksum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small file is checked before it is answered; of a large one, the end is held back."""
    monkeypatch.setattr(btlog, "MAX_HELD", 1 << 19)
    with contextlib.closing(Gated(tmp_path, carry=True)) as gated:
        for name, size in ("good-2.0.tar.gz", 1 << 20), ("good-3.0.tar.gz", 1 << 10), ("good-4.0.tar.gz", 1 << 19):
            place, data = tmp_path / "index" / name, os.urandom(size)
            place.write_bytes(data)
            gated.list(name)
            gated.log([gated.files[name]])
            status, headers, body = gated.get(name)
            assert (status, headers["content-type"], body == data) == (200, "application/octet-stream", True)
            for changed in data[:-1] + b"x", data[:-1], data + b"x", b"", b"x" * size:
                place.write_bytes(changed)
                if len(changed) < 1 << 19:
                    status, _, body = gated.get(name)
                    assert (status, b"the index serves a file with sha256:" in body) == (403, True)
                else:
                    with pytest.raises(http.client.IncompleteRead) as short:
                        gated.get(name)
                    assert len(short.value.partial) <= size  # and not the end of what was changed
            place.unlink()
            status, _, body = gated.get(name)
            assert (status, "can't be had" in json.loads(body)["detail"]) == (403, True)


class Hostile(http.server.BaseHTTPRequestHandler):
    """What an index may lead a gate to: bytes that drip, and redirects that are long, endless, or lead back."""

    protocol_version, gate = "HTTP/1.1", ""

    def do_GET(self) -> None:
        if self.path == "/drip":
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                for _ in range(600):
                    self.wfile.write(b"x")
                    time.sleep(0.1)
            return
        self.send_response(302)
        self.send_header("Location", {"/fat": "/elsewhere", "/self": self.gate}.get(self.path, self.path))
        self.send_header("Content-Length", str(1 << 40))
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        pass


def test_a_gate_is_not_held_up_by_what_an_index_leads_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(btlog, "ANSWER_TIMEOUT", 0.5)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hostile)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    url, name = f"http://127.0.0.1:{server.server_address[1]}", "evil-1.0-py3-none-any.whl"
    try:
        for number, carry in enumerate([False, True]):
            (tmp_path / str(number)).mkdir()
            with contextlib.closing(Gated(tmp_path / str(number), carry=carry)) as gated:
                link = f"/files/evil/{gated.files[name]['hashes']['sha256']}/{name}"
                monkeypatch.setattr(Hostile, "gate", f"{gated.url}{link}")
                for path_ in "/drip", "/fat", "/loop", "/self":
                    gated.list(name, **({"url": url + path_} if carry else {"_tlog-proof": url + path_}))
                    if carry:
                        gated.proofs.keep(btlog.GateFile(name, f"sha256:{gated.files[name]['hashes']['sha256']}", ""), b"x")
                        gated.log([gated.files[name]])
                    gated.page("evil")
                    begun = time.monotonic()
                    assert ask(gated.url, link)[0] == 403
                    assert time.monotonic() - begun < 3
        assert memory() < 2000
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_a_gate_cuts_off_no_file_for_http_1_0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without chunks, a file that is cut off would look whole. HEAD is answered without ranges."""
    monkeypatch.setattr(btlog, "MAX_HELD", 1 << 10)
    with contextlib.closing(Gated(tmp_path, carry=True)) as gated:
        place = tmp_path / "index" / "good-2.0.tar.gz"
        place.write_bytes(os.urandom(5000))
        gated.list(place.name)
        gated.log([gated.files[place.name]])
        link = f"/files/good/{gated.files[place.name]['hashes']['sha256']}/{place.name}"
        with socket.create_connection(("127.0.0.1", gated.local.port)) as connection:
            connection.sendall(f"GET {link} HTTP/1.0\r\n\r\n".encode())
            assert all_of(connection).startswith(b"HTTP/1.1 403 good-2.0.tar.gz is refused: it is too large")
        status, headers, body = ask(gated.url, link, "HEAD")
        assert (status, headers["accept-ranges"], body) == (200, "none", b"")
        assert ask(gated.url, link)[2] == place.read_bytes()
        place.write_bytes(b"x" * 5000)
        before = gated.gate.results["refused"]
        with pytest.raises(http.client.IncompleteRead):
            ask(gated.url, link)
        assert gated.gate.results["refused"] == before + 1


def test_a_page_of_5000_files_takes_no_time(gated: Gated) -> None:
    for i in range(5000):
        gated.files[f"big-{i}.tar.gz"] = {"filename": f"big-{i}.tar.gz", "url": f"../../big-{i}.tar.gz", "hashes": {"sha256": f"{i:064}"}}
    for _ in range(2):
        begun = time.monotonic()
        ask(gated.index.url, "/simple/big/")
        alone, begun = time.monotonic() - begun, time.monotonic()
        assert len(json.loads(gated.page("big")[2])["files"]) == 5000
        more = time.monotonic() - begun - alone
    assert more < 1.5, more  # 0.14 to 0.32 s on a slow machine


def test_a_gate_as_a_command(tmp_path: Path) -> None:
    with contextlib.closing(Gated(tmp_path)) as gated:
        (tmp_path / "key").write_text(LOG_VKEY)
        where = ("--index-url", f"{gated.index.url}/simple", "--public-key", "key", "--storage-dir", "log")
        with running("proxy", *where, cwd=tmp_path) as gate:
            assert gate.line.endswith(f" pip install --index-url {gate.url}/simple/\n")
            link = f"/files/good/{gated.files['good-1.0-py3-none-any.whl']['hashes']['sha256']}/good-1.0-py3-none-any.whl"
            assert ask(gate.url, link)[0] == 302
            assert ask(gate.url, "/healthz")[0] == 200
            assert gate.stop() == (0, "")
    for words, says in [
        (("--proofs", "x", "--log-url", "http://127.0.0.1:1", "--public-key", str(tmp_path / "key")), "give one of"),
        ((), "give --policy F, or --public-key F"),
    ]:
        code, _, error = call_btlog("proxy", "--index-url", "http://127.0.0.1:1/simple", *words)
        assert (code, says in error) == (2, True)


@pytest.mark.slow
def test_installers_behind_a_gate(gated: Gated, tmp_path: Path) -> None:
    """Real pip and uv install what is logged and nothing else, and show the sentence of the gate."""
    from uv import find_uv_bin  # only slow tests need it

    wheel_of(tmp_path / "index" / "needs-1.0-py3-none-any.whl", "needs", "Requires-Dist: good")
    gated.list("needs-1.0-py3-none-any.whl")
    gated.log([gated.files["needs-1.0-py3-none-any.whl"]])
    where = ["--no-cache-dir", "--index-url", f"{gated.url}/simple/"]
    for name, modules, says in [
        ("needs", {"needs.py", "good.py"}, ""),
        ("evil", set(), "evil-1.0-py3-none-any.whl is refused: not logged"),
        ("other", set(), "other-1.0-py3-none-any.whl is refused: not logged, but with another checksum"),
    ]:
        for installer in [sys.executable, "-m", "pip"], [find_uv_bin(), "pip"]:
            target = tmp_path / "target"
            command = [*installer, "install", *where, "--target", str(target), name]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
            assert (done.returncode == 0) is bool(modules), done.stderr
            assert {file.name for file in target.glob("*.py")} == modules
            assert says in re.sub(r"\s+", " ", done.stderr)
            shutil.rmtree(target, ignore_errors=True)
    wheel_of(tmp_path / "index" / "good-1.0-py3-none-any.whl", "replaced")
    for gated.gate.carry, says in (False, "(?i)hash mismatch|do not match the hashes"), (True, "the index serves a file with"):
        for installer in [sys.executable, "-m", "pip"], [find_uv_bin(), "pip"]:
            command = [*installer, "install", *where, "--target", str(target), "good"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
            assert (done.returncode in (1, 2), [*target.glob("*.py")]) == (True, []), done.stderr
            assert re.search(says, re.sub(r"\s+", " ", done.stderr))


# --- The list of defects and this file, held against each other -------------------------------------------------------------


def test_every_lesson_has_a_test() -> None:
    """The numbers stand in names and docstrings of tests; 23 and 48 were never given."""
    borne: dict[int, list[str]] = {}
    for node in ast.parse(Path(__file__).read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            text = f"{node.name} {ast.get_docstring(node) or ''}"
            for number in re.findall(r"(?:\b|_)T([1-9][0-9]?)(?![0-9])", text):
                borne.setdefault(int(number), []).append(node.name)
    assert sorted(set(range(1, 69)) - {23, 48} - borne.keys()) == []
    assert borne.keys() <= set(range(1, 69)) - {23, 48}  # nor is there one that nobody can look up


# --- A world in a seed: logs, witnesses, a monitor and a thief in one thread, by the program's own code -------------------------
# Below them: a clock, disks, a network and processes that chance decides of. One seed is one history, and replays exactly.


class Killed(BaseException):
    """The process ends here."""


class Wrong(BaseException):
    """What must never be; no Exception, so that the program's own code can't take it for one of its errors."""


def must(condition: object, otherwise: str) -> None:
    if not condition:
        raise Wrong(otherwise)


@dataclass
class FakeSigned:
    signature: bytes


class FakeKey:
    """Signatures that only cost a hash: nobody forges one here but by holding the signer."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def sign(self, message: bytes) -> Any:
        return FakeSigned(fake_signature(self._key, message))


def fake_signature(key: bytes, message: bytes) -> bytes:
    return hashlib.sha512(key + message).digest()


class FakeSigner(btlog.Signer):
    @functools.cached_property
    def _key(self) -> Any:
        return FakeKey(self.key.key)

    @functools.cached_property
    def key(self) -> VerifierKey:
        return VerifierKey(self.name, 1, hashlib.sha256(self.seed).digest())


LOG_SIGNER = FakeSigner("log.example", b"log" * 10 + b"xx")
WITNESS_SIGNERS = [FakeSigner(f"w{i}.example", b"witness%d" % i * 4) for i in range(5)]
WORLD_KEYS = [signer.witness_key for signer in WITNESS_SIGNERS]
WORLD_ENTRIES = [Entry(f"x-{i}.zip", "sha256:" + hashlib.sha256(b"%d" % i).hexdigest()).encode() for i in range(200)]
WORLD_LEAVES = {entry: leaf_hash(entry) for entry in WORLD_ENTRIES}


TROUBLES = ["nothing", "nothing", "disks", "disks", "backup", "lost writes", "copy", "thief", "conspiracy"]


class History:
    """One history. `tainted` says that a log's disk went back, or a key got out."""

    def __init__(self, seed_: int) -> None:
        self.r, self.now, self.calm = random.Random(seed_), 1000.0, False
        n = self.r.choice([1, 3, 3, 4, 5])
        k = n // 2 + 1
        self.bad = self.r.choice(TROUBLES)
        # Fewer than any two quorums share, or enough for two histories.
        self.liars = k if self.bad == "conspiracy" else self.r.randrange(min(2 * k - n, n - k + 1)) if n > 1 else 0
        keys = WORLD_KEYS[: n + self.r.choice([0, 0, 1])]  # one may be outside of the quorum
        urls = tuple((key, f"http://w{i}.example") for i, key in enumerate(keys))
        self.policy = Policy((LOG_SIGNER.key,), tuple(keys), Quorum(k, tuple(keys[:n])), urls)
        self.tainted = self.bad not in ("nothing", "disks")
        self.trees: dict[bytes, tuple[bytes, ...]] = {btlog.EMPTY_ROOT: ()}  # the entries of each tree that was signed
        self.quorums: dict[int, bytes] = {}  # the roots of all trees that met the quorum, by size
        self.acked: dict[bytes, int] = {}
        self.later: list[tuple[float, int, Callable[[], None]]] = []
        self.events = 0
        self.trace = hashlib.sha256()
        outside = self.r.choice([LiarNode, WitnessNode])
        self.witnesses: list[WitnessNode] = [
            (outside if i >= n else LiarNode if i < self.liars else WitnessNode)(self, signer)
            for i, signer in enumerate(WITNESS_SIGNERS[: len(keys)])
        ]
        self.by_url = {f"http://w{i}.example": witness for i, witness in enumerate(self.witnesses)}
        self.logs = [LogNode(self, Shelf())]
        self.thief = Shelf()
        self.watcher = Watcher(self)
        self.pending: list[Pending] = []
        self.backup: Shelf | None = None
        self.next_entry = 0

    def chance(self, probability: float) -> bool:
        return not self.calm and self.r.random() < probability

    def at(self, delay: float, do: Callable[[], None]) -> None:
        self.events += 1
        bisect.insort(self.later, (self.now + delay, self.events, do), key=lambda item: item[:2])

    def note_tree(self, tree: Tree, entries: Sequence[bytes]) -> None:
        self.trees[tree.root] = tuple(entries)

    def met(self, note: bytes) -> Checkpoint:
        """A checkpoint that met the quorum: no other may contradict it."""
        try:
            checkpoint = open_checkpoint(note, self.policy)
        except btlog.Error as error:
            raise Wrong(f"a checkpoint that the policy does not accept: {error}") from None
        tree = checkpoint.tree
        self.trace.update(tree.root)
        if self.quorums.get(tree.size) != tree.root:
            must(self.bad == "conspiracy" or self.continues(self.trees[tree.root]), "two cosigned trees contradict each other")
            self.quorums[tree.size] = tree.root
        return checkpoint

    def continues(self, entries: Sequence[bytes]) -> bool:
        """If entries contradict nothing that has met the quorum."""
        return all(self.trees[root][: len(entries)] == tuple(entries[:size]) for size, root in self.quorums.items())

    def included(self, tree: Tree) -> None:
        """What is acknowledged is in a checkpoint that is published now."""
        entries = self.trees[tree.root]
        for entry, index in self.acked.items():
            must(entries[index : index + 1] == (entry,), f"acknowledged at {index}, and not in the tree of {tree.size}")

    def commit(self, apply: Callable[[], None]) -> None:
        """What a disk does with a commit."""
        if not self.chance(0.15 if self.bad == "disks" else 0.03):
            apply()
            return
        what = self.r.randrange(6)
        if what in (1, 3, 4):
            apply()
        if what < 2:
            raise Killed
        if what < 4:
            raise btlog.CommitFailed("the commit failed")
        if what == 5:
            raise btlog.Unavailable("database or disk is full")

    def step(self) -> None:
        self.now += self.r.choice([0, 0.001, 0.05, 0.4, 3])
        while self.later and self.later[0][0] <= self.now:
            self.later.pop(0)[2]()
        what = self.r.random()
        node = self.r.choice(self.logs)
        if what < (0.2 if self.calm else 0.45):
            self.submit(node)
        elif what < 0.5 and self.pending:
            self.r.choice(self.pending).give_up()
        elif self.chance(0.05):
            node.kill()
        elif self.chance(0.05):
            self.r.choice(self.witnesses).kill()
        elif what > 0.93:
            self.disaster()
        elif what > 0.85:
            self.watcher.look(node)
        for node in self.logs:
            node.run()
            if node.log and not self.tainted and node.log.sequencer.published:
                self.included(node.log.sequencer.published.tree)
        for waiting in self.pending:
            if waiting.log and waiting.node.log is waiting.log:
                machine = waiting.log.sequencer
                kept = [*machine.queue, *machine.unpublished, *(s for a in machine._todo if isinstance(a, btlog.Answer) for s in a.submissions)]
                must(waiting.submission in kept, "a client waits for what is forgotten")

    def disaster(self) -> None:
        """What the operator, or somebody else, does."""
        if self.calm:
            return
        if self.bad == "backup" and (self.backup is None or self.r.random() < 0.5):
            self.backup = self.logs[0].shelf.copy()
        elif self.bad == "backup":
            self.logs[0].kill()
            self.logs[0].shelf = cast(Shelf, self.backup).copy()
        elif self.bad == "copy" and len(self.logs) < 2:
            self.logs.append(LogNode(self, self.logs[0].shelf.copy()))
        elif self.bad == "lost writes" and len(self.logs[0].shelf.older) > 1:
            self.logs[0].kill()
            self.logs[0].shelf = self.r.choice(self.logs[0].shelf.older[-3:]).copy()
        elif self.bad in ("thief", "conspiracy"):
            self.steal()

    def steal(self) -> None:
        """The thief signs a history of its own, that begins with some part of the log's, and has it cosigned."""
        ours = self.logs[0].shelf.entries
        if self.r.random() < 0.4:
            self.thief.entries = ours[: self.r.randrange(len(ours) + 1)]
        self.thief.entries.append(self.r.choice(WORLD_ENTRIES[150:]))
        self.thief.entries = list(dict.fromkeys(self.thief.entries))
        tree = tree_over(self.thief.entries)
        self.note_tree(tree, self.thief.entries)
        note = LOG_SIGNER.sign(Checkpoint(LOG_SIGNER.name, tree))
        lines = []
        for witness in self.witnesses:
            old = min(witness.kept.tree.size if witness.kept else 0, tree.size)
            proof = tuple(btlog.prove_consistency(tiles_over(self.thief.entries), old))
            status, _, answer = witness.answer("POST", "/add-checkpoint", btlog.AddCheckpoint(old, proof, note).encode())
            lines += [answer] if status == 200 else []
        whole = note + b"".join(lines)
        with contextlib.suppress(btlog.Error):
            open_checkpoint(whole, self.policy)
            self.met(whole)
            self.watcher.notes.append(whole)

    def submit(self, node: LogNode) -> None:
        entry = WORLD_ENTRIES[self.next_entry % 120] if self.r.random() < 0.8 else self.r.choice(WORLD_ENTRIES[:120])
        self.next_entry += 1
        Pending(self, node, entry)

    def end(self) -> None:
        """Faults end, and those who lied still do. The log lives again, or it has said why it never will."""
        self.calm = True
        for node in self.logs:
            node.restart_at = min(node.restart_at, self.now + 1)
        for _ in range(24):
            self.step()
            self.now += 3
        for node in self.logs:
            halted = not node.log or (node.log.sequencer._halt_reason != "")
            must(self.tainted or not halted, f"a log whose disk is good has ended: {node.log and node.log.trouble}")
            if node.log and not halted and self.bad != "conspiracy":
                must(not node.log.trouble, f"it lives not again: {node.log.trouble}")
        self.watcher.end()


class Pending:
    """A client that waits for an answer, and gives up at some time."""

    def __init__(self, world: History, node: LogNode, entry: bytes) -> None:
        self.world, self.node, self.log, self.entry, self.begun, self.gone = world, node, node.log, entry, world.now, False
        self.submission = btlog.Submission([entry], False)
        self.submission.waiter = cast(Any, self)
        if self.log is None:
            return
        try:
            self.log.tell(btlog.Sequencer.submit, self.submission)
        except btlog.Unavailable:
            return
        world.pending.append(self)
        world.at(30, self.give_up)

    def give_up(self) -> None:
        if not self.gone and self.log and self.node.log is self.log:
            self.log.tell(btlog.Sequencer.give_up, self.submission)
        self.leave()

    def leave(self) -> None:
        self.gone = True
        if self in self.world.pending:
            self.world.pending.remove(self)

    # As a future, and as its loop

    def get_loop(self) -> Pending:
        return self

    def done(self) -> bool:
        return self.gone

    def call_soon_threadsafe(self, do: Callable[..., None], waiters: Any) -> None:
        do([self])

    def set_result(self, nothing: None) -> None:
        world, submission = self.world, self.submission
        must(not self.gone, "answered twice")
        self.leave()
        if submission.error:
            return
        tree = world.met(submission.published.note).tree
        [index] = submission.outcomes
        must(isinstance(index, int), "a conflict where there is none")
        index = cast(int, index)
        must(world.trees[tree.root][index : index + 1] == (self.entry,), "acknowledged with a tree that lacks it")
        if not world.tainted:
            must(world.acked.setdefault(self.entry, index) == index, "another index for the same entry")
            world.included(tree)


class Shelf:
    """What a log has on its disk."""

    def __init__(self) -> None:
        self.entries, self.notes, self.sizes = list[bytes](), dict[str, bytes](), dict[VerifierKey, int]()
        self.older: list[Shelf] = []

    def copy(self) -> Shelf:
        other = Shelf()
        other.entries, other.notes, other.sizes = list(self.entries), dict(self.notes), dict(self.sizes)
        return other


def tree_over(entries: Sequence[bytes]) -> Tree:
    return Tree(len(entries), tiles_over(entries).hash(0, len(entries)))


def tiles_over(entries: Sequence[bytes]) -> btlog.Tiles:
    return btlog.Tiles(len(entries), lambda level, index, width: b"".join(WORLD_LEAVES[e] for e in entries[:width]))


class WorldStore:
    """As LogStore, on a disk of the world."""

    folder, recovered = Path("log"), 0

    def __init__(self, world: History, shelf: Shelf) -> None:
        self.world, self.shelf, self.database = world, shelf, self
        if not shelf.notes:
            note = LOG_SIGNER.sign(Checkpoint(LOG_SIGNER.name, Tree(0, btlog.EMPTY_ROOT)))
            shelf.notes = {"signed": note, "published": note}

    def key(self) -> VerifierKey:
        return LOG_SIGNER.key

    def setting(self, name: str) -> None:
        return None

    def open(self, note: bytes | None, key: VerifierKey) -> Checkpoint:
        return open_checkpoint(note or b"", Policy((key,)))

    def checkpoint(self, kind: str) -> bytes | None:
        return self.shelf.notes.get(kind)

    def check_last_part(self) -> None: ...

    def tidy(self) -> None: ...

    def snapshot(self) -> Any:
        return contextlib.nullcontext()

    def probe(self) -> None:
        self.world.commit(lambda: None)

    def witnessed(self) -> dict[VerifierKey, int]:
        return dict(self.shelf.sizes)

    def tile(self, level: int, index: int, width: int) -> bytes:
        return b"".join(WORLD_LEAVES[entry] for entry in self.shelf.entries[:width])

    def append(self, entries: list[bytes], seal_: Callable[[Tree], bytes], publish: bool, **more: Any) -> list[btlog.Outcome]:
        draft, outcomes = self.shelf.copy(), list[btlog.Outcome]()
        for entry in entries:
            if entry not in draft.entries:
                draft.entries.append(entry)
            outcomes.append(draft.entries.index(entry))
        if len(draft.entries) > len(self.shelf.entries):
            tree = tree_over(draft.entries)
            self.world.note_tree(tree, draft.entries)
            if self.world.bad in ("backup", "lost writes"):  # what it has forgotten, its witnesses know
                must(self.world.continues(draft.entries), "it signs a second history")
            draft.notes["signed"] = seal_(tree)
            if publish:
                draft.notes["published"] = draft.notes["signed"]
            self._commit(draft)
        return outcomes

    def publish(self, note: bytes, sizes: dict[VerifierKey, int]) -> None:
        draft = self.shelf.copy()
        draft.notes["published"] = note
        draft.sizes |= sizes
        self._commit(draft)

    def _commit(self, draft: Shelf) -> None:
        def apply() -> None:
            if self.world.bad == "lost writes":
                self.shelf.older.append(self.shelf.copy())
            self.shelf.entries, self.shelf.notes, self.shelf.sizes = draft.entries, draft.notes, draft.sizes

        self.world.commit(apply)


class LogNode:
    """A log's process, and its disk."""

    def __init__(self, world: History, shelf: Shelf) -> None:
        self.world, self.shelf = world, shelf
        self.log: btlog.Log | None = None
        self.restart_at, self.shown = 0.0, 0  # the size of the last published tree

    def kill(self) -> None:
        self.log, self.restart_at = None, self.world.now + self.world.r.choice([0, 0.1, 5])

    def run(self) -> None:
        """Does what the sequencer wants now."""
        try:
            if self.log is None:
                if self.world.now < self.restart_at:
                    return
                store: Any = WorldStore(self.world, self.shelf)
                options = btlog.LogOptions(witness_timeout=2, republish_interval=60)
                self.log = btlog.Log(store, LOG_SIGNER, self.world.policy, options)
                for caller in self.log.witnesses:
                    cast(Caller, caller).node = self
                there = self.log.sequencer.published
                must(self.world.tainted or (there.tree.size if there else 0) >= self.shown, "what was published is gone")
            while action := self.log.sequencer.next(self.world.now):
                if self.world.chance(0.01):
                    raise Killed
                if isinstance(action, btlog.Publish):
                    self._publishes(action)
                self.log._perform(action)
                if isinstance(action, btlog.Publish) and not self.log.trouble:
                    self.shown = action.checkpoint.tree.size
                if self.log.failed.is_set():  # it ends with exit code 3, and is started again
                    raise Killed
        except Killed:
            self.kill()

    def _publishes(self, action: btlog.Publish) -> None:
        checkpoint = self.world.met(action.checkpoint.note)
        before = self.log.sequencer.published if self.log else None
        must(not before or checkpoint.tree.size >= before.tree.size, "a smaller tree is published")
        if not self.world.tainted:
            self.world.included(checkpoint.tree)


class Caller(btlog.WitnessClient):
    """As WitnessClient, without its thread: what it asks is answered at one time, and the log hears of it at another."""

    node: LogNode

    def __init__(self, keys: Sequence[VerifierKey], url: str, size: int, timeout: float, log: Any) -> None:
        self.keys, self.url, self.size, self.name = keys, url, size, keys[0].name
        self.dark_since, self.error, self.cosigned, self.latency = 0.0, "", 0, btlog.Latency()
        self.world: History = log.store.world
        self._real, self._log = log, cast(Any, self)
        self._client: Any = self

    def ask(self, round_: btlog.CosigningRound) -> None:
        self.world.at(self.world.r.choice([0, 0.01, 1]) if not self.world.calm else 0, lambda: self._attend(round_))

    def tell(self, event: Callable[..., None], *args: Any) -> None:
        """An answer reaches the log later, or never, or twice."""
        def hear() -> None:
            if self.node.log is self._real:
                cast(btlog.Log, self._real).tell(event, *args)

        for _ in range(2 if self.world.chance(0.05) else 1):
            if not self.world.chance(0.05):
                self.world.at(self.world.r.choice([0, 0.01, 1, 4]) if not self.world.calm else 0, hear)

    # What WitnessClient wants of its log

    @property
    def signed(self) -> btlog.SignedNote:
        return cast(btlog.SignedNote, self._real.signed)

    @property
    def key(self) -> VerifierKey:
        return LOG_SIGNER.key

    def tiles(self, tree: Tree) -> btlog.Tiles:
        return cast(btlog.Tiles, self._real.tiles(tree))

    def request(self, method: str, path_: str, body: bytes | None, *more: Any) -> tuple[int, str, bytes]:
        """The network loses requests and answers, and brings requests again, later."""
        world, witness = self.world, self.world.by_url[self.url]
        if world.chance(0.05):
            raise btlog.Unavailable("not reached")
        if world.chance(0.05):
            world.at(world.r.choice([0.1, 1, 10]), lambda: witness.answer(method, path_, body or b"") and None)
        answer = witness.answer(method, path_, body or b"")
        if answer[0] == 0 or world.chance(0.05):
            raise btlog.TimedOut("timed out")
        return answer


class WitnessNode:
    """A witness's process, and its disk: the last checkpoint that it cosigned, which only the program's code changes."""

    def __init__(self, world: History, signer: btlog.Signer) -> None:
        self.world, self.signer, self.restart_at = world, signer, 0.0
        self.kept: btlog.Witnessed | None = None
        self.witness: btlog.Witness | None = None
        self.skew = world.r.choice([0, 0, -100, 250]) if world.bad != "nothing" else 0
        self.latest = 0  # the time of its last cosignature

    def kill(self) -> None:
        self.witness, self.restart_at = None, self.world.now + self.world.r.choice([0, 1, 5])
        self.skew += self.world.r.choice([0, 0, -50, 50])

    def clock(self) -> float:
        return self.world.now + self.skew

    def answer(self, method: str, path_: str, body: bytes) -> tuple[int, str, bytes]:
        """Status 0: there is no answer."""
        try:
            if self.witness is None:
                if self.world.now < self.restart_at and not self.world.calm:
                    return 0, "", b""
                self.witness = btlog.Witness(cast(Any, WorldWitnessStore(self)), self.signer, self.clock)
            return self._post(body) if method == "POST" else self._get()
        except Killed:
            self.kill()
            return 0, "", b""

    def _get(self) -> tuple[int, str, bytes]:
        return (200, "", self.kept.note) if self.kept else (404, "", b"")

    def _post(self, body: bytes) -> tuple[int, str, bytes]:
        witness = cast(btlog.Witness, self.witness)
        job = Job(LOG_SIGNER.name, btlog.AddCheckpoint.parse(body))
        if witness.failed.is_set():
            self.kill()
            return 503, "", b"{}"
        witness._waiting = [cast(Any, job)]
        witness._process()
        if isinstance(job.error, btlog.Stale):
            return 409, "text/x.tlog.size", b"%d\n" % job.error.size
        if job.error:
            return job.error.status, "", str(job.error).encode()
        seconds = max(at for _, at in btlog.cosignature_times(b"x\n\n" + job.line.encode()))
        must(seconds >= self.latest, "its times go back")
        self.latest = seconds
        tree = Checkpoint.parse(btlog.split_note(job.request.note)[0]).tree
        must(self.kept and tree == self.kept.tree, "it cosigns what it has not stored")
        return 200, "", job.line.encode()


class Job:
    """As Cosigning, without an event loop."""

    def __init__(self, origin: str, request: btlog.AddCheckpoint) -> None:
        self.origin, self.request, self.line, self.done = origin, request, "", Done()

    @property
    def error(self) -> btlog.Error | None:
        return self.done.error


class Done:
    """As a future that is not done."""

    error: btlog.Error | None = None

    def done(self) -> bool:
        return False

    def set_exception(self, error: btlog.Error) -> None:
        self.error = error

    def set_result(self, nothing: None) -> None: ...


class WorldWitnessStore:
    """As WitnessStore, on a disk of the world."""

    def __init__(self, node: WitnessNode) -> None:
        self.node, self.database, self._draft = node, self, cast("btlog.Witnessed | None", None)

    def claim(self, key: VerifierKey) -> None: ...

    def tidy(self) -> None: ...

    def logs(self) -> dict[str, list[VerifierKey]]:
        return {LOG_SIGNER.name: [LOG_SIGNER.key]}

    def listed(self) -> dict[str, tuple[int, str]]:
        return {}

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Any]:
        self._draft = None
        yield self
        if self._draft is not None:
            self.node.world.commit(self._apply)

    def _apply(self) -> None:
        old, new = self.node.kept, cast(btlog.Witnessed, self._draft)
        if old:
            trees = self.node.world.trees
            must(new.tree.size >= old.tree.size, "its size falls")
            must(trees[new.tree.root][: old.tree.size] == trees[old.tree.root], "it cosigns what contradicts its last tree")
        self.node.kept = new

    def last(self, origin: str, query: Any) -> btlog.Witnessed | None:
        return self.node.kept

    def update(self, db: Any, origin: str, old: btlog.Witnessed | None, new: btlog.Witnessed) -> None:
        must(old is self.node.kept, "it compares with something else than is stored")
        self._draft = new

    def accuse(self, *what: Any) -> bool:
        return True


class LiarNode(WitnessNode):
    """It cosigns whatever it is shown, refuses, claims, or says nothing."""

    def answer(self, method: str, path_: str, body: bytes) -> tuple[int, str, bytes]:
        r = self.world.r
        if method != "POST":
            note = self.world.logs[0].shelf.notes.get(r.choice(["signed", "published"]))
            return r.choice([(404, "", b""), (200, "", note or b"x"), (200, "", b"garbage")])
        request = btlog.AddCheckpoint.parse(body)
        text = btlog.split_note(request.note)[0]
        line = self.signer.cosign(text, r.choice([1, int(self.world.now), 2**40]))
        return r.choice([
            (200, "", line.encode()), (200, "", line.encode()), (200, "", b"garbage\n"), (422, "", b""), (503, "", b""), (0, "", b""),
            (409, "text/x.tlog.size", b"%d\n" % r.randrange(200)), (200, "", WITNESS_SIGNERS[4].cosign(text, 7).encode()),
        ])  # fmt: skip


class Watcher:
    """A monitor, as far as it is no store: it sees published checkpoints, and holds each to the last one."""

    def __init__(self, world: History) -> None:
        self.world, self.last, self.findings = world, b"", list[btlog.Finding]()
        self.notes: list[bytes] = []  # what it can be shown beside what the logs publish
        self.seen: set[tuple[int, bytes]] = set()

    def look(self, node: LogNode) -> None:
        published_ = node.log.sequencer.published if node.log else None
        if self.notes and self.world.r.random() < 0.5:
            self.see(self.world.r.choice(self.notes))
        elif published_:
            self.see(published_.note)

    def see(self, note: bytes) -> None:
        world = self.world
        tree = open_checkpoint(note, world.policy).tree
        entries = world.trees[tree.root]
        try:
            if self.last:
                before = Checkpoint.parse(btlog.split_note(self.last)[0]).tree
                if tree.size <= before.size and tree != before:
                    whole = tiles_over(world.trees[before.root]).hash(0, tree.size) == tree.root
                    raise btlog.rollback_or_fork(before, tree, whole, {})
                btlog.monitor_step([self.last], note, tree, lambda size: tiles_over(entries).hash(0, size))
            self.last = note
        except btlog.Found as found:
            self.findings.append(found.finding)
        self.seen.add((tree.size, tree.root))

    def end(self) -> None:
        """What it has seen contradicts itself if and only if it has found that."""
        world = self.world
        roots = sorted(self.seen)
        forked = any(world.trees[b][:n] != world.trees[a] for (n, a), (_, b) in itertools.pairwise(roots))
        must(forked == any(finding.kind == "fork" for finding in self.findings), "a fork was seen, and not found")
        must(not forked or world.bad == "conspiracy", "two cosigned histories")
        must(world.tainted or self.findings == [], "a finding where there is nothing")


class FakeTime:
    """The module time, by a world's clock."""

    strftime, gmtime = staticmethod(time.strftime), staticmethod(time.gmtime)

    def __init__(self) -> None:
        self.world: History | None = None

    def monotonic(self) -> float:
        return self.world.now if self.world else 0.0

    time = monotonic


@contextlib.contextmanager
def simulated(trouble: str = "") -> Iterator[Callable[[int], str]]:
    """A function that plays the history of a seed, and returns what tells it from others; AssertionError if it is bad.

    With `trouble`, it plays only histories with that.
    """
    clock = FakeTime()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(btlog, "time", clock)
        patch.setattr(btlog, "WitnessClient", Caller)
        for owner, name in (btlog, "split_note"), (btlog, "parse_base64"), (Checkpoint, "parse"):  # only to be quick
            patch.setattr(owner, name, functools.lru_cache(1000)(getattr(owner, name)))
        patch.setattr(btlog, "VERIFIERS", dict.fromkeys((1, 4), lambda key, message, value: value == fake_signature(key, message)))
        patch.setattr(btlog.logger, "disabled", True)

        def play(seed_: int) -> str:
            world = clock.world = History(seed_)
            if trouble not in ("", world.bad):
                return ""
            try:
                for _ in range(40):
                    world.step()
                world.end()
            except Wrong as error:
                raise AssertionError(f"seed {seed_} ({world.bad}, {len(world.witnesses)} witnesses): {error}") from error
            return world.trace.hexdigest()

        yield play


# Defects of the program. Each one is found.


def careless_witness(patch: pytest.MonkeyPatch) -> None:
    process = btlog.Witness._process

    def careless(self: Any) -> None:
        jobs = list(self._waiting)
        process(self)
        if self.failed.is_set():
            self.failed.clear()
            for job in jobs:
                job.done.error = None

    patch.setattr(btlog.Witness, "_process", careless)


def forgetful_witness(patch: pytest.MonkeyPatch) -> None:
    begin = btlog.Witness.__init__

    def forgetful(self: Any, store: Any, *more: Any) -> None:
        store.node.kept = None
        begin(self, store, *more)

    patch.setattr(btlog.Witness, "__init__", forgetful)


def below_the_quorum(patch: pytest.MonkeyPatch) -> None:
    begin = btlog.Sequencer.__init__

    def eager(self: Any, signed: Any, published_: Any, policy: Policy, *more: Any) -> None:
        keys = policy.witnesses
        begin(self, signed, published_, dataclasses.replace(policy, quorum=Quorum(min(1, len(keys)), keys)), *more)

    patch.setattr(btlog.Sequencer, "__init__", eager)


def too_sure_at_a_start(patch: pytest.MonkeyPatch) -> None:
    begin = btlog.Sequencer.__init__

    def sure(self: Any, *more: Any) -> None:
        begin(self, *more)
        self.agreed = True

    patch.setattr(btlog.Sequencer, "__init__", sure)


def answers_before_publishing(patch: pytest.MonkeyPatch) -> None:
    done = btlog.Sequencer.done

    def early(self: Any, now: float, signed: Any = None) -> None:
        action = self._doing
        done(self, now, signed)
        if isinstance(action, btlog.Commit) and self.unpublished and self.published:
            self._todo.append(btlog.Answer(self.unpublished))
            self.unpublished = []

    patch.setattr(btlog.Sequencer, "done", early)


def forgets_what_the_disk_refused(patch: pytest.MonkeyPatch) -> None:
    refused_ = btlog.Sequencer.refused

    def forget(self: Any, now: float, error: str) -> None:
        if isinstance(self._doing, btlog.Commit):
            self._doing.batch.clear()
        refused_(self, now, error)

    patch.setattr(btlog.Sequencer, "refused", forget)


def publishes_in_memory(patch: pytest.MonkeyPatch) -> None:
    do = btlog.Log._do
    patch.setattr(btlog.Log, "_do", lambda self, action: None if isinstance(action, btlog.Publish) else do(self, action))


def takes_unknown_for_refused(patch: pytest.MonkeyPatch) -> None:
    do = btlog.Log._do

    def hopeful(self: Any, action: Any) -> Any:
        try:
            return do(self, action)
        except btlog.CommitFailed as error:
            raise btlog.Unavailable(str(error)) from None

    patch.setattr(btlog.Log, "_do", hopeful)


def trusts_its_clock(patch: pytest.MonkeyPatch) -> None:
    step = btlog.witness_step

    def trusting(last: Any, *more: Any) -> Any:
        return step(last and dataclasses.replace(last, seconds=1), *more)

    patch.setattr(btlog, "witness_step", trusting)


PLANTED: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "a witness answers although its commit failed": careless_witness,
    "a witness forgets a size when it ends": forgetful_witness,
    "a witness trusts its clock": trusts_its_clock,
    "a witness asks for no proof": lambda patch: patch.setattr(btlog, "check_consistency", lambda old, new, proof: None),
    "a log publishes below the quorum": below_the_quorum,
    "a log signs before its witnesses are heard": too_sure_at_a_start,
    "a log answers before it publishes": answers_before_publishing,
    "a log forgets what the disk refused": forgets_what_the_disk_refused,
    "a log publishes before that is on disk": publishes_in_memory,
    "a log takes an unknown outcome for a refusal": takes_unknown_for_refused,
    "a log goes on although a witness shows more": lambda patch: patch.setattr(
        btlog.WitnessClient, "_judge", lambda self, claim: btlog.UnprovenClaim(claim)
    ),
    "a monitor compares nothing": lambda patch: patch.setattr(btlog, "monitor_step", lambda *what: None),
}


def first_bad(name: str, seeds: Iterable[int]) -> tuple[int, str]:
    """The first seed whose history is bad, with this defect planted, and why; -1 if there is none."""
    plant, trouble = PLANTED[name], "conspiracy" * name.startswith("a monitor")  # else there is nothing to be found
    with pytest.MonkeyPatch.context() as patch, simulated(trouble) as play:
        plant(patch)
        for seed_ in seeds:
            try:
                play(seed_)
            except AssertionError as error:
                return seed_, str(error)
    return -1, ""


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_defect_is_found(name: str) -> None:
    found_at, why = first_bad(name, range(10_000))
    print(f"{name}: seed {found_at}: {why}")
    assert found_at >= 0


def test_five_hundred_histories() -> None:
    with simulated() as play:
        traces = [play(seed_) for seed_ in range(500)]
        assert [play(seed_) for seed_ in range(20)] == traces[:20]
        assert len(set(traces)) > 300


def play_all(seeds: range) -> int:
    with simulated() as play:
        for seed_ in seeds:
            play(seed_)
    return len(seeds)


HISTORIES = int(os.environ.get("BTLOG_HISTORIES", "100000"))


@pytest.mark.slow
def test_many_histories() -> None:
    """Those after the first thousand. On two cores, they take five minutes."""
    parts = [range(first, first + 1000) for first in range(1000, 1000 + HISTORIES, 1000)]
    with concurrent.futures.ProcessPoolExecutor() as pool:
        assert sum(pool.map(play_all, parts)) == HISTORIES


def simulate(seconds: float, first: int | None = None) -> None:
    """Plays histories for so long; ends with the first bad one, whose seed is printed."""
    until, seed_ = time.monotonic() + seconds, random.SystemRandom().randrange(1 << 32) if first is None else first
    begun = seed_
    with simulated() as play:
        while time.monotonic() < until:
            play(seed_)
            seed_ += 1
    print(f"{seed_ - begun} histories are as they should be, from seed {begun} on")


# --- How fast, and how large: `python test_btlog.py bench [MILLIONS]` -------------------------------------------------------


def bench(millions: int = 10) -> None:
    """Fills a log by bulks of 50,000 over HTTP, and prints what each million takes: time, memory and disk."""
    with tempfile.TemporaryDirectory(dir=HERE) as folder, running("serve", "--storage-dir", "log", cwd=Path(folder)) as server:
        for million in range(1, millions + 1):
            took = 0.0
            for first in range((million - 1) * 1_000_000, million * 1_000_000, 50_000):
                names_ = (f"package_{i % 9973}-{i // 9973}.{i % 17}.{i % 5}-py3-none-any{i}.whl" for i in range(first, first + 50_000))
                body = b"".join(as_line(named_entry(name, name)) for name in names_)
                start = time.perf_counter()
                answer = ask(server.url, "/admin/bulk/append", "POST", body, Content_Type="application/x-ndjson")[2]
                took += time.perf_counter() - start
                assert answer.count(b'"status":"logged"') == 50_000
            disk = size_of(Path(folder, "log")) / million / 1_000_000
            peak = peak_memory(server.process.pid)
            print(f"million {million}: {took:.1f} s, {peak:.0f} MiB at most, {disk:.0f} bytes an entry", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["bench"]:
        bench(*map(int, sys.argv[2:3]))
    elif sys.argv[1:2] == ["simulate"]:
        simulate(float(sys.argv[2]), *map(int, sys.argv[3:4]))
    else:
        sys.exit(subprocess.call([sys.executable, "-m", "pytest", *sys.argv[1:]], cwd=HERE))
