"""Tokenizer and small T5 encoder of the bundled models: which thing a word belongs to, also for words never seen.

The encoder is trained to tell at every word the thing that it belongs to (object, colour, part in the relation), the
setting, and the word itself. So colours are bound to their objects before the transformer reads them, and a word that
no caption has, spelled in pieces or not, has an embedding of its own.
"""

from __future__ import annotations

import io
import string
from pathlib import Path

import numpy as np
from mindspore import nn, ops

from pixart_nb.core.backend import ms
from pixart_nb.core.io import atomic_write, write_json
from pixart_nb.core.models.layers import Linear, normal
from pixart_nb.core.models.t5 import T5Config, T5Encoder
from pixart_nb.core.sampling.text import TextTokenizer
from pixart_nb.core.training.trainer import Batch, Trainer, TrainerOptions
from pixart_nb.pixelart.batches import generator, set_weights
from pixart_nb.pixelart.captions import INVERSE, as_captioned, caption, caption_words
from pixart_nb.pixelart.objects import OBJECTS
from pixart_nb.pixelart.scenes import COLOURS, POSITIONS, RELATIONS, SIZES
from pixart_nb.pixelart.settings import SETTINGS
from pixart_nb.pixelart.split import training_scene

PIECES = 512
EXTRA_IDS = 100
CAPTION_TOKENS = 40
CONFIG = T5Config(vocab_size=PIECES + EXTRA_IDS, d_model=128, d_kv=32, d_ff=256, num_heads=4, num_layers=3)
OPTIONS = TrainerOptions(
    steps=1200,
    start_learning_rate=2e-3,
    warmup_steps=50,
    schedule="cosine",
    betas=(0.9, 0.95),
    ema_rate=0.99,
    save_every=100,
    log_every=10,
)
BATCH = 48
_NEW_NAMES = (
    "anchor arrow axe balloon banana basket bear bee bell bicycle boot bottle bow bread bridge broom bucket bus "
    "button cake camera candle castle chair cheese cherry chest clock cloud coin compass cookie cow crab crystal dog "
    "door drum duck egg elephant eye feather fire flag fox frog glass globe glove goat goblin grape hammer hand harp "
    "helmet horse hourglass ice jar knife knight ladder leaf lemon letter lion lock magnet map mask monkey moon mouse "
    "necklace octopus onion owl panda parrot peach pear pen penguin piano pig pillow pizza plane plant "
    "pumpkin puppy queen rabbit rainbow ring robot rope rose sandwich sheep ship shoe skull snake snowman sock spider "
    "spoon squirrel statue strawberry sun table teapot tent tiger tomato torch tower train treasure trophy truck "
    "trumpet turtle unicorn vase violin wagon wand watch whale wheel window wizard wolf"
)
#: Words that the tokenizer holds whole though no caption of the training set has them: names of new objects.
FURTHER_WORDS = tuple(_NEW_NAMES.split())
#: Share of training captions whose objects have random names: further words, or letters.
RENAMED = 0.3
#: Bias of attention heads at the start towards words on one side.
DIRECTION = 3.0
#: Labels of a word: object (the last is unknown), colour, position in the relation or the image, setting, size.
ROLES = ("", *RELATIONS, "below", "behind", *POSITIONS)
LABELS = (len(OBJECTS) + 1, len(COLOURS), len(ROLES), len(SETTINGS), len(SIZES) + 1)


