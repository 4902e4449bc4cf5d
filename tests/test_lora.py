"""LoRA: adapters beside the matrices, trained in place of the weights, kept as peft keeps them."""
from __future__ import annotations

import json
import sys

import peft
import pytest
import torch
from conftest import TOY, lines, weights
from safetensors.torch import load_file

import eval as eval_program
from data import save_records
from rollout import Packed, add_adapters, load_policy, load_to_sample, load_trainer, response_logprobs, without_adapters
from train import main

OPTIONS = ["--lora-rank", "4", "--lr", "1e-3", "--kl-coef", "0.01", "--stage", "0-1", "--test", ""]


@pytest.fixture(scope="module")
def adapted(small, tmp_path_factory):
    """A small run of adapters, whose reference is the policy without them."""
    run = tmp_path_factory.mktemp("lora") / "run"
    main([*small, *OPTIONS, "--out", str(run)])
    return run


def scored(model, processor, record) -> torch.Tensor:
    row = Packed(processor.encode(record, "observe"), [processor.tokenizer("<observe>3 red</observe>").input_ids])
    with torch.no_grad():
        return response_logprobs(model, processor, [row], 1.0)[0]


def test_new_adapters_change_nothing_and_are_all_that_is_trained(model, shipped, processor, test_set):
    """Beside every matrix of both towers' blocks, or of the language model's alone; drawn by the seed, in fp32."""
    add_adapters(model, "", 4, freeze_vision=False, seed=1)
    assert torch.equal(scored(model, processor, test_set[0]), scored(shipped, processor, test_set[0]))
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert all("lora_" in name and weight.dtype == torch.float32 for name, weight in trained.items())
    matrices = [name for name, layer in shipped.named_modules() if isinstance(layer, torch.nn.Linear)
                and (".blocks." in name or ".layers." in name)]
    assert len(trained) == 2 * len(matrices) and all(min(weight.shape) == 4 for weight in trained.values())
    again, other, text = (load_policy(str(TOY / "model"), dtype=torch.bfloat16, lora_rank=4, seed=seed,
                                      freeze_vision=seed == 2) for seed in (1, 3, 2))
    for name, weight in again.named_parameters():
        assert weight.dtype == (torch.float32 if name in trained else torch.bfloat16)
    first = next(name for name in trained if "lora_A" in name)
    torch.testing.assert_close(again.get_parameter(first), trained[first], atol=1e-3, rtol=1e-2)  # (rounded to bf16)
    assert not torch.equal(other.get_parameter(first), trained[first])
    assert not [name for name, weight in text.named_parameters() if weight.requires_grad and "visual" in name]


def test_lora_learns_and_is_read_back(adapted, small, processor, test_set, tmp_path, monkeypatch):
    """The weights stay; the checkpoint is peft's, and this code, peft and eval.py read the same policy from it."""
    newest = max(adapted.glob("checkpoint-0*"))
    files = {path.name for path in newest.iterdir()}
    assert files >= {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"}
    assert "model.safetensors" not in files and (newest / "adapter_model.safetensors").stat().st_size < 400_000
    moved = load_file(newest / "adapter_model.safetensors")
    assert all(value.abs().max() > 0 for value in moved.values()), "each has been trained: those that were 0 are not"
    log = [line for line in lines(adapted) if "reward" in line]
    assert log[0]["ref_kl"] == pytest.approx(0, abs=1e-6) and log[-1]["ref_kl"] > 1e-6
    assert all(line["sampler_gap"] < 1e-5 for line in log)

    ours, _ = load_to_sample(str(newest), None)
    base = load_policy(str(TOY / "model"))
    got, plain = scored(ours, processor, test_set[0]), scored(base, processor, test_set[0])
    assert (got - plain).abs().max() > 1e-4
    with without_adapters(ours):
        assert torch.equal(scored(ours, processor, test_set[0]), plain)
    assert torch.equal(scored(ours, processor, test_set[0]), got), "and they are on again"
    theirs = peft.PeftModel.from_pretrained(base, str(newest))
    torch.testing.assert_close(scored(theirs.base_model.model, processor, test_set[0]), got, atol=1e-6, rtol=1e-6)
    merged = theirs.merge_and_unload()
    torch.testing.assert_close(scored(merged, processor, test_set[0]), got, atol=1e-4, rtol=1e-4)

    half = load_policy(str(newest), dtype=torch.bfloat16)
    for name, value in moved.items():
        mine = name.removeprefix("base_model.model.").replace(".weight", ".default.weight")
        assert torch.equal(half.get_parameter(mine), value), "in fp32, as they were saved"
    save_records(str(tmp_path / "test.parquet"), test_set[:4])
    monkeypatch.setattr(sys, "argv", ["eval.py", "--model", str(newest), "--benchmark", f"{tmp_path}/test.parquet",
                                      "--max-tokens", "40", "--out", str(tmp_path / "eval")])
    eval_program.main()
    assert json.loads((tmp_path / "eval/scores.json").read_text())["scores"][0]["problems"] == 4


def test_a_lora_run_that_was_stopped_goes_on_the_same(adapted, small, tmp_path):
    """Adapters, their moments and the reference, to the bit; also where the base lies elsewhere by then."""
    run = tmp_path / "run"
    main([*small, *OPTIONS, "--out", str(run), "--max-steps", "3"])
    kept = max(run.glob("checkpoint-0*")) / "adapter_config.json"
    away = kept.read_text().replace(str(TOY), "/away/" + str(TOY)[6:])
    assert len(away) == len(kept.read_text()) and away != kept.read_text()
    kept.write_text(away)
    main([*small, *OPTIONS, "--out", str(run), "--resume"])
    assert lines(run) == lines(adapted)
    want, got = weights(adapted), weights(run)
    assert want.keys() == got.keys() and all(torch.equal(want[name], got[name]) for name in want)


def test_adapters_are_no_model_to_start_from(adapted, processor):
    """Full training of a model with adapters, or a KL to one, would be to something that nobody asked for."""
    newest = max(adapted.glob("checkpoint-0*"))
    for rank in (0, 4):
        with pytest.raises(ValueError, match="holds LoRA adapters, not a model to train: merge"):
            load_trainer(str(newest), processor, torch.device("cpu"), lr=1e-4, start=str(newest), lora_rank=rank)
