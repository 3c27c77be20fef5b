"""The paper's ablation (Fig. 7) in numbers, on the small world: every variant, several seeds.

    python nano/ablate.py                    # variants and sweeps, three seeds each, two at a time
    python nano/ablate.py full "gamma 1" --seeds 5
    python nano/ablate.py full "random weights" --base nano/weights/generator --steps 250 \\
        --frames 256 --more="--warmup 20"
    python nano/ablate.py --report           # nano/ablation.md alone, from nano/ablation.jsonl

A run is one `train.py` from the same weights, scored on the held-out clean and wild scenes. Edges
take longer to learn than an ablation of twenty runs can wait for: so by default all runs go on from
the shipped FiffDepth, each with its own loss, and what it loses or gains is what its part is for.
What a run scored is a line of nano/ablation.jsonl, and what is there is not computed again; a run
that was interrupted goes on from its checkpoint.
Not needed to understand the paper.
"""
import argparse
import hashlib
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from benchmarks.report import table  # noqa: E402
from benchmarks.sets import TEST_SETS  # noqa: E402
from data import (FrameSet, HelpFormatter, UserError, command, read_lines,  # noqa: E402
                  replacing)
from evaluate import pair_accuracy, random_pairs, score  # noqa: E402
from infer import predict_image  # noqa: E402
from model import INFO_FILE, FiffDepth, Teacher  # noqa: E402
from train import fingerprint  # noqa: E402

ALL = {"abs_rel": "AbsRel, %", "delta1": "delta1, %", "f1": "boundary F1", "pairs": "pairs, %"}
# Held-out scenes of both styles, and photographs of rooms, whose measured depth has no sharp edges.
TESTS = {"clean": ALL, "wild": ALL, "nyu": {k: v for k, v in ALL.items() if k != "f1"}}
# Each variant is the paper's method, gamma 0.5 and lambda_k 0.2, less one of its parts.
VARIANTS = {
    "full": [],
    "gamma 1": ["--gamma", "1"],
    "lambda_k 0": ["--lambda_k", "0"],
    "no teacher": ["--no_teacher"],
    "teacher at d_0": ["--teacher_at_d0"],
    "random weights": ["--base", "random"],  # the same UNet, untrained
    "our two flags": ["--filter_noise", "0.5", "--lambda_low", "1"],
}
SWEEPS = {f"{name} {value}": [f"--{name}", str(value)]
          for name, values in (("gamma", (0, 0.25, 0.75)), ("lambda_k", (0.05, 0.5, 1)),
                               ("filter_noise", (0.5,)), ("lambda_low", (1,)))
          for value in values}


class Claim(NamedTuple):
    """The variant `better` scores higher than the variant `than` in `measure`, on photographs where
    they were scored and measure that, else on wild scenes."""
    text: str
    better: str
    than: str
    measure: str

    def test(self, line):
        return "nyu" if self.measure in line.get("nyu", ()) else "wild"


CLAIMS = (
    Claim("predicting image latents alone confuses which thing is nearer", "full", "gamma 1",
          "pairs"),
    Claim("without the trajectory some details are lost", "full", "lambda_k 0", "f1"),
    Claim("without the teacher it generalises less", "full", "no teacher", "delta1"),
    Claim("the teacher at d_0 reduces details", "full", "teacher at d_0", "f1"),
    Claim("ours: a generator is the better start", "full", "random weights", "delta1"),
    Claim("ours: the two flags bring layout", "our two flags", "full", "delta1"),
    Claim("ours: the two flags bring details", "our two flags", "full", "f1"),
    Claim("ours: with them the filter keeps details from the teacher", "our two flags",
          "teacher at d_0", "f1"),
)


# ---------------------------------------------------------------- one run