def train_tokenizer(folder: Path, seed: int = 0) -> Path:
    """Learn a unigram vocabulary from captions and write ``spiece.model`` in T5's layout; return ``folder``.

    Pad is 0, end of text 1, unknown 2, as in T5. Every printable ASCII character is a piece, so that every word can be
    spelled.
    """
    import sentencepiece  # here, since only this training needs it

    if (folder / "spiece.model").is_file():
        return folder
    rng = generator(seed, 3)
    sentences = [caption(training_scene(rng), rng) for _ in range(20_000)]
    words = sorted({word.strip(",:") for sentence in sentences for word in sentence.split()})
    # a piece must occur in two different words, so each word occurs with a comma too
    sentences += [f"{word} {word}," for word in (*words, *FURTHER_WORDS) for _ in range(50)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
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
    """Heads that train the encoder: they read the labels of ``LABELS`` and the identity of every token."""

    def __init__(self, encoder: T5Encoder):
        super().__init__()
        size = encoder.config.d_model
        self.encoder = encoder
        self.heads = nn.CellList([Linear(size, count) for count in (*LABELS, encoder.config.vocab_size)])

    def construct(self, ids, mask, buckets):
        """Return the logits of the six labels of every token."""
        embedded = self.encoder.forward(ids, mask, buckets)
        return [head(embedded) for head in self.heads]


def train_text_encoder(tokenizer: TextTokenizer, work: Path, seed: int = 0) -> T5Encoder:
    """Train, resume or load the text encoder in ``work``; return it with its EMA weights."""
    encoder = T5Encoder(CONFIG)
    rng = generator(seed, 4)
    encoder.initialize(rng)
    look_both_ways(encoder)
    reader = CaptionReader(encoder)
    for head in reader.heads:
        head.weight.set_data(ms.Tensor(normal(rng, tuple(head.weight.shape))))
    parameters = dict(reader.parameters_and_names())
    names = ("object", "colour", "position", "setting", "size", "word")
    trainer = Trainer(_loss(reader), parameters, label_batches(tokenizer, seed), OPTIONS, work, names=names)
    trainer.run()
    set_weights(parameters, trainer.weights())
    return encoder


def look_both_ways(encoder: T5Encoder) -> None:
    """Let two heads start with a preference for the words before, two for those after.

    Without it, training stays where each word knows the relation of the scene, but not which side of it is its own.
    """
    bias = encoder.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    values, half = bias.asnumpy().copy(), bias.shape[0] // 2  # the second half of the buckets is for keys after
    values[:half, 0::2] += DIRECTION
    values[half:, 1::2] += DIRECTION
    bias.set_data(ms.Tensor(values))


def label_batches(tokenizer: TextTokenizer, seed: int) -> Batch:
    """Return batches of (token ids (BATCH, CAPTION_TOKENS), mask, labels (BATCH, CAPTION_TOKENS, 5), -1 for none)."""

    def batch(step: int) -> tuple[np.ndarray, ...]:
        rng = generator(seed, step, 14)
        ids = np.zeros((BATCH, CAPTION_TOKENS), np.int32)
        labels = np.full((BATCH, CAPTION_TOKENS, len(LABELS)), -1, np.int32)
        for row in range(BATCH):
            tokens, label = _labelled(tokenizer, rng)
            count = min(len(tokens), CAPTION_TOKENS)
            ids[row, :count], labels[row, :count] = tokens[:count], label[:count]
        return ids, ids > 0, labels

    return batch


def _labelled(tokenizer: TextTokenizer, rng: np.random.Generator) -> tuple[list[int], list[tuple[int, ...]]]:
    """Return the token ids of a random caption, ending with the end of text, and the labels of each."""
    scene = as_captioned(training_scene(rng), rng)
    renamed = rng.random() < RENAMED
    words = caption_words(scene, rng, tuple(_new_word(rng) for _ in scene.things) if renamed else None)
    objects, setting = list(OBJECTS), list(SETTINGS).index(scene.setting)
    roles = (ROLES.index(scene.relation or scene.position), ROLES.index(INVERSE.get(scene.relation, "")))
    size = ("", *SIZES).index(scene.size)
    ids, labels = [], []
    for word, number in words:
        pieces = tokenizer.tokenizer(word)["input_ids"][:-1]
        label = (-1, -1, -1, setting, -1)
        if number >= 0:
            thing = scene.things[number]
            name = len(objects) if renamed else objects.index(thing.object)
            label = (name, COLOURS.index(thing.colour), roles[number], setting, size)
        ids += pieces
        labels += [label] * len(pieces)
    return [*ids, 1], [*labels, (-1, -1, -1, setting, -1)]


def _new_word(rng: np.random.Generator) -> str:
    if rng.random() < 0.5:
        return str(rng.choice(FURTHER_WORDS))
    return "".join(rng.choice(list(string.ascii_lowercase), int(rng.integers(3, 9))))


def _loss(reader: CaptionReader):
    buckets = reader.encoder.buckets(CAPTION_TOKENS)

    def loss(ids: ms.Tensor, mask: ms.Tensor, labels: ms.Tensor):
        logits = reader(ids, mask, buckets)
        values = [mean_cross_entropy(part, labels[:, :, i]) for i, part in enumerate(logits[:-1])]
        values.append(mean_cross_entropy(logits[-1], ids - (1 - mask.astype(ms.int32))))
        return values[0] + values[1] + values[2] + values[3] + values[4] + values[5], *values

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
