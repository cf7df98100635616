"""A transformer that classifies text, its attention made of ``nn.Linear``, compressed in the middle of its training.

    python examples/text_classifier.py

The sentences are made up by a small grammar: "food was not very good but the staff was helpful". What comes after a
"but" decides, and a "not" turns it round. It shows the table of the layers, and prints the accuracy on other sentences
of a network that stays dense, of one before its cut, right after it, and at the end. Queries, keys, values and outputs
are layers of their own here, and are factorized as any other. Those inside ``nn.MultiheadAttention``, and so of
``nn.TransformerEncoderLayer``, stay dense until ``lrc.split_attention_(self)`` makes
layers of them. Less than half a minute of a CPU core.
"""

import random
import tempfile

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import lr_callback as lrc

THINGS = ["the", "a", "food", "staff", "room", "music", "was", "is", "very", "rather"]
GOOD, BAD = ["good", "helpful", "clean", "lovely", "fine"], ["bad", "rude", "dirty", "awful", "poor"]
WORDS = ["", "but", "not", *THINGS, *GOOD, *BAD]
LENGTH = 14


def clause(draw: random.Random) -> tuple[list[str], bool]:
    """Return a clause and whether it praises."""
    good, negated = draw.random() < 0.5, draw.random() < 0.5
    return [*draw.sample(THINGS, 3), *["not"] * negated, draw.choice(GOOD if good else BAD)], good != negated


def sentences(number: int, seed: int) -> TensorDataset:
    """Return sentences as numbers of words, ``(number, LENGTH)``, and their labels."""
    draw, rows, labels = random.Random(seed), [], []
    for _ in range(number):
        words, praise = clause(draw)
        while draw.random() < 0.5 and len(words) < LENGTH - 6:
            second, praise = clause(draw)
            words = [*words, "but", *second]
        rows.append([WORDS.index(word) for word in words] + [0] * (LENGTH - len(words)))
        labels.append(int(praise))
    return TensorDataset(torch.tensor(rows), torch.tensor(labels))


class Block(nn.Module):
    """Attention and two layers after it, each with a way around it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, words: Tensor, mask: Tensor) -> Tensor:
        """Map ``(batch, length, width)`` to the same shape; ``mask`` is False where there is no word."""
        given = self.norm(words)
        split = [
            one(given).unflatten(-1, (self.heads, -1)).transpose(1, 2) for one in (self.query, self.key, self.value)
        ]
        seen = functional.scaled_dot_product_attention(*split, attn_mask=mask[:, None, None])
        words = words + self.out(seen.transpose(1, 2).flatten(2))
        return words + self.mlp(words)


class TextClassifier(LightningModule):
    """Two blocks over embedded words; the sum over the words is classified."""

    def __init__(self, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(WORDS), width)
        self.position = nn.Parameter(0.1 * torch.randn(LENGTH, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(2))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2))

    def forward(self, rows: Tensor) -> Tensor:
        """Return the scores ``(batch, 2)``."""
        words, mask = self.embedding(rows) + self.position, rows > 0
        for block in self.blocks:
            words = block(words, mask)
        return self.head((words * mask[..., None]).sum(1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the loss of one batch."""
        return functional.cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Log the accuracy."""
        self.log("accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean(), batch_size=len(batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer."""
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def main(folder: str) -> None:
    """Run the example, its files in a folder."""
    compression = lrc.LowRankCompression(keep_ratio=0.1, epochs=5, snapshots=True)
    quiet = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False)
    for name, callbacks in {"dense control": [], "compressed": [compression]}.items():
        seed_everything(0, verbose=False)
        model = TextClassifier()
        trainer = Trainer(accelerator="cpu", max_epochs=8, default_root_dir=folder, callbacks=callbacks, **quiet)
        trainer.fit(model, DataLoader(sentences(2000, seed=1), batch_size=64, shuffle=True))
        files = compression.snapshot_files if callbacks else {name: None}
        for stage, file in files.items():
            [result] = trainer.test(model, DataLoader(sentences(1000, seed=2), 500), ckpt_path=file, verbose=False)
            kept = sum(parameter.numel() for parameter in model.parameters())
            print(f"{stage}: accuracy {result['accuracy']:.3f} with {kept:,} parameters")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(temporary)
