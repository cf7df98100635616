"""Attention that was split inside of torch's transformers, torchvision's ViT, and a Trainer that cuts and resumes."""

import copy

import pytest
import torch
import torchvision
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lr_callback as lrc
from lr_callback import LowRankCompression
from lr_callback.model.find import find_layers

EXACT = {"rtol": 0.0, "atol": 1e-5}
WORDS = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))
PADDED = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])
CAUSAL = nn.Transformer.generate_square_subsequent_mask(5)


def encoder(nested=True, **options):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, **{"dropout": 0.0, "batch_first": True, **options})
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"src_key_padding_mask": PADDED}, {"mask": CAUSAL, "is_causal": True}, {"mask": CAUSAL}],
    ids=["plain", "padded", "causal", "masked"],
)
@pytest.mark.parametrize("whole", [True, False])
def test_an_encoder_that_would_take_its_fused_path_takes_the_other(whole, options, training, gradients):
    dense = encoder().train(training)
    model = copy.deepcopy(dense)
    lrc.split_attention_(model if whole else model.layers)  # of a part, too: nothing of what is around it is changed
    with torch.set_grad_enabled(gradients):
        wanted, found = dense(WORDS, **options), model(WORDS, **options)
    shown = ~PADDED if "src_key_padding_mask" in options else torch.ones_like(PADDED)
    torch.testing.assert_close(found[shown], wanted[shown], **EXACT)
    assert found.shape == WORDS.shape


@pytest.mark.parametrize("options", [{"norm_first": True}, {"batch_first": False}, {"bias": False}], ids=str)
def test_other_encoders(options):
    dense = encoder(nested=False, **options).eval()
    model = copy.deepcopy(dense)
    assert lrc.split_attention_(model) == ("layers.0.self_attn", "layers.1.self_attn")
    with torch.no_grad():
        torch.testing.assert_close(model(WORDS), dense(WORDS), **EXACT)
    nn.TransformerEncoder(model.layers[0], 2, enable_nested_tensor=False)(WORDS)


@pytest.mark.parametrize("training", [True, False])
def test_a_whole_transformer(training):
    torch.manual_seed(0)
    dense = nn.Transformer(16, 2, 1, 2, 32, dropout=0.0, batch_first=True).train(training)
    model = copy.deepcopy(dense)
    assert len(lrc.split_attention_(model)) == 5
    given = {"tgt_mask": CAUSAL, "tgt_is_causal": True, "memory_key_padding_mask": PADDED}
    torch.testing.assert_close(model(WORDS, WORDS, **given), dense(WORDS, WORDS, **given), **EXACT)
    assert find_layers(model).skipped == {}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize("way", ["compile", "export"])
@pytest.mark.parametrize("factorized", [False, True])
def test_graphs_of_an_encoder(way, factorized):
    model = encoder().eval()
    lrc.split_attention_(model)
    if factorized:
        lrc.factorize_(model, lrc.allocate(model, 0.6))
    with torch.no_grad():
        wanted, given = model(WORDS), {"src_key_padding_mask": PADDED}
        if way == "compile":
            made = torch.compile(model, backend="aot_eager")
            torch.testing.assert_close(made(WORDS, **given)[~PADDED], model(WORDS, **given)[~PADDED], **EXACT)
        else:
            made = torch.export.export(model, (WORDS,)).module()
        torch.testing.assert_close(made(WORDS), wanted, **EXACT)


def test_vit_b_16_of_torchvision_gives_the_same_from_layers_of_its_own():
    torch.manual_seed(0)
    model = torchvision.models.vit_b_16().eval()
    nn.init.normal_(model.heads.head.weight, std=0.02)
    image, parameters = torch.randn(1, 3, 224, 224), sum(one.numel() for one in model.parameters())
    assert len(find_layers(model).layers) == 26
    with torch.inference_mode():
        wanted = model(image)
        assert len(lrc.split_attention_(model)) == 12
        torch.testing.assert_close(model(image), wanted, rtol=0.0, atol=1e-4)
    found = find_layers(model)
    assert len(found.layers) == 26 + 4 * 12
    assert not any("ttention" in reason for reason in found.skipped.values())
    assert sum(one.numel() for one in model.parameters()) == parameters


def test_a_vision_transformer_can_become_small():
    torch.manual_seed(0)
    dense = torchvision.models.VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=10).eval()
    nn.init.normal_(dense.heads.head.weight)
    images = torch.randn(2, 3, 32, 32)
    model = copy.deepcopy(dense)
    names = lrc.split_attention_(model)
    assert names == ("encoder.layers.encoder_layer_0.self_attention", "encoder.layers.encoder_layer_1.self_attention")
    torch.testing.assert_close(model(images), dense(images), **EXACT)
    counted = {"cost": "multiply_adds", "example_input": images[:1]}
    with pytest.raises(ValueError, match="keep_ratio"):
        lrc.allocate(dense, 0.2, **counted)
    allocation = lrc.allocate(model, 0.2, **counted)
    lrc.factorize_(model, allocation)
    assert model(images).shape == (2, 10)
    assert allocation.cost <= 0.2 * allocation.dense_cost


class Sentences(LightningModule):
    """Classify made up sentences by one encoder layer, whose attention is split."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 2)
        assert lrc.split_attention_(self) == ("encoder.self_attn",)

    def forward(self, words, padded=None):
        return self.head(self.encoder(words, src_key_padding_mask=padded).mean(1))

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self(*batch[:-1]), batch[-1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.cross_entropy(self(*batch[:-1]), batch[-1]))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def loader():
    torch.manual_seed(1)
    words = torch.randn(48, 5, 16)
    padded = torch.zeros(48, 5, dtype=torch.bool)
    padded[::2, 4] = True
    return DataLoader(TensorDataset(words, padded, (words[:, 0].sum(1) > 0).long()), batch_size=16)


def fitted(folder, epochs, ckpt_path=None):
    module, saved = Sentences(), ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    compression = LowRankCompression(0.5, 1, show_table=False, figures=False)
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[compression, saved],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    trainer.fit(module, loader(), loader(), ckpt_path=ckpt_path)
    return module, compression


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_run_compresses_the_projections_and_resumes(tmp_path):
    module, compression = fitted(tmp_path / "whole", 3)
    cut = [name for name, choice in compression.allocation.layers.items() if choice is not None]
    assert {"encoder.self_attn.v_proj", "encoder.self_attn.out_proj"} <= set(compression.allocation.layers)
    assert any(name.startswith("encoder.self_attn.") for name in cut)
    assert compression.allocation.skipped == {}
    assert all(isinstance(module.get_submodule(name), lrc.FactorizedLinear) for name in cut)
    for epoch in (0, 1):  # of before the cut, and of after it
        resumed, _ = fitted(tmp_path / f"from {epoch}", 3, tmp_path / "whole" / f"epoch={epoch}.ckpt")
        for name, value in module.state_dict().items():
            assert torch.equal(resumed.state_dict()[name], value), name
    fresh = Sentences()
    lrc.restore_(fresh, torch.load(tmp_path / "whole" / "epoch=2.ckpt", weights_only=True)["state_dict"])
    torch.testing.assert_close(fresh.eval()(WORDS, PADDED), module.eval()(WORDS, PADDED))
