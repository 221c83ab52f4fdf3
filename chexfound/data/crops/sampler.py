"""Which images a step takes: an endless stream of permutations that can be entered at any step."""

from __future__ import annotations

import numpy as np

from chexfound import rng


class EndlessSampler:
    """Batches from permutation after permutation of n images; never a short batch.

    The batch of a step is a function of (stream, step) alone, so that a resumed run sees the same
    images.  The stream's name must hold the seed, the phase and the roster index.
    """

    def __init__(self, n_images: int, batch_size: int, *stream: int | str) -> None:
        self.n_images, self.batch_size, self.stream = n_images, batch_size, stream
        self._cached: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def _permutation(self, epoch: int) -> np.ndarray:
        cached, permutation = self._cached  # together: another thread may put another epoch there
        if cached != epoch:
            permutation = rng.numpy_generator(*self.stream, "permutation", epoch).permutation(self.n_images)
            self._cached = (epoch, permutation)
        return permutation

    def batch(self, step: int) -> np.ndarray:
        """Positions in 0 … n_images − 1 of the images of a global step: (batch_size,)."""
        places = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs = places // self.n_images
        result = np.empty(self.batch_size, np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            result[here] = self._permutation(int(epoch))[places[here] % self.n_images]
        return result
