"""A source of activations with a planted dictionary: the reading interface of a store, without a model."""

import torch

from sae_lib.data.activations import Batch


class Planted:
    """Rows x = sum of a few of ``n_latents`` unit directions, with positive strengths, plus a mean and noise."""

    name, content_hash, reads_ahead = "planted", "planted", False

    def __init__(self, d_in=32, n_latents=64, active=3, rows=8192, seed=0, correlated=0.0):
        g = torch.Generator().manual_seed(seed)
        self.dictionary = torch.nn.functional.normalize(torch.randn(n_latents, d_in, generator=g), dim=1)
        if correlated:
            shared = self.dictionary[:1]
            self.dictionary = torch.nn.functional.normalize(self.dictionary + correlated * shared, dim=1)
        which = torch.rand(rows, n_latents, generator=g).topk(active, dim=1).indices
        strengths = 1 + torch.rand(rows, active, generator=g)
        latents = torch.zeros(rows, n_latents).scatter_(1, which, strengths)
        x = latents @ self.dictionary + 0.3 + 0.05 * torch.randn(rows, d_in, generator=g)
        self.x, self.test = x[: -rows // 8], x[-rows // 8:]
        self.d_in, self.n_train, self.n_heldout = d_in, len(self.x), len(self.test)
        self.scale = float((d_in / self.x.square().sum(1).mean()) ** 0.5)
        self.manifest = {"model": {"identity": "planted"}}

    def _batch(self, rows):
        n = len(rows)
        return Batch(rows, torch.zeros(n, dtype=torch.int32), torch.arange(n) // 16, torch.arange(n) // 16,
                     torch.arange(n) % 16)

    def batches(self, batch_size, samples, *, order="shuffled", seed=0, start=0):
        g = torch.Generator().manual_seed(seed)
        for number in range(samples // batch_size):
            rows = torch.randint(self.n_train, (batch_size,), generator=g)
            if number >= start:
                yield self._batch(self.x[rows])

    def heldout(self, limit=None):
        return self._batch(self.test[:limit])


class Interrupted(Planted):
    """Ends with a fault after some batches, as a kill between two steps would."""

    def __init__(self, after):
        super().__init__()
        self.after = after

    def batches(self, batch_size, samples, **how):
        for number, batch in enumerate(super().batches(batch_size, samples, **how)):
            if samples > batch_size * 2 and number == self.after:
                raise OSError("interrupted")
            yield batch
