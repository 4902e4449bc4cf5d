"""What test_sharding.py runs under torchrun: updates on made-up work that is uneven over the ranks.

    torchrun --nproc-per-node 2 tests/ranks.py SCENARIO,... FOLDER

Each scenario is three updates, of which FOLDER/SCENARIO/checkpoint-000000 tells. `run` does the same in one process.
"""
from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch.distributed import fsdp  # noqa: E402
from transformers import logging  # noqa: E402

import rollout  # noqa: E402
import train  # noqa: E402
from data import Processor, Record, load_records  # noqa: E402
from eval import read_json  # noqa: E402
from rewards import Response, Rewards  # noqa: E402
from rollout import Group, Policy, Sample, full_tensor, load_policy, rank_and_world, sample_groups  # noqa: E402

plain_autocast, MIXED = rollout.autocast, fsdp.MixedPrecisionPolicy
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
    "lora": dict(lora_rank=4, kl_coef=0.1),  # whose reference is the policy without its adapters
    "half": {},  # gathered in bf16, and a replica in bf16, as on GPUs
    "offload": dict(offload=True)}


def made_up(name: str, processor: Processor) -> tuple[list[Group], list[list[Response]], Rewards]:
    """Six groups of four responses, of 1 to 40 tokens; the same on every rank."""
    records = load_records(str(TOY / "test.parquet"), limit=6)
    if name == "text":
        records = [Record(f"t{i}", f"What is {i} + {i}?", str(2 * i)) for i in range(6)]
    else:
        records[4] = Record("text only", "What is 2 + 2?", "4")  # of rank 0, while rank 1 has a picture
    records = records[:1] if name == "one" else records
    prompts = [processor.encode(r, "observe") for r in records]
    rng = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 41, (len(records), 4), generator=rng).tolist()
    words = torch.tensor(processor.tokenizer("one of red and blue is 3, 5 or 12 <answer>").input_ids)
    groups = [Group(record, prompt, [Sample("", words[torch.randint(len(words), (n,), generator=rng)].tolist(),
                                            n == 40 or g == 1, torch.zeros(n)) for g, n in enumerate(row)])
              for record, prompt, row in zip(records, prompts, lengths)]
    responses = [[Response(None, 0, 0, None, tokens=len(s.ids), truncated=s.truncated) for s in group.samples]
                 for group in groups]
    signal = torch.ones(len(records), dtype=torch.bool)
    signal[1:2] = False  # of rank 1, in the first update
    if name == "silent":
        signal[:] = False
    advantages = torch.randn(len(records), 4, generator=rng) * signal[:, None]
    nothing = torch.zeros(len(records), 4)
    return groups, responses, Rewards(nothing, nothing, nothing, nothing, torch.ones(len(records)), advantages, signal,
                                      nothing)


def load(name: str, source: str) -> tuple[train.Config, Policy]:
    """Settings and models, as train.main has them."""
    cfg = train.Config(**BASE | SCENARIOS[name])
    device = rollout.start_processes(cfg.offload)
    if name == "half":
        fsdp.MixedPrecisionPolicy = lambda *_, **__: MIXED(
            torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
        rollout.autocast = lambda model: torch.autocast("cpu", torch.bfloat16, enabled=model.dtype == torch.float32)
    policy = rollout.load_trainer(source, Processor(str(TOY / "model")), device, start=cfg.model, lr=cfg.lr,
                                  kl=cfg.kl_coef > 0, freeze_vision=cfg.freeze_vision, offload=cfg.offload,
                                  gradient_checkpointing=cfg.gradient_checkpointing, lora_rank=cfg.lora_rank)
    fsdp.MixedPrecisionPolicy = MIXED
    if name == "half":
        policy.sampler = load_policy(source, dtype=torch.bfloat16)
    if policy.reference is not None and not cfg.lora_rank:
        with torch.no_grad():
            policy.reference.lm_head.weight.mul_(1.01)  # else the KL is 0
    return cfg, policy


def state_of(policy: Policy) -> dict:
    """Weights and moments, gathered."""
    named = dict(policy.model.named_parameters())
    return {"weights": {n: full_tensor(p.detach()).clone() for n, p in named.items()},
            "moments": {f"{kind} {n}": full_tensor(value).clone() for n, p in named.items()
                        for kind, value in policy.optimizer.state.get(p, {}).items()}}


def saved(path: Path, name: str = "token") -> dict:
    """The outcome of a scenario, as its checkpoint has it."""
    _, policy = load(name, str(path))
    state = read_json(path / "trainer/state.json")
    train.load_moments(path, policy, state["steps"])
    return state | state_of(policy)


def run(name: str, folder: Path | None = None, source: str = "", lrs=(1e-4, 2e-4, 1e-4)) -> dict:
    """Updates from `source`, a checkpoint (else from the shipped model) -> what came of it, weights gathered."""
    cfg, policy = load(name, source or str(TOY / "model"))
    if source:
        train.load_moments(Path(source), policy, read_json(Path(source) / "trainer/state.json")["steps"])
    (rank, world), (groups, responses, rewards) = rank_and_world(), made_up(name, policy.processor)
    mine = [group if p % world == rank else None for p, group in enumerate(groups)]
    stats = train.update(policy, mine, responses, rewards, list(lrs), cfg) if lrs else {}
    rollout.copy_weights(policy)
    state, copies = state_of(policy), dict(policy.sampler.named_parameters())
    assert all(torch.equal(state["weights"][n].to(p.dtype), p) for n, p in copies.items()), "the replica is the policy"
    [group] = sample_groups(policy.sampler, policy.processor, [groups[0].record], [groups[0].prompt], samples=2,
                            temperature=1.0, max_tokens=20, seed=0)
    outcome = {"stats": stats, "sampled": [s.ids for s in group.samples]}
    rollout.autocast = plain_autocast
    if folder:
        train.save_checkpoint(folder, 0, policy, outcome)
    return outcome | state


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
        source = str(out / "token/checkpoint-000000")
        run("token", out / "restored", source, lrs=())
        run("token", out / "resumed", source, lrs=(1e-4,))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
