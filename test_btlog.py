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
import base64
import contextlib
import gzip
import hashlib
import http.client
import http.server
import io
import itertools
import json
import os
import random
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
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
    leaf_hash,
    node_hash,
    open_checkpoint,
    parse_policy,
)

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
COSIGNATURE = (
    "— witness.example/w1 N94kJgAAAABqsTuAzQRMu3OerpUMXbtCT1iOJS6zz0EdLgUuklV2j1LRxDLiQaQ2V3R6OHw2DXMrwcuvLgrgYvbBeJ2togkvWoECAQ==\n"
)
COSIGNED = SIGNED + COSIGNATURE
COSIGNED_AT = 1790000000
ROOTS = {  # of the first n of the entries "entry 0", "entry 1", …
    0: "47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=",
    1: "dziFphNIniTOLPdhmdakI/BC5LvxLX7s7pEu8nbGVwE=",
    2: "WkdmL9ijF9lgSaP59HxV3GfKZgUbqjaD27GbL+CaB7A=",
    3: "lPvQ3YNvUDAWkubQ6t5yjuGexSv/8WBu2AfIV11aqhk=",
    4: "l5nzB1F+9RfCIF35tndivzR1ayAJn7ffzOdrzr0nOy4=",
    5: "fKo0Xb2JKmZFTWxlEuo8PqPw0+whvj/C4jdXBf049nI=",
    6: "y+7JnbPk1n26qmDBa11M9zesLdwVB7eK83V2PrrRwB4=",
    7: "mMl/C6MXXNCLAx3QhLncTmSbZNGijm6mlGRlAxc6tYc=",
    8: "tpcyzlyRQWLKmsz69OldP5h01ogFQ3CIqv8YSk25Z3M=",
    9: "JA2btqVfDLN1tdAIJR5xRUWLexrchGOrj+92/RT3X2s=",
    15: "3ZednduKo2udzbV2BhOlYC9u84+nMbSdqCF62jbxuMg=",
    16: "xx5OIvnaHWqhEh6W7X4IV2WsZ7RVaDJqj/i3yN3iOl8=",
    17: "jdjVxVyqRcO5WYL8Fl5e3XIueSPvGQuynS3U7BGEue8=",
    31: "aEFZBAy92y635HIEYgTrPDqX624tmt0KqNmcvuVbqHE=",
    33: "YxCgz+StOp/7Pye3gNzz8z0PT8oGERhNY4ZifLKUkwU=",
    63: "EgzrwFkY/7GyUQ3TwFfYHXQWaeMRuc/d6Rhd+qUe3wc=",
    64: "XLzAg+gACv0VcwjMo+tUlHo5GHjMA3NrD8Rxvc2cTBw=",
    65: "r7Sal9INk9tb4xmIMCTHGgJOWmVdQvRss1Qflt86mU4=",
    127: "dKvd4JKE9Dd6FAfz72f5eWz8ceasRBUFJB1Jh5Qel5Q=",
    128: "Y9TldO9rV2Bvn1rrhx8jsQshQGvXUIJNxBcKNW6Adyk=",
    129: "zU+LJxfF2J55kj6aUGInRJ25DM0uZ5u8Ob3NpIr/kHI=",
    255: "z2Z5PmMp3/JC6zzuCm82rT46GW3MVzoex3XhAr6GPxw=",
    256: "2mWW2VNp9f7zIquOTg2jsLUCNqqcijsdJG90Ecni4y4=",
    257: "XB/f6DU1gCLyOS3keNvgU/wTDP4dOggoeakM9r8Uv34=",
    511: "uiTGt6wKXP4z1jM1r8HnaLsgypMfJxLzM+YIbyIp5KE=",
    512: "xtuUnnbP1dYUB8c6SBkhJlqwJOphMdAtxrcN79/U+to=",
    513: "eNZ0zD3mmFwl1kdju5aKzwItgn68EVhYSmYpuuvEwxw=",
    1000: "NGxrnLicS3b6ydyyDNqG46AcCldBfBOQKOrNRTj96Vs=",
    4096: "B22ASenXfQ7W6g2VF3zdj+x3PG3BDQa5GBF2RtLvxJ4=",
    65535: "uM1QRqGZab3H6JKJJyOQtA3WarGKeGbCC4kgpnUmaKU=",
    65536: "B7Gjd5YKThLjNI1ukymuYxapWwL7HCLpCSMbOqRIYac=",
    65537: "uZxXCq8TuW4CY4Po4lLmnHFCs61+bgJk89wQ39iE2MU=",
    65792: "Y8oZodj104kWrM5pXBaVKjxoeEh9FXjaGn5tWRnKFlY=",
    69999: "dwSVkzH4FloReNZwiqiwYAdFnCk3MoiZ/0VXh1Da3Y0=",
    70000: "o5IPun8jmgcam9EHIfE0Gt3vuu3ttBx+JEN6nRa98Ao=",
}
INCLUSION = [
    (0, 1), (0, 2), (1, 2), (2, 3), (0, 7), (3, 7), (6, 7), (5, 8), (99, 256), (255, 257), (256, 257), (511, 513), (512, 513),
    (12345, 65536), (65535, 65537), (65536, 65537), (0, 70000), (69999, 70000), (65791, 70000),
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
    (0, 1234067, 256): "tile/0/x001/x234/067", (0, 1234067, 8): "tile/0/x001/x234/067.p/8", (0, 273, 112): "tile/0/273.p/112",
    (1, 0, 256): "tile/1/000", (1, 1, 17): "tile/1/001.p/17", (2, 0, 1): "tile/2/000.p/1",
    (5, 1000000, 3): "tile/5/x001/x000/000.p/3", (7, 999, 255): "tile/7/999.p/255",
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
    return {(level, index): data for level, index, data in grown}


@pytest.fixture(scope="session")
def big() -> Callable[[int, int, int], bytes]:
    """Fetches the tiles of the tree of 70,000."""
    tiles = tiles_of(ENTRIES)
    return lambda level, index, width: tiles[level, index][: 32 * width]


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def refuses(kind: type[Error] | tuple[type[Error], ...], call: Callable[..., Any], *args: Any) -> None:
    with pytest.raises(kind):
        call(*args)


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


# --- Strict scalars ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["0", "1", "9", "10", "255", str(2**63 - 1)])
def test_decimal(text: str) -> None:
    assert btlog.parse_decimal(text) == int(text)


@pytest.mark.parametrize("text", ["", "+7", "-0", "-1", " 7", "7 ", "7\n", "1_000", "٧", "²", "00", "007", "0x1", "1e3", "1.0",
                                  str(2**63), "9" * 19, "9" * 5000])
def test_T42_decimals_have_one_form(text: str) -> None:
    refuses(Malformed, btlog.parse_decimal, text)


@pytest.mark.parametrize("text", ["Kjh=", "YQ", "YQ=", "YQ===", "YQ==\n", " YQ==", "Y Q==", "YR==", "YWI", "YWJ=", "é", "_-8=", "="])
def test_T41_T51_base64_has_one_form(text: str) -> None:
    refuses(Malformed, btlog.parse_base64, text)


def test_base64_lengths() -> None:
    assert btlog.parse_base64("") == b""
    assert btlog.parse_base64(b64(b"x" * 32), 32) == b"x" * 32
    for n in 0, 31, 33:
        refuses(Malformed, btlog.parse_base64, b64(b"x" * n), 32)


@given(st.binary(max_size=40))
def test_base64_roundtrip(data: bytes) -> None:
    assert btlog.parse_base64(b64(data)) == data == btlog.parse_base64(btlog.to_base64(data))


@pytest.mark.parametrize("data", [b"", b"a", b"a\r\n", b"a\x0bb\n", b"\x00\n", b"\x1f\n", b"\xff\n", b"\xed\xa0\x80\n", b"\xc0\x80\n"])
def test_T43_text_is_whole_lines_of_clean_utf8(data: bytes) -> None:
    refuses(Malformed, btlog.parse_text, data)


def test_T43_only_newline_ends_a_line() -> None:
    odd = "a\x7f\x85\u2028\u2029b"  # str.splitlines would cut at three of them
    assert btlog.parse_text(f"{odd}\n".encode()) == f"{odd}\n"


# --- Merkle trees ------------------------------------------------------------------------------------------------------

SMALL = 64
MTH = [mth(ENTRIES[:n]) for n in range(SMALL + 1)]


def test_roots_of_small_trees_and_hashes() -> None:
    assert leaf_hash(b"") == hashlib.sha256(b"\0").digest()
    assert node_hash(b"a" * 32, b"b" * 32) == hashlib.sha256(b"\1" + b"a" * 32 + b"b" * 32).digest()
    assert len(ROOTS) == 35
    for n, root in ROOTS.items():
        if n <= SMALL:
            assert b64(MTH[n]) == root


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


def test_T56_inclusion_exhaustively_in_small_trees() -> None:
    """Agrees with the RFC's definition for every entry of every tree up to 64, and nothing else passes."""
    tried = 0
    for n in range(1, SMALL + 1):
        tree = Tree(n, MTH[n])
        tiles = btlog.Tiles(n, lambda level, index, width: tiles_of(ENTRIES[:n])[level, index][: 32 * width])  # noqa: B023
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
        new = Tree(n, MTH[n])
        tiles = btlog.Tiles(n, lambda level, index, width: tiles_of(ENTRIES[:n])[level, index][: 32 * width])  # noqa: B023
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
    empty = Tree(0, hashlib.sha256(b"").digest())
    check_consistency(empty, empty, [])
    check_consistency(empty, Tree(5, MTH[5]), [])
    for old, new in (Tree(0, bytes(32)), Tree(5, MTH[5])), (empty, Tree(0, bytes(32))), (Tree(0, bytes(32)), Tree(0, bytes(32))):
        refuses(BadProof, check_consistency, old, new, [])
    refuses(BadProof, check_consistency, empty, Tree(5, MTH[5]), [MTH[5]])
    refuses(BadProof, check_inclusion, leaf_hash(b""), 0, empty, [])


@pytest.mark.parametrize(("size", "root"), [(-1, bytes(32)), (2**63, bytes(32)), (1, bytes(31)), (1, bytes(33)), (0, b"")])
def test_a_tree_is_a_size_and_a_hash(size: int, root: bytes) -> None:
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
        roots = [Tree(n, btlog.Tiles(n, big).hash(0, n)) for n in (old, new)]
        check_consistency(*roots, proof)
        digest.update(json.dumps([old, new, [b64(h) for h in proof]]).encode())
    assert digest.hexdigest() == PROOFS_DIGEST
    for (level, index, width), sha in TILE_DIGESTS.items():
        assert hashlib.sha256(big(level, index, width)).hexdigest() == sha


def test_many_proofs_at_once_are_the_same(big: Callable[[int, int, int], bytes]) -> None:
    choose = random.Random(3)
    for size in 1, 2, 3, 255, 256, 257, 1000, 65_535, 65_536, 65_537, 70_000:
        tiles = btlog.Tiles(size, big)
        some = sorted(set(choose.choices(range(size), k=20)) | {0, size - 1} | set(range(max(0, size - 300), size)))
        proofs = list(btlog.prove_many(tiles, some, "\n"))
        assert len(proofs) == len(some)
        for index, text in zip(some, proofs, strict=True):
            assert text == "\n".join(b64(h) for h in btlog.prove_inclusion(tiles, index))
    assert list(btlog.prove_many(btlog.Tiles(5, big), [], ",")) == []


def test_thousands_of_proofs_pinned(big: Callable[[int, int, int], bytes]) -> None:
    """One hash over 9,000 proofs: whatever changes the provers shows here."""
    rolling = hashlib.sha256()
    for size in 300, 4097, 69_632:
        tiles = btlog.Tiles(size, big)
        for i in range(1500):
            rolling.update(b"".join(btlog.prove_inclusion(tiles, i * 7919 % size)))
            rolling.update(b"".join(btlog.prove_consistency(tiles, 1 + i * 104_729 % size)))
    assert rolling.hexdigest() == "e00a9d497b0cdc50b495d0900e654de92af0597e395dafc972086b381e5839e8"


@given(st.integers(0, 600), st.lists(st.integers(1, 300), max_size=6))
def test_growing_in_steps_is_growing_at_once(first: int, steps: list[int]) -> None:
    tiles: dict[tuple[int, int], bytes] = {}
    size = 0
    for count in [first, *steps]:
        leaves = [leaf_hash(entry) for entry in ENTRIES[size : size + count]]
        edge = lambda level, index, width: tiles[level, index][: 32 * width]  # noqa: E731
        for level, index, data in list(btlog.grow(size, edge, leaves)):
            tiles[level, index] = data
        size += count
    assert tiles == tiles_of(ENTRIES[:size])
    assert btlog.Tiles(size, edge).hash(0, size) == mth(ENTRIES[:size])


# --- Keys and notes ----------------------------------------------------------------------------------------------------

LOG, WITNESS, PQ = VerifierKey.parse(LOG_VKEY), VerifierKey.parse(WITNESS_VKEY), VerifierKey.parse(PQ_VKEY)
SIGNER, COSIGNER = btlog.Signer.parse(LOG_SKEY), btlog.Signer.parse(WITNESS_SKEY)
POLICY = btlog.simple_policy([LOG], [WITNESS])
UNWITNESSED = btlog.simple_policy([LOG])


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
    assert [btlog.encode_vkey(VerifierKey.parse(k)) for k in (LOG_VKEY, WITNESS_VKEY_4, PQ_VKEY)] == [LOG_VKEY, WITNESS_VKEY_4, PQ_VKEY]
    assert btlog.as_witness(WITNESS) == VerifierKey.parse(WITNESS_VKEY_4) == btlog.as_witness(VerifierKey.parse(WITNESS_VKEY_4))
    assert (SIGNER.key, COSIGNER.key) == (LOG, WITNESS)
    assert (SIGNER.encode(), COSIGNER.encode()) == (LOG_SKEY, WITNESS_SKEY)
    assert btlog.encode_vkey(btlog.Signer.parse(BT_LOG_SKEY).key) == BT_LOG_VKEY
    assert (PQ.kind, len(PQ.key)) == (0x06, 1312)


def test_T46_base64_of_a_key_may_hold_plus_signs() -> None:
    seeds = (hashlib.sha256(b"%d" % i).digest() for i in itertools.count())
    signer = next(s for s in (btlog.Signer("plus.example", seed) for seed in seeds) if btlog.encode_vkey(s.key).count("+") > 3)
    assert VerifierKey.parse(btlog.encode_vkey(signer.key)) == signer.key


@pytest.mark.parametrize("vkey", [
    "", "a", "a+b", "a+b+c", "+" + LOG_VKEY.partition("+")[2], LOG_VKEY + "\n", " " + LOG_VKEY, LOG_VKEY + "+", LOG_VKEY.upper(),
    LOG_VKEY.replace("fdabb4f8", "FDABB4F8"), LOG_VKEY.replace("fdabb4f8", "fdabb4f9"), LOG_VKEY.replace("fdabb4f8", "0fdabb4f8"),
    LOG_VKEY.replace("log.example", "log example"), LOG_VKEY.replace("log.example", "log\u00a0example"), LOG_VKEY[:-4],
    "x+" + hashlib.sha256(b"x\n").hexdigest()[:8] + "+", LOG_SKEY, LOG_VKEY.replace("log.example", "log\udc80"),
])
def test_T46_what_is_no_vkey(vkey: str) -> None:
    refuses(Malformed, VerifierKey.parse, vkey)


@pytest.mark.parametrize("kind", [0, 2, 3, 5, 0xFA, 0xFF])
def test_T46_unknown_types_of_keys(kind: int) -> None:
    key_id = hashlib.sha256(b"x\n" + bytes([kind]) + LOG.key).hexdigest()[:8]
    refuses(Malformed, VerifierKey.parse, f"x+{key_id}+{b64(bytes([kind]) + LOG.key)}")
    refuses(Malformed, VerifierKey, "x", kind, LOG.key)


@pytest.mark.parametrize("kind,length", [(1, 31), (1, 33), (1, 0), (4, 31), (4, 1312), (6, 32), (6, 1311)])
def test_keys_have_the_length_of_their_type(kind: int, length: int) -> None:
    refuses(Malformed, VerifierKey, "x", kind, bytes(length))


def test_T38_names_of_at_most_255_bytes() -> None:
    for name in "a" * 255, "é" * 127 + "a":
        assert VerifierKey(name, 1, bytes(32)).name == name
        assert Checkpoint.parse(f"{name}\n0\n{ROOTS[0]}\n").origin == name
    for name in "a" * 256, "é" * 128, "", "a b", "a+b", "a\tb", "a\u2003b", "a\u0085", "a\x1f", "a\nb":
        refuses(Malformed, VerifierKey, name, 1, bytes(32))
        refuses(Malformed, Checkpoint.parse, f"{name}\n0\n{ROOTS[0]}\n")


@pytest.mark.parametrize("skey", [
    "", LOG_VKEY, LOG_SKEY + "\n", LOG_SKEY.replace("fdabb4f8", "fdabb4f9"), LOG_SKEY.replace("PRIVATE", "PUBLIC"), LOG_SKEY[:-4],
    LOG_SKEY.replace("+AY", "+BI"), LOG_SKEY.replace("log.example", "log example"), "PRIVATE+KEY+x",
])
def test_what_is_no_private_key_is_not_quoted(skey: str) -> None:
    with pytest.raises(Malformed) as caught:
        btlog.Signer.parse(skey)
    assert "XBV0uM3" not in str(caught.value)
    assert caught.value.__context__ is None or "XBV0uM3" not in "".join(map(str, caught.value.args))
    assert "seed" not in repr(SIGNER)


def test_open_what_go_signed() -> None:
    tree = Tree(70_000, base64.b64decode(ROOTS[70_000]))
    opened = open_checkpoint(COSIGNED.encode(), POLICY)
    assert opened == Checkpoint("log.example/vectors", tree)
    assert opened.cosigned == ((VerifierKey.parse(WITNESS_VKEY_4), COSIGNED_AT),)
    assert open_checkpoint(SIGNED.encode(), UNWITNESSED).cosigned == ()
    assert open_checkpoint(COSIGNED.encode(), UNWITNESSED).cosigned == ()
    refuses(BadSignature, open_checkpoint, SIGNED.encode(), POLICY)
    assert SIGNER.sign(opened) == SIGNED.encode()


def test_T39_cosignature_time() -> None:
    text = SIGNED.partition("\n\n")[0] + "\n"
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
    text = SIGNED.partition("\n\n")[0] + "\n"
    log, witness = signature_line(SIGNER, text), signature_line(COSIGNER, text, 5)
    later = signature_line(COSIGNER, text, 9)
    unknown = [signature_line(new_key(f"unknown{i}.example"), text) for i in range(97)]
    for lines in [log, witness], [witness, log], [log, log, witness], [log, *unknown[:15], witness], [*unknown, log, witness]:
        assert open_checkpoint(note_of(text, *lines), POLICY).cosigned[0][1] == 5
    assert open_checkpoint(note_of(text, later, log, witness), POLICY).cosigned == ((btlog.as_witness(WITNESS), 9),)
    refuses(BadSignature, open_checkpoint, note_of(text, log, *unknown), POLICY)
    refuses(BadSignature, open_checkpoint, note_of(text, witness, *unknown), POLICY)
    second = new_key(LOG.name)
    both = btlog.simple_policy([LOG, second.key], [WITNESS])
    for lines in [signature_line(second, text), witness], [log, witness, signature_line(second, text)]:
        assert open_checkpoint(note_of(text, *lines), both).origin == LOG.name


def test_T40_unknown_signatures_are_ignored_and_false_ones_are_not() -> None:
    text = SIGNED.partition("\n\n")[0] + "\n"
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
    other = SIGNED.replace("70000", "70001").partition("\n\n")[0] + "\n"
    false = [
        signature_line(SIGNER, other),
        f"— {LOG.name} {b64(LOG.key_id + bytes(64))}\n",
        f"— {LOG.name} {b64(LOG.key_id + b'short')}\n",
        f"— {LOG.name} {b64(LOG.key_id + base64.b64decode(log.split()[2])[4:] + b'!')}\n",
        signature_line(COSIGNER, other, 5),
        f"— {WITNESS.name} {b64(btlog.as_witness(WITNESS).key_id + bytes(7))}\n",
    ]
    for line in false:
        for lines in [log, witness, line], [line, log, witness]:
            refuses(BadSignature, open_checkpoint, note_of(text, *lines), POLICY)


def test_the_ml_dsa_witness_parses_and_never_counts() -> None:
    text = SIGNED.partition("\n\n")[0] + "\n"
    line = f"— {PQ.name} {b64(PQ.key_id + bytes(8 + 2420))}\n"
    note = note_of(text, signature_line(SIGNER, text), line)
    assert open_checkpoint(note, UNWITNESSED).cosigned == ()
    refuses(BadSignature, open_checkpoint, note, btlog.simple_policy([LOG], [PQ]))
    refuses(BadSignature, open_checkpoint, note, btlog.simple_policy([LOG], [WITNESS, PQ], 1))
    refuses(BadSignature, PQ.verify, text, bytes(64))
    assert open_checkpoint(COSIGNED.encode(), btlog.simple_policy([LOG], [WITNESS, PQ], 1)).cosigned[0][1] == COSIGNED_AT


def test_T57_the_key_of_one_origin_does_not_speak_for_another() -> None:
    text = f"other.example\n1\n{ROOTS[1]}\n"
    refuses(BadSignature, open_checkpoint, note_of(text, signature_line(SIGNER, text)), UNWITNESSED)
    other = new_key("other.example")
    both = btlog.simple_policy([LOG, other.key])
    refuses(BadSignature, open_checkpoint, note_of(text, signature_line(SIGNER, text)), both)
    assert open_checkpoint(note_of(text, signature_line(SIGNER, text), signature_line(other, text)), both)


def test_T44_only_the_last_empty_line_separates() -> None:
    text = "a\n\nb\n\n\nc\n"
    assert btlog.split_note(note_of(text, signature_line(SIGNER, text)))[0] == text
    assert btlog.open_note(note_of(text, signature_line(SIGNER, text)), [LOG]) == (text, {LOG: 0})
    assert btlog.split_note(note_of("\n", signature_line(SIGNER, "\n")))[0] == "\n"
    blank = SIGNED.partition("\n\n")[0] + "\n\nextension\n"  # a checkpoint has no empty lines
    refuses(Malformed, open_checkpoint, note_of(blank, signature_line(SIGNER, blank)), UNWITNESSED)


LINE = SIGNED.split("\n")[4]


@pytest.mark.parametrize("note", [
    "", "\n", "\n\n", "a\n", "a\n\n", SIGNED[:-1], SIGNED.replace("\n\n", "\n"), SIGNED + "\n", "\n" + LINE + "\n", SIGNED.replace("\n", "\r\n"),
    SIGNED.replace("— ", "- "), SIGNED.replace("— ", "—  "), SIGNED.replace("— ", "—"), SIGNED.replace("— ", "– "), SIGNED + " \n", SIGNED + "x\n",
    SIGNED + LINE, SIGNED.replace("=\n", "=  \n"), SIGNED + LINE + " x\n", SIGNED + "— a\n", SIGNED + "— a \n", SIGNED + "— a YWJjZA==\n",
    SIGNED + "—  YWJjZGU=\n", SIGNED + "— a+b YWJjZGU=\n", SIGNED + "— a YWJjZGV=\n", SIGNED + "— a YWJjZGU\n", SIGNED + "— a\u2003b YWJjZGU=\n",
    SIGNED.replace("\n\n", "\n \n"), "\ufeff" + SIGNED[:30], SIGNED.replace("log", "l\0g"), SIGNED.replace("log", "l\tg"),
])
def test_T43_what_is_no_note(note: str) -> None:
    refuses(Malformed, btlog.split_note, note.encode())


def test_limits_of_notes() -> None:
    many = [f"— key{i}.example {b64(b'abcdefgh')}\n" for i in range(101)]
    assert len(btlog.split_note(note_of("a\n", *many[:100]))[1]) == 100
    refuses(Malformed, btlog.split_note, note_of("a\n", *many))
    start = time.perf_counter()
    refuses(Malformed, btlog.split_note, note_of("a\n", *(many * 1000)))
    assert time.perf_counter() - start < 1
    refuses(Malformed, btlog.split_note, note_of("a" * 1_000_000 + "\n", many[0]))


@pytest.mark.parametrize("text", [
    "", "\n", "a\n", "a\n1\n", f"a\n1\n{ROOTS[1]}", f"\n1\n{ROOTS[1]}\n", f"a\n01\n{ROOTS[1]}\n", f"a\n-1\n{ROOTS[1]}\n", f"a\n1 \n{ROOTS[1]}\n",
    f"a\n{2**63}\n{ROOTS[1]}\n", f"a\n1\n{ROOTS[1][:-1]}\n", f"a\n1\n{b64(bytes(31))}\n", f"a\n1\n{b64(bytes(33))}\n", f"a\n1\n{ROOTS[1]}\n\n",
    f"a\n1\n{ROOTS[1]}\n\nx\n", f"a b\n1\n{ROOTS[1]}\n", f"a\n\n{ROOTS[1]}\n", f"a\n1\n\n{ROOTS[1]}\n", f"a\n1\n{ROOTS[1]}=\n", f"a\n\n1\n{ROOTS[1]}\n",
])
def test_what_is_no_checkpoint(text: str) -> None:
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


def policy_file(text: str) -> bytes:
    return f"# a policy\n\nlog {LOG_VKEY} https://log.example/\n{WITNESS_LINES}{text}".encode()


def test_policy_of_the_specification() -> None:
    """The example of tlog-policy: two of three X and any of three Y."""
    policy = parse_policy(policy_file("group X 2 W0 W1 W2\n group\tY any W3  W4 W5 \ngroup both all X Y\nquorum both\n"))
    assert policy.logs == (LOG,)
    assert policy.witnesses == tuple(W)
    assert policy.quorum == Quorum(2, (Quorum(2, (W[0], W[1], W[2])), Quorum(1, (W[3], W[4], W[5]))))
    assert policy.urls[:2] == ((LOG, "https://log.example/"), (W[0], "https://w0.example/"))
    for cosigners in itertools.chain.from_iterable(itertools.combinations(range(6), n) for n in range(7)):
        wanted = sum(i < 3 for i in cosigners) >= 2 and any(i >= 3 for i in cosigners)
        assert policy.quorum.met([W[i] for i in cosigners]) is wanted


def test_simple_quorums() -> None:
    assert parse_policy(b"quorum none\n").quorum.met([])
    assert parse_policy(policy_file("quorum W1\n")).quorum == Quorum(1, (W[1],))
    assert parse_policy(policy_file("quorum none\n")).quorum == Quorum(0, ())
    assert parse_policy(f"log {LOG_VKEY}\nwitness a {WITNESS_VKEY}\nquorum a\n".encode()) == POLICY  # type 0x01 as Go hands it out
    assert parse_policy(f"log {LOG_VKEY}\nwitness a {WITNESS_VKEY_4}\nquorum a\n".encode()) == POLICY
    pq = parse_policy(f"log {LOG_VKEY}\nwitness a {WITNESS_VKEY}\nwitness b {PQ_VKEY}\ngroup g any a b\nquorum g\n".encode())
    assert open_checkpoint(COSIGNED.encode(), pq).cosigned[0][0].name == "witness.example/w1"


def test_policies_of_the_recommended_size_and_deep_ones() -> None:
    keys = [VerifierKey(f"x{i}", 4, hashlib.sha256(b"x%d" % i).digest()) for i in range(64)]
    lines = [f"witness n{i} {btlog.encode_vkey(key)}" for i, key in enumerate(keys)]
    lines += [f"log {btlog.encode_vkey(new_key(f'l{i}').key)}" for i in range(64)]
    lines += ["group g0 all n0"] + [f"group g{i} all n{i} g{i - 1}" for i in range(1, 64)] + ["quorum g63"]
    policy = parse_policy("".join(f"{line}\n" for line in lines).encode())
    assert policy.quorum.met(keys)
    assert not policy.quorum.met(keys[1:])


@pytest.mark.parametrize("text", [
    "", "# quorum none\n", "quorum none", "quorum none\nquorum none\n", "quorum W0\nquorum W0\n", "quorum W9\n", "quorum\n", "quorum W0 W1\n",
    "group g 0 W0 W1\nquorum g\n", "group g 3 W0 W1\nquorum g\n", "group g 01 W0\nquorum g\n", "group g +1 W0\nquorum g\n", "group g -1 W0\nquorum g\n",
    "group g\nquorum g\n", "group g any\nquorum g\n", "group g all\nquorum g\n", "group g 1\nquorum g\n", "group g any W0 W0\nquorum g\n",
    "group g any W0\ngroup h any W0\nquorum h\n", "group g any h\ngroup h any W0\nquorum g\n", "group g any g\nquorum g\n", "group g any none\nquorum g\n",
    "group none any W0\nquorum none\n", "group W0 any W1\nquorum W0\n", "quorum g\ngroup g any W0\n", "quorum none # comment\n",
    f"witness W0 {PQ_VKEY}\nquorum none\n", f"witness none {PQ_VKEY}\nquorum none\n", f"witness X {VKEYS[0]}\nquorum none\n", "other\nquorum none\n",
    f"log {LOG_VKEY}\nquorum none\n", f"log {PQ_VKEY}\nquorum none\n", f"log {VKEYS[0]}\nquorum none\n", "log\nquorum none\n", "log x\nquorum none\n",
    f"witness X {VKEYS[0].replace('w0', 'other')}\nquorum none\n", f"witness X {PQ_VKEY} u v\nquorum none\n", "quorum none\r\n", "quorum none\x0b\n",
    "quorum none\x00\n", "quorum none\x7f\n", "quorum n\u00f6ne\n", "group g all W0 W1\nquorum G\n", "Quorum none\n", "quorum None\n",
    "group g \u0661 W0\nquorum g\n", "quorum\u00a0none\n",
])
def test_T47_what_is_no_policy(text: str) -> None:
    """Some of these would always be satisfied, or by one witness under two names."""
    refuses(Malformed, parse_policy, policy_file(text))


def test_T47_names_are_bytes_and_comments_whole_lines() -> None:
    kelvin, k = "\u212a".encode(), b"K"
    file = policy_file("").replace(b" W0 ", b" " + kelvin + b" ").replace(b" W1 ", b" " + k + b" ").replace(b" W2 ", b" \xff# ")
    policy = parse_policy(file + b"\t # a comment \xff\n \t \ngroup g all \xff# " + k + b"\nquorum g\n")
    assert policy.quorum == Quorum(2, (W[2], W[1]))
    assert parse_policy(policy_file("quorum W0\n").replace(VKEYS[0].encode(), PQ_VKEY.encode())).quorum.members == (PQ,)
    one_key_two_types = f"witness a {WITNESS_VKEY}\nwitness b {WITNESS_VKEY_4}\nquorum none\n"
    refuses(Malformed, parse_policy, one_key_two_types.encode())
    refuses(Malformed, parse_policy, b"#" * btlog.MAX_POLICY + b"\nquorum none\n")


def test_policies_as_values_hold_the_same_rules() -> None:
    for make in (
        lambda: Quorum(0, (W[0],)), lambda: Quorum(2, (W[0],)), lambda: Quorum(1, ()), lambda: Quorum(-1, ()),
        lambda: Policy((LOG, LOG)), lambda: Policy((LOG,), (W[0], W[0])), lambda: Policy((W[0],)), lambda: Policy((PQ,)),
        lambda: Policy((LOG,), (WITNESS,)), lambda: Policy((LOG,), (), Quorum(1, (W[0],))),
        lambda: Policy((LOG,), (W[0],), Quorum(1, (W[0], W[0]))), lambda: Policy((LOG, VerifierKey("x", 1, LOG.key))),
        lambda: Policy((LOG,), (W[0], W[1]), Quorum(2, (W[0], Quorum(1, (W[0], W[1]))))),
        lambda: btlog.simple_policy([LOG], [WITNESS], 2), lambda: btlog.simple_policy([LOG], [WITNESS], 0),
    ):
        refuses(Malformed, make)
    assert POLICY == Policy((LOG,), (btlog.as_witness(WITNESS),), Quorum(1, (btlog.as_witness(WITNESS),)))


# --- Entries -------------------------------------------------------------------------------------------------------------

SUM = "sha256:" + "5141b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be92"
NAME = "pkgname-1.2.3-py3-none-any.whl"
PUBLISHER = Publisher("https://issuer.example", "https://example.com/a b")


def test_entries_as_bt_log_encodes_them() -> None:
    plain, signed = Entry(NAME, SUM), Entry(NAME, SUM, PUBLISHER)
    assert plain.encode() == f"pypi-transparency/v1\n{SUM}\n{NAME}".encode()
    assert signed.encode() == plain.encode() + b"\npublisher https://issuer.example https://example.com/a b"
    assert [Entry.parse(e.encode()) for e in (plain, signed)] == [plain, signed]


@pytest.mark.parametrize("name", ["a", "a b", "é.whl", "a+b-1.0.tar.gz", "a" * 255, "é" * 127, "a\u2028b", "publisher x y", "..", "#"])
def test_filenames(name: str) -> None:
    assert Entry.parse(Entry(name, SUM).encode()).filename == name


@pytest.mark.parametrize("name", ["", " a", "a ", "a/b", "a\\b", "a\nb", "a\tb", "a\0", "a\x7f", "a\x85b", "\u00a0a", "a\u3000", "a" * 256, "é" * 128,
                                  "\ud800", "a\npublisher b c", "a\n", "\n", "a\x1cb"])
def test_T50_what_is_no_filename(name: str) -> None:
    refuses(Malformed, Entry, name, SUM)


@pytest.mark.parametrize("checksum", ["", SUM[7:], SUM[:-1], SUM + "0", SUM.upper(), "sha256:" + SUM[7:].upper(), SUM + "\n", " " + SUM, "md5:" + "0" * 32,
                                      "sha512:" + SUM[7:], "sha256:" + "٧" * 64])
def test_what_is_no_checksum(checksum: str) -> None:
    refuses(Malformed, Entry, NAME, checksum)


@pytest.mark.parametrize(("issuer", "subject"), [("", "x"), ("x", ""), ("a b", "c"), ("a\u00a0b", "c"), ("a", "b\nc"), ("a\n", "b"), ("a", "b\x85"),
                                                 ("a\tb", "c"), ("\ud800", "x"), ("x", "\udfff")])
def test_T50_what_is_no_publisher(issuer: str, subject: str) -> None:
    """An issuer with a space would make two publishers encode alike."""
    refuses(Malformed, Entry, NAME, SUM, Publisher(issuer, subject))


@given(st.text(max_size=20), st.none() | st.tuples(st.text(max_size=8), st.text(max_size=8)))
def test_T50_an_entry_is_what_its_encoding_says(name: str, publisher: tuple[str, str] | None) -> None:
    try:
        entry = Entry(name, SUM, Publisher(*publisher) if publisher else None)
    except Malformed:
        return
    assert Entry.parse(entry.encode()) == entry


def test_T49_the_largest_entry() -> None:
    room = 65_535 - len(Entry(NAME, SUM, Publisher("i", "s")).encode()) + 1
    assert len(Entry(NAME, SUM, Publisher("i", "s" * room)).encode()) == 65_535
    refuses(Malformed, Entry, NAME, SUM, Publisher("i", "s" * (room + 1)))
    refuses(Malformed, Entry, NAME, SUM, Publisher("i", "é" * (room // 2 + 1)))


@pytest.mark.parametrize("data", [b"", b"\n\n", b"pypi-transparency/v2\n" + SUM.encode() + b"\na", b"x" + Entry("a", SUM).encode(),
                                  Entry("a", SUM).encode() + b"\n", Entry("a", SUM).encode() + b"\n\n", Entry("a", SUM).encode() + b"\npublisher a",
                                  Entry("a", SUM).encode() + b"\npublisher  a", Entry("a", SUM).encode() + b"\nPublisher a b",
                                  Entry("a", SUM).encode() + b"\npublisher a b\n", Entry("a", SUM).encode()[:-1] + b"\xff",
                                  Entry("a", SUM).encode()[:-1] + b"\xed\xa0\x80", b"x" * 70_000])
def test_what_is_no_entry(data: bytes) -> None:
    refuses(Malformed, Entry.parse, data)


# --- Offline proofs -------------------------------------------------------------------------------------------------------


def go_proof(big: Callable[[int, int, int], bytes], extra: bytes = b"", index: int = 12_345) -> bytes:
    hashes = tuple(btlog.prove_inclusion(btlog.Tiles(70_000, big), index))
    return btlog.encode_proof(Proof(index, hashes, COSIGNED.encode(), extra))


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
    lines = head.split(b"\n")

    def proof(*lines: bytes, note: bytes = note) -> bytes:
        return b"\n".join(lines) + b"\n\n" + note

    assert check_logged(b"entry 12345", proof(*lines), POLICY)
    for bad in (
        b"", head, head + b"\n", head + b"\n\n", text[1:], text[:-1], proof(*lines[1:]), proof(lines[0], *lines[2:]), proof(b"c2sp.org/tlog-proof@v2", *lines[1:]),
        proof(lines[0], b"index 012345", *lines[2:]), proof(lines[0], b"index  12345", *lines[2:]), proof(lines[0], b"Index 12345", *lines[2:]),
        proof(lines[0], b"index 9223372036854775808", *lines[2:]), proof(lines[0], b"extra ", *lines[1:]), proof(lines[0], b"extra", *lines[1:]),
        proof(lines[0], b"extra YR==", *lines[1:]), proof(lines[0], lines[1], b"extra YQ==", *lines[2:]),
        proof(*lines[:-1], lines[-1][:-4]), proof(*lines[:-1], lines[-1] + b" "), text.replace(b"\n", b"\r\n"), proof(*lines, note=note.partition(b"\n\n")[0]),
        proof(lines[0], b"extra YQ==", b"extra YQ==", *lines[1:]), proof(lines[0]),
    ):
        refuses(Malformed, check_logged, b"entry 12345", bad, POLICY)
    for bad in (
        proof(*lines[:-1]), proof(*lines, lines[-1]), proof(*lines[:2], lines[2], *lines[2:]), proof(*lines[:2], *lines[3:]),
        proof(lines[0], b"index 12346", *lines[2:]), proof(lines[0], b"index 70000", *lines[2:]), proof(*lines[:2], lines[3], lines[2], *lines[4:]),
        proof(lines[0], b"index 12345", *[lines[2]] * 70),
    ):
        refuses(BadProof, check_logged, b"entry 12345", bad, POLICY)
    unsigned = note.partition(b"\n\n")[0] + b"\n\n" + signature_line(new_key("unknown.example"), "x").encode()
    refuses(BadSignature, check_logged, b"entry 12345", proof(*lines, note=unsigned), POLICY)
    refuses(BadSignature, check_logged, b"entry 12345", proof(*lines, note=SIGNED.encode()), POLICY)
    refuses(BadSignature, check_logged, b"entry 12345", proof(*lines, note=b"\n" + note), POLICY)
    smaller = f"{LOG.name}\n{69_999}\n{ROOTS[69_999]}\n"
    refuses(BadProof, check_logged, b"entry 12345", proof(*lines, note=note_of(smaller, signature_line(SIGNER, smaller))), UNWITNESSED)


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
        refuses(BadProof, Proof.parse(proof_of_one(other, other.encode())).entry, NAME, SUM)  # a valid proof of something else
    invented = Entry(NAME, SUM, Publisher("https://issuer.example", "mallory"))
    proof = proof_of_one(plain, invented.encode())
    refuses(BadProof, check_logged, Proof.parse(proof).entry(NAME, SUM), proof, UNWITNESSED)
    refuses(Malformed, Proof.parse(proof_of_one(plain, b"no entry")).entry, NAME, SUM)
    assert Proof.parse(proof_of_one(plain)).entry(NAME, SUM) == plain


# --- One byte changed -------------------------------------------------------------------------------------------------------


def as_text(parse: Callable[[str], Any]) -> Callable[[bytes], Any]:
    return lambda data: parse(data.decode("utf-8", "surrogateescape"))


def test_every_byte_of_a_key_counts() -> None:
    for data, parse, encode in (
        (LOG_VKEY, VerifierKey.parse, btlog.encode_vkey), (WITNESS_VKEY_4, VerifierKey.parse, btlog.encode_vkey),
        (LOG_SKEY, btlog.Signer.parse, btlog.Signer.encode),
    ):
        cases = list(mutations(data.encode(), every=True))
        assert survives(as_text(parse), lambda key, encode=encode: encode(key).encode(), iter(cases)) == len(cases)


def test_every_byte_of_a_note_and_checkpoint_counts() -> None:
    def encode(parts: tuple[str, list[tuple[str, bytes, bytes]]]) -> bytes:
        return note_of(parts[0], *(f"— {name} {b64(key_id + value)}\n" for name, key_id, value in parts[1]))

    assert survives(btlog.split_note, encode, mutations(SIGNED.encode())) > 500
    text = SIGNED.partition("\n\n")[0].encode() + b"\n"
    assert survives(as_text(Checkpoint.parse), lambda c: btlog.encode_checkpoint(c).encode("utf-8", "surrogateescape"), mutations(text)) > 200
    for case in mutations(SIGNED.encode()):
        try:
            opened = open_checkpoint(case, UNWITNESSED)
        except Error:
            continue
        pytest.fail(f"{case!r} passes as {opened}")


def test_every_byte_of_a_proof_counts(big: Callable[[int, int, int], bytes]) -> None:
    for extra in PROOF_DIGESTS:
        text = go_proof(big, extra)
        assert survives(Proof.parse, btlog.encode_proof, mutations(text)) > 5000
        passed = 0
        for case in mutations(text):
            with contextlib.suppress(Error):
                check_logged(b"entry 12345", case, POLICY)
                passed += 1
                assert Proof.parse(case).extra != extra or Proof.parse(case).checkpoint != COSIGNED.encode()
        assert passed < 1500  # other extra data, which nothing authenticates; names of witnesses that nobody knows


def test_every_byte_of_an_entry_counts() -> None:
    for entry in Entry(NAME, SUM), Entry(NAME, SUM, PUBLISHER):
        assert survives(Entry.parse, Entry.encode, mutations(entry.encode(), every=True)) > 20_000


def test_every_byte_of_a_tile_path_counts() -> None:
    for path_ in PATHS.values():
        survives(as_text(btlog.parse_tile_path), lambda parts: btlog.tile_path(*parts).encode(), mutations(path_.encode(), every=True))


def test_every_byte_of_a_policy_counts() -> None:
    """It stays the same policy (a comment, a name, white space), becomes another one, or is refused with an Error."""
    file = policy_file("group X 2 W0 W1 W2\ngroup Y any W3 W4 W5\ngroup both all X Y\nquorum both\n")
    policy, same, refused = parse_policy(file), 0, 0
    for case in mutations(file):
        try:
            changed = parse_policy(case)
        except Malformed:
            refused += 1
        else:
            same += changed == policy
            assert changed.logs == policy.logs
            assert set(changed.quorum.keys()) <= set(policy.witnesses)
            assert not changed.quorum.met([]) or changed.quorum == Quorum(0, ())
    assert refused > 5000
    assert same > 100


def test_every_byte_of_a_bundle_counts() -> None:
    bundle = btlog.encode_bundle([b"", b"a", b"bc" * 200])
    assert btlog.parse_bundle(bundle, 3) == [b"", b"a", b"bc" * 200]
    survives(lambda data: btlog.parse_bundle(data, 3), btlog.encode_bundle, mutations(bundle))


@given(st.binary(max_size=200))
def test_T64_no_parser_raises_anything_else(data: bytes) -> None:
    for parse in (
        btlog.split_note, Proof.parse, Entry.parse, parse_policy, btlog.parse_text, lambda d: btlog.parse_bundle(d, 2), btlog.parse_json,
        *map(as_text, (VerifierKey.parse, btlog.Signer.parse, Checkpoint.parse, btlog.parse_tile_path, btlog.parse_decimal, btlog.parse_base64)),
    ):
        with contextlib.suppress(Error):
            parse(data)


# --- Tiles ---------------------------------------------------------------------------------------------------------------------


def test_tile_paths() -> None:
    assert len(PATHS) == 15
    for parts, text in PATHS.items():
        assert btlog.tile_path(*parts) == text
        assert btlog.parse_tile_path(text) == parts


@pytest.mark.parametrize("text", [
    "", "tile", "tile/", "tile/0", "tile/0/", "tile/0/0", "tile/0/00", "tile/0/0000", "tile/00/000", "tile/01/000", "tile/64/000", "tile/-1/000", "tile/+1/000",
    "tile/0/x000/000", "tile/0/x000/001", "tile/0/001/000", "tile/0/x001/x000", "tile/0/x001/0", "tile/0/x001", "tile/0/000.p", "tile/0/000.p/", "tile/0/000.p/0",
    "tile/0/000.p/00", "tile/0/000.p/01", "tile/0/000.p/256", "tile/0/000.p/999", "tile/0/000.p/1/", "tile/0/000/", "/tile/0/000", "tile//000", "tile/0//000",
    "tile/0/../0/000", "tile/./0/000", "tile/0/%30%30%30", "tile/0/000%00", "tile/0/000\0", "tile/0/000\n", "tile/entries", "tile/entries/", "tile/entries/0",
    "tile/Entries/000", "tile/0/000.P/1", "tile/0/٠٠٠", "tile/²/000", "tile/data/000", "tile/0/x009/x223/x372/x036/x854/x775/808", "tile/0/" + "x999/" * 50 + "999",
    "tile/0/000.p/1.p/1", "tile/0/000.p/255 ", "tile/0/X001/000",
])
def test_T27_what_is_no_tile_path(text: str) -> None:
    refuses(Malformed, btlog.parse_tile_path, text)


def test_levels_and_widths_of_tile_paths() -> None:
    for level, width in itertools.product(range(64), (1, 255, 256)):
        assert btlog.parse_tile_path(btlog.tile_path(level, 5, width)) == (level, 5, width)
    assert btlog.parse_tile_path(btlog.tile_path(0, 2**63 - 1)) == (0, 2**63 - 1, 256)


@given(st.lists(st.binary(max_size=300), max_size=256))
def test_bundles(entries: list[bytes]) -> None:
    data = btlog.encode_bundle(entries)
    assert btlog.parse_bundle(data, len(entries)) == entries
    for width in {0, len(entries) // 2, len(entries)}:
        assert btlog.parse_bundle(data, width, exactly=False) == entries[:width]
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

    def record(level: int, index: int, width: int) -> bytes:
        fetched.append((level, index, width))
        return big(level, index, width)

    def use(tiles: btlog.Tiles) -> None:
        for index in 0, 30_000, 65_534:
            check_inclusion(leaf_hash(ENTRIES[index]), index, tree, btlog.prove_inclusion(tiles, index))
        btlog.prove_consistency(tiles, 12_345)

    use(btlog.AuthenticTiles(tree, record))
    assert len(fetched) == len(set(fetched)) == 5
    assert {(0, 255, 255), (1, 0, 255)} <= set(fetched)
    for bad in fetched:
        for at in {0, 31, 32 * bad[2] - 1, 32 * (bad[2] // 2)}:

            def corrupt(level: int, index: int, width: int, bad: tuple[int, int, int] = bad, at: int = at) -> bytes:
                data = bytearray(big(level, index, width))
                if (level, index, width) == bad:
                    data[at] ^= 1
                return bytes(data)

            refuses(BadProof, lambda: use(btlog.AuthenticTiles(tree, corrupt)))  # noqa: B023
    for cut in b"", big(0, 255, 254), big(0, 0, 256):
        refuses(BadProof, lambda: use(btlog.AuthenticTiles(tree, lambda level, index, width: cut)))  # noqa: B023
    refuses(BadProof, btlog.AuthenticTiles, Tree(65_535, bytes(32)), big)
    refuses(BadProof, btlog.AuthenticTiles, Tree(0, bytes(32)), big)
    assert btlog.AuthenticTiles(Tree(0, base64.b64decode(ROOTS[0])), big).size == 0


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
