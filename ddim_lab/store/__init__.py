"""What is kept under outputs/: content-addressed folders, written once, whole or not at all.

    outputs/<kind>/<key>/            sealed: MANIFEST.json carries the SHA-256 of every other file
    outputs/<kind>/<key>.partial/    work in progress that can be resumed (checkpoints)
    outputs/samples/<key>/           growing: images and their features, in files that carry their own digests
    outputs/sweeps/<name>/           plan.json, jobs/<number>/pointer.json: records that carry their own SHA-256
    outputs/locks/                   one lock file an object; a dead process holds none

An object is built in a folder beside its place, sealed, synced to disk and renamed. Whatever is read is verified
first; what fails is set aside as <name>.damaged-<time> and made again. `python -m ddim_lab.store` lists, verifies and
prunes. The parts, each on top of the ones before:

    files         single files: replaced whole, records that carry their hash
    objects       sealed folders, their locks
    samples       folders of samples, which grow; `chunks` reads and writes them
    housekeeping  the inventory, its users, and what may be pruned
"""

from ddim_lab.store.files import (
    content_key,
    read_json,
    read_record,
    sealed_line,
    sealed_text,
    set_aside,
    text_fault,
    unsealed_line,
    write_bytes,
    write_json,
    write_record,
    write_text,
)
from ddim_lab.store.objects import Kind, Store, fault

__all__ = [
    "Kind",
    "Store",
    "content_key",
    "fault",
    "read_json",
    "read_record",
    "sealed_line",
    "sealed_text",
    "set_aside",
    "text_fault",
    "unsealed_line",
    "write_bytes",
    "write_json",
    "write_record",
    "write_text",
]
