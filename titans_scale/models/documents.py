"""Documents packed into one row: where each begins, and how the memory gets a grid of its own for every one of them.

A document alone begins with the persistent tokens and a chunk (mac: a segment) of its own. So that packed ones do too, the rows that
the memory sees are laid out anew: each document at the next multiple of the grid, its persistent tokens in front, and behind it
at least as many empty places as a convolution looks back. All else works on the tokens as they are packed.

Shape letters: B batch, T tokens of a packed row, S slots of a row laid out anew, P persistent tokens, M model width, D documents.
"""

import math
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from titans_scale.config import ModelConfig

BOUNDS_ALIGNMENT = 64
"""The list of bounds comes in multiples of this length: every new shape is one more for torch.compile."""


class DocumentLayout(NamedTuple):
    """Which token belongs to which document, and its slot. `of` makes it."""

    number_BT: Tensor
    """The document of each token, int32, counted in its row."""
    bounds_D: Tensor
    """Where each document begins if all rows are one, int32; then B * T as often as it takes."""
    slots: Tensor
    """The slot of each token, all rows in one, int64 (B * T,)."""
    persistent_BS: Tensor
    """The number of the persistent token in a slot, from 1; 0: none, int64."""
    starts_BS: Tensor
    """Whether a document begins in a slot."""
    filled_BS: Tensor
    """Whether a slot holds a token of a document."""

    @classmethod
    def of_inputs(cls, inputs_BT: Tensor, eos_id: int, config: ModelConfig, device: torch.device) -> "DocumentLayout":
        """The layout on a device, from inputs that are still on the CPU, so that nobody waits for the device."""
        return cls.of(document_starts(inputs_BT, eos_id), config).to(device)

    @classmethod
    def of(cls, starts_BT: Tensor, config: ModelConfig) -> "DocumentLayout":
        """The layout for a model, on the device of starts_BT. On a GPU the host waits for it: the number of slots depends on the tokens.

        Args:
            starts_BT: bool, whether a token is the first of a document. The first of a row always is.
        """
        memory = config.memory
        grid, persistent = memory.chunk_size, config.num_persistent_tokens
        if config.variant == "mac":
            grid, persistent = math.lcm(grid, config.segment_len), 0
        batch_size, length = starts_BT.shape
        place_T = torch.arange(length, device=starts_BT.device)
        starts_BT = starts_BT.bool() | (place_T == 0)
        first_BT = place_T.where(starts_BT, 0).cummax(1).values
        past_first_BT = F.pad(starts_BT[:, 1:], (0, 1), value=True)  # the next token begins a document, or there is none
        end_BT = (place_T + 1).where(past_first_BT, length).flip(1).cummin(1).values.flip(1)
        behind_BT = torch.where(end_BT == length, 0, max(0, memory.conv_kernel - 1))  # nobody comes after the last
        slots_BT = persistent + end_BT - first_BT + behind_BT
        slots_BT = (slots_BT + grid - 1) // grid * grid
        through_BT = slots_BT.where(starts_BT, 0).cumsum(1)
        begin_BT = through_BT - slots_BT

        num_slots = grid * _in_few_sizes(int(through_BT.max()) // grid)
        row_BT = num_slots * torch.arange(batch_size, device=starts_BT.device)[:, None]
        slots = (row_BT + begin_BT + persistent + place_T - first_BT).flatten()
        first_slots = (row_BT + begin_BT)[starts_BT]
        number_of_persistent = torch.arange(persistent, device=starts_BT.device)
        persistent_slots = (first_slots[:, None] + number_of_persistent).flatten()
        flat = slots.new_zeros(batch_size * num_slots)
        bounds = (length * torch.arange(batch_size, device=starts_BT.device)[:, None] + place_T)[starts_BT]
        padding = BOUNDS_ALIGNMENT - len(bounds) % BOUNDS_ALIGNMENT
        return cls(
            (starts_BT.cumsum(1) - 1).int(),
            F.pad(bounds, (0, padding), value=batch_size * length).int(),
            slots,
            flat.index_copy(0, persistent_slots, (1 + number_of_persistent).repeat(len(first_slots))).view(batch_size, num_slots),
            flat.bool().index_fill(0, first_slots, True).view(batch_size, num_slots),
            flat.bool().index_fill(0, slots, True).view(batch_size, num_slots),
        )

    def to(self, device: torch.device) -> "DocumentLayout":
        """On another device, from the CPU without waiting for it."""
        pinned = (x.pin_memory() if device.type == "cuda" and x.device.type == "cpu" else x for x in self)
        return DocumentLayout(*(x.to(device, non_blocking=True) for x in pinned))

    def spread(self, x_BTM: Tensor, persistent_BPM: Tensor) -> Tensor:
        """Each token in its slot, the persistent tokens in front of every document, zeros elsewhere: (B, S, M)."""
        x_BSM = x_BTM.new_zeros(self.starts_BS.numel(), x_BTM.shape[-1]).index_copy(0, self.slots, x_BTM.flatten(0, 1))
        x_BSM = x_BSM.unflatten(0, self.starts_BS.shape)
        if not persistent_BPM.shape[1]:
            return x_BSM
        return x_BSM + F.embedding(self.persistent_BS, F.pad(persistent_BPM[0], (0, 0, 1, 0)), padding_idx=0)

    def collect(self, y_BSM: Tensor) -> Tensor:
        """What lies in the tokens' slots, (B, T, M)."""
        return y_BSM.flatten(0, 1).index_select(0, self.slots).unflatten(0, self.number_BT.shape)


def _in_few_sizes(count: int) -> int:
    """The next number of five binary digits and zeros: a 16th larger at most, and 16 of them from one power of two to the next."""
    step = 1 << max(0, count.bit_length() - 5)
    return -(-count // step) * step


def document_starts(inputs_BT: Tensor, eos_id: int) -> Tensor:
    """Whether a token is the first of a document, bool (B, T): the first of a row, and every end-of-document token, which stands
    before the document that it opens. Of several of them in a row, empty documents or padding, the first alone.
    """
    is_eos = inputs_BT == eos_id
    starts = is_eos & ~F.pad(is_eos[:, :-1], (1, 0))
    starts[:, 0] = True
    return starts


def longest_document(inputs_BT: Tensor, starts_BT: Tensor) -> Tensor:
    """The longest document in all rows, alone: (1, its tokens)."""
    starts_BT = starts_BT.clone()
    starts_BT[:, 0] = True
    bounds = [*starts_BT.flatten().nonzero().flatten().tolist(), starts_BT.numel()]
    begin, end = max(pairwise(bounds), key=lambda pair: pair[1] - pair[0])
    return inputs_BT.flatten()[None, begin:end]
