"""A world on the plane of which everything is known: clusters, with noise or without.

N points    K clusters
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Clusters:
    """Gaussian clusters of one standard deviation, `spread`: centres (K, 2), and how often each is drawn, (K,).

    Noised to x = alpha x0 + sigma noise they are Gaussian again, so densities and scores are exact. `only` (K,),
    boolean, leaves some of them, as a prompt does. All in the centres' dtype; float64 for derivatives to compare.
    """

    centres: Tensor
    weights: Tensor
    spread: float

    def draw(self, count: int, generator: torch.Generator, only: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Points (N, 2) without noise, and the cluster of each, (N,)."""
        weights = self.weights if only is None else self.weights * only
        k = torch.multinomial(weights, count, True, generator=generator)
        noise = torch.randn(count, 2, generator=generator, dtype=self.centres.dtype)
        return self.centres[k] + self.spread * noise, k

    def log_p(self, x: Tensor, alpha: float, sigma: float, only: Tensor | None = None) -> Tensor:
        """log p(x), or with `only` log p(x and one of these), for x (N, 2): (N,), up to one constant for both."""
        return self._parts(x, alpha, sigma, only)[0].logsumexp(dim=1)

    def x0(self, x: Tensor, alpha: float, sigma: float, only: Tensor | None = None) -> Tensor:
        """The mean of all points without noise that x (N, 2) may come from: what the best denoiser says, (N, 2)."""
        logits, away, variance = self._parts(x, alpha, sigma, only)
        means = self.centres + alpha * self.spread**2 / variance * away                 # N K 2
        return (logits.softmax(dim=1)[..., None] * means).sum(dim=1)

    def _parts(self, x: Tensor, alpha: float, sigma: float, only: Tensor | None) -> tuple[Tensor, Tensor, float]:
        """log of each cluster's part in p(x), (N, K), the way from its centre to x, (N, K, 2), and its variance."""
        away, variance = x[:, None] - alpha * self.centres, alpha**2 * self.spread**2 + sigma**2
        logits = self.weights.log() - away.square().sum(dim=-1) / (2 * variance)
        return logits if only is None else logits.masked_fill(~only, -torch.inf), away, variance
