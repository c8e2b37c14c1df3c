#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["PyNaCl>=1.6.2,<2"]
# ///
"""btlog: a binary transparency log for Python package indexes, in one file.

An index tells the log the name and the SHA-256 of every file that it publishes. The log keeps them in an append-only
Merkle tree and signs its root. Witnesses check that the tree only grows, and cosign it. Users can check offline that
a file was logged. Owners of a project can watch what is logged for it.

If `check_logged` returns, the log's key signed a tree that has an entry with this filename, this checksum and, if
given, this publisher. As many witnesses as the policy asks for cosigned the tree: each states that it continues every
tree of the log that this witness saw before. The file may still be harmful, and its publisher may not have been
entitled to publish it. The log makes an attack visible; somebody still has to look.

Reading order is dependency order: a section uses only what stands above it. Only `WitnessClient` calls `Log`, below.

  Part I    Trusted core: errors, strict scalars, Merkle checks, keys and notes, checkpoints, policies, entries, proofs.
            Bytes and integers go in; a value or an `Error` comes out. No clock; no I/O, except in `verify_file`.
            Behind it, in a part of its own: the verification of ML-DSA-44 cosignatures.
  Part II   More code without I/O: signing, tile paths and entry bundles, proofs from tiles, the witness's step, and
            what a monitor looks for in entries.
  Part III  Storage: one SQLite file, one writer, one transaction for changes that belong together. There is a store
            for a log, one for a mirror (a copy of a log that a monitor fills), and one for a witness.
  Part IV   Network: HTTP plumbing, the client, the log with its sequencer and its page, the witness, the monitor.
  Part V    Commands, and what only they need: the parsers of lock files, the monitor's reports, the gate with its
            store. At the end `main(argv)`, which returns the exit code.

Terms of this file, beside those of the specifications:

  submission  the entries that one request asks to be logged; its outcomes are their indices, or why they have none
  round       one request for cosignatures to all witnesses; or one pass of a monitor
  part        2^18 entries, whose look-up keys are stored together
  mirror      a copy of a log, which a monitor fills
  finding     what a monitor reports; its evidence is in files that prove it to others
  target      what `verify` is given: a file, a folder, a lock file; an artifact is a file that a target names
  gate        a package index through which installers get only what is logged (`proxy`)

Who calls `check_logged` has to trust Part I; who runs `verify` or `proxy`, also their code in Part V, which chooses the
name and the checksum to check. A monitor has to trust the tile reader, the search in entries, the mirror, `Monitor` and
`Reporter` as well. A witness has to trust the witness's step, its store, and `Witness` and its handler: they choose the
keys by the origin, and answer only after the commit. A defect below Part I can stop a log, or make it emit
what Part I refuses. It can't make Part I accept an entry that was not logged.

Specifications: C2SP (https://c2sp.org) as of July 2026: signed-note, tlog-checkpoint, tlog-cosignature, tlog-tiles,
tlog-witness, tlog-proof and tlog-policy; RFC 6962 section 2.1 for trees and proofs, RFC 9162 section 2.1 for the
checks of proofs, RFC 8032 for Ed25519, FIPS 204 for ML-DSA-44.
"""

# === Part I: the trusted core ===========================================================================
# A verifier has to trust only this part. `python btlog.py core > core.py` prints it as a module of its own, which needs
# only the standard library. Bytes and integers go in; a value or an `Error` comes out.

from __future__ import annotations

import base64
import dataclasses
import functools
import hashlib
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

try:
    from nacl import exceptions, signing
except ImportError:  # pragma: no cover (a bare Python: then _verify_alone verifies)
    signing = None  # type: ignore[assignment]

__all__ = [
    "BadProof", "BadSignature", "Checkpoint", "Entry", "Error", "Malformed", "Policy", "Proof", "Publisher", "Quorum",
    "Tree", "VerifierKey", "check_consistency", "check_inclusion", "check_logged", "leaf_hash", "node_hash",
    "open_checkpoint", "parse_policy", "simple_policy", "verify_file",
]

# Limits, each with its source; in bytes unless the comment says otherwise.
MAX_INT = 2**63 - 1  # tlog-cosignature: a timestamp "MUST NOT exceed 2^63 - 1"; sizes and indices have the same limit
MAX_NAME = 255  # an origin or key name: tlog-cosignature has `opaque log_origin<1..2^8-1>`
MAX_NOTE, MAX_SIGNATURES = 1_000_000, 100  # golang.org/x/mod/sumdb/note; signed-note asks for at least 16 signatures
MAX_ENTRY, MAX_FILENAME = 65_535, 255  # tlog-tiles: a uint16 length prefix; file systems
MAX_POLICY, MAX_DEPTH = 1_000_000, 100  # a policy file; levels of nested groups in it

# --- Errors: each has the HTTP status of the answer and the exit code of the command ---------------------

class Error(Exception):
    """The base class of btlog's errors. The message says what is wrong, and with which input."""
    status, exit_code = 500, 3

class Malformed(Error):
    """The input does not have the required format, or a value is out of range."""
    status, exit_code = 400, 2

class BadSignature(Error):
    """A false signature, no signature of a trusted key, or too few cosignatures for the policy."""
    status, exit_code = 403, 1

class BadProof(Error):
    """A proof that does not lead to the root, or trees that contradict each other."""
    status, exit_code = 422, 1

# --- Strict scalars: nothing else calls int() or b64decode() --------------------------------------------

_DECIMAL = re.compile(r"0|[1-9][0-9]{0,18}")
_NOT_TEXT = re.compile(r"[\x00-\x09\x0b-\x1f\ud800-\udfff]")  # surrogates stand for bytes that are not UTF-8


def parse_decimal(text: str) -> int:
    """Returns the integer of 0 to MAX_INT whose canonical ASCII decimal is `text`; raises Malformed."""
    if not _DECIMAL.fullmatch(text) or int(text) > MAX_INT:
        raise Malformed(f"not a decimal of 0 to 2^63-1: {text[:40]!r}")
    return int(text)


def parse_base64(text: str, length: int | None = None) -> bytes:
    """Returns the `length` (None: any) bytes of canonical base64 `text` (RFC 4648 section 4); raises Malformed."""
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError:
        raise Malformed(f"not base64: {text[:60]!r}") from None
    # b64decode ignores surplus bits after the last byte, so several texts would decode to the same bytes.
    if base64.b64encode(data).decode() != text or len(data) != (len(data) if length is None else length):
        raise Malformed(f"not canonical base64 of {length or 'some'} bytes: {text[:60]!r}")
    return data


def parse_text(data: bytes) -> str:
    """Returns the text of `data`: whole lines, without control characters; raises Malformed."""
    text = data.decode(errors="surrogateescape")
    # signed-note: "MUST be valid UTF-8 and MUST NOT contain any ASCII control characters … other than newline"
    if _NOT_TEXT.search(text) or not text.endswith("\n"):
        raise Malformed("not UTF-8, a control character, or no newline at the end")
    return text

# --- Merkle trees: RFC 6962 section 2.1 -----------------------------------------------------------------

EMPTY_ROOT = hashlib.sha256(b"").digest()  # "The hash of an empty list is the hash of an empty string"


def leaf_hash(entry: bytes) -> bytes:
    """The 32-byte leaf hash of an entry."""
    return hashlib.sha256(b"\x00" + entry).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """The 32-byte hash of an inner node over the 32-byte hashes of its two children."""
    return hashlib.sha256(b"\x01" + left + right).digest()


@dataclass(frozen=True, slots=True)
class Tree:
    """The first `size` entries of a log, and their 32-byte `root` hash. One signature must cover both.

    The size only shapes the path of a proof: a valid proof may pass under a wrong size.
    """
    size: int
    root: bytes

    def __post_init__(self) -> None:
        if not 0 <= self.size <= MAX_INT or len(self.root) != 32:
            raise Malformed(f"no tree has size {self.size} and a root of {len(self.root)} bytes")


def _climb(node: int, last: int, start: bytes, path: Sequence[bytes]) -> tuple[bytes, bytes]:
    """Hashes up along `path`, from `start` at position `node` of a level whose last position is `last`.

    Returns two roots: one over positions 0 to `node`, one over positions 0 to `last`; raises BadProof.
    """
    left = whole = start
    for sibling in path:
        if last == 0:
            raise BadProof("the proof is too long")
        if node & 1 or node == last:
            left, whole = node_hash(sibling, left), node_hash(sibling, whole)
            while not node & 1 and node:  # at the right edge, skip levels where the node has no sibling
                node, last = node >> 1, last >> 1
        else:
            whole = node_hash(whole, sibling)
        node, last = node >> 1, last >> 1
    if last != 0:
        raise BadProof("the proof is too short")
    return left, whole


def check_inclusion(leaf: bytes, index: int, tree: Tree, proof: Sequence[bytes]) -> None:
    """Returns if `proof` shows that entry `index` of `tree` has the leaf hash `leaf`; else raises BadProof.

    The leaf hash and the proof's hashes are 32 bytes each. The leaf's sibling comes first (RFC 9162 section 2.1.3.2).
    """
    if not 0 <= index < tree.size or any(len(element) != 32 for element in (leaf, *proof)):
        raise BadProof(f"no entry {index} in a tree of size {tree.size}, or a hash that is not 32 bytes long")
    if _climb(index, tree.size - 1, leaf, proof)[1] != tree.root:
        raise BadProof(f"the proof does not show this entry at index {index} of the tree of size {tree.size}")


def check_consistency(old: Tree, new: Tree, proof: Sequence[bytes]) -> None:
    """Returns if `proof` (32-byte hashes) shows that `new` begins with `old`; or raises BadProof (RFC 9162 2.1.4.2)."""
    if any(tree.size == 0 and tree.root != EMPTY_ROOT for tree in (old, new)):
        raise BadProof("a tree of size 0 whose root is not the hash of the empty string")
    if old.size > new.size or (old.size == new.size and old.root != new.root):
        raise BadProof(f"the tree of size {new.size} can't follow the tree of size {old.size}")
    if bool(proof) != (0 < old.size < new.size) or any(len(element) != 32 for element in proof):
        raise BadProof("a proof that is not needed, a missing proof, or a hash that is not 32 bytes long")
    if proof:
        # The root of an old tree of 2^n entries is a node of the new tree. The proof omits it; here it begins the path.
        path = [old.root, *proof] if old.size & (old.size - 1) == 0 else proof
        node, last = old.size - 1, new.size - 1
        while node & 1:
            node, last = node >> 1, last >> 1
        if _climb(node, last, path[0], path[1:]) != (old.root, new.root):
            raise BadProof(f"the tree of size {new.size} does not begin with the tree of size {old.size}")

# --- Ed25519: RFC 8032 section 5.1, as strict as libsodium --------------------------------------------------

_P, _L = 2**255 - 19, 2**252 + 27742317777372353535851937790883648493  # the orders of the field and of the group
_D, _ROOT = -121665 * pow(121666, -1, _P) % _P, pow(2, (_P - 1) // 4, _P)  # d of the curve; a square root of -1
_Point = tuple[int, int, int, int]  # "(X, Y, Z, T), with x = X/Z, y = Y/Z, x * y = T/Z"


def _plus(a: _Point, b: _Point) -> _Point:
    s, t = (a[1] - a[0]) * (b[1] - b[0]), (a[1] + a[0]) * (b[1] + b[0])
    u, v = 2 * _D * a[3] * b[3], 2 * a[2] * b[2]
    e, f, g, h = t - s, v - u, v + u, t + s
    return e * f % _P, g * h % _P, f * g % _P, e * h % _P


def _point(data: bytes) -> _Point | None:
    """The point whose canonical encoding is the 32 bytes `data`; None if there is none (section 5.1.3)."""
    y = int.from_bytes(data, "little") & (1 << 255) - 1
    square = (y * y - 1) * pow(_D * y * y + 1, -1, _P)
    x = pow(square, (_P + 3) // 8, _P)
    x = x if (x * x - square) % _P == 0 else x * _ROOT % _P
    x = x if x & 1 == data[31] >> 7 else -x % _P
    return None if y >= _P or (x * x - square) % _P else (x, y, 1, x * y % _P)


def _verify_alone(key: bytes, message: bytes, signature: bytes) -> bool:
    """verify_ed25519 without PyNaCl; takes a few milliseconds (section 5.1.7)."""
    s = int.from_bytes(signature[32:], "little")
    if len(key) != 32 or len(signature) != 64 or s >= _L or not (a := _point(key)):
        return False
    k = int.from_bytes(hashlib.sha512(signature[:32] + key + message).digest(), "little") % _L
    base, minus_a, r = _point(b"\x58" + 31 * b"\x66") or a, (-a[0], a[1], 1, -a[3]), (0, 1, 1, 0)
    table = None, base, minus_a, _plus(base, minus_a)
    for i in range(252, -1, -1):  # r = [s]B - [k]A, bit by bit, both products in one pass
        r = _plus(r, r)
        if point := table[(s >> i & 1) + 2 * (k >> i & 1)]:
            r = _plus(r, point)
    for point in a, r:  # libsodium refuses points of small order: eight times such a point is (0, 1)
        if functools.reduce(lambda p, _: _plus(p, p), range(3), point)[0] == 0:
            return False
    inverse = pow(r[2], -1, _P)
    return (r[1] * inverse % _P | (r[0] * inverse % _P & 1) << 255).to_bytes(32, "little") == signature[:32]


def verify_ed25519(key: bytes, message: bytes, signature: bytes) -> bool:
    """True if `signature` (64 bytes) is a valid signature of `key` (32 bytes) over `message`."""
    if not signing:
        return _verify_alone(key, message, signature)
    try:
        return bool(signing.VerifyKey(key).verify(message, signature) == message)
    except exceptions.CryptoError:  # also if the key or the signature has a wrong length
        return False

# --- Keys and notes: signed-note, tlog-cosignature ------------------------------------------------------

ED25519, COSIGNATURE, ML_DSA_44 = 0x01, 0x04, 0x06  # signature types
_NAME = re.compile(r"[^\s+\x00-\x1f\ud800-\udfff]+")
_KEY_LENGTH = {ED25519: 32, COSIGNATURE: 32, ML_DSA_44: 1312}


def check_name(name: str) -> None:
    """Returns if `name` may be a key name; else raises Malformed."""
    # "Key names MUST be non-empty and MUST NOT contain any Unicode spaces or plus (U+002B) characters."
    if not _NAME.fullmatch(name) or len(name.encode()) > MAX_NAME:
        raise Malformed(f"a name has 1 to {MAX_NAME} bytes, no space, control character or plus sign: {name[:60]!r}")


def split_vkey(vkey: str) -> tuple[str, str, bytes]:
    """Returns the name, the key ID in hex, and the signature type (1 byte) and public key; raises Malformed."""
    name, key_id, encoded, *_ = *vkey.split("+", 2), "", ""  # base64 may contain more plus signs
    check_name(name)
    if not re.fullmatch("[0-9a-f]{8}", key_id) or not (data := parse_base64(encoded)):
        raise Malformed(f"not a verifier key: {vkey[:60]!r}")
    return name, key_id, data


@dataclass(frozen=True)
class VerifierKey:
    """A vkey: a key name, a signature type and a public key."""
    name: str
    kind: int
    key: bytes

    def __post_init__(self) -> None:
        check_name(self.name)
        if _KEY_LENGTH.get(self.kind) != len(self.key):
            raise Malformed(f"key {self.name}: no key of type 0x{self.kind:02x} has {len(self.key)} bytes")

    @functools.cached_property
    def key_id(self) -> bytes:
        """4 bytes: "SHA-256(key name || 0x0A || signature type || public key)[:4]"."""
        return hashlib.sha256(self.name.encode() + b"\n" + bytes([self.kind]) + self.key).digest()[:4]

    @classmethod
    def parse(cls, vkey: str) -> VerifierKey:
        """Parses "<key name>+hex(32-bit key ID)+base64(signature type || public key)"; raises Malformed."""
        name, key_id, data = split_vkey(vkey)
        if (key := cls(name, data[0], data[1:])).key_id.hex() != key_id:
            raise Malformed(f"not a verifier key, as its key ID is not that of its name and key: {vkey[:60]!r}")
        return key

    def verify(self, text: str, signature: bytes) -> int:
        """Returns a valid cosignature's time in seconds, 0 for a valid signature of a log; else raises BadSignature."""
        message, seconds = text.encode(), 0
        if self.kind != ED25519:
            seconds, signature = int.from_bytes(signature[:8], "big"), signature[8:]
            # "It MUST NOT exceed 2^63 - 1"; tlog-witness: "the timestamp MUST NOT be zero"
            if not 0 < seconds <= MAX_INT:
                raise BadSignature(f"a cosignature of {self.name} has the invalid time {seconds}")
            message = (cosigned_message if self.kind == COSIGNATURE else self.subtree_message)(text, seconds)
        if not VERIFIERS[self.kind](self.key, message, signature):
            raise BadSignature(f"a signature of {self.name} does not verify")
        return seconds

    def subtree_message(self, text: str, seconds: int) -> bytes:
        """The `cosigned_message` of an ML-DSA-44 cosignature of this key over a checkpoint; raises BadSignature."""
        origin, size, root, *_ = *text.split("\n"), "", ""
        try:
            words = (0).to_bytes(8, "big") + parse_decimal(size).to_bytes(8, "big") + parse_base64(root, 32)
            name, log = ([len(data), *data] for data in (self.name.encode(), origin.encode()))
            return b"subtree/v1\n\0" + bytes(name) + seconds.to_bytes(8, "big") + bytes(log) + words
        except (Malformed, ValueError):
            raise BadSignature(f"{self.name} can't have cosigned what is no checkpoint") from None


VERIFIERS = {ED25519: verify_ed25519, COSIGNATURE: verify_ed25519}  # by signature type; ML_DSA_44 is added below


def cosigned_message(text: str, seconds: int) -> bytes:
    """The message of a cosignature: "two newline (U+000A) terminated lines … followed by the whole note body"."""
    return f"cosignature/v1\ntime {seconds}\n{text}".encode()


def split_note(note: bytes) -> tuple[str, list[tuple[str, bytes, bytes]]]:
    """Returns a note's text, and the UNVERIFIED name, key ID and signature of each signature line; raises Malformed."""
    # "the text is separated from the signatures by the last empty line in the note"
    text, separator, rest = parse_text(note[: MAX_NOTE + 1]).rpartition("\n\n")
    lines = rest.split("\n")[:-1]
    if not separator or not 0 < len(lines) <= MAX_SIGNATURES or len(note) > MAX_NOTE:
        raise Malformed(f"a note is a text, an empty line and 1 to {MAX_SIGNATURES} signatures, in {MAX_NOTE} bytes")
    signatures = []
    for line in lines:
        dash, name, value, *padding = *line.split(" "), "", ""
        if dash != "—" or padding != ["", ""] or len(data := parse_base64(value)) <= 4:
            raise Malformed(f"not a signature line: {line[:80]!r}")
        check_name(name)
        signatures.append((name, data[:4], data[4:]))
    return text + "\n", signatures


def open_note(note: bytes, keys: Iterable[VerifierKey]) -> tuple[str, dict[VerifierKey, int]]:
    """Returns a note's text, and for each of `keys` that signed it the time in seconds (0 for a log's signature).

    Raises Malformed; BadSignature if none of `keys` signed the note, or if a signature of one of them is false.
    """
    text, signatures = split_note(note)
    known, signed = {(key.name, key.key_id): key for key in keys}, dict[VerifierKey, int]()
    for name, key_id, value in signatures:
        # "Verifiers MUST ignore signatures from unknown keys … If a signature from a known key fails to verify, clients
        # SHOULD reject the whole note."
        if key := known.get((name, key_id)):
            signed[key] = max(key.verify(text, value), signed.get(key, 0))
    if not signed:
        raise BadSignature("no signature of a trusted key")
    return text, signed

# --- Checkpoints and policies: tlog-checkpoint, tlog-policy ---------------------------------------------

@dataclass(frozen=True)
class Checkpoint:
    """A log's statement of its tree. `cosigned` lists the keys that cosigned it, and the times in seconds."""
    origin: str
    tree: Tree
    extensions: tuple[str, ...] = ()
    cosigned: tuple[tuple[VerifierKey, int], ...] = field(default=(), compare=False)

    @classmethod
    def parse(cls, text: str) -> Checkpoint:
        """Returns the checkpoint in a note's text, UNVERIFIED (see open_checkpoint); raises Malformed."""
        lines = text.split("\n")
        # "a sequence of at least three non-empty lines"; "clients MUST NOT assume that the origin" is like a key's name
        if _NOT_TEXT.search(text) or len(lines) < 4 or lines.pop() or "" in lines or len(lines[0].encode()) > MAX_NAME:
            raise Malformed(f"a checkpoint has at least three lines, none empty, the first of at most {MAX_NAME} bytes")
        return cls(lines[0], Tree(parse_decimal(lines[1]), parse_base64(lines[2], 32)), tuple(lines[3:]))


@dataclass(frozen=True)
class Quorum:
    """A group. It is met if `threshold` of its members are: a witness if it cosigned, a group if it is met itself."""
    threshold: int
    members: tuple[VerifierKey | Quorum, ...]

    def __post_init__(self) -> None:
        # "it is required that 1 <= k <= n"; the predefined `none` has no members
        if not min(1, len(self.members)) <= self.threshold <= len(self.members):
            raise Malformed(f"a group of {len(self.members)} members can't ask for {self.threshold}")
        if self.depth > MAX_DEPTH:
            raise Malformed(f"groups are nested more than {MAX_DEPTH} deep")

    @functools.cached_property
    def depth(self) -> int:
        return 1 + max((m.depth for m in self.members if isinstance(m, Quorum)), default=0)

    def met(self, keys: Collection[VerifierKey]) -> bool:
        return self.threshold <= sum(m.met(keys) if isinstance(m, Quorum) else m in keys for m in self.members)

    def leaves(self) -> list[VerifierKey]:
        return [key for m in self.members for key in (m.leaves() if isinstance(m, Quorum) else [m])]


@dataclass(frozen=True)
class Policy:
    """Accepts a checkpoint if one of `logs` signed it and the `quorum` of `witnesses` cosigned it."""
    logs: tuple[VerifierKey, ...]  # of type 0x01
    witnesses: tuple[VerifierKey, ...] = ()  # of type 0x04 or 0x06
    quorum: Quorum = Quorum(0, ())
    urls: tuple[tuple[VerifierKey, str], ...] = ()  # of logs and witnesses; not used in Part I
    origin: str = ""  # of the checkpoints; if "", it has to be the name of the log's key

    def __post_init__(self) -> None:
        for keys, kinds in (self.logs, {ED25519}), (self.witnesses, {COSIGNATURE, ML_DSA_44}):
            # "Two vkeys are considered duplicate if they wrap the same underlying public key"
            if not {k.kind for k in keys} <= kinds or not len({k.key for k in keys}) == len(keys):
                raise Malformed("a policy has the same key twice, or a key of a wrong type for a log or a witness")
        if len({(key.name, key.key_id) for key in self.logs + self.witnesses}) < len(self.logs + self.witnesses):
            raise Malformed("a policy has two keys of one name and key ID, which no signature line can tell apart")
        members = self.quorum.leaves()
        if len(set(members)) < len(members) or not set(members) <= set(self.witnesses):
            raise Malformed("the quorum counts a witness twice, or one that is not in the policy")


def open_checkpoint(note: bytes, policy: Policy) -> Checkpoint:
    """Returns the checkpoint of a note if `policy` accepts it; raises Malformed, BadSignature."""
    text, signed = open_note(note, (*policy.logs, *policy.witnesses))
    checkpoint = Checkpoint.parse(text)
    # tlog-policy: "This name MUST correspond to the log's origin line"
    if not any(key in policy.logs and (policy.origin or key.name) == checkpoint.origin for key in signed):
        raise BadSignature(f"the checkpoint of {checkpoint.origin} is not signed by a log of the policy")
    cosigned = tuple((key, seconds) for key, seconds in signed.items() if key in policy.witnesses)
    if not policy.quorum.met([key for key, _ in cosigned]):
        raise BadSignature(f"{len(cosigned)} known witnesses cosigned {checkpoint.origin}: short of the quorum")
    return dataclasses.replace(checkpoint, cosigned=cosigned)

# --- Policy files: tlog-policy ---------------------------------------------------------------------------

def as_witness(key: VerifierKey) -> VerifierKey:
    """Returns a key of type 0x01 as type 0x04, any other unchanged: Go's tools give a witness's vkey type 0x01."""
    return VerifierKey(key.name, COSIGNATURE, key.key) if key.kind == ED25519 else key


def simple_policy(logs: Iterable[VerifierKey], witnesses: Iterable[VerifierKey] = (), k: int | None = None) -> Policy:
    """A policy that accepts any of `logs` with cosignatures of `k` (None: all) of `witnesses`; raises Malformed."""
    keys = tuple(as_witness(key) for key in witnesses)
    return Policy(tuple(logs), keys, Quorum(len(keys) if k is None else k, keys))


def parse_policy(data: bytes) -> Policy:
    """Returns the policy in a policy file; raises Malformed with the line number."""
    # "the allowed octet values are 0x09 (tab), 0x0A (newline), 0x20-0x7E, and 0x80-0xFF"
    if not re.fullmatch(rb"[\t\n\x20-\x7e\x80-\xff]*", data) or len(data) > MAX_POLICY:
        raise Malformed(f"a policy file has no control characters and at most {MAX_POLICY} bytes")
    # "each line is terminated by ASCII newline": the beginning of a file that was cut off may be a policy, too.
    if not data.endswith(b"\n"):
        raise Malformed("the last line of the policy file has no newline: was it cut off?")
    lines = _PolicyLines()
    for number, line in enumerate(data.split(b"\n"), 1):
        if (words := line.split()) and not words[0].startswith(b"#"):
            try:
                lines.add(words)
            except Malformed as error:
                raise Malformed(f"line {number} of the policy file: {error}") from None
    if lines.quorum is None:
        raise Malformed("the policy file has no quorum line (`quorum none` asks for no witness)")
    if lines.unused and not lines.logs:
        raise Malformed("the policy file has no log with a key of type 0x01")
    return Policy(tuple(lines.logs), tuple(lines.witnesses), lines.quorum, tuple(lines.urls))


class _PolicyLines:
    """The definitions in the lines so far of a policy file. "names must be handled as opaque octet strings"."""

    def __init__(self) -> None:
        self.logs, self.witnesses, self.urls = list[VerifierKey](), list[VerifierKey](), list[tuple[VerifierKey, str]]()
        self.unused = list[bytes]()
        self.names, self.members = dict[bytes, VerifierKey | Quorum](), set[bytes]()
        self.quorum: Quorum | None = None

    def add(self, words: list[bytes]) -> None:
        match words:
            case [b"log", vkey, *url] if len(url) <= 1:
                *_, data = split_vkey(text := vkey.decode(errors="surrogateescape"))
                if data[0] in (ED25519, COSIGNATURE):
                    self._key(self.logs, VerifierKey.parse(text), url)
                elif data in self.unused:
                    raise Malformed("the policy has the same key twice")
                else:  # of another signature type: a second key of the log, which is not used here
                    self.unused.append(data)
            case [b"witness", name, vkey, *url] if len(url) <= 1:
                key = as_witness(VerifierKey.parse(vkey.decode(errors="surrogateescape")))
                self._define(name, self._key(self.witnesses, key, url))
            case [b"group", name, k, *members] if members:
                self._define(name, self._group(k, members))
            case [b"quorum", name] if self.quorum is None:  # "A policy file must include exactly one quorum line."
                chosen = Quorum(0, ()) if name == b"none" else self._named(name)
                self.quorum = chosen if isinstance(chosen, Quorum) else Quorum(1, (chosen,))
            case _:
                raise Malformed(f"not a log, witness, group or first quorum line: {b' '.join(words)[:60]!r}")

    def _key(self, keys: list[VerifierKey], key: VerifierKey, url: list[bytes]) -> VerifierKey:
        keys.append(key)
        Policy(tuple(self.logs), tuple(self.witnesses))  # raises Malformed for a duplicate or a wrong type
        self.urls += [(key, word.decode(errors="surrogateescape")) for word in url]
        return key

    def _group(self, k: bytes, names: list[bytes]) -> Quorum:
        # "Each defined name can be listed as a group member at most once."
        if len(set(names)) < len(names) or self.members & set(names):
            raise Malformed("a name can be a member of only one group, and only once")
        self.members |= set(names)
        # "The `any` variant is a shorthand for k = 1, and the `all` variant is a shorthand for k = n."
        shorthand = {b"any": 1, b"all": len(names)}
        threshold = shorthand[k] if k in shorthand else parse_decimal(k.decode("latin-1"))
        return Quorum(threshold, tuple(map(self._named, names)))

    def _define(self, name: bytes, value: VerifierKey | Quorum) -> None:
        if name in self.names or name == b"none":
            raise Malformed(f"the name {name[:60]!r} is taken")
        self.names[name] = value

    def _named(self, name: bytes) -> VerifierKey | Quorum:
        if name not in self.names:
            raise Malformed(f"no line above defines {name[:60]!r}")
        return self.names[name]

# --- Entries ----------------------------------------------------------------------------------------------

_CHAR = r"[^\x00-\x1f\x7f-\x9f\ud800-\udfff"  # excludes control characters and lone surrogates; _ENTRY adds more
_ENTRY = re.compile(  # groups: checksum, filename, issuer, subject
    r"pypi-transparency/v1\n(sha256:[0-9a-f]{64})\n"
    rf"((?!\s){_CHAR}/\\]+(?<!\s))(?:\npublisher ({_CHAR}\s]+) ({_CHAR}]+))?")


def encode_entry(filename: str, checksum: str, issuer: str | None = None, subject: str | None = None) -> bytes:
    """Returns the bytes of an entry: a file and, if given, its publisher; raises Malformed."""
    text = f"pypi-transparency/v1\n{checksum}\n{filename}"
    if issuer is not None:
        text += f"\npublisher {issuer} {subject}"
    # Compare what was parsed with the arguments: a newline within a field would shift the fields.
    if not (match := _ENTRY.fullmatch(text)) or match.groups() != (checksum, filename, issuer, subject):
        raise Malformed(f"not sha256:<64 hex digits>, a filename and an optional publisher: {text[21:200]!r}")
    data = text.encode()
    if len(data) > MAX_FILENAME and (len(data) > MAX_ENTRY or len(filename.encode()) > MAX_FILENAME):
        raise Malformed(f"an entry of more than {MAX_ENTRY} bytes, or a filename of more than {MAX_FILENAME}")
    return data


class Publisher(NamedTuple):
    """The identity of a PEP 740 attestation: the OIDC issuer, and the subject of the signing certificate."""
    issuer: str
    subject: str


@dataclass(frozen=True)
class Entry:
    """A logged file of an index; raises Malformed. `checksum` is "sha256:" and 64 lowercase hex digits."""
    filename: str
    checksum: str
    publisher: Publisher | None = None

    def __post_init__(self) -> None:
        self.encode()

    @classmethod
    def parse(cls, data: bytes) -> Entry:
        """The entry whose encoding is `data`; raises Malformed."""
        if not (match := _ENTRY.fullmatch(data.decode(errors="surrogateescape"))):
            raise Malformed(f"not an entry of a Python package index: {data[:200]!r}")
        return cls(match[2], match[1], Publisher(match[3], match[4]) if match[3] else None)

    def encode(self) -> bytes:
        return encode_entry(self.filename, self.checksum, *(self.publisher or ()))

# --- Offline proofs, and the front door: tlog-proof --------------------------------------------------------

@dataclass(frozen=True)
class Proof:
    """An UNVERIFIED .tlog-proof (see check_logged). `hashes` have 32 bytes each; `checkpoint` is a note."""
    index: int
    hashes: tuple[bytes, ...]
    checkpoint: bytes
    extra: bytes = b""

    @classmethod
    def parse(cls, data: bytes) -> Proof:
        """Returns the proof whose text is `data`; raises Malformed."""
        head, _, checkpoint = data.partition(b"\n\n")
        first, *lines = parse_text(head + b"\n").split("\n")[:-1]
        extra = parse_base64(lines.pop(0)[6:]) if lines and lines[0].startswith("extra ") else None
        if first != "c2sp.org/tlog-proof@v1" or extra == b"" or not lines or not lines[0].startswith("index "):
            raise Malformed("not a c2sp.org/tlog-proof@v1 with an optional extra line and an index line")
        split_note(checkpoint)
        return cls(parse_decimal(lines[0][6:]), tuple(parse_base64(h, 32) for h in lines[1:]), checkpoint, extra or b"")

    def entry(self, filename: str, checksum: str) -> Entry:
        """Returns the UNVERIFIED entry that the proof claims for this file; raises Malformed, BadProof."""
        # "Applications MUST NOT implicitly trust the extra data": it may add a publisher, but not name another file.
        is_entry = _ENTRY.fullmatch(self.extra.decode(errors="surrogateescape"))  # other extra data is ignored
        entry = Entry.parse(self.extra) if is_entry else Entry(filename, checksum)
        if (entry.filename, entry.checksum) != (filename, checksum):
            raise BadProof(f"the proof is about {entry.filename} with {entry.checksum}")
        return entry


def check_logged(entry: Entry | bytes, proof: bytes, policy: Policy) -> Checkpoint:
    """Returns the checkpoint of a .tlog-proof if `policy` accepts it and the proof shows that its tree has `entry`.

    Raises Malformed; BadSignature (the policy refuses the checkpoint); BadProof (the entry is not in the tree).
    """
    parsed = Proof.parse(proof)
    checkpoint = open_checkpoint(parsed.checkpoint, policy)
    leaf = leaf_hash(entry.encode() if isinstance(entry, Entry) else entry)
    check_inclusion(leaf, parsed.index, checkpoint.tree, parsed.hashes)
    return checkpoint


def verify_file(path: str | Path, proof: bytes, policy: Policy) -> Checkpoint:
    """Returns the checkpoint as check_logged does, if the file at `path` is logged under its own name.

    Raises what check_logged raises, and OSError: this is the only function of Part I that reads a file.
    """
    with open(path, "rb") as file:
        checksum = f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
    return check_logged(Proof.parse(proof).entry(Path(path).name, checksum), proof, policy)


# === Part I, continued: ML-DSA-44 =======================================================================
# What verifies the cosignatures of type 0x06. `python btlog.py core` prints it behind Part I.
# --- ML-DSA-44: the verification of FIPS 204, with its algorithms' numbers ----------------------------------

_Q, _GAMMA1, _GAMMA2, _BETA, _OMEGA = 8380417, 1 << 17, 95232, 78, 80  # Table 1
_reversed = functools.reduce(lambda e, bit: e + [x + bit for x in e], (128, 64, 32, 16, 8, 4, 2, 1), [0])
_ZETAS = [pow(1753, exponent, _Q) for exponent in _reversed]  # Appendix B
_Poly = list[int]  # 256 coefficients of an element of R_q or of T_q


def _ntt(w: _Poly) -> _Poly:
    """Algorithm 41."""
    m = 0
    for size in (128, 64, 32, 16, 8, 4, 2, 1):
        out: _Poly = []
        for at in range(0, 256, 2 * size):
            m += 1
            low, high = w[at : at + size], [_ZETAS[m] * x % _Q for x in w[at + size : at + 2 * size]]
            out += [*map(int.__add__, low, high), *map(int.__sub__, low, high)]
        w = out
    return w


def _inverse_ntt(w: _Poly) -> _Poly:
    """Algorithm 42."""
    m = 256
    for size in (1, 2, 4, 8, 16, 32, 64, 128):
        out: _Poly = []
        for at in range(0, 256, 2 * size):
            m -= 1
            low, high = w[at : at + size], w[at + size : at + 2 * size]
            out += [*map(int.__add__, low, high), *(_ZETAS[m] * x % _Q for x in map(int.__sub__, high, low))]
        w = out
    return [8347681 * x % _Q for x in w]  # "f <- 8347681", which is 1/256 modulo q


def _times(a: _Poly, b: _Poly) -> _Poly:
    """Algorithm 45, not reduced yet."""
    return list(map(int.__mul__, a, b))


def _unpack(data: bytes, width: int) -> _Poly:
    """Algorithm 18, and the core of 19: the numbers of `width` bits that little-endian `data` consists of."""
    value = int.from_bytes(data, "little")
    return [value >> at & (1 << width) - 1 for at in range(0, 8 * len(data), width)]


def _uniform(seed: bytes) -> _Poly:
    """Algorithm 30: the first 256 numbers of 23 bits below q in a stream of SHAKE128."""
    stream = hashlib.shake_128(seed).digest(3 * 1024)  # three times what is needed: one in a thousand is too large
    numbers = (int.from_bytes(stream[at : at + 3], "little") & (1 << 23) - 1 for at in range(0, len(stream), 3))
    return [number for number in numbers if number < _Q][:256]


def _in_ball(seed: bytes) -> _Poly:
    """Algorithm 29: a polynomial of 39 coefficients 1 or -1, the others 0."""
    stream = hashlib.shake_256(seed).digest(4096)
    signs, rest, c = int.from_bytes(stream[:8], "little"), iter(stream[8:]), [0] * 256
    for i in range(256 - 39, 256):
        j = next(j for j in rest if j <= i)
        c[i], c[j] = c[j], 1 - 2 * (signs & 1)
        signs >>= 1
    return c


def _hints(y: bytes) -> list[_Poly] | None:
    """Algorithm 21: the hints in 84 bytes; None if they are not encoded as they have to be."""
    h, index = [[0] * 256 for _ in range(4)], 0
    for i in range(4):
        places, index = y[index : y[_OMEGA + i]], y[_OMEGA + i]
        if not sum(map(sum, h)) + len(places) == index <= _OMEGA or list(places) != sorted(set(places)):
            return None
        for place in places:
            h[i][place] = 1
    return None if any(y[index:_OMEGA]) else h


def _use_hint(h: int, r: int) -> int:
    """Algorithm 40, with Algorithm 36."""
    r0 = r % (2 * _GAMMA2)
    r0 -= 2 * _GAMMA2 if r0 > _GAMMA2 else 0
    r1, r0 = (0, r0 - 1) if r - r0 == _Q - 1 else ((r - r0) // (2 * _GAMMA2), r0)
    return (r1 + (1 if r0 > 0 else -1)) % 44 if h else r1


@functools.lru_cache(64)
def _expand(key: bytes) -> tuple[list[list[_Poly]], list[_Poly], bytes]:
    """Matrix A (Algorithm 32), NTT(t1 * 2^d), and tr, for a public key of 1,312 bytes (Algorithm 23)."""
    matrix = [[_uniform(key[:32] + bytes([s, r])) for s in range(4)] for r in range(4)]
    t = [_ntt([x << 13 for x in _unpack(key[at : at + 320], 10)]) for at in range(32, 1312, 320)]
    return matrix, t, hashlib.shake_256(key).digest(64)


def verify_ml_dsa_44(key: bytes, message: bytes, signature: bytes, context: bytes = b"") -> bool:
    """True if `signature` (2,420 bytes) is a valid one of `key` (1,312 bytes); takes 5 ms (Algorithm 8)."""
    if len(key) != 1312 or len(signature) != 2420 or len(context) > 255:
        return False
    matrix, t, tr = _expand(key)
    z = [[_GAMMA1 - x for x in _unpack(signature[at : at + 576], 18)] for at in range(32, 2336, 576)]
    hints = _hints(signature[2336:])
    if hints is None or max(abs(x) for poly in z for x in poly) >= _GAMMA1 - _BETA:
        return False
    mu = hashlib.shake_256(tr + bytes([0, len(context)]) + context + message).digest(64)  # Algorithm 3
    c, z, w1 = _ntt(_in_ball(signature[:32])), [_ntt(poly) for poly in z], b""
    for i in range(4):
        products = [*map(_times, matrix[i], z), [-x for x in _times(c, t[i])]]
        w = map(_use_hint, hints[i], _inverse_ntt([sum(column) % _Q for column in zip(*products, strict=True)]))
        w1 += sum(x << 6 * at for at, x in enumerate(w)).to_bytes(192, "little")  # Algorithm 28
    return hashlib.shake_256(mu + w1).digest(32) == signature[:32]


VERIFIERS[ML_DSA_44] = verify_ml_dsa_44

# === Part II: more code without I/O =====================================================================

import argparse
import asyncio
import binascii
import bisect
import codecs
import concurrent.futures
import contextlib
import copy
import difflib
import email.utils
import errno
import gc
import gzip
import hmac
import html
import html.parser
import http.client
import http.server
import importlib
import io
import ipaddress
import itertools
import json
import logging
import math
import mimetypes
import netrc
import os
import select
import shlex
import shutil
import signal
import socket
import sqlite3
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
import urllib.parse
import uuid
import zipfile
import zlib
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Generator, Iterator
from typing import Any, ClassVar, NoReturn, Self, TypeVar, cast

if sys.platform != "win32":
    import fcntl
    import resource

__version__ = "0.1.0"
__all__ += ["Conflict", "Corrupt", "Unavailable"]

logger = logging.getLogger("btlog")

# Further limits. Sizes are in bytes, times in seconds.
MAX_PROOF = 63  # hashes in a proof: from tlog-witness; also the height of the largest tree that MAX_INT allows
MAX_BUNDLE = 256 * (2 + MAX_ENTRY)
MAX_ADD = 1 << 19  # an entry as JSON: room for MAX_ENTRY with every character escaped
MAX_HEAD = 1 << 16  # the head of a request, as in http.server
MAX_ANSWER = 1 << 26  # the longest answer that a client reads
MAX_BATCH, MAX_WAITING = 50_000, 200_000  # entries in one batch of the sequencer; entries that wait for it
MAX_BULK = 1 << 26  # the body of a bulk request
MAX_ZIPPED = 1 << 20  # the largest entry bundle that is compressed: a larger one would take too long
MAX_STREAM = 1 << 20  # the part of a long answer that waits to be sent
MAX_UNREAD = 1 << 18  # the unread part of a request's body: at this size, the server stops receiving
MAX_OF_PROJECT = 100  # files of a project in an answer, or some more, up to the end of an entry bundle
MAX_BUNDLES_READ = 200  # entry bundles for one page of a project's files
MAX_FOUND = 1000  # entries in the answer to a look-up; entries with the same filename
MAX_REFUSALS = 4  # failed commits in a row, after which new entries are refused at once
BUSY_TIMEOUT = 4_000  # milliseconds that SQLite waits for another process
MAX_WAL = 1 << 22  # SQLite's write-ahead log: a larger one is copied into the database
MAX_CONNECTIONS = 4096  # of a server; beyond this, it closes idle connections
# Seconds that a server waits for a client: between requests, for a head, to take a piece of an answer, to disconnect.
IDLE_TIMEOUT, HEAD_TIMEOUT, SEND_TIMEOUT, LINGER_TIMEOUT = 60, 10, 30, 2
MIN_RATE = 16_384  # bytes a second: a body of n bytes may take HEAD_TIMEOUT + n / MIN_RATE seconds
DRAIN_TIMEOUT, WORKER_TIMEOUT = 5, 3  # seconds that a stopping server has to finish its answers; and its commits
CONNECT_TIMEOUT = 5  # seconds to open a connection: nothing can interrupt this wait
ANSWER_TIMEOUT = 15  # seconds to wait for a log's answer while a person waits for the command
PIPE_TIMEOUT = 5  # seconds to wait for a configuration that comes through a pipe
MAX_SKEW = 300  # seconds that the clock of a witness may be ahead of ours

MAX_ADD_CHECKPOINT = 1 << 17  # the body of a request to a witness, and of its answer
MAX_LOG_LIST = 1 << 25  # a list of logs for witnesses: room for 100,000 of them
MAX_LISTED = 1000  # logs on a witness's page
MAX_TOLD = 20  # lines about one list of logs
MAX_WITNESSES = 64  # of a log: a note with more than MAX_SIGNATURES signatures could not be read
MAX_EVIDENCE = 1000  # pairs of checkpoints that a witness keeps against a log
MAX_FINDINGS = 100  # of one kind in 16,384 entries: a monitor only counts the others
MAX_STORED_AT_ONCE = 1 << 23  # of entries that a monitor stores in one step
MAX_STEMS = 50_000  # project names, as written in filenames, that a monitor remembers
MAX_BAD_TILES = 20  # bad-tile findings at a time: each carries tiles as evidence
MAX_KEPT, MAX_KEPT_BYTES = 1000, 1 << 28  # findings whose evidence a monitor keeps; bytes of all this evidence
LATE = 14 * 86400  # seconds after which a monitor tells of a file that is added to a release
MAX_ALARMS = 1000  # findings that a monitor remembers after they were told
MIN_FREE = 1 << 27  # bytes of the disk that a monitor leaves free, however large the log is
MAX_AHEAD = 1 << 20  # bytes of an entry bundle or page that is read ahead; a larger one is read in its turn
MAX_PAGE, MAX_FILES = 56 << 20, 500_000  # bytes of a page of an index; files that it may list
MAX_REDIRECTS = 5  # in a row, to pages of the same index
MAX_COMPARED = 1000  # projects without new files that a monitor compares with the index at a time

TEXT, NDJSON, OCTETS = "text/plain; charset=utf-8", "application/x-ndjson", "application/octet-stream"
CORS = {"Access-Control-Allow-Origin": "*"}  # scripts of any web page may read


# --- Errors that Part I never raises ----------------------------------------------------------------------

class Conflict(Error):
    """The filename is already logged with another checksum, at `index`."""
    status, exit_code = 409, 1
    def __init__(self, message: str, index: int) -> None:
        super().__init__(message)
        self.index = index

class Unavailable(Error):
    """Something can't be done or checked now: no network, no quorum, no room."""
    status, exit_code = 503, 3

class Corrupt(Error):
    """Stored data is inconsistent. This accuses nobody: disks fail."""
    status, exit_code = 500, 3


# --- Signing, and encoders for the formats that Part I parses --------------------------------------------

b64 = functools.partial(binascii.b2a_base64, newline=False)


def to_base64(data: bytes) -> str:
    return b64(data).decode()


def encode_vkey(key: VerifierKey) -> str:
    return f"{key.name}+{key.key_id.hex()}+{to_base64(bytes([key.kind]) + key.key)}"


def check_origin(origin: str) -> str:
    """Returns an origin if it may be a log's; else raises Malformed. Most are the name of the log's key."""
    try:
        if Checkpoint.parse(f"{origin}\n0\n{to_base64(EMPTY_ROOT)}\n").origin == origin:
            return origin
        raise Malformed("a line break")
    except Malformed:
        raise Malformed(f"an origin has 1 to {MAX_NAME} bytes, and no control characters: {origin[:60]!r}") from None


def encode_checkpoint(checkpoint: Checkpoint) -> str:
    """Returns the note text of a checkpoint."""
    lines = (checkpoint.origin, str(checkpoint.tree.size), to_base64(checkpoint.tree.root), *checkpoint.extensions)
    return "".join(f"{line}\n" for line in lines)


def encode_proof(proof: Proof) -> bytes:
    """Returns the text of a .tlog-proof."""
    extra = [f"extra {to_base64(proof.extra)}"] if proof.extra else []
    lines = ("c2sp.org/tlog-proof@v1", *extra, f"index {proof.index}", *map(to_base64, proof.hashes))
    return "".join(f"{line}\n" for line in lines).encode() + b"\n" + proof.checkpoint


def signature_line(name: str, key_id: bytes, signature: bytes) -> str:
    return f"— {name} {to_base64(key_id + signature)}\n"


@dataclass(frozen=True)
class Signer:
    """A private key, Ed25519 (RFC 8032) or ML-DSA-44 (FIPS 204): a key name, and a 32-byte seed that no repr shows."""
    name: str
    seed: bytes = field(repr=False)
    kind: int = ED25519

    @classmethod
    def parse(cls, skey: str) -> Signer:
        """Parses Go's "PRIVATE+KEY+<name>+<hash>+<base64(type || seed)>", of type 0x01 or 0x06; raises Malformed."""
        parts = [*skey.split("+", 4), "", "", "", ""]
        try:
            data = parse_base64(parts[4], 33)
            signer = cls(parts[2], data[1:], data[0])
            known = parts[:2] == ["PRIVATE", "KEY"] and data[0] in (ED25519, ML_DSA_44)
            if known and signer.key.key_id.hex() == parts[3]:
                return signer
        except Malformed:
            pass  # the message would show a part of the key
        raise Malformed("not a private key of the form PRIVATE+KEY+name+hash+base64, or its hash does not match")

    def encode(self) -> str:
        return f"PRIVATE+KEY+{self.name}+{self.key.key_id.hex()}+{to_base64(bytes([self.kind]) + self.seed)}"

    @functools.cached_property
    def _key(self) -> Any:
        if self.kind == ML_DSA_44:
            try:
                mldsa = importlib.import_module("cryptography.hazmat.primitives.asymmetric.mldsa")
                return mldsa.MLDSA44PrivateKey.from_seed_bytes(self.seed)
            except (ImportError, AttributeError):
                raise Unavailable("ML-DSA-44 needs cryptography: python -m pip install 'cryptography>=48'") from None
        if not signing:
            raise Unavailable("signing needs PyNaCl: python -m pip install 'PyNaCl>=1.6.2,<2'")
        return signing.SigningKey(self.seed)

    @functools.cached_property
    def key(self) -> VerifierKey:
        public = self._key.public_key().public_bytes_raw() if self.kind == ML_DSA_44 else self._key.verify_key
        return VerifierKey(self.name, self.kind, bytes(public))

    def sign(self, checkpoint: Checkpoint) -> bytes:
        """Returns the checkpoint as a note with this Ed25519 key's signature, as a log signs it."""
        text = encode_checkpoint(checkpoint)
        signature = self._key.sign(text.encode()).signature
        return f"{text}\n{signature_line(self.name, self.key.key_id, signature)}".encode()

    @functools.cached_property
    def witness_key(self) -> VerifierKey:
        return as_witness(self.key)

    def cosign(self, text: str, seconds: int) -> str:
        """Returns the signature line of this key's cosignature over a checkpoint's text, as a witness makes it.

        By tlog-checkpoint, "Logs SHOULD use ML-DSA-44 cosignatures to sign the checkpoint", too.
        """
        if self.kind == ML_DSA_44:
            signature = self._key.sign(self.key.subtree_message(text, seconds))
        else:
            signature = self._key.sign(cosigned_message(text, seconds)).signature
        return signature_line(self.name, self.witness_key.key_id, seconds.to_bytes(8, "big") + signature)


# --- Tiles and bundles: tlog-tiles -------------------------------------------------------------------------

_TILE_PATH = re.compile(r"tile/(entries|[0-9]{1,2})/((?:x[0-9]{3}/)*[0-9]{3})(?:\.p/([0-9]{1,3}))?")


def tile_path(level: int | None, index: int, width: int = 256) -> str:
    """Returns the path of a tile of `width` (1 to 256) hashes, or for level None of a bundle of `width` entries."""
    groups = [f"{index % 1000:03d}"]
    while index := index // 1000:
        groups.insert(0, f"x{index % 1000:03d}")
    partial = f".p/{width}" if width < 256 else ""
    return f"tile/{'entries' if level is None else level}/{'/'.join(groups)}{partial}"


def parse_tile_path(path: str) -> tuple[int | None, int, int]:
    """Returns the level (None for an entry bundle), index and width of a canonical tile path; raises Malformed."""
    if match := _TILE_PATH.fullmatch(path):
        level = None if match[1] == "entries" else parse_decimal(match[1])
        index = parse_decimal(re.sub("[x/]", "", match[2]).lstrip("0") or "0")  # groups of 3 digits form one decimal
        width = 256 if match[3] is None else parse_decimal(match[3])
        # "a decimal ASCII integer between 0 and 63", "between 1 and 255"
        if (level or 0) <= 63 and width > 0 and tile_path(level, index, width) == path:
            return level, index, width
    raise Malformed(f"not the path of a tile: {path[:80]!r}")


def encode_bundle(entries: Iterable[bytes]) -> bytes:
    """Returns an entry bundle, "big-endian uint16 length-prefixed log entries" of at most MAX_ENTRY bytes each."""
    return b"".join([len(entry).to_bytes(2, "big") + entry for entry in entries])


def split_bundle(data: bytes) -> list[bytes]:
    """Returns all entries of a bundle; raises Malformed."""
    entries, at = [], 0
    while at < len(data):
        end = at + 2 + int.from_bytes(data[at : at + 2], "big")
        if at + 2 > len(data) or end > len(data):
            raise Malformed(f"the bundle is cut off at byte {len(data)}")
        entries.append(data[at + 2 : end])
        at = end
    return entries


def parse_bundle(data: bytes, width: int) -> list[bytes]:
    """Returns the entries of a bundle, which must have `width` entries; raises Malformed."""
    if len(entries := split_bundle(data)) != width:
        raise Malformed(f"the bundle has {len(entries)} entries, not {width}")
    return entries


def leaf_hashes(entries: Iterable[bytes]) -> list[bytes]:
    """The leaf hashes of entries. Inlines leaf_hash for speed."""
    sha256 = hashlib.sha256
    return [sha256(b"\x00" + entry).digest() for entry in entries]


def expand_tile(tile: bytes) -> list[list[bytes]]:
    """Returns the 32-byte hashes of all complete nodes of a tile: its own hashes first, then level by level up."""
    sha256, nodes = hashlib.sha256, list(struct.unpack("32s" * (len(tile) // 32), tile))
    levels = [nodes]
    while len(nodes) > 1:
        pairs = iter(nodes)  # inlines node_hash for speed
        nodes = [sha256(b"\x01" + left + right).digest() for left, right in zip(pairs, pairs, strict=False)]
        levels.append(nodes)
    return levels


class Cache:
    """A least-recently-used cache up to a total weight. `put` keeps the value that a key has. Threads may share it."""

    def __init__(self, limit: int, weigh: Callable[[Any], int] = lambda value: 1) -> None:
        self._limit, self._weigh, self._weight = limit, weigh, 0
        self._kept: OrderedDict[Any, Any] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Any) -> Any:
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def put(self, key: Any, value: Any) -> None:
        with self._lock:
            if key not in self._kept:
                self._kept[key] = value
                self._weight += self._weigh(value)
                while self._weight > self._limit:
                    self._weight -= self._weigh(self._kept.popitem(last=False)[1])


    def replace(self, key: Any, value: Any) -> None:
        with self._lock:
            if key in self._kept:
                self._weight -= self._weigh(self._kept.pop(key))
        self.put(key, value)


class Tiles:
    """Reads the hashes of a tree of `size` entries from its tiles: one reader for log, client and monitor.

    `fetch(level, index, width)` returns the 32 * width bytes of a tile. `cache` keeps expanded tiles. Trees of one log
    may share it: a tile of a given width never changes.
    """

    def __init__(self, size: int, fetch: Callable[[int, int, int], bytes], cache: Cache | None = None) -> None:
        self.size, self._fetch, self._cache = size, fetch, Cache(64) if cache is None else cache

    def expanded(self, level: int, index: int) -> list[list[bytes]]:
        """Returns the nodes (as expand_tile) of tile `index` at `level`, as wide as in this tree; raises BadProof."""
        width = min(256, (self.size >> 8 * level) - 256 * index)
        levels: list[list[bytes]] | None = self._cache.get((level, index, width))
        if levels is None:
            tile = self._fetch(level, index, width)
            if len(tile) != 32 * width or width < 1:
                raise BadProof(f"{tile_path(level, index, width)} has {len(tile)} bytes")
            levels = expand_tile(tile)
            self._authenticate(level, index, levels)
            self._cache.put((level, index, width), levels)
        return levels

    def _authenticate(self, level: int, index: int, levels: list[list[bytes]]) -> None:
        """Raises BadProof if the tile can't be trusted. This class trusts all: a log reads its own tiles."""

    def hash(self, lo: int, hi: int) -> bytes:
        """The 32-byte Merkle tree hash of entries lo to hi - 1, "MTH(D[lo:hi])" of RFC 6962 section 2.1.

        lo must be a multiple of the largest power of two that is not above hi - lo. In proofs it always is.
        """
        count = hi - lo
        if count == 0:
            return EMPTY_ROOT
        if count & (count - 1) == 0:
            level, height = divmod(count.bit_length() - 1, 8)
            node = lo >> 8 * level + height
            return self.expanded(level, node >> 8 - height)[height][node & (1 << 8 - height) - 1]
        middle = lo + split(count)
        return node_hash(self.hash(lo, middle), self.hash(middle, hi))


class AuthenticTiles(Tiles):
    """Tiles from an untrusted source. Each is proved to belong to `tree` before it is used or kept; raises BadProof.

    The constructor reads the partial tiles at the right edge, at most eight. They must hash to the root. A full tile
    must hash to its node in the tile above it.
    """

    def __init__(self, tree: Tree, fetch: Callable[[int, int, int], bytes]) -> None:
        super().__init__(tree.size, fetch)
        self._edge = Tiles(tree.size, fetch)
        if self._edge.hash(0, tree.size) != tree.root:  # this reads all partial tiles, and no other
            raise BadProof(f"the tiles do not lead to the root of the tree of size {tree.size}")

    def expanded(self, level: int, index: int) -> list[list[bytes]]:
        partial = index == self.size >> 8 * level >> 8
        return self._edge.expanded(level, index) if partial else super().expanded(level, index)

    def _authenticate(self, level: int, index: int, levels: list[list[bytes]]) -> None:
        if levels[8][0] != self.expanded(level + 1, index // 256)[0][index % 256]:
            raise BadProof(f"{tile_path(level, index)} is not the one that the checkpoint covers")


def split(count: int) -> int:
    """Returns "the largest power of two smaller than" count (RFC 6962 section 2.1); count must be 2 or more."""
    return 1 << (count - 1).bit_length() - 1


def prove_inclusion(tiles: Tiles, index: int) -> list[bytes]:
    """Returns 32-byte hashes, "PATH(m, D[n])" of RFC 6962 section 2.1.1, for entry `index` < tiles.size."""

    def path(lo: int, hi: int) -> list[bytes]:
        if hi - lo == 1:
            return []
        middle = lo + split(hi - lo)
        if index < middle:
            return [*path(lo, middle), tiles.hash(middle, hi)]
        return [*path(middle, hi), tiles.hash(lo, middle)]

    return path(0, tiles.size)


def prove_consistency(tiles: Tiles, old: int) -> list[bytes]:
    """Returns 32-byte hashes, "PROOF(m, D[n])" of RFC 6962 section 2.1.2, from size `old` <= tiles.size."""

    def subproof(lo: int, hi: int, whole: bool) -> list[bytes]:  # "SUBPROOF(m, D[n], b)"
        if old == hi:
            return [] if whole else [tiles.hash(lo, hi)]
        middle = lo + split(hi - lo)
        if old <= middle:
            return [*subproof(lo, middle, whole), tiles.hash(middle, hi)]
        return [*subproof(middle, hi, False), tiles.hash(lo, middle)]

    return subproof(0, tiles.size, True) if old else []


def prove_many(tiles: Tiles, indices: Sequence[int], separator: bytes) -> Iterator[bytes]:
    """Yields the inclusion proof of each of `indices`, as base64 joined by `separator`; `indices` ascend strictly.

    Works from the root down, for all entries at once. It reads and encodes a hash once, even if many proofs share it.
    """
    separator = b"=" + separator  # as what is joined are the first 43 digits of each hash
    todo = [(0, tiles.size, 0, len(indices), b"=")] if indices else []
    while todo:
        lo, hi, first, last, upper = todo.pop()  # indices[first:last], at least one, are in [lo, hi)
        count = hi - lo
        if count == last - first and count & (count - 1) == 0 and count <= 256:
            yield from _prove_all(tiles, lo, count, separator, upper)
            continue
        middle = lo + split(count)
        cut = bisect.bisect_left(indices, middle, first, last)
        if cut < last:
            todo.append((middle, hi, cut, last, separator + b64(tiles.hash(lo, middle))[:43] + upper))
        if first < cut:
            todo.append((lo, middle, first, cut, separator + b64(tiles.hash(middle, hi))[:43] + upper))


def _prove_all(tiles: Tiles, lo: int, count: int, separator: bytes, upper: bytes) -> list[bytes]:
    """The proofs of all entries of a complete subtree of `count` <= 256 entries. All proofs end with `upper`."""
    if count == 1:
        return [upper[len(separator):]]
    place, levels, proofs, ends = lo % 256, tiles.expanded(0, lo // 256), list[bytes](), [upper]
    for level in range(count.bit_length() - 2, -1, -1):
        # All hashes are encoded at once: with a zero byte behind it, each becomes its 43 digits and an "A" for the "=".
        digits = b64(b"\0".join([*levels[level][place >> level : (place + count) >> level], b""]))
        halves = iter(struct.unpack("43sx" * (len(digits) // 44), digits))
        proofs = [node + end for end, left, right in zip(ends, halves, halves, strict=True) for node in (right, left)]
        ends = [separator + proof for proof in proofs] if level else []
    return proofs


Grown = tuple[int, int, bytes, list[list[bytes]]]  # a tile's level, index, bytes; expand_tile of it if it is full


def grow(size: int, edge: Callable[[int, int, int], bytes], leaves: list[bytes]) -> Iterator[Grown]:
    """Yields each tile that changes or is new when `leaves` (32-byte leaf hashes) are appended to `size` entries.

    `edge(level, index, width)` returns the partial tile at the right edge of a level before that.
    """
    level = 0
    while leaves:
        index, width = divmod(size, 256)
        data = (edge(level, index, width) if width else b"") + b"".join(leaves)
        leaves = []
        for at in range(0, len(data), 8192):
            tile, nodes = data[at : at + 8192], []
            # "a partial tile … MUST NOT be hashed into a tile at the level above"
            if len(tile) == 8192:
                nodes = expand_tile(tile)
                leaves.append(nodes[8][0])
            yield level, index + at // 8192, tile, nodes
        level, size = level + 1, size >> 8


# --- The witness's step, and what logs and witnesses send each other: tlog-witness ---------------------------

class Stale(Error):
    """The old size of a request is not `size`, the size of the checkpoint that the witness cosigned last."""
    status, exit_code = 409, 1

    def __init__(self, size: int) -> None:
        super().__init__(f"the last cosigned checkpoint is of size {size}")
        self.size = size


@dataclass(frozen=True)
class AddCheckpoint:
    """The body of an add-checkpoint request: the old size, a consistency proof of 32-byte hashes, and a note."""
    old: int
    proof: tuple[bytes, ...]
    note: bytes

    @classmethod
    def parse(cls, body: bytes) -> AddCheckpoint:
        """Parses the body of a request; raises Malformed."""
        head, separator, note = body.partition(b"\n\n")
        first, *lines = parse_text(head + b"\n").split("\n")[:-1]
        # "The client MUST NOT send more than 63 consistency proof lines."
        if not separator or not first.startswith("old ") or len(lines) > MAX_PROOF:
            raise Malformed(f"not a line with the old size and at most {MAX_PROOF} hashes")
        return cls(parse_decimal(first[4:]), tuple(parse_base64(line, 32) for line in lines), note)

    def encode(self) -> bytes:
        lines = "".join(f"{to_base64(element)}\n" for element in self.proof)
        return f"old {self.old}\n{lines}\n".encode() + self.note


@dataclass(frozen=True)
class Witnessed:
    """What a witness stores for a log: the tree that it cosigned last, the time in seconds, and the note.

    The note has only verified signatures: the log's and the witness's. It is empty after an import.
    """
    tree: Tree
    seconds: int
    note: bytes


def witness_step(
    last: Witnessed | None, keys: Collection[VerifierKey], request: AddCheckpoint, signers: Sequence[Signer], now: int
) -> tuple[Witnessed, str]:
    """Returns what to store next for a log with these `keys`, and the lines to answer with once it is stored.

    The caller has to choose `keys` by the origin in the note: it is not compared here.

    Raises, checked in this order: Malformed; BadSignature (no key signed, or a signature is false); Malformed (the old
    size is above the checkpoint's); Stale; BadProof.
    """
    try:
        text, signed = open_note(request.note, keys)
    except BadSignature:
        Checkpoint.parse(split_note(request.note)[0])  # a malformed checkpoint is Malformed, whoever signed it
        raise
    checkpoint = Checkpoint.parse(text)
    # "The old size MUST be equal to or lower than the checkpoint size."
    if request.old > checkpoint.tree.size:
        raise Malformed(f"the old size {request.old} is above the checkpoint's {checkpoint.tree.size}")
    # "The witness MUST check that the old size matches the size of the latest checkpoint it cosigned … (or zero …)"
    before = last.tree if last else Tree(0, EMPTY_ROOT)
    if request.old != before.size:
        raise Stale(before.size)
    check_consistency(before, checkpoint.tree, request.proof)
    # Times must not decrease: else an older checkpoint would look like the newer one.
    seconds = max(now, last.seconds if last else 1)
    lines = "".join(signer.cosign(text, seconds) for signer in signers)
    kept = keep_signed(request.note, signed)[1]
    return Witnessed(checkpoint.tree, seconds, f"{text}\n{''.join(kept)}{lines}".encode()), lines


def keep_signed(note: bytes, keys: Collection[VerifierKey]) -> tuple[str, list[str]]:
    """Returns the text of a verified note, and its signature lines by `keys`, without duplicates."""
    text, signatures = split_note(note)
    known = {(key.name, key.key_id) for key in keys}
    return text, list(dict.fromkeys(signature_line(*parts) for parts in signatures if parts[:2] in known))


def take_cosignatures(text: str, answer: bytes, keys: Collection[VerifierKey]) -> dict[VerifierKey, str]:
    """Returns the lines of a witness's answer with valid cosignatures of `keys`, by key, one or more.

    Raises Malformed, and BadSignature if there is none or one that is false.
    """
    # "the client MAY concatenate it to the checkpoint, and use a note verification function"
    note = text.encode() + b"\n" + answer
    signed = open_note(note, keys)[1]
    lines = {parts[:2]: signature_line(*parts) for parts in reversed(split_note(note)[1])}
    return {key: lines[key.name, key.key_id] for key in signed}


class ListedLog(NamedTuple):
    """A log in a list for witnesses: its key and origin, how many requests a day it may send, and whom to write to."""
    key: VerifierKey
    origin: str
    qpd: int
    contact: str


def parse_log_list(data: bytes) -> tuple[list[ListedLog], list[str]]:
    """The logs in a list as the witness network publishes it, and why others in it can't be used; raises Malformed.

    https://github.com/transparency-dev/witness-network/blob/main/log-list-format.md
    """
    # "Non-empty lines have all leading and trailing whitespace removed before processing."
    lines = [(number, line.strip()) for number, line in enumerate(data.decode(errors="replace").split("\n"), 1)]
    lines = [(number, line) for number, line in lines if line and not line.startswith("#")]
    if not lines or lines.pop(0)[1] != "logs/v0":
        raise Malformed("a list of logs begins with the line logs/v0")
    logs, faults, at = list[ListedLog](), list[str](), 0
    while at < len(lines):
        number, words = lines[at][0], dict[str, str]()
        for name in ("vkey", "origin", "qpd", "contact"):  # "The order of key-value lines are strict."
            word, _, value = lines[at][1].partition(" ") if at < len(lines) else ("", "", "")
            if word == name and value.strip():
                words[name] = value.strip()
                at += 1
            elif name != "origin":
                raise Malformed(f"the log in line {number} of the list has no line {name!r} in its place")
        try:
            # "It MUST be a number in the range [1, 2^31)"
            if not 0 < (qpd := parse_decimal(words["qpd"])) < 1 << 31:
                raise Malformed(f"qpd {qpd} is out of range")
            key = VerifierKey.parse(words["vkey"])
            if key.kind != ED25519:  # "Currently, only ed25519 `alg1` type keys are permitted."
                raise Malformed("its key is not of type 0x01")
            origin = check_origin(words.get("origin", key.name))
            logs.append(ListedLog(key, origin, qpd, words["contact"]))
        except Malformed as error:
            faults.append(f"the log in line {number} of the list is left out: {error}")
    return logs, faults


class Budget:
    """How many requests a day are allowed, all of which may come at once. Times in seconds; a clock may be set back."""

    def __init__(self, per_day: int, now: float) -> None:
        self._per_day, self._left, self._at = per_day, float(per_day), now

    def take(self, now: float) -> float:
        """Takes one of them, and returns 0; or, if none is left, returns the seconds to wait for one."""
        self._left = min(self._left + max(now - self._at, 0) * self._per_day / 86400, self._per_day)
        self._at = now
        if self._left < 1:
            return (1 - self._left) * 86400 / self._per_day
        self._left -= 1
        return 0


def cosignature_times(note: bytes) -> list[tuple[str, int]]:
    """The UNVERIFIED names and times in seconds of all lines that may be cosignatures in a note: for display."""
    return [(name, seconds) for name, _, value in split_note(note)[1]
            if len(value) in (72, 2428) and 0 < (seconds := int.from_bytes(value[:8], "big")) < 1 << 35]


def utc(seconds: float) -> str:
    """Returns a time as text for people. Any number will do, since some come from untrusted sources."""
    if not 0 <= seconds < 253_402_300_800:  # the year 10000
        return f"{seconds:.0f} s after 1970"
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def check_age(checkpoint: Checkpoint, policy: Policy, limit: float | None, now: float) -> None:
    """If `limit` is given: raises BadSignature unless a quorum of one or more cosigned in the last `limit` seconds."""
    fresh = [key for key, at in checkpoint.cosigned if limit is None or now - limit <= at <= now + MAX_SKEW]
    if limit is not None and not (fresh and policy.quorum.met(fresh)):
        times = ", ".join(utc(at) for _, at in checkpoint.cosigned) or "no time"
        raise BadSignature(f"the checkpoint is not fresh enough: it was cosigned at {times}")


# --- What a monitor finds ------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Finding:
    """Something that a monitor reports about a log or an index.

    `evidence` has files by name: checkpoints verbatim, and tiles and bundles under their tlog-tiles paths. For the
    entries at `indices`, .tlog-proof files are added when the finding is reported.
    """
    kind: str
    text: str
    indices: tuple[int, ...] = ()
    evidence: dict[str, bytes] = field(default_factory=dict)


class Found(Error):
    """A finding after which a monitor can't follow the log any further."""
    status, exit_code = 422, 1

    def __init__(self, kind: str, text: str, evidence: dict[str, bytes]) -> None:
        super().__init__(text)
        self.finding = Finding(kind, text, (), evidence)


def monitor_step(
    earlier: Iterable[bytes], note: bytes, tree: Tree, prefix: Callable[[int], bytes]
) -> None:
    """Returns if `tree`, of a new checkpoint, begins with the tree of each `earlier` checkpoint that is not larger.

    `prefix(size)` returns the 32-byte root of the new tree's first `size` entries. Raises Found.
    """
    for known in earlier:
        past = Checkpoint.parse(split_note(known)[0]).tree
        if past.size <= tree.size and prefix(past.size) != past.root:
            sizes = f"its tree of size {tree.size} does not begin with its tree of size {past.size}"
            raise Found("fork", f"the log has signed two histories: {sizes}",
                        {"earlier-checkpoint": known, "checkpoint": note})


def rollback_or_fork(before: Tree, tree: Tree, is_prefix: bool, evidence: dict[str, bytes]) -> Found:
    """The finding about a log that signed `before` and later `tree`, another tree that is not larger."""
    sizes = f"its last checkpoint was of size {before.size}, its new one is of size {tree.size}"
    if is_prefix:
        return Found("rollback", f"the log has gone back: {sizes}", evidence)
    return Found("fork", f"the log has signed two histories: {sizes}, and they contradict each other", evidence)


# The extensions of files that installers accept: those of pip and uv, and eggs.
DISTRIBUTIONS = (".whl", ".zip", ".tar.gz", ".tgz", ".tar", ".tar.bz2", ".tbz", ".tar.xz", ".txz", ".tlz", ".tar.lz",
                 ".tar.lzma", ".tar.zst", ".tzst", ".egg")


def project_of(filename: str) -> str:
    """The normalized project name (PEP 503) in the name of a distribution file; "" if there is none."""
    filename = filename.removesuffix(".metadata")  # which may be logged for a wheel (PEP 658)
    wheel = filename.endswith((".whl", ".egg"))
    return normalize(filename.partition("-")[0] if wheel else filename.rpartition("-")[0])


def release_of(filename: str) -> tuple[str, str]:
    """The project (as project_of) and the version in the name of a distribution file; "" for what is not there."""
    name = filename.removesuffix(".metadata")
    if name.endswith((".whl", ".egg")):
        version = name.split("-")[1] if "-" in name else ""
    else:
        ending = max((end for end in DISTRIBUTIONS if name.endswith(end)), key=len, default="")
        version = name.removesuffix(ending).rpartition("-")[2]
    return project_of(filename), re.sub(r"\A\s*v|(\.0+)+\Z", "", version.lower())  # 1.0 is 1, and v1 (PEP 440)


def url_name(url: str) -> str:
    """The filename in a URL or path, as pip reads it: the last part of the decoded path; "" if there is none."""
    try:
        return urllib.parse.unquote(urllib.parse.urlsplit(url).path).rstrip("/").rpartition("/")[2]
    except ValueError:
        return ""


_SEPARATORS = re.compile("[-_.]+")


def normalize(project: str) -> str:
    """The normalized name of a project (PEP 503)."""
    return _SEPARATORS.sub("-", project).lower()


@functools.lru_cache(4096)
def _project_pattern(project: str) -> re.Pattern[str]:
    # Names are ASCII (PEP 508): without flag `a`, U+212A would match k. In a wheel's name, "-" ends the project name.
    words = [re.escape(word) for word in project.split("-")]
    wheel, sdist = "[_.]+".join(words), "[-_.]+".join(words)
    return re.compile(rf"(?ais:{wheel}-.*\.(?:whl|egg)|{sdist}[-_.]+v?[0-9](?!.*\.(?:whl|egg)\Z).*)")


def is_of(project: str, filename: str) -> bool:
    """True if a distribution with this filename belongs to `project`, a normalized name."""
    return _project_pattern(project).fullmatch(filename) is not None


def may_be_of(project: str, filename: str) -> bool:
    """True if an installer may take a file for one of `project`: some lower letters beyond ASCII, or skip spaces."""
    return is_of(project, filename) or is_of(project, "".join(filename.lower().split()))


@dataclass(frozen=True)
class WatchTerm:
    """A search term: matches the entries of `project`; or, if that is empty, those that both regexes match."""
    filename: str = ""
    checksum: str = ""
    project: str = ""

    def matches(self, entry: re.Match[str]) -> bool:
        if self.project:
            return may_be_of(self.project, entry[2])
        return bool(re.search(self.filename, entry[2]) and re.search(self.checksum, entry[1]))

    def key(self) -> str:
        return json.dumps([self.filename, self.checksum, self.project])


def watch_terms(filenames: Sequence[str], checksums: Sequence[str], projects: Iterable[str]) -> tuple[WatchTerm, ...]:
    """Search terms: one for each pair of a filename regex and a checksum regex, and one for each project."""
    regexes = itertools.product(filenames or [""], checksums or [""]) if filenames or checksums else ()
    named = (WatchTerm(project=normalize(project)) for project in projects)
    return tuple(dict.fromkeys([*(WatchTerm(*pair) for pair in regexes), *named]))


_PLAIN = re.compile(rb"(?:pypi-transparency/v1\nsha256:[0-9a-f]{64}\n[!-.0-[\]-~]{1,150}\x00)*")


def all_plain(entries: Sequence[bytes]) -> bool:
    """True if all are entries without a publisher and with a plain ASCII filename: a fast check that most pass."""
    for at in range(0, len(entries), 256):
        part = entries[at : at + 256]
        data = b"\x00".join(part) + b"\x00"
        if data.count(b"\x00") != len(part) or not _PLAIN.fullmatch(data):
            return False
    return True


def match_entries(entries: Iterable[bytes]) -> list[re.Match[str] | None]:
    """Returns the match of each entry, with the groups of _ENTRY; None for an entry that Entry.parse refuses."""
    matches = []
    for data in entries:
        match = _ENTRY.fullmatch(data.decode(errors="surrogateescape"))
        if match and len(data) > MAX_FILENAME:
            try:
                Entry.parse(data)
            except Malformed:
                match = None
        matches.append(match)
    return matches


def find_replaced(
    first: int, matches: Sequence[re.Match[str] | None], stored: Iterable[tuple[int, bytes]]
) -> Iterator[Finding]:
    """Yields a finding for each entry from `first` on that has an earlier entry's filename, but another checksum."""
    known: dict[str, tuple[int, str]] = {}
    for index, data in stored:
        if earlier := match_entries([data])[0]:
            known.setdefault(earlier[2], (index, earlier[1]))
    for at, match in enumerate(matches, first):
        if match:
            index, checksum = known.setdefault(match[2], (at, match[1]))
            if checksum != match[1]:
                text = f"{match[2]} is logged with {checksum} at index {index}, and with {match[1]} at index {at}"
                yield Finding("replaced", text, (index, at))


def publisher_name(match: re.Match[str]) -> str:
    """The publisher of an entry, "" for none, without the tag and the commit, which differ from release to release.

    A very long one is cut to its beginning and a hash of all of it.
    """
    name = re.sub(r"@(refs/tags/.*|[0-9a-f]{40})\Z", "", f"{match[3]} {match[4]}") if match[3] else ""
    return name if len(name) <= 400 else f"{name[:300]}… (sha256:{hashlib.sha256(name.encode()).hexdigest()})"


def find_copies(
    first: int, matches: Sequence[re.Match[str] | None], stored: Iterable[tuple[int, bytes]]
) -> set[int]:
    """The indices of entries from `first` on that have filename and checksum of an earlier or a `stored` entry."""
    seen = {data[21:92] + data[92:].partition(b"\npublisher ")[0] for _, data in stored}
    copied = set[int]()
    for at, match in enumerate(matches, first):
        if match:
            key = f"{match[1]}\n{match[2]}".encode()
            if key in seen:
                copied.add(at)
            seen.add(key)
    return copied


class Share(NamedTuple):
    """How many files of a project's newest release have a publisher; and what the release before it was."""
    version: str
    published: int
    files: int
    before: str  # as in SHARES; "" if nothing is known

    @property
    def state(self) -> str:
        return "" if not self.files else "lost" if not self.published else SHARES[self.published == self.files]


SHARES = ("partial", "full")  # some, all of a release's files have a publisher; "lost": none of them, any more
_RANK = {"": -1, "lost": 0, "partial": 1, "full": 2}


def find_publisher_changes(
    first: int, matches: Sequence[re.Match[str] | None], known: dict[str, dict[str, int]], shares: dict[str, Share],
    copied: Collection[int] = (),
) -> Iterator[Finding]:
    """Yields a finding for each entry from `first` on whose publisher is new to its project, and for each project whose
    share of files with a publisher falls below that of the release before.

    `known` maps a project to its publishers, and each publisher to the index of its first entry; new ones are added.
    `shares` are those of the same projects; they are brought up to date. The indices in `copied` are of files that were
    logged before: without a publisher, these say nothing new.
    """
    last = dict[str, tuple[int, Share]]()  # of each project the last entry without a publisher, and the first share
    for at, match in enumerate(matches, first):
        if not match or not (match[3] or known) or (not match[3] and at in copied):
            continue
        (project, version), publisher = release_of(match[2]), publisher_name(match)
        seen = known.get(project, {})
        if not project or not (publisher or seen):
            continue
        if publisher and publisher not in seen:
            if seen:
                name, index = next(reversed(seen.items()))
                text = f"{match[2]} at index {at} is published by {publisher}; the project {project} was published by "
                yield Finding("publisher", f"{text}{name} at index {index}: changed", (index, at))
            known.setdefault(project, seen)[publisher] = at
        share = shares.get(project) or Share(version, 0, 0, "full" if seen and seen != {publisher: at} else "")
        old = last.setdefault(project, (-1, share))[1]
        share = share if share.version == version else Share(version, 0, 0, share.state)
        shares[project] = share._replace(published=share.published + bool(publisher),
                                         files=share.files + (at not in copied or not share.files))
        if not publisher:
            last[project] = at, old
    for project, (at, old) in last.items():
        share = shares[project]
        same = old.version == share.version and old.files > 0
        fallen = _RANK[share.state] < _RANK[share.before or (old.state if same else "")]
        told = same and _RANK[old.state] <= _RANK[share.state]  # this release had fallen as low before
        if at >= 0 and fallen and not told:
            yield _fallen(project, share, at, known[project], matches[at - first])


def _fallen(project: str, share: Share, at: int, known: dict[str, int], match: re.Match[str] | None) -> Finding:
    """The finding for a project's share of files with a publisher that has fallen with the entry at index `at`."""
    name, index = next(reversed(known.items()))
    file = match[2] if match else ""
    return Finding("publisher", (
        f"{file} at index {at} has no publisher; the project {project} was published by {name} at index {index}: "
        f"{share.published} of {share.files} files of {share.version} have one, {share.before or 'full'} before: "
        f"{share.state}"), (index, at))


# === Part III: storage ==================================================================================
# Invariants, whatever fails:
#   - entries, tiles, look-up keys and the checkpoint signed over them are committed in one transaction;
#   - a signature leaves the process only after that commit (WAL, synchronous FULL);
#   - state is read inside the transaction that changes it, and there is one writer.

class CommitFailed(Unavailable):
    """A commit failed, and nobody knows whether it is on disk: the next start reads what is."""


# SQLite reports a full disk with these codes before a commit takes effect: nothing has happened then.
NO_ROOM = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_IOERR_SHMSIZE}


Query = Callable[..., list[Any]]  # takes an SQL query and its values, returns all rows
Outcome = int | Conflict  # the index of a submitted entry, or why it is not logged


class Earlier(int):
    """The index of an entry with a publisher. It answers an add of the same file without one."""
    entry: bytes

    @classmethod
    def of(cls, index: int, entry: bytes) -> Earlier:
        found = cls(index)
        found.entry = entry
        return found


class Database:
    """A SQLite file. One connection writes, unless `read_only`; another reads, for all threads."""

    def __init__(self, path: Path, application_id: int, read_only: bool = False) -> None:
        self.path, self._journal, self.read_only = path, f"{path}-wal", read_only
        self._lock, self._writing, self._untidy = threading.Lock(), threading.Lock(), 0
        with self._guarded(), contextlib.ExitStack() as opened:  # closed if the rest fails
            self._reader = opened.enter_context(contextlib.closing(self._connect("ro" if read_only else "rw")))
            for name, wanted in ("application_id", application_id), ("user_version", 1):
                if (found := self._reader.execute(f"PRAGMA {name}").fetchone()[0]) != wanted:
                    raise Corrupt(f"{path} is not of this version of btlog: its {name} is {found}, not {wanted}")
            if not read_only:
                self._writer = opened.enter_context(contextlib.closing(self._connect("rw")))
                _make_durable(self._writer)
                self._writer.execute("PRAGMA cache_size = -8192")  # KiB: most of what a large batch changes
            opened.pop_all()

    @staticmethod
    def create(path: Path, application_id: int, schema: str) -> None:
        """Creates the file, whole or not at all: it is filled under another name, and then linked."""
        draft = path.with_name(f".{path.name}.{os.getpid()}.new")
        try:
            drafts = [draft for draft in path.parent.iterdir() if draft.name.startswith(f".{path.name}.")]
            for left in (draft for draft in drafts if ".new" in draft.name):  # by a start that was killed
                left.unlink(missing_ok=True)
            os.close(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644))  # not through somebody's link
            with contextlib.closing(sqlite3.connect(draft, isolation_level=None)) as connection:
                _make_durable(connection)
                connection.executescript(f"PRAGMA application_id = {application_id}; PRAGMA user_version = 1; {schema}")
            if path.exists() and path.stat().st_size == 0:
                path.unlink()
            os.link(draft, path)  # which, unlike a rename, never replaces what somebody else made meanwhile
            draft.unlink()
            sync_folder(path.parent)
        except (OSError, sqlite3.Error) as error:
            raise Unavailable(f"can't make {path}: {error}") from error

    def _connect(self, mode: str) -> sqlite3.Connection:
        uri = f"file:{urllib.parse.quote(str(self.path.absolute()))}?mode={mode}"
        wait = BUSY_TIMEOUT / 1000
        connection = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False, timeout=wait)
        connection.text_factory = functools.partial(str, encoding="utf-8", errors="surrogateescape")
        return connection

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """Turns the exceptions of SQLite into Unavailable and Corrupt."""
        try:
            yield
        except sqlite3.OperationalError as error:
            raise Unavailable(f"{self.path.name}: {error}") from error
        except sqlite3.DatabaseError as error:
            raise Corrupt(f"{self.path.name} is corrupt: {error}") from error

    def read(self, sql: str, *values: Any) -> list[Any]:
        """All rows of a query. It sees what is committed."""
        with self._lock, self._guarded():
            return self._reader.execute(sql, values).fetchall()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Commits all that is done inside, or nothing; raises CommitFailed if nobody knows which."""
        with self._writing, self._guarded():
            if self._writer.in_transaction:  # one that could not be rolled back then
                self._writer.execute("ROLLBACK")
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield self._writer
            except BaseException:
                if self._writer.in_transaction:  # some errors have rolled it back already
                    self._writer.execute("ROLLBACK")
                raise
            try:
                self._writer.execute("COMMIT")
            except sqlite3.Error as error:
                if getattr(error, "sqlite_errorcode", None) not in NO_ROOM:
                    raise CommitFailed(f"{self.path.name}: a commit failed: {error}") from error
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
                raise

    def close(self) -> None:
        with self._lock, self._guarded():
            self._reader.close()
            if not self.read_only:
                self._writer.close()

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[None]:
        """All that is read inside is of one moment."""
        with self._guarded():
            self._reader.execute("BEGIN")
            try:
                yield
            finally:
                self._reader.execute("COMMIT")

    def probe(self) -> None:
        """Returns if the disk takes a commit; raises Unavailable."""
        with self.transaction() as db:
            db.execute("PRAGMA user_version = 1")

    def tidy(self) -> None:
        """Moves committed pages from the WAL into the database, now and then, while nobody waits.

        A WAL that is overwritten and does not grow is the quickest to sync. A large one is emptied.
        """
        with self._writing, self._guarded():
            self._untidy += 1
            try:
                large = os.stat(self._journal).st_size > MAX_WAL
            except OSError:  # there is none
                large = False
            if large or self._untidy > 64:
                self._untidy = 0
                self._writer.execute("PRAGMA busy_timeout = 0")  # pages that a reader still needs stay in the WAL
                try:
                    self._writer.execute(f"PRAGMA wal_checkpoint({'TRUNCATE' if large else 'PASSIVE'})")
                except sqlite3.OperationalError as error:  # the disk is full: committed pages stay in the WAL
                    logger.warning("%s: its journal can't be emptied now: %s", self.path.name, error)
                self._writer.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT}")


def _make_durable(connection: sqlite3.Connection) -> None:
    """Makes a commit be on disk when it returns. The settings are read back: SQLite ignores those it does not know."""
    settings = {"journal_mode": "wal", "synchronous": 2, "busy_timeout": BUSY_TIMEOUT, "wal_autocheckpoint": 0}
    for name, wanted in settings.items():
        connection.execute(f"PRAGMA {name} = {wanted}")
        if (found := connection.execute(f"PRAGMA {name}").fetchone()[0]) != wanted:
            raise Corrupt(f"SQLite has {name} {found} here, not {wanted}: commits would not be safe")


def sync_folder(folder: Path) -> None:
    """Makes the names of the files in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- The log's store ---------------------------------------------------------------------------------------

LOG_ID = 0x62746C67  # "btlg"
LOG_SCHEMA = """
    CREATE TABLE setting (name TEXT PRIMARY KEY, value NOT NULL);
    CREATE TABLE checkpoint (kind TEXT PRIMARY KEY, note BLOB NOT NULL);
    CREATE TABLE tile (key INTEGER PRIMARY KEY, data BLOB NOT NULL);
    CREATE TABLE bundle (n INTEGER PRIMARY KEY, data BLOB NOT NULL);
    CREATE TABLE lookup (key INTEGER PRIMARY KEY);
    CREATE TABLE name_filter (n INTEGER PRIMARY KEY, data BLOB NOT NULL);
    CREATE TABLE witness (vkey TEXT PRIMARY KEY, size INTEGER NOT NULL);
    INSERT INTO setting VALUES ('project_keys', 1);
"""

# A look-up key is an integer of 64 bits: the field (2 bits), the part of the log (13 bits), a hash of the field's value
# (31 bits), and the entry's offset in its part (18 bits). New keys all belong to the last part, so a batch touches few
# pages of the file, however large the log is. An entry that is found by a hash is compared in full. A project's key has
# the offset of an entry bundle that has some of its files.
CHECKSUM, FILENAME, PROJECT = 0, 1, 2
PART = 18
SET = "INSERT OR REPLACE INTO setting VALUES (?, ?)"
INSERT_KEYS = "INSERT INTO lookup SELECT value FROM json_each(?) ORDER BY value"
INSERT_PROJECT_KEYS = "INSERT OR IGNORE INTO lookup SELECT value FROM json_each(?) ORDER BY value"
LOOK_UP = "SELECT lookup.key FROM json_each(?) CROSS JOIN lookup ON lookup.key BETWEEN value AND value + ?"
LOOK_UP_FIRST = (
    "SELECT (SELECT lookup.key FROM lookup WHERE lookup.key BETWEEN value AND value + ? ORDER BY lookup.key LIMIT 1) "
    "FROM json_each(?)")


def field_of(kind: int, entry: bytes) -> bytes:
    """The checksum or the filename of an entry, taken from where encode_entry puts it."""
    return entry[93:].partition(b"\n")[0] if kind == FILENAME else entry[21:92]


def field_hashes(kind: int, values: Iterable[bytes]) -> list[int]:
    """A hash of 31 bits for each value. Filenames get SHA-256: an attacker could make them collide under a CRC."""
    if kind == CHECKSUM:
        return [zlib.crc32(value) >> 1 for value in values]
    sha256 = hashlib.sha256
    digests = b"".join([sha256(value).digest() for value in values])
    return [first >> 1 for first, in struct.iter_unpack(">I28x", digests)]


def first_key(kind: int, part: int, hash_: int) -> int:
    """The smallest look-up key of a hash in a part. SQLite's integers have a sign: those of projects are negative."""
    return (kind << 62 | part << 31 + PART | hash_ << PART) - (kind >> 1 << 64)


def key_index(key: int) -> int:
    """The index of the entry that a look-up key is of."""
    return (key >> 31 + PART & (1 << 13) - 1) << PART | key & (1 << PART) - 1


def look_up_keys(kind: int, first: int, hashes: Sequence[int]) -> list[int]:
    """The look-up keys of entries, the first of which has the index `first`, by the hashes of one field."""
    keys: list[int] = []
    for part in range(first >> PART, (first + len(hashes) >> PART) + 1):
        lo, hi = max(first, part << PART), min(first + len(hashes), part + 1 << PART)
        start = first_key(kind, part, 0) - (part << PART)
        keys += [start + (hash_ << PART) + i for i, hash_ in enumerate(hashes[lo - first : hi - first], lo)]
    return keys


def project_keys(first: int, names: Sequence[bytes], known: dict[bytes, tuple[int, ...]]) -> list[int]:
    """The look-up keys of the projects of files, the first of which is logged at the index `first`.

    `known` remembers keys in the bundle 0 by how filenames begin.
    """
    keys, at = list[int](), first
    while at < first + len(names):  # bundle by bundle
        end = at + 256 - at % 256
        # In most filenames, the first "-" ends the project's name.
        stems = {name.partition(b"-")[0] if name[-4:] == b".whl" else _project_stem(name)
                 for name in names[at - first : end - first]}
        if len(known) > MAX_STEMS:
            known.clear()
        for stem in stems:
            if stem not in known:
                known[stem] = _first_project_keys(stem)
        base = (at >> PART) << 31 + PART | at & (1 << PART) - 256
        keys += {base + key for stem in stems for key in known[stem]}
        at = end
    return keys


def _project_stem(name: bytes) -> bytes:
    """The beginning of a filename that has the project's name and, of an old sdist, perhaps a part of the version."""
    name = name.removesuffix(b".metadata")
    if name.endswith((b".whl", b".egg")):
        return name.partition(b"-")[0]
    early = re.match(rb"(?i)(.*?)[_.]+v?[0-9]", name) if b"-" not in name else None
    return early[1] if early else name.rpartition(b"-")[0]


_EARLY_VERSION = re.compile(r"(?i)(.*?)[-_.]+v?[0-9]")


def _first_project_keys(stem: bytes) -> tuple[int, ...]:
    """The keys in bundle 0 of the projects that a filename may be of which begins so, up to a "-".

    They are two if the version may begin earlier: in the name of an old sdist, that is not told.
    """
    text = stem.decode(errors="replace")
    early = _EARLY_VERSION.match(text)
    names = {normalize(name.strip("-_.")) for name in ((text, early[1]) if early else (text,))}
    return tuple(first_key(PROJECT, 0, hash_) for hash_ in field_hashes(PROJECT, map(str.encode, names - {""})))


class NameFilter:
    """A Bloom filter: which parts of the log may have a filename. It spares most new names a look at the disk.

    Each byte has a bit for each of eight parts. A name sets its part's bit in two bytes. Bits are never cleared.
    """

    SLOTS = 1 << 23

    def __init__(self) -> None:
        self.groups: list[bytearray] = []

    def add(self, part: int, hashes: Iterable[int]) -> None:
        while len(self.groups) <= part >> 3:
            self.groups.append(bytearray(self.SLOTS))
        group, bit, last = self.groups[part >> 3], 1 << (part & 7), self.SLOTS - 1
        for hash_ in hashes:
            group[hash_ & last] |= bit
            group[hash_ * 0x9E3779B1 >> 9 & last] |= bit

    def maybe(self, hashes: Iterable[int]) -> list[int]:
        """The first look-up key of each hash, for each part that may have it."""
        last = self.SLOTS - 1
        found = [
            (8 * n, h, bits)
            for n, group in enumerate(self.groups)
            for h in hashes
            if (bits := group[h & last]) and (bits := bits & group[h * 0x9E3779B1 >> 9 & last])
        ]
        return [first_key(FILENAME, part + bit, h) for part, h, bits in found for bit in range(8) if bits >> bit & 1]


class LogRows:
    """The stored state of a log, as one connection sees it: a writer sees its own uncommitted changes."""

    def __init__(self, query: Query) -> None:
        self.query = query

    def checkpoint(self, kind: str) -> bytes | None:
        """The note of the last "signed" or "published" checkpoint; None if there is none yet."""
        return self._blob(f"{kind} checkpoint", "SELECT note FROM checkpoint WHERE kind = ?", kind)

    def tree(self, kind: str) -> Tree:
        note = self.checkpoint(kind)
        return Checkpoint.parse(split_note(note)[0]).tree if note else Tree(0, EMPTY_ROOT)

    def setting(self, name: str) -> Any:
        rows = self.query("SELECT value FROM setting WHERE name = ?", name)
        return rows[0][0] if rows else None

    def open(self, note: bytes | None, key: VerifierKey) -> Checkpoint:
        """The checkpoint in a note of this log, whose key is `key`; raises Malformed, BadSignature."""
        return open_checkpoint(note or b"", Policy((key,), origin=self.setting("origin") or ""))

    def stored(self) -> Tree:
        """The tree of all stored entries. A mirror may have fewer than the checkpoint that it is reading."""
        size = self.setting("stored")
        return self.tree("signed") if size is None else Tree(size, Tiles(size, self.tile).hash(0, size))

    def tile(self, level: int, index: int, width: int) -> bytes:
        """The first `width` hashes of a tile, 32 bytes each."""
        path = tile_path(level, index, width)
        data = self._blob(path, "SELECT data FROM tile WHERE key = ?", level << 56 | index)
        if data is None or len(data) < 32 * width:
            raise Corrupt(f"the stored {path} is missing or too short")
        return data[: 32 * width]

    def bundle(self, index: int, width: int) -> bytes:
        """The bundle of the first `width` entries of entry bundle `index`."""
        return encode_bundle(self.bundled(index, width)) if width < 256 else self._bundle_row(index)

    def bundled(self, index: int, width: int) -> list[bytes]:
        """The first `width` entries of entry bundle `index`."""
        try:
            entries = split_bundle(self._bundle_row(index))
        except Malformed as error:
            raise Corrupt(f"the stored {tile_path(None, index, width)}: {error}") from None
        if len(entries) < width:
            raise Corrupt(f"the stored {tile_path(None, index, width)} has {len(entries)} entries")
        return entries[:width]

    def _bundle_row(self, index: int) -> bytes:
        path = tile_path(None, index)
        data = self._blob(path, "SELECT data FROM bundle WHERE n = ?", index)
        if data is None:
            raise Corrupt(f"the stored {path} is missing")
        return data

    def _blob(self, what: str, sql: str, *values: Any) -> bytes | None:
        rows = self.query(sql, *values)
        if rows and type(rows[0][0]) is not bytes:
            raise Corrupt(f"the stored {what} is not a blob")
        return rows[0][0] if rows else None

    def entry(self, index: int) -> bytes:
        return self.bundled(index // 256, index % 256 + 1)[-1]

    def entries(self, keys: list[int], size: int) -> Iterator[tuple[int, bytes]]:
        """Of the first `size` entries those whose look-up keys begin with one of these, by index."""
        for _, part in itertools.groupby(sorted(keys), lambda key: key >> 31 + PART):
            rows = self.query(LOOK_UP, str(list(part)), (1 << PART) - 1)
            indices = sorted(index for index in {key_index(key) for key, in rows} if index < size)
            for n, group in itertools.groupby(indices, lambda index: index // 256):
                entries = self.bundled(n, min(256, size - 256 * n))  # once for all that are in it
                yield from ((index, entries[index % 256]) for index in group)

    def first_entries(self, keys: Iterable[int], names: dict[bytes, int], size: int) -> Iterator[tuple[int, bytes]]:
        """Of the first `size` entries the first one with each of these names, and perhaps some more.

        `names` have their hashes, and `keys` are their first look-up keys in each part. A name that is logged very
        often costs no more than one that is logged twice.
        """
        below, collided, seen = (1 << PART) - 1, list[int](), set[bytes]()
        firsts = [key for key, in self.query(LOOK_UP_FIRST, below, str(sorted(keys))) if key is not None]
        places = sorted((key_index(key), key & ~below) for key in firsts if key_index(key) < size)
        shared = {hash_ for hash_, n in Counter(names.values()).items() if n > 1} if places else set()
        for n, group in itertools.groupby(places, lambda place: place[0] // 256):
            entries = self.bundled(n, min(256, size - 256 * n))
            for index, key in group:
                entry = entries[index % 256]
                if key >> PART & (1 << 31) - 1 in shared or not self._is_one(entry, names):
                    collided.append(key)  # another name has this hash too, or it is not an entry
                else:
                    yield index, entry
        for index, entry in self.entries(collided, size):
            if field_of(FILENAME, entry) not in seen and self._is_one(entry, names):
                seen.add(field_of(FILENAME, entry))
                yield index, entry

    @staticmethod
    def _is_one(entry: bytes, names: Collection[bytes]) -> bool:
        return field_of(FILENAME, entry) in names and match_entries([entry])[0] is not None

    def look_up_names(self, names: list[bytes], size: int) -> dict[bytes, dict[str, int]]:
        """For each of these filenames the checksums that the first `size` entries have for it, each with its index."""
        wanted, found = set(names), dict[bytes, dict[str, int]]()
        hashes = set(field_hashes(FILENAME, names))
        keys = [first_key(FILENAME, part, hash_) for part in range((size >> PART) + 1) for hash_ in hashes]
        for index, entry in self.entries(keys, size):
            if (name := field_of(FILENAME, entry)) in wanted and len(sums := found.setdefault(name, {})) < MAX_FOUND:
                sums.setdefault(entry[21:92].decode(errors="replace"), index)
        return found

    def of_project(self, project: str, end: int, limit: int) -> tuple[list[tuple[int, bytes]], int]:
        """The newest files of a project (a normalized name) below the index `end`; and below which index to go on.

        These are about `limit` files, or fewer if MAX_BUNDLES_READ bundles have no more.
        """
        if self.setting("project_keys") is None:
            raise Unavailable("this log has no look-up by project yet: `serve` or `fsck --repair` makes it")
        found, read = list[tuple[int, bytes]](), 0
        [hash_] = field_hashes(PROJECT, [project.encode()])
        for part in reversed(range((max(end - 1, 0) >> PART) + 1)):
            lo = first_key(PROJECT, part, hash_)
            newest = "SELECT key FROM lookup WHERE key BETWEEN ? AND ? ORDER BY key DESC"
            for key, in self.query(newest, lo, lo + (1 << PART) - 1):
                first = key_index(key)
                if first >= end:
                    continue
                if len(found) >= limit or read >= MAX_BUNDLES_READ:
                    return found, first + 256
                read += 1
                entries = self.bundled(first // 256, min(256, end - first))
                matches = zip(itertools.count(first), entries, match_entries(entries))
                found += reversed([(at, data) for at, data, match in matches if match and is_of(project, match[2])])
        return found, 0

    def look_up(self, kind: int, value: bytes, size: int) -> list[tuple[int, bytes]]:
        """The first MAX_FOUND of the first `size` entries whose checksum or filename is `value`."""
        [hash_] = field_hashes(kind, [value])
        keys = [first_key(kind, part, hash_) for part in range((size >> PART) + 1)]
        same = (found for found in self.entries(keys, size) if field_of(kind, found[1]) == value)
        return list(itertools.islice(same, MAX_FOUND))


class LogStore(LogRows):
    """A folder with a log: entries, tiles and checkpoints in its `log.sqlite3`. One process at a time may write it.

    Raises Unavailable if the folder can't be used, Corrupt if its contents contradict each other.
    """

    def __init__(self, folder: Path, read_only: bool = False) -> None:
        """Opens the folder. A folder that is empty, or has only keys, gets an empty database."""
        self.folder, path = folder, folder / "log.sqlite3"
        self._lock = None if read_only else lock_folder(folder)
        try:
            if not path.exists():
                if read_only:
                    raise Unavailable(f"{folder} holds no log: there is no log.sqlite3 in it")
                strange = set(os.listdir(folder)) - {"private.key", "public.key", "lost+found"}
                if strange := {name for name in strange if not name.startswith(".")}:
                    raise Unavailable(f"{folder} holds no log but other things ({min(strange)}): choose another folder")
                Database.create(path, LOG_ID, LOG_SCHEMA)
            journal = Path(f"{path}-wal")
            self.recovered = journal.stat().st_size if journal.exists() else 0  # bytes left by the last run
            self.database = Database(path, LOG_ID, read_only)
        except Error:
            if self._lock is not None:
                os.close(self._lock)
            raise
        self._filter: NameFilter | None = None
        self._stems = set[bytes]()  # of a mirror: beginnings of filenames whose projects are stored already
        self._projects: dict[bytes, tuple[int, ...]] = {}  # their keys, as project_keys has them
        super().__init__(self.database.read)
        try:
            if not read_only and self.setting("project_keys") is None:
                self._index_projects()
        except Error:
            self.close()
            raise

    def _index_projects(self) -> None:
        """Makes the look-up keys of projects for a log that an older btlog has made."""
        size = self.stored().size
        logger.info("%s gets a look-up by project: %d entries are read", self.folder, size)
        with self.database.transaction() as db:
            for n in range((size + 255) // 256):
                names = [field_of(FILENAME, entry) for entry in self.bundled(n, min(256, size - 256 * n))]
                db.execute(INSERT_PROJECT_KEYS, (str(project_keys(256 * n, names, self._projects)),))
            db.execute("INSERT INTO setting VALUES ('project_keys', 1)")

    def key(self) -> VerifierKey | None:
        """The key of this log; None if the folder is not bound to one yet."""
        vkey = self.setting("vkey")
        try:
            return VerifierKey.parse(str(vkey)) if vkey is not None else None
        except Malformed as error:
            raise Corrupt(f"{self.folder} is corrupt: the stored key: {error}") from None

    def check_last_part(self) -> None:
        """Raises Corrupt unless the last part has as many look-up keys as entries. fsck checks all parts."""
        size = self.stored().size
        part = max(size - 1, 0) >> PART
        last = size - (part << PART)
        for kind in CHECKSUM, FILENAME:
            bounds = first_key(kind, part, 0), first_key(kind, part + 1, 0) - 1
            [(count,)] = self.query("SELECT count(*) FROM lookup WHERE key BETWEEN ? AND ?", *bounds)
            if count != last:
                raise Corrupt(f"{self.folder} is corrupt: {count} look-up keys for the last {last} entries")

    @property
    def origin(self) -> str:
        """The origin of this log, which for a log of one's own is the name of its key; "" if it has no key yet."""
        key = self.key()
        return str(self.setting("origin") or (key.name if key else ""))

    def create_log(self, key: VerifierKey, note: bytes | None, origin: str = "") -> None:
        """Binds this empty folder to `key` and, if it is not the key's name, to the log's origin. Cannot be undone.

        `note` is its checkpoint of size 0; a mirror has none.
        """
        with self.database.transaction() as db:
            db.execute("INSERT INTO setting VALUES ('vkey', ?)", (encode_vkey(key),))
            if origin:
                db.execute("INSERT INTO setting VALUES ('origin', ?)", (origin,))
            if note:
                db.executemany("INSERT INTO checkpoint VALUES (?, ?)", [("signed", note), ("published", note)])

    def publish(self, note: bytes, sizes: dict[VerifierKey, int]) -> None:
        """Stores `note` as the published checkpoint, and the size that each witness has cosigned."""
        rows = [(encode_vkey(key), size) for key, size in sizes.items()]
        with self.database.transaction() as db:
            db.execute("INSERT OR REPLACE INTO checkpoint VALUES ('published', ?)", (note,))
            db.executemany("INSERT OR REPLACE INTO witness VALUES (?, ?)", rows)

    def witnessed(self) -> dict[VerifierKey, int]:
        return {VerifierKey.parse(vkey): size for vkey, size in self.query("SELECT vkey, size FROM witness")}

    def append(
        self, entries: list[bytes], seal: Callable[[Tree], bytes], publish: bool, *, replace: bool = False,
        cache: Cache | None = None,
    ) -> list[Outcome]:
        """Appends the new ones among `entries`, of at most MAX_ENTRY bytes each. Returns the outcome of each entry.

        `seal` gets the new tree and returns the signed note to store; if it raises, nothing is changed. With `publish`,
        the note is stored as published, too. An entry whose filename is logged with another checksum is a Conflict,
        unless `replace`. `cache` gets the nodes of full tiles after the commit.
        """
        kinds = ("signed", "published") if publish else ("signed",)

        def choose(
            db: sqlite3.Connection, size: int, entries: list[bytes], names: list[bytes], known: list[tuple[int, bytes]]
        ) -> tuple[list[Outcome], list[bytes]]:
            return _deduplicate(size, entries, names, known, replace)

        def finish(db: sqlite3.Connection, tree: Tree, grown: list[Grown]) -> None:
            note = seal(tree)
            db.executemany("INSERT OR REPLACE INTO checkpoint VALUES (?, ?)", [(kind, note) for kind in kinds])

        return self._append(entries, choose, finish, cache)

    def _append(
        self, entries: list[bytes], choose: Callable[..., tuple[list[Outcome], list[bytes]]],
        finish: Callable[[sqlite3.Connection, Tree, list[Grown]], None], cache: Cache | None = None,
    ) -> list[Outcome]:
        """Appends in one transaction. `choose` selects the entries; `finish` gets the new tree and its changed tiles.

        `choose` is called with the size, the entries, their names, and the stored entries that `_known` finds for them.
        """
        full: dict[tuple[int, int, int], Any] = {}
        with self._forgetting(), self.database.transaction() as db:
            rows = LogRows(lambda sql, *values: db.execute(sql, values).fetchall())
            old = rows.stored()
            names = [entry[93:].partition(b"\n")[0] for entry in entries]  # field_of, without a call for each
            hashes = field_hashes(FILENAME, names)
            where = self._where(rows, old.size, len(entries), list(set(hashes)))
            known = self._known(rows, where, names, hashes, old.size) if where else []
            outcomes, fresh = choose(db, old.size, entries, names, known)
            del known  # of many entries, some MiB
            if fresh:
                if len(fresh) < len(entries):
                    names = [field_of(FILENAME, entry) for entry in fresh]
                    hashes = field_hashes(FILENAME, names)
                edge = _Edge(rows, old.size)
                # SQLite works without the interpreter lock here: entries are hashed at the same time.
                with _aside(len(fresh) > 256) as aside:
                    aside(db.execute, INSERT_KEYS, (str(look_up_keys(FILENAME, old.size, hashes)),))
                    sums = field_hashes(CHECKSUM, [entry[21:92] for entry in fresh])
                    aside(db.execute, INSERT_KEYS, (str(look_up_keys(CHECKSUM, old.size, sums)),))
                    aside(db.execute, INSERT_PROJECT_KEYS, (str(project_keys(old.size, names, self._projects)),))
                    del names, sums
                    grown = list(grow(old.size, edge.tile, leaf_hashes(fresh)))
                    aside(db.executemany, "INSERT OR REPLACE INTO bundle VALUES (?, ?)", edge.bundles(fresh))
                    aside(db.executemany, "INSERT OR REPLACE INTO tile VALUES (?, ?)", tile_rows(grown))
                    groups = self._remember(old.size, hashes)
                db.executemany("INSERT OR REPLACE INTO name_filter VALUES (?, ?)", groups)
                full = {(level, index, 256): nodes for level, index, _, nodes in grown if nodes}
                tree = _extended(old, Tiles(old.size + len(fresh), rows.tile))
                finish(db, tree, grown)
        if cache:
            for place, nodes in full.items():
                cache.put(place, nodes)
        return outcomes

    def _known(
        self, rows: LogRows, keys: list[int], names: list[bytes], hashes: list[int], size: int
    ) -> list[tuple[int, bytes]]:
        """All stored entries with one of these names, and perhaps some more."""
        return list(rows.entries(keys, size))

    @contextlib.contextmanager
    def _forgetting(self) -> Iterator[None]:
        """Clears what is remembered of the database if the transaction fails."""
        try:
            yield
        except BaseException:
            self._filter, self._stems = None, set[bytes]()
            raise

    def _where(self, rows: LogRows, size: int, count: int, hashes: list[int]) -> list[int]:
        """The first look-up keys of filenames, for each part. If they are many, the filter rules out most parts.

        It is needed as well where `count` entries may fill a part.
        """
        if len(hashes) < 64 and size >> PART == size + count >> PART:
            return [first_key(FILENAME, part, hash_) for part in range((size >> PART) + 1) for hash_ in hashes]
        self._filter = self._filter or _load_filter(rows, size)
        return self._filter.maybe(hashes)

    def _remember(self, size: int, hashes: list[int]) -> list[tuple[int, bytes]]:
        """Adds the names of new entries to the filter; returns those groups of it, by number, that get a full part."""
        end, full = size + len(hashes), list[tuple[int, bytes]]()
        if self._filter is None:
            return full
        for part in range(size >> PART, (end >> PART) + 1):
            lo, hi = max(size, part << PART), min(end, part + 1 << PART)
            self._filter.add(part, hashes[lo - size : hi - size])
            if hi == part + 1 << PART:
                full.append((part >> 3, bytes(self._filter.groups[part >> 3])))
        return full

    def proof(self, index: int, note: bytes, tiles: Tiles, entry: bytes | None = None) -> bytes:
        """The .tlog-proof of an entry at the checkpoint `note`, whose tree is that of `tiles`."""
        data = self.entry(index) if entry is None else entry
        # The entry goes into the proof if the file alone does not tell all of it.
        extra = data if b"\n" in data[93:] or not data.startswith(b"pypi-transparency/v1\n") else b""
        return encode_proof(Proof(index, tuple(prove_inclusion(tiles, index)), note, extra))

    def close(self) -> None:
        self.database.close()
        if self._lock is not None:
            os.close(self._lock)


def lock_folder(folder: Path) -> int:
    """Locks a folder against other writers, in this process too, until the returned descriptor is closed."""
    if sys.platform == "win32":
        raise Unavailable("a log needs a system with POSIX file locks")
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise Unavailable(f"{folder} is in use by another btlog: a log has one writer") from None
    except OSError as error:
        raise Unavailable(f"can't lock {folder}: {error.strerror}") from None
    if not os.access(folder, os.W_OK):
        os.close(descriptor)
        raise Unavailable(f"{folder} is not writable for this user")
    return descriptor


def _deduplicate(
    size: int, entries: list[bytes], names: list[bytes], stored: list[tuple[int, bytes]], replace: bool
) -> tuple[list[Outcome], list[bytes]]:
    """The outcome of each entry in a log of `size`, and the entries to append.

    `stored` has all logged entries with one of the names, each with its index.
    """
    known: dict[bytes, list[tuple[int, bytes]]] = {}
    for index, entry in stored:
        known.setdefault(field_of(FILENAME, entry), []).append((index, entry))
    if len(set(names)) == len(names) and known.keys().isdisjoint(names):
        return list(range(size, size + len(names))), entries
    outcomes: list[Outcome] = []
    fresh: list[bytes] = []
    for name, entry in zip(names, entries, strict=True):
        same_name = known.setdefault(name, [])
        same = next((index for index, other in same_name if other == entry), None)
        other = next((index for index, other in same_name if other[:93] != entry[:93]), None)
        published = None
        if same is None and b"\n" not in entry[93:]:  # an entry with a publisher also stands for the file without one
            published = next((found for found in same_name if found[1].startswith(entry + b"\n")), None)
        if published:
            outcomes.append(Earlier.of(*published))
        elif same is not None:
            outcomes.append(same)
        elif len(same_name) >= MAX_FOUND:
            text = f"{name.decode()} is logged {len(same_name)} times already, first at index {same_name[0][0]}"
            outcomes.append(Conflict(text, same_name[0][0]))
        elif other is not None and not replace:
            outcomes.append(Conflict(f"{name.decode()} is logged with another checksum, at index {other}", other))
        else:
            same_name.append((size + len(fresh), entry))
            outcomes.append(size + len(fresh))
            fresh.append(entry)
    return outcomes, fresh


def _load_filter(rows: LogRows, size: int) -> NameFilter:
    """The filter of the first `size` entries: stored for full parts, made from look-up keys for the last part."""
    filter_ = NameFilter()
    filter_.groups = [bytearray(data) for data, in rows.query("SELECT data FROM name_filter ORDER BY n")]
    filter_.add(size >> PART, _name_hashes(rows, size >> PART))
    return filter_


def _name_hashes(rows: LogRows, part: int) -> list[int]:
    first = first_key(FILENAME, part, 0)
    keys = rows.query("SELECT key FROM lookup WHERE key BETWEEN ? AND ?", first, first + (1 << 31 + PART) - 1)
    return [key >> PART & (1 << 31) - 1 for key, in keys]


class _Edge:
    """The partial tiles and the partial bundle at the right edge of a log, read before the database is busy."""

    def __init__(self, rows: LogRows, size: int) -> None:
        self.size = size
        places = [(level, *divmod(size >> 8 * level, 256)) for level in range(8)]
        self._tiles = {level: rows.tile(level, index, width) for level, index, width in places if width}
        self._bundle = rows.bundle(size // 256, size % 256) if size % 256 else b""

    def tile(self, level: int, index: int, width: int) -> bytes:
        return self._tiles[level]

    def bundles(self, entries: list[bytes]) -> list[tuple[int, bytes]]:
        """The bundles, by index, that new entries change or add."""
        first, width = divmod(self.size, 256)
        starts = range(256 - width, len(entries), 256)
        head = (first, self._bundle + encode_bundle(entries[: 256 - width]))
        return [head, *((first + n, encode_bundle(entries[at : at + 256])) for n, at in enumerate(starts, 1))]


@contextlib.contextmanager
def _aside(really: bool) -> Iterator[Callable[..., Any]]:
    """Gives a function that calls another one: at once, or, if `really`, in a thread, one call after the other.

    At the end, waits for these calls, and raises what one of them raised.
    """
    def run(do: Callable[..., Any], *args: Any) -> None:
        do(*args)  # drops what that returns: a cursor that is kept would keep a failed transaction open, and its lock

    if not really:
        yield run
        return
    calls = list[concurrent.futures.Future[None]]()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        yield lambda do, *args: calls.append(pool.submit(run, do, *args))
    for call in calls:
        call.result()


def tile_rows(grown: list[Grown]) -> list[tuple[int, bytes]]:
    return [(level << 56 | index, data) for level, index, data, _ in grown]


def _extended(old: Tree, tiles: Tiles) -> Tree:
    """The tree of `tiles`, which is proved to continue `old`."""
    tree = Tree(tiles.size, tiles.hash(0, tiles.size))
    check_consistency(old, tree, prove_consistency(tiles, old.size))
    return tree


def check_store(rows: LogRows, key: VerifierKey, progress: Callable[[int, int], None]) -> Iterator[str]:
    """Recomputes everything from the entries; yields a line for each stored thing that differs."""
    for line, in rows.query("PRAGMA integrity_check(20)"):
        if line != "ok":
            yield f"log.sqlite3: {line}"
    trees: dict[str, Tree] = {}
    yield from _check_checkpoints(rows, key, trees)
    size = trees["signed"].size if "signed" in trees else 256 * rows.query("SELECT count(*) FROM bundle")[0][0]
    size = rows.setting("stored") or size
    hashes: list[bytes] = []  # of one level, from the entries up
    keys: list[int] = []
    for index in range((size + 255) // 256):
        progress(256 * index, size)
        width = min(256, size - 256 * index)
        leaves, found = _check_bundle(rows, index, width, keys)
        yield from found
        hashes += leaves
        if (256 * index + width) % (1 << PART) == 0 or 256 * index + width == size:
            yield from _check_keys(rows, 256 * index >> PART, keys)
            keys = []
    progress(size, size)
    yield from _check_tiles(rows, size, hashes)
    for kind, tree in trees.items():
        try:
            if Tiles(tree.size, rows.tile).hash(0, tree.size) != tree.root:
                yield f"the tiles do not lead to the root of the {kind} checkpoint of size {tree.size}"
        except Error as error:
            yield f"the {kind} checkpoint of size {tree.size}: {error}"
    counts = {"bundle": (size + 255) // 256, "tile": sum(-(-(size >> 8 * level) // 256) for level in range(8))}
    for table, count in counts.items():
        if (stored := rows.query(f"SELECT count(*) FROM {table}")[0][0]) != count:  # noqa: S608 (our own names)
            yield f"{stored} {table}s are stored where a tree of size {size} has {count}"
    beyond = first_key(CHECKSUM, (max(size - 1, 0) >> PART) + 1, 0)
    if rows.query("SELECT 1 FROM lookup WHERE key & ? >= ? LIMIT 1", (1 << 62) - 1, beyond):
        yield "lookup: keys beyond the end of the log"
    yield from _check_filter(rows, size >> PART)


def rebuild(store: LogStore, key: VerifierKey, progress: Callable[[int, int], None]) -> Tree:
    """Rebuilds tiles, look-up keys and name filter from the entries; returns the signed tree.

    Raises BadProof if the entries do not lead to the signed root, Corrupt if entries or checkpoints can't be read. Then
    nothing is changed.
    """
    with store.database.transaction() as db:
        rows = LogRows(lambda sql, *values: db.execute(sql, values).fetchall())
        try:
            signed = rows.open(rows.checkpoint("signed"), key).tree
            rows.open(rows.checkpoint("published"), key)
        except Error as error:
            raise Corrupt(f"a checkpoint can't be derived from anything: {error}") from None
        size = rows.setting("stored") or signed.size
        for table in "tile", "lookup", "name_filter":
            db.execute(f"DELETE FROM {table}")  # noqa: S608 (our own names)
        db.execute(SET, ("project_keys", 1))
        known: dict[bytes, tuple[int, ...]] = {}
        db.execute("DELETE FROM bundle WHERE n >= ?", ((size + 255) // 256,))
        for first in range(0, size, 1 << 14):
            end = min(first + (1 << 14), size)
            bundles = [(n, rows.bundled(n, min(256, size - 256 * n))) for n in range(first >> 8, end + 255 >> 8)]
            entries = [entry for _, bundle in bundles for entry in bundle]
            packed = [(n, encode_bundle(bundle)) for n, bundle in bundles]  # nothing is kept behind the last entry
            db.executemany("INSERT OR REPLACE INTO bundle VALUES (?, ?)", packed)
            names = [field_of(FILENAME, entry) for entry in entries]
            db.execute(INSERT_KEYS, (str(_entry_keys(first, entries, names)),))
            db.execute(INSERT_PROJECT_KEYS, (str(project_keys(first, names, known)),))
            grown = list(grow(first, rows.tile, leaf_hashes(entries)))
            db.executemany("INSERT OR REPLACE INTO tile VALUES (?, ?)", tile_rows(grown))
            progress(end, size)
        groups = [(n, _filter_group(rows, n, size >> PART)) for n in range(((size >> PART) + 7) // 8)]
        db.executemany("INSERT INTO name_filter VALUES (?, ?)", groups)
        if Tiles(size, rows.tile).hash(0, signed.size) != signed.root:
            raise BadProof(f"the entries do not lead to the signed root of size {signed.size}: only a backup can help")
    return signed


def _entry_keys(first: int, entries: list[bytes], names: list[bytes]) -> list[int]:
    """The look-up keys of entries by checksum and filename. The first one has the index `first`."""
    sums = field_hashes(CHECKSUM, [entry[21:92] for entry in entries])
    return look_up_keys(CHECKSUM, first, sums) + look_up_keys(FILENAME, first, field_hashes(FILENAME, names))


def _check_checkpoints(rows: LogRows, key: VerifierKey, trees: dict[str, Tree]) -> Iterator[str]:
    for kind in ("signed", "published"):
        note = rows.checkpoint(kind)
        if note is not None or rows.setting("stored") is None:  # a mirror may still read its first checkpoint
            try:
                trees[kind] = rows.open(note, key).tree
            except Error as error:
                yield f"the {kind} checkpoint: {error}"


def _check_bundle(rows: LogRows, index: int, width: int, keys: list[int]) -> tuple[list[bytes], list[str]]:
    """The leaf hashes of a bundle, and its defects; adds the look-up keys of its entries to `keys`."""
    try:
        entries = parse_bundle(rows.bundle(index, 256), width)
    except Error as error:
        return [bytes(32)] * width, [f"{tile_path(None, index, width)}: {error}"]
    names = [field_of(FILENAME, entry) for entry in entries]
    keys += _entry_keys(256 * index, entries, names)
    keys += project_keys(256 * index, names, {})
    return leaf_hashes(entries), []


def _check_keys(rows: LogRows, part: int, keys: list[int]) -> Iterator[str]:
    stored: set[int] = set()
    if rows.setting("project_keys") is None:  # the next start makes them
        keys = [key for key in keys if key >= 0]
    for kind in CHECKSUM, FILENAME, PROJECT:
        bounds = first_key(kind, part, 0), first_key(kind, part + 1, 0) - 1
        stored.update(key for key, in rows.query("SELECT key FROM lookup WHERE key BETWEEN ? AND ?", *bounds))
    for key in sorted(stored.symmetric_difference(keys))[:20]:
        yield f"lookup: a key of entry {key_index(key)} {'is not its own' if key in stored else 'is missing'}"


def _check_filter(rows: LogRows, parts: int) -> Iterator[str]:
    """Compares the stored filter with the look-up keys of all full parts."""
    stored = rows.query("SELECT n, data FROM name_filter ORDER BY n")
    if [n for n, _ in stored] != list(range((parts + 7) // 8)):
        yield "the name filter has other groups than a log of this size"
    for n, data in stored:
        if data != _filter_group(rows, n, parts):
            yield f"group {n} of the name filter is not made of the names of its parts"


def _filter_group(rows: LogRows, n: int, parts: int) -> bytes:
    """Group `n` of the name filter, made from the look-up keys of its parts; the log has `parts` full ones."""
    fresh = NameFilter()
    for part in range(8 * n, min(8 * n + 8, parts)):
        fresh.add(part, _name_hashes(rows, part))
    return bytes(fresh.groups[n]) if fresh.groups else b""


def _check_tiles(rows: LogRows, size: int, hashes: list[bytes]) -> Iterator[str]:
    """Compares the stored tiles of all levels with the leaf hashes of `size` entries."""
    level = 0
    while hashes:
        above = []
        for index in range((len(hashes) + 255) // 256):
            part = hashes[256 * index : 256 * index + 256]
            try:
                stored = rows.tile(level, index, len(part))
            except Error as error:
                yield str(error)
                stored = b"".join(part)
            for place in range(len(part)):
                if stored[32 * place : 32 * place + 32] != part[place]:
                    below = 256 * index + place
                    what = f"entry {below}" if level == 0 else tile_path(level - 1, below)
                    yield f"{tile_path(level, index, len(part))}, hash {place}: not the hash of {what}"
            if len(part) == 256:
                above.append(expand_tile(b"".join(part))[8][0])
        level, hashes = level + 1, above


# --- A mirror: the store of a monitor ------------------------------------------------------------------------

MIRROR_SCHEMA = """
    CREATE TABLE IF NOT EXISTS finding (
        n INTEGER PRIMARY KEY, kind TEXT NOT NULL, text TEXT NOT NULL, indices TEXT NOT NULL, evidence TEXT NOT NULL
    );
    CREATE TABLE IF NOT EXISTS project (name TEXT PRIMARY KEY, compared INTEGER NOT NULL) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS publisher (
        project TEXT, name TEXT, first INTEGER NOT NULL, PRIMARY KEY (project, name)
    ) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS share (
        project TEXT PRIMARY KEY, version TEXT NOT NULL, published INTEGER NOT NULL, files INTEGER NOT NULL,
        before TEXT NOT NULL
    ) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS clock (size INTEGER PRIMARY KEY, seconds INTEGER NOT NULL);
    CREATE TABLE IF NOT EXISTS alarm (
        n INTEGER PRIMARY KEY, standing TEXT UNIQUE, seconds INTEGER NOT NULL, json TEXT NOT NULL, told INTEGER NOT NULL
    );
"""


class Alarm(NamedTuple):
    """A finding as it is told to others: its number, its time, and its JSON. `standing` is the key of one that is found
    anew in each round, for as long as it stands; None for one about entries."""
    n: int | None
    standing: str | None
    seconds: int
    json: str
    told: int = 0


class Arrived(NamedTuple):
    """New entries: the index of the first, all of them, their names, and stored entries that may have these names."""
    size: int
    entries: list[bytes]
    names: list[bytes]
    known: list[tuple[int, bytes]]


class MirrorStore(LogStore):
    """A copy of another log, in a log's store, and what a monitor remembers of that log.

    Findings about entries are stored in the transaction that stores the entries, and deleted once they are reported.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        with self.database.transaction() as db:
            for statement in filter(str.strip, MIRROR_SCHEMA.split(";")):
                db.execute(statement)

    def last(self) -> bytes | None:
        """The note of the newest accepted checkpoint. Some of its entries may not be stored yet."""
        return self.checkpoint("target") or self.checkpoint("signed")

    def _known(
        self, rows: LogRows, keys: list[int], names: list[bytes], hashes: list[int], size: int
    ) -> list[tuple[int, bytes]]:
        """The first stored entry with each of these names, without its publisher; and perhaps some more."""
        found = rows.first_entries(keys, dict(zip(names, hashes, strict=True)), size)
        return [(index, data[: 93 + MAX_FILENAME].partition(b"\npublisher ")[0]) for index, data in found]

    def follow(
        self, entries: list[bytes], target: tuple[Tree, bytes],
        check: Callable[[Tree, list[Grown]], Iterable[Finding]], wanted: Sequence[WatchTerm], now: float = 0,
    ) -> None:
        """Appends `entries` and the findings about them. `target` is the tree that is being read, and its note.

        `check` gets the new tree and its changed tiles; if it raises, nothing is changed.
        """
        findings: list[Finding] = []

        def choose(
            db: sqlite3.Connection, size: int, entries: list[bytes], names: list[bytes], known: list[tuple[int, bytes]]
        ) -> tuple[list[Outcome], list[bytes]]:
            findings.extend(self._find(db, Arrived(size, entries, names, known), wanted, self._size_at(db, now - LATE)))
            return [], entries

        def finish(db: sqlite3.Connection, tree: Tree, grown: list[Grown]) -> None:
            findings.extend(check(tree, grown))
            db.execute("DELETE FROM clock WHERE seconds >= ?", (now - now % 3600,))  # one row an hour, its last
            db.execute("INSERT OR REPLACE INTO clock VALUES (?, ?)", (tree.size, int(now)))
            if tree == target[0]:
                db.execute("DELETE FROM setting WHERE name = 'stored'")
                db.execute("DELETE FROM checkpoint WHERE kind = 'target'")
                if self.tree("seen").size <= tree.size:  # this tree begins with it
                    db.execute("DELETE FROM checkpoint WHERE kind = 'seen'")
                self._accept(db, target[1])
            else:
                db.execute(SET, ("stored", tree.size))
                db.execute("INSERT OR REPLACE INTO checkpoint VALUES ('target', ?)", (target[1],))
            self._keep(db, findings)
            self._searched(db, wanted, tree.size)

        self._append(entries, choose, finish)
        self.database.tidy()

    def _find(
        self, db: sqlite3.Connection, arrived: Arrived, wanted: Sequence[WatchTerm], old: int
    ) -> Iterator[Finding]:
        """Yields the findings about new entries. `old` is how many there were LATE seconds ago."""
        size, entries, names, known = arrived
        plain, distinct = all_plain(entries), set(names)
        repeated = len(distinct) < len(names) or any(field_of(FILENAME, data) in distinct for _, data in known)
        matches = [] if plain else match_entries(entries)
        good = names if plain else [match[2].encode() for match in matches if match]
        seen = self._publishers(db, good, matches or (_ENTRY.fullmatch(e.decode()) for e in entries))
        if plain and not (repeated or seen or wanted or old):
            return
        matches = matches or match_entries(entries)
        for at, match in enumerate(matches, size):
            if not match:
                text = f"what is logged at index {at} is no entry: {entries[at - size][:100]!r}"
                yield Finding("bad-entry", text, (at,))
        yield from find_replaced(size, matches, known) if repeated else ()
        copied = find_copies(size, matches, known) if repeated else ()
        of = "SELECT * FROM share WHERE project IN (SELECT value FROM json_each(?))"
        shares = {row[0]: Share(*row[1:]) for row in db.execute(of, (json.dumps(list(seen)),))}
        yield from find_publisher_changes(size, matches, seen, shares, copied)
        rows = [(project, name, at) for project, all_ in seen.items() for name, at in all_.items()]
        db.executemany("INSERT OR REPLACE INTO publisher VALUES (?, ?, ?)", rows)
        db.executemany("INSERT OR REPLACE INTO share VALUES (?, ?, ?, ?, ?)", ((p, *s) for p, s in shares.items()))
        yield from self._late(size, matches, copied, old)
        yield from _matches(size, matches, wanted)

    @staticmethod
    def _size_at(db: sqlite3.Connection, seconds: float) -> int:
        """How many entries were stored by a time."""
        return db.execute("SELECT max(size) FROM clock WHERE seconds <= ?", (seconds,)).fetchone()[0] or 0

    def _late(
        self, first: int, matches: Sequence[re.Match[str] | None], copied: Collection[int], old: int
    ) -> Iterator[Finding]:
        """Yields a finding for each new file of a release that had files among the `old` entries, LATE seconds ago."""
        known: dict[str, dict[str, int]] = {}  # of each project its releases then, each with the index of a file
        for at, match in enumerate(matches, first):
            if not old or not match or at in copied or not match[2].endswith(DISTRIBUTIONS):
                continue
            project, version = release_of(match[2])
            if project not in known:
                known[project], end = {}, old
                while end:
                    found, end = self.of_project(project, end, MAX_WAITING)
                    files = ((index, release_of(field_of(FILENAME, data).decode())) for index, data in found)
                    known[project] |= {version: index for index, (_, version) in files}
            if (index := known[project].get(version)) is not None:
                text = f"{match[2]} at index {at} is added to {version} of {project}, a release that has had files for"
                yield Finding("late", f"{text} {LATE // 86400} days or more, as at index {index}", (index, at))

    @staticmethod
    def _keep(db: sqlite3.Connection, findings: list[Finding]) -> None:
        for f in _bounded(findings):
            evidence = {name: to_base64(data) for name, data in f.evidence.items()}
            row = (f.kind, f.text, json.dumps(f.indices), json.dumps(evidence))
            db.execute("INSERT INTO finding (kind, text, indices, evidence) VALUES (?, ?, ?, ?)", row)

    def _searched(self, db: sqlite3.Connection, terms: Sequence[WatchTerm], size: int) -> None:
        """Stores that the first `size` entries have been searched for these terms."""
        if terms:
            known = json.loads(self.setting("searched") or "{}")
            db.execute(SET, ("searched", json.dumps({**known, **{term.key(): size for term in terms}})))

    def search(self, terms: Sequence[WatchTerm], progress: Callable[[int, int], None]) -> None:
        """Searches the stored entries for terms that are new, and stores what it finds."""
        known, end = json.loads(self.setting("searched") or "{}"), self.stored().size
        first = min((known.get(term.key(), 0) for term in terms), default=end)
        for lo in range(first // 256 * 256, end, SEARCH_BATCH):
            hi = min(lo + SEARCH_BATCH, end)
            bundles = (self.bundled(n, min(256, hi - 256 * n)) for n in range(lo // 256, (hi + 255) // 256))
            matches = match_entries(itertools.chain.from_iterable(bundles))
            due = [term for term in terms if known.get(term.key(), 0) < hi]
            findings = [
                finding for finding in _matches(lo, matches, due)
                # an earlier term has found it already
                if not any(term.matches(cast(re.Match[str], matches[finding.indices[0] - lo]))
                           for term in terms if known.get(term.key(), 0) > finding.indices[0])
            ]
            with self.database.transaction() as db:
                self._keep(db, findings)
                self._searched(db, due, hi)
            self.database.tidy()
            progress(hi, end)

    def _publishers(
        self, db: sqlite3.Connection, names: list[bytes], matches: Iterable[re.Match[str] | None]
    ) -> dict[str, dict[str, int]]:
        """Stores the projects of new files; returns their known publishers, as find_publisher_changes takes them.

        That is the newest publisher of each project, and those that the new files have too.
        """
        # Many filenames begin alike: each beginning is turned into a project name once.
        plain = (name.removesuffix(b".metadata") for name in names)
        stems = {n.partition(b"-")[0] if n.endswith((b".whl", b".egg")) else n.rpartition(b"-")[0] for n in plain}
        some = db.execute("SELECT 1 FROM publisher LIMIT 1").fetchall()
        projects = sorted({normalize(stem.decode()) for stem in (stems if some else stems - self._stems)} - {""})
        db.executemany("INSERT OR IGNORE INTO project VALUES (?, 0)", zip(projects))
        self._stems = stems if len(self._stems) > MAX_STEMS else self._stems | stems
        known: dict[str, dict[str, int]] = {}
        if some:
            pairs = {(project_of(match[2]), publisher_name(match)) for match in matches if match}
            newest = ("SELECT project, name, max(first) FROM publisher "
                      "WHERE project IN (SELECT value FROM json_each(?)) GROUP BY project")
            rows = db.execute(newest, (json.dumps(projects),)).fetchall()
            have = {project for project, *_ in rows}
            for pair in sorted(pair for pair in pairs if pair[0] in have):
                rows += db.execute("SELECT * FROM publisher WHERE project = ? AND name = ?", pair).fetchall()
            for project, name, first in sorted(rows, key=lambda row: row[2]):
                if name:  # "" is from an older btlog
                    known.setdefault(project, {})[name] = first
        return known

    def seen(self, note: bytes) -> None:
        """Stores the first signed checkpoint whose tiles could not be read."""
        with self.database.transaction() as db:
            db.execute("INSERT OR IGNORE INTO checkpoint VALUES ('seen', ?)", (note,))

    def renew(self, note: bytes) -> None:
        """Stores another note of the checkpoint that was reached."""
        with self.database.transaction() as db:
            self._accept(db, note)

    @staticmethod
    def _accept(db: sqlite3.Connection, note: bytes) -> None:
        rows = [(kind, note) for kind in ("signed", "published")]
        db.executemany("INSERT OR REPLACE INTO checkpoint VALUES (?, ?)", rows)

    def unreported(self, limit: int = 100) -> list[tuple[int, Finding]]:
        """The first findings that are not reported yet, each with its number."""
        found = []
        rows = self.query("SELECT * FROM finding ORDER BY n LIMIT ?", limit)
        for n, kind, text, indices, evidence in rows:
            files = {name: parse_base64(data) for name, data in json.loads(evidence).items()}
            found.append((n, Finding(kind, text, tuple(json.loads(indices)), files)))
        return found

    def reported(self, numbers: Iterable[int], alarms: Iterable[Alarm] = ()) -> None:
        """Forgets the findings with these numbers, and keeps what is to be told of them."""
        with self.database.transaction() as db:
            db.executemany("DELETE FROM finding WHERE n = ?", [(n,) for n in numbers])
            db.executemany("INSERT OR IGNORE INTO alarm VALUES (?, ?, ?, ?, ?)", alarms)
            old = "DELETE FROM alarm WHERE told AND n <= (SELECT max(n) FROM alarm) - ?"
            db.execute(old, (MAX_ALARMS,))
        self.database.tidy()

    def alarms(self, told: bool, limit: int) -> list[Alarm]:
        """The oldest alarms that were not told yet; or the newest of all."""
        which = "ORDER BY n DESC" if told else "WHERE NOT told ORDER BY n"
        return [Alarm(*row) for row in self.query(f"SELECT * FROM alarm {which} LIMIT ?", limit)]  # noqa: S608

    def told(self, n: int) -> None:
        with self.database.transaction() as db:
            db.execute("UPDATE alarm SET told = 1 WHERE n = ?", (n,))

    def standing(self, keys: Collection[str]) -> None:
        """What stands no longer, for it is not among `keys`, is told again if it comes back."""
        with self.database.transaction() as db:
            ended = "UPDATE alarm SET standing = NULL WHERE told AND standing NOT IN (SELECT value FROM json_each(?))"
            db.execute(ended, (json.dumps(list(keys)),))

    def compared(self, size: int, projects: Iterable[str], turn: int) -> None:
        """Stores that the first `size` entries and these `projects` were compared with the index in this turn."""
        with self.database.transaction() as db:
            db.executemany(SET, [("compared", size), ("turn", turn)])
            db.executemany("UPDATE project SET compared = ? WHERE name = ?", [(turn, name) for name in projects])
        self.database.tidy()


SEARCH_BATCH = 1 << 14  # entries that are searched for new patterns in one transaction


def _matches(first: int, matches: Sequence[re.Match[str] | None], terms: Sequence[WatchTerm]) -> Iterator[Finding]:
    """A finding for each entry that any of the terms matches. The first entry has the index `first`."""
    if terms:
        for at, match in enumerate(matches, first):
            if match and any(term.matches(match) for term in terms):
                yield Finding("match", f"{match[2]} with {match[1]} is logged at index {at}", (at,))


def _bounded(findings: list[Finding]) -> list[Finding]:
    """At most MAX_FINDINGS of each kind, and how many more there are: a hostile log could cause millions.

    Matches of watch terms are all kept.
    """
    bounded: list[Finding] = []
    for kind, group in itertools.groupby(sorted(findings, key=lambda f: f.kind), lambda f: f.kind):
        same = list(group)
        if kind == "match":
            bounded += same
            continue
        bounded += same[:MAX_FINDINGS]
        if more := same[MAX_FINDINGS:]:
            bounded.append(Finding(more[0].kind, f"{more[0].text}; and {len(more) - 1} more like it", more[0].indices))
    return bounded


# --- The witness's store -----------------------------------------------------------------------------------

WITNESS_ID = 0x62746C77  # "btlw"
WITNESS_LISTED = """CREATE TABLE listed (
        origin TEXT PRIMARY KEY, vkey TEXT NOT NULL, qpd INTEGER NOT NULL, contact TEXT NOT NULL
    )"""
WITNESS_SCHEMA = f"""
    CREATE TABLE setting (name TEXT PRIMARY KEY, value NOT NULL);
    CREATE TABLE key (vkey TEXT PRIMARY KEY, origin TEXT NOT NULL);
    {WITNESS_LISTED};
    CREATE TABLE log (
        origin TEXT PRIMARY KEY, size INTEGER NOT NULL, root BLOB NOT NULL, seconds INTEGER NOT NULL, note BLOB NOT NULL
    );
    CREATE TABLE evidence (
        origin TEXT NOT NULL, forked INTEGER NOT NULL, reason TEXT NOT NULL,
        stored BLOB NOT NULL, offered BLOB NOT NULL, UNIQUE (origin, offered)
    );
"""


def is_new(database: Path) -> bool:
    """True if there is no database yet, or only an empty file; raises Malformed for what is no regular file."""
    if not database.exists():
        return True
    if not database.is_file():
        raise Malformed(f"{database} is not a regular file")
    return database.stat().st_size == 0


def _add_key(db: sqlite3.Connection, key: VerifierKey, origin: str) -> bool:
    """Adds the key of a log, and returns True, unless it is there. A key's origin is never changed."""
    return db.execute("INSERT OR IGNORE INTO key VALUES (?, ?)", (encode_vkey(key), origin)).rowcount == 1


class WitnessStore:
    """The database of a witness: the logs that it knows, and the last checkpoint that it cosigned of each.

    A log is never forgotten, and its size never falls.
    """

    def __init__(self, path: Path) -> None:
        if is_new(path):
            Database.create(path, WITNESS_ID, WITNESS_SCHEMA)
        self.path, self.database = path, Database(path, WITNESS_ID)
        with contextlib.ExitStack() as opened:
            opened.callback(self.close)
            if not self.database.read("SELECT 1 FROM sqlite_schema WHERE name = 'listed'"):  # made by an older version
                with self.database.transaction() as db:
                    db.execute(WITNESS_LISTED)
            opened.pop_all()

    def claim(self, key: VerifierKey) -> None:
        """Binds the database to the witness `key`. Cannot be undone. Raises Malformed if it is bound to another."""
        name = "vkey" if key.kind == ED25519 else f"vkey of type {key.kind}"
        with self.database.transaction() as db:
            db.execute("INSERT OR IGNORE INTO setting VALUES (?, ?)", (name, encode_vkey(key)))
            [(vkey,)] = db.execute("SELECT value FROM setting WHERE name = ?", (name,)).fetchall()
            if vkey != encode_vkey(key):
                raise Malformed(f"{self.path} is the database of the witness {vkey}, not of {encode_vkey(key)}")

    def register(self, keys: Iterable[VerifierKey]) -> list[VerifierKey]:
        """Adds the keys of logs whose origins are their names; returns the new ones."""
        with self.database.transaction() as db:
            return [key for key in keys if _add_key(db, key, key.name)]

    def discover(self, logs: Iterable[ListedLog]) -> list[ListedLog]:
        """Adds those of a list's logs whose origins are new; returns these.

        No list changes what is known: a log's keys are not the list's to say, nor is what it was once allowed. And none
        keeps the operator from configuring a key, whatever origin it gave to that.
        """
        with self.database.transaction() as db:
            known = {origin for (origin,) in db.execute("SELECT origin FROM key UNION SELECT origin FROM listed")}
            new = {log.origin: log for log in reversed([*logs]) if log.origin not in known}  # of two, the first counts
            rows = [(log.origin, encode_vkey(log.key), log.qpd, log.contact) for log in new.values()]
            db.executemany("INSERT INTO listed VALUES (?, ?, ?, ?)", rows)
        return list(reversed(new.values()))

    def listed(self) -> dict[str, tuple[int, str]]:
        """The requests a day and the contact of each log that a list told of, by origin."""
        rows = self.database.read("SELECT origin, qpd, contact FROM listed")
        return {origin: (qpd, contact) for origin, qpd, contact in rows}

    def logs(self) -> dict[str, list[VerifierKey]]:
        """The keys of all logs, by origin."""
        logs: dict[str, list[VerifierKey]] = {}
        for vkey, origin in self.database.read("SELECT vkey, origin FROM key UNION SELECT vkey, origin FROM listed"):
            logs.setdefault(origin, []).append(VerifierKey.parse(vkey))
        return logs

    def last(self, origin: str, query: Query | None = None) -> Witnessed | None:
        """The last cosigned checkpoint of a log; None if there is none."""
        rows = (query or self.database.read)("SELECT size, root, seconds, note FROM log WHERE origin = ?", origin)
        return Witnessed(Tree(*rows[0][:2]), *rows[0][2:]) if rows else None

    def update(self, db: sqlite3.Connection, origin: str, old: Witnessed | None, new: Witnessed) -> None:
        """Compare and swap, within a transaction: raises Stale unless `old` is still what is stored."""
        values = (new.tree.size, new.tree.root, new.seconds, new.note, origin)
        if old is None:
            done = db.execute(
                "INSERT OR IGNORE INTO log (size, root, seconds, note, origin) VALUES (?, ?, ?, ?, ?)", values
            )
        else:
            done = db.execute(
                "UPDATE log SET size = ?, root = ?, seconds = ?, note = ? WHERE origin = ? AND size = ? AND root = ?",
                (*values, old.tree.size, old.tree.root),
            )
        if done.rowcount != 1:
            [(size,)] = db.execute("SELECT size FROM log WHERE origin = ?", (origin,)).fetchall()
            raise Stale(size)

    def adopt(self, logs: Iterable[tuple[str, VerifierKey, Tree]]) -> None:
        """Takes over the logs and sizes of another database of the same witness: all of them, or none.

        The larger of two sizes counts. Raises BadProof for two trees of one size.
        """
        with self.database.transaction() as db:
            for origin, key, tree in logs:
                _add_key(db, key, origin)
                last = self.last(origin, lambda sql, *values: db.execute(sql, values).fetchall())
                if last and last.tree.size == tree.size and last.tree != tree:
                    raise BadProof(f"{origin}: it has cosigned two trees of size {tree.size}: it can cosign no more")
                if tree.size > (last.tree.size if last else 0):
                    self.update(db, origin, last, Witnessed(tree, last.seconds if last else 1, b""))

    def accuse(
        self, db: sqlite3.Connection, origin: str, forked: bool, reason: str, notes: tuple[bytes, bytes]
    ) -> bool:
        """Stores two notes of a log that contradict each other, MAX_EVIDENCE of a kind; True if they are new."""
        where = (origin, forked)
        [(count,)] = db.execute("SELECT count(*) FROM evidence WHERE origin = ? AND forked = ?", where).fetchall()
        if count >= MAX_EVIDENCE:
            return False
        row = (*where, reason, *notes)
        return db.execute("INSERT OR IGNORE INTO evidence VALUES (?, ?, ?, ?, ?)", row).rowcount == 1

    def close(self) -> None:
        self.database.close()


# === Part IV: network ===================================================================================
# --- HTTP: requests and answers, and the connections below them --------------------------------------------
# One thread serves all connections. In http.server each has a thread: handing over the interpreter lock then costs
# more than most answers do, and every idle client holds a thread.

def printable(text: str) -> str:
    """The text with "?" for each unprintable character, so that text from others is safe on a terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)


class Lines(logging.Formatter):
    """Formats a log record as one line for people; the traceback of an internal error follows on more lines."""

    def format(self, record: logging.LogRecord) -> str:
        trace = f"\n{self.formatException(record.exc_info)}" if record.exc_info else ""
        return f"btlog: {printable(record.getMessage())}{trace}"


class JsonLines(logging.Formatter):
    """Formats a log record as a line of JSON, with the keys that Go's slog uses."""

    def format(self, record: logging.LogRecord) -> str:
        line = {"time": utc(record.created), "level": record.levelname, "msg": record.getMessage()}
        return json.dumps(line | ({"error": self.formatException(record.exc_info)} if record.exc_info else {}))


class Flood(logging.Filter):
    """Passes at most `limit` records of a kind in each `period` (seconds). The next period reports how many it dropped.

    A kind is a message about one log, witness or path. Critical records always pass.
    """

    KINDS = 1000  # kinds to remember

    def __init__(self, limit: int = 20, period: float = 60) -> None:
        super().__init__()
        self._limit, self._period = limit, period
        self._seen = OrderedDict[tuple[str, str], tuple[float, int]]()  # start and count, by kind

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno >= logging.CRITICAL:
            return True
        subject = record.args[0] if isinstance(record.args, tuple) and record.args else ""
        kind = str(record.msg), str(subject)[:200]
        start, count = self._seen.pop(kind, (-math.inf, 0))
        if record.created > start + self._period:
            if count > self._limit:
                record.msg = f"{kind[0]} (and {count - self._limit} more like it)"
            start, count = record.created, 0
        self._seen[kind] = start, count + 1
        if len(self._seen) > self.KINDS:
            self._seen.popitem(last=False)
        return count < self._limit


class HttpError(Error):
    """An error of the HTTP request itself, answered with `status` and `headers`."""

    def __init__(self, status: int, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers


def takes_gzip(accepted: str) -> bool:
    """True if an Accept-Encoding header accepts gzip: it names gzip with a weight other than 0."""
    codings = (part.replace(" ", "").lower().partition(";q=") for part in accepted.split(","))
    return any(name == "gzip" and (not q or quality.strip("0.") != "") for name, q, quality in codings)


def is_address(host: str) -> bool:
    """True if a Host header has an IP address or localhost. Any other name could point here by DNS rebinding."""
    name = re.sub(r":[0-9]+\Z", "", host).strip("[]")
    with contextlib.suppress(ValueError):
        return bool(ipaddress.ip_address(name))
    return name == "localhost"


class Body:
    """A request's body of `length` bytes: `missing` have not arrived yet, and `unread` wait here for part()."""

    def __init__(self, length: int, taken: Callable[[], None]) -> None:
        self.length = self.missing = length
        self.unread = 0
        self._taken, self._parts = taken, deque[bytes]()
        self._more: asyncio.Future[None] | None = None
        self._error: HttpError | None = None

    def feed(self, data: bytes) -> bytes:
        """Takes the bytes that belong to the body; returns the others."""
        part, rest = data[: self.missing], data[self.missing :]
        self.missing -= len(part)
        self.unread += len(part)
        self._parts.append(part)
        self._wake()
        return rest

    def end(self, error: HttpError) -> None:
        """Ends the body early: part() raises `error` once all bytes that arrived are read."""
        self._error = error
        self._wake()

    def _wake(self) -> None:
        if self._more and not self._more.done():
            self._more.set_result(None)

    async def part(self) -> bytes:
        """The bytes that have arrived since the last call, b"" at the end. Waits for one; raises HttpError."""
        while not self.unread and self.missing:
            if self._error:
                raise self._error
            self._more = asyncio.get_running_loop().create_future()
            await self._more
        data = b"".join(self._parts)
        self._parts.clear()
        self.unread = 0
        self._taken()
        return data

    async def all(self, limit: int) -> bytes:
        if self.length > limit:
            raise HttpError(413, f"the body has {self.length} bytes, and {limit} are allowed")
        data = b""
        while part := await self.part():
            data += part
        return data


@dataclass
class Response:
    """An answer. Where `body` is an iterator, each list of bytes that it yields is sent as one chunk."""
    body: bytes | Iterator[list[bytes]] | AsyncIterator[list[bytes]]
    kind: str = "application/json"
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    reason: str | None = None  # the words behind the status, if not the usual ones
    head: tuple[str, bool, bytes] = ("", False, b"")  # cached: its date, if the connection is kept, its bytes

    @classmethod
    def json(cls, value: Any, headers: dict[str, str], status: int = 200) -> Response:
        return cls(json.dumps(value, ensure_ascii=False).encode() + b"\n", status=status, headers=headers)

    @classmethod
    def error(cls, error: Error) -> Response:
        """The answer for an error. An internal error (500) gives no details."""
        message = "internal error" if error.status == 500 else str(error)
        headers = {name.replace("_", "-"): value for name, value in getattr(error, "headers", {}).items()}
        if error.status == 503:
            headers.setdefault("Retry-After", "5")
        index = {"index": error.index} if isinstance(error, Conflict) else {}
        return cls.json({"error": message, **index}, headers, error.status)


_REQUEST_LINE = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+ [\x21-\x7e]+ HTTP/[0-9]\.[0-9]\r\n")
_HEADERS = re.compile(rb"(?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t\x20-\x7e\x80-\xff]*\r\n)*\r\n")
_ONCE = "content-length", "host", "content-type", "authorization", "origin", "expect"
_http_date = functools.lru_cache(1)(lambda second: email.utils.formatdate(second, usegmt=True))


class Handler(http.server.BaseHTTPRequestHandler):
    """One HTTP request. http.server parses its head and writes the head of its answer; `Connection` carries the bytes.

    A subclass defines `allowed`, do_GET and, where it allows POST, do_POST.
    Each of the last two returns a Response, or a coroutine that does, or raises an Error.
    """
    protocol_version = "HTTP/1.1"
    request_version, command, close_connection = "HTTP/1.1", "", True  # until a head is read
    length, expects = 0, False

    app: Any  # the LogServer, Witness or Gate that answers

    def __init__(self) -> None:
        """An empty request. It skips http.server's own __init__, which would read from a socket."""

    @classmethod
    def of(cls, app: Any) -> type[Self]:
        """A subclass that is bound to `app`."""
        return type(cls.__name__, (cls,), {"app": app})

    def read(self, head: bytes) -> None:
        """Reads the head of a request, from its request line to its empty line; raises HttpError."""
        known: Handler | None = _heads.get(head)
        if known is None:
            known = Handler()
            known._parse(head)
            if len(head) < 2048:
                _heads.put(head, known)
        vars(self).update(vars(known))

    def _parse(self, head: bytes) -> None:
        """As strict as RFC 9112 lets a server be. Refuses all that two parsers could read differently, such as a bare
        newline, a folded header or two lengths.
        """
        if not (line := _REQUEST_LINE.match(head)):
            raise HttpError(400, "not a request line of HTTP/1.1")
        if not _HEADERS.fullmatch(head, line.end()):
            raise HttpError(400, "not a header line")
        self.raw_requestline, self.rfile = line[0], io.BytesIO(head[line.end() :])
        self.parse_request()  # it reports errors through send_error
        if not self.request_version.startswith("HTTP/1."):
            raise HttpError(505, "this is an HTTP/1.1 server")
        names = [name.lower() for name in self.headers.keys()]  # noqa: SIM118 (a name for each line)
        if len(set(names)) < len(names) and (repeated := [name for name in _ONCE if names.count(name) > 1]):
            raise HttpError(400, f"two {repeated[0]} headers")
        if b" //" in line[0]:  # http.server turns "//" into "/"
            raise HttpError(404, "there is nothing here")
        self.close_connection |= self.request_version == "HTTP/1.0"
        self.route = self.path.partition("?")[0]
        self.length, self.weight = self._length(), 3000 + 30 * len(head)  # about what it takes in memory, in bytes

    def _length(self) -> int:
        """The length of the body in bytes; raises HttpError."""
        if "transfer-encoding" in self.headers:
            raise HttpError(411, "send the body with a Content-Length, not in chunks")
        if (length := self.headers["content-length"]) is None:
            if self.command in ("POST", "PUT", "PATCH"):
                raise HttpError(411, "the request has no Content-Length")
            return 0
        try:
            return parse_decimal(length.strip(" \t"))
        except Malformed:
            raise HttpError(400, "not a Content-Length") from None

    # Called by http.server

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        raise HttpError(code, message or http.client.responses[code])

    def handle_expect_100(self) -> bool:
        self.expects = True
        return True

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        pass

    def version_string(self) -> str:
        return "btlog"

    def date_time_string(self, timestamp: float | None = None) -> str:
        return _http_date(int(time.time()))

    # Called by `Connection`

    def answer(self, body: Body) -> Response | Coroutine[Any, Any, Response]:
        """The answer, or a coroutine that returns it; raises Error."""
        allowed = self.allowed()
        if self.command == "OPTIONS" and "GET" in allowed:  # asked before a script does more than a plain GET
            methods = {"Allow": "GET, HEAD, OPTIONS", "Access-Control-Allow-Methods": "GET, HEAD"}
            return Response(b"", TEXT, headers={**CORS, **methods, "Access-Control-Allow-Headers": "*"})
        if self.command not in allowed:
            raise HttpError(405, f"{self.route[:80]} takes {' and '.join(allowed)}", Allow=", ".join(allowed))
        if self.command == "POST":
            return self.do_POST(body)
        return self.do_HEAD() if self.command == "HEAD" else self.do_GET()

    def head(self, response: Response, keep: bool) -> bytes:
        """The bytes of an answer's head. With `keep`, the connection stays open after the answer."""
        date = self.date_time_string()
        if response.head[:2] == (date, keep) and self.request_version == "HTTP/1.1":
            return response.head[2]
        self.wfile = written = io.BytesIO()
        self.send_response(response.status, response.reason)
        self.send_header("Content-Type", response.kind)
        if isinstance(response.body, bytes):
            self.send_header("Content-Length", str(len(response.body)))
        elif self.request_version != "HTTP/1.0":  # HTTP/1.0 has no chunks: the body ends with the connection
            self.send_header("Transfer-Encoding", "chunked")
        for name, value in response.headers.items():
            self.send_header(name, value)
        if not keep:
            self.send_header("Connection", "close")
        self.end_headers()
        response.head = date, keep, written.getvalue()
        return written.getvalue()

    # Defined by a subclass

    def allowed(self) -> tuple[str, ...]:
        """The methods that the path allows; raises HttpError 404 if there is no such path."""
        raise NotImplementedError

    def do_GET(self) -> Response | Coroutine[Any, Any, Response]:
        raise NotImplementedError

    def do_HEAD(self) -> Response | Coroutine[Any, Any, Response]:
        return self.do_GET()

    def do_POST(self, body: Body) -> Coroutine[Any, Any, Response]:
        raise NotImplementedError

    def query(self) -> dict[str, str]:
        """The query's parameters; raises Malformed. A "+" is no space here: filenames with local versions have it."""
        pairs = [part.partition("=") for part in self.path.partition("?")[2].split("&") if part]
        try:
            values = {name: urllib.parse.unquote(value, errors="strict") for name, _, value in pairs}
        except UnicodeDecodeError:
            raise Malformed("a query that is not UTF-8") from None
        if len(values) < len(pairs):
            raise Malformed("a query with the same parameter twice")
        return values


_heads = Cache(1 << 22, lambda handler: handler.weight)  # a client sends the same head again and again


class Connection(asyncio.Protocol):
    """A client's connection: splits the incoming bytes into requests, and answers one request after the other.

    It has three states: waiting for a request; answering one (`_body` is set); closing (it drops incoming bytes).
    """

    def __init__(self, server: Server) -> None:
        self._server, self._buffer = server, bytearray()
        self._transport: asyncio.Transport
        self._body: Body | None = None
        self._task: asyncio.Task[None] | None = None
        self._eof = self._closing = self._paused = False  # client has ended; we have ended; client does not read
        self._writable: asyncio.Future[None] | None = None
        self.deadline = 0.0  # in the loop's time: when `expire` is called unless the client goes on

    # Called by the transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._server.enter(self)
        self._wait(IDLE_TIMEOUT)

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.connections.pop(self, None)
        self._closing = True
        self.eof_received()
        self.resume_writing()

    def data_received(self, data: bytes) -> None:
        if not self._closing:
            self._buffer += data if not self._body else self._body.feed(data)
            self._advance()

    def eof_received(self) -> bool:
        """The client has closed its side. It may still wait for its answer."""
        self._eof = True
        if self._body:
            self._body.end(HttpError(400, "the body ended early"))
        else:
            self._advance()
        return True

    def pause_writing(self) -> None:
        self._paused = True
        self._wait(SEND_TIMEOUT)
        self._regulate()

    def resume_writing(self) -> None:
        self._paused = False
        self._wait(IDLE_TIMEOUT)
        if self._writable and not self._writable.done():
            self._writable.set_result(None)
        self._advance()

    # Called by the server

    def answering(self) -> bool:
        """True if a whole request has arrived, and its answer is not written yet."""
        return self._body is not None and not self._body.missing and not self._paused

    def expire(self) -> None:
        """Ends a wait for the client whose deadline has passed."""
        late = HttpError(408, "the request took too long")
        if self._closing or self._paused:
            self._transport.abort()
        elif self._body and self._body.missing:
            self._body.end(late)
        elif self._buffer and not self._body:
            self._refuse(late)
        elif not self._body:
            self._end()

    def abort(self) -> None:
        self._transport.abort()

    # Private

    def _wait(self, seconds: float) -> None:
        self.deadline = self._server.loop.time() + seconds

    def _regulate(self) -> None:
        """Pauses reading while more has arrived than can be used now; else resumes it."""
        unread = self._body.unread >= MAX_UNREAD if self._body else False
        if not self._transport.is_closing():
            if not self._closing and (self._paused or unread or len(self._buffer) > MAX_HEAD):
                self._transport.pause_reading()
            else:
                self._transport.resume_reading()

    def _advance(self) -> None:
        """Begins to answer the next request, once its whole head has arrived and the last answer is sent."""
        if self._body or self._closing or self._paused:
            self._regulate()
            return
        end = self._buffer.find(b"\r\n\r\n", 0, MAX_HEAD) + 4
        try:
            if end >= 4:
                handler, head = self._server.handler(), bytes(self._buffer[:end])
                del self._buffer[:end]
                handler.read(head)
                self._begin(handler)
            elif len(self._buffer) >= MAX_HEAD:
                status = 431 if b"\r\n" in self._buffer[:MAX_HEAD] else 414
                raise HttpError(status, "the head of the request is too long")
            elif re.search(rb"(?<!\r)\n", self._buffer):
                raise HttpError(400, "a line that does not end in CR LF")
            elif self._buffer and self._eof:
                raise HttpError(400, "the request ended early")
            elif self._eof:
                self._end()
            elif self._buffer:
                self.deadline = min(self.deadline, self._server.loop.time() + HEAD_TIMEOUT)
        except HttpError as error:
            self._refuse(error)
        self._regulate()

    def _begin(self, handler: Handler) -> None:
        self._body = body = Body(handler.length, self._regulate)
        if handler.length:
            self._wait(HEAD_TIMEOUT + handler.length / MIN_RATE)
            self._buffer = bytearray(body.feed(bytes(self._buffer)))
            if body.missing and self._eof:
                body.end(HttpError(400, "the body ended early"))
            elif body.missing and handler.expects:
                self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        try:
            response = handler.answer(body)
        except Exception as error:
            response = self._error_answer(handler, error)
        if isinstance(response, Response) and isinstance(response.body, bytes):
            self._write(handler, response, response.body)
        else:
            self._task = self._server.loop.create_task(self._finish(handler, response))

    async def _finish(self, handler: Handler, response: Response | Coroutine[Any, Any, Response]) -> None:
        """Awaits the answer if it is a coroutine, then sends it."""
        try:
            if not isinstance(response, Response):
                response = await response
        except Exception as error:
            response = self._error_answer(handler, error)
        if isinstance(response.body, bytes):
            self._write(handler, response, response.body)
        else:
            await self._stream(handler, response, response.body)

    def _error_answer(self, handler: Handler, error: Exception) -> Response:
        """Logs an error; returns the answer for it."""
        if isinstance(error, Error) and error.status < 500:
            logger.debug("%s %s: %d: %s", handler.command, handler.path[:200], error.status, error)
        if not isinstance(error, Error) or error.status == 500:
            traceback = None if isinstance(error, Error) else error
            logger.error("%s %s: %s", handler.command, handler.path[:200], error, exc_info=traceback)
        return Response.error(error if isinstance(error, Error) else Error())

    def _write(self, handler: Handler, response: Response, body: bytes) -> None:
        keep = not (handler.close_connection or self._server.stopping or (self._body and self._body.missing))
        self._send(handler.head(response, keep) + (body if handler.command != "HEAD" else b""))
        self._next(keep)

    async def _stream(
        self, handler: Handler, response: Response, body: Iterator[list[bytes]] | AsyncIterator[list[bytes]]
    ) -> None:
        keep, chunked = not (handler.close_connection or self._server.stopping), handler.request_version != "HTTP/1.0"
        self._send(handler.head(response, keep))
        self._transport.set_write_buffer_limits(MAX_STREAM)  # the next chunk is made while this one is sent
        try:
            while pieces := next(body, None) if isinstance(body, Iterator) else await anext(body, None):
                length = sum(map(len, pieces))
                self._send(b"".join([b"%x\r\n" % length, *pieces, b"\r\n"] if chunked else pieces))
                if self._paused:
                    self._writable = self._server.loop.create_future()
                    await self._writable
                await asyncio.sleep(0)  # lets other connections run
                if self._closing:
                    return
        except Exception as error:
            # The status is sent already. Without the last chunk, the client knows that the answer is incomplete.
            self._error_answer(handler, error)
            self._transport.abort()
            return
        finally:
            if isinstance(body, AsyncGenerator):
                await body.aclose()
        self._send(b"0\r\n\r\n" if chunked else b"")
        self._transport.set_write_buffer_limits()
        self._next(keep)

    def _send(self, data: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(data)

    def _next(self, keep: bool) -> None:
        """Follows a written answer: goes on to the next request, or ends."""
        missing, self._body, self._task = self._body.missing if self._body else 0, None, None
        if not keep or missing:
            self._end()
            return
        if not self._paused:
            self._wait(IDLE_TIMEOUT)
        self._server.touch(self)
        if self._buffer or self._eof:
            self._server.loop.call_soon(self._advance)

    def _refuse(self, error: HttpError) -> None:
        response = Response.error(error)
        self._send(Handler().head(response, keep=False) + cast(bytes, response.body))
        self._end()

    def _end(self) -> None:
        """Sends no more, but reads on: closing with unread bytes would reset the connection and lose the answer."""
        self._closing, self._buffer = True, bytearray()
        self._wait(SEND_TIMEOUT if self._paused else LINGER_TIMEOUT)
        if self._eof or not self._transport.can_write_eof():
            self._transport.close()
        elif not self._transport.is_closing():
            try:
                self._transport.write_eof()
            except OSError:  # the client is gone, and the loop does not know it yet
                self._transport.abort()
        self._regulate()


class Server:
    """Listens on host and port, and answers each request with a new `handler`."""

    def __init__(self, host: str, port: int, handler: type[Handler] = Handler, share_port: bool = False) -> None:
        self.handler, self.stopping = handler, False
        self.connections: dict[Connection, None] = {}  # in order of the last request, oldest first
        self.loop: asyncio.AbstractEventLoop
        self.over: asyncio.Event
        self._bound = min(MAX_CONNECTIONS, _open_files() - 64)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.socket(family)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, True)
            if share_port:
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, True)
            self._socket.bind((host, port))
        except OSError as error:
            self._socket.close()
            temporary = error.errno in (errno.EADDRINUSE, errno.EADDRNOTAVAIL)
            kind = Unavailable if temporary else Malformed
            raise kind(f"can't listen on {host} port {port}: {error.strerror or error}") from None
        host, port = self._socket.getsockname()[:2]
        self.url = f"http://[{host}]:{port}" if family == socket.AF_INET6 else f"http://{host}:{port}"

    async def run(
        self, ready: Callable[[], None], ended: Callable[[], bool], hangup: Callable[[], None] | None = None,
        ending: Callable[[], None] = lambda: None,
    ) -> None:
        """Serves until SIGTERM, SIGINT or `ended()`; then calls `ending`, and finishes the answers under way."""
        self.loop = asyncio.get_running_loop()
        self.loop.set_exception_handler(
            lambda loop, context: logger.error("network: %s: %r", context.get("message"), context.get("exception")))
        self.over = over = asyncio.Event()
        if threading.current_thread() is threading.main_thread():
            for number in signal.SIGTERM, signal.SIGINT:
                self.loop.add_signal_handler(number, over.set)
            if hangup or signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # `nohup` sets SIG_IGN
                self.loop.add_signal_handler(signal.SIGHUP, hangup or over.set)
        self._tick()
        listener = await self.loop.create_server(lambda: Connection(self), sock=self._socket, backlog=1024)
        ready()
        while not over.is_set() and not ended():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(over.wait(), 0.2)
            self._tick()
        self.stopping = True
        self.loop.remove_reader(self._socket)  # accept no more: a connection accepted during close() would be lost
        for _ in range(5):  # let the loop set up the connections that are accepted already
            await asyncio.sleep(0)
        listener.close()
        ending()
        until = self.loop.time() + DRAIN_TIMEOUT
        while any(connection.answering() for connection in self.connections) and self.loop.time() < until:
            await asyncio.sleep(0.02)
        until = self.loop.time() + LINGER_TIMEOUT
        while self.connections and self.loop.time() < until:
            for connection in list(self.connections):
                connection.abort()
            await asyncio.sleep(0.005)

    def close(self) -> None:
        self._socket.close()

    def _tick(self) -> None:
        now = self.loop.time()
        for connection in [c for c in self.connections if c.deadline < now]:
            connection.expire()

    def enter(self, connection: Connection) -> None:
        """Adds a connection. Beyond the bound, aborts the longest idle one that awaits no answer."""
        self.connections[connection] = None
        if len(self.connections) > self._bound:
            oldest = next((c for c in self.connections if not c.answering()), connection)
            del self.connections[oldest]
            oldest.abort()

    def touch(self, connection: Connection) -> None:
        if self.connections.pop(connection, True) is None:
            self.connections[connection] = None


def _open_files() -> int:
    """Raises this process's limit of open files as far as needed and allowed; returns the new limit."""
    if sys.platform == "win32":
        return 512
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_CONNECTIONS + 64 if hard == resource.RLIM_INFINITY else min(hard, MAX_CONNECTIONS + 64)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    return max(soft, wanted)


# --- Entries as JSON ---------------------------------------------------------------------------------------

def parse_json(data: bytes) -> Any:
    """The value of a JSON text. Objects are tuples of pairs, so that a repeated key is not lost. Raises Malformed."""
    try:
        return _DECODER.decode(data.decode())
    except (ValueError, RecursionError) as error:
        raise Malformed(f"not JSON: {error}"[:200]) from None


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=tuple, parse_constant=_no_constant)  # json.loads makes one per call
json_string = json.encoder.encode_basestring_ascii


def parse_object(value: Any, *names: str) -> dict[str, Any]:
    """The fields of a JSON object from parse_json; raises Malformed if one is repeated or not in `names`."""
    if type(value) is not tuple:
        raise Malformed("not a JSON object")
    fields = dict(value)
    if len(fields) < len(value) or not fields.keys() <= set(names):
        raise Malformed(f"a JSON object with other fields than {', '.join(names)}, or with a repeated one")
    return fields


def entry_from_json(value: Any) -> bytes:
    """The encoded entry for a JSON object from parse_json; raises Malformed."""
    if type(value) is tuple and len(value) == 2:  # fast path for most entries; encode_entry refuses all but strings
        (first, a), (second, b) = value
        if (first, second) == ("filename", "checksum"):
            return encode_entry(a, b)
        if (first, second) == ("checksum", "filename"):
            return encode_entry(b, a)
    fields = parse_object(value, "filename", "checksum", "publisher")
    words: list[Any] = [fields.get("filename"), fields.get("checksum")]
    if (publisher := fields.get("publisher")) is not None:
        fields = parse_object(publisher, "issuer", "subject")
        words += [fields.get("issuer"), fields.get("subject")]
    for word in words:
        if type(word) is not str:
            raise Malformed("filename and checksum, and issuer and subject of a publisher, have to be strings")
    return encode_entry(*words)


def entry_to_json(index: int | None, entry: Entry) -> dict[str, Any]:
    """An entry as JSON, without its index if that is not known yet."""
    value: dict[str, Any] = {} if index is None else {"index": index}
    value |= {"filename": entry.filename, "checksum": entry.checksum}
    return {**value, "publisher": entry.publisher._asdict()} if entry.publisher else value


class Refused(NamedTuple):
    """A line of a bulk that is no entry: its filename ("" if unreadable), and the reason."""
    filename: str
    error: Error


# A line of a bulk as most are, in either order of keys: no publisher, and a filename of plain letters.
_CHECKSUM_LINE = rb'"checksum": ?"(sha256:[0-9a-f]{64})"'
_FILENAME_LINE = rb'"filename": ?"([!#-.0-\[\]-~]{1,255})"'
_PLAIN_LINES = (re.compile(rb"(?m)^\{%b, ?%b\}$" % (_CHECKSUM_LINE, _FILENAME_LINE)),
                re.compile(rb"(?m)^\{%b, ?%b\}$" % (_FILENAME_LINE, _CHECKSUM_LINE)))


def parse_lines(block: bytes) -> list[bytes | Refused]:
    """The encoded entry of each NDJSON line, or Refused for a line that is no entry."""
    block = block.removesuffix(b"\n")
    count, swapped = block.count(b"\n") + 1, block.startswith(b'{"filename"')
    if len(lines := _PLAIN_LINES[swapped].findall(block)) == count:
        entry = b"pypi-transparency/v1\n%b\n%b"
        return [entry % (checksum, name) for name, checksum in lines] if swapped else [entry % line for line in lines]
    # Parsing all lines as one array is much faster than one by one. It gives the same result if every line begins and
    # ends an object (no string can span a newline, and no entry holds an array), and if all of them are entries.
    if block[:1] == b"{" and block[-1:] == b"}" and block.count(b"}\n{") == count - 1:
        with contextlib.suppress(Malformed):
            values = parse_json(b"[%b]" % block.replace(b"\n", b",\n"))
            if len(values) == count:
                return [entry_from_json(value) for value in values]
    results: list[bytes | Refused] = []
    for line in filter(None, map(bytes.strip, block.split(b"\n"))):
        value = None
        try:
            value = parse_json(line)
            results.append(entry_from_json(value))
        except Malformed as error:
            names = [text for name, text in value if name == "filename"] if type(value) is tuple else []
            # Keep a new error without traceback: `error` refers to this frame, and so to `results`. Thousands of such
            # cycles would keep the garbage collector busy, and stop all other work, for seconds.
            results.append(Refused(names[0] if names and type(names[0]) is str else "", Malformed(str(error))))
    return results


def slices(block: bytes) -> Iterator[bytes]:
    """Splits `block` into runs of whole lines, of about 64 KiB, or 4 KiB where lines are too short to be entries."""
    at = 0
    while at < len(block):
        size = 1 << 16 if block.count(b"\n", at, at + (1 << 16)) < 1024 else 1 << 12
        end = block.find(b"\n", at + size)
        end = len(block) if end < 0 else end
        yield block[at:end]
        at = end + 1


# --- The client ----------------------------------------------------------------------------------------------

class _Timed(io.RawIOBase):
    """Reads a socket until one deadline. A socket's own time-out would begin anew with every byte received."""

    def __init__(self, sock: socket.socket, deadline: float, file: io.BufferedIOBase) -> None:
        self.sock, self.deadline, self._file = sock, deadline, file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if (left := self.deadline - time.monotonic()) <= 0:
            raise TimeoutError("no complete answer in time")
        self.sock.settimeout(left)
        return self.sock.recv_into(buffer)

    def close(self) -> None:
        self._file.close()  # releases the socket
        super().close()


class _TimedResponse(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self._timed = _Timed(sock, time.monotonic() + (sock.gettimeout() or 0), self.fp)
        self.fp: io.BufferedReader = io.BufferedReader(self._timed)

    def renew(self, seconds: float) -> None:
        """Gives what is still to come this much time."""
        self._timed.deadline = time.monotonic() + seconds

    def abort(self) -> None:
        """Ends what another thread is waiting for."""
        with contextlib.suppress(OSError):
            self._timed.sock.shutdown(socket.SHUT_RDWR)


UNCHANGED = 304  # RFC 9110 section 15.4.5


class TimedOut(Unavailable):
    """No answer came in time."""


class TooLarge(Unavailable):
    """An answer is larger than its limit."""


class Unreachable(Unavailable):
    """The server has failed too often: no more requests are sent to it."""


class Answered(NamedTuple):
    """What an answer said beside its body: its status; where it redirects to; and its ETag or else its Last-Modified,
    by which a later request asks if it is still so (RFC 9110 section 13.1). "" for what was not said."""
    status: int = 0
    location: str = ""
    validator: str = ""
    serial: str = ""  # of an index: the number of the last change that the answer has
    caching: str = ""  # Cache-Control
    encoding: str = ""  # Content-Encoding

    @property
    def redirects(self) -> bool:
        return self.status != UNCHANGED and 300 <= self.status < 400


class Client:
    """An HTTP client of the server at `url`, with one connection that it keeps. Raises Unavailable."""

    def __init__(self, url: str, timeout: float = 30) -> None:
        try:
            parts = urllib.parse.urlsplit(url)
            host = (parts.hostname or "").encode("idna").decode() or "?"
            plain = re.fullmatch("[!-~]*", parts.path) and not (parts.query or parts.fragment)
            if parts.scheme not in ("http", "https") or not parts.hostname or not plain:
                raise ValueError("it has to be http:// or https://, a host, and perhaps a port and a path")
            if "@" in parts.netloc:
                url = "***"
                raise ValueError("user names and passwords can't be in it: those of an index can be in a netrc file")
            make = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
            self._connection = make(host, parts.port)
            self._connection.response_class = _TimedResponse
        except (ValueError, http.client.InvalidURL) as error:
            raise Malformed(f"not the URL of a server: {url!r}: {error}") from None
        self.url, self._prefix, self.timeout = url.rstrip("/"), parts.path.rstrip("/"), timeout
        self._socket: socket.socket
        self._aborted = False
        self.last = Answered()

    def request(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None,
        limit: int = MAX_ANSWER,
    ) -> tuple[int, str, bytes]:
        """The status, content type and body of the answer. Does not follow redirects: one would lose a POST's body."""
        # tlog-tiles: "Clients SHOULD include `gzip` and `identity` in their `Accept-Encoding` headers."
        fields = {"User-Agent": f"btlog/{__version__}", "Accept-Encoding": "gzip, identity", **(headers or {})}
        for attempt in (1, 2):
            fresh = self._connection.sock is None
            try:
                if fresh:
                    self._connection.timeout = min(self.timeout, CONNECT_TIMEOUT)
                    self._connection.connect()
                self._socket = self._connection.sock  # for abort(): http.client may drop it before the body is read
                self._socket.settimeout(self.timeout)
                self._connection.request(method, self._prefix + path, body, fields)
                answer = self._connection.getresponse()
                data = answer.read(limit + 1)
                if answer.length and len(data) <= limit:
                    raise http.client.IncompleteRead(data, answer.length)
                break
            except (OSError, http.client.HTTPException, ValueError) as error:
                self._connection.close()
                # The server may have closed a kept connection. Sending again is safe: all requests are idempotent.
                if fresh or attempt == 2 or self._aborted or isinstance(error, TimeoutError):
                    reason = str(error) or type(error).__name__
                    kind = TimedOut if isinstance(error, TimeoutError) else Unavailable
                    raise kind(f"{self.url}{path[:80]} is not reached: {reason}") from None
        if len(data) > limit:
            self._connection.close()
            raise TooLarge(f"{self.url}{path[:80]}: an answer of more than {limit} bytes")
        if answer.getheader("Content-Encoding") == "gzip":
            data = _unzip(data, limit)
        names = "Location", "ETag", "Last-Modified", "X-PyPI-Last-Serial", "Cache-Control", "Content-Encoding"
        location, etag, changed, *more = (answer.getheader(name, "") for name in names)
        self.last = Answered(answer.status, location, etag or changed, *more)
        return answer.status, answer.getheader("Content-Type", ""), data

    def get(self, path: str) -> bytes:
        """The body of the answer; raises Unavailable unless it is 200."""
        status, _, data = self.request("GET", path)
        if status != 200:
            raise Unavailable(f"{self.url}{path} answers {status}: {error_message(data)}")
        return data

    @property
    def connected(self) -> bool:
        """True if the connection is kept for the next request."""
        return self._connection.sock is not None

    def abort(self) -> None:
        """Interrupts a request that another thread waits for."""
        self._aborted = True
        with contextlib.suppress(OSError, AttributeError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._connection.close()


def _unzip(data: bytes, limit: int) -> bytes:
    inflater = zlib.decompressobj(31)
    try:
        plain = inflater.decompress(data, limit + 1)
    except zlib.error as error:
        raise Unavailable(f"an answer that is not gzip: {error}") from None
    if not inflater.eof or len(plain) > limit:
        raise TooLarge(f"an answer that is cut off or larger than {limit} bytes")
    return plain


def error_message(data: bytes) -> str:
    """The message in the body of an error answer, at most 300 bytes, as one printable line."""
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(data)
        if isinstance(value, dict) and isinstance(value.get("error"), str):
            data = value["error"].encode(errors="replace")
    return printable(data[:300].decode(errors="replace"))


class Stopped(Error):
    """This process was asked to end."""


ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


class Fetcher:
    """Fetches paths below `url` from a log or an index, in several threads. Each thread keeps its own connections.

    Of several URLs that have the same, the next one is asked for what one does not give, and becomes the first.
    """

    THREADS, WINDOW = 8, 16

    def __init__(
        self, urls: str | Sequence[str], attempts: int = 5, timeout: float = 30, give_up: int = 0,
        patience: float | None = None,
    ) -> None:
        """Tries each path up to `attempts` times. `timeout` is for one answer, `patience` for all together (seconds).
        With `give_up`, stops asking after that many failures in a row, or after one before any answer."""
        self._urls = [Client(url).url for url in ([urls] if isinstance(urls, str) else urls)]
        self.url, self._attempts, self._timeout = self._urls[0], attempts, timeout
        self._give_up, self._until = give_up, math.inf if patience is None else time.monotonic() + patience
        self._failures, self._answered, self._lost = 0, False, ""
        self._local, self._clients = threading.local(), list[Client]()
        self._pool = concurrent.futures.ThreadPoolExecutor(self.THREADS, "reader")
        self._closed = threading.Event()

    def fetch(
        self, path: str, headers: dict[str, str] | None = None, limit: int = MAX_ANSWER, missing: tuple[int, ...] = ()
    ) -> tuple[str, bytes] | None:
        """The content type and body; None for status 404, 410 or one of `missing`. Raises Unavailable after all tries.

        Does not follow redirects: see `redirected`.
        """
        error: Unavailable | None = Unavailable(f"{self.url} is not asked")
        for attempt in range(self._attempts):
            found, error = self._fetch(path, headers, limit, (404, 410, *missing), (self.url, *self._urls))
            if error is None:
                return found
            if isinstance(error, (TimedOut, TooLarge)):
                break
            if attempt + 1 < self._attempts:
                self._closed.wait(0.2 * 2**attempt)
        if self._closed.is_set():
            raise Stopped("the connections are closed")
        self._failures += not isinstance(error, TooLarge)
        if self._give_up and self._failures >= (self._give_up if self._answered else 1):
            self._lost = self._lost or str(error).replace(path[:80], "", 1)
            raise Unreachable(self._lost)
        raise error or Unavailable(f"{self.url} is not asked")

    def _fetch(
        self, path: str, headers: dict[str, str] | None, limit: int, missing: Collection[int], urls: Iterable[str]
    ) -> tuple[tuple[str, bytes] | None, Unavailable | None]:
        """What `fetch` returns, from the first of `urls` that has it, or why none answered; raises what is final."""
        errors, lacking = list[Unavailable](), False
        for url in dict.fromkeys(urls):
            if self._closed.is_set():
                raise Stopped("the connections are closed")
            if self._lost:
                raise Unreachable(self._lost)
            try:
                status, kind, data = self._client(url).request("GET", path, None, headers, limit)
            except Unavailable as trouble:
                errors.append(trouble)
            else:
                if status == 200 or status in missing:
                    self._failures, self._answered, lacking = 0, True, True
                    if status == 200:
                        self.url = url  # also for what is asked next
                        return (kind, data), None
                    continue
                who = " (give a name and a password by a netrc file)" if status == 401 else ""
                error = Unavailable(f"{url}{path[:80]} answers {status}{who}: {error_message(data)}")
                if status != 429 and status < 500 and len(self._urls) == 1:
                    self._failures, self._answered = 0, True  # the server is up, and trying again won't help
                    raise error
                errors.append(error)
        return None, None if lacking or not errors else errors[-1]

    def again(self) -> None:
        """Asks the server again, even if it was given up."""
        self._failures, self._answered, self._lost = 0, True, ""

    @property
    def last(self) -> Answered:
        """What the last answer to this thread said."""
        client: Client = self._local.client
        return client.last

    def note_serial(self, serial: str) -> None:
        """Takes what the body of the last answer to this thread says for its serial number, if its head had none."""
        client: Client = self._local.client
        client.last = client.last._replace(serial=client.last.serial or serial)

    def redirected(self, path: str) -> str:
        """The path that the last answer for `path` redirects to; "" unless that is below `url`, too."""
        location = self.last.location if self.last.redirects else ""
        try:
            target = urllib.parse.urlsplit(urllib.parse.urljoin(f"{self.url}{path}", location))
            base = urllib.parse.urlsplit(self.url)
        except ValueError:
            return ""
        below = target.path.startswith(f"{base.path}/") and re.fullmatch("[!-~]*", target.path + target.query)
        if not location or (target.scheme, target.netloc) != (base.scheme, base.netloc) or not below:
            return ""
        return target.path.removeprefix(base.path) + (f"?{target.query}" if target.query else "")

    def _client(self, url: str) -> Client:
        """This thread's client of a URL. Its time-out is cut to what is left of `patience`."""
        clients: dict[str, Client] = self._local.__dict__.setdefault("clients", {})
        if url not in clients:
            clients[url] = Client(url, self._timeout)
            self._clients.append(clients[url])
        client = self._local.client = clients[url]
        client.timeout = max(min(self._timeout, self._until - time.monotonic()), 0.001)
        return client

    def get(self, path: str, limit: int = MAX_ANSWER) -> bytes:
        if not (answer := self.fetch(path, None, limit)):
            raise Unavailable(f"{self.url}{path} is not there")
        return answer[1]

    def each(self, do: Callable[[ItemT], ResultT], items: Iterable[ItemT]) -> Iterator[ResultT]:
        """Yields do(item) for each item, in order. The next WINDOW items are worked on meanwhile, in other threads."""
        waiting: deque[concurrent.futures.Future[ResultT]] = deque()
        try:
            for item in items:
                waiting.append(self._pool.submit(do, item))
                if len(waiting) >= self.WINDOW:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except (concurrent.futures.CancelledError, RuntimeError):
            if self._closed.is_set():
                raise Stopped("the connections are closed") from None
            raise

    def close(self) -> None:
        self._closed.set()
        self._pool.shutdown(wait=False, cancel_futures=True)
        for client in self._clients:
            client.abort()
        self._pool.shutdown()
        for client in self._clients:
            client.close()


class LogReader(Fetcher):
    """Reads the tiles and entry bundles of a log. It checks none of them against a root: the caller has to."""

    def checkpoint(self, size: int = 0) -> bytes:
        """The served checkpoint. Of several URLs, the first one's that is of `size` or more; else the largest.

        A mirror may be behind the log: that is no fault of the log, as long as another URL has what was there before.
        """
        notes = list[tuple[int, bytes]]()
        for url in dict.fromkeys((self.url, *self._urls)) if len(self._urls) > 1 else ():
            found, _ = self._fetch("/checkpoint", None, MAX_NOTE, (404, 410), [url])
            if found:
                try:
                    notes.append((Checkpoint.parse(split_note(found[1])[0]).tree.size, found[1]))
                except Malformed:
                    return found[1]  # whoever verifies it will say what is wrong
                if notes[-1][0] >= size:
                    break
        return max(notes)[1] if notes else self.get("/checkpoint", MAX_NOTE)

    def tile(self, level: int | None, index: int, width: int, limit: int = MAX_BUNDLE) -> tuple[bytes, bool]:
        """A tile, or the entry bundle if `level` is None; and True if it is full although `width` asks for a part."""
        limit = limit if level is None else MAX_HEAD  # larger than a tile, to have room for an error page
        # Object stores may answer 403 for a missing file.
        if width < 256 and (partial := self.fetch(f"/{tile_path(level, index, width)}", None, limit, (403,))):
            return partial[1], False
        # "MAY fetch the full tile … as a fallback in case the partial tile is not available anymore"
        return self.get(f"/{tile_path(level, index)}", limit), width < 256

    def hashes(self, level: int, index: int, width: int) -> bytes:
        """The first `width` hashes of a tile (32 bytes each), not checked yet."""
        data, full = self.tile(level, index, width)
        return data[: 32 * width] if full else data

    def entries(self, index: int, width: int, limit: int = MAX_BUNDLE) -> tuple[bytes, list[bytes] | None]:
        """A bundle as served, and its first `width` entries; None for these if it is no bundle of the right size."""
        data, full = self.tile(None, index, width, limit)
        with contextlib.suppress(Malformed):
            entries = split_bundle(data)
            if len(entries) == (256 if full else width):
                return data, entries[:width]
        return data, None


# --- Metrics -------------------------------------------------------------------------------------------------

class Latency:
    """The times of successful requests and the count of failures, for the status (as bt-log's) and for Prometheus."""

    BOUNDS = 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30  # seconds

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.count = self.failures = 0
        self.last = self.total = self.least = self.most = self.rate = 0.0  # milliseconds; rate: entries a second
        self._buckets, self._seconds = [0] * (len(self.BOUNDS) + 1), 0.0  # these count requests, not entries

    def add(self, seconds: float, entries: int = 1, failures: int = 0) -> None:
        with self._lock:
            self.failures += failures
            if entries:
                self.count += entries
                self.last = seconds * 1000
                self.total += self.last * entries
                self.least = min(self.least or self.last, self.last)
                self.most = max(self.most, self.last)
                self.rate = entries / seconds if seconds else 0.0
                self._buckets[bisect.bisect_left(self.BOUNDS, seconds)] += 1
                self._seconds += seconds

    def json(self) -> dict[str, float]:
        with self._lock:
            average = self.total / self.count if self.count else 0.0
            names = ("count", "failures", "last_ms", "average_ms", "min_ms", "max_ms", "throughput_per_second")
            values = (self.count, self.failures, self.last, average, self.least, self.most, self.rate)
            return dict(zip(names, (round(value, 3) for value in values), strict=True))

    def samples(self, **labels: str) -> Iterator[Sample]:
        """The samples of a Prometheus histogram."""
        with self._lock:
            counts = list(itertools.accumulate(self._buckets))
            for bound, count in zip((*map(str, self.BOUNDS), "+Inf"), counts, strict=True):
                yield "_bucket", {**labels, "le": bound}, count
            yield "_sum", labels, self._seconds
            yield "_count", labels, counts[-1]


Sample = tuple[str, dict[str, str], float]  # the suffix of the metric's name, the labels, the value


def metric(name: str, kind: str, help_text: str, samples: Iterable[Sample]) -> str:
    """A metric in the text format of Prometheus."""
    lines = [f"# HELP {name} {help_text}\n# TYPE {name} {kind}\n"]
    for suffix, labels, value in samples:
        pairs = ",".join(f"{label}={prometheus_string(text)}" for label, text in labels.items())
        lines.append(f"{name}{suffix}{f'{{{pairs}}}' if pairs else ''} {value}\n")
    return "".join(lines)


def prometheus_string(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


METRICS = "text/plain; version=0.0.4; charset=utf-8"


# --- The log: the sequencer, a state machine ---------------------------------------------------------------
# It decides what a log does next, without I/O: no lock, thread, clock or database. Methods report events to it. `next`
# returns the one action to do now, and `Log` below does it. An entry passes through these steps:
#
#   submit -> Commit -> done -> Ask -> cosigned, until the quorum is met -> Publish -> done -> Answer
#
# Without witnesses, a Commit also publishes. A Commit takes what waits, to about MAX_BATCH. While it is under way, and
# while witnesses are asked, the next batch grows.

@dataclass(frozen=True)
class SignedNote:
    """A signed checkpoint: its note, its tree, and the note as a JSON string of base64."""
    note: bytes
    tree: Tree
    json: bytes

    @classmethod
    def of(cls, note: bytes) -> SignedNote:
        return cls(note, Checkpoint.parse(split_note(note)[0]).tree, b'"%b"' % b64(note))


class Submission:
    """Entries to be logged. The Answer sets `published`, and `outcomes` and (with `prove`) `proofs` for that tree."""

    def __init__(self, entries: list[bytes], prove: bool) -> None:
        self.entries, self.prove = entries, prove
        self.outcomes: list[Outcome] = []
        self.proofs: dict[int, bytes] = {}
        self.published: SignedNote
        self.error = ""  # why it was not published
        self.given_up = False  # the client has timed out: no answer is needed
        self.waiter: asyncio.Future[None] | None = None


@dataclass
class CosigningRound:
    """A signed checkpoint that all witnesses are asked to cosign, and their answers so far."""
    signed: SignedNote
    begun: float
    deadline: float
    lines: dict[VerifierKey, str] = field(default_factory=dict)
    errors: dict[VerifierKey, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Commit:
    """Append the new entries of these submissions, and sign the new tree, in one transaction."""
    batch: list[Submission]


@dataclass(frozen=True)
class Ask:
    """Ask all witnesses to cosign."""
    round: CosigningRound


@dataclass(frozen=True)
class Publish:
    """Store the checkpoint as published, and the size that each witness has cosigned."""
    checkpoint: SignedNote
    sizes: dict[VerifierKey, int]
    begun: float  # when the witnesses were asked
    round: CosigningRound


@dataclass(frozen=True)
class Answer:
    """Tell the clients that the published tree includes their entries; with an error, that they can't rely on that."""
    submissions: list[Submission]
    error: str = ""


@dataclass(frozen=True)
class Probe:
    """Test if the database accepts writes again."""


@dataclass(frozen=True)
class Halt:
    """Sign nothing more. With `fatal`, serve nothing either: it is unknown what the database holds."""
    message: str
    fatal: bool


Action = Commit | Ask | Publish | Answer | Probe | Halt


@dataclass(frozen=True)
class LogOptions:
    """The options of a log; times in seconds."""
    replace: bool = False  # a logged filename may be logged again with another checksum
    add_timeout: float = 30
    checkpoint_interval: float = 0.2  # how long a small batch may wait, after a round, for more entries
    witness_timeout: float = 5
    republish_interval: float = 3600  # an idle log has its checkpoint cosigned again after this time; 0 for never


class Sequencer:
    """The state of a log that signs. All times are seconds of a monotonic clock."""

    def __init__(
        self, signed: SignedNote, published: SignedNote | None, policy: Policy, witnesses: Collection[VerifierKey],
        options: LogOptions,
    ) -> None:
        self.signed, self.published = signed, published
        self._policy, self._witnesses, self._options = policy, witnesses, options
        self._counted = set(policy.quorum.leaves()) & set(witnesses)
        self.queue, self.weight = deque[Submission](), 0  # submissions, and the sum of their entries
        self.unpublished: list[Submission] = []  # committed, but not published yet
        self.round: CosigningRound | None = None
        self._last: CosigningRound | None = None  # the published one; `_shown`: how many of its cosignatures are
        self._shown = 0
        self._doing: Commit | Publish | Probe | None = None  # the action under way: its outcome is not reported yet
        self._todo = deque[Ask | Answer | Halt]()
        # Sign nothing until the last checkpoint is cosigned again: a witness may know a newer one that this log lost.
        self.agreed = not witnesses
        self._earliest = self._due = 0.0  # small batches wait until the first; at the second, all is cosigned again
        self._last_weight = 1  # entries of the last Commit: once as many wait again, `_earliest` does not count
        self._backoff, self._pause = 0.1, 0.05  # before the next try: after a missed quorum, after a failed commit
        self._again, self._refusals = 0.0, 0  # when to try the disk again, and how often in a row it has refused
        self._quorum_trouble = self._disk_trouble = self._halt_reason = ""  # of a round, of a commit, for good
        self.stopping = self.over = False

    @property
    def trouble(self) -> str:
        """Why nothing can be published now; "" if it can."""
        return self._halt_reason or self._disk_trouble or self._quorum_trouble

    # Events

    def submit(self, submission: Submission) -> None:
        """Queues entries to be logged; raises Unavailable while the log can't take them."""
        if self._refusals >= MAX_REFUSALS or self.stopping or self.weight > MAX_WAITING:
            busy = "the server is shutting down" if self.stopping else "too much is waiting"
            raise Unavailable(self.trouble or busy)
        self.queue.append(submission)
        self.weight += len(submission.entries)

    def give_up(self, submission: Submission) -> None:
        """The client no longer waits: takes the submission out of the queue, if it is still there."""
        submission.given_up = True
        if submission in self.queue:
            self.queue.remove(submission)
            self.weight -= len(submission.entries)

    def done(self, now: float, signed: SignedNote | None = None) -> None:
        """The action from `next` is done. `signed` is the new checkpoint of a Commit that had new entries."""
        action, self._doing = self._doing, None
        self._disk_trouble, self._refusals, self._pause = "", 0, 0.05
        if isinstance(action, Commit):
            self.signed = signed or self.signed
            self.unpublished += [submission for submission in action.batch if not submission.given_up]
            if not self._witnesses:
                self._set_published(self.signed)
            elif not self.stopping:
                self._ask(now)
        elif isinstance(action, Publish):
            self._quorum_trouble, self._backoff = "", 0.1
            # Under load, the clients that were just answered send their next entries. Waiting for these, for as long as
            # a round takes, makes larger batches. A single client does not wait: see `_last_weight`.
            self._earliest = now + min(self._options.checkpoint_interval, now - action.begun)
            idle = max(self._options.republish_interval, self._options.checkpoint_interval)
            self._due = now + idle if self._options.republish_interval else math.inf
            self._last, self._shown = action.round, len(action.sizes)
            self._set_published(action.checkpoint)

    def refused(self, now: float, error: str) -> None:
        """The action from `next` failed, and changed nothing."""
        action, self._doing = self._doing, None
        if isinstance(action, Publish):
            self._miss(now, error)
            return
        if isinstance(action, Commit):
            retried = [submission for submission in action.batch if not submission.given_up]
            self.queue.extendleft(reversed(retried))
            self.weight += sum(len(submission.entries) for submission in retried)
            self._refusals += 1
        self._disk_trouble, self._again = error, now + self._pause
        self._pause = min(2 * self._pause, 2.0)

    def outcome_unknown(self, error: str) -> None:
        """The outcome of the action from `next` is unknown. The next start finds out, by reading the database."""
        action, self._doing = self._doing, None
        self.halt(error, fatal=True)
        if isinstance(action, Commit):
            self._todo.append(Answer(action.batch, error))

    def halt(self, message: str, fatal: bool = False) -> None:
        """Ends signing for good, because of `message`."""
        if not self._halt_reason:
            self._halt_reason = message
            self._todo.append(Halt(message, fatal))
        self.stopping = True

    def cosigned(self, round_: CosigningRound, key: VerifierKey, line: str) -> None:
        round_.lines[key] = line

    def declined(self, round_: CosigningRound, key: VerifierKey, error: str) -> None:
        round_.errors[key] = error

    def stop(self) -> None:
        """Ends the sequencer, once the action under way is done."""
        self.stopping = True

    # Actions

    def next(self, now: float) -> Action | None:
        """The action to do now; None if there is none before the next event, or before `wake_at`."""
        if self._todo:
            return self._todo.popleft()
        if self.round and not self._doing:
            self._close_round(self.round, now)
            if isinstance(self._doing, Publish):
                return self._doing
        if self._doing or self.round or self.over:
            return None
        if self.stopping:
            self.over = True
            left = [*self.queue, *self.unpublished]
            return Answer(left, self.trouble or "the server is shutting down")
        if self._disk_trouble and (not self.queue or (self.agreed and now < self._again)):
            self._doing = Probe() if now >= self._again else None
        elif self.queue and self._may_commit(now):
            self._doing = Commit(self._next_batch())
        elif self._witnesses and now >= self._due:
            self._ask(now)
            return self._todo.popleft()
        elif self._last and len(self._last.lines) > self._shown and self._last.signed.tree == self.signed.tree:
            self._doing = self._publish(self._last, now)  # with what witnesses have answered after the quorum was met
        return self._doing

    def wake_at(self) -> float:
        """When to call `next` again if no event comes before."""
        ready = self.queue and self.agreed
        if self.round or (self._disk_trouble and (ready or not self.queue)):
            return self.round.deadline if self.round else self._again
        return min(self._due, self._earliest if ready else math.inf) if self._witnesses else math.inf

    def _may_commit(self, now: float) -> bool:
        enough = self.weight >= min(self._last_weight, MAX_BATCH) or self._disk_trouble
        return self.agreed and (not self._witnesses or bool(enough) or now >= self._earliest)

    def _next_batch(self) -> list[Submission]:
        """Takes the next batch from the queue: all that waits, up to about MAX_BATCH entries."""
        self._last_weight, batch, weight = self.weight, list[Submission](), 0
        while self.queue and weight < MAX_BATCH:
            batch.append(self.queue.popleft())
            weight += len(batch[-1].entries)
        self.weight -= weight
        return batch

    def _ask(self, now: float) -> None:
        self.round = CosigningRound(self.signed, now, now + self._options.witness_timeout + 0.5)
        self._todo.append(Ask(self.round))

    def _close_round(self, round_: CosigningRound, now: float) -> None:
        """Publishes once the quorum is met. A first round waits for all that count: any may know a newer checkpoint."""
        met = self._policy.quorum.met(round_.lines)
        heard = self._counted <= round_.lines.keys() | round_.errors.keys()
        if not (heard or now >= round_.deadline or self.stopping or (met and self.agreed)):
            return
        self.round, self.agreed = None, self.agreed or met
        if not met or self._halt_reason:
            silent = (f"{key.name} {round_.errors.get(key, 'has not answered yet')}"
                      for key in self._witnesses if key not in round_.lines)
            self._miss(now, f"the quorum of witnesses is missed; dark: {', '.join(silent)}")
            return
        self._doing = self._publish(round_, round_.begun)

    def _publish(self, round_: CosigningRound, begun: float) -> Publish:
        lines = [round_.lines[key] for key in self._policy.witnesses if key in round_.lines]
        checkpoint = SignedNote.of(round_.signed.note + "".join(lines).encode())
        return Publish(checkpoint, dict.fromkeys(round_.lines, checkpoint.tree.size), begun, round_)

    def _miss(self, now: float, why: str) -> None:
        """Publishing failed. The committed entries stay, and the witnesses are asked again later."""
        self.unpublished = [submission for submission in self.unpublished if not submission.given_up]
        self._quorum_trouble, self._due = why, now + self._backoff
        self._backoff = min(2 * self._backoff, 2.0)

    def _set_published(self, checkpoint: SignedNote) -> None:
        """All that is committed is in the published tree: nothing is committed while witnesses are asked."""
        self.published = checkpoint
        if included := [submission for submission in self.unpublished if not submission.given_up]:
            self._todo.append(Answer(included))
        self.unpublished = []


# --- The log: its witnesses ----------------------------------------------------------------------------------
# A bad witness can do little harm. It can withhold its cosignature, which matters only if the quorum needs it, and it
# can delay a start by --witness-timeout. To stop the log, it has to show a checkpoint that is signed with this log's
# own key and that this log does not have. Without that key, no witness can make one.

class LogBehindWitness(Error):
    """A witness shows a checkpoint with this log's signature that this log does not have."""


class UnprovenClaim(Error):
    """A witness claims a newer or other checkpoint than this log has, but does not show one."""


class WitnessClient:
    """Asks one witness to cosign, with all `keys` that the policy has for its URL.

    It runs in its own thread, so that a slow witness delays no other.
    """

    def __init__(self, keys: Sequence[VerifierKey], url: str, size: int, timeout: float, log: Log) -> None:
        self.keys, self.url, self.size, self._log = keys, url, size, log
        self.name = keys[0].name
        self.dark_since, self.error, self.cosigned = 0.0, "", 0  # times in seconds; `error`: why it is dark
        self.latency = Latency()
        self._wake = threading.Condition()
        self._next: CosigningRound | None = None
        self._over = False
        self._client = Client(url, timeout)
        threading.Thread(target=self._run, name=f"witness {self.name}", daemon=True).start()

    def ask(self, round_: CosigningRound) -> None:
        """Asks for a cosignature, after the answer to the last request. A round that still waits is replaced."""
        with self._wake:
            self._next = round_
            self._wake.notify()

    def status(self) -> dict[str, Any]:
        dark, cosigned = (utc(seconds) if seconds else None for seconds in (self.dark_since, self.cosigned))
        return {"name": self.name, "url": self.url, "size": self.size, "last_cosigned": cosigned,
                "dark_since": dark, "error": self.error}

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._next or self._over)
                if self._over or self._next is None:
                    break
                round_, self._next = self._next, None
            self._attend(round_)
        self._client.close()

    def stop(self) -> None:
        """Ends its thread, after the answer to the last request."""
        with self._wake:
            self._over = True
            self._wake.notify()

    def _attend(self, round_: CosigningRound) -> None:
        """Asks for a cosignature now, and tells the log what came of it."""
        start = time.monotonic()
        try:
            lines = self._ask(round_)
        except LogBehindWitness as error:
            self._log.tell(Sequencer.halt, str(error))
        except Error as error:
            self._decline(round_, str(error))
        except Exception:
            logger.exception("witness %s: internal error", self.name)
            self._decline(round_, "internal error")
        else:
            self.latency.add(time.monotonic() - start)
            self._cosign(round_, lines)

    def _cosign(self, round_: CosigningRound, lines: dict[VerifierKey, str]) -> None:
        if self.dark_since:
            logger.info("witness %s answers again", self.name)
        self.dark_since, self.error = 0.0, ""
        self.cosigned, self.size = int(time.time()), round_.signed.tree.size
        for key in self.keys:
            if key in lines:
                self._log.tell(Sequencer.cosigned, round_, key, lines[key])
            else:
                self._log.tell(Sequencer.declined, round_, key, f"does not cosign with its key {key.key_id.hex()}")

    def _decline(self, round_: CosigningRound, error: str) -> None:
        self.latency.add(0, 0, 1)
        if error != self.error:
            logger.warning("witness %s: %s", self.name, error)
        self.dark_since, self.error = self.dark_since or time.time(), error
        for key in self.keys:
            self._log.tell(Sequencer.declined, round_, key, f"since {utc(self.dark_since)} ({error})")

    def _ask(self, round_: CosigningRound) -> dict[VerifierKey, str]:
        """The lines of the witness's cosignatures; raises Error, or LogBehindWitness if this log must stop."""
        note, tree = round_.signed.note, round_.signed.tree
        old = min(self.size, tree.size)
        for _ in range(3):  # a 409 tells the size to prove from; a witness that goes on with them is faulty
            request = AddCheckpoint(old, tuple(prove_consistency(self._log.tiles(tree), old)), note).encode()
            status, _, answer = self._client.request("POST", "/add-checkpoint", request, {}, MAX_ADD_CHECKPOINT)
            if status == 200:
                return take_cosignatures(split_note(note)[0], answer, self.keys)
            if status == 422:  # the proof is right for our tree: the witness must have another one
                raise self._judge(f"refuses the proof from size {old} to {tree.size}")
            if status != 409:
                raise Unavailable(f"{self.url} answers {status}: {error_message(answer)}")
            old = parse_decimal(answer.decode(errors="replace").removesuffix("\n"))
            if old > self._log.signed.tree.size:
                raise self._judge(f"has cosigned size {old}")
            if old > tree.size:  # someone else has shown it a newer checkpoint of this log
                self.size = old
                raise Unavailable(f"has cosigned size {old} already")
        raise Unavailable(f"{self.url} answers 409 again and again")

    def _judge(self, claim: str) -> Error:
        """LogBehindWitness if the witness shows a checkpoint that this log does not have; else UnprovenClaim."""
        name = hashlib.sha256(self._log.key.name.encode()).hexdigest()
        status, _, note = self._client.request("GET", f"/{name}/checkpoint", None, {}, MAX_ADD_CHECKPOINT)
        ours = self._log.signed.tree  # read after the answer: meanwhile the log may have grown, and the witness seen it
        context = f"the witness {self.name} {claim}, and this log has size {ours.size}"
        try:
            theirs = open_checkpoint(note, simple_policy([self._log.key])).tree if status == 200 else ours
            same = theirs.size <= ours.size and self._log.tiles(ours).hash(0, theirs.size) == theirs.root
        except Error:
            same = True
        if same:
            return UnprovenClaim(f"{context}; it does not show that")
        return LogBehindWitness(
            f"{context}. Either this folder is an old backup, or the log runs twice, or its key was stolen. It signs "
            f"nothing more, since that would be a second history. The witness shows a checkpoint of size {theirs.size} "
            f"with this log's signature: bring back the folder that has it, or begin a new log."
        )


# --- The log: what it stores and serves ------------------------------------------------------------------------

class Log:
    """A log: its store, its sequencer, and the thread that does the sequencer's actions."""

    def __init__(
        self, store: LogStore, signer: Signer | None, policy: Policy, options: LogOptions, second: Signer | None = None
    ) -> None:
        """Opens a log. Only one process may open it with a `signer`. Raises Corrupt, Unavailable, Malformed.

        The ML-DSA-44 key of a `second` signer signs all checkpoints as well.
        """
        self.store, self.options, self._signer, self.second = store, options, signer, second
        if (key := store.key()) is None:
            raise Corrupt(f"{store.folder} is not the store of a log yet")
        if store.setting("stored") is not None and (signer or not store.checkpoint("published")):
            raise Unavailable(f"{store.folder} is the mirror of a part of its log: run `monitor` until it has all")
        self.key, self._cache = key, Cache(208)  # room for the tiles of a bulk, and some above them
        self._policy = dataclasses.replace(policy, logs=(key,))
        signed = self._open("signed")
        with store.database.snapshot():  # another process may write at the same time
            store.check_last_part()
        published: SignedNote | None = self._open("published")
        witnesses = self._witness_urls() if signer else {}
        if signer and not witnesses and published != signed:  # its policy no longer has witnesses
            store.publish(signed.note, {})
            published = signed
        published = published if published and self._accepts(published.note) else None
        self.failed = threading.Event()  # set for good once memory may differ from the disk: only a restart helps
        self.publishing = Latency()  # from the Commit of entries to their Answer
        self.sequencer = Sequencer(signed, published, self._policy, witnesses, options)
        self._wake, self._begun, self._reported = threading.Condition(), 0.0, ""
        self._thread = threading.Thread(target=self._run, name="sequencer", daemon=True)
        sizes = store.witnessed()
        self.witnesses = [
            WitnessClient(keys, url, min(max(sizes.get(key, 0) for key in keys), signed.tree.size),
                          options.witness_timeout, self)
            for url in dict.fromkeys(witnesses.values())
            for keys in [[key for key, place in witnesses.items() if place == url]]
        ]

    def _open(self, kind: str) -> SignedNote:
        """The stored "signed" or "published" checkpoint; raises Corrupt unless its signature and tiles match."""
        try:
            note = self.store.checkpoint(kind) or b""
            tree = self.store.open(note, self.key).tree
            if Tiles(tree.size, self.store.tile).hash(0, tree.size) != tree.root:
                raise Corrupt(f"the tiles do not lead to the root of the tree of size {tree.size}")
        except Error as error:
            raise Corrupt(f"{self.store.folder} is corrupt: {kind} checkpoint: {error}") from None
        return SignedNote.of(note)

    def _accepts(self, note: bytes) -> bool:
        try:
            open_checkpoint(note, self._policy)
        except BadSignature:
            return False
        return True

    def _witness_urls(self) -> dict[VerifierKey, str]:
        """The URLs of the witnesses that can be asked; raises Malformed if these can't meet the quorum.

        Those outside of the quorum are asked, too: nobody waits for them, and their cosignatures are published.
        """
        urls = dict(self._policy.urls)
        reached = {key: urls[key] for key in self._policy.witnesses if key in urls}
        if len(reached) > MAX_WITNESSES:
            raise Malformed(f"a checkpoint has no room for the cosignatures of more than {MAX_WITNESSES} witnesses")
        if not self._policy.quorum.met(reached):
            raise Malformed("the policy's quorum can't be met by the witnesses whose URLs it names")
        return reached

    @property
    def signed(self) -> SignedNote:
        return self.sequencer.signed

    @property
    def trouble(self) -> str:
        return self.sequencer.trouble

    @property
    def published(self) -> SignedNote:
        """The checkpoint that readers see; raises Unavailable while none has met the quorum."""
        published = self.sequencer.published
        if self._signer is None:  # another process may have published a newer one
            note = self.store.checkpoint("published")
            if note and (published is None or note != published.note):
                self.sequencer.published = published = SignedNote.of(note)
        if published is None:
            raise Unavailable(f"no checkpoint has met the quorum yet: {self.trouble or 'the witnesses are asked'}")
        return published

    def tiles(self, tree: Tree) -> Tiles:
        return Tiles(tree.size, self.store.tile, self._cache)

    def proofs(self, published: SignedNote, indices: Iterable[int]) -> dict[int, bytes]:
        """The inclusion proofs of entries, by index: JSON arrays of base64 without `["` and `"]`; b"" for no hashes."""
        ordered = sorted(set(indices))
        return dict(zip(ordered, prove_many(self.tiles(published.tree), ordered, b'","'), strict=True))

    def waiting(self) -> int:
        """The number of entries that are not published yet."""
        with self._wake:
            return self.sequencer.weight + sum(len(submission.entries) for submission in self.sequencer.unpublished)

    async def submit(self, submission: Submission, timeout: float | None = None) -> Submission:
        """Logs entries, and waits for their Answer; raises Unavailable if it does not come in `timeout` seconds."""
        timeout = timeout or self.options.add_timeout
        waiter = submission.waiter = asyncio.get_running_loop().create_future()
        self.tell(Sequencer.submit, submission)
        try:
            await asyncio.wait_for(waiter, timeout)
        except TimeoutError:
            self.tell(Sequencer.give_up, submission)
            raise Unavailable(f"not done in {timeout:g} s: {self.trouble or 'too busy'}; try again") from None
        if submission.error:
            raise Unavailable(submission.error)
        return submission

    def tell(self, event: Callable[..., None], *args: Any) -> None:
        """Reports an event, which is a method of Sequencer, with its arguments. Any thread may call this."""
        with self._wake:
            event(self.sequencer, *args)
            self._wake.notify()

    def start(self) -> None:
        self._thread.start()

    def quit(self) -> None:
        """Ends the sequencer, once its action is done, and its witnesses' clients. Does not wait for that."""
        self.tell(Sequencer.stop)
        for witness in self.witnesses:
            witness.stop()

    def stop(self) -> None:
        self.quit()
        if self._thread.is_alive():
            self._thread.join(WORKER_TIMEOUT)

    def _run(self) -> None:
        while action := self._next():
            self._perform(action)

    def _perform(self, action: Action) -> None:
        """Does an action, and tells the sequencer what came of it."""
        try:
            signed = self._do(action)
        except (Corrupt, CommitFailed, BadProof) as error:
            self._not_done(action, f"stopped: {error}", lost=True)
        except Unavailable as error:
            self._not_done(action, str(error), lost=False)
        except Exception:
            logger.exception("internal error")
            self._not_done(action, "stopped by an internal error", lost=True)
        else:
            if isinstance(action, (Commit, Publish, Probe)):
                self.tell(Sequencer.done, time.monotonic(), signed)

    def _next(self) -> Action | None:
        """Waits for the sequencer's next action; None at the end."""
        with self._wake:
            while not (action := self.sequencer.next(time.monotonic())) and not self.sequencer.over:
                if self.trouble and not self._reported and not self.sequencer.stopping:
                    logger.error("%s; trying again", self.trouble)
                self._reported = self.trouble
                wait = self.sequencer.wake_at() - time.monotonic()
                self._wake.wait(None if wait == math.inf else max(wait, 0))
        return action

    def _do(self, action: Action) -> SignedNote | None:
        """Does an action; returns the new checkpoint of a Commit. Raises the errors of the store."""
        match action:
            case Commit(batch):
                self._begun = time.monotonic()
                return self._append(batch)
            case Ask(round_):
                for witness in self.witnesses:
                    witness.ask(round_)
                if self.trouble:  # else it is done with the answers
                    self.store.database.tidy()
            case Publish(checkpoint, sizes):
                self.store.publish(checkpoint.note, sizes)
                logger.debug("published size %d, cosigned by %d witnesses", checkpoint.tree.size, len(sizes))
            case Answer(submissions, error):
                self._answer(submissions, error)
            case Probe():
                self.store.database.probe()
            case Halt(message, fatal):
                logger.critical("%s", message)
                if fatal:
                    self.failed.set()
        return None

    def _not_done(self, action: Action, error: str, lost: bool) -> None:
        if isinstance(action, Answer):
            self._settle(action.submissions, error)
        if lost:
            self.tell(Sequencer.outcome_unknown, error)
        else:
            self.tell(Sequencer.refused, time.monotonic(), error)

    def _append(self, batch: list[Submission]) -> SignedNote | None:
        """Stores the new entries of `batch`; returns the checkpoint signed for them, None if there were none."""
        sealed: list[bytes] = []

        def seal(tree: Tree) -> bytes:
            if self._signer is None:
                raise Unavailable("this log is open for reading only")
            checkpoint = Checkpoint(self.key.name, tree)
            more = self.second.cosign(encode_checkpoint(checkpoint), int(time.time())) if self.second else ""
            sealed.append(self._signer.sign(checkpoint) + more.encode())
            return sealed[0]

        entries = [entry for submission in batch for entry in submission.entries]
        outcomes = iter(self.store.append(
            entries, seal, not self.witnesses, replace=self.options.replace, cache=self._cache
        ))
        for submission in batch:
            submission.outcomes = list(itertools.islice(outcomes, len(submission.entries)))
        return SignedNote.of(sealed[0]) if sealed else None

    def _answer(self, submissions: list[Submission], error: str) -> None:
        if not error:
            published = self.published
            prove = [submission for submission in submissions if submission.prove]
            proofs = self.proofs(published, (i for s in prove for i in s.outcomes if isinstance(i, int)))
            for submission in submissions:
                submission.published, submission.proofs = published, proofs if submission.prove else {}
            entries = sum(len(submission.entries) for submission in submissions)
            self.publishing.add(time.monotonic() - self._begun, entries)
        self._settle(submissions, error)
        self.store.database.tidy()

    @staticmethod
    def _settle(submissions: list[Submission], error: str = "") -> None:
        """Wakes the clients that wait, with one call into each event loop."""

        def settle(waiters: list[asyncio.Future[None]]) -> None:
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(None)

        waiters = list[asyncio.Future[None]]()
        for submission in submissions:
            submission.error = error
            if submission.waiter:
                waiters.append(submission.waiter)
        for loop in {waiter.get_loop() for waiter in waiters}:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits there
                loop.call_soon_threadsafe(settle, [waiter for waiter in waiters if waiter.get_loop() is loop])


# --- The log: its page ---------------------------------------------------------------------------------------

def page_policy(page: str) -> str:
    """The Content-Security-Policy that lets a page use its own script and style, and nothing else."""

    def source(tag: str) -> str:
        inside = page.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
        return f"'sha256-{to_base64(hashlib.sha256(inside.encode()).digest())}'"

    return (f"default-src 'none'; connect-src 'self'; img-src data:; style-src {source('style')}; "
            f"script-src {source('script')}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")


PAGE = r"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Transparency log</title>
<link rel="icon" href="data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16' fill='none'
 stroke='%230b8a70' stroke-width='2'%3E%3Cpath d='M8 2v6M3 14v-3q0-3 3-3h4q3 0 3 3v3'/%3E%3C/svg%3E">
<style>
:root { color-scheme: light dark; --paper: #f5f4ef; --card: #fff; --soft: #f0f1ea; --line: #dcddd4; --ink: #1b2320;
  --mute: #58635d; --key: #0b6b57; --on: #fff; --good: #17703c; --bad: #b3261e; --warn: #7d5000;
  --mono: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace }
@media (prefers-color-scheme: dark) { :root { --paper: #101412; --card: #171c1a; --soft: #1f2623; --line: #2a322e;
  --ink: #e4eae6; --mute: #9ba8a1; --key: #72d4b6; --on: #0c1a15; --good: #74d592; --bad: #ff958b; --warn: #e8ba60 } }
* { box-sizing: border-box; margin: 0 }
body { margin: 0 auto; max-width: 72rem; padding: 1.5rem 1rem 3rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; -webkit-text-size-adjust: 100% }
h1 { font-size: clamp(1.4rem, 5vw, 2.1rem); line-height: 1.2; letter-spacing: -.02em }
h2 { font-size: 1rem; margin-bottom: .75rem }
h3, pre, code, .mono, input, textarea { font: .8125rem/1.6 var(--mono); font-variant-ligatures: none }
h3, strong { font-weight: 600 }
ol, ul { list-style: none; padding: 0 } dd { margin: 0 } a { color: var(--key); text-underline-offset: .2em }
pre { white-space: pre-wrap; background: var(--soft); border-radius: .4rem; padding: .6rem .75rem }
.small, dt, th, label, summary { font-size: .875rem; font-weight: 400 } .mute, dt, th { color: var(--mute) }
.good { color: var(--good) } .bad { color: var(--bad) } .warn { color: var(--warn) } .calm { color: var(--key) }
header { display: flex; flex-wrap: wrap; gap: .4rem 1rem; align-items: center; margin-bottom: 1.5rem }
header div { flex: 1 1 15rem } svg { width: 2.5rem; stroke: var(--key) }
#state { border: 1px solid; border-radius: 2rem; padding: .1rem .8rem }
main, main > div { display: grid; gap: 1rem; grid-template-columns: minmax(0, 1fr); align-content: start }
section, .trouble { background: var(--card); border: 1px solid var(--line); border-radius: .75rem; padding: 1.1rem }
.trouble { border: 2px solid; color: var(--bad); margin-bottom: 1rem; font-weight: 600 }
[hidden], :is(p, pre):empty:not(#found), .fold:not(:has(li)), body:not(.ready) :is(main, footer) {
  display: none !important }
#size { font-size: clamp(2.2rem, 9vw, 3.2rem); font-weight: 600; line-height: 1.2; letter-spacing: -.03em }
#size, table, .at { font-variant-numeric: tabular-nums }
form, form div { display: flex; flex-wrap: wrap; gap: .5rem } label, form p, form div { flex: 1 0 100% }
input, textarea { flex: 1 1 14rem; min-width: 0; padding: .55rem .7rem; background: var(--paper); color: inherit;
  border: 1px solid var(--mute); border-radius: .4rem; resize: vertical; word-break: break-all }
input { font-size: 1rem } #trusted { flex: 1 0 100% } #k { flex: 0 0 6rem } #k + label { flex: 1; align-self: center }
#drop { border: 2px dashed var(--line); border-radius: .4rem; padding: .7rem } #drop.over { border-color: var(--key) }
#file { display: block; width: 100%; border: 0; padding: .5rem 0 0; background: none; color: transparent }
button, ::file-selector-button { font: 600 .9rem/1.4 system-ui, sans-serif; padding: .45rem 1rem; min-height: 2.5rem;
  border-radius: .4rem; cursor: pointer; border: 1px solid var(--key); background: var(--key); color: var(--on) }
.plain, ::file-selector-button { background: none; color: var(--key) }
:focus-visible { outline: 3px solid var(--key); outline-offset: 2px }
details, #found:not(:empty) { margin-top: .9rem } summary { cursor: pointer } details form { margin-top: .6rem }
article { border-top: 1px solid var(--line); margin-top: 1rem; padding-top: 1rem }
article form { margin: .6rem 0; align-items: center; gap: 1rem }
.steps li { display: grid; grid-template-columns: 1.5rem minmax(0, 1fr); margin-top: .7rem; font-size: .9rem }
.steps dt { font-size: .75rem; margin-top: .2rem } .steps dd { font: .75rem/1.5 var(--mono); white-space: pre-wrap }
.verdict { border-left: .35rem solid; background: var(--soft); padding: .8rem; font-size: 1.2rem; font-weight: 600;
  line-height: 1.35 } .verdict + .small { margin: .6rem 0 } #found { font-weight: 600 }
.files li { display: grid; grid-template-columns: minmax(0, 1fr) auto; column-gap: 1rem; padding: .4rem 0 }
li + li, tr { border-top: 1px solid var(--line) } .steps li { border: 0 }
.files li > * { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; font: .75rem/1.4rem var(--mono) }
.files a { text-decoration: none; font-size: .85rem } .files a:hover { text-decoration: underline }
#witnesses li { padding: .5rem 0 } #witnesses li:first-child { padding-top: 0 }
#tree { display: flex; flex-wrap: wrap; gap: .6rem 3rem } #next { border-color: var(--key) } pre { margin-top: .6rem }
table { width: 100%; border-collapse: collapse } tr:has(td:empty) { border: 0 }
th { text-align: left; padding: .25rem 0 }
td, th.at, .at { text-align: right; font-size: .875rem; padding-left: .5rem }
.row { display: flex; justify-content: space-between; align-items: center; margin: .9rem 0 .5rem }
footer { margin-top: 1.5rem } footer code { display: block; margin-top: .3rem }
@media (min-width: 60rem) { body { padding: 2.5rem 2rem 4rem }
  main { grid-template-columns: minmax(0, 14fr) minmax(0, 9fr) }
  #tree, #next { grid-column: 1 / -1 } }
</style>
<header>
  <svg viewBox="0 0 16 16" fill="none" stroke-width="1.5" aria-hidden="true"><circle
    cx="8" cy="3" r="1.5"/><path d="M8 4.5V8M3.5 13.5V10q0-2 2-2h5q2 0 2 2v3.5M2 14h3M11 14h3"/></svg>
  <div><p class="small mute">Transparency log of Python packages</p><h1 id="origin">…</h1></div>
  <p id="state" role="status" class="small mute">connecting</p>
</header>
<noscript><p class="trouble">This page needs JavaScript. See <a href="/status.json">status.json</a>.</p></noscript>
<p id="trouble" class="trouble" role="alert"></p>
<main>
  <section id="next" aria-labelledby="h-next" hidden>
    <h2 id="h-next"></h2><p id="how"></p><pre id="first"></pre></section>
  <section id="tree" aria-label="Signed tree">
    <dl><dt>Entries</dt><dd id="size">–</dd><dd id="disk" class="small mute"></dd></dl>
    <dl><dt>Root of the tree (SHA-256)</dt><dd id="root" class="mono">–</dd></dl>
  </section>
  <div>
    <section aria-labelledby="h-find">
      <h2 id="h-find">Is a file logged?</h2>
      <form id="find" role="search">
        <label for="query">Its full name, or its checksum (SHA-256 in hex)</label>
        <input id="query" type="search" autocomplete="off" autocapitalize="off" spellcheck="false">
        <button>Find and verify</button>
        <label id="drop" for="file">Or drop the file on this page: it is hashed in your browser, and not uploaded.
          <input id="file" type="file"></label>
      </form>
      <details><summary>Verify with <strong id="whose">…</strong></summary>
        <form id="pin">
          <label for="key">Verifier key of the log, or the text of a policy file (C2SP tlog-policy)</label>
          <textarea id="key" rows="3" spellcheck="false" aria-describedby="remark"></textarea>
          <p id="remark" class="small" role="status"></p>
          <div id="simple"><label for="trusted">Keys of witnesses, one a line</label>
            <textarea id="trusted" rows="3" spellcheck="false" placeholder="none"></textarea>
            <input id="k" type="number" min="1" placeholder="all"><label for="k">of them have to cosign</label></div>
          <div><button>Pin in this browser</button><button type="button" class="plain" id="forget">Forget</button></div>
        </form>
      </details>
      <p id="found" role="status"></p>
      <div id="results"></div>
    </section>
    <section id="recent" aria-labelledby="h-newest"><h2 id="h-newest">Newest entries</h2>
      <ol id="newest" class="files"></ol></section>
  </div>
  <div>
    <section aria-labelledby="h-witnesses"><h2 id="h-witnesses">Witnesses</h2><ul id="witnesses"></ul></section>
    <section id="since" aria-labelledby="h-work" hidden><h2 id="h-work">Work since the start</h2>
      <table><tr><td></td><th scope="col" class="at">Adds</th><th scope="col" class="at">Bulks</th></tr>
      <tbody id="work"></tbody></table></section>
    <section aria-labelledby="h-note"><h2 id="h-note">Checkpoint</h2><pre id="checkpoint">–</pre>
      <div class="row small mute">Verifier key <button type="button" class="plain" id="copy">Copy</button></div>
      <pre id="vkey">–</pre></section>
  </div>
</main>
<footer class="small mute">This page can't prove its own honesty: it comes from the server that it checks.
  To be sure, verify with your own copy of btlog.py, and with keys that you got elsewhere:
  <code>python btlog.py verify FILE --public-key KEY --log-url <span id="url"></span></code></footer>
<script>
"use strict";
const $ = id => document.getElementById(id), number = n => Number(n ?? 0).toLocaleString("en");
// Nothing that the server says becomes markup: it goes into text, with what is invisible or turns text written out.
const visible = text => String(text ?? "").replace(/(?!\n)[\p{C}\u2028\u2029]/gu,
  c => `‹U+${c.codePointAt().toString(16).toUpperCase().padStart(4, "0")}›`);
function el(tag, kind, ...children) {
  const made = document.createElement(tag);
  made.className = kind;
  made.append(...children.map(child => child instanceof Node ? child : visible(child)));
  return made;
}
function put(id, text, kind) {  // touched only if it changes: a selection stays, a screen reader is not told again
  if ($(id).textContent !== visible(text)) $(id).textContent = visible(text);
  if (kind !== undefined) $(id).className = kind;
}
function must(holds, says) { if (!holds) throw Error(says); }
async function get(path) {
  const answer = await fetch(path, {cache: "no-store", signal: AbortSignal.timeout(20000)});
  const text = new TextDecoder("utf-8", {fatal: true, ignoreBOM: true}).decode(await answer.arrayBuffer());
  if (answer.ok) return text;
  let said = `status ${answer.status}`;
  try { said = JSON.parse(text).error; } catch { /* then it is not the log that answers */ }
  throw Object.assign(Error(said), {status: answer.status});
}

// --- What is checked: RFC 9162 section 2.1.3.2, C2SP signed-note, tlog-checkpoint, tlog-cosignature, tlog-proof
const bytes = text => new TextEncoder().encode(text), subtle = crypto.subtle ?? {digest: async () => {
  throw Error("browsers hash and verify only on pages from https or localhost"); }};
const hashed = async data => new Uint8Array(await subtle.digest("SHA-256", data));
const hex = data => Array.from(data, byte => (byte + 256).toString(16).slice(1)).join("");
const sha256 = (...parts) => hashed(Uint8Array.from(parts.flatMap(part => [...part])));
function unbase64(text, length) {
  const sound = /^([A-Za-z0-9+/]{4})*([A-Za-z0-9+/]{2}(==|[A-Za-z0-9+/]=))?$/.test(text);
  const data = Uint8Array.from(atob(sound ? text : ""), c => c.charCodeAt());
  must(btoa(String.fromCharCode(...data)) === text && data.length === (length ?? data.length), `not base64: ${text}`);
  return data;
}
function decimal(text) {
  must(/^(0|[1-9][0-9]{0,18})$/.test(text) && BigInt(text) < 1n << 63n, `not a decimal: ${text}`);
  return BigInt(text);
}
function encodeEntry({filename, checksum, publisher}) {
  const {issuer, subject} = publisher ?? {}, fields = [filename, checksum, ...(publisher ? [issuer, subject] : [])];
  // A newline or a space within a field would move the borders: what is shown would not be what is hashed.
  must(fields.every(field => typeof field === "string" && field && !/[\p{Cc}\p{Cs}]/u.test(field)) &&
    /^sha256:[0-9a-f]{64}$/.test(checksum) && !/\s/.test(issuer ?? ""), "no entry can have these fields");
  return `pypi-transparency/v1\n${checksum}\n${filename}` + (publisher ? `\npublisher ${issuer} ${subject}` : "");
}
async function climb(hash, index, size, path) {
  let node = index, last = size - 1n;
  must(index < size, `there is no entry ${index} in a tree of ${size}`);
  for (const sibling of path) {
    must(last > 0n, "the path is too long");
    if (node & 1n || node === last) {
      hash = await sha256([1], sibling, hash);
      while (node && !(node & 1n)) [node, last] = [node >> 1n, last >> 1n];
    } else hash = await sha256([1], hash, sibling);
    [node, last] = [node >> 1n, last >> 1n];
  }
  must(last === 0n, "the path is too short");
  return hash;
}
function parseProof(text) {
  const cut = text.indexOf("\n\n"), lines = text.slice(0, cut).split("\n"), note = text.slice(cut + 2);
  const end = note.lastIndexOf("\n\n"), signed = note.slice(0, end + 1), rest = note.slice(end + 2).split("\n");
  must(lines.shift() === "c2sp.org/tlog-proof@v1" && cut > 0 && end > 0 && rest.pop() === "", "not a tlog-proof");
  const extra = lines[0]?.startsWith("extra ") ? unbase64(lines.shift().slice(6)) : null;
  const [origin, size, root, ...more] = signed.slice(0, -1).split("\n");
  must(lines[0]?.startsWith("index ") && ![origin, ...more].includes("") && !/(?!\n)[\x00-\x1f]/.test(text) &&
    rest.length > 0 && rest.length <= 100, "not a tlog-proof with a checkpoint");
  const signatures = rest.map(line => {
    const [dash, name, value, ...others] = line.split(" "), data = unbase64(value ?? "");
    must(dash === "—" && name && !others.length && data.length > 4, `not a signature: ${line}`);
    return {data: data.slice(4), by: `${name}+${hex(data.slice(0, 4))}`};
  });
  return {extra, index: decimal(lines[0].slice(6)), path: lines.slice(1).map(line => unbase64(line, 32)),
    signed, origin, size: decimal(size), root: unbase64(root, 32), signatures};
}
async function parseKey(vkey, type) {
  const [, name, id, value] = /^([^\s\x85+\x00-\x1f]+)\+([0-9a-f]{8})\+(\S+)$/.exec(vkey) ?? [];
  must(name && bytes(name).length <= 255, `not a verifier key: ${vkey}`);
  const data = unbase64(value), [kind] = data, key = data.slice(1), pq = type === 4 && kind === 6;
  // A log's further key, of another signature type: not a key that anything here is verified with.
  if (type === 1 && data.length && kind !== 1 && kind !== 4) return {name, key: data, by: vkey, unused: true};
  const keyId = async kind => hex((await sha256(bytes(name + "\n"), [kind], key)).slice(0, 4));
  must(await keyId(kind) === id, `the key ID ${id} does not match the name ${name} and its key`);
  // A witness's key may be written with type 1; what it verifies are cosignatures, of type 4. ML-DSA never counts.
  must(key.length === (pq ? 1312 : 32) && (kind === 1 || kind === type || pq), `not a key for this: ${vkey}`);
  return {name, key, by: `${name}+${pq ? `${id} (ML-DSA-44)` : await keyId(type)}`};
}
async function isSigned(key, signature, message) {  // null: this browser can't tell
  try {
    const imported = await subtle.importKey("raw", key, {name: "Ed25519"}, false, ["verify"]);
    return await subtle.verify("Ed25519", imported, signature, bytes(message));
  } catch (error) { return error.name === "NotSupportedError" ? null : false; }
}
async function isCosigned(key, data, signed) {  // whether, and what to say of it
  const time = BigInt("0x" + hex(data.slice(0, 8))), at = new Date(Number(time) * 1000);
  const message = `cosignature/v1\ntime ${time}\n${signed}`;
  const mark = time > 0n && time < 1n << 63n && await isSigned(key, data.slice(8), message);
  const says = mark ? "cosigned at" : mark === null ? "not checked, of" : "false, of";
  return [mark, `${says} ${isNaN(at) ? time : at.toJSON()}`];
}
const all = marks => !marks.length ? undefined : marks.includes(false) ? false : marks.includes(null) ? null : true;

// --- Whom to trust: a policy (C2SP tlog-policy), read as strictly as parse_policy of btlog.py does, or pinned keys
async function trust(keys, vkey, type) {
  const key = await parseKey(vkey, type);
  must(!keys.some(other => hex(other.key) === hex(key.key) || other.by === key.by), `the same key twice: ${vkey}`);
  keys.push(key);
  return key;
}
function quorumOf(word, members) {
  const n = members.length, k = word === "any" ? 1 : word === "all" ? n : Number(decimal(word));
  const depth = 1 + Math.max(0, ...members.map(member => member.depth ?? 0));
  must(k >= 1 && k <= n, `${k} of ${n} can't be asked for`); must(depth <= 100, "more than 100 groups within groups");
  return {k, members, depth};
}
const NOBODY = {k: 0, members: []}, isPolicy = text => /\s/.test(text.trim());  // a verifier key has no space
const met = ({k, members}, held) => members.filter(m => m.members ? met(m, held) : held.includes(m)).length >= k;
async function parsePolicy(text) {
  const policy = {logs: [], witnesses: []}, names = new Map([["none", NOBODY]]), grouped = new Set(["none"]);
  const named = name => { must(names.has(name), `no line above defines ${name}`); return names.get(name); };
  const define = (name, value) => { must(!names.has(name), `the name ${name} is taken`); names.set(name, value); };
  must(/^[\t\n\x20-\x7e\x80-\uffff]*$/.test(text) && bytes(text).length <= 1e6, "a control character, or too long");
  must(text.endsWith("\n"), "the policy's last line has no line break: was it cut off?");
  for (const [i, line] of text.split("\n").entries()) {
    const [word = "#", ...words] = line.split(/[ \t]+/).filter(Boolean), n = words.length, [name, k, ...more] = words;
    try {
      if (word.startsWith("#")) continue;
      if (word === "log" && (n === 1 || n === 2)) await trust(policy.logs, name, 1);
      else if (word === "witness" && (n === 2 || n === 3)) define(name, await trust(policy.witnesses, k, 4));
      else if (word === "group" && n >= 3) {
        must(new Set(more).size === more.length && !more.some(member => grouped.has(member)), "a member of two groups");
        more.forEach(member => grouped.add(member)); define(name, quorumOf(k, more.map(named)));
      } else if (word === "quorum" && n === 1) {
        must(!policy.quorum, "a second quorum line");
        const chosen = named(name);
        policy.quorum = chosen.members ? chosen : quorumOf("all", [chosen]);
      } else throw Error("not a log, witness, group or quorum line");
    } catch (error) { throw Error(`line ${i + 1} of the policy: ${error.message}`); }
  }
  must(policy.quorum, "the policy has no quorum line (“quorum none” requires no witness)");
  policy.logs = policy.logs.filter(key => !key.unused);
  must(policy.logs.length, "the policy has no log line with a key of type 0x01");
  return policy;
}
async function readPins({key, witnesses, k}) {
  if (isPolicy(key)) return parsePolicy(key);
  const policy = {logs: [], witnesses: []}, lines = witnesses.split("\n").map(line => line.trim()).filter(Boolean);
  must(!(await trust(policy.logs, key.trim(), 1)).unused, `not a key for this: ${key}`);
  for (const line of lines) await trust(policy.witnesses, line, 4);
  return {...policy, quorum: lines.length || k ? quorumOf(k || "all", policy.witnesses) : NOBODY};
}

// --- A verdict: `add` takes a mark, a claim and the values for each step
async function check(entry, asked, proof, policy, add) {
  const {index, size, root, signed, origin, signatures, extra} = proof, text = encodeEntry(entry);
  const leaf = await sha256([0], bytes(text)), own = hex(extra ?? bytes(text)) === hex(bytes(text));
  const results = (keys, test) => Promise.all(keys.map(async key => [key, await Promise.all(
    signatures.filter(({by}) => by === key.by).map(({data}) => test(key.key, data, signed)))]));
  add(own && entry[asked.name] === asked.value && index === BigInt(entry.index),
    "The entry is the one that you asked for, and the one in the proof", {"entry": text,
    ...(own ? {} : {"entry in the proof": new TextDecoder().decode(extra)}), "index in the answer": entry.index,
    "index in the proof": index, "leaf hash, SHA-256 of 0x00 and the entry": hex(leaf)});
  const top = await climb(leaf, index, size, proof.path);
  add(hex(top) === hex(root), `Its path leads to the root of the tree of ${number(size)} entries`, {
    "path": `${proof.path.length} hashes up from entry ${index}`, "root computed": hex(top),
    "root in the checkpoint": hex(root)});
  const logs = (await results(policy.logs, isSigned)).map(([{name}, marks]) => [name === origin, all(marks)]);
  const by = all(logs.filter(([named, mark]) => named && mark !== undefined).map(([, mark]) => mark));
  const log = by === undefined || logs.some(([, mark]) => mark === false) ? false : by;
  add(log, "The log's key has signed this root", {"key": policy.logs.map(key => key.by).join("\n"),
    "origin in the checkpoint": origin, "signatures": signatures.map(s => s.by).join("\n")});
  const rows = {}, held = [], {k, members} = policy.quorum;
  for (const {by} of signatures) if (!policy.logs.some(key => key.by === by)) rows[by] = "unknown key";
  const marks = (await results(policy.witnesses, isCosigned)).map(([key, cosigned]) => {
    const mark = all(cosigned.map(([mark]) => mark));
    rows[key.by] = cosigned.map(([, says]) => says).join("\n") || "has not cosigned";
    if (mark) held.push(key);
    return mark;
  });
  const wrong = marks.includes(false), unknown = !k || marks.includes(null), enough = met(policy.quorum, held);
  add(wrong ? false : unknown ? null : enough || "short", wrong ? "The cosignatures are true" : k ?
    "Enough of your witnesses have cosigned it" : "Witnesses: you require none", rows);
  const n = members.filter(member => held.includes(member)).length;
  return {log, cosigned: held.length ? `, cosigned by ${held.length} of your ${policy.witnesses.length} witnesses` : "",
    short: !enough && (members.some(member => member.members) ? "too few for your policy have cosigned" : n ?
      `only ${n} of the ${k} witnesses that you ask for have cosigned` : "none of your witnesses has cosigned")};
}
async function loggedThere({extra, index, size, root, path}) {  // the checksum of the entry that a proof does fit
  for (const give of [() => extra, async () => bytes(encodeEntry(JSON.parse(await get(`/entry/${index}`))))]) try {
    const entry = await give();
    if (hex(await climb(await sha256([0], entry), index, size, path)) === hex(root))
      return new TextDecoder().decode(entry).split("\n")[1];
  } catch { /* it does not fit, either */ }
}
async function verify(entry, asked, {verdict, more, steps, fold}) {
  const marks = [], failed = [], add = (mark, claim, rows = {}) => {
    const [sign, kind, label] = {true: ["✓", "good", "holds"], null: ["–", "mute", "not checked"],
      short: ["!", "warn", "not yet"], false: ["✗", "bad", "does not hold"]}[mark];
    const shown = el("span", kind, sign), list = el("dl", "");
    shown.role = "img"; shown.ariaLabel = label; marks.push(mark);
    if (mark === false) failed.push(claim);
    for (const [name, value] of Object.entries(rows)) list.append(el("dt", "", name), el("dd", "", value));
    const title = el("strong", mark === false ? "bad" : "", mark === true ? claim : `${claim}: ${label}`);
    steps.append(el("li", "", shown, el("div", "", title, list)));
  };
  const differs = asked.sum && asked.sum !== entry.checksum && "The log has another checksum for this name: logged " +
    `${entry.checksum}, your file ${asked.sum}. It may have been changed: don't use it.`;
  const say = (kind, text, reason) => {
    verdict.className = `verdict ${{"": "mute", refused: "bad", verified: "good", consistent: "calm"}[kind] ?? "warn"}`;
    verdict.textContent = visible(text); more.className = differs ? "small bad" : "small";
    more.textContent = visible([differs, reason].filter(Boolean).join(" "));
    verdict.dataset.verdict = kind; fold.open = kind === "refused";
  };
  steps.replaceChildren(); say("", "Checking …");
  let proof, policy, found;
  try {
    policy = await readPins({...pins, key: pins.key || served});
    must(Number.isSafeInteger(entry.index) && entry.index >= 0, "the answer has no index");
    proof = await get(`/entry/${entry.index}/proof`);
  } catch (error) { return say("unchecked", `Not verified: ${error.message}.`, "Verifying needs a key and a proof."); }
  try { found = await check(entry, asked, proof = parseProof(proof), policy, add); }
  catch (error) { add(false, `The proof (its check ended early: ${error.message})`); }
  if (marks.includes(false)) {
    const there = marks.slice(0, 2).includes(false) && proof.path && await loggedThere(proof);
    return say("refused", "Refused: this does not prove that the file is logged. Don't trust it.",
      there && there !== entry.checksum ? "The file or its entry may have been changed: this answer has " +
      `${entry.checksum}, ${found?.log ? "the log has" : "the proof is of"} ${there}` :
      `What does not hold: ${failed.join("; ")}.`);
  }
  const whose = asked.sum ? "your file" : `a file ${asked.name === "filename" ? "of this name" : "with this checksum"}`;
  const what = `${whose} is entry ${number(entry.index)} of the ${number(proof.size)} that ${proof.origin} has signed`;
  const hint = asked.sum ? entry.filename === asked.file ? "" : `The log has your file as ${entry.filename}.` :
    asked.name === "filename" ? "Does your file have the checksum below? Drop the file here to compare." : "";
  if (differs) say("refused", "Refused: your file is not the one that is logged.");
  else if (found.log === null) say("unchecked", "Not verified: this browser has no Ed25519.", "Use btlog.py verify.");
  else if (found.short) say("short", `Not verified: ${found.short}.`, `No check has failed: ${what}. Ask again later.`);
  else if (pins.key) say("verified", `Verified: ${what}${found.cosigned}.`, hint);
  else say("consistent", `Consistent: ${whose} is entry ${number(entry.index)}, by this server's own key.`,
    "That is no proof yet: pin a key of the log that you got elsewhere. Then a forged log can't pass for it. " + hint);
}

// --- The keys, and the search for what stands behind # in the address, or for a file
const stored = name => { try { return localStorage.getItem(name) ?? ""; } catch { return ""; } };
// Kept by the address of the server, not by the name of the log: that the server could change to be trusted again.
let pins = {key: stored("key"), witnesses: stored("witnesses"), k: stored("k")}, dropped = null;
let served = "", searches = 0, shown = 0, busy = false, timer;
function showKeys() {
  const {key, witnesses, k} = pins, differs = key && !(served && key.includes(served));
  $("key").value = key || served; $("trusted").value = witnesses; $("k").value = k; $("key").oninput();
  put("whose", key ? `the ${isPolicy(key) ? "policy" : "key"} that you pinned` : "the key that this server gives");
  put("remark", differs ? `The server gives another key: ${served || "none"}` : key ? "The server gives it, too." :
    "This key is from the server itself: it shows only that the server's answers are consistent. Paste a key that " +
    "you got elsewhere and trust.", `small ${differs ? "bad" : "mute"}`);
}
function pin(key, witnesses = "", k = "") {
  pins = {key, witnesses, k};
  try { for (const name in pins) localStorage.setItem(name, pins[name]); } catch { /* not for long */ }
  showKeys(); search();
}
function showEntry(entry, asked) {
  const steps = el("ol", "steps"), verdict = el("p", "verdict"), more = el("p", "small"), {publisher} = entry;
  const fold = el("details", "fold", el("summary", "", "The steps of this check"), steps);
  const link = el("a", "small", "Download the proof"), form = el("form", "", el("button", "plain", "Verify"), link);
  const run = () => verify(entry, asked, {verdict, more, steps, fold});
  const from = publisher ? `published by ${publisher.subject} (${publisher.issuer})` : "without a publisher";
  link.href = `/entry/${Number(entry.index)}/proof`; link.download = `${entry.filename}.tlog-proof`;
  form.onsubmit = event => { event.preventDefault(); run(); };
  verdict.role = "status";
  $("results").append(el("article", "", verdict, more, el("h3", "", entry.filename), el("p", "mono", entry.checksum),
    el("p", "small mute", `Entry ${number(entry.index)}, ${from}`), form, fold));
  return run;
}
function inList(entry, index) {  // null for what is logged and is not an entry
  if (entry) encodeEntry(entry);  // throws for what is none
  const name = el("a", "mono", entry ? entry.filename : "not an entry");
  if (entry) name.href = `#${encodeURIComponent(entry.filename)}`;
  return el("li", "", name, el("span", "mute at", number(index)), el("span", "mute", entry?.checksum),
    el("span", "mute at", entry?.publisher ? "publisher" : ""));
}
async function showProject(project, before = "", list = el("ol", "files")) {  // its files, page by page, newest first
  const mine = searches, older = before && `&before=${Number(before)}`;
  const {entries, next} = JSON.parse(await get(`/entries?project=${encodeURIComponent(project)}${older}`));
  must(Array.isArray(entries), "not a list of entries");
  const rows = entries.map(entry => inList(entry, Number(entry.index)));
  if (mine !== searches || !(rows.length || list.childElementCount || next)) return false;
  list.append(...rows);
  $("results").replaceChildren(list);
  if (next) {
    const more = el("button", "plain", "Older files");
    more.onclick = () => {
      more.disabled = true;
      showProject(project, next, list).catch(error => put("found", `The log has no answer: ${error.message}`, "bad"));
    };
    $("results").append(more);
  }
  return true;
}
async function lookUp(name, value) {
  const {entries} = JSON.parse(await get(`/entries?${name}=${encodeURIComponent(value)}`));
  must(Array.isArray(entries) && entries.every(entry => entry instanceof Object), "not a list of entries");
  return entries;
}
async function search() {
  const mine = ++searches, file = dropped;
  let value = location.hash.slice(1), entries, others = [];
  try { value = decodeURIComponent(value); } catch { /* it is meant as it stands */ }
  if (file) value = file.sum;
  const sum = /^(sha256:)?[0-9a-f]{64}$/i.test(value), lower = value.slice(-64).toLowerCase();
  const asked = {...file, ...(sum ? {name: "checksum", value: `sha256:${lower}`} : {name: "filename", value})};
  $("query").value = file ? "" : value; $("results").replaceChildren(); put("found", value && "Asking the log …", "");
  if (!value) return;
  try {
    entries = await lookUp(asked.name, asked.value);
    if (!file && !sum && !entries.length && mine === searches && await showProject(value))
      return put("found", "Files of this project, the newest first. Choose one to check it.", "");
    if (file) others = (await lookUp("filename", file.file)).filter(entry => entry.checksum !== file.sum);
  } catch (error) { entries = error; }
  if (mine !== searches) return;  // another one was begun
  if (entries instanceof Error) return put("found", `The log has no answer: ${entries.message}`, "bad");
  const found = [...others, ...entries], {length} = found;
  const [says, kind] = !length ? [(file ? `Neither the name nor the checksum of your file is logged: ${file.file}, ` +
    `${file.sum}.` : sum ? "No file with this checksum is logged. Is it the SHA-256 of the whole file?" :
    "No file and no project of this name is logged. Try the file's full name, its checksum, or drop the file here.") +
    " The server can't prove that.", "warn"] :
    others.length ? ["", ""] : file && !found.some(entry => entry.filename === file.file) ?
      [`The log knows your file under another name: ${found[0].filename}`, "warn"] :
    new Set(found.map(entry => entry.checksum)).size > 1 ? [`${number(length)} entries with different ` +
      "checksums. Which one is your file's?", "warn"] : [length > 1 ? `${number(length)} entries are here.` : "", ""];
  put("found", says, kind);
  const byName = {...file, name: "filename", value: file?.file};
  const runs = found.map(entry => showEntry(entry, others.includes(entry) ? byName : asked));
  for (const run of runs.slice(0, 3)) run();
}
async function take([file]) {  // hashes a file, and asks for its checksum and its name
  if (!file) return;
  const mine = ++searches, {name, size} = file;
  history.replaceState(null, "", location.pathname);  // the address is not that of another search
  dropped = null; $("query").value = ""; $("results").replaceChildren(); put("found", `Hashing ${name} …`, "");
  $("find").scrollIntoView({block: "nearest"});
  try {
    must(size <= 2 ** 30, "it has more than 1 GiB");
    const sum = `sha256:${hex(await hashed(await file.arrayBuffer()))}`;
    if (mine === searches) { dropped = {file: name, sum}; search(); }
  } catch (error) {
    if (mine === searches)
      put("found", `This page can't hash ${name}: ${error.message}. Search for its SHA-256 instead.`, "bad");
  }
}

// --- The state of the log
const ms = n => n >= 1000 ? `${(n / 1000).toFixed(2)} s` : `${(n ?? 0).toFixed(n < 10 ? 2 : 0)} ms`;
const WORK = [["Entries", "count", number], ["Refused or failed", "failures", number], ["Last", "last_ms", ms],
  ["Average", "average_ms", ms], ["Fastest", "min_ms", ms], ["Slowest", "max_ms", ms],
  ["Entries a second, last", "throughput_per_second", n => number(Math.round(n ?? 0))]];
function since(time, now) {
  const seconds = Math.max(0, (Date.parse(now) - Date.parse(time)) / 1000);
  const [n, unit] = [[86400, "days"], [3600, "h"], [60, "min"], [1, "s"]].find(([n]) => seconds >= 2 * n) ?? [1, "s"];
  return `${Math.floor(seconds / n)} ${unit}`;
}
function showWitness({name, url, size, last_cosigned, dark_since, error}, now) {
  const last = last_cosigned ? `cosigned ${since(last_cosigned, now)} ago, at size ${number(size)}` : "";
  const dark = dark_since ? `dark for ${since(dark_since, now)}: ${error}` : last ? "" : "has not cosigned yet";
  return el("li", "", el("strong", "", name), el("p", "small mute", url), el("p", "small bad", dark),
    el("p", `small ${dark ? "mute" : "good"}`, last));
}
async function newest(index) {
  const entry = await get(`/entry/${index}`).catch(error => { if (error.status !== 400) throw error; });
  try { return inList(JSON.parse(entry), index); } catch { return inList(null, index); }
}
async function show(status) {
  const {origin, vkey, trouble, read_only, generated_at: now, checkpoint = {}, witnesses = [], disk} = status;
  const size = checkpoint.tree_size ?? 0, {available} = checkpoint;
  document.title = visible(origin); put("origin", origin); put("vkey", vkey); put("trouble", trouble);
  put("state", trouble ? "in trouble" : read_only ? "read-only" : available ? "publishing" : "waiting",
    `small ${trouble ? "bad" : available ? "good" : "warn"}`);
  put("size", available ? number(size) : "–"); put("root", checkpoint.root_hash ?? "–");
  put("checkpoint", checkpoint.raw_checkpoint?.trim() ?? "–");
  const begun = available && size > 0, work = [status.latency, status.bulk_latency];
  $("next").hidden = begun; $("tree").hidden = $("recent").hidden = !begun;
  put("h-next", available ? "This log is empty" : "Nothing is published yet");
  put("how", !available ? "Are the witnesses up, and do they know the verifier key below?" : read_only ?
    "New entries will be shown here." : "Log its first file from a terminal, and it will be shown here:");
  put("first", available && !read_only ? `python btlog.py add FILE --log-url ${location.origin}` : "");
  $("witnesses").replaceChildren(...witnesses.map(witness => showWitness(witness, now)));
  if (!witnesses.length) $("witnesses").append(el("li", "small mute", read_only ? "The writing process asks them." :
    "None: nobody else checks that the log shows everybody the same tree."));
  $("since").hidden = !work.some(numbers => numbers?.count || numbers?.failures);
  $("work").replaceChildren(...WORK.map(([title, name, format]) => el("tr", "", el("th", "", title),
    ...work.map(numbers => el("td", "", format === number || numbers?.count ? format(numbers?.[name]) : "–")))));
  put("disk", disk && `On disk: ${(disk.bytes / 1e6).toFixed(1)} MB in ${number(disk.files)} files`);
  if (size < shown) { shown = 0; $("newest").replaceChildren(); }
  const from = Math.max(shown, size - 10), rows = Array.from({length: size - from}, (_, i) => newest(size - 1 - i));
  $("newest").prepend(...await Promise.all(rows)); shown = size;
  while ($("newest").childElementCount > 10) $("newest").lastChild.remove();
}
async function poll() {
  if (busy) return;
  clearTimeout(timer); busy = true;
  try { await show(JSON.parse(await get("/status.json"))); }
  catch (error) {
    put("state", "no answer", "small bad");
    put("trouble", `The log does not answer: ${error.message}`);
  }
  document.body.className = "ready"; busy = false;
  if (!document.hidden) timer = setTimeout(poll, 5000);
}
$("find").onsubmit = event => {
  event.preventDefault(); dropped = null;
  const hash = `#${encodeURIComponent($("query").value.trim())}`;
  if (location.hash === hash) search(); else location.hash = hash;
};
$("key").oninput = () => { $("simple").hidden = isPolicy($("key").value); };
$("pin").onsubmit = event => {
  event.preventDefault();
  const text = $("key").value, key = isPolicy(text) ? text : text.trim();
  const [witnesses, k] = isPolicy(text) ? ["", ""] : [$("trusted").value.trim(), $("k").value];
  readPins({key, witnesses, k}).then(() => pin(key, witnesses, k),
    error => put("remark", `Not pinned: ${error.message}`, "small bad"));
};
$("forget").onclick = () => pin("");
$("file").onchange = ({target}) => { take(target.files); target.value = ""; };
const hasFile = event => event.dataTransfer?.types.includes("Files");
document.ondragover = event => { if (hasFile(event)) { event.preventDefault(); $("drop").className = "over"; } };
document.ondragleave = event => { if (!event.relatedTarget) $("drop").className = ""; };
document.ondrop = event => {
  $("drop").className = "";
  if (hasFile(event)) { event.preventDefault(); take(event.dataTransfer.files); }
};
$("copy").onclick = () => {  // navigator.clipboard is there only where WebCrypto is
  getSelection().selectAllChildren($("vkey"));
  put("copy", document.execCommand("copy") ? "Copied" : "Selected");
};
document.onvisibilitychange = () => document.hidden || poll();
onhashchange = () => { dropped = null; search(); };
put("url", location.origin);
get("/.well-known/public-key").then(text => { served = text.trim(); }, () => {}).then(showKeys).then(search);
poll();
</script>
</html>
"""
PAGE_POLICY = page_policy(PAGE)


# --- The log: its routes ---------------------------------------------------------------------------------------

class LogServer:
    """What all requests to a log share: the log, the options, the metrics and the cached answers."""

    def __init__(self, log: Log, token: str | None = None, max_bulk: int = 50_000, read_only: bool = False) -> None:
        self.log, self.token, self.max_bulk, self.read_only = log, token, max_bulk, read_only
        self.adds, self.bulks, self.results = Latency(), Latency(), Counter[str]()
        self.bulk_timeout: float | None = None  # seconds; None: as for an add
        self.checkpoint = Response(b"")  # the last answer, kept with its head
        self.cache = Cache(32 << 20, lambda response: len(response.body) + 600)

    def count(self, error: Error, entries: int = 1) -> None:
        known = {409: "conflict", 503: "unavailable"}
        self.results[known.get(error.status, "refused" if error.status < 500 else "failed")] += entries


class LogHandler(Handler):
    """The routes of the log. Reads are open to any web page."""

    app: LogServer

    def allowed(self) -> tuple[str, ...]:
        if self.route in ("/add", "/admin/bulk/append"):
            return ("POST",)
        if self.route not in self.PAGES and not self.route.startswith(("/tile/", "/entry/")):
            raise HttpError(404, "there is nothing here")
        return "GET", "HEAD"

    def do_GET(self) -> Response:
        if self.route.startswith("/tile/"):
            return self._tile()
        return self._entry() if self.route.startswith("/entry/") else self.PAGES[self.route](self)

    def do_POST(self, body: Body) -> Coroutine[Any, Any, Response]:
        self._admit()
        return self._add(body) if self.route == "/add" else self._bulk(body)

    def _admit(self) -> None:
        """Raises HttpError if this request may not write."""
        # A web page can make a browser send this request, but can't hide that: the browser sets these headers.
        origin, site = self.headers.get("origin"), self.headers.get("sec-fetch-site", "none")
        host = self.headers.get("host", "")
        same = origin is None or (origin.partition("://")[2] == host and is_address(host))  # against DNS rebinding
        if site not in ("none", "same-origin") or not same:
            raise HttpError(403, "a web page of another site can't write here")
        if self.app.read_only:
            raise HttpError(405, "this server is read-only", Allow="GET")
        if self.app.token is not None:
            scheme, _, token = self.headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(token.strip().encode(), self.app.token.encode()):
                raise HttpError(401, "writing needs the write token", WWW_Authenticate="Bearer")

    def _checkpoint(self) -> Response:
        if (note := self.app.log.published.note) != self.app.checkpoint.body:
            self.app.checkpoint = Response(note, TEXT, headers={**CORS, "Cache-Control": "no-cache"})
        return self.app.checkpoint

    def _key(self) -> Response:
        return Response(f"{encode_vkey(self.app.log.key)}\n".encode(), TEXT, headers=CORS)

    def _tile(self) -> Response:
        zipped = self.path.startswith("/tile/entries/") and takes_gzip(self.headers.get("accept-encoding", ""))
        response: Response | None = self.app.cache.get((self.path, zipped))
        if response is None:
            response = self._make_tile(self.path[1:], zipped)
            self.app.cache.put((self.path, zipped), response)
        return response

    def _make_tile(self, path: str, zipped: bool) -> Response:
        try:
            level, index, width = parse_tile_path(path)
        except Malformed as error:
            raise HttpError(404, str(error)) from None
        # Serve only what the published tree includes: more may be stored already.
        if self.app.log.published.tree.size >> 8 * (level or 0) < 256 * index + width:
            raise HttpError(404, f"the published tree has no {path}")
        store, headers = self.app.log.store, {**CORS, "Cache-Control": "public, max-age=31536000, immutable"}
        if level is not None:
            return Response(store.tile(level, index, width), OCTETS, headers=headers)
        data, headers["Vary"] = store.bundle(index, width), "Accept-Encoding"
        if zipped and len(data) < MAX_ZIPPED:
            data, headers["Content-Encoding"] = gzip.compress(data, 1, mtime=0), "gzip"
        return Response(data, OCTETS, headers=headers)

    async def _add(self, body: Body) -> Response:
        start = time.monotonic()
        try:
            entry = entry_from_json(parse_json(await body.all(MAX_ADD)))
            submission = await self.app.log.submit(Submission([entry], prove=True))
            if isinstance(outcome := submission.outcomes[0], Conflict):
                raise outcome
        except Error as error:
            self.app.adds.add(0, 0, 1)
            self.app.count(error)
            raise
        self.app.adds.add(time.monotonic() - start)
        self.app.results["logged"] += 1
        answer = b'{"index":%d,"checkpoint":%b,"inclusionProof":["%b"]%b}\n'
        if not (proof := submission.proofs[outcome]):
            answer = answer.replace(b'"%b"]', b"%b]")
        return Response(answer % (outcome, submission.published.json, proof, _publisher_field(outcome)))

    async def _bulk(self, body: Body) -> Response:
        if self.headers.get("content-type", "").partition(";")[0].strip().lower() != NDJSON:
            raise HttpError(415, f"Content-Type must be {NDJSON}")
        start = time.monotonic()
        parsed = await self._read_bulk(body)
        entries = [line for line in parsed if isinstance(line, bytes)]
        outcomes = list[Outcome | Error]()
        if not entries:
            published = self.app.log.published
        else:
            try:
                submission = await self.app.log.submit(Submission(entries, prove=False), self.app.bulk_timeout)
            except Error as error:
                self.app.bulks.add(0, 0, len(entries))
                self.app.count(error, len(entries))
                raise
            published, outcomes = submission.published, [*submission.outcomes]
        lines = list[bytes | str](entries)
        if len(entries) < len(parsed):
            found = iter(outcomes)
            outcomes = [next(found) if isinstance(line, bytes) else line.error for line in parsed]
            lines = [line if isinstance(line, bytes) else line.filename for line in parsed]
        logged = sum(isinstance(outcome, int) for outcome in outcomes)
        self.app.bulks.add(time.monotonic() - start, logged, len(outcomes) - logged)
        self.app.results["logged"] += logged
        if logged < len(outcomes):
            for outcome in outcomes:
                if not isinstance(outcome, int):
                    self.app.count(outcome)
        return Response(self._bulk_answer(published, lines, outcomes), NDJSON)

    async def _read_bulk(self, body: Body) -> list[bytes | Refused]:
        """The entry of each line of the body, or Refused. Parses lines as they arrive. Raises HttpError."""
        if body.length > MAX_BULK:
            raise HttpError(413, f"at most {MAX_BULK} bytes can be appended at once")
        parsed: list[bytes | Refused] = []
        rest = b""
        while data := await body.part():
            block, _, rest = (rest + data).rpartition(b"\n")
            for lines in slices(block):
                parsed += parse_lines(lines)
                if len(parsed) > self.app.max_bulk:
                    break
                await asyncio.sleep(0)  # lets other connections run
            if len(rest) > MAX_ADD or len(parsed) > self.app.max_bulk:
                break
        if len(rest) > MAX_ADD:
            raise HttpError(413, f"a line has more than {MAX_ADD} bytes")
        parsed += parse_lines(rest) if len(parsed) <= self.app.max_bulk else []
        if len(parsed) > self.app.max_bulk:
            raise HttpError(413, f"at most {self.app.max_bulk} entries can be appended at once")
        return parsed

    def _bulk_answer(
        self, published: SignedNote, lines: list[bytes | str], outcomes: list[Outcome | Error]
    ) -> Iterator[list[bytes]]:
        head = b'{"type":"checkpoint","checkpoint":%b,"tree_size":%d}\n'
        yield [head % (published.json, published.tree.size)]
        for at in range(0, len(lines), 256):
            part = outcomes[at : at + 256]
            proofs = self.app.log.proofs(published, [outcome for outcome in part if isinstance(outcome, int)])
            yield _bulk_results(lines[at : at + 256], part, proofs)
        yield [b'{"type":"complete","count":%d}\n' % len(lines)]

    def _entries(self) -> Response:
        query, size = self.query(), self.app.log.published.tree.size
        if query.get("project") and query.keys() <= {"project", "before"}:
            end = min(parse_decimal(query.get("before", str(size))), size)
            found, more = self.app.log.store.of_project(normalize(query["project"]), end, MAX_OF_PROJECT)
            listed = [entry_to_json(index, Entry.parse(data)) for index, data in found]
            return Response.json({"entries": listed, **({"next": more} if more else {})}, CORS)
        if len(query) != 1 or not query.keys() <= {"filename", "checksum"} or "" in query.values():
            raise Malformed("ask for /entries?filename=F, /entries?checksum=C or /entries?project=P")
        [(name, value)] = query.items()
        kind = FILENAME if name == "filename" else CHECKSUM
        matches = self.app.log.store.look_up(kind, value.encode(), size)
        entries = []
        for index, data in matches:
            with contextlib.suppress(Malformed):  # a mirror also stores malformed entries
                if getattr(entry := Entry.parse(data), name) == value:
                    entries.append(entry_to_json(index, entry))
        return Response.json({"entries": entries}, CORS)

    def _entry(self) -> Response:
        index, _, rest = self.path.removeprefix("/entry/").partition("/")
        published = self.app.log.published
        try:
            number = parse_decimal(index)
        except Malformed as error:
            raise HttpError(404, str(error)) from None
        if number >= published.tree.size or rest not in ("", "proof") or self.path.endswith("/"):
            raise HttpError(404, f"there is no {self.path[:80]}: the published size is {published.tree.size}")
        if rest:
            proof = self.app.log.store.proof(number, published.note, self.app.log.tiles(published.tree))
            return Response(proof, TEXT, headers=CORS)
        return Response.json(entry_to_json(number, Entry.parse(self.app.log.store.entry(number))), CORS)

    def _page(self) -> Response:
        return Response(PAGE.encode(), "text/html; charset=utf-8", headers={"Content-Security-Policy": PAGE_POLICY})

    def _metrics(self) -> Response:
        log, witnesses = self.app.log, self.app.log.witnesses
        sizes: list[Sample] = [("", {"tree": "signed"}, log.signed.tree.size)]
        ages: list[Sample] = []
        with contextlib.suppress(Unavailable):
            sizes.append(("", {"tree": "published"}, log.published.tree.size))
            cosigned = [seconds for _, seconds in cosignature_times(log.published.note)]
            ages = [("", {}, max(time.time() - max(cosigned), 0.0))] if cosigned else []
        names = ("logged", "conflict", "refused", "unavailable", "failed")
        failures: list[Sample] = [("", {"witness": w.name}, w.latency.failures) for w in witnesses]
        dark: list[Sample] = [("", {"witness": w.name}, float(bool(w.dark_since))) for w in witnesses]
        times = itertools.chain(*(w.latency.samples(witness=w.name) for w in witnesses))
        return Response("".join([
            metric("btlog_entries_total", "counter", "Entries that clients sent, by result.",
                   [("", {"result": name}, self.app.results[name]) for name in names]),
            metric("btlog_add_seconds", "histogram", "Time of successful adds.", self.app.adds.samples()),
            metric("btlog_bulk_seconds", "histogram", "Time of successful bulks.", self.app.bulks.samples()),
            metric("btlog_publish_seconds", "histogram", "Time from a batch to its published checkpoint.",
                   log.publishing.samples()),
            metric("btlog_witness_seconds", "histogram", "Time of cosignatures, by witness.", times),
            metric("btlog_witness_failures_total", "counter", "Requests that a witness did not cosign.", failures),
            metric("btlog_witness_dark", "gauge", "1 while a witness does not cosign.", dark),
            metric("btlog_tree_size", "gauge", "Entries of the tree.", sizes),
            metric("btlog_queue_entries", "gauge", "Entries that wait to be published.", [("", {}, log.waiting())]),
            metric("btlog_checkpoint_age_seconds", "gauge", "Time since the newest published cosignature.", ages),
            metric("btlog_trouble", "gauge", "1 while the log can't publish.", [("", {}, float(bool(log.trouble)))]),
        ]).encode(), METRICS)

    def _status(self) -> Response:
        folder = self.app.log.store.folder
        files = [path.stat().st_size for path in folder.iterdir() if path.is_file()]
        return Response.json({
            "origin": self.app.log.store.origin,
            "entry_type": "pypi-transparency/v1",
            "storage_dir": str(folder),
            "witness_configured": bool(self.app.log.witnesses),
            "witnesses": [witness.status() for witness in self.app.log.witnesses] or self._cosigned(),
            "generated_at": utc(time.time()),
            "checkpoint": self._checkpoint_status(),
            "latency": self.app.adds.json(),
            "bulk_latency": self.app.bulks.json(),
            "disk": {"bytes": sum(files), "files": len(files)},
            "vkey": encode_vkey(self.app.log.key),
            "second_vkey": encode_vkey(self.app.log.second.key) if self.app.log.second else None,
            "read_only": self.app.read_only,
            "trouble": self.app.log.trouble,
        }, CORS)

    def _cosigned(self) -> list[dict[str, Any]]:
        """The witnesses that cosigned the published checkpoint: the status of a process that asks none itself."""
        try:
            published = self.app.log.published
        except Unavailable:
            return []
        fixed = {"url": "", "size": published.tree.size, "dark_since": None, "error": ""}
        times = cosignature_times(published.note)
        return [{"name": name, "last_cosigned": utc(seconds), **fixed} for name, seconds in times]

    def _checkpoint_status(self) -> dict[str, Any]:
        try:
            published = self.app.log.published
        except Unavailable as error:
            return {"available": False, "error": str(error)}
        return {
            "available": True,
            "tree_size": published.tree.size,
            "root_hash": published.tree.root.hex(),
            "raw_checkpoint": published.note.decode(),
        }

    def _health(self) -> Response:
        if self.app.log.trouble:
            raise Unavailable(f"the log can't publish: {self.app.log.trouble}")
        witnesses, size = [witness.status() for witness in self.app.log.witnesses], self.app.log.published.tree.size
        return Response.json({"status": "ok", "tree_size": size, "witnesses": witnesses}, CORS)

    PAGES: ClassVar[dict[str, Callable[[LogHandler], Response]]] = {
        "/": _page,
        "/checkpoint": _checkpoint,
        "/.well-known/public-key": _key,
        "/entries": _entries,
        "/status.json": _status,
        "/healthz": _health,
        "/metrics": _metrics,
    }


def _publisher_field(outcome: int) -> bytes:
    """The answer's "publisher" field if the file was logged earlier, in an entry with a publisher; else b""."""
    publisher = Entry.parse(outcome.entry).publisher if isinstance(outcome, Earlier) else None
    return b',"publisher":' + json.dumps(publisher._asdict()).encode() if publisher else b""


_LOGGED = b'{"type":"result","result":{"filename":"%b","index":%d,"status":"logged","inclusionProof":["%b"]%b}}\n'


def _bulk_results(
    lines: list[bytes | str], outcomes: list[Outcome | Error], proofs: dict[int, bytes]
) -> list[bytes]:
    """The answers to lines of a bulk, as _bulk_result gives each: faster if all are logged, and none is alone."""
    if set(map(type, outcomes)) != {int} or b"" in proofs.values():
        return [_bulk_result(line, outcome, proofs) for line, outcome in zip(lines, outcomes, strict=True)]
    # No filename has a newline or a backslash: joined by newlines, all of them become one JSON string.
    names = b"\n".join([entry[93:].partition(b"\n")[0] for entry in cast(list[bytes], lines)])
    quoted = json_string(names.decode())[1:-1].encode().split(b"\\n")
    indices = cast(list[int], outcomes)
    return [_LOGGED % (name, index, proofs[index], b"") for name, index in zip(quoted, indices, strict=True)]


def _bulk_result(entry: bytes | str, outcome: int | Error, proofs: dict[int, bytes]) -> bytes:
    """The answer to one line of a bulk. `entry` is the encoded entry, or only a filename for a refused line."""
    name = entry if isinstance(entry, str) else entry[93:].partition(b"\n")[0].decode()
    filename = json_string(name)[1:-1].encode()
    if isinstance(outcome, int):
        line = _LOGGED if proofs[outcome] else _LOGGED.replace(b'"%b"]', b"%b]")
        return line % (filename, outcome, proofs[outcome], _publisher_field(outcome))
    index = b'"index":%d,' % outcome.index if isinstance(outcome, Conflict) else b""
    error = json_string(str(outcome)).encode()
    return b'{"type":"result","result":{"filename":"%b",%b"status":"error","error":%b}}\n' % (filename, index, error)


# --- The witness -----------------------------------------------------------------------------------------------

class Cosigning:
    """A request for a cosignature. Once `done`, it has the cosignature `line` or an error."""

    def __init__(self, origin: str, request: AddCheckpoint) -> None:
        self.origin, self.request, self.line = origin, request, ""
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()


@dataclass(frozen=True)
class About:
    """What a witness says of itself, beside its keys and logs; "" for what it does not."""
    url: str = ""  # its submission prefix and monitoring prefix, as others reach it
    operator: str = ""
    contact: str = ""
    lists: tuple[str, ...] = ()  # the lists of logs that it reads
    every: float = 3600  # seconds between two readings of these


class Witness:
    """Cosigns a checkpoint if it extends the one cosigned last, and stores it before it returns the cosignatures.

    One transaction stores all requests of some turns of the event loop. A `second` signer cosigns the same.
    """

    TURNS = 3  # a commit takes much longer than they do, and the requests that came meanwhile can share the next one

    def __init__(
        self, store: WitnessStore, signer: Signer, clock: Callable[[], float] = time.time,
        second: Signer | None = None, about: About = About(),
    ) -> None:
        self.store, self.signer, self._clock, self.about = store, signer, clock, about
        self.signers = [signer, second] if second else [signer]
        self.trouble = ""
        self.failed = threading.Event()
        self.latency, self.refused = Latency(), Counter[int]()  # by HTTP status
        self._waiting: list[Cosigning] = []
        self._budgets = dict[tuple[str, bool], Budget]()
        for each in self.signers:
            store.claim(each.key)
        self._read_logs()

    def _read_logs(self) -> None:
        self.logs, self.listed = self.store.logs(), self.store.listed()
        self.origins = {hashlib.sha256(origin.encode()).hexdigest(): origin for origin in self.logs}
        self._vkeys = {origin: [encode_vkey(key) for key in keys] for origin, keys in sorted(self.logs.items())}

    def adopt(self, logs: Collection[tuple[str, VerifierKey, Tree]]) -> None:
        """Takes over logs and their last trees from another database of this witness; raises Malformed, BadProof."""
        for origin, key, _ in logs:
            self._check_log(origin, key)
        self.store.adopt(logs)
        self._read_logs()

    def register(self, keys: Collection[VerifierKey]) -> None:
        """Registers logs. Cannot be undone. Raises Malformed if a key is no log's key, or is this witness's own."""
        for key in keys:
            self._check_log(key.name, key)
        new = self.store.register(keys)
        self._read_logs()
        for key in new:
            logger.info("registered the log %s", encode_vkey(key))

    def discover(self, place: str, data: bytes) -> None:
        """Registers the logs in the list `data` from `place` that are new. Raises Malformed if it is no list."""
        logs, faults = parse_log_list(data)
        good = list[ListedLog]()
        for log in logs:
            try:
                self._check_log(log.origin, log.key)
                good.append(log)
            except Malformed as error:
                faults.append(str(error))
        new = self.store.discover(good)
        if new:
            self._read_logs()
        for fault in faults[:MAX_TOLD]:
            logger.warning("%s: %s", place, fault)
        for log in new[:MAX_TOLD]:
            logger.info("registered the log %s, of %s, from %s", log.origin, encode_vkey(log.key), place)
        if len(new) > MAX_TOLD:
            logger.info("registered %d more logs from %s", len(new) - MAX_TOLD, place)

    def _check_log(self, origin: str, key: VerifierKey) -> None:
        if key.kind != ED25519:
            raise Malformed(f"{encode_vkey(key)} is not the key of a log: its type is not 0x01")
        if self.signer.name in (origin, key.name) or key.key == self.signer.key.key:
            raise Malformed(f"{encode_vkey(key)} has the name or the key of this witness: it can't be a log's")

    async def cosign(self, origin: str, request: AddCheckpoint) -> str:
        """The cosignature line to answer with; raises Unavailable and the errors of witness_step."""
        if self.failed.is_set():
            raise Unavailable(self.trouble)
        job = Cosigning(origin, request)
        self._waiting.append(job)
        if len(self._waiting) == 1:
            self._soon(self.TURNS)
        await job.done
        return job.line

    def _soon(self, turns: int) -> None:
        loop = asyncio.get_running_loop()
        if turns:
            loop.call_soon(self._soon, turns - 1)
        else:
            self._process()
            loop.call_soon(self._tidy)  # once the answers, whose turn comes first, are sent

    def check(self) -> None:
        """Raises Unavailable while the database can't be written, or the clock is behind the last cosignature."""
        if self.trouble and not self.failed.is_set():
            self.store.database.probe()
            self.trouble = ""
        if self.trouble:
            raise Unavailable(f"the witness can't cosign: {self.trouble}")
        [(seconds,)] = self.store.database.read("SELECT max(seconds) FROM log")
        if (seconds or 0) > self._clock() + MAX_SKEW:
            raise Unavailable(f"the witness has cosigned at {utc(seconds)}, ahead of its clock. Its times never go "
                              "back, so they stay there until then. Set the clock, or start over with a new key")

    def _process(self) -> None:
        batch, self._waiting = self._waiting, []
        errors: list[Error | None] = [None] * len(batch)
        try:
            with self.store.database.transaction() as db:
                for i, job in enumerate(batch):
                    try:
                        job.line = self._cosign(db, job)
                    except Error as error:
                        errors[i] = error
            self.trouble = ""
        except Error as error:
            self.trouble = str(error)
            logger.critical("%s", error)
            if isinstance(error, (CommitFailed, Corrupt)):  # it is unknown what the disk has: only a restart helps
                self.failed.set()
            errors = [Unavailable(str(error))] * len(batch)
        for job, failure in zip(batch, errors, strict=True):
            if not job.done.done():
                if failure:
                    job.done.set_exception(failure)
                else:
                    job.done.set_result(None)

    def _tidy(self) -> None:
        if not self.trouble:
            try:
                self.store.database.tidy()
            except Error as error:
                self.trouble = str(error)
                logger.critical("%s", error)

    def _cosign(self, db: sqlite3.Connection, job: Cosigning) -> str:
        last = self.store.last(job.origin, lambda sql, *values: db.execute(sql, values).fetchall())
        now = int(self._clock())
        try:
            new, line = witness_step(last, self.logs[job.origin], job.request, self.signers, now)
        except BadProof as error:
            if last:
                self._accuse(db, job, last, str(error))
            raise
        self._spend(job.origin, last is None or new.tree != last.tree)
        self.store.update(db, job.origin, last, new)
        return line

    def _spend(self, origin: str, grows: bool) -> None:
        """Counts a request against what a list allows the log; raises HttpError if that is spent.

        Anybody can send a published checkpoint again. This has a budget of its own, so that it does not keep back a
        larger tree, which only the log can sign.
        """
        if origin in self.listed:
            (qpd, _), now = self.listed[origin], self._clock()
            budget = self._budgets.setdefault((origin, grows), Budget(qpd, now))
            if wait := budget.take(now):
                message = f"the log {origin} has sent the {qpd} requests that it may send in a day"
                raise HttpError(429, message, Retry_After=str(math.ceil(wait)))

    def status(self) -> dict[str, Any]:
        """What this witness is, whom it cosigns for, and how far."""
        rows = {origin: (size, seconds) for origin, size, seconds in
                self.store.database.read("SELECT origin, size, seconds FROM log")}
        logs = []
        for origin, vkeys in self._vkeys.items():
            size, seconds = rows.get(origin, (0, 0))
            qpd, contact = self.listed.get(origin, (None, None))
            logs.append({"origin": origin, "vkeys": vkeys, "size": size,
                         "last_cosigned": utc(seconds) if seconds else None, "qpd": qpd, "contact": contact})
        about = self.about
        return {
            "name": self.signer.name,
            "vkeys": [encode_vkey(as_witness(signer.key)) for signer in self.signers],
            "url": about.url, "operator": about.operator, "contact": about.contact,
            "log_lists": list(about.lists), "log_lists_read_every_seconds": about.every if about.lists else None,
            "logs": logs,
        }

    def _accuse(self, db: sqlite3.Connection, job: Cosigning, last: Witnessed, error: str) -> None:
        """Stores and logs as evidence two checkpoints that a log has signed, and that no proof shows to be consistent.

        Two roots for one size prove a fork. For two sizes, the client may have left out a good proof: that proves none.
        """
        text, kept = keep_signed(job.request.note, self.logs[job.origin])
        tree = Checkpoint.parse(text).tree
        if tree == last.tree:
            return
        forked = tree.size == last.tree.size
        reason = f"{'two trees of one size' if forked else 'a proof that does not verify'}: {error}"
        offered = f"{text}\n{''.join(kept)}".encode()
        if self.store.accuse(db, job.origin, forked, reason, (last.note, offered)):
            level = logging.CRITICAL if forked else logging.WARNING
            notes = json.dumps([note.decode() for note in (last.note, offered)])
            logger.log(level, "the log %s: %s; cosigned, and offered: %s", job.origin, reason, notes)


ABOUT = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
code, pre { font-size: 0.875rem; overflow-wrap: anywhere; white-space: pre-wrap; }
pre { border: 1px solid; padding: 1rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: 0.25rem 0.5rem; border-bottom: 1px solid; vertical-align: top; }
</style>
<h1>{name}</h1>
<p>A witness of transparency logs (<a href="https://c2sp.org/tlog-witness">c2sp.org/tlog-witness</a>). It cosigns a
log's checkpoint only if that extends what it cosigned before. As JSON: <a href="status.json">status.json</a>.</p>
<h2>To trust it</h2>
<pre>{vkeys}</pre>
<p>Submission prefix and monitoring prefix: <code>{url}</code></p>
<h2>To be cosigned by it</h2>
<p>{lists}</p>
<h2>To add it to a list of witnesses</h2>
<pre>{join}</pre>
<h2>{count} logs</h2>
<table><tr><th>origin<th>size<th>last cosigned<th>requests a day</tr>
{rows}
</table>
</html>
"""


def about_page(status: dict[str, Any], host: str) -> str:
    """The page of a witness with this `status`, which was reached by the name `host`."""
    url, lists = status["url"] or f"http://{host}", status["log_lists"]
    seconds = status["log_lists_read_every_seconds"]
    read = f"new logs are taken from {', '.join(lists)}, which {'is' if len(lists) == 1 else 'are'} read every " \
        f"{seconds:g} seconds" if lists else "its operator configures each log"
    contact = status["contact"] or "(contact)"
    join = "".join(f"{line}\n" for line in (
        f"Operator: {status['operator'] or '(name)'}",
        f"Contact: {contact}",
        f"About page: {url}/",
        f"Submission prefix: {url} (add-checkpoint: {url}/add-checkpoint)",
        f"Monitoring prefix: {url}",
        *(f"Verifier key: {vkey}" for vkey in status["vkeys"]),
        f"Logs: {read}. What is configured once is never removed or changed by a list.",
    ))
    rows = [
        "".join(f"<td>{html.escape(printable(str(word)))}" for word in (
            log["origin"], log["size"], log["last_cosigned"] or "never", log["qpd"] or "any number"))
        for log in status["logs"][:MAX_LISTED]
    ]
    left = len(status["logs"]) - len(rows)
    more = [f"<td colspan=4>and {left} more: see status.json"] if left else []
    values = {
        "name": status["name"], "vkeys": "\n".join(status["vkeys"]), "url": url, "join": join,
        "count": str(len(status["logs"])),
        "lists": f"{read[0].upper()}{read[1:]}. To add a log, write to: {contact}",
    }
    page = {name: html.escape(value) for name, value in values.items()}
    page["rows"] = "\n".join(f"<tr>{row}</tr>" for row in rows + more)
    return re.sub(r"\{(\w+)\}", lambda match: page[match[1]], ABOUT)


class WitnessHandler(Handler):
    """The routes of the witness."""

    app: Witness

    def allowed(self) -> tuple[str, ...]:
        return ("POST",) if self.path == "/add-checkpoint" else ("GET", "HEAD")

    def do_GET(self) -> Response:
        routes = {"/healthz": self._health, "/metrics": self._metrics, "/status.json": self._status, "/": self._about}
        return routes.get(self.path, self._checkpoint)()

    def do_POST(self, body: Body) -> Coroutine[Any, Any, Response]:
        return self._measured(body)

    def _status(self) -> Response:
        return Response.json(self.app.status(), CORS)

    def _about(self) -> Response:
        page = about_page(self.app.status(), self.headers.get("host", ""))
        headers = {"Content-Security-Policy": page_policy(ABOUT), "Cache-Control": "no-cache"}
        return Response(page.encode(), "text/html; charset=utf-8", 200, headers)

    async def _measured(self, body: Body) -> Response:
        start = time.monotonic()
        try:
            response = await self._add_checkpoint(body)
        except Error as error:
            self.app.refused[error.status] += 1
            raise
        if response.status == 200:
            self.app.latency.add(time.monotonic() - start)
        else:
            self.app.refused[response.status] += 1
        return response

    async def _add_checkpoint(self, body: Body) -> Response:
        request = AddCheckpoint.parse(await body.all(MAX_ADD_CHECKPOINT))
        origin = parse_text(request.note).partition("\n")[0]
        # "If the checkpoint origin is unknown, the witness MUST respond with a "404 Not Found" HTTP status code."
        if origin not in self.app.logs:
            text = split_note(request.note)[0]
            Checkpoint.parse("any" * bool(origin) + text[len(origin) :])  # a malformed checkpoint gets 400, not 404
            raise HttpError(404, f"the log {origin} is not known here")
        try:
            line = await self.app.cosign(origin, request)
        except Stale as error:
            # "the tree size … in decimal, followed by a newline … a `Content-Type` of `text/x.tlog.size`"
            return Response(f"{error.size}\n".encode(), "text/x.tlog.size", 409)
        return Response(line.encode(), TEXT)

    def _checkpoint(self) -> Response:
        """The last cosigned checkpoint of the log whose origin has the SHA-256 (in hex) that the path names."""
        name, _, rest = self.path[1:].partition("/")
        origin = self.app.origins.get(name) if rest == "checkpoint" else None
        last = self.app.store.last(origin) if origin else None
        if last is None or not last.note:  # a log from `adopt` has no note yet
            raise HttpError(404, "there is nothing here, or not yet")
        return Response(last.note, TEXT, headers={**CORS, "Cache-Control": "no-cache"})

    def _metrics(self) -> Response:
        witness = self.app
        refused: list[Sample] = [("", {"status": str(n)}, count) for n, count in sorted(witness.refused.items())]
        known = witness.store.database.read("SELECT origin, size, seconds FROM log ORDER BY origin")
        evidence = witness.store.database.read("SELECT origin, count(*) FROM evidence WHERE forked GROUP BY origin")
        return Response("".join([
            metric("btlog_cosign_seconds", "histogram", "Time of cosigned requests.",
                   witness.latency.samples()),
            metric("btlog_refused_total", "counter", "Requests that were not cosigned, by HTTP status.", refused),
            metric("btlog_log_size", "gauge", "The last cosigned size, by log.",
                   [("", {"log": origin}, size) for origin, size, _ in known]),
            metric("btlog_log_cosigned_timestamp_seconds", "gauge", "Time of the last cosignature, by log.",
                   [("", {"log": origin}, seconds) for origin, _, seconds in known]),
            metric("btlog_forks", "gauge", "Pairs of checkpoints of one size with different roots, by log.",
                   [("", {"log": origin}, count) for origin, count in evidence]),
            metric("btlog_trouble", "gauge", "1 while it can't cosign.", [("", {}, float(bool(witness.trouble)))]),
        ]).encode(), METRICS)

    def _health(self) -> Response:
        self.app.check()
        return Response.json({"status": "ok", "logs": len(self.app.logs)}, CORS)


# --- Publishers: attestations (PEP 740), and the certificates in them (RFC 5280, in DER) -------------------------
# Nothing here verifies an attestation: the log has the publisher that the index states, for its owner to see.

MAX_PROVENANCE, MAX_PUBLISHERS = 1 << 20, 8  # bytes of a provenance object; publishers that one file is logged with
SUBJECT_NAME = bytes.fromhex("551d11")  # 2.5.29.17, subjectAltName
# 1.3.6.1.4.1.57264.1.1 has the issuer as bare text; 1.3.6.1.4.1.57264.1.8, which replaces it, as a UTF8String.
BARE_ISSUER, ISSUER = bytes.fromhex("2b0601040183bf300101"), bytes.fromhex("2b0601040183bf300108")
# What an index knows of a publisher by itself: a CI service's issuer, and its form of a subject.
PUBLISHERS = {
    "GitHub": ("https://token.actions.githubusercontent.com",
               "https://github.com/{repository}/.github/workflows/{workflow}"),
    "GitLab": ("https://gitlab.com", "https://gitlab.com/{repository}//{workflow_filepath}"),
    "Google": ("https://accounts.google.com", "{email}"),
}


def parse_der(data: bytes) -> list[tuple[int, bytes]]:
    """The tag and the contents of each of the values that `data` consists of (X.690); raises Malformed."""
    values, at = list[tuple[int, bytes]](), 0
    while at < len(data):
        tag, size = data[at], data[at + 1] if at + 1 < len(data) else 128
        more = max(size - 128, 0)  # the bytes that follow with the length, if it is over 127
        length = int.from_bytes(data[at + 2 : at + 2 + more], "big") if more else size
        # "The definite form of length encoding shall be used, encoded in the minimum number of octets." (section 10.1)
        minimal = size != 128 and more <= 3 and (not more or length >= max(128, 1 << 8 * (more - 1)))
        end = at + 2 + more + length
        if tag & 31 == 31 or not minimal or end > len(data):
            raise Malformed(f"not DER, at byte {at} of {len(data)}: a tag of more than one byte, a length that is not "
                            "the shortest, or an end in the middle of a value")
        values.append((tag, data[at + 2 + more : end]))
        at = end
    return values


def _only(tag: int, data: bytes) -> bytes:
    """The contents of the one value that `data` has to be, of this tag; raises Malformed."""
    values = parse_der(data)
    if len(values) != 1 or values[0][0] != tag:
        raise Malformed(f"not one value of DER with tag {tag:#x}")
    return values[0][1]


def certificate_extensions(der: bytes) -> dict[bytes, bytes]:
    """The extensions of an X.509 certificate by their object identifiers, in DER; raises Malformed."""
    parts = parse_der(_only(0x30, der))
    if [tag for tag, _ in parts] != [0x30, 0x30, 3]:
        raise Malformed("not a certificate (RFC 5280 section 4.1)")
    extensions: dict[bytes, bytes] = {}
    for tag, inside in parse_der(parts[0][1]):
        for kind, extension in parse_der(_only(0x30, inside)) if tag == 0xA3 else ():
            words = parse_der(extension) if kind == 0x30 else []
            if words[1:2] == [(1, b"\xff")]:  # it is critical
                del words[1]
            # "A certificate MUST NOT include more than one instance of a particular extension."
            if [tag for tag, _ in words] != [6, 4] or words[0][1] in extensions:
                raise Malformed("a certificate with a malformed extension, or with one extension twice")
            extensions[words[0][1]] = words[1][1]
    return extensions


def certificate_publisher(der: bytes) -> Publisher | None:
    """The identity for which a certificate of Sigstore was issued; None if it names none; raises Malformed."""
    extensions = certificate_extensions(der)
    issuers = {extensions[BARE_ISSUER]} if BARE_ISSUER in extensions else set[bytes]()
    issuers |= {_only(0x0C, extensions[ISSUER])} if ISSUER in extensions else set()
    if SUBJECT_NAME not in extensions or not issuers:
        return None
    names = parse_der(_only(0x30, extensions[SUBJECT_NAME]))
    if len(names) != 1 or names[0][0] not in (0x86, 0x81) or len(issuers) != 1:  # a URI, or an e-mail address
        raise Malformed("a certificate with more than one identity")
    try:
        return Publisher(issuers.pop().decode(), names[0][1].decode("ascii"))
    except UnicodeDecodeError:
        raise Malformed("a certificate with an identity that is not text") from None


def parse_provenance(data: bytes, checksum: str) -> dict[Publisher, str]:
    """The publishers of a file by its provenance object, each with where that is from: "certificate" or "index".

    `checksum` is the file's. Raises Malformed.
    """
    found: dict[Publisher, str] = {}
    try:
        for bundle in json.loads(data)["attestation_bundles"]:
            certified = [_attested(attestation, checksum) for attestation in bundle["attestations"]]
            if publishers := [publisher for publisher in certified if publisher]:
                found |= dict.fromkeys(publishers, "certificate")
            else:
                words = {name: word for name, word in bundle["publisher"].items() if isinstance(word, str)}
                issuer, subject = PUBLISHERS[words["kind"]]
                found[Publisher(issuer, subject.format_map(words))] = "index"
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise Malformed(f"not a provenance object of a known kind: {type(error).__name__}: {error}"[:200]) from None
    for publisher in found:
        encode_entry("x", checksum, *publisher)  # raises Malformed for what no entry can hold
    if not 0 < len(found) <= MAX_PUBLISHERS:
        raise Malformed(f"a provenance object with {len(found)} publishers")
    return found


def _attested(attestation: Any, checksum: str) -> Publisher | None:
    """The publisher in an attestation's certificate; None if it has none. Raises Malformed if it is of another file."""
    statement = json.loads(parse_base64(attestation["envelope"]["statement"]))
    if [f"sha256:{subject['digest']['sha256']}" for subject in statement["subject"]] != [checksum]:
        raise Malformed("an attestation of another file")
    certificate = attestation["verification_material"].get("certificate")
    return certificate_publisher(parse_base64(certificate)) if certificate else None


# --- An index: the simple repository API, in JSON (PEP 691) or HTML (PEP 503) ----------------------------------

JSON_PAGE, HTML_PAGE = "application/vnd.pypi.simple.v1+json", "application/vnd.pypi.simple.v1+html"


class Unchanged(Error):
    """A page is still the one that was read before."""


class IndexFile(NamedTuple):
    """A file of an index: its name and its checksum ("" if none), and as `other` those that pip reads, if they differ.

    pip reads the name in the URL and the hash in its fragment; uv reads `filename` and `hashes`.
    """
    name: str
    checksum: str
    other: tuple[str, str] | None = None
    metadata: str = ""  # the checksum of the metadata that can be had apart from it (PEP 658)
    provenance: str = ""  # the URL of its attestations (PEP 740)

    def readings(self) -> list[tuple[str, str]]:
        """All pairs of a name and a checksum that some installer may read."""
        name, checksum = self.other or (self.name, self.checksum)
        return list(itertools.product(dict.fromkeys((self.name, name)), dict.fromkeys((self.checksum, checksum))))


_LINK_HASH = re.compile(r"[#&](sha512|sha384|sha256|sha224|sha1|md5)=([^&]*)")  # pip takes the first match


def index_file(filename: str, url: str, sha256: Any, metadata: Any = None, provenance: Any = None) -> IndexFile:
    """The file that a page links to. In HTML, `filename` and `sha256` are empty: both come from the URL."""
    link_name, link, checksum = url_name(url), _LINK_HASH.search(url), _checksum(sha256)
    link_sum = checksum if link is None else _checksum(link[2]) if link[1] == "sha256" else ""
    name, checksum = filename or link_name, checksum or link_sum
    other = None if (link_name, link_sum) == (name, checksum) else (link_name, link_sum)
    return IndexFile(name, checksum, other, _checksum(metadata), provenance if isinstance(provenance, str) else "")


class IndexProject(NamedTuple):
    """A project that an index lists: its name, and the number of its last change ("" if the index does not say)."""
    name: str
    serial: str = ""


def joined(base: str, url: str) -> str:
    """A URL that stands in the page at `base`, made absolute; raises ValueError."""
    if re.fullmatch(r"https?://[A-Za-z0-9.:-]+/[A-Za-z0-9._~/%+-]*(#[A-Za-z0-9=]+)?", url):
        return url  # as nearly all are, on pages that list thousands
    return urllib.parse.urljoin(base, url)


class _Links(html.parser.HTMLParser):
    """Collects the URLs of a PEP 503 page: the href of each <a>, even if no </a> follows."""

    def __init__(self, url: str) -> None:
        super().__init__(convert_charrefs=False)
        self.links, self._base, self._url, self._room = list[str](), "", url, MAX_PAGE

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        href = dict(attrs).get("href")
        if tag == "base" and href and not self._base:
            self._base = urllib.parse.urljoin(self._url, href)
        if tag == "a" and href is not None:
            if len(self.links) >= 3 * MAX_FILES:
                raise ValueError(f"more than {3 * MAX_FILES} links")
            link = joined(self._base or self._url, href)
            self._room -= len(link)
            if self._room < 0:
                raise ValueError("its links are too long")
            self.links.append(link)


def parse_links(data: bytes, page: _Links) -> list[str]:
    """The absolute URLs of an HTML page's links; raises ValueError. Time and memory are linear in the page's size."""
    if any(tag.end() - tag.start() > 65536 for tag in re.finditer(rb"<[^>]*", data)) or data.count(b"<![") > 100 or (
        data.count(b"<") > 5 * MAX_FILES
    ):
        raise ValueError(f"a tag of more than 64 KiB, more than 100 marked sections, or more than {5 * MAX_FILES} tags")
    step = 1 << 20
    decode = codecs.getincrementaldecoder("utf-8")().decode
    for at in range(0, len(data) or 1, step):
        page.feed(decode(data[at : at + step], at + step >= len(data)))
    page.close()
    return page.links


def _slim(pairs: list[tuple[str, Any]]) -> Any:
    """The part of an index's JSON object that is used; None if there is none. Drops the rest to save memory."""
    fields = dict(pairs)
    if "filename" in fields:
        if not isinstance(fields["filename"], str) or not isinstance(fields.get("url"), str):
            raise ValueError("a file without a name or a URL")
        metadata = fields.get("core-metadata", fields.get("dist-info-metadata"))
        return index_file(fields["filename"], fields["url"], fields.get("hashes"), metadata, fields.get("provenance"))
    if lists := {key: fields[key] for key in ("files", "projects") if key in fields}:
        return lists
    if isinstance(name := fields.get("name"), str) and "sha256" not in fields:
        serial = fields.get("_last-serial", "")
        return IndexProject(name, serial if re.fullmatch("[0-9]{1,20}", str(serial)) else "")
    return fields.get("sha256")


def parse_index_json(data: bytes, key: str) -> list[Any]:
    """The array `key` of a JSON page, each object reduced by _slim; raises ValueError, RecursionError.

    Refuses pages that would take far more memory than their size, such as millions of empty arrays.
    """
    values, size = (3 if key == "files" else 6) * MAX_FILES, MAX_PAGE if data.isascii() else MAX_PAGE // 4
    if data.count(b",") > values or data.count(b"[") > MAX_FILES // 5 or len(data) > size:
        raise ValueError("it has too many values")
    text = data.decode()
    del data
    page = json.loads(text, object_pairs_hook=_slim, parse_int=lambda text: text[:20], parse_float=lambda text: "")
    items, wanted = page.get(key) if isinstance(page, dict) else None, IndexFile if key == "files" else IndexProject
    if not isinstance(items, list) or not all(isinstance(item, wanted) for item in items):
        raise ValueError(f"it has no array {key!r}, or one with wrong items")
    return items


def credentials(url: str) -> dict[str, str]:
    """The header with the user's name and password for a server: from the environment, else from the netrc file (that
    of NETRC, or ~/.netrc), else none. Raises Malformed, and no message has any of it."""
    name, password = (os.environ.get(f"BTLOG_INDEX_{what}", "") for what in ("USERNAME", "PASSWORD"))
    path = os.environ.get("NETRC") or os.path.expanduser("~/.netrc")
    if not (name or password) and os.path.exists(path):
        try:
            found = netrc.netrc(path).authenticators(urllib.parse.urlsplit(url).hostname or "")
        except netrc.NetrcParseError as error:
            raise Malformed(f"{path} can't be parsed: line {error.lineno}") from None
        except (OSError, UnicodeDecodeError) as error:
            raise Malformed(f"{path} can't be read: {type(error).__name__}") from None
        name, password = (found[0], found[2] or "") if found else ("", "")
    return {"Authorization": f"Basic {to_base64(os.fsencode(f'{name}:{password}'))}"} if name or password else {}


def server_of(url: str) -> str:
    """The scheme, host and port of a URL, as its beginning; raises ValueError."""
    parts = urllib.parse.urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}".lower()


class Index:
    """A package index at a URL, as in pip's --index-url."""

    def __init__(self, url: str, attempts: int = 5, timeout: float = 30, give_up: int = 0) -> None:
        self.source = Fetcher(url, attempts, timeout, give_up)
        self.credentials = credentials(url)

    def projects(self) -> list[str]:
        """The names of all projects that the index lists; raises Unavailable."""
        return [project.name for project in self.listing()]

    def listing(self) -> list[IndexProject]:
        """All projects that the index lists; raises Unavailable."""
        if (page := self._page("/", "projects", MAX_PAGE)) is None:
            raise Unavailable(f"{self.source.url} does not list its projects: name them on the command line")
        url, items = page
        if url is None:
            return items
        links = [link for link in items if link.startswith(url)]
        matches = [re.fullmatch(r"([^/?#]+)/?", link[len(url) :]) for link in links]
        names = [urllib.parse.unquote(match[1]) for match in matches if match]
        if items and not names:
            raise Unavailable(f"{url} has links, and none of them leads to a project below it")
        return list(map(IndexProject, names))

    def files(self, project: str, limit: int = MAX_AHEAD, validator: str = "") -> list[IndexFile] | None:
        """The files of a project; None if the index has no such project, or redirects to another index (status 303).

        A name may occur more than once, since installers differ in which file they take. Raises Unavailable; and
        Unchanged if the page is still the one that had this `validator`.
        """
        path = f"/{urllib.parse.quote(normalize(project), errors='replace')}/"
        if (page := self._page(path, "files", limit, validator)) is None:
            return None
        if page[0] is None:
            return page[1]
        if len(page[1]) > MAX_FILES:
            raise Unavailable(f"{self.source.url}{path[:80]} has more than {MAX_FILES} links")
        links = page[1][::-1]
        page[1].clear()  # each link's memory is needed for what is read from the next
        files = [index_file("", links.pop(), "") for _ in range(len(links))]
        return [file for file in files if file.name.endswith(DISTRIBUTIONS) or file.checksum]

    def each(self, projects: Sequence[str]) -> Iterator[tuple[str, list[IndexFile] | Unavailable | None]]:
        """Yields each project with its files or its error. A large page is not read ahead, but in its turn."""
        for project, ahead in zip(projects, self.source.each(self._files, projects), strict=True):
            yield project, self._files(project, MAX_PAGE) if isinstance(ahead, TooLarge) else ahead

    def _files(self, project: str, limit: int = MAX_AHEAD) -> list[IndexFile] | Unavailable | None:
        try:
            return self.files(project, limit)
        except Unavailable as error:
            error.__context__ = None  # it refers to the page, which may be large
            return error.with_traceback(None)

    def page(self, path: str, limit: int, validator: str = "") -> tuple[str, list[bytes], str] | None:
        """The type of a page (JSON_PAGE or "text/html"), its bytes in a list, and its URL; None if there is none.

        Whoever pops the bytes off the list has the only reference to a large page. Raises Unavailable, Unchanged.
        """
        headers = {"Accept": f"{JSON_PAGE}, text/html;q=0.1", **self.credentials}
        if validator:
            headers["If-None-Match" if validator.startswith(('"', "W/")) else "If-Modified-Since"] = validator
        for _ in range(MAX_REDIRECTS + 1):
            answer = self.source.fetch(path, headers, limit, (301, 302, 303, UNCHANGED, 307, 308))
            last = self.source.last
            if last.status == UNCHANGED and not validator:
                raise Unavailable(f"{self.source.url}{path[:80]} answers 304 to a plain request")
            if last.status == UNCHANGED:
                raise Unchanged(f"{self.source.url}{path[:80]} has not changed")
            if not last.redirects:
                break
            if not (target := self.source.redirected(path)):
                if last.status == 303:  # pypiserver redirects to another index for a project that it lacks
                    return None
                raise Unavailable(f"{self.source.url}{path[:80]} leads elsewhere: {printable(last.location[:200])}")
            path = target
        else:
            raise Unavailable(f"{self.source.url}{path[:80]}: more than {MAX_REDIRECTS} redirects")
        if answer is None:
            return None
        url, kind = f"{self.source.url}{path}", answer[0].partition(";")[0].strip().lower()
        if kind in (JSON_PAGE, "application/json"):
            return JSON_PAGE, [answer[1]], url
        if kind in (HTML_PAGE, "text/html"):
            return "text/html", [answer[1]], url
        raise Unavailable(printable(f"{url[:200]} is no page of a package index: its type is {kind or 'missing'}"))

    def _page(
        self, path: str, key: str, limit: int, validator: str = ""
    ) -> tuple[str | None, list[Any]] | None:
        """(None, array `key`) for a JSON page, (URL, links) for an HTML page, None for no page; raises Unavailable."""
        if (page := self.page(path, limit, validator)) is None:
            return None
        kind, body, url = page
        try:
            if kind == JSON_PAGE:
                if serial := re.search(rb'"_last-serial" ?: ?"?([0-9]{1,20})\b', body[0]):
                    self.source.note_serial(serial[1].decode())
                return None, parse_index_json(body.pop(), key)
            return url, parse_links(body.pop(), _Links(url))
        except (ValueError, RecursionError, AssertionError) as error:  # html.parser raises AssertionError
            reason = f"{url[:200]} is no page of a package index: {error}"
            raise Unavailable(printable(reason[:400])) from None


def _checksum(sha256: Any) -> str:
    text = f"sha256:{sha256}".lower()
    return text if re.fullmatch(r"sha256:[0-9a-f]{64}", text) else ""


class Comparison:
    """Compares what the log has with what an index serves."""

    CHUNK = 20_000  # entries at a time
    MISSING = 10_000  # unlogged files to remember by name

    def __init__(self, store: MirrorStore, index: Index, renew: Callable[[], object]) -> None:
        self._store, self._index, self._renew = store, index, renew
        self._missing: list[tuple[str, str, str]] = []  # project, filename and checksum
        self._more = 0  # further unlogged files
        self._errors: list[Unavailable] = []
        self._unread = set[str]()  # projects whose page could not be read in this round
        self._before = set[str]()  # the same for the last round

    def round(self) -> Iterator[Finding]:
        """Compares the new entries, all files of their projects, and all files of the projects compared longest ago.

        A file that seems unlogged may have been logged after the log was read. So `renew` reads the log again first.
        """
        self._missing, self._more, self._errors = [], 0, []
        self._before, self._unread = self._unread, set()
        self._index.source.again()
        yield from self._round()
        if self._errors:
            lost = isinstance(self._errors[-1], Unreachable)
            raise Unavailable(f"{len(self._errors)} pages of the index were not read; the first: {self._errors[0]}"
                              f"{'. It is not asked any more in this round' if lost else ''}")

    def _pages(self, projects: Iterable[str]) -> Iterator[tuple[str, list[IndexFile] | None]]:
        """Yields each project with its files. Skips unreadable pages; ends once the index is unreachable."""
        names = sorted(projects, key=self._before.__contains__)  # pages that were unreadable last time come last
        for project, files in self._index.each(names):
            if not isinstance(files, Unavailable):
                yield project, files
                continue
            self._errors.append(files)
            self._unread.add(project)
            if isinstance(files, Unreachable):
                return

    def _round(self) -> Iterator[Finding]:
        size = self._store.tree("signed").size
        start = done = self._store.setting("compared") or 0
        turn = (self._store.setting("turn") or 0) + 1  # counts rounds: a clock may stand still, or go back
        for first in range(start, size, self.CHUNK):
            last = min(first + self.CHUNK, size)
            yield from self._compare(first, last, done, turn)
            yield from self._not_logged()
            if self._errors and isinstance(self._errors[-1], Unreachable):
                return
            done = last if not self._errors else done  # after an error, the next round starts here again
            self._store.compared(done, (), turn)
        waiting = "SELECT name FROM project WHERE compared < ? ORDER BY compared LIMIT ?"
        names = [name for name, in self._store.query(waiting, turn, MAX_COMPARED) if name not in self._unread]
        for project, files in self._pages(names):
            yield from self._compare_checksums(project, files or [], size)
            self._store.compared(done, [project], turn)
        self._store.compared(done, self._unread, turn)
        yield from self._not_logged()

    def _compare(self, first: int, last: int, done: int, turn: int) -> Iterator[Finding]:
        """Compares entries `first` to `last` (exclusive) and their projects. All below `done` are compared already."""
        projects: dict[str, list[tuple[int, str]]] = {}
        for n in range(first // 256, (last + 255) // 256):
            for at, match in enumerate(match_entries(self._store.bundled(n, min(256, last - 256 * n))), 256 * n):
                if match and at >= first and (project := project_of(match[2])):
                    projects.setdefault(project, []).append((at, match[2]))
        size, compared = self._store.tree("signed").size, list[str]()
        for project, files in self._pages(projects):
            compared.append(project)
            wanted = {name for _, name in projects[project]}
            names = {name for file in files or () for name, _ in file.readings() if name in wanted}
            names |= {f"{file.name}.metadata" for file in files or () if file.metadata}
            for at, name in projects[project]:
                if name not in names and not self._in_shorter_project(project, name):
                    yield Finding("not-on-index", f"{name} is logged at index {at}, but not in the index", (at,))
            yield from self._compare_checksums(project, files or [], size)
        self._store.compared(done, compared, turn)

    def _in_shorter_project(self, project: str, name: str) -> bool:
        """True if a shorter-named project has the file: an old sdist's name does not tell where its version begins."""
        if name.endswith((".whl", ".egg")):  # these names tell it
            return False
        words = name.split("-")
        shorter = sorted({normalize("-".join(words[:n])) for n in range(1, min(len(words), 6))} - {project})
        errors = len(self._errors)
        for _, files in self._pages(shorter):
            if any(name == other for file in files or () for other, _ in file.readings()):
                return True
        return len(self._errors) > errors  # an unreadable page may have it: report nothing

    def _compare_checksums(self, project: str, files: list[IndexFile], size: int) -> Iterator[Finding]:
        """Yields files whose checksum in the index differs from the log's. Remembers files that the log lacks."""
        readings = itertools.chain(
            (reading for file in files for reading in (file.readings() if file.other else [file[:2]])),
            ((f"{file.name}.metadata", file.metadata) for file in files if file.metadata))  # which need not be logged
        while part := list(itertools.islice(readings, 1000)):
            known = self._store.look_up_names([name.encode(errors="replace") for name, _ in part], size)
            for name, checksum in dict.fromkeys(part):
                sums = known.get(name.encode(errors="replace"), {})
                if not sums and name.endswith(".metadata"):
                    continue
                if not sums and len(self._missing) < self.MISSING:
                    self._missing.append((project, name, checksum))
                elif not sums:
                    self._more += 1
                elif checksum not in sums:
                    logged, at = next(iter(sums.items()))
                    ours = f"the log has it with {logged} at index {at}"
                    text = f"the index has {name} with {checksum or 'no SHA-256'}, but {ours}"
                    yield Finding("index-differs", text, (at,), self._evidence(project, name, checksum))

    @staticmethod
    def _evidence(project: str, name: str, checksum: str) -> dict[str, bytes]:
        return {"index.json": json.dumps({"project": project, "filename": name, "checksum": checksum}).encode()}

    def _not_logged(self) -> Iterator[Finding]:
        """Yields the files that the log still lacks after it is read again."""
        if self._missing:
            self._renew()
            size = self._store.tree("signed").size
            for project, name, checksum in self._missing:
                if not self._store.look_up(FILENAME, name.encode(errors="replace"), size):
                    text = f"{name} of {project} is in the index, but not in the log"
                    yield Finding("not-logged", text, (), self._evidence(project, name, checksum))
        if self._more:
            yield Finding("not-logged", f"{self._more} more files are in the index, but not in the log")
        self._missing, self._more = [], 0


# --- The monitor -----------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class WatchList:
    """What a monitor reports besides a log's faults: matching entries, and checkpoints over `max_age` seconds old."""
    terms: tuple[WatchTerm, ...] = ()
    max_age: float | None = None


class ServedTree:
    """A checkpoint that a log serves, and the tiles of its tree.

    `served` keeps tiles as they were served, by path: those of the right edge, and the RECENT others read last.
    """
    RECENT = 256

    def __init__(self, note: bytes, tree: Tree, fetch: Callable[[int, int, int], bytes]) -> None:
        self.note, self.tree, self._fetch = note, tree, fetch
        self.served: dict[str, bytes] = {}
        self._recent = deque[str]()
        try:
            self.tiles = AuthenticTiles(tree, self.tile)
        except BadProof as error:
            raise self.bad_tile(error) from None
        self._recent.clear()  # the tiles read so far are the right edge: keep them

    def width(self, level: int, index: int) -> int:
        return min(256, (self.tree.size >> 8 * level) - 256 * index)

    def tile(self, level: int, index: int, width: int) -> bytes:
        """The bytes of a tile as served, not checked yet."""
        path = tile_path(level, index, width)
        if path not in self.served:
            self.served[path] = data = self._fetch(level, index, width)
            self._recent.append(path)
            if len(self._recent) > self.RECENT:
                del self.served[self._recent.popleft()]
            return data
        return self.served[path]

    def bad_tile(self, error: BadProof) -> Found:
        return Found("bad-tile", str(error), {"checkpoint": self.note, **self.served})

    def prefix(self, size: int) -> bytes:
        """The root of the tree's first `size` entries; raises Found if the tiles do not lead to the tree's root."""
        try:
            return self.tiles.hash(0, size)
        except BadProof as error:
            raise self.bad_tile(error) from None

    def path_to(self, level: int, index: int) -> dict[str, bytes]:
        """The files that authenticate a tile: the checkpoint, the tiles of the right edge, and the tiles above it."""
        places = [(above, self.tree.size >> 8 * above >> 8) for above in range(8)]
        places += [(level + up, index >> 8 * up) for up in range(8 - level)]
        widths = [(above, i, self.width(above, i)) for above, i in places]
        return {"checkpoint": self.note, **{tile_path(*place): self.tile(*place) for place in widths if place[2] > 0}}


class ServedBundle(NamedTuple):
    """An entry bundle and its level 0 tile as served. `garbage` has the bundle's bytes if they are no bundle."""
    n: int
    tile: bytes
    entries: list[bytes]
    garbage: bytes | None = None

    def bundle(self) -> bytes:
        return encode_bundle(self.entries) if self.garbage is None else self.garbage


class Monitor:
    """Follows a log into a mirror. Hashes all entries, and keeps only those that lead to a signed root.

    `conditions` are the findings of the last round that are not about entries.
    """

    BATCH = 1 << 15  # entries per batch: a batch ends at a multiple of it, where few tiles give the root
    GROWS, WAIT = 200, 300  # of a log that grows by more entries in a round, a partial bundle can wait; seconds

    def __init__(
        self, store: MirrorStore, source: LogReader, policy: Policy, watch: WatchList, patient: bool = False
    ) -> None:
        if len(policy.logs) != 1:
            raise Malformed(f"a monitor follows one log, and the policy names {len(policy.logs)}")
        self.store, self.source, self._policy, self._watch = store, source, policy, watch
        self._key = policy.logs[0]
        self._goal: ServedTree | None = None  # the tree that is being stored
        self._last_bundle: tuple[int, list[bytes]] = -1, []  # the number of the last bundle read, and its entries
        self._now = 0.0  # the time of this round, in seconds
        self._patient, self._whole = patient, -math.inf  # when all of the log was stored
        self._stalled: ServedTree | None = None  # the tree whose tiles could not be fetched for evidence
        self.conditions: list[Finding] = []
        if (key := store.key()) is None:
            store.create_log(self._key, None, policy.origin)
        elif (key, store.setting("origin") or "") != (self._key, policy.origin):
            other = encode_vkey(self._key) if key != self._key else policy.origin or self._key.name
            raise Malformed(f"{store.folder} mirrors the log {encode_vkey(key)}, not {other}")
        for kind in ("signed", "target"):
            self._check_stored(kind)
        store.check_last_part()

    def _check_stored(self, kind: str) -> None:
        """Raises Corrupt if a stored checkpoint is invalid. It was valid when stored, so the log is not to blame."""
        if (note := self.store.checkpoint(kind)) is not None:
            try:
                tree = self.store.open(note, self._key).tree
                stored = Tiles(self.store.stored().size, self.store.tile)
                if kind == "signed" and stored.hash(0, tree.size) != tree.root:
                    raise Corrupt("the stored tiles do not lead to its root")
            except Error as error:
                raise Corrupt(f"{self.store.folder}: {kind} checkpoint: {error}") from None

    def round(
        self, progress: Callable[[int, int], None], clock: Callable[[], float],
        tell: Callable[[], None] = lambda: None,
    ) -> bool:
        """Stores what the log has published since the last round; returns False if a fault of the log ended it early.

        Calls `tell` each time after entries and their findings are stored. Raises Unavailable, Corrupt.
        """
        self.conditions = []
        try:
            self.store.search(self._watch.terms, progress)
            tell()
            note = self.source.checkpoint(self.store.tree("target").size or self.store.tree("signed").size)
            self._round(note, progress, clock(), tell)
        except Found as found:
            self.conditions.append(found.finding)
            return False
        except (BadProof, BadSignature, Malformed) as error:  # a fault of the log would be Found: this one is ours
            raise Corrupt(f"{self.store.folder}: {error}") from None
        return True

    def _round(
        self, note: bytes, progress: Callable[[int, int], None], now: float, tell: Callable[[], None]
    ) -> None:
        checkpoint, self._now = self._open(note, now), now
        tree, stored, last = checkpoint.tree, self.store.stored(), self.store.last()
        before = Checkpoint.parse(split_note(last)[0]).tree if last else Tree(0, EMPTY_ROOT)
        if tree == before == stored:
            if note != last:
                self.store.renew(note)
            self._whole = now
            return
        if last and tree.size <= before.size and tree != before:
            raise self._gone_back(before, last, tree, note)
        try:
            goal = ServedTree(note, tree, self.source.hashes)
            goal.prefix(before.size)
        except Unavailable:
            self.store.seen(note)  # it is signed: later checkpoints have to be consistent with it
            raise
        try:
            monitor_step(filter(None, (last, self.store.checkpoint("seen"))), note, tree, goal.prefix)
        except Found as found:
            found.finding.evidence.update(goal.served)
            raise
        if goal.prefix(stored.size) != stored.root:  # `stored` was proved to be a prefix of `before` when it was stored
            raise Corrupt(f"{self.store.folder}: the stored entries do not lead to a signed root")
        self._goal, size, all_ = goal, stored.size, self._end_of_round(stored.size, before.size, tree.size)
        numbers = range(size // 256, (all_ + 255) // 256)
        ahead = zip(numbers, self.source.each(functools.partial(self._read, goal), numbers), strict=True)
        while size < all_:
            if (free := shutil.disk_usage(self.store.folder).free) < MIN_FREE:
                raise Unavailable(f"{self.store.folder} has only {free >> 20} MiB free: too little for a monitor")
            served, weight, end = list[ServedBundle](), 0, size
            while end < all_ and weight < MAX_STORED_AT_ONCE and (not served or end % self.BATCH):
                n, bundle = next(ahead)
                served.append(bundle or self._read_now(goal, n))
                weight, end = weight + sum(map(len, served[-1].entries)), min(tree.size, 256 * n + 256)
            self._follow(goal, size, end, served)
            del served
            tell()
            progress(end, tree.size)
            size = end
        self._whole = now if size == tree.size else self._whole

    def _end_of_round(self, stored: int, before: int, size: int) -> int:
        """How many entries of a log of `size` to have after this round, with those `stored` already."""
        # "A client, such as a Monitor, that “tails” a rapidly (> 200 entries per checkpoint) growing log SHOULD … avoid
        # fetching partial entry bundles when possible." The hashes of its entries were fetched, and lead to the root.
        full, patient = size - size % 256, self._patient and 0 <= self._now - self._whole < self.WAIT
        return full if patient and full > stored and size - before > self.GROWS else size

    def _open(self, note: bytes, now: float) -> Checkpoint:
        """The served checkpoint; raises Found unless the policy accepts it. Extensions and high age are conditions."""
        served = {"checkpoint": note}
        try:
            checkpoint = open_checkpoint(note, self._policy)
        except Error as error:
            try:
                self.store.open(note, self._key)
            except Error as unsigned:
                text = f"the log serves no checkpoint of {self._policy.origin or self._key.name}: {unsigned}"
                raise Found("bad-signature", text, served) from None
            raise Found("bad-cosignature", str(error), served) from None
        if checkpoint.extensions:
            text = f"the checkpoint has extension lines: {' | '.join(checkpoint.extensions)[:500]}"
            self.conditions.append(Finding("extension", text, (), served))
        try:
            check_age(checkpoint, self._policy, self._watch.max_age, now)
        except BadSignature as error:
            self.conditions.append(Finding("stale", str(error), (), served))
        return checkpoint

    def _gone_back(self, before: Tree, last: bytes, tree: Tree, note: bytes) -> Found:
        """The finding for a log that showed `before`, and now another tree that is not larger.

        Two roots for one size are a fork. For a smaller size, the tiles of `before` tell if `tree` is a prefix of it:
        our stored ones, if we have all, or the log's. Without these, it is certain only that the log went back.
        """
        notes = {"earlier-checkpoint": last, "checkpoint": note}
        prefix, served, stored = False, dict[str, bytes](), self.store.stored() == before
        if tree.size < before.size:
            try:
                earlier = ServedTree(last, before, self.store.tile if stored else self.source.hashes)
                prefix, served = earlier.prefix(tree.size) == tree.root, earlier.served
            except (Found, Unavailable) as error:
                if stored:
                    raise Corrupt(f"{self.store.folder}: {error}") from None
                prefix = True
        return rollback_or_fork(before, tree, prefix, {**notes, **({} if prefix else served)})

    def _read(self, goal: ServedTree, index: int) -> ServedBundle | None:
        """A bundle, read ahead of its turn; None if it is too large to be held until then."""
        try:
            return self._read_now(goal, index, MAX_AHEAD)
        except TooLarge:
            return None

    def _read_now(self, goal: ServedTree, index: int, limit: int = MAX_BUNDLE) -> ServedBundle:
        width = goal.width(0, index)
        bundle, entries = self.source.entries(index, width, limit)
        tile = self.source.hashes(0, index, width)
        return ServedBundle(index, tile, [], bundle) if entries is None else ServedBundle(index, tile, entries)

    def _follow(self, goal: ServedTree, size: int, end: int, served: Iterable[ServedBundle]) -> None:
        """Stores the entries from `size` to `end` (exclusive) of the bundles `served`, if they lead to the root."""
        bundles: list[ServedBundle] = []
        entries: list[bytes] = []
        for bundle in served:
            if bundle.garbage is not None:
                path = tile_path(None, bundle.n, goal.width(0, bundle.n))
                raise Found("bad-bundle", f"{path} is not a bundle of the right number of entries",
                            {**goal.path_to(0, bundle.n), path: bundle.garbage})
            bundles.append(bundle)
            # The first bundle may be stored in part already: these entries are compared, and not stored again.
            known = max(size - 256 * bundle.n, 0)
            if known and bundle.entries[:known] != self.store.bundled(bundle.n, known):
                raise self._blame(goal, bundles)
            entries += bundle.entries[known:]

        def check(tree: Tree, grown: list[Grown]) -> list[Finding]:
            if tree.root != goal.prefix(end):
                raise self._blame(goal, bundles)
            return self._check_tiles(goal, {bundle.n: bundle.tile for bundle in bundles}, grown)

        self.store.follow(entries, (goal.tree, goal.note), check, self._watch.terms, self._now)

    def _check_tiles(self, goal: ServedTree, lowest: dict[int, bytes], grown: list[Grown]) -> list[Finding]:
        """The findings for served tiles that differ from those that the entries lead to, at most MAX_BAD_TILES."""
        findings: list[Finding] = []
        for level, index, data, _ in grown:
            width = goal.width(level, index)
            served = lowest[index] if level == 0 else goal.tile(level, index, width)
            if (served[: len(data)] != data or len(served) != 32 * width) and len(findings) < MAX_BAD_TILES:
                path = tile_path(level, index, width)
                text = f"{path} does not match the entries from index {256 * index << 8 * level} on"
                findings.append(Finding("bad-tile", text, (), {**goal.path_to(level, index), path: served}))
        return findings

    def _blame(self, goal: ServedTree, bundles: list[ServedBundle]) -> Error:
        """The error for entries that do not lead to the root. The tiles do, so they tell which bundle is wrong."""
        for bundle in bundles:
            n, leaves, path = bundle.n, leaf_hashes(bundle.entries), tile_path(None, bundle.n, goal.width(0, bundle.n))
            try:
                if len(leaves) < 256:
                    good = goal.tiles.expanded(0, n)[0] == leaves
                else:
                    good = goal.tiles.hash(256 * n, 256 * n + 256) == expand_tile(b"".join(leaves))[8][0]
            except BadProof as error:
                return goal.bad_tile(error)
            if not good:
                return Found("bad-bundle", f"the entries of {path} are not the ones that the log has signed",
                             {**goal.path_to(0, n), path: bundle.bundle()})
        return Corrupt(f"{self.store.folder}: the stored entries do not lead to a signed root")

    def evidence(self, finding: Finding) -> dict[str, bytes]:
        """A finding's evidence files. Each entry has an .entry file and, below the signed size, a .tlog-proof file."""
        note, files = self.store.checkpoint("signed"), dict[str, bytes]()
        tiles = Tiles(self.store.tree("signed").size, self.store.tile)
        for index in finding.indices:
            files[f"{index}.entry"] = entry = self.entry(index)
            if note and index < tiles.size:
                files[f"{index}.tlog-proof"] = self.store.proof(index, note, tiles, entry)
        return {**finding.evidence, **files}

    def entry(self, index: int) -> bytes:
        """A stored entry. Keeps its bundle for the next call: findings come bundle by bundle."""
        n = index // 256
        if self._last_bundle[0] != n or len(self._last_bundle[1]) <= index % 256:
            self._last_bundle = n, self.store.bundled(n, min(256, self.store.stored().size - 256 * n))
        return self._last_bundle[1][index % 256]

    def log_size(self) -> int:
        """The size of the last tree that the log served."""
        return self._goal.tree.size if self._goal else self.store.tree("signed").size

    def late_evidence(self, finding: Finding) -> dict[str, bytes]:
        """The .tlog-proof files for a finding's entries beyond the signed size, at the checkpoint that is being stored.

        Fetches their tiles from the log. Leaves out each proof whose tiles the log does not give.
        """
        files, size = dict[str, bytes](), self.store.tree("signed").size
        for index in finding.indices:
            if self._goal and self._goal is not self._stalled and size <= index < self._goal.tree.size:
                try:
                    entry = self.entry(index)
                    files[f"{index}.tlog-proof"] = self.store.proof(index, self._goal.note, self._goal.tiles, entry)
                except (Unavailable, BadProof, Stopped):  # ask no more: other findings wait to be reported
                    self._stalled = self._goal
        return files


# === Part V: commands ===================================================================================
# --- Files -----------------------------------------------------------------------------------------------

def open_file(path: str | Path, pipe: bool = False) -> io.BufferedReader:
    """Opens a regular file or, with `pipe`, a pipe that has bytes within PIPE_TIMEOUT seconds. Raises Unavailable."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # else a pipe without a writer would block
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise Unavailable(f"can't read {path}: {getattr(error, 'strerror', error)}") from None
    mode = os.fstat(descriptor).st_mode
    readable = stat.S_ISREG(mode) or (
        pipe and not stat.S_ISDIR(mode) and bool(select.select([descriptor], [], [], PIPE_TIMEOUT)[0]))
    if not readable:
        os.close(descriptor)
        raise Unavailable(f"can't read {path}: it is not a file, or nobody writes to it")
    os.set_blocking(descriptor, True)
    return open(descriptor, "rb")


def read_target(path: Path, limit: int) -> bytes:
    """The bytes of a target of `verify` or of a proof. Raises Unavailable, also for more than `limit` bytes."""
    try:
        with open_file(path) as stream:
            data = stream.read(limit + 1)
    except OSError as error:
        raise Unavailable(f"can't read {path}: {error.strerror}") from None
    if len(data) > limit:
        raise Unavailable(f"{path} has more than {limit} bytes")
    return data


def read_file(path: str, limit: int = MAX_POLICY, secret: bool = False) -> bytes:
    """The bytes of a configuration file or pipe. Raises Malformed: the user named it and has to fix it."""
    data, deadline = b"", time.monotonic() + PIPE_TIMEOUT
    try:
        with open_file(path, pipe=True) as stream:
            while select.select([stream], [], [], max(deadline - time.monotonic(), 0))[0] and len(data) <= limit:
                if not (part := os.read(stream.fileno(), limit)):
                    break
                data += part
            else:
                raise Malformed(f"{path} has more than {limit} bytes, or its writer does not close it")
    except OSError as error:
        raise Malformed(f"can't read {path}: {error.strerror}") from None
    except Unavailable as error:
        raise Malformed(str(error)) from None
    if b"PRIVATE+KEY+" in data and not secret:  # error messages quote what is malformed
        raise Malformed(f"{path} holds a private key, which does not belong here")
    return data


def read_line(path: str, secret: bool = False) -> str:
    """The line of a key file, without its newline, which may be missing. Raises Malformed."""
    try:
        return read_file(path, secret=secret).decode().removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError:
        raise Malformed(f"{path} is not text") from None


def read_vkey(path: str) -> VerifierKey:
    try:
        return VerifierKey.parse(read_line(path))
    except Malformed as error:
        raise Malformed(f"{path}: {error}") from None


def read_secret(path: str) -> str:
    """The line of a secret file. Warns if other users can read the file."""
    text = read_line(path, secret=True)
    if os.stat(path).st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        logger.warning("%s can be read by other users: chmod 600 it", path)
    return text


def read_token(path: str) -> str:
    """The token in a secret file, which fits into an HTTP header. Raises Malformed."""
    token = read_secret(path).strip()
    if not re.fullmatch(r"[\x21-\x7e]{1,1000}", token) or token.startswith("PRIVATE+KEY+"):
        raise Malformed(f"{path} has to hold a token of 1 to 1000 ASCII characters without spaces")
    return token


def read_signer(path: str) -> Signer:
    try:
        return Signer.parse(read_secret(path))
    except Malformed as error:
        raise Malformed(f"{path}: {error}") from None


def write_draft(path: Path, data: bytes, mode: int = 0o666, sync: bool = True) -> Path:
    """Writes a new file beside `path` and returns its path. Syncs it if `sync`, and never follows a symbolic link."""
    draft = path.with_name(f".{path.name[:200]}.{os.getpid()}.new")
    draft.unlink(missing_ok=True)
    with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode), "wb") as stream:
        stream.write(data)
        stream.flush()
        if sync:
            os.fsync(stream.fileno())
    return draft


def remove_draft(path: Path) -> None:
    with contextlib.suppress(OSError):  # fails on a read-only file system even if there is no draft
        path.with_name(f".{path.name[:200]}.{os.getpid()}.new").unlink(missing_ok=True)


def write_new(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Creates a file atomically, with `mode` from the start. Raises Malformed if it exists or can't be written."""
    try:
        os.link(write_draft(path, data, mode), path)
        sync_folder(path.parent)
    except FileExistsError:
        raise Malformed(f"{path} exists, and keys are never overwritten: move it away first") from None
    except OSError as error:
        raise Malformed(f"can't write {path}: {error.strerror}") from None
    finally:
        remove_draft(path)


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Unavailable(f"can't make {folder}: {error.strerror}") from None


def replace_file(path: Path, data: bytes, sync: bool = True, name: bool = True) -> None:
    """Replaces a file atomically. With `sync`, syncs its bytes, and with `name` the folder. Raises Unavailable."""
    try:
        write_draft(path, data, sync=sync).replace(path)
        if sync and name:
            sync_folder(path.parent)
    except OSError as error:
        raise Unavailable(f"can't write {path}: {error.strerror}") from None
    finally:
        remove_draft(path)


def unused_mark(private: Path) -> Path:
    """The path of the file beside a new private key that holds its vkey until the key is first used."""
    return private.with_name(f".{private.name}.unused")


def make_keys(origin: str, private: Path, public: Path, witness: bool = False, kind: int = ED25519) -> Signer:
    """Writes a new key pair, and marks it as unused. Raises Malformed if one of the files exists."""
    check_name(origin)
    signer = Signer(origin, os.urandom(32), kind)
    vkey = encode_vkey(signer.witness_key if witness else signer.key)
    for path in (public, private):
        if path.exists():
            raise Malformed(f"{path} exists, and keys are never overwritten: move it away first")
    try:
        replace_file(unused_mark(private), f"{vkey}\n".encode())
    except Unavailable as error:
        raise Unavailable(f"can't write {private}: {error}") from None
    write_new(private, f"{signer.encode()}\n".encode(), 0o600)  # first: the next start can make the other from it
    write_new(public, f"{vkey}\n".encode())
    return signer


def checksum_of(path: Path) -> str:
    try:
        with open_file(path) as stream:
            return "sha256:" + hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise Unavailable(f"can't read {path}: {error.strerror}") from None


def read_policy(args: argparse.Namespace) -> Policy:
    """The policy in --policy, or the one that --public-key makes. Raises Malformed unless exactly one is given."""
    witnesses = [read_vkey(path) for path in args.witness_public_key or ()]
    if bool(args.policy) == bool(args.public_key) or (args.policy and (witnesses or args.quorum is not None)):
        raise Malformed("give --policy F, or --public-key F and perhaps --witness-public-key F and --quorum K")
    if args.policy and args.origin:
        raise Malformed("--origin goes with --public-key: in a policy, the name of a log's key is its origin")
    if args.policy:
        return parse_policy(read_file(args.policy))
    policy = simple_policy([read_vkey(args.public_key)], witnesses, args.quorum)
    return dataclasses.replace(policy, origin=check_origin(args.origin)) if args.origin else policy


def show_progress(what: str) -> Callable[[int, int], None]:
    """Returns a function that shows `done` of `total` on a terminal, at most ten times a second."""
    shown, terminal = 0.0, sys.stderr.isatty()

    def progress(done: int, total: int) -> None:
        nonlocal shown
        if terminal and (time.monotonic() > shown + 0.1 or done == total):
            shown = time.monotonic()
            end = "\n" if done >= total else ""
            print(f"\r{what}: {done:,} of {total:,}", end=end, file=sys.stderr, flush=True)

    return progress


# --- Keys --------------------------------------------------------------------------------------------------

def cmd_keygen(args: argparse.Namespace) -> int:
    kind = ML_DSA_44 if args.ml_dsa_44 else ED25519
    signer = make_keys(args.origin, Path(args.private_key_path), Path(args.public_key_path), args.witness, kind)
    print(encode_vkey(signer.witness_key if args.witness else signer.key))
    logger.info("the private key is in %s, the public key in %s", args.private_key_path, args.public_key_path)
    return 0


def cmd_vkey(args: argparse.Namespace) -> int:
    if args.as_witness:
        print(encode_vkey(as_witness(read_vkey(args.as_witness))))
        return 0
    if not (args.origin and args.public_key_path):
        raise Malformed("give --origin and --public-key-path, or --as-witness")
    text = read_line(args.public_key_path)
    armor = re.fullmatch(r"\s*-----BEGIN PUBLIC KEY-----\s(.*)-----END PUBLIC KEY-----\s*", text, re.DOTALL)
    der = parse_base64("".join((armor[1] if armor else text).split()))
    # RFC 8410 section 4: a SubjectPublicKeyInfo of id-Ed25519 is these 12 bytes and the key.
    if len(der) != 44 or der[:12] != bytes.fromhex("302a300506032b6570032100"):
        raise Malformed(f"{args.public_key_path} is not an Ed25519 public key in PEM or base64 DER")
    print(encode_vkey(VerifierKey(args.origin, ED25519, der[12:])))
    return 0


def cmd_core(args: argparse.Namespace) -> int:
    text = Path(__file__).read_text(encoding="utf-8")
    print(text[text.index("\n# === Part I:") : text.index("\n# === Part II:")].strip())
    return 0


# --- Servers -----------------------------------------------------------------------------------------------

def cmd_serve(args: argparse.Namespace) -> int:
    token = read_token(args.write_token_file) if args.write_token_file else None
    check_name(args.origin or "any")
    if not (is_loopback(args.host) or token or args.read_only or args.open_writes):
        raise Malformed(f"on {args.host} anybody could write: give --write-token-file, --read-only or --open-writes")
    folder, policy = Path(args.storage_dir), Policy(()) if args.read_only else witness_policy(args)
    if args.bulk_append_workers is not None:
        logger.info("--bulk-append-workers has no effect: one sequencer appends a bulk as one batch")
    with contextlib.ExitStack() as stack:
        server = Server(args.host, args.port, share_port=args.read_only)  # first: no new files if the port is taken
        stack.callback(server.close)
        if not args.read_only:
            refuse_second_history(folder, args)
            make_folder(folder)
        store = stack.enter_context(contextlib.closing(LogStore(folder, args.read_only)))
        signer = None if args.read_only else open_signer(store, args)
        options = LogOptions(args.allow_replacement, args.add_timeout, args.checkpoint_interval, args.witness_timeout,
                             args.republish_interval)
        log = Log(store, signer, policy, options, read_second_signer(args, signer) if signer else None)
        routes = LogServer(log, token, args.bulk_append_max_entries, args.read_only)
        routes.bulk_timeout = args.bulk_append_publish_timeout
        server.handler = LogHandler.of(routes)
        if signer:
            if store.recovered:
                sizes = log.signed.tree.size, store.tree("published").size
                logger.warning("the last run did not end in good order: took over its journal of %d bytes; signed is "
                               "size %d, published size %d", store.recovered, *sizes)
            log.start()
        try:
            what = f"serves the log {encode_vkey(log.key)} of {store.tree('published').size} entries"
            return run_server(server, what, log.failed, ending=log.quit)
        finally:
            log.stop()


def refuse_second_history(folder: Path, args: argparse.Namespace) -> None:
    """Raises Malformed if `serve` might begin a second history of a key, or if --new names a folder with a log."""
    private = Path(args.private_key) if args.private_key else folder / "private.key"
    if (folder / "log.sqlite3").exists() and holds_log(folder):
        if args.new:
            raise Malformed(f"{folder} holds a log already: leave out --new")
    elif private.exists() and not (args.new or is_unused(private)):
        raise Malformed(
            f"{folder} holds no log, and {private} may have signed for one. Is its folder elsewhere, or not mounted? A "
            "second history of one key would end the trust in it. Give --new only if this key has signed nothing yet")


def holds_log(folder: Path) -> bool:
    """True if this folder has its log's key; False if a start failed before the log was created."""
    with contextlib.closing(LogStore(folder, read_only=True)) as store:
        return store.key() is not None


def is_unused(private: Path) -> bool:
    mark = unused_mark(private)
    return mark.exists() and read_line(str(mark)) == encode_vkey(read_signer(str(private)).key)


def witness_policy(args: argparse.Namespace) -> Policy:
    """The witnesses that a log asks, with their URLs, and the quorum that publishing needs. Raises Malformed."""
    if args.policy and (args.witness_url or args.witness_public_key):
        raise Malformed("give --policy, or --witness-url and --witness-public-key")
    if bool(args.witness_url) != bool(args.witness_public_key):
        raise Malformed("--witness-url and --witness-public-key go together")
    if args.policy:
        return parse_policy(read_file(args.policy))
    keys = [as_witness(read_vkey(args.witness_public_key))] if args.witness_url else []
    if args.witness_url:
        Client(args.witness_url).close()  # refuses what is no URL before anything is made
    return dataclasses.replace(simple_policy([], keys), urls=tuple((key, args.witness_url) for key in keys))


def open_signer(store: LogStore, args: argparse.Namespace) -> Signer:
    """The signer of this log. Binds a new log to its key for good. Raises Malformed if the log has another key."""
    log_key, private, public = store.key(), store.folder / "private.key", store.folder / "public.key"
    if log_key is None and not args.private_key and not private.exists():
        signer = make_keys(args.origin or default_origin("btlog"), private, public)
        logger.info("made a key pair for the new log %s in %s: keep a copy of private.key", signer.name, store.folder)
    signer = read_pair(args, private, public)
    if log_key is None:
        store.create_log(signer.key, signer.sign(Checkpoint(signer.name, Tree(0, EMPTY_ROOT))))
    elif log_key != signer.key:
        raise Malformed(f"{store.folder} is the log of {encode_vkey(log_key)}, not of {encode_vkey(signer.key)}")
    if (mark := unused_mark(Path(args.private_key or private))).exists():
        try:
            mark.unlink()  # before anybody sees a signature of this key
            sync_folder(mark.parent)
        except OSError as error:
            raise Unavailable(f"remove {mark}, or this key could begin another log ({error.strerror})") from None
    return signer


def default_origin(what: str) -> str:
    return f"{re.sub(r'[^a-z0-9.-]', '', socket.gethostname().lower()) or 'localhost'}/{what}"


def read_pair(args: argparse.Namespace, private: Path, public: Path, witness: bool = False) -> Signer:
    """The signer in --private-key, by default in `private`. Raises Malformed if --public-key or --origin differs."""
    signer = read_signer(args.private_key or str(private))
    keys = [signer.witness_key, signer.key] if witness else [signer.key]  # both are the same key: see as_witness
    if not (args.private_key or args.public_key or public.exists()):  # the private key determines it
        write_new(public, f"{encode_vkey(keys[0])}\n".encode())
    vkey_path = args.public_key or (None if args.private_key else str(public))
    if vkey_path and read_vkey(vkey_path) not in keys:
        raise Malformed(f"{vkey_path} is not the public key of {args.private_key or private}")
    if signer.kind != ED25519:
        raise Malformed(f"{args.private_key or private} is not an Ed25519 key: see --ml-dsa-44-private-key")
    if args.origin and args.origin != signer.name:
        raise Malformed(f"{args.private_key or private} is the key of {signer.name}, not of {args.origin}")
    return signer


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def cmd_witness(args: argparse.Namespace) -> int:
    database = Path(args.database_path)
    if database.is_dir():
        raise Malformed(f"{database} is a folder: --database-path is a file")
    private, public = database.with_name("witness-private.key"), database.with_name("witness-public.key")
    with contextlib.ExitStack() as stack:
        server = Server(args.host, args.port)  # first: no new files if the port is taken
        stack.callback(server.close)
        new = is_new(database)
        if not args.private_key and not private.exists() and new:
            signer = make_keys(args.origin or default_origin("witness"), private, public, witness=True)
            logger.info("made a key pair for the new witness %s: keep a copy of %s", signer.name, private)
        signer = read_pair(args, private, public, witness=True)
        with contextlib.suppress(OSError):
            unused_mark(Path(args.private_key or private)).unlink(missing_ok=True)
        second = read_second_signer(args, signer)
        store = stack.enter_context(contextlib.closing(WitnessStore(database)))
        about = About((args.url or "").rstrip("/"), args.operator or "", args.contact or "", tuple(args.log_list or ()),
                      args.log_list_frequency)
        witness = Witness(store, signer, second=second, about=about)
        if args.import_:
            witness.adopt(read_bt_log_witness(Path(args.import_)))
            logger.info("took over the logs and sizes of %s: never run a witness on it again", args.import_)
        witness.register(read_logs(args))
        if new:
            logger.warning("%s is new: go on only if %s has never cosigned before", database, signer.name)
        discovery = Discovery(witness)
        stack.callback(discovery.stop)

        def register() -> None:
            discovery.read_now.set()
            try:
                witness.register(read_logs(args))
            except Error as error:
                logger.error("SIGHUP: %s", error)

        server.handler = WitnessHandler.of(witness)
        vkeys = " and ".join(encode_vkey(each.witness_key) for each in witness.signers)
        what = f"serves the witness {vkeys} of {len(witness.logs)} logs"
        return run_server(server, what, witness.failed, hangup=register)


def read_bt_log_witness(path: Path) -> list[tuple[str, VerifierKey, Tree]]:
    """The logs in the database of a bt-log witness, each with its last cosigned tree. Raises Malformed."""
    try:
        if is_new(path):
            raise Malformed(f"there is no database in {path}")
        uri = f"file:{urllib.parse.quote(str(path.absolute()))}?mode=ro"
        with contextlib.closing(sqlite3.connect(uri, uri=True)) as db:
            rows = db.execute("SELECT * FROM tlog").fetchall()
        trees = []
        for origin, vkey, size, root in rows:
            key = VerifierKey.parse(str(vkey).strip())
            check_origin(str(origin))
            tree = Tree(parse_decimal(str(size)), parse_base64(str(root), 32))
            check_consistency(tree, tree, ())  # refuses size 0 without the empty root
            trees.append((str(origin), key, tree))
    except (sqlite3.Error, ValueError, BadProof, Malformed) as error:
        raise Malformed(f"{path} is not the database of a bt-log witness: {error}") from None
    return trees


def read_second_signer(args: argparse.Namespace, first: Signer) -> Signer | None:
    """The ML-DSA-44 signer beside the Ed25519 one; None if there is none. Raises Malformed, Unavailable."""
    if not (path := args.ml_dsa_44_private_key):
        return None
    signer = read_signer(path)
    if signer.kind != ML_DSA_44 or signer.name != first.name:
        raise Malformed(f"{path} is not an ML-DSA-44 key of {first.name}: make one with "
                        f"keygen --ml-dsa-44 --origin {first.name}")
    with contextlib.suppress(OSError):
        unused_mark(Path(path)).unlink(missing_ok=True)
    return signer


class Discovery:
    """Reads a witness's lists of logs again and again, in a thread of its own."""

    def __init__(self, witness: Witness) -> None:
        """Reads all lists once. Raises Malformed for a file that is no list: a server's may be one again later."""
        self._witness, self._over, self.read_now = witness, False, threading.Event()
        lists = witness.about.lists
        for place in lists:
            if not is_url(place):
                witness.discover(place, read_file(place, MAX_LOG_LIST))
        self._thread = threading.Thread(target=self._run, name="lists", daemon=True)
        if lists:
            self._thread.start()

    def _run(self) -> None:
        while not self._over:
            self.read_now.clear()
            failed = [place for place in self._witness.about.lists if not self._read(place)]
            self.read_now.wait(min(self._witness.about.every, 300) if failed else self._witness.about.every)

    def _read(self, place: str) -> bool:
        """Registers what is new in a list; returns False, and logs why, if that fails."""
        try:
            if is_url(place):
                with contextlib.closing(Client(place)) as client:
                    status, _, data = client.request("GET", "", None, None, MAX_LOG_LIST)
                if status != 200:
                    raise Unavailable(f"it answers {status}: {error_message(data)}")
            else:
                data = read_file(place, MAX_LOG_LIST)
            self._witness.discover(place, data)
        except Error as error:
            logger.error("the list of logs %s is not read; what is known stays: %s", place, error)
            return False
        return True

    def stop(self) -> None:
        self._over = True
        self.read_now.set()


def is_url(place: str) -> bool:
    return place.startswith(("http://", "https://"))


def read_logs(args: argparse.Namespace) -> list[VerifierKey]:
    """The keys of the logs in --log-public-key and --policy."""
    keys = [read_vkey(path) for path in args.log_public_key or ()]
    return [*keys, *parse_policy(read_file(args.policy)).logs] if args.policy else keys


def run_server(
    server: Server, what: str, failed: threading.Event, *, hangup: Callable[[], None] | None = None,
    ending: Callable[[], None] = lambda: None,
) -> int:
    """Serves until SIGTERM or SIGINT (returns 0) or until `failed` is set (returns 3). SIGHUP calls `hangup`."""
    if sys.platform != "win32":
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core dump would contain the private key
    for handler in logging.getLogger().handlers:
        handler.addFilter(Flood())
    ready = functools.partial(print, server.url, what, flush=True)
    asyncio.run(server.run(ready, failed.is_set, hangup, ending))
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    return 3 if failed.is_set() else 0


# --- Adding and verifying ------------------------------------------------------------------------------------

class LogWriter:
    """A client that writes to a log. Holds it to the policy or, without one, to the key that the log itself names."""

    def __init__(self, args: argparse.Namespace) -> None:
        policy = read_policy(args) if args.policy or args.public_key or args.witness_public_key or args.origin else None
        token = read_token(args.write_token_file) if args.write_token_file else None
        self.client = Client(args.log_url or (policy and log_url(policy)) or "http://127.0.0.1:8080", timeout=300)
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self.policy = policy or self._unpinned_policy()

    def _unpinned_policy(self) -> Policy:
        vkey = self.client.get("/.well-known/public-key").decode(errors="replace").removesuffix("\n")
        logger.info("the log says that its key is %s; hold it to that with --public-key", vkey)
        return simple_policy([VerifierKey.parse(vkey)])

    def post(self, path: str, kind: str, body: bytes) -> bytes:
        """The body of the answer. Raises Malformed if writing is forbidden, Conflict for status 409, or Unavailable."""
        status, _, data = self.client.request("POST", path, body, {"Content-Type": kind, **self._headers})
        if status in (401, 403):
            raise Malformed(f"{self.client.url} does not let you write: {error_message(data)}: see --write-token-file")
        if status == 409:
            raise Conflict(error_message(data), -1)
        if status != 200:
            raise Unavailable(f"{self.client.url}{path} answers {status}: {error_message(data)}")
        return data

    def close(self) -> None:
        self.client.close()


def cmd_add(args: argparse.Namespace) -> int:
    codes, publisher = {0}, None
    if args.publisher_issuer or args.publisher_subject:
        publisher = Publisher(args.publisher_issuer or "", args.publisher_subject or "")
        encode_entry("x", f"sha256:{'0' * 64}", *publisher)  # raises Malformed
    with contextlib.closing(LogWriter(args)) as writer:
        for path in map(Path, args.files):
            try:
                proof = add_file(writer, path, publisher)
                folder = Path(args.proof_dir) if args.proof_dir else path.parent
                replace_file(folder / f"{path.name}.tlog-proof", encode_proof(proof))
                print(f"{path}: logged at index {proof.index}, proof in {folder / path.name}.tlog-proof")
            except Error as error:
                logger.error("%s: %s", path, error)
                codes.add(error.exit_code)
    return combined_exit_code(codes)


def combined_exit_code(codes: set[int]) -> int:
    """The exit code that counts: 1 (found) before 3 (could not be checked), so that no failure hides a finding."""
    return 1 if 1 in codes else max(codes)


def log_url(policy: Policy) -> str | None:
    return next((url for key, url in policy.urls if key in policy.logs), None)


def log_urls(args: argparse.Namespace, policy: Policy) -> list[str]:
    """The URLs in --log-url, else the policy's; none if neither has one."""
    return args.log_url or [url for url in [log_url(policy)] if url]


def add_file(writer: LogWriter, path: Path, publisher: Publisher | None = None) -> Proof:
    """Logs a file and returns its proof. Verifies it without trusting the log. Raises BadProof for a bad answer."""
    entry = Entry(path.name, checksum_of(path), publisher)
    data = writer.post("/add", "application/json", json.dumps(entry_to_json(None, entry)).encode())
    try:
        answer = parse_object(parse_json(data), "index", "checkpoint", "inclusionProof", "publisher")
        hashes = tuple(parse_base64(text, 32) for text in answer["inclusionProof"])
        logged = answered_entry(entry, answer)
        extra = logged if b"\n" in logged[93:] else b""  # a publisher, which the file does not tell
        proof = Proof(parse_decimal(str(answer["index"])), hashes, parse_base64(answer["checkpoint"]), extra)
        check_logged(logged, encode_proof(proof), writer.policy)
    except (Malformed, KeyError, TypeError) as error:
        raise BadProof(f"the log's answer is malformed: {error}") from None
    return proof


def answered_entry(entry: Entry, answer: dict[str, Any]) -> bytes:
    """The entry that a log has for `entry`: the same, or one with a publisher if that has none. Raises Malformed."""
    if "publisher" not in answer or entry.publisher:
        return entry.encode()
    publisher = parse_object(answer["publisher"], "issuer", "subject")
    return encode_entry(entry.filename, entry.checksum, publisher["issuer"], publisher["subject"])


# --- Targets of `verify`: files, folders, lock files --------------------------------------------------------------
# Installers read lock files in different ways. So these parsers accept only lines and keys whose effect on what is
# installed is known. They refuse all others with exit code 3: the target could not be checked.

@dataclass(frozen=True)
class Artifact:
    """A file to verify: the target that lists it, the names that it may be logged under, its checksum, its project.

    `trouble` says why it can't be verified. `skipped` says why no log has it: it does not come from an index. If
    `loose`, an installer may install more than the target lists.
    """
    target: str
    names: tuple[str, ...] = ()
    checksum: str = ""
    project: str = ""
    trouble: str = ""
    skipped: str = ""
    loose: bool = False

    @property
    def filename(self) -> str:
        return self.names[0] if self.names else ""

    @property
    def label(self) -> str:
        what = self.filename or f"{self.project} {self.checksum[:19]}{'…' if self.checksum else ''}".strip()
        alone = Path(self.target).name == self.filename or not what
        return printable(self.target if alone else f"{self.target}: {what}")

    def is_named(self, filename: str) -> bool:
        """True if a logged file of this name may be this one. The checksum decides."""
        return filename in self.names or bool(self.project and is_of(self.project, filename))


MAX_FILES_READ, MAX_TOLD = 100, 200  # requirements files of one target; errors printed one by one
MAX_LOCK = 1 << 24  # bytes of a lock file or a report, or of all requirements files of a target
NOT_READ = (".lock", ".toml", ".yaml", ".yml", ".cfg", "Pipfile")
_PROJECT = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"


# --- Targets: lock files, each held to a schema -------------------------------------------------------------------
# A schema gives each allowed key ("*": any other) a type, a schema, or ANY if no value changes what is installed.

ANY = object
_HASHES = {"*": str}
_LOCKED_FILE = {"name": str, "url": str, "path": str, "size": int, "upload-time": ANY, "hashes": _HASHES}
PYLOCK = {  # PEP 751
    "lock-version": str, "created-by": str, "requires-python": str, "environments": ANY, "extras": ANY,
    "dependency-groups": ANY, "default-groups": ANY, "tool": ANY,
    "packages": [{
        "name": str, "version": str, "marker": str, "requires-python": str, "index": str, "dependencies": ANY,
        "attestation-identities": ANY, "tool": {"pdm": ANY}, "vcs": ANY,
        "archive": {**_LOCKED_FILE, "subdirectory": str}, "sdist": _LOCKED_FILE, "wheels": [_LOCKED_FILE],
        "directory": {"path": str, "editable": bool, "subdirectory": str},
    }],
}  # fmt: skip
_UV_FILE = {"url": str, "path": str, "filename": str, "hash": str, "size": int, "upload-time": ANY}
UV_LOCK = {
    "version": int, "revision": int, "requires-python": str, "resolution-markers": ANY, "supported-markers": ANY,
    "required-markers": ANY, "conflicts": ANY, "options": ANY, "manifest": ANY,
    "package": [{
        "name": str, "version": str, "resolution-markers": ANY, "dependencies": ANY, "optional-dependencies": ANY,
        "dev-dependencies": ANY, "default-groups": ANY, "group-requires-python": ANY, "metadata": ANY,
        "sdist": _UV_FILE, "wheels": [_UV_FILE], "source": dict.fromkeys(
            ("registry", "git", "url", "path", "directory", "editable", "virtual", "subdirectory"), str),
    }],
}  # fmt: skip
_POETRY_FILE = {"file": str, "hash": str}
POETRY_LOCK = {
    "extras": ANY,
    "metadata": {"lock-version": str, "python-versions": str, "content-hash": str, "files": {"*": [_POETRY_FILE]}},
    "package": [{
        "name": str, "version": str, "description": str, "category": str, "optional": bool, "python-versions": str,
        "groups": ANY, "markers": ANY, "dependencies": ANY, "extras": ANY, "develop": bool, "files": [_POETRY_FILE],
        "source": dict.fromkeys(("type", "url", "reference", "resolved_reference", "subdirectory"), str),
    }],
}  # fmt: skip
PDM_LOCK = {
    "metadata": {"lock_version": str, "content_hash": str, "groups": ANY, "strategy": ANY, "targets": ANY,
                 "cross_platform": ANY, "static_urls": ANY},
    "package": [{
        "name": str, "version": str, "summary": str, "requires_python": str, "groups": ANY, "marker": str,
        "extras": ANY, "dependencies": ANY, "files": [{**_POETRY_FILE, "url": str}],
        "editable": bool, "subdirectory": str,
        **dict.fromkeys(("path", "url", "git", "hg", "svn", "bzr", "ref", "revision"), str),
    }],
}  # fmt: skip
PIPFILE_LOCK = {
    "_meta": {"pipfile-spec": int, "hash": ANY, "requires": ANY, "sources": ANY},
    "*": {"*": {
        "hashes": [str], "version": str, "index": str, "markers": str, "extras": ANY, "editable": bool,
        **dict.fromkeys(("file", "path", "git", "hg", "svn", "bzr", "ref", "subdirectory"), str),
    }},
}  # fmt: skip
_DIRECT_URL = {"url": str, "archive_info": {"hash": str, "hashes": _HASHES}, "vcs_info": ANY, "dir_info": ANY,
               "subdirectory": str}
REPORT = {  # written by `pip install --report` or `pip inspect`
    "version": str, "pip_version": str, "environment": ANY,
    "install": [{"download_info": _DIRECT_URL, "is_direct": bool, "is_yanked": bool, "requested": bool,
                 "requested_extras": ANY, "metadata": {"name": str, "*": ANY}}],
    "installed": [{"direct_url": _DIRECT_URL, "metadata_location": str, "installer": str, "requested": bool,
                   "metadata": {"name": str, "*": ANY}}],
}  # fmt: skip


def conform(value: Any, schema: Any, where: str) -> None:
    """Holds a value to a schema. Raises Malformed for a wrong type, Unavailable for a key that is not in the schema."""
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            raise Malformed(f"{where} is not a table")
        for key, inner in value.items():
            if key not in schema and "*" not in schema:
                raise Unavailable(f"{where} has {key!r}, which is not known here and might change what is installed")
            conform(inner, schema.get(key, schema.get("*")), f"{where}.{key}"[:200])
    elif isinstance(schema, list):
        if not isinstance(value, list):
            raise Malformed(f"{where} is not an array")
        for n, item in enumerate(value):
            conform(item, schema[0], f"{where}[{n}]")
    elif schema is not ANY and type(value) is not schema:
        raise Malformed(f"{where} is not of the type {schema.__name__}")


def _json_object(text: str) -> Any:
    """Parses JSON. Raises ValueError if an object has a key twice: readers differ in the value that they take."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(table := dict(pairs)) < len(pairs):
            raise ValueError("an object has a key twice")
        return table

    return json.loads(text, object_pairs_hook=unique)


def _read_lock(
    parse: Callable[[str], Any], schema: Any, read: Callable[[str, dict[str, Any]], Iterator[Artifact]], target: str
) -> Iterator[Artifact]:
    lock = parse(read_target(Path(target), MAX_LOCK).decode())
    conform(lock, schema, target)
    yield from read(target, lock)


def need(table: dict[str, Any], key: str, target: str) -> Any:
    """The value of a key that a lock file must have. Raises Malformed."""
    if key not in table:
        raise Malformed(f"{target} lacks {key!r}: is it complete, and written by its tool?")
    return table[key]


def need_version(version: Any, pattern: str, target: str) -> None:
    if not re.fullmatch(pattern, str(version)):
        raise Unavailable(f"{target} has version {str(version)[:40]!r}, which is not supported: get a newer btlog.py")


def release(version: str) -> tuple[str, ...]:
    """The epoch and release of a version (PEP 440), without final zeros: enough to tell most versions apart."""
    match = re.match(r"v?(?:([0-9]+)!)?([0-9]+(?:\.[0-9]+)*)", urllib.parse.unquote(version).strip().lower())
    parts = [part.lstrip("0") for part in match[2].split(".")] if match else [version]
    while parts and not parts[-1]:
        parts.pop()
    return (match[1] or "" if match else "", *parts)


class LockedPackage:
    """A package of a lock file. Makes artifacts from what the lock file says about it."""

    def __init__(self, target: str, package: dict[str, Any]) -> None:
        self._target, self.name = target, str(need(package, "name", target))
        self._project, self._version = normalize(self.name), str(package.get("version", ""))

    def trouble(self, why: str) -> Artifact:
        return Artifact(self._target, project=self.name, trouble=why)

    def skipped(self, folder: str) -> Artifact:
        plain = re.fullmatch(r"(file://)?[\w./@+ -]*[\w./]", folder)
        if not plain or folder.rstrip("/.").lower().endswith(DISTRIBUTIONS):
            return self.trouble(f"{folder!r} may be a file, and its hash is not locked")
        return Artifact(self._target, project=self.name, skipped=f"a folder: {folder}")

    def file(self, hashes: dict[str, str], *names: str) -> Artifact:
        """The artifact with these hashes and names, or with trouble if an installer might take another file."""
        filenames = tuple(dict.fromkeys(filter(None, names)))
        checksum = _checksum(hashes.get("sha256"))
        if not re.fullmatch(_PROJECT, self.name) or not re.match("v?[0-9]|\\Z", self._version):
            return self.trouble(f"this is not the name of a project, or {self._version!r} is not a version")
        if not checksum or len(hashes) > 1:  # installers accept a file that matches any one of them
            return self.trouble(f"{filenames[0] if filenames else 'it'} needs a SHA-256 and no other hash, and it has "
                                f"{', '.join(sorted(hashes)) or 'none'}")
        if strange := next(filter(self._is_foreign, filenames), None):
            return self.trouble(f"{strange} is not a file of this project in version {self._version or 'any'}")
        return Artifact(self._target, filenames, checksum, self._project)

    def _is_foreign(self, name: str) -> bool:
        """True if a filename belongs to another project or version. Few names of sdists show that."""
        of_project = is_of(self._project, name)
        if not name.lower().endswith((".whl", ".egg")) and not of_project:
            versioned = re.match(r".+?-v?[0-9]", normalize(name)) and name.endswith(DISTRIBUTIONS)
            return bool(versioned) and not normalize(name).startswith(f"{self._project}-")
        rest = re.match(rf"{'[-_.]+'.join(map(re.escape, self._project.split('-')))}[-_.]+(.*)", name, re.I | re.A)
        return not of_project or not rest or (self._version != "" and release(self._version) != release(rest[1]))

    def located(self, file: dict[str, Any], hashes: dict[str, str]) -> Artifact:
        """The artifact of a file that may have a name, a URL and a path."""
        url = file.get("url", "")
        # pip looks for a hash after each "&" or "#" of a URL.
        if "&" in url or url.partition("#")[2] not in (f"sha256={hashes.get('sha256')}", ""):
            return self.trouble("its URL has '&' or '#' in it, after which pip looks for a hash: remove it")
        served = url_name(url) if url_name(url).endswith(DISTRIBUTIONS) else ""  # its name in the index and the log
        return self.file(hashes, served, url_name(file.get("path", "")), file.get("filename", ""), file.get("name", ""))


def only(kinds: Iterable[str]) -> str:
    """The kind of a package's source; "" if it has none, or several."""
    items = list(kinds)
    return items[0] if len(items) == 1 else ""


def files_of(package: dict[str, Any]) -> list[dict[str, Any]]:
    return [*package.get("wheels", []), *([package["sdist"]] if "sdist" in package else [])]


def split_hash(text: str) -> dict[str, str]:
    """The hash "sha256:<hex>" as {"sha256": "<hex>"}; empty without a colon."""
    kind, separator, value = text.partition(":")
    return {kind: value} if separator else {}


def _pylock(target: str, lock: dict[str, Any]) -> Iterator[Artifact]:
    """The artifacts of a pylock.toml (PEP 751). Packages of a workspace come from folders and have no files."""
    need_version(need(lock, "lock-version", target), r"1\.[0-9]+", target)
    need(lock, "created-by", target)
    for entry in need(lock, "packages", target):
        package, files = LockedPackage(target, entry), files_of(entry)
        kinds = [kind for kind in ("vcs", "directory", "archive") if kind in entry] + ["files"] * bool(files)
        kind = only(kinds)
        if kind == "directory":
            yield package.skipped(entry["directory"].get("path", "?"))
        elif kind == "archive" and not re.search("[&#]", entry["archive"].get("subdirectory", "")):
            yield package.located(entry["archive"], entry["archive"].get("hashes", {}))
        elif kind == "files":
            yield from (package.located(file, file.get("hashes", {})) for file in files)
        else:
            yield package.trouble(f"it is locked {'by version control' if kind else 'without a file, or in two ways'}")


def _uv_lock(target: str, lock: dict[str, Any]) -> Iterator[Artifact]:
    need_version(need(lock, "version", target), "1", target)
    for entry in need(lock, "package", target):
        package, source, files = LockedPackage(target, entry), entry.get("source", {}), files_of(entry)
        kind = only(source.keys() - {"subdirectory"})
        if kind in ("directory", "editable", "virtual") and not files:
            yield package.skipped(source[kind])
        elif kind in ("registry", "url", "path") and files:
            wheel = url_name(source[kind]).endswith(".whl")
            if kind != "registry" and {wheel} != {"wheels" in entry, "sdist" not in entry}:
                yield package.trouble("its files are not of the kind of its source")
            for file in files:
                nameless = kind != "registry" and not {"url", "path", "filename"} & file.keys()
                where = {**file, **({kind: source[kind]} if nameless else {})}
                yield package.located(where, split_hash(file.get("hash", "")))
        else:
            yield package.trouble(f"it is locked by {', '.join(source) or 'nothing'}, and has {len(files)} files")


def _poetry_lock(target: str, lock: dict[str, Any]) -> Iterator[Artifact]:
    metadata = need(lock, "metadata", target)
    need_version(need(metadata, "lock-version", target), r"[12]\.[0-9]+", target)
    locked_urls = {entry.get("source", {}).get("url") for entry in need(lock, "package", target)}
    for entry in lock["package"]:
        package, kind = LockedPackage(target, entry), entry.get("source", {}).get("type", "")
        files = entry["files"] if "files" in entry else metadata.get("files", {}).get(package.name, [])
        if direct_sources(entry.get("dependencies")) - locked_urls:  # Poetry 1, or 2 with re-resolve, checks no hash
            yield package.trouble("it depends on a URL or path that is not locked as a package")
        elif kind == "directory":
            yield package.skipped(entry["source"].get("url", "?"))
        elif kind in ("", "legacy", "file", "url") and files:
            yield from (package.file(split_hash(file.get("hash", "")), file.get("file", "")) for file in files)
        else:
            yield package.trouble(f"it is locked by {kind or 'its version'}, and has {len(files)} files with hashes")


def direct_sources(dependencies: Any) -> set[Any]:
    """The URLs and paths of a package's dependencies. In poetry.lock, each is a version, a table, or an array."""
    values = dependencies.values() if isinstance(dependencies, dict) else ()
    items = itertools.chain.from_iterable(value if isinstance(value, list) else [value] for value in values)
    tables = [item for item in items if isinstance(item, dict)]
    return {str(table[key]) for table in tables for key in ("url", "path", "file", "git") if key in table}


_VCS_KEYS = {"git", "hg", "svn", "bzr", "ref", "revision"}


def _pdm_lock(target: str, lock: dict[str, Any]) -> Iterator[Artifact]:
    metadata = need(lock, "metadata", target)
    need_version(need(metadata, "lock_version", target), r"4\.[0-9.]+", target)
    for entry in need(lock, "package", target):
        package, vcs_keys = LockedPackage(target, entry), _VCS_KEYS & entry.keys()
        files, path = entry.get("files", []), entry.get("path", "")
        if files and not vcs_keys and not path and re.match("https?://|\\Z", entry.get("url", "")):
            for file in files:
                yield package.located({**file, "name": file.get("file", "")}, split_hash(file.get("hash", "")))
        elif path and not (vcs_keys or files or "url" in entry or path.endswith(DISTRIBUTIONS)):
            yield package.skipped(path)
        else:
            how = ", ".join(sorted(vcs_keys)) or path or "its version"
            yield package.trouble(f"it is locked by {how}, and not by the hashes of its files alone")


def _pipfile_lock(target: str, lock: dict[str, Any]) -> Iterator[Artifact]:
    need_version(need(need(lock, "_meta", target), "pipfile-spec", target), "6", target)
    groups = [lock[group] for group in lock.keys() - {"_meta"}]
    for name, entry in sorted(itertools.chain(*(group.items() for group in groups)), key=lambda item: item[0]):
        package, local = LockedPackage(target, {"name": name}), entry.get("path") or entry.get("file") or ""
        # pipenv writes these values into a requirements line, where anything else could become an option.
        plain = re.fullmatch(r"==[A-Za-z0-9.!+_-]+", entry.get("version", "")) and re.fullmatch(
            r"(?!.* -)[A-Za-z0-9_.,'\"<>=!~()+* -]*", entry.get("markers", "")) and re.fullmatch(
            r"[A-Za-z0-9._, '\[\]-]*", str(entry.get("extras", "")))
        if local and not entry.keys() & _VCS_KEYS and not local.endswith(DISTRIBUTIONS) and "://" not in local:
            yield package.skipped(local)
        elif entry.keys() & _VCS_KEYS or local:  # pipenv ignores the hashes of a local file
            yield package.trouble("it is locked by version control, or by a file whose hash pipenv does not check")
        elif entry.get("hashes") and plain:
            yield from (package.file(split_hash(text)) for text in entry["hashes"])
        else:
            yield package.trouble("it is locked without a hash, not to one version, or with a malformed marker")


def _report(target: str, report: dict[str, Any]) -> Iterator[Artifact]:
    """The artifacts of `pip install --report`, or of `pip inspect`, which has checksums only for direct URLs."""
    need_version(need(report, "version", target), "1", target)
    if ("install" in report) == ("installed" in report):
        raise Malformed(f"{target} lacks 'install' or 'installed': it is not a report of pip")
    for entry in report.get("install", []) + report.get("installed", []):
        package = LockedPackage(target, need(entry, "metadata", target))
        yield direct_artifact(package, entry.get("download_info") or entry.get("direct_url") or {})


def direct_artifact(package: LockedPackage, info: dict[str, Any]) -> Artifact:
    """The artifact of a direct_url.json (PEP 610), or of an entry of pip's report, which has the same form."""
    archive, url = info.get("archive_info", {}), info.get("url", "?")
    kind = only(info.keys() & {"archive_info", "vcs_info", "dir_info"})
    hashes = {**archive.get("hashes", {}), **split_hash(archive.get("hash", "").replace("=", ":", 1))}
    if kind == "dir_info":
        return package.skipped(url)
    if kind == "archive_info" and hashes and archive.get("hashes", {}).items() <= hashes.items():
        return package.file(hashes, url_name(url))
    return package.trouble("it has no checksum here; the JSON of pip install --report has")


LOCKS: dict[str, tuple[Callable[[str], Any], Any, Callable[[str, dict[str, Any]], Iterator[Artifact]]]] = {
    "uv.lock": (tomllib.loads, UV_LOCK, _uv_lock),
    "poetry.lock": (tomllib.loads, POETRY_LOCK, _poetry_lock),
    "pdm.lock": (tomllib.loads, PDM_LOCK, _pdm_lock),
    "Pipfile.lock": (_json_object, PIPFILE_LOCK, _pipfile_lock),
}


# --- Targets: requirements files, in the one form that lock tools write ---------------------------------------------

_URL = r"(?:https?|file)://[A-Za-z0-9._~:/?@!*+,%=()-]+"
_REQUIREMENT = re.compile(  # of a line without runs of spaces
    rf"(?:(?P<name>{_PROJECT}) ?(?:\[[A-Za-z0-9._, -]*\])?(?: ?== ?(?P<version>[A-Za-z0-9.!+_-]+)| @ (?P<url>{_URL}))"
    rf"|(?P<bare>{_URL}|[A-Za-z0-9._/+][A-Za-z0-9._/+-]*))"
    r"(?P<fragment>#sha256=[0-9a-fA-F]{64})?(?P<marker> ?; ?[A-Za-z0-9_.,'\"<>=!~()+*/ -]+?)?"
    r"(?P<hashes>(?: --hash[= ]sha256:[0-9a-fA-F]{64})*)")
_CONSTRAINT = re.compile(rf"({_PROJECT}) ?(\[[A-Za-z0-9._, -]*\])? ?([<>=!~][A-Za-z0-9.!+_*<>=~, -]*)?( ?;.*)?")
_OPTION_FLAGS = {"--no-index", "--require-hashes", "--prefer-binary", "--pre"}
_OPTIONS = {"-i", "--index-url", "--extra-index-url", "-f", "--find-links", "--trusted-host", "--no-binary",
            "--only-binary"}
_INCLUDES = {"-r": False, "--requirement": False, "-c": True, "--constraint": True}


class Requirements:
    """Reads a requirements file and those that it includes: projects with hashes, or URLs and paths.

    A line becomes an artifact with trouble unless pip-compile, uv, poetry, pdm or pipenv could have written it.
    """

    def __init__(self, target: str) -> None:
        self._target, self._size = target, 0
        self._read: dict[tuple[str, bool], bool] = {}  # path, constraints? -> True once it is read to its end
        self._artifacts: list[Artifact] = []
        self._pip_strict = self._uv_strict = False  # True if pip, or uv, will demand the hash of each file
        self._bare: list[str] = []  # projects whose only hash is in the URL

    def artifacts(self) -> list[Artifact]:
        self._file(Path(self._target), False)
        if not self._pip_strict and not self._uv_strict:
            self._artifacts += [
                self._trouble("pip checks only this hash, and none of its dependencies: give --hash", project)
                for project in self._bare
            ]
        return [dataclasses.replace(artifact, loose=not self._uv_strict) for artifact in self._artifacts]

    def _trouble(self, why: str, project: str = "") -> Artifact:
        return Artifact(self._target, project=project, trouble=why)

    def _file(self, path: Path, constraints: bool) -> None:
        key = (os.path.realpath(path), constraints)
        if key in self._read:  # each file is read once, however often it is included
            if not self._read[key]:
                raise Malformed(f"{path} includes itself")
            return
        self._read[key] = False
        if len(self._read) > MAX_FILES_READ:
            raise Unavailable(f"{self._target} includes more than {MAX_FILES_READ} files")
        data = read_target(path, MAX_LOCK - self._size)
        self._size += len(data)
        for number, line in self._lines(path, data):
            self._line(path, f"{path.name}, line {number}", line, constraints)
        self._read[key] = True

    def _lines(self, path: Path, data: bytes) -> Iterator[tuple[int, str]]:
        """Yields the logical lines of a file without comments, each after the number of its first line."""
        try:
            text = data.removeprefix(b"\xef\xbb\xbf").decode().replace("\r\n", "\n")
        except UnicodeDecodeError:
            raise Unavailable(f"{path} is not in UTF-8: convert it") from None
        for line in text.split("\n", 2)[:2]:  # where pip looks for an encoding
            for coding in re.findall(r"coding[:=]\s*([-\w.]+)", line) if "#" in line else ():
                if coding.lower() not in ("utf-8", "utf8"):
                    raise Unavailable(f"{path} is not in UTF-8 but in {coding[:40]}: convert it")
        joined, start = list[str](), 0
        for number, line in enumerate(text.split("\n"), 1):
            comment = re.search(r"(^|\s)#.*", line)
            # Installers differ in what ends a line, and whether a comment continues. Neither may make a difference.
            only_comment = comment is not None and not line[: comment.start()].strip()
            if len(line.splitlines()) > 1 or (only_comment and joined) or (comment and line.rstrip().endswith("\\")):
                raise Unavailable(f"{path.name}, line {number}: a comment within a requirement, or a character that "
                                  "is the end of a line only for some installers: remove it")
            part = line[: comment.start()] if comment else line
            start = start or number
            joined.append(part.removesuffix("\\"))
            if not part.endswith("\\"):
                if len(whole := "".join(joined).strip()) > MAX_HEAD:
                    raise Unavailable(f"{path.name}, line {start}: it has more than {MAX_HEAD} characters")
                if whole:
                    yield start, whole
                joined, start = [], 0
        if joined:
            raise Unavailable(f"{path.name}: the last line continues past the end of the file: was it cut off?")

    def _line(self, path: Path, where: str, line: str, constraints: bool) -> None:
        line = re.sub(" +", " ", line)
        if not re.fullmatch(r"[ -#%-\[\]-~]+", line):  # no tab, "$" or "\": pip gives these a meaning
            why = "has a character that installers read in different ways"
            self._artifacts.append(self._trouble(f"{where}: {line[:80]!r} {why}"))
        elif line.startswith("-"):
            self._option(path, where, line, constraints)
        elif constraints and " -" not in line and _CONSTRAINT.fullmatch(line):
            pass  # a constraint only limits versions, and names no file
        elif match := _REQUIREMENT.fullmatch(line):
            self._requirement(where, match, constraints)
        else:
            project = (re.match(_PROJECT, line) or [line[:80]])[0]
            self._artifacts.append(self._trouble(
                f"{where}: {line[:80]!r} is not name==version or name @ URL with --hash=sha256:… and no other option",
                project))

    def _option(self, path: Path, where: str, line: str, constraints: bool) -> None:
        """Reads a line of options: an included file, or options that only change where files come from."""
        try:
            words = [word for part in shlex.split(line) for word in part.split("=", 1 if part[:2] == "--" else 0)]
        except ValueError:  # an unclosed quote
            words = [line]
        if len(words) == 2 and words[0] in _INCLUDES:
            if not re.fullmatch(r"[A-Za-z0-9._/+@][A-Za-z0-9._/+@ -]*", words[1]) or re.search(r"[\"']", line):
                raise Unavailable(f"{where}: {words[1][:80]!r} has to be the plain path of a file")
            if constraints > _INCLUDES[words[0]] or not words[1].endswith((".txt", ".in")):
                raise Unavailable(f"{where}: constraints include only constraints, and only .txt or .in files")
            other = path.parent / words[1]
            if os.path.realpath(other) != os.path.realpath(os.path.normpath(other)):  # pip opens the normalized path
                raise Unavailable(f"{where}: {words[1][:80]!r} goes through a link: some installers open another file")
            self._file(other, _INCLUDES[words[0]])
            return
        while words and (words[0] in _OPTION_FLAGS or (words[0] in _OPTIONS and words[1:] and words[1][:1] != "-")):
            self._uv_strict |= line == "--require-hashes"  # alone on its line: uv ignores what follows another option
            del words[: 1 if words[0] in _OPTION_FLAGS else 2]
        if words and words[0] in ("-e", "--editable"):
            why = "a folder, or version control, has no hash: export with --no-emit-project or --no-emit-local"
            self._artifacts.append(self._trouble(f"{where}: {words[0]}: {why}", line[:80]))
        elif words:
            why = "is not known to be safe in a file, or needs a line with no other option: give it to pip itself"
            self._artifacts.append(self._trouble(f"{where}: {words[0][:80]!r} {why}", line[:80]))

    def _requirement(self, where: str, match: re.Match[str], constraint: bool) -> None:
        url = match["url"] or match["bare"] or ""
        name = url_name(url)
        project = normalize(match["name"]) if match["name"] else project_of(name)
        hashes = re.findall(r"sha256[:=]([0-9a-fA-F]{64})", match["hashes"])
        self._pip_strict |= bool(hashes) and not constraint
        trouble = ""
        if url and not name.endswith(DISTRIBUTIONS):
            trouble = "is not the URL or the path of a wheel or sdist"
        elif url and constraint:
            trouble = "is a URL in a constraint"
        elif (match["fragment"] and not url.startswith("http")) or (match["bare"] and "/" not in url):
            # Only --hash makes installers refuse a path that is a folder. A name without "/" may be a project.
            trouble = "is not in the form that tools write: give a path with '/' and --hash"
        elif url and name.lower().endswith((".whl", ".egg")) and not is_of(project, name):
            trouble = f"is not the project of {name}"
        elif " -" in (marker := match["marker"] or "") or (url and marker[:3] not in ("", " ; ")) or (
            match["fragment"] and not url
        ):
            trouble = "is not in the form that tools write"
        elif not hashes and not match["fragment"] and not constraint:
            trouble = "needs --hash=sha256:…"
        elif match["fragment"]:
            self._bare += [] if hashes else [project]
            hashes.append(match["fragment"][8:])
        if trouble:
            self._artifacts.append(self._trouble(f"{where}: {(match['name'] or url)[:80]} {trouble}", project))
        else:
            checksums = [f"sha256:{sha256.lower()}" for sha256 in hashes]
            self._artifacts += [Artifact(self._target, (name,) if url else (), c, project) for c in checksums]


# --- Targets: what each of them names -----------------------------------------------------------------------------

def artifacts_of(target: str) -> list[Artifact]:
    """The artifacts of a target: the file itself, the distributions in a folder, or those that a lock file lists.

    Raises Malformed for a wrong format, Unavailable for what can't be read or might change what is installed.
    """
    path = Path(target)
    if path.is_dir():
        return _in_folder(path)
    if not (reader := _reader_of(path.name)):
        return [Artifact(target, (path.name,), checksum_of(path))]
    try:
        artifacts = list(dict.fromkeys(reader(target)))
    except (ValueError, RecursionError) as error:  # errors of tomllib and json
        raise Malformed(f"{target} can't be parsed: {error}"[:300]) from None
    if not artifacts:
        raise Malformed(f"{target} names nothing to install, so there is nothing to verify")
    return artifacts


def _reader_of(name: str) -> Callable[[str], Iterator[Artifact]] | None:
    """The parser for a target of this name; None for a plain file. Raises Malformed for other lock files."""
    if re.fullmatch(r"pylock(\.[^.]+)?\.toml", name):
        return functools.partial(_read_lock, tomllib.loads, PYLOCK, _pylock)
    if name in LOCKS:
        return functools.partial(_read_lock, *LOCKS[name])
    if name.endswith((".py.lock", ".uv.lock")):
        return functools.partial(_read_lock, *LOCKS["uv.lock"])
    if name.endswith(".json"):
        return functools.partial(_read_lock, _json_object, REPORT, _report)
    if name.lower().endswith((".txt", ".in")) or re.match(r"(requirements|constraints)([.-](lock|pip))?\Z", name):
        return lambda target: iter(Requirements(target).artifacts())
    if name.endswith(NOT_READ):
        raise Malformed(
            f"{name} is not read: export it as pylock.toml or as requirements with hashes, and verify that (if "
            "the file itself is logged, give its --proof)"
        )
    return None


_PAGE_NAME = re.compile(r"\.[sx]?html?(\.|\Z)", re.IGNORECASE)


def _in_folder(folder: Path) -> list[Artifact]:
    """The distributions in a folder. Its pages become trouble: pip's --find-links reads them as indexes."""
    artifacts = []
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() and path.is_dir():
            artifacts.append(Artifact(str(path), trouble="linked folders are not followed: name it as a target"))
        elif mimetypes.guess_type(path.name, strict=False)[0] == "text/html" or _PAGE_NAME.search(path.name):
            artifacts.append(Artifact(str(path), trouble="installers read a page in a folder as an index: remove it"))
        elif path.name.lower().endswith(DISTRIBUTIONS) and not path.is_dir():
            try:
                artifacts.append(Artifact(str(path), (path.name,), checksum_of(path)))
            except Unavailable as error:
                artifacts.append(Artifact(str(path), trouble=str(error)))
    if not artifacts:
        raise Malformed(f"there are no wheels or sdists in {folder}")
    return artifacts


# --- Verifying -------------------------------------------------------------------------------------------------

MAX_LOOK_UP, MAX_PROOF_FILE = 1 << 18, 1 << 18  # bytes of the log's answers about one artifact
MAX_CANDIDATES = 20  # entries to try for one artifact


def candidates(artifact: Artifact, entries: Iterable[tuple[int, str, str]]) -> list[tuple[int, str]]:
    """Index and filename of each entry that is the artifact's, newest first. Raises BadProof if none is."""
    named = [entry for entry in entries if artifact.is_named(entry[1])]
    matches = [(index, name) for index, name, checksum in named if checksum == artifact.checksum]
    if matches:
        return sorted(matches, reverse=True)[:MAX_CANDIDATES]
    if same_name := [entry for entry in named if entry[1] in artifact.names]:
        index, _, checksum = same_name[-1]
        raise BadProof(f"not logged, but with another checksum at index {index}: the log has {checksum}, and this is "
                       f"{artifact.checksum}: was it changed?")
    raise BadProof("not logged")


class ProofSource:
    """Finds .tlog-proof files. No proof from here has been checked."""

    def find(self, artifact: Artifact) -> Iterable[tuple[str, bytes]]:
        """Filenames of the artifact, each with an unchecked proof. Raises BadProof if not logged, or Unavailable."""
        raise NotImplementedError


class ProofsBeside(ProofSource):
    """The .tlog-proof beside a file; if there is none, another source is asked."""

    def __init__(self, other: ProofSource | None) -> None:
        self._other = other

    def find(self, artifact: Artifact) -> Iterable[tuple[str, bytes]]:
        beside = Path(f"{artifact.target}.tlog-proof")
        if os.path.exists(beside) and Path(artifact.target).name == artifact.filename:
            return [(artifact.filename, read_proof(beside))]
        if self._other is None:
            where = f"no {beside.name} beside it: " if beside.name == f"{artifact.filename}.tlog-proof" else ""
            raise Unavailable(f"{where}give --log-url, --proof, --proofs, or a policy with the log's URL")
        return self._other.find(artifact)


class ProofFiles(ProofSource):
    """Proofs from one file, or from a folder of FILENAME.tlog-proof files."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        self._files: dict[str, list[str]] | None = None  # filenames by project
        self._parsed: dict[str, tuple[bytes, Proof, Tree]] = {}  # by filename

    def find(self, artifact: Artifact) -> Iterable[tuple[str, bytes]]:
        if not self._path.is_dir():
            return [(artifact.filename, read_proof(self._path))]
        for name in artifact.names:
            if os.path.exists(file := self._path / f"{name}.tlog-proof"):  # Path.exists() raises for long names
                return [(name, read_proof(file))]
        with self._lock:
            for name in self._of_project(artifact.project):
                data, proof, tree = self._parsed[name]
                if _leads_to(tree, proof, name, artifact.checksum):
                    return [(name, data)]
        raise Unavailable(f"no proof of {artifact.filename or artifact.checksum} is in {self._path}")

    def _of_project(self, project: str) -> list[str]:
        """The filenames of a project that have a proof here. Reads and parses each proof once."""
        if self._files is None:
            self._files = {}
            for file in self._path.glob("*.tlog-proof"):
                name = file.name.removesuffix(".tlog-proof")
                self._files.setdefault(project_of(name), []).append(name)
        names = self._files.get(project, [])
        for name in [name for name in names if name not in self._parsed]:
            try:
                proof = Proof.parse(data := read_proof(self._path / f"{name}.tlog-proof"))
                self._parsed[name] = data, proof, Checkpoint.parse(split_note(proof.checkpoint)[0]).tree
            except Error:
                names.remove(name)
        return names


def _leads_to(tree: Tree, proof: Proof, filename: str, checksum: str) -> bool:
    """True if a proof is about this file. Does not check the signatures of its checkpoint."""
    try:
        check_inclusion(leaf_hash(proof.entry(filename, checksum).encode()), proof.index, tree, proof.hashes)
    except Error:
        return False
    return True


def read_proof(path: Path) -> bytes:
    return read_target(path, MAX_POLICY)


def _fields(indexed_entry: tuple[int, bytes]) -> tuple[int, str, str]:
    """Index, filename and checksum of an entry."""
    index, data = indexed_entry
    return index, field_of(FILENAME, data).decode(errors="replace"), field_of(CHECKSUM, data).decode(errors="replace")


class StoredProofs(ProofSource):
    """Proofs from the folder of a log or of a monitor."""

    def __init__(self, store: LogStore) -> None:
        self._store, self._note = store, store.checkpoint("published")
        # Not the stored tree: the log may have grown since this note.
        self._tree = Checkpoint.parse(split_note(self._note)[0]).tree if self._note else Tree(0, EMPTY_ROOT)

    def find(self, artifact: Artifact) -> Iterable[tuple[str, bytes]]:
        if self._note is None:
            raise Unavailable(f"{self._store.folder} has no checkpoint yet")
        entries: list[tuple[int, bytes]] = []
        for kind, value in [*((FILENAME, name) for name in artifact.names), (CHECKSUM, artifact.checksum)]:
            entries += self._store.look_up(kind, value.encode(errors="replace"), self._tree.size)
        tiles = Tiles(self._tree.size, self._store.tile)
        for index, filename in candidates(artifact, map(_fields, entries)):
            yield filename, self._store.proof(index, self._note, tiles)


class LoggedProofs(ProofSource):
    """Proofs from a log. If it has no look-up, all entries are read, once; not for a gate."""

    def __init__(self, source: LogReader, policy: Policy, artifacts: Iterable[Artifact]) -> None:
        self._source, self._policy, self._artifacts = source, policy, artifacts
        self._lock = threading.Lock()
        self._static: tuple[bytes, AuthenticTiles, dict[int, bytes]] | None = None

    def find(self, artifact: Artifact) -> Iterable[tuple[str, bytes]]:
        queries = [*(("filename", name) for name in artifact.names), ("checksum", artifact.checksum)]
        entries: list[tuple[int, str, str]] = []
        for name, value in queries if artifact.project else queries[:1]:
            answer = self._source.fetch(f"/entries?{name}={urllib.parse.quote(value, safe='')}", None, MAX_LOOK_UP)
            if answer is None and not self._artifacts:
                raise Unavailable(f"{self._source.url} can't look entries up: give --storage-dir with a mirror of it")
            if answer is None:
                yield from self._search(artifact)
                return
            entries += self._parse(answer[1])
            if any(checksum == artifact.checksum and artifact.is_named(filename) for _, filename, checksum in entries):
                break
        for index, filename in candidates(artifact, entries):
            yield filename, self._source.get(f"/entry/{index}/proof", MAX_PROOF_FILE)

    def _parse(self, answer: bytes) -> list[tuple[int, str, str]]:
        try:
            entries = json.loads(answer)["entries"]
            return [(parse_decimal(str(e["index"])), str(e["filename"]), str(e["checksum"])) for e in entries]
        except (Malformed, ValueError, RecursionError, KeyError, TypeError):
            raise Unavailable(f"{self._source.url}/entries does not answer as a log does") from None

    def _search(self, artifact: Artifact) -> Iterator[tuple[str, bytes]]:
        with self._lock:
            note, tiles, entries = self._static = self._static or self._read_all()
            for index, filename in candidates(artifact, map(_fields, entries.items())):
                extra = entries[index] if b"\n" in entries[index][93:] else b""
                yield filename, encode_proof(Proof(index, tuple(prove_inclusion(tiles, index)), note, extra))

    def _read_all(self) -> tuple[bytes, AuthenticTiles, dict[int, bytes]]:
        """The checkpoint of a static tree, its tiles, and, by index, its entries that may be an artifact's."""
        note = self._source.checkpoint()
        tree = open_checkpoint(note, self._policy).tree
        tiles, entries = AuthenticTiles(tree, self._source.hashes), dict[int, bytes]()
        names = {name.encode(errors="replace") for artifact in self._artifacts for name in artifact.names}
        checksums = {artifact.checksum.encode() for artifact in self._artifacts}
        count = (tree.size + 255) // 256
        widths = ((n, min(256, tree.size - 256 * n)) for n in range(count))
        progress = show_progress("entry bundles read, as this log has no look-up")
        for n, (_, bundle) in enumerate(self._source.each(lambda place: self._source.entries(*place), widths)):
            if bundle is None:
                path = tile_path(None, n, min(256, tree.size - 256 * n))
                raise Unavailable(f"{self._source.url}/{path} is not an entry bundle of that width")
            for index, entry in enumerate(bundle, 256 * n):
                if field_of(FILENAME, entry) in names or field_of(CHECKSUM, entry) in checksums:
                    entries[index] = entry
            if len(entries) > MAX_WAITING:
                raise Unavailable(f"{self._source.url} has more than {MAX_WAITING} entries of these files")
            progress(n + 1, count)
        return note, tiles, entries


@dataclass(frozen=True)
class Verified:
    """The result for an artifact: the entry and the checkpoint that prove it to be logged, or an error."""
    artifact: Artifact
    error: Error | None = None
    entry: Entry | None = None
    index: int = 0
    checkpoint: Checkpoint | None = None
    proof: bytes = b""

    def json(self, policy: Policy) -> dict[str, Any]:
        a, c = self.artifact, self.checkpoint
        name = self.entry.filename if self.entry else a.filename or None
        value = {"target": a.target, "filename": name, "checksum": a.checksum or None, "ok": self.error is None}
        if self.error or not self.entry or not c:
            return {**value, "project": a.project or None, "error": str(self.error)}
        publisher = self.entry.publisher._asdict() if self.entry.publisher else None
        cosigned = [{"witness": key.name, "time": utc(at)} for key, at in c.cosigned]
        return {**value, "index": self.index, "origin": c.origin, "tree_size": c.tree.size, "publisher": publisher,
                "cosigned": cosigned, "witnesses": len(policy.witnesses)}

    def row(self, policy: Policy) -> list[str]:
        """A row of the table: mark, artifact, origin and index, publisher, cosignatures, time; or the error."""
        if self.error or not self.entry or not self.checkpoint:
            return ["\u2717", self.artifact.label, printable(str(self.error)), "", "", ""]
        cosigned = self.checkpoint.cosigned
        when = utc(max(at for _, at in cosigned)) if cosigned else ""
        who = printable(self.entry.publisher.subject) if self.entry.publisher else ""
        where = f"{self.checkpoint.origin} {self.index}"
        return ["\u2713", self.artifact.label, where, who, f"{len(cosigned)}/{len(policy.witnesses)}", when]

    def line(self) -> str:
        if not self.entry or not self.checkpoint:
            label = self.artifact.label
            return str(self.error) if str(self.error).startswith(label) else f"{label}: {self.error}"
        by = f", published by {printable(self.entry.publisher.subject)}" if self.entry.publisher else ""
        cosigned = self.checkpoint.cosigned
        when = f", last at {utc(max(at for _, at in cosigned))}" if cosigned else ""
        where = f"index {self.index} of {self.checkpoint.origin}, tree size {self.checkpoint.tree.size}"
        witnesses = f"{len(cosigned)} witness{'es' if len(cosigned) != 1 else ''}"
        return f"{self.artifact.label}: logged at {where}{by}, cosigned by {witnesses}{when}"


LIST_INSTALLED = """
import sys
sys.path[:] = [folder for folder in sys.path if folder]  # first: a json.py in this folder must not run
import base64, hashlib, importlib.metadata, json
def changed(file):
    try:
        data = file.locate().read_bytes() if file.locate().is_file() else None
        found = hashlib.new(file.hash.mode, data).digest()
    except (OSError, TypeError, ValueError):
        return True
    return base64.urlsafe_b64encode(found).decode().rstrip("=") != file.hash.value.rstrip("=")
def unknown(file):
    return not (file.hash or file.suffix == ".pyc" or file.parent.suffix == ".dist-info")
print(json.dumps([{
    "name": d.metadata["Name"] or "?", "version": d.version or "?", "direct_url": d.read_text("direct_url.json"),
    "files": sum(bool(f.hash) for f in d.files or ()), "unknown": [str(f) for f in d.files or () if unknown(f)],
    "changed": [str(f) for f in d.files or () if f.hash and changed(f)],
} for d in importlib.metadata.distributions()]))
"""


def installed_artifacts(python: str) -> Iterator[Verified]:
    """Yields, for each distribution that an interpreter has installed, the artifact to verify or an error.

    direct_url.json (PEP 610) has the checksum of a file that did not come from an index. RECORD has the hashes of the
    installed files, which show later changes. Raises Unavailable.
    """
    try:
        done = subprocess.run([python, "-c", LIST_INSTALLED], capture_output=True, timeout=300, check=True)
        distributions = sorted(json.loads(done.stdout), key=lambda entry: str(entry["name"]).lower())
    except (OSError, ValueError, LookupError, TypeError, subprocess.SubprocessError) as error:
        last_line = (getattr(error, "stderr", None) or b"").decode(errors="replace").strip().rpartition("\n")[2]
        why = last_line or (type(error).__name__ if isinstance(error, subprocess.SubprocessError) else str(error))
        asks = "is it a Python of 3.8 or later?"
        raise Unavailable(f"{python} does not list what is installed; {asks} {why[:200]}") from None
    for entry in distributions:
        package = LockedPackage(python, entry)
        if entry["changed"]:
            files = f"{len(entry['changed'])} of its files, such as {entry['changed'][0]}"
            yield Verified(package.trouble(""), BadProof(f"{files}, differ from its RECORD: they were changed"))
        elif entry["direct_url"] and (entry["unknown"] or not entry["files"]):
            what = f"of {entry['unknown'][0]}" if entry["unknown"] else "of any file"
            yield Verified(package.trouble(f"its RECORD has no hash {what}, so it may have been changed"))
        elif entry["direct_url"]:
            try:
                info = _json_object(entry["direct_url"])
                conform(info, _DIRECT_URL, "direct_url.json")
                yield Verified(direct_artifact(package, info))
            except (Error, ValueError, RecursionError) as error:
                yield Verified(package.trouble(f"its direct_url.json can't be read: {error}"[:200]))
        else:
            yield Verified(package.trouble(
                f"version {entry['version']} does not tell which file it came from; all {entry['files']} files "
                "match its RECORD. Verify the lock file that it was installed from"))


def cmd_verify(args: argparse.Namespace) -> int:
    policy = read_policy(args)
    if bool(args.proof) + bool(args.proofs) + bool(args.log_url) + bool(args.storage_dir) > 1:
        raise Malformed("give one of --proof, --proofs, --log-url and --storage-dir")
    if args.proof and len(args.targets) != 1:
        raise Malformed("--proof is the proof of one file")
    todo = list(read_targets(args, policy))
    skipped = [result.artifact for result in todo if result.artifact.skipped]
    todo = [result for result in todo if not result.artifact.skipped]
    if not todo:
        raise Malformed(f"there is nothing to verify: {'all of it is in folders' if skipped else 'name a target'}")
    demands = Demands(policy, args.publisher_issuer, args.publisher_subject, args.max_age)
    with contextlib.ExitStack() as stack:
        source = proof_source(args, policy, [result.artifact for result in todo], stack)
        judge = functools.partial(verify_artifact, source, demands)
        pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(LogReader.THREADS))
        progress, results = show_progress("artifacts"), list[Verified]()
        for result in pool.map(judge, todo):
            results.append(result)
            progress(len(results), len(todo))
    return tell_verified(results, skipped, args, policy)


def project_artifacts(args: argparse.Namespace, policy: Policy, project: str) -> list[Artifact]:
    """The files of a project that a log has, newest first, not checked yet; raises Unavailable."""
    found, urls = list[Entry](), log_urls(args, policy)
    with contextlib.ExitStack() as stack:
        if args.storage_dir:
            store = stack.enter_context(contextlib.closing(LogStore(Path(args.storage_dir), read_only=True)))
            end = store.tree("published").size
            while end and len(found) < MAX_WAITING:
                matches, end = store.of_project(normalize(project), end, MAX_OF_PROJECT)
                found += [Entry.parse(data) for _, data in matches]
        elif urls:
            source = stack.enter_context(contextlib.closing(LogReader(urls, 2, ANSWER_TIMEOUT, 3, args.timeout)))
            before: int | None = None
            pages = 0
            while before != 0 and len(found) < MAX_WAITING:
                cut = "" if before is None else f"&before={before}"
                try:
                    answer = json.loads(source.get(f"/entries?project={urllib.parse.quote(project)}{cut}", MAX_LOOK_UP))
                    found += [Entry(str(e["filename"]), str(e["checksum"])) for e in answer["entries"]]
                    older = parse_decimal(str(answer.get("next", 0)))
                except (Malformed, ValueError, RecursionError, KeyError, TypeError, AttributeError):
                    raise Unavailable(f"{source.url}/entries does not answer as a log does") from None
                if (before is not None and older >= before) or (pages := pages + 1) > 1000:
                    raise Unavailable(f"{source.url} answers with the same files again and again, or without end")
                before = older
        else:
            raise Malformed("to find a project's files, give --log-url or --storage-dir")
    if not found:
        raise Unavailable(f"no file of {project} is logged")
    return [Artifact(project, (entry.filename,), entry.checksum) for entry in dict.fromkeys(found)]


def read_targets(args: argparse.Namespace, policy: Policy) -> Iterator[Verified]:
    """Yields a result for each artifact of the targets, with an error if it can't be verified. Raises Unavailable."""
    for target in args.targets:
        try:
            if args.proof:
                yield Verified(Artifact(target, (Path(target).name,), checksum_of(Path(target))))
                continue
            for artifact in artifacts_of(target):
                yield Verified(artifact, Unavailable(artifact.trouble) if artifact.trouble else None)
        except (Unavailable, Malformed) as error:  # an error in one target must not hide the others
            yield Verified(Artifact(target, (Path(target).name,)), error)
    for project in args.project or ():
        yield from (Verified(artifact) for artifact in project_artifacts(args, policy, project))
    if args.installed:
        for result in installed_artifacts(args.installed):
            trouble = result.artifact.trouble
            yield dataclasses.replace(result, error=Unavailable(trouble)) if trouble and not result.error else result


def proof_source(
    args: argparse.Namespace, policy: Policy, artifacts: list[Artifact], stack: contextlib.ExitStack
) -> ProofSource:
    if args.proof or args.proofs:
        return ProofFiles(Path(args.proof or args.proofs))
    if args.storage_dir:
        return StoredProofs(stack.enter_context(contextlib.closing(LogStore(Path(args.storage_dir), read_only=True))))
    log_proofs: ProofSource | None = None
    if urls := log_urls(args, policy):
        # Gives up early: a person waits for the answer.
        source = LogReader(urls, attempts=2, timeout=ANSWER_TIMEOUT, give_up=3, patience=args.timeout)
        log_proofs = LoggedProofs(stack.enter_context(contextlib.closing(source)), policy, artifacts)
        if not args.quiet:
            notice = threading.Timer(3, logger.info, ("asking %s …", source.url))
            notice.daemon = True
            notice.start()
            stack.callback(notice.cancel)
    return log_proofs if log_proofs and args.log_url else ProofsBeside(log_proofs)


@dataclass(frozen=True)
class Demands:
    """What a proof must show: a policy, patterns for all of the issuer and subject, an age in seconds; None for any."""
    policy: Policy
    issuer: str | None = None
    subject: str | None = None
    max_age: float | None = None


def verify_artifact(source: ProofSource, demands: Demands, result: Verified) -> Verified:
    """The result for an artifact: with a proof that meets the demands, or with an error."""
    if result.error:
        return result
    artifact, error = result.artifact, Error()
    try:
        for filename, proof in source.find(artifact):  # a file may be logged more than once, by several publishers
            try:
                return check_artifact(artifact, filename, proof, demands)
            except Error as refused:
                error = refused
    except Error as refused:
        error = refused
    return Verified(artifact, error)


def check_artifact(artifact: Artifact, filename: str, proof: bytes, demands: Demands) -> Verified:
    """The result that `proof` gives for an artifact. Raises Error if it does not meet the demands."""
    parsed = Proof.parse(proof)
    try:
        entry = parsed.entry(filename, artifact.checksum)
        checkpoint = check_logged(entry, proof, demands.policy)
    except BadProof as error:
        raise BadProof(f"{error}; the file has {artifact.checksum}: was it changed since it was logged?") from None
    check_age(checkpoint, demands.policy, demands.max_age, time.time())
    pins, values = (demands.issuer, demands.subject), entry.publisher or ("", "")
    for pin, what, value in zip(pins, ("issuer", "subject"), values, strict=True):
        if pin is not None and not (entry.publisher and re.fullmatch(pin, value)):
            raise BadProof(f"its publisher's {what} is {value!r}" if entry.publisher else "it has no publisher")
    return Verified(artifact, None, entry, parsed.index, checkpoint, proof)


def tell_verified(results: list[Verified], skipped: list[Artifact], args: argparse.Namespace, policy: Policy) -> int:
    """Prints the results, saves the proofs if asked to, and returns the exit code."""
    # A malformed proof of a file is a false claim that the file is logged: exit code 1, not 2.
    codes = {1 if isinstance(r.error, Malformed) and r.artifact.checksum else r.error.exit_code if r.error else 0
             for r in results}
    if args.save_proofs:
        codes |= save_proofs(Path(args.save_proofs), results)
    code = combined_exit_code(codes)
    if args.json:
        loose = any(result.artifact.loose for result in results)
        report = {"ok": code == 0, "artifacts": [result.json(policy) for result in results],
                "skipped": [{"target": a.target, "project": a.project, "reason": a.skipped} for a in skipped],
                "may_install_unlisted": loose}
        print(json.dumps(report, indent=1))
        return code
    if sys.stdout.isatty() and len(results) > 1 and not args.quiet:
        head = ["", "artifact", "logged at", "publisher", "cosigned", "last at"]
        print_table([head, *(result.row(policy) for result in results)])
    else:
        tell_lines(results, args.quiet)
    unreached = [result for result in results if isinstance(result.error, Unreachable)]
    skipped_names = [f"{a.project} ({a.skipped})" for a in skipped]
    names = ", ".join([*skipped_names[:20], *["…"] * (len(skipped_names) > 20)])
    unlogged = f"; not checked, since no log has them: {names}" if skipped_names else ""
    if unreached:
        logger.error("%s: %d of %d artifacts could not be checked", unreached[0].error, len(unreached), len(results))
    elif (len(results) > 1 and not args.quiet) or skipped_names:
        good = sum(result.error is None for result in results)
        logger.info("%d of %d artifacts are logged as they should be%s", good, len(results), unlogged)
    if code == 0 and any(result.artifact.loose for result in results) and not args.quiet:
        logger.info("with uv, use `uv pip sync`, or --require-hashes: else it also installs unlisted files, unchecked")
    return code


def tell_lines(results: list[Verified], quiet: bool) -> None:
    """Prints a line for each artifact, except for those whose log did not answer."""
    wrong = [result for result in results if result.error and not isinstance(result.error, Unreachable)]
    printed = set(map(id, wrong[:MAX_TOLD]))
    for result in results:
        if id(result) in printed:
            logger.error("%s", result.line())
        elif not result.error and not quiet:
            print(result.line())
    if more := len(wrong) - len(printed):
        logger.error("%d more are wrong, and not shown one by one", more)


def save_proofs(folder: Path, results: list[Verified]) -> set[int]:
    """Saves the proof of each logged file. Returns the exit codes of those that could not be written."""
    make_folder(folder)
    codes = set[int]()
    for result in results:
        if not result.error and result.entry:
            try:
                replace_file(folder / f"{result.entry.filename}.tlog-proof", result.proof)
            except Unavailable as error:
                logger.error("%s", error)
                codes.add(error.exit_code)
    return codes


def print_table(rows: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


# --- Checking and monitoring ---------------------------------------------------------------------------------

def cmd_fsck(args: argparse.Namespace) -> int:
    folder = Path(args.storage_dir)
    count, good = check_folder(folder)
    if count and args.repair:
        with contextlib.closing(LogStore(folder)) as store:
            tree = rebuild(store, stored_key(store), show_progress("rebuilt"))
        print(f"{folder}: made tiles and look-up keys anew: the entries lead to the signed root of size {tree.size}")
        count, good = check_folder(folder)
    print(f"{count} findings" if count else good)
    return 1 if count else 0


def check_folder(folder: Path) -> tuple[int, str]:
    """Prints all that is wrong with a log's folder. Returns the number of findings, and the text to print for none."""
    with contextlib.closing(LogStore(folder, read_only=True)) as store:
        key, count = stored_key(store), 0
        with store.database.snapshot():  # else a log that grows meanwhile would look broken
            for line in check_store(store, key, show_progress("checked")):
                count += 1
                print(line)
            entries = 0 if count else store.stored().size
    return count, f"{folder}: all {entries} entries of {key.name} are as they should be"


def stored_key(store: LogStore) -> VerifierKey:
    if (key := store.key()) is None:
        raise Corrupt(f"{store.folder} does not say which log it belongs to")
    return key


def cmd_monitor(args: argparse.Namespace) -> int:
    policy, folder = read_policy(args), Path(args.storage_dir)
    if not (urls := log_urls(args, policy)):
        raise Malformed("give --log-url, or a policy with the log's URL")
    if args.max_age is not None and not policy.witnesses:
        raise Malformed("--max-age is about cosignatures, and the policy has no witnesses")
    terms = watch_terms(args.filename_regex or (), args.checksum_regex or (), args.project or ())
    owned = OwnFiles(args.known, terms) if args.known else None
    if owned and not args.project:
        raise Malformed("--known is about the files of a project: name it with --project")
    try:
        if owned:
            owned.read()
    except Unavailable as error:
        raise Malformed(str(error)) from None
    make_folder(folder)
    args.follow = args.follow or args.once == "false"
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(contextlib.closing(LogReader(urls)))
        index = Index(args.index_url, give_up=8) if args.index_url else None
        if index:
            stack.enter_context(contextlib.closing(index.source))
        try:
            store = stack.enter_context(contextlib.closing(MirrorStore(folder)))
            # An index is compared only with the whole of a log.
            monitor = Monitor(store, source, policy, WatchList(terms, args.max_age), args.follow and not index)
            alarms = Alarms(store, policy.logs[0], args.exec, args.feed)
            report = Reporter(monitor, args.json_logging, owned)
            return follow_log(args, monitor, index, report, alarms)
        except Corrupt as error:
            raise Corrupt(f"local state is corrupt, which accuses nobody: {error}") from None


def follow_log(
    args: argparse.Namespace, monitor: Monitor, index: Index | None, report: Reporter, alarms: Alarms
) -> int:
    """Runs a monitor's rounds; returns the exit code."""
    report.keep = alarms.keep
    tell = functools.partial(tell_findings, monitor, report)
    renew = functools.partial(monitor.round, show_progress("entries"), time.time, tell)
    comparison = Comparison(monitor.store, index, renew) if index else None

    def run() -> int:
        ready = report.prepare()
        code = watch_round(monitor, comparison, report, renew, args.follow)
        told = alarms.tell(1 if args.follow else 3)
        return code if ready and told else code or 3

    def close() -> None:
        monitor.source.close()
        if index:
            index.source.close()
        alarms.close()

    try:
        code = run_rounds(args, run, close)
    except KeyboardInterrupt:
        if not report.told and not monitor.store.unreported(1):
            raise
        code = 1
    return 1 if report.told or monitor.store.unreported(1) else code  # also after an interrupted round


def tell_findings(monitor: Monitor, report: Reporter) -> None:
    """Reports all stored findings that have not been reported."""
    while findings := monitor.store.unreported():
        for _, finding in findings:
            report(finding, always=True)
        report.keep([number for number, _ in findings], report.alarms())


def watch_round(
    monitor: Monitor, comparison: Comparison | None, report: Reporter, renew: Callable[[], bool], follow: bool
) -> int:
    """Runs one round of a monitor and returns its exit code."""
    before, code, whole = monitor.store.tree("signed").size, 0, False
    report.begin()
    try:
        whole = renew()
    except Unavailable as error:
        logger.error("%s", error)
        code = error.exit_code
    tree = monitor.store.tree("signed")
    for finding in monitor.conditions:
        report(finding)
    try:  # only with the whole log: a part of it would seem to lack files
        for finding in _limited(comparison.round() if comparison and whole else ()):
            report(finding)
    except Unavailable as error:
        logger.error("%s", error)
        code = error.exit_code
    for finding in monitor.conditions:  # the comparison reads on, which may add conditions
        report(finding)
    standing = report.end()
    if not code:  # else it may stand, though it was not found
        monitor.store.standing(standing)
    if report.count:
        return 1
    if code == 0 and not (follow and tree.size == before):
        new = tree.size - before
        report.say(f"{monitor.store.folder} has all {tree.size} entries of the log, {new} of them new: nothing found",
                   size=tree.size, new=new)
    return code


def _limited(findings: Iterable[Finding]) -> Iterator[Finding]:
    """Yields at most MAX_FINDINGS of each kind, then for each kind one finding that counts the rest."""
    counts, lasts = Counter[str](), dict[str, Finding]()
    trouble: Unavailable | None = None
    try:
        for finding in findings:
            counts[finding.kind] += 1
            if counts[finding.kind] <= MAX_FINDINGS:
                yield finding
            else:
                lasts[finding.kind] = finding
    except Unavailable as error:  # raised last, after all findings
        trouble = error
    for kind, last in lasts.items():
        more = counts[kind] - MAX_FINDINGS
        yield Finding(kind, f"{last.text}; {more} in all that are not told one by one", last.indices, last.evidence)
    if trouble:
        raise trouble


class Reporter:
    """Prints findings and keeps their evidence. Repeats a finding only after a round has passed without it."""

    def __init__(self, monitor: Monitor, as_json: bool, owned: OwnFiles | None = None) -> None:
        self._monitor, self._json, self._owned, self.count, self.told = monitor, as_json, owned, 0, False
        self.keep: Callable[[Iterable[int], Iterable[Alarm]], None] = lambda numbers, alarms: None
        self._alarms = list[Alarm]()
        self._place = monitor.store.folder / "evidence"
        self._folders: set[Path] | None = None  # with evidence, also of earlier runs; _bytes is its size
        self._bytes, self._full = 0, False
        self._last_round: set[tuple[str, str]] = set()
        self._this_round: set[tuple[str, str]] = set()

    def prepare(self) -> bool:
        """Reads anew what the owner has made. If that can't be read, what was read last counts: returns False."""
        try:
            if self._owned:
                self._owned.read()
        except Unavailable as error:
            logger.error("%s", error)
            return False
        return True

    def begin(self) -> None:
        self.count, self._this_round = 0, set()

    def end(self) -> list[str]:
        """Ends a round; returns keys of the findings that stand."""
        self._last_round = self._this_round
        return list(map(json.dumps, self._this_round))

    def alarms(self) -> list[Alarm]:
        """What is to be told of the findings about entries since this was asked last."""
        alarms, self._alarms = self._alarms, []
        return alarms

    def __call__(self, finding: Finding, always: bool = False) -> None:
        if finding.kind == "match" and self._owned:
            entry = self._owned.of_project(self._monitor.entry(finding.indices[0]))
            if entry and self._owned.has(entry):
                self.say(f"{finding.text}, as you made it", **self._fields(finding))
                return
            if entry:
                finding = dataclasses.replace(finding, kind="unexpected", text=f"{finding.text}: you have not made it")
        self.count += 1
        key = (finding.kind, finding.text)
        new = always or key not in self._last_round | self._this_round
        if not always:
            self._this_round.add(key)
        if new:
            kept, fields = "", {name: value for name, value in self._fields(finding).items() if value != ""}
            try:
                kept = self._keep(finding, self._monitor.evidence(finding))
            except Unavailable as error:  # the finding is printed even without evidence
                logger.error("%s", error)
            fields = {"evidence": kept, **fields} if kept else fields
            self.told = True
            said = self.say(finding.text, finding.kind, **fields)
            alarm = Alarm(None, None if always else json.dumps(key), int(time.time()), said)
            if always:  # it is forgotten in the transaction that keeps the alarm
                self._alarms.append(alarm)
            else:
                self.keep((), [alarm])
            if kept and (late := self._monitor.late_evidence(finding)):  # last: the log may be slow
                with contextlib.suppress(Unavailable):
                    self._keep(finding, late)

    def _keep(self, finding: Finding, files: dict[str, bytes]) -> str:
        """Writes evidence to its own folder and returns the path; "" if there is no room. Raises Unavailable."""
        if self._folders is None:
            self._folders = {path for path in self._place.glob("*") if path.is_dir()}
            self._bytes = sum(path.stat().st_size for path in self._place.rglob("*") if path.is_file())
        digest = hashlib.sha256(finding.text.encode(errors="replace")).hexdigest()[:16]
        folder = self._place / f"{finding.kind}-{digest}"
        said = _as_json(finding.text, finding.kind, {"evidence": str(folder), **self._fields(finding)})
        files = {**files, "finding.txt": f"{finding.text}\n".encode(errors="replace")}
        files["finding.json"] = f"{said}\n".encode()
        self._bytes += sum(map(len, files.values()))
        share = 2 if finding.indices else 1  # entries get half: the rest is for evidence against the log itself
        if len(self._folders | {folder}) > MAX_KEPT // share or self._bytes > MAX_KEPT_BYTES // share:
            self._bytes -= sum(map(len, files.values()))
            if not self._full:
                logger.warning("%s is full: no more evidence is kept until some is moved away", self._place)
            self._full = True
            return ""
        self._folders.add(folder)
        for name, data in files.items():
            make_folder((folder / name).parent)
            replace_file(folder / name, data, sync=not finding.indices)  # no sync for entries: there may be thousands
        return str(folder)

    def _fields(self, finding: Finding) -> dict[str, Any]:
        """The JSON fields about the entry or file of a finding. For two entries, about the later one."""
        fields: dict[str, Any] = {}
        if finding.indices:
            index = finding.indices[-1]
            size = self._monitor.log_size()
            fields |= {"index": index, "tile-index": index // 256, "log-size": size, "publisher": None}
            with contextlib.suppress(Malformed):
                entry = Entry.parse(self._monitor.entry(index))
                fields |= {"filename": entry.filename, "checksum": entry.checksum}
                fields["publisher"] = entry.publisher._asdict() if entry.publisher else None
        if about := finding.evidence.get("index.json"):
            fields |= {name: value for name, value in json.loads(about).items() if name != "project"}
        return fields

    def say(self, text: str, kind: str = "", **fields: Any) -> str:
        """Prints a finding or, without a kind, a piece of information; returns it as JSON."""
        said = _as_json(text, kind, fields)
        evidence = f" (evidence: {fields['evidence']})" if "evidence" in fields else ""
        print(said if self._json else f"{f'FOUND {kind}: ' if kind else ''}{printable(text)}{evidence}", flush=True)
        return said


def _as_json(text: str, kind: str, fields: dict[str, Any]) -> str:
    level = {"level": "ERROR", "kind": kind} if kind else {"level": "INFO"}
    return json.dumps({"time": utc(time.time()), **level, "msg": printable(text), **fields})


class OwnFiles:
    """The files that an owner of projects has made, by their names and checksums."""

    def __init__(self, paths: Sequence[str], terms: Iterable[WatchTerm]) -> None:
        """`paths` are SHA256SUMS files, folders of distributions, and what else `verify` takes."""
        self._paths, self._terms = paths, [term for term in terms if term.project]
        self._hashed: dict[tuple[str, int, int, int], list[tuple[str, str]]] = {}  # by path, inode, size and time
        self._names: dict[str, set[str]] = {}  # by checksum; "" for a file whose name is not told

    def read(self) -> None:
        """Reads all of them anew; raises Unavailable."""
        names: dict[str, set[str]] = {}
        try:
            for filename, checksum in itertools.chain(*map(self._read, self._paths)):
                names.setdefault(checksum, set()).add(filename)
        except (Error, OSError) as error:  # the next round may read what is right again
            raise Unavailable(f"--known: {error}") from None
        self._names = names

    def _read(self, path: str) -> Iterator[tuple[str, str]]:
        if os.path.isdir(path):
            for file in Path(path).rglob("*"):
                if file.name.lower().endswith(DISTRIBUTIONS) and file.is_file():
                    yield from self._checksums(file)
            return
        with open_file(path) as stream:
            head = stream.read(1 << 16)
        if re.match(rb"[0-9a-f]{64} [ *][^\n]", head):
            for line in read_target(Path(path), MAX_LOCK).decode(errors="replace").splitlines():
                if not (match := re.fullmatch(r"([0-9a-f]{64}) [ *](.*/)?([^/]+)", line)):
                    raise Malformed(f"{path} is no list of SHA-256 sums, in this line: {line[:100]!r}")
                yield match[3], f"sha256:{match[1]}"
            return
        for artifact in artifacts_of(path):
            if artifact.trouble:
                raise Unavailable(f"{artifact.label}: {artifact.trouble}")
            yield from ((name, artifact.checksum) for name in artifact.names or ("",))

    def _checksums(self, file: Path) -> Iterable[tuple[str, str]]:
        """The name and checksum of a file, and of a wheel's metadata (PEP 658); read again only if it was changed."""
        found = file.stat()
        key = str(file), found.st_ino, found.st_size, found.st_mtime_ns
        if key not in self._hashed:
            self._hashed[key] = sums = [(file.name, checksum_of(file))]
            with contextlib.suppress(OSError, ValueError, LookupError, zipfile.BadZipFile), zipfile.ZipFile(file) as z:
                [metadata] = [name for name in z.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name)]
                data = z.read(metadata)
                sums.append((f"{file.name}.metadata", f"sha256:{hashlib.sha256(data).hexdigest()}"))
        return self._hashed[key]

    def of_project(self, entry: bytes) -> Entry | None:
        """The entry, if it is of one of the owner's projects; else None."""
        with contextlib.suppress(Malformed):
            parsed = Entry.parse(entry)
            if any(may_be_of(term.project, parsed.filename) for term in self._terms):
                return parsed
        return None

    def has(self, entry: Entry) -> bool:
        return not {"", entry.filename}.isdisjoint(self._names.get(entry.checksum, ()))


class Alarms:
    """Tells findings to others: each one to a command, until that exits with 0; the newest ones in a feed."""

    FEED, TIMEOUT, PAUSE = 100, 60, 1.0  # entries; seconds that the command has; seconds after its first failure

    def __init__(self, store: MirrorStore, key: VerifierKey, command: str | None, feed: str | None) -> None:
        self._store, self._key, self._command, self._feed = store, key, command, feed
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped, self._fed = threading.Event(), b""

    def keep(self, numbers: Iterable[int], alarms: Iterable[Alarm]) -> None:
        """Takes findings in, whose numbers in the store are these."""
        alarms = [alarm._replace(told=0 if self._command else 1) for alarm in alarms]
        self._store.reported(numbers, alarms if self._command or self._feed else ())

    def tell(self, attempts: int) -> bool:
        """Tells all that is not told yet; returns False if the command failed `attempts` times, or the feed failed."""
        good, waiting = True, self._store.alarms(False, MAX_ALARMS) if self._command else []
        for alarm in waiting:  # one that the command can't take does not keep the others back
            tries = (self._run(alarm.json) or self._stopped.wait(n * self.PAUSE) for n in range(1, attempts))
            told = any(tries) or self._run(alarm.json)
            if self._stopped.is_set():
                return True
            if told:
                self._store.told(cast(int, alarm.n))
            good, attempts = good and told, attempts if told else 1
        if self._feed and (feed := self._atom()) != self._fed:
            try:
                replace_file(Path(self._feed), feed)
                self._fed = feed
            except Unavailable as error:
                logger.error("--feed: %s", error)
                good = False
        return good

    def _run(self, text: str) -> bool:
        """Runs the command with a finding on its standard input; returns True if it exits with 0."""
        self._process = subprocess.Popen(["/bin/sh", "-c", cast(str, self._command)], stdin=subprocess.PIPE,
                                         stdout=2, start_new_session=True)  # stdout is for findings
        try:
            self._process.communicate(f"{text}\n".encode(), self.TIMEOUT)
        except subprocess.TimeoutExpired:
            self._kill()
            self._process.wait()
        if (code := self._process.returncode) and not self._stopped.is_set():
            logger.warning("--exec: the command ended with %d; the finding is told again", code)
        return code == 0

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            if self._process and self._process.poll() is None:
                os.killpg(self._process.pid, signal.SIGKILL)

    def close(self) -> None:
        """Ends what another thread is waiting for."""
        self._stopped.set()
        self._kill()

    def _atom(self) -> bytes:
        """The newest findings as an Atom feed (RFC 4287)."""
        entries, name, newest = [], html.escape(self._key.name), 0
        for alarm in self._store.alarms(True, self.FEED):
            fields = json.loads(alarm.json)
            lines = "\n".join(f"{key}: {printable(str(value))}" for key, value in fields.items() if key != "msg")
            entries.append(
                f"<entry><id>{self._urn(str(alarm.n), alarm.json)}</id><title>{html.escape(fields['kind'])} in {name}: "
                f"{html.escape(fields['msg'][:200])}</title><updated>{utc(alarm.seconds)}</updated>"
                f"<content type=\"text\">{html.escape(fields['msg'])}\n\n{html.escape(lines)}</content></entry>\n")
            newest = max(newest, alarm.seconds)
        head = f"<id>{self._urn(encode_vkey(self._key))}</id><title>What a monitor found in {name}</title>"
        return (f'<?xml version="1.0" encoding="utf-8"?>\n<feed xmlns="http://www.w3.org/2005/Atom">{head}'
                f"<updated>{utc(newest)}</updated><author><name>btlog monitor</name></author>\n"
                f"{''.join(entries)}</feed>\n").encode(errors="replace")

    @staticmethod
    def _urn(*words: str) -> str:
        return uuid.UUID(bytes=hashlib.sha256("\n".join(words).encode()).digest()[:16], version=4).urn


def run_rounds(args: argparse.Namespace, run: Callable[[], int], closing: Callable[[], None]) -> int:
    """Runs `run` once and returns its exit code. With --follow, repeats it until a signal; returns 1 if any run did.

    It has a thread of its own, so that no SIGTERM or SIGINT interrupts it within a lock. `closing` makes it end.
    """
    signals: list[int] = []
    stopping, codes, errors = threading.Event(), [0], list[BaseException]()

    def work() -> None:
        last_error = ""
        try:
            while True:
                try:
                    codes.append(run())
                    last_error = ""
                except Unavailable as error:
                    if not args.follow:
                        raise
                    if str(error) != last_error:  # it may pass: log it once, and go on
                        logger.error("%s", error)
                    last_error = str(error)
                if not args.follow or stopping.wait(args.frequency):
                    return
        except Stopped:
            pass
        except BaseException as error:  # the main thread raises it
            errors.append(error)

    thread = threading.Thread(target=work, name="rounds", daemon=True)
    with _signals(lambda number, frame: signals.append(number)):
        thread.start()
        while thread.is_alive() and not signals:
            thread.join(0.1)
        stopping.set()
        if thread.is_alive():
            closing()
            thread.join(8)
    if errors:
        raise errors[0]
    if signals and not args.follow:
        raise KeyboardInterrupt
    return codes[-1] if not args.follow else 1 if 1 in codes else 0


@contextlib.contextmanager
def _signals(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Sets the handler of SIGTERM and SIGINT for a `with` block. Does nothing outside the main thread."""
    numbers = (signal.SIGTERM, signal.SIGINT) if threading.current_thread() is threading.main_thread() else ()
    before = [signal.signal(number, handler) for number in numbers]
    try:
        yield
    finally:
        for number, previous in zip(numbers, before, strict=True):
            signal.signal(number, previous)


# --- The static tree -----------------------------------------------------------------------------------------

def cmd_export(args: argparse.Namespace) -> int:
    out = Path(args.out)
    make_folder(out)
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(contextlib.closing(LogStore(Path(args.storage_dir), read_only=True)))
        stack.callback(os.close, lock_folder(out))
        last, stopped = b"", list[bool]()
        show = show_progress("files")

        def progress(done: int, total: int) -> None:
            if stopped:
                raise Stopped("the export is not finished")
            show(done, total)

        def export() -> int:
            nonlocal last
            if (note := store.checkpoint("published")) is None:
                raise Unavailable(f"{store.folder} has no published checkpoint yet")
            if note != last:
                old, new = StaticTree(store, out).export(note, progress)
                print(f"{out} has the tree of size {new}, {new - old} entries of it new", flush=True)
            last = note
            return 0

        return run_rounds(args, export, lambda: stopped.append(True))


class StaticTree:
    """The static tree of tlog-tiles in a folder. All tiles of a checkpoint are on disk before the checkpoint is."""

    KEPT = 3600  # seconds that partial tiles stay after the full tile is written

    def __init__(self, store: LogStore, out: Path) -> None:
        self._store, self._out = store, out
        self._folders: set[Path] = set()

    def export(self, note: bytes, progress: Callable[[int, int], None]) -> tuple[int, int]:
        """Writes what is new, the checkpoint last. Returns the old and the new tree size of the folder."""
        tree = Checkpoint.parse(split_note(note)[0]).tree
        old = self._old_tree(tree)
        places = [
            (level, index, min(256, size - 256 * index))
            for level, size, before in self._levels(tree.size, old.size)
            for index in range(before // 256, (size + 255) // 256)
            if before < min(256 * index + 256, size)
        ]
        for done, (level, index, width) in enumerate(places):
            data = self._store.bundle(index, width) if level is None else self._store.tile(level, index, width)
            self._write(tile_path(level, index, width), data)
            progress(done + 1, len(places))
        for folder in sorted(self._folders, key=lambda path: len(path.parts), reverse=True):
            sync_folder(folder)
        self._write("checkpoint", note)
        sync_folder(self._out)
        self._remove_partials([place for place in places if place[2] < 256])
        return old.size, tree.size

    @staticmethod
    def _levels(size: int, old: int) -> list[tuple[int | None, int, int]]:
        """Each tile level (None for bundles), with its number of hashes in a tree of `size` and in the `old` one."""
        return [(None, size, old), *((level, size >> 8 * level, old >> 8 * level) for level in range(8))]

    def _old_tree(self, tree: Tree) -> Tree:
        """The tree of the folder's checkpoint. Raises Malformed if it is not an earlier tree of this log."""
        path, key = self._out / "checkpoint", self._store.key()
        if not path.exists() and (strange := [n for n in os.listdir(self._out) if n != "tile" and n[0] != "."]):
            raise Malformed(f"{self._out} holds other things than a static tree ({min(strange)}): choose another one")
        if not path.exists() or key is None:
            return Tree(0, EMPTY_ROOT)
        try:
            old = self._store.open(read_file(str(path)), key).tree
            if old.size <= tree.size and Tiles(tree.size, self._store.tile).hash(0, old.size) == old.root:
                return old
        except Error as error:
            raise Malformed(f"{path} is not a checkpoint of {key.name}: {error}") from None
        raise Malformed(f"{path} is of a tree of size {old.size} that this log, of size {tree.size}, does not have")

    def _write(self, name: str, data: bytes) -> None:
        path = self._out / name
        make_folder(path.parent)
        replace_file(path, data, name=False)
        self._folders.update(folder for folder in path.parents if folder.is_relative_to(self._out))

    def _remove_partials(self, new: list[tuple[int | None, int, int]]) -> None:
        """Removes partial tiles whose full tile is older than KEPT seconds: readers find the full one."""
        # "MAY delete any partial tile once the corresponding full tile is … available"
        list_file = self._out / ".partials"
        folders = set(list_file.read_text(errors="replace").split("\n") if list_file.exists() else ())
        folders = {name for name in folders if self._is_partials(name)}
        folders |= {f"{tile_path(level, index)}.p" for level, index, _ in new}
        for name in sorted(folders):
            full = self._out / name.removesuffix(".p")
            if full.exists() and time.time() - full.stat().st_mtime > self.KEPT:
                shutil.rmtree(self._out / name, ignore_errors=True)  # a killed run may have removed it
                folders.remove(name)
        self._write(".partials", "\n".join(sorted(folders)).encode())

    def _is_partials(self, name: str) -> bool:
        """True if this names a folder of partial tiles within this tree, and no symbolic link leads out of it."""
        try:
            level, index, width = parse_tile_path(name.removesuffix(".p"))
        except Malformed:
            return False
        place = self._out.resolve() / name
        return width == 256 and f"{tile_path(level, index)}.p" == name and place.resolve() == place


# --- Logging the files of an index ---------------------------------------------------------------------------

INGEST_ID = 0x62746C69  # "btli"
INGEST_SCHEMA = """
    CREATE TABLE setting (name TEXT PRIMARY KEY, value NOT NULL);
    CREATE TABLE project (
        name TEXT PRIMARY KEY, page TEXT NOT NULL, round INTEGER NOT NULL, done BLOB NOT NULL, failed TEXT NOT NULL
    );
"""
MAX_LINES = 10_000  # entries that are logged at a time
DONE_KEY = 16  # bytes
MAX_COMPLAINTS = {"unread": 5, "refused": 100}  # errors of a round that are told: about pages, about files


class Progress(NamedTuple):
    """What is done of a project: its page, by serial number or validator; in which round; the keys of the files that
    are logged; and what failed ("": nothing)."""
    page: str = ""
    round: int = 0
    done: bytes = b""
    failed: str = ""


class Due(NamedTuple):
    """A project whose page may have changed, its normalized name, and what is done of it."""
    name: str
    project: IndexProject
    done: Progress


class Todo(NamedTuple):
    """What is to be logged of a project: for each new file its key and its entries; and what is done of it else."""
    name: str
    done: Progress
    files: list[tuple[bytes, list[Entry]]]
    trouble: list[str]  # a line for each file that can't be logged, or for a page that can't be read
    counts: Counter[str]


class IngestStore:
    """Remembers for each project of an index what of it is logged."""

    def __init__(self, path: Path, index: str, logs: Sequence[VerifierKey]) -> None:
        if is_new(path):
            Database.create(path, INGEST_ID, INGEST_SCHEMA)
        self._database = Database(path, INGEST_ID)
        of = " ".join([index, *map(encode_vkey, logs)])
        if (known := self.setting("of", of)) != of:
            raise Malformed(f"{path} is of another index or another log: {known}")

    def setting(self, name: str, first: Any) -> Any:
        """A setting, which is `first` until it is set."""
        with self._database.transaction() as db:
            db.execute("INSERT OR IGNORE INTO setting VALUES (?, ?)", (name, first))
            [(value,)] = db.execute("SELECT value FROM setting WHERE name = ?", (name,)).fetchall()
        return value

    def expect(self, options: str) -> None:
        """Has all pages read again if they were read with other options."""
        if self.setting("options", options) != options:
            with self._database.transaction() as db:
                db.execute("UPDATE project SET page = '', round = 0")
                db.execute(SET, ("options", options))

    def progress(self, names: Iterable[str]) -> dict[str, Progress]:
        query = "SELECT * FROM project WHERE name IN (SELECT value FROM json_each(?))"
        return {name: Progress(*rest) for name, *rest in self._database.read(query, json.dumps(list(names)))}

    def store(self, progress: Iterable[tuple[str, Progress]], **settings: int) -> None:
        with self._database.transaction() as db:
            rows = [(name, *done) for name, done in progress]
            db.executemany("INSERT OR REPLACE INTO project VALUES (?, ?, ?, ?, ?)", rows)
            db.executemany(SET, settings.items())
        self._database.tidy()

    def close(self) -> None:
        self._database.close()


class Provenances:
    """Reads the publishers of files from where an index says that their attestations are."""

    MAX_SERVERS = 8

    def __init__(self, index: Index) -> None:
        self._index, self._lock, self._servers = index, threading.Lock(), dict[str, Fetcher]()

    def of(self, file: IndexFile) -> dict[Publisher, str]:
        """As parse_provenance; nothing for a file without attestations. Raises Malformed, Unavailable."""
        try:
            server = server_of(file.provenance)
        except ValueError:
            raise Malformed("its attestations have no URL") from None
        if not (path := file.provenance[len(server) :]):
            return {}
        headers = self._index.credentials if server == server_of(self._index.source.url) else {}
        with self._lock:
            if server not in self._servers:
                if len(self._servers) >= self.MAX_SERVERS:
                    raise Malformed(f"its attestations are on one more server than {self.MAX_SERVERS}")
                self._servers[server] = Fetcher(server, give_up=8)
        try:
            answer = self._servers[server].fetch(path, headers, MAX_PROVENANCE, (301, 302, 303, 307, 308))
        except TooLarge as error:
            raise Malformed(str(error)) from None
        if not answer:
            raise Malformed("its attestations are not there")
        return parse_provenance(answer[1], file.checksum)

    def again(self) -> None:
        for server in self._servers.values():
            server.again()

    def close(self) -> None:
        for server in self._servers.values():
            server.close()


class Ingestion:
    """Logs what an index has, in rounds: each reads only the pages that changed since they were read last."""

    def __init__(self, args: argparse.Namespace, index: Index, writer: LogWriter, store: IngestStore) -> None:
        self._index, self._writer, self._store = index, writer, store
        self._projects, self._metadata, self._retry = args.projects, args.metadata, args.retry_failed
        self._folder = Path(args.proof_dir) if args.proof_dir else None
        self._provenances = Provenances(index)
        self._waiting, self._logged_at = list[Todo](), 0.0
        self._totals, self._complaints = Counter[str](), Counter[str]()
        self._skipped = self._size = self._round = 0

    def round(self) -> Counter[str]:
        """Logs all that is new; returns how much of what it was. Raises Unavailable."""
        self._size = open_checkpoint(self._writer.client.get("/checkpoint"), self._writer.policy).tree.size
        if self._size < self._store.setting("size", 0):
            raise Corrupt("the log has fewer entries than before: to log all anew, use another --database-path")
        self._index.source.again()
        self._provenances.again()
        self._totals, self._complaints, self._skipped = Counter(), Counter(), 0
        self._waiting, self._logged_at = [], time.monotonic()
        self._round = self._store.setting("round", 1)
        self._store.expect(f"{self._metadata} {self._folder}")
        listed = [IndexProject(name) for name in self._projects] or self._index.listing()
        good = {normalize(project.name): project for project in listed if re.fullmatch(_PROJECT, project.name)}
        projects = list(good.items())
        for project in listed:
            if not re.fullmatch(_PROJECT, project.name):
                self._complain(f"not the name of a project: {project.name[:100]!r}", "refused")
                self._totals["failed"] += 1
        progress = show_progress("projects")
        read = new = 0
        for todo in self._index.source.each(self._read, self._due(projects)):
            if isinstance(todo, Due):
                todo = self._read(todo, MAX_PAGE)  # noqa: PLW2901 (a large page, in its turn)
            if not isinstance(todo, Todo):
                left = len(projects) - self._skipped - read
                logger.error("%s: %d projects were not read", todo, left)
                self._totals["failed"] += left
                break
            self._waiting.append(todo)
            read, new = read + 1, new + len(todo.files)
            if new >= MAX_LINES or time.monotonic() > self._logged_at + 0.3:
                self._log()
                new = 0
            progress(self._skipped + read, len(projects))
        self._log()
        self._store.store((), round=self._round + 1)
        self._totals.update(projects=len(projects), unchanged=self._skipped)
        return self._totals

    def _due(self, projects: list[tuple[str, IndexProject]]) -> Iterator[Due]:
        """Those of the projects that may have changed, each with what is done of it."""
        for at in range(0, len(projects), 500):
            part = projects[at : at + 500]
            known = self._store.progress(name for name, _ in part)
            for name, project in part:
                done = known.get(name, Progress())
                same = done.round == self._round or (project.serial and project.serial == done.page)
                if same and not (self._retry and done.failed):
                    self._skipped += 1
                else:
                    yield Due(name, project, done)

    def _read(self, due: Due, limit: int = MAX_AHEAD) -> Todo | Due | Unreachable:
        """What is to be logged of a project; `due` itself if its page is larger than `limit`."""
        name, project, done = due
        try:
            again = project.serial or (self._retry and done.failed)  # whatever the page was
            listed = self._index.files(name, limit, "" if again else done.page)
        except Unchanged:
            return Todo(name, done._replace(round=self._round), [], [], Counter(unchanged=1))
        except Unreachable as error:
            return error
        except Unavailable as error:
            if isinstance(error, TooLarge) and limit < MAX_PAGE:
                return due
            return Todo(name, done._replace(page=""), [], [str(error)], Counter(unread=1))
        # A cache may give an older page than the list of projects speaks of: then the next round has to read it again.
        last = self._index.source.last
        page = (last.serial or project.serial) if project.serial else last.validator
        good, trouble = listed_files(name, listed or ())
        if listed is None:
            trouble.append(f"the index has no project {project.name}")
            page = ""
        known = {done.done[at : at + DONE_KEY] for at in range(0, len(done.done), DONE_KEY)}
        todo = Todo(name, Progress(page, self._round), [], trouble, Counter())
        kept = list[bytes]()
        for file in good:
            told = f"{file.name}\n{file.checksum}\n{file.metadata if self._metadata else ''}\n{bool(file.provenance)}"
            key = hashlib.sha256(told.encode(errors="replace")).digest()[:DONE_KEY]
            if key in known and (not self._folder or os.path.exists(self._folder / f"{file.name}.tlog-proof")):
                kept.append(key)
            else:
                try:
                    todo.files.append((key, self._entries(file, todo.counts)))
                except Malformed as error:
                    trouble.append(f"{file.name}: {error}")
                except Unavailable as error:  # the next round reads the page again
                    trouble.append(f"{file.name}: {error}")
                    page = ""
        todo.counts["known"] += len(kept)
        return todo._replace(done=todo.done._replace(page=page, done=b"".join(kept)))

    def _entries(self, file: IndexFile, counts: Counter[str]) -> list[Entry]:
        """The entries to log of a file: one for each publisher; raises Malformed, Unavailable."""
        publishers: dict[Publisher, str] = {}
        try:
            publishers = self._provenances.of(file)
        except Malformed as error:
            logger.warning("%s is logged without a publisher: %s", file.name, error)
        counts.update(publishers.values())
        entries = [Entry(file.name, file.checksum, publisher) for publisher in publishers or (None,)]
        if self._metadata and file.metadata:
            entries.append(Entry(f"{file.name}.metadata", file.metadata))
        for entry in entries:
            entry.encode()  # raises Malformed for what no log takes
        return entries

    def _log(self) -> None:
        """Logs what waits, and then stores that it is done."""
        lines = [(todo.name, key, entry) for todo in self._waiting for key, entries in todo.files for entry in entries]
        failed, size = dict[tuple[str, bytes], str](), self._size  # what became of the files that are not logged
        for part in _batches(lines):
            results, size = log_entries(self._writer, [entry for *_, entry in part], self._size, self._folder)
            self._totals.update(results)
            failed |= {line[:2]: result for line, result in zip(part, results, strict=True) if result not in LOGGED}
        progress = list[tuple[str, Progress]]()
        for todo in self._waiting:
            self._totals.update(todo.counts, failed=len(todo.trouble))
            for line in todo.trouble:
                self._complain(line, "unread" if todo.counts["unread"] else "refused")
            keys = [key for key, _ in todo.files if failed.get((todo.name, key), "known") in LOGGED]
            wrong = len(todo.files) - len(keys)
            trouble = todo.trouble[0] if todo.trouble else f"{wrong} files are refused" if wrong else todo.done.failed
            done = todo.done._replace(done=b"".join([todo.done.done, *keys]), failed=printable(trouble)[:300])
            if any(failed.get((todo.name, key)) == "failed" for key, _ in todo.files):  # for once, perhaps
                done = done._replace(page="")
            progress.append((todo.name, done))
        self._store.store(progress, size=size)
        self._waiting, self._logged_at = [], time.monotonic()

    def _complain(self, line: str, kind: str) -> None:
        """Tells an error, unless there are many of its kind."""
        self._complaints[kind] += 1
        if self._complaints[kind] <= MAX_COMPLAINTS[kind]:
            logger.error("%s", line)
        elif self._complaints[kind] == MAX_COMPLAINTS[kind] + 1:
            logger.error("… and more errors like this one")

    def close(self) -> None:
        self._provenances.close()  # first: the index's threads wait for these
        self._index.source.close()


def _batches(lines: list[tuple[str, bytes, Entry]]) -> Iterator[list[tuple[str, bytes, Entry]]]:
    """Cuts lines into batches that a log takes: of MAX_LINES, and of MAX_BULK bytes, however they are escaped."""
    batch, size = list[tuple[str, bytes, Entry]](), 0
    for line in lines:
        length = len(json.dumps(entry_to_json(None, line[2]))) + 1 if line[2].publisher else 0
        if len(batch) >= MAX_LINES or size + length > MAX_BULK // 2:
            yield batch
            batch, size = [], 0
        batch.append(line)
        size += length
    if batch:
        yield batch


def listed_files(project: str, files: Iterable[IndexFile]) -> tuple[list[IndexFile], list[str]]:
    """The files to log of a project (a normalized name); and for each other a line that says why it can't be logged."""
    files = list(dict.fromkeys(files))
    checksums: dict[str, set[str]] = {}
    for file in files:
        checksums.setdefault(file.name, set()).add(file.checksum)
    good, trouble = list[IndexFile](), list[str]()
    for file in files:
        wheel = file.name.endswith((".whl", ".egg"))
        of_project = is_of(project, file.name) if wheel else normalize(file.name).startswith(f"{project}-")
        if file.other:
            why = f"the page of {project} gives it this name, but its URL says {file.other[0]} {file.other[1]}"
        elif not of_project:
            why = f"it is on the page of {project}, but is not a file of that project"
        elif len(checksums[file.name]) > 1:
            why = f"the page of {project} has it more than once, with different checksums"
        elif not file.checksum:
            why = "the index does not give its SHA-256"
        else:
            good.append(file)
            continue
        trouble.append(f"{file.name}: {why}")
    return good, trouble


LOGGED = ("new", "known")  # results of an entry that is in the log: it was not before, or it was


def log_entries(
    writer: LogWriter, entries: list[Entry], size: int, folder: Path | None = None
) -> tuple[list[str], int]:
    """Logs entries in bulk, verifies the answer, and writes each proof into `folder`; returns also the log's size.

    The result of each is "new" (index `size` or later), "known", "conflict" or "failed". Raises BadProof, Unavailable.
    """
    body = "".join(f"{json.dumps(entry_to_json(None, entry))}\n" for entry in entries).encode()
    answer = writer.post("/admin/bulk/append", NDJSON, body)
    found = list[str]()
    try:
        head, *results, end = (dict(parse_json(line)) for line in answer.removesuffix(b"\n").split(b"\n"))
        note = parse_base64(head["checkpoint"])
        tree = open_checkpoint(note, writer.policy).tree
        if end != {"type": "complete", "count": len(entries)} or len(results) != len(entries):
            raise BadProof(f"the log answers {len(results)} of {len(entries)} lines")
        for entry, result in zip(entries, (dict(result["result"]) for result in results), strict=True):
            if result["status"] != "logged":
                found.append("conflict" if "index" in result else "failed")
                logger.error("%s: %s", entry.filename, error_message(json.dumps(result).encode()))
                continue
            data = answered_entry(entry, result)
            index, proof = parse_decimal(str(result["index"])), [parse_base64(h, 32) for h in result["inclusionProof"]]
            check_inclusion(leaf_hash(data), index, tree, proof)
            found.append("new" if index >= size else "known")
            if folder and len(f"{entry.filename}.tlog-proof".encode()) > MAX_FILENAME:
                logger.warning("%s: its name is too long for a file with its proof", entry.filename)
            elif folder:
                extra = data if b"\n" in data[93:] else b""  # a publisher, which the file does not tell
                proved = encode_proof(Proof(index, tuple(proof), note, extra))
                replace_file(folder / f"{entry.filename}.tlog-proof", proved, sync=False)
    except (Malformed, KeyError, TypeError, ValueError) as error:
        raise BadProof(f"the log's answer is malformed: {error}") from None
    return found, tree.size


def cmd_ingest(args: argparse.Namespace) -> int:
    with contextlib.ExitStack() as stack:
        index = Index(args.index_url, give_up=8)
        writer = stack.enter_context(contextlib.closing(LogWriter(args)))
        if args.proof_dir:
            make_folder(Path(args.proof_dir))
        path = args.database_path or ("ingest.db" if args.follow else None)
        place = Path(path or stack.enter_context(tempfile.TemporaryDirectory()) + "/ingest.db")
        store = stack.enter_context(contextlib.closing(IngestStore(place, index.source.url, writer.policy.logs)))
        ingestion = Ingestion(args, index, writer, store)
        stack.callback(ingestion.close)

        def run() -> int:
            n = ingestion.round()
            same, by = n["unchanged"], f"{n['certificate']} by its certificate, {n['index']} by the index's word"
            if not args.follow or n["new"] + n["conflict"] + n["failed"] or same < n["projects"]:
                print(f"{n['projects']} projects: {n['new']} files logged, {n['known']} were logged already, "
                      f"{n['conflict']} conflicts, {n['failed']} failed"
                      f"{f'; {same} projects are unchanged' if same else ''}"
                      f"{f'; publishers: {by}' if n['certificate'] + n['index'] else ''}", flush=True)
            return 1 if n["conflict"] else 3 if n["failed"] else 0

        return run_rounds(args, run, ingestion.close)


def cmd_health(args: argparse.Namespace) -> int:
    """Returns 0 if one of the servers is healthy: a container image does not know which of them it runs."""
    errors = []
    for url in args.urls or ["http://127.0.0.1:8080"]:
        try:
            with contextlib.closing(Client(url, timeout=5)) as client:
                client.get("/healthz")
            return 0
        except Unavailable as error:
            errors.append(str(error))
    raise Unavailable("; ".join(errors))


# --- The gate: an index through which installers get only what is logged ----------------------------------------------
# An installer takes it for a package index. Its pages list all files of the index, logged or not; each link leads here.
# When a file is asked for, its proof is verified first; only then is the installer sent on to the index, or given it.

GATE_ID = 0x62746C70  # "btlp"
GATE_SCHEMA = """
    CREATE TABLE proof (
        n INTEGER PRIMARY KEY, filename TEXT NOT NULL, checksum TEXT NOT NULL, proof BLOB NOT NULL,
        UNIQUE (filename, checksum)
    );
"""
MAX_PROVED = 100_000  # proofs that a gate keeps, the newest ones
MAX_GATE_PAGE = 1 << 25  # bytes of a page of the index behind a gate
MAX_HELD = 1 << 23  # bytes of a file that a gate carries and checks before it answers at all
# What a gate repeats of a file as the index says it. All else is left out; also the metadata that can be had apart from
# the file (PEP 658, PEP 714), unless it is proved to be logged.
REPEATED = "requires-python", "yanked", "size", "upload-time"
METADATA = "core-metadata", "dist-info-metadata"  # the keys of PEP 714 and PEP 658


class GateFile(NamedTuple):
    """A file of the index behind a gate: its name, checksum ("" if it has none) and URL; perhaps its proof there."""
    name: str
    checksum: str
    url: str
    proof: str = ""  # or the URL of it
    more: tuple[tuple[str, Any], ...] = ()  # of REPEATED
    metadata: str = ""  # the checksum of the metadata that can be had apart from it

    def apart(self) -> GateFile:
        """Its metadata, as a file of its own."""
        return GateFile(f"{self.name}.metadata", self.metadata, f"{self.url}.metadata")

    @property
    def path(self) -> str:
        """The path of its link, below that of its project."""
        return f"{self.checksum[7:] or '-'}/{urllib.parse.quote(self.name, safe='')}"


class _Anchors(_Links):
    """The links of a page of PEP 503, with what their attributes say."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.more = list[dict[str, Any]]()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        count = len(self.links)
        super().handle_starttag(tag, attrs)
        if len(self.links) > count:
            said: dict[str, Any] = {name.removeprefix("data-"): value or "" for name, value in attrs}
            said |= {"yanked": said["yanked"] or True} if "yanked" in said else {}  # in JSON, "" would be no
            self.more.append({name: said[name] for name in (*REPEATED, "core-metadata") if name in said})


def _plain_url(base: str, url: str) -> str:
    """The URL, perhaps relative to `base`, without its fragment, and with all that is not printable ASCII quoted."""
    if re.fullmatch(r"https?://[A-Za-z0-9.:-]+/[A-Za-z0-9._~/%+-]*", url := joined(base, url).partition("#")[0]):
        return url
    return urllib.parse.quote(url, safe="!$%&'()*+,/:;=?@[]~")


def gate_files(kind: str, data: bytes, url: str) -> list[GateFile]:
    """The files that a page at `url` lists.

    For what is no page, raises ValueError, LookupError, TypeError, AttributeError, AssertionError or RecursionError.
    """
    files = []
    if kind == JSON_PAGE:
        if data.count(b"[") + data.count(b"{") > MAX_FILES or data.count(b",") > 4 * MAX_FILES:
            raise ValueError("it has too many values")
        for file in json.loads(data)["files"]:
            name, hashes = file["filename"], file.get("hashes") or {}
            if not isinstance(name, str) or "/" in name or not name.encode():  # raises ValueError for lone surrogates
                raise ValueError("a file without a name")
            proof = file.get("_tlog-proof") or file.get("tlog-proof") or ""
            more = tuple((key, file[key]) for key in REPEATED if isinstance(file.get(key), (str, bool, int)))
            if file.get("yanked") and "yanked" not in dict(more):
                more += (("yanked", True),)
            target = _plain_url(url, file["url"])
            apart = file.get("core-metadata", file.get("dist-info-metadata"))
            metadata = _checksum(apart.get("sha256")) if isinstance(apart, dict) else ""
            files.append(GateFile(name, _checksum(hashes.get("sha256")), target, str(proof), more, metadata))
        return files
    parse_links(data, page := _Anchors(url))
    for link, said in zip(page.links, page.more, strict=True):
        file = index_file("", link, "")
        if file.name.endswith(DISTRIBUTIONS) or file.checksum:
            metadata = _checksum(said.pop("core-metadata", "").removeprefix("sha256="))
            files.append(GateFile(file.name, file.checksum, _plain_url(url, link), "", tuple(said.items()), metadata))
    return files


class Downloads:
    """Answers at URLs that an index gives. They may lead anywhere, and never end."""

    def __init__(self, index: Index) -> None:
        self.via = f"1.1 btlog-{os.urandom(8).hex()}"  # by which a gate that is led back to itself knows that
        self._index = index  # whose server alone gets its credentials
        self._open = set[_TimedResponse]()

    @contextlib.contextmanager
    def open(self, url: str) -> Iterator[_TimedResponse]:
        """The answer at a URL, over redirects within http and https; raises Unavailable unless it is 200."""
        with contextlib.ExitStack() as stack:
            try:
                answer = self._answer(url, stack)
            except (OSError, ValueError, http.client.HTTPException) as error:
                raise Unavailable(printable(f"{url[:200]} can't be had: {error}")) from None
            self._open.add(answer)
            stack.callback(self._open.discard, answer)
            yield answer

    def _answer(self, url: str, stack: contextlib.ExitStack) -> _TimedResponse:
        for _ in range(MAX_REDIRECTS + 1):
            parts = urllib.parse.urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError("it is not http or https")
            make = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
            connection = make(parts.hostname, parts.port, timeout=ANSWER_TIMEOUT)
            stack.callback(connection.close)
            connection.response_class = _TimedResponse
            fields = {"User-Agent": f"btlog/{__version__}", "Via": self.via, "Connection": "close"}
            fields |= self._index.credentials if server_of(url) == server_of(self._index.source.url) else {}
            target = parts._replace(scheme="", netloc="", fragment="").geturl() or "/"
            connection.request("GET", target, None, fields)
            answer = cast(_TimedResponse, connection.getresponse())
            stack.callback(answer.close)
            if answer.status == 200:
                return answer
            if not (300 <= answer.status < 400 and (location := answer.getheader("Location"))):
                raise ValueError(f"it answers {answer.status}")
            url = _plain_url(url, location)
        raise ValueError(f"more than {MAX_REDIRECTS} redirects")

    def close(self) -> None:
        """Ends what other threads are waiting for."""
        for answer in list(self._open):
            answer.abort()


class ProvedFiles(ProofSource):
    """Finds the proofs of one file (see `of`): those that the gate has verified before, the index's, and another's."""

    def __init__(self, path: Path, index: Index, other: ProofSource | None) -> None:
        if is_new(path):
            Database.create(path, GATE_ID, GATE_SCHEMA)
        self._database, self._other, self.downloads = Database(path, GATE_ID), other, Downloads(index)
        self._file, self._page = GateFile("", "", ""), ""

    def of(self, file: GateFile, page: str) -> ProvedFiles:
        """The source for a file of a page of the index, by the page's URL."""
        source = copy.copy(self)
        source._file, source._page = file, page
        return source

    def kept(self, file: GateFile) -> list[bytes]:
        query = "SELECT proof FROM proof WHERE filename = ? AND checksum = ?"
        return [proof for proof, in self._database.read(query, file.name, file.checksum)]

    def proved(self, files: Iterable[GateFile]) -> set[tuple[str, str]]:
        """The names and checksums of those files that have a proof here."""
        query = "SELECT filename, checksum FROM proof WHERE filename IN (SELECT value FROM json_each(?))"
        return set(self._database.read(query, json.dumps([file.name for file in files])))

    def find(self, artifact: Artifact) -> Iterator[tuple[str, bytes]]:
        yield from ((artifact.filename, proof) for proof in self.kept(self._file))
        if proof := self._index_proof():
            yield artifact.filename, proof
        if self._other is None:
            raise Unavailable("the index gives no proof, and there is no log to ask: give --log-url or --proofs")
        yield from self._other.find(artifact)

    def _index_proof(self) -> bytes:
        """The proof that the index gives, in its page or at a URL; b"" if it gives none, or one that can't be had."""
        proof = self._file.proof
        if not proof or proof.startswith("c2sp.org/tlog-proof@"):
            return proof.encode(errors="replace")
        try:
            with self.downloads.open(urllib.parse.urljoin(self._page, proof)) as answer:
                return answer.read(MAX_PROOF_FILE)
        except (Unavailable, OSError, ValueError, http.client.HTTPException) as error:
            logger.warning("%s: the proof that the index gives: %s", self._file.name, error)
            return b""

    def keep(self, file: GateFile, proof: bytes) -> None:
        """Stores a proof that was verified, and forgets the oldest ones beyond MAX_PROVED; raises Unavailable."""
        with self._database.transaction() as db:
            row = (file.name, file.checksum, proof)
            db.execute("INSERT OR REPLACE INTO proof (filename, checksum, proof) VALUES (?, ?, ?)", row)
            db.execute("DELETE FROM proof WHERE n <= (SELECT max(n) FROM proof) - ?", (MAX_PROVED,))
        self._database.tidy()

    def close(self) -> None:
        self.downloads.close()
        self._database.close()


class Gate:
    """Knows the files of an index, and which of them are proved to be logged. Threads may share it."""

    THREADS = 32  # files and pages that are waited for at the same time

    def __init__(self, index: Index, proofs: ProvedFiles, demands: Demands, carry: bool) -> None:
        self.index, self.proofs, self.demands, self.carry = index, proofs, demands, carry
        self.results, self.pool = Counter[str](), concurrent.futures.ThreadPoolExecutor(self.THREADS, "gate")
        self._pages = Cache(1 << 26, lambda page: sum(600 + len(str(file)) for file in page[1]))
        self.reading = threading.Semaphore(4)  # pages may be large

    def files(self, project: str) -> tuple[str, list[GateFile], float] | None:
        """The URL of a project's page, the files on it, and when it was read; None if there is no such project.

        Raises Unavailable.
        """
        try:
            if (page := self.index.page(f"/{project}/", MAX_GATE_PAGE)) is None:
                return None
            kind, body, url = page
            found = url, gate_files(kind, body.pop(), url), time.monotonic()
        except (ValueError, RecursionError, LookupError, TypeError, AttributeError, AssertionError) as error:
            url = f"{self.index.source.url}/{project}/"
            raise Unavailable(printable(f"{url} is no page of a package index: {error}"[:400])) from None
        self._pages.replace(project, found)
        return found

    def verified(self, project: str, path: str) -> GateFile:
        """The file whose link has this path, once it is proved to be logged; raises Error."""
        page, file = self.find(project, path)
        if self._prove(page, file) and file.metadata:  # so that the next page can offer it
            self.pool.submit(self._try, page, file.apart())
        return file

    def _try(self, page: str, file: GateFile) -> None:
        with contextlib.suppress(Error):
            self._prove(page, file)

    def _prove(self, page: str, file: GateFile) -> bool:
        """Returns True if the proof of a file is new here; raises Error if there is none that holds."""
        if not file.checksum:
            raise BadProof("the index gives no SHA-256 for it")
        if not re.fullmatch(r"https?://[!-~]+", file.url):
            raise BadProof("the index has it at a URL that is not http or https, or has other characters than ASCII's")
        source = self.proofs.of(file, page)
        result = verify_artifact(source, self.demands, Verified(Artifact(file.name, (file.name,), file.checksum)))
        if result.error:
            raise result.error
        if new := result.proof not in self.proofs.kept(file):
            self.proofs.keep(file, result.proof)
        return new

    def find(self, project: str, path: str) -> tuple[str, GateFile]:
        """The URL of the page that lists a file, and the file; raises BadProof, Unavailable."""
        sha256, _, name = path.partition("/")
        wanted = urllib.parse.unquote(name), "" if sha256 == "-" else f"sha256:{sha256}"
        page = self._pages.get(project)
        for _ in range(2):
            for file in page[1] if page else ():
                if file[:2] == wanted:
                    return page[0], file
                if file.metadata and (f"{file.name}.metadata", f"sha256:{sha256}") == (wanted[0], file.checksum):
                    return page[0], file.apart()  # whose link is that of the file, with .metadata behind it
            if page and time.monotonic() - page[2] < 5:
                break
            with self.reading:  # the page may have changed since it was read
                page = self.files(project)
        raise BadProof(f"the page of {project} does not list it with this checksum")


class GateHandler(Handler):
    """The routes of the gate: an index as installers know it (PEP 503, PEP 691), and its files."""

    app: Gate

    def allowed(self) -> tuple[str, ...]:
        if not re.fullmatch(r"/(healthz|metrics|simple/([A-Za-z0-9._-]+/?)?|files/[a-z0-9-]+/[^/]+/[^/]+)", self.route):
            raise HttpError(404, "there is nothing here: the index is /simple/")
        return "GET", "HEAD"

    def do_GET(self) -> Response | Coroutine[Any, Any, Response]:
        if self.app.proofs.downloads.via in self.headers.get("Via", ""):
            raise HttpError(403, "the index leads back to this gate")
        if self.route == "/healthz":
            return Response.json({"status": "ok"}, CORS)
        if self.route == "/metrics":
            samples: list[Sample] = [("", {"result": name}, self.app.results[name]) for name in ("passed", "refused")]
            return Response(metric("btlog_gate_files_total", "counter", "Files that were asked for, by what became of "
                                   "them.", samples).encode(), METRICS)
        return self._wait(self._file if self.route.startswith("/files/") else self._page)

    async def _wait(self, answer: Callable[[], Response]) -> Response:
        return await asyncio.get_running_loop().run_in_executor(self.app.pool, answer)

    def _page(self) -> Response:
        with self.app.reading:
            return self._read_page()

    def _read_page(self) -> Response:
        name = self.route.removeprefix("/simple/")
        project = normalize(name.removesuffix("/"))
        if name and name != f"{project}/":
            return Response(b"", TEXT, 308, {"Location": f"/simple/{project}/"})
        if not name:
            projects = self.app.index.projects()
            return self._listed({"projects": [{"name": name} for name in projects]}, "Simple index",
                                [(f"/simple/{normalize(name)}/", {}, name) for name in projects])
        if (page := self.app.files(project)) is None:
            raise HttpError(404, f"the index has no project {project}")
        files, links = list[dict[str, Any]](), list[tuple[str, dict[str, Any], str]]()
        proved = self.app.proofs.proved(file.apart() for file in page[1] if file.metadata)
        for file in page[1]:
            url, more = f"/files/{project}/{file.path}", dict(file.more)
            if file.apart()[:2] in proved:
                more |= {key: {"sha256": file.metadata[7:]} for key in METADATA}
            hashes = {"sha256": file.checksum[7:]} if file.checksum else {}
            files.append({"filename": file.name, "url": url, "hashes": hashes, **more})
            links.append((f"{url}#sha256={file.checksum[7:]}" if file.checksum else url, more, file.name))
        return self._listed({"name": project, "files": files}, f"Links for {project}", links)

    def _listed(self, page: dict[str, Any], title: str, links: list[tuple[str, dict[str, Any], str]]) -> Response:
        """A page in JSON, or in HTML where that is not accepted: its title, and links with attributes and texts."""
        accepted = self.headers.get("accept", "")
        if JSON_PAGE in accepted:
            return Response(json.dumps({"meta": {"api-version": "1.0"}, **page}).encode(), JSON_PAGE)
        lines = [f'<!DOCTYPE html>\n<meta name="pypi:repository-version" content="1.0">\n<title>{title}</title>\n']
        for url, more, text in links:
            said = {key: "" if value is True else str(value) for key, value in more.items() if value is not False}
            said |= {key: f"sha256={more[key]['sha256']}" for key in METADATA if key in more}
            shown = [key for key in said if key not in REPEATED[2:]]
            attributes = "".join(f' data-{key}="{html.escape(said[key])}"' for key in shown)
            lines.append(f'<a href="{html.escape(url)}"{attributes}>{html.escape(text)}</a><br>\n')
        kind = HTML_PAGE if HTML_PAGE in accepted else "text/html; charset=utf-8"
        return Response("".join(lines).encode(errors="replace"), kind)

    def _file(self) -> Response:
        project, _, path = self.route.removeprefix("/files/").partition("/")
        name = printable(urllib.parse.unquote(path.rpartition("/")[2]))
        try:
            file = self.app.verified(project, path)
            if self.command == "HEAD":  # without ranges: the metadata in them would not be verified
                return Response(b"", OCTETS, headers={"Accept-Ranges": "none"})
            if self.app.carry or file.name.endswith(".metadata"):  # whose checksum not every installer looks at
                return self._carried(file)
        except Error as error:
            sentence = self._refuse(name, error)
            # uv shows the detail of a problem (RFC 9457), and pip the words behind the status.
            problem = {"title": "not proved to be logged", "status": 403, "detail": sentence}
            words = re.sub(r"[^ -~]", "?", sentence)[:300]
            return Response(json.dumps(problem).encode(), "application/problem+json", 403, reason=words)
        self.app.results["passed"] += 1
        return Response(b"", TEXT, 302, {"Location": file.url})

    def _refuse(self, name: str, error: Exception) -> str:
        self.app.results["refused"] += 1
        sentence = f"{name} is refused: {printable(str(error))}"
        logger.warning("%s", sentence)
        return sentence

    def _carried(self, file: GateFile) -> Response:
        """The bytes of a file. The last ones of a large file are sent only if all of them have its checksum."""
        parts = self._parts(file)
        first = b""
        while len(first) < MAX_HELD and (part := next(parts, b"")):
            first += part
        if len(first) < MAX_HELD:
            self.app.results["passed"] += 1
            return Response(first, OCTETS)
        if self.request_version == "HTTP/1.0":  # without chunks, a file that is cut off looks whole
            parts.close()
            raise Unavailable("it is too large for a client of HTTP/1.0")

        async def rest() -> AsyncIterator[list[bytes]]:
            loop, held = asyncio.get_running_loop(), first
            try:
                while data := await loop.run_in_executor(self.app.pool, next, parts, b""):
                    yield [held]
                    held = data
            except Error as error:
                raise BadProof(self._refuse(file.name, error)) from None  # which cuts the answer off
            finally:
                with contextlib.suppress(ValueError):  # at the end of the server, a thread may still be reading
                    parts.close()
            self.app.results["passed"] += 1
            yield [held]

        return Response(rest(), OCTETS)

    def _parts(self, file: GateFile) -> Generator[bytes, None, None]:
        """The bytes of a file as they come; raises Unavailable, and BadProof where they do not have its checksum."""
        digest = hashlib.sha256()
        with self.app.proofs.downloads.open(file.url) as answer:
            try:
                while data := answer.read(1 << 18):
                    answer.renew(ANSWER_TIMEOUT)
                    digest.update(data)
                    yield data
            except (OSError, ValueError, http.client.HTTPException) as error:
                raise Unavailable(f"the index ends in the middle of it: {error}") from None
        if digest.hexdigest() != file.checksum[7:]:
            raise BadProof(f"the index serves a file with sha256:{digest.hexdigest()}, not the one that it lists")


class LiveProofs(ProofSource):
    """Proofs out of a log's folder, or its mirror's, at the checkpoint that it has when it is asked."""

    def __init__(self, store: LogStore) -> None:
        self._store = store

    def find(self, artifact: Artifact) -> Iterable[tuple[str, bytes]]:
        return StoredProofs(self._store).find(artifact)


def cmd_proxy(args: argparse.Namespace) -> int:
    policy = read_policy(args)
    if bool(args.proofs) + bool(args.log_url) + bool(args.storage_dir) > 1:
        raise Malformed("give one of --proofs, --log-url and --storage-dir")
    with contextlib.ExitStack() as stack:
        server = Server(args.host, args.port)  # before anything is made
        stack.callback(server.close)
        other: ProofSource | None = None
        index = Index(args.index_url, attempts=2, timeout=ANSWER_TIMEOUT)
        stack.enter_context(contextlib.closing(index.source))
        if args.proofs:
            if not Path(args.proofs).is_dir():
                raise Malformed(f"{args.proofs} is not a folder")
            other = ProofFiles(Path(args.proofs))
        elif args.storage_dir:
            store = LogStore(Path(args.storage_dir), read_only=True)
            other = LiveProofs(stack.enter_context(contextlib.closing(store)))
        elif urls := log_urls(args, policy):
            source = LogReader(urls, attempts=2, timeout=ANSWER_TIMEOUT)
            other = LoggedProofs(stack.enter_context(contextlib.closing(source)), policy, ())
        proofs = stack.enter_context(contextlib.closing(ProvedFiles(Path(args.database_path), index, other)))
        demands = Demands(policy, args.publisher_issuer, args.publisher_subject, args.max_age)
        gate = Gate(index, proofs, demands, args.carry)
        stack.callback(gate.pool.shutdown, wait=False, cancel_futures=True)
        server.handler = GateHandler.of(gate)
        what = f"is the gate to {index.source.url}: pip install --index-url {server.url}/simple/"
        return run_server(server, what, threading.Event())


# --- Conformance: witnesses and logs of anyone, held to the specifications ----------------------------------------

class Check(NamedTuple):
    """A sentence of a specification that a server has kept or not; None: it can't be told."""
    name: str
    sentence: str
    kept: bool | None
    seen: str
    must: bool

    def tap(self, number: int) -> str:
        """A line of the Test Anything Protocol, version 14, and why; a SHOULD that is not kept is a TODO."""
        note = " # SKIP" if self.kept is None else "" if self.kept or self.must else " # TODO it is not a MUST"
        line = f"{'not ' * (self.kept is False)}ok {number} - {self.name}{note}"
        words = {"sentence": self.sentence, "seen": printable(self.seen)}
        more = "".join(f"\n  {name}: {json.dumps(word, ensure_ascii=False)}" for name, word in words.items())
        return f"{line}\n  ---{more}\n  ..." if self.kept is not True else line


class EndOfSuite(Error):
    """A check that all others rest on was not kept."""


SENTENCES = {  # of the specifications, by the name of the check
    "the connection is kept": "Clients SHOULD use, and witnesses SHOULD support, HTTP keep-alive",
    "signatures of unknown keys are ignored, up to 16 in all":
        "it MUST ignore signatures from unknown keys … MUST accept at least up to 16 signatures",
    "a signature of an unknown key with the log's name is ignored":
        "Verifiers MUST ignore signatures from unknown keys, even if they share a name or ID (but not both) with a "
        "known key.",
    "an extension line is cosigned":
        "Extension lines MAY be included in the checkpoint by the log, and if present MUST be included in the "
        "cosigned message.",
    "GET is refused": "The request MUST be an HTTP POST.",
    "of many requests at once from one size, one is cosigned":
        "checking the old size against the latest checkpoint and persisting the new checkpoint must be performed "
        "atomically",
    "the last checkpoint is served": "A witness SHOULD serve a recent checkpoint for each log it cosigned.",
    "with its cosignatures and the log's signature":
        "it MUST include the cosignature(s) from the witness's key(s) that were returned from add-checkpoint and the "
        "cosignature from the log key(s)",
    "none is served of an unknown log":
        "If the witness has never cosigned a checkpoint for that log, it MUST respond with a \"404 Not Found\" HTTP "
        "status code instead.",
    "the tiles lead to the root":
        "Logs MUST serve partial tiles corresponding to tree sizes for which a checkpoint was produced",
    "a checkpoint is served": "The Signed Tree Head MUST be served as a checkpoint at <prefix>/checkpoint",
    "its content type": "with `Content-Type: text/plain; charset=utf-8`",
    "it is not kept in caches": "its headers SHOULD prevent caching beyond a few seconds",
    "it is signed": "the checkpoint MUST carry at least one Ed25519 signature by the log",
    "its origin is its key's name": "The log's key name in its signature line SHOULD match the origin line.",
    "it has no extension lines": "The use of extension lines is NOT RECOMMENDED",
    "entry bundles and tiles are of the tree":
        "Each entry in a bundle hashes to the corresponding entry in the corresponding “level 0” Merkle Tree tile. … "
        "Full tiles MUST be exactly 256 hashes wide",
    "content type of tiles": "with `Content-Type: application/octet-stream`",
    "tiles are kept in caches": "This endpoint is immutable, so its caching headers SHOULD be long-lived.",
    "bundles are compressed": "Entry bundles SHOULD be compressed at the HTTP layer.",
    "a later checkpoint is consistent":
        "A log MUST not sign any checkpoint which is inconsistent with any checkpoint it previously signed.",
    "the same checkpoint is cosigned again":
        "If all the checks above pass, the witness MUST update its record of the latest cosigned checkpoint and "
        "respond with a \"200 Success\" HTTP status code.",
    "a proof from size zero":
        "If the proof is not empty when the old size is zero … the witness MUST respond with a \"422 Unprocessable "
        "Entity\" HTTP status code.",
    "size zero with another root":
        "A checkpoint of size zero MUST have the root hash of the empty tree … Otherwise, the witness MUST respond "
        "with a \"422 Unprocessable Entity\" HTTP status code.",
    "the size in a 409":
        "The response body MUST consist of the tree size … in decimal, followed by a newline (U+000A). The response "
        "MUST have a `Content-Type` of `text/x.tlog.size`.",
    "a level with a leading zero is not served":
        "MUST be a decimal ASCII integer between 0 and 63, with no additional leading zeroes",
    "an index that is not padded is not served": "encoded into zero-padded 3-digit path elements",
    **dict.fromkeys(
        ("size zero is cosigned", "a larger checkpoint is cosigned", "the same checkpoint is cosigned again",
         "a checkpoint that is much larger is cosigned", "and the next goes on from there"),
        "If all the checks above pass, the witness MUST update its record of the latest cosigned checkpoint and "
        "respond with a \"200 Success\" HTTP status code."),
    **dict.fromkeys(("an empty tile is not served", "no tile is served beyond the tree", "no bundle beyond the tree"),
        "Empty tiles MUST NOT be served."),
}


class Suite:
    """Checks of one server; `tell` gets each one. They send few requests, one after the other, and small ones."""

    def __init__(self, url: str, tell: Callable[[Check], None]) -> None:
        self.client, self._tell = Client(url, 20), tell
        self.checks = list[Check]()

    def check(self, name: str, kept: bool | None, seen: str = "", sentence: str = "", must: bool = True) -> bool:
        sentence = sentence or SENTENCES[name]
        must = must and not re.search("SHOULD|RECOMMENDED", sentence)
        self.checks.append(Check(name, sentence, kept, seen, must))
        self._tell(self.checks[-1])
        return bool(kept)

    def get(self, path: str, limit: int = MAX_BUNDLE) -> tuple[int, str, bytes]:
        """The status, content type and body."""
        return self.client.request("GET", path, None, None, limit)


class MadeUpTree:
    """A tree of `size` entries "0", "1", …: as prove_consistency needs it."""

    def __init__(self, size: int) -> None:
        self.size = size

    @staticmethod
    @functools.lru_cache(1 << 16)
    def hash(lo: int, hi: int) -> bytes:
        if hi - lo <= 1:
            return leaf_hash(str(lo).encode()) if hi > lo else EMPTY_ROOT
        middle = lo + split(hi - lo)
        return node_hash(MadeUpTree.hash(lo, middle), MadeUpTree.hash(middle, hi))


class Wanted(NamedTuple):
    """A request to make: of the last size plus `grows`. All else makes it an unusual one, or a bad one."""
    grows: int = 1
    old: int = 0  # is added to the old size
    proof: tuple[bytes, ...] | None = None
    more_proof: tuple[bytes, ...] = ()
    root: bytes | None = None
    name: str = ""  # of the log
    seed: bytes | None = None
    spoil: bool = False  # one bit of the signature
    extension: str = ""
    more: str = ""  # signature lines


GOOD = Wanted()
REFUSED = (  # what is asked, the status to answer with, and the sentence of tlog-witness that says so
    ("the checkpoint of an unknown origin", Wanted(name="unknown.example/conformance"), 404,
     "If the checkpoint origin is unknown, the witness MUST respond with a \"404 Not Found\" HTTP status code."),
    ("a checkpoint without a signature by a trusted key", Wanted(seed=bytes(32)), 403,
     "The witness MUST respond with a \"403 Forbidden\" HTTP status code if either no signature from a trusted key for "
     "the origin is present …"),
    ("a false signature of a trusted key", Wanted(spoil=True), 403,
     "… or a signature line's key name and ID match a trusted key but the signature itself fails to verify"),
    ("an old size above the checkpoint's", Wanted(old=2, proof=()), 400,
     "The old size MUST be equal to or lower than the checkpoint size. Otherwise, the witness MUST respond with a "
     "\"400 Bad Request\" HTTP status code."),
    ("another old size than that of the last checkpoint", Wanted(old=-1), 409,
     "If it doesn't match, the witness MUST respond with a \"409 Conflict\" HTTP status code."),
    ("a proof that does not verify", Wanted(proof=(bytes(32),)), 422,
     "… if a Merkle Consistency Proof doesn't verify, the witness MUST respond with a \"422 Unprocessable Entity\""),
    ("no proof", Wanted(proof=()), 422,
     "Otherwise, the consistency proof lines MUST encode a Merkle Consistency Proof from the old size"),
    ("a proof with a hash too many", Wanted(more_proof=(bytes(32),)), 422,
     "Otherwise, the consistency proof lines MUST encode a Merkle Consistency Proof from the old size"),
    ("another root for the same size", Wanted(grows=0, root=bytes(32)), 422,
     "If the old size matches the checkpoint size, the witness MUST check that the root hashes are also identical."),
)
MALFORMED = (  # what is replaced in a good request, and what forbids that; any status from 400 to 499 will do
    ("an old size with a leading zero", b"old ", b"old 0", 1, "an ASCII decimal with no leading zeroes"),
    ("an old size with a plus sign", b"old ", b"old +", 1, "encoded as an ASCII decimal"),
    ("64 lines of proof", b"\n\n", b"\n" + (b"A" * 43 + b"=\n") * 64 + b"\n", 1,
     "The client MUST NOT send more than 63 consistency proof lines."),
    ("a hash in base64 without padding", b"=\n", b"\n", 1, "Each consistency proof line MUST encode a single hash"),
    ("lines that end in CR LF", b"\n", b"\r\n", -1, "Each line MUST terminate in a newline character (U+000A)."),
    ("a line without the word old", b"old ", b"", 1, "MUST consist of the string `old`, a single space"),
    ("no signature line", "\n— ".encode(), b"\n- ", 1, "one or more signature lines of this form: em dash"),
)


class WitnessSuite(Suite):
    """Checks of a witness by tlog-witness, with a log of entries that are made up. `signer` has the log's key."""

    def __init__(
        self, url: str, keys: Sequence[VerifierKey], signer: Signer, origin: str, tell: Callable[[Check], None]
    ) -> None:
        super().__init__(url, tell)
        self._keys, self._signer, self._origin = keys, signer, origin
        self._size, self._seconds, self._last = 0, 0, b""  # of the last cosigned checkpoint; its note

    def _body(self, wanted: Wanted = GOOD) -> bytes:
        size, seed = self._size + wanted.grows, self._signer.seed if wanted.seed is None else wanted.seed
        tree = Tree(size, MadeUpTree.hash(0, size) if wanted.root is None else wanted.root)
        proof = wanted.proof
        if proof is None:
            good = 0 < self._size <= size
            proof = tuple(prove_consistency(cast(Tiles, MadeUpTree(size)), self._size)) if good else ()
        signer = Signer(wanted.name or self._signer.name, seed)
        extensions = (wanted.extension,) if wanted.extension else ()
        note = signer.sign(Checkpoint(wanted.name or self._origin, tree, extensions))
        if wanted.spoil:
            text, [(_, key_id, value)] = split_note(note)
            note = f"{text}\n{signature_line(signer.name, key_id, value[:-1] + bytes([value[-1] ^ 1]))}".encode()
        proof += wanted.more_proof
        return AddCheckpoint(max(self._size + wanted.old, 0), proof, note + wanted.more.encode()).encode()

    def _post(self, body: bytes, client: Client | None = None) -> tuple[int, str, bytes]:
        return (client or self.client).request("POST", "/add-checkpoint", body, {}, MAX_ADD_CHECKPOINT)

    def _refuses(
        self, name: str, body: bytes, statuses: Collection[int], sentence: str = "", must: bool = True
    ) -> int:
        """Checks that a request is answered with one of `statuses`, or the first one with 409; returns the status."""
        got, kind, answer = self._post(body)
        if got == 409 and not self._size:
            self._size = self._told(answer)
            self.check(name, None, f"the witness has cosigned size {self._size} of this log before")
            return got
        if got == 200:  # it may have cosigned that: the next checks go on from there
            with contextlib.suppress(Error):
                self._size = Checkpoint.parse(split_note(body.partition(b"\n\n")[2])[0]).tree.size
        self.check(name, got in statuses, f"status {got}: {answer[:200]!r}", sentence, must)
        if got == 409 and 409 in statuses:
            kept = (answer, kind) == (b"%d\n" % self._size, "text/x.tlog.size")
            self.check("the size in a 409", kept, f"{kind}: {answer[:200]!r}")
        return got

    def _told(self, answer: bytes) -> int:
        """The size in the body of a 409; raises EndOfSuite."""
        try:
            if (size := parse_decimal(answer.decode(errors="replace").removesuffix("\n"))) < 1 << 20:
                return size
            raise Malformed(f"size {size}, of a log that is made up and has never been so large")
        except Malformed as error:
            self.check("the size in a 409", False, str(error))
            raise EndOfSuite("it does not tell the size that it has: no more is checked") from None

    def _cosigns(self, name: str, wanted: Wanted = GOOD) -> bool:
        """Checks that a good request is cosigned by all keys; the next is about what comes after it."""
        body = self._body(wanted)
        status, _, answer = self._post(body)
        note = AddCheckpoint.parse(body).note
        try:
            if status != 200:
                raise Unavailable(f"status {status}: {answer[:200]!r}")
            text, lines = split_note(note)[0], take_cosignatures(split_note(note)[0], answer, self._keys)
            times = open_note(text.encode() + b"\n" + answer, self._keys)[1]
            if missing := [key.key_id.hex() for key in self._keys if key not in lines]:
                raise BadSignature(f"no cosignature of the key {', '.join(missing)}")
            if min(times.values()) < self._seconds or abs(min(times.values()) - time.time()) > MAX_SKEW:
                raise BadSignature(f"the times {sorted(times.values())} go back, or are far from {time.time():.0f}")
        except Error as error:
            return self.check(name, False, str(error))
        self._size += wanted.grows
        self._seconds, self._last = min(times.values()), note
        return self.check(name, True)

    def run(self) -> None:
        self._first_contact()
        if not self._cosigns("a larger checkpoint is cosigned", Wanted(3)):
            raise EndOfSuite("it does not cosign a good checkpoint: no more is checked")
        self.check("the connection is kept", self.client.connected)
        self._cosigns("the same checkpoint is cosigned again", Wanted(0))
        self._cosigns("a checkpoint that is much larger is cosigned", Wanted(300))
        for name, wanted, status, sentence in REFUSED:
            self._refuses(name, self._body(wanted), [status], sentence)
        for name, old, new, count, sentence in MALFORMED:
            self._refuses(name, self._body().replace(old, new, count), range(400, 500), sentence, must=False)
        others = "".join(signature_line(f"other{i}.example", bytes([i] * 4), bytes(64)) for i in range(15))
        self._cosigns("signatures of unknown keys are ignored, up to 16 in all", Wanted(more=others))
        alike = signature_line(self._signer.name, bytes(4), bytes(64))
        self._cosigns("a signature of an unknown key with the log's name is ignored", Wanted(more=alike))
        self._cosigns("an extension line is cosigned", Wanted(extension="an extension"))
        self._race()
        self._monitoring()
        status, _, answer = self.get("/add-checkpoint")
        self.check("GET is refused", status in range(400, 500),
                   f"status {status}: {answer[:200]!r}")

    def _first_contact(self) -> None:
        """What can be seen only before the first cosignature; and which size the witness has."""
        status = self._refuses("a proof from size zero", self._body(Wanted(2, proof=(bytes(32),))), [422])
        if status in (403, 404):
            raise Malformed(f"{self.client.url} answers {status}: it has to know the log {self._origin} by the key "
                            f"{encode_vkey(self._signer.key)}")
        if self._size == 0:
            self._refuses("size zero with another root", self._body(Wanted(0, root=bytes(32))), [422])
            self._cosigns("size zero is cosigned", Wanted(0))

    def _race(self) -> None:
        """Eight requests at once, to different sizes from one."""
        bodies = [self._body(Wanted(grows)) for grows in range(1, 9)]

        def post(body: bytes) -> tuple[int, str, bytes]:
            with contextlib.closing(Client(self.client.url, 20)) as client:
                return self._post(body, client)

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            answers = [status for status, _, _ in pool.map(post, bodies)]
        kept = answers.count(200) == 1 and set(answers) <= {200, 409, 429, 503}
        self.check("of many requests at once from one size, one is cosigned", kept, f"statuses {answers}")
        if answers.count(200) == 1:
            self._size += answers.index(200) + 1
            self._cosigns("and the next goes on from there")

    def _monitoring(self) -> None:
        path = f"/{hashlib.sha256(self._origin.encode()).hexdigest()}/checkpoint"
        status, _, note = self.get(path)
        if self.check("the last checkpoint is served", status == 200, f"GET {path}: status {status}"):
            try:
                text, signed = open_note(note, [*self._keys, self._signer.key])
                missing = [key.name for key in (*self._keys, self._signer.key) if key not in signed]
                late = text != split_note(self._last)[0]
                seen = f"without a signature of {missing}" if missing else "an older one, which it may be for an hour"
                kept = False if missing else None if late else True
            except Error as error:
                seen, kept = str(error), False
            self.check("with its cosignatures and the log's signature", kept, seen)
        status, _, _ = self.get(f"/{'0' * 64}/checkpoint")
        self.check("none is served of an unknown log", status == 404, f"status {status}")


class LogSuite(Suite):
    """Checks of what a log serves by tlog-tiles. Reads some tiles and bundles of each kind: a monitor reads all."""

    def __init__(self, url: str, policy: Policy, tell: Callable[[Check], None]) -> None:
        super().__init__(url, tell)
        self._policy = policy
        self._kinds, self._caching, self._zipped = Counter[str](), Counter[str](), Counter[str]()

    def run(self) -> None:
        tree = self._checkpoint()
        try:
            tiles = AuthenticTiles(tree, self._tile)
            self.check("the tiles lead to the root", True)
        except (BadProof, Unavailable) as error:
            self.check("the tiles lead to the root", False, str(error))
            raise EndOfSuite("its tiles do not lead to its root: no more is checked") from None
        self._samples(tree, tiles)
        self._absent(tree)
        self._later(tree)

    def _checkpoint(self) -> Tree:
        status, kind, note = self.get("/checkpoint", MAX_NOTE)
        self.check("a checkpoint is served", status == 200, f"status {status}")
        self.check("its content type", kind.replace(" ", "").lower() == "text/plain;charset=utf-8", kind)
        caching = self.client.last.caching
        self.check("it is not kept in caches", is_kept_for(caching) <= 10, caching)
        try:
            checkpoint = open_checkpoint(note, dataclasses.replace(self._policy, quorum=Quorum(0, ())))
            self.check("it is signed", True)
        except Error as error:
            self.check("it is signed", False, str(error))
            raise EndOfSuite("its checkpoint is not signed by the key: no more is checked") from None
        named = checkpoint.origin in {key.name for key in self._policy.logs}
        self.check("its origin is its key's name", named, checkpoint.origin)
        self.check("it has no extension lines", not checkpoint.extensions, " | ".join(checkpoint.extensions))
        return checkpoint.tree

    def _tile(self, level: int | None, index: int, width: int) -> bytes:
        path = tile_path(level, index, width)
        status, kind, data = self.get(f"/{path}")
        if status != 200:
            raise Unavailable(f"{path}: status {status}")
        self._kinds[kind] += 1
        self._caching[self.client.last.caching] += 1
        if level is None:
            self._zipped[self.client.last.encoding] += 1
        return data

    def _samples(self, tree: Tree, tiles: Tiles) -> None:
        """The first and the last bundles, and some between; the tiles above them are read for that."""
        last = (tree.size - 1) // 256
        some = sorted({0, 1, last - 1, last, *(last * i // 5 for i in range(6))} & set(range(last + 1)))
        wrong = list[str]()
        for n in some if tree.size else ():
            path = tile_path(None, n, width := min(256, tree.size - 256 * n))
            try:
                entries = split_bundle(self._tile(None, n, width))
                if leaf_hashes(entries) != tiles.expanded(0, n)[0]:
                    wrong.append(f"{path} has other entries than the tree, or another number of them")
            except Error as error:
                wrong.append(f"{path}: {error}")
        skip, read = None if not tree.size else True, f"{sum(self._kinds.values())} files"
        self.check("entry bundles and tiles are of the tree", skip and not wrong, "; ".join(wrong) or read)
        others = {kind for kind in self._kinds if kind.partition(";")[0].strip() != "application/octet-stream"}
        self.check("content type of tiles", skip and not others, ", ".join(others))
        brief = {caching or "no Cache-Control" for caching in self._caching if is_kept_for(caching) < 3600}
        self.check("tiles are kept in caches", skip and not brief, ", ".join(brief))
        self.check("bundles are compressed", skip and "" not in self._zipped, "no Content-Encoding, with gzip accepted")

    def _absent(self, tree: Tree) -> None:
        index = tree.size // 256
        for name, path in (
            ("an empty tile is not served", f"{tile_path(0, index)}.p/0"),
            ("no tile is served beyond the tree", tile_path(0, index + 1000)),
            ("no bundle beyond the tree", tile_path(None, index + 1000)),
            ("a level with a leading zero is not served", f"tile/00/{tile_path(0, 0)[7:]}"),
            ("an index that is not padded is not served", "tile/0/0"),
        ):
            status, _, _ = self.get(f"/{path}")
            self.check(name, status != 200, f"{path}: status {status}")

    def _later(self, tree: Tree) -> None:
        """A checkpoint that is served now extends the first one."""
        try:
            policy = dataclasses.replace(self._policy, quorum=Quorum(0, ()))
            later = open_checkpoint(self.get("/checkpoint", MAX_NOTE)[2], policy).tree
            grown = later.size > tree.size
            proof = prove_consistency(AuthenticTiles(later, self._tile), tree.size) if grown else []
            check_consistency(tree, later, proof)
            seen, kept = f"sizes {tree.size} and {later.size}", True
        except Error as error:
            seen, kept = str(error), False
        self.check("a later checkpoint is consistent", kept, seen)


def is_kept_for(caching: str) -> float:
    """The seconds that a Cache-Control header lets a cache keep an answer; 0 if it does not say."""
    words = dict(word.strip().lower().partition("=")[::2] for word in caching.split(","))
    if "no-cache" in words or "no-store" in words:
        return 0
    ages = [float(words[name]) for name in ("max-age", "s-maxage") if re.fullmatch("[0-9]{1,10}", words.get(name, ""))]
    return max(ages, default=0)


def cmd_conformance(args: argparse.Namespace) -> int:
    if bool(args.witness) == bool(args.log):
        raise Malformed("give --witness U or --log U")

    def tell(check: Check) -> None:
        if not args.json:
            print(check.tap(len(suite.checks)), flush=True)

    if args.witness:
        if not args.private_key or not args.witness_public_key:
            raise Malformed("a witness is asked with --private-key F, the key of a log made up for this, whose public "
                            "key it knows, and held to --witness-public-key F")
        signer = read_signer(args.private_key)
        if signer.kind != ED25519:
            raise Malformed(f"{args.private_key} is not an Ed25519 key")
        keys = [as_witness(read_vkey(path)) for path in args.witness_public_key]
        suite: WitnessSuite | LogSuite = WitnessSuite(args.witness, keys, signer, args.origin or signer.name, tell)
    else:
        suite = LogSuite(args.log, read_policy(args), tell)
    if not args.json:
        print("TAP version 14", flush=True)
    code = 0
    try:
        with contextlib.closing(suite.client):
            suite.run()
    except EndOfSuite as error:
        logger.error("%s", error)
    except Unavailable as error:
        logger.error("%s", error)
        code = error.exit_code
    broken = [check for check in suite.checks if check.kept is False]
    musts = [check for check in broken if check.must]
    kept, skipped = (sum(check.kept is value for check in suite.checks) for value in (True, None))
    if args.json:
        print(json.dumps({"url": args.witness or args.log, "kept": kept, "broken": len(musts), "skipped": skipped,
                          "checks": [check._asdict() for check in suite.checks]}, ensure_ascii=False, indent=1))
    else:
        others = len(broken) - len(musts)
        print(f"1..{len(suite.checks)}\n# {kept} kept; {len(musts)} not; {others} not, but no MUST; {skipped} skipped")
    return 1 if musts else code


# --- A demonstration ------------------------------------------------------------------------------------------

def cmd_demo(args: argparse.Namespace) -> int:
    """Shows a log, a witness and what they do for a file, with this program in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="btlog-demo-") as folder, contextlib.ExitStack() as stack:
        demo = Demo(Path(folder), stack)
        demo.say("A witness, and a log whose checkpoints count only once the witness has cosigned them:")
        demo.run("keygen", "--origin", "log.example/demo")
        demo.run("keygen", "--origin", "witness.example/demo", "--private-key-path", "witness-private.key",
                 "--public-key-path", "witness-public.key")
        witness = demo.serve("witness", "--port", "0", "--log-public-key", "public.key")
        url = demo.serve("serve", "--port", "0", "--private-key", "private.key", "--public-key", "public.key",
                         "--witness-url", witness, "--witness-public-key", "witness-public.key")
        demo.say("An index logs its files. Here, some modules of this Python stand for them:")
        names = [f"{module.__name__}.py" for module in (argparse, base64, bisect)]
        for module, name in zip((argparse, base64, bisect), names, strict=True):
            shutil.copy(str(module.__file__), demo.folder / name)
        keys = ("--public-key", "public.key", "--witness-public-key", "witness-public.key")
        demo.run("add", *names, "--log-url", url, *keys)
        demo.say("Anybody with the file, the proof and the two public keys can verify the file offline:")
        demo.run("verify", names[0], *keys)
        demo.say("Then somebody changes one byte of the file on its way:")
        data = bytearray((demo.folder / names[0]).read_bytes())
        data[100] ^= 1
        (demo.folder / names[0]).write_bytes(data)
        demo.run("verify", names[0], *keys, expected=1)
        demo.say("It is refused, with exit code 1. The index can't replace the file either: the log refuses that.")
        demo.run("add", names[0], "--log-url", url, *keys, expected=1)
        demo.say("A monitor reads all of the log, and reports what was logged under the names that it watches:")
        watch = ("--storage-dir", "mirror", "--filename-regex", "^bisect")
        demo.run("monitor", "--log-url", url, *keys, *watch, expected=1)
    print("\nThat was the demonstration. All its files are gone. `btlog serve` begins a log that stays.")
    return 0


class Demo:
    """Runs commands of this program in a folder, and prints each with its output."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        self.folder, self._stack = folder, stack

    def say(self, text: str) -> None:
        print(f"\n{text}", flush=True)

    def run(self, *words: str, expected: int = 0) -> None:
        print(f"  $ btlog {' '.join(words)}", flush=True)
        done = subprocess.run([sys.executable, os.path.abspath(__file__), *words], cwd=self.folder, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
        for line in done.stdout.splitlines():
            print(f"    {line}", flush=True)
        if done.returncode != expected:
            raise Unavailable(f"the demonstration failed: exit code {done.returncode} instead of {expected}")

    def serve(self, *words: str) -> str:
        """Starts a server that ends with the demonstration; returns its URL."""
        print(f"  $ btlog {' '.join(words)} &", flush=True)
        server = subprocess.Popen([sys.executable, os.path.abspath(__file__), *words], cwd=self.folder, text=True,
                                  stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self._stack.callback(server.wait, 20)
        self._stack.callback(server.terminate)
        line = server.stdout.readline() if server.stdout else ""
        if not line.startswith("http://"):
            raise Unavailable(f"the demonstration failed: btlog {words[0]} does not start")
        print(f"    {line.strip()}", flush=True)
        return line.split()[0]


# --- The command line ------------------------------------------------------------------------------------------

class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the line breaks of the examples, and shows a default only if there is one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        wrong = re.search(r"invalid choice: '([^']*)'|unrecognized arguments: ([^ =]+)", message)
        known = [*self._option_string_actions, *(name for a in self._actions for name in a.choices or ())]
        for commands in (a for a in self._actions if isinstance(a, argparse._SubParsersAction)):
            known += [flag for sub in commands.choices.values() for flag in sub._option_string_actions]
        near = difflib.get_close_matches(wrong[1] or wrong[2], map(str, known), 1, 0.75) if wrong else []
        hint = f"; did you mean {near[0]}?" if near else ""
        raise Malformed(f"{message.partition(' (choose from')[0]}{hint}; see `{self.prog} --help`")


Command = Callable[[Callable[[argparse.Namespace], int], str, str], Callable[..., Any]]  # adds a command


def parser() -> argparse.ArgumentParser:
    top = _Parser(prog="btlog", description="A transparency log for Python package indexes.", formatter_class=_Help,
                  epilog="start with:\n  btlog serve              (a log in ./btlog-data, on http://127.0.0.1:8080)\n"
                         "  btlog add some.whl       (logs a file, and keeps its proof beside it)\n"
                         "  btlog demo               (shows all of it in a minute, and leaves nothing behind)\n"
                         "  btlog verify some.whl --public-key btlog-data/public.key")
    top.add_argument("--version", action="version", version=f"btlog {__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(run: Callable[[argparse.Namespace], int], what: str, example: str) -> Callable[..., Any]:
        name = run.__name__.removeprefix("cmd_")
        sub = commands.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.", formatter_class=_Help,
                                  epilog=f"example:\n  btlog {name} {example}", allow_abbrev=False)
        sub.set_defaults(run=run)
        return sub.add_argument

    _key_commands(command)
    _log_command(command)
    _witness_command(command)
    _user_commands(command)
    _gate_command(command)
    _care_commands(command)
    _watch_commands(command)
    return top


def _key_commands(command: Command) -> None:
    add = command(cmd_keygen, "make a key pair, of Ed25519 by default", "--origin log.example.com/pypi")
    add("--origin", required=True, metavar="NAME", help="the name of the key: for a log, its origin")
    add("--private-key-path", default="private.key", metavar="F", help="where to write the private key")
    add("--public-key-path", default="public.key", metavar="F", help="where to write the public key")
    add("--witness", action="store_true", help="for a witness: the public key says that it cosigns (type 0x04)")
    add("--ml-dsa-44", action="store_true", help="of ML-DSA-44, as a second key of a log or of a witness (type 0x06)")

    example = "--origin log.example.com/pypi --public-key-path key.pem"
    add = command(cmd_vkey, "print the vkey of an Ed25519 public key", example)
    add("--origin", metavar="NAME", help="the name of the key: for a log, its origin")
    add("--public-key-path", metavar="F", help="the key, in PEM or base64 DER")
    add("--as-witness", metavar="F", help="print a vkey of type 0x01 that belongs to a witness as one of type 0x04")

    command(cmd_core, "print Part I of this file, which verifies on its own, without PyNaCl", "> core.py")


def _log_command(command: Command) -> None:
    what = "serve a log; a first start makes its folder, key pair and database"
    add = command(cmd_serve, what, "--origin log.example.com/pypi")
    add("--storage-dir", default="btlog-data", metavar="D", help="the folder of the log")
    add("--host", default="127.0.0.1", help="the address to listen on")
    add("--port", default=8080, type=port_number, help="the port to listen on, 0 for any")
    add("--private-key", metavar="F", help="the private key (default: private.key in the folder)")
    add("--ml-dsa-44-private-key", metavar="F", help="a second key, which signs all checkpoints as well")
    add("--public-key", metavar="F", help="the public key, which must match the private key")
    add("--origin", metavar="NAME", help="the name of a new log (default: from the host name)")
    add("--policy", metavar="F", help="a policy file with witnesses, their URLs and the quorum that publishing needs")
    add("--witness-url", metavar="U", help="the URL of one witness, instead of a policy")
    add("--witness-public-key", metavar="F", help="the public key of that witness")
    add("--checkpoint-interval", default=0.2, type=duration, metavar="S",
        help="how long new entries may wait for others before witnesses are asked again, in seconds")
    add("--witness-timeout", default=5.0, type=duration, metavar="S", help="seconds that a witness has to answer")
    add("--republish-interval", default=3600.0, type=duration, metavar="S",
        help="seconds after which an idle log is cosigned anew, 0 for never")
    add("--add-timeout", default=30.0, type=duration, metavar="S", help="seconds after which an add is given up")
    add("--bulk-append-max-entries", default=50_000, type=whole_number, metavar="N", help="the most lines in a bulk")
    add("--bulk-append-publish-timeout", type=duration, metavar="S", help="seconds after which a bulk is given up")
    add("--bulk-append-workers", type=whole_number, metavar="N", help="an option of bt-log; has no effect")
    add("--new", action="store_true", help="begin a log with a private key that was made elsewhere")
    add("--write-token-file", metavar="F", help="a file with the token that writing needs (Authorization: Bearer)")
    add("--allow-replacement", action="store_true", help="let a filename be logged again with another checksum")
    add("--read-only", action="store_true", help="serve what another process writes; needs no private key")
    add("--open-writes", action="store_true", help="let anybody write, on an address that is not loopback")
    _add_logging(add)


def _witness_command(command: Command) -> None:
    what = "serve a witness; a first start makes its key pair and database"
    add = command(cmd_witness, what, "--log-public-key public.key")
    add("--database-path", default="witness.db", metavar="F", help="the witness's database")
    add("--host", default="127.0.0.1", help="the address to listen on")
    add("--port", default=8081, type=port_number, help="the port to listen on, 0 for any")
    add("--private-key", metavar="F", help="the private key (default: witness-private.key, by the database)")
    add("--public-key", metavar="F", help="the public key, which must match the private key")
    add("--origin", metavar="NAME", help="the name of a new witness (default: from the host name)")
    add("--log-public-key", metavar="F", action="append", help="a log's key, remembered for good; repeatable")
    add("--policy", metavar="F", help="a policy file whose logs the witness cosigns as well")
    add("--log-list", metavar="URL|F", action="append", help="a list of logs, as witness-network.org has them: its new "
        "logs are cosigned, each within its requests a day (qpd); what is known is never changed; repeatable")
    add("--log-list-frequency", type=duration, default=3600.0, metavar="S", help="seconds from one reading to the next")
    add("--ml-dsa-44-private-key", metavar="F", help="a second key, which cosigns as well")
    add("--url", metavar="U", help="the URL at which others reach this witness, for its about page")
    add("--operator", metavar="NAME", help="who runs this witness, for its about page")
    add("--contact", metavar="TEXT", help="how to reach them, for its about page")
    add("--import", dest="import_", metavar="F", help="take over the logs and sizes of a bt-log witness's database")
    _add_logging(add)


def _user_commands(command: Command) -> None:
    add = command(cmd_add, "log files, and keep the proofs", "dist/*.whl --public-key public.key")
    add("files", nargs="+", metavar="FILE", help="a file as the index serves it")
    add("--log-url", metavar="U", help="the log (default: the policy's URL, or http://127.0.0.1:8080)")
    add("--proof-dir", metavar="D", help="where FILE.tlog-proof goes (default: beside the file)")
    add("--publisher-issuer", metavar="ISSUER", help="who vouches for the publisher, such as a CI service's URL")
    add("--publisher-subject", metavar="SUBJECT", help="the publisher, such as the URL of a workflow")
    add("--write-token-file", metavar="F", help="a file with the log's write token")
    _add_policy(add)

    example = "some.whl --public-key public.key --log-url http://127.0.0.1:8080"
    add = command(cmd_verify, "check that files are logged", example)
    add("targets", nargs="*", metavar="TARGET", help="a wheel or sdist, a folder of them, requirements.txt with "
        "hashes, pylock.toml, uv.lock, poetry.lock, pdm.lock, Pipfile.lock, or the JSON of pip install --report")
    add("--project", metavar="NAME", type=project_name, action="append",
        help="verify all files of a project that the log has, the newest first; repeatable")
    add("--installed", nargs="?", const=sys.executable, metavar="PYTHON", help="verify what PYTHON has installed")
    add("--timeout", type=duration, metavar="S", help="seconds in all for the log's answers")
    add("--quiet", action="store_true", help="print only what is wrong")
    add("--log-url", metavar="U", action="append", help="ask this log (default: FILE.tlog-proof beside the file, or "
        "the policy's URL); given again, the next URL of the same log, where the one before does not answer")
    add("--proof", metavar="F", help="check against this .tlog-proof, offline")
    add("--proofs", metavar="D", help="check against the .tlog-proof files in this folder, offline")
    add("--save-proofs", metavar="D", help="keep the .tlog-proof files in this folder")
    add("--json", action="store_true", help="print JSON")
    add("--storage-dir", metavar="D", help="ask a log's or a monitor's folder, without a network")
    _add_demands(add)
    _add_policy(add)


def _gate_command(command: Command) -> None:
    what = "serve a package index to installers, and only those of its files that are logged"
    add = command(cmd_proxy, what, "--index-url http://127.0.0.1:3141/root/dev/+simple --policy log.policy")
    add("--index-url", required=True, metavar="U", help="the index, by the URL that pip takes")
    add("--host", default="127.0.0.1", metavar="H", help="the address to listen on")
    add("--port", type=port_number, default=8082, metavar="N", help="the port, 0 for any that is free")
    add("--log-url", metavar="U", action="append", help="ask this log for proofs (default: the policy's URL); given "
        "again, the next URL of the same log, where the one before does not answer")
    add("--storage-dir", metavar="D", help="take proofs from a log's or a monitor's folder")
    add("--proofs", metavar="D", help="take proofs from the .tlog-proof files in this folder")
    add("--database-path", default="proxy.db", metavar="F", help="where verified proofs are kept")
    add("--carry", action="store_true", help="pass the files on, in the place of redirecting to the index")
    _add_demands(add)
    _add_policy(add)


def _care_commands(command: Command) -> None:
    add = command(cmd_fsck, "recompute and check all that a log's folder holds", "--storage-dir btlog-data")
    add("--storage-dir", default="btlog-data", metavar="D", help="the folder of the log, or of a monitor")
    add("--repair", action="store_true", help="rebuild tiles and look-up keys, if the entries match the signed root")

    example = "--witness http://127.0.0.1:8081 --witness-public-key witness-public.key --private-key test-log.key"
    add = command(cmd_conformance, "hold a witness or a log of anyone to the specifications, from outside", example)
    add("--witness", metavar="U", help="the submission prefix of a witness (c2sp.org/tlog-witness)")
    add("--private-key", metavar="F", help="the key of a log made up for this, whose public key the witness knows")
    add("--log", metavar="U", help="a log's URL (c2sp.org/tlog-tiles), with --policy or --public-key")
    add("--json", action="store_true", help="print JSON, in the place of the Test Anything Protocol")
    _add_policy(add)

    command(cmd_demo, "show, in a temporary folder, what a log does and what it refuses", "")

    add = command(cmd_health, "ask servers whether they can do their work", "http://127.0.0.1:8080")
    add("urls", nargs="*", metavar="URL", help="of these, one must be healthy (default: http://127.0.0.1:8080)")


def _watch_commands(command: Command) -> None:
    what = "follow a log, check all of it, report what is wrong, and keep a mirror"
    example = "--log-url http://127.0.0.1:8080 --public-key public.key --storage-dir mirror"
    add = command(cmd_monitor, what, example)
    add("--log-url", metavar="U", action="append", help="the log, or its static tree (default: the policy's URL); "
        "given again, the next URL of the same log, where the one before does not answer")
    add("--storage-dir", default="btlog-mirror", metavar="D", help="the folder for the mirror, and the evidence")
    add("--once", nargs="?", const="true", choices=["true", "false"], default="true", help="false means --follow")
    add("--max-age", type=duration, metavar="S", help="report a log that no quorum cosigned in the last S seconds")
    add("--project", metavar="NAME", type=project_name, action="append", help="report a project's files; repeatable")
    add("--filename-regex", metavar="R", type=regex, action="append",
        help="report entries with a match in the filename; repeatable")
    add("--checksum-regex", metavar="R", type=regex, action="append",
        help="report entries with a match in the checksum, and in the filename if both are given; repeatable")
    add("--known", metavar="PATH", action="append", help="a project's file that is in PATH is no finding: a SHA256SUMS "
        "file, a folder of distributions, or a lock file; read anew in each round; repeatable")
    add("--exec", metavar="CMD", help="run CMD for each finding, which is JSON on its standard input, until it exits 0")
    add("--feed", metavar="F", help="write the newest findings into this file, as an Atom feed")
    add("--index-url", metavar="U", help="compare with this package index: the URL that pip takes")
    _add_logging(add)
    _add_follow(add, 60)
    _add_policy(add)

    what = "write the static tree of tlog-tiles, for a web server, an object store, a CDN"
    add = command(cmd_export, what, "--storage-dir btlog-data public --follow")
    add("out", metavar="OUT", help="the folder for the tree")
    add("--storage-dir", default="btlog-data", metavar="D", help="the folder of the log, or of a monitor")
    _add_follow(add, 1)

    what = "log the files that a package index has"
    add = command(cmd_ingest, what, "--index-url http://127.0.0.1:3141/root/dev/+simple some-project")
    add("--database-path", metavar="F", help="remember what is done in this file, so that the next run asks only for "
        "what is new (default: ingest.db with --follow, else nothing is remembered)")
    add("--retry-failed", action="store_true", help="read also the unchanged pages of which something failed")
    _add_follow(add, 60)
    add("projects", nargs="*", metavar="PROJECT", help="log only their files (default: all that the index lists)")
    add("--index-url", required=True, metavar="U", help="the index: the URL that pip takes")
    add("--log-url", metavar="U", help="the log (default: the policy's URL, or http://127.0.0.1:8080)")
    add("--metadata", action="store_true", help="also log FILENAME.metadata, where the index gives its checksum")
    add("--proof-dir", metavar="D", help="write FILENAME.tlog-proof into this folder for each file")
    add("--write-token-file", metavar="F", help="a file with the log's write token")
    _add_policy(add)


def _add_logging(add: Callable[..., Any]) -> None:
    add("--json-logging", action="store_true", help="write lines of JSON")
    add("--debug", action="store_true", help="say more on stderr")


def _add_follow(add: Callable[..., Any], frequency: float) -> None:
    add("--follow", action="store_true", help="go on until SIGTERM or Ctrl-C")
    add("--frequency", type=duration, default=frequency, metavar="S", help="seconds between rounds, with --follow")


def whole_number(text: str) -> int:
    try:
        return parse_decimal(text)
    except Malformed as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def regex(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"not a regular expression: {error}") from None
    return text


def project_name(text: str) -> str:
    if not re.fullmatch(_PROJECT, text):
        raise argparse.ArgumentTypeError(f"not the name of a project: {text!r}")
    return text


def port_number(text: str) -> int:
    if (port := whole_number(text)) > 65_535:
        raise argparse.ArgumentTypeError(f"{port} is not a port")
    return port


def duration(text: str) -> float:
    """The seconds in a number or in a duration of Go's flags: 90, 1.5, 1m30s."""
    units = {"h": 3600, "m": 60, "s": 1, "ms": 0.001}
    parts = re.findall(r"([0-9.]+)(h|ms|m|s)", text)
    try:
        exact = "".join(number + unit for number, unit in parts) == text != ""
        value = sum(float(number) * units[unit] for number, unit in parts) if exact else float(text)
    except ValueError:
        value = -1
    if not 0 <= value <= 1e9:
        raise argparse.ArgumentTypeError(f"{text} is no number of seconds")
    return value


def _add_demands(add: Callable[..., Any]) -> None:
    add("--publisher-issuer", metavar="R", type=regex, help="refuse files without a publisher whose issuer matches")
    add("--publisher-subject", metavar="R", type=regex, help="refuse files without a publisher whose subject matches")
    add("--max-age", type=duration, metavar="S", help="refuse proofs that no quorum cosigned in the last S seconds")


def _add_policy(add: Callable[..., Any]) -> None:
    add("--policy", metavar="F", help="a policy file (c2sp.org/tlog-policy)")
    add("--public-key", metavar="F", help="the log's public key, instead of a policy")
    add("--origin", metavar="NAME", help="the log's origin, if it is not the name of that key")
    add("--witness-public-key", metavar="F", action="append", help="a witness's key, beside --public-key; repeatable")
    add("--quorum", metavar="K", type=whole_number, help="how many of those witnesses must cosign (default: all)")


def open_standard_streams() -> None:
    """Opens /dev/null for each closed standard stream: else the next file would take its number."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            while (descriptor := os.open(os.devnull, os.O_RDWR)) < number:
                pass
            setattr(sys, name, os.fdopen(descriptor, "r" if number == 0 else "w"))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0 success, 1 a finding, 2 wrong usage, 3 could not be checked."""
    open_standard_streams()
    logging.basicConfig(format="btlog: %(message)s", level=logging.INFO, stream=sys.stderr, force=True)
    logging.getLogger("asyncio").setLevel(logging.ERROR)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a filename that the locale can't show must not end a monitor
        sys.stdout.reconfigure(errors="backslashreplace")
    [handler] = logging.getLogger().handlers
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if not arguments:
            parser().print_help()
            return 2
        args = parser().parse_args(arguments)
        handler.setFormatter(JsonLines() if getattr(args, "json_logging", False) else Lines())
        logging.getLogger().setLevel(logging.DEBUG if getattr(args, "debug", False) else logging.INFO)
        gc.freeze()  # modules stay for good, and later objects are rarely in cycles
        gc.set_threshold(20_000, 20, 20)
        for name, value in vars(args).items():  # as from an unset shell variable: nothing would be checked
            if value == "" or (isinstance(value, list) and "" in value):
                what = name.strip("_").replace("_", "-")
                raise Malformed(f"an empty value is given for {what}: give another, or leave it out")
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except Error as error:
        logger.error("%s", error)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        if not isinstance(error, BrokenPipeError):  # its reader has seen enough
            logger.error("%s", error, exc_info=error if logger.isEnabledFor(logging.DEBUG) else None)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # drops what is left in its buffer
        return 3


if __name__ == "__main__":
    sys.exit(main())
