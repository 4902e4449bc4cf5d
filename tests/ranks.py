"""What test_sharding.py runs under torchrun: updates on made-up work that is uneven over the ranks.

    torchrun --nproc-per-node 2 tests/ranks.py SCENARIO,... FOLDER

Each scenario is three updates, of which FOLDER/SCENARIO/checkpoint-000000 tells. `run` does the same in one process.
"""
from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch.distributed.fsdp import MixedPrecisionPolicy  # noqa: E402
from transformers import logging  # noqa: E402

import rollout  # noqa: E402
import train  # noqa: E402
from data import Processor, Record, load_records  # noqa: E402
from eval import place  # noqa: E402
from rewards import Rewards  # noqa: E402
from rollout import Group, load_policy, sample_groups  # noqa: E402

plain_autocast = rollout.autocast
TOY = ROOT / "assets" / "toy"
BASE = dict(model=str(TOY / "model"), prompts_per_rollout=6, group_size=4, micro_tokens=200,
            max_response_tokens=40, grad_clip=0.5)
# Of six groups, rank 0 of two has 0, 2, 4 and rank 1 has 1, 3, 5; an update is two groups.
SCENARIOS: dict[str, dict] = {
    "token": {}, "sequence": dict(aggregation="sequence", freeze_vision=True, mask_truncated=True),
    # With a sharded reference; groups without signal are forwarded too.
    "constant": dict(aggregation="constant", kl_coef=0.1),
    "text": dict(count_no_signal=True),  # without any picture
    "one": {},  # a single group: one rank has nothing at all
    "silent": {},  # no signal on any rank
    "half": {},  # gathered in bf16, and a replica in bf16, as on GPUs
    "offload": dict(offload=True)}


def made_up(name: str, processor: Processor) -> tuple[list[Group], Rewards]:
    """Six groups of four responses, of 1 to 40 tokens; the same on every rank."""
    records = load_records(str(TOY / "test.parquet"), limit=6)
    if name == "text":
        records = [Record(f"t{i}", f"What is {i} + {i}?", str(2 * i)) for i in range(6)]
    else:
        records[4] = Record("text only", "What is 2 + 2?", "4")  # of rank 0, while rank 1 has a picture
    records = records[:1] if name == "one" else records
    prompts = [processor.encode(r, "observe") for r in records]
    rng = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 41, (len(records), 4), generator=rng)
    words = torch.tensor(processor.tokenizer("one of red and blue is 3, 5 or 12 <answer>").input_ids)
    groups = [Group(r, p, [words[torch.randint(len(words), (n,), generator=rng)].tolist() for n in row], [""] * 4,
                    [n == 40 or g == 1 for g, n in enumerate(row)], [torch.zeros(n) for n in row])
              for r, p, row in zip(records, prompts, lengths.tolist())]
    signal = torch.ones(len(records), dtype=torch.bool)
    signal[1:2] = False  # of rank 1, in the first update
    if name == "silent":
        signal[:] = False
    advantages = torch.randn(len(records), 4, generator=rng) * signal[:, None]
    nothing = torch.zeros(len(records), 4)
    return groups, Rewards(nothing, nothing, nothing, nothing, torch.ones(len(records)), advantages, signal, nothing,
                           [[None] * 4] * len(records))


def load(name: str, source: str) -> tuple:
    """Settings and models, as train.main has them."""
    cfg = train.Config(**BASE | SCENARIOS[name])
    device = train.join_processes(cfg)
    if name == "half":
        train.MixedPrecisionPolicy = lambda *_, **__: MixedPrecisionPolicy(
            torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
        rollout.autocast = lambda model: torch.autocast("cpu", torch.bfloat16, enabled=model.dtype == torch.float32)
    model, reference, sampler, optimizer = train.load_models(cfg, source, device)
    train.MixedPrecisionPolicy = MixedPrecisionPolicy
    if name == "half":
        sampler = load_policy(source, dtype=torch.bfloat16)
    if reference is not None:
        with torch.no_grad():
            reference.lm_head.weight.mul_(1.01)  # else the KL is 0
    return cfg, model, reference, sampler, optimizer


def run(name: str, folder: Path | None = None, source: str = "", lrs=(1e-4, 2e-4, 1e-4)) -> dict:
    """Updates from `source`, a checkpoint (else from the shipped model) -> what came of it, weights gathered."""
    processor = Processor(str(TOY / "model"))
    cfg, model, reference, sampler, optimizer = load(name, source or str(TOY / "model"))
    if source:
        train.load_optimizer(Path(source), model, optimizer)
    (rank, world), (groups, rewards) = place(), made_up(name, processor)
    own = [g if p % world == rank else replace(g, prompt=None, logprobs=None) for p, g in enumerate(groups)]
    stats = train.update(model, reference, processor, optimizer, own, rewards, list(lrs), cfg) if lrs else {}
    train.refresh(sampler, model)
    weights = {n: train.whole(p.detach()).clone() for n, p in model.named_parameters()}
    copies = dict(sampler.named_parameters())
    assert all(torch.equal(weights[n].to(p.dtype), p) for n, p in copies.items()), "the replica is the policy"
    sampled = sample_groups(sampler, processor, [groups[0].record], [groups[0].prompt], samples=2, temperature=1.0,
                            max_tokens=20, seed=0)[0].responses
    moments = {f"{kind} {n}": train.whole(value).clone() for n, p in model.named_parameters()
               for kind, value in optimizer.state.get(p, {}).items()}
    rollout.autocast = plain_autocast
    if folder:
        train.save_checkpoint(folder, 0, model, sampler, processor, optimizer, {"stats": stats, "sampled": sampled})
    return {"weights": weights, "moments": moments, "stats": stats, "sampled": sampled}


if __name__ == "__main__":
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    names, out = sys.argv[1].split(","), Path(sys.argv[2])
    if names == ["die"]:  # rank 1 fails in the second update of a run of train.py, whose options follow
        if os.environ["RANK"] == "1":
            real = train.update

            def fail(*args):
                train.update = fail_now
                return real(*args)

            def fail_now(*args):
                raise RuntimeError("rank 1 has had enough")

            train.update = fail
        train.main(sys.argv[3:])
    for name in names if names != ["die"] else ():
        run(name, out / name)
    if "token" in names:  # and on from its checkpoint, by no step and by one
        saved = str(out / "token/checkpoint-000000")
        run("token", out / "restored", saved, lrs=())
        run("token", out / "resumed", saved, lrs=(1e-4,))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
