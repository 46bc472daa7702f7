"""A model's own steps, for any device and any generator."""

import torch
from torch import Tensor, nn

from dalle import sequence
from dalle.attention import KVCache
from dalle.lines import no_lines
from dalle.sampling import ROW_BLOCK
from kernels import OFF, Report


class TorchDecoder:
    """A model's own steps."""

    row_multiple = ROW_BLOCK

    def __init__(self, model: nn.Module, report: Report = OFF) -> None:
        """report: of the kernels inside the model."""
        self.model, self.config, self.report = model, model.config, report
        self.new_cache, self.prefill, self.decode_step = model.new_cache, model.prefill, model.decode_step

    def new_rows(self, capacity: int) -> KVCache:
        """An empty cache whose rows come and go: `prefill_rows`, `decode_rows`, `move_row`."""
        text_ids = torch.zeros(capacity, self.config.max_text_len, dtype=torch.long)
        device, lines = next(self.model.parameters()).device, no_lines(self.config, capacity)
        return self.new_cache(text_ids.to(device), None if lines is None else lines.to(device))

    def prefill_rows(
        self,
        text_ids: Tensor,
        cache: KVCache,
        start: int,
        image_ids: Tensor | None = None,
        lines: Tensor | None = None,
    ) -> Tensor:
        """As `prefill`, into the rows from `start` on; text_ids (R, max_text_len), lines (R, N, D) or None for none."""
        rows = cache.rows(slice(start, start + len(text_ids)))
        if rows.lines is not None:
            rows.lines.copy_(lines) if lines is not None else rows.lines.zero_()
        visible = sequence.text_mask(text_ids, self.config.pad_id)
        rows.bias.copy_(sequence.key_bias(visible, self.config.num_image_tokens, rows.bias.dtype))
        return self.prefill(text_ids, rows, image_ids)

    def decode_rows(self, image_ids: Tensor, positions: Tensor, cache: KVCache) -> Tensor:
        """As `decode_step` for the first R rows, each at a position of its own: (R,) and (R,) -> (R, V)"""
        return self.model.decode_step(image_ids, positions, cache.rows(slice(0, len(image_ids))))
