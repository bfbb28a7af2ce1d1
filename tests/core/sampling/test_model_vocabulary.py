"""Words that a model has never seen, by the vocabulary of its card."""

import shutil
import warnings

import numpy as np
import pytest

from pixart_nb.core.lora import Adapters, LoraConfig
from pixart_nb.core.sampling.pipeline import PixArtSigmaPipeline
from pixart_nb.core.sampling.text import CardHeader, TextTokenizer, card_header
from pixart_nb.pixelart.captions import short_caption
from pixart_nb.pixelart.split import held_out_scenes


@pytest.fixture
def folder(project, tmp_path):
    shutil.copytree(project / "data/tiny-sigma/tokenizer", tmp_path / "tokenizer")
    return tmp_path


def test_a_card_lists_the_words_of_the_training_captions(folder):
    (folder / "README.md").write_text("---\nlicense: mit\nvocabulary: [a, red, cat, 'on']\n---\n# A model\n")
    tokenizer = TextTokenizer(folder / "tokenizer")
    assert tokenizer.card.vocabulary == {"a", "red", "cat", "on"}
    assert tokenizer.unseen(["a red castle", "A glass cat, on sand!"]) == ["castle", "glass", "sand"]


@pytest.mark.parametrize(
    "card",
    [
        "# A model without a header\n",
        "---\nlicense: openrail++\ntags: [text-to-image]\n---\n",
        "---\nvocabulary: many words\n---\n",
        "---\nvocabulary: [unclosed\n---\n",
        "---\n- a list\n---\n",
        "\udc80",
        None,
    ],
    ids=["no header", "published", "no list", "damaged", "not a mapping", "no text", "no card"],
)
def test_a_card_without_a_vocabulary_names_no_words(folder, card):
    if card is not None:
        (folder / "README.md").write_bytes(card.encode("utf-8", "surrogateescape"))
    assert card_header(folder / "README.md") == CardHeader()
    assert TextTokenizer(folder / "tokenizer").unseen(["a glass castle"]) == []


def test_a_prompt_of_more_objects_than_a_training_image_has_is_named(project):
    pipe = PixArtSigmaPipeline.from_pretrained(project / "data/tiny-sigma", vae=None)
    call = {"num_inference_steps": 1, "output_type": "latent", "generator": np.random.default_rng(0)}
    with pytest.warns(UserWarning, match="names 'cat', 'boat' and 'fish'; the training images .* at most 2 objects"):
        pipe("a red cat, a blue boat and a green fish on grass", **call)
    captions = [short_caption(scene) for scene in held_out_scenes(60, 2)]
    assert pipe.tokenizer.too_many_objects(captions) == []
    assert (
        TextTokenizer(project / "tests/reference/diffusers/sigma/tokenizer").too_many_objects(["a cat, a boat, a fish"])
        == []
    )


def test_the_words_of_an_adapter_are_not_called_unknown(project):
    pipe = PixArtSigmaPipeline.from_pretrained(project / "data/tiny-sigma", vae=None)
    Adapters.of(pipe.transformer).add("castles", LoraConfig())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = pipe("a red glass", num_inference_steps=1, output_type="latent", generator=np.random.default_rng(0))
    assert np.isfinite(out.images).all()