def train_and_score(name, seed, a):
    """Trains one variant in its own process, scores it, and keeps the line of its results."""
    out = run_folder(a.work, name, seed)
    flags = [str(random_base(seed, a)) if flag == "random" else flag
             for flag in (VARIANTS | SWEEPS)[name]]
    trained = (out / "unet").exists() and not (out / "training.pt").exists()
    if not trained:
        train_one(out, seed, flags, a)
    model, line = FiffDepth.from_pretrained(out), {
        "of": a.of, "base": a.base.name, "variant": name, "seed": seed, "steps": a.steps,
        "seconds_a_step": round(seconds_a_step(out), 3), "workers": a.workers}
    for test, frames in a.tests.items():
        line[test] = scores_on(model, frames, a.frames, TESTS[test])
    with a.lock, open(a.results, "a") as file:
        file.write(json.dumps(line) + "\n")
    (out / "training.pt").unlink(missing_ok=True)  # only resuming needed it


def run_folder(work, name, seed):
    return work / f"{name.replace(' ', '_')}_{seed}"


def train_one(out, seed, flags, a):
    """One train.py, from its checkpoint if there is one."""
    command = [sys.executable, HERE.parent / "train.py", "--out", out]
    if (out / "training.pt").exists():
        command += ["--resume"]
    else:
        command += ["--steps", str(a.steps), "--seed", str(seed), "--val_every", "0",
                    "--base", a.base, "--teacher", a.teacher, "--cache", a.cache,
                    "--data", f"nano={a.data}/clean/train", f"photos={a.photos}",
                    *shlex.split(a.more), *flags]
    threads = str(max(1, os.cpu_count() // a.workers))
    log_file = a.work / f"{out.name}.log"
    with open(log_file, "a") as log:
        child = subprocess.Popen(command, stdout=log, stderr=log,
                                 env={**os.environ, "OMP_NUM_THREADS": threads})
        a.children.append(child)
        status = child.wait()
    if status:
        last = (log_file.read_text().splitlines() or [""])[-1]
        raise UserError(f"train.py stopped with {status}: {last} (all of it in {log_file})")


def random_base(seed, a):
    """The generator's folder with a UNet that has learned nothing, another one for each seed."""
    folder = a.work / f"untrained_{seed}"
    if (folder / INFO_FILE).exists():  # written last
        return folder
    model = FiffDepth.from_pretrained(a.base)
    torch.manual_seed(1 + seed)
    model.unet = type(model.unet).from_config(model.unet.config)
    model.save_pretrained(folder)
    return folder


def seconds_a_step(out):
    """Median over the second half of a run, when most latents are in the cache."""
    flags = json.loads((out / "flags.json").read_text())
    pictures = flags["batch"] / (2 if flags["no_teacher"] else 1)
    rates = [line["pictures_per_second"] for line in read_lines(out / "log.jsonl")
             if "loss" in line]
    return pictures / statistics.median(rates[len(rates) // 2:])


def scores_on(model, frames, count, measures=ALL):
    """Means over `count` frames of a held-out set, evenly spaced -> {measure: value}, and the
    number of those that all measures could score."""
    rows = []
    for i in range(0, len(frames), max(1, len(frames) // count))[:count]:
        rgb, depth, valid = frames.or_stop(frames.read, i)
        pred, space = predict_image(model, rgb), model.info["target"]
        pairs = random_pairs(depth, valid, zlib.crc32(frames.names[i].encode()))
        rows.append((*score(pred, depth, valid, space, frames.layout.near, frames.layout.far),
                     pair_accuracy(pred, pairs, space)))
    rows = np.array(rows)
    rows = rows[np.isfinite(rows).all(1)]  # all means are of the same frames
    means = dict(zip(ALL, rows.mean(0).round(5).tolist()))
    return {measure: means[measure] for measure in measures} | {"scored": len(rows)}


# ---------------------------------------------------------------- many runs, and what they say


def run_all(names, a):
    """Does what is missing, --workers runs at a time; a run that fails does not stop the others."""
    done = {(line["variant"], line["seed"]) for line in results(a)}
    # one seed of every variant first: an early end leaves a table, not a column
    wanted = [(name, seed) for seed in range(a.seeds) for name in names
              if (name, seed) not in done]
    failed = []
    with ThreadPoolExecutor(a.workers) as pool:
        runs = [pool.submit(train_and_score, *run, a) for run in wanted]
        try:
            for run in tqdm(as_completed(runs), total=len(runs), unit="run"):
                if error := run.exception():
                    if not isinstance(error, (UserError, OSError)):
                        raise error
                    failed.append(error)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in a.children:
                child.terminate()  # it saves first
            raise
    if failed:
        raise UserError(f"{len(failed)} of {len(wanted)} runs failed; the first: {failed[0]}")


def results(a):
    """The lines of the results that belong to these weights and settings, one a run."""
    return one_a_run(line for line in read_results(a.results) if line["of"] == a.of)


def one_a_run(lines):
    return list({(line["variant"], line["seed"]): line for line in lines}.values())


def read_results(file):
    """The results of all experiments, a dict a line."""
    lines = file.read_text().splitlines() if file.exists() else []
    for number, line in enumerate(lines):
        try:
            lines[number] = json.loads(line)
            lines[number]["of"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{file}, line {number + 1}: damaged; remove this line, and the same "
                            "command scores its run again") from None
    return lines


def write_report(file):
    """ablation.jsonl -> ablation.md beside it, and the same on the screen."""
    text = "\n".join(["# The ablation, in numbers (`python nano/ablate.py --report`)", "",
                      *reports(file)])
    with replacing(file.with_suffix(".md")) as part:
        part.write_text(text, "utf-8")
    print(text)


def reports(file):
    """The tables of all experiments in the results, in the order of their last runs."""
    experiments = {}
    for line in read_results(file):
        experiments[line["of"]] = [*experiments.pop(line["of"], []), line]
    if not experiments:
        raise UserError(f"{file} holds no runs; first: python nano/ablate.py")
    for lines in experiments.values():
        yield from report(one_a_run(lines))
        yield ""


def report(lines):
    """Markdown: the table of variants and sweeps, then a verdict for each claim."""
    names = [name for name in VARIANTS | SWEEPS if any(x["variant"] == name for x in lines)]
    tests = [test for test in TESTS if test in lines[0]]
    scored = ", ".join(f"{min(line[test]['scored'] for line in lines)} {test}" for test in tests)
    yield (f"{lines[0]['steps']} steps a run from {lines[0]['base']}; pictures scored: {scored}; "
           "mean ± standard deviation over seeds")
    yield ""
    columns = [(test, measure) for test in tests for measure in TESTS[test]]
    yield from table(["variant", "seeds", *(f"{t}: {TESTS[t][m]}" for t, m in columns)], (
        [name, sum(x["variant"] == name for x in lines),
         *(spread(values(lines, name, *column), column[1]) for column in columns)]
        for name in names))
    yield ""
    pairs = ((claim, *(values(lines, name, claim.test(lines[0]), claim.measure)
                       for name in (claim.better, claim.than))) for claim in CLAIMS)
    yield from table(["claim", "measured by", "with", "without", "verdict"], (
        [claim.text, f"{claim.test(lines[0])}: {ALL[claim.measure]}",
         f"{claim.better}: {spread(better, claim.measure)}",
         f"{claim.than}: {spread(than, claim.measure)}", verdict(better, than)]
        for claim, better, than in pairs if better and than))


def widest_experiment(file):
    """The identity of the experiment with the most variants, the newest of several such."""
    variants = {}  # of each experiment, in the order of their newest runs
    for line in read_results(file):
        variants[line["of"]] = variants.pop(line["of"], set()) | {line["variant"]}
    if not variants:
        raise UserError(f"{file} holds no runs; first: python nano/ablate.py")
    return max(reversed(variants), key=lambda of: len(variants[of]))


def values(lines, name, test, measure):
    return [line[test][measure] for line in lines if line["variant"] == name]


def spread(numbers, measure):
    factor, digits = (1, 3) if measure == "f1" else (100, 2)
    mean = f"{factor * statistics.mean(numbers):.{digits}f}"
    if len(numbers) < 2:
        return mean  # one seed says nothing about the spread
    return f"{mean} ± {factor * statistics.stdev(numbers):.{digits}f}"


def verdict(better, than):
    """By an exact rank test: held when at most one in twenty ways of dealing the same scores out to
    the two variants would favour `better` as much; with three seeds against three, when each beats
    each. Were all parts of no use, up to a third of the time one of eight such claims would be held
    all the same. Seeds vary the order of frames and the noise (and the untrained weights);
    generator, teacher and test scenes stay the same."""
    if min(len(better), len(than)) < 3:
        return "fewer than three seeds"
    scores, n = [*better, *than], len(better)

    def wins(chosen):
        """Pairs in which a chosen run beats one of the rest."""
        rest = [x for i, x in enumerate(scores) if i not in chosen]
        return sum(scores[i] > x for i in chosen for x in rest)

    deals = [wins(chosen) for chosen in combinations(range(len(scores)), n)]
    found = wins(range(n))
    if sum(deal >= found for deal in deals) <= 0.05 * len(deals):
        return "held"
    reverse = sum(deal <= found for deal in deals) <= 0.05 * len(deals)
    return "not held: the reverse" if reverse else "too close to call"


# ---------------------------------------------------------------- the command


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=HelpFormatter)
    add = parser.add_argument
    usual = [name for name in VARIANTS | SWEEPS if name != "random weights"]
    add("variants", nargs="*", default=usual, help=", ".join(VARIANTS | SWEEPS))
    add("--seeds", type=int, default=3, help="runs of each")
    add("--steps", type=int, default=80, help="optimiser steps of a run")
    add("--frames", type=int, default=128, help="held-out frames scored of each style")
    add("--workers", type=int, default=2, help="runs at a time, each on its share of the cores")
    add("--data", type=Path, default=HERE / "data", help="folder that nano/scenes.py wrote")
    add("--photos", type=Path, help="real half of each batch; without it wild/train in --data")
    add("--nyu", type=Path, help="NYUv2's test pictures in Marigold's layout, to be scored, too")
    add("--base", type=Path, default=HERE / "weights/fiffdepth",
        help="weights to start from, of FiffDepth or of the generator")
    add("--teacher", type=Path, default=HERE / "weights/teacher", help="source of pseudo-labels")
    add("--cache", type=Path, default=HERE.parent / "runs/cache", help="latents, shared by all")
    add("--work", type=Path, default=HERE.parent / "runs/ablate", help="runs and their logs")
    add("--results", type=Path, default=HERE / "ablation.jsonl", help="a line a run")
    add("--more", metavar="FLAGS", help='further flags of every train.py: --more="--no_flip"',
        default="--batch 64 --micro 16 --optimizer muon --lr 1e-3 --lr_end 0.02 --warmup 10")
    add("--report", action="store_true",
        help="train nothing; the tables of all experiments in --results")
    a = parser.parse_args(argv)
    for name in a.variants:
        if name not in VARIANTS | SWEEPS:
            parser.error(f"unknown variant {name!r}: choose from {', '.join(VARIANTS | SWEEPS)}")
    if min(a.seeds, a.steps, a.frames, a.workers) < 1:
        parser.error("--seeds, --steps, --frames and --workers are at least 1")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if a.report:
        return write_report(a.results)
    a.photos = a.photos or a.data / "wild/train"
    # now: a wrong folder must not wait for the first training to end
    a.tests = {style: FrameSet("nano", a.data / style / "test") for style in ("clean", "wild")}
    if a.nyu:
        a.tests["nyu"] = FrameSet("nyu", a.nyu, flag="--nyu", rows=TEST_SETS)
    a.of, a.lock, a.children = identity(a), threading.Lock(), []
    a.work = a.work / a.of
    a.work.mkdir(parents=True, exist_ok=True)
    a.results.parent.mkdir(parents=True, exist_ok=True)
    run_all(a.variants, a)
    write_report(a.results)


def identity(a):
    """Of all that the runs have in common; other weights or settings are another experiment."""
    base = FiffDepth.from_pretrained(a.base)
    nets = (base.unet, base.vae, Teacher.from_pretrained(a.teacher))
    sets = [FrameSet("nano", a.data / "clean/train"), FrameSet("photos", a.photos),
            *a.tests.values()]
    made_of = [[fingerprint(net) for net in nets], [len(s) for s in sets], a.steps, a.frames,
               a.more]
    return hashlib.sha1(json.dumps(made_of).encode()).hexdigest()[:8]


if __name__ == "__main__":
    sys.exit(command(main))
