"""What touches what: contacts of each task in C MuJoCo, the evidence for those that `--physics fast` leaves out.

    python benchmarks/contacts.py --policies runs/NAME_OF_ANT runs/NAME_OF_HUMANOID --env-ids Ant Humanoid

Episodes on the original model, by random actions and, where there is one, by a task's policy with noise of 0.1 of the
largest action. After each environment step all contacts nearer than their margin are counted: how many there are at
once, and for each pair of geoms the share of the steps in which it touches. Left out: pairs that cannot touch in
`fast`. Over the cap: steps with more contacts of one condim, of those that can, than `fast_max_contacts`.
Writes benchmarks/results/NAME.json.
"""

import collections
import dataclasses
from pathlib import Path

import common
import mujoco
import numpy as np
import tyro

import ppo_mjx as ppo


@dataclasses.dataclass
class Args:
    env_ids: tuple[str, ...] = tuple(ppo.TASKS)
    policies: tuple[str, ...] = ()  # run folders, one a task, in the same order
    steps: int = 20_000  # environment steps of each kind
    pairs: int = 8  # how many of those left out are printed
    name: str = "contacts"  # of the JSON file
    smoke: bool = False


def touching(model: mujoco.MjModel, data: mujoco.MjData) -> list[tuple[int, int]]:
    return [tuple(sorted(contact.geom)) for contact in data.contact[:data.ncon] if contact.dist < contact.includemargin]


def count(env_id: str, policy: dict | None, steps: int) -> dict:
    """Shares of the steps: of each pair of geoms, of those with a pair that `fast` leaves out, and over its cap."""
    env = ppo.Env(env_id)
    original, fast, rng = ppo.CMujocoEnv(env), ppo.load_model(env.task, "fast"), np.random.default_rng(0)
    pairs, most, left_out, over_cap, over, returns = collections.Counter(), 0, 0, 0, True, []
    for _ in range(steps):
        if over:
            obs, _ = original.reset(len(returns))
            returns.append(0.0)
        noise = env.max_action * rng.uniform(-1, 1, env.action_size)
        action = noise if policy is None else ppo.act(policy, obs) + 0.1 * noise
        obs, reward, terminated, truncated, _ = original.step(np.clip(action, -env.max_action, env.max_action))
        over, returns[-1] = terminated or truncated, returns[-1] + reward
        found = touching(original.model, original.data)
        kept = [pair for pair in found if touches_in(fast, *pair)]
        pairs.update(set(found))
        most, left_out = max(most, len(found)), left_out + (len(kept) < len(found))
        kinds = collections.Counter(max(fast.geom_condim[i] for i in pair) for pair in kept)
        over_cap += env.task.fast_max_contacts >= 0 and max(kinds.values(), default=0) > env.task.fast_max_contacts
    names = [original.model.geom(i).name for i in range(original.model.ngeom)]
    shares = {" - ".join(names[i] for i in pair): {"share": n / steps, "in fast": touches_in(fast, *pair)}
              for pair, n in pairs.most_common()}  # fmt: skip
    return {"steps": steps, "episodes": len(returns), "mean_return": float(np.mean(returns)), "most_at_once": most,
            "left_out": left_out / steps, "over_cap": over_cap / steps, "pairs": shares}  # fmt: skip


def touches_in(model: mujoco.MjModel, one: int, other: int) -> bool:
    """Whether two geoms, of bodies that may touch, do so in the model."""
    kinds, reaches = model.geom_contype, model.geom_conaffinity
    return bool(kinds[one] & reaches[other] or kinds[other] & reaches[one])


def main(args: Args) -> None:
    if args.smoke:
        args = dataclasses.replace(args, env_ids=args.env_ids[:2], policies=(), steps=200)
    result, rows = {}, []
    for index, env_id in enumerate(args.env_ids):
        policies = {"random actions": None}
        if args.policies:
            policies["policy"] = dict(np.load(Path(args.policies[index]) / "policy.npz"))
        result[env_id] = {kind: count(env_id, policy, args.steps) for kind, policy in policies.items()}
        for kind, row in result[env_id].items():
            out = {name: pair["share"] for name, pair in row["pairs"].items() if not pair["in fast"]}
            listed = ", ".join(f"{name} {share:.2%}" for name, share in list(out.items())[:args.pairs])
            rows.append([env_id, kind, row["steps"], row["most_at_once"], f"{row['left_out']:.2%}",
                         f"{row['over_cap']:.2%}", listed or "-"])  # fmt: skip
    common.table(["task", "by", "steps", "contacts at once", "steps with one left out", "over the cap",
                  "pairs left out, share of the steps"], rows)  # fmt: skip
    common.write(args.name, dataclasses.replace(args, policies=()), {"tasks": result}, args.smoke)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
