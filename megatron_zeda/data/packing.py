"""Which conversations share a pack.

Padding gives every conversation of a step the length of the longest; a pack holds several, one behind the other, and
none of them sees another. See docs/packing.md.
"""

from __future__ import annotations

from collections.abc import Sequence


def pack_conversations(lengths: Sequence[int], *, capacity: int, multiple: int) -> list[list[int]]:
    """Distribute the conversations of a step over packs; a pure function of its arguments.

    First-fit decreasing decides how many packs there are. Since all packs of a step are padded to the longest of them,
    the conversations are then spread evenly, the longest first, each into the pack that holds the fewest tokens; where
    that overflows a pack, the first distribution stays.

    Args:
        lengths: tokens of each conversation.
        capacity: the most tokens in one pack.
        multiple: the number of packs is a multiple of it; packs may be empty.

    Returns:
        Indices into ``lengths`` per pack, in the order they lie there.

    Raises:
        ValueError: a conversation is longer than a pack.
    """
    longest_first = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    if longest_first and lengths[longest_first[0]] > capacity:
        raise ValueError(f"a conversation of {lengths[longest_first[0]]} tokens does not fit a pack of {capacity}")
    first_fit: list[list[int]] = []
    loads: list[int] = []
    for index in longest_first:
        pack = next((pack for pack, load in enumerate(loads) if load + lengths[index] <= capacity), len(loads))
        if pack == len(loads):
            first_fit.append([])
            loads.append(0)
        first_fit[pack].append(index)
        loads[pack] += lengths[index]

    number = -(-max(len(first_fit), 1) // multiple) * multiple
    spread: list[list[int]] = [[] for _ in range(number)]
    loads = [0] * number
    for index in longest_first:
        pack = loads.index(min(loads))
        spread[pack].append(index)
        loads[pack] += lengths[index]
    if max(loads) <= capacity:
        return spread
    return first_fit + [[] for _ in range(number - len(first_fit))]
