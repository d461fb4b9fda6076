"""The engine room, private to this package: one libllama context, its memory, and what sequences hold in it.

From below: `gate` is the lock; `memory` says what a context's memory can do and changes it; `runner` computes; `slot`
is one sequence id with its tokens; `pool` has all slots and counts cells; `cache` puts them together; `state` is the
file format of a saved sequence. Only `cache` is used from outside, and every call holds the gate.
"""
