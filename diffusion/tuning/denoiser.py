"""What a fine-tuning step computes with: the UNet, alone or with a trained text encoder, and fp16's scaled loss."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from diffusion.text import hidden_states


class Denoiser(nn.Module):
    """The UNet, and the text encoder where it is trained too: all that the engine must know of."""

    def __init__(self, unet: nn.Module, text_encoder: nn.Module | None) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, noisy: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        """(B, C, h, w), (B,) long, and ids (B, T) where the text encoder is trained, else hidden states (B, T, D)
        -> what the schedule's target is compared with, (B, C, h, w)."""
        hidden = text if self.text_encoder is None else hidden_states(self.text_encoder, text)
        return self.unet(noisy, timesteps, hidden).sample


class LossScale:
    """fp16 gradients underflow: the loss is multiplied before the backward pass, the gradients divided after it.

    As torch.amp.GradScaler: halved after a step whose gradients overflow, which is skipped; doubled after 2000 good
    ones.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], value: float = 2.0**16, growth_steps: int = 2000
    ) -> None:
        self.parameters, self.value, self.growth_steps, self.good = list(parameters), value, growth_steps, 0

    @torch.no_grad()
    def unscale_(self) -> None:
        """Divide the gradients before they are clipped."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        torch._foreach_div_(gradients, self.value)

    def update(self, grad_norm: float) -> bool:
        """Whether the step was taken. Raises ValueError when even a loss that is not scaled up overflows."""
        if math.isfinite(grad_norm):
            self.good += 1
            if self.good % self.growth_steps == 0:
                self.value *= 2.0
            return True
        self.good, self.value = 0, self.value / 2.0
        if self.value < 1.0:
            raise ValueError(
                "gradients overflow in fp16 at any scale of the loss: train with --precision fp32 or bf16"
            )
        return False

    def state(self) -> dict[str, float]:
        return {"value": self.value, "good": float(self.good)}

    def load_state(self, state: dict[str, float]) -> None:
        self.value, self.good = float(state["value"]), int(state["good"])
