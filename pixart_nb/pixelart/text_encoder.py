"""Second part of the bundled model: a tokenizer and a small T5 encoder, trained to read the captions."""

from __future__ import annotations

import io
import string
from pathlib import Path

from mindspore import nn, ops

from pixart_nb.core.backend import ms
from pixart_nb.core.io import atomic_write, write_json
from pixart_nb.core.models.layers import Linear, normal
from pixart_nb.core.models.t5 import T5Config, T5Encoder
from pixart_nb.core.training.trainer import Trainer, TrainerOptions
from pixart_nb.pixelart.batches import Tokenize, caption_batches, generator, set_weights
from pixart_nb.pixelart.captions import caption
from pixart_nb.pixelart.scenes import COLOURS, OBJECTS, SETTINGS, Scene

PIECES = 256
EXTRA_IDS = 100
CAPTION_TOKENS = 52
CONFIG = T5Config(vocab_size=PIECES + EXTRA_IDS, d_model=128, d_kv=32, d_ff=256, num_heads=4, num_layers=2)
OPTIONS = TrainerOptions(
    steps=400,
    start_learning_rate=2e-3,
    warmup_steps=50,
    schedule="cosine",
    betas=(0.9, 0.95),
    ema_rate=0.99,
    save_every=100,
    log_every=10,
)
BATCH = 64


def train_tokenizer(scenes: list[Scene], folder: Path, seed: int = 0) -> Path:
    """Learn a unigram vocabulary from captions and write ``spiece.model`` in T5's layout; return ``folder``.

    Pad is 0, end of text 1, unknown 2, as in T5. Every printable ASCII character is a piece, so that words which no
    caption has are spelled.
    """
    import sentencepiece  # here, since only this training needs it

    if (folder / "spiece.model").is_file():
        return folder
    rng = generator(seed, 3)
    captions = [caption(scenes[i], rng) for i in rng.integers(0, len(scenes), 20_000)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions),
        model_writer=model,
        vocab_size=PIECES,
        model_type="unigram",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        hard_vocab_limit=False,
        required_chars=string.ascii_letters + string.digits + string.punctuation,
        character_coverage=1.0,
        num_threads=1,
        minloglevel=2,
    )
    settings = {"tokenizer_class": "T5Tokenizer", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    write_json(
        folder / "tokenizer_config.json", settings | {"extra_ids": EXTRA_IDS, "model_max_length": 300, "legacy": True}
    )
    with atomic_write(folder / "spiece.model") as temporary:
        temporary.write_bytes(model.getvalue())
    return folder


class CaptionReader(nn.Cell):
    """Heads that train the encoder: they read object, colour and setting, and the identity of each token."""

    def __init__(self, encoder: T5Encoder):
        super().__init__()
        size = encoder.config.d_model
        self.encoder = encoder
        self.heads = nn.CellList([Linear(size, len(names)) for names in (OBJECTS, COLOURS, SETTINGS)])
        self.words = Linear(size, encoder.config.vocab_size)

    def construct(self, ids, mask, buckets):
        """Return logits of the three attributes, from the mean over tokens, and of the id of every token."""
        embedded = self.encoder.forward(ids, mask, buckets)
        weight = mask.astype(ms.float32).expand_dims(-1)
        pooled = (embedded * weight).sum(1) / weight.sum(1)
        return [head(pooled) for head in self.heads], self.words(embedded)


def train_text_encoder(scenes: list[Scene], tokenize: Tokenize, work: Path, seed: int = 0) -> T5Encoder:
    """Train, resume or load the text encoder in ``work``; return it with its EMA weights."""
    encoder = T5Encoder(CONFIG)
    rng = generator(seed, 4)
    encoder.initialize(rng)
    reader = CaptionReader(encoder)
    for head in [*reader.heads, reader.words]:
        head.weight.set_data(ms.Tensor(normal(rng, tuple(head.weight.shape))))
    parameters = dict(reader.parameters_and_names())
    batches = caption_batches(scenes, tokenize, BATCH, CAPTION_TOKENS, seed)
    trainer = Trainer(_loss(reader), parameters, batches, OPTIONS, work, names=("attributes", "words"))
    trainer.run()
    set_weights(parameters, trainer.weights())
    return encoder


def _loss(reader: CaptionReader):
    buckets = reader.encoder.buckets(CAPTION_TOKENS)

    def loss(ids: ms.Tensor, mask: ms.Tensor, attributes: ms.Tensor):
        logits, words = reader(ids, mask, buckets)
        losses = [mean_cross_entropy(part, attributes[:, i]) for i, part in enumerate(logits)]
        attribute_loss = losses[0] + losses[1] + losses[2]
        word_loss = mean_cross_entropy(words, ids - (1 - mask.astype(ms.int32)))
        return attribute_loss + word_loss, attribute_loss, word_loss

    return loss


def mean_cross_entropy(logits: ms.Tensor, labels: ms.Tensor) -> ms.Tensor:
    """Return the mean cross-entropy of logits (..., C) over the labels (...) that are not negative.

    ``ops.cross_entropy`` gives other last bits in its first calls of a process than later, for few rows on the CPU, so
    that a resumed training would log other losses than one that was never stopped.
    """
    flat = labels.reshape(-1)
    weight = (flat >= 0).astype(ms.float32)
    logarithms = ops.log_softmax(logits.reshape(-1, logits.shape[-1]), -1)
    each = -ops.gather_elements(logarithms, 1, ops.relu(flat).reshape(-1, 1)).reshape(-1)
    return (each * weight).sum() / (weight.sum() + 1e-6)
